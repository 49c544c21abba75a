"""Puts bugs into a copy of this repository, and reports which tests catch them: `python -m tests.mutants`.

Each bug is one line of `MUTANTS`, and the tests that ought to fail by it. The copy has no ../shared beside it: what
only the recorded reference would show counts as survived. `--only sign clip` tries some, `--list` lists them. Ends
with 1 if one survives. Needs nothing but Python and the internet for the first run, like runtests.py.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [] if str(REPOSITORY) in sys.path else [str(REPOSITORY)]  # run by path

from host.commands import clean_environment  # noqa: E402
from host.errors import HostError  # noqa: E402
from host.interpreter import chosen_comfyui, prepare_tests, run_again  # noqa: E402

TESTS_FAILED = 1  # pytest's exit code; others mean that it could not run them
PATIENCE = 900  # seconds for the tests of one bug: some hang by it
LOSSES, SCHEDULE = "training/objective/losses.py", "tadsr/schedule.py"


@dataclass(frozen=True)
class Mutant:
    """A bug: what stands once in a file, what stands there instead, and the tests that are responsible."""

    name: str
    file: str
    right: str
    wrong: str
    tests: Sequence[str]

    def apply(self, tree: Path) -> None:
        """Puts the bug into a tree. Raises ValueError unless its line is there, once."""
        path = tree / self.file
        text = path.read_text(encoding="utf-8")
        if text.count(self.right) != 1:
            raise ValueError(f"{self.name}: {self.file} has {self.right!r} {text.count(self.right)} times; wanted: 1")
        path.write_text(text.replace(self.right, self.wrong), encoding="utf-8")


MUTANTS = (
    Mutant(
        "sign of the distillation's gradient",
        LOSSES,
        "(x0_fake - x0_real) / weight",
        "(x0_real - x0_fake) / weight",
        ["tests/test_losses.py"],
    ),
    Mutant(
        "weight from the fake score's x0",
        LOSSES,
        "weight = (z0 - x0_real)",
        "weight = (z0 - x0_fake)",
        ["tests/test_losses.py"],
    ),
    Mutant(
        "prompt and negative prompt swapped",
        LOSSES,
        "torch.cat([negative, context])",
        "torch.cat([context, negative])",
        ["tests/test_losses.py"],
    ),
    Mutant(
        "guidance that does not grow with the timestep",
        LOSSES,
        "guidance + teacher_timestep / GUIDANCE_STEP",
        "guidance + 0 * teacher_timestep",
        ["tests/test_losses.py"],
    ),
    Mutant(
        "fake score trains the student",
        LOSSES,
        "add_noise(z0.detach(), noise, timestep)",
        "add_noise(z0, noise, timestep)",
        ["tests/test_losses.py"],
    ),
    Mutant("kernel of equation 14 too small", LOSSES, "return 5 + 4 *", "return 3 + 4 *", ["tests/test_losses.py"]),
    Mutant(
        "student's picture not clamped",
        "training/networks/student.py",
        "self.decoder(x0).clamp(-1.0, 1.0)",
        "self.decoder(x0)",
        ["tests/test_student.py::test_pictures_are_clamped_before_the_losses"],
    ),
    Mutant(
        "distillation_weight ignored",
        "training/objective/objective.py",
        "settings.distillation_weight * parts",
        "parts",
        ["tests/test_objective.py"],
    ),
    Mutant(
        "lpips_weight ignored",
        "training/objective/objective.py",
        "settings.lpips_weight * parts",
        "parts",
        ["tests/test_objective.py"],
    ),
    Mutant(
        "gradients not clipped",
        "training/run/optimizer.py",
        "clip_grad_norm_(self.parameters.values(), clip_norm)",
        "clip_grad_norm_(self.parameters.values(), 1e9)",
        ["tests/test_optimizer.py"],
    ),
    Mutant(
        "plain VSD at all timesteps",
        "training/objective/timesteps.py",
        "VSD_RANGE = (20, 979)",
        "VSD_RANGE = (0, 999)",
        ["tests/test_timesteps.py"],
    ),
    Mutant(
        "gamma of equation 5 ignored",
        SCHEDULE,
        "(timestep * lam + gamma)",
        "(timestep * lam)",
        ["tests/test_schedule.py"],
    ),
    Mutant(
        "student's prediction taken for noise",
        SCHEDULE,
        "return z / _alpha_bar_like(timestep, z).sqrt() - prediction",
        "return x0_from_noise(z, prediction, timestep)",
        ["tests/test_schedule.py"],
    ),
    Mutant(
        "LoRA scaled by alpha alone",
        "tadsr/lora.py",
        "return self.alpha / self.rank",
        "return self.alpha",
        ["tests/test_lora.py"],
    ),
    Mutant(
        "sine before cosine in the timestep's features",
        "tadsr/encoder.py",
        "torch.cat([angles.cos(), angles.sin()], dim=1)",
        "torch.cat([angles.sin(), angles.cos()], dim=1)",
        ["tests/test_encoder.py"],
    ),
    Mutant(
        "variance taken for the deviation in drawing a latent",
        "tadsr/encoder.py",
        "torch.exp(0.5 * logvar)",
        "torch.exp(logvar)",
        ["tests/test_encoder.py"],
    ),
    Mutant(
        "colours of the result kept in AdaIN",
        "tadsr/color.py",
        "mul_(wanted.std)",
        "mul_(own.std)",
        ["tests/test_color.py"],
    ),
    Mutant(
        "tiles blended by a mean",
        "tadsr/tiling.py",
        "weighted = result * down[:, None] * across",
        "weighted = result * 0.5",
        ["tests/test_tiling.py"],
    ),
    Mutant(
        "latents not scaled",
        "training/networks/student.py",
        "sample(moments, noise)) * LATENT_SCALE",
        "sample(moments, noise))",
        ["tests/test_student.py::test_one_step_by_hand"],
    ),
    Mutant(
        "processes train on the same samples",
        "training/data/batches.py",
        "(turn * self.processes + self.process) * self.micro_batch",
        "turn * self.processes * self.micro_batch",
        ["tests/test_training_data.py::test_processes_share_out_each_step"],
    ),
    Mutant(
        "picture n of a batch drawn with the first one's seed",
        "nodes/encode.py",
        "(seed + index) % 2**64",
        "seed % 2**64",
        ["tests/test_nodes.py::test_each_picture_of_a_batch_has_a_seed_of_its_own"],
    ),
    Mutant(
        "replaced base not loaded again",
        "nodes/load_model.py",
        "if base != NO_BASE else []",
        "if base == NO_BASE else []",
        ["tests/test_loader.py::test_a_base_replaced_under_its_name_is_loaded_again"],
    ),
)


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit code."""
    chosen = choose(arguments)
    if chosen is None:
        return 0
    try:
        if chosen_comfyui() is None:
            run_again(prepare_tests(), Path(__file__), arguments)
        with copy_of_the_repository() as tree:
            tests = sorted({test for mutant in chosen for test in mutant.tests})
            if code := run_tests(tree, tests, stop_at_first=True)[0]:
                raise HostError(
                    f"the tests do not pass without a bug (pytest: {code}), so that they would show nothing"
                )
            caught = [try_mutant(mutant, tree) for mutant in chosen]
    except (HostError, ValueError) as error:
        print(f"\nmutants: {error}", file=sys.stderr)
        return 1
    print(f"{sum(caught)} of {len(caught)} caught")
    return 0 if all(caught) else 1


def choose(arguments: list[str]) -> list[Mutant] | None:
    """Returns the bugs that the command line asks for; None if they were only to be listed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="bugs that have one of these words")
    parser.add_argument("--list", action="store_true", help="list them, and run nothing")
    options = parser.parse_args(arguments)
    chosen = [mutant for mutant in MUTANTS if any(word in mutant.name for word in options.only)]
    if not chosen:
        parser.error(f"no bug has {' or '.join(options.only)} in its name; --list lists them")
    if options.list:
        print("\n".join(f"{mutant.file}: {mutant.name}" for mutant in chosen))
        return None
    return chosen


@contextmanager
def copy_of_the_repository() -> Iterator[Path]:
    """Gives a copy of what git knows of this tree, with its changes, in a folder of its own."""
    listed = subprocess.run(
        ["git", "-C", str(REPOSITORY), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        check=True,
        text=True,
    )
    with tempfile.TemporaryDirectory(prefix="tadsr-") as folder:
        tree = Path(folder) / "tadsr-comfyui"
        for name in filter(None, listed.stdout.split("\0")):
            if (REPOSITORY / name).is_file():
                (tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(REPOSITORY / name, tree / name)
        yield tree


def try_mutant(mutant: Mutant, tree: Path) -> bool:
    """Returns whether a test fails by the bug, and prints which; the tree is left as it was.

    Raises HostError where the tests could not run at all: that would catch anything.
    """
    path = tree / mutant.file
    before = path.read_bytes()
    mutant.apply(tree)
    try:
        code, failed = run_tests(tree, mutant.tests)
    finally:
        path.write_bytes(before)
    if code not in (0, TESTS_FAILED):
        raise HostError(f"{mutant.name}: pytest could not run {', '.join(mutant.tests)} ({code})")
    caught = code == TESTS_FAILED
    print(f"{'caught' if caught else 'SURVIVED':9} {mutant.name}: {', '.join(failed) or 'no test fails'}", flush=True)
    return caught


def run_tests(tree: Path, tests: Sequence[str], stop_at_first: bool = False) -> tuple[int, list[str]]:
    """Runs tests in a tree; returns pytest's exit code and the tests that failed."""
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "--no-header", "-p", "no:cacheprovider", *tests]
    command += ["-x"] if stop_at_first else []
    try:
        done = subprocess.run(
            command,
            cwd=tree,
            env=clean_environment(PYTHONDONTWRITEBYTECODE="1"),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
    except subprocess.TimeoutExpired:
        return TESTS_FAILED, [f"hung for {PATIENCE} s"]
    lines = [line.split(" - ")[0].split() for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return done.returncode, [words[1].rpartition("::")[2] for words in lines if len(words) > 1]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
