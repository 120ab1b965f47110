"""Whether a file is what its name says: JSON objects and the headers of safetensors files, by their first bytes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ..errors import HywiaError

__all__ = ["check_kind", "read_header", "read_json"]

_LARGEST_HEADER = 100_000_000  # bytes, as the safetensors library has it
_BITS = {
    **dict.fromkeys(("F4", "F6_E2M3", "F6_E3M2", "F4_E2M1"), 0),  # below one byte: their count of bits is not checked
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


def check_kind(path: Path) -> None:
    """Refuse a file that is, by its first bytes, something else than a JSON or safetensors file.

    Raises:
        HywiaError: it cannot be read, is empty, a Git LFS pointer, a web page, a pickle, or a GGUF file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            begin = file.read(512)
    except OSError as error:
        raise HywiaError(f"model: cannot read {path}: {error.strerror or error}") from error
    _check_first_bytes(path, begin, size)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        HywiaError: it cannot be read, holds NaN or Infinity, or holds something else (which is named: a Git LFS
            pointer, a web page).
    """
    check_kind(path)

    def refuse(constant: str) -> None:
        raise ValueError(f"it holds {constant}, which is no number")

    try:
        content = json.loads(path.read_bytes().decode("utf-8-sig"), parse_constant=refuse)
    except OSError as error:
        raise HywiaError(f"model: cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise _unloadable(path, f"it is damaged: expected JSON ({error})") from error
    if not isinstance(content, dict):
        raise HywiaError(
            f"model: could not load {path}: it is damaged: expected a JSON object, got {type(content).__name__}"
        )
    return content


def _unloadable(path: Path, reason: str) -> HywiaError:
    return HywiaError(f"model: could not load {path}: {reason}")


def _check_first_bytes(path: Path, begin: bytes, size: int) -> None:
    """As `check_kind`, for a file whose first bytes and size (in bytes) are known."""
    if size == 0:
        raise _unloadable(path, "it is empty; fetch it again")
    if begin.startswith(b"version https://git-lfs"):
        raise HywiaError(
            f"model: could not load {path}: it is a Git LFS pointer, not the file itself; fetch it with: git lfs pull"
        )
    if begin.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"<":
        raise HywiaError(
            f"model: could not load {path}: it is a web page (HTML or XML), not the file itself; fetch it again"
        )
    if begin.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        raise _unloadable(path, "it is a pickle under another name, which can run code when opened and is never loaded")
    if begin.startswith(b"GGUF"):
        raise HywiaError(
            f"model: could not load {path}: it is a GGUF file under another name; rename it to *.gguf and load the file"
        )


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Tensor name -> the header's entry of a safetensors file: "dtype", "shape" and "data_offsets".

    Raises:
        HywiaError: the file cannot be read, is no safetensors file, is damaged or cut short, or holds no tensor.
    """
    try:
        if not path.is_file():
            what = "leads nowhere" if path.is_symlink() and not path.exists() else "is missing"
            what = what if not path.exists() else "is no regular file"
            raise _unloadable(path, f"it {what}; fetch it again")
        size = path.stat().st_size
        with path.open("rb") as file:
            begin = file.read(512)
            # A header's length is eight bytes, so that of a pickle or a page reads as one far too long.
            length = int.from_bytes(begin[:8], "little")
            if size < 8 or length > min(size - 8, _LARGEST_HEADER) or begin[8:9] != b"{":
                _check_first_bytes(path, begin, size)
                if begin[8:9] == b"{" and length <= _LARGEST_HEADER:
                    raise _cut_short(path, size, 8 + length)
                raise _unloadable(path, "it is no safetensors file (or its beginning is damaged); fetch it again")
            file.seek(8)
            raw = file.read(length)
    except OSError as error:
        raise HywiaError(f"model: cannot read {path}: {error.strerror or error}") from error
    try:
        content = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise HywiaError(
            f"model: could not load {path}: it is damaged: its header is no JSON ({error}); fetch it again"
        ) from error
    if not isinstance(content, dict):
        raise _unloadable(path, "it is damaged: its header is no JSON object; fetch it again")
    content.pop("__metadata__", None)
    if not content:
        raise _unloadable(path, "it holds no tensor")
    for name, entry in content.items():
        if not _is_entry(entry):
            raise HywiaError(
                f"model: could not load {path}: it is damaged: its header says {entry!r} of {name!r}; fetch it again"
            )
    end = 8 + length + max(entry["data_offsets"][1] for entry in content.values())
    if size != end:
        raise _cut_short(path, size, end)
    return content


def _cut_short(path: Path, size: int, wanted: int) -> HywiaError:
    what = "cut short" if size < wanted else "damaged"
    return HywiaError(
        f"model: could not load {path}: it is {what}, expected {wanted} bytes, got {size}; fetch it again"
    )


def _is_entry(entry: Any) -> bool:
    """Whether a header's entry has the form of one, and as many bytes as its dtype and shape take."""

    def counts(value: Any) -> bool:
        return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)

    if not isinstance(entry, dict) or not counts(entry.get("shape")) or not isinstance(entry.get("dtype"), str):
        return False
    offsets: Any = entry.get("data_offsets")
    if not counts(offsets) or len(offsets) != 2 or offsets[1] < offsets[0]:
        return False
    bits = _BITS.get(entry["dtype"], 0)
    return not bits or 8 * (offsets[1] - offsets[0]) == bits * math.prod(entry["shape"])
