"""An export, uploaded to the Hugging Face hub as a model repository.

What can be known before is asked before the export is made, which takes hours for a large model: whether there is a
token, and whether the repository may be written.
"""

import logging
import shlex
from typing import Any

from medllm_jax.errors import RunError, UserError, quoted
from medllm_jax.storage.hub import is_name, words_of
from medllm_jax.storage.remote import is_remote

_log = logging.getLogger(__name__)

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_PUBLIC = "--push {}: that repository is public: give --public too, or choose another name"
_NOT_OURS = (".gitattributes", "README.md")  # that a repository has which was made by hand


def check_push(name: str, folder: str, *, public: bool, overwrite: bool) -> None:
    """UserError where an export in a folder could not be pushed to the hub under a name."""
    if not is_name(name):
        raise UserError(f"--push {quoted(name, str)}: a name on the hub, OWNER/NAME, is expected")
    if is_remote(folder):
        raise UserError(f"--push uploads a local folder, and {folder} is in a bucket: export to a local folder")
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError

    if not get_token():
        raise UserError(f"--push {name}: no token is there: set HF_TOKEN to one that may write, or run `hf auth login`")
    api = HfApi()
    try:
        api.whoami()
        info = api.model_info(name)
    except RepositoryNotFoundError:
        return
    except OfflineModeIsEnabled as error:
        raise UserError(f"--push {name}: HF_HUB_OFFLINE is set: unset it") from error
    except Exception as error:  # of many types
        raise _refused(error, f"--push {name}") from error
    names = {sibling.rfilename for sibling in info.siblings or ()}
    if names - set(_NOT_OURS) and not overwrite:
        raise UserError(
            f"--push {name}: that repository holds files already: choose another name, or give --overwrite, which "
            "adds a commit to it"
        )
    if not info.private and not public:
        raise UserError(_PUBLIC.format(name))


def push(folder: str, name: str, *, public: bool, overwrite: bool) -> None:
    """Uploads a folder. UserError or RunError where that failed, with the command that does it again.

    overwrite: weights that are there and not in the folder are removed, or they would be loaded with those.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    _log.info(f"uploading {folder} to {name} on the hub")
    try:
        api.create_repo(name, private=not public, exist_ok=True)
        is_private = bool(api.model_info(name).private)  # by what the hub says: it need not do as it is asked
        if not is_private and not public:
            raise UserError(f"{_PUBLIC.format(name)}; the export in {folder} is whole")
        api.upload_folder(
            repo_id=name,
            folder_path=folder,
            commit_message="Export of medllm_jax",
            ignore_patterns=[".conversion-*"],
            delete_patterns=list(_WEIGHTS) if overwrite else None,
        )
    except UserError:
        raise
    except Exception as error:  # of many types
        more = [] if public else ["--private"]
        more += [f"--delete={pattern}" for pattern in _WEIGHTS] if overwrite else []
        again = shlex.join(["hf", "upload", name, folder, ".", *more])
        refused = _refused(error, f"--push {name}")
        raise type(refused)(f"{refused}; the export in {folder} is whole: `{again}` uploads it again") from error
    _log.info(f"{api.endpoint}/{name} ({'private' if is_private else 'public'}) holds the export now")


def _refused(error: Exception, given: str) -> UserError | RunError:
    """A refusal is for the user to change, all else may pass."""
    status: Any = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return UserError(
            f"{given}: the hub refuses the token in use ({words_of(error)}): set HF_TOKEN to one that may write"
        )
    return RunError(f"{given}: the hub did not take it ({words_of(error)})")
