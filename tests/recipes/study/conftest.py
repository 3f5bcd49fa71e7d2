"""Results of a study that nothing was trained for."""

import numpy as np

from medllm_jax.evaluation.exam import LETTERS
from medllm_jax.recipes.demo.stages import CONDITIONS
from medllm_jax.recipes.study import explanations
from medllm_jax.recipes.study.results import CURVES, POINTS, READINGS, UNREADABLE, Paper, SeedResults
from medllm_jax.recipes.study.variants import EXAMS, MODELS, VARIANTS

CASES, OF_A_CASE = 20, 4


def seed_results(seed: int, accuracies=None, recipe: str = "a recipe") -> SeedResults:
    """Answers drawn at random, right as often as told; accuracies: model -> (answer-only, explained), or all .8."""
    rng = np.random.default_rng(seed)
    asked = CASES * OF_A_CASE
    papers = {
        exam: Paper(
            "".join(LETTERS[i] for i in rng.integers(5, size=asked)),
            [int(case) for case in np.repeat(np.arange(CASES), OF_A_CASE)],
        )
        for exam in EXAMS
    }

    def answers(exam, share):
        right = rng.random(asked) < share
        wrong = [UNREADABLE if unread else "x" for unread in rng.random(asked) < 0.5]
        return "".join(np.where(right, list(papers[exam].right), wrong))

    def of_each(make):
        return {model: {exam: make(model, exam) for exam in EXAMS} for model in MODELS}

    curve = [[step, step / 10] for step in range(1, POINTS + 1)]
    shares = {model: (accuracies or {}).get(model, (0.8, 0.8)) for model in MODELS}
    return SeedResults(
        seed=seed,
        recipe=recipe,
        exams=papers,
        answers={
            reading: of_each(
                lambda m, e: {c: answers(e, share) for c, share in zip(CONDITIONS, shares[m], strict=True)}
            )
            for reading in READINGS
        },
        explained=of_each(lambda m, e: "".join(rng.choice(list(explanations.KINDS), size=asked))),
        contradicts=of_each(lambda m, e: "".join(rng.choice(["0", "1"], size=asked))),
        curves={one.name: dict.fromkeys(CURVES, curve) for one in VARIANTS},
    )
