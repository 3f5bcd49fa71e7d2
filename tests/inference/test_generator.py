"""Generation: greedy as in `transformers`, alone as in a batch, sampled from the right set, stopped in time."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from medllm_jax.checkpoint.handle import open_checkpoint
from medllm_jax.checkpoint.load_model import LoadedModel
from medllm_jax.config.schema import MeshConfig, PrecisionConfig
from medllm_jax.data.tokenizer import load_tokenizer
from medllm_jax.distributed.sharding import make_mesh
from medllm_jax.errors import UserError
from medllm_jax.evaluation.sampling import SamplingParams
from medllm_jax.inference.generator import (
    _WIDTHS,
    Generator,
    _draw,
    _next_size,
    _nucleus,
    _uniform,
    choose,
    eos_token_ids,
)
from medllm_jax.model.abstract import abstract_model, random_params
from tests.tiny import CHAT_TEMPLATE, make_tokenizer
from tests.world import tiny_config

PROMPTS = ["The patient", "発熱と咳", "A", "Q7: heart liver test. Which drug? " * 3, "高血圧の治療には"]


@pytest.fixture(scope="module")
def generator(world):
    return Generator.from_checkpoint(
        open_checkpoint(world.model), batch_size=8, precision=PrecisionConfig(compute="float32")
    )


def one_device_generator(world, batch_size, seed=1):
    """A model on one device whose random weights are wide, so that its likeliest tokens are no ties."""
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    plan = abstract_model(tiny_config(initializer_range=0.2), PrecisionConfig(compute="float32"), mesh)
    model = LoadedModel(plan.config, plan.structure, random_params(plan, seed), mesh)
    tokenizer = load_tokenizer(world.tokenizer)
    return Generator(model, tokenizer, [tokenizer.eos_token_id], batch_size)


def test_greedy_equals_transformers(world, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import Qwen2Config, Qwen2ForCausalLM

    ours = one_device_generator(world, batch_size=4)
    config = tiny_config()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "tie_word_embeddings", "rms_norm_eps", "max_position_embeddings")
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    theirs = Qwen2ForCausalLM(Qwen2Config(**{name: getattr(config, name) for name in names}, rope_parameters=rope))
    params = jax.device_get(ours._model.params)
    state = {
        "model.embed_tokens.weight": params["embed_tokens"]["weight"],
        "model.norm.weight": params["norm"]["weight"],
    }
    for path, stacked in jax.tree_util.tree_leaves_with_path(params["layers"]):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        state |= {f"model.layers.{layer}.{name}": weight for layer, weight in enumerate(stacked)}
    loaded = theirs.load_state_dict({k: torch.tensor(np.array(v)) for k, v in state.items()}, strict=False)
    assert loaded.missing_keys == ["lm_head.weight"] and not loaded.unexpected_keys

    eos = ours._tokenizer.eos_token_id
    for prompt, completion in zip(PROMPTS, ours(PROMPTS, SamplingParams(max_new_tokens=24)), strict=True):
        ids = torch.tensor([ours._tokenizer(prompt)["input_ids"]])
        with torch.no_grad():
            whole = theirs.generate(
                ids, do_sample=False, max_new_tokens=24, eos_token_id=eos, pad_token_id=eos, use_cache=True
            )
        assert completion.tokens == tuple(whole[0, ids.shape[1] :].tolist())


@pytest.mark.parametrize(
    "sampling",
    [SamplingParams(max_new_tokens=20), SamplingParams(max_new_tokens=20, temperature=1.0, top_p=0.9, seed=3)],
)
def test_a_batch_equals_prompts_alone(world, sampling):
    """Left padding, the batch's size and the mesh change nothing."""
    together = list(one_device_generator(world, batch_size=len(PROMPTS))(PROMPTS, sampling))
    in_turn = list(one_device_generator(world, batch_size=1)(PROMPTS, sampling))
    assert together == in_turn
    assert len({completion.tokens for completion in together}) == len(PROMPTS)


def test_a_cache_that_grows_and_batches_by_length_change_nothing(world, monkeypatch):
    """Completions come in the order of their prompts, as from one batch whose cache has all columns at once."""
    prompts = [prompt * (1 + number % 3) for number, prompt in enumerate(PROMPTS * 2)]
    sampling = SamplingParams(max_new_tokens=90, temperature=1.0)
    grown = list(one_device_generator(world, batch_size=2)(prompts, sampling))
    monkeypatch.setattr("medllm_jax.inference.generator._LEAST_COLUMNS", 256)
    assert grown == list(one_device_generator(world, batch_size=len(prompts))(prompts, sampling))
    assert max(len(completion.tokens) for completion in grown) > 128 - 64


def test_blocks_that_are_scanned_say_what_separate_ones_do(world, monkeypatch):
    """The programs of other devices than CPUs: stacked caches, with all columns from the start."""
    sampling = SamplingParams(max_new_tokens=20, temperature=1.0, top_p=0.9)
    separate = list(one_device_generator(world, batch_size=4)(PROMPTS, sampling))
    monkeypatch.setattr("medllm_jax.inference.generator.on_cpus", lambda mesh: False)
    assert separate == list(one_device_generator(world, batch_size=4)(PROMPTS, sampling))


@pytest.mark.parametrize(
    ("least", "size"),
    [(1, 64), (64, 64), (65, 96), (97, 128), (192, 192), (257, 320), (385, 448), (449, 512), (2049, 2560)],
)
def test_widths_are_few(least, size):
    assert _next_size(least, _WIDTHS) == size


def test_on_eight_devices_equals_one(world, generator):
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    whole = generator._model.params
    plan = abstract_model(generator._model.config, PrecisionConfig(compute="float32"), mesh)
    model = LoadedModel(plan.config, plan.structure, jax.device_put(jax.device_get(whole), jax.devices()[0]), mesh)
    alone = Generator(model, generator._tokenizer, generator._eos.tolist(), 3)
    assert list(alone(PROMPTS, SamplingParams(max_new_tokens=12))) == list(
        generator(PROMPTS, SamplingParams(max_new_tokens=12))
    )


def test_samples_repeat_by_seed_and_differ_by_prompt_number(generator):
    def draw(seed):
        params = SamplingParams(max_new_tokens=12, temperature=1.0, seed=seed)
        return [completion.tokens for completion in generator(["発熱"] * 10, params)]

    first = draw(0)
    assert first == draw(0)
    assert first != draw(1)
    assert len(set(first)) > 5


def test_a_seed_and_number_of_its_own_make_a_prompt_what_it_is_elsewhere(generator):
    hot = SamplingParams(max_new_tokens=12, temperature=1.0)
    apart = [
        list(generator(["発熱"] * 3, SamplingParams(max_new_tokens=12, temperature=1.0, seed=seed))) for seed in (7, 8)
    ]
    draws = [(8, 2), (7, 0), (7, 1), (8, 0)]
    together = list(generator(["発熱"] * 4, hot, draws))
    assert together == [apart[seed - 7][number] for seed, number in draws]
    assert len({completion.tokens for completion in together}) == 4


def test_stop_string_cuts_the_text_and_ends_the_completion(generator):
    whole = next(iter(generator(["The patient"], SamplingParams(max_new_tokens=40, temperature=1.0, seed=5))))
    stop = whole.text[4:7]
    cut = next(
        iter(generator(["The patient"], SamplingParams(max_new_tokens=40, temperature=1.0, seed=5, stop=(stop,))))
    )
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert len(cut.tokens) < len(whole.tokens)


def test_end_of_sequence_ends_a_completion(generator):
    """Whatever greedy decoding says third, taken as an end-of-sequence token, ends it there."""
    free = next(iter(generator(["The patient"], SamplingParams(max_new_tokens=8))))
    third = free.tokens[2]
    first = free.tokens.index(third)
    ending = Generator(generator._model, generator._tokenizer, [third], 8)
    ended = next(iter(ending(["The patient"], SamplingParams(max_new_tokens=8))))
    assert ended.tokens == free.tokens[: first + 1]
    assert ended.finish_reason == "stop"
    assert ended.text == generator._tokenizer.decode(free.tokens[:first])


def test_length_limit_is_kept_and_named(generator):
    assert {len(c.tokens) <= 5 for c in generator(PROMPTS, SamplingParams(max_new_tokens=5, temperature=1.0))} == {True}
    assert any(
        c.finish_reason == "length" for c in generator(PROMPTS, SamplingParams(max_new_tokens=5, temperature=1.0))
    )


def test_top_p_draws_from_the_smallest_set_that_reaches_it():
    probs = np.array([0.05, 0.4, 0.25, 0.3])
    logits = jnp.tile(jnp.log(probs), (4000, 1))
    uniform = jax.random.uniform(jax.random.key(0), 4000)
    drawn = np.bincount(np.asarray(choose(logits, uniform, 1.0, 0.6)), minlength=4) / 4000
    assert drawn[0] == drawn[2] == 0
    np.testing.assert_allclose(drawn[[1, 3]], [4 / 7, 3 / 7], atol=0.03)


@pytest.mark.parametrize(("top_p", "least", "most"), [(0.1, 20, 21), (1e-6, 1, 1)])
def test_top_p_keeps_no_more_of_tokens_that_tie_than_it_takes(top_p, least, most):
    uniform = jax.random.uniform(jax.random.key(0), 500)
    drawn = set(np.asarray(choose(jnp.zeros((500, 200)), uniform, 1.0, top_p)).tolist())
    assert len(drawn) >= 0.95 * least and drawn <= set(range(most))


@pytest.mark.parametrize("size", [1, 5, 384, 5000])
@pytest.mark.parametrize("top_p", [1e-3, 0.5, 0.9, 0.999])
def test_top_p_keeps_what_sorting_finds(size, top_p):
    """The other in float64, with ties and tokens of no probability among them."""
    rng = np.random.default_rng(size)
    logits = 3 * rng.standard_normal((20, size)).astype(np.float32)
    logits[10:] = np.round(logits[10:])
    logits[:, rng.random(size) < 0.2] = -np.inf
    logits[:, size // 2] = logits.max(axis=-1) + 0.5
    logits -= logits.max(axis=-1, keepdims=True)
    order = np.argsort(-logits, axis=-1, kind="stable")
    probabilities = np.exp(np.float64(logits)) / np.exp(np.float64(logits)).sum(axis=-1, keepdims=True)
    ordered = np.take_along_axis(probabilities, order, axis=-1)
    likelier = np.cumsum(ordered, axis=-1) - ordered
    expected, close = np.zeros((2, *logits.shape), bool)
    np.put_along_axis(expected, order, likelier < top_p, axis=-1)
    np.put_along_axis(close, order, np.abs(likelier - top_p) < 1e-6, axis=-1)  # which rounding may turn
    kept = np.asarray(jax.jit(_nucleus, static_argnums=1)(logits, top_p))
    possible = probabilities > 0
    np.testing.assert_array_equal((kept | close) & possible, (expected | close) & possible)


def test_numbers_of_a_chunk_are_those_of_its_places():
    """What tokens are drawn from depends on key and place alone, so completions are what they were in other chunks."""
    keys = jax.vmap(jax.random.key)(np.arange(3))
    found = _uniform(keys, jnp.array([5, 0, 70]))
    for row, (key, start) in enumerate(zip(keys, (5, 0, 70), strict=True)):
        expected = [jax.random.uniform(jax.random.fold_in(key, start + at)) for at in range(found.shape[1])]
        np.testing.assert_array_equal(found[row], expected)


def test_top_p_keeps_the_likelier_ones_wherever_ties_stand():
    logits = jnp.log(jnp.tile(jnp.array([0.2, 0.1, 0.2, 0.3, 0.2]), (500, 1)))
    uniform = jax.random.uniform(jax.random.key(0), 500)
    assert set(np.asarray(choose(logits, uniform, 1.0, 0.6)).tolist()) == {0, 2, 3}


@pytest.mark.parametrize("temperature", [1e-37, 1e-45])
def test_a_temperature_near_0_takes_the_likeliest(temperature):
    logits = jnp.array([[1.0, 2.0, 90.0, -5.0], [-900.0, -80.0, -90.0, -jnp.inf]])
    uniform = jnp.array([0.0, 0.9])
    for top_p in (1.0, 0.5):
        assert np.asarray(choose(logits, uniform, temperature, top_p)).tolist() == [2, 1]


def test_temperature_sharpens():
    probs = np.array([0.2, 0.8])
    logits = jnp.tile(jnp.log(probs), (4000, 1))
    uniform = jax.random.uniform(jax.random.key(1), 4000)
    drawn = np.bincount(np.asarray(choose(logits, uniform, 0.5, 1.0)), minlength=2) / 4000
    np.testing.assert_allclose(drawn, [0.04 / 0.68, 0.64 / 0.68], atol=0.02)


@pytest.mark.parametrize("size", [1, 7, 384, 5000])
def test_tokens_are_drawn_as_often_as_they_are_likely(size):
    """Numbers spread evenly over [0, 1) find each token by its share; one of no probability is never found."""
    rng = np.random.default_rng(size)
    logits = 2 * rng.standard_normal(size).astype(np.float32)
    logits[rng.random(size) < 0.3] = -np.inf
    logits[size // 2] = 0.0
    draws = 4_000
    uniform = jnp.arange(draws, dtype=jnp.float32) / draws
    found = np.bincount(jax.jit(_draw)(jnp.tile(logits, (draws, 1)), uniform), minlength=size)
    probabilities = np.exp(np.float64(logits)) / np.exp(np.float64(logits)).sum()
    assert found.shape == (size,) and not found[probabilities == 0].any()
    np.testing.assert_allclose(found, draws * probabilities, atol=1.1)


def test_a_prompt_without_room_is_refused(generator):
    with pytest.raises(UserError, match=r"prompt 1 has \d+ tokens and up to 12 may follow, but .* context is 1024"):
        list(generator(["ok", "word " * 600], SamplingParams(max_new_tokens=12)))
    with pytest.raises(UserError, match="prompt 0 is empty"):
        list(generator([""], SamplingParams(max_new_tokens=12)))


@pytest.mark.parametrize(
    "content", ["{", "[1]", '{"eos_token_id": "x"}', '{"eos_token_id": [-1]}', '{"eos_token_id": [true]}']
)
def test_a_generation_config_that_is_none_is_named(tmp_path, content):
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(UserError, match=r"generation_config\.json"):
        eos_token_ids(epath.Path(tmp_path), SimpleNamespace(eos_token_id=1))


@pytest.mark.parametrize(
    ("template", "ids"),
    [
        (CHAT_TEMPLATE, [0, 2]),
        (CHAT_TEMPLATE.replace("<|im_end|>", " done"), [0]),
        ("{{ raise_exception('none') }}", [0]),
        (None, [0]),
    ],
)
def test_what_ends_a_turn_ends_a_text(tmp_path, template, ids):
    assert eos_token_ids(epath.Path(tmp_path), make_tokenizer(tmp_path, chat_template=template)) == ids


def test_an_eos_of_null_leaves_the_tokenizers(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": null}')
    assert eos_token_ids(epath.Path(tmp_path), SimpleNamespace(eos_token_id=1)) == [1]
