"""Which device's figures a plan rests on: its own, another's, or none; and what is said of it."""

from __future__ import annotations

import json

import pytest
import torch

import hywia_kernels as hk
from hywia_kernels import UsageError
from hywia_kernels.deploy import device_profiles, planning
from tests.support.tiny import TINY, fresh

H100 = "NVIDIA H100 80GB HBM3"


@pytest.fixture
def gpu(monkeypatch):
    """A machine with one GPU of that name and capability."""

    def has(name, capability=(9, 0)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    return has


def test_the_measured_device_is_measured(gpu):
    gpu(H100)
    target = device_profiles.at_hand()
    assert (target.device, target.measured, target.borrowed) == (H100, True, "")
    assert target.described() == H100


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA H200",
        "NVIDIA GH200 480GB",
        "NVIDIA H100 PCIe",
        "NVIDIA H100 NVL",
        "NVIDIA H800",
        "NVIDIA H20",
        "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
    ],
)
def test_others_of_its_architecture_borrow_and_say_so(gpu, name):
    gpu(name)
    target = device_profiles.resolve("auto")
    assert (target.device, target.measured, target.borrowed) == (name, False, H100)
    assert target.described() == f"{name} (not measured; figures of {H100})"
    assert target.tflop_s == device_profiles.resolve("h100").tflop_s


@pytest.mark.parametrize(
    ("name", "capability", "align"),
    [
        ("NVIDIA A100-SXM4-80GB", (8, 0), 64),
        ("NVIDIA H1000 of another kind", (12, 0), 64),
        ("NVIDIA H100 80GB HBM3", (10, 0), 64),  # of the name, and yet another chip
        ("AMD Instinct MI250X", (9, 0), 64),  # whose capability is counted otherwise
        ("NVIDIA B200", (10, 0), 64),
    ],
)
def test_devices_like_none_have_no_figures(gpu, name, capability, align):
    gpu(name, capability)
    target = device_profiles.at_hand()
    assert (target.device, target.align, target.measured, target.has_rates) == (name, align, False, False)
    assert target.described() == f"{name} (not measured)"


@pytest.mark.parametrize("name", ["h200", "gh200"])
def test_by_name_too(name):
    target = device_profiles.resolve(name)
    assert (target.name, target.measured, target.borrowed) == (name, False, H100)
    assert name.upper() in target.device


@pytest.mark.parametrize(("kind", "align"), [("cpu", 16), ("mps", 64), ("xpu", 64), ("meta", 64)])
def test_devices_that_are_no_gpus(gpu, kind, align):
    gpu(H100)
    target = device_profiles.at_hand(torch.device(kind))
    assert (target.device, target.align, target.measured) == (kind, align, False)


def test_plans_and_predictions_say_whose_figures_they_rest_on(gpu):
    scores = hk.score(fresh(TINY[0]), criterion="random", seed=5)
    for name, want in (("NVIDIA H200", f"NVIDIA H200 (not measured; figures of {H100})"), (H100, H100)):
        gpu(name)
        plan = planning.plan_for(scores, ratio=0.3, align=4)
        plan = planning.with_prediction(plan, fresh(TINY[0]))
        assert plan.record["target"] == plan.record["prediction"]["target"] == want
    gpu("NVIDIA B200", (10, 0))
    plan = planning.with_prediction(planning.plan_for(scores, ratio=0.3, align=4), fresh(TINY[0]))
    assert plan.record["target"] == "NVIDIA B200 (not measured)"
    assert plan.record["prediction"]["target"] == "NVIDIA B200 (not measured: by FLOPs)"


def good() -> dict:
    rates = {"64": {"64": 1.0, "128": 2.0}}
    table = {"up": rates, "down": rates}
    return dict(device="x", source="y", align=8, matmul_tflop_s=3.0, copy_gb_s=4.0, tflop_s=table)


@pytest.mark.parametrize(
    "change",
    [
        dict(align=None),
        dict(align=0),
        dict(align=[8]),
        dict(tflop_s={}),
        dict(tflop_s=[]),
        dict(tflop_s={"up": {"64": {"64": 1.0}}}),
        dict(tflop_s={"up": {"64": {"64": 1.0}}, "down": {"128": {"64": 1.0}}}),
        dict(tflop_s={"up": {"64": {}}, "down": {"64": {}}}),
        dict(tflop_s={"up": {"64": {"64": 0.0}}, "down": {"64": {"64": 1.0}}}),
        dict(tflop_s={"up": {"64": {"64": float("nan")}}, "down": {"64": {"64": 1.0}}}),
        dict(tflop_s={"up": {"many": {"64": 1.0}}, "down": {"64": {"64": 1.0}}}),
        dict(matmul_tflop_s="fast"),
        dict(matmul_tflop_s=None),
        dict(copy_gb_s=-1.0),
    ],
)
def test_damaged_profiles_are_refused(tmp_path, change):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(good()))
    assert device_profiles.resolve(path).measured
    path.write_text(json.dumps({**good(), **change}))
    with pytest.raises(UsageError, match=r"target: mine is no profile of bench_width \("):
        device_profiles.resolve(path)


@pytest.mark.parametrize("content", [b"", b"[]", b"3", b'"x"', b"null", b"\xff\xfe"])
def test_files_that_are_no_profiles_are_refused(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UsageError, match="target: "):
        device_profiles.resolve(tmp_path / "x.json")
