"""Hugging Face format to run folder and back; the code is medllm_jax.conversion."""
