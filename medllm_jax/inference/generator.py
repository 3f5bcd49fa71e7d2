"""Batched generation with a key/value cache: greedy or sampled, jitted, in chunks so that stop strings can be seen."""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, UInt

from medllm_jax.checkpoint.fingerprint import model_fingerprint
from medllm_jax.checkpoint.handle import Checkpoint
from medllm_jax.checkpoint.load_model import LoadedModel, load_model
from medllm_jax.config.schema import MeshConfig, PrecisionConfig
from medllm_jax.data.tokenizer import encode_prompts, end_of_turn, load_tokenizer, named_token_ids
from medllm_jax.distributed.compiler_options import compiler_options
from medllm_jax.distributed.sharding import check_divisible, make_mesh, on_cpus, rows_over
from medllm_jax.errors import UserError
from medllm_jax.evaluation.prompts import Prompt
from medllm_jax.evaluation.sampling import Completion, SamplingParams, cut_at_stop
from medllm_jax.model.qwen2 import Cache, Qwen2
from medllm_jax.storage import run_folder
from medllm_jax.storage.json_files import read_json

_CHUNK = 16  # tokens between two looks at the text on the host
_LEAST_TEMPERATURE = float(np.finfo(np.float32).tiny)
_INFINITY = int(np.float32(np.inf).view(np.int32))
# Prompts are padded to one of these widths, or to its double, fourfold, ...: a program is compiled for each width.
_WIDTHS = (64, 96, 320, 448)
_LEAST_COLUMNS = 128  # of a cache that grows
_AHEAD = 4  # batches that prompts are put into by their lengths


class _Decoding(NamedTuple):
    """What the decode loop carries: logits of the next token, its rotary position, which rows are finished, the cache,
    and a key for each row's random numbers.
    """

    logits: Float[Array, "rows vocab"]
    position: Int[Array, " rows"]
    finished: Bool[Array, " rows"]
    cache: Cache
    keys: Key[Array, " rows"]


class Generator:
    """Completes prompts with a model, `batch_size` at a time."""

    def __init__(self, model: LoadedModel, tokenizer: Any, eos_token_ids: Sequence[int], batch_size: int):
        check_divisible(model.mesh, model.config, batch_size)
        self._model, self._tokenizer, self._batch_size = model, tokenizer, batch_size
        self._eos = jnp.asarray(sorted(set(eos_token_ids)), jnp.int32)
        options = {"compiler_options": compiler_options(model.mesh)}
        self._prefill = jax.jit(self._prefill_rows, static_argnames="columns", **options)
        self._widen = jax.jit(_with_columns, static_argnames="columns", **options)
        self._decode = jax.jit(
            self._decode_chunk, static_argnames=("temperature", "top_p"), donate_argnums=2, **options
        )

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        *,
        batch_size: int,
        mesh: MeshConfig = MeshConfig(),  # noqa: B008 (frozen)
        precision: PrecisionConfig = PrecisionConfig(),  # noqa: B008 (frozen)
    ) -> "Generator":
        """The model of a checkpoint, with the tokenizer that its run carries."""
        folder = run_folder.tokenizer_of(checkpoint.run)
        tokenizer = load_tokenizer(folder)
        model = load_model(checkpoint, precision, make_mesh(mesh))
        return cls(model, tokenizer, eos_token_ids(folder, tokenizer), batch_size)

    @property
    def chats(self) -> bool:
        """Whether there is a chat template for messages."""
        return bool(getattr(self._tokenizer, "chat_template", None))

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the model's weights."""
        return model_fingerprint(self._model.params)

    @functools.cached_property
    def _blocks(self) -> Any:
        """The weights of each block as decoding on CPUs wants them; elsewhere None."""
        if not on_cpus(self._model.mesh):
            return None
        return jax.jit(lambda params: self._network(params).separate_blocks())(self._model.params)

    def sample(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], params: SamplingParams
    ) -> Iterator[Sequence[Completion]]:
        """`params.n` completions of each prompt, in order; see `evaluation.sampling.Sample`."""
        repeated = [prompt for prompt in prompts for _ in range(params.n)]
        draws = [(seed, number) for seed in seeds for number in range(params.n)]
        yield from zip(*[self(repeated, params, draws)] * params.n, strict=True)

    def __call__(
        self, prompts: Sequence[Prompt], params: SamplingParams, draws: Sequence[tuple[int, int]] | None = None
    ) -> Iterator[Completion]:
        """One completion of each prompt, in order; UserError for a prompt without room in the model's context.

        prompts: texts that the model continues, or chat messages that it answers.
        draws: seed and number of each prompt, both uint32, which its random numbers come from: a completion depends on
        its prompt and on these, not on the batch that it is in. By default the seed is that of `params`, and the number
        is the prompt's place.
        """
        encoded = encode_prompts(self._tokenizer, prompts)
        context, new = self._model.config.max_position_embeddings, params.max_new_tokens
        for number, tokens in enumerate(encoded):
            if not tokens:
                raise UserError(f"prompt {number} is empty: there is nothing to continue")
            if len(tokens) + new > context:
                raise UserError(
                    f"prompt {number} has {len(tokens)} tokens and up to {new} may follow, but the model's context is "
                    f"{context}: shorten the prompt (fewer examples in the template) or the template's max_new_tokens"
                )
        draws = [(params.seed, place) for place in range(len(encoded))] if draws is None else draws
        for some in _batched(range(len(encoded)), _AHEAD * self._batch_size):
            completions: dict[int, Completion] = {}
            for batch in _batched(sorted(some, key=lambda place: len(encoded[place])), self._batch_size):
                found = self._complete([encoded[place] for place in batch], [draws[place] for place in batch], params)
                completions |= zip(batch, found, strict=True)
            yield from (completions[place] for place in some)

    def _complete(
        self, prompts: list[list[int]], draws: Sequence[tuple[int, int]], params: SamplingParams
    ) -> list[Completion]:
        state = self._start(prompts, draws, params)
        weights = self._model.params, self._blocks
        width, room = self._columns(max(map(len, prompts)), params.max_new_tokens)
        outputs: list[list[int]] = [[] for _ in prompts]
        endings: list[Completion | None] = [None] * len(prompts)  # once a row has ended
        for made in range(0, params.max_new_tokens, _CHUNK):
            if width + made + _CHUNK > room:
                room *= 2
                state = self._widen(state, columns=room)
            state, tokens = self._decode(*weights, state, temperature=params.temperature, top_p=params.top_p)
            for row, new in enumerate(np.asarray(tokens)[: len(prompts)].tolist()):
                if endings[row] is None:
                    outputs[row] = (outputs[row] + new)[: params.max_new_tokens]
                    endings[row] = self._ending(outputs[row], params)
            if all(endings):
                break
            ended = np.ones(self._batch_size, bool)
            ended[: len(prompts)] = [ending is not None for ending in endings]
            state = state._replace(finished=jax.device_put(ended, state.finished.sharding))
        return [ending for ending in endings if ending is not None]  # the last chunk ended all of them

    def _ending(self, tokens: list[int], params: SamplingParams) -> Completion | None:
        """The completion, if these tokens end it."""
        whole = self._through_eos(tokens)
        ended = whole[-1] in self._eos_set
        text = self._tokenizer.decode(whole[:-1] if ended else whole, skip_special_tokens=False)
        cut = cut_at_stop(text, params.stop)
        if cut is not None:
            return Completion(cut, "stop", whole)
        if ended:
            return Completion(text, "stop", whole)
        return Completion(text, "length", whole) if len(tokens) >= params.max_new_tokens else None

    def _through_eos(self, tokens: list[int]) -> tuple[int, ...]:
        end = next((place for place, token in enumerate(tokens) if token in self._eos_set), len(tokens))
        return tuple(tokens[: end + 1])

    @functools.cached_property
    def _eos_set(self) -> frozenset[int]:
        return frozenset(np.asarray(self._eos).tolist())

    def _start(self, prompts: list[list[int]], draws: Sequence[tuple[int, int]], params: SamplingParams) -> _Decoding:
        """Runs the prompts through the model; they are padded at their left, so that all end in the same column."""
        width, columns = self._columns(max(map(len, prompts)), params.max_new_tokens)
        tokens = np.zeros((self._batch_size, width), np.int32)
        lengths = np.ones(self._batch_size, np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, width - len(prompt) :] = prompt
            lengths[row] = len(prompt)
        seeds, numbers = np.zeros((2, self._batch_size), np.uint32)
        seeds[: len(prompts)], numbers[: len(prompts)] = zip(*draws, strict=True)
        sharding = rows_over(self._model.mesh)
        placed = (jax.device_put(array, sharding) for array in (tokens, lengths, seeds, numbers))
        return self._prefill(self._model.params, *placed, columns=columns)

    def lower_prefill(self, prompt_tokens: int, params: SamplingParams) -> jax.stages.Lowered:
        """The program that reads prompts of so many tokens, for a look at what it costs; the weights may be shapes."""
        sharding, rows = rows_over(self._model.mesh), self._batch_size
        width, columns = self._columns(prompt_tokens, params.max_new_tokens)
        shapes = [((rows, width), jnp.int32), ((rows,), jnp.int32), ((rows,), jnp.uint32), ((rows,), jnp.uint32)]
        placed = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in shapes]
        return self._prefill.lower(self._model.params, *placed, columns=columns)

    def lower_decode(self, state: Any, params: SamplingParams) -> jax.stages.Lowered:
        """The program that adds a chunk of tokens to what `lower_prefill`'s returns; its shapes and shardings do."""
        return self._decode.lower(self._model.params, None, state, temperature=params.temperature, top_p=params.top_p)

    def _columns(self, prompt_tokens: int, new_tokens: int) -> tuple[int, int]:
        """Columns that the longest prompt is padded to, and those of the cache.

        On CPUs the cache begins with a power of two and is doubled when it is full: a token costs what is in it, and
        most completions end long before the limit. Elsewhere compiling takes longer, memory is what was planned, and it
        has room for all of them.
        """
        width = _next_size(prompt_tokens, _WIDTHS)
        if on_cpus(self._model.mesh):
            return width, _next_size(width + _CHUNK, (_LEAST_COLUMNS,))
        return width, width + -(-new_tokens // _CHUNK) * _CHUNK

    # --- on the device ---

    def _network(self, params: Any) -> Qwen2:
        return nnx.merge(self._model.structure, params)

    def _prefill_rows(
        self,
        params: Any,
        tokens: Int[Array, "rows width"],
        lengths: Int[Array, " rows"],
        seeds: UInt[Array, " rows"],
        numbers: UInt[Array, " rows"],
        *,
        columns: int,
    ) -> _Decoding:
        network = self._network(params)
        batch, width = tokens.shape
        positions = jnp.arange(width) - (width - lengths)[:, None]
        segment_ids = (positions >= 0).astype(jnp.int32)
        hidden, cache = network.prefill(
            tokens, jnp.maximum(positions, 0), segment_ids, columns, stacked=not on_cpus(self._model.mesh)
        )
        keys = jax.vmap(lambda seed, number: jax.random.fold_in(jax.random.key(seed), number))(seeds, numbers)
        finished = jnp.zeros(batch, bool)
        return _Decoding(_next_logits(network, hidden), lengths, finished, cache, keys)

    def _decode_chunk(
        self, params: Any, blocks: Any, state: _Decoding, *, temperature: float, top_p: float
    ) -> tuple[_Decoding, Int[Array, "rows chunk"]]:
        """Up to `_CHUNK` more tokens of each row; stops early once every row is finished."""
        network = self._network(params)
        padding = self._eos[0]
        uniform = _uniform(state.keys, state.position)

        def proceed(carry):
            count, state, _ = carry
            return (count < _CHUNK) & ~jnp.all(state.finished)

        def body(carry):
            count, state, tokens = carry
            chosen = choose(state.logits, uniform[:, count], temperature, top_p)
            chosen = jnp.where(state.finished, padding, chosen)
            tokens = tokens.at[:, count].set(chosen)
            columns = chosen[:, None], state.position[:, None], jnp.ones_like(chosen)[:, None]
            hidden, cache = network.extend(*columns, state.cache, blocks)
            finished = state.finished | jnp.isin(chosen, self._eos)
            logits = _next_logits(network, hidden)
            return count + 1, _Decoding(logits, state.position + 1, finished, cache, state.keys), tokens

        tokens = jnp.full((state.position.shape[0], _CHUNK), padding)
        _, state, tokens = jax.lax.while_loop(proceed, body, (0, state, tokens))
        return state, tokens


def _with_columns(state: _Decoding, *, columns: int) -> _Decoding:
    return state._replace(cache=state.cache.with_columns(columns))


def _uniform(keys: Key[Array, " rows"], position: Int[Array, " rows"]) -> Float[Array, "rows chunk"]:
    """A number from [0, 1) for each token of a chunk, by its row's key and its place in the row."""

    def number(key: Key[Array, ""], place: Int[Array, ""]) -> Float[Array, ""]:
        return jax.random.uniform(jax.random.fold_in(key, place))

    places = position[:, None] + jnp.arange(_CHUNK)
    return jax.vmap(jax.vmap(number, in_axes=(None, 0)))(keys, places)


def _batched(places: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (places[start : start + size] for start in range(0, len(places), size))


def _next_size(least: int, sizes: Sequence[int]) -> int:
    """The smallest of some sizes, or of their doubles, fourfolds, ..., that is at least so large."""
    return min(size << max(0, (-(-least // size) - 1).bit_length()) for size in sizes)


def _next_logits(network: Qwen2, hidden: Float[Array, "rows columns hidden"]) -> Float[Array, "rows vocab"]:
    """float32 logits of the token after the last column."""
    head = network.head_weight.astype(hidden.dtype)
    return jnp.einsum("bd,vd->bv", hidden[:, -1], head, preferred_element_type=jnp.float32)


def choose(
    logits: Float[Array, "rows vocab"], uniform: Float[Array, " rows"], temperature: float, top_p: float
) -> Int[Array, " rows"]:
    """One token id (int32) a row of logits (float32): the likeliest, or drawn with the row's number from [0, 1)."""
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # The greatest is 0, whatever the temperature: divided by one near 0 it would be infinite.
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / max(temperature, _LEAST_TEMPERATURE)
    if top_p < 1:
        logits = jnp.where(_nucleus(logits, top_p), logits, -jnp.inf)
    return _draw(logits, uniform)


def _nucleus(logits: Float[Array, "rows vocab"], top_p: float) -> Bool[Array, "rows vocab"]:
    """Which tokens stay: the likeliest ones, as few as reach top_p. Logits are at most 0, and 0 is among them.

    A token stays if the likelier ones do not reach top_p by themselves, so the likeliest always stays; of tokens that
    tie with the last one, the first. The last one's logit is found by halving the range of floats, whose bits are in
    the order of their sizes: 31 sums over the vocabulary, a small part of what it takes to sort it.
    """
    weights = jnp.exp(logits)
    enough = top_p * jnp.sum(weights, axis=-1, keepdims=True)
    below = jax.lax.bitcast_convert_type(jnp.abs(logits), jnp.int32)  # how far a token is below the likeliest

    def above(bound: Int[Array, "rows 1"]) -> Float[Array, "rows 1"]:
        return jnp.sum(weights, axis=-1, keepdims=True, where=below < bound)

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        stays = above(middle) < enough
        return jnp.where(stays, middle, low), jnp.where(stays, high, middle)

    first = jnp.zeros(enough.shape, jnp.int32)
    beyond = first + (_INFINITY + 1)
    bound, _ = jax.lax.fori_loop(0, _INFINITY.bit_length(), halve, (first, beyond))
    last = jnp.max(below, axis=-1, keepdims=True, where=below <= bound, initial=0)
    ties = below == last
    weight = jnp.exp(-jax.lax.bitcast_convert_type(last, jnp.float32))
    room = jnp.ceil((enough - above(last)) / weight)
    return (below < last) | (ties & (jnp.cumsum(ties, axis=-1) <= room))


def _draw(logits: Float[Array, "rows vocab"], uniform: Float[Array, " rows"]) -> Int[Array, " rows"]:
    """The token (int32) at which the running sum of probabilities passes a number from [0, 1).

    One random number a token instead of one for each of the vocabulary's entries. Sums run over groups of tokens first,
    and then inside a group: fewer to add up, and less to round.
    """
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    size = math.isqrt(weights.shape[-1])
    groups = jnp.pad(weights, ((0, 0), (0, -weights.shape[-1] % size))).reshape(len(weights), -1, size)
    sums = jnp.sum(groups, axis=-1)
    running = jnp.cumsum(sums, axis=-1)
    target = uniform * running[:, -1]
    group = _first_beyond(sums, running, target)[:, None]
    before = jnp.take_along_axis(running - sums, group, axis=-1)[:, 0]
    inside = jnp.take_along_axis(groups, group[..., None], axis=1)[:, 0]
    return group[:, 0] * size + _first_beyond(inside, jnp.cumsum(inside, axis=-1), target - before)


def _first_beyond(
    weights: Float[Array, "rows places"], running: Float[Array, "rows places"], target: Float[Array, " rows"]
) -> Int[Array, " rows"]:
    """Where the running sum first passes the target (int32); whatever rounding does, a place with weight."""
    return jnp.argmax(jnp.where(weights > 0, running > target[:, None], -1), axis=-1).astype(jnp.int32)


def eos_token_ids(folder: epath.Path, tokenizer: Any) -> list[int]:
    """Token ids that end a text: those of generation_config.json if it is there, the tokenizer's own, and what ends an
    assistant's turn in its chat template, which trained responses have before the tokenizer's.
    """
    ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    file = folder / "generation_config.json"
    if file.exists():
        ids += named_token_ids(read_json(file), "eos_token_id", str(file))
    turn = end_of_turn(tokenizer)
    ids += [] if turn is None else [turn]
    if not ids:
        raise UserError(f"the tokenizer in {folder} names no end-of-sequence token: set eos_token there")
    return ids
