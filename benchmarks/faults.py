"""Tiny runs that are disturbed again and again, and must end as if nothing had been.

    python -m benchmarks.faults [--seed 0] [--only local ...] [--folder DIR]

Each run below suffers its faults one after the other, at random moments of a seed, and is started again after each
with the same command. At its end its losses, and the bits of its weights and optimizer, are compared with those of a
run that nothing happened to: equal on the same mesh, within 1e-5 where the mesh changed on the way. Prints a table of
what happened, and ends with 1 where anything differs, a step is missing, or a start ends as it should not.
"""

import argparse
import collections
import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}

from medllm_jax.errors import PREEMPTED
from tests.distributed.test_processes import free_port
from tests.gcs import Faults, Gcs, environment
from tests.world import World, make_world

STEPS, EVERY = 48, 3
LIMIT = 180  # seconds that any start may take

# Each start: slow steps, so that there are moments to hit; NaN at a step, or little disk, where asked for.
WORKER = """
import dataclasses, os, resource, signal, sys, time
import numpy as np
import medllm_jax.observability.progress as progress, medllm_jax.training.loop as train
from medllm_jax.cli import main
add, put, made = progress.Progress.add, train.put_batch, []

def slowly(self, step, *rest):
    time.sleep(float(os.environ.get("STEP_SECONDS", 0.06)))
    add(self, step, *rest)

def poisoned(batch, mesh):
    made.append(None)
    if len(made) == int(os.environ.get("NAN_AT", 0)):
        weights = batch.arrays.loss_weights * np.float32("nan")
        batch = dataclasses.replace(batch, arrays=batch.arrays._replace(loss_weights=weights))
    return put(batch, mesh)

progress.Progress.add, train.put_batch = slowly, poisoned
if "LITTLE_DISK" in os.environ:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ["LITTLE_DISK"]),) * 2)
if "IMPATIENT" in os.environ:
    from tests.gcs import be_impatient
    be_impatient()
sys.exit(main())
"""


class Start:
    """One start of a run, of one or more processes, and what they have printed so far."""

    def __init__(self, run: "Run", **extra: str):
        config = ["--config", str(run.config), *run.settings]
        command = [sys.executable, "-u", "-c", WORKER, "train", *config]
        env = os.environ | run.environment | extra | {"PYTHONPATH": str(Path(__file__).parents[1])}
        self.texts = [""] * run.processes
        if run.processes > 1:
            env |= {
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={8 // run.processes}",
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
                "JAX_NUM_PROCESSES": str(run.processes),
            }
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self.processes = [
            subprocess.Popen(command, env=env | ({"JAX_PROCESS_ID": str(n)} if run.processes > 1 else {}), **pipes)
            for n in range(run.processes)
        ]
        self._threads = [threading.Thread(target=self._read, args=(n,)) for n in range(run.processes)]
        for thread in self._threads:
            thread.start()

    def _read(self, number: int) -> None:
        for line in self.processes[number].stdout:
            self.texts[number] += line

    @property
    def text(self) -> str:
        return "\n".join(self.texts)

    @property
    def step(self) -> int:
        return max(map(int, re.findall(rf"step (\d+)/{STEPS}", self.texts[0])), default=0)

    @property
    def ended(self) -> bool:
        return any(process.poll() is not None for process in self.processes)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Until it holds, or the start has ended, or is too long."""
        began = time.monotonic()
        while not self.ended and not condition() and time.monotonic() - began < LIMIT:
            time.sleep(0.003)

    def send(self, number: int, which: int = -1) -> None:
        for process in self.processes if which < 0 else [self.processes[which]]:
            process.send_signal(number)

    def end(self) -> tuple[int, ...]:
        """Exit codes; what does not end in time is killed, and so ends with a code that nothing expects."""
        deadline = time.monotonic() + LIMIT
        for process in self.processes:
            try:
                process.wait(max(deadline - time.monotonic(), 1))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGCONT)
                process.terminate()
                process.kill()
                self.texts[0] += "\nit did not end by itself\n"
        for thread in self._threads:
            thread.join()
        return tuple(process.returncode for process in self.processes)


@dataclasses.dataclass
class Run:
    """A run and the faults that it suffers; place: where its folder is, in words for the table."""

    name: str
    place: str
    folder: str
    config: Path
    faults: list[str]
    processes: int = 1
    settings: list[str] = dataclasses.field(default_factory=list)
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    gcs: Gcs | None = None
    other_mesh: bool = False

    # --- what is in its folder ---

    def files(self, below: str = "") -> list[str]:
        if self.gcs is not None:
            return self.gcs.names(f"{self.folder}/{below}/" if below else f"{self.folder}/")
        root = Path(self.folder) / below
        # (A walk passes over folders that are removed meanwhile, as old checkpoints are.)
        return sorted(os.path.relpath(Path(at) / name, root) for at, _, names in os.walk(root) for name in names)

    def read(self, name: str) -> bytes:
        if self.gcs is not None:
            return self.gcs.get(f"{self.folder}/{name}")
        return (Path(self.folder) / name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        if self.gcs is None:
            (Path(self.folder) / name).write_bytes(content)
        else:
            bucket, _, key = f"{self.folder}/{name}".removeprefix("gs://").partition("/")
            self.gcs.buckets[bucket][key].data = content

    def whole(self) -> list[int]:
        """Steps of whole checkpoints."""
        names = (name.split("/") for name in self.files("checkpoints"))
        return sorted(int(step) for step, *rest in names if step.isdigit() and rest == ["commit_success.txt"])

    def saving(self) -> bool:
        names = self.files("checkpoints")
        if self.gcs is None:
            return any("tmp" in name.split("/")[0] for name in names)
        return bool({name.split("/")[0] for name in names} - {str(step) for step in self.whole()})

    def losses(self) -> dict[int, list[float]]:
        rows = [json.loads(line) for line in self.read("metrics.jsonl").decode().splitlines()]
        found = collections.defaultdict(list)
        for row in rows:
            found[row["step"]].append(row["loss"])
        return found

    def digests(self) -> dict[str, str]:
        """What its last checkpoint says of each of its arrays."""
        from medllm_jax.checkpoint.handle import open_checkpoint

        if self.gcs is None:
            return open_checkpoint(self.folder, STEPS).meta["digests"]
        code = "import sys, json; from medllm_jax.checkpoint.handle import open_checkpoint; "
        code += "print('META', json.dumps(open_checkpoint(sys.argv[1]).meta))"
        command = [sys.executable, "-c", code, self.folder]
        out = subprocess.run(command, env=os.environ | self.environment, capture_output=True, text=True, check=True)
        return json.loads(out.stdout.partition("META")[2])["digests"]


# --- faults: each takes a run, and a step by which it is to happen, and gives the start that suffered it -------------


def at_start(run: Run, step: int, rng: random.Random) -> Start:
    start = Start(run)
    time.sleep(rng.uniform(0.1, 9))
    start.send(signal.SIGKILL)
    return start


def up_to(run: Run, step: int, rng: random.Random) -> Start:
    """A start that has got to a step, and a moment further."""
    start = Start(run)
    start.wait_for(lambda: start.step >= step)
    time.sleep(rng.uniform(0, 0.2))
    return start


def in_a_step(run: Run, step: int, rng: random.Random) -> Start:
    start = up_to(run, step, rng)
    start.send(signal.SIGKILL)
    return start


def in_a_save(run: Run, step: int, rng: random.Random) -> Start:
    start = Start(run)
    start.wait_for(lambda: start.step >= step and run.saving())
    time.sleep(rng.uniform(0, 0.03))
    start.send(signal.SIGKILL)
    return start


def sigterm(run: Run, step: int, rng: random.Random) -> Start:
    start = up_to(run, step, rng)
    start.send(signal.SIGTERM, rng.randrange(run.processes))
    return start


def flipped_bits(run: Run, step: int, rng: random.Random) -> Start:
    """In the newest checkpoint, in some files."""
    start = sigterm(run, step, rng)
    start.end()
    newest = f"checkpoints/{run.whole()[-1]}"
    names = [f"{newest}/{name}" for name in run.files(newest)]
    for name in rng.sample(names, min(4, len(names))) + [name for name in names if "/d/" in name]:
        content = bytearray(run.read(name))
        if content:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            run.write(name, bytes(content))
    return start


def cut_file(run: Run, step: int, rng: random.Random) -> Start:
    start = sigterm(run, step, rng)
    start.end()
    newest = f"checkpoints/{run.whole()[-1]}"
    name = rng.choice([name for name in run.files(newest) if "/d/" in name])
    content = run.read(f"{newest}/{name}")
    run.write(f"{newest}/{name}", content[: rng.randrange(len(content))])
    return start


def not_a_number(run: Run, step: int, rng: random.Random) -> Start:
    before = run.whole()[-1] if run.whole() else 0
    return Start(run, NAN_AT=str(max(step - before, 1)))


def full_disk(run: Run, step: int, rng: random.Random) -> Start:
    return Start(run, LITTLE_DISK=str(rng.randrange(20_000, 120_000)))


def second_writer(run: Run, step: int, rng: random.Random) -> Start:
    """Is refused, and the first goes on (until it is told to end)."""
    start = Start(run, STEP_SECONDS="1.0")  # the second takes a while to start
    start.wait_for(lambda: start.step > 0)
    second = Start(run)
    codes = second.end()
    if codes != (1,) or "is being written by" not in second.text:
        start.texts[0] += f"\nthe second writer ended with {codes}: {second.text}\n"
    start.send(signal.SIGTERM)
    return start


def one_of_two(run: Run, step: int, rng: random.Random) -> Start:
    start = up_to(run, step, rng)
    start.send(signal.SIGKILL, rng.randrange(run.processes))
    return start


def one_hangs(run: Run, step: int, rng: random.Random) -> Start:
    """One process stops without dying; when the others have ended it is killed, as its pod would be."""
    start = up_to(run, step, rng)
    hanging = rng.randrange(run.processes)
    start.send(signal.SIGSTOP, hanging)
    start.wait_for(lambda: False)  # until another has ended
    start.send(signal.SIGKILL, hanging)
    return start


def storm(**faults: Any) -> Callable[[Run, int, random.Random], Start]:
    def suffer(run: Run, step: int, rng: random.Random) -> Start:
        usual = run.gcs.faults
        start = Start(run)
        start.wait_for(lambda: start.step >= step)
        run.gcs.faults = Faults(seed=rng.randrange(1000), lost_writes=False, **faults)
        time.sleep(rng.uniform(1, 3))
        run.gcs.faults = usual
        start.wait_for(lambda: start.step >= step + 2)
        start.send(signal.SIGTERM)
        return start

    return suffer


KILLED = -signal.SIGKILL
# Of a storm in a bucket: the run comes through, or its clients give up; and then it may be told to end while it ends.
IN_A_STORM = {PREEMPTED, 1, -signal.SIGTERM}
# Name -> what happens, the fault, and exit codes that a process may end with.
KINDS: dict[str, tuple[str, Callable[[Run, int, random.Random], Start], set[int]]] = {
    "start": ("SIGKILL while it starts", at_start, {KILLED}),
    "step": ("SIGKILL in a step", in_a_step, {KILLED}),
    "save": ("SIGKILL in a save", in_a_save, {KILLED}),
    "term": ("SIGTERM", sigterm, {PREEMPTED}),
    "flip": ("bits of the newest checkpoint flipped", flipped_bits, {PREEMPTED}),
    "cut": ("a file of the newest checkpoint cut short", cut_file, {PREEMPTED}),
    "nan": ("a loss that is not a number", not_a_number, {1}),
    "disk": ("full disk", full_disk, {1}),
    "second": ("a second writer", second_writer, {PREEMPTED}),
    "one": ("SIGKILL of one process of two", one_of_two, {KILLED, 1, -signal.SIGABRT}),
    "hang": ("one process of two hangs", one_hangs, {KILLED, 1, -signal.SIGABRT}),
    "503": ("bucket: all requests answered 503 for seconds", storm(unavailable=1.0), IN_A_STORM),
    "reset": ("bucket: half of all connections reset for seconds", storm(reset=0.5), IN_A_STORM),
}


@dataclasses.dataclass
class Outcome:
    """What came of the faults of one kind in one place."""

    count: int = 0
    codes: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    repeated: int = 0
    set_aside: int = 0


def suffer(run: Run, rng: random.Random, say: Callable[[str], None]) -> tuple[dict[str, Outcome], list[str]]:
    """Disturbs a run until its faults are used up, and lets it end; what came of each kind, and what went wrong."""
    outcomes, wrong = collections.defaultdict(Outcome), []
    for number, kind in enumerate(run.faults):
        title, fault, expected = KINDS[kind]
        target = (number + 1) * (STEPS - 6) // (len(run.faults) + 1) + 1
        if run.other_mesh:
            run.settings = [f"--mesh.{axis}={size}" for axis, size in rng.choice(MESHES).items()]
        start = fault(run, target, rng)
        codes = start.end()
        saved = run.whole()
        outcome = outcomes[kind]
        outcome.count += 1
        outcome.codes.update(codes)
        outcome.repeated += max(start.step - (saved[-1] if saved else 0), 0)
        if number:  # what was damaged before is found by this start
            outcomes[run.faults[number - 1]].set_aside += start.text.count("warning: checkpoint")
        say(f"{run.name}: {title} at step {start.step} of {target}: {codes}; checkpoints {saved}")
        if not set(codes) <= expected or "did not end by itself" in start.text or "second writer ended" in start.text:
            wrong.append(f"{run.name}: {title} ended with {codes}:\n{start.text[-3000:]}")
    start = Start(run)
    codes = start.end()
    if run.faults:
        outcomes[run.faults[-1]].set_aside += start.text.count("warning: checkpoint")
    say(f"{run.name}: to its end: {codes}")
    if set(codes) != {0}:
        wrong.append(f"{run.name}: the last start ended with {codes}:\n{start.text[-3000:]}")
    return outcomes, wrong


MESHES = [{"data": 1, "fsdp": 8, "tensor": 1}, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 1, "fsdp": 4, "tensor": 2}]


def differences(run: Run, undisturbed: Run) -> list[str]:
    """In what a run differs from one that nothing happened to."""
    found, expected = run.losses(), undisturbed.losses()
    if sorted(found) != list(range(1, STEPS + 1)) or any(len(losses) != 1 for losses in found.values()):
        return [f"{run.name}: metrics.jsonl has steps {sorted(found)}, not each from 1 to {STEPS} once"]
    largest = max(abs(found[step][0] - expected[step][0]) for step in expected)
    if largest > (1e-5 if run.other_mesh else 0):
        return [f"{run.name}: losses differ by up to {largest:.3g}"]
    if not run.other_mesh and run.digests() != undisturbed.digests():
        return [f"{run.name}: weights or optimizer differ in their bits"]
    return []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    parser.add_argument("--only", nargs="+", help="runs by name; default all")
    parser.add_argument("--folder", help="where to work (default: a temporary folder)")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() if options.folder is None else nullcontext(options.folder) as folder,
        Gcs("bucket") as gcs,
    ):
        return _benchmark(Path(folder), gcs, options.seed, options.only)


def _runs(folder: Path, world: World, gcs: Gcs) -> list[Run]:
    def config_of(name: str, place: str, **more: Any) -> Path:
        inside = {"checkpoint": str(world.model), "store": str(world.token_store)}
        if place.startswith("gs://"):
            inside = {"checkpoint": "gs://bucket/model", "store": "gs://bucket/cpt"}
        config = {
            "run": place,
            "steps": STEPS,
            "init": {"checkpoint": inside["checkpoint"]},
            "data": {"store": inside["store"], "batch_size": 8},
            "precision": {"compute": "float32"},
            "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2},
            "checkpoint": {"every": EVERY, "keep": 3},
            "logging": {"every": 1},
            "watchdog": {"seconds": 40, "heartbeat_seconds": 10},
            **more,
        }
        file = folder / f"{name}.yaml"
        file.write_text(json.dumps(config))
        return file

    def run(name: str, place: str, faults: str, **more: Any) -> Run:
        here = f"gs://bucket/{name}" if place == "gs://" else str(folder / name)
        several = {"distributed": True} if more.get("processes", 1) > 1 else {}
        more |= {"gcs": gcs, "environment": environment(gcs.url) | {"IMPATIENT": "1"}} if place == "gs://" else {}
        words = f"{place}, {more.get('processes', 1)} process{'es' if several else ''}"
        return Run(name, words, here, config_of(name, here, **several), faults.split(), **more)

    return [
        run("undisturbed", "local", ""),
        run("kills", "local", "start step save step save start save step start save"),
        run("damages", "local", "term flip term cut flip term cut flip flip"),
        run("errors", "local", "nan disk second nan disk term nan disk"),
        run("meshes", "local", "step term flip save term step", other_mesh=True),
        run("undisturbed-two", "local", "", processes=2),
        run("two", "local", "one term one hang one term flip one hang", processes=2),
        run("bucket", "gs://", "step 503 save reset term flip 503 start reset cut step 503"),
    ]


def _benchmark(folder: Path, gcs: Gcs, seed: int, only: list[str] | None) -> int:
    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:5.0f} s] {text}", file=sys.stderr, flush=True)

    began = time.monotonic()
    world = make_world(folder)
    for place, name in ((world.token_store, "cpt"), (world.model, "model")):
        gcs.upload(place, f"gs://bucket/{name}")
    gcs.faults = Faults(unavailable=0.03, slow=0.03, delay_seconds=0.02, lost_writes=False)
    runs = _runs(folder, world, gcs)
    table, wrong, alone = collections.defaultdict(dict), [], {}
    for run in runs:
        if only and run.name not in only and run.faults:
            continue
        outcomes, problems = suffer(run, random.Random(f"{seed}/{run.name}"), say)
        if not run.faults:
            alone[run.processes] = run
        else:
            found = differences(run, alone[run.processes])
            say(f"{run.name}: {found or 'as the undisturbed one'}")
            problems += found
        wrong += problems
        for kind, outcome in outcomes.items():
            mesh = ", mesh changed at every start" if run.other_mesh else ""
            table[kind][run.place + mesh] = outcome
    print(_table(table))
    faults = sum(outcome.count for places in table.values() for outcome in places.values())
    print(f"\n{faults} faults of {len(table)} kinds in {time.monotonic() - began:.0f} s (seed {seed}): ", end="")
    print("every run ended as the undisturbed one" if not wrong else f"{len(wrong)} went wrong")
    print("\n".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


def _table(table: dict[str, dict[str, Outcome]]) -> str:
    heads = ("fault", "where", "times", "exit codes", "steps made again", "checkpoints set aside")
    lines = [f"| {' | '.join(heads)} |", "|---|---|---|---|---|---|"]
    for kind, places in sorted(table.items(), key=lambda item: list(KINDS).index(item[0])):
        for place, outcome in places.items():
            codes = ", ".join(f"{code} x {count}" for code, count in sorted(outcome.codes.items()))
            cells = (KINDS[kind][0], place, outcome.count, codes, outcome.repeated, outcome.set_aside)
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
