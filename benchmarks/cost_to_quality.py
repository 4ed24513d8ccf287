"""Training time against quality, the plain recipe beside that of train.ipynb: cost_to_quality.md, Assets/cost_to_quality.png.

    python benchmarks/cost_to_quality.py
"""

import argparse
from dataclasses import asdict, replace

import torch

from measure import CACHE, ROOT, Results, command, distance_to_test, machine, mnist, plot_distances
from recipe import LARGE, Recipe, bf16_trains_faster, distance, train

OURS = Recipe(learning_rate=1e-3, decay="cosine", batch_size=32, ema=0.999, channels_last=True, network=LARGE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plain", type=float, default=60, metavar="MINUTES", help="how long the plain recipe runs")
    parser.add_argument("--ours", type=float, nargs="+", default=[1, 2, 3, 5, 10, 20], metavar="MINUTES",
                        help="our runs; each is one of its own, because its learning rate falls to zero at its end")
    parser.add_argument("--samples", type=int, default=1000)
    args = parser.parse_args()

    looks = (1 / 60, 1 / 30, 1 / 12, 1 / 6, 1 / 3, 2 / 3, 1.0)
    torch.set_num_threads(1)  # on one core each, two curves can be measured side by side
    bf16 = bf16_trains_faster(OURS.network)
    ours = replace(OURS, bf16=bf16)
    runs = [("the plain recipe", Recipe(), args.plain, looks)] + [("ours", ours, minutes, (1.0,)) for minutes in args.ours]
    results, rows = Results(CACHE / "cost_to_quality.json"), []
    for name, recipe, minutes, looks in runs:
        found = results.once((asdict(recipe), minutes, looks, args.samples, machine()), lambda: [
            (seconds / 60, seen, distance(recipe, network, args.samples, bf16))
            for seconds, seen, network in train(recipe, 60 * minutes, looks)])
        rows += [(name, *row) for row in found]
        print(name, *found, flush=True)
    curves = {name: [(minutes, found) for run, minutes, _, found in rows if run == name]
              for name in ("the plain recipe", "ours")}
    plain_minutes, plain_distance = curves["the plain recipe"][-1]
    reached = next((minutes for minutes, found in curves["ours"] if found <= plain_distance), None)
    verdict = f"Ours is there after {reached:.0f}, {plain_minutes / reached:.0f} times sooner." if reached else "Ours is not."
    floor = distance_to_test(mnist("train")[:args.samples])
    text = [f"`{command(args)}` on {machine()}:", "",
            f"The Frechet distance of {args.samples:,} samples in 10 steps of dpm_solver to the test images, on the features of a",
            f"small classifier, the median of three seeds; as many training images are at {floor:.2f}. Ours is the larger network",
            "with the recipe of train.ipynb. One thread each.", "",
            "| recipe | minutes | images seen | Frechet distance |", "|---|---|---|---|",
            *[f"| {name} | {minutes:.0f} | {seen:,} | {found:.2f} |" for name, minutes, seen, found in rows], "",
            f"The plain recipe is at {plain_distance:.2f} after {plain_minutes:.0f} minutes. {verdict}"]
    (ROOT / "benchmarks" / "cost_to_quality.md").write_text("\n".join(text) + "\n")
    plot_distances(ROOT / "Assets" / "cost_to_quality.png", "minutes of training", curves, floor)


if __name__ == "__main__":
    main()
