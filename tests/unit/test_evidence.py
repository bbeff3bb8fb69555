"""The benchmark of the evidence: trainings that take turns, and the models that are compared with ours."""

import os
import sys
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import ddpm, reference, reference_training
from benchmarks.turns import Spent, Training, ours, take_turns
from tests.conformance import check_world_model, random_segment
from worldmodels.data.card import make_card
from worldmodels.data.disk import read_json
from worldmodels.data.store import Store
from worldmodels.models.frames import to_float, to_uint8
from worldmodels.types import Episode

CHECKOUT = Path(os.environ.get("DIAMOND_CHECKOUT", "no checkout"))
needs_checkout = pytest.mark.skipif(not CHECKOUT.exists(), reason="DIAMOND_CHECKOUT names no checkout of diamond")


@pytest.fixture
def noise_store(tmp_path: Path) -> Store:
    """Four episodes of 40 steps of noise in Pong's frames and actions."""
    rng = np.random.default_rng(0)
    path = tmp_path / "noise"
    card = make_card("toy", "pong", {"height": 32, "width": 32, "channels": 3}, seed=0)
    with Store.create(path, card) as store:
        for _ in range(4):
            never = np.zeros(40, bool)
            obs = rng.integers(0, 256, (40, 32, 32, 3), np.uint8)
            action = rng.choice([0, 1, 3, 4, 11, 12], 40).astype(np.uint8)
            store.append(Episode(obs, action, np.zeros(40, np.float32), never, never, never))
    return Store.open(path)


COUNTER = """
import signal, sys, time
from pathlib import Path
folder, end = Path(sys.argv[1]), int(sys.argv[2])
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
count = int((folder / "count").read_text()) if (folder / "count").exists() else 0
while count < end and not stop:
    began = time.process_time()
    while time.process_time() < began + 0.1: pass
    count += 1
(folder / "count").write_text(str(count))
with (folder.parent / "order").open("a") as order: order.write(folder.name)
"""


def counting(folder: Path, end: int) -> Training:
    folder.mkdir()

    def spent() -> Spent:
        count = int((folder / "count").read_text()) if (folder / "count").exists() else 0
        return Spent(0.1 * count, 0.0, count, count >= end)

    return Training([sys.executable, "-c", COUNTER, str(folder), str(end)], folder / "log", spent)


def test_who_has_had_least_is_next_until_both_are_done(tmp_path: Path) -> None:
    a, b = counting(tmp_path / "a", 30), counting(tmp_path / "b", 10)
    take_turns([a, b], turn=0.5)
    assert (a.spent().steps, b.spent().steps) == (30, 10)
    order = (tmp_path / "order").read_text()
    assert order.startswith("ab") and order.endswith("a") and order.count("a") > 1
    take_turns([a, b], turn=0.5)
    assert (tmp_path / "order").read_text() == order, "what is done is left alone"


@pytest.mark.parametrize("code, told", [("raise SystemExit(1)", "ended with code 1"), ("", "no step was done")])
def test_a_training_that_fails_or_does_nothing_is_not_tried_for_ever(tmp_path: Path, code: str, told: str) -> None:
    with pytest.raises(RuntimeError, match=told):
        take_turns([Training([sys.executable, "-c", code], tmp_path / "a" / "log", Spent)], 5.0)


@pytest.mark.slow
def test_ours_is_planned_for_its_budget_and_trained_in_turns(catch_store: Path, tmp_path: Path) -> None:
    budget = 30.0  # of which half is to be more than a command takes to start on a busy machine
    training = ours("catch", catch_store, tmp_path / "run", budget, "data.validation.windows=4")
    planned = read_json(tmp_path / "run" / "plan.json")["steps"]
    take_turns([training], turn=20.0)
    spent = training.spent()
    assert spent.done and spent.steps == planned > 1
    assert budget / 4 < spent.cpu < 2 * budget
    assert (tmp_path / "run" / "best.ckpt").exists()
    assert ours("catch", catch_store, tmp_path / "run", budget).spent() == spent


# with more calls the ancestral sampler draws again, for a batch other numbers than for a row
@pytest.mark.parametrize("build", [ddpm.Edm, lambda: ddpm.Ddpm(1, "ddpm"), lambda: ddpm.Ddpm(3, "ddim")])
def test_edm_and_ddpm_are_world_models(build) -> None:
    check_world_model(build, random_segment(2, 6, 3, 32))


@pytest.mark.parametrize("sampler", ddpm.SAMPLERS["ddpm"])
@pytest.mark.parametrize("calls", ddpm.CALLS["ddpm"])
def test_ddpm_finds_the_frame_if_the_noise_is_known(sampler: str, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, segment = ddpm.Ddpm(calls, sampler), random_segment(2, 4, 3, 32)
    frame = segment.obs[:, 0]

    def known(noisy: torch.Tensor, t: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        alpha = model.scheduler.alphas_cumprod[t][:, None, None, None].double()
        return ((noisy - alpha.sqrt() * to_float(frame)) / (1 - alpha).sqrt()).float()

    monkeypatch.setattr(model, "noise_of", known)
    found = model.next_frame(segment.obs[:, -4:], segment.action, torch.Generator().manual_seed(0))
    assert (found.int() - frame.int()).abs().max() <= 1


def test_equal_networks_and_steps_and_nothing_is_trained_twice(noise_store: Store, tmp_path: Path) -> None:
    sizes = {kind: sum(p.numel() for p in build().parameters()) for kind, build in ddpm.KINDS.items()}
    assert sizes["edm"] == sizes["ddpm"]
    path = ddpm.trained("ddpm", 1e-3, 0, noise_store, 3, tmp_path)
    weights = torch.load(path, weights_only=True)
    again = torch.load(ddpm.trained("ddpm", 1e-3, 0, noise_store, 3, tmp_path / "again"), weights_only=True)
    assert all(torch.equal(v, again[k]) for k, v in weights.items())
    (tmp_path / "again" / path.name).write_bytes(b"kept")
    assert ddpm.trained("ddpm", 1e-3, 0, noise_store, 3, tmp_path / "again").read_bytes() == b"kept"


def test_the_comparison_of_edm_and_ddpm_is_kept(noise_store: Store, tmp_path: Path) -> None:
    sizes = {"steps": 2, "seeds": 1, "windows": 1, "horizon": 10}
    figures = ddpm.evidence(noise_store, tmp_path, **sizes)
    assert figures["steps"] == [1, 10]
    assert {len(figures[f"{kind}_{c}_psnr_db"]) for kind, by in ddpm.CALLS.items() for c in by} == {2}
    assert figures["edm_learning_rate"] in ddpm.RATES
    assert figures["real_psnr_db"] == [100.0, 100.0]
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.pt")}
    assert ddpm.evidence(noise_store, tmp_path, **sizes) == figures
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.pt")} == written
    assert (tmp_path / "ddpm.png").exists() and (tmp_path / "strip_ddpm.png").exists()


def test_statistics_of_a_frame() -> None:
    frame = torch.zeros(3, 4, 4, dtype=torch.uint8)
    frame[:, :, 1::2] = 100  # columns of 0 and 100: every neighbour to the side differs, none below
    mean, contrast, roughness = ddpm.statistics(frame).tolist()
    assert mean == 50
    assert contrast == pytest.approx(50 * (16 / 15) ** 0.5)
    assert roughness == 50


@needs_checkout
def test_the_reference_is_a_world_model() -> None:
    modules = reference.load(CHECKOUT)
    check_world_model(
        lambda: reference_training.ReferenceModel(modules, [0, 1, 3, 4, 11, 12]), random_segment(2, 6, 3, 32)
    )


@needs_checkout
def test_the_reference_dreams_as_its_own_sampler_does() -> None:
    modules = reference.load(CHECKOUT)
    model = reference_training.ReferenceModel(modules, [0, 3, 4]).eval()
    torch.nn.init.normal_(model.denoiser.inner_model.conv_out.weight, std=0.02)
    segment = random_segment(2, 6, 3, 32)
    segment.action[:] = torch.tensor([0, 3, 4, 4, 3, 0])
    state = model.start(segment.steps(0, 5))
    _, step = model.step(state, segment.action[:, 5], torch.Generator().manual_seed(3))
    settings = modules.diffusion.DiffusionSamplerConfig(num_steps_denoising=3)
    sampler = modules.diffusion.DiffusionSampler(model.denoiser, settings)
    torch.manual_seed(int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(3))))
    acts = torch.tensor([[2, 2, 1, 0]] * 2)  # the last four, as the reference numbers them
    image, _ = sampler.sample(to_float(segment.obs[:, 2:6]), acts)
    assert step.frame is not None
    assert torch.equal(step.frame, to_uint8(image))


@needs_checkout
def test_the_references_training_goes_on_exactly(noise_store: Store, tmp_path: Path) -> None:
    def trained(folder: Path, parts: list[int]) -> dict:
        for steps in parts:
            asked = count()
            reference_training.train(
                CHECKOUT,
                Path(noise_store.path),
                folder,
                1e9,
                1e9,
                stop=lambda: next(asked) == steps,  # noqa: B023
            )
        return torch.load(folder / "state.pt", weights_only=True)

    whole, parts = trained(tmp_path / "whole", [2]), trained(tmp_path / "parts", [1, 1])
    assert whole["steps"] == parts["steps"] == 2
    assert whole["losses"] == parts["losses"]
    assert all(torch.equal(v, parts["denoiser"][k]) for k, v in whole["denoiser"].items())
    spent = reference_training.spent(tmp_path / "parts", until=0.0)
    assert spent.done and spent.cpu > 0 and spent.clock > 0
    model = reference_training.load_model(CHECKOUT, tmp_path / "parts" / "state.pt", calls=1)
    assert model.actions == [0, 1, 3, 4, 11, 12]
    kept = torch.load(tmp_path / "parts" / "weights_00.pt", weights_only=True)
    assert kept["steps"] == 0, "the states to choose from are kept as they are passed"
