"""A small tagger of random weights, as its authors' files hold them: RAM, DAPE and the two lists."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tadsr.tagger import Tagger, TaggerConfig
from tadsr.tagger_weights import convert, save

CONFIG = TaggerConfig(
    width=16, depths=(2, 2), heads=(2, 4), window=4, embedding_width=24, query_width=32, hidden_width=48, tags=12
)
RANK = 8
TAGS = [f"tag {i}" for i in range(CONFIG.tags)]
RAM_NAMES = {  # as recognize-anything writes them
    "query": "crossattention.self.query",
    "key": "crossattention.self.key",
    "value": "crossattention.self.value",
    "attention_out": "crossattention.output.dense",
    "attention_norm": "crossattention.output.LayerNorm",
    "widen": "intermediate.dense",
    "narrow": "output.dense",
    "norm": "output.LayerNorm",
}


@dataclass(frozen=True)
class TaggerFiles:
    """The files that a tagger is converted from."""

    ram: Path
    dape: Path
    tags: Path
    thresholds: Path

    @property
    def arguments(self) -> list[str]:
        """The command line's."""
        return [
            *("--ram", str(self.ram), "--dape", str(self.dape)),
            *("--tags", str(self.tags), "--thresholds", str(self.thresholds)),
        ]


def random_tagger(config: TaggerConfig = CONFIG, seed: int = 0) -> Tagger:
    """Returns a tagger in which every tensor matters; its probabilities lie around a half."""
    generator = torch.Generator().manual_seed(seed)
    tagger = Tagger(config).eval().requires_grad_(False)
    for name, parameter in tagger.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            parameter.copy_(1 + 0.2 * noise)
        else:
            parameter.copy_(noise * (1.5 / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 0.2))
    tagger.label_embed.copy_(3 * torch.randn(tagger.label_embed.shape, generator=generator))
    layers: Any = tagger.tagging_head
    for layer in layers:
        layer.attention_out.weight.mul_(0.3)  # else all tags see the same
    tagger.fc.bias.zero_()
    image = torch.randn((4, 3, config.side, config.side), generator=generator)
    tagger.fc.bias.sub_(tagger(image).mean())
    return tagger


def ram_name(key: str) -> str:
    """Returns RAM's name of a tagger's tensor."""
    if not key.startswith("tagging_head."):
        return key
    head, layer, module, part = key.split(".")
    return f"{head}.encoder.layer.{layer}.{RAM_NAMES[module]}.{part}"


def ram_state(seed: int = 0) -> dict[str, Tensor]:
    """Returns what RAM's file holds: the tagger, buffers, and networks that tags do not need."""
    state = {ram_name(key): tensor.clone() for key, tensor in random_tagger(seed=seed).state_dict().items()}
    tokens = CONFIG.window**2
    return state | {
        "visual_encoder.layers.0.blocks.0.attn.relative_position_index": torch.zeros(tokens, tokens, dtype=torch.long),
        "visual_encoder.layers.0.blocks.1.attn_mask": torch.zeros(4, tokens, tokens),
        "tag_encoder.encoder.layer.0.crossattention.self.query.weight": torch.zeros(32, 32),
        "text_decoder.cls.predictions.bias": torch.zeros(7),
    }


def dape_state(seed: int = 1) -> dict[str, Tensor]:
    """Returns what DAPE's file holds: low-rank changes of RAM, those of a tied layer zero as in training."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    lora: dict[str, Tensor] = {}
    for stage, depth in enumerate(CONFIG.depths):
        width = CONFIG.width * 2**stage
        for block in range(depth):
            module = f"visual_encoder.layers.{stage}.blocks.{block}.attn.qkv"
            lora |= {f"{module}.lora_A": noise(2 * RANK, width), f"{module}.lora_B": noise(2 * width, RANK)}
    widths = {"query": CONFIG.query_width, "key": CONFIG.embedding_width}
    for layer in range(CONFIG.head_layers):
        for part, width in widths.items():
            module = f"encoder.layer.{layer}.crossattention.self.{part}"
            lora |= {
                f"tagging_head.{module}.lora_A": noise(RANK, width),
                f"tagging_head.{module}.lora_B": noise(CONFIG.query_width, RANK),
                f"tag_encoder.{module}.lora_A": noise(RANK, width),
                f"tag_encoder.{module}.lora_B": torch.zeros(CONFIG.query_width, RANK),
            }
    module = "text_decoder.bert.encoder.layer.0.attention.self.query"
    return lora | {f"{module}.lora_A": noise(RANK, 5), f"{module}.lora_B": noise(5, RANK)}


def write_files(folder: Path) -> TaggerFiles:
    """Writes the four files of a small tagger, in their authors' formats."""
    folder.mkdir(parents=True, exist_ok=True)
    files = TaggerFiles(
        folder / "ram_small.pth", folder / "DAPE.pth", folder / "tag_list.txt", folder / "tag_list_threshold.txt"
    )
    torch.save({"model": ram_state(), "epoch": 3}, files.ram)
    torch.save(dape_state(), files.dape)
    files.tags.write_text("\n".join(TAGS), encoding="utf-8")
    files.thresholds.write_text("\n".join(["0.5"] * (CONFIG.tags - 1) + ["1"]), encoding="utf-8")
    return files


def write_tagger(path: Path) -> Path:
    """Writes the converted file of a small tagger; returns its path."""
    files = write_files(path.parent / "sources of the tagger")
    save(path, convert(files.ram, files.dape, files.tags, files.thresholds))
    return path
