"""What an explanation of the miniature world says: whether it is true, and whether the answer agrees with it."""

import functools
from collections.abc import Iterable

from medllm_jax.recipes.demo.wordings import Statement, statements_in
from medllm_jax.recipes.demo.world import ATTRIBUTES, facts, values

TRUE, OTHER, FALSE, NOTHING = "tofn"
# Letter -> what an explanation of this kind says.
KINDS = {
    TRUE: "true of the disease",
    OTHER: "true of another disease",
    FALSE: "true of no disease",
    NOTHING: "no statement",
}


def kind(explanation: str, disease: str) -> str:
    """The letter of what an explanation says; disease: the one that the question is about.

    What is said of another disease by name is not true of this one, even where it happens to be.
    """
    said = statements_in(explanation)
    if not said:
        return NOTHING
    if all(statement.true for statement in said):
        return TRUE if {statement.disease for statement in said} == {disease} else OTHER
    return OTHER if any(_hold(said, other) for other in facts()) else FALSE


def is_term(answer: str) -> bool:
    """Whether an answer is a term of the world: it may be none of the choices, but it can be read."""
    return answer in _terms()


@functools.cache
def _terms() -> frozenset[str]:
    return frozenset([*facts(), *(value for attribute in ATTRIBUTES for value in values(attribute))])


def contradicts(explanation: str, attribute: str, answer: str) -> bool:
    """Whether there is no disease of which both hold: what an explanation says, and the answer.

    attribute: that which the question is about. answer: a value of it, or a disease that has it. An explanation that
    says nothing is contradicted by no answer.
    """
    said = statements_in(explanation)
    if not said:
        return False
    if answer in facts():
        return not _hold(said, answer)
    answered = said[0]._replace(attribute=attribute, value=answer)
    return not any(_hold([*said, answered], disease) for disease in facts())


def _hold(statements: Iterable[Statement], disease: str) -> bool:
    """Whether every statement is true of a disease, or could be defended, whatever disease it is said of."""
    return all(statement.holds_of(disease) for statement in statements)
