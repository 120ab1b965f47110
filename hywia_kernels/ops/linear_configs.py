"""Launch configurations of the Triton `linear_importance`: shipped defaults, and a cache of what was tuned here.

The order of float32 additions follows the configuration, so two configurations may differ in the last bits. A run
therefore takes the shipped defaults, on every machine alike, unless HYWIA_AUTOTUNE=1 asks for measured ones. Those are
measured once per key (device, form, dtype, axis, sizes in powers of two) and kept in a JSON file, so that later runs
with HYWIA_AUTOTUNE=1 on the same machine give the same bits again.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path

log = logging.getLogger(__name__)

AUTOTUNE = "HYWIA_AUTOTUNE"
VERSION = 1  # of the file; raised when a kernel changes what its configurations mean

FORMS = ("total", "sum", "square", "both")


@dataclass(frozen=True)
class Config:
    """Tile sizes (units, summed side, tokens a step), warps, pipeline stages, tiles side by side, programs per SM."""

    block_u: int
    block_r: int
    block_k: int
    warps: int
    stages: int
    group: int = 8
    per_sm: int = 1

    def valid(self) -> bool:
        powers = (self.block_u, self.block_r, self.block_k, self.warps)
        return (
            all(type(getattr(self, f.name)) is int for f in fields(self))
            and all(n > 0 and n & (n - 1) == 0 for n in powers)
            and min(self.block_u, self.block_r, self.block_k) >= 16
            and min(self.stages, self.group, self.per_sm) >= 1
        )


# By form: "total" keeps one accumulator (first order, samples not told apart), "sum" and "square" add a running sum or
# sum of squares over samples, "both" both. Measured on an H100; H200 has the same multiprocessors.
DEFAULTS: dict[tuple[str, bool, int], Config] = {
    (form, wide, axis): Config(64, 64, 32, 4, 3) if wide else Config(128, 256 if form == "total" else 128, 64, 8, 3)
    for form in FORMS
    for wide in (False, True)
    for axis in (0, 1)
}


def default(form: str, wide: bool, axis: int) -> Config:
    """Shipped configuration; `wide` is float32."""
    return DEFAULTS[form, wide, axis]


def _bucket(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def key(device: str, form: str, dtype: str, axis: int, lines: int, reduce: int, tokens: int, samples: int) -> str:
    """What a tuned choice is kept under; sizes are rounded up to powers of two."""
    sizes = "x".join(str(_bucket(n)) for n in (lines, reduce, tokens, samples))
    return f"{device}|{form}|{dtype}|axis{axis}|{sizes}"


def path() -> Path:
    """`$HYWIA_CACHE/linear.json`, or `hywia_kernels/linear.json` in the user's cache directory."""
    own = os.environ.get("HYWIA_CACHE")
    if own:
        return Path(own) / "linear.json"
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "hywia_kernels" / "linear.json"


def read() -> dict[str, Config]:
    """Everything tuned so far. A file that cannot be understood is reported and counts as empty."""
    file = path()
    try:
        content = json.loads(file.read_text())
        if content["version"] != VERSION:
            log.warning("%s: version %r, expected %d; tuning anew", file, content["version"], VERSION)
            return {}
        found = {name: Config(**entry) for name, entry in content["configs"].items()}
        bad = [name for name, config in found.items() if not config.valid()]
        if bad:
            raise ValueError(f"impossible configuration under {bad[0]!r}")
        return found
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s: not a file of tuned configurations (%s); ignored: delete it, or tune anew", file, error)
        return {}


def write(name: str, config: Config) -> None:
    """Add one entry; the file is replaced whole, so that a reader never sees half of it.

    Of two processes that write at one time the later one wins; the other's entry is measured again some day. A disk
    that refuses is reported: the choice then lasts as long as the process.
    """
    file = path()
    content = {"version": VERSION, "configs": {n: asdict(c) for n, c in sorted({**read(), name: config}.items())}}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{file.name}-", dir=file.parent)
        try:
            with os.fdopen(handle, "w") as out:
                json.dump(content, out, indent=1)
                out.flush()
                os.fsync(out.fileno())
            os.replace(temporary, file)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        log.warning("%s: cannot be written (%s); the tuned configuration is kept for this process alone", file, error)
