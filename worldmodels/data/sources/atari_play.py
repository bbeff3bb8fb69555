"""Real play of Atari games by simple behaviours, as a source of episodes.

Three behaviours are mixed within every episode: uniform random over the game's own actions, sticky random (an action is
held for a random number of steps), and for Pong and Breakout a scripted player that reads ball and paddle from the
console's memory and aims with an error that differs from episode to episode, so that points fall on both sides.

All randomness of episode k comes from (seed, k): collecting can be interrupted, resumed and spread over processes.
"""

import multiprocessing
import signal
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, suppress
from functools import lru_cache
from itertools import count, cycle
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np

from worldmodels.data.card import Card, make_card
from worldmodels.data.sources.playing import episode_rng, played, shares, until
from worldmodels.envs.atari import AtariEnv, Protocol
from worldmodels.types import Episode


class Track(NamedTuple):
    """Where a game keeps what a scripted player needs: RAM addresses, in RAM units (pixels), and paddle keys."""

    ball: int  # address of the ball's position along the paddle's axis
    across: int  # address of its position across it
    in_play: int  # address that is zero while there is no ball
    paddle: int  # address of the paddle's position
    line: float  # value of `across` where the ball meets the paddle
    walls: tuple[float, float]  # range of `ball`
    centre: float  # ball - paddle where the ball meets the paddle's middle
    coast: float  # how far the paddle runs on in the step after a press (a press moves it by about 22 in all)
    less: int  # action that lowers the paddle's position
    more: int


TRACKS = {
    "pong": Track(54, 49, 54, 51, line=188, walls=(48, 204), centre=6.5, coast=14, less=3, more=4),
    "breakout": Track(99, 101, 101, 72, line=177, walls=(57, 199), centre=8.5, coast=10, less=4, more=3),
}
MIXTURE = {"scripted": 0.75, "sticky": 0.15, "random": 0.1}
NOOP, FIRE = 0, 1
WITH_FIRE = {0: 1, 3: 11, 4: 12}


class RandomPlayer:
    """Every step an action of `actions`, all equally likely."""

    def __init__(self, actions: list[int], rng: np.random.Generator) -> None:
        self.actions, self.rng = actions, rng

    def act(self, ram: np.ndarray) -> int:
        """The next action; `ram` (128,) uint8 is not used."""
        return self.actions[self.rng.integers(len(self.actions))]


class StickyPlayer(RandomPlayer):
    """A random action held for a random number of steps, `hold` on average."""

    def __init__(self, actions: list[int], rng: np.random.Generator, hold: float = 6.0) -> None:
        super().__init__(actions, rng)
        self.hold, self.action = hold, super().act(np.empty(0))

    def act(self, ram: np.ndarray) -> int:
        """The next action; `ram` (128,) uint8 is not used."""
        if self.rng.random() < 1 / self.hold:
            self.action = super().act(ram)
        return self.action


class ScriptedPlayer(RandomPlayer):
    """Moves the paddle to where the ball will arrive, off by an aim that is drawn anew for every ball and return.

    Args:
        actions: what a lapse of attention presses.
        rng: all randomness.
        track: the game's memory map.
        skill: in [0, 1]; the error of the aim (standard deviation) falls from 10 pixels to 2, lapses from 15 % to 0.
    """

    def __init__(self, actions: list[int], rng: np.random.Generator, track: Track, skill: float) -> None:
        super().__init__(actions, rng)
        self.track, self.sigma, self.lapse = track, 10 - 8 * skill, 0.15 * (1 - skill)
        self.last: tuple[float, float] | None = None
        self.pressed = NOOP
        self._aim()

    def _aim(self) -> None:
        # In Pong a return by the paddle's edge is steep and one with the button held is fast: without the two the
        # opponent misses nothing, and there are next to no points to learn from.
        self.aim = self.rng.choice([-6, 6]) + self.rng.normal(0, self.sigma)
        self.fire, self.approaching = self.rng.random() < 0.9, False

    def act(self, ram: np.ndarray) -> int:
        """The next action for `ram` (128,) uint8."""
        t = self.track
        ball, across, paddle = float(ram[t.ball]), float(ram[t.across]), float(ram[t.paddle])
        (last_ball, last_across), self.last = self.last or (ball, across), (ball, across)
        if self.rng.random() < self.lapse:
            self.pressed = NOOP
            return super().act(ram)
        if not ram[t.in_play]:
            self._aim()
            return FIRE if self.rng.random() < 0.2 else NOOP
        target, speed = ball, across - last_across
        if 0 < speed < 40:  # a larger step is a new ball
            self.approaching = True
            low, high = t.walls
            arrival = (ball + (ball - last_ball) * max(t.line - across, 0) / speed - low) % (2 * (high - low))
            target = low + min(arrival, 2 * (high - low) - arrival)  # reflected at the walls
        elif self.approaching:
            self._aim()
        rest = paddle + t.coast * ((self.pressed == t.more) - (self.pressed == t.less))
        error = target - t.centre + self.aim - rest
        self.pressed = NOOP if abs(error) < 8 else t.more if error > 0 else t.less
        fire = WITH_FIRE[self.pressed]
        return fire if self.fire and fire in self.actions else self.pressed


def atari_card(seed: int, mixture: Mapping[str, float] | None = None, switch: float = 1 / 75, **protocol: Any) -> Card:
    """The dataset card of what `atari_play` yields for the same settings."""
    import ale_py

    played = Protocol(**protocol)
    return make_card(
        "atari_play",
        **played.card(),
        policy={"type": "mixture", "weights": weights(played.game, mixture), "switch": switch},
        seed=seed,
        licence="made with ale-py (GPL-2.0) and the ROMs that it carries",
        versions={"ale_py": ale_py.__version__},
    )


def atari_play(
    steps: int,
    seed: int,
    start_episode: int = 0,
    mixture: Mapping[str, float] | None = None,
    switch: float = 1 / 75,
    processes: int = 1,
    **protocol: Any,
) -> Iterator[Episode]:
    """Play whole games until they hold at least `steps` steps together.

    Episodes come in order and do not depend on `processes`, nor on where a collection was interrupted.

    Args:
        steps: least number of steps.
        seed: decides all randomness together with the number of the episode.
        start_episode: number of the first episode, for going on with a collection.
        mixture: weight of each behaviour ("scripted", "sticky", "random"); None for the game's default.
        switch: probability per step that a behaviour is drawn anew.
        processes: games that are played at the same time.
        protocol: settings of `worldmodels.envs.atari.Protocol`: game, time_limit, ...

    Yields:
        Episodes with raw rewards, life losses, the final frame, and in `info` the number of the episode, its seeds, its
        return, and steps and return of each behaviour.

    Raises:
        UserError: unknown game, behaviour or protocol.
    """
    played = Protocol(**protocol)
    settings = played, seed, tuple(weights(played.game, mixture).items()), switch
    if processes > 1:
        episodes = _parallel(start_episode, processes, settings)
    else:
        episodes = (play(number, *settings) for number in count(start_episode))
    with closing(episodes):
        yield from until(steps, episodes)


def weights(game: str, mixture: Mapping[str, float] | None = None) -> dict[str, float]:
    """The mixture of behaviours as probabilities; games without a scripted player share its weight.

    Raises:
        UserError: a behaviour is unknown or cannot play this game, or the weights are no weights.
    """
    known = MIXTURE if game in TRACKS else {k: v for k, v in MIXTURE.items() if k != "scripted"}
    return shares(game, mixture, known)


def _parallel(start: int, processes: int, settings: tuple) -> Generator[Episode, None, None]:
    # Worker k plays every `processes`-th game and hands it over through a pipe of its own: with no queue and no lock
    # between them, workers can be ended at any moment, and end by themselves when this process is killed.
    readers, workers = [], []
    try:
        for k in range(processes):
            reader, writer = multiprocessing.Pipe(duplex=False)
            readers.append(reader)
            arguments = writer, list(readers), count(start + k, processes), settings
            workers.append(multiprocessing.Process(target=_work, args=arguments, daemon=True))
            workers[-1].start()
            writer.close()
        for reader in cycle(readers):
            episode = reader.recv()
            if isinstance(episode, Exception):
                raise episode
            yield episode
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()


def _work(writer: Connection, inherited: list[Connection], numbers: Iterator[int], settings: tuple) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent alone decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for reader in inherited:  # or the pipe would not break with the parent's death
        reader.close()
    with suppress(BrokenPipeError):
        try:
            for number in numbers:
                writer.send(play(number, *settings))
        except (ValueError, RuntimeError, OSError) as error:
            writer.send(error)


_env = lru_cache(1)(AtariEnv)  # one console per process is kept between episodes


def play(number: int, protocol: Protocol, seed: int, mixture: tuple[tuple[str, float], ...], switch: float) -> Episode:
    """Episode `number` of the collection `seed`, from the start to its end; arguments as in `atari_play`."""
    rng = episode_rng(seed, number)
    env, env_seed, skill = _env(protocol), int(rng.integers(2**31)), 1 - float(rng.random()) ** 2
    names, chances = [name for name, _ in mixture], [weight for _, weight in mixture]
    players = {"random": RandomPlayer(env.minimal_actions, rng), "sticky": StickyPlayer(env.minimal_actions, rng)}
    if protocol.game in TRACKS:
        players["scripted"] = ScriptedPlayer(env.minimal_actions, rng, TRACKS[protocol.game], skill)
    by_name = {name: {"steps": 0, "return": 0.0} for name in names}

    frames, rows = [env.reset(env_seed)], []
    name, done = "", False
    while not done:
        if not rows or rng.random() < switch:
            name = names[rng.choice(len(names), p=chances)]
        action = players[name].act(env.ram)
        obs, reward, terminated, truncated, life_loss = env.step(action)
        done = terminated or truncated
        frames.append(obs)
        rows.append((action, reward, terminated, truncated, life_loss))
        by_name[name]["steps"] += 1
        by_name[name]["return"] += reward
    told = {"env_seed": env_seed, "skill": skill if "scripted" in names else None, "behaviours": by_name}
    return played(frames, rows, {"episode": number, "seed": seed, **told})
