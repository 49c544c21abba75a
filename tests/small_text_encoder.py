"""A small text encoder of CLIP's kind, with random weights, in the folders of diffusers."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import CLIPTextConfig, CLIPTextModel

WIDTH = 16
LETTERS = "abcdefghijklmnopqrstuvwxyz,"


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of CLIP's kind that knows letters, `cl` and `clean`; it pads with "!", as SD 2.1's does."""
    folder.mkdir(parents=True)
    merges = ["c l", "e a", "ea n</w>", "cl ean</w>"]
    words = ["!", *LETTERS, *(f"{letter}</w>" for letter in LETTERS), *(pair.replace(" ", "") for pair in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    special = {"bos_token": words[-2], "eos_token": words[-1], "unk_token": words[-1], "pad_token": "!"}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    settings = {**special, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_text_encoder(folder: Path, width: int = WIDTH, seed: int = 0) -> Path:
    """Writes text_encoder/ and tokenizer/ into a folder; returns it."""
    write_tokenizer(folder / "tokenizer")
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=64, hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    return folder
