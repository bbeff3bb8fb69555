"""A model that learns one more game, or more actions, knows what it knew as it was, and begins the new from there."""

from functools import partial
from typing import Any

import pytest
import torch

from tests.conformance import generator, random_segment
from tests.unit.test_adapting import settings
from tests.unit.test_muzero import SWITCHES, muzero, spread
from tests.unit.test_muzero_games import SEGMENT, knowing, of
from worldmodels.config import build
from worldmodels.learners.adapting import fit_games
from worldmodels.models.growing import regrown

PONG = {"model": {"symmetry": "none"}, "card": {"game": "pong"}, "actions": [0, 3, 4]}


def said(model: Any, game: str) -> list[float]:
    """Losses of frames, rewards and ends, and how each window is known, of play that calls itself by this name."""
    _, metrics = model.loss(of(random_segment(3, 8, 3, 20), game, game, game), generator(1))
    return [value for metric in metrics.values() for value in metric.flatten().tolist()]


def test_a_world_model_is_told_a_new_game_by_name() -> None:
    given = {"model": settings() | {"games": {"unknown": 0.2, "actions": {"breakout": [0, 3, 4], "pong": [0, 3, 4]}}}}
    old = build(given["model"]).eval()
    torch.manual_seed(0)
    for parameter in old.parameters():  # what begins at zero would hide what games differ in
        torch.nn.init.normal_(parameter, std=0.1)
    after = fit_games(given, {"freeway": [0, 2, 3, 4, 5], "pong": [0]})
    names = {"breakout": [0, 3, 4], "pong": [0, 3, 4], "freeway": [0, 2, 3, 4, 5]}
    assert after["model"]["games"] == {"unknown": 0.2, "actions": names} and given["model"]["games"]["actions"] != names
    new = build(after["model"]).eval()
    new.load_state_dict(regrown(old.state_dict(), given, after))
    for game in ("breakout", "pong", "tennis", "freeway"):  # the last of which begins as unknown ones are
        assert said(new, game) == said(old, game)
    assert len({tuple(said(old, game)) for game in ("breakout", "pong", "freeway")}) == 3
    assert said(old, "freeway") == said(old, "tennis") and new.games.row("freeway") == 2
    with torch.no_grad():
        new.reward_model.game.weight[2] += 1
    assert said(new, "freeway") != said(old, "freeway") and said(new, "tennis") == said(old, "tennis")
    assert torch.equal(new.reward_model.game.weight[[0, 1, 3]], old.reward_model.game.weight)
    assert fit_games({"model": settings()}, {"freeway": [0]}) == {"model": settings()}, "it is told no games"


def test_a_muzero_is_told_a_new_game_by_name() -> None:
    old = knowing().eval()
    given = {
        "model": {"games": {"unknown": 0.1}, "symmetry": "none"},
        "actions": {"breakout": [0, 1], "pong": [0, 3, 4]},
    }
    after = fit_games(given, {"boxing": [0, 2]})
    assert after["actions"] == given["actions"] | {"boxing": [0, 2]} and after["model"] == given["model"]
    new = muzero("model.games={unknown: 0.1}", actions=after["actions"]).eval()
    new.load_state_dict(regrown(old.state_dict(), given, after))
    assert torch.equal(new.game.weight, old.game.weight[[0, 0, 1, 2]])
    for names in (("pong", "breakout", "pong"), ("tennis", "pong", "tennis")):
        roots = [model.roots(model.start(of(SEGMENT, *names))) for model in (old, new)]
        assert all(torch.equal(a, b) for a, b in zip(*roots, strict=True))
    state = new.start(of(SEGMENT, "boxing", "boxing", "boxing"))
    assert torch.equal(state["latent"], old.start(of(SEGMENT, *["boxing"] * 3))["latent"])
    assert new.roots(state)[0].isfinite().sum(1).tolist() == [2, 2, 2]


@pytest.mark.parametrize("overrides", [(), ("model.symmetry=flip_lr",), SWITCHES["value_prefix"]], ids=str)
def test_a_muzero_of_one_game_gets_the_actions_of_another(overrides: tuple[str, ...]) -> None:
    """By the vocabulary: what it says of its own game is as it was, in the root and in the nodes of a search."""
    old = spread(muzero(*overrides, actions=PONG["actions"])).eval()
    given = PONG | {"model": {"symmetry": "flip_lr" if "flip_lr" in str(overrides) else "none"}}
    after = fit_games(given, {"freeway": [0, 2, 5]})
    assert after["actions"] == {"pong": [0, 3, 4], "freeway": [0, 2, 5]}
    new = muzero(*overrides, actions=after["actions"]).eval()
    new.load_state_dict(regrown(old.state_dict(), given, after))
    pong = of(SEGMENT, "pong", "pong", "pong")

    state, wide = old.start(pong), new.start(pong)
    for action in (None, 0, 3, 4):
        if action is not None:
            place = torch.full((3,), old.actions.index(action)), torch.full((3,), action)
            (one, state), (other, wide) = old.recurrent(state, place[0]), new.recurrent(wide, place[1])
            torch.testing.assert_close([one.reward, one.discount], [other.reward, other.discount])
        (logits, value), (more, same) = old.roots(state), new.roots(wide)
        torch.testing.assert_close([logits, value], [more[:, old.actions], same])
        assert more.isfinite().sum() == logits.numel()
    logits = new.logits(new.start(pong)["latent"])
    torch.testing.assert_close(logits[:, 2], logits[:, 0])  # what is new begins as NOOP
    assert not torch.allclose(logits[:, 3], logits[:, 0])
    latent = new.start(pong)["latent"]
    assert torch.equal(new.move(latent, torch.full((3,), 5)), new.move(latent, torch.zeros(3, dtype=torch.long)))


def test_what_it_can_do_already_changes_nothing() -> None:
    assert fit_games(PONG, {"pong": [0, 3]}) == PONG
    assert fit_games(PONG, {"pong": [0, 5]})["actions"] == {"pong": [0, 3, 4, 5]}
    assert fit_games(PONG, {"boxing": [0, 3]})["actions"] == {"pong": [0, 3, 4], "boxing": [0, 3]}


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("games", [(), ("model.games={unknown: 0.1}", "model.symmetry=flip_lr")], ids=["one", "some"])
def test_stages_of_a_muzero_hold_every_weight_once(switch: str, games: tuple[str, ...]) -> None:
    actions = {"pong": [0, 3, 4]} if games else [0, 3, 4]
    model = partial(muzero, *SWITCHES[switch], *games)(actions=actions)
    found = [id(p) for parts in model.stages().values() for stage in parts for part in stage for p in part.parameters()]
    assert sorted(found) == sorted(map(id, model.parameters()))
    assert list(model.stages()) == list(model.components())
