"""Several games in one diffusion model: told apart by name, with actions of their own."""

from dataclasses import replace

import pytest
import torch

from tests import conformance
from tests.unit.test_diffusion import micro
from worldmodels.imagination import LoggedActions, RandomPolicy, imagine
from worldmodels.learners.means import GameMeans, over_games
from worldmodels.models.diffusion import DiffusionWorldModel
from worldmodels.nn.games import Games
from worldmodels.types import Segment, UserError, game_key

ACTIONS = {"pong": [0, 3, 4], "breakout": [0, 1]}


def of(segment: Segment, *names: str) -> Segment:
    """The segment, its rows of these games, with actions that both have."""
    key = torch.tensor([game_key(name) for name in names])
    return replace(segment, action=torch.zeros_like(segment.action), side=segment.side | {"game": key})


def knowing(**overrides) -> DiffusionWorldModel:
    """A model that knows two games, with weights by which every input shows in every output."""
    model = micro(games={"actions": ACTIONS}, **overrides)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


SEGMENT = of(conformance.random_segment(3, 6, 3, 16), "pong", "breakout", "pong")


def dream(model: DiffusionWorldModel, segment: Segment) -> tuple[torch.Tensor, torch.Tensor]:
    _, step = model.step(model.start(segment), segment.action[:, -1], conformance.generator())
    assert step.frame is not None
    return step.frame, step.reward_mean


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"denoiser": {"few_step": {"doublings": 1}}, "sampler": {"start": "sigma", "steps": 1}},
        {"denoiser": {"memory": {"cells": 4, "hidden": 8, "order": 2, "window": 4}}},
    ],
    ids=["plain", "few_step", "memory"],
)
def test_conformance(overrides: dict) -> None:
    conformance.check_world_model(lambda: knowing(**overrides), SEGMENT)


def test_a_game_is_known_by_its_name_and_not_by_its_place() -> None:
    there, back = (Games(actions) for actions in (ACTIONS, dict(reversed(ACTIONS.items()))))
    assert there.names == back.names == ["breakout", "pong"] and len(there) == 3
    assert there.rows(SEGMENT).tolist() == back.rows(SEGMENT).tolist() == [2, 1, 2]
    assert torch.equal(there.legal, back.legal) and there.legal[0].all()
    assert there.legal[2].nonzero()[:, 0].tolist() == [0, 3, 4]
    assert there.rows(of(SEGMENT, "pong", "tennis", "breakout")).tolist() == [2, 0, 1]
    assert there.rows(replace(SEGMENT, side={})).tolist() == [0, 0, 0], "nobody says which"
    assert [there.row(name) for name in ("breakout", "pong", "tennis")] == [1, 2, 0]


def test_both_parts_of_the_model_are_told_the_game() -> None:
    torch.manual_seed(0)
    model = knowing()
    frame, reward = dream(model, SEGMENT)
    other_frame, other_reward = dream(model, of(SEGMENT, "pong", "pong", "pong"))
    assert torch.equal(frame[0], other_frame[0]) and torch.equal(reward[2], other_reward[2])
    assert not torch.equal(frame[1], other_frame[1]) and reward[1] != other_reward[1]
    losses = [model.eval().loss(s, conformance.generator())[0] for s in (SEGMENT, of(SEGMENT, "pong", "pong", "pong"))]
    assert losses[0] != losses[1]


def test_a_game_is_now_and_then_withheld_in_training_alone() -> None:
    games, segment = Games(ACTIONS, unknown=0.25), of(conformance.random_segment(4000, 1, 1, 1), *["pong"] * 4000)
    told = games.rows(games.withheld(segment, conformance.generator()))
    assert set(told.tolist()) == {0, 2} and 0.22 < (told == 0).float().mean() < 0.28
    assert torch.equal(told, games.rows(games.withheld(segment, conformance.generator())))
    assert set(games.rows(games.eval().withheld(segment, conformance.generator())).tolist()) == {2}
    model = micro(games={"actions": ACTIONS, "unknown": 0.9})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.loss(SEGMENT, conformance.generator())[0].backward()
    assert model.denoiser.network.labels["game"].weight.grad[0].abs().sum() > 0, "the row of unknown games learns"


def test_points_of_one_game_may_be_a_hundred_times_those_of_another() -> None:
    """The same frames, and a reward that only the game tells."""
    torch.manual_seed(0)
    model = micro(
        games={"actions": ACTIONS, "unknown": 0.0},
        reward_model_settings={"rewards": "two_hot", "life_loss": "apart", "event_weight": 1.0},
    )
    alike = SEGMENT.rows(torch.tensor([0, 0]))
    segment = of(replace(alike, terminated=torch.zeros_like(alike.terminated)), "pong", "breakout")
    segment.reward[0], segment.reward[1] = 1.0, 100.0
    frames, optimizer = segment.obs.float() / 127.5 - 1, torch.optim.AdamW(model.reward_model.parameters(), lr=1e-2)
    assert model.games is not None
    game = model.games.rows(segment)
    for _ in range(100):
        loss, _ = model.reward_model.loss(segment, frames[:, :-1], frames[:, 1:], game)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    chances, _, _ = model.reward_model.predict(frames[:, :-1], frames[:, 1:], segment.action, None, game)
    torch.testing.assert_close(chances @ model.reward_model.bins, segment.reward, atol=3.0, rtol=0.0)


def test_without_the_setting_nothing_changes() -> None:
    torch.manual_seed(0)
    plain, segment = micro(), replace(SEGMENT, side={})
    torch.manual_seed(0)
    told = micro(games=None)
    assert not [name for name in plain.state_dict() if "game" in name]
    assert plain.loss(segment, conformance.generator())[0] == told.loss(SEGMENT, conformance.generator())[0]
    assert "game" not in plain.start(SEGMENT)


def test_actions_that_a_game_does_not_have_are_refused() -> None:
    model = knowing()
    state = model.start(SEGMENT)
    model.step(state, torch.tensor([4, 1, 3]), conformance.generator())
    with pytest.raises(UserError, match="^LEFT is no action of breakout, which has NOOP, FIRE$"):
        model.step(state, torch.tensor([4, 4, 3]), conformance.generator())
    imagine(model, RandomPolicy([0]), SEGMENT, 2, conformance.generator())
    anything = model.start(of(SEGMENT, "tennis", "tennis", "tennis"))
    model.step(anything, torch.tensor([17, 4, 3]), conformance.generator())


def test_the_game_goes_with_a_dream() -> None:
    model = knowing()
    first = imagine(model, LoggedActions(SEGMENT.action[:, :2]), SEGMENT, 2, conformance.generator())
    assert torch.equal(first.side["game"], SEGMENT.side["game"])
    state = model.start(first)
    state, _ = model.step(state, torch.zeros(3, dtype=torch.long), conformance.generator())
    assert state["game"].tolist() == [2, 1, 2]
    assert first.steps(0, 1).side["game"].shape == first.rows(slice(0, 3)).side["game"].shape == (3,)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, "names no game"),
        ({"actions": {"pong": [18]}}, r"the actions of pong are \[18\]"),
        ({"actions": {"pong": []}}, r"the actions of pong are \[\]"),
        ({"actions": {"pong": 3}}, "the actions of pong are 3"),
        ({"actions": {"pong": "03"}}, "the actions of pong are 03"),
        ({"actions": [0, 3]}, "names no game"),
        ({"actions": ACTIONS, "unknown": 1}, "unknown=1 must be a share"),
    ],
)
def test_bad_settings(settings: dict, told: str) -> None:
    assert Games({"pong": range(18)}).legal.all()
    with pytest.raises(UserError, match=told):
        micro(games=settings)


def test_a_game_that_validation_does_not_see_is_left_out() -> None:
    """As the games that are replayed: their figures would be no numbers, which JSON does not know."""
    means = GameMeans(["pong", "breakout", "tennis"])
    means.add("pong", "loss", torch.tensor([1.0]))
    means.add("tennis", "loss", torch.tensor([3.0]))
    told = over_games(means.finish())
    assert told == {"pong/loss": 1.0, "tennis/loss": 3.0, "loss": 2.0}
