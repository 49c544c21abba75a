from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.methods import our_enlarge, pillow_enlarge, timed
from benchmarks.quality import (
    BORDER,
    METHODS,
    colour_error,
    held_out_samples,
    line_up,
    main,
    measure,
    named_weights,
    one_of,
)
from benchmarks.quality_report import COLOUR, COLUMNS, SECONDS, Results, colour_table, correlation, dial_table, table
from benchmarks.testset import Sample
from tadsr.schedule import DEFAULT_TIMESTEP
from training.metrics.lpips import LPIPS
from training.metrics.registry import Metrics
from training.networks.inference import Restorer


@pytest.fixture(scope="module")
def weights() -> Path:
    return Path(__file__).resolve().parent.parent / "weights" / "tadsr-mini.safetensors"


def levels_apart(a: np.ndarray, b: np.ndarray) -> int:
    """Returns the largest difference of 8-bit pictures: what lies between two levels may be rounded to either."""
    return int(np.abs(a.astype(int) - b).max())


def sample(seed: int = 0) -> Sample:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    hq = np.asarray(Image.fromarray(coarse).resize((72, 64), Image.Resampling.BICUBIC))
    return Sample(name=f"picture{seed}", hq=hq, lq=np.asarray(Image.fromarray(hq).resize((18, 16))))


def crops_in(folder: Path, count: int, held_out: int, side: int = 16) -> Path:
    """Writes grey crops, 0 for training and 1, 2, ... for the held-out ones, as scripts/fetch_photos.py does."""
    crops = np.zeros((count, side, side, 3), dtype=np.uint8)
    crops[count - held_out :] = 1 + np.arange(held_out, dtype=np.uint8)[:, None, None, None]
    np.save(folder / "crops.npy", crops)
    (folder / "crops.json").write_text(json.dumps({"validation": held_out, "pictures": []}))
    return folder / "crops.npy"


def test_better_results_score_better_and_are_shown(tmp_path: Path, lpips_network: Callable[[str], LPIPS]) -> None:
    lpips_network("alex")  # the benchmark loads its own
    samples = [sample(0), sample(1)]
    truths = {s.lq.tobytes(): s.hq for s in samples}
    methods = {
        "truth": timed(lambda lq: truths[lq.tobytes()]),
        "bicubic": timed(pillow_enlarge(Image.Resampling.BICUBIC)),
        "nearest": timed(pillow_enlarge(Image.Resampling.NEAREST)),
    }
    results = measure(methods, samples, Metrics(["psnr", "ssim", "lpips"], border=BORDER, table=COLUMNS), tmp_path)
    for name, sign in (("ssim", 1), ("lpips", -1)):
        truth, bicubic, nearest = (sign * results[method]["picture0"][name] for method in methods)
        assert truth > bicubic > nearest
    assert results["truth"]["picture1"]["psnr"] == float("inf")
    assert results["truth"]["picture1"]["lpips"] == pytest.approx(0, abs=1e-6)
    assert results["photograph"] == {"picture0": {}, "picture1": {}}  # nothing asked for judges it alone
    lines = table(results).splitlines()
    assert lines[0] == "| method | PSNR-Y | SSIM-Y | LPIPS | CPU seconds |"
    assert lines[2].startswith("| truth | inf | 1.0000 | ") and lines[-1] == "| photograph | - | - | - | - |"
    assert {path.name for path in tmp_path.iterdir()} == {"picture0.png", "picture1.png"}


def test_our_method_is_the_restorer_in_eight_bits(weights: Path) -> None:
    lq = sample().lq[:, :15]  # padded to a multiple of the VAE's downscale, and cut again
    restorer = Restorer.load(weights)
    first, again, other = (our_enlarge(restorer, t)(lq) for t in (DEFAULT_TIMESTEP, DEFAULT_TIMESTEP, 900))
    assert first.shape == (64, 60, 3) and first.dtype == np.uint8
    assert levels_apart(first, again) <= 1 < levels_apart(first, other)


def test_models_of_several_files_stand_beside_each_other(weights: Path) -> None:
    lineup = line_up(["bicubic", "tadsr"], {"a": weights, "b": weights}, [100, 900], threads=1, fresh=False)
    assert list(lineup.methods) == ["bicubic", "a t=100", "a t=900", "b t=100", "b t=900"] and not lineup.missing
    assert lineup.dials == {"a": {100: "a t=100", 900: "a t=900"}, "b": {100: "b t=100", 900: "b t=900"}}
    lq = sample().lq
    assert levels_apart(lineup.methods["a t=100"](lq).pixels, lineup.methods["b t=100"](lq).pixels) <= 1


def test_the_command_measures_held_out_crops(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    crops = crops_in(tmp_path, 3, 2, side=64)
    options = ["--weights", f"mine={weights}", "--held-out", str(crops), "--methods", "lanczos,tadsr"]
    options += ["--metrics", "psnr,ssim", "--timesteps", "1,500,999", "--kinds", "bicubic", "--limit", "2"]
    assert main([*options, "--sheets", str(tmp_path / "sheets"), "--json", str(tmp_path / "all.json")]) == 0
    shown = capsys.readouterr().out
    assert "bicubic, mean of 2:" in shown and "| mine t=999 | " in shown and "| mine | " in shown
    found = json.loads((tmp_path / "all.json").read_text())["bicubic"]
    assert list(found) == ["Lanczos", "mine t=1", "mine t=500", "mine t=999", "photograph"]
    assert set(found["mine t=1"]["held-out02"]) == {"psnr", "ssim", SECONDS, COLOUR}
    assert len(list((tmp_path / "sheets" / "bicubic").glob("*.png"))) == 2


def test_a_missing_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--methods", "lanczos", "--metrics", "psnr", "--held-out", str(tmp_path / "none.npy")]) == 1
    assert "none.json" in capsys.readouterr().err


def test_held_out_samples_are_those_that_training_never_sees(tmp_path: Path) -> None:
    samples = held_out_samples(crops_in(tmp_path, 30, 20), "bicubic", 4)
    assert [s.name for s in samples] == ["held-out01", "held-out02", "held-out03", "held-out04"]
    assert all(s.hq.min() > 0 for s in samples) and len({int(s.hq[0, 0, 0]) for s in samples}) == 4
    assert samples[0].lq.shape == (4, 4, 3)


def test_colour_error_is_that_of_the_worst_channel() -> None:
    lq = np.full((5, 6, 3), (10, 100, 200), np.uint8)
    pixels = np.full((20, 24, 3), (11, 97, 200), np.uint8)
    pixels[:10, :, 2] += 4  # 2 in the mean
    assert colour_error(pixels, lq) == pytest.approx(3, abs=1e-3)


def test_the_dial_is_ranked_and_the_colours_are_shown() -> None:
    values = {100: (30.0, 0.5), 500: (28.0, 0.4), 900: (29.0, 0.3)}
    scores = {t: {"psnr": p, "lpips": q, SECONDS: 1.0, COLOUR: t / 100} for t, (p, q) in values.items()}
    results: Results = {f"m t={t}": {"a": s, "b": s} for t, s in scores.items()}
    dial = {t: f"m t={t}" for t in values}
    assert dial_table(results, {"m": dial}).splitlines()[-1] == "| m | -0.50 (-0.50) | -1.00 (-1.00) |"
    assert dial_table(results, {"m": {100: "m t=100", 900: "m t=900"}}) == ""
    assert colour_table(results).splitlines()[-1] == "| m t=900 | 9.000 |"
    assert np.isnan(correlation(dial, [1.0, 1.0, 1.0]))


def test_names_on_the_command_line(tmp_path: Path) -> None:
    assert named_weights("new=runs/a.safetensors") == ("new", Path("runs/a.safetensors"))
    assert named_weights("runs/a.safetensors") == ("a", Path("runs/a.safetensors"))
    strange = tmp_path / "step=5.safetensors"
    strange.touch()
    assert named_weights(str(strange)) == ("step=5", strange)
    assert one_of(METHODS)("span,tadsr") == ["span", "tadsr"]
    with pytest.raises(argparse.ArgumentTypeError, match="swin; accepted: lanczos, bicubic, realesrgan"):
        one_of(METHODS)("span,swin")
