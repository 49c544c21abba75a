"""The tagger's conversion and file: what is merged, what is kept, and which files are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_tagger import CONFIG, RANK, TAGS, TaggerFiles, dape_state, ram_name, ram_state, random_tagger, write_files
from torch import Tensor

from tadsr.convert import main
from tadsr.errors import WeightsError
from tadsr.foreign import describe_keys
from tadsr.tagger_weights import convert, from_ram, load, merge_dape

QKV = "visual_encoder.layers.1.blocks.0.attn.qkv"
QUERY = "tagging_head.encoder.layer.0.crossattention.self.query"


@pytest.fixture
def files(tmp_path: Path) -> TaggerFiles:
    return write_files(tmp_path / "sources")


def run(files: TaggerFiles, output: Path, capsys: pytest.CaptureFixture[str], *leave_out: str) -> tuple[int, str]:
    """Runs the command; returns its exit status and what it said."""
    arguments = files.arguments
    for name in leave_out:
        place = arguments.index(name)
        del arguments[place : place + 2]
    status = main([*arguments, "-o", str(output)])
    said = capsys.readouterr()
    return status, said.out + said.err


def test_the_command_makes_a_file_that_loads_as_the_merged_tagger(
    files: TaggerFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new folder" / "dape.safetensors"
    status, said = run(files, output, capsys)
    assert status == 0, said
    assert "12 tags" in said and "DAPE.pth  sha256 " in said
    weights = load(output)
    assert weights.tags.tags == tuple(TAGS)
    assert weights.tags.thresholds == (0.5,) * 11 + (1.0,)
    assert set(weights.sources) == {"ram_small.pth", "DAPE.pth"}
    assert weights.config == CONFIG
    expected = merge_dape(from_ram(ram_state()), dape_state())
    assert set(weights.state) == set(expected)
    for key, tensor in weights.state.items():
        assert tensor.dtype == torch.float16
        torch.testing.assert_close(tensor, expected[key].half(), rtol=0, atol=0)
    image = torch.randn((2, 3, CONFIG.side, CONFIG.side), generator=torch.Generator().manual_seed(1))
    plain = random_tagger()(image)
    assert (weights.network()(image) - plain).abs().max() > 0.1, "DAPE's changes must change the numbers"


def test_without_dape_the_file_is_plain_ram(
    files: TaggerFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "ram.safetensors"
    assert run(files, output, capsys, "--dape")[0] == 0
    state = load(output).state
    for key, tensor in random_tagger().state_dict().items():
        torch.testing.assert_close(state[key], tensor.half(), rtol=0, atol=0)


def test_dape_changes_queries_and_values_of_swin_and_queries_and_keys_of_the_head_by_an_eighth() -> None:
    plain, lora = from_ram(ram_state()), dape_state()
    merged = merge_dape(plain, lora)
    changed = {key for key in plain if not plain[key].equal(merged[key])}
    blocks = [(stage, block) for stage, depth in enumerate(CONFIG.depths) for block in range(depth)]
    assert changed == {f"visual_encoder.layers.{i}.blocks.{j}.attn.qkv.weight" for i, j in blocks} | {
        f"tagging_head.{layer}.{part}.weight" for layer in (0, 1) for part in ("query", "key")
    }
    a, b = lora[f"{QKV}.lora_A"], lora[f"{QKV}.lora_B"]
    query, key, value = (merged[f"{QKV}.weight"] - plain[f"{QKV}.weight"]).chunk(3)
    torch.testing.assert_close(query, b[:32] @ a[:8] / 8, rtol=0, atol=1e-5)
    torch.testing.assert_close(key, torch.zeros(32, 32), rtol=0, atol=0)
    torch.testing.assert_close(value, b[32:] @ a[8:] / 8, rtol=0, atol=1e-5)
    change = merged["tagging_head.0.query.weight"] - plain["tagging_head.0.query.weight"]
    torch.testing.assert_close(change, lora[f"{QUERY}.lora_B"] @ lora[f"{QUERY}.lora_A"] / 8, rtol=0, atol=1e-5)


def test_a_tied_layer_of_the_tag_encoder_counts_where_it_was_trained() -> None:
    plain, lora = from_ram(ram_state()), dape_state()
    tied = QUERY.replace("tagging_head", "tag_encoder")
    lora[f"{tied}.lora_B"] = torch.ones(CONFIG.query_width, RANK)
    more = merge_dape(plain, lora)["tagging_head.0.query.weight"]
    usual = merge_dape(plain, dape_state())["tagging_head.0.query.weight"]
    torch.testing.assert_close(more - usual, torch.ones(32, 8) @ lora[f"{tied}.lora_A"] / 8, rtol=0, atol=1e-5)


def test_ram_may_call_its_head_otherwise_and_be_a_plain_or_safetensors_dict(files: TaggerFiles, tmp_path: Path) -> None:
    other = {key.replace("tagging_head.", "vision_multi."): tensor for key, tensor in ram_state().items()}
    ram = tmp_path / "ram.safetensors"
    save_file(other, ram)
    expected = convert(files.ram, files.dape, files.tags, files.thresholds).state
    seen = convert(ram, files.dape, files.tags, files.thresholds).state
    assert all(seen[key].equal(tensor) for key, tensor in expected.items())
    torch.save(other, files.ram)
    seen = convert(files.ram, files.dape, files.tags, files.thresholds).state
    assert all(seen[key].equal(tensor) for key, tensor in expected.items())


def without(state: dict[str, Tensor], *parts: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in state.items() if not any(part in key for part in parts)}


def other_rank(lora: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: t[: len(t) // 2] if key.endswith("A") else t[:, :4].contiguous() for key, t in lora.items()}


BAD_RAM: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "no head": (lambda ram: without(ram, "tagging_head"), r"it has no tagging head .* accepted is ram_swin_large"),
    "no picture": (
        lambda ram: without(ram, "visual_encoder"),
        r"it has no visual_encoder.patch_embed.proj.weight; accepted is ram",
    ),
    "a block short": (
        lambda ram: without(ram, "layers.1.blocks.0.mlp.fc1.bias"),
        r"RAM: of \d+ tensors, 1 missing \(visual_encoder.layers.1.blocks.0.mlp.fc1.bias\)",
    ),
    "DAPE": (lambda ram: dape_state(), r"it holds a LoRA: DAPE's belongs behind --dape; accepted is ram"),
    "CLIP": (lambda ram: {"text_model.final_layer_norm.weight": torch.ones(3)}, r"it is a CLIP model: .*accepted is"),
    "WD14": (
        lambda ram: {"layers.0.blocks.0.norm1.weight": torch.ones(3)},
        r"it is another image classifier, such as WD14: .*",
    ),
    "no dict": (lambda ram: [1], r"it holds a list; accepted is a dict"),
}


@pytest.mark.parametrize("name", BAD_RAM)
def test_a_ram_that_is_none_is_refused(
    files: TaggerFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    spoil, message = BAD_RAM[name]
    torch.save(spoil(ram_state()), files.ram)
    check_refused(files, tmp_path, capsys, rf"ram_small\.pth: {message}")


BAD_DAPE: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "another rank": (other_rank, r"DAPE\.pth: .* has a LoRA of \(4, \d+\) and \(32, 4\); accepted is rank 8"),
    "half an adapter": (lambda lora: without(lora, f"{QKV}.lora_B"), r"DAPE: of \d+ tensors, 1 missing"),
    "a block short": (lambda lora: without(lora, QKV), r"modules that DAPE changes: of 8 tensors, 1 missing"),
    "RAM": (lambda lora: ram_state(), r"DAPE: .* unexpected"),
    "another network's": (
        lambda lora: {f"unet.down.{side}": torch.ones(8, 8) for side in ("lora_A", "lora_B")},
        r"modules that DAPE changes: .* missing .* 1 unexpected \(unet.down\)",
    ),
}


@pytest.mark.parametrize("name", BAD_DAPE)
def test_a_dape_that_is_none_is_refused(
    files: TaggerFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    spoil, message = BAD_DAPE[name]
    torch.save(spoil(dape_state()), files.dape)
    check_refused(files, tmp_path, capsys, message)


BAD_LISTS = {
    "a tag too few": ("tags", "cat\ndog", r"there are 2 tags and 12 thresholds; accepted is one for each tag"),
    "both short": ("both", "0.5\n0.5", r"the lists have 2 tags and the tagger 12; accepted are the lists made for it"),
    "a word": ("thresholds", "0.5\nhigh", r"threshold.txt: line 2 is 'high'; accepted are numbers in 0..1"),
    "not a number": ("thresholds", "nan\n" * 12, r"the threshold of 'tag 0' is nan; accepted are numbers in 0..1"),
    "an empty line": ("tags", "cat\n\ndog", r"tag_list.txt has 1 empty lines of 3; accepted: none"),
    "no line": ("tags", "", r"tag_list.txt has 0 empty lines of 0; accepted: none"),
}


@pytest.mark.parametrize("name", BAD_LISTS)
def test_lists_that_do_not_fit_are_refused(
    files: TaggerFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    which, text, message = BAD_LISTS[name]
    for path in (files.tags, files.thresholds) if which == "both" else (getattr(files, which),):
        path.write_text(text, encoding="utf-8")
    check_refused(files, tmp_path, capsys, message)


def test_lists_that_cannot_be_read_are_refused(
    files: TaggerFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files.tags.write_bytes(b"\xff\xfe\x00")
    check_refused(files, tmp_path, capsys, r"tag_list.txt is no text; accepted is a text file")
    files.tags.unlink()
    check_refused(files, tmp_path, capsys, r"tag_list.txt cannot be read \(No such file or directory\)")


def check_refused(files: TaggerFiles, folder: Path, capsys: pytest.CaptureFixture[str], message: str) -> None:
    """Checks that the command writes nothing and says the one sentence."""
    output = folder / "dape.safetensors"
    status, said = run(files, output, capsys)
    assert status == 1
    assert said.startswith("Not converted: ") and said.count("\n") == 1
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(said)
    assert not output.exists()


def test_other_files_are_refused_by_what_they_are(files: TaggerFiles, tmp_path: Path, repository: Path) -> None:
    good = tmp_path / "dape.safetensors"
    assert main([*files.arguments, "-o", str(good)]) == 0
    refused(tmp_path / "none.safetensors", "none.safetensors: there is no such file")
    refused(
        files.ram, r"is not a safetensors file but a PyTorch pickle .*: make it with: python -m tadsr.convert --ram"
    )
    refused(repository / "weights" / "tadsr-mini.safetensors", "is not a converted tagger but a TADSR weights file")
    save_file({ram_name(key): t for key, t in load_file(good).items()}, tmp_path / "ram.safetensors")
    refused(tmp_path / "ram.safetensors", "is not a converted tagger but a tagger .*: choose the converted file")
    save_file(load_file(good), tmp_path / "bare.safetensors")
    refused(tmp_path / "bare.safetensors", "its metadata has no readable field 'tadsr.tagger': make it with")
    good.write_bytes(good.read_bytes()[:-10])
    refused(good, "is a damaged or incomplete safetensors file")


def refused(path: Path, message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        load(path)


def test_a_checkpoint_with_its_text_encoder_is_still_a_checkpoint() -> None:
    keys = ["cond_stage_model.model.ln_final.weight", "model.diffusion_model.out.2.weight"]
    assert describe_keys(keys).startswith("a Stable Diffusion checkpoint")
