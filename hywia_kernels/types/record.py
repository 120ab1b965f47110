"""How something was made, as a read-only mapping that JSON can hold; and JSON objects that carry their own digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NoReturn

from ..errors import HywiaError, UsageError

__all__ = ["DIGEST", "Record", "digest_of", "frozen_record", "parsed", "sealed"]

DIGEST = "sha256"  # the entry of a JSON object that holds the digest of all its other entries


class Record(dict[str, Any]):
    """A dict that cannot be changed: `{**record, ...}` makes a new one."""

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(
            "record: cannot be changed; make a new one, with dataclasses.replace(..., record={**record, ...})"
        )

    __setitem__ = __delitem__ = __ior__ = _refuse  # type: ignore[assignment]
    clear = pop = popitem = setdefault = update = _refuse  # type: ignore[assignment]

    def __reduce__(self) -> Any:
        return Record, (dict(self),)

    def __copy__(self) -> Record:
        return self

    def __deepcopy__(self, memo: Any) -> Record:
        return frozen_record(self)


def frozen_record(content: Any) -> Record:
    """A copy of a mapping, and of the mappings and lists in it, whose mappings cannot be changed.

    Raises:
        HywiaError: it is no mapping, or holds what JSON cannot.
    """
    if not isinstance(content, Mapping):
        raise HywiaError(f"record: expected a mapping, got {type(content).__name__}")
    return _frozen(content, "record")


def _frozen(value: Any, path: str) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        for key in value:
            if type(key) is not str:
                raise HywiaError(f"{path}: expected names as keys, got {key!r}")
        return Record((key, _frozen(item, f"{path}.{key}")) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return [_frozen(item, f"{path}[{i}]") for i, item in enumerate(value)]
    raise HywiaError(f"{path}: expected what JSON can hold, got {type(value).__name__}")


def digest_of(content: Mapping[str, Any]) -> str:
    """SHA-256, in hexadecimal digits, of a JSON object without its entry `DIGEST`, in whatever order its keys are.

    Raises:
        ValueError, TypeError, RecursionError: it is no JSON.
    """
    rest = {k: v for k, v in content.items() if k != DIGEST}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object as it will be read back (keys become strings, tuples become lists), with its digest added.

    Raises:
        UsageError: it holds what JSON cannot.
    """
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(content)))
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"record: expected what JSON can hold, got something else: {error}") from error
    return plain | {DIGEST: digest_of(plain)}


def parsed(data: bytes, where: str) -> dict[str, Any]:
    """Read a JSON object from a file's bytes; where it carries a digest, make sure that it is as it was sealed.

    Args:
        data: the file's content. where: what the file is called in messages.

    Raises:
        HywiaError: the bytes are no JSON object, or not what their digest says.
    """
    try:
        content = json.loads(data)
        is_intact = not isinstance(content, dict) or DIGEST not in content or content[DIGEST] == digest_of(content)
    except (ValueError, RecursionError) as error:
        raise HywiaError(f"{where} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise HywiaError(f"{where} is damaged: expected an object, got {type(content).__name__}")
    if not is_intact:
        raise HywiaError(f"{where} is damaged: its content is not what its digest says")
    return content
