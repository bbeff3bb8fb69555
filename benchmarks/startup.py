"""How long the program takes to answer: `import worldmodels` and `worldmodels` alone, each in a fresh process."""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.results import publish

COMMANDS = {
    "interpreter_seconds": [sys.executable, "-c", "pass"],
    "import_seconds": [sys.executable, "-c", "import worldmodels"],
    "list_commands_seconds": [sys.executable, "-m", "worldmodels"],
}
LIMITS = {"import_seconds": 0.3, "list_commands_seconds": 0.5}


def main() -> None:
    """Print the median, the range and the limit of each, and the same as JSON in the last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="5 repeats in place of 20")
    parser.add_argument("--out", type=Path, help="folder for startup.json")
    options = parser.parse_args()
    figures = {}
    for name, command in COMMANDS.items():
        times = []
        for _ in range(5 if options.quick else 20):
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            times.append(time.perf_counter() - start)
        figures[name] = round(statistics.median(times), 3)
        limit = f"limit {LIMITS[name]} s" if name in LIMITS else ""
        print(f"{name:<24} {figures[name]:.3f} s  ({min(times):.3f} to {max(times):.3f})  {limit}")

    publish("startup", figures, options.out)


if __name__ == "__main__":
    main()
