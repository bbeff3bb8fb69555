"""`worldmodels inspect` and `worldmodels verify` as a user meets them."""

import json
import shutil

import pytest
from PIL import Image

from worldmodels.data.store import Store


@pytest.fixture
def store(catch_store, tmp_path):
    return shutil.copytree(catch_store, tmp_path / "catch")


def snapshot(root):
    return {p: p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_inspect(cli, store, tmp_path):
    before = snapshot(store)
    done = cli("inspect", f"store={store}", "pictures=10")
    assert (done.returncode, done.stderr) == (0, "")
    out = tmp_path / "cwd" / "runs" / "inspect" / "catch"
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["game", "catch,", "from", "catch_play"]
    assert lines[1].split()[:4] == ["frames", "240", "in", "60"]
    assert lines[-1] == str(out)
    assert Image.open(out / "contact.png").size[0] > 8 * 168
    figures = json.loads((out / "metrics.json").read_text())
    assert (figures["frames"], figures["episodes"]) == (240, 60)
    assert snapshot(store) == before

    done = cli("inspect", f"store={store}", "json=true", f"out={tmp_path / 'elsewhere'}", "pictures=10")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["contact_sheet"] == str(tmp_path / "elsewhere" / "contact.png")
    assert {k: v for k, v in found.items() if k != "contact_sheet"} == {
        k: v for k, v in figures.items() if k != "contact_sheet"
    }


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["store=nowhere"], "there is no store at nowhere"),
        (["store=S", "out=S/report"], "is in the store"),
        (["store=S", "pictures=0"], "pictures=0 must be a whole number of at least 1"),
        (["store=S", "picture=3"], "did you mean 'pictures'"),
        (["store=S", "out=/dev/null/x"], "another folder"),
    ],
)
def test_inspect_refuses(in_process, store, settings, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, _, err = in_process("inspect", *(s.replace("S", str(store)) for s in settings))
    assert (code, err.count("\n")) == (2, 1), err
    assert words in err


def test_verify(cli, store, tmp_path):
    done = cli("verify", f"store={store}")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("whole: ")
    assert "without a checksum" not in done.stdout
    assert "60 episodes, 240 frames" in done.stdout
    assert list((tmp_path / "cwd").iterdir()) == []

    for name in ("action", "reward"):
        path = next(store.glob(f"segments/*/*/{name}/c/0"))
        with open(path, "r+b") as f:
            f.write(b"\x07")
    done = cli("verify", f"store={store}", f"out={tmp_path / 'out'}")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "000000.zarr/action/c/0: it does not match its checksum, and 1 other file with problems" in done.stderr
    problems = json.loads((tmp_path / "out" / "metrics.json").read_text())["problems"]
    assert [p["file"] for p in problems] == [f"segments/catch_play/000000.zarr/{n}/c/0" for n in ("action", "reward")]

    done = cli("verify", f"store={store}", "json=true")
    assert done.returncode == 2
    assert json.loads(done.stdout)["problems"] == problems
    assert done.stderr.count("\n") == 1


def test_verify_without_a_store(in_process, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for settings, words in (
        (["store=nowhere"], "there is no store at nowhere"),
        ([], "the setting 'store' is missing"),
        (["store=/dev/null"], "there is no store at /dev/null"),
    ):
        code, _, err = in_process("verify", *settings)
        assert (code, err.count("\n")) == (2, 1), err
        assert words in err


def test_an_empty_store_is_whole(in_process, tmp_path):
    from tests.unit.stores import card

    Store.create(tmp_path / "s", card()).close()
    code, out, _ = in_process("verify", f"store={tmp_path / 's'}")
    assert code == 0
    assert "0 episodes, 0 frames" in out
    code, _, err = in_process("inspect", f"store={tmp_path / 's'}")
    assert (code, "holds no episodes" in err) == (2, True)
