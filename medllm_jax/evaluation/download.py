"""Fetches a public exam, every file of it known by its checksum beforehand. This project holds none of it."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from etils import epath

from medllm_jax.errors import RunError, UserError
from medllm_jax.storage.lease import sole_writer

_RETRIES = 6
_BACKOFF = 1.0  # seconds before the second repetition; each further wait is twice as long
_PASSING = (408, 429, 500, 502, 503, 504)
_MAX_WAIT = 60  # seconds that are waited at a server's word, at most
_TOGETHER = 8  # files at a time
_COMMIT = "2bc4c3d159cf5505f6253d24a909fbd53237e239"

SOURCE = f"https://raw.githubusercontent.com/jungokasai/IgakuQA/{_COMMIT}"
ATTRIBUTION = f"""# IgakuQA

The Japanese medical licensing exam of 2018 to 2022, as collected in https://github.com/jungokasai/IgakuQA, commit
{_COMMIT}, by Jungo Kasai, Yuhei Kasai, Keisuke Sakaguchi, Yutaro Yamada and Dragomir Radev: "Evaluating GPT-4 and
ChatGPT on Japanese Medical Licensing Examinations" (arXiv 2303.18027). The questions are those of the Japanese Ministry
of Health, Labour and Welfare. The repository states no licence: whether and how you may use or pass on these files is
yours to find out. Keep them out of what models are trained on.
"""


class Fetched(NamedTuple):
    """Numbers of files: fetched, and found there already with the right content."""

    fetched: int
    kept: int


def igakuqa_files(years: Sequence[int] | None = None, *, baselines: bool = False) -> dict[str, str]:
    """Path in the repository -> sha256, of questions and metadata, and of published predictions if asked for."""
    lines = (epath.Path(__file__).parent / "igakuqa.sha256").read_text().splitlines()
    known = {path: digest for digest, path in (line.split() for line in lines)}
    held = sorted({int(path.split("/")[1]) for path in known})
    if unknown := sorted(set(years or ()) - set(held)):
        raise UserError(f"there is no IgakuQA of {', '.join(map(str, unknown))}; there are {held[0]} to {held[-1]}")
    return {
        path: digest
        for path, digest in known.items()
        if (baselines or path.startswith("data/")) and (not years or int(path.split("/")[1]) in years)
    }


@sole_writer("output")
def fetch(
    files: Mapping[str, str],
    source: str,
    output: epath.PathLike,
    attribution: str,
    *,
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> Fetched:
    """Fetches files by their paths under a URL into a folder, several at a time.

    A file is written once its content is known to be right; what is there and right is not fetched again, so that an
    interrupted call goes on.

    Args:
      files: path -> sha256.
      source: URL of the folder they are in, http or https.
      output: folder, local or gs://.
      attribution: where they come from; becomes ATTRIBUTION.md.
      overwrite: replaces files that are there with another content.
      progress: called with the number of files done.

    Raises:
      UserError: the source lacks a file or has another content; or a file with another content is there.
      RunError: the source can't be reached.
    """
    import urllib3

    if not source.startswith(("http://", "https://")) or "@" in source:
        raise UserError("--source must be a URL like https://host/path, without a user name or password in it")
    folder, source = epath.Path(output), source.rstrip("/")
    wanted = {path: digest for path, digest in files.items() if not _is_right(folder / path, digest, overwrite)}
    retries = urllib3.Retry(
        total=_RETRIES,
        status_forcelist=_PASSING,
        backoff_factor=_BACKOFF,
        backoff_jitter=_BACKOFF,
        raise_on_status=False,
        retry_after_max=_MAX_WAIT,
    )
    http = urllib3.PoolManager(maxsize=_TOGETHER, retries=retries, timeout=urllib3.Timeout(connect=10, read=60))

    def take(path: str) -> None:
        url = f"{source}/{path}"
        try:
            response = http.request("GET", url)
        except urllib3.exceptions.HTTPError as error:
            reason = getattr(error, "reason", None) or error
            raise RunError(
                f"{url}: no answer ({type(reason).__name__}); see that it can be reached, then go on"
            ) from error
        if response.status in _PASSING:
            raise RunError(f"{url}: status {response.status} after {_RETRIES} repetitions; go on later")
        if response.status != 200:
            raise UserError(f"{url}: status {response.status}; is --source the right folder?")
        if hashlib.sha256(response.data).hexdigest() != wanted[path]:
            raise UserError(
                f"{url}: its content is not that of the pinned commit (sha256 differs); nothing was written"
            )
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(f".{target.name}.tmp")
        unfinished.write_bytes(response.data)
        unfinished.replace(target)

    kept = len(files) - len(wanted)
    progress(kept)
    with ThreadPoolExecutor(_TOGETHER) as pool:
        pending = [pool.submit(take, path) for path in wanted]
        try:
            for done, future in enumerate(pending, kept + 1):
                future.result()
                progress(done)
        finally:
            for future in pending:
                future.cancel()
    (folder / "ATTRIBUTION.md").write_text(attribution, encoding="utf-8")
    return Fetched(len(wanted), kept)


def _is_right(file: epath.Path, digest: str, overwrite: bool) -> bool:
    if not file.exists():
        return False
    if hashlib.sha256(file.read_bytes()).hexdigest() == digest:
        return True
    if not overwrite:
        raise UserError(f"{file} is there with another content: remove it, give another --output, or --overwrite")
    return False
