"""Running an exam: prompts to a model, its outputs to a file, grades from that file.

Outputs are written before anything is parsed (see `samples.py`), so an interrupted run goes on where it stopped, and a
finished one can be graded again without the model.
"""

import json
from collections.abc import Callable, Mapping, Sequence

from etils import epath

from medllm_jax.errors import UserError
from medllm_jax.evaluation.exam import Exam, Question
from medllm_jax.evaluation.extraction.extract import extract, vote
from medllm_jax.evaluation.grading import Grade, Summary, grade, summarize, write_grades
from medllm_jax.evaluation.prompts import CONDITIONS, PromptTemplate
from medllm_jax.evaluation.samples import sample_exam
from medllm_jax.evaluation.sampling import Completion, Sampler, SamplingParams
from medllm_jax.storage.remote import write_whole
from medllm_jax.terminal.tables import aligned, markdown


def evaluate(
    exam: Exam,
    template: PromptTemplate,
    conditions: Sequence[str],
    sampler: Sampler | None,
    output_dir: epath.PathLike,
    params: SamplingParams = SamplingParams(),  # noqa: B008 (frozen)
    *,
    anew: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Summary]:
    """Puts every question to a model under every condition and grades the answers.

    Writes to `output_dir` (local or gs://): `samples.jsonl`, the outputs as they come; `grades-{condition}.jsonl`, what
    was read in them and whether it is right; `scores.json`; and `table.md`. Questions whose outputs are already there
    are not asked again.

    Args:
      exam: the questions.
      template: how they are put.
      conditions: among prompts.CONDITIONS.
      sampler: the model; None where all outputs are there already.
      output_dir: made where it does not exist.
      params: greedy by default; with several samples of a prompt the answer is the most frequent one
        (self-consistency, arXiv 2203.11171).
      anew: forgets the outputs that are there.
      progress: called with the number of prompts done so far, over all conditions, kept ones included.

    Raises:
      UserError: the conditions are wrong, or `output_dir` holds outputs of other prompts, settings or another model.
    """
    if not conditions or len(set(conditions)) < len(conditions) or set(conditions) - set(CONDITIONS):
        raise UserError(f"conditions: {list(conditions)} given; one or both of {', '.join(CONDITIONS)} were expected")
    output_dir = epath.Path(output_dir)
    file = output_dir / "samples.jsonl"
    samples = sample_exam(exam, template, conditions, file, sampler, params, anew=anew, progress=progress)
    grades = {
        condition: [grade_samples(q, samples.of(q.id, condition), condition) for q in exam.questions]
        for condition in conditions
    }
    summaries = {condition: summarize(found) for condition, found in grades.items()}
    for condition, found in grades.items():
        write_grades(output_dir / f"grades-{condition}.jsonl", found)
    scores = {
        "exam": exam.name,
        "template": template.name,
        "model": samples.where,
        "settings": samples.settings,
        "conditions": {condition: summary.as_dict() for condition, summary in summaries.items()},
    }
    write_whole(output_dir / "scores.json", json.dumps(scores, indent=2, ensure_ascii=False) + "\n")
    write_whole(output_dir / "table.md", format_markdown(summaries))
    return summaries


def grade_samples(question: Question, samples: Sequence[Completion], condition: str) -> Grade:
    """The grade of one output, or of what most of several outputs answer."""
    return grade(question, vote([extract(question, s.text, s.finish_reason, condition) for s in samples]))


# --- tables ----------------------------------------------------------------------------------------------------------

_COLUMNS = ("condition", "questions", "correct", "accuracy", "weighted accuracy", "unparseable", "wrong count")


def _cells(condition: str, s: Summary) -> tuple[str, ...]:
    accuracies = (f"{100 * s.accuracy:.1f}%", f"{100 * s.weighted_accuracy:.1f}%")
    return (condition, str(s.n), str(s.correct), *accuracies, str(s.unparseable), str(s.wrong_count))


def _rows(summaries: Mapping[str, Summary]) -> list[tuple[str, ...]]:
    return [_COLUMNS, *(_cells(*item) for item in summaries.items())]


def format_markdown(summaries: Mapping[str, Summary]) -> str:
    """A Markdown table with a row for each condition."""
    return markdown(_rows(summaries))


def format_table(summaries: Mapping[str, Summary]) -> str:
    """The same table in aligned columns, for a terminal."""
    return aligned(_rows(summaries))
