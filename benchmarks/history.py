"""What training brought: the MNIST checkpoints as this repository has held them over time: history.md, Assets/history.png.

    python benchmarks/history.py
"""

import argparse
import subprocess
import tempfile
from pathlib import Path
from statistics import fmean

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

from measure import (ROOT, NoiseScheduler, U_net, command, device, distance_to_test, draw, gaussian_noise, machine, mnist, once,
                     random_stream, ready, training_distance, unclear)

CHECKPOINTS = {"simple": ["model_DDPM.pth"], "larger": ["model_DDPM_large.pth"]}


def git(*arguments: str) -> bytes:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, check=True).stdout


def total(training: dict, what: str) -> int:
    """Images or seconds of the run that made a checkpoint and of those before it."""
    earlier = training.get("earlier")
    return training[what] + (total(earlier, what) if earlier else 0)


@torch.no_grad()
def test_loss(model: U_net) -> float:
    """Mean squared error of the predicted noise on the first 2,000 test images, each at a timestep of its own."""
    scheduler, rng = NoiseScheduler(**model.metadata["noise_schedule"], device=device), random_stream(0, device=device)
    losses = []
    for pixels in mnist("t10k")[:2000].split(250):
        x0 = pixels.to(device).float() / 127.5 - 1
        t = torch.randint(scheduler.num_timesteps, (len(x0),), generator=rng, device=device)
        noise = gaussian_noise(x0, rng)
        losses.append(F.mse_loss(model(scheduler.add_noise(x0, noise, t), t), noise).item())
    return fmean(losses)


def measured(revision: str, name: str, samples: int) -> list:
    """Images seen, minutes, loss, distance and share of unclear digits of one version."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, name)
        file.write_bytes(git("show", f"{revision}:Save_model/{name}"))
        model = ready(file)
    pixels, _ = draw(model, range(samples), 0, 10, "dpm_solver")
    training = model.metadata["training"]
    return [total(training, "images_seen"), total(training, "seconds") / 60, test_loss(model), distance_to_test(pixels),
            unclear(pixels)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=500)
    args = parser.parse_args()
    curves, table = {}, []
    for network, names in CHECKPOINTS.items():
        log = "log", "--reverse", "--diff-filter=AM", "--format=%h %cs", "--"
        versions = [(*line.split(), name) for name in names
                    for line in git(*log, f"Save_model/{name}").decode().splitlines()]
        for revision, date, name in versions:
            key = (revision, name, args.samples, machine())
            row = once("history", key, lambda: measured(revision, name, args.samples))
            curves.setdefault(network, []).append(row)
            images, minutes, loss, distance, unclear_share = row
            table.append(f"| {network} | {date} | `{revision}` | {images:,} | {minutes:.0f} | {loss:.4f} | "
                         f"{distance:.2f} | {unclear_share:.1%} |")
            print(table[-1], flush=True)
    text = [f"`{command(args)}` on {machine()}:", "",
            "Loss: the mean squared error on 2,000 test images. Distance: the Frechet distance to all 10,000 of them of",
            f"{args.samples:,} samples in 10 steps of dpm_solver without a guide, on features of a small classifier, the",
            f"median of three seeds; as many training images are at {training_distance(args.samples):.2f}, the median of up to ten",
            "sets. Minutes are those of the machines that trained, which differed.",
            "Unclear: the share of these samples to which three classifiers give no digit, on average, a probability of 0.9;",
            f"of the test images {unclear(mnist('t10k')):.1%}.", "",
            "| network | date | commit | images seen | minutes | loss | Frechet distance | unclear |",
            "|---|---|---|---|---|---|---|---|", *table]
    (ROOT / "benchmarks" / "history.md").write_text("\n".join(text) + "\n")

    _, axes = plt.subplots(1, 2, figsize=(9, 3.5))
    for axis, column, label in zip(axes, (2, 3), ("loss on the test images", "Frechet distance to the test images")):
        for network, rows in curves.items():
            axis.semilogy([row[0] for row in rows], [row[column] for row in rows], "o-", label=f"{network} network")
        axis.set(xlabel="images seen", ylabel=label)
        axis.legend()
    plt.tight_layout()
    plt.savefig(ROOT / "Assets" / "history.png", dpi=120)


if __name__ == "__main__":
    main()
