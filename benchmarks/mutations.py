"""Files changed at random, by what they are: values of JSON and YAML, lines, headers, answers of a server, bytes.

Each change is of one of three kinds: it makes other content, it corrupts, or it is one that must be refused.
"""

import collections
import copy
import functools
import gzip
import itertools
import json
import random
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from benchmarks.inputs import http_answer, kind_of

CONTENT, CORRUPTING, REFUSED = "content", "corrupting", "refused"


class Change(NamedTuple):
    """A changed file: what was done, which of the three kinds that is, and the bytes."""

    name: str
    kind: str
    content: bytes


# --- JSON and YAML --------------------------------------------------------------------------------------------------

# Texts that are put where a value was and that `json.dumps` does not write.
RAW = (
    ("deep", lambda: "[" * 100_000 + "]" * 100_000),
    ("deep mapping", lambda: '{"a":' * 3000 + "1" + "}" * 3000),
    ("5,000 digits", lambda: "9" * 5000),
    ("-5,000 digits", lambda: "-" + "9" * 5000),
    ("not a number", lambda: "NaN"),
    ("infinite", lambda: "Infinity"),
    ("too large", lambda: "1e999"),
    ("nothing", lambda: ""),
    ("lone surrogate", lambda: '"\\ud800"'),
)
VALUES: tuple[Any, ...] = (
    *(None, True, False, "", "x", "a\x00b\x1b[31m\n\rc", "￾‮", "../../x", "gs://", "/dev/null", "1", "NaN"),
    *([], {}, [[]], [None], {"": 1}, {"a": {"b": 1}}, ["x"] * 50),
    *(0, 1, -1, 2, 1.5, 1e-300, 1e308, -1e308, 2**31, 2**63, 2**64, -(2**63), 10**30, 20_000_000),
)
_MARK = "raw@raw"


def _type(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(type(value))
    return "number" if isinstance(value, int | float) else str(type(value))


def _places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Paths of all values in a value, itself first."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield from _places(part, (*path, key))


def _chosen(value: Any, rng: random.Random) -> tuple:
    """A place in a value: at each level as likely as at another, since there are many leaves."""
    by_depth = collections.defaultdict(list)
    for path in _places(value):
        by_depth[len(path)].append(path)
    return rng.choice(by_depth[rng.choice(sorted(by_depth))])


def changed_value(value: Any, rng: random.Random, *, strict: bool) -> tuple[str, str, Any, str | None]:
    """What was done, its kind, the changed value, and a text to put in the place of `_MARK` in what is written of it.

    strict: whether keys that are not known must be refused.
    """
    value = copy.deepcopy(value)
    path = _chosen(value, rng)
    holder: Any = functools.reduce(lambda part, key: part[key], path[:-1], value) if path else None
    old = holder[path[-1]] if path else value
    where = ".".join(map(str, path))[:60] or "all"
    action = rng.choice(("value", "value", "value", "raw", "raw", "drop", "rename", "unknown", "near"))
    if action == "unknown":
        mappings = [at for at in _places(value) if isinstance(functools.reduce(lambda v, k: v[k], at, value), dict)]
        if mappings:
            at = mappings[0] if strict else rng.choice(mappings)
            functools.reduce(lambda part, key: part[key], at, value)["no_such_key"] = rng.choice((1, "x", [1], True))
            return f"unknown key in {'.'.join(map(str, at)) or 'all'}", REFUSED if strict else CONTENT, value, None
        action = "value"
    if action in ("drop", "rename") and path:
        if action == "drop":
            del holder[path[-1]]
            return f"{where} dropped", CONTENT, value, None
        if isinstance(holder, dict):
            holder[f"{path[-1]}_"] = holder.pop(path[-1])
            return f"{where} renamed", REFUSED if strict and len(path) == 1 else CONTENT, value, None
    if action == "near" and isinstance(old, int | float) and not isinstance(old, bool):
        new: Any = rng.choice((old + 1, old - 1, -old, old * 1000, old / 3, float(old), str(old)))
    elif action == "near" and isinstance(old, str) and old:
        new = rng.choice((old[: len(old) // 2], old * 3, old.upper(), f" {old} ", f"{old}\n", list(old), old * 40_000))
    elif action == "raw":
        name, make = rng.choice(RAW)
        value = _with(value, path, _MARK)
        return f"{where} = {name}", CORRUPTING, value, make()
    else:
        new = rng.choice(VALUES)
    return f"{where} = {str(new)[:30]!r}", _kind(path, old, new), _with(value, path, new), None


def _kind(path: tuple, old: Any, new: Any) -> str:
    """Which kind of change a new value makes where another was."""
    # Of some things there may be one or several.
    one = isinstance(new, int | float) or (isinstance(new, str | list) and len(new) > 0)
    several = bool(path) and path[-1] in ("eos_token_id", "store", "temperature") and one
    # transformers takes a list of special tokens, or a mapping of names to them.
    several |= bool(path) and path[-1] == "extra_special_tokens" and isinstance(new, list | dict)
    other = _type(new) != _type(old) and new is not None and old is not None and not several
    return CORRUPTING if other else CONTENT


def _with(value: Any, path: tuple, new: Any) -> Any:
    if not path:
        return new
    functools.reduce(lambda part, key: part[key], path[:-1], value)[path[-1]] = new
    return value


def _dumped(value: Any, raw: str | None) -> bytes:
    text = json.dumps(value, ensure_ascii=False)
    if raw is not None:
        text = text.replace(f'"{_MARK}"', raw)
    return text.encode("utf-8", "backslashreplace")


def changed_json(content: bytes, rng: random.Random, *, strict: bool = False) -> Change:
    if rng.random() < 0.25:
        return changed_text(content, rng)
    value = json.loads(content)
    if rng.random() < 0.05 and isinstance(value, dict) and value:
        key = rng.choice(sorted(value))
        text = json.dumps(value)
        return Change(f"{key} twice", CONTENT, f"{text[:-1]}, {json.dumps(key)}: null}}".encode())
    name, kind, value, raw = changed_value(value, rng, strict=strict)
    return Change(name, kind, _dumped(value, raw))


SWEPT: tuple[Any, ...] = (None, True, "x", "", -1, 1.5, 2**64, [], ["x"], {}, {"a": 1})  # of each type and shape
_MANY = 40  # entries, of which those that follow are like the first


def _first_places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Paths of the values in a value, itself first; of what is alike, the first alone.

    Alike are the parts of a list, of a mapping with many entries, and mappings with the same keys.
    """
    yield path
    items = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    seen = set()
    for key, part in items[:1] if isinstance(value, list) or len(items) > _MANY else items:
        alike = frozenset(part) if isinstance(part, dict) else key
        if alike not in seen:
            yield from _first_places(part, (*path, key))
        seen.add(alike)


def swept_value(value: Any) -> Iterator[tuple[str, str, Any, str | None]]:
    """What `changed_value` makes, for each value in turn: one of each type and shape, and one that nests too deep."""
    for path in _first_places(value):
        old = functools.reduce(lambda part, key: part[key], path, value)
        where = ".".join(map(str, path))[:60] or "all"
        for new in SWEPT:
            if type(new) is not type(old) or new != old:
                changed = _with(copy.deepcopy(value), path, new)
                yield f"{where} = {str(new)[:30]!r}", _kind(path, old, new), changed, None
        name, make = RAW[0]
        yield f"{where} = {name}", CORRUPTING, _with(copy.deepcopy(value), path, _MARK), make()


# Values that YAML reads in its own way.
YAML_VALUES = (
    *("2026-13-45", "2026-02-30 25:61:61", '!!int "abc"', '!!float "abc"', "!!python/object:os.system x", "!!binary x"),
    *("? [a]", "*nowhere", "&a [*a]", "0o17", "1e3", "1_000", "12:30:45", ".nan", ".inf", "-.inf", "~", "y", "<<: 1"),
    *('"\\ud800"', '"\\x00"', "|\n   x", "[" * 3000, "{a: " * 200, "9" * 5000, "- - - 1", "@x", "`x", "%x", "\t1"),
    *(
        "'",
        '"',
        "]",
        "}",
        ": :",
        "!!set {a}",
        "!!timestamp 2020",
        "!<tag:yaml.org,2002:int> 0x",
        "0x",
        "0b2",
        "=",
        "!!null x",
    ),
)
_RAW_IN_YAML = {"NaN": ".nan", "Infinity": ".inf", "1e999": "1.0e+999"}  # which else are texts there
_ALIASES = "".join(f"b{n}: &b{n} [{', '.join([f'*b{n - 1}'] * 9) if n else 'x'}]\n" for n in range(9))


def changed_yaml(content: bytes, rng: random.Random) -> Change:
    text, way = content.decode(), rng.random()
    if way < 0.25:
        return changed_text(content, rng)
    if way < 0.55:
        found = list(re.finditer(r"(?<=: )[^\s,{}\[\]]+", text))
        if found:
            old, new = rng.choice(found), rng.choice(YAML_VALUES)
            return Change(f"{old[0]} = {new[:30]}", CONTENT, f"{text[: old.start()]}{new}{text[old.end() :]}".encode())
    if way < 0.6:
        keys = re.findall(r"^(\w+):", text, re.MULTILINE)
        key = rng.choice(keys) if keys else "a"
        nested, what = f"{key}: *b8\n", "aliases that grow"
        more = f"{_ALIASES}{nested}" if rng.random() < 0.7 else f"{key}: 1\n"
        return Change(what if "*" in more else f"{key} twice", CONTENT, f"{text}\n{more}".encode())
    return _in_yaml(*changed_value(yaml.safe_load(text), rng, strict=True))


def _in_yaml(name: str, kind: str, value: Any, raw: str | None) -> Change:
    kind = CONTENT if raw == "" else kind  # which is null
    raw = _RAW_IN_YAML.get(raw, raw)
    dumped = yaml.safe_dump(value, allow_unicode=False, width=10**9) if _is_plain(value) else json.dumps(value)
    if raw is not None:
        dumped = dumped.replace(f'"{_MARK}"', raw).replace(_MARK, raw)
    return Change(name, kind, dumped.encode("utf-8", "backslashreplace"))


def _is_plain(value: Any) -> bool:
    try:
        yaml.safe_dump(value)
    except (yaml.YAMLError, RecursionError):
        return False
    return True


# --- lines, texts and bytes -----------------------------------------------------------------------------------------


def changed_lines(content: bytes, rng: random.Random) -> Change:
    """JSON lines: one of them changed as JSON is, or their order and number."""
    lines = content.splitlines(keepends=True)
    way, at = rng.random(), rng.randrange(len(lines) or 1)
    if not lines or way < 0.1:
        return changed_text(content, rng)
    if way < 0.75:
        name, kind, change = changed_json(lines[at].strip() or b"{}", rng)
        lines[at] = change.replace(b"\n", b" ") + b"\n"
        kind = kind if change.strip() else CONTENT  # blank lines are allowed
        return Change(f"line: {name}", kind, b"".join(lines))
    new = {
        "a line of garbage": (CORRUPTING, b"garbage\n"),
        "a line of null": (CORRUPTING, b"null\n"),
        "a line of bytes": (CORRUPTING, b'{"text": "\xff\xfe\x80"}\n'),
        "a line of zeros": (CORRUPTING, b"\0" * 500 + b"\n"),
        "an empty line": (CONTENT, b"\n"),
        "a line twice": (CONTENT, lines[at]),
        "two on a line": (CORRUPTING, lines[at].strip() + lines[at].strip() + b"\n"),
        "a long line": (CONTENT, b'{"text": "' + b"a" * 1_000_000 + b'"}\n'),
        "an open line": (CORRUPTING, b'{"text": "a\n'),
        "an LFS pointer": (CORRUPTING, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n"),
    }
    name = rng.choice(sorted(new))
    kind, line = new[name]
    lines[at:at] = [line]
    return Change(name, kind, b"".join(lines))


def changed_text(content: bytes, rng: random.Random) -> Change:
    """Any text as bytes: what is no UTF-8 corrupts it."""
    at = rng.randrange(len(content) + 1)
    ways: dict[str, tuple[str, Callable[[], bytes]]] = {
        "bytes that are no UTF-8": (CORRUPTING, lambda: content[:at] + b"\xff\xfe\x80" + content[at:]),
        "UTF-16": (CORRUPTING, lambda: content.decode("utf-8", "replace").encode("utf-16")),
        "a byte order mark": (CONTENT, lambda: b"\xef\xbb\xbf" + content),
        "CRLF": (CONTENT, lambda: content.replace(b"\n", b"\r\n")),
        "CR": (CONTENT, lambda: content.replace(b"\n", b"\r")),
        "a zero": (CONTENT, lambda: content[:at] + b"\0" + content[at:]),
        "an escape": (CONTENT, lambda: content[:at] + b"\x1b[2J\xe2\x80\xa8\xc2\x85" + content[at:]),
        "compressed": (CORRUPTING, lambda: gzip.compress(content)),
    }
    if rng.random() < 0.4:
        return changed_bytes(content, rng)
    name = rng.choice(sorted(ways))
    kind, make = ways[name]
    return Change(name, kind, make())


def changed_bytes(content: bytes, rng: random.Random, *, container: bool = False) -> Change:
    """container: whether its format says how long it is, so that what is cut from it is missed."""
    size = len(content)
    start, length = rng.randrange(size + 1), rng.choice((1, 1, 4, 64, 1000))
    block = content[start : start + length]
    noise = rng.randbytes(length)
    flipped = bytearray(content or b"\0")
    flipped[min(start, len(flipped) - 1)] ^= 1 << rng.randrange(8)
    cut = CORRUPTING if container else CONTENT
    ways = {
        "a bit flipped": (CONTENT, bytes(flipped)),
        "cut short": (cut if start < size else CONTENT, content[:start]),
        "bytes cut out": (cut, content[:start] + content[start + length :]),
        "bytes put in": (cut, content[:start] + noise + content[start:]),
        "a block twice": (cut, content[:start] + block + content[start:]),
        "zeros": (CONTENT, content[:start] + bytes(len(block)) + content[start + length :]),
        "noise": (CONTENT, content[:start] + noise + content[start + length :]),
        "emptied": (CORRUPTING, b""),
        "doubled": (cut, content + content),
        "other file": (CORRUPTING, b"\x89PNG\r\n\x1a\n" + noise),
    }
    name = rng.choice(sorted(ways))
    kind, new = ways[name]
    return Change(name, CONTENT if new == content else kind, new)


# --- formats --------------------------------------------------------------------------------------------------------


def changed_safetensors(content: bytes, rng: random.Random) -> Change:
    way, size = rng.random(), int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + size], content[8 + size :]
    if way < 0.2:
        length = rng.choice((0, 1, size - 1, size + 1, 2**20, 2**31, 2**40, 2**63, 2**64 - 1, len(content)))
        return Change(f"header of {length} bytes", CORRUPTING, struct.pack("<Q", length) + content[8:])
    if way < 0.35:
        return changed_bytes(content, rng, container=True)
    if way < 0.5:
        at = rng.randrange(len(data))
        noise = rng.choice((b"\xff" * 4, b"\0\0\xc0\x7f", b"\x80"))
        return Change("bytes of weights", CONTENT, content[: 8 + size] + data[:at] + noise + data[at + len(noise) :])
    parsed = json.loads(header)
    if way < 0.8:
        name = rng.choice([name for name in parsed if name != "__metadata__"])
        first, last = parsed[name]["data_offsets"]
        shape = parsed[name]["shape"]
        key, new = rng.choice(
            (
                ("data_offsets", [last, first]),
                ("data_offsets", [first, last + 4]),
                ("data_offsets", [first, 2**62]),
                ("data_offsets", [-4, last]),
                ("data_offsets", [first + 1, last + 1]),
                ("data_offsets", [first]),
                ("data_offsets", [float(first), float(last)]),
                ("dtype", rng.choice(("F8_E4M3", "I64", "F64", "BOOL", "", "f32", "F32 ", None, 7))),
                ("shape", [*shape, 2]),
                ("shape", [-n for n in shape]),
                ("shape", [*shape, 0]),
                ("shape", []),
                ("shape", [2**40, 2**40]),
                ("shape", [float(n) for n in shape]),
                ("shape", "12"),
            )
        )
        if parsed[name][key] == new:
            return changed_bytes(content, rng, container=True)
        parsed[name][key] = new
        what, kind, header = f"{key} = {str(new)[:30]}", CORRUPTING, json.dumps(parsed).encode()
    else:
        what, kind, header = changed_json(header, rng)
    return Change(f"header: {what}", kind, struct.pack("<Q", len(header)) + header + data)


def changed_packed(content: bytes, rng: random.Random, suffix: str) -> Change:
    """Packed lines: changed inside, or as bytes."""
    if rng.random() < 0.5:
        return changed_bytes(content, rng, container=True)
    import pyarrow

    if suffix == ".gz":
        change = changed_lines(gzip.decompress(content), rng)
        return change._replace(content=gzip.compress(change.content, mtime=0))
    with pyarrow.input_stream(pyarrow.py_buffer(content), compression="zstd") as stream:
        change = changed_lines(stream.read(), rng)
    return change._replace(content=pyarrow.compress(change.content, "zstd", asbytes=True))


_STATUS = (
    "200 OK",
    "204 No Content",
    "301 Moved",
    "307 Redirect",
    "400 Bad",
    "401 No",
    "404 Not Found",
    "409 Conflict",
)
_STATUS += ("429 Slow down", "500 Error", "503 Busy", "524 Late", "529 Overloaded", "999 X", "000 X", "abc X", "")
_HEADERS = ("Retry-After: 99999999", "Retry-After: x", "Location: http://127.0.0.1:9/", "Content-Encoding: gzip")
_HEADERS += (
    "Transfer-Encoding: chunked",
    "Content-Length: 999999",
    "Content-Type: text/html; charset=\xff",
    "X" * 70_000,
)
_BODIES = (
    b"",
    b"<html>busy</html>",
    b"null",
    b"[]",
    b'{"error": {"message": "busy"}}',
    b'{"choices": []}',
    b'{"choices": [{}]}',
)
_BODIES += (
    b'{"choices": [{"index": 0, "message": {"role": "assistant", "content": [{"type": "text", "text": "b"}]}}]}',
)


def changed_answer(content: bytes, rng: random.Random) -> Change:
    """All of them content: what a server says may be anything, and is told from an answer by what it is."""
    _head, _, body = content.partition(b"\r\n\r\n")
    way = rng.random()
    if way < 0.6:
        name, _, body = changed_json(body, rng)
        return Change(f"body: {name}", CONTENT, http_answer(body))
    if way < 0.7:
        body = rng.choice(_BODIES)
        return Change(f"body = {body[:30]!r}", CONTENT, http_answer(body))
    if way < 0.9:
        status, header = rng.choice(_STATUS), rng.choice(_HEADERS)
        more = [header] if rng.random() < 0.6 else []
        answer = http_answer(rng.choice((body, *_BODIES)), status, more)
        return Change(f"status {status} {' '.join(more)[:30]}", CONTENT, answer)
    return changed_bytes(content, rng)


STRICT = ("run config .yaml", "rounds .yaml", "corpora .yaml", "prompt template", "PII patterns")
FOREIGN_SETTINGS = ("config.json", "adapter_config.json")  # keys that are not known may mean anything


def changed(path: str, content: bytes, rng: random.Random) -> Change:
    """A file of the inputs with one change; in a sealed one, every change corrupts."""
    name, suffix = Path(path).name, Path(path).suffix
    kind, sealed = kind_of(path)
    if suffix == ".safetensors":
        change = changed_safetensors(content, rng)
    elif suffix in (".gz", ".zst"):
        return changed_packed(content, rng, suffix)
    elif suffix == ".http":
        return changed_answer(content, rng)
    elif suffix == ".jsonl":
        change = changed_lines(content, rng)
        # A loss that was no number is, in files of earlier versions, written as such.
        if name == "metrics.jsonl" and change.name.endswith(("= not a number", "= infinite", "= too large")):
            change = change._replace(kind=CONTENT)
    elif suffix == ".yaml":
        change = changed_yaml(content, rng)
        if kind not in STRICT and change.kind == REFUSED:
            change = change._replace(kind=CONTENT)
    elif suffix in (".txt", ".jinja", ".md") or name in ("NOTICE", "SHA256SUMS"):
        change = changed_text(content, rng)
    elif content[:1] == b"{" and _is_json(content):
        change = changed_json(content, rng, strict=name in FOREIGN_SETTINGS)
    else:
        container = suffix in (".parquet", ".npy", ".model") or sealed
        change = changed_bytes(content, rng, container=container)
    if sealed and change.content != content and change.kind == CONTENT:
        return change._replace(kind=CORRUPTING)
    return change


def swept(path: str, content: bytes) -> Iterator[Change]:
    """A file with one change after the other: all that `swept_value` makes of its JSON, lines, YAML, header or body.

    Of lines the first and the last are changed. Of other files, none.
    """
    sealed = kind_of(path)[1]
    for change in _swept(Path(path), content):
        yield change._replace(kind=CORRUPTING) if sealed and change.kind == CONTENT else change


def _swept(path: Path, content: bytes) -> Iterator[Change]:
    if path.suffix == ".safetensors":
        size = 8 + int.from_bytes(content[:8], "little")
        for name, kind, *value in swept_value(json.loads(content[8:size])):
            header = _dumped(*value)
            yield Change(f"header: {name}", kind, struct.pack("<Q", len(header)) + header + content[size:])
    elif path.suffix == ".http":
        for name, _, *value in swept_value(json.loads(content.partition(b"\r\n\r\n")[2])):
            yield Change(f"body: {name}", CONTENT, http_answer(_dumped(*value)))
    elif path.suffix == ".jsonl":
        lines = content.splitlines(keepends=True)
        for at in sorted({0, len(lines) - 1}) if lines else ():
            for name, kind, *value in swept_value(json.loads(lines[at])):
                changed = [*lines[:at], _dumped(*value) + b"\n", *lines[at + 1 :]]
                yield Change(f"line {at + 1}: {name}", kind, b"".join(changed))
    elif path.suffix == ".yaml":
        yield from itertools.starmap(_in_yaml, swept_value(yaml.safe_load(content)))
    elif content[:1] == b"{" and _is_json(content):
        for name, kind, *value in swept_value(json.loads(content)):
            yield Change(name, kind, _dumped(*value))


def _is_json(content: bytes) -> bool:
    try:
        json.loads(content)
    except (ValueError, RecursionError):
        return False
    return True
