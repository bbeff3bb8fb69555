"""Real Atari games: one protocol, played step by step through ALEInterface or in batches through AtariVectorEnv.

A protocol says all that decides what a frame, a step and an episode are. With equal protocols, seeds and actions both
interfaces give equal frames, rewards and flags, bit for bit (tests/unit/test_atari.py), but for two things that ALE's
source explains (src/ale/vector/preprocessed_env.cpp). AtariVectorEnv leaves the frame loop before it captures the raw
frame that ends a game or a time limit, and pools into a buffer that it does not clear, so its last observation shows
the step before; ours is the frame that ended the game. And it draws the length of a no-op start from another
generator, so that starts agree frame by frame only with noop_max of 0 or 1 (their distribution is the same).
"""

import difflib
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from worldmodels.types import ACTIONS, UserError

FORBIDDEN = ("combat", "joust", "maze_craze", "warlords")
"""ROMs that abort the whole process when loaded without a two-player mode (ale-py 0.12)."""

_COLOURS = ("rgb", "ale_gray")


@dataclass(frozen=True, slots=True)
class Protocol:
    """How a game is played and seen. Rewards are never clipped, games always end by game over or time limit.

    Args:
        game: ALE's snake_case name, such as "ms_pacman".
        size: height and width of the frames in pixels.
        colour: "rgb" or "ale_gray" (ALE's own luminance).
        frame_skip: raw frames per action.
        max_pool: whether the frame seen is the maximum over the last two of them, or the last.
        sticky_prob: probability per raw frame that the previous action is repeated instead.
        noop_max: a game starts after 0 to noop_max - 1 raw frames without action (as in AtariVectorEnv).
        time_limit: steps after which a game is truncated (27,000 at frame skip 4 are 30 minutes of play).

    Raises:
        UserError: for an unknown game, a game that cannot run, or a setting out of range.
    """

    game: str
    size: int = 64
    colour: str = "rgb"
    frame_skip: int = 4
    sticky_prob: float = 0.0
    noop_max: int = 30
    time_limit: int = 27_000
    max_pool: bool = True

    def __post_init__(self) -> None:
        rom_path(self.game)
        if self.colour not in _COLOURS:
            raise UserError(f"colour={self.colour} is unknown: use one of {', '.join(_COLOURS)}")
        if not 0 <= self.sticky_prob < 1:
            raise UserError(f"sticky_prob={self.sticky_prob} is not a probability below 1: use 0 (off) or 0.25 (usual)")
        for name in ("size", "frame_skip", "time_limit"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UserError(f"{name}={value} must be a whole number of at least 1")

    @property
    def obs_shape(self) -> tuple[int, ...]:
        """(size, size, 3) for rgb, (size, size) for ale_gray."""
        return (self.size, self.size, 3) if self.colour == "rgb" else (self.size, self.size)

    def card(self) -> dict[str, Any]:
        """The fields of a dataset card that the protocol decides (data/card.py), as plain data."""
        return {
            "game": self.game,
            "action_set": list(range(len(ACTIONS))),
            "obs": {
                "height": self.size,
                "width": self.size,
                "channels": 3 if self.colour == "rgb" else 1,
                "colour": self.colour,
                "resize": "area",
                "max_pool": self.max_pool,
            },
            "frame_skip": self.frame_skip,
            "sticky_prob": self.sticky_prob,
            "noop_max": self.noop_max,
            "fire_reset": False,
            "episodic_life": False,
            "reward": {"clipped": False},
            "time_limit": self.time_limit,
        }


class Outcome(NamedTuple):
    """What one step gives: obs uint8 (H, W) or (H, W, 3), the sum of raw rewards, and the flags of the step."""

    obs: np.ndarray
    reward: float
    terminated: bool
    truncated: bool
    life_loss: bool


class AtariEnv:
    """One game through ALEInterface, with its RAM and with states that can be kept and restored.

    Args:
        protocol: how the game is played and seen.
    """

    def __init__(self, protocol: Protocol) -> None:
        import ale_py

        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        self.protocol = protocol
        self._ale = ale_py.ALEInterface()
        self._ale.setFloat("repeat_action_probability", protocol.sticky_prob)
        self._actions = [ale_py.Action(i) for i in range(len(ACTIONS))]
        self._load(0)
        self.minimal_actions = [a.value for a in self._ale.getMinimalActionSet()]
        height, width = self._ale.getScreenDims()
        shape = (height, width, 3) if protocol.colour == "rgb" else (height, width)
        self._screens = [np.empty(shape, np.uint8) for _ in range(2)]
        self._frames = 0

    def reset(self, seed: int) -> np.ndarray:
        """Start a game; the seed (0 to 2**31 - 1) decides its no-op start and ALE's own randomness.

        Returns:
            The first frame, uint8 of shape `protocol.obs_shape`.
        """
        self._load(seed)
        self._ale.reset_game()
        for _ in range(np.random.default_rng(seed).integers(max(1, self.protocol.noop_max))):
            self._ale.act(self._actions[0])
            if self._ale.game_over():
                self._ale.reset_game()
        self._frames = 0
        return self._observe([self._capture(0)])

    def step(self, action: int) -> Outcome:
        """Play `action` (index into the 18-action set) for `frame_skip` raw frames, or until the game ends."""
        lives, reward, seen = self._ale.lives(), 0.0, []
        terminated = truncated = False
        for left in range(self.protocol.frame_skip - 1, -1, -1):
            reward += self._ale.act(self._actions[action])
            self._frames += 1
            terminated = self._ale.game_over()
            truncated = not terminated and self._frames >= self.protocol.time_limit * self.protocol.frame_skip
            ends = terminated or truncated
            if left < 1 + self.protocol.max_pool or ends:
                seen.append(self._capture(len(seen)))
            if ends:
                break
        return Outcome(self._observe(seen), reward, terminated, truncated, self._ale.lives() < lives)

    @property
    def ram(self) -> np.ndarray:
        """The 128 bytes of the console's memory, a (128,) uint8 copy."""
        return self._ale.getRAM()

    def clone(self, rng: bool = True) -> tuple[Any, int]:
        """The whole state of the game and the time played; ALE's random numbers, too, unless `rng` is false."""
        return self._ale.cloneState(include_rng=rng), self._frames

    def restore(self, state: tuple[Any, int]) -> None:
        """Go back to a state that `clone` gave."""
        self._ale.restoreState(state[0])
        self._frames = state[1]

    def _load(self, seed: int) -> None:
        # ALE reads its seed only when a ROM is loaded; AtariVectorEnv loads it anew for every seeded reset, too.
        self._ale.setInt("random_seed", seed)
        self._ale.loadROM(rom_path(self.protocol.game))

    def _capture(self, slot: int) -> np.ndarray:
        screen = self._screens[slot]
        (self._ale.getScreenRGB if screen.ndim == 3 else self._ale.getScreenGrayscale)(screen)
        return screen

    def _observe(self, seen: list[np.ndarray]) -> np.ndarray:
        import cv2

        pooled = seen[0] if len(seen) == 1 else np.maximum(seen[0], seen[1])
        return cv2.resize(pooled, (self.protocol.size, self.protocol.size), interpolation=cv2.INTER_AREA)


def vector_env(protocol: Protocol, num_envs: int, **kwargs: Any) -> Any:
    """AtariVectorEnv with exactly this protocol: observations (num_envs, 1, *obs_shape) uint8, actions in the 18-set.

    Life losses are seen in `info["lives"]`. The observation of the step that ends a game is stale (module docstring).

    Args:
        protocol: how the games are played and seen.
        num_envs: how many games are played side by side.
        kwargs: anything else that AtariVectorEnv takes (num_threads, autoreset_mode, ...).
    """
    import ale_py
    from ale_py.vector_env import AtariVectorEnv

    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    return AtariVectorEnv(num_envs=num_envs, **vector_settings(protocol), **kwargs)


def vector_settings(protocol: Protocol) -> dict[str, Any]:
    """What AtariVectorEnv calls the protocol, as plain data."""
    return {
        "game": protocol.game,
        "img_height": protocol.size,
        "img_width": protocol.size,
        "grayscale": protocol.colour == "ale_gray",
        "stack_num": 1,
        "frameskip": protocol.frame_skip,
        "maxpool": protocol.max_pool,
        "noop_max": protocol.noop_max,
        "max_num_frames_per_episode": protocol.time_limit * protocol.frame_skip,
        "repeat_action_probability": protocol.sticky_prob,
        "full_action_space": True,
        "reward_clipping": False,
        "use_fire_reset": False,
        "episodic_life": False,
        "life_loss_info": False,
    }


def games() -> list[str]:
    """The names of all games that can be played, sorted."""
    from ale_py import roms

    return sorted(set(roms.get_all_rom_ids()) - set(FORBIDDEN))


def rom_path(game: str) -> str:
    """Where the ROM of `game` lies.

    Raises:
        UserError: the game is unknown (near names are given) or cannot be played by one player.
    """
    from ale_py import roms

    if game in FORBIDDEN:
        raise UserError(f"game={game} needs two players and cannot be played here: {', '.join(FORBIDDEN)} are left out")
    if game not in (known := games()):
        near = difflib.get_close_matches(game.lower(), known, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known games: {', '.join(known)}"
        raise UserError(f"game={game} is unknown to ale-py: {hint}")
    return str(roms.get_rom_path(game))
