"""Each mistake ends in one sentence on stderr that names the cause and the mend, and in exit code 2."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import QUICK, write_catch
from worldmodels.data.sources.catch_play import catch_card
from worldmodels.data.store import Store

RUN = Callable[..., tuple[int, str, str]]


def test_list_of_commands(in_process: RUN) -> None:
    code, out, _ = in_process()
    assert code == 0
    for name in ("train", "finetune", "doctor", "plan"):
        assert f"\n  {name} " in out


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["trian"], ["unknown command 'trian'", "did you mean 'train'?"]),
        (["zzz"], ["unknown command 'zzz'", "there are: ", "train"]),
        (["train", "trainer.max_step=3"], ["unknown setting 'trainer.max_step'", "'trainer.max_steps'"]),
        (["train", "experimnt=catch"], ["unknown setting 'experimnt'", "'experiment'"]),
        (["train", "experiment=cach"], ["unknown experiment 'cach'", "did you mean 'catch'?", "pong_tiny"]),
        (["train", "store"], ["cannot read 'store'", "key=value"]),
        (["train", "experiment=catch"], ["'out' is missing", "out=..."]),
        (["train", "experiment=catch", "model.size=huge", "out=x"], ["model.size=huge", "tiny, small, paper"]),
        (["train", "experiment=catch", "store=nowhere", "out=x"], ["nowhere", "worldmodels collect"]),
        (["train", "experiment=catch", "out=x", "resume=maybe"], ["resume=maybe", "auto or never"]),
        (["train", "experiment=catch", "out=/dev/null/x"], ["/dev/null", "another folder"]),
        (["train", "experiment=catch", "out="], ["'out' is empty"]),
        (["train", "experiment=catch", "out=x", "callbacks=null"], ["callbacks=null chooses no", "default, policy"]),
        (["train", "experiment=catch", "store=[1", "out=x"], ["cannot read 'store=[1'"]),
        (["train", "experiment=catch", "store=S", "out=/proc/x"], ["no folder can be made at /proc/x"]),
        (["collect", "game=catch", "store=/proc/x"], ["no folder can be made at /proc/x"]),
        (["collect", "game=catch", "source.skill=abc", "store=x"], ["source.skill=abc does not work", "0.3"]),
        (["quality", "other_actions.windows=-1"], ["other_actions.windows=-1 must be a whole number of at least 0"]),
        (["quality", "spread.windows=1.5"], ["spread.windows=1.5 must be a whole number of at least 0"]),
        (["finetune", "checkpoint=none.ckpt", "store=S", "out=x"], ["none.ckpt", "worldmodels train"]),
    ],
)
def test_mistakes(
    args: list[str], parts: list[str], refused: Callable[..., str], catch_store: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    err = refused(*(a.replace("store=S", f"store={catch_store}") for a in args))
    for part in parts:
        assert part in err


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (["trainer.precision=fp8"], ["precision 'fp8' is unknown", "bf16-mixed"]),
        (["learner.schedule=step"], ["schedule=step", "constant, cosine, linear"]),
        (["learner._target_=os.system"], ["'os.system' is not trusted", "worldmodels."]),
        (["model._target_=subprocess.run"], ["'subprocess.run' is not trusted"]),
        (["seed=abc"], ["seed=abc must be a whole number of at least 0"]),
        (["trainer.max_steps=0"], ["trainer.max_steps=0", "at least 1"]),
        (["trainer.devices=0"], ["settings of trainer", "devices=0"]),
        (["learner.horizons=[]"], ["learner.horizons=[]", "at least 1"]),
        (["learner.lr=fast"], ["learner.lr=fast does not work", "learner.lr=0.001"]),
        (["data.validation.length=2"], ["data.validation.length=2", "learner.horizons"]),
        (["model.image_size=24"], ["model.image_size=24", "20x20x3", "data.transform"]),
        (["model.image_channels=1"], ["model.image_channels=1", "20x20x3"]),
    ],
)
def test_settings_that_do_not_work(
    settings: list[str], parts: list[str], refused: Callable[..., str], catch_store: Path, tmp_path: Path
) -> None:
    err = refused("train", "experiment=catch", f"store={catch_store}", f"out={tmp_path}", *QUICK, *settings)
    for part in parts:
        assert part in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_asked_for_and_absent(refused: Callable[..., str], catch_store: Path, tmp_path: Path) -> None:
    err = refused("train", "experiment=catch", f"store={catch_store}", f"out={tmp_path}", "trainer.accelerator=cuda")
    assert "'cuda' was asked for" in err
    assert "trainer.accelerator=auto or cpu" in err


def test_store_of_a_newer_version(refused: Callable[..., str], catch_store: Path, tmp_path: Path) -> None:
    newer = tmp_path / "newer"
    shutil.copytree(catch_store, newer)
    header = json.loads((newer / "store.json").read_text())
    (newer / "store.json").write_text(json.dumps(header | {"version": 99, "min_reader": 99}))
    before = sorted(p.name for p in newer.rglob("*"))
    assert "newer" in refused("train", "experiment=catch", f"store={newer}", f"out={tmp_path / 'run'}")
    assert sorted(p.name for p in newer.rglob("*")) == before


def test_empty_store(refused: Callable[..., str], tmp_path: Path) -> None:
    Store.create(tmp_path / "empty", catch_card(0)).close()
    err = refused("train", "experiment=catch", f"store={tmp_path / 'empty'}", f"out={tmp_path / 'run'}")
    assert "holds no episodes" in err
    assert "worldmodels collect" in err


def test_checkpoint_truncated_or_of_other_data(
    refused: Callable[..., str], in_process: RUN, catch_store: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    args = ["train", "experiment=catch", f"out={out}", *QUICK]
    code, _, err = in_process(*args, f"store={catch_store}", "trainer.max_steps=2")
    assert code == 0, err
    other = write_catch(tmp_path / "other", cells=4, size=32)
    err = refused("finetune", f"checkpoint={out}/best.ckpt", f"store={other}", f"out={tmp_path / 'moved'}")
    assert "obs.height=32" in err
    assert "20" in err
    last = out / "last.ckpt"
    for wrong in ([f"store={tmp_path / 'none'}"], [f"store={catch_store}", "trainer.accelerator=tpu"]):
        refused(*args, *wrong, "resume=never")
        assert last.exists(), "what is there is kept until the new run can begin"
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    err = refused(*args, f"store={catch_store}", "trainer.max_steps=4")
    assert "truncated or damaged" in err
    err = refused("finetune", f"checkpoint={last}", f"store={catch_store}", f"out={tmp_path / 'moved'}")
    assert "truncated or damaged" in err
