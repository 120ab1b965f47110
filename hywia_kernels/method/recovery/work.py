"""The folder in which a recovery keeps what it needs to go on after it was stopped."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ...errors import HywiaError
from .text import Text

__all__ = ["Work", "beside", "opened"]

_REQUEST, _TEXT = "request.json", "text.safetensors"


def beside(output: str | Path) -> Path:
    """Where a recovery of a directory keeps its state: beside it, hidden."""
    path = Path(output).absolute()
    return path.parent / f".{path.name}.hywia-recovery"


class Work:
    """A folder of one request: its text, the dense model's predictions where they are kept, and checkpoints.

    Attributes:
        folder: of all of it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def checkpoints(self, student: str) -> Path:
        """The folder of checkpoints of a cut model, by its fingerprint; those of another one are deleted."""
        folder, mark = self.folder / "checkpoints", self.folder / "student.txt"
        try:
            known = mark.read_text(encoding="utf-8")
        except OSError:
            known = ""
        if known != student:
            shutil.rmtree(folder, ignore_errors=True)
            mark.write_text(student, encoding="utf-8")
        return folder

    @property
    def predictions(self) -> Path:
        return self.folder / "predictions"

    def text(self) -> Text | None:
        """What `keep_text` kept, or None."""
        try:
            tensors = load_file(self.folder / _TEXT)
            record = json.loads((self.folder / "text.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, SafetensorError):
            return None
        return Text(tensors["train"], tensors["held_out"], record)

    def keep_text(self, text: Text) -> None:
        save_file({"train": text.train, "held_out": text.held_out}, self.folder / _TEXT)
        (self.folder / "text.json").write_text(json.dumps(text.record), encoding="utf-8")


@contextmanager
def opened(folder: Path | None, request: Mapping[str, Any]) -> Iterator[Work]:
    """The folder for a request, which stays when the block is left by an error or an interrupt, and goes when it is
    done; what another request left is deleted. None: a temporary folder, which always goes.

    Args:
        request: whatever must be the same for a run to go on; JSON.

    Raises:
        HywiaError: the folder cannot be made.
    """
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="hywia-recovery-") as made:
            yield Work(Path(made))
        return
    known = json.dumps(request, sort_keys=True)
    try:
        before = (folder / _REQUEST).read_text(encoding="utf-8")
    except (OSError, ValueError):
        before = None
    try:
        if before != known:
            if before is not None:
                shutil.rmtree(folder)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / _REQUEST).write_text(known, encoding="utf-8")
    except OSError as error:
        raise HywiaError(f"recover: cannot write {folder}: {error.strerror or error}") from error
    yield Work(folder)
    shutil.rmtree(folder, ignore_errors=True)
