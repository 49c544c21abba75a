"""The prompts of a test set: its own tags, those that a tagger gives, one text for all, or the weights' default."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from tadsr.tagger_input import tagger_input
from tadsr.tagger_weights import load
from tadsr.tags import make_prompt
from training.cache import cache_directory
from training.data.prompts import PromptBook, has_text_encoder
from training.evaluation.test_set import EvaluationError, TestPicture

DEFAULT = "the default prompt of the weights"


class Restorable(Protocol):
    """A test picture, read: `training.evaluate.Sample`."""

    @property
    def name(self) -> str: ...
    @property
    def lq(self) -> Tensor: ...
    @property
    def scale(self) -> int: ...


@dataclass(frozen=True)
class Wanted:
    """Where the prompts come from, as the command line says; all None: the test set's tags, if they can be encoded."""

    text: str | None = None  # for all pictures; with `tagger`, put after the tags
    tagger: Path | None = None  # a file of tadsr.convert --ram
    text_encoder: Path | None = None  # folder with text_encoder/ and tokenizer/


@dataclass(frozen=True)
class Prompts:
    """The prompt of each picture."""

    source: str  # in words, for the table
    texts: Mapping[str, str] = field(default_factory=dict)  # picture -> prompt; without one: the weights' default
    book: PromptBook | None = None

    def context(self, name: str) -> Tensor | None:
        """Returns the embedding of a picture's prompt, (1, tokens, width) on the CPU; None: the weights' default."""
        if name not in self.texts or self.book is None:
            return None
        return self.book.batch([self.texts[name]])


def describe(wanted: Wanted, own: Sequence[str | None], encodable: bool) -> str:
    """Returns in words which prompts are used. own: the tags that the test set has, a text or None for each picture."""
    if wanted.tagger is not None:
        after = f", then {wanted.text!r}" if wanted.text else ""
        return f"tags of {wanted.tagger.name} for the low-quality pictures, in the official form{after}"
    if wanted.text is not None:
        return repr(wanted.text)
    count = sum(text is not None for text in own)
    if not count:
        return DEFAULT
    if not encodable:
        return f"{DEFAULT}; the test set's tags are not used, as there is no --text-encoder"
    return f"tags of the test set for {count} of {len(own)} pictures" + (
        "" if count == len(own) else f", else {DEFAULT}"
    )


def find_prompts(
    wanted: Wanted,
    pictures: Sequence[TestPicture],
    mine: Sequence[TestPicture],
    read: Callable[[TestPicture], Restorable],
    base: Path,
    device: torch.device | str,
) -> Prompts:
    """Returns the prompts of `mine`, a process's share of the pictures of a test set.

    read: gives a picture as it will be restored. base: as `PromptBook.build`'s. Raises EvaluationError where there is
    no text encoder for the prompts, and WeightsError for a file that is no tagger.
    """
    encodable = has_text_encoder(base, wanted.text_encoder)
    source = describe(wanted, [picture.tags for picture in pictures], encodable)
    if not encodable and (wanted.tagger is not None or wanted.text is not None):
        raise EvaluationError(
            f"the prompts are {source}, and there is no text encoder for them; accepted: --text-encoder FOLDER, which "
            f"has text_encoder/ and tokenizer/, or such a folder as --base"
        )
    if wanted.tagger is not None:
        texts = _tagged(wanted.tagger, wanted.text or "", map(read, mine), device)
    elif wanted.text is not None:
        texts = {picture.name: wanted.text for picture in mine}
    else:
        texts = {picture.name: picture.tags for picture in mine if picture.tags and encodable}
    if not texts:
        return Prompts(source)
    cache = cache_directory() / "training"
    book = PromptBook.build(list(texts.values()), base, wanted.text_encoder, cache, str(device))
    return Prompts(source, texts, book)


@torch.inference_mode()
def _tagged(path: Path, text: str, samples: Iterable[Restorable], device: torch.device | str) -> dict[str, str]:
    """Returns the samples' prompts as the official test makes them."""
    weights = load(path)
    network, side = weights.network(device), weights.config.side
    prompts = {}
    for sample in samples:
        size = sample.lq.shape[2] * sample.scale, sample.lq.shape[3] * sample.scale
        logits = network(tagger_input(sample.lq, size, side).to(device))
        prompts[sample.name] = make_prompt(weights.tags.given(logits)[0], text)
    return prompts
