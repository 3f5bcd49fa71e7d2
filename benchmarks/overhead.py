"""What saving and logging cost the steps of a run: configs/runs/cpt-tiny.yaml, 500 steps on the CPU.

    python -m benchmarks.overhead [--steps 500] [--every 50 500]

Trains once for each interval of checkpoints, and once bare: no checkpoint but the last and metrics fetched once, at the
end. Prints for each the time a step took, and the share of all steps' time in which the loop stood still for metrics
and for saves, without what it would have waited for the device anyway. What threads do meanwhile takes time from the
steps on a CPU, whose cores they share, and shows in the time a step took; beside a TPU it takes none.
"""

import argparse
import contextlib
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"}

import jax
import numpy as np

import medllm_jax.training.loop as training
from benchmarks.data_corpus import write_corpus
from medllm_jax.checkpoint.orbax import CheckpointWriter
from medllm_jax.config.load import load_run_config
from medllm_jax.data.prepare.corpus import Corpus, Recipe, prepare_corpus
from medllm_jax.observability.metrics import Meter
from tests.tiny import make_tokenizer

_CONFIG = Path(__file__).parents[1] / "configs" / "runs" / "cpt-tiny.yaml"


class Clock:
    """Seconds that the loop spent in some calls, the first step apart."""

    def __init__(self):
        self.seconds = {"metrics": 0.0, "saves": 0.0, "device": 0.0}
        self.ends: list[float] = []

    @contextlib.contextmanager
    def of(self, what: str):
        began, device = time.perf_counter(), self.seconds["device"]
        yield
        if len(self.ends) > 1:
            waited = self.seconds["device"] - device if what != "device" else 0.0
            self.seconds[what] += time.perf_counter() - began - waited


def measured(clock: Clock) -> contextlib.ExitStack:
    """Puts the clock into the loop."""
    stack = contextlib.ExitStack()

    def wrap(owner: type, name: str, what: str, *, ends_step: bool = False) -> None:
        original = getattr(owner, name)

        def timed(self, *arguments, **more):
            if ends_step:
                clock.ends.append(time.perf_counter())
            with clock.of(what):
                return original(self, *arguments, **more)

        setattr(owner, name, timed)
        stack.callback(setattr, owner, name, original)

    def wait(meter: Meter, *_) -> None:
        with clock.of("device"):
            jax.block_until_ready([metrics for _, metrics in meter._pending])

    original = Meter.take
    Meter.take = lambda self, *arguments: [wait(self), original(self, *arguments)][1]
    stack.callback(setattr, Meter, "take", original)
    wrap(training.Progress, "add", "metrics", ends_step=True)
    wrap(training.Progress, "settle", "metrics")
    wrap(CheckpointWriter, "save", "saves")
    return stack


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--every", type=int, nargs="+", default=[50, 500], help="steps between checkpoints")
    options = parser.parse_args()
    print("| checkpoint every | logging every | ms a step (median) | ms a step (mean) | metrics % | saves % | both % |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        store = _store(Path(folder))
        for every, logging in [(options.steps + 1, options.steps), *((every, 10) for every in options.every)]:
            settings = {"run": f"{folder}/run-{every}", "data.store": store, "steps": options.steps}
            settings |= {"checkpoint.every": every, "logging.every": logging}
            config = load_run_config(_CONFIG, [f"--{name}={value}" for name, value in settings.items()])
            clock = Clock()
            with measured(clock), contextlib.redirect_stdout(sys.stderr):
                training.train(config)
            times = np.diff(clock.ends[1:])
            share = {what: 100 * seconds / times.sum() for what, seconds in clock.seconds.items()}
            both = share["metrics"] + share["saves"]
            cells = (f"{1000 * np.median(times):.1f}", f"{1000 * times.mean():.1f}")
            shares = (f"{share['metrics']:.2f}", f"{share['saves']:.2f}", f"{both:.2f}")
            print(f"| {every} | {logging} | {' | '.join(cells + shares)} |", flush=True)
    return 0


def _store(folder: Path) -> Path:
    corpus, tokenizer = write_corpus(folder / "corpus", 1), folder / "tokenizer"
    make_tokenizer(tokenizer)
    with contextlib.redirect_stdout(sys.stderr):
        prepare_corpus([Corpus("corpus", str(corpus))], tokenizer, folder / "store", Recipe(sequence_length=256))
    return folder / "store"


if __name__ == "__main__":
    sys.exit(main())
