"""Refreshes what logged play teaches MuZero: by searching batches again as they come, or a whole store at once.

Both ways search rows by `search_rows`, with noise that is a function of the row, so that they agree where they meet.
Source: Schrittwieser et al. 2021, "Online and Offline RL by Planning with a Learned Model" (MuZero Unplugged).

Legend: B windows, T transitions, R rows that are searched, A actions of the model.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from worldmodels.data.datamodule import StoreDataModule
from worldmodels.data.mixing import Mixture
from worldmodels.data.store import Store
from worldmodels.models.muzero import MuZero
from worldmodels.models.muzero_loss import KNOWN, POLICY, VALUE
from worldmodels.nn.equivariant import expand_once
from worldmodels.ops.draws import row_gumbel
from worldmodels.planning.planners import Planner
from worldmodels.planning.tree import Root, check
from worldmodels.types import Segment, UserError

COLUMNS = {"policy": "reanalysed_policy", "value": "reanalysed_value"}
SOURCE, AGE = "target_source", "target_age"
"""Side columns (B, T) int64: where a target is from, `LOGGED`, `STORED` or `FRESH`, and how many optimizer steps ago
the network that searched it was the newest; 0 for what was logged, and where that network had seen more steps."""
LOGGED, STORED, FRESH = range(3)
FAMILY = "muzero"


class Searched(NamedTuple):
    """Targets of rows.

    Args:
        policy: (R, A) float32.
        value: (R,) float32, of the root.
    """

    policy: Tensor
    value: Tensor


@torch.no_grad()
def search_rows(
    model: MuZero, segment: Segment, rows: Sequence[int], chosen: Tensor, search: Planner | None, noise: Tensor | None
) -> Searched:
    """Search again from logged frames.

    Args:
        model: the newest network, or a target network.
        segment: windows of play.
        rows: which rows of each window.
        chosen: (B, len(rows)) bool, those that are wanted.
        search: a search of `planning` with its settings; None: the logged action, which must be one of the model's
            in all wanted rows, and the network's own value.
        noise: (R, A) Gumbel noise of the wanted rows, in the order of `chosen`; None: none.

    Raises:
        UserError: the network gave a number that is not finite; told by the search.
    """
    with expand_once(model):
        return _searched(model, segment, rows, chosen.flatten(), search, noise)


def _searched(
    model: MuZero, segment: Segment, rows: Sequence[int], flat: Tensor, search: Planner | None, noise: Tensor | None
) -> Searched:
    frames, action, real = (x[flat] for x in model.contexts(segment, rows))
    state = model.fresh(model.represent(frames, action, real))
    root = Root(*model.roots(state), state)
    if search is None:
        check(root, 1, None)
        place = model.index[segment.action[:, list(rows)]].flatten()[flat]
        return Searched(F.one_hot(place, len(model.actions)).float(), root.value.float())
    found = search(model.recurrent, root, noise=noise)
    return Searched(found.action_weights.float(), found.value.float())


class ReanalyseDataModule(StoreDataModule):
    """Windows of play with targets by row: searched now, searched before, or logged.

    A share of each batch, `fraction`, is searched again by the learner's target network on the device, once the batch
    is there. The rest takes the targets of one version of the side columns that `worldmodels reanalyse` writes, where a
    row has them, and otherwise what was logged: the action, and the discounted return to the end of the episode, which
    is unknown where the episode was cut. `side["target_source"]` and `side["target_age"]` tell what each is.

    Args:
        store: as in `StoreDataModule`.
        fraction: the reanalyse fraction, 0 to 1.
        version: of the side columns; "newest" for the one that is newest now, or null for none. Of several stores a
            list, one for each.
        settings: as of `StoreDataModule`.

    Raises:
        UserError: a fraction outside 0..1, a version that is not there, or one of another store or model.
    """

    def __init__(
        self,
        store: str | Sequence[str],
        fraction: float = 1.0,
        version: str | int | Sequence[str | int | None] | None = None,
        **settings: Any,
    ) -> None:
        if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 <= fraction <= 1:
            raise UserError(f"data.fraction={fraction} must be from 0 (logged targets) to 1 (all searched again)")
        super().__init__(store, **settings)
        self.keep_starts = True
        self.fraction = fraction
        stores = self.store.stores if isinstance(self.store, Mixture) else [self.store]
        versions = [version] * len(stores) if version is None or isinstance(version, str | int) else list(version)
        if len(versions) != len(stores):
            raise UserError(f"data.version={versions} must name one version, or one for each of {len(stores)} stores")
        names = [None if v is None else str(v) for v in versions]
        self._stores, self.version = stores, [_pinned(s, v) for s, v in zip(stores, names, strict=True)]
        self._logged: Logged | None = None

    def versions(self) -> list[dict[str, Any]]:
        """What made each of the pinned versions."""
        pinned = zip(self._stores, self.version, strict=True)
        return [store.side_about(COLUMNS["value"], version) for store, version in pinned if version is not None]

    def on_after_batch_transfer(self, batch: Segment, dataloader_idx: int) -> Segment:
        """Give a training batch its targets; windows of validation teach what was logged."""
        if self.trainer is None or not self.trainer.training:
            return batch
        return self.targeted(batch, self.trainer.lightning_module)

    def targeted(self, batch: Segment, learner: Any) -> Segment:
        """A batch with targets by row in its `side`.

        Args:
            batch: windows, with `side["starts"]`.
            learner: a `MuZeroLearner`, or what has its `target`, `target_step`, `search`, `clip` and `noise_key`.
        """
        model, device = learner.target.module, batch.obs.device
        starts, offsets = batch.side["starts"].cpu().numpy(), self.store.offsets
        firsts, ends = self._bounds()
        if self._logged is None or offsets[starts[:, 0] + 1].max() > len(self._logged.value):  # the store may grow
            self._logged = Logged.of(self._stores, self.version, ends - firsts, model, learner.clip)
        number = offsets[starts[:, 0]] + starts[:, 1]
        number = number[:, None] + np.arange(batch.length)  # of each row among all; padding has some other's
        policy, value, known, step = (torch.from_numpy(x[number.clip(0, len(x) - 1)]).to(device) for x in self._logged)
        place = model.index[batch.action]
        logged = F.one_hot(place.clamp(min=0), len(model.actions)).float()
        stored = step >= 0
        policy = torch.where(stored[..., None], policy, logged)
        known = known & batch.mask & (stored | (place >= 0))
        source = torch.where(stored, STORED, LOGGED)
        age = torch.where(stored, learner.global_step - step, 0).clamp(min=0)
        windows = self._fresh(batch.batch_size, learner)
        rows = sorted(set().union(*model.rows()) & set(range(batch.length)))
        chosen = torch.zeros(batch.batch_size, len(rows), dtype=torch.bool, device=device)
        chosen[windows] = batch.mask[windows][:, rows]
        if learner.search is None:
            chosen &= place[:, rows] >= 0
        if chosen.any():
            where = chosen.nonzero()
            at = where[:, 0], torch.tensor(rows, device=device)[where[:, 1]]
            noise = None
            if learner.noise_key is not None:
                mine = number[at[0].cpu(), at[1].cpu()]
                mine = mine - firsts[np.searchsorted(ends, mine, side="right")]  # its number in its own store
                noise = row_gumbel(mine, len(model.actions), *learner.noise_key).to(device)
            found = search_rows(model, batch, rows, chosen, learner.search, noise)
            policy[at], value[at] = found.policy, found.value
            known[at], source[at], age[at] = True, FRESH, learner.global_step - learner.target_step
        targets = {POLICY: policy, VALUE: value, KNOWN: known, SOURCE: source, AGE: age}
        return replace(batch, side=batch.side | targets)

    def _bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """First row of each store among all rows, and the one after its last, as the windows' numbers count them."""
        if isinstance(self.store, Mixture):
            return self.store.offsets[self.store.firsts], self.store.offsets[self.store.ends]
        return np.zeros(1, np.int64), self.store.offsets[-1:]

    def _fresh(self, count: int, learner: Any) -> Tensor:
        """Which windows of the batch at hand are searched: a function of (seed, rank, batch number)."""
        key = (self.seed % 2**63, learner.global_rank, learner.batch_number())
        order = np.random.Generator(np.random.Philox(np.random.SeedSequence(key))).permutation(count)
        return torch.from_numpy(np.sort(order[: round(self.fraction * count)]))

    def _origin(self) -> dict[str, Any]:
        return super()._origin() | {"fraction": self.fraction, "version": self.version}


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
        model: MuZero,
        clip: Callable[[Tensor], Tensor],
    ) -> "Logged":
        """Read the pinned versions, and sum up the rewards of each episode.

        Args:
            stores: in the order in which their rows are numbered.
            versions: one for each, or None.
            rows: how many count of each; a store may have grown since.
            model: that learns.
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
                value[mine][there], known[mine][there], step[mine][there] = searched.data[there], True, about["step"]
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


def _pinned(store: Store, version: str | None) -> str | None:
    """The version itself, once it is known to be of this store.

    Raises:
        UserError: it is not there, or was made of another store or by another kind of model.
    """
    if version is None:
        return None
    about = store.side_about(COLUMNS["value"], None if version == "newest" else version)
    if about.get("family") != FAMILY or about.get("store") != store.uuid:
        raise UserError(
            f"the targets {version} in {store.path} were made of the store {about.get('store')} by a model of the "
            f"family {about.get('family')}, and not of {store.uuid} by {FAMILY}; make some: worldmodels reanalyse "
            f"checkpoint=... store={store.path}"
        )
    return about["version"]


def about_targets(store: Store, version: str, model: MuZero, **facts: Any) -> Mapping[str, Any]:
    """What is kept beside the side columns of a version."""
    return {"family": FAMILY, "store": store.uuid, "version": version, "actions": model.actions, **facts}
