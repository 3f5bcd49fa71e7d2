"""How long the answer extractor takes at worst, over texts that repeat what its rules look for.

    python -m benchmarks.extractor

Prints the slowest kinds of text of 10 kB, 1 MB and 10 MB: least of three times, in milliseconds of processor time. The
goal is 10 ms an output, whatever a model has written.
"""

import argparse
import time

from medllm_jax.evaluation.extraction.extract import extract
from tests.evaluation.extraction.test_extract import QUESTIONS, REPEATED

SIZES = (10_000, 1_000_000, 10_000_000)
SHOWN = 5


def milliseconds(name: str, text: str, condition: str) -> float:
    """Processor time of one extraction."""
    start = time.process_time()
    extract(QUESTIONS[name], text, "length", condition)
    return 1000 * (time.process_time() - start)


def main() -> None:
    argparse.ArgumentParser(prog="python -m benchmarks.extractor", description=__doc__.splitlines()[0]).parse_args()
    for size in SIZES:
        found = []
        for piece in REPEATED:
            text = piece * (size // len(piece)) + "X"
            for name in QUESTIONS:
                for condition in ("answer_only", "explain"):
                    found.append(
                        (min(milliseconds(name, text, condition) for _ in range(3)), repr(piece), name, condition)
                    )
        found.sort(reverse=True)
        print(f"{size:,} characters: {len(found)} kinds; the slowest")
        for worst, *what in found[:SHOWN]:
            print(f"  {worst:6.2f} ms  {'  '.join(what)}")


if __name__ == "__main__":
    main()
