"""Runs ComfyUI's main.py with the import shim installed: `python launcher.py COMFYUI_DIR [flags ...]`.

Started as a script, so its folder is `sys.path[0]`: that entry must go, because modules here (`server`) have
the names of ComfyUI's own. The server stops by itself when the process that started it dies: that one holds the
other end of its standard input, which the operating system closes then, whenever it is.
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import signal
import sys
import threading
import time
from pathlib import Path

PATIENCE_SECONDS = 5.0  # between two interrupts, and before the end by force
INTERRUPTS = 3


def main() -> None:
    """Replaces this script by ComfyUI's main.py in the current process."""
    comfyui, *flags = sys.argv[1:]
    _install_shim()
    threading.Thread(target=_stop_with_parent, args=(os.dup(0),), daemon=True).start()
    script = str(Path(comfyui) / "main.py")
    # A shell that starts jobs in the background makes them ignore SIGINT, which is how this one is stopped.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.path[0] = comfyui
    sys.argv = [script, *flags]
    runpy.run_path(script, run_name="__main__")


def _install_shim() -> None:
    file = Path(__file__).with_name("torch_import_shim.py")
    spec = importlib.util.spec_from_file_location("tadsr_torch_import_shim", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    module.install()


def _stop_with_parent(pipe: int) -> None:
    """Interrupts this process once the other end of the pipe is closed, and ends it if that is not enough."""
    while os.read(pipe, 1):
        pass
    for _ in range(INTERRUPTS):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(PATIENCE_SECONDS)
    os._exit(1)


if __name__ == "__main__":
    main()
