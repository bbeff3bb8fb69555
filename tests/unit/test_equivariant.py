"""Each layer against the group's own action, at the start and after training, reloading and rounding."""

import copy
import io
import math
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from worldmodels.nn import equivariant
from worldmodels.nn.equivariant import (
    GroupConv2d,
    GroupLinear,
    GroupPool2d,
    GroupResidual,
    LiftConv2d,
    check_grid,
    expand_once,
    matched_width,
)
from worldmodels.nn.equivariant_heads import ActionHead, flatten_fields, invariant
from worldmodels.nn.symmetrise import Symmetrised
from worldmodels.ops.groups import GROUPS, Group, action_table, group, transform, transform_fields
from worldmodels.types import UserError

BOUND = 1e-9
SYMMETRIES = [g for g in GROUPS.values() if len(g) > 1]
LITTLE = [0, 2, 3, 4, 5]
every_symmetry = pytest.mark.parametrize("symmetry", SYMMETRIES, ids=lambda g: g.name)


def move(x: Tensor, symmetry: Group, g: int, kind: str) -> Tensor:
    """What element g makes of a picture, of fields, of logits of the little action set, or of what nothing changes."""
    if kind == "picture":
        return transform(x, symmetry.elements[g])
    if kind == "fields":
        return transform_fields(x, symmetry, g)
    if kind == "actions":
        return x[:, action_table(symmetry, LITTLE)[g].argsort()]
    return x


def error(layer: nn.Module, x: Tensor, symmetry: Group, before: str, after: str) -> float:
    """The greatest |f(g x) - g f(x)| by the greatest |f(x)|, over all elements."""
    with torch.no_grad():
        y = layer(x)
        pairs = [(layer(move(x, symmetry, g, before)), move(y, symmetry, g, after)) for g in range(len(symmetry))]
        assert all(a.shape == b.shape for a, b in pairs)
        assert all(a.isfinite().all() for a, _ in pairs)
        return max(float((a - b).abs().max()) for a, b in pairs) / float(y.abs().max())


class Wrapped(nn.Module):
    """A function with a parameter to train, as a layer."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function, self.factor = function, nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x * self.factor)


def small_net(inputs: int, outputs: int) -> nn.Module:
    """An ordinary network with even and odd kernels, strides and no symmetry at all."""
    return nn.Sequential(nn.Conv2d(inputs, 6, 4, 2, 1), nn.ReLU(), nn.Conv2d(6, outputs, 3, 1, 1))


LAYERS = {  # name: (makes it, shape of the input without B and G, what it is and what it becomes)
    "lift": (lambda g: LiftConv2d(g, 3, 4), (3, 7, 7), "picture", "fields"),
    "lift even": (lambda g: LiftConv2d(g, 3, 4), (3, 6, 6), "picture", "fields"),
    "lift patches": (lambda g: LiftConv2d(g, 3, 4, 4, 4, 0), (3, 8, 8), "picture", "fields"),
    "lift wide patches": (lambda g: LiftConv2d(g, 3, 4, 6, 2, 2), (3, 8, 8), "picture", "fields"),
    "conv odd": (lambda g: GroupConv2d(g, 2, 3), (2, 5, 5), "fields", "fields"),
    "conv even": (lambda g: GroupConv2d(g, 2, 3), (2, 4, 4), "fields", "fields"),
    "conv 1x1": (lambda g: GroupConv2d(g, 2, 3, 1, padding=0), (2, 4, 4), "fields", "fields"),
    "conv stride odd": (lambda g: GroupConv2d(g, 2, 3, 3, 2), (2, 7, 7), "fields", "fields"),
    "conv stride even": (lambda g: GroupConv2d(g, 2, 3, 4, 2), (2, 8, 8), "fields", "fields"),
    "linear": (lambda g: GroupLinear(g, 5, 6), (5,), "fields", "fields"),
    "norm": (lambda g: nn.GroupNorm(2, 4), (4, 5, 5), "fields", "fields"),
    "norm of vectors": (lambda g: nn.GroupNorm(1, 6), (6,), "fields", "fields"),
    "batch norm": (lambda g: nn.BatchNorm3d(4), (4, 5, 5), "fields", "fields"),
    "pool max": (lambda g: GroupPool2d(g, "max", 3, 2, 1), (4, 7, 7), "fields", "fields"),
    "pool mean": (lambda g: GroupPool2d(g, "mean"), (4, 6, 6), "fields", "fields"),
    "pool pictures": (lambda g: GroupPool2d(g, "mean", 3, 2, 1), (4, 9, 9), "picture", "picture"),
    "residual": (lambda g: GroupResidual(g, 3, 3), (3, 5, 5), "fields", "fields"),
    "residual wider": (lambda g: GroupResidual(g, 2, 3), (2, 6, 6), "fields", "fields"),
    "flatten": (lambda g: Wrapped(lambda x: flatten_fields(x, g)), (3, 4, 4), "fields", "fields"),
    "invariant": (lambda g: Wrapped(invariant), (3, 4, 4), "fields", "nothing"),
    "invariant of vectors": (lambda g: nn.Sequential(Wrapped(invariant), nn.Linear(3, 2)), (3,), "fields", "nothing"),
    "action head": (lambda g: ActionHead(action_table(g, LITTLE), 4), (4,), "fields", "actions"),
    "symmetrised picture": (lambda g: Symmetrised(g, small_net(3, 4)), (3, 8, 8), "picture", "fields"),
    "symmetrised to vectors": (
        lambda g: Symmetrised(g, nn.Sequential(nn.Flatten(), nn.Linear(75, 4), nn.ReLU())),
        *((3, 5, 5), "picture", "fields"),
    ),
    "symmetrised own": (lambda g: Symmetrised(g, small_net(3, 4)), (3, 6, 6), "fields", "fields"),
    "symmetrised all": (lambda g: Symmetrised(g, small_net(2 * len(g), 4), "all"), (2, 6, 6), "fields", "fields"),
    "symmetrised vectors": (
        lambda g: Symmetrised(g, nn.Sequential(nn.Linear(2 * len(g), 8), nn.Tanh(), nn.Linear(8, 3)), "all"),
        *((2,), "fields", "fields"),
    ),
}


def example(name: str, symmetry: Group, seed: int = 0, batch: int = 3) -> tuple[nn.Module, Tensor, str, str]:
    build, shape, before, after = LAYERS[name]
    torch.manual_seed(seed)
    layer = build(symmetry).double()
    slots = (len(symmetry),) if before == "fields" else ()
    return layer, torch.randn(batch, shape[0], *slots, *shape[1:], dtype=torch.float64), before, after


def fit(layer: nn.Module, x: Tensor, steps: int = 5) -> None:
    """Some steps towards a random target, so that no weight stays where it began."""
    optimizer = torch.optim.AdamW(layer.parameters(), 0.05)
    target = torch.randn(layer(x).shape, dtype=x.dtype)
    for _ in range(steps):
        optimizer.zero_grad()
        (layer(x) - target).square().mean().backward()
        optimizer.step()


@every_symmetry
@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_equivariant_also_when_trained_and_loaded(name, symmetry):
    layer, x, before, after = example(name, symmetry)
    assert error(layer, x, symmetry, before, after) <= BOUND
    if not list(layer.parameters()):
        return
    with torch.no_grad():
        first = layer(x).clone()
    fit(layer, x)
    assert error(layer, x, symmetry, before, after) <= BOUND
    with torch.no_grad():
        trained = layer.eval()(x)
    assert float((trained - first).abs().max()) > 1e-3

    memory = io.BytesIO()
    torch.save(layer.state_dict(), memory)
    memory.seek(0)
    again = example(name, symmetry, seed=1)[0].eval()
    with torch.no_grad():
        other = again(x)
        again.load_state_dict(torch.load(memory, weights_only=True))
        assert not torch.equal(other, trained)
        assert torch.equal(again(x), trained)
    assert error(again, x, symmetry, before, after) <= BOUND


@every_symmetry
@pytest.mark.parametrize("name", ["lift", "conv even", "linear", "residual", "action head", "symmetrised all"])
def test_rounding_to_bfloat16_breaks_the_symmetry_no_more_than_it_rounds(name, symmetry):
    """Sums are formed in float32 in another order and then rounded to 8 bits: each of at most 5 roundings may differ by
    one unit in the last place, 2^-7 of a number's own size, which the greatest number bounds.
    """
    layer, x, before, after = example(name, symmetry)
    layer, x = layer.float(), x.float()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = error(layer, x, symmetry, before, after)
    assert rounded <= 5 * 2**-7
    half = layer.bfloat16()
    assert error(half, x.bfloat16(), symmetry, before, after) <= 5 * 2**-7


@every_symmetry
def test_a_plain_convolution_of_equal_size_is_not_equivariant(symmetry):
    torch.manual_seed(0)
    size = len(symmetry)
    conv = nn.Conv2d(2 * size, 3 * size, 3, padding=1).double()
    plain = Wrapped(lambda x: conv(x.flatten(1, 2)).unflatten(1, (3, size)))
    assert error(plain, torch.randn(3, 2, size, 5, 5, dtype=torch.float64), symmetry, "fields", "fields") > 0.1


@every_symmetry
def test_windows_are_refused_exactly_where_they_break_the_symmetry(symmetry, monkeypatch):
    refused = 0
    for side, kernel, stride, padding in product((6, 7, 8), (1, 2, 3, 4), (1, 2, 3), (0, 1)):
        if kernel == 1 and padding:
            continue
        torch.manual_seed(0)
        layer = LiftConv2d(symmetry, 1, 2, kernel, stride, padding).double()
        x = torch.randn(1, 1, side, side, dtype=torch.float64)
        with monkeypatch.context() as patch:
            patch.setattr("worldmodels.nn.equivariant.check_grid", lambda *_: None)
            breaks = error(layer, x, symmetry, "picture", "fields") > 1e-3
        if breaks:
            refused += 1
            with pytest.raises(
                UserError, match=f"of {side} breaks symmetry={symmetry.name} under a kernel of {kernel}"
            ):
                layer(x)
        else:
            assert error(layer, x, symmetry, "picture", "fields") <= BOUND
    assert refused > 10


def test_what_is_refused_names_what_works():
    d4, lr = group("d4"), group("flip_lr")
    with pytest.raises(UserError, match="a height of 64 .* use a height of 63 or 65, or a kernel of 2 or 4"):
        GroupConv2d(d4, 1, 1, 3, 2)(torch.zeros(1, 1, 8, 64, 64))
    for size, kernel in ((63, 3), (65, 3), (64, 2), (64, 4)):
        check_grid(d4, (size, size), kernel, 2, 1)
    with pytest.raises(UserError, match="a width of 8 .* kernel of 3 with stride 2 and padding 0"):
        GroupPool2d(lr, "max", 3, 2)(torch.zeros(1, 1, 2, 8, 8))
    check_grid(lr, (8, 9), 3, 2, 0)  # a flip asks nothing of the other axis, and no flip nothing at all
    check_grid(group("flip_ud"), (9, 8), 3, 2, 0)
    check_grid(group("none"), (8, 9), 3, 2, 0)
    oblong = torch.zeros(1, 3, 15, 19)
    symmetrised = Symmetrised(group("c4"), nn.Conv2d(3, 2, 3))
    for layer in (LiftConv2d(group("c4"), 3, 2), GroupPool2d(d4, "mean", 1), symmetrised):
        with pytest.raises(UserError, match="15x19 .* pad it to 19x19, or use symmetry=flip_lr or flip_ud"):
            layer(oblong)
    assert LiftConv2d(lr, 3, 2)(oblong).shape == (1, 2, 2, 15, 19)
    with pytest.raises(UserError, match="4x4|4x2"):
        Symmetrised(d4, nn.Conv2d(3, 2, (1, 3)))(torch.zeros(1, 3, 4, 4))
    with pytest.raises(UserError, match="15x19"):
        flatten_fields(torch.zeros(1, 2, 4, 15, 19), group("c4"))
    with pytest.raises(UserError, match="reduce=sum is unknown; choose max or mean"):
        GroupPool2d(d4, "sum")  # pyrefly: ignore
    with pytest.raises(UserError, match="sees=some is unknown; choose own or all"):
        Symmetrised(d4, nn.Identity(), "some")  # pyrefly: ignore


@every_symmetry
def test_folded_pixels_and_norms_of_places_break_the_symmetry(symmetry):
    torch.manual_seed(0)
    lift = LiftConv2d(symmetry, 4, 2)
    folded = Wrapped(lambda x: lift.double()(F.pixel_unshuffle(x, 2))).double()
    assert error(folded, torch.randn(2, 1, 6, 6, dtype=torch.float64), symmetry, "picture", "fields") > 0.01
    norm = nn.LayerNorm([6, 6]).double()
    nn.init.normal_(norm.weight)
    x = torch.randn(2, 2, len(symmetry), 6, 6, dtype=torch.float64)
    assert error(norm, x, symmetry, "fields", "fields") > 0.01


def test_no_symmetry_is_the_plain_layer():
    torch.manual_seed(0)
    none, plain, x = group("none"), nn.Conv2d(3, 4, 3, 2, 1), torch.randn(2, 3, 8, 7)
    for layer, seen in ((LiftConv2d(none, 3, 4, 3, 2), x), (GroupConv2d(none, 3, 4, 3, 2), x[:, :, None])):
        with torch.no_grad():
            layer.weight.copy_(plain.weight[:, :, None])
            layer.bias.copy_(plain.bias)
        assert torch.equal(layer(seen)[:, :, 0], plain(x))
        assert sum(p.numel() for p in layer.parameters()) == sum(p.numel() for p in plain.parameters())
    linear = GroupLinear(none, 3, 4)
    y = torch.randn(2, 3)
    assert torch.allclose(linear(y[..., None])[..., 0], F.linear(y, linear.weight[..., 0], linear.bias))


@pytest.mark.parametrize("name", ["lift", "conv even", "linear", "action head"])
def test_gradients_are_those_of_finite_differences(name):
    layer, x, *_ = example(name, group("d4"), batch=1)
    parameters = dict(layer.named_parameters())

    def function(x: Tensor, *values: Tensor) -> Tensor:
        given = dict(zip(parameters, values, strict=True))
        return torch.func.functional_call(layer, given, (x,)).square()

    inputs = (x.requires_grad_(), *parameters.values())
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


# The expanded weight, once a step


def unrolled(layer: nn.Module, x: Tensor, calls: int = 3) -> Tensor:
    for _ in range(calls):
        x = torch.tanh(layer(x))
    return x.square().mean()


def gradient(layer: nn.Module, x: Tensor) -> Tensor:
    layer.zero_grad()
    unrolled(layer, x).backward()
    return layer.weight.grad.clone()


@pytest.fixture
def conv() -> GroupConv2d:
    torch.manual_seed(0)
    return GroupConv2d(group("d4"), 2, 2).double()


@pytest.fixture
def fields() -> Tensor:
    return torch.randn(2, 2, 8, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_the_weight_is_expanded_once_a_step(conv, fields, monkeypatch):
    count, real = [], equivariant._rearranged
    monkeypatch.setattr(equivariant, "_rearranged", lambda *a: count.append(a) or real(*a))
    optimizer = torch.optim.AdamW(conv.parameters(), 0.1, fused=True)
    for step in range(3):
        with expand_once(nn.Sequential(conv)):
            loss = unrolled(conv, fields)
        loss.backward()
        assert len(count) == 2 * (step + 1)  # once forward and once back
        optimizer.step()
    count.clear()
    with torch.no_grad(), expand_once(conv):
        unrolled(conv, fields, 5)
        with expand_once(conv):
            unrolled(conv, fields, 5)
        unrolled(conv, fields, 5)
    assert len(count) == 1
    assert conv.kept is None


def test_several_calls_add_their_gradients(conv, fields):
    plain = gradient(conv, fields)
    with expand_once(conv):
        assert torch.allclose(gradient(conv, fields), plain, rtol=0, atol=1e-14)
        assert torch.allclose(gradient(conv, fields), plain, rtol=0, atol=1e-14)  # a second time through the same graph


def test_steps_of_a_fused_optimizer_are_those_without_sharing(conv, fields):
    twin = copy.deepcopy(conv)
    optimizers = [torch.optim.AdamW(layer.parameters(), 0.1, fused=True) for layer in (conv, twin)]
    for _ in range(3):
        with expand_once(conv):
            gradient(conv, fields)
        gradient(twin, fields)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.allclose(conv.weight, twin.weight, rtol=0, atol=1e-12)


def test_a_block_ends_with_an_error_and_with_it_what_was_kept(conv, fields):
    with torch.no_grad():
        before = conv(fields)
        with pytest.raises(ZeroDivisionError), expand_once(conv):
            conv(fields)
            raise ZeroDivisionError
        conv.weight.data.mul_(2)
        assert not torch.equal(conv(fields), before)
    with expand_once(conv):
        conv(fields)
    conv(fields).sum().backward()
    assert torch.equal(copy.deepcopy(conv)(fields), conv(fields))
    assert list(conv.state_dict()) == ["weight", "bias"]


def test_gradient_modes_do_not_mix_in_a_block(conv, fields):
    plain = gradient(conv, fields)
    with expand_once(conv):
        with torch.no_grad():
            seen = conv(fields)
        with torch.inference_mode():
            assert torch.equal(conv(fields), seen)
        assert torch.allclose(gradient(conv, fields), plain, rtol=0, atol=1e-14)
        with torch.no_grad():
            assert not conv(fields).requires_grad


def test_autocast_has_a_weight_of_its_own_precision():
    torch.manual_seed(0)
    conv, x = GroupConv2d(group("c4"), 2, 2), torch.randn(2, 2, 4, 5, 5)
    exact, full = conv(x).detach(), gradient(conv, x)
    conv.zero_grad()
    with expand_once(conv):
        conv(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert conv.expanded().dtype == torch.bfloat16
            rounded, loss = conv(x), unrolled(conv, x)
        assert torch.equal(conv(x), exact)
    assert rounded.dtype == torch.bfloat16
    assert torch.allclose(rounded.float(), exact, atol=0.02 * float(exact.abs().max()))
    loss.backward()
    assert conv.weight.grad.dtype == torch.float32
    assert torch.allclose(conv.weight.grad, full, atol=0.05 * float(full.abs().max()))


def test_a_checkpointed_unroll_has_the_same_gradient(conv, fields):
    plain = gradient(conv, fields)
    conv.zero_grad()
    with expand_once(conv):
        x = fields
        for _ in range(3):
            x = checkpoint(lambda x: torch.tanh(conv(x)), x, use_reentrant=False)
    x.square().mean().backward()
    assert torch.allclose(conv.weight.grad, plain, rtol=0, atol=1e-14)


def test_parameters_can_be_matched():
    plain = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3), nn.Conv2d(32, 32, 3))
    wished = sum(p.numel() for p in plain.parameters())

    def build(symmetry: Group):
        def network(fields: int) -> nn.Module:
            convs = (GroupConv2d(symmetry, fields, fields), GroupConv2d(symmetry, fields, fields))
            head = ActionHead(action_table(symmetry), fields)
            return nn.Sequential(LiftConv2d(symmetry, 3, fields), *convs, head)

        return network

    for symmetry in GROUPS.values():
        width = matched_width(build(symmetry), wished)
        errors = {
            w: abs(sum(p.numel() for p in build(symmetry)(w).parameters()) - wished)
            for w in (width - 1, width, width + 1)
            if w
        }
        assert min(errors, key=errors.__getitem__) == width
        assert width == pytest.approx(32 / math.sqrt(len(symmetry)), abs=1.5)
    assert matched_width(lambda width: nn.Linear(width, 100), 1) == 1
