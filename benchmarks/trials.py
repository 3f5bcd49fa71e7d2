"""The verbs that read files, and what comes of a trial of one; for `benchmarks.fuzz` and `benchmarks.damage`.

A `Reading` is a verb and the files that it reads, of those that `benchmarks.inputs` makes. `attempt` runs it in this
process on a copy in which something was changed, and says how it ended; a `Worker` does so in a process of its own,
with limits of time and memory.
"""

import contextlib
import dataclasses
import functools
import gc
import hashlib
import http.client
import inspect
import io
import json
import os
import re
import resource
import shutil
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.inputs import LENGTH
from tests.warm import WarmPython

SECONDS, GIB = 20.0, 0.5  # that a trial may take, and by which it may make its process grow
PACKAGE = "medllm_jax"

# --- what reads them ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Reading:
    """A verb, or a function where the verb would go on to train, and the files that it reads.

    name: `room: what`. run: arguments of medllm, or a function that returns what came out. needs: what must be there.
    files: patterns of those that are tried. results: patterns of files whose bytes are what came out. weight: how often
    it is tried; what is slow has a small one. runs: whether it needs what `make_inputs` makes only with its runs.
    seconds: that it may take.
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


def _digest(*values: Any) -> str:
    return hashlib.sha256("\0".join(map(str, values)).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _read_run_config() -> str:
    from medllm_jax.config.load import load_run_config, to_yaml

    return _digest(to_yaml(load_run_config("cpt.yaml")))


def _read_rounds_config() -> str:
    from medllm_jax.recipes.rounds import load_rounds_config

    return _digest(load_rounds_config("rounds.yaml"))


def _read_recorded_config() -> str:
    from medllm_jax.config.load import to_yaml
    from medllm_jax.storage.run_folder import recorded_config

    return _digest(to_yaml(recorded_config("runs/cpt")))


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

    return _digest(_read_checkpoint(run), open_checkpoint(run).model, _bytes_of([f"{run}/tokenizer/*"]))


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


class _EndedError(Exception):
    """A verb inside a reading ended with this code, and has said why."""


def _raise_unless_done(command: str) -> None:
    from medllm_jax.cli import main

    code = main(command.split())
    if code:
        raise _EndedError(code)


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
        ("runs/cpt/config.yaml",),
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


# --- one trial ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a trial ended.

    code: exit code; None where it did not end by itself, or with an exception. result: digest of what came out, for
    code 0. said: what it printed. error: of what was not foreseen, its type and message; at: the innermost line of the
    package, and trace all of it.
    """

    code: int | None
    result: str = ""
    said: str = ""
    errors: str = ""
    error: str = ""
    at: str = ""
    trace: str = ""
    seconds: float = 0.0


class HangError(BaseException):
    """The trial takes too long; raised where it is then."""


class GrowthError(BaseException):
    """The trial takes too much memory; raised where it is then."""


def unchanged(_: Path) -> None:
    """The inputs as they are."""


@dataclasses.dataclass(frozen=True)
class Replaced:
    """A file of other content."""

    path: str
    content: bytes

    def __call__(self, place: Path) -> None:
        (place / self.path).write_bytes(self.content)


@dataclasses.dataclass(frozen=True)
class Lost:
    """A file that is gone; instead: what stands in its place, nothing, a "folder", or a "link" to nothing."""

    path: str
    instead: str = ""

    def __call__(self, place: Path) -> None:
        (place / self.path).unlink()
        if self.instead == "folder":
            (place / self.path).mkdir()
        elif self.instead == "link":
            (place / self.path).symlink_to("nowhere")


def copy_inputs(inputs: Path, reading: Reading, place: Path) -> None:
    """A new folder with what a reading needs."""
    place.mkdir(parents=True)
    for name in reading.needs:
        source, target = inputs / name, place / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, symlinks=True)
        else:
            shutil.copyfile(source, target)


def attempt(inputs: Path, reading: Reading, change: Callable[[Path], None], place: Path) -> Outcome:
    """Runs a reading in this process, in a new folder that is removed again, after a change to what is in it."""
    copy_inputs(inputs, reading, place)
    try:
        with contextlib.chdir(place):
            change(Path())
            _forget_paths()
            return _run(reading)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _run(reading: Reading) -> Outcome:
    said, errors, started = io.StringIO(), io.StringIO(), time.monotonic()
    code, result, error, at, trace = None, "", "", "", ""
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors), _alarms(reading.seconds):
        try:
            code, result = _code_and_result(reading)
        except (Exception, HangError, GrowthError) as problem:
            error, at = f"{type(problem).__name__}: {problem}"[:300], _frame(problem)
            trace = "".join(traceback.format_exception(problem, limit=-12))[-4000:]
        if gc.get_freeze_count():  # a worker, where this is quick
            gc.collect()  # what is left behind may complain when it is removed: now, not in another trial
    seconds = time.monotonic() - started
    return Outcome(code, result, said.getvalue(), errors.getvalue(), error, at, trace, seconds)


def _code_and_result(reading: Reading) -> tuple[int, str]:
    """As the command line ends: what a function raises becomes the code and the line that a verb would give."""
    from medllm_jax import errors
    from medllm_jax.cli import main
    from medllm_jax.storage.faults import as_told

    os.environ["MEDLLM_TRACEBACK"] = "1"  # the command line's last line of defence would hide what was not foreseen
    if isinstance(reading.run, str):
        try:
            code = main(reading.run.split())
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
        return code, "" if code else _bytes_of(reading.results)
    try:
        return 0, reading.run()
    except _EndedError as ended:
        return ended.args[0], ""
    except Exception as problem:
        told = problem if isinstance(problem, errors.UserError | errors.RunError) else as_told(problem)
        if told is None:
            raise
        print(f"error: {told}", file=sys.stderr)
        return (2 if isinstance(told, errors.UserError) else 1), ""


def _frame(problem: BaseException) -> str:
    """The innermost line of the package, as file:function."""
    frames = [frame for frame in traceback.extract_tb(problem.__traceback__) if f"/{PACKAGE}/" in frame.filename]
    if not frames:
        return "outside the package"
    return f"{frames[-1].filename.rpartition(f'/{PACKAGE}/')[2]}:{frames[-1].name}"


def _bytes_of(patterns: Sequence[str]) -> str:
    paths = sorted({path for pattern in patterns for path in _matching(Path(), pattern)})
    return _digest(*(f"{path} {hashlib.sha256(_timeless(Path(path))).hexdigest()}" for path in paths))


def _timeless(file: Path) -> bytes:
    """Its bytes; of a page, without when it was made."""
    content = file.read_bytes()
    return re.sub(rb"\d{4}-\d\d-\d\d \d\d:\d\d", b"", content) if file.suffix == ".html" else content


@contextlib.contextmanager
def _alarms(seconds: float) -> Iterator[None]:
    """Raises where the trial is when its time is over; and, asked by the process that watches it, for its memory."""

    def raising(error: type[BaseException]) -> Any:
        def handler(*_: object) -> None:
            raise error

        return handler

    before = signal.signal(signal.SIGALRM, raising(HangError)), signal.signal(signal.SIGUSR1, raising(GrowthError))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before[0])
        signal.signal(signal.SIGUSR1, before[1])


def _forget_paths() -> None:
    """Empties the package's caches that are keyed by a path: the next trial has other files there."""
    for name, module in list(sys.modules.items()):
        if name.startswith(PACKAGE):
            for cached in list(vars(module).values()):
                if hasattr(cached, "cache_clear") and {"path", "folder", "file"} & set(
                    inspect.signature(cached).parameters
                ):
                    cached.cache_clear()


# --- in a process of its own ----------------------------------------------------------------------------------------


class Worker:
    """A process that makes trials one after the other, begun anew when one has hung it, filled it or ended it."""

    def __init__(self, inputs: Path, scratch: Path):
        scratch.mkdir(parents=True, exist_ok=True)
        self._inputs, self._scratch = inputs, scratch
        self._process: WarmPython | None = None
        self._count = 0

    def attempt(self, reading: Reading, change: Callable[[Path], None]) -> Outcome:
        if self._process is None or self._count >= 300:
            self.close()
            self._begin()
        self._count += 1
        place = self._scratch / f"{os.getpid()}-{self._count}"
        _send(self._to, [str(self._inputs), reading.name, _change_as_json(change), str(place)])
        outcome = self._watched(reading.seconds)
        if outcome.error.startswith(("HangError", "GrowthError", "Killed", "Ended")):
            self.close()
        return outcome

    def _begin(self) -> None:
        name = f"{self._scratch}/worker-{os.getpid()}-{id(self)}.socket"
        with contextlib.suppress(FileNotFoundError):
            Path(name).unlink()
        # A warm program inherits nothing but its outputs: it is handed its end of the pair through a named socket.
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(name)
            listening.listen()
            code = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); "
            code += "from benchmarks.trials import serve; serve(s)"
            with (self._scratch / "native.log").open("ab") as log:  # what libraries print past Python's streams
                self._process = WarmPython("-c", code, name, stdout=log, stderr=log, environment=ENVIRONMENT)
            self._to, _ = listening.accept()
        Path(name).unlink()
        self._count = 0

    def _watched(self, seconds: float) -> Outcome:
        """Waits for the outcome, and asks the process to end the trial, or ends it, where limits are passed."""
        pid, began = self._process.pid, time.monotonic()
        first, asked = _resident(pid), None
        self._to.settimeout(0.05)
        data = b""
        while True:
            try:
                part = self._to.recv(1 << 20)
                if not part:
                    return Outcome(
                        None, error=f"Ended: the process ended with {self._process.wait(10)}", at="native code"
                    )
                data += part
                if len(data) >= 8 and len(data) == 8 + struct.unpack("Q", data[:8])[0]:
                    return Outcome(*json.loads(data[8:]))
                continue
            except TimeoutError:
                pass
            now = time.monotonic()
            grown = _resident(pid) - first
            if asked is None and grown > GIB * 2**30:
                asked = now
                self._process.send_signal(signal.SIGUSR1)
            if grown > 6 * GIB * 2**30 or now - began > seconds + 5 or (asked is not None and now - asked > 5):
                self._process.kill()
                self._process.wait()
                what = "GrowthError" if asked is not None else "HangError"
                return Outcome(None, error=f"{what}: killed", at="native code", seconds=now - began)

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._to.close()
            self._process = None


# One device, no cache of compiled programs, quick compiling, and no accelerator.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "Agg",
}


def serve(requests: socket.socket) -> None:
    """Makes the trials that are asked for, until nobody asks any more."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    stream = requests.makefile("rb")
    while head := stream.read(8):
        inputs, name, change, place = json.loads(stream.read(struct.unpack("Q", head)[0]))
        reading = next(each for each in READINGS if each.name == name)
        outcome = attempt(Path(inputs), reading, _change_from_json(change), Path(place))
        _send(requests, list(dataclasses.astuple(outcome)))
    os._exit(0)


def _send(to: socket.socket, content: list[Any]) -> None:
    data = json.dumps(content).encode()
    to.sendall(struct.pack("Q", len(data)) + data)


def _change_as_json(change: Callable[[Path], None]) -> list[str]:
    match change:
        case Replaced(path, content):
            return ["replaced", path, content.decode("latin-1")]
        case Lost(path, instead):
            return ["lost", path, instead]
    return ["unchanged"]


def _change_from_json(fields: list[str]) -> Callable[[Path], None]:
    match fields:
        case ["replaced", path, content]:
            return Replaced(path, content.encode("latin-1"))
        case ["lost", path, instead]:
            return Lost(path, instead)
    return unchanged


def _resident(pid: int) -> int:
    """Bytes of memory of a process that are its own."""
    with contextlib.suppress(OSError):
        found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
        return int(found[1]) * 1024 if found else 0
    return 0


# --- what is wrong with an outcome ----------------------------------------------------------------------------------

LINES, CHARACTERS = 3, 600  # of an error, at most
# Words by which something that goes on says that not all was well.
WORDS = ("left out", "warning", "damaged", "set aside", "skip", "ignored", "passed over", "can't be read", "cut short")
WORDS += ("repaired", "anew", "not read", "unreadable", "lost", "missing", "does not", "incomplete")


def refusal_problem(outcome: Outcome) -> str | None:
    """What is wrong with how an outcome was told; None where it is one short line with code 1 or 2, or code 0."""
    if outcome.code is None:
        return outcome.error.partition(":")[0]
    if "Traceback (most recent call last)" in outcome.errors:
        return "traceback printed"
    if "not foreseen" in outcome.errors:
        return "unforeseen error"
    if outcome.code == 0:
        return None
    if outcome.code not in (1, 2):
        return f"exit code {outcome.code}"
    start = outcome.errors.rfind("error: ")
    if start < 0:
        # `convert verify` tells its verdict on standard output.
        return None if outcome.said.strip() else "no error line"
    line = outcome.errors[start:].strip()
    if line.count("\n") >= LINES:
        return f"error of {line.count(chr(10)) + 1} lines"
    return f"error of {len(line)} characters" if len(line) > CHARACTERS else None


def is_told(outcome: Outcome, usual: Outcome) -> bool:
    """Whether it says in words that something was not well, which it does not usually say."""
    lines = {line for text in (usual.said, usual.errors) for line in text.splitlines()}
    new = [line for text in (outcome.said, outcome.errors) for line in text.splitlines() if line not in lines]
    return any(word in line.lower() for line in new for word in WORDS)


# --- many trials ----------------------------------------------------------------------------------------------------

_USUAL: dict[str, Outcome] = {}


def usual(worker: Worker, reading: Reading) -> Outcome:
    """What comes of the files as they are; SystemExit where that is not the same twice."""
    if reading.name not in _USUAL:
        first, again = (worker.attempt(reading, unchanged) for _ in range(2))
        if first.code is None or (first.code, first.result) != (again.code, again.result):
            raise SystemExit(f"{reading.name} does not come out the same twice: {first} {again}")
        _USUAL[reading.name] = again
    return _USUAL[reading.name]


def in_workers(
    inputs: Path, scratch: Path, jobs: Iterator[Any], workers: int, work: Callable[[Worker, Any], None]
) -> None:
    """Hands jobs to a function, with a worker of its own for each of some threads."""
    lock = threading.Lock()

    def serve_jobs(number: int) -> None:
        worker = Worker(inputs, scratch / str(number))
        try:
            while True:
                with lock:
                    job = next(jobs, None)
                if job is None:
                    return
                work(worker, job)
        finally:
            worker.close()

    with ThreadPoolExecutor(workers) as pool:
        for done in [pool.submit(serve_jobs, number) for number in range(workers)]:
            done.result()


def fast_folder() -> str | None:
    """Where copies are made and removed all the time: in memory, if there is such a folder."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None
