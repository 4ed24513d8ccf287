"""What guidance, the spacing of the timesteps and their number buy, each with each.

    python benchmarks/guidance.py Save_model/model_DDPM_large.pth --seed 0 1 2

Writes benchmarks/guidance_MODEL_SAMPLES.md.
"""

import argparse
from itertools import product
from statistics import median

from common import header, mean_and_each, row, write_page
from measure import (GUIDES, JUDGES, about_distance, about_unclear,
                     checkpoint_arguments, classifier, default_guide,
                     distances_to_test, drawn_once, features, load_model,
                     mean_probabilities, mnist, relative_distance, right_digits,
                     unclear)
from quality import recall
from torch import Tensor

from model import U_net


def arguments() -> argparse.Namespace:
    parser = checkpoint_arguments(__doc__, samples=1000, several_seeds=True)
    parser.add_argument("--guide", choices=GUIDES, nargs="+",
                        help="default: early where the checkpoint keeps one")
    parser.add_argument("--guidance", type=float, nargs="+",
                        default=[1.0, 1.25, 1.5, 2.0])
    parser.add_argument("--spacing", type=float, nargs="+", default=[1.0, 1.5])
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 15])
    args = parser.parse_args()
    args.guide = args.guide or [default_guide(args.model)]
    return args


def measured(args: argparse.Namespace, model: U_net, seed: int, steps: int, **how,
             ) -> tuple[float, ...]:
    """R, recall, the share of unclear digits and of black pixels and, where there are
    labels, of right digits."""
    drawn = drawn_once(args.model, model, range(args.samples), seed, steps,
                       precision=args.precision, **how)
    probabilities = mean_probabilities(drawn.pixels)
    distance = relative_distance(distances_to_test(drawn.pixels), args.samples)
    found = [distance, recall_of(drawn.pixels), unclear(probabilities),
             (drawn.pixels == 0).float().mean().item()]
    if drawn.labels is not None:
        found.append(right_digits(probabilities, drawn.labels).float().mean().item())
    return tuple(found)


def recall_of(images: Tensor) -> float:
    """How much of the test images' variety these have: the median of the judges."""
    judges = [classifier(seed) for seed in JUDGES]
    return median(recall(features(judge, images), features(judge, mnist("t10k")))
                  for judge in judges)


def main() -> None:
    args = arguments()
    model = load_model(args)
    names = ["guide", "guidance", "spacing", "steps", "evaluations", "R", "recall",
             "unclear", "black"]
    names += ["right digit"] * bool(model.network["num_classes"])
    table = header(*names)
    grid = product(args.guide, args.guidance, args.spacing, args.steps)
    for guide, guidance, spacing, steps in grid:
        alone = guidance == 1
        if alone and guide != args.guide[0]:  # without a guide it is the same again
            continue
        found = zip(*(measured(args, model, seed, steps, guide=guide, guidance=guidance,
                               spacing=spacing) for seed in args.seed))
        table.append(row("none" if alone else guide, f"{guidance:g}", f"{spacing:g}",
                         steps, steps if alone else 2 * steps - 1,
                         *map(mean_and_each, found, (".3f", ".3f", *[".1%"] * 3))))
        print(table[-1], flush=True)
    explained = ["R: the Frechet distance of the samples, divided by that of the",
                 "training images. Recall: how much of the test images' variety the",
                 "samples have; as many training images have "
                 f"{recall_of(mnist('train')[:args.samples]):.3f}. Black: the share",
                 "of the pixels; of the test images' it is "
                 f"{(mnist('t10k') == 0).float().mean():.1%}.",
                 *["Right digit: the share that shows the digit asked for."]
                 * bool(model.network["num_classes"]),
                 "Where there are several seeds: the mean, and each."]
    write_page(f"guidance_{args.model.stem}_{args.samples}", args,
               [*about_distance(args.samples, "of dpm_solver"), *about_unclear(),
                *explained, "", *table], ":")


if __name__ == "__main__":
    main()
