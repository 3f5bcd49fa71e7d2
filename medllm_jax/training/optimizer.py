"""AdamW, its schedule, and the table that says which parameters decay."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from medllm_jax.config.schema import OptimizerConfig
from medllm_jax.distributed.sharding import path_of, row_of

# Parameter path -> does weight decay hold? Every parameter that is trained matches exactly one row.
DECAYS: tuple[tuple[str, bool], ...] = (
    (r"(embed_tokens|lm_head)/weight", True),
    (r"layers/(self_attn|mlp)/\w+_proj/(weight|lora_A|lora_B)", True),
    (r"layers/self_attn/[qkv]_proj/bias", False),
    (r"(layers/)?(\w+_layer)?norm/weight", False),
)


def decay_mask(params: Any) -> Any:
    """True for every parameter that decays, by `DECAYS`."""
    return jax.tree_util.tree_map_with_path(lambda key_path, _: row_of(DECAYS, path_of(key_path)), params)


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: linear from 0 over `warmup_steps`, then the named decay over what is left of `steps`."""
    peak, end = config.learning_rate, config.learning_rate * config.final_fraction
    left = max(steps - config.warmup_steps, 1)
    after = {
        "cosine": lambda: optax.cosine_decay_schedule(peak, left, alpha=config.final_fraction),
        "linear": lambda: optax.linear_schedule(peak, end, left),
        "constant": lambda: optax.constant_schedule(peak),
    }[config.schedule]()
    # The first update is made at count 0: a warm-up that started from 0 would waste it.
    warmup = optax.linear_schedule(peak / (config.warmup_steps + 1), peak, config.warmup_steps)
    return optax.join_schedules([warmup, after], [config.warmup_steps]) if config.warmup_steps else after


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW (arXiv 1711.05101), computed in float32 whatever its moments are kept in."""
    adamw = optax.adamw(
        make_schedule(config, steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )
    adamw = _kept_in(jnp.dtype(config.state_dtype), adamw)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw) if config.clip_norm else adamw


def _kept_in(dtype: jnp.dtype, inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """The transformation with the moments of its state in a dtype; it sees them, and gradients, in float32."""

    def cast(state: Any, to: jnp.dtype) -> Any:
        return jax.tree.map(lambda x: x.astype(to) if jnp.issubdtype(x.dtype, jnp.floating) else x, state)

    def init(params: Any) -> Any:
        return cast(inner.init(params), dtype)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = inner.update(cast(updates, jnp.float32), cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(init, update)
