"""What the pack does itself where ComfyUI or torch lacks it."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest
import torch

from host.comfy_in_process import InProcessComfy


@pytest.fixture
def compat(comfy_inprocess: InProcessComfy) -> ModuleType:
    return comfy_inprocess.module("compat")


def test_the_processor_out_of_memory_is_recognised(compat: ModuleType) -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**50)
    assert compat.is_out_of_memory(raised.value)


@pytest.mark.parametrize(
    "message",
    [
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 4503599627370496 bytes. Error code 12 (Cannot allocate memory)",
        "[enforce fail at alloc_cpu.cpp:115] data. DefaultCPUAllocator: not enough memory: you tried to allocate "
        "8589934592 bytes.",
        "MPS backend out of memory (MPS allocated: 17.93 GB, other allocations: 50.97 MB, max allowed: 18.13 GB). "
        "Tried to allocate 256.00 MB on private pool.",
    ],
)
def test_texts_of_torch_for_other_devices_are_recognised(compat: ModuleType, message: str) -> None:
    assert compat.is_out_of_memory(RuntimeError(message))


def test_gpus_out_of_memory_are_recognised(compat: ModuleType) -> None:
    assert compat.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))


def test_other_errors_are_not_out_of_memory(compat: ModuleType) -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.mm(torch.empty(2, 3), torch.empty(2, 3))
    assert not compat.is_out_of_memory(raised.value)
    assert not compat.is_out_of_memory(ValueError("the text 'out of memory' of another kind of error"))


def test_torch_without_stances_runs(compat: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    importlib.import_module("torch._dynamo")  # as a compiled network does
    monkeypatch.delattr(torch.compiler, "set_stance")
    with compat.run_eagerly():
        assert torch.ones(2).sum() == 2
