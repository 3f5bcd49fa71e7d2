"""Conversion of whole checkpoints, beside `cp` of the same bytes and beside transformers' loading and saving.

    python -m benchmarks.convert [--sizes 0.5b 3b] [--folder DIR] [--repeat 3] [--no-transformers]

Makes random bfloat16 checkpoints of the shapes in configs/model, converts each to a run folder and back, and compares
every byte. Prints for each step the best time, the median of the processors' time, the median of its speed as a share
of that of the `cp` just before it (both in the page cache), the best time as a share of the best `cp`, the median of
`cp`'s processor time as a share of its own, and the most memory that the whole process had. Beside them stands one
core's time for the sha256 of the files, which `SHA256SUMS` lists and no copy computes.
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from medllm_jax.config.load import load_model_config
from medllm_jax.conversion.hf_config import config_json, json_text
from medllm_jax.conversion.hf_weights import INDEX
from medllm_jax.conversion.names import tensors_of
from medllm_jax.conversion.shards import index_of, shards_of, write_shard

CONFIGS = Path(__file__).parents[1] / "configs" / "model"

# A program's last line: the most memory it had, in KiB. (What getrusage says is never below what its parent had.)
MEASURED = "print('PEAK', *(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
CONVERT = f"import sys; from medllm_jax.cli.convert import main; code = main(sys.argv[1:]); {MEASURED}; sys.exit(code)"
TRANSFORMERS = f"""
import sys, torch
from transformers import Qwen2ForCausalLM
Qwen2ForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).save_pretrained(sys.argv[2], max_shard_size="5GB")
{MEASURED}
"""


def make_checkpoint(size: str, folder: Path) -> int:
    """A random checkpoint of a shape in configs/model; its bytes."""
    import ml_dtypes
    from etils import epath

    config = load_model_config(CONFIGS / f"qwen2.5-{size}.yaml")
    dtype = np.dtype(ml_dtypes.bfloat16)
    pool = np.random.default_rng(0).normal(scale=0.02, size=1 << 24).astype(dtype)
    folder.mkdir(parents=True)
    tensors = tensors_of(config)
    shards = shards_of(tensors, dtype, 5 * 10**9)

    def pieces(shard):
        for number, tensor in enumerate(shard.tensors):
            left, start = int(np.prod(tensor.shape)), 7919 * number % len(pool)
            while left:
                piece = pool[start : start + left]
                yield piece
                left, start = left - len(piece), 0

    for shard in shards:
        write_shard(epath.Path(folder), shard, pieces(shard))
    (folder / "config.json").write_text(json_text(config_json(config, dtype.name, {})))
    index = index_of(shards, dtype)
    if index is not None:
        (folder / INDEX).write_text(json_text(index))
    return sum(int(np.prod(tensor.shape)) for tensor in tensors) * dtype.itemsize


class Cost(NamedTuple):
    """Seconds on the clock, seconds of all processors, and the largest memory in GiB, where it was measured."""

    seconds: float
    cpu: float
    peak: float = 0.0


def measured(code: str, *arguments: object) -> Cost:
    """What a Python program took."""
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done: subprocess.CompletedProcess[str] | None = None

    def run() -> None:
        nonlocal done
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)

    cost = timed(run)
    assert done is not None
    if done.returncode:
        sys.exit(f"{arguments} failed:\n{done.stdout}{done.stderr}")
    peak = next(line for line in reversed(done.stdout.splitlines()) if line.startswith("PEAK"))
    return cost._replace(peak=int(peak.split()[1]) / 2**20)


def timed(work: Callable[[], object]) -> Cost:
    """What a call took, of this process and of those that it waited for."""
    start, before = time.monotonic(), sum(os.times()[:4])
    work()
    return Cost(time.monotonic() - start, sum(os.times()[:4]) - before)


def copied(source: Path, target: Path) -> Cost:
    return timed(lambda: subprocess.run(["cp", "-r", str(source), str(target)], check=True))


def hashed(folder: Path) -> Cost:
    def work() -> None:
        for file in sorted(folder.glob("*.safetensors")):
            with file.open("rb", buffering=0) as opened:
                hashlib.file_digest(opened, "sha256")

    return timed(work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["0.5b", "3b"], help="names in configs/model (0.5b 3b)")
    parser.add_argument("--folder", help="where to work; six times the checkpoint's size is needed")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--no-transformers", action="store_true")
    options = parser.parse_args()
    for size in options.sizes:
        with tempfile.TemporaryDirectory(dir=options.folder) as work:
            _compare(size, Path(work), options)


def _compare(size: str, work: Path, options: argparse.Namespace) -> None:
    total = make_checkpoint(size, work / "hf")
    steps = {
        "sha256": lambda: hashed(work / "hf"),
        "from-hf": lambda: measured(CONVERT, "from-hf", work / "hf", work / "run"),
        "to-hf": lambda: measured(CONVERT, "to-hf", work / "run", work / "out"),
    }
    if not options.no_transformers:
        steps["transformers"] = lambda: measured(TRANSFORMERS, work / "hf", work / "saved")
    copies: dict[str, list[Cost]] = {}
    costs: dict[str, list[Cost]] = {}
    for _ in range(options.repeat):
        for name in ("run", "out", "saved"):
            shutil.rmtree(work / name, ignore_errors=True)
        for name, step in steps.items():
            os.sync()
            copies.setdefault(name, []).append(copied(work / "hf", work / "copy"))
            shutil.rmtree(work / "copy")
            os.sync()
            costs.setdefault(name, []).append(step())
    same = subprocess.run(
        [sys.executable, "-m", "tools.convert_hf", "verify", work / "hf", work / "out", "--by", "hash"],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    print(f"{size}: {total / 1e9:.2f} GB; every byte equal after both: {same.returncode == 0}")
    copies_of_all = [cost for each in copies.values() for cost in each]
    best = min(cost.seconds for cost in copies_of_all)
    _print("", "seconds", "GB/s", "CPU-s", "of cp, median", "of cp, best", "CPU of cp", "peak, GiB")
    cpu = statistics.median(cost.cpu for cost in copies_of_all)
    _print("cp", f"{best:.1f}", f"{total / best / 1e9:.2f}", f"{cpu:.1f}", "1.00", "1.00", "1.00", "")
    for name, taken in costs.items():
        pairs = list(zip(copies[name], taken, strict=True))
        fastest, peak = min(cost.seconds for cost in taken), max(cost.peak for cost in taken)
        _print(
            name,
            f"{fastest:.1f}",
            f"{total / fastest / 1e9:.2f}",
            f"{statistics.median(cost.cpu for cost in taken):.1f}",
            f"{statistics.median(copy.seconds / step.seconds for copy, step in pairs):.2f}",
            f"{best / fastest:.2f}",
            f"{statistics.median(copy.cpu / step.cpu for copy, step in pairs):.2f}",
            f"{peak:.2f}" if peak else "",
        )
    print(json.dumps({"size": size, "bytes": total, "costs": costs, "cp": copies}), flush=True)


def _print(name: str, *cells: str) -> None:
    print(f"  {name:<14}" + "".join(f"{cell:>15}" for cell in cells))


if __name__ == "__main__":
    main()
