"""Runs ComfyUI's main.py with the import shim installed: `python launcher.py COMFYUI_DIR [flags ...]`.

Started as a script, so its folder is `sys.path[0]`: that entry must go, because modules here (`server`) have
the names of ComfyUI's own. The server stops by itself when the process that started it dies.
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

PARENT_CHECK_SECONDS = 2.0


def main() -> None:
    """Replaces this script by ComfyUI's main.py in the current process."""
    comfyui, *flags = sys.argv[1:]
    _install_shim()
    threading.Thread(target=_stop_with_parent, args=(os.getppid(),), daemon=True).start()
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


def _stop_with_parent(parent: int) -> None:
    """Interrupts this process once its parent has gone (POSIX hands the child to another parent then)."""
    while os.name == "posix":
        time.sleep(PARENT_CHECK_SECONDS)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGINT)
            return


if __name__ == "__main__":
    main()
