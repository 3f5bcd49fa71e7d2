"""The miniature world's files: two corpora, four exams, and what its tokenizer is trained on."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from medllm_jax.recipes.demo import world
from medllm_jax.recipes.demo.author import CPT_DOCUMENTS, TEMPLATE, Author, Solved
from medllm_jax.recipes.demo.wordings import phrases
from medllm_jax.recipes.demo.world import facts

# What the exams ask, and how often they ask for each fact, with different choices.
ASKED = ("診療科", "検査", "治療")
QUESTIONS_PER_FACT = 3


@dataclass(frozen=True)
class ExamRow:
    """One question as exam files hold it; `answer` is the letter of the right choice, `category` the attribute.

    `case` is the id of the first question about the same disease.
    """

    id: str
    question: str
    choices: list[str]
    answer: str
    explanation: str
    category: str
    case: str

    @classmethod
    def of(cls, solved: Solved, exam: str, number: int, case: str) -> "ExamRow":
        fact = solved.fact
        id = f"{exam}-{fact.disease}-{fact.attribute}-{number}"
        given = (solved.question, list(solved.choices), solved.letter, solved.explanation, fact.attribute)
        return cls(id, *given, case or id)

    @property
    def disease(self) -> str:
        return self.id.partition("-")[2].rsplit("-", 2)[0]


def base_examples(seed: int, documents: int) -> Iterator[dict[str, str]]:
    """Text that brings a random model to base level: statements, and questions in the exams' own form.

    The questions are all about base diseases, and so are most of the statements.
    """
    author = Author.of(seed, "base")
    return (author.base_example() for _ in range(documents))


def cpt_documents(seed: int) -> Iterator[str]:
    """Text for continued pretraining: statements about the new diseases, and some of what the base was made from."""
    author = Author.of(seed, "cpt")
    return (author.cpt_document() for _ in range(CPT_DOCUMENTS))


def exams(seed: int) -> dict[str, list[ExamRow]]:
    """The exams, each about diseases of its own: "train" to make pairs, "dev" to tune, "test" for the result.

    "transfer" asks in ways that no training question does: in other words, for other attributes, and the other way
    round.
    """
    author = Author.of(seed, "exams")
    parts = world.split(seed)
    return {
        exam: list(_transfer(author, parts[exam]) if exam == "transfer" else _exam(author, exam, parts[exam]))
        for exam in world.EXAMS
    }


def _exam(author: Author, name: str, diseases: list[str]) -> Iterator[ExamRow]:
    for disease in diseases:
        case = ""
        for fact in (facts()[disease][attribute] for attribute in ASKED if attribute in facts()[disease]):
            sets: set[frozenset[str]] = set()
            while len(sets) < QUESTIONS_PER_FACT:
                solved = author.asked(fact, wording=0)
                if frozenset(solved.choices) in sets:
                    continue
                sets.add(frozenset(solved.choices))
                row = ExamRow.of(solved, name, len(sets), case)
                case = row.case
                yield row


def _transfer(author: Author, diseases: list[str]) -> Iterator[ExamRow]:
    for disease in diseases:
        case = ""
        for fact in facts()[disease].values():
            asked = [author.asked(fact, wording=1), author.asked(fact, wording=1), author.reversed(fact, author.new)]
            for number, solved in enumerate(solved for solved in asked if solved is not None):
                row = ExamRow.of(solved, "transfer", number + 1, case)
                case = row.case
                yield row


def tokenizer_texts() -> list[str]:
    """What the tokenizer is trained on: every term and every phrase between terms, each as a text of its own.

    Japanese has no spaces, so a tokenizer trained on running text would merge across terms. Trained on the terms
    apart, it gives each of them one token wherever it stands.
    """
    terms = [*facts(), *(value for attribute in world.ATTRIBUTES for value in world.values(attribute))]
    template = yaml.safe_load(TEMPLATE.read_text(encoding="utf-8"))
    cues = [condition["cue"] for condition in template["conditions"].values()]
    # Phrases often, so that they are merged before a term's pieces can take a part of them.
    return [*terms * 2, *[*phrases(), *cues, "問題:"] * 20]


def write_world(folder: str | Path, seed: int, base_documents: int) -> Path:
    """Writes `base.jsonl` (`prompt` and `response`), `cpt.jsonl` (`text`) and `exam/NAME.jsonl`; returns the folder."""
    folder = Path(folder)
    _write(folder / "base.jsonl", base_examples(seed, base_documents))
    _write(folder / "cpt.jsonl", ({"text": text} for text in cpt_documents(seed)))
    for exam, rows in exams(seed).items():
        _write(folder / "exam" / f"{exam}.jsonl", map(asdict, rows))
    return folder


def _write(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8", newline="\n") as out:
        out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
