"""The benchmarks of symmetry: what they hold models against, and Chaser in its own interpreter, where that is there."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import equivariance, frame_symmetry
from benchmarks import equivariance_chaser as chaser
from benchmarks.equivariance_atari import value_error
from benchmarks.paired import games_of, minus, share_equal
from tests.unit.test_muzero import muzero
from worldmodels.data.sampling import even_windows
from worldmodels.data.sources.maze_play import maze_card, maze_play
from worldmodels.data.store import Store
from worldmodels.ops.groups import Element, action_table, group, moved_action

needs_procgen = pytest.mark.skipif(not (chaser.PYTHON / "installed").exists(), reason="data/procgen has no Procgen")


def test_games_are_held_against_those_that_began_alike(tmp_path: Path) -> None:
    """Returns that differ much between games and seeds, and by 2 between the places; written as games end."""
    rng = np.random.default_rng(0)
    for seed in range(3):
        returns = 1000 * rng.random(6).round(3)
        for place, more in (("turned_0", 2.0), ("unseen", 0.0)):
            out = tmp_path / str(seed) / place
            out.mkdir(parents=True)
            lines = [json.dumps({"episode": int(k), "return": returns[k] + more}) for k in rng.permutation(6)]
            (out / "results.jsonl").write_text("\n".join(lines))
            (out / "metrics.json").write_text("{}")
    here, there = games_of(tmp_path, "turned_0"), games_of(tmp_path, "unseen")
    assert minus(here, there, rng) == {"mean": 2.0, "interval": [2.0, 2.0], "seeds": 3}
    assert minus(here, {}, rng) is None
    assert share_equal(here, [here, there]) == 0.5


def test_the_log_that_a_return_takes_is_told_and_drawn(tmp_path: Path) -> None:
    def unseen(**means: float) -> dict:
        return {name: {"unseen": {"mean": mean, "interval": [mean, mean]}} for name, mean in means.items()}

    figures = {"log5000": unseen(plain=1, c4=2, encoder=4), "log10000": unseen(plain=3, c4=3.5, turned=2)}
    figures["one20000"] = unseen(plain=9)
    logs = {"log5000": equivariance.Log(5000), "log10000": equivariance.Log(10_000)}
    logs["one20000"] = equivariance.Log(20_000, mazes=1)
    told = {"return": 3, "plain": 10_000, "c4": 10_000}
    assert equivariance.data_ratio(figures, logs) == told
    assert equivariance.data_ratio({"log5000": unseen(c4=2)}, logs) == {}
    equivariance.draw(tmp_path, figures, logs)
    assert [path.name for path in tmp_path.iterdir()] == ["equivariance_samples.png"]  # no turned maze is known


def test_runs_are_paid_what_symmetry_costs(tmp_path: Path) -> None:
    """By seconds that are on record, and by arithmetic, which grows with what is unrolled and with the group."""
    mazes = equivariance.Mazes(tmp_path, equivariance.QUICK, [])
    for name, seconds in (("c4", 60.0), ("turned", 24.0)):
        out = tmp_path / "log3000" / name / "0"
        out.mkdir(parents=True)
        (out / "metrics.json").write_text(json.dumps({"cpu_seconds": seconds}))
    assert mazes.steps("log3000", "turned_time", 0) == 2.5 * equivariance.QUICK.train
    assert mazes.steps("log3000", "c4", 0) == equivariance.QUICK.train
    log, more = tmp_path / "log", ("model.frames=2", "model.sizes.tiny.representation.patch=3")
    with Store.create(log, maze_card(0, time_limit=60, mazes=4)) as made:
        for episode in maze_play(600, 0, time_limit=60, mazes=4):
            made.append(episode)
    settings = ((), ("model.unroll=10",), ("model.symmetry=c4",))
    plain, longer, turned = (muzero(*more, *one, actions=[0, 2, 3, 4, 5], size=15) for one in settings)
    cost = equivariance.arithmetic(plain, log)
    assert cost > 0 and cost == equivariance.arithmetic(plain, log)
    assert equivariance.arithmetic(longer, log) > 1.5 * cost
    assert equivariance.arithmetic(turned, log) > 1.5 * cost


def test_values_are_held_against_what_followed_in_held_out_play(catch_store: Path) -> None:
    """Catch gives 1 or -1 after 4 steps: a model that expects nothing errs by gamma**3 ... 1, less the first row."""
    store = Store.open(catch_store)
    model = muzero("model.frames=2", "model.gamma=0.9", actions=[0, 3, 4]).eval()
    assert model.value.mean(torch.zeros(1, model.read_value.width)).abs().item() < 1e-6
    expected = np.sqrt(np.mean(np.square([0.9**2, 0.9, 1.0])))
    assert value_error(model, store, 100) == pytest.approx(expected, abs=1e-6)


def test_a_frame_that_is_copied_is_judged_by_what_changed(tmp_path: Path) -> None:
    """Untrained, the diffusion model copies the last frame; what it learns may be dreamt with the group's mean."""
    log = tmp_path / "log"
    with Store.create(log, maze_card(0, time_limit=20, mazes=1)) as made:
        for episode in maze_play(60, 0, time_limit=20, mazes=1):
            made.append(episode)
    world, store, length = frame_symmetry.model(0, turned="d4"), Store.open(log), frame_symmetry.BURN_IN + 8
    films = store.read(even_windows(store, range(len(store.lengths)), 4, length), length)
    last, true = films.obs[:, -9].int(), films.obs[:, -8:].int()
    changed = ((true - last[:, None]).abs() > 8).any(2, keepdim=True)
    error = (changed * ((true - last[:, None]) / 255).square()).sum((2, 3, 4)) / (3 * changed.sum((2, 3, 4)))
    copied = -10 * torch.log10(error.nanmean(0))[[0, 1, 3, 7]]
    assert frame_symmetry.judge(world, log, 4) == pytest.approx(copied.tolist(), abs=1e-3)
    before = [p.clone() for p in world.parameters()]
    assert frame_symmetry.train(world, log, 0.3, 0) > 0
    assert not all(torch.equal(a, b) for a, b in zip(before, world.parameters(), strict=True))
    frame_symmetry.model(0, symmetry="d4").load_state_dict(world.state_dict())


@needs_procgen
def test_chaser_turned_is_chaser_with_frames_and_actions_turned() -> None:
    quarter = action_table(group("c4"))[1].numpy()
    assert quarter.tolist() == [moved_action(action, Element(1, False)) for action in range(18)]
    rng = np.random.default_rng(0)
    with chaser.Games(2, 10) as plain, chaser.Games(2, 10, turns=1) as turned:
        assert np.array_equal(np.rot90(plain.reset(seed=[7])[0], 1, (2, 3)), turned.reset(seed=[7])[0])
        earned = 0.0
        for _ in range(100):
            action = rng.choice(chaser.MOVES, 2)
            (frames, reward, ended, *_), (*others,) = plain.step(action), turned.step(quarter[action])
            assert np.array_equal(np.rot90(frames, 1, (2, 3)), others[0])
            assert np.array_equal(reward, others[1]) and np.array_equal(ended, others[2])
            earned += reward.sum()
        assert earned > 0


@needs_procgen
def test_a_log_of_chaser_is_a_store(tmp_path: Path) -> None:
    store = Store.open(chaser.record(tmp_path / "log", 60, 5))
    assert store.card["game"] == "chaser" and store.card["action_set"] == list(chaser.MOVES)
    assert store.lengths.sum() >= 60 and set(np.unique(store.column("action"))) <= set(chaser.MOVES)
    assert store.column("reward").sum() > 0
