"""How fast training and sampling are on a GPU: plain, recorded, compiled and recorded.

    python benchmarks/speed_gpu.py

Writes benchmarks/speed_gpu.md.
"""

import tempfile
from collections.abc import Callable, Iterator
from itertools import islice
from statistics import median
from time import perf_counter

import torch
from torch import nn

from common import device, header, parser_of, row, write_page
from loops import Images, QuietRun, plain_loss, plain_steps, run_steps, wait
from measure import mnist, mnist_labels
from recipe import LARGE

import noise
import training_step
from model import U_net
from noise import NoiseScheduler, gaussian_noise, image_generators, random_stream

NETWORKS = {"simple": {}, "larger": LARGE}
WARM_UP = 20  # steps that are not counted: the fourth is the one that is recorded


def rate(steps: Iterator, batch_size: int, count: int) -> float:
    """Images a second of so many steps, the first ones not counted."""
    for _ in islice(steps, WARM_UP):
        pass
    wait()
    start = perf_counter()
    for _ in islice(steps, count - WARM_UP):
        pass
    wait()
    steps.close()
    return (count - WARM_UP) * batch_size / (perf_counter() - start)


def digits() -> Images:
    return Images(mnist("train"), mnist_labels("train"))


def plain_rate(network: dict, batch_size: int, count: int) -> float:
    """Images a second of a plain loop: fp32, pixels in the host's memory, the loss read
    at every step."""
    model = U_net(device, num_classes=10, **network)
    steps = plain_steps(model, digits().random_batches(batch_size))
    return rate(steps, batch_size, count)


def run_rate(network: dict, batch_size: int, count: int, how: str) -> float:
    """Images a second of `Run`, "plain", "recorded" or "compiled" and recorded."""
    model = U_net(device, num_classes=10, **network)
    kept = training_step.COMPILE_SECONDS, training_step.recorded
    training_step.COMPILE_SECONDS = 0 if how == "compiled" else float("inf")
    if how == "plain":
        training_step.recorded = lambda step: step
    with tempfile.TemporaryDirectory() as folder:
        run = QuietRun(model, digits(), batch_size=batch_size, learning_rate=1e-3,
                       num_epochs=1000, seed=0, save_dir=folder, use_labels=True)
        steps = run_steps(run, plain_loss(model, NoiseScheduler(device=device)))
        found = rate(steps, batch_size, count)
    training_step.COMPILE_SECONDS, training_step.recorded = kept
    return found


def median_seconds(do: Callable[[], object], times: int = 7) -> float:
    """What a call takes until the device is done: the median, after two to warm up."""
    took = []
    for _ in range(times + 2):
        start = perf_counter()
        do()
        wait()
        took.append(perf_counter() - start)
    return median(took[2:])


def sampling_seconds(model: U_net, count: int, num_steps: int) -> tuple[float, float]:
    """Seconds of a walk of dpm_solver in bf16 for so many images, plain and
    recorded."""
    scheduler = NoiseScheduler(device=device)

    @torch.autocast(device, torch.bfloat16)
    def walk():
        streams = image_generators(0, range(count), device)
        xt = gaussian_noise(torch.empty(count, 1, 28, 28, device=device), streams)
        for _ in scheduler.denoise(model, xt, num_steps, "dpm_solver", streams):
            pass
    kept, took = noise.FILLS_A_GPU, []
    for noise.FILLS_A_GPU in (0, float("inf")):  # no batch is recorded, then each
        took.append(median_seconds(walk))
    noise.FILLS_A_GPU = kept
    return tuple(took)


def noise_seconds(count: int) -> tuple[float, float]:
    """Seconds of one draw of noise for so many digits: one stream, and one for each 64."""
    like = torch.empty(count, 1, 28, 28, device=device)
    each = image_generators(0, range(count), device)
    one = random_stream(0, device=device)
    return tuple(median_seconds(lambda: gaussian_noise(like, stream), 50)
                 for stream in (one, each))


def attention_seconds(positions: int, count: int, need_weights: bool) -> float:
    """Seconds of attention over so many positions of so many images in bf16, forward
    and backward."""
    layer = nn.MultiheadAttention(128, 4, batch_first=True).to(device)
    x = torch.randn(count, positions, 128, device=device, requires_grad=True)

    @torch.autocast(device, torch.bfloat16)
    def step():
        layer(x, x, x, need_weights=need_weights)[0].sum().backward()
    return median_seconds(step, 20)


def training_table(batch_sizes: list[int], steps: int) -> list[str]:
    """Images a second in training, networks with labels, in lines."""
    table = header("network", "batch", "plain loop, fp32", "ours, plain", "recorded",
                   "compiled and recorded", "gain")
    for name, network in NETWORKS.items():
        for batch_size in batch_sizes:
            few = min(steps, 80)
            rates = [plain_rate(network, batch_size, few),
                     run_rate(network, batch_size, few, "plain"),
                     *(run_rate(network, batch_size, steps, how)
                       for how in ("recorded", "compiled"))]
            table.append(row(name, batch_size, *(f"{one:,.0f}" for one in rates),
                             f"{max(rates) / rates[0]:.1f}"))
            print(table[-1], flush=True)
    return table


def sampling_table() -> list[str]:
    """Milliseconds of whole walks, in lines."""
    table = header("network", "images", "steps", "plain, ms", "recorded, ms")
    for name, network in NETWORKS.items():
        model = U_net(device, **network).eval()
        for count, num_steps in ((25, 15), (1000, 15), (25, 1000)):
            took = sampling_seconds(model, count, num_steps)
            table.append(row(name, count, num_steps,
                             *(f"{1000 * seconds:,.1f}" for seconds in took)))
            print(table[-1], flush=True)
    return table


def attention_table() -> list[str]:
    """Milliseconds of a layer of attention, forward and backward, in lines."""
    table = header("positions", "images", "need_weights=True, ms", "False, ms")
    for positions in (49, 196, 1024):
        for count in (32, 512):
            took = (attention_seconds(positions, count, need) for need in (True, False))
            table.append(row(positions, count, *(f"{1000 * s:.2f}" for s in took)))
    return table


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32, 512])
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    one, each = (1e6 * seconds for seconds in noise_seconds(1000))
    lines = ["## Training, images a second", "",
             *training_table(args.batch_sizes, args.steps), "",
             "## Sampling in bf16", "", *sampling_table(), "",
             f"A draw of noise for 1,000 digits takes {one:.0f} us by one stream for",
             f"all and {each:.0f} us by `image_generators`.", "",
             "## Attention, 128 channels in bf16, forward and backward", "",
             *attention_table()]
    write_page("speed_gpu", args, lines, "; networks with labels in training.")


if __name__ == "__main__":
    main()
