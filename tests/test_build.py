"""The decisions of setup.py, and (slow) that a source distribution builds by itself."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import types
import zipfile
from pathlib import Path

import pytest
import torch

from hywia_kernels.ops import cuda

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="runs from a source tree only")


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("hywia_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)  # its call of setup() is guarded
    return module


@pytest.fixture
def nvcc(tmp_path) -> str:
    """A stand-in that is executable and never run."""
    path = tmp_path / "cuda" / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return str(path)


def names(extensions) -> list[str]:
    return [e.name for e in extensions]


@pytest.mark.parametrize(
    ("value", "mode"), [(None, "auto"), ("", "auto"), ("auto", "auto"), ("CPU", "cpu"), (" cuda ", "cuda")]
)
def test_build_mode(build, value, mode):
    assert build.build_mode({} if value is None else {"HYWIA_BUILD": value}) == mode


def test_unknown_build_mode_names_the_choices(build):
    with pytest.raises(SystemExit, match="HYWIA_BUILD: expected one of auto, none, cpu, cuda, got 'bogus'"):
        build.build_mode({"HYWIA_BUILD": "bogus"})


def test_nvcc_is_searched_in_order(build, nvcc, tmp_path):
    home = str(Path(nvcc).parent.parent)
    assert build.find_nvcc({"CUDACXX": nvcc, "PATH": str(tmp_path)}) == nvcc
    assert build.find_nvcc({"PATH": str(Path(nvcc).parent)}) == nvcc
    assert build.find_nvcc({"PATH": str(tmp_path), "CUDA_HOME": home}) == nvcc
    assert build.find_nvcc({"PATH": str(tmp_path), "CUDACXX": "/nowhere/nvcc", "CUDA_HOME": home}) == nvcc


def test_extensions_by_mode(build, nvcc):
    with_nvcc = {"CUDACXX": nvcc, "PATH": ""}
    both = ["hywia_kernels._native", "hywia_kernels._cuda"]
    assert names(build.extensions({**with_nvcc, "HYWIA_BUILD": "none"})) == []
    assert names(build.extensions({**with_nvcc, "HYWIA_BUILD": "cpu"})) == both[:1]
    assert names(build.extensions({**with_nvcc, "HYWIA_BUILD": "cuda"})) == both
    assert names(build.extensions(with_nvcc)) == both


def test_without_nvcc(build, monkeypatch, capsys):
    monkeypatch.setattr(build, "find_nvcc", lambda environment: None)
    assert names(build.extensions({})) == ["hywia_kernels._native"]
    assert "left out: hywia_kernels._cuda (nvcc not found" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"HYWIA_BUILD=cuda: nvcc not found .* install the CUDA toolkit"):
        build.extensions({"HYWIA_BUILD": "cuda"})


@pytest.mark.parametrize(
    ("wanted", "capabilities", "expected"),
    [
        ("", [], "80-real;90a-real;90-virtual"),
        ("", ["9.0", "9.0"], "90a-real"),
        ("", ["12.0", "8.9"], "89-real;120-real"),
        ("90a;80", ["8.6"], "90a;80"),
        ("80-real, 90-virtual", [], "80-real;90-virtual"),
    ],
)
def test_architectures(build, wanted, capabilities, expected):
    assert build.architectures({"HYWIA_CUDA_ARCHITECTURES": wanted}, capabilities) == expected


@pytest.mark.parametrize("wanted", ["hopper", "9.0", "90;sm_80"])
def test_malformed_architectures(build, wanted):
    with pytest.raises(SystemExit, match="HYWIA_CUDA_ARCHITECTURES: expected numbers"):
        build.architectures({"HYWIA_CUDA_ARCHITECTURES": wanted}, [])


def test_architectures_without_a_driver(build, monkeypatch):
    def absent(*args, **kwargs):
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(build.subprocess, "run", absent)
    assert build.visible_capabilities() == []


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        ("80-real 90a-real 90-virtual", (8, 0), True),
        ("80-real 90a-real 90-virtual", (8, 9), True),
        ("80-real 90a-real 90-virtual", (9, 0), True),
        ("80-real 90a-real 90-virtual", (12, 0), True),  # from PTX
        ("80-real 90a-real 90-virtual", (7, 5), False),
        ("90a-real", (8, 0), False),
        ("90a-real", (10, 0), False),  # architecture-specific code runs on its own architecture alone
        ("90a", (10, 3), False),
        ("86-real", (8, 0), False),
        ("100f-real", (10, 3), True),
        ("80", (9, 0), True),
    ],
)
def test_covered_gpus(built, capability, runs):
    assert cuda.covers(built, capability) is runs


@pytest.mark.parametrize(
    ("capability", "built", "dtype", "reason"),
    [
        ((9, 0), "80-real 90a-real 90-virtual", torch.bfloat16, None),
        ((9, 0), "90a", torch.float16, None),
        ((9, 0), "90a-real", torch.float32, "it takes torch.bfloat16 and torch.float16, got torch.float32"),
        ((9, 0), "80-real 90-virtual", torch.bfloat16, "built for 80-real 90-virtual, without 90a; reinstall"),
        ((9, 0), "90", torch.bfloat16, "built for 90, without 90a; reinstall"),
        ((8, 0), "80-real 90a-real", torch.bfloat16, "run on compute capability 9.0, got 8.0"),
        ((10, 0), "90a-real 90-virtual", torch.bfloat16, "run on compute capability 9.0, got 10.0"),
    ],
)
def test_kernels_that_need_hopper(monkeypatch, capability, built, dtype, reason):
    """Code compiled without Hopper's own instructions has nothing in those kernels: it must not be taken."""
    monkeypatch.setattr(cuda, "_extension", lambda: types.SimpleNamespace(architectures=built))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    operands = (torch.zeros(8, 16, dtype=dtype), torch.zeros(8, 24, dtype=dtype), torch.zeros(16, 24, dtype=dtype))
    refused = cuda._linear(*operands)
    assert refused is None if reason is None else reason in str(refused)


@pytest.mark.parametrize("name", ["grad_output", "input", "weight", "mapped"])
def test_layouts_that_the_copy_engine_does_not_take(monkeypatch, name):
    monkeypatch.setattr(cuda, "_extension", lambda: types.SimpleNamespace(architectures="90a"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    shapes = {"grad_output": (8, 16), "input": (8, 24), "weight": (16, 24), "mapped": (8, 16)}
    made = {n: torch.zeros(shape).bfloat16() for n, shape in shapes.items()}
    assert cuda._linear(**made) is None
    rows, columns = shapes[name]
    whole = torch.zeros(rows, columns + 16).bfloat16()
    odd = (whole[:, 4 : 4 + columns], torch.zeros(rows, columns + 4).bfloat16()[:, :columns])
    assert cuda._linear(**{**made, name: whole[:, 8 : 8 + columns]}) is None
    for tensor in odd:
        refused = cuda._linear(**{**made, name: tensor})
        assert str(refused).startswith(f"{name}: it takes contiguous rows that begin at multiples of 16 bytes, got")


def test_a_failing_compiler_is_left_out_or_refused(build, monkeypatch, capsys):
    from setuptools import Distribution, Extension

    command = build.CMakeBuild(Distribution())
    monkeypatch.setattr(build.shutil, "rmtree", lambda *args, **kwargs: None)

    def fails(*args, **kwargs):
        raise subprocess.CalledProcessError(1, "cmake")

    monkeypatch.setattr(command, "run_cmake", fails)
    extension = Extension("hywia_kernels._native", sources=[])
    monkeypatch.setenv("HYWIA_BUILD", "auto")
    command.build_extension(extension)
    assert "left out: hywia_kernels._native did not compile" in capsys.readouterr().err
    monkeypatch.setenv("HYWIA_BUILD", "cpu")
    with pytest.raises(SystemExit, match=r"HYWIA_BUILD=cpu: hywia_kernels\._native did not compile"):
        command.build_extension(extension)


@pytest.mark.slow
def test_source_distribution(tmp_path):
    """The sdist holds what the build needs, a wheel comes out of it, and a wrong HYWIA_BUILD stops it."""
    tree = tmp_path / "tree"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.so", "__pycache__")
    shutil.copytree(ROOT, tree, ignore=ignored)
    environment = {**os.environ, "HYWIA_BUILD": "none"}
    sdist = "from setuptools.build_meta import build_sdist; print(build_sdist('dist'))"
    subprocess.run([sys.executable, "-c", sdist], cwd=tree, env=environment, check=True, capture_output=True)
    (archive,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        members = {name.partition("/")[2] for name in tar.getnames()}
    assert {"setup.py", "CMakeLists.txt", "pyproject.toml"} <= members
    assert {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir()} <= members
    package = {str(path.relative_to(tree)) for path in (tree / "hywia_kernels").rglob("*") if path.is_file()}
    assert {"hywia_kernels/py.typed", "hywia_kernels/method/data/alice.txt"} <= package <= members

    def wheel(mode: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index"]
        return subprocess.run(
            [*command, "-w", str(tmp_path / "wheels"), str(archive)],
            env={**environment, "HYWIA_BUILD": mode},
            capture_output=True,
            text=True,
        )

    built = wheel("none")
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = (tmp_path / "wheels").glob("*.whl")
    with zipfile.ZipFile(path) as zipped:
        contents = zipped.namelist()
    assert package <= set(contents)
    assert not [name for name in contents if name.endswith((".so", ".cu", ".cpp"))]

    refused = wheel("bogus")
    assert refused.returncode != 0
    assert "HYWIA_BUILD: expected one of auto, none, cpu, cuda, got 'bogus'" in refused.stdout + refused.stderr
