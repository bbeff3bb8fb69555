"""A policy's score in the real game while it is still being trained."""

from typing import Any

import numpy as np
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback

from worldmodels.evaluation.play import frames_of, open_games, play
from worldmodels.evaluation.protocols import Rules, check_actions, make_rules
from worldmodels.evaluation.scores import game_facts, normalised
from worldmodels.types import Policy, UserError


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

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Refuse what cannot be played before the first step of training, and not after many.

        Raises:
            UserError: no policy is trained, or it or its log do not fit the rules.
        """
        self._agree(pl_module)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Play, on one rank.

        Raises:
            UserError: as at the start, or the game's process fails.
        """
        if trainer.sanity_checking:
            return
        self._validations += 1
        if self._validations % self.every or not trainer.is_global_zero:
            return
        game, rules, allowed, frames = self._agree(pl_module)
        with open_games(game, rules, min(self.slots, self.episodes), **frames) as env:
            games = play(
                pl_module.player(), env, rules, allowed, self.episodes, self.seed, device=str(pl_module.device)
            )
            mean = float(np.mean([each.score for each in games]))
        pl_module.log("val/return", mean, rank_zero_only=True)
        if (score := normalised(game, mean)) is not None:
            pl_module.log("val/hns", score, rank_zero_only=True)

    def _agree(self, pl_module: Any) -> tuple[str, Rules, list[int], dict[str, Any]]:
        """The game, the rules, the actions that they allow and what frames are like, once they fit the policy."""
        card = pl_module.hparams["card"]
        if len(card.get("games", [])) > 1:
            raise UserError(
                f"callbacks=scored plays one game and the log is of {' and '.join(card['games'])}; leave it out, and "
                "play each by `worldmodels evaluate checkpoint=... game=...`"
            )
        policy = pl_module.player()
        if not isinstance(policy, Policy):
            raise UserError("callbacks=scored plays policies and here a world model is trained; leave it out")
        game = card["game"]
        minimal = game_facts(game)["actions"]
        rules = make_rules(self.protocol, card, minimal)
        allowed = rules.allowed(minimal)
        check_actions(policy.actions, allowed, rules)  # pyrefly: ignore
        return game, rules, allowed, frames_of(card, "the log")
