"""evaluation/players.py: how the untrained policies act, and that the script plays better than chance."""

import pytest
import torch

from worldmodels.evaluation.play import open_games, play
from worldmodels.evaluation.players import ScriptedPolicy, StickyPolicy, built_in
from worldmodels.evaluation.protocols import Rules
from worldmodels.types import UserError

RULES = Rules("short", 4, 0.0, True, 30, 250, "minimal")


def test_a_sticky_action_is_held_for_six_steps_on_average():
    policy, generator = StickyPolicy([3, 4, 11], hold=6), torch.Generator().manual_seed(0)
    state, actions = policy.start(50), []
    for _ in range(400):
        action, state = policy.act(torch.zeros(50, 3, 8, 8, dtype=torch.uint8), state, generator)
        actions.append(action)
    actions = torch.stack(actions)
    assert set(actions.unique().tolist()) == {3, 4, 11}
    changed = (actions[1:] != actions[:-1]).float().mean().item()
    assert changed == pytest.approx(2 / 3 / 6, rel=0.1)  # a third of the draws gives the same action again


@pytest.mark.parametrize(("game", "actions"), [("pong", [0, 1, 3, 4, 11, 12]), ("breakout", [0, 1, 3, 4])])
def test_the_script_earns_more_than_chance(game, actions):
    with open_games(game, RULES, 4, 64, "rgb") as env:
        scores = {
            name: sum(g.score for g in play(built_in(name, game, actions), env, RULES, actions, 4, 0))
            for name in ("random", "scripted")
        }
    assert scores["scripted"] > scores["random"] + 5


def test_the_script_aims_where_the_ball_will_be_reflected_to():
    policy, state = ScriptedPolicy("pong"), ScriptedPolicy("pong").start(1)

    def frame(ball_row, ball_col):
        image = torch.tensor([144, 72, 17], dtype=torch.uint8)[:, None, None].repeat(1, 64, 64)
        image[:, 30:35, 56:58] = torch.tensor([92, 186, 92], dtype=torch.uint8)[:, None, None]
        image[:, ball_row : ball_row + 1, ball_col : ball_col + 1] = 236
        return image[None]

    g = torch.Generator().manual_seed(0)
    _, state = policy.act(frame(30, 20), state, g)
    up, _ = policy.act(frame(28, 23), state, g)  # 2 up every 3 across: at row 6 when it is there, if there were no wall
    assert up.item() == 11  # reflected at 10.9 it arrives at row 15: up, and not to where it is
    _, state = policy.act(frame(36, 44), state, g)
    down, _ = policy.act(frame(40, 47), state, g)
    assert down.item() == 12


@pytest.mark.parametrize("name", ["upfire", "UPFIRE"])
def test_an_action_is_held(name):
    policy = built_in(name, "pong", [0])
    assert policy.act(torch.zeros(3, 3, 64, 64, dtype=torch.uint8), policy.start(3))[0].tolist() == [10, 10, 10]


def test_mistakes():
    with pytest.raises(UserError, match="policy=clever is unknown; choose random, sticky, scripted or an action"):
        built_in("clever", "pong", [0])
    with pytest.raises(UserError, match="no scripted player of seaquest"):
        built_in("scripted", "seaquest", [0])
    with pytest.raises(UserError, match="size=64 colour=rgb"):
        ScriptedPolicy("pong").act(torch.zeros(1, 1, 84, 84, dtype=torch.uint8), ScriptedPolicy("pong").start(1))
