"""quality, imagine and finetune on transformed frames and on several stores, as train takes them."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import QUICK
from worldmodels.data.sources.catch_play import catch_card, catch_play
from worldmodels.data.store import Store
from worldmodels.data.transforms import Transform

RUN = Callable[..., tuple[int, str, str]]
SHORT = [*QUICK, "trainer.max_steps=2", "trainer.val_check_interval=2"]
JUDGE = ["device=cpu", "burn_in=1", "horizons=[1,2]", "windows=5", "reward_rows=9"]
JUDGE += ["other_actions.windows=2", "other_actions.steps=2", "spread.windows=1", "spread.samples=2"]
DREAM = ["device=cpu", "burn_in=1", "horizon=2", "rollouts=3", "shown=1"]
GREY = ["data.transform.size=20", "data.transform.colour=gray", "model.image_channels=1"]


def write(path: Path, size: int, game: str = "catch") -> Path:
    """Catch, whose frames are said to be resized as a transform would do it."""
    card = catch_card(0, 0.5, size=size) | {"game": game}
    with Store.create(path, card | {"obs": card["obs"] | {"resize": "area"}}) as store:
        for episode in catch_play(120, size, skill=0.5, size=size):
            store.append(episode)
    return path


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Catch of 40x40 and of 20x20 pixels, and what calls itself another game, of 40x40."""
    folder = tmp_path_factory.mktemp("stores")
    return {
        "big": write(folder / "big", 40),
        "small": write(folder / "small", 20),
        "other": write(folder / "other", 40, "freeway"),
    }


def metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def test_frames_are_as_the_checkpoint_was_trained(ok, refused, stores: dict[str, Path], tmp_path: Path) -> None:
    big, small = stores["big"], stores["small"]
    ok("train", "experiment=catch", f"store={big}", f"out={tmp_path / 'grey'}", *SHORT, *GREY)
    given = [f"checkpoint={tmp_path / 'grey' / 'best.ckpt'}", f"store={big}"]
    ok("quality", *given, f"out={tmp_path / 'judged'}", *JUDGE)
    assert metrics(tmp_path / "judged")["settings"]["data"]["transform"] == {"size": 20, "colour": "gray"}
    assert "Already done" in ok("quality", *given, f"out={tmp_path / 'judged'}", *JUDGE, *GREY[:2])

    ok("imagine", *given, f"out={tmp_path / 'dreams'}", *DREAM)
    arrays = np.load(tmp_path / "dreams" / "logged.npz")
    real = Transform(20, "gray")(Store.open(big).read(arrays["start"], 3)).obs[:, 1:]
    np.testing.assert_array_equal(arrays["real_obs"], real)
    obs = Store.open(tmp_path / "dreams" / "store").card["obs"]
    assert (obs["height"], obs["channels"], obs["colour"]) == (20, 1, "cv2_gray")

    wrong = refused("quality", *given, f"out={tmp_path / 'wrong'}", *JUDGE, "data.transform.size=16")
    assert "obs.height=16 but the checkpoint" in wrong and "has 20: give data.transform.size=" in wrong
    wrong = refused("imagine", *given, f"out={tmp_path / 'wrong'}", *DREAM, "data.transform.colour=blue")
    assert "data.transform.colour=blue is unknown" in wrong

    out = tmp_path / "moved"
    short = [*SHORT, "data.length=5", "data.left_padding=4", "data.validation.length=4", "learner.horizons=[1,2]"]
    short += ["horizons=[1,2]", "burn_in=1", "windows=5"]
    ok("finetune", given[0], f"store=[{big},{small}]", f"out={out}", *short)
    found = metrics(out)
    assert list(found["stores"]) == [str(big), str(small)]
    for name in ("finetune_psnr_db", "scratch_psnr_changed_db"):
        by_store = [part[name] for part in found["stores"].values()]
        assert found[name] == pytest.approx(np.mean(by_store, 0), abs=1e-4) and by_store[0] != by_store[1]
    assert (out / "curves.svg").is_file() and len(found["psnr_changed_static_db"]) == 11


def test_several_stores_are_judged_one_by_one(ok, refused, stores: dict[str, Path], tmp_path: Path) -> None:
    big, other = stores["big"], stores["other"]
    both, size = f"store=[{big},{other}]", "data.transform.size=20"
    ok("train", "experiment=catch", both, f"out={tmp_path / 'run'}", *SHORT, size)
    given = f"checkpoint={tmp_path / 'run' / 'best.ckpt'}"
    shown = ok("quality", given, both, f"out={tmp_path / 'both'}", *JUDGE)
    together = metrics(tmp_path / "both")
    films = ("logged", "other_actions")
    pictures = ["psnr_K.svg", "quality_K.svg", "reliability_K.svg", *(f"strip_{name}_K.png" for name in films)]
    pictures += [f"{name}_K.{kind}" for name in films for kind in ("mp4", "gif")]
    names = {name.replace("K", k) for name in pictures for k in "12"}
    assert {p.name for p in (tmp_path / "both").iterdir()} == names | {"metrics.json"}
    ok("quality", given, f"store={other}", f"out={tmp_path / 'alone'}", *JUDGE)
    alone = {k: v for k, v in metrics(tmp_path / "alone").items() if k not in ("settings", "seconds")}
    a, b = together["stores"].values()
    assert together["stores"][str(other)] == alone and a["game"] == "catch" and b["game"] == "freeway"
    assert "without data.transform" in a["other_actions"]["without_emulator"]
    for name in ("psnr_db", "psnr_gain_changed_db", "ssim_changed"):
        assert together["mean"][name] == pytest.approx(np.mean([a[name], b[name]], 0), abs=1e-4)
    assert together["mean"]["windows"] == a["windows"] + b["windows"]
    assert f"{other} (freeway)" in shown and "mean over 2 stores" in shown
    assert f"{together['mean']['psnr_db'][1]:.2f}" in shown
    assert "dreams are of one game" in refused("imagine", given, both, f"out={tmp_path / 'dreams'}", *DREAM)
    wrong = refused("quality", given, f"store=[{big},{tmp_path / 'none'}]", f"out={tmp_path}", *JUDGE)
    assert "there is no store at" in wrong


def test_a_checkpoint_of_whole_frames_needs_to_be_told(ok, refused, stores: dict[str, Path], tmp_path: Path) -> None:
    ok("train", "experiment=catch", f"store={stores['small']}", f"out={tmp_path / 'run'}", *SHORT)
    given, out, size = (
        f"checkpoint={tmp_path / 'run' / 'best.ckpt'}",
        f"out={tmp_path / 'out'}",
        "data.transform.size=20",
    )
    for command, settings in {"quality": JUDGE, "imagine": DREAM, "finetune": SHORT}.items():
        wrong = refused(command, given, f"store={stores['big']}", out, *settings)
        assert "obs.height=40 but the checkpoint" in wrong and "has 20: give data.transform.size=" in wrong
    ok("imagine", given, f"store=[{stores['big']},{stores['small']}]", out, *DREAM, size)
    assert len(Store.open(tmp_path / "out" / "store").lengths) == 6
    wrong = refused("quality", given, f"store=[{stores['big']},{stores['other']}]", out, *JUDGE, size)
    assert "game='freeway' but the checkpoint" in wrong and "has 'catch'" in wrong
