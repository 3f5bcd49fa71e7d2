"""What looks after a run."""
