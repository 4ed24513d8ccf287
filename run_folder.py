"""The folder of a training run: its files, its lock, and what an earlier run left there."""

import errno
import os
import shutil
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from filelock import FileLock, Timeout
from PIL import Image

from checkpoint import load_checkpoint

NO_LOCKS = (None, errno.ENOSYS, errno.ENOLCK, errno.EINVAL, errno.EOPNOTSUPP)  # of some mounted disks
MAY_CHANGE = ("num_epochs", "initial_weights")  # between a run and the one that goes on with it
SAME_DATA = {"pixels": "other images; resume with the same, in the same image_size and in_channels",
             "labels": "other labels; resume with the same"}


class RunFolder:
    """A folder with `state.pth`, `model.pth`, `model_guide.pth`, `preview.png` and `loss.png`.

    writes: whether this process writes there. One that does makes the folder, and locks it while this object
    exists; the system frees the lock of a process that dies.
    Raises ValueError where another run is writing there, OSError where the folder cannot be written.
    """

    def __init__(self, path: str | os.PathLike, writes: bool):
        self.path = Path(path).expanduser()
        self.model, self.guide, self.state = (
            self.path / f"{name}.pth" for name in ("model", "model_guide", "state"))
        if writes:
            self.path.mkdir(parents=True, exist_ok=True)
            self._take_lock()

    def _take_lock(self) -> None:
        self.lock = FileLock(self.path / ".lock", timeout=0, is_singleton=True)
        try:
            self.lock.acquire()
        except Timeout:
            raise ValueError(f"save_dir {self.path}: another run is writing there, or an open notebook holds it; "
                             "choose another folder, or end that run") from None
        except (NotImplementedError, OSError) as error:
            if getattr(error, "errno", None) not in NO_LOCKS:
                raise
            print(f"{self.path} is on a disk without locks: start no second run in it")

    def set_old_files_aside(self) -> None:
        """Moves the files of an old run into a folder of their own, named by their time."""
        names = self.model.name, self.guide.name, self.state.name, "preview.png", "loss.png"
        old = [self.path / name for name in names if (self.path / name).exists()]
        if not old:
            return
        last = datetime.fromtimestamp(max(path.stat().st_mtime for path in old))
        aside = self.path / f"{last:%Y%m%d-%H%M%S}"
        while aside.exists():  # of a run that ended in the same second
            aside = aside.with_name(f"{aside.name}+")
        aside.mkdir()
        for path in old:
            path.rename(aside / path.name)

    def copy_guide_of(self, weights: str | os.PathLike) -> None:
        """Takes the guide beside a checkpoint over, where there is one."""
        weights = Path(weights).expanduser()
        guide = weights.with_stem(f"{weights.stem}_guide")
        if guide.exists():
            shutil.copy(guide, self.guide)

    def read_state(self, parts: Iterable[str], settings: dict, device: str | torch.device) -> dict:
        """The state that a run wrote here, checked against this run's settings.

        parts: what it must hold besides. Raises ValueError for another project's file, and for a run that was
        not made with these settings.
        """
        state = load_checkpoint(self.state, device)
        missing = {"settings", "losses", "seconds", "earlier", "guide_steps", "previews", *parts} - state.keys()
        missing |= settings.keys() - state.get("settings", settings).keys()
        if missing:
            raise ValueError(f"{self.state}: not the state of a run of this version, it has no "
                             f"{', '.join(sorted(missing))}; set resume=False for a new run")
        for name, value in settings.items():
            theirs = state["settings"][name]
            if name in MAY_CHANGE or theirs == value:
                continue
            what = (f"the run in {self.path} has seen {SAME_DATA[name]}" if name in SAME_DATA else
                    f"{name}: the run in {self.path} has {theirs!r}, this one has {value!r}; resume with the same")
            raise ValueError(f"{what}, or set resume=False for a new run")
        return state

    def write_figure(self, name: str, draw: Callable[[], plt.Figure]) -> None:
        """Draws a figure and writes it. An error in it is said and forgotten: it must not end a run."""
        before = plt.get_fignums()
        try:
            draw().savefig(self.path / name, bbox_inches="tight")
        except Exception as error:
            print(f"{name} was not written: {error}")
        for number in set(plt.get_fignums()) - set(before):
            plt.close(number)


def strip_of(previews: list[tuple[int, Image.Image]]) -> plt.Figure:
    """One row for each preview, with the number of images seen as its label."""
    width, height = previews[0][1].size
    rows = len(previews)
    figure, axes = plt.subplots(rows, figsize=(8, 6.5 * rows * height / width), squeeze=False)
    for axis, (seen, picture) in zip(axes.flat, previews):
        axis.imshow(picture)
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(f"{seen:,}\nimages seen" if seen == previews[0][0] else f"{seen:,}", rotation=0,
                        ha="right", va="center")
    return figure
