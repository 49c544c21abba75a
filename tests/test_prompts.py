"""Prompt embeddings: a tiny CLIP text encoder built here, its cache, and the other sources."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_text_encoder import WIDTH, write_text_encoder, write_tokenizer
from tiny_weights import self_contained
from transformers import CLIPTextModel, CLIPTokenizer

from tadsr.weights import save
from training.data.prompts import PromptBook, PromptError, encode

TEXTS = ["a clean photo", "a dirty one", ""]


@pytest.fixture(scope="module")
def text_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_encoder(tmp_path_factory.mktemp("diffusers"))


def test_embeddings_are_the_normed_last_state_of_the_padded_text(text_encoder: Path, tmp_path: Path) -> None:
    book = PromptBook.build(TEXTS, tmp_path, text_encoder, tmp_path / "cache")
    assert book.shape == (77, WIDTH)
    model = CLIPTextModel.from_pretrained(text_encoder / "text_encoder").eval()
    tokenizer = CLIPTokenizer.from_pretrained(text_encoder / "tokenizer")
    ids = tokenizer("a clean photo").input_ids
    assert len(ids) == 2 + 2 + 5, "the tiny tokenizer has a, clean, and the letters of photo"
    padded = torch.tensor([ids + [0] * (77 - len(ids))])
    with torch.no_grad():
        state = model(padded, output_hidden_states=True)
        norm = getattr(model, "text_model", model).final_layer_norm
        expected = norm(state.hidden_states[-1])[0]
    embedding = book.batch(["a clean photo"])[0]
    assert embedding.dtype == torch.float32 and torch.allclose(embedding, expected, atol=1e-5)


def test_a_batch_has_the_embeddings_in_the_order_of_the_texts(text_encoder: Path, tmp_path: Path) -> None:
    book = PromptBook.build([*TEXTS, TEXTS[0]], text_encoder, None, tmp_path)
    batch = book.batch([TEXTS[1], TEXTS[0], TEXTS[1]])
    assert batch.shape == (3, 77, WIDTH) and torch.equal(batch[0], batch[2]) and not torch.equal(batch[0], batch[1])
    alone = PromptBook.build([TEXTS[1]], text_encoder, None, tmp_path / "other")
    assert torch.allclose(alone.batch([TEXTS[1]])[0], batch[0], atol=1e-5)
    with pytest.raises(PromptError, match="no embedding of 'unknown'"):
        book.batch(["unknown"])


def test_embeddings_are_made_once(text_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = encode(TEXTS[:2], text_encoder, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in files.values()}
    assert all(path.is_relative_to(tmp_path) for path in before)
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == set(before), "something is left behind"
    more = encode(TEXTS, text_encoder, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in files.values()} == before, "they were made again"
    assert len(set(more.values())) == 3

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("the text encoder was loaded, though all embeddings are there")

    monkeypatch.setattr(CLIPTextModel, "from_pretrained", fail)
    assert encode(TEXTS, text_encoder, tmp_path) == more
    with pytest.raises(AssertionError, match="was loaded"):
        encode(["a new text"], text_encoder, tmp_path)


def test_another_text_encoder_has_other_files(text_encoder: Path, tmp_path: Path) -> None:
    first = encode(TEXTS[:1], text_encoder, tmp_path / "cache")
    changed = write_text_encoder(tmp_path / "changed", seed=1)
    second = encode(TEXTS[:1], changed, tmp_path / "cache")
    assert first != second
    assert not torch.equal(*(load_file(files[TEXTS[0]])["embedding"] for files in (first, second)))


def test_a_half_precision_variant_alone_is_enough(text_encoder: Path, tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer")
    model = CLIPTextModel.from_pretrained(text_encoder / "text_encoder")
    model.half().save_pretrained(tmp_path / "text_encoder", variant="fp16")
    half, whole = (
        PromptBook.build(TEXTS, tmp_path, folder, tmp_path / "cache").batch(TEXTS)
        for folder in (tmp_path, text_encoder)
    )
    assert half.dtype == torch.float32 and torch.allclose(half, whole, atol=0.02) and not torch.equal(half, whole)


def test_long_prompts_are_cut_with_a_warning(text_encoder: Path, tmp_path: Path) -> None:
    text = ", ".join(["q"] * 60)
    with pytest.warns(UserWarning, match="1 of 2 prompts have more than 77 tokens"):
        book = PromptBook.build([text, "a"], text_encoder, None, tmp_path)
    assert book.batch([text]).shape == (1, 77, WIDTH)


def test_a_damaged_cache_is_named(text_encoder: Path, tmp_path: Path) -> None:
    book = PromptBook.build(TEXTS, text_encoder, None, tmp_path)
    next(iter(encode(TEXTS[:1], text_encoder, tmp_path).values())).write_bytes(b"half")
    with pytest.raises(PromptError, match="a cached embedding, cannot be read .*delete it"):
        book.batch(TEXTS[:1])


def test_a_file_of_embeddings_beside_the_base(tmp_path: Path) -> None:
    embeddings = {text: torch.randn(5, 8).half() for text in TEXTS[:2]}
    save_file(embeddings, tmp_path / "prompts.safetensors")
    for base in (tmp_path / "base.safetensors", tmp_path):  # a single file, and a folder
        book = PromptBook.build(TEXTS[:2], base, None, tmp_path)
        assert book.shape == (5, 8)
        assert torch.equal(book.batch(TEXTS[1::-1]), torch.stack([embeddings[t].float() for t in TEXTS[1::-1]]))
    with pytest.raises(PromptError, match="has 2 embeddings, but none of 1 of the prompts, such as ''"):
        PromptBook.build(TEXTS, tmp_path, None, tmp_path)
    save_file({**embeddings, "": torch.zeros(1, 5, 8)}, tmp_path / "prompts.safetensors")
    with pytest.raises(PromptError, match=r"\(1, 5, 8\), \(5, 8\).*accepted: one \(tokens, width\)"):
        PromptBook.build(TEXTS, tmp_path, None, tmp_path)
    (tmp_path / "prompts.safetensors").write_bytes(b"half")
    with pytest.raises(PromptError, match="cannot be read"):
        PromptBook.build(TEXTS, tmp_path, None, tmp_path)


def test_the_bundled_weights_bring_their_default_prompt(repository: Path, tmp_path: Path) -> None:
    base = repository / "weights" / "tadsr-mini.safetensors"
    book = PromptBook.build(["clean"], base, None, tmp_path)
    assert torch.equal(book.batch(["clean"]), load_file(base)["prompt"].float())
    with pytest.raises(PromptError, match="its default prompt only, and 2 other prompts are wanted, such as 'dirty'"):
        PromptBook.build(["clean", "dirty", "more"], base, None, tmp_path)


def test_weights_made_with_another_default_prompt(tmp_path: Path) -> None:
    weights = self_contained()
    save(tmp_path / "w.safetensors", replace(weights, metadata=replace(weights.metadata, prompt="sharp")))
    assert PromptBook.build(["sharp"], tmp_path / "w.safetensors", None, tmp_path).shape == weights.prompt.shape[1:]
    with pytest.raises(PromptError, match="embedding of 'sharp', but the default prompt is 'clean'"):
        PromptBook.build(["clean"], tmp_path / "w.safetensors", None, tmp_path)


def test_without_any_source_it_says_what_is_accepted(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "base.safetensors")
    (tmp_path / "base.ckpt").write_bytes(b"a pickle")
    for base in (tmp_path / "base.safetensors", tmp_path / "base.ckpt", tmp_path):
        with pytest.raises(PromptError, match=r"no text encoder .*accepted: text_encoder=FOLDER.*prompts\.safetensors"):
            PromptBook.build(TEXTS, base, None, tmp_path)
    with pytest.raises(PromptError, match=r"which has no text_encoder/, no tokenizer/; accepted"):
        PromptBook.build(TEXTS, tmp_path, tmp_path, tmp_path)
    (tmp_path / "text_encoder").mkdir()
    write_tokenizer(tmp_path / "tokenizer")
    with pytest.raises(PromptError, match=r"has no weights"):
        PromptBook.build(TEXTS, tmp_path, tmp_path, tmp_path)
    with pytest.raises(PromptError, match="no texts"):
        PromptBook({})
