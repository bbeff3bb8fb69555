"""Widths with which a MuZero with symmetries has about as many parameters as one without."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from worldmodels.nn.equivariant import matched_width

UNIT = 64
"""Parts in which layers are made wider or narrower."""


def matched_widths(
    model: Callable[..., nn.Module], given: Mapping[str, Any], multiple: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings of the representation and of the readouts.

    All widths of the representation are changed alike, which decides the size of the latent image and so of all that
    works on it; the width of what is read from it makes up for what is left.

    Args:
        model: makes the whole model, with `matched` beside the given settings.
        given: its settings.
        multiple: of which every width of the representation is to be one.
    """
    with torch.device("meta"):
        plain = model(**{**given, "symmetry": "none"})
    wished = sum(parameter.numel() for parameter in plain.parameters())
    build, representation, readout = (
        partial(model, **{**given, "matched": False}),
        given["representation"],
        given["readout"],
    )

    def resized(share: int) -> dict[str, Any]:
        layers = [_resized(layer, share / UNIT, multiple) for layer in representation["layers"]]
        return {**representation, "layers": layers}

    share = matched_width(lambda share: build(representation=resized(share)), wished)
    narrow = resized(share)
    width = matched_width(lambda width: build(representation=narrow, readout={**readout, "width": width}), wished)
    return narrow, {**readout, "width": width}


def _resized(layer: str, share: float, multiple: int) -> str:
    """A layer such as "conv 32" with another width, if it has any."""
    *kind, width = layer.split()
    return " ".join([*kind, str(multiple * max(1, round(int(width) * share / multiple)))]) if width.isdigit() else layer
