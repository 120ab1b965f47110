"""Which files hold the weights: by the index, whole, and never what only lies beside."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file

from hywia_kernels import HywiaError
from hywia_kernels.checkpoint.file_kinds import check_kind, read_json
from hywia_kernels.checkpoint.weight_files import (
    INDEX,
    SINGLE,
    named_files,
    stored_tensors,
    weight_bytes_stored,
    weight_files,
)

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def write(path, **tensors):
    save_file(tensors or {"w": torch.ones(2, 3)}, path, metadata={"format": "pt"})
    return path


@pytest.fixture
def sharded(tmp_path):
    write(tmp_path / SHARDS[0], a=torch.ones(2, 3))
    write(tmp_path / SHARDS[1], b=torch.ones(4, dtype=torch.bfloat16))
    index(tmp_path, {"a": SHARDS[0], "b": SHARDS[1]})
    return tmp_path


def index(folder, weight_map):
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def names(folder):
    return [file.name for file in weight_files(folder)]


def test_one_file_and_what_lies_beside(tmp_path):
    write(tmp_path / SINGLE)
    for other in ("adapter_model.safetensors", "consolidated.safetensors", "consolidated.00.safetensors", SHARDS[0]):
        write(tmp_path / other)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    assert names(tmp_path) == [SINGLE]
    assert weight_bytes_stored(tmp_path) == (tmp_path / SINGLE).stat().st_size


def test_the_index_decides(sharded):
    for other in ("consolidated.safetensors", "adapter_model.safetensors", "model-00003-of-00003.safetensors"):
        write(sharded / other)
    assert names(sharded) == list(SHARDS)
    assert names(str(sharded)) == list(SHARDS)
    assert [file.name for file in named_files(sharded)] == list(SHARDS)
    assert weight_bytes_stored(sharded) == sum((sharded / name).stat().st_size for name in SHARDS)
    found = stored_tensors(sharded)
    assert {k: (v.file.name, v.dtype, v.shape, v.bytes) for k, v in found.items()} == {
        "a": (SHARDS[0], "F32", (2, 3), 24),
        "b": (SHARDS[1], "BF16", (4,), 8),
    }


def test_a_file_beside_an_index(sharded):
    write(sharded / SINGLE)
    with pytest.raises(HywiaError, match="holds both model.safetensors and model.safetensors.index.json"):
        weight_files(sharded)
    for name in SHARDS:  # what a later save in one file leaves
        (sharded / name).unlink()
    assert names(sharded) == [SINGLE]
    index(sharded, {"w": SINGLE})
    assert names(sharded) == [SINGLE]


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (
            {"a": "pytorch_model-00001-of-00002.bin"},
            r"expected a \*\.safetensors file; a pickle can run",
        ),
        ({"a": "../other/model.safetensors"}, "expected a file of the same directory"),
        ({"a": "/etc/model.safetensors"}, "expected a file of the same directory"),
        ({"a": "sub/model.safetensors"}, "expected a file of the same directory"),
        ({"a": "..\\model.safetensors"}, "expected a file of the same directory"),
        ({"a": ".."}, "expected a file of the same directory"),
        ({"a": ""}, "expected a file of the same directory"),
        ({"a": 3}, "names 3 for 'a': expected a file"),
        ({"a": None}, "names None for 'a': expected a file"),
        ({"a": "adapter_model.safetensors"}, "that is an adapter"),
        ({"a": "consolidated.safetensors"}, "original"),
        ({"a": "model-00007-of-00009.safetensors"}, "model-00007-of-00009.safetensors: it is missing"),
        ({}, "expected an object 'weight_map'"),
        ([SHARDS[0]], "expected an object 'weight_map'"),
    ],
)
def test_an_index_that_names_other_things(sharded, weight_map, message):
    write(sharded / "adapter_model.safetensors")
    write(sharded / "consolidated.safetensors")
    (sharded / "pytorch_model-00001-of-00002.bin").write_bytes(pickle.dumps({}))
    index(sharded, weight_map)
    with pytest.raises(HywiaError, match=message):
        weight_files(sharded)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "index.json: it is empty"),
        (b"[]", "expected a JSON object, got list"),
        (b"{", "expected JSON"),
        (b"\xff\xfe", "expected JSON"),
        (b'{"weight_map": NaN}', "NaN, which is no number"),
        (b"[" * 100_000, "expected JSON"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
    ],
)
def test_a_damaged_index(sharded, content, message):
    (sharded / INDEX).write_bytes(content)
    with pytest.raises(HywiaError, match=message):
        weight_files(sharded)


def test_tensors_twice_or_elsewhere(sharded):
    write(sharded / SHARDS[1], a=torch.ones(1), b=torch.ones(1))
    with pytest.raises(HywiaError, match=f"both {SHARDS[0]} and {SHARDS[1]} in .* hold 'a'"):
        stored_tensors(sharded)
    write(sharded / SHARDS[1], c=torch.ones(1))
    with pytest.raises(HywiaError, match=f"'b' is in {SHARDS[1]}, which does not hold it"):
        stored_tensors(sharded)


def header(text: bytes, data: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty; fetch it again"),
        (b"\x00" * 5, "it is no safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer, .*git lfs pull"),
        (b"<html><body>404</body></html>", "web page"),
        (b"\n <?xml version='1.0'?><Error/>", "web page"),
        (pickle.dumps({"a": 1}), "pickle under another name"),
        (b"PK\x03\x04" + b"\x00" * 40, "pickle under another name"),
        (b"GGUF\x03\x00\x00\x00" + b"\x00" * 40, "GGUF file under another name"),
        (b"not there yet", "it is no safetensors file"),
        ((1 << 62).to_bytes(8, "little") + b"{}", "it is no safetensors file"),
        (header(b"{}"), "it holds no tensor"),
        (header(b"{oh}"), "its header is no JSON"),
        (header(b'{"w":3}'), "its header says 3 of 'w'"),
        (header(b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', b"\x00" * 4), "its header says"),
        (header(b'{"w":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', b"\x00" * 4), "its header says"),
        (header(b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"\x00" * 3), "cut short, expected 66"),
        (header(b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"\x00" * 5), "damaged, expected 66"),
        (
            header(b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}')[:40],
            "cut short, expected 62 bytes",
        ),
    ],
)
def test_files_that_are_not_what_their_name_says(tmp_path, content, message):
    (tmp_path / SINGLE).write_bytes(content)
    with pytest.raises(HywiaError, match=message) as refused:
        weight_files(tmp_path)
    assert str(tmp_path / SINGLE) in str(refused.value)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (("pytorch_model.bin",), r"as a pickle \(pytorch_model\.bin\)"),
        (("pytorch_model.bin", "unrelated.safetensors"), "as a pickle .* beside unrelated.safetensors"),
        (("model.PTH",), r"as a pickle \(model\.PTH\)"),
        (("adapter_model.safetensors",), "holds an adapter .*merge_and_unload"),
        (("adapter_model.bin",), "holds an adapter"),
        (("consolidated.safetensors", "params.json"), "original layout .*convert_llama_weights_to_hf"),
        (("consolidated.00.pth", "params.json"), "original layout"),
        (("weights.safetensors",), "holds weights.safetensors, but neither"),
        (SHARDS, "but no model.safetensors.index.json, which says what is in which file"),
        (("training_args.bin",), r"holds no \*\.safetensors file"),
        ((), r"holds no \*\.safetensors file"),
    ],
)
def test_directories_without_weights(tmp_path, files, message):
    for name in files:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(HywiaError, match=message):
        weight_files(tmp_path)


def test_links(tmp_path):
    """The hub's cache is made of links; what they lead to is judged, and a link that leads nowhere is named."""
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    folder.mkdir()
    write(blobs / "0123")
    (folder / SINGLE).symlink_to(blobs / "0123")
    assert names(folder) == [SINGLE]
    assert weight_bytes_stored(folder) == (blobs / "0123").stat().st_size
    (blobs / "0123").write_bytes(pickle.dumps({}))
    with pytest.raises(HywiaError, match="pickle under another name"):
        weight_files(folder)
    (blobs / "0123").unlink()
    with pytest.raises(HywiaError, match="it leads nowhere"):
        weight_files(folder)
    (folder / SINGLE).unlink()
    (folder / SINGLE).mkdir()
    with pytest.raises(HywiaError, match="it is no regular file"):
        weight_files(folder)
    with pytest.raises(HywiaError, match="no such directory"):
        weight_files(tmp_path / "nowhere")


def test_json_files(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(HywiaError, match="cannot read .*config.json"):
        read_json(path)
    path.write_text('\ufeff{"a": 1}', encoding="utf-8")
    assert read_json(path) == {"a": 1}
    check_kind(path)
    path.write_text('{"a": %s}' % ("9" * 6000))
    with pytest.raises(HywiaError, match="expected JSON"):
        read_json(path)
