"""The training loop of the bundled model's base: one network of its own, resumable, with averaged weights."""

from __future__ import annotations

import argparse
import io
import json
import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from training.cache import cache_directory
from training.config.parsing import ConfigError, accepted, hints_of, validate
from training.config.train_config import PROMPT, Count, CountOrNone, Decay, Rate, Share
from training.data import StepBatches, collate, degraded, open_training_set, worker_init
from training.data.storage import write_atomically
from training.mini.descent import follow, half_cosine

CHECKPOINT, LOG, CONFIG = "checkpoint.pt", "log.jsonl", "config.json"
LEAST_RATE = 0.02  # of the peak, at the end of the cosine
JUDGE = "judge."  # of a stage's parameters
STEP_SEEDS = 1_000_003  # steps' random numbers of two seeds do not meet


@dataclass(frozen=True, kw_only=True)
class PretrainingConfig:
    """Settings that both trainings share; all are saved beside the checkpoint."""

    data: Path
    """Photographs: a folder, or a folder of shards; see docs/training.md."""
    output: Path
    """Folder of the run: checkpoint, log, and what comes out."""
    steps: Count = 4000
    batch: Count = 8
    crop: int = 64
    """Side of a crop in pixels."""
    learning_rate: Rate = 5e-4
    """At its peak: it rises linearly for `warmup_steps`, then falls as half a cosine."""
    warmup_steps: CountOrNone = 100
    clip_norm: float = 1.0
    average_decay: Decay = 0.998
    """Of the averaged weights, which are what comes out."""
    plain_share: Share = 0.5
    """Share of low-quality pictures that are only shrunk and enlarged."""
    light_share: Share = 0.5
    """Share of the others with the light degradation."""
    held_out: CountOrNone = 64
    """Pictures of `data`, the last by name, that are not trained on."""
    workers: CountOrNone = 2
    precision: Literal["no", "bf16"] = "no"
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    seed: int = 0
    save_every: Count = 200
    log_every: Count = 20

    def __post_init__(self) -> None:
        validate(self)


class Losses(NamedTuple):
    """What a step found: numbers with a gradient, and the parts of the first for the log."""

    loss: Tensor
    judged: Tensor | None  # the judge's own loss, if the stage has a judge
    parts: Mapping[str, Tensor]


class Stage(nn.Module):
    """What is trained: its parameters are averaged and saved."""

    judge: nn.Module | None
    """A discriminator, trained beside by its own loss."""

    def __init__(self, judge: nn.Module | None = None, judge_rate: float = 0.0) -> None:
        super().__init__()
        self.judge, self.judge_rate = judge, judge_rate

    @abstractmethod
    def groups(self) -> list[dict[str, Any]]:
        """Returns the optimizer's groups: `params`, and their `share` of the learning rate."""

    @abstractmethod
    def losses(self, lq: Tensor, hq: Tensor, progress: float) -> Losses:
        """Returns the losses of a batch. lq (enlarged), hq: (B, 3, crop, crop) in [-1, 1]; progress: 0..1."""


def learning_rate(config: PretrainingConfig, step: int) -> float:
    """Returns the rate at a step: linear warm-up, then half a cosine to LEAST_RATE of the peak."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * half_cosine(progress, LEAST_RATE)


def pretrain(stage: Stage, config: PretrainingConfig, stop_after: int | None = None) -> dict[str, Tensor]:
    """Runs from the last checkpoint in `config.output`, or from the start; returns the averaged weights.

    stop_after: a step to stop at earlier, with the learning rate of the whole run.
    """
    config.output.mkdir(parents=True, exist_ok=True)
    (config.output / CONFIG).write_text(json.dumps(asdict(config), indent=1, default=str), encoding="utf-8")
    run = _Run(stage.to(config.device), config)
    run.resume()
    stop = min(config.steps, stop_after or config.steps)
    started, first = time.monotonic(), run.step
    for lq, hq in _batches(config, run.step, stop):
        parts = run.advance(lq, hq)
        if run.step % config.log_every == 0:
            speed = (run.step - first) / (time.monotonic() - started)
            run.log({"step": run.step, **parts, "steps_per_second": speed})
        if run.step % config.save_every == 0 or run.step == stop:
            run.save()
    return {name: tensor.cpu() for name, tensor in run.average.items()}


def _batches(config: PretrainingConfig, start: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the low- and high-quality pictures of the steps from `start` to `stop`, on the device."""
    data = open_training_set(
        config.data,
        data_format="auto",
        crop=config.crop,
        scale=4,
        flip=0.5,
        seed=config.seed,
        prompts="fixed",
        prompt=PROMPT,
        plain_bicubic_share=config.plain_share,
        light_share=config.light_share,
        held_out=config.held_out,
        cache=cache_directory() / "training" / "shards",
        degrade_later=config.device != "cpu",
    )
    steps = StepBatches(config.batch, config.batch, 0, 1, start, stop)
    loader = DataLoader(
        data, batch_sampler=steps, collate_fn=collate, num_workers=config.workers, worker_init_fn=worker_init
    )
    for batch in loader:
        lq, hq = batch.lq.to(config.device), batch.hq.to(config.device)
        yield degraded(batch, lq, hq, config.seed), hq


class _Run:
    """The state of a run."""

    def __init__(self, stage: Stage, config: PretrainingConfig) -> None:
        self.stage, self.config, self.step = stage, config, 0
        groups = stage.groups()
        chosen = {id(parameter) for group in groups for parameter in group["params"]}
        self.trained = {name: p for name, p in stage.named_parameters() if id(p) in chosen}
        self.average = {name: parameter.detach().clone() for name, parameter in self.trained.items()}
        self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
        self.judge_optimizer = None
        if stage.judge is not None:
            judge = stage.judge.parameters()
            self.judge_optimizer = torch.optim.AdamW(judge, lr=stage.judge_rate, betas=(0.5, 0.99))

    def advance(self, lq: Tensor, hq: Tensor) -> dict[str, float]:
        """Makes one step; returns the parts of the loss, and the norm of the gradient."""
        config = self.config
        torch.manual_seed(config.seed * STEP_SEEDS + self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.step) * group["share"]
        with torch.autocast(config.device.split(":")[0], torch.bfloat16, enabled=config.precision == "bf16"):
            losses = self.stage.losses(lq, hq, self.step / config.steps)
        self.optimizer.zero_grad(set_to_none=True)
        losses.loss.backward(inputs=list(self.trained.values()))
        norm = nn.utils.clip_grad_norm_(self.trained.values(), config.clip_norm)
        if torch.isfinite(norm):
            self.optimizer.step()
        if self.judge_optimizer is not None and losses.judged is not None and self.stage.judge is not None:
            self.judge_optimizer.zero_grad(set_to_none=True)
            losses.judged.backward(inputs=list(self.stage.judge.parameters()))
            self.judge_optimizer.step()
        self.step += 1
        follow(self.average.values(), self.trained.values(), self.step, config.average_decay)
        return {name: part.item() for name, part in losses.parts.items()} | {"norm": norm.item()}

    def save(self) -> None:
        """Writes the checkpoint, whole or not at all."""
        buffer = io.BytesIO()
        torch.save(
            {
                "step": self.step,
                "stage": self._trained(self.stage.state_dict()),
                "average": self.average,
                "optimizer": self.optimizer.state_dict(),
                "judge_optimizer": self.judge_optimizer.state_dict() if self.judge_optimizer else None,
            },
            buffer,
        )
        write_atomically(self.config.output / CHECKPOINT, buffer.getvalue())

    def _trained(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns what is trained of a stage's state; the rest comes from files, which may have changed since."""
        return {name: tensor for name, tensor in state.items() if name in self.trained or name.startswith(JUDGE)}

    def resume(self) -> None:
        """Goes on from the checkpoint, if there is one."""
        path = self.config.output / CHECKPOINT
        if not path.is_file():
            return
        state = torch.load(path, map_location=self.config.device, weights_only=True)
        self.step = state["step"]
        self.stage.load_state_dict(self._trained(state["stage"]), strict=False)
        self.average = state["average"]
        self.optimizer.load_state_dict(state["optimizer"])
        if self.judge_optimizer is not None:
            self.judge_optimizer.load_state_dict(state["judge_optimizer"])
        print(f"goes on after step {self.step}", flush=True)

    def log(self, record: Mapping[str, float]) -> None:
        """Prints a record and adds it to the log."""
        rounded = {name: float(f"{value:.4g}") for name, value in record.items()}
        with (self.config.output / LOG).open("a", encoding="utf-8") as log:
            log.write(json.dumps(rounded) + "\n")
        print(rounded, flush=True)


C = TypeVar("C", bound=PretrainingConfig)


def read_options(kind: type[C], description: str | None) -> C:
    """Returns a config from the command line, one option for each field; ends with a message on a wrong value."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    hints = hints_of(kind)
    for field in fields(kind):
        required = field.default is MISSING
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            required=required,
            default=None if required else field.default,
            help=accepted(hints[field.name]) + ("" if required else f" (default: {field.default})"),
        )
    try:
        return kind(**vars(parser.parse_args()))
    except ConfigError as error:
        parser.error(str(error))
