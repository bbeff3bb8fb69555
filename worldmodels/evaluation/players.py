"""Policies that nobody has to train, to hold scores against: sticky random play, and a script that watches the ball."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from worldmodels.evaluation.objects import find_objects
from worldmodels.imagination import RandomPolicy
from worldmodels.types import ACTIONS, Policy, State, UserError


class StickyPolicy(RandomPolicy):
    """A random action that is held for a random number of steps.

    Args:
        actions: indices into the 18-action set.
        hold: steps on average.
    """

    def __init__(self, actions: Sequence[int], hold: float = 6.0) -> None:
        super().__init__(actions)
        self.hold = hold

    def start(self, n: int) -> State:
        """No action yet."""
        return {"action": torch.full((n,), -1)}

    def act(self, observation: Tensor, state: State, generator: torch.Generator | None = None) -> tuple[Tensor, State]:
        """The held actions (B,) int64, some of them drawn anew."""
        fresh, _ = super().act(observation, state, generator)
        held = state["action"].to(fresh.device)
        changes = torch.rand(len(fresh), generator=generator, device=fresh.device) < 1 / self.hold
        action = torch.where(changes | (held < 0), fresh, held)
        return action, {"action": action}


class Track(NamedTuple):
    """Where a scripted player looks, in pixels of 64x64 frames, and what it presses."""

    along: int  # axis of the paddle: 0 row, 1 column
    line: float  # where the ball meets the paddle, on the other axis
    walls: tuple[float, float]  # between which the ball's centre moves along the paddle's axis
    coast: float  # how far the paddle runs on in the step after a press
    dead: float  # error below which nothing is pressed
    edge: float  # distance from the paddle's middle at which the ball is met: a steep return is hard to reach
    presses: tuple[int, int]  # actions that lower and raise the paddle's position


TRACKS = {
    "pong": Track(0, 56.0, (10.9, 58.6), coast=4.3, dead=2.4, edge=1.8, presses=(11, 12)),
    "breakout": Track(1, 57.6, (3.4, 60.4), coast=4.0, dead=2.4, edge=1.0, presses=(4, 3)),
}
NOOP, FIRE = 0, 1


class ScriptedPolicy:
    """Finds ball and paddle in 64x64 RGB frames and moves the paddle to where the ball will arrive.

    Args:
        game: "pong" or "breakout".

    Raises:
        UserError: another game.
    """

    def __init__(self, game: str) -> None:
        if game not in TRACKS:
            raise UserError(f"there is no scripted player of {game}: choose policy=random or sticky, or {set(TRACKS)}")
        self.game, self.track = game, TRACKS[game]
        self.actions = torch.tensor([NOOP, FIRE, *self.track.presses])

    def start(self, n: int) -> State:
        """Nothing seen and nothing pressed."""
        return {"ball": torch.full((n, 2), torch.nan), "pressed": torch.zeros(n), "aim": torch.zeros(n)}

    def act(self, observation: Tensor, state: State, generator: torch.Generator | None = None) -> tuple[Tensor, State]:
        """Actions (B,) int64 for frames (B, 3, 64, 64) uint8.

        Raises:
            UserError: other frames.
        """
        found, device = find_objects(observation, self.game), observation.device
        if not found:
            raise UserError("the scripted player needs frames of size=64 colour=rgb")
        t, ball, paddle = self.track, found["ball"], found["paddle"][:, self.track.along]
        state = {k: v.cpu() for k, v in state.items()}
        (low, high), across = t.walls, 1 - t.along
        velocity = (ball - state["ball"]).nan_to_num(0)
        coming = (velocity[:, across] > 0.1) & (velocity[:, across] < 12)  # a larger step is a new ball
        steps = (t.line - ball[:, across]).clamp(min=0) / velocity[:, across].clamp(min=0.1)
        arrival = (ball[:, t.along] + velocity[:, t.along] * steps - low) % (2 * (high - low))
        arrival = low + torch.minimum(arrival, 2 * (high - low) - arrival)  # reflected at the walls
        target = torch.where(coming, arrival, ball[:, t.along])
        drawn = torch.rand(2, len(ball), generator=generator, device=device).cpu()
        aim = torch.where(coming, state["aim"], t.edge * (drawn[0] * 2 - 1).sign())  # drawn anew after each return
        error = target + aim - (paddle + t.coast * state["pressed"])
        pressed = torch.where(error.abs() < t.dead, 0.0, error.sign()).nan_to_num(0)
        moves = torch.tensor([t.presses[0], NOOP, t.presses[1]])[pressed.long() + 1]
        serve = torch.where(drawn[1] < 0.2, FIRE, NOOP)
        lost = ball.isnan().any(1) & state["ball"].isnan().any(1)
        action = torch.where(lost, serve, moves)
        return action.to(device), {"ball": ball, "pressed": pressed, "aim": aim}


def built_in(name: str, game: str, actions: Sequence[int]) -> Policy:
    """The policy "random", "sticky" or "scripted" for a game with these actions, or a held action such as "up".

    A held action is the least that a score is to be compared with (Bellemare et al. 2013, "Const").

    Raises:
        UserError: an unknown name, or no script for the game.
    """
    made = {"random": RandomPolicy, "sticky": StickyPolicy}
    if name == "scripted":
        return ScriptedPolicy(game)
    if held := [k for k, action in enumerate(ACTIONS) if action == name.upper()]:
        return RandomPolicy(held)
    if name not in made:
        raise UserError(
            f"policy={name} is unknown; choose random, sticky, scripted or an action such as up, or give a "
            "checkpoint=..."
        )
    return made[name](actions)
