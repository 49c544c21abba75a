"""Upscales folders of pictures with TADSR in a real ComfyUI: `python batch.py INPUT -o OUTPUT`.

INPUT is a folder, with all below it, a picture, or a list of pictures (.txt, a path a line). The same command again
does only what is missing. Needs Python 3.10 or newer; the first run sets up ComfyUI as quickstart.py does.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent
sys.path[:0] = [] if str(REPOSITORY) in sys.path else [str(REPOSITORY)]  # the portable Windows Python needs it

from host.errors import HostError  # noqa: E402
from host.interpreter import chosen_comfyui, prepare_comfyui, run_again  # noqa: E402
from host.overlay import ray_path  # noqa: E402
from host.signals import end_in_order  # noqa: E402

FORMATS = ("png", "jpg", "webp")
UPSCALE = "TADSRUpscale"


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit code: 0, 1 where a picture has no result, 2 for wrong options, 130."""
    options = parser().parse_args(arguments)
    end_in_order()
    try:
        if chosen_comfyui() is None:
            runtime = prepare_comfyui(options.comfyui)
            variables = {"PYTHONPATH": ray_path(runtime)} if options.ray is not None else {}
            run_again(runtime, Path(__file__), arguments, variables)
        return run(options)
    except HostError as error:
        print(f"\nbatch: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nbatch: stopped; the same command goes on", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the options."""
    made = argparse.ArgumentParser(prog="batch.py", description=__doc__, allow_abbrev=False)
    made.add_argument("inputs", nargs="+", type=Path, metavar="INPUT", help="folders, pictures or lists (.txt)")
    made.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="where the results go")
    _picture_options(made.add_argument_group("pictures"))
    _server_options(made.add_argument_group("servers"))
    _ray_options(made.add_argument_group("cluster"))
    return made


def _picture_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--scale", type=float, help="how much larger, 1 to 8 (default: the workflow's, 4)")
    group.add_argument("--timestep", type=int, help="1 to 999, low is faithful (default: the workflow's, 500)")
    group.add_argument("--workflow", type=Path, metavar="FILE", help="an API-format workflow, not the shipped one")
    group.add_argument("--set", action="append", default=[], metavar="NODE.INPUT=VALUE", help="a setting in it")
    group.add_argument("--input-node", metavar="NODE", help="the node that takes the picture (default: the LoadImage)")
    group.add_argument("--output-node", metavar="NODE", help="the node that saves the result (default: the SaveImage)")
    group.add_argument("--format", choices=FORMATS, default="png", help="of the results (default: png)")
    group.add_argument("--quality", type=int, default=95, help="of jpg and webp, 1 to 100 (default: 95)")
    group.add_argument("--keep-suffix", action="store_true", help="name the result of a.jpg a.jpg.png, not a.png")
    group.add_argument("--window", type=int, default=1, metavar="N", help="frames: the colours of N neighbours' mean")
    group.add_argument("--force", action="store_true", help="make again what is there")


def _server_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--server", action="append", default=[], metavar="URL", help="a ComfyUI; as many as you like")
    group.add_argument("--api-key-file", type=Path, metavar="FILE", help="holds a key that servers' proxies want")
    group.add_argument("--in-flight", type=int, default=2, metavar="N", help="pictures at a time on each (default: 2)")
    group.add_argument("--timeout", type=float, default=600, metavar="S", help="seconds without news (default: 600)")
    group.add_argument("--patience", type=float, default=120, metavar="S", help="seconds without any (default: 120)")
    group.add_argument("--comfyui", type=Path, metavar="DIR", help="our own server: this ComfyUI, with its models")
    group.add_argument("--models", type=Path, metavar="DIR", help="our own server: another folder of models")


def _ray_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--ray", nargs="?", const="", metavar="ADDRESS", help="use the GPUs of a Ray cluster")
    group.add_argument("--send", action="store_true", help="send pictures to the cluster (no shared storage)")
    group.add_argument("--ray-cpus", type=int, default=4, metavar="N", help="without GPUs: cores for each ComfyUI")


def run(options: argparse.Namespace) -> int:
    """Does the batch and shows it; returns the exit code."""
    from host.batch import BatchOptions, upscale_folder
    from host.batch.lanes import read_key
    from host.batch.shown import Terminal

    models = options.models or (options.comfyui / "models" if options.comfyui else None)
    given = BatchOptions(
        workflow=options.workflow,
        assignments=[*_settings(options), *options.set],
        input_node=options.input_node,
        output_node=options.output_node,
        format=options.format,
        quality=options.quality,
        keep_suffix=options.keep_suffix,
        window=options.window,
        force=options.force,
        servers=options.server,
        key=read_key(options.api_key_file) if options.api_key_file else None,
        in_flight=options.in_flight,
        timeout=options.timeout,
        patience=options.patience,
        models=models,
        ray=options.ray,
        send=options.send,
        ray_cpus=options.ray_cpus,
    )
    terminal = Terminal()
    report = upscale_folder(options.inputs, options.output, given, terminal)
    terminal.ends(report)
    return 1 if report.failures or report.ended else 0


def _settings(options: argparse.Namespace) -> list[str]:
    """Returns the assignments of --scale and --timestep; raises HostError for one out of range."""
    given = {"scale": (options.scale, 1, 8), "timestep": (options.timestep, 1, 999)}
    for name, (value, least, most) in given.items():
        if value is not None and not least <= value <= most:
            raise HostError(f"--{name} {value:g} is not in {least}..{most}")
    return [f"{UPSCALE}.{name}={value}" for name, (value, _, _) in given.items() if value is not None]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
