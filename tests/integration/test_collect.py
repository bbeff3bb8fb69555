"""`worldmodels collect`: finished episodes are kept, the same command goes on, mistakes end with one sentence."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from worldmodels.data.collecting import collect
from worldmodels.data.sources.catch_play import catch_card, catch_play
from worldmodels.data.store import Store
from worldmodels.types import UserError


def command(*overrides: str) -> list[str]:
    return [sys.executable, "-m", "worldmodels", "collect", *overrides]


def run(*overrides: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(*overrides), capture_output=True, text=True, timeout=120)


def play(steps, start):
    return catch_play(steps, 1, start)


def test_an_interrupted_collection_goes_on_with_the_next_episode(tmp_path):
    def until_the_third(steps, start):
        for episode in play(steps, start):
            if episode.info["episode"] == 3:
                raise KeyboardInterrupt
            yield episode

    card = catch_card(1)
    with pytest.raises(KeyboardInterrupt):
        collect(tmp_path / "a", card, until_the_third, 38)
    assert len(Store.open(tmp_path / "a").lengths) == 3
    figures = collect(tmp_path / "a", card, play, 38)
    collect(tmp_path / "b", card, play, 38)
    a, b = Store.open(tmp_path / "a"), Store.open(tmp_path / "b")
    assert figures["steps"] == 40  # whole episodes
    for i in range(10):
        np.testing.assert_array_equal(a.episode(i).obs, b.episode(i).obs)
        assert a.episode_info(i)["info"] == b.episode_info(i)["info"]
    assert collect(tmp_path / "a", card, play, 38) == figures  # nothing left to do
    assert collect(tmp_path / "a", card, play, 60)["episodes"] == 15
    with pytest.raises(UserError, match="was collected with seed=1 .* another store="):
        collect(tmp_path / "a", catch_card(2), play, 80)


def test_the_command_on_the_toy_game(tmp_path):
    store = tmp_path / "catch"
    done = run("game=catch", "steps=100", f"store={store}")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, str(store)), done.stderr
    figures = json.loads((store / "metrics.json").read_text())
    assert (figures["steps"], figures["episodes"], sum(figures["rewards"].values())) == (100, 25, 100)
    again = run("game=catch", "steps=100", f"store={store}")
    assert again.returncode == 0
    assert "nothing to do" in again.stdout


def test_sigterm_keeps_finished_episodes_and_mistakes_are_one_sentence(tmp_path):
    store = tmp_path / "pong"
    overrides = ("game=pong", f"store={store}", "source.time_limit=100")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command(*overrides, "steps=100000"), **pipes)
    until = time.monotonic() + 60
    while not list(store.glob("staging/*/*.npz")) and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    kept = len(Store.open(store).lengths)
    assert kept >= 1
    finished = run(*overrides, f"steps={100 * (kept + 1)}")
    assert finished.returncode == 0, finished.stderr
    assert [Store.open(store).episode_info(i)["info"]["episode"] for i in range(kept + 1)] == list(range(kept + 1))

    for wrong, words in (
        (("game=breakout", *overrides[1:]), "game=pong and cannot go on with breakout"),
        (("game=pnog", *overrides[1:]), "did you mean 'pong'"),
    ):
        refused = run(*wrong)
        assert refused.returncode == 2
        assert words in refused.stderr
        assert len(refused.stderr.splitlines()) == 1
    assert len(Store.open(store).lengths) == kept + 1
