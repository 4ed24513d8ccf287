"""Images on disk -> uint8 pixels -> tensors in [-1, 1], and back to pixels."""

import gzip
import math
import os
import sys
import zlib
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as transforms
from torchvision.utils import make_grid

from image_folder import (FIT_METHODS, MODES, NOT_READ, READ, FolderReport,
                          PixelSettings, bit_depth, decode, extension, fit_image,
                          read_folder)


def to_image(x: Tensor) -> Tensor:
    """Float images in [-1, 1] -> uint8 pixels of this shape, clamped and rounded."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def image_grid(x: Tensor, columns: int, scale: int = 2,
               names: Sequence[str] = ()) -> Image.Image:
    """One picture of a batch x (B, C, H, W) in [-1, 1], row by row.

    Each pixel is drawn as a square of `scale` x `scale` pixels. names: of the images,
    which are written below them.
    """
    height, width = x.shape[-2:]
    below = 10 if names else 0
    tiles = transforms.pad(to_image(x.cpu()), [0, 0, 0, below], fill=128)
    grid = make_grid(tiles, nrow=columns, pad_value=128)
    picture = transforms.to_pil_image(grid)
    size = (picture.width * scale, picture.height * scale)
    picture = picture.resize(size, Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(picture)
    for i, name in enumerate(names):
        row, column = divmod(i, columns)  # make_grid puts 2 pixels between the tiles
        middle = 1 + (column + 0.5) * (width + 2), row * (height + below + 2) + height + 6
        pen.text([scale * at for at in middle], name, "white", anchor="mm",
                 font_size=scale * min(9, 1.7 * width / len(name)))
    return picture


def show_table(rows: list[list[Tensor]], row_names: list[str],
               column_names: list[str]) -> None:
    """Shows a table; each entry, a batch (B, C, H, W) in [-1, 1], is a square of it."""
    _, axes = plt.subplots(len(rows), len(column_names), squeeze=False,
                           figsize=(9, 9 * len(rows) / len(column_names)))
    for row, batches, name in zip(axes, rows, row_names):
        row[0].set_ylabel(name)
        for axis, batch in zip(row, batches):
            axis.imshow(image_grid(batch, columns=math.ceil(len(batch)**0.5)))
            axis.set(xticks=[], yticks=[])
    for axis, name in zip(axes[0], column_names):
        axis.set_title(name, fontsize=9)
    plt.show()


# An IDX file

def read_idx(path: str | os.PathLike) -> Tensor:
    """Reads a file of unsigned bytes in MNIST's format IDX, gzipped or not.

    -> uint8, (N, H, W) for images, (N,) for labels. Raises ValueError where the file is
    no such file, or cut short.
    """
    content = Path(path).read_bytes()
    try:
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path}: a damaged gzip file; copy it again") from error
    if (len(content) < 4 or content[:3] != b"\0\0\x08"  # 0, 0, type; dimensions
            or len(content) < 4 * (1 + content[3])):
        raise ValueError(f"{path}: not an IDX file of unsigned bytes; "
                         "pass an IDX file or a folder of images")
    shape = np.frombuffer(content, ">u4", count=content[3], offset=4).tolist()
    pixels = np.frombuffer(content, np.uint8, offset=4 * (1 + len(shape)))
    if pixels.size != math.prod(shape):
        raise ValueError(f"{path}: {pixels.size} bytes of data where its header says "
                         f"{shape}; copy it again")
    return torch.from_numpy(pixels.reshape(shape).copy())


def find_labels(path: Path) -> Path | None:
    """The labels beside an IDX file of images, if they are there.

    train-images-idx3-ubyte.gz -> train-labels-idx1-ubyte.gz
    """
    images = path.name.removesuffix(".gz")
    name = images.replace("images", "labels").replace("idx3", "idx1")
    if name == images:
        return None
    beside = (path.with_name(name), path.with_name(name + ".gz"))
    return next((file for file in beside if file.is_file()), None)


def find_test_set(path: str | os.PathLike) -> Path | None:
    """The test set beside a training set, a file or folder, if it is there.

    train-images-idx3-ubyte.gz -> t10k-images-idx3-ubyte.gz; faces/train -> faces/test
    """
    path = Path(os.path.expanduser(path))
    names = [path.name.replace("train", name) for name in ("t10k", "test")]
    return next((path.with_name(name) for name in names
                 if name != path.name and path.with_name(name).exists()), None)


def read_idx_images(path: Path, settings: PixelSettings,
                    max_images: int | None) -> dict:
    """An IDX file and the labels beside it, as `read_folder` gives a folder."""
    images, labels, classes = read_idx(path), None, []
    if images.ndim != 3 or not len(images):
        raise ValueError(f"{path}: holds data of shape {tuple(images.shape)}; "
                         "images are (N, H, W)")
    labels_path = find_labels(path)
    if labels_path is not None:
        labels = read_idx(labels_path)
        if labels.shape != images.shape[:1]:
            raise ValueError(f"{labels_path}: labels of shape {tuple(labels.shape)} "
                             f"for {len(images)} images of {path}")
        numbers, labels = labels.unique(return_inverse=True)
        classes = [str(number) for number in numbers.tolist()]
        labels = labels[:max_images].repeat_interleave(1 + settings.flip).tolist()
    pixels = images[:max_images, None].expand(-1, settings.channels, -1, -1)
    if images.shape[1:] != (settings.height, settings.width):
        fitted = [fit_image(transforms.to_pil_image(image), settings) for image in pixels]
        pixels = torch.stack([transforms.pil_to_tensor(image) for image in fitted])
    if settings.flip:
        pixels = torch.stack([pixels, pixels.flip(-1)], dim=1).flatten(0, 1)
    return {"pixels": pixels.contiguous(), "labels": labels, "classes": classes}


# The data set

def is_whole(value: object, least: int) -> bool:
    """Whether a value is a whole number, of Python or numpy, and at least `least`."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    return whole and value >= least


def checked_settings(image_size: int | tuple[int, int], channels: int, fit: str,
                     background: str, flip: bool) -> PixelSettings:
    """The arguments of ImageDataset; raises ValueError that names a bad value."""
    pair = image_size if isinstance(image_size, (tuple, list)) else [image_size] * 2
    if len(pair) != 2 or not all(is_whole(side, 8) for side in pair):
        raise ValueError(f"image_size {image_size!r}: must be a whole number of at "
                         "least 8 pixels, or a pair (height, width) of them")
    if not (is_whole(channels, 1) and channels in MODES):
        raise ValueError(f"channels {channels!r}: must be 1 for grey or 3 for colour")
    if fit not in FIT_METHODS:
        raise ValueError(f"fit {fit!r}: choose from {', '.join(FIT_METHODS)}")
    try:
        ImageColor.getrgb(background)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"background {background!r}: no colour that Pillow knows; "
                         "try 'black' or '#808080'") from error
    height, width = map(int, pair)
    return PixelSettings(height, width, int(channels), fit, background, bool(flip))


class ImageDataset(Dataset):
    """Images as float tensors in [-1, 1].

    path: a folder, searched recursively for images (PNG, JPEG, WebP, BMP, TIFF, AVIF,
        and the first frame of a GIF), sorted by path; or one IDX file of images,
        gzipped or not, with its labels beside it. `~` is the home folder.
    image_size: height and width in pixels, one number or a pair, each at least 8.
    channels: 1 for grey, 3 for colour; images of the other kind are converted.
    max_images: keep only so many (None: all): the first of an IDX file, and of a folder
        the first of each subfolder, then the second of each, and so on.
    fit: how an image of another shape gets into the size: "crop" to its centre, "pad"
        with `background`, or "squash".
    background: the colour under transparent pixels and around padded images.
    flip: follow every image with its mirror image, left to right.
    strict: raise ValueError where a file of a folder has to be left out.
    cache: keep what a folder decoded to in the user's cache folder; a changed folder is
        decoded anew.
    with_labels: give pairs (image, label), also to a DataLoader.

    pixels: uint8 (N, C, H, W), decoded once.
    labels: int64 (N,), those beside an IDX file, or the first subfolders where every
        image of a folder is in one; else None. classes: their names, in order; the
        label i is that of classes[i].
    report: what was found in a folder, also printed; None for an IDX file.
    data[i] -> (C, H, W) float32; data[slice] and data[tensor of B indices] ->
    (B, C, H, W), in one operation.
    Raises FileNotFoundError where the path or images in it are missing; ValueError for
    a bad value, a damaged IDX file, missing labels, or a folder with fewer
    than two usable images.
    """

    def __init__(self, path: str | os.PathLike, image_size: int | tuple[int, int] = 28,
                 channels: int = 1, max_images: int | None = None, *, fit: str = "crop",
                 background: str = "white", flip: bool = False, strict: bool = False,
                 cache: bool = True, with_labels: bool = False):
        settings = checked_settings(image_size, channels, fit, background, flip)
        if max_images is not None and not is_whole(max_images, 1):
            raise ValueError(f"max_images {max_images!r}: must be a whole number of at "
                             "least 1, or None for all")
        max_images = None if max_images is None else int(max_images)
        path, self.report = Path(os.path.expanduser(path)), None
        if os.path.isdir(path):
            content = read_folder(path, settings, max_images, cache)
            self.report = FolderReport(**content["report"])
            encoding = sys.stdout.encoding or "utf-8"  # may lack letters of a name
            text = str(self.report).encode(encoding, "backslashreplace")
            print(text.decode(encoding))
            if strict and self.report.skipped:
                raise ValueError(f"{path}: strict, and not every file is an image\n"
                                 f"{self.report}")
        elif os.path.isfile(path):
            content = read_idx_images(path, settings, max_images)
        else:
            raise FileNotFoundError(f"{path}: no such folder or file; "
                                    "pass a folder of images or an IDX file")
        self.pixels, self.classes = content["pixels"], content["classes"]
        labels = content["labels"]
        if with_labels and labels is None:
            raise ValueError(f"{path}: with_labels, but there are none; put the images "
                             "of each class into a subfolder")
        self.labels = None if labels is None else torch.tensor(labels)
        self.with_labels = with_labels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int | slice | Tensor) -> Tensor | tuple:
        images = self.pixels[index].float() / 127.5 - 1
        return (images, self.labels[index]) if self.with_labels else images


def read_test_set(path: str | os.PathLike, image_size: int | tuple[int, int] = 28,
                  channels: int = 1) -> ImageDataset | None:
    """The images of the test set beside a training set, see `find_test_set`.

    None where there is none, and, with a line that says why, where it cannot be read.
    """
    test_path = find_test_set(path)
    try:
        return test_path and ImageDataset(test_path, image_size, channels)
    except (OSError, ValueError) as error:
        print(f"the test set beside the images is not used: {error}")


def read_images(path: str | os.PathLike, image_size: int | tuple[int, int] = 28,
                channels: int = 1, max_images: int | None = None,
                ) -> tuple[Tensor, Tensor | None, list[str]]:
    """The first images of what ImageDataset takes, or a single image file, to work on.

    -> images (N, C, H, W) float32 in [-1, 1]; labels (N,) int64 or None; their classes.
    Raises what ImageDataset raises, and ValueError for a file that is no usable image.
    """
    path = Path(os.path.expanduser(path))
    if not (path.is_file() and extension(path.name) in READ + NOT_READ):
        data = ImageDataset(path, image_size, channels, max_images)
        return data[:], data.labels, data.classes
    settings = checked_settings(image_size, channels, "crop", "white", False)
    pixels, record = decode(path.name, path.parent, settings, 16)
    if (bits := bit_depth([record])) < 16:  # again at its own depth, 12 for instance
        pixels, record = decode(path.name, path.parent, settings, bits)
    if pixels is None:
        raise ValueError(f"{path}: {record.reason}; save it anew as a PNG file")
    return torch.from_numpy(pixels.copy())[None].float() / 127.5 - 1, None, []
