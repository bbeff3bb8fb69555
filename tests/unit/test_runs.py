"""benchmarks/runs.py: parts that are made once, with the settings asked for, and intervals of their returns."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from benchmarks import muzero, policies, runs
from benchmarks.runs import Asked, Runs, means, spent, told
from worldmodels.config import conf_dir
from worldmodels.data.disk import read_json, write_json

RANDOM = ("evaluate", "policy=random", "game=catch", "protocol=store", "films=0")


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_a_constant_has_a_point_as_its_interval() -> None:
    for seeds in ([np.full(7, 3.5)], [np.full(4, 3.5), np.full(9, 3.5)]):
        assert told(means(seeds, rng())) == {"mean": 3.5, "interval": [3.5, 3.5]}


def test_the_interval_of_one_seed_is_that_of_its_games() -> None:
    games = rng().normal(2, 3, 50)
    drawn = means([games], rng())
    assert drawn[0] == pytest.approx(games.mean()) and len(drawn) == 1 + runs.RESAMPLES
    assert drawn[1:].mean() == pytest.approx(games.mean(), abs=0.02)
    assert drawn[1:].std() == pytest.approx(games.std() / 50**0.5, rel=0.03)
    low, high = told(drawn)["interval"]
    assert high - low == pytest.approx(2 * 1.96 * games.std() / 50**0.5, rel=0.05)


def test_seeds_are_drawn_again_as_games_are() -> None:
    """Of two constant seeds a and b a resample is a, the middle or b, with odds of 1, 2 and 1."""
    drawn = means([np.full(5, 1.0), np.full(500, 5.0)], rng())
    assert drawn[0] == 3, "each seed counts once, however many games it has"
    values, counts = np.unique(drawn[1:], return_counts=True)
    assert values.tolist() == [1, 3, 5] and counts / runs.RESAMPLES == pytest.approx([0.25, 0.5, 0.25], abs=0.02)
    assert told(drawn) == {"mean": 3, "interval": [1, 5]}
    a, b = rng().normal(0, 2, 30), rng().normal(4, 2, 30) + 1
    both = means([a, b], rng())[1:]  # variance: that of the draw of two seeds, and of the games of each
    expected = np.var([a.mean(), b.mean()]) / 2 + (a.var() + b.var()) / 2 / 30 / 2
    assert both.var() == pytest.approx(expected, rel=0.05)


def test_the_best_is_chosen_in_each_resample() -> None:
    drawn = {"log": np.array([1.0, 1, 0, 1]), "a": np.array([3.0, 2, 5, 2]), "b": np.array([2.0, 4, 1, 4])}
    found = policies.best_minus_log(drawn, ["a", "b"])
    assert found["best"] == "a" and found["mean"] == 2
    assert found == told(np.array([2.0, 3, 5, 3])) | {"best": "a"}
    assert policies.best_minus_log(drawn, ["b"])["mean"] == 1


def test_a_part_is_made_once_with_the_settings_that_it_was_begun_with(
    catch_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench, out = Runs(tmp_path / "full", ()), tmp_path / "full" / "catch" / "random" / "0" / "played"
    arguments = [*RANDOM, f"store={catch_store}", "episodes=2"]
    bench.run(*arguments, out=out)
    first = (out / "metrics.json").read_bytes()
    part = read_json(out / "part.json")
    assert part["settings"]["episodes"] == 2 and part["settings"]["out"] == "./catch/random/0/played"
    assert part["seconds"] > 0 and part["seconds"] >= read_json(out / "metrics.json")["seconds"]
    assert [r.tolist() for r in bench.returns("catch", "random")] == [read_json(out / "metrics.json")["returns"]]
    # a torn line, and those of another evaluation, are none of the part's returns
    with (out / "results.jsonl").open("a") as file:
        file.write('{"evaluation": "older", "return": 99.0}\n{"eval')
    assert np.max(bench.returns("catch", "random")) <= 1

    bench.run(*arguments, out=out)
    moved = Runs(shutil.copytree(bench.root, tmp_path / "moved"), ())
    moved.run(*arguments, out=moved.root / out.relative_to(bench.root))
    for more, words in (("episodes=3", "episodes=2 and not 3"), ("seed=1", "seed=0 and not 1")):
        with pytest.raises(SystemExit, match=f"played was begun with {words}: delete that folder .* or its part.json"):
            bench.run(*arguments, more, out=out)
    conf = shutil.copytree(conf_dir(), tmp_path / "conf")
    with monkeypatch.context() as patched:
        patched.setattr(runs, "conf_dir", lambda: conf)
        text = (conf / "evaluate.yaml").read_text()
        (conf / "evaluate.yaml").write_text(text + "a_new_one: 1\n")
        bench.run(*arguments, out=out)  # of later than the part
        (conf / "evaluate.yaml").write_text(text.replace("slots: 10", "slots: 11"))
        with pytest.raises(SystemExit, match="slots=10 and not 11: "):
            bench.run(*arguments, out=out)
    (out / "part.json").unlink()
    bench.run(*arguments, "episodes=3", out=out)  # of an earlier version
    assert (out / "metrics.json").read_bytes() == first and not (out / "part.json").exists()

    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        bench.run("evaluate", "policy=clever", "game=pong", out=tmp_path / "full" / "clever")
    assert ended.value.code == 2 and "worldmodels: policy=clever is unknown" in capsys.readouterr().err


def test_a_log_that_cannot_be_made_ends_with_the_sentence_of_its_command(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        Runs(tmp_path, ()).collect("pongg", 10, out=tmp_path / "log")
    assert ended.value.code == 2 and "did you mean 'pong'?" in capfd.readouterr().err


def test_what_all_parts_took_is_told(tmp_path: Path) -> None:
    for name, metrics, part in (
        ("log", {"seconds": 2.0}, None),
        ("clone/0", {"seconds": 100.0, "cpu_seconds": 150.0}, {"seconds": 20.0}),  # begun before there was part.json
        ("clone/0/played", {"seconds": 3.0}, {"seconds": 9.5}),
        ("behaviours", {"seconds": 0.5}, None),
    ):
        folder = tmp_path / "quick" / "pong" / name
        folder.mkdir(parents=True)
        write_json(folder / "metrics.json", metrics)
        if part:
            write_json(folder / "part.json", part)
    assert spent(tmp_path / "quick") == {"seconds": 112, "training_cpu_seconds": 150}
    Asked("x", tmp_path, True, [], 0.0).publish({})
    assert read_json(tmp_path / "x.json")["seconds"] == 112


def test_a_quick_run_makes_the_same_figures() -> None:
    assert {g: b.runs for g, b in muzero.QUICK.items()} == {g: b.runs for g, b in muzero.FULL.items()}
    assert policies.QUICK_BUDGETS.keys() == policies.BUDGETS.keys()
    for game, budget in policies.BUDGETS.items():
        assert bool(policies.QUICK_BUDGETS[game].value_seeds) == bool(budget.value_seeds)
