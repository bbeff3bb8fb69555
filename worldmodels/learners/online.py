"""The online loop for games that exist: play with the newest network, train on it, and play again.

The reanalyse fraction f decides how much is new play (Schrittwieser et al. 2021): of the states that are trained on, f
are old ones that are searched again and 1 - f fresh ones, with what the search found that played them. A round of S
optimizer steps with B windows each so plays (1 - f) B S new steps.
"""

import math
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from worldmodels import hardware
from worldmodels.config import conf_dir
from worldmodels.data.card import card_digest
from worldmodels.data.disk import make_folder, read_json, remove, write_json
from worldmodels.data.mixing import check_fits, open_stores
from worldmodels.data.targets import check_mix
from worldmodels.data.transforms import Transform
from worldmodels.evaluation.protocols import check_actions, make_rules
from worldmodels.evaluation.scores import game_facts
from worldmodels.learners.acting import DRAWING
from worldmodels.learners.fit import fit
from worldmodels.learners.muzero import refuse_more, searching
from worldmodels.learners.playing import Play, play_card
from worldmodels.learners.run_folder import clear
from worldmodels.types import UserError

CHANGING = ("data.store", "data.version")
"""Settings of training that are others in each round."""


@dataclass(frozen=True)
class Plan:
    """How much is trained and played.

    Args:
        total: optimizer steps of all rounds.
        round_steps: of a round.
        windows: that an optimizer step trains on.
        fraction: the reanalyse fraction.
        logs: uuids of the stores of existing play that there are to begin with.
        slots: games side by side.
        temperatures: of the action that is played, by the optimizer step from which on it holds; None: the search's.
        seed: of play.
        game: digest of its card.
    """

    total: int
    round_steps: int
    windows: int
    fraction: float
    logs: list[str]
    slots: int
    temperatures: dict[str, float] | None
    seed: int
    game: str

    @property
    def rounds(self) -> int:
        """How many there are; the last may be shorter."""
        return -(-self.total // self.round_steps)

    def end(self, number: int) -> int:
        """Optimizer steps at the end of a round."""
        return min((number + 1) * self.round_steps, self.total)

    def play(self, number: int) -> int:
        """Steps of play that there are to be before a round trains; with a log its first round needs none."""
        trained = [self.end(k) - self.end(k - 1) for k in range(bool(self.logs), number + 1)]
        return sum(round((1 - self.fraction) * self.windows * steps) for steps in trained)


def online(settings: Mapping[str, Any], card: Mapping[str, Any] | None, out: str | Path) -> dict[str, Any]:
    """Play and train in turns until `trainer.max_steps`, in the folder `out`.

    The folder is that of a run as `fit` leaves it, with `play` (a store), `searched` and online.json beside, and with
    the `curve` of mean return by steps of play in metrics.json. What was cut short goes on where it was.

    Args:
        settings: plain data, as of `fit`, with `store`, stores of existing play or None, `round_steps` and `slots`.
        card: dataset card of play in the game, if there is no existing play, whose own is then taken.
        out: folder of the run.

    Returns:
        The figures of metrics.json.

    Raises:
        UserError: settings that do not go together, or as `fit`.
        KeyboardInterrupt: stopped, with all saved that is needed to go on.
    """
    out, settings = Path(out).absolute(), {**settings, "data": dict(settings["data"])}
    settings["learner"] = dict(settings["learner"])
    logs = [settings["store"]] if isinstance(settings["store"], str) else list(settings["store"] or ())
    play, plan = _ready(settings, logs, card, out)
    make_folder(out)
    if settings["resume"] == "never":
        clear(out)
        for path in (play.path, play.parts, out / "online.json"):
            remove(path)
    settings["resume"] = "auto"
    _agree(out, plan)
    metrics, given = out / "metrics.json", settings["data"]["version"]
    versions = list(given) if isinstance(given, list) else [given] * len(logs)
    trained = read_json(metrics)["steps"] if metrics.exists() else 0
    began, first = time.monotonic(), trained
    for number in range(plan.rounds):
        if trained >= plan.end(number):
            continue
        told = f"round {number + 1}/{plan.rounds}"
        data = {**settings["data"], "store": logs, "version": versions}
        if steps := plan.play(number):
            play.go_on(number, steps, told)
            data |= {"store": [*logs, str(play.path)], "version": [*versions, play.version()]}
            print(f"{told}: {_last(play)}", flush=True)
        with warnings.catch_warnings():
            # a resumed round is one with other stores than the last, as it has to be
            warnings.filterwarnings("ignore", "training resumes on other batches")
            trainer = {**settings["trainer"], "max_steps": plan.end(number)}
            figures = fit({**settings, "data": data, "trainer": trainer}, out, changing=CHANGING)
        trained = plan.end(number)
        _write(metrics, figures, plan, play)
        left = int((time.monotonic() - began) / (trained - first) * (plan.total - trained))
        print(f"{told} done, step {trained}/{plan.total}  ETA {left // 60}:{left % 60:02d}", flush=True)
    return _write(metrics, read_json(metrics), plan, play)  # killed before it was written, or nothing was to be done


def _ready(settings: dict[str, Any], logs: list[str], card: Mapping[str, Any] | None, out: Path) -> tuple[Play, Plan]:
    """The play and the plan, once all is known to go together; sets the actions of the learner."""
    data, learner, trainer = settings["data"], settings["learner"], settings["trainer"]
    if settings["resume"] not in ("auto", "never"):
        raise UserError(f"resume={settings['resume']} is unknown; choose auto or never")
    if learner.get("search") is None:
        raise UserError("play is by a search, which this learner has not; give learner=muzero or learner=rosmo")
    check_mix(data["fraction"], data["search_from"])
    if trainer["devices"] != 1 or trainer["num_nodes"] != 1:
        raise UserError("play and training are in one process; give trainer.devices=1 and trainer.num_nodes=1")
    if any(value is not None for value in (data.get("transform") or {}).values()):
        raise UserError("play is seen as the game shows it; leave data.transform out and give source.size=...")
    stores: Any = open_stores(logs, Transform()) if logs else None
    log = stores.card if logs else card
    if log is None:
        raise UserError("the game is missing; give it as game=..., e.g. game=catch, or existing play as store=...")
    if len(log.get("games", [])) > 1:
        raise UserError(f"one game is played and store={','.join(logs)} is of {' and '.join(log['games'])}; give one's")
    if not logs and data["version"] is not None:
        raise UserError(f"data.version={data['version']} is of targets of existing play; give that as store=...")
    minimal = game_facts(log["game"])["actions"]
    protocol: Any = OmegaConf.to_container(OmegaConf.load(conf_dir() / "protocol" / "store.yaml"))
    rules = make_rules(protocol, log, minimal)
    allowed = rules.allowed(minimal)
    learner["actions"] = sorted(set(learner["actions"] or allowed))
    check_actions(learner["actions"], allowed, rules)
    searching(learner["search"])  # what it refuses is told before anything is played
    refuse_more(learner["search"], len(learner["actions"]))
    own = play_card(log, rules, learner["actions"], settings["seed"], learner["search"])
    if logs:
        check_fits(stores.card, own, "new play of the game, which it is to be mixed with,", mend="leave store=... out")
    windows = data["batch_size"] * trainer["accumulate_grad_batches"]
    uuids = stores.uuid.split("+") if logs else []
    game = card_digest({k: v for k, v in own.items() if k not in ("versions", "policy")})
    plan = Plan(
        trainer["max_steps"], settings["round_steps"], windows, data["fraction"], uuids,
        settings["slots"], _temperatures(settings.get("temperatures"), learner["search"]), settings["seed"], game,
    )  # fmt: skip
    if not logs and not plan.play(0):
        raise UserError(
            f"with data.fraction={plan.fraction} nothing is played and there is no store=... of existing play to learn "
            "from; give one, or a smaller fraction"
        )
    device = hardware.accelerator(trainer["accelerator"])
    searched = -(-data["search_from"] // trainer["accumulate_grad_batches"])
    return Play(out, own, rules, learner["search"], settings["slots"], device, plan.temperatures, searched), plan


def _temperatures(given: Any, search: Mapping[str, Any]) -> dict[str, float] | None:
    """The temperatures by steps in order, the steps as JSON has them.

    Raises:
        UserError: they are no temperatures by steps from 0 on, or the search has none.
    """
    if given is None:
        return None
    if not search["_target_"].endswith(DRAWING):
        raise UserError(
            f"temperatures={given} are of no use to {search['_target_']}, which draws no action by a temperature; give "
            "temperatures=null, or planner@learner.search=puct learner.row_noise=false"
        )
    fine = isinstance(given, Mapping) and all(type(k) is int and k >= 0 for k in given) and 0 in given
    if not fine or not all(isinstance(v, int | float) and 0 <= v < math.inf for v in given.values()):
        raise UserError(
            f"temperatures={given} must have a number of at least 0 for each of some optimizer steps, the first "
            "of them 0, e.g. {0: 1.0, 500: 0.5}"
        )
    return {str(step): float(given[step]) for step in sorted(given)}


def _agree(out: Path, plan: Plan) -> None:
    """Refuse to go on with what was begun otherwise: how much is played when, and what, would be another."""
    path, asked = out / "online.json", {name: value for name, value in asdict(plan).items() if name != "total"}
    if not path.exists():
        if (out / "last.ckpt").exists():
            raise UserError(f"{out} holds a run of `worldmodels train`; give another out=DIR")
        write_json(path, asked)
    begun = read_json(path)
    for name, value in asked.items():
        if begun.get(name) != value:
            raise UserError(
                f"{out} was begun with {name}={begun.get(name)} and cannot go on with {value}; give another out=DIR, "
                "or resume=never to begin again"
            )


def _write(path: Path, figures: Mapping[str, Any], plan: Plan, play: Play) -> dict[str, Any]:
    figures = {**figures, "fraction": plan.fraction, "curve": play.curve()}
    write_json(path, figures)
    return figures


def _last(play: Play) -> str:
    """What the newest play was like."""
    point = play.curve()[-1]
    who = "random play" if point["behaviour"] == "random" else f"the network of step {point['step']}"
    return (
        f"{point['play_steps']} steps of play, the newest {point['episodes']} games by {who} with a mean return of "
        f"{point['mean_return']:.2f}"
    )
