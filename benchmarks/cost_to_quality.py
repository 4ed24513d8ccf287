"""Training time against quality, the plain recipe beside that of train.ipynb: cost_to_quality.md, Assets/cost_to_quality.png.

    python benchmarks/cost_to_quality.py
"""

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from dataclasses import asdict, replace

import torch

from measure import ROOT, bf16_is_native, classifier, command, device, machine, once, plot_distances, training_distance
from recipe import QUICK, Recipe, distance, train

PLAIN_LOOKS = (1 / 60, 1 / 30, 1 / 12, 1 / 6, 1 / 3, 2 / 3, 1.0)


def plain(minutes: float, samples: int) -> list[tuple[float, int, float]]:
    """The run of the plain recipe: minutes, images seen and distance at several times."""
    torch.set_num_threads(1)
    return once("plain", (asdict(Recipe()), minutes, PLAIN_LOOKS, samples, machine()), lambda: [
        (seconds / 60, seen, distance(Recipe(), network, samples, bf16=False))
        for seconds, seen, network, _ in train(Recipe(), 60 * minutes, PLAIN_LOOKS)])


def ours(recipe: Recipe, minutes: float, samples: int) -> tuple[float, int, float, float]:
    """One run of ours: minutes, images seen, and the distance without the guide and with it."""
    torch.set_num_threads(1)

    def run():
        (_, _, guide), (seconds, seen, network) = (
            (*found, deepcopy(average).eval()) for *found, _, average in train(recipe, 60 * minutes, looks=(1 / 16, 1.0)))
        return seconds / 60, seen, *(distance(recipe, network, samples, recipe.bf16, guide) for guide in (None, guide))
    return once("ours", (asdict(recipe), minutes, samples, machine()), run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plain", type=float, default=60.0, metavar="MINUTES", help="how long the plain recipe runs")
    parser.add_argument("--ours", type=float, nargs="+", default=[1.0, 2.0, 3.0, 5.0], metavar="MINUTES",
                        help="our runs; each is one of its own, because its learning rate falls to zero at its end")
    parser.add_argument("--samples", type=int, default=1000)
    args = parser.parse_args()
    for seed in range(3):
        classifier(seed)  # before both processes want them
    torch.set_num_threads(1)
    recipe = replace(QUICK, bf16=bf16_is_native(device))
    with ProcessPoolExecutor(2 if device == "cpu" else 1, multiprocessing.get_context("spawn")) as pool:
        plain_rows = pool.submit(plain, args.plain, args.samples)
        our_rows = list(pool.map(ours, *zip(*((recipe, minutes, args.samples) for minutes in sorted(args.ours)))))
        plain_rows = plain_rows.result()

    plain_minutes, _, plain_distance = plain_rows[-1]
    verdict = []
    for how, column in (("without the guide", 2), ("with it", 3)):
        reached = next((row[0] for row in our_rows if row[column] <= plain_distance), None)
        verdict.append(f"{how} in {reached:.0f} minutes" if reached else f"{how} in none of these runs")
    floor = training_distance(args.samples)
    text = [f"`{command(args)}` on {machine()}:", "",
            f"The Frechet distance of {args.samples:,} samples in 10 steps of dpm_solver to the test images, on features of",
            f"a small classifier, the median of three seeds; as many training images are at {floor:.2f}, the median of up to ten",
            "sets. The plain recipe trains the simple network in fp32, in batches of 64 at a constant learning rate of 0.0001,",
            "without an average. Ours is that of train.ipynb, in batches of 16, on the larger network at half its width, in "
            f"{'bf16' if recipe.bf16 else 'fp32'}; the guide is",
            "the average after a sixteenth of the run, by 1.5, and a guided step evaluates both. Each run has one core, and its",
            "minutes are those that it was at work there.", "",
            "| recipe | minutes | images seen | Frechet distance | guided |", "|---|---|---|---|---|",
            *[f"| plain | {minutes:.0f} | {seen:,} | {found:.2f} | |" for minutes, seen, found in plain_rows],
            *[f"| ours | {minutes:.0f} | {seen:,} | {alone:.2f} | {guided:.2f} |" for minutes, seen, alone, guided in our_rows],
            "", f"Ours comes below what the plain recipe has after {plain_minutes:.0f} minutes {' and '.join(verdict)}."]
    (ROOT / "benchmarks" / "cost_to_quality.md").write_text("\n".join(text) + "\n")
    curves = {"the plain recipe": [(minutes, found) for minutes, _, found in plain_rows],
              "ours": [(minutes, alone) for minutes, _, alone, _ in our_rows],
              "ours, guided": [(minutes, guided) for minutes, _, _, guided in our_rows]}
    plot_distances(ROOT / "Assets" / "cost_to_quality.png", "minutes of training", curves, floor)


if __name__ == "__main__":
    main()
