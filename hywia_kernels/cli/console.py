"""What a run prints for people (tables on stdout) and writes for machines (JSON)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .. import ops
from ..checkpoint import atomic_directory
from ..checkpoint.metrics import compare, figures_of
from ..checkpoint.run_record import plain, reduction, spans
from ..deploy.estimate import Estimate
from ..errors import HywiaError
from ..method.derivation import Proof
from ..method.recovery.request import Recovery
from ..types import Plan
from ..versions import versions

__all__ = [
    "environment",
    "extreme_cuts",
    "print_comparison",
    "print_environment",
    "print_evaluation",
    "print_history",
    "print_plan",
    "print_proof",
    "print_reconstruction",
    "print_recovery",
    "print_recovery_plan",
    "print_search",
    "print_streaming",
    "print_text",
    "say",
    "write_json",
]

# To remove a larger share of a layer's units than this seldom leaves a usable model.
EXTREME = 0.75


def say(line: str) -> None:
    """Print a line at once, also where stdout is a pipe."""
    print(line, flush=True)


def print_evaluation(evaluation: Mapping[str, Any]) -> None:
    """The figures of one model, and the text that its perplexity was measured on."""
    for metric, value in figures_of(evaluation):
        say(f"{metric.name:<16} {value:>16}")
    _say_text(evaluation)


def _say_text(evaluation: Mapping[str, Any]) -> None:
    text = evaluation.get("text")
    if not text:
        return
    bos = ", each beginning with the beginning-of-text token" if text["bos"] else ""
    say(f"perplexity on {text['blocks']:,} blocks of {text['block']:,} tokens{bos}: {text['name']}")


def print_comparison(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> None:
    """Each figure before and after with their ratio, and a continuation of each model where there is one."""
    if before is None or after is None:
        return
    say(f"{'':<16} {'before':>16} {'after':>16} {'ratio':>8}")
    for row in compare(before, after):
        say(f"{row.metric.name:<16} {row.before:>16} {row.after:>16} {row.ratio:>8}")
    _say_text(before)
    for name, side in (("before", before), ("after", after)):
        if "continuation" in side:
            say(f"{name} continues: {' '.join(plain(side['continuation']).split())}")


def print_plan(plan: Plan) -> None:
    """How many parameters and units go, what planning predicts, and warnings of extreme cuts."""
    removed = plan.parameters_before - plan.parameters_after
    share = f"{100 * plan.ratio:.3f} %"
    say(f"removing {removed:,} of {plan.parameters_before:,} parameters: {share}, {plan.layout} layout")
    if plan.depth is not None:
        which = f" (without {', '.join(map(str, plan.depth.gone))})" if plan.record.get("layers_by") else ""
        say(f"  layers: {len(plan.depth.parameters)} -> {len(plan.depth.keep)}{which}")
    for kind in sorted({g.kind for g in plan.staying}):
        groups = sorted((g for g in plan.staying if g.kind == kind), key=lambda g: g.layer)
        was, now = [g.units for g in groups], plan.widths(kind)
        say(f"  {kind}: {spans(was)} -> {spans(now)} {groups[0].unit}s a layer")

    _say_planning(plan.record)
    for warning in extreme_cuts(plan):
        say(f"  warning: {warning}")


def extreme_cuts(plan: Plan) -> list[str]:
    """A sentence for each kind of which any layer loses more than 75 % of its units; none for a moderate plan."""
    sentences = []
    for kind in sorted({g.kind for g in plan.staying}):
        groups = [g for g in plan.staying if g.kind == kind]
        shares = [1.0 - plan.keep[g.name].numel() / g.units for g in groups]
        extreme = [share for share in shares if share > EXTREME]
        if extreme:
            unit = f"{groups[0].unit}s".replace("_", " ")
            where = "every layer" if len(extreme) == len(groups) else f"{len(extreme)} of {len(groups)} layers"
            upto = f"{100 * max(extreme):.0f} %" if max(extreme) < 0.995 else f"{100 * max(extreme):.2f} %"
            sentences.append(
                f"{kind}: up to {upto} of the {unit} go in {where}; so deep a cut seldom leaves a usable model. "
                f"Lower --ratio or --group-ratio, let more kinds of units go (--units), cut in steps, or train the "
                "model afterwards"
            )
    return sentences


def print_search(plan: Plan) -> None:
    """The plans that were tried, one a line, and on what; nothing where none were."""
    done = plan.record.get("search")
    if not done:
        return
    refit = f"refitted on {done['refitted']} samples and " if done["refitted"] else ""
    fresh = "" if done["fresh"] == done["judged"] else f", {done['judged'] - done['fresh']} of which were scored too"
    say(
        f"tried {len(done['candidates'])} plans, {refit}judged on {done['judged']}{fresh}, in {done['seconds']:.1f} s; "
        "by their divergence from the dense model:"
    )
    kinds = list(done["candidates"][0]["widths"])
    apart = len({trial["spread"] for trial in done["candidates"]}) > 1
    say(f"  {''.join(f'{kind:>10}' for kind in kinds)}{'spread' if apart else '':>8}{'estimate':>10}{'divergence':>12}")
    for trial in done["candidates"]:
        widths = "".join(f"{trial['widths'][kind]:>10,}" for kind in kinds)
        spread = f"{trial['spread']:.2g}" if apart else ""
        estimate = "" if trial["estimate"] is None else f"{trial['estimate']:.4f}"
        followed = f", {trial['followed']:.4f} after what follows" if "followed" in trial else ""
        mark = "  <- taken" if trial["chosen"] else ""
        say(f"  {widths}{spread:>8}{estimate:>10}{trial['divergence']:>12.4f}{followed}{mark}")


def print_history(steps: Sequence[Mapping[str, Any]], plan: Plan) -> None:
    """What all cuts together removed, for a model that was cut before.

    Args:
        steps: the records of earlier cuts, the first one first. plan: of the present cut.
    """
    _, total = reduction(
        {
            "plan": {"parameters_before": plan.parameters_before, "parameters_after": plan.parameters_after},
            "history": list(steps),
        }
    )
    if total is not None:
        say(
            f"  since the original: {total.removed:,} of {total.before:,} parameters, {100 * total.share:.3f} %, "
            f"in {len(steps) + 1} cuts"
        )


def _say_planning(record: Mapping[str, Any]) -> None:
    """Which serving rules limit the plan, and how much faster and smaller the model should get."""
    if record.get("binding"):
        rules = [c for c in record["constraints"] if c.partition(":")[0] in record["binding"]]
        say(f"  bound by {'; '.join(rules)}")
    if record.get("note"):
        say(f"  note: {record['note']}")
    if "prediction" in record:
        prediction = record["prediction"]
        prefill = ", ".join(f"{s:.2f} at {t} tokens" for t, s in prediction["prefill"].items())
        say(
            f"  predicted on {prediction['target']}: prefill x{prefill}; decoding x{prediction['decode']:.2f}; "
            f"weights {prediction['size']:.2f} times smaller"
        )


def print_text(record: Mapping[str, Any]) -> None:
    """Which calibration text was read, and how much of it."""
    text = record.get("text")
    if text:
        say(f"calibration text: {text['samples']:,} samples, {text['tokens']:,} tokens, {text['calib']}")


def print_streaming(record: Mapping[str, Any]) -> None:
    """By how many processes a streamed scoring was done, and where the weights were; nothing of another scoring."""
    done = record.get("statistics", {})
    if done.get("memory") != "streamed":
        return
    places = {"device": "on the device", "host": "in the host's memory", "files": "in their files"}
    again = "" if done["resumed_at"] is None else f", on from layer {done['resumed_at']}"
    by = "one process" if done["ranks"] == 1 else f"{done['ranks']} processes"
    say(
        f"  streamed by {by} in {done['runs']} runs{again}: forward {done['seconds_forward']:.1f} s, backward "
        f"{done['seconds_backward']:.1f} s; weights {places[done['weights']]}, {done['bytes_moved'] / 1e9:.2f} GB "
        f"moved and {done['seconds_waited']:.1f} s waited for"
    )


def print_proof(proof: Proof) -> None:
    """What was derived of a model that the table of architectures lacks, what is left alone, and what was checked."""
    say(f"{proof.entry.title} is not in the table of architectures; its structure was derived:")
    for part, words in proof.parts.items():
        say(f"  {part}: {words}")
    for name, reason in proof.alone.items():
        say(f"  left alone: {name} ({reason.removeprefix('proof: ')})")
    if proof.kinds != ("mlp", "attention"):
        say(f"  units that can go: --units {' or '.join(proof.kinds)}")
    say(f"  proven in {proof.seconds:.1f} s: {'; '.join(proof.checks)}")


def print_reconstruction(plan: Plan) -> None:
    """The mean squared error of matrices' outputs, and of layers that were trained, before and after reconstruction."""
    done = plan.record.get("refit")
    errors = list(done["relative_error"].values()) if done else []
    if done and errors:
        before, after = (sum(pair[i] for pair in errors) / len(errors) for i in (0, 1))
        say(
            f"reconstructed {len(errors)} matrices on {done['samples']:,} samples, {done['tokens']:,} tokens, in "
            f"{done['seconds']:.1f} s: mean squared error of their outputs {before:.3f} -> {after:.3f} of the outputs'"
        )
    trained = list(done.get("layer_error", {}).values()) if done else []
    if done and trained:
        before, after = (sum(pair[i] for pair in trained) / len(trained) for i in (0, 1))
        say(
            f"  and trained {len(trained)} layers, {done['passes']} passes each: mean squared error of what leaves "
            f"them {before:.4f} -> {after:.4f} of it"
        )


def print_recovery_plan(request: Recovery, takes: Estimate, device: str) -> None:
    """What a resolved recovery will do, and take."""
    seconds = sum(takes.seconds.get(stage, 0.0) for stage in ("recovery text", "recovery"))
    held = {"live": "beside it", "8bit": "beside it in 8 bits", "kept": "asked once, its predictions kept"}
    say(
        f"recovery: {request.tune}, {request.tokens:,} tokens of {', '.join(request.text)}, the dense model "
        f"{held[request.hold or 'live']}; about {seconds:,.0f} s and {takes.memory_bytes / 1e9:,.1f} GB on {device}"
    )


def print_recovery(record: Mapping[str, Any]) -> None:
    """How far a recovery brought the model, or why its training was given up."""
    done = record.get("recovery")
    if not done:
        return
    text, (_, before), best = done["text_read"], done["divergences"][0], min(v for _, v in done["divergences"])
    say(
        f"recovered ({done['tune']}) in {done['steps']:,} steps of {done['batch']} samples, text of "
        f"{text['samples'] * text['seq_len']:,} tokens, {done['seconds']:.1f} s: divergence from the dense model on "
        f"held-out text {before:.3f} -> {min(best, before):.3f} nats a token"
    )
    if done["stopped"]:
        say(f"  training was given up: {done['stopped']}; a lower --learning-rate than {done['rate']:g} may do better")
    if not done["kept"]:
        say("  no better model came of it: the weights are those of before")


def environment() -> dict[str, Any]:
    """Versions, devices, and the state of every backend."""
    import torch

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    backends = {b.name: {"on": b.on, "reason": b.reason, "ops": list(b.ops)} for b in ops.availability()}
    return {"versions": versions(), "cuda": torch.version.cuda, "devices": devices, "backends": backends}


def print_environment(facts: Mapping[str, Any]) -> None:
    """What `environment` gives, a line each: versions, GPUs, and every backend's ops or why it is off."""
    say("versions: " + ", ".join(f"{k} {v}" for k, v in facts["versions"].items()))
    say("GPUs: " + (", ".join(facts["devices"]) or "none"))
    for name, state in facts["backends"].items():
        detail = ", ".join(state["ops"]) if state["on"] else state["reason"]
        say(f"{name:<10} {'on ' if state['on'] else 'off'} {detail}")


def write_json(path: str | None, content: Any) -> None:
    """Write content as JSON, where a path is given.

    Raises:
        HywiaError: JSON cannot hold the content, or the file cannot be written.
    """
    if path is None:
        return
    try:
        text = json.dumps(content, indent=2) + "\n"
    except (TypeError, ValueError) as error:
        raise HywiaError(f"json: the report holds what JSON cannot: {error}") from error
    atomic_directory.write_text(path, text, "json")
