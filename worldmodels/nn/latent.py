"""Networks over a latent image: frames become one, an action moves it, and features are read from it.

Source: the layout of Ye et al. 2021 (EfficientZero), with the pre-activation and the layer norm of Schrittwieser et al.
2021 (MuZero Unplugged).

Legend: N rows, C channels of the input, D channels of the latent image, H and W pixels, h and w places of the latent.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from worldmodels.types import UserError


class Residual(nn.Module):
    """Twice layer norm, ReLU and 3x3 convolution, with a skip around them.

    Args:
        inputs: channels that come in.
        outputs: channels that go out.
        stride: 2 halves height and width.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.GroupNorm(1, inputs), nn.ReLU(), nn.Conv2d(inputs, outputs, 3, stride, 1))
        self.second = nn.Sequential(nn.GroupNorm(1, outputs), nn.ReLU(), nn.Conv2d(outputs, outputs, 3, 1, 1))
        plain = inputs == outputs and stride == 1
        self.skip = nn.Identity() if plain else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        return self.skip(x) + self.second(self.first(x))


class Shape(NamedTuple):
    """Of a latent image: D, and h = w."""

    channels: int
    side: int


class Representation(nn.Module):
    """A stack of frames as a latent image.

    Args:
        inputs: C.
        image_size: H = W.
        layers: from the frames on: `"conv 32"` a convolution to 32 channels and ReLU, `"down 32"` one that
            halves the image, `"block"` a residual block, `"down block 64"` one that halves it, `"pool"` a 2x2 mean.
        patch: side of the square of pixels that is folded into channels first, which loses nothing and saves time.

    Raises:
        UserError: an unknown layer, or a patch that does not divide the image.
    """

    def __init__(self, inputs: int, image_size: int, layers: list[str], patch: int = 1) -> None:
        super().__init__()
        if image_size % patch:
            raise UserError(f"model.representation.patch={patch} does not divide the image size {image_size}")
        self.patch, channels, side = patch, inputs * patch**2, image_size // patch
        made: list[nn.Module] = []
        for layer in layers:
            match layer.split():
                case [*down, "conv" | "down", width] if not down and width.isdigit():
                    stride = 1 + layer.startswith("down")
                    made += [nn.Conv2d(channels, int(width), 3, stride, 1), nn.ReLU()]
                    channels, side = int(width), -(-side // stride)
                case ["down", "block", width] if width.isdigit():
                    made.append(Residual(channels, int(width), 2))
                    channels, side = int(width), -(-side // 2)
                case ["block"]:
                    made.append(Residual(channels, channels))
                case ["pool"]:
                    made.append(nn.AvgPool2d(2, ceil_mode=True))
                    side = -(-side // 2)
                case _:
                    raise UserError(
                        f"model.representation.layers has {layer!r}; allowed are 'conv N', 'down N', 'block', "
                        "'down block N' and 'pool'"
                    )
        self.layers = nn.Sequential(*made)
        self.shape = Shape(channels, side)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) float to (N, D, h, w)."""
        return self.layers(F.pixel_unshuffle(x, self.patch))


class Dynamics(nn.Module):
    """What an action makes of a latent image.

    An action enters as a bias of the first convolution, which equals planes of its one-hot code but at the borders.

    Args:
        shape: of the latent image.
        actions: A.
        blocks: residual blocks after the action has entered, or without a skip pairs of norm, ReLU and convolution.
        skip: add what the action changes to the latent image, as published. Small networks learn several times sooner
            without it: where things move at every step, that nothing does is a bad first guess.
    """

    def __init__(self, shape: Shape, actions: int, blocks: int = 1, skip: bool = True) -> None:
        super().__init__()
        width, self.skip = shape.channels, skip
        self.action = nn.Embedding(actions, width)
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        block = (lambda: [Residual(width, width)]) if skip else (lambda: [*_step(width), *_step(width)])
        self.blocks = nn.Sequential(*(layer for _ in range(blocks) for layer in block()))

    def forward(self, latent: Tensor, action: Tensor) -> Tensor:
        """The latent image (N, D, h, w) after `action` (N,) int64."""
        moved = self.conv(latent) + self.action(action)[..., None, None]
        return self.blocks(latent + moved if self.skip else moved)


def _step(width: int) -> list[nn.Module]:
    return [nn.GroupNorm(1, width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)]


class Readout(nn.Module):
    """Features of a whole latent image: what is where in it, and what is anywhere in it.

    The latter, the greatest value of each channel, lets a meeting of two things be learned once and not for each place.

    Args:
        shape: of the latent image.
        channels: that each place is told in.
        width: of the features.
    """

    def __init__(self, shape: Shape, channels: int = 16, width: int = 64) -> None:
        super().__init__()
        self.width = width
        self.norm = nn.Sequential(nn.GroupNorm(1, shape.channels), nn.ReLU())
        self.places = nn.Sequential(nn.Conv2d(shape.channels, channels, 1), nn.Flatten(), nn.ReLU())
        inputs = channels * shape.side**2 + shape.channels
        self.output = nn.Sequential(nn.Linear(inputs, width), nn.LayerNorm(width), nn.ReLU())

    def forward(self, latent: Tensor) -> Tensor:
        """(N, D, h, w) to (N, width)."""
        x = self.norm(latent)
        return self.output(torch.cat([self.places(x), x.amax((2, 3))], 1))


class PolicyHead(nn.Module):
    """Logits of actions.

    Args:
        shape: of the latent image.
        actions: A.
        settings: further ones of `Readout`.
    """

    def __init__(self, shape: Shape, actions: int, **settings: int) -> None:
        super().__init__()
        self.read = Readout(shape, **settings)
        self.output = nn.Linear(self.read.width, actions)

    def forward(self, latent: Tensor) -> Tensor:
        """(N, D, h, w) to (N, A)."""
        return self.output(self.read(latent))


class Blend(nn.Module):
    """Joins what was expected with what is seen: a gate at each place says how much of the former is kept.

    Args:
        shape: of the latent image.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate = nn.Conv2d(2 * shape.channels, shape.channels, 1)

    def forward(self, expected: Tensor, seen: Tensor) -> Tensor:
        """Two latent images (N, D, h, w) as one."""
        return torch.lerp(seen, expected, self.gate(torch.cat([expected, seen], 1)).sigmoid())


class Projector(nn.Module):
    """Latent images for comparison: SimSiam's projection and prediction, as in EfficientZero (appendix A.1).

    Args:
        shape: of the latent image.
        width: of the projection (1024).
        hidden: of the prediction's layer (512).
    """

    def __init__(self, shape: Shape, width: int = 1024, hidden: int = 512) -> None:
        super().__init__()
        sizes = [shape.channels * shape.side**2, width, width, width]
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in zip(sizes, sizes[1:], strict=False):
            layers += [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU()]
        self.project = nn.Sequential(*layers[:-1])
        self.predict = nn.Sequential(
            nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, width)
        )

    def forward(self, imagined: Tensor, seen: Tensor) -> Tensor:
        """1 - cosine similarity (N,) of latent images (N, D, h, w); no gradient goes through `seen`."""
        with torch.no_grad():
            target = self.project(seen)
        return 1 - F.cosine_similarity(self.predict(self.project(imagined)), target, eps=1e-5)


def scaled(latent: Tensor) -> Tensor:
    """Each row from 0 to 1 (Schrittwieser et al. 2020, appendix G), so that unrolls stay in range."""
    low, high = latent.flatten(1).aminmax(dim=1)
    low, high = (x[:, None, None, None] for x in (low, high))
    return (latent - low) / (high - low).clamp(min=1e-5)


class Probe(nn.Module):
    """A frame drawn from a latent image, to look at: it learns beside, and what it learns from has no gradient.

    Args:
        shape: of the latent image.
        channels: of the frame.
        size: height and width of the frame in pixels.
        hidden: channels of the layer between.
    """

    def __init__(self, shape: Shape, channels: int, size: int, hidden: int = 64) -> None:
        super().__init__()
        self.size, self.factor = size, -(-size // shape.side)
        self.layers = nn.Sequential(
            nn.Conv2d(shape.channels, hidden, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden, hidden, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden, channels * self.factor**2, 1),
        )

    def forward(self, latent: Tensor) -> Tensor:
        """(N, D, h, w) to frames (N, C, H, W) float, 0 to 1."""
        frames = F.pixel_shuffle(self.layers(latent.detach()), self.factor)
        return frames[..., : self.size, : self.size].sigmoid()
