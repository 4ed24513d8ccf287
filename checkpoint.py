"""Checkpoints on disk: a save replaces the old file only when the new one is complete, and loading accepts
tensors and plain values only, never code.
"""

import io
import os
import pickle
import time
import uuid
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import torch

from machine import memory_is_full


def remove_leftovers(folder: Path, pattern: str) -> None:
    """Removes the temporary files of `atomic_file` whose writer was killed: those an hour old or more."""
    for left in folder.glob(pattern):
        with suppress(FileNotFoundError):  # another writer's, who is done by now
            if time.time() - left.stat().st_mtime > 3600:
                left.unlink()


@contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A file to write, which takes the name `path` when the block ends, whole and on the disk; missing folders are made.

    Until then it has a temporary name of its own in the same folder, so that `path` holds the old file or a new one, never a
    part, however many write it. Where the block raises, or the disk is full (OSError), the old file is unhurt and nothing
    else is left. What a process leaves that is killed meanwhile is removed by a later call, an hour old or more.
    """
    path = Path(os.path.expanduser(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, f".{path.name}.*.tmp")
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and not error.filename:
            error.filename = str(path)  # a full disk does not say where
        raise
    with suppress(OSError):  # the folder's entry, too, to the disk, where the system opens and flushes folders
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def replace(old: Path, new: Path, patience: float = 2.0) -> None:
    """Renames a file over another. Windows refuses this while any program reads the other: tries for so many seconds."""
    deadline = time.monotonic() + patience
    while True:
        try:
            return os.replace(old, new)
        except PermissionError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def save_checkpoint(state: dict, path: str | os.PathLike) -> None:
    """Writes a dictionary of tensors and plain values to `path` as an `atomic_file`.

    Raises ValueError for a value that `load_checkpoint` would refuse, before anything is written, and OSError where the disk
    is full or may not be written.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    try:
        torch.load(buffer, map_location="meta", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path}: not written, the state holds more than tensors and plain values") from error
    with atomic_file(path) as file:
        file.write(buffer.getbuffer())


def load_checkpoint(path: str | os.PathLike, device: str | torch.device = "cpu") -> dict:
    """Reads a dictionary that `save_checkpoint` wrote, its tensors placed on `device`.

    Only tensors and plain values are read (`weights_only=True`): a pickle that wants to run code is refused. So is a file whose
    bytes do not fit its checksums, or that torch was told to write without them.
    Raises FileNotFoundError where there is no file and ValueError where it cannot be read as such a dictionary.
    """
    path = os.path.expanduser(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such checkpoint; train.ipynb writes one into its save_dir")
    if Path(path).suffix == ".safetensors":
        raise ValueError(f"{path}: no checkpoint yet; docs/other_tools.md has the lines that make one of it")
    torch.empty(0, device=device)  # a device that is not there fails here, by torch's own message
    with open(path, "rb") as file:
        try:
            if zipfile.is_zipfile(file) and zipfile.ZipFile(file).testzip():  # torch.load checks no sums
                raise zipfile.BadZipFile
            file.seek(0)
            state = torch.load(file, map_location=device, weights_only=True)
        except Exception as error:  # whatever the reader stumbled on: in a file of random bytes that can be anything
            if memory_is_full(error):
                raise
            raise ValueError(f"{path}: refused, it is damaged or holds more than tensors and plain values") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path}: holds a {type(state).__name__}; a checkpoint is a dictionary")
    return state
