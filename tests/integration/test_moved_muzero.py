"""A MuZero that is moved to another game by the program itself, in each way, and what is refused."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir

from tests.conftest import QUICK, ROOT
from worldmodels.config import plain, sized
from worldmodels.data.sources.catch_play import catch_card, catch_play
from worldmodels.data.store import Store
from worldmodels.learners.acting import muzero_policy
from worldmodels.learners.adapting import METHODS
from worldmodels.learners.fit import fit
from worldmodels.learners.muzero import load_muzero
from worldmodels.portable.checkpoints import read_checkpoint, read_tensors
from worldmodels.portable.export import export_model

RUN = Callable[..., tuple[int, str, str]]
GAMES = {"catch": [0, 3, 4], "freeway": [0, 2, 5], "boxing": [0, 1, 3]}
"""Of Boxing, FIRE is left: what flips left and right takes RIGHT to an action that it does not have."""
FEW = [*QUICK, "data.batch_size=4", "learner.warmup=1", "trainer.val_check_interval=2", "trainer.max_steps=4"]
MOVED = [*FEW, "windows=5", "learner.target_every=3", "scratch=false"]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stores of three games, which are Catch by other actions, and MuZeros of the first.

    `one` knows its actions alone, `told` is told of its game by name, `turned` and `flipped` flip left and right, and
    `base` is `told` for others.
    """
    root = tmp_path_factory.mktemp("moved")
    for k, (game, actions) in enumerate(GAMES.items()):
        moves = np.zeros(18, np.uint8)
        moves[GAMES["catch"]] = actions
        card = catch_card(k, 0.45, balls=4, at_most=0.6) | {"game": game, "action_set": actions}
        with Store.create(root / game, card) as store:
            for episode in catch_play(480, k, skill=0.45, balls=4, at_most=0.6):
                store.append(replace(episode, action=moves[episode.action], reward=episode.reward * (1 + 4 * (k == 2))))
    for name, more in (
        ("one", ["learner.clip_rewards=false"]),
        ("told", ["model.games={unknown: 0.1}"]),
        ("turned", ["model.turned=flip_lr"]),
        ("flipped", ["model.symmetry=flip_lr"]),
    ):
        with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
            line = ["experiment=catch_muzero", f"store={root / 'catch'}", f"out={root / name}", *FEW, *more]
            line += ["learner.search.num_simulations=3", "trainer.max_steps=2", "learner.lr=0.01"]
            settings = plain(compose("train", line))
        fit({**settings, "model": sized(settings["model"])}, root / name)
    export_model(root / "told" / "best.ckpt", root / "base")
    return root


def move(places: Path, base: str, game: str, out: Path, *more: str) -> list[str]:
    return ["finetune", f"checkpoint={places / base}", f"store={places / game}", f"out={out}", *MOVED, *more]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_muzero(path)[0].state_dict()


@pytest.mark.parametrize("method", METHODS)
def test_each_way_from_a_folder(ok: Callable[..., str], places: Path, tmp_path: Path, method: str) -> None:
    """The new game has a row and a name, in the checkpoint and beside the base alone."""
    if method == "lora":
        pytest.importorskip("peft")
    shown = ok(*move(places, "base", "freeway", tmp_path, f"method={method}", "lora.rank=2"))
    run, begun = tmp_path / "finetuned", weights(places / "base")
    best, told = load_muzero(run / "best.ckpt")
    assert told["actions"] == {"catch": [0, 3, 4], "freeway": [0, 2, 5]} and best.games.names == ["catch", "freeway"]
    assert told["search"]["num_simulations"] == 3 and told["target_every"] == 3, "as it was trained, and as was said"
    assert muzero_policy(run / "best.ckpt", game="freeway")[0].actions == [0, 2, 5]
    begun["game.weight"] = begun["game.weight"][[0, 1, 0]]
    own = best.state_dict()
    changed = {name for name in own if not torch.equal(own[name], begun[name])}
    heads = ("policy.output.", "value.", "reward.", "end.")
    allowed = {
        "full": lambda name: True,
        "heads": lambda name: name.startswith(heads),
        "bias": lambda name: "bias" in name or ".norm" in name or ".output.1." in name or ".blocks." in name,
        "lora": lambda name: True,
    }[method]
    assert changed and all(allowed(name) for name in changed) and not changed & {"mean", "scale"}
    assert (method in ("full", "lora")) == ("game.weight" in changed)
    figures, ended = (json.loads((path / "metrics.json").read_text()) for path in (tmp_path, run))
    final, share = ended["final"], told["model"]["weights"]["policy"]
    assert final["held_out"] == pytest.approx(share * final["loss_policy"] - final["loss"], rel=1e-4)
    assert ended["best_held_out"] >= final["held_out"] - 1e-6 and "finetuned: on the test split loss " in shown
    assert {"finetune_loss", "finetune_loss_reward", "finetune_loss_value"} <= set(figures)
    assert (tmp_path / "curves.svg").stat().st_size > 0
    if method == "full":
        assert not (run / "adapter").exists()
        return
    assert ended["trained_parameters"] < ended["parameters"] / 2
    shutil.copytree(run / "adapter", tmp_path / "adapter")
    shutil.copytree(places / "base", tmp_path / "base")
    alone, also = load_muzero(tmp_path / "adapter")
    assert also["actions"] == told["actions"] and also["search"] == told["search"]
    assert also["global_step"] == told["global_step"]
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(value, own[name], atol=1e-5, rtol=0)
    export_model(tmp_path / "adapter", tmp_path / "whole")
    assert load_muzero(tmp_path / "whole")[1]["actions"] == told["actions"]


def test_a_move_goes_on_bit_for_bit_and_keeps_the_old_game(
    ok: Callable[..., str], refused: Callable[..., str], places: Path, tmp_path: Path
) -> None:
    line = ["budget=120", f"replay.store={places / 'catch'}", "l2_start=0.1", "layer_decay=0.5", "method=bias"]
    line += ["trainer.log_every_n_steps=1"]
    a, b = tmp_path / "a", tmp_path / "b"
    ok(*move(places, "told/best.ckpt", "freeway", a, *line))
    ok(*move(places, "told/best.ckpt", "freeway", b, *line, "trainer.max_steps=2", "learner.max_steps=4"))
    assert "resuming from" in ok(*move(places, "told/best.ckpt", "freeway", b, *line))
    one, other = (read_tensors(out / "finetuned" / "last.ckpt") for out in (a, b))
    for part in ("state_dict", "current_model_state", "target"):
        assert one[part].keys() == other[part].keys()
        assert all(torch.equal(value, other[part][name]) for name, value in one[part].items()), part
    bias = "policy.output.bias"
    newest = one["current_model_state"][f"model.{bias}"]
    assert not torch.equal(one["target"][bias], newest), "of step 3"
    assert not torch.equal(one["target"][bias], weights(places / "told" / "best.ckpt")[bias])
    rates = [group["initial_lr"] for group in one["optimizer_states"][0]["param_groups"] if group["params"]]
    assert max(rates) == 1e-3 and min(rates) < 2e-4
    assert one["hyper_parameters"]["card"]["games"] == ["freeway", "catch"]
    text = (a / "finetuned" / "metrics.csv").read_text()
    assert "train/start_distance" in text and "val/held_out" in text
    assert json.loads((a / "metrics.json").read_text())["work"]["runs"]["finetuned"]["final"]["freeway/loss"] > 0
    before = {path: path.read_bytes() for path in a.rglob("*") if path.is_file()}
    for change, told in (
        ("budget=160", "method=bias, budget=120 and not with method=bias, budget=160"),
        ("budget=null", "method=bias, budget=120 and not with method=bias;"),
        ("method=heads", "method=bias, budget=120 and not with method=heads, budget=120"),
    ):
        assert told in refused(*move(places, "told/best.ckpt", "freeway", a, *line, change))
    assert before == {path: path.read_bytes() for path in a.rglob("*") if path.is_file()}
    assert "finished before" in ok(*move(places, "told/best.ckpt", "freeway", a, *line))


def test_a_model_of_one_game_learns_another_and_stops_early(
    ok: Callable[..., str], places: Path, tmp_path: Path
) -> None:
    """By the vocabulary; held-out episodes of its budget say when, and training from scratch is judged alike."""
    line = move(places, "one/best.ckpt", "freeway", tmp_path, "budget=120", "patience=1", "learner.lr=0.3")
    ok(*line, "trainer.max_steps=40", "scratch=true")
    for name in ("finetuned", "scratch"):
        figures = json.loads((tmp_path / name / "metrics.json").read_text())
        assert figures["stopped_early"] and figures["steps"] < 40
        stored = read_checkpoint(tmp_path / name / "best.ckpt")
        assert stored["hyper_parameters"]["actions"] == {"catch": [0, 3, 4], "freeway": [0, 2, 5]}
        assert not stored["hyper_parameters"]["clip_rewards"]
        assert stored["global_step"] < figures["steps"], "the best was before"
    policy, _ = muzero_policy(tmp_path / "finetuned" / "best.ckpt", game="freeway")
    taken, _ = policy.act(torch.zeros(8, 3, 20, 20, dtype=torch.uint8), policy.start(8), torch.Generator())
    assert set(taken.tolist()) <= {0, 2, 5}
    figures = json.loads((tmp_path / "metrics.json").read_text())
    assert figures["finetune_loss"] != figures["scratch_loss"]


def test_symmetry(
    in_process: RUN, ok: Callable[..., str], refused: Callable[..., str], places: Path, tmp_path: Path
) -> None:
    """What is built in fits a game or not, also one that is replayed; what only turned windows is left out."""
    ok(*move(places, "flipped/best.ckpt", "freeway", tmp_path / "a"))
    told = refused(*move(places, "flipped/best.ckpt", "freeway", tmp_path / "b", f"replay.store={places / 'boxing'}"))
    assert "symmetry=flip_lr built in, under which the actions of boxing (NOOP, FIRE, RIGHT) are not closed" in told
    assert "trained with model.symmetry=none" in told and not (tmp_path / "b" / "finetuned").exists()
    code, _, err = in_process(*move(places, "turned/best.ckpt", "boxing", tmp_path / "c"))
    assert code == 0 and err.count("warning: the actions of boxing (NOOP, FIRE, RIGHT) are not closed") == 1
    for out, turned in (("c", "none"), ("d", "flip_lr")):
        if out == "d":
            assert "turned" not in in_process(*move(places, "turned/best.ckpt", "freeway", tmp_path / out))[2]
        stored = read_checkpoint(tmp_path / out / "finetuned" / "best.ckpt")
        assert stored["hyper_parameters"]["model"]["turned"] == turned


def test_mistakes_end_in_one_sentence(refused: Callable[..., str], places: Path, tmp_path: Path) -> None:
    best = f"checkpoint={places / 'told' / 'best.ckpt'}"
    told = refused("adapt-report", best, f"store={places / 'freeway'}", f"out={tmp_path / 'x'}")
    assert "holds a MuZero, which draws no frames to be judged by" in told and "`worldmodels finetune`" in told
    for base, game, more, part in (
        ("told/best.ckpt", "freeway", ["base=diffusion", "learner.target_every=null"], "unknown setting"),
        ("one/best.ckpt", "boxing", [], "the rewards of boxing in the log go from -5 to 5"),
        ("told/best.ckpt", "freeway", ["data.length=3"], "data.length=3"),
        (
            "told/best.ckpt",
            "freeway",
            ["learner.best=luck"],
            "learner.best=luck is unknown; choose one of newest, held",
        ),
        ("told/best.ckpt", "freeway", ["method=all"], "method=all is unknown"),
        ("flipped/best.ckpt", "freeway", ["method=lora"], "give method=full, heads or bias"),
    ):
        err = refused(*move(places, base, game, tmp_path / "out", *more))
        assert part in err and "model.reward.low=" not in err, err
        assert not list((tmp_path / "out").rglob("*.ckpt"))
    plain_line = ["finetune", best, f"store={places / 'freeway'}", f"out={tmp_path / 'out'}", *FEW, "base=diffusion"]
    assert "holds a MuZero: give base=muzero with it" in refused(*plain_line)
