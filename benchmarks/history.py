"""What training brought: the MNIST checkpoints that this repository has held over time.

    python benchmarks/history.py

Needs the whole git history. Writes benchmarks/history.md and Assets/history.png.
"""

import subprocess
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from common import ROOT, header, machine_in_words, once, parser_of, row, write_page
from measure import (about_distance, about_unclear, distance_to_test, draw,
                     loss_on_test_images, mean_probabilities, ready, unclear)

from model import U_net

CHECKPOINTS = {"simple": "model_DDPM.pth", "larger": "model_DDPM_large.pth"}


def git(*arguments: str) -> bytes:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True,
                          check=True).stdout


def versions(name: str) -> list[tuple[str, str]]:
    """The commits that changed the weights of a file of Save_model, oldest first, with
    their dates."""
    log = git("log", "--reverse", "--diff-filter=AM", "--format=%h %cs", "--",
              f"Save_model/{name}")
    found, before = [], ()
    for line in log.decode().splitlines():
        revision, date = line.split()
        weights = list(network_at(revision, name).parameters())
        if len(weights) != len(before) or not all(map(torch.equal, weights, before)):
            found.append((revision, date))
        before = weights
    return found


def network_at(revision: str, name: str) -> U_net:
    """The network of a file of Save_model as it was at a commit."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, name)
        file.write_bytes(git("show", f"{revision}:Save_model/{name}"))
        return ready(file)


def total(training: dict, what: str) -> int:
    """Images or seconds of the run that made a checkpoint and of those before it."""
    earlier = training.get("earlier")
    return training[what] + (total(earlier, what) if earlier else 0)


def measured(revision: str, name: str, samples: int) -> list:
    """Images seen, minutes, loss, distance and share of unclear digits of one
    version."""
    model = network_at(revision, name)
    pixels = draw(model, range(samples), 0, 10).pixels
    training = model.metadata["training"]
    return [total(training, "images_seen"), total(training, "seconds") / 60,
            loss_on_test_images(model), distance_to_test(pixels),
            unclear(mean_probabilities(pixels))]


def plot(curves: dict[str, list]) -> None:
    """Draws Assets/history.png: loss and distance against the images seen."""
    _, axes = plt.subplots(1, 2, figsize=(9, 3.5))
    what = {2: "loss on the test images", 3: "Frechet distance to the test images"}
    for axis, (column, label) in zip(axes, what.items()):
        for network, rows in curves.items():
            axis.semilogy([found[0] for found in rows],
                          [found[column] for found in rows], "o-",
                          label=f"{network} network")
        axis.set(xlabel="images seen", ylabel=label)
        axis.legend()
    plt.tight_layout()
    plt.savefig(ROOT / "Assets" / "history.png", dpi=120)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--samples", type=int, default=500)
    args = parser.parse_args()
    curves = {}
    table = header("network", "date", "commit", "images seen", "minutes", "loss",
                   "Frechet distance", "unclear")
    for network, name in CHECKPOINTS.items():
        for revision, date in versions(name):
            found = once("history", (revision, name, args.samples, machine_in_words()),
                         lambda: measured(revision, name, args.samples))
            curves.setdefault(network, []).append(found)
            images, minutes, loss, distance, share = found
            table.append(row(network, date, f"`{revision}`", f"{images:,}",
                             f"{minutes:.0f}", f"{loss:.4f}", f"{distance:.2f}",
                             f"{share:.1%}"))
            print(table[-1], flush=True)
    explained = ["Loss: the mean squared error on the first 2,000 test images, with",
                 "their labels where the network knows labels. Minutes are those of",
                 "the machines that trained, which differed."]
    how = "in 10 steps of dpm_solver, without a guide,"
    write_page("history", args, [*about_distance(args.samples, how), *about_unclear(),
                                 *explained, "", *table], ":")
    plot(curves)


if __name__ == "__main__":
    main()
