"""A killed run ends like an unbroken one: `BackupAndRestore` and `ResumableDataset`."""
