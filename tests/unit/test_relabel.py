import numpy as np
import pytest
import torch

from tests.unit.stores import card, episode
from worldmodels.data.relabel import future_goals
from worldmodels.data.store import Store

LENGTH = 6


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Two episodes of noise, the first with a last frame, the second without."""
    path = tmp_path_factory.mktemp("relabel") / "s"
    with Store.create(path, card()) as store:
        store.append(episode(0, 12, final=True))
        store.append(episode(1, 12, final=False))
    return Store.open(path)


def goals(store, starts, length, k=0):
    starts = np.array(starts)
    return future_goals(store.read(starts, length), starts, store, np.random.default_rng(k))


def place(store, goal, i):
    """Which frame of episode `i` it is; 12 is the one after the last action."""
    frames = list(store.episode(i).obs) + [f for f in [store.episode(i).final_obs] if f is not None]
    found = [j for j, f in enumerate(frames) if (f.transpose(2, 0, 1) == goal.numpy()).all()]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("i, last", [(0, 12), (1, 11)])
@pytest.mark.parametrize("start, length", [(-2, 3), (0, 1), (0, 6), (5, 6), (6, 5), (10, 1), (9, 6)])
def test_goals_are_every_later_frame_equally_often(store, i, last, start, length):
    t = min(start + length, 12) - 1
    times = 600
    segment = goals(store, [[i, start]] * times, length)
    assert segment.side["goal"].shape == (times, 3, 8, 8) and segment.side["goal"].dtype == torch.uint8
    seen = np.zeros(13)
    for goal, offset in zip(segment.side["goal"], segment.side["goal_offset"].tolist(), strict=True):
        if t == last:
            assert offset == 0 and not goal.any(), "there is no later frame"
            continue
        g = place(store, goal, i)
        assert offset == g - t
        seen[g] += 1
    choices = last - t
    assert not seen[: t + 1].any() and not seen[last + 1 :].any()
    if choices:
        want = times / choices
        chi2 = ((seen[t + 1 : last + 1] - want) ** 2 / want).sum()
        assert chi2 < choices + 5 * np.sqrt(2 * choices)


def test_the_rest_of_the_segment_is_untouched(store):
    starts = np.array([[0, 0], [1, 3]])
    before, after = store.read(starts, LENGTH), goals(store, starts, LENGTH)
    for name in ("obs", "action", "reward", "mask", "next_mask"):
        assert torch.equal(getattr(before, name), getattr(after, name))
    assert set(after.side) == {"life_loss", "game", "goal", "goal_offset"}


def test_goals_depend_on_the_generator_alone(store):
    starts = [[0, 0], [1, 3], [1, 6]] * 5
    a, b, c = (goals(store, starts, LENGTH, k).side["goal_offset"] for k in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
