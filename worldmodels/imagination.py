"""Rollouts inside a world model, under any policy."""

from collections.abc import Sequence

import torch
from torch import Tensor

from worldmodels.types import Policy, Segment, State, UserError, WorldModel

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
        apart, `life_loss` and `life_loss_mean` are beside them. mask is false after an imagined
        termination: the model goes on there, but the episode is over.
    """
    state, memory = model.start(start), policy.start(start.batch_size)
    frame = start.obs[:, -1]
    frames, actions, steps = [frame], [], []
    for _ in range(horizon):
        action, memory = policy.act(frame, memory, generator)
        state, step = model.step(state, action, generator)
        assert step.frame is not None, "imagine() shows frames; this model has none"
        frame = step.frame
        frames.append(frame)
        actions.append(action)
        steps.append(step)

    def column(name: str) -> Tensor:
        return torch.stack([getattr(step, name) for step in steps], dim=1)

    terminated = column("terminated")
    alive = torch.ones_like(terminated)
    alive[:, 1:] = ~terminated[:, :-1].cummax(dim=1).values
    return Segment(
        obs=torch.stack(frames, dim=1),
        action=torch.stack(actions, dim=1),
        reward=column("reward"),
        terminated=terminated,
        truncated=column("truncated"),
        mask=alive,
        next_mask=alive,
        side={name: column(name) for name in SIDE if getattr(steps[0], name) is not None},
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
