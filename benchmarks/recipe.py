"""What each part of the training recipe is worth: runs of equal time, one change at a time, from the plain recipe up, from
that of train.ipynb down, and whether its learning rate should fall in longer runs, of the larger network (long) and of the
simple one (simple): recipe_TABLE_MINUTES.md.

    python benchmarks/recipe.py --table down --minutes 10
"""

import argparse
import math
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from measure import (ROOT, NoiseScheduler, U_net, bf16_is_native, classifier, command, device, distance_to_test,
                     draw, gaussian_noise, machine, mnist, once)
from training import Run


@dataclass(frozen=True)
class Recipe:
    """One way to train; the defaults are the plain recipe of many small repositories."""
    learning_rate: float = 1e-4
    decay: str = "constant"  # or "cosine", to zero at the end, with a warm-up of a twentieth
    batch_size: int = 64
    ema: float = 0.0  # decay that the average of the weights reaches; 0: none
    bf16: bool = False
    channels_last: bool = False
    stratified: bool = False  # one timestep from each of batch_size equal parts of 0 ... T-1
    min_snr: float = 0.0  # gamma of Hang et al. 2023; 0: the plain loss
    target: str = "noise"  # or "velocity"
    beta_end: float = 0.02
    network: dict = field(default_factory=dict)


def velocity(x0: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """v = √ᾱ ε - √(1-ᾱ) x_0 (Salimans and Ho 2022)."""
    return alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x0


class NoiseOfVelocity(nn.Module):
    """The noise that a network of the velocity sees: ε = √ᾱ v + √(1-ᾱ) x_t."""

    def __init__(self, velocity: U_net, alpha_bar: Tensor):
        super().__init__()
        self.velocity, self.alpha_bar = velocity, alpha_bar
        self.network, self.metadata = velocity.network, velocity.metadata

    def forward(self, x: Tensor, t: Tensor, label: None = None) -> Tensor:
        alpha_bar = self.alpha_bar[t].view(-1, 1, 1, 1)
        return alpha_bar.sqrt() * self.velocity(x, t).float() + (1 - alpha_bar).sqrt() * x


class Digits:
    """MNIST's training images as `Run` takes them."""

    def __init__(self):
        self.pixels, self.labels = mnist("train"), None

    def __len__(self) -> int:
        return len(self.pixels)


def loss_function(recipe: Recipe, model: U_net, scheduler: NoiseScheduler) -> Callable[..., Tensor]:
    """The loss of a recipe: of the noise, as in train.ipynb, or of the velocity."""
    snr = scheduler.alpha_bar / (1 - scheduler.alpha_bar)
    weight = torch.ones_like(snr)
    if recipe.min_snr:
        weight = snr.clamp(max=recipe.min_snr) / (snr if recipe.target == "noise" else snr + 1)

    def loss_of(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        prediction = model(scheduler.add_noise(x0, noise, t), t)
        alpha_bar = scheduler.alpha_bar[t].view(-1, 1, 1, 1)
        target = noise if recipe.target == "noise" else velocity(x0, noise, alpha_bar)
        return (weight[t] * (prediction - target).square().mean(dim=(1, 2, 3))).mean()
    return loss_of


def train(recipe: Recipe, seconds: float, looks: tuple[float, ...] = (1.0,),
          seed: int = 0) -> Iterator[tuple[float, int, U_net, U_net]]:
    """Trains on MNIST for so many seconds, by the step of train.ipynb.

    At each of the given shares of them yields the seconds trained, the images seen, the network and its
    average (equal to the network where the recipe has none). The time between a yield and the next step
    is not counted. On a CPU, where this is for processes of one thread, the seconds are those of the
    process, which others on the machine do not lengthen.
    """
    torch.manual_seed(seed)
    clock = time.process_time if device == "cpu" else time.perf_counter
    layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
    model = U_net(device, **recipe.network).to(memory_format=layout)
    model.metadata = {"image_size": 28, "noise_schedule": {"beta_end": recipe.beta_end}}
    scheduler = NoiseScheduler(beta_end=recipe.beta_end, device=device)
    loss_of, elapsed, looks = loss_function(recipe, model, scheduler), 0.0, [look * seconds for look in looks]

    def factor(step):
        share = min(1.0, elapsed / seconds)
        warm_up = min(1, 20 * share + 0.01)
        return warm_up * (1 + math.cos(math.pi * share)) / 2 if recipe.decay == "cosine" else 1

    with tempfile.TemporaryDirectory() as folder:
        run = Run(model, Digits(), batch_size=recipe.batch_size, learning_rate=recipe.learning_rate,
                  num_epochs=10**6, seed=seed, save_dir=folder, decay=recipe.ema,
                  precision="bf16" if recipe.bf16 else "fp32")
        run.lr_schedule = LambdaLR(run.optimizer, factor)
        start = clock()
        for x0, _ in run.batches():
            t = torch.rand(len(x0), generator=run.rng, device=device)
            if recipe.stratified:
                t = (torch.arange(len(x0), device=device) + t) / len(x0)
            t = (t * scheduler.num_timesteps).long().clamp(max=scheduler.num_timesteps - 1)
            run.step(loss_of, x0, gaussian_noise(x0, run.rng), t)
            elapsed, start = elapsed + clock() - start, clock()
            if elapsed >= looks[0]:
                looks.pop(0)
                yield elapsed, run.images_seen, model, run.average
                start = clock()
            if not looks:
                break


def distance(recipe: Recipe, network: U_net, samples: int, bf16: bool, guide: U_net | None = None) -> float:
    """Frechet distance to the test images of samples in ten steps of dpm_solver, with a guidance of 1.5 if there is a
    guide."""
    network.eval()
    alpha_bar = NoiseScheduler(beta_end=recipe.beta_end, device=device).alpha_bar
    model = network if recipe.target == "noise" else NoiseOfVelocity(network, alpha_bar)
    drawn, _ = draw(model, range(samples), 0, 10, "dpm_solver", precision="bf16" if bf16 else "fp32",
                    guide=guide, guidance=1.0 if guide is None else 1.5)
    network.train()
    return distance_to_test(drawn)


LARGE = {"widths": (64,), "blocks": 2, "bottleneck": 128, "attention": 3, "normalise": True, "patch": 2}
STAGES = [  # the network decides most
    {"normalised blocks": {"network": {"normalise": True}}, "patches of 2 x 2, attention": {"network": LARGE},
     "whole resolution, attention": {"network": {"widths": (32, 64), "bottleneck": 128, "attention": 2, "normalise": True}}},
    {"learning rate 3e-4": {"learning_rate": 3e-4}, "learning rate 1e-3": {"learning_rate": 1e-3},
     "learning rate 2e-3": {"learning_rate": 2e-3}},
    {"channels_last": {"channels_last": True}, "channels_last, bf16": {"channels_last": True, "bf16": True}},
    {"cosine decay": {"decay": "cosine"}, "EMA 0.999": {"ema": 0.999},
     "cosine decay, EMA 0.999": {"decay": "cosine", "ema": 0.999}},
    {"batch 32": {"batch_size": 32}, "batch 16": {"batch_size": 16}},
    {"stratified timesteps": {"stratified": True}, "min-SNR 5": {"min_snr": 5.0}, "velocity": {"target": "velocity"},
     "beta to 0.015": {"beta_end": 0.015}},
    {"one level of 32": {"network": {"widths": (32,), "bottleneck": 64}},
     "one level of 96": {"network": {"widths": (96,), "bottleneck": 192}},
     "one block a level": {"network": {"blocks": 1}}, "dropout 0.1": {"network": {"dropout": 0.1}}}]


def changed(recipe: Recipe, network: dict | None = None, **change) -> Recipe:
    """The recipe with a change, in its network too: what is not named there stays."""
    return replace(recipe, network=recipe.network | (network or {}), **change)


TRAIN_IPYNB = Recipe(learning_rate=1e-3, decay="cosine", batch_size=32, ema=0.999, channels_last=True, min_snr=5.0,
                     network=LARGE)
# narrower, because a few minutes do not fill a wide network
QUICK = changed(TRAIN_IPYNB, batch_size=16, network={"widths": (32,), "bottleneck": 64})
SIMPLE = replace(TRAIN_IPYNB, network={})
PLAIN_LOSS = {"min_snr": 0.0}
DECAY = {"cosine with warm-up": {}, "constant learning rate": {"decay": "constant"}}
CHANGES = {"down": (QUICK, {"the plain loss": PLAIN_LOSS,
                            "the plain loss, constant learning rate": PLAIN_LOSS | {"decay": "constant"},
                            "the plain loss, batch 64": PLAIN_LOSS | {"batch_size": 64}, "min-SNR 5, as in train.ipynb": {}}),
           "long": (QUICK, DECAY), "simple": (SIMPLE, DECAY)}


def result(recipe: Recipe, minutes: float, samples: int, bf16: bool, seed: int = 0) -> tuple[float, float, int]:
    """The distances that a recipe's average and its last weights reach in so many minutes of one core, and the images that it
    sees; (inf, inf, 0) if it fails."""
    torch.set_num_threads(1)

    def run():
        try:
            (_, seen, model, average), = train(recipe, 60 * minutes, seed=seed)
            found = distance(recipe, average, samples, bf16)
            return found, found if average is model else distance(recipe, model, samples, bf16), seen
        except (RuntimeError, ValueError) as error:  # a gradient or a prediction that is not finite
            if "finite" not in str(error):
                raise
            return math.inf, math.inf, 0
    return tuple(once("recipe", (asdict(recipe), minutes, samples, bf16, seed, machine()), run))


def row(cells: tuple) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def up(submit: Callable[..., Future], seeds: int) -> list[str]:
    """The text and table from the plain recipe up, in lines."""
    plain = [submit(Recipe(), seed) for seed in range(seeds)]
    best, best_distance, margin = Recipe(), plain[0].result()[0], 0.97  # what is less than three per cent better may be chance
    rows = []
    for stage in STAGES:
        candidates = {name: changed(best, **change) for name, change in stage.items()}
        futures = {name: submit(recipe) for name, recipe in candidates.items()}
        found = {name: future.result() for name, future in futures.items()}
        winner = min(found, key=found.get)
        wins = found[winner][0] < margin * best_distance
        rows += [(name, *run, "stays" if wins and name == winner else "") for name, run in found.items()]
        print(*rows[-len(stage):], sep="\n", flush=True)
        if wins:
            best, best_distance = candidates[winner], found[winner][0]
    rows = [(f"the plain recipe, seed {seed}", *run.result(), "") for seed, run in enumerate(plain)] + rows
    rows.append(("all that stays, seed 1", *submit(best, seed=1).result(), ""))
    return ["Each row is a run on one core, seed 0 where no other is named: the recipe so far with one change. Of each group of",
            "changes the best stays where it wins by 3 %. At the end all that stays with another seed.", "",
            "| change | Frechet distance | images seen | |", "|---|---|---|---|",
            *[row((name, f"{found:.2f}", f"{seen:,}", stays)) for name, found, _, seen, stays in rows]]


def with_seeds(ours: Recipe, changes: dict[str, dict], submit: Callable[..., Future], seeds: int) -> list[str]:
    """The text and table of changes to the recipe of train.ipynb, each with several seeds, in lines."""
    ours = replace(ours, bf16=bf16_is_native(device))
    futures = {name: [submit(changed(ours, **change), seed) for seed in range(seeds)] for name, change in changes.items()}
    rows = []

    def distances(found: tuple[float, ...]) -> str:
        return f"{fmean(found):.1f}" + (f" ({', '.join(f'{one:.1f}' for one in found)})" if len(found) > 1 else "")

    for name in changes:
        average, last, seen = zip(*(future.result() for future in futures[name]))
        rows.append(row((name, distances(average), distances(last), f"{round(fmean(seen)):,}")))
        print(rows[-1], flush=True)
    network = "larger network at half its width" if ours.network else "simple network"
    runs, what = (("one run, of seed 0,", "distance") if seeds == 1 else
                  (f"{seeds} runs, of seeds 0 to {seeds - 1}, each", "mean distance (and each)"))
    return [f"The recipe of train.ipynb, in batches of {ours.batch_size} on the {network}, and changes to it.",
            f"Each row is {runs} on one core: the {what} of the averaged weights and, from the same training,",
            "of the last ones.", "",
            "| change | Frechet distance of the average | of the last weights | images seen |", "|---|---|---|---|", *rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", choices=("up", *CHANGES), required=True)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each recipe; of --table up, of the plain one only")
    parser.add_argument("--processes", type=int, default=os.cpu_count() if device == "cpu" else 1,
                        help="how many runs at a time, each on one core")
    args = parser.parse_args()
    if args.seeds < 1:
        parser.error(f"--seeds {args.seeds}: must be at least 1")
    for seed in range(3):
        classifier(seed)  # before the processes want them all at once
    torch.set_num_threads(1)
    bf16 = bf16_is_native(device)
    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
        def submit(recipe: Recipe, seed: int = 0) -> Future:
            return pool.submit(result, recipe, args.minutes, args.samples, bf16, seed)

        table = up(submit, args.seeds) if args.table == "up" else with_seeds(*CHANGES[args.table], submit, args.seeds)
    text = [f"`{command(args)}` on {machine()}.", "", *table]
    (ROOT / "benchmarks" / f"recipe_{args.table}_{args.minutes:g}.md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
