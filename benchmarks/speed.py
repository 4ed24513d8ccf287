"""How fast training and sampling are, and what each ingredient buys: speed.md.

    python benchmarks/speed.py
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, median, stdev

import torch
import torch.nn.functional as F
from denoising_diffusion_pytorch import Unet
from diffusers import UNet2DModel
from PIL import Image
from smalldiffusion import Unet as ScaledUnet
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.v2.functional import pil_to_tensor

from measure import (ROOT, NoiseScheduler, U_net, command, device, gaussian_noise, image_generators, load_checkpoint, machine,
                     mnist, once)
from training import bf16_is_native

PLAIN = dict(cached=False, channels_last=False, bf16=False, fused=False, compiled=False)
LADDER = {"plain loop": {}, "+ pixels decoded once": dict(cached=True), "+ channels_last": dict(channels_last=True),
          "+ bf16": dict(bf16=True), "+ fused optimizer": dict(fused=True), "+ torch.compile": dict(compiled=True)}
PARITY_STEPS, SEEDS = 200, range(6)


class Diffusers(UNet2DModel):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x, t).sample


class Smalldiffusion(ScaledUnet):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x, 1.0 + t)  # it takes noise levels, not timesteps


# Networks of published packages, as they come, with widths that give them within 10 % of the weights of ours.
PEERS = {
    "denoising-diffusion-pytorch": lambda: Unet(dim=24, dim_mults=(1, 2, 4), channels=1),
    "diffusers": lambda: Diffusers(sample_size=28, in_channels=1, out_channels=1, block_out_channels=(32, 64, 64),
                                   down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
                                   up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")),
    "smalldiffusion": lambda: Smalldiffusion(28, 1, 1, ch=32, ch_mult=(1, 2, 2))}


def wait() -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class Files(Dataset):
    """A folder of PNG files, opened and decoded item by item."""

    def __init__(self, folder: Path, pixels: torch.Tensor):
        self.paths = [folder / f"{i}.png" for i in range(len(pixels))]
        for path, image in zip(self.paths, pixels):
            Image.fromarray(image[0].numpy()).save(path)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> torch.Tensor:
        return pil_to_tensor(Image.open(self.paths[i])).float() / 127.5 - 1


def batches(source, batch_size: int):
    """Endless batches of images in [-1, 1]: from `Files`, or from pixels in memory."""
    while True:
        if isinstance(source, Files):
            yield from DataLoader(source, batch_size, shuffle=True, drop_last=True)
        else:
            for index in torch.randperm(len(source)).split(batch_size)[:len(source) // batch_size]:
                yield source[index].float() / 127.5 - 1


def train(source, steps: int, batch_size: int, cached, channels_last, bf16, fused, compiled, seed=0,
          build: Callable[[], nn.Module] = U_net) -> tuple[list, list]:
    """The losses and the seconds of each of so many steps of a network on MNIST."""
    torch.manual_seed(seed)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    network = build().to(device, memory_format=layout)
    model = torch.compile(network) if compiled else network
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3, fused=fused)
    scheduler, stream = NoiseScheduler(device=device), batches(source, batch_size)
    losses, seconds = [], []
    for _ in range(steps):
        start = time.perf_counter()
        x0 = next(stream).to(device).to(memory_format=layout)
        t = torch.randint(1000, (batch_size,), device=device)
        noise = torch.randn_like(x0)
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            noise_pred = model(scheduler.add_noise(x0, noise, t), t)
        loss = F.mse_loss(noise_pred.float(), noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    return losses, seconds


def sample(images: int, steps: int, channels_last, bf16, compiled, batch_size: int,
           build: Callable[[], nn.Module] = U_net) -> float:
    """Seconds for so many steps of so many images, batch_size at a time."""
    network = build().to(device, memory_format=torch.channels_last if channels_last else torch.contiguous_format).eval()
    model = torch.compile(network) if compiled else network
    scheduler, took = NoiseScheduler(device=device), []
    for first in range(0, images, batch_size):
        generators = image_generators(0, range(first, first + batch_size))
        xt = gaussian_noise(torch.empty(batch_size, 1, 28, 28, device=device), generators)
        walk = scheduler.denoise(model, xt, 1000, "ddpm", generators)
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            next(walk)  # warms up
            wait()
            start = time.perf_counter()
            for _ in range(steps):
                next(walk)
            wait()
        took.append(time.perf_counter() - start)
    return sum(took)


def training_table(pixels, batch_size: int, repetitions: int, bf16: bool) -> list[str]:
    rows, chosen = ["| training | images/s | of the plain loop |", "|---|---|---|"], PLAIN
    with tempfile.TemporaryDirectory() as folder:
        files = Files(Path(folder), pixels[:max(2000, batch_size)])
        for name, ingredient in LADDER.items():
            chosen = chosen | ingredient
            _, seconds = train(pixels if chosen["cached"] else files, repetitions + 3, batch_size, **chosen)
            rate = batch_size / median(seconds[3:])
            plain = rate if name == "plain loop" else plain
            rows.append(f"| {name} | {rate:.0f} | {rate / plain:.2f} |")
            print(rows[-1], flush=True)
            if name == "+ bf16" and not bf16:  # where it does not gain, train.ipynb goes on without
                chosen["bf16"], rows[-1] = False, rows[-1].replace(name, "+ bf16, not kept")
    rows += ["", ceiling(plain, bf16)]
    return rows


def ceiling(plain: float, bf16: bool) -> str:
    """How fast training would be if every product of it ran at the rate of large matrix products."""
    network, counter = U_net(device), FlopCounterMode(display=False)
    with counter:
        network(torch.zeros(1, 1, 28, 28, device=device), torch.zeros(1, dtype=torch.long, device=device)).sum().backward()
    work, size = counter.get_total_flops(), 2048 if device == "cpu" else 8192
    a = torch.ones(size, size, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    seconds = []
    for _ in range(9):
        start = time.perf_counter()
        a @ a
        wait()
        seconds.append(time.perf_counter() - start)
    rate = 2 * size**3 / median(seconds)
    return (f"An image takes {work / 1e9:.2f} GFLOP to train on. Products of matrices of {size} x {size} run at "
            f"{rate / 1e9:.0f} GFLOP/s in {'bf16' if bf16 else 'fp32'}; that would be {rate / work:.0f} images/s, "
            f"{rate / work / plain:.1f} times the plain loop.")


def sampling_table(repetitions: int) -> list[str]:
    rows, chosen = ["| sampling | ms an image and step | of the plain loop |", "|---|---|---|"], {}
    ladder = {"one image at a time": dict(batch_size=1, channels_last=False, bf16=False, compiled=False),
              "+ 25 at a time": dict(batch_size=25), "+ channels_last": dict(channels_last=True), "+ bf16": dict(bf16=True),
              "+ torch.compile": dict(compiled=True)}
    for name, ingredient in ladder.items():
        chosen = chosen | ingredient
        milliseconds = 1000 * median(sample(25, 10, **chosen) for _ in range(repetitions)) / 250
        plain = milliseconds if name == "one image at a time" else plain
        rows.append(f"| {name} | {milliseconds:.2f} | {plain / milliseconds:.2f} |")
        print(rows[-1], flush=True)
        if name == "+ bf16" and milliseconds > before:
            chosen["bf16"], rows[-1] = False, rows[-1].replace(name, "+ bf16, not kept")
        before = milliseconds
    return rows


def peers_table(pixels, batch_size: int, repetitions: int, bf16: bool) -> list[str]:
    """Ours beside the networks of others, each as it comes and in our precision and memory format; our loop for all."""
    rows = ["| network | weights | | training images/s | sampling ms an image and step |", "|---|---|---|---|---|"]
    settings = {"fp32": {}, f"{'bf16' if bf16 else 'fp32'}, channels_last": dict(channels_last=True, bf16=bf16)}
    for name, build in ({"ours": U_net} | PEERS).items():
        weights = sum(p.numel() for p in build().parameters())
        for setting, ingredients in settings.items():
            chosen = PLAIN | {"cached": True} | ingredients
            _, seconds = train(pixels, repetitions + 3, batch_size, **chosen, build=build)
            options = {option: chosen[option] for option in ("channels_last", "bf16", "compiled")}
            took = median(sample(25, 10, **options, batch_size=25, build=build) for _ in range(repetitions))
            rate = batch_size / median(seconds[3:])
            rows.append(f"| {name} | {weights:,} | {setting} | {rate:.0f} | {1000 * took / 250:.2f} |")
            print(rows[-1], flush=True)
    return rows


def notebook_rate(processes: int, threads: int, images: int, batch_size: int) -> float:
    """Images a second of train.ipynb itself, on so many processes of so many threads, all included but the
    last preview."""
    with tempfile.TemporaryDirectory() as folder:
        parameters = {"max_images": images, "num_epochs": 1, "batch_size": batch_size, "save_dir": folder,
                      "labels": False}
        words = [word for name, value in parameters.items() for word in (f"--{name}", str(value))]
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        subprocess.run([sys.executable, *launcher, "run_notebook.py", "train.ipynb", *words], cwd=ROOT,
                       env=os.environ | {"OMP_NUM_THREADS": str(threads)}, check=True, capture_output=True)
        return images / load_checkpoint(Path(folder, "state.pth"))["seconds"]


def final_loss(ingredients: dict, seed: int, batch_size: int) -> float:
    """The mean loss of the last 50 steps; no matter of time, so it is kept in the cache."""
    (loss,) = once("parity", (ingredients, seed, PARITY_STEPS, batch_size), lambda: [
        fmean(train(mnist("train"), PARITY_STEPS, batch_size, **ingredients, seed=seed)[0][-50:])])
    print(seed, ingredients, f"{loss:.4f}", flush=True)
    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=9)
    args = parser.parse_args()
    pixels, bf16 = mnist("train"), bf16_is_native(device)
    ours = PLAIN | dict(cached=True, channels_last=True, bf16=bf16, fused=True)

    tables = [*training_table(pixels, args.batch_size, args.repetitions, bf16), "", *sampling_table(args.repetitions), "",
              *peers_table(pixels, args.batch_size, args.repetitions, bf16), ""]
    step = {count: median(train(pixels[:count], args.repetitions + 3, args.batch_size, **ours)[1][3:])
            for count in (1000, 60_000)}
    tables.append(f"A step on 60,000 images takes {step[60_000] / step[1000]:.3f} times as long as on 1,000.")
    wide = torch.randint(256, (2000, 1, 64, 64), dtype=torch.uint8)
    pixel = {count: median(train(wide, args.repetitions + 3, count, **ours)[1][3:]) / count / 64**2
             for count in (args.batch_size, round(args.batch_size * 28**2 / 64**2))}
    tables.append("A pixel of 64 x 64 images takes " + " and ".join(
        f"{seconds / step[1000] * args.batch_size * 28**2:.3f} times as long in batches of {count}" for count, seconds in pixel.items())
        + f" as one of 28 x 28 in batches of {args.batch_size}; the last batches have about as many pixels.")
    if device == "cpu":
        one, two = (notebook_rate(*many, images=100 * args.batch_size, batch_size=args.batch_size) for many in ((1, 2), (2, 1)))
        tables.append(f"train.ipynb in one process of two threads: {one:.0f} images/s; in two processes of one thread: "
                      f"{two:.0f}, {two / one:.2f} times as many.")
    plain, mine = ([final_loss(ingredients, seed, args.batch_size) for seed in SEEDS]
                   for ingredients in (PLAIN | {"cached": True}, ours))
    differences = [b - a for a, b in zip(plain, mine)]
    error = stdev(differences) / len(SEEDS)**0.5
    tables.append(f"Mean loss of the last 50 of {PARITY_STEPS} steps, with {len(SEEDS)} seeds of images, timesteps and noise: plain "
                  f"{', '.join(f'{loss:.4f}' for loss in plain)}; ours {', '.join(f'{loss:.4f}' for loss in mine)}; ours less plain "
                  f"{fmean(differences):+.4f}, with a standard error of {error:.4f}.")
    heading = f"`{command(args)}` on {machine()}; the simple network at 28 x 28."
    (ROOT / "benchmarks" / "speed.md").write_text("\n".join([heading, "", *tables, ""]))


if __name__ == "__main__":
    main()
