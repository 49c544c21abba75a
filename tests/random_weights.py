"""Random self-contained weights of the bundled model's architecture, in which every part matters."""

from __future__ import annotations

import torch

from host import torch_import_shim
from tadsr.keys import diffusers_unet_to_ldm, diffusers_vae_to_ldm
from tadsr.weights import BASE_UNET_PREFIX, BASE_VAE_PREFIX, Metadata, TadsrWeights

torch_import_shim.install()  # diffusers imports torchvision
from training.mini import MiniStudent  # noqa: E402


def random_weights(seed: int = 0, *, with_prompt: bool = True) -> TadsrWeights:
    """Returns self-contained weights; equal seeds give equal weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        student = MiniStudent()
        torch.nn.init.normal_(student.unet.conv_out.weight, std=0.05)  # it starts at zero: no prediction
        for name, parameter in student.encoder.named_parameters():
            if "time_emb_proj" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return weights_of(student, with_prompt)


@torch.no_grad()
def weights_of(student: MiniStudent, with_prompt: bool) -> TadsrWeights:
    """Returns the student's networks in the layout of a weights file."""
    encoder = student.encoder.state_dict()
    time = {key: tensor for key, tensor in encoder.items() if "time_emb" in key}
    decoder = {f"decoder.{key}": tensor for key, tensor in student.decoder.state_dict().items()}
    post = {f"post_quant_conv.{key}": tensor for key, tensor in student.post_quant_conv.state_dict().items()}
    vae = {**{k: t for k, t in encoder.items() if k not in time}, **diffusers_vae_to_ldm({**decoder, **post})}
    unet = diffusers_unet_to_ldm(student.unet.state_dict())
    return TadsrWeights(
        unet_lora={},
        unet_full={},
        encoder_lora={},
        encoder_time=time,
        prompt=student.prompt.detach().clone() if with_prompt else None,
        base={BASE_UNET_PREFIX + k: t for k, t in unet.items()} | {BASE_VAE_PREFIX + k: t for k, t in vae.items()},
        metadata=Metadata(name="random"),
    )
