"""What runs and exams came to, as one page that needs nothing else."""
