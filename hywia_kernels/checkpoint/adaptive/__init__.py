"""Checkpoints whose layers differ in width, which no stock config can describe.

`register` makes the auto classes of transformers know them, without importing transformers: the package's import must
stay cheap. It runs when the package is imported, and is all that the import adds outside the package. `adapted` gives a
model the class and config that describe it. The classes themselves are in `configuration_hywia_adaptive` and
`modeling_hywia_adaptive`, which every adaptive checkpoint carries.
"""

from __future__ import annotations

import copy
import importlib.abc
import sys
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...errors import HywiaError
from ..ties import set_ties

__all__ = ["MODEL_TYPE", "adapted", "register"]

MODEL_TYPE = "hywia_adaptive"  # of a directory whose layers differ in width


def _register_config() -> None:
    from transformers import AutoConfig

    from .configuration_hywia_adaptive import HywiaAdaptiveConfig

    AutoConfig.register(MODEL_TYPE, HywiaAdaptiveConfig, exist_ok=True)


def _register_model() -> None:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    from . import modeling_hywia_adaptive as modeling
    from .configuration_hywia_adaptive import HywiaAdaptiveConfig

    made = getattr(modeling, "HywiaAdaptiveForCausalLM", None)
    if made is not None:  # otherwise its own import is what imports transformers, and this step follows it again
        for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
            auto.register(HywiaAdaptiveConfig, made, exist_ok=True)


# Module -> what to do as soon as it has been imported.
_AFTER = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_model,
    f"{__name__}.modeling_hywia_adaptive": _register_model,
}


class _Registering(importlib.abc.Loader):
    """A loader that takes a step after another loader has executed a module; everything else is the other's."""

    def __init__(self, loader: Any, step: Callable[[], None]) -> None:
        self._loader, self._step = loader, step

    def create_module(self, spec: Any) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        # The module shows its own loader from the start, as if nothing stood between.
        module.__loader__ = module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        try:
            self._step()
        except Exception as error:  # an import of transformers must not fail over a class of ours
            warnings.warn(
                f"hywia_kernels: transformers will not load checkpoints whose layers differ in width ({error!r})",
                RuntimeWarning,
                stacklevel=2,
            )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds nothing itself: asks the other finders for a module of `_AFTER`, and adds a step after its execution.

    It keeps no state, so that threads may import or look for modules at once.
    """

    def find_spec(self, name, path, target=None):
        step = _AFTER.get(name)
        if step is None:
            return None
        for finder in list(sys.meta_path):
            # By name, as another copy of this module (a reload) has a class of its own.
            find = None if type(finder).__name__ == _AfterImport.__name__ else getattr(finder, "find_spec", None)
            spec = find(name, path, target) if find is not None else None
            if spec is None:
                continue
            if spec.loader is not None and hasattr(spec.loader, "exec_module"):
                spec.loader = _Registering(spec.loader, step)
            return spec
        return None


_LOCK = threading.Lock()


def register() -> None:
    """Make `AutoConfig` and the auto classes of models load adaptive checkpoints, now or when transformers is imported.

    Where transformers has been imported, classes are registered with it. Where it has not, a finder is put in front
    of `sys.meta_path` which waits for the modules of `_AFTER` and has the classes registered after them; it leaves
    other modules alone. Nothing else of the interpreter or of transformers is changed; a second call adds nothing.
    """
    with _LOCK:
        if not any(type(finder).__name__ == _AfterImport.__name__ for finder in sys.meta_path):
            sys.meta_path.insert(0, _AfterImport())
    # After the finder is there, as another thread may begin to import transformers at this moment. Where one is in the
    # middle of it, the steps' own imports wait for it.
    for name, step in _AFTER.items():
        if name in sys.modules:
            step()


def _accepted(model: Any, base_config: Callable[[Any], Any]) -> Any:
    """The family's config of a model; where it refuses the number of heads that all layers have, with the number that
    fills the hidden size, since what the layers have is told beside it."""
    from huggingface_hub.errors import StrictDataclassError

    from ... import arch

    try:
        return base_config(model.config)
    except (ValueError, StrictDataclassError):
        names, config = arch.architecture(model).attention, copy.deepcopy(model.config)
        inner = config.get_text_config()
        heads = inner.hidden_size // arch.head_dim(model)
        if names.kv_heads_field:
            shared = getattr(inner, names.heads_field) // getattr(inner, names.kv_heads_field)
            heads -= heads % shared
            setattr(inner, names.kv_heads_field, heads // shared)
        setattr(inner, names.heads_field, heads)
        return base_config(config)


def adapted(model: Any, widths: Mapping[str, Sequence[int]]) -> Any:
    """A model of the adaptive class with the same tensors: loading them proves that its config describes them.

    Args:
        model: a model whose layers differ in width.
        widths: config field -> width in each layer, for people who read the config.

    Raises:
        HywiaError: the config cannot describe the model.
    """
    import torch

    from .configuration_hywia_adaptive import auto_class, base_config, config_class
    from .modeling_hywia_adaptive import describe_changes, model_class

    try:
        described = _accepted(model, base_config)
        with torch.device("meta"):
            stock = auto_class(type(described)).from_config(described)
        values = described.to_dict()
        base = values.pop("model_type")
        config = config_class(base).from_dict(
            {
                **values,
                "base_model_type": base,
                "layer_widths": {field: list(w) for field, w in widths.items()},
                "module_changes": describe_changes(model, stock),
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
