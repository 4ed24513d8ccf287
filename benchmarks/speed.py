"""How fast training and sampling are on a CPU, and what each ingredient buys.

    python benchmarks/speed.py

Writes benchmarks/speed.md.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import fmean, median, stdev
from time import perf_counter

import torch
from denoising_diffusion_pytorch import Unet
from diffusers import UNet2DModel
from PIL import Image
from smalldiffusion import Unet as ScaledUnet
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.v2.functional import pil_to_tensor

from common import (ROOT, device, digests, header, machine_in_words, once, parser_of, row,
                    write_page)
from loops import (Batch, Images, QuietRun, plain_loss, plain_steps, run_steps,
                   wait)
from measure import mnist
from recipe import LARGE

from checkpoint import load_checkpoint
from machine import bf16_is_native
from model import U_net
from noise import NoiseScheduler, gaussian_noise, image_generators

LADDER = {"plain loop": {}, "+ pixels decoded once": {"cached": True},
          "+ channels_last": {"channels_last": True}, "+ bf16": {"bf16": True},
          "+ fused optimizer": {"fused": True}, "+ torch.compile": {"compiled": True}}
SAMPLING = {"one image at a time": {"batch_size": 1},
            "+ 25 at a time": {"batch_size": 25},
            "+ channels_last": {"channels_last": True}, "+ bf16": {"bf16": True},
            "+ torch.compile": {"compiled": True}}
WARM_UP = 3  # steps that are not counted
DRAWN, STEPS = 25, 10  # images drawn, and their steps that are timed
PARITY_STEPS, SEEDS = 200, range(6)
bf16 = bf16_is_native(device)
PRECISION = "bf16" if bf16 else "fp32"


class Diffusers(UNet2DModel):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x, t).sample


class Smalldiffusion(ScaledUnet):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x, 1.0 + t)  # it takes noise levels, not timesteps


# Networks of published packages as they come, with widths that give them within 10 % of
# the weights of ours
PEERS = {
    "denoising-diffusion-pytorch": lambda: Unet(
        dim=24, dim_mults=(1, 2, 4), channels=1),
    "diffusers": lambda: Diffusers(
        sample_size=28, in_channels=1, out_channels=1, block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")),
    "smalldiffusion": lambda: Smalldiffusion(28, 1, 1, ch=32, ch_mult=(1, 2, 2))}


class Files(Dataset):
    """A folder of PNG files, opened and decoded item by item."""

    def __init__(self, folder: Path, pixels: Tensor):
        self.paths = [folder / f"{i}.png" for i in range(len(pixels))]
        for path, image in zip(self.paths, pixels):
            Image.fromarray(image[0].numpy()).save(path)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Tensor:
        return pil_to_tensor(Image.open(self.paths[i])).float() / 127.5 - 1

    def random_batches(self, batch_size: int) -> Iterator[Batch]:
        """Endless batches, an epoch after the other."""
        while True:
            for x0 in DataLoader(self, batch_size, shuffle=True, drop_last=True):
                yield x0, None


# How long a step takes

def plain_seconds(data: Images | Files, batch_size: int, count: int,
                  build: Callable[[], nn.Module] = U_net, **ingredients) -> float:
    """Seconds of a step of the plain loop with these ingredients: the median."""
    steps = plain_steps(build(), data.random_batches(batch_size), **ingredients)
    return median(took for _, took in islice(steps, WARM_UP, WARM_UP + count))


def our_run(pixels: Tensor, batch_size: int, steps: int, folder: str, seed: int = 0,
            ) -> tuple[QuietRun, Iterator[None]]:
    """A run of the simple network through so many steps, and its loop."""
    torch.manual_seed(seed)
    model, epochs = U_net(device), -(-steps * batch_size // len(pixels))
    run = QuietRun(model, Images(pixels), batch_size=batch_size, learning_rate=1e-3,
                   num_epochs=epochs, seed=seed, save_dir=folder)
    return run, run_steps(run, plain_loss(model, NoiseScheduler(device=device)))


def our_seconds(pixels: Tensor, batch_size: int, count: int) -> float:
    """Seconds of a step of train.ipynb, that of `training.Run`: the median."""
    with tempfile.TemporaryDirectory() as folder:
        _, steps = our_run(pixels, batch_size, WARM_UP + count, folder)
        ends = [perf_counter() for _ in islice(steps, WARM_UP + count)]
        steps.close()
    return median(end - start for start, end in zip(ends[WARM_UP - 1:], ends[WARM_UP:]))


def sampling_ms(batch_size: int, *, channels_last=False, bf16=False, compiled=False,
                build: Callable[[], nn.Module] = U_net) -> float:
    """Milliseconds for a step of an image, batch_size images at a time."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    network = build().to(device, memory_format=layout).eval()
    model = torch.compile(network) if compiled else network
    scheduler, took = NoiseScheduler(device=device), 0.0
    for first in range(0, DRAWN, batch_size):
        generators = image_generators(0, range(first, first + batch_size), device)
        xt = torch.empty(batch_size, 1, 28, 28, device=device)
        walk = scheduler.denoise(model, gaussian_noise(xt, generators), 1000, "ddpm",
                                 generators)
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            next(walk)  # warms up
            wait()
            start = perf_counter()
            for _ in islice(walk, STEPS):
                pass
            wait()
        took += perf_counter() - start
    return 1000 * took / (DRAWN * STEPS)


# The tables

def training_table(pixels: Tensor, batch_size: int, repetitions: int) -> list[str]:
    """The plain loop, ingredient by ingredient, and the step of train.ipynb: in
    lines."""
    table, chosen, plain = header("training", "images/s", "of the plain loop"), {}, None
    with tempfile.TemporaryDirectory() as folder:
        files = Files(Path(folder), pixels[:max(2000, batch_size)])
        for name, ingredient in LADDER.items():
            tried = chosen | ingredient
            cached = tried.get("cached", False)
            options = {option: on for option, on in tried.items() if option != "cached"}
            rate = batch_size / plain_seconds(Images(pixels) if cached else files,
                                              batch_size, repetitions, **options)
            plain = plain or rate
            kept = bf16 or name != "+ bf16"  # which a processor without it emulates, slowly
            chosen = tried if kept else chosen
            table.append(row(name if kept else f"{name}, not kept", f"{rate:.0f}",
                             f"{rate / plain:.2f}"))
            print(table[-1], flush=True)
    rate = batch_size / our_seconds(pixels, batch_size, repetitions)
    table.append(row(f"the step of train.ipynb, in {PRECISION}: clipped, averaged",
                     f"{rate:.0f}", f"{rate / plain:.2f}"))
    return [*table, "", *large_products(plain), ""]


def compile_table(pixels: Tensor, batch_size: int, repetitions: int) -> list[str]:
    """What torch.compile buys in training, by network and precision: in lines."""
    table = header("network", "", "images/s", "compiled", "gain")
    for name, build in {"simple": U_net, "larger": partial(U_net, **LARGE)}.items():
        for precision in dict.fromkeys(("fp32", PRECISION)):
            plain, compiled = (batch_size / plain_seconds(
                Images(pixels), batch_size, repetitions, build, channels_last=True,
                bf16=precision == "bf16", fused=True, compiled=one)
                for one in (False, True))
            table.append(row(name, precision, f"{plain:.0f}", f"{compiled:.0f}",
                             f"{compiled / plain:.2f}"))
            print(table[-1], flush=True)
    return [*table, ""]


def large_products(plain: float) -> list[str]:
    """How fast training would be if every product in it ran at the rate of large matrix
    products: text, in lines."""
    network, counter = U_net(device), FlopCounterMode(display=False)
    image, t = torch.zeros(1, 1, 28, 28), torch.zeros(1).long()
    with counter:
        network(image.to(device), t.to(device)).sum().backward()
    work, size = counter.get_total_flops(), 2048 if device == "cpu" else 8192
    a = torch.ones(size, size, device=device, dtype=torch.bfloat16 if bf16 else None)
    seconds = []
    for _ in range(9):
        start = perf_counter()
        a @ a
        wait()
        seconds.append(perf_counter() - start)
    rate = 2 * size**3 / median(seconds)
    return [f"An image takes {work / 1e9:.2f} GFLOP to train on. Products of matrices "
            f"of {size} x {size} run at {rate / 1e9:.0f} GFLOP/s",
            f"in {PRECISION}; that would be {rate / work:.0f} images/s, "
            f"{rate / work / plain:.1f} times the plain loop."]


def sampling_table(repetitions: int) -> list[str]:
    """Sampling, ingredient by ingredient: in lines."""
    table = header("sampling", "ms an image and step", "of the plain loop")
    chosen, before, plain = {}, None, None
    for name, ingredient in SAMPLING.items():
        tried = chosen | ingredient
        took = median(sampling_ms(**tried) for _ in range(repetitions))
        plain = plain or took
        kept = name != "+ bf16" or took <= before
        chosen, before = tried if kept else chosen, took
        table.append(row(name if kept else f"{name}, not kept", f"{took:.2f}",
                         f"{plain / took:.2f}"))
        print(table[-1], flush=True)
    return [*table, ""]


def peers_table(pixels: Tensor, batch_size: int, repetitions: int) -> list[str]:
    """Our network beside those of others, each as it comes and in our precision and
    memory format, all in the plain loop: in lines."""
    table = header("network", "weights", "", "training images/s",
                   "sampling ms an image and step")
    settings = {"fp32": {}, f"{PRECISION}, channels_last": {"channels_last": True,
                                                            "bf16": bf16}}
    for name, build in ({"ours": U_net} | PEERS).items():
        weights = sum(p.numel() for p in build().parameters())
        for setting, options in settings.items():
            rate = batch_size / plain_seconds(Images(pixels), batch_size, repetitions,
                                              build, **options)
            took = median(sampling_ms(25, build=build, **options)
                          for _ in range(repetitions))
            table.append(row(name, f"{weights:,}", setting, f"{rate:.0f}",
                             f"{took:.2f}"))
            print(table[-1], flush=True)
    return [*table, ""]


def scaling(pixels: Tensor, batch_size: int, repetitions: int) -> list[str]:
    """What more images and larger ones cost: text, in lines."""
    few, many = (our_seconds(pixels[:count], batch_size, repetitions)
                 for count in (1000, len(pixels)))
    wide = torch.randint(256, (2000, 1, 64, 64), dtype=torch.uint8)
    as_many = max(1, round(batch_size * 28**2 / 64**2))  # pixels in a batch
    cost = {count: our_seconds(wide, count, repetitions) / count / 64**2
            / (few / batch_size / 28**2) for count in (batch_size, as_many)}
    said = " and ".join(f"{times:.3f} times as long in batches of {count}"
                        for count, times in cost.items())
    return [f"A step on {len(pixels):,} images takes {many / few:.3f} times as long as "
            "on 1,000.", "",
            f"A pixel of 64 x 64 images takes {said} as one of 28 x 28 in batches of",
            f"{batch_size}; the last batches have about as many pixels.", ""]


def notebook_rate(processes: int, threads: int, images: int, batch_size: int) -> float:
    """Images a second of train.ipynb itself, on so many processes of so many threads,
    all included but the last preview."""
    with tempfile.TemporaryDirectory() as folder:
        parameters = {"max_images": images, "num_epochs": 1, "batch_size": batch_size,
                      "save_dir": folder, "labels": False}
        words = [word for name, value in parameters.items()
                 for word in (f"--{name}", str(value))]
        launcher = ["-m", "torch.distributed.run", "--standalone",
                    f"--nproc-per-node={processes}", "run_notebook.py", "train.ipynb"]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        subprocess.run([sys.executable, *launcher, *words], cwd=ROOT, env=environment,
                       check=True, capture_output=True)
        return images / load_checkpoint(Path(folder, "state.pth"))["seconds"]


def two_processes(batch_size: int) -> list[str]:
    """What a second process brings on two cores: text, in lines."""
    one, two = (notebook_rate(*many, images=400 * batch_size, batch_size=batch_size)
                for many in ((1, 2), (2, 1)))
    return ["train.ipynb through 400 steps, previews and files included, in one process "
            f"of two threads: {one:.0f} images/s;",
            f"in two processes of one thread: {two:.0f}, {two / one:.2f} times as many.",
            ""]


def plain_loss_at_end(pixels: Tensor, batch_size: int, steps: int, seed: int) -> float:
    """The mean loss of the last quarter of so many steps of the plain loop."""
    torch.manual_seed(seed)
    walk = plain_steps(U_net(), Images(pixels).random_batches(batch_size))
    return fmean([loss for loss, _ in islice(walk, steps)][-steps // 4:])


def our_loss_at_end(pixels: Tensor, batch_size: int, steps: int, seed: int) -> float:
    """The same of `training.Run`, at the plain loop's constant learning rate."""
    with tempfile.TemporaryDirectory() as folder:
        pixels = pixels[:steps * batch_size]  # one epoch of them
        run, walk = our_run(pixels, batch_size, steps, folder, seed)
        step = run.training_step
        step.lr_schedule = LambdaLR(step.optimizer, lambda _: 1)
        for _ in walk:
            pass
    return fmean(run.losses[-steps // 4:])


def parity(pixels: Tensor, batch_size: int) -> list[str]:
    """Whether ours learns what the plain loop learns: text, in lines."""
    count = PARITY_STEPS * batch_size
    losses = {}
    for how in (plain_loss_at_end, our_loss_at_end):
        for seed in SEEDS:  # no matter of time, so it is kept in the cache
            key = (how.__name__, seed, PARITY_STEPS, batch_size, PRECISION,
                   machine_in_words(), digests(ROOT / "training_step.py"))
            losses.setdefault(how, []).extend(once("parity", key, lambda: [
                how(pixels[:count], batch_size, PARITY_STEPS, seed)]))
            print(how.__name__, seed, losses[how][-1], flush=True)
    plain, ours = losses.values()
    differences = [b - a for a, b in zip(plain, ours)]
    plain_said, our_said = (", ".join(f"{loss:.4f}" for loss in found)
                            for found in losses.values())
    error = stdev(differences) / len(SEEDS)**0.5
    return [f"Mean loss of the last {PARITY_STEPS // 4} of {PARITY_STEPS} steps at a "
            f"constant learning rate, {len(SEEDS)} seeds: plain loop {plain_said};",
            f"the step of train.ipynb {our_said}; ours less plain "
            f"{fmean(differences):+.4f}, with a standard error of {error:.4f}."]


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=9)
    args = parser.parse_args()
    if device != "cpu":
        raise SystemExit(f"speed.py measures a CPU, and this is {device}: take speed_gpu.py,"
                         " or hide the GPU (CUDA_VISIBLE_DEVICES=)")
    what = mnist("train"), args.batch_size, args.repetitions
    text = [*training_table(*what), *compile_table(*what),
            *sampling_table(args.repetitions), *peers_table(*what), *scaling(*what),
            *two_processes(args.batch_size), *parity(mnist("train"), args.batch_size)]
    write_page("speed", args, text, "; the simple network at 28 x 28 where no other is named.")


if __name__ == "__main__":
    main()
