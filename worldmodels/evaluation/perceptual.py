"""LPIPS and FVD: distances in the features of networks trained on photographs and on films, for comparison with papers.

Neither network's weights come with this project, nor are they fetched: the user gives the files. What is small in an
Atari frame (the ball) hardly counts in either, so believe the pixels and the objects first.

Shapes: N frames or clips, T frames of a clip, D features.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from worldmodels.evaluation.stats import interval, number, plain, weighted_mean
from worldmodels.types import UserError

HOW_LPIPS = (
    "LPIPS was not measured: its AlexNet weights do not come with this project; give lpips=FILE, which is "
    "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth (torchvision's)"
)
HOW_FVD = (
    "FVD was not measured: its I3D weights do not come with this project; give fvd=FILE, which is the TorchScript "
    "i3d_torchscript.pt that StyleGAN-V (Skorokhodov et al. 2022) names"
)
LEAST_FRAMES = 10
"""Frames that a clip needs for I3D."""


class LPIPS(nn.Module):
    """Learned perceptual distance (Zhang et al. 2018, version 0.1 with AlexNet), with the linear heads of torchmetrics.

    torchmetrics has the same only beside torchvision, which fetches the weights itself.

    Args:
        path: AlexNet's weights, as torchvision stores them.

    Raises:
        UserError: the file is missing or holds something else.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        import torchmetrics.functional.image.lpips as heads

        self.features = nn.Sequential(
            *(nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()),
        )
        if not Path(path).is_file():
            raise UserError(f"there is no file lpips={path}; {HOW_LPIPS.split('; ')[1]}")
        try:
            stored = torch.load(path, map_location="cpu", weights_only=True)
            self.load_state_dict({k: v for k, v in stored.items() if k.startswith("features.")})
        except (RuntimeError, AttributeError, EOFError, pickle.UnpicklingError) as error:
            raise UserError(f"lpips={path} does not hold torchvision's AlexNet; {HOW_LPIPS.split('; ')[1]}") from error
        file = Path(heads.__file__).with_name("lpips_models") / "alex.pth"
        self.heads = torch.load(file, map_location="cpu", weights_only=True)
        self.shift = torch.tensor([-0.030, -0.088, -0.188])[:, None, None]
        self.scale = torch.tensor([0.458, 0.448, 0.450])[:, None, None]
        self.requires_grad_(False).eval()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distances (N,) of frames (N, C, H, W) in 0..255 on the CPU; grey ones are taken as RGB."""
        x, y = ((z.float().expand(-1, 3, -1, -1) / 127.5 - 1 - self.shift) / self.scale for z in (a, b))
        distance = torch.zeros(len(a))
        level = 0
        for layer in self.features:
            x, y = layer(x), layer(y)
            if isinstance(layer, nn.ReLU):
                square = (_unit(x) - _unit(y)).square()
                distance += F.conv2d(square, self.heads[f"lin{level}.model.1.weight"]).mean((1, 2, 3))
                level += 1
        return distance


def _unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(1, keepdim=True) + 1e-8).sqrt()


class FilmFeatures:
    """Features of films by a TorchScript of I3D, as FVD takes them (Unterthiner et al. 2018).

    Args:
        path: the TorchScript. It holds a program: take it from someone whom you trust.

    Raises:
        UserError: the file is missing or no TorchScript.
    """

    def __init__(self, path: str | Path) -> None:
        if not Path(path).is_file():
            raise UserError(f"there is no file fvd={path}; {HOW_FVD.split('; ')[1]}")
        try:
            self.network = torch.jit.load(str(path), map_location="cpu").eval()
        except RuntimeError as error:
            raise UserError(f"fvd={path} is no TorchScript; {HOW_FVD.split('; ')[1]}") from error

    @torch.no_grad()
    def __call__(self, clips: Tensor) -> Tensor:
        """(N, D) float64 for clips (N, T, C, H, W) uint8, T at least `LEAST_FRAMES`.

        Raises:
            UserError: the clips are too short, or the TorchScript takes none.
        """
        if clips.shape[1] < LEAST_FRAMES:
            raise UserError(
                f"FVD needs {LEAST_FRAMES} imagined frames, not {clips.shape[1]}: raise horizons, or drop fvd"
            )
        clips = clips.expand(-1, -1, 3, -1, -1).transpose(1, 2)  # (N, 3, T, H, W), which it scales and enlarges itself
        try:
            return self.network(clips, rescale=True, resize=True, return_features=True).double()
        except RuntimeError as error:
            raise UserError(f"fvd is a TorchScript that takes no films; {HOW_FVD.split('; ')[1]}") from error


def frechet_distance(a: Tensor, b: Tensor) -> float | None:
    """Frechet distance of two sets of features (N, D), each taken as a normal distribution; None for fewer than 2.

    |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^1/2) for the covariances A and B (Heusel et al. 2017, eq. 6). The last
    trace is the sum of the singular values of a b^T for centred a and b, which needs no root of a singular matrix;
    their triangular factors have the same ones, and at most D rows.
    """
    if min(len(a), len(b)) < 2:
        return None
    x, y = (z - z.mean(0) for z in (a, b))
    x, y = x / (len(a) - 1) ** 0.5, y / (len(b) - 1) ** 0.5
    cross = torch.linalg.matrix_norm(torch.linalg.qr(x, "r").R @ torch.linalg.qr(y, "r").R.T, ord="nuc")
    distance = (a.mean(0) - b.mean(0)).square().sum() + x.square().sum() + y.square().sum() - 2 * cross
    return number(distance)


class Perceptual:
    """LPIPS and FVD of films that come in batches, as far as their weights are given.

    Args:
        lpips: path of AlexNet's weights, or None.
        fvd: path of I3D as TorchScript, or None.
    """

    def __init__(self, lpips: str | None = None, fvd: str | None = None) -> None:
        self.lpips = LPIPS(lpips) if lpips else None
        self.features = FilmFeatures(fvd) if fvd else None
        self.distances: dict[str, list[Tensor]] = {}
        self.seen: dict[str, list[Tensor]] = {}

    def see(self, films: Mapping[str, Tensor], index: Tensor) -> None:
        """Take in films (B, T, C, H, W) uint8 by name, "true" among them; LPIPS is of the frames `index` (H,)."""
        for name, film in films.items():
            if self.lpips is not None and name != "true":
                pair = (x[:, index].flatten(0, 1) for x in (film, films["true"]))
                self.distances.setdefault(name, []).append(self.lpips(*pair).unflatten(0, (len(film), -1)))
            if self.features is not None:
                self.seen.setdefault(name, []).append(self.features(film))

    def figures(self, weights: Tensor) -> dict[str, Any]:
        """LPIPS over the horizons and FVD of whole films, or why not; those of films but "dream" by their names.

        Args:
            weights: (1 + R, W) of `episode_weights`.
        """
        figures: dict[str, Any] = {}
        for name, parts in self.distances.items():
            mean, tail = weighted_mean(weights, torch.cat(parts)), "" if name == "dream" else f"_{name}"
            figures |= {f"lpips{tail}": plain(mean[0]), f"lpips{tail}_interval": interval(mean)}
        features = {name: torch.cat(parts) for name, parts in self.seen.items()}
        for name in features.keys() - {"true"}:
            figures["fvd" if name == "dream" else f"fvd_{name}"] = frechet_distance(features[name], features["true"])
        missing = {"lpips": None, "without_lpips": HOW_LPIPS} if self.lpips is None else {}
        return figures | missing | ({"fvd": None, "without_fvd": HOW_FVD} if self.features is None else {})
