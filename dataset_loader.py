"""Images on disk -> uint8 pixels, decoded once -> tensors in [-1, 1], and back to pixels."""

import gzip
import math
import os
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as transforms
from torchvision.utils import make_grid

EXTENSIONS = (".png", ".jpg", ".jpeg")
MODES = {1: "L", 3: "RGB"}  # Pillow's names for grey and colour


def to_image(x: Tensor) -> Tensor:
    """Float images in [-1, 1] -> uint8 pixels in 0 ... 255 of the same shape, clamped and rounded."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def image_grid(x: Tensor, columns: int, scale: int = 2) -> Image.Image:
    """One picture of a batch: x (B, C, H, W) in [-1, 1], row by row, each pixel drawn as scale x scale pixels."""
    grid = transforms.to_pil_image(make_grid(to_image(x.cpu()), nrow=columns, pad_value=128))
    return grid.resize((grid.width * scale, grid.height * scale), Image.Resampling.NEAREST)


def flatten(image: Image.Image) -> Image.Image:
    """The picture as a viewer shows it: turned upright (EXIF), 16-bit grey in 8 bits, transparency over white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image


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


class ImageDataset(Dataset):
    """Images as float tensors in [-1, 1].

    path: a folder, searched recursively for .png, .jpg and .jpeg in any letter case, sorted by path; or one IDX file of
        images, gzipped or not, with its labels beside it.
    image_size: height and width in pixels. Images of another size are cropped to a square in the centre and resized.
    channels: 1 for grey, 3 for colour; images of the other kind are converted.
    max_images: keep only the first so many (None: all).

    All pixels are decoded once, into `pixels`, uint8 (N, C, H, W). `labels` is int64 (N,), or None without a source.
    data[i] -> (C, H, W) float32; data[slice] and data[tensor of B indices] -> (B, C, H, W), in one operation.
    Raises FileNotFoundError where the path or images in it are missing, ValueError for a bad value or a damaged IDX file.
    Warns once, naming the files, where some images of a folder cannot be read; the others are all there.
    """

    def __init__(self, path: str | os.PathLike, image_size: int = 28, channels: int = 1, max_images: int | None = None):
        if image_size < 8:
            raise ValueError(f"image_size {image_size}: must be at least 8 pixels")
        if channels not in MODES:
            raise ValueError(f"channels {channels}: must be 1 for grey or 3 for colour")
        if max_images is not None and max_images < 1:
            raise ValueError(f"max_images {max_images}: must be at least 1, or None for all")
        path = Path(path)
        self.labels = None
        if path.is_dir():
            self.pixels = self._read_folder(path, image_size, channels, max_images)
        elif path.is_file():
            self.pixels = self._read_idx_images(path, image_size, channels, max_images)
        else:
            raise FileNotFoundError(f"{path}: no such folder or file; pass a folder of images or an IDX file")

    def _read_folder(self, folder: Path, image_size: int, channels: int, max_images: int | None) -> Tensor:
        files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in EXTENSIONS and file.is_file())
        images, bad = [], []
        for file in files:
            if len(images) == max_images:
                break
            try:
                with Image.open(file) as image:
                    image = flatten(image).convert(MODES[channels])
                    image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.LANCZOS)
                images.append(torch.from_numpy(np.array(image)).view(image_size, image_size, channels))
            except Exception as error:  # a damaged file can fail in any part of any decoder
                bad.append(f"{file} ({error})")
        if bad:
            warnings.warn(f"{len(bad)} of {len(files)} images cannot be read and are left out: {'; '.join(bad)}",
                          stacklevel=3)
        if not images:
            raise FileNotFoundError(f"no readable .png, .jpg or .jpeg under {folder}")
        return torch.stack(images).permute(0, 3, 1, 2).contiguous()

    def _read_idx_images(self, path: Path, image_size: int, channels: int, max_images: int | None) -> Tensor:
        images = read_idx(path)
        if images.ndim != 3 or not len(images):
            raise ValueError(f"{path}: holds data of shape {tuple(images.shape)}; images are (N, H, W)")
        labels_path = find_labels(path)
        if labels_path is not None:
            labels = read_idx(labels_path)
            if labels.shape != images.shape[:1]:
                raise ValueError(f"{labels_path}: labels of shape {tuple(labels.shape)} for {len(images)} images of {path}")
            self.labels = labels[:max_images].long()
        images = images[:max_images, None]
        if images.shape[-2:] != (image_size, image_size):
            square = transforms.center_crop(images, min(images.shape[-2:]))
            images = transforms.resize(square, [image_size, image_size], antialias=True)
        return images.repeat(1, channels, 1, 1)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int | slice | Tensor) -> Tensor:
        return self.pixels[index].float() / 127.5 - 1
