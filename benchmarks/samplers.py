"""Quality and cost of every sampler at 5 ... 1000 evaluations of the network: samplers.md and Assets/samplers.png.

    python benchmarks/samplers.py Save_model/model_DDPM_large.pth
"""

from statistics import median

from torch import nn

from measure import (ROOT, U_net, checkpoint_arguments, command, distance_to_test, draw, drawn_once, guide_of,
                     load_model, machine, plot_distances, training_sets)

STEPS = 15  # the default of generate_image.ipynb
SAMPLERS = {"ddpm": ("ddpm", {}), "ddim": ("ddim", {}), "dpm_solver": ("dpm_solver", {}),
            "dpm_solver, eta 0": ("dpm_solver", {"eta": 0.0}),
            "dpm_solver, spacing 1.5": ("dpm_solver", {"spacing": 1.5}),
            "dpm_solver, guided": ("dpm_solver", {"guidance": None})}


def one_at_a_time(model: U_net, count: int) -> float:
    """Seconds for images drawn one by one, in fp32, through all 1000 steps."""
    return draw(model, range(count), 0, 1000, "ddpm", batch_size=1)[1]


def overhead(model: U_net, num_steps: int, precision: str) -> float:
    """The sampler's own time as a share of the network's, for 25 images at a time: timed with a network that does nothing."""
    nothing = nn.Identity()
    nothing.forward = lambda x, t, label=None: x
    nothing.metadata, nothing.network = model.metadata, model.network
    both, own = (median(draw(net, range(25), 0, num_steps, "dpm_solver", precision=precision)[1] for _ in range(5))
                 for net in (model, nothing))
    return own / (both - own)


def main() -> None:
    parser = checkpoint_arguments(__doc__)
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20, 50, 1000])
    args = parser.parse_args()
    model = load_model(args)
    guidance, rows = model.metadata.get("guidance", 1), []
    real = sorted(map(distance_to_test, training_sets(args.samples)))
    for steps in args.steps:  # the cheap rows first
        for name, (sampler, options) in SAMPLERS.items():
            if steps == 1000 and name != "ddpm":  # the whole walk is that of the paper
                continue
            guided = "guidance" in options
            options = options | {"guidance": guidance} if guided else options
            pixels, _ = drawn_once(args.model, model, range(args.samples), args.seed, steps, sampler,
                                   precision=args.precision, **options)
            rows.append((name, steps, 2 * steps if guided and guidance != 1 else steps,
                         distance_to_test(pixels)))
            print(*rows[-1], flush=True)

    guide, sampler = guide_of(args.model, guidance), "dpm_solver"
    quick = median(draw(model, range(25), 0, STEPS, sampler, precision=args.precision, guide=guide,
                        guidance=guidance)[1] for _ in range(3))
    slow = one_at_a_time(model, 3) / 3
    table = ["| sampler | steps | evaluations | Frechet distance |", "|---|---|---|---|"]
    table += [f"| {name} | {steps} | {evaluations} | {distance:.2f} |"
              for name, steps, evaluations, distance in sorted(rows)]
    text = [f"`{command(args)}` on {machine()}:", "",
            f"The Frechet distance of {args.samples:,} samples to the 10,000 test images, on the features of a small classifier,",
            f"the median of three seeds. {len(real)} sets of as many training images are at {real[0]:.2f} to {real[-1]:.2f}, their",
            f"median is {median(real):.2f}.", "", *table, "",
            f"25 digits in {STEPS} steps of {sampler} guided by {guidance:g} take {quick:.2f} s; one at a time",
            f"through 1000 steps of ddpm in fp32, a digit takes {slow:.1f} s. The evaluations are what costs: the arithmetic of",
            f"dpm_solver takes {overhead(model, 20, args.precision):.1%} of the network's time."]
    (ROOT / "benchmarks" / "samplers.md").write_text("\n".join(text) + "\n")

    curves = {name: [(evaluations, distance) for sampler, _, evaluations, distance in rows if sampler == name]
              for name in SAMPLERS}
    plot_distances(ROOT / "Assets" / "samplers.png", "evaluations of the network", curves, median(real))


if __name__ == "__main__":
    main()
