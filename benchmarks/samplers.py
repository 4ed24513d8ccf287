"""Quality and cost of every sampler at 5 ... 1000 steps.

    python benchmarks/samplers.py Save_model/model_DDPM_large.pth

Writes benchmarks/samplers_MODEL_SAMPLES.md and Assets/samplers_MODEL_SAMPLES.png.
"""

import argparse
from statistics import median

from torch import nn

from common import header, plot_distances, row, write_page
from measure import (about_distance, checkpoint_arguments, distance_to_test, draw,
                     drawn_once, guide_of, load_model, training_distance,
                     training_distances)

import noise
from model import U_net

STEPS = 15  # the default of generate_image.ipynb
GUIDED = "dpm_solver, guided"
SAMPLERS = {"ddpm": ("ddpm", {}), "ddim": ("ddim", {}),
            "dpm_solver": ("dpm_solver", {}),
            "dpm_solver, eta 0": ("dpm_solver", {"eta": 0.0}),
            "dpm_solver, eta 0.7": ("dpm_solver", {"eta": 0.7}),
            "dpm_solver, spacing 1.5": ("dpm_solver", {"spacing": 1.5}),
            GUIDED: ("dpm_solver", {})}
MOST_STEPS = {"ddpm": 1000, "dpm_solver": 100}  # to compare with; of the others 50


def measured(args: argparse.Namespace, model: U_net) -> list[tuple]:
    """Of each sampler and number of steps: name, steps, evaluations, distance."""
    found = []
    for steps in args.steps:  # the cheap rows first
        for name in args.samplers or SAMPLERS:
            sampler, options = SAMPLERS[name]
            guided = name == GUIDED
            if guided and args.guidance == 1:  # there is no guide
                continue
            if steps > MOST_STEPS.get(name, 50):
                print(name, steps, "left out: takes long")
                continue
            if guided:
                options = {"guide": args.guide, "guidance": args.guidance}
            drawn = drawn_once(args.model, model, range(args.samples), args.seed, steps,
                               sampler, precision=args.precision, **options)
            found.append((name, steps, steps + guided * (steps - 1),
                          distance_to_test(drawn.pixels)))
            print(*found[-1], flush=True)
    return found


def overhead(model: U_net, num_steps: int, precision: str) -> float:
    """The sampler's own time as a share of the network's, for 25 images at a time:
    timed with a network that does nothing."""
    nothing = nn.Identity()
    nothing.forward = lambda x, t, label=None: x
    nothing.metadata, nothing.network = model.metadata, model.network
    kept, noise.FILLS_A_GPU = noise.FILLS_A_GPU, 0  # no recording: that of nothing is empty
    try:
        both, own = (median(draw(net, range(25), 0, num_steps, precision=precision).seconds
                            for _ in range(5)) for net in (model, nothing))
    finally:
        noise.FILLS_A_GPU = kept
    return own / (both - own)


def costs(args: argparse.Namespace, model: U_net) -> list[str]:
    """What drawing takes as generate_image.ipynb draws, and plainly: text, in lines."""
    guide = None if args.guidance == 1 else guide_of(args.model, model, args.guide)
    quick = median(draw(model, range(25), 0, STEPS, precision=args.precision,
                        guide=guide, guidance=args.guidance).seconds for _ in range(3))
    slow = draw(model, range(3), 0, None, "ddpm", batch_size=1).seconds / 3
    return [f"25 digits in {STEPS} steps of dpm_solver guided by {args.guidance:g} "
            f"take {quick:.2f} s; one at a time",
            f"through all steps of ddpm in fp32, a digit takes {slow:.1f} s. The "
            "evaluations are what costs:",
            "the arithmetic of dpm_solver takes "
            f"{overhead(model, 20, args.precision):.1%} of the network's time."]


def main() -> None:
    parser = checkpoint_arguments(__doc__, guided=True)
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20, 50, 1000])
    parser.add_argument("--samplers", choices=SAMPLERS, nargs="+", help="default: all")
    args = parser.parse_args()
    model = load_model(args)
    found = measured(args, model)
    table = header("sampler", "steps", "evaluations", "Frechet distance")
    table += [row(name, steps, evaluations, f"{distance:.2f}")
              for name, steps, evaluations, distance in sorted(found)]
    sets = sorted(map(median, training_distances(args.samples)))
    page = f"samplers_{args.model.stem}_{args.samples}"
    write_page(page, args, [
        *about_distance(args.samples),
        f"The {len(sets)} sets are at {sets[0]:.2f} to {sets[-1]:.2f}.", "", *table, "",
        *costs(args, model)], ":")
    curves = {}
    for name, _, evaluations, distance in found:
        curves.setdefault(name, []).append((evaluations, distance))
    plot_distances(page, "evaluations of the network", curves,
                   training_distance(args.samples))


if __name__ == "__main__":
    main()
