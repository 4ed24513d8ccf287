"""Why `dpm_solver` is the multistep solver: beside others, on the same weights and noise: solvers.md.

    python benchmarks/solvers.py Save_model/model_DDPM_large.pth
"""

from collections.abc import Callable, Iterator

import diffusers
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

from measure import (ROOT, NoiseScheduler, checkpoint_arguments, command, distance_to_test, draw, fingerprint, load_model,
                     machine, once, training_distance)


def of_diffusers(solver: type, random: bool = False, **options) -> Callable[..., Iterator[tuple[int, Tensor]]]:
    """A walk like `NoiseScheduler.denoise`, by a solver of diffusers."""
    @torch.no_grad()
    def denoise(model, xt, num_steps, sampler, generator):
        walk = solver(timestep_spacing="trailing", **options)
        walk.set_timesteps(num_steps)
        extra = {"generator": generator} if random else {}
        for t in walk.timesteps:
            noise_pred = model(xt, t.expand(len(xt)).to(xt.device)).to(xt.dtype)
            with torch.autocast(xt.device.type, enabled=False):  # the solver's own arithmetic
                xt = walk.step(noise_pred, t, xt, **extra).prev_sample
            yield int(t), xt
    return denoise


def ipndm(model: Callable, xt: Tensor, num_steps: int, sampler: str, generator: list) -> Iterator[tuple[int, Tensor]]:
    """iPNDM (Zhang and Chen 2022): the step of DDIM by the noise that Adams and Bashforth see in the last four."""
    scheduler, weights = NoiseScheduler(device=xt.device), ([1], [3, -1], [23, -16, 5], [55, -59, 37, -9])
    timesteps, seen = scheduler.timesteps(num_steps), []
    for t, s in zip(timesteps, timesteps[1:]):
        with torch.no_grad():
            seen = [model(xt, torch.full((len(xt),), t, device=xt.device)).to(xt.dtype), *seen[:3]]
        bashforth = weights[len(seen) - 1]
        xt = scheduler.ddim_step(xt, sum(w * noise for w, noise in zip(bashforth, seen)) / sum(bashforth), t, s)
        yield s, xt


def spaced(power: float) -> Callable[..., Iterator[tuple[int, Tensor]]]:
    """`NoiseScheduler.denoise` at t = T (1 - i / n)^power: above 1 the timesteps crowd near the image, below near the noise."""
    def denoise(model, xt, num_steps, sampler, generator):
        scheduler = NoiseScheduler(device=xt.device)
        scheduler.timesteps = lambda n: [round(scheduler.num_timesteps * (1 - i / n)**power) - 1 for i in range(n + 1)]
        return scheduler.denoise(model, xt, num_steps, sampler, generator)
    return denoise


DPM = DPMSolverMultistepScheduler
SOLVERS = {
    "ours, eta 1": (None, {}), "ours, eta 0": (None, {"eta": 0.0}),
    "ours, eta 1, spacing to the power of 1.5": (spaced(1.5), {}),
    "ours, eta 1, spacing to the power of 0.75": (spaced(0.75), {}),
    "DPM-Solver++(2M) SDE": (of_diffusers(DPM, random=True, solver_order=2, algorithm_type="sde-dpmsolver++"), {}),
    "DPM-Solver++(2M)": (of_diffusers(DPM, solver_order=2), {}),
    "DPM-Solver++(3M)": (of_diffusers(DPM, solver_order=3), {}),
    "UniPC, order 2": (of_diffusers(UniPCMultistepScheduler, solver_order=2), {}),
    "UniPC, order 3": (of_diffusers(UniPCMultistepScheduler, solver_order=3), {}),
    "iPNDM, order 4": (ipndm, {})}


def main() -> None:
    parser = checkpoint_arguments(__doc__)
    parser.set_defaults(samples=1000)
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10])
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model(args)
    if model.metadata["noise_schedule"] != {"num_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02}:
        raise ValueError(f"{args.model}: its noise schedule is not the one that the solvers of diffusers start from")
    rows = {name: [] for name in SOLVERS}
    for steps in args.steps:
        for name, (denoise, options) in SOLVERS.items():
            key = (name, steps, args.samples, args.seed, args.precision, fingerprint(args.model)[0], machine())
            rows[name] += once("solvers", key, lambda: [distance_to_test(draw(
                model, range(args.samples), args.seed, steps, "dpm_solver", precision=args.precision, denoise=denoise,
                **options)[0])])
            print(name, steps, rows[name][-1], flush=True)
    text = [f"`{command(args)}` on {machine()}:", "",
            f"The Frechet distance of {args.samples:,} samples to the 10,000 test images, on features of a small classifier,",
            f"the median of three seeds; as many training images are at {training_distance(args.samples):.2f}, the median of up to",
            "ten sets. One evaluation of the network a step, without a guide; where nothing else is said, the timesteps are evenly",
            "spaced, t = T (1 - i / n). iPNDM is written out in the script, the rest that is not ours is of diffusers",
            f"{diffusers.__version__}.", "",
            "| solver | " + " | ".join(f"{steps} steps" for steps in args.steps) + " |", "|---|" + "---|" * len(args.steps),
            *[f"| {name} | " + " | ".join(f"{found:.2f}" for found in row) + " |" for name, row in rows.items()]]
    (ROOT / "benchmarks" / "solvers.md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
