import multiprocessing
import threading
from functools import partial
from itertools import islice

import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.unit.stores import card, episode, filled
from worldmodels.data.datamodule import StoreDataModule
from worldmodels.data.sampling import WindowSampler
from worldmodels.data.store import Store
from worldmodels.types import Segment, UserError

STEPS = 9


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("datamodule") / "s"
    filled(path, count=10)
    return str(path)


class Learner(LightningModule):
    """Remembers which batches it saw."""

    def __init__(self, die_at=None):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen, self.validated, self.die_at = [], [], die_at

    def training_step(self, batch, index):
        if len(self.seen) == self.die_at:
            raise RuntimeError("killed")
        self.seen.append(fingerprint(batch))
        return self.layer(batch.reward.mean().view(1, 1)).sum()

    def validation_step(self, batch, index):
        self.validated.append(fingerprint(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def fingerprint(batch):
    assert isinstance(batch, Segment)
    return int(batch.obs.long().sum()), int(batch.action.sum()), batch.batch_size


def fit(store, folder, resume=None, die_at=None, steps=STEPS, save=("train",), data=None, learner=Learner, **trainer):
    learner = learner(die_at)
    data = StoreDataModule(store, 4, 5, 2, **{"event_share": 0.5, "seed": 3} | (data or {}))
    every = {"train": {"every_n_train_steps": 1}, "validation": {"save_on_train_epoch_end": False}}
    saves = [
        ModelCheckpoint(folder / kind, "{step}", save_top_k=-1, save_on_exception=True, **every[kind]) for kind in save
    ]
    t = Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=saves,
        **{"val_check_interval": 3, "check_val_every_n_epoch": None} | trainer,
    )
    try:
        t.fit(learner, data, ckpt_path=resume, weights_only=True)
    except RuntimeError as e:
        assert "killed" in str(e)
    return learner


@pytest.fixture(scope="module")
def straight(store, tmp_path_factory):
    return fit(store, tmp_path_factory.mktemp("straight")).seen


def test_batch_k_is_what_the_sampler_says(store, straight):
    data = StoreDataModule(store, 4, 5, 2, event_share=0.5, seed=3)
    draw = WindowSampler(data.store, data.store.splits["train"], 4, 5, 2, 0.5, 3)
    assert straight == [fingerprint(data.store.read(draw(k), 5)) for k in range(STEPS)]
    assert len(set(straight)) == STEPS


@pytest.mark.parametrize("at", [1, 3, 5])
def test_resume_is_exact(store, straight, tmp_path, at):
    first = fit(store, tmp_path, steps=at).seen
    second = fit(store, tmp_path, resume=tmp_path / "train" / f"step={at}.ckpt").seen
    assert first + second == straight


def test_resume_from_a_checkpoint_made_while_validating(store, straight, tmp_path):
    fit(store, tmp_path, save=("validation",))
    assert fit(store, tmp_path, resume=tmp_path / "validation" / "step=6.ckpt").seen == straight[6:]


def test_resume_after_an_exception(store, straight, tmp_path):
    assert fit(store, tmp_path, die_at=4, save=("validation",)).seen == straight[:4]
    saved = [p for p in (tmp_path / "validation").iterdir() if p.name != "step=3.ckpt"]
    assert len(saved) == 1
    assert torch.load(saved[0], weights_only=True)["StoreDataModule"]["drawn"] == 4
    assert fit(store, tmp_path, resume=saved[0]).seen == straight[4:]


def test_an_epoch_that_is_cut_short_does_not_repeat_batches(store, straight, tmp_path):
    assert fit(store, tmp_path, limit_train_batches=4, val_check_interval=None).seen == straight


def test_no_thread_outlives_training(store, tmp_path):
    fit(store, tmp_path, steps=2)
    names = [t.name for t in threading.enumerate() if t.name.startswith("read-ahead")]
    assert not names


def test_a_failure_while_reading_ahead_reaches_the_trainer(store):
    data = StoreDataModule(store, 4, 5)
    batches = iter(data.train_dataloader())
    next(batches)
    data.store.read = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        [next(batches) for _ in range(5)]


def test_ranks_read_different_batches(store):
    class At:
        global_rank, world_size = 1, 2

        class strategy:
            root_device = torch.device("cpu")

        class fit_loop:
            class epoch_loop:
                class batch_progress:
                    state_dict = staticmethod(lambda: {"total": {"processed": 7}})

    data = StoreDataModule(store, 4, 5, seed=1)
    data.trainer = At
    batch = next(iter(data.train_dataloader()))
    want = WindowSampler(data.store, data.store.splits["train"], 4, 5, seed=1, rank=1, world=2)(7)
    assert fingerprint(batch) == fingerprint(data.store.read(want, 5))


def test_validation_windows_are_fixed_and_held_out(store):
    data = StoreDataModule(store, 4, 5, validation={"windows": 7, "length": 11})
    held_out, batches = set(data.store.splits["validation"]), list(data.val_dataloader())
    assert [b.batch_size for b in batches] == [4, 3] and {b.length for b in batches} == {11}
    again = list(data.val_dataloader())
    assert [fingerprint(b) for b in batches] == [fingerprint(b) for b in again]
    everything = np.concatenate([data.store.episode(i).obs for i in held_out])
    frames = {f.tobytes() for f in everything}
    real = batches[0].obs[:, 0].permute(0, 2, 3, 1)
    assert all(f.numpy().tobytes() in frames for f in real)
    assert len(list(data.test_dataloader())) > 0


def test_segments_move_whole(store):
    data = StoreDataModule(store, 2, 3)
    batch = next(iter(data.train_dataloader()))
    moved = data.transfer_batch_to_device(batch, torch.device("meta"), 0)
    assert moved.obs.device.type == moved.side["life_loss"].device.type == "meta"


def test_bad_settings(store, tmp_path):
    with pytest.raises(UserError, match="no store at"):
        StoreDataModule(str(tmp_path / "none"))
    with pytest.raises(UserError, match="no setting 'window'; it has windows, length, batch_size"):
        StoreDataModule(store, validation={"window": 3})
    filled(tmp_path / "one", count=1)
    data = StoreDataModule(str(tmp_path / "one"), 2, 3)
    assert data.card["game"] == "catch" and next(iter(data.train_dataloader())).batch_size == 2
    with pytest.raises(UserError, match="has 1 episodes and none of them in its validation split; collect"):
        data.val_dataloader()


def test_resuming_on_other_data_warns(store):
    data = StoreDataModule(store, 4, 5)
    state = data.state_dict()
    data.load_state_dict(state)
    with pytest.warns(UserWarning, match="other batches than it left: length, seed changed"):
        StoreDataModule(store, 4, 6, seed=9).load_state_dict(state)


def batches(*args, count=STEPS, **kw):
    return list(islice(StoreDataModule(*args, **kw).train_dataloader(), count))


def same(a, b):
    for name in ("obs", "action", "reward", "terminated", "truncated", "mask", "next_mask"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert a.side.keys() == b.side.keys()
    for name in a.side:
        assert torch.equal(a.side[name], b.side[name]), name


ALL = dict(left_padding=2, seed=3, relabel="future", transform={"size": 4, "colour": "gray"})


@pytest.mark.parametrize(
    "kw",
    [
        dict(replacement=False, event_share=0.5),
        dict(event_share=0.5, weights={"game": 0.0, "recency": 3, "return": 0.5}),
        dict(priority={"alpha": 0.5}),
    ],
)
def test_workers_make_the_same_batches(store, tmp_path, kw):
    filled(tmp_path / "other", count=5)
    stores = [store, str(tmp_path / "other")]
    by_thread = batches(stores, 4, 5, **ALL, **kw)
    by_workers = batches(stores, 4, 5, **ALL, **kw, workers=2)
    assert len(by_thread) == len(by_workers) == STEPS
    for a, b in zip(by_thread, by_workers, strict=True):
        same(a, b)
    assert a.obs.shape[2:] == (1, 4, 4) and {"goal", "goal_offset", "store", "life_loss"} <= a.side.keys()
    assert not multiprocessing.active_children(), "no worker outlives its iterator"


def test_workers_leave_the_random_numbers_of_the_training_alone(store):
    states = []
    for workers in (0, 1):
        torch.manual_seed(0)
        batches(store, 4, 5, workers=workers, count=2)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_a_mistake_that_a_worker_finds_is_one_sentence(store):
    data = StoreDataModule(store, 4, 5, workers=1)

    def refuse(*_):
        raise UserError("the disk is on fire; put it out")

    data.store.read = refuse
    with pytest.raises(UserError, match="^the disk is on fire; put it out$"):
        next(iter(data.train_dataloader()))


def test_resume_with_workers(store, straight, tmp_path):
    first = fit(store, tmp_path, steps=4, data=dict(workers=1)).seen
    second = fit(store, tmp_path, resume=tmp_path / "train" / "step=4.ckpt", data=dict(workers=2)).seen
    assert first + second == straight


def test_every_window_once_through_the_trainer_and_a_resume(store, tmp_path):
    settings = dict(replacement=False, event_share=0.0, relabel="future")
    straight = fit(store, tmp_path / "a", data=settings).seen
    first = fit(store, tmp_path / "b", steps=4, data=settings).seen
    second = fit(store, tmp_path / "b", resume=tmp_path / "b" / "train" / "step=4.ckpt", data=settings).seen
    assert first + second == straight and len(set(straight)) == STEPS


class Prioritiser(Learner):
    """Finds windows of many rewards important, and the more so the later."""

    def training_step(self, batch, index):
        importance = batch.side["importance"]
        assert importance.shape == (4,) and importance.max() == 1
        self.trainer.datamodule.update(batch.side["starts"], (self.global_step + 1) ** batch.reward.sum(1))
        return super().training_step(batch, index)


PRIORITY = dict(event_share=0.0, priority={"alpha": 1.0, "beta": 0.5})


@pytest.mark.parametrize("at, workers", [(1, 0), (6, 0), (9, 2), (14, 0)])
def test_resume_with_priorities_is_exact(store, tmp_path, at, workers):
    run = partial(fit, learner=Prioritiser, data=PRIORITY | dict(workers=workers))
    straight = run(store, tmp_path / "a", steps=18).seen
    first = run(store, tmp_path / "b", steps=at).seen
    second = run(store, tmp_path / "b", steps=18, resume=tmp_path / "b" / "train" / f"step={at}.ckpt").seen
    assert first + second == straight
    # an epoch that is cut short begins again where it stopped, even if no checkpoint was made there
    options = {"save": (), "enable_checkpointing": False, "limit_train_batches": 7, "val_check_interval": None}
    assert run(store, tmp_path / "c", steps=18, **options).seen == straight
    uniform = fit(store, tmp_path / "d", steps=18, data=dict(event_share=0.0)).seen
    assert uniform != straight


def test_priorities_of_all_ranks_count(store, tmp_path):
    """Two processes hold the same priorities after updates from both, and draw windows of their own."""
    learner = RankPrioritiser(tmp_path)
    data = StoreDataModule(store, 4, 5, **PRIORITY)
    trainer = Trainer(
        max_steps=8,
        accelerator="cpu",
        devices=2,
        strategy="ddp_fork",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(learner, data)
    a, b = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert a["starts"] != b["starts"]
    assert torch.equal(a["leaves"], b["leaves"]) and len(a["leaves"].unique()) > 2


class RankPrioritiser(Learner):
    def __init__(self, folder):
        super().__init__()
        self.folder, self.starts = folder, []

    def training_step(self, batch, index):
        self.starts += batch.side["starts"].tolist()
        self.trainer.datamodule.update(batch.side["starts"], 1 + batch.reward.sum(1).abs() + self.global_rank)
        return super().training_step(batch, index)

    def on_train_end(self):
        leaves = self.trainer.datamodule.state_dict()["priorities"]["leaves"]
        torch.save({"starts": self.starts, "leaves": leaves}, self.folder / f"{self.global_rank}.pt")


def test_priorities_without_a_use_for_them(store):
    data = StoreDataModule(store, 4, 5)
    with pytest.raises(UserError, match="data.priority.alpha"):
        data.update(torch.zeros(4, 2), torch.ones(4))


def test_several_stores(store, tmp_path):
    filled(tmp_path / "b", count=6)
    data = StoreDataModule([store, str(tmp_path / "b")], 64, 5, validation={"windows": 30, "batch_size": 30})
    batch = next(iter(data.train_dataloader()))
    assert set(batch.side["store"].tolist()) == {0, 1}
    fixed = next(iter(data.val_dataloader()))
    assert set(fixed.side["store"].tolist()) == {0, 1}, "validation is over all stores"
    assert data.card["games"] == ["catch"]
    with pytest.warns(UserWarning, match="store, episodes changed"):
        StoreDataModule(store, 64, 5, validation={"windows": 30}).load_state_dict(data.state_dict())


def test_gray_frames_of_84_pixels_need_no_setting(tmp_path):
    with Store.create(tmp_path / "s", card(1, 84)) as store:
        for i in range(3):
            store.append(episode(i, 20, channels=1, side=84))
    data = StoreDataModule(str(tmp_path / "s"), 2, 5, validation={"windows": 2})
    assert next(iter(data.train_dataloader())).obs.shape == (2, 6, 1, 84, 84)
    assert next(iter(data.val_dataloader())).obs.shape == (2, 6, 1, 84, 84)


def test_a_hook_of_ones_own(store):
    def hook(segment, starts, source, rng):
        assert source.lengths[starts[:, 0]].shape == (4,)
        segment.side["noise"] = torch.from_numpy(rng.random(4))
        return segment

    a, b = (batches(store, 4, 5, relabel=hook, count=2) for _ in range(2))
    assert torch.equal(a[1].side["noise"], b[1].side["noise"])
    assert not torch.equal(a[0].side["noise"], a[1].side["noise"])


@pytest.mark.parametrize(
    "kw, match",
    [
        (dict(relabel="past"), "data.relabel=past is unknown; choose one of future, or null"),
        (dict(workers=-1), "data.workers=-1 must be a whole number of at least 0"),
        (dict(replacement="no"), "data.replacement=no must be true or false"),
        (dict(transform={"side": 3}), "data.transform has no setting 'side'; it has size, colour"),
        (dict(priority={"gamma": 3}), "data.priority has no setting 'gamma'; it has alpha, beta"),
        (dict(transform={"colour": "grey"}), "data.transform.colour=grey is unknown"),
    ],
)
def test_settings_that_are_none(store, kw, match):
    with pytest.raises(UserError, match=match):
        StoreDataModule(store, **kw)


def test_outcomes_are_the_rewards_to_come_within_the_episode(store):
    opened = Store.open(store)
    data = StoreDataModule(store, 16, 5, left_padding=3, ahead=7)
    for draw, segment in islice(zip(data.train_dataloader().draws(), data.train_dataloader(), strict=False), 3):
        for (number, start), ahead in zip(draw.starts, segment.side["ahead"], strict=True):
            reward = opened.episode(int(number)).reward
            rows = range(start, start + 5)
            expected = [reward[t : t + 7].sum() if 0 <= t < len(reward) else 0 for t in rows]
            np.testing.assert_allclose(ahead, expected, rtol=1e-6)
    assert next(iter(data.val_dataloader())).side["ahead"].shape[1] == 5
    assert "ahead" not in next(iter(StoreDataModule(store).val_dataloader())).side
    for wrong in (0, 1.5):
        with pytest.raises(UserError, match=f"data.ahead={wrong}"):
            StoreDataModule(store, ahead=wrong)


def test_only_the_best_episodes_are_drawn_from(store):
    opened = Store.open(store)
    returns = [opened.episode_info(i)["return"] for i in range(10)]
    assert len(set(returns)) > 5
    data = StoreDataModule(store, 64, 2, best_share=0.5)
    drawn = {int(draw.starts[k, 0]) for draw in islice(data.train_dataloader().draws(), 5) for k in range(64)}
    train = opened.splits["train"]
    order = sorted(train, key=lambda i: -returns[i])
    assert drawn == {int(i) for i in order[: round(len(train) / 2)]}
    assert len(data.val_dataloader().dataset) == 1
    for share in (0, 1.5, "abc"):
        with pytest.raises(UserError, match=f"best_share={share}"):
            StoreDataModule(store, best_share=share)
