"""A Ray cluster of two nodes on this machine, as a program: prints its address, and kills what it is told to.

Lines on standard input: "actor" kills a process of an actor on the first node, "node" the second node. Each is answered
by a line. The end of the input ends the cluster.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

NODE = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 80 * 2**20}


def main() -> None:
    cluster = importlib.import_module("ray.cluster_utils").Cluster(
        initialize_head=True, head_node_args={**NODE, "include_dashboard": False}
    )
    second = cluster.add_node(**NODE)
    cluster.wait_for_nodes()
    print(cluster.address, cluster.head_node.node_id, second.node_id, flush=True)
    for line in sys.stdin:
        if line.strip() == "actor":
            (pid,) = actors(cluster.head_node)
            os.kill(pid, signal.SIGKILL)
            print(f"killed {pid}", flush=True)
        else:
            cluster.remove_node(second, allow_graceful=False)
            print("removed", flush=True)
    cluster.shutdown()


def actors(node: Any) -> list[int]:
    """Returns the processes of a node's actors: children of its raylet that Ray has given an actor's name."""
    (raylet,) = (process.process.pid for process in node.all_processes["raylet"])
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            name = (folder / "cmdline").read_bytes()
        except OSError:
            continue  # ended meanwhile
        if parent == raylet and name.startswith(b"ray::Maker"):
            found.append(int(folder.name))
    return found


if __name__ == "__main__":
    main()
