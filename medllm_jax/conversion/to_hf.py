"""From a run folder to a Hugging Face checkpoint that transformers, vLLM and their like load."""

import functools
import hashlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import numpy as np
from etils import epath

from medllm_jax.checkpoint.chunk_files import ChunkFiles, Look
from medllm_jax.checkpoint.handle import Checkpoint, open_checkpoint
from medllm_jax.conversion import peft
from medllm_jax.conversion.card import check_base_name, documents
from medllm_jax.conversion.companions import GENERATION, SUMS, read_generation
from medllm_jax.conversion.finite import NonFinite
from medllm_jax.conversion.folders import (
    ResumableFolder,
    ahead,
    check_room,
    clear_notes,
    full_disk_is_reported,
    holds_something,
    unfinished_folder,
)
from medllm_jax.conversion.hf_config import config_json, json_text, token_ids_of
from medllm_jax.conversion.hf_weights import DTYPES, INDEX, SINGLE
from medllm_jax.conversion.history import History, exported_dtype, history_of
from medllm_jax.conversion.names import RowRange, Tensor, row_ranges
from medllm_jax.conversion.run_weights import RunWeights
from medllm_jax.conversion.shards import Copied, Shard, holds_shard, index_of, shards_of, tensor_bytes, write_shard
from medllm_jax.data.tokenizer import load_tokenizer
from medllm_jax.errors import UserError, quoted
from medllm_jax.storage import run_folder
from medllm_jax.storage.json_files import read_bounded
from medllm_jax.storage.lease import sole_writer
from medllm_jax.storage.remote import is_folder, is_remote, is_there, names_in, remove_folder
from medllm_jax.terminal.progress import Console, size_in_words

_log = logging.getLogger(__name__)

Weights = RunWeights | peft.AdapterWeights
Piece = np.ndarray | Copied
# Shards written side by side, each by a thread that reads, one that writes and one that takes checksums. One more would
# take more than 2 GiB of memory for a quantised model of 72B.
_MOST_SHARDS = 3
_SHARDS = min(_MOST_SHARDS, os.cpu_count() or 1)
_READERS = 1
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@sole_writer("target", beside=True)
def to_hf(
    source: str,
    target: str,
    *,
    step: int | None = None,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    adapter: bool = False,
    base_name: str | None = None,
    evaluations: Sequence[str] = (),
    resume: bool = False,
    overwrite: bool = False,
    allow_non_finite: bool = False,
) -> None:
    """Writes a checkpoint of a run folder as a Hugging Face folder, local or gs://, slice by slice.

    Adapters are merged into their base as training saw it: of a quantised one, into what its codes stand for.

    step: default the newest. dtype: default `exported_dtype`, of adapters alone as stored. adapter: the adapter alone,
    as PEFT's files. base_name: what the model card calls the base model. evaluations: folders of exam results that the
    card shows. resume: goes on with what was begun. overwrite: replaces a target that is a Hugging Face folder.
    allow_non_finite: NaN and infinite weights are written as they are.
    Raises UserError for a source without such a checkpoint, and a target that can't be written.
    """
    start = time.monotonic()
    max_bytes = parse_size(max_shard_size)
    if base_name is not None:
        check_base_name(base_name)
    if resume and not is_remote(target) and clear_notes(target):
        _log.info(f"{target} is whole already")  # it was stopped before the last of its steps
        return
    replace = _make_way(target, overwrite=overwrite, resume=resume)
    checkpoint = open_checkpoint(source, step)
    weights = peft.AdapterWeights(checkpoint) if adapter else RunWeights(checkpoint)
    history = history_of(checkpoint)
    usual = weights.dtype if adapter else exported_dtype(weights.dtype, history)
    stored = np.dtype(dtype) if dtype else usual
    if stored not in DTYPES.values():
        raise UserError(f"{source}: weights of dtype {stored.name} can't be exported: give --dtype float32 or bfloat16")
    shards = shards_of(weights.tensors, stored, max_bytes, single=peft.WEIGHTS if adapter else SINGLE)
    if adapter and len(shards) > 1:
        raise UserError(f"--max-shard-size {max_shard_size}: adapters are one file, and these take more")
    first, token_ids = _companions(weights, history, base_name, evaluations)
    last = _last(weights, shards, stored, token_ids, base_name)
    size = sum(tensor_bytes(tensor, stored) for tensor in weights.tensors)
    check_room(target, size)
    if isinstance(weights, RunWeights):
        weights.check()

    what = {
        "source": checkpoint.identity,
        "files": [[shard.name, shard.bytes, stored.name] for shard in shards],
        "beside": hashlib.sha256(repr((first, last)).encode()).hexdigest(),
    }
    filling = ResumableFolder(target, what)
    filling.open(resume=resume)
    if dtype is None and stored != weights.dtype:
        _log.info(
            f"{source}: the model came in {stored.name} and was trained in {weights.dtype.name}: it is exported in "
            f"{stored.name}; --dtype {weights.dtype.name} keeps the weights as they are stored"
        )
    memory = size_in_words(memory_needed(weights, stored, may_copy=not is_remote(target)))
    _log.info(f"{source}: {size_in_words(size)} in {stored.name}; it takes at most {memory} of memory")
    try:
        with full_disk_is_reported(target):
            files = _fill(weights, shards, first, last, stored, filling, allow_non_finite=allow_non_finite)
            filling.finish()
            filling.settle(replace=replace)
    except BaseException:
        if filling.keep():
            _log.info(f"what is done is kept in {filling.folder}; --resume goes on with it")
        raise
    if checkpoint.adapter is not None and not adapter:
        base = checkpoint.whole
        _log.info(f"adapters of {source} merged into {base.run}, step {base.step}, in {checkpoint.adapter.base}")
    parameters = sum(int(np.prod(tensor.shape)) for tensor in weights.tensors)
    _log.info(
        f"{target}: step {checkpoint.step} of {source}, {parameters:,} parameters in {stored.name}, {files} files, "
        f"{'with' if run_folder.find_tokenizer(source) else 'WITHOUT'} tokenizer, {time.monotonic() - start:.1f} s"
    )


def memory_needed(weights: Weights, dtype: np.dtype, *, may_copy: bool = False) -> int:
    """Bytes of host memory that the ranges at work take at most: those waiting, as stored and as written, and chunks.

    may_copy: what files hold as it is to be written is copied from them; of a chunk, memory takes what fills it up.
    """
    if isinstance(weights, peft.AdapterWeights):
        return 2 * sum(tensor_bytes(tensor, weights.dtype) for tensor in weights.tensors)
    widest = max(4 if weights.checkpoint.adapter or weights.storage else weights.dtype.itemsize, dtype.itemsize)
    files = _files_of(weights, weights.tensors, dtype) if may_copy else {}
    read = [tensor for tensor in weights.tensors if tensor.name not in files]
    sizes = (min(weights.rows_at_a_time(t), t.shape[0]) * int(np.prod(t.shape[1:])) for t in read)
    return _SHARDS * _READERS * (4 * max(sizes, default=0) * widest + weights.chunk_bytes())


def parse_size(text: str) -> int:
    """Bytes of `5GB`, `500MB`, `1GiB` or a plain number."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?) ?([KMG]I?B)?", text.strip().upper())
    size = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if size <= 0:
        raise UserError(f"--max-shard-size {quoted(text)}: a size such as 5GB or 500MB is expected")
    return size


# --- the target --------------------------------------------------------------------------------------------------


def _make_way(target: str, *, overwrite: bool, resume: bool) -> bool:
    """Shall a folder be replaced when the new one is whole? UserError where something stands there that must not be."""
    if overwrite and not resume and not is_remote(target):
        remove_folder(unfinished_folder(target))
    if not holds_something(target):
        return False
    if not overwrite:
        raise UserError(f"{target} exists and is not empty: choose another folder, remove it, or give --overwrite")
    folder = epath.Path(target)
    if not is_folder(folder) or not names_in(folder) & {"config.json", peft.CONFIG}:
        raise UserError(f"{target} is not a Hugging Face folder: --overwrite replaces nothing else")
    if not is_remote(target):
        return True
    for name in (INDEX, "config.json", peft.CONFIG):  # what makes it valid goes first
        (folder / name).unlink(missing_ok=True)
    remove_folder(folder)
    return False


# --- what is written ---------------------------------------------------------------------------------------------


def _companions(
    weights: Weights, history: History, base_name: str | None, evaluations: Sequence[str]
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """File name -> content of what stands beside the weights (tokenizer, card, notice, licence); ids of tokens."""
    files, token_ids = {}, {}
    carried = run_folder.find_tokenizer(weights.checkpoint.run)
    if carried is not None:
        names = [name for name in run_folder.TOKENIZER_FILES if is_there(carried / name)]
        files = {name: read_bounded(carried / name) for name in sorted(names)}
        vocabulary = weights.config.vocab_size
        generation = read_generation(carried / GENERATION, vocabulary) if GENERATION in files else None
        token_ids = token_ids_of(load_tokenizer(carried), generation)
        files.setdefault(GENERATION, json_text(token_ids).encode())
    texts = documents(
        weights.checkpoint,
        history=history,
        adapter=isinstance(weights, peft.AdapterWeights),
        parameters=sum(int(np.prod(tensor.shape)) for tensor in weights.tensors),
        base_name=base_name,
        evaluations=evaluations,
    )
    return files | {name: text.encode() for name, text in texts.items()}, token_ids


def _last(
    weights: Weights,
    shards: Sequence[Shard],
    dtype: np.dtype,
    token_ids: dict[str, Any],
    base_name: str | None,
) -> dict[str, bytes]:
    """File name -> content of what makes a folder loadable, in the order in which to write it."""
    if isinstance(weights, peft.AdapterWeights):
        return {peft.CONFIG: json_text(peft.config_json(weights.settings, base_name)).encode()}
    files = {"config.json": json_text(config_json(weights.config, dtype.name, token_ids)).encode()}
    index = index_of(shards, dtype)
    return files if index is None else files | {INDEX: json_text(index).encode()}


def _fill(
    weights: Weights,
    shards: Sequence[Shard],
    first: dict[str, bytes],
    last: dict[str, bytes],
    dtype: np.dtype,
    filling: ResumableFolder,
    *,
    allow_non_finite: bool,
) -> int:
    """Writes all the files; how many?"""
    for name, content in first.items():
        (filling.folder / name).write_bytes(content)
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in (first | last).items()}
    odd = NonFinite()
    sums |= _write_weights(weights, shards, dtype, filling, odd)
    if not allow_non_finite:
        odd.check(weights.checkpoint.run, dtype, stored=weights.dtype)
    listed = "".join(f"{value}  {name}\n" for name, value in sorted(sums.items()))
    for name, content in ({SUMS: listed.encode()} | last).items():
        (filling.folder / name).write_bytes(content)
    return len(sums) + 1


def _write_weights(
    weights: Weights, shards: Sequence[Shard], dtype: np.dtype, filling: ResumableFolder, odd: NonFinite
) -> dict[str, str]:
    """File name -> sha256 of the files with weights, those among them that were written before included."""
    there = [s for s in shards if s.name in filling.done and holds_shard(filling.folder, s)]
    sums = {shard.name: filling.done[shard.name] for shard in there}
    sizes = {shard.name: sum(tensor_bytes(tensor, dtype) for tensor in shard.tensors) for shard in shards}
    progress = _Progress(sum(sizes.values()), sum(sizes[name] for name in sums))

    def write(shard: Shard) -> None:
        any_odd = False

        def look(name: str, values: np.ndarray) -> None:
            nonlocal any_odd
            any_odd |= odd.count(name, values)

        pieces = _pieces(weights, shard, dtype, look, may_copy=not is_remote(filling.folder))
        sums[shard.name] = write_shard(filling.folder, shard, progress.count(pieces, shard.name))
        if not any_odd:  # else it is counted again when the export is resumed
            filling.note(shard.name, sums[shard.name])

    with progress, ThreadPoolExecutor(_SHARDS) as pool:
        writing = [pool.submit(write, shard) for shard in shards if shard.name not in sums]
        try:
            for each in as_completed(writing):
                each.result()
        except BaseException:
            progress.stopped.set()
            pool.shutdown(cancel_futures=True)
            raise
    return sums


def _pieces(
    weights: Weights, shard: Shard, dtype: np.dtype, look: Callable[[str, np.ndarray], None], *, may_copy: bool
) -> Iterator[Piece]:
    """The values of a shard's tensors: files that are copied, or else rows that are read and converted.

    look: is shown all of them, by tensor name.
    """
    files = _files_of(weights, shard.tensors, dtype) if may_copy else {}

    def piece(rows: RowRange) -> Piece:
        if rows.tensor.name in files:
            chunks = files[rows.tensor.name]
            size = (rows.last - rows.first) * chunks.row_bytes
            return Copied(size, functools.partial(_copy, chunks, rows, look, weights.checkpoint.whole))
        with np.errstate(over="ignore"):  # what becomes infinite is counted
            values = weights.read(*rows, dtype)
        look(rows.tensor.name, values)
        return values

    ranges = []
    for tensor in shard.tensors:
        rows = files[tensor.name].rows if tensor.name in files else weights.rows_at_a_time(tensor)
        ranges += row_ranges(tensor, rows)
    return ahead(piece, ranges, workers=_READERS)


def _files_of(weights: Weights, tensors: Sequence[Tensor], dtype: np.dtype) -> dict[str, ChunkFiles]:
    """Tensor name -> the files that hold its rows in a dtype, of those that have such."""
    if isinstance(weights, peft.AdapterWeights):
        return {}
    found = {tensor.name: weights.chunks_of(tensor, dtype) for tensor in tensors}
    return {name: chunks for name, chunks in found.items() if chunks is not None}


def _copy(
    chunks: ChunkFiles,
    rows: RowRange,
    look: Callable[[str, np.ndarray], None],
    checkpoint: Checkpoint,
    file: int,
    place: int,
) -> Callable[[Look], None]:
    """Copies a chunk to a place in an open file; what `Copied.copy` returns."""
    name, path = rows.tensor.name, rows.tensor.path
    with checkpoint.reading(path):
        check = chunks.copy(rows.first, file, place)

    def check_and_look(take: Look) -> None:
        def both(block: np.ndarray) -> None:
            take(block)
            look(name, block.view(chunks.dtype))

        with checkpoint.reading(path):
            check(both)

    return check_and_look


class _Progress:
    """Bytes written, of shards that are written side by side; and whether they are to stop."""

    def __init__(self, total: int, done: int):
        self._console, self._done = Console("writing weights", total, done=done, unit="bytes"), done
        self._lock, self.stopped = threading.Lock(), threading.Event()

    def __enter__(self) -> None:
        self._console.__enter__()

    def __exit__(self, *error: object) -> None:
        self._console.__exit__(*error)

    def count(self, pieces: Iterable[Piece], name: str) -> Iterator[Piece]:
        for piece in pieces:
            if self.stopped.is_set():
                raise InterruptedError(f"{name} is not written to its end")
            yield piece
            with self._lock:
                self._done += piece.nbytes
                self._console.update(self._done, name, every_seconds=10)
