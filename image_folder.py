"""A folder of any images -> uint8 pixels, decoded once, with a report of what was found; kept in a cache."""

import hashlib
import json
import os
import statistics
import struct
import tempfile
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from filelock import FileLock
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm.auto import tqdm

from checkpoint import atomic_file, remove_leftovers

EXTENSIONS = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif")
NOT_READ = (".apng", ".dng", ".heic", ".heif", ".ico", ".jp2", ".jxl", ".pbm", ".pcx", ".pgm", ".ppm", ".psd",
            ".raw", ".svg", ".tga")  # images all the same: they are counted among those left out
Image.init()
FORMATS = tuple(name for name in ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")
                if name in Image.OPEN)  # all that Pillow may open, whatever a file calls itself
MODES = {1: "L", 3: "RGB"}  # Pillow's names for grey and colour
FIT_METHODS = ("crop", "pad", "squash")
CACHE = ".pixels"  # the folder, inside a folder of images, that keeps what was decoded
VERSION = 2  # of what is kept: another one whenever the same files would give other pixels or another report
UNREADABLE = "cannot be read"  # the fault of the disk or of rights, not of the image


class PixelSettings(NamedTuple):
    """How an image becomes pixels; the arguments of ImageDataset by these names."""
    height: int
    width: int
    channels: int
    fit: str
    background: str
    flip: bool


def fit_image(image: Image.Image, settings: PixelSettings) -> Image.Image:
    """The image in the height and width of the settings: cropped to its centre, padded or squashed."""
    size, lanczos = (settings.width, settings.height), Image.Resampling.LANCZOS
    if settings.fit == "crop":
        return ImageOps.fit(image, size, lanczos)
    if settings.fit == "pad":
        return ImageOps.pad(image, size, lanczos, color=settings.background)
    return image.resize(size, lanczos)


class FileRecord(NamedTuple):
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
    def of(cls, files: list[FileRecord]) -> "FolderReport":
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
            *[f"{len(names)} left out, {reason}: {', '.join(map(printable, names[:3]))}{', ...' * (len(names) > 3)}"
              for reason, names in self.skipped.items()],
            f"sizes: {most(self.sizes)}; modes: {most(self.modes)}",
            f"proposed: channels={self.channels}, image_size={self.image_size}"])


def printable(name: str) -> str:
    """A file's name to print anywhere: what cannot be printed is escaped, and the end of a long one left out."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def image_files(folder: Path) -> list[str]:
    """The names, from `folder` on and sorted, of all files in it and below with the extension of an image.

    Links are followed, but into no folder twice; what begins with a dot is left out. Raises OSError where
    a folder cannot be read.
    """
    def stop(error):
        raise error

    visited, files = set(), []
    for root, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        if os.path.realpath(root) in visited:
            folders.clear()
            continue
        visited.add(os.path.realpath(root))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        within = os.path.relpath(root, folder)
        files += [os.path.normpath(os.path.join(within, name)) for name in names
                  if name.lower().endswith(EXTENSIONS + NOT_READ) and not name.startswith(".")]
    return sorted(files)


def file_stamp(file: str) -> tuple[int, int, int] | None:
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


def decode(name: str, folder: Path, settings: PixelSettings) -> tuple[np.ndarray | None, FileRecord]:
    """The pixels of one file, uint8 (C, H, W), or None, and what it turned out to be."""
    file = folder / name
    if name.lower().endswith(NOT_READ):
        return None, FileRecord(name, "of a format that is not read")
    try:
        with Image.open(file, formats=FORMATS) as image:
            size, mode = image.size, image.mode
            small = fit_image(flatten(image, settings.background), settings)
        colourful = np.ptp(np.asarray(small.convert("RGB")), axis=2).max() > 8  # JPEG tints grey a little
        pixels = np.asarray(small.convert(MODES[settings.channels])).reshape(settings.height, settings.width, settings.channels)
        digest = hashlib.blake2b(file.read_bytes()).digest()
        return pixels.transpose(2, 0, 1), FileRecord(name, "", size, mode, bool(colourful), digest)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        return None, FileRecord(name, f"more than {Image.MAX_IMAGE_PIXELS} pixels")
    except UnidentifiedImageError:
        return None, FileRecord(name, "no image of a format that is read")
    except OSError as error:
        return None, FileRecord(name, f"{UNREADABLE}: {error.strerror}" if error.errno else "damaged")
    except MemoryError:
        raise
    except Exception:  # a damaged file can fail in any part of any decoder
        return None, FileRecord(name, "damaged")


def decode_all(folder: Path, names: list[str], settings: PixelSettings, max_images: int | None, out: BinaryIO) -> list[FileRecord]:
    """Decodes files on all cores and writes the pixels to `out`, image after image, in the order of the names."""
    found, room = [], max_images or len(names)
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        results = pool.map(partial(decode, folder=folder, settings=settings), names)
        try:
            for pixels, file in tqdm(results, total=len(names), desc="decoding", unit=" images", leave=False):
                found.append(file)
                if pixels is not None:
                    out.write(pixels.tobytes())
                    if settings.flip:
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


def decode_folder(folder: Path, names: list[str], settings: PixelSettings, max_images: int | None, scratch: Path | None) -> dict:
    """What the cache keeps: `pixels` (N, C, H, W), mapped from a nameless file in `scratch`, `labels` and the rest."""
    with tempfile.TemporaryFile(dir=scratch) as out:
        found = decode_all(folder, names, settings, max_images, out)
        report = FolderReport.of(found)
        if report.kept < min(2, max_images or 2):
            raise ValueError(f"{folder}: {report.kept} usable images, at least 2 are needed\n{report}")
        out.flush()
        pixels = np.memmap(out, np.uint8, "c").reshape(-1, settings.channels, settings.height, settings.width)
    labels, classes = class_labels([file.name for file in found if not file.reason for _ in range(1 + settings.flip)])
    return {"pixels": torch.from_numpy(pixels), "labels": labels, "classes": classes, "report": asdict(report)}


def is_writable(folder: Path) -> bool:
    """Whether files can be made in `folder`, which is made where it is missing."""
    try:
        folder.mkdir(exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


def read_folder(folder: Path, settings: PixelSettings, max_images: int | None, cache: bool) -> dict:
    """What `decode_folder` gives, from the cache where the folder and the settings are those of an
    earlier start.

    The cache is one file in `.pixels` in the folder, mapped into memory; a folder that cannot be written
    goes without. Of several processes that start at the same moment one decodes and the others wait.
    """
    names = image_files(folder)
    if not names:
        idx = sorted(path.name for path in folder.glob("*-ubyte*"))
        pass_it = f"; for MNIST's own format pass the file itself, such as {folder / idx[0]}" if idx else ""
        raise FileNotFoundError(f"no images under {folder}: no file ends in {', '.join(EXTENSIONS)}{pass_it}")
    stamps = [(name, file_stamp(os.path.join(folder, name))) for name in names]
    of_settings, of_files = (hashlib.blake2b(json.dumps(part).encode(), digest_size=12).hexdigest()
                             for part in ((VERSION, settings, max_images), stamps))
    store = folder / CACHE / f"{of_settings}-{of_files}.pth"
    if cache and (found := read_cache(store)) is not None:
        return found
    if not (cache and is_writable(store.parent)):
        return decode_folder(folder, names, settings, max_images, scratch=None)

    with FileLock(store.parent / "lock"):  # which the system frees where a process dies
        if (found := read_cache(store)) is not None:  # another process has decoded meanwhile
            return found
        content = decode_folder(folder, names, settings, max_images, scratch=store.parent)
        if any(reason.startswith(UNREADABLE) for reason in content["report"]["skipped"]):
            return content  # and look again at the next start
        with atomic_file(store) as file:
            torch.save(content, file)
        for stale in set(store.parent.glob(f"{of_settings}-*")) - {store}:
            stale.unlink(missing_ok=True)
        remove_leftovers(store.parent, f".{of_settings}-*.tmp")
    return read_cache(store)


def read_cache(store: Path) -> dict | None:
    """What was kept in this file; None where there is none, or a damaged one, which is removed."""
    if not store.is_file():
        return None
    try:
        return torch.load(store, mmap=True, weights_only=True)
    except Exception:
        store.unlink()
        return None
