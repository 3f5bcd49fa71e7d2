import itertools
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medllm_jax.data.prepare.dedup import (
    EXACT,
    KEPT,
    NEAR,
    PERMUTATIONS,
    DocumentHashes,
    band_hashes,
    bands_for,
    find_duplicates,
    signatures,
    text_digests,
)
from medllm_jax.errors import UserError

LETTERS = list("abcdefghijklmnopqrstuvwxyz あいうえお患者発熱を訴えている高血圧")


def random_text(seed, length=1000):
    return "".join(np.random.default_rng(seed).choice(LETTERS, length))


def shingles(text):
    text = "".join(text.split())
    return {text[start : start + 5] for start in range(max(1, len(text) - 4))}


def jaccard(one, other):
    one, other = shingles(one), shingles(other)
    return len(one & other) / len(one | other)


def surveyed(texts):
    return DocumentHashes(lambda: text_digests(texts), lambda: signatures(texts))


def decide(texts, threshold=0.8):
    return find_duplicates([surveyed(texts)], threshold)[0].tolist()


def similar(share, seed=0):
    """Signatures of three documents, a ~ b ~ c with `share` of their places equal, and those of a and c at others."""
    a, b, c = np.random.default_rng(seed).integers(0, 2**32, (3, PERMUTATIONS), dtype=np.uint32)
    places = int(share * PERMUTATIONS)
    b[:places], c[-places:] = a[:places], b[-places:]
    return np.stack([a, b, c])


# Signatures


def test_signatures_estimate_the_jaccard_similarity():
    pairs = [(text, random_text(n + 500)[: 12 * n] + text[12 * n :]) for n in range(80) for text in [random_text(n)]]
    exact = np.array([jaccard(*pair) for pair in pairs])
    one, other = (signatures(texts) for texts in zip(*pairs, strict=True))
    error = (one == other).mean(axis=1) - exact
    deviation = np.sqrt(exact * (1 - exact) / PERMUTATIONS) + 1e-9
    assert exact.min() < 0.1 and exact.max() == 1
    assert abs(error.mean()) < 0.01 and np.abs(error / deviation).max() < 4


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=12), max_size=6))
def test_a_signature_is_of_its_text_alone_and_without_white_space(texts):
    alone = np.array([signatures([text])[0] for text in texts], np.uint32).reshape(-1, PERMUTATIONS)
    np.testing.assert_array_equal(signatures(texts), alone)
    np.testing.assert_array_equal(signatures([" \n" + "\u3000".join(text) for text in texts]), alone)


def test_blocks_change_nothing(monkeypatch):
    texts = [random_text(seed, 37 * seed) for seed in range(12)]
    whole = signatures(texts)
    for characters in (1, 500):
        monkeypatch.setattr("medllm_jax.data.prepare.dedup._BLOCK_CHARACTERS", characters)
        np.testing.assert_array_equal(signatures(texts), whole)


def test_another_process_finds_the_same():
    program = (
        "from medllm_jax.data.prepare.dedup import *\n"
        "found = signatures(['患者は発熱を訴えている。', 'fever'])\n"
        "print(found.tolist(), band_hashes(found, 0.8).tolist(), text_digests(['fever']).tolist())"
    )
    texts = ["患者は発熱を訴えている。", "fever"]
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    found = signatures(texts)
    here = (found.tolist(), band_hashes(found, 0.8).tolist(), text_digests(["fever"]).tolist())
    assert result.stdout.strip() == " ".join(map(str, here))


def test_bands_find_what_is_above_the_threshold_and_less_of_what_is_below():
    for threshold in (0.5, 0.7, 0.8, 0.9):
        bands, rows = bands_for(threshold)
        assert bands * rows <= PERMUTATIONS
        found = [1 - (1 - similarity**rows) ** bands for similarity in (threshold + 0.05, threshold - 0.3)]
        assert found[0] > 0.85 and found[1] < 0.2
        # As many documents share a bucket as the formula says.
        rng = np.random.default_rng(0)
        one, other = rng.integers(0, 2**32, (2, 2000, PERMUTATIONS), dtype=np.uint32)
        other = np.where(rng.random(one.shape) < threshold, one, other)
        share = (band_hashes(one, threshold) == band_hashes(other, threshold)).any(axis=1).mean()
        assert share == pytest.approx(1 - (1 - threshold**rows) ** bands, abs=0.05)
    for wrong in (0.0, 1.2, float("nan")):
        with pytest.raises(UserError, match="threshold"):
            bands_for(wrong)


# Decisions


def test_copies_are_exact_edits_are_near_and_others_are_kept():
    text = random_text(1)
    edited = text[:500] + random_text(2, 20) + text[520:]
    wrapped = text[:300] + "\n\n" + text[300:]
    texts = [text, random_text(3), text, edited, wrapped, random_text(4), edited, random_text(3)[:500]]
    assert jaccard(text, edited) > 0.9 > 0.6 > jaccard(texts[1], texts[-1])
    assert decide(texts) == [KEPT, KEPT, EXACT, NEAR, NEAR, KEPT, EXACT, KEPT]
    assert decide(texts, None) == [KEPT, KEPT, EXACT, KEPT, KEPT, KEPT, EXACT, KEPT]
    assert decide(texts, 1.0) == [KEPT, KEPT, EXACT, KEPT, NEAR, KEPT, EXACT, KEPT]
    assert decide(texts[::-1])[::-1] == [EXACT, KEPT, NEAR, EXACT, NEAR, KEPT, KEPT, KEPT]
    assert find_duplicates([], 0.8) == [] and decide([]) == []


def test_what_is_left_out_makes_nothing_a_duplicate():
    found = similar(0.9)
    digests = np.arange(6, dtype=np.uint64).reshape(3, 2)
    a_b, b_c, a_c = ((found[i] == found[j]).mean() for i, j in ((0, 1), (1, 2), (0, 2)))
    assert a_b >= 0.85 and b_c >= 0.85 and a_c < 0.85
    assert find_duplicates([DocumentHashes(lambda: digests, lambda: found)], 0.85)[0].tolist() == [KEPT, NEAR, KEPT]
    # An exact duplicate is out before near ones are looked for.
    equal = np.array([[0, 1], [0, 1], [2, 3]], np.uint64)
    assert find_duplicates([DocumentHashes(lambda: equal, lambda: found)], 0.85)[0].tolist() == [KEPT, EXACT, KEPT]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), max_size=20), st.sets(st.integers(0, 20)))
def test_the_division_into_tasks_changes_nothing(documents, cuts):
    texts = [random_text(seed, 200) + random_text(edit, 8) for seed, edit in documents]
    whole = decide(texts)
    edges = [0, *sorted(cut for cut in cuts if cut <= len(texts)), len(texts)]
    tasks = [surveyed(texts[start:end]) for start, end in itertools.pairwise(edges)]
    found = find_duplicates(tasks, 0.8)
    assert [len(part) for part in found] == [end - start for start, end in itertools.pairwise(edges)]
    assert np.concatenate(found).tolist() == whole

    first = {text: place for place, text in reversed(list(enumerate(texts)))}
    assert [kind == EXACT for kind in whole] == [first[text] < place for place, text in enumerate(texts)]
    kept = [signature for signature, kind in zip(signatures(texts), whole, strict=True) if kind == KEPT]
    for place, signature in enumerate(kept):
        for earlier in kept[:place]:
            shared = (band_hashes(signature[None], 0.8) == band_hashes(earlier[None], 0.8)).any()
            assert not (shared and (signature == earlier).mean() >= 0.8)


def test_a_bucket_of_very_many_is_no_trouble():
    rng = np.random.default_rng(0)
    found = np.tile(rng.integers(0, 2**32, PERMUTATIONS, dtype=np.uint32), (20_000, 1))
    found[1::2, :10] = rng.integers(0, 2**32, (10_000, 10), dtype=np.uint32)
    digests = rng.integers(0, 2**63, (20_000, 2)).astype(np.uint64)
    kinds = find_duplicates([DocumentHashes(lambda: digests, lambda: found)], 0.8)[0]
    assert kinds[0] == KEPT and (kinds[1:] == NEAR).all()
