"""What stands beside exported weights for people: a model card (README.md), a NOTICE and the licence.

All of it is taken from what run folders, stores and exam results record, so that it is the same each time it is made.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import yaml
from etils import epath

from medllm_jax.checkpoint.handle import Checkpoint
from medllm_jax.config.schema import AdapterConfig, ModelConfig
from medllm_jax.conversion.history import RANDOM, History, Imported, Stage, plain_name
from medllm_jax.data.store import CorpusRows, RowStore
from medllm_jax.errors import UserError, quoted
from medllm_jax.evaluation.prompts import CONDITIONS
from medllm_jax.evaluation.significance import Estimate, accuracy, compare
from medllm_jax.report.collect import Results, collect
from medllm_jax.storage import run_folder
from medllm_jax.storage.json_files import read_bounded
from medllm_jax.storage.remote import is_file
from medllm_jax.terminal.tables import markdown

_LICENCES = ("LICENSE", "LICENSE.txt", "LICENSE.md")
_CARD_BYTES = 1 << 20
_MADE = "## How it was made"
_MOST_SAID = 20_000  # characters that are passed on of another card
_BUILT = "Built with Qwen"
_OBJECTIVES = {"cpt": "continued pretraining", "sft": "instruction tuning", "rpo": "RPO"}


class Licence(NamedTuple):
    """Of the weights that a model was made from. front: of the card's front matter; attribution: what a NOTICE must
    say of it; display: what the card must.
    """

    text: str
    front: dict[str, str]
    attribution: str = ""
    display: str = ""


_APACHE = Licence(
    "The weights it was made from are under the Apache License 2.0, and so is what was made from them.",
    {"license": "apache-2.0"},
)
_RESEARCH = Licence(
    "The weights it was made from are under the Qwen Research License Agreement, which allows no commercial use and "
    "holds for this model too.",
    {"license": "other", "license_name": "qwen-research", "license_link": "LICENSE"},
    "Qwen is licensed under the Qwen RESEARCH LICENSE AGREEMENT, Copyright (c) Alibaba Cloud. All Rights Reserved.",
    _BUILT,
)
_QWEN = Licence(
    "The weights it was made from are under the Qwen License Agreement, which holds for this model too.",
    {"license": "other", "license_name": "qwen", "license_link": "LICENSE"},
    "Qwen is licensed under the Qwen LICENSE AGREEMENT, Copyright (c) Alibaba Cloud. All Rights Reserved.",
    _BUILT,
)
_UNKNOWN = Licence(
    "It falls under the licence of the weights it was made from, whatever that is: whoever passes it on must meet it.",
    {"license": "other", "license_name": "see-base-model"},
    display=_BUILT,
)
_OWN = Licence("It was trained from random weights: no licence of other weights holds for it.", {})
# (hidden_size, num_hidden_layers) of the published Qwen2.5 models -> the licence that their weights are under.
_BY_SHAPE = {
    (896, 24): _APACHE,  # 0.5B
    (1536, 28): _APACHE,  # 1.5B
    (2048, 36): _RESEARCH,  # 3B
    (3584, 28): _APACHE,  # 7B
    (5120, 48): _APACHE,  # 14B
    (5120, 64): _APACHE,  # 32B
    (8192, 80): _QWEN,  # 72B
}


def documents(
    checkpoint: Checkpoint,
    *,
    history: History,
    adapter: bool,
    parameters: int,
    base_name: str | None = None,
    evaluations: Sequence[str] = (),
) -> dict[str, str]:
    """File name -> content of README.md, NOTICE and, where the run carries one, LICENSE.

    history: what it went through. adapter: the adapters alone are exported. parameters: how many numbers. base_name:
    what the model that all began with is called (default: what it was called when it was converted). evaluations:
    folders of exam results to show, beside those in the run folder that are of this step.
    Raises UserError for what holds no exam results.
    """
    run, step = checkpoint.run, checkpoint.step
    stages = history.stages
    base = base_name or history.source or "a model of unknown name"
    licence = _OWN if base == RANDOM else licence_of(checkpoint.model)
    carried = _licence_file(run)
    corpora, absent = _corpora(stages)
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    template = environment.from_string((Path(__file__).parent / "card.md.jinja").read_text(encoding="utf-8"))
    settings = stages[-1].config.adapter if stages else checkpoint.adapter
    readme = template.render(
        front=_front(licence, base, adapter=adapter),
        title=" ".join(_last_part(run).split()),
        kind="adapter" if adapter else "model",
        base=base,
        licence=licence,
        has_licence=carried is not None,
        stages=stages,
        known=history.source is not None,
        commit=history.commit if base == history.source else None,
        made=history.made and "\n".join(f"> {line}".rstrip() for line in history.made.splitlines()),
        imported=history.imported and _imported(history.imported),
        recipe=markdown([_HEADER, *map(_recipe, stages)]) if stages else "",
        adapters=_adapters(settings, merged=not adapter) if settings else "",
        step=step,
        parameters=parameters,
        corpora=markdown([_CORPUS_HEADER, *corpora]) if corpora else "",
        absent=absent,
        exams=_exams(run, step, evaluations),
    )
    readme = re.sub(r"\n{3,}", "\n\n", readme)
    files = {"README.md": readme, "NOTICE": _notice(run, licence, base, carried)}
    return files if carried is None else files | {"LICENSE": carried}


def licence_of(config: ModelConfig) -> Licence:
    """The licence of the published Qwen2.5 model that has this shape."""
    return _BY_SHAPE.get((config.hidden_size, config.num_hidden_layers), _UNKNOWN)


def _front(licence: Licence, base: str, *, adapter: bool) -> str:
    """The card's front matter, which model hubs read."""
    front: dict[str, Any] = {"library_name": "peft" if adapter else "transformers", "pipeline_tag": "text-generation"}
    front |= licence.front
    if base.count("/") == 1 and not base.startswith(("/", ".")):  # as hubs name models; a folder is no name there
        front["base_model"] = base
    front["tags"] = ["medical", "medllm_jax", *(["lora"] if adapter else [])]
    return yaml.safe_dump(front, sort_keys=False, allow_unicode=True)


# --- how it was made ---------------------------------------------------------------------------------------------


def made_before(folder: epath.Path) -> dict[str, str]:
    """`made`: what a card in a folder says of how its model was made, where it is one of these; empty where not."""
    file = folder / "README.md"
    is_card = is_file(file) and file.stat().length <= _CARD_BYTES
    content = read_bounded(file, _CARD_BYTES).decode("utf-8", "replace") if is_card else ""
    front, _, body = content.removeprefix("---\n").partition("\n---\n")
    said = body.partition(f"\n{_MADE}\n")[2].partition("\n## ")[0].strip()
    is_ours = content.startswith("---\n") and "- medllm_jax" in front.splitlines()
    is_text = all(line.isprintable() for line in said.splitlines()) and 0 < len(said) <= _MOST_SAID
    return {"made": said} if is_ours and is_text else {}


def check_base_name(name: str) -> None:
    """UserError for what can't stand in a card as a name."""
    if plain_name(name) is None:
        raise UserError(f"--base-name {quoted(name)}: a name in one line, such as Qwen/Qwen2.5-7B, is expected")


_HEADER = ("stage", "steps", "rows a step", "learning rate", "objective", "weights")


def _recipe(stage: Stage) -> list[str]:
    config, objective = stage.config, stage.config.objective
    said = _OBJECTIVES[objective.name]
    if objective.name == "rpo":
        said += f": {objective.pair_loss}, beta {objective.beta:g}, alpha {objective.alpha:g}, "
        said += f"NLL by {objective.nll_reduction}"
    rate = f"{config.optimizer.learning_rate:g}, {config.optimizer.schedule}"
    weights = "all" if config.adapter is None else f"LoRA of rank {config.adapter.rank} on {config.adapter.base}"
    return [_last_part(config.run), str(stage.step), str(config.data.batch_size), rate, said, weights]


def _scale(settings: AdapterConfig) -> str:
    """Rank, alpha and what follows of them."""
    kind = " (rsLoRA)" if settings.rslora else ""
    return f"rank {settings.rank}, alpha {settings.alpha:g}, scale {settings.scale:g}{kind}"


def _imported(adapter: Imported) -> str:
    return adapter.name if adapter.settings is None else f"{adapter.name}: {_scale(adapter.settings)}"


def _adapters(settings: AdapterConfig, *, merged: bool) -> str:
    scale = _scale(settings)
    listed = ", ".join(settings.projections)
    how = "merged into the base" if merged else "alone"
    return f"{scale}, on {listed}; trained on a base in {settings.base}, exported {how}."


_CORPUS_HEADER = ("corpus", "stage", "examples", "tokens", "provenance", "licence", "processing")


def _corpora(stages: Iterable[Stage]) -> tuple[list[list[str]], list[str]]:
    """A row for each corpus of each stage, and the stores that are not at hand."""
    rows, absent = [], []
    for stage in stages:
        for store in stage.config.data.stores:
            try:
                corpora = RowStore.open(store).metadata.corpora
            except UserError:
                absent.append(f"the store {_last_part(store)}, of {_last_part(stage.config.run)},")
                continue
            rows += [_corpus(corpus, stage) for corpus in corpora if (stage.config.data.mix or {}).get(corpus.name, 1)]
    return rows, absent


def _corpus(corpus: CorpusRows, stage: Stage) -> list[str]:
    stated = (str(corpus.manifest.get(key) or "not stated") for key in ("provenance", "licence", "processing"))
    cells = [corpus.name, _last_part(stage.config.run), f"{corpus.examples:,}", f"{corpus.tokens:,}", *stated]
    return [" ".join(cell.replace("|", "/").split()) for cell in cells]


# --- exams -------------------------------------------------------------------------------------------------------


_EXAM_HEADER = ("exam", "model", "questions", "answer-only", "with explanation", "difference")


def _exams(run: str, step: int, evaluations: Sequence[str]) -> str:
    """The table, or nothing where there are no results."""
    found = [results for results in _own(run) if results.model.endswith(f"@{step}")]
    for folder in evaluations:
        runs_there, results = collect([folder])
        if runs_there or not results:
            raise UserError(f"--evaluation {folder}: the folder of exam results, with scores.json in it, is expected")
        found += results
    rows = [row for results in found for row in _scores(results)]
    return markdown([_EXAM_HEADER, *rows]) if rows else ""


def _own(run: str) -> list[Results]:
    """The results in the run folder; a model that was converted has no config.yaml, by which reports know runs."""
    return collect([run])[1] if (epath.Path(run) / "config.yaml").exists() else []


def _scores(results: Results) -> Iterator[list[str]]:
    if not results.grades:
        return
    shares = [_shown(accuracy(results.grades[c])) if c in results.grades else "-" for c in CONDITIONS]
    difference = "-"
    if len(results.grades) == len(CONDITIONS):
        before, after = (results.grades[condition] for condition in CONDITIONS)
        difference = _shown(compare(before, after).weighted_difference, "+")
    questions = len(next(iter(results.grades.values())))
    yield [_last_part(results.exam), results.name, str(questions), *shares, difference]


def _shown(found: Estimate, sign: str = "") -> str:
    return f"{found.value:{sign}.3f} [{found.interval.low:{sign}.3f}, {found.interval.high:{sign}.3f}]"


# --- licence -----------------------------------------------------------------------------------------------------


def _licence_file(run: str) -> str | None:
    """The licence that came with the model, which stands beside its tokenizer."""
    folder = run_folder.find_tokenizer(run)
    names = () if folder is None else (folder / name for name in _LICENCES)
    return next((file.read_text(encoding="utf-8") for file in names if file.exists()), None)


_DERIVED = "These weights are a derived work of Qwen2.5"
_CARRIED = "The notice that came with those weights:"


def _notice(run: str, licence: Licence, base: str, carried: str | None) -> str:
    research = "This model is for research. It is not a medical device and not for clinical use."
    if licence is _OWN:
        return f"{licence.text}\n\n{research}\n"
    parts = [
        _BUILT,
        f"{_DERIVED}: made from {base}, with all files of weights changed.",
        *([licence.attribution] if licence.attribution else []),
        licence.text,
        research,
    ]
    if carried is None:
        parts.append(
            "No copy of the licence was beside the weights that this model was made from. Whoever passes it on must "
            "add the copy that came with them, as LICENSE."
        )
    folder = run_folder.find_tokenizer(run)
    before = (folder / "NOTICE").read_text(encoding="utf-8") if folder and (folder / "NOTICE").exists() else ""
    if before.startswith(f"{_BUILT}\n\n{_DERIVED}"):  # one of these, of an earlier export: it is said again above
        before = before.partition(_CARRIED)[2]
    if before:
        parts.append(f"{_CARRIED}\n\n{before.strip()}")
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _last_part(path: str) -> str:
    """Of a path, which may say more of a machine than a card should."""
    return path.rstrip("/").rpartition("/")[2]
