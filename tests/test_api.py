"""The shipped API workflow, posted to a real ComfyUI with a real photograph."""

from __future__ import annotations

import asyncio
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from host.client import Event, ExecutionFailed, PromptRejected, PromptRun
from host.server import ComfyServer
from host.workflow import load_workflow, node_of_class, with_inputs
from training.metrics.lpips import LPIPS
from training.metrics.reference import Reference

UPSCALE, LOADER = "TADSRUpscale", "TADSRModelLoader"
BUNDLED = "tadsr-mini.safetensors"


def prompt_for(image_name: str, loader: dict[str, Any] | None = None, **upscale: Any) -> dict[str, Any]:
    inputs = {"LoadImage": {"image": image_name}, UPSCALE: upscale, LOADER: loader or {}}
    return with_inputs(load_workflow(), inputs)


def result_of(server: ComfyServer, run: PromptRun) -> np.ndarray:
    """Returns the saved picture, (H, W, 3) in [0, 1]."""
    (image,) = run.images()
    return pixels(Image.open(io.BytesIO(server.view(image))))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"), dtype=np.float32) / 255


@pytest.fixture(scope="module")
def uploaded(comfy_server: ComfyServer, photo: Path) -> str:
    return comfy_server.upload(photo)


@pytest.fixture(scope="module")
def small(comfy_server: ComfyServer, photo: Path) -> str:
    """A corner of the photograph, for runs whose picture does not matter."""
    content = io.BytesIO()
    Image.open(photo).crop((0, 0, 40, 24)).save(content, "PNG")
    return comfy_server.upload(content.getvalue(), "small.png")


@pytest.fixture(scope="module")
def default_run(comfy_server: ComfyServer, uploaded: str) -> PromptRun:
    return comfy_server.run(prompt_for(uploaded))


def test_result_has_the_exact_size(comfy_server: ComfyServer, default_run: PromptRun, photo: Path) -> None:
    width, height = Image.open(photo).size
    assert result_of(comfy_server, default_run).shape == (4 * height, 4 * width, 3)


@pytest.mark.parametrize(("scale", "size"), [(1.0, (24, 40)), (2.5, (60, 100)), (8.0, (192, 320))])
def test_any_scale_gives_its_size(comfy_server: ComfyServer, small: str, scale: float, size: tuple[int, int]) -> None:
    run = comfy_server.run(prompt_for(small, scale=scale))
    assert result_of(comfy_server, run).shape == (*size, 3)


def test_progress_arrives_on_the_websocket(comfy_server: ComfyServer, small: str) -> None:
    prompt = prompt_for(small, timestep=321)
    events: list[Event] = []
    comfy_server.run(prompt, on_event=events.append)
    node = node_of_class(prompt, UPSCALE)
    assert node in [event.data.get("node") for event in events if event.type == "executing"]
    progress = [event.data for event in events if event.type == "progress" and event.data["node"] == node]
    values = [data["value"] for data in progress]
    # ComfyUI drops some of the steps; the last always arrives.
    assert values == sorted(values) and values[-1] == progress[-1]["max"] > 0
    assert events[-1].type == "execution_success"


@pytest.mark.parametrize(
    ("method", "shown", "timestep"),  # of their own, so that nothing is cached
    [("default", True, 431), ("none", False, 432), ("auto", True, 433)],
)
def test_live_previews_follow_the_prompts_choice(
    comfy_server: ComfyServer, small: str, method: str, shown: bool, timestep: int
) -> None:
    prompt = prompt_for(small, timestep=timestep)
    assert bool(asyncio.run(previews_of(comfy_server, prompt, method))) is shown


async def previews_of(server: ComfyServer, prompt: dict[str, Any], method: str) -> int:
    """Returns how many pictures the server sends while it runs a prompt."""
    pictures = 0
    async with aiohttp.ClientSession() as session, session.ws_connect(f"{server.url}/ws?clientId=previews") as socket:
        order = {"prompt": prompt, "client_id": "previews", "extra_data": {"preview_method": method}}
        async with session.post(f"{server.url}/prompt", json=order) as response:
            assert response.status == 200, await response.text()
        async for message in socket:
            pictures += message.type == aiohttp.WSMsgType.BINARY
            if message.type == aiohttp.WSMsgType.TEXT and message.json()["type"] == "execution_success":
                return pictures
    raise AssertionError("the server broke off")


def test_result_is_closer_to_the_truth_than_lanczos(
    comfy_server: ComfyServer,
    default_run: PromptRun,
    photo: Path,
    photo_truth: Path,
    lpips_network: Callable[[str], LPIPS],
) -> None:
    truth = Image.open(photo_truth).convert("RGB")
    enlarged = Image.open(photo).convert("RGB").resize(truth.size, Image.Resampling.LANCZOS)
    reference = Reference(tensor(pixels(truth)), [lpips_network("alex")], border=4)
    ours, lanczos = (reference.score(tensor(p)) for p in (result_of(comfy_server, default_run), pixels(enlarged)))
    verdict = f"{ours}, Lanczos {lanczos}: the bundled model or its path is broken"
    assert ours.lpips["alex"] < 0.8 * lanczos.lpips["alex"], verdict  # measured: 0.72
    assert ours.psnr_y > lanczos.psnr_y - 0.6, verdict  # measured: 0.52 dB behind on this picture


def tensor(picture: np.ndarray) -> Tensor:
    """Returns the picture, (H, W, 3), as (1, 3, H, W)."""
    return torch.from_numpy(picture).permute(2, 0, 1)[None]


def test_timestep_changes_the_result(comfy_server: ComfyServer, uploaded: str) -> None:
    faithful, inventive = (
        result_of(comfy_server, comfy_server.run(prompt_for(uploaded, timestep=timestep))) for timestep in (100, 900)
    )
    difference = np.abs(faithful - inventive).mean() * 255
    assert difference > 2.5, f"timesteps 100 and 900 differ by {difference:.2f} of 255: does the timestep arrive?"
    assert sharpness(inventive) > 1.2 * sharpness(faithful), "a higher timestep should be sharper"  # measured: 1.39


def sharpness(picture: np.ndarray) -> float:
    """Returns the mean absolute difference of neighbours."""
    return float(np.abs(np.diff(picture, axis=0)).mean() + np.abs(np.diff(picture, axis=1)).mean())


def test_running_again_gives_the_identical_picture(
    comfy_server: ComfyServer, default_run: PromptRun, uploaded: str, small: str
) -> None:
    comfy_server.run(prompt_for(small))  # another picture in between: ComfyUI forgets what it cached
    again = comfy_server.run(prompt_for(uploaded))
    cached = [event.data["nodes"] for event in again.events if event.type == "execution_cached"]
    assert node_of_class(load_workflow(), UPSCALE) not in cached[0], "ComfyUI did not run the node again"
    first, second = (result_of(comfy_server, run).astype(float) for run in (default_run, again))
    # The server has several threads: what lies between two 8-bit levels may be rounded to either.
    assert np.abs(first - second).max() * 255 <= 1.01 and (first != second).mean() < 1e-3


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"timestep": -1}, "timestep"),
        ({"timestep": 1000}, "timestep"),
        ({"timestep": "high"}, "timestep"),
        ({"scale": 0.0}, "scale"),
        ({"scale": 99.0}, "scale"),
        ({"color_match": "magic"}, "color_match"),
        ({"loader": {"weights": "missing.safetensors"}}, "missing.safetensors"),
        ({"loader": {"base": "missing.safetensors"}}, "missing.safetensors"),
    ],
)
def test_a_wrong_value_is_refused_before_the_run(
    comfy_server: ComfyServer, small: str, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(PromptRejected, match=named):
        comfy_server.run(prompt_for(small, **changes))
    assert_still_works(comfy_server, small)


def assert_still_works(server: ComfyServer, image_name: str) -> None:
    assert server.is_running(), server.log()[-2000:]
    assert result_of(server, server.run(prompt_for(image_name))).shape == (96, 160, 3)


class RunsCode:
    """An object whose pickle asks the reader to run a command."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.witness),)


@pytest.mark.parametrize("kind", ["truncated", "not safetensors", "another model", "code in a pickle"])
def test_a_bad_weights_file_is_one_clear_error(
    comfy_server: ComfyServer, small: str, repository: Path, tmp_path: Path, kind: str
) -> None:
    witness = tmp_path / "the-pickle-ran"
    name, content = bad_weights(kind, repository / "weights" / BUNDLED, witness)
    folder = comfy_server.base / "models" / "tadsr"
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    try:
        with pytest.raises(ExecutionFailed, match=name.replace(".", r"\.")) as caught:
            comfy_server.run(prompt_for(small, loader={"weights": name}))
    finally:
        (folder / name).unlink()
    assert caught.value.details["node_type"] == LOADER
    assert not witness.exists(), "reading the pickle ran the code in it"
    assert_still_works(comfy_server, small)


def bad_weights(kind: str, good: Path, witness: Path) -> tuple[str, bytes]:
    """Returns (file name, content)."""
    import safetensors.torch
    import torch

    if kind == "truncated":
        return "truncated.safetensors", good.read_bytes()[: good.stat().st_size // 2]
    if kind == "not safetensors":
        return "text.safetensors", b"<html>404: not found</html>" * 10
    if kind == "another model":
        return "lora.safetensors", safetensors.torch.save({"lora_unet_down.weight": torch.zeros(4, 4)})
    return "evil.pkl", pickle.dumps({"state_dict_unet": RunsCode(witness)})
