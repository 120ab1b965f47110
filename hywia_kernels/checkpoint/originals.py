"""Where a model came from on this machine, and which of its files go along with a smaller one."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import HywiaError
from .replaceable import Input, is_card, is_processor, is_tokenizer
from .weight_files import weight_bytes_stored

__all__ = ["copy_companions", "inputs", "least_bytes", "original", "source_of"]


def source_of(name: str) -> Path | None:
    """The directory or GGUF file that a model's name stands for, or the hub's copy of it on this machine."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if not name:
        return None
    if Path(name).exists():
        return Path(name)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        return None
    try:
        config = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return Path(config).parent if isinstance(config, str) else None


def original(model: Any) -> Path | None:
    """The directory a model was loaded from, or the hub's copy of it on this machine."""
    source = source_of(str(getattr(model, "name_or_path", "") or ""))
    return source if source is not None and source.is_dir() else None


def inputs(arguments: argparse.Namespace) -> tuple[Input, ...]:
    """The files and directories that a command reads, for the checks of what it writes."""
    given = []
    for what, field in (
        *((n, n) for n in ("model", "scores", "text", "vocabulary", "recipe")),
        ("calib", "calibration"),
    ):
        names = [getattr(arguments, field, None), *(getattr(arguments, "models", ()) if what == "model" else ())]
        for name in (str(n) for n in names if n):
            source = source_of(name) if what == "model" else Path(name)
            if source is not None and source.exists():
                given.append(Input(what, source))
    return tuple(given)


def least_bytes(given: Sequence[Input], share: float, narrowed: bool) -> int:
    """Bytes that a pruned model takes on the disk at least; 0 where the model's are not known yet.

    Args:
        given: what the run reads. share: the largest share of the weights that may go, in [0, 1].
        narrowed: the weights may be written in half their bits, or fewer.
    """
    total = 0
    for what, source in given:
        if what == "model" and source.is_dir():
            with suppress(HywiaError):  # loading says what is wrong with it
                total = weight_bytes_stored(source)
    return int(total * max(0.0, 1.0 - share) * (0.5 if narrowed else 1.0))


def copy_companions(model: Any, tokenizer: Any, folder: Path) -> None:
    """Copy what the original's directory holds beside config and weights, and the new one lacks.

    The files are told by their names (`replaceable`): files of processors of images, sound and video, and chat
    templates; if the tokenizer was written, its other files, where they agree with it; cards, licences and notices.
    Python code, pickles, weights, adapters, copies in other formats and files in subdirectories (but for
    `additional_chat_templates`) are never copied. A card describes the model before pruning, so it becomes
    `README.original.md`. A directory without a `config.json`, such as one around a GGUF file, gives nothing.
    """
    source = original(model)
    if source is None or not (source / "config.json").is_file():
        return
    for file in sorted(source.iterdir()):
        if not file.is_file():
            continue
        if is_processor(file.name) or (is_tokenizer(file.name) and _agrees(file, tokenizer)):
            _copy(file, folder / file.name)
        elif is_card(file.name):
            stem, dot, suffix = file.name.partition(".")
            kept = stem.lower() not in ("readme", "model_card") or suffix.startswith("original")
            _copy(file, folder / (file.name if kept else f"{stem}.original{dot}{suffix}"))
    templates = source / "additional_chat_templates"
    for file in sorted(templates.glob("*.jinja")) if templates.is_dir() and tokenizer is not None else ():
        (folder / templates.name).mkdir(exist_ok=True)
        _copy(file, folder / templates.name / file.name)


def _agrees(file: Path, tokenizer: Any) -> bool:
    """Whether a tokenizer's file holds for the tokenizer in memory, which may have got other special tokens."""
    if tokenizer is None:
        return False
    if file.name not in ("special_tokens_map.json", "added_tokens.json"):
        return True
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return False
    if file.name == "added_tokens.json":
        return isinstance(values, dict) and values.items() <= tokenizer.get_vocab().items()
    return isinstance(values, dict) and all(_token(v) == _token(getattr(tokenizer, k, None)) for k, v in values.items())


def _token(value: Any) -> Any:
    """A special token, or a list of them, as text, in whichever form it is held."""
    if isinstance(value, (list, tuple)):
        return [_token(v) for v in value]
    return value.get("content") if isinstance(value, dict) else None if value is None else str(value)


def _copy(file: Path, target: Path) -> None:
    """Copy a file unless the target is there already."""
    if target.exists():
        return
    if file.name.endswith("config.json"):
        _copy_without_code(file, target)
    else:
        shutil.copyfile(file, target)


def _copy_without_code(file: Path, target: Path) -> None:
    """Copy a processor's config without `auto_map`, which names Python files of the checkpoint: they stay behind."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        values = None
    if not isinstance(values, dict) or "auto_map" not in values:
        shutil.copyfile(file, target)
        return
    del values["auto_map"]
    target.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
