"""The verbs that read files, and the files that each of them reads, of those that `benchmarks.inputs` makes."""

import contextlib
import dataclasses
import functools
import hashlib
import http.client
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.inputs import LENGTH

SECONDS = 20.0  # of processor time that a trial may take
WAITING = 3  # times as many by the clock: a busy machine takes longer, and a trial that only waits takes nothing else


@dataclasses.dataclass(frozen=True)
class Reading:
    """A verb, or a function where the verb would go on to train, and the files that it reads.

    name: `room: what`. run: arguments of medllm, or a function that returns what came out. needs: what must be there.
    files: patterns of those that are tried. results: patterns of files whose bytes are what came out. weight: how often
    it is tried; what is slow has a small one. runs: whether it needs what `make_inputs` makes only with its runs.
    seconds: of processor time that it may take, and WAITING times as many by the clock.
    """

    name: str
    run: str | Callable[[], str]
    needs: tuple[str, ...]
    files: tuple[str, ...] = ()
    results: tuple[str, ...] = ()
    weight: float = 1.0
    runs: bool = False
    seconds: float = SECONDS

    @property
    def room(self) -> str:
        return self.name.partition(":")[0]


STORE = ("out/rows/**", "out/tokens_per_row.npy")
HF = ("hf",)
EXAM = "--exam exam.jsonl --template template.yaml"


class HangError(BaseException):
    """The trial takes too long; raised where it is then."""


def _digest(*values: Any) -> str:
    return hashlib.sha256("\0".join(map(str, values)).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def bytes_of(patterns: Sequence[str]) -> str:
    paths = sorted({path for pattern in patterns for path in _matching(Path(), pattern)})
    return _digest(*(f"{path} {hashlib.sha256(_timeless(Path(path))).hexdigest()}" for path in paths))


def _timeless(file: Path) -> bytes:
    """Its bytes; of a page, without when it was made."""
    content = file.read_bytes()
    return re.sub(rb"\d{4}-\d\d-\d\d \d\d:\d\d", b"", content) if file.suffix == ".html" else content


def _read_run_config() -> str:
    from medllm_jax.config.load import load_run_config, to_yaml

    return _digest(to_yaml(load_run_config("cpt.yaml")))


def _read_rounds_config() -> str:
    from medllm_jax.recipes.rounds import load_rounds_config

    return _digest(load_rounds_config("rounds.yaml"))


def _read_recorded_config() -> str:
    from medllm_jax.config.load import load_run_config, to_yaml
    from medllm_jax.storage.run_folder import open_run, recorded_config

    recorded = recorded_config("runs/cpt")
    if recorded is None:  # a start says what is wrong with a folder that holds everything else
        open_run(dataclasses.replace(load_run_config("cpt.yaml"), run="runs/cpt"))
    return _digest(to_yaml(recorded))


def _read_store(path: str) -> str:
    from medllm_jax.data.loader import BatchStream
    from medllm_jax.data.store import RowStore

    with BatchStream(RowStore.open(path), 2, seed=0, threads=1, prefetch=1) as stream:
        batch = next(stream)
    return _digest(batch.arrays)


def _read_rows(path: str) -> str:
    from medllm_jax.data.store import RowStore

    store = RowStore.open(path)
    return _digest(store.metadata, store.read(range(len(store))).tobytes(), store.tokens_per_row.tobytes())


def _read_references() -> str:
    from medllm_jax.checkpoint.handle import open_checkpoint
    from medllm_jax.checkpoint.load_model import load_model  # noqa: F401 (what the run does first)
    from medllm_jax.config.load import load_run_config
    from medllm_jax.training.resolve import open_source, resolve
    from medllm_jax.training.setup import open_rows, references_of

    config = load_run_config("rpo.yaml")
    config = resolve(config, open_source(config))
    rows = open_rows(config, config.data.stores)
    return _digest(references_of(config, rows, open_checkpoint("runs/rpo").meta["reference_model"]))


def _read_checkpoint(run: str) -> str:
    from medllm_jax.checkpoint.handle import open_checkpoint

    checkpoint = open_checkpoint(run)
    params = checkpoint.host_params()
    return _digest(checkpoint.step, *(f"{name}{value.dtype}{value.tobytes()}" for name, value in params.items()))


def _read_both() -> str:
    """What a reader of its own finds in the two models that were said to be equal."""
    from safetensors.numpy import load_file

    arrays = [array for file in sorted(Path("hf").glob("*.safetensors")) for array in sorted(load_file(file).items())]
    return _digest(_read_checkpoint("base"), *(f"{name}{array.tobytes()}" for name, array in arrays))


def _converted(run: str) -> str:
    """What a run folder holds: weights, shape, and its tokenizer's files."""
    from medllm_jax.checkpoint.handle import open_checkpoint

    return _digest(_read_checkpoint(run), open_checkpoint(run).model, bytes_of([f"{run}/tokenizer/*"]))


def _go_on_training() -> str:
    """Trains to the end; what another process seems to write is waited for, for seconds instead of a minute."""
    from medllm_jax.checkpoint.handle import open_checkpoint
    from medllm_jax.storage.lease import Lease

    Lease.__init__.__kwdefaults__["seconds"] = 3.0
    _raise_unless_done("train --config cpt.yaml")
    done = open_checkpoint("runs/cpt")
    return _digest(json.dumps(done.meta["digests"], sort_keys=True), done.step)


def _then(command: str, result: Callable[[], str]) -> Callable[[], str]:
    """A verb, and after it a look at what it made."""

    def run() -> str:
        _raise_unless_done(command)
        return result()

    return run


class EndedError(Exception):
    """A verb inside a reading ended with this code, and has said why."""


def _raise_unless_done(command: str) -> None:
    from medllm_jax.cli import main

    code = main(command.split())
    if code:
        raise EndedError(code)


def _run_rounds() -> str:
    from medllm_jax.recipes.rounds import load_rounds_config, run_rounds

    return _digest(run_rounds(load_rounds_config("rounds.yaml"), _no_verb).read_text())


def _run_demo() -> str:
    from medllm_jax.recipes.demo.recipe import run_demo

    run_demo("demo", 0, _no_verb)
    return "done"


def _no_verb(*_: Any) -> None:
    from medllm_jax.errors import UserError

    raise UserError("here a verb would begin")


def _ask_server(name: str) -> str:
    """A client asks a server that answers all requests with the bytes of a file."""
    from medllm_jax.evaluation.sampling import SamplingParams
    from medllm_jax.inference.openai_client import OpenAIClient

    prompt = "答え:" if name == "completion" else [{"role": "user", "content": "答え:"}]
    with _server(Path(f"answers/{name}.http").read_bytes()) as port, _no_waiting():
        client = OpenAIClient(f"http://127.0.0.1:{port}", "m", concurrency=1, timeout=0.3)
        params = SamplingParams(max_new_tokens=4, stop=("\n",))
        return _digest(*next(iter(client.sample([prompt], [0], params))))


@contextlib.contextmanager
def _server(answer: bytes) -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    with (
                        contextlib.suppress(OSError, ValueError, http.client.HTTPException),
                        connection,
                        connection.makefile("rb") as reading,
                    ):
                        reading.readline()
                        length = int(http.client.parse_headers(reading).get("content-length", 0))
                        reading.read(length)
                        connection.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            listening.shutdown(socket.SHUT_RDWR)
    thread.join(1)


@contextlib.contextmanager
def _no_waiting() -> Iterator[None]:
    """Pauses between repetitions take no time; those of hours would be long, so they are counted as hangs."""
    from medllm_jax.inference.openai_client import OpenAIClient

    pause = OpenAIClient._pause

    def quick(self: Any, fault: Any, repetition: int) -> float:
        seconds = pause(self, fault, repetition)
        if seconds > 1800:
            raise HangError(f"waits for {seconds:.0f} seconds")
        return min(seconds, 0.001)

    OpenAIClient._pause = quick
    try:
        yield
    finally:
        OpenAIClient._pause = pause


def _of_store(command: str) -> str:
    return f"data {command} --output out --sequence-length {LENGTH} --pii report"


def _corpus_reading(file: str, *more: str) -> Reading:
    command = _of_store(f"cpt --input corpora/{file} --tokenizer hf --workers 1 {' '.join(more)}").rstrip()
    name = f"data: cpt {file.partition('.')[2]} {' '.join(more)}".rstrip()
    return Reading(name, command, (*HF, f"corpora/{file}"), (f"corpora/{file}",), STORE)


CHECKPOINT_FILES = ("runs/cpt/checkpoints/**",)
READINGS: tuple[Reading, ...] = (
    Reading("config: run config", _read_run_config, ("cpt.yaml",), ("cpt.yaml",), weight=4),
    Reading(
        "config: rounds config", _read_rounds_config, ("rounds.yaml", "rpo.yaml", "template.yaml"), ("rounds.yaml",)
    ),
    Reading(
        "config: recorded config",
        _read_recorded_config,
        ("runs/cpt", "cpt.yaml"),
        ("runs/cpt/config.yaml",),
        runs=True,
    ),
    _corpus_reading("a.jsonl"),
    _corpus_reading("a.jsonl", "--on-bad", "skip"),
    _corpus_reading("b.txt"),
    _corpus_reading("c.jsonl.gz"),
    _corpus_reading("c.jsonl.gz", "--on-bad", "skip"),
    _corpus_reading("d.jsonl.zst"),
    _corpus_reading("d.jsonl.zst", "--on-bad", "skip"),
    _corpus_reading("e.parquet"),
    Reading(
        "data: corpora config",
        "data cpt --config corpora.yaml --workers 1",
        (*HF, "corpora.yaml", "corpora/a.jsonl", "corpora/b.txt"),
        ("corpora.yaml",),
        STORE,
        weight=2,
    ),
    Reading(
        "data: PII patterns",
        _of_store("cpt --input corpora/a.jsonl --tokenizer hf --workers 1 --pii-patterns patterns.yaml"),
        (*HF, "corpora/a.jsonl", "patterns.yaml"),
        ("patterns.yaml",),
        STORE,
    ),
    Reading(
        "data: tokenizer",
        _of_store("cpt --input corpora/a.jsonl --tokenizer hf --workers 1"),
        (*HF, "corpora/a.jsonl"),
        ("hf/tokenizer*.json", "hf/chat_template.jinja"),
        STORE,
    ),
    Reading(
        "data: chat template",
        _of_store("sft --input sft.jsonl --tokenizer hf"),
        (*HF, "sft.jsonl"),
        ("hf/chat_template.jinja", "hf/tokenizer_config.json"),
        STORE,
    ),
    Reading(
        "data: SentencePiece",
        _of_store("cpt --input corpora/a.jsonl --tokenizer sentencepiece.model --workers 1"),
        ("sentencepiece.model", "corpora/a.jsonl"),
        ("sentencepiece.model",),
        STORE,
    ),
    Reading(
        "data: pairs",
        _of_store("pairs --input pairs.jsonl --tokenizer hf"),
        (*HF, "pairs.jsonl"),
        ("pairs.jsonl",),
        STORE,
    ),
    Reading("data: sft", _of_store("sft --input sft.jsonl --tokenizer hf"), (*HF, "sft.jsonl"), ("sft.jsonl",), STORE),
    Reading("data: show", "data show stores/corpus", ("stores/corpus",), ("stores/corpus/store.json",)),
    Reading(
        "data: verify",
        _then("data verify stores/pairs", functools.partial(_read_rows, "stores/pairs")),
        ("stores/pairs",),
        ("stores/pairs/*", "stores/pairs/rows/**"),
    ),
    Reading(
        "data: batches", functools.partial(_read_store, "stores/corpus"), ("stores/corpus",), ("stores/corpus/**",)
    ),
    Reading(
        "data: references",
        _read_references,
        ("rpo.yaml", "base", "stores/pairs", "runs/rpo"),
        ("stores/pairs/reference/**",),
        runs=True,
    ),
    Reading(
        "evaluation: evaluate",
        f"evaluate {EXAM} --output results",
        ("exam.jsonl", "template.yaml", "results"),
        ("exam.jsonl", "template.yaml", "results/samples.jsonl"),
        ("results/grades*.jsonl", "results/scores.json"),
        weight=3,
        runs=True,
    ),
    Reading(
        "evaluation: score",
        "score --exam questions --data exam.jsonl --predictions predictions --against first --output out",
        ("exam.jsonl", "predictions"),
        ("exam.jsonl", "predictions/*"),
        ("out/**",),
        weight=2,
    ),
    Reading(
        "evaluation: IgakuQA",
        "contamination --exam igakuqa --against corpora/a.jsonl --n 4 --output out",
        ("igakuqa", "corpora/a.jsonl"),
        ("igakuqa/**",),
        ("out/contamination.json",),
    ),
    Reading(
        "evaluation: pairs",
        f"pairs {EXAM} --samples 2 --strategy gold --samples-file asked/samples.jsonl --output out.jsonl",
        ("exam.jsonl", "template.yaml", "asked/samples.jsonl"),
        ("asked/samples.jsonl", "exam.jsonl"),
        ("out.jsonl",),
        runs=True,
    ),
    Reading(
        "evaluation: contamination",
        "contamination --exam exam.jsonl --against stores/corpus pairs.jsonl --tokenizer hf --n 4 --output results",
        (*HF, "exam.jsonl", "stores/corpus", "pairs.jsonl", "results"),
        ("exam.jsonl", "pairs.jsonl", "stores/corpus/**", "results/grades*.jsonl"),
        ("results/contamination.json",),
        runs=True,
    ),
    Reading(
        "inference: completion",
        functools.partial(_ask_server, "completion"),
        ("answers",),
        ("answers/completion.http",),
    ),
    Reading("inference: chat", functools.partial(_ask_server, "chat"), ("answers",), ("answers/chat.http",)),
    Reading(
        "conversion: from-hf",
        _then("convert from-hf hf out", functools.partial(_converted, "out")),
        HF,
        ("hf/*",),
        weight=4,
    ),
    Reading(
        "conversion: from-hf of an export",
        _then("convert from-hf export out", functools.partial(_converted, "out")),
        ("export",),
        ("export/*",),
        weight=2,
        runs=True,
    ),
    Reading(
        "conversion: from-hf of an adapter",
        _then("convert from-hf peft out --base base", functools.partial(_converted, "out")),
        ("peft", "base"),
        ("peft/*",),
        weight=3,
        runs=True,
    ),
    Reading(
        "conversion: from-hf resumed",
        _then("convert from-hf hf half --part 2/2", functools.partial(_converted, "half")),
        (*HF, ".half.unfinished"),
        (".half.unfinished/**",),
        weight=2,
    ),
    Reading(
        "conversion: to-hf",
        "convert to-hf runs/cpt out",
        ("runs/cpt",),
        ("runs/cpt/config.yaml", "runs/cpt/tokenizer/*", *CHECKPOINT_FILES),
        ("out/*.safetensors", "out/*.json", "out/*.jinja"),
        weight=3,
        runs=True,
    ),
    Reading(
        "conversion: to-hf of a converted model",
        "convert to-hf base out",
        ("base",),
        ("base/**",),
        ("out/*.safetensors", "out/*.json", "out/*.jinja"),
    ),
    Reading(
        "conversion: verify",
        _then("convert verify hf base --by hash", _read_both),
        ("hf", "base"),
        ("hf/*", "base/**"),
    ),
    Reading(
        "checkpoint: params",
        functools.partial(_read_checkpoint, "runs/rpo"),
        ("runs/rpo", "base"),
        ("runs/rpo/checkpoints/**",),
        runs=True,
    ),
    Reading(
        "training: train goes on",
        _go_on_training,
        ("cpt.yaml", "base", "stores/corpus", "runs/cpt"),
        ("runs/cpt/**",),
        weight=0.1,
        runs=True,
        seconds=60,
    ),
    Reading(
        "report: report",
        "report runs/cpt runs/rpo results --output out",
        ("runs/cpt", "runs/rpo", "results"),
        ("runs/*/*.*", "results/*"),
        ("out/report.html",),
        weight=0.5,
        runs=True,
    ),
    Reading("recipes: rounds", _run_rounds, ("rounds", "rounds.yaml", "rpo.yaml", "template.yaml"), ("rounds/**",)),
    Reading("recipes: demo", _run_demo, ("demo",), ("demo/demo.json",), weight=0.3),
    Reading(
        "launching: gke",
        "launch gke --config cpt.yaml --topology v5p:2x2x1 --run gs://mine/r --image i:1 --dry-run -- "
        "--data.store gs://mine/s --init.checkpoint gs://mine/m",
        ("cpt.yaml",),
        ("cpt.yaml",),
    ),
)


def readings(only: str | None = None, *, runs: bool = True) -> list[Reading]:
    """Those whose name contains a text, and whose inputs are there."""
    return [each for each in READINGS if (runs or not each.runs) and (only is None or only in each.name)]


def files_of(inputs: Path, reading: Reading) -> list[str]:
    """Paths below the inputs of the files that are tried."""
    found = {path for pattern in reading.files for path in _matching(inputs, pattern)}
    if not found:
        raise ValueError(f"{reading.name}: there are no files {reading.files}")
    return sorted(found)


def _matching(root: Path, pattern: str) -> list[str]:
    pattern = f"{pattern}/*" if pattern.endswith("**") else pattern
    return [str(path.relative_to(root)) for path in sorted(root.glob(pattern)) if path.is_file()]
