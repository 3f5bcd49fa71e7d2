"""Documents in files, for tests: written in any form, and read back."""

import bz2
import gzip
import json
import lzma

import pyarrow as pa

from medllm_jax.data.prepare.inventory import take_inventory
from medllm_jax.data.prepare.readers import ReadOptions, read_documents
from medllm_jax.data.prepare.rejections import RejectionCounts

TEXTS = ["The patient has a fever.", "患者は発熱を訴えている。\n\n正解は三番。", "a", "long " * 120]

# Suffix -> how content is compressed for it.
PACK = {
    ".gz": gzip.compress,
    ".zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
}


def documents_of(file, range_bytes=10**9, **options):
    """The documents of all ranges, and what was rejected."""
    rejections = RejectionCounts()
    ranges = take_inventory(file, range_bytes).ranges
    return [d for part in ranges for d in read_documents(part, ReadOptions(**options), rejections)], rejections


def texts_of(file, range_bytes=10**9, **options):
    return [document.text for document in documents_of(file, range_bytes, **options)[0]]


def lines_of(texts):
    """JSON lines of documents with these texts."""
    return "".join(json.dumps({"text": text, "id": 3}) + "\n" for text in texts).encode()
