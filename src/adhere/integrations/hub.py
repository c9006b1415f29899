"""A finished model on the hub. What can refuse it is asked before training, not after hours of it."""

from __future__ import annotations

import shlex
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.constants import is_offline_mode
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # exported, but not to mypy

from adhere.errors import RunFailed, UserError


def is_name(text: str) -> bool:
    """Whether a repository of the hub could be called `text`."""
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


def check(repo: str) -> None:
    """Raise `UserError` where nothing could be pushed to `repo`, as far as that is known without asking the hub."""
    where = f"push_to_hub {repo}"
    if not is_name(repo):
        raise UserError("is no name of a repository", where=where, fix="write NAME or OWNER/NAME")
    if is_offline_mode():
        raise UserError("HF_HUB_OFFLINE is set", where=where, fix="unset it, or leave --push-to-hub out")
    if get_token() is None:
        raise UserError("no token of the hub", where=where, fix="run `hf auth login`, or set HF_TOKEN")


def create(repo: str, *, public: bool = False) -> str:
    """Make the repository unless it is there, see that it can be written to, and give its full name.

    Raises `UserError`: the hub cannot be reached, does not know the token, or does not let it write there."""
    try:
        made = str(HfApi().create_repo(repo, private=not public, exist_ok=True).repo_id)
        HfApi().auth_check(made, write=True)  # one that is there is found by who may only read it, too
        return made
    except Exception as error:  # of the hub, of the network, of a proxy: training has not begun, and must not
        raise UserError(
            f"the hub does not take it: {_line(error)}",
            where=f"push_to_hub {repo}",
            fix="check token and name, or leave --push-to-hub out",
        ) from error


def push(folder: Path, repo: str, message: str) -> str:
    """Upload the model in `folder` in one commit; where it can be seen comes back.

    Raises `RunFailed` with the command that tries again: the model stays where it is."""
    try:
        HfApi().upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
    except Exception as error:  # whatever it was, the model is trained and on disk, and the user must hear of that
        again = f"hf upload {shlex.quote(repo)} {shlex.quote(str(folder))} ."
        raise RunFailed(
            f"the model is in {folder}, but was not pushed to {repo}: {_line(error)}", fix=f"push it with: {again}"
        ) from error
    return f"{HfApi().endpoint}/{repo}"


def _line(error: Exception) -> str:
    """What the hub said, or the first line of what an error says."""
    said = error.server_message if isinstance(error, HfHubHTTPError) else None
    lines = (line.strip() for line in (said or str(error)).splitlines())
    return next((line for line in lines if line), type(error).__name__).rstrip(".")
