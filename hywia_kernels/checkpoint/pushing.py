"""A written directory on the hub, by the hub's own client, which transformers uploads with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import HywiaError, UsageError

__all__ = ["check_repository", "pushed"]


def check_repository(name: Any) -> None:
    """Refuse, before anything is written, what is no name of a repository.

    Raises:
        UsageError: it is none.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except (HFValidationError, TypeError) as error:
        raise UsageError(
            f"push_to_hub: expected a repository's name such as you/model, got {name!r}: {error}"
        ) from None


def pushed(folder: Path, name: str) -> str:
    """Upload a complete directory, all in one commit; a repository that is not there yet is made, private.

    Returns:
        the commit's address.

    Raises:
        HywiaError: the hub refused, or cannot be reached; the directory stays as it is.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        repository = api.create_repo(name, private=True, exist_ok=True).repo_id
        commit = api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Upload a model pruned by hywia_kernels"
        )
    except (OSError, ValueError, RuntimeError) as error:  # of the network and of the hub, whatever its version
        raise HywiaError(
            f"push_to_hub: {folder} is written, but could not be uploaded to {name} ({error}); log in (hf auth login, "
            f"or HF_TOKEN), or upload it by hand: hf upload {name} {folder}"
        ) from error
    return str(commit.commit_url)
