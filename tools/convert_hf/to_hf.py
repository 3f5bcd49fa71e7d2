"""From a run folder to a Hugging Face checkpoint that transformers, vLLM and their like load."""

import re
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from etils import epath

from medllm_jax import checkpoint, runs
from medllm_jax.config import ModelConfig
from medllm_jax.data.tokenizer import load_tokenizer
from medllm_jax.errors import UserError
from medllm_jax.fingerprint import digest, lines_of
from medllm_jax.metrics import Console
from medllm_jax.model.lora import as_frozen, merge
from medllm_jax.remote import is_remote
from tools.convert_hf.folders import check_free, new_folder, replaced_folder
from tools.convert_hf.hf_config import config_json, read_json, token_ids_of, write_json
from tools.convert_hf.hf_weights import ShardWriter
from tools.convert_hf.names import Tensor, tensors_of

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def to_hf(
    source: str,
    target: str,
    *,
    step: int | None = None,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
) -> None:
    """Writes a checkpoint of a run folder as a local Hugging Face folder.

    Weights are read one parameter (all its blocks) at a time into host memory, and written into their places. Adapters
    are merged into their base as training saw it: of a quantised one, into what its codes stand for.

    step: default the newest. dtype: default as stored. overwrite: replaces a target that is a Hugging Face folder.
    Raises UserError for a source without such a checkpoint, and a target that can't be written.
    """
    start = time.monotonic()
    max_bytes = parse_size(max_shard_size)
    _check_target(target, overwrite)
    run = open_run(source, step)
    stored = np.dtype(dtype) if dtype else run.dtype
    with ExitStack() as stack:
        replace = overwrite and Path(target).exists()
        folder = Path(stack.enter_context((replaced_folder if replace else new_folder)(target)))
        _write_weights(run, folder, stored, max_bytes)
        has_tokenizer = _write_configs(run, folder, stored)
    size = sum(int(np.prod(tensor.shape)) for tensor in run.tensors)
    if run.adapted is not None:
        settings, base = run.adapted
        print(f"adapters of {source} merged into {base.checkpoint}, step {base.step}, in {settings.base}")
    print(
        f"{target}: step {run.step} of {source}, {size:,} parameters in {stored.name}, "
        f"{'with' if has_tokenizer else 'WITHOUT'} tokenizer, {time.monotonic() - start:.1f} s"
    )


def parse_size(text: str) -> int:
    """Bytes of `5GB`, `500MB`, `1GiB` or a plain number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]I?B)?", text.strip().upper())
    size = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if size <= 0:
        raise UserError(f"--max-shard-size {text!r}: a size such as 5GB or 500MB is expected")
    return size


class Run:
    """A checkpoint of a run folder: shape, dtype, and weights tensor by tensor as Hugging Face names them.

    Of a checkpoint of adapters these are the merged weights, and the dtype is that in which the base is stored.
    """

    def __init__(self, path: str, step: int):
        self.path, self.step = path, step
        self.config: ModelConfig = checkpoint.load_model_config(path, step)
        self.adapted = checkpoint.load_adapted(path, step)
        self._base = (path, step) if self.adapted is None else self.adapted.base[:2]
        self.dtype = np.dtype(checkpoint.abstract_params(*self._base)["norm"]["weight"].dtype)
        self.tensors: list[Tensor] = tensors_of(self.config)

    def stream(self, dtype: np.dtype | None = None) -> Iterator[tuple[str, np.ndarray]]:
        """Name and value of every tensor, merged ones in a dtype; holds one parameter with all its blocks at a time."""
        return ((tensor.name, value) for tensor, value in self._values(dtype or self.dtype))

    def stacked(self) -> dict[str, np.ndarray]:
        """Path -> weight, the blocks' stacked on a first axis; holds all of them."""
        weights: dict[str, list[np.ndarray]] = {}
        for tensor, value in self._values(self.dtype):
            weights.setdefault(tensor.path, []).append(value if tensor.layer is None else value[None])
        return {path: np.concatenate(values) for path, values in weights.items()}

    def _values(self, dtype: np.dtype) -> Iterator[tuple[Tensor, np.ndarray]]:
        by_path: dict[str, list[Tensor]] = {}
        for tensor in self.tensors:
            by_path.setdefault(tensor.path, []).append(tensor)
        factors = {} if self.adapted is None else dict(checkpoint.stream_params(self.path, self.step))
        lines = []
        for path, value in checkpoint.stream_params(*self._base):
            if self.adapted is not None:
                lines += lines_of({path: jnp.asarray(value)})
            for tensor in by_path[path]:
                block = value if tensor.layer is None else value[tensor.layer]
                if self.adapted is not None:
                    block = self._merged(tensor, block, factors).astype(dtype)
                yield tensor, block
        if self.adapted is not None:
            checkpoint.check_base(self.adapted.base, digest(lines))

    def _merged(self, tensor: Tensor, block: np.ndarray, factors: dict[str, np.ndarray]) -> np.ndarray:
        layer, _, name = tensor.path.rpartition("/")
        if name != "weight" or not layer.endswith("_proj"):
            return as_frozen(block, self.adapted.settings)
        pair = [factors.get(f"{layer}/lora_{matrix}") for matrix in "AB"]
        pair = None if pair[0] is None else tuple(matrix[tensor.layer] for matrix in pair)
        return merge(block, pair, self.adapted.settings)


def open_run(source: str, step: int | None = None) -> Run:
    """A checkpoint of a run folder, the newest by default; UserError if the folder has no such checkpoint."""
    newest = checkpoint.latest_step(source)
    if step is not None and step not in checkpoint.steps(source):
        listed = ", ".join(map(str, checkpoint.steps(source)))
        raise UserError(f"{source} has no checkpoint of step {step}: it has {listed}")
    return Run(source, newest if step is None else step)


def _check_target(target: str, overwrite: bool) -> None:
    if is_remote(target):
        raise UserError(f"{target}: a local folder is expected: copy it from there to where it shall go")
    if overwrite and Path(target).exists():
        if not (Path(target) / "config.json").exists() and any(Path(target).iterdir()):
            raise UserError(f"{target} is not a Hugging Face folder: --overwrite replaces nothing else")
        return
    try:
        check_free(target)
    except UserError as error:
        raise UserError(f"{error}, or give --overwrite") from None


def _write_weights(run: Run, folder: Path, dtype: np.dtype, max_bytes: int) -> None:
    writer = ShardWriter(folder, run.tensors, dtype, max_bytes)
    try:
        with Console("writing", len(run.tensors), unit="tensor") as console:
            for done, (name, value) in enumerate(run.stream(dtype), start=1):
                writer.write(name, value)
                console.update(done, name, every_seconds=10)
        writer.close()
    finally:
        writer.abandon()


def _write_configs(run: Run, folder: Path, dtype: np.dtype) -> bool:
    """config.json, and the tokenizer with generation_config.json if the run carries one; was there one?"""
    carried = runs.find_tokenizer(run.path)
    token_ids = {}
    if carried is not None:
        for file in carried.iterdir():
            file.copy(epath.Path(folder) / file.name)
        path = folder / "generation_config.json"
        token_ids = token_ids_of(load_tokenizer(folder), read_json(path) if path.exists() else None)
        if not path.exists():
            write_json(path, token_ids)
    write_json(folder / "config.json", config_json(run.config, dtype.name, token_ids))
    return carried is not None
