"""How the benchmarks draw digits from a checkpoint, and how they judge them.

The judges are three small classifiers of MNIST's digits, which differ by their seed.
"""

import argparse
import hashlib
import time
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from tqdm import tqdm

from common import CACHE, ROOT, device, fingerprint, machine_in_words, once, parser_of

from checkpoint import load_checkpoint, save_checkpoint
from dataset_loader import read_idx, to_image
from machine import PRECISIONS, autocast, bf16_is_native
from model import U_net
from noise import (NoiseScheduler, autoguided, gaussian_noise, image_generators,
                   image_labels, random_stream)

GUIDES = ("early", "unlabelled")
JUDGES = range(3)  # the seeds of the classifiers
EPOCHS = 3  # that each is trained for
AT_ONCE = 1000 if device == "cuda" else 250  # images drawn or looked at together


@lru_cache
def mnist(part: str, kind: str = "images-idx3") -> Tensor:
    """One of the files in Assets/MNIST, uint8: images are (N, 1, 28, 28).

    part: "train" or "t10k".
    """
    content = read_idx(ROOT / "Assets" / "MNIST" / f"{part}-{kind}-ubyte.gz")
    return content[:, None] if content.ndim == 3 else content


def mnist_labels(part: str) -> Tensor:
    """The digits that MNIST's images show, (N,) int64."""
    return mnist(part, "labels-idx1").long()


# A checkpoint and its options

def checkpoint_arguments(description: str, samples: int = 10_000,
                         several_seeds: bool = False,
                         guided: bool = False) -> argparse.ArgumentParser:
    """The options of a benchmark that draws from a checkpoint; guided: with one
    guide."""
    parser = parser_of(description)
    parser.add_argument("model", type=Path, help="a checkpoint of train.ipynb on MNIST")
    parser.add_argument("--samples", type=int, default=samples)
    if several_seeds:
        parser.add_argument("--seed", type=int, nargs="+", default=[0])
    else:
        parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", choices=PRECISIONS, default="auto",
                        help="auto: bf16 where the processor has it")
    if guided:
        parser.add_argument("--guidance", type=float,
                            help="default: what the checkpoint proposes")
        parser.add_argument("--guide", choices=GUIDES,
                            help="default: early where the checkpoint keeps one")
    return parser


def ready(path: Path) -> U_net:
    """The network of a checkpoint, as generate_image.ipynb prepares it."""
    return U_net.from_checkpoint(path, device).eval()


def load_model(args: argparse.Namespace) -> U_net:
    """The network of args.model, ready to draw.

    Afterwards args.precision is "bf16" or "fp32", and where the command has the options
    and they were not given, args.guide is "early" where the checkpoint keeps one, and
    args.guidance what it proposes for that, else 1. Raises ValueError where it does
    not draw images like those of MNIST.
    """
    model = ready(args.model)
    channels, size = model.network["in_channels"], model.metadata.get("image_size")
    if channels != 1 or size not in (28, [28, 28], (28, 28)):
        raise ValueError(f"{args.model}: draws {channels} channel(s) at image_size "
                         f"{size}; the benchmarks compare with MNIST, so train a "
                         "network of 1 channel at 28")
    classes = model.metadata.get("classes", [])
    if classes and classes != [str(digit) for digit in range(10)]:
        raise ValueError(f"{args.model}: knows the classes {', '.join(classes)}; the "
                         "benchmarks compare with MNIST's, 0 ... 9")
    if args.precision == "auto":
        args.precision = "bf16" if bf16_is_native(device) else "fp32"
    if getattr(args, "guide", "") is None:
        args.guide = default_guide(args.model)
    if getattr(args, "guidance", 1) is None:
        proposed = model.metadata.get("guidance", 1)
        args.guidance = proposed if args.guide == "early" else 1
    return model


def guide_path(path: Path) -> Path:
    """Where the early guide of a checkpoint lies."""
    return path.with_stem(f"{path.stem}_guide")


def default_guide(path: Path) -> str:
    """The guide that generate_image.ipynb takes for a checkpoint."""
    return "early" if guide_path(path).exists() else "unlabelled"


def guide_of(path: Path, model: U_net, guide: str) -> U_net:
    """The guide of a checkpoint: the "early" network beside it, or the "unlabelled"
    one, which is the network itself. Raises FileNotFoundError where there is no early
    one, and ValueError where the network knows no labels."""
    if guide == "early":
        return ready(guide_path(path))
    if not model.network["num_classes"]:
        raise ValueError(f"guide {guide!r}: {path} knows no labels")
    return model


# Drawing

class Drawn(NamedTuple):
    """Images as they are saved to disk, the labels they were asked for, and the
    cost."""
    pixels: Tensor  # uint8 (N, C, H, W)
    labels: Tensor | None  # int64 (N,), None where the network knows none
    seconds: float


def labels_of(model: U_net, images: range, seed: int) -> Tensor | None:
    """The labels with which generate_image.ipynb draws these images, (N,) int64."""
    classes = model.metadata.get("classes", [])
    counts = model.metadata.get("class_counts", [])
    return image_labels(None, seed, images, classes, counts)


def predictor(model: U_net, label: Tensor | None, guide: U_net | None = None,
              guidance: float = 1.0) -> Callable[[Tensor, Tensor], Tensor]:
    """The network for these labels, with its guide where guidance is not 1: another
    network with the same labels, or the same network, which is then told none."""
    predict = partial(model, label=label)
    if guidance == 1:
        return predict
    weaker = model if guide is model else partial(guide, label=label)
    return autoguided(predict, weaker, guidance)


def draw(model: U_net, images: range, seed: int, num_steps: int | None,
         sampler: str = "dpm_solver", *, guide: U_net | None = None,
         guidance: float = 1.0, spacing: float = 1.0, precision: str = "fp32",
         batch_size: int = AT_ONCE, denoise: Callable | None = None,
         **options) -> Drawn:
    """The images of one seed, as generate_image.ipynb draws them.

    Each image draws its own label, as frequent as in the training data. guide,
    guidance: see `predictor`; the last prediction, which is the image, is the network's
    own. denoise: takes the place of `NoiseScheduler.denoise`; options are its own, such
    as `eta`.
    """
    if denoise is None:
        scheduler = NoiseScheduler(**model.metadata["noise_schedule"], device=device)
        denoise = partial(scheduler.denoise, spacing=spacing)
    size = model.metadata["image_size"]
    size = [size] * 2 if isinstance(size, int) else size
    shape = (model.network["in_channels"], *size)
    start, drawn = time.perf_counter(), []
    labels = labels_of(model, images, seed)
    name = f"{sampler}, {num_steps or 'all'} steps"
    for first in tqdm(range(0, len(images), batch_size), name, leave=False):
        batch = images[first:first + batch_size]
        asked = None if labels is None else labels[first:first + batch_size].to(device)
        generators = image_generators(seed, batch, device)
        xt = gaussian_noise(torch.empty(len(batch), *shape, device=device), generators)
        predict = predictor(model, asked, guide, guidance)
        if guidance != 1:
            options["last"] = predictor(model, asked)
        with autocast(device, precision):
            walk = denoise(predict, xt, num_steps, sampler, generators, **options)
            for _, xt in walk:  # one after the other: not all in memory
                pass
        drawn.append(to_image(xt).cpu())
    return Drawn(torch.cat(drawn), labels, time.perf_counter() - start)


def drawn_once(path: Path, model: U_net, images: range, seed: int,
               num_steps: int | None, sampler: str = "dpm_solver", *,
               guide: str = "early", guidance: float = 1.0, spacing: float = 1.0,
               **options) -> Drawn:
    """`draw`, with each thousand images kept in the cache under what decides the
    pictures and the time, so that a stopped benchmark goes on. guide: "early" or
    "unlabelled"."""
    guide = None if guidance == 1 else guide
    network = guide and guide_of(path, model, guide)
    files = (path, guide_path(path)) if guide == "early" else (path,)
    decides = [*fingerprint(*files), seed, num_steps, sampler, guide, float(guidance),
               spacing, sorted(options.items()), machine_in_words()]
    parts = []
    for first in range(0, len(images), 1000):
        part = images[first:first + 1000]
        key = hashlib.md5(repr([part, *decides]).encode()).hexdigest()[:16]
        kept = CACHE / f"samples_{key}.pth"
        if not kept.exists():
            pixels, _, seconds = draw(model, part, seed, num_steps, sampler,
                                      guide=network, guidance=guidance,
                                      spacing=spacing, **options)
            save_checkpoint({"pixels": pixels, "seconds": seconds}, kept)
        parts.append(load_checkpoint(kept))
    return Drawn(torch.cat([kept["pixels"] for kept in parts]),
                 labels_of(model, images, seed),
                 sum(kept["seconds"] for kept in parts))


# The judges

class Classifier(nn.Module):
    """A small convolutional network for MNIST; forward(images) gives the 128 features
    before its last layer.

    images: uint8 (B, 1, 28, 28), as they are saved to disk.
    """

    num_features = 128  # what torchmetrics asks an extractor for

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(64 * 7 * 7, 128), nn.ReLU())
        self.digit = nn.Linear(128, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.features(images.float() / 127.5 - 1)

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """How likely each image is to show each digit: (B, 10)."""
        return torch.cat([self.digit(self(batch.to(device))).softmax(dim=1).cpu()
                          for batch in images.split(500)])


def trained_classifier(images: Tensor, labels: Tensor, epochs: int, seed: int = 0,
                       name: str = "classifier", shift: int = 0, dropout: float = 0.0,
                       ) -> Classifier:
    """A classifier trained on uint8 images (N, 1, 28, 28) and labels (N,) int64 in 0
    ... 9.

    shift: each batch is moved by up to so many pixels, at random. dropout: of the
    features. It draws from streams of its own: the caller's random numbers stay as they
    are.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Classifier().to(device)
        steps = epochs * -(-len(images) // 128)
        optimizer = torch.optim.AdamW(net.parameters(), 2e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
        for epoch in range(epochs):
            order = torch.randperm(len(images)).split(128)
            for batch in tqdm(order, f"{name}, epoch {epoch + 1} of {epochs}"):
                by = torch.randint(-shift, shift + 1, (2,)).tolist()
                moved = images[batch].to(device).roll(by, dims=(2, 3))
                said = net.digit(F.dropout(net(moved), dropout))
                loss = F.cross_entropy(said, labels[batch].to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return net.eval()


def classifier_path(seed: int) -> Path:
    return CACHE / f"classifier_{seed}_{EPOCHS}.pth"


@lru_cache
def classifier(seed: int) -> Classifier:
    """Trains a classifier on the 60,000 training images, or takes the one that an
    earlier call with this seed left behind."""
    path = classifier_path(seed)
    if not path.exists():
        net = trained_classifier(mnist("train"), mnist_labels("train"), EPOCHS, seed,
                                 f"classifier {seed}")
        save_checkpoint(net.state_dict(), path)
    net = Classifier().to(device)
    net.load_state_dict(load_checkpoint(path, device))
    return net.eval()


@torch.no_grad()
def features(extractor: nn.Module, images: Tensor) -> Tensor:
    """The features of uint8 images (N, C, H, W): (N, D), on the extractor's device."""
    return torch.cat([extractor(batch.to(device)) for batch in images.split(500)])


@lru_cache
def distance_to(reference: Tensor, extractor: nn.Module) -> FrechetInceptionDistance:
    """The Frechet distance with its reference images seen once for all: they are the
    same in every row of a table."""
    metric = FrechetInceptionDistance(feature=extractor, reset_real_features=False)
    metric = metric.to(device)
    for batch in reference.split(500):
        metric.update(batch.to(device), real=True)
    return metric


def frechet_distance(extractor: nn.Module, images: Tensor, reference: Tensor) -> float:
    """Frechet distance (Heusel et al. 2017) between the features of two sets of uint8
    images (N, C, H, W)."""
    metric = distance_to(reference, extractor)
    metric.reset()  # forgets the other images, not the reference
    for batch in images.split(500):
        metric.update(batch.to(device), real=False)
    return metric.compute().item()


def distances_to_test(images: Tensor) -> list[float]:
    """The Frechet distances of uint8 images (N, 1, 28, 28) to the 10,000 test images,
    by the features of each judge."""
    return [frechet_distance(classifier(seed), images, mnist("t10k"))
            for seed in JUDGES]


def distance_to_test(images: Tensor) -> float:
    """The Frechet distance to the test images: the median of the judges'."""
    return median(distances_to_test(images))


@lru_cache
def training_distances(count: int) -> list[list[float]]:
    """What real images reach, and what is chance: for each of up to ten sets of so many
    training images its distances to the test images, by each judge."""
    sets = mnist("train").split(count)[:max(1, min(10, 60_000 // count))]
    for seed in JUDGES:
        classifier(seed)
    judges = [fingerprint(classifier_path(seed))[0] for seed in JUDGES]
    return once("training_distances", (count, judges, machine_in_words()),
                lambda: list(map(distances_to_test, sets)))


def training_distance(count: int) -> float:
    """The distance of so many training images: the median of the sets' medians."""
    return median(map(median, training_distances(count)))


def relative_distance(found: list[float], count: int) -> float:
    """R: the Frechet distance of so many images divided by that of as many training
    images, the median of their sets. Real images are at 1.

    found: by each judge, of `distances_to_test`. The median of the judges' ratios.
    """
    floors = map(median, zip(*training_distances(count)))
    return median(distance / floor for distance, floor in zip(found, floors))


def mean_probabilities(images: Tensor) -> Tensor:
    """How likely uint8 images (N, 1, 28, 28) are to show each digit, the mean of the
    judges: (N, 10)."""
    said = [classifier(seed).probabilities(images) for seed in JUDGES]
    return torch.stack(said).mean(dim=0)


def unclear(probabilities: Tensor) -> float:
    """The share of images that are not clearly a digit: none has a probability of 0.9.

    probabilities: (N, 10), of `mean_probabilities`.
    """
    return (probabilities.amax(dim=1) < 0.9).float().mean().item()


def right_digits(probabilities: Tensor, asked: Tensor) -> Tensor:
    """Which images show, more likely than another, the digit asked for: (N,) bool."""
    return probabilities.argmax(dim=1) == asked


@torch.no_grad()
def loss_on_test_images(model: U_net, count: int = 2000) -> float:
    """Mean squared error of the predicted noise on the first test images, each at a
    timestep of its own, with its label where the network knows labels."""
    scheduler = NoiseScheduler(**model.metadata["noise_schedule"], device=device)
    labels = mnist_labels("t10k") if model.network["num_classes"] else None
    rng, losses = random_stream(0, device=device), []
    for first in range(0, count, 250):
        batch = slice(first, first + 250)
        x0 = mnist("t10k")[batch].to(device).float() / 127.5 - 1
        t = torch.randint(scheduler.num_timesteps, (len(x0),), generator=rng,
                          device=device)
        noise = gaussian_noise(x0, rng)
        label = None if labels is None else labels[batch].to(device)
        noise_pred = model(scheduler.add_noise(x0, noise, t), t, label)
        losses.append(F.mse_loss(noise_pred, noise).item())
    return fmean(losses)


# What the pages say of them

def about_distance(samples: int, how: str = "") -> list[str]:
    """What "Frechet distance" means in a table, in lines. how: how they were drawn."""
    return [f"The Frechet distance of {samples:,} samples{how and f' {how}'} to the",
            "10,000 test images, on features of a small classifier: the median of",
            f"three such classifiers. {samples:,} training images are at "
            f"{training_distance(samples):.2f}, the median of up to ten sets."]


def about_unclear() -> list[str]:
    """What "unclear" means in a table, in lines."""
    share = unclear(mean_probabilities(mnist("t10k")))
    return ["Unclear: the share of samples to which three classifiers give no digit,",
            f"on average, a probability of 0.9; of the test images it is {share:.1%}."]
