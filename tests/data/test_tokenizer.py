import json
import shutil
import subprocess
import sys

import pytest
from etils import epath

from medllm_jax.data import tokenizer as tokenizer_module
from medllm_jax.data.tokenizer import (
    byte_pieces,
    control_tokens,
    encode_parts,
    encode_plain,
    encode_rendered,
    fingerprint,
    load_tokenizer,
    same_tokenizer,
)
from medllm_jax.data.tokenizer_file import read_tokenizer_file
from medllm_jax.errors import UserError
from tests.tiny import SPECIAL_TOKENS, make_sentencepiece, make_tokenizer

TEXTS = [
    "The patient has a fever.",
    "患者は発熱を訴えている。",
    " two  spaces\n\n\ttab ",
    "emoji 🩺, accents é",
    "<|im_start|>system",
]


@pytest.fixture(scope="module")
def sentencepiece_file(tmp_path_factory):
    """A model of 256 byte pieces, three special ones and a few of the texts' own."""
    file = tmp_path_factory.mktemp("sentencepiece") / "mine.model"
    make_sentencepiece(file)
    return file


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


@pytest.mark.parametrize("encode, split", [(encode_plain, True), (encode_rendered, False)])
def test_ids_are_those_of_calling_the_tokenizer(tokenizer_dir, encode, split):
    tokenizer = load_tokenizer(tokenizer_dir)
    tokenizer.add_tokens(["fever"])
    texts = [*TEXTS, "", *SPECIAL_TOKENS, "long " * 500]
    called = tokenizer(texts, add_special_tokens=False, split_special_tokens=split)["input_ids"]
    # What a call with padding or truncation leaves behind is no part of the next one.
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=7)
    assert encode(tokenizer, texts) == called


def test_control_tokens(tokenizer_dir, sentencepiece_file):
    assert set(control_tokens(load_tokenizer(tokenizer_dir))) == set(SPECIAL_TOKENS)
    assert control_tokens(load_tokenizer(sentencepiece_file)) == ("</s>", "<s>")


def test_sentencepiece_text_comes_back_and_control_pieces_stay_text(sentencepiece_file):
    tokenizer = load_tokenizer(sentencepiece_file)
    texts = [*TEXTS, "a</s>b", "<s>", "<0xE3>", ""]
    encoded = encode_plain(tokenizer, texts)
    assert [tokenizer.decode(ids) for ids in encoded] == texts
    control = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    assert len(control) == 2 and not any(control & set(ids) for ids in encoded)
    assert max(map(max, filter(None, encoded))) < len(tokenizer)

    [ids] = encode_plain(tokenizer, ["fever"])
    assert tokenizer.decode([*ids, tokenizer.eos_token_id]) == "fever</s>"
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == "fever"
    assert tokenizer.chat_template is None
    with pytest.raises(UserError, match="no chat template"):
        encode_rendered(tokenizer, ["a"])


def test_sentencepiece_as_a_file_and_as_a_folder(sentencepiece_file, tokenizer_dir, tmp_path):
    shutil.copy(sentencepiece_file, tmp_path / "tokenizer.model")
    folder, file = load_tokenizer(tmp_path), load_tokenizer(sentencepiece_file)
    assert encode_plain(folder, TEXTS) == encode_plain(file, TEXTS)
    assert fingerprint(tmp_path) == fingerprint(sentencepiece_file)
    # Beside a tokenizer.json it says nothing.
    shutil.copytree(tokenizer_dir, tmp_path, dirs_exist_ok=True)
    assert encode_plain(load_tokenizer(tmp_path), TEXTS) == encode_plain(load_tokenizer(tokenizer_dir), TEXTS)
    assert fingerprint(tmp_path) == fingerprint(tokenizer_dir)
    (tmp_path / "broken.model").write_bytes(b"not a model")
    for use in (load_tokenizer, fingerprint):
        with pytest.raises(UserError, match="not a SentencePiece model"):
            use(tmp_path / "broken.model")


def test_byte_pieces_of_a_byte_level_vocabulary(tokenizer_dir):
    tokenizer = load_tokenizer(tokenizer_dir)
    own = len(tokenizer)
    tokenizer.add_tokens(["ée"])  # as it stands, not the bytes E9 65 that a token of the vocabulary would be
    found = byte_pieces(tokenizer)
    assert found.dtype == bool and len(found) == own + 1 and not found[own]
    assert found[:own].tolist() == ["\ufffd" in tokenizer.decode([token]) for token in range(own)]
    assert 128 <= found.sum() < own
    ids = encode_plain(tokenizer, ["患者 fever", "🩺"])
    assert not found[ids[0]].any() and found[ids[1]].all()


def test_byte_pieces_of_a_vocabulary_with_byte_fallback(sentencepiece_file):
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "a", "é"]
    bpe = Tokenizer(models.BPE({piece: n for n, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True))
    bpe.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    for tokenizer in (
        PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>"),
        load_tokenizer(sentencepiece_file),
    ):
        found = byte_pieces(tokenizer)
        assert len(found) == len(tokenizer) and found.sum() == 256
        known, unknown = encode_plain(tokenizer, ["a", "🩺"])
        assert not found[known].any() and found[unknown].sum() == 4


def test_no_tokenizer_there(tmp_path):
    for use in (load_tokenizer, fingerprint):
        with pytest.raises(UserError, match="no tokenizer folder"):
            use(tmp_path / "nothing")
        with pytest.raises(UserError, match=r"expected tokenizer\.json"):
            use(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    for use in (load_tokenizer, fingerprint):
        with pytest.raises(UserError, match="cannot be loaded"):
            use(tmp_path)


def changed(folder, tmp_path, name, **files):
    """A copy of a tokenizer's folder with some entries of its JSON files set anew."""
    copy = shutil.copytree(folder, tmp_path / name)
    for file, entries in files.items():
        path = copy / f"{file}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    return copy


@pytest.mark.parametrize(
    "entry",
    [{"model_max_length": {"a": 1}}, {"model_max_length": True}, {"padding_side": 5}, {"add_prefix_space": "yes"}],
)
def test_a_setting_of_another_type_is_refused(tokenizer_dir, tmp_path, entry):
    folder = changed(tokenizer_dir, tmp_path, "other", tokenizer_config=entry)
    with pytest.raises(UserError, match=rf"tokenizer_config.json: the field '{next(iter(entry))}' is .* was expected"):
        load_tokenizer(folder)


MISREAD = {  # what it would be read as, by its fields
    "normalizer": (["x"], "normalizer is ['x'], and would be read as {'prepend': 'x'"),
    "post_processor": ({"type": 2**64, "single": [], "pair": [], "special_tokens": {}}, "post_processor is of type"),
    "decoder": ({"type": "Sequence", "decoders": [["a"]]}, "cannot be loaded"),
    "pre_tokenizer": ("x" * 30, "cannot be loaded"),
    "model": ([], "cannot be loaded"),
}


@pytest.mark.parametrize("part", MISREAD)
def test_parts_that_would_be_read_as_something_else_are_refused(tokenizer_dir, tmp_path, part):
    value, line = MISREAD[part]
    with pytest.raises(UserError) as refused:
        load_tokenizer(changed(tokenizer_dir, tmp_path, "other", tokenizer={part: value}))
    assert line in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("prefix", ["##", "x"])
def test_merges_that_lack_the_prefix_of_pieces_within_words_are_refused(tokenizer_dir, tmp_path, prefix):
    model = json.loads((tokenizer_dir / "tokenizer.json").read_text())["model"]
    other = changed(
        tokenizer_dir, tmp_path, "other", tokenizer={"model": model | {"continuing_subword_prefix": prefix}}
    )
    with pytest.raises(
        UserError, match=f"continuing_subword_prefix is '{prefix}', and the merge .* does not begin with"
    ):
        load_tokenizer(other)


def test_tokenizers_of_every_make_are_read(tmp_path):
    """Each part that `tokenizers` has, as it writes it itself."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    words = Tokenizer(models.WordPiece({"[UNK]": 0, "fever": 1, "##s": 2}, unk_token="[UNK]"))
    words.normalizer = normalizers.Sequence([normalizers.BertNormalizer(), normalizers.Replace(Regex("a+"), "a")])
    words.pre_tokenizer, words.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    words.post_processor = processors.BertProcessing(("[UNK]", 0), ("[UNK]", 0))
    pieces = Tokenizer(models.BPE({"a": 0, "@b": 1, "ab": 2}, [("a", "@b")], continuing_subword_prefix="@"))
    pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    pieces.post_processor = processors.TemplateProcessing("$A a", None, [("a", 0)])
    units = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    units.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    for number, made in enumerate((words, pieces, units)):
        made.save(str(tmp_path / "tokenizer.json"))
        assert read_tokenizer_file(tmp_path / "tokenizer.json").to_str() == made.to_str(), number


@pytest.mark.parametrize("file", ["tokenizer", "tokenizer_config"])
def test_an_added_token_that_is_a_whole_text_is_refused(tokenizer_dir, tmp_path, file):
    def folder(length):
        content = json.loads((tokenizer_dir / "tokenizer.json").read_text())
        token = content["added_tokens"][0] | {"content": "<|" + "x" * (length - 4) + "|>"}
        added = {"added_tokens": [*content["added_tokens"], token | {"id": len(load_tokenizer(tokenizer_dir))}]}
        entries = added if file == "tokenizer" else {"extra_special_tokens": [token["content"]]}
        return changed(tokenizer_dir, tmp_path, f"{length}", **{file: entries})

    longest = load_tokenizer(folder(1000))
    assert max(len(token) for token in control_tokens(longest)) == 1000
    with pytest.raises(UserError, match=r"has an added token of 1,001 characters \(id \d+, '<\|x+") as refused:
        load_tokenizer(folder(1001))
    assert len(str(refused.value)) < 400


def test_a_file_that_the_loaded_class_does_not_follow_is_refused(tokenizer_dir, tmp_path):
    qwen = {"tokenizer_class": "Qwen2Tokenizer"}
    nfkc = changed(tokenizer_dir, tmp_path, "nfkc", tokenizer={"normalizer": {"type": "NFKC"}}, tokenizer_config=qwen)
    with pytest.raises(UserError, match=r"tokenizer\.json and Qwen2Tokenizer, .* read '.*' differently") as refused:
        load_tokenizer(nfkc)
    assert len(str(refused.value).splitlines()) == 1
    (nfkc / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend"}')
    [ids] = encode_plain(load_tokenizer(nfkc), ["ＡＢ㎎"])
    assert [ids] == encode_plain(load_tokenizer(nfkc), ["ABmg"])

    model = json.loads((tokenizer_dir / "tokenizer.json").read_text())["model"]
    chance = changed(tokenizer_dir, tmp_path, "chance", tokenizer={"model": model | {"dropout": 0.1}})
    with pytest.raises(UserError, match="by chance"):
        load_tokenizer(chance)


def test_fingerprint_is_of_what_the_loaded_tokenizer_does(tokenizer_dir, tmp_path):
    known = fingerprint(tokenizer_dir)
    token = {"content": "fever", "special": False, "lstrip": False, "rstrip": False, "normalized": False}
    token |= {"single_word": False}
    content = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    last = max(content["model"]["vocab"].values())
    others = {
        "added": {"added_tokens_decoder": {str(last + 1): token}},
        "prefix": {"add_prefix_space": True, "tokenizer_class": "GPT2Tokenizer"},
        "eos": {"eos_token": "<|im_end|>"},
    }
    for name, entries in others.items():
        other = fingerprint(changed(tokenizer_dir, tmp_path, name, tokenizer_config=entries))
        assert not same_tokenizer(known, other), name
        # Of what older stores keep nothing tells them apart.
        assert same_tokenizer(known.partition("/")[2], other)

    again = load_tokenizer(tokenizer_dir)
    again.pad_token = again.eos_token
    again.chat_template = "{{ messages }}"
    again.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "tokenizer.json").read_text())
    written["post_processor"] = None
    (tmp_path / "again" / "tokenizer.json").write_text(json.dumps(written))
    saved = fingerprint(tmp_path / "again")
    assert same_tokenizer(known, saved) and known.partition("/")[2] != saved.partition("/")[2]


def test_parts_read_as_the_whole_text(sentencepiece_file, tokenizer_dir):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    parts = [("答え:", "患者は"), ("The patient", " has"), ("熱", "a", "fever")]
    for source in (sentencepiece_file, tokenizer_dir):
        tokenizer = load_tokenizer(source)
        for text, found in zip(parts, encode_parts(tokenizer, parts, rendered=False), strict=True):
            assert [tokenizer.decode(ids) for ids in found] == list(text) or source == sentencepiece_file
            assert tokenizer.decode([token for ids in found for token in ids]) == "".join(text)

    words = Tokenizer(models.WordLevel({"<unk>": 0, "▁a": 1, "▁b": 2, "b": 3, "▁": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    words.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    assert encode_parts(tokenizer, [("a", "b"), ("a b",), ("a", " b")], rendered=False)[:2] == [None, [[1, 2]]]


def test_fingerprint_sees_the_vocabulary_and_nothing_else(tokenizer_dir, tmp_path):
    same = tmp_path / "same"
    shutil.copytree(tokenizer_dir, same)
    content = json.loads((same / "tokenizer.json").read_text())
    merges = content["model"]["merges"]
    assert merges and isinstance(merges[0], list)
    content["model"]["merges"] = [" ".join(merge) for merge in merges]
    content["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    (same / "tokenizer.json").write_text(json.dumps(content, indent=None))
    (same / "tokenizer_config.json").write_text(
        (tokenizer_dir / "tokenizer_config.json").read_text().replace("{", '{"chat_template": "{{ messages }}",', 1)
    )
    assert fingerprint(same) == fingerprint(tokenizer_dir)

    load_tokenizer(tokenizer_dir).save_pretrained(tmp_path / "saved")
    assert fingerprint(tmp_path / "saved") == fingerprint(tokenizer_dir)

    content["model"]["merges"] = content["model"]["merges"][::-1]
    (same / "tokenizer.json").write_text(json.dumps(content))
    assert fingerprint(same) != fingerprint(tokenizer_dir)
    make_tokenizer(tmp_path / "other", texts=["something else entirely"])
    assert fingerprint(tmp_path / "other") != fingerprint(tokenizer_dir)


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
        "import sys, medllm_jax.data.prepare.preference_pairs\n"
        "print(sorted({'jax', 'grain', 'transformers', 'torch'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
