"""Checkpoints whose layers differ in width, which no stock config can describe.

`register` makes the auto classes of transformers know them, without importing transformers: the package's import must
stay cheap. `adapted` gives a model the class and config that describe it. The classes themselves are in
`configuration_hywia_adaptive` and `modeling_hywia_adaptive`, which every adaptive checkpoint carries.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import HywiaError
from ..ties import set_ties

__all__ = ["MODEL_TYPE", "adapted", "register"]

MODEL_TYPE = "hywia_adaptive"  # of a directory whose layers differ in width


def _register_config() -> None:
    from transformers import AutoConfig

    from .configuration_hywia_adaptive import HywiaAdaptiveConfig

    AutoConfig.register(MODEL_TYPE, HywiaAdaptiveConfig, exist_ok=True)


def _register_model() -> None:
    from transformers import AutoModelForCausalLM

    from .configuration_hywia_adaptive import HywiaAdaptiveConfig
    from .modeling_hywia_adaptive import HywiaAdaptiveForCausalLM

    AutoModelForCausalLM.register(HywiaAdaptiveConfig, HywiaAdaptiveForCausalLM, exist_ok=True)


# Module of transformers -> what to do as soon as it has been imported.
_AFTER = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_model,
}


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds nothing itself: lets the other finders find a module of `_AFTER`, and adds a step after its execution."""

    def find_spec(self, name, path, target=None):
        step = _AFTER.get(name)
        if step is None or getattr(self, "_busy", False):
            return None
        self._busy = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._busy = False
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module) -> None:
            execute(module)
            step()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]  # this spec's own loader
        return spec


def register() -> None:
    """Make `AutoConfig` and `AutoModelForCausalLM` load adaptive checkpoints, now or when transformers is imported."""
    missing = [name for name in _AFTER if name not in sys.modules]
    for name in _AFTER:
        if name not in missing:
            _AFTER[name]()
    if missing and not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def adapted(model: Any, widths: Mapping[str, Sequence[int]]) -> Any:
    """The same tensors in a model of the adaptive class: loading them proves that its config describes them.

    Args:
        model: whose layers differ in width.
        widths: config field -> width in each layer, for people who read the config.

    Raises:
        HywiaError: the config cannot describe the model.
    """
    import torch

    from .configuration_hywia_adaptive import base_config, config_class
    from .modeling_hywia_adaptive import describe_changes, model_class

    try:
        values = base_config(model.config).to_dict()
        base = values.pop("model_type")
        config = config_class(base).from_dict(
            {
                **values,
                "base_model_type": base,
                "layer_widths": {field: list(w) for field, w in widths.items()},
                "module_changes": describe_changes(model),
            }
        )
        set_ties(config, model)
        with torch.device("meta"):
            twin = model_class(base)(config)
        twin.load_state_dict(model.state_dict(), assign=True)
    except (ValueError, RuntimeError) as error:
        raise HywiaError(f"save: the layers' widths cannot be written into a config: {error}") from error
    twin.tie_weights()
    return twin
