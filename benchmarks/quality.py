"""How good the digits of a checkpoint are, and whether they are learned by heart.

    python benchmarks/quality.py Save_model/model_DDPM.pth

Writes benchmarks/quality_MODEL.md and Assets/nearest_MODEL.png.
"""

import argparse
from statistics import fmean, median

import torch
from torch import Tensor, nn
from torchmetrics.image.kid import KernelInceptionDistance

from common import (ROOT, device, fingerprint, header, machine_in_words, once, row,
                    write_page)
from measure import (JUDGES, Drawn, checkpoint_arguments, classifier,
                     distances_to_test, drawn_once, features, guide_path, load_model,
                     mean_probabilities, mnist, mnist_labels, relative_distance,
                     right_digits, trained_classifier, training_distances, unclear)

from dataset_loader import image_grid
from model import U_net

CAS = {"epochs": 10, "shift": 2, "dropout": 0.3}  # how its classifiers are trained


class Scaled(nn.Module):
    """An extractor whose features have a mean square of 1 on the given images: the
    kernel of KID is made for such."""

    def __init__(self, extractor: nn.Module, images: Tensor):
        super().__init__()
        self.extractor, self.num_features = extractor, extractor.num_features
        self.scale = features(extractor, images).square().mean().rsqrt()

    def forward(self, images: Tensor) -> Tensor:
        return self.scale * self.extractor(images)


def kernel_distance(extractor: nn.Module, images: Tensor, reference: Tensor) -> float:
    """Kernel distance KID (Binkowski et al. 2018), the mean over 100 subsets of up to
    1000 images, times 1000."""
    torch.manual_seed(0)
    extractor = Scaled(extractor, reference)
    metric = KernelInceptionDistance(feature=extractor,
                                     subset_size=min(1000, len(images) // 2)).to(device)
    for part, real in ((images, False), (reference, True)):
        for batch in part.split(500):
            metric.update(batch.to(device), real=real)
    return 1000 * metric.compute()[0].item()


def radii(points: Tensor, k: int) -> Tensor:
    """How far it is from each point to its k-th nearest neighbour among them, (N,)."""
    return torch.cdist(points, points).kthvalue(k + 1, dim=1).values


def recall(x: Tensor, real: Tensor, k: int = 5) -> float:
    """The share of real images in the ball of a sample, which reaches to its k-th
    nearest neighbour (Kynkaanniemi et al. 2019), on features (N, D)."""
    near = torch.cdist(x, real) < radii(x, k)[:, None]
    return near.any(dim=0).float().mean().item()


def manifold_measures(x: Tensor, real: Tensor, k: int = 5) -> dict[str, float]:
    """Precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et
    al. 2020), on features (N, D).

    The ball of a point reaches to its k-th nearest neighbour in its own set.
    """
    radius = radii(real, k)
    distance = torch.cdist(x, real)  # (samples, real images)
    inside = distance < radius
    return {"precision": inside.any(dim=1).float().mean().item(),
            "recall": recall(x, real, k),
            "density": inside.sum(dim=1).float().mean().item() / k,
            "coverage": (distance.min(dim=0).values < radius).float().mean().item()}


def nearest(images: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Euclidean distance of the pixels, scaled to 0 ... 1, to the nearest of the
    reference images, and which that is."""
    def points(pixels):
        return pixels.flatten(1).float().to(device) / 255

    reference = points(reference)
    found = [torch.cdist(points(batch), reference).min(dim=1)
             for batch in images.split(500)]
    return (torch.cat([f.values for f in found]).cpu(),
            torch.cat([f.indices for f in found]).cpu())


def accuracy(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of images that a classifier gives their label."""
    return (net.probabilities(images).argmax(dim=1) == labels).float().mean().item()


def two_sample_test(images: Tensor, real: Tensor, epochs: int = 5) -> float:
    """The accuracy of a classifier that tells images from as many real ones, trained on
    half of each and asked about the rest (Lopez-Paz and Oquab 2017). One half is
    perfect.

    Both are shuffled first: the two halves of MNIST's test images are by other writers.
    """
    half, rng = min(len(images), len(real)) // 2, torch.Generator().manual_seed(0)
    images, real = (x[torch.randperm(len(x), generator=rng)] for x in (images, real))
    is_real = torch.arange(2 * half) // half
    net = trained_classifier(torch.cat([images[:half], real[:half]]), is_real, epochs,
                             name="drawn or real")
    rest = torch.cat([images[half:2 * half], real[half:2 * half]])
    return accuracy(net, rest, is_real)


def classification_accuracy(images: Tensor, labels: Tensor, name: str) -> list[float]:
    """CAS (Ravuri and Vinyals 2019): how many of the 10,000 real test digits a
    classifier gets right that was trained on these images alone; of three, which differ
    by their seed."""
    nets = (trained_classifier(images, labels, seed=seed, name=f"CAS, {name}", **CAS)
            for seed in JUDGES)
    return [accuracy(net, mnist("t10k"), mnist_labels("t10k")) for net in nets]


def about_cas(drawn: Drawn, key: tuple) -> list[str]:
    """The CAS of samples beside that of as many training images: text, in lines."""
    count = len(drawn.pixels)
    real = mnist("train")[:count], mnist_labels("train")[:count]
    of_real = once("cas_real", (count, CAS, machine_in_words()),
                   lambda: classification_accuracy(*real, "real"))
    of_drawn = once("cas", (count, CAS, machine_in_words(), *key), lambda:
                    classification_accuracy(drawn.pixels, drawn.labels, "samples"))
    errors = (1 - fmean(of_drawn)) / max(1 - fmean(of_real), 1e-4)
    said = [f"{fmean(found):.2%} ({', '.join(f'{one:.2%}' for one in found)})"
            for found in (of_drawn, of_real)]
    return [f"CAS: three classifiers trained on {count:,} samples alone are right on "
            f"{said[0]} of",
            f"the test digits; trained on {len(real[0]):,} training images, on "
            f"{said[1]}:", f"{errors:.2f} x the errors.", ""]


def distances(drawn: Tensor) -> list[str]:
    """The table of distances, in lines."""
    count, test = len(drawn), mnist("t10k")
    sets = {"samples": drawn, "training images": mnist("train")[:count]}
    floors = list(zip(*training_distances(count)))  # of each judge, of each set
    found = distances_to_test(drawn)
    relative = relative_distance(found, count)
    rows = {"FD (Frechet distance)": list(zip(found, map(median, floors)))}
    for seed in JUDGES:
        extractor = classifier(seed)
        real = features(extractor, test)
        rows.setdefault("KID x 1000", []).append(
            [kernel_distance(extractor, images, test) for images in sets.values()])
        manifolds = [manifold_measures(features(extractor, images), real)
                     for images in sets.values()]
        for measure in manifolds[0]:
            rows.setdefault(measure, []).append([found[measure] for found in manifolds])
    return [*header("measure", *sets),
            row("R = FD / FD of training images", f"{relative:.3f}", "1.000"),
            *[row(measure, *(f"{median(found):.3f}" for found in zip(*judges)))
              for measure, judges in rows.items()], "",
            "R is the median of the three classifiers' ratios, not the ratio of the medians.",
            f"FD of training images is the median of {len(floors[0])} sets, which are "
            f"at {median(map(min, floors)):.2f} to {median(map(max, floors)):.2f};",
            "their other measures are those of the first.", ""]


def memorised(drawn: Tensor, name: str) -> list[str]:
    """How near the training images are, in lines; draws Assets/nearest_NAME.png."""
    train = mnist("train")
    (found, which), (of_test, _) = nearest(drawn, train), nearest(mnist("t10k"), train)
    pairs = torch.stack([drawn[:50], train[which[:50]]], dim=1)  # with its neighbour
    picture = image_grid(pairs.flatten(0, 1).float() / 127.5 - 1, columns=20)
    picture.save(ROOT / "Assets" / f"nearest_{name}.png")
    return ["Median distance of a sample to the nearest training image: "
            f"{found.median():.3f}; of a test image: {of_test.median():.3f};",
            f"ratio {found.median() / of_test.median():.3f}.", ""]


def digits(drawn: Drawn) -> list[str]:
    """How clear the digits are, and whether they are those asked for: text, in
    lines."""
    probabilities = mean_probabilities(drawn.pixels)
    of_test = unclear(mean_probabilities(mnist("t10k")))
    counts = torch.bincount(probabilities.argmax(dim=1), minlength=10).tolist()
    text = ["Not clearly a digit (three classifiers give none, on average, a "
            f"probability of 0.9): {unclear(probabilities):.1%} of the",
            f"samples, {of_test:.1%} of the test images. Digits 0 to 9 among the "
            "samples, to the same classifiers:", f"{', '.join(map(str, counts))}.", ""]
    if drawn.labels is not None:
        right = right_digits(probabilities, drawn.labels).float()
        each = ", ".join(f"{digit}: {right[drawn.labels == digit].mean():.1%}"
                         for digit in drawn.labels.unique().tolist())
        text += [f"The digit that was asked for: {right.mean():.2%} of the samples",
                 f"({each}).", ""]
    return text


def told_apart(drawn: Tensor) -> list[str]:
    """How samples differ from real images in small things: text, in lines."""
    test = mnist("t10k")
    black, nearly = ([(pixels <= level).float().mean() for pixels in (drawn, test)]
                     for level in (0, 2))
    told = two_sample_test(drawn, test)
    return [f"Exactly black: {black[0]:.1%} of the samples' pixels, {black[1]:.1%} of "
            "the test images'; at most two of",
            f"255 levels brighter: {nearly[0]:.1%} and {nearly[1]:.1%}.",
            "A classifier that learns to tell samples from test images is right on "
            f"{told:.1%} of others", "(50 % is perfect).", ""]


def arguments() -> argparse.Namespace:
    parser = checkpoint_arguments(__doc__, guided=True)
    parser.add_argument("--sampler", default="dpm_solver")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--spacing", type=float, default=1.0)
    parser.add_argument("--cas", type=int, default=0, metavar="N",
                        help="train classifiers on so many samples alone; 0: do not")
    return parser.parse_args()


def drawn_for(args: argparse.Namespace, model: U_net, count: int) -> Drawn:
    return drawn_once(args.model, model, range(count), args.seed, args.steps,
                      args.sampler, guide=args.guide, guidance=args.guidance,
                      spacing=args.spacing, precision=args.precision)


def main() -> None:
    args = arguments()
    model = load_model(args)
    if args.cas and not model.network["num_classes"]:
        raise ValueError(f"--cas {args.cas}: {args.model} knows no labels to train on")
    drawn = drawn_for(args, model, args.samples)
    text = [f"{args.samples:,} samples against the 10,000 test images; beside them as "
            "many training images against the same.",
            "Features of a small classifier: the median of three such classifiers.", "",
            *distances(drawn.pixels), *memorised(drawn.pixels, args.model.stem),
            *digits(drawn), *told_apart(drawn.pixels)]
    if args.cas:
        key = (fingerprint(args.model, guide_path(args.model)), args.seed, args.steps,
               args.sampler, args.guide, args.guidance, args.spacing, args.precision)
        text += about_cas(drawn_for(args, model, args.cas), key)
    print("\n".join(text))
    write_page(f"quality_{args.model.stem}", args, text[:-1],
               f"; {drawn.seconds:.0f} s of sampling.")


if __name__ == "__main__":
    main()
