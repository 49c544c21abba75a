"""Settings of a training run: what they mean, how they are read, and which of them may change on resume.

A preset is a YAML file of keys of `TrainConfig`. It may start from another one (`extends: paper`), and `key=value`
overrides win over it. P in the docstrings below: the paper, arXiv 2508.16557; C: the behaviour of the released weights
and of the official training, where the paper does not say.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from tadsr.schedule import MAX_TIMESTEP, MIN_TIMESTEP, TEACHER_GAMMA, TEACHER_LAMBDA
from training.config.parsing import ConfigError, Span, hints_of, validate

PRESETS = Path(__file__).parents[1] / "presets"
EXTENDS = "extends"  # key of a preset that names the one it starts from
PROMPT = "a sharp, clean photograph, highly detailed"  # ours: the official training tags every picture
NEGATIVE_PROMPT = (  # C
    "painting, oil painting, illustration, drawing, art, sketch, cartoon, CG Style, 3D render, unreal engine, "
    "blurring, dirty, messy, worst quality, low quality, frames, watermark, signature, jpeg artifacts, deformed, "
    "lowres, over-smooth"
)
GUIDANCE = 7.5  # C: of the teacher at timestep 0
SMALLEST_DISCRIMINATED = 24  # pixels of a side: three of the coarsest features that the discriminator looks at
RENAMED = {"realism_weight": "adversarial_weight", "judge_learning_rate": "discriminator_learning_rate"}
"""Keys of runs that began before they were renamed."""

Share = Annotated[float, Span(0, 1)]
Weight = Annotated[float, Span(0, 1e6)]
Rate = Annotated[float, Span(0, 1)]
Decay = Annotated[float, Span(0, 0.999999)]
Count = Annotated[int, Span(1, 10**9)]
CountOrNone = Annotated[int, Span(0, 10**9)]
Rank = Annotated[int, Span(1, 1024)]
Timestep = Annotated[int, Span(MIN_TIMESTEP, MAX_TIMESTEP)]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All settings of one run. Values may be given as text, as in a preset; ConfigError names one that cannot be used.

    The defaults are the paper's (section 4.1), or C's where it does not say.
    """

    data: Path
    """Photographs to train on: a folder, a list of pairs, or a folder of WebDataset shards."""
    base: Path
    """The base model, Stable Diffusion 2.x: a single file, a diffusers folder, or a self-contained TADSR file."""
    output: Path
    """Folder of the run: checkpoints, weights, logs."""
    data_format: Literal["auto", "folder", "pairs", "shards"] = "auto"
    """What `data` is; auto: a text file lists pairs, a folder with .tar files holds shards, another one photographs."""
    crop: Annotated[int, Span(16, 4096, step=8)] = 512
    """Side of a training crop, in pixels of the high-quality picture (P 4.1)."""
    scale: Annotated[int, Span(1, 8)] = 4
    """How many times smaller the low-quality picture is (P 4.1)."""
    flip: Share = 0.5
    """Probability of a horizontal flip (C)."""
    plain_bicubic_share: Share = 0.01
    """Share of samples that are only made smaller, by bicubic interpolation (C)."""
    light_share: Share = 0.0
    """Share of the other samples with the nearly clean degradation `training.degradation.LIGHT` (ours)."""
    degrade_on: Literal["workers", "device"] = "workers"
    """Where pictures are degraded: by the workers on the CPU, or on the training device (never measured on a GPU)."""
    workers: Annotated[int, Span(0, 256)] = 4
    """Processes that prepare samples, for each training process; 0: none."""
    text_encoder: Path | None = None
    """Folder with `text_encoder` and `tokenizer`, as in a diffusers folder; null: those of `base`."""
    prompt: str = PROMPT
    """Prompt of a picture that brings none (ours)."""
    negative_prompt: str = NEGATIVE_PROMPT
    """Prompt of the unconditional branch of the teacher's guidance (C)."""
    prompts: Literal["auto", "fixed"] = "auto"
    """auto: from the list of pairs or a .txt beside the picture, else `prompt`; fixed: `prompt` for all pictures."""

    init_weights: Path | None = None
    """TADSR weights file to start from; null: new adapters, which leave the base as it is."""
    self_contained: bool = False
    """Whether the weights written hold the base model too."""
    rank: Rank = 4
    """Rank of the UNet's adapters, and of the fake-score model's (P 4.1)."""
    encoder_rank: Rank = 4
    """Rank of the encoder's adapters (P 4.1)."""
    alpha: Annotated[float, Span(1e-3, 1e4)] = 8.0
    """Adapters are scaled by alpha / rank (C)."""
    train_conv_in: bool = True
    """Whether the UNet's first convolution is trained in full (C)."""
    time_aware: bool = True
    """Whether the encoder sees the timestep; false: table 2, without TAE (P 3.3)."""
    fake_score_adapters: Literal["all", "middle"] = "all"
    """Trained adapters of the fake-score model: all (P), or the middle block's alone, as C does by mistake."""

    sample_latent: bool = True
    """Whether the student trains on samples of the encoder's distribution (C); false: on its mode."""
    timestep_grid: Annotated[int, Span(0, MAX_TIMESTEP)] = 50
    """How many evenly spaced student timesteps in 1..999 there are (C: 50); 0: all of them, as in P."""
    lam: Annotated[float, Span(0, 10)] = TEACHER_LAMBDA
    """Teacher timestep = lam * student timestep + gamma, clamped to 0..999 (P eq. 5)."""
    gamma: Annotated[float, Span(-MAX_TIMESTEP, MAX_TIMESTEP)] = TEACHER_GAMMA
    """See `lam`; in timesteps."""
    distillation: Literal["tavsd", "vsd", "none"] = "tavsd"
    """Score distillation: time-aware (P eq. 6); vsd: teacher timesteps at random (table 2, without TAVSD); or none."""
    guidance: Annotated[float, Span(0, 100)] = GUIDANCE
    """The teacher's classifier-free guidance at timestep 0; 1 more every 200 timesteps (C)."""
    reconstruction: Literal["blurred_mse", "mse"] = "blurred_mse"
    """Squared error of blurred pictures (P eq. 7), or of the pictures themselves (table 4)."""
    mse_weight: Weight = 1.0
    """Weight of the reconstruction loss (C)."""
    lpips_weight: Weight = 2.0
    """Weight of LPIPS with VGG (C)."""
    lpips_shift: Annotated[int, Span(0, 15)] = 0
    """LPIPS looks at crops smaller by so many pixels, at random places (ours; C: 0): `losses.shared_crop`."""
    distillation_weight: Weight = 1.0
    """Weight of the score distillation (C; P eq. 9 gives no value)."""
    adversarial_weight: Weight = 0.0
    """Weight, at timestep 999, of a discriminator on LPIPS's features; below in proportion to it (ours; P, C: 0)."""

    learning_rate: Rate = 5e-5
    """AdamW's step size for the student, constant (P 4.1)."""
    time_learning_rate: Rate | None = None
    """The same for the encoder's time layers alone; null: as `learning_rate` (C). Small models need less."""
    fake_learning_rate: Rate = 5e-5
    """The same for the fake-score model (C)."""
    discriminator_learning_rate: Rate = 4e-4
    """The same for the discriminator of `adversarial_weight` (ours)."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """AdamW's decay of the mean and of the mean square of gradients (C)."""
    weight_decay: Rate = 0.01
    """AdamW's weight decay (C)."""
    adam_eps: Annotated[float, Span(1e-16, 1)] = 1e-8
    """AdamW's epsilon (C)."""
    clip_norm: Annotated[float, Span(1e-6, 1e6)] = 1.0
    """Largest norm of all gradients of one model together (C)."""
    batch: Count = 24
    """Samples in a step, over all processes (P 4.1)."""
    micro_batch: Count = 1
    """Samples in one forward pass of one process: more is faster and takes more memory."""
    steps: Count = 2000
    """Steps of the whole run (P 4.1)."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Precision of the computation; the trained parameters are float32 in any case."""
    lpips_precision: Literal["auto", "bf16"] = "auto"
    """Precision of LPIPS; auto: as `mixed_precision`. On CPUs with AMX, bf16 makes it three times faster."""
    gradient_checkpointing: bool = True
    """Whether activations are computed again for the backward pass: slower, far less memory."""
    seed: Annotated[int, Span(0, 2**32 - 1)] = 0
    """All random choices follow from it and from the sample's number."""

    save_every: Count = 500
    """Steps between checkpoints."""
    keep: Count = 3
    """How many checkpoints stay."""
    max_bad_steps: Count = 10
    """The run stops after this many steps in a row whose loss is not finite."""
    log_every: Count = 10
    """Steps between entries of the log."""
    validate_every: CountOrNone = 500
    """Steps between validations, the first of them before the first step; 0: never."""
    validation: Path | None = None
    """Folder of pictures to validate on; null: the last `validation_count` pictures of `data`, then not trained on."""
    validation_count: CountOrNone = 8
    """How many pictures to validate on."""
    validation_timesteps: tuple[Timestep, ...] = tuple(range(100, 1000, 100))
    """Timesteps to validate at (P table 3, figure 6)."""

    def __post_init__(self) -> None:
        validate(self)
        self._check_together()

    def _check_together(self) -> None:
        if self.crop % self.scale:
            raise ConfigError(f"crop is {self.crop}; accepted: multiples of 8 and of scale ({self.scale})")
        if self.batch % self.micro_batch:
            raise ConfigError(f"micro_batch is {self.micro_batch}; accepted: divisors of batch ({self.batch})")
        if self.adversarial_weight and self.crop - self.lpips_shift < SMALLEST_DISCRIMINATED:
            least = -(-(SMALLEST_DISCRIMINATED + self.lpips_shift) // 8) * 8
            raise ConfigError(f"crop is {self.crop}; accepted with adversarial_weight: from {least}")
        if self.validate_every and not self.validation_count:
            raise ConfigError("validation_count is 0; accepted: from 1, or 0 with validate_every=0")

    @property
    def held_out(self) -> int:
        """How many pictures of `data` are never trained on, whether or not validation runs."""
        return _held_out(as_saved(self))


KEYS = tuple(hints_of(TrainConfig))

MAY_CHANGE = {  # on resume: key, and why the trained weights stay the same to the bit
    "output": "the run may have been moved",
    "workers": "a sample follows from its number, whoever prepares it",
    "steps": "the learning rate is constant, so the steps before the last do not know of it",
    "self_contained": "only adds to the file written",
    "save_every": "saving changes nothing",
    "keep": "nor does removing what was saved",
    "log_every": "nor does logging",
    "max_bad_steps": "a bad step is skipped in any case; this only says when to give up",
    "validate_every": "validation draws its own random numbers and trains nothing",
    "validation_timesteps": "as validate_every",
}
# Not among them: micro_batch, mixed_precision and gradient_checkpointing change the order of sums or their precision;
# paths may name other files; and of the following, a change that alters `held_out` alters the data.
VALIDATION_SET = ("validation", "validation_count")


def load_config(preset: Path, overrides: Sequence[str] = (), **paths: Path | None) -> TrainConfig:
    """Returns the config of a preset, with `paths` (those that are not None) and then `key=value` overrides.

    The value of an override is taken as it stands, spaces, colons and all; a sequence is `[100, 500]` or `100,500`.
    Raises ConfigError for a key that does not exist, naming the nearest, and for a value that cannot be used.
    """
    values = _read_preset(preset)
    values |= {key: path for key, path in paths.items() if path is not None}
    _check_keys(values, f"preset {preset}")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ConfigError(f"override is {override!r}; accepted: key=value, such as rank=8")
        _check_keys([key.strip()], f"override {override!r}")
        values[key.strip()] = value.strip()
    missing = [field.name for field in fields(TrainConfig) if field.default is MISSING and field.name not in values]
    if missing:
        cure = " ".join(f"--{name} PATH" for name in missing)
        raise ConfigError(f"{', '.join(missing)} not given: add {cure}, or set them in {preset}")
    return TrainConfig(**values)


def _read_preset(preset: Path) -> dict[str, Any]:
    values = _read_yaml(preset)
    name = values.pop(EXTENDS, None)
    if name is None:
        return values
    places = [folder / f"{name}.yaml" for folder in (preset.parent, PRESETS)]
    parent = next((place for place in places if place.is_file()), None)
    if parent is None:
        raise ConfigError(f"{preset} extends {name!r}; accepted: the name of a preset beside it, or {_preset_names()}")
    inherited = _read_yaml(parent)
    if EXTENDS in inherited:
        raise ConfigError(f"{preset} extends {name!r}, which extends another; accepted: one level")
    _check_keys(inherited, f"preset {parent}")
    return inherited | values


def _read_yaml(path: Path) -> dict[str, Any]:
    """Returns the file's mapping with all scalars as text: YAML would read `mixed_precision: no` as false."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)  # noqa: S506 - as safe as safe_load
    except OSError as error:
        raise ConfigError(f"preset {path} cannot be read ({error.strerror}); there are {_preset_names()}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"preset {path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"preset {path} holds {str(content)[:40]!r}; accepted: lines of `key: value`")
    return _with_new_names(content)


def _preset_names() -> str:
    return ", ".join(sorted(str(path) for path in PRESETS.glob("*.yaml")))


def _check_keys(keys: Iterable[str], where: str) -> None:
    for key in keys:
        if key not in KEYS:
            nearest = get_close_matches(str(key), KEYS, n=1, cutoff=0)[0]
            raise ConfigError(f"unknown key {key!r} in {where}; the nearest is {nearest!r} (--dry-run prints all keys)")


def as_saved(config: TrainConfig) -> dict[str, Any]:
    """Returns all fields in JSON's types: paths as text, tuples as lists."""
    return {key: _as_json(getattr(config, key)) for key in KEYS}


def from_saved(saved: Mapping[str, Any]) -> TrainConfig:
    """Returns the config that `as_saved` was given; raises ConfigError."""
    return TrainConfig(**_with_new_names(saved))


def _as_json(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def resolved(config: TrainConfig) -> str:
    """Returns YAML with every field, which `load_config` reads back to an equal config."""
    return yaml.safe_dump(as_saved(config), sort_keys=False, allow_unicode=True, default_flow_style=None, width=10**6)


def differences(saved: Mapping[str, Any], current: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """Returns {key: (saved, current)} of the settings whose change makes another run; see `MAY_CHANGE`.

    saved: what `as_saved` returned when the run began. A key that one of the two lacks counts as None there.
    """
    now, saved = as_saved(current), _with_new_names(saved)
    changed = [key for key in now | saved if saved.get(key) != now.get(key)]
    same_data = _held_out(saved) == _held_out(now)
    free = {*MAY_CHANGE, *(VALIDATION_SET if same_data else ())}
    return {key: (saved.get(key), now.get(key)) for key in changed if key not in free}


def _with_new_names(values: Mapping[str, Any]) -> dict[str, Any]:
    return {RENAMED.get(key, key): value for key, value in values.items()}


def _held_out(values: Mapping[str, Any]) -> int:
    return 0 if values.get("validation") else values.get("validation_count", 0)
