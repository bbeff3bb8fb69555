"""Rollouts inside a world model, under any policy, and a world model as an environment for other programs."""

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from torch import Tensor

from worldmodels.types import ACTIONS, Policy, Segment, State, Store, UserError, WorldModel

SIDE = ("reward_mean", "terminated_mean", "life_loss", "life_loss_mean")
"""Fields of a `Step` that an imagined segment keeps as side columns."""


def imagine(
    model: WorldModel, policy: Policy, start: Segment, horizon: int, generator: torch.Generator | None = None
) -> Segment:
    """Play `policy` inside `model` for `horizon` steps from the end of `start`.

    Args:
        model: gives frames (uint8).
        policy: sees one frame (B, C, H, W) a step.
        start: real context; its last frame is the first that the policy sees.
        horizon: number of steps T.
        generator: decides every draw of the model and the policy.

    Returns:
        A segment of T transitions whose obs[:, 0] is the last frame of `start`. Reward and terminated are drawn; their
        means are the side columns `reward_mean` and `terminated_mean` (B, T) float32; where the model tells lost lives
        apart, `life_loss` and `life_loss_mean` are beside them, and `game` where `start` tells it. mask is false after
        an imagined termination: the model goes on there, but the episode is over.

    Raises:
        UserError: the model gives no frames.
    """
    state, memory = model.start(start), policy.start(start.batch_size)
    frame = start.obs[:, -1]
    frames, actions, steps = [frame], [], []
    for _ in range(horizon):
        action, memory = policy.act(frame, memory, generator)
        state, step = model.step(state, action, generator)
        frame = step.seen()
        frames.append(frame)
        actions.append(action)
        steps.append(step)

    def column(name: str) -> Tensor:
        return torch.stack([getattr(step, name) for step in steps], dim=1)

    terminated = column("terminated")
    alive = torch.ones_like(terminated)
    alive[:, 1:] = ~terminated[:, :-1].cummax(dim=1).values
    side = {name: column(name) for name in SIDE if getattr(steps[0], name) is not None}
    return Segment(
        obs=torch.stack(frames, dim=1),
        action=torch.stack(actions, dim=1),
        reward=column("reward"),
        terminated=terminated,
        truncated=column("truncated"),
        mask=alive,
        next_mask=alive,
        side=side | {name: start.side[name] for name in ("game",) if name in start.side},
    )


class LoggedActions:
    """The policy that repeats logged actions, step by step.

    Args:
        action: (B, T) int64.
    """

    def __init__(self, action: Tensor) -> None:
        self.action = action

    def start(self, n: int) -> State:
        """The state of `n` rows; raises UserError unless there are as many rows of actions."""
        if n != len(self.action):
            raise UserError(f"There are logged actions for {len(self.action)} rows but {n} were started.")
        return {"t": torch.zeros(n, dtype=torch.long, device=self.action.device)}

    def act(self, observation: Tensor, state: State, generator: torch.Generator | None = None) -> tuple[Tensor, State]:
        """The next logged action (B,), whatever is seen."""
        return self.action.gather(1, state["t"][:, None])[:, 0], {"t": state["t"] + 1}


class RandomPolicy:
    """Uniform over the legal actions.

    Args:
        actions: indices into the 18-action set.
    """

    def __init__(self, actions: Sequence[int]) -> None:
        self.actions = torch.as_tensor(actions, dtype=torch.long)

    def start(self, n: int) -> State:
        """No state."""
        return {}

    def act(self, observation: Tensor, state: State, generator: torch.Generator | None = None) -> tuple[Tensor, State]:
        """Random actions (B,) int64."""
        index = torch.randint(len(self.actions), (len(observation),), generator=generator, device=observation.device)
        return self.actions.to(observation.device)[index], state


class HumanPolicy:
    """A person plays: the same action in every row, whatever the keyboard says now.

    Args:
        pressed: gives the action, an index into the 18-action set.
        actions: those that may be taken; anything else counts as the first of them.
    """

    def __init__(self, pressed: Callable[[], int], actions: Sequence[int] = range(len(ACTIONS))) -> None:
        self.pressed, self.actions = pressed, list(actions)

    def start(self, n: int) -> State:
        """No state."""
        return {}

    def act(self, observation: Tensor, state: State, generator: torch.Generator | None = None) -> tuple[Tensor, State]:
        """What is pressed, (B,) int64."""
        action = self.pressed()
        action = action if action in self.actions else self.actions[0]
        return torch.full((len(observation),), action, device=observation.device), state


class ImaginationEnv(VectorEnv):
    """A world model as a vector environment of Gymnasium, in which any library can train.

    Rows begin at frames drawn from logged play. A row that ends is begun anew in the same step (its autoreset mode is
    SAME_STEP): the observation is then its new first frame, and the last one of the old is in `info["final_obs"]`,
    where `info["_final_obs"]` is true. All draws come from one generator, which `reset(seed=...)` seeds.

    Args:
        model: gives frames; no gradient goes through it.
        store: where rows begin.
        num_envs: N.
        horizon: steps after which a row is truncated.
        context: logged transitions before the first imagined one.
        left_padding: how many of them may lie before the episode's start.
        split: of the store, "train", "validation" or "test".
        actions: indices into the 18-action set that the environment's actions 0, 1, ... stand for.
        device: where the model is.

    Raises:
        UserError: a number is out of range, or the split has no episode that is long enough.
    """

    metadata = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(
        self,
        model: WorldModel,
        store: Store,
        num_envs: int,
        horizon: int = 15,
        context: int = 4,
        left_padding: int = 0,
        split: str = "train",
        actions: Sequence[int] = range(len(ACTIONS)),
        device: str = "cpu",
    ) -> None:
        if num_envs < 1 or horizon < 1 or context < 1 or not 0 <= left_padding <= context:
            raise UserError(
                f"num_envs={num_envs}, horizon={horizon} and context={context} must be at least 1, and "
                f"left_padding={left_padding} from 0 to context"
            )
        self.model, self.store, self.horizon, self.context, self.device = model, store, horizon, context, device
        self.num_envs, self._actions = num_envs, torch.as_tensor(list(actions), device=device)
        self._first = context - left_padding  # the earliest frame that a row may begin at
        self._episodes = np.sort(store.splits[split])
        counts = (store.lengths[self._episodes] - self._first).clip(min=0)  # up to the frame before the last action
        self._ends = counts.cumsum()
        if not counts.sum():
            raise UserError(
                f"no episode of the {split} split has more than {self._first} transitions before a start; "
                "give a smaller context or a larger left_padding"
            )
        obs = store.card["obs"]
        self._shape = (obs["channels"], obs["height"], obs["width"])
        self.single_observation_space = gymnasium.spaces.Box(0, 255, self._shape, np.uint8)
        self.single_action_space = gymnasium.spaces.Discrete(len(self._actions))
        self.observation_space = gymnasium.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gymnasium.vector.utils.batch_space(self.single_action_space, num_envs)
        self._generator = torch.Generator(device)
        self._state: State | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """Begin all rows anew: frames (N, C, H, W) uint8 and an empty info."""
        unseeded = self._state is None and seed is None
        super().reset(seed=seed, options=options)
        if seed is not None or unseeded:
            self._generator.manual_seed(int(self.np_random.integers(2**31)) if seed is None else seed)
        start = self._starts(self.num_envs)
        self._state, self._frame = self.model.start(start), start.obs[:, -1]
        self._elapsed = torch.zeros(self.num_envs, dtype=torch.long, device=self.device)
        return self._frame.cpu().numpy().copy(), {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Imagine one transition in each row.

        Args:
            actions: (N,) int64, places in `actions` of the constructor.

        Returns:
            Frames (N, C, H, W) uint8, rewards (N,) float64, terminated and truncated (N,) bool, and the info.

        Raises:
            UserError: the model gives no frames.
        """
        if self._state is None:
            raise gymnasium.error.ResetNeeded("call reset() before step()")
        action = self._actions[torch.as_tensor(np.asarray(actions), device=self.device).long()]
        with torch.no_grad():
            self._state, step = self.model.step(self._state, action, self._generator)
        self._elapsed += 1
        self._frame = step.seen()
        truncated = (step.truncated | (self._elapsed >= self.horizon)) & ~step.terminated
        info: dict[str, Any] = {}
        if (over := step.terminated | truncated).any():
            info = {"final_obs": self._frame.cpu().numpy().copy(), "_final_obs": over.cpu().numpy()}
            rows = over.nonzero()[:, 0]
            start = self._starts(len(rows))
            fresh = self.model.start(start)
            self._state = {k: v.index_copy(0, rows, fresh[k]) for k, v in self._state.items()}
            self._frame = self._frame.index_copy(0, rows, start.obs[:, -1])
            self._elapsed[rows] = 0
        reward, terminated, cut = (c.cpu().numpy() for c in (step.reward.double(), step.terminated, truncated))
        return self._frame.cpu().numpy().copy(), reward, terminated, cut, info

    def _starts(self, count: int) -> Segment:
        """Context of `count` rows, that ends with a frame drawn from all frames of the split."""
        drawn = torch.randint(int(self._ends[-1]), (count,), generator=self._generator, device=self.device)
        place = drawn.cpu().numpy()
        which = np.searchsorted(self._ends, place, side="right")
        frame = place - np.concatenate([[0], self._ends])[which] + self._first
        return self.store.read(np.stack([self._episodes[which], frame - self.context], 1), self.context).to(self.device)
