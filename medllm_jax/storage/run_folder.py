"""A run is a folder, local or gs://.

config.yaml     the resolved config          metrics.jsonl   every step's numbers
checkpoints/    model, optimizer, position   tensorboard/    the same numbers as events
tokenizer/      the model's tokenizer, carried from checkpoint to checkpoint and into the export
sessions.jsonl  each start of the run        skipped.jsonl   steps that changed nothing, and their rows
logs/           what each process did        crashes/        how it failed, if it did
profile/        traces for xprof             damaged/        checkpoints that did not hold what was written
writer.json     which program writes now
*.damaged-N     what could not be read of metrics.jsonl or sessions.jsonl, as it was
"""

import math
from typing import Any, Literal

from etils import epath

from medllm_jax.config.load import to_plain, to_yaml
from medllm_jax.config.schema import RunConfig
from medllm_jax.config.schema_reader import build, metadata_along, read_yaml
from medllm_jax.errors import UserError
from medllm_jax.storage.json_lines import AppendedRows, read_appended_rows
from medllm_jax.storage.remote import is_there, move_folder, names_in, remove_folder, write_whole

METRICS = "metrics.jsonl"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    # What must be passed on with a model stands with its tokenizer, and goes where that goes.
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
)

# Where a tokenizer is before it is whole. In a bucket its files are moved one by one: as long as one is left here, what
# stands in its place is not all.
_UNFINISHED_TOKENIZER = ".tokenizer.tmp"
_BEFORE_A_RUN = ("writer.json", "crashes")  # what a start leaves that died before there was a run
_UNFINISHED_CONFIG = ".config.yaml."  # how the name of one begins that was not written to its end


def open_run(config: RunConfig, *, force: bool = False) -> tuple[epath.Path, dict[str, Any]]:
    """The folder of a new run, or of one that goes on, and what was changed by force: setting -> what it was and is.

    UserError if the folder holds something else, or a run whose config differs in what it computes; by force it may,
    but for what the checkpoints hold. A run that was started and has no checkpoint is a new one, whatever its config.
    """
    folder = epath.Path(config.run)
    recorded = begun_config(folder)
    if recorded is not None:
        return folder, _check_same_run(config, recorded, folder, force)
    if recorded_config(folder) is None and not all(
        name.startswith(_UNFINISHED_CONFIG) or name in _BEFORE_A_RUN for name in names_in(folder)
    ):
        raise UserError(f"run folder {folder} is not empty and holds no run: choose another folder, or empty this one")
    return folder, {}


def recorded_config(run: str | epath.Path) -> RunConfig | None:
    """The config that a run folder was started with, or None."""
    file = epath.Path(run) / "config.yaml"
    return build(RunConfig, read_yaml(file), where=str(file)) if is_there(file) else None


def begun_config(run: str | epath.Path) -> RunConfig | None:
    """The config of a run that has a checkpoint, whole or not, and so goes on; None for one that begins at step 0."""
    steps = names_in(epath.Path(run) / "checkpoints")
    return recorded_config(run) if any(name.isascii() and name.isdigit() for name in steps) else None


def record_config(folder: epath.Path, config: RunConfig, *, start: int = 0, changed: bool = False) -> None:
    """Writes config.yaml of a run that begins; that of a run that goes on stays as it was first written.

    start: step that it goes on from. changed: another config holds from then on; the one before is kept under that
    number.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "config.yaml"
    if changed:
        write_whole(folder / f"config-until-{start}.yaml", file.read_text())
    if changed or start == 0 or not file.exists():
        write_whole(file, to_yaml(config))


def _check_same_run(config: RunConfig, recorded: RunConfig, folder: epath.Path, force: bool) -> dict[str, Any]:
    before, now = _flat(to_plain(recorded)), _flat(to_plain(config))
    keys = sorted(before.keys() | now.keys())
    changed = {key: [before.get(key), now.get(key)] for key in keys if before.get(key) != now.get(key)}
    rules = {key: on_resume(key, config) for key in changed}
    changed = {key: values for key, values in changed.items() if rules[key] != "free"}
    refused = {key: values for key, values in changed.items() if not force or rules[key] == "fixed"}
    if refused:
        differing = "; ".join(f"{key} was {was!r} and is now {now!r}" for key, (was, now) in refused.items())
        forced = "" if force or any(rules[key] == "fixed" for key in refused) else ", or give --force"
        raise UserError(
            f"run {folder} can't go on with this config: {differing}; set it back, or choose another run folder{forced}"
        )
    return changed


def on_resume(key: str, config: RunConfig) -> Literal["free", "kept unless forced", "fixed"]:
    """Whether a setting, by its dotted key, may change when a run is resumed: what its field's metadata tells."""
    rules = [metadata["resume"] for metadata in metadata_along(RunConfig, key) if "resume" in metadata]
    rule = rules[-1] if rules else "kept unless forced"
    if rule == "free if the schedule is constant":
        return "free" if config.optimizer.schedule == "constant" else "kept unless forced"
    return rule


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def read_metrics(run: str | epath.Path) -> AppendedRows:
    """The numbers of a run's steps, in order, each step once: as it was last made. What was no number is NaN."""
    found = read_appended_rows(epath.Path(run) / METRICS, _is_of_a_step)
    by_step = {row["step"]: {name: math.nan if v is None else v for name, v in row.items()} for row in found.rows}
    return AppendedRows([by_step[step] for step in sorted(by_step)], found.damaged)


def _is_of_a_step(row: dict[str, Any]) -> bool:
    numbers = (value is None or type(value) is float or _is_count(value) for value in row.values())
    return _is_count(row.get("step")) and all(numbers)


def _is_count(value: Any) -> bool:
    return type(value) is int and abs(value) < 2**63


def find_tokenizer(*runs: str | epath.Path | None) -> epath.Path | None:
    """The tokenizer folder of the first of some run folders that carries one, whole, or None."""
    folders = [epath.Path(run) for run in runs if run is not None]
    whole = (f for f in folders if (f / "tokenizer").exists() and not (f / _UNFINISHED_TOKENIZER).exists())
    return next((folder / "tokenizer" for folder in whole), None)


def tokenizer_of(run: str | epath.Path) -> epath.Path:
    """The tokenizer folder of a run; UserError if the run carries none."""
    folder = find_tokenizer(run)
    if folder is None:
        raise UserError(f"{run} carries no tokenizer: start from a model that `medllm convert from-hf` converted")
    return folder


def carry_tokenizer(source: str | None, run: epath.Path) -> None:
    """Copies the tokenizer that a run folder carries into another one that has none yet."""
    folder = find_tokenizer(source)
    if folder is not None and find_tokenizer(run) is None:
        copy_tokenizer(folder, run)


def copy_tokenizer(source: epath.Path, run: epath.Path) -> None:
    """Copies the tokenizer's files, and the generation config beside them, into a run folder."""
    target, unfinished = run / "tokenizer", run / _UNFINISHED_TOKENIZER
    unfinished.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if is_there(source / name):
            (source / name).copy(unfinished / name, overwrite=True)
    remove_folder(target)  # in part, if it is there: see find_tokenizer
    move_folder(unfinished, target)
