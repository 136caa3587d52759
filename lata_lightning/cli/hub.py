"""Uploading a finished directory to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from lata_lightning.cli.common import note
from lata_lightning.errors import LataError, OutputError, first_line


def check_hub(repository: str) -> None:
    """Refuse an upload that cannot succeed, before any work is done.

    Args:
        repository: Its name on the hub, ``owner/name`` or ``name``.

    Raises:
        LataError: The name is not valid on the hub, the process is offline, there is no token, or the hub rejects it.
    """
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, but not marked as exported

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise LataError(f"--push-to-hub takes the name of a repository, such as 'name/model', got {repository!r}") from error
    if constants.is_offline_mode():
        raise LataError("--push-to-hub needs the network, and HF_HUB_OFFLINE is set: unset it, or leave --push-to-hub out")
    if get_token() is None:
        raise LataError("--push-to-hub needs a token of the hub with the right to write: run 'hf auth login', or set HF_TOKEN")
    try:
        HfApi().whoami()
    except (HfHubHTTPError, OSError) as error:
        raise LataError(f"the hub cannot be reached, or does not accept the token ({first_line(error)}). Try 'hf auth whoami'.") from error


def upload(directory: str | Path, repository: str) -> None:
    """Upload a directory to a repository, which is created as a private one if it does not exist.

    Raises:
        OutputError: The hub refuses it, or cannot be reached; the directory stays as it is.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        # The full name, as the hub completes one without an owner.
        full = api.create_repo(repository, private=True, exist_ok=True).repo_id
        api.upload_folder(repo_id=full, folder_path=directory, commit_message="Upload by lata")
    except (HfHubHTTPError, OSError) as error:
        raise OutputError(
            f"{directory} was written, but not uploaded to {repository} ({first_line(error)}). Try again with: hf upload {repository} {directory}"
        ) from error
    note(f"uploaded to https://huggingface.co/{full}")
