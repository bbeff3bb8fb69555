"""MuZero from a log to the real game by the program itself: trained, resumed, searched in bulk, played, and refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from hydra import compose, initialize_config_dir

from tests.conformance import check_policy
from tests.conftest import QUICK, ROOT
from tests.integration.test_resume import same
from worldmodels.callbacks import LastCheckpoint
from worldmodels.commands._entry import enter
from worldmodels.data.sources.catch_play import catch_card, catch_play
from worldmodels.data.store import Store
from worldmodels.data.targets import COLUMNS
from worldmodels.learners.acting import muzero_policy
from worldmodels.learners.muzero import load_muzero, searching
from worldmodels.learners.reanalysing import reanalyse
from worldmodels.portable.adapter import own_digest
from worldmodels.portable.folder import load_model
from worldmodels.types import UserError

RUN = Callable[..., tuple[int, str, str]]
BALLS = {"balls": 4, "at_most": 0.6}
FAST = [*QUICK, "data.batch_size=4", "learner.search.num_simulations=3", "callbacks.last.every=5"]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four balls an episode, and no episode with more than half of the best return."""
    path = tmp_path_factory.mktemp("stores") / "balls"
    with Store.create(path, catch_card(0, 0.45, **BALLS)) as store:
        for episode in catch_play(640, 0, skill=0.45, **BALLS):
            assert episode.info["return"] <= 2
            store.append(episode)
    return path


@pytest.fixture
def trained(ok: Callable[..., str], log: Path, tmp_path: Path) -> Path:
    settings = ["experiment=catch_muzero", f"store={log}", f"out={tmp_path / 'run'}", *FAST]
    ok("train", *settings, "trainer.max_steps=4")
    return tmp_path / "run" / "best.ckpt"


@pytest.mark.parametrize(
    ("stop", "more"), [(7, []), (6, ["data.priority.alpha=0.6", "data.fraction=0.5"])], ids=["plain", "priority"]
)
def test_a_run_that_is_resumed_is_the_same_bit_for_bit(
    ok: Callable[..., str], log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int, more: list[str]
) -> None:
    """Stopped between two renewals of the target network, or at the very step of one and before its validation."""
    settings = ["experiment=catch_muzero", f"store={log}", *FAST, "learner.schedule=constant", *more]
    settings += ["learner.target_every=3"]
    for out, stops in (("straight", [10]), ("broken", [stop, 10])):
        for steps in stops:
            with monkeypatch.context() as killed:
                if steps == 6:
                    killed.setattr(LastCheckpoint, "on_validation_end", lambda *_: None)
                ok("train", *settings, f"out={tmp_path / out}", f"trainer.max_steps={steps}")
    a, b = (torch.load(tmp_path / out / "last.ckpt", weights_only=True) for out in ("straight", "broken"))
    for part in ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "target"):
        same(a[part], b[part], part)


def test_targets_of_a_bulk_search_are_trained_on(
    ok: Callable[..., str], trained: Path, log: Path, tmp_path: Path
) -> None:
    arguments = ["reanalyse", f"checkpoint={trained}", f"store={log}", "trainer.accelerator=cpu"]
    told = ok(*arguments, f"out={tmp_path / 'targets'}")
    metrics = json.loads((tmp_path / "targets" / "metrics.json").read_text())
    assert metrics["rows"] == Store.open(log).offsets[-1]
    assert f"data.version={metrics['version']}" in told
    assert metrics["step"] == 4
    out = tmp_path / "second"
    settings = ["experiment=catch_muzero", f"store={log}", f"out={out}", *FAST, "data.fraction=0"]
    ok("train", *settings, "data.version=newest", "trainer.max_steps=6", "trainer.log_every_n_steps=1")
    header, *lines = (out / "metrics.csv").read_text().splitlines()
    columns = dict(zip(header.split(","), zip(*(line.split(",") for line in lines), strict=True), strict=True))
    assert {v for v in columns["train/fresh"] if v} == {"0.0"}
    again = tmp_path / "third"  # every target that is used, and not only the share of the rows that have one
    ok("train", *settings[:2], f"out={again}", *FAST, "trainer.max_steps=2", "trainer.log_every_n_steps=1")
    header, *lines = (again / "metrics.csv").read_text().splitlines()
    place = header.split(",").index("train/fresh")
    assert {cell for line in lines if (cell := line.split(",")[place])} == {"1.0"}
    assert float(next(v for v in columns["train/logged"] if v)) == 0
    assert [float(v) for v in columns["train/target_age"] if v][-1] == 5 - 4


def test_a_bulk_search_by_another_planner(ok: Callable[..., str], trained: Path, log: Path, tmp_path: Path) -> None:
    """Of other rules, which take no Gumbel noise though the search of the training did, and under a name of choice."""
    arguments = [f"checkpoint={trained}", f"store={log}", "trainer.accelerator=cpu", f"out={tmp_path / 'targets'}"]
    ok("reanalyse", *arguments, "planner=puct", "planner.num_simulations=4", "version=7")
    store, (model, _) = Store.open(log), load_muzero(trained)
    puct = searching({"_target_": "worldmodels.planning.planners.puct", "num_simulations": 4})
    reanalyse(store, model, puct, "quiet", tmp_path / "parts", {"accelerator": "cpu", "devices": 1}, None, step=4)
    for name in COLUMNS.values():
        assert np.array_equal(store.side(name, "7"), store.side(name, "quiet"))


def test_a_bulk_search_sees_frames_as_training_did(ok: Callable[..., str], log: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    settings = ["experiment=catch_muzero", f"store={log}", f"out={out}", *FAST, "data.transform.size=12"]
    ok("train", *settings, "trainer.max_steps=2")
    ok("reanalyse", f"checkpoint={out / 'best.ckpt'}", f"store={log}", f"out={tmp_path}", "trainer.accelerator=cpu")
    assert json.loads((tmp_path / "metrics.json").read_text())["rows"] == Store.open(log).offsets[-1]


@pytest.mark.parametrize("learner", ["muzero", "muzero_cloning"])
def test_a_portable_folder_is_the_checkpoint(ok: Callable[..., str], log: Path, tmp_path: Path, learner: str) -> None:
    """To the bit, in what it plays and searches, with frames as training saw them; and its card tells what it is."""
    out, folder = tmp_path / "run", tmp_path / "folder"
    fast = [setting for setting in FAST if learner == "muzero" or "search" not in setting]
    settings = ["experiment=catch_muzero", f"learner={learner}", f"store={log}", f"out={out}", *fast]
    ok("train", *settings, "trainer.max_steps=3", "data.transform.size=40")
    ok("export-model", f"checkpoint={out / 'best.ckpt'}", f"out={folder}", "licence=mit")
    ok("export-model", f"checkpoint={folder}", f"out={tmp_path / 'again'}")
    (model, given), (other, told) = load_muzero(out / "best.ckpt"), load_muzero(folder)
    same(model.state_dict(), other.state_dict(), "weights")
    same(model.state_dict(), load_model(tmp_path / "again")[0].state_dict(), "weights")
    assert {name: given[name] for name in told} == told and told["global_step"] == 3
    about = json.loads((folder / "model.json").read_text())
    assert (about["kind"], about["actions"]["legal"]) == ("MuZero", model.actions)
    card = ModelCard((folder / "README.md").read_text())
    assert (card.data.pipeline_tag, "muzero" in card.data.tags) == ("reinforcement-learning", True)
    assert f"checkpoint_step: {about['run']['checkpoint_step']}" in card.text
    found = []
    for name, checkpoint in {"run": out / "best.ckpt", "folder": folder}.items():
        place = [f"checkpoint={checkpoint}", "game=catch", "protocol=store", "episodes=2", "films=0"]
        ok("evaluate", *place, f"out={tmp_path / 'played' / name}")
        lines = (tmp_path / "played" / name / "results.jsonl").read_text().splitlines()
        played = [{k: json.loads(line)[k] for k in ("episode", "return", "length")} for line in lines]
        bulk = [f"checkpoint={checkpoint}", f"store={log}", f"version={learner}-{name}", "trainer.accelerator=cpu"]
        ok("reanalyse", *bulk, f"out={tmp_path / 'searched' / name}")
        columns = [Store.open(log).side(column, f"{learner}-{name}").tobytes() for column in COLUMNS.values()]
        found.append((played, columns))
    assert found[0] == found[1]
    about["run"]["learner"].pop("search")
    about["sha256"] = own_digest(about)
    (folder / "model.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="lacks search in its run"):
        load_model(folder)


@pytest.mark.parametrize("recurrent", [False, True])
def test_it_plays_as_any_policy(ok: Callable[..., str], log: Path, tmp_path: Path, recurrent: bool) -> None:
    out = tmp_path / "run"
    settings = ["experiment=catch_muzero", f"store={log}", f"out={out}", *FAST, f"model.recurrent={recurrent}"]
    ok("train", *settings, "trainer.max_steps=2", "callbacks=scored", "callbacks.games.episodes=2")
    policy, _ = muzero_policy(out / "best.ckpt")
    frames = torch.randint(0, 256, (3, 3, 20, 20), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    check_policy(policy, frames)
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        asked = [f"checkpoint={out / 'best.ckpt'}", "game=catch", "protocol=store", f"out={tmp_path}"]
        elsewhere: Any = enter(compose("evaluate", asked), "meta").policy
    assert elsewhere.start(2)["frames"].is_meta and elsewhere.recurrent.__self__.index.is_meta  # and its model
    place = [f"checkpoint={out / 'best.ckpt'}", "game=catch", "protocol=store", "episodes=3", "films=0"]
    for name in ("own", "prior", "puct", "one_step"):
        ok("evaluate", *place, *([] if name == "own" else [f"planner={name}"]), f"out={tmp_path / name}")
        assert json.loads((tmp_path / name / "metrics.json").read_text())["episodes"] == 3
    ok("scores", f"results=[{tmp_path / 'own'},{tmp_path / 'prior'}]", f"out={tmp_path / 'scores'}")
    agents = json.loads((tmp_path / "scores" / "metrics.json").read_text())["agents"]
    assert agents.keys() == {"run", "run (planner=prior)"}, "one checkpoint, and both ways in which it played"


def test_mistakes_end_in_one_sentence(in_process: RUN, trained: Path, log: Path, tmp_path: Path) -> None:
    run = ["train", f"store={log}", f"out={tmp_path / 'out'}", *QUICK, "trainer.max_steps=2"]
    muzero = [*run, "experiment=catch_muzero"]
    bulk = ["reanalyse", f"checkpoint={trained}", f"store={log}", f"out={tmp_path / 'out'}", "trainer.accelerator=cpu"]
    assert in_process(*bulk, "version=mine")[0] == 0
    played = ["evaluate", f"checkpoint={trained}", "game=catch", "protocol=store", f"out={tmp_path / 'out'}"]
    mistakes = [
        ([*muzero, "data.fraction=1.5"], ["data.fraction=1.5", "from 0"]),
        ([*muzero, "data.version=nowhere"], ["no side column"]),
        ([*muzero, "data.length=5"], ["at least 9", "model.td_steps"]),
        ([*muzero, "model.gamma=2"], ["model.gamma=2", "from 0 to 1"]),
        (
            [*muzero, "learner=muzero_cloning", "+planner@learner.search=puct", "learner.row_noise=true"],
            ["row_noise=false"],
        ),
        ([*muzero, "learner=muzero_base"], ["muzero_base"]),
        ([*muzero, "learner.target_every=0"], ["learner.target_every=0", "at least 1"]),
        ([*run, "learner=muzero", "data=default"], ["data=reanalyse"]),
        ([*run, "learner=muzero", "model=actor_critic"], ["model=muzero"]),
        ([*muzero, "data.left_padding=0"], ["data.left_padding=0", "at least 1", "episodes begin"]),
        ([*muzero, "learner.actions=[1]"], ["learner.actions=[1]", "none of the log of catch"]),
        ([*muzero, "learner.actions=3"], ["learner.actions=3", "[0,3,4]"]),
        ([*muzero, "learner.search=puct"], ["learner.search=puct", "planner@learner.search"]),
        ([*muzero, "learner.search.max_considered=4"], ["max_considered=4", "the 3 legal actions", "at most 3"]),
        ([*bulk, "planner=gumbel", "planner.max_considered=4"], ["max_considered=4", "the 3 legal actions"]),
        ([*played, "planner=gumbel", "planner.max_considered=4"], ["max_considered=4", "the 3 legal actions"]),
        ([*muzero, "data.version=mine", "model.gamma=0.5"], ["gamma=0.95", "0.5", "search again"]),
        ([*muzero, "data.version=mine", "learner.clip_rewards=false"], ["clip_rewards=True", "search again"]),
        ([*bulk, "version=newest"], ["version=newest", "a name of"]),
        ([*bulk, "trainer.devices=0"], ["Lightning refuses the settings of trainer"]),
        ([*bulk, "version=mine", "planner=one_step"], ["other targets of the name mine"]),
        (["reanalyse", f"checkpoint={trained}", "store=https://a.b/c", f"out={tmp_path}"], ["only be read"]),
        (["reanalyse", f"checkpoint={tmp_path}", f"store={log}", f"out={tmp_path / 'out'}"], ["no model.json"]),
        (["imagine", f"checkpoint={trained}", f"store={log}", f"out={tmp_path}"], ["without a probe", "model.probe"]),
    ]
    for given, parts in mistakes:
        code, _, err = in_process(*given)
        assert (code, err.count("\n")) == (2, 1), (given[-1], err)
        for part in parts:
            assert part in err, err


@pytest.mark.exhaustive
def test_it_learns_more_than_the_log_shows(ok: Callable[..., str], tmp_path: Path) -> None:
    """From eight balls an episode and none above half of the best return, far above the best episode of the log."""
    source = ["source.balls=8", "source.skill=0.45", "source.at_most=0.6"]
    ok("collect", "game=catch", *source, "steps=12000", f"store={tmp_path / 'log'}")
    quick = [q for q in QUICK if "windows" not in q]
    ok("train", "experiment=catch_muzero", f"store={tmp_path / 'log'}", f"out={tmp_path / 'run'}", *quick)
    place = [f"checkpoint={tmp_path / 'run' / 'best.ckpt'}", "game=catch", "protocol=store", "films=0"]
    ok("evaluate", *place, "episodes=100", f"out={tmp_path / 'played'}")
    assert json.loads((tmp_path / "played" / "metrics.json").read_text())["return_mean"] > 4
