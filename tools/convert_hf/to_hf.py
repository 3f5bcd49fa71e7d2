"""From a run folder to a Hugging Face checkpoint that transformers, vLLM and their like load."""

import re
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from etils import epath

from medllm_jax import checkpoint, runs
from medllm_jax.config import ModelConfig
from medllm_jax.data.tokenizer import load_tokenizer
from medllm_jax.errors import UserError
from medllm_jax.metrics import Console
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

    Weights are read one parameter (all its blocks) at a time into host memory, and written into their places.

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
    """A checkpoint of a run folder: shape, dtype, and weights tensor by tensor as Hugging Face names them."""

    def __init__(self, path: str, step: int, config: ModelConfig, dtype: np.dtype):
        self.path, self.step, self.config, self.dtype = path, step, config, dtype
        self.tensors: list[Tensor] = tensors_of(config)

    def stream(self):
        """Name and value of every tensor; holds one parameter with all its blocks at a time."""
        by_path: dict[str, list[Tensor]] = {}
        for tensor in self.tensors:
            by_path.setdefault(tensor.path, []).append(tensor)
        for path, value in checkpoint.stream_params(self.path, self.step):
            for tensor in by_path[path]:
                yield tensor.name, value if tensor.layer is None else value[tensor.layer]


def open_run(source: str, step: int | None = None) -> Run:
    """A checkpoint of a run folder, the newest by default; UserError if the folder has no such checkpoint."""
    newest = checkpoint.latest_step(source)
    if step is not None and step not in checkpoint.steps(source):
        listed = ", ".join(map(str, checkpoint.steps(source)))
        raise UserError(f"{source} has no checkpoint of step {step}: it has {listed}")
    step = newest if step is None else step
    shapes = checkpoint.abstract_params(source, step)
    return Run(source, step, checkpoint.load_model_config(source, step), np.dtype(shapes["norm"]["weight"].dtype))


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
            for done, (name, value) in enumerate(run.stream(), start=1):
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
