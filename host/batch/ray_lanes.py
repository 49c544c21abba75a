"""The GPUs of a Ray cluster as places where pictures are made: an actor with a ComfyUI of its own on each."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from ..carrier import Carrier
from ..errors import BrokeOff, HostError, ServerFault, Unusable
from ..pictures import read_content
from .making import Made, Order, write_part
from .options import BatchOptions
from .ray_actor import Maker, Outcome
from .serving import Serving

RETRIES = 2  # of a picture whose actor died, by Ray
OPEN_SECONDS = 900.0  # for a node's first ComfyUI, which may have to be fetched
CLOSE_SECONDS = 20.0
_POLL_SECONDS = 0.5
_STORE_BYTES = 256 * 2**20  # of our own cluster, for pictures that are sent


def serve_on_ray(serving: Serving, carrier: Carrier, options: BatchOptions) -> None:
    """Serves a batch on a cluster until it is finished: on every place there is, and those that join.

    Raises HostError where Ray is missing or the cluster cannot be reached.
    """
    ray = connect(options.ray or "")
    try:
        places: dict[tuple[str, int], RayLane] = {}

        def look() -> None:
            for place, resources in wanted_places(ray.nodes(), options.ray_cpus).items():
                if place not in places or not places[place].alive:
                    places[place] = RayLane(ray, place, resources, carrier, options)
                    serving.add(places[place])

        serving.wait(look)
    finally:
        ray.shutdown()


def connect(address: str) -> Any:
    """Returns the module ray, connected to a cluster, or to a new one on this machine for an empty address."""
    try:
        ray = importlib.import_module("ray")
    except ImportError as error:
        raise HostError("Ray is not installed; python -m pip install -r requirements-ray.txt does that") from error
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    own = {} if address else {"include_dashboard": False, "object_store_memory": _STORE_BYTES}
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level="error", **own)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        raise HostError(f"the Ray cluster {address or '(a local one)'} cannot be used: {error}") from error
    return ray


def wanted_places(nodes: list[dict[str, Any]], cpus: int) -> dict[tuple[str, int], dict[str, float]]:
    """Returns (node, number) -> what an actor there takes: a GPU each, or where the cluster has none, `cpus` cores."""
    alive = [node for node in nodes if node["Alive"]]
    gpus = any(node["Resources"].get("GPU", 0) >= 1 for node in alive)
    places: dict[tuple[str, int], dict[str, float]] = {}
    for node in alive:
        cores = node["Resources"].get("CPU", 0)
        count = int(node["Resources"].get("GPU", 0)) if gpus else min(int(cores), max(1, int(cores // cpus)))
        taken: dict[str, float] = {"num_gpus": 1, "num_cpus": 0} if gpus else {"num_cpus": min(cpus, cores)}
        places |= {(node["NodeID"], number): taken for number in range(count)}
    return places


class RayLane:
    """One actor of the cluster. Ray starts it again where it dies, with what it had in flight, but not elsewhere:

    when its node dies, its pictures go to the others.
    """

    def __init__(
        self, ray: Any, place: tuple[str, int], resources: dict[str, float], carrier: Carrier, options: BatchOptions
    ) -> None:
        strategies = importlib.import_module("ray.util.scheduling_strategies")
        self.name, self.slots, self.alive = f"ray-{place[0][:8]}-{place[1]}", options.in_flight, True
        self._ray, self._send = ray, options.send
        actor = ray.remote(Maker).options(
            **resources,
            max_restarts=-1,
            max_task_retries=RETRIES,
            max_concurrency=self.slots + 1,  # `give_up` passes by
            scheduling_strategy=strategies.NodeAffinitySchedulingStrategy(node_id=place[0], soft=False),
        )
        self._actor = actor.remote(carrier, options.models, self.slots, options.timeout)

    def open(self) -> None:
        self._result(self._actor.open.remote(), threading.Event(), OPEN_SECONDS)

    def make(self, order: Order, slot: int, stop: threading.Event) -> Made:
        folder, ticket = order.folder, uuid.uuid4().hex
        if self._send:
            order = dataclasses.replace(order, content=read_content(order.source), folder=None)
        reference = self._actor.make.remote(order, slot, ticket)
        made = self._result(reference, stop, None, ticket)
        assert made is not None, "a call of make ends with a result or an error"
        return made if not self._send else _written(made, folder)

    def _result(
        self, reference: Any, stop: threading.Event, seconds: float | None, ticket: str | None = None
    ) -> Made | None:
        asked, started = False, time.monotonic()
        try:
            while not self._ray.wait([reference], timeout=_POLL_SECONDS)[0]:
                if seconds is not None and time.monotonic() - started > seconds:
                    raise ServerFault(f"{self.name}: no ComfyUI after {seconds:.0f} s")
                if stop.is_set() and ticket is not None and not asked:
                    self._actor.give_up.remote(ticket)
                    asked = True
            outcome: Outcome = self._ray.get(reference)
        except self._ray.exceptions.ActorUnavailableError as error:
            raise BrokeOff(f"{self.name} went away: {_first_line(error)}") from error
        except self._ray.exceptions.RayError as error:
            self.alive = False
            raise Unusable(f"{self.name} is gone: {_first_line(error)}") from error
        return outcome.result()

    def close(self) -> None:
        if self.alive:
            self.alive = False
            with contextlib.suppress(self._ray.exceptions.RayError):  # it ends with the driver
                self._ray.get(self._actor.close.remote(), timeout=CLOSE_SECONDS)


def _written(made: Made, folder: str | None) -> Made:
    assert made.content is not None and folder is not None, "what is sent comes back"
    return dataclasses.replace(made, part=str(write_part(made.content, Path(folder))), content=None)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
