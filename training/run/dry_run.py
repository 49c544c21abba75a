"""What a run will do and need, before it starts: `python -m training.train ... --dry-run`."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from training.config.train_config import TrainConfig, resolved
from training.metrics.lpips import LPIPS
from training.networks.base import load_base
from training.networks.discriminator import Discriminator
from training.networks.student import Student
from training.networks.teacher import Teacher
from training.run.build import build_networks, build_prompts, open_data, skipped_lines

GIB = 2**30
OPTIMIZER_COPIES = 3  # of a trained parameter besides itself: its gradient and AdamW's two moments
PROBE_SIDE = 64  # pixels of the crop on which activations are counted
HALF_BYTES, FULL_BYTES = 2, 4
SKIPPED_SHOWN = 5


def describe(config: TrainConfig) -> str:
    """Returns the settings, the sizes of networks and data, and an estimate of the memory. Raises as a run does."""
    data = open_data(config)
    prompts = build_prompts(config, [config.prompt, config.negative_prompt], "cpu")  # the data's may be many
    base = load_base(config.base)
    student, teacher = build_networks(config, base)
    perceptual = LPIPS(net="vgg")
    weights, training, activations = memory(config, student, teacher, perceptual, prompts.batch([config.prompt]))
    epoch = data.training.epoch_length
    lines = [
        resolved(config),
        f"data: {epoch} pictures, {len(data.validation)} more for validation, {len(data.skipped)} left out",
        *skipped_lines(data.skipped, SKIPPED_SHOWN),
        f"prompts: {len(data.training.texts)}, embeddings of {prompts.shape[0]} x {prompts.shape[1]}",
        f"base: {base.name}, {_millions(student.unet, frozen=True)} in the UNet, "
        f"{_millions(student.encoder, frozen=True)} in the encoder, {_millions(student.decoder, frozen=True)} in the "
        f"decoder",
        f"trained: {_millions(student)} in the student, {_millions(teacher)} in the fake score",
        f"steps: {config.steps} of {config.batch} samples, {epoch / config.batch:.1f} steps an epoch, "
        f"{config.steps * config.batch / epoch:.1f} epochs",
        f"memory of one process, estimated: {(weights + training + activations) / GIB:.2f} GiB ({weights / GIB:.2f} "
        f"weights, {training / GIB:.2f} gradients and optimizers, {activations / GIB:.2f} activations)",
    ]
    return "\n".join(lines)


def memory(
    config: TrainConfig, student: Student, teacher: Teacher | None, perceptual: LPIPS, context: Tensor
) -> tuple[int, int, int]:
    """Returns estimated bytes of weights, of gradients and optimizers, and of kept activations, in one process.

    Activations are counted on a small crop, and multiplied by the pixels: attention, whose memory grows faster
    where no fused kernel is used, makes it more; what the kernels need for themselves is not in it.
    """
    frozen_bytes = FULL_BYTES if config.mixed_precision == "no" else HALF_BYTES
    networks: list[nn.Module] = [student, perceptual, *([] if teacher is None else [teacher])]
    networks += [Discriminator()] if config.adversarial_weight else []
    trained = sum(p.numel() for network in networks for p in network.parameters() if p.requires_grad)
    frozen = sum(p.numel() for network in networks for p in network.parameters() if not p.requires_grad)
    pixels = config.micro_batch * config.crop**2
    per_pixel = activation_bytes(student, context) / PROBE_SIDE**2
    if config.mixed_precision != "no":
        per_pixel *= HALF_BYTES / FULL_BYTES
    weights = frozen * frozen_bytes + trained * FULL_BYTES
    return weights, OPTIMIZER_COPIES * trained * FULL_BYTES, round(pixels * per_pixel)


def activation_bytes(student: Student, context: Tensor) -> int:
    """Returns the bytes that the student's forward pass keeps for its backward pass, for one crop of PROBE_SIDE."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    parameters = {p.untyped_storage().data_ptr() for p in student.parameters()}
    lq = torch.zeros(1, 3, PROBE_SIDE, PROBE_SIDE)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = student(lq, torch.tensor([500]), context)
    del output
    return sum(size for address, size in kept.items() if address not in parameters)


def _millions(network: nn.Module | None, *, frozen: bool = False) -> str:
    if network is None:
        return "none"
    return f"{_count(p for p in network.parameters() if p.requires_grad != frozen) / 1e6:.2f} M parameters"


def _count(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)
