"""How something was made, as a read-only mapping that JSON can hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from .errors import HywiaError

__all__ = ["Record", "frozen_record"]


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
    """A copy of a mapping, and of the mappings and lists in it, that cannot be changed.

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
