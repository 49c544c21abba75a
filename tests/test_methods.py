"""OSEDiff, PiSA-SR, OMGSR-S and HYPIR in the nodes: loaded as they are, run by their formula, at their timestep."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from random_weights import sd_checkpoint, self_contained
from released_files import RELEASES, write_releases
from safetensors.torch import save_file
from torch import Tensor

from host.comfy_in_process import InProcessComfy
from host.node_pack import Pack, load_pack, models_folder, picture
from tadsr.architecture import is_time_layer
from tadsr.lora import merged
from tadsr.releases import read_release
from tadsr.schedule import FORMULAS, LATENT_SCALE
from tadsr.weights import TadsrWeights, save

CHECKPOINT = "methods-sd.safetensors"
CONTEXT = torch.randn(1, 7, 1024, generator=torch.Generator().manual_seed(3))
TOLERANCE = 2e-5  # of the largest value: float32, some hundred layers
pytestmark = pytest.mark.usefixtures("inference_mode")


@pytest.fixture(scope="module")
def models(comfy_inprocess: InProcessComfy) -> Path:
    models = models_folder(comfy_inprocess)
    write_releases(models / "tadsr")
    save_file(sd_checkpoint(), models / "checkpoints" / CHECKPOINT)
    return models


@pytest.fixture(scope="module")
def packs(comfy_inprocess: InProcessComfy, models: Path) -> dict[str, Pack]:
    return {name: load_pack(comfy_inprocess, file, CHECKPOINT) for name, (file, _, _) in RELEASES.items()}


def close(ours: Tensor, expected: Tensor) -> bool:
    return float((ours - expected).abs().max()) <= TOLERANCE * float(expected.abs().max())


def prediction(pack: Pack, latent: Tensor, timestep: int, context: Tensor = CONTEXT) -> Tensor:
    """Returns what the MODEL's network itself predicts for a latent, without ComfyUI's samplers."""
    import comfy.model_management as mm

    mm.load_models_gpu([pack.model])
    network = pack.model.model.diffusion_model
    return network(latent * LATENT_SCALE, torch.tensor([timestep]), context=context).float()


@pytest.mark.parametrize("name", RELEASES)
def test_a_released_file_runs_as_it_is(packs: dict[str, Pack], name: str) -> None:
    pack, (_, timestep, formula) = packs[name], RELEASES[name]
    latent, _ = pack.encode(picture(16, 24), 0)
    assert latent["tadsr_timesteps"] == (timestep,)
    z = latent["samples"] * LATENT_SCALE
    expected = FORMULAS[formula](z, prediction(pack, latent["samples"], timestep), timestep)
    result = pack.one_step(latent, conditioning=[[CONTEXT, {}]])["samples"]
    assert close(result * LATENT_SCALE, expected)
    assert pack.upscale(picture(16, 24), 0, conditioning=[[CONTEXT, {}]]).shape == (1, 64, 96, 3)


def test_the_files_are_told_apart(packs: dict[str, Pack]) -> None:
    latents = [packs[name].encode(picture(16, 24), 0)[0]["samples"] for name in ("OSEDiff", "PiSA-SR", "OMGSR-S")]
    assert not torch.allclose(latents[0], latents[1]) and not torch.allclose(latents[1], latents[2])


@pytest.mark.parametrize("formula", FORMULAS)
def test_one_step_and_a_core_sampler_follow_the_formula(
    comfy_inprocess: InProcessComfy, models: Path, formula: str
) -> None:
    import comfy.sample
    import comfy.samplers

    timestep = 300
    file = f"methods-{formula}.safetensors"
    weights = self_contained(4)
    save(models / "tadsr" / file, replace(weights, metadata=replace(weights.metadata, formula=formula)))
    pack = load_pack(comfy_inprocess, file)
    latent, _ = pack.encode(picture(16, 24), timestep)
    samples = latent["samples"]
    assert weights.prompt is not None
    p = prediction(pack, samples, timestep, weights.prompt)
    expected = FORMULAS[formula](samples * LATENT_SCALE, p, timestep)
    others = [FORMULAS[f](samples * LATENT_SCALE, p, timestep) for f in FORMULAS if f != formula]
    assert close(pack.one_step(latent)["samples"] * LATENT_SCALE, expected)
    assert not any(close(other, expected) for other in others), "the formulas cannot be told apart here"
    sigmas = torch.stack([pack.model.get_model_object("model_sampling").sigmas[timestep], torch.tensor(0.0)])
    result = comfy.sample.sample_custom(
        pack.model,
        comfy.sample.prepare_noise(samples, 5),
        1.0,
        comfy.samplers.ksampler("dpmpp_2m"),
        sigmas,
        pack.prompt,
        pack.prompt,
        samples,
        disable_pbar=True,
        seed=5,
    )
    assert close(result * LATENT_SCALE, expected)


@pytest.mark.parametrize("name", RELEASES)
def test_another_timestep_is_refused_unless_asked_for(packs: dict[str, Pack], name: str) -> None:
    pack, (file, own, _) = packs[name], RELEASES[name]
    message = (
        f"timestep is 500, but .*{file.rpartition('/')[2]} was trained for timestep {own} only; accepted are {own}"
    )
    for run in (pack.encode, pack.upscale):
        with pytest.raises(ValueError, match=message):
            run(picture(16, 16), 500)
    latent, _ = pack.encode(picture(16, 16), 500, any_timestep=True)
    conditioning: Any = [[CONTEXT, {}]]
    with pytest.raises(ValueError, match=message):
        pack.one_step(latent, conditioning=conditioning)
    other = pack.one_step(latent, conditioning=conditioning, any_timestep=True)["samples"]
    usual = pack.one_step(latent, conditioning=conditioning, timestep=0)["samples"]
    assert not torch.allclose(other, usual), "timestep 0 is the weights' own"


def test_an_encoder_and_a_model_of_different_methods_are_refused(packs: dict[str, Pack]) -> None:
    mixed = replace(packs["OSEDiff"], encoder=packs["PiSA-SR"].encoder)
    with pytest.raises(ValueError, match="timestep is 999, but .* was trained for timestep 1 only"):
        mixed.upscale(picture(16, 16), 0, conditioning=[[CONTEXT, {}]])


def pixel_only(weights: TadsrWeights) -> TadsrWeights:
    return replace(weights, unet_lora_semantic={})


def test_the_dials_of_pisa_sr_combine_predictions(
    comfy_inprocess: InProcessComfy, models: Path, packs: dict[str, Pack]
) -> None:
    """p = pixel p_pix + semantic (p_full - p_pix), against two networks that are merged by themselves."""
    weights = read_release(models / "tadsr" / RELEASES["PiSA-SR"][0])
    save(models / "tadsr" / "methods-pix.safetensors", pixel_only(weights))
    full, pix = packs["PiSA-SR"], load_pack(comfy_inprocess, "methods-pix.safetensors", CHECKPOINT)
    latent, _ = full.encode(picture(16, 24), 0)
    samples = latent["samples"]
    p_full, p_pix = (prediction(pack, samples, 1) for pack in (full, pix))
    assert not torch.allclose(p_full, p_pix, atol=1e-2)
    balance = comfy_inprocess.node("TADSRPiSABalance")
    for pixel, semantic in ((1.0, 1.0), (1.0, 0.0), (0.5, 0.0), (0.0, 1.0), (0.6, 1.4)):
        model = balance.execute(full.model, pixel, semantic).result[0]
        expected = samples * LATENT_SCALE - (pixel * p_pix + semantic * (p_full - p_pix))
        result = replace(full, model=model).one_step(latent, conditioning=[[CONTEXT, {}]])["samples"]
        assert close(result * LATENT_SCALE, expected), (pixel, semantic)
    again = full.one_step(latent, conditioning=[[CONTEXT, {}]])["samples"]
    assert close(again * LATENT_SCALE, samples * LATENT_SCALE - p_full), "the loader's MODEL has changed"


def test_the_dials_run_the_network_as_often_as_needed(comfy_inprocess: InProcessComfy, packs: dict[str, Pack]) -> None:
    pack = packs["PiSA-SR"]
    latent, _ = pack.encode(picture(16, 24), 0)
    calls: list[int] = []
    hook = pack.model.model.diffusion_model.out.register_forward_hook(lambda *_: calls.append(1))
    try:
        for pixel, semantic, passes in ((1.0, 1.0, 1), (0.7, 0.0, 1), (0.7, 0.3, 2)):
            model = comfy_inprocess.node("TADSRPiSABalance").execute(pack.model, pixel, semantic).result[0]
            calls.clear()
            replace(pack, model=model).one_step(latent, conditioning=[[CONTEXT, {}]])
            assert len(calls) == passes
    finally:
        hook.remove()


def test_the_dials_work_in_tiles(comfy_inprocess: InProcessComfy, packs: dict[str, Pack]) -> None:
    pack = packs["PiSA-SR"]
    model = comfy_inprocess.node("TADSRPiSABalance").execute(pack.model, 0.6, 1.4).result[0]
    dialled = replace(pack, model=model)
    image, given = picture(64, 64), {"conditioning": [[CONTEXT, {}]], "color_match": "none"}
    errors = [
        float((one.upscale(image, 0, **given) - one.upscale(image, 0, tile=160, **given)).abs().mean())
        for one in (pack, dialled)
    ]
    # Each pass differs from the whole's as the only pass of the other MODEL does, and they are added: 2.2 times.
    assert errors[1] < 2.2 * errors[0]


@pytest.mark.parametrize("name", ["OSEDiff", "HYPIR"])
def test_the_dials_are_for_pisa_sr_only(comfy_inprocess: InProcessComfy, packs: dict[str, Pack], name: str) -> None:
    with pytest.raises(ValueError, match="one set of adapters; accepted is the MODEL of PiSA-SR weights"):
        comfy_inprocess.node("TADSRPiSABalance").execute(packs[name].model, 1.0, 0.5)


@pytest.mark.parametrize("share", [-0.1, 2.1, float("nan")])
def test_shares_out_of_range(comfy_inprocess: InProcessComfy, packs: dict[str, Pack], share: float) -> None:
    with pytest.raises(ValueError, match=f"semantic is {share}; accepted are numbers from 0 to 2"):
        comfy_inprocess.node("TADSRPiSABalance").execute(packs["PiSA-SR"].model, 1.0, share)


def test_the_merged_network_is_the_files(packs: dict[str, Pack], models: Path) -> None:
    """As a check of the tests above: the MODEL differs from the base by what the file holds."""
    weights = read_release(models / "tadsr" / RELEASES["HYPIR"][0])
    base = {k.removeprefix("model."): t for k, t in sd_checkpoint().items() if k.startswith("model.")}
    expected = merged(base, weights.unet_lora)
    state = packs["HYPIR"].model.model.state_dict()
    assert all(torch.allclose(state[key], expected[key], atol=1e-5) for key in expected)
    assert not any(
        is_time_layer(key) and tensor.any() for key, tensor in packs["HYPIR"].encoder.model.named_parameters()
    )
