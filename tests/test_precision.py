"""The loader's precision, in all three networks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from random_weights import self_contained

from host.comfy_in_process import InProcessComfy
from host.node_pack import NO_BASE, Pack, load_pack, models_folder, picture
from tadsr.weights import save

WEIGHTS = "precision.safetensors"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Of the result's standard deviation, root mean square. bf16 has 8 bits of mantissa, fp16 has 11.
TOLERANCES = {"fp32": 1e-6, "fp16": 2e-2, "bf16": 1e-1}
pytestmark = pytest.mark.usefixtures("inference_mode")


@pytest.fixture(scope="module")
def models(comfy_inprocess: InProcessComfy) -> Path:
    folder = models_folder(comfy_inprocess)
    save(folder / "tadsr" / WEIGHTS, self_contained())
    return folder


def load(comfy: InProcessComfy, precision: str) -> Pack:
    return Pack(comfy, *comfy.node("TADSRModelLoader").execute(WEIGHTS, NO_BASE, precision).result)


@pytest.mark.parametrize("precision", DTYPES)
def test_all_networks_compute_in_the_chosen_precision(
    comfy_inprocess: InProcessComfy, models: Path, precision: str
) -> None:
    exact, pack = load_pack(comfy_inprocess, WEIGHTS), load(comfy_inprocess, precision)
    dtype = DTYPES[precision]
    assert (pack.encoder.dtype, pack.vae.vae_dtype) == (dtype, dtype)
    assert pack.model.model.get_dtype_inference() == dtype
    seen = set()
    network = pack.model.model.diffusion_model
    hook = network.out[2].register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    try:
        result = pack.upscale(picture(16, 24), color_match="none")
    finally:
        hook.remove()
    assert seen == {dtype}, "ComfyUI cast the UNet's activations to another precision"
    expected = exact.upscale(picture(16, 24), color_match="none")
    error = float((result - expected).square().mean().sqrt() / expected.std())
    assert error <= TOLERANCES[precision]
    assert precision == "fp32" or error > 0, "the rounding of half precision is missing: it was not used"


def test_a_tile_can_be_encoded_in_float32(comfy_inprocess: InProcessComfy, models: Path) -> None:
    """Half-precision weights stay loaded, and only their own rounding is left."""
    half, exact = load(comfy_inprocess, "bf16").encoder, load(comfy_inprocess, "fp32").encoder
    exact.model.load_state_dict({key: t.float() for key, t in half.model.state_dict().items()})
    planes = picture(32, 32).movedim(-1, 1)
    expected = exact.moments(planes, 500)
    assert torch.allclose(half.moments(planes, 500, float32=True), expected, atol=1e-5)
    assert not torch.allclose(half.moments(planes, 500), expected, atol=1e-5)
    assert {t.dtype for t in half.model.parameters()} == {torch.bfloat16}


def test_an_unknown_precision_is_refused(comfy_inprocess: InProcessComfy, models: Path) -> None:
    with pytest.raises(ValueError, match=r"precision is 'fp8'; accepted are auto, fp32, fp16, bf16"):
        load(comfy_inprocess, "fp8")


def test_comfyui_s_flags_decide_under_auto(
    comfy_inprocess: InProcessComfy, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from comfy.cli_args import args

    monkeypatch.setattr(args, "bf16_vae", True)
    pack = load(comfy_inprocess, "auto")
    assert (pack.encoder.dtype, pack.vae.vae_dtype) == (torch.bfloat16, torch.bfloat16)
    assert load(comfy_inprocess, "fp32").encoder.dtype == torch.float32, "a choice comes before the flags"


# The difference to the same weights in fp32: float8 has 2 or 3 bits of mantissa, in the UNet alone.
FLAGS = {
    **dict.fromkeys(("force_fp32", "fp32_unet", "fp32_vae", "fp8_e8m0fnu_unet", "force_channels_last"), 1e-6),
    **dict.fromkeys(("force_fp16", "fp16_unet", "fp16_vae", "fp16_intermediates"), 2e-2),
    **dict.fromkeys(("bf16_unet", "bf16_vae"), 1e-1),
    **{"fp64_unet": 1e-4, "fp8_e4m3fn_unet": 5e-2, "fp8_e5m2_unet": 5e-2},
}


@pytest.mark.parametrize("flag", FLAGS)
def test_every_flag_of_comfyui_for_a_dtype_gives_a_picture(
    comfy_inprocess: InProcessComfy,
    models: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    flag: str,
) -> None:
    from comfy.cli_args import args

    expected = load_pack(comfy_inprocess, WEIGHTS).upscale(picture(16, 24), color_match="none")
    assert getattr(args, flag) is False, "ComfyUI has no such flag"
    monkeypatch.setattr(args, flag, True)
    monkeypatch.setattr(args, "fp16_unet", flag in ("fp16_unet", "force_fp16"))  # as its command line does
    pack = load(comfy_inprocess, "auto")
    result = pack.upscale(picture(16, 24), color_match="none").float()
    error = float((result - expected).square().mean().sqrt() / expected.std())
    assert error <= FLAGS[flag]
    stored = {tensor.dtype for tensor in pack.model.model.diffusion_model.parameters()}
    if flag.startswith("fp8") and "e8m0" not in flag:
        assert stored == {getattr(torch, "float8_" + flag.split("_")[1])}, "the flag's memory is not saved"
        assert error > 0
    assert ("loaded as without that flag" in caplog.text) == (flag == "fp8_e8m0fnu_unet")
