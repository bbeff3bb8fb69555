"""A linear state-space memory of where a film moved, over many more steps than a context has: the Legendre Memory Unit.

Its state holds the last `window` steps of each of its inputs as coefficients of Legendre polynomials. Nothing about
time is learned, so that what happened sixteen steps ago is as easy to learn from as what happened two steps ago.
Source: Voelker, Kajic & Eliasmith 2019, "Legendre Memory Units", equations 1 and 2 (HiPPO-LegT of Gu et al. 2020).

Legend: B batch, T steps, U inputs, N order.
"""

import torch
from torch import Tensor, nn


class LegendreMemory(nn.Module):
    """The state (B, U, N) after inputs (B, T, U).

    Args:
        order: N, coefficients kept of each input; a window of W steps is told to about W / N steps.
        window: steps that are remembered.
    """

    transition: Tensor
    entry: Tensor

    def __init__(self, order: int, window: int) -> None:
        super().__init__()
        row, column = torch.meshgrid(*2 * [torch.arange(order, dtype=torch.float64)], indexing="ij")
        sign = torch.where(row < column, -1.0, -((-1.0) ** (row - column)))
        a = (2 * row + 1) / window * sign
        b = (2 * row[:, :1] + 1) / window * (-1.0) ** row[:, :1]
        # held constant over a step (zero-order hold): one exponential gives both discrete matrices
        both = torch.zeros(order + 1, order + 1, dtype=torch.float64)
        both[:order, :order], both[:order, order:] = a, b
        both = torch.linalg.matrix_exp(both)
        self.register_buffer("transition", both[:order, :order].float(), persistent=False)
        self.register_buffer("entry", both[:order, order].float(), persistent=False)

    def forward(self, inputs: Tensor, state: Tensor | None = None) -> Tensor:
        """The state after `inputs` (B, T, U), T of at least 1, on top of an earlier `state` (B, U, N)."""
        # each input's share in the final state is A^(steps since) b: one matrix product in place of T steps
        kernel = [self.entry]
        for _ in range(inputs.shape[1] - 1):
            kernel.append(self.transition @ kernel[-1])
        new = torch.einsum("btu,tn->bun", inputs.float(), torch.stack(kernel[::-1]))
        if state is None:
            return new
        return new + state @ torch.linalg.matrix_power(self.transition, inputs.shape[1]).T


class MotionMemory(nn.Module):
    """What a `LegendreMemory` keeps of where a film moved, told as a coarse image.

    Args:
        width: channels of the image that is read from it.
        cells: the screen is seen as cells x cells places, and shown as many.
        hidden: width of the layer between the two.
        order: N of `LegendreMemory`.
        window: steps that are remembered.
    """

    def __init__(self, width: int, cells: int = 8, hidden: int = 128, order: int = 16, window: int = 24) -> None:
        super().__init__()
        self.window, self.cells = window, cells
        self.memory = LegendreMemory(order, window)
        self.output = nn.Sequential(nn.Linear(cells**2 * order, hidden), nn.SiLU(), nn.Linear(hidden, width * cells**2))

    def forward(self, frames: Tensor, real: Tensor | None = None, state: Tensor | None = None) -> Tensor:
        """The state (B, U, N) after a film.

        Args:
            frames: (B, T+1, C, H, W) in [-1, 1]; of T differences, at least 1.
            real: (B, T) bool, false where a difference is none, since the film had not begun.
            state: (B, U, N) before the film.
        """
        steps = (frames[:, 1:] - frames[:, :-1]).abs().amax(2)
        moved = nn.functional.adaptive_max_pool2d(steps, self.cells).flatten(2)
        if real is not None:
            moved = moved * real[..., None]
        return self.memory(moved, state)

    def read(self, state: Tensor) -> Tensor:
        """The image (B, width, cells, cells) that a state tells."""
        return self.output(state.flatten(1)).unflatten(1, (-1, self.cells, self.cells))
