"""Bits a dimension of MNIST's test digits by the variational bound, and where they go.

    python benchmarks/likelihood.py Save_model/model_DDPM_large.pth

Writes benchmarks/likelihood.md. A bound is a sum over steps from a time t to an earlier
one, s. Each image takes a random step of every stretch of steps, in place of all that are
in it, so that the sum is right on average. Times are real numbers: between two timesteps
the noise grows in equal parts, and the network is told the time as it is.
"""

import argparse
import copy
import math
from pathlib import Path
from time import monotonic

import torch
from torch import Tensor, nn

from common import (device, fingerprint, header, machine_in_words, once, parser_of,
                    row, write_page)
from measure import load_model, mnist, mnist_labels

from model import U_net
from noise import NoiseScheduler, discretised_gaussian, random_stream

BINS = 8  # of a grey level, for what is predicted
SPLIT = 8  # parts that a step is split into
FINE = [1, 2, 3, 4, 6, 9, 14, 21, 30]  # stretches of timesteps near the image
COARSE = [30, 45, 70, 110, 170, 250, 350, 450, 550, 700, 1000]
LATER = 8  # where the shorter walk ends
TIMES = [0.0, 0.5, 1, 2, 3, 4, 6, 8, 12, 18, 26]  # for which predictions are corrected


def levels(x: Tensor) -> Tensor:
    """The grey level of each pixel, 0 ... 255."""
    return ((x + 1) * 127.5).round().long()


def images_of(part: str, count: int) -> tuple[Tensor, Tensor]:
    x = mnist(part)[:count].float() / 127.5 - 1
    return x.to(device), mnist_labels(part)[:count].to(device)


ABOUT = """
- *Counted*: p(level given the pixel that the network predicts, in eighths of a level),
  for all pixels alike. Each row of the table sums to one.
- *Corrected*: a prediction is clamped to -1 ... 1, and what lacked on average where the
  network predicted the same is added. It was trained for images that look right, with
  hardly any weight on the smallest t, and takes black for nearly black there.
- *Split*: the linear schedule's first step from t = 1 more than halves the
  signal-to-noise ratio. A step in which it falls r times costs (r - 1) / 2 times the
  squared error in the noise, but split into many small ones only log(r) / 2. The network
  was trained on whole timesteps, but takes any time.
- *The last step at a later t*: the table names the level from there, without a walk.
- *Fine-tuned*: the network goes on training on the sixty thousand training digits, with
  times drawn so that its loss is the bound. What digits it then draws was not looked
  at.

## Beside published figures

On MNIST as it is, with 256 levels (much of what is published is for MNIST in black and
white, which is another number).

| model | bits a dimension | what it is |
|---|---|---|
| [Residual Flow](https://arxiv.org/abs/1906.02735), Chen et al. 2019 | 0.970 | likelihood, by a flow on pixels with uniform noise |
| [Transformer](https://arxiv.org/abs/2006.16236), Katharopoulos et al. 2020, Table 1 | 0.621 | likelihood, pixel after pixel |
| the same with linear attention | 0.644 | likewise |

Ours is a bound, on the first test digits only, and with the label; theirs are for all
test digits, without it. The error given is that of the sample of digits alone.
""".strip().splitlines()


class Predictions:
    """What the network takes for the image, at any real time."""

    def __init__(self, model: U_net, seed: int):
        self.model, self.rng = model, random_stream(seed, device=device)
        scheduler = NoiseScheduler(**model.metadata["noise_schedule"])
        self.log_alpha_bar = scheduler._alpha_bar.log()

    def snr(self, time: Tensor) -> Tensor:
        """The signal-to-noise ratio at times (B,), float64."""
        below = time.floor().long()
        log = self.log_alpha_bar[below + 1].lerp(
            self.log_alpha_bar[(below + 2).clamp(max=len(self.log_alpha_bar) - 1)],
            time.double() - below)
        return 1 / torch.expm1(-log)

    @torch.no_grad()
    def __call__(self, x: Tensor, label: Tensor, time: Tensor) -> Tensor:
        """Noise of time (B,) added to x, and the image that the network implies."""
        found = []
        for x, label, time in zip(x.split(100), label.split(100), time.split(100)):
            snr = self.snr(time).float().view(-1, 1, 1, 1).to(device)
            noise = torch.randn(x.shape, generator=self.rng, device=device)
            xt = (snr.sqrt() * x + noise) / (1 + snr).sqrt()
            noise_pred = self.model(xt, time.float().to(device), label)
            found.append(x + (noise - noise_pred) / snr.sqrt())
        return torch.cat(found)


def fine_tuned(model: U_net, minutes: float, seed: int) -> U_net:
    """A copy of the network, trained on for the bound: its error where the logarithm of
    the signal-to-noise ratio is uniform is, up to a factor, the bound of fine steps.

    Nine tenths of the times are of t = 0 ... 200 and the rest up to T.
    """
    model = copy.deepcopy(model).train()
    x, label = images_of("train", 60_000)
    predict, rng = Predictions(model, seed), random_stream(seed, 2)
    grid = torch.arange(0, 999, 1 / SPLIT)
    log_snr = predict.snr(grid).log()
    cut = log_snr[200 * SPLIT]
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0)
    start = monotonic()
    while (share := (monotonic() - start) / (60 * minutes)) < 1:
        optimiser.param_groups[0]["lr"] = 5e-4 * (1 - share) * min(1, 50 * share)
        of = torch.randint(len(x), (32,), generator=rng)
        u = (torch.arange(32) + torch.rand(32, generator=rng)) / 32 / 0.9
        low, high = log_snr[-1], log_snr[0]
        at = torch.where(u < 1, high - u * (high - cut), cut - (u - 1) * 9 * (cut - low))
        t = grid[torch.searchsorted(-log_snr, -at.double()).clamp(max=len(grid) - 1)]
        snr = predict.snr(t).float().view(-1, 1, 1, 1).to(device)
        noise = torch.randn(x[of].shape, generator=predict.rng, device=device)
        xt = (snr.sqrt() * x[of] + noise) / (1 + snr).sqrt()
        loss = (model(xt, t.to(device), label[of]) - noise).square().mean()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    return model.eval()


def keys(predicted: Tensor) -> Tensor:
    """The bin of each predicted pixel, of BINS to a level, from -4 to 259."""
    return ((predicted.clamp(-1.03, 1.03) + 1.03) * 127.5 * BINS).round().long()


NUM_KEYS = int(2.06 * 127.5 * BINS) + 2


def correction(x: Tensor, predicted: Tensor) -> Tensor:
    """What to add to a predicted pixel of each bin: the mean of what lacked, counted.

    Ten imagined pixels in each bin, which lacked nothing, steady the rare ones.
    """
    key, lacked = keys(predicted).flatten(), (x - predicted.clamp(-1, 1)).flatten()
    count = torch.bincount(key, minlength=NUM_KEYS)
    return torch.bincount(key, lacked, minlength=NUM_KEYS) / (count + 10)


def last_step(x: Tensor, predicted: Tensor) -> tuple[Tensor, float]:
    """p(level given the bin of its prediction), counted: (bins, 256), each row sums to one.

    Ten imagined pixels in each bin steady it: a Gaussian of the one width that is best
    for all (the second result, in levels), and a hundredth of any level.
    """
    centre = torch.arange(NUM_KEYS, device=device) / (127.5 * BINS) - 1.03
    level = torch.arange(256, device=device) / 127.5 - 1
    level, centre = torch.broadcast_tensors(level, centre[:, None])
    where = keys(predicted).flatten() * 256 + levels(x).flatten()
    count = torch.bincount(where, minlength=NUM_KEYS * 256).view(NUM_KEYS, 256)
    nats = {}
    for width in (0.5, 0.7, 1, 1.4, 2, 2.8, 4, 5.6, 8):
        log_p = discretised_gaussian(level, centre, width / 127.5)
        nats[width] = -(count * log_p).sum().item(), log_p
    best = min(nats, key=lambda width: nats[width][0])
    imagined = 0.99 * nats[best][1].exp() + 0.01 / 256
    return (count + 10 * imagined) / (count.sum(1, keepdim=True) + 10), best


def bits_of_last_step(p: Tensor, x: Tensor, predicted: Tensor) -> Tensor:
    bits = -p[keys(predicted), levels(x)].log2()
    return bits.flatten(1).mean(dim=1).cpu()


def bits_of_steps(predict: Predictions, corrections: Tensor, x: Tensor, label: Tensor,
                  stretch: tuple[int, int], split: int, rng: torch.Generator) -> Tensor:
    """Steps to the timesteps of a stretch, each split into so many: (2, B), of the
    predictions as they are and corrected."""
    first, end = stretch
    number = (end - first) * split
    at = torch.randint(number, (len(x),), generator=rng) / split + first
    t, s = at - 1 + 1 / split, at - 1
    predicted = predict(x, label, t)
    nearest = (t[:, None] - torch.tensor(TIMES)).abs().argmin(dim=1).to(device)
    added = corrections[nearest.view(-1, 1, 1, 1), keys(predicted)]
    close = (t < 30).view(-1, 1, 1, 1).to(device)
    corrected = torch.where(close, predicted.clamp(-1, 1) + added, predicted)
    weight = (number * (predict.snr(s) - predict.snr(t)) / 2 / math.log(2)).to(x.device)
    return torch.stack([weight * (image - x).square().flatten(1).mean(dim=1).double()
                        for image in (predicted, corrected)]).cpu()


def measured(args: argparse.Namespace, model: U_net) -> dict[str, list[float]]:
    """Of each part of the bound, and each image, the bits a dimension."""
    predict, rng = Predictions(model, args.seed), random_stream(args.seed, 1)
    x, label = images_of("train", args.training)

    def at(time, x, label):
        return predict(x, label, torch.full((len(x),), float(time)))

    corrections = torch.stack([correction(x[:2000], at(time, x[:2000], label[:2000]))
                               for time in TIMES])
    steps = {time: last_step(x, at(time, x, label)) for time in (0, LATER)}
    x, label = images_of("t10k", args.images)
    found, predicted = {}, at(0, x, label)
    scheduler = NoiseScheduler(**model.metadata["noise_schedule"])
    found["prior"] = scheduler.prior_term(x)
    sigmas = {"beta": scheduler.beta[0].item()**0.5, "width": steps[0][1] / 127.5}
    for name, sigma in sigmas.items():
        nats = -discretised_gaussian(x, predicted, sigma)
        found[f"last, {name}"] = nats.flatten(1).mean(dim=1) / math.log(2)
    found["last, counted"] = bits_of_last_step(steps[0][0], x, predicted)
    found["last, later"] = bits_of_last_step(steps[LATER][0], x, at(LATER, x, label))
    for name, edges, split in (("far", COARSE, 1), ("near", FINE, 1),
                               ("split", FINE, SPLIT)):
        for first, end in zip(edges, edges[1:]):
            plain, corrected = bits_of_steps(predict, corrections, x, label, (first, end),
                                             split, rng)
            found[f"{name}, {first}"] = plain
            found[f"{name}, {first}, corrected"] = corrected
            print(name, first, end - 1, f"{plain.mean():.4f} {corrected.mean():.4f}",
                  flush=True)
    return {name: each.tolist() for name, each in found.items()}


def total(found: dict[str, Tensor], last: str, near: str, kind: str = "",
          start: int = 1) -> Tensor:
    """The bound for each image from the timestep `start` on."""
    stretches = [each for each in FINE[:-1] if each >= start]
    return (found["prior"] + found[f"last, {last}"]
            + sum(found[f"{near}, {each}{kind}"] for each in stretches)
            + sum(found[f"far, {each}"] for each in COARSE[:-1]))


def mean_and_error(each: Tensor) -> str:
    return f"{each.mean():.3f} ± {each.std() / len(each)**0.5:.3f}"


def where_it_goes(found: dict[str, Tensor]) -> list[str]:
    """A table of the bound as Ho et al. have it, by the steps."""
    parts = {"the last step, t = 0 (Eq. 13)": found["last, beta"]}
    for name, edges in (("near", FINE), ("far", COARSE)):
        for first, end in zip(edges, edges[1:]):
            span = f"t = {first}" + (f" ... {end - 1}" if end > first + 1 else "")
            parts[span] = found[f"{name}, {first}"]
    parts["prior"] = found["prior"]
    parts["**in all**"] = total(found, "beta", "near")
    return [*header("term of the bound", "bits a dimension"),
            *(row(name, mean_and_error(each)) for name, each in parts.items())]


def what_helps(found: dict[str, Tensor]) -> dict[str, str]:
    """The bound as one part after the other is mended."""
    corrected = ", corrected"
    bounds = {
        "as Ho et al. 2020: Eq. 5, the last step a discretised Gaussian of variance β":
            total(found, "beta", "near"),
        "the last step's Gaussian of the best width": total(found, "width", "near"),
        "the last step counted": total(found, "counted", "near"),
        "predictions corrected below t = 30":
            total(found, "counted", "near", corrected),
        f"steps below t = 30 split into {SPLIT}":
            total(found, "counted", "split", corrected),
        f"the last step at t = {LATER}":
            total(found, "later", "split", corrected, LATER + 1)}
    return {name: mean_and_error(each) for name, each in bounds.items()}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("model", type=Path,
                        help="a checkpoint of train.ipynb on MNIST with labels")
    parser.add_argument("--images", type=int, default=4000, help="test digits")
    parser.add_argument("--training", type=int, default=3000, help="training digits")
    parser.add_argument("--minutes", type=float, default=10, help="of fine-tuning")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model = load_model(argparse.Namespace(model=args.model, precision="fp32"))
    key = (args.images, args.training, args.seed, *fingerprint(args.model),
           machine_in_words())

    def found(*more, network):
        kept = once("likelihood", (*key, *more), lambda: [measured(args, network())])
        return {name: torch.tensor(each) for name, each in kept[0].items()}

    shipped = found(network=lambda: model)
    tuned = found(args.minutes,
                  network=lambda: fine_tuned(model, args.minutes, args.seed))
    helps = zip(what_helps(shipped).items(), what_helps(tuned).values())
    write_page("likelihood", args, [
        f"Bits a dimension of MNIST's first {args.images:,} test digits: an upper bound on",
        "-log2 p(image) / 784 for images of 256 grey levels. The standard error is that of",
        "the mean over the digits, with one random noise and timestep for each stretch of",
        "steps. The network is told the label of each digit; to send that as well takes",
        f"log2(10) / 784 = {math.log2(10) / 784:.3f} more, and then the bound holds for a",
        "model without labels. What is counted or fitted is so on training digits, at most",
        f"the first {args.training:,}; the constants at the top of the script were set by hand,",
        "with a look at 200 test digits.", "",
        "## Where the bits go", "", *where_it_goes(shipped), "",
        "## What brings them down", "",
        *header("each row with all that stands above it", "as it is",
                f"fine-tuned for {args.minutes:g} minutes"),
        *(row(name, plain, after) for (name, plain), after in helps), "", *ABOUT], ":")


if __name__ == "__main__":
    main()
