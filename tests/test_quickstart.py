"""The command quickstart.py: options, a real run, and its end by signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
from PIL import Image, ImageCms

from host import workflow
from host.base_folders import PREFIX, TemporaryBase
from host.errors import HostError
from host.pictures import open_picture
from host.server import PACK, ComfyServer
from host.upscale import UpscaleRequest, upscale

REPOSITORY = PACK
T = TypeVar("T")
ARTIST = 0x013B  # an EXIF tag


def run_script(*arguments: str | Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=timeout)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-file.jpg"], "there is no file no-such-file.jpg"),
        (["--timestep", "1000"], "--timestep 1000 is not in 1..999"),
        (["--timestep", "0"], "--timestep 0 is not in 1..999"),
        (["--scale", "0"], "--scale 0 is not in 1..8"),
        (["--output", "result.txt"], "--output result.txt must end in one of .png"),
    ],
)
def test_quickstart_refuses_wrong_options(arguments: list[str], message: str) -> None:
    result = run_script("quickstart.py", *arguments)
    assert result.returncode == 2 and message in result.stderr
    assert "Traceback" not in result.stderr


def test_quickstart_refuses_a_file_that_is_no_picture(tmp_path: Path) -> None:
    text = tmp_path / "notes.jpg"
    text.write_text("not a picture")
    result = run_script("quickstart.py", text)
    assert result.returncode == 1 and f"{text} is not a picture" in result.stderr
    assert "Traceback" not in result.stderr


def test_quickstart_refuses_a_folder_that_is_no_comfyui(tmp_path: Path) -> None:
    result = run_script("quickstart.py", "--comfyui", tmp_path)
    assert result.returncode == 1 and "is not a ComfyUI folder" in result.stderr


def test_quickstart_upscales_a_photograph(photo: Path, tmp_path: Path) -> None:
    small = tmp_path / "small photo.png"
    picture = Image.open(photo).convert("RGB").crop((0, 0, 61, 47))
    picture.putalpha(128)
    profile, exif = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), Image.Exif()
    exif[ARTIST] = "Somebody"
    picture.save(small, icc_profile=profile, exif=exif)
    output = tmp_path / "made" / "result.png"
    result = run_script("quickstart.py", small, "--scale", "3", "--timestep", "300", "--output", output)
    assert result.returncode == 0, result.stderr
    made = Image.open(output)
    assert made.size == (183, 141) and made.mode == "RGBA" and made.getchannel("A").getextrema() == (128, 128)
    assert made.info["icc_profile"] == profile and made.getexif()[ARTIST] == "Somebody"
    written = output.with_name("result-sheet.png")
    assert str(output) in result.stdout and str(written) in result.stdout
    assert Image.open(written).width > 2 * 183
    used = json.loads(Image.open(output).info["prompt"])
    assert used[workflow.node_of_class(used, "TADSRUpscale")]["inputs"]["timestep"] == 300


def test_a_full_disk_leaves_an_earlier_result_as_it_was(
    photo: Path, comfy_server: ComfyServer, disk_of: Callable[[int], Path]
) -> None:
    disk = disk_of(16384)
    output = disk / "result.png"
    output.write_bytes(b"an earlier result")
    request = UpscaleRequest(open_picture(photo), photo.name, 1.0, 500, output)
    with pytest.raises(HostError, match=r"result.png could not be written \([\d,]+ bytes\): No space left on device$"):
        upscale(comfy_server, request)
    assert list(disk.iterdir()) == [output] and output.read_bytes() == b"an earlier result"


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT, as Ctrl-C does in a POSIX terminal")
def test_quickstart_keeps_the_page_open_until_interrupted(photo: Path, tmp_path: Path) -> None:
    small = tmp_path / "small.png"
    Image.open(photo).convert("RGB").crop((0, 0, 32, 32)).save(small)
    command = [sys.executable, "quickstart.py", str(small), "--keep-open", "--output", str(tmp_path / "r.png")]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("Press Ctrl-C"):
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "stopped" in errors, "".join(lines) + errors
    address = next(line.split()[1] for line in lines if line.startswith("ComfyUI:"))
    assert "template=super-resolution-upscale-photo" in address
    port = address.split(":")[2].split("/")[0]
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert f"--port {port}" not in running, "ComfyUI was left running"


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_quickstart_that_is_killed_leaves_no_server_and_no_folder(
    photo: Path, tmp_path: Path, sent: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    command = [sys.executable, "quickstart.py", str(photo), "--output", str(tmp_path / "r.png")]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    assert any(line.startswith("Starting ComfyUI") for line in process.stdout)
    (folder,) = wait_for(lambda: [path for path in tmp_path.glob(f"{PREFIX}*") if path.is_dir()])
    time.sleep(0.3)
    process.send_signal(sent)
    process.communicate(timeout=60)
    assert process.returncode == (-sent if sent is signal.SIGKILL else 128 + sent)
    wait_for(lambda: str(folder) not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout)
    assert folder.exists() == (sent is signal.SIGKILL)
    own = TemporaryBase()  # as the next start makes it
    assert not folder.exists() and own.path.exists(), "a dead owner's folder was left, or a living one's taken"
    TemporaryBase().close()
    assert own.path.exists()
    own.close()


def wait_for(found: Callable[[], T], seconds: float = 30) -> T:
    give_up_at = time.monotonic() + seconds
    while not (result := found()):
        assert time.monotonic() < give_up_at, "waited in vain"
        time.sleep(0.05)
    return result
