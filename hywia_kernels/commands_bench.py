"""`hywia bench`, `hywia export` and `hywia report`: their arguments, and what they do."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import charts, figures, html_report, report
from .checkpoint import atomic_directory, originals, saving
from .checkpoint.replaceable import Input, check_report
from .deploy import device_profiles, serving_rules
from .deploy.hardware import threaded_device_name
from .errors import UsageError
from .versions import versions

__all__ = ["add_commands", "add_planning", "bench", "export_served", "write_report"]


def add_commands(commands: Any, add_options: Any) -> None:
    """Add both commands; `add_options` adds what every command that loads a model takes."""
    command = commands.add_parser("bench", help="prefill and decoding speed, memory and cache of models")
    command.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="as for the other commands; the first is what others are held against",
    )
    add_options(command)
    command.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="sequences at once; default: 1 8")
    command.add_argument("--context", type=int, nargs="+", default=[128, 512], help="tokens; default: 128 512")
    command.add_argument(
        "--modes", nargs="+", default=["eager", "static"], help="eager, captured, static; default: both"
    )
    command.add_argument("--runs", type=int, default=10, help="readings per figure; default: 10")
    command.add_argument("--plot", metavar="FILE", help="write the figures as SVG, by matplotlib")
    command.add_argument("--record", action="store_true", help="keep the figures in each directory's hywia.json")
    command.set_defaults(run=bench)
    command = commands.add_parser("export", help="for servers whose formats hold layers that differ in width")
    command.add_argument("model", help="as for the other commands")
    add_options(command)
    command.add_argument(
        "-o", "--output", required=True, metavar="OUT", help="file (gguf) or directory (decilm) to write"
    )
    command.add_argument(
        "--format", choices=("gguf", "decilm"), default="gguf", help="for llama.cpp, or for vLLM (not tried there)"
    )
    command.add_argument("--vocabulary", metavar="GGUF", help="of the model before pruning: its tokenizer, for gguf")
    command.set_defaults(run=export_served)
    command = commands.add_parser("report", help="a pruning run's record as one HTML page")
    command.add_argument("output", metavar="OUT", help="directory that 'hywia prune' wrote")
    command.add_argument("-o", "--html", metavar="FILE", help="default: OUT.html beside it")
    command.set_defaults(run=write_report)


def add_planning(group: Any) -> None:
    """Add to `hywia prune` what decides which widths are good ones."""
    group.add_argument("--align", type=int, help="channel widths are multiples of this; default: what the target likes")
    group.add_argument(
        "--target",
        default="auto",
        help=f"{', '.join(device_profiles.NAMES)}, or a .json profile; default: the device at hand",
    )
    group.add_argument(
        "--serve",
        type=lambda text: tuple(part.strip() for part in text.split(",") if part.strip()),
        default=serving_rules.DEFAULT,
        metavar="NAMES",
        help=f"keep to these servers' rules; default: {','.join(serving_rules.DEFAULT)}",
    )
    group.add_argument("--tensor-parallel", type=int, default=1, metavar="N", help="GPUs that will share the model")


def bench(arguments: argparse.Namespace) -> None:
    """`hywia bench`."""
    from . import commands
    from .checkpoint.loading import load
    from .deploy.cost import work_of
    from .deploy.speed import cases, measure

    commands._begin(arguments)
    wanted = cases(arguments.batch, arguments.context)
    check_report("plot", arguments.plot, inputs=originals.inputs(arguments))
    if arguments.plot is not None:
        charts.require()
    folders = [Path(m) for m in arguments.models]
    if arguments.record and not any((f / saving.RECORD).is_file() for f in folders):
        raise UsageError(f"record: none of the models is a directory with a {saving.RECORD}")
    found: list[dict[str, Any]] = []
    for name in arguments.models:
        report.say(f"loading {name}")
        model, _ = load(
            name, dtype=arguments.dtype, device=arguments.device, trust_remote_code=arguments.trust_remote_code
        )
        work = work_of(model)
        readings, reason = measure(model, wanted, modes=arguments.modes, runs=arguments.runs, what=name)
        if reason is not None:
            report.say(f"{name}: eager figures only: {reason}")
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
    report.write_json(arguments.json, {**environment, "models": found})
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
        report.say(
            f"{model['model']}: {model['parameters']:,} parameters, {model['weight_bytes'] / 1e6:,.1f} MB of weights, "
            f"{model['kv_bytes_per_token']:,} bytes of KV cache a token"
        )
    report.say(
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
                    report.say(
                        f"{key[0]:<9}{key[1]:<9}{key[2]:>6}{key[3]:>9}  {model['model'][-27:]:<28}{figure['ms']:>10.3f}"
                        f"{figure['tokens_per_second']:>12,.1f}{peak:>10}{gain}"
                    )


def export_served(arguments: argparse.Namespace) -> None:
    """`hywia export`."""
    from . import commands

    commands._begin(arguments)
    gguf = arguments.format == "gguf"
    if gguf != (arguments.vocabulary is not None):
        raise UsageError("vocabulary: goes with --format gguf, which needs it")
    given = originals.inputs(arguments)
    check_report("json", arguments.json, outputs=(Path(arguments.output),), inputs=given)
    with atomic_directory.claim(arguments.output, a_file=gguf):
        _export(arguments, gguf)


def _export(arguments: argparse.Namespace, gguf: bool) -> None:
    from .checkpoint.decilm import write_decilm
    from .checkpoint.gguf import write_gguf
    from .checkpoint.loading import load

    report.say(f"loading {arguments.model}")
    model, tokenizer = load(
        arguments.model, dtype=arguments.dtype, device=arguments.device, trust_remote_code=arguments.trust_remote_code
    )
    if gguf:
        path = write_gguf(model, arguments.vocabulary, arguments.output)
    else:
        path = write_decilm(model, tokenizer, arguments.output)
    report.say(f"wrote {path}")
    report.write_json(arguments.json, {"output": str(path), "format": arguments.format})


def write_report(arguments: argparse.Namespace) -> None:
    """`hywia report`."""
    folder = Path(arguments.output)
    target = Path(arguments.html) if arguments.html else folder.absolute().with_name(folder.absolute().name + ".html")
    check_report("html", target, inputs=(Input("model", folder),))
    atomic_directory.write_text(target, html_report.page(saving.read_record(folder), folder.absolute().name), "html")
    report.say(f"wrote {target}")
