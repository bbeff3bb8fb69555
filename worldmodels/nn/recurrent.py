"""From frames to features with a memory: the network that every policy shares, so that they can be compared.

Source: the actor-critic of Alonso et al. 2024 (DIAMOND), appendix: residual convolutions with pooling, an LSTM cell.

Legend: B batch, T steps, C colour channels, H and W pixels, N frames that are seen at once, D features.
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from worldmodels.types import State, UserError

GROUP = 32
"""Channels a group of a group norm."""


class Block(nn.Module):
    """Group norm, SiLU, 3x3 convolution, with a skip around them."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(max(1, inputs // GROUP), inputs)
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H, W)."""
        return self.skip(x) + self.conv(F.silu(self.norm(x)))


class RecurrentEncoder(nn.Module):
    """Convolutions over the last N frames, then an LSTM cell.

    Its state holds the frames before the next that it needs (uint8), blank at first, and the LSTM's hidden and cell
    vectors, zero at first.

    Args:
        image_channels: C.
        image_size: H = W.
        channels: output channels of each block; the first convolution has as many as the first block.
        pools: whether a 2x2 max-pooling follows each block.
        lstm: D.
        patch: side of the square of pixels that is folded into channels first, which loses nothing and saves time
            (DIAMOND: 1).
        frames: N; with 2 the speed of a ball is seen and need not be remembered (DIAMOND: 1).
        gap: steps from each of these frames to the next. Between neighbouring frames a paddle moves as it was just told
            to, and a clone takes to doing what it has done; two steps apart that shows less and a ball's speed more.
        standardise: what a pixel differs from its mean, by its own standard deviation and 0.1, in place of frames in
            [-1, 1] (DIAMOND): a ball then stands out of a scene that never changes, and is learned many times sooner.
            `know` tells the mean and the deviation.
        projection: width of a layer between convolutions and LSTM, 0 for none (DIAMOND).
        memory: false has a layer in place of the LSTM, so that the last N frames decide (DIAMOND: true). A clone with a
            memory learns whom of a log's players it sees, and takes its own mistakes for a bad one's.

    Raises:
        UserError: channels and pools differ in number, the patch does not divide the size, or a size is not positive.
    """

    def __init__(
        self,
        image_channels: int,
        image_size: int,
        channels: list[int],
        pools: list[bool],
        lstm: int,
        patch: int = 1,
        frames: int = 1,
        gap: int = 1,
        standardise: bool = False,
        projection: int = 0,
        memory: bool = True,
    ) -> None:
        super().__init__()
        if len(channels) != len(pools) or not channels:
            raise UserError(f"model.encoder has channels={channels} and pools={pools}, which must be equally many")
        sizes = {
            "channels": channels,
            "lstm": [lstm],
            "patch": [patch],
            "frames": [frames],
            "gap": [gap],
            "projection": [projection],
        }
        for name, given in sizes.items():
            if any(type(size) is not int or size < (name != "projection") for size in given):
                least = "0 (none)" if name == "projection" else 1
                raise UserError(
                    f"model.encoder.{name}={given if name == 'channels' else given[0]} must be whole, from {least} on"
                )
        if type(memory) is not bool:
            raise UserError(f"model.encoder.memory={memory} must be true or false")
        if image_size % patch:
            raise UserError(f"model.encoder.patch={patch} does not divide the image size {image_size}")
        self.shape = (image_channels, image_size, image_size)
        self.standardise = standardise
        self.register_buffer("mean", torch.full(self.shape, 0.0 if standardise else 0.5), persistent=standardise)
        self.register_buffer("scale", torch.full(self.shape, 1.0 if standardise else 2.0), persistent=standardise)
        self.patch, self.before, self.gap, self.lstm, self.memory = patch, frames - 1, gap, lstm, memory
        blocks: list[nn.Module] = [nn.Conv2d(frames * image_channels * patch**2, channels[0], 3, padding=1)]
        side = image_size // patch
        for inputs, outputs, pool in zip([channels[0], *channels], channels, pools, strict=False):
            blocks += [Block(inputs, outputs), *([nn.MaxPool2d(2)] if pool else [])]
            side //= 1 + pool
        blocks.append(nn.Flatten())
        width = channels[-1] * side**2
        if projection:
            blocks += [nn.SiLU(), nn.Linear(width, projection), nn.SiLU()]
            width = projection
        self.look = nn.Sequential(*blocks)
        self.cell = nn.LSTMCell(width, lstm) if memory else nn.Sequential(nn.Linear(width, lstm), nn.SiLU())
        if isinstance(self.cell, nn.LSTMCell):
            init_lstm(self.cell)
        self.to(memory_format=torch.channels_last)  # pyrefly: ignore

    def know(self, frames: Tensor) -> None:
        """Take mean and standard deviation of each pixel from frames (N, C, H, W) uint8 of the log."""
        if self.standardise:
            deviation, mean = torch.std_mean(frames.float() / 255, dim=0, correction=0)
            self.mean.copy_(mean)
            self.scale.copy_(1 / (deviation + 0.1))

    @property
    def blank(self) -> Tensor:
        """What stands for a frame that is not there: the mean frame, (C, H, W) uint8, or black."""
        return (self.mean * 255).round().byte() if self.standardise else torch.zeros_like(self.mean).byte()

    def start(self, n: int) -> State:
        """The state of `n` rows that have seen nothing."""
        state = {name: torch.zeros(n, self.lstm, device=self.mean.device) for name in ("hidden", "cell")}
        if self.before:
            state["frames"] = self.blank.repeat(n, self.before * self.gap, 1, 1)
        return state

    def stack(self, obs: Tensor, state: State) -> Tensor:
        """Each of T frames with the N - 1 before it that are seen with it.

        Args:
            obs: (B, T, C, H, W) uint8.
            state: before the first of them.

        Returns:
            (B, T, N * C, H, W) uint8.
        """
        if tuple(obs.shape[2:]) != self.shape or obs.dtype != torch.uint8:
            raise UserError(
                f"the policy sees frames {self.shape} uint8 (channels, height, width) but got {tuple(obs.shape[2:])} "
                f"{obs.dtype}; play or train it on the preprocessing of its own log"
            )
        if not self.before:
            return obs
        film, gap = torch.cat([state["frames"].unflatten(1, (self.before * self.gap, -1)), obs], dim=1), self.gap
        return torch.cat([film[:, k * gap : k * gap + obs.shape[1]] for k in range(self.before + 1)], dim=2)

    def features(
        self, stacks: Tensor, state: State, fresh: Tensor | None = None, memory: Tensor | None = None
    ) -> Tensor:
        """Features of T steps in turn.

        Args:
            stacks: (B, T, N * C, H, W) uint8, of `stack`.
            state: before the first step.
            fresh: (B, T) bool, rows that begin anew before a step.
            memory: (B, T, 2 D), hidden and cell vectors with which they begin; zero by default.

        Returns:
            (B, T, 2 D): the features are the first D, and all of it is the memory after each step.
        """
        # (level / 255 - mean) * scale, patches folded while they are bytes
        mean, scale = (self._fold(v.repeat(self.before + 1, 1, 1)[None]) for v in (self.mean, self.scale))
        x = torch.addcmul(-mean * scale, self._fold(stacks.flatten(0, 1)).float(), scale / 255)
        x = self.look(x).float().unflatten(0, stacks.shape[:2])
        if not self.memory:
            return F.pad(self.cell(x).float(), (0, self.lstm))
        both, seen = torch.cat([state["hidden"], state["cell"]], dim=-1), []
        for t in range(x.shape[1]):
            if fresh is not None:
                new = torch.zeros_like(both) if memory is None else memory[:, t]
                both = torch.where(fresh[:, t, None], new, both)
            both = torch.cat(self.cell(x[:, t], both.float().chunk(2, dim=-1)), dim=-1)
            seen.append(both)
        return torch.stack(seen, dim=1)

    def _fold(self, x: Tensor) -> Tensor:
        """`F.pixel_unshuffle` whose result lies in memory with its channels last, as convolutions want it."""
        folded = rearrange(x, "n c (h p) (w q) -> n h w (c p q)", p=self.patch, q=self.patch)
        return folded.contiguous().permute(0, 3, 1, 2)

    def forward(self, obs: Tensor, state: State) -> tuple[Tensor, State]:
        """One step: features (B, D) of frames (B, C, H, W) uint8, and the state after them."""
        stacks = self.stack(obs[:, None], state)
        hidden, cell = self.features(stacks, state)[:, 0].float().chunk(2, dim=-1)
        after = {"hidden": hidden, "cell": cell}
        if self.before:
            after["frames"] = torch.cat([state["frames"][:, self.shape[0] :], obs], dim=1)
        return hidden, after


def init_lstm(lstm: nn.LSTM | nn.LSTMCell) -> None:
    """Orthogonal recurrent weights, Xavier input weights, and a forget gate that starts open."""
    for name, weight in lstm.named_parameters():
        if "weight_ih" in name:
            nn.init.xavier_uniform_(weight)
        elif "weight_hh" in name:
            nn.init.orthogonal_(weight)
        else:
            nn.init.zeros_(weight)
            if "bias_ih" in name:
                weight.data[lstm.hidden_size : 2 * lstm.hidden_size] = 1.0
