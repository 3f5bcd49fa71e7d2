"""Which answer a model finds likeliest, without letting it write: a cheap monitor of what CPT has put into it.

An answer is right if, of all answers of as many letters, it has the highest probability after the cue of the
answer-only prompt: log P of the whole answer, jointly over its tokens. The same after a model's own explanation tells
what the explanation does to what it would choose, where what it writes may be no choice at all. No model is ranked by
this: nobody who asks a model sees its likelihoods, and scores are higher than those of what it writes.
"""

import dataclasses
import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from medllm_jax.checkpoint.fingerprint import model_fingerprint
from medllm_jax.checkpoint.handle import Checkpoint
from medllm_jax.checkpoint.load_model import load_model
from medllm_jax.config.schema import MeshConfig, ModelConfig, PrecisionConfig
from medllm_jax.data.tokenizer import encode_parts, load_tokenizer
from medllm_jax.distributed.compiler_options import compiler_options
from medllm_jax.distributed.sharding import check_divisible, make_mesh, on_cpus, replicated, rows_over
from medllm_jax.errors import UserError, quoted
from medllm_jax.evaluation.exam import Exam, Question
from medllm_jax.evaluation.extraction.extract import Extraction
from medllm_jax.evaluation.grading import Grade, grade
from medllm_jax.evaluation.prompts import PromptTemplate
from medllm_jax.evaluation.samples import Samples
from medllm_jax.storage import run_folder

_CONDITION = "answer_only"
_RULE = "likeliest"
_MAX_ANSWERS = 1_000  # possible ones of a question: 10 choices of 20 would be 184,756


@dataclasses.dataclass(frozen=True)
class LikelihoodScore:
    """Questions whose likeliest answer is right, and their points; `left_out` counts those that were not scored: of
    numbers, which have no letters, those of too many answers, and those without room in the model's context."""

    n: int
    correct: int
    points: int
    max_points: int
    left_out: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.n

    @property
    def weighted_accuracy(self) -> float:
        return self.points / self.max_points if self.max_points else 0.0

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"accuracy": self.accuracy, "weighted_accuracy": self.weighted_accuracy}


class _Asked(NamedTuple):
    """A question's prompt, its possible answers with their tokens, and which of the answers are right."""

    question: Question
    prompt: list[int]
    answers: list[frozenset[str]]
    tokens: list[list[int]]


class Likelihood:
    """The choice questions of an exam, ready to be scored under a model's weights, as often as these change."""

    def __init__(
        self,
        exam: Exam,
        template: PromptTemplate,
        tokenizer: Any,
        config: ModelConfig,
        structure: nnx.GraphDef,
        mesh: Mesh,
        batch_size: int,
        outputs: Mapping[str, str] | None = None,
    ):
        """Nothing runs on a device yet.

        outputs: question id -> a model's output to the explain prompt; each answer then follows that explanation.

        Raises:
          UserError: the batch does not split over the mesh, or no question can be scored.
        """
        check_divisible(mesh, config, batch_size)
        self._structure, self._mesh, self._batch_size = structure, mesh, batch_size
        self._groups: dict[int, list[_Asked]] = defaultdict(list)
        for asked in _ask(exam, template, tokenizer, outputs):
            longest = max(map(len, asked.tokens))
            if len(asked.prompt) + longest <= config.max_position_embeddings:
                self._groups[len(asked.answers)].append(asked)
        self._scored = sum(map(len, self._groups.values()))
        self._left_out = len(exam.questions) - self._scored
        if not self._scored:
            raise UserError(f"exam {exam.name}: no question with choices fits into the model's context")
        self._program = jax.jit(
            self._log_probs, out_shardings=replicated(mesh), compiler_options=compiler_options(mesh)
        )

    def measure(self, params: Any, frozen: Any = None) -> LikelihoodScore:
        """Scores all questions; waits for the device."""
        found = self.likeliest(params, frozen)
        questions = [asked.question for group in self._groups.values() for asked in group]
        correct = [question for question in questions if found[question.id] in question.gold]
        points, most = (sum(question.points for question in some) for some in (correct, questions))
        return LikelihoodScore(self._scored, len(correct), points, most, self._left_out)

    def likeliest(self, params: Any, frozen: Any = None) -> dict[str, frozenset[str]]:
        """Question id -> the letters of its likeliest answer."""
        found = self.log_probs(params, frozen)
        return {asked.question.id: asked.answers[int(np.argmax(log_probs))] for asked, log_probs in found}

    def log_probs(self, params: Any, frozen: Any = None) -> Iterator[tuple[_Asked, np.ndarray]]:
        """float32 [C] log-probabilities of the C possible answers of each question."""
        for group in self._groups.values():
            # One shape for all questions with as many answers.
            width = max(len(asked.prompt) for asked in group)
            longest = max(len(tokens) for asked in group for tokens in asked.tokens)
            for start in range(0, len(group), self._batch_size):
                batch = group[start : start + self._batch_size]
                whole = [*batch, *batch[:1] * (self._batch_size - len(batch))]
                found = jax.device_get(self._program(params, frozen, *self._placed(whole, width, longest)))
                yield from zip(batch, found, strict=False)

    def _placed(self, batch: list[_Asked], width: int, longest: int) -> list[jax.Array]:
        rows, answers = len(batch), len(batch[0].answers)
        prompts, candidates = np.zeros((rows, width), np.int32), np.zeros((rows, answers, longest), np.int32)
        lengths, sizes = np.zeros(rows, np.int32), np.zeros((rows, answers), np.int32)
        for row, asked in enumerate(batch):
            prompts[row, width - len(asked.prompt) :] = asked.prompt
            lengths[row] = len(asked.prompt)
            for number, tokens in enumerate(asked.tokens):
                candidates[row, number, : len(tokens)] = tokens
                sizes[row, number] = len(tokens)
        sharding = rows_over(self._mesh)
        return [
            jax.make_array_from_callback(array.shape, sharding, functools.partial(lambda array, at: array[at], array))
            for array in (prompts, lengths, candidates, sizes)
        ]

    def _log_probs(self, params: Any, frozen: Any, prompts, lengths, candidates, sizes) -> jax.Array:
        """float32 [B, C] of prompts int32 [B, W], padded at their left, and candidates int32 [B, C, T], at their right.

        A prompt is read once: its cache is shared by all of its answers.
        """
        network = nnx.merge(self._structure, params, frozen or {})
        width = prompts.shape[1]
        longest = candidates.shape[-1]
        positions = jnp.arange(width) - (width - lengths)[:, None]
        segments = (positions >= 0).astype(jnp.int32)
        hidden, cache = network.prefill(
            prompts, jnp.maximum(positions, 0), segments, width + longest, stacked=not on_cpus(self._mesh)
        )
        blocks = network.separate_blocks() if isinstance(cache.keys, tuple) else None
        head = network.head_weight.astype(hidden.dtype)

        def log_probs_after(hidden: jax.Array, tokens: jax.Array) -> jax.Array:
            logits = jnp.einsum("btd,vd->btv", hidden, head, preferred_element_type=jnp.float32)
            chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
            return chosen - jax.nn.logsumexp(logits, axis=-1)

        def one(candidate):
            tokens, size = candidate
            places = lengths[:, None] + jnp.arange(longest)
            after, _ = network.extend(tokens, places, jnp.ones_like(tokens), cache, blocks)
            before = jnp.concatenate([hidden[:, -1:], after[:, :-1]], axis=1)
            written = jnp.arange(longest) < size[:, None]
            return jnp.sum(log_probs_after(before, tokens), axis=-1, where=written)

        return jax.lax.map(one, (jnp.moveaxis(candidates, 1, 0), sizes.T)).T


def _ask(exam: Exam, template: PromptTemplate, tokenizer: Any, outputs: Mapping[str, str] | None) -> Iterator[_Asked]:
    questions = [q for q in exam.questions if q.kind == "choice" and math.comb(len(q.choices), q.k) <= _MAX_ANSWERS]
    for question in questions:
        answers = [frozenset(letters) for letters in itertools.combinations(question.letters, question.k)]
        if outputs is None:
            prompt = template.render(question, _CONDITION)
            texts = [(prompt, template.solve(question, answer, _CONDITION)) for answer in answers]
        else:
            prompt = template.render(question, "explain") + template.explained(outputs[question.id])
            texts = [(prompt, template.solve_explained(question, answer)) for answer in answers]
        encoded = [parts for parts in encode_parts(tokenizer, texts, rendered=False) if parts is not None]
        if len(encoded) < len(texts):
            raise UserError(
                f"template {template.name}: this tokenizer reads an answer after a prompt as another text than both "
                "together: end the prompt with a space or a line end, or begin the answer with one"
            )
        yield _Asked(question, encoded[0][0], answers, [answer for _, answer in encoded])


def likelihood_of_checkpoint(
    checkpoint: Checkpoint,
    exam: Exam,
    template: PromptTemplate,
    *,
    batch_size: int,
    mesh: MeshConfig,
    precision: PrecisionConfig,
) -> LikelihoodScore:
    """Scores the model of a checkpoint."""
    tokenizer = load_tokenizer(run_folder.tokenizer_of(checkpoint.run))
    model = load_model(checkpoint, precision, make_mesh(mesh))
    scorer = Likelihood(exam, template, tokenizer, model.config, model.structure, model.mesh, batch_size)
    return scorer.measure(model.params)


def likeliest_of_checkpoint(
    checkpoint: Checkpoint,
    exam: Exam,
    template: PromptTemplate,
    samples: Samples,
    *,
    batch_size: int,
    mesh: MeshConfig,
    precision: PrecisionConfig,
) -> dict[str, list[Grade]]:
    """Condition -> the grades of the likeliest answers, with nothing before them and after the model's explanations.

    Questions that can't be scored under one condition are left out of both.

    Raises:
      UserError: the samples are of another model, of chat prompts, or do not hold an explanation of every question.
    """
    if samples.chat:
        raise UserError(f"{samples.file} holds outputs to chat prompts: evaluate without --chat first")
    try:
        outputs = {question.id: samples.of(question.id, "explain")[0].text for question in exam.questions}
    except KeyError as missing:
        question, _ = missing.args[0]
        raise UserError(f"{samples.file} has no explanation of {quoted(question)}: evaluate this exam first") from None
    tokenizer = load_tokenizer(run_folder.tokenizer_of(checkpoint.run))
    model = load_model(checkpoint, precision, make_mesh(mesh))
    if samples.settings["model"] != model_fingerprint(model.params):
        raise UserError(f"{samples.file} holds outputs of another model ({samples.where}) than {checkpoint.label}")
    found = {}
    for condition, before in (("answer_only", None), ("explain", outputs)):
        scorer = Likelihood(exam, template, tokenizer, model.config, model.structure, model.mesh, batch_size, before)
        found[condition] = scorer.likeliest(model.params)
    scored = [question for question in exam.questions if all(question.id in letters for letters in found.values())]
    return {
        condition: [grade(question, Extraction(letters=letters[question.id], rule=_RULE)) for question in scored]
        for condition, letters in found.items()
    }
