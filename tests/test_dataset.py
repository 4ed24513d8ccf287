import gzip
import hashlib
import io
import math
import os
import re
import struct
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from checkpoint import atomic_file
from dataset_loader import (ImageDataset, find_test_set, image_grid, read_idx, read_test_set,
                            to_image)

ROOT = Path(__file__).parents[1]
MNIST = ROOT / "Assets" / "MNIST"
MD5 = {
    "train-images-idx3-ubyte.gz": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte.gz": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte.gz": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte.gz": "27ae3e4e09519cfbb04c329615203637",
}


def write_idx(path, array, compress=False):
    content = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(content) if compress else content)


# Pixels

def test_pixels_and_numbers_convert_both_ways():
    pixels = torch.arange(256).to(torch.uint8)
    assert torch.equal(to_image(pixels.float() / 127.5 - 1), pixels)
    x = torch.tensor([-7.0, -1.0, -0.0001, 0.0, 0.99, 1.0, 7.0])
    assert to_image(x).tolist() == [0, 0, 127, 128, 254, 255, 255]


def test_image_grid_lays_images_row_by_row():
    x = torch.tensor([-1.0, 0.2, 1.0]).view(3, 1, 1, 1).expand(3, 3, 8, 8)
    grid = np.asarray(image_grid(x, columns=2, scale=1))
    assert grid.shape == (2 * (8 + 2) + 2, 2 * (8 + 2) + 2, 3)
    assert [grid[5, 5, 0], grid[5, 15, 0], grid[15, 5, 0]] == [0, 153, 255]


# MNIST

@pytest.mark.parametrize("name, md5", MD5.items())
def test_mnist_is_the_original(name, md5):
    assert hashlib.md5(gzip.decompress((MNIST / name).read_bytes())).hexdigest() == md5
    assert md5 in (MNIST / "README.md").read_text()


def test_mnist_in_the_shape_and_range_of_the_network():
    data = ImageDataset(MNIST / "t10k-images-idx3-ubyte.gz")
    assert len(data) == 10_000 and data.pixels.dtype == torch.uint8
    assert data[0].shape == (1, 28, 28) and data[0].dtype == torch.float32
    assert data[:100].min() == -1 and data[:100].max() == 1
    assert data.labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert torch.bincount(data.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


def test_a_batch_is_the_images_one_by_one():
    data = ImageDataset(MNIST / "t10k-images-idx3-ubyte.gz", max_images=50)
    assert len(data) == len(data.labels) == 50
    assert torch.equal(data[torch.tensor([7, 3])], torch.stack([data[7], data[3]]))
    assert torch.equal(data[2:4], torch.stack([data[2], data[3]]))
    assert torch.equal(torch.stack(list(data)), data[:])


# IDX files

@pytest.mark.parametrize("images, labels", [
    ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"), ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    ("train-images.idx3-ubyte", "train-labels.idx1-ubyte"), ("train-images-idx3-ubyte", "train-labels-idx1-ubyte.gz"),
    ("train-images-idx3-ubyte.gz", None), ("digits", None)])
def test_idx_plain_and_gzipped_in_both_namings(tmp_path, images, labels):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 28, 28), np.uint8)
    write_idx(tmp_path / images, pixels, images.endswith(".gz"))
    if labels:
        write_idx(tmp_path / labels, np.array([3, 1, 4, 1, 5], np.uint8), labels.endswith(".gz"))
    data = ImageDataset(tmp_path / images)
    assert np.array_equal(data.pixels[:, 0].numpy(), pixels)
    names = None if data.labels is None else [data.classes[number] for number in data.labels]
    assert names == (labels and ["3", "1", "4", "1", "5"])


def test_idx_resized_and_in_colour(tmp_path):
    write_idx(tmp_path / "images", np.full((2, 20, 30), 100, np.uint8))
    data = ImageDataset(tmp_path / "images", image_size=32, channels=3)
    assert data.pixels.shape == (2, 3, 32, 32) and (data.pixels == 100).all()


def test_damaged_idx_files_are_named(tmp_path):
    whole = (MNIST / "t10k-labels-idx1-ubyte.gz").read_bytes()
    path = tmp_path / "images"
    flipped = whole[:2000] + bytes(255 - byte for byte in whole[2000:2010]) + whole[2010:]
    for content, message in [(whole[:1000], "damaged gzip"), (flipped, "damaged gzip"),
                             (b"\0\0\x08", "not an IDX file"), (b"hello", "not an IDX file"), (b"", "not an IDX file"),
                             (gzip.decompress(whole)[:-1], r"9999 bytes of data where its header says \[10000\]")]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{re.escape(str(path))}: .*{message}"):
            read_idx(path)
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"shape \(10000,\); images are \(N, H, W\)"):
        ImageDataset(path)


def test_labels_of_other_images_are_refused(tmp_path):
    write_idx(tmp_path / "images", np.zeros((2, 28, 28), np.uint8))
    write_idx(tmp_path / "labels", np.zeros(3, np.uint8))
    with pytest.raises(ValueError, match="labels of shape \\(3,\\) for 2 images"):
        ImageDataset(tmp_path / "images")


# Folders

def write_image(path, value, size=(10, 10), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path, **options)


def first_pixels(data):
    return data.pixels[:, 0, 0, 0].tolist()


def test_folder_is_searched_recursively_in_a_fixed_order(tmp_path):
    for value, name in enumerate(["a.png", "b/z.png", "b/é 数字.PNG", "c.JPG", "d.jpeg"]):
        write_image(tmp_path / name, (value, value, value))
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "folder.png").mkdir()
    data = ImageDataset(tmp_path, channels=3)
    assert data.pixels.shape == (5, 3, 28, 28) and data.labels is None
    assert first_pixels(data) == [0, 1, 2, 3, 4]


def test_the_report_says_what_is_there(tmp_path, capsys):
    write_image(tmp_path / "a.png", (255, 0, 0), size=(50, 41))
    write_image(tmp_path / "b.png", (255, 0, 0), size=(50, 41))
    write_image(tmp_path / "c.jpg", 7, size=(48, 48), mode="L")
    (tmp_path / "d.png").write_text("hello")
    report = ImageDataset(tmp_path).report
    assert (report.found, report.kept, report.duplicates) == (4, 3, 1)
    assert report.sizes == {"50 x 41": 2, "48 x 48": 1} and report.modes == {"RGB": 2, "L": 1}
    assert report.skipped == {"no image of a format that is read": ["d.png"]}
    assert (report.channels, report.image_size) == (3, 40)
    printed = capsys.readouterr().out
    assert "3 of 4 images kept, 1 of them duplicates" in printed and "1 left out, no image of a format that is read: d.png" in printed
    assert "proposed: channels=3, image_size=40" in printed


def test_strict_refuses_what_would_be_left_out(tmp_path):
    for name in "ab":
        write_image(tmp_path / f"{name}.png", 0, mode="L")
    ImageDataset(tmp_path, strict=True)
    (tmp_path / "c.png").write_text("hello")
    with pytest.raises(ValueError, match="strict.*\n.*\n.*c.png"):
        ImageDataset(tmp_path, strict=True)


def test_subfolders_become_labels_where_every_image_is_in_one(tmp_path):
    for value, name in enumerate(["cat/1.png", "cat/deeper/2.png", "dog/1.png"]):
        write_image(tmp_path / name, value, mode="L")
    data = ImageDataset(tmp_path)
    assert data.labels.tolist() == [0, 0, 1] and data.classes == ["cat", "dog"]
    write_image(tmp_path / "stray.png", 9, mode="L")
    assert ImageDataset(tmp_path).labels is None


def test_other_shapes_are_cropped_padded_or_squashed(tmp_path):
    image = Image.new("RGB", (60, 20), (0, 0, 255))
    image.paste((0, 255, 0), (20, 0, 40, 20))
    for name in "ab":
        image.save(tmp_path / f"{name}.png")

    def colours(fit, rows, columns):
        data = ImageDataset(tmp_path, image_size=24, channels=3, fit=fit, background="red")
        return data.pixels[0, :, rows, columns].T.tolist()
    red, green, blue = [255, 0, 0], [0, 255, 0], [0, 0, 255]
    assert colours("crop", [12, 12, 12, 1], [3, 12, 20, 12]) == [green] * 4
    assert colours("squash", [12, 12, 12, 1], [0, 12, 23, 12]) == [blue, green, blue, green]
    assert colours("pad", [12, 12, 12, 1], [0, 12, 23, 12]) == [blue, green, blue, red]


@pytest.mark.parametrize("kind", ["folder", "idx"])
def test_grey_images_are_padded_in_colour(tmp_path, kind):
    grey, path = np.full((2, 20, 60), 90, np.uint8), tmp_path / "images"
    if kind == "idx":
        write_idx(path, grey)
    else:
        path.mkdir()
        for name, image in zip("ab", grey):
            Image.fromarray(image).save(path / f"{name}.png")
    data = ImageDataset(path, image_size=24, channels=3, fit="pad", background="red")
    assert data.pixels[:, :, 12, 12].tolist() == [[90, 90, 90]] * 2
    assert data.pixels[:, :, 1, 12].tolist() == [[255, 0, 0]] * 2


def test_image_size_may_be_a_pair(tmp_path):
    for name in "ab":
        write_image(tmp_path / f"{name}.png", 5, mode="L")
    assert ImageDataset(tmp_path, image_size=(9, 31)).pixels.shape == (2, 1, 9, 31)
    write_idx(tmp_path / "images", np.full((2, 20, 30), 100, np.uint8))
    assert ImageDataset(tmp_path / "images", image_size=(9, 31)).pixels.shape == (2, 1, 9, 31)


@pytest.mark.parametrize("colour, mode, options, expected", [
    ((255, 0, 0), "RGB", {}, [255, 0, 0]),
    (77, "L", {}, [77, 77, 77]),
    ((0, 0, 0, 0), "RGBA", {}, [0, 128, 0]),
    ((200, 10, 30, 255), "RGBA", {}, [200, 10, 30]),
    ((9, 0), "LA", {}, [0, 128, 0]),
    (0, "P", {"transparency": 0}, [0, 128, 0]),
    (1, "1", {}, [255, 255, 255])])
def test_every_mode_of_png_gives_what_a_viewer_shows(tmp_path, colour, mode, options, expected):
    for name in "ab":
        write_image(tmp_path / f"{name}.png", colour, mode=mode, **options)
    data = ImageDataset(tmp_path, channels=3, background="green")
    assert data.pixels[0, :, 14, 14].tolist() == expected


def test_cmyk_jpeg_becomes_rgb(tmp_path):
    for name in "ab":
        write_image(tmp_path / f"{name}.jpg", (0, 255, 255, 0), mode="CMYK", quality=100)
    assert (ImageDataset(tmp_path, channels=3).pixels[0, :, 5, 5] - torch.tensor([255, 0, 0])).abs().max() < 8


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("L", (16, 16), 0)
    image.paste(255, (0, 0, 16, 8))  # the upper half is white, and a viewer turns it to the right
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in "ab":
        image.save(tmp_path / f"{name}.jpg", exif=exif, quality=100)
    pixels = ImageDataset(tmp_path, image_size=16).pixels[0, 0]
    assert (pixels[:, :7] < 20).all() and (pixels[:, 9:] > 235).all()


def test_a_picture_whose_exif_is_none_is_kept(tmp_path):
    for name in ("a.png", "b.jpg"):
        Image.new("L", (16, 16), 90).save(tmp_path / name, exif=b"Exif\0\0not a header")
    assert first_pixels(ImageDataset(tmp_path)) == [90, 90]


def test_the_first_frame_of_an_animation_counts(tmp_path):
    frames = [Image.new("L", (10, 10), value) for value in (50, 200)]
    for name in "ab":
        frames[0].save(tmp_path / f"{name}.png", save_all=True, append_images=frames[1:])
    assert first_pixels(ImageDataset(tmp_path)) == [50, 50]


def test_flip_follows_every_image_with_its_mirror_image(tmp_path):
    for value, folder in ((10, "x"), (20, "y")):
        image = Image.new("L", (16, 16), value)
        image.paste(255, (0, 0, 8, 16))
        (tmp_path / folder).mkdir()
        image.save(tmp_path / folder / "1.png")
    data = ImageDataset(tmp_path, image_size=16, flip=True)
    assert data.pixels[:, 0, 0, [0, 15]].tolist() == [[255, 10], [10, 255], [255, 20], [20, 255]]
    assert data.labels.tolist() == [0, 0, 1, 1]
    digits = MNIST / "t10k-images-idx3-ubyte.gz"
    plain, flipped = ImageDataset(digits, max_images=3), ImageDataset(digits, max_images=3, flip=True)
    assert torch.equal(flipped.pixels[0::2], plain.pixels) and torch.equal(flipped.pixels[1::2], plain.pixels.flip(-1))
    assert flipped.labels.tolist() == [7, 7, 2, 2, 1, 1]


def test_corrupt_files_are_named_and_no_good_one_is_lost(tmp_path):
    for value in range(5):
        write_image(tmp_path / f"{value}.png", (value, value, value), size=(40, 40))
    whole = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "2.png").write_text("hello")
    Image.new("L", (10, 10)).save(tmp_path / "3.png", format="PPM")  # a format that Pillow knows and nobody asked for
    (tmp_path / "5.png").symlink_to(tmp_path / "gone.png")
    data = ImageDataset(tmp_path, channels=3)
    assert first_pixels(data) == [0, 4]
    assert data.report.skipped["no image of a format that is read"] == ["2.png", "3.png"]
    assert sorted(name for names in data.report.skipped.values() for name in names) == ["1.png", "2.png", "3.png", "5.png"]


def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    for name in "ab":
        write_image(tmp_path / f"{name}.png", 0, mode="L")
    side = math.isqrt(Image.MAX_IMAGE_PIXELS) + 1
    write_image(tmp_path / "bomb.png", 0, size=(side, side), mode="1")
    decoded, load = [], PngImagePlugin.PngImageFile.load
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda image: decoded.append(image.size) or load(image))
    data = ImageDataset(tmp_path)
    assert data.report.skipped == {f"more than {Image.MAX_IMAGE_PIXELS} pixels": ["bomb.png"]}
    assert set(decoded) == {(10, 10)}


def test_links_are_followed_and_loops_end(tmp_path):
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "folder"
    write_image(elsewhere / "a.png", 1, mode="L")
    write_image(folder / "b.png", 2, mode="L")
    (folder / "c").symlink_to(elsewhere)
    (elsewhere / "loop").symlink_to(folder)
    assert first_pixels(ImageDataset(folder)) == [2, 1]


def test_nothing_to_read_is_an_error_that_names_the_place(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no images under {re.escape(str(tmp_path))}.* no file; .*.png, .jpg"):
        ImageDataset(tmp_path)
    for name in ("a.txt", "b.TXT", "c.csv", "README"):
        (tmp_path / name).write_text("no image")
    with pytest.raises(FileNotFoundError, match=r"\.txt \(2\), .*(\.csv|without extension) \(1\).*read are .png"):
        ImageDataset(tmp_path)
    with pytest.raises(FileNotFoundError, match="missing: no such folder or file"):
        ImageDataset(tmp_path / "missing")
    write_image(tmp_path / "a.png", 0)
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))}: 1 usable images, at least 2"):
        ImageDataset(tmp_path)


def test_the_second_start_decodes_nothing_and_a_changed_folder_is_noticed(tmp_path, user_cache, monkeypatch):
    for value in range(3):
        write_image(tmp_path / f"{value}.png", value, mode="L")
    first = ImageDataset(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("image_folder.decode", None)  # a call would fail
        second = ImageDataset(tmp_path)
        assert torch.equal(first.pixels, second.pixels) and first.report == second.report
    write_image(tmp_path / "1.png", 99, mode="L")
    assert first_pixels(ImageDataset(tmp_path)) == [0, 99, 2]
    write_image(tmp_path / "3.png", 3, mode="L")
    assert first_pixels(ImageDataset(tmp_path)) == [0, 99, 2, 3]
    assert ImageDataset(tmp_path, image_size=8).pixels.shape == (4, 1, 8, 8)
    assert len(list(user_cache.glob("*.pth"))) == 2  # one for each size; that of the folder before it changed is gone


def test_a_damaged_cache_is_made_anew(tmp_path, user_cache):
    for value in range(3):
        write_image(tmp_path / f"{value}.png", value, mode="L")
    ImageDataset(tmp_path)
    (store,) = user_cache.glob("*.pth")
    store.write_bytes(store.read_bytes()[:100])
    assert first_pixels(ImageDataset(tmp_path)) == first_pixels(ImageDataset(tmp_path)) == [0, 1, 2]


def test_a_file_that_cannot_be_read_now_is_looked_at_again(tmp_path, monkeypatch):
    for value in range(3):
        write_image(tmp_path / f"{value}.png", value, mode="L")
    with monkeypatch.context() as patch:
        def fail(path, **_):
            if path.name == "1.png":
                raise PermissionError(13, "Permission denied")
            return open_image(path)
        open_image = Image.open
        patch.setattr(Image, "open", fail)
        assert ImageDataset(tmp_path).report.skipped == {"cannot be read: Permission denied": ["1.png"]}
    assert first_pixels(ImageDataset(tmp_path)) == [0, 1, 2]


def test_what_another_start_writes_meanwhile_is_left_alone(tmp_path, user_cache):
    for name in "ab":
        write_image(tmp_path / f"{name}.png", 7, mode="L")
    ImageDataset(tmp_path)
    (store,) = user_cache.glob("*.pth")
    content = store.read_bytes()
    with atomic_file(store) as file:
        store.unlink()
        assert first_pixels(ImageDataset(tmp_path)) == [7, 7]  # and writes the same file
        file.write(content)
    assert first_pixels(ImageDataset(tmp_path)) == [7, 7]


@pytest.mark.parametrize("cache", [False, True])
def test_it_works_without_the_cache(tmp_path, user_cache, cache):
    for value in range(3):
        write_image(tmp_path / f"{value}.png", value, mode="L")
    if cache:
        user_cache.touch()  # where the folder of the cache would have to be
    assert first_pixels(ImageDataset(tmp_path, cache=cache)) == [0, 1, 2]
    assert not user_cache.is_dir()


@settings(max_examples=60, deadline=None)
@given(files=st.lists(st.one_of(
    st.binary(max_size=300),
    st.builds(lambda mode, width, height, jpeg, cut: (mode, width, height, jpeg, cut),
              st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"]), st.integers(1, 60), st.integers(1, 60),
              st.booleans(), st.integers(0, 400))), min_size=1, max_size=6),
    channels=st.sampled_from([1, 3]), fit=st.sampled_from(["crop", "pad", "squash"]))
def test_whatever_a_folder_holds_the_good_images_come_out(files, channels, fit):
    with tempfile.TemporaryDirectory() as folder:
        for i, content in enumerate(files):
            if not isinstance(content, bytes):
                mode, width, height, jpeg, cut = content
                jpeg = jpeg and mode in ("1", "L", "RGB", "CMYK")
                buffer = io.BytesIO()
                Image.new("L" if mode == "CMYK" and not jpeg else mode, (width, height)).save(buffer, "JPEG" if jpeg else "PNG")
                content = buffer.getvalue()[:-cut or None] if cut > 200 else buffer.getvalue()
            Path(folder, f"{i}.png").write_bytes(content)
        good = sum(not isinstance(content, bytes) and content[-1] <= 200 for content in files)
        try:
            data = ImageDataset(folder, image_size=12, channels=channels, fit=fit)
        except ValueError as error:
            assert "at least 2 are needed" in str(error) and good < 2
        else:
            assert data[:].shape == (data.report.kept, channels, 12, 12) and data.report.kept >= good
            assert data[:].min() >= -1 and data[:].max() <= 1


@pytest.mark.parametrize("arguments, message", [
    ({"image_size": 7}, "image_size 7"), ({"channels": 2}, "channels 2"), ({"max_images": 0}, "max_images 0"),
    ({"fit": "stretch"}, "fit 'stretch': choose from crop, pad, squash"), ({"background": "whyte"}, "whyte")])
def test_bad_arguments_are_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        ImageDataset(tmp_path, **arguments)


@pytest.mark.parametrize("folder", [MNIST, MNIST.parent / "MNIST" / ".." / "MNIST"])
def test_a_folder_of_idx_files_is_told_to_pass_the_file(folder):
    with pytest.raises(FileNotFoundError, match="pass the IDX file itself: ") as error:
        ImageDataset(folder)
    named = str(error.value).split("itself: ")[1]
    assert len(ImageDataset(named)) == 60_000


def test_a_home_folder_may_be_written_as_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    write_idx(tmp_path / "images-idx3-ubyte", np.full((3, 8, 8), 7, np.uint8))
    assert first_pixels(ImageDataset("~/images-idx3-ubyte", image_size=8)) == [7, 7, 7]


def test_the_labels_of_an_idx_file_are_named_by_their_numbers(tmp_path):
    assert ImageDataset(MNIST / "t10k-images-idx3-ubyte.gz", max_images=3).classes == list("0123456789")
    write_idx(tmp_path / "letters-images-idx3-ubyte", np.zeros((4, 8, 8), np.uint8))  # EMNIST counts from 1
    write_idx(tmp_path / "letters-labels-idx1-ubyte", np.array([2, 26, 1, 2], np.uint8))
    letters = ImageDataset(tmp_path / "letters-images-idx3-ubyte", image_size=8)
    assert letters.classes == ["1", "2", "26"] and letters.labels.tolist() == [1, 2, 0, 1]


@pytest.mark.parametrize("name, options", [("a.webp", {"lossless": True}), ("a.bmp", {}), ("a.TIF", {}), ("a.tiff", {}),
                                           ("a.gif", {}), ("a.jfif", {"quality": 100}), ("a.jpe", {"quality": 100})])
def test_other_formats_are_read(tmp_path, name, options):
    Image.new("L", (8, 8), 200).save(tmp_path / name, format={".jfif": "JPEG", ".jpe": "JPEG"}.get(
        Path(name).suffix), **options)
    write_image(tmp_path / "b.png", 7, mode="L")
    assert first_pixels(ImageDataset(tmp_path, image_size=8)) == [200, 7]


@pytest.mark.skipif(sys.platform != "linux", reason="such names are of Linux")
def test_names_that_cannot_be_printed_are_shown_escaped(tmp_path, capsys):
    write_image(tmp_path / "a.png", 7, mode="L")
    write_image(tmp_path / "b.png", 7, mode="L")
    for name in (b"\xff.png", b"new\nline.png", b"l" * 200 + b".png"):
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            file.write(b"no image")
    ImageDataset(tmp_path, image_size=8)
    printed = capsys.readouterr().out
    printed.encode("utf-8")  # fails on a lone half of a pair
    assert r"new\nline.png" in printed and r"\udcff.png" in printed and "l" * 70 not in printed


# The test set beside it

def test_the_test_set_beside_a_training_set_is_found(tmp_path, monkeypatch):
    found = find_test_set(MNIST / "train-images-idx3-ubyte.gz")
    assert found == MNIST / "t10k-images-idx3-ubyte.gz" and len(ImageDataset(found)) == 10_000
    assert find_test_set(found) is None
    for name in ("train", "test", "letters-train-images", "letters-test-images", "alone-train"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert find_test_set("~/train/") == tmp_path / "test"
    assert find_test_set(str(tmp_path / "letters-train-images")) == tmp_path / "letters-test-images"
    for name in ("test", "alone-train", "nowhere"):
        assert find_test_set(tmp_path / name) is None


def test_a_test_set_that_cannot_be_read_is_said_and_not_used(tmp_path, capsys):
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
    assert read_test_set(tmp_path / "train") is None
    said = capsys.readouterr().out
    assert "the test set beside the images is not used: no images under" in said and "test" in said
    for number in range(2):
        Image.new("RGB", (9, 9), (0, 255 * number, 0)).save(tmp_path / "test" / f"{number}.png")
    found = read_test_set(tmp_path / "train", [8, 12], 3)
    assert found[:].shape == (2, 3, 8, 12) and found[1][:, 0, 0].tolist() == [-1, 1, -1]
    assert read_test_set(tmp_path / "test") is None


def test_few_images_of_a_folder_are_of_all_its_classes(tmp_path):
    """The first two of three classes, by turns; of a class that has one, that one."""
    for name, count in (("a", 5), ("b", 1), ("c", 3)):
        (tmp_path / name).mkdir()
        for number in range(count):
            Image.new("L", (8, 8), 50 * number + ord(name)).save(tmp_path / name / f"{number}.png")
    data = ImageDataset(tmp_path, 8, max_images=5)
    assert data.classes == ["a", "b", "c"] and data.labels.tolist() == [0, 1, 2, 0, 2]
    grey = [ord("a"), ord("b"), ord("c"), 50 + ord("a"), 50 + ord("c")]
    assert data.pixels[:, 0, 0, 0].tolist() == grey
    assert ImageDataset(tmp_path, 8, max_images=9).labels.tolist() == [0] * 5 + [1] + [2] * 3  # all: by path
