"""One spelling of every text, and what a model wrote apart from what is not its answer turn."""

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from medllm_jax.evaluation.extraction.normalize import clean, normalize

_ANY = st.text(st.characters(exclude_categories=()), max_size=60)


def _nfkc(text):
    return unicodedata.normalize("NFKC", text)


@given(st.one_of(_ANY, st.text("がか\u3099ｶﾞ㌘㍿①½ﬁÅ가각e\u0301\u0323", max_size=30)))
def test_the_spelling_is_nfkc(text):
    if all(len(_nfkc(char)) <= 4 for char in text):
        assert normalize(text) == normalize(_nfkc(text))


def test_signs_that_are_whole_words_stay():
    assert normalize("ＡＢ㌘ｶﾞﷺ") == "abグラムガﷺ"


def test_a_think_block_may_be_long():
    thought = "aかbか。" * 20_000
    assert clean(f"<think>{thought}</think>\n答え: c").text == "答え: c"
    assert clean(f"<think>{thought}").unclosed
