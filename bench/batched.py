"""Many small trainings as one batched network beside a process for each: wall time of `samlite sweep synthetic`.

    pip install "."
    python bench/batched.py [--widths 192,400,1920] [--seeds 5] [--epochs 20] [--repeats 3]

At each width SGD and SAM with five radii, so many seeds of each. Both ways run in turn, each in a fresh folder, without
measurements; the ratio is the median over repeats.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from samlite import tasks


def seconds(width: int, seeds: int, epochs: int, *more: str) -> float:
    """The wall time of a sweep."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--widths", width, "--seeds", seeds, "--epochs", epochs, "--rhos", "0.01,0.02,0.05,0.1,0.2"]
        command = [sys.executable, "-m", "samlite.cli", "sweep", "synthetic", *map(str, options), "--measure", "none"]
        start = time.perf_counter()
        command += ["--out", str(Path(folder) / "sweep"), *more]
        # Not from the root, whose samlite/ would hide an installed one.
        subprocess.run(command, check=True, capture_output=True, cwd=folder)
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", default="192,400,1920")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    for width in map(int, options.widths.split(",")):
        pairs = [
            [seconds(width, options.seeds, options.epochs, *more) for more in (("--no-batched",), ("--batched",))]
            for _ in range(options.repeats)
        ]
        ratios = [alone / batched for alone, batched in pairs]
        count, runs = tasks.get("synthetic").parameters(width), 6 * options.seeds
        print(
            f"{count:7,} parameters, {runs} runs of {options.epochs} epochs: "
            f"{median(alone for alone, _ in pairs):.1f} s alone, {median(both for _, both in pairs):.1f} s batched, "
            f"ratio {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
