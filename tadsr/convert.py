"""Turns weights that authors released into a TADSR file: `python -m tadsr.convert tadsr.pkl -o tadsr.safetensors`.

Weights of TADSR, OSEDiff, PiSA-SR, HYPIR (pickles) and OMGSR-S (a folder) are known by their content. Nothing in a
pickle is executed. With --base the base model is taken in too, which makes a file that needs no checkpoint. With
--check nothing is written: it says what a file is, and whether it is whole.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .errors import WeightsError, reading
from .lora import adapters
from .methods import TADSR, describe, license_notice
from .pickles import is_pickle
from .releases import peft_folder, read_release
from .sources import read_base, read_prompt, sha256
from .tagger_weights import main as convert_tagger
from .weights import TadsrWeights, has_digest, load, save, validate

OFFICIAL_TIMESTEPS, OFFICIAL_LICENSE = TADSR.timesteps, TADSR.license
LICENSE_NOTICE = license_notice(TADSR.name, TADSR.license)


def convert_official(path: str | Path, base_path: str | Path | None = None) -> TadsrWeights:
    """Returns the weights in a file or folder that authors released; with a base, self-contained weights.

    base_path: a single-file checkpoint or a diffusers folder. Raises WeightsError for any other file, for a
    missing or left-over tensor, and for a base of other shapes.
    """
    path = Path(path)
    weights = read_release(path)
    with reading(path, "weights that are whole"):
        validate(weights)
    weights = replace(weights, metadata=replace(weights.metadata, source_sha256=_source_sha256(path)))
    if base_path is None:
        return weights
    weights = replace(weights, base=read_base(Path(base_path)))
    with reading(f"{path} with the base {base_path}", "the base that the weights were trained on"):
        validate(weights)
    return weights


def _source_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file, or of those of a folder's files in the order of their names."""
    folder = peft_folder(path)
    if folder is None:
        return sha256(path)
    parts = sorted(part for part in folder.rglob("*") if part.is_file())
    return hashlib.sha256("".join(sha256(part) for part in parts).encode()).hexdigest()


def summary(weights: TadsrWeights) -> str:
    """Returns what the weights hold, for people."""
    meta = weights.metadata
    base = "included" if weights.is_self_contained else f"{meta.base_model}, not included"
    unet, semantic = adapters(weights.unet_lora), adapters(weights.unet_lora_semantic)
    second = f" and a second set of {len(semantic)}" if semantic else ""
    time = f"{len(weights.encoder_time)} tensors of time layers" if meta.time_aware else "no time layers: the plain one"
    return "\n".join(
        [
            f"Method: {describe(meta.name, meta.formula, meta.timesteps)}",
            f"UNet: {len(unet)} adapters of rank {meta.rank}{second}, {len(weights.unet_full)} tensors trained in full",
            f"Encoder: {len(adapters(weights.encoder_lora))} adapters of rank {meta.encoder_rank}, {time}",
            f"Alpha: {meta.alpha:g}",
            f"Source sha256: {meta.source_sha256}",
            f"Base model: {base}",
            f"Default prompt: {_prompt(weights)}",
        ]
    )


def _prompt(weights: TadsrWeights) -> str:
    if weights.prompt is not None:
        return f"included, {tuple(weights.prompt.shape)}"
    return "the empty text, from the base's CLIP" if weights.metadata.empty_prompt else "none; connect one"


def check(path: Path) -> str:
    """Returns what a file or folder is, and that it is whole; raises WeightsError, saying why, if it is not."""
    if peft_folder(path) or (path.is_file() and is_pickle(path)):
        weights = convert_official(path)
        verdict = "Whole: every tensor is known. Such a file has no digest; compare the sha256 with its source"
    else:
        weights = load(path, check_digest=True)
        verdict = (
            "Whole: all numbers are those that were written"
            if has_digest(path)
            else "Readable, without a digest: it was written before there was one"
        )
    notice = license_notice(weights.metadata.name, weights.metadata.license)
    return f"{path}\n{summary(weights)}\n{notice}\n{verdict}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if any(argument.split("=")[0] == "--ram" for argument in arguments):
        return convert_tagger(arguments)
    parser = argparse.ArgumentParser(
        prog="python -m tadsr.convert",
        description=(__doc__ or "").split("\n\n")[0],
        epilog="With --ram it makes the tagger's file instead: python -m tadsr.convert --ram FILE --help",
    )
    parser.add_argument("checkpoint", type=Path, help="the authors' file, as tadsr.pkl or osediff.pkl, or folder")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("-o", "--output", type=Path, help="safetensors file to write")
    target.add_argument("--check", action="store_true", help="say what the file is and whether it is whole")
    parser.add_argument("--base", type=Path, help="checkpoint or diffusers folder to include")
    parser.add_argument("--prompt-embedding", type=Path, help="file with one tensor: the default prompt's embedding")
    options = parser.parse_args(arguments)
    try:
        print(check(options.checkpoint) if options.check else _convert(options))
    except (WeightsError, OSError) as error:
        print(f"{'Not whole' if options.check else 'Not converted'}: {error}", file=sys.stderr)
        return 1
    return 0


def _convert(options: argparse.Namespace) -> str:
    """Writes the file; returns what was done."""
    weights = convert_official(options.checkpoint, options.base)
    if options.prompt_embedding:
        weights = replace(weights, prompt=read_prompt(options.prompt_embedding))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    save(options.output, weights)
    notice = license_notice(weights.metadata.name, weights.metadata.license)
    return f"{summary(weights)}\n{notice}\nWrote {options.output}"


if __name__ == "__main__":
    sys.exit(main())
