"""What the benchmark of data compares, each run in a process of its own.

    python -m benchmarks.data_contenders NAME '{"argument": ...}'

runs one and prints, as JSON on its last line, what it measured.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SEQUENCE_LENGTH = 4096
_BUFFER = 1000  # rows that `datasets` shuffles among

# --- preparing -------------------------------------------------------------------------------------------------------


def prepare(corpus: str, tokenizer: str, output: str, workers: int, duplicates: str) -> dict[str, Any]:
    """Ours, from documents to a store; `stages` are the seconds of each."""
    from medllm_jax.data.prepare.corpus import Corpus, Recipe, prepare_corpus
    from medllm_jax.data.prepare.jobs import in_processes

    start = last = time.perf_counter()
    stages: dict[str, float] = {}

    def progress(stage: str, done: int, total: int) -> None:
        nonlocal last
        # What comes before the first unit of tokens is the search for duplicates, as a stage's beginning is the start.
        name = stage if done else {"tokens": "duplicates", "inventory": "tokenizer"}.get(stage, stage)
        now = time.perf_counter()
        stages[name] = stages.get(name, 0.0) + now - last
        last = now

    recipe = Recipe(sequence_length=SEQUENCE_LENGTH, duplicates=duplicates)
    with in_processes(workers) as executor:
        corpora = [Corpus("corpus", corpus)]
        made = prepare_corpus(corpora, tokenizer, output, recipe, executor=executor, progress=progress)
    stages["writing the rest"] = time.perf_counter() - last
    return {
        "seconds": time.perf_counter() - start,
        "stages": stages,
        "rows": made.rows,
        "tokens": made.tokens,
        "fill": made.fill,
    }


def datasets_map(corpus: str, tokenizer: str, cache: str, workers: int, group: bool) -> dict[str, Any]:
    """`datasets` as its guides have it: load, map the tokenizer, and (group) join and cut what it gave."""
    import datasets
    from transformers import AutoTokenizer

    start = time.perf_counter()
    tokenize = AutoTokenizer.from_pretrained(tokenizer)
    files = sorted(str(file) for file in Path(corpus).iterdir())
    rows = datasets.load_dataset("json", data_files=files, split="train", cache_dir=cache)
    rows = rows.map(
        lambda batch: tokenize(batch["text"]), batched=True, num_proc=workers, remove_columns=rows.column_names
    )
    if group:
        rows = rows.map(_group_texts, batched=True, num_proc=workers)
    return {"seconds": time.perf_counter() - start, "rows": len(rows)}


def _group_texts(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
    """As in the language modelling examples of `transformers`; what is left at the end of each batch is lost there."""
    joined = {key: [token for part in parts for token in part] for key, parts in batch.items()}
    total = len(joined["input_ids"]) // SEQUENCE_LENGTH * SEQUENCE_LENGTH
    return {
        key: [values[start : start + SEQUENCE_LENGTH] for start in range(0, total, SEQUENCE_LENGTH)]
        for key, values in joined.items()
    }


# --- reading ---------------------------------------------------------------------------------------------------------


def read_store(store: str, rows: int, batch_size: int, threads: int) -> dict[str, Any]:
    """Ours, in training order: batches as the step takes them, positions and loss weights too."""
    from medllm_jax.data.loader import BatchStream
    from medllm_jax.data.rows import Rows

    there = Rows.open([store])

    def batches() -> Iterator[Any]:
        with BatchStream(there, batch_size, seed=0, threads=threads, prefetch=max(8, threads)) as stream:
            for batch in stream:
                yield batch.arrays.tokens

    return _timed(batches(), rows)


def read_memmap(file: str, rows: int, batch_size: int) -> dict[str, Any]:
    """The same tokens in one flat file, read at random: nothing is checked, and a window is no packed row."""
    import numpy as np

    tokens = np.memmap(file, np.int32, "r")
    rng = np.random.default_rng(0)

    def batches() -> Iterator[Any]:
        while True:
            starts = rng.integers(0, len(tokens) - SEQUENCE_LENGTH, batch_size)
            yield np.stack([tokens[start : start + SEQUENCE_LENGTH] for start in starts])

    return _timed(batches(), rows)


def read_streaming(file: str, rows: int, batch_size: int) -> dict[str, Any]:
    """`datasets`, streaming the same rows from parquet, shuffled in a buffer."""
    import datasets

    stream = datasets.load_dataset("parquet", data_files=file, split="train", streaming=True).with_format("numpy")
    stream = stream.repeat(None).shuffle(seed=0, buffer_size=_BUFFER).batch(batch_size)
    return _timed((batch["tokens"] for batch in stream), rows)


def read_indexed(file: str, cache: str, rows: int, batch_size: int) -> dict[str, Any]:
    """`datasets`, the same rows from its cache on disk, at random places."""
    import datasets
    import numpy as np

    table = datasets.load_dataset("parquet", data_files=file, split="train", cache_dir=cache).with_format("numpy")
    rng = np.random.default_rng(0)

    def batches() -> Iterator[Any]:
        while True:
            for ids in rng.permutation(len(table))[: len(table) // batch_size * batch_size].reshape(-1, batch_size):
                batch = table[ids.tolist()]
                yield batch["tokens"]

    return _timed(batches(), rows)


def _timed(batches: Iterator[Any], rows: int) -> dict[str, Any]:
    """Reads as many rows; `seconds` have the filling of buffers in them, not the imports and not how it is ended."""
    start, cpu, read = time.perf_counter(), time.process_time(), 0
    for tokens in batches:
        assert tokens.shape[1] == SEQUENCE_LENGTH
        read += len(tokens)
        if read >= rows:
            break
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    batches.close()
    return {"seconds": seconds, "cpu": cpu, "rows": read}


CONTENDERS = {
    function.__name__: function
    for function in (prepare, datasets_map, read_store, read_memmap, read_streaming, read_indexed)
}

if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    print(json.dumps(CONTENDERS[sys.argv[1]](**json.loads(sys.argv[2]))))
