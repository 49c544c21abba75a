"""Puts a run together: data, prompts, networks, and the weights that come out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from tadsr.schedule import timestep_grid
from tadsr.weights import Metadata, TadsrWeights, load
from training.cache import cache_directory
from training.config.train_config import TrainConfig
from training.data import (
    Batch,
    Skipped,
    TrainingSet,
    ValidationSet,
    degraded,
    open_training_set,
    open_validation_set,
)
from training.data.prompts import PromptBook
from training.data.storage import write_atomically
from training.metrics.lpips import LPIPS
from training.networks.base import Base, load_base
from training.networks.discriminator import Discriminator
from training.networks.inference import Restorer
from training.networks.lora import cast_frozen
from training.networks.student import Student, load_student_weights, student_weights
from training.networks.teacher import Teacher
from training.objective.objective import Clock, MicroBatch, Objective, no_clock
from training.objective.settings import LossSettings
from training.randomness import seeded
from training.run.optimizer import TrainedNetwork, trained_network

NAME = "TADSR"
STUDENT, FAKE_SCORE, DISCRIMINATOR = "student", "fake_score", "judge"  # names of a checkpoint's parts
HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Data:
    """What a run learns from and is validated on."""

    training: TrainingSet
    validation: ValidationSet
    skipped: tuple[Skipped, ...]  # files that cannot be used, and why


@dataclass(frozen=True)
class Run:
    """Everything of a run that does not change while it goes, and its networks."""

    config: TrainConfig
    data: Data
    prompts: PromptBook
    base: Base
    objective: Objective
    student: TrainedNetwork[Student]
    teacher: TrainedNetwork[Teacher] | None  # what is trained of it is the fake score; None without distillation
    discriminator: TrainedNetwork[Discriminator] | None  # None without `adversarial_weight`
    autocast: Callable[[], AbstractContextManager[Any]]  # of the student's networks where they are called one by one

    @property
    def trained(self) -> list[TrainedNetwork[Any]]:
        """The networks that are trained, as checkpoints hold them."""
        networks = (self.student, self.teacher, self.discriminator)
        return [network for network in networks if network is not None]

    def restorer(self) -> Restorer:
        """Returns the student as it is now, for pictures of any size; to be called under `autocast`."""
        student = self.student.module
        return Restorer(student.encoder, student.unet, student.decoder, prompt=None)

    def micro_batch(self, batch: Batch, device: torch.device) -> MicroBatch:
        """Returns a batch of the data with its prompts' embeddings, on the device."""
        lq, hq = (images.to(device, non_blocking=True) for images in (batch.lq, batch.hq))
        return MicroBatch(
            indices=batch.indices,
            lq=degraded(batch, lq, hq, self.config.seed),
            hq=hq,
            context=self.context(batch.prompts).to(device),
            negative=self.negative.expand(len(batch.indices), -1, -1).to(device),
        )

    @cached_property
    def negative(self) -> Tensor:
        """The negative prompt's embedding, (1, tokens, width), on the CPU."""
        return self.prompts.batch([self.config.negative_prompt])

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Digests of the base and of the names of the pictures: a run resumes only with the same."""
        names = hashlib.sha256("\n".join(self.data.training.names).encode()).hexdigest()
        return {"base_sha256": self.base.sha256, "pictures_sha256": names}

    def context(self, prompts: tuple[str, ...]) -> Tensor:
        """Returns the embeddings of prompts, (B, tokens, width), on the CPU."""
        return self.prompts.batch(prompts)

    def weights(self, step: int) -> TadsrWeights:
        """Returns what was trained so far, as the nodes load it, with the default prompt's embedding."""
        config = self.config
        metadata = Metadata(
            name=NAME,
            base_model=self.base.name,
            timesteps=timestep_grid(config.timestep_grid) if config.timestep_grid else (),
            lam=config.lam,
            gamma=config.gamma,
            prompt=config.prompt,
            extra={"steps": str(step), "base_sha256": self.base.sha256, "distillation": config.distillation},
        )
        base = self.base if config.self_contained else None
        return student_weights(self.student.module, metadata, prompt=self.prompts.batch([config.prompt]), base=base)


def open_data(config: TrainConfig) -> Data:
    """Returns the training and validation samples of a config; raises DataError."""
    cache = cache_directory() / "training" / "shards"
    common = {
        "data_format": config.data_format,
        "crop": config.crop,
        "scale": config.scale,
        "prompts": config.prompts,
        "prompt": config.prompt,
        "cache": cache,
    }
    training = open_training_set(
        config.data,
        flip=config.flip,
        seed=config.seed,
        plain_bicubic_share=config.plain_bicubic_share,
        light_share=config.light_share,
        held_out=config.held_out,
        degrade_later=config.degrade_on == "device",
        **common,
    )
    if config.validation is None:
        return Data(training, training.validation, training.skipped)
    common["data_format"] = "auto"
    validation, skipped = open_validation_set(config.validation, count=config.validation_count, **common)
    return Data(training, validation, (*training.skipped, *skipped))


def build_run(config: TrainConfig, data: Data, accelerator: Accelerator, clock: Clock = no_clock) -> Run:
    """Returns the run of a config, on the device; raises PromptError and WeightsError (all of them ValueErrors)."""
    with accelerator.main_process_first():  # the others find the embeddings in the cache
        texts = [config.prompt, config.negative_prompt, *data.training.texts, *data.validation.texts]
        prompts = build_prompts(config, texts, accelerator.device.type)
    base = load_base(config.base)
    student, teacher = build_networks(config, base)
    if config.mixed_precision in HALF:
        for network in (student, teacher):
            if network is not None:
                cast_frozen(network, HALF[config.mixed_precision])
    trained = partial(trained_network, config=config, accelerator=accelerator)
    return Run(
        config=config,
        data=data,
        prompts=prompts,
        base=base,
        objective=build_objective(config, student.downscale, accelerator, clock),
        student=trained(STUDENT, student, config.learning_rate),
        teacher=None if teacher is None else trained(FAKE_SCORE, teacher, config.fake_learning_rate),
        discriminator=build_discriminator(config, accelerator),
        autocast=lambda: accelerator.autocast(),
    )


def build_objective(config: TrainConfig, downscale: int, accelerator: Accelerator, clock: Clock) -> Objective:
    """Returns the losses, with LPIPS on the device."""
    precision, device = config.lpips_precision, accelerator.device

    def autocast() -> AbstractContextManager[Any]:
        return accelerator.autocast() if precision == "auto" else torch.autocast(device.type, HALF[precision])

    perceptual = LPIPS(net="vgg").to(device)
    return Objective(LossSettings.of(config), perceptual, downscale, autocast, clock)


def build_discriminator(config: TrainConfig, accelerator: Accelerator) -> TrainedNetwork[Discriminator] | None:
    """Returns a new discriminator; None where it has no weight."""
    if not config.adversarial_weight:
        return None
    with seeded(config.seed, "discriminator"):
        discriminator = Discriminator()
    return trained_network(DISCRIMINATOR, discriminator, config.discriminator_learning_rate, config, accelerator)


def build_prompts(config: TrainConfig, texts: Sequence[str], device: str) -> PromptBook:
    """Returns the embeddings of prompts, the first of which is the default one; raises PromptError."""
    return PromptBook.build(texts, config.base, config.text_encoder, cache_directory() / "training", device)


def build_networks(config: TrainConfig, base: Base) -> tuple[Student, Teacher | None]:
    """Returns the student and the teacher with its fake score, which takes over the base's UNet.

    Without distillation there is no teacher.
    """
    student = Student(
        base,
        rank=config.rank,
        encoder_rank=config.encoder_rank,
        alpha=config.alpha,
        time_aware=config.time_aware,
        train_conv_in=config.train_conv_in,
        seed=config.seed,
    )
    if config.init_weights is not None:
        load_student_weights(student, load(config.init_weights))
    if config.gradient_checkpointing:
        student.enable_checkpointing()
    return student, None if config.distillation == "none" else build_teacher(config, base)


def build_teacher(config: TrainConfig, base: Base) -> Teacher:
    """Returns the teacher with its fake score."""
    teacher = Teacher(
        base.unet, rank=config.rank, alpha=config.alpha, adapters=config.fake_score_adapters, seed=config.seed
    )
    if config.gradient_checkpointing:
        teacher.enable_checkpointing()
    return teacher


def skipped_lines(skipped: tuple[Skipped, ...], shown: int) -> list[str]:
    """Returns lines that name the files left out, at most `shown` of them one by one."""
    lines = [f"left out: {item}" for item in skipped[:shown]]
    if len(skipped) > shown:
        lines.append(f"left out: {len(skipped) - shown} more; all of them are in the run's skipped.txt")
    return lines


def write_skipped(skipped: tuple[Skipped, ...], output: Path) -> None:
    """Writes the files left out into the run's folder, one a line; nothing if there are none."""
    if skipped:
        write_atomically(output / "skipped.txt", "".join(f"{item}\n" for item in skipped).encode())
