"""Quality and cost of every sampler at 5 ... 1000 evaluations of the network: samplers.md and Assets/samplers.png.

    python benchmarks/samplers.py --samples 10000
"""

import argparse
from pathlib import Path
from statistics import median

import torch
from torch import nn

from measure import (ROOT, U_net, bf16_is_faster, classifier, device, draw, drawn_once, frechet_distance, machine, mnist,
                     plot_distances)

SAMPLERS = {"ddpm": ("ddpm", {}), "ddim": ("ddim", {}), "dpm_solver": ("dpm_solver", {}),
            "dpm_solver, eta 0": ("dpm_solver", {"eta": 0.0})}


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "Save_model" / "model_DDPM.pth")
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20, 50, 100, 1000])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    model = U_net.from_checkpoint(args.model, device).to(memory_format=torch.channels_last).eval()
    x, t = torch.zeros(25, 1, 28, 28, device=device), torch.zeros(25, dtype=torch.long, device=device)
    bf16 = bf16_is_faster(lambda: model(x, t), device)
    train, test, extractor = mnist("train")[:args.samples], mnist("t10k"), classifier(seed=0)
    floor = frechet_distance(extractor, train, test)

    rows = []
    for name, (sampler, options) in SAMPLERS.items():
        for steps in args.steps:
            pixels, seconds = drawn_once(args.model, model, range(args.samples), args.seed, steps, sampler, bf16=bf16,
                                         **options)
            rows.append((name, steps, frechet_distance(extractor, pixels, test), seconds))
            print(*rows[-1], flush=True)

    quick, slow = median(draw(model, range(25), 0, 50, "ddpm", bf16=bf16)[1] for _ in range(3)), one_at_a_time(model, 25)
    table = ["| sampler | evaluations | Frechet distance | seconds | images/s |", "|---|---|---|---|---|"]
    table += [f"| {name} | {steps} | {distance:.2f} | {seconds:.0f} | {args.samples / seconds:.2f} |"
              for name, steps, distance, seconds in rows]
    precision = "bf16" if bf16 else "fp32"
    text = [f"`python benchmarks/samplers.py --samples {args.samples} --seed {args.seed}` on {machine()}, {precision}:",
            f"the Frechet distance of {args.samples:,} samples of `{args.model.name}` to the 10,000 test images,",
            f"on the features of a small classifier. {args.samples:,} training images are at {floor:.2f}.", "", *table, "",
            f"25 digits in 50 steps of ddpm: {quick:.2f} s. One at a time through 1000 steps in fp32: {slow:.0f} s, "
            f"{slow / quick:.0f} times as long.",
            f"The arithmetic of dpm_solver takes {overhead(model, 20, bf16):.1%} of the network's time."]
    (ROOT / "benchmarks" / "samplers.md").write_text("\n".join(text) + "\n")

    curves = {name: [(steps, distance) for sampler, steps, distance, _ in rows if sampler == name] for name in SAMPLERS}
    plot_distances(ROOT / "Assets" / "samplers.png", "evaluations of the network", curves, floor)


if __name__ == "__main__":
    main()
