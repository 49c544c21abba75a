"""Settings of a training run: presets, overrides, errors, and what may change on resume."""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from training.config.train_config import (
    MAY_CHANGE,
    NEGATIVE_PROMPT,
    PRESETS,
    VALIDATION_SET,
    ConfigError,
    TrainConfig,
    as_saved,
    differences,
    load_config,
    resolved,
)

PATHS: dict[str, Any] = {"data": Path("photographs"), "base": Path("base.safetensors"), "output": Path("run")}
NAMES = sorted(path.stem for path in PRESETS.glob("*.yaml"))
PAPER = {  # section 4.1, and what the released weights show
    **{"crop": 512, "scale": 4, "plain_bicubic_share": 0.01, "light_share": 0.0, "degrade_on": "workers"},
    **{"rank": 4, "encoder_rank": 4, "alpha": 8.0, "train_conv_in": True, "time_aware": True},
    **{"fake_score_adapters": "all", "sample_latent": True, "timestep_grid": 50, "lam": 0.5, "gamma": 0.0},
    **{"distillation": "tavsd", "reconstruction": "blurred_mse"},
    **{"mse_weight": 1.0, "lpips_weight": 2.0, "distillation_weight": 1.0},
    **{"learning_rate": 5e-5, "fake_learning_rate": 5e-5, "betas": (0.9, 0.999), "weight_decay": 0.01},
    **{"adam_eps": 1e-8, "clip_norm": 1.0, "batch": 24, "steps": 2000},
}


def config(*overrides: str, preset: str = "paper") -> TrainConfig:
    return load_config(PRESETS / f"{preset}.yaml", overrides, **PATHS)


def ablations() -> list[str]:
    """The overrides in the last column of the table of presets/README.md."""
    rows = (PRESETS / "README.md").read_text(encoding="utf-8").partition("## Ablations")[2].splitlines()
    return [re.findall(r"`([^`]+)`", row)[-1] for row in rows if row.startswith("| ") and "`" in row]


def test_the_paper_s_preset_is_section_4_1() -> None:
    paper = config()
    assert {key: getattr(paper, key) for key in PAPER} == PAPER
    assert paper == TrainConfig(**PATHS), "the defaults are no longer the paper's"
    assert paper.negative_prompt == NEGATIVE_PROMPT and len(NEGATIVE_PROMPT.split(", ")) == 22
    assert paper.mixed_precision == "no"  # YAML 1.1 reads a bare no as false


def test_the_other_presets_are_what_their_names_say() -> None:
    assert {"paper", "mini", "smoke"} <= set(NAMES)
    mini, smoke = config(preset="mini"), config(preset="smoke")
    assert (mini.crop, mini.rank, mini.prompt, mini.light_share) == (64, 16, "photograph", 0.5)
    assert mini.self_contained and not mini.gradient_checkpointing and mini.prompts == "fixed"
    assert (smoke.crop, smoke.workers, smoke.self_contained) == (64, 0, True)
    same = ("lam", "gamma", "distillation", "reconstruction", "lpips_weight", "betas")
    assert all(getattr(preset, key) == getattr(config(), key) for preset in (mini, smoke) for key in same)


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_survives_being_written_and_read(name: str, tmp_path: Path) -> None:
    preset = config("prompt=a: 'b' # c", "validation=some folder", "mixed_precision=no", preset=name)
    path = tmp_path / "config.yaml"
    path.write_text(resolved(preset), encoding="utf-8")
    assert load_config(path) == preset
    assert [line.partition(":")[0] for line in resolved(preset).splitlines()] == [f.name for f in fields(TrainConfig)]
    assert TrainConfig(**json.loads(json.dumps(as_saved(preset)))) == preset


@pytest.mark.parametrize("line", ablations())
def test_every_documented_ablation_is_another_run_than_the_paper_s(line: str) -> None:
    changed = differences(as_saved(config()), config(*line.split()))
    assert set(changed) == {override.partition("=")[0] for override in line.split()}


def test_the_ablations_of_the_paper_s_tables_are_documented() -> None:
    assert len(ablations()) >= 8
    assert {"time_aware=false", "distillation=vsd", "distillation=none", "reconstruction=mse"} <= set(ablations())
    table_5 = {(run.lam, run.gamma) for run in (config(), *(config(*line.split()) for line in ablations()))}
    assert {(0.25, 0), (0.5, 0), (0.75, 0), (0.5, 50), (0.5, 100)} == table_5


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("learning_rate=5e-5", 5e-5),  # YAML 1.1 reads it as text
        ("learning_rate=1", 1.0),
        ("distillation=none", "none"),
        ("mixed_precision=no", "no"),
        ("validation=null", None),
        ("validation=~", None),
        ("validation=", None),
        ("validation=a b/null", Path("a b/null")),
        ("init_weights=C:\\x: y #1.safetensors", Path("C:\\x: y #1.safetensors")),
        ("prompt=one: two, three = 3 # four", "one: two, three = 3 # four"),
        ("prompt=", ""),
        ("time_aware=False", False),
        ("rank = 8", 8),
        ("betas=[0.5, 0.9]", (0.5, 0.9)),
        ("validation_timesteps=500", (500,)),
        ("validation_timesteps=1,999", (1, 999)),
    ],
)
def test_an_override_takes_the_type_of_its_field(override: str, value: Any) -> None:
    seen = getattr(config(override), override.partition("=")[0].strip())
    assert seen == value and type(seen) is type(value)


@pytest.mark.parametrize(
    "override",
    [
        *("rank=0", "rank=4.0", "rank=true", "rank=four", "rank=", "rank=null", "crop=100", "crop=-512", "steps=2e3"),
        *("learning_rate=nan", "learning_rate=inf", "learning_rate=-1", "lam=half", "flip=1.1", "seed=-1"),
        *("time_aware=1", "time_aware=maybe", "distillation=VSD", "mixed_precision=fp8", "data=", "data_format=zip"),
        *("betas=0.9", "betas=[0.9, 0.99, 0.999]", "betas=[0.9, 1.0]", "validation_timesteps=[]"),
        *("validation_timesteps=0,100", "validation_timesteps=[500, 1000]", "validation_timesteps=a"),
    ],
)
def test_a_value_that_cannot_be_used_is_named_with_what_is_accepted(override: str) -> None:
    key, _, value = override.partition("=")
    with pytest.raises(ConfigError) as error:
        config(override)
    message = str(error.value)
    assert message.startswith(f"{key} is {value!r}; accepted: ") and not message.endswith("accepted: ")


def test_an_error_says_what_is_accepted() -> None:
    wanted = {
        "rank=0": "integers 1..1024",
        "crop=100": "integers 16..4096, multiples of 8",
        "flip=2": "numbers 0..1",
        "distillation=x": "tavsd | vsd | none",
        "time_aware=x": "true | false",
        "data=": "a path",
        "validation_timesteps=0": "one or more integers 1..999, such as [a, b]",
        "betas=1": "2 numbers 0..0.999999, such as [a, b]",
    }
    for override, words in wanted.items():
        with pytest.raises(ConfigError, match=re.escape(f"accepted: {words}") + "$"):
            config(override)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["scale=3"], "crop is 512; accepted: multiples of 8 and of scale (3)"),
        (["micro_batch=5"], "micro_batch is 5; accepted: divisors of batch (24)"),
        (["validation_count=0"], "validation_count is 0; accepted: from 1, or 0 with validate_every=0"),
        (["rank"], "override is 'rank'; accepted: key=value, such as rank=8"),
    ],
)
def test_values_that_do_not_fit_each_other_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        config(*overrides)


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("lerning_rate", "learning_rate"),
        ("lambda", "lam"),
        ("timeaware", "time_aware"),
        ("Rank", "rank"),
        ("batch_size", "batch"),
        ("zzz", ""),
    ],
)
def test_an_unknown_key_is_an_error_that_names_the_nearest(wrong: str, nearest: str, tmp_path: Path) -> None:
    preset = tmp_path / "mine.yaml"
    preset.write_text(f"extends: paper\n{wrong}: 1\n")
    for attempt in (lambda: config(f"{wrong}=1"), lambda: load_config(preset, **PATHS)):
        with pytest.raises(ConfigError, match=f"unknown key '{wrong}' in .*; the nearest is '{nearest}"):
            attempt()


def test_overrides_win_over_paths_and_paths_over_the_preset(tmp_path: Path) -> None:
    preset = tmp_path / "mine.yaml"
    preset.write_text("extends: smoke2\nrank: 2\nbase: from preset\noutput: from preset\n")
    (tmp_path / "smoke2.yaml").write_text("rank: 16\nbatch: 6\ndata: from parent\n")
    loaded = load_config(preset, ["rank=3", "rank=5", "output=from override"], base=Path("from path"), data=None)
    assert (loaded.rank, loaded.batch) == (5, 6)
    assert (loaded.data, loaded.base, loaded.output) == (Path("from parent"), Path("from path"), Path("from override"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("extends: papre\n", r"extends 'papre'; accepted: .*paper\.yaml"),
        ("extends: mini\n", "which extends another; accepted: one level"),
        ("rank: [4\n", "is not YAML"),
        ("- rank\n", "accepted: lines of `key: value`"),
        ("", "accepted: lines of `key: value`"),
        ("rank: {a: 1}\n", "rank is {'a': '1'}; accepted: integers"),
        ("prompt: [a, b]\n", r"prompt is \['a', 'b'\]; accepted: text"),
        ("mixed_precision: off\n", "mixed_precision is 'off'; accepted: no | fp16 | bf16"),
    ],
)
def test_a_preset_that_cannot_be_used_says_why(content: str, message: str, tmp_path: Path) -> None:
    preset = tmp_path / "mine.yaml"
    preset.write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_config(preset, **PATHS)


def test_a_missing_preset_or_path_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml cannot be read .*smoke\.yaml"):
        load_config(tmp_path / "none.yaml", **PATHS)
    with pytest.raises(ConfigError, match="data, output not given: add --data PATH --output PATH"):
        load_config(PRESETS / "smoke.yaml", base=Path("base"))


def test_only_what_changes_the_result_is_a_difference_on_resume() -> None:
    before = config()
    assert differences(as_saved(before), before) == {}
    free = ["workers=0", "steps=4000", "save_every=7", "keep=1", "log_every=1", "validate_every=0", "max_bad_steps=3"]
    assert differences(as_saved(before), config(*free, "output=moved", "self_contained=true")) == {}
    changed = differences(
        json.loads(json.dumps(as_saved(before))), config("rank=8", "betas=0.8,0.9", "data=d", "keep=9")
    )
    assert changed == {"rank": (4, 8), "betas": ([0.9, 0.999], [0.8, 0.9]), "data": ("photographs", "d")}
    assert set(differences(as_saved(before), config("micro_batch=2", "mixed_precision=bf16"))) == {
        "micro_batch",
        "mixed_precision",
    }
    assert {*MAY_CHANGE, *VALIDATION_SET} < {field.name for field in fields(TrainConfig)}


def test_validation_pictures_are_a_difference_only_if_they_change_the_training_data() -> None:
    held, own = config(), config("validation=folder")
    assert (held.held_out, own.held_out, config("validate_every=0").held_out) == (8, 0, 8)
    assert differences(as_saved(held), config("validation_count=4")) == {"validation_count": (8, 4)}
    assert differences(as_saved(held), own) == {"validation": (None, "folder")}
    assert differences(as_saved(own), config("validation=other", "validation_count=4")) == {}


def test_keys_of_another_version_are_differences() -> None:
    saved = as_saved(config())
    del saved["lam"]
    assert differences({**saved, "dropout": 0.1}, config()) == {"lam": (None, 0.5), "dropout": (0.1, None)}


def test_a_config_made_in_code_is_checked_too() -> None:
    assert replace(config(), batch=2).batch == 2
    with pytest.raises(ConfigError, match="rank is 0; accepted"):
        replace(config(), rank=0)
    values: dict[str, Any] = {**PATHS, "steps": 2.5}
    with pytest.raises(ConfigError, match="steps is 2.5; accepted"):
        TrainConfig(**values)
