"""How fast the maze game is on one core: steps a second of random play, with every observation written.

The game runs in one thread, and seconds are the processor's: what else runs on the machine matters little.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np

from benchmarks.results import publish
from worldmodels.envs.maze import MazeEnv, maze_set

FLOOR = 1_000_000
"""Steps a second of planes that the environment is held to."""


def speed(games: int, observation: str, steps: int, repeats: int) -> list[float]:
    """Steps a second of `games` games side by side, once for each of the repeats; games that end begin anew."""
    env = MazeEnv(games, observation=observation)
    env.reset(seed=0)
    actions = np.random.default_rng(0).choice((0, 2, 3, 4, 5), (max(steps // games, 1), games))
    env.step(actions[0])  # compiled, or read from numba's cache
    found = []
    for _ in range(repeats):
        start = time.process_time()
        for action in actions:
            env.step(action)
        found.append(actions.size / (time.process_time() - start))
    return found


def main() -> None:
    """Print the median and the range of each, and the same as JSON in the last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="5 repeats in place of 20")
    parser.add_argument("--out", type=Path, help="folder for maze.json")
    options = parser.parse_args()
    repeats = 5 if options.quick else 20
    cases = {  # games, observation, steps a repeat
        "maze_steps_per_s": (1024, "planes", 1_000_000),
        "maze_steps_per_s_of_64": (64, "planes", 500_000),
        "maze_frames_per_s": (1024, "frames", 100_000),
    }
    figures = {}
    for name, (games, observation, steps) in cases.items():
        found = speed(games, observation, steps, repeats)
        figures[name] = round(statistics.median(found))
        limit = f"at least {FLOOR:,}" if name == "maze_steps_per_s" else ""
        print(f"{name:<24} {figures[name]:>10,}  ({min(found):,.0f} to {max(found):,.0f})  {limit}")
    maze_set(1)
    start = time.process_time()
    maze_set(20_000)
    figures["mazes_per_s"] = round(20_000 / (time.process_time() - start))
    print(f"{'mazes_per_s':<24} {figures['mazes_per_s']:>10,}")

    publish("maze", figures, options.out)


if __name__ == "__main__":
    main()
