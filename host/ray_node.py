"""Makes this machine a node of a Ray cluster that batch.py can use: `python -m host.ray_node start --head`.

Everything after the module's name is Ray's own: `start --address=HEAD:6379`, `stop`, `status`. Needs only Python; the
first run sets up ComfyUI as quickstart.py does, and Ray beside it.
"""

from __future__ import annotations

import os
import subprocess
import sys

from .commands import clean_environment
from .errors import HostError
from .interpreter import INSIDE_VARIABLE, prepare_comfyui
from .overlay import ray_path


def main(arguments: list[str]) -> int:
    """Runs Ray's command; returns its exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    try:
        runtime = prepare_comfyui()
        environment = clean_environment(
            **{INSIDE_VARIABLE: str(runtime.comfyui), "PYTHONPATH": ray_path(runtime), "RAY_USAGE_STATS_ENABLED": "0"}
        )
    except HostError as error:
        print(f"\nray_node: {error}", file=sys.stderr)
        return 1
    command = [str(runtime.python), "-m", "ray.scripts.scripts", *arguments]
    if os.name == "posix":
        os.execve(command[0], command, environment)  # noqa: S606 - our own program
    return subprocess.run(command, env=environment).returncode  # noqa: S603


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
