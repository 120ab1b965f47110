"""One launch of four processes, connected by gloo: the same bits by one, two and four of them, and one clear error."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from torch import distributed as dist

from hywia_kernels import HywiaError
from hywia_kernels.scale.ranks import Ranks

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """What `four_ranks.py` found."""
    into = tmp_path_factory.mktemp("ranks") / "found.json"
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=4"]
    done = subprocess.run(
        [*program, "-m", "tests.scale.four_ranks", str(into)], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(into.read_text())


FAMILIES = ("llama", "qwen3", "gpt2", "mixtral")
CASES = [f"{name} {kind} second" for name in FAMILIES for kind in ("equal", "ragged", "few")]
ALL = [f"{name} {kind} first second mixed" for name in FAMILIES for kind in ("ragged", "few")]
EXCHANGED = [*ALL, "llama equal first", "gpt2 equal mixed", "mixtral equal first mixed"]


@pytest.mark.parametrize("case", [*CASES, *EXCHANGED])
def test_the_same_bits_for_any_number_of_processes(launch, case):
    found = launch["bits"][case]
    assert found["runs"] == (3 if case.split()[1] == "few" else 8)
    assert list(found["bits"]) == ["1", "2", "4"]
    assert [len(digests) for digests in found["bits"].values()] == [1, 1, 1]  # all processes have the same
    assert len({digests[0] for digests in found["bits"].values()}) == 1


@pytest.mark.parametrize("case", [*CASES, *EXCHANGED])
def test_the_statistics_are_those_of_calibrate(launch, case):
    """To float32's rounding: of experts, whose products are of other sizes in a run than in the whole set, both are
    1.5e-6 from a plain loop in float64."""
    found = launch["bits"][case]
    assert 0.0 < found["worst"] < (3e-7 if "mixtral" not in case else 1e-6)
    assert found["same units"] is True
    assert found["same facts"] is True
    assert found["orders"] == case.split()[2:]


def test_only_what_does_not_add_up_changes_hands(launch):
    """Of a LLaMA layer a process receives `(R-1)/R · T · e · (c + w/R)` bytes; this is of all processes and layers."""
    assert {launch["bits"][case]["exchanged"] for case in CASES} == {0}
    ranks, tokens, layers, hidden, channels, q, kv = 4, 16 * 13, 3, 36, 44, 36, 12
    shared, own = 4 * hidden, q + 2 * kv + q + 3 * channels
    of_all = (ranks - 1) * tokens * 4 * (shared + own / ranks) * layers
    assert launch["bits"]["llama equal first"]["exchanged"] == pytest.approx(of_all, rel=0.05)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_weights_that_a_host_holds_together_give_the_same_bits(launch, name):
    """Each process has a quarter of every layer, or half where two are on a host; what pads a part is little."""
    found = launch["held together"][name]
    for hosts, share in (("1", 4), ("2", 2)):
        assert {told[0] for told in found[hosts]} == {found["alone"]}
        assert {told[1] for told in found[hosts]} == {"host"}
        moved = {told[2] for told in found[hosts]}
        assert len(moved) == 1
        assert found["layers"] / share <= moved.pop() < 1.3 * found["layers"] / share
    assert found["meta"] is True


@pytest.mark.parametrize("case", ["1-4 second", "4-2 second", "2-1 second", "4-2 first"])
def test_a_stopped_scoring_goes_on_with_another_number_of_processes(launch, case):
    found = launch["resumed"][case]
    gradients = [f"gradient-00001-{run:05d}.safetensors" for run in range(8)]
    layers = ["layer-00001.safetensors", "layer-00002.safetensors"]
    assert found["kept"] == [*gradients, *layers, "request.json", "state.json"]
    assert found["from"] == 1
    assert found["bits"] == launch["undisturbed"][case.split()[1]]
    assert found["left"] is False


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("recipe", "recipe: expected the same on all ranks, got a on rank 0 and b on rank 3; "),
        ("tokens", "tokens: expected the same on all ranks, got "),
        ("weights", "model.layers.1.mlp.up_proj: rank 3 read other weights than other ranks; "),
        ("nan", "loss: expected finite numbers, got NaN or Inf; "),
        ("orders", "orders: expected the same on all ranks, got second on rank 0 and first on rank 3; "),
        ("nan second", "model.layers.1.mlp.down_proj: expected finite gradients, got NaN or Inf; "),
        ("nan first", "model.layers.1.mlp.down_proj: expected finite gradients, got NaN or Inf; "),
    ],
)
def test_one_error_on_all_processes(launch, case, words):
    said = launch["errors"][case]
    assert len(set(said)) == 1
    assert said[0].startswith(words)


def test_a_process_that_hangs_is_named(launch):
    said = launch["hung"]
    assert said[2] == "nothing"
    assert len({said[0], said[1], said[3]}) == 1
    assert said[0].startswith("rank 2 (process ")
    assert "did not come to layer 7 within 3 s" in said[0]


def test_an_error_of_one_process_is_told_once(launch):
    assert [message for message, _ in launch["failed"]] == [
        "rank 1: out of everything",
        "out of everything",
        "rank 1: out of everything",
        "rank 1: out of everything",
    ]
    assert [tells for _, tells in launch["failed"]] == [True, False, False, False]


def test_a_process_that_loses_its_connections_before_it_is_gone_is_named(monkeypatch):
    """What is killed closes its sockets first, so that others feel it while it still seems to run."""
    other = subprocess.Popen(["sleep", "60"])
    ranks = Ranks()
    ranks.size, ranks._store = 2, dist.PrefixStore("hywia", dist.HashStore())
    ranks._processes.append(ranks._processes[0]._replace(pid=other.pid))
    timer = threading.Timer(0.3, other.kill)
    timer.start()
    try:
        with pytest.raises(HywiaError, match=rf"rank 1 \(process {other.pid} on .*\) ended"), ranks._together():
            raise RuntimeError("Connection closed by peer")
    finally:
        timer.join()
        other.kill()
        other.wait()
    monkeypatch.setattr("hywia_kernels.scale.ranks._SOON", 0.05)
    ranks._processes[1] = ranks._processes[0]
    with pytest.raises(HywiaError, match="the ranks lost each other: Connection closed by peer"), ranks._together():
        raise RuntimeError("Connection closed by peer\nand more")
