"""Checkpoints: written, opened once, and read."""
