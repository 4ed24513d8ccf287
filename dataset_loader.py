"""Images on disk -> uint8 pixels, decoded once -> tensors in [-1, 1], and back to pixels."""

import gzip
import hashlib
import json
import math
import os
import statistics
import struct
import tempfile
import warnings
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as transforms
from torchvision.utils import make_grid
from tqdm.auto import tqdm

from checkpoint import atomic_file, remove_leftovers

EXTENSIONS = (".png", ".jpg", ".jpeg")
FORMATS = ("PNG", "JPEG")  # all that Pillow may open, whatever a file calls itself
MODES = {1: "L", 3: "RGB"}  # Pillow's names for grey and colour
FITS = {
    "crop": lambda image, size, background: ImageOps.fit(image, size, Image.Resampling.LANCZOS),
    "pad": lambda image, size, background: ImageOps.pad(image, size, Image.Resampling.LANCZOS, color=background),
    "squash": lambda image, size, background: image.resize(size, Image.Resampling.LANCZOS),
}
CACHE = ".pixels"  # the folder, inside a folder of images, that keeps what was decoded
VERSION = 1  # of what is kept: another one whenever the same files would give other pixels or another report


def to_image(x: Tensor) -> Tensor:
    """Float images in [-1, 1] -> uint8 pixels in 0 ... 255 of the same shape, clamped and rounded."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def image_grid(x: Tensor, columns: int, scale: int = 2) -> Image.Image:
    """One picture of a batch: x (B, C, H, W) in [-1, 1], row by row, each pixel drawn as scale x scale pixels."""
    grid = transforms.to_pil_image(make_grid(to_image(x.cpu()), nrow=columns, pad_value=128))
    return grid.resize((grid.width * scale, grid.height * scale), Image.Resampling.NEAREST)


class Look(NamedTuple):
    """How the pixels of an image are to be made; the arguments of ImageDataset by these names."""
    height: int
    width: int
    channels: int
    fit: str
    background: str
    flip: bool


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


def read_idx_images(path: Path, look: Look, max_images: int | None) -> dict:
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
        labels = labels[:max_images].repeat_interleave(1 + look.flip).tolist()
    images = images[:max_images]
    if images.shape[1:] != (look.height, look.width):
        fit, size = FITS[look.fit], (look.width, look.height)
        fitted = [np.asarray(fit(Image.fromarray(image), size, look.background)) for image in images.numpy()]
        images = torch.from_numpy(np.stack(fitted))
    pixels = images[:, None].expand(-1, look.channels, -1, -1)
    if look.flip:
        pixels = torch.stack([pixels, pixels.flip(-1)], dim=1).flatten(0, 1)
    return {"pixels": pixels.contiguous(), "labels": labels, "classes": classes}


# A folder of images

UNREADABLE = "cannot be read"  # the fault of the disk or of rights, not of the image


class Found(NamedTuple):
    """What one file turned out to be: `reason` says why it cannot be used, and is empty if it can."""
    name: str
    reason: str
    size: tuple[int, int] = (0, 0)
    mode: str = ""
    colourful: bool = False
    digest: bytes = b""


@dataclass
class FolderReport:
    """What was found in a folder; as text, a short report.

    found, kept: files looked at, and those that became images. skipped: reason -> the names of the others.
    sizes, modes: "width x height" and Pillow's mode -> how many of the kept. duplicates: kept files equal to an earlier one.
    channels, image_size: proposed: 3 where any image has colour; the usual shorter side as a multiple of 4, at most 64.
    """
    found: int
    kept: int
    skipped: dict[str, list[str]]
    sizes: dict[str, int]
    modes: dict[str, int]
    duplicates: int
    channels: int
    image_size: int

    @classmethod
    def of(cls, files: list[Found]) -> "FolderReport":
        kept = [file for file in files if not file.reason]
        skipped = {reason: [file.name for file in files if file.reason == reason]
                   for reason in sorted({file.reason for file in files} - {""})}
        side = int(statistics.median(min(file.size) for file in kept)) if kept else 0
        return cls(len(files), len(kept), skipped, dict(Counter("{} x {}".format(*file.size) for file in kept)),
                   dict(Counter(file.mode for file in kept)), len(kept) - len({file.digest for file in kept}),
                   3 if any(file.colourful for file in kept) else 1, min(64, max(8, side // 4 * 4)))

    def __str__(self) -> str:
        def most(counts):
            named = ", ".join(f"{name} ({count})" for name, count in Counter(counts).most_common(3))
            return named + ", ..." * (len(counts) > 3)
        return "\n".join([
            f"{self.kept} of {self.found} images kept, {self.duplicates} of them duplicates",
            *[f"{len(names)} left out, {reason}: {', '.join(names[:3])}{', ...' * (len(names) > 3)}"
              for reason, names in self.skipped.items()],
            f"sizes: {most(self.sizes)}; modes: {most(self.modes)}",
            f"proposed: channels={self.channels}, image_size={self.image_size}"])


def image_files(folder: Path) -> list[str]:
    """The names, from `folder` on and sorted, of all files in it and below with the extension of an image.

    Links are followed, but into no folder twice. Raises OSError where a folder cannot be read.
    """
    def stop(error):
        raise error

    visited, files = set(), []
    for root, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        if os.path.realpath(root) in visited:
            folders.clear()
            continue
        visited.add(os.path.realpath(root))
        folders.sort()
        within = os.path.relpath(root, folder)
        files += [os.path.normpath(os.path.join(within, name)) for name in names if name.lower().endswith(EXTENSIONS)]
    return sorted(files)


def stamp(file: str) -> tuple[int, int, int] | None:
    """Size and times of a file, which change with it and its rights; None where it is not there (a broken link)."""
    try:
        stat = os.stat(file)
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def flatten(image: Image.Image, background: str) -> Image.Image:
    """The picture as a viewer shows it: turned upright (EXIF), 16-bit grey in 8 bits, transparency over `background`."""
    with suppress(SyntaxError, struct.error):  # of a header that is no EXIF: viewers show the picture as it is
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image.convert("RGBA"))
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def decode(name: str, folder: Path, look: Look) -> tuple[np.ndarray | None, Found]:
    """The pixels of one file, uint8 (C, H, W), or None, and what it turned out to be."""
    file = folder / name
    try:
        with Image.open(file, formats=FORMATS) as image:
            size, mode = image.size, image.mode
            small = FITS[look.fit](flatten(image, look.background), (look.width, look.height), look.background)
        colourful = np.ptp(np.asarray(small.convert("RGB")), axis=2).max() > 8  # JPEG tints grey a little
        pixels = np.asarray(small.convert(MODES[look.channels])).reshape(look.height, look.width, look.channels)
        digest = hashlib.blake2b(file.read_bytes()).digest()
        return pixels.transpose(2, 0, 1), Found(name, "", size, mode, bool(colourful), digest)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        return None, Found(name, f"more than {Image.MAX_IMAGE_PIXELS} pixels")
    except UnidentifiedImageError:
        return None, Found(name, "neither PNG nor JPEG")
    except OSError as error:
        return None, Found(name, f"{UNREADABLE}: {error.strerror}" if error.errno else "damaged")
    except MemoryError:
        raise
    except Exception:  # a damaged file can fail in any part of any decoder
        return None, Found(name, "damaged")


def decode_all(folder: Path, names: list[str], look: Look, max_images: int | None, out: BinaryIO) -> list[Found]:
    """Decodes files on all cores and writes the pixels to `out`, image after image, in the order of the names."""
    found, room = [], max_images or len(names)
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        results = pool.map(partial(decode, folder=folder, look=look), names)
        try:
            for pixels, file in tqdm(results, total=len(names), desc="decoding", unit=" images", leave=False):
                found.append(file)
                if pixels is not None:
                    out.write(pixels.tobytes())
                    if look.flip:
                        out.write(pixels[:, :, ::-1].tobytes())
                    room -= 1
                if not room:
                    break
        finally:
            pool.shutdown(cancel_futures=True)
    return found


def class_labels(names: list[str]) -> tuple[list[int] | None, list[str]]:
    """Labels and their names from the first subfolders, where there are two or more and every image is in one."""
    folders = [name.split(os.sep)[0] if os.sep in name else "" for name in names]
    classes = sorted(set(folders))
    if len(classes) < 2 or "" in classes:
        return None, []
    label = {folder: number for number, folder in enumerate(classes)}
    return [label[folder] for folder in folders], classes


def decode_folder(folder: Path, names: list[str], look: Look, max_images: int | None, scratch: Path | None) -> dict:
    """What the cache keeps: `pixels` (N, C, H, W), mapped from a nameless file in `scratch`, `labels` and the rest."""
    with tempfile.TemporaryFile(dir=scratch) as out:
        found = decode_all(folder, names, look, max_images, out)
        report = FolderReport.of(found)
        if report.kept < min(2, max_images or 2):
            raise ValueError(f"{folder}: {report.kept} usable .png, .jpg or .jpeg, at least 2 are needed\n{report}")
        out.flush()
        pixels = np.memmap(out, np.uint8, "c").reshape(-1, look.channels, look.height, look.width)
    labels, classes = class_labels([file.name for file in found if not file.reason for _ in range(1 + look.flip)])
    return {"pixels": torch.from_numpy(pixels), "labels": labels, "classes": classes, "report": asdict(report)}


def is_writable(folder: Path) -> bool:
    """Whether files can be made in `folder`, which is made where it is missing."""
    try:
        folder.mkdir(exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


def read_folder(folder: Path, look: Look, max_images: int | None, cache: bool) -> dict:
    """What `decode_folder` gives, from the cache where the folder and the settings are those of an earlier start.

    The cache is one file in `.pixels` in the folder, mapped into memory; a folder that cannot be written goes without.
    """
    names = image_files(folder)
    if not names:
        raise FileNotFoundError(f"no .png, .jpg or .jpeg under {folder}")
    stamps = [(name, stamp(os.path.join(folder, name))) for name in names]
    settings, files = (hashlib.blake2b(json.dumps(part).encode(), digest_size=12).hexdigest()
                       for part in ((VERSION, look, max_images), stamps))
    store = folder / CACHE / f"{settings}-{files}.pth"
    if cache and store.is_file():
        try:
            return torch.load(store, mmap=True, weights_only=True)
        except Exception:  # a damaged cache is made anew
            store.unlink()

    if not (cache and is_writable(store.parent)):
        return decode_folder(folder, names, look, max_images, scratch=None)
    content = decode_folder(folder, names, look, max_images, scratch=store.parent)
    if any(reason.startswith(UNREADABLE) for reason in content["report"]["skipped"]):
        return content  # and look again at the next start
    with atomic_file(store) as file:
        torch.save(content, file)
    for stale in set(store.parent.glob(f"{settings}-*")) - {store}:
        stale.unlink(missing_ok=True)
    remove_leftovers(store.parent, f".{settings}-*.tmp")
    return torch.load(store, mmap=True, weights_only=True)


class ImageDataset(Dataset):
    """Images as float tensors in [-1, 1].

    path: a folder, searched recursively for .png, .jpg and .jpeg in any letter case, sorted by path; or one IDX file of
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
        if fit not in FITS:
            raise ValueError(f"fit {fit!r}: choose from {', '.join(FITS)}")
        ImageColor.getrgb(background)  # raises ValueError for what is no colour
        path, look = Path(path), Look(height, width, channels, fit, background, flip)
        if path.is_dir():
            content = read_folder(path, look, max_images, cache)
            self.report = FolderReport(**content["report"])
            print(self.report)
            if strict and self.report.skipped:
                raise ValueError(f"{path}: strict, and not every file is an image\n{self.report}")
        elif path.is_file():
            content = read_idx_images(path, look, max_images)
            self.report = None
        else:
            raise FileNotFoundError(f"{path}: no such folder or file; pass a folder of images or an IDX file")
        self.pixels, self.classes = content["pixels"], content["classes"]
        self.labels = None if content["labels"] is None else torch.tensor(content["labels"])

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int | slice | Tensor) -> Tensor:
        return self.pixels[index].float() / 127.5 - 1
