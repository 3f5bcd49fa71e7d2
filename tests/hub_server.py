"""A server on this machine that speaks as much of the Hugging Face hub's protocol as downloads and uploads need."""

import base64
import contextlib
import dataclasses
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "T" * 34


@dataclasses.dataclass
class Repository:
    """files: name -> content, on branch main. gated: its files are shown to nobody. private: to who has the token."""

    files: dict[str, bytes]
    gated: bool = False
    private: bool = False

    @property
    def sha(self) -> str:
        return hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()


class Hub:
    """Repositories by name, and what was asked: (method, path) of each request."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str]] = []
        self.cut_after: int | None = None  # bytes of a file after which the connection is closed
        self.failing: int | None = None  # the status that everything is answered with
        self.refuses_commits = False
        self.makes_public = False  # whatever it is asked for
        self.url = ""

    def add(self, name: str, folder: Path, **more) -> Repository:
        files = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
        self.repositories[name] = Repository(files, **more)
        return self.repositories[name]

    def downloads(self) -> list[str]:
        """Names of the files that were sent, sorted."""
        return sorted(
            path.rpartition("/")[2] for method, path in self.requests if method == "GET" and "/resolve/" in path
        )


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append((self.command, path))
        if self.hub.failing:
            return self._send(self.hub.failing, {"error": "later"})
        match path.strip("/").split("/"):
            case ["api", "validate-yaml"]:
                return self._send(200, {"errors": [], "warnings": []})
            case ["api", "whoami-v2"]:
                known = self._authorised()
                return self._send(200, {"name": "someone"}) if known else self._refuse(401, "", "Invalid credentials")
            case ["api", "repos", "create"]:
                return self._create(json.loads(body))
            case ["api", "models", owner, name, *rest]:
                return self._of_api(f"{owner}/{name}", rest, body)
            case [owner, name, "resolve", revision, *file]:
                return self._file(f"{owner}/{name}", revision, "/".join(file))
        return self._refuse(404, "", "no such path")

    def _authorised(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repository(self, name: str, revision: str | None) -> Repository | None:
        """None where the answer was that there is none."""
        found = self.hub.repositories.get(name)
        if found is None or (found.private and not self._authorised()):
            return self._refuse(404 if self._authorised() else 401, "RepoNotFound", "Repository not found")
        if revision not in (None, "main", found.sha):
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found

    def _of_api(self, name: str, rest: list[str], body: bytes) -> None:
        match rest:
            case []:
                asked, revision = "info", None
            case ["revision" | "tree" | "preupload" | "commit" as asked, revision, *_]:
                pass
            case _:
                return self._refuse(404, "", "no such path")
        found = self._repository(name, revision)
        if found is None:
            return None
        if asked == "tree":
            listed = [
                {"type": "file", "path": n, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for n, data in found.files.items()
            ]
            return self._send(200, listed)
        if asked == "preupload":
            files = json.loads(body)["files"]
            modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
            return self._send(200, {"files": modes})
        if asked == "commit":
            return self._commit(name, found, body)
        siblings = [{"rfilename": n, "size": len(data), "blobId": "0"} for n, data in found.files.items()]
        content = {"id": name, "sha": found.sha, "private": found.private, "siblings": siblings}
        return self._send(200, content | {"gated": "manual" if found.gated else False})

    def _create(self, asked: dict) -> None:
        name = f"{asked.get('organization') or 'someone'}/{asked['name']}"
        if not self._authorised():
            return self._refuse(401, "", "Invalid credentials")
        if name in self.hub.repositories:
            return self._send(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
        is_private = not self.hub.makes_public and (asked.get("private") or asked.get("visibility") == "private")
        self.hub.repositories[name] = Repository({".gitattributes": b""}, private=is_private)
        return self._send(200, {"url": f"{self.hub.url}/{name}", "name": name})

    def _commit(self, name: str, found: Repository, body: bytes) -> None:
        if self.hub.refuses_commits or not self._authorised():
            return self._refuse(403, "", "Forbidden")
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                found.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            elif entry["key"] == "deletedFile":
                found.files.pop(entry["value"]["path"])
        done = {"success": True, "commitOid": found.sha, "commitUrl": f"{self.hub.url}/{name}/commit/{found.sha}"}
        return self._send(200, done)

    def _file(self, name: str, revision: str, file: str) -> None:
        found = self._repository(name, revision)
        if found is None:
            return None
        if found.gated:
            return self._refuse(403, "GatedRepo", "Access to this model is restricted")
        if file not in found.files:
            return self._refuse(404, "EntryNotFound", "Entry not found")
        data = found.files[file]
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": found.sha, "Accept-Ranges": "bytes"}
        first = self.headers.get("Range", "").removeprefix("bytes=").partition("-")[0]
        if first:
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        return self._send(206 if first else 200, data[int(first or 0) :], headers)

    def _refuse(self, status: int, code: str, message: str) -> None:
        self._send(status, {"error": message}, {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}))

    def _send(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self.hub.cut_after if isinstance(content, bytes) else None
        if cut is not None and len(data) > cut:
            data, self.close_connection = data[:cut], True
        self.wfile.write(data)


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    """A hub at its `url`, without repositories."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def hub_of_its_own(folder: Path, monkeypatch) -> Iterator[Hub]:
    """A hub that this process knows as the only one, without a token and with a cache in the folder, its home."""
    import huggingface_hub.constants as settings

    monkeypatch.chdir(folder)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with serving() as hub:
        monkeypatch.setattr(settings, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            settings, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(settings, "HF_HUB_CACHE", str(folder / "cache"))
        monkeypatch.setattr(settings, "HF_TOKEN_PATH", str(folder / "no token"))
        monkeypatch.setattr(settings, "HF_HUB_OFFLINE", False)
        yield hub
