"""Preference training: our step beside TRL's and Tunix's trainers, on the same weights, pairs and cores, in float32.

    python -m benchmarks.rpo [--quick] [--rounds 2] [--tunix PYTHON] [--json FILE]

Prints Markdown tables. Every contender runs in a process of its own, and they take turns; the better of the rounds is
what to read. `--tunix` is an interpreter that can import Tunix, whose packages don't go together with ours. Needs trl
and `pip install 'medllm_jax[bench,hf]'`.
"""

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from string import ascii_lowercase
from typing import Any, NamedTuple

import numpy as np

from benchmarks.data import in_turns

_ROOT = Path(__file__).parents[1]
# A quarter of the weights is the embedding, as in Qwen2.5-0.5B.
_SHAPE = {"vocab": 4096, "hidden": 256, "layers": 4, "heads": (8, 2), "intermediate_size": 704}
_BATCH = 8  # pairs of a step
# torch's threads otherwise burn the cores that they wait for, and on a busy machine its CPU seconds double.
_FAIR = {"OMP_WAIT_POLICY": "passive"}
_EOS, _SPACE = "<|endoftext|>", "Ġ"  # the latter as byte-level vocabularies spell it


class Regime(NamedTuple):
    """Pairs of one kind: tokens of a prompt and of a response with its end.

    spread: lengths vary from that share of it up. goal: our speed, in units of TRL's.
    """

    prompt: int
    response: int
    spread: float = 1.0
    goal: float | None = None

    @property
    def pair(self) -> int:
        return self.prompt + 2 * self.response


REGIMES = {
    "1:1": Regime(128, 128, goal=2.0),
    "4:1": Regime(512, 128, goal=3.0),
    "1:1, lengths vary": Regime(128, 128, spread=0.25),
}


# --- the work --------------------------------------------------------------------------------------------------------


def make_model(folder: Path) -> tuple[Path, Path]:
    """A random Qwen2 in Hugging Face's format with a tokenizer, and the same as a run folder."""
    from medllm_jax.conversion.from_hf import from_hf
    from tests.tiny_hf import make_hf_folder

    theirs, ours = folder / "hf", folder / "run"
    make_hf_folder(theirs, tied=True, tokenizer=False, max_position_embeddings=4096, **_SHAPE)
    _make_tokenizer(theirs)
    from_hf(str(theirs), str(ours))
    return theirs, ours


def _make_tokenizer(folder: Path) -> None:
    """Byte-level BPE whose merges are of a space and a letter: what stands between two spaces is a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    merges = [(_SPACE, letter) for letter in ascii_lowercase]
    tokens = [_EOS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    bpe = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=_EOS, pad_token=_EOS).save_pretrained(folder)


def write_pairs(file: Path, regime: Regime, pairs: int) -> None:
    """Pairs of random letters as JSON lines."""
    rng = np.random.default_rng(0)

    def text(tokens: int) -> str:
        return "".join(f" {letter}" for letter in rng.choice(list(ascii_lowercase), tokens))

    def length(longest: int) -> int:
        return round(longest * rng.uniform(regime.spread, 1.0))

    with file.open("w") as stream:
        for _ in range(pairs):
            row = {"prompt": text(length(regime.prompt))}
            row |= {side: text(length(regime.response) - 1) for side in ("chosen", "rejected")}  # and its end
            stream.write(json.dumps(row) + "\n")


# --- processes -------------------------------------------------------------------------------------------------------


def run(name: str, python: str = sys.executable, **arguments: Any) -> dict[str, Any]:
    """Runs a contender; returns what it says, and the peak of its resident bytes."""
    command = [python, "-m", "benchmarks.rpo_contenders", name, json.dumps(arguments)]
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, cwd=_ROOT, stdout=output, stderr=errors, env=os.environ | _FAIR)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        if process.returncode:
            errors.seek(0)
            sys.exit(f"{name} failed:\n{errors.read().decode(errors='replace')[-2000:]}")
        return json.loads(output.read().splitlines()[-1]) | {"peak": usage.ru_maxrss * 1024}


# --- what is measured ------------------------------------------------------------------------------------------------


def speed(folder: Path, regime: Regime, warm_up: int, steps: int, rounds: int, tunix: str | None) -> dict[str, Any]:
    """Runs of all contenders on pairs of one kind, by name."""
    from medllm_jax.data.prepare.preference_pairs import prepare_pairs

    model, start = folder / "hf", folder / "run"
    work = folder / f"{regime.prompt}-{regime.response}-{regime.spread}"
    work.mkdir()
    pairs, numbers = work / "pairs.jsonl", itertools.count()
    write_pairs(pairs, regime, (warm_up + steps) * _BATCH)
    common = {"warm_up": warm_up, "steps": steps}

    def ours(pairs_a_row: int, prompts: str = "shared") -> Callable[[], dict[str, Any]]:
        store = str(work / f"store-{pairs_a_row}-{prompts}")
        length = pairs_a_row * (regime.pair if prompts == "shared" else 2 * (regime.prompt + regime.response))
        prepare_pairs([str(pairs)], model, store, length, prompts=prompts)
        arguments = {"run": str(start), "store": store, "rows": _BATCH // pairs_a_row}
        scored = run("reference", **arguments)
        return lambda: run("ours", **arguments, **common) | {"reference": scored["seconds"]}

    def trl(cached: bool) -> Callable[[], dict[str, Any]]:
        arguments = {"model": str(model), "pairs": str(pairs), "batch": _BATCH, "cached": cached}
        return lambda: run("trl", **arguments, **common, output=str(work / f"trl-{next(numbers)}"))

    if regime.spread == 1:
        contenders = {"ours": ours(1), "ours, prompts repeated": ours(1, "repeated")}
    else:  # packing is for lengths that vary
        contenders = {f"ours, rows of {n * regime.pair} tokens": ours(n) for n in (1, 2, 4)}
    contenders |= {"TRL, reference in the step": trl(False), "TRL, reference precomputed": trl(True)}
    if tunix:
        lengths = (regime.prompt, regime.response)
        arguments = {"model": str(model), "pairs": str(pairs), "batch": _BATCH, "lengths": lengths}
        contenders["Tunix, DPO without NLL"] = lambda: run("tunix", tunix, **arguments, **common)
    return in_turns(contenders, rounds)


def compiled(folder: Path, regime: Regime) -> dict[str, Any]:
    """GFLOPs a pair: shared and cached, as we train; and what it would be otherwise."""
    from medllm_jax.data.prepare.preference_pairs import prepare_pairs

    store = folder / f"flops-{regime.prompt}"
    pairs = folder / f"flops-{regime.prompt}.jsonl"
    write_pairs(pairs, regime, 1)
    prepare_pairs([str(pairs)], folder / "hf", store, regime.pair)
    layouts = {
        "shared": (_BATCH, regime.pair, 1),
        "repeated": (2 * _BATCH, regime.prompt + regime.response, 1),
    }
    found = run("flops", run=str(folder / "run"), store=str(store), layouts=layouts)
    shared, repeated = ({kind: value / _BATCH for kind, value in found[name].items()} for name in layouts)
    return {
        "shared prompt, cached reference (ours)": shared["step"],
        "shared prompt, reference in the step": shared["step"] + shared["score"],
        "repeated prompt, cached reference": repeated["step"],
        "repeated prompt, reference in the step": repeated["step"] + repeated["score"],
    }


# --- the program -----------------------------------------------------------------------------------------------------


def _table(head: Sequence[str], rows: Iterator[Sequence[str]]) -> str:
    """Markdown; all columns but the first hold numbers."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


_HEAD = ("", "pairs/s", "times ours", "CPU s a pair", "times ours", "s a step", "pairs a step", "loss", "peak MB")


def _speed_rows(best: dict[str, Any]) -> Iterator[Sequence[str]]:
    ours = [run for name, run in best.items() if name.startswith("ours")]
    for name, run in best.items():
        leads = [f"{run[key] / min(one[key] for one in ours):.2f}" for key in ("seconds", "cpu")]
        loss = f"{run['loss']:.3f}" if "loss" in run else ""
        yield (
            name,
            f"{1 / run['seconds']:.2f}",
            leads[0],
            f"{run['cpu']:.3f}",
            leads[1],
            f"{run['step']:.3f}",
            f"{run['pairs']:.1f}",
            loss,
            f"{run['peak'] / 1e6:,.0f}",
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few steps, one round")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--regimes", nargs="+", choices=REGIMES, default=list(REGIMES), help="default all")
    parser.add_argument("--tunix", metavar="PYTHON", help="an interpreter that can import Tunix (default: left out)")
    parser.add_argument("--json", type=Path, help="a file for all that was measured")
    options = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    warm_up, steps = (2, 4) if options.quick else (2, 8)
    rounds = options.rounds or (1 if options.quick else 2)
    packages = ("jax", "torch", "transformers", "trl", "accelerate")
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    print(f"{os.cpu_count()} cores, {platform.machine()}; Python {platform.python_version()}, {versions}")
    print(f"load averages at the start: {', '.join(f'{load:.1f}' for load in os.getloadavg())}")
    if not options.tunix:
        print("Tunix is left out: its packages don't go together with ours, so --tunix has to name an interpreter")

    measured: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_model(folder)
        for name in options.regimes:
            regime = REGIMES[name]
            best = speed(folder, regime, warm_up, steps, rounds, options.tunix)
            measured[name] = {"speed": best}
            print(f"\n### {name}: prompts of {regime.prompt} tokens, responses of {regime.response}\n")
            print(_table(_HEAD, _speed_rows(best)), flush=True)
            if regime.goal:
                print(f"\nGoal: {regime.goal:g} times TRL's pairs/s.")
            if regime.spread == 1:
                measured[name]["gflops"] = found = compiled(folder, regime)
                least = min(found.values())
                rows = ((kind, f"{value:.2f}", f"{value / least:.2f}") for kind, value in found.items())
                print("\n" + _table(("compiled step", "GFLOPs a pair", "times ours"), rows), flush=True)
    if options.json:
        options.json.write_text(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
