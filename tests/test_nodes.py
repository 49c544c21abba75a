"""The nodes in a real ComfyUI, in this process: contract, sizes, channels, batches, and the method's numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from nearly import assert_nearly, differ, on_one_thread
from random_weights import random_student, self_contained
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from host.comfy_in_process import InProcessComfy
from host.node_pack import NO_BASE, Pack, load_pack, models_folder, node, picture
from tadsr.geometry import resize_bicubic
from tadsr.schedule import LATENT_SCALE, alpha_bar
from tadsr.weights import save

MINI = "random-mini.safetensors"

PROPORTIONS = ["longest_side", "shortest_side", "megapixels"]
CONTRACT = {  # ids and names are in saved workflows: never change them, only add
    "TADSRModelLoader": (["weights", "base", "precision"], ["MODEL", "TADSR_ENCODER", "VAE", "CLIP", "CONDITIONING"]),
    "TADSREncode": (
        ["encoder", "image", "timestep", "scale", "width", "height", "encoding", "seed", "tile", "overlap"]
        + ["any_timestep", *PROPORTIONS],
        ["LATENT", "IMAGE"],
    ),
    "TADSROneStep": (["model", "latent", "conditioning", "timestep", "tile", "overlap", "any_timestep"], ["LATENT"]),
    "TADSRFinish": (["image", "reference", "color_match", "color_strength"], ["IMAGE"]),
    "TADSRUpscale": (
        ["model", "encoder", "vae", "image", "timestep", "scale", "color_match", "conditioning"]
        + ["width", "height", "encoding", "seed", "tile", "overlap", "preview_size", "any_timestep"]
        + [*PROPORTIONS, "color_strength", "preview_x", "preview_y", "preview_mask"],
        ["IMAGE"],
    ),
    "TADSRPiSABalance": (["model", "pixel", "semantic"], ["MODEL"]),
    "TADSRBlend": (["images", "position"], ["IMAGE"]),
    "TADSRPromptFromImage": (["image", "tagger", "text", "form", "scale"], ["STRING"]),
    "TADSREstimate": (
        ["model", "encoder", "vae", "image", "scale", "width", "height", "tile", "overlap", *PROPORTIONS],
        ["STRING", "INT", "INT", "INT", "FLOAT", "FLOAT"],
    ),
}
pytestmark = pytest.mark.usefixtures("inference_mode")


@pytest.fixture(scope="module")
def mini(comfy_inprocess: InProcessComfy) -> Pack:
    save(models_folder(comfy_inprocess) / "tadsr" / MINI, self_contained())
    return load_pack(comfy_inprocess, MINI)


@pytest.mark.parametrize("node_id", sorted(CONTRACT))
def test_ids_inputs_and_outputs_are_those_of_saved_workflows(comfy_inprocess: InProcessComfy, node_id: str) -> None:
    schema = comfy_inprocess.node(node_id).GET_SCHEMA()
    inputs, outputs = CONTRACT[node_id]
    assert [i.id for i in schema.inputs] == inputs
    assert [o.io_type for o in schema.outputs] == outputs
    undocumented = [i.id for i in schema.inputs if not i.tooltip]
    assert not undocumented, "these inputs have no tooltip"


def test_every_node_has_a_help_page(comfy_inprocess: InProcessComfy, repository: Path) -> None:
    pages = {path.stem for path in (repository / "web" / "docs").glob("*.md")}
    assert pages == set(CONTRACT)


@pytest.mark.parametrize("timestep", [1, 500, 999])
def test_upscaling_equals_the_network_as_trained(mini: Pack, timestep: int) -> None:
    student = random_student()
    image = picture(16, 24)
    enlarged = resize_bicubic(image.movedim(-1, 1), (64, 96)).clamp(0, 1)
    expected = student(enlarged * 2 - 1, torch.tensor([timestep])) / 2 + 0.5
    ours = mini.upscale(image, timestep, color_match="none").movedim(-1, 1)
    error = (ours - expected.clamp(0, 1)).abs().max()
    assert error < 1e-4, f"ComfyUI's networks differ from the trained ones by {error:.1e}"


def test_four_steps_equal_the_one_node(mini: Pack) -> None:
    image = picture(20, 31, batch=2)
    latent, enlarged = mini.encode(image)
    result = mini.finish(mini.decode(mini.one_step(latent)), enlarged)
    assert result.shape == enlarged.shape == (2, 80, 124, 3)
    assert (result - mini.upscale(image)).abs().max() < 1e-5


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 1), (2, 3), (17, 16), (33, 20)])
@pytest.mark.parametrize("scale", [1.0, 2.25, 4.0])
def test_any_input_gives_exactly_the_size_asked_for(mini: Pack, size: tuple[int, int], scale: float) -> None:
    result = mini.upscale(picture(*size), scale=scale)
    assert result.shape == (1, round(size[0] * scale), round(size[1] * scale), 3)
    assert result.isfinite().all() and result.min() >= 0 and result.max() <= 1


def test_exact_width_and_height(mini: Pack) -> None:
    image = picture(16, 24)
    assert mini.upscale(image, width=101, height=67).shape == (1, 67, 101, 3)
    assert mini.upscale(image, width=90).shape == (1, 60, 90, 3)
    assert mini.upscale(image, height=61).shape == (1, 61, 92, 3)


def test_a_batch_equals_its_pictures_one_by_one(mini: Pack) -> None:
    batch = picture(12, 12, batch=3)
    together = mini.upscale(batch)
    apart = torch.cat([mini.upscale(one.unsqueeze(0)) for one in batch])
    assert (together - apart).abs().max() < 1e-5


def test_alpha_is_enlarged_by_itself_and_put_back(mini: Pack) -> None:
    image = picture(12, 18, channels=4)
    result = mini.upscale(image)
    alpha = resize_bicubic(image[..., 3:].movedim(-1, 1), (48, 72)).clamp(0, 1).movedim(1, -1)
    assert torch.allclose(result[..., 3:], alpha, atol=1e-6)
    opaque = torch.cat([image[..., :3], torch.ones_like(image[..., 3:])], dim=-1)
    assert_nearly(mini.upscale(opaque)[..., :3], mini.upscale(image[..., :3]), "alpha must not change the colours")


def test_a_grey_picture_stays_grey(mini: Pack) -> None:
    grey = picture(12, 18, channels=1)
    result = mini.upscale(grey)
    assert result.shape == (1, 48, 72, 3)
    assert (result.amax(-1) - result.amin(-1)).max() < 1e-6
    assert_nearly(result, mini.upscale(grey.expand(-1, -1, -1, 3)))


def test_the_timestep_and_the_seed_matter_and_nothing_else_does(mini: Pack) -> None:
    image = picture(12, 18)
    with on_one_thread():
        assert torch.equal(mini.upscale(image, 500), mini.upscale(image, 500))
        sampled = mini.upscale(image, encoding="sample", seed=1)
        assert torch.equal(sampled, mini.upscale(image, encoding="sample", seed=1))
        assert torch.equal(mini.upscale(image, seed=1), mini.upscale(image, seed=2)), "the mode needs no seed"
    assert (mini.upscale(image, 100) - mini.upscale(image, 900)).abs().max() > 1e-3
    assert differ(sampled, mini.upscale(image, encoding="sample", seed=2))


def test_each_picture_of_a_batch_has_a_seed_of_its_own(mini: Pack) -> None:
    """Picture n is drawn with seed + n, so that it can be had again alone; tolerance: another draw differs by 0.1."""
    batch = picture(12, 12).expand(3, -1, -1, -1)
    drawn, _ = mini.encode(batch, encoding="sample", seed=7)
    latents = drawn["samples"]
    assert (latents[0] - latents[1]).abs().max() > 1e-3 and (latents[1] - latents[2]).abs().max() > 1e-3
    made = mini.upscale(batch, encoding="sample", seed=7)
    for index in range(3):
        alone, _ = mini.encode(batch[:1], encoding="sample", seed=7 + index)
        assert (latents[index] - alone["samples"][0]).abs().max() < 1e-5
        assert (made[index] - mini.upscale(batch[:1], encoding="sample", seed=7 + index)[0]).abs().max() < 1e-5


def test_latents_work_with_tiled_decoding_and_encoding(mini: Pack) -> None:
    latent, _ = mini.encode(picture(96, 96))
    whole = mini.decode(latent)
    tiled = mini.comfy.node("VAEDecodeTiled")().decode(mini.vae, latent, 256, 64)[0]
    assert tiled.shape == whole.shape == (1, 384, 384, 3)
    assert (tiled - whole).abs().mean() < 0.05, "tiles have their own normalisation statistics, but not other pictures"
    assert mini.vae.encode(whole).shape == latent["samples"].shape


def test_each_picture_of_a_latent_keeps_its_timestep(mini: Pack) -> None:
    image = picture(12, 12)
    first, second = (mini.encode(image, timestep)[0] for timestep in (100, 900))
    both = {
        "samples": torch.cat([first["samples"], second["samples"]]),
        "tadsr_timesteps": first["tadsr_timesteps"] + second["tadsr_timesteps"],
    }
    result = mini.one_step(both)["samples"]
    assert (result[:1] - mini.one_step(first)["samples"]).abs().max() < 1e-5
    assert (result[1:] - mini.one_step(second)["samples"]).abs().max() < 1e-5
    other = mini.one_step(first, timestep=900)["samples"]
    assert (other - mini.one_step(first)["samples"]).abs().max() > 1e-3, "a connected timestep has the last word"


def test_a_conditioning_replaces_the_default_prompt(mini: Pack) -> None:
    latent, _ = mini.encode(picture(12, 12))
    default = mini.one_step(latent)["samples"]
    assert_nearly(mini.one_step(latent, conditioning=mini.prompt)["samples"], default)
    other = [[mini.prompt[0][0].flip(1) * 3, {}]]
    assert differ(mini.one_step(latent, conditioning=other)["samples"], default)


def test_an_interrupt_ends_the_run_at_the_next_picture(mini: Pack) -> None:
    import comfy.model_management as mm
    import comfy.utils

    seen = []

    def stop(value: int, total: int, *_: object, **__: object) -> None:
        seen.append(value)
        mm.interrupt_current_processing(True)

    comfy.utils.set_progress_bar_global_hook(stop)
    try:
        with pytest.raises(mm.InterruptProcessingException):
            mini.upscale(picture(8, 8, batch=5))
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
        mm.interrupt_current_processing(False)
    assert len(seen) == 1, f"the run went on for {len(seen) - 1} more pictures"


@pytest.mark.parametrize(
    ("timestep", "mask", "differential"), [(1, 0, 0), (500, 0, 0), (999, 0, 0), (500, 1, 0), (500, 1, 1)]
)
def test_core_samplers_agree(mini: Pack, timestep: int, mask: bool, differential: bool) -> None:
    """SamplerCustomAdvanced, one Euler step from sigma(t), with noise that TADSR ignores, through the executor."""
    sigma = (1 / alpha_bar(timestep).item() - 1) ** 0.5
    for file in ("nodes_custom_sampler.py", "nodes_differential_diffusion.py"):
        mini.comfy.load_core_nodes(file)
    save_picture(picture(20, 28), mini.comfy.base / "input" / "core.png")
    prompt = {
        "1": node("TADSRModelLoader", weights=MINI, base=NO_BASE),
        "2": node("LoadImage", image="core.png"),
        "3": node("TADSREncode", encoder=["1", 1], image=["2", 0], timestep=timestep, scale=4.0),
        "4": node("TADSROneStep", model=["1", 0], latent=["3", 0]),
        "5": node("BasicGuider", model=["1", 0], conditioning=["1", 4]),
        "6": node("KSamplerSelect", sampler_name="euler"),
        "7": node("ManualSigmas", sigmas=f"{sigma:.9f}, 0.0"),
        "8": node("RandomNoise", noise_seed=7),
        "9": node(
            "SamplerCustomAdvanced",
            noise=["8", 0],
            guider=["5", 0],
            sampler=["6", 0],
            sigmas=["7", 0],
            latent_image=["3", 0],
        ),
        "10": node("SaveLatent", samples=["4", 0], filename_prefix="ours"),
        "11": node("SaveLatent", samples=["9", 0], filename_prefix="core"),
    }
    if mask:
        prompt["12"] = node("LoadImageMask", image="core.png", channel="red")
        prompt["13"] = node("SetLatentNoiseMask", samples=["3", 0], mask=["12", 0])
        prompt["4"]["inputs"]["latent"] = prompt["9"]["inputs"]["latent_image"] = ["13", 0]
    if differential:
        prompt["14"] = node("DifferentialDiffusion", model=["1", 0], strength=0.5)
        prompt["4"]["inputs"]["model"] = prompt["5"]["inputs"]["model"] = ["14", 0]
    outputs = mini.comfy.run(prompt)
    ours, core = (saved_latent(mini.comfy.base, outputs[key]) for key in ("10", "11"))
    scale = max(1.0, float(ours.abs().max()) * LATENT_SCALE)
    assert ((ours - core) * LATENT_SCALE).abs().max() < 1e-5 * scale


@pytest.mark.parametrize("tiles", [{}, {"tile": 96, "overlap": 32}], ids=["whole", "tiled"])
def test_a_noise_mask_keeps_what_is_outside_of_it(mini: Pack, tiles: dict[str, int]) -> None:
    latent, _ = mini.encode(picture(40, 56, batch=2))
    mask = torch.zeros(2, 160, 224)  # of the result, as a mask of the picture is
    mask[0, :, :112], mask[1, 80:] = 1.0, 1.0
    plain = mini.one_step(latent, **tiles)["samples"]
    result = mini.one_step({**latent, "noise_mask": mask}, **tiles)
    small = F.interpolate(mask[:, None], plain.shape[-2:], mode="bilinear")
    expected = small * plain + (1 - small) * latent["samples"]
    assert (result["samples"] - expected).abs().max() < 1e-5 * plain.abs().max()
    assert result["noise_mask"] is mask, "as core's samplers leave it"
    one = mini.one_step({**latent, "noise_mask": mask[:1]}, **tiles)["samples"]
    assert_nearly(one[1], (small[0] * plain[1] + (1 - small[0]) * latent["samples"][1]), "one mask is for all")


def test_a_noise_mask_that_is_none_is_refused(mini: Pack) -> None:
    latent, _ = mini.encode(picture(8, 8))
    for mask, word in (
        (torch.full((1, 8, 8), float("nan")), "NaN"),
        ("mask", "type str"),
        (torch.zeros(0, 8, 8), "0, 8"),
    ):
        with pytest.raises(ValueError, match=word):
            mini.one_step({**latent, "noise_mask": mask})


def save_picture(image: Tensor, path: Path) -> None:
    from PIL import Image

    Image.fromarray((image[0] * 255).round().byte().numpy()).save(path)


def saved_latent(base: Path, output: dict[str, Any]) -> Tensor:
    (file,) = output["latents"]
    return load_file(base / "output" / file["subfolder"] / file["filename"])["latent_tensor"]
