"""Makes the bundled weights file of a distillation: `python -m training.mini.bundle RUN -o FILE`.

RUN is the folder of a run of `training.train`, ended or stopped. FILE holds the mean of its last checkpoints, which is
better than each of them, in half precision.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from tadsr.errors import WeightsError
from tadsr.weights import SECTIONS, TadsrWeights, load, save
from training.config.parsing import ConfigError
from training.config.train_config import TrainConfig, differences, load_config
from training.data.prompts import LEARNED_PROMPT
from training.mini.export import LICENSE, NAME
from training.networks.base import load_base
from training.networks.student import student_weights
from training.run.build import STUDENT, build_networks
from training.run.checkpoint import Checkpoint, CheckpointError, Checkpoints
from training.run.loop import CHECKPOINTS_FOLDER, WEIGHTS_NAME
from training.run.optimizer_state import load_parameters
from training.train import CONFIG_NAME

LAST = 10  # checkpoints


def bundled(run: Path, last: int = LAST) -> TadsrWeights:
    """Returns the mean of a run's last checkpoints as self-contained weights in float16.

    Raises ConfigError and CheckpointError if the folder is not a run's or has fewer checkpoints, WeightsError if its
    base is gone or is another one.
    """
    config = load_config(run / CONFIG_NAME)
    averaged = checkpoints(run, last)
    trained = load(run / WEIGHTS_NAME)
    base = load_base(config.base)
    if base.name != NAME:
        raise WeightsError(f"{config.base} is {base.name!r}; accepted: a base of training.mini.teacher ({NAME!r})")
    if base.sha256 != trained.metadata.extra["base_sha256"]:
        raise WeightsError(f"{config.base} is not the base that {run} was trained on: its content has changed")
    for checkpoint in averaged:
        _check_settings(checkpoint, config, base.sha256)
    student, _ = build_networks(replace(config, init_weights=None), base)
    load_parameters(student.trainable(), mean(averaged), f"{STUDENT}.")
    steps = str(averaged[-1].step)
    extra = trained.metadata.extra | {"steps": steps}
    metadata = replace(trained.metadata, name=NAME, license=LICENSE, prompt=LEARNED_PROMPT, extra=extra)
    weights = student_weights(student, metadata, prompt=trained.prompt, base=base)
    sections = {name: {key: tensor.half() for key, tensor in getattr(weights, name).items()} for name in SECTIONS}
    return replace(weights, **sections, prompt=None if trained.prompt is None else trained.prompt.half())


def checkpoints(run: Path, last: int) -> list[Checkpoint]:
    """Returns a run's last checkpoints, oldest first; raises CheckpointError if there are fewer."""
    found = Checkpoints(run / CHECKPOINTS_FOLDER, 1, writes=False).all()
    if not 1 <= last <= len(found):
        raise CheckpointError(f"{run} has {len(found)} checkpoints; accepted: at most that many (--last is {last})")
    return found[-last:]


def _check_settings(checkpoint: Checkpoint, config: TrainConfig, base_sha256: str) -> None:
    """Raises CheckpointError if a checkpoint was made with other settings than the run has now."""
    state = checkpoint.state()
    changed = list(differences(state["config"], config))
    changed += ["base"] if state["base_sha256"] != base_sha256 else []
    if changed:
        raise CheckpointError(
            f"{checkpoint.path} was made with other settings ({', '.join(changed)}): average fewer, with --last"
        )


def mean(averaged: list[Checkpoint]) -> dict[str, Tensor]:
    """Returns the mean of the student's parameters, under their names in checkpoints."""
    total: dict[str, Tensor] = {}
    for checkpoint in averaged:
        for name, tensor in checkpoint.tensors().items():
            if name.startswith(f"{STUDENT}."):
                total[name] = total.get(name, 0.0) + tensor / len(averaged)
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run of training.train")
    parser.add_argument("-o", "--output", type=Path, required=True, help="file to write")
    parser.add_argument("--last", type=int, default=LAST, help=f"how many checkpoints to average (default: {LAST})")
    options = parser.parse_args()
    try:
        save(options.output, bundled(options.run, options.last))
    except (ConfigError, CheckpointError, WeightsError, OSError) as error:
        print(f"bundle: {error}", file=sys.stderr)
        return 1
    print(f"{options.output}: {options.output.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
