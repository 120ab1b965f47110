"""What importing the package adds: two classes registered with transformers, at once or when it is imported."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import subprocess
import sys
import threading
import types

import pytest

from hywia_kernels.checkpoint import adaptive


def finders():
    return [f for f in sys.meta_path if type(f).__name__ == "_AfterImport"]


def test_registering_again_adds_nothing():
    before = list(sys.meta_path)
    adaptive.register()
    adaptive.register()
    assert sys.meta_path == before
    assert len(finders()) == 1


@pytest.fixture
def watched(tmp_path, monkeypatch):
    """A module `watched_module` after whose import `steps` grows."""
    (tmp_path / "watched_module.py").write_text("value = 3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    steps: list[int] = []
    monkeypatch.setitem(adaptive._AFTER, "watched_module", lambda: steps.append(sys.modules["watched_module"].value))
    yield steps
    sys.modules.pop("watched_module", None)


def test_the_step_follows_the_import_and_every_reload(watched):
    module = importlib.import_module("watched_module")
    assert watched == [3]
    assert isinstance(module.__spec__.loader, importlib.machinery.SourceFileLoader)
    assert module.__loader__ is module.__spec__.loader
    importlib.reload(module)
    assert watched == [3, 3]


def test_looking_for_a_module_runs_nothing(watched):
    spec = importlib.util.find_spec("watched_module")
    assert spec.origin.endswith("watched_module.py")
    assert spec.loader.get_source("watched_module") == "value = 3\n"
    assert watched == []


def test_threads_look_and_import_at_once(watched):
    specs, start = [], threading.Barrier(8)

    def look():
        start.wait()
        for _ in range(50):
            specs.append(importlib.util.find_spec("watched_module") is not None)

    def load():
        start.wait()
        importlib.import_module("watched_module")

    threads = [threading.Thread(target=look) for _ in range(6)] + [threading.Thread(target=load) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert specs == [True] * 300
    assert watched == [3]


def test_other_finders_keep_their_say(watched, monkeypatch):
    class Loader(importlib.abc.Loader):
        def exec_module(self, module):
            module.value = 7

    class Finder:
        def find_spec(self, name, path, target=None):
            return importlib.machinery.ModuleSpec(name, Loader()) if name == "watched_module" else None

    monkeypatch.setattr(sys, "meta_path", [types.SimpleNamespace(), Finder(), *sys.meta_path])
    sys.meta_path.remove(finders()[0])
    sys.meta_path.insert(0, adaptive._AfterImport())
    assert importlib.import_module("watched_module").value == 7
    assert watched == [7]


def test_a_step_that_fails_leaves_the_import_whole(watched, monkeypatch):
    def fail():
        raise ImportError("no such class")

    monkeypatch.setitem(adaptive._AFTER, "watched_module", fail)
    with pytest.warns(RuntimeWarning, match="no such class"):
        module = importlib.import_module("watched_module")
    assert module.value == 3


def test_in_a_new_interpreter_before_and_after_transformers():
    code = (
        "import sys, threading, importlib.util; before = list(sys.meta_path); import hywia_kernels;"
        "assert [type(f).__name__ for f in sys.meta_path if f not in before] == ['_AfterImport'];"
        "t = [threading.Thread(target=importlib.util.find_spec, args=('transformers',)) for _ in range(4)];"
        "[x.start() for x in t]; from transformers import AutoConfig, AutoModelForCausalLM; [x.join() for x in t];"
        "from transformers.models.auto.configuration_auto import CONFIG_MAPPING;"
        "print('hywia_adaptive' in CONFIG_MAPPING);"
        "print(CONFIG_MAPPING['hywia_adaptive'] in AutoModelForCausalLM._model_mapping)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, ["True", "True"]), done.stderr


def test_in_a_new_interpreter_where_the_classes_themselves_come_first():
    """Their import is what imports transformers, in whose middle they are not made yet."""
    code = (
        "from hywia_kernels.checkpoint.adaptive.modeling_hywia_adaptive import HywiaAdaptiveForCausalLM as made;"
        "from transformers import AutoModelForCausalLM; from transformers.models.auto.configuration_auto import *;"
        "print(AutoModelForCausalLM._model_mapping[CONFIG_MAPPING['hywia_adaptive']] is made)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, ["True"]), done.stderr
