"""The order of the degradation's steps, the same for numpy and for torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from .parameters import DegradationParameters, KernelParameters, NoiseParameters, StageParameters

Image = TypeVar("Image")
Source = TypeVar("Source")  # of random numbers


@dataclass(frozen=True)
class Operators(Generic[Image, Source]):
    """What computes the steps on one kind of image."""

    blur: Callable[[Image, KernelParameters], Image]
    resize: Callable[[Image, int, int, str, bool], Image]  # image, height, width, mode, antialias
    add_noise: Callable[[Image, NoiseParameters, Source], Image]
    compress_jpeg: Callable[[Image, int | None], Image]

    def run(self, image: Image, size: tuple[int, int], parameters: DegradationParameters, source: Source) -> Image:
        """Returns the degradation of an image of `size` (height, width), not yet rounded."""
        target = size[0] // parameters.downscale, size[1] // parameters.downscale
        if parameters.first is not None:
            image = self._stage(image, parameters.first, size, source)
            image = self.compress_jpeg(image, parameters.first_quality)
        image = self._stage(image, parameters.second, target, source)
        if parameters.jpeg_before_resize:
            image = self.compress_jpeg(image, parameters.final_quality)
            return self._resize_finally(image, target, parameters)
        image = self._resize_finally(image, target, parameters)
        return self.compress_jpeg(image, parameters.final_quality)

    def _stage(self, image: Image, parameters: StageParameters, size: tuple[int, int], source: Source) -> Image:
        if parameters.kernel is not None:
            image = self.blur(image, parameters.kernel)
        step = parameters.resize
        height, width = (max(1, int(side * step.scale)) for side in size)
        image = self.resize(image, height, width, step.mode, step.antialias)
        return self.add_noise(image, parameters.noise, source)

    def _resize_finally(self, image: Image, target: tuple[int, int], parameters: DegradationParameters) -> Image:
        image = self.resize(image, *target, parameters.final_mode, parameters.final_antialias)
        return image if parameters.final_kernel is None else self.blur(image, parameters.final_kernel)
