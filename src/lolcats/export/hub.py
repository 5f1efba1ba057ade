"""Upload to the Hugging Face hub, only when asked."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from lolcats.errors import LolcatsError

HTTP_ERROR = cast(type[Exception], HfHubHTTPError.__bases__[0])
"""HTTPError of the library that this version of huggingface_hub speaks HTTP with."""


def check_login(repository: str) -> None:
    """Raise LolcatsError if nobody is logged in or `repository` is not USER/NAME; nothing is sent."""
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise LolcatsError(f"{repository!r} cannot be a name on the hub: {error}") from error
    if repository.count("/") != 1:
        raise LolcatsError(f"expected a name USER/NAME on the hub; got {repository!r}")
    if not get_token():
        raise LolcatsError("nobody is logged in to the Hugging Face hub; run `hf auth login` or set HF_TOKEN")


def push_folder(folder: Path, repository: str, *, private: bool = False) -> str:
    """Upload an exported folder as a model of the hub and return its address.

    Args:
        folder: what `export_model` wrote.
        repository: USER/NAME; made if it is not there.
        private: make a new repository private. One that exists stays what it is.

    Raises:
        LolcatsError: nobody is logged in, or the hub refuses or cannot be reached.
    """
    check_login(repository)
    api = HfApi()
    try:
        address = api.create_repo(repository, private=private, exist_ok=True, repo_type="model")
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload by lolcats export")
    except (HTTP_ERROR, OSError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise LolcatsError(f"cannot upload to {repository}: {first.strip()}; {folder} is complete") from error
    return str(address)
