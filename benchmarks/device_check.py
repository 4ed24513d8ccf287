"""All that wants a GPU, in one go: the tests, speed, time to quality, and the tables of
quality.

    python benchmarks/device_check.py --out FOLDER --minutes 9

Copies the pages that were written, and a log of each part with its seconds, to FOLDER;
a part that finds no time left is left out. --miniature: with small numbers, to try the
script itself on a CPU.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path
from time import perf_counter

from common import ROOT, machine_in_words, parser_of

MODELS = {name: f"Save_model/model_DDPM{name}.pth" for name in ("_large", "")}
TESTS = [sys.executable, "-m", "pytest", "-q", "-rfEs", "--durations=10", "tests"]


def parts(small: bool) -> dict[str, list]:
    """Each part's script and options, what matters most first."""
    large, simple = MODELS["_large"], MODELS[""]
    few = ["--samples", 100] if small else []
    first_look = ["--num-epochs", 1, "--max-images", 320, "--samples", 100,
                  "--batch-size", 16]
    trainings = [["--batch-size", 128, "--num-epochs", 10],
                 ["--batch-size", 128, "--num-epochs", 20],
                 ["--batch-size", 256, "--num-epochs", 30]]
    grid = ["--samples", 10_000, "--steps", 15, "--guidance", 1, 1.1, 1.2, 1.5, 2]
    of_guidance = {"_large": [*grid, "--guide", "early", "unlabelled"], "": grid}
    tables = {f"guidance{name}": ["guidance.py", path, *(
        ["--samples", 100, "--steps", 3] if small else of_guidance[name])]
        for name, path in MODELS.items()}
    return {
        "quality_large": ["quality.py", large, *few, "--cas", 200 if small else 50_000],
        "quality_simple": ["quality.py", simple, *few],
        "speed": ["speed_gpu.py", *(["--batch-sizes", 2, "--steps", 25] * small)],
        **{f"time_to_quality_{number}": ["time_to_quality.py", *options] for
           number, options in enumerate([first_look] if small else trainings)},
        **{f"samplers{name}": ["samplers.py", path, *few, *(["--steps", 3] * small)]
           for name, path in MODELS.items()}, **tables}


def run_part(name: str, words: list, out: Path, seconds: float) -> None:
    """Runs a script of the benchmarks, its output in a log of its own."""
    command = [sys.executable, ROOT / "benchmarks" / words[0], *words[1:]]
    start = perf_counter()
    with open(out / f"{name}.log", "w") as log:
        try:
            code = subprocess.run(list(map(str, command)), stdout=log, timeout=seconds,
                                  stderr=subprocess.STDOUT, cwd=ROOT).returncode
        except subprocess.TimeoutExpired:
            code = "out of time"
    print(f"{name}: {code or 'done'}, {perf_counter() - start:.0f} s", flush=True)


def arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--parts", nargs="+", choices=["tests", *parts(False)],
                        help="default: all")
    parser.add_argument("--miniature", action="store_true",
                        help="overwrites pages and pictures: git restore them, and "
                        "remove the new ones")
    return parser.parse_args()


def main() -> None:
    args, start = arguments(), perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    print(machine_in_words(), flush=True)
    chosen = parts(args.miniature)
    pages = {page: page.read_text() for page in (ROOT / "benchmarks").glob("*.md")}
    tests = None
    if "tests" in (args.parts or ["tests"]):
        with open(args.out / "tests.log", "w") as log:  # beside the rest, on the CPU
            tests = subprocess.Popen(TESTS + ["-k", "schedule"] * args.miniature,
                                     stdout=log, stderr=log, cwd=ROOT,
                                     env=os.environ | {"OMP_NUM_THREADS": "4"})
    for name in args.parts or chosen:
        left = 60 * args.minutes - (perf_counter() - start)
        if name in chosen and left > 5:
            run_part(name, chosen[name], args.out, left)
    if tests:
        try:
            tests.wait(max(1, 60 * args.minutes - (perf_counter() - start)))
        except subprocess.TimeoutExpired:
            print("tests: out of time", flush=True)
            tests.terminate()
        print(*(args.out / "tests.log").read_text().splitlines()[-30:], sep="\n")
    for page in (ROOT / "benchmarks").glob("*.md"):
        if pages.get(page) != page.read_text():
            shutil.copy(page, args.out)


if __name__ == "__main__":
    main()
