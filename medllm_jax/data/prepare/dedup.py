"""Exact and near duplicates of a corpus; of each group the document that comes first in corpus order is kept.

A document is represented by a digest of its text, and for near duplicates by a MinHash signature of its character
5-grams. Both are made where the document is read; the decision over the whole corpus sees nothing else.
"""

import functools
import hashlib
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from medllm_jax.errors import UserError

PERMUTATIONS = 128
SHINGLE = 5  # characters: two or three words of Japanese, about one of English

KEPT, EXACT, NEAR = 0, 1, 2

_SEED = 1
# Characters that are hashed at once: few enough to stay in the processor's caches.
_BLOCK_CHARACTERS = 1 << 17
# Odd multipliers with well mixed bits (Steele et al. 2014, SplitMix64, and the golden ratio).
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xBF58476D1CE4E5B9)
# A false positive (a shared bucket by chance) costs one comparison; a false negative is missed for good.
_FALSE_POSITIVE_WEIGHT, _FALSE_NEGATIVE_WEIGHT = 0.1, 0.9


Signatures = Callable[[], np.ndarray]


class DocumentHashes(NamedTuple):
    """The hashes of a task's n documents. They are loaded when needed, and not kept.

    digests: returns uint64 [n, 2]; signatures: returns uint32 [n, PERMUTATIONS], for example a memory-mapped file;
    None where near duplicates are not looked for.
    """

    digests: Callable[[], np.ndarray]
    signatures: Signatures | None = None


def text_digests(texts: Sequence[str]) -> np.ndarray:
    """uint64 [n, 2]: blake2b of 16 bytes over the UTF-8 of each text's NFC: composed or not, it is the same text."""
    composed = (unicodedata.normalize("NFC", text) for text in texts)
    joined = b"".join(hashlib.blake2b(text.encode(), digest_size=16).digest() for text in composed)
    return np.frombuffer(joined, "<u8").reshape(-1, 2)


def signatures(texts: Sequence[str]) -> np.ndarray:
    """uint32 [n, PERMUTATIONS]: MinHash (Broder 1997) of the set of each text's character 5-grams.

    White space does not count, so line breaks and indentation make no difference; a text of fewer than five characters
    is one shingle. The share of places where two signatures are equal estimates the Jaccard similarity
    J of the sets, with a standard deviation of sqrt(J (1 - J) / PERMUTATIONS). Equal in every process; another
    version of rensa may draw other permutations. Memory: about 35 bytes a character of the longest text.
    """
    import rensa

    found = np.empty((len(texts), PERMUTATIONS), np.uint32)
    row = 0
    for block in _blocks(texts):
        hashes, offsets = _shingles(block)
        # (A compiled module without type stubs.)
        minhash = rensa.RMinHash  # pyrefly: ignore[missing-attribute]
        matrix = minhash.digest_matrix_from_flat_token_hashes(hashes, offsets, PERMUTATIONS, _SEED)
        found[row : row + len(block)] = matrix.to_rows()
        row += len(block)
    return found


def _blocks(texts: Sequence[str]) -> Iterator[list[str]]:
    """The texts without white space and not shorter than a shingle, in lists of bounded size."""
    block: list[str] = []
    size = 0
    for text in texts:
        block.append("".join(text.split()).ljust(SHINGLE, "\0"))
        size += len(block[-1])
        if size >= _BLOCK_CHARACTERS:
            yield block
            block, size = [], 0
    if block:
        yield block


def _shingles(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """A hash of every shingle, uint64 [total], and where each text's begin and the last one's end, uint64 [n + 1]."""
    points = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint64)
    ends = np.cumsum([len(text) for text in texts])
    # Three code points of 21 bits fill one number, the other two are multiplied in: no two 5-grams are alike before
    # the mixing but by chance.
    first = points[:-4] | (points[1:-3] << np.uint64(21)) | (points[2:-2] << np.uint64(42))
    hashes = (points[3:-1] | (points[4:] << np.uint64(21))) * _GOLDEN
    hashes ^= first
    hashes *= _MIX
    hashes ^= hashes >> np.uint64(32)
    hashes *= _GOLDEN
    # A window that begins in the last four characters of a text reaches into the next one.
    inside = np.ones(len(hashes), bool)
    inside[(ends[:-1, None] - np.arange(1, SHINGLE)).ravel()] = False
    offsets = np.concatenate([[0], ends - (SHINGLE - 1) * np.arange(1, len(texts) + 1)])
    return hashes[inside], offsets.astype(np.uint64)


@functools.lru_cache
def bands_for(threshold: float) -> tuple[int, int]:
    """(bands, rows) of the banding that best finds pairs of at least this Jaccard similarity; their product is at most
    PERMUTATIONS.

    With b bands of r rows, a pair of similarity s shares a bucket with probability 1 - (1 - s^r)^b (Leskovec et al.,
    Mining of Massive Datasets, section 3.4). What is minimised is the weighted sum of its integral below the threshold,
    false positives, and of what it lacks to 1 above, false negatives (Zhu et al. 2016, LSH Ensemble, section 4).
    A miss weighs nine times as much: every pair that is found is compared in full.
    """
    if not 0 < threshold <= 1:
        raise UserError(f"the threshold of near duplicates is {threshold}: a similarity above 0, at most 1 is needed")
    similarity = (np.arange(1000) + 0.5) / 1000
    below = similarity < threshold

    def cost(banding: tuple[int, int]) -> float:
        bands, rows = banding
        missed = (1 - similarity**rows) ** bands
        return _FALSE_POSITIVE_WEIGHT * np.sum(1 - missed[below]) + _FALSE_NEGATIVE_WEIGHT * np.sum(missed[~below])

    return min(
        ((bands, rows) for bands in range(1, PERMUTATIONS + 1) for rows in range(1, PERMUTATIONS // bands + 1)),
        key=cost,
    )


def band_hashes(signatures: np.ndarray, threshold: float) -> np.ndarray:
    """uint64 [n, bands]: for each band one number that is equal, but by chance, iff all rows of the band are."""
    bands, rows = bands_for(threshold)
    parts = signatures[:, : bands * rows].reshape(len(signatures), bands, rows)
    hashes = np.zeros((len(signatures), bands), np.uint64)
    for row in range(rows):
        hashes ^= parts[:, :, row]
        hashes *= _GOLDEN
        hashes ^= hashes >> np.uint64(29)
    return hashes


def find_duplicates(tasks: Sequence[DocumentHashes], threshold: float | None) -> list[np.ndarray]:
    """Which documents to keep: uint8 [n] a task, of KEPT, EXACT and NEAR. The division into tasks changes nothing.

    EXACT: an earlier document has the same digest. NEAR, unless the threshold is None: an earlier document that is
    kept shares a bucket, and the similarity estimated from all of both signatures is at least the threshold.

    Memory: about 60 bytes a document to order the digests; after that 8 bytes for each document and band, some 50 bytes
    for each bucket that a document shares with others, and 512 bytes for each kept document that shares one; and what
    the calls for one task return.

    Raises UserError for a threshold outside (0, 1].
    """
    digests = [task.digests() for task in tasks]
    sizes = [len(part) for part in digests]
    found = np.zeros(sum(sizes), np.uint8)
    if len(found):
        found[_repeated(np.concatenate(digests))] = EXACT
    del digests
    starts = np.cumsum([0, *sizes])
    if threshold is not None and len(found):
        found[_near(list(map(_signatures_of, tasks)), starts, np.flatnonzero(found == KEPT), threshold)] = NEAR
    return np.split(found, starts[1:-1]) if tasks else []


def _signatures_of(task: DocumentHashes) -> Signatures:
    if task.signatures is None:
        raise ValueError("near duplicates are looked for, and a task has no signatures")
    return task.signatures


def _repeated(digests: np.ndarray) -> np.ndarray:
    """Indices of the rows of uint64 [n, 2] that an earlier row is equal to."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: of equal rows the first comes first
    ordered = digests[order]
    return order[1:][(ordered[1:] == ordered[:-1]).all(axis=1)]


def _near(signatures: Sequence[Signatures], starts: np.ndarray, alive: np.ndarray, threshold: float) -> np.ndarray:
    """Documents among ``alive`` (ascending) that are near duplicates of an earlier one that is kept."""
    documents, buckets = _shared_buckets(_all_band_hashes(signatures, starts, alive, threshold))
    if not len(documents):
        return alive[:0]
    heads = np.flatnonzero(np.diff(documents, prepend=-1))
    candidates = alive[documents[heads]]
    # Its pages are given out as they are written to: memory holds the signatures of kept candidates only.
    kept = np.empty((len(candidates), PERMUTATIONS), np.uint32)
    kept_count = 0
    kept_in: dict[int, list[int]] = defaultdict(list)  # bucket -> rows of `kept`
    near = []
    for number, load in enumerate(signatures):
        first, last = np.searchsorted(candidates, starts[number : number + 2])
        if first == last:
            continue
        own = np.asarray(load()[candidates[first:last] - starts[number]])
        for place, signature in zip(range(first, last), own, strict=True):
            end = heads[place + 1] if place + 1 < len(heads) else len(buckets)
            shared = buckets[heads[place] : end].tolist()
            rivals = list(set().union(*(kept_in[bucket] for bucket in shared)))
            if rivals and _most_alike(kept[rivals], signature) >= threshold:
                near.append(candidates[place])
                continue
            kept[kept_count] = signature
            for bucket in shared:
                kept_in[bucket].append(kept_count)
            kept_count += 1
    return np.array(near, np.int64)


def _most_alike(others: np.ndarray, signature: np.ndarray) -> float:
    """The greatest estimated Jaccard similarity of a signature to others, uint32 [k, PERMUTATIONS]."""
    return np.count_nonzero(others == signature, axis=1).max() / PERMUTATIONS


def _all_band_hashes(
    signatures: Sequence[Signatures], starts: np.ndarray, alive: np.ndarray, threshold: float
) -> np.ndarray:
    """uint64 [bands, number of alive documents]."""
    hashes = np.empty((bands_for(threshold)[0], len(alive)), np.uint64)
    for number, load in enumerate(signatures):
        first, last = np.searchsorted(alive, starts[number : number + 2])
        if first == last:
            continue
        hashes[:, first:last] = band_hashes(load()[alive[first:last] - starts[number]], threshold).T
    return hashes


def _shared_buckets(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Who shares a bucket with whom, of hashes uint64 [bands, m]: document and bucket, int64 each, by document."""
    documents, buckets = [], []
    count = 0
    for band in hashes:
        order = np.argsort(band, kind="stable")
        ordered = band[order]
        same = np.concatenate([[False], ordered[1:] == ordered[:-1], [False]])
        member = same[1:] | same[:-1]
        begins = member & ~same[:-1]
        documents.append(order[member])
        buckets.append(count + np.cumsum(begins)[member] - 1)
        count += np.count_nonzero(begins)
    documents, buckets = np.concatenate(documents), np.concatenate(buckets)
    order = np.argsort(documents, kind="stable")
    return documents[order], buckets[order]
