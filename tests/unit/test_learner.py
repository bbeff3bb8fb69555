"""Optimiser groups, clipping, schedules, averaging and atomic files."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from tests.conformance import random_segment
from tests.conftest import ROOT
from worldmodels.callbacks import EMA, AtomicCheckpointIO, LastCheckpoint
from worldmodels.config import build, sized
from worldmodels.hardware import accelerator, precision
from worldmodels.learners.base import LOOK_EVERY
from worldmodels.learners.world_model import WorldModelLearner
from worldmodels.types import UserError


@pytest.fixture
def model() -> dict[str, Any]:
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        return sized(compose("train", ["experiment=catch"]).model)


def test_groups_cover_every_weight_once_and_spare_biases_norms_and_embeddings(model: dict[str, Any]) -> None:
    learner = WorldModelLearner(model, weight_decay=0.5)
    groups = learner.configure_optimizers()["optimizer"].param_groups
    names = {id(p): n for n, p in learner.model.named_parameters()}
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(names)
    free = [names[id(p)] for g in groups for p in g["params"] if g["weight_decay"] == 0]
    assert any("action_embedding" in n for n in free)
    norms = [f"{n}.weight" for n, m in learner.model.named_modules() if isinstance(m, nn.GroupNorm | nn.LayerNorm)]
    assert all("embedding" in n or "bias" in n or n in norms for n in free)
    assert all(p.ndim >= 2 for g in groups for p in g["params"] if g["weight_decay"] == 0.5)


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ("constant", {0: 0.1, 9: 1.0, 50: 1.0, 100: 1.0}),
        ("linear", {0: 0.1, 50: 0.5, 100: 0.0}),
        ("cosine", {50: 0.5, 75: 0.5 * (1 - math.cos(math.pi / 4)), 100: 0.0}),
    ],
)
def test_schedules(model: dict[str, Any], schedule: str, factors: dict[int, float]) -> None:
    learner = WorldModelLearner(model, schedule=schedule, warmup=10, max_steps=100)
    for step, factor in factors.items():
        assert learner._lr_factor(step) == pytest.approx(factor)
    with pytest.raises(UserError, match="constant, cosine, linear"):
        WorldModelLearner(model, schedule="step")
    with pytest.raises(UserError, match="learner.seed=-1 must be a whole number of at least 0"):
        WorldModelLearner(model, seed=-1)


def test_each_component_has_its_own_clip(model: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    learner = WorldModelLearner(model, clip={"denoiser": 1.0, "reward_model": 100.0})
    monkeypatch.setattr(learner, "log", lambda *_: None)
    for p in learner.parameters():
        p.grad = torch.full_like(p, 10.0)
    learner.configure_gradient_clipping(None)
    for name, norm in (("denoiser", 1.0), ("reward_model", 100.0)):
        grads = [p.grad.norm() for p in learner.model.components()[name].parameters()]
        assert torch.stack(grads).norm().item() == pytest.approx(norm, rel=1e-3)
    with pytest.raises(UserError, match="clip names .'nothing'."):
        WorldModelLearner(model, clip={"nothing": 1.0})


class _Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(1, 1, bias=False)


def test_average_warms_up_and_an_interrupted_validation_is_undone() -> None:
    net, ema = _Net(), EMA(decay=0.9)
    ema.setup(L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu"), net, "fit")
    average: Any = ema._average_model
    values = [1.0, 2.0, 3.0]
    expected = values[0]
    for n, value in enumerate(values):
        net.net.weight.data.fill_(value)
        average.update_parameters(net)
        if n:
            decay = min(0.9, (1 + n) / (10 + n))
            expected = decay * expected + (1 - decay) * value
    assert average.module.net.weight.item() == pytest.approx(expected)
    ema.on_validation_epoch_start(None, net)  # pyrefly: ignore
    assert net.net.weight.item() == pytest.approx(expected)
    ema.on_exception(None, net, KeyboardInterrupt())  # pyrefly: ignore
    assert net.net.weight.item() == 3.0
    ema.on_exception(None, net, KeyboardInterrupt())  # pyrefly: ignore
    assert net.net.weight.item() == 3.0


def test_a_failed_write_spares_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    io, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint({"n": 1}, path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        io.save_checkpoint({"n": 2}, path)
    assert torch.load(path, weights_only=True) == {"n": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_full_disk_is_told_as_such_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "last.ckpt"
    path.write_bytes(b"old")
    monkeypatch.setattr(Path, "open", lambda *_: open("/dev/full", "wb"))  # noqa: SIM115
    with pytest.raises(OSError, match="No space left"):
        AtomicCheckpointIO().save_checkpoint({"a": torch.zeros(100_000)}, path)
    assert path.stat().st_size == 3


def test_hardware_settings() -> None:
    assert accelerator("auto") in ("cpu", "cuda", "mps")
    assert precision("auto", "cpu") in ("bf16-mixed", "32-true")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("worldmodels.hardware.has_bf16", lambda device: False)
        assert precision("auto", "cpu") == "32-true"
        with pytest.raises(UserError, match="precision=bf16-mixed needs bfloat16"):
            precision("bf16-mixed", "cpu")
    with pytest.raises(UserError, match="precision=16-mixed is for GPUs alone"):
        precision("16-mixed", "cpu")
    with pytest.raises(UserError, match="precision 'bf16-true' is unknown"):  # which dreams cannot be made in
        precision("bf16-true")
    with pytest.raises(UserError, match="precision 'fp8' is unknown; choose one of auto"):
        precision("fp8")
    with pytest.raises(UserError, match="trainer.accelerator=tpu is unknown"):
        accelerator("tpu")


def test_models_are_built_from_settings_alone(model: dict[str, Any]) -> None:
    a, b = WorldModelLearner(model).model, build(model)
    b.load_state_dict(a.state_dict())
    assert set(a.components()) == {"denoiser", "reward_model"}


def fit_to_the_third_batch(
    learner: WorldModelLearner,
    path: Path,
    happens: Callable[[], None],
    every: int = 100,
    sentence: str = r"batch 2 \(optimizer step 2, seed 0, rank 0\) is nan; what last.ckpt",
) -> None:
    """Train five steps with a LastCheckpoint; before the third batch something happens that ends it."""

    class Before(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, learner: L.LightningModule, batch: Any, index: int) -> None:
            if index == 2:
                happens()

    segment = random_segment(2, learner.model.min_length, 3, 20)
    trainer = L.Trainer(
        max_steps=5, accelerator="cpu", logger=False, enable_checkpointing=True, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[Before(), LastCheckpoint(str(path), every)],
        default_root_dir=path.parent,
    )  # fmt: skip
    with pytest.raises(UserError, match=sentence):
        trainer.fit(learner, torch.utils.data.DataLoader([segment] * 5, batch_size=None))


def test_a_loss_that_is_not_finite_names_its_batch_and_spares_the_weights(
    model: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """last.ckpt has what two batches had made of the weights."""
    learner = WorldModelLearner(model, warmup=1)
    kept: list[dict[str, torch.Tensor]] = []

    def happens() -> None:
        kept.append({k: v.clone() for k, v in learner.state_dict().items()})
        monkeypatch.setattr(learner.model, "loss", lambda *_: (torch.tensor(float("nan")), {}))

    fit_to_the_third_batch(learner, tmp_path / "last.ckpt", happens)
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert stored["global_step"] == 2
    assert all(torch.equal(v, stored["state_dict"][k]) for k, v in kept[0].items())


def test_broken_weights_do_not_take_the_place_of_whole_ones(model: dict[str, Any], tmp_path: Path) -> None:
    learner, path = WorldModelLearner(model, warmup=1), tmp_path / "last.ckpt"
    weight = learner.model.denoiser.network.conv_out.weight
    term = r"batch 2 .* is nan, and loss_denoising the first of its terms that is not finite; what last.ckpt"
    fit_to_the_third_batch(learner, path, lambda: weight.data.fill_(torch.nan), sentence=term)
    assert torch.load(path, weights_only=True)["global_step"] == 1, "the first step, which is always written"


@pytest.mark.parametrize("every", [1, 100])
@pytest.mark.parametrize("whole", [False, True])
def test_a_loss_that_is_looked_at_later_leaves_no_checkpoint_behind(
    model: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int, whole: bool
) -> None:
    """As on a GPU, which is not waited for: one bad batch, whose gradients break the weights or leave them whole."""
    monkeypatch.setitem(LOOK_EVERY, "cpu", 50)
    learner, path = WorldModelLearner(model, warmup=1), tmp_path / "last.ckpt"
    good = learner.model.loss

    def bad(segment: Any, generator: Any) -> Any:
        monkeypatch.setattr(learner.model, "loss", good)
        loss, metrics = good(segment, generator)
        return (loss * 0 + torch.nan if whole else loss * torch.nan), metrics

    fit_to_the_third_batch(learner, path, lambda: monkeypatch.setattr(learner.model, "loss", bad), every)
    assert all(bool(p.isfinite().all()) for p in learner.parameters()) == whole
    # the first step is always written; where not every one is, the next was due at the end
    assert torch.load(path, weights_only=True)["global_step"] == (2 if every == 1 else 1)


def test_weights_that_a_finite_loss_breaks_are_not_written(model: dict[str, Any], tmp_path: Path) -> None:
    learner, path = WorldModelLearner(model, warmup=1), tmp_path / "last.ckpt"
    weight = learner.model.denoiser.network.conv_out.weight
    happens: Any = lambda: weight.register_hook(lambda gradient: gradient * torch.inf)  # noqa: E731
    fit_to_the_third_batch(learner, path, happens, 1, "some weights are no longer finite")
    assert torch.load(path, weights_only=True)["global_step"] == 2
