"""Play of the online loop: whole games in a store of its own, and beside them what the search found that played them.

    OUT/play/                     the store
    OUT/searched/<episode>.npz    policy, value and step of all rows of a wave of games, that begins with this episode

Games are played in waves of one game a slot, and every game of a wave is kept, so that no short game is there in a long
one's place. A wave is a function of (seed, its first episode) and of the network: one that was cut short is played
again, and what the store has of it is not added twice.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from worldmodels.data.card import Card, make_card
from worldmodels.data.disk import atomic, disk_errors, make_folder, remove
from worldmodels.data.store import Store
from worldmodels.data.targets import COLUMNS, STEP, about_targets
from worldmodels.evaluation.play import OWN_GAMES, frames_of, open_games
from worldmodels.evaluation.protocols import Rules
from worldmodels.evaluation.recording import Recorded, Remembering, record
from worldmodels.imagination import RandomPolicy
from worldmodels.learners.acting import as_policy
from worldmodels.learners.muzero import load_muzero

LEAST = 3
"""Episodes that a store has at least, for its splits."""


def play_card(card: Mapping[str, Any], rules: Rules, actions: Sequence[int], seed: int, search: Any) -> Card:
    """The dataset card of play in the game of `card`, by these rules, with rewards as the game gives them."""
    own = card["game"] in OWN_GAMES
    versions = {}
    if not own:
        import ale_py

        versions["ale_py"] = ale_py.__version__
    return make_card(
        "online",
        card["game"],
        card["obs"],
        action_set=list(actions),
        frame_skip=rules.frame_skip,
        sticky_prob=rules.sticky_prob,
        noop_max=rules.noop_max,
        time_limit=rules.time_limit,
        policy={"type": "search", "search": search},
        seed=seed,
        licence="MIT" if own else "made with ale-py (GPL-2.0) and the ROMs that it carries",
        dataset={"env": card["dataset"]["env"]} if own and card["dataset"].get("env") else {},
        versions=versions,
    )


class Play:
    """Games that are played in rounds.

    Args:
        out: folder of the run, whose last.ckpt plays, or chance while there is none or it is young.
        card: of what is played (`play_card`).
        rules: of play.
        search: settings of the search, as conf/planner has them.
        slots: games side by side.
        device: where the network is.
        temperatures: of the action that is played, by the optimizer step from which on it holds, in order; None leaves
            it to the search.
        search_from: optimizer step from which on there is a search; before it chance plays, since a search by values
            that know nothing would play one thing and show little of the game.
    """

    def __init__(
        self,
        out: Path,
        card: Card,
        rules: Rules,
        search: Mapping[str, Any],
        slots: int,
        device: str,
        temperatures: Mapping[str, float] | None = None,
        search_from: int = 0,
    ) -> None:
        self.path, self.parts, self.checkpoint = out / "play", out / "searched", out / "last.ckpt"
        self.card, self.rules, self.search, self.slots, self.device = card, rules, dict(search), slots, device
        self.temperatures, self.search_from = temperatures or {}, search_from

    def go_on(self, number: int, steps: int, told: str) -> None:
        """Play round `number` until the store holds `steps` steps, or what is left of it.

        Raises:
            UserError: the games' process fails, the network gives no finite numbers, or the disk refuses.
        """
        with Store.create(self.path, self.card) as store:
            if not self._lacks(store, steps):
                return
            policy, search, about = self._player(number)
            seen, began, before = time.monotonic(), time.monotonic(), int(store.lengths.sum())

            def progress(now: int) -> None:
                nonlocal seen
                if time.monotonic() - seen > 10:
                    seen, done = time.monotonic(), int(store.lengths.sum()) + now
                    left = int((seen - began) / max(done - before, 1) * max(steps - done, 0))
                    print(f"{told} plays: {done}/{steps} steps  ETA {left // 60}:{left % 60:02d}", flush=True)

            frames = frames_of(self.card, "the online loop")
            with open_games(self.card["game"], self.rules, self.slots, **frames) as env:
                while self._lacks(store, steps):
                    have = len(store.lengths)
                    first = have - have % self.slots
                    numbers = range(first, first + self.slots)
                    games = record(
                        policy, env, self.card["game"], numbers, self.card["seed"], self.device, about, search, progress
                    )
                    if search is not None:
                        self._keep(first, games, about["step"])
                    for game in games[have - first :]:
                        store.append(game.episode)

    def _lacks(self, store: Store, steps: int) -> bool:
        count = len(store.lengths)
        return count % self.slots > 0 or count < LEAST or store.lengths.sum() < steps

    def _player(self, number: int) -> tuple[Any, Remembering | None, dict[str, Any]]:
        """Who plays, the search that he plays by, and what is noted of both."""
        chance = RandomPolicy(self.card["action_set"]), None, {"round": number, "behaviour": "random"}
        if not self.checkpoint.exists():
            return chance
        model, given = load_muzero(self.checkpoint)
        if given["global_step"] < self.search_from:
            return chance
        by, now = dict(self.search), given["global_step"]
        for step, temperature in self.temperatures.items():
            by |= {"temperature": temperature} if int(step) <= now else {}
        policy = as_policy(model.to(self.device), by, noise=True)
        search = Remembering(policy.search)
        about = {"round": number, "behaviour": "search", "search": by, "step": now}
        return replace(policy, search=search), search, about

    def _keep(self, first: int, games: list[Recorded], step: int) -> None:
        make_folder(self.parts)
        _, policy, value = (list(column) for column in zip(*games, strict=True))
        policy, value = np.concatenate(policy), np.concatenate(value)
        part = self.parts / f"{first:09d}.npz"
        with disk_errors(self.parts), atomic(part) as tmp, tmp.open("wb") as file:
            np.savez(file, policy=policy, value=value, step=np.full(len(value), step))

    def version(self) -> str:
        """The side columns that hold what acting found, written where they are not there yet; older ones go.

        Raises:
            UserError: the disk refuses.
        """
        store, actions = Store.open(self.path), self.card["action_set"]
        count = len(store.lengths)
        version = f"play-{count}"
        rows, columns = [np.zeros(0, np.int64)], {"policy": [np.zeros((0, len(actions)), np.float32)]}
        columns |= {"step": [np.zeros(0, np.int64)], "value": [np.zeros(0, np.float32)]}
        for path in sorted(self.parts.glob("*.npz")):
            with np.load(path, allow_pickle=False) as part:
                for name, parts in columns.items():
                    parts.append(part[name])
                rows.append(store.offsets[int(path.stem)] + np.arange(len(part["value"])))
        newest = store.episode_info(count - 1)["info"]["round"]
        fresh = next(k for k in range(count) if store.episode_info(k)["info"]["round"] == newest)
        about = about_targets(store, version, actions, fresh=[fresh, count])
        # the value last, which others are asked for by
        for name, column in {"policy": COLUMNS["policy"], "step": STEP, "value": COLUMNS["value"]}.items():
            if not (self.path / "side" / column / version).exists():
                store.write_side(column, version, np.concatenate(rows), np.concatenate(columns[name]), about)
            for old in (self.path / "side" / column).glob("play-*"):
                if old.name != version:
                    remove(old)
        return version

    def curve(self) -> list[dict[str, Any]]:
        """Of each round that played: who did, steps of play up to and with it, games, and their mean return."""
        if not any(self.path.glob("sources/*.json")):
            return []
        store, steps, points = Store.open(self.path), 0, []
        infos = [store.episode_info(k) for k in range(len(store.lengths))]
        for number, games in groupby(infos, key=lambda info: info["info"]["round"]):
            played = list(games)
            steps += sum(info["length"] for info in played)
            point = {"round": number, **{k: played[0]["info"].get(k) for k in ("behaviour", "step")}}
            point |= {"play_steps": steps, "episodes": len(played)}
            points.append(point | {"mean_return": float(np.mean([info["return"] for info in played]))})
        return points
