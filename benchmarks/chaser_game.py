"""Chaser of Procgen (Cobbe et al. 2020), in an interpreter of its own that benchmarks/equivariance_chaser.py makes.

Procgen asks for an old NumPy and Gym, so nothing of this project may be imported here, nor this file by the project.

`chaser_game.py record OUT STEPS SEED LEVELS`: whole games as .npz files, for `worldmodels import source=npz`. In three
of four a player looks ahead, by random ways that it tries in copies of the game; the others are random.
`chaser_game.py serve GAMES START LEVELS`: games for another process, by bytes on standard input and output.
"""

import sys
from pathlib import Path

import numpy as np
from procgen import ProcgenGym3Env  # pyrefly: ignore

TO_ALE = np.array([9, 4, 7, 5, 0, 2, 8, 3, 6], np.uint8)
"""Procgen's action 3 (right + 1) + (up + 1), as an index into ALE's 18 actions."""
FROM_ALE = np.argsort(np.append(TO_ALE, [1]))[:10]  # FIRE, which there is not, in its place to count by
CELLS = 11  # of a side of the game in its easy mode
SIZE = 2 * CELLS  # pixels of a frame's side, shrunk from Procgen's 64
TIME_LIMIT = 1000  # steps, Procgen's own
ALONG = np.array([1, 3, 5, 7])  # left, down, up and right; in a corridor diagonals do nothing that these do not
CELL = 2  # steps that it takes to cross one
WAYS, TURNS = 8, 4
"""Random ways on that are tried after each direction, and the directions of a way, each held for two cells."""
GAMMA = 0.9  # what comes soon counts more, so that an action says where its reward is
HELD = 3  # steps for which random play keeps an action, on average
LAPSE = 0.1  # share of steps that are random, whoever plays


def _overlap() -> np.ndarray:
    """Which share (SIZE, 64) of each pixel of a frame is of each of Procgen's."""
    edges, pixels = np.arange(SIZE + 1) * 64 / SIZE, np.arange(64)
    ends = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return ends.clip(min=0) * SIZE / 64


AREA = _overlap()


def frames_of(seen: dict) -> np.ndarray:
    """Frames (games, SIZE, SIZE, 3) uint8, by mean colours of areas."""
    shrunk = np.einsum("yh,nhwc,xw->nyxc", AREA, seen["rgb"].astype(float), AREA, optimize=True)
    return np.rint(shrunk).astype(np.uint8)


def games(count: int, start: int, levels: int, seed: int) -> ProcgenGym3Env:
    """Games side by side, of levels `start` to `start` + `levels` - 1; 0 levels are all that there are."""
    return ProcgenGym3Env(
        num=count,
        env_name="chaser",
        distribution_mode="easy",
        num_levels=levels,
        start_level=start,
        rand_seed=seed,
        num_threads=0,
        use_backgrounds=False,
    )


def look(copies: ProcgenGym3Env, state: bytes, before: int, rng: np.random.Generator) -> int:
    """The direction after which the best way on earns most and soonest, an end counting as a loss.

    Into a wall the player goes on as it went, so that directions are often alike: of the best the one before is taken
    where it is among them, and actions say something.
    """
    ways = ALONG[rng.integers(4, size=(TURNS, WAYS))].repeat(2 * CELL, 0)
    plans = np.concatenate([ALONG.repeat(WAYS)[None].repeat(CELL, 0), np.tile(ways, len(ALONG))])
    copies.callmethod("set_state", [state] * plans.shape[1])
    earned, alive = np.zeros(plans.shape[1]), np.ones(plans.shape[1], bool)
    for step, actions in enumerate(plans):
        copies.act(actions)
        reward, _, first = copies.observe()
        lost = first & (reward < 1)  # a level that is done gives more; the time limit counts as a loss, too
        earned += (reward - lost) * alive * GAMMA**step
        alive &= ~first
    worth = earned.reshape(len(ALONG), WAYS).max(1)
    best = ALONG[worth >= worth.max() - 1e-9]
    return before if before in best else int(rng.choice(best))


def record(out: Path, steps: int, seed: int, levels: int) -> None:
    """Play whole games until they hold so many steps; a game that is there is not played again."""
    out.mkdir(parents=True, exist_ok=True)
    copies, number = games(len(ALONG) * WAYS, 0, levels, 0), 0
    while steps > 0:
        file = out / f"ep_{number:05}.npz"
        if not file.exists():
            rows = episode(copies, np.random.default_rng((seed, number)), levels, looks=number % 4 > 0)
            with file.with_suffix(".part").open("wb") as f:
                np.savez_compressed(f, **rows)  # pyrefly: ignore
            file.with_suffix(".part").rename(file)
        with np.load(file) as stored:
            steps -= len(stored["action"])
        number += 1


def episode(copies: ProcgenGym3Env, rng: np.random.Generator, levels: int, looks: bool) -> dict[str, np.ndarray]:
    """One game; what is seen after its end is the next one's, so that it has no last frame."""
    game = games(1, 0, levels, int(rng.integers(2**31)))
    frames, actions, rewards, over = [], [], [], False
    held = int(rng.integers(9))
    while not over:
        _, seen, _ = game.observe()
        frames.append(frames_of(seen)[0])
        if looks and len(actions) % CELL == 0:
            held = look(copies, game.callmethod("get_state")[0], held, rng)
        elif not looks and rng.random() < 1 / HELD:
            held = int(rng.integers(9))
        action = int(rng.integers(9)) if rng.random() < LAPSE else held
        game.act(np.array([action]))
        reward, _, first = game.observe()
        actions.append(TO_ALE[action])
        rewards.append(reward[0])
        over = bool(first[0])
    game.close()
    ends = np.zeros(len(actions), bool)
    ends[-1] = True
    cut = ends & (len(actions) >= TIME_LIMIT)
    columns = {"action": np.array(actions), "reward": np.array(rewards, np.float32)}
    return {"obs": np.stack(frames), **columns, "terminated": ends & ~cut, "truncated": cut}


def serve(count: int, start: int, levels: int) -> None:
    """Answer b"r" and a seed of four bytes by frames, b"s" and an action a game by frames, rewards and ends."""
    pipe, back, game = sys.stdin.buffer, sys.stdout.buffer, games(count, start, levels, 0)
    while kind := pipe.read(1):
        if kind == b"r":
            game.close()
            game = games(count, start, levels, int.from_bytes(pipe.read(4), "little") >> 1)
        else:
            game.act(FROM_ALE[np.frombuffer(pipe.read(count), np.uint8)])
        reward, seen, first = game.observe()
        back.write(frames_of(seen).tobytes())
        if kind == b"s":
            back.write(reward.astype(np.float32).tobytes() + first.astype(np.uint8).tobytes())
        back.flush()


if __name__ == "__main__":
    command, *rest = sys.argv[1:]
    if command == "record":
        record(Path(rest[0]), *map(int, rest[1:]))
    else:
        serve(*map(int, rest))
