"""The training loop: student and fake score in turn, on Accelerate, resumable to the bit.

Every random choice belongs to a sample's number (`training.randomness`), so that the number of processes, the size of
micro batches and a resume change nothing but the order of floating-point sums.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tadsr.weights import save as save_weights
from training.config.parsing import ConfigError
from training.config.train_config import as_saved, differences
from training.data import Batch, StepBatches, collate, worker_init
from training.objective.objective import Clock, Judged, MicroBatch, fake_score_loss, judge_loss, no_clock, student_loss
from training.run.build import Run
from training.run.checkpoint import Checkpoint, CheckpointError, Checkpoints
from training.run.log import Progress
from training.run.optimizer import Part, make_part
from training.run.optimizer_state import load_optimizer, optimizer_tensors
from training.run.validation import validate

WEIGHTS_NAME = "tadsr.safetensors"
CHECKPOINTS_FOLDER = "checkpoints"
STUDENT = "student"  # the part of a checkpoint that the weights are made of


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
        self.run, self.config, self.accelerator, self.clock = run, run.config, accelerator, clock
        self.networks = run.wrap(accelerator)
        config = self.config
        device = accelerator.device.type
        self.student_part = make_part(STUDENT, run.student.trainable(), config.learning_rate, config, device)
        self.parts = [self.student_part]
        if config.distillation != "none":
            fake_parameters, rate = run.teacher.trainable(), config.fake_learning_rate
            self.fake_part = make_part("fake_score", fake_parameters, rate, config, device)
            self.parts.append(self.fake_part)
        self.judge_part: Part | None = None
        if config.realism_weight:
            judge = dict(run.discriminator.named_parameters())
            self.judge_part = make_part("judge", judge, config.judge_learning_rate, config, device)
            self.parts.append(self.judge_part)
        self.checkpoints = Checkpoints(config.output / CHECKPOINTS_FOLDER, config.keep, writes=self._is_main)
        self.counters = Counters()
        self.stop_requested = False

    def train(self) -> Path:
        """Runs to `config.steps`, or until Ctrl-C or SIGTERM; leaves a checkpoint and returns the weights file."""
        config, counters = self.config, self.counters
        with (
            self._stopping_on_signals(),
            Progress(config.output, config.steps, counters.step, self._is_main) as progress,
        ):
            if config.validate_every and counters.step == 0:
                self._validate(progress)  # what there is to improve on
            for batches in self.steps():
                done = self.step(batches)
                counters.step += 1
                self._count(done, batches)
                progress.step(counters.step, done or {})
                stopping = self._any_process(self.stop_requested)
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
        """Runs one step on its micro batches; returns the mean losses, or None if it was skipped."""
        with self.clock("data"):
            micro = [self.run.micro_batch(batch, self.accelerator.device) for batch in batches]
        latents: list[Tensor] = []
        sums: dict[str, float] = {}
        for batch, is_last in _with_last(micro):
            x0, parts = self._student_step(batch, is_last, len(micro))
            latents.append(x0)
            for name, value in parts.items():
                sums[name] = sums.get(name, 0.0) + value / len(micro)
        judge_is_sound = self.judge_part is None or self._update(self.judge_part, sums)
        if not self._update(self.student_part, sums) or not judge_is_sound:
            return None
        if self.config.distillation != "none":
            sums["fake_score"] = self._fake_score_step(micro, latents)
            if not self._update(self.fake_part, sums):
                return None
        return sums

    def _student_step(self, batch: MicroBatch, is_last: bool, micro_batches: int) -> tuple[Tensor, dict[str, float]]:
        """Adds to the gradients of student and discriminator; returns the student's latents, and the losses."""
        with self._synchronised(self.networks.student, is_last):
            done = student_loss(self.config, self.networks, batch, self.run.student.downscale, self.clock)
            with self.clock("student backward"):
                self.student_part.scaler.scale(done.loss / micro_batches).backward()
        if done.judged is None:
            return done.x0, done.parts
        return done.x0, done.parts | {"judge": self._judge(done.judged, is_last, micro_batches)}

    def _judge(self, judged: Judged, is_last: bool, micro_batches: int) -> float:
        """Adds to the discriminator's gradients; returns its loss on this micro batch."""
        assert self.judge_part is not None
        with self._synchronised(self.networks.judge, is_last), self.clock("judge"):
            loss = judge_loss(self.networks, judged)
            self.judge_part.scaler.scale(loss / micro_batches).backward()
        return loss.item()

    def _fake_score_step(self, micro: list[MicroBatch], latents: list[Tensor]) -> float:
        """Adds up the fake score's gradients on the student's latents; returns the mean loss."""
        total = 0.0
        for (batch, x0), is_last in _with_last(list(zip(micro, latents, strict=True))):
            with self._synchronised(self.networks.fake_score, is_last), self.clock("fake score"):
                loss = fake_score_loss(self.config, self.networks, batch, x0)
                self.fake_part.scaler.scale(loss / len(micro)).backward()
            total += loss.item() / len(micro)
        return total

    def _update(self, part: Part, losses: Mapping[str, float]) -> bool:
        """Steps the part's optimiser unless a loss of any process is not finite; returns whether the step was sound."""
        losses_are_finite = not self._any_process(not all(math.isfinite(value) for value in losses.values()))
        with self.clock("optimiser"):
            return part.update(losses_are_finite, self.config.clip_norm)

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
            tensors = {f"{p.name}.{name}": t.detach().cpu() for p in self.parts for name, t in p.parameters.items()}
            state: dict[str, Any] = {
                "config": as_saved(self.config),
                **self.run.fingerprints,
                "skipped": self.counters.skipped,
                "skipped_in_a_row": self.counters.skipped_in_a_row,
            }
            for part in self.parts:
                moments, numbers = optimizer_tensors(part.optimizer, part.parameters, f"{part.name}_optimizer.")
                tensors |= moments
                state[part.name] = {"optimizer": numbers, "scaler": part.scaler.state_dict()}
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
        for part in self.parts:
            prefix = f"{part.name}_optimizer."
            if part.name not in state:  # a change of settings brought it in
                continue
            checkpoint.copy_into(part.parameters, tensors, f"{part.name}.")
            load_optimizer(part.optimizer, part.parameters, tensors, state[part.name]["optimizer"], prefix)
            if saved := state[part.name]["scaler"]:  # empty unless it was fp16
                part.scaler.load_state_dict(saved)
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

    def _synchronised(self, network: nn.Module, is_last: bool) -> AbstractContextManager[Any]:
        """Gradients are averaged over processes after the last micro batch only."""
        return nullcontext() if is_last else self.accelerator.no_sync(network)

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

    @contextmanager
    def _stopping_on_signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM let the step end, write a checkpoint and end the run; a second Ctrl-C ends it at once."""

        def request(number: int, frame: FrameType | None) -> None:
            self.stop_requested = True
            signal.signal(signal.SIGINT, signal.default_int_handler)

        before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _with_last(items: list[Any]) -> Iterator[tuple[Any, bool]]:
    """Yields each item, and whether it is the last."""
    for number, item in enumerate(items, start=1):
        yield item, number == len(items)
