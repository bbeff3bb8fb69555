"""LPIPS as torchmetrics computes it, the Frechet distance of known distributions, and weights that are absent."""

import numpy as np
import pytest
import torch
from torch import nn

from tests.unit.test_quality import Still, make_store, walk
from worldmodels.evaluation.perceptual import LPIPS, FilmFeatures, Perceptual, frechet_distance
from worldmodels.evaluation.quality import rollout_quality, summary
from worldmodels.evaluation.stats import episode_weights
from worldmodels.types import UserError


def alexnet() -> nn.Sequential:
    """torchvision's AlexNet.features, with random weights."""
    relu = nn.ReLU
    layers = [nn.Conv2d(3, 64, 11, 4, 2), relu(), nn.MaxPool2d(3, 2), nn.Conv2d(64, 192, 5, 1, 2), relu()]
    layers += [nn.MaxPool2d(3, 2), nn.Conv2d(192, 384, 3, 1, 1), relu(), nn.Conv2d(384, 256, 3, 1, 1), relu()]
    return nn.Sequential(*layers, nn.Conv2d(256, 256, 3, 1, 1), relu(), nn.MaxPool2d(3, 2))


class Means(nn.Module):
    """Takes what I3D takes: three features a clip."""

    def forward(self, x: torch.Tensor, rescale: bool, resize: bool, return_features: bool) -> torch.Tensor:
        return x.to(torch.float32).mean([2, 3, 4])


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    net = alexnet()
    stored = {f"features.{k}": v for k, v in net.state_dict().items()} | {"classifier.1.bias": torch.zeros(4096)}
    torch.save(stored, tmp_path / "alexnet.pth")
    torch.jit.script(Means()).save(str(tmp_path / "i3d.pt"))
    return tmp_path


def test_lpips_is_that_of_torchmetrics(weights, monkeypatch):
    import torchmetrics.functional.image.lpips as theirs

    net = alexnet()
    stored = torch.load(weights / "alexnet.pth", weights_only=True)
    net.load_state_dict({k.removeprefix("features."): v for k, v in stored.items() if k.startswith("features.")})
    monkeypatch.setattr(theirs, "_get_tv_model_features", lambda *_: net)  # torchvision would fetch the weights
    a, b = torch.randint(256, (2, 5, 3, 64, 64), dtype=torch.uint8).unbind(0)
    expected = theirs._LPIPS(net="alex")(a / 255, b / 255, normalize=True).flatten()
    torch.testing.assert_close(LPIPS(weights / "alexnet.pth")(a, b), expected, rtol=1e-4, atol=1e-6)
    assert LPIPS(weights / "alexnet.pth")(a, a).abs().max() == 0 and expected.min() > 0


def test_the_frechet_distance_of_known_distributions():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(4000, 3, generator=generator, dtype=torch.float64)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(a, a + torch.tensor([1.0, 2.0, 0.0])) == pytest.approx(5, abs=1e-6)
    assert frechet_distance(a, 3 * a) == pytest.approx(4 * a.var(0).sum().item() + 4 * a.mean(0).square().sum().item())
    skewed = torch.randn(4000, 3, generator=generator, dtype=torch.float64) @ torch.tensor(
        [[2.0, 1, 0], [0, 1, 0], [0, 0, 0.1]], dtype=torch.float64
    )
    A, B = (torch.from_numpy(np.cov(x.numpy(), rowvar=False)) for x in (a, skewed))
    root = torch.linalg.eigvals(A @ B).real.sqrt().sum()
    expected = (a.mean(0) - skewed.mean(0)).square().sum() + torch.trace(A) + torch.trace(B) - 2 * root
    assert frechet_distance(a, skewed) == pytest.approx(expected.item(), abs=1e-3)
    assert frechet_distance(a[:1], a) is None


def test_films_are_judged_where_weights_are_given(weights):
    judge = Perceptual(str(weights / "alexnet.pth"), str(weights / "i3d.pt"))
    true = torch.randint(256, (4, 12, 3, 64, 64), dtype=torch.uint8)
    judge.see({"dream": true, "copy_last": true.flip(0), "true": true}, torch.tensor([0, 3]))
    figures = judge.figures(episode_weights(np.arange(4)))
    assert figures["lpips"] == [0.0, 0.0] and min(figures["lpips_copy_last"]) > 0
    assert figures["fvd"] == figures["fvd_copy_last"] == pytest.approx(0, abs=1e-3)  # the same films in another order
    assert not {"without_lpips", "without_fvd"} & figures.keys()
    with pytest.raises(UserError, match="FVD needs 10 imagined frames, not 8"):
        judge.features(true[:, :8])
    torch.jit.script(nn.ReLU()).save(str(weights / "other.pt"))
    with pytest.raises(UserError, match="fvd is a TorchScript that takes no films; give fvd=FILE"):
        FilmFeatures(weights / "other.pt")(true)


def test_absent_weights_are_told_in_one_sentence_and_nothing_is_made_up(tmp_path, weights):
    store = make_store(tmp_path / "walks", [walk(k) for k in range(5)])
    figures = rollout_quality(Still(), store, windows=4, horizons=[1], progress=False)
    assert figures["lpips"] is None and figures["fvd"] is None
    printed = summary(figures)
    assert sum("was not measured: its" in line and "give " in line for line in printed) == 2
    torch.save({"features.0.weight": torch.zeros(3)}, weights / "other.pth")
    (weights / "text.pth").write_text("weights")
    for make, path, words in (
        (LPIPS, "none.pth", "there is no file lpips="),
        (LPIPS, "other.pth", "does not hold torchvision's AlexNet"),
        (LPIPS, "text.pth", "does not hold torchvision's AlexNet"),
        (FilmFeatures, "none.pt", "there is no file fvd="),
        (FilmFeatures, "alexnet.pth", "is no TorchScript"),
    ):
        with pytest.raises(UserError, match=words):
            make(weights / path)
