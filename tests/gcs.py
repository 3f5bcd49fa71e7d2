"""Google Cloud Storage in memory, on loopback: what TensorStore, gcsfs and google-cloud-storage ask of its JSON API.

What is not understood is refused, never ignored: a precondition that an emulator overlooks makes writers look safe that
are not. Every request goes through ``_Handler._serve``, where ``Faults`` make some go wrong, as they do over a network.
"""

import base64
import datetime
import hashlib
import itertools
import json
import random
import re
import socket
import struct
import sys
import threading
import time
import types
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import parse_qsl, quote, unquote

import google_crc32c

# What the clients of buckets read when they are imported.
CLIENTS = {
    "EPATH_USE_TF": "false",
    "NO_GCE_CHECK": "true",
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    "FSSPEC_GCS": '{"token": "anon"}',  # its listing cache is for medllm_jax to turn off
}


def environment(url: str) -> dict[str, str]:
    """Variables that send every client to an emulator; they must be set before the clients are imported."""
    return CLIENTS | {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "CLOUD_STORAGE_EMULATOR_ENDPOINT": url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "fake",
        "GOOGLE_CLOUD_PROJECT": "test",
    }


def be_impatient() -> None:
    """From now on the clients in this process try again after milliseconds, not seconds."""
    import asyncio

    import gcsfs.retry
    import tensorstore
    from google.api_core.retry import retry_unary

    gcsfs.retry.asyncio = types.SimpleNamespace(sleep=lambda seconds: asyncio.sleep(seconds / 100))
    retry_unary.time = types.SimpleNamespace(
        sleep=lambda seconds: time.sleep(seconds / 100), monotonic=time.monotonic, time=time.time
    )
    retries = {"context": {"gcs_request_retries": {"initial_delay": "10ms", "max_delay": "20ms"}}}
    for module in (tensorstore, tensorstore.KvStore):
        module.open = _with_spec(module.open, retries)


def _with_spec(opening: Any, more: dict[str, Any]) -> Any:
    return lambda spec, **options: opening(spec | more if isinstance(spec, dict) else spec, **options)


class Request(NamedTuple):
    """A request as it came: the path with its query, the body without transfer encoding."""

    method: str
    path: str
    headers: Any
    body: bytes


class Response(NamedTuple):
    status: int
    body: bytes = b""
    headers: dict[str, str] = {}  # noqa: RUF012 (never changed)


Fault = Literal["unavailable", "lost", "reset", "cut", "slow"]


class Logged(NamedTuple):
    """A request; status 0 stands for an answer that did not come, or not to its end."""

    method: str
    path: str
    status: int
    fault: Fault | None = None


class Faults(NamedTuple):
    """What goes wrong, in shares of the requests; a request's number decides which, so that a run can be repeated.

    unavailable: answered 503. Of these every fourth was carried out all the same, and only its answer is "lost".
    reset: the connection ends, for one half before anything was done, for the other after, with the answer "cut" in the
    middle. slow: answered after ``delay_seconds``. lost_writes: whether a write, too, may be carried out and yet fail.
    """

    unavailable: float = 0.0
    reset: float = 0.0
    slow: float = 0.0
    delay_seconds: float = 0.05
    seed: int = 0
    lost_writes: bool = True

    def of(self, number: int, request: Request) -> Fault | None:
        lost, cut = (0.25, 0.5) if self.lost_writes or request.method == "GET" else (0.0, 0.0)
        shares: dict[Fault, float] = {
            "unavailable": (1 - lost) * self.unavailable,
            "lost": lost * self.unavailable,
            "reset": (1 - cut) * self.reset,
            "cut": cut * self.reset,
            "slow": self.slow,
        }
        left = random.Random(f"{self.seed}/{number}").random()
        for fault, share in shares.items():
            left -= share
            if left < 0:
                return fault
        return None


@dataclass
class Stored:
    """An object. Replacing it gives a new generation, changing its metadata a new metageneration."""

    data: bytes
    generation: int
    content_type: str = "application/octet-stream"
    metadata: dict[str, str] = field(default_factory=dict)
    metageneration: int = 1
    components: int = 0  # of a composed object, which has no md5
    content_encoding: str = ""
    created: str = field(default_factory=lambda: datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"))

    def hashes(self) -> dict[str, str]:
        found = {"crc32c": _crc32c(self.data)}
        return found if self.components else found | {"md5Hash": _md5(self.data)}


@dataclass
class _Upload:
    """A resumable upload that has begun."""

    bucket: str
    query: dict[str, str]
    resource: dict[str, Any]
    data: bytearray = field(default_factory=bytearray)
    answer: Response | None = None  # once it is finished, given again to whoever asks again


class _Refused(Exception):  # noqa: N818 (an answer, not an error)
    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


class Gcs:
    """The emulator; a context. What it holds can be read and written without HTTP.

    broken: bucket -> status that all its requests are answered with, or the fault that they all suffer.
    """

    def __init__(self, *buckets: str, faults: Faults | None = None, broken: dict[str, int | Fault] | None = None):
        self.broken = broken or {}
        self.buckets: dict[str, dict[str, Stored]] = {bucket: {} for bucket in buckets}
        self.faults = faults or Faults()  # may be set anew at any time
        self.numbers = itertools.count()  # of requests
        self.log: list[Logged] = []
        self.lock = threading.RLock()
        self._generation = 1_700_000_000_000_000
        self._uploads: dict[str, _Upload] = {}
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.gcs = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "Gcs":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    # --- without HTTP ---

    def put(self, uri: str, data: bytes, content_encoding: str = "") -> None:
        bucket, name = _split(uri)
        self._store(bucket, name, data, content_encoding=content_encoding)

    def get(self, uri: str) -> bytes:
        bucket, name = _split(uri)
        return self.buckets[bucket][name].data

    def names(self, uri: str) -> list[str]:
        """Names of the objects under a gs:// prefix, relative to it, in order."""
        bucket, prefix = _split(uri)
        with self.lock:
            return sorted(name.removeprefix(prefix) for name in self.buckets[bucket] if name.startswith(prefix))

    def upload(self, local: Path, uri: str) -> None:
        """Copies a file, or a folder and all in it."""
        if local.is_file():
            self.put(uri, local.read_bytes())
        for file in local.rglob("*"):
            if file.is_file():
                self.put(f"{uri}/{file.relative_to(local).as_posix()}", file.read_bytes())

    # --- requests ---

    def answer(self, request: Request) -> Response:
        """One request, as a whole or not at all."""
        path, _, query_text = request.path.partition("?")
        query = dict(parse_qsl(query_text, keep_blank_values=True))
        parts = [unquote(part) for part in path.strip("/").split("/")]
        if parts[0] == "download":
            parts = parts[1:]
        with self.lock:
            try:
                if parts == ["batch", "storage", "v1"]:
                    return self._batch(request)
                if parts[:4] == ["upload", "storage", "v1", "b"] and parts[5:] == ["o"]:
                    return self._receive(request, parts[4], query)
                if parts[:3] == ["storage", "v1", "b"]:
                    return self._json(request, parts[3:], query)
                raise _Refused(404, f"no such method: {request.method} {path}")
            except _Refused as refusal:
                if refusal.status == 304:
                    return Response(304)
                return _error(refusal.status, str(refusal))

    def _json(self, request: Request, parts: list[str], query: dict[str, str]) -> Response:
        match (request.method, *parts):
            case ("POST",):
                resource = json.loads(request.body)
                if self.buckets.setdefault(resource["name"], {}):
                    raise _Refused(409, f"bucket {resource['name']} exists")
                return _json_response(_bucket_resource(resource["name"]))
            case ("GET",):
                items = [_bucket_resource(bucket) for bucket in sorted(self.buckets)]
                return _json_response({"kind": "storage#buckets", "items": items})
            case ("GET", bucket):
                self._bucket(bucket)
                return _json_response(_bucket_resource(bucket))
            case ("GET", bucket, "o"):
                return self._list(bucket, query)
            case ("GET", bucket, "o", name):
                stored = self._existing(bucket, name, query, reading=True)
                if query.get("alt") == "media":
                    return _media(stored, request.headers.get("Range"))
                return _json_response(_resource(bucket, name, stored))
            case ("PATCH", bucket, "o", name):
                stored = self._existing(bucket, name, query)
                for key, value in (json.loads(request.body).get("metadata") or {}).items():
                    stored.metadata.pop(key, None) if value is None else stored.metadata.update({key: value})
                stored.metageneration += 1
                return _json_response(_resource(bucket, name, stored))
            case ("DELETE", bucket, "o", name):
                self._existing(bucket, name, query)
                del self.buckets[bucket][name]
                return Response(204)
            case ("POST", bucket, "o", name, "compose"):
                return self._compose(bucket, name, query, json.loads(request.body))
            case ("POST", bucket, "o", name, "moveTo", "o", target):
                copied = self._copy(bucket, name, bucket, target, query, {})
                del self.buckets[bucket][name]
                return _json_response(_resource(bucket, target, copied))
            case ("POST", bucket, "o", name, "copyTo" | "rewriteTo" as verb, "b", to_bucket, "o", target):
                body = json.loads(request.body or b"{}")
                copied = self._copy(bucket, name, to_bucket, target, query, body)
                resource, size = _resource(to_bucket, target, copied), str(len(copied.data))
                if verb == "copyTo":
                    return _json_response(resource)
                rewritten = {"kind": "storage#rewriteResponse", "done": True, "resource": resource}
                return _json_response(rewritten | {"objectSize": size, "totalBytesRewritten": size})
        raise _Refused(404, f"no such method: {request.method} {request.path}")

    def _bucket(self, bucket: str) -> dict[str, Stored]:
        if bucket not in self.buckets:
            raise _Refused(404, f"The specified bucket does not exist: {bucket}")
        return self.buckets[bucket]

    def _existing(self, bucket: str, name: str, query: dict[str, str], *, source=False, reading=False) -> Stored:
        """An object that must be there, in the generation asked for, after its preconditions."""
        stored = self._bucket(bucket).get(name)
        generation = query.get("sourceGeneration" if source else "generation")
        if stored is None or generation not in (None, str(stored.generation)):
            raise _Refused(404, f"No such object: {bucket}/{name}")
        _check_preconditions(stored, query, source=source, reading=reading)
        return stored

    def _store(self, bucket: str, name: str, data: bytes, query: dict[str, str] | None = None, **more: Any) -> Stored:
        with self.lock:
            objects = self._bucket(bucket)
            _check_preconditions(objects.get(name), query or {})
            self._generation += 1
            objects[name] = Stored(bytes(data), self._generation, **more)
            return objects[name]

    def _copy(self, bucket: str, name: str, to: str, target: str, query: dict[str, str], resource: dict) -> Stored:
        source = self._existing(bucket, name, query, source=True)
        kind = resource.get("contentType", source.content_type)
        metadata = resource.get("metadata", source.metadata)
        return self._store(
            to, target, source.data, query, content_type=kind, metadata=dict(metadata), components=source.components
        )

    def _compose(self, bucket: str, name: str, query: dict[str, str], body: dict[str, Any]) -> Response:
        sources = body["sourceObjects"]
        if not 1 <= len(sources) <= 32:
            raise _Refused(400, "compose takes 1 to 32 objects")
        found = []
        for source in sources:
            asked = {"generation": str(source["generation"])} if source.get("generation") else {}
            asked |= {key: str(value) for key, value in source.get("objectPreconditions", {}).items()}
            found.append(self._existing(bucket, source["name"], asked))
        kind = (body.get("destination") or {}).get("contentType", found[0].content_type)
        data = b"".join(source.data for source in found)
        count = sum(source.components or 1 for source in found)
        return _json_response(
            _resource(bucket, name, self._store(bucket, name, data, query, content_type=kind, components=count))
        )

    def _list(self, bucket: str, query: dict[str, str]) -> Response:
        """Objects, and with a delimiter what is before it, in the order of their names, in pages."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        start, end = query.get("startOffset", ""), query.get("endOffset")
        entries: dict[str, bool] = {}  # name or prefix -> whether it is a prefix
        for name in sorted(self._bucket(bucket)):
            if not name.startswith(prefix) or name < start or (end and name >= end):
                continue
            cut = name.find(delimiter, len(prefix)) if delimiter else -1
            entries[name if cut < 0 else name[: cut + len(delimiter)]] = cut >= 0
        after = base64.urlsafe_b64decode(query["pageToken"]).decode() if query.get("pageToken") else ""
        left = [name for name in entries if name > after]
        page = left[: max(1, min(1000, int(query.get("maxResults") or 1000)))]
        content: dict[str, Any] = {"kind": "storage#objects"}
        items = [_resource(bucket, name, self.buckets[bucket][name]) for name in page if not entries[name]]
        prefixes = [name for name in page if entries[name]]
        content |= {"items": items} if items else {}
        content |= {"prefixes": prefixes} if prefixes else {}
        if len(page) < len(left):
            content["nextPageToken"] = base64.urlsafe_b64encode(page[-1].encode()).decode()
        return _json_response(content)

    # --- uploads ---

    def _receive(self, request: Request, bucket: str, query: dict[str, str]) -> Response:
        self._bucket(bucket)
        if "upload_id" in query:
            return self._receive_chunk(request, query["upload_id"])
        match query.get("uploadType"):
            case "media":
                resource = {"contentType": request.headers.get("Content-Type", "application/octet-stream")}
                return self._finish_upload(bucket, query, resource, request.body)
            case "multipart":
                (_, metadata), (kind, data) = _multipart(request)
                resource = {"contentType": kind} | json.loads(metadata)
                return self._finish_upload(bucket, query, resource, data)
            case "resumable":
                resource = {"contentType": request.headers.get("X-Upload-Content-Type", "application/octet-stream")}
                resource |= json.loads(request.body or b"{}")
                number = uuid.uuid4().hex
                self._uploads[number] = _Upload(bucket, query, resource)
                location = f"{self.url}/upload/storage/v1/b/{quote(bucket)}/o?uploadType=resumable&upload_id={number}"
                return Response(200, headers={"Location": location})
        raise _Refused(400, f"uploadType {query.get('uploadType')!r} is not known")

    def _receive_chunk(self, request: Request, number: str) -> Response:
        upload = self._uploads.get(number)
        if upload is None:
            raise _Refused(404, "no such upload")
        if request.method == "DELETE":
            del self._uploads[number]
            return Response(499)
        if upload.answer is not None:
            return upload.answer
        asked = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", request.headers.get("Content-Range", "bytes */*"))
        if asked is None:
            raise _Refused(400, f"Content-Range {request.headers['Content-Range']!r} cannot be understood")
        first, _, total = asked.groups()
        if "Content-Range" not in request.headers:
            first, total = "0", str(len(request.body))
        if first is not None:
            if int(first) > len(upload.data):
                raise _Refused(400, f"byte {first} follows byte {len(upload.data)}")
            # What was received before and comes again, because its answer was lost, is left as it is.
            upload.data += request.body[len(upload.data) - int(first) :]
        if total != "*" and len(upload.data) == int(total):
            upload.resource |= _hashes_in(request.headers)
            upload.answer = self._finish_upload(upload.bucket, upload.query, upload.resource, bytes(upload.data))
            upload.data.clear()
            return upload.answer
        held = {"Range": f"bytes=0-{len(upload.data) - 1}"} if upload.data else {}
        return Response(308, headers=held)

    def _finish_upload(self, bucket: str, query: dict[str, str], resource: dict[str, Any], data: bytes) -> Response:
        name = resource.get("name") or query.get("name")
        if not name:
            raise _Refused(400, "an object needs a name")
        for key, found in (("crc32c", _crc32c(data)), ("md5Hash", _md5(data))):
            if resource.get(key, found) != found:
                raise _Refused(400, f"{key} is {found}, {resource[key]} was announced")
        kind, metadata = resource.get("contentType"), resource.get("metadata") or {}
        stored = self._store(bucket, name, data, query, content_type=kind, metadata=metadata)
        return _json_response(_resource(bucket, name, stored))

    def _batch(self, request: Request) -> Response:
        """Requests in one body, each answered by itself."""
        answers = []
        for part in _split_multipart(request):
            head, _, inner = part.replace(b"\r\n", b"\n").partition(b"\n\n")
            line, _, body = inner.partition(b"\n")
            method, path, _ = line.decode().split(" ", 2)
            path = re.sub(r"^https?://[^/]+", "", path)
            response = self.answer(Request(method, path, {}, body.partition(b"\n\n")[2]))
            self.log.append(Logged(method, path, response.status))
            number = re.search(rb"(?im)^content-id:\s*<?([^>\n]*)>?", head)
            answers.append(
                b"--batch\r\nContent-Type: application/http\r\n"
                + (b"Content-ID: <response-" + number[1] + b">\r\n" if number else b"")
                + f"\r\nHTTP/1.1 {response.status} -\r\nContent-Type: application/json\r\n".encode()
                + f"Content-Length: {len(response.body)}\r\n\r\n".encode()
                + response.body
                + b"\r\n"
            )
        body = b"".join(answers) + b"--batch--\r\n"
        return Response(200, body, {"Content-Type": "multipart/mixed; boundary=batch"})


# --- the parts of an answer ------------------------------------------------------------------------------------------


def _check_preconditions(stored: Stored | None, query: dict[str, str], *, source=False, reading=False) -> None:
    """Generation 0 stands for an object that is not there."""
    prefix = "ifSource" if source else "if"
    found = {
        f"{prefix}Generation": stored.generation if stored else 0,
        f"{prefix}Metageneration": stored.metageneration if stored else 0,
    }
    known = {f"{name}{end}" for name in found for end in ("Match", "NotMatch")}
    others = r"if(?!Source)" if source else r"ifSource"
    for key, value in query.items():
        if not key.startswith("if") or re.match(others, key):
            continue
        if key not in known:
            raise _Refused(400, f"precondition {key} is not known")
        negated = key.endswith("NotMatch")
        name = key.removesuffix("Match").removesuffix("Not")
        if (found[name] == int(value)) == negated:
            raise _Refused(304 if negated and reading else 412, f"{key}={value}, it is {found[name]}")


def _media(stored: Stored, asked: str | None) -> Response:
    size = len(stored.data)
    digests = {"crc32c": "crc32c", "md5Hash": "md5"}
    headers = {
        "Content-Type": stored.content_type,
        "ETag": f'"{stored.generation}"',
        "X-Goog-Generation": str(stored.generation),
        "X-Goog-Metageneration": str(stored.metageneration),
        "X-Goog-Hash": ",".join(f"{digests[name]}={value}" for name, value in stored.hashes().items()),
        "X-Goog-Stored-Content-Length": str(size),
        "X-Goog-Stored-Content-Encoding": "identity",
    }
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", asked or "")
    if match is None or match[0] == "bytes=-":
        return Response(200, stored.data, headers)
    if match[1]:
        first, last = int(match[1]), min(int(match[2] or size - 1), size - 1)
    else:
        first, last = max(0, size - int(match[2])), size - 1
    if first >= size or last < first:
        return Response(416, b"not satisfiable", {"Content-Range": f"bytes */{size}"})
    headers["Content-Range"] = f"bytes {first}-{last}/{size}"
    return Response(206, stored.data[first : last + 1], headers)


def _resource(bucket: str, name: str, stored: Stored) -> dict[str, Any]:
    components = {"componentCount": stored.components} if stored.components else {}
    return {
        "kind": "storage#object",
        "id": f"{bucket}/{name}/{stored.generation}",
        "bucket": bucket,
        "name": name,
        "size": str(len(stored.data)),
        "generation": str(stored.generation),
        "metageneration": str(stored.metageneration),
        "contentType": stored.content_type,
        "storageClass": "STANDARD",
        "etag": f"{stored.generation}/{stored.metageneration}",
        "timeCreated": stored.created,
        "updated": stored.created,
        "metadata": stored.metadata,
        **components,
        **({"contentEncoding": stored.content_encoding} if stored.content_encoding else {}),
        **stored.hashes(),
    }


def _bucket_resource(bucket: str) -> dict[str, Any]:
    return {"kind": "storage#bucket", "id": bucket, "name": bucket, "location": "US", "storageClass": "STANDARD"}


def _json_response(content: dict[str, Any], status: int = 200) -> Response:
    return Response(status, json.dumps(content).encode(), {"Content-Type": "application/json; charset=UTF-8"})


def _error(status: int, message: str) -> Response:
    error = {"code": status, "message": message, "errors": [{"message": message}]}
    return _json_response({"error": error}, status)


_UNAVAILABLE = _error(503, "try again later")


def _split(uri: str) -> tuple[str, str]:
    bucket, _, name = uri.removeprefix("gs://").partition("/")
    return bucket, name


def _crc32c(data: bytes) -> str:
    return base64.b64encode(google_crc32c.value(data).to_bytes(4, "big")).decode()


def _md5(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


def _hashes_in(headers: Any) -> dict[str, str]:
    """What the last request of an upload says of the whole: "crc32c=...,md5=..."."""
    pairs = (part.strip().partition("=")[::2] for part in headers.get("X-Goog-Hash", "").split(",") if part.strip())
    return {{"md5": "md5Hash"}.get(name, name): value for name, value in pairs}


def _split_multipart(request: Request) -> Iterator[bytes]:
    """The parts of a body. Its first line says what ends lines, since binary parts may end in either character."""
    boundary = b"--" + re.search(r'boundary="?([^";]+)"?', request.headers["Content-Type"])[1].encode()
    body = request.body.lstrip(b"\r\n")
    end = b"\r\n" if body.startswith(boundary + b"\r\n") else b"\n"
    for part in (end + body).split(end + boundary)[1:]:
        if part.startswith(b"--"):
            return
        yield part.removeprefix(end)


def _multipart(request: Request) -> Iterator[tuple[str, bytes]]:
    """Content type and content of each part."""
    for part in _split_multipart(request):
        head, content = re.split(rb"\r?\n\r?\n", part, maxsplit=1)
        yield re.search(r"(?i)content-type:\s*([^\r\n]*)", head.decode())[1], content


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    gcs: Gcs

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is no error of the server."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def _serve(self) -> None:
        gcs: Gcs = self.server.gcs
        request = Request(self.command, self.path, self.headers, self._body())
        fault, status = gcs.faults.of(next(gcs.numbers), request), None
        bucket = re.search(r"/b/([^/?]+)", request.path)
        match gcs.broken.get(bucket[1]) if bucket else None:
            case int() as status:
                pass
            case str() as fault:
                pass
        if fault == "slow":
            time.sleep(gcs.faults.delay_seconds)
        asked = fault not in ("unavailable", "reset") and status is None
        response = gcs.answer(request) if asked else _UNAVAILABLE
        if fault == "lost":
            response = _UNAVAILABLE
        elif status is not None:
            response = _error(status, f"status {status} is all that this bucket answers")
        gone = fault in ("reset", "cut")
        gcs.log.append(Logged(request.method, request.path, 0 if gone else response.status, fault))
        if gone:
            self._reset(response if fault == "cut" else None)
        else:
            self._send(response)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _serve  # noqa: N815

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = bytearray()
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return bytes(body)

    def _reset(self, response: Response | None) -> None:
        """Ends the connection with a reset, after half of an answer's body if there is an answer."""
        if response is not None:
            self._send(response, len(response.body) // 2)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def _send(self, response: Response, end: int | None = None) -> None:
        self.send_response(response.status)
        for name, value in response.headers.items():
            self.send_header(name, value)
        if response.status not in (204, 304):
            self.send_header("Content-Length", str(len(response.body)))
        self.end_headers()
        if response.status not in (204, 304):
            self.wfile.write(response.body[:end])

    def log_message(self, *_: Any) -> None:
        """Nothing on the terminal: there is the log."""
