"""Episodes of the toy game Catch, played at random with a share of good play and one of the very contrary."""

from collections.abc import Iterator
from itertools import count

import numpy as np

from worldmodels.data.card import Card, make_card
from worldmodels.data.sources.playing import episode_rng
from worldmodels.envs.catch import LEFT, MOVES, NOOP, RIGHT, CatchEnv
from worldmodels.types import Episode, UserError


def catch_card(
    seed: int,
    skill: float = 0.0,
    cells: int = 5,
    size: int = 20,
    balls: int = 1,
    at_most: float = 1.0,
    contrary: float = 0.0,
) -> Card:
    """The dataset card of what `catch_play` yields for the same settings.

    Raises:
        UserError: shares below 0 or above 1 together.
    """
    _check_shares(skill, contrary)
    own = {} if balls == 1 else {"dataset": {"env": {"balls": balls}}}
    obs = {"height": size, "width": size, "channels": 3, "resize": "none", "max_pool": False}
    return make_card(
        "catch_play",
        "catch",
        obs,
        action_set=sorted(MOVES),
        frame_skip=1,
        time_limit=balls * (cells - 1),
        policy={
            "type": "mixture",
            "best": skill,
            "random": 1 - skill - contrary,
            **({"contrary": contrary} if contrary else {}),
            **({} if at_most == 1 else {"at_most": at_most}),
        },
        seed=seed,
        licence="MIT",
        **own,
    )


def catch_play(
    steps: int,
    seed: int,
    start_episode: int = 0,
    skill: float = 0.0,
    cells: int = 5,
    size: int = 20,
    balls: int = 1,
    at_most: float = 1.0,
    contrary: float = 0.0,
) -> Iterator[Episode]:
    """Play episodes of Catch until they hold at least `steps` steps together; episode k is a function of (seed, k).

    Args:
        steps: least number of steps.
        seed: decides all randomness together with the number of the episode.
        start_episode: number of the first episode, for going on with a collection.
        skill: share of steps that take the best action; most others are random.
        cells: rows and columns of the grid.
        size: height and width of the frames in pixels.
        balls: that fall in an episode.
        at_most: episodes with a greater share of the best return are left out, so that the log holds no good play.
        contrary: share of steps that go away from the ball, so that what is mostly done need not be what is best.

    Raises:
        UserError: `size` is no multiple of `cells`, or shares are below 0 or above 1 together.
    """
    _check_shares(skill, contrary)
    env, actions = CatchEnv(cells, size, balls), sorted(MOVES)
    for number in count(start_episode):
        if steps <= 0:
            return
        rng = episode_rng(seed, number)
        frames, taken, rewards, terminated = [env.reset(int(rng.integers(2**31)))], [], [], False
        while not terminated:
            kind = rng.random()
            if kind < skill:
                taken.append(env.best_action())
            elif kind < skill + contrary:
                taken.append({LEFT: RIGHT, RIGHT: LEFT, NOOP: (LEFT, RIGHT)[rng.integers(2)]}[env.best_action()])
            else:
                taken.append(actions[rng.integers(len(actions))])
            frame, reward, terminated = env.step(taken[-1])
            frames.append(frame)
            rewards.append(reward)
        if sum(rewards) > at_most * balls:
            continue
        none = np.zeros(len(taken), bool)
        last = none.copy()
        last[-1] = True
        steps -= len(taken)
        info = {"episode": number, "seed": seed, "return": sum(rewards)}
        columns = np.stack(frames[:-1]), np.array(taken, np.uint8), np.array(rewards, np.float32)
        yield Episode(*columns, last, none, none.copy(), frames[-1], info)


def _check_shares(skill: float, contrary: float) -> None:
    if skill < 0 or contrary < 0 or skill + contrary > 1:
        raise UserError(f"skill={skill} and contrary={contrary} are shares of steps, 0 or more and at most 1 together")
