from dataclasses import fields

import numpy as np
import pytest
import torch

from tests.unit.stores import episode, filled
from worldmodels.data.card import make_card
from worldmodels.data.datamodule import StoreDataModule
from worldmodels.data.mixing import Mixture, check_fits, logged_actions, open_stores
from worldmodels.data.sampling import even_windows, shared_windows
from worldmodels.data.store import Store
from worldmodels.data.transforms import Transform
from worldmodels.types import Segment, UserError, game_key


def other_game(path, count=4, game="pong", channels=3, side=8, colour="rgb", **fields):
    obs = {"height": side, "width": side, "channels": channels, "colour": colour}
    with Store.create(path, make_card("toy", game, obs, seed=1, action_set=[0, 17], **fields)) as store:
        for i in range(count):
            store.append(episode(100 + i, channels=channels, side=side))
    return path


@pytest.fixture
def paths(tmp_path):
    filled(tmp_path / "a", count=7, seal_at=(3,))
    return [tmp_path / "a", other_game(tmp_path / "b"), other_game(tmp_path / "c", count=3, game="catch")]


def equal(a, b, but=()):
    for f in fields(Segment):
        if f.name != "side":
            assert torch.equal(getattr(a, f.name), getattr(b, f.name)), f.name
    assert set(a.side) - set(but) == set(b.side) - set(but)
    for name in set(a.side) - set(but):
        assert torch.equal(a.side[name], b.side[name]), name


def test_it_reads_what_the_stores_read(paths):
    mix, stores = Mixture(paths, Transform()), [Store.open(p) for p in paths]
    assert mix.lengths.tolist() == [n for s in stores for n in s.lengths]
    windows = [(2, 0), (0, 3), (1, 1), (0, 2), (2, 2), (0, 6), (1, 3), (1, 0)]
    numbers = [sum(len(s.lengths) for s in stores[:n]) + i for n, i in windows]
    starts = np.array([(number, i - 1) for number, (_, i) in zip(numbers, windows, strict=True)])
    batch = mix.read(starts, 5)
    assert batch.side["store"].tolist() == [n for n, _ in windows] and batch.side["store"].dtype == torch.int64
    for row, (n, i) in enumerate(windows):
        equal(batch.rows(slice(row, row + 1)), stores[n].read([(i, i - 1)], 5), but=["store"])
    for name in ("reward", "flags"):
        np.testing.assert_array_equal(mix.column(name), np.concatenate([s.column(name) for s in stores]))
    for number, (n, i) in zip(numbers, windows, strict=True):
        assert mix.episode_info(number) == stores[n].episode_info(i)
        assert mix.offsets[number + 1] - mix.offsets[number] == stores[n].lengths[i]
    for wrong in (-1, len(mix.lengths)):
        with pytest.raises(IndexError):
            mix.read([(wrong, 0)], 3)


def test_a_batch_from_one_store_knows_it_too(paths):
    assert Mixture(paths, Transform()).read([(8, 0), (7, 0)], 3).side["store"].tolist() == [1, 1]


def test_splits_are_those_of_the_stores(paths):
    mix, stores = Mixture(paths, Transform()), [Store.open(p) for p in paths]
    for name, split in mix.splits.items():
        want = [i + first for s, first in zip(stores, (0, 7, 11), strict=True) for i in s.splits[name].tolist()]
        assert split.tolist() == want
    assert sorted(np.concatenate(list(mix.splits.values()))) == list(range(14))


def test_its_card(paths):
    mix = Mixture(paths, Transform(4, "gray"))
    assert mix.card["games"] == ["catch", "pong"] and mix.games.tolist() == [0] * 7 + [1] * 4 + [0] * 3
    assert mix.card["game"] == "catch" and mix.card["obs"]["channels"] == 1 and mix.card["obs"]["height"] == 4
    assert mix.card["action_set"] == list(range(18))


def test_fixed_windows_are_shared_evenly_by_games(paths):
    mix = Mixture(paths, Transform())
    starts = shared_windows(mix, mix.games, np.arange(14), 8, 3)
    games = mix.games[starts[:, 0]]
    assert np.bincount(games).tolist() == [4, 4], "though one has more than twice the episodes"
    assert all(set(games[k : k + 2]) == {0, 1} for k in range(0, 8, 2)), "each batch is of both"
    assert len(np.unique(starts, axis=0)) == 8
    one = shared_windows(mix, mix.games[:7], np.arange(7), 8, 3)
    np.testing.assert_array_equal(one, even_windows(mix, np.arange(7), 8, 3))


def test_a_window_and_an_action_are_of_a_game_by_name(paths):
    mix, turned = Mixture(paths, Transform()), Mixture(paths[::-1], Transform())
    key = {game: game_key(game) for game in ("catch", "pong")}
    assert mix.read([(0, 0), (7, 0), (11, 0)], 2).side["game"].tolist() == [key["catch"], key["pong"], key["catch"]]
    assert turned.read([(0, 0), (3, 0), (7, 0)], 2).side["game"].tolist() == [key["catch"], key["pong"], key["catch"]]
    by_game = logged_actions(mix)
    assert by_game == logged_actions(turned) and by_game.keys() == {"catch", "pong"}
    assert by_game["pong"] == np.unique(Store.open(paths[1]).column("action")).tolist()
    assert logged_actions(Store.open(paths[2])).keys() == {"catch"}


def test_a_store_that_grows_moves_no_episode(paths):
    mix = Mixture(paths, Transform())
    before, splits = mix.read([(7, 0), (0, 0)], 4), mix.splits
    with Store.open(paths[0], write=True) as store:
        store.append(episode(55))
        store.seal()
    for store in mix.stores:
        store.refresh()
    assert len(mix.stores[0].lengths) == 8
    equal(mix.read([(7, 0), (0, 0)], 4), before)
    assert {k: v.tolist() for k, v in mix.splits.items()} == {k: v.tolist() for k, v in splits.items()}
    assert len(mix.column("reward")) == mix.offsets[-1]


def test_sizes_and_colours_are_brought_together(tmp_path):
    filled(tmp_path / "a", count=3)
    other_game(tmp_path / "gray", channels=1, side=12, colour="ale_gray")
    paths = [tmp_path / "a", tmp_path / "gray"]
    for transform in (Transform(6, "gray"), Transform(8, "rgb"), Transform(12, "gray")):
        mix = Mixture(paths, transform)
        batch = mix.read([(0, 0), (4, 0)], 3)
        obs = mix.card["obs"]
        assert batch.obs.shape[2:] == (obs["channels"], obs["height"], obs["width"])
        for row, (path, start) in enumerate(zip(paths, [(0, 0), (1, 0)], strict=True)):
            equal(batch.rows(slice(row, row + 1)), transform(Store.open(path).read([start], 3)), but=["store"])


@pytest.mark.parametrize(
    "kw, transform, match",
    [
        (
            dict(side=12),
            (None, "rgb"),
            "obs.height=12 but .*/a, which .*/b is to be mixed with, has 8: give data.transform.size=8, to",
        ),
        (
            dict(channels=1, colour="ale_gray"),
            (8,),
            "obs.channels=1 but .*/a, which .*/b is .* has 3: give data.transform.colour=rgb, to",
        ),
        (dict(frame_skip=3), (), "frame_skip=3 but .*/a, which .*/b .* has 4: no setting brings the two together"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, kw, transform, match):
    filled(tmp_path / "a", count=2)
    other_game(tmp_path / "b", **kw)
    with pytest.raises(UserError, match=match) as error:
        Mixture([tmp_path / "a", tmp_path / "b"], Transform(*transform))
    assert "\n" not in str(error.value)


def test_what_a_refusal_asks_for_is_taken():
    """Whatever the two are, the settings that are asked for in turn bring them together."""
    native = {"height": 20, "width": 20, "channels": 3, "resize": "none"}
    log = {"height": 84, "width": 84, "channels": 1, "colour": "ale_gray"}
    rgb, small = (
        {"height": 84, "width": 84, "channels": 3},
        {"height": 32, "width": 32, "channels": 1, "colour": "cv2_gray"},
    )
    cards = [make_card("toy", "pong", obs) for obs in (native, log, rgb, small)]
    for data in cards:
        for model in cards:
            given = {}
            for _ in range(3):
                try:
                    check_fits(Transform(**given).card(data), model, "the checkpoint")
                    break
                except UserError as error:
                    name, value = str(error).partition("give data.transform.")[2].partition(",")[0].split("=")
                    given[name] = int(value) if name == "size" else value
            else:
                pytest.fail(f"{data['obs']} and {model['obs']} were not brought together by {given}")
            check_fits(model, Transform(**given).card(data), "a model of these")
            same = Transform(colour="gray" if model["obs"]["channels"] == 1 else "rgb").card(model)
            check_fits(same, model, "the checkpoint")


def test_which_stores(paths, tmp_path):
    assert isinstance(open_stores(str(paths[0]), Transform()), Store)
    assert isinstance(open_stores([paths[0]], Transform()), Store)
    assert isinstance(open_stores(paths[0], Transform(4)), Mixture)
    for wrong in ([], [paths[0], paths[1], str(paths[0])], [paths[0], paths[0].parent / "b" / ".." / "a"]):
        with pytest.raises(UserError, match="must name at least one store, and none of them twice"):
            open_stores(wrong, Transform())
    with pytest.raises(UserError, match="there is no store at .*/none"):
        open_stores([paths[0], tmp_path / "none"], Transform())


def test_a_game_is_drawn_as_often_as_is_asked_for_by_its_name(paths):
    settings = {"batch_size": 4000, "length": 3, "validation": {"length": 3}}

    def share(**weights):
        data = StoreDataModule([str(path) for path in paths], weights=weights, **settings)
        return (next(iter(data.train_dataloader())).side["store"] == 1).float().mean().item()

    assert share(game=0.0) == pytest.approx(0.5, abs=0.03)
    assert share(game=0.0, games={"pong": 4.0}) == pytest.approx(0.8, abs=0.03)
    assert share(game=0.0, games=None) == share(game=0.0)
    unknown, none = ({"tennis": 2.0}, "the names of games in the log"), ({"pong": 0}, "numbers above 0")
    for wrong, sentence in (unknown, none, (3, "the names of games")):
        with pytest.raises(UserError, match=sentence):
            StoreDataModule([str(path) for path in paths], weights={"games": wrong}, **settings)
