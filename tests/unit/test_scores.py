"""evaluation/scores.py and scoreboard.py: lines of results, what may be put together, and the tables."""

import json
import os

import numpy as np
import pytest

from worldmodels.evaluation.protocols import Rules
from worldmodels.evaluation.scoreboard import agents_table, figures_of, game_table
from worldmodels.evaluation.scores import append_line, entrant, game_facts, normalised, published, read_lines, summary
from worldmodels.types import UserError

RULES = Rules("diamond-100k", 4, 0.0, True, 30, 27_000, "minimal")


def lines(agent, game, run, returns, digest="aaa", name="diamond-100k", asked=None):
    told = {"evaluation": f"{agent}{game}{run}{digest}", "agent": agent, "run": run, "game": game}
    told |= {"protocol": name, "protocol_hash": digest, "episodes": asked or len(returns)}
    return [told | {"episode": k, "return": r, "length": 10, "truncated": False} for k, r in enumerate(returns)]


def test_normalised_scores():
    assert normalised("pong", -20.7) == 0 and normalised("pong", 14.6) == 1
    assert normalised("breakout", 31.8) == pytest.approx((31.8 - 1.7) / (30.5 - 1.7))
    assert normalised("air_raid", 100) is None
    assert game_facts("pong")["actions"] == [0, 1, 3, 4, 11, 12]
    assert sum("atari100k" in game_facts(g)["suites"] for g in published()["per_seed"]["DIAMOND"]) == 26


def test_an_unknown_game_is_one_sentence():
    with pytest.raises(UserError, match="the game 'pongg' is unknown"):
        game_facts("pongg")


def test_lines_are_added_whole_and_a_torn_one_is_passed_over(tmp_path):
    path, (first, second, third) = tmp_path / "results.jsonl", lines("a", "pong", 0, [1.0, 2.0, 3.0])
    assert read_lines(path) == []
    append_line(path, first)
    append_line(path, second)
    whole = path.read_bytes()
    assert whole.count(b"\n") == 2 and read_lines(path) == [first, second]
    os.truncate(path, len(whole) - 7)  # a crash in the middle of a line
    assert read_lines(path) == [first]
    append_line(path, third)
    assert read_lines(path) == [first, third]
    for other in ({"benchmark": 1}, {k: v for k, v in first.items() if k != "protocol_hash"}):
        path.write_text(json.dumps(other) + "\n")
        with pytest.raises(UserError, match="no episode of `worldmodels evaluate`"):
            read_lines(path)


def test_a_file_of_something_else_is_one_sentence(tmp_path):
    (tmp_path / "best.ckpt").write_bytes(b"PK\x80\x81")
    with pytest.raises(UserError, match=r"best.ckpt is no file of results"):
        read_lines(tmp_path / "best.ckpt")


def test_runs_of_an_agent_are_put_together():
    both = [*lines("a", "pong", 0, [-20.7, 14.6]), *lines("a", "pong", 1, [14.6, 14.6])]
    both += [*lines("a", "breakout", 0, [30.5]), *lines("a", "breakout", 1, [1.7, 1.7])]
    both += [*lines("b", "pong", 5, [-20.7]), *lines("b", "breakout", 5, [1.7])]
    found = summary(both)
    assert found["protocol_hash"] == "aaa"
    a = found["agents"]["a"]
    assert (a["games"], a["runs"]) == (2, 2)
    assert a["mean"] == pytest.approx((0.5 + 1 + 1 + 0) / 4) and a["median"] == pytest.approx(0.625)
    assert a["mean_interval"][0] < a["mean"] < a["mean_interval"][1]
    assert found["agents"]["b"]["mean"] == 0 and found["agents"]["b"]["mean_interval"] is None
    assert found["improvement"]["a over b"]["probability_of_improvement"] == pytest.approx((1 + 0.75) / 2)
    table = agents_table(found, compare=True)
    assert "2 games x 2 runs" in table and "DIAMOND" in table and "1.459 [1.353, 1.570]" in table
    # a second evaluation of the same run is more episodes of it, and no further run
    more = [*lines("a", "pong", 0, [0.0]), *lines("a", "pong", 0, [1.0], name="again")]
    more[1]["evaluation"] = "another"
    assert summary(more)["agents"]["a"]["runs"] == 1


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "there are no episodes"),
        (
            [*lines("a", "pong", 0, [1.0]), *lines("a", "pong", 1, [1.0], digest="bbb", name="dqn-replay")],
            r"different rules cannot be put together: there are diamond-100k \(aaa\) and dqn-replay \(bbb\)",
        ),
        (lines("a", "pong", 0, [1.0, 2.0], asked=3), "has 2 of 3 episodes; go on with it"),
        ([*lines("a", "pong", 0, [1.0]), *lines("a", "pong", 1, [1.0]), *lines("a", "breakout", 0, [1.0])],
         "as many runs of each game, and has 1 to 2: breakout 1, pong 2"),
        (lines("a", "air_raid", 0, [1.0]), "no human score of air_raid"),
    ],
)  # fmt: skip
def test_what_cannot_be_put_together(given, words):
    with pytest.raises(UserError, match=words):
        summary(given)


def test_of_evaluations_of_the_same_games_the_longest_counts():
    few, many = lines("a", "pong", 0, [-20.7]), lines("a", "pong", 0, [-20.7, 14.6, 14.6])
    few, many = ([line | {"evaluation": e, "seed": 7} for line in rows] for e, rows in (("x", few), ("y", many)))
    assert summary([*many, *few])["agents"]["a"]["mean"] == pytest.approx(2 / 3)
    other = [line | {"evaluation": "z", "seed": 8} for line in few]
    assert summary([*many, *other])["agents"]["a"]["mean"] == pytest.approx(1 / 2)


def test_one_checkpoint_played_in_two_ways_is_told_twice():
    def played(evaluation, returns, **asked):
        return [line | {"evaluation": evaluation, "seed": 0, **asked} for line in lines("a", "pong", 0, returns)]

    prior = {"_target_": "worldmodels.planning.planners.prior", "temperature": 0}
    every = [*played("own", [14.6], planner=None, env={}), *played("prior", [-20.7] * 2, planner=prior, env={})]
    every += [*played("moved", [-3.05], planner=None, env={"unseen": True, "cells": 9})]
    expected = {"a": 1.0, "a (planner=prior, planner.temperature=0)": 0.0, "a (env.cells=9, env.unseen=True)": 0.5}
    for several in (every, every[::-1]):
        found = summary(several)["agents"]
        assert {agent: f["mean"] for agent, f in found.items()} == pytest.approx(expected)
    assert entrant(every[1] | {"planner": prior | {"temperature": 1.0}}) == "a (planner=prior)"
    older = played("own", [-20.7])  # which an evaluation went on from that tells more
    assert [*summary([*older, every[0] | {"episode": 1, "episodes": 2}])["agents"]] == ["a"]
    gone_on = [older[0], every[1] | {"evaluation": "own", "episode": 1, "episodes": 2}]
    assert [*summary(gone_on)["agents"]] == ["a (planner=prior, planner.temperature=0)"]


def test_the_figures_of_an_evaluation():
    rng = np.random.default_rng(0)
    episodes = lines("a", "pong", 0, rng.normal(-3, 5, 40).tolist())
    found = figures_of("pong", episodes)
    returns = np.array([line["return"] for line in episodes])
    assert found["return_mean"] == pytest.approx(returns.mean()) and found["return_median"] == np.median(returns)
    low, high = found["return_interval"]
    assert high - low == pytest.approx(2 * 1.96 * returns.std() / 40**0.5, rel=0.15)
    assert found["hns"] == normalised("pong", returns.mean())
    assert found["hns_interval"][0] == pytest.approx(normalised("pong", low))
    table = game_table("mine", "pong", RULES, found, compare=True)
    assert f"mine in pong, 40 episodes by diamond-100k ({RULES.hash})" in table
    assert "random play: -20.7" in table and "human: 14.6" in table and "20.4" in table
    unknown = figures_of("air_raid", lines("a", "air_raid", 0, [1.0, 2.0]))
    assert unknown["hns"] is None and "no human score" in game_table("a", "air_raid", RULES, unknown, compare=True)
