"""Logged games come out of the emulator again, bit for bit, and other things can happen from their states."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.unit.test_quality import make_store, walk
from worldmodels.data.mixing import Mixture
from worldmodels.data.sources.atari_play import atari_card, atari_play
from worldmodels.data.store import Store
from worldmodels.data.transforms import Transform
from worldmodels.evaluation.replay import play_on, replay_states
from worldmodels.types import UserError


def atari_store(path, steps=500, seed=1, edit=lambda e: e, **protocol):
    protocol = {"game": "pong", "time_limit": 210} | protocol
    with Store.create(path, atari_card(seed, **protocol)) as store:
        for episode in atari_play(steps, seed, **protocol):
            store.append(edit(episode))
    return Store.open(path)


PLACES = np.array([[0, 0], [0, 40], [1, 7], [1, 170], [2, 70]])


@pytest.mark.parametrize(
    "protocol", [{}, {"sticky_prob": 0.25}, {"game": "breakout", "colour": "ale_gray", "size": 84, "sticky_prob": 0.25}]
)
def test_going_on_with_the_logged_actions_gives_the_logged_frames(tmp_path, protocol):
    store = atari_store(tmp_path / "s", **protocol)
    env, states = replay_states(store, PLACES, progress=False)
    window = store.read(PLACES, 30)
    for k in reversed(range(len(PLACES))):  # states can be taken in any order
        frames, alive = play_on(env, states[k], window.action[k])
        assert torch.equal(frames, window.obs[k, 1:]) and bool(alive.all())


def test_without_its_random_numbers_a_sticky_game_goes_on_differently(tmp_path):
    store = atari_store(tmp_path / "s", sticky_prob=0.25)
    actions = torch.tensor([3, 4] * 15)
    for rng, distinct in ((True, 1), (False, 4)):
        env, states = replay_states(store, PLACES[3:4], rng, progress=False)
        films = {play_on(env, states[0], actions)[0].numpy().tobytes() for _ in range(4)}
        assert len(films) == distinct


def test_after_the_end_nothing_happens(tmp_path):
    store = atari_store(tmp_path / "s")
    as_it_is = Mixture([store.path], Transform(64, "rgb"))
    env, states = replay_states(as_it_is, np.array([[0, 205]]), progress=False)
    frames, alive = play_on(env, states[0], [3] * 10)
    assert alive.tolist() == [True] * 5 + [False] * 5  # the time limit is 210 steps
    assert torch.equal(frames[4:], frames[4:5].expand(6, -1, -1, -1))


def test_what_cannot_be_played_again_is_told(tmp_path):
    def refusal(store):
        with pytest.raises(UserError) as told:
            replay_states(store, PLACES[:2], progress=False)
        return str(told.value)

    assert "only logs of Atari games made by `worldmodels collect`" in refusal(
        make_store(tmp_path / "toy", [walk(k) for k in range(3)])
    )
    other = atari_store(tmp_path / "seed", sticky_prob=0.25, edit=lambda e: replace(e, info={**e.info, "env_seed": 5}))
    assert "comes out otherwise than it was logged by step" in refusal(other)
    rewarded = atari_store(tmp_path / "rewards", edit=lambda e: replace(e, reward=e.reward + (np.arange(len(e)) == 9)))
    assert "comes out otherwise than it was logged by step 40" in refusal(rewarded)
    unknown = atari_store(tmp_path / "none", edit=lambda e: replace(e, info={}))
    assert "has no env_seed" in refusal(unknown)
    assert "without data.transform" in refusal(Mixture([other.path], Transform(32)))
    assert "takes a single store" in refusal(Mixture([rewarded.path, unknown.path], Transform()))
