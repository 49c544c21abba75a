"""The nodes in a real ComfyUI, in this process: contract, sizes, channels, batches, and the method's numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from random_weights import adapters_for, random_student, sd_checkpoint, self_contained
from safetensors.torch import load_file, save_file
from torch import Tensor

from comfy_in_process import InProcessComfy
from host import torch_import_shim
from tadsr.encoder import EncoderConfig, TimeAwareEncoder, mode
from tadsr.geometry import pad_to_multiple, resize_bicubic
from tadsr.keys import ldm_unet_to_diffusers
from tadsr.schedule import LATENT_SCALE, sigma, x0_from_residual
from tadsr.weights import BASE_UNET_PREFIX, BASE_VAE_PREFIX, encoder_state_dict, save, unet_state_dict

torch_import_shim.install()  # diffusers imports torchvision
from diffusers import UNet2DConditionModel  # noqa: E402

MINI, ADAPTERS, CHECKPOINT = "random-mini.safetensors", "random-adapters.safetensors", "random-sd.safetensors"
NO_BASE = "none (the weights file holds its base)"

CONTRACT = {  # ids and names are in saved workflows: never change them, only add
    "TADSRModelLoader": (["weights", "base"], ["MODEL", "TADSR_ENCODER", "VAE", "CLIP", "CONDITIONING"]),
    "TADSREncode": (
        ["encoder", "image", "timestep", "scale", "width", "height", "encoding", "seed"],
        ["LATENT", "IMAGE"],
    ),
    "TADSROneStep": (["model", "latent", "conditioning", "timestep"], ["LATENT"]),
    "TADSRFinish": (["image", "reference", "color_match"], ["IMAGE"]),
    "TADSRUpscale": (
        ["model", "encoder", "vae", "image", "timestep", "scale", "color_match", "conditioning"]
        + ["width", "height", "encoding", "seed"],
        ["IMAGE"],
    ),
}


@dataclass(frozen=True)
class Pack:
    """The nodes, and what Load TADSR Model gave."""

    comfy: InProcessComfy
    model: Any
    encoder: Any
    vae: Any
    clip: Any
    prompt: Any

    def upscale(self, image: Tensor, timestep: int = 500, **inputs: Any) -> Tensor:
        node = self.comfy.node("TADSRUpscale")
        return node.execute(self.model, self.encoder, self.vae, image, timestep, **inputs).result[0]

    def encode(self, image: Tensor, timestep: int = 500, **inputs: Any) -> tuple[dict[str, Any], Tensor]:
        return self.comfy.node("TADSREncode").execute(self.encoder, image, timestep, **inputs).result

    def one_step(self, latent: dict[str, Any], **inputs: Any) -> dict[str, Any]:
        return self.comfy.node("TADSROneStep").execute(self.model, latent, **inputs).result[0]

    def finish(self, image: Tensor, reference: Tensor, color_match: str = "adain") -> Tensor:
        return self.comfy.node("TADSRFinish").execute(image, reference, color_match).result[0]

    def decode(self, latent: dict[str, Any]) -> Tensor:
        return self.comfy.node("VAEDecode")().decode(self.vae, latent)[0]


def load_pack(comfy: InProcessComfy, weights: str, base: str = NO_BASE) -> Pack:
    return Pack(comfy, *comfy.node("TADSRModelLoader").execute(weights, base).result)


@pytest.fixture(autouse=True)
def inference_mode() -> Iterator[None]:
    """As ComfyUI runs nodes."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def models(comfy_inprocess: InProcessComfy) -> Path:
    folder = comfy_inprocess.base / "models"
    for name in ("tadsr", "checkpoints"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def mini(comfy_inprocess: InProcessComfy, models: Path) -> Pack:
    save(models / "tadsr" / MINI, self_contained())
    with torch.inference_mode():
        return load_pack(comfy_inprocess, MINI)


def picture(height: int, width: int, channels: int = 3, batch: int = 1, seed: int = 0) -> Tensor:
    """Returns a smooth random IMAGE."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch, channels, max(2, height // 4), max(2, width // 4), generator=generator)
    return resize_bicubic(coarse, (height, width)).clamp(0, 1).movedim(1, -1)


@pytest.mark.parametrize("node_id", sorted(CONTRACT))
def test_ids_inputs_and_outputs_are_those_of_saved_workflows(comfy_inprocess: InProcessComfy, node_id: str) -> None:
    schema = comfy_inprocess.node(node_id).GET_SCHEMA()
    inputs, outputs = CONTRACT[node_id]
    assert [i.id for i in schema.inputs] == inputs
    assert [o.io_type for o in schema.outputs] == outputs
    undocumented = [i.id for i in schema.inputs if not i.tooltip and i.io_type not in ("MODEL", "VAE", "TADSR_ENCODER")]
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
    assert torch.equal(result[..., :3], mini.upscale(image[..., :3])), "alpha must not change the colours"


def test_a_grey_picture_stays_grey(mini: Pack) -> None:
    grey = picture(12, 18, channels=1)
    result = mini.upscale(grey)
    assert result.shape == (1, 48, 72, 3)
    assert (result.amax(-1) - result.amin(-1)).max() < 1e-6
    assert torch.equal(result, mini.upscale(grey.expand(-1, -1, -1, 3)))


def test_the_timestep_and_the_seed_matter_and_nothing_else_does(mini: Pack) -> None:
    image = picture(12, 18)
    assert torch.equal(mini.upscale(image, 500), mini.upscale(image, 500))
    assert (mini.upscale(image, 100) - mini.upscale(image, 900)).abs().max() > 1e-3
    sampled = mini.upscale(image, encoding="sample", seed=1)
    assert torch.equal(sampled, mini.upscale(image, encoding="sample", seed=1))
    assert not torch.equal(sampled, mini.upscale(image, encoding="sample", seed=2))
    assert torch.equal(mini.upscale(image, seed=1), mini.upscale(image, seed=2)), "the mode needs no seed"


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
    assert torch.equal(mini.one_step(latent, conditioning=mini.prompt)["samples"], default)
    other = [[mini.prompt[0][0].flip(1) * 3, {}]]
    assert not torch.equal(mini.one_step(latent, conditioning=other)["samples"], default)


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


@pytest.mark.parametrize("timestep", [1, 500, 999])
def test_core_samplers_agree(mini: Pack, timestep: int) -> None:
    """SamplerCustomAdvanced, one Euler step from sigma(t), with noise that TADSR ignores, through the executor."""
    mini.comfy.load_core_nodes("nodes_custom_sampler.py")
    save_picture(picture(20, 28), mini.comfy.base / "input" / "core.png")
    prompt = {
        "1": node("TADSRModelLoader", weights=MINI, base=NO_BASE),
        "2": node("LoadImage", image="core.png"),
        "3": node("TADSREncode", encoder=["1", 1], image=["2", 0], timestep=timestep, scale=4.0),
        "4": node("TADSROneStep", model=["1", 0], latent=["3", 0]),
        "5": node("BasicGuider", model=["1", 0], conditioning=["1", 4]),
        "6": node("KSamplerSelect", sampler_name="euler"),
        "7": node("ManualSigmas", sigmas=f"{float(sigma(timestep)):.9f}, 0.0"),
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
    outputs = mini.comfy.run(prompt)
    ours, core = (saved_latent(mini.comfy.base, outputs[key]) for key in ("10", "11"))
    scale = max(1.0, float(ours.abs().max()) * LATENT_SCALE)
    assert ((ours - core) * LATENT_SCALE).abs().max() < 1e-5 * scale


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def save_picture(image: Tensor, path: Path) -> None:
    from PIL import Image

    Image.fromarray((image[0] * 255).round().byte().numpy()).save(path)


def saved_latent(base: Path, output: dict[str, Any]) -> Tensor:
    (file,) = output["latents"]
    return load_file(base / "output" / file["subfolder"] / file["filename"])["latent_tensor"]


def test_adapters_on_a_checkpoint_give_the_merged_networks(comfy_inprocess: InProcessComfy, models: Path) -> None:
    checkpoint = sd_checkpoint()
    weights = adapters_for(checkpoint)
    save_file({key: tensor.half() for key, tensor in checkpoint.items()}, models / "checkpoints" / CHECKPOINT)
    save(models / "tadsr" / ADAPTERS, weights)
    pack = load_pack(comfy_inprocess, ADAPTERS, CHECKPOINT)
    assert pack.clip is None, "this checkpoint has no text encoder"

    image, timestep = picture(16, 24), 300
    latent, enlarged = pack.encode(image, timestep)
    stored = {key: tensor.half().float() for key, tensor in checkpoint.items()}
    expected_latent, expected_x0 = reference_step(stored, weights, enlarged, timestep)
    assert_close("latent", latent["samples"], expected_latent)
    result = pack.one_step(latent)["samples"]
    assert_close("x0", result * LATENT_SCALE, expected_x0)
    assert pack.upscale(image, timestep).shape == (1, 64, 96, 3)

    core = comfy_inprocess.node("CheckpointLoaderSimple")().load_checkpoint(CHECKPOINT)[0]
    with pytest.raises(ValueError, match="without TADSR weights"):
        comfy_inprocess.node("TADSROneStep").execute(core, latent)


def reference_step(
    checkpoint: dict[str, Tensor], weights: Any, enlarged: Tensor, timestep: int
) -> tuple[Tensor, Tensor]:
    """Returns latent and x0 of merged networks in plain torch and diffusers."""
    vae = {k.removeprefix(BASE_VAE_PREFIX): t for k, t in checkpoint.items() if k.startswith(BASE_VAE_PREFIX)}
    encoder = TimeAwareEncoder(EncoderConfig()).eval()
    encoder.load_state_dict(encoder_state_dict(weights, vae))
    base = {k.removeprefix("model."): t for k, t in checkpoint.items() if k.startswith(BASE_UNET_PREFIX)}
    merged = {k.removeprefix("diffusion_model."): t for k, t in unet_state_dict(weights, base).items()}
    unet = UNet2DConditionModel(
        block_out_channels=(320,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        attention_head_dim=(5,),
        cross_attention_dim=1024,
        use_linear_projection=True,
    ).eval()
    unet.load_state_dict(ldm_unet_to_diffusers(merged))
    padded, _ = pad_to_multiple(enlarged.movedim(-1, 1), encoder.downscale)
    latent = mode(encoder(padded * 2 - 1, torch.tensor([timestep])))
    z = latent * LATENT_SCALE
    return latent, x0_from_residual(z, unet(z, timestep, weights.prompt).sample, timestep)


def assert_close(what: str, ours: Tensor, expected: Tensor) -> None:
    error = float((ours - expected).abs().max() / expected.std())
    assert error < 2e-4, (
        f"{what} differs by {error:.1e} of its spread: a part of the weights is missing or applied twice"
    )


def test_a_v_prediction_checkpoint_is_refused(mini: Pack) -> None:
    import comfy.model_base

    base = mini.model.clone()
    weights = mini.comfy.module("tadsr.weights").load(mini.comfy.base / "models" / "tadsr" / MINI)
    before = base.model.model_type
    base.model.model_type = comfy.model_base.ModelType.V_PREDICTION
    try:
        with pytest.raises(ValueError, match="needs Stable Diffusion 2.1-base"):
            mini.comfy.module("nodes.student").make_student(base, weights, MINI)
    finally:
        base.model.model_type = before


def test_a_file_replaced_under_its_name_is_loaded_again(comfy_inprocess: InProcessComfy, models: Path) -> None:
    loader = comfy_inprocess.node("TADSRModelLoader")
    path = models / "tadsr" / "replaced.safetensors"
    save(path, self_contained(1))
    before = loader.fingerprint_inputs(path.name, NO_BASE)
    assert loader.fingerprint_inputs(path.name, NO_BASE) == before
    save(path, self_contained(2))
    assert loader.fingerprint_inputs(path.name, NO_BASE) != before


def test_weights_are_found_in_extra_model_paths(
    comfy_inprocess: InProcessComfy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order of a real start: the file is read before the pack is loaded."""
    import folder_paths
    from utils.extra_config import load_extra_path_config

    known = {k: v for k, v in folder_paths.folder_names_and_paths.items() if k != "tadsr"}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", known)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "extra.safetensors").touch()
    (tmp_path / "mine" / "notes.txt").touch()
    config = tmp_path / "extra_model_paths.yaml"
    config.write_text(f"mine:\n    base_path: {tmp_path}\n    tadsr: mine\n")
    load_extra_path_config(str(config))
    comfy_inprocess.module("nodes.folders").register_weights_folder()
    options = comfy_inprocess.node("TADSRModelLoader").GET_SCHEMA().inputs[0].options
    assert "extra.safetensors" in options and "notes.txt" not in options
