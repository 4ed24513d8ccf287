"""How good the digits of a checkpoint are, and whether they are learned by heart: quality_NAME.md, Assets/nearest_NAME.png.

    python benchmarks/quality.py Save_model/model_DDPM.pth
"""

from statistics import median

import torch
from torch import Tensor, nn
from torchmetrics.image.kid import KernelInceptionDistance

from measure import (ROOT, checkpoint_arguments, classifier, command, device, drawn_once, features, frechet_distance,
                     image_grid, labels_of, load_model, machine, mean_probabilities, mnist, trained_classifier,
                     training_sets, unclear)


class Scaled(nn.Module):
    """An extractor whose features have a mean square of 1 on the given images: the kernel of KID is made for such."""

    def __init__(self, extractor: nn.Module, images: Tensor):
        super().__init__()
        self.extractor, self.num_features = extractor, extractor.num_features
        self.scale = features(extractor, images).square().mean().rsqrt()

    def forward(self, images: Tensor) -> Tensor:
        return self.scale * self.extractor(images)


def kernel_distance(extractor: nn.Module, images: Tensor, reference: Tensor) -> float:
    """Kernel distance KID (Binkowski et al. 2018), the mean over 100 subsets of up to 1000 images, times 1000."""
    torch.manual_seed(0)
    extractor = Scaled(extractor, reference)
    metric = KernelInceptionDistance(feature=extractor, subset_size=min(1000, len(images) // 2)).to(device)
    for part, real in ((images, False), (reference, True)):
        for batch in part.split(500):
            metric.update(batch.to(device), real=real)
    return 1000 * metric.compute()[0].item()


def manifold_measures(x: Tensor, real: Tensor, k: int = 5) -> dict[str, float]:
    """Precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020), on features (N, D).

    The ball of a point reaches to its k-th nearest neighbour in its own set.
    """
    radius, x_radius = (torch.cdist(points, points).kthvalue(k + 1, dim=1).values for points in (real, x))
    distance = torch.cdist(x, real)  # (samples, real images)
    inside = distance < radius
    return {"precision": inside.any(dim=1).float().mean().item(),
            "recall": (distance < x_radius[:, None]).any(dim=0).float().mean().item(),
            "density": inside.sum(dim=1).float().mean().item() / k,
            "coverage": (distance.min(dim=0).values < radius).float().mean().item()}


def nearest(images: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Euclidean distance of the pixels, scaled to 0 ... 1, to the nearest of the reference images, and which that is."""
    reference = reference.flatten(1).float().to(device) / 255
    found = [torch.cdist(batch.flatten(1).float().to(device) / 255, reference).min(dim=1) for batch in images.split(500)]
    return torch.cat([f.values for f in found]).cpu(), torch.cat([f.indices for f in found]).cpu()


def right_digits(images: Tensor, asked: Tensor) -> list[str]:
    """How many images show the digit that was asked for, to three classifiers together: text, in lines."""
    right = mean_probabilities(images).argmax(dim=1) == asked
    each = ", ".join(f"{digit}: {right[asked == digit].float().mean():.1%}" for digit in range(10))
    return [f"The digit that was asked for: {right.float().mean():.2%} of the samples ({each}).", ""]


def two_sample_test(images: Tensor, real: Tensor, epochs: int = 3) -> float:
    """The accuracy of a classifier that tells images from real ones, trained on half of each and asked about
    the rest (Lopez-Paz and Oquab 2017). One half is perfect."""
    count = min(len(images), len(real)) // 2
    pixels = torch.cat([images[:2 * count], real[:2 * count]])
    is_real = torch.arange(len(pixels)) >= 2 * count
    held_out = torch.arange(len(pixels)) % 2 == 1  # MNIST's first 5,000 test images are easier than the rest
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = trained_classifier(epochs, "drawn or real", pixels[~held_out], is_real[~held_out].long())
    said = net.eval().probabilities(pixels[held_out]).argmax(dim=1)
    return (said == is_real[held_out].long()).float().mean().item()


def main() -> None:
    parser = checkpoint_arguments(__doc__)
    parser.add_argument("--sampler", default="dpm_solver")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--guidance", type=float, help="default: what the checkpoint proposes")
    args = parser.parse_args()

    model = load_model(args)
    if args.guidance is None:
        args.guidance = model.metadata.get("guidance", 1)
    drawn, seconds = drawn_once(args.model, model, range(args.samples), args.seed, args.steps, args.sampler,
                                args.guidance, precision=args.precision)
    train, test = mnist("train"), mnist("t10k")
    sets = {"samples": drawn, "training images": train[:args.samples]}

    rows, floors = {}, []
    for seed in range(3):
        extractor = classifier(seed)
        floors.append(sorted(frechet_distance(extractor, images, test) for images in training_sets(args.samples)))
        distance = {"samples": frechet_distance(extractor, drawn, test), "training images": median(floors[-1])}
        rows.setdefault("R = FD / FD of training images", []).append({
            name: value / distance["training images"] for name, value in distance.items()})
        rows.setdefault("FD (Frechet distance)", []).append(distance)
        rows.setdefault("KID x 1000", []).append({
            name: kernel_distance(extractor, images, test) for name, images in sets.items()})
        real = features(extractor, test)
        manifold = {name: manifold_measures(features(extractor, images), real) for name, images in sets.items()}
        for measure in ("precision", "recall", "density", "coverage"):
            rows.setdefault(measure, []).append({name: manifold[name][measure] for name in sets})
    table = ["| measure | samples | training images |", "|---|---|---|"]
    table += [f"| {measure} | " + " | ".join(f"{median(seed[name] for seed in seeds):.3f}" for name in sets) + " |"
              for measure, seeds in rows.items()]

    (to_train, neighbour), (test_to_train, _) = nearest(drawn, train), nearest(test, train)
    asked = labels_of(model, range(args.samples), args.seed)
    counts = torch.bincount(extractor.probabilities(drawn).argmax(dim=1), minlength=10).tolist()
    text = [f"`{command(args)}` on {machine()}; {seconds:.0f} s of sampling.", "",
            f"{args.samples:,} samples against the 10,000 test images; beside them as many training images against the same.",
            "Features of a small classifier, the median of three seeds.", "", *table, "",
            f"FD of training images is the median of {len(floors[0])} sets, which are at {median(f[0] for f in floors):.2f} to "
            f"{median(f[-1] for f in floors):.2f}; their other measures are those of the first.", "",
            f"Median distance of a sample to the nearest training image: {to_train.median():.3f}; of a test image: "
            f"{test_to_train.median():.3f}; ratio {to_train.median() / test_to_train.median():.3f}.", "",
            f"Not clearly a digit (three classifiers give none, on average, a probability of 0.9): {unclear(drawn):.1%} of the",
            f"samples, {unclear(test):.1%} of the test images.", "",
            *([] if asked is None else right_digits(drawn, asked.cpu())),
            f"Exactly black: {(drawn == 0).float().mean():.1%} of the samples' pixels, "
            f"{(test == 0).float().mean():.1%} of the test images'. A classifier that learns to tell samples "
            f"from test images is right on {two_sample_test(drawn, test):.1%} of others (50 % is perfect).", "",
            f"Digits 0 to 9 among the samples, as the classifier sees them: {', '.join(map(str, counts))}."]
    (ROOT / "benchmarks" / f"quality_{args.model.stem}.md").write_text("\n".join(text) + "\n")
    print("\n".join(text))
    pairs = torch.stack([drawn[:50], train[neighbour[:50]]], dim=1).flatten(0, 1)  # a sample, its neighbour, a sample, ...
    image_grid(pairs.float() / 127.5 - 1, columns=20).save(ROOT / "Assets" / f"nearest_{args.model.stem}.png")


if __name__ == "__main__":
    main()
