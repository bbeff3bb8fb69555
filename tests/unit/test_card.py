import dataclasses
import json

import numpy as np
import pytest

from tests.unit.stores import card, episode
from worldmodels.data.card import card_digest, check_compatible, check_episode, make_card, validate_card
from worldmodels.types import UserError

OBS = {"height": 64, "width": 64, "channels": 3}


def test_a_card_is_plain_data_and_valid():
    c = make_card("atari_play", "pong", OBS, sticky_prob=0.25, action_set=(0, 2, 5), policy={"type": "mixture"})
    assert validate_card(json.loads(json.dumps(c))) == c
    assert c["obs"] == OBS | {"colour": "rgb", "resize": "area", "max_pool": True}
    assert c["action_set"] == [0, 2, 5] and c["frame_skip"] == 4 and c["reward"] == {"clipped": False}
    assert make_card("atari_play", "pong", OBS)["policy"] == {}, "defaults are not shared"


def test_cards_that_are_wrong():
    good = make_card("atari_play", "pong", OBS)
    for change, match in [
        ({"frame_skip": 0}, "frame_skip=0, which is out of range"),
        ({"frame_skip": "4"}, "frame_skip='4', which must be of type int"),
        ({"sticky_prob": 1.0}, "sticky_prob=1.0, which is out of range"),
        ({"game": ""}, "game='', which is out of range"),
        ({"source": "../up"}, "source='../up', which is out of range"),
        ({"action_set": [0, 18]}, "action_set"),
        ({"obs": OBS}, "lacks the field 'obs.colour'"),
        ({"obs": good["obs"] | {"channels": 4}}, "obs.channels=4"),
    ]:
        with pytest.raises(UserError, match=match):
            validate_card(good | change)
    with pytest.raises(UserError, match="no field 'frameskip'; the fields are .*frame_skip"):
        make_card("atari_play", "pong", OBS, frameskip=4)
    with pytest.raises(UserError, match="no field 'obs.heigth'"):
        make_card("atari_play", "pong", OBS | {"heigth": 3})
    assert validate_card(good | {"from_the_future": 1})["from_the_future"] == 1


def test_what_does_not_fit_is_named_with_its_mend():
    pong = make_card("atari_play", "pong", OBS)
    check_compatible(pong, make_card("atari_play", "pong", OBS, seed=3, licence="x"), "the checkpoint")
    breakout = make_card("atari_play", "breakout", OBS)
    with pytest.raises(UserError, match="game='breakout' but the checkpoint a.ckpt has 'pong': .*finetune"):
        check_compatible(breakout, pong, "the checkpoint a.ckpt")
    check_compatible(breakout, pong, "the checkpoint", same_game=False)
    for other, field in [
        (make_card("dqn_replay", "pong", OBS | {"colour": "ale_gray"}), "obs.colour"),
        (make_card("atari_play", "pong", OBS | {"width": 84}), "obs.width"),
        (make_card("atari_play", "pong", OBS, frame_skip=3), "frame_skip"),
        (make_card("atari_play", "pong", OBS, sticky_prob=0.25), "sticky_prob"),
        (make_card("atari_play", "pong", OBS, reward={"clipped": True}), "reward.clipped"),
    ]:
        with pytest.raises(UserError, match=f"{field}=.* but it has .*: collect or import a store with {field}="):
            check_compatible(pong, other, "it", same_game=False)
    with pytest.raises(UserError, match=": do that$"):
        check_compatible(breakout, pong, "it", mend="do that")


def test_digest():
    a = make_card("atari_play", "pong", OBS)
    assert card_digest(a) == card_digest(dict(reversed(a.items()))) != card_digest(a | {"seed": 1})
    assert len(card_digest(a)) == 64


@pytest.mark.parametrize(
    "change, match",
    [
        ({"obs": np.zeros((5, 8, 8), np.uint8)}, r"obs is uint8 \(5, 8, 8\), not uint8 \(5, 8, 8, 3\)"),
        ({"obs": np.zeros((5, 8, 8, 3), np.float32)}, "obs is float32"),
        ({"obs": np.zeros((4, 8, 8, 3), np.uint8)}, r"obs is uint8 \(4,"),
        ({"final_obs": np.zeros((8, 9, 3), np.uint8)}, "final_obs differs"),
        ({"reward": np.zeros(4, np.float32)}, "its columns differ in length"),
        ({"reward": np.array([0, 0, np.nan, 0, 0], np.float32)}, "a reward is not finite"),
        ({"action": np.full(5, 18, np.uint8)}, "an action is not an index 0 to 17"),
        ({"action": np.full(5, -1)}, "an action is not an index 0 to 17"),
        ({"terminated": np.ones(5, bool)}, "it ends before its last row"),
        ({"terminated": np.zeros(5, np.uint8)}, "a flag is not bool"),
    ],
)
def test_malformed_episodes(change, match):
    good = episode(1, 5)
    check_episode(card(), good, "episode 7")
    with pytest.raises(UserError, match=f"^episode 7 cannot be stored: {match}"):
        check_episode(card(), dataclasses.replace(good, **change), "episode 7")


def test_episode_without_rows():
    empty = dataclasses.replace(episode(1, 5), **{k: getattr(episode(1, 5), k)[:0] for k in ("obs", "action")})
    with pytest.raises(UserError, match="it has no rows"):
        check_episode(card(), empty, "episode 7")
