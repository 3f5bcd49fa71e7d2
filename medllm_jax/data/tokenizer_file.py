"""tokenizer.json as the library `tokenizers` reads it, where that is what the file says.

Where a part of the file is not what its `type` says, the library takes it for something else that has the same fields,
and where merges do not fit the prefix of pieces within words, it ends the process.
"""

import json
from pathlib import Path
from typing import Any

from medllm_jax.errors import UserError, quoted
from medllm_jax.storage.json_files import parse_json

# What maps text to tokens and back, beside the model. Each part has a type, and may hold a list of such parts.
_PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")


def read_tokenizer_file(file: Path) -> Any:
    """The ``tokenizers.Tokenizer`` of a tokenizer.json; UserError where it does something else than the file says.

    Whatever the library raises passes.
    """
    import tokenizers

    content = parse_json(file.read_bytes(), file.name)
    _check_merges(content.get("model"), file.name)
    read = tokenizers.Tokenizer.from_file(str(file))
    for name in _PARTS:
        part = getattr(read, name)
        _check_types(
            content.get(name), None if part is None else json.loads(part.__getstate__()), f"{file.name}: {name}"
        )
    model = content.get("model")
    kind = model.get("type", type(read.model).__name__) if isinstance(model, dict) else None
    if kind != type(read.model).__name__:
        raise UserError(
            f"{file.name}: the type of model is {quoted(kind)}, and it is read as {type(read.model).__name__}"
        )
    return read


def _check_types(stated: Any, read: Any, where: str) -> None:
    """UserError where a part, or one in it, is read as another type than it states; very old files state none."""
    if isinstance(stated, dict) and isinstance(read, dict):
        if stated.get("type", read.get("type")) != read.get("type"):
            raise UserError(f"{where} is of type {quoted(stated['type'])}, and would be read as {quoted(read['type'])}")
        for key in stated.keys() & read.keys():
            _check_types(stated[key], read[key], f"{where}.{key}")
    elif isinstance(stated, list) and isinstance(read, list) and len(stated) == len(read):
        for place, (one, other) in enumerate(zip(stated, read, strict=True)):
            _check_types(one, other, f"{where}.{place}")
    elif isinstance(stated, list | dict):
        raise UserError(f"{where} is {quoted(stated)}, and would be read as {quoted(read)}")


def _check_merges(model: Any, where: str) -> None:
    """UserError where a piece within a word, the second of a merge, lacks the prefix that is cut off from it."""
    prefix = model.get("continuing_subword_prefix") if isinstance(model, dict) else None
    if not prefix or not isinstance(prefix, str) or not isinstance(model.get("merges"), list):
        return  # what is of another type the library refuses
    for merge in model["merges"]:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if isinstance(pair, list) and len(pair) == 2 and not str(pair[1]).startswith(prefix):
            raise UserError(
                f"{where}: continuing_subword_prefix is {quoted(prefix)}, and the merge {quoted(pair)} has a second "
                "part that does not begin with it"
            )
