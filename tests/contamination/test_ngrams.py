"""Hashes of stretches of characters."""

import re
import time
import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from medllm_jax.contamination.ngrams import grams, plain


@given(st.text("abcあ1", max_size=60), st.integers(1, 20))
def test_equal_stretches_have_equal_hashes_and_others_do_not(text, n):
    found = grams(text, n).tolist()
    expected = [text[start : start + n] for start in range(len(text) - n + 1)]
    assert len(found) == len(expected)
    assert len(set(found)) == len(set(expected)) == len(set(zip(found, expected, strict=True)))


def test_the_hash_of_a_stretch_does_not_depend_on_where_it_stands():
    text = "あいうえおかきくけこさしすせそたちつ"
    for n in (4, 7, 13, 16):
        assert set(grams(text, n)) <= set(grams(f"前置き{text}", n))


def test_a_text_in_pieces_is_the_text():
    text = "患者は、ｶﾞﾝの㌘を１２３測定し、か\u3099んを疑う。" * 200
    assert plain(text) == re.sub(r"[\W_]+", "", unicodedata.normalize("NFKC", text)).casefold()


def test_a_long_run_of_combining_marks_takes_little_time():
    start = time.thread_time()
    plain("\u0301\u0323" * 50_000)
    assert time.thread_time() - start < 2
