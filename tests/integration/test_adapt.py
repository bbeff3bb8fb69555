"""Models that are moved to another game by a few numbers, within a budget, and without forgetting the old one."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from tests.conftest import QUICK, ROOT, write_catch
from worldmodels.config import plain, sized
from worldmodels.data.store import Store
from worldmodels.learners.fit import fit
from worldmodels.learners.world_model import load_learner
from worldmodels.portable.checkpoints import read_checkpoint, read_tensors
from worldmodels.portable.export import export_model

RUN = Callable[..., tuple[int, str, str]]
SHORT = [*QUICK, "data.length=5", "data.left_padding=4", "data.validation.length=3", "learner.horizons=[1]"]
SHORT += ["horizons=[1]", "burn_in=2", "windows=4", "data.batch_size=4", "learner.warmup=1"]
FOUR = [*SHORT, "trainer.max_steps=4", "trainer.val_check_interval=2", "scratch=false"]


@pytest.fixture(scope="module")
def places(catch_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, an exported model of two steps on Catch, and `new`, Catch of another speed with rewards of 40,000."""
    root = tmp_path_factory.mktemp("adapt")
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        line = ["experiment=catch", f"store={catch_store}", f"out={root / 'run'}", *QUICK, "trainer.max_steps=2"]
        settings = plain(compose("train", line))
    fit({**settings, "model": sized(settings["model"])}, root / "run")
    export_model(root / "run" / "best.ckpt", root / "base")
    with Store.create(root / "new", Store.open(catch_store).card | {"game": "freeway"}) as store:
        old = Store.open(catch_store)
        for i in range(len(old.lengths)):
            episode = old.episode(i)
            episode.reward[:] *= 40_000
            store.append(episode)
    return root


def test_an_adapter_is_the_fine_tuned_model_beside_its_base_alone(
    ok: Callable[..., str], in_process: RUN, places: Path, catch_store: Path, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    line = ["finetune", f"checkpoint={places / 'base'}", f"store={places / 'new'}", "method=lora", "lora.rank=2", *FOUR]
    line += ["budget=60", f"replay.store={catch_store}", "l2_start=0.01", "layer_decay=0.8"]
    shown = ok(*line, f"out={tmp_path / 'a'}")
    assert "rewards up to 40000 are new to the model" in shown
    run = tmp_path / "a" / "finetuned"
    figures = json.loads((run / "metrics.json").read_text())
    assert figures["trained_parameters"] < figures["parameters"] / 2

    # killed after two steps and gone on with: the same to the bit
    ok(*line, f"out={tmp_path / 'b'}", "trainer.max_steps=2", "learner.max_steps=4")
    assert "resuming from" in ok(*line, f"out={tmp_path / 'b'}")
    again = json.loads((tmp_path / "b" / "finetuned" / "metrics.json").read_text())
    assert again["weights_sha256_by_rank"] == figures["weights_sha256_by_rank"]
    assert "finished before" in ok(*line, f"out={tmp_path / 'a'}")
    assert load_learner(run / "best.ckpt").hparams["card"]["games"] == ["freeway", "catch"]
    ok("export-model", f"checkpoint={run / 'best.ckpt'}", f"out={tmp_path / 'exported'}")
    told = (tmp_path / "exported" / "model.json").read_text()
    assert str(catch_store) not in told and '"replay": {' in told
    how = json.loads(told)["run"]["fine_tuning"]
    needed = json.loads((places / "base" / "model.json").read_text())["weights_sha256"]
    named = {"file": "base", "games": ["catch"], "step": 2, "adapter": False}
    assert how.pop("base") == named | {"weights_sha256": needed}
    assert len(how.pop("checkpoint_sha256")) == 64
    assert how == {"method": "lora", "rank": 2, "alpha": 16.0, "layer_decay": 0.8, "l2_start": 0.01}
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "- fine_tuning.method: lora\n" in card and "- fine_tuning.base.games: ['catch']\n" in card
    assert str(tmp_path) not in told + card and str(places) not in told + card

    shutil.copytree(run / "adapter", tmp_path / "adapter")
    alone = f"checkpoint={tmp_path / 'adapter'}"
    judged = [f"store={places / 'new'}", "windows=4", "horizons=[1]", "burn_in=2", "reward_rows=0"]
    judged += ["other_actions.windows=0", "spread.windows=0", "device=cpu"]
    code, _, err = in_process("quality", alone, *judged, f"out={tmp_path / 'q'}")
    assert (code, err.count("\n")) == (2, 1) and "needs the model that it began with beside it" in err
    shutil.copytree(places / "base", tmp_path / "base")
    ok("quality", alone, *judged, f"out={tmp_path / 'q'}")
    ok("quality", f"checkpoint={run / 'best.ckpt'}", *judged, f"out={tmp_path / 'r'}")
    one, other = (json.loads((tmp_path / name / "metrics.json").read_text())["psnr_db"] for name in "qr")
    assert one == other
    merged, own = (load_learner(path).model.state_dict() for path in (run / "best.ckpt", tmp_path / "adapter"))
    assert merged.keys() == own.keys()
    for name, value in merged.items():
        torch.testing.assert_close(own[name], value, atol=1e-5, rtol=0)
    begun = load_learner(places / "base").model.state_dict()
    assert not torch.equal(begun["denoiser.network.conv_in.weight"], merged["denoiser.network.conv_in.weight"])
    size = sum(path.stat().st_size for path in (run / "adapter").iterdir())
    assert size < (run / "best.ckpt").stat().st_size / 4
    ok("export-model", alone, f"out={tmp_path / 'whole'}")
    runs = [json.loads((tmp_path / name / "model.json").read_text())["run"] for name in ("exported", "whole")]
    assert runs[0] == runs[1], "wherever the adapter lies now"
    assert torch.equal(load_learner(tmp_path / "whole").model.state_dict()["reward_model.head.2.weight"],
                       own["reward_model.head.2.weight"])  # fmt: skip

    shutil.rmtree(tmp_path / "base")
    shutil.copy(run / "best.ckpt", tmp_path / "base.ckpt")
    before = {path: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    code, _, err = in_process("imagine", alone, f"store={places / 'new'}", f"out={tmp_path / 'no'}")
    assert (code, err.count("\n")) == (2, 1) and "was made for another model than" in err
    (tmp_path / "adapter" / "adapter.safetensors").write_bytes(b"0")
    code, _, err = in_process("imagine", alone, f"store={places / 'new'}", f"out={tmp_path / 'no'}")
    assert (code, err.count("\n")) == (2, 1) and "is not the file that adapter.json describes" in err
    about = json.loads(before[tmp_path / "adapter" / "adapter.json"])
    (tmp_path / "adapter" / "adapter.json").write_text(json.dumps(about | {"scaling": 3.0}))
    code, _, err = in_process("imagine", alone, f"store={places / 'new'}", f"out={tmp_path / 'no'}")
    assert (code, err.count("\n")) == (2, 1) and "not as it was written" in err
    assert not (tmp_path / "no").exists()


def test_training_stops_early_and_stays_stopped(ok: Callable[..., str], places: Path, tmp_path: Path) -> None:
    line = ["finetune", f"checkpoint={places / 'base'}", f"store={places / 'new'}", f"out={tmp_path}", *SHORT]
    line += ["budget=60", "patience=1", "learner.lr=0.3", "trainer.max_steps=40", "trainer.val_check_interval=2"]
    ok(*line, "scratch=false")
    figures = json.loads((tmp_path / "finetuned" / "metrics.json").read_text())
    assert figures["stopped_early"] and figures["steps"] < 40
    assert "finished before" in ok(*line, "scratch=false")


def test_few_shot_curves(
    ok: Callable[..., str], in_process: RUN, places: Path, catch_store: Path, tmp_path: Path
) -> None:
    line = ["adapt-report", f"checkpoint={places / 'run' / 'best.ckpt'}", f"store={places / 'new'}", *SHORT]
    line += [f"out={tmp_path}", f"old={catch_store}", "method=bias", "steps=4", "points=2", "scratch_times=2"]
    shown = ok(*line, "budgets=[4,80]")
    figures = json.loads((tmp_path / "metrics.json").read_text())
    assert "left out: budget=4 holds no two whole episodes" in shown and list(figures["left_out"]) == ["4"]
    assert list(figures["budgets"]) == ["80"]
    for found in figures["budgets"].values():
        assert list(found["curves"]["finetuned"]) == ["0", "2", "4"]
        assert list(found["curves"]["scratch"]) == ["2", "4", "6", "8"]
        assert 0 < found["trained_share"] < 1 and len(found["forgotten"]) == 1
        assert found["finetuned"]["step"] in (2, 4) and found["scratch_equal_steps"]["step"] in (2, 4)
        assert found["finetuned"]["psnr_changed_db"] in list(found["curves"]["finetuned"].values())
    assert figures["budgets"]["80"]["episodes"] == {"train": 16, "validation": 4}
    text = (tmp_path / "report.md").read_text()
    assert "from scratch, as many seconds" in text and "forgotten" in text
    for name in ("few_shot", "curves", "forgetting"):
        assert (tmp_path / f"{name}.svg").stat().st_size > 0 and (tmp_path / f"{name}.png").stat().st_size > 0
    assert not list(tmp_path.rglob("steps/*.ckpt")), "what has been judged is not kept"
    assert "Already done" in ok(*line, "budgets=[4,80]")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    code, _, err = in_process(*line, "budgets=[80]", "windows=3")  # what would judge again is gone
    assert (code, err.count("\n")) == (2, 1) and "was judged with windows=4" in err
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    # begun again, they are judged as is asked, and nothing of before is among their points
    again = [*line, "budgets=[80]", "windows=3", "resume=never"]
    for name in ("finetuned", "scratch"):
        curve = tmp_path / "80" / name / "curve.json"
        kept = json.loads(curve.read_text())
        kept["points"]["3"] = kept["points"]["2"]
        curve.write_text(json.dumps(kept))
    assert "finished before" not in ok(*again)
    found = json.loads((tmp_path / "metrics.json").read_text())["budgets"]["80"]
    assert list(found["curves"]["finetuned"]) == ["0", "2", "4"]
    line += ["windows=3"]
    # the runs that are there are found finished, and one that was cut short goes on
    (tmp_path / "80" / "scratch" / "metrics.json").unlink()
    more = ok(*line, "budgets=[6,80]")  # the smaller is three rows of each of two episodes of four
    assert more.count("finished before") == 1 and more.count("training until") == 2 and "resuming from" in more
    figures = json.loads((tmp_path / "metrics.json").read_text())["budgets"]["6"]
    assert figures["episodes"] == {"train": 1, "validation": 1}
    assert all(isinstance(db, float) for dbs in figures["curves"]["finetuned"].values() for db in dbs)
    assert len({json.dumps(dbs) for dbs in figures["curves"]["finetuned"].values()}) == 3, "it learns from them"


def test_mistakes_end_in_one_sentence(in_process: RUN, places: Path, catch_store: Path, tmp_path: Path) -> None:
    small = write_catch(tmp_path / "small", steps=60, size=10)
    for settings, part in (
        (["method=all"], "method=all is unknown; choose one of full, lora, heads, bias"),
        (["layer_decay=0"], "layer_decay=0 is out of range"),
        (["l2_start=-1"], "l2_start=-1 is out of range"),
        (["method=lora", "lora.rank=0"], "lora.rank=0 must be a whole number"),
        (["budget=5"], "budget=5 holds no two whole episodes"),
        (["budget=60", "validation_share=1"], "validation_share=1 must be between 0 and 1"),
        ([f"replay.store={catch_store}", "replay.share=0"], "replay.share=0 must be between 0 and 1"),
        ([f"replay.store={places / 'new'}"], "none of them twice"),
        ([f"replay.store={small}"], "data.transform.size"),
        ([f"replay.store={tmp_path / 'none'}"], "there is no store at"),
        (["replay.store=[]"], "replay.store names no store"),
        ([f"data.store={catch_store}"], "by which a run is judged; give store alone"),
    ):
        line = ["finetune", f"checkpoint={places / 'base'}", f"store={places / 'new'}", *FOUR, *settings]
        code, _, err = in_process(*line, f"out={tmp_path / 'out'}")
        assert (code, err.count("\n")) == (2, 1), err
        assert part in err
        assert not list((tmp_path / "out").rglob("*.ckpt"))
    before = (places / "run" / "metrics.json").read_bytes()
    for command in ("finetune", "adapt-report"):
        line = [command, f"checkpoint={places / 'base'}", f"store={places / 'new'}", f"out={places / 'run'}", *SHORT]
        code, _, err = in_process(*line, *(["budgets=[60]"] if command == "adapt-report" else []))
        assert (code, err.count("\n")) == (2, 1) and "holds the figures of another command" in err
    assert (places / "run" / "metrics.json").read_bytes() == before
    code, _, err = in_process("adapt-report", f"checkpoint={places / 'base'}", f"store={places / 'new'}",
                              f"out={tmp_path / 'report'}", *SHORT, "budgets=[1,2]")  # fmt: skip
    assert (code, err.count("\n")) == (2, 1) and "budget=1 holds no two" in err
    code, _, err = in_process("adapt-report", f"checkpoint={places / 'base'}", f"store={places / 'new'}",
                              f"out={tmp_path / 'report'}", *SHORT, "callbacks.steps=null")  # fmt: skip
    assert (code, err.count("\n")) == (2, 1) and "no points of a curve" in err
    assert not (tmp_path / "report").exists()


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_is_not_judged_by_settings_that_it_was_not_trained_with(
    ok: Callable[..., str], refused: Callable[..., str], places: Path, catch_store: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(places / "new", tmp_path / "moved")  # the same store, wherever it lies
    line = ["finetune", f"checkpoint={places / 'base'}", f"store={places / 'new'}", f"out={tmp_path / 'a'}", *FOUR]
    line += ["budget=60"]
    ok(*line)
    before = files(tmp_path / "a")
    for change, was, now in (
        ([f"store={catch_store}"], f"store={places / 'new'}", f"store={catch_store}"),
        (["l2_start=0.5"], "l2_start=0.0", "l2_start=0.5"),
        (["layer_decay=0.5", "seed=3"], "seed=0, layer_decay=1.0", "seed=3, layer_decay=0.5"),
        (["lora.alpha=3.0"], "lora.alpha=16.0", "lora.alpha=3.0"),
        ([f"replay.store={catch_store}"], "replay.store=None", f"replay.store={catch_store}"),
        (["replay.share=0.5"], "replay.share=0.25", "replay.share=0.5"),
        (["validation_share=0.5"], "validation_share=0.2", "validation_share=0.5"),
        (["learner.lr.denoiser=0.5"], "learner.lr.denoiser=0.002", "learner.lr.denoiser=0.5"),
    ):
        told = refused(*line, *change)
        assert f"holds a run with {was} and not with {now}; give another out=DIR, or resume=never" in told, told
        assert files(tmp_path / "a") == before
    assert "finished before" in ok(*line)
    assert files(tmp_path / "a") == before
    assert "finished before" in ok(*line, f"store={other}", "windows=3", "data.prefetch=3"), "judged otherwise"
    # one that has not ended goes on with another rate, but not as another run
    (tmp_path / "a" / "finetuned" / "metrics.json").unlink()
    assert "l2_start=0.0 and not with l2_start=0.5;" in refused(*line, "l2_start=0.5")
    assert "resuming from" in ok(*line, "learner.warmup=2")

    report = ["adapt-report", *line[1:3], f"out={tmp_path / 'r'}", *SHORT, "budgets=[60]", "steps=2", "points=2"]
    report += ["scratch_times=2"]
    ok(*report)
    before = files(tmp_path / "r")
    told = refused(*report, "budgets=[40,60]", f"replay.store={catch_store}", "l2_start=1.0")
    assert "60/finetuned holds a run with l2_start=0.0, replay.store=None and not with" in told
    assert files(tmp_path / "r") == before, "nor is a run of another budget begun"
    assert "Already done" in ok(*report)


def test_a_run_of_another_method_is_refused(
    ok: Callable[..., str], in_process: RUN, places: Path, tmp_path: Path
) -> None:
    line = ["finetune", f"checkpoint={places / 'base'}", f"store={places / 'new'}", f"out={tmp_path}", *FOUR]
    ok(*line, "learner.adapt.method=bias", "callbacks.stop=null")
    assert (tmp_path / "finetuned" / "adapter" / "adapter.json").exists()
    best = tmp_path / "finetuned" / "best.ckpt"
    before = best.read_bytes()
    base, tuned = (load_learner(path).model.state_dict() for path in (places / "base", best))
    changed = {name for name, value in tuned.items() if not torch.equal(value, base[name])}
    head = {"reward_model.head.2.weight"}  # which has grown
    assert changed > head and all("bias" in name or "norm" in name or "projection.1" in name for name in changed - head)
    code, _, err = in_process(*line, "method=heads")
    assert (code, err.count("\n")) == (2, 1) and "holds a run with method=bias and not with method=heads" in err
    assert best.read_bytes() == before
    assert (
        "adapt" in read_tensors(best)["hyper_parameters"] and "adapt" not in read_checkpoint(best)["hyper_parameters"]
    )
