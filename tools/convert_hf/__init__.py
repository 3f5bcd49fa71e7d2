"""Qwen2.5 checkpoints between Hugging Face's format and run folders; see `python -m tools.convert_hf --help`."""
