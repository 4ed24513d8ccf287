"""What users' folders hold, and what the cache of their pixels must survive."""

import errno
import os
import re
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import image_folder
from dataset_loader import ImageDataset, read_images, to_image

ROOT = Path(__file__).parents[1]


def write_images(folder, *names, mode="L"):
    """Images of noise, each another."""
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (8, 8), np.uint8)
        Image.fromarray(pixels).convert(mode).save(folder / name)


def pixels_of(folder, **options):
    return ImageDataset(folder, image_size=8, **options).pixels[:, 0].numpy()


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# Formats and names

@pytest.mark.parametrize("name", ["a.heic", "a.svg", "a.JP2", "a.ppm", "a.tga", "a.cr2"])
def test_images_that_are_not_read_are_left_out_and_counted(tmp_path, name):
    write_images(tmp_path, "b.png", "c.png")
    (tmp_path / name).write_bytes(b"no matter")
    report = ImageDataset(tmp_path, image_size=8).report
    assert (report.found, report.kept) == (3, 2)
    assert report.skipped == {"of a format that is not read": [name]}
    with pytest.raises(ValueError, match="strict"):
        ImageDataset(tmp_path, image_size=8, strict=True)


@pytest.mark.skipif("AVIF" not in image_folder.FORMATS, reason="Pillow without AVIF")
def test_avif_is_read(tmp_path):
    for name in "ab":
        Image.new("RGB", (8, 8), (200, 200, 200)).save(tmp_path / f"{name}.avif", quality=100)
    assert np.abs(pixels_of(tmp_path).astype(int) - 200).max() <= 2


def test_the_first_frame_of_a_gif_and_of_a_tiff_counts(tmp_path):
    frames = [Image.new("L", (8, 8), value) for value in (50, 200)]
    for name in ("a.gif", "b.tif"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    assert (pixels_of(tmp_path) == 50).all()


def test_a_report_can_be_printed_where_letters_are_missing(tmp_path, monkeypatch):
    write_images(tmp_path, "a.png", "b.png")
    (tmp_path / "数字.png").write_text("hello")
    code = f"from dataset_loader import ImageDataset; ImageDataset({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True,
                          env={**os.environ, "PYTHONIOENCODING": "ascii:strict"})
    assert done.returncode == 0 and b"\\u6570\\u5b57.png" in done.stdout


def test_a_subfolder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    write_images(tmp_path, "a.png", "b.png", "locked/c.png")
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "locked":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="locked"):
        ImageDataset(tmp_path, image_size=8)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such pipes")
def test_a_pipe_with_the_name_of_an_image_is_left_out(tmp_path):
    write_images(tmp_path, "a.png", "b.png")
    os.mkfifo(tmp_path / "c.png")
    assert ImageDataset(tmp_path, image_size=8).report.skipped == {"no regular file": ["c.png"]}


# Depth and transparency

@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_of_16_bit_images_the_upper_8_of_the_bits_in_use_count(tmp_path, bits, name, capsys):
    levels = np.arange(256).reshape(16, 16)
    stored = levels * 2**(bits - 8) + (2**(bits - 8) - 1) // 3
    Image.fromarray(stored.astype(np.uint16)).save(tmp_path / name)
    Image.fromarray((stored // 2).astype(np.uint16)).save(tmp_path / ("b" + name[1:]))
    data = ImageDataset(tmp_path, image_size=16)
    assert np.array_equal(data.pixels[0, 0].numpy(), levels)
    assert np.array_equal(data.pixels[1, 0].numpy(), levels // 2)  # by the same scale
    alone, _, _ = read_images(tmp_path / name, image_size=16)
    assert np.array_equal(to_image(alone)[0, 0].numpy(), levels)
    white = {8: 255, 10: 1023, 12: 4095, 14: 16383, 16: 65535}[bits]
    assert f"2 of 16 bits, values up to {stored.max()}: read as {bits} bits, " \
        f"so that {white} is white" in capsys.readouterr().out


def test_decimal_numbers_from_0_to_1_are_read_and_others_left_out(tmp_path):
    levels = np.arange(256).reshape(16, 16)
    for name, values in {"a": levels / 255, "b": levels / 255, "c": levels * 1.0,
                         "d": levels - 9.0, "e": np.where(levels == 7, np.nan, 0.5)}.items():
        Image.fromarray(values.astype(np.float32)).save(tmp_path / f"{name}.tif")
    Image.fromarray(levels.astype(np.int32) - 5).save(tmp_path / "f.tif")
    Image.fromarray(levels.astype(np.int32) * 70000).save(tmp_path / "g.tif")
    data = ImageDataset(tmp_path, image_size=16)
    assert np.array_equal(data.pixels[:, 0].numpy(), [levels, levels])
    (reason, names), = data.report.skipped.items()
    assert "outside 0 ... 65535" in reason and names == [f"{c}.tif" for c in "cdefg"]


def test_a_transparent_value_of_16_bit_grey_shows_the_background(tmp_path):
    values = np.full((8, 8), 65535, np.uint16)
    values[:, :4] = 1234
    for name in "ab":
        Image.fromarray(values).save(tmp_path / f"{name}.png", transparency=1234)
    shown = pixels_of(tmp_path, background="#646464")
    assert (shown[:, :, :4] == 100).all() and (shown[:, :, 4:] == 255).all()


def png_of_16_bit_colour(path, values):
    """A PNG by its specification, since Pillow writes no 16-bit colour."""
    def chunk(kind, content):
        return (struct.pack(">I", len(content)) + kind + content
                + struct.pack(">I", zlib.crc32(kind + content)))
    height, width, _ = values.shape
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    path.write_bytes(b"\x89PNG\r\n\x1a\n"
                     + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))
                     + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b""))


def test_images_that_are_nearly_black_are_reported(tmp_path, capsys):
    values = np.random.default_rng(0).integers(0, 4096, (8, 8, 3))
    values[0, 0], values[0, 1] = 0, 4095
    for name in "ab":
        png_of_16_bit_colour(tmp_path / f"{name}.png", values)
    ImageDataset(tmp_path, image_size=8, channels=3)
    assert "all values are within 0 ... 15 of 0 ... 255" in capsys.readouterr().out


def test_white_drawings_on_a_transparent_ground_are_reported(tmp_path, capsys):
    drawing = Image.new("RGBA", (8, 8), (255, 255, 255, 0))
    drawing.paste((255, 255, 255, 255), (2, 2, 6, 6))
    for name in "abcd":
        drawing.save(tmp_path / f"{name}.png")
    data = ImageDataset(tmp_path, image_size=8)
    assert data.report.one_colour == ["a.png", "b.png", "c.png", "d.png"]
    printed = capsys.readouterr().out
    assert "4 of one single colour: a.png, b.png, c.png, ...; " in printed
    assert 'background="black"' in printed
    mended = ImageDataset(tmp_path, image_size=8, background="black")
    assert mended.report.one_colour == [] and "background=" not in capsys.readouterr().out
    assert np.array_equal(mended.pixels[0, 0, 0:3, 4].numpy(), [0, 0, 255])


# Subfolders

def test_hidden_folders_are_no_classes_and_are_counted(tmp_path, capsys):
    write_images(tmp_path, "cat/1.png", "dog/1.png", ".thumbs/1.png", ".git/x/1.png",
                 ".ipynb_checkpoints/1.png", "@eaDir/1.png", "__MACOSX/cat/1.png",
                 "cat/@eaDir/1.png", "cat/._1.png")
    (tmp_path / ".DS_Store").touch()
    data = ImageDataset(tmp_path, image_size=8, strict=True)
    assert data.classes == ["cat", "dog"] and data.labels.tolist() == [0, 1]
    assert data.report.hidden == sorted([".git", ".ipynb_checkpoints", ".thumbs", "@eaDir",
                                         "__MACOSX", "cat/._1.png", "cat/@eaDir"])
    assert "7 hidden, not looked at: .git, " in capsys.readouterr().out
    (tmp_path / ".new").mkdir()
    assert ".new" in ImageDataset(tmp_path, image_size=8).report.hidden


def test_the_report_says_which_labels_there_are_or_why_there_are_none(tmp_path, capsys):
    write_images(tmp_path / "data", "cat/1.png", "cat/2.png", "dog/1.png")
    assert ImageDataset(tmp_path / "data").labels.tolist() == [0, 0, 1]
    assert "labels: 2 classes, cat (2), dog (1)\n" in capsys.readouterr().out
    assert ImageDataset(tmp_path).labels is None
    assert "no labels: every image is in data; pass that folder for cat, dog\n" \
        in capsys.readouterr().out
    write_images(tmp_path / "data", "stray.png")
    assert ImageDataset(tmp_path / "data").labels is None
    assert "no labels: 1 images lie beside the subfolders cat, dog: stray.png\n" \
        in capsys.readouterr().out
    assert ImageDataset(tmp_path / "data" / "cat").labels is None
    assert "labels" not in capsys.readouterr().out


def test_images_and_labels_come_as_pairs_on_request(tmp_path):
    write_images(tmp_path, "cat/1.png", "dog/1.png", "dog/2.png")
    data = ImageDataset(tmp_path, image_size=8, with_labels=True)
    image, label = data[1]
    assert image.shape == (1, 8, 8) and label == 1
    assert [label.item() for _, label in data] == [0, 1, 1]
    images, labels = next(iter(DataLoader(data, batch_size=3)))
    assert images.shape == (3, 1, 8, 8) and labels.tolist() == [0, 1, 1]
    assert labels.dtype == torch.int64 and torch.equal(images, data[:][0])
    assert ImageDataset(tmp_path, image_size=8)[1].shape == (1, 8, 8)
    with pytest.raises(ValueError, match="with_labels, but there are none"):
        ImageDataset(tmp_path / "dog", image_size=8, with_labels=True)


# Arguments

@pytest.mark.parametrize("size", [28.0, "28", True, None, (28, 28, 28), (28,), [28, "28"], 7,
                                  (28, 7), np.float32(28), [28, 28.5]])
def test_what_is_no_image_size_is_refused_and_named(tmp_path, size):
    with pytest.raises(ValueError, match=f"^image_size {re.escape(repr(size))}: must be a whole"):
        ImageDataset(tmp_path, size)


@pytest.mark.parametrize("argument", [{"channels": True}, {"channels": 3.0}, {"channels": "3"},
                                      {"max_images": "64"}, {"max_images": 2.0},
                                      {"max_images": True}, {"background": (0, 0, 0)},
                                      {"background": None}])
def test_other_arguments_that_are_none_are_refused_and_named(tmp_path, argument):
    (name, value), = argument.items()
    with pytest.raises(ValueError, match=re.escape(f"{name} {value!r}: ")):
        ImageDataset(tmp_path, **argument)


def test_numbers_of_numpy_are_numbers(tmp_path):
    write_images(tmp_path, "a.png", "b.png", "c.png")
    for size in (np.int64(9), np.array([9, 9]).tolist(), (np.uint8(9), 9)):
        data = ImageDataset(tmp_path, size, channels=np.int32(3), max_images=np.int64(2))
        assert data.pixels.shape == (2, 3, 9, 9)


# The cache

def test_the_folder_of_the_user_is_left_as_found(tmp_path, user_cache):
    write_images(tmp_path, "a.png", "b.png")
    before = files_below(tmp_path)
    ImageDataset(tmp_path, image_size=8)
    assert files_below(tmp_path) == before
    assert len(list(user_cache.glob("*.pth"))) == 1


def test_equal_names_in_another_folder_have_their_own_pixels(tmp_path):
    write_images(tmp_path / "x", "a.png", "b.png")
    write_images(tmp_path / "y", "b.png", "a.png")
    x, y = pixels_of(tmp_path / "x"), pixels_of(tmp_path / "y")
    assert np.array_equal(x, y[::-1]) and not np.array_equal(x, y)
    assert np.array_equal(pixels_of(tmp_path / "x"), x)


@pytest.mark.skipif(sys.platform != "linux", reason="the variables are those of Linux")
def test_without_xdg_the_cache_is_below_the_home_folder(tmp_path, monkeypatch):
    write_images(tmp_path / "images", "a.png", "b.png")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    ImageDataset(tmp_path / "images", image_size=8)
    assert len(list((tmp_path / "home" / ".cache" / "simple-ddpm").glob("*.pth"))) == 1


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"),
                                   RuntimeError("[enforce fail at inline_container.cc:672]")])
def test_a_full_disk_costs_the_cache_and_not_the_run(tmp_path, user_cache, monkeypatch, error):
    def save(content, file):
        file.write(b"half")
        raise error
    write_images(tmp_path, "a.png", "b.png")
    expected = [np.asarray(Image.open(tmp_path / name)) for name in ("a.png", "b.png")]
    monkeypatch.setattr(torch, "save", save)
    assert np.array_equal(pixels_of(tmp_path), expected)
    assert [name for name in files_below(user_cache) if not name.endswith(".lock")] == []


def test_where_no_file_can_be_written_the_pixels_stay_in_memory(tmp_path, monkeypatch):
    write_images(tmp_path, "a.png", "b.png")
    expected = [np.asarray(Image.open(tmp_path / name)) for name in ("a.png", "b.png")]
    monkeypatch.setattr(image_folder.tempfile, "TemporaryFile", full_disk)
    monkeypatch.setattr(torch, "save", full_disk)
    data = ImageDataset(tmp_path, image_size=8)
    assert np.array_equal(data.pixels[:, 0].numpy(), expected)
    data.pixels[0] = 7  # as those of a file
    assert (data.pixels[0] == 7).all()


def test_a_lock_that_cannot_be_had_costs_time_only(tmp_path, monkeypatch):
    write_images(tmp_path, "a.png", "b.png")
    monkeypatch.setattr(image_folder.FileLock, "acquire", full_disk)
    assert pixels_of(tmp_path).shape == (2, 8, 8)


def test_an_interrupted_start_leaves_no_temporary_file(tmp_path, user_cache, monkeypatch):
    write_images(tmp_path, "a.png", "b.png", "c.png")
    decode = image_folder.decode

    def interrupted(name, **options):
        if name == "b.png":
            raise KeyboardInterrupt
        return decode(name, **options)
    with monkeypatch.context() as patch:
        patch.setattr(image_folder, "decode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ImageDataset(tmp_path, image_size=8)
    assert [name for name in files_below(user_cache) if not name.endswith(".lock")] == []
    assert len(pixels_of(tmp_path)) == 3  # the lock is free


STARTER = """
import os, sys, time
import image_folder
from dataset_loader import ImageDataset
folder, log, go, die = sys.argv[1:]
decode = image_folder.decode

def counted(name, **options):
    with open(log, "a") as file:
        file.write(name + "\\n")
    if die == "die":
        os._exit(9)
    time.sleep(0.1)
    return decode(name, **options)

image_folder.decode = counted
open(go + str(os.getpid()), "w").close()
while not os.path.exists(go):
    time.sleep(0.01)
print("pixels", ImageDataset(folder, image_size=8).pixels[:, 0, 0, 0].tolist())
"""


def start(tmp_path, die=""):
    arguments = [str(tmp_path / "images"), str(tmp_path / "log"), str(tmp_path / "go"), die]
    return subprocess.Popen([sys.executable, "-c", STARTER, *arguments], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_of_processes_that_start_at_once_one_decodes(tmp_path):
    """As those of torchrun do on one machine; one that died before has left no lock."""
    names = [f"{number}.png" for number in range(6)]
    write_images(tmp_path / "images", *names)
    (tmp_path / "go").touch()
    assert start(tmp_path, "die").wait(600) == 9
    for path in tmp_path.glob("go*"):
        path.unlink()
    (tmp_path / "log").unlink()
    processes = [start(tmp_path) for _ in range(2)]
    while len(list(tmp_path.glob("go*"))) < 2 and all(p.poll() is None for p in processes):
        time.sleep(0.01)
    (tmp_path / "go").touch()
    outputs = [process.communicate(timeout=600) for process in processes]
    expected = [np.asarray(Image.open(tmp_path / "images" / name))[0, 0] for name in names]
    for output, errors in outputs:
        assert f"pixels {[int(value) for value in expected]}" in output, errors
    assert sorted((tmp_path / "log").read_text().split()) == names
