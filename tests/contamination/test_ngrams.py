"""Hashes of stretches of characters."""

from hypothesis import given
from hypothesis import strategies as st

from medllm_jax.contamination.ngrams import grams


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
