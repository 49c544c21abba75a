"""tadsr-mini, the bundled model: its networks, and the training of its base, an autoencoder and a diffusion teacher.

python -m training.mini.vae --data SHARDS --output VAE
python -m training.mini.teacher --data SHARDS --vae VAE --output TEACHER
python -m training.train --config training/presets/mini.yaml --data SHARDS --base TEACHER/base.safetensors ...
python -m training.mini.bundle RUN -o FILE
"""

from __future__ import annotations

from training.mini.networks import VAE_NORM_GROUPS, MiniStudent

__all__ = ["VAE_NORM_GROUPS", "MiniStudent"]
