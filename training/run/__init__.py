"""A run: building it, its steps, checkpoints, log and validation."""
