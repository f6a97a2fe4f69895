"""One fit, or one training loop, that saves: `ModelCheckpoint` and `CheckpointManager`."""
