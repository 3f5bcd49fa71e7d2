"""The loop, the step and the losses."""
