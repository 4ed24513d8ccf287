"""What all benchmarks share: the command line, the machine, the cache and the pages."""

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from statistics import fmean

import matplotlib.pyplot as plt
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from checkpoint import atomic_file  # noqa: E402
from machine import choose_device  # noqa: E402

CACHE = ROOT / "benchmarks" / "cache"  # git-ignored: what takes long is made once
device = choose_device()
if device not in ("cuda", "cpu"):  # others lack the 64-bit numbers of the Frechet distance
    device = "cpu"


def machine_in_words() -> str:
    """What the figures were measured on, in words."""
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or "CPU"
    threads = torch.get_num_threads()
    return (f"{threads} thread{'s' * (threads > 1)} on {name} "
            f"({torch.backends.cpu.get_cpu_capability()}), torch {torch.__version__}")


def commit() -> str:
    """The commit of the code at hand, shortened; "-" where there is no history."""
    with suppress(OSError):  # no git
        git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
        found = subprocess.run(git, capture_output=True, text=True).stdout.strip()
        return found or "-"
    return "-"


def parser_of(description: str) -> argparse.ArgumentParser:
    """A command line whose help shows a script's docstring as it is written."""
    return argparse.ArgumentParser(description=description,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)


def command(args: argparse.Namespace) -> str:
    """The command line with all of a benchmark's options, default values as well."""
    words = ["python", f"benchmarks/{Path(sys.argv[0]).name}"]
    for name, value in vars(args).items():
        if value is not None:
            words += [] if name == "model" else [f"--{name.replace('_', '-')}"]
            words += value if isinstance(value, list) else [value]
    return shlex.join(map(str, words))


def digests(*paths: Path) -> list[str]:
    return [hashlib.md5(path.read_bytes()).hexdigest() for path in paths if path.exists()]


CODE = digests(ROOT / "model.py", ROOT / "noise.py")  # as it was when this process began


def fingerprint(*paths: Path) -> list[str]:
    """What tells these files, and the code that draws with them, from any other."""
    return digests(*paths) + CODE


def once(benchmark: str, key: tuple, run: Callable[[], list]) -> list:
    """run(), or what it returned when it was last asked for with this key and today's
    model.py and noise.py, so that a stopped benchmark goes on."""
    key = json.dumps((key, fingerprint()), sort_keys=True)
    kept = CACHE / f"{benchmark}_{hashlib.md5(key.encode()).hexdigest()[:16]}.json"
    if not kept.exists():
        found = json.dumps({"key": key, "found": run()})
        with atomic_file(kept) as file:
            file.write(found.encode())
    return json.loads(kept.read_text())["found"]


def process_pool(processes: int) -> ProcessPoolExecutor:
    """Processes of their own for runs side by side; without progress bars, which would
    mingle."""
    os.environ["TQDM_DISABLE"] = "1"
    return ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"))


def row(*cells) -> str:
    """A row of a table in Markdown."""
    return f"| {' | '.join(map(str, cells))} |"


def header(*names: str) -> list[str]:
    """The first two rows of a table in Markdown."""
    return [row(*names), "|" + "---|" * len(names)]


def mean_and_each(values: Iterable[float], form: str) -> str:
    """The mean and, where there are several, each value in brackets."""
    values = list(values)
    each = ", ".join(format(value, form) for value in values)
    return format(fmean(values), form) + (f" ({each})" if len(values) > 1 else "")


def write_page(name: str, args: argparse.Namespace, lines: list[str],
               note: str = "") -> None:
    """Writes benchmarks/NAME.md: the command, the machine, and what was found."""
    text = [f"`{command(args)}` on {machine_in_words()}{note}", "", *lines, ""]
    page = ROOT / "benchmarks" / f"{name}.md"
    page.write_text("\n".join(text), encoding="utf-8")


def plot_distances(name: str, cost: str, curves: dict[str, list[tuple[float, float]]],
                   floor: float) -> None:
    """Draws Assets/NAME.png: Frechet distance against cost, a curve for each name,
    above the distance of training images."""
    plt.figure(figsize=(6, 4))
    for label, points in curves.items():
        plt.loglog(*zip(*points), "o-", label=label)
    plt.axhline(floor, color="grey", linestyle=":", label="training images")
    plt.xlabel(cost)
    plt.ylabel("Frechet distance to the test images")
    plt.legend()
    plt.savefig(ROOT / "Assets" / f"{name}.png", dpi=150, bbox_inches="tight")
