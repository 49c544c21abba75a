"""The tagger's file: made of RAM's weights and DAPE's, and read again.

    python -m tadsr.convert --ram ram_swin_large_14m.pth --dape DAPE.pth --tags ram_tag_list.txt
        --thresholds ram_tag_list_threshold.txt -o dape.safetensors

RAM's file brings much that tags do not need, and DAPE's only low-rank changes (loralib's) of RAM. The converted file
has the tensors of `tagger.Tagger`, merged, in float16; its metadata holds the tags and their thresholds.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import WeightsError, reading
from .foreign import describe_bytes, describe_keys
from .lora import check_keys, merge
from .sources import read_mapped, sha256
from .tagger import Tagger, TaggerConfig
from .tags import TagList
from .weights import write_tensors

FORMAT_VERSION = 1
METADATA_FIELD = "tadsr.tagger"
MARKS = {"label_embed", "wordvec_proj.weight", "visual_encoder.patch_embed.proj.weight"}
CONVERT_HINT = (
    "make it with: python -m tadsr.convert --ram ... --dape ... --tags ... --thresholds ... -o dape.safetensors"
)
ACCEPTED_RAM, ACCEPTED_DAPE = "ram_swin_large_14m.pth", "SeeSR's DAPE.pth"
DAPE_RANK, DAPE_ALPHA = 8, 1.0  # SeeSR's code; loralib's default alpha, which the file does not hold
NEEDED = ("visual_encoder.", "tagging_head.", "label_embed", "image_proj.", "wordvec_proj.", "fc.")
HEAD_KEY = re.compile(r"(?:tagging_head|vision_multi)\.encoder\.layer\.(\d+)\.(.+)\.(weight|bias|lora_[AB])")
HEAD_NAMES = {
    "crossattention.self.query": "query",
    "crossattention.self.key": "key",
    "crossattention.self.value": "value",
    "crossattention.output.dense": "attention_out",
    "crossattention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "widen",
    "output.dense": "narrow",
    "output.LayerNorm": "norm",
}
ADAPTED = re.compile(r"visual_encoder\..+\.attn\.qkv\.weight|tagging_head\.\d+\.(query|key)\.weight")
LORA_KEY = re.compile(r"(.+)\.lora_([AB])")
# The head's cross-attention is that of the first layers of `tag_encoder`, one tensor in two places: what DAPE adds to
# the one counts for the other.
TIED = re.compile(r"tag_encoder\.encoder\.layer\.(\d+)\.crossattention\.self\.(query|key)")
UNUSED = ("tag_encoder.", "text_decoder.")


@dataclass(frozen=True)
class TaggerWeights:
    """A tagger and its tags, on the CPU."""

    state: dict[str, Tensor]  # of `Tagger`
    tags: TagList
    sources: dict[str, str]  # name of a file that it was made of -> its SHA-256

    @property
    def config(self) -> TaggerConfig:
        """The network's sizes."""
        return TaggerConfig.from_state_dict(self.state)

    def network(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tagger:
        """Returns the network in plain torch, for training's commands."""
        with torch.device("meta"):
            network = Tagger(self.config)
        network.load_state_dict({key: t.to(device, dtype) for key, t in self.state.items()}, assign=True)
        return network.eval().requires_grad_(False)


def is_tagger(keys: Sequence[str]) -> bool:
    """Returns whether these are the keys of a converted tagger; RAM's own file does not count."""
    return MARKS.issubset(keys) and not any(HEAD_KEY.fullmatch(key) for key in keys)


def save(path: Path, weights: TaggerWeights) -> None:
    """Writes the tagger's file, whole or not at all. Raises WeightsError if the weights do not fit together."""
    _check(weights)
    fields = {"format_version": FORMAT_VERSION, "sources": weights.sources, **asdict(weights.tags)}
    write_tensors(path, weights.state, {"format": "pt", METADATA_FIELD: json.dumps(fields)})


def load(path: Path) -> TaggerWeights:
    """Returns the tagger in a converted file, read mapped; raises WeightsError naming file, fault and cure."""
    if not path.is_file():
        raise WeightsError(f"{path}: there is no such file")
    with reading(path, "a file that python -m tadsr.convert --ram made"):
        return _load(path)


def _load(path: Path) -> TaggerWeights:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            keys, header = list(file.keys()), file.metadata() or {}
            if not is_tagger(keys):
                raise WeightsError(f"{path} is not a converted tagger but {describe_keys(keys, CONVERT_HINT)}")
            state = {key: file.get_tensor(key) for key in keys}
    except SafetensorError as error:
        raise WeightsError(f"{path} is {describe_bytes(path, CONVERT_HINT)} ({error})") from error
    weights = _parse(state, header)
    _check(weights)
    return weights


def convert(ram: Path, dape: Path | None, tags: Path, thresholds: Path) -> TaggerWeights:
    """Returns RAM as a tagger, with DAPE's changes merged in float32, all tensors in float16.

    dape: None for plain RAM. Raises WeightsError, naming the file, for one of another kind.
    """
    lists = TagList.read(tags, thresholds)
    with reading(ram, ACCEPTED_RAM):
        state = from_ram(read_mapped(ram))
    if dape is not None:
        with reading(dape, ACCEPTED_DAPE):
            state = merge_dape(state, read_mapped(dape))
    sources = {path.name: sha256(path) for path in (ram, dape) if path is not None}
    weights = TaggerWeights({key: t.to(torch.float16).contiguous() for key, t in state.items()}, lists, sources)
    _check(weights)
    return weights


def from_ram(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns the tensors of RAM's file that tags need, under the names of `Tagger`; raises WeightsError."""
    ram = content.get("model", content)
    found = {_own_name(key): t for key, t in ram.items() if isinstance(t, Tensor)}
    found = {key: t for key, t in found.items() if key.startswith(NEEDED)}
    accepted = f"accepted is {ACCEPTED_RAM}"
    if any(LORA_KEY.fullmatch(key) for key in ram):
        raise WeightsError(f"it holds a LoRA: DAPE's belongs behind --dape; {accepted}")
    if not found:
        raise WeightsError(f"it is {describe_keys(list(ram), 'it does not belong here')}; {accepted}")
    if not any(key.startswith("tagging_head.") for key in found):
        raise WeightsError(f"it has no tagging head (tagging_head.* or vision_multi.*); {accepted}")
    if not MARKS.issubset(found):
        raise WeightsError(f"it has no {sorted(MARKS - set(found))[0]}; {accepted}")
    expected = _expected_shapes(found)
    check_keys("RAM", set(found) & set(expected), set(expected))
    return {key: found[key] for key in expected}


def merge_dape(state: Mapping[str, Tensor], lora: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns RAM's tensors with DAPE's changes added. state: as `from_ram`; raises WeightsError."""
    modules = {m[1] for key in lora if (m := LORA_KEY.fullmatch(key))}
    check_keys("DAPE", lora, {f"{module}.lora_{side}" for module in modules for side in "AB"})
    adapted = {key.removesuffix(".weight") for key in state if ADAPTED.fullmatch(key)}
    names = {module: _adapted(module) for module in sorted(modules)}
    used = {m: name for m, name in names.items() if name in adapted or not m.startswith(UNUSED)}
    check_keys("modules that DAPE changes", set(used.values()), adapted)
    result = dict(state)
    for module, name in used.items():
        down, up = (lora[f"{module}.lora_{side}"] for side in "AB")
        result[f"{name}.weight"] = _merged(name, result[f"{name}.weight"], down, up)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tadsr.convert", description="Makes the file of the node Prompt from Image (DAPE)."
    )
    parser.add_argument("--ram", type=Path, required=True, help="ram_swin_large_14m.pth of Recognize Anything")
    parser.add_argument("--dape", type=Path, help="DAPE.pth of SeeSR; without it the tagger is plain RAM")
    parser.add_argument("--tags", type=Path, required=True, help="ram_tag_list.txt of either")
    parser.add_argument("--thresholds", type=Path, required=True, help="ram_tag_list_threshold.txt of either")
    parser.add_argument("-o", "--output", type=Path, required=True, help="safetensors file to write")
    options = parser.parse_args(arguments)
    try:
        weights = convert(options.ram, options.dape, options.tags, options.thresholds)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        save(options.output, weights)
    except (WeightsError, OSError) as error:
        print(f"Not converted: {error}", file=sys.stderr)
        return 1
    size = sum(t.nbytes for t in weights.state.values())
    print(f"{len(weights.state)} tensors, {size / 2**20:.0f} MiB, {len(weights.tags.tags)} tags, of:")
    print(*(f"  {name}  sha256 {digest}" for name, digest in weights.sources.items()), sep="\n")
    print(f"Wrote {options.output}")
    return 0


def _own_name(key: str) -> str:
    """Returns the name in `Tagger` of a tensor or adapter in RAM's or DAPE's file; other names as they are."""
    match = HEAD_KEY.fullmatch(key)
    if match is None or match[2] not in HEAD_NAMES:
        return key
    return f"tagging_head.{match[1]}.{HEAD_NAMES[match[2]]}.{match[3]}"


def _adapted(module: str) -> str:
    """Returns the module of `Tagger` that an adapter of DAPE changes; the module's own name if it is none of them."""
    if tied := TIED.fullmatch(module):
        return f"tagging_head.{tied[1]}.{tied[2]}"
    return _own_name(f"{module}.weight").removesuffix(".weight")


def _merged(name: str, weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Returns the weight with one adapter added; of queries, keys and values in one weight, to the outer two."""
    parts = 2 if name.endswith(".qkv") else 1
    rows = weight.shape[0] // 3 * 2 if parts == 2 else weight.shape[0]
    expected = ((parts * DAPE_RANK, weight.shape[1]), (rows, DAPE_RANK))
    if (tuple(down.shape), tuple(up.shape)) != expected:
        raise WeightsError(
            f"{name} has a LoRA of {tuple(down.shape)} and {tuple(up.shape)}; accepted is rank {DAPE_RANK}, for this "
            f"RAM {expected[0]} and {expected[1]}"
        )
    scale = DAPE_ALPHA / DAPE_RANK
    if parts == 1:
        return merge(weight, down, up, scale)
    query, key, value = weight.chunk(3)
    changed = [merge(w, a, b, scale) for w, a, b in zip((query, value), down.chunk(2), up.chunk(2), strict=True)]
    return torch.cat([changed[0], key, changed[1]])


def _expected_shapes(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """Returns the tensors that a tagger of these sizes has; raises WeightsError if the sizes cannot be told."""
    try:
        config = TaggerConfig.from_state_dict(state)
    except (KeyError, ValueError, IndexError) as error:
        raise WeightsError(f"it lacks tensors of a tagger, such as {error}; {CONVERT_HINT}") from error
    return {key: t.shape for key, t in Tagger(config, device="meta").state_dict().items()}


def _check(weights: TaggerWeights) -> None:
    """Raises WeightsError unless tensors, sizes and lists fit together."""
    expected = _expected_shapes(weights.state)
    check_keys("tagger", weights.state, set(expected))
    wrong = [key for key, shape in expected.items() if weights.state[key].shape != shape]
    if wrong:
        seen, shape = tuple(weights.state[wrong[0]].shape), tuple(expected[wrong[0]])
        raise WeightsError(f"{len(wrong)} tensors have another shape, such as {wrong[0]}: {seen}, accepted is {shape}")
    labels, tags = len(weights.state["label_embed"]), len(weights.tags.tags)
    if labels != tags:
        raise WeightsError(f"the lists have {tags} tags and the tagger {labels}; accepted are the lists made for it")


def _parse(state: dict[str, Tensor], header: Mapping[str, str]) -> TaggerWeights:
    try:
        fields = json.loads(header[METADATA_FIELD])
        version = fields["format_version"]
        tags, thresholds, sources = tuple(fields["tags"]), tuple(fields["thresholds"]), dict(fields["sources"])
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"its metadata has no readable field {METADATA_FIELD!r}: {CONVERT_HINT}") from error
    if version != FORMAT_VERSION:
        raise WeightsError(f"format version is {version!r}; this pack reads {FORMAT_VERSION}: update the pack")
    return TaggerWeights(state, TagList(tags, thresholds), sources)
