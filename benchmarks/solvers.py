"""Why `dpm_solver` is the solver: beside others, on the same weights and noise.

    python benchmarks/solvers.py Save_model/model_DDPM_large.pth

Writes benchmarks/solvers.md.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise

import diffusers
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

from common import fingerprint, header, machine_in_words, once, row, write_page
from measure import (about_distance, checkpoint_arguments, distance_to_test, draw,
                     load_model)

from noise import NoiseScheduler, random_stream

Walk = Callable[..., Iterator[tuple[int, Tensor]]]


def of_diffusers(solver: type, random: bool = False, **options) -> Walk:
    """A walk like `NoiseScheduler.denoise`, by a solver of diffusers."""
    @torch.no_grad()
    def denoise(model, xt, num_steps, sampler, generators):
        walk = solver(timestep_spacing="trailing", **options)
        walk.set_timesteps(num_steps)
        own = random_stream(0, generators.images.start, 1, device=xt.device)
        extra = {"generator": own} if random else {}
        for t in walk.timesteps:
            noise_pred = model(xt, t.expand(len(xt)).to(xt.device)).to(xt.dtype)
            with torch.autocast(xt.device.type, enabled=False):  # of the solver
                xt = walk.step(noise_pred, t, xt, **extra).prev_sample
            yield int(t), xt
    return denoise


@torch.no_grad()
def ipndm(model: Callable, xt: Tensor, num_steps: int, sampler: str, generators,
          ) -> Iterator[tuple[int, Tensor]]:
    """iPNDM (Zhang and Chen 2022): the step of DDIM by the noise that Adams and
    Bashforth see in the last four."""
    scheduler, seen = NoiseScheduler(device=xt.device), []
    weights = ([1], [3, -1], [23, -16, 5], [55, -59, 37, -9])
    for t, s in pairwise(scheduler.timesteps(num_steps)):
        at = torch.full((len(xt),), t, device=xt.device)
        seen = [model(xt, at).to(xt.dtype), *seen[:3]]
        bashforth = weights[len(seen) - 1]
        noise_pred = sum(w * noise for w, noise in zip(bashforth, seen))
        xt = scheduler.ddim_step(xt, noise_pred / sum(bashforth), t, s)
        yield s, xt


DPM, UNIPC = DPMSolverMultistepScheduler, UniPCMultistepScheduler
SOLVERS = {
    "ours, eta 1": {}, "ours, eta 0": {"eta": 0.0},
    "ours, eta 1, spacing 1.5": {"spacing": 1.5},
    "ours, eta 1, spacing 0.75": {"spacing": 0.75},
    "DPM-Solver++(2M) SDE": {"denoise": of_diffusers(
        DPM, random=True, solver_order=2, algorithm_type="sde-dpmsolver++")},
    "DPM-Solver++(2M)": {"denoise": of_diffusers(DPM, solver_order=2)},
    "DPM-Solver++(3M)": {"denoise": of_diffusers(DPM, solver_order=3)},
    "UniPC, order 2": {"denoise": of_diffusers(UNIPC, solver_order=2)},
    "UniPC, order 3": {"denoise": of_diffusers(UNIPC, solver_order=3)},
    "iPNDM, order 4": {"denoise": ipndm}}


def main() -> None:
    parser = checkpoint_arguments(__doc__, samples=1000)
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10])
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model(args)
    theirs = {"num_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02}
    if model.metadata["noise_schedule"] != theirs:
        raise ValueError(f"{args.model}: its noise schedule is not the one that the "
                         "solvers of diffusers start from")
    found = {name: [] for name in SOLVERS}
    for steps in args.steps:
        for name, options in SOLVERS.items():
            key = (name, steps, args.samples, args.seed, args.precision,
                   fingerprint(args.model)[0], diffusers.__version__,
                   machine_in_words())
            found[name] += once("solvers", key, lambda: [distance_to_test(draw(
                model, range(args.samples), args.seed, steps, precision=args.precision,
                **options).pixels)])
            print(name, steps, found[name][-1], flush=True)
    write_page("solvers", args, [
        *about_distance(args.samples),
        "One evaluation of the network a step, without a guide; where nothing else is",
        "said, the timesteps are evenly spaced. iPNDM is written out in the script,",
        f"the rest that is not ours is of diffusers {diffusers.__version__}.", "",
        *header("solver", *(f"{steps} steps" for steps in args.steps)),
        *[row(name, *(f"{one:.2f}" for one in each)) for name, each in found.items()]],
        ":")


if __name__ == "__main__":
    main()
