"""The nodes around the dial in a real ComfyUI, in this process: blend, and what a user is told in words."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from random_weights import self_contained

from host.comfy_in_process import InProcessComfy, PromptError
from host.node_pack import NO_BASE, Pack, load_pack, models_folder, node, picture
from tadsr.weights import save

MINI = "random-mini-dial.safetensors"
pytestmark = pytest.mark.usefixtures("inference_mode")


@pytest.fixture(scope="module")
def mini(comfy_inprocess: InProcessComfy) -> Pack:
    save(models_folder(comfy_inprocess) / "tadsr" / MINI, self_contained())
    return load_pack(comfy_inprocess, MINI)


def blend(mini: Pack, images: torch.Tensor, position: float) -> torch.Tensor:
    return mini.comfy.node("TADSRBlend").execute(images, position).result[0]


def test_a_blend_mixes_the_neighbours_of_its_position(mini: Pack) -> None:
    images = picture(12, 16, batch=3)
    assert torch.equal(blend(mini, images, 0.0), images[:1])
    assert torch.allclose(blend(mini, images, 1.0), images[2:])
    assert torch.allclose(blend(mini, images, 0.75), (images[1:2] + images[2:]) / 2)
    with pytest.raises(ValueError, match="there is 1 picture to blend"):
        blend(mini, images[:1], 0.5)


# --- the text encoder that is not there


def test_a_text_for_weights_without_text_encoder_is_refused_in_our_words(mini: Pack) -> None:
    prompt = {
        "1": node("TADSRModelLoader", weights=MINI, base=NO_BASE),
        "2": node("CLIPTextEncode", clip=["1", 3], text="a cat"),
        "3": node("TADSROneStep", model=["1", 0], latent=["4", 0], conditioning=["2", 0]),
        "4": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "5": node("SaveLatent", samples=["3", 0], filename_prefix="text"),
    }
    with pytest.raises(PromptError, match=f"{MINI} has no text encoder.*leave the conditioning unconnected"):
        mini.comfy.run(prompt)


def test_a_lora_passes_through_weights_without_text_encoder(mini: Pack) -> None:
    import comfy.sd

    model, clip = comfy.sd.load_lora_for_models(mini.model, mini.clip, {}, 1.0, 1.0)
    assert model.model is mini.model.model
    with pytest.raises(ValueError, match="has no text encoder"):
        clip.tokenize("a cat")


# --- a core sampler that runs the student as it was not trained


@pytest.mark.parametrize(
    ("steps", "cfg", "said"),
    [(20, 8.0, "20 steps and the guidance (cfg) 8"), (2, 1.0, "takes 2 steps:"), (1, 3.0, "the guidance (cfg) 3:")],
)
def test_a_sampler_that_is_not_exact_is_advised(
    mini: Pack, caplog: pytest.LogCaptureFixture, steps: int, cfg: float, said: str
) -> None:
    latent, _ = mini.encode(picture(8, 8))
    with caplog.at_level(logging.WARNING):
        sample(mini, latent, steps, cfg)
    texts = [record.message for record in caplog.records if "TADSR is made for one step" in record.message]
    assert len(texts) == 1 and said in texts[0], texts


def test_one_step_is_not_advised(mini: Pack, caplog: pytest.LogCaptureFixture) -> None:
    latent, _ = mini.encode(picture(8, 8))
    with caplog.at_level(logging.WARNING):
        mini.one_step(latent)
        sample(mini, latent, 1, 1.0)
    assert not [record for record in caplog.records if "TADSR" in record.message]


def test_the_advice_stands_on_the_node_that_samples(mini: Pack) -> None:
    from comfy_execution.utils import CurrentNodeContext
    from server import PromptServer

    sent: list[tuple[str, str]] = []
    server = PromptServer.instance
    usual, server.send_progress_text = server.send_progress_text, lambda text, node_id: sent.append((text, node_id))
    try:
        with CurrentNodeContext("prompt", "17"):
            sample(mini, mini.encode(picture(8, 8))[0], 2, 1.0)
    finally:
        server.send_progress_text = usual
    assert [node_id for _, node_id in sent] == ["17"] and "made for one step" in sent[0][0]


def sample(mini: Pack, latent: dict[str, Any], steps: int, cfg: float) -> None:
    """As core's KSampler does."""
    mini.comfy.node("KSampler")().sample(
        mini.model, 0, steps, cfg, "euler", "simple", mini.prompt, mini.prompt, latent, denoise=1.0
    )
