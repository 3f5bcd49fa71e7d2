import re
import sys
import unicodedata
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medllm_jax.data.prepare.normalize import normalise

FORMS = ["none", "nfc", "nfkc"]
ORDINARY = "患者は65歳の男性で、「発熱」と咳を訴えた（38.5 度）。\n\n\tBP 140　葛󠄀城\u200d👩‍⚕️\n外字\ue000・\ufa19\uf91f"
PROTECTED = "⁶₂½①⑴⒈㏠㈱㊤™ªⁿ´゛\ufa19\uf91f\U0002f81a（）［］｛｝，．：；！？～…‥\u3000"
# What the forms treat in their own way, and what it meets.
ODD = st.characters() | st.sampled_from(
    PROTECTED + " \t\n\r\v\f\x85\u2028\u2029\ufeff\u200bｶﾞﾊﾟは\u3099１9Ａ㎡ﬁſ\u0301\u0307¨"
)
TEXTS = st.text(ODD)


@given(TEXTS, st.sampled_from(FORMS))
def test_once_is_enough(text, form):
    once = normalise(text, form)
    assert normalise(once, form) == once
    assert once == once.strip() and not re.search(r"[^\S\n]\n|\n\n\n|[\r\v\f\x85\u2028\u2029]", once)


@pytest.mark.parametrize("form", FORMS)
def test_ordinary_text_stays(form):
    assert normalise(ORDINARY, form) == ORDINARY
    assert normalise(PROTECTED.strip(), form) == PROTECTED.strip()


@given(TEXTS)
def test_only_what_is_kept_differs_from_the_forms_of_unicode(text):
    clean = normalise(text, "none")
    for form in ("NFC", "NFKC"):
        found = normalise(unicodedata.normalize(form, normalise(text, form.lower())), "none")
        assert found == normalise(unicodedata.normalize(form, clean), "none")


def test_every_character_is_folded_or_kept():
    for char in map(chr, [*range(0xA0, 0xD800), *range(0xE000, 0x20000), *range(0x2F800, 0x2FA20)]):
        tag = unicodedata.decomposition(char).partition(">")[0]
        found = normalise(f"x{char}y", "nfkc")[1:-1]
        plain = unicodedata.normalize("NFKC", f"x{char}y")[1:-1]
        kept = (
            tag in ("<super", "<sub", "<fraction", "<circle")
            or char in PROTECTED
            or (tag == "<compat" and re.search(r"[0-9]|^\(| .", plain))
        )
        ideograph = "\uf900" <= char <= "\ufaff" or char >= "\U0002f800"
        if kept or ideograph:
            assert found == char, hex(ord(char))
        elif tag.startswith("<"):
            assert found != char, hex(ord(char))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ｶﾞﾝﾊﾟ｡｢｣", "ガンパ。「」"),
        ("３．５ｍｇ／ｄＬ、ｐ＜０．０５", "3.5mg/dL、p<0.05"),
        ("１，０００人（１０：３０）", "1,000人（10:30）"),
        ("症例１：男性，６５歳．", "症例1：男性，65歳．"),
        ("１０⁶個、１½錠、３①", "10⁶個、1½錠、3①"),
        ("㎎㎖㎡㌔℃㍻", "mgmlm²キロ°C平成"),
        ("ﬁ Ⅳ期 µg ⼀", "fi IV期 μg 一"),
    ],
)
def test_nfkc_folds(text, expected):
    assert normalise(text, "nfkc") == expected
    assert normalise(text, "nfc") == text


@pytest.mark.parametrize("form", FORMS)
def test_line_ends_and_what_is_invisible(form):
    text = "\ufeff 一\r\n二\r三\x85四\u2028五\f六 \u3000\n\t\n\n\n七\x00\x1b\x9f\u200b\xad\u202e\u2066\ufdd0八\n "
    assert normalise(text, form) == "一\n二\n三\n四\n五\n六\n\n七八"


def test_nothing_but_what_is_invisible_is_removed():
    everything = map(chr, range(sys.maxunicode + 1))
    gone = Counter(unicodedata.category(char) for char in everything if not normalise(f"x{char}y", "none")[1:-1])
    assert gone == {"Cc": 65 - len("\t\n\r\v\f\x85"), "Cn": 66, "Cf": 14}


def test_decomposed_text_is_composed_around_names():
    assert normalise("か\u3099\ufa19か\u3099", "nfc") == "が\ufa19が"
    assert normalise("か\u3099\ufa19", "none") == "か\u3099\ufa19"
