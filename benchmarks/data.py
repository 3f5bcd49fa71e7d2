"""Data: preparing, reading and packing beside `datasets`, the memory that it takes, and what a training step waits for.

    python -m benchmarks.data [--quick] [--megabytes 10 100] [--rounds 3] [--json FILE]

Prints Markdown tables. Every contender runs in a process of its own, and they take turns: where others use the machine
too, the best of the rounds and the CPU seconds are what to read. Needs psutil, and `pip install 'medllm_jax[bench]'`.
"""

import argparse
import contextlib
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import psutil

from benchmarks.data_contenders import SEQUENCE_LENGTH
from benchmarks.data_corpus import documents, train_tokenizer, write_corpus
from tests.gcs import Gcs, environment

_ROOT = Path(__file__).parents[1]
_WORKERS = 2
_BATCH = 8
_STEPS, _WARM_UP = 60, 20  # of training
PARTS = ("reading", "preparing", "packing", "waiting", "memory")


# --- processes -------------------------------------------------------------------------------------------------------


def run(name: str, variables: Mapping[str, str] = {}, **arguments: Any) -> dict[str, Any]:
    """Runs a contender; returns what it says, and of its process with all children:

    wall: seconds with the start of the interpreter; cpu: seconds, unless it says them itself; peak: of resident bytes
    in all; main, worker: of the process itself and of the largest child.
    """
    command = [sys.executable, "-m", "benchmarks.data_contenders", name, json.dumps(arguments)]
    start = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, cwd=_ROOT, stdout=output, env=os.environ | dict(variables))
        memory: dict[str, int] = {"peak": 0, "main": 0, "worker": 0}
        watcher = threading.Thread(target=_watch, args=(process.pid, memory))
        watcher.start()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        wall = time.perf_counter() - start
        watcher.join()
        output.seek(0)
        if process.returncode:
            sys.exit(f"{name} failed")
        said = json.loads(output.read().splitlines()[-1])
    return {"cpu": usage.ru_utime + usage.ru_stime} | said | memory | {"wall": wall}


def _watch(pid: int, memory: dict[str, int]) -> None:
    """Notes the peaks of a process and its children until it ends; what rises and falls within 50 ms may be missed."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        while process.status() != psutil.STATUS_ZOMBIE:
            main = process.memory_info().rss
            workers = [_resident(child) for child in process.children(recursive=True)]
            for key, value in (("main", main), ("worker", max(workers, default=0)), ("peak", main + sum(workers))):
                memory[key] = max(memory[key], value)
            time.sleep(0.05)


def _resident(process: psutil.Process) -> int:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.memory_info().rss
    return 0


def in_turns(contenders: Mapping[str, Callable[[], dict[str, Any]]], rounds: int) -> dict[str, dict[str, Any]]:
    """The fastest of some runs of each, by ``seconds``; they take turns, so that a machine's moods are shared."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            found[name].append(contender())
    return {name: min(runs, key=lambda run: run["seconds"]) for name, runs in found.items()}


# --- what is measured ------------------------------------------------------------------------------------------------


def preparing(folder: Path, megabytes: float, rounds: int) -> Iterator[Any]:
    """Ours and `datasets`, from JSON lines to what a training reads; yields the table, and the results for JSON."""
    corpus, tokenizer, numbers = str(folder / "corpus"), str(folder / "tokenizer"), itertools.count()

    def ours(duplicates: str) -> Callable[[], dict[str, Any]]:
        arguments = {"corpus": corpus, "tokenizer": tokenizer, "workers": _WORKERS, "duplicates": duplicates}
        return lambda: run("prepare", output=str(folder / f"prepared-{next(numbers)}"), **arguments)

    def theirs(group: bool) -> Callable[[], dict[str, Any]]:
        arguments = {"corpus": corpus, "tokenizer": tokenizer, "workers": _WORKERS, "group": group}
        return lambda: run("datasets_map", cache=str(folder / f"cache-{next(numbers)}"), **arguments)

    names = {
        "ours, default recipe": ours("exact"),
        "ours, near duplicates too": ours("near"),
        "datasets: map": theirs(group=False),
        "datasets: map, then group_texts": theirs(group=True),
    }
    best = in_turns(names, rounds)
    base = best["datasets: map"]
    yield f"Preparing {megabytes:g} MB of text with {_WORKERS} processes, from the start of the interpreter"
    yield _table(
        ("", "s", "MB/s", "times map's MB/s", "s without imports", "CPU s", "MB of memory"),
        [
            (
                name,
                f"{run['wall']:.1f}",
                f"{megabytes / run['wall']:.2f}",
                f"{base['wall'] / run['wall']:.2f}",
                f"{run['seconds']:.1f}",
                f"{run['cpu']:.1f}",
                f"{run['peak'] / 1e6:,.0f}",
            )
            for name, run in best.items()
        ],
    )
    yield "Seconds of our stages"
    stages = list(best["ours, near duplicates too"]["stages"])
    ours_only = [name for name in names if name.startswith("ours")]
    yield _table(
        ("", *stages),
        [(name, *(f"{best[name]['stages'].get(stage, 0):.1f}" for stage in stages)) for name in ours_only],
    )
    yield {"preparing": best}


def reading(folder: Path, rows: int, rounds: int) -> Iterator[Any]:
    """Rows of one store at random, each once, as training reads them."""
    store = _write_rows(folder, folder / "store", rows)
    _write_parquet(store, folder / "rows.parquet")
    _write_flat(store, folder / "tokens.bin")
    common = {"rows": rows, "batch_size": _BATCH}
    parquet = str(folder / "rows.parquet")
    names = {
        "ours, 4 threads": lambda: run("read_store", store=str(store), threads=4, **common),
        "ours, 16 threads": lambda: run("read_store", store=str(store), threads=16, **common),
        "numpy.memmap, random windows": lambda: run("read_memmap", file=str(folder / "tokens.bin"), **common),
        "datasets: streaming, shuffled": lambda: run("read_streaming", file=parquet, **common),
        "datasets: from its cache, random rows": lambda: run(
            "read_indexed", file=parquet, cache=str(folder / "cache-rows"), **common
        ),
    }
    best = in_turns(names, rounds) | {"ours from a bucket": _from_bucket(folder)}
    base = best["datasets: streaming, shuffled"]
    yield f"Reading {rows:,} rows of {SEQUENCE_LENGTH} tokens, shuffled, in batches of {_BATCH}, without imports"
    yield _table(
        ("", "rows/s", "tokens/s", "times streaming", "CPU µs a row", "requests a row"),
        [
            (
                name,
                f"{run['rows'] / run['seconds']:,.0f}",
                f"{run['rows'] * SEQUENCE_LENGTH / run['seconds']:,.0f}",
                f"{base['seconds'] / base['rows'] * run['rows'] / run['seconds']:.2f}",
                f"{1e6 * run['cpu'] / run['rows']:,.0f}",
                f"{run['requests']:.2f}" if "requests" in run else "",
            )
            for name, run in best.items()
        ],
    )
    yield {"reading": best}


def _from_bucket(folder: Path) -> dict[str, Any]:
    """An epoch from an emulator of object storage: its speed is the emulator's, what counts is the requests."""
    rows = 80 * _BATCH
    store = _write_rows(folder, folder / "few", rows)
    with Gcs("bucket") as gcs:
        for file in store.rglob("*"):
            if file.is_file():
                gcs.put(f"gs://bucket/store/{file.relative_to(store)}", file.read_bytes())
        arguments = {"store": "gs://bucket/store", "rows": rows, "batch_size": _BATCH, "threads": 4}
        said = run("read_store", environment(gcs.url), **arguments)
        # Of rows and of shard indices.
        requests = sum(request.method == "GET" and "/rows/c/" in unquote(request.path) for request in gcs.log)
    return said | {"requests": requests / rows}


def _write_rows(folder: Path, store: Path, rows: int) -> Path:
    """A store of rows packed from documents, which are drawn again and again."""
    from medllm_jax.data.packing import best_fit, document_segment, pieces
    from medllm_jax.data.store_writer import CorpusFacts, RowStoreWriter

    encoded = _encoded(folder, 5)
    rng = np.random.default_rng(0)
    drawn = (encoded[number] for number in iter(lambda: rng.integers(len(encoded)), None))
    packed = best_fit((document_segment(part) for d in drawn for part in pieces(d, SEQUENCE_LENGTH)), SEQUENCE_LENGTH)
    with RowStoreWriter(store, "cpt", SEQUENCE_LENGTH) as writer:
        for row in itertools.islice(packed, rows):
            writer.append(row[None], "corpus")
        about = {"packing": "best_fit", "vocab_size": 2**17, "tokenizer_fingerprint": "", "eos_token_id": None}
        writer.finish({"corpus": CorpusFacts(rows)}, **about)
    return store


def _encoded(folder: Path, megabytes: float) -> list[np.ndarray]:
    """Documents as token ids, int32 [n] each."""
    from medllm_jax.data.tokenizer import encode_plain, load_tokenizer

    encoded = encode_plain(load_tokenizer(folder / "tokenizer"), list(documents(megabytes)))
    return [np.array(ids, np.int32) for ids in encoded]


def _write_parquet(store: Path, file: Path) -> None:
    """The rows as `datasets` reads them fastest: columns of lists of a fixed size."""
    import pyarrow as pa
    import pyarrow.parquet

    from medllm_jax.data.store import RowStore

    rows = RowStore.open(store)
    kind = pa.list_(pa.int32(), SEQUENCE_LENGTH)
    names = ("tokens", "segment_ids")
    with pyarrow.parquet.ParquetWriter(str(file), pa.schema([(name, kind) for name in names])) as writer:
        for first in range(0, len(rows), 256):
            part = rows.read(range(first, min(first + 256, len(rows))))
            columns = [pa.FixedSizeListArray.from_arrays(part[:, i].ravel(), type=kind) for i in range(len(names))]
            writer.write_table(pa.table(columns, names=list(names)))


def _write_flat(store: Path, file: Path) -> None:
    from medllm_jax.data.store import RowStore

    rows = RowStore.open(store)
    with file.open("wb") as stream:
        for first in range(0, len(rows), 256):
            stream.write(np.ascontiguousarray(rows.read(range(first, min(first + 256, len(rows))))[:, 0]).data)


def memory(folder: Path, sizes: Sequence[float]) -> Iterator[Any]:
    """Resident memory of a preparation, by the size of the corpus."""
    found = []
    for size in sizes:
        corpus = write_corpus(folder / f"memory-{size:g}", size)
        arguments = {"corpus": str(corpus), "tokenizer": str(folder / "tokenizer"), "workers": _WORKERS}
        found.append(run("prepare", output=str(folder / f"out-{size:g}"), duplicates="exact", **arguments))
    yield f"Peak of resident memory of a preparation with {_WORKERS} workers"
    yield _table(
        ("MB of text", "s", "MB, main process", "MB, largest worker", "MB, all together"),
        [
            (f"{size:g}", f"{run['wall']:.0f}", *(f"{run[part] / 1e6:,.0f}" for part in ("main", "worker", "peak")))
            for size, run in zip(sizes, found, strict=True)
        ],
    )
    yield {"memory": dict(zip(map(str, sizes), found, strict=True))}


def waiting(folder: Path) -> Iterator[Any]:
    """The share of a tiny training's time that goes into waiting for data."""
    from medllm_jax.data.prepare.corpus import Corpus, Recipe, prepare_corpus
    from tests.tiny import make_tokenizer

    corpus, tokenizer = write_corpus(folder / "small", 1), folder / "small-tokenizer"
    make_tokenizer(tokenizer)
    prepare_corpus([Corpus("corpus", str(corpus))], tokenizer, folder / "small-store", Recipe(sequence_length=256))
    command = [sys.executable, "-m", "medllm_jax.cli", "train", "--config", "configs/runs/cpt-tiny.yaml"]
    options = {"run": folder / "run", "data.store": folder / "small-store", "steps": _STEPS}
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run(command + arguments, cwd=_ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, check=True, **quiet)
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["step"] > _WARM_UP]
    share, seconds = (float(np.mean([line[key] for line in steps])) for key in ("data_wait", "step_seconds"))
    yield "Waiting for data, in the training of configs/runs/cpt-tiny.yaml"
    yield _table(
        ("steps", "ms a step", "% of it waiting for data"),
        [(f"{_WARM_UP + 1} to {_STEPS}", f"{1000 * seconds:.1f}", f"{100 * share:.2f}")],
    )
    yield {"waiting": {"data_wait": share, "step_seconds": seconds}}


def packing(folder: Path, megabytes: float, rounds: int) -> Iterator[Any]:
    """How full rows are, and how fast they are made; the lengths are those of documents in tokens."""
    from medllm_jax.data.packing import best_fit, concatenate_and_split, document_segment, pieces

    parts = _encoded(folder, megabytes)

    def timed(make: Callable[[], Iterable[np.ndarray]]) -> Callable[[], dict[str, Any]]:
        def measure() -> dict[str, Any]:
            start = time.perf_counter()
            rows = sum(1 for _ in make())
            return {"seconds": time.perf_counter() - start, "rows": rows}

        return measure

    segments = (document_segment(part) for document in parts for part in pieces(document, SEQUENCE_LENGTH))
    segments = list(segments)
    best = in_turns(
        {
            "best_fit": timed(lambda: best_fit(segments, SEQUENCE_LENGTH)),
            "split": timed(lambda: concatenate_and_split(parts, SEQUENCE_LENGTH)),
        },
        rounds,
    )
    tokens = sum(map(len, parts))
    yield f"Packing {len(parts):,} documents, {tokens:,} tokens, into rows of {SEQUENCE_LENGTH}"
    yield _table(
        ("", "fill", "tokens/s"),
        [
            (name, f"{tokens / (run['rows'] * SEQUENCE_LENGTH):.4f}", f"{tokens / run['seconds']:,.0f}")
            for name, run in best.items()
        ],
    )
    yield {"packing": best | {"tokens": tokens}}


# --- the program -----------------------------------------------------------------------------------------------------


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown; all columns but the first hold numbers."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return [f"| {' | '.join(row)} |" for row in (head, rule, *rows)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="5 and 25 MB, two rounds")
    parser.add_argument(
        "--megabytes", type=float, nargs="+", help="sizes of which memory is measured; default 10, 100 and 1000"
    )
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default all")
    parser.add_argument("--json", type=Path, help="a file for all that was measured")
    options = parser.parse_args()
    sizes = options.megabytes or ([5, 25] if options.quick else [10, 100, 1000])
    speed = 5 if options.quick else 60
    rounds = options.rounds or (2 if options.quick else 3)
    packages = ("numpy", "tensorstore", "grain", "tokenizers", "transformers", "datasets", "pyarrow")
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    print(f"{os.cpu_count()} cores, {platform.machine()}; Python {platform.python_version()}, {versions}")

    measured: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        train_tokenizer(folder / "tokenizer")
        if "preparing" in options.parts:
            write_corpus(folder / "corpus", speed)
        parts = (
            reading(folder, 2000 if options.quick else 6000, rounds),
            preparing(folder, speed, rounds),
            packing(folder, 20, rounds),
            waiting(folder),
            memory(folder, sizes),
        )
        for part in (part for name, part in zip(PARTS, parts, strict=True) if name in options.parts):
            for piece in part:
                if isinstance(piece, dict):
                    measured |= piece
                elif isinstance(piece, str):
                    print(f"\n### {piece}\n")
                else:
                    print("\n".join(piece), flush=True)
    if options.json:
        options.json.write_text(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
