"""Plays a policy in real games, whole games with the rewards as the game gives them, and counts every one of them.

Which episodes are played is decided beforehand: episode k starts from a seed of its own and is played in slot k mod N,
N side by side in rounds, and a round ends with its last game. So no short game is counted in a long one's place. All
draws of a round come from (seed, round): a round that was cut short gives the same games again.

Legend: N slots, C colour channels, H and W pixels.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from worldmodels.envs.child import GameCrash
from worldmodels.evaluation.protocols import Rules
from worldmodels.types import ACTIONS, Policy, UserError

OWN_GAMES = ("catch", "maze")
"""Games of this package, that no emulator plays."""


class Game(NamedTuple):
    """One finished episode.

    Args:
        episode: its number.
        score: sum of its rewards.
        length: steps.
        frames: raw frames by the emulator's own count, no-op start included, where it has one.
        truncated: whether the time limit cut it.
        film: the frames that the policy saw, (T, C, H, W) uint8, where they were asked for.
    """

    episode: int
    score: float
    length: int
    frames: int | None
    truncated: bool
    film: Tensor | None

    def line(self) -> dict[str, Any]:
        """As results.jsonl has it."""
        told = {"episode": self.episode, "return": self.score, "length": self.length}
        return told | {"frames": self.frames, "truncated": self.truncated}


def play(
    policy: Policy,
    env: Any,
    rules: Rules,
    allowed: Sequence[int],
    episodes: int,
    seed: int,
    done: Collection[int] = (),
    device: str = "cpu",
    films: int = 0,
    film_steps: int = 2000,
    progress: Callable[[int], None] = lambda steps: None,
) -> Iterator[Game]:
    """Play episodes 0 to `episodes` - 1 but those that are done.

    Args:
        policy: sees frames (N, C, H, W) uint8 on `device`.
        env: a vector environment that `rules` were given to (`open_games`), with actions in the 18-action set.
        rules: temperature and epsilon are heeded here, the others by `env`. The temperature multiplies the policy's
            own; one without any, as that of Gumbel MuZero's search, takes its best action by all rules.
        allowed: the actions that may be taken.
        episodes: how many there are.
        seed: decides everything that is random, with the number of slots.
        done: episodes that are left out of what is given.
        device: where the policy is.
        films: the first so many episodes are filmed.
        film_steps: the longest film.
        progress: called with the steps played so far in the games that count.

    Yields:
        Games in the order in which they end.

    Raises:
        UserError: no episode is asked for, the policy takes an action that is not allowed, or the games' process fails.
    """
    if episodes < 1:
        raise UserError(f"episodes={episodes} must be at least 1")
    own = getattr(policy, "temperature", None)
    if own is not None:
        policy.temperature = own * rules.temperature  # pyrefly: ignore
    try:
        steps = 0
        for first in range(0, episodes, env.num_envs):
            numbers = range(first, min(first + env.num_envs, episodes))
            if set(numbers) <= set(done):
                continue
            for item in _round(policy, env, rules, allowed, numbers, seed, device, films, film_steps):
                if isinstance(item, Game):
                    if item.episode not in done:
                        yield item
                else:
                    steps += item
                    progress(steps)
    finally:
        if own is not None:
            policy.temperature = own  # pyrefly: ignore


def _round(
    policy: Policy,
    env: Any,
    rules: Rules,
    allowed: Sequence[int],
    numbers: range,
    seed: int,
    device: str,
    films: int,
    film_steps: int,
) -> Iterator[Game | int]:
    """The games of one round as they end, and between them the number of games that took a step."""
    slots, count, t = env.num_envs, len(numbers), 0
    seeds = np.array([drawn_seed(seed, 0, numbers[0] + k) for k in range(slots)])
    generator = torch.Generator(device).manual_seed(drawn_seed(seed, 1, numbers[0]))
    legal, state = torch.tensor(sorted(allowed)), policy.start(slots)
    scores, running = np.zeros(slots), np.arange(slots) < count
    seen: dict[int, list[Tensor]] = {k: [] for k, number in enumerate(numbers) if number < films}
    try:
        frames, _ = env.reset(seed=seeds)
        while running.any():
            observation = channels_first(frames)
            for k, film in seen.items():
                if running[k] and len(film) < film_steps:
                    film.append(observation[k].clone())
            action, state = policy.act(observation.to(device), state, generator)
            if rules.epsilon:
                chance = torch.rand(slots, generator=generator, device=device) < rules.epsilon
                other = torch.randint(len(legal), (slots,), generator=generator, device=device)
                action = torch.where(chance, legal.to(device)[other], action)
            action = action.cpu()
            if not bool(torch.isin(action[:count], legal).all()):
                foreign = next(a for a in action[:count].tolist() if a not in allowed)
                names = ", ".join(ACTIONS[a] for a in legal.tolist())
                taken = ACTIONS[foreign] if 0 <= foreign < len(ACTIONS) else foreign
                raise UserError(f"the policy took {taken}, which is not among the allowed actions {names}")
            frames, reward, terminated, truncated, info = env.step(action.numpy())
            t += 1
            scores += np.where(running, reward, 0)
            yield int(running.sum())
            for k in np.flatnonzero(running & (terminated | truncated)).tolist():
                running[k] = False
                raw = int(info["episode_frame_number"][k]) if "episode_frame_number" in info else None
                film = torch.stack(seen[k]) if seen.get(k) else None
                yield Game(numbers[k], float(scores[k]), t, raw, bool(truncated[k] and not terminated[k]), film)
    except GameCrash as error:
        raise UserError(
            f"the real game crashed in step {t + 1} of episodes {numbers[0]} to {numbers[-1]} ({error}); "
            "the episodes before are kept, and the same command goes on from there"
        ) from error


def open_games(
    game: str, rules: Rules, slots: int, size: int, colour: str, env: Mapping[str, Any] | None = None
) -> Any:
    """A vector environment, and context manager, of `slots` games by these rules, with frames of this kind.

    Args:
        game: its name in conf/game.
        rules: of play.
        slots: how many games.
        size: height and width of the frames in pixels.
        colour: "rgb" or "ale_gray".
        env: settings of the game's own, which maze and catch have.

    Raises:
        UserError: the game is unknown, or cannot be played so.
    """
    from worldmodels.envs.atari import Protocol, vector_settings
    from worldmodels.envs.child import ChildEnv

    if env and game not in OWN_GAMES:
        raise UserError(f"env={dict(env)} is given and {game} has no settings of its own: leave env= out")
    if game in OWN_GAMES and (rules.frame_skip, rules.sticky_prob) != (1, 0):
        raise UserError(f"{game} is not played by protocol={rules.name}; give protocol=store and store=...")
    if game == "catch":
        from worldmodels.envs.catch import CatchGames

        balls = dict(env or {}).get("balls", 1)
        if set(env or {}) - {"balls"} or type(balls) is not int or balls < 1 or rules.time_limit % balls:
            raise UserError(f"env={dict(env or {})} of catch is {{balls: N}}, N a divisor of {rules.time_limit} steps")
        return CatchGames(slots, cells=rules.time_limit // balls + 1, size=size, balls=balls)
    if game == "maze":
        from worldmodels.envs.maze import MazeEnv, maze_settings

        settings = maze_settings(env or {})
        return MazeEnv(slots, size=size, time_limit=rules.time_limit, observation="frames", **settings)
    seen = {k: getattr(rules, k) for k in ("frame_skip", "sticky_prob", "max_pool", "noop_max", "time_limit")}
    protocol = Protocol(game, size, colour, **seen)
    try:
        return ChildEnv(vector_settings(protocol), slots)
    except GameCrash as error:
        raise UserError(f"the game {game} cannot be started: {error}") from error


def frames_of(card: Mapping[str, Any], owner: str) -> dict[str, Any]:
    """`size` and `colour` of frames as the dataset card has them, and as `env` the settings of a game of our own.

    Raises:
        UserError: it cannot.
    """
    obs = card["obs"]
    # ALE's own grey levels are OpenCV's of its colours, but a film's were shrunk in another order
    playable = obs["height"] == obs["width"] and (card["game"] in OWN_GAMES or obs["resize"] == "area")
    if not playable or obs["colour"] not in ("rgb", "ale_gray"):
        kind = f"{obs['height']}x{obs['width']} {obs['colour']} frames (resize={obs['resize']})"
        raise UserError(
            f"{owner} has {kind}, which the real game is not played with: only square rgb or ale_gray frames that were "
            "shrunk by area are; train on a store of such frames"
        )
    own = {"env": card["dataset"].get("env", {})} if card["game"] in OWN_GAMES else {}
    return {"size": obs["height"], "colour": obs["colour"], **own}


def drawn_seed(*key: int) -> int:
    """A seed below 2**31 that is a function of the key, whole numbers of at least 0."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint32)[0] >> 1)


def channels_first(frames: np.ndarray) -> Tensor:
    """(N, 1, H, W[, 3]) or (N, H, W, 3) uint8 as (N, C, H, W)."""
    images = torch.from_numpy(np.ascontiguousarray(frames))
    if images.ndim == 5:
        images = images[:, 0]
    return images.movedim(-1, 1).contiguous() if images.shape[-1] == 3 else images
