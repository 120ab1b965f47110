"""How one call of the Triton `linear_importance` falls into tiles, steps and launches, from its shape alone."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass

import triton

from .linear_configs import Config

# Tensor cores truncate what they add: an accumulator loses up to 2^-23 of itself a step of 16 tokens, always towards
# zero. On an H100 a fine sum is 1.2e-6 low after 1280 tokens, 4e-6 after 4096 and 1.7e-5 after 16384 (second order:
# twice that), so after this many tokens an accumulator is added to another one by ordinary, rounding additions.
_LONGEST_ACCUMULATION = 2048
_WORKSPACE = 48 << 20  # bytes of partial sums, or those of one wave of tiles
_WAVE = 132 * 128  # lines in the tiles of one wave; a constant, so that the cut depends on the shape alone
_FEW_TILES = 132  # with fewer tiles than this they are made smaller


@dataclass(frozen=True)
class Cut:
    """How one call falls into tiles, launches and rows of partial sums."""

    config: Config
    form: str
    fine_rows: int
    rows: int
    u_blocks: int
    r_blocks: int
    tiles_per_launch: int
    length: int  # tokens per sample; of the longest when ragged
    ragged: bool
    steps: int
    segment: int

    @property
    def tiles(self) -> int:
        return self.u_blocks * self.r_blocks

    @property
    def workspace(self) -> int:
        """Bytes."""
        return min(self.tiles, self.tiles_per_launch) * self.rows * self.config.block_u * 4


def form_of(order: str, per_sample: bool, tokens: int) -> str:
    """Which running sums a call needs: one of `linear_configs.FORMS`, explained at its DEFAULTS."""
    if order == "first":
        return "sum" if per_sample or tokens > _LONGEST_ACCUMULATION else "total"
    return "square" if order == "second" else "both"


def _fit(config: Config, lines: int, reduce: int, length: int, divide: bool) -> Config:
    """The configuration with tiles no larger than the matrix, and smaller where too few would leave a GPU idle."""
    block_u = min(config.block_u, max(16, triton.next_power_of_2(lines)))
    block_r = min(config.block_r, max(16, triton.next_power_of_2(reduce)))
    while triton.cdiv(lines, block_u) * triton.cdiv(reduce, block_r) < _FEW_TILES and max(block_u, block_r) > 64:
        if block_r >= block_u:
            block_r //= 2
        else:
            block_u //= 2
    block_k = min(config.block_k, max(16, triton.next_power_of_2(length)))
    divisor = length & -length
    if divide and 16 <= divisor < block_k:
        block_k = divisor  # whole steps: no token is read in vain, and descriptors can read them
    share = config.warps * block_u * block_r // (config.block_u * config.block_r)
    warps = min(config.warps, max(4, share))
    return dataclasses.replace(config, block_u=block_u, block_r=block_r, block_k=block_k, warps=warps)


def _lengths(offsets: list[int], form: str, per_sample: bool) -> list[int]:
    """Tokens of each sample. Where samples are not told apart, all tokens count as one sample; in form "sum" as pieces
    of this length, the last one shorter, whose sums are rounded before they are added."""
    if per_sample:
        return [end - begin for begin, end in itertools.pairwise(offsets)]
    return [min(offsets[-1], _LONGEST_ACCUMULATION // 2) if form == "sum" else offsets[-1]]


def longest(offsets: list[int], form: str, per_sample: bool) -> int:
    """Tokens of the longest sample, or of a piece where samples are not told apart."""
    return max(_lengths(offsets, form, per_sample))


def cut(
    config: Config,
    lines: int,
    reduce: int,
    offsets: list[int],
    order: str,
    per_sample: bool,
    descriptors: bool = False,
) -> Cut:
    """The cut of a call, which depends on its shape and the configuration alone.

    Args:
        config: the configuration to fit.
        lines: size of the weight along the units.
        reduce: size of the weight along the other axis.
        descriptors: all operands can be read through tensor descriptors.
    """
    tokens, samples = offsets[-1], len(offsets) - 1
    form = form_of(order, per_sample, tokens)
    lengths = _lengths(offsets, form, per_sample)
    length = max(lengths)
    ragged = per_sample and min(lengths) < length
    segment = _LONGEST_ACCUMULATION // 2 if form != "total" and length > _LONGEST_ACCUMULATION else 0
    if segment:  # room for a fourth accumulator
        config = dataclasses.replace(config, block_r=min(config.block_r, 64))
    if form == "total" and not descriptors:  # the weight's tile passes through registers and a buffer
        config = dataclasses.replace(config, block_u=min(config.block_u, 128), block_r=min(config.block_r, 128))
    config = _fit(config, lines, reduce, length, divide=per_sample and not ragged)
    block_k = config.block_k
    steps = sum(triton.cdiv(n, block_k) for n in lengths) if per_sample else triton.cdiv(tokens, block_k)
    fine_rows = 3 if order == "all" else 1
    rows = fine_rows + (samples if per_sample else 1)
    wave = triton.cdiv(_WAVE, config.block_u)
    tiles_per_launch = max(1, _WORKSPACE // (rows * config.block_u * 4 * wave)) * wave
    return Cut(
        config,
        form,
        fine_rows,
        rows,
        triton.cdiv(lines, config.block_u),
        triton.cdiv(reduce, config.block_r),
        tiles_per_launch,
        length,
        ragged,
        steps,
        segment // block_k,
    )
