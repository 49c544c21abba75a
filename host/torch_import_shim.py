"""Lets torchvision and torchaudio import beside a CPU-only torch.

The registry's Linux wheels of the two are built for CUDA. Beside a CPU build of torch their C++ extensions
cannot be loaded, and both packages then fail at import, although nearly everything in them is Python.
`install` mends just that, and only where torch is a CPU build: torchvision finds the two operator schemas that
it registers unguarded, and torchaudio treats an extension that cannot be loaded as absent, which it supports.

`environment` puts a copy of this file into the environments that it builds, where every Python runs it at start;
`launcher` runs it for ComfyUI in any environment. torch is not imported here, because ComfyUI sets variables that
torch reads first.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

# The schemas that torchvision/_meta_registrations.py passes to register_fake() without a guard.
_TORCHVISION_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_libraries: list[object] = []  # torch drops an operator's schema when its Library object is collected


def install() -> None:
    """Puts the import hook in place; calling it again, from another copy of this file too, changes nothing."""
    if not any(type(finder).__name__ == _TorchImportHook.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, _TorchImportHook())


def _torch_is_cpu_build() -> bool:
    import torch

    return torch.version.cuda is None and getattr(torch.version, "hip", None) is None


def _define_torchvision_schemas() -> None:
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _TORCHVISION_SCHEMAS:
        library.define(schema)
    _libraries.append(library)


def _tolerate_missing_extension(extension_utils: ModuleType) -> None:
    load: Callable[[str], bool] = extension_utils._load_lib

    def load_if_possible(name: str) -> bool:
        try:
            return load(name)
        except OSError:  # linked against CUDA libraries that are not here
            return False

    vars(extension_utils)["_load_lib"] = load_if_possible


def _has_compiled_operators() -> bool:
    """Returns whether torchvision's own C++ library loads, in which case it defines its schemas itself."""
    import ctypes

    spec = importlib.machinery.PathFinder.find_spec("torchvision")
    library = spec and importlib.machinery.PathFinder.find_spec("torchvision._C", spec.submodule_search_locations)
    if not library or not library.origin:
        return False
    try:
        ctypes.CDLL(library.origin)
    except OSError:
        return False
    return True


class _HookLoader(importlib.abc.Loader):
    """Runs one of the two repairs around the real loader of a module."""

    def __init__(self, name: str, loader: importlib.abc.Loader) -> None:
        self.name, self.loader = name, loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        repair = _torch_is_cpu_build()
        if repair and self.name == "torchvision" and not _has_compiled_operators():
            _define_torchvision_schemas()
        self.loader.exec_module(module)
        if repair and self.name == "torchaudio._extension.utils":
            _tolerate_missing_extension(module)

    def __getattr__(self, name: str) -> object:
        return getattr(self.loader, name)


class _TorchImportHook(importlib.abc.MetaPathFinder):
    """Wraps the loaders of the two modules to repair."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in ("torchvision", "torchaudio._extension.utils"):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _HookLoader(fullname, spec.loader)
        return spec
