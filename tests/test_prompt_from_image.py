"""The node Prompt from Image (DAPE) in a real ComfyUI, on small taggers in its file format."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from random_weights import self_contained
from safetensors.torch import load_file, save_file
from small_tagger import CONFIG, write_files, write_tagger
from torch import Tensor

from host.comfy_in_process import InProcessComfy, PromptError
from host.node_pack import models_folder, node, picture
from tadsr.tagger_input import tagger_input
from tadsr.tagger_weights import TaggerWeights, from_ram, load, merge_dape, save
from tadsr.tags import TagList, make_prompt, tags_text
from tadsr.weights import save as save_weights

TAGGER = "dape-small.safetensors"
CONTEXT_TOKENS = 77
pytestmark = pytest.mark.usefixtures("inference_mode")


class Source:
    """A node that gives what a test holds."""

    values: dict[str, Any] = {}
    RETURN_TYPES = ("*",)
    FUNCTION = "give"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"name": ("STRING", {})}}

    def give(self, name: str) -> tuple[Any]:
        return (self.values[name],)


class Sink:
    """A node that keeps the texts that it is given, one call each."""

    texts: list[str] = []
    RETURN_TYPES = ()
    FUNCTION = "take"
    CATEGORY = "testing"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"text": ("STRING", {"forceInput": True})}}

    def take(self, text: str) -> tuple[()]:
        self.texts.append(text)
        return ()


@pytest.fixture(scope="module")
def folder(comfy_inprocess: InProcessComfy) -> Path:
    """ComfyUI's models/tadsr, with a tagger in it."""
    import nodes

    nodes.NODE_CLASS_MAPPINGS |= {"TADSRTestSource": Source, "TADSRTestTexts": Sink}
    folder = models_folder(comfy_inprocess) / "tadsr"
    write_tagger(folder / TAGGER)
    return folder


def tag(comfy: InProcessComfy, image: Any, tagger: str = TAGGER, **inputs: Any) -> tuple[list[str], str]:
    """Returns the prompts, and the text that the node shows, through ComfyUI's validation and executor."""
    Source.values, Sink.texts = {"image": image, **inputs}, []
    links = {name: ["linked", 0] for name in inputs if name == "scale"}
    outputs = comfy.run(
        {
            "image": node("TADSRTestSource", name="image"),
            "linked": node("TADSRTestSource", name="scale"),
            "tag": node("TADSRPromptFromImage", image=["image", 0], tagger=tagger, **{**inputs, **links}),
            "sink": node("TADSRTestTexts", text=["tag", 0]),
        }
    )
    return Sink.texts, outputs["tag"]["text"][0]


def expected_tags(weights: TaggerWeights, image: Tensor, scale: float = 4.0) -> list[list[str]]:
    """Returns what the plain network says. image: (B, H, W, 3)."""
    size = round(image.shape[1] * scale), round(image.shape[2] * scale)
    return weights.tags.given(weights.network()(tagger_input(image.movedim(-1, 1), size, CONFIG.side)))


def test_each_picture_of_a_batch_gets_the_prompt_of_its_tags(comfy_inprocess: InProcessComfy, folder: Path) -> None:
    batch = torch.rand(3, 33, 50, 3, generator=torch.Generator().manual_seed(5))
    batch[1] = batch[1] * 0.2
    tags = expected_tags(load(folder / TAGGER), batch)
    assert tags[0] != tags[1] and all(tags), "the test's pictures must differ in their tags"
    prompts, shown = tag(comfy_inprocess, batch)
    assert prompts == [f"{tags_text(some)}, ," for some in tags]
    assert shown == "\n".join(prompts)
    assert tag(comfy_inprocess, batch[:1], text="a photo")[0] == [f"{tags_text(tags[0])}, a photo,"]
    assert tag(comfy_inprocess, batch[:1], text="a photo", form="plain")[0] == [f"{tags_text(tags[0])}, a photo"]


def test_the_picture_is_seen_enlarged_by_the_scale(comfy_inprocess: InProcessComfy, folder: Path) -> None:
    image = torch.rand(1, 40, 37, 3, generator=torch.Generator().manual_seed(7))
    weights = load(folder / TAGGER)
    # Thresholds between what the network says at the two scales make the difference visible.
    logits = [
        weights.network()(tagger_input(image.movedim(-1, 1), (40 * s, 37 * s), CONFIG.side)).sigmoid() for s in (1, 4)
    ]
    between = tuple((logits[0] + logits[1])[0].div(2).tolist())
    save(folder / "between.safetensors", replace(weights, tags=TagList(weights.tags.tags, between)))
    for scale, seen in ((1.0, logits[0] > logits[1]), (4.0, logits[1] > logits[0])):
        expected = [name for name, is_seen in zip(weights.tags.tags, seen[0], strict=True) if is_seen]
        assert tag(comfy_inprocess, image, "between.safetensors", scale=scale)[0] == [make_prompt(expected)]


def test_the_prompt_is_the_one_that_the_public_code_gives(
    comfy_inprocess: InProcessComfy, folder: Path, shared_reference: Path
) -> None:
    reference = shared_reference / "dape"
    meta = json.loads((reference / "reduced_meta.json").read_text())
    lists = TagList(tuple(meta["tags"]), tuple(meta["thresholds"]))
    ram = from_ram(load_file(reference / "reduced_ram.safetensors"))
    dape = merge_dape(ram, load_file(reference / "reduced_dape.safetensors"))
    image = load_file(reference / "reduced_io.safetensors")["image"].movedim(1, -1)
    for name, state in (("ram", ram), ("dape", dape)):
        file = f"reference-{name}.safetensors"
        save(folder / file, TaggerWeights({key: t.half().contiguous() for key, t in state.items()}, lists, {}))
        recorded = meta[f"{name}_output"][0]
        assert tag(comfy_inprocess, image, file, scale=1.0, form="plain")[0] == [recorded]
        official = tag(comfy_inprocess, image, file, scale=1.0)[0][0]
        assert f"{recorded}, ,".startswith(official), "more tags than the text encoder takes, cut off"


@pytest.mark.parametrize(
    "image",
    [
        torch.rand(1, 1, 1, 3, generator=torch.Generator().manual_seed(1)),
        torch.rand(1, 5, 700, 3, generator=torch.Generator().manual_seed(1)),
        torch.rand(1, 24, 24, 1, generator=torch.Generator().manual_seed(1)),
        torch.rand(1, 24, 24, 4, generator=torch.Generator().manual_seed(1)),
    ],
    ids=["one pixel", "a strip", "grey", "alpha"],
)
def test_any_picture_is_tagged(comfy_inprocess: InProcessComfy, folder: Path, image: Tensor) -> None:
    rgb = image.expand(-1, -1, -1, 3) if image.shape[-1] == 1 else image[..., :3]
    expected = expected_tags(load(folder / TAGGER), rgb)
    assert tag(comfy_inprocess, image)[0] == [make_prompt(expected[0])]


def test_a_prompt_beyond_the_text_encoder_is_cut_as_the_official_code_does_and_shown(
    comfy_inprocess: InProcessComfy, folder: Path
) -> None:
    from comfy.sd1_clip import SDTokenizer

    weights = load(folder / TAGGER)
    names = tuple(f"a {colour} crystalline zeppelin, number {colour}" for colour in "abcdefghijkl")
    save(folder / "long.safetensors", replace(weights, tags=TagList(names, (0.0,) * len(names))))
    prompts, shown = tag(comfy_inprocess, picture(16, 16), "long.safetensors", text="snow")
    whole = make_prompt(names, "snow")
    assert whole.startswith(prompts[0]) and len(prompts[0]) < len(whole)
    tokenizer: Any = SDTokenizer()
    assert len(tokenizer.tokenize_with_weights(whole)) == 2, "the whole prompt must be too long"
    chunks = tokenizer.tokenize_with_weights(prompts[0])
    assert len(chunks) == 1, "ComfyUI must encode the prompt in one part"
    kept = tokenizer.tokenizer(prompts[0])["input_ids"][:-1]
    official = tokenizer.tokenizer(whole, truncation=True, max_length=CONTEXT_TOKENS)["input_ids"]
    assert kept == official[: len(kept)] and len(official) - len(kept) < 6, "only a broken word may go, too"
    assert shown.splitlines()[0] == prompts[0]
    assert "beyond the 77 tokens" in shown and shown.endswith("snow,")
    assert tag(comfy_inprocess, picture(16, 16), "long.safetensors", form="plain")[0] == [tags_text(names)]


def test_half_precision_that_overflows_is_computed_again(comfy_inprocess: InProcessComfy, folder: Path) -> None:
    weights = load(folder / TAGGER)
    state = dict(weights.state)
    state["visual_encoder.layers.1.blocks.0.mlp.fc1.bias"] = torch.full((128,), 6e4).half()
    weights = replace(weights, state=state)
    save(folder / "overflowing.safetensors", weights)
    module = comfy_inprocess.module("tagger")
    network = module.load_tagger(str(folder / "overflowing.safetensors"))
    network.dtype = torch.float16
    planes = torch.rand(1, 3, 20, 20, generator=torch.Generator().manual_seed(2))
    image = tagger_input(planes, (80, 80), CONFIG.side)
    assert not network._logits(image, torch.float16).isfinite().all(), "the test's weights must overflow"
    assert network.tags_of(planes, (80, 80)) == weights.tags.given(weights.network()(image))[0]


def test_a_file_is_read_once_and_again_when_it_is_replaced(comfy_inprocess: InProcessComfy, folder: Path) -> None:
    load_tagger = comfy_inprocess.module("tagger").load_tagger
    path = folder / "replaced.safetensors"
    write_tagger(path)
    first = load_tagger(str(path))
    assert load_tagger(str(path)) is first
    assert {p.dtype for p in first.model.parameters()} == {torch.float16}, "405 MiB for the real one, not 809"
    weights = load(path)
    fingerprint = comfy_inprocess.node("TADSRPromptFromImage").fingerprint_inputs
    before = fingerprint(tagger=path.name, image=None)
    save(path, replace(weights, tags=TagList(tuple(f"new {i}" for i in range(12)), (0.0,) * 12)))
    assert fingerprint(tagger=path.name, image=None) != before
    assert tag(comfy_inprocess, picture(8, 8), path.name)[0][0].startswith("new 0, new 1, ")


def wrong_files(folder: Path) -> None:
    sources = write_files(folder.parent / "tagger sources")
    (folder / "ram.pth").write_bytes(sources.ram.read_bytes())
    save_weights(folder / "upscaler.safetensors", self_contained())
    save_file({"layers.0.blocks.0.norm1.weight": torch.ones(3)}, folder / "wd14.safetensors")
    save_file({"vision_model.embeddings.class_embedding": torch.ones(3)}, folder / "clip.safetensors")
    half = (folder / TAGGER).read_bytes()
    (folder / "half.safetensors").write_bytes(half[: len(half) // 2])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ram.pth", r"ram\.pth is not a safetensors file but a PyTorch pickle .*make it with: python -m tadsr.convert"),
        ("upscaler.safetensors", r"not a converted tagger but a TADSR weights file: choose it in Load TADSR Model"),
        ("wd14.safetensors", r"another image classifier, such as WD14: .* gives a STRING can make the prompt"),
        ("clip.safetensors", r"not a converted tagger but a CLIP model"),
        ("half.safetensors", r"a damaged or incomplete safetensors file"),
        ("absent.safetensors", r"absent\.safetensors"),
    ],
)
def test_other_files_are_refused_by_what_they_are(
    comfy_inprocess: InProcessComfy, folder: Path, name: str, message: str
) -> None:
    wrong_files(folder)
    with pytest.raises(PromptError, match=message):
        tag(comfy_inprocess, picture(8, 8), name)
    assert tag(comfy_inprocess, picture(8, 8))[0], "ComfyUI does not run the next prompt"


@pytest.mark.parametrize(
    ("image", "inputs", "message"),
    [
        (torch.zeros(0, 8, 8, 3), {}, "accepted is a batch of at least one picture"),
        (torch.zeros(1, 8, 8, 2), {}, "image has 2 channels; accepted are 1"),
        (torch.full((1, 8, 8, 3), float("nan")), {}, "192 values that are NaN"),
        (torch.zeros(1, 8, 8, 3), {"scale": 0.0}, r"scale is 0; accepted are 1\.\.8"),
        (torch.zeros(1, 8, 8, 3), {"form": "short"}, "form"),
    ],
)
def test_pictures_and_settings_that_cannot_be_are_refused(
    comfy_inprocess: InProcessComfy, folder: Path, image: Tensor, inputs: dict[str, Any], message: str
) -> None:
    with pytest.raises(PromptError, match=message):
        tag(comfy_inprocess, image, **inputs)
