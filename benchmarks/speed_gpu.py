"""How fast train.ipynb's step is on a GPU: plain, recorded, compiled and recorded.

    python benchmarks/speed_gpu.py

Writes benchmarks/speed_gpu.md.
"""

import tempfile
from collections.abc import Iterator
from itertools import islice
from time import perf_counter

from common import device, header, parser_of, row, write_page
from loops import Images, QuietRun, plain_loss, plain_steps, run_steps, wait
from measure import mnist, mnist_labels
from recipe import LARGE

import training
from model import U_net
from noise import NoiseScheduler

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
    kept = training.COMPILE_PAYS, training.recorded
    training.COMPILE_PAYS = 0 if how == "compiled" else float("inf")
    if how == "plain":
        training.recorded = lambda step: step
    with tempfile.TemporaryDirectory() as folder:
        run = QuietRun(model, digits(), batch_size=batch_size, learning_rate=1e-3,
                       num_epochs=1000, seed=0, save_dir=folder, use_labels=True)
        steps = run_steps(run, plain_loss(model, NoiseScheduler(device=device)))
        found = rate(steps, batch_size, count)
    training.COMPILE_PAYS, training.recorded = kept
    return found


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32, 512])
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    table = header("network", "batch", "plain loop, fp32", "ours, plain", "recorded",
                   "compiled and recorded", "gain")
    for name, network in NETWORKS.items():
        for batch_size in args.batch_sizes:
            few = min(args.steps, 80)
            rates = [plain_rate(network, batch_size, few),
                     run_rate(network, batch_size, few, "plain"),
                     *(run_rate(network, batch_size, args.steps, how)
                       for how in ("recorded", "compiled"))]
            table.append(row(name, batch_size, *(f"{one:,.0f}" for one in rates),
                             f"{max(rates) / rates[0]:.1f}"))
            print(table[-1], flush=True)
    write_page("speed_gpu", args, table, "; images a second, networks with labels.")


if __name__ == "__main__":
    main()
