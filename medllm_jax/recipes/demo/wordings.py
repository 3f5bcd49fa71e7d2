"""How the miniature world's texts put a fact: as a statement, as a question, and as a question the other way round.

{d} is a disease and {v} a value of the attribute.
"""

import functools
import re
from typing import NamedTuple

from medllm_jax.recipes.demo import world


class Wordings(NamedTuple):
    """Of one attribute. Explanations use the first statement, and exams the first question; `reversed` asks for {d}."""

    statements: tuple[str, ...]
    questions: tuple[str, ...]
    reversed: str


WORDINGS = {
    "診療科": Wordings(
        ("{d}を診る診療科は{v}である。", "{d}は{v}で診る。", "{d}の患者は{v}を受診する。", "{v}では{d}を診療する。"),
        ("{d}を診る診療科はどれか。", "{d}の患者が受診するのはどれか。"),
        "{v}で診るのはどれか。",
    ),
    "部位": Wordings(
        ("{d}で侵されるのは{v}である。", "{d}は{v}の病気である。", "{v}の病気に{d}がある。"),
        ("{d}で侵されるのはどれか。", "{d}が起こるのはどれか。"),
        "{v}の病気はどれか。",
    ),
    "背景": Wordings(
        ("{d}の背景にあるのは{v}である。", "{d}の背景には{v}がある。", "{v}を背景とする病気に{d}がある。"),
        ("{d}の背景にあるのはどれか。", "{d}をもたらすのはどれか。"),
        "{v}を背景とするのはどれか。",
    ),
    "検査": Wordings(
        (
            "{d}の診断に用いる検査は{v}である。",
            "{d}を疑ったら{v}を行う。",
            "{d}の診断には{v}が役立つ。",
            "{v}は{d}の診断に用いる。",
        ),
        ("{d}の診断に用いる検査はどれか。", "{d}を疑ったとき行うのはどれか。"),
        "{v}を診断に用いるのはどれか。",
    ),
    "治療": Wordings(
        (
            "{d}の治療に用いるのは{v}である。",
            "{d}には{v}を行う。",
            "{d}と診断したら{v}を考える。",
            "{v}は{d}に対して行う。",
        ),
        ("{d}の治療に用いるのはどれか。", "{d}と診断したとき考えるのはどれか。"),
        "{v}を治療に用いるのはどれか。",
    ),
}


def explained(fact: world.Fact) -> str:
    """The sentence by which an explanation states a fact."""
    return WORDINGS[fact.attribute].statements[0].format(d=fact.disease, v=fact.value)


class Statement(NamedTuple):
    """What a sentence says: that the disease has this value of the attribute."""

    disease: str
    attribute: str
    value: str

    @property
    def true(self) -> bool:
        """Whether it is right, or could be defended."""
        return self.holds_of(self.disease)

    def holds_of(self, disease: str) -> bool:
        """The same, were it said of another disease."""
        fact = world.facts().get(disease, {}).get(self.attribute)
        return fact is not None and self.value in (fact.value, *fact.also)


def statements_in(text: str) -> list[Statement]:
    """The statements that an explanation consists of, in order; what is no such sentence is passed over."""
    found = []
    for sentence in re.findall(r"[^。\n]+。", text):
        for attribute, pattern in _patterns().items():
            if match := pattern.fullmatch(sentence):
                found.append(Statement(match["d"], attribute, match["v"]))
    return found


@functools.cache
def _patterns() -> dict[str, re.Pattern[str]]:
    return {
        attribute: re.compile(words.statements[0].format(d="(?P<d>.+)", v="(?P<v>.+)"))
        for attribute, words in WORDINGS.items()
    }


def phrases() -> list[str]:
    """Every phrase that stands between terms, the same one as often as it is used."""
    forms = [form for words in WORDINGS.values() for form in (*words.statements, *words.questions, words.reversed)]
    # A question begins with the very tokens of a statement, so that what statements teach is at hand in a question.
    return [part for form in forms for part in re.split(r"\{d\}|\{v\}|(?=どれか)", form) if part]
