"""The Time-Aware Encoder under ComfyUI's memory management."""

from __future__ import annotations

from collections.abc import Mapping

import comfy.model_management as mm
import comfy.model_patcher
import comfy.ops
import torch
from torch import Tensor

from ...tadsr.encoder import EncoderConfig, TimeAwareEncoder
from ...tadsr.errors import WeightsError
from ...tadsr.schedule import choose_timestep
from ..compat import device_context, encoder_attention

WORKING_DTYPES = (torch.bfloat16, torch.float32)  # as ComfyUI runs the SD VAE: float16 overflows in it


class TimeAwareEncoderModel:
    """What travels in a TADSR_ENCODER socket: the network, its `patcher`, and how to call it."""

    def __init__(
        self,
        state: Mapping[str, Tensor],
        norm_groups: int,
        dtype: torch.dtype | None = None,
        *,
        weights_name: str = "",
        timesteps: tuple[int, ...] = (),
    ) -> None:
        """state: a full TimeAwareEncoder state dict; raises WeightsError where it does not fit.

        norm_groups: groups of every normalisation, from the weights' metadata. dtype: None for ComfyUI's choice.
        timesteps: those that the weights were trained for; empty: all.
        """
        self.weights_name, self.timesteps = weights_name, timesteps
        self.device, offload_device = mm.vae_device(), mm.vae_offload_device()
        self.dtype = dtype or mm.vae_dtype(self.device, list(WORKING_DTYPES))
        self.model = TimeAwareEncoder(
            EncoderConfig.from_state_dict(state, norm_groups),
            operations=comfy.ops.manual_cast,
            attention=encoder_attention(self.device),
            device=offload_device,
            dtype=self.dtype,
        ).eval()
        self.model.requires_grad_(False)
        mm.archive_model_dtypes(self.model)
        # Looked up at call time: ComfyUI replaces CoreModelPatcher when it starts with dynamic VRAM.
        self.patcher = comfy.model_patcher.CoreModelPatcher(
            self.model, load_device=self.device, offload_device=offload_device
        )
        missing, unexpected = self.model.load_state_dict(state, strict=False, assign=self.patcher.is_dynamic())
        if missing or unexpected:
            raise WeightsError(
                f"the encoder's weights lack {len(missing)} tensors ({', '.join(missing[:3])}) and have "
                f"{len(unexpected)} unknown ones ({', '.join(unexpected[:3])}); accepted is an SD VAE "
                "encoder with the time layers of TADSR"
            )

    @property
    def downscale(self) -> int:
        """Image pixels per latent pixel, along each side."""
        return self.model.downscale

    def timestep(self, timestep: int, *, any_timestep: bool = False) -> int:
        """Returns the timestep to encode for; raises ValueError for one that the weights were not trained for."""
        return choose_timestep(timestep, self.timesteps, self.weights_name, any_timestep=any_timestep)

    def moments(self, planes: Tensor, timestep: int, *, float32: bool = False) -> Tensor:
        """Returns mean and log-variance of the latent, (B, 2 C, h, w) float32, on the encoder's device.

        planes: (B, 3, H, W) in [0, 1], H and W multiples of `downscale`. float32: computes in it whatever `dtype` is,
        for a picture that gave no finite numbers; the loaded weights stay as they are.
        """
        dtype = torch.float32 if float32 else self.dtype
        memory = self.model.memory_used(planes.shape, mm.dtype_size(dtype))
        mm.load_models_gpu([self.patcher], memory_required=memory)
        with device_context(self.device):
            # In channels-last layout torch's GroupNorm is inaccurate on a processor: docs/performance.md.
            image = planes.to(device=self.device, dtype=dtype, memory_format=torch.contiguous_format) * 2.0 - 1.0
            return self.model(image, torch.tensor([timestep], device=self.device)).float()
