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
VERSION = 1  # of the file's format; raised when a kernel changes what its configurations mean

FORMS = ("total", "sum", "square", "both")


@dataclass(frozen=True)
class Config:
    """Tile sizes (units, summed side, tokens a step), warps, pipeline stages, tiles side by side, programs per SM.

    With `single`, samples that take one step are summed without a branch, and the compiler keeps the weight's tile in
    registers instead of in shared memory.
    """

    block_u: int
    block_r: int
    block_k: int
    warps: int
    stages: int
    group: int = 8
    per_sm: int = 1
    single: bool = False

    def valid(self) -> bool:
        powers = (self.block_u, self.block_r, self.block_k, self.warps)
        return (
            all(type(getattr(self, f.name)) is (bool if f.name == "single" else int) for f in fields(self))
            and all(n > 0 and n & (n - 1) == 0 for n in powers)
            and min(self.block_u, self.block_r, self.block_k) >= 16
            and min(self.stages, self.group, self.per_sm) >= 1
        )


# By form: "total" keeps one accumulator (first order, samples not told apart), "sum" and "square" add a running sum or
# sum of squares over samples, "both" both. Then whether the operands are float32, and the axis. Measured on an
# H100 80GB with Triton 3.6 at LLaMA's shapes, 10 samples of 128 tokens; an H200 has the same multiprocessors.
DEFAULTS: dict[tuple[str, bool, int], Config] = {
    ("total", False, 0): Config(128, 256, 64, 8, 3, group=16),
    ("total", False, 1): Config(128, 256, 64, 8, 3, group=16),
    ("sum", False, 0): Config(128, 128, 128, 8, 3, group=16, single=True),
    ("sum", False, 1): Config(128, 128, 128, 8, 3, group=16, single=True),
    ("square", False, 0): Config(128, 128, 128, 8, 3, group=16, single=True),
    ("square", False, 1): Config(128, 128, 128, 8, 3, group=16, single=True),
    ("both", False, 0): Config(64, 128, 128, 4, 2),
    ("both", False, 1): Config(128, 128, 128, 8, 3, group=16, single=True),
    ("total", True, 0): Config(128, 128, 32, 8, 3),
    ("total", True, 1): Config(128, 128, 32, 8, 3),
    ("sum", True, 0): Config(128, 128, 32, 8, 3),
    ("sum", True, 1): Config(128, 64, 32, 4, 2),
    ("square", True, 0): Config(128, 128, 32, 8, 3),
    ("square", True, 1): Config(128, 64, 32, 4, 2),
    ("both", True, 0): Config(64, 64, 64, 4, 2),
    ("both", True, 1): Config(64, 64, 64, 4, 2),
}
SHORT = 128  # tokens; samples longer than this take several steps, and use LONG whatever the form and the axis
LONG = Config(128, 128, 64, 8, 4)
PORTABLE = Config(64, 64, 32, 4, 2)  # fits every device's registers and shared memory
ALTERNATIVES: dict[tuple[str, bool], tuple[Config, ...]] = {
    ("total", False): (Config(128, 256, 64, 8, 3), Config(256, 128, 64, 8, 3), Config(128, 128, 32, 4, 4, per_sm=2)),
    ("sum", False): (Config(128, 128, 64, 8, 3), Config(64, 128, 128, 4, 2), Config(64, 128, 64, 4, 3)),
    ("square", False): (Config(128, 128, 64, 8, 3), Config(64, 128, 128, 4, 2), Config(64, 128, 64, 4, 3)),
    ("both", False): (Config(64, 128, 64, 4, 3), Config(64, 128, 64, 4, 4), Config(128, 128, 64, 8, 3)),
    ("total", True): (Config(128, 128, 32, 8, 2), Config(128, 128, 16, 8, 3)),
    ("sum", True): (Config(64, 64, 64, 4, 2), Config(64, 128, 32, 4, 2)),
    ("square", True): (Config(64, 64, 64, 4, 2), Config(64, 128, 32, 4, 2)),
    ("both", True): (Config(64, 64, 32, 4, 3), Config(64, 128, 32, 4, 2), Config(128, 64, 32, 4, 2)),
}


def default(form: str, wide: bool, axis: int, length: int, hopper: bool) -> Config:
    """The shipped configuration of a call.

    Args:
        form: one of FORMS.
        wide: the operands are float32.
        axis: where the units lie.
        length: tokens of the longest sample.
        hopper: the device has the shared memory and the tensor descriptors of an H100.
    """
    if not hopper:
        return PORTABLE
    return LONG if length > SHORT and form != "total" and not wide else DEFAULTS[form, wide, axis]


def candidates(form: str, wide: bool) -> tuple[Config, ...]:
    """The configurations that HYWIA_AUTOTUNE=1 measures, without repetitions."""
    shipped = (DEFAULTS[form, wide, 0], DEFAULTS[form, wide, 1], LONG, PORTABLE)
    return tuple(dict.fromkeys((*shipped, *ALTERNATIVES[form, wide])))


def _bucket(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def key(device: str, form: str, dtype: str, axis: int, lines: int, reduce: int, tokens: int, samples: int) -> str:
    """The key of a tuned configuration in the file; sizes are rounded up to powers of two."""
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
        configs = {name: Config(**entry) for name, entry in content["configs"].items()}
        bad = [name for name, config in configs.items() if not config.valid()]
        if bad:
            raise ValueError(f"impossible configuration under {bad[0]!r}")
        return configs
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
