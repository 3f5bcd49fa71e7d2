"""Training steps of 70B on 64 chips of v5p, compiled ahead of time by MaxText and by us, and judged by one method.

    python -m benchmarks.maxtext --maxtext CHECKOUT --python PYTHON [--only qwen] [--output rows.json]

CHECKOUT is a source tree of MaxText, PYTHON an interpreter that can import it (docs/benchmarks-maxtext.md makes one).
Nothing is executed and no TPU is needed: libtpu compiles one program after the other, each in a process of its own, and
what it dumps is read and timed as `medllm plan` does. Prints a Markdown table.
"""

import argparse
import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from medllm_jax.config.load import load_run_config, to_plain
from medllm_jax.config.schema import ModelConfig
from medllm_jax.distributed.chips import GIB, chips_of, parse_topology
from medllm_jax.distributed.compiler_options import OPTIONS
from medllm_jax.distributed.flops import train_flops
from medllm_jax.planning.estimate import Machine, estimate
from medllm_jax.planning.hlo import parse, read_memory

CONFIG = Path(__file__).parents[1] / "configs" / "runs" / "cpt-72b-v5p-4x4x4.yaml"
TOPOLOGY = parse_topology("v5p:4x4x4")
_THEIR_TOPOLOGY = "v5p-128"  # the same slice: they count cores
_DEVICE = "TPU v5"
LENGTH = 4096
_WE = "ours qwen2.5-72b"
LLAMA2_70B = ModelConfig(
    vocab_size=32000,
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
)

# Options of the compiler are ours for v5p, and the same for both: collectives on the SparseCores, without and with a
# larger limit of on-chip memory.
_LIMIT = "xla_tpu_scoped_vmem_limit_kib"
_ALL = {name: value for name, (value, _) in OPTIONS[_DEVICE].items()}
_SPARSE_CORE = {name: value for name, value in _ALL.items() if name != _LIMIT}

_MODULE = "maxtext.trainers.pre_train.train_compile"
# For every run of theirs. A compiled program that is taken from their cache would leave no dump.
_THEIRS = (
    f"compile_topology={_THEIR_TOPOLOGY} compile_topology_num_slices=1 max_target_length={LENGTH} jax_cache_dir= "
    "run_name=ahead base_output_directory=out dataset_type=synthetic enable_checkpointing=false use_iota_embed=true"
)
# configs/tpu/v5p/llama2_70b.sh of MaxText.
_PUBLISHED = "model_name=llama2-70b remat_policy=save_dot_except_mlpwi per_device_batch_size=4 reuse_example_batch=1"
# What our `attention_mlp` keeps, by their names.
_SAME_KEPT = "remat_policy=custom " + " ".join(
    f"{name}=device" for name in ("query_proj", "key_proj", "value_proj", "context", "mlpwi_0", "mlpwi_1")
)

# Our child of `medllm plan`, with options of the compiler taken away.
_OURS = f"""
import sys
from pathlib import Path
from medllm_jax.distributed.compiler_options import OPTIONS
from medllm_jax.planning.child import main
for name in sys.argv[2:]:
    del OPTIONS["{_DEVICE}"][name]
sys.exit(main(Path(sys.argv[1])))
"""


class Run(NamedTuple):
    """A program to compile. rows: a chip, at once; options: of the compiler; settings: MaxText's, or our overrides."""

    of: str
    model: ModelConfig
    remat: str
    rows: int
    options: dict[str, Any]
    settings: str

    @property
    def name(self) -> str:
        return f"{self.of}, {self.rows} a chip, {self.remat}, {_words(self.options)}"


def runs() -> Iterator[Run]:
    """Theirs as they publish it; theirs in the shape of Qwen2.5-72B; ours."""
    qwen = load_run_config(CONFIG).model
    for options in ({}, _SPARSE_CORE, _ALL):
        yield Run("MaxText llama2-70b", LLAMA2_70B, "published", 4, options, _PUBLISHED)
    for options in (_SPARSE_CORE, _ALL):
        settings = f"{_in_their_words(qwen)} {_SAME_KEPT} per_device_batch_size=1"
        yield Run("MaxText qwen2.5-72b", qwen, "q k v attention gate up", 1, options, settings)
    rows = f"--data.batch_size {chips_of(TOPOLOGY)} --data.accumulate 1"
    shipped = load_run_config(CONFIG).remat
    for remat, options in itertools.product(("attention_mlp", shipped), (_SPARSE_CORE, _ALL)):
        words = "q k v attention gate up" if remat == "attention_mlp" else f"{remat} (shipped)"
        yield Run(_WE, qwen, words, 1, options, f"{rows} --remat {remat}")


def _in_their_words(model: ModelConfig) -> str:
    """A Qwen2 model of any shape, as settings of MaxText."""
    settings = {
        "decoder_block": "qwen2",
        "base_emb_dim": model.hidden_size,
        "base_mlp_dim": model.intermediate_size,
        "base_num_decoder_layers": model.num_hidden_layers,
        "base_num_query_heads": model.num_attention_heads,
        "base_num_kv_heads": model.num_key_value_heads,
        "head_dim": model.dim_of_head,
        "vocab_size": model.vocab_size,
        "attention_bias": True,
        "logits_via_embedding": model.tie_word_embeddings,
        "normalization_layer_epsilon": model.rms_norm_eps,
        "rope_max_timescale": round(model.rope_theta),
    }
    return "mlp_activations=['silu','linear'] " + " ".join(f"{name}={value}" for name, value in settings.items())


def _words(options: dict[str, Any]) -> str:
    if not options:
        return "the compiler's defaults"
    return "SparseCore" + (f", vmem {options[_LIMIT]}" if _LIMIT in options else "")


# --- compiling -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Usage:
    """Of one process: seconds from its start to its end, CPU seconds, peak of resident bytes."""

    seconds: float
    cpu_seconds: float
    peak: int


def compile_theirs(run: Run, folder: Path, checkout: Path, python: str) -> Usage:
    """Runs MaxText's own train_compile, whose dump goes to ``folder/train``."""
    flags = {
        "PYTHONPATH": str(checkout / "src"),
        "XLA_FLAGS": f"--xla_dump_to={folder / 'train'} --xla_dump_hlo_as_text=true",
        "LIBTPU_INIT_ARGS": " ".join(f"--{name}={str(value).lower()}" for name, value in run.options.items()),
    }
    base = checkout / "src" / "maxtext" / "configs" / "base.yml"
    return _watched([python, "-m", _MODULE, str(base), *_THEIRS.split(), *run.settings.split()], flags, folder)


def compile_ours(run: Run, folder: Path) -> Usage:
    """Runs what `medllm plan` runs, whose dump goes to ``folder/train``."""
    request = {
        "config": to_plain(load_run_config(CONFIG, run.settings.split())),
        "topology": TOPOLOGY.name,
        "slices": TOPOLOGY.slices,
        "program": "train",
        "sequence_length": LENGTH,
    }
    (folder / "request.json").write_text(json.dumps(request))
    return _watched([sys.executable, "-c", _OURS, str(folder), *(_ALL.keys() - run.options.keys())], {}, folder)


def _watched(command: Sequence[str], flags: dict[str, str], folder: Path) -> Usage:
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "TPU_STDERR_LOG_LEVEL": "3"}
    environment = os.environ | quiet | {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"} | flags
    start = time.monotonic()
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log)
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{command[0]} failed: {(folder / 'log').read_text(errors='replace')[-2000:]}")
    return Usage(time.monotonic() - start, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024)


# --- judging ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Row:
    """What a step takes on each chip: bytes of HBM; seconds by the compiler's cycles, of attention kernels by hand, and
    exposed ones of collectives; bytes taken in by collectives that run beside other work, and by those that it waits
    for, with the number of the latter; FLOPs of the program, and those that the model needs, with the seconds that
    these take at the peak."""

    name: str
    hbm: int
    hidden: float
    synchronous: float
    waited_for: int
    cycles: float
    kernels: float
    exposed: float
    flops: float
    needed: float
    ideal: float
    tokens: int
    usage: Usage

    @property
    def seconds(self) -> float:
        return self.cycles + self.kernels + self.exposed

    @property
    def cells(self) -> list[str]:
        return [
            self.name,
            f"{self.hbm / GIB:.1f}",
            f"{self.flops / self.needed:.2f}",
            f"{self.hidden / GIB:.0f} / {self.synchronous / GIB:.1f}",
            f"{self.waited_for:,}",
            f"{self.cycles:.2f} + {self.kernels:.2f} + {self.exposed:.2f}",
            f"{self.seconds:.2f}",
            f"{self.ideal / self.seconds:.1%}",
            f"{self.tokens / self.seconds:,.0f}",
            f"{self.usage.seconds:.0f} / {self.usage.cpu_seconds:.0f}",
            f"{self.usage.peak / GIB:.1f}",
        ]


HEADS = [
    "compiled",
    "HBM GiB",
    "FLOPs / needed",
    "GiB beside other work / waited for",
    "collectives waited for",
    "cycles + kernels + exposed, s",
    "step s",
    "MFU (estimate)",
    "tokens/s a chip",
    "to compile: s / CPU s",
    "peak RSS GiB",
]


def judge(run: Run, dump: Path, usage: Usage) -> Row:
    """A Row from a compiler's dump."""
    memory = read_memory(_text(dump, "buffer-assignment"), _text(dump, "memory-usage-report"))
    # One axis over the whole slice, so that it does not matter which chip comes first.
    places = [[*place, 0] for place in itertools.product(*(range(size) for size in TOPOLOGY.sizes))]
    estimated = estimate(parse(_text(dump, "after_codegen")), Machine(TOPOLOGY, {"fsdp": chips_of(TOPOLOGY)}, places))
    if "kernel" in estimated.unknown:
        raise RuntimeError(f"{run.name}: {estimated.unknown['kernel']} attention kernels were not recognised")
    needed = train_flops(run.model, run.rows, LENGTH)
    kernels = sum(seconds for (_, kind), seconds in estimated.busy.items() if kind == "kernels")
    hidden = [c for c in estimated.collectives if c.asynchronous]
    synchronous = [c for c in estimated.collectives if not c.asynchronous]
    return Row(
        name=run.name,
        hbm=memory.peak,
        hidden=sum(c.bytes * c.times for c in hidden),
        synchronous=sum(c.bytes * c.times for c in synchronous),
        waited_for=sum(c.times for c in synchronous),
        cycles=sum(estimated.busy.values()) - kernels,
        kernels=kernels,
        exposed=estimated.waits,
        flops=estimated.flops + estimated.kernel_flops,
        needed=needed,
        ideal=needed / TOPOLOGY.chip.flops,
        tokens=run.rows * LENGTH,
        usage=usage,
    )


def _text(dump: Path, kind: str) -> str:
    # Small helper programs are dumped beside the step: the largest file is the step's.
    file = max(dump.glob(f"*{kind}.txt"), key=lambda file: file.stat().st_size, default=None)
    if file is None:
        raise RuntimeError(f"the compiler left no {kind} in {dump}")
    return file.read_text(encoding="utf-8", errors="replace")


def their_versions(checkout: Path, python: str) -> str:
    """The commit of MaxText, where the checkout knows it, and the libraries that it is compiled with."""
    commit = subprocess.run(["git", "-C", checkout, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    program = "from importlib.metadata import version as v; print(*(f'{n} {v(n)}' for n in ('jax', 'libtpu', 'flax')))"
    libraries = subprocess.run([python, "-c", program], capture_output=True, text=True, check=True)
    return f"MaxText {commit.stdout.strip() or 'of an unknown commit'} with {libraries.stdout.strip()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--maxtext", type=Path, required=True, help="a source tree of MaxText")
    parser.add_argument("--python", required=True, help="an interpreter that can import it")
    parser.add_argument("--only", default="", help="a part of the names of those to compile")
    parser.add_argument("--output", type=Path, help="file for the rows as JSON")
    arguments = parser.parse_args()
    checkout = arguments.maxtext.resolve()
    if not (checkout / "src" / Path(*_MODULE.split("."))).with_suffix(".py").is_file():
        parser.error(f"--maxtext {checkout}: no source tree of MaxText: src/{_MODULE.replace('.', '/')}.py is missing")
    if (found := shutil.which(arguments.python)) is None:
        parser.error(f"--python {arguments.python}: no such program")
    python = str(Path(found).absolute())  # and not what it links to: a virtual environment is known by its own name
    ours = " ".join(f"{name} {version(name)}" for name in ("jax", "libtpu", "flax"))
    print(f"{their_versions(checkout, python)}; ours with {ours}; {TOPOLOGY.name}, rows of {LENGTH} tokens\n")
    print("| " + " | ".join(HEADS) + " |\n|---" + "|---:" * (len(HEADS) - 1) + "|", flush=True)
    rows = []
    for run in runs():
        if arguments.only not in run.name:
            continue
        with tempfile.TemporaryDirectory(prefix="medllm-maxtext-") as name:
            folder = Path(name)
            is_ours = run.of == _WE
            usage = compile_ours(run, folder) if is_ours else compile_theirs(run, folder, checkout, python)
            rows.append(judge(run, folder / "train", usage))
        print("| " + " | ".join(rows[-1].cells) + " |", flush=True)
        if arguments.output:
            arguments.output.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
