"""How a model is made smaller, as one object that holds every default once.

The command line, the benchmarks and Python all hand a `Recipe` to `compression.compress`, so the same request keeps the
same units whoever makes it.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import settings
from .deploy import device_profiles, serving_rules
from .errors import HywiaError, UsageError
from .method.recovery.request import Recovery
from .types.record import parsed

__all__ = ["Recipe"]

_REFIT_SAMPLES = settings.ByDevice(cpu=128, gpu=1024)  # some two passes over them: minutes on two cores
_TUPLES = ("layers", "units", "serve")


@dataclass(frozen=True)
class Recipe:
    """One request. Frozen, comparable, and the same in JSON.

    `None` means that the value follows from the rest of the recipe or from the device; `resolved` fills it in, and
    what a run records is always the resolved recipe.

    Attributes:
        ratio: share of all parameters to remove, in (0, 1); every layer keeps the same width.
        group_ratio: instead of `ratio`, the papers' protocol: this share of the layers' units, or kind -> share.
        layers: half-open range of layers for `group_ratio`; None: all.
        units: kinds that may go, of "mlp", "attention", "experts" and whole "layers"; ignored where `group_ratio` names
            them.
        layout: "uniform" (layers alike) or "adaptive" (channels shared out among layers). None: adaptive for
            `group_ratio` under criterion "hywia", uniform otherwise.
        search: how the shares of kinds and of layers are found, where the request leaves them open: by the scores'
            estimates ("none"), or by trying some plans ("fast", "thorough"; see `method.search`). None: fast for
            `ratio` under criterion "hywia", where several kinds may go or the layout is adaptive, else none.
        align: channel widths are multiples of it; None: what the target likes.
        target: name of a device's profile, its file, or "auto" for the device at hand.
        serve: servers whose rules the widths keep to. tensor_parallel: GPUs that will share the model.
        calibration: `.txt` or `.jsonl` file or dataset, as `calibration` takes it; None: the model writes the text.
        samples: to be scored. seq_len: tokens of each. seed: of the choice or the writing of text.
        bos: whether each sample begins with the beginning-of-text token; None: where the tokenizer puts it itself.
        text_field: of a file's objects or a data set's rows; it holds the text.
        criterion: "hywia", "magnitude" or "random".
        fusion: how fine and coarse are blended, of "fine", "attention", "coarse", "mean", "product"; or "learned":
            attention's scores tuned by `steps` steps of masks against the dense model's predictions.
        order: Taylor order of both grains, "first", "second" or "mixed". steps: of fusion "learned".
        head_ranking: heads by what the layer's other heads leave of them ("residual") or by the "scores". None:
            residual where the criterion is "hywia" and a reconstruction follows.
        reconstruct: solve the surviving output columns by least squares; None: with criterion "hywia".
        reconstruct_samples: of the same text; None: 128 on a CPU and 1,024 on a GPU, or what the text holds of them.
        ridge: of the least squares.
        layer_passes: over the reconstruction's text, in which each layer's weights are then trained to send on what the
            dense layer does; 0: they are not. None: 0 on a CPU, 8 on a GPU, and 1 there for more than a billion
            parameters.
        recover: train the cut model towards the dense one's predictions: a `Recovery`, or its sources of text ("self":
            the dense model writes it); None: no recovery.
    """

    ratio: float | None = None
    group_ratio: float | Mapping[str, float] | None = None
    layers: tuple[int, int] | None = None
    units: tuple[str, ...] = settings.DEFAULT_KINDS
    layout: str | None = None
    search: str | None = None
    align: int | None = None
    target: str = "auto"
    serve: tuple[str, ...] = serving_rules.DEFAULT
    tensor_parallel: int = 1
    calibration: str | None = None
    samples: int = settings.SAMPLES
    seq_len: int = settings.SEQ_LEN
    seed: int = 0
    bos: bool | None = None
    text_field: str = "text"
    criterion: str = "hywia"
    fusion: str = settings.FUSION
    order: str = "second"
    steps: int = settings.STEPS
    head_ranking: str | None = None
    reconstruct: bool | None = None
    reconstruct_samples: int | None = None
    ridge: float = settings.RIDGE
    layer_passes: int | None = None
    recover: Recovery | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "recover", Recovery.of(self.recover))
        for name in _TUPLES:
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))

    def check(self, *, scoring_only: bool = False) -> None:
        """Refuse what no model could meet, before one is loaded.

        Args:
            scoring_only: the recipe is of `hywia score`, which cuts nothing.

        Raises:
            UsageError: names the field, what was expected and what came.
        """
        for name, least in (("samples", 1), ("seq_len", 2), ("steps", 1), ("tensor_parallel", 1)):
            _whole(name, getattr(self, name), least)
        for name in ("align", "reconstruct_samples"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), 1)
        _whole("seed", self.seed, 0)
        if self.layer_passes is not None:
            _whole("layer_passes", self.layer_passes, 0)
        if not (_number(self.ridge) and self.ridge > 0 and math.isfinite(self.ridge)):
            raise UsageError(f"ridge: expected a positive number, got {self.ridge!r}")
        _one_of("criterion", self.criterion, settings.CRITERIA)
        _one_of("fusion", self.fusion, (*settings.FUSIONS, settings.LEARNED))
        _one_of("order", self.order, settings.ORDERS)
        if self.layout is not None:
            _one_of("layout", self.layout, settings.LAYOUTS)
        if self.head_ranking is not None:
            _one_of("head_ranking", self.head_ranking, settings.HEAD_RANKINGS)
        if self.search is not None:
            _one_of("search", self.search, settings.SEARCHES)
        if self.criterion != "hywia":
            for name, value in (
                ("layout", "adaptive"),
                ("head_ranking", "residual"),
                ("fusion", settings.LEARNED),
                *(("search", effort) for effort in settings.SEARCHES if effort != "none"),
            ):
                if getattr(self, name) == value:
                    raise UsageError(
                        f"{name}: {value} goes with criterion 'hywia', got criterion {self.criterion!r}; leave it out"
                    )
        if scoring_only:
            return
        if self.recover is not None:
            self.recover.check()
        self._check_cut()

    def _check_cut(self) -> None:
        if (self.ratio is None) == (self.group_ratio is None):
            raise UsageError(
                f"ratio: expected exactly one of ratio and group_ratio, got {self.ratio} and {self.group_ratio}"
            )
        shares: dict[str, Any] = {"ratio": self.ratio} if self.ratio is not None else {"group_ratio": self.group_ratio}
        if isinstance(self.group_ratio, Mapping):
            if not self.group_ratio:
                raise UsageError("group_ratio: expected kinds and their shares, got none")
            shares = dict(self.group_ratio)
        for name, share in shares.items():
            if not (_number(share) and 0.0 < share < 1.0):
                option, of = (name, "") if name in ("ratio", "group_ratio") else ("group_ratio", f" for {name}")
                raise UsageError(f"{option}: expected a number between 0 and 1, both excluded, got {share!r}{of}")
        name = "group_ratio" if isinstance(self.group_ratio, Mapping) else "units"
        for kind in self.kinds:
            _one_of(name, kind, settings.KINDS, "some")
        if not self.kinds:
            raise UsageError(f"units: expected some of {', '.join(settings.KINDS)}, got none")
        if set(self.kinds) == {"layers"} and self.fusion == settings.LEARNED:
            raise UsageError(
                f"fusion: {settings.LEARNED} goes with units inside layers, got layers alone; "
                "leave it out, or let other kinds of units go as well"
            )
        if self.layers is not None:
            if self.group_ratio is None:
                raise UsageError("layers: goes with group_ratio; ratio prunes every layer to the same width")
            if len(self.layers) != 2 or not 0 <= self.layers[0] < self.layers[1]:
                raise UsageError(f"layers: expected (first, end) with 0 <= first < end, got {self.layers}")
        device_profiles.resolve(self.target)
        serving_rules.constraints(self.serve, self.tensor_parallel)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of units that may go."""
        return tuple(self.group_ratio) if isinstance(self.group_ratio, Mapping) else tuple(self.units)

    def plan_request(self) -> dict[str, Any]:
        """What of the recipe `planning.plan_for` takes."""
        names = ("target", "serve", "tensor_parallel", "ratio", "group_ratio", "layers", "units", "align", "layout")
        return {name: getattr(self, name) for name in names}

    def text_samples(self) -> int:
        """How many samples of text the resolved recipe reads at the most."""
        # What `hywia score` keeps is to be enough for the usual search, which it is not asked about.
        scoring_only = self.ratio is None and self.group_ratio is None
        effort = "fast" if scoring_only and self.criterion == "hywia" else self.search or "none"
        scored = max(self.scored_samples(), self.layer_samples())
        wanted = [scored + settings.JUDGED_SAMPLES[effort] if self.criterion == "hywia" else 0]
        if self.reconstruct:
            wanted.append(self.reconstruct_samples or 0)
        if self.fusion == settings.LEARNED:
            wanted.append(self.learning_samples())
        return max(wanted)

    def scored_samples(self) -> int:
        """How many samples units are scored on: none where the criterion needs no text, or layers alone may go."""
        return self.samples if self.criterion == "hywia" and set(self.kinds) != {"layers"} else 0

    def layer_samples(self) -> int:
        """How many samples whole layers are scored on."""
        return self.samples if self.criterion == "hywia" and "layers" in self.kinds else 0

    def learning_samples(self) -> int:
        """How many samples mask learning can read."""
        return self.steps * settings.LEARNING_BATCH

    def resolved(self, device: str = "cpu", parameters: int = 0) -> Recipe:
        """The recipe with nothing left open.

        Args:
            device: type of the model's device, "cpu" or "cuda": how many samples are reconstructed on goes by it,
                never by a clock, so that a run repeats.
            parameters: of the model.
        """
        reconstruct = self.criterion == "hywia" if self.reconstruct is None else self.reconstruct
        layout, ranking = self.layout, self.head_ranking
        if layout is None:
            layout = "adaptive" if self.group_ratio is not None and self.criterion == "hywia" else "uniform"
        if ranking is None:
            ranking = "residual" if reconstruct and self.criterion == "hywia" else "scores"
        search = self.search
        if search is None:
            search = "fast" if self.ratio is not None and self._open(layout) and self.criterion == "hywia" else "none"
        usual = _REFIT_SAMPLES.on(device)
        passes = self.layer_passes
        if passes is None:
            passes = settings.LAYER_PASSES.on(device, parameters)
        return dataclasses.replace(
            self,
            layout=layout,
            search=search,
            head_ranking=ranking,
            reconstruct=reconstruct,
            reconstruct_samples=(self.reconstruct_samples or usual) if reconstruct else None,
            layer_passes=passes if reconstruct else None,
        )

    def _open(self, layout: str | None) -> bool:
        """Whether the request leaves a share open that could be searched for."""
        return layout == "adaptive" or (self.ratio is not None and len(self.kinds) > 1)

    def unused(self, names: Iterable[str]) -> dict[str, str]:
        """Of the fields somebody set, those without effect in this recipe: name -> what they go with."""
        reasons: dict[str, str] = {}
        if self.criterion != "hywia":
            reasons |= dict.fromkeys(("fusion", "order", "steps"), "--criterion hywia")
            if not self.reconstruct:
                reasons["calibration"] = "--criterion hywia, or --reconstruct"
        if self.fusion != settings.LEARNED:
            reasons.setdefault("steps", "--fusion learned")
        if self.reconstruct is False or (self.reconstruct is None and self.criterion != "hywia"):
            reasons |= dict.fromkeys(("ridge", "reconstruct_samples", "layer_passes"), "--reconstruct")
        if isinstance(self.group_ratio, Mapping):
            reasons["units"] = "a --group-ratio that does not name the kinds already"
        if self.search != "none" and not self._open(self.resolved().layout):
            reasons["search"] = "--layout adaptive, or with --ratio and several kinds in --units"
        return {name: reasons[name] for name in names if name in reasons}

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        values = dataclasses.asdict(self)
        for name in _TUPLES:
            if values[name] is not None:
                values[name] = list(values[name])
        values["recover"] = self.recover.to_dict() if self.recover is not None else None
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """What `to_dict` gave.

        Raises:
            UsageError: an unknown field, or a value of another type than the field's.
        """
        if not isinstance(values, Mapping):
            raise UsageError(f"recipe: expected an object of settings, got {type(values).__name__}")
        known = {f.name: f for f in dataclasses.fields(cls)}
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, 1)
                raise UsageError(f"recipe: unknown setting {name!r}{f'; did you mean {near[0]!r}?' if near else ''}")
        for name in ("criterion", "fusion", "order", "target", "text_field"):
            if name in values and not isinstance(values[name], str):
                raise UsageError(f"recipe: {name}: expected a string, got {values[name]!r}")
        for name in ("layout", "search", "head_ranking", "calibration"):
            if not isinstance(values.get(name), (str, type(None))):
                raise UsageError(f"recipe: {name}: expected a string or null, got {values[name]!r}")
        for name in ("bos", "reconstruct"):
            if not isinstance(values.get(name), (bool, type(None))):
                raise UsageError(f"recipe: {name}: expected true, false or null, got {values[name]!r}")
        for name in _TUPLES:
            if not isinstance(values.get(name, ()), (list, tuple, type(None))):
                raise UsageError(f"recipe: {name}: expected a list, got {values[name]!r}")
        if values.get("layers") is not None:
            for bound in values["layers"]:
                _whole("recipe: layers", bound, 0)
        return cls(**values)

    def write(self, path: str | Path) -> None:
        """As a JSON file that `read` and `hywia prune --recipe` take.

        Raises:
            HywiaError: it cannot be written.
        """
        try:
            Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise HywiaError(f"recipe: cannot write {path}: {error.strerror or error}") from error

    @classmethod
    def read(cls, path: str | Path) -> Recipe:
        """From a file `write` wrote, or from the `hywia.json` of a pruned model.

        Raises:
            HywiaError: it cannot be read. UsageError: it holds no recipe.
        """
        try:
            values = parsed(Path(path).read_bytes(), f"recipe: {path}")
        except OSError as error:
            raise HywiaError(f"recipe: cannot read {path}: {error.strerror or error}") from error
        if "versions" in values:  # the record of a pruned model
            if "recipe" not in values:
                raise UsageError(f"recipe: {path} is the record of a run that kept no recipe")
            values = values["recipe"]
            if isinstance(values, Mapping):  # a run of a version that had no search repeats without one
                values = {"search": "none", **values}
        return cls.from_dict(values)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        kind = "" if isinstance(value, int) and not isinstance(value, bool) else "a whole number of "
        raise UsageError(f"{name}: expected {kind}at least {least}, got {value!r}")


def _one_of(name: str, value: Any, choices: tuple[str, ...], how_many: str = "one") -> None:
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"{name}: expected {how_many} of {', '.join(choices)}, got {value!r}{hint}")
