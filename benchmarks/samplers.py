"""Quality and cost of every sampler at 5 ... 1000 evaluations of the network: samplers.md and Assets/samplers.png.

    python benchmarks/samplers.py Save_model/model_DDPM_large.pth
"""

from statistics import median

import torch
from torch import nn

from measure import (ROOT, U_net, checkpoint_arguments, command, device, distance_to_test, draw, drawn_once, guide_of,
                     load_model, machine, plot_distances, training_sets)

GUIDANCE, STEPS = 1.75, 15  # the defaults of generate_image.ipynb
SAMPLERS = {"ddpm": ("ddpm", {}), "ddim": ("ddim", {}), "dpm_solver": ("dpm_solver", {}),
            "dpm_solver, eta 0": ("dpm_solver", {"eta": 0.0}),
            f"dpm_solver, guided by {GUIDANCE:g}": ("dpm_solver", {"guidance": GUIDANCE})}


def one_at_a_time(model: U_net, count: int) -> float:
    """Seconds for images drawn one by one, in fp32 and the plain memory format, through all 1000 steps."""
    plain = U_net(device, **model.network).eval()
    plain.load_state_dict(model.state_dict())
    return draw(plain, range(count), 0, 1000, "ddpm", batch_size=1)[1]


def overhead(model: U_net, num_steps: int, bf16: bool) -> float:
    """The sampler's own time as a share of the network's, for 25 images at a time: timed with a network that does nothing."""
    nothing = nn.Identity()
    nothing.forward = lambda x, t: x
    nothing.metadata, nothing.network = model.metadata, model.network
    both, own = (median(draw(net, range(25), 0, num_steps, "dpm_solver", bf16=bf16)[1] for _ in range(5))
                 for net in (model, nothing))
    return own / (both - own)


def main() -> None:
    parser = checkpoint_arguments(__doc__)
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20, 50, 1000])
    args = parser.parse_args()
    model = load_model(args)
    bf16, rows = args.precision == "bf16", []
    real = sorted(map(distance_to_test, training_sets(args.samples)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the rows take hours; on one core each, two tables can be drawn side by side
    for steps in args.steps:  # the cheap rows first
        for name, (sampler, options) in SAMPLERS.items():
            if steps < 1000 or name == "ddpm":  # the whole walk is that of the paper
                evaluations = 2 * steps if "guidance" in options else steps
                pixels, _ = drawn_once(args.model, model, range(args.samples), args.seed, steps, sampler, bf16=bf16, **options)
                rows.append((name, steps, evaluations, distance_to_test(pixels)))
                print(*rows[-1], flush=True)

    torch.set_num_threads(threads)
    guide, sampler = guide_of(args.model, GUIDANCE), "dpm_solver"
    quick = median(draw(model, range(25), 0, STEPS, sampler, bf16=bf16, guide=guide, guidance=GUIDANCE)[1] for _ in range(3))
    slow = one_at_a_time(model, 3) / 3
    table = ["| sampler | steps | evaluations | Frechet distance |", "|---|---|---|---|"]
    table += [f"| {name} | {steps} | {evaluations} | {distance:.2f} |" for name, steps, evaluations, distance in sorted(rows)]
    text = [f"`{command(args)}` on {machine()}:", "",
            f"The Frechet distance of {args.samples:,} samples to the 10,000 test images, on the features of a small classifier,",
            f"the median of three seeds. {len(real)} sets of as many training images are at {real[0]:.2f} to {real[-1]:.2f}, their",
            f"median is {median(real):.2f}.", "", *table, "",
            f"With {threads} threads 25 digits in {STEPS} steps of {sampler} guided by {GUIDANCE:g} take {quick:.2f} s; one at a time",
            f"through 1000 steps of ddpm in fp32, a digit takes {slow:.1f} s. The evaluations are what costs: the arithmetic of",
            f"dpm_solver takes {overhead(model, 20, bf16):.1%} of the network's time."]
    (ROOT / "benchmarks" / "samplers.md").write_text("\n".join(text) + "\n")

    curves = {name: [(evaluations, distance) for sampler, _, evaluations, distance in rows if sampler == name]
              for name in SAMPLERS}
    plot_distances(ROOT / "Assets" / "samplers.png", "evaluations of the network", curves, median(real))


if __name__ == "__main__":
    main()
