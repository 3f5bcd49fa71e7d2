"""Hugging Face format to run folder, and back."""
