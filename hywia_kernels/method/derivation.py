"""Entries for models that the table of architectures lacks: derived from structure, and proven before they are used.

Hypotheses are tried part by part on a small random copy of the model's config, and what holds there is taken; what does
not is left alone, and said. The entry that comes of it then has to prove itself as a whole, on the copy and on the
model at hand, or the model is refused.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from .. import arch
from ..arch import derive, narrow
from ..arch.assembly import assembled
from ..engine import loss
from ..errors import HywiaError
from ..progress import Bar
from . import loss_steps, proof
from .trials import ERRORS

__all__ = ["Proof", "derived", "prove", "proven"]

_RECORD = "_hywia_proof"  # attribute of a model: the proof of the entry that it was given


@dataclass(frozen=True)
class Proof:
    """What was derived of a model, and what was seen of it.

    Attributes:
        entry: the description of the model's units.
        kinds: kinds of units that can go.
        alone: module of a decoder layer -> why it is left alone.
        checks: what was checked, in words, in this order.
        seconds: that it took.
        parts: what was derived, in words, by part.
    """

    entry: arch.Architecture
    kinds: tuple[str, ...]
    alone: dict[str, str]
    checks: tuple[str, ...] = ()
    seconds: float = 0.0
    parts: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            "model_type": self.entry.model_types[0],
            "layers": self.entry.layers,
            "kinds": list(self.kinds),
            "parts": self.parts,
            "left_alone": self.alone,
            "checks": list(self.checks),
            "seconds": self.seconds,
        }


def _holds(model: Any, entry: arch.Architecture, real: Any, thorough: bool) -> str | None:
    """Why an entry does not describe the copy, or has no place in the model itself; None where it holds."""
    arch.adopt(model, entry)
    before = real.__dict__.get("_hywia_entry")
    try:
        groups = arch.groups(model)
        if not groups:
            return "no unit was found"
        if all(g.units == g.min_units for g in groups):
            return f"each layer has {groups[0].units} {groups[0].unit.replace('_', ' ')}, of which none can go"
        arch.adopt(real, entry)
        arch.groups(real)
        proof.check_cut(model)
        if thorough:
            loss_steps.check_steps(model)
    except (HywiaError, *ERRORS) as error:
        return str(error).removeprefix("proof: ").partition("; the structure that was derived")[0]
    finally:
        arch.adopt(model, None)
        arch.adopt(real, before)
    return None


def _own_config(model: Any) -> Any:
    """The config as the family's own, where the model's layers were made to differ."""
    if not hasattr(model.config, "base_model_type"):
        return model.config
    from ..checkpoint.adaptive.configuration_hywia_adaptive import base_config

    return base_config(model.config)


def _copy_of(model: Any) -> Any:
    small = narrow.narrow(_own_config(model))
    if small is None:
        raise HywiaError(
            f"model: {model.config.model_type} is not in the table of architectures, and no small copy of its config "
            "could be made to derive an entry from; CONTRIBUTING.md says how to add one by hand"
        )
    return small


def derived(model: Any, small: Any = None, *, thorough: bool = False, together: bool = False) -> tuple[Proof, Any]:
    """`(what was derived of a model, the small copy that it was derived on)`; nothing is proven of the whole yet.

    Args:
        model: of any type, with or without weights. small: a copy at hand.
        thorough: ask of each part that its statistics hold too, and not only of the whole.
        together: take it that no layer runs by itself (`Architecture.together`).

    Raises:
        HywiaError: no copy can be made, it is no causal language model, or none of its parts is understood.
    """
    small = _copy_of(model) if small is None else small
    proof.check_causal(small)
    found = derive.hypotheses(small)
    if found is None:
        raise HywiaError(f"model: expected a list of decoder layers in a {model.config.model_type} model, found none")
    alone: dict[str, str] = {}

    def first(**alternatives: Sequence[Any]) -> Any:
        return _first(small, model, found.layers, alone, thorough, together, **alternatives)

    attention = first(attentions=found.attentions)
    experts = first(experts=found.experts)
    mlps = [first(mlps=alternatives) for alternatives in found.mlps]
    kept = tuple(m for m in mlps if m is not None)
    entry = replace(assembled(small, found.layers, attention, kept, experts), together=together)
    if attention is None and not kept and experts is None:
        why = "; ".join(f"{name}: {reason}" for name, reason in alone.items()) or "no part looks like one that is known"
        raise HywiaError(
            f"model: {model.config.model_type} is not in the table of architectures, and nothing of its structure "
            f"could be derived ({why}); CONTRIBUTING.md says how to describe it by hand"
        )
    arch.adopt(small, entry)
    try:
        entry = replace(entry, logits=loss.stated_changes(small))
    except ERRORS as error:
        raise HywiaError(
            f"model: what a {model.config.model_type} model makes of its final hidden states could not be run apart "
            f"({error}); CONTRIBUTING.md says how to describe it by hand"
        ) from error
    arch.adopt(small, entry)
    groups = arch.groups(small)
    alone |= dict.fromkeys(_undescribed(small, entry, alone), "it stays as it is")
    kinds = tuple(k for k in ("mlp", "attention", "experts") if any(g.kind == k for g in groups))
    return Proof(entry, kinds, alone, parts=_parts(entry)), small


def _first(
    small: Any,
    real: Any,
    layers: str,
    alone: dict[str, str],
    thorough: bool,
    together: bool,
    **alternatives: Sequence[Any],
) -> Any:
    """The first alternative that holds; where none does, its modules are left alone."""
    ((kind, several),) = alternatives.items()
    reason, reasons = None, dict[str, str]()
    for one in several:
        parts: dict[str, Any] = {"attention": None, "mlps": (), "experts": None}
        parts |= {"attentions": {"attention": one}, "mlps": {"mlps": (one,)}, "experts": {"experts": one}}[kind]
        entry = replace(assembled(small, layers, **parts), together=together)
        reason = _holds(small, entry, real, thorough)
        if reason is None:
            return one
        reasons.setdefault(one.columns[0] if kind == "mlps" else one.module, reason)
    alone |= reasons
    return None


def _parts(entry: arch.Architecture) -> dict[str, str]:
    """The entry's parts in words."""
    words = {}
    names = entry.attention
    if names.output:
        fused = " (one after the other)" if not names.interleaved else " (head by head)"
        apart = f"{names.query}, {names.key}, {names.value}"
        words["attention"] = f"{names.query}{fused}" if names.query == names.key else apart
        words["attention"] += f"; {', '.join(names.more)}" if names.more else ""
        words["attention"] += f" -> {names.output}"
    for mlp in (entry.mlp, *entry.branches):
        if mlp.columns:
            words[mlp.columns[0].rpartition(".")[0] or "mlp"] = f"{', '.join(mlp.rows)} -> {mlp.columns[0]}"
    if entry.experts is not None:
        whole = f", router {entry.experts.router}" if entry.experts.router else ", channels only"
        words["experts"] = f"{entry.experts.module}{whole}"
    if entry.together:
        words["layers"] = "run together alone: no reconstruction, no search, heads by their scores"
    return words


def _undescribed(model: Any, entry: arch.Architecture, alone: dict[str, str]) -> list[str]:
    """Modules of layers whose matrices are in no group."""
    described = {(m.module, m.parameter) for g in arch.groups(model) for m in (*g.members, *g.vectors)}
    names: list[str] = []
    for i, layer in enumerate(model.get_submodule(entry.layers)):
        for name, module in layer.named_modules():
            if any(name == a or name.startswith(f"{a}.") for a in alone):
                continue
            full = f"{entry.layers}.{i}.{name}".rstrip(".")
            matrices = [n for n, p in module._parameters.items() if proof.is_matrix(n, p)]
            if any((full, leaf) not in described for leaf in matrices):
                names.append(name)
    return list(dict.fromkeys(names))


def prove_entry(model: Any, small: Any, what: Proof) -> Proof:
    """Check a whole entry on the small copy and, where its weights are here, on the model; gives it to the model.

    Raises:
        HywiaError: it fails; the message names the module and the part, and the model has no entry.
    """
    began = time.monotonic()
    checks: list[str] = []
    steps: list[tuple[str, Any]] = [
        ("every matrix described or left alone", lambda: proof.check_covered(small, tuple(what.alone))),
        ("copy: cut equals masked", lambda: proof.check_cut(small)),
        ("copy: statistics equal finite differences of the loss", lambda: loss_steps.check_steps(small)),
        *(() if what.entry.together else (("copy: refitted, then cut", lambda: proof.check_refit(small)),)),
        ("copy: saved, reloaded, with and without cache", lambda: proof.check_saved(small)),
    ]
    if not any(p.is_meta for p in model.parameters()):
        steps += [
            ("model: cut equals masked", lambda: proof.check_layers(model)),
            ("model: statistics equal the loss's gradients", lambda: loss_steps.check_gradients(model)),
        ]
    arch.adopt(small, what.entry)
    arch.adopt(model, what.entry)
    try:
        with Bar("proving", len(steps)) as bar:
            for name, check in steps:
                try:
                    check()
                except HywiaError:
                    raise
                except ERRORS as error:
                    raise HywiaError(
                        f"proof: {name}: it does not run ({type(error).__name__}: {error}); the structure that was "
                        "derived does not hold for this model, which is refused"
                    ) from error
                checks.append(name)
                bar.step()
    except BaseException:
        arch.adopt(model, None)
        raise
    return Proof(what.entry, what.kinds, what.alone, tuple(checks), round(time.monotonic() - began, 2), what.parts)


def _proven_otherwise(model: Any, small: Any, what: Proof, failure: HywiaError) -> Proof:
    """By the parts that hold by themselves, where one does not which the rest can do without; or else by those that
    hold when no layer has to run by itself.

    Raises:
        HywiaError: why what is left without its wrong parts does not hold, or `failure`, where all parts seemed right.
    """
    for together in (False, True):
        try:
            again, _ = derived(model, small, thorough=True, together=together)
            if again.entry != what.entry:
                return prove_entry(model, small, again)
        except HywiaError as error:
            failure = failure if together else error
    raise failure


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the bars and notices that transformers prints of small models."""
    import transformers

    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def proven(model: Any) -> Proof | None:
    """The proof that a model was given; None where it has none, as one of the table's families."""
    return model.__dict__.get(_RECORD)


def prove(model: Any) -> Proof | None:
    """Derive an entry for a model that the table lacks, and prove it on the model, which then is scored and cut by it.

    Takes seconds: a small random copy of the config is cut, scored, refitted, saved and reloaded; one batch goes
    through the model itself, a layer of which is cut and put back. A model on the meta device is proven on the copy.

    Returns:
        the proof; None for a family of the table, which the tests have proven. A second call gives the first one's.

    Raises:
        HywiaError: nothing can be derived, or what was derived does not hold.
    """
    known = proven(model)
    if known is not None:
        return known
    if arch.is_known(model):
        return None
    began = time.monotonic()
    with _quiet():
        what, small = derived(model)
        try:
            done = prove_entry(model, small, what)
        except HywiaError as failure:
            done = _proven_otherwise(model, small, what, failure)
    done = Proof(done.entry, done.kinds, done.alone, done.checks, round(time.monotonic() - began, 2), done.parts)
    model.__dict__[_RECORD] = done
    return done
