"""What a config is made into is refused where it can't train what it is to train."""

import dataclasses

import pytest

from medllm_jax.config.schema import AdapterConfig, InitConfig, OptimizerConfig, PrecisionConfig
from medllm_jax.errors import UserError
from medllm_jax.training.resolve import resolve
from medllm_jax.training.setup import open_rows
from tests.training.test_train import config_of
from tests.world import SEQUENCE_LENGTH, tiny_config


@pytest.mark.parametrize("adapter", [None, AdapterConfig()], ids=["all weights", "adapters"])
@pytest.mark.parametrize(("rate", "moved"), [(1e-6, "1.5 %"), (1e-5, "15 %"), (1e-4, None)])
def test_weights_that_rounding_would_keep_where_they_are_are_refused(world, tmp_path, adapter, rate, moved):
    config = config_of(world, tmp_path / "run", precision=PrecisionConfig(params="bfloat16"), adapter=adapter)
    config = dataclasses.replace(config, optimizer=OptimizerConfig(learning_rate=rate))
    if moved is None:
        assert resolve(config).precision.params == "bfloat16"
        return
    for how in ({}, {"elsewhere": True}):
        with pytest.raises(UserError, match=f"params is bfloat16 and .*learning_rate is {rate:g}.* about {moved}"):
            resolve(dataclasses.replace(config, model=tiny_config()), **how)


def test_a_run_that_was_begun_goes_on(world, tmp_path, monkeypatch):
    config = config_of(world, tmp_path / "run", precision=PrecisionConfig(params="bfloat16"))
    config = dataclasses.replace(config, optimizer=OptimizerConfig(learning_rate=1e-6), model=tiny_config())
    monkeypatch.setattr("medllm_jax.training.resolve.run_folder.begun_config", lambda run: config)
    assert resolve(config).optimizer.learning_rate == 1e-6


def test_rows_longer_than_the_model_was_made_for_are_refused(world, tmp_path):
    for longest in (SEQUENCE_LENGTH, SEQUENCE_LENGTH - 1):
        model = tiny_config(max_position_embeddings=longest)
        config = resolve(config_of(world, tmp_path / "run", init=InitConfig(), model=model))
        if longest == SEQUENCE_LENGTH:
            assert len(open_rows(config, config.data.stores))
            continue
        with pytest.raises(UserError, match=rf"has rows of {SEQUENCE_LENGTH} tokens, .* made for {longest} "):
            open_rows(config, config.data.stores)
