"""ComfyUI's TorchCompileModel on our MODEL."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from nearly import assert_nearly
from random_weights import self_contained

from host.comfy_in_process import InProcessComfy
from host.node_pack import load_pack, models_folder, picture
from tadsr.keys import diffusers_unet_to_ldm
from tadsr.weights import BASE_UNET_PREFIX, BASE_VAE_PREFIX, TadsrWeights, save

WEIGHTS = "compiled.safetensors"
TOLERANCE = 1e-4  # of the latent's standard deviation: a compiled network adds in another order


def one_block_weights() -> TadsrWeights:
    """Returns weights whose UNet has one level of one block: a compiler takes minutes for the bundled model's."""
    weights = self_contained()
    assert weights.prompt is not None
    latent_channels = weights.base[f"{BASE_VAE_PREFIX}decoder.conv_in.weight"].shape[1]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        unet = UNet2DConditionModel(
            in_channels=latent_channels,
            out_channels=latent_channels,
            block_out_channels=(64,),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
            attention_head_dim=(1,),
            cross_attention_dim=weights.prompt.shape[2],
            use_linear_projection=True,
        )
    vae = {key: tensor for key, tensor in weights.base.items() if key.startswith(BASE_VAE_PREFIX)}
    named = {BASE_UNET_PREFIX + key: tensor for key, tensor in diffusers_unet_to_ldm(unet.state_dict()).items()}
    return replace(weights, base=vae | named)


@pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "cl"))), reason="torch.compile on the CPU needs a C++ compiler"
)
@torch.inference_mode()
def test_a_compiled_model_gives_the_same_latent(
    comfy_inprocess: InProcessComfy, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Some other test's package has imported Python's own distutils, which setuptools would insist on replacing.
    monkeypatch.setenv("SETUPTOOLS_USE_DISTUTILS", "stdlib")
    save(models_folder(comfy_inprocess) / "tadsr" / WEIGHTS, one_block_weights())
    pack = load_pack(comfy_inprocess, WEIGHTS)
    comfy_inprocess.load_core_nodes("nodes_torch_compile.py")
    compiled = comfy_inprocess.node("TorchCompileModel").execute(pack.model, "inductor").result[0]
    latent, _ = pack.encode(picture(16, 24))
    expected = pack.one_step(latent)["samples"]

    frames = torch._dynamo.utils.counters["stats"]
    frames.clear()
    result = comfy_inprocess.node("TADSROneStep").execute(compiled, latent).result[0]["samples"]
    assert frames["unique_graphs"] > 0, "nothing was compiled"
    error = float((result - expected).abs().max() / expected.std())
    assert 0 <= error <= TOLERANCE

    tiles = {"tile": 64, "overlap": 16}
    in_tiles = comfy_inprocess.node("TADSROneStep").execute(compiled, latent, **tiles).result[0]["samples"]
    assert (in_tiles - pack.one_step(latent, **tiles)["samples"]).abs().max() <= TOLERANCE * expected.std()
    image = picture(16, 24)  # here tiles share statistics, which a compiled network cannot be given
    whole = comfy_inprocess.node("TADSRUpscale")
    shared = whole.execute(compiled, pack.encoder, pack.vae, image, 500, **tiles).result[0]
    assert_nearly(shared, pack.upscale(image, **tiles))


@torch.inference_mode()
def test_a_second_network_can_be_made_from_the_files(comfy_inprocess: InProcessComfy) -> None:
    """As TorchCompileModel does on a GPU, where ComfyUI's dynamic VRAM must be off for it."""
    save(models_folder(comfy_inprocess) / "tadsr" / WEIGHTS, one_block_weights())
    model = load_pack(comfy_inprocess, WEIGHTS).model
    make, arguments = model.cached_patcher_init
    again = make(*arguments, disable_dynamic=True)
    assert again.model is not model.model
    expected, found = model.model.state_dict(), again.model.state_dict()
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        assert_nearly(found[key], tensor, key)
