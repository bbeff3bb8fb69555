"""Heads that learn a number (a value, a reward) from features, all with one convention, so that a yaml swaps them.

`loss(features, target)` gives one loss a row, for the caller to mask, weigh and average; `mean(features)` the
expectation; `sample(features, generator)` a draw; `backup(features, reward, discount)` the target of a Bellman backup,
without gradient: a number for every head but C51, for which it is a distribution. A head with `actions` has one output
an action: `mean` gives them all, and the others take the index of one.

A head computes in float32 from its layer's output on, whatever the precision around it, and keeps its bins out of the
state: cast to bfloat16 they would lie up to a twelfth of a bin off. A target beyond the support counts as at its end.

Where there is a `transform`, bins are equally spaced in the transformed number, and the expectation is taken there and
then transformed back, as MuZero does. Of targets that vary this is smaller than their mean.

Legend: D features, A actions (absent where the head has none), K bins; leading dimensions ... are free.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from worldmodels.ops.categorical import (
    expectation,
    hl_gauss,
    inverse_value_transform,
    project,
    symexp,
    symlog,
    two_hot,
    value_transform,
)
from worldmodels.types import UserError

Function = Callable[[Tensor], Tensor]
TRANSFORMS: dict[str, tuple[Function, Function]] = {
    "none": (lambda x: x, lambda x: x),
    "symlog": (symlog, symexp),
    "h": (value_transform, inverse_value_transform),
}
"""From the number to what is learned, and back."""


def _transform(name: str) -> tuple[Function, Function]:
    if name not in TRANSFORMS:
        raise UserError(f"a head's transform={name} is unknown; choose one of {', '.join(TRANSFORMS)}")
    return TRANSFORMS[name]


def wide(x: Tensor) -> Tensor:
    """In float32 at least, whatever the precision around it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class MSE(nn.Module):
    """Regression by squared error; a draw is the mean itself.

    Args:
        features: D.
        actions: A, or None for a single output.
        transform: "none", "symlog" or "h" of the number that is learned.

    Raises:
        UserError: an unknown transform.
    """

    def __init__(self, features: int, actions: int | None = None, transform: str = "none") -> None:
        super().__init__()
        self.actions = actions
        self.encode, self.decode = _transform(transform)
        self.layer = nn.Linear(features, actions or 1)

    def forward(self, features: Tensor, action: Tensor | None = None) -> Tensor:
        """Outputs (..., A) float32, or (...) of `action` (...) int64 or of the only one."""
        output = wide(self.layer(features))
        if self.actions is None:
            return output[..., 0]
        return output if action is None else output.gather(-1, action[..., None])[..., 0]

    def loss(self, features: Tensor, target: Tensor, action: Tensor | None = None) -> Tensor:
        """Squared errors (...) of the transformed numbers, for features (..., D) and target (...)."""
        return (self(features, action) - self.encode(target.float())).square()

    def mean(self, features: Tensor, action: Tensor | None = None) -> Tensor:
        """Expectation (...), or (..., A) where the head has actions and none is given."""
        return self.decode(self(features, action))

    def sample(
        self, features: Tensor, generator: torch.Generator | None = None, action: Tensor | None = None
    ) -> Tensor:
        """The mean: a squared error tells nothing of a spread."""
        return self.mean(features, action)

    @torch.no_grad()
    def backup(self, features: Tensor, reward: Tensor, discount: Tensor, action: Tensor | None = None) -> Tensor:
        """Target reward + discount * mean (...), for the features of the next step; reward and discount are (...)."""
        return reward + discount * self.mean(features, action)


class Categorical(nn.Module):
    """What heads with bins share; a subclass says how a target becomes weights on them.

    Args:
        features: D.
        actions: A, or None for a single output.
        low: least number, the first bin (of HL-Gauss: its lower edge).
        high: greatest number, the last bin (of HL-Gauss: its upper edge).
        bins: K.
        transform: "none", "symlog" or "h" of the number, in which bins are equally spaced.

    Raises:
        UserError: an unknown transform, fewer than two bins, or no room between low and high.
    """

    def __init__(
        self,
        features: int,
        actions: int | None = None,
        low: float = -10.0,
        high: float = 10.0,
        bins: int = 51,
        transform: str = "none",
    ) -> None:
        super().__init__()
        if bins < 2 or low >= high:
            raise UserError(f"a head's low={low}, high={high}, bins={bins} must be at least two bins, low below high")
        self.actions, self.bins = actions, bins
        self.encode, self.decode = _transform(transform)
        self.low, self.high = self.encode(torch.tensor([low, high], dtype=torch.float64, device="cpu")).tolist()
        self.layer = nn.Linear(features, bins * (actions or 1))

    def support(self, device: torch.device) -> Tensor:
        """What each bin stands for, in the transformed number: (K,) float32."""
        return torch.linspace(self.low, self.high, self.bins, device=device)

    def weights(self, target: Tensor) -> Tensor:
        """Weights (..., K) that stand for the transformed number `target` (...)."""
        raise NotImplementedError

    def forward(self, features: Tensor, action: Tensor | None = None) -> Tensor:
        """Logits (..., A, K) float32, or (..., K) of `action` (...) int64 or of the only one."""
        logits = wide(self.layer(features))
        if self.actions is None:
            return logits
        logits = logits.unflatten(-1, (self.actions, self.bins))
        return logits if action is None else logits.take_along_dim(action[..., None, None], -2)[..., 0, :]

    def loss(self, features: Tensor, target: Tensor, action: Tensor | None = None) -> Tensor:
        """Cross-entropies (...) for features (..., D) and target (...), or weights (..., K) that `backup` gave."""
        logits = self(features, action)
        weights = target if target.ndim == logits.ndim else self.weights(self.encode(target.float()))
        return -(weights * logits.log_softmax(-1)).sum(-1)

    def mean(self, features: Tensor, action: Tensor | None = None) -> Tensor:
        """Expectation (...), or (..., A) where the head has actions and none is given."""
        probability = self(features, action).softmax(-1)
        return self.decode(expectation(probability, self.support(probability.device)))

    def sample(
        self, features: Tensor, generator: torch.Generator | None = None, action: Tensor | None = None
    ) -> Tensor:
        """One bin drawn from each distribution, as the number it stands for; shaped like the mean."""
        probability = self(features, action).softmax(-1)
        drawn = torch.multinomial(probability.flatten(0, -2), 1, generator=generator)
        return self.decode(self.support(probability.device))[drawn].view(probability.shape[:-1])

    @torch.no_grad()
    def backup(self, features: Tensor, reward: Tensor, discount: Tensor, action: Tensor | None = None) -> Tensor:
        """Target reward + discount * mean (...), for the features of the next step; reward and discount are (...)."""
        return reward + discount * self.mean(features, action)


class TwoHot(Categorical):
    """Cross-entropy with the target's mass on the two bins around it; its mean is exact and nothing is smoothed."""

    def weights(self, target: Tensor) -> Tensor:
        """The two-hot code (..., K)."""
        return two_hot(target, self.support(target.device))


class HLGauss(Categorical):
    """Cross-entropy with a Gaussian around the target ("Stop Regressing"); `low` and `high` are the outermost edges.

    The mean is drawn inwards nearer than three sigma to the ends, so leave them some room; a draw has the Gaussian's
    own variance, sigma squared, beside that of the number.

    Args:
        sigma: standard deviation of the Gaussian, in bin widths.
        settings: as of `Categorical`.
    """

    def __init__(self, features: int, actions: int | None = None, sigma: float = 0.75, **settings: float | str) -> None:
        super().__init__(features, actions, **settings)  # pyrefly: ignore
        if sigma <= 0:
            raise UserError(f"a head's sigma={sigma} must be above 0; 0.75 bin widths is the usual value")
        self.width = (self.high - self.low) / self.bins
        self.sigma = sigma * self.width

    def support(self, device: torch.device) -> Tensor:
        """The centres of the bins (K,), in the transformed number."""
        half = self.width / 2
        return torch.linspace(self.low + half, self.high - half, self.bins, device=device)

    def weights(self, target: Tensor) -> Tensor:
        """The Gaussian's mass in each bin (..., K)."""
        edges = torch.linspace(self.low, self.high, self.bins + 1, device=target.device)
        return hl_gauss(target, edges, self.sigma)


class C51(TwoHot):
    """The distribution of the return itself: a backup moves all bins and projects them onto themselves.

    For a target that is a number, such as a reward, it is `TwoHot`.
    """

    @torch.no_grad()
    def backup(self, features: Tensor, reward: Tensor, discount: Tensor, action: Tensor | None = None) -> Tensor:
        """Target weights (..., K) of reward + discount * return, for the features of the next step."""
        support, probability = self.support(features.device), self(features, action).softmax(-1)
        moved = reward[..., None] + discount[..., None] * self.decode(support)
        return project(self.encode(moved.float()), probability, support)
