"""evaluation/protocols.py: names, hashes, and what may not be played together."""

import pytest
from omegaconf import OmegaConf

from worldmodels.config import conf_dir
from worldmodels.data.sources.atari_play import atari_card
from worldmodels.data.sources.catch_play import catch_card
from worldmodels.evaluation.protocols import check_actions, make_rules
from worldmodels.types import UserError

PONG = [0, 1, 3, 4, 11, 12]


def named(name):
    return OmegaConf.to_container(OmegaConf.load(conf_dir() / "protocol" / f"{name}.yaml"))


def test_the_named_protocols():
    rules = {name: make_rules(named(name), None, PONG) for name in ("diamond-100k", "dqn-replay", "machado-sticky")}
    assert {r.name for r in rules.values()} == set(rules) and len({r.hash for r in rules.values()}) == 3
    assert [r.sticky_prob for r in rules.values()] == [0, 0.25, 0.25]
    assert [r.noop_max for r in rules.values()] == [30, 0, 0]
    assert [r.temperature for r in rules.values()] == [1, 0, 1]
    assert [len(r.allowed(PONG)) for r in rules.values()] == [6, 6, 18]
    for r in rules.values():
        assert (r.frame_skip, r.max_pool, r.time_limit) == (4, True, 27_000)
        assert r.told()["episodic_life"] is r.told()["clipped_rewards"] is False


def test_the_hash_is_of_the_rules_and_not_of_their_name():
    plain = make_rules(named("diamond-100k"), None, PONG)
    assert make_rules(named("diamond-100k") | {"name": "mine"}, None, PONG).hash == plain.hash
    assert make_rules(named("diamond-100k") | {"time_limit": 100}, None, PONG).name == "diamond-100k (changed)"
    for field, value in plain.told().items():
        if field in named("diamond-100k") and field != "name":
            other = {"full": "minimal", "minimal": "full"}.get(value) if field == "actions" else not value
            other = other if isinstance(value, bool | str) else value + 1 if isinstance(value, int) else value / 2 + 0.1
            assert make_rules(named("diamond-100k") | {field: other}, None, PONG).hash != plain.hash, field


def test_the_hash_is_the_same_however_the_rules_are_written():
    for one, other in (
        ({"sticky_prob": 0, "temperature": 1, "epsilon": 0}, {"sticky_prob": 0.0, "temperature": 1.0, "epsilon": 0.0}),
        ({"actions": [4, 0, 3]}, {"actions": [0, 3, 4]}),
    ):
        a, b = (make_rules(named("diamond-100k") | given, None, PONG) for given in (one, other))
        assert a.hash == b.hash


def test_the_protocol_of_a_store_is_its_cards():
    card = atari_card(0, game="pong", sticky_prob=0.25, frame_skip=3, noop_max=7, time_limit=100, max_pool=False)
    rules = make_rules(named("store"), card, PONG)
    assert (rules.sticky_prob, rules.frame_skip, rules.noop_max, rules.time_limit) == (0.25, 3, 7, 100)
    assert rules.max_pool is False and rules.actions == "full"
    assert make_rules(named("store"), card | {"action_set": PONG, "time_limit": None}, PONG).time_limit == 27_000
    assert make_rules(named("store"), card | {"action_set": PONG}, PONG).actions == "minimal"
    assert make_rules(named("store"), card | {"action_set": [0, 2]}, PONG).allowed(PONG) == [0, 2]
    same = atari_card(0, game="pong") | {"action_set": PONG}
    assert make_rules(named("store"), same, PONG).hash == make_rules(named("diamond-100k"), None, PONG).hash
    assert make_rules(named("store"), catch_card(0), [0, 3, 4]).time_limit == 4


@pytest.mark.parametrize(
    ("settings", "card", "words"),
    [
        ({}, {"sticky_prob": 0.25}, "protocol=diamond-100k has sticky_prob=0.0 but the store's card has 0.25"),
        ({}, {"frame_skip": 1}, "frame_skip=4 but the store's card has 1: choose protocol=store"),
        ({}, {"obs": {"max_pool": False}}, "max_pool=True but the store's card has False"),
        ({"sticky_prob": 1.5}, None, "protocol.sticky_prob=1.5 is out of range"),
        ({"frame_skip": 0}, None, "protocol.frame_skip=0 is out of range"),
        ({"actions": [0, 18]}, None, "protocol.actions"),
        ({"actions": "some"}, None, "protocol.actions=some is out of range"),
        ({"temperature": -1}, None, "protocol.temperature=-1"),
        ({"frame_skip": None}, None, "takes frame_skip from a dataset card and there is none: give store="),
        ({"lives": 3}, None, "wrong settings of protocol=diamond-100k"),
    ],
)
def test_mistakes(settings, card, words):
    full = None if card is None else atari_card(0, game="pong") | card
    with pytest.raises(UserError, match=words):
        make_rules(named("diamond-100k") | settings, full, PONG)


def test_a_policy_for_another_action_set_is_refused():
    rules = make_rules(named("diamond-100k"), None, PONG)
    check_actions(PONG, rules.allowed(PONG), rules)
    with pytest.raises(UserError, match="another action set: it may take UP, DOWN, which protocol=diamond-100k"):
        check_actions([0, 2, 5], rules.allowed(PONG), rules)
