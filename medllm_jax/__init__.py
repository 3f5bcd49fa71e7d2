"""Continued pretraining and Reasoning Preference Optimization of Qwen2.5 on TPUs, and on a laptop's CPU."""

from medllm_jax.storage.remote import turn_off_listing_cache
from medllm_jax.terminal.version import __version__

__all__ = ["__version__"]

turn_off_listing_cache()  # here, since it must come before whatever module of ours is the first to touch a bucket
