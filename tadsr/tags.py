"""Tags and prompts: which tags the tagger's numbers give, and the text that is made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .errors import WeightsError

SEPARATOR = ", "
OFFICIAL, PLAIN = "official", "plain"
PROMPT_FORMS = (OFFICIAL, PLAIN)


@dataclass(frozen=True)
class TagList:
    """The tags that a tagger knows, in the order of its outputs, and from which probability on each is given."""

    tags: tuple[str, ...]
    thresholds: tuple[float, ...]  # 0..1; a tag with 1 is never given

    def __post_init__(self) -> None:
        """Raises WeightsError for lists that are not a tagger's."""
        if len(self.tags) != len(self.thresholds):
            raise WeightsError(
                f"there are {len(self.tags)} tags and {len(self.thresholds)} thresholds; accepted is one for each tag"
            )
        wrong = [(tag, t) for tag, t in zip(self.tags, self.thresholds, strict=True) if not 0 <= t <= 1]
        if wrong:
            raise WeightsError(f"the threshold of {wrong[0][0]!r} is {wrong[0][1]:g}; accepted are numbers in 0..1")

    @classmethod
    def read(cls, tags: Path, thresholds: Path) -> TagList:
        """Returns the lists in two text files, a tag and a number a line. Raises WeightsError naming the file."""
        numbers = []
        for number, line in enumerate(_lines(thresholds), start=1):
            try:
                numbers.append(float(line))
            except ValueError as error:
                raise WeightsError(f"{thresholds}: line {number} is {line!r}; accepted are numbers in 0..1") from error
        return cls(tuple(_lines(tags)), tuple(numbers))

    def given(self, logits: Tensor) -> list[list[str]]:
        """Returns each picture's tags, in the order of the list. logits: (B, tags)."""
        chosen = logits.float().cpu().sigmoid() > torch.tensor(self.thresholds)
        return [[self.tags[i] for i in row.nonzero().flatten().tolist()] for row in chosen]


def tags_text(tags: Sequence[str]) -> str:
    """Returns the tags as one text: "cat, grass"."""
    return SEPARATOR.join(tags)


def make_prompt(tags: Sequence[str], text: str = "", form: str = OFFICIAL) -> str:
    """Returns the prompt of a picture's tags and the user's text. Raises ValueError for an unknown form.

    form: official, as the official test writes it, a comma after each part though it be empty: "cat, grass, ,"; plain:
    what there is, and nothing else: "cat, grass".
    """
    if form not in PROMPT_FORMS:
        raise ValueError(f"the form of the prompt is {form!r}; accepted are {', '.join(PROMPT_FORMS)}")
    if form == OFFICIAL:
        return f"{tags_text(tags)}{SEPARATOR}{text},"
    return SEPARATOR.join(part for part in (tags_text(tags), text.strip()) if part)


def _lines(path: Path) -> list[str]:
    """Returns the lines of a text file; raises WeightsError where it is missing, empty or no text."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise WeightsError(f"{path} is no text; accepted is a text file with one entry a line") from error
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error.strerror}); accepted is a text file") from error
    lines = lines[:-1] if lines and not lines[-1] else lines
    if not lines or not all(lines):
        raise WeightsError(f"{path} has {sum(not line for line in lines)} empty lines of {len(lines)}; accepted: none")
    return lines
