"""`inspect` counts what is there, says it to people, and takes no more memory for a larger store."""

import dataclasses
import json
import shutil
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from tests.unit.stores import card, episode, filled
from worldmodels.data.inspection import inspect, page
from worldmodels.data.segments import plain_file
from worldmodels.data.store import Store
from worldmodels.evaluation.contact import contact_sheet, spread
from worldmodels.types import ACTIONS, UserError


def test_the_figures_are_those_of_the_episodes(tmp_path):
    store, episodes = filled(tmp_path / "s")
    found = inspect(store)
    rows = {k: np.concatenate([getattr(e, k) for e in episodes]) for k in ("action", "reward", "life_loss")}
    lengths, returns = [len(e) for e in episodes], [e.reward.sum() for e in episodes]
    assert (found["frames"], found["episodes"], found["segments"], found["staged"]) == (sum(lengths), 12, 2, 2)
    for name, values in (("lengths", lengths), ("returns", returns)):
        expected = {"min": min(values), "median": np.median(values), "mean": np.mean(values), "max": max(values)}
        assert found[name] == pytest.approx(expected, abs=1e-4)
    assert found["actions"] == {name: (rows["action"] == a).sum() for a, name in enumerate(ACTIONS)}
    assert found["rewards"] == {f"{v}": (rows["reward"] == v).sum() for v in (-1, 0, 1)}
    assert found["life_losses"] == rows["life_loss"].sum() > 0
    assert found["ends"] == {
        "terminal": sum(e.terminated[-1] for e in episodes),
        "truncated": sum(e.truncated[-1] for e in episodes),
    }
    assert found["final_frames"] == sum(e.final_obs is not None for e in episodes)
    size = sum(p.stat().st_size for p in (tmp_path / "s").rglob("*") if p.is_file())
    assert (found["bytes"], found["bytes_per_frame"]) == (size, pytest.approx(size / sum(lengths), abs=0.01))
    assert json.loads(json.dumps(found)) == found


def test_looking_does_not_draw_the_splits(tmp_path):
    store, episodes = filled(tmp_path / "s")
    assert inspect(store)["splits"] is None
    assert not (tmp_path / "s" / "splits").exists()
    drawn = store.splits
    assert inspect(store)["splits"] == {
        name: {"episodes": len(e), "frames": sum(len(episodes[i]) for i in e)} for name, e in drawn.items()
    }


def test_what_importers_and_players_say_is_summed(tmp_path):
    infos = [
        {"stripped": {"zero_rows": 3}, "behaviours": {"random": {"steps": 5, "return": 1.5}}},
        {"stripped": {"zero_rows": 3, "note": "x"}, "repaired": {"flags": 1}, "end": "gap"},
        {"stripped": None, "behaviours": {"random": {"steps": 2, "return": 2}, "script": {"steps": 3, "return": 0}}},
    ]
    with Store.create(tmp_path / "s", card()) as store:
        for number, info in enumerate(infos):
            e = episode(number, length=7)
            flags = dict.fromkeys(("terminated", "truncated"), np.zeros(7, bool)) if "end" in info else {}
            store.append(dataclasses.replace(e, info=info, **flags))
            if number == 1:
                store.seal()
        found = inspect(store)
    assert (found["stripped"], found["repaired"]) == ({"zero_rows": 6}, {"flags": 1})
    assert found["behaviours"] == {"random": {"steps": 7, "return": 3.5}, "script": {"steps": 3, "return": 0}}
    assert found["ends"] == {"terminal": 2, "gap": 1}


def test_side_columns_with_their_versions(tmp_path):
    filled(tmp_path / "s")
    with Store.open(tmp_path / "s", write=True) as store:
        for version, count in (("v1", 5), ("v2", 9)):
            store.write_side("value", version, np.arange(count), np.zeros((count, 2), np.float32))
        found = inspect(store)
    kind = {"dtype": "<f4", "shape": [2]}
    assert found["side"] == {
        "value": {"latest": "v2", "versions": {"v1": kind | {"count": 5}, "v2": kind | {"count": 9}}}
    }
    lines = "\n".join(page(found))
    assert f"value: v1 of <f4 (2,) for 5 of {found['frames']:,} rows, v2 (latest) of <f4 (2,) for 9 of" in lines


def test_many_different_rewards_are_told_to_two_digits(tmp_path):
    rng = np.random.default_rng(0)
    with Store.create(tmp_path / "s", card()) as store:
        for number in range(3):
            store.append(dataclasses.replace(episode(number, 500), reward=rng.normal(0, 10, 500).astype(np.float32)))
            store.seal()
        found = inspect(store)
    assert found["rewards_rounded"]
    assert sum(found["rewards"].values()) == 1500
    assert 64 < len(found["rewards"]) < 600
    assert all(len(name.strip("-").replace("0.", "").replace(".", "").strip("0")) <= 2 for name in found["rewards"])
    assert "shown to two digits" in "\n".join(page(found))


def test_a_card_that_says_clipped_is_held_to_it(tmp_path):
    with Store.create(tmp_path / "s", card(reward={"clipped": True})) as store:
        store.append(episode(0, 9))
        assert "clipped, says the card; all of them lie within -1 and 1" in "\n".join(page(inspect(store)))
        store.append(dataclasses.replace(episode(1, 3), reward=np.float32([0, 5, 0])))
        assert "not all of them lie within -1 and 1: the card is wrong" in "\n".join(page(inspect(store)))


def test_the_page_says_what_the_card_says(tmp_path):
    said = {
        "frame_skip": 3, "sticky_prob": 0.25, "time_limit": 27000, "truncation_known": False, "lossy": "jpeg",
        "policy": {"type": "dqn"}, "licence": "CC-BY", "episodic_life": True, "noop_max": 7,
        "dataset": {"name": "Some Logs", "url": "gs://logs", "run": 2, "sha256": ""},
    }  # fmt: skip
    with Store.create(tmp_path / "s", card(channels=1, **said)) as store:
        store.append(episode(0, 9, channels=1))
        text = "\n".join(page(inspect(store)))
    for words in (
        "frame skip 3", "sticky actions 0.25", "27,000 steps; a cut by it looks like", "lossy (jpeg)", "type dqn",
        "a lost life ends an episode", "up to 7", "name: Some Logs", "url: gs://logs", "run: 2", "CC-BY",
        "not drawn yet", "0 segments, 1 staged",
    ):  # fmt: skip
        assert words in text, words
    assert "sha256" not in text


def test_memory_does_not_grow_with_the_store(tmp_path):
    def peak(root):
        store = Store.open(root)
        tracemalloc.start()
        found = inspect(store)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return found["frames"], most

    root = tmp_path / "s"
    with Store.create(root, card(side=2)) as store:
        for number in range(10):
            store.append(episode(number, 5000, side=2))
    first = next(store.segments.glob("*.zarr"))
    peak(root)  # what is imported and cached once
    small = peak(root)
    for number in range(1, 10):
        shutil.copytree(first, store.segments / f"{number:06d}.zarr")
    large = peak(root)
    assert large[0] == 10 * small[0]
    assert large[1] < 1.2 * small[1], (small, large)
    assert small[1] > plain_file(first, "reward").stat().st_size  # it did read


def test_a_store_that_is_sealed_meanwhile_is_counted_once(tmp_path):
    filled(tmp_path / "s")
    reader = Store.open(tmp_path / "s")
    before = inspect(reader)
    Store.open(tmp_path / "s", write=True).seal()
    assert {**before, "segments": 3, "staged": 0, "bytes": 0, "bytes_per_frame": 0} == {
        **inspect(reader), "bytes": 0, "bytes_per_frame": 0
    }  # fmt: skip


@pytest.mark.parametrize("lengths", [[10], [5, 1, 9], list(range(1, 200)), [3] * 48])
def test_pictures_are_spread_over_the_episodes(lengths):
    lengths = np.array(lengths)
    chosen = spread(lengths, 48)
    assert 1 <= len(chosen) <= 48
    assert len(np.unique(chosen, axis=0)) == len(chosen)
    assert (chosen[:, 1] >= 0).all()
    assert (chosen[:, 1] < lengths[chosen[:, 0]]).all()
    assert len(np.unique(chosen[:, 0])) == min(48, len(lengths))
    assert len(np.unique(chosen[:, 1])) > 1


@pytest.mark.parametrize("channels", [1, 3])
def test_the_contact_sheet_shows_the_frames(tmp_path, channels):
    store, episodes = filled(tmp_path / "s", channels=channels)
    path = contact_sheet(tmp_path / "sheet.png", store, 5)
    sheet = np.array(Image.open(path))
    scale = 168 // 8
    for k, (i, step) in enumerate(spread(store.lengths, 5).tolist()):
        x = 6 + k * (168 + 6)
        shown = sheet[30 : 30 + 168 : scale, x : x + 168 : scale]
        frame = episodes[i].obs[step]
        np.testing.assert_array_equal(shown, frame if channels == 3 else np.stack([frame] * 3, -1))
        assert len(np.unique(sheet[30 + 168 : 30 + 168 + 30, x : x + 168])) > 2, "a caption is written below"
    assert not list(tmp_path.glob("*.tmp*"))


def test_no_pictures_are_refused(tmp_path):
    store, _ = filled(tmp_path / "s")
    with pytest.raises(UserError, match="pictures=0 must be at least 1"):
        contact_sheet(tmp_path / "sheet.png", store, 0)
