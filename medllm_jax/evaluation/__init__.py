"""Exams for language models: questions, prompts, the reading of answers, scores."""

from medllm_jax.evaluation.evaluate import evaluate, format_table
from medllm_jax.evaluation.exam import Exam, Question, load_exam
from medllm_jax.evaluation.extraction.extract import Extraction, extract
from medllm_jax.evaluation.grading import Grade, Summary, grade, score_official, summarize
from medllm_jax.evaluation.prompts import CONDITIONS, PromptTemplate, load_template

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
