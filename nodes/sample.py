"""The photograph that the templates open with: core's Load Image sees the input folder only, so it is put there."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import folder_paths

SAMPLE = Path(__file__).resolve().parent.parent / "assets" / "sample.jpg"
SAMPLE_NAME = "tadsr_sample.jpg"  # in ComfyUI's input folder; saved workflows name it


def place_sample() -> None:
    """Copies the photograph (6 KB) into ComfyUI's input folder, unless a file of its name is there."""
    target = Path(folder_paths.get_input_directory()) / SAMPLE_NAME
    if target.exists():
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(SAMPLE, target)
    except OSError as error:  # a folder that may only be read: the templates then want a picture chosen
        logging.warning(f"TADSR: the sample photograph could not be put into the input folder: {error}")
