import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medllm_jax.data.prepare.statistics import SCRIPTS, TextStatistics, TokenStatistics, format_statistics

TEXTS = [
    "患者は発熱を訴えている。",
    "血压升高，给予利尿剂。",
    "The patient has a fever of 38.5 °C.",
    "Пациент жалуется на кашель.",
    "1234 %",
]


def text_statistics(*batches):
    found = TextStatistics()
    for texts in batches:
        found.add(texts)
    return found


def token_statistics(*batches, pieces=np.array([False, True, False])):  # noqa: B008 (never written to)
    found = TokenStatistics()
    for encoded in batches:
        tokens = np.array([token for ids in encoded for token in ids], np.int32)
        found.add(["あ" * len(ids) for ids in encoded], tokens, np.array([len(ids) for ids in encoded], int), pieces)
    return found


def documents(elements):
    return st.lists(elements, max_size=8), st.integers(0, 8)


@given(*documents(st.text(st.characters(exclude_categories=["Cs"]), max_size=40)))
def test_texts_add_up_however_they_are_divided(texts, cut):
    whole = text_statistics(texts)
    assert text_statistics(texts[:cut], texts[cut:]) == whole
    merged = TextStatistics.from_dict(json.loads(json.dumps(text_statistics(texts[cut:]).as_dict())))
    merged.merge(text_statistics(texts[:cut]))
    assert merged == whole

    assert (whole.documents, whole.characters) == (len(texts), len("".join(texts)))
    assert whole.bytes == len("".join(texts).encode())
    assert sum(whole.scripts.values()) == whole.characters
    assert sum(whole.documents_by_script.values()) == sum(whole.lengths) == len(texts)
    assert whole.scripts["white space"] == sum(map(str.isspace, "".join(texts)))


@given(*documents(st.lists(st.integers(0, 2), max_size=40)))
def test_tokens_add_up_however_they_are_divided(encoded, cut):
    whole = token_statistics(encoded)
    assert token_statistics(encoded[:cut], encoded[cut:]) == whole
    merged = TokenStatistics.from_dict(json.loads(json.dumps(token_statistics(encoded[cut:]).as_dict())))
    merged.merge(token_statistics(encoded[:cut]))
    assert merged == whole
    flat = [token for ids in encoded for token in ids]
    assert (whole.tokens, whole.byte_pieces) == (len(flat), flat.count(1))
    assert whole.characters == whole.tokens and whole.bytes == 3 * whole.tokens


def test_characters_by_script():
    examples = {
        "hiragana": "ひらがなゝ",
        "katakana": "カタカナーｶﾀｶﾅ",
        "kanji": "患者々〇𠮷﨑",
        "latin": "abcXYZéＡｂ",
        "digits": "0123９Ⅳ①½",
        "punctuation": "。、「」・.,!?％+→©",
        "white space": " \t\n\r\u3000\xa0",
        "other": "Жאक",
    }
    assert tuple(examples) == SCRIPTS
    assert text_statistics(["".join(examples.values())]).scripts == {name: len(text) for name, text in examples.items()}


def test_documents_by_script():
    assert text_statistics(TEXTS).documents_by_script == {"kana": 1, "kanji": 1, "latin": 1, "other": 2}
    english = "The patient has a fever. " * 10
    assert text_statistics([english + "発熱とは"]).documents_by_script["latin"] == 1  # a word of Japanese in English
    assert text_statistics(["発熱には acetaminophen を用いる"]).documents_by_script["kana"] == 1


def test_lengths_by_powers_of_two():
    texts = ["a" * length for length in (1, 2, 3, 4, 7, 8, 1023, 1024)]
    assert text_statistics(texts).lengths == [1, 2, 2, 1, 0, 0, 0, 0, 0, 1, 1]


def test_rates_and_percentiles():
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(5, 1, 2000)).astype(int) + 1
    found = token_statistics([[0] * length for length in lengths], [[1, 2]])
    for percent in (10, 50, 90, 99):
        assert found.percentile(percent) == pytest.approx(np.percentile(lengths, percent), rel=0.15)
    assert token_statistics([[0, 1, 1, 2]]).byte_piece_share == 0.5
    assert token_statistics([[0, 1]]).bytes_per_token == 3 and token_statistics([[0, 1]]).characters_per_token == 1
    empty = TokenStatistics()
    assert (empty.percentile(50), empty.bytes_per_token, empty.byte_piece_share) == (0, 0, 0)


def test_the_report_is_made_of_tables():
    text, token = text_statistics(TEXTS * 300), token_statistics([[0, 1], [2] * 9] * 750)
    report = format_statistics(text, token)
    assert f"| {text.documents:,} | {text.characters:,} | {text.bytes:,} | {token.tokens:,} |" in report
    for table in report.split("\n\n")[:-1]:
        assert len({line.count("|") for line in table.splitlines()}) == 1
    bars = re.findall(r"\| ([\d,]+) \| (█*)[▏▎▍▌▋▊▉]? \|", report)
    assert {len(bar) for count, bar in bars if count == "750"} == {24} == {max(len(bar) for _, bar in bars)}
    assert "| 4 to 7 | 0 |  |" in report  # within the lengths that occur none is left out
    assert format_statistics(TextStatistics(), TokenStatistics()).count("---") > 10
