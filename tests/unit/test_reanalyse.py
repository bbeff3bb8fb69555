"""Reanalyse: both ways give the same targets, only the target network decides them, and nothing is searched twice."""

import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.unit.test_muzero import muzero, spread
from worldmodels.config import build
from worldmodels.data import side
from worldmodels.data.reanalyse import AGE, FRESH, LOGGED, SOURCE, STORED, ReanalyseDataModule, search_rows
from worldmodels.data.side import mark_latest
from worldmodels.data.store import Store
from worldmodels.data.targets import COLUMNS, returns_to_go
from worldmodels.learners import reanalysing
from worldmodels.learners.muzero import searching
from worldmodels.learners.policy import Apart
from worldmodels.learners.reanalysing import RUN, Chunks, reanalyse
from worldmodels.models.muzero import MuZero
from worldmodels.models.muzero_loss import POLICY, POLICY_KNOWN, VALUE, VALUE_KNOWN
from worldmodels.planning.gumbel import gumbel_search
from worldmodels.types import UserError

GUMBEL = {"_target_": "worldmodels.planning.planners.gumbel", "num_simulations": 6}
CATCH = "worldmodels.data.sources.catch_play.catch"
PLAY = {"skill": 0.5}
CPU = {"accelerator": "cpu", "devices": 1}
WINDOWS = {"batch_size": 8, "length": 8, "left_padding": 1, "right_padding": 6}


def catch(path: Path, seed: int = 0, steps: int = 120) -> Store:
    store = Store.create(path, build({**PLAY, "_target_": f"{CATCH}_card", "seed": seed}))
    store.close()
    grow(path, seed, steps)
    return Store.open(path)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return catch(tmp_path_factory.mktemp("reanalyse") / "catch")


@pytest.fixture
def model() -> MuZero:
    return spread(muzero("model.frames=2", "model.unroll=3", "model.td_steps=2", actions=[0, 3, 4])).eval()


def grow(path: Path, seed: int, steps: int = 40, seal: bool = True) -> None:
    """More episodes at the end of a store."""
    store = Store.open(path, write=True)
    for episode in build({**PLAY, "_target_": f"{CATCH}_play"}, steps=steps, seed=seed):
        store.append(episode)
    if seal:
        store.seal()
    store.close()


def learner(model: MuZero, step: int = 0, **changes: Any) -> Any:
    """What a data module asks a learner for."""
    own = {"noise_key": (7, 0), "search": searching(GUMBEL), "global_rank": 0, "global_step": step, "target_step": step}
    own |= {"target": Apart(model), "clip": torch.sign, "batch_number": lambda: 3}
    return SimpleNamespace(**(own | changes))


def batch(data: ReanalyseDataModule) -> Any:
    return next(iter(data.train_dataloader()))


def test_bulk_and_batches_give_the_same_targets(store: Store, model: MuZero, tmp_path: Path) -> None:
    """Of every row, since the noise of a row is its own."""
    rows = reanalyse(store, model, searching(GUMBEL), "first", tmp_path / "parts", CPU, (7, 0), windows=3, step=5)
    assert rows == store.offsets[-1]
    data = ReanalyseDataModule(str(store.path), fraction=1.0, **WINDOWS)
    fresh = data.targeted(batch(data), learner(model))
    stored = ReanalyseDataModule(str(store.path), fraction=0.0, version="first", **WINDOWS)
    kept = stored.targeted(batch(stored), learner(model, step=12))
    searched = fresh.side[SOURCE] == FRESH
    assert searched.sum() > 10
    torch.testing.assert_close(fresh.side[POLICY][searched], kept.side[POLICY][searched])
    torch.testing.assert_close(fresh.side[VALUE][searched], kept.side[VALUE][searched])
    assert (kept.side[SOURCE][kept.side[VALUE_KNOWN]] == STORED).all()
    assert set(kept.side[AGE][kept.side[VALUE_KNOWN]].tolist()) == {7}  # 12 steps, of which the version has seen 5
    other = data.targeted(batch(data), learner(model, noise_key=(8, 0)))
    assert not torch.equal(other.side[POLICY], fresh.side[POLICY])


def test_only_the_target_network_changes_the_loss(store: Store, model: MuZero) -> None:
    data = ReanalyseDataModule(str(store.path), **WINDOWS)
    segment, student = (
        batch(data),
        spread(muzero("model.frames=2", "model.unroll=3", "model.td_steps=2", actions=[0, 3, 4])),
    )
    before = student.loss(data.targeted(segment, learner(model)))[0]
    assert student.loss(data.targeted(segment, learner(model)))[0] == before
    with torch.no_grad():
        model.value.layer.bias += torch.linspace(-1, 1, 51)
    assert student.loss(data.targeted(segment, learner(model)))[0] != before


def test_what_is_replayed_has_the_targets_of_its_own_store(store: Store, model: MuZero, tmp_path: Path) -> None:
    other = catch(tmp_path / "other", 1, 60)
    data = ReanalyseDataModule(
        str(store.path), fraction=0.0, replay={"store": str(other.path), "share": 0.5}, **WINDOWS
    )
    both = data.targeted(batch(data), learner(model))
    rows = both.side["starts"][:, 0] >= len(store.lengths)
    assert 0 < rows.sum() < len(rows)
    starts = both.side["starts"][rows] - torch.tensor([len(store.lengths), 0])
    segment = other.read(starts.numpy(), both.length)
    segment = replace(segment, side=segment.side | {"starts": starts})
    alone = ReanalyseDataModule(str(other.path), fraction=0.0, **WINDOWS).targeted(segment, learner(model))
    assert alone.side[VALUE_KNOWN].any()
    for name in (POLICY, VALUE, VALUE_KNOWN):
        known = alone.mask if name == VALUE_KNOWN else alone.side[VALUE_KNOWN]
        assert torch.equal(both.side[name][rows][known], alone.side[name][known]), name


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_the_fraction_is_the_share_of_windows_that_is_searched(store: Store, model: MuZero, fraction: float) -> None:
    data = ReanalyseDataModule(str(store.path), fraction=fraction, **WINDOWS)
    segment = data.targeted(batch(data), learner(model))
    fresh = ((segment.side[SOURCE] == FRESH) & segment.mask).any(1)
    assert fresh.sum() <= fraction * 8
    assert (~segment.mask[~fresh, 1:4].any(1)).sum() + fresh.sum() >= fraction * 8  # but windows that are all padding
    logged = segment.side[VALUE_KNOWN] & (segment.side[SOURCE] == LOGGED)
    action = model.index[segment.action[logged]]
    assert (segment.side[POLICY][logged].argmax(-1) == action).all()
    again = data.targeted(batch(data), learner(model))
    assert torch.equal(again.side[SOURCE], segment.side[SOURCE])


@pytest.mark.parametrize(("search_from", "searched"), [(3, True), (4, False)])
def test_searches_begin_with_a_batch(store: Store, model: MuZero, search_from: int, searched: bool) -> None:
    data = ReanalyseDataModule(str(store.path), search_from=search_from, **WINDOWS)
    made = data.targeted(batch(data), learner(model))  # batch 3
    assert (made.side[SOURCE] == FRESH).any() == searched
    if not searched:
        assert (made.side[SOURCE][made.side[VALUE_KNOWN]] == LOGGED).all()


def test_a_small_fraction_is_not_none(store: Store, model: MuZero) -> None:
    data = ReanalyseDataModule(str(store.path), fraction=0.1, **WINDOWS)
    data.left_padding = 0  # nowhere is a window all padding
    searched = []
    for k, segment in zip(range(20), data.train_dataloader(), strict=False):
        targeted = data.targeted(segment, learner(model, batch_number=lambda k=k: k))
        searched.append(int((targeted.side[SOURCE] == FRESH).any(1).sum()))
    assert sum(searched) == 16 and set(searched) == {0, 1}


def test_logged_values_are_returns_to_the_end() -> None:
    reward, ended = np.array([1, 0, 2, 5, 1], np.float32), np.array([0, 0, 1, 0, 0], bool)
    value, known = returns_to_go(reward, ended, np.array([0, 3, 5]), 0.5)
    assert value.tolist() == [1.5, 1.0, 2.0, 5.5, 1.0]
    assert known.tolist() == [True, True, True, False, False]  # the second episode was cut


def test_logged_actions_teach_where_an_episode_was_cut(tmp_path: Path, model: MuZero) -> None:
    """And its return does not, as nobody knows it."""
    path = tmp_path / "cut"
    with Store.create(path, build({**PLAY, "_target_": f"{CATCH}_card", "seed": 0})) as store:
        for episode in build({**PLAY, "_target_": f"{CATCH}_play"}, steps=60, seed=0):
            store.append(replace(episode, terminated=episode.truncated, truncated=episode.terminated))
    data = ReanalyseDataModule(str(path), fraction=0.0, **WINDOWS)
    segment = data.targeted(batch(data), learner(model))
    assert torch.equal(segment.side[POLICY_KNOWN], segment.mask) and not segment.side[VALUE_KNOWN].any()
    assert model.loss(segment)[1]["loss_policy"] > 0


@pytest.mark.parametrize(("budget", "known"), [(5, False), (8, True)])
def test_a_return_behind_a_budget_is_not_known(store: Store, model: MuZero, budget: int, known: bool) -> None:
    """Of an episode of 4 rows of which 3 may be used, and of a whole one."""
    few: Any = {"budget": budget, "validation": {"length": 2}}
    data = ReanalyseDataModule(str(store.path), fraction=0.0, **WINDOWS, **few)
    segment = data.targeted(batch(data), learner(model))
    assert segment.mask.sum(1).max() == (4 if known else 3)
    assert segment.side[VALUE_KNOWN].any() == known and torch.equal(segment.side[POLICY_KNOWN], segment.mask)


def test_a_row_is_searched_alone_as_in_a_batch(store: Store, model: MuZero) -> None:
    segment = store.read(np.array([[0, -1], [1, -1], [2, -1]]), 6)
    chosen = segment.mask[:, 1:4]
    all_of_it = search_rows(model, segment, range(1, 4), chosen, searching(GUMBEL), None)
    one = search_rows(model, segment.rows(slice(1, 2)), [2], chosen[1:2, 1:2], searching(GUMBEL), None)
    place = int(chosen[0].sum() + chosen[1, 0])
    torch.testing.assert_close(all_of_it.value[place : place + 1], one.value, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(all_of_it.policy[place : place + 1], one.policy, atol=1e-4, rtol=1e-4)


def test_what_was_killed_goes_on(store: Store, model: MuZero, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks that are there are not searched again, and the columns are as of one go."""
    calls: list[int] = []
    search = searching(GUMBEL)

    def counted(*given: Any, **arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        assert search is not None
        return search(*given, **arguments)

    arguments = (tmp_path / "parts", CPU, (1, 0), 4)
    with pytest.raises(KeyboardInterrupt):
        reanalyse(store, model, counted, "cut", *arguments, step=1)
    there = len(list((tmp_path / "parts").rglob("*.npz")))
    assert there == 1
    with pytest.raises(UserError, match="no side column"):
        store.side(COLUMNS["value"], "cut")
    calls[:] = [1, 1]
    reanalyse(store, model, counted, "cut", *arguments, step=1)
    assert len(calls) - 2 == Chunks(store, 2, 4).count - there
    reanalyse(store, model, search, "whole", tmp_path / "other", CPU, (1, 0), 4, step=1)
    for name in COLUMNS.values():
        assert np.array_equal(store.side(name, "cut"), store.side(name, "whole"))
    assert not list(tmp_path.rglob("*.npz")), "nothing is left of the work"


def test_what_was_killed_before_it_was_the_newest_becomes_it(
    model: MuZero, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = catch(tmp_path / "store", 0, 60)
    reanalyse(store, model, None, "old", tmp_path / "old", CPU, step=0)
    for column, version in zip(COLUMNS.values(), ("first", "second"), strict=True):

        def killed(path: Path, column: str = column, version: str = version) -> None:
            if path.parts[-2:] == (column, version):
                raise KeyboardInterrupt
            mark_latest(path)

        monkeypatch.setattr(side, "mark_latest", killed)
        with pytest.raises(KeyboardInterrupt):
            reanalyse(store, model, None, version, tmp_path / version, CPU, step=0)
        monkeypatch.undo()
        reanalyse(store, model, None, version, tmp_path / version, CPU, step=0)
        assert ReanalyseDataModule(str(store.path), version="newest", **WINDOWS).version == [version]
    reanalyse(store, model, None, "first", tmp_path / "first", CPU, step=0)
    assert ReanalyseDataModule(str(store.path), version="newest", **WINDOWS).version == ["second"], "it was done"


def test_the_newest_is_that_of_when_training_began(model: MuZero, tmp_path: Path) -> None:
    store = catch(tmp_path / "store", 0, 60)
    reanalyse(store, model, None, "before", tmp_path / "parts", CPU, step=1)
    begun = ReanalyseDataModule(str(store.path), version="newest", **WINDOWS)
    reanalyse(store, model, None, "later", tmp_path / "parts", CPU, step=2)
    resumed = ReanalyseDataModule(str(store.path), version="newest", **WINDOWS)
    assert resumed.version == ["later"]
    with warnings.catch_warnings(action="error"):
        resumed.load_state_dict(begun.state_dict())
    assert resumed.version == ["before"]


def test_versions_have_names(model: MuZero, tmp_path: Path) -> None:
    store = catch(tmp_path / "store", 0, 60)
    reanalyse(store, model, None, "2.0", tmp_path / "parts", CPU, step=1)
    assert ReanalyseDataModule(str(store.path), version=2.0, **WINDOWS).version == ["2.0"]
    for name in ("", "../reanalysed_value/2.0", "mine.tmp1"):
        with pytest.raises(UserError, match="must be a name of letters"):
            ReanalyseDataModule(str(store.path), version=name, **WINDOWS)


def test_targets_that_are_no_numbers_are_told(store: Store, model: MuZero) -> None:
    """Though all that the network gives is finite."""
    data = ReanalyseDataModule(str(store.path), **WINDOWS)
    segment = batch(data)

    def overflown(recurrent: Any, root: Any, **given: Any) -> Any:
        def large(state: Any, action: Any) -> Any:
            output, state = recurrent(state, action)
            return output._replace(reward=torch.full_like(output.reward, 3e38), value=output.reward + 3e38), state

        return gumbel_search(large, root, 6, **given)

    with pytest.raises(UserError, match="in batch 3 .*that the search gives is no finite number"):
        data.targeted(segment, learner(model, search=overflown))


def test_chunks_hold_every_row_once(store: Store) -> None:
    chunks = Chunks(store, 2, 3)
    rows = np.concatenate([c.number[c.segment.mask[:, 1:]].numpy() for c in (chunks[k] for k in range(len(chunks)))])
    assert sorted(rows) == list(range(store.offsets[-1]))
    assert chunks[0].segment.length == 1 + RUN


def test_two_stores_each_with_a_version(tmp_path: Path, model: MuZero) -> None:
    stores = [catch(tmp_path / name, seed, 60) for seed, name in enumerate("ab")]
    for k, store in enumerate(stores):
        reanalyse(store, model, None, f"v{k}", tmp_path / f"parts{k}", CPU, step=k)
    paths = [str(store.path) for store in stores]
    data = ReanalyseDataModule(paths, fraction=0.0, version=["v0", "v1"], **WINDOWS)
    segment = data.targeted(batch(data), learner(model, step=10))
    for k in range(2):
        rows = segment.side[VALUE_KNOWN][segment.side["store"] == k]
        assert set(segment.side[AGE][segment.side["store"] == k][rows].tolist()) == {10 - k}
    half = ReanalyseDataModule(paths, fraction=0.0, version=["v0", None], **WINDOWS)
    segment = half.targeted(batch(half), learner(model, step=10))
    assert (segment.side[SOURCE][segment.side["store"] == 1] == LOGGED).all()
    assert half.version == ["v0", None]


def test_the_second_of_two_stores_has_the_noise_of_its_own_rows(tmp_path: Path, model: MuZero) -> None:
    stores = [catch(tmp_path / name, seed, 60) for seed, name in enumerate("ab")]
    reanalyse(stores[1], model, searching(GUMBEL), "bulk", tmp_path / "parts", CPU, (7, 0), step=0)
    paths = [str(store.path) for store in stores]
    data = ReanalyseDataModule(paths, fraction=1.0, **WINDOWS)
    fresh = data.targeted(batch(data), learner(model))
    stored = ReanalyseDataModule(paths, fraction=0.0, version=[None, "bulk"], **WINDOWS)
    kept = stored.targeted(batch(stored), learner(model))
    both = (fresh.side[SOURCE] == FRESH) & (kept.side[SOURCE] == STORED)
    assert both.sum() > 10
    torch.testing.assert_close(fresh.side[POLICY][both], kept.side[POLICY][both])


def test_stores_that_grow_beside_the_training(tmp_path: Path, model: MuZero) -> None:
    """Rows keep their targets where a store before theirs grows, and new ones get their own."""
    stores = [catch(tmp_path / name, seed, 60) for seed, name in enumerate("ab")]
    paths = [str(store.path) for store in stores]
    settings = {"fraction": 0.0, **WINDOWS}
    data = ReanalyseDataModule(paths, **settings)
    segment, before = batch(data), ReanalyseDataModule(paths, **settings).targeted(batch(data), learner(model))
    assert (segment.side["store"] == 1).any()
    grow(stores[0].path, 5)
    data.store.stores[0].refresh()  # as reading does where an episode was sealed meanwhile
    after = data.targeted(segment, learner(model))
    assert torch.equal(before.side[VALUE_KNOWN], after.side[VALUE_KNOWN])
    assert torch.equal(before.side[VALUE], after.side[VALUE])
    alone = ReanalyseDataModule(paths[0], **settings)
    alone.targeted(batch(alone), learner(model))
    grow(stores[0].path, 6)
    alone.store.refresh()
    starts = np.array([[len(alone.store.lengths) - 1, 0]])
    newest = alone.store.read(starts, 2)
    newest.side["starts"] = torch.from_numpy(starts)
    ended = alone.store.episode(int(starts[0, 0]))
    want = np.sign(ended.reward) @ model.gamma ** np.arange(len(ended))
    assert alone.targeted(newest, learner(model)).side[VALUE][0, 0].item() == pytest.approx(want, abs=1e-5)


def test_what_is_staged_is_left_out(tmp_path: Path, model: MuZero) -> None:
    store = catch(tmp_path / "store", 0, 60)
    sealed = int(store.offsets[-1])
    grow(store.path, 1, seal=False)
    store = Store.open(store.path)
    assert store.offsets[-1] > sealed
    assert reanalyse(store, model, None, "v", tmp_path / "parts", CPU, step=0) == sealed
    assert store.side(COLUMNS["value"], "v").count() == sealed
    fresh = tmp_path / "fresh"
    Store.create(fresh, store.card).close()
    grow(fresh, 1, seal=False)
    with pytest.raises(UserError, match="sealed"):
        reanalyse(Store.open(fresh), model, None, "v", tmp_path / "none", CPU, step=0)


def test_a_name_is_for_one_set_of_targets(tmp_path: Path, model: MuZero) -> None:
    """And not for those of another model, or of the store before it grew."""
    store, parts = catch(tmp_path / "store", 0, 60), tmp_path / "parts"
    rows = reanalyse(store, model, None, "v", parts, CPU, step=1, model_sha256="a")
    assert reanalyse(store, model, None, "v", parts, CPU, step=1, model_sha256="a") == rows
    with pytest.raises(UserError, match="give another version"):
        reanalyse(store, model, None, "v", tmp_path / "other", CPU, step=1, model_sha256="b")
    grow(store.path, 1)
    with pytest.raises(UserError, match="before it grew"):
        reanalyse(Store.open(store.path), model, None, "v", parts, CPU, step=1, model_sha256="a")


def test_other_chunks_are_not_those_of_before(
    store: Store, model: MuZero, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that goes on with other `windows` begins anew: the same file would be of other rows."""
    monkeypatch.setattr(reanalysing, "remove", lambda _: None)  # as one that is killed before it
    for windows, version in ((4, "four"), (3, "three")):
        rows = reanalyse(store, model, None, version, tmp_path / "parts", CPU, windows=windows, step=0)
        assert rows == store.offsets[-1]
        assert not np.ma.getmaskarray(store.side(COLUMNS["value"], version)).any()


def test_actions_that_the_model_has_not(store: Store, tmp_path: Path) -> None:
    """Are no policy to be cloned, and hinder no search."""
    few = spread(muzero("model.frames=2", "model.unroll=3", "model.td_steps=2", actions=[3, 4])).eval()
    data = ReanalyseDataModule(str(store.path), **WINDOWS)
    segment = batch(data)
    strange = (few.index[segment.action] < 0) & segment.mask
    assert strange[:, 1:4].any()
    cloned = data.targeted(segment, learner(few, search=None, noise_key=None))
    assert not cloned.side[VALUE_KNOWN][strange].any()
    assert (cloned.side[SOURCE] == FRESH).any()
    reanalyse(store, few, None, "clone", tmp_path / "clone", CPU, step=0)
    taken = few.index[torch.from_numpy(store.column("action").astype(np.int64))] >= 0
    assert np.array_equal(~np.ma.getmaskarray(store.side(COLUMNS["value"], "clone")), taken.numpy())
    reanalyse(store, few, searching(GUMBEL), "searched", tmp_path / "searched", CPU, (7, 0), step=0)
    stored = ReanalyseDataModule(str(store.path), fraction=0.0, version="searched", **WINDOWS)
    assert torch.equal(stored.targeted(segment, learner(few)).side[VALUE_KNOWN], segment.mask)


def test_without_a_version_no_policy_is_held(store: Store, model: MuZero) -> None:
    data = ReanalyseDataModule(str(store.path), **WINDOWS)
    data.targeted(batch(data), learner(model))
    assert data._logged is not None
    assert data._logged.policy.shape == (1, 3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_both_ways_on_a_gpu(store: Store, model: MuZero, tmp_path: Path) -> None:
    rows = reanalyse(store, model, searching(GUMBEL), "gpu", tmp_path, {"accelerator": "cuda", "devices": 1}, (7, 0))
    assert rows == store.offsets[-1]
    data = ReanalyseDataModule(str(store.path), **WINDOWS)
    segment = data.targeted(batch(data).to("cuda"), learner(model.cuda()))
    assert (segment.side[SOURCE] == FRESH).any()
    assert model.loss(segment, torch.Generator("cuda"))[0].isfinite()


def test_mistakes(store: Store, model: MuZero, tmp_path: Path) -> None:
    path = str(store.path)
    for fraction in (-0.1, 1.5, "half"):
        with pytest.raises(UserError, match="from 0"):
            ReanalyseDataModule(path, fraction=fraction)  # pyrefly: ignore
    with pytest.raises(UserError, match="data.search_from=-1 must be"):
        ReanalyseDataModule(path, search_from=-1)
    with pytest.raises(UserError, match="no side column"):
        ReanalyseDataModule(path, version="nowhere")
    with pytest.raises(UserError, match="no side column.*/7"):
        ReanalyseDataModule(path, version=7)
    with pytest.raises(UserError, match="one for each"):
        ReanalyseDataModule(path, version=["a", "b"])
    about = {"family": "muzero", "store": "another", "version": "theirs", "actions": [0, 3, 4], "step": 1}
    for name, change in (("theirs", {}), ("family", {"store": store.uuid, "family": "other"})):
        store.write_side(COLUMNS["value"], name, [0], np.zeros(1, np.float32), about | change)
        with pytest.raises(UserError, match="worldmodels reanalyse"):
            ReanalyseDataModule(path, version=name)
    reanalyse(store, model, None, "mine", tmp_path / "parts", CPU, step=1)
    data = ReanalyseDataModule(path, version="mine", **WINDOWS)
    other = spread(muzero("model.frames=2", "model.unroll=3", "model.td_steps=2", actions=[0, 3])).eval()
    with pytest.raises(UserError, match="search again"):
        data.targeted(batch(data), learner(other))


def test_a_network_without_numbers_is_told(store: Store, model: MuZero, tmp_path: Path) -> None:
    data = ReanalyseDataModule(str(store.path), **WINDOWS)
    with torch.no_grad():
        model.policy.output.weight.fill_(torch.nan)
    where = r"in batch 3 \(optimizer step 4, rank 0\): the model's "
    with pytest.raises(UserError, match=where + r"prior_logits is no finite number in row \d+"):
        data.targeted(batch(data), learner(model, step=4))
    told = "in chunk 0 of .*catch, searched by the model of step 0: .* prior_logits is no finite number in row 0"
    with pytest.raises(UserError, match=told):
        reanalyse(store, model, searching(GUMBEL), "broken", tmp_path, CPU, step=0)
    with torch.no_grad():
        model.policy.output.weight.zero_()
        model.value.layer.weight.fill_(torch.nan)
    with pytest.raises(UserError, match=where.replace("4", "0") + r"value is no finite number in row \d+"):
        data.targeted(batch(data), learner(model, search=None, noise_key=None))


def test_validation_windows_are_left_alone(store: Store) -> None:
    data = ReanalyseDataModule(str(store.path), **WINDOWS)
    segment = batch(data)
    assert data.on_after_batch_transfer(segment, 0) is segment
