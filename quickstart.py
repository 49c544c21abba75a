"""Upscales a photograph with TADSR in a real ComfyUI: `python quickstart.py [IMAGE]`.

Needs Python 3.10 or newer and the internet for the first run, which sets up a Python environment and ComfyUI in
a per-user cache directory (set TADSR_CACHE for another place). Nothing else on the computer is changed.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent
sys.path[:0] = [] if str(REPOSITORY) in sys.path else [str(REPOSITORY)]  # the portable Windows Python needs it

from host.cache import cache_directory  # noqa: E402
from host.errors import HostError  # noqa: E402
from host.interpreter import chosen_comfyui, prepare_comfyui, run_again  # noqa: E402
from host.signals import end_in_order  # noqa: E402

SAMPLE = REPOSITORY / "assets" / "sample.jpg"
OUTPUT_FOLDER = "tadsr-output"
TIMESTEPS = range(1, 1000)
SCALES = (1.0, 8.0)
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit code."""
    options = parse(arguments)
    end_in_order()
    try:
        comfyui = chosen_comfyui()
        if comfyui is None:
            run_again(prepare_comfyui(options.comfyui), Path(__file__), arguments)
        upscale_in(comfyui, options)
    except HostError as error:
        print(f"\nquickstart: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nquickstart: stopped", file=sys.stderr)
        return 130
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """Returns the checked options; ends the program with a message for a wrong one."""
    parser = argparse.ArgumentParser(prog="quickstart.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("image", nargs="?", type=Path, default=SAMPLE, help="the picture (default: a sample)")
    parser.add_argument("--scale", type=float, default=4.0, help="how much larger, 1 to 8 (default: 4)")
    parser.add_argument(
        "--timestep",
        type=int,
        default=500,
        help="1 to 999: low stays faithful to the picture, high invents more detail (default: 500)",
    )
    parser.add_argument("--output", type=Path, help=f"the result (default: {OUTPUT_FOLDER}/NAME-x4.png)")
    parser.add_argument("--comfyui", type=Path, metavar="DIR", help="use this ComfyUI instead of fetching one")
    parser.add_argument("--keep-open", action="store_true", help="leave ComfyUI running and print its address")
    options = parser.parse_args(arguments)
    if not options.image.is_file():
        parser.error(f"there is no file {options.image}")
    if options.timestep not in TIMESTEPS:
        parser.error(f"--timestep {options.timestep} is not in {TIMESTEPS[0]}..{TIMESTEPS[-1]}")
    if not SCALES[0] <= options.scale <= SCALES[1]:
        parser.error(f"--scale {options.scale:g} is not in {SCALES[0]:g}..{SCALES[1]:g}")
    if options.output is None:
        options.output = Path(OUTPUT_FOLDER) / f"{options.image.stem}-x{options.scale:g}.png"
    if options.output.suffix.lower() not in PICTURE_SUFFIXES:
        parser.error(f"--output {options.output} must end in one of {', '.join(PICTURE_SUFFIXES)}")
    return options


def upscale_in(comfyui: Path, options: argparse.Namespace) -> None:
    """Starts ComfyUI, upscales the picture, prints where the results are; with --keep-open, waits for Ctrl-C."""
    from host.pictures import open_picture
    from host.server import PACK_NAME, ComfyServer
    from host.upscale import UpscaleRequest, upscale

    picture = open_picture(options.image)  # before the wait for ComfyUI
    for note in picture.notes:
        print(f"{options.image}: {note}")
    output = make_room(options.output)
    request = UpscaleRequest(picture, options.image.name, options.scale, options.timestep, output)
    base = cache_directory() / "quickstart" if options.keep_open else None
    print("Starting ComfyUI ...", flush=True)
    with ComfyServer(comfyui, base=base, cpu=None) as server:
        print(f"  ready after {server.startup_seconds:.0f} s at {server.url}")
        print(f"Upscaling {options.image} ({picture.size[0]}x{picture.size[1]}) ...", flush=True)
        seconds = upscale(server, request)
        print(f"  done in {seconds:.1f} s\nResult:       {request.output}\nBefore/after: {request.sheet}", flush=True)
        if options.keep_open:
            address = f"{server.url}/?template=super-resolution-upscale-photo&source={PACK_NAME}"
            print(f"ComfyUI:      {address}\nIts files:    {server.base}\nPress Ctrl-C to stop it.", flush=True)
            while server.is_running():
                time.sleep(1)
            raise HostError(f"ComfyUI ended by itself. Its last lines:\n{server.log()[-2000:]}")


def make_room(output: Path) -> Path:
    """Returns `output` as an absolute path whose folder exists; raises HostError if it cannot be made."""
    output = output.expanduser().resolve()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HostError(f"Cannot make the folder {output.parent} for the result: {error}") from error
    return output


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
