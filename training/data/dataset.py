"""The training set: a photograph, crop, flip and degradation for every global sample index.

Whatever is random about a sample is a function of seed and index, so that it is the same in any process or worker,
and after resuming.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from training.data.batches import Sample
from training.data.catalogue import read_catalogue, without_small
from training.data.pictures import DataError, Picture, PictureError, Skipped
from training.data.samples import SampleOptions, centre_pair, random_pair

# The last word of a seed tells its use. It is never 0: numpy gives (a, b) and (a, b, 0) the same numbers.
ORDER, VALIDATION = 1, 2
VALIDATION_SEED = 0  # the same in all runs, so that their validation can be compared
MAX_REPLACEMENTS = 20  # so many broken pictures one after the other mean that the disk is gone


class BrokenPictureWarning(UserWarning):
    """A picture turned out to be broken when it was decoded, and another one was used."""


class ValidationSet(Dataset[Sample]):
    """The centre of each picture, always degraded in the same way."""

    def __init__(self, pictures: Sequence[Picture], options: SampleOptions, prompt: str) -> None:
        self._pictures, self._options, self._prompt = tuple(pictures), options, prompt

    @property
    def names(self) -> list[str]:
        """Names of the pictures."""
        return [picture.name for picture in self._pictures]

    @property
    def texts(self) -> list[str]:
        """All prompts of the samples, sorted."""
        return _texts(self._pictures, self._prompt)

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> Sample:
        picture = self._pictures[index]
        rng = np.random.default_rng((VALIDATION_SEED, index, VALIDATION))
        try:
            pair = centre_pair(picture, self._options, rng)
        except PictureError as error:
            raise DataError(f"the validation picture {picture.name} {error}") from error
        return Sample(index, picture.name, pair.lq, pair.hq, picture.prompt or self._prompt)


class TrainingSet(Dataset[Sample]):
    """Samples by global sample index, from 0 without end; each epoch takes every picture once, in a new order.

    skipped: what was left out of the data, and why. validation: the pictures held out of training.
    """

    def __init__(
        self,
        pictures: Sequence[Picture],
        options: SampleOptions,
        seed: int,
        prompt: str,
        validation: ValidationSet,
        skipped: Sequence[Skipped] = (),
    ) -> None:
        self._pictures, self._options, self._seed, self._prompt = tuple(pictures), options, seed, prompt
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)
        self.validation, self.skipped = validation, tuple(skipped)

    @property
    def epoch_length(self) -> int:
        """Samples in an epoch: the number of pictures."""
        return len(self._pictures)

    @property
    def names(self) -> list[str]:
        """Names of the pictures trained on, sorted."""
        return [picture.name for picture in self._pictures]

    @property
    def texts(self) -> list[str]:
        """All prompts of training and validation samples, sorted."""
        return sorted({*_texts(self._pictures, self._prompt), *self.validation.texts})

    def __getitem__(self, index: int) -> Sample:
        """Returns sample `index`. A broken picture is replaced by the next one of the epoch, with a warning."""
        epoch, position = divmod(index, self.epoch_length)
        if epoch != self._epoch:
            rng = np.random.default_rng((self._seed, epoch, ORDER))
            self._epoch, self._order = epoch, rng.permutation(self.epoch_length)
        problem = ""
        for step in range(min(self.epoch_length, MAX_REPLACEMENTS)):
            picture = self._pictures[self._order[(position + step) % self.epoch_length]]
            try:
                pair = random_pair(picture, self._options, np.random.default_rng((self._seed, index)))
            except PictureError as error:
                problem = f"{picture.name} {error}"
                warnings.warn(f"{problem}; the next picture is used instead", BrokenPictureWarning, stacklevel=2)
                continue
            return Sample(index, picture.name, pair.lq, pair.hq, picture.prompt or self._prompt, pair.degradation)
        raise DataError(f"sample {index}: no picture can be read any more; the last one, {problem}")


def open_training_set(
    data: Path,
    *,
    data_format: str,
    crop: int,
    scale: int,
    flip: float,
    seed: int,
    prompts: str,
    prompt: str,
    plain_bicubic_share: float,
    light_share: float,
    held_out: int,
    cache: Path,
    degrade_later: bool = False,
) -> TrainingSet:
    """Returns the training set of a folder of pictures, a list of pairs or tar shards.

    data_format: auto, folder, pairs or shards; auto tells by what `data` is. prompts: auto takes them from the data
    and `prompt` where there is none; fixed takes `prompt` always. held_out: so many pictures, the last ones by name,
    are for validation only. cache: a folder for indexes of shards. degrade_later: samples bring
    their degradation to be computed on the training device. Raises DataError for data that cannot be used.
    """
    options = SampleOptions(
        crop=crop,
        scale=scale,
        flip=flip,
        plain_bicubic_share=plain_bicubic_share,
        light_share=light_share,
        degrade_later=degrade_later,
    )
    catalogue = without_small(data, read_catalogue(data, data_format, scale, prompts, cache), crop)
    held, broken = _split_decodable(reversed(catalogue.pictures), held_out, options)
    held_photographs = {picture.hq for picture in held}  # a list may have several LQ versions of one
    pictures = [
        picture for picture in catalogue.pictures if picture.hq not in held_photographs and picture not in broken
    ]
    if not pictures:
        raise DataError(
            f"{data} has {len(catalogue.pictures)} pictures that can be used, of which {held_out} are to be held out: "
            f"none is left to train on"
        )
    validation = ValidationSet(held[::-1], options, prompt)
    return TrainingSet(pictures, options, seed, prompt, validation, (*catalogue.skipped, *broken.values()))


def open_validation_set(
    data: Path, *, data_format: str, crop: int, scale: int, prompts: str, prompt: str, count: int, cache: Path
) -> tuple[ValidationSet, tuple[Skipped, ...]]:
    """Returns the first `count` pictures of data of their own for validation, and what was left out.

    The arguments and errors are those of `open_training_set`.
    """
    options = SampleOptions(crop=crop, scale=scale)
    catalogue = without_small(data, read_catalogue(data, data_format, scale, prompts, cache), crop)
    pictures, broken = _split_decodable(catalogue.pictures, count, options)
    if not pictures:
        raise DataError(f"{data} has no pictures for validation that can be read, of {count} wanted")
    return ValidationSet(pictures, options, prompt), (*catalogue.skipped, *broken.values())


def _split_decodable(
    pictures: Iterable[Picture], count: int, options: SampleOptions
) -> tuple[list[Picture], dict[Picture, Skipped]]:
    """Returns the first `count` pictures that decode, and the others seen on the way with what is wrong."""
    good: list[Picture] = []
    broken: dict[Picture, Skipped] = {}
    for picture in pictures:
        if len(good) == count:
            break
        try:
            centre_pair(picture, options, np.random.default_rng(VALIDATION_SEED))
        except PictureError as error:
            broken[picture] = Skipped(picture.name, str(error))
        else:
            good.append(picture)
    return good, broken


def _texts(pictures: Iterable[Picture], prompt: str) -> list[str]:
    return sorted({picture.prompt or prompt for picture in pictures})
