"""The prompts of an evaluation: the test set's tags, a tagger's, a text for all; the same as those of validation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from small_tagger import CONFIG, write_tagger
from small_text_encoder import write_text_encoder
from training_pictures import save_picture
from training_runs import accelerator, few_steps, trainer

from tadsr.tagger_input import tagger_input
from tadsr.tagger_weights import load
from tadsr.tags import make_prompt
from training.data.prompts import PromptBook
from training.evaluate import Sample, main, read_sample
from training.evaluation.prompts import DEFAULT, Prompts, Wanted, find_prompts
from training.evaluation.test_set import EvaluationError, TestPicture, find_pictures, read_picture
from training.mini.base import write_mini_base
from training.mini.networks import CONTEXT_WIDTH
from training.networks.inference import Restorer
from training.run.validation import validate

SIDE = 32  # of the photographs
TIMESTEP = 700


@pytest.fixture(scope="module")
def text_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_encoder(tmp_path_factory.mktemp("encoder"), CONTEXT_WIDTH)


@pytest.fixture(scope="module")
def dape(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tagger(tmp_path_factory.mktemp("tagger") / "dape.safetensors")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model whose default prompts have embeddings, and no others."""
    return write_mini_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """A list of four pairs: the first two have tags, the third a text beside it, which a list does not look at."""
    lines = []
    for number, tags in enumerate(("clean", "a, b", "", "")):
        save_picture(tmp_path / "hq" / f"{number}.png", SIDE, SIDE, seed=number)
        (tmp_path / "lq").mkdir(exist_ok=True)
        Image.open(tmp_path / "hq" / f"{number}.png").resize((8, 8)).save(tmp_path / "lq" / f"{number}.png")
        lines.append(f"hq/{number}.png\tlq/{number}.png\t{tags}")
    (tmp_path / "list.txt").write_text("\n".join(lines))
    (tmp_path / "hq" / "2.txt").write_text("beside")
    return tmp_path / "list.txt"


def prompts_of(
    pictures: Sequence[TestPicture], base: Path, *, mine: Sequence[TestPicture] | None = None, **wanted: Any
) -> Prompts:
    return find_prompts(Wanted(**wanted), pictures, pictures if mine is None else mine, read_sample, base, "cpu")


def samples(pictures: Sequence[TestPicture]) -> list[Sample]:
    return [read_sample(picture) for picture in pictures]


def test_tags_of_a_list_and_texts_beside_pictures_are_prompts(pairs: Path, base: Path, text_encoder: Path) -> None:
    pictures = find_pictures(pairs)
    assert [picture.tags for picture in pictures] == ["clean", "a, b", None, None]
    found = prompts_of(pictures, base, text_encoder=text_encoder)
    assert found.source == f"tags of the test set for 2 of 4 pictures, else {DEFAULT}"
    assert found.texts == {"0": "clean", "1": "a, b"} and found.context("2") is None
    expected = PromptBook.build(["a, b"], base, text_encoder, pairs.parent).batch(["a, b"])
    context = found.context("1")
    assert context is not None and torch.equal(context, expected)
    assert prompts_of(pictures, base, mine=pictures[2:], text_encoder=text_encoder).source == found.source

    (pairs.parent / "lq" / "0.txt").write_text("mine\n")
    (pairs.parent / "hq" / "0.txt").write_text("not mine: the low-quality picture's counts")
    beside = find_pictures(pairs.parent)
    assert [picture.tags for picture in beside] == ["mine", None, "beside", None]
    (pairs.parent / "lq" / "0.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(EvaluationError, match=r"0\.txt cannot be read"):
        find_pictures(pairs.parent)


def test_tags_without_a_text_encoder_are_said_not_to_be_used(pairs: Path, base: Path) -> None:
    alone = base.parent / "weights.safetensors"  # a base without a file of embeddings beside it
    folder = pairs.parent / "alone"
    folder.mkdir()
    (folder / alone.name).hardlink_to(base)
    found = prompts_of(find_pictures(pairs), folder / alone.name)
    assert not found.texts
    assert found.source == f"{DEFAULT}; the test set's tags are not used, as there is no --text-encoder"
    refused: list[dict[str, Any]] = [{"text": "a cat"}, {"tagger": Path("dape.safetensors")}]
    for wanted in refused:
        with pytest.raises(EvaluationError, match="there is no text encoder for them; accepted: --text-encoder FOLDER"):
            prompts_of(find_pictures(pairs), folder / alone.name, **wanted)


def test_one_text_goes_before_tags_and_a_tagger_before_both(
    pairs: Path, base: Path, text_encoder: Path, dape: Path
) -> None:
    pictures = find_pictures(pairs)
    one = prompts_of(pictures, base, text="a cat", text_encoder=text_encoder)
    assert one.source == "'a cat'" and set(one.texts.values()) == {"a cat"} and len(one.texts) == 4
    assert set(prompts_of(pictures, base, text="", text_encoder=text_encoder).texts.values()) == {""}
    tagged = prompts_of(pictures, base, text="sharp", tagger=dape, text_encoder=text_encoder)
    assert tagged.source == "tags of dape.safetensors for the low-quality pictures, in the official form, then 'sharp'"
    weights = load(dape)
    for sample in samples(pictures):
        seen = tagger_input(sample.lq, (SIDE, SIDE), CONFIG.side)
        tags = weights.tags.given(weights.network()(seen))[0]
        assert tagged.texts[sample.name] == make_prompt(tags, "sharp")
    assert len(set(tagged.texts.values())) > 1, "the test's pictures must differ in their tags"


def test_the_command_restores_with_the_prompts_and_says_which(
    pairs: Path, base: Path, text_encoder: Path, dape: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--weights", str(base), "--data", str(pairs), "--timesteps", str(TIMESTEP), "--metrics", "psnr"]
    arguments += ["--text-encoder", str(text_encoder), "--save", "--output", str(tmp_path / "out")]
    assert main([*arguments, "--dape", str(dape), "--limit", "2"]) == 0
    assert "prompts: tags of dape.safetensors for the low-quality pictures, in the official form;" in (
        capsys.readouterr().out
    )
    assert "official" in json.loads((tmp_path / "out" / "results.json").read_text())["prompts"]
    pictures = find_pictures(pairs)[:2]
    prompts, restorer = prompts_of(pictures, base, tagger=dape, text_encoder=text_encoder), Restorer.load(base)
    for sample in samples(pictures):
        saved = read_picture(tmp_path / "out" / "pictures" / f"base t={TIMESTEP}" / f"{sample.name}.png")
        with_tags = restorer(sample.lq, TIMESTEP, context=prompts.context(sample.name))
        assert (with_tags - saved).abs().max() < 0.51 / 255, "more than rounding to 8 bits"
        assert (restorer(sample.lq, TIMESTEP) - with_tags).abs().max() > 1 / 255, "prompts must matter here"
    assert main([*arguments, "--dape", str(base)]) == 1
    assert "base.safetensors is not a converted tagger but a TADSR weights file" in capsys.readouterr().err


def test_validation_and_evaluation_give_one_number(pairs: Path, base: Path, text_encoder: Path, tmp_path: Path) -> None:
    pairs.write_text(pairs.read_text().replace("hq/3.png\tlq/3.png\t", "hq/3.png\tlq/3.png\ta dog"))
    changes = {"text_encoder": text_encoder, "prompts": "auto", "validation_timesteps": [TIMESTEP], "steps": 1}
    config = few_steps({"data": pairs, "base": base}, tmp_path / "run", validation_count=2, **changes)
    trained = trainer(config)
    weights = trained.train()
    scores = validate(trained.run, 1, accelerator(config).device)
    held_out = tmp_path / "held-out.txt"
    held_out.write_text("\n".join(pairs.read_text().splitlines()[2:]).replace("2.png\t\n", f"2.png\t{config.prompt}\n"))
    arguments = ["--weights", str(weights), "--data", str(held_out), "--timesteps", str(TIMESTEP), "--metrics", "psnr"]
    assert main([*arguments, "--text-encoder", str(text_encoder), "--output", str(tmp_path / "out")]) == 0
    means = json.loads((tmp_path / "out" / "results.json").read_text())["means"]
    assert means[f"tadsr t={TIMESTEP}"]["psnr"] == pytest.approx(scores[f"validation/psnr_y/t{TIMESTEP}"], abs=1e-3)
    other = replace(
        trained.run, prompts=PromptBook({text: torch.zeros(77, CONTEXT_WIDTH) for text in ("a dog", config.prompt)})
    )
    assert validate(other, 2, accelerator(config).device) != scores, "prompts must matter here"
