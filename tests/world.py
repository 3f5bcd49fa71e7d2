"""A tiny world for tests that train: tokenizer, corpus, preference pairs, their stores, and a random model."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.tiny import make_tokenizer, write_json_lines

SEQUENCE_LENGTH = 64


@dataclass(frozen=True)
class World:
    root: Path
    tokenizer: Path
    corpus: Path
    pairs: Path
    token_store: Path
    pair_store: Path
    model: Path  # a run folder with random weights and the tokenizer


def make_world(root: Path) -> World:
    """Makes everything under a folder, the same each time."""
    from etils import epath

    from medllm_jax.checkpoint.write_model import write_model
    from medllm_jax.config.load import to_plain
    from medllm_jax.config.schema import MeshConfig, PrecisionConfig
    from medllm_jax.data.prepare.corpus import Corpus, Recipe, prepare_corpus
    from medllm_jax.data.prepare.preference_pairs import prepare_pairs
    from medllm_jax.distributed.sharding import make_mesh
    from medllm_jax.model.abstract import abstract_model, random_params
    from medllm_jax.storage.run_folder import copy_tokenizer

    made = World(root, *(root / name for name in ("tok", "corpus.jsonl", "pairs.jsonl", "cpt", "rpo", "model")))
    rng = np.random.default_rng(0)
    make_tokenizer(made.tokenizer)
    write_json_lines(made.corpus, [{"text": sentence(rng, rng.integers(3, 30))} for _ in range(60)])
    write_json_lines(
        made.pairs,
        [
            {
                "prompt": f"Q{number}: {sentence(rng, rng.integers(1, 4))}",
                "chosen": f" yes{number} {sentence(rng, rng.integers(1, 4))}",
                "rejected": f" no{number} {sentence(rng, rng.integers(1, 3))}",
            }
            for number in range(24)
        ],
    )
    recipe = Recipe(sequence_length=SEQUENCE_LENGTH)
    prepare_corpus([Corpus("corpus", str(made.corpus))], made.tokenizer, made.token_store, recipe)
    prepare_pairs([str(made.pairs)], made.tokenizer, made.pair_store, 2 * SEQUENCE_LENGTH)
    config = tiny_config()
    plan = abstract_model(config, PrecisionConfig(compute="float32"), make_mesh(MeshConfig()))
    write_model(made.model, random_params(plan, seed=0), to_plain(config))
    copy_tokenizer(epath.Path(made.tokenizer), epath.Path(made.model))
    return made


def tiny_config(**changes):
    """A shape that splits over 8 devices on every axis."""
    from medllm_jax.config.schema import ModelConfig

    shape = {
        "vocab_size": 384,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
        "max_position_embeddings": 1024,
        "initializer_range": 0.05,
    }
    return ModelConfig(**(shape | changes))


def sentence(rng: np.random.Generator, words: int) -> str:
    vocabulary = ("fever", "cough", "発熱", "insulin", "heart", "肺炎", "drug", "test", "高血圧", "liver")
    return " ".join(vocabulary[i] for i in rng.integers(0, len(vocabulary), words)) + "."
