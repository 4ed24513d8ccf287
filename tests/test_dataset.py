import gzip
import hashlib
import re
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataset_loader import ImageDataset, image_grid, read_idx, to_image

ROOT = Path(__file__).parents[1]
MNIST = ROOT / "Assets" / "MNIST"
MD5 = {
    "train-images-idx3-ubyte.gz": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte.gz": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte.gz": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte.gz": "27ae3e4e09519cfbb04c329615203637",
}


def write_image(path, value, size=(10, 10), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)


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
    assert data.labels is None if labels is None else data.labels.tolist() == [3, 1, 4, 1, 5]


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

def test_folder_is_searched_recursively_in_a_fixed_order(tmp_path):
    for value, name in enumerate(["a.png", "b/z.png", "b/é 数字.PNG", "c.JPG", "d.jpeg"]):
        write_image(tmp_path / name, (value, value, value))
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "folder.png").mkdir()
    data = ImageDataset(tmp_path, channels=3)
    assert data.pixels.shape == (5, 3, 28, 28) and data.labels is None
    assert data.pixels[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]


def test_grey_and_colour(tmp_path):
    write_image(tmp_path / "red.png", (255, 0, 0))
    write_image(tmp_path / "white.png", 255, mode="L")
    colour, grey = ImageDataset(tmp_path, channels=3), ImageDataset(tmp_path, channels=1)
    assert colour[0][:, 0, 0].tolist() == [1, -1, -1] and colour[1][:, 0, 0].tolist() == [1, 1, 1]
    assert grey.pixels[:, 0, 0, 0].tolist() == [76, 255]  # ITU-R 601: 0.299 * 255


def test_transparency_is_white_and_16_bit_grey_keeps_its_shades(tmp_path):
    write_image(tmp_path / "a.png", (0, 0, 0, 0), mode="RGBA")
    Image.fromarray(np.full((10, 10), 200 * 256 + 17, np.uint16)).save(tmp_path / "b.png")
    assert ImageDataset(tmp_path).pixels[:, 0, 0, 0].tolist() == [255, 200]


def test_other_sizes_are_cropped_in_the_centre_and_resized(tmp_path):
    image = Image.new("RGB", (60, 20), (0, 0, 255))
    image.paste((0, 255, 0), (20, 0, 40, 20))
    image.save(tmp_path / "wide.png")
    data = ImageDataset(tmp_path, image_size=16, channels=3)
    assert (data.pixels[0, 1, :, 1:-1] == 255).all() and (data.pixels[0, 2, :, 1:-1] == 0).all()


def test_corrupt_files_are_named_in_one_message_and_no_good_one_is_lost(tmp_path):
    for value in range(4):
        write_image(tmp_path / f"{value}.png", (value, value, value), size=(40, 40))
    whole = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "2.png").write_text("hello")
    with pytest.warns(UserWarning) as caught:
        data = ImageDataset(tmp_path, channels=3)
    assert len(caught) == 1
    message = str(caught[0].message)
    assert message.startswith("2 of 4 images cannot be read") and "1.png" in message and "2.png" in message
    assert data.pixels[:, 0, 0, 0].tolist() == [0, 3]


def test_nothing_to_read_is_an_error_that_names_the_place(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no readable .png, .jpg or .jpeg under {re.escape(str(tmp_path))}"):
        ImageDataset(tmp_path)
    with pytest.raises(FileNotFoundError, match="missing: no such folder or file"):
        ImageDataset(tmp_path / "missing")


@pytest.mark.parametrize("arguments, message", [
    ({"image_size": 7}, "image_size 7"), ({"channels": 2}, "channels 2"), ({"max_images": 0}, "max_images 0")])
def test_bad_arguments_are_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        ImageDataset(tmp_path, **arguments)
