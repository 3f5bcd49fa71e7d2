import json
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file, save_file

from medllm_jax.conversion.hf_weights import open_hf, read_header
from medllm_jax.conversion.verify import stacked_weights
from medllm_jax.errors import UserError
from tests.conversion.hf_folders import Q_PROJ, assert_refused, change_config, rewrite, tensors_in
from tests.tiny_hf import write_weights


def reindex(change, *, shards: int = 2):
    """Breaks a folder of shards by what `change` makes of (folder, weight_map)."""

    def apply(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        write_weights(folder, weights, shards)
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(folder, index["weight_map"])
        path.write_text(json.dumps(index))

    return apply


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def pickles_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")


def larger_tokenizer(folder: Path) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"vocab_size": 200}))
    rewrite(lambda w: w.update({"model.embed_tokens.weight": w["model.embed_tokens.weight"][:200].copy()}))(folder)


def padded_vocabulary(folder: Path) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"vocab_size": 284}))


def frequencies(theta: float) -> np.ndarray:
    """What old checkpoints keep as `rotary_emb.inv_freq`, for heads of 8."""
    return (1.0 / theta ** (np.arange(0, 8, 2) / 8)).astype(np.float32)


INV_FREQ = "model.layers.0.self_attn.rotary_emb.inv_freq"
SECOND = "model-00002-of-00002.safetensors"
BROKEN = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "config cut short": (lambda folder: (folder / "config.json").write_text('{"vocab'), "is not JSON"),
    "config a list": (
        lambda folder: (folder / "config.json").write_text("[]"),
        "a JSON object is expected, found a list",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "has no .safetensors file"),
    "pickles only": (pickles_only, "only pytorch_model.bin: pickle files are refused"),
    "shards without index": (no_index, "no model.safetensors.index.json"),
    "truncated": (truncate, "is not a whole safetensors file"),
    "missing tensor": (rewrite(lambda w: w.pop(Q_PROJ)), f"missing tensors: {Q_PROJ}"),
    "extra tensor": (rewrite(lambda w: w.update(extra=w[Q_PROJ])), "does not have: extra"),
    "head though tied": (
        rewrite(lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"] + 1})),
        "lm_head.weight differs from the embedding though config.json sets tie_word_embeddings",
    ),
    "frequencies of another base": (
        rewrite(lambda w: w.update({INV_FREQ: frequencies(20_000.0)})),
        f"{INV_FREQ} has other frequencies than rope_theta 10000 gives",
    ),
    "blocks without end": (
        lambda folder: change_config(folder, num_hidden_layers=20_000_000),
        "config.json: model.num_hidden_layers is 20000000: it must be at least 1 and at most 1,000",
    ),
    "a config that is a folder": (
        lambda folder: ((folder / "config.json").unlink(), (folder / "config.json").mkdir()),
        "config.json is a folder",
    ),
    "a config 100,000 deep": (
        lambda folder: (folder / "config.json").write_text('{"a":' + "[" * 100_000 + "]" * 100_000 + "}"),
        "config.json is not JSON",
    ),
    "a number of 5,000 digits": (
        lambda folder: (folder / "config.json").write_text('{"vocab_size": ' + "1" * 5000 + "}"),
        "config.json is not JSON",
    ),
    "generation config cut short": (
        lambda folder: (folder / "generation_config.json").write_text('{"eos_token_id": 0'),
        "generation_config.json is not JSON",
    ),
    "generation config of another model": (
        lambda folder: (folder / "generation_config.json").write_text('{"eos_token_id": [0, 288]}'),
        "eos_token_id is [0, 288]: ids of tokens below 288 are expected",
    ),
    "generation config that ends texts with nothing": (
        lambda folder: (folder / "generation_config.json").write_text('{"eos_token_id": []}'),
        "eos_token_id is []: ids of tokens below 288 are expected",
    ),
    "generation config with several beginnings": (
        lambda folder: (folder / "generation_config.json").write_text('{"bos_token_id": [0]}'),
        "bos_token_id is [0]: the id of a token below 288 is expected",
    ),
    "a licence that is a link": (
        lambda folder: (folder / "LICENSE").symlink_to("/etc/hostname"),
        "LICENSE is a link to /etc/hostname, which is outside the folder",
    ),
    "a licence in bytes": (
        lambda folder: (folder / "LICENSE").write_bytes(b"\xff\xfe"),
        "LICENSE: not UTF-8 text at byte 0",
    ),
    "transposed": (
        rewrite(lambda w: w.update({Q_PROJ: w[Q_PROJ][:, :16].copy()})),
        f"{Q_PROJ} has shape [32, 16], config.json asks for [32, 32]",
    ),
    "two dtypes": (rewrite(lambda w: w.update({Q_PROJ: w[Q_PROJ].astype(np.float32)})), f"{Q_PROJ} is F32"),
    "integers": (
        rewrite(lambda w: w.update({k: v.astype(np.int8) for k, v in w.items()})),
        "is I8: only F32, BF16, F16",
    ),
    "missing shard": (reindex(lambda folder, _: (folder / SECOND).unlink()), f"{SECOND} missing"),
    "index leaves the folder": (
        reindex(lambda _, names: names.update({Q_PROJ: "../model.safetensors"})),
        f"{Q_PROJ} is in '../model.safetensors'",
    ),
    "index with an absolute path": (reindex(lambda _, names: names.update({Q_PROJ: "/x.safetensors"})), Q_PROJ),
    "index names a pickle": (reindex(lambda _, names: names.update({Q_PROJ: "x.bin"})), "'x.bin'"),
    "index of another file": (
        reindex(lambda _, names: names.update({k: SECOND for k in names if k == "model.embed_tokens.weight"})),
        "does not say where model.embed_tokens.weight is",
    ),
    "index empty": (reindex(lambda _, names: names.clear()), "weight_map is empty"),
    "index and a single file": (
        reindex(lambda folder, _: save_file({"x": np.ones(1)}, folder / "model.safetensors")),
        "remove one of them",
    ),
    "vocabulary padded otherwise": (padded_vocabulary, "padded to 288 rows there, and vocab_size is 284"),
    "tokenizer of another model": (larger_tokenizer, "they belong to different models"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_folders_that_are_refused(broken, tmp_path, capsys, case):
    change, message = BROKEN[case]
    change(broken)
    assert_refused(broken, tmp_path, capsys, message)


def test_tensors_that_say_nothing_new_are_taken(source, broken):
    extra = {"model.layers.1.self_attn.rotary_emb.inv_freq": frequencies(10_000.0).astype(np.float16)}
    extra |= {INV_FREQ: frequencies(10_000.0), "lm_head.weight": tensors_in(source)["model.embed_tokens.weight"]}
    rewrite(lambda w: w.update(extra))(broken)
    ours, theirs = (stacked_weights(open_hf(folder)) for folder in (broken, source))
    assert ours.keys() == theirs.keys()
    for path, value in theirs.items():
        np.testing.assert_array_equal(ours[path], value)


HEADERS = {
    "longer than the file": (b"\xff" * 8, "its header should have 18446744073709551615 bytes"),
    "no JSON": (b"{]", "is not JSON"),
    "a list": (b"[]", "a JSON object is expected"),
    "a name twice": (b'{"a":{},"a":{}}', "the key 'a' stands twice"),
    "metadata that is no text": (b'{"__metadata__":{"a":true}}', "__metadata__ is {'a': True}: a mapping"),
    "metadata that is none": (b'{"__metadata__":[]}', "__metadata__ is []: a mapping"),
    "no fields": (b'{"a":7}', "is not a whole safetensors file"),
    "no offsets": (b'{"a":{"dtype":"F32","shape":[2]}}', "is not a whole safetensors file"),
    "text for offsets": (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":["0","8"]}}', "than whole numbers"),
    "backwards": (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}', "is not where the tensor before it ends"),
    "one over another": (
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
        "'b' is not where the tensor before it ends",
    ),
    "beyond the end": (b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}', "bytes and has"),
    "a shape without end": (
        b'{"a":{"dtype":"F32","shape":[4294967296,4294967296,4294967296],"data_offsets":[0,8]}}',
        "which is not what its shape (4294967296, 4294967296, 4294967296) takes",
    ),
    "a negative shape": (b'{"a":{"dtype":"F32","shape":[-1,-2],"data_offsets":[0,8]}}', "than whole numbers"),
    "a shape of words": (b'{"a":{"dtype":"F32","shape":["2"],"data_offsets":[0,8]}}', "than whole numbers"),
    "deep": (b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}", "is not a whole safetensors file"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_are_refused(tmp_path, case):
    header, message = HEADERS[case]
    data = header if case == "longer than the file" else len(header).to_bytes(8, "little") + header
    file = tmp_path / "x.safetensors"
    file.write_bytes(data + bytes(8))
    with pytest.raises(UserError) as raised:
        read_header(epath.Path(file))
    assert message in str(raised.value)
    assert len(str(raised.value)) < 500 and "\n" not in str(raised.value)


def test_a_missing_source_is_refused(tmp_path, capsys):
    assert_refused(tmp_path / "nowhere", tmp_path, capsys, "no folder at")
