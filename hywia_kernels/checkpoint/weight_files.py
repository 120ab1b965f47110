"""Which files of a directory hold the model's weights, and whether they are what their names say.

Only headers are read here: the tensors' names, dtypes and shapes stand at the beginning of a safetensors file. Nothing
is unpickled, and no file that the directory's index does not name is opened.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import HywiaError
from .file_kinds import read_header, read_json

__all__ = [
    "INDEX",
    "SINGLE",
    "Stored",
    "named_files",
    "read_ahead",
    "stored_tensors",
    "weight_bytes_loaded",
    "weight_bytes_stored",
    "weight_files",
]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".pickle", ".joblib")
_ORIGINAL = ("params.json", "consolidated.safetensors", "consolidated.safetensors.index.json")


@dataclass(frozen=True)
class Stored:
    """One tensor of a safetensors file, as the header describes it; the dtype is safetensors' name ("BF16"), and its
    bytes begin at `begin` of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    begin: int


def weight_files(folder: str | Path) -> tuple[Path, ...]:
    """The safetensors files that hold the model's weights, in the order of their names.

    `model.safetensors` if the directory has one, otherwise the files that `model.safetensors.index.json` names. Where
    both are there, the index must name that one file or files that are all gone (`save_pretrained` leaves the index of
    an earlier, sharded save). Adapters, `consolidated` files and others that lie beside are never among them. A link to
    a file is followed, as the hub's cache is made of links.

    Raises:
        HywiaError: there are none, one is missing, two sets could be meant, the index is damaged or names a file that
            is no safetensors file of this directory, or a file is not what its name says (a Git LFS pointer, empty,
            cut short, a pickle, a web page).
    """
    return tuple(_headers(Path(folder)))


def _headers(folder: Path) -> dict[Path, dict[str, Any]]:
    """The files of `weight_files`, and the entry of each tensor by their headers."""
    if not folder.is_dir():
        raise HywiaError(f"model: no such directory: {folder}")
    single, index = folder / SINGLE, folder / INDEX
    named = _indexed(index) if _exists(index) else ()
    if _exists(single):
        others = [file for file in named if file != single and _exists(file)]
        if others:
            raise HywiaError(
                f"model: {folder} holds both {SINGLE} and {INDEX}, which names others ({others[0].name}, ...); "
                "it cannot be told which are the model: remove the ones that are not"
            )
        files: tuple[Path, ...] = (single,)
    elif named:
        files = named
    else:
        raise HywiaError(_why_no_weights(folder))
    return {file: read_header(file) for file in files}


def named_files(folder: str | Path) -> tuple[Path, ...]:
    """The files that a directory's `model.safetensors.index.json` names, whether they are there or not.

    Raises:
        HywiaError: the index is damaged, or names what is no safetensors file of the same directory.
    """
    return _indexed(Path(folder) / INDEX)


def weight_bytes_stored(folder: str | Path) -> int:
    """Bytes of the files of `weight_files`, headers included.

    Raises:
        HywiaError: as `weight_files`.
    """
    return sum(file.stat().st_size for file in weight_files(folder))


def weight_bytes_loaded(folder: str | Path, dtype: str = "auto") -> int:
    """Bytes that the weights of a directory take in memory.

    Args:
        dtype: as `load` takes it.

    Raises:
        HywiaError: as `weight_files`.
    """
    tensors = stored_tensors(folder).values()
    if dtype == "auto":
        return sum(tensor.bytes for tensor in tensors)
    size = 4 if dtype == "float32" else 2
    return sum(size * math.prod(tensor.shape) for tensor in tensors)


def stored_tensors(folder: str | Path) -> dict[str, Stored]:
    """Name -> the tensor of that name, by the headers of `weight_files`.

    Raises:
        HywiaError: what `weight_files` raises; or two files hold a tensor of one name, or the index names a tensor that
            its file lacks.
    """
    tensors: dict[str, Stored] = {}
    for file, header in _headers(Path(folder)).items():
        # The values fill the file to its end.
        first = file.stat().st_size - max(entry["data_offsets"][1] for entry in header.values())
        for name, entry in header.items():
            if name in tensors:
                raise HywiaError(f"model: both {tensors[name].file.name} and {file.name} in {folder} hold {name!r}")
            begin, end = entry["data_offsets"]
            tensors[name] = Stored(file, entry["dtype"], tuple(entry["shape"]), end - begin, first + begin)
    index = Path(folder) / INDEX
    if _exists(index) and not _exists(Path(folder) / SINGLE):
        for name, file_name in _weight_map(index).items():
            if name not in tensors or tensors[name].file != Path(folder) / file_name:
                raise HywiaError(f"model: {index} says that {name!r} is in {file_name}, which does not hold it")
    return tensors


def _exists(path: Path) -> bool:
    """Whether something is there, a link that leads nowhere included: it is to be named, and not passed over."""
    return path.is_symlink() or path.exists()


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name, by an index that has been judged."""
    content = read_json(index).get("weight_map")
    if not isinstance(content, dict) or not content:
        raise HywiaError(f"model: {index} is damaged: expected an object 'weight_map' of tensor names and files")
    for tensor, name in content.items():
        parts = PurePosixPath(name).parts if isinstance(name, str) else ()
        if len(parts) != 1 or "\\" in name or "\0" in name or parts[0] in ("..", "/") or name != parts[0]:
            raise HywiaError(f"model: {index} names {name!r} for {tensor!r}: expected a file of the same directory")
        if not name.endswith(".safetensors"):
            pickle = "; a pickle can run code when opened and is never loaded" if _is_pickle(name) else ""
            raise HywiaError(f"model: {index} names {name!r} for {tensor!r}: expected a *.safetensors file{pickle}")
        if _foreign_kind(name) is not None:
            raise HywiaError(f"model: {index} names {name!r} for {tensor!r}: that is {_foreign_kind(name)}")
    return content


def _indexed(index: Path) -> tuple[Path, ...]:
    """The files that an index names, in the order of their names."""
    return tuple(index.parent / name for name in sorted(set(_weight_map(index).values())))


def _is_pickle(name: str) -> bool:
    return Path(name).suffix.lower() in _PICKLES


def _foreign_kind(name: str) -> str | None:
    """What a safetensors file is, by its name, that does not hold a model's weights; None where it may."""
    if name.startswith("adapter_model"):
        return "an adapter (LoRA and the like)"
    if name.startswith("consolidated"):
        return "a copy in the original (Meta's, Mistral's) layout"
    return None


def _why_no_weights(folder: Path) -> str:
    """Why a directory holds no weights to load, and the way out."""
    names = sorted(path.name for path in folder.iterdir())
    safetensors = [name for name in names if name.endswith(".safetensors")]
    adapters = [name for name in names if name.startswith("adapter_model")]
    originals = [name for name in names if name in _ORIGINAL or name.startswith("consolidated.")]
    pickles = [name for name in names if _is_pickle(name) and name not in adapters and name != "training_args.bin"]
    others = [name for name in safetensors if _foreign_kind(name) is None]
    shards = [name for name in others if "-of-" in name]
    if shards:
        return f"model: {folder} holds {shards[0]}, but no {INDEX}, which says what is in which file; fetch it as well"
    if pickles and not originals:
        beside = f" beside {others[0]}, which is not named as a model's" if others else ""
        return (
            f"model: {folder} holds its weights as a pickle ({pickles[0]}){beside}, which can run code when opened and "
            "is never loaded; convert it to safetensors first (save_pretrained in an environment you trust)"
        )
    if adapters:
        return (
            f"model: {folder} holds an adapter ({adapters[0]}) and no model; merge it into its model first "
            "(PEFT's merge_and_unload, then save_pretrained)"
        )
    if originals:
        return (
            f"model: {folder} holds the original layout ({originals[0]}), not {SINGLE}; convert it with the family's "
            "script in transformers (python -m transformers.models.llama.convert_llama_weights_to_hf), or fetch the "
            "model's transformers version"
        )
    if others:
        return f"model: {folder} holds {others[0]}, but neither {SINGLE} nor {INDEX}; rename it if it is the model"
    return f"model: {folder} holds no *.safetensors file; expected {SINGLE}, or {INDEX} and the files it names"


def read_ahead(spans: Iterable[tuple[Path, int, int]]) -> None:
    """Ask the system to have parts of files in memory when they are read: of each its file, first byte and bytes."""
    if not hasattr(os, "posix_fadvise"):
        return
    by_file: dict[Path, list[tuple[int, int]]] = {}
    for file, begin, count in spans:
        by_file.setdefault(file, []).append((begin, count))
    for file, parts in by_file.items():
        with suppress(OSError):  # a hint, which some filesystems refuse
            handle = os.open(file, os.O_RDONLY)
            try:
                for begin, count in parts:
                    os.posix_fadvise(handle, begin, count, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(handle)
