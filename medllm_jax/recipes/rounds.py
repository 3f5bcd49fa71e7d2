"""`medllm rounds`: Iterative RPO (arXiv 2404.19733): sample, grade, pair, cache the reference, train, examine, again.

Round t starts from the model of round t - 1 and refers to it, and learns from that model's own answers. Everything of
a round is in its folder.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from etils import epath

from medllm_jax.config.load import load_run_config, to_plain
from medllm_jax.config.schema import RunConfig, renamed
from medllm_jax.config.schema_reader import build, read_yaml, rename_old_keys
from medllm_jax.config.shipped import find_config
from medllm_jax.errors import UserError
from medllm_jax.evaluation.sampling import SamplingParams
from medllm_jax.ranges import BatchSize, PairsPerPrompt, Range, Ranged, Samples, Seed, SequenceLength, Temperature, TopP
from medllm_jax.recipes.commands import Runner, Score, heading, read_scores
from medllm_jax.storage import lease
from medllm_jax.storage.json_files import read_json
from medllm_jax.storage.remote import names_in, write_whole
from medllm_jax.storage.run_folder import recorded_config
from medllm_jax.terminal.tables import markdown


@dataclasses.dataclass(frozen=True)
class RoundsConfig(Ranged):
    """Rounds of RPO.

    Attributes:
        folder: of all rounds, local or gs://
        start: run folder of the model that the first round starts from, and refers to: the CPT model
        train: run config of a round's training, beside this file; its run, init.checkpoint and data.store are set here
        questions: exam whose answers pairs are made of
        held_out: exam that decides when to stop; none of its questions may be among the others
        rounds: the most rounds
        template: prompt template, name or YAML file beside this one
        conditions: prompts to put the questions with
        samples: completions of each prompt
        temperature: of the samples; a number, or one for each round
        top_p: of the samples
        seed: of the samples
        strategy: what is preferred over a wrong sample (see `medllm pairs`)
        max_pairs_per_prompt: more pairs of one prompt are left out
        sequence_length: tokens of a row of pairs; longer pairs are left out and counted
        batch_size: prompts completed at a time
    """

    folder: str
    start: str
    train: str
    questions: str
    held_out: str
    rounds: Annotated[int, Range(1, 1000)] = 3
    template: str = "igakuqa"
    conditions: tuple[str, ...] = ("answer_only", "explain")
    samples: Samples = 8
    temperature: Temperature | tuple[Temperature, ...] = 0.8
    top_p: TopP = 1.0
    seed: Seed = 0
    strategy: Literal["gold", "onpolicy", "both"] = "both"
    max_pairs_per_prompt: PairsPerPrompt = dataclasses.field(default=10, metadata=renamed("most", {}))
    sequence_length: SequenceLength = 4096
    batch_size: BatchSize = 8

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.temperature, float) and len(self.temperature) < self.rounds:
            raise UserError(f"temperature has {len(self.temperature)} numbers and there are {self.rounds} rounds")
        # What can't be sampled or paired is known now, and not after the start has been examined.
        for number in range(1, self.rounds + 1):
            drawn = {"temperature": self.temperature_of(number), "top_p": self.top_p, "seed": self.seed + number}
            SamplingParams(n=self.samples, **drawn)

    def temperature_of(self, number: int) -> float:
        return self.temperature if isinstance(self.temperature, float) else self.temperature[number - 1]


def load_rounds_config(path: str) -> RoundsConfig:
    """A RoundsConfig from a YAML file, or by the name of a shipped one.

    The files that it names by relative paths are beside it; `train` may also be the name of a shipped config.
    """
    file = find_config(path, "rounds")
    config = build(RoundsConfig, read_yaml(file), where=path)
    beside = file.parent
    files = {"train": str(find_config(config.train, "runs", folder=beside))}
    if config.template.endswith((".yaml", ".yml")):
        files["template"] = str(beside / config.template)
    return dataclasses.replace(config, **files)


def run_rounds(config: RoundsConfig, medllm: Runner) -> epath.Path:
    """Makes the rounds that are not made yet, until the held-out accuracy no longer rises; returns the table's file.

    UserError where the folder holds rounds of other settings.
    """
    folder = epath.Path(config.folder)
    train = load_run_config(config.train)
    if train.objective.name != "rpo":
        raise UserError(f"{config.train}: objective.name is {train.objective.name}: rounds are of rpo")
    with lease.Lease(folder):
        return _make_rounds(folder, config, train, medllm)


def _make_rounds(folder: epath.Path, config: RoundsConfig, train: RunConfig, medllm: Runner) -> epath.Path:
    _open_folder(folder, config, train)
    results = [_examine(medllm, config, folder / "round-0", config.start)]
    for number in range(1, config.rounds + 1):
        heading(f"Round {number}")
        before = config.start if number == 1 else str(folder / f"round-{number - 1}" / "run")
        if not _make_pairs(medllm, config, folder / f"round-{number}", before, number):
            heading("No pair: the model's answers to a question are all right, or all wrong")
            break
        _train(medllm, config, folder / f"round-{number}", before)
        results.append(_examine(medllm, config, folder / f"round-{number}", str(folder / f"round-{number}" / "run")))
        table = _write_table(folder, config.conditions, results)
        if _mean(results[-1]) <= max(map(_mean, results[:-1])):
            heading(f"The held-out accuracy no longer rises: round {_best(results)} is the best")
            break
    table = _write_table(folder, config.conditions, results)
    print(f"\n{table.read_text()}\n{table}")
    return table


def _open_folder(folder: epath.Path, config: RoundsConfig, train: RunConfig) -> None:
    settings = json.loads(json.dumps({"rounds": to_plain(config), "train": to_plain(train)}))
    # More rounds may follow, and the temperature of one that is to come may be added.
    for name in ("folder", "rounds", "temperature", "train", "template", "batch_size"):
        del settings["rounds"][name]
    marker = folder / "rounds.json"
    if not marker.exists():
        if names_in(folder) - {lease.FILE}:
            raise UserError(f"{folder} is not empty and holds no rounds: choose another folder")
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(marker, json.dumps(settings, indent=2))
        return
    found = _current(read_json(marker), str(marker))
    if found != settings:
        section = next(section for section in settings if found[section] != settings[section])
        was, now = found[section], settings[section]
        name = next(name for name in sorted(was.keys() | now.keys()) if was.get(name) != now.get(name))
        raise UserError(f"{folder} holds rounds of another {section} {name}: set it back, or choose another folder")


def _current(recorded: dict[str, Any], where: str) -> dict[str, Any]:
    """Recorded settings as today's names have them, with the defaults of settings that are newer than the record."""
    if not isinstance(recorded.get("rounds"), dict):
        raise UserError(f"{where} has no settings of rounds: it is damaged; choose another folder")
    train = build(RunConfig, recorded.get("train"), where)
    return json.loads(
        json.dumps({"rounds": rename_old_keys(RoundsConfig, recorded["rounds"]), "train": to_plain(train)})
    )


# --- the stages of a round -------------------------------------------------------------------------------------------


def _make_pairs(medllm: Runner, config: RoundsConfig, place: epath.Path, model: str, number: int) -> bool:
    """Samples, grades and pairs; whether there are pairs."""
    rows, report = place / "pairs.jsonl", place / "pairs.jsonl.report.json"
    if not rows.exists():
        drawn = ("--samples", config.samples, "--temperature", config.temperature_of(number), "--top-p", config.top_p)
        pairing = ("--strategy", config.strategy, "--max-pairs-per-prompt", config.max_pairs_per_prompt)
        judged = ("--evaluation-exam", config.held_out)
        try:
            medllm(
                *("pairs", "--run", model, "--exam", config.questions, *_prompts(config), *drawn, *pairing, *judged),
                *("--seed", config.seed + number, "--output", rows),
            )
        except UserError:
            if report.exists() and _has_no_pairs(report):
                return False
            raise
    if not (place / "store" / "store.json").exists():
        tokenizer = epath.Path(model) / "tokenizer"
        length = ("--sequence-length", config.sequence_length, "--on-long", "skip")
        # A model makes up telephone numbers that are nobody's: they are masked and counted, and no round ends by them.
        place_of = ("--input", rows, "--tokenizer", tokenizer, "--output", place / "store")
        medllm("data", "pairs", *place_of, *length, "--pii", "mask")
    return True


def _has_no_pairs(report: epath.Path) -> bool:
    prompts = read_json(report).get("prompts")
    if not isinstance(prompts, dict):
        raise UserError(f"{report} does not count prompts: it is damaged; remove it, and the pairs are made again")
    return not prompts.get("with pairs")


def _train(medllm: Runner, config: RoundsConfig, place: epath.Path, before: str) -> None:
    paths = ("--run", place / "run", "--init.checkpoint", before, "--data.store", place / "store")
    run = ("--config", config.train, *paths)
    # A run that has begun has read its references, of held-out pairs too; before that, they may be half written.
    if load_run_config(config.train).objective.reference == "cached" and recorded_config(place / "run") is None:
        medllm("reference", *run)
    medllm("train", *run)


def _examine(medllm: Runner, config: RoundsConfig, place: epath.Path, model: str) -> dict[str, Score]:
    """The held-out scores of a model, by condition."""
    output = place / "evaluation"
    if not (output / "scores.json").exists():
        medllm("evaluate", "--run", model, "--exam", config.held_out, *_prompts(config), "--output", output)
    return read_scores(output, config.conditions)


def _prompts(config: RoundsConfig) -> tuple[Any, ...]:
    return ("--template", config.template, "--conditions", *config.conditions, "--batch-size", config.batch_size)


# --- what came of it -------------------------------------------------------------------------------------------------


def _mean(result: dict[str, Score]) -> float:
    return sum(score.accuracy for score in result.values()) / len(result)


def _best(results: Sequence[dict[str, Score]]) -> int:
    return max(range(len(results)), key=lambda number: _mean(results[number]))


def _write_table(folder: epath.Path, conditions: Sequence[str], results: Sequence[dict[str, Score]]) -> epath.Path:
    rows = [["round", *conditions, "mean", ""]]
    for number, result in enumerate(results):
        scores = [f"{result[condition].accuracy:.3f}" for condition in conditions]
        mark = "best" if number == _best(results) else ""
        rows.append([str(number or "start"), *scores, f"{_mean(result):.3f}", mark])
    write_whole(folder / "table.md", markdown(rows, numbers=False))
    return folder / "table.md"
