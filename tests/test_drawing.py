"""Many images: what is in output_dir, and what a stop or a full memory leaves."""

import errno
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets.folder import find_classes

import drawing
from dataset_loader import ImageDataset
from drawing import draw_files, figures_folder


@pytest.fixture(autouse=True)
def five_at_once(monkeypatch):
    monkeypatch.setattr(drawing, "AT_ONCE", 5)


def grey(numbers):
    """Image i is of grey level i."""
    return torch.stack([torch.full((1, 8, 8), i / 127.5 - 1) for i in numbers])


def levels(folder):
    """Number in the name -> grey level, of the files x_*.png."""
    return {int(path.stem[2:]): int(np.asarray(Image.open(path)).max()) for path in folder.glob("x_*.png")}


def test_images_come_in_batches_as_files_of_their_number(tmp_path):
    batches = []

    def draw(numbers):
        batches.append((list(numbers), len(levels(tmp_path / "out"))))
        return grey(numbers)
    grid = draw_files(draw, range(3, 15), tmp_path / "out")
    assert batches == [([3, 4, 5, 6, 7], 0), ([8, 9, 10, 11, 12], 5), ([13, 14], 10)]  # those before are there
    assert levels(tmp_path / "out") == {i: i for i in range(3, 15)}
    shown = set(np.asarray(grid.convert("L")).flatten().tolist())
    assert shown == {3, 4, 5, 6, 7, 128}  # the first batch, and what is between
    draw_files(grey, range(15, 17), tmp_path / "out")
    assert levels(tmp_path / "out") == {i: i for i in range(3, 17)}


@pytest.mark.parametrize("count", [1, 4, 40])
def test_names_are_written_below_images_where_these_are_few(tmp_path, count):
    grids = [np.asarray(draw_files(grey, range(count), tmp_path, names).convert("L"))
             for names in ([], [f"class {i}" for i in range(count)])]
    plain, named = (grid.astype(int) for grid in grids)
    if count == 40:
        assert (plain == named).all()
        return
    assert named.shape[0] > plain.shape[0] and named.shape[1] == plain.shape[1]
    for level in range(count):  # no name covers an image
        assert (named == level).sum() == (plain == level).sum() > 0
    assert named.max() > 150 and plain.max() <= 128


def test_the_folder_holds_the_samples_and_nothing_else(tmp_path, monkeypatch):
    """As our own data set, a tool that lists one flat folder, and torchvision see it."""
    out = f"{tmp_path}/out/"
    draw_files(grey, range(12), out)
    assert len(ImageDataset(out, image_size=8)) == 12
    assert sorted(os.listdir(out)) == sorted(f"x_{i}.png" for i in range(12))
    with pytest.raises(FileNotFoundError, match="Couldn't find any class folder"):  # grids are no class
        find_classes(out)
    assert figures_folder(out) == tmp_path / "out_figures"
    monkeypatch.chdir(out)
    assert figures_folder(".") == tmp_path / "out_figures"
    assert os.listdir(tmp_path / "out_figures") == ["grid.png"]


def test_images_of_an_earlier_run_are_named_and_kept(tmp_path, capsys):
    draw_files(grey, range(12), tmp_path)
    assert "before" not in capsys.readouterr().out
    draw_files(grey, range(3), tmp_path)
    assert f"{tmp_path} also holds 9 images that were there before: x_10.png, x_11.png, x_3.png, ..." in (
        capsys.readouterr().out)
    assert len(levels(tmp_path)) == 12
    draw_files(grey, range(12), tmp_path)
    assert "before" not in capsys.readouterr().out


def test_a_full_disk_keeps_what_is_whole_and_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    save = Image.Image.save

    def fill(image, path, *args):
        if path.name == "x_6.png":
            path.write_bytes(b"")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(image, path, *args)
    monkeypatch.setattr(Image.Image, "save", fill)
    with pytest.raises(OSError, match="No space left"):
        draw_files(grey, range(2, 20), tmp_path)
    assert "stopped after 4 of 18 images; the others: first_image=6, num_images=14" in capsys.readouterr().out
    assert levels(tmp_path) == {i: i for i in range(2, 6)}

    def refuse(image, path, *args):
        raise PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(Image.Image, "save", refuse)
    with pytest.raises(PermissionError):
        draw_files(grey, range(2, 4), tmp_path)
    assert levels(tmp_path) == {i: i for i in range(2, 6)}  # they were not touched


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_stop_keeps_what_is_drawn_and_says_how_to_go_on(tmp_path, capsys, name):
    if not hasattr(signal, name):
        pytest.skip("Windows has no SIGHUP")

    def draw(numbers):
        if 7 in numbers:
            signal.raise_signal(getattr(signal, name))
        return grey(numbers)
    draw_files(draw, range(2, 20), tmp_path)
    said = capsys.readouterr().out
    assert "stopped after 10 of 18 images; the others: first_image=12, num_images=8" in said
    assert levels(tmp_path) == {i: i for i in range(2, 12)}
    draw_files(draw, range(12, 12 + 8), tmp_path)
    assert levels(tmp_path) == {i: i for i in range(2, 20)}


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError(
    "DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")])
def test_a_full_memory_says_what_to_lower_and_keeps_what_is_drawn(tmp_path, error):
    def draw(numbers):
        if 7 in numbers:
            raise error
        return grey(numbers)
    with pytest.raises(MemoryError, match="5 images at once do not fit .*; set num_images below 5"):
        draw_files(draw, range(20), tmp_path)
    assert levels(tmp_path) == {i: i for i in range(5)}
    with pytest.raises(MemoryError, match="set num_images below 3"):
        draw_files(draw, range(5, 8), tmp_path)
