"""Every kind of file that the system writes or reads, damaged in one place, and what its verbs make of it.

    python -m benchmarks.damage [--cases 1000] [--seed 0] [--only NAME] [--jobs 2] [--output FILE]

The files are those that `benchmarks.inputs` makes. A case is a reading of `benchmarks.trials`, one of its files, and
one fault: a bit flipped at a random place, the file cut at a random length, emptied, lost, replaced by a folder, or by
a link to nothing. Kinds of files take turns, so that each is tried equally often, and so do their faults; readings that
train have few cases, and all others of a kind are preferred to them. The outcome is one of

- refused: one line, exit code 1 or 2;
- same: exit code 0, and what came out is what comes out of the whole file, bit for bit: the fault did no harm;
- told: exit code 0, and a line of the output says what was lost, repaired or left out;
- other content: exit code 0 and another result, where no reader could know: a bit or the end of a file that no checksum
  covers, and that reads as content of its kind, such as a text; or a file that need not be there;
- silently wrong: exit code 0, another result, and no word of it;
- badly told: an error of many lines or characters, or another exit code;
- traceback; hang (20 s of processor time or 60 by the clock, and three times both where a run is
  trained); memory (500 MB more than before).

Prints a table by kind of file, and with --output writes what is none of the first four as JSON lines. Exit code 1 if
there is any of these.
"""

import argparse
import collections
import itertools
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import trial_worker
from benchmarks.inputs import kind_of
from benchmarks.readings import Reading, files_of
from benchmarks.trial_worker import Worker, add_options, in_workers, place_of
from benchmarks.trials import Lost, Outcome, Replaced, is_told, refusal_problem

GOOD = ("refused", "same", "told", "other content")
BAD = ("silently wrong", "badly told", "traceback", "hang", "memory")
FAULTS = ("flipped", "cut", "emptied", "lost", "folder", "link")
# Without such a file, what it belongs to is whole and another: that it is gone can't be known.
OPTIONAL = ("generation_config.json", "chat_template.jinja", "contamination.json", "likelihood.json")


class Case(NamedTuple):
    """A file of a reading, and what happened to it; kind: what the file is called."""

    reading: Reading
    path: str
    kind: str
    fault: str
    change: Callable[[Path], None]


def fault_of(inputs: Path, path: str, fault: str, rng: random.Random) -> Callable[[Path], None]:
    if fault in ("lost", "folder", "link"):
        return Lost(path, "" if fault == "lost" else fault)
    content = bytearray((inputs / path).read_bytes())
    if fault == "emptied" or not content:
        return Replaced(path, b"")
    if fault == "cut":
        return Replaced(path, bytes(content[: rng.randrange(len(content))]))
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return Replaced(path, bytes(content))


def cases(inputs: Path, readings: list[Reading], seed: int) -> Iterator[Case]:
    """Endless; each kind of file in turn, and each of its faults."""
    rng = random.Random(seed)
    by_kind: dict[str, list[tuple[Reading, str]]] = collections.defaultdict(list)
    for reading in readings:
        for path in files_of(inputs, reading):
            by_kind[kind_of(path)[0]].append((reading, path))
    for number in itertools.count():
        for kind in sorted(by_kind):
            fault = FAULTS[number % len(FAULTS)]
            # A file that many readings have, or a folder of many files, would hide the others.
            weights = {each.name: each.weight for each, _ in by_kind[kind]}
            (name,) = rng.choices(list(weights), list(weights.values()))
            reading, path = rng.choice([pair for pair in by_kind[kind] if pair[0].name == name])
            if reading.room == "inference" and fault in ("lost", "folder", "link"):
                continue  # what a server answers is no file
            yield Case(reading, path, kind, fault, fault_of(inputs, path, fault, rng))


def class_of(case: Case, outcome: Outcome, usual: Outcome) -> str:
    """The outcome's class; usual: what comes of the files as they are."""
    problem = refusal_problem(outcome)
    if outcome.code is None:
        return {"HangError": "hang", "GrowthError": "memory"}.get(problem or "", "traceback")
    if problem:
        return "traceback" if problem in ("traceback printed", "unforeseen error") else "badly told"
    if outcome.code:
        return "refused"
    if outcome.result == usual.result:
        return "same"
    if is_told(outcome, usual):
        return "told"
    sealed = kind_of(case.path)[1]
    unknowable = not sealed and (
        case.fault in ("flipped", "cut") or (case.fault == "lost" and absent_is_fine(case.path))
    )
    return "other content" if unknowable else "silently wrong"


def absent_is_fine(path: str) -> bool:
    return Path(path).name in OPTIONAL


def markdown(counts: dict[str, collections.Counter]) -> str:
    """The table of docs/reliability.md."""
    columns = [*GOOD, *BAD]
    total = sum(counts.values(), collections.Counter())
    lines = [f"| file | cases | {' | '.join(columns)} |", f"|---|{'---:|' * (1 + len(columns))}"]
    for kind, row in [*sorted(counts.items()), ("**all**", total)]:
        lines.append(f"| {kind} | {row.total()} | {' | '.join(str(row[column] or '') for column in columns)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=1000, help="how many (default 1000)")
    parser.add_argument("--output", type=Path, help="file for what is wrong, as JSON lines")
    add_options(parser)
    options = parser.parse_args()
    wrong: list[dict[str, Any]] = []
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    began = time.monotonic()

    def judge(worker: Worker, case: Case) -> None:
        outcome = worker.attempt(case.reading, case.change)
        found = class_of(case, outcome, trial_worker.usual(worker, case.reading))
        counts[case.kind][found] += 1
        if found in BAD:
            wrong.append(record(case, found, outcome))
            print(line_of(wrong[-1]), flush=True)

    with place_of(parser, options) as place:
        chosen = list(itertools.islice(cases(place.inputs, place.readings, options.seed), options.cases))
        in_workers(place, iter(chosen), options.jobs, judge)
    if options.output:
        options.output.write_text("".join(json.dumps(row) + "\n" for row in wrong))
    print(f"\n{markdown(counts)}\n\n{len(chosen)} cases in {time.monotonic() - began:.0f} s; {len(wrong)} are wrong")
    return 1 if wrong else 0


def record(case: Case, found: str, outcome: Outcome) -> dict[str, Any]:
    about = {"room": case.reading.room, "reading": case.reading.name, "file": case.path, "fault": case.fault}
    told = {"error": outcome.error, "at": outcome.at, "errors": outcome.errors[-700:], "trace": outcome.trace}
    return about | {"class": found, "code": outcome.code, "seconds": round(outcome.seconds, 2)} | told


def line_of(row: dict[str, Any]) -> str:
    what = f"{row['error'][:90]} at {row['at']}" if row["error"] else row["errors"][-90:].strip()
    return f"{row['class']}: {row['reading']} | {row['file']} | {row['fault']} | {what}"


if __name__ == "__main__":
    sys.exit(main())
