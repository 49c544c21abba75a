"""The student: Time-Aware Encoder and UNet with LoRA, a frozen decoder; one step from low to high quality.

Trained are the LoRA of encoder and UNet, the encoder's time layers, and the UNet's `conv_in` in full.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tadsr.architecture import TIME_PROJECTION, UNetLayout, is_time_layer
from tadsr.encoder import EncoderConfig, Part, TimeAwareEncoder, mode, sample
from tadsr.errors import WeightsError
from tadsr.keys import (
    diffusers_unet_to_ldm,
    diffusers_vae_to_ldm,
    inverse,
    rename,
    unet_table,
)
from tadsr.lora import Adapter, adapters
from tadsr.schedule import LATENT_SCALE, x0_from_residual
from tadsr.weights import BASE_UNET_PREFIX, BASE_VAE_PREFIX, UNET_PREFIX, Metadata, TadsrWeights
from training.networks.base import Base, check_shapes, load_strictly
from training.networks.lora import (
    adaptable_modules,
    adapter_layers,
    add_adapters,
    load_adapters,
    plain_state,
    read_adapters,
)
from training.randomness import sample_generator, seeded

CONV_IN = "conv_in"  # of the UNet


class StudentOutput(NamedTuple):
    """What the student makes of a batch."""

    x0: Tensor  # (B, 4, h, w): the clean latent, scaled
    image: Tensor  # (B, 3, H, W), clamped to [-1, 1], without a gradient where it was


class Student(nn.Module):
    """A copy of the base's UNet and a Time-Aware Encoder, both with LoRA, and the base's decoder.

    New time layers start so that the encoder is the base's. With `time_aware` False they stay that way: the encoder
    ignores the timestep (the ablation without TAE). The trained parameters are float32; frozen ones are whatever the
    caller makes them (`training.networks.lora.cast_frozen`).
    """

    def __init__(
        self,
        base: Base,
        *,
        rank: int = 4,
        encoder_rank: int = 4,
        alpha: float = 8.0,
        time_aware: bool = True,
        train_conv_in: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        assert not adapter_layers(base.unet), "make the student before the teacher takes over the base's UNet"
        self.rank, self.encoder_rank, self.alpha = rank, encoder_rank, alpha
        self.time_aware, self.norm_groups = time_aware, base.norm_groups
        self.encoder = _encoder(base, base.encoder_time if time_aware else {}, seed)
        self.unet = copy.deepcopy(base.unet)
        self.decoder = base.decoder
        for network, name, network_rank in ((self.encoder, "encoder", encoder_rank), (self.unet, "UNet", rank)):
            generator = sample_generator(seed, f"{name} LoRA", 0)
            add_adapters(network, adaptable_modules(network), rank=network_rank, alpha=alpha, generator=generator)
        for parameter in _time_layers(self.encoder).values():
            parameter.requires_grad_(time_aware)
        for parameter in self._conv_in().values():
            parameter.requires_grad_(train_conv_in)

    @property
    def downscale(self) -> int:
        """Image pixels per latent pixel, along each side."""
        return self.encoder.downscale

    def forward(self, lq: Tensor, timestep: Tensor, context: Tensor, noise: Tensor | None = None) -> StudentOutput:
        """Returns the restored latents and images.

        lq: (B, 3, H, W) in [-1, 1], of the result's size, sides multiples of `downscale`; timestep: (B,),
        1..999; context: (B, tokens, width); noise: (B, 4, h, w) draws the encoder's latent, None takes its mode.
        """
        z = self.encode(lq, timestep, noise)
        prediction = self.unet(z, timestep, context, return_dict=False)[0]
        x0 = x0_from_residual(z, prediction, timestep)
        # Clamped before the losses, as the official code does: measured on a whole training step.
        return StudentOutput(x0, self.decoder(x0).clamp(-1.0, 1.0))

    def encode(self, lq: Tensor, timestep: Tensor, noise: Tensor | None = None) -> Tensor:
        """Returns the scaled latent z, (B, 4, h, w); arguments as of `forward`."""
        moments = self.encoder(lq, timestep)
        return (mode(moments) if noise is None else sample(moments, noise)) * LATENT_SCALE

    def trainable(self) -> dict[str, nn.Parameter]:
        """Returns the trained parameters by stable names."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def enable_checkpointing(self) -> None:
        """Makes the backward pass compute activations again instead of keeping them."""
        self.encoder.encoder.run = _checkpointed
        self.unet.enable_gradient_checkpointing()
        self.decoder.enable_checkpointing()

    def _conv_in(self) -> dict[str, nn.Parameter]:
        """Returns the UNet's `conv_in` under the names of a weights file."""
        layer = adapter_layers(self.unet)[CONV_IN].get_base_layer()
        table = _unet_table(self)
        return {f"{UNET_PREFIX}{rename(f'{CONV_IN}.{k}', table)}": p for k, p in layer.named_parameters()}


def student_weights(
    student: Student, metadata: Metadata, *, prompt: Tensor | None = None, base: Base | None = None
) -> TadsrWeights:
    """Returns a copy of the student's trained part, as the nodes load it.

    metadata: name, base_model, timesteps and what else the caller knows; ranks, alpha and norm groups are filled in.
    prompt: (1, tokens, width). base: makes the weights self-contained; its tensors keep their dtypes.
    """
    table = _unet_table(student)
    return TadsrWeights(
        unet_lora=_tensors({UNET_PREFIX + rename(m, table): a for m, a in read_adapters(student.unet).items()}),
        unet_full={key: parameter.detach().clone() for key, parameter in student._conv_in().items()},
        encoder_lora=_tensors(read_adapters(student.encoder)),
        encoder_time={key: parameter.detach().clone() for key, parameter in _time_layers(student.encoder).items()},
        prompt=prompt,
        base={} if base is None else base_section(base),
        metadata=replace(
            metadata,
            rank=student.rank,
            encoder_rank=student.encoder_rank,
            alpha=student.alpha,
            vae_norm_groups=student.norm_groups,
        ),
    )


@torch.no_grad()
def load_student_weights(student: Student, weights: TadsrWeights) -> None:
    """Copies the trained part of a weights file into the student; its base section and prompt are left alone.

    The time layers of a student that is not time-aware stay zero. Raises WeightsError unless modules, shapes, ranks
    and alpha are the student's.
    """
    if not weights.unet_lora:
        raise WeightsError(
            f"the weights {weights.metadata.name!r} have no LoRA to start from; if they are self-contained, give "
            f"them as the base"
        )
    table = inverse(_unet_table(student))
    named = {rename(m.removeprefix(UNET_PREFIX), table): a for m, a in adapters(weights.unet_lora).items()}
    load_adapters(student.unet, named, "UNet")
    load_adapters(student.encoder, adapters(weights.encoder_lora), "encoder")
    _copy("UNet layers trained in full", weights.unet_full, student._conv_in())
    if student.time_aware:
        _copy("time layers", weights.encoder_time, _time_layers(student.encoder))


def base_section(base: Base) -> dict[str, Tensor]:
    """Returns the base under the names of a single-file checkpoint, even if a teacher has taken its UNet over."""
    vae = base.encoder | diffusers_vae_to_ldm(base.decoder.state_dict())
    unet = diffusers_unet_to_ldm(plain_state(base.unet))
    return {BASE_UNET_PREFIX + key: t for key, t in unet.items()} | {BASE_VAE_PREFIX + key: t for key, t in vae.items()}


def _encoder(base: Base, time: Mapping[str, Tensor], seed: int) -> TimeAwareEncoder:
    """Returns the base's encoder with these time layers, or, if there are none, with new ones that do nothing."""
    with seeded(seed, "time layers"):
        network = TimeAwareEncoder(EncoderConfig.from_state_dict(base.encoder, base.norm_groups))
    new = {key: parameter.detach() for key, parameter in _time_layers(network).items()}
    new |= {key: torch.zeros_like(tensor) for key, tensor in new.items() if TIME_PROJECTION in key}
    own = {key: tensor.clone() for key, tensor in (time or new).items()}
    load_strictly(network, base.encoder | own, "Time-Aware Encoder")
    return network.eval()


def _time_layers(encoder: TimeAwareEncoder) -> dict[str, nn.Parameter]:
    """Returns the encoder's time layers under the names of a weights file."""
    return {name: parameter for name, parameter in encoder.named_parameters() if is_time_layer(name)}


def _unet_table(student: Student) -> dict[str, str]:
    return unet_table(UNetLayout.from_diffusers(name for name, _ in student.unet.named_modules()))


def _checkpointed(part: Part, h: Tensor, embedding: Tensor) -> Tensor:
    """Returns what a level of the encoder gives, keeping its input alone for the backward pass."""
    if not torch.is_grad_enabled():
        return part(h, embedding)
    return cast(Tensor, checkpoint(part, h, embedding, use_reentrant=False))


def _tensors(found: Mapping[str, Adapter]) -> dict[str, Tensor]:
    return {key: tensor for module, adapter in found.items() for key, tensor in adapter.tensors(module).items()}


def _copy(what: str, source: Mapping[str, Tensor], target: Mapping[str, nn.Parameter]) -> None:
    check_shapes(what, source, {key: parameter.shape for key, parameter in target.items()})
    for key, parameter in target.items():
        parameter.copy_(source[key])
