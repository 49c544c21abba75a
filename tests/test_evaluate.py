from __future__ import annotations

import csv
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_tagger import write_tagger
from small_text_encoder import write_text_encoder

from tadsr.schedule import DEFAULT_TIMESTEP
from training.evaluate import Method, folder_method, lanczos, main, measure, read_sample, share
from training.evaluation.report import Evaluation, Row, csv_text, json_text, markdown, write_report
from training.evaluation.test_set import (
    EvaluationError,
    TestPicture,
    find_pictures,
    other_method,
    read_picture,
)
from training.metrics.lpips import LPIPS
from training.metrics.reference import Reference
from training.metrics.registry import METRICS, Metrics
from training.mini.networks import CONTEXT_WIDTH
from training.networks.inference import Restorer

SIDE = 16  # of the low-quality crops
NAMES = ("a", "b", "c")
WITHOUT_PYIQA = importlib.util.find_spec("pyiqa") is None


@pytest.fixture
def data(tmp_path: Path, photo: Path, photo_truth: Path) -> Path:
    """A test set of three crops in StableSR's folders."""
    lq, hq = Image.open(photo), Image.open(photo_truth).convert("RGB")
    for folder in ("test_LR", "test_HR"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    for index, name in enumerate(NAMES):
        left, top = 30 + 60 * index, 50
        lq.crop((left, top, left + SIDE, top + SIDE)).save(tmp_path / "data" / "test_LR" / f"{name}.png")
        box = (4 * left, 4 * top, 4 * (left + SIDE), 4 * (top + SIDE))
        hq.crop(box).save(tmp_path / "data" / "test_HR" / f"{name}.png")
    return tmp_path / "data"


@pytest.fixture
def weights(repository: Path) -> Path:
    return repository / "weights" / "tadsr-mini.safetensors"


def save(path: Path, width: int = 8, height: int = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), "grey").save(path)
    return path


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_command_measures_all_methods_side_by_side(
    data: Path, weights: Path, tmp_path: Path, lpips_network: Callable[[str], LPIPS], capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(data / "test_HR", other)  # a perfect method
    status = main(
        ["--weights", str(weights), "--data", str(data), "--timesteps", "100,900", "--output", str(tmp_path / "out")]
        + ["--methods", f"perfect={other}", "--metrics", "psnr,ssim,lpips,qalign", "--limit", "2", "--save"]
    )
    assert status == 0
    rows = rows_of(tmp_path / "out" / "results.csv")
    methods = ["Lanczos", "tadsr-mini t=100", "tadsr-mini t=900", "perfect"]
    assert [(row["picture"], row["method"]) for row in rows] == [(name, m) for name in NAMES[:2] for m in methods]
    for row in rows[::4]:
        name = f"{row['picture']}.png"
        lq = Image.open(data / "test_LR" / name)
        enlarged = np.asarray(lq.resize((4 * SIDE, 4 * SIDE), Image.Resampling.LANCZOS))
        result = torch.from_numpy(enlarged.copy()).permute(2, 0, 1)[None].float() / 255
        expected = Reference(read_picture(data / "test_HR" / name), [lpips_network("alex")])
        scores = expected.score(result)
        found = [float(row[metric]) for metric in ("psnr", "ssim", "lpips")]
        assert found == pytest.approx([scores.psnr_y, scores.ssim, scores.lpips["alex"]], abs=1e-6)
    assert all(row["psnr"] == "inf" and float(row["ssim"]) == pytest.approx(1) for row in rows[3::4])
    assert rows[1]["psnr"] != rows[2]["psnr"], "the timestep makes no difference"
    shown = capsys.readouterr().out
    assert "| Lanczos | " in shown and "| perfect | inf | 1.0000 | 0.0000 |" in shown
    if WITHOUT_PYIQA:
        assert "- Q-Align: pyiqa is not installed" in shown
    assert Image.open(tmp_path / "out" / "curve.png").size == (960, 720)
    saved = read_picture(tmp_path / "out" / "pictures" / "tadsr-mini t=900" / "a.png")
    again = Reference(read_picture(data / "test_HR" / "a.png")).score(saved)
    assert again.psnr_y == pytest.approx(float(rows[2]["psnr"]), abs=1e-6)


def test_two_processes_find_what_one_finds(data: Path, weights: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "training.evaluate", "--weights", str(weights), "--data", str(data)]
    text_encoder = write_text_encoder(tmp_path / "encoder", CONTEXT_WIDTH)
    command += ["--dape", str(write_tagger(tmp_path / "dape.safetensors")), "--text-encoder", str(text_encoder)]
    command += ["--timesteps", "500", "--metrics", "psnr,ssim", "--output"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    started = [
        subprocess.Popen(
            [*command, str(tmp_path / "two")],
            env={**os.environ, **common, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"},
            cwd=weights.parent.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ("0", "1")
    ]
    outputs = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(outputs)
    assert "prompts: tags of dape.safetensors" in outputs[0]
    assert "| Lanczos |" in outputs[0] and "| Lanczos |" not in outputs[1]
    assert "2/2" in outputs[0], f"the first process did not take two of the three pictures:\n{outputs[0]}"
    assert main([*command[3:], str(tmp_path / "one")]) == 0
    one, two = (rows_of(tmp_path / name / "results.csv") for name in ("one", "two"))
    assert len(one) == 2 * len(NAMES)
    for a, b in zip(one, two, strict=True):
        assert (a["picture"], a["method"], a["timestep"]) == (b["picture"], b["method"], b["timestep"])
        assert [float(a[k]) for k in ("psnr", "ssim")] == pytest.approx(
            [float(b[k]) for k in ("psnr", "ssim")], abs=1e-3
        )


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_shares_are_alike_and_complete(processes: int) -> None:
    shares = [list(share(7, process, processes)) for process in range(processes)]
    assert sorted(sum(shares, [])) == list(range(7))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_our_method_is_the_restorer_in_eight_bits(data: Path, weights: Path, tmp_path: Path) -> None:
    arguments = ["--weights", str(weights), "--data", str(data), "--timesteps", str(DEFAULT_TIMESTEP), "--limit", "1"]
    assert main([*arguments, "--metrics", "psnr", "--border", "4", "--output", str(tmp_path / "out")]) == 0
    result = Restorer.load(weights)(read_picture(data / "test_LR" / "a.png"), DEFAULT_TIMESTEP)
    rounded = (result * 255).round() / 255
    expected = Reference(read_picture(data / "test_HR" / "a.png"), border=4).score(rounded).psnr_y
    assert float(rows_of(tmp_path / "out" / "results.csv")[1]["psnr"]) == pytest.approx(expected, abs=1e-6)


def test_low_quality_pictures_alone_have_no_reference_metrics(
    data: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--weights", str(weights), "--data", str(data / "test_LR"), "--timesteps", "500", "--limit", "1"]
    assert main([*arguments, "--metrics", "psnr,niqe", "--output", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "- PSNR-Y: the test set has no high-quality pictures" in shown
    assert not (tmp_path / "out" / "curve.png").exists()
    assert rows_of(tmp_path / "out" / "results.csv")[0]["picture"] == "a"


def test_a_missing_pair_is_named(data: Path, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data / "test_HR" / "b.png").unlink()
    assert main(["--weights", str(weights), "--data", str(data)]) == 1
    assert "test_HR: nothing for b.png" in capsys.readouterr().err
    shutil.copy(data / "test_HR" / "a.png", data / "test_HR" / "b.png")
    (data / "test_LR" / "a.png").unlink()
    with pytest.raises(EvaluationError, match=r"test_LR: nothing for a\.png"):
        find_pictures(data)


def test_other_methods_need_every_picture_in_its_size(data: Path, tmp_path: Path) -> None:
    pictures = find_pictures(data)
    for name in NAMES:
        save(tmp_path / "other" / f"{name}_x4.png", 4 * SIDE, 4 * SIDE - (name == "b"))
    method = folder_method("other", tmp_path / "other", pictures)
    assert method.restore(read_sample(pictures[0])).shape == (1, 3, 4 * SIDE, 4 * SIDE)
    with pytest.raises(EvaluationError, match=r"b_x4\.png is 64x63 pixels; accepted for b: 64x64"):
        method.restore(read_sample(pictures[1]))
    (tmp_path / "other" / "c_x4.png").unlink()
    with pytest.raises(EvaluationError, match=r"nothing for c\.png"):
        other_method(tmp_path / "other", pictures)
    with pytest.raises(EvaluationError, match="no such folder"):
        other_method(tmp_path / "nowhere", pictures)


def test_crops_of_both_pictures_show_the_same_place(tmp_path: Path) -> None:
    lq = np.random.default_rng(0).integers(0, 256, (13, 18, 3), dtype=np.uint8)
    Image.fromarray(lq).save(tmp_path / "l.png")
    Image.fromarray(lq.repeat(4, axis=0).repeat(4, axis=1)).save(tmp_path / "h.png")
    pair = TestPicture("p", tmp_path / "l.png", tmp_path / "h.png")
    sample = read_sample(pair, crop=8)
    assert sample.hq is not None and sample.lq.shape == (1, 3, 8, 8)
    assert torch.equal(sample.hq[..., ::4, ::4], sample.lq)
    assert lanczos(sample).shape == sample.hq.shape
    enlarged = read_sample(replace(pair, lq=pair.hq or pair.lq), crop=8)  # already of the truth's size
    assert enlarged.hq is not None and enlarged.scale == 1
    assert torch.equal(enlarged.lq, enlarged.hq) and torch.equal(lanczos(enlarged), enlarged.lq)
    assert enlarged.lq.shape == (1, 3, 32, 32)
    with pytest.raises(EvaluationError, match=r"18x13 pixels; accepted with --crop: sides from 16"):
        read_sample(pair, crop=16)


def test_unknown_metrics_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown metrics: beauty; accepted: psnr, ssim"):
        Metrics(["psnr", "beauty"])


@pytest.mark.skipif(not WITHOUT_PYIQA, reason="pyiqa is installed here")
def test_metrics_of_an_absent_package_are_named() -> None:
    metrics = Metrics(["psnr", "musiq", "niqe"])
    assert metrics.names == ["psnr"] and set(metrics.missing) == {"musiq", "niqe"}
    assert all("pip install pyiqa" in reason for reason in metrics.missing.values())


@pytest.mark.skipif(WITHOUT_PYIQA, reason="needs pyiqa")
def test_the_ssim_of_pyiqa_differs_from_ours_as_documented(photo_truth: Path) -> None:
    truth = read_picture(photo_truth)[..., :256, :256]
    result = (torch.nn.functional.interpolate(truth[..., ::4, ::4], scale_factor=4) * 255).round() / 255
    scores = Metrics(["ssim", "ssim_pyiqa"]).scorer(truth)(result)
    assert 0 < abs(scores["ssim_pyiqa"] - scores["ssim"]) < 0.005
    with_border = Metrics(["ssim_pyiqa"], border=4).scorer(truth)(result)
    assert with_border["ssim_pyiqa"] != scores["ssim_pyiqa"]


def evaluation(*rows: Row, missing: dict[str, str] | None = None) -> Evaluation:
    return Evaluation(data="set", weights="w.safetensors", border=0, prompts="none", rows=rows, missing=missing or {})


def test_reports_hold_means_and_reasons(tmp_path: Path) -> None:
    found = evaluation(
        Row("a", "Lanczos", None, {"psnr": 20.0, "lpips": 0.5, "niqe": 1.0}),
        Row("a", "w t=1", 1, {"psnr": float("inf"), "lpips": 0.1}),
        Row("b", "Lanczos", None, {"psnr": 30.0, "lpips": 0.25}),
        Row("b", "w t=1", 1, {"psnr": 22.0, "lpips": 0.3}),
        missing={"niqe": "failed on a picture"},
    )
    assert found.metrics == ["psnr", "lpips"], "a metric that failed half-way is not left out"
    text = markdown(found)
    assert "| Lanczos | 25.00 | 0.3750 |" in text and "- NIQE: failed on a picture" in text
    assert csv_text(found).splitlines()[:2] == ["picture,method,timestep,psnr,lpips", "a,Lanczos,,20.0,0.5"]
    content = json.loads(json_text(found), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert content["means"]["w t=1"] == {"psnr": "inf", "lpips": pytest.approx(0.2)}
    assert [path.name for path in write_report(tmp_path, found)] == [
        *("results.md", "results.csv", "results.json", "curve.png")
    ]


def test_a_part_of_the_pictures_and_of_the_metrics(data: Path) -> None:
    pictures = find_pictures(data)
    rows = measure(pictures, [2, 0], [Method("Lanczos", lanczos)], Metrics(["psnr"]), crop=6)
    assert [index for index, _ in rows] == [2, 0] and all(set(row.scores) == {"psnr"} for _, row in rows)
    with pytest.raises(ValueError, match="SSIM got"):
        measure(pictures, [0], [Method("Lanczos", lanczos)], Metrics(["ssim"]), crop=2)


def test_every_metric_of_the_issue_is_offered() -> None:
    assert set(METRICS) >= {
        *("psnr", "ssim", "lpips", "dists", "niqe", "clipiqa", "musiq", "maniqa", "topiq_nr", "qalign")
    }
