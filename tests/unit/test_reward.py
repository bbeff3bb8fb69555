"""models/reward.py: what counts in the loss, magnitudes, lost lives, and the weight of rare events."""

from dataclasses import replace

import pytest
import torch

from tests import conformance
from worldmodels.models.frames import to_float
from worldmodels.models.reward import RewardModel
from worldmodels.types import UserError

SHAPE = {"num_actions": 18, "image_channels": 3, "image_size": 16, "cond_channels": 8}
LEVELS = {"channels": [8], "depths": [0], "attention": [False], "lstm": 16, "middle": 0}


def model(**choices):
    torch.manual_seed(0)
    return RewardModel(**SHAPE, **LEVELS, **choices)


def loss(model, segment):
    frames = to_float(segment.obs)
    total, metrics = model.loss(segment, frames[:, :-1], frames[:, 1:])
    return total.item(), {name: value.item() for name, value in metrics.items()}


def without_next(segment):
    """The same where nothing is known of the frame after the last action but that it looks otherwise."""
    next_mask = segment.next_mask.clone()
    next_mask[:, -1] = False
    obs = segment.obs.clone()
    obs[:, -1] = 255 - obs[:, -1]
    return replace(segment, obs=obs, next_mask=next_mask)


@pytest.mark.parametrize("choice", ["grey", "masked", "foreseen"])
def test_transitions_without_a_next_frame(choice):
    segment = conformance.random_segment(2, 4, 3, 16)
    unknown = without_next(segment)
    other = replace(unknown, obs=segment.obs)
    same = loss(model(unknown_next=choice), unknown) == loss(model(unknown_next=choice), other)
    assert same == (choice != "grey")


def ending_where_it_is_bright(batch=64, length=3):
    """Noise that ends its windows after a bright frame, and no last frame is known, whether they ended or went on."""
    segment = conformance.random_segment(batch, length, 3, 16)
    bright = torch.arange(batch) % 4 == 0
    obs = segment.obs // 2
    obs[bright, -2] += 120
    terminated = torch.zeros_like(segment.mask)
    terminated[:, -1] = bright
    return without_next(replace(segment, obs=obs, terminated=terminated, reward=segment.reward * 0)), bright


@pytest.mark.parametrize("choice", ["masked", "foreseen"])
def test_ends_are_learned_without_the_frames_after_them(choice):
    m = model(unknown_next=choice)
    segment, bright = ending_where_it_is_bright()
    optimizer, frames = torch.optim.Adam(m.parameters(), lr=1e-2), to_float(segment.obs)
    for _ in range(100):
        optimizer.zero_grad()
        m.loss(segment, frames[:, :-1], frames[:, 1:])[0].backward()
        optimizer.step()
    # as in a dream: the frame after is there, and one transition comes at a time
    memory, ends = None, []
    for t in range(segment.length):
        now, after = slice(t, t + 1), slice(t + 1, t + 2)
        _, end, memory = m.predict(frames[:, now], frames[:, after], segment.action[:, now], memory)
        ends.append(end[:, 0, 0])
    assert (ends[-1] > 0.5).equal(bright) == (choice == "foreseen")
    assert ends[1].max() < 0.5


def test_what_is_foreseen_does_not_hang_on_the_frame_after():
    m, segment = model(unknown_next="foreseen", life_loss="apart"), conformance.random_segment(2, 4, 3, 16)
    frames = to_float(segment.obs)
    other = torch.cat([frames[:, 1:-1], -frames[:, -1:]], dim=1)
    (_, a, _), (_, b, _) = (m.predict(frames[:, :-1], after, segment.action) for after in (frames[:, 1:], other))
    assert torch.equal(a[..., 0], b[..., 0]) and not torch.equal(a[:, -1, 1], b[:, -1, 1])


@pytest.mark.parametrize("choice", ["stale", "logged"])
def test_frame_after_a_termination(choice):
    segment = conformance.random_segment(2, 4, 3, 16)
    segment = replace(segment, terminated=torch.tensor([[False, False, False, True]] * 2))
    obs = segment.obs.clone()
    obs[:, -1] = 255 - obs[:, -1]
    m = model(terminal_frame=choice)
    assert (loss(m, segment) == loss(m, replace(segment, obs=obs))) == (choice == "stale")


def test_magnitudes_and_signs():
    segment = conformance.random_segment(2, 4, 3, 16)
    high = replace(segment, reward=segment.reward * 7)
    assert loss(model(), segment) == loss(model(), high)
    assert loss(model(rewards="two_hot"), segment) != loss(model(rewards="two_hot"), high)
    frames = to_float(segment.obs)
    p, _, _ = model(rewards="two_hot").predict(frames[:, :-1], frames[:, 1:], segment.action)
    assert p.shape == (2, 4, 29)
    torch.testing.assert_close(p.sum(-1), torch.ones(2, 4))


def test_learns_the_size_of_a_reward():
    m = model(rewards="two_hot")
    segment = conformance.random_segment(8, 2, 3, 16)
    segment = replace(segment, reward=torch.where(segment.action > 8, 5.0, 0.0), terminated=segment.action < 0)
    optimizer, frames = torch.optim.Adam(m.parameters(), lr=1e-2), to_float(segment.obs)
    for _ in range(150):
        optimizer.zero_grad()
        m.loss(segment, frames[:, :-1], frames[:, 1:])[0].backward()
        optimizer.step()
    p, _, _ = m.predict(frames[:, :-1], frames[:, 1:], segment.action)
    assert (p @ m.bins - segment.reward).abs().max() < 0.5


def test_windows_count_by_their_importance():
    segment = conformance.random_segment(2, 4, 3, 16)
    first = replace(segment, side={"importance": torch.tensor([1.0, 0.0])})
    second = replace(segment, side={"importance": torch.tensor([0.0, 1.0])})
    parts = [loss(model(), s)[0] for s in (first, second)]
    assert min(parts) > 0 and sum(parts) == pytest.approx(loss(model(), segment)[0])


@pytest.mark.parametrize("choice", ["end", "apart", "ignored"])
def test_lost_lives(choice):
    segment = conformance.random_segment(2, 4, 3, 16)
    lost = replace(segment, side={"life_loss": torch.ones(2, 4, dtype=torch.bool)})
    m = model(life_loss=choice)
    (_, a), (_, b) = loss(m, segment), loss(m, lost)
    assert ("loss_life_loss" in a) == (choice == "apart")
    assert (a["loss_termination"] == b["loss_termination"]) == (choice != "end")
    if choice == "apart":
        assert a["loss_life_loss"] != b["loss_life_loss"]


def test_weighted_events_leave_probabilities_calibrated():
    """One transition in ten ends, and nothing tells which: both weights learn 0.1, for the reward as well."""
    for weight in (1.0, 9.0):
        m = model(event_weight=weight, terminal_frame="logged")
        segment = conformance.random_segment(10, 1, 3, 16)
        event = torch.arange(10)[:, None] == 3
        blank = replace(segment.map(torch.zeros_like), terminated=event, reward=event.float(), mask=segment.mask)
        optimizer, frames = torch.optim.Adam(m.parameters(), lr=1e-2), to_float(blank.obs)
        for _ in range(200):
            optimizer.zero_grad()
            m.loss(blank, frames[:, :-1], frames[:, 1:])[0].backward()
            optimizer.step()
        reward, end, _ = m.predict(frames[:, :-1], frames[:, 1:], blank.action)
        torch.testing.assert_close(end, torch.full((10, 1, 1), 0.1), atol=0.01, rtol=0)
        torch.testing.assert_close(reward @ m.bins, torch.full((10, 1), 0.1), atol=0.01, rtol=0)


@pytest.mark.parametrize(
    "choice", [{"rewards": "raw"}, {"life_loss": "no"}, {"unknown_next": "x"}, {"terminal_frame": "x"}]
)
def test_unknown_choices(choice):
    with pytest.raises(UserError, match=f"reward_model.{next(iter(choice))}"):
        model(**choice)
    with pytest.raises(UserError, match="event_weight is 0"):
        model(event_weight=0)
