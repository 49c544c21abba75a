"""Batches on a real Ray cluster of two nodes on this machine: what is killed in the middle costs no picture."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from batch_pictures import assert_inverted, pictures, records

from host.batch import BatchOptions, BatchReport, Watcher, upscale_folder
from host.batch.inputs import Item
from host.batch.making import Made
from host.batch.ray_actor import Outcome, failed
from host.batch.ray_lanes import connect, wanted_places
from host.commands import clean_environment
from host.errors import BrokeOff, HostError, ServerFault, Unusable
from host.interpreter import INSIDE_VARIABLE, Runtime
from host.overlay import RAY_REQUIREMENTS, overlay, ray_path
from host.pictures import PictureError
from host.prompt_run import ExecutionFailed

HERE = Path(__file__).parent


def node(name: str, alive: bool = True, **resources: float) -> dict:
    return {"NodeID": name, "Alive": alive, "Resources": resources}


def test_each_gpu_gets_an_actor_and_where_there_is_none_some_cores() -> None:
    gpus = [node("a", CPU=64, GPU=8), node("b", CPU=8), node("c", alive=False, CPU=8, GPU=1)]
    assert wanted_places(gpus, 4) == {("a", number): {"num_gpus": 1, "num_cpus": 0} for number in range(8)}
    cores = [node("a", CPU=8), node("b", CPU=2), node("c", memory=1)]
    assert list(wanted_places(cores, 4)) == [("a", 0), ("a", 1), ("b", 0)]
    assert wanted_places(cores, 4)["b", 0] == {"num_cpus": 2}


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (PictureError("is empty"), PictureError),
        (BrokeOff("went"), BrokeOff),
        (ServerFault("silent"), ServerFault),
        (Unusable("lacks"), Unusable),
        (ExecutionFailed({"exception_message": "out of memory"}), HostError),
        (OSError(28, "No space left on device"), OSError),
    ],
)
def test_errors_travel_from_an_actor_as_what_they_are(error: HostError | OSError, kind: type[Exception]) -> None:
    outcome: Outcome = failed(error)
    with pytest.raises(kind) as caught:
        outcome.result()
    assert type(caught.value) is kind and str(caught.value) == str(error)


def test_missing_ray_and_a_missing_cluster_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(HostError, match=r"Ray is not installed; .*requirements-ray\.txt"):
        connect("")


class Cluster:
    """The cluster of `ray_two_nodes.py`."""

    def __init__(self, comfyui: Path) -> None:
        path = ray_path(Runtime(comfyui, Path(sys.executable)))
        environment = clean_environment(PYTHONPATH=path, **{INSIDE_VARIABLE: str(comfyui)})
        command = [sys.executable, str(HERE / "ray_two_nodes.py")]
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        words = self._answer().split()
        self.address, self.nodes = words[0], words[1:]

    def _answer(self) -> str:
        assert self._process.stdout is not None and self._process.stderr is not None
        return self._process.stdout.readline() or pytest.fail(self._process.stderr.read())

    def kill(self, what: str) -> None:
        assert self._process.stdin is not None
        print(what, file=self._process.stdin, flush=True)
        self._answer()

    def end(self) -> None:
        self._process.communicate(timeout=60)


@pytest.fixture
def cluster(comfyui_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A running cluster; `import ray` works meanwhile."""
    monkeypatch.syspath_prepend(str(HERE.parent))
    sys.path.append(str(overlay(RAY_REQUIREMENTS, Path(sys.executable))))
    started = Cluster(comfyui_path)
    yield started
    started.end()


class Gate(Watcher):
    """Counts the results of each server, and holds its threads while `open` is not set."""

    def __init__(self) -> None:
        self.open, self.counts, self.lines = threading.Event(), Counter[str](), list[str]()

    def says(self, line: str) -> None:
        self.lines.append(line)

    def made(self, item: Item, made: Made, server: str) -> None:
        self.counts[server] += 1
        self.open.wait()

    def wait_for(self, reached: Callable[[], bool], seconds: float = 240) -> None:
        give_up_at = time.monotonic() + seconds
        while not reached():
            assert time.monotonic() < give_up_at, (self.counts, self.lines)
            time.sleep(0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes to kill in /proc")
def test_a_killed_actor_and_a_killed_node_cost_no_picture(cluster: Cluster, inverting: Path, tmp_path: Path) -> None:
    source, output, count = tmp_path / "in", tmp_path / "out", 40
    pictures(source, count, (900, 700))  # large enough that some are in flight at any moment
    options = BatchOptions(workflow=inverting, ray=cluster.address)
    reports: list[BatchReport] = []
    gate = Gate()
    batch = threading.Thread(target=lambda: reports.append(upscale_folder([source], output, options, gate)))
    batch.start()
    first, second = (f"ray-{node_id[:8]}-0" for node_id in cluster.nodes)
    gate.wait_for(lambda: gate.counts[first] > 0 and gate.counts[second] > 0)
    for victim in ("actor", "node"):
        gate.open.set()
        time.sleep(0.1)
        cluster.kill(victim)
        gate.open.clear()
        made = gate.counts[first]
        if victim == "actor":  # Ray starts it again, with the pictures that it had
            gate.wait_for(lambda made=made: gate.counts[first] > made)
    gate.open.set()
    batch.join(240)
    (report,) = reports
    assert (report.done, report.failures, report.ended) == (count, [], None), gate.lines
    assert_inverted(output, count)
    outputs = [record["output"] for record in records(output)]
    assert len(outputs) == len(set(outputs)) == count, "each once"
    assert gate.counts[second] < count / 2 < gate.counts[first]

    sent = upscale_folder([source / "p000.png"], tmp_path / "sent", BatchOptions(**{**vars(options), "send": True}))
    assert sent.done == 1
    assert_inverted(tmp_path / "sent", 1)
