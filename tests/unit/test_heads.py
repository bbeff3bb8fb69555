"""nn/heads.py: one convention for four heads, against closed forms, each other and a published implementation."""

import math

import pytest
import torch
from omegaconf import OmegaConf

from worldmodels.config import build, conf_dir
from worldmodels.nn.heads import C51, MSE, HLGauss, TwoHot
from worldmodels.types import UserError

NAMES = ("MSE", "TwoHot", "HLGauss", "C51")
D = 7


@pytest.mark.parametrize("path", sorted((conf_dir() / "head").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_yaml_files_of_heads_build(path):
    settings = OmegaConf.load(path)
    assert build(settings, features=D, actions=18).mean(features(2)).shape == (2, 18)
    if "sigma" in settings:  # the published default
        assert (settings.low, settings.high, settings.bins, settings.sigma) == (-10, 10, 51, 0.75)


def head(name, **settings):
    torch.manual_seed(0)
    return build({"_target_": f"worldmodels.nn.heads.{name}", **settings}, features=D)


def features(*shape):
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(1))


def saying(head, weights):
    """The head with zero weights and a bias by which it predicts `weights` whatever the features."""
    with torch.no_grad():
        head.layer.weight.zero_()
        head.layer.bias.copy_(weights.clamp(min=1e-30).log())
    return head


@pytest.mark.parametrize("transform", ["none", "symlog", "h"])
@pytest.mark.parametrize("name", NAMES)
def test_one_convention(name, transform):
    one, many = head(name, transform=transform), head(name, transform=transform, actions=3)
    x, target, action = features(5, 2), torch.linspace(-3, 3, 10).view(5, 2), torch.arange(10).view(5, 2) % 3
    for loss in (one.loss(x, target), many.loss(x, target, action)):
        assert loss.shape == (5, 2) and loss.isfinite().all()
        torch.testing.assert_close(loss[3], loss.flatten()[6:8])
    assert one.mean(x).shape == one.sample(x).shape == (5, 2)
    assert many.mean(x).shape == many.sample(x).shape == (5, 2, 3)
    torch.testing.assert_close(many.mean(x).gather(-1, action[..., None])[..., 0], many.mean(x, action))
    torch.testing.assert_close(one.mean(x)[4:], one.mean(x[4:]))
    draws = [many.sample(x, torch.Generator().manual_seed(s), action) for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and torch.equal(draws[0], draws[2]) == (name == "MSE")
    backup = many.backup(x, target, torch.full((5, 2), 0.9), action)
    assert not backup.requires_grad
    assert many.loss(x, backup, action).shape == (5, 2)


@pytest.mark.parametrize("name", NAMES)
def test_a_head_learns_a_number_and_its_mean_and_draws_tell_it(name):
    for transform, value in (("none", 2.34), ("symlog", -7.3), ("h", 5.5)):
        h, x, target = head(name, transform=transform), torch.zeros(1, D), torch.tensor([value])
        optimizer = torch.optim.Adam(h.parameters(), 0.3)
        for _ in range(120):
            optimizer.zero_grad()
            h.loss(x, target).sum().backward()
            optimizer.step()
        assert h.mean(x).item() == pytest.approx(value, rel=0.01)
        draws = h.sample(x.expand(4000, D), torch.Generator().manual_seed(0))
        assert draws.mean().item() == pytest.approx(value, abs=0.25 if transform == "symlog" else 0.1)


@pytest.mark.parametrize("name", NAMES[1:])
def test_the_gradient_of_the_logits_is_prediction_less_target(name):
    h, x, target = head(name), features(4), torch.tensor([-20.0, 0.1, 3.3, 9.99])
    h.layer.bias.grad = None
    h.loss(x, target).sum().backward()
    expected = (h(x).softmax(-1) - h.weights(target)).sum(0)
    torch.testing.assert_close(h.layer.bias.grad, expected, rtol=1e-4, atol=1e-6)


def test_the_cross_entropy_of_the_right_answer_is_its_entropy():
    target = torch.tensor([1.3])
    for h in (TwoHot(D), HLGauss(D), C51(D)):
        weights = h.weights(target)
        loss = saying(h, weights[0]).loss(features(1), target)
        assert loss.item() == pytest.approx(torch.distributions.Categorical(weights).entropy().item(), rel=1e-4)
    # of the Gaussian, widened by the bins' own variance, less the logarithm of their width
    h, width = HLGauss(D), 20 / 51
    expected = 0.5 * math.log(2 * math.pi * math.e * (0.75**2 + 1 / 12) * width**2) - math.log(width)
    loss = saying(h, h.weights(target)[0]).loss(features(1), target)
    assert loss.item() == pytest.approx(expected, abs=1e-3)


def test_heads_agree_with_each_other():
    numbers = torch.linspace(-8, 8, 41)
    for y in numbers:
        for name in NAMES[1:]:
            h = head(name)
            assert saying(h, h.weights(y[None])[0]).mean(features(1)).item() == pytest.approx(y.item(), abs=1e-4)
    narrow, two_hot = HLGauss(D, sigma=1e-4), TwoHot(D, low=-10 + 10 / 51, high=10 - 10 / 51)
    on_bins = two_hot.support(torch.device("cpu"))
    torch.testing.assert_close(narrow.weights(on_bins), two_hot.weights(on_bins), rtol=0, atol=1e-6)
    c51, x = C51(D), features(6)
    reward, discount = torch.linspace(-1, 1, 6), torch.full((6,), 0.9)
    scalar = c51.weights(reward)
    torch.testing.assert_close(c51.backup(x, reward, torch.zeros(6)), scalar, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        saying(C51(D), c51.backup(x, reward, discount)[2]).mean(x)[0],
        (reward + discount * c51.mean(x))[2],
        rtol=0, atol=1e-4,
    )  # fmt: skip


@pytest.mark.parametrize("symlog", [False, True])
def test_hl_gauss_agrees_with_a_published_implementation(symlog):
    published = pytest.importorskip("hl_gauss_pytorch")
    settings = {"sigma_to_bin_ratio": 0.75, "clamp_to_range": True, "use_symlog": symlog}
    theirs = published.HLGaussLoss(-10.0, 10.0, 51, **settings)
    h, x = HLGauss(D, transform="symlog" if symlog else "none"), features(300)
    y = torch.linspace(-12, 12, 300)
    torch.testing.assert_close(h.weights(h.encode(y)), theirs.transform_to_probs(y), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(h.loss(x, y), theirs(h(x), y, reduction="none"), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(h.mean(x), theirs(h(x)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_around_a_head_costs_it_nothing_but_the_layers_own(name):
    h, y = head(name), torch.tensor([-1e6, -10.0, 0.123, 9.9, 1e6])
    x = features(5)
    with torch.autocast("cpu", torch.bfloat16):
        output, mean, loss = h(x), h.mean(x), h.loss(x, y)
        backup = h.backup(x, y, torch.full((5,), 0.99))
    assert {output.dtype, mean.dtype, loss.dtype, backup.dtype} == {torch.float32}
    if name != "MSE":
        torch.testing.assert_close(mean, (output.softmax(-1) * h.support(x.device)).sum(-1))
        torch.testing.assert_close(loss, -(h.weights(y) * output.log_softmax(-1)).sum(-1))
        assert loss.isfinite().all() and (loss < 100).all()
    cast = head(name).bfloat16()
    loss = cast.loss(x.bfloat16(), y.bfloat16())
    loss.sum().backward()
    assert loss.isfinite().all() and cast.layer.weight.grad.isfinite().all()
    if name != "MSE":
        assert torch.equal(cast.support(x.device), h.support(x.device))


def test_extreme_logits_are_finite():
    for name in NAMES[1:]:
        h = saying(head(name), torch.ones(51))
        with torch.no_grad():
            h.layer.bias[0] = 1e30
        x, y = torch.zeros(2, D), torch.tensor([-10.0, 3.0])
        assert h.loss(x, y).isfinite().all() and h.mean(x).isfinite().all() and h.sample(x).isfinite().all()


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("MSE", {"transform": "log"}, "transform=log is unknown; choose one of none, symlog, h"),
        ("HLGauss", {"sigma": 0}, "sigma=0 must be above 0"),
        ("TwoHot", {"bins": 1}, "at least two bins"),
        ("C51", {"low": 5, "high": -5}, "low below high"),
        ("C51", {"atoms": 51}, "wrong settings for worldmodels.nn.heads.C51"),
    ],
)
def test_mistakes(name, settings, words):
    with pytest.raises(UserError, match=words):
        head(name, **settings)


def test_mse_is_plain_regression():
    h, x, y = MSE(D), features(9), torch.linspace(-100, 100, 9)
    torch.testing.assert_close(h.loss(x, y).mean(), torch.nn.functional.mse_loss(h.mean(x), y))
    assert torch.equal(h.sample(x), h.mean(x))
