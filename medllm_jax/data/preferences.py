"""Preference pairs: from JSON lines to a packed store for RPO, and the reference log-probabilities kept beside it.

A row of input has ``prompt``, ``chosen`` and ``rejected``: three plain strings, or three lists of chat messages
(``[{"role": ..., "content": ...}]``; the prompt ends with a user message, each response is one assistant message).
"""

import dataclasses
import hashlib
import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from medllm_jax.data.gate import Findings, Gate
from medllm_jax.data.packing import Segment, best_fit, check_sequence_length, pair_segment
from medllm_jax.data.reading import Dropped, Inputs, OnBad, ReadOptions, read_files, reject, text_problem
from medllm_jax.data.store import RowStore, StoreMetadata
from medllm_jax.data.store_writer import CorpusFacts, RowStoreWriter
from medllm_jax.data.tokenizer import (
    control_tokens,
    encode_plain,
    encode_rendered,
    eos_of,
    fingerprint,
    load_tokenizer,
)
from medllm_jax.errors import UserError

Messages = list[dict[str, str]]
Side = str | Messages

_SIDES = ("prompt", "chosen", "rejected")
_BATCH_PAIRS = 256  # for one call of the tokenizer
_ROLES = ("system", "user", "assistant")
_SAME = "chosen and rejected are the same"


class Pair(NamedTuple):
    """A preference pair as it was read, all three plain or all three messages, and where it stands, "file:line"."""

    prompt: Side
    chosen: Side
    rejected: Side
    where: str


def read_pairs(inputs: Inputs, on_bad: OnBad, dropped: Dropped) -> Iterator[Pair]:
    """The pairs of all inputs (.jsonl, .parquet; see ``reading.find_files``), in order, one in memory at a time.

    Raises UserError naming file and line of a row that is no pair; with on_bad "skip" it is counted in ``dropped``.
    """
    for row, where in read_files(inputs, ReadOptions(on_bad=on_bad), dropped, _SIDES):
        problem = _pair_problem(row)
        if problem:
            reject(where, problem, on_bad, dropped)
        else:
            yield Pair(row["prompt"], row["chosen"], row["rejected"], where)


def _pair_problem(row: dict[str, Any]) -> str | None:
    """Why a row is not a usable pair, or None."""
    for side in _SIDES:
        if side not in row:
            return f"no field `{side}`"
    in_messages = [isinstance(row[side], list) for side in _SIDES]
    if any(in_messages) and not all(in_messages):
        return "prompt, chosen and rejected are not all strings or all chat messages"
    for side in _SIDES:
        problem = _messages_problem(row[side], side) if all(in_messages) else text_problem(row[side])
        if problem:
            return f"{side} is {problem}"
    return _SAME if row["chosen"] == row["rejected"] else None


def _messages_problem(messages: list[Any], side: str) -> str | None:
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            return "not a list of messages with role and content"
        if message["role"] not in _ROLES:
            return f"of an unknown role (known: {', '.join(_ROLES)})"
        problem = text_problem(message["content"])
        if problem:
            return f"a message whose content is {problem}"
    roles = [message["role"] for message in messages]
    if side == "prompt":
        return None if roles and roles[-1] == "user" else "not a list of messages that ends with the user's"
    return None if roles == ["assistant"] else "not exactly one assistant message"


def prepare_pairs(
    inputs: Inputs,
    tokenizer_dir: str | epath.PathLike,
    output: str | epath.PathLike,
    sequence_length: int,
    *,
    pairs_per_row: int | None = None,
    max_prompt_tokens: int | None = None,
    on_bad: OnBad = "error",
    on_long: OnBad = "error",
    gate: Gate = Gate(),  # noqa: B008 (frozen)
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda pairs: None,
) -> StoreMetadata:
    """Preference pairs to a store of rows of ``sequence_length`` tokens; returns what ``store.json`` says.

    Prompt and responses are tokenised apart, and each response ends with the tokenizer's end-of-sequence token. Plain
    strings are plain text; messages go through the tokenizer's chat template, the response being what it adds to the
    prompt. A pair, prompt + chosen + rejected, is one segment of a row and never cut; pair k of a row is segment k + 1.
    A row takes as many pairs as fit, or at most ``pairs_per_row``.

    on_bad: what to do about a row that is no pair. on_long: what to do about a pair longer than a row, or with a prompt
    of more than ``max_prompt_tokens``. "skip" counts them by reason, with the first line numbers. gate: what is done
    about personal data, which is looked for in all pairs before any is written. progress is called now and then with
    the pairs kept so far. Nothing is left at ``output`` on failure.

    Raises UserError for such rows otherwise, for messages where the tokenizer has no chat template, an input without
    pairs, a tokenizer without the end-of-sequence token, and an output that exists (unless ``overwrite``).
    """
    check_sequence_length(sequence_length)
    if pairs_per_row is not None and pairs_per_row < 1:
        raise UserError(f"pairs_per_row is {pairs_per_row}: a row needs at least one pair")
    with RowStoreWriter(output, "pairs", sequence_length, overwrite=overwrite) as writer:
        tokenizer = load_tokenizer(tokenizer_dir)
        encoder = _PairEncoder(tokenizer, eos_of(tokenizer, tokenizer_dir), str(tokenizer_dir))
        found, dropped = Findings(), Dropped()
        for pair in read_pairs(inputs, on_bad, Dropped()):
            found.add(gate.scanner, tuple(_texts(pair)), pair.where)
        gate.check("the pairs", found)
        count = 0

        def segments() -> Iterator[Segment]:
            nonlocal count
            pairs = (_masked(pair, gate) for pair in read_pairs(inputs, on_bad, dropped))
            for batch in iter(lambda: list(itertools.islice(pairs, _BATCH_PAIRS)), []):
                for where, encoded in encoder(batch, on_bad, dropped):
                    problem = _length_problem(encoded, sequence_length, max_prompt_tokens)
                    if problem:
                        reject(where, problem, on_long, dropped)
                        continue
                    count += 1
                    yield pair_segment(*encoded)
                progress(count)

        for row in best_fit(segments(), sequence_length, max_segments=pairs_per_row):
            writer.append(row[None], "pairs")
        if not count:
            raise UserError(f"no preference pair to prepare in {inputs}; left out: {dropped}")
        return writer.finish(
            {"pairs": CorpusFacts(count, manifest={"personal_data": found.as_dict()})},
            packing="pairs",
            vocab_size=len(tokenizer),
            tokenizer_fingerprint=fingerprint(tokenizer_dir),
            eos_token_id=tokenizer.eos_token_id,
            dropped=dropped.as_dict(),
        )


Encoded = tuple[list[int], list[int], list[int]]  # token ids of prompt, chosen, rejected


@dataclasses.dataclass(frozen=True)
class _PairEncoder:
    """Pairs to token ids: renders messages, tokenises a batch at once, and ends the responses."""

    tokenizer: Any
    eos_token_id: int
    tokenizer_dir: str

    def __call__(self, pairs: Iterable[Pair], on_bad: OnBad, dropped: Dropped) -> Iterator[tuple[str, Encoded]]:
        """(where, token ids) of each pair that can be encoded, in order; the others are rejected."""
        control = control_tokens(self.tokenizer)
        sides: list[tuple[str, bool, tuple[str, str, str]]] = []
        for pair in pairs:
            # A control token written out is an accident, or an attempt to pass text that a template has rendered; it
            # would be tokenised as plain text, which is neither what was meant nor what the model will see.
            if any(token in text for text in _texts(pair) for token in control):
                reject(pair.where, "a control token stands in the text (use chat messages)", on_bad, dropped)
                continue
            rendered = isinstance(pair.prompt, list)
            if not rendered:
                sides.append((pair.where, False, pair[:3]))
                continue
            texts = self._render(pair)
            if texts is None:
                reject(pair.where, "the chat template cannot render the messages", on_bad, dropped)
            else:
                sides.append((pair.where, True, texts))

        plain = iter(
            encode_plain(self.tokenizer, [text for _, rendered, texts in sides if not rendered for text in texts])
        )
        chat = iter(
            encode_rendered(self.tokenizer, [text for _, rendered, texts in sides if rendered for text in texts])
        )
        for where, rendered, _ in sides:
            source = chat if rendered else plain
            prompt, chosen, rejected = (next(source) for _ in _SIDES)
            chosen, rejected = self._ended(chosen), self._ended(rejected)
            if chosen == rejected:
                reject(where, _SAME, on_bad, dropped)
            else:
                yield where, (prompt, chosen, rejected)

    def _render(self, pair: Pair) -> tuple[str, str, str] | None:
        """Prompt and responses as the chat template writes them, or None where it refuses or rewrites the prompt."""
        if not self.tokenizer.chat_template:
            raise UserError(
                f"{pair.where} has chat messages, and the tokenizer in {self.tokenizer_dir} has no chat template: "
                "use plain strings, or a tokenizer with a template"
            )
        import jinja2

        try:
            prompt = self.tokenizer.apply_chat_template(pair.prompt, tokenize=False, add_generation_prompt=True)
            full = [
                self.tokenizer.apply_chat_template(pair.prompt + response, tokenize=False)
                for response in (pair.chosen, pair.rejected)
            ]
        except jinja2.TemplateError:
            return None
        if not all(text.startswith(prompt) for text in full):
            return None
        # The line break that templates write after a turn comes after the model has stopped: no part of the response.
        chosen, rejected = (text.removeprefix(prompt).rstrip() for text in full)
        return prompt, chosen, rejected

    def _ended(self, response: list[int]) -> list[int]:
        """The response with its end-of-sequence token, which the template may already have written."""
        return response if response[-1:] == [self.eos_token_id] else [*response, self.eos_token_id]


def _texts(pair: Pair) -> Iterator[str]:
    for side in pair[:3]:
        if isinstance(side, str):
            yield side
        else:
            yield from (message["content"] for message in side)


def _masked(pair: Pair, gate: Gate) -> Pair:
    def mask(side: Side) -> Side:
        if isinstance(side, str):
            return gate.mask(side)
        return [message | {"content": gate.mask(message["content"])} for message in side]

    return pair._replace(prompt=mask(pair.prompt), chosen=mask(pair.chosen), rejected=mask(pair.rejected))


def _length_problem(encoded: Encoded, sequence_length: int, max_prompt_tokens: int | None) -> str | None:
    if max_prompt_tokens is not None and len(encoded[0]) > max_prompt_tokens:
        return f"the prompt is longer than {max_prompt_tokens} tokens"
    if sum(map(len, encoded)) > sequence_length:
        return f"prompt, chosen and rejected together are longer than a row of {sequence_length} tokens"
    return None


def write_reference(store: RowStore, model_fingerprint: str, values: np.ndarray) -> None:
    """Keeps the reference model's log-probabilities beside the pairs, replacing earlier ones of the same model.

    model_fingerprint: any string that is equal iff the model is. values: float32 [N, P, 2], sums over the tokens of the
    chosen and the rejected response of pair k of a row; 0 where the row has no pair k. ValueError for any other shape
    or type, and for values that are not finite.
    """
    expected = _reference_shape(store)
    if values.shape != expected or values.dtype != np.float32:
        raise ValueError(f"reference is {values.dtype} {values.shape}, {store!r} needs float32 {expected}")
    if not np.isfinite(values).all():
        raise ValueError("reference log-probabilities are not finite")
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(values, "<f4"))
    data = buffer.getvalue()
    folder = _reference_folder(store, model_fingerprint)
    folder.mkdir(parents=True, exist_ok=True)
    description = _reference_description(store, model_fingerprint) | {"sha256": hashlib.sha256(data).hexdigest()}
    # The description comes last, and its digest binds the values: a half-written pair of files is refused.
    (folder / "reference.json").unlink(missing_ok=True)
    (folder / "values.npy").write_bytes(data)
    (folder / "reference.json").write_text(json.dumps(description, indent=2, sort_keys=True) + "\n")


def read_reference(store: RowStore, model_fingerprint: str) -> np.ndarray:
    """The log-probabilities that ``write_reference`` kept for this model and these very pairs: float32 [N, P, 2].

    Raises UserError, saying what to run, where there are none or they are damaged.
    """
    folder = _reference_folder(store, model_fingerprint)
    remedy = "run `medllm reference` with the model that training starts from"
    if not (folder / "reference.json").exists():
        raise UserError(
            f"store {store.path} has no reference log-probabilities of this model and these pairs: {remedy}"
        )
    damaged = UserError(f"the reference log-probabilities in {folder} are damaged: {remedy}")
    try:
        description = json.loads((folder / "reference.json").read_bytes())
        data = (folder / "values.npy").read_bytes()
    except (ValueError, FileNotFoundError) as error:
        raise damaged from error
    if not isinstance(description, dict):
        raise damaged
    digest = description.pop("sha256", None)
    if description != _reference_description(store, model_fingerprint) or digest != hashlib.sha256(data).hexdigest():
        raise damaged
    return np.load(io.BytesIO(data), allow_pickle=False).astype(np.float32, copy=False)


def _reference_shape(store: RowStore) -> tuple[int, int, int]:
    if store.metadata.kind != "pairs":
        raise ValueError(f"{store!r} holds no pairs")
    return (len(store), store.metadata.pairs_per_row, 2)


def _reference_description(store: RowStore, model_fingerprint: str) -> dict[str, Any]:
    return {
        "format_version": 1,
        "model_fingerprint": model_fingerprint,
        "store_digest": store.metadata.digest,
        "shape": list(_reference_shape(store)),
    }


def _reference_folder(store: RowStore, model_fingerprint: str) -> epath.Path:
    # Both hashes are in the name: references of several models, and of pairs since replaced, never meet.
    key = hashlib.sha256(json.dumps([model_fingerprint, store.metadata.digest]).encode()).hexdigest()[:16]
    return store.path / "reference" / key
