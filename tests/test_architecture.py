"""Who may import whom, that every setting is read, and that every parameter has its row in every table."""

import ast
import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import pytest

from medllm_jax.config import schema as config_module
from medllm_jax.config.load import build, load_model_config, load_run_config, read_yaml
from medllm_jax.config.schema import ModelConfig, PrecisionConfig
from medllm_jax.distributed.sharding import PARAMETERS, row_of
from medllm_jax.training.optimizer import DECAYS
from tests.world import tiny_config

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "medllm_jax"


def test_every_setting_is_read_somewhere():
    """A field that nothing reads is a promise that nothing keeps."""
    read = set()
    for file in PACKAGE.rglob("*.py"):
        if file.parent.name == "config":
            continue
        read |= {node.attr for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Attribute)}
        read |= {n.value for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Constant)}
    read |= {"head_dim", "rslora"}  # behind ModelConfig.dim_of_head and AdapterConfig.scale
    for cls in vars(config_module).values():
        if dataclasses.is_dataclass(cls):
            assert not {field.name for field in dataclasses.fields(cls)} - read, cls


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_matches_one_row_of_every_table(tied):
    import jax

    from medllm_jax.config.schema import MeshConfig
    from medllm_jax.distributed.sharding import make_mesh, path_of
    from medllm_jax.model.abstract import abstract_model

    plan = abstract_model(tiny_config(tie_word_embeddings=tied), PrecisionConfig(), make_mesh(MeshConfig()))
    paths = [path_of(key_path) for key_path, _ in jax.tree_util.tree_leaves_with_path(plan.abstract)]
    assert len(paths) == 14 + (not tied)
    for table in (PARAMETERS, DECAYS):
        for path in paths:
            row_of(table, path)
    with pytest.raises(LookupError, match="matches 0 rows"):
        row_of(PARAMETERS, "layers/self_attn/q_norm/weight")
    assert {path for path in paths if row_of(DECAYS, path)} == {
        path for path in paths if "proj/weight" in path or "embed" in path or "lm_head" in path
    }


@pytest.mark.parametrize(
    ("base", "double"),
    [
        ("float32", False),
        ("bfloat16", False),
        *((base, double) for base in ("int8", "int4", "nf4") for double in (False, True)),
    ],
)
def test_every_parameter_of_an_adapted_model_matches_one_row_too(base, double):
    import jax

    from medllm_jax.config.schema import AdapterConfig, MeshConfig
    from medllm_jax.distributed.sharding import make_mesh, path_of
    from medllm_jax.model.abstract import abstract_model

    quantised = base in ("int8", "int4", "nf4")
    adapter = AdapterConfig(base=base, double_quantization=double)
    shape = tiny_config(hidden_size=128, intermediate_size=256)
    plan = abstract_model(shape, PrecisionConfig(), make_mesh(MeshConfig(1, 4, 2)), adapter=adapter)
    trained, frozen = (
        {path_of(key_path): leaf for key_path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (plan.abstract, plan.frozen)
    )
    assert len(trained) == 2 * 7 and all(path.endswith(("lora_A", "lora_B")) for path in trained)
    assert len(frozen) == 14 + quantised * 7 * (3 if double else 1)
    for path in trained:
        row_of(DECAYS, path)
    for path, leaf in (trained | frozen).items():
        row_of(PARAMETERS, path)
        if leaf.ndim == 3 or "embed" in path:  # each of 8 devices has its eighth
            assert 8 * math.prod(leaf.sharding.shard_shape(leaf.shape)) == leaf.size, path


# Parameters of the published models, in billions, as their model cards round them.
PUBLISHED = {"0.5b": 0.49, "1.5b": 1.54, "3b": 3.09, "7b": 7.61, "14b": 14.7, "32b": 32.5, "72b": 72.7}


@pytest.mark.parametrize("size", PUBLISHED)
def test_shipped_models_have_the_published_size(size):
    c = load_model_config(ROOT / "configs" / "model" / f"qwen2.5-{size}.yaml")
    heads, kv = c.num_attention_heads * c.dim_of_head, c.num_key_value_heads * c.dim_of_head
    block = c.hidden_size * (2 * heads + 2 * kv + 3 * c.intermediate_size + 2) + heads + 2 * kv
    tables = c.vocab_size * c.hidden_size * (1 if c.tie_word_embeddings else 2)
    total = c.num_hidden_layers * block + tables + c.hidden_size
    assert total / 1e9 == pytest.approx(PUBLISHED[size], rel=0.01)


def test_parameter_count_is_what_the_model_makes():
    import jax

    from medllm_jax.config.schema import MeshConfig
    from medllm_jax.distributed.sharding import make_mesh
    from medllm_jax.model.abstract import abstract_model

    c = load_model_config(ROOT / "configs" / "model" / "qwen2.5-72b.yaml")
    plan = abstract_model(c, PrecisionConfig(), make_mesh(MeshConfig()))
    assert sum(leaf.size for leaf in jax.tree.leaves(plan.abstract)) == 72_706_203_648


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "runs").glob("*.yaml")), ids=lambda file: file.name)
def test_shipped_run_configs_load(file):
    assert load_run_config(file).steps > 0


def test_demo_configs_load():
    for file in (PACKAGE / "recipes" / "demo" / "configs").glob("*.yaml"):
        load_model_config(file) if file.name == "model.yaml" else load_run_config(file)
    assert build(ModelConfig, read_yaml(str(PACKAGE / "recipes" / "demo" / "configs" / "model.yaml")), "demo")


@pytest.mark.parametrize(
    "verb",
    [
        [],
        ["train"],
        ["reference"],
        ["plan"],
        ["evaluate"],
        ["pairs"],
        ["demo"],
        ["rounds"],
        ["data", "sft"],
        ["data", "cpt"],
        ["data", "pairs"],
        ["data", "show"],
    ],
)
def test_help_imports_nothing_heavy(verb):
    """What makes `--help` slow is imports; a clock in a test would only say how busy the machine is."""
    code = (
        "import sys, contextlib, io\nfrom medllm_jax.cli import main\nout = io.StringIO()\n"
        "with contextlib.redirect_stdout(out):\n"
        f"    try: main({[*verb, '--help']!r})\n    except SystemExit: pass\n"
        "assert 'usage: medllm' in out.getvalue()\n"
        "heavy = {'jax', 'numpy', 'flax', 'transformers', 'orbax', 'grain', 'tensorstore', 'etils'}\n"
        "heavy |= {'fsspec', 'gcsfs'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", done.stdout
