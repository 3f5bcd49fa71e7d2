"""Starts runs on TPUs; the code is medllm_jax.launching."""
