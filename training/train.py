"""Trains TADSR: `python -m training.train --config PRESET --data PATH --base PATH --output DIR [key=value ...]`.

Running the same command again goes on from the last checkpoint. Ctrl-C and SIGTERM write one and end the run. Several
GPUs or machines: `accelerate launch -m training.train ...`. See docs/training.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from safetensors import SafetensorError

from tadsr.errors import WeightsError
from training.config.parsing import ConfigError
from training.config.train_config import PRESETS, TrainConfig, load_config, resolved
from training.data import DataError
from training.data.prompts import PromptError
from training.data.storage import write_atomically
from training.metrics.pretrained import LpipsWeightsError
from training.run.build import Data, build_run, open_data, skipped_lines, write_skipped
from training.run.checkpoint import CheckpointError
from training.run.dry_run import describe
from training.run.loop import Trainer, TrainingStopped

CONFIG_NAME = "config.yaml"
SKIPPED_SHOWN = 20
LONGEST_WAIT = timedelta(hours=6)  # of the other processes, while one encodes the prompts of a large set
USER_ERRORS = (
    *(ConfigError, DataError, PromptError, WeightsError, CheckpointError, TrainingStopped, LpipsWeightsError),
    *(SafetensorError, OSError),  # a full disk
)


def train(config: TrainConfig, *, allow_config_change: bool = False) -> Path:
    """Runs a training from its last checkpoint, or its start, to its end; returns the weights file.

    Raises ValueError (and its kinds) for settings, data, prompts, weights and checkpoints that cannot be used;
    TrainingStopped if the loss is NaN or infinite for too long.
    """
    patience = InitProcessGroupKwargs(timeout=LONGEST_WAIT)
    accelerator = Accelerator(mixed_precision=config.mixed_precision, kwargs_handlers=[patience])
    _check_machine(config, accelerator)
    data = open_data(config)
    if accelerator.is_main_process:
        _prepare_output(config, data)
    trainer = Trainer(build_run(config, data, accelerator), accelerator)
    resumed = trainer.resume(allow_config_change=allow_config_change)
    if accelerator.is_main_process:
        write_atomically(config.output / CONFIG_NAME, resolved(config).encode())
        start = f"resumed at step {trainer.counters.step}" if resumed else "started"
        print(f"{start}: {data.training.epoch_length} pictures, {len(data.validation)} for validation", flush=True)
    weights = trainer.train()
    if accelerator.is_main_process:
        print(f"weights: {weights}")
    return weights


def _check_machine(config: TrainConfig, accelerator: Accelerator) -> None:
    """Raises ConfigError for settings that these processes or this device cannot have."""
    dealt = config.micro_batch * accelerator.num_processes
    if config.batch % dealt:
        raise ConfigError(f"batch is {config.batch}; accepted: multiples of micro_batch x processes, {dealt}")
    if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ConfigError("mixed_precision is fp16, and there is no GPU; accepted on a CPU: no, bf16")


def _prepare_output(config: TrainConfig, data: Data) -> None:
    config.output.mkdir(parents=True, exist_ok=True)
    write_skipped(data.skipped, config.output)
    for line in skipped_lines(data.skipped, SKIPPED_SHOWN):
        print(line, file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m training.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=PRESETS / "paper.yaml", help="preset (default: paper.yaml)")
    parser.add_argument("--data", type=Path, help="folder of photographs, list of pairs, or folder of tar shards")
    parser.add_argument("--base", type=Path, help="Stable Diffusion 2.1-base: checkpoint or diffusers folder")
    parser.add_argument("--output", type=Path, help="folder of the run: checkpoints, weights, logs")
    parser.add_argument("--dry-run", action="store_true", help="print settings, sizes and memory, and train nothing")
    parser.add_argument("--allow-config-change", action="store_true", help="resume although settings have changed")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings: training/config/train_config.py")
    options = parser.parse_intermixed_args(arguments)
    paths = {"data": options.data, "base": options.base, "output": options.output}
    try:
        config = load_config(options.config, options.overrides, **paths)
        if options.dry_run:
            print(describe(config))
            return 0
        train(config, allow_config_change=options.allow_config_change)
    except USER_ERRORS as error:
        print(f"training: {_told(error, options.output)}", file=sys.stderr)
        return 1
    return 0


def _told(error: Exception, output: Path | None) -> str:
    """Returns an error in one sentence."""
    if not isinstance(error, OSError) or error.errno is None:
        return str(error)
    return (
        f"{error.filename or output}: {error.strerror}. What the run has written is kept: mend that, and run the same "
        "command again"
    )


if __name__ == "__main__":
    sys.exit(main())
