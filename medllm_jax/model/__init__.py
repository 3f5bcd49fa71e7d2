"""Qwen2.5 as a flax.nnx module, used functionally."""
