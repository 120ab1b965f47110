"""The two texts of the papers' perplexities: WikiText-2's raw test split and Penn Treebank's validation split."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

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


def perplexities(model: Any, tokenizer: Any, text: str, batch: int, most: int | None) -> dict[int, float]:
    """Tokens of a block -> perplexity, by the papers' protocol: the whole text is tokenised and cut, without a
    beginning-of-text token before each block. Blocks longer than the model's positions are left out.

    Args:
        batch: blocks of 128 tokens at a time, fewer of longer ones. most: blocks of each length; None: all.
    """
    limit = positions(model)
    found = {}
    for block in BLOCKS:
        if limit is None or block <= limit:
            tokens = blocks(tokenizer, text, block, most, bos=False)
            found[block] = hk.perplexity(model, tokens, batch=max(1, batch * BLOCKS[0] // block))
    return found
