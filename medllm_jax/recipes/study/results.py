"""The results of a study as files: what every model answered to every question, one file a seed.

A question has its disease's number, and its right letter. An answer is its letter, or what there is instead of one
(`NO_CHOICE`). It is read twice: as the model writes it, and as the choice that the model finds likeliest in its place.
An explanation has a letter too (`explanations.KINDS`).
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from medllm_jax.errors import UserError
from medllm_jax.evaluation.exam import LETTERS
from medllm_jax.recipes.demo.stages import CONDITIONS
from medllm_jax.recipes.study.explanations import KINDS
from medllm_jax.recipes.study.variants import EXAMS, MODELS, VARIANTS
from medllm_jax.storage.json_files import read_json
from medllm_jax.storage.remote import write_whole

FORMAT = 2
UNREADABLE, OUTSIDE, WRONG_COUNT = "-?+"
# Character -> what stands instead of a choice. The extractor calls the first two unreadable.
NO_CHOICE = {UNREADABLE: "nothing readable", OUTSIDE: "none of the choices", WRONG_COUNT: "more than one"}
A_WRONG_CHOICE = "a wrong choice"
WRITTEN, LIKELIEST = READINGS = ("written", "likeliest")
# Of preference training: name -> metric of the run.
CURVES = {
    "margins": "rewards/margins",
    "accuracies": "rewards/accuracies",
    "chosen": "rewards/chosen",
    "rejected": "rewards/rejected",
    "entropy": "entropy",
}
# A reward is beta times what log-probability has gained over the reference: these are kept in nats, without beta.
IN_NATS = ("chosen", "rejected")
POINTS = 10  # of a curve: each is the mean over a tenth of the steps


@dataclass(frozen=True)
class Paper:
    """An exam as it was asked: the right letters and the diseases' numbers, question by question."""

    right: str
    cases: list[int]


@dataclass(frozen=True)
class SeedResults:
    """A seed's exams and answers.

    recipe: the digest of what made them. exams: exam -> paper. answers: reading -> model -> exam -> condition -> a
    character a question. explained: model -> exam -> a character a question, what kind of explanation it was;
    contradicts: the same, `1` where the answer contradicts what the explanation says. curves: model -> name ->
    [last step, mean over the steps since the point before] pairs.
    """

    seed: int
    recipe: str
    exams: dict[str, Paper]
    answers: dict[str, dict[str, dict[str, dict[str, str]]]]
    explained: dict[str, dict[str, str]]
    contradicts: dict[str, dict[str, str]]
    curves: dict[str, dict[str, list[list[float]]]]

    def right(self, model: str, exam: str, condition: str, reading: str = WRITTEN) -> np.ndarray:
        """bool [questions], which answers are right."""
        return self.given(model, exam, condition, reading) == _letters(self.exams[exam].right)

    def given(self, model: str, exam: str, condition: str, reading: str = WRITTEN) -> np.ndarray:
        """The answers' characters, [questions]."""
        return _letters(self.answers[reading][model][exam][condition])

    def lost(self, model: str, exam: str) -> dict[str, np.ndarray]:
        """Right without an explanation and not with one, as written: what stands there instead -> bool [questions]."""
        only, explained = (self.right(model, exam, condition) for condition in CONDITIONS)
        given = self.given(model, exam, CONDITIONS[-1])
        lost = only & ~explained
        instead = {text: lost & (given == character) for character, text in NO_CHOICE.items()}
        return {**instead, A_WRONG_CHOICE: lost & ~np.isin(given, list(NO_CHOICE))}

    def gained(self, model: str, exam: str) -> np.ndarray:
        """Right with an explanation and not without, as written; bool [questions]."""
        only, explained = (self.right(model, exam, condition) for condition in CONDITIONS)
        return explained & ~only

    def kinds(self, model: str, exam: str) -> np.ndarray:
        return _letters(self.explained[model][exam])

    def contradicted(self, model: str, exam: str) -> np.ndarray:
        return _letters(self.contradicts[model][exam]) == "1"


def _letters(text: str) -> np.ndarray:
    return np.array(list(text))


def file_of(folder: Path, seed: int) -> Path:
    return folder / f"seed-{seed}.json"


def write_seed(folder: Path, results: SeedResults) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = json.dumps({"format": FORMAT, **asdict(results)}, ensure_ascii=False, separators=(",", ":"))
    write_whole(epath.Path(file_of(folder, results.seed)), content + "\n")


def read_study(folder: Path) -> list[SeedResults]:
    """The seeds of a folder, in order.

    Raises:
      UserError: there is none, one is damaged, or they are of different recipes or exams of different kinds.
    """
    files = sorted(folder.glob("seed-*.json"))
    if not files:
        raise UserError(f"{folder}: no results of a study; files named seed-N.json were expected")
    seeds = sorted(map(_read_seed, files), key=lambda found: found.seed)
    if len({found.recipe for found in seeds}) > 1:
        told = ", ".join(f"seed {found.seed} by {found.recipe}" for found in seeds)
        raise UserError(f"{folder}: the seeds are of different versions of the recipe ({told})")
    return seeds


def _read_seed(file: Path) -> SeedResults:
    found = read_json(file)
    if found.pop("format", None) != FORMAT:
        raise UserError(f"{file} is no result of a study in format {FORMAT}")
    try:
        papers = {exam: Paper(**paper) for exam, paper in found.pop("exams").items()}
        results = SeedResults(exams=papers, **found)
        _check(results)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{file} is damaged ({error}): remove it, and make it again") from None
    if file != file_of(file.parent, results.seed):
        raise UserError(
            f"{file} holds seed {results.seed}: its name should be {file_of(file.parent, results.seed).name}"
        )
    return results


def _check(results: SeedResults) -> None:
    """ValueError where something is missing, or is none of the characters that it may be."""
    if not isinstance(results.seed, int) or not isinstance(results.recipe, str):
        raise ValueError("seed is no number, or recipe no text")
    for exam in EXAMS:
        paper = results.exams[exam]
        questions = len(paper.right)
        _expect(paper.right, LETTERS, questions, f"right answers of {exam}")
        if len(paper.cases) != questions or not all(isinstance(case, int) for case in paper.cases):
            raise ValueError(f"cases of {exam}: one number a question was expected")
        for model in MODELS:
            for condition in CONDITIONS:
                for reading in READINGS:
                    text: Any = results.answers[reading][model][exam][condition]
                    _expect(text, LETTERS + "".join(NO_CHOICE), questions, f"answers of {model} to {exam}, {reading}")
            _expect(results.explained[model][exam], "".join(KINDS), questions, f"explanations of {model} to {exam}")
            _expect(results.contradicts[model][exam], "01", questions, f"contradictions of {model} in {exam}")
    for variant in VARIANTS:
        curves = results.curves[variant.name]
        if not all(np.shape(curves[name]) == (POINTS, 2) for name in CURVES):
            raise ValueError(f"curves of {variant.name}")


def _expect(text: Any, characters: str, questions: int, what: str) -> None:
    if not isinstance(text, str) or len(text) != questions or set(text) - set(characters):
        raise ValueError(f"{what}: {questions} of the characters {characters} were expected")
