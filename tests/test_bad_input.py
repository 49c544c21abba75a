"""What users get wrong: each gives one clear error in its node, and ComfyUI runs the next prompt.

Prompts run through ComfyUI's own validation and executor.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from random_weights import adapters_for, sd_checkpoint, self_contained
from safetensors.torch import save_file
from torch import Tensor

from host.comfy_in_process import InProcessComfy, PromptError
from host.node_pack import NO_BASE, models_folder, node
from tadsr.weights import save

MINI, CHECKPOINT = "mini.safetensors", "sd.safetensors"
MARKER = "code-was-run"


class Source:
    """A node that gives whatever a test put under a name: pictures that no core node makes."""

    values: dict[str, Any] = {}
    RETURN_TYPES = ("*",)
    FUNCTION = "give"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"name": ("STRING", {})}}

    def give(self, name: str) -> tuple[Any]:
        return (self.values[name],)


class RunsCode:
    """Pickles as a call of os.mkdir(MARKER)."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (MARKER,)


def prompt_with(
    image: str = "picture", loader: dict[str, Any] | None = None, **upscale: Any
) -> dict[str, dict[str, Any]]:
    """Returns a prompt that upscales a small picture, with some inputs changed; links go to the node "source"."""
    return {
        "image": node("TADSRTestSource", name=image),
        "source": node("TADSRTestSource", name="linked"),
        "loader": node("TADSRModelLoader", **{"weights": MINI, "base": NO_BASE, **(loader or {})}),
        "upscale": node(
            "TADSRUpscale",
            **{
                "model": ["loader", 0],
                "encoder": ["loader", 1],
                "vae": ["loader", 2],
                "image": ["image", 0],
                "timestep": 500,
                "scale": 2.0,
                "color_match": "adain",
                **upscale,
            },
        ),
        "save": node("PreviewImage", images=["upscale", 0]),
    }


@pytest.fixture(scope="module")
def comfy(comfy_inprocess: InProcessComfy) -> InProcessComfy:
    import nodes

    nodes.NODE_CLASS_MAPPINGS["TADSRTestSource"] = Source
    Source.values = {"picture": torch.rand(1, 8, 8, 3, generator=torch.Generator().manual_seed(0)), "linked": 0}
    write_files(models_folder(comfy_inprocess))
    return comfy_inprocess


def write_files(models: Path) -> None:
    """Writes good and bad weights."""
    mini, checkpoint = self_contained(), sd_checkpoint()
    weights = models / "tadsr"
    save(weights / MINI, mini)
    save(weights / "no-prompt.safetensors", replace(mini, prompt=None))
    save(weights / "adapters.safetensors", adapters_for(checkpoint))
    save(weights / "other-context.safetensors", adapters_for(checkpoint, context_width=768))
    wide = {key: torch.cat([t, t]) if "input_blocks.0.0" in key else t for key, t in checkpoint.items()}
    save(weights / "other-width.safetensors", adapters_for(wide))
    save_file({key: tensor.half() for key, tensor in checkpoint.items()}, models / "checkpoints" / CHECKPOINT)
    whole = (weights / MINI).read_bytes()
    (weights / "truncated.safetensors").write_bytes(whole[: len(whole) // 2])
    (weights / "page.safetensors").write_text("<html>404</html>")
    (weights / "empty.safetensors").touch()
    save_file({"lora_unet_x.lora_up.weight": torch.zeros(2)}, weights / "lora.safetensors")
    save_file({k: checkpoint[k] for k in list(checkpoint)[:2]}, weights / "checkpoint.safetensors")
    torch.save({"state_dict_unet": {}, "evil": RunsCode()}, weights / "evil.pkl")
    (weights / "plain.pkl").write_bytes(pickle.dumps(RunsCode()))
    torch.save({"state_dict_unet": {}}, weights / "half.pkl")
    save_file({"x": torch.zeros(1)}, models / "checkpoints" / "nothing.safetensors")


def assert_error(comfy: InProcessComfy, prompt: dict[str, Any], *words: str) -> None:
    """Checks that the prompt fails with all the words in its message, and that a good prompt then succeeds."""
    with pytest.raises(PromptError) as caught:
        comfy.run(prompt)
    missing = [word for word in words if word not in caught.value.message]
    assert not missing, f"the error does not say {missing}: {caught.value.message}"
    assert comfy.run(prompt_with())["save"]["images"], "ComfyUI does not run the next prompt"


@pytest.mark.parametrize("timestep", [1000, -5])
def test_timestep_out_of_range(comfy: InProcessComfy, timestep: int) -> None:
    bound = "min of 0" if timestep < 1 else "max of 999"
    assert_error(comfy, prompt_with(timestep=timestep), "timestep", str(timestep), bound)
    Source.values["linked"] = timestep
    linked = prompt_with(timestep=["source", 0])
    assert_error(comfy, linked, f"timestep is {timestep}", "1..999")


@pytest.mark.parametrize("scale", [0.0, 9.0])
def test_scale_out_of_range(comfy: InProcessComfy, scale: float) -> None:
    assert_error(comfy, prompt_with(scale=scale), "scale", str(scale), "min of 1" if scale < 1 else "max of 8")
    Source.values["linked"] = scale
    assert_error(comfy, prompt_with(scale=["source", 0]), f"scale is {scale:g}", "1..8")


def broken(index: int, value: float) -> Tensor:
    batch = Source.values["picture"].repeat(3, 1, 1, 1)
    batch[index, 0, :2, 0] = value
    return batch


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pixels_that_are_no_numbers(comfy: InProcessComfy, value: float) -> None:
    Source.values["broken"] = broken(1, value)
    assert_error(comfy, prompt_with("broken"), "image 1", "2 values", "NaN or infinite", "0..1")


@pytest.mark.parametrize(("shape", "word"), [((0, 8, 8, 3), "at least one picture"), ((1, 8, 8, 2), "2 channels")])
def test_batches_of_an_odd_shape(comfy: InProcessComfy, shape: tuple[int, ...], word: str) -> None:
    Source.values["odd"] = torch.zeros(shape)
    assert_error(comfy, prompt_with("odd"), word, "accepted")


def test_a_result_that_would_be_too_large(comfy: InProcessComfy) -> None:
    Source.values["long"] = torch.zeros(1, 1, 9000, 3)
    assert_error(comfy, prompt_with("long"), "18000x2", "1..16384")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("truncated.safetensors", ("damaged or incomplete", "get it again")),
        ("page.safetensors", ("a web page", "download")),
        ("empty.safetensors", ("not a safetensors file",)),
        ("lora.safetensors", ("a LoRA without a Time-Aware Encoder",)),
        ("checkpoint.safetensors", ("a Stable Diffusion checkpoint", "models/checkpoints")),
        ("half.pkl", ("checkpoint", "missing")),
    ],
)
def test_wrong_weights_files(comfy: InProcessComfy, name: str, words: tuple[str, ...]) -> None:
    assert_error(comfy, prompt_with(loader={"weights": name}), name, *words)


@pytest.mark.parametrize("name", ["evil.pkl", "plain.pkl"])
def test_a_pickle_never_runs_code(
    comfy: InProcessComfy, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_error(comfy, prompt_with(loader={"weights": name}), name)
    assert not (tmp_path / MARKER).exists(), "the pickle's code was executed"
    pickle.loads((comfy.base / "models" / "tadsr" / "plain.pkl").read_bytes())
    assert (tmp_path / MARKER).exists(), "the pickle would not have run code anyhow: the test is void"


def test_weights_not_in_the_list(comfy: InProcessComfy) -> None:
    assert_error(comfy, prompt_with(loader={"weights": "absent.safetensors"}), "weights", "absent.safetensors")


def test_missing_base(comfy: InProcessComfy) -> None:
    adapters = {"weights": "adapters.safetensors"}
    assert_error(comfy, prompt_with(loader=adapters), "adapters.safetensors", "Stable Diffusion 2.1-base")
    assert_error(comfy, prompt_with(loader={**adapters, "base": "gone.safetensors"}), "base", "gone.safetensors")
    nothing = prompt_with(loader={**adapters, "base": "nothing.safetensors"})
    assert_error(comfy, nothing, "nothing.safetensors", "Stable Diffusion 2.1-base")


def test_a_base_for_weights_that_have_their_own(comfy: InProcessComfy) -> None:
    assert_error(comfy, prompt_with(loader={"base": CHECKPOINT}), MINI, CHECKPOINT, NO_BASE)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("other-context.safetensors", ("another base model", "768", "1024")),
        ("other-width.safetensors", ("another base model", "input_blocks.0.0", "640", "320")),
    ],
)
def test_weights_of_another_base(comfy: InProcessComfy, name: str, words: tuple[str, ...]) -> None:
    assert_error(comfy, prompt_with(loader={"weights": name, "base": CHECKPOINT}), *words)


def test_a_text_encoder_of_another_width(comfy: InProcessComfy) -> None:
    Source.values["linked"] = [[torch.zeros(1, 77, 768), {}]]
    assert_error(comfy, prompt_with(conditioning=["source", 0]), "768 wide", "64", "Load TADSR Model")


def test_no_prompt_at_all(comfy: InProcessComfy) -> None:
    prompt = prompt_with(loader={"weights": "no-prompt.safetensors"})
    assert_error(comfy, prompt, "no-prompt.safetensors", "connect a CONDITIONING")


def test_a_model_without_tadsr(comfy: InProcessComfy) -> None:
    prompt = prompt_with(model=["core", 0]) | {"core": node("CheckpointLoaderSimple", ckpt_name=CHECKPOINT)}
    assert_error(comfy, prompt, "without TADSR weights", "Load TADSR Model")


def four_steps(**changes: dict[str, Any]) -> dict[str, Any]:
    prompt = prompt_with()
    del prompt["upscale"]
    steps = {
        "encode": node("TADSREncode", encoder=["loader", 1], image=["image", 0], timestep=500, scale=2.0),
        "step": node("TADSROneStep", model=["loader", 0], latent=["encode", 0]),
        "decode": node("VAEDecode", samples=["step", 0], vae=["loader", 2]),
        "finish": node("TADSRFinish", image=["decode", 0], reference=["encode", 1], color_match="adain"),
        "save": node("PreviewImage", images=["finish", 0]),
    }
    for key, inputs in changes.items():
        steps[key]["inputs"] |= inputs
    return prompt | steps


def test_a_latent_without_timestep(comfy: InProcessComfy) -> None:
    assert comfy.run(four_steps())["save"]["images"], "the unchanged prompt must run"
    Source.values["linked"] = {"samples": torch.zeros(1, 4, 16, 16)}
    assert_error(comfy, four_steps(step={"latent": ["source", 0]}), "does not say for which timestep", "1..999")
    Source.values["linked"] = 1000
    assert_error(comfy, four_steps(step={"timestep": ["source", 0]}), "timestep is 1000")


def test_a_batch_changed_between_the_steps(comfy: InProcessComfy) -> None:
    Source.values["linked"] = {"samples": torch.zeros(3, 4, 16, 16), "tadsr_timesteps": (100, 900)}
    assert_error(comfy, four_steps(step={"latent": ["source", 0]}), "3 pictures", "2 different timesteps")


def test_the_wrong_reference(comfy: InProcessComfy) -> None:
    Source.values["linked"] = torch.rand(1, 50, 60, 3)
    not_enlarged = four_steps(finish={"reference": ["source", 0]}, encode={"image": ["source", 0]})
    assert_error(comfy, not_enlarged, "120x100", "reference 60x50", "enlarged image of Time-Aware Encode")
    Source.values["linked"] = torch.zeros(2, 16, 16, 3)
    assert_error(comfy, four_steps(finish={"reference": ["source", 0]}), "2 pictures", "image 1")


def test_sampling_replaced_by_another_node(comfy: InProcessComfy) -> None:
    comfy.load_core_nodes("nodes_model_advanced.py")
    discrete = node("ModelSamplingDiscrete", model=["loader", 0], sampling="eps", zsnr=False)
    prompt = prompt_with(model=["discrete", 0]) | {"discrete": discrete}
    assert_error(comfy, prompt, "replaced the sampling", "ModelSamplingDiscrete")


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"tile": 64, "overlap": 64}, ("overlap is 64", "tile 64", "up to half the tile")),
        ({"tile": -8}, ("tile", "-8", "min of 0")),
        ({"preview_size": -1}, ("preview_size", "-1", "min of 0")),
    ],
)
def test_tiles_that_cannot_be(comfy: InProcessComfy, inputs: dict[str, Any], words: tuple[str, ...]) -> None:
    assert_error(comfy, prompt_with(**inputs), *words)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("timestep", 250.5, ("timestep is 250.5", "accepted are whole numbers")),
        ("timestep", True, ("timestep is True", "accepted are whole numbers")),
        ("overlap", 7.5, ("overlap is 7.5", "accepted are whole numbers")),
        ("scale", float("nan"), ("scale is nan", "accepted are numbers from 1 to 8")),
        ("scale", 2**2000, ("scale is a number of 2001 bits", "up to 256 bits")),
        ("encoding", "middle", ("encoding is 'middle'", "accepted are mode, sample")),
        ("any_timestep", "yes", ("any_timestep is 'yes'", "accepted are true and false")),
        ("image", torch.zeros(1, 8, 8, 3, dtype=torch.complex64), ("image is a tensor of complex64, (1, 8, 8, 3)",)),
        ("image", torch.zeros(1, 8, 8, 3, dtype=torch.uint8), ("image is a tensor of uint8", "floating-point")),
        ("conditioning", [], ("conditioning is empty", "at least one prompt")),
        ("preview_mask", torch.ones(1, 8, 0), ("preview_mask has the shape (1, 8, 0)",)),
    ],
)
def test_what_a_link_may_carry_and_a_widget_may_not(
    comfy: InProcessComfy, name: str, value: object, words: tuple[str, ...]
) -> None:
    Source.values["linked"] = value
    prompt = prompt_with()
    prompt["upscale"]["inputs"][name] = ["source", 0]
    assert_error(comfy, prompt, *words)


@pytest.mark.parametrize(("name", "kind"), [("model", "MODEL"), ("encoder", "TADSR_ENCODER"), ("vae", "VAE")])
@pytest.mark.parametrize(("value", "seen"), [(None, "empty"), (5, "of the type int")])
def test_networks_that_are_none(comfy: InProcessComfy, name: str, kind: str, value: object, seen: str) -> None:
    Source.values["linked"] = value
    prompt = prompt_with()
    prompt["upscale"]["inputs"][name] = ["source", 0]
    assert_error(comfy, prompt, f"{name} is {seen}; accepted are a {kind}, as Load TADSR Model gives it")


@pytest.mark.parametrize("class_type", ["TADSRUpscale", "TADSREstimate"])
def test_a_vae_of_other_latents_is_refused_before_any_network_runs(
    comfy: InProcessComfy, class_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.model_management as mm
    import nodes

    if "pixel_space" not in nodes.VAELoader.INPUT_TYPES()["required"]["vae_name"][0]:
        pytest.skip("this ComfyUI has no such VAE")
    monkeypatch.setattr(mm, "load_models_gpu", lambda *_, **__: pytest.fail("a network was loaded"))
    prompt = prompt_with(vae=["pixels", 0]) | {"pixels": node("VAELoader", vae_name="pixel_space")}
    with pytest.raises(PromptError) as caught:
        if class_type == "TADSREstimate":
            given = {name: prompt["upscale"]["inputs"][name] for name in ("model", "encoder", "vae", "image", "scale")}
            prompt = {**prompt, "upscale": node(class_type, **given)}
            del prompt["save"]
        comfy.run(prompt)
    text = "vae decodes latents of 3 channels in 2 dimensions; accepted are those of 4 channels in 2 dimensions"
    assert text in caught.value.message


@pytest.mark.parametrize("timesteps", ["500", (1.5,), {"a": 1}, (), 500])
def test_a_latent_whose_timesteps_are_none(comfy: InProcessComfy, timesteps: object) -> None:
    Source.values["linked"] = {"samples": torch.zeros(1, 4, 16, 16), "tadsr_timesteps": timesteps}
    assert_error(comfy, four_steps(step={"latent": ["source", 0]}), "tadsr_timesteps is", "connect the timestep")


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        (torch.zeros(1, 16, 16, 16), ("16 channels", "(1, 16, 16, 16)", "accepted by this MODEL are 4")),
        (torch.full((1, 4, 16, 16), torch.nan), ("one with NaN or infinity",)),
        (torch.zeros(1, 4, 16, 16, dtype=torch.int32), ("a tensor of int32",)),
    ],
)
def test_latents_of_another_kind(comfy: InProcessComfy, samples: torch.Tensor, words: tuple[str, ...]) -> None:
    Source.values["linked"] = {"samples": samples, "tadsr_timesteps": (500,)}
    assert_error(comfy, four_steps(step={"latent": ["source", 0]}), *words)
