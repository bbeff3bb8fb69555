"""`verify` finds any flipped byte, any missing and any foreign file, and is never misled by a writer at work."""

import itertools
import json
import shutil
import threading
import time
import zipfile

import numpy as np
import pytest

from tests.unit.stores import assert_holds, card, episode, filled
from worldmodels.data.checksums import BLANK, KEY, json_matches, marked_json, zip_matches
from worldmodels.data.collecting import summary
from worldmodels.data.disk import read_json, write_json
from worldmodels.data.store import Store
from worldmodels.data.verify import verify
from worldmodels.types import UserError


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A store with everything that a store can hold: two segments, staged episodes, splits, columns, metrics."""
    root = tmp_path_factory.mktemp("stores") / "whole"
    store, _ = filled(root)
    assert store.splits
    with_writer = Store.open(root, write=True)
    rows = np.arange(5)
    for version in ("v2", "v3"):  # one bit apart
        with_writer.write_side("value", version, rows, np.ones((5, 2), np.float32))
    with_writer.close()
    write_json(root / "metrics.json", summary(store), checksum=True)
    return root


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "s")


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr("worldmodels.data.verify._GRACE", 0.05)


def files_of(root):
    return sorted(p for p in root.rglob("*") if p.is_file() and p.suffix != ".lock")


def named(root):
    return [problem["file"] for problem in verify(root)["problems"]]


def flip(path, place, bit):
    with open(path, "r+b") as f:
        f.seek(place)
        byte = f.read(1)[0] ^ 1 << bit
        f.seek(place)
        f.write(bytes([byte]))


def test_a_whole_store(whole):
    seen = []
    found = verify(whole, lambda done, total: seen.append((done, total)))
    assert found["problems"] == []
    assert found["unchecked"] == 0
    assert (found["files"], found["bytes"]) == (len(files_of(whole)), sum(p.stat().st_size for p in files_of(whole)))
    store = Store.open(whole)
    assert (found["episodes"], found["frames"]) == (len(store.lengths), store.lengths.sum())
    assert seen[-1] == (found["bytes"], found["bytes"])
    assert {"store.json", "LATEST", "MANIFEST.json", "default.json", "zarr.json", "metrics.json"} <= {
        p.name for p in files_of(whole)
    }


def test_a_flipped_bit_in_each_file(copy):
    rng = np.random.default_rng(0)
    for path in files_of(copy):
        place, bit = rng.integers(path.stat().st_size), rng.integers(8)
        flip(path, place, bit)
        assert named(copy) == [path.relative_to(copy).as_posix()], (place, bit)
        flip(path, place, bit)
    assert named(copy) == []


@pytest.mark.parametrize("seed", range(4))
def test_flipped_bits_at_200_places(copy, seed):
    rng, paths = np.random.default_rng(seed), files_of(copy)
    sizes = np.array([p.stat().st_size for p in paths])
    for place in rng.integers(sizes.sum(), size=50):
        k = np.searchsorted(sizes.cumsum(), place, side="right")
        at, bit = place - (sizes.cumsum() - sizes)[k], rng.integers(8)
        flip(paths[k], at, bit)
        assert named(copy) == [paths[k].relative_to(copy).as_posix()], (at, bit)
        flip(paths[k], at, bit)


def test_every_bit_of_the_files_that_hold_their_own_checksum(copy):
    header = (copy / "store.json").read_bytes()
    for place, bit in itertools.product(range(len(header)), range(8)):
        assert json_matches(header[:place] + bytes([header[place] ^ 1 << bit]) + header[place + 1 :]) is not True
    staged = min(copy.glob("staging/*/*.npz"), key=lambda p: p.stat().st_size)
    size = staged.stat().st_size
    for place, bit in itertools.product([*range(40), size // 2, *range(size - 40, size)], range(8)):
        flip(staged, place, bit)
        assert zip_matches(staged) is False, (place - size, bit)
        flip(staged, place, bit)
    assert json_matches(header)
    assert zip_matches(staged)


@pytest.mark.parametrize("harms", [["delete"], ["replace by a folder"], ["truncate", "empty", "lengthen"]])
def test_harm_to_each_file(copy, harms):
    for path, harm in zip(files_of(copy), itertools.cycle(harms)):
        if harm == "delete" and path.name == "metrics.json":
            continue  # a store that was not collected has none
        last = harm == "delete" and path == max(copy.glob("staging/*/*.npz"))  # none follows that could miss it
        content = path.read_bytes()
        path.unlink()
        if harm == "truncate":
            path.write_bytes(content[:-1])
        elif harm == "empty":
            path.touch()
        elif harm == "lengthen":
            path.write_bytes(content + b" ")
        elif harm == "replace by a folder":
            path.mkdir()
        name = path.relative_to(copy).as_posix()
        # without its manifest a version is not there, so that LATEST has a problem, too
        assert set(named(copy)) - {"side/value/LATEST"} == {"metrics.json" if last else name} - {"side/value/LATEST"}
        assert named(copy)
        path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
        path.write_bytes(content)
    assert named(copy) == []


def test_missing_and_foreign_folders_and_files(copy):
    first, second = sorted(copy.glob("segments/toy/*.zarr"))
    shutil.move(first, copy.parent / "aside")
    assert named(copy) == ["segments/toy/000000.zarr"]
    shutil.move(copy.parent / "aside", first)
    shutil.rmtree(second)
    for staged in copy.glob("staging/toy/*.npz"):
        staged.unlink()
    assert named(copy) == ["metrics.json"]
    foreign = ["notes.txt", "segments/x", "segments/toy/1.txt", f"segments/toy/{first.name}/obs/c/1", "staging/toy/a",
               "sources/a.txt", "splits/a", "side/a", "side/value/b", "side/value/v2/toy/c"]  # fmt: skip
    (copy / "metrics.json").unlink()
    for name in foreign:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).touch()
    for name in (".hydra", "segments/toy/000009.zarr.tmp77", "run.log", "side/value/v9.tmp1"):
        (copy / name).touch()
    assert named(copy) == sorted(foreign)


def test_gaps_of_any_width_are_named_once(copy):
    first, second = sorted(copy.glob("segments/toy/*.zarr"))
    second.rename(second.with_name("999999999999.zarr"))
    (copy / "staging/toy/000000011.npz").rename(copy / "staging/toy/000999999.npz")
    found = {p["file"]: p["problem"] for p in verify(copy)["problems"]}
    assert found == {"segments/toy/000001.zarr": "it is missing, as are those after it up to number 999999999998"}
    (copy / "segments/toy/999999999999.zarr").rename(second)
    found = {p["file"]: p["problem"] for p in verify(copy)["problems"]}
    assert found == {"staging/toy/000000011.npz": "it is missing, as are those after it up to number 999998"}


@pytest.mark.parametrize("harm", [{"ids": [[]]}, {"lengths": ["x"]}, {"files": 3}, {"files": {"action/c/0": [1]}}])
def test_a_table_that_makes_no_sense(copy, harm):
    meta = next(copy.glob("segments/toy/*/zarr.json"))
    content = json.loads(meta.read_text())
    if isinstance(harm.get("files"), dict):
        harm = {"files": content["attributes"]["files"] | {"obs/zarr.json": [1]}}
    content["attributes"] |= {**harm, KEY: BLANK}
    meta.write_bytes(marked_json(json.dumps(content).encode()))
    assert meta.relative_to(copy).as_posix() in named(copy)


def test_a_list_of_files_leads_nowhere_else(copy):
    meta = next(copy.glob("segments/toy/*/zarr.json"))
    content = json.loads(meta.read_text())
    content["attributes"]["files"] |= {"../../../../../../dev/zero": [1, 2]}
    content["attributes"][KEY] = BLANK
    meta.write_bytes(marked_json(json.dumps(content).encode()))
    assert len(named(copy)) == 1


def test_several_problems_are_all_named(copy):
    names = ["splits/default.json", *(f"segments/toy/{k:06d}.zarr/obs/c/0/0/0/0" for k in range(2))]
    for name in names:
        flip(copy / name, 40, 0)
    assert named(copy) == sorted(names)


def to_format_1(root):
    """What the program wrote before every file carried its checksum or was listed with it."""
    for path in [p for p in files_of(root) if json_matches(p.read_bytes()) is not None]:
        content = json.loads(path.read_text())
        for table in (content, content.get("attributes", {})):
            table.pop(KEY, None)
        for name in ("files", "version") if path.parent.parent.parent == root / "side" else ():
            content.pop(name, None)
        path.write_text(json.dumps(content["version"] if path.name == "LATEST" else content))
    write_json(root / "store.json", read_json(root / "store.json") | {"version": 1, "min_reader": 1})
    for path in root.glob("staging/toy/*.npz"):
        with open(path, "r+b") as f:
            f.seek(-10, 2)
            f.write(b"\0\0")
            f.truncate()


def test_a_store_of_format_1(copy):
    to_format_1(copy)
    found = verify(copy)
    assert found["problems"] == []
    assert found["unchecked"] == sum(
        p.name in ("LATEST", "default.json", "store.json", "toy.json", "metrics.json", "MANIFEST.json")
        or p.suffix == ".npz" or "side" in p.parts or p.parent.suffix == ".zarr" and p.name == "zarr.json"
        for p in files_of(copy)
    )  # fmt: skip
    staged = next(copy.glob("staging/toy/*.npz"))
    with zipfile.ZipFile(staged) as archive:
        place = archive.getinfo("obs.npy").header_offset + 200
    flip(staged, place, 3)
    (copy / "splits" / "default.json").write_text("{")
    assert named(copy) == ["splits/default.json", staged.relative_to(copy).as_posix()]


def test_a_store_of_format_1_is_added_to(copy):
    to_format_1(copy)
    old, values = [episode(i) for i in range(12)], np.ones((5, 2), np.float32)
    assert_holds(Store.open(copy), old)
    np.testing.assert_array_equal(Store.open(copy).side("value")[:5], values)
    before = {p: p.read_bytes() for p in files_of(copy) if p.suffix != ".npz"}
    bare = verify(copy)["unchecked"] - len(list(copy.glob("staging/toy/*.npz")))
    with Store.open(copy, write=True) as store:
        store.append(episode(12))
        store.seal()
        store.write_side("value", "v4", range(5), 2 * values)
        store.append(episode(13))
        store.close()
    store = Store.open(copy)
    assert_holds(store, [*old, episode(12), episode(13)])
    np.testing.assert_array_equal(store.side("value")[:5], 2 * values)
    found = verify(copy)
    assert (found["problems"], found["episodes"]) == ([], 14)
    assert found["unchecked"] == bare - 1, "all that is new has its checksum, the name of the latest version, too"
    assert {p.name for p, content in before.items() if p.read_bytes() != content} == {"LATEST"}
    for path in (*copy.glob("segments/toy/*2.zarr/zarr.json"), *copy.glob("staging/toy/*.npz")):
        flip(path, path.stat().st_size // 2, 0)
    assert named(copy) == ["segments/toy/000002.zarr/zarr.json", "staging/toy/000000013.npz"]


def test_what_is_no_store_or_too_new(copy, tmp_path):
    with pytest.raises(UserError, match="there is no store at .*nowhere"):
        verify(tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="other is not a store: it has no store.json"):
        verify(tmp_path / "other")
    header = json.loads((copy / "store.json").read_text()) | {"min_reader": 99, KEY: BLANK}
    (copy / "store.json").write_bytes(marked_json(json.dumps(header).encode()))
    with pytest.raises(UserError, match="newer version of worldmodels .* update"):
        verify(copy)


def test_no_false_alarm_while_a_store_is_written(tmp_path):
    root, stop, errors = tmp_path / "s", threading.Event(), []
    Store.create(root, card()).close()

    def write():
        try:
            with Store.open(root, write=True) as store:
                number = 0
                while not stop.is_set():
                    store.append(episode(number, length=4))
                    number += 1
                    if number % 5 == 0:
                        store.seal()
                        _ = store.splits
                        store.write_side("value", f"v{number}", [0], np.ones(1, np.float32))
        except BaseException as e:
            errors.append(e)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        until = time.monotonic() + 60
        while len(list(root.glob("segments/toy/*.zarr"))) < 4 and time.monotonic() < until:
            assert verify(root)["problems"] == []
    finally:
        stop.set()
        thread.join()
    assert not errors
    assert verify(root)["episodes"] == len(Store.open(root).lengths) >= 20
