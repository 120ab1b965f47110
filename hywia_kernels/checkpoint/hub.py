"""The files of a model on the hub: first those that describe it, then, once they are judged, its weights.

Pickles are never fetched, and Python files only for a model that was trusted to run them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import HywiaError
from .weight_files import INDEX, SINGLE, named_files

__all__ = ["NO_OPTIONS", "Options", "complete", "described", "with_code"]

Options = Mapping[str, Any]  # "token" and "cache_dir", which the hub's client takes; None leaves its own default
NO_OPTIONS: Options = {}
_DESCRIPTION = ("*.json", "*.model", "*.txt", "*.tiktoken", "*.jinja")


def described(name: str, revision: str | None = None, options: Options = NO_OPTIONS) -> Path:
    """Fetch a hub model's config and tokenizer, without weights; the directory on this machine that holds them.

    Args:
        name: the hub id. revision: a branch, tag or commit; None: the main branch.
        options: of the hub's client, as `load` takes them.
    """
    return _snapshot(name, list(_DESCRIPTION), revision, options)


def complete(name: str, folder: Path, *, code: bool, options: Options = NO_OPTIONS) -> Path:
    """Fetch the files that hold the weights, and the Python files with `code`; the directory that then holds all.

    Args:
        name: the hub id. folder: the directory that `described` gave.

    Raises:
        HywiaError: the hub has no safetensors of this model.
    """
    wanted = [SINGLE]
    if (folder / INDEX).is_file():
        wanted = sorted({file.name for file in named_files(folder)})
    again = _snapshot(name, [*wanted, *(["*.py"] if code else [])], _commit(folder), options)
    if wanted == [SINGLE] and not (again / SINGLE).exists():
        raise HywiaError(
            f"model: {name} has neither {SINGLE} nor {INDEX} on the hub; weights stored as pickles can run code when "
            "opened and are never loaded: convert it to safetensors first (save_pretrained in an environment you trust)"
        )
    return again


def with_code(name: str, folder: Path, options: Options = NO_OPTIONS) -> Path:
    """Fetch the Python files too, of a model that was trusted to run them; the directory that then holds all."""
    return _snapshot(name, ["*.py"], _commit(folder), options)


def _commit(folder: Path) -> str | None:
    """The commit whose description was judged, whatever has been pushed since."""
    return folder.name if re.fullmatch(r"[0-9a-f]{40}", folder.name) else None


def _snapshot(name: str, patterns: list[str], revision: str | None, options: Options) -> Path:
    from huggingface_hub import snapshot_download

    pinned: dict[str, Any] = {} if revision is None else {"revision": revision}
    pinned |= {key: value for key, value in options.items() if value is not None}
    return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*/*"], **pinned))
