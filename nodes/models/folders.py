"""Where weights files are looked for: models/tadsr, extra_model_paths.yaml, and the pack's own weights."""

from __future__ import annotations

import os
from pathlib import Path

import folder_paths

WEIGHTS_FOLDER = "tadsr"  # the key in folder_paths and extra_model_paths.yaml
WEIGHTS_EXTENSIONS = (".safetensors", ".pkl", ".pth")  # ours; and, as authors call theirs, PyTorch's pickles
BUNDLED_FOLDER = Path(__file__).resolve().parents[2] / "weights"
BUNDLED_WEIGHTS = "tadsr-mini.safetensors"


def register_weights_folder() -> None:
    """Adds models/tadsr and the bundled weights to ComfyUI's folders, after extra_model_paths.yaml's."""
    folder_paths.add_model_folder_path(WEIGHTS_FOLDER, os.path.join(folder_paths.models_dir, WEIGHTS_FOLDER))
    folder_paths.add_model_folder_path(WEIGHTS_FOLDER, str(BUNDLED_FOLDER))
    folder_paths.folder_names_and_paths[WEIGHTS_FOLDER][1].update(WEIGHTS_EXTENSIONS)


def file_identity(path: str | None) -> str:
    """Returns what changes when a file is replaced under its name; empty where there is none."""
    if not path or not os.path.exists(path):
        return ""
    # Not the time alone: a copy with `cp -p`, or out of an archive, has the time of the original.
    stat = os.stat(path)
    return str((path, stat.st_mtime_ns, stat.st_size, stat.st_ino, stat.st_ctime_ns))
