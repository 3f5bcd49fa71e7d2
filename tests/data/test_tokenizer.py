import json
import shutil
import subprocess
import sys

import pytest
from etils import epath

from medllm_jax.data import tokenizer as tokenizer_module
from medllm_jax.data.tokenizer import control_tokens, encode_plain, encode_rendered, fingerprint, load_tokenizer
from medllm_jax.errors import UserError
from tests.tiny import SPECIAL_TOKENS, make_tokenizer

TEXTS = [
    "The patient has a fever.",
    "患者は発熱を訴えている。",
    " two  spaces\n\n\ttab ",
    "emoji 🩺, accents é",
    "<|im_start|>system",
]


def test_plain_text_comes_back_and_control_tokens_stay_text(tokenizer_dir):
    tokenizer = load_tokenizer(tokenizer_dir)
    texts = [*TEXTS, "".join(SPECIAL_TOKENS), *(f"a{token}b" for token in SPECIAL_TOKENS)]
    control = set(tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)))
    encoded = encode_plain(tokenizer, texts)
    assert not any(control & set(ids) for ids in encoded)
    assert [tokenizer.decode(ids) for ids in encoded] == texts
    rendered = encode_rendered(tokenizer, ["a<|im_end|>b"])
    assert sum(token in control for token in rendered[0]) == 1
    # The two do not leave a setting behind that changes the other.
    assert encode_plain(tokenizer, texts) == encoded
    assert encode_plain(tokenizer, []) == encode_rendered(tokenizer, []) == []


def test_control_tokens(tokenizer_dir):
    assert set(control_tokens(load_tokenizer(tokenizer_dir))) == set(SPECIAL_TOKENS)


def test_no_tokenizer_there(tmp_path):
    for use in (load_tokenizer, fingerprint):
        with pytest.raises(UserError, match="no tokenizer folder"):
            use(tmp_path / "nothing")
        with pytest.raises(UserError, match=r"expected tokenizer\.json"):
            use(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="not a tokenizer file"):
        fingerprint(tmp_path)


def test_fingerprint_sees_the_vocabulary_and_nothing_else(tokenizer_dir, tmp_path):
    same = tmp_path / "same"
    shutil.copytree(tokenizer_dir, same)
    content = json.loads((same / "tokenizer.json").read_text())
    merges = content["model"]["merges"]
    assert merges and isinstance(merges[0], list)
    content["model"]["merges"] = [" ".join(merge) for merge in merges]
    content["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    (same / "tokenizer.json").write_text(json.dumps(content, indent=None))
    (same / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert fingerprint(same) == fingerprint(tokenizer_dir)

    load_tokenizer(tokenizer_dir).save_pretrained(tmp_path / "saved")
    assert fingerprint(tmp_path / "saved") == fingerprint(tokenizer_dir)

    content["model"]["merges"] = content["model"]["merges"][::-1]
    (same / "tokenizer.json").write_text(json.dumps(content))
    assert fingerprint(same) != fingerprint(tokenizer_dir)
    make_tokenizer(tmp_path / "other", texts=["something else entirely"])
    assert fingerprint(tmp_path / "other") != fingerprint(tokenizer_dir)


def test_fingerprint_without_tokenizer_json(tmp_path):
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "merges.txt").write_text("")
    first = fingerprint(tmp_path)
    (tmp_path / "merges.txt").write_text("a b")
    assert fingerprint(tmp_path) != first


def test_the_copy_for_object_storage_is_the_same_tokenizer(tokenizer_dir, tmp_path, monkeypatch):
    class Bucket(type(epath.Path(tokenizer_dir))):  # a local folder that looks like object storage
        def __str__(self):
            return "gs://bucket/model"

    with tokenizer_module._local_copy(Bucket(tokenizer_dir)) as local:
        assert local != tokenizer_dir
        copied = load_tokenizer(local)
        assert encode_plain(copied, TEXTS) == encode_plain(load_tokenizer(tokenizer_dir), TEXTS)
        assert copied.chat_template == load_tokenizer(tokenizer_dir).chat_template
    assert not local.exists()


def test_data_modules_import_without_heavy_libraries():
    program = (
        "import sys, medllm_jax.data.preferences\n"
        "print(sorted({'jax', 'grain', 'transformers', 'torch'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
