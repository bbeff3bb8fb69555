"""The norm that keeps less for its gradients is the composition that it stands for; dilated blocks know no grid."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from worldmodels.nn.dilated import DilatedNet
from worldmodels.nn.unet import AdaGroupNorm, SelfAttention


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (0, 1, 3, 2)])  # contiguous, channels-last, neither
def test_norm_and_its_gradients(order):
    torch.manual_seed(0)
    norm = AdaGroupNorm(64, 8)  # two groups
    x = torch.randn(3, 64, 6, 5).permute(order).contiguous().permute(*np.argsort(order)).requires_grad_()
    cond, gradient = torch.randn(3, 8, requires_grad=True), torch.randn(3, 64, 6, 5)
    leaves = (x, cond, *norm.parameters())
    scale, shift = norm.linear(cond)[:, :, None, None].chunk(2, dim=1)
    expected = F.silu(F.group_norm(x, 2) * (1 + scale) + shift)
    output = norm(x, cond)
    torch.testing.assert_close(output, expected)
    with torch.no_grad():
        torch.testing.assert_close(norm(x, cond), expected)
    for a, b in zip(
        torch.autograd.grad(output, leaves, gradient), torch.autograd.grad(expected, leaves, gradient), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_norm_in_bfloat16():
    """As autocast runs it: its gradients are those of float32 to the precision of bfloat16."""
    torch.manual_seed(0)
    norm, cond, gradients = AdaGroupNorm(32, 8), torch.randn(3, 8), []
    for enabled in (False, True):
        x = torch.randn(3, 32, 8, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = norm(x.bfloat16() if enabled else x, cond)
        assert output.dtype == (torch.bfloat16 if enabled else torch.float32)
        norm.zero_grad()
        output.float().square().mean().backward()
        gradients.append(torch.cat([x.grad.flatten() * 100, norm.linear.weight.grad.flatten()]))
    assert (gradients[0] - gradients[1]).norm() < 0.03 * gradients[0].norm()


@pytest.mark.parametrize("normed", [False, True])
def test_what_attention_is_added_to(normed):
    """Its output starts at zero, so that it is its skip at first: its input, or in DIAMOND's code the norm of it."""
    attention, x = SelfAttention(16, normed), torch.randn(2, 16, 4, 4) * 3 + 1
    torch.testing.assert_close(attention(x), F.group_norm(x, 1) if normed else x)


def test_the_dilated_network_treats_all_places_alike():
    torch.manual_seed(0)
    net = DilatedNet(8, 4, [1, 2, 4])
    for block in net.blocks:
        nn.init.normal_(block.conv2.weight, std=0.1)  # they start at zero
    x, cond = torch.randn(1, 8, 40, 40), torch.randn(1, 4)
    inside = (..., slice(15, 25), slice(15, 25))
    moved, expected = net(x.roll((1, 3), (2, 3)), cond)[inside], net(x, cond).roll((1, 3), (2, 3))[inside]
    assert (moved - expected).norm() < 0.02 * expected.norm(), "but for the norms' statistics, which know the borders"
