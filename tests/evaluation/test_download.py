"""Fetching an exam: what arrives is what was promised, or nothing; faults pass; what is there stays."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from medllm_jax.cli import main
from medllm_jax.errors import RunError, UserError
from medllm_jax.evaluation import download
from medllm_jax.evaluation.download import fetch, igakuqa_files

CONTENT = {f"data/2018/112-{section}.jsonl": f"section {section}\n".encode() * 50 for section in "ABC"}
FILES = {path: hashlib.sha256(content).hexdigest() for path, content in CONTENT.items()}


class Host(ThreadingHTTPServer):
    """Serves CONTENT under /commit/; `faults` are answered first, a status each."""

    daemon_threads = True

    def __init__(self, content=CONTENT, faults=()):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.content, self.faults, self.asked = content, list(faults), []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/commit"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        data = self.server.content.get(self.path.removeprefix("/commit/"))
        status = self.server.faults.pop() if self.server.faults else 404 if data is None else 200
        self.send_response(status)
        self.send_header("Content-Length", str(len(data or b"")))
        self.end_headers()
        self.wfile.write(data or b"")

    def log_message(self, *_):
        pass


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(download, "_BACKOFF", 0.001)


def held(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_what_is_fetched_is_what_was_promised(tmp_path):
    seen = []
    with Host(faults=[503, 500, 429]) as host:
        assert fetch(FILES, host.url + "/", tmp_path, "from there\n", progress=seen.append) == (3, 0)
        assert held(tmp_path) == CONTENT | {"ATTRIBUTION.md": b"from there\n"}
        assert seen == [0, 1, 2, 3] and len(host.asked) == 6
        (tmp_path / "data/2018/112-B.jsonl").unlink()
        assert fetch(FILES, host.url, tmp_path, "from there\n") == (1, 2)
        assert len(host.asked) == 7


def test_other_content_is_not_written(tmp_path):
    flipped = dict(CONTENT)
    flipped["data/2018/112-B.jsonl"] = b"S" + flipped["data/2018/112-B.jsonl"][1:]
    with Host(flipped) as host, pytest.raises(UserError, match=r"112-B.jsonl: its content is not that of the pinned"):
        fetch(FILES, host.url, tmp_path, "")
    assert held(tmp_path).items() <= CONTENT.items() and "data/2018/112-B.jsonl" not in held(tmp_path)


def test_what_is_there_with_another_content_stays(tmp_path):
    file = tmp_path / "data/2018/112-A.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    with Host() as host:
        with pytest.raises(UserError, match=r"112-A.jsonl is there with another content"):
            fetch(FILES, host.url, tmp_path, "")
        assert file.read_text() == "mine" and host.asked == []
        assert fetch(FILES, host.url, tmp_path, "", overwrite=True) == (3, 0)
    assert held(tmp_path).items() >= CONTENT.items()


def test_what_cannot_be_fetched_is_named(tmp_path):
    with Host({}) as host, pytest.raises(UserError, match=r"/commit/data/2018/112-.\.jsonl: status 404"):
        fetch(FILES, host.url, tmp_path, "")
    with pytest.raises(RunError, match="no answer"):
        fetch(FILES, host.url, tmp_path, "")  # it is closed now
    with pytest.raises(UserError, match="must be a URL"):
        fetch(FILES, "ftp://host", tmp_path, "")


def test_the_table_of_checksums_names_the_whole_exam():
    files = igakuqa_files()
    assert len(files) == 5 * 6 * 2 and all(path.startswith("data/20") for path in files)
    assert len(igakuqa_files(baselines=True)) == len(files) + 5 * 6 * 5
    assert {path.split("/")[1] for path in igakuqa_files([2019, 2022])} == {"2019", "2022"}
    assert all(len(digest) == 64 for digest in files.values())
    with pytest.raises(UserError, match="no IgakuQA of 2017; there are 2018 to 2022"):
        igakuqa_files([2017])


def test_the_real_files_have_these_checksums(igakuqa):
    for path, digest in igakuqa_files([2018, 2019, 2020], baselines=True).items():
        assert hashlib.sha256((igakuqa / path).read_bytes()).hexdigest() == digest, path


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(download, "igakuqa_files", lambda years, baselines: FILES)
    with Host() as host:
        assert main(["data", "exam", "igakuqa", "--output", str(tmp_path), "--source", host.url]) == 0
    assert "3 files fetched, 0 were there" in capsys.readouterr().out
    assert "Kasai" in (tmp_path / "ATTRIBUTION.md").read_text() and held(tmp_path).items() >= CONTENT.items()
