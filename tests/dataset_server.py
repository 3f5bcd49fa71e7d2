"""A server that speaks as much of the hub's protocol as reading a dataset takes: one repository, with commits."""

import hashlib
import json
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self
from urllib.parse import unquote


class DatasetServer:
    """Serves a dataset: ``commits`` maps revisions to the files of each, name -> content; log: the requests."""

    def __init__(self, name: str, commits: Mapping[str, Mapping[str, bytes]]):
        self.name, self.commits = name, commits
        self.log: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer._answer(self)

            do_HEAD = do_POST = do_GET  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def commit(self, revision: str) -> str:
        """The 40 digits of a revision's commit."""
        return hashlib.sha1(repr(sorted(self.commits[revision].items())).encode()).hexdigest()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(request.path.partition("?")[0])
        self.log.append(f"{request.command} {path}")
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        api, files = f"/api/datasets/{self.name}", f"/datasets/{self.name}/resolve/"
        rest = path.removeprefix(api).strip("/").split("/")
        if not path.startswith((api, files)):
            return _send(request, 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        revision = path.removeprefix(files).split("/")[0] if path.startswith(files) else (rest[1:2] or ["main"])[0]
        found = next((r for r in self.commits if revision in (r, self.commit(r))), None)
        if found is None:
            return _send(request, 404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        content, commit = self.commits[found], self.commit(found)
        if path.startswith(files):
            name = path.removeprefix(files).partition("/")[2]
            if name not in content:
                return _send(request, 404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
            return _send(request, 200, content[name], {"X-Repo-Commit": commit, "ETag": f'"{_oid(content[name])}"'})
        if rest[0] == "tree":
            listed = _listed(content, "/".join(rest[2:]), recursive="recursive=true" in request.path.lower())
            return _send(request, 200 if listed else 404, listed, {} if listed else {"X-Error-Code": "EntryNotFound"})
        if rest[0] == "paths-info":
            asked = json.loads(body)["paths"] if body.startswith(b"{") else []
            return _send(request, 200, [_entry(name, content[name]) for name in asked if name in content])
        siblings = [{"rfilename": name} for name in content]
        info = {"id": self.name, "sha": commit, "private": False, "gated": False, "disabled": False, "tags": []}
        return _send(request, 200, info | {"siblings": siblings, "downloads": 0, "likes": 0})


def _listed(content: Mapping[str, bytes], folder: str, *, recursive: bool) -> list[dict[str, object]]:
    """What a folder of a repository holds, folders among it."""
    start = f"{folder}/" if folder else ""
    files = [name for name in content if name.startswith(start)]
    folders = {name[: place + 1] for name in files for place, c in enumerate(name) if c == "/" and place >= len(start)}
    entries = [_entry(name, content[name]) for name in files]
    entries += [
        {"type": "directory", "path": name.strip("/"), "size": 0, "oid": _oid(name.encode())} for name in folders
    ]
    return [entry for entry in entries if recursive or "/" not in str(entry["path"]).removeprefix(start)]


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _entry(name: str, content: bytes) -> dict[str, object]:
    return {"type": "file", "path": name, "size": len(content), "oid": _oid(content)}


def _send(request: BaseHTTPRequestHandler, status: int, body: object, headers: Mapping[str, str] = {}) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request.send_response(status)
    for name, value in {"Content-Length": str(len(data)), **headers}.items():
        request.send_header(name, value)
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(data)
