"""What surrounds the drawing of many images: batches, memory, files, and how to stop."""

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image
from tqdm.auto import tqdm

from dataset_loader import image_grid, to_image
from machine import enough_memory, hold_signals

AT_ONCE = 100  # images drawn together
FEW = 30  # up to so many images get their names below them


def figures_folder(output_dir: str | os.PathLike) -> Path:
    """Where grids and figures go: beside output_dir, which holds the samples alone."""
    folder = Path(output_dir)
    if folder.name in ("", ".."):  # such as ".", which has a name all the same
        folder = folder.resolve()
    return Path(f"{folder}_figures")


def draw_files(draw: Callable[[range], Tensor], images: range,
               output_dir: str | os.PathLike,
               names: Sequence[str] = ()) -> Image.Image:
    """Draws images, a hundred at a time, and writes image i as x_i.png into output_dir.

    draw(numbers): the images of these numbers, (B, C, H, W) in about [-1, 1]. names:
    what they are to show; it is written below them where they are few.
    Returns one picture of the first hundred, which is also grid.png in the
    `figures_folder`. Ctrl-C, Jupyter's Stop, SIGTERM and SIGHUP end it after the images
    at hand; what is drawn stays, and a line says how to go on.
    """
    folder, figures = Path(output_dir), figures_folder(output_dir)
    for path in (folder, figures):
        path.mkdir(parents=True, exist_ok=True)
    others = {path.name for path in folder.glob("x_*.png")}
    with (hold_signals() as stopped, enough_memory("num_images", min(AT_ONCE, len(images))),
          tqdm(total=len(images), unit=" images", disable=len(images) <= AT_ONCE) as bar):
        for first in images[::AT_ONCE]:
            batch = range(first, min(first + AT_ONCE, images.stop))
            x0 = draw(batch)
            for i, image in zip(batch, to_image(x0.cpu())):
                try:
                    to_pil_image(image).save(folder / f"x_{i}.png")
                except OSError as error:
                    if error.errno == errno.ENOSPC:  # a full disk: half a file is left
                        (folder / f"x_{i}.png").unlink(missing_ok=True)
                    say_how_to_go_on(images, i)
                    raise
            if first == images.start:
                grid = image_grid(x0, columns=round(len(x0)**0.5),
                                  names=names if len(images) <= FEW else ())
                grid.save(figures / "grid.png")
            bar.update(len(batch))
            if stopped():
                break
    drawn = range(images.start, batch.stop)
    print(f"x_{drawn[0]}.png to x_{drawn[-1]}.png are in {folder}, grid.png is in {figures}")
    if len(drawn) < len(images):
        say_how_to_go_on(images, drawn.stop)
    others -= {f"x_{i}.png" for i in drawn}
    if others:
        print(f"{folder} also holds {len(others):,} images that were there before: "
              f"{', '.join(sorted(others)[:3])}{', ...' * (len(others) > 3)}")
    return grid


def say_how_to_go_on(images: range, first: int) -> None:
    print(f"stopped after {first - images.start:,} of {len(images):,} images; the others: "
          f"first_image={first}, num_images={images.stop - first}")
