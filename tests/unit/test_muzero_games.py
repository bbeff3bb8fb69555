"""One MuZero of several games: its search, its loss and its dreams keep to the actions that a game has."""

from dataclasses import replace

import pytest
import torch

from tests.conformance import check_policy, check_world_model, generator, random_segment
from tests.unit.test_muzero import muzero, spread
from worldmodels.learners.acting import Eyes, as_policy
from worldmodels.models.muzero import MuZero
from worldmodels.models.muzero_context import contexts
from worldmodels.models.muzero_loss import POLICY, POLICY_KNOWN, VALUE, VALUE_KNOWN, Targets
from worldmodels.planning.planners import gumbel, one_step, prior, puct, sampled
from worldmodels.planning.tree import Root
from worldmodels.types import Segment, UserError, game_key

ACTIONS = {"pong": [0, 3, 4], "breakout": [0, 1]}


def of(segment: Segment, *names: str) -> Segment:
    key = torch.tensor([game_key(name) for name in names])
    return replace(segment, action=torch.zeros_like(segment.action), side=segment.side | {"game": key})


SEGMENT = of(random_segment(3, 16, 3, 20), "pong", "breakout", "pong")
MASK = torch.zeros(3, 18, dtype=torch.bool)
for row, name in enumerate(("pong", "breakout", "pong")):
    MASK[row, ACTIONS[name]] = True


def knowing(*overrides: str) -> MuZero:
    model = spread(muzero("model.games={unknown: 0.1}", *overrides, actions=ACTIONS))
    assert model.game is not None
    torch.nn.init.normal_(model.game.weight)
    return model


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("model.recurrent=true",),
        ("model.consistency={width:16,hidden:8}", "model.value_prefix={lstm:8,horizon:2}"),
        ("model.symmetry=flip_lr",),
    ],
    ids=["plain", "recurrent", "efficient", "symmetric"],
)
def test_conformance(overrides: tuple[str, ...]) -> None:
    check_world_model(lambda: knowing("model.intensity=0.1", *overrides), SEGMENT)


def test_a_latent_image_is_told_its_game_by_name() -> None:
    model = knowing()
    state, other = model.start(SEGMENT), model.start(of(SEGMENT, "pong", "pong", "tennis"))
    assert state["game"].tolist() == [2, 1, 2] and other["game"].tolist() == [2, 2, 0]
    assert torch.equal(state["latent"][0], other["latent"][0])
    assert not torch.equal(state["latent"][1], other["latent"][1])
    backwards = spread(muzero("model.games={unknown: 0.1}", actions=dict(reversed(ACTIONS.items()))))
    assert backwards.start(SEGMENT)["game"].tolist() == [2, 1, 2]
    blind = muzero(actions=ACTIONS)
    assert blind.game is None and "game.weight" not in blind.state_dict()


@pytest.mark.parametrize("search", [gumbel, puct, sampled], ids=["gumbel", "puct", "sampled"])
@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_no_search_looks_at_what_a_game_does_not_have(search, backend: str) -> None:
    model = knowing()
    state = model.start(SEGMENT)
    found = search(num_simulations=12, backend=backend)(
        model.recurrent, Root(*model.roots(state), state), generator=generator()
    )
    assert found.action_weights[~MASK].abs().max() == 0 and found.visits[~MASK].max() == 0
    assert MASK.gather(1, found.action[:, None]).all()
    for row in range(3):  # at every node, and not at the root alone
        assert set(found.tree.action[row].tolist()) - {-1} <= set(MASK[row].nonzero()[:, 0].tolist())


@pytest.mark.parametrize("search", [one_step, prior], ids=["one_step", "prior"])
def test_nor_does_one_step_or_the_policy_alone(search) -> None:
    model = knowing()
    state = model.start(SEGMENT)
    for seed in range(5):
        found = search()(model.recurrent, Root(*model.roots(state), state), generator=generator(seed))
        assert found.action_weights[~MASK].abs().max() == 0 and MASK.gather(1, found.action[:, None]).all()


def test_the_loss_spends_nothing_on_actions_that_a_game_does_not_have() -> None:
    model = knowing().eval()
    loss, _ = model.loss(SEGMENT, generator())
    bias = model.policy.output.bias
    with torch.no_grad():
        bias[5:] += 7.0  # of no game's actions
    assert model.loss(SEGMENT, generator())[0] == loss
    with torch.no_grad():
        bias[1] += 7.0  # FIRE, of Breakout alone
    changed = model.loss(SEGMENT, generator())[0]
    pong = SEGMENT.rows(torch.tensor([0, 2]))
    assert changed != loss
    before = model.loss(pong, generator())[0]
    with torch.no_grad():
        bias[1] += 7.0
    assert model.loss(pong, generator())[0] == before
    model.train().loss(SEGMENT, generator())[0].backward()
    assert bias.grad is not None and bias.grad[5:].abs().max() == 0 and bias.grad[:2].abs().min() > 0


def test_logged_actions_that_a_game_does_not_have_teach_nothing() -> None:
    model = knowing()
    action = SEGMENT.action.clone()
    action[:, 6] = 3  # RIGHT: no action of Breakout
    targets = Targets.of(model, replace(SEGMENT, action=action))
    first = model.frames - 1
    assert targets.taken[:, 6 - first].tolist() == [True, False, True]
    assert model.places(replace(SEGMENT, action=action))[:, 6].tolist() == [3, -1, 3]


def test_dreams_refuse_them() -> None:
    model = knowing()
    state, step = model.step(model.start(SEGMENT), torch.tensor([4, 1, 3]), generator())
    assert state["game"].tolist() == [2, 1, 2] and step.frame is None
    with pytest.raises(UserError, match="^LEFT is no action of breakout, which has NOOP, FIRE$"):
        model.step(state, torch.tensor([4, 4, 3]), generator())


def test_play_has_the_actions_of_its_game_alone() -> None:
    model = knowing().eval()
    frames = SEGMENT.obs[:, 0]
    settings = {"_target_": "worldmodels.planning.planners.gumbel", "num_simulations": 8}
    for game, mine in ACTIONS.items():
        policy = as_policy(model, settings, noise=True, game=game)
        assert policy.actions == mine
        check_policy(policy, frames)
        taken = {a for seed in range(8) for a in policy.act(frames, policy.start(3), generator(seed))[0].tolist()}
        assert taken <= set(mine) and len(taken) > 1
    # what is played is what was learned: the same root as in a window of the log
    eyes = Eyes(model, "pong")
    root, _ = eyes.see(frames, eyes.begin(3))
    window = of(SEGMENT.steps(0, 1), "pong", "pong", "pong")
    expected = model.roots(model.root(*contexts(model, window, [0])))
    torch.testing.assert_close(root.prior_logits, expected[0][:, ACTIONS["pong"]])
    for other in (None, "tennis"):
        with pytest.raises(UserError, match="plays breakout and pong"):
            as_policy(model, settings, game=other)


def test_values_far_apart_are_surprising_alike() -> None:
    """What decides which windows come again is not the scale of a game's points."""
    model = knowing("head@model.value=two_hot", "model.value={low: -9e4, high: 9e4, bins: 601, transform: h}").eval()
    value = torch.full((3, 16), 1.0)
    value[1] = 10000.0
    known, policy = torch.ones(3, 16, dtype=torch.bool), torch.zeros(3, 16, 18)
    policy[..., 0] = 1
    side = {POLICY: policy, VALUE: value, POLICY_KNOWN: known, VALUE_KNOWN: known}
    segment = replace(SEGMENT, side=SEGMENT.side | side)
    surprise = model.loss(segment, generator())[1]["window_loss"]
    assert surprise.max() < 600, "in the values themselves it would be some 10,000"


def test_points_of_one_game_may_be_a_hundred_times_those_of_another() -> None:
    """The same frames, and rewards and values that only the game tells, of heads that cover both."""
    torch.manual_seed(0)
    wide = "low: -500, high: 500, bins: 51, transform: h"
    heads = ["head@model.reward=two_hot", "head@model.value=two_hot"]
    heads += [f"model.reward={{{wide}}}", f"model.value={{{wide}}}", "model.games={unknown: 0.0}"]
    model = muzero(*heads, actions=ACTIONS)
    alike = SEGMENT.rows(torch.tensor([0, 0]))
    known, policy = torch.ones(2, 16, dtype=torch.bool), torch.zeros(2, 16, 18)
    policy[..., 0] = 1
    points = torch.tensor([[1.0], [100.0]]).expand(2, 16)
    game = of(SEGMENT, "pong", "breakout", "pong").side["game"][:2]
    side = {POLICY: policy, VALUE: 2 * points, POLICY_KNOWN: known, VALUE_KNOWN: known, "game": game}
    segment = replace(alike, reward=points, terminated=torch.zeros(2, 16, dtype=torch.bool), side=side)
    model.search_value, optimizer = 1.0, torch.optim.AdamW(model.parameters(), lr=3e-3)
    for k in range(180):
        loss, _ = model.loss(segment, generator(k))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    state = model.eval().start(segment.steps(0, 3))
    torch.testing.assert_close(model.roots(state)[1], 2 * points[:, 0], atol=4.0, rtol=0.0)
    _, step = model.step(state, torch.zeros(2, dtype=torch.long), generator())
    torch.testing.assert_close(step.reward_mean, points[:, 0], atol=4.0, rtol=0.0)


def test_games_are_those_of_the_actions() -> None:
    with pytest.raises(UserError, match=r"model.games needs the actions of each game by its name"):
        muzero("model.games={unknown: 0.1}", actions=[0, 3])
    with pytest.raises(UserError, match="RIGHT to LEFT, which is not among the 2 actions"):
        muzero("model.symmetry=flip_lr", actions={"pong": [0, 3], "breakout": [0, 1]})
