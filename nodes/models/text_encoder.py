"""The CLIP of weights without a text encoder: it says so where it is used."""

from __future__ import annotations

from typing import NoReturn

from torch import nn


class NoTextEncoder:
    """A CLIP that encodes nothing. A LoRA passes through it, as the loaders of LoRA take MODEL and CLIP together."""

    def __init__(self, weights_name: str) -> None:
        self.weights_name = weights_name
        self.cond_stage_model = nn.Module()  # without tensors: no LoRA finds anything in it
        self.patcher = self

    def clone(self) -> NoTextEncoder:
        return self

    def add_patches(self, *_: object, **__: object) -> list[str]:
        return []

    def set_attachments(self, *_: object) -> None:
        return

    def tokenize(self, *_: object, **__: object) -> NoReturn:
        raise ValueError(
            f"{self.weights_name} has no text encoder, so no text can be encoded for it; leave the conditioning "
            "unconnected: its own prompt is used. Weights on a checkpoint with a text encoder take text"
        )

    def clip_layer(self, _: int) -> NoReturn:
        self.tokenize()
