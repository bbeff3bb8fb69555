"""What symmetry built into MuZero is worth in Chaser of Procgen, the second game of Equivariant MuZero.

A part of `benchmarks.equivariance`, which runs it where `--only chaser` asks for it: it installs third-party wheels of
Procgen, which ask for an old NumPy and Gym, into an environment of its own in data/procgen. Another process plays there
(benchmarks/chaser_game.py); logs come by `worldmodels import source=npz`, and games by a pipe.

Runs learn from a log of few levels, and play these, the same with frames and actions turned by a quarter, and levels
that they have never seen. Frames are shrunk to two pixels a cell (SIZE), so that Chaser's mazes are seen about as small
as those of `envs/maze.py`, by whose experiment they are learned. Sprites make the game symmetric only nearly.
"""

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.runs import Runs, logged_returns, means, told
from worldmodels.data.card import make_card
from worldmodels.data.disk import make_folder, write_json
from worldmodels.evaluation.play import play
from worldmodels.evaluation.players import StickyPolicy
from worldmodels.evaluation.protocols import Rules
from worldmodels.learners.acting import PRIOR, muzero_policy
from worldmodels.ops.groups import Element, moved_action
from worldmodels.types import ACTIONS, Policy

PYTHON = Path(__file__).parent.parent / "data" / "procgen"
WHEELS = ("procgen-mirror==0.10.7", "gym3==0.3.3", "gym==0.26.2", "numpy==1.26.4")
GAME = Path(__file__).with_name("chaser_game.py")
MOVES = (0, 2, 3, 4, 5, 6, 7, 8, 9)  # NOOP and the eight directions, in ALE's set
SIZE = 22  # pixels of a frame's side, as chaser_game.py has it
SETTINGS = ("model.sizes.tiny.representation.patch=2", "learner.clip_rewards=true")
"""Beside those of the experiment maze_muzero; an orb counts 1, and so does a level that is finished."""
RULES = Rules("chaser", frame_skip=1, sticky_prob=0.0, max_pool=False, noop_max=0, time_limit=1000, actions=MOVES)
UNSEEN = 1_000_000  # the first of the levels that no log has
PLACES = ("seen", "turned 90", "unseen", "drawn seen", "drawn unseen")
"""Where a run plays: by its search and, since the likeliest of actions that are much alike leads to and fro, by actions
that are drawn from its policy."""
RANDOM = "random"
"""A player without a network, whose actions are held for as many steps as those of the log's random games."""


@dataclass(frozen=True)
class Budget:
    """How much is spent.

    Args:
        log: steps of play.
        levels: in the log.
        train: optimizer steps of each run.
        games: that each run plays in each place.
        seeds: of training.
    """

    log: int
    levels: int
    train: int
    games: int
    seeds: int


FULL = Budget(40_000, levels=50, train=1500, games=20, seeds=3)
QUICK = Budget(1500, levels=10, train=10, games=2, seeds=1)


def interpreter() -> Path:
    """The Python that has Procgen, in an environment that is made where it is not there."""
    python, done = PYTHON / "bin" / "python", PYTHON / "installed"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(PYTHON)], check=True)
        pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", "--only-binary=procgen-mirror"]
        made = subprocess.run([*pip, *WHEELS], capture_output=True, text=True)
        if made.returncode:
            sys.exit(f"{', '.join(WHEELS)} cannot be installed for {sys.version.split()[0]}: {made.stderr.strip()}")
        done.touch()
    return python


class Games:
    """Games of Chaser side by side in another process, seen and stepped as AtariVectorEnv's are.

    Args:
        count: of games.
        levels: numbered from `start`; 0 are all from there on.
        start: the first level.
        turns: quarter turns counter-clockwise of the frames, and of what an action means.
    """

    def __init__(self, count: int, levels: int, start: int = 0, turns: int = 0) -> None:
        self.num_envs, self.turns = count, turns
        back = Element(-turns % 4, False)
        self._actions = np.array([moved_action(action, back) for action in range(len(ACTIONS))], np.uint8)
        command = [str(interpreter()), "-I", str(GAME), "serve", str(count), str(start), str(levels)]
        self._game: Any = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def reset(self, *, seed: Any) -> tuple[np.ndarray, dict[str, Any]]:
        """New games, all of the first seed given; frames (count, 1, SIZE, SIZE, 3) uint8."""
        self._send(b"r" + (int(seed[0]) % 2**32).to_bytes(4, "little"))
        return self._frames(), {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """One action of ALE's 18 each; a game that has ended begins another."""
        self._send(b"s" + self._actions[actions].tobytes())
        frames, n = self._frames(), self.num_envs
        reward = np.frombuffer(self._read(4 * n), np.float32)
        ended = np.frombuffer(self._read(n), np.uint8).astype(bool)
        return frames, reward, ended, np.zeros(n, bool), {}

    def __enter__(self) -> "Games":
        return self

    def __exit__(self, *_: object) -> None:
        self._game.stdin.close()
        self._game.wait()
        self._game.stdout.close()

    def _send(self, message: bytes) -> None:
        self._game.stdin.write(message)
        self._game.stdin.flush()

    def _read(self, size: int) -> bytes:
        found = self._game.stdout.read(size)
        if len(found) < size:
            sys.exit(f"the process of Chaser has ended with {self._game.wait()}")
        return found

    def _frames(self) -> np.ndarray:
        frames = np.frombuffer(self._read(self.num_envs * SIZE * SIZE * 3), np.uint8).reshape(-1, SIZE, SIZE, 3)
        return np.rot90(frames, self.turns, (1, 2)).copy()[:, None]


def record(path: Path, steps: int, levels: int) -> Path:
    """A log of so many steps as a store, made where it is not there."""
    episodes = path.with_name("episodes")
    if not (path / "metrics.json").exists():
        command = [str(interpreter()), "-I", str(GAME), "record", str(episodes), str(steps), "0", str(levels)]
        subprocess.run(command, check=True)
        size = {"height": SIZE, "width": SIZE, "channels": 3, "resize": "area", "max_pool": False}
        env = {"name": "procgen", "version": WHEELS[0], "env": {"distribution_mode": "easy", "num_levels": levels}}
        about = {"action_set": list(MOVES), "frame_skip": 1, "time_limit": RULES.time_limit, "seed": 0}
        card = make_card("npz", "chaser", size, policy={"type": "mixture"}, licence="MIT", dataset=env, **about)
        (episodes / "card.json").write_text(json.dumps(card), encoding="utf-8")
        arguments = ["import", "source=npz", f"path={episodes}", f"store={path}"]
        subprocess.run([sys.executable, "-m", "worldmodels", *arguments], check=True, stdout=subprocess.DEVNULL)
    return path


class Chaser(Runs):
    """One log, and some runs with each seed.

    Args:
        runs: settings by name.
    """

    def __init__(self, root: Path, budget: Budget, only: list[str], runs: Mapping[str, tuple[str, ...]]) -> None:
        super().__init__(root, only)
        self.budget, self.runs = budget, runs

    def parts(self) -> Iterator[tuple[str, int]]:
        """Run and seed of every part that is asked for by name."""
        for seed in range(self.budget.seeds):
            names = (*self.runs, RANDOM)
            yield from ((name, seed) for name in names if self.only and self.wanted(f"chaser/{name}/{seed}"))

    def play(self) -> None:
        """Train every run that is wanted, and let it play everywhere."""
        for name, seed in self.parts():
            made = {"game": hashlib.sha256(GAME.read_bytes()).hexdigest(), "steps": self.budget.log}
            self.done(self.root / "chaser" / "episodes", made | {"levels": self.budget.levels})
            log = record(self.root / "chaser" / "log", self.budget.log, self.budget.levels)
            out = self.root / "chaser" / name / str(seed)
            if name == RANDOM:
                for place in PLACES:
                    if "drawn" not in place:
                        self.score(StickyPolicy(MOVES, hold=3), seed, place, out)
                continue
            settings = [f"store={log}", f"seed={seed}", *SETTINGS, *self.runs[name]]
            checkpoint = self.train("maze_muzero", self.budget.train, *settings, out=out)
            for place in PLACES:
                policy, _ = muzero_policy(checkpoint, PRIOR if "drawn" in place else None)
                self.score(policy, seed, place, out)

    def score(self, policy: Policy, seed: int, place: str, out: Path) -> None:
        """Play whole games, where they are not played yet."""
        out = out / place.replace(" ", "_")
        if (out / "metrics.json").exists():
            return
        levels = {"levels": 0, "start": UNSEEN} if "unseen" in place else {"levels": self.budget.levels}
        began = time.monotonic()
        with Games(min(10, self.budget.games), turns=int("turned" in place), **levels) as env:
            found = [game.line() for game in play(policy, env, RULES, MOVES, self.budget.games, seed)]
        returns, seconds = [line["return"] for line in found], round(time.monotonic() - began, 1)
        make_folder(out)
        write_json(out / "metrics.json", {"returns": returns, "seconds": seconds})
        print(f"{out.relative_to(self.root)}: {np.mean(returns):.2f}", flush=True)


def figures_of(bench: Chaser, group: str) -> dict[str, Any]:
    """Returns of every run in each place."""
    rng = np.random.default_rng(0)
    figures: dict[str, Any] = {"log": told(means(logged_returns(bench.root / group / "log"), rng))}
    for name in (*bench.runs, RANDOM):
        played = {place: runs for place in PLACES if (runs := bench.returns(group, name, place.replace(" ", "_")))}
        drawn = {place: means(runs, rng) for place, runs in played.items()}
        figures[name] = {place: told(values) | {"seeds": len(played[place])} for place, values in drawn.items()}
    return figures
