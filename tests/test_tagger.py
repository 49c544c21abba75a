"""The tagger's network: against transformers' Swin and torch's attention, and against the public code's numbers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_tagger import CONFIG, random_tagger
from torch import Tensor, nn
from torch.nn import functional as F

from tadsr.errors import WeightsError
from tadsr.geometry import enlarge
from tadsr.tagger import Tagger, TaggerConfig
from tadsr.tagger_input import IMAGE_MEAN, IMAGE_STD, tagger_input
from tadsr.tagger_weights import from_ram, merge_dape
from tadsr.tags import TagList, make_prompt, tags_text

SWIN_NAMES = (  # of transformers, before and since version 5, and ours
    (r"^embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"^embeddings\.norm", "patch_embed.norm"),
    (r"^encoder\.layers", "layers"),
    (r"^layernorm\.", "norm."),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"(mlp\.fc1|intermediate\.dense)", "mlp.fc1"),
    (r"attention\.(o_proj|output\.dense)", "attn.proj"),
    (r"(mlp\.fc2|(?<!attn\.)output\.dense)", "mlp.fc2"),
    (r"attention\.\w+\.relative_position_bias_table", "attn.relative_position_bias_table"),
)
QUERY_KEY_VALUE = re.compile(r"(.+)\.attention\.(?:self\.)?(q|k|v)(?:_proj|uery|ey|alue)\.(weight|bias)")


def swin_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of transformers' Swin under our names."""
    ours, parts = {}, {}
    for key, tensor in state.items():
        if match := QUERY_KEY_VALUE.fullmatch(key):
            module = match[1].replace("encoder.layers", "layers")
            parts.setdefault(f"{module}.attn.qkv.{match[3]}", {})[match[2]] = tensor
        elif not key.endswith("relative_position_index"):
            for pattern, name in SWIN_NAMES:
                key = re.sub(pattern, name, key)
            ours[key] = tensor
    return ours | {key: torch.cat([found[name] for name in "qkv"]) for key, found in parts.items()}


@torch.no_grad()
@pytest.mark.parametrize("depths, heads", [((2, 2), (2, 4)), ((2, 4, 2), (1, 2, 4))])
def test_the_swin_transformer_computes_what_transformers_does(depths: tuple[int, ...], heads: tuple[int, ...]) -> None:
    from transformers import SwinConfig, SwinModel

    config = TaggerConfig(width=16, depths=depths, heads=heads, window=4, query_width=32, hidden_width=48, tags=3)
    sizes: Any = {"image_size": config.side, "patch_size": 4, "embed_dim": 16, "window_size": 4}
    theirs: Any = SwinModel(
        SwinConfig(**sizes, depths=list(depths), num_heads=list(heads)), add_pooling_layer=False
    ).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in theirs.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_scale = "norm" in name and name.endswith("weight")
        parameter.copy_(1 + 0.2 * noise if is_scale else 0.3 * noise)
    ours = Tagger(config).eval().visual_encoder
    ours.load_state_dict(swin_state(theirs.state_dict()))
    stages = [record(stage) for stage in ours.layers]

    image = torch.randn((2, 3, config.side, config.side), generator=generator)
    expected = theirs(image, output_hidden_states=True)
    seen = ours(image)

    for stage, hidden in zip(stages, expected.hidden_states[1:], strict=True):
        assert_close(stage[0], hidden)
    assert_close(seen[:, 1:], expected.last_hidden_state)
    assert_close(seen[:, 0], expected.last_hidden_state.mean(dim=1))


@torch.no_grad()
def test_the_head_is_cross_attention_as_torch_computes_it() -> None:
    tagger = random_tagger()
    image = torch.randn((2, 3, CONFIG.side, CONFIG.side), generator=torch.Generator().manual_seed(1))
    tokens = F.linear(tagger.visual_encoder(image), tagger.image_proj.weight, tagger.image_proj.bias)
    queries = tagger.wordvec_proj(tagger.label_embed).clamp(min=0).repeat(2, 1, 1)
    layers: Any = tagger.tagging_head
    for layer in layers:
        attention = nn.MultiheadAttention(32, 4, kdim=24, vdim=24, batch_first=True)
        attention.load_state_dict(
            {
                **{f"{name[0]}_proj_weight": getattr(layer, name).weight for name in ("query", "key", "value")},
                "in_proj_bias": torch.cat([layer.query.bias, layer.key.bias, layer.value.bias]),
                "out_proj.weight": layer.attention_out.weight,
                "out_proj.bias": layer.attention_out.bias,
            }
        )
        queries = layer.attention_norm(queries + attention(queries, tokens, tokens)[0])
        queries = layer.norm(queries + layer.narrow(F.gelu(layer.widen(queries))))
    expected = queries @ tagger.fc.weight[0] + tagger.fc.bias
    logits = tagger(image)
    assert logits.std() > 0.3, "the test's weights must tell tags apart"
    assert_close(logits, expected)


@torch.no_grad()
def test_half_precision_keeps_norms_and_softmax_in_float32() -> None:
    tagger = random_tagger()
    image = torch.randn((1, 3, CONFIG.side, CONFIG.side), generator=torch.Generator().manual_seed(1))
    dtypes = []
    for module in tagger.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_pre_hook(lambda _, inputs: dtypes.append(inputs[0].dtype))
    expected = tagger(image)
    half = tagger.half()
    for module in half.modules():
        if isinstance(module, nn.LayerNorm):
            module.float()
    result = half(image.half())
    assert set(dtypes) == {torch.float32}
    assert result.dtype == torch.float32
    assert (result - expected).abs().max() < 0.02


def test_the_real_tagger_has_its_published_size() -> None:
    state = Tagger(TaggerConfig(), device="meta").state_dict()
    assert (len(state), sum(tensor.numel() for tensor in state.values())) == (366, 212_117_045)
    assert TaggerConfig().side == 384
    assert TaggerConfig.from_state_dict(state) == TaggerConfig()
    assert TaggerConfig.from_state_dict(random_tagger().state_dict()) == CONFIG


def test_absurd_numbers_in_names_are_refused_before_anything_is_built() -> None:
    state = dict(random_tagger().state_dict())
    state["visual_encoder.layers.0.blocks.99999999999.norm1.weight"] = torch.zeros(1)
    with pytest.raises(WeightsError, match=r"number 99999999999 in its row; networks .*up to 64"):
        TaggerConfig.from_state_dict(state)


@pytest.mark.parametrize(
    "height, width, scale", [(128, 128, 4), (1, 1, 4), (50, 300, 4), (384, 384, 1), (97, 131, 1), (600, 500, 1.75)]
)
def test_the_input_is_the_enlarged_picture_squashed_without_antialiasing(height: int, width: int, scale: float) -> None:
    image = torch.rand((2, 3, height, width), generator=torch.Generator().manual_seed(3))
    size = round(height * scale), round(width * scale)
    seen = enlarge(image.double(), size)  # in float32 torch rounds the places that it samples
    seen = F.interpolate(seen, (384, 384), mode="bilinear", align_corners=False, antialias=False)
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGE_MEAN, IMAGE_STD))
    torch.testing.assert_close(tagger_input(image, size, 384), ((seen - mean) / std).float(), rtol=0, atol=2e-5)


def test_tags_are_those_above_their_own_threshold_in_the_order_of_the_list() -> None:
    tags = TagList(("zebra", "cat", "grass", "never"), (0.5, 0.7, 0.2, 1.0))
    logits = torch.tensor([[0.0, 1.0, -1.0, 99.0], [0.1, 0.84, -2.0, 0.0]])
    assert tags.given(logits) == [["cat", "grass"], ["zebra"]], "strictly above: 0.5 is not above 0.5"


def test_prompts_have_the_official_commas_or_none_too_many() -> None:
    assert tags_text(["cat", "grass"]) == "cat, grass"
    assert make_prompt(["cat", "grass"]) == "cat, grass, ,"
    assert make_prompt(["cat", "grass"], "a photo") == "cat, grass, a photo,"
    assert make_prompt([]) == ", ,"
    assert make_prompt(["cat", "grass"], " a photo ", "plain") == "cat, grass, a photo"
    assert make_prompt([], "", "plain") == ""
    with pytest.raises(ValueError, match="form of the prompt is 'short'; accepted are official, plain"):
        make_prompt([], form="short")


@torch.no_grad()
@pytest.mark.parametrize("which", ["ram", "dape"])
def test_every_stage_equals_the_public_code(shared_reference: Path, which: str) -> None:
    folder = shared_reference / "dape"
    io = load_file(folder / "reduced_io.safetensors")
    meta = json.loads((folder / "reduced_meta.json").read_text())
    state = from_ram(load_file(folder / "reduced_ram.safetensors"))
    if which == "dape":
        state = merge_dape(state, load_file(folder / "reduced_dape.safetensors"))
    tagger = Tagger(TaggerConfig.from_state_dict(state)).eval()
    tagger.load_state_dict(state)
    swin: Any = tagger.visual_encoder
    stages = {
        "patch_embed": record(swin.patch_embed),
        "stage_0_block_1": record(swin.layers[0].blocks[1]),
        **{f"stage_{i}": record(stage) for i, stage in enumerate(swin.layers)},
        "visual": record(swin),
        "image_embeds": record(tagger.image_proj),
        **{f"tagging_{i}": record(layer) for i, layer in enumerate(tagger.tagging_head)},
    }
    assert_close(tagger_input(io["image"], (128, 128), tagger.config.side), io["normalised"])
    logits = tagger(io["normalised"])
    for name, seen in stages.items():
        assert_close(seen[0], io[f"{which}.{name}"], name)
    assert_close(logits, io[f"{which}.logits"], "logits")
    given = TagList(tuple(meta["tags"]), tuple(meta["thresholds"])).given(logits)[0]
    assert tags_text(given) == meta[f"{which}_output"][0]


def test_the_key_list_of_the_real_files_resolves(shared_reference: Path) -> None:
    keys = json.loads((shared_reference / "dape" / "keys_full_size.json").read_text())
    ram = {**keys["needed"], **keys["not_needed"], **keys["buffers"]}
    lora = {**keys["needed_lora"], **keys["not_needed_lora"]}
    with torch.device("meta"):
        state = from_ram({"model": {name: torch.empty(shape) for name, shape in ram.items()}})
        merged = merge_dape(state, {name: torch.empty(shape) for name, shape in lora.items()})
        tagger = Tagger(TaggerConfig())
    tagger.load_state_dict(merged, assign=True)


def record(module: nn.Module) -> list[Tensor]:
    """Returns a list that gets the module's output."""
    outputs: list[Any] = []
    module.register_forward_hook(lambda _, inputs, output: outputs.append(output))
    return outputs


def assert_close(seen: Tensor, expected: Tensor, what: str = "") -> None:
    worst = (seen - expected).abs().max().item()
    assert worst < 1e-4, f"{what} differs by {worst}"
