"""Jobs over many tasks, on one machine or on many: results are kept, and no task is done twice.

A job maps a task to a result. The result is a JSON file (with files of bulk data beside it) named by a hash of all that
it depends on, and written last. So an interrupted job resumes with the remaining tasks, a changed setting or input
repeats only what depends on it, and workers share nothing but the folder.
"""

import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from multiprocessing import forkserver, get_context
from typing import Any, NamedTuple, Protocol, TypeVar

from etils import epath

from medllm_jax.errors import UserError
from medllm_jax.storage.remote import names_in, write_whole
from medllm_jax.terminal.version import install_line

Progress = Callable[[str, int, int], None]  # (stage, done, in all): of what, see STAGES in corpus.py
T = TypeVar("T")
T_contra = TypeVar("T_contra", contravariant=True)

_PRELOADED = ["medllm_jax.data.prepare.tasks", "transformers.models.auto.tokenization_auto", "rensa"]


class Job(Protocol[T_contra]):
    """One kind of work; travels to the workers, so it and its tasks must pickle."""

    @property
    def name(self) -> str: ...

    def identity(self, task: T_contra) -> Any:
        """JSON of all that the result depends on."""

    def __call__(self, task: T_contra, output: epath.Path) -> dict[str, Any]:
        """The result, as JSON. Bulk data goes to files at ``output`` with suffixes of the job's own."""
        ...


class TaskOutput(NamedTuple):
    """A task's result, and the path of its bulk data (without suffix)."""

    result: dict[str, Any]
    path: epath.Path


Done = tuple[int, str | None]  # a task's weight, and the message of its error
Executor = Callable[[Callable[[Any], Done], Sequence[Any]], Iterable[Done]]
"""Calls a function once for each of some arguments, anywhere, in any order; yields what the calls return."""


def run_job(
    job: Job[T],
    tasks: Sequence[T],
    folder: epath.Path,
    executor: Executor,
    progress: Progress,
    weights: Sequence[int],
) -> list[TaskOutput]:
    """The outputs of all tasks, in their order; tasks whose result exists are not repeated.

    weights: how much each task is, in what progress counts.
    Raises the UserError of a task that has one; the outputs of other tasks stay.
    """
    folder = folder / job.name
    folder.mkdir(parents=True, exist_ok=True)
    outputs = [folder / _key(job, task) for task in tasks]
    there = names_in(folder)
    left = [
        (task, str(output), weight)
        for task, output, weight in zip(tasks, outputs, weights, strict=True)
        if _result(output).name not in there
    ]
    total = sum(weights)
    done = total - sum(weight for _, _, weight in left)
    progress(job.name, done, total)
    for weight, error in executor(functools.partial(_perform, job), left):
        if error is not None:
            raise UserError(error)
        done += weight
        progress(job.name, done, total)
    with ThreadPoolExecutor(16) as pool:  # one small object a task: in a bucket, a wait each
        results = pool.map(lambda output: json.loads(_result(output).read_bytes()), outputs)
        return [TaskOutput(result, output) for result, output in zip(results, outputs, strict=True)]


def _key(job: Job[T], task: T) -> str:
    return hashlib.sha256(json.dumps([job.name, job.identity(task)]).encode()).hexdigest()[:24]


def _result(output: epath.Path) -> epath.Path:
    return output.with_name(f"{output.name}.json")


def _perform(job: Job[T], argument: tuple[T, str, int]) -> Done:
    """Does one task; returns the message of a UserError, which not every executor would bring back as such."""
    task, output, weight = argument[0], epath.Path(argument[1]), argument[2]
    try:
        result = job(task, output)
    except UserError as error:
        return weight, str(error)
    write_whole(_result(output), json.dumps(result))
    return weight, None


# --- executors -------------------------------------------------------------------------------------------------------


def in_this_process(function: Callable[[Any], Done], arguments: Sequence[Any]) -> Iterator[Done]:
    """In this process, one after the other."""
    return map(function, arguments)


@contextlib.contextmanager
def in_processes(workers: int) -> Iterator[Executor]:
    """Worker processes on this machine, started when they are first needed; a single argument stays in this process."""
    pool = None
    # Workers are forked from a clean process, since a fork of this one would copy the locks of whatever threads run
    # here. That process imports once for all of them what is slow to import, beginning now, beside this process.
    context = get_context("forkserver")
    if workers > 1:
        context.set_forkserver_preload(_PRELOADED)
        forkserver.ensure_running()

    def run(function: Callable[[Any], Done], arguments: Sequence[Any]) -> Iterable[Done]:
        nonlocal pool
        if workers == 1 or len(arguments) < 2:
            return in_this_process(function, arguments)
        pool = pool or ProcessPoolExecutor(workers, mp_context=context, initializer=_set_up_worker)
        futures = [pool.submit(function, argument) for argument in arguments]
        return (future.result() for future in as_completed(futures))

    try:
        yield run
    except KeyboardInterrupt:
        for worker in multiprocessing.active_children():
            worker.terminate()
        raise
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)


def _set_up_worker() -> None:
    """There are as many workers as cores: threads of their own would only get in each other's way. Ctrl-C, which a
    terminal sends to all of them, is for the process that they work for to answer.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def on_beam(options: Sequence[str]) -> Executor:
    """Apache Beam: with no options its own runner on this machine; with ``--runner=DataflowRunner ...``, many machines.

    UserError where Apache Beam is not installed.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError:
        raise UserError(f"Apache Beam is not installed: {install_line('beam')}") from None

    def run(function: Callable[[Any], Done], arguments: Sequence[Any]) -> list[Done]:
        if not arguments:
            return []
        # Nothing comes back from a pipeline by itself: results are files, and so are errors.
        with beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
            tasks = pipeline | beam.Create(list(arguments)) | beam.Reshuffle()
            tasks | beam.Map(functools.partial(_to_file, function))
        return list(map(_from_file, arguments))

    return run


def _to_file(function: Callable[[Any], Done], argument: tuple[Any, str, int]) -> None:
    _error_file(argument).write_text(json.dumps(function(argument)))


def _from_file(argument: tuple[Any, str, int]) -> Done:
    file = _error_file(argument)
    weight, error = json.loads(file.read_bytes())
    file.unlink(missing_ok=True)
    return weight, error


def _error_file(argument: tuple[Any, str, int]) -> epath.Path:
    return epath.Path(f"{argument[1]}.beam")
