"""The paper's six facts and a question beside them: each as claims about a study's figures, and its verdict."""

from collections.abc import Sequence
from typing import NamedTuple

from medllm_jax.evaluation.significance import Estimate
from medllm_jax.recipes.demo.stages import CONDITIONS
from medllm_jax.recipes.study.results import WRITTEN, SeedResults
from medllm_jax.recipes.study.statistics import Accuracies, Asked, Figure, accuracy, drop, less, minus, share_lost
from medllm_jax.recipes.study.variants import EXAMS, MODELS

# "No loss" and "nothing" can't be told from zero by any study: they are shown where the loss is surely below this.
MARGIN = 0.02


class Claim(NamedTuple):
    """That a figure is above a bound: zero, or minus the margin for a claim of no loss."""

    text: str
    figure: Figure
    exam: str = "test"
    bound: float = 0.0


class Fact(NamedTuple):
    """A fact of the paper; it is shown where all its claims are."""

    number: int
    text: str
    claims: tuple[Claim, ...]


class Judged(NamedTuple):
    """A claim's figure, and its verdict: "shown", "not shown" or "reversed"."""

    claim: Claim
    estimate: Estimate
    in_each_seed: list[float]

    @property
    def verdict(self) -> str:
        low, high = self.estimate.interval
        if low > self.claim.bound:
            return "shown"
        # What a margin allows is not the opposite of the claim; what is surely below zero by more than that is.
        return "reversed" if high < self.claim.bound else "not shown"


def _answered(model: str) -> Figure:
    return accuracy(model, "answer_only")


def _explained(model: str) -> Figure:
    return accuracy(model, "explain")


FACTS = (
    Fact(
        1,
        "CPT raises answer-only accuracy, and is the largest single gain",
        (
            Claim("CPT above base, answer-only", less(_answered("cpt"), _answered("base"))),
            Claim(
                "CPT's gain above RPO's, answer-only",
                less(less(_answered("cpt"), _answered("base")), less(_answered("rpo"), _answered("cpt"))),
            ),
        ),
    ),
    Fact(
        2,
        "Explaining costs base most and CPT less; the order is base > CPT > CPT + RPO",
        (
            Claim("base drops more than CPT, points", less(drop("base"), drop("cpt"))),
            Claim("CPT drops more than CPT + RPO, points", less(drop("cpt"), drop("rpo"))),
            Claim("base drops more than CPT, share of what was right", less(share_lost("base"), share_lost("cpt"))),
            Claim("CPT drops more than CPT + RPO, share", less(share_lost("cpt"), share_lost("rpo"))),
        ),
    ),
    Fact(
        3,
        "After RPO explaining costs nothing, and answer-only accuracy is kept",
        (
            Claim(f"CPT + RPO's drop below {MARGIN}", minus(drop("rpo")), bound=-MARGIN),
            Claim(f"answer-only not below CPT's by {MARGIN}", less(_answered("rpo"), _answered("cpt")), bound=-MARGIN),
        ),
    ),
    Fact(
        4,
        "RPO is steadier than DPO under explanation",
        (
            Claim("RPO above DPO, explained", less(_explained("rpo"), _explained("dpo"))),
            Claim("RPO drops less than DPO", less(drop("dpo"), drop("rpo"))),
            Claim(f"answer-only not below DPO's by {MARGIN}", less(_answered("rpo"), _answered("dpo")), bound=-MARGIN),
        ),
    ),
    Fact(
        5,
        "RPO without CPT lacks the knowledge: CPT gives knowledge, RPO stability",
        (
            Claim("CPT + RPO above RPO without CPT, answer-only", less(_answered("rpo"), _answered("base-rpo"))),
            Claim("CPT + RPO above RPO without CPT, explained", less(_explained("rpo"), _explained("base-rpo"))),
            Claim("RPO without CPT drops less than base", less(drop("base"), drop("base-rpo"))),
        ),
    ),
    Fact(
        6,
        "It transfers to exams that were not trained for",
        (
            Claim("CPT above base, answer-only", less(_answered("cpt"), _answered("base")), "transfer"),
            Claim("CPT drops more than CPT + RPO", less(drop("cpt"), drop("rpo")), "transfer"),
            Claim("CPT + RPO above CPT, explained", less(_explained("rpo"), _explained("cpt")), "transfer"),
        ),
    ),
    Fact(
        7,
        "Not of the paper: the preference term does what NLL on the chosen answers alone would not",
        (
            Claim("RPO above NLL alone, explained", less(_explained("rpo"), _explained("nll"))),
            Claim("RPO drops less than NLL alone", less(drop("nll"), drop("rpo"))),
            Claim(f"answer-only not below NLL's by {MARGIN}", less(_answered("rpo"), _answered("nll")), bound=-MARGIN),
        ),
    ),
    Fact(
        8,
        "Not of the paper: RPO bears a learning rate, four times the tuned one, at which DPO loses accuracy",
        (
            Claim("DPO above DPO at four times the rate, explained", less(_explained("dpo"), _explained("dpo-fast"))),
            Claim("RPO above DPO, both at four times the rate", less(_explained("rpo-fast"), _explained("dpo-fast"))),
            Claim("the same, answer-only", less(_answered("rpo-fast"), _answered("dpo-fast"))),
        ),
    ),
)


def accuracies(study: Sequence[SeedResults], reading: str = WRITTEN) -> dict[str, Accuracies]:
    """Exam -> the accuracies of every model under every condition."""
    asked = [Asked(model, condition) for model in MODELS for condition in CONDITIONS]
    return {exam: Accuracies.of(study, exam, asked, reading) for exam in EXAMS}


def judge(found: dict[str, Accuracies]) -> dict[Fact, list[Judged]]:
    """Every fact's claims with their verdicts."""
    return {
        fact: [
            Judged(claim, of.estimate(claim.figure), of.in_each_seed(claim.figure).tolist())
            for claim in fact.claims
            for of in [found[claim.exam]]
        ]
        for fact in FACTS
    }


def verdict(judged: Sequence[Judged]) -> str:
    """Of a whole fact: the worst of its claims'."""
    verdicts = {one.verdict for one in judged}
    return next(name for name in ("reversed", "not shown", "shown") if name in verdicts)
