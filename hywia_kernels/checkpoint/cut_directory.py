"""The directory of a cut model, written as its parameters come, none of which has to be in memory with another."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import HywiaError
from ..types import Plan
from . import saving
from .stored_model import StoredModel
from .stored_parameters import Bundle, merged
from .verify import check_config
from .weight_writer import WeightWriter

__all__ = ["CutDirectory"]

_CONFIG = "config.partial"  # directory in which config files wait for the weights


class CutDirectory:
    """What `save` would write of a cut model, in the same bytes.

    Args:
        stored: the model before the cut. cut: the same after it, its parameters on the meta device.
        renamed: name of a parameter before the cut -> after it; None: it goes with its layer.
        folder: an empty directory, or one that was kept. bundles: of the model before the cut.
        written: tensors that its files hold; None: there are none.

    Attributes:
        described: the cut model as its config says it, on the meta device. bundles: what is to be written together.

    Raises:
        HywiaError: no config describes the cut model, or its parameters have no place in the family's files.
    """

    def __init__(
        self,
        stored: StoredModel,
        cut: Any,
        renamed: Callable[[str], str | None],
        folder: Path,
        bundles: Sequence[Bundle],
        written: Sequence[str] | None = None,
    ) -> None:
        from transformers.modeling_utils import remove_tied_weights_from_state_dict

        self._source, self._cut, self._renamed, self._folder = stored, cut, renamed, folder
        self.described, self._not_stock = saving.described(cut)
        self._state = self.described.state_dict(keep_vars=True)
        for name in getattr(self.described, "_keys_to_ignore_on_save", None) or ():
            self._state.pop(name, None)
        kept = remove_tied_weights_from_state_dict(dict(self._state), self.described)
        named = {id(tensor): name for name, tensor in kept.items()}
        self._names = {name: named[id(tensor)] for name, tensor in self._state.items() if id(tensor) in named}
        files = self._converted(kept)
        self.bundles = self._together(bundles, files)
        self._writer = WeightWriter(
            folder,
            files,
            parameters=self.described.num_parameters(),
            max_shard_size=saving.shard_size(cut),
            written=written,
        )
        for name, values in self._converted({n: t for n, t in kept.items() if not t.is_meta}).items():
            self._writer.put(name, values)  # buffers

    def _converted(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Names and values of the files, whose form may be another than the modules' (experts one by one)."""
        from transformers.core_model_loading import revert_weight_conversion

        return revert_weight_conversion(self.described, dict(state)) if state else {}

    def _together(self, bundles: Sequence[Bundle], files: Mapping[str, Tensor]) -> list[Bundle]:
        """The bundles, of which those of a layer are one where the files' form takes more parameters together."""
        buffers = set(self._converted({n: t for n, t in self._state.items() if not t.is_meta}))
        for candidates in (list(bundles), _by_prefix(bundles), [merged(bundles)]):
            found = set(buffers)
            for bundle in candidates:
                names = [self._new_name(n) for n in bundle.targets]
                found |= self._converted({n: self._state[n] for n in names if n is not None}).keys()
            if found == files.keys():
                return candidates
        raise HywiaError(
            f"save: the files of a {self.described.config.model_type} model hold its parameters in a form that cannot "
            "be written in parts; prune it in memory"
        )

    def _new_name(self, name: str) -> str | None:
        """The name under which the state holds a parameter after the cut; None where it goes, or is a buffer."""
        first = self._source.names.get(name)
        after = None if first is None else self._renamed(first)
        return None if after is None else self._names.get(after)

    @property
    def written(self) -> list[str]:
        """The tensors that its files hold."""
        return self._writer.written

    def write(self, values: Mapping[str, Tensor]) -> None:
        """Write all that stays of a bundle.

        Args:
            values: name of each of its parameters before the cut -> values after it.
        """
        named = {self._new_name(name): value for name, value in values.items()}
        for name, value in self._converted({n: v for n, v in named.items() if n is not None}).items():
            self._writer.put(name, value)

    def finish(self, plan: Plan, record: Mapping[str, Any] | None, name: str) -> None:
        """Write what is beside the weights, the config last: until then the directory does not load.

        Args:
            plan, record: as `save` takes them. name: that the directory will have.

        Raises:
            HywiaError: a parameter was not written, or the config does not build the model.
        """
        self._writer.finish()
        content = saving.record_of(self._cut, plan, record, self._not_stock)
        saving.write_companions(self._cut, self._source.tokenizer, self.described, content, self._folder, name)
        aside = self._folder / _CONFIG
        shutil.rmtree(aside, ignore_errors=True)  # of a run that was stopped
        # By itself, since transformers deletes weights that it did not write.
        saving.write_model(self.described, aside, {}, None)
        for file in sorted(aside.iterdir(), key=lambda file: file.name == "config.json"):
            os.replace(file, self._folder / file.name)
        shutil.rmtree(aside)
        check_config(self.described, self._state, set(self._names.values()), self._folder)


def _by_prefix(bundles: Sequence[Bundle]) -> list[Bundle]:
    """Bundles with a decoder layer's parameters together, and all others each alone."""
    layers: dict[str, list[Bundle]] = {}
    for i, bundle in enumerate(bundles):
        layers.setdefault(_layer(bundle) or str(i), []).append(bundle)
    return [merged(together) for together in layers.values()]


def _layer(bundle: Bundle) -> str | None:
    """The beginning of a name up to its first number, that of a layer."""
    parts = next(iter(bundle.targets)).split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return None if at is None else ".".join(parts[: at + 1])
