"""Callbacks and managers that save during training: `ModelCheckpoint` and `CheckpointManager`."""
