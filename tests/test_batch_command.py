"""The command batch.py: a server of its own, kills, full disks, wrong options; and the function behind it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from batch_pictures import Kept, pictures, records
from PIL import Image

from host.batch import BatchOptions, BatchReport, upscale_folder
from host.batch.manifest import PART_PREFIX
from host.errors import HostError
from host.server import PACK, ComfyServer

Invert = Callable[..., BatchOptions]


def command(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "batch.py", *map(str, arguments)]
    return subprocess.run(line, cwd=PACK, capture_output=True, text=True, timeout=300, **options)


def test_the_command_does_a_folder_with_a_server_of_its_own_and_goes_on_after_a_kill(tmp_path: Path) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    pictures(source, 6, (16, 12))
    (source / "bad.png").write_text("no picture")
    line = [sys.executable, "batch.py", str(source), "-o", str(output), "--scale", "2", "--timestep", "300"]
    killed = subprocess.Popen(line, cwd=PACK, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    give_up_at = time.monotonic() + 120
    while not (output / "p001.png").exists():
        assert time.monotonic() < give_up_at and killed.poll() is None
        time.sleep(0.02)
    killed.kill()
    killed.wait()
    done = len(list(output.glob("p*.png")))
    result = subprocess.run(line, cwd=PACK, capture_output=True, text=True, timeout=300)
    assert result.returncode == 1, result.stderr
    assert f"{done} done before" in result.stdout and "FAILED: bad.png is not a picture" in result.stderr
    assert "1 failed" in result.stdout and "Traceback" not in result.stderr
    assert all(Image.open(output / f"p{number:03}.png").size == (32, 24) for number in range(6))
    made = records(output)
    assert len({record["output"] for record in made}) == 6 and len(made) <= 6 + 1, "one line may lack its result"
    assert made[-1]["weights"] and made[-1]["server"] == "own"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nothing", "-o", "out"], 1, "batch: there is no file or folder nothing"),
        (["assets", "-o", "out", "--timestep", "0"], 1, "--timestep 0 is not in 1..999"),
        (["assets", "-o", "out", "--workflow", "README.md"], 1, "the workflow README.md is not JSON"),
        (["assets", "-o", "out", "--api-key-file", "README.md"], 1, "words; accepted is one key"),
        (["assets", "-o", "out", "--format", "gif"], 2, "invalid choice: 'gif'"),
        (["assets", "-o", "assets"], 1, "is the input folder; give another"),
        (["assets"], 2, "required: -o/--output"),
    ],
)
def test_wrong_options_are_one_sentence(arguments: list[str], code: int, message: str, tmp_path: Path) -> None:
    arguments = [str(tmp_path / "out") if word == "out" else word for word in arguments]
    result = command(*arguments, env={**os.environ, "TADSR_INSIDE": str(tmp_path)})
    assert result.returncode == code and message in result.stderr, result.stderr
    assert "Traceback" not in result.stderr and not (tmp_path / "out").exists()


@pytest.mark.skipif(shutil.which("unshare") is None, reason="makes a small disk with unshare and mount")
def test_a_full_disk_ends_the_batch_and_a_freed_one_lets_it_go_on(
    comfy_server: ComfyServer, inverting: Path, tmp_path: Path
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", str(small)]).returncode != 0:
        pytest.skip("this system lets no ordinary user mount a small disk")
    for number in range(6):
        noise = np.random.default_rng(number).integers(0, 256, (100, 100, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"n{number}.png")
    batch = (
        f"{sys.executable} batch.py {tmp_path}/*.png -o {small}/out --server {comfy_server.url} --workflow {inverting}"
    )
    script = (
        f"mount -t tmpfs -o size=100k none {small} && ({batch}; echo first $?; ls -A {small}/out; "
        f"mount -o remount,size=1m {small}; {batch}; echo second $?)"
    )
    result = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script],
        cwd=PACK,
        capture_output=True,
        text=True,
        env={**os.environ, "TADSR_INSIDE": str(tmp_path)},
    )
    first, second = result.stdout.split("first 1", 1)
    assert "Ended early: the output folder cannot be written to: No space left on device" in first, result
    assert PART_PREFIX not in second and "second 0" in second and "Traceback" not in result.stderr, result
    assert "3 pictures done" in second or "4 pictures done" in second, second


def test_the_function_is_for_people_s_own_scripts(invert: Invert, tmp_path: Path) -> None:
    paths = pictures(tmp_path / "in", 2)
    watcher = Kept()
    report = upscale_folder(paths, tmp_path / "out", invert(), watcher)
    assert isinstance(report, BatchReport) and len(watcher.servers) == 2 and report.seconds > 0
    with pytest.raises(HostError, match="there is no file or folder"):
        upscale_folder([tmp_path / "nowhere"], tmp_path / "out")
