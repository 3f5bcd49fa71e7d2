"""Conversion of whole checkpoints, beside `cp` of the same bytes and beside transformers' loading and saving.

    python -m benchmarks.convert [--sizes 0.5b 3b] [--folder DIR] [--repeat 3] [--no-transformers]

Makes random bfloat16 checkpoints of the shapes in configs/model, converts each to a run folder and back, compares every
byte, and prints for each step the time, the speed as a share of that of `cp` (both in the page cache, alternating, the
best of the repetitions), and the memory that the whole process had at its peak.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from medllm_jax.settings import load_model_config
from tools.convert_hf.hf_config import config_json, json_text
from tools.convert_hf.hf_weights import INDEX
from tools.convert_hf.names import tensors_of
from tools.convert_hf.shards import index_of, shards_of, write_shard

CONFIGS = Path(__file__).parents[1] / "configs" / "model"

# A program's last line: the most memory it had, in KiB.
MEASURED = "import resource; print('PEAK', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
CONVERT = (
    f"import sys; from tools.convert_hf.__main__ import main; code = main(sys.argv[1:]); {MEASURED}; sys.exit(code)"
)
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


def measured(code: str, *arguments: object) -> tuple[float, float]:
    """Seconds that a Python program took, and its largest memory in GiB."""
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    start = time.monotonic()
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - start
    if done.returncode:
        sys.exit(f"{arguments} failed:\n{done.stdout}{done.stderr}")
    peak = next(line for line in reversed(done.stdout.splitlines()) if line.startswith("PEAK"))
    return seconds, int(peak.split()[1]) / 2**20


def copied(source: Path, target: Path) -> float:
    start = time.monotonic()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    return time.monotonic() - start


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
        "from-hf": lambda: measured(CONVERT, "from-hf", work / "hf", work / "run"),
        "to-hf": lambda: measured(CONVERT, "to-hf", work / "run", work / "out"),
    }
    if not options.no_transformers:
        steps["transformers"] = lambda: measured(TRANSFORMERS, work / "hf", work / "saved")
    best: dict[str, tuple[float, float]] = {}
    for _ in range(options.repeat):
        for name in ("run", "out", "saved"):
            shutil.rmtree(work / name, ignore_errors=True)
        for name, step in steps.items():
            shutil.rmtree(work / "copy", ignore_errors=True)
            os.sync()
            best["cp"] = min(best.get("cp", (1e9, 0.0)), (copied(work / "hf", work / "copy"), 0.0))
            shutil.rmtree(work / "copy")
            os.sync()
            seconds, peak = step()
            before = best.get(name, (1e9, 0.0))
            best[name] = (min(before[0], seconds), max(before[1], peak))
    same = subprocess.run(
        [sys.executable, "-m", "tools.convert_hf", "verify", work / "hf", work / "out", "--by", "hash"],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    print(f"{size}: {total / 1e9:.2f} GB; every byte equal after both: {same.returncode == 0}")
    print(f"  {'':<14}{'seconds':>9}{'GB/s':>8}{'of cp':>8}{'peak, GiB':>11}")
    for name, (seconds, peak) in best.items():
        shown = f"{peak:>11.2f}" if peak else f"{'':>11}"
        print(f"  {name:<14}{seconds:>9.1f}{total / seconds / 1e9:>8.2f}{best['cp'][0] / seconds:>8.2f}{shown}")
    print(json.dumps({"size": size, "bytes": total, "best": best}), flush=True)


if __name__ == "__main__":
    main()
