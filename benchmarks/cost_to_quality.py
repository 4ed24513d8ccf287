"""Training time against quality, a plain recipe beside that of train.ipynb.

    python benchmarks/cost_to_quality.py

Writes benchmarks/cost_to_quality.md and Assets/cost_to_quality.png.
"""

import argparse
from copy import deepcopy
from dataclasses import asdict, replace

import torch

from common import (device, header, machine_in_words, once, parser_of, plot_distances,
                    process_pool, row, write_page)
from measure import JUDGES, about_distance, classifier, training_distance
from recipe import QUICK, Recipe, distance, train

from machine import bf16_is_native

PLAIN_LOOKS = (1 / 60, 1 / 30, 1 / 12, 1 / 6, 1 / 3, 2 / 3, 1.0)


def plain(minutes: float, samples: int) -> list[tuple[float, int, float]]:
    """The run of the plain recipe: minutes, images seen and distance at several
    times."""
    torch.set_num_threads(1)

    recipe = Recipe()

    def run():
        return [(seconds / 60, seen, distance(network, samples, bf16=False))
                for seconds, seen, network, _
                in train(recipe, 60 * minutes, PLAIN_LOOKS)]
    key = (asdict(recipe), minutes, PLAIN_LOOKS, samples, machine_in_words())
    return once("plain", key, run)


def ours(recipe: Recipe, minutes: float, samples: int) -> tuple[float, ...]:
    """One run of ours: minutes, images seen, the distance without the guide and with
    it."""
    torch.set_num_threads(1)

    def run():
        early, late = ((seconds, seen, deepcopy(average)) for seconds, seen, _, average
                       in train(recipe, 60 * minutes, looks=(1 / 16, 1.0)))
        seconds, seen, network = late
        return seconds / 60, seen, *(
            distance(network, samples, recipe.bf16, guide)
            for guide in (None, early[-1].eval()))
    return once("ours", (asdict(recipe), minutes, samples, machine_in_words()), run)


def runs(args: argparse.Namespace, recipe: Recipe) -> tuple[list, list]:
    """The rows of the plain recipe and of ours, trained side by side on a CPU."""
    with process_pool(2 if device == "cpu" else 1) as pool:
        plain_rows = pool.submit(plain, args.plain, args.samples)
        futures = [pool.submit(ours, recipe, minutes, args.samples)
                   for minutes in sorted(args.ours)]
        return plain_rows.result(), [future.result() for future in futures]


def verdict(plain_rows: list, our_rows: list) -> str:
    """How soon ours is as good as the plain recipe at its end."""
    minutes, _, best = plain_rows[-1]
    said = []
    for how, column in (("without the guide", 2), ("with it", 3)):
        reached = next((found[0] for found in our_rows if found[column] <= best), None)
        said.append(f"{how} in {reached:.0f} minutes" if reached else
                    f"{how} in none of these runs")
    return (f"Ours comes below what the plain recipe has after {minutes:.0f} minutes "
            f"{' and '.join(said)}.")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--plain", type=float, default=60.0, metavar="MINUTES",
                        help="how long the plain recipe runs")
    parser.add_argument("--ours", type=float, nargs="+", default=[1.0, 2.0, 3.0, 5.0],
                        metavar="MINUTES", help="our runs; each is one of its own, "
                        "because its learning rate falls to zero at its end")
    parser.add_argument("--samples", type=int, default=1000)
    args = parser.parse_args()
    for seed in JUDGES:
        classifier(seed)  # before both processes want them
    torch.set_num_threads(1)
    training_distance(args.samples)
    recipe = replace(QUICK, bf16=bf16_is_native(device))
    plain_rows, our_rows = runs(args, recipe)
    table = header("recipe", "minutes", "images seen", "Frechet distance", "guided")
    table += [row("plain", f"{minutes:.0f}", f"{seen:,}", f"{found:.2f}", "")
              for minutes, seen, found in plain_rows]
    table += [row("ours", f"{minutes:.0f}", f"{seen:,}", f"{alone:.2f}",
                  f"{guided:.2f}")
              for minutes, seen, alone, guided in our_rows]
    write_page("cost_to_quality", args, [
        *about_distance(args.samples, "in 10 steps of dpm_solver"),
        "The plain recipe trains the simple network in fp32, in batches of 64 at a",
        "constant learning rate of 0.0001, without an average. Ours is that of",
        "train.ipynb without labels, in batches of 16, on the larger network at half "
        f"its width, in {'bf16' if recipe.bf16 else 'fp32'}.",
        "The guide is the average after a sixteenth of the run, by 1.5; a guided step",
        "evaluates both. Each run has one core, and its minutes are those that it was",
        "at work there.", "", *table, "", verdict(plain_rows, our_rows)], ":")
    curves = {"the plain recipe": [(found[0], found[2]) for found in plain_rows],
              "ours": [(found[0], found[2]) for found in our_rows],
              "ours, guided": [(found[0], found[3]) for found in our_rows]}
    plot_distances("cost_to_quality", "minutes of training", curves,
                   training_distance(args.samples))


if __name__ == "__main__":
    main()
