"""What each command does: checks first, then the stages in their order."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from . import arch, commands_recipe, ops, progress, report
from .checkpoint import atomic_directory, originals, run_record, saving, scores_file
from .checkpoint.loading import load
from .checkpoint.replaceable import check_report
from .deploy import device_profiles, planning, serving_rules
from .deploy.hardware import threaded_device_name
from .errors import HywiaError, UsageError
from .evaluation import blocks, continuation
from .evaluation import evaluate as evaluate_model
from .method import selection, surgery
from .method.calibration_data import calibration
from .method.reading import BUNDLED, bundled_text, documents, file_documents, is_local
from .method.scores import fuse
from .method.scores import score as score_model
from .method.statistics import calibrate
from .method.tokens import check_length, prefix
from .method.writing import opening, prompt_tokens
from .types import Plan, Scores, Statistics

__all__ = ["evaluate", "info", "prune", "score"]

_DEFAULTS: dict[str, Any] = {
    "criterion": "hywia",
    "fusion": "attention",
    "order": "second",
    "samples": commands_recipe.SAMPLES,
    "seq_len": 128,
    "seed": 0,
    "engine": "auto",
    "memory": "auto",
}


def _setting(arguments: argparse.Namespace, name: str) -> Any:
    value = getattr(arguments, name)
    return _DEFAULTS[name] if value is None else value


def _begin(arguments: argparse.Namespace) -> None:
    """Progress on, other people's bars and notices off where nobody watches; refuse a report that has no place."""
    import transformers

    progress.enable()
    transformers.utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    check_report("json", arguments.json, inputs=originals.inputs(arguments))


@contextmanager
def _claimed(arguments: argparse.Namespace, *, in_place: bool = False, least: int = 0) -> Iterator[None]:
    """Hold the output from before the work to its end; refuses what cannot be written at that end."""
    output, given = Path(arguments.output), originals.inputs(arguments)
    check_report("json", arguments.json, outputs=(output,), inputs=given)
    if arguments.command != "prune":  # only what was pruned may take its own model's place
        given = tuple(i._replace(what="model that is read") if i.what == "model" else i for i in given)
    with atomic_directory.claim(output, overwrite=arguments.overwrite, in_place=in_place, inputs=given, need=least):
        yield


def _least(arguments: argparse.Namespace) -> int:
    """Bytes that the pruned model takes at least, as far as is known before it is loaded."""
    share = max(v for v in (arguments.ratio, *_shares(arguments.group_ratio)) if v is not None)
    narrowed = arguments.dtype in ("bfloat16", "float16")
    return originals.least_bytes(originals.inputs(arguments), share, narrowed)


def _check_scoring(arguments: argparse.Namespace) -> None:
    """What can be refused before a model is loaded."""
    for name, least in (("samples", 1), ("seq_len", 2)):
        if _setting(arguments, name) < least:
            raise UsageError(f"{name}: expected at least {least}, got {_setting(arguments, name)}")
    if _setting(arguments, "criterion") != "hywia":
        for name in ("fusion", "order", "calib", "engine", "memory"):
            if name == "calib" and getattr(arguments, "refit", None):
                continue
            if getattr(arguments, name) is not None:
                raise UsageError(f"{name}: goes with --criterion hywia, got --criterion {arguments.criterion}")
    if _setting(arguments, "engine") == "autograd" and _setting(arguments, "memory") == "layerwise":
        raise UsageError("memory: expected auto, fast or lean with --engine autograd, got layerwise")
    if arguments.backend is not None:
        ops.require(arguments.backend)
    if arguments.calib is not None and is_local(arguments.calib):
        documents(arguments.calib, field=arguments.text_field)


def _shares(group_ratio: float | dict[str, float] | None) -> list[float | None]:
    return list(group_ratio.values()) if isinstance(group_ratio, dict) else [group_ratio]


def _check_selection(arguments: argparse.Namespace) -> None:
    if (arguments.ratio is None) == (arguments.group_ratio is None):
        raise UsageError("ratio: expected exactly one of --ratio and --group-ratio")
    shares = arguments.group_ratio
    for name, value in (("ratio", arguments.ratio), *((("group_ratio", v)) for v in _shares(shares))):
        if value is not None and not 0.0 < value < 1.0:
            raise UsageError(f"{name}: expected a number between 0 and 1, both excluded, got {value}")
    if arguments.layers is not None and arguments.group_ratio is None:
        raise UsageError("layers: goes with --group-ratio; --ratio prunes every layer to the same width")
    device_profiles.resolve(arguments.target)
    serving_rules.constraints(arguments.serve, arguments.tensor_parallel)
    selection.check_kinds(tuple(arguments.group_ratio) if isinstance(arguments.group_ratio, dict) else arguments.units)
    if arguments.align is not None and arguments.align < 1:
        raise UsageError(f"align: expected at least 1, got {arguments.align}")
    if arguments.scores is not None:
        # A text for ranking heads, the refit, or learning may come with stored scores.
        unasked = ("criterion", "engine", "memory")
        for name in unasked if arguments.calib is not None else (*unasked, "samples", "seq_len", "seed"):
            if getattr(arguments, name) is not None:
                raise UsageError(f"{name}: does not go with --scores, which holds the outcome of an earlier scoring")


def _evaluation_text(arguments: argparse.Namespace) -> tuple[str, str]:
    """`(name, text)`; the documents of a file that holds several, with an empty line between them."""
    if arguments.block < 2 or (arguments.max_blocks is not None and arguments.max_blocks < 1):
        raise UsageError("block: expected --block of at least 2 and --max-blocks of at least 1")
    if arguments.text is None:
        return BUNDLED, bundled_text()
    path = Path(arguments.text)
    if not path.is_file():
        raise HywiaError(f"text: cannot read {path}: {'it is a directory' if path.is_dir() else 'no such file'}")
    return str(path), "\n\n".join(file_documents(path, field=arguments.text_field, argument="text"))


def _check_lengths(
    arguments: argparse.Namespace, model: Any, tokenizer: Any, text: tuple[str, str] | None, scored: bool
) -> None:
    """What the model's positions and the evaluation's text do not allow, said before any work."""
    prefix(tokenizer, arguments.bos)
    if scored:
        check_length(model, _setting(arguments, "seq_len"), "seq_len")
    if text is None:
        return
    check_length(model, arguments.block, "block")
    blocks(tokenizer, text[1], arguments.block, arguments.max_blocks, bos=arguments.bos)
    if getattr(arguments, "prompt", None):
        prompt_tokens(model, tokenizer, arguments.prompt, arguments.bos)


def _load(arguments: argparse.Namespace, *, quantised: bool = False) -> tuple[Any, Any]:
    report.say(f"loading {arguments.model}")
    return load(
        arguments.model,
        dtype=arguments.dtype,
        device=arguments.device,
        trust_remote_code=arguments.trust_remote_code,
        quantised=quantised,
    )


def _say_left_alone(model: Any) -> None:
    others = arch.left_alone(model)
    if others:
        report.say(f"left alone, being no part of the language decoder: {', '.join(others)}")


class _Texts:
    """Calibration samples, written or read once per number of samples; says what it made."""

    def __init__(self, arguments: argparse.Namespace, model: Any, tokenizer: Any) -> None:
        self.arguments, self.model, self.tokenizer = arguments, model, tokenizer
        self.source = arguments.calib or "written by the model"
        self._made: dict[tuple[int, bool], Tensor] = {}

    def __call__(self, samples: int | None, fewer: bool = False) -> Tensor:
        """So many; None: as many as are scored. `fewer`: a text that holds fewer gives all it has."""
        scored = _setting(self.arguments, "samples")
        if samples is None or samples == scored:
            samples, fewer = scored, False
        key = (samples, fewer)
        if key not in self._made:
            # A number that was not given for scoring is refused in its own option's name.
            option = "--samples" if samples == scored else "--refit-samples"
            tokens = self._made[key] = calibration(
                self.model,
                self.tokenizer,
                self.arguments.calib,
                samples=samples,
                seq_len=_setting(self.arguments, "seq_len"),
                seed=_setting(self.arguments, "seed"),
                fewer=fewer or samples != scored,
                bos=self.arguments.bos,
                field=self.arguments.text_field,
            )
            count, length = tokens.shape
            if count < samples and not fewer:
                raise HywiaError(
                    f"calib: the text holds {count} samples of {length} tokens, {samples} were asked for; "
                    f"give more text, or {option} {count}, or a shorter --seq-len"
                )
            report.say(f"calibration text: {count:,} samples of {length:,} tokens, {self.source}")
        return self._made[key]

    def record(self, tokens: Tensor) -> dict[str, Any]:
        """What samples were made of."""
        begin = (opening if self.arguments.calib is None else prefix)(self.tokenizer, self.arguments.bos)
        seed = _setting(self.arguments, "seed")
        return {"calib": self.source, "seed": seed, "bos": bool(begin), "tokens": tokens.numel()}


def _scored(arguments: argparse.Namespace, model: Any, texts: _Texts) -> tuple[Scores, Statistics | None]:
    criterion, seed = _setting(arguments, "criterion"), _setting(arguments, "seed")
    if criterion != "hywia":
        return score_model(model, criterion=criterion, seed=seed, backend=arguments.backend), None
    batches = texts(None)
    statistics = calibrate(
        model,
        batches,
        backend=arguments.backend,
        engine=_setting(arguments, "engine"),
        memory=_setting(arguments, "memory"),
    )
    statistics = replace(statistics, record={**statistics.record, **texts.record(batches)}, known_finite=True)
    return fuse(statistics, _blend(arguments), _setting(arguments, "order")), statistics


def _blend(arguments: argparse.Namespace) -> str:
    """The training-free fusion; learning starts from attention's."""
    fusion = _setting(arguments, "fusion")
    return "attention" if fusion == "learned" else fusion


def _stored(arguments: argparse.Namespace) -> Scores:
    scores, statistics = scores_file.load_scores(arguments.scores)
    if arguments.fusion is None and arguments.order is None:
        return scores
    if statistics is None:
        raise UsageError(
            f"scores: {arguments.scores} holds no statistics (criterion {scores.record.get('criterion')}), "
            "so --fusion and --order cannot be applied"
        )
    defaults = scores.record
    fusion = defaults.get("fusion", _DEFAULTS["fusion"]) if arguments.fusion is None else _blend(arguments)
    return fuse(statistics, fusion, arguments.order or defaults.get("order", _DEFAULTS["order"]))


def score(arguments: argparse.Namespace) -> None:
    """`hywia score`."""
    _begin(arguments)
    _check_scoring(arguments)
    with _claimed(arguments):
        _score(arguments, Path(arguments.output))


def _score(arguments: argparse.Namespace, output: Path) -> None:
    model, tokenizer = _load(arguments)
    _say_left_alone(model)
    _check_lengths(arguments, model, tokenizer, None, _setting(arguments, "criterion") == "hywia")
    scores, statistics = _scored(arguments, model, _Texts(arguments, model, tokenizer))
    scores_file.save_scores(output, scores, statistics, overwrite=arguments.overwrite)
    report.say(f"wrote {output}: {len(scores.groups)} groups, {sum(g.units for g in scores.groups)} units")
    report.write_json(arguments.json, {"output": str(output), "scores": dict(scores.record)})


def prune(arguments: argparse.Namespace) -> None:
    """`hywia prune`."""
    _begin(arguments)
    _check_selection(arguments)
    commands_recipe.check_recipe(arguments)
    _check_scoring(arguments)
    with _claimed(arguments, in_place=arguments.in_place, least=_least(arguments)):
        _prune(arguments, Path(arguments.output))


def _prune(arguments: argparse.Namespace, output: Path) -> None:
    text = None if arguments.no_eval else _evaluation_text(arguments)
    stored = _stored(arguments) if arguments.scores else None
    model, tokenizer = _load(arguments)
    _say_left_alone(model)
    if stored is not None:
        scores_file.check_scored_on(stored, model, arguments.scores, arguments.model)
    planning.check_reachable(
        model, stored, criterion=_setting(arguments, "criterion"), **commands_recipe.plan_request(arguments)
    )
    scored = stored is None and _setting(arguments, "criterion") == "hywia"
    learns = arguments.fusion == "learned"
    _check_lengths(arguments, model, tokenizer, text, scored or learns or commands_recipe.refits(arguments))
    texts = _Texts(arguments, model, tokenizer)
    scores, plan = commands_recipe.planned(arguments, model, stored or _scored(arguments, model, texts)[0], texts)
    plan = planning.with_prediction(plan, model, arguments.target)
    report.print_plan(plan)
    before = _measure(arguments, model, tokenizer, text, arguments.model)
    plan = commands_recipe.refitted(arguments, model, plan, texts)
    surgery.prune(model, plan, backend=arguments.backend)
    given = {k: v for k, v in vars(arguments).items() if k != "command"}
    record = {"arguments": given, "scores_summary": run_record.score_summary(scores, plan)}
    written = {"overwrite": arguments.overwrite, "in_place": arguments.in_place}
    saving.save(model, tokenizer, output, plan=plan, record=record, **written)
    after = _measure(arguments, model, tokenizer, text, output)
    report.print_comparison(before, after)
    if before is not None:
        device = threaded_device_name(next(model.parameters()).device)
        evaluation = {"text": before["text"], "device": device, "before": before, "after": after}
        saving.add_to_record(output, {"evaluation": evaluation})
    report.say(f"wrote {output}")
    _write_prune_json(arguments, plan, before, after)


def _measure(
    arguments: argparse.Namespace, model: Any, tokenizer: Any, text: tuple[str, str] | None, source: Any
) -> dict | None:
    if text is None:
        return None
    name, content = text
    found: dict[str, Any] = evaluate_model(
        model,
        tokenizer,
        content,
        block=arguments.block,
        max_blocks=arguments.max_blocks,
        source=source,
        bos=arguments.bos,
        name=name,
    )
    if getattr(arguments, "prompt", None):
        found["continuation"] = continuation(model, tokenizer, arguments.prompt, bos=arguments.bos)
    return found


def _write_prune_json(arguments: argparse.Namespace, plan: Plan, before: dict | None, after: dict | None) -> None:
    content = {"output": arguments.output, "plan": saving.plan_record(plan)}
    if before is not None:
        content |= {"before": before, "after": after}
    report.write_json(arguments.json, content)


def evaluate(arguments: argparse.Namespace) -> None:
    """`hywia eval`."""
    _begin(arguments)
    text = _evaluation_text(arguments)
    model, tokenizer = _load(arguments, quantised=True)
    _check_lengths(arguments, model, tokenizer, text, scored=False)
    found = _measure(arguments, model, tokenizer, text, arguments.model) or {}
    report.print_evaluation(found)
    report.write_json(arguments.json, found)


def info(arguments: argparse.Namespace) -> None:
    """`hywia info`."""
    check_report("json", arguments.json)
    found = report.environment()
    report.print_environment(found)
    report.write_json(arguments.json, found)
