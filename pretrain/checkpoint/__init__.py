"""Checkpoints on the disk: written, found, read, kept."""
