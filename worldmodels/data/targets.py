"""What is known of a store's rows before any search: targets of a version written beside them, or the log's own.

Legend: N rows, E episodes, A actions of the model.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from worldmodels.data.store import Store
from worldmodels.types import UserError

COLUMNS = {"policy": "reanalysed_policy", "value": "reanalysed_value"}
STEP = "reanalysed_step"
"""Side column int64 of a version whose rows were searched at different optimizer steps, as its `about` has no one."""
FAMILY = "muzero"


class Logged(NamedTuple):
    """What is known of all rows of a data module's stores before any search, N rows.

    Args:
        policy: (N, A) float32, of the pinned versions, or (1, A) zeros where none is pinned.
        value: (N,) float32, of the pinned versions or the logged return.
        known: (N,) bool, false where neither is.
        step: (N,) int64, of the training that made the version, -1 where there is none.
    """

    policy: np.ndarray
    value: np.ndarray
    known: np.ndarray
    step: np.ndarray

    @classmethod
    def of(
        cls,
        stores: Sequence[Store],
        versions: Sequence[str | None],
        rows: Sequence[int] | np.ndarray,
        model: Any,
        clip: Callable[[Tensor], Tensor],
    ) -> "Logged":
        """Read the pinned versions, and sum up the rewards of each episode.

        Args:
            stores: in the order in which their rows are numbered.
            versions: one for each, or None.
            rows: how many count of each; a store may have grown since.
            model: that learns, with `actions` and `gamma`.
            clip: rewards as they are learned from.

        Raises:
            UserError: a version was made by a model of other actions.
        """
        total = int(np.sum(rows))
        pinned = any(version is not None for version in versions)
        policy = np.zeros((total if pinned else 1, len(model.actions)), np.float32)
        value, known, step = np.zeros(total, np.float32), np.zeros(total, bool), np.full(total, -1)
        end = 0
        for store, version, n in zip(stores, versions, rows, strict=True):
            mine, end = slice(end, end + n), end + n
            rewards = clip(torch.from_numpy(store.column("reward")[:n].astype(np.float32))).numpy()
            terminated, offsets = store.column("flags")[:n] & 1 != 0, store.offsets
            value[mine], known[mine] = returns_to_go(rewards, terminated, offsets[offsets <= n], model.gamma)
            if version is not None:
                about = store.side_about(COLUMNS["value"], version)
                if about["actions"] != model.actions:
                    raise UserError(
                        f"the targets {version} of {store.path} are over the actions {about['actions']} and the model "
                        f"takes {model.actions}; search again: worldmodels reanalyse checkpoint=... store={store.path}"
                    )
                searched = store.side(COLUMNS["value"], version)[:n]
                there = ~np.ma.getmaskarray(searched)
                value[mine][there], known[mine][there] = searched.data[there], True
                # play that was searched as it came in was so by networks of many steps
                step[mine][there] = about["step"] if "step" in about else store.side(STEP, version).data[:n][there]
                policy[mine][there] = store.side(COLUMNS["policy"], version).data[:n][there]
        return cls(policy, value, known, step)


def returns_to_go(
    reward: np.ndarray, terminated: np.ndarray, offsets: np.ndarray, gamma: float
) -> tuple[np.ndarray, np.ndarray]:
    """Discounted rewards from each row to the end of its episode, and whether the log has that end.

    Args:
        reward: (N,) float32.
        terminated: (N,) bool.
        offsets: (E+1,) first row of each episode, and last the number of rows.
        gamma: discount.

    Returns:
        (N,) float32 and (N,) bool.
    """
    total, known = np.zeros(len(reward), np.float64), np.zeros(len(reward), bool)
    first, last = offsets[:-1], offsets[1:] - 1
    ended = terminated[last]
    known[:] = np.repeat(ended, offsets[1:] - first)
    # all episodes at once, from their ends backwards
    running, row, alive = np.zeros(len(first)), last.copy(), last >= first
    while alive.any():
        running[alive] = reward[row[alive]] + gamma * running[alive]
        total[row[alive]] = running[alive]
        row -= 1
        alive &= row >= first
    return total.astype(np.float32), known


def pinned(store: Store, version: str | None) -> str | None:
    """The version itself, once it is known to be of this store.

    Raises:
        UserError: it is no name, is not there, or was made of another store or by another kind of model.
    """
    if version is None:
        return None
    if version != "newest":
        check_version(version)
    about = store.side_about(COLUMNS["value"], None if version == "newest" else version)
    if about.get("family") != FAMILY or about.get("store") != store.uuid:
        raise UserError(
            f"the targets {version} in {store.path} were made of the store {about.get('store')} by a model of the "
            f"family {about.get('family')}, and not of {store.uuid} by {FAMILY}; make some: worldmodels reanalyse "
            f"checkpoint=... store={store.path}"
        )
    return about["version"]


def check_version(version: str) -> None:
    """Refuse what cannot name a version of targets.

    Raises:
        UserError: it is no plain name, or one that means another.
    """
    if not re.fullmatch(r"\w[\w.-]*", version) or version == "newest" or ".tmp" in version:
        raise UserError(
            f"version={version} must be a name of letters, digits, '-', '_' and '.', and not newest nor with .tmp"
        )


def about_targets(store: Store, version: str, actions: Sequence[int], **facts: Any) -> Mapping[str, Any]:
    """What is kept beside the side columns of a version.

    Args:
        store: that they belong to.
        version: its name.
        actions: of the model, sorted.
        facts: `step` of the training, where it is one for all rows; `fresh`, first episode of what is fresh play and
            the one after its last; and what else is to be known.
    """
    return {"family": FAMILY, "store": store.uuid, "version": version, "actions": list(actions), **facts}


def check_mix(fraction: Any, search_from: Any) -> None:
    """Refuse a reanalyse fraction, or a first batch that is searched again, that is none.

    Raises:
        UserError: the one is no number from 0 to 1, or the other no whole number of at least 0.
    """
    if type(search_from) is not int or search_from < 0:
        raise UserError(f"data.search_from={search_from} must be a whole number of batches of at least 0")
    if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 <= fraction <= 1:
        raise UserError(f"data.fraction={fraction} must be from 0 (logged targets) to 1 (all searched again)")
