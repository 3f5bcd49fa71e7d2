"""Do two checkpoints, each a Hugging Face folder or a run folder, hold the same model?

Two answers: the same bytes under the same names (hash), and the same predictions (logits) through the model here, and
through transformers where torch is installed and the checkpoint is a Hugging Face folder.
"""

import hashlib
import importlib.util
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from flax.traverse_util import unflatten_dict

from medllm_jax.checkpoint.handle import open_checkpoint
from medllm_jax.checkpoint.orbax import checkpoints_of
from medllm_jax.config.load import to_plain
from medllm_jax.conversion.folders import ahead
from medllm_jax.conversion.hf_weights import HFFolder, open_hf
from medllm_jax.conversion.history import exported_dtype, history_of
from medllm_jax.conversion.names import RowRange, Tensor, in_words, row_ranges
from medllm_jax.conversion.run_weights import RANGE_BYTES, RunWeights
from medllm_jax.data.tokenizer import encode_plain, load_tokenizer
from medllm_jax.errors import UserError
from medllm_jax.model.qwen2 import Backend, Qwen2
from medllm_jax.storage import hub, run_folder
from medllm_jax.storage.remote import is_remote
from medllm_jax.terminal.log import without_bars_of_transformers
from medllm_jax.terminal.progress import Console

_log = logging.getLogger(__name__)

_LISTED = 10  # differences that are printed

Side = HFFolder | RunWeights


def verify(
    first: str,
    second: str,
    *,
    by: Sequence[str] = ("hash", "logits"),
    prompts: Sequence[str] = (),
    random_tokens: int = 64,
    tolerance: float = 1e-3,
) -> bool:
    """Prints how two checkpoints compare; True if they agree in everything asked for.

    by: `hash`, `logits` or both. prompts: texts to compare logits on; without any, one row of random tokens.
    tolerance: largest difference of a logit that counts as agreement.
    Raises UserError for what is neither a Hugging Face checkpoint nor a run folder.
    """
    sides = _as_exported(_open(first), _open(second))
    agreed = _same_config(*sides)
    if "hash" in by:
        agreed &= _same_bytes(*sides)
    if "logits" in by:
        if sides[0].config.vocab_size == sides[1].config.vocab_size:
            agreed &= _same_logits(sides, _token_rows(sides[0], prompts, random_tokens), tolerance)
        else:
            _log.info("logits: not compared, the vocabularies differ")
    _log.info(f"{first} and {second} {'agree' if agreed else 'DIFFER'}")
    return agreed


def _open(path: str) -> Side:
    path = hub.find_folder(path, hub.MODEL).folder
    if (epath.Path(path) / "config.json").exists():
        return open_hf(path)
    if checkpoints_of(path).exists():
        return RunWeights(open_checkpoint(path))
    raise UserError(
        f"{path} is neither a Hugging Face checkpoint (it has no config.json) nor a run folder (it has no checkpoints/)"
    )


def _as_exported(first: Side, second: Side) -> tuple[Side, Side]:
    """Both sides; a run in the dtype in which it is exported, where the other side is a folder of that dtype."""
    sides = [first, second]
    for place, (side, other) in enumerate(((first, second), (second, first))):
        if not isinstance(side, RunWeights) or not isinstance(other, HFFolder) or side.dtype == other.dtype:
            continue
        usual = exported_dtype(side.dtype, history_of(side.checkpoint))
        if usual == other.dtype:
            _log.info(f"{side.checkpoint.run}: its {side.dtype.name} is compared in {usual.name}, as it is exported")
            sides[place] = RunWeights(side.checkpoint, usual)
    return sides[0], sides[1]


def _same_config(first: Side, second: Side) -> bool:
    ours, theirs = to_plain(first.config), to_plain(second.config)
    # Both spellings of the same width.
    ours["head_dim"], theirs["head_dim"] = first.config.dim_of_head, second.config.dim_of_head
    differing = [f"{key} {ours[key]} and {theirs[key]}" for key in ours if ours[key] != theirs[key]]
    _log.info(f"config: {'; '.join(differing) if differing else 'equal'}")
    return not differing


# --- bytes ---------------------------------------------------------------------------------------------------------


class _Print(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    digest: str


def fingerprints(side: Side, what: str = "checkpoint") -> dict[str, _Print]:
    """Tensor name -> dtype, shape, and sha256 of its bytes. what: which of two checkpoints is read, for people."""
    if isinstance(side, RunWeights):
        side.check()
    digests = {tensor.name: hashlib.sha256() for tensor in side.tensors}
    dtypes: dict[str, str] = {}

    def read(rows: RowRange) -> tuple[Tensor, np.ndarray]:
        return rows.tensor, side.read(*rows)

    ranges = (rows for tensor in side.tensors for rows in row_ranges(tensor, _rows_at_a_time(side, tensor)))
    total, done = side.dtype.itemsize * sum(int(np.prod(tensor.shape)) for tensor in side.tensors), 0
    with Console(f"reading the {what}", total, unit="bytes") as console:
        for tensor, rows in ahead(read, ranges, workers=2):
            digests[tensor.name].update(np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data)
            dtypes[tensor.name] = rows.dtype.name
            done += rows.nbytes
            console.update(done, in_words(tensor, side.config), every_seconds=10)
    return {t.name: _Print(dtypes[t.name], t.shape, digests[t.name].hexdigest()) for t in side.tensors}


def _rows_at_a_time(side: Side, tensor: Tensor) -> int:
    if isinstance(side, RunWeights):
        return side.rows_at_a_time(tensor)
    return max(1, RANGE_BYTES // (side.dtype.itemsize * int(np.prod(tensor.shape[1:]))))


def _same_bytes(first: Side, second: Side) -> bool:
    ours, theirs = fingerprints(first, "first"), fingerprints(second, "second")
    differing = []
    for name in sorted(ours.keys() | theirs.keys()):
        a, b = ours.get(name), theirs.get(name)
        if a is None or b is None:
            differing.append(f"{name}: only in the {'second' if a is None else 'first'}")
        elif a != b:
            fields = [f"{x} and {y}" for x, y in zip(a[:2], b[:2], strict=True) if x != y]
            differing.append(f"{name}: {'; '.join(fields) or 'other values'}")
    _log.info(f"hash: {len(ours)} and {len(theirs)} tensors, {len(differing) or 'none'} differing")
    for line in differing[:_LISTED]:
        _log.info(f"  {line}")
    if len(differing) > _LISTED:
        _log.info(f"  and {len(differing) - _LISTED} more")
    return not differing


# --- predictions ---------------------------------------------------------------------------------------------------


def _token_rows(side: Side, prompts: Sequence[str], random_tokens: int) -> list[list[int]]:
    if not prompts:
        rng = np.random.default_rng(0)
        return [rng.integers(side.config.vocab_size, size=random_tokens).tolist()]
    folder = side.path if isinstance(side, HFFolder) else run_folder.tokenizer_of(side.checkpoint.run)
    rows = encode_plain(load_tokenizer(folder), prompts)
    if not all(rows):
        raise UserError("a prompt is empty: give at least a word")
    return rows


def _same_logits(sides: tuple[Side, Side], rows: list[list[int]], tolerance: float) -> bool:
    reference = logits_here(sides[0], rows)
    others = {"second, here": logits_here(sides[1], rows)}
    if importlib.util.find_spec("torch") is None:
        _log.info("logits: torch is not installed, so transformers is not compared")
    else:
        for name, side in zip(("first", "second"), sides, strict=True):
            if isinstance(side, HFFolder) and is_remote(side.path):
                _log.info(
                    f"logits: {side.path} is in a bucket, where transformers can't read it: copy it here to compare"
                )
            elif isinstance(side, HFFolder):
                others[f"{name}, transformers"] = logits_transformers(side, rows)

    _log.info(f"logits: of {sum(map(len, rows))} tokens, in float32, against `first, here`; tolerance {tolerance:g}")
    _log.info(f"  {'':<22}{'max |difference|':>18}{'mean KL, nats':>16}{'same likeliest token':>22}")
    agreed = True
    for name, logits in others.items():
        largest, divergence, same = compare(reference, logits)
        agreed &= bool(largest <= tolerance)  # not so for NaN
        _log.info(f"  {name:<22}{largest:>18.3g}{divergence:>16.3g}{same:>21.2%}")
    return agreed


def stacked_weights(side: Side) -> dict[str, np.ndarray]:
    """Path -> weight, the blocks' stacked on a first axis; holds all of them."""
    if isinstance(side, RunWeights):
        side.check()
    weights: dict[str, np.ndarray] = {}
    blocks = side.config.num_hidden_layers
    for tensor in side.tensors:
        value = side.read(tensor)
        if tensor.layer is None:
            weights[tensor.path] = value
        else:
            stacked = weights.setdefault(tensor.path, np.empty((blocks, *tensor.shape), value.dtype))
            stacked[tensor.layer] = value
    return weights


def logits_here(side: Side, rows: list[list[int]]) -> list[np.ndarray]:
    """float32 [tokens, V] for each row, through the model here; holds all the weights."""
    backend = Backend(compute_dtype=jnp.float32, param_dtype=side.dtype)
    structure, _ = nnx.split(nnx.eval_shape(lambda: Qwen2(side.config, backend, rngs=nnx.Rngs(0))))
    model = nnx.merge(structure, jax.tree.map(jnp.asarray, unflatten_dict(stacked_weights(side), sep="/")))
    with jax.default_matmul_precision("highest"):
        return [_forward(model, row) for row in rows]


def _forward(model: Any, row: list[int]) -> np.ndarray:
    tokens = jnp.asarray([row], jnp.int32)
    ones, zeros = jnp.ones_like(tokens), jnp.zeros_like(tokens)
    hidden = model(tokens, jnp.arange(len(row))[None], ones, zeros)
    return np.asarray(hidden[0] @ model.head_weight.astype(jnp.float32).T)


def logits_transformers(side: HFFolder, rows: list[list[int]]) -> list[np.ndarray]:
    """float32 [tokens, V] for each row, through transformers."""
    import torch
    from transformers import Qwen2ForCausalLM

    with without_bars_of_transformers():
        model = Qwen2ForCausalLM.from_pretrained(side.path, dtype=torch.float32, local_files_only=True)
    model.eval()
    with torch.no_grad():
        return [model(torch.tensor([row])).logits[0].numpy() for row in rows]


def compare(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> tuple[float, float, float]:
    """Largest absolute difference of two sets of logits, mean KL(first || second), share of equal argmaxes."""
    a, b = (np.concatenate(list(logits)).astype(np.float64) for logits in (first, second))
    log_p, log_q = _log_softmax(a), _log_softmax(b)
    divergence = float(np.mean(np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)))
    return float(np.max(np.abs(a - b))), divergence, float(np.mean(a.argmax(-1) == b.argmax(-1)))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))
