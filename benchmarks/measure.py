"""What the benchmarks share: a classifier whose features tell digits apart, samples drawn once and kept, the distances."""

import argparse
import hashlib
import json
import platform
import sys
import time
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from statistics import median

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from checkpoint import atomic_file, load_checkpoint, save_checkpoint  # noqa: E402
from dataset_loader import image_grid, read_idx, to_image  # noqa: E402, F401
from model import U_net  # noqa: E402
from noise import (NoiseScheduler, autoguided, gaussian_noise, image_generators,  # noqa: E402, F401
                   image_labels, random_stream)
from training import PRECISIONS, autocast, bf16_is_native, choose_device  # noqa: E402, F401

CACHE = ROOT / "benchmarks" / "cache"  # git-ignored: what takes long is made once
device = choose_device()


def machine() -> str:
    """What the figures were measured on, in words."""
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor() or "CPU")
    threads = torch.get_num_threads()
    return (f"{threads} thread{'s' * (threads > 1)} on {name} ({torch.backends.cpu.get_cpu_capability()}), "
            f"torch {torch.__version__}")


def checkpoint_arguments(description: str) -> argparse.ArgumentParser:
    """The options that all benchmarks have which draw from a checkpoint."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a checkpoint of train.ipynb on MNIST")
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", choices=PRECISIONS, default="auto",
                        help="auto: bf16 where the processor has it")
    return parser


def ready(path: Path) -> U_net:
    """The network of a checkpoint, as generate_image.ipynb prepares it."""
    return U_net.from_checkpoint(path, device).eval()


def guide_path(path: Path) -> Path:
    """Where the guide of a checkpoint lies."""
    return path.with_stem(f"{path.stem}_guide")


def guide_of(path: Path, guidance: float) -> U_net | None:
    """The guide beside a checkpoint, where the guidance needs one and it is there."""
    return ready(guide_path(path)) if guidance != 1 and guide_path(path).exists() else None


def load_model(args: argparse.Namespace) -> U_net:
    """The network of args.model, ready to draw; args.precision is "bf16" or "fp32" afterwards.

    Raises ValueError where it does not draw images like those of MNIST.
    """
    model = ready(args.model)
    channels, size = model.network["in_channels"], model.metadata.get("image_size")
    if (channels, size) != (1, 28):
        raise ValueError(f"{args.model}: draws {channels} channel(s) at image_size {size}; the benchmarks "
                         "compare with MNIST, so train a network of 1 channel at 28")
    if args.precision == "auto":
        args.precision = "bf16" if bf16_is_native(device) else "fp32"
    return model


def command(args: argparse.Namespace) -> str:
    """The command line that gives a benchmark all its options, those with default values as well."""
    words = ["python", f"benchmarks/{Path(sys.argv[0]).name}"]
    for name, value in vars(args).items():
        words += [] if name == "model" else [f"--{name.replace('_', '-')}"]
        words += value if isinstance(value, list) else [value]
    return " ".join(map(str, words))


@lru_cache
def mnist(part: str, kind: str = "images-idx3") -> Tensor:
    """One of the files in Assets/MNIST, uint8; images are (N, 1, 28, 28), part is "train" or "t10k"."""
    content = read_idx(ROOT / "Assets" / "MNIST" / f"{part}-{kind}-ubyte.gz")
    return content[:, None] if content.ndim == 3 else content


class Classifier(nn.Module):
    """A small convolutional network for MNIST; forward(images) gives the 128 features before its last layer.

    images: uint8 (B, 1, 28, 28), as they are saved to disk.
    """

    num_features = 128  # what torchmetrics asks an extractor for

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64 * 7 * 7, 128), nn.ReLU())
        self.digit = nn.Linear(128, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.features(images.float() / 127.5 - 1)

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """How likely each image is to show each digit: (B, 10)."""
        return torch.cat([self.digit(self(batch.to(device))).softmax(dim=1).cpu() for batch in images.split(500)])


@lru_cache
def classifier(seed: int, epochs: int = 3) -> Classifier:
    """Trains a classifier on the 60,000 training images, or takes the one that an earlier call with this seed left behind."""
    path = CACHE / f"classifier_{seed}_{epochs}.pth"
    if not path.exists():
        with torch.random.fork_rng():  # the caller's random numbers are those of a call that finds the classifier
            torch.manual_seed(seed)
            save_checkpoint(trained_classifier(epochs, f"classifier {seed}").state_dict(), path)
    net = Classifier().to(device)
    net.load_state_dict(load_checkpoint(path, device))
    return net.eval()


def trained_classifier(epochs: int, name: str, images: Tensor | None = None,
                       labels: Tensor | None = None) -> Classifier:
    """A classifier trained on uint8 images (N, 1, 28, 28) and labels (N,): by default MNIST's training set."""
    net = Classifier().to(device)
    if images is None:
        images, labels = mnist("train"), mnist("train", "labels-idx1").long()
    steps = epochs * -(-len(images) // 128)
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for epoch in range(epochs):
        for batch in tqdm(torch.randperm(len(images)).split(128), f"{name}, epoch {epoch + 1} of {epochs}"):
            loss = F.cross_entropy(net.digit(net(images[batch].to(device))), labels[batch].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net


@torch.no_grad()
def features(extractor: nn.Module, images: Tensor) -> Tensor:
    """The features of uint8 images (N, C, H, W): (N, D), on the extractor's device."""
    return torch.cat([extractor(batch.to(device)) for batch in images.split(500)])


@lru_cache
def distance_to(reference: Tensor, extractor: nn.Module) -> FrechetInceptionDistance:
    """The Frechet distance with its reference images seen once for all: they are the same in every row of a table."""
    metric = FrechetInceptionDistance(feature=extractor, reset_real_features=False).to(device)
    for batch in reference.split(500):
        metric.update(batch.to(device), real=True)
    return metric


def frechet_distance(extractor: nn.Module, images: Tensor, reference: Tensor) -> float:
    """Frechet distance (Heusel et al. 2017) between the features of two sets of uint8 images (N, C, H, W)."""
    metric = distance_to(reference, extractor)
    metric.reset()  # forgets the other images, not the reference
    for batch in images.split(500):
        metric.update(batch.to(device), real=False)
    return metric.compute().item()


def distance_to_test(images: Tensor) -> float:
    """The Frechet distance of uint8 images (N, 1, 28, 28) to the 10,000 test images: the median of three classifiers' features."""
    return median(frechet_distance(extractor, images, mnist("t10k")) for extractor in map(classifier, range(3)))


def training_sets(count: int) -> list[Tensor]:
    """Up to ten sets of so many training images, whose distances show what real images reach, and what is chance."""
    return list(mnist("train").split(count)[:max(1, min(10, 60_000 // count))])


@lru_cache
def training_distance(count: int) -> float:
    """The Frechet distance of so many training images to the test images, the median of up to ten sets of them."""
    return median(map(distance_to_test, training_sets(count)))


def mean_probabilities(images: Tensor) -> Tensor:
    """How likely uint8 images (N, 1, 28, 28) are to show each digit, the mean of three classifiers: (N, 10)."""
    return torch.stack([classifier(seed).probabilities(images) for seed in range(3)]).mean(dim=0)


def unclear(images: Tensor) -> float:
    """The share of images that are not clearly a digit: three classifiers give none, on average, 0.9."""
    return (mean_probabilities(images).amax(dim=1) < 0.9).float().mean().item()


def labels_of(model: U_net, images: range, seed: int) -> Tensor | None:
    """The labels with which generate_image.ipynb draws these images: as frequent as in the training data."""
    classes, counts = (model.metadata.get(name, []) for name in ("classes", "class_counts"))
    return image_labels(None, seed, images, classes, counts, device)


def predictor(model: U_net, label: Tensor | None, guide: U_net | None, guidance: float) -> Callable:
    """The network for these labels, with its guide: an early network, or (None) itself without label."""
    predict = partial(model, label=label)
    if guidance == 1:
        return predict
    return autoguided(predict, model if guide is None else partial(guide, label=label), guidance)


def draw(model: U_net, images: range, seed: int, num_steps: int, sampler: str, batch_size: int = 250,
         precision: str = "fp32", guide: U_net | None = None, guidance: float = 1.0,
         denoise: Callable | None = None, **options) -> tuple[Tensor, float]:
    """The images of one seed, uint8 (N, C, H, W), as generate_image.ipynb draws them, and the seconds
    that it took.

    denoise: takes the place of `NoiseScheduler.denoise`; options are its own, such as `spacing`.
    """
    denoise = denoise or NoiseScheduler(**model.metadata["noise_schedule"], device=device).denoise
    size = model.metadata["image_size"]
    shape = (model.network["in_channels"], *([size] * 2 if isinstance(size, int) else size))
    drawn, start = [], time.perf_counter()
    name = f"{sampler}, {num_steps} steps"
    for first in tqdm(range(images.start, images.stop, batch_size), name, leave=False):
        batch = images[first - images.start:][:batch_size]
        predict = predictor(model, labels_of(model, batch, seed), guide, guidance)
        generators = image_generators(seed, batch)
        xt = gaussian_noise(torch.empty(len(batch), *shape, device=device), generators)
        with autocast(device, precision):
            for _, xt in denoise(predict, xt, num_steps, sampler, generators, **options):
                pass
        drawn.append(to_image(xt).cpu())
    return torch.cat(drawn), time.perf_counter() - start


def fingerprint(*paths: Path) -> list[str]:
    """What tells these checkpoints and the code that draws from them from any other."""
    return [hashlib.md5(file.read_bytes()).hexdigest() for file in (*paths, ROOT / "model.py", ROOT / "noise.py")
            if file.exists()]


def drawn_once(path: Path, model: U_net, images: range, seed: int, num_steps: int, sampler: str,
               guidance: float = 1.0, **options) -> tuple[Tensor, float]:
    """`draw`, kept in the cache under everything that decides the pictures and the time, so that a stopped benchmark goes on."""
    decides = [*fingerprint(path, *[guide_path(path)] * (guidance != 1)), images, seed, num_steps, sampler, guidance,
               sorted(options.items()), machine()]
    kept = CACHE / f"samples_{hashlib.md5(repr(decides).encode()).hexdigest()[:16]}.pth"
    if not kept.exists():
        pixels, seconds = draw(model, images, seed, num_steps, sampler, guide=guide_of(path, guidance), guidance=guidance,
                               **options)
        save_checkpoint({"pixels": pixels, "seconds": seconds}, kept)
    state = load_checkpoint(kept)
    return state["pixels"], state["seconds"]


def once(benchmark: str, key: tuple, run: Callable[[], list]) -> list:
    """run(), or what it returned when it was last asked for with this key and today's model.py and noise.py, so that a stopped
    benchmark goes on."""
    key = json.dumps((key, fingerprint()), sort_keys=True)
    kept = CACHE / f"{benchmark}_{hashlib.md5(key.encode()).hexdigest()[:16]}.json"
    if not kept.exists():
        found = json.dumps({"key": key, "found": run()})
        with atomic_file(kept) as file:
            file.write(found.encode())
    return json.loads(kept.read_text())["found"]


def plot_distances(path: Path, cost: str, curves: dict[str, list[tuple[float, float]]], floor: float) -> None:
    """A picture of Frechet distance against cost, a curve for each name, above the distance of training images."""
    plt.figure(figsize=(6, 4))
    for name, points in curves.items():
        plt.loglog(*zip(*points), "o-", label=name)
    plt.axhline(floor, color="grey", linestyle=":", label="training images")
    plt.xlabel(cost)
    plt.ylabel("Frechet distance to the test images")
    plt.legend()
    plt.savefig(path, dpi=150, bbox_inches="tight")
