"""Which modules have their annotated shapes and types checked at every call, and by what (see conftest.py)."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # a whole number is a number, as for static checkers

CHECKED = (
    "medllm_jax.data.batch",
    "medllm_jax.inference.generator",
    "medllm_jax.model.attention",
    "medllm_jax.model.quantize",
    "medllm_jax.model.qwen2",
    "medllm_jax.training.losses",
)
