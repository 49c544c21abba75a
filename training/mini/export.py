"""The small networks as a self-contained weights file."""

from __future__ import annotations

import torch
from torch import Tensor

from tadsr.architecture import is_time_layer
from tadsr.keys import diffusers_unet_to_ldm, diffusers_vae_to_ldm
from tadsr.weights import Metadata, TadsrWeights
from training.mini.networks import VAE_NORM_GROUPS, MiniStudent

NAME, LICENSE = "tadsr-mini", "Apache-2.0"


def weights_from_student(student: MiniStudent, source_sha256: str, steps: int, dtype: torch.dtype) -> TadsrWeights:
    """Returns the student as self-contained weights in `dtype`, under the names of a single-file checkpoint."""
    encoder = student.encoder.state_dict()
    time = {key: tensor for key, tensor in encoder.items() if is_time_layer(key)}
    vae = {key: tensor for key, tensor in encoder.items() if key not in time}
    vae |= diffusers_vae_to_ldm({f"decoder.{key}": t for key, t in student.decoder.state_dict().items()})
    vae |= {f"post_quant_conv.{key}": tensor for key, tensor in student.post_quant_conv.state_dict().items()}
    base = {f"first_stage_model.{key}": tensor for key, tensor in vae.items()}
    unet = diffusers_unet_to_ldm(student.unet.state_dict())
    base |= {f"model.diffusion_model.{key}": tensor for key, tensor in unet.items()}
    return TadsrWeights(
        unet_lora={},
        unet_full={},
        encoder_lora={},
        encoder_time=_cast(time, dtype),
        prompt=student.prompt.detach().to(dtype),
        base=_cast(base, dtype),
        metadata=Metadata(
            name=NAME,
            base_model=f"{NAME} (trained from nothing)",
            prompt="(learned)",
            source_sha256=source_sha256,
            license=LICENSE,
            vae_norm_groups=VAE_NORM_GROUPS,
            extra={"steps": str(steps)},
        ),
    )


def _cast(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {key: tensor.to(dtype) for key, tensor in tensors.items()}
