"""Images on disk -> uint8 pixels, decoded once -> tensors in [-1, 1], and back to pixels."""

import gzip
import math
import os
import zlib
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image, ImageColor
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as transforms
from torchvision.utils import make_grid

from image_folder import FIT_METHODS, MODES, FolderReport, PixelSettings, fit_image, read_folder


def to_image(x: Tensor) -> Tensor:
    """Float images in [-1, 1] -> uint8 pixels in 0 ... 255 of the same shape, clamped and rounded."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def image_grid(x: Tensor, columns: int, scale: int = 2) -> Image.Image:
    """One picture of a batch: x (B, C, H, W) in [-1, 1], row by row, each pixel drawn as scale x scale pixels."""
    grid = transforms.to_pil_image(make_grid(to_image(x.cpu()), nrow=columns, pad_value=128))
    return grid.resize((grid.width * scale, grid.height * scale), Image.Resampling.NEAREST)


def show_table(rows: list[list[Tensor]], row_names: list[str], column_names: list[str]) -> None:
    """Shows a table of pictures: each entry is a batch (B, C, H, W) in [-1, 1], drawn as a square."""
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
    """Reads a file of unsigned bytes in the IDX format of MNIST (LeCun and Cortes), gzipped or not.

    -> uint8, (N, H, W) for images, (N,) for labels. Raises ValueError where the file is no such file, or cut short.
    """
    content = Path(path).read_bytes()
    try:
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path}: a damaged gzip file; copy it again") from error
    if len(content) < 4 or content[:3] != b"\0\0\x08" or len(content) < 4 * (1 + content[3]):  # 0, 0, type, dimensions
        raise ValueError(f"{path}: not an IDX file of unsigned bytes; pass an IDX file or a folder of images")
    shape = np.frombuffer(content, ">u4", count=content[3], offset=4).tolist()
    pixels = np.frombuffer(content, np.uint8, offset=4 * (1 + len(shape)))
    if pixels.size != math.prod(shape):
        raise ValueError(f"{path}: {pixels.size} bytes of data where its header says {shape}; copy it again")
    return torch.from_numpy(pixels.reshape(shape).copy())


def find_labels(path: Path) -> Path | None:
    """The labels beside an IDX file of images: train-images-idx3-ubyte.gz -> train-labels-idx1-ubyte.gz, if it is there."""
    name = path.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    if name == path.name.removesuffix(".gz"):
        return None
    return next((file for file in (path.with_name(name), path.with_name(name + ".gz")) if file.is_file()), None)


def read_idx_images(path: Path, settings: PixelSettings, max_images: int | None) -> dict:
    """An IDX file of images and the labels beside it, as `decode_folder` gives a folder."""
    images, labels, classes = read_idx(path), None, []
    if images.ndim != 3 or not len(images):
        raise ValueError(f"{path}: holds data of shape {tuple(images.shape)}; images are (N, H, W)")
    labels_path = find_labels(path)
    if labels_path is not None:
        labels = read_idx(labels_path)
        if labels.shape != images.shape[:1]:
            raise ValueError(f"{labels_path}: labels of shape {tuple(labels.shape)} for {len(images)} images of {path}")
        classes = [str(number) for number in range(int(labels.max()) + 1)]
        labels = labels[:max_images].repeat_interleave(1 + settings.flip).tolist()
    images = images[:max_images]
    if images.shape[1:] != (settings.height, settings.width):
        fitted = [np.asarray(fit_image(Image.fromarray(image), settings)) for image in images.numpy()]
        images = torch.from_numpy(np.stack(fitted))
    pixels = images[:, None].expand(-1, settings.channels, -1, -1)
    if settings.flip:
        pixels = torch.stack([pixels, pixels.flip(-1)], dim=1).flatten(0, 1)
    return {"pixels": pixels.contiguous(), "labels": labels, "classes": classes}


class ImageDataset(Dataset):
    """Images as float tensors in [-1, 1].

    path: a folder, searched recursively for images (PNG, JPEG, WebP, BMP, TIFF, and the first frame of a GIF), by
        their extensions in any letter case, sorted by path, without what begins with a dot; or one IDX file of
        images, gzipped or not, with its labels beside it.
    image_size: height and width in pixels, one number for both or a pair, each at least 8.
    channels: 1 for grey, 3 for colour; images of the other kind are converted.
    max_images: keep only the first so many (None: all).
    fit: how an image of another shape gets into the size: "crop" to its centre, "pad" with `background`, or "squash".
    background: the colour under transparent pixels and around padded images, by any name that Pillow knows.
    flip: follow every image with its mirror image, left to right.
    strict: raise ValueError where a file of a folder has to be left out, instead of reporting it.
    cache: keep what a folder decoded to in `.pixels` in it, for the next start; a changed folder is decoded anew.

    All pixels are decoded once, into `pixels`, uint8 (N, C, H, W). `labels`, int64 (N,), are those beside an IDX file, or
    the first subfolders, named in `classes`, where every image of a folder is in one; else None. `report` is a folder's
    FolderReport, which is printed, too.
    data[i] -> (C, H, W) float32; data[slice] and data[tensor of B indices] -> (B, C, H, W), in one operation.
    Raises FileNotFoundError where the path or images in it are missing; ValueError for a bad value, a damaged IDX file, or
    fewer than two usable images in a folder.
    """

    def __init__(self, path: str | os.PathLike, image_size: int | tuple[int, int] = 28, channels: int = 1,
                 max_images: int | None = None, *, fit: str = "crop", background: str = "white", flip: bool = False,
                 strict: bool = False, cache: bool = True):
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if min(height, width) < 8:
            raise ValueError(f"image_size {image_size}: must be at least 8 pixels")
        if channels not in MODES:
            raise ValueError(f"channels {channels}: must be 1 for grey or 3 for colour")
        if max_images is not None and max_images < 1:
            raise ValueError(f"max_images {max_images}: must be at least 1, or None for all")
        if fit not in FIT_METHODS:
            raise ValueError(f"fit {fit!r}: choose from {', '.join(FIT_METHODS)}")
        ImageColor.getrgb(background)  # raises ValueError for what is no colour
        path, settings = Path(path).expanduser(), PixelSettings(height, width, channels, fit, background, flip)
        if path.is_dir():
            content = read_folder(path, settings, max_images, cache)
            self.report = FolderReport(**content["report"])
            print(self.report)
            if strict and self.report.skipped:
                raise ValueError(f"{path}: strict, and not every file is an image\n{self.report}")
        elif path.is_file():
            content = read_idx_images(path, settings, max_images)
            self.report = None
        else:
            raise FileNotFoundError(f"{path}: no such folder or file; pass a folder of images or an IDX file")
        self.pixels, self.classes = content["pixels"], content["classes"]
        self.labels = None if content["labels"] is None else torch.tensor(content["labels"])

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int | slice | Tensor) -> Tensor:
        return self.pixels[index].float() / 127.5 - 1
