"""A folder of any images -> uint8 pixels, decoded once, a report and a cache."""

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
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import platformdirs
import torch
from filelock import FileLock
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm.auto import tqdm

from checkpoint import atomic_file, remove_leftovers

READ = (".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif",
        ".tiff", ".gif", ".avif")
NOT_READ = tuple(""".arw .cr2 .cr3 .cur .dds .dib .dng .eps .exr .hdr .heic .heif .icns
    .ico .j2k .jp2 .jpx .jxl .mpo .nef .orf .pbm .pcx .pgm .pnm .ppm .psd .qoi .raf .raw
    .rw2 .sgi .svg .tga .xbm .xpm""".split())  # images, too: left out, and counted
HIDDEN = (".", "@eaDir", "__MACOSX", "$RECYCLE.BIN")  # what systems leave in a folder
Image.init()
FORMATS = tuple(name for name in ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")
                if name in Image.OPEN)  # no other, whatever a file's name says
BOMBS = (Image.DecompressionBombWarning, Image.DecompressionBombError)
MODES = {1: "L", 3: "RGB"}  # Pillow's names for grey and colour
FIT_METHODS = ("crop", "pad", "squash")
VERSION = 5  # of the cache: another one where the same files would give other content
UNREADABLE = "cannot be read"  # the fault of the disk or of rights, not of the image


class PixelSettings(NamedTuple):
    """How an image becomes pixels; the arguments of ImageDataset by these names."""
    height: int
    width: int
    channels: int
    fit: str
    background: str
    flip: bool


class FolderListing(NamedTuple):
    """Sorted names of files, from the folder on. `hidden` has folders and images."""
    images: list[str]
    hidden: list[str]
    others: list[str]


# The report

class FileRecord(NamedTuple):
    """What one file turned out to be: `reason` says why it cannot be used, or is "".

    peak: the greatest value of a 16-bit image, else 0.
    values: the least and the greatest of the pixels, after they were fitted.
    """
    name: str
    reason: str
    size: tuple[int, int] = (0, 0)
    mode: str = ""
    colourful: bool = False
    digest: bytes = b""
    peak: int = 0
    one_colour: bool = False
    values: tuple[int, int] = (0, 255)


def printable(name: str) -> str:
    """A name to print anywhere: escaped where needed, a long one without its middle."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode()
                    for c in name)
    return shown if len(shown) <= 60 else f"{shown[:30]}...{shown[-27:]}"


def first_names(names: list[str]) -> str:
    return ", ".join(map(printable, names[:3])) + ", ..." * (len(names) > 3)


def most_common(counts: dict[str, int]) -> str:
    named = [f"{printable(name)} ({n})" for name, n in Counter(counts).most_common(3)]
    return ", ".join(named) + ", ..." * (len(counts) > 3)


@dataclass
class FolderReport:
    """What was found in a folder; as text, a short report.

    found, kept: files looked at, and those that became images. skipped: reason -> names
    of the others. hidden: what was not looked at. one_colour: kept, without any detail.
    sizes, modes: "width x height" and Pillow's mode -> how many of the kept.
    duplicates: kept files equal to an earlier one. notes: more lines of the text.
    channels, image_size: proposed: 3 where any pixel has colour; the usual shorter side
    as a multiple of 4, at most 64.
    """
    found: int
    kept: int
    skipped: dict[str, list[str]]
    hidden: list[str]
    one_colour: list[str]
    sizes: dict[str, int]
    modes: dict[str, int]
    duplicates: int
    notes: list[str]
    channels: int
    image_size: int

    @classmethod
    def of(cls, files: list[FileRecord], hidden: list[str]) -> "FolderReport":
        kept, skipped = [file for file in files if not file.reason], {}
        for file in sorted(files, key=lambda file: file.reason):
            if file.reason:
                skipped.setdefault(file.reason, []).append(file.name)
        side = int(statistics.median(min(file.size) for file in kept)) if kept else 0
        return cls(found=len(files), kept=len(kept), skipped=skipped, hidden=hidden,
                   one_colour=[file.name for file in kept if file.one_colour],
                   sizes=dict(Counter("{} x {}".format(*file.size) for file in kept)),
                   modes=dict(Counter(file.mode for file in kept)),
                   duplicates=len(kept) - len({file.digest for file in kept}),
                   notes=notes_on(kept),
                   channels=3 if any(file.colourful for file in kept) else 1,
                   image_size=min(64, max(8, side // 4 * 4)))

    def __str__(self) -> str:
        lines = [f"{self.kept} of {self.found} images kept, "
                 f"{self.duplicates} of them duplicates"]
        lines += [f"{len(names)} left out, {reason}: {first_names(names)}"
                  for reason, names in self.skipped.items()]
        if self.hidden:
            lines.append(f"{len(self.hidden)} hidden, not looked at: "
                         f"{first_names(self.hidden)}")
        if self.one_colour:
            lines.append(f"{len(self.one_colour)} of one single colour: "
                         f"{first_names(self.one_colour)}; a drawing on a transparent "
                         'ground may need background="black"')
        return "\n".join([
            *lines, *self.notes,
            f"sizes: {most_common(self.sizes)}; modes: {most_common(self.modes)}",
            f"proposed: channels={self.channels}, image_size={self.image_size}"])


def notes_on(kept: list[FileRecord]) -> list[str]:
    """Lines of the report on labels, 16-bit images and images without contrast."""
    notes = [class_labels([file.name for file in kept])[2]]
    if peaks := [file.peak for file in kept if file.peak]:
        bits = bit_depth(kept)
        notes.append(f"{len(peaks)} of 16 bits, values up to {max(peaks)}: read as "
                     f"{bits} bits, so that {2**bits - 1} is white")
    low = min((file.values[0] for file in kept), default=0)
    high = max((file.values[1] for file in kept), default=255)
    if high - low < 64:
        notes.append(f"all values are within {low} ... {high} of 0 ... 255: little "
                     "can be learned; save the images brighter or with more contrast")
    return [note for note in notes if note]


def class_labels(names: list[str]) -> tuple[list[int] | None, list[str], str]:
    """Labels and their names from the first subfolders, where there are two or more and
    every image is in one; and a line that says so, or why there are none."""
    parts = [name.split(os.sep) for name in names]
    stray = [name for name in names if os.sep not in name]
    classes = sorted({part[0] for part in parts if len(part) > 1})
    if len(classes) > 1 and not stray:
        counts = Counter(part[0] for part in parts)
        number = {name: i for i, name in enumerate(classes)}
        return ([number[part[0]] for part in parts], classes,
                f"labels: {len(classes)} classes, {most_common(counts)}")
    if classes and stray:
        return None, [], (f"no labels: {len(stray)} images lie beside the subfolders "
                          f"{first_names(classes)}: {first_names(stray)}")
    inner = sorted({part[1] for part in parts if len(part) > 2})
    remedy = f"; pass that folder for {first_names(inner)}" * (len(inner) > 1)
    note = f"no labels: every image is in {first_names(classes)}{remedy}"
    return None, [], note if classes else ""


def bit_depth(files: list[FileRecord]) -> int:
    """How many bits the 16-bit images use together: 8, 10, 12, 14 or 16."""
    peak = max((file.peak for file in files), default=0) or 65535
    return next(bits for bits in (8, 10, 12, 14, 16) if peak < 2**bits)


# From files to pixels

def fit_image(image: Image.Image, settings: PixelSettings) -> Image.Image:
    """The image in the size of the settings: cropped, padded or squashed."""
    size, lanczos = (settings.width, settings.height), Image.Resampling.LANCZOS
    if settings.fit == "crop":
        return ImageOps.fit(image, size, lanczos)
    if settings.fit == "pad":
        return ImageOps.pad(image, size, lanczos, color=settings.background)
    return image.resize(size, lanczos)


class UnknownRange(ValueError):
    """Numbers in an image of which nothing says which one is white."""


def in_eight_bits(image: Image.Image, bits: int) -> tuple[Image.Image, int]:
    """An image of more than 8 bits in 8 bits, and the greatest of its whole numbers.

    Of whole numbers the upper 8 of `bits` bits count; of decimal numbers 1 is white.
    Raises UnknownRange where they are not in 0 ... 65535 or 0 ... 1.
    """
    if image.mode[0] not in "IF":
        return image, 0
    values, decimal = np.asarray(image), image.mode == "F"
    if not (values.min() >= 0 and values.max() <= (1 if decimal else 65535)):
        raise UnknownRange
    small = np.rint(values * 255) if decimal else np.minimum(values >> (bits - 8), 255)
    picture = Image.fromarray(small.astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        picture.putalpha(Image.fromarray(np.uint8(255) * (values != transparent)))
    return picture, 0 if decimal else int(values.max())


def flatten(image: Image.Image, background: str) -> Image.Image:
    """The picture as a viewer shows it, in RGB, over `background`."""
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, background)
        image = Image.alpha_composite(ground, image.convert("RGBA"))
    return image.convert("RGB")


def decode(name: str, folder: Path, settings: PixelSettings,
           bits: int) -> tuple[np.ndarray | None, FileRecord]:
    """The pixels of one file, uint8 (C, H, W), or None; and its record."""
    if extension(name) in NOT_READ:
        return None, FileRecord(name, "of a format that is not read")
    if os.path.exists(folder / name) and not os.path.isfile(folder / name):
        return None, FileRecord(name, "no regular file")  # a pipe would wait forever
    try:
        with Image.open(folder / name, formats=FORMATS) as image:
            size, mode = image.size, image.mode
            with suppress(SyntaxError, struct.error):  # a header without EXIF
                image = ImageOps.exif_transpose(image)
            image, peak = in_eight_bits(image, bits)
            small = fit_image(flatten(image, settings.background), settings)
        colours = np.asarray(small)
        pixels = np.atleast_3d(np.asarray(small.convert(MODES[settings.channels])))
        return pixels.transpose(2, 0, 1), FileRecord(
            name, "", size, mode,
            colourful=bool(np.ptp(colours, axis=2).max() > 8),  # JPEG tints grey
            digest=hashlib.blake2b((folder / name).read_bytes()).digest(), peak=peak,
            one_colour=not np.ptp(pixels, axis=(0, 1)).any(),
            values=(int(pixels.min()), int(pixels.max())))
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can fail in any part of any decoder
        return None, FileRecord(name, reason_of(error))


def reason_of(error: Exception) -> str:
    """Why a file cannot be used, in words."""
    if isinstance(error, BOMBS):
        return f"more than {Image.MAX_IMAGE_PIXELS} pixels"
    if isinstance(error, UnidentifiedImageError):
        return "no image of a format that is read"
    if isinstance(error, UnknownRange):
        return "whole numbers outside 0 ... 65535, or decimal ones outside 0 ... 1"
    if isinstance(error, OSError) and error.errno:
        return f"{UNREADABLE}: {error.strerror}"
    return "damaged"


def decode_all(folder: Path, names: list[str], settings: PixelSettings, bits: int,
               max_images: int | None, out: BinaryIO) -> list[FileRecord]:
    """Decodes files on all cores and writes their pixels to `out`, in order."""
    records, room = [], max_images or len(names)
    task = partial(decode, folder=folder, settings=settings, bits=bits)
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        results = pool.map(task, names)
        try:
            for pixels, record in tqdm(results, "decoding", len(names), leave=False):
                records.append(record)
                if pixels is not None:
                    out.write(pixels.tobytes())
                    if settings.flip:
                        out.write(pixels[:, :, ::-1].tobytes())
                    room -= 1
                if not room:
                    break
        finally:
            pool.shutdown(cancel_futures=True)
    return records


def by_turns(names: list[str]) -> list[str]:
    """Files in another order: the first of each first subfolder, then the second of
    each, and so on."""
    place, seen = {}, Counter()
    for name in names:
        subfolder = os.path.dirname(name).split(os.sep)[0]
        place[name], seen[subfolder] = seen[subfolder], seen[subfolder] + 1
    return sorted(names, key=place.get)  # which keeps the order of equals


def decode_folder(folder: Path, listing: FolderListing, settings: PixelSettings,
                  max_images: int | None, out: BinaryIO) -> dict:
    """`pixels` (N, C, H, W), which stay in the nameless file `out`, and the rest.

    All images are decoded a second time where those of 16 bits use fewer.
    Raises ValueError where fewer than two images are usable.
    """
    names = listing.images
    if max_images and max_images < len(names):
        names = by_turns(names)
    records = decode_all(folder, names, settings, 16, max_images, out)
    if (bits := bit_depth(records)) < 16:
        out.seek(0)
        out.truncate()
        records = decode_all(folder, names, settings, bits, max_images, out)
    report = FolderReport.of(records, listing.hidden)
    if report.kept < min(2, max_images or 2):
        raise ValueError(f"{folder}: {report.kept} usable images, at least 2 are needed"
                         f"\n{report}")
    out.flush()
    pixels = (np.frombuffer(out.getbuffer(), np.uint8) if isinstance(out, BytesIO)
              else np.memmap(out, np.uint8, "c"))
    labels, classes, _ = class_labels([record.name for record in records
                                       if not record.reason
                                       for _ in range(1 + settings.flip)])
    shape = (-1, settings.channels, settings.height, settings.width)
    return {"pixels": torch.from_numpy(pixels.reshape(shape)), "labels": labels,
            "classes": classes, "report": asdict(report)}


# A folder and its cache

def extension(name: str) -> str:
    return os.path.splitext(name)[1].strip().lower()


def list_files(folder: Path) -> FolderListing:
    """What is in a folder and below. Links are followed, but into no folder twice.

    Raises OSError where a folder cannot be read.
    """
    def stop(error):
        raise error

    visited, images, hidden, others = set(), [], [], []
    for root, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        if os.path.realpath(root) in visited:
            folders.clear()
            continue
        visited.add(os.path.realpath(root))
        within = os.path.relpath(root, folder)

        def below(name):
            return os.path.normpath(os.path.join(within, name))

        hidden += [below(name) for name in folders if name.startswith(HIDDEN)]
        folders[:] = sorted(name for name in folders if not name.startswith(HIDDEN))
        for name in names:
            if extension(name) not in READ + NOT_READ:
                others.append(below(name))
            else:
                (hidden if name.startswith(HIDDEN) else images).append(below(name))
    return FolderListing(sorted(images), sorted(hidden), sorted(others))


def nothing_to_read(folder: Path, listing: FolderListing) -> str:
    """The error for a folder without images: what is there, and what is read."""
    there = Counter(extension(name) or "without extension" for name in listing.others)
    idx = sorted((name for name in listing.others if "idx3-ubyte" in name),
                 key=lambda name: ("train" not in name, name))
    remedy = (f"pass the IDX file itself: {folder / idx[0]}" if idx
              else f"read are {', '.join(READ)}")
    hidden = f", hidden: {first_names(listing.hidden)}" * bool(listing.hidden)
    found = most_common(there) or "no file"
    return f"no images under {folder}, but {found}{hidden}; {remedy}"


def cache_file(folder: Path, listing: FolderListing, settings: PixelSettings,
               max_images: int | None) -> Path:
    """Where these pixels are kept: in the user's cache folder of this system.

    The name has two parts, one of the folder and the settings, one of all the files
    with their sizes and times, which change with a file and its rights.
    """
    states = []
    for name in listing.images:
        with suppress(OSError):  # a broken link
            stat = os.stat(os.path.join(folder, name))
            states.append((name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
    source = (VERSION, FORMATS, os.path.realpath(folder), settings, max_images)
    parts = [json.dumps(part).encode()
             for part in (source, (states, listing.images, listing.hidden))]
    name = "-".join(hashlib.blake2b(part, digest_size=12).hexdigest() for part in parts)
    return Path(platformdirs.user_cache_dir("simple-ddpm", False), name + ".pth")


def read_cache(store: Path) -> dict | None:
    """What was kept in this file; None where there is none, or a damaged one."""
    if not os.path.isfile(store):
        return None
    try:
        return torch.load(store, mmap=True, weights_only=True)
    except Exception:
        with suppress(OSError):
            store.unlink()
        return None


def write_cache(content: dict, store: Path) -> None:
    """Keeps `content`, and removes what was kept of the same folder before it changed.

    A disk that is full is no error: the next start decodes again.
    """
    source = store.stem.split("-")[0]
    with suppress(OSError, RuntimeError):  # RuntimeError: torch's, where a disk is full
        with atomic_file(store) as file:
            torch.save(content, file)
        for stale in set(store.parent.glob(f"{source}-*.pth")) - {store}:
            stale.unlink(missing_ok=True)
        remove_leftovers(store.parent, f".{source}-*.tmp")


def read_folder(folder: Path, settings: PixelSettings, max_images: int | None,
                cache: bool) -> dict:
    """What `decode_folder` gives, from the cache where files and settings are the same.

    Of several processes that start at once one decodes and the others wait. Where the
    cache cannot be written, each decodes. Raises FileNotFoundError without any image.
    """
    listing = list_files(folder)
    if not listing.images:
        raise FileNotFoundError(nothing_to_read(folder, listing))

    def decode_into(*scratch_folders: Path | None) -> dict:
        for scratch in scratch_folders:  # the next one where a disk is full
            with suppress(OSError), tempfile.TemporaryFile(dir=scratch) as out:
                return decode_folder(folder, listing, settings, max_images, out)
        return decode_folder(folder, listing, settings, max_images, BytesIO())

    store = cache_file(folder, listing, settings, max_images)
    if not (cache and store.is_absolute()):  # without a home folder it is not
        return decode_into(None)
    if (content := read_cache(store)) is not None:
        return content
    lock = FileLock(store.with_name(store.stem.split("-")[0] + ".lock"))
    try:
        store.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock.acquire()  # the system frees it where a process dies
    except (OSError, NotImplementedError):
        return decode_into(None)
    try:
        if (content := read_cache(store)) is None:  # no other process has just decoded
            content = decode_into(store.parent, None)
            skipped = content["report"]["skipped"]
            if not any(reason.startswith(UNREADABLE) for reason in skipped):
                write_cache(content, store)
                content = read_cache(store) or content
        return content
    finally:
        lock.release()
