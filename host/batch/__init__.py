"""Folders of pictures through ComfyUI's API: on one server, several, or a Ray cluster (`upscale_folder`)."""

from .options import BatchOptions
from .run import BatchReport, Watcher, upscale_folder

__all__ = ["BatchOptions", "BatchReport", "Watcher", "upscale_folder"]
