"""Twenty thousand wrong files, each read by the real verb: no traceback, no hang, no gigabytes, nothing silently wrong.

    python -m benchmarks.fuzz [--inputs 20000] [--seed 0] [--only NAME] [--seconds S] [--jobs 2] [--output FILE]
    python -m benchmarks.fuzz --sweep [--only NAME]
    python -m benchmarks.fuzz --replay SEED:INDEX | sweep:INDEX

An input is one of the files that `benchmarks.inputs` makes, changed at random: values of JSON and YAML by values of
other types, sizes and depths, keys left out, renamed, doubled or made up; lines of JSON Lines; headers of safetensors;
answers of a server; bytes of everything. A reading of `benchmarks.readings` then reads it, in a process with everything
imported that makes one trial after the other, by `medllm_jax.cli.main` or, where the verb would go on to train, by the
function that loads. A seed and an index name an input for good.

A sweep leaves nothing to chance: every value in a file of JSON, JSON Lines or YAML, in a header or in an answer is
replaced by one value of each type and shape, in turn. It says nothing of what the other changes do.

A finding is any of these:

- an exception that the command line does not foresee, or a traceback that was printed;
- 20 seconds of processor time or 60 by the clock (three times both where a run is trained), or 500 MB more memory than
  the process had: it is ended;
- an error that is not one line, or is longer than 600 characters; an exit code other than 0, 1, 2;
- exit code 0 for a change that must be refused: an unknown key in a config or in another's settings;
- exit code 0 for a change that corrupts, if what came out is not what comes out of the file as it was, and no line of
  the output says so (`trials.WORDS`). What comes out is rows of tokens, weights, scores, pairs or a page, by bytes.

Changes that corrupt are those that no reader may take for content: a value of another type, a number that is none,
bytes that are no UTF-8, a container cut short, and every change of a file that a checksum covers. Any other change
makes other content, of which the oracle sees only how it ends. It does not see: content that was taken for other
content of the right type; what a verb wrote besides what is compared; and files that none of the readings reads.

Findings are written to --output as JSON lines, the first of each kind: by exception and innermost line of the package,
or by reading, kind of file and change. Each is tried again in a new process. Exit code 1 if there are any.
"""

import argparse
import collections
import dataclasses
import itertools
import json
import math
import random
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import trial_worker
from benchmarks.inputs import kind_of
from benchmarks.mutations import CORRUPTING, REFUSED, Change, changed, swept
from benchmarks.readings import Reading, files_of
from benchmarks.trial_worker import Worker, add_options, in_workers, place_of
from benchmarks.trials import Outcome, Replaced, is_told, refusal_problem


class Input(NamedTuple):
    """What a seed and an index name."""

    index: int
    reading: Reading
    path: str
    change: Change


class Chooser:
    """Inputs by number: a reading by its weight, a kind of its files, a file, a change."""

    def __init__(self, inputs: Path, readings: list[Reading], seed: int):
        self._inputs, self._readings, self._seed = inputs, readings, seed
        self._files = {}
        for reading in readings:
            by_kind = collections.defaultdict(list)
            for path in files_of(inputs, reading):
                by_kind[kind_of(path)[0]].append(path)
            self._files[reading.name] = [by_kind[kind] for kind in sorted(by_kind)]

    def __call__(self, index: int) -> Input:
        rng = random.Random(f"{self._seed}:{index}")
        reading = rng.choices(self._readings, [each.weight for each in self._readings])[0]
        path = rng.choice(rng.choice(self._files[reading.name]))
        return Input(index, reading, path, changed(path, (self._inputs / path).read_bytes(), rng))


def sweep(inputs: Path, readings: list[Reading]) -> Iterator[Input]:
    """Inputs one after the other: each reading, each of its files, each change of `mutations.swept`.

    Of files that stand in folders beside each other, and have the same values, such as the descriptions of arrays, one.
    """
    index = itertools.count()
    for reading in readings:
        alike = set()
        for path in map(Path, files_of(inputs, reading)):
            changes = list(swept(str(path), (inputs / path).read_bytes()))
            about = (path.parent.parent, path.name, tuple(change.name for change in changes))
            if about not in alike:
                yield from (Input(next(index), reading, str(path), change) for change in changes)
            alike.add(about)


@dataclasses.dataclass(frozen=True)
class Finding:
    """What is wrong with the outcome of an input; `key` is equal for findings of one cause."""

    key: tuple[str, ...]
    problem: str


def finding_of(given: Input, outcome: Outcome, usual: Outcome) -> Finding | None:
    """usual: the outcome of the reading with its files as they are."""
    change = given.change
    about = (given.reading.name, kind_of(given.path)[0])
    if problem := refusal_problem(outcome):
        if outcome.code is None:
            return Finding((problem, outcome.at, *(about if outcome.at == "native code" else ())), problem)
        return Finding((re.sub(r"\d+", "N", problem), *about), problem)
    if outcome.code != 0 or usual.code != 0:
        return None
    if change.kind == REFUSED:
        return Finding(("taken", *about), "taken, and not known")
    if change.kind == CORRUPTING and outcome.result != usual.result and not is_told(outcome, usual):
        return Finding(("silent", *about), "silently another result")
    return None


def record(seed: str | int, given: Input, outcome: Outcome, finding: Finding) -> dict[str, Any]:
    """A finding for a file of findings."""
    return {
        "input": f"{seed}:{given.index}",
        "room": given.reading.room,
        "reading": given.reading.name,
        "file": given.path,
        "change": given.change.name,
        "kind": given.change.kind,
        "problem": finding.problem,
        "code": outcome.code,
        "error": outcome.error,
        "at": outcome.at,
        "errors": outcome.errors[-700:],
        "seconds": round(outcome.seconds, 2),
        "trace": outcome.trace,
    }


def trial(worker: Worker, given: Input) -> Outcome:
    return worker.attempt(given.reading, Replaced(given.path, given.change.content))


class Fuzzing:
    """What came of inputs, and what was found."""

    def __init__(self, seed: str, show: Callable[[str], None]):
        self._seed, self._show, self._lock = seed, show, threading.Lock()
        self.counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
        self.found: dict[tuple[str, ...], dict[str, Any]] = {}

    def try_one(self, worker: Worker, given: Input) -> None:
        usual = trial_worker.usual(worker, given.reading)
        outcome = trial(worker, given)
        finding = finding_of(given, outcome, usual)
        with self._lock:
            counts = self.counts[kind_of(given.path)[0]]
            counts["inputs"] += 1
            counts[f"exit {outcome.code}"] += 1
            if finding is None:
                return
            counts["findings"] += 1
            if finding.key in self.found:
                self.found[finding.key]["times"] += 1
                return
            row = self.found[finding.key] = {"times": 1} | record(self._seed, given, outcome, finding)
        worker.close()  # again, with nothing that another input may have left
        again = finding_of(given, trial(worker, given), usual)
        row["again"] = again is not None and again.key == finding.key
        self._show(line_of(row))


def line_of(row: dict[str, Any]) -> str:
    """A finding in a line."""
    what = f"{row['error'][:90]} at {row['at']}" if row["error"] else f"{row['problem']}: {row['errors'][-90:].strip()}"
    return f"{row['input']} {row['reading']} | {row['file']} | {row['change'][:50]!r} | {what}"


def table(counts: dict[str, collections.Counter]) -> str:
    columns = ("inputs", "exit 0", "exit 1", "exit 2", "findings")
    total = sum(counts.values(), collections.Counter())
    lines = [f"| kind of input | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    for kind, row in [*sorted(counts.items()), ("all", total)]:
        lines.append(f"| {kind} | {' | '.join(str(row[column]) for column in columns)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, help="how many (default 20000; with --sweep, all)")
    parser.add_argument("--sweep", action="store_true", help="each value in turn by each type, instead of at random")
    parser.add_argument("--skip", type=int, default=0, metavar="N", help="leave out the first N (default 0)")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="try one in N (default 1)")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no more inputs after so long")
    parser.add_argument("--output", type=Path, default=Path("fuzz-findings.jsonl"), help="default %(default)s")
    parser.add_argument(
        "--replay", metavar="SEED:INDEX", help="try one input, with the same --only, and show all of it"
    )
    add_options(parser)
    options = parser.parse_args()
    seed, _, index = (options.replay or ("sweep" if options.sweep else str(options.seed))).partition(":")
    with place_of(parser, options) as place:
        first = int(index or options.skip)
        all_given: Iterator[Input]
        if seed == "sweep":
            all_given = itertools.islice(sweep(place.inputs, place.readings), first, None, options.every)
        else:
            chooser = Chooser(place.inputs, place.readings, int(seed))
            all_given = map(chooser, itertools.count(first, options.every))
        if options.replay:
            return replay(Worker(place.inputs, place.scratch), next(all_given))
        began = time.monotonic()
        until = began + options.seconds
        most = options.inputs or (None if options.sweep else 20_000)
        given = itertools.takewhile(lambda _: time.monotonic() < until, itertools.islice(all_given, most))
        fuzzing = Fuzzing(seed, lambda line: print(line, flush=True))
        in_workers(place, given, options.jobs, fuzzing.try_one)
    rows = sorted(fuzzing.found.values(), key=lambda row: (row["room"], row["at"], row["reading"]))
    options.output.write_text("".join(json.dumps(row) + "\n" for row in rows))
    total = sum(row["inputs"] for row in fuzzing.counts.values())
    seconds = time.monotonic() - began
    print(f"\n{table(fuzzing.counts)}\n\n{total} inputs in {seconds:.0f} s; {len(rows)} findings: {options.output}")
    return 1 if rows else 0


def replay(worker: Worker, given: Input) -> int:
    """Shows all of one trial."""
    try:
        usual = trial_worker.usual(worker, given.reading)
        outcome = trial(worker, given)
    finally:
        worker.close()
    finding = finding_of(given, outcome, usual)
    print(f"{given.reading.name}: {given.path}: {given.change.name} ({given.change.kind})")
    print(f"content: {given.change.content[:2000]!r}\nexit code {outcome.code}, result {outcome.result}")
    print(f"output:\n{outcome.said[-2000:]}\nerrors:\n{outcome.errors[-2000:]}\n{outcome.trace}")
    print(f"finding: {finding.problem if finding else 'none'}")
    return 1 if finding else 0


if __name__ == "__main__":
    sys.exit(main())
