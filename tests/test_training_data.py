"""The training set: same sample for the same index anywhere, held-out pictures, bad data, batches of a step."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from training_pictures import CROP, open_set, same, save_picture

from tadsr.geometry import enlarge, resize_bicubic
from training.data import (
    BrokenPictureWarning,
    DataError,
    StepBatches,
    collate,
    open_validation_set,
    worker_init,
)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    for seed, name in enumerate(["a.png", "b.JPG", "deep/er/c.webp", "deep/d.jpeg", "e f.png", "g.PNG", "h.jpg"]):
        save_picture(folder / name, seed=seed)
    return folder


def test_samples_have_the_promised_shapes_and_ranges(photographs: Path, tmp_path: Path) -> None:
    data = open_set(photographs, tmp_path)
    assert data.names == ["a.png", "b.JPG", "deep/d.jpeg", "deep/er/c.webp", "e f.png"] and not data.skipped
    assert data.validation.names == ["g.PNG", "h.jpg"] and data.epoch_length == 5
    for index in range(10):
        sample = data[index]
        assert sample.index == index and sample.prompt == "clean"
        for image in (sample.lq, sample.hq):
            assert image.shape == (3, CROP, CROP) and image.dtype == torch.float32 and image.is_contiguous()
            assert -1 <= image.min() and image.max() <= 1
    assert (data[0].lq - data[0].hq).abs().mean() > 0.01


def test_an_epoch_takes_every_picture_once_in_a_new_order(photographs: Path, tmp_path: Path) -> None:
    data = open_set(photographs, tmp_path)
    epochs = [[data[5 * epoch + i].name for i in range(5)] for epoch in range(4)]
    assert all(sorted(names) == data.names for names in epochs)
    assert len({tuple(names) for names in epochs}) > 1
    other = open_set(photographs, tmp_path, seed=4)
    assert [[other[5 * epoch + i].name for i in range(5)] for epoch in range(4)] != epochs


def test_a_sample_is_the_same_in_any_order_and_worker(photographs: Path, tmp_path: Path) -> None:
    data, again = open_set(photographs, tmp_path), open_set(photographs, tmp_path)
    backwards = {index: again[index] for index in reversed(range(12))}
    assert all(same(data[index], backwards[index]) for index in range(12))
    batches = StepBatches(6, 3, 0, 1, 0, 2)
    loader = DataLoader(data, batch_sampler=batches, num_workers=2, collate_fn=collate, worker_init_fn=worker_init)
    loaded = list(loader)
    assert [list(batch.indices) for batch in loaded] == list(batches)
    for batch in loaded:
        assert torch.equal(batch.lq, torch.stack([backwards[index].lq for index in batch.indices]))
        assert batch.names == tuple(backwards[index].name for index in batch.indices)
        assert batch.prompts == ("clean",) * 3


class WorkerState(Dataset[tuple[int, bool]]):
    """Gives the OpenCV threads of the process it is read in, and whether Ctrl-C is ignored there."""

    def __getitem__(self, index: int) -> tuple[int, bool]:
        return cv2.getNumThreads(), signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_workers_have_one_thread_and_outlive_ctrl_c() -> None:
    loader = DataLoader(WorkerState(), batch_sampler=[[0]], num_workers=1, collate_fn=list, worker_init_fn=worker_init)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore Ctrl-C
    try:
        assert list(loader) == [[(1, True)]]
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler, "the main process has changed too"
    finally:
        signal.signal(signal.SIGINT, before)


def test_crops_are_parts_of_the_picture_flipped_half_of_the_time(tmp_path: Path) -> None:
    picture = save_picture(tmp_path / "data" / "a.png", seed=1)
    windows = np.lib.stride_tricks.sliding_window_view(picture, (CROP, CROP, 3))[:, :, 0].reshape(-1, CROP, CROP, 3)
    windows = np.ascontiguousarray(windows).reshape(len(windows), -1)
    data = open_set(tmp_path / "data", tmp_path, held_out=0)
    places, flips = [], 0
    for index in range(64):
        crop = torch.round((data[index].hq.permute(1, 2, 0) + 1) * 127.5).byte().numpy()
        found = [np.flatnonzero((windows == version.reshape(-1)).all(axis=1)) for version in (crop, crop[:, ::-1])]
        assert sum(map(len, found)) == 1, "the crop is not a part of the picture, or is one in two places"
        flips += len(found[1])
        places.append(int(np.concatenate(found)[0]))
    assert 18 < flips < 46
    rows, columns = np.divmod(places, 56 - CROP + 1)
    assert (rows.min(), rows.max()) == (0, 16) and columns.min() < 3 and columns.max() > 21


def test_plain_bicubic_is_the_picture_shrunk_and_enlarged(photographs: Path, tmp_path: Path) -> None:
    sample = open_set(photographs, tmp_path, plain_bicubic_share=1.0)[1]
    small = resize_bicubic(sample.hq[None] / 2 + 0.5, (CROP // 4, CROP // 4)).clamp(0, 1)
    expected = enlarge((small * 255).round() / 255, (CROP, CROP))[0] * 2 - 1
    assert torch.allclose(sample.lq, expected, atol=1 / 255), "at most one level, where rounding is at a half"


def test_light_degradation_keeps_more_than_the_full_one(photographs: Path, tmp_path: Path) -> None:
    def distance(share: float) -> float:
        data = open_set(photographs, tmp_path, light_share=share, plain_bicubic_share=0.0)
        return float(np.mean([(data[index].lq - data[index].hq).abs().mean() for index in range(20)]))

    assert distance(1.0) < 0.7 * distance(0.0)


def test_validation_samples_are_fixed_centres_never_trained_on(photographs: Path, tmp_path: Path) -> None:
    data = open_set(photographs, tmp_path)
    assert not {data[index].name for index in range(15)} & set(data.validation.names)
    sample = data.validation[1]
    expected = np.array(Image.open(photographs / "h.jpg"))[8 : 8 + CROP, 12 : 12 + CROP]
    assert np.array_equal(torch.round((sample.hq.permute(1, 2, 0) + 1) * 127.5).byte().numpy(), expected)
    other_run = open_set(photographs, tmp_path, seed=99, light_share=1.0, flip=1.0, plain_bicubic_share=1.0)
    assert same(sample, other_run.validation[1])
    assert not torch.equal(data.validation[0].lq, sample.lq)


def test_validation_pictures_of_their_own(photographs: Path, tmp_path: Path) -> None:
    settings = {"data_format": "auto", "crop": CROP, "scale": 4, "prompts": "auto", "prompt": "p", "cache": tmp_path}
    validation, skipped = open_validation_set(photographs, count=3, **settings)
    assert (
        validation.names == ["a.png", "b.JPG", "deep/d.jpeg"]
        and not skipped
        and len(validation) == 3
        and validation[2].name == "deep/d.jpeg"
    )
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no JPEG, PNG or WebP"):
        open_validation_set(tmp_path / "empty", count=3, **settings)


@pytest.fixture
def with_broken(photographs: Path, tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "data"
    shutil.copytree(photographs, folder)
    whole = (folder / "b.JPG").read_bytes()
    (folder / "bb.jpg").write_bytes(whole[: len(whole) // 2])  # its header is whole
    (folder / "not.png").write_bytes(b"this is no picture")
    (folder / "empty.webp").touch()
    save_picture(folder / "small.png", 20, 400)
    yield folder


def test_broken_and_small_pictures_are_named_and_replaced(with_broken: Path, tmp_path: Path) -> None:
    data = open_set(with_broken, tmp_path, held_out=0)
    reasons = {skipped.path: skipped.reason for skipped in data.skipped}
    assert reasons.keys() == {"not.png", "empty.webp", "small.png"}
    assert "400x20" in reasons["small.png"] and "crop of 32" in reasons["small.png"]
    assert "bb.jpg" in data.names
    with pytest.warns(BrokenPictureWarning, match=r"bb\.jpg cannot be read .*truncated"):
        names = [data[index].name for index in range(8)]
    assert len(set(names)) == 7 and "bb.jpg" not in names
    assert sum(names[i] == names[(i + 1) % 8] for i in range(8)) == 1, "the next picture of the epoch takes its place"


def test_a_broken_picture_is_not_held_out(with_broken: Path, tmp_path: Path) -> None:
    (with_broken / "z.jpg").write_bytes((with_broken / "bb.jpg").read_bytes())
    data = open_set(with_broken, tmp_path)
    assert data.validation.names == ["g.PNG", "h.jpg"] and "z.jpg" not in data.names
    assert "truncated" in str(next(skipped for skipped in data.skipped if skipped.path == "z.jpg"))


def test_a_disk_that_is_gone_ends_the_training(photographs: Path, tmp_path: Path) -> None:
    shutil.copytree(photographs, tmp_path / "data")
    data = open_set(tmp_path / "data", tmp_path)
    shutil.rmtree(tmp_path / "data")
    with (
        pytest.warns(BrokenPictureWarning, match="No such file"),
        pytest.raises(DataError, match="no picture can be read any more"),
    ):
        data[0]


def test_data_that_cannot_be_used(photographs: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("notes.md", "one.tiff", "two.tiff"):
        save_picture(tmp_path / "other" / "x.png")
        shutil.move(tmp_path / "other" / "x.png", tmp_path / "other" / name)
    with pytest.raises(DataError, match="they are empty"):
        open_set(tmp_path / "empty", tmp_path)
    with pytest.raises(DataError, match="2 x .tiff, 1 x .md"):
        open_set(tmp_path / "other", tmp_path)
    with pytest.raises(DataError, match="no such file or folder"):
        open_set(tmp_path / "missing", tmp_path)
    with pytest.raises(DataError, match="all 7 pictures are smaller than the crop of 512x512; the largest is 56x48"):
        open_set(photographs, tmp_path, crop=512)
    with pytest.raises(DataError, match="7 pictures that can be used, of which 7 are to be held out"):
        open_set(photographs, tmp_path, held_out=7)
    with pytest.raises(DataError, match="crop is 30 and scale 4"):
        open_set(photographs, tmp_path, crop=30)
    with pytest.raises(DataError, match="accepted: auto, folder, pairs, shards"):
        open_set(photographs, tmp_path, data_format="webdataset")
    with pytest.raises(DataError, match="accepted: auto, fixed"):
        open_set(photographs, tmp_path, prompts="none")
    with pytest.raises(DataError, match="is a folder; accepted with data_format=pairs is a text file"):
        open_set(photographs, tmp_path, data_format="pairs")
    with pytest.raises(DataError, match="is a file; accepted with data_format=folder is a folder"):
        open_set(photographs / "a.png", tmp_path, data_format="folder")
    with pytest.raises(DataError, match=r"is a \.png file"):
        open_set(photographs / "a.png", tmp_path)


def test_sidecar_prompts(photographs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(photographs, folder)
    (folder / "a.txt").write_text("a street, houses\n", encoding="utf-8")
    (folder / "deep" / "d.txt").write_text(" \n")
    (folder / "b.txt").write_bytes(b"\xff\xfe\xfd")
    (folder / "h.txt").write_text("a held-out flower")
    data = open_set(folder, tmp_path)
    prompts = {data[index].name: data[index].prompt for index in range(5)}
    assert prompts.pop("a.png") == "a street, houses" and set(prompts.values()) == {"clean"}
    assert data.texts == ["a held-out flower", "a street, houses", "clean"]
    assert data.validation[1].prompt == "a held-out flower"
    assert [skipped.path for skipped in data.skipped] == ["b.txt"] and "UTF-8" in data.skipped[0].reason
    fixed = open_set(folder, tmp_path, prompts="fixed")
    assert fixed.texts == ["clean"] and not fixed.skipped


def test_links_to_folders_are_followed_once(photographs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    os.symlink(photographs, folder / "linked", target_is_directory=True)
    os.symlink(folder, folder / "loop", target_is_directory=True)
    assert open_set(folder, tmp_path, held_out=0).epoch_length == 7


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("micro_batch", [1, 2, 3, 6])
@pytest.mark.parametrize("start", [0, 2])
def test_processes_share_out_each_step(processes: int, micro_batch: int, start: int) -> None:
    batch, stop = 12, 4
    samplers = [StepBatches(batch, micro_batch, process, processes, start, stop) for process in range(processes)]
    dealt = [list(sampler) for sampler in samplers]
    for sampler, batches in zip(samplers, dealt, strict=True):
        assert len(sampler) == len(batches) == (stop - start) * sampler.micro_batches
        assert all(len(indices) == micro_batch for indices in batches)
    for number, step in enumerate(range(start, stop)):
        turns = slice(number * samplers[0].micro_batches, (number + 1) * samplers[0].micro_batches)
        indices = [index for batches in dealt for micro in batches[turns] for index in micro]
        assert sorted(indices) == list(range(step * batch, (step + 1) * batch))


def test_batches_that_cannot_be_shared_out() -> None:
    with pytest.raises(ValueError, match="multiple of 3 x 2 = 6"):
        StepBatches(8, 3, 0, 2, 0, 1)
    with pytest.raises(ValueError, match=r"accepted: 0\.\.1"):
        StepBatches(8, 2, 2, 2, 0, 1)
    assert list(StepBatches(4, 2, 0, 1, 3, 3)) == [] and len(StepBatches(4, 2, 0, 1, 5, 3)) == 0
