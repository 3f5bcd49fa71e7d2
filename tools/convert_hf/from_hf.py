"""From a Hugging Face checkpoint to a run folder that training, evaluation and generation start from."""

import tempfile
import time
from pathlib import Path

import numpy as np
from etils import epath

from medllm_jax import checkpoint, runs
from medllm_jax.data.tokenizer import load_tokenizer
from medllm_jax.errors import UserError
from medllm_jax.metrics import Console
from medllm_jax.remote import is_remote
from medllm_jax.settings import to_plain
from tools.convert_hf.folders import check_free, new_folder
from tools.convert_hf.hf_weights import HFFolder, open_hf
from tools.convert_hf.names import Tensor, unflatten


def from_hf(source: str, target: str) -> None:
    """Converts the checkpoint in a local folder; the weights keep their dtype.

    The blocks' weights are stacked in a memory-mapped file beside the target (for a remote target, in the temporary
    folder), which is gone afterwards: room for the model on that disk is needed, and little memory.
    Raises UserError for a source that is not a whole Qwen2 checkpoint, and for a target that holds something.
    """
    start = time.monotonic()
    if is_remote(source):
        raise UserError(f"{source}: the checkpoint must be in a local folder: copy it here first")
    check_free(target)
    model = open_hf(source)
    has_tokenizer = _check_tokenizer(model)
    with new_folder(target) as run:
        if has_tokenizer:
            runs.copy_tokenizer(epath.Path(model.path), run)
        with tempfile.TemporaryDirectory(dir=None if is_remote(target) else run) as staging:
            weights = stacked_weights(model, Path(staging), Console("reading", len(model.tensors), unit="tensor"))
            print(f"writing {target}", flush=True)
            checkpoint.write_model(run, unflatten(weights), to_plain(model.config))
    size = sum(int(np.prod(tensor.shape)) for tensor in model.tensors)
    print(
        f"{target}: {size:,} parameters in {model.dtype.name}, "
        f"{'with' if has_tokenizer else 'WITHOUT'} tokenizer, {time.monotonic() - start:.1f} s"
    )


def stacked_weights(model: HFFolder, staging: Path | None, console: Console | None = None) -> dict[str, np.ndarray]:
    """Path -> weight, the blocks' stacked on a first axis; memory-mapped in a staging folder if one is given."""
    weights: dict[str, np.ndarray] = {}
    by_path: dict[str, list[Tensor]] = {}
    for tensor in model.tensors:
        by_path.setdefault(tensor.path, []).append(tensor)
    done = 0
    for path, tensors in by_path.items():
        stacked = tensors[0].layer is not None
        shape = (len(tensors), *tensors[0].shape) if stacked else tensors[0].shape
        if staging is None:
            weights[path] = np.empty(shape, model.dtype)
        else:
            weights[path] = np.memmap(staging / path.replace("/", "."), model.dtype, "w+", shape=shape)
        for tensor in tensors:
            weights[path][tensor.layer if stacked else ...] = model.read(tensor.name)
        done += len(tensors)
        if console:
            console.update(done, path, every_seconds=10)
    if console:
        console.close()
    return weights


def _check_tokenizer(model: HFFolder) -> bool:
    """Is there a tokenizer, and does it fit? UserError if it can't be loaded, or has more tokens than the embedding."""
    if not any((model.path / name).exists() for name in ("tokenizer.json", "vocab.json", "tokenizer.model")):
        print(f"{model.path} has no tokenizer: the run folder will carry none, which is enough for training only")
        return False
    tokens = len(load_tokenizer(model.path))
    if tokens > model.config.vocab_size:
        raise UserError(
            f"{model.path}: the tokenizer has {tokens} tokens, the embedding {model.config.vocab_size}: "
            "they belong to different models"
        )
    return True
