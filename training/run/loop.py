"""The training loop: student and fake score in turn, on Accelerate, resumable to the bit.

Every random choice belongs to a sample's number (`training.randomness`), so that the number of processes, the size of
micro batches and a resume change nothing but the order of floating-point sums.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader

from tadsr.weights import save as save_weights
from training.config.parsing import ConfigError
from training.config.train_config import as_saved, differences
from training.data import Batch, StepBatches, collate, worker_init
from training.networks.teacher import Teacher
from training.objective.objective import Clock, MicroBatch, no_clock
from training.run.build import Run
from training.run.checkpoint import Checkpoint, CheckpointError, Checkpoints
from training.run.interrupt import catching_signals
from training.run.log import Progress
from training.run.optimizer import TrainedNetwork
from training.run.validation import validate

WEIGHTS_NAME = "tadsr.safetensors"
CHECKPOINTS_FOLDER = "checkpoints"


class TrainingStopped(RuntimeError):
    """A run that cannot go on: its loss was not finite too many times in a row."""


@dataclass
class Counters:
    """How far a run is; saved with its checkpoints."""

    step: int = 0  # steps done
    skipped: int = 0  # of them, those in which a loss or a gradient of any network was not finite
    skipped_in_a_row: int = 0
    losses: dict[str, float] = field(default_factory=dict)  # sums since the last report
    losses_count: int = 0


class Trainer:
    """A run, from its last checkpoint or its start to its last step."""

    def __init__(self, run: Run, accelerator: Accelerator, *, clock: Clock = no_clock) -> None:
        """clock: that of the run's objective, for the other parts of a step."""
        self.run, self.config, self.accelerator, self.clock = run, run.config, accelerator, clock
        self.checkpoints = Checkpoints(self.config.output / CHECKPOINTS_FOLDER, self.config.keep, writes=self._is_main)
        self.counters = Counters()

    def train(self) -> Path:
        """Runs to `config.steps`, or until Ctrl-C or SIGTERM; leaves a checkpoint and returns the weights file."""
        config, counters = self.config, self.counters
        with (
            catching_signals() as interrupt,
            Progress(config.output, config.steps, counters.step, self._is_main) as progress,
        ):
            if config.validate_every and counters.step == 0:
                self._validate(progress)  # what there is to improve on
            for batches in self.steps():
                done = self.step(batches)
                counters.step += 1
                self._count(done, batches)
                progress.step(counters.step, done or {})
                stopping = self._any_process(interrupt.requested)
                if counters.step % config.log_every == 0:
                    self._report(progress)
                if config.validate_every and counters.step % config.validate_every == 0:
                    self._validate(progress)
                if counters.step % config.save_every == 0:
                    self.save()
                if stopping:
                    break
            self.save()
            if counters.step < config.steps:
                progress.say(f"stopped after step {counters.step}; the same command goes on from there")
        return config.output / WEIGHTS_NAME

    def step(self, batches: list[Batch]) -> dict[str, float] | None:
        """Runs one step on its micro batches; returns the mean losses, or None if it was skipped.

        The student learns first, and the discriminator beside it; then the fake score, on what the student made.
        """
        run = self.run
        with self.clock("data"):
            micro = [run.micro_batch(batch, self.accelerator.device) for batch in batches]
        made = [self._learn_student(batch, last, len(micro)) for batch, last in _with_last(micro)]
        losses = _means([parts for _, parts in made])
        sound = run.discriminator is None or self._update(run.discriminator, losses)
        if not self._update(run.student, losses) or not sound:
            return None
        if run.teacher is not None:
            pairs = [(batch, x0) for batch, (x0, _) in zip(micro, made, strict=True)]
            losses |= self._learn_fake_score(run.teacher, pairs)
            if not self._update(run.teacher, losses):
                return None
        return losses

    def _learn_student(self, batch: MicroBatch, is_last: bool, micro_batches: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Adds to the gradients of student and discriminator; returns the student's latents, and the losses."""
        student, teacher, discriminator = self.run.student, self.run.teacher, self.run.discriminator
        with self._synchronised(student, is_last):
            done = self.run.objective.student(
                student.wrapped,
                batch,
                None if teacher is None else teacher.module,
                None if discriminator is None else discriminator.module,
            )
            with self.clock("student backward"):
                student.backward(done.loss / micro_batches)
        if discriminator is None or done.compared is None:
            return done.x0, done.parts
        with self._synchronised(discriminator, is_last), self.clock("discriminator"):
            loss = self.run.objective.discriminator(discriminator.wrapped, done.compared)
            discriminator.backward(loss / micro_batches)
        return done.x0, done.parts | {"discriminator": loss.detach()}

    def _learn_fake_score(
        self, teacher: TrainedNetwork[Teacher], pairs: list[tuple[MicroBatch, Tensor]]
    ) -> dict[str, float]:
        """Adds up the fake score's gradients on the student's latents; returns the mean loss."""
        losses = []
        for (batch, x0), is_last in _with_last(pairs):
            with self._synchronised(teacher, is_last), self.clock("fake score"):
                loss = self.run.objective.fake_score(teacher.wrapped, batch, x0)
                teacher.backward(loss / len(pairs))
            losses.append({"fake_score": loss.detach()})
        return _means(losses)

    def _update(self, network: TrainedNetwork[Any], losses: Mapping[str, float]) -> bool:
        """Steps the network's optimizer unless a loss of any process is not finite; returns whether it was sound."""
        losses_are_finite = not self._any_process(not all(math.isfinite(value) for value in losses.values()))
        with self.clock("optimizer"):
            return network.update(losses_are_finite, self.config.clip_norm)

    def _count(self, losses: dict[str, float] | None, batches: list[Batch]) -> None:
        """Counts a step, and adds up its losses; raises TrainingStopped after too many skipped ones in a row."""
        counters = self.counters
        if losses is not None:
            counters.skipped_in_a_row = 0
            counters.losses_count += 1
            for name, value in losses.items():
                counters.losses[name] = counters.losses.get(name, 0.0) + value
            return
        counters.skipped += 1
        counters.skipped_in_a_row += 1
        if counters.skipped_in_a_row < self.config.max_bad_steps:
            return
        names = gather_object([name for batch in batches for name in batch.names])
        last = self.checkpoints.latest()
        raise TrainingStopped(
            f"step {counters.step}: loss or gradients were not finite {counters.skipped_in_a_row} times in a row. "
            f"Samples of this step: {', '.join(names)}. "
            f"Last good checkpoint: {last.path if last else 'none'}. "
            f"A lower learning rate or mixed_precision=bf16 often helps"
        )

    def _report(self, progress: Progress) -> None:
        counters = self.counters
        means = {name: value / counters.losses_count for name, value in counters.losses.items()}
        means = {name: self._mean_over_processes(value) for name, value in means.items()}
        progress.record(counters.step, {**means, "skipped": counters.skipped})
        counters.losses, counters.losses_count = {}, 0

    def _validate(self, progress: Progress) -> None:
        if self._is_main:
            scores = validate(self.run, self.counters.step, self.accelerator.device)
            progress.record(self.counters.step, scores)
        self.accelerator.wait_for_everyone()

    def save(self) -> None:
        """Writes a checkpoint and the weights file (main process only)."""
        if self._is_main:
            tensors: dict[str, Tensor] = {}
            state: dict[str, Any] = {
                "config": as_saved(self.config),
                **self.run.fingerprints,
                "skipped": self.counters.skipped,
                "skipped_in_a_row": self.counters.skipped_in_a_row,
            }
            for network in self.run.trained:
                saved, state[network.name] = network.saved()
                tensors |= saved
            self.checkpoints.save(self.counters.step, tensors, state)
            save_weights(self.config.output / WEIGHTS_NAME, self.run.weights(self.counters.step))
        self.accelerator.wait_for_everyone()

    def resume(self, *, allow_config_change: bool = False) -> bool:
        """Loads the last checkpoint, if there is one; returns whether there was.

        Raises ConfigError if the settings differ from the checkpoint's in what decides the result, unless that is
        allowed; CheckpointError if its tensors do not fit, or none of the checkpoints can be read.
        """
        checkpoint = self.checkpoints.latest()
        steps = gather_object([checkpoint.step if checkpoint else None])
        if len(set(steps)) > 1:
            raise CheckpointError(
                f"the processes see different last checkpoints, of the steps {steps}: the output folder must be the "
                f"same one on all machines"
            )
        if checkpoint is None:
            return False
        state = checkpoint.state()
        changed = differences(state["config"], self.config)
        changed |= {key: (state[key], now) for key, now in self.run.fingerprints.items() if state[key] != now}
        if changed and not allow_config_change:
            listed = "; ".join(f"{key} was {old!r}, is {new!r}" for key, (old, new) in changed.items())
            raise ConfigError(
                f"{checkpoint.path} was made with other settings: {listed}. Use the same ones, another output folder, "
                f"or --allow-config-change"
            )
        self._load(checkpoint, state)
        return True

    def _load(self, checkpoint: Checkpoint, state: dict[str, Any]) -> None:
        tensors = checkpoint.tensors()
        for network in self.run.trained:
            if network.name in state:  # else a change of settings brought it in
                network.load(checkpoint, tensors, state[network.name])
        self.counters = Counters(checkpoint.step, state["skipped"], state["skipped_in_a_row"])

    def steps(self) -> Iterator[list[Batch]]:
        """Yields this process's micro batches of each step that is left."""
        config, accelerator = self.config, self.accelerator
        batches = StepBatches(
            batch=config.batch,
            micro_batch=config.micro_batch,
            process=accelerator.process_index,
            processes=accelerator.num_processes,
            start_step=self.counters.step,
            stop_step=config.steps,
        )
        loader = DataLoader(
            self.run.data.training,
            batch_sampler=batches,
            num_workers=config.workers,
            collate_fn=collate,
            worker_init_fn=worker_init,
            pin_memory=accelerator.device.type == "cuda",
        )
        waiting = iter(loader)
        for _ in range(self.counters.step, config.steps):
            with self.clock("data"):
                ready = [next(waiting) for _ in range(batches.micro_batches)]
            yield ready

    def _synchronised(self, network: TrainedNetwork[Any], is_last: bool) -> AbstractContextManager[Any]:
        """Gradients are averaged over processes after the last micro batch only."""
        return nullcontext() if is_last else self.accelerator.no_sync(network.wrapped)

    @property
    def _is_main(self) -> bool:
        return self.accelerator.is_main_process

    def _any_process(self, flag: bool) -> bool:
        if self.accelerator.num_processes == 1:
            return flag
        flags = self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device), "sum")
        return bool(flags.item() > 0)  # type: ignore[union-attr]

    def _mean_over_processes(self, value: float) -> float:
        if self.accelerator.num_processes == 1:
            return value
        return self.accelerator.reduce(torch.tensor(value, device=self.accelerator.device), "mean").item()  # type: ignore[union-attr]


def _means(losses: list[dict[str, Tensor]]) -> dict[str, float]:
    """Returns the means over the micro batches, waiting for the device once."""
    values = torch.stack([torch.stack(list(parts.values())).float() for parts in losses]).tolist()
    return {name: sum(row[i] / len(losses) for row in values) for i, name in enumerate(losses[0])}


def _with_last(items: list[Any]) -> Iterator[tuple[Any, bool]]:
    """Yields each item, and whether it is the last."""
    for number, item in enumerate(items, start=1):
        yield item, number == len(items)
