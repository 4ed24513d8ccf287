"""The quality that a given time of training on one GPU reaches, from random weights.

    python benchmarks/time_to_quality.py --batch-size 128 --num-epochs 20

Trains the larger network by the notebook itself, draws with the defaults of
generate_image.ipynb, and adds a row to benchmarks/time_to_quality.md.
"""

import argparse
import tempfile
from datetime import date
from pathlib import Path
from time import perf_counter

import matplotlib.pyplot as plt

from common import ROOT, commit, device, header, machine_in_words, parser_of, row
from measure import (distances_to_test, draw, guide_of, mean_probabilities, ready,
                     relative_distance, right_digits, unclear)
from recipe import LARGE

from machine import bf16_is_native
from run_notebook import run_notebook

PAGE = ROOT / "benchmarks" / "time_to_quality.md"
INTRODUCTION = """Seconds on one GPU from random weights, and the R that they lead to: the Frechet
distance of digits to the test images, divided by that of as many training images. The
aim is R <= 2. Each row is a run of
`train.ipynb` with the larger network, `python benchmarks/time_to_quality.py` with the
options of the row. Seconds are those of the loop, with its recording and previews, and
in brackets those of the whole notebook, with its figures. Digits are drawn with the
defaults of `generate_image.ipynb` as they were at the commit of the row, seed 0.
"""


def arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--num-epochs", type=int, default=20)
    parser.add_argument("--max-images", type=int, help="default: all 60,000")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=10_000)
    return parser.parse_args()


def measured(path: Path, samples: int) -> list[str]:
    """R, the share of clear digits and that of right ones, of a checkpoint."""
    model, precision = ready(path), "bf16" if bf16_is_native(device) else "fp32"
    guidance = model.metadata["guidance"]
    guide = None if guidance == 1 else guide_of(path, model, "early")
    drawn = draw(model, range(samples), 0, 15, guide=guide, guidance=guidance,
                 precision=precision)
    probabilities = mean_probabilities(drawn.pixels)
    right = right_digits(probabilities, drawn.labels).float().mean()
    distance = relative_distance(distances_to_test(drawn.pixels), samples)
    return [f"{distance:.2f}", f"{1 - unclear(probabilities):.1%}", f"{right:.1%}"]


def main() -> None:
    args = arguments()
    plt.switch_backend("agg")
    with tempfile.TemporaryDirectory() as folder:
        start = perf_counter()
        run = run_notebook(ROOT / "train.ipynb", {
            "data_path": str(ROOT / "Assets/MNIST/train-images-idx3-ubyte.gz"),
            "network": LARGE, "batch_size": args.batch_size, "seed": args.seed,
            "learning_rate": args.learning_rate, "num_epochs": args.num_epochs,
            "max_images": args.max_images, "save_dir": folder})["run"]
        whole = perf_counter() - start
        found = measured(run.folder.model, args.samples)
    cells = (date.today(), f"`{commit()}`", machine_in_words(),
             f"{args.batch_size}, {args.learning_rate:g}, {args.num_epochs}",
             f"{run.images_seen:,}", f"{run.seconds:.0f} ({whole:.0f})",
             f"{args.samples:,}", *found)
    names = header("date", "commit", "machine", "batch, learning rate, epochs",
                   "images seen", "seconds", "samples", "R", "clear", "right")
    page = PAGE.read_text() if PAGE.exists() else "\n".join([INTRODUCTION, *names, ""])
    PAGE.write_text(f"{page}{row(*cells)}\n")
    print(row(*cells))


if __name__ == "__main__":
    main()
