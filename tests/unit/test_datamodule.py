import threading

import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.unit.stores import filled
from worldmodels.data.datamodule import StoreDataModule
from worldmodels.data.sampling import WindowSampler
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


def fit(store, folder, resume=None, die_at=None, steps=STEPS, save=("train",), **trainer):
    learner, data = Learner(die_at), StoreDataModule(store, 4, 5, 2, event_share=0.5, seed=3)
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
