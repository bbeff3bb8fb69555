"""Models that are handed on as folders: the same to the bit, taken by every command, refused where they differ."""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file, save_file

from tests.conftest import QUICK, ROOT, environment
from worldmodels.config import plain, sized
from worldmodels.data.card import card_digest
from worldmodels.data.sources.catch_play import catch_card
from worldmodels.data.store import Store
from worldmodels.imagination import RandomPolicy, imagine
from worldmodels.learners.fit import fit
from worldmodels.learners.policy import load_policy
from worldmodels.learners.world_model import load_learner
from worldmodels.portable.adapter import own_digest
from worldmodels.portable.export import export_model
from worldmodels.portable.folder import describe, load_model, read_starts
from worldmodels.types import ACTIONS, UserError

RUN = Callable[..., tuple[int, str, str]]
SETTINGS = [*QUICK, "trainer.max_steps=2"]


@pytest.fixture(scope="module")
def models(catch_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world model and a clone of two steps: the runs `world` and `clone`, and their folders `model` and `policy`."""
    root = tmp_path_factory.mktemp("portable")
    runs = {"world": ["experiment=catch"], "clone": ["experiment=catch_cloning", "head@model.head=mse"]}
    for run, experiment in runs.items():
        with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
            cfg = compose("train", [*experiment, f"store={catch_store}", f"out={root / run}", *SETTINGS])
            settings = plain(cfg)
        fit({**settings, "model": sized(settings["model"])}, root / run)
    export_model(root / "world" / "best.ckpt", root / "model", str(catch_store), 3, 3, "mit")
    export_model(root / "clone" / "best.ckpt", root / "policy")
    return root


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_folder_holds_the_model_to_the_bit(models: Path, catch_store: Path) -> None:
    model, about = load_model(models / "model")
    learner = load_learner(models / "world" / "best.ckpt")
    same(model.state_dict(), learner.model.state_dict())
    same(load_learner(models / "model").model.state_dict(), model.state_dict())
    card = Store.open(catch_store).card
    assert (about["kind"], about["card"], about["card_sha256"]) == ("world model", card, card_digest(card))
    assert about["actions"] == {"vocabulary": ACTIONS, "legal": [0, 3, 4]}
    assert about["model"] == learner.hparams["model"]
    policy, card_of_policy = load_policy(models / "policy")
    same(policy.state_dict(), load_policy(models / "clone" / "best.ckpt")[0].state_dict())
    assert card_of_policy == card and policy.actions == [0, 3, 4]
    observation = torch.randint(0, 256, (2, 3, 20, 20), dtype=torch.uint8)
    again = load_model(models / "policy")[0]
    features, _ = again.encoder(observation, again.start(2))
    assert torch.equal(again.preferences(features), policy.preferences(policy.encoder(observation, policy.start(2))[0]))


def test_dreams_need_no_store_and_no_lightning(models: Path) -> None:
    code = (
        "import sys, torch; from worldmodels import load_model, imagine, RandomPolicy\n"
        "from worldmodels.portable.folder import read_starts\n"
        f"model, about = load_model({str(models / 'model')!r}); starts = read_starts({str(models / 'model')!r})\n"
        "dream = imagine(model, RandomPolicy([0, 3, 4]), starts, 2, torch.Generator().manual_seed(0))\n"
        f"torch.save(dream.obs, {str(models / 'dream.pt')!r})\n"
        "print(sorted({m.partition('.')[0] for m in sys.modules} & {'lightning', 'pytorch_lightning', 'wandb'}))\n"
    )
    printed = subprocess.check_output([sys.executable, "-c", code], text=True, env=environment(), cwd=ROOT)
    assert printed.strip() == "[]"
    with pytest.raises(UserError, match="holds no start frames"):
        read_starts(models / "policy")
    model, starts = load_learner(models / "world" / "best.ckpt").model, read_starts(models / "model")
    assert starts.obs.shape == (3, 4, 3, 20, 20)
    dream = imagine(model, RandomPolicy([0, 3, 4]), starts, 2, torch.Generator().manual_seed(0))
    assert torch.equal(dream.obs, torch.load(models / "dream.pt", weights_only=True))


def test_the_model_card_tells_what_the_run_recorded(models: Path) -> None:
    from huggingface_hub import ModelCard

    figures = json.loads((models / "world" / "metrics.json").read_text())
    about = json.loads((models / "model" / "model.json").read_text())
    assert about["run"]["metrics"]["final"] == figures["final"]
    assert about["run"]["metrics"]["steps"] == about["run"]["checkpoint_step"] == 2
    assert str(models) not in json.dumps(about), "no path of the machine that trained is handed on"
    text = (models / "model" / "README.md").read_text()
    front = ModelCard(text).data
    assert (front.library_name, front.license, front.pipeline_tag) == ("worldmodels", "mit", None)
    assert {"world-models", "catch"} <= set(front.tags)
    assert f"metrics.final.rollout_psnr_changed: {figures['final']['rollout_psnr_changed']}" in text
    assert all(digest in text for digest in about["files"].values())
    front = ModelCard((models / "policy" / "README.md").read_text()).data
    assert (front.pipeline_tag, front.license) == ("reinforcement-learning", None)


def test_commands_take_a_folder_as_a_checkpoint(
    models: Path, catch_store: Path, in_process: RUN, tmp_path: Path
) -> None:  # imagine, finetune and evaluate do in test_diamond_weights.py
    judged = ["windows=4", "horizons=[1]", "burn_in=2", "reward_rows=20", "other_actions.windows=0", "spread.windows=0"]
    both = [f"checkpoint={models / 'model'}", f"baseline={models / 'world' / 'best.ckpt'}"]
    dream = [f"learner.world_model={models / 'model'}", f"learner.policy={models / 'policy'}"]
    for out, line in {
        "quality": ["quality", *both, *judged],
        "actor_critic": ["train", "experiment=catch_actor_critic", *dream, *SETTINGS],
        "plan": ["plan", "experiment=catch_actor_critic", *dream, *SETTINGS],
    }.items():
        code, _, err = in_process(*line, f"store={catch_store}", f"out={tmp_path / out}")
        assert code == 0, err
    quality = json.loads((tmp_path / "quality" / "metrics.json").read_text())
    assert quality["psnr_db"] == quality["baseline"]["psnr_db"], "the folder and the checkpoint are one model"
    sha = json.loads((models / "model" / "model.json").read_text())["sha256"]
    assert quality["settings"]["checkpoint_sha256"] == sha


def test_what_is_there_is_never_overwritten(models: Path, in_process: RUN, tmp_path: Path) -> None:
    line = ["export-model", f"checkpoint={models / 'clone' / 'best.ckpt'}", f"out={tmp_path / 'a'}"]
    for printed in ("", "lies there already"):
        code, out, err = in_process(*line)
        assert code == 0 and printed in out, err
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    code, _, err = in_process(*line, "licence=mit")
    assert (code, err.count("\n")) == (2, 1) and "holds something else" in err
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    code, _, err = in_process("export-model", f"checkpoint={tmp_path / 'a'}", f"out={tmp_path / 'b'}", "licence=mit")
    assert code == 0, err  # a folder can be exported again
    same(load_file(tmp_path / "a" / "model.safetensors"), load_file(tmp_path / "b" / "model.safetensors"))
    first, second = (json.loads((tmp_path / x / "model.json").read_text()) for x in "ab")
    assert (first["source"], first["run"], second["licence"]) == (second["source"], second["run"], "mit")


def test_a_figure_that_is_no_number_is_none() -> None:
    run = describe({}, catch_card(0), run={"metrics": {"score": float("nan"), "steps": 2}})["run"]
    assert run == {"metrics": {"score": None, "steps": 2}}


def rewrite(folder: Path, **changes: object) -> None:
    """Change model.json as one would who wants it to be believed: its own hash is mended."""
    about = json.loads((folder / "model.json").read_text()) | changes
    (folder / "model.json").write_text(json.dumps(about | {"sha256": own_digest(about)}))


def _other_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = min(weights)
    save_file(weights | {name: weights[name] + 1}, folder / "model.safetensors")


def _evil(folder: Path) -> None:
    about = json.loads((folder / "model.json").read_text())
    rewrite(folder, model=about["model"] | {"_target_": "worldmodels.data.disk.remove", "path": str(folder.parent)})


def _evil_part(folder: Path) -> None:
    about = json.loads((folder / "model.json").read_text())
    rewrite(folder, model=about["model"] | {"parts": [{"_target_": "os.system", "command": "true"}]})


def _another_network(folder: Path) -> None:
    about = json.loads((folder / "model.json").read_text())
    rewrite(folder, model=about["model"] | {"own_frames": 0.5, "image_channels": 1})


def _edited(folder: Path) -> None:
    (folder / "model.json").write_text((folder / "model.json").read_text().replace('"world model"', '"policy"'))


def _other_card(folder: Path) -> None:
    about = json.loads((folder / "model.json").read_text())
    rewrite(folder, card=about["card"] | {"frame_skip": 2})


def _no_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"12345678" + bytes(100))
    about = json.loads((folder / "model.json").read_text())
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    rewrite(folder, files=about["files"] | {"model.safetensors": digest})


FAULTS = {
    "its SHA-256 is": _other_weights,
    "which is not trusted": _evil,
    "'os.system', which is not trusted": _evil_part,
    "do not fit the model": _another_network,
    "not as it was written": _edited,
    "is not the one of card_sha256": _other_card,
    "no safetensors file": _no_safetensors,
    "is missing": lambda folder: (folder / "model.safetensors").unlink(),
    "has no model.json": lambda folder: (folder / "model.json").unlink(),
    "is damaged": lambda folder: (folder / "model.json").write_text("{"),
    "describes no model": lambda folder: (folder / "model.json").write_text("[]"),
    "lacks model,": lambda folder: rewrite(folder, model="worldmodels.models"),
    "lacks the field 'source'": lambda folder: rewrite(folder, card={}),
    "of a zebra": lambda folder: rewrite(folder, kind="zebra"),
    "version 2": lambda folder: rewrite(folder, version=2),
    "another action vocabulary": lambda folder: rewrite(folder, actions={"vocabulary": ["A"], "legal": [0]}),
    "names the files": lambda folder: rewrite(folder, files={"../model.safetensors": ""}),
}


@pytest.mark.parametrize("sentence", FAULTS)
def test_a_folder_that_is_not_as_it_was_written_is_refused(sentence: str, models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "model", tmp_path / "model")
    FAULTS[sentence](tmp_path / "model")
    with pytest.raises(UserError, match=sentence):
        read_starts(tmp_path / "model")
        load_learner(tmp_path / "model")
    assert (tmp_path / "model").exists()


def test_mistakes_end_in_one_sentence(models: Path, catch_store: Path, in_process: RUN, tmp_path: Path) -> None:
    shutil.copytree(models / "model", tmp_path / "changed")
    _other_weights(tmp_path / "changed")
    world = f"checkpoint={models / 'world' / 'best.ckpt'}"
    for line, part in (
        (["imagine", f"checkpoint={tmp_path / 'changed'}", f"store={catch_store}"], "its SHA-256 is"),
        (["quality", f"checkpoint={tmp_path}", f"store={catch_store}"], "has no model.json"),
        (["evaluate", f"checkpoint={models / 'model'}"], "holds a world model and no policy"),
        (["imagine", f"checkpoint={models / 'policy'}", f"store={catch_store}"], "holds a policy and no world model"),
        (["export-model", world, "starts=2"], "store=..."),
        (["export-model", world, "starts=-1"], "starts=-1 must be a whole number"),
        (["export-model", world, f"store={catch_store}", "starts=2"], "no episode of more than 32 steps"),
        (["export-model", f"checkpoint={tmp_path / 'none.ckpt'}"], "no checkpoint at"),
        (["finetune", f"checkpoint={tmp_path / 'changed'}", f"store={catch_store}"], "its SHA-256 is"),
    ):
        out = tmp_path / "out"
        code, _, err = in_process(*line, f"out={out}")
        assert (code, err.count("\n")) == (2, 1), err
        assert part in err
        assert not out.exists()


def test_a_checkpoint_of_a_stranger_builds_models_only(models: Path, tmp_path: Path) -> None:
    stored = torch.load(models / "world" / "best.ckpt", weights_only=True)
    stored["hyper_parameters"]["model"] = {"_target_": "worldmodels.data.disk.remove", "path": str(tmp_path)}
    torch.save(stored, tmp_path / "evil.ckpt")
    with pytest.raises(UserError, match=r"worldmodels\.data\.disk\.remove.*not trusted"):
        load_learner(tmp_path / "evil.ckpt")
    assert (tmp_path / "evil.ckpt").exists()
