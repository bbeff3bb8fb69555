"""What `worldmodels evaluate` is asked to score: a policy, its game and the rules, once they are known to agree."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from worldmodels.config import plain
from worldmodels.evaluation.protocols import Rules
from worldmodels.types import Policy, UserError


@dataclass(frozen=True)
class Entry:
    """A policy that may play.

    Args:
        policy: on the device that was asked for.
        agent: name that its runs go under.
        run: the same for every evaluation of one trained policy, and for every seed of an untrained one.
        game: ALE's name.
        allowed: actions that it may take.
        rules: of play.
        frames: size and colour of what it sees, and settings of the game's own.
        planner: settings of the search that it was asked to act by in place of its own, or None.
        env: settings of the game's own that were asked to differ from its log's.
        identity: a digest of all that decides its episodes.
    """

    policy: Policy
    agent: str
    run: str
    game: str
    allowed: list[int]
    rules: Rules
    frames: dict[str, Any]
    planner: dict[str, Any] | None
    env: dict[str, Any]
    identity: str

    def line(self, episodes: int, seed: int) -> dict[str, Any]:
        """What every line of results.jsonl says of the evaluation."""
        told = {"evaluation": self.identity, "agent": self.agent, "run": self.run, "game": self.game}
        return told | {
            "protocol": self.rules.name,
            "protocol_hash": self.rules.hash,
            "episodes": episodes,
            "seed": seed,
            "planner": self.planner,
            "env": self.env,
        }


def enter(cfg: DictConfig, device: str = "cpu") -> Entry:
    """The entry that the settings of conf/evaluate.yaml describe, its policy on `device`.

    Raises:
        UserError: they name no policy or two, or what they name does not fit together.
    """
    from worldmodels.data.mixing import open_stores
    from worldmodels.data.transforms import Transform
    from worldmodels.evaluation.play import frames_of
    from worldmodels.evaluation.players import built_in
    from worldmodels.evaluation.protocols import check_actions, make_rules
    from worldmodels.evaluation.scores import game_facts

    if (cfg.checkpoint is None) == (cfg.policy is None):
        raise UserError("say who plays: either checkpoint=... or policy=random, sticky, scripted or, say, up")
    card = policy = None
    run, agent, frames = f"{cfg.policy} {cfg.seed}", cfg.policy, {"size": cfg.size, "colour": cfg.colour}
    if cfg.checkpoint is not None:
        from worldmodels.portable.folder import digest_of, folder_of

        policy, card = _trained(cfg, device)
        path = Path(cfg.checkpoint).resolve()
        run, agent = digest_of(path)[:12], (folder_of(path) or path.parent).name
    game = _game(cfg, card)
    facts = game_facts(game)
    if cfg.store is not None:
        stored = open_stores(plain(cfg.store), Transform()).card
        if card is not None:
            from worldmodels.data.mixing import check_fits

            check_fits(stored, card, f"the checkpoint {cfg.checkpoint}")
        elif stored["game"] != game:
            raise UserError(f"the store {cfg.store} is of {stored['game']}, and the game to be played is {game}")
        card = card or stored
    if card is not None:
        frames = frames_of(card, f"the checkpoint {cfg.checkpoint}" if policy else f"the store {cfg.store}")
    if cfg.env:
        frames["env"] = {**frames.get("env", {}), **plain(cfg.env)}
    rules = make_rules(plain(cfg.protocol), card, facts["actions"])
    allowed = rules.allowed(facts["actions"])
    if policy is None:
        policy = built_in(cfg.policy, game, allowed)
    check_actions([int(a) for a in getattr(policy, "actions", ())], allowed, rules)
    # how many episodes there are decides none of them, so that more are asked for by going on
    decides = [game, run, asdict(rules), frames, cfg.seed, min(cfg.slots, cfg.episodes)]
    decides += [plain(cfg.planner)] if cfg.planner else []
    identity = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]
    asked = plain(cfg.planner) or None, plain(cfg.env) or {}
    return Entry(policy, cfg.agent or agent, run, game, allowed, rules, frames, *asked, identity)


def _trained(cfg: DictConfig, device: str) -> tuple[Any, dict[str, Any]]:
    """The policy of a checkpoint and the card of its log; a MuZero acts by its search, or by the one asked for."""
    from worldmodels.portable.checkpoints import read_checkpoint

    given = read_checkpoint(cfg.checkpoint)["hyper_parameters"]
    if "search" in given:
        from worldmodels.learners.acting import muzero_policy

        return muzero_policy(cfg.checkpoint, plain(cfg.planner), _game(cfg, given["card"]), device)
    from worldmodels.learners.policy import load_policy

    if cfg.planner:
        raise UserError(f"{cfg.checkpoint} holds no MuZero, which alone can search; leave planner=... out")
    policy, card = load_policy(cfg.checkpoint)
    return policy.play(_game(cfg, card)).to(device), card


def _game(cfg: DictConfig, card: dict[str, Any] | None) -> str:
    chosen = None if OmegaConf.is_missing(cfg.game, "name") else cfg.game.name
    logged = card.get("games", [card["game"]]) if card else []
    if chosen is None:
        if len(logged) != 1:
            raise UserError("the game is missing; give it as game=..., e.g. game=pong (conf/game has them all)")
        return logged[0]
    if logged and chosen not in logged:
        raise UserError(f"the checkpoint {cfg.checkpoint} plays {' and '.join(logged)}, and not game={chosen}")
    return chosen
