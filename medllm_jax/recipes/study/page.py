"""A study's page and its pictures, made from the files of its results.

The page is beside the folder of results and has its name. What is written by hand, before and after the part that is
made, is kept.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from etils import epath

from medllm_jax.errors import UserError
from medllm_jax.recipes.study import plots, tables
from medllm_jax.recipes.study.results import LIKELIEST, READINGS, WRITTEN, SeedResults, read_study
from medllm_jax.recipes.study.variants import EXAMS
from medllm_jax.recipes.study.verdicts import MARGIN, accuracies, judge
from medllm_jax.storage.remote import write_whole

BEGIN = "<!-- What follows is made by `medllm demo --results`: change the code, not the text. -->"
END = "<!-- Here ends what is made. -->"
_MADE = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
# Name -> what draws it, as PNG.
PICTURES: dict[str, Callable[[Sequence[SeedResults]], bytes]] = {
    "stages": lambda study: plots.stages(study, "test", WRITTEN),
    "stages-likeliest": lambda study: plots.stages(study, "test", LIKELIEST),
    "losses": lambda study: plots.losses(study, "test"),
    "margins": lambda study: plots.margins(study, ("rpo", "dpo", "nll", "gold")),
}


def write_page(folder: Path) -> Path:
    """Makes the page and the pictures of a folder of results; returns the page.

    UserError where the results are none or damaged, or the page that is there has no part for what is made.
    """
    study = read_study(folder)
    page = folder.with_name(f"{folder.name}.md")
    part = made(study, folder.name)
    if page.exists():
        text = page.read_text(encoding="utf-8")
        if not _MADE.search(text):
            raise UserError(f"{page} is there and has no lines {BEGIN!r} and {END!r} to write between")
        text = _MADE.sub(lambda _: part, text)
    else:
        text = f"# The study\n\n{part}\n"
    write_whole(epath.Path(page), text)
    for name, draw in PICTURES.items():
        write_whole(epath.Path(folder / f"{name}.png"), draw(study))
    return page


def made(study: Sequence[SeedResults], folder: str) -> str:
    """The part of the page that is made, with the lines around it; folder: of the pictures, as the page calls it."""
    return f"{BEGIN}\n\n{_generated(study, folder)}\n{END}"


def _generated(study: Sequence[SeedResults], folder: str) -> str:
    written, likeliest = (accuracies(study, reading) for reading in READINGS)
    questions = {exam: sum(len(results.exams[exam].right) for results in study) for exam in EXAMS}
    asked = " and ".join(f"{count} in `{exam}`" for exam, count in questions.items())
    return f"""\
Seeds {", ".join(str(results.seed) for results in study)}; recipe {study[0].recipe}. Questions: {asked}, over all seeds.
Intervals are of the mean over seeds: 95 %, by a bootstrap of seeds and, within each, of diseases.

### Verdicts

A claim is shown where the whole interval is above zero, or, where it says that nothing is lost, above -{MARGIN}; it is
reversed where the whole interval is below. A fact is as good as its worst claim.

By what models write:

{tables.verdicts(judge(written))}
By the choice that they find likeliest in its place, so that every answer is one:

{tables.verdicts(judge(likeliest))}
### Base, CPT and RPO

What they write:

![accuracy by stage and condition, as written]({folder}/stages.png)

The likeliest choice:

![accuracy by stage and condition, the likeliest choice]({folder}/stages-likeliest.png)

### Every model on `test`

What they write:

{tables.scores(written["test"])}
The likeliest choice:

{tables.scores(likeliest["test"])}
### Every variant against CPT + RPO, on `test`

The mean difference over seeds. Where its interval is all above or all below zero, the two can be told apart.

What they write:

{tables.against(written["test"], "rpo")}
The likeliest choice:

{tables.against(likeliest["test"], "rpo")}
### What explaining costs, in parts

Questions that were right without an explanation and are not with one, as written, over all seeds.

{tables.split(study, "test")}
![the drop in parts]({folder}/losses.png)

### What the explanations say

{tables.explanations(study, "test")}
### Seed by seed

p is of McNemar's exact test between the two conditions. What they write:

{tables.by_seed(study, "test", WRITTEN)}
The likeliest choice:

{tables.by_seed(study, "test", LIKELIEST)}
### Every model on `transfer`

What they write:

{tables.scores(written["transfer"])}
The likeliest choice:

{tables.scores(likeliest["transfer"])}
### What the metrics of preference training say

Means over seeds and the last fifth of the steps. `chosen` and `rejected` are what the log-probability of those answers
has gained over the reference, in nats: `rewards/chosen` and `rewards/rejected` divided by beta. Entropy is the model's
on chosen tokens. Accuracies are those of `test`, as written.

{tables.training(study, written["test"])}
![reward margins]({folder}/margins.png)
"""
