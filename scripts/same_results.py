"""Compares results with those of another commit, to the bit: `python scripts/same_results.py --against COMMIT`.

For changes that must change nothing. Both trees train the preset smoke and run the nodes in a real ComfyUI, on the
processor and one thread; this tree's programs only start them, by command lines and node ids that stay as they are.
Prints a line for each result and ends with 1 if one differs. Needs nothing but Python, git and the internet for the
first run, like runtests.py.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [] if str(REPOSITORY) in sys.path else [str(REPOSITORY)]  # run by path

from host.commands import clean_environment  # noqa: E402
from host.errors import HostError  # noqa: E402
from host.interpreter import chosen_comfyui, prepare_tests, run_again  # noqa: E402

PICTURES_OF = Path(__file__).with_name("same_results_pictures.py")
CROPS, CROP_SIDE = 12, 128  # of the bundled photograph, to train on
STEPS = 120  # the preset's own
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

Digests = dict[str, str]


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit code."""
    options = parse(arguments)
    try:
        if chosen_comfyui() is None:
            run_again(prepare_tests(), Path(__file__), arguments)
        with tempfile.TemporaryDirectory(prefix="tadsr-") as folder, worktree(options.against, Path(folder)) as other:
            parts = [PARTS[name] for name in options.parts]
            work = Path(folder)
            before, after = (
                {name: digest for part in parts for name, digest in part(tree, work / side, options.steps).items()}
                for tree, side in ((other, "before"), (REPOSITORY, "after"))
            )
    except (HostError, subprocess.CalledProcessError) as error:
        print(f"\nsame_results: {error}", file=sys.stderr)
        return 1
    return report(before, after)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", required=True, metavar="COMMIT", help="what git calls the other tree")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of the training (default: {STEPS})")
    return parser.parse_args(arguments)


@contextmanager
def worktree(commit: str, folder: Path) -> Iterator[Path]:
    """Gives the tree of a commit, checked out in `folder` while the block runs."""
    tree = folder / "tree"
    git = ["git", "-C", str(REPOSITORY), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(tree), commit], check=True)  # noqa: S603
    try:
        yield tree
    finally:
        subprocess.run([*git, "remove", "--force", str(tree)], check=True)  # noqa: S603


def training(tree: Path, folder: Path, steps: int) -> Digests:
    """Returns digests of the small base and of the weights that the preset smoke trains on it."""
    pictures, base, output = folder / "pictures", folder / "base", folder / "run"
    write_crops(pictures)
    run(tree, "-m", "training.mini.base", "-o", str(base))
    paths = ["--data", str(pictures), "--base", str(base / "base.safetensors"), "--output", str(output)]
    # Absolute names: both trees write them into nothing that is compared.
    run(tree, "-m", "training.train", "--config", "training/presets/smoke.yaml", *paths, f"steps={steps}")
    files = {"training: base": base / "base.safetensors", "training: weights": output / "tadsr.safetensors"}
    return {name: digest(path) for name, path in files.items()}


def pictures(tree: Path, folder: Path, steps: int) -> Digests:
    """Returns digests of what the nodes of a tree give in a real ComfyUI. steps: not looked at."""
    folder.mkdir(parents=True, exist_ok=True)
    run(REPOSITORY, str(PICTURES_OF), str(tree), str(folder / "comfyui"), str(folder / "pictures.json"))
    return json.loads((folder / "pictures.json").read_text())


PARTS: Mapping[str, Callable[[Path, Path, int], Digests]] = {"pictures": pictures, "training": training}


def write_crops(folder: Path) -> None:
    """Writes crops of the bundled photograph, side by side."""
    from PIL import Image

    folder.mkdir(parents=True)
    photograph = Image.open(REPOSITORY / "assets" / "sample_hq.webp").convert("RGB")
    across = photograph.width // CROP_SIDE
    for number in range(CROPS):
        left, top = number % across * CROP_SIDE, number // across * CROP_SIDE
        photograph.crop((left, top, left + CROP_SIDE, top + CROP_SIDE)).save(folder / f"{number:02}.png")


def run(tree: Path, *arguments: str) -> None:
    """Runs Python in a tree, quietly. Raises HostError with its last words where it fails."""
    environment = {**clean_environment(**ONE_THREAD), "PYTHONPATH": str(tree)}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)  # noqa: S603
    if done.returncode:
        raise HostError(f"{' '.join(command)} failed in {tree}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")


def digest(path: Path) -> str:
    """Returns the SHA-256 of a safetensors file's tensors and metadata, by name: their order in a file is random."""
    from safetensors import safe_open

    hasher = hashlib.sha256()
    with safe_open(path, "numpy") as file:
        hasher.update(repr(sorted((file.metadata() or {}).items())).encode())
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name)
            hasher.update(repr((name, tensor.shape, tensor.dtype)).encode() + tensor.tobytes())
    return hasher.hexdigest()


def report(before: Digests, after: Digests) -> int:
    """Prints a line for each result; returns 0 if all are equal, else 1."""
    names = [*before, *(name for name in after if name not in before)]
    equal = {name: before.get(name) == after.get(name) for name in names}
    for name in names:
        print(f"{'equal    ' if equal[name] else 'DIFFERENT'} {name}  {after.get(name, 'missing')[:16]}")
    print(f"{sum(equal.values())} of {len(names)} results are equal to the bit")
    return 0 if all(equal.values()) else 1


if __name__ == "__main__":
    os.environ.update(ONE_THREAD)
    sys.exit(main(sys.argv[1:]))
