"""Exams for language models: questions, prompts, the reading of answers, scores."""

from medllm_jax.evaluation.answers import Extraction, extract
from medllm_jax.evaluation.exam import Exam, Question, load_exam
from medllm_jax.evaluation.prompts import CONDITIONS, PromptTemplate, load_template
from medllm_jax.evaluation.run import evaluate, format_table
from medllm_jax.evaluation.scoring import Grade, Summary, grade, score_official, summarize

__all__ = [
    "CONDITIONS",
    "Exam",
    "Extraction",
    "Grade",
    "PromptTemplate",
    "Question",
    "Summary",
    "evaluate",
    "extract",
    "format_table",
    "grade",
    "load_exam",
    "load_template",
    "score_official",
    "summarize",
]
