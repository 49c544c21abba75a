"""Upscales pictures with a weights file as the nodes do, in plain torch: for validation, evaluation and analysis."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from tadsr import weights as tadsr_weights
from tadsr.color import COLOR_MATCHES, DEFAULT_COLOR_MATCH, is_neutral, to_neutral
from tadsr.encoder import EncoderConfig, TimeAwareEncoder, mode
from tadsr.errors import WeightsError
from tadsr.geometry import crop_padding, enlarge, pad_to_multiple, target_size
from tadsr.schedule import LATENT_SCALE, check_timestep, x0_from_residual
from tadsr.weights import UNET_PREFIX, encoder_state_dict, unet_state_dict
from training.networks.base import LatentDecoder, build_decoder, build_unet, load_strictly
from training.networks.base_files import read_tensors

DEFAULT_SCALE = 4  # paper, section 4.1


@dataclass(frozen=True)
class Restorer:
    """The student's networks, ready to upscale: merged ones (`load`), or those of a `Student` that is being trained."""

    encoder: TimeAwareEncoder
    unet: UNet2DConditionModel
    decoder: LatentDecoder
    prompt: Tensor | None  # (1, tokens, width): used where no context is given
    color_match: str = DEFAULT_COLOR_MATCH  # what suits the weights

    @classmethod
    def load(
        cls,
        weights: Path,
        base: Path | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Restorer:
        """Returns the student in a TADSR weights file, its LoRA merged.

        base: checkpoint, diffusers folder or self-contained weights file, for weights that carry no base. Raises
        WeightsError where there is none, or where it is not the one that the weights were trained on.
        """
        content = tadsr_weights.load(weights)
        if not content.is_self_contained and base is None:
            needed = content.metadata.base_model or "the model that they were trained on"
            raise WeightsError(f"{weights} does not carry its base model; give its path besides: {needed}")
        if base is not None and not content.is_self_contained:
            content = replace(content, base=read_tensors(base).state)
        content = replace(content, base={key: tensor.float() for key, tensor in content.base.items()})
        groups, eps = content.metadata.vae_norm_groups, content.metadata.norm_eps
        state = encoder_state_dict(content, content.base_vae)
        with torch.device("meta"):
            encoder = TimeAwareEncoder(EncoderConfig.from_state_dict(state, groups))
        load_strictly(encoder, state, "Time-Aware Encoder")
        unet = unet_state_dict(content, content.base_unet)
        restorer = cls(
            encoder=encoder.requires_grad_(False),
            unet=build_unet({key.removeprefix(UNET_PREFIX): t for key, t in unet.items()}, eps),
            decoder=build_decoder(content.base_vae, groups, eps),
            prompt=content.prompt,
            color_match=content.metadata.color_match,
        )
        for network in (restorer.encoder, restorer.unet, restorer.decoder):
            torch.nn.Module.to(network, device, dtype)
        return restorer

    @torch.no_grad()
    def __call__(
        self,
        lq: Tensor,
        timestep: int,
        scale: int = DEFAULT_SCALE,
        context: Tensor | None = None,
        match: str | None = None,
    ) -> Tensor:
        """Returns the restored picture, (1, 3, scale h, scale w) float32 in [0, 1].

        lq: (1, 3, h, w) in [0, 1], on any device; timestep: 1..999; context: (1, tokens, width), None: `prompt`;
        match: a name of `tadsr.color.COLOR_MATCHES`, None: the weights' own. Raises ValueError
        for a timestep or scale out of range.
        """
        match = self.color_match if match is None else match
        reference = self._enlarge(lq, scale)
        padded, padding = pad_to_multiple(reference, self.encoder.downscale)
        x0 = self.clean_latent(self._encode(padded, timestep), timestep, context)
        result = crop_padding(self.decode(x0), padding)
        result = COLOR_MATCHES[match](result, reference)
        if match != "none" and is_neutral(reference):
            result = to_neutral(result)
        return result.clamp(0.0, 1.0)

    @torch.no_grad()
    def latent(self, lq: Tensor, timestep: int, scale: int = DEFAULT_SCALE) -> Tensor:
        """Returns the encoder's scaled latent z, (1, 4, h', w'), of the picture enlarged and padded as in a call."""
        padded, _ = pad_to_multiple(self._enlarge(lq, scale), self.encoder.downscale)
        return self._encode(padded, timestep)

    @torch.no_grad()
    def clean_latent(self, z: Tensor, timestep: int, context: Tensor | None = None) -> Tensor:
        """Returns x0, (1, 4, h', w'), scaled. z: of `latent`; raises ValueError without any context."""
        context = self.prompt if context is None else context
        if context is None:
            raise ValueError("the weights hold no default prompt; accepted is a context (1, tokens, width) besides")
        steps = torch.tensor([timestep], device=z.device)
        return x0_from_residual(z, self.unet(z, steps, context.to(z), return_dict=False)[0], timestep)

    @torch.no_grad()
    def decode(self, x0: Tensor) -> Tensor:
        """Returns the decoded picture, float32 in [0, 1], padded as the latent is."""
        return (self.decoder(x0).float() / 2 + 0.5).clamp(0.0, 1.0)

    def _enlarge(self, lq: Tensor, scale: int) -> Tensor:
        """Returns the enlarged picture on the networks' device, float32 in [0, 1]."""
        lq = lq.to(next(self.encoder.parameters()).device).float()
        return enlarge(lq, target_size(lq.shape[2], lq.shape[3], scale=scale))

    def _encode(self, padded: Tensor, timestep: int) -> Tensor:
        check_timestep(timestep)
        image = (padded * 2 - 1).to(next(self.encoder.parameters()).dtype)
        return mode(self.encoder(image, torch.tensor([timestep], device=image.device))) * LATENT_SCALE
