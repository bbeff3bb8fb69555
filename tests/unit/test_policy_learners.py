"""Losses of the policy learners against their closed forms, which rows count, and dreams that end and begin anew."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir

from tests.conformance import generator, random_segment
from tests.conftest import ROOT
from tests.exact_catch import ExactCatch
from tests.unit.test_muzero import SMALL, muzero
from worldmodels.config import plain, sized
from worldmodels.data.datamodule import StoreDataModule
from worldmodels.data.reanalyse import ReanalyseDataModule
from worldmodels.data.sources.catch_play import catch_card
from worldmodels.data.store import Store
from worldmodels.imagination import ImaginationEnv, RandomPolicy, imagine
from worldmodels.learners.actor_critic import ActorCriticLearner
from worldmodels.learners.cloning import GREATEST_WEIGHT, CloningLearner, judge, logged_loss
from worldmodels.learners.muzero import MuZeroLearner
from worldmodels.learners.offline_q import OfflineQLearner
from worldmodels.learners.policy import Apart, load_policy, rows_of
from worldmodels.ops.returns import lambda_returns
from worldmodels.types import Segment, UserError

CARD, ACTIONS = catch_card(0), [0, 3, 4]
ENCODER = {"channels": [8], "pools": [True], "lstm": 16, "patch": 4, "frames": 2, "standardise": True}
MODEL = "worldmodels.models.actor_critic."
MSE = {"_target_": "worldmodels.nn.heads.MSE"}
BINS = {"_target_": "worldmodels.nn.heads.HLGauss", "low": -2.0, "high": 2.0}


def model(kind: str = "ActorCritic", head: dict[str, Any] = MSE) -> dict[str, Any]:
    return {"_target_": MODEL + kind, "encoder": ENCODER, "head": head}


def play(batch: int = 4, length: int = 6) -> Segment:
    """Random play with allowed actions, padding at the start of row 0, and an end in the middle of row 1."""
    segment = random_segment(batch, length, 3, 20)
    action = torch.tensor(ACTIONS)[segment.action % 3]
    mask, ended = segment.mask.clone(), torch.zeros_like(segment.terminated)
    mask[0, :2] = False
    ended[1, 3], mask[1, 4:] = True, False
    next_mask = mask.clone()
    next_mask[1, 3] = False  # the log holds nothing after the end
    next_mask[2, 5] = False  # nor after this cut
    action[~mask] = 0
    return replace(segment, action=action, mask=mask, next_mask=next_mask, terminated=ended)


def test_rows_that_teach_a_value() -> None:
    rows = rows_of(play())
    assert rows.usable.tolist()[0] == [False, False, True, True, True, True]
    assert rows.usable.tolist()[1] == [True, True, True, True, False, False]
    assert rows.usable.tolist()[2] == [True] * 5 + [False]
    assert rows.stop.tolist()[1] == [False, False, False, True, True, True]
    assert rows.stop.tolist()[2] == [False, False, False, False, True, True]
    assert rows.stop.tolist()[3] == [False] * 5 + [True]


def scrambled(learner: Any) -> Any:
    """The learner with weights that are not zero anywhere."""
    torch.manual_seed(0)
    for p in learner.model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return learner


def test_cloning_is_the_mean_log_likelihood_of_the_rows_that_count() -> None:
    segment, learner = play(), scrambled(CloningLearner(model(), CARD, ACTIONS, value_weight=0.0, burn_in=1))
    features = learner.model.watch(segment)
    logits = learner.model.actor(features)[..., ACTIONS]
    expected, count = 0.0, 0
    for b in range(4):
        for t in range(1, 6):
            if segment.mask[b, t]:
                place = ACTIONS.index(int(segment.action[b, t]))
                expected -= logits[b, t].log_softmax(-1)[place].item()
                count += 1
    loss, metrics = logged_loss(learner, segment)
    assert loss.item() == pytest.approx(expected / count, rel=1e-5)
    assert metrics["loss_cloning"] == loss


@pytest.mark.parametrize("kind", ["cloning", "advantage", "q"])
def test_logged_actions_that_may_not_be_taken_teach_no_action(kind: str) -> None:
    """`learner.actions` may be fewer than the log's: what else was done there is passed over."""
    segment = play()
    if kind == "q":
        learner: Any = scrambled(OfflineQLearner(model("ActionValues"), CARD, [0, 3], burn_in=0))
        loss, metrics = learner._loss(segment)
        assert metrics["value"].abs() < 1e3
    else:
        settings: dict[str, Any] = {"burn_in": 0, "advantage": 0.5 if kind == "advantage" else None}
        learner = scrambled(CloningLearner(model(), CARD, [0, 3], **settings))
        loss, _ = logged_loss(learner, segment)
        weight = judge(learner, segment).weight
        assert (segment.action == 4).any() and not weight[segment.action == 4].any()
        assert weight[segment.mask & segment.next_mask & (segment.action != 4)].all()
    assert loss.abs() < 1e3, "no log-probability of what cannot be"


def test_rows_count_where_things_went_on_well() -> None:
    clone = scrambled(CloningLearner(model(), CARD, ACTIONS, least_ahead=0.0, burn_in=0))
    segment = play()
    ahead = torch.tensor([[-1.0, -1.0, 0.0, 1.0, -2.0, 0.0]]).expand(4, -1)
    judged = judge(clone, replace(segment, side={"ahead": ahead}))
    assert judged.weight.bool().equal(segment.mask & (ahead >= 0))
    everything = judge(scrambled(CloningLearner(model(), CARD, ACTIONS, burn_in=0)), segment)
    assert judged.usable.equal(everything.usable), "the critic learns from all rows"
    with pytest.raises(UserError, match="learner.least_ahead=few must be a number"):
        CloningLearner(model(), CARD, ACTIONS, least_ahead="few")


def test_the_critic_does_not_change_the_actor() -> None:
    grads = []
    for weight in (0.0, 5.0):
        learner = scrambled(CloningLearner(model(), CARD, ACTIONS, value_weight=weight))
        logged_loss(learner, play())[0].backward()
        grads.append([p.grad for n, p in learner.model.named_parameters() if "critic" not in n])
        assert bool(learner.model.critic.layer.weight.grad.abs().sum() > 0) == bool(weight)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_rows_count_by_the_exponential_of_their_advantage() -> None:
    segment, settings = play(), {"burn_in": 0, "gamma": 0.9, "lam": 0.8}
    learner = scrambled(CloningLearner(model(), CARD, ACTIONS, advantage=0.5, **settings))
    value = learner.model.critic.mean(learner.model.watch(segment))
    rows = rows_of(segment)
    returns = lambda_returns(segment.reward, value[:, 1:], segment.terminated, rows.stop, 0.9, 0.8)
    weight = ((returns - value[:, :-1]) / 0.5).exp().clamp(max=GREATEST_WEIGHT) * rows.usable
    torch.testing.assert_close(judge(learner, segment).weight, weight)
    assert (weight == GREATEST_WEIGHT).any() and ((weight > 0) & (weight < GREATEST_WEIGHT)).any()
    wrong: tuple[Any, ...] = (0, "abc")
    for advantage in wrong:
        with pytest.raises(UserError, match=f"advantage={advantage}"):
            CloningLearner(model(), CARD, ACTIONS, advantage=advantage)


@pytest.mark.parametrize("head", [MSE, BINS], ids=["mse", "hl_gauss"])
def test_q_learning_is_the_head_towards_the_double_n_step_target(head: dict[str, Any]) -> None:
    segment, settings = play(), {"burn_in": 0, "gamma": 0.9, "conservative": 0.3, "steps_ahead": 3}
    learner = scrambled(OfflineQLearner(model("ActionValues", head), CARD, ACTIONS, **settings))
    other = scrambled(OfflineQLearner(model("ActionValues", head), CARD, ACTIONS, **settings))
    for p in other.model.parameters():
        p.data.mul_(1.3)
    learner.target = Apart(other.model)
    q, frozen = (m.values.mean(m.watch(segment)) for m in (learner.model, other.model))
    rows, targets, excess = rows_of(segment), {}, []
    for b in range(4):
        for t in range(6):
            if not rows.usable[b, t]:
                continue
            total = 0.0
            for k in range(3):
                total += 0.9**k * float(segment.reward[b, t + k].sign())
                if segment.terminated[b, t + k]:
                    break
                if k == 2 or rows.stop[b, t + k]:
                    best = max(ACTIONS, key=lambda a: float(q[b, t + k + 1, a]))
                    total += 0.9 ** (k + 1) * float(frozen[b, t + k + 1, best])
                    break
            targets[b, t] = total
            excess.append(float(q[b, t, ACTIONS].logsumexp(0) - q[b, t, segment.action[b, t]]))
    features, (b, t) = learner.model.watch(segment), zip(*targets, strict=True)
    goal = torch.tensor(list(targets.values()))
    error = learner.model.values.loss(features[b, t], goal, segment.action[b, t]).mean()
    loss, metrics = learner._loss(segment)
    assert metrics["loss_values"].item() == pytest.approx(error.item(), rel=1e-4)
    assert metrics["conservative"].item() == pytest.approx(sum(excess) / len(excess), rel=1e-4)
    assert loss.item() == pytest.approx((metrics["loss_values"] + 0.3 * metrics["conservative"]).item())
    loss.backward()
    assert all(p.grad is None for p in other.model.parameters())


@pytest.mark.parametrize("kind", ["MuZero", "offline Q"])
def test_the_target_network_is_renewed_every_so_many_steps(kind: str, catch_store: Path) -> None:
    """It equals the model where steps 0, 3 and 6 learn, and nowhere between."""
    settings, store = {"target_every": 3, "warmup": 1, "lr": 1e-3, "schedule": "constant"}, str(catch_store)
    if kind == "MuZero":
        with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
            short = ["model.frames=2", "model.unroll=2", "model.td_steps=1"]
            small = plain(sized(compose("train", ["model=muzero", *SMALL, *short]).model))
        learner: Any = MuZeroLearner(small, CARD, ACTIONS, row_noise=False, **settings)
        data: Any = ReanalyseDataModule(store, batch_size=4, length=5, left_padding=1, right_padding=4)
    else:
        learner = OfflineQLearner(model("ActionValues"), CARD, ACTIONS, burn_in=0, **settings)
        data = StoreDataModule(store, batch_size=4, length=4)
    equal: list[int] = []

    class Watching(L.Callback):
        def on_before_backward(self, trainer: L.Trainer, learner: Any, loss: torch.Tensor) -> None:
            pairs = zip(learner.model.parameters(), learner.target.module.parameters(), strict=True)
            if all(torch.equal(own, other) for own, other in pairs):
                equal.append(trainer.global_step)

    trainer = L.Trainer(
        max_steps=7, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0, callbacks=[Watching()],
    )  # fmt: skip
    trainer.fit(learner, data)
    assert (trainer.global_step, equal) == (7, [0, 3, 6])


def test_settings_out_of_range() -> None:
    for wrong in ({"steps_ahead": 0}, {"target_every": 0}, {"conservative": -1.0}):
        with pytest.raises(UserError, match="learner.steps_ahead"):
            OfflineQLearner(model("ActionValues"), CARD, ACTIONS, **wrong)
    for wrong in ({"horizon": 0}, {"reuse": 0}, {"left_out": 0}, {"spare": 1.0}):
        with pytest.raises(UserError, match="learner.horizon"):
            ActorCriticLearner(model(), CARD, ACTIONS, "none.ckpt", **wrong)
    for learner, kind in ((CloningLearner, "ActorCritic"), (OfflineQLearner, "ActionValues")):
        for wrong in ({"schedule": "step"}, {"gamma": 2}, {"life_loss_ends": 1}):
            with pytest.raises(UserError, match=rf"learner.{next(iter(wrong))}="):
                learner(model(kind), CARD, ACTIONS, **wrong)
    with pytest.raises(UserError, match="learner.normalise=no must be true or false"):
        ActorCriticLearner(model(), CARD, ACTIONS, normalise="no")  # pyrefly: ignore
    for wrong in ({"gamma": -0.1}, {"lam": 1.5}, {"advantage": 0}, {"advantage": "much"}):
        for learner in (CloningLearner, ActorCriticLearner):
            with pytest.raises(UserError, match=rf"learner.{next(iter(wrong))}="):
                learner(model(), CARD, ACTIONS, **wrong)


@pytest.mark.parametrize("ends", [True, False])
def test_a_lost_life_ends_a_logged_return_where_it_is_to(ends: bool) -> None:
    """What comes after a lost life changes the values before it only where lives do not end returns."""
    drawn, never = random_segment(1, 6, 3, 20), torch.zeros(1, 6, dtype=torch.bool)
    row = torch.arange(6)[None]
    action = torch.where(row < 3, 0, 2)  # Q-learning looks at the first three alone: the others may not be taken
    segments = [
        replace(drawn, action=action, reward=value * (row == 4), terminated=never, mask=~never, next_mask=~never,
                side={"life_loss": row == 2})
        for value in (0.0, 1.0)
    ]  # fmt: skip
    clone = scrambled(CloningLearner(model(), CARD, ACTIONS, life_loss_ends=ends, burn_in=0))
    errors = [judge(clone, segment).error for segment in segments]
    assert (errors[0] != errors[1]).tolist() == [[not ends, not ends, not ends, True, True, False]]
    values = scrambled(OfflineQLearner(model("ActionValues"), CARD, ACTIONS, life_loss_ends=ends, burn_in=0))
    losses = [values._loss(segment)[1]["loss_values"].item() for segment in segments]
    assert (losses[0] == losses[1]) == ends


@pytest.fixture
def dreamer(catch_store):
    """An actor-critic in the exact game, and windows of the log whose last rows are real."""

    def make(truncate_row: int | None = None, **settings: Any) -> tuple[ActorCriticLearner, Segment]:
        learner = scrambled(ActorCriticLearner(model(), CARD, ACTIONS, "none.ckpt", **settings))
        learner._teacher = Apart(ExactCatch(truncate_row=truncate_row))
        starts = [[episode, start] for episode in range(10) for start in (-4, -3, -2, -1)]
        return learner, Store.open(catch_store).read(starts, 5)

    return make


def test_the_world_model_that_dreams_may_be_compiled_as_well(dreamer: Any) -> None:
    learner, _ = dreamer()
    own, network = learner.networks(), torch.nn.Linear(1, 1)
    learner.teacher.networks = lambda: [network]
    assert own == learner.model.networks() and learner.networks() == [*own, network]


def test_dreams_are_of_the_game_and_rows_that_end_begin_anew(dreamer: Any) -> None:
    learner, segment = dreamer(horizon=9)
    rollout = learner.dream(segment, 30, generator())
    assert {k: v.shape[:2] for k, v in rollout.items() if k in ("stacks", "memory", "fresh")} == {
        k: (10, 10) for k in ("stacks", "memory", "fresh")
    }
    assert rollout["terminated"].any() and (rollout["reward"] != 0).equal(rollout["terminated"])
    # a row begins anew exactly after its end, while there are windows left
    ended = rollout["terminated"] & rollout["alive"]
    anew = rollout["fresh"][:, 1:]
    assert rollout["fresh"][:, 0].all() and not (anew & ~ended).any()
    assert anew.sum() == min(30, int(ended.sum()))
    gone = ~rollout["alive"][:, 1:]
    assert gone.equal((gone | (ended & ~anew)[:, :-1]).cummax(1).values & gone)
    # the frames between are the game's: the ball, in the first column of pixels of its cell, falls a row a step
    ball = (rollout["stacks"][:, :, 3, ::4, ::4] == 236).flatten(2).float().argmax(-1) // 5
    falls = ball[:, 1:] - ball[:, :-1]
    assert (falls[~anew & rollout["alive"]] == 1).all()
    assert torch.equal(learner.dream(segment, 30, generator())["action"], rollout["action"])


def test_a_dream_begins_before_what_is_left_out(dreamer: Any) -> None:
    learner, segment = dreamer(horizon=2)
    segment.mask[7, 2:] = False  # an episode that ends in its window
    for left_out in (1, 3):
        rollout = learner.dream(segment, 0, generator(), left_out)
        assert torch.equal(rollout["stacks"][:, 0, 3:], segment.obs[:, 5 - left_out])
        assert rollout["alive"][:, 0].equal(segment.mask[:, 5 - left_out])
        assert not rollout["alive"][7].any()


def test_training_leaves_out_what_it_is_told_to_and_validation_one(
    dreamer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, segment = dreamer(horizon=2, left_out=3)
    left_out, dream = [], learner.dream
    monkeypatch.setattr(learner, "dream", lambda *given: (left_out.append(given[3:]), dream(*given))[1])
    monkeypatch.setattr(learner, "noise", generator)
    for name in ("batch_number", "log_dict"):
        monkeypatch.setattr(learner, name, lambda *_, **__: 0)
    learner.training_step(segment, 0)
    learner.validation_step(segment, 0)
    assert left_out == [(3,), ()]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"length": 3, "left_padding": 2}, r"data.length=3 must be more than what is left out .*, 3"),
        ({"length": 9, "left_padding": 8}, r"learner.left_out=5 is more than the 4 transitions"),
    ],
)
def test_windows_without_a_start_are_refused(
    dreamer: Any, catch_store: Path, settings: dict[str, int], sentence: str
) -> None:
    learner, _ = dreamer(left_out=5 if settings["length"] > 3 else 3, burn_in=0)
    with pytest.raises(UserError, match=sentence):
        learner.prepare(StoreDataModule(catch_store, batch_size=4, **settings), False)


@pytest.mark.parametrize("ends", [True, False])
def test_a_lost_life_ends_a_dream_where_it_is_to(dreamer: Any, ends: bool) -> None:
    """In a world model that tells it from termination."""
    learner, segment = dreamer(horizon=3, life_loss_ends=ends)
    exact, count = learner._teacher.module.step, []

    def step(*arguments: Any) -> Any:
        state, after = exact(*arguments)
        count.append(0)
        lost = torch.full_like(after.terminated, len(count) == 1)
        return state, after._replace(life_loss=lost, terminated=torch.zeros_like(lost))

    learner._teacher.module.step = step
    rollout = learner.dream(segment, 0, generator())
    assert rollout["terminated"].tolist() == [[ends, False, False]] * 40
    assert (rollout["alive"][:, 1] == (not ends)).all()


def test_a_world_model_without_frames_is_refused(dreamer: Any, catch_store: Path) -> None:
    """In dreams that a policy learns from, in those that are shown, and as an environment."""
    learner, segment = dreamer(horizon=2)
    model, policy = muzero(actions=ACTIONS), RandomPolicy(ACTIONS)
    learner._teacher = Apart(model)
    with pytest.raises(UserError, match=r"gives no frames.*without learner=.*model\.probe"):
        learner.dream(segment, 0, generator())
    with pytest.raises(UserError, match="gives no frames"):
        imagine(model, policy, segment, 1, generator())
    env = ImaginationEnv(model, Store.open(catch_store), 2, left_padding=4, actions=ACTIONS)
    env.reset(seed=0)
    with pytest.raises(UserError, match="gives no frames"):
        env.step(np.zeros(2, int))
    assert imagine(muzero("model.probe={hidden:8}", actions=ACTIONS), policy, segment, 1, generator()).obs.shape[1] == 2


def test_rows_without_a_place_to_begin_anew_count_no_more(dreamer: Any) -> None:
    learner, segment = dreamer(horizon=6)
    rollout = learner.dream(segment, 0, generator())
    before = rollout["terminated"].long().cumsum(1) - rollout["terminated"].long()
    assert rollout["alive"].equal(before == 0)
    late = replace(segment, mask=segment.mask & (torch.arange(40) % 2 == 0)[:, None])
    assert learner.dream(late, 0, generator())["alive"][:, 0].equal(late.mask[:, -1]), "no start behind an end"


def test_the_second_look_at_a_rollout_is_the_first(dreamer: Any) -> None:
    """Features computed at once for the gradient are those of acting step by step, restarts included."""
    learner, segment = dreamer(horizon=7)
    rollout = learner.dream(segment, 30, generator())
    policy = learner.model
    seen = policy.encoder.features(rollout["stacks"], policy.start(10), rollout["fresh"], rollout["memory"])
    carried = ~rollout["fresh"][:, 1:]
    torch.testing.assert_close(seen[:, :-1][carried], rollout["memory"][:, 1:][carried], atol=1e-5, rtol=1e-4)


def test_the_loss_is_diamonds_and_its_gradient_that_of_reinforce(dreamer: Any) -> None:
    settings = {"horizon": 5, "gamma": 0.9, "lam": 0.8, "entropy": 0.01, "value_weight": 0.7}
    learner, segment = dreamer(**settings)
    rollout = learner.dream(segment, 10, generator())
    policy, alive = learner.model, rollout["alive"]
    features = policy.encoder.features(rollout["stacks"], policy.start(30), rollout["fresh"], rollout["memory"])
    features = features[..., : policy.encoder.lstm]
    value, odds = policy.critic.mean(features), policy.preferences(features[:, :-1]).log_softmax(-1)
    goal = lambda_returns(rollout["reward"], value[:, 1:].detach(), rollout["terminated"], rollout["stop"], 0.9, 0.8)
    likelihood = odds.gather(-1, rollout["action"][..., None])[..., 0]
    actor = -likelihood * (goal - value[:, :-1]).detach()
    entropy = -(odds.exp() * odds)[..., ACTIONS].sum(-1)
    expected = (actor + 0.7 * (value[:, :-1] - goal).square() - 0.01 * entropy)[alive].mean()
    names, parameters = zip(*policy.named_parameters(), strict=True)
    wanted = torch.autograd.grad(expected, parameters)
    loss, metrics = learner._loss(rollout)
    for name, a, b in zip(names, torch.autograd.grad(loss, parameters), wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3, msg=name)
    assert metrics["entropy"].item() == pytest.approx(entropy[alive].mean().item(), rel=1e-4)
    assert metrics["value"].item() == pytest.approx(goal[alive].mean().item(), rel=1e-4)


def test_a_cut_bootstraps_from_the_frame_that_was_cut_off(dreamer: Any) -> None:
    learner, segment = dreamer(truncate_row=2, horizon=4, gamma=0.9)
    rollout = learner.dream(segment, 30, generator())
    learner._loss(rollout)
    cut = rollout["stop"] & rollout["alive"]
    assert cut.any() and (rollout["next_value"][cut] != 0).all()
    torch.testing.assert_close(rollout["goal"][cut], rollout["reward"][cut] + 0.9 * rollout["next_value"][cut])


def test_advantages_are_normalised_over_the_rows_that_count(dreamer: Any) -> None:
    learner, segment = dreamer(horizon=5)
    dream = learner.dream(segment, 10, generator())
    dream["alive"][3, 2:] = False
    advantages = []
    for normalise in (False, True):
        learner.hparams["normalise"] = normalise
        learner._loss(rollout := dict(dream))
        advantages.append(rollout["advantage"][dream["alive"]])
    above = advantages[0] - advantages[0].mean()
    torch.testing.assert_close(advantages[1], above / above.std(correction=0))


def test_a_second_use_is_clipped_by_its_ratio(dreamer: Any) -> None:
    learner, segment = dreamer(horizon=3, ratio_clip=0.1, entropy=0.0, value_weight=0.0)
    rollout = learner.dream(segment, 10, generator())
    first = learner._loss(rollout)[0].item()
    assert learner._loss(rollout)[0].item() == pytest.approx(first)
    rollout["likelihood"] = rollout["likelihood"] - math.log(2)  # as if all odds had doubled since
    advantage = torch.where(rollout["advantage"] > 0, 1.1, 2.0) * rollout["advantage"]
    expected = -advantage[rollout["alive"]].mean().item()
    assert learner._loss(rollout)[0].item() == pytest.approx(expected, rel=1e-4)


def test_no_gradient_and_no_checkpoint_holds_the_world_model(dreamer: Any) -> None:
    learner, _ = dreamer()
    learner._teacher = Apart(torch.nn.Linear(3, 3))
    assert not [n for n in learner.state_dict() if not n.startswith("model.")]
    assert not any(p.requires_grad for p in learner._teacher.module.parameters())


def test_a_policy_is_loaded_without_its_world_model_or_its_learner(dreamer: Any, tmp_path: Any) -> None:
    learner, _ = dreamer()
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(learner)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    policy, card = load_policy(tmp_path / "a.ckpt")
    assert card == CARD and policy.actions == ACTIONS and not policy.training
    same = learner.model.state_dict()
    assert all(torch.equal(v, same[k]) for k, v in policy.state_dict().items())
