"""Searches with their settings bound, for the `_target_` of conf/planner."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from worldmodels.planning.gumbel import gumbel_search
from worldmodels.planning.one_step import one_step_search
from worldmodels.planning.prior import prior_search
from worldmodels.planning.puct import puct_search
from worldmodels.planning.sampled import sampled_search
from worldmodels.planning.tree import SearchResult
from worldmodels.types import UserError

Planner = Callable[..., SearchResult]
"""Called as planner(recurrent, root, generator=..., noise=..., invalid=..., ties=...)."""


def gumbel(**settings: Any) -> Planner:
    """`gumbel_search` with these settings."""
    return _bound(gumbel_search, settings)


def puct(**settings: Any) -> Planner:
    """`puct_search` with these settings."""
    return _bound(puct_search, settings)


def sampled(**settings: Any) -> Planner:
    """`sampled_search` with these settings."""
    return _bound(sampled_search, settings)


def one_step(**settings: Any) -> Planner:
    """`one_step_search` with these settings."""
    return _bound(one_step_search, settings)


def prior(**settings: Any) -> Planner:
    """`prior_search` with these settings."""
    return _bound(prior_search, settings)


def _bound(search: Planner, settings: dict[str, Any]) -> Planner:
    known = [name for name in inspect.signature(search).parameters if name not in ("recurrent", "root")]
    if unknown := settings.keys() - set(known):
        raise UserError(f"{search.__name__} has no setting '{min(unknown)}'; it has {', '.join(known)}")
    return functools.partial(search, **settings)
