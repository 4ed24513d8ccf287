"""The two loops whose speed and results are compared: a plain one, and the
project's."""

import time
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from common import device

from noise import NoiseScheduler, gaussian_noise
from training import Run

Batch = tuple[Tensor, Tensor | None]  # images (B, C, H, W) in [-1, 1], labels (B,)


class Images:
    """Pixels in memory as `Run` takes them: uint8 (N, C, H, W), with labels (N,) or
    None."""

    def __init__(self, pixels: Tensor, labels: Tensor | None = None):
        self.pixels, self.labels = pixels, labels

    def __len__(self) -> int:
        return len(self.pixels)

    def random_batches(self, batch_size: int) -> Iterator[Batch]:
        """Endless batches, drawn with replacement."""
        while True:
            index = torch.randint(len(self), (batch_size,))
            label = None if self.labels is None else self.labels[index]
            yield self.pixels[index].float() / 127.5 - 1, label


class QuietRun(Run):
    """A run without a progress bar: one of many, or one whose end is not known."""

    def _progress_bar(self) -> tqdm:
        return tqdm(disable=True)


def wait() -> None:
    """Waits until the device has done all that it was told."""
    if device == "cuda":
        torch.cuda.synchronize()


def plain_loss(model: nn.Module, scheduler: NoiseScheduler) -> Callable[..., Tensor]:
    """The mean squared error of the predicted noise: Eq. 14 of Ho et al. 2020."""
    def loss_of(x0: Tensor, noise: Tensor, t: Tensor, *label: Tensor) -> Tensor:
        noise_pred = model(scheduler.add_noise(x0, noise, t), t, *label)
        return F.mse_loss(noise_pred.float(), noise)
    return loss_of


def plain_steps(network: nn.Module, batches: Iterable[Batch], *,
                channels_last: bool = False, bf16: bool = False, fused: bool = False,
                compiled: bool = False) -> Iterator[tuple[float, float]]:
    """The loop of many small repositories, which reads the loss at every step.

    Yields each step's loss and the seconds that it took, its batch included.
    """
    layout = torch.channels_last if channels_last else torch.contiguous_format
    network = network.to(device, memory_format=layout)
    loss_of = plain_loss(torch.compile(network) if compiled else network,
                         NoiseScheduler(device=device))
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3, fused=fused or None)
    start = time.perf_counter()
    for x0, label in batches:
        x0 = x0.to(device).to(memory_format=layout)
        t = torch.randint(1000, (len(x0),), device=device)
        rest = () if label is None else (label.to(device),)
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = loss_of(x0, torch.randn_like(x0), t, *rest)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item(), time.perf_counter() - start
        start = time.perf_counter()


def run_steps(run: Run, loss_of: Callable[..., Tensor]) -> Iterator[None]:
    """The loop of train.ipynb: yields after each of the run's steps.

    loss_of: a function of (x0, noise, t), and of the labels where the run has them.
    """
    for x0, label in run.batches():
        t = torch.randint(1000, (len(x0),), generator=run.rng, device=device)
        noise = gaussian_noise(x0, run.rng)
        run.step(loss_of, x0, noise, t, *(() if label is None else (label,)))
        yield
