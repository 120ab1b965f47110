"""`hywia recover`: train a pruned model towards the dense one's predictions."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint import run_record, saving
from ..checkpoint.loading import load
from ..deploy.estimate import estimate
from ..deploy.hardware import threaded_device_name
from ..errors import HywiaError, UsageError
from ..evaluation import Evaluation
from ..method.recovery.job import ask, resolved
from ..method.recovery.request import Recovery
from ..method.recovery.work import beside
from . import arguments as shared
from . import console, session

__all__ = ["finish", "run"]


def run(arguments: argparse.Namespace) -> None:
    """Checks, then the work with the output held."""
    session.begin(arguments)
    record = _record(arguments.model)
    in_place = arguments.output is None
    if in_place:
        if not Path(arguments.model).is_dir():
            raise UsageError(f"output: {arguments.model} is no directory that could be replaced; name one (-o DIR)")
        arguments.output, arguments.overwrite = arguments.model, True
    source = arguments.teacher or run_record.base_of(record)
    if source is None:
        raise UsageError("teacher: the record does not say which model was cut; name it (--teacher MODEL)")
    recipe = run_record.mapping(record.get("recipe"))
    request = shared.recovery_of(arguments, Recovery.of(dict(run_record.mapping(recipe.get("recover"))) or None))
    request.check()
    evaluation = None if arguments.no_eval else session.evaluation_of(arguments)
    with session.claimed(arguments, in_place=in_place):
        session.check_room(arguments, source, "recovery")
        console.say(f"loading {source}, the dense model")
        dense, tokenizer = load(
            source, dtype=arguments.dtype, device=arguments.device, trust_remote_code=arguments.trust_remote_code
        )
        request = resolved(
            request, dense, dense.get_input_embeddings().weight.device, seed=int(recipe.get("seed") or 0)
        )
        takes = estimate(dense, samples=0, recover=request, ratio=_removed(record))
        console.print_recovery_plan(request, takes, dense.get_input_embeddings().weight.device.type)
        how = {"bos": recipe.get("bos"), "field": arguments.text_field, "work": beside(arguments.output)}
        with ask(dense, tokenizer, request, **how) as side:
            if request.hold != "live":
                del dense
            model, tokenizer = session.load_model(arguments)
            before = None if evaluation is None else evaluation.measure(model, tokenizer, arguments.model)
            recovered = side.recover(model)
            console.print_recovery({"recovery": recovered.record})
            if in_place:
                finish(model, tokenizer, arguments.output, recovered.record)
            else:
                content = {**record, "recovery": recovered.record}
                saving.save(model, tokenizer, arguments.output, record=content, overwrite=arguments.overwrite)
        _evaluated(arguments, evaluation, record, model, tokenizer, before)
        console.say(f"wrote {arguments.output}")
    console.write_json(arguments.json, {"output": str(arguments.output), "recovery": dict(recovered.record)})


def _record(source: str) -> dict[str, Any]:
    """The record of a pruned model; empty for a model of another tool."""
    try:
        return saving.read_record(source)
    except HywiaError:
        if (Path(source) / saving.RECORD).exists():
            raise
        return {}


def _removed(record: Mapping[str, Any]) -> float:
    """The share of the parameters that the cut removed; 0 where the record does not say."""
    cut, _ = run_record.reduction(record)
    return 0.0 if cut is None else cut.share


def _evaluated(
    arguments: argparse.Namespace,
    evaluation: Evaluation | None,
    record: Mapping[str, Any],
    model: Any,
    tokenizer: Any,
    before: Mapping[str, Any] | None,
) -> None:
    """Print the figures before and after the recovery; the record keeps those of the dense model, where it has them."""
    if evaluation is None or before is None:
        return
    after = evaluation.measure(model, tokenizer, arguments.output)
    console.print_comparison(before, after)
    sides = {**run_record.mapping(record.get("evaluation")), "after": after}
    device = threaded_device_name(model.get_input_embeddings().weight.device)
    known = "before" in sides and sides.get("text") == after["text"]
    sides = sides if known else {"text": after["text"], "device": device, "before": before, "after": after}
    saving.add_to_record(arguments.output, {"evaluation": sides})


def finish(model: Any, tokenizer: Any, output: str, recovery: Mapping[str, Any]) -> None:
    """Let a recovered model take the place of the one without its recovery; where nothing was gained, only the record
    says what was tried."""
    if not recovery["kept"]:
        saving.add_to_record(output, {"recovery": recovery})
        return
    record = {k: v for k, v in saving.read_record(output).items() if k != "versions"}
    record = {**record, "recovery": recovery}
    saving.save(model, tokenizer, output, record=record, overwrite=True, in_place=True)
