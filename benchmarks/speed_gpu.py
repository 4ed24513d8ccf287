"""How fast train.ipynb's step is on a GPU: plain, recorded, compiled and recorded: speed_gpu.md.

    python benchmarks/speed_gpu.py
"""

import argparse
import tempfile
import time

import torch

import training
from measure import ROOT, NoiseScheduler, U_net, command, device, gaussian_noise, machine, mnist
from recipe import LARGE
from training import Run

NETWORKS = {"simple": {}, "larger": LARGE}
WARM_UP = 20  # steps that are not counted: the first three are plain, and the fourth is recorded


class Digits:
    """MNIST's training images with their labels, as `Run` takes them."""

    def __init__(self):
        self.pixels, self.labels = mnist("train"), mnist("train", "labels-idx1").long()

    def __len__(self) -> int:
        return len(self.pixels)


def wait() -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def bare_rate(network: dict, batch_size: int, steps: int) -> float:
    """Images a second of a plain loop: fp32, pixels in the host's memory, the loss read at every step."""
    model, scheduler = U_net(device, num_classes=10, **network), NoiseScheduler(device=device)
    data, optimizer = Digits(), torch.optim.AdamW(model.parameters(), 1e-3)
    for step in range(steps):
        if step == 10:
            wait()
            start = time.perf_counter()
        index = torch.randint(len(data), (batch_size,))
        x0 = (data.pixels[index].float() / 127.5 - 1).to(device)
        t, noise = torch.randint(1000, (batch_size,), device=device), torch.randn_like(x0)
        noise_pred = model(scheduler.add_noise(x0, noise, t), t, data.labels[index].to(device))
        loss = (noise_pred - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
    return (steps - 10) * batch_size / (time.perf_counter() - start)


def run_rate(network: dict, batch_size: int, steps: int, how: str) -> float:
    """Images a second of `Run`, "plain", "recorded" or "compiled" and recorded."""
    model, scheduler = U_net(device, num_classes=10, **network), NoiseScheduler(device=device)

    def loss_of(x0, noise, t, label):
        noise_pred = model(scheduler.add_noise(x0, noise, t), t, label)
        return (noise_pred - noise).square().mean()

    kept = training.COMPILE_PAYS, training.recorded
    training.COMPILE_PAYS = 0 if how == "compiled" else float("inf")
    if how == "plain":
        training.recorded = lambda step: step
    with tempfile.TemporaryDirectory() as folder:
        run = Run(model, Digits(), batch_size=batch_size, learning_rate=1e-3, num_epochs=1000, seed=0,
                  save_dir=folder, use_labels=True)
        for x0, label in run.batches():
            t = torch.randint(1000, (batch_size,), generator=run.rng, device=device)
            run.step(loss_of, x0, gaussian_noise(x0, run.rng), t, label)
            if run.steps == WARM_UP:
                wait()
                start = time.perf_counter()
            if run.steps == steps:
                break
        wait()
    training.COMPILE_PAYS, training.recorded = kept
    return (steps - WARM_UP) * batch_size / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32, 512])
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    table = ["| network | batch | plain loop, fp32 | ours, plain | recorded | compiled and recorded | gain |",
             "|---|---|---|---|---|---|---|"]
    for name, network in NETWORKS.items():
        for batch_size in args.batch_sizes:
            few = min(args.steps, 80)
            rates = [bare_rate(network, batch_size, few), run_rate(network, batch_size, few, "plain"),
                     *(run_rate(network, batch_size, args.steps, how) for how in ("recorded", "compiled"))]
            cells = " | ".join(f"{rate:,.0f}" for rate in rates)
            table.append(f"| {name} | {batch_size} | {cells} | {max(rates) / rates[0]:.1f} |")
            print(table[-1], flush=True)
    text = [f"`{command(args)}` on {machine()}; images a second, networks with labels.", "", *table]
    (ROOT / "benchmarks" / "speed_gpu.md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
