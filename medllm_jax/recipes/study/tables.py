"""A study's tables, in Markdown."""

from collections.abc import Sequence
from functools import partial

import numpy as np

from medllm_jax.evaluation.significance import Estimate, mcnemar
from medllm_jax.recipes.demo.stages import CONDITIONS
from medllm_jax.recipes.study.explanations import KINDS
from medllm_jax.recipes.study.results import A_WRONG_CHOICE, CURVES, IN_NATS, NO_CHOICE, POINTS, SeedResults
from medllm_jax.recipes.study.statistics import Accuracies, accuracy, drop, less, share_lost
from medllm_jax.recipes.study.variants import MODELS, STAGES, VARIANTS
from medllm_jax.recipes.study.verdicts import Fact, Judged, verdict
from medllm_jax.terminal.tables import markdown


def verdicts(judged: dict[Fact, list[Judged]]) -> str:
    """Facts and their claims."""
    rows = [["fact", "verdict", "figure", "95 % interval", "in each seed"]]
    for fact, claims in judged.items():
        rows.append([f"**{fact.number}. {fact.text}**", f"**{verdict(claims)}**", "", "", ""])
        for one in claims:
            low, high = one.estimate.interval
            seeds = " ".join(f"{value:+.3f}" for value in one.in_each_seed)
            interval = f"{low:+.3f} to {high:+.3f}"
            rows.append([one.claim.text, one.verdict, f"{one.estimate.value:+.3f}", interval, seeds])
    return markdown(rows, numbers=False)


def scores(found: Accuracies) -> str:
    """Every model's accuracies, and what explaining costs it."""
    rows = [["model", "answer-only", "with explanation", "drop, points", "drop, share of what was right"]]
    for model, title in MODELS.items():
        figures = (*(accuracy(model, condition) for condition in CONDITIONS), drop(model), share_lost(model))
        rows.append([title, *(_interval(found.estimate(figure)) for figure in figures)])
    return markdown(rows)


def against(found: Accuracies, other: str) -> str:
    """What every variant has more than one of them, question by question: accuracies, and the drop in points."""
    figures = (*(partial(accuracy, condition=condition) for condition in CONDITIONS), drop)
    rows = [["model", "answer-only", "with explanation", "drop, points"]]
    for variant in VARIANTS:
        if variant.name != other:
            more = (less(figure(variant.name), figure(other)) for figure in figures)
            rows.append([variant.title, *(_interval(found.estimate(figure), signed=True) for figure in more)])
    return markdown(rows)


def split(study: Sequence[SeedResults], exam: str) -> str:
    """What became of the questions that were right without an explanation and are not with one; sums over seeds."""
    head = ["model", "lost", *NO_CHOICE.values(), A_WRONG_CHOICE, "gained"]
    rows = [[*head, "answer changes", "answer contradicts explanation"]]
    for model, title in MODELS.items():
        counts = np.sum([_changes(results, model, exam) for results in study], axis=0)
        *parts, gained, changed, contradicted, questions = counts.tolist()
        lost = sum(parts)
        instead = [_of(part, lost) for part in parts]
        rows.append([title, str(lost), *instead, str(gained), _of(changed, questions), _of(contradicted, questions)])
    return markdown(rows)


def _changes(results: SeedResults, model: str, exam: str) -> list[int]:
    only, explained = (results.given(model, exam, condition) for condition in CONDITIONS)
    counted = (*results.lost(model, exam).values(), results.gained(model, exam), only != explained)
    return [int(part.sum()) for part in (*counted, results.contradicted(model, exam))] + [len(only)]


def explanations(study: Sequence[SeedResults], exam: str) -> str:
    """What models say when they explain, and how often the answer is right then; sums over seeds."""
    rows = [["model", *(f"{text}: share" for text in KINDS.values()), *(f"{text}: right" for text in KINDS.values())]]
    for model, title in MODELS.items():
        kinds = np.concatenate([results.kinds(model, exam) for results in study])
        right = np.concatenate([results.right(model, exam, "explain") for results in study])
        of_kind = [kinds == kind for kind in KINDS]
        shares = [f"{found.mean():.3f}" for found in of_kind]
        rows.append([title, *shares, *(f"{right[found].mean():.3f}" if found.any() else "" for found in of_kind)])
    return markdown(rows)


def training(study: Sequence[SeedResults], found: Accuracies) -> str:
    """What the metrics of preference training say in its last fifth, and what became of it; means over seeds.

    found: what a study's models got right.
    """
    metrics = ["rewards/margins", "rewards/accuracies", "chosen, nats", "rejected, nats", "entropy, first", "last"]
    rows = [["run", *metrics, "answer-only", "with explanation"]]
    for variant in VARIANTS:
        curves = {name: np.mean([results.curves[variant.name][name] for results in study], axis=0) for name in CURVES}
        last = {name: curve[-(POINTS // 5) :, 1].mean() for name, curve in curves.items()}
        right = [found.in_each_seed(accuracy(variant.name, condition)).mean() for condition in CONDITIONS]
        pairs = [f"{last['margins']:.3f}", f"{last['accuracies']:.2f}", *(f"{last[name]:+.2f}" for name in IN_NATS)]
        entropy = [f"{value:.2f}" for value in (curves["entropy"][0, 1], last["entropy"])]
        rows.append([variant.title, *pairs, *entropy, *(f"{share:.3f}" for share in right)])
    return markdown(rows)


def by_seed(study: Sequence[SeedResults], exam: str, reading: str) -> str:
    """Each seed by itself, with McNemar's exact test of the drop."""
    rows = [["seed", "questions", *(f"{MODELS[model]}: answer-only / explained (p)" for model in STAGES)]]
    for results in study:
        cells = []
        for model in STAGES:
            only, explained = (results.right(model, exam, condition, reading) for condition in CONDITIONS)
            p = mcnemar(int((only & ~explained).sum()), int((explained & ~only).sum()))
            cells.append(f"{only.mean():.3f} / {explained.mean():.3f} ({p:.2g})")
        rows.append([str(results.seed), str(len(results.exams[exam].right)), *cells])
    return markdown(rows)


def _interval(found: Estimate, signed: bool = False) -> str:
    value, low, high = (f"{figure:{'+' if signed else ''}.3f}" for figure in (found.value, *found.interval))
    return f"{value} ({low} to {high})"


def _of(part: int, whole: int) -> str:
    return f"{part} ({part / whole:.0%})" if whole else str(part)
