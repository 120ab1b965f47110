"""`hywia bench`: prefill and decoding speed, memory and cache of models."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checkpoint import atomic_directory, originals, saving
from ..checkpoint.loading import load
from ..checkpoint.replaceable import check_report
from ..deploy.cost import cost_of
from ..deploy.hardware import threaded_device_name
from ..deploy.speed import cases, measure
from ..errors import UsageError
from ..versions import versions
from . import charts, console, figures, session

__all__ = ["run"]


def run(arguments: argparse.Namespace) -> None:
    """Checks, then each model in turn."""
    session.begin(arguments)
    wanted = cases(arguments.batch, arguments.context)
    check_report("plot", arguments.plot, inputs=originals.inputs(arguments))
    if arguments.plot is not None:
        charts.require()
    folders = [Path(m) for m in arguments.models]
    if arguments.record and not any((f / saving.RECORD).is_file() for f in folders):
        raise UsageError(f"record: none of the models is a directory with a {saving.RECORD}")
    found: list[dict[str, Any]] = []
    for name in arguments.models:
        console.say(f"loading {name}")
        model, _ = load(
            name,
            dtype=arguments.dtype,
            device=arguments.device,
            trust_remote_code=arguments.trust_remote_code,
            revision=arguments.revision,
        )
        session.proven(model)
        work = cost_of(model)
        readings, reason = measure(model, wanted, modes=arguments.modes, runs=arguments.runs, what=name)
        if reason is not None:
            console.say(f"{name}: eager figures only: {reason}")
        ideals = [_work_of_case(work, f) for f in readings]
        found.append(
            {
                "model": name,
                "parameters": work.parameters,
                "weight_bytes": work.weight_bytes,
                "kv_bytes_per_token": work.kv_bytes_per_token,
                "figures": [{**f.as_dict(), "least": least} for f, least in zip(readings, ideals, strict=True)],
            }
        )
        device = str(next(model.parameters()).device)
        del model
    _add_speedups(found)
    environment = {"versions": versions(), "device": threaded_device_name(device)}
    _print(found)
    if arguments.plot is not None:
        atomic_directory.write_text(arguments.plot, charts.standalone(figures.speed_figures(found)), "plot")
    console.write_json(arguments.json, {**environment, "models": found})
    for folder in folders if arguments.record else ():
        if (folder / saving.RECORD).is_file():
            saving.add_to_record(folder, {"bench": {**environment, "models": found}})


def _work_of_case(work: Any, figure: Any) -> float:
    """FLOPs of prefill, bytes of decoding: what an ideal time is in proportion to."""
    if figure.phase == "prefill":
        return work.prefill_flops(figure.batch, figure.context)
    return work.decode_bytes(figure.batch, figure.context)


def _key(figure: Mapping[str, Any]) -> tuple[Any, ...]:
    return figure["mode"], figure["phase"], figure["batch"], figure["context"]


def _add_speedups(found: Sequence[dict[str, Any]]) -> None:
    """Over the first model, and what they would be if time went with FLOPs (prefill) or bytes (decoding)."""
    first = {_key(f): f for f in found[0]["figures"]}
    for model in found:
        for figure in model["figures"]:
            base = first.get(_key(figure))
            figure["speedup"] = base["ms"] / figure["ms"] if base else None
            figure["ideal"] = base["least"] / figure["least"] if base else None


def _print(found: Sequence[Mapping[str, Any]]) -> None:
    for model in found:
        console.say(
            f"{model['model']}: {model['parameters']:,} parameters, {model['weight_bytes'] / 1e6:,.1f} MB of weights, "
            f"{model['kv_bytes_per_token']:,} bytes of KV cache a token"
        )
    console.say(
        f"{'mode':<9}{'phase':<9}{'batch':>6}{'context':>9}  {'model':<28}{'ms':>10}{'tokens/s':>12}{'peak MB':>10}"
        f"{'speed-up':>10}{'ideal':>8}"
    )
    keys = list(dict.fromkeys(_key(f) for model in found for f in model["figures"]))
    for key in sorted(keys, key=lambda k: (k[0], k[1] != "prefill", k[2], k[3])):
        for model in found:
            for figure in model["figures"]:
                if _key(figure) == key:
                    peak = f"{figure['peak_bytes'] / 1e6:,.0f}" if figure["peak_bytes"] else "-"
                    gain = (
                        f"{figure['speedup']:>10.3f}{figure['ideal']:>8.3f}"
                        if figure["speedup"]
                        else f"{'-':>10}{'-':>8}"
                    )
                    console.say(
                        f"{key[0]:<9}{key[1]:<9}{key[2]:>6}{key[3]:>9}  {model['model'][-27:]:<28}{figure['ms']:>10.3f}"
                        f"{figure['tokens_per_second']:>12,.1f}{peak:>10}{gain}"
                    )
