"""Writes the tags of training pictures, which are their prompts.

    python -m training.tags --data FOLDER --dape dape.safetensors [--of lq|hq]
    python -m training.tags --data list.txt --dape dape.safetensors --output tagged.txt

Of a folder, `a.txt` is written beside `a.jpg`; of a list of pairs (`training.data.pairs`), a list with tags. What has
tags keeps them, so that the same command goes on where it was stopped. The tagger is the node's: `python -m
tadsr.convert --ram ... --dape ...` makes its file, without --dape that of plain RAM. --of lq tags low-quality pictures
as the paper does; to photographs without any the training's degradation is applied. --of hq tags the photographs.
`accelerate launch -m training.tags ...` shares the pictures out over its processes, a GPU each; several processes on
CPUs need ACCELERATE_USE_CPU=true and `torchrun --nproc-per-node N`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env
from tqdm import tqdm

from tadsr.tagger_weights import TaggerWeights, load
from tadsr.tags import tags_text
from training.data.pairs import read_pairs
from training.data.pictures import PROMPT_SUFFIX, DataError, Picture, Skipped, scan_folder
from training.data.storage import write_atomically
from training.data.tagging import DOWNSCALE, HQ, LQ, tag

SHOWN = 20  # pictures left out that are named
LONGEST_WAIT = timedelta(hours=24)  # of a process for the others: pictures are of different sizes


class Folder:
    """Photographs in a folder: a text beside each."""

    def __init__(self, data: Path) -> None:
        catalogue = scan_folder(data, sidecars=False)
        self.pictures, self.skipped = catalogue.pictures, catalogue.skipped

    def is_done(self, picture: Picture) -> bool:
        return _sidecar(picture).is_file()

    def write(self, picture: Picture, tags: str) -> None:
        write_atomically(_sidecar(picture), f"{tags}\n".encode())

    def finish(self) -> str:
        """Returns what was written, in words."""
        return f"tags beside {sum(map(self.is_done, self.pictures))} of {len(self.pictures)} pictures"


class PairList:
    """A list of pairs: the same list with tags. Each process keeps what it has done in a file beside the output."""

    def __init__(self, data: Path, output: Path, process: int) -> None:
        catalogue = read_pairs(data, DOWNSCALE)
        self.pictures, self.skipped = catalogue.pictures, catalogue.skipped
        self.output, self._part = output, output.with_name(f"{output.name}.part-{process}")
        self._tags = {_key(picture): picture.prompt for picture in self.pictures if picture.prompt} | self._read_parts()

    def is_done(self, picture: Picture) -> bool:
        return _key(picture) in self._tags

    def write(self, picture: Picture, tags: str) -> None:
        self._part.parent.mkdir(parents=True, exist_ok=True)
        with self._part.open("a", encoding="utf-8") as file:
            # A line that a kill has cut short gets an end, so that it spoils no other.
            file.write(f"\n{json.dumps([*_key(picture), tags])}\n")

    def finish(self) -> str:
        """Writes the list; returns what was written, in words."""
        self._tags |= self._read_parts()
        done = [picture for picture in self.pictures if self.is_done(picture)]
        lines = ["\t".join([*(self._path(path) for path in _key(p)), self._tags[_key(p)]]) for p in done]
        write_atomically(self.output, "".join(f"{line}\n" for line in lines).encode())
        for part in self._parts():
            part.unlink()
        return f"{self.output}, tags of {len(done)} of {len(self.pictures)} pairs"

    def _read_parts(self) -> dict[tuple[str, str], str]:
        found = {}
        for part in self._parts():
            for line in part.read_text(encoding="utf-8").splitlines():
                try:
                    hq, lq, tags = json.loads(line)
                except ValueError:  # empty, or cut short
                    continue
                found[hq, lq] = tags
        return found

    def _parts(self) -> list[Path]:
        return sorted(self.output.parent.glob(f"{self.output.name}.part-*"))

    def _path(self, path: str) -> str:
        """Returns a path as the list must give it: from its own folder where it lies in that, else the whole."""
        whole, folder = Path(os.path.abspath(path)), Path(os.path.abspath(self.output.parent))
        return str(whole.relative_to(folder) if whole.is_relative_to(folder) else whole)


def tag_all(
    work: Folder | PairList, weights: TaggerWeights, arguments: argparse.Namespace, state: PartialState
) -> list[Skipped]:
    """Tags this process's share of the pictures that have no tags; returns those that cannot be read."""
    mine = work.pictures[state.process_index :: state.num_processes]
    pending = [picture for picture in mine if not work.is_done(picture)]
    skipped, device = [], state.device
    assert device is not None  # accelerate sets it, and declares it as optional
    results = tag(pending, weights, of=arguments.of, device=device, batch=arguments.batch, workers=arguments.workers)
    quiet = not state.is_main_process
    for picture, found in tqdm(results, total=len(pending), desc="tagging", unit="picture", disable=quiet):
        if isinstance(found, str):
            skipped.append(Skipped(picture.name, found))
        else:
            work.write(picture, tags_text(found))
    return skipped


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    arguments = _parser().parse_args(argv)
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=LONGEST_WAIT)
    try:
        work = _open(arguments, state.process_index)
        skipped = tag_all(work, load(arguments.dape), arguments, state)
    except ValueError as error:  # DataError, WeightsError
        print(f"tags: {error}", file=sys.stderr)
        return 1
    skipped = [*work.skipped, *gather_object(skipped)]  # after this, every process has done its share
    if state.is_main_process:
        for item in skipped[:SHOWN]:
            print(f"left out: {item}", file=sys.stderr)
        if len(skipped) > SHOWN:
            print(f"left out: {len(skipped) - SHOWN} more", file=sys.stderr)
        print(f"Wrote {work.finish()}")
    state.destroy_process_group()
    return 0


def _open(arguments: argparse.Namespace, process: int) -> Folder | PairList:
    data, output = arguments.data, arguments.output
    if not data.exists():
        raise DataError(f"{data}: there is no such folder or list")
    if data.is_dir():
        if output is not None:
            raise DataError(f"--output is {output}; accepted for a folder: none, texts are written beside its pictures")
        return Folder(data)
    if output is None or os.path.abspath(output) == os.path.abspath(data):
        raise DataError(f"--output is {output}; accepted for a list: another file, for the list with tags")
    return PairList(data, output, process)


def _sidecar(picture: Picture) -> Path:
    return Path(picture.hq.path).with_suffix(PROMPT_SUFFIX)


def _key(picture: Picture) -> tuple[str, str]:
    """Returns the paths of a pair."""
    assert picture.lq is not None
    return picture.hq.path, picture.lq.path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder of pictures, or a list of HQ LQ pairs")
    parser.add_argument("--dape", type=Path, required=True, help="a file of python -m tadsr.convert --ram")
    parser.add_argument("--of", choices=(LQ, HQ), default=LQ, help="which pictures are tagged (default: lq)")
    parser.add_argument("--output", type=Path, help="for a list: the list with tags")
    parser.add_argument("--batch", type=int, default=8, help="pictures at a time (default: 8)")
    parser.add_argument("--workers", type=int, default=4, help="processes that read pictures (default: 4)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
