"""Refreshes what logged play teaches MuZero: by searching batches again as they come, or a whole store at once.

Both ways search rows by `search_rows`, with noise that is a function of the row, so that they agree where they meet.
Source: Schrittwieser et al. 2021, "Online and Offline RL by Planning with a Learned Model" (MuZero Unplugged).

Legend: B windows, T transitions, R rows that are searched, A actions of the model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from worldmodels.data.datamodule import StoreDataModule
from worldmodels.data.loading import Draw
from worldmodels.data.mixing import Mixture
from worldmodels.data.sampling import WindowSampler, share_before
from worldmodels.data.targets import COLUMNS, Logged, check_mix, pinned
from worldmodels.models.muzero import MuZero
from worldmodels.models.muzero_context import contexts
from worldmodels.models.muzero_loss import POLICY, POLICY_KNOWN, VALUE, VALUE_KNOWN
from worldmodels.nn.equivariant import expand_once
from worldmodels.ops.draws import row_gumbel
from worldmodels.planning.planners import Planner
from worldmodels.planning.tree import Root, check
from worldmodels.types import Segment, UserError

SOURCE, AGE = "target_source", "target_age"
"""Side columns (B, T) int64: where a target is from, `LOGGED`, `STORED` or `FRESH`, and how many optimizer steps ago
the network that searched it was the newest; 0 for what was logged, and where that network had seen more steps. Of
targets that another training wrote it is the difference of the two counts of steps, and no age."""
LOGGED, STORED, FRESH = range(3)


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
    model: MuZero,
    segment: Segment,
    rows: Sequence[int],
    chosen: Tensor,
    search: Planner | None,
    noise: Tensor | None,
    where: str = "in a batch",
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
        where: the windows are, for the error.

    Raises:
        UserError: the network or the search gave a number that is not finite.
    """
    with expand_once(model):
        try:
            return _searched(model, segment, rows, chosen.flatten(), search, noise)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error


def _searched(
    model: MuZero, segment: Segment, rows: Sequence[int], flat: Tensor, search: Planner | None, noise: Tensor | None
) -> Searched:
    state = model.root(*(x[flat] for x in contexts(model, segment, rows)))
    root = Root(*model.roots(state), state)
    if search is None:
        check(root, 1, None)
        place = model.places(segment)[:, list(rows)].flatten()[flat]
        return Searched(F.one_hot(place, len(model.actions)).float(), root.value.float())
    found = search(model.recurrent, root, noise=noise)
    searched = Searched(found.action_weights.float(), found.value.float())
    for name, target in searched._asdict().items():
        if not target.isfinite().all():
            raise UserError(
                f"the {name} that the search gives is no finite number, while all that it was given is: "
                "rewards and values are too large for the type of their numbers; look at what the heads predict"
            )
    return searched


class ReanalyseDataModule(StoreDataModule):
    """Windows of play with targets by row: searched now, searched before, or logged.

    A share of all windows, `fraction`, is searched again by the learner's target network on the device, once the batch
    is there. The rest takes the targets of one version of the side columns that `worldmodels reanalyse` writes, where a
    row has them, and otherwise what was logged: the action, and the discounted return to the end of the episode, which
    alone is unknown where the episode was cut. `side["target_source"]` and `side["target_age"]` tell what each is.

    Where a pinned version says that some episodes are `fresh`, as play that has gone on beside the training does, the
    windows that are not searched again are from these, and only the others from all.

    Args:
        store: as in `StoreDataModule`.
        fraction: the reanalyse fraction, 0 to 1.
        version: of the side columns; "newest" for the one that is newest when training begins, or null for none. Of
            several stores a list, one for each; what is replayed has none.
        search_from: batch from which on windows are searched again. Before it all have stored or logged targets, so
            that the first searches are by a network that knows something.
        settings: as of `StoreDataModule`.

    Raises:
        UserError: a fraction outside 0..1, a `search_from` below 0, a version that is not there, or one of another
            store or model.
    """

    def __init__(
        self,
        store: str | Sequence[str],
        fraction: float = 1.0,
        version: str | float | Sequence[str | float | None] | None = None,
        search_from: int = 0,
        **settings: Any,
    ) -> None:
        check_mix(fraction, search_from)
        super().__init__(store, **settings)
        self.keep_starts = True
        self.fraction, self.search_from = fraction, search_from
        stores, learned = (s.stores if isinstance(s, Mixture) else [s] for s in (self.store, self.learned))
        one = version is None or isinstance(version, str | int | float)  # 2.0 is a name like any other
        versions = [version] * len(stores) if one else list(version)
        if len(versions) != len(stores):
            raise UserError(f"data.version={versions} must name one version, or one for each of {len(stores)} stores")
        self._asked = [None if v is None else str(v) for v in versions] + [None] * (len(learned) - len(stores))
        self._stores, self.version = learned, [pinned(s, v) for s, v in zip(learned, self._asked, strict=True)]
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
        starts, offsets = batch.side["starts"].cpu().numpy(), self.learned.offsets
        firsts, ends = self._bounds()
        if self._logged is None or offsets[starts[:, 0] + 1].max() > len(self._logged.value):  # the store may grow
            self._logged = Logged.of(self._stores, self.version, ends - firsts, model, learner.clip)
        number = offsets[starts[:, 0]] + starts[:, 1]
        number = number[:, None] + np.arange(batch.length)  # of each row among all; padding has some other's
        policy, value, known, step = (torch.from_numpy(x[number.clip(0, len(x) - 1)]).to(device) for x in self._logged)
        place = model.places(batch)
        logged = F.one_hot(place.clamp(min=0), len(model.actions)).float()
        stored = step >= 0
        policy = torch.where(stored[..., None], policy, logged)
        if self.lengths is not None:  # what an episode returned behind the rows that are used counts as not logged
            cut = self.lengths[starts[:, 0]] < self.learned.lengths[starts[:, 0]]
            known &= stored | ~torch.from_numpy(cut).to(device)[:, None]
        acted = batch.mask & (stored | (place >= 0))
        known = known & acted
        source = torch.where(stored, STORED, LOGGED)
        age = torch.where(stored, learner.global_step - step, 0).clamp(min=0)
        k = learner.batch_number()
        searched = self._order(batch.batch_size, learner.global_rank, k)[: self._searched(batch.batch_size, k)]
        windows = torch.from_numpy(np.sort(searched))
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
                mine = number[at[0].cpu().numpy(), at[1].cpu().numpy()]  # a tensor of one row counts as a number
                mine = mine - firsts[np.searchsorted(ends, mine, side="right")]  # its number in its own store
                noise = row_gumbel(mine, len(model.actions), *learner.noise_key).to(device)
            told = f"in batch {k} (optimizer step {learner.global_step}, rank {learner.global_rank})"
            found = search_rows(model, batch, rows, chosen, learner.search, noise, told)
            policy[at], value[at] = found.policy, found.value
            acted[at] = known[at] = True
            source[at], age[at] = FRESH, learner.global_step - learner.target_step
        targets = {POLICY: policy, POLICY_KNOWN: acted, VALUE: value, VALUE_KNOWN: known, SOURCE: source, AGE: age}
        return replace(batch, side=batch.side | targets)

    def _bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """First row of each store among all rows, and the one after its last, as the windows' numbers count them."""
        if isinstance(store := self.learned, Mixture):
            return store.offsets[store.firsts], store.offsets[store.ends]
        return np.zeros(1, np.int64), store.offsets[-1:]

    def _searched(self, size: int, k: int) -> int:
        """How many windows of batch `k` are searched again."""
        if k < self.search_from:
            return 0
        return share_before(self.fraction, size, k + 1) - share_before(self.fraction, size, k)

    def _order(self, size: int, rank: int, k: int) -> np.ndarray:
        """In which order the windows of batch `k` are chosen to be searched again."""
        sequence = np.random.SeedSequence((self.seed % 2**63, rank, k))
        return np.random.Generator(np.random.Philox(sequence)).permutation(size)

    def _draws(self, sampler: WindowSampler) -> Iterator[Draw]:
        """As of all data modules, but for the windows that are not searched again where there is fresh play."""
        most = self.batch_size - self._searched(self.batch_size, 0)
        fresh = np.intersect1d(self._fresh_episodes(), sampler.episodes)
        if not most or not len(fresh):
            yield from super()._draws(sampler)
            return
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        place = {"left_padding": self.left_padding, "right_padding": self.right_padding, "rank": rank, "world": world}
        # of another seed, or both would draw alike
        of_play = WindowSampler(
            self.store, fresh, most, self.length, seed=self.seed + 2**32, lengths=self.lengths, **place
        )
        for k, draw in zip(count(self.batches_drawn()), super()._draws(sampler)):
            here = self._order(self.batch_size, rank, k)[self._searched(self.batch_size, k) :]
            here = here[here < len(draw.starts)]  # what is replayed comes behind them
            draw.starts[here] = of_play(k)[: len(here)]
            if draw.importance is not None:
                draw.importance[here] = 1.0
            yield draw

    def _fresh_episodes(self) -> np.ndarray:
        firsts = self.learned.firsts if isinstance(self.learned, Mixture) else [0]
        ranges = [np.zeros(0, np.int64)]
        for first, store, version in zip(firsts, self._stores, self.version, strict=True):
            if version is not None and (fresh := store.side_about(COLUMNS["value"], version).get("fresh")):
                ranges.append(first + np.arange(*fresh))
        return np.concatenate(ranges)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the batch after the last one used, by the targets that were the newest when training began."""
        begun = zip(self._stores, self._asked, state_dict.get("version", ()), strict=False)
        for place, (store, asked, version) in enumerate(begun):
            if asked == "newest":
                self.version[place] = pinned(store, version)
        super().load_state_dict(state_dict)

    def _origin(self) -> dict[str, Any]:
        later = {"search_from": self.search_from} if self.search_from else {}
        return super()._origin() | {"fraction": self.fraction, "version": self.version} | later
