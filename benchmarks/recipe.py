"""What each part of the training recipe is worth: runs of equal time, one change at a
time.

    python benchmarks/recipe.py --table down --minutes 10

--table down: changes to that of train.ipynb. long, simple: whether the learning rate
should fall in longer runs, of the larger and the simple network. Writes
benchmarks/recipe_TABLE_MINUTES.md.
"""

import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from common import (device, header, machine_in_words, mean_and_each, once, parser_of,
                    process_pool, row, write_page)
from loops import Images, QuietRun, run_steps
from measure import (JUDGES, about_distance, classifier, distance_to_test, draw, mnist,
                     training_distance)

from machine import bf16_is_native
from model import U_net
from noise import NoiseScheduler


@dataclass(frozen=True)
class Recipe:
    """One way to train; the defaults are the plain recipe of many small
    repositories."""
    learning_rate: float = 1e-4
    decay: str = "constant"  # or "cosine", after a warm-up of a twentieth, to zero
    batch_size: int = 64
    ema: float = 0.0  # decay that the average of the weights reaches; 0: none
    bf16: bool = False
    channels_last: bool = False
    min_snr: float = 0.0  # gamma of Hang et al. 2023; 0: the plain loss
    network: dict = field(default_factory=dict)


LARGE = {"widths": (64,), "blocks": 2, "bottleneck": 128, "attention": 3,
         "normalise": True, "patch": 2}
TRAIN_IPYNB = Recipe(learning_rate=1e-3, decay="cosine", batch_size=32, ema=0.999,
                     channels_last=True, min_snr=5.0, network=LARGE)
# narrower, because a few minutes do not fill a wide network
QUICK = replace(TRAIN_IPYNB, batch_size=16,
                network=LARGE | {"widths": (32,), "bottleneck": 64})
SIMPLE = replace(TRAIN_IPYNB, network={})
PLAIN_LOSS = {"min_snr": 0.0}
DECAY = {"cosine with warm-up": {}, "constant learning rate": {"decay": "constant"}}
DOWN = {"the plain loss": PLAIN_LOSS,
        "the plain loss, constant learning rate": PLAIN_LOSS | {"decay": "constant"},
        "the plain loss, batch 64": PLAIN_LOSS | {"batch_size": 64},
        "min-SNR 5, as in train.ipynb": {}}
CHANGES = {"down": (QUICK, DOWN), "long": (QUICK, DECAY), "simple": (SIMPLE, DECAY)}


def loss_function(recipe: Recipe, model: U_net, scheduler: NoiseScheduler,
                  ) -> Callable[..., Tensor]:
    """The loss of a recipe: of the noise, as in train.ipynb."""
    snr = scheduler.alpha_bar / (1 - scheduler.alpha_bar)
    weight = torch.ones_like(snr)
    if recipe.min_snr:
        weight = snr.clamp(max=recipe.min_snr) / snr
    layout = torch.channels_last if recipe.channels_last else torch.contiguous_format

    def loss_of(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        x0, noise = (x.clone(memory_format=layout) for x in (x0, noise))
        noise_pred = model(scheduler.add_noise(x0, noise, t), t)
        return (weight[t] * (noise_pred - noise).square().mean(dim=(1, 2, 3))).mean()
    return loss_of


def train(recipe: Recipe, seconds: float, looks: tuple[float, ...] = (1.0,),
          seed: int = 0) -> Iterator[tuple[float, int, U_net, U_net]]:
    """Trains on MNIST for so many seconds, by the step of train.ipynb.

    At each of the given shares of them yields the seconds trained, the images seen, the
    network and its average (equal to the network where the recipe has none). The time
    between a yield and the next step is not counted. On a CPU, where this is for
    processes of one thread, the seconds are those of the process, which others on the
    machine do not lengthen.
    """
    torch.manual_seed(seed)
    clock = time.process_time if device == "cpu" else time.perf_counter
    layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
    model = U_net(device, **recipe.network).to(memory_format=layout)
    model.metadata = {"image_size": 28, "noise_schedule": {}}
    scheduler = NoiseScheduler(device=device)
    elapsed, looks = 0.0, [look * seconds for look in looks]

    def factor(step):
        share = min(1.0, elapsed / seconds)
        warm_up = min(1, 20 * share + 0.01)
        cosine = warm_up * (1 + math.cos(math.pi * share)) / 2
        return cosine if recipe.decay == "cosine" else 1

    with tempfile.TemporaryDirectory() as folder:
        run = QuietRun(model, Images(mnist("train")), batch_size=recipe.batch_size,
                       learning_rate=recipe.learning_rate, num_epochs=10**6, seed=seed,
                       save_dir=folder, decay=recipe.ema,
                       precision="bf16" if recipe.bf16 else "fp32")
        step = run.training_step
        step.lr_schedule = LambdaLR(step.optimizer, factor)  # of the time, not the step
        steps = run_steps(run, loss_function(recipe, model, scheduler))
        start = clock()
        for _ in steps:
            elapsed, start = elapsed + clock() - start, clock()
            if elapsed >= looks[0]:
                looks.pop(0)
                yield elapsed, run.images_seen, model, run.average
                start = clock()
            if not looks:
                break
        steps.close()


def distance(network: U_net, samples: int, bf16: bool, guide: U_net | None = None,
             ) -> float:
    """Frechet distance to the test images of samples in ten steps of dpm_solver, with a
    guidance of 1.5 if there is a guide."""
    network.eval()
    drawn = draw(network, range(samples), 0, 10, precision="bf16" if bf16 else "fp32",
                 guide=guide, guidance=1.0 if guide is None else 1.5)
    network.train()
    return distance_to_test(drawn.pixels)


def result(recipe: Recipe, minutes: float, samples: int, bf16: bool, seed: int = 0,
           ) -> tuple[float, float, int]:
    """The distances that a recipe's average and its last weights reach in so many
    minutes of one core, and the images that it sees; (inf, inf, 0) if it fails."""
    torch.set_num_threads(1)

    def run():
        try:
            (_, seen, model, average), = train(recipe, 60 * minutes, seed=seed)
            found = distance(average, samples, bf16)
            last = distance(model, samples, bf16) if recipe.ema else found
            return found, last, seen
        except FloatingPointError:  # the gradient is not finite, or the loss has grown
            return math.inf, math.inf, 0
        except ValueError as error:  # the prediction is not finite
            if "finite" not in str(error):
                raise
            return math.inf, math.inf, 0
    key = (asdict(recipe), minutes, samples, bf16, seed, machine_in_words())
    return tuple(once("recipe", key, run))


def with_seeds(recipe: Recipe, changes: dict[str, dict], submit: Callable[..., Future],
               seeds: int) -> list[str]:
    """The text and table of changes to the recipe of train.ipynb, each with several
    seeds, in lines."""
    recipe = replace(recipe, bf16=bf16_is_native(device))
    futures = {name: [submit(replace(recipe, **change), seed) for seed in range(seeds)]
               for name, change in changes.items()}
    table = header("change", "Frechet distance of the average", "of the last weights",
                   "images seen")
    for name in changes:
        average, last, seen = zip(*(future.result() for future in futures[name]))
        table.append(row(name, mean_and_each(average, ".1f"),
                         mean_and_each(last, ".1f"), f"{round(sum(seen) / seeds):,}"))
        print(table[-1], flush=True)
    network = "larger network at half its width" if recipe.network else "simple network"
    runs, what = (("one run, of seed 0,", "distance") if seeds == 1 else
                  (f"{seeds} runs, of seeds 0 to {seeds - 1}, each",
                   "mean distance (and each)"))
    return ["The recipe of train.ipynb, without labels, in batches of "
            f"{recipe.batch_size} on",
            f"the {network}, and changes to it. Each row is {runs}",
            f"on one core: the {what} of the averaged weights and, from the same",
            "training, of the last ones.", "", *table]


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--table", choices=CHANGES, required=True)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each recipe")
    parser.add_argument("--processes", type=int,
                        default=os.cpu_count() if device == "cpu" else 1,
                        help="how many runs at a time, each on one core")
    args = parser.parse_args()
    if args.seeds < 1:
        parser.error(f"--seeds {args.seeds}: must be at least 1")
    for seed in JUDGES:
        classifier(seed)  # before the processes want them all at once
    torch.set_num_threads(1)
    training_distance(args.samples)
    bf16 = bf16_is_native(device)
    with process_pool(args.processes) as pool:
        def submit(recipe: Recipe, seed: int) -> Future:
            return pool.submit(result, recipe, args.minutes, args.samples, bf16, seed)

        table = with_seeds(*CHANGES[args.table], submit, args.seeds)
    how = "in 10 steps of dpm_solver"
    write_page(f"recipe_{args.table}_{args.minutes:g}", args,
               [*about_distance(args.samples, how), *table], ".")


if __name__ == "__main__":
    main()
