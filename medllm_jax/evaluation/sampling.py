"""What a model is asked for, and what it answers: the same types for every way to ask one."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from medllm_jax.errors import UserError
from medllm_jax.evaluation.prompts import Prompt
from medllm_jax.ranges import NewTokens, Ranged, Samples, Seed, Temperature, TopP


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams(Ranged):
    """How completions are drawn; the names are vLLM's, but for `max_new_tokens`.

    n: completions of each prompt. temperature: 0 takes the likeliest token. top_p: draws from the smallest set of
    tokens whose probabilities reach it. seed: what random numbers come from. max_new_tokens: tokens of a completion at
    most (default as vLLM's). stop: strings that end a completion and are cut off.
    """

    n: Samples = 1
    temperature: Temperature = 0.0
    top_p: TopP = 1.0
    seed: Seed = 0
    max_new_tokens: NewTokens = 16
    stop: tuple[str, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        if not self.temperature and self.n > 1:
            raise UserError(f"temperature is {self.temperature}: {self.n} samples would all be the same")


UNANSWERED = "unanswered"  # why a completion ended that a server, whatever was tried, did not give

# What engines and services call the two ways in which a completion ends.
_STOP = ("stop", "eos", "eos_token", "stop_token", "stop_sequence", "stop_string", "end_turn", "end_of_turn", "end")
_STOP += ("complete", "completed", "finish", "finished", "done", "none", "null", "")
_LENGTH = ("length", "max_tokens", "max_length", "max_new_tokens", "max_output_tokens", "model_length", "token_limit")
_FINISH_REASONS = dict.fromkeys(_STOP, "stop") | dict.fromkeys(_LENGTH, "length")


def finish_reason_of(said: str | None) -> str:
    """ "stop" or "length", whatever a program calls it; another word as it is, cut short. None is stop."""
    word = "" if said is None else said.strip()
    return _FINISH_REASONS.get(word.lower(), word[:40])


class Completion(NamedTuple):
    """What followed a prompt.

    text: without the stop string or token that ended it. finish_reason: "length" where it ended at the limit, "stop"
    otherwise, a word of a server's that stands for neither, or UNANSWERED where nothing came. tokens: its ids, with the
    one that ended it; () where only the text is known.
    """

    text: str
    finish_reason: str
    tokens: tuple[int, ...] = ()


# Prompts, a seed (31 bits) for each, and params -> `params.n` completions of each prompt, which depend on the prompt
# and its seed alone; `params.seed` is not looked at.
Sample = Callable[[Sequence[Prompt], Sequence[int], SamplingParams], Iterable[Sequence[Completion]]]


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A model to sample. `model` is equal iff the model is; `where` is for people; `chat`: prompts are messages."""

    model: str
    where: str
    sample: Sample
    chat: bool = False


def cut_at_stop(text: str, stop: Sequence[str]) -> str | None:
    """The text before the first stop string in it; None where it holds none."""
    places = [place for string in stop if (place := text.find(string)) >= 0]
    return text[: min(places)] if places else None
