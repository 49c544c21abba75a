"""Writes a small base model to try the training with, without Stable Diffusion: `python -m training.mini.base -o DIR`.

Its VAE enlarges bicubically and its UNet is untrained (`training/mini/start.py`), so that a student starts as bicubic
enlargement. DIR/base.safetensors is a self-contained TADSR file; DIR/prompts.safetensors beside it holds random
embeddings of the default prompts, because the model has no text encoder.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tadsr.weights import save
from training.config.train_config import NEGATIVE_PROMPT, PROMPT
from training.data.prompts import BOOK_FILE
from training.mini.export import weights_from_student
from training.mini.networks import CONTEXT_TOKENS, CONTEXT_WIDTH, MiniStudent
from training.mini.start import follow_timestep

BASE_FILE = "base.safetensors"
RESIDUAL_SPREAD = 2e-3  # of the UNet's last weights: its residual is about 3 % of a latent, not nothing


def write_base(folder: Path, networks: MiniStudent, prompts: Mapping[str, Tensor], steps: int = 0) -> Path:
    """Writes base.safetensors and prompts.safetensors into `folder`; returns the path of the first.

    prompts: (tokens, width) by their texts; steps: of the UNet's training.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save(folder / BASE_FILE, weights_from_student(networks, source_sha256="", steps=steps, dtype=torch.float32))
    save_file(dict(prompts), folder / BOOK_FILE)
    return folder / BASE_FILE


def write_mini_base(folder: Path, seed: int = 0) -> Path:
    """Writes the untrained base into `folder`; returns the path of base.safetensors."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        networks = MiniStudent()
        follow_timestep(networks.encoder)
        nn.init.normal_(networks.unet.conv_out.weight, std=RESIDUAL_SPREAD)
        prompts = {text: torch.randn(CONTEXT_TOKENS, CONTEXT_WIDTH) for text in (PROMPT, NEGATIVE_PROMPT)}
    return write_base(folder, networks, prompts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write into")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(write_mini_base(options.output, options.seed))


if __name__ == "__main__":
    main()
