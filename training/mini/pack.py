"""Writes the weights file of a run: `python -m training.mini.pack RUN --samples DIR -o FILE`.

RUN is the folder of a run of `training.mini.learn`; FILE holds its averaged weights in half
precision.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from tadsr.architecture import is_time_layer
from tadsr.keys import diffusers_unet_to_ldm, diffusers_vae_to_ldm
from tadsr.weights import Metadata, TadsrWeights, save
from training.data.prompts import LEARNED_PROMPT
from training.mini.export import LICENSE, NAME
from training.mini.learn import CHECKPOINT
from training.mini.patches import Patches
from training.mini.samples import PATCHES
from training.mini.student import NORM_GROUPS, PatchStudent
from training.mini.unet import NORM_EPS

COLOR_MATCH = "wavelet"  # better than adain on photographs and on flat drawings: docs/bundled-model.md
BASE = f"{NAME} (no base: a student of open upscalers)"


def weights_of(student: PatchStudent, steps: int, dtype: torch.dtype) -> TadsrWeights:
    """Returns the student as self-contained weights in `dtype`, under the names of a single-file checkpoint."""
    encoder = student.encoder.state_dict()
    time = {key: tensor for key, tensor in encoder.items() if is_time_layer(key)}
    vae = {key: tensor for key, tensor in encoder.items() if key not in time}
    vae |= diffusers_vae_to_ldm({f"decoder.{key}": t for key, t in student.decoder.state_dict().items()})
    vae |= {f"post_quant_conv.{key}": tensor for key, tensor in student.post_quant_conv.state_dict().items()}
    unet = diffusers_unet_to_ldm(student.residual.unet.state_dict())
    base = {f"first_stage_model.{key}": tensor for key, tensor in vae.items()}
    base |= {f"model.diffusion_model.{key}": tensor for key, tensor in unet.items()}

    def cast(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: tensor.detach().to(dtype) for key, tensor in tensors.items()}

    return TadsrWeights(
        unet_lora={},
        unet_full={},
        encoder_lora={},
        encoder_time=cast(time),
        prompt=student.residual.prompt.detach().to(dtype),
        base=cast(base),
        metadata=Metadata(
            name=NAME,
            base_model=BASE,
            prompt=LEARNED_PROMPT,
            license=LICENSE,
            vae_norm_groups=NORM_GROUPS,
            norm_eps=NORM_EPS,
            color_match=COLOR_MATCH,
            extra={"steps": str(steps)},
        ),
    )


def load_run(run: Path, samples: Path) -> tuple[PatchStudent, int]:
    """Returns the student with a run's averaged weights, and the run's steps."""
    torch.manual_seed(0)
    student = PatchStudent(Patches.load(samples / PATCHES))
    state = torch.load(run / CHECKPOINT, weights_only=True)
    student.residual.load_state_dict(state["average"])
    if "decoder" in state:
        student.decoder.load_state_dict(state["decoder"])
    return student.eval().requires_grad_(False), int(state["step"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--samples", type=Path, required=True, help="folder that training.mini.samples wrote")
    parser.add_argument("-o", "--output", type=Path, required=True, help="file to write")
    options = parser.parse_args()
    student, steps = load_run(options.run, options.samples)
    save(options.output, weights_of(student, steps, torch.float16))
    print(f"{options.output}: {options.output.stat().st_size / 1e6:.1f} MB, {steps} steps")


if __name__ == "__main__":
    main()
