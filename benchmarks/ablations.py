"""Table 2 of the paper at the small model's scale: trains its four rows with the same seed, data and steps.

    python -m benchmarks.ablations --data SHARDS --base TEACHER/base.safetensors --output RUNS --steps 500

The rows are trained one after the other into RUNS/<row>, and each goes on where it stopped when the command is given
again. Measure them afterwards: the last line printed is the command. Further arguments, `key=value`, are settings of
all rows.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from training.config.parsing import ConfigError
from training.config.train_config import PRESETS, load_config
from training.run.loop import WEIGHTS_NAME
from training.train import USER_ERRORS, train

WITHOUT = ("adversarial_weight=0",)  # what the paper's training has not
ROWS = {
    "full": (),
    "without-tae": ("time_aware=false",),
    "without-tavsd": ("distillation=vsd",),  # plain variational score distillation in its place
    "baseline": ("time_aware=false", "distillation=vsd"),
    "no-distillation": ("distillation=none",),  # not in the paper
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="photographs, as for training.train")
    parser.add_argument("--base", type=Path, required=True, help="what training.mini.teacher wrote")
    parser.add_argument("--output", type=Path, required=True, help="folder of the rows")
    parser.add_argument("--config", type=Path, default=PRESETS / "mini.yaml", help="preset of all rows")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--rows", default=",".join(ROWS), help="only these")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args()
    try:
        rows = _rows(options.rows.split(","))
        for row in rows:
            overrides = [*WITHOUT, f"steps={options.steps}", "validate_every=0", *options.overrides, *ROWS[row]]
            paths = {"data": options.data, "base": options.base, "output": options.output / row}
            print(f"{row}:", flush=True)
            train(load_config(options.config, overrides, **paths))
    except USER_ERRORS as error:
        print(f"ablations: {error}", file=sys.stderr)
        return 1
    files = " ".join(f"--weights {row}={options.output / row / WEIGHTS_NAME}" for row in rows)
    print(f"python -m benchmarks.quality --methods tadsr --timesteps 100,500,900 {files}")
    return 0


def _rows(names: list[str]) -> list[str]:
    unknown = [name for name in names if name not in ROWS]
    if unknown:
        raise ConfigError(f"rows is {','.join(names)!r}; accepted: {', '.join(ROWS)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
