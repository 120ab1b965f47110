"""Which directories `--overwrite` may replace: those in which every file is accounted for.

A model's directory has a `config.json` with a `model_type`, and beside it only what `save_pretrained` of models,
tokenizers and processors, this package, model cards and the hub's downloads put there. A directory of scores has
`scores.json` and `scores.safetensors` alone. Anything else in it may be somebody's work, and is refused by name.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UsageError

__all__ = ["Input", "check", "check_report", "is_card", "is_processor", "is_tokenizer"]

_TOKENIZER = re.compile(
    r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|emoji|normalizer|tekken)\.json"
    r"|tokenizer\.model(\.v\d+)?|(spiece|sentencepiece|sentencepiece\.bpe|source|target)\.(model|spm|bpe\.model)"
    r"|[\w.-]+\.tiktoken|(vocab|merges|bpe\.codes|entity_vocab)(\.txt)?"
)
# Processors of images, sound and video; chat templates are theirs or the tokenizer's.
_PROCESSOR = re.compile(
    r"(processor_config|(\w+_)?preprocessor_config|chat_template|audio_tokenizer_config)\.json|chat_template\.jinja"
)
_CARD = re.compile(r"(README|MODEL_CARD|LICENSE|LICENCE|COPYING|NOTICE|USE_POLICY)([._-][\w.-]*)?", re.IGNORECASE)
_MODEL = re.compile(
    r"config\.json|generation_config\.json|hywia\.json|\.(hywia\.json|README\.md)\.partial|\.gitattributes"
    r"|(model|consolidated|pytorch_model)(\.[\w-]+)?(-\d{5}-of-\d{5})?\.(safetensors|bin)"
    r"|(model|consolidated)\.safetensors(\.[\w-]+)?\.index\.json|pytorch_model\.bin(\.[\w-]+)?\.index\.json|params\.json"
)
_SCORES = ("scores.json", "scores.safetensors")
_SUFFIXES_NO_CARD_HAS = (".py", ".bin", ".pt", ".pth", ".pkl", ".safetensors", ".gguf", ".tex", ".doc", ".docx", ".odt")
_LISTED = 5  # as many names a message lists


class Input(NamedTuple):
    """Something that a run reads: what people call it, and where it is."""

    what: str
    path: Path


def is_tokenizer(name: str) -> bool:
    """Whether a file of a checkpoint's directory belongs to its tokenizer."""
    return _TOKENIZER.fullmatch(name) is not None


def is_processor(name: str) -> bool:
    """Whether a file of a checkpoint's directory belongs to its processor of images, sound or video, or is a chat
    template."""
    return _PROCESSOR.fullmatch(name) is not None


def is_card(name: str) -> bool:
    """Whether a file of a checkpoint's directory tells people about it: its card, licence and notices."""
    return _CARD.fullmatch(name) is not None and not name.lower().endswith(_SUFFIXES_NO_CARD_HAS)


def _contents(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def _code_files(folder: Path, *configs: dict[str, Any] | None) -> set[str]:
    """The Python files that a checkpoint's configs name, and those that these import from beside them."""
    named: set[str] = set()
    for values in configs:
        auto_map = (values or {}).get("auto_map")
        for reference in auto_map.values() if isinstance(auto_map, dict) else ():
            for one in reference if isinstance(reference, list) else [reference]:
                if isinstance(one, str) and re.fullmatch(r"\w+\.\w+", one):
                    named.add(f"{one.partition('.')[0]}.py")
    waiting = sorted(named)
    while waiting:
        try:
            text = (folder / waiting.pop()).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        more = {f"{m}.py" for m in re.findall(r"^\s*from\s+\.(\w+)\s+import", text, re.MULTILINE)} - named
        named |= more
        waiting.extend(more)
    return named


def _unaccounted(folder: Path, also: Sequence[str]) -> list[str] | None:
    """Names, relative to a model's or a scores' directory, of what no such directory holds; None where it is neither.

    Args:
        folder: the directory. also: names that a model's directory may hold besides (the model's own GGUF file).
    """
    config, scores = _contents(folder / "config.json"), _contents(folder / "scores.json")
    if also or (config is not None and isinstance(config.get("model_type"), str) and config["model_type"]):
        code = _code_files(folder, config, _contents(folder / "tokenizer_config.json"))

        def known(name: str) -> bool:
            usual = (is_tokenizer, is_processor, is_card, _MODEL.fullmatch)
            return any(test(name) for test in usual) or name in code or name in also
    elif scores is not None and {"format", "groups", "fingerprint"} <= scores.keys():

        def known(name: str) -> bool:
            return name in _SCORES
    else:
        return None
    return sorted(_unknown_entries(folder, known))


def _unknown_entries(folder: Path, known: Any) -> Iterator[str]:
    """Names, relative to the directory, of the entries that `known` does not know."""
    for entry in os.scandir(folder):
        if entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path)):  # the hub's files are links
            if not known(entry.name):
                yield entry.name
        elif entry.is_dir(follow_symlinks=False) and entry.name == ".cache":
            # Where a download into a plain directory leaves notes of what it fetched.
            yield from (f".cache/{name}" for name in os.listdir(entry.path) if name != "huggingface")
        elif entry.is_dir(follow_symlinks=False) and entry.name == "additional_chat_templates":
            yield from (f"{entry.name}/{name}" for name in os.listdir(entry.path) if not name.endswith(".jinja"))
        else:
            yield f"{entry.name}{'/' if entry.is_dir() else ''}"


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False


def _inside(path: Path, folder: Path) -> bool:
    """Whether a path is a directory or lies in it, through whatever links."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def _files_of(source: Path) -> list[Path]:
    """The files that an input reads, each of which may be a link into another directory."""
    return [file for file in source.iterdir() if file.is_file()] if source.is_dir() else [source]


def _is_model(path: Path, given: Input) -> bool:
    """Whether a directory is the model that the run reads, or the one around its GGUF file."""
    what, source = given
    return what == "model" and (_same(path, source) or (source.suffix == ".gguf" and _same(path, source.parent)))


def _check_inputs(path: Path, inputs: Sequence[Input], in_place: bool) -> None:
    """Refuse a directory that holds, or by links is, something that the run reads."""
    for given in inputs:
        what, source = given
        if not os.path.lexists(source) or (in_place and _is_model(path, given)):
            continue
        if _is_model(path, given):
            raise UsageError(
                f"output: {path} is the model itself; --overwrite would replace the only copy of it; choose another "
                "directory, or pass --in-place (in_place=True)"
            )
        if _inside(source, path) or any(_inside(file, path) for file in _files_of(source)):
            raise UsageError(
                f"output: {path} holds the {what} ({source}), which would be deleted; choose another directory"
            )


def _check_place(path: Path) -> None:
    """Refuse a place that is no directory, or a directory that is more than what it holds."""
    if path.is_symlink() or not path.is_dir():
        what = "a link" if path.is_symlink() else "a file"
        raise UsageError(f"output: {path} is not a directory but {what}; --overwrite replaces directories only")
    places = []
    with suppress(OSError):
        places.append(("the working directory", Path.cwd()))
    with suppress(RuntimeError):
        places.append(("your home directory", Path.home()))
    for what, place in places:
        if _inside(place, path):
            raise UsageError(f"output: {path} is or holds {what}; choose another directory")
    if os.path.ismount(path):
        raise UsageError(f"output: {path} is a mounted filesystem, which cannot be replaced; choose a directory in it")


def check(path: Path, *, overwrite: bool, in_place: bool = False, inputs: Sequence[Input] = ()) -> None:
    """Refuse a directory that may not be written, or not be replaced.

    Args:
        path: the directory to write, absolute. overwrite: it may be replaced.
        in_place: the model itself may be replaced. inputs: what the run reads; the model among it is called "model".

    Raises:
        UsageError: something is there that may not be replaced.
    """
    if path == Path(path.anchor):
        raise UsageError(f"output: {path} is the root of the filesystem; choose another directory")
    if not os.path.lexists(path):
        return
    own = [source for what, source in inputs if _is_model(path, Input(what, source))]
    if not overwrite and not (in_place and own):
        raise UsageError(f"output: {path} exists; choose another directory, or pass --overwrite")
    _check_place(path)
    _check_inputs(path, inputs, in_place)
    if not any(path.iterdir()):
        return
    unknown = _unaccounted(path, [source.name for source in own if source.is_file()])
    if unknown is None:
        raise UsageError(
            f"output: {path} holds neither a model nor scores; --overwrite will not delete it; choose another directory"
        )
    if unknown:
        more = f" and {len(unknown) - _LISTED} more" if len(unknown) > _LISTED else ""
        raise UsageError(
            f"output: {path} holds {', '.join(unknown[:_LISTED])}{more}, which no directory of a model or scores has; "
            "--overwrite will not delete that; move it away, or choose another directory"
        )


def check_report(
    what: str, file: str | Path | None, *, outputs: Sequence[Path] = (), inputs: Sequence[Input] = ()
) -> None:
    """Refuse a report that has no place, or would take the place of what the run reads or writes.

    Args:
        what: name of the argument, for messages. file: where the report goes; None: nowhere.
        outputs: directories and files that the run writes. inputs: what it reads.

    Raises:
        UsageError: the report's directory does not exist, the report is a directory itself, or it is or lies in one of
            the outputs or inputs.
    """
    if file is None:
        return
    path = Path(os.path.abspath(file))
    if not path.parent.is_dir():
        raise UsageError(f"{what}: no such directory: {path.parent}")
    if path.is_dir():
        raise UsageError(f"{what}: expected a file, got the directory {file}")
    for output in outputs:
        if _inside(path, output):
            raise UsageError(f"{what}: {file} is or lies in the output {output}; choose a file beside it")
    for name, source in inputs:
        if os.path.lexists(path) and os.path.lexists(source) and (_same(path, source) or _inside(path, source)):
            raise UsageError(f"{what}: {file} is a file of the {name}; choose another")
