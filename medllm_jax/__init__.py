"""Continued pretraining and Reasoning Preference Optimization of Qwen2.5 on TPUs, and on a laptop's CPU."""

__version__ = "0.1.0"
