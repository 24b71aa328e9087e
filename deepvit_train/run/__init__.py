"""What lies on the disk: run folders, checkpoints, metrics."""
