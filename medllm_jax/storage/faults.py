"""What storage says when it does not do what it is asked, local or gs://: the one place that reads its errors.

Files are reached through the operating system, gcsfs, TensorStore and google-cloud-storage. Each has errors of its own;
here they become one of five kinds, by type and code. An error may be any of those that others were raised from.
"""

import builtins
import errno
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

from medllm_jax.errors import RunError, UserError

Kind = Literal["absent", "forbidden", "unreachable", "full", "damaged"]

_NUMBERS: dict[Kind, tuple[int, ...]] = {
    "absent": (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
    "forbidden": (errno.EACCES, errno.EPERM, errno.EROFS),
    "full": (errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    "unreachable": (
        *(errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.EPIPE, errno.ETIMEDOUT),
        *(errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.ESTALE),
    ),
    "damaged": (errno.EIO,),
}
_BY_ERRNO = {number: kind for kind, numbers in _NUMBERS.items() for number in numbers}
# What TensorStore's errors begin with (absl's status codes).
_BY_STATUS: dict[str, Kind] = {
    "NOT_FOUND": "absent",
    "PERMISSION_DENIED": "forbidden",
    "UNAUTHENTICATED": "forbidden",
    "DATA_LOSS": "damaged",
    "UNAVAILABLE": "unreachable",
    "RESOURCE_EXHAUSTED": "unreachable",  # a quota of requests; of a full disk it gives the system's number
    "CANCELLED": "unreachable",
    "DEADLINE_EXCEEDED": "unreachable",
    "ABORTED": "unreachable",
}
# What the clients raise where no answer came: module -> its class of such errors.
_NO_ANSWER = {
    "aiohttp": "ClientError",
    "requests": "RequestException",
    "urllib3.exceptions": "HTTPError",
    "google.auth.exceptions": "TransportError",
}
_TEXTS: dict[Kind, str] = {
    "absent": "what was asked for is not there ({}): give a path that exists; a bucket must exist before it is written",
    "forbidden": "storage refuses access ({}): check the credentials and their rights, then start again",
    "unreachable": "storage can't be reached ({}): check the network and the address, then start again",
    "full": "no space is left ({}): make room, then start again",
    "damaged": "storage gave back something else than was written, or only part of it ({})",
}
# What clients add to their words, for those who wrote them.
_DETAILS = re.compile(r"\[(?:tensorstore_spec|http_response\w*|os_error_code|source locations)=.*", re.DOTALL)


class Fault(NamedTuple):
    """What storage did not do, and its own words for it in one line."""

    kind: Kind
    words: str


def fault_of(error: BaseException | None) -> Fault | None:
    """The fault behind an error; None where it is no error of storage."""
    for each in _causes(error):
        kind = _kind(each)
        if kind is not None:
            return Fault(kind, words_of(each))
    return None


def passes(error: BaseException | None) -> bool:
    """Whether an error says nothing of what is stored: it was out of reach, and may be there and whole."""
    fault = fault_of(error)
    return fault is not None and fault.kind in ("forbidden", "unreachable", "full")


def as_told(error: BaseException, paths: Sequence[str] = ()) -> UserError | RunError | None:
    """The error to show for a fault of storage, in one line; None where an error is none.

    Only what is absent is for the user to change; all else may pass.

    paths: what is in use: some clients don't say which of it failed.
    """
    fault = fault_of(error)
    if fault is None:
        return None
    unnamed = [path for path in paths if path.partition("://")[2].partition("/")[0] not in fault.words]
    words = fault.words + "".join(f"; in use: {path}" for path in unnamed[:2])
    return (UserError if fault.kind == "absent" else RunError)(_TEXTS[fault.kind].format(words))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it came of, each once."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _kind(error: BaseException) -> Kind | None:
    status = _http_status(error)
    if status is not None:
        return _of_http(status)
    if isinstance(error, OSError):
        if error.errno is not None:
            # (Numbers of name resolution are not those of the system.)
            return "unreachable" if type(error).__module__ == "socket" else _BY_ERRNO.get(error.errno)
        match error:
            case FileNotFoundError():
                return "absent"
            case PermissionError():
                return "forbidden"
            case ConnectionError() | TimeoutError():
                return "unreachable"
        if str(error).startswith("Forbidden: "):  # all that gcsfs says of a 403
            return "forbidden"
    if type(error) is ValueError:
        return _of_tensorstore(str(error))
    if _is_a(error, "google.auth.exceptions", "GoogleAuthError") and not _no_answer(error):
        return "forbidden"
    return "unreachable" if _no_answer(error) else None


def _http_status(error: BaseException) -> int | None:
    """The status of an answer over HTTP that an error stands for."""
    code: Any = None
    if _is_a(error, "gcsfs.retry", "HttpError") or _is_a(error, "google.api_core.exceptions", "GoogleAPICallError"):
        code = getattr(error, "code", None)
    elif _is_a(error, "google.cloud.storage.exceptions", "InvalidResponse"):
        code = getattr(getattr(error, "response", None), "status_code", None)
    try:
        return int(code)
    except (TypeError, ValueError):
        return None


def _of_http(status: int) -> Kind | None:
    if status in (404, 410):
        return "absent"
    if status in (401, 403, 407):
        return "forbidden"
    return "unreachable" if status in (408, 429) or status >= 500 else None


def _of_tensorstore(text: str) -> Kind | None:
    number = re.search(r"\[os_error_code='(\d+)'\]", text)
    if number:
        return _BY_ERRNO.get(int(number[1]))
    status, colon, _ = text.partition(": ")
    return _BY_STATUS.get(status) if colon else None


def _no_answer(error: BaseException) -> bool:
    return any(_is_a(error, module, name) for module, name in _NO_ANSWER.items())


def _is_a(error: BaseException, module: str, name: str) -> bool:
    """Whether an error is of a class of a module, which need not be imported: then it is not."""
    of = getattr(sys.modules.get(module), name, None)
    return isinstance(of, type) and isinstance(error, of)


def words_of(error: BaseException) -> str:
    """One short line: the type where the text alone would say little, and what the client says without its details."""
    text = _DETAILS.sub("", str(error))
    text = re.sub(r"\s+", " ", text).strip()
    name = type(error).__name__
    short = text if len(text) <= 200 else text[:197] + "..."
    return short if short and hasattr(builtins, name) else f"{name}: {short}" if short else name
