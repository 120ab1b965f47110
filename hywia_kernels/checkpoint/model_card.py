"""The model card of a written directory: its README.md, from what `hywia.json` records.

The hub shows the card as the model's page; its YAML head says what the model was made from, how it is licensed and how
it is found.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..arch.classes import IMAGES, TEXT, of_images
from ..errors import HywiaError
from . import atomic_directory, run_record
from .metrics import compare
from .templating import render

__all__ = ["CARD", "escape_markdown", "model_card", "write_card"]

CARD = "README.md"
TEMPLATE = "model_card.md.jinja"
TAGS = ("pruned", "structured-pruning", "hywia")
# Names of models that a package on this machine holds, and their names on the hub.
_BUNDLED = {"smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}
_MARKS = re.compile(r"([\\`*_{}\[\]<>|~$#!&^])")
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_CACHED = re.compile(r"models--([^/\\]+?)--([^/\\]+)")
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+ -]{0,95}")
_SEAL = re.compile(r"\n<!-- card of hywia_kernels ([0-9a-f]{64}) -->\n\Z")


class _Markdown(str):
    """Text that is Markdown already."""


def escape_markdown(value: Any) -> str:
    """A value as text on one line that Markdown shows as it is, without emphasis, link, code, cell, HTML or formula."""
    if isinstance(value, _Markdown):
        return value
    line = " ".join(run_record.plain(value).split())
    return _MARKS.sub(r"\\\1", line).replace("://", r":\//").replace("www.", r"www\.")


def _fenced(text: str, language: str) -> _Markdown:
    """A block of code; the fence is longer than any that the text holds."""
    text = run_record.plain(text)
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return _Markdown(f"{fence}{language}\n{text}\n{fence}")


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        return run_record.mapping(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _base_metadata(base: str) -> Mapping[str, Any]:
    """The YAML head of the base model's card, from its directory or the hub's cache on this machine; never fetched."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.repocard import metadata_load

    if os.path.exists(base):
        card: Any = Path(base) / CARD
    else:
        try:
            card = try_to_load_from_cache(base, CARD)
        except HFValidationError:
            return {}
    if not isinstance(card, (str, Path)) or not Path(card).is_file():
        return {}
    try:
        return run_record.mapping(metadata_load(card))
    except Exception:  # a card that somebody wrote: YAML raises errors of many classes, and none of them is ours
        return {}


def _hub_id(base: str | None, metadata: Mapping[str, Any]) -> str | None:
    """The base model's name on the hub, where it is known."""
    if base is None:
        return None
    if not os.path.exists(base):
        return _BUNDLED.get(base) or (base if _HUB_ID.fullmatch(base) else None)
    cached = _CACHED.search(str(Path(base).absolute()))
    if cached is not None and _HUB_ID.fullmatch("/".join(cached.groups())):
        return "/".join(cached.groups())
    # A directory that this package wrote: what it was made from is what this one was made from.
    tags, named = metadata.get("tags"), metadata.get("base_model")
    if isinstance(tags, list) and "hywia" in tags and isinstance(named, str) and _HUB_ID.fullmatch(named):
        return named
    return None


def _licence(metadata: Mapping[str, Any], hub_id: str | None) -> dict[str, Any]:
    """Entries of the base model's card on its licence and languages, as far as they can be copied."""
    copied: dict[str, Any] = {}
    for key in ("license", "license_name"):
        value = metadata.get(key)
        if isinstance(value, str) and _LABEL.fullmatch(value):
            copied[key] = value
    link = metadata.get("license_link")
    if isinstance(link, str) and re.fullmatch(r"https?://[^\s<>\"]{1,500}", link):
        copied["license_link"] = link
    elif isinstance(link, str) and hub_id is not None and re.fullmatch(r"[A-Za-z0-9._-]{1,100}", link):
        copied["license_link"] = f"https://huggingface.co/{hub_id}/blob/main/{link}"
    languages = metadata.get("language")
    if isinstance(languages, (str, list)) and languages:
        codes = [languages] if isinstance(languages, str) else languages
        if all(isinstance(c, str) and re.fullmatch(r"[A-Za-z]{2,8}(-[A-Za-z0-9]{2,8})*", c) for c in codes):
            copied["language"] = languages
    return copied


def _loading(record: Mapping[str, Any], config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """How the directory loads: its kind, the reason where it is no stock checkpoint, and the lines of Python."""
    reason = record.get("not_stock")
    own_layers = config.get("model_type") == "hywia_adaptive"
    remote = bool(config.get("auto_map")) and not own_layers
    changed = "module_changes" in config
    images = of_images(config.get("base_model_type", config.get("model_type"))) and "text_config" in config
    model_class, other, others = (
        (IMAGES, "processor", "AutoProcessor") if images else (TEXT, "tokenizer", "AutoTokenizer")
    )
    load = f"from transformers import {model_class}, {others}\n\n"
    trust = ", trust_remote_code=True" if remote else ""
    kind = "remote" if remote else "stock"
    if own_layers or changed:
        load, kind = f"import hywia_kernels  # makes transformers know the layers\n{load}", "adaptive"
        if remote:
            kind = "adaptive-remote"
    model = f"model = {model_class}.from_pretrained({name!r}{trust})\n"
    if kind == "adaptive-remote":
        load = "import hywia_kernels\n\n"
        model = f"model, tokenizer = hywia_kernels.load({name!r}{trust})"
    else:
        model += f"{other} = {others}.from_pretrained({name!r}{trust})"
    return {
        "kind": kind,
        "reason": reason if isinstance(reason, str) else None,
        "code": _fenced(load + model, "python"),
    }


def _reduced(reduction: run_record.Reduction | None) -> dict[str, str] | None:
    """A reduction as the template writes it."""
    if reduction is None:
        return None
    return {
        "before": f"{reduction.before:,}",
        "after": f"{reduction.after:,}",
        "removed": f"{reduction.removed:,}",
        "share": f"{100 * reduction.share:.2f} %",
    }


def _evaluated(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """The evaluation as the template writes it; None where the record holds none."""
    evaluation = run_record.mapping(record.get("evaluation"))
    before, after = (run_record.mapping(evaluation.get(side)) for side in ("before", "after"))
    rows = compare(before, after)
    if not rows:
        return None
    continued = [
        (side, _fenced(values["continuation"], "text"))
        for side, values in (("before", before), ("after", after))
        if isinstance(values.get("continuation"), str)
    ]
    device = evaluation.get("device")
    return {
        "rows": [(row.metric.detail, row.before, row.after, row.ratio) for row in rows],
        "text": run_record.evaluation_text(record),
        "prompt": run_record.prompt_of(record),
        "device": device if isinstance(device, str) else None,
        "continued": continued,
    }


def model_card(
    record: Mapping[str, Any],
    base: str | None,
    folder: Path,
    *,
    name: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> str:
    """The card as Markdown with a YAML head.

    Args:
        record: content of the directory's `hywia.json`; what it does not hold is left out of the card.
        base: the model that was cut, a hub id or a directory; its card, where this machine has it, gives the licence.
        folder: the directory.
        name: what the model is called; None: the directory's name.
        config: the content of the model's config.json, which says how it loads; None: the directory's.
    """
    from huggingface_hub import ModelCard, ModelCardData

    name = folder.absolute().name if name is None else name
    config = _read_json(folder / "config.json") if config is None else config
    metadata = _base_metadata(base) if base is not None else {}
    hub_id = _hub_id(base, metadata)
    loading = _loading(record, config, name)
    cut, total = run_record.reduction(record)
    tags = [*TAGS, *(["custom_code"] if loading["kind"] != "stock" else [])]
    head = ModelCardData(
        base_model=hub_id,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=tags,
        **_licence(metadata, hub_id),
    )
    command = run_record.command_line(record)
    steps = record.get("history")
    body = render(
        TEMPLATE,
        {
            "name": name,
            "base": hub_id or (Path(base).name or base if base is not None else None),
            "link": _Markdown(f"[{escape_markdown(hub_id)}](https://huggingface.co/{hub_id})") if hub_id else None,
            "cut": _reduced(cut),
            "total": _reduced(total),
            "cuts": 1 + len(steps) if isinstance(steps, list) else 1,
            "evaluation": _evaluated(record),
            "loading": loading,
            "kinds": [
                (k.kind, run_record.spans(k.before) if k.before else "", run_record.spans(k.after))
                for k in run_record.kind_widths(record)
            ],
            "settings": run_record.settings(record),
            "command": _fenced(command, "sh") if command is not None else None,
            "versions": ", ".join(f"{k} {v}" for k, v in run_record.versions_of(record).items()),
            "licence": "license" in metadata,
            "recovered": run_record.recovery_text(record),
        },
        escape=escape_markdown,
    )
    return str(ModelCard(f"---\n{head.to_yaml()}\n---\n\n{body.strip()}\n", ignore_metadata_errors=True))


def _sealed(card: str) -> str:
    """The card with a digest of itself, by which an edited card is known."""
    card = card.rstrip("\n") + "\n"
    return f"{card}\n<!-- card of hywia_kernels {hashlib.sha256(card.encode()).hexdigest()} -->\n"


def _is_ours(text: str) -> bool:
    """Whether a card is as this package wrote it."""
    seal = _SEAL.search(text)
    return seal is not None and hashlib.sha256(text[: seal.start()].encode()).hexdigest() == seal.group(1)


def write_card(
    folder: str | Path,
    record: Mapping[str, Any],
    *,
    name: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> bool:
    """Write README.md into a directory, or renew it there; a README.md that somebody wrote or edited is kept.

    Args:
        folder: the directory. record: content of its `hywia.json`. name, config: as `model_card` takes them.

    Returns:
        Whether it was written.

    Raises:
        HywiaError: it cannot be written, or the record is damaged.
    """
    path = Path(folder) / CARD
    try:
        if path.is_symlink() or (path.exists() and not _is_ours(path.read_text(encoding="utf-8", errors="replace"))):
            return False
        with run_record.reading():
            base = run_record.base_of(record)
            content = _sealed(model_card(record, base, Path(folder), name=name, config=config))
    except OSError as error:
        raise HywiaError(f"cannot write {path}: {error.strerror or error}") from error
    atomic_directory.write_text(path, content, "card")
    return True
