"""How good the digits of a checkpoint are, and whether they are learned by heart: quality_NAME.md, Assets/nearest_NAME.png.

    python benchmarks/quality.py Save_model/model_DDPM.pth
"""

import argparse
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torchmetrics.image.kid import KernelInceptionDistance

from measure import (ROOT, U_net, bf16_is_faster, classifier, device, drawn_once, features, frechet_distance, image_grid,
                     machine, mnist)


def kernel_distance(extractor: nn.Module, images: Tensor, reference: Tensor) -> float:
    """Kernel distance KID (Binkowski et al. 2018), the mean over 100 subsets of up to 1000 images, times 1000."""
    torch.manual_seed(0)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--sampler", default="ddpm")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    model = U_net.from_checkpoint(args.model, device).to(memory_format=torch.channels_last).eval()
    x, t = torch.zeros(25, 1, 28, 28, device=device), torch.zeros(25, dtype=torch.long, device=device)
    drawn, seconds = drawn_once(args.model, model, range(args.samples), args.seed, args.steps, args.sampler,
                                bf16=bf16_is_faster(lambda: model(x, t), device))
    train, test = mnist("train"), mnist("t10k")
    sets = {"samples": drawn, "training images": train[:args.samples]}

    rows = {}
    for seed in range(3):
        extractor = classifier(seed)
        distance = {name: frechet_distance(extractor, images, test) for name, images in sets.items()}
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

    (to_train, neighbour), (test_to_train, _), (to_test, _) = nearest(drawn, train), nearest(test, train), nearest(drawn, test)
    counts = torch.bincount(extractor.predict(drawn), minlength=10).tolist()
    options = f"--samples {args.samples} --sampler {args.sampler} --steps {args.steps} --seed {args.seed}"
    text = [f"`python benchmarks/quality.py {args.model} {options}` on {machine()}; {seconds:.0f} s of sampling.",
            f"{args.samples:,} samples against the 10,000 test images; beside them as many training images against the same.",
            "Features of a small classifier, the median of three seeds.", "", *table, "",
            f"Median distance of a sample to the nearest training image: {to_train.median():.3f}; of a test image: "
            f"{test_to_train.median():.3f}; ratio {to_train.median() / test_to_train.median():.3f}. "
            f"Of a sample to the nearest test image: {to_test.median():.3f}.", "",
            f"Digits 0 to 9 among the samples, as the classifier sees them: {', '.join(map(str, counts))}."]
    (ROOT / "benchmarks" / f"quality_{args.model.stem}.md").write_text("\n".join(text) + "\n")
    print("\n".join(text))
    pairs = torch.stack([drawn[:50], train[neighbour[:50]]], dim=1).flatten(0, 1)  # a sample, its neighbour, a sample, ...
    image_grid(pairs.float() / 127.5 - 1, columns=20).save(ROOT / "Assets" / f"nearest_{args.model.stem}.png")


if __name__ == "__main__":
    main()
