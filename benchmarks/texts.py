"""Texts as perplexity reads them, in blocks of one or several lengths; and those of the papers, WikiText-2's raw test
split and Penn Treebank's validation split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

import hywia_kernels as hk
from hywia_kernels.evaluation import blocks
from hywia_kernels.method.tokens import positions

BLOCKS = (128, 2048)
# Data set, config, revision, split, column. Penn Treebank's is a script, of which the hub keeps a copy as tables.
HUB: dict[str, tuple[str, str | None, str | None, str, str]] = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", None, "test", "text"),
    "ptb": ("ptb-text-only/ptb_text_only", None, "refs/convert/parquet", "validation", "sentence"),
}


def read(files: Sequence[Path] | None) -> dict[str, str]:
    """Name -> text: files by their names, or those of the hub, whose rows are joined as the papers join them.

    Raises:
        SystemExit: a text that cannot be had.
    """
    if files:
        try:
            return {path.name: path.read_text(encoding="utf-8") for path in files}
        except (OSError, UnicodeDecodeError) as error:
            raise SystemExit(f"--text: {error}") from None
    return {name: _of_hub(name, *source) for name, source in HUB.items()}


def _of_hub(name: str, data: str, config: str | None, revision: str | None, split: str, column: str) -> str:
    try:
        import datasets
    except ImportError:
        raise SystemExit("--text: the papers' texts need: pip install 'hywia_kernels[hub]'; or give files") from None
    try:
        rows = datasets.load_dataset(data, config, revision=revision, split=split)[column]
    except Exception as error:  # of many kinds, by what fails
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SystemExit(f"--text: cannot fetch {name} ({data}): {reason}; give two files instead") from error
    return "\n\n".join(rows)


def cut(tokenizer: Any, text: str, lengths: Sequence[int], most: int | None = None) -> dict[int, Tensor]:
    """Tokens of a block -> the text's blocks, int64 `[blocks, length]`, by the papers' protocol: the whole text is
    tokenised and cut, without a beginning-of-text token before each block.

    Args:
        most: blocks of the first length; of the others as many as hold these blocks' tokens, at least one. None: all.

    Raises:
        UsageError, HywiaError: as `blocks`; the text must hold a block of every length.
    """
    found = {}
    for length in lengths:
        count = None if most is None else max(1, most * lengths[0] // length)
        found[length] = blocks(tokenizer, text, length, count, bos=False)
    return found


def perplexities(model: Any, cuts: Mapping[int, Tensor], batch: int) -> dict[int, float]:
    """Tokens of a block -> perplexity of the blocks that `cut` gives; lengths beyond the model's positions are left
    out.

    Args:
        batch: blocks of the first length at a time; of the others as many as hold these blocks' tokens.
    """
    limit, first = positions(model), next(iter(cuts))
    return {
        length: hk.perplexity(model, tokens, batch=max(1, batch * first // length))
        for length, tokens in cuts.items()
        if limit is None or length <= limit
    }
