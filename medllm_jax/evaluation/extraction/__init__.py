"""Reading answers from what a model writes."""
