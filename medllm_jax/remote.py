"""What is different about gs://. Imports nothing of it: what reads buckets is slow to import."""

import json
import os
import sys


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is in object storage: nothing can be appended to there, and a folder can't be renamed at once."""
    return "://" in str(path)


def turn_off_listing_cache() -> None:
    """Makes paths under gs:// say what is there now.

    By default gcsfs, which is behind them, remembers listings, so that even `exists()` never sees what another process
    wrote or removed. The defaults of its file systems are read from the environment when fsspec is imported; a setting
    of the user's own stands.
    """
    try:
        settings = json.loads(os.environ.get("FSSPEC_GCS", "{}"))
    except ValueError:
        return  # fsspec warns of it
    if isinstance(settings, dict):
        os.environ["FSSPEC_GCS"] = json.dumps({"use_listings_cache": False} | settings)
    if "fsspec" in sys.modules:  # by the program that imports us: what it has read, it won't read again
        sys.modules["fsspec"].config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
