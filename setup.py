"""Builds the C++ extensions with CMake; everything else about the package is in pyproject.toml.

HYWIA_BUILD=auto          the CPU kernels, and the CUDA ones where nvcc is found; says what it left out (default)
HYWIA_BUILD=none          nothing: Triton and plain torch only
HYWIA_BUILD=cpu | cuda    exactly these (cuda includes cpu); fails where it cannot
HYWIA_CUDA_ARCHITECTURES  GPUs to compile for, e.g. "90a;80"; default: this machine's own, else sm_80, sm_90a and PTX
MAX_JOBS                  compiler processes at once
"""

import contextlib
import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "none", "cpu", "cuda")
# sm_80 code runs on every 8.x GPU, sm_90a code on 9.0 alone; newer GPUs compile the PTX of plain compute_90.
PORTABLE = "80-real;90a-real;90-virtual"


def build_mode(environment) -> str:
    mode = environment.get("HYWIA_BUILD", "").strip().lower() or "auto"
    if mode not in MODES:
        raise SystemExit(f"HYWIA_BUILD: expected one of {', '.join(MODES)}, got {mode!r}")
    return mode


def find_nvcc(environment) -> str | None:
    candidates = [environment.get("CUDACXX"), shutil.which("nvcc", path=environment.get("PATH"))]
    candidates += [f"{home}/bin/nvcc" for home in (environment.get("CUDA_HOME"), "/usr/local/cuda") if home]
    return next((found for c in candidates if c and (found := shutil.which(c))), None)


def visible_capabilities() -> list[str]:
    """Compute capabilities of this machine's GPUs, e.g. ["9.0"]; empty without a driver."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return re.findall(r"^\d+\.\d+$", answer, re.MULTILINE)


def architectures(environment, capabilities: list[str]) -> str:
    """Value of CMAKE_CUDA_ARCHITECTURES: what was asked for, else the visible GPUs, else the portable set."""
    wanted = [a for a in re.split(r"[;,\s]+", environment.get("HYWIA_CUDA_ARCHITECTURES", "")) if a]
    for name in wanted:
        if not re.fullmatch(r"\d{2,3}[af]?(-real|-virtual)?", name):
            raise SystemExit(f'HYWIA_CUDA_ARCHITECTURES: expected numbers such as "90a;80", got {name!r}')
    if not wanted:
        numbers = sorted({c.replace(".", "") for c in capabilities}, key=int)
        wanted = [f"{n}a-real" if n == "90" else f"{n}-real" for n in numbers]
    return ";".join(wanted) or PORTABLE


def tools_environment(environment) -> dict[str, str]:
    """The environment with the cmake and ninja of this Python first on PATH, ahead of the system's older ones."""
    directories = []
    for module, attribute in (("cmake", "CMAKE_BIN_DIR"), ("ninja", "BIN_DIR")):
        with contextlib.suppress(ImportError, AttributeError):
            directories.append(str(getattr(importlib.import_module(module), attribute)))
    return {**environment, "PATH": os.pathsep.join([*directories, environment.get("PATH", os.defpath)])}


class CMakeBuild(build_ext):
    """Builds each extension in its own CMake tree, so that a failing one leaves the other standing."""

    def build_extension(self, extension: Extension) -> None:
        mode, kind = build_mode(os.environ), extension.name.rpartition(".")[2].lstrip("_")  # native or cuda
        try:
            self.run_cmake(extension, kind)
        except (OSError, subprocess.CalledProcessError) as error:
            variable = "CUDACXX" if kind == "cuda" else "CXX"
            why = f"{error.cmd[0]} failed" if isinstance(error, subprocess.CalledProcessError) else error
            message = f"{extension.name} did not compile ({why}); see the output above, set {variable} or HYWIA_BUILD"
            if mode != "auto":
                raise SystemExit(f"HYWIA_BUILD={mode}: {message}") from error
            print(f"HYWIA_BUILD=auto: left out: {message}", file=sys.stderr, flush=True)

    def run_cmake(self, extension: Extension, kind: str) -> None:
        import pybind11

        build = Path(self.build_temp).resolve() / kind
        target = Path(self.get_ext_fullpath(extension.name)).resolve().parent
        options = [
            f"-DHYWIA_CPU={'ON' if kind == 'native' else 'OFF'}",
            f"-DHYWIA_CUDA={'ON' if kind == 'cuda' else 'OFF'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            "-DCMAKE_BUILD_TYPE=Release",
        ]
        if kind == "cuda":
            options.append(f"-DCMAKE_CUDA_COMPILER={find_nvcc(os.environ)}")
            options.append(f"-DCMAKE_CUDA_ARCHITECTURES={architectures(os.environ, visible_capabilities())}")
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        # A tree left by another build environment names a Python and a compiler that may be gone.
        shutil.rmtree(build, ignore_errors=True)
        configure = ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build), *options]
        compile_ = ["cmake", "--build", str(build), "--parallel", jobs]
        fresh = build / "installed"
        install = ["cmake", "--install", str(build), "--prefix", str(fresh)]
        for command in (configure, compile_, install):
            subprocess.run(command, check=True, env=tools_environment(os.environ))
        # By renaming: a file rewritten in place pulls the code from under every process that has it mapped.
        target.mkdir(parents=True, exist_ok=True)
        for made in fresh.iterdir():
            beside = target / f".{made.name}.new"
            shutil.copy2(made, beside)
            os.replace(beside, target / made.name)

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if os.path.exists(path)]  # less what `auto` left out


def extensions(environment) -> list[Extension]:
    mode = build_mode(environment)
    names = {"none": [], "cpu": ["_native"]}.get(mode, ["_native", "_cuda"])
    if "_cuda" in names and find_nvcc(environment) is None:
        looked = "nvcc not found in CUDACXX, PATH, CUDA_HOME/bin or /usr/local/cuda/bin"
        if mode == "cuda":
            raise SystemExit(f"HYWIA_BUILD=cuda: {looked}; install the CUDA toolkit, or set HYWIA_BUILD=cpu")
        print(f"HYWIA_BUILD=auto: left out: hywia_kernels._cuda ({looked})", file=sys.stderr, flush=True)
        names.remove("_cuda")
    # Optional to setuptools: what `auto` leaves out may be missing when the outputs are collected.
    return [Extension(f"hywia_kernels.{name}", sources=[], optional=mode == "auto") for name in names]


if __name__ == "__main__":
    setup(ext_modules=extensions(os.environ), cmdclass={"build_ext": CMakeBuild})
