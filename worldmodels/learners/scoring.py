"""A policy's score in the real game while it is still being trained."""

from typing import Any

import numpy as np
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback

from worldmodels.evaluation.play import frames_of, open_games, play
from worldmodels.evaluation.protocols import check_actions, make_rules
from worldmodels.evaluation.scores import game_facts, normalised


class RealGames(Callback):
    """Plays whole games at each validation and logs `val/return` and `val/hns`; no process outlives it.

    It comes after the average of the weights in the list of callbacks, and so plays with the average. Training is the
    same with and without it: it draws from generators of its own, and its scores choose no checkpoint.

    Args:
        protocol: rules of play, as conf/protocol has them.
        episodes: how many games.
        slots: how many of them side by side.
        seed: of the games, the same at each validation.
        every: validations from one evaluation to the next.
    """

    def __init__(
        self, protocol: dict[str, Any], episodes: int = 10, slots: int = 10, seed: int = 0, every: int = 1
    ) -> None:
        self.protocol, self.episodes, self.slots, self.seed, self.every = protocol, episodes, slots, seed, every
        self._validations = 0

    def state_dict(self) -> dict[str, Any]:
        """The number of validations so far."""
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._validations = state_dict["validations"]

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Play, on one rank.

        Raises:
            UserError: the policy or its log do not fit the rules, or the game's process fails.
        """
        if trainer.sanity_checking:
            return
        self._validations += 1
        if self._validations % self.every or not trainer.is_global_zero:
            return
        card, policy = pl_module.hparams["card"], pl_module.model
        game = card["game"]
        minimal = game_facts(game)["actions"]
        rules = make_rules(self.protocol, card, minimal)
        allowed = rules.allowed(minimal)
        check_actions(policy.actions, allowed, rules)
        with open_games(game, rules, min(self.slots, self.episodes), **frames_of(card, "the log")) as env:
            games = play(policy, env, rules, allowed, self.episodes, self.seed, device=str(pl_module.device))
            mean = float(np.mean([each.score for each in games]))
        pl_module.log("val/return", mean, rank_zero_only=True)
        if (score := normalised(game, mean)) is not None:
            pl_module.log("val/hns", score, rank_zero_only=True)
