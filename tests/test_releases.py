"""The authors' files: each known by its content, used to the last tensor, and refused with a reason where it is not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import released_files
import torch
from random_weights import sd_checkpoint
from released_files import RELEASES, hypir, osediff, pisa_sr, write_releases
from safetensors.torch import load_file, save_file
from torch import Tensor

from tadsr.convert import convert_official, main
from tadsr.errors import WeightsError
from tadsr.keys import UNetLayout, unet_table
from tadsr.lora import adapters
from tadsr.pickles import is_pickle
from tadsr.releases import read_release, weights_from_official
from tadsr.sources import read_weights
from tadsr.weights import BASE_UNET_PREFIX, BASE_VAE_PREFIX, UNET_PREFIX, encoder_state_dict, load, unet_state_dict

SCALES = {"OSEDiff": 2.0, "PiSA-SR": 2.0, "HYPIR": 1.0, "OMGSR-S": 1.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("released files")
    write_releases(folder)
    return folder


@pytest.fixture(scope="module")
def base() -> dict[str, Tensor]:
    return sd_checkpoint()


@pytest.mark.parametrize("name", RELEASES)
def test_a_file_is_known_by_its_content(name: str, folder: Path) -> None:
    file, timestep, formula = RELEASES[name]
    weights = read_release(folder / file)
    meta = weights.metadata
    assert (meta.name, meta.timesteps, meta.formula, meta.time_aware) == (name, (timestep,), formula, False)
    found = [*adapters(weights.unet_lora).values(), *adapters(weights.encoder_lora).values()]
    assert {adapter.scale for adapter in found} == {SCALES[name]}
    assert bool(weights.unet_lora_semantic) is (name == "PiSA-SR")
    assert meta.empty_prompt is (name != "OSEDiff")


@pytest.mark.parametrize("name", ["OSEDIFF.PKL", "osediff.safetensors", "osediff"])
def test_no_name_says_what_a_file_is(name: str, folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / RELEASES["OSEDiff"][0], tmp_path / name)
    assert read_weights(tmp_path / name).metadata.name == "OSEDiff"


@pytest.mark.parametrize("name", RELEASES)
def test_merged_weights_follow_the_formula_under_the_authors_names(
    name: str, folder: Path, base: dict[str, Tensor]
) -> None:
    """W + scale (B @ A), summed here over a module's tensors in the file itself."""
    weights = read_release(folder / RELEASES[name][0])
    unet = {k.removeprefix("model."): t for k, t in base.items() if k.startswith(BASE_UNET_PREFIX)}
    merged = unet_state_dict(weights, unet)
    raw: dict[str, Tensor] = {
        "OSEDiff": lambda: osediff()["state_dict_unet"],
        "PiSA-SR": lambda: pisa_sr()["state_dict_unet"],
        "HYPIR": hypir,
        "OMGSR-S": lambda: {
            k.removeprefix("base_model.model.").replace(".weight", ".x.weight"): t
            for k, t in load_file(folder / RELEASES[name][0]).items()
        },
    }[name]()
    expected = dict(unet)
    modules = released_files.modules()
    table = unet_table(UNetLayout.from_diffusers(modules))
    if name == "OSEDiff":
        for part in ("weight", "bias"):
            expected[f"{UNET_PREFIX}input_blocks.0.0.{part}"] = raw[f"conv_in.base_layer.{part}"]
    changed = set()
    for key, a in raw.items():
        if ".lora_A." in key:
            module, b = key.partition(".lora_A.")[0], raw[key.replace(".lora_A.", ".lora_B.")]
            prefix = max((p for p in table if f"{module}.".startswith(f"{p}.")), key=len)
            ldm = f"{UNET_PREFIX}{table[prefix]}{module.removeprefix(prefix)}.weight"
            delta = (b.flatten(1) @ a.flatten(1)).reshape(expected[ldm].shape)
            expected[ldm] = expected[ldm] + SCALES[name] * delta
            changed.add(module)
    assert changed == set(modules) - ({"conv_in"} if name == "HYPIR" else set())
    for key, tensor in expected.items():
        assert torch.allclose(merged[key], tensor, atol=1e-5), key


def test_an_encoder_without_time_layers_is_the_plain_one(folder: Path, base: dict[str, Tensor]) -> None:
    weights = read_release(folder / RELEASES["PiSA-SR"][0])
    vae = {k.removeprefix(BASE_VAE_PREFIX): t for k, t in base.items() if k.startswith(BASE_VAE_PREFIX)}
    state = encoder_state_dict(weights, vae)
    time = {key for key in state if key not in vae}
    assert len(time) == 24 and not any(state[key].any() for key in time)
    assert all(torch.equal(state[key], vae[key]) for key in state if key not in time)


@pytest.mark.parametrize("name", RELEASES)
def test_the_command_converts_and_names_the_licence(
    name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = folder / RELEASES[name][0]
    if name == "OMGSR-S":
        source = source.parent.parent
    output = tmp_path / "converted.safetensors"
    assert main([str(source), "-o", str(output)]) == 0
    text = capsys.readouterr().out
    assert f"Licence of the {name} weights" in text and f"timestep {RELEASES[name][1]} only" in text
    ours, theirs = load(output), convert_official(source)
    assert ours.metadata == theirs.metadata
    for section in ("unet_lora", "unet_full", "encoder_lora", "unet_lora_semantic"):
        a, b = getattr(ours, section), getattr(theirs, section)
        assert set(a) == set(b) and all(torch.equal(a[key], b[key]) for key in a)
    for path in (source, output):
        assert main([str(path), "--check"]) == 0
        assert "Whole" in capsys.readouterr().out


def _lost(content: dict[str, Any], part: str, words: str) -> dict[str, Any]:
    key = next(key for key in content[part] if words in key)
    return {**content, part: {k: t for k, t in content[part].items() if k != key}}


REFUSED: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "OSEDiff whole, of AdcSR's page": (lambda: {"vae": {}, "unet": {}}, "whole OSEDiff.*not supported.*18 MB"),
    "S3Diff": (lambda: {"state_dict_unet": {}, "state_dict_vae_de_mlp": {}, "w": 1}, "S3Diff: not supported"),
    "CODSR": (lambda: {**osediff(), "state_dict_sft": {}}, "CODSR: not supported"),
    "AdcSR": (lambda: {"module.body.0.weight": torch.zeros(1)}, "AdcSR: not supported"),
    "InvSR": (lambda: {"down_blocks.0.resnets.0.conv1.weight": torch.zeros(1)}, "InvSR.*not supported"),
    "TSD-SR": (
        lambda: {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(1)},
        "Stable Diffusion 3, as TSD-SR's: not supported",
    ),
    "a checkpoint": (lambda: {"state_dict": {}, "epoch": 1}, "whole checkpoint.*models/checkpoints"),
    "anything": (lambda: {"a": 1, "b": 2}, r"2 entries: a, b.*accepted are those of TADSR, OSEDiff, PiSA-SR"),
    "PiSA-SR without a set's matrix": (
        lambda: _lost(pisa_sr(), "state_dict_unet", "lora_B.default_others_sem"),
        "1 mis",
    ),
    "PiSA-SR of two ranks": (lambda: {**pisa_sr(), "lora_rank_unet_sem": 8}, "says rank 8"),
    "OSEDiff without a matrix": (lambda: _lost(osediff(), "state_dict_vae", "lora_B"), "1 missing"),
    "HYPIR of two ranks": (
        lambda: {
            key: tensor[:4] if key == "conv_out.lora_A.default.weight" else tensor for key, tensor in hypir().items()
        },
        r"ranks \[4, 8\].*one rank for all",
    ),
    "HYPIR with a foreign tensor": (lambda: {**hypir(), "up_blocks.x": torch.zeros(1)}, "1 unexpected"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_files_are_named_by_their_keys(kind: str, tmp_path: Path) -> None:
    make, message = REFUSED[kind]
    torch.save(make(), tmp_path / "osediff.pkl")
    with pytest.raises(WeightsError, match=message) as caught:
        read_release(tmp_path / "osediff.pkl")
    assert str(tmp_path / "osediff.pkl") in str(caught.value) and "\n" not in str(caught.value)


def _config(folder: Path, **changed: Any) -> None:
    path = folder / "unet" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


PEFT_FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "unet" / "adapter_config.json").unlink(), "no adapter_config.json.*scale"),
    "a config that is none": (
        lambda f: (f / "unet" / "adapter_config.json").write_text("{"),
        "damaged.*JSONDecodeError",
    ),
    "another rank": (lambda f: _config(f, r=16), "says rank 16, but"),
    "a rank that is no number": (lambda f: _config(f, r="8"), "r='8'.*accepted"),
    "DoRA": (lambda f: _config(f, use_dora=True), "use_dora=True, which is not supported"),
    "another scale": (lambda f: _config(f, lora_alpha=16), "different scales"),
    "one network only": (lambda f: shutil.rmtree(f / "vae"), "1 folders with adapters of a UNet and 0 of an encoder"),
    "a foreign tensor": (
        lambda f: save_file(
            {**load_file(f / "vae" / released_files.TENSORS), "x": torch.zeros(1)}, f / "vae" / released_files.TENSORS
        ),
        "1 unexpected",
    ),
}


@pytest.mark.parametrize("fault", PEFT_FAULTS)
def test_a_folder_of_peft_is_whole(fault: str, folder: Path, tmp_path: Path) -> None:
    change, message = PEFT_FAULTS[fault]
    copy = tmp_path / "omgsr"
    shutil.copytree(folder / "omgsr", copy)
    change(copy)
    with pytest.raises(WeightsError, match=message) as caught:
        read_release(copy)
    assert str(copy) in str(caught.value)


def test_check_says_what_is_wrong(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "weights.safetensors"
    assert main([str(folder / RELEASES["OSEDiff"][0]), "-o", str(output)]) == 0
    content = bytearray(output.read_bytes())
    content[-1000] ^= 1  # one bit of one number
    output.write_bytes(content)
    assert main([str(output), "--check"]) == 1
    assert "SHA-256 differs" in capsys.readouterr().err


def test_full_size_key_lists_resolve(shared_reference: Path) -> None:
    """The UNet of Stable Diffusion 2.1 has the 258 modules that every method adapts; none is left over or missing."""
    content = json.loads((shared_reference / "official_checkpoint_keys_full_size.json").read_text())
    parts = {key: value for key, value in content.items() if isinstance(value, dict)}
    full = {part: {key: torch.empty(s, device="meta") for key, s in v.items()} for part, v in parts.items()}
    lists = {key: value for key, value in content.items() if not isinstance(value, dict)}
    unet = {key: tensor for key, tensor in full["state_dict_unet"].items() if ".lora_" in key}
    pisa = {
        "state_dict_unet": {
            key.replace(".weight", "").rsplit(".", 1)[0] + f".{key.split('.')[-2]}_{part}.weight": tensor
            for part in ("pix", "sem")
            for key, tensor in unet.items()
        },
        **{f"{key}_{part}": lists[key] for part in ("pix", "sem") for key in released_files.MODULE_LISTS.values()},
        **{"lora_rank_unet_pix": 4, "lora_rank_unet_sem": 4},
    }
    hypir_full = {
        ".".join([*key.split(".")[:-2], "default", "weight"]): tensor
        for key, tensor in unet.items()
        if not key.startswith("conv_in.")
    }
    osediff_full = {**lists, "state_dict_unet": full["state_dict_unet"], "state_dict_vae": full["state_dict_vae"]}
    counts = {}
    for name, made in (("OSEDiff", osediff_full), ("PiSA-SR", pisa), ("HYPIR", hypir_full)):
        weights = weights_from_official(made)
        assert weights.metadata.name == name
        counts[name] = (len(adapters_meta(weights.unet_lora)), len(adapters_meta(weights.unet_lora_semantic)))
    assert counts == {"OSEDiff": (258, 0), "PiSA-SR": (258, 258), "HYPIR": (257, 0)}


def adapters_meta(lora: dict[str, Tensor]) -> list[str]:
    """Returns the modules of adapters on the meta device, which have no alpha to read."""
    return [key for key in lora if key.endswith(".lora_down.weight")]


def test_a_safetensors_file_is_no_pickle_whatever_its_headers_size(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes((0x280).to_bytes(8, "little") + b"{" + b" " * 0x27E + b"}")
    assert not is_pickle(path)
    torch.save({}, path)
    assert is_pickle(path)
