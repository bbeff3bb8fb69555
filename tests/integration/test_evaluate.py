"""`worldmodels evaluate` and `worldmodels scores`: figures, going on after an interrupt, and mistakes."""

import csv
import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.conftest import arguments, environment
from tests.integration.test_resume import heed_interrupts
from worldmodels.data.sources.atari_play import atari_card, atari_play
from worldmodels.data.store import Store

RUN = Callable[..., tuple[int, str, str]]
CATCH = ["game=catch", "protocol=store", "device=cpu"]


@pytest.fixture(scope="module")
def sticky_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten steps of Pong with sticky actions."""
    path, protocol = tmp_path_factory.mktemp("stores") / "sticky", {"sticky_prob": 0.25, "time_limit": 10}
    with Store.create(path, atari_card(0, game="pong", **protocol)) as store:
        for episode in atari_play(10, 0, game="pong", **protocol):
            store.append(episode)
    return path


def cut_games(path: Path, game: str) -> Path:
    with Store.create(path, atari_card(0, game=game, time_limit=30)) as store:
        for episode in atari_play(300, 0, game=game, time_limit=30):
            store.append(episode)
    return path


@pytest.fixture(scope="module")
def pong_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten games of Pong that were cut after 30 steps."""
    return cut_games(tmp_path_factory.mktemp("stores") / "pong", "pong")


@pytest.fixture(scope="module")
def breakout_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten games of Breakout that were cut after 30 steps."""
    return cut_games(tmp_path_factory.mktemp("stores") / "breakout", "breakout")


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_figures_of_random_play_and_of_scores(in_process: RUN, catch_store: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        args = ["evaluate", "policy=random", *CATCH, f"store={catch_store}", "episodes=30", f"seed={seed}"]
        code, out, err = in_process(*args, f"out={tmp_path / str(seed)}", "compare=true")
        assert code == 0, err
        assert "random in catch, 30 episodes by store" in out and "human: 1.0" in out
        assert out.rstrip().endswith(str(tmp_path / str(seed)))
    found = json.loads((tmp_path / "0" / "metrics.json").read_text())
    assert found["return_mean"] == sum(line["return"] for line in lines(tmp_path / "0")) / 30
    assert found["hns"] == pytest.approx((found["return_mean"] + 0.6) / 1.6)
    assert found["rules"]["frame_skip"] == 1 and found["steps"] == 120
    assert (tmp_path / "0" / "episode_0.mp4").stat().st_size > 0
    code, out, _ = in_process(*args, f"out={tmp_path / '1'}")
    assert code == 0 and "Already done" not in out  # compare= is another setting
    code, out, _ = in_process(*args, f"out={tmp_path / '1'}")
    assert code == 0 and "Already done" in out and len(lines(tmp_path / "1")) == 30
    results = f"results=[{tmp_path / '0'},{tmp_path / '1'}]"
    code, out, err = in_process("scores", results, f"out={tmp_path / 'scores'}", "compare=true")
    assert code == 0, err
    assert "1 games x 2 runs" in out and "DIAMOND" in out
    agent = json.loads((tmp_path / "scores" / "metrics.json").read_text())["agents"]["random"]
    means = [sum(line["return"] for line in lines(tmp_path / str(k))) / 30 for k in (0, 1)]
    assert agent["mean"] == pytest.approx((sum(means) / 2 + 0.6) / 1.6)


def test_more_episodes_go_on_from_those_that_there_are(in_process: RUN, catch_store: Path, tmp_path: Path) -> None:
    def run(folder: str, episodes: int, *more: str) -> tuple[int, str, str]:
        args = ["evaluate", "policy=random", *CATCH, f"store={catch_store}", "slots=5", "films=0", *more]
        return in_process(*args, f"episodes={episodes}", f"out={tmp_path / folder}")

    assert run("twice", 20)[0] == 0 and run("twice", 40)[0] == 0 and run("once", 40)[0] == 0
    assert [line["episode"] for line in lines(tmp_path / "twice")] == [
        line["episode"] for line in lines(tmp_path / "once")
    ]
    figures = [json.loads((tmp_path / name / "metrics.json").read_text())["returns"] for name in ("twice", "once")]
    assert figures[0] == figures[1] and len(figures[0]) == 40
    for name in ("twice", "once"):
        code, _, err = in_process("scores", f"results={tmp_path / name}", f"out={tmp_path / 'scores' / name}")
        assert code == 0, err
    found = [json.loads((tmp_path / "scores" / name / "metrics.json").read_text()) for name in ("twice", "once")]
    assert found[0]["agents"] == found[1]["agents"]
    assert run("twice", 20)[0] == 0, "fewer of them again"
    assert len(json.loads((tmp_path / "twice" / "metrics.json").read_text())["returns"]) == 20
    before = (tmp_path / "twice" / "results.jsonl").read_bytes()
    code, _, err = run("twice", 40, "agent=other")
    assert code == 2 and "under agent=random" in err and err.count("\n") == 1
    assert (tmp_path / "twice" / "results.jsonl").read_bytes() == before


def test_an_interrupt_keeps_what_is_done_and_the_same_command_goes_on(tmp_path: Path) -> None:
    def command(out: Path) -> list[str]:
        game = ["policy=random", "game=breakout", "episodes=6", "slots=2", "protocol.time_limit=60", "films=0"]
        return arguments("evaluate", *game, "device=cpu", f"out={out}")

    out, straight = tmp_path / "cut", tmp_path / "straight"
    options = {"env": environment(), "cwd": tmp_path, "stderr": subprocess.PIPE, "text": True}
    cut = subprocess.Popen(command(out), **options, preexec_fn=heed_interrupts)
    while cut.poll() is None and not (out / "results.jsonl").exists():
        time.sleep(0.02)
    below = psutil.Process(cut.pid).children(recursive=True)
    cut.send_signal(signal.SIGINT)
    _, err = cut.communicate(timeout=60)
    assert cut.returncode == 130 and "interrupted" in err
    assert below and not [p for p in below if p.is_running()]
    assert 0 < len(lines(out)) < 6 and not (out / "metrics.json").exists()
    for folder in (out, straight):
        subprocess.run(command(folder), env=environment(), cwd=tmp_path, check=True, timeout=120)
    assert sorted(lines(out), key=lambda line: line["episode"]) == sorted(
        lines(straight), key=lambda line: line["episode"]
    )
    assert len(lines(out)) == 6 and (out / "metrics.json").exists()


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ([], ["who plays", "checkpoint=... or policy=random"]),
        (["policy=random", "checkpoint=x.ckpt"], ["who plays"]),
        (["policy=random"], ["the game is missing", "game=pong"]),
        (["policy=random", "game=pongg"], ["unknown game 'pongg'", "did you mean 'pong'?"]),
        (["policy=clever", "game=pong"], ["policy=clever is unknown", "random, sticky, scripted or an action"]),
        (["policy=down", "game=breakout"], ["another action set", "DOWN"]),
        (["policy=scripted", "game=seaquest"], ["no scripted player of seaquest"]),
        (["policy=random", "game=pong", "episodes=0"], ["episodes=0", "at least 1"]),
        (["policy=random", "game=pong", "slots=0"], ["slots=0", "at least 1"]),
        (["policy=random", "game=pong", "protocol=diamond"], ["unknown protocol 'diamond'", "diamond-100k"]),
        (["policy=random", "game=pong", "protocol=store"], ["protocol=store takes", "give store=..."]),
        (["policy=random", "game=pong", "protocol.sticky_prob=2"], ["protocol.sticky_prob=2", "out of range"]),
        (["policy=random", "game=pong", "protocol.actions=[3,99]"], ["protocol.actions", "out of range"]),
        (["policy=scripted", "game=pong", "protocol.actions=[0,1]"], ["another action set", "RIGHTFIRE"]),
        (["policy=random", "game=pong", "colour=blue"], ["colour=blue is unknown", "rgb, ale_gray"]),
        (["policy=random", "game=pong", "store=STICKY"], ["sticky_prob=0.0", "0.25", "protocol=store"]),
        (["policy=random", "game=breakout", "store=STICKY"], ["sticky is of pong", "breakout"]),
        (["policy=random", "game=catch", "store=CATCH"], ["frame_skip=4", "card has 1"]),
        (
            ["policy=random", "game=catch", "store=CATCH", "protocol=store", "protocol.time_limit=2"],
            ["time_limit=2", "card has 4"],
        ),
        (["policy=random", "game=pong", "store=nowhere"], ["nowhere"]),
        (["checkpoint=none.ckpt"], ["no checkpoint at", "none.ckpt"]),
        (["policy=random", "game=pong", "protocol.lives=1"], ["unknown setting 'protocol.lives'"]),
        (["policy=random", "game=catch"], ["catch is not played by protocol=diamond-100k", "store=..."]),
        (["policy=random", "game.name=pongg"], ["the game 'pongg' is unknown"]),
    ],
)
def test_mistakes(
    settings: list[str], parts: list[str], refused: Callable[..., str], catch_store: Path, sticky_store: Path,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    stores = {"store=CATCH": f"store={catch_store}", "store=STICKY": f"store={sticky_store}"}
    err = refused("evaluate", "out=x", *(stores.get(s, s) for s in settings))
    for part in parts:
        assert part in err
    assert not (tmp_path / "x").exists(), "nothing half-written"


def test_scores_of_different_rules_are_refused(
    refused: Callable[..., str], in_process: RUN, catch_store: Path, tmp_path: Path
) -> None:
    args = ["evaluate", "policy=random", *CATCH, f"store={catch_store}", "episodes=2", "films=0"]
    in_process(*args, f"out={tmp_path / 'a'}")
    in_process(*args, f"out={tmp_path / 'b'}", "protocol.epsilon=0.5")
    both = f"results=[{tmp_path / 'a'},{tmp_path / 'b' / 'results.jsonl'}]"
    err = refused("scores", both, f"out={tmp_path / 'scores'}")
    assert "different rules cannot be put together" in err and "store (changed)" in err
    assert not (tmp_path / "scores").exists()
    assert "no results at" in refused("scores", f"results={tmp_path / 'none'}", f"out={tmp_path / 'scores'}")


def test_a_crash_of_the_game_is_one_sentence(
    refused: Callable[..., str], in_process: RUN, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from worldmodels.envs.child import ChildEnv

    real, calls = ChildEnv.step, []

    def step(self: ChildEnv, actions: object) -> object:
        calls.append(1)
        if len(calls) == 45:
            psutil.Process(self._process.pid).kill()
        return real(self, actions)

    args = ["evaluate", "policy=random", "game=pong", "episodes=4", "slots=2", "protocol.time_limit=30", "films=0"]
    with monkeypatch.context() as patched:
        patched.setattr(ChildEnv, "step", step)
        err = refused(*args, f"out={tmp_path / 'x'}")
    assert "the real game crashed in step 15 of episodes 2 to 3 (its process ended with SIGKILL)" in err
    assert [line["episode"] for line in lines(tmp_path / "x")] == [0, 1]
    assert not (tmp_path / "x" / "metrics.json").exists() and not psutil.Process().children()
    assert in_process(*args, f"out={tmp_path / 'x'}")[0] == 0
    assert [line["episode"] for line in lines(tmp_path / "x")] == [0, 1, 2, 3]


def train(in_process: RUN, store: Path, out: Path, *settings: str) -> dict:
    steps = ["trainer.max_steps=4", "trainer.val_check_interval=2", "trainer.accelerator=cpu", "logger=csv"]
    code, _, err = in_process("train", "experiment=catch_cloning", f"store={store}", f"out={out}", *steps, *settings)
    assert code == 0, err
    return json.loads((out / "metrics.json").read_text())


def test_a_policy_is_scored_in_training_and_after_it(
    in_process: RUN, refused: Callable[..., str], pong_store: Path, breakout_store: Path, sticky_store: Path,
    catch_store: Path, tmp_path: Path,
) -> None:  # fmt: skip
    before = psutil.Process().children(recursive=True)
    games = ["callbacks.games.episodes=3", "callbacks.games.slots=2"]
    scored = train(in_process, pong_store, tmp_path / "scored", "callbacks=scored", *games)
    assert psutil.Process().children(recursive=True) == before
    plain = train(in_process, pong_store, tmp_path / "plain")
    assert scored["weights_sha256_by_rank"] == plain["weights_sha256_by_rank"], "playing changes nothing"
    with (tmp_path / "scored" / "metrics.csv").open() as file:
        returns = [row["val/return"] for row in csv.DictReader(file) if row["val/return"]]
    assert len(returns) == 2 and scored["final"]["return"] == pytest.approx(float(returns[-1]))
    assert scored["final"]["hns"] == pytest.approx((scored["final"]["return"] + 20.7) / 35.3)

    best = f"checkpoint={tmp_path / 'scored' / 'best.ckpt'}"
    out = ["episodes=3", "slots=2", "device=cpu", f"out={tmp_path / 'x'}"]
    code, text, err = in_process("evaluate", best, "protocol=store", *out)
    assert code == 0, err
    assert "scored in pong, 3 episodes by store" in text and "30 steps, 3 cut by the time limit" in text
    for settings, parts in (
        (["game=breakout"], ["plays pong", "game=breakout"]),
        (["protocol=machado-sticky"], ["sticky_prob=0.25 but the store's card has 0.0", "protocol=store"]),
        (["protocol=store", f"store={sticky_store}"], ["sticky_prob=0.25", "0.0"]),
        (["protocol=store", "protocol.actions=[0,1]"], ["another action set", "protocol=store"]),
    ):
        err = refused("evaluate", best, *settings, *out[:-1], f"out={tmp_path / 'refused'}")
        assert all(part in err for part in parts), err
    world = tmp_path / "world"
    few = ["trainer.max_steps=2", "data.validation.windows=4", "callbacks.dream=null", "logger=csv"]
    code, _, err = in_process("train", "experiment=catch", f"store={catch_store}", f"out={world}", *few)
    assert code == 0, err
    err = refused("evaluate", f"checkpoint={world / 'best.ckpt'}", *out[:-1], f"out={tmp_path / 'refused'}")
    assert "holds a world model and no policy" in err
    for settings, words in (
        (["catch_cloning", f"store={pong_store}", "callbacks.games.protocol.sticky_prob=0.5"], "the store's card has"),
        (["catch", f"store={catch_store}"], "plays policies and here a world model is trained"),
        (["catch_cloning", f"store=[{pong_store},{breakout_store}]"], "the log is of pong and breakout"),
    ):
        err = refused("train", f"experiment={settings[0]}", *settings[1:], f"out={tmp_path / 'y'}", *few[:2],
                      "callbacks=scored", "logger=csv")  # fmt: skip
        assert words in err and not (tmp_path / "y" / "last.ckpt").exists(), "before the first step"
    assert not (tmp_path / "refused").exists()
