"""The student: a whole training step against the official implementation, and its weights out and back in."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.autoencoders.vae import Decoder
from nearly import assert_nearly
from random_weights import random_student
from safetensors.torch import load_file
from test_teacher import TOLERANCE, reference_teacher, relative_error
from torch import Tensor

from tadsr.architecture import is_time_layer
from tadsr.convert import OFFICIAL_TIMESTEPS, convert_official
from tadsr.encoder import EncoderConfig, TimeAwareEncoder
from tadsr.errors import WeightsError
from tadsr.keys import rename, vae_table_of
from tadsr.schedule import alpha_bar, teacher_timestep
from tadsr.weights import Metadata, TadsrWeights, load, save
from training.config.train_config import GUIDANCE
from training.mini.export import weights_from_student
from training.networks.base import Base, LatentDecoder, load_base
from training.networks.lora import cast_frozen
from training.networks.student import Student, load_student_weights, student_weights
from training.networks.teacher import Teacher
from training.objective.losses import blurred_mse, tavsd
from training.official import official_state

KINDS: dict[str, Literal["all", "middle"]] = {"official": "middle", "allactive": "all"}
METADATA = Metadata(name="test", base_model="mini", timesteps=OFFICIAL_TIMESTEPS)


@pytest.fixture(scope="module")
def recorded(shared_reference: Path) -> dict[str, Tensor]:
    return load_file(shared_reference / "trainstep_S64.safetensors")


def reference_student(reference: Path) -> Student:
    """Returns the student of the recorded step, from the official checkpoint."""
    student = Student(load_base(reference / "sd_original.safetensors"))
    load_student_weights(student, convert_official(reference / "tadsr.pkl"))
    return student


@pytest.fixture(scope="module")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Base]:
    """Gives fresh copies of a small base with trained time layers."""
    path = tmp_path_factory.mktemp("base") / "mini.safetensors"
    save(path, weights_from_student(random_student(), source_sha256="", steps=0, dtype=torch.float32))
    return lambda: load_base(path)


def batch(base: Base) -> tuple[Tensor, Tensor, Tensor]:
    """Returns pictures, timesteps and context for a base."""
    generator = torch.Generator().manual_seed(3)
    lq = torch.rand(2, 3, 32, 48, generator=generator) * 2 - 1
    context = torch.randn(2, 5, base.unet.config["cross_attention_dim"], generator=generator)
    return lq, torch.tensor([100, 900]), context


def disturbed(student: Student, seed: int = 1) -> Student:
    """Returns the student with all trained parameters changed, so that each matters."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in student.trainable().values():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return student


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_step_matches_the_official_numbers(
    shared_reference: Path, recorded: dict[str, Tensor], kind: str
) -> None:
    student, teacher = reference_student(shared_reference), reference_teacher(shared_reference, KINDS[kind])
    prompts = recorded["prompt_embeds"], recorded["neg_prompt_embeds"]
    timesteps = recorded["timesteps"]
    x0, image = student(recorded["x_src"], timesteps, prompts[0], recorded["eps"])
    reconstruction = blurred_mse(image, recorded["x_tgt"], timesteps).mean()
    t_v = teacher_timestep(timesteps)
    distillation = tavsd(x0, step_noise(recorded), t_v, teacher, teacher.teach, *prompts, GUIDANCE).loss.mean()
    (reconstruction + distillation).backward()
    assert relative_error(image, recorded["pred"]) <= TOLERANCE
    assert relative_error(x0, recorded["latents_pred"]) <= TOLERANCE
    assert relative_error(reconstruction, recorded[f"{kind}.loss_l2"]) <= TOLERANCE
    assert relative_error(distillation, recorded[f"{kind}.loss_kl"]) <= TOLERANCE
    gradients = {name: parameter.grad for name, parameter in student.trainable().items()}
    expected = {k.removeprefix(f"{kind}.grad."): t for k, t in recorded.items() if k.startswith(f"{kind}.grad.")}
    assert len(expected) == 11
    for name, gradient in expected.items():
        assert relative_error(gradients[our_name(name, student)], gradient) <= TOLERANCE, name
    assert len(gradients) == 602 and all(gradient is not None for gradient in gradients.values())
    norm = torch.stack([g.norm() for g in gradients.values() if g is not None]).norm()
    assert relative_error(norm, recorded[f"{kind}.grad_norm"]) <= TOLERANCE


def step_noise(recorded: dict[str, Tensor]) -> Tensor:
    """Returns the TAVSD noise that the recorded step used.

    Its latents lay in memory channels last, and `randn_like` fills such a tensor in another order than the `randn` that
    was recorded; both follow the seed 12. Only this draw gives the recorded losses and gradients.
    """
    latents = recorded["latents_pred"]
    with torch.random.fork_rng():
        torch.manual_seed(12)
        assert torch.equal(torch.randn(latents.shape), recorded["noise"]), "this PyTorch draws other numbers"
        torch.manual_seed(12)
        return torch.randn_like(latents.to(memory_format=torch.channels_last)).contiguous()


def our_name(official: str, student: Student) -> str:
    """Returns our name of a parameter of the recorded step, e.g. `vae.quant_conv.lora_B.default_encoder.weight`."""
    network, _, name = official.partition(".")
    module, dot, rest = name.partition(".lora_")
    if network == "vae":
        module = rename(module, vae_table_of(student.encoder.state_dict()))
    rest = f"{rest[0]}.default.weight" if dot else ""
    return f"{'encoder' if network == 'vae' else network}.{module}{dot}{rest}"


def test_a_new_student_is_the_base(small_base: Callable[[], Base], shared_reference: Path) -> None:
    """Zero B matrices and, where the base has none, time layers that do nothing."""
    base = load_base(shared_reference / "sd_original.safetensors")
    recorded = load_file(shared_reference / "infer_S64_96x160.safetensors")
    expected = load_file(shared_reference / "base_S64.safetensors")
    student = Student(base)
    with torch.no_grad():
        for timestep in (1, 999):
            z = student.encode(recorded["lq"], torch.tensor([timestep]))
            assert (z / 0.18215 - expected["96x160.vae_mean"]).abs().max() <= TOLERANCE
        z, steps = recorded["t500.mode.z"], torch.tensor([1])
        prediction = student.unet(z, steps, recorded["prompt_embeds"], return_dict=False)[0]
    assert (prediction - expected["96x160.t1.unet_base"]).abs().max() <= TOLERANCE
    base = small_base()
    trained = Student(base).encoder.state_dict()
    assert all(torch.equal(trained[key], tensor) for key, tensor in base.encoder_time.items())


def test_one_step_by_hand(small_base: Callable[[], Base]) -> None:
    """Figure 3 of the paper: encode for the timestep, one prediction, decode; a prediction that is a residual."""
    base = small_base()
    student = disturbed(Student(base))
    lq, steps, context = batch(base)
    with torch.no_grad():
        mean, logvar = student.encoder(lq, steps).chunk(2, dim=1)
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(4))
        x0, image = student(lq, steps, context, noise)
        z = 0.18215 * (mean + (logvar / 2).exp() * noise)
        residual = student.unet(z, steps, context, return_dict=False)[0]
        expected = z / alpha_bar(steps).sqrt()[:, None, None, None] - residual
        decoded = student.decoder(expected)
    torch.testing.assert_close(x0, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(image, decoded.clamp(-1, 1), rtol=1e-4, atol=1e-4)
    assert (student(lq, steps, context).x0 - x0).abs().max() > 1e-3, "the noise does not matter"


def test_pictures_are_clamped_before_the_losses(small_base: Callable[[], Base]) -> None:
    base = small_base()
    student = Student(base)
    with torch.no_grad():
        for name, parameter in student.decoder.named_parameters():
            if "conv_out" in name:
                parameter *= 50
        x0, image = student(*batch(base))
        expected = student.decoder(x0)
    assert expected.min() < -1 and expected.max() > 1, "there is nothing to clamp"
    assert image.aminmax() == (-1, 1)
    torch.testing.assert_close(image, expected.clamp(-1, 1))


def test_equal_seeds_give_equal_students(small_base: Callable[[], Base]) -> None:
    base = replace(small_base(), encoder_time={})
    torch.manual_seed(1)
    first = Student(base, seed=3).trainable()
    torch.manual_seed(2)
    second, other = Student(base, seed=3).trainable(), Student(base, seed=4).trainable()
    assert list(first) == list(second) and all(torch.equal(p, second[name]) for name, p in first.items())
    differing = {name for name, p in first.items() if not torch.equal(p, other[name])}
    assert any(".lora_A." in name for name in differing) and any("time_embedding" in name for name in differing)
    down = torch.cat([p.flatten() for name, p in first.items() if ".lora_A." in name])
    assert down.std().item() == pytest.approx(1 / 4, rel=0.02)  # Gaussian, deviation 1 / rank


def test_what_is_trained_can_be_chosen(small_base: Callable[[], Base]) -> None:
    base = small_base()
    names = set(Student(base).trainable())
    assert {n for n in names if ".lora_" not in n and not is_time_layer(n.removeprefix("encoder."))} == {
        "unet.conv_in.base_layer.weight",
        "unet.conv_in.base_layer.bias",
    }
    assert not any(name.startswith("decoder.") for name in names)
    assert set(Student(base, train_conv_in=False).trainable()) == {n for n in names if "conv_in.base_layer" not in n}
    assert set(Student(base, time_aware=False).trainable()) == {n for n in names if "time_emb" not in n}
    ranks = Student(base, rank=2, encoder_rank=3).trainable()
    for network, rank in (("unet.", 2), ("encoder.", 3)):
        assert {p.shape[0] for n, p in ranks.items() if n.startswith(network) and ".lora_A." in n} == {rank}


def test_without_time_layers_the_encoder_ignores_the_timestep(small_base: Callable[[], Base]) -> None:
    base = small_base()
    lq = batch(base)[0][:1]
    blind, aware = Student(base, time_aware=False), Student(base)
    with torch.no_grad():
        low, high = (torch.tensor([t]) for t in (1, 999))
        assert_nearly(blind.encode(lq, low), blind.encode(lq, high))
        assert not torch.allclose(aware.encode(lq, low), aware.encode(lq, high), atol=1e-3)
    weights = student_weights(disturbed(blind), METADATA)
    again = Student(base, time_aware=False)
    load_student_weights(again, weights)
    with torch.no_grad():
        assert_nearly(again.encode(lq, low), blind.encode(lq, high))


def test_checkpointing_changes_no_gradient_and_keeps_less(small_base: Callable[[], Base]) -> None:
    base = small_base()
    lq, timesteps, context = batch(base)
    results: list[tuple[dict[str, Tensor], int]] = []
    for checkpointing in (False, True):
        student = disturbed(Student(base))
        if checkpointing:
            student.enable_checkpointing()
        kept: list[int] = []

        def pack(tensor: Tensor, kept: list[int] = kept) -> Tensor:
            kept.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = student(lq, timesteps, context, torch.ones(2, 4, 8, 12))
        (output.image.square().mean() + output.x0.square().mean()).backward()
        gradients = {name: p.grad for name, p in student.trainable().items() if p.grad is not None}
        assert len(gradients) == len(student.trainable())
        results.append((gradients, sum(kept)))
    for name, gradient in results[0][0].items():
        assert_nearly(gradient, results[1][0][name], name)
    assert results[1][1] < 0.5 * results[0][1], "activations are still kept"


def test_frozen_weights_may_be_half_precision(small_base: Callable[[], Base]) -> None:
    base = small_base()
    lq, timesteps, context = batch(base)
    with torch.no_grad():
        expected = disturbed(Student(base))(lq, timesteps, context).image
    student = disturbed(Student(base))
    trained = student.trainable()
    cast_frozen(student, torch.bfloat16)
    frozen = [p for n, p in student.named_parameters() if n.endswith("conv1.base_layer.weight")]
    assert frozen and all(parameter.dtype == torch.bfloat16 for parameter in frozen)
    with torch.autocast("cpu", torch.bfloat16):
        image = student(lq, timesteps, context).image.float()
    image.square().mean().backward()
    assert relative_error(image.detach(), expected) < 0.1
    assert set(student.trainable()) == set(trained)
    for name, parameter in student.trainable().items():
        assert parameter.dtype == torch.float32, name
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("whole", [False, True])
def test_weights_out_and_in_give_an_equal_student(small_base: Callable[[], Base], tmp_path: Path, whole: bool) -> None:
    base = small_base()
    lq, timesteps, context = batch(base)
    student = disturbed(Student(base, rank=2))
    Teacher(base.unet)  # takes the base's UNet over, which must not show in the file
    weights = student_weights(student, METADATA, prompt=context[:1], base=base if whole else None)
    save(tmp_path / "out.safetensors", weights)
    loaded = load(tmp_path / "out.safetensors")
    meta = loaded.metadata
    assert (meta.rank, meta.encoder_rank, meta.alpha, meta.vae_norm_groups) == (2, 4, 8.0, base.norm_groups)
    assert (meta.name, meta.timesteps) == ("test", OFFICIAL_TIMESTEPS)
    fresh = load_base(tmp_path / "out.safetensors") if whole else small_base()
    assert fresh.sha256 == base.sha256
    again = Student(fresh, rank=2, seed=9)
    load_student_weights(again, loaded)
    with torch.no_grad():
        expected, result = student(lq, timesteps, context), again(lq, timesteps, context)
    assert_nearly(result.x0, expected.x0)
    assert_nearly(result.image, expected.image)
    assert all(torch.equal(p, again.trainable()[name]) for name, p in student.trainable().items())


def test_weights_are_a_copy(small_base: Callable[[], Base]) -> None:
    student = Student(small_base())
    weights = student_weights(student, METADATA)
    before = {key: tensor.clone() for key, tensor in (weights.unet_lora | weights.encoder_time).items()}
    disturbed(student)
    assert all(torch.equal(tensor, before[key]) for key, tensor in (weights.unet_lora | weights.encoder_time).items())


def _without(weights: TadsrWeights, section: str, part: str) -> TadsrWeights:
    kept = {key: tensor for key, tensor in getattr(weights, section).items() if part not in key}
    return replace(weights, **{section: kept})


def test_weights_that_do_not_fit_are_refused(small_base: Callable[[], Base]) -> None:
    base = small_base()
    student = Student(base)
    weights = student_weights(student, METADATA)
    for other, message in (
        (student_weights(Student(base, rank=8), METADATA), "rank 8 and alpha 8 on the UNet; .* rank 4 and alpha 8"),
        (student_weights(Student(base, alpha=4.0), METADATA), "rank 4 and alpha 4 on the UNet"),
        (student_weights(Student(base, encoder_rank=2), METADATA), "rank 2 and alpha 8 on the encoder"),
        (_without(weights, "unet_lora", "input_blocks.0.0"), "LoRA of the UNet: .* 1 missing"),
        (_without(weights, "unet_full", "bias"), "trained in full: .* 1 missing"),
        (replace(weights, unet_lora={}), "no LoRA to start from"),
    ):
        with pytest.raises(WeightsError, match=message):
            load_student_weights(student, other)


def full_size_base() -> Base:
    """Returns SD 2.1's networks without memory for them, but for `conv_in`, which is trained."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            attention_head_dim=(5, 10, 20, 20),  # type: ignore[arg-type]
            cross_attention_dim=1024,
            use_linear_projection=True,
        ).requires_grad_(False)
        decoder = LatentDecoder(Decoder(in_channels=4))
        encoder = TimeAwareEncoder(EncoderConfig()).state_dict()
    unet.conv_in.to_empty(device="cpu")  # its values are copied out
    encoder = {key: tensor for key, tensor in encoder.items() if not is_time_layer(key)}
    return Base(unet, encoder, decoder, 32, {}, None, "sd", "")


def test_modules_and_shapes_at_full_size_are_the_official_ones(shared_reference: Path) -> None:
    expected = json.loads((shared_reference / "official_checkpoint_keys_full_size.json").read_text())
    student = Student(full_size_base())
    content = official_state(student_weights(student, METADATA))
    assert content.keys() == expected.keys()
    for part, tensors in expected.items():
        if isinstance(tensors, dict):
            assert {key: list(tensor.shape) for key, tensor in content[part].items()} == tensors, part
        elif isinstance(tensors, list):
            assert set(content[part]) == set(tensors), part  # the official lists repeat names
        else:
            assert content[part] == tensors
    counts = {
        name: sum(p.numel() for n, p in student.trainable().items() if n.startswith(name))
        for name in ("unet.", "encoder.")
    }
    assert counts == {"unet.": 4_067_552, "encoder.": 369_356 + 2_072_576}  # as the official training prints them
