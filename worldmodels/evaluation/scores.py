"""Scores of real games: one JSON line an episode, human-normalised, and put together over games and runs.

A run is one trained policy (or one seed of an untrained one). A line tells all that decides whether it may be put
together with another: the game, the agent, the run, the planner and the settings of the game's own that were asked for,
and the hash of the rules of play.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from worldmodels.config import conf_dir
from worldmodels.data.disk import damaged, disk_errors
from worldmodels.evaluation.stats import aggregate, probability_of_improvement
from worldmodels.types import UserError

Line = dict[str, Any]
LINE = {"evaluation", "agent", "game", "run", "protocol", "protocol_hash", "episodes", "episode", "return"}
"""What a line cannot do without."""


def game_facts(game: str) -> dict[str, Any]:
    """What conf/game/*.yaml says of a game: its minimal actions, the scores of random play and of a human, ...

    Raises:
        UserError: there is no such game.
    """
    file = conf_dir() / "game" / f"{game}.yaml"
    if not file.is_file():
        raise UserError(f"the game '{game}' is unknown and cannot be played; conf/game has those that can")
    facts: Any = OmegaConf.to_container(OmegaConf.load(file))
    return facts


def normalised(game: str, score: float) -> float | None:
    """(score - random) / (human - random); None where the table has no scores for the game."""
    anchors = game_facts(game)["score"]
    if anchors["human"] is None or anchors["random"] is None:
        return None
    return (score - anchors["random"]) / (anchors["human"] - anchors["random"])


def published() -> dict[str, Any]:
    """Scores of published agents with their sources: aggregates in `agents`, single runs in `per_seed`."""
    return json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """Add one line to a file of JSON lines, whole or not at all as a reader sees it, and durably.

    Raises:
        UserError: the disk refuses.
    """
    with disk_errors(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            # a line that a crash cut short is closed, and not lengthened into a wrong one
            torn = size and os.pread(descriptor, 1, size - 1) != b"\n"
            os.write(descriptor, (b"\n" if torn else b"") + json.dumps(line).encode() + b"\n")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_lines(path: Path) -> list[Line]:
    """The lines of a file of JSON lines; one that a crash cut short is left out. Empty where there is no file.

    Raises:
        UserError: a line is something else than an episode's.
    """
    try:
        whole = path.read_text(encoding="utf-8") if path.is_file() else ""
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no file of results; give the folder of a `worldmodels evaluate`") from error
    lines = []
    for text in whole.splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if not isinstance(line, dict) or not line.keys() >= LINE:
            raise damaged(path, "a line is no episode of `worldmodels evaluate`")
        lines.append(line)
    return lines


def check_agent(path: Path, lines: Iterable[Line], agent: str) -> None:
    """Refuse to put episodes of one evaluation under two names.

    Raises:
        UserError: some of `lines`, read from `path`, are under another name than `agent`.
    """
    if others := {line["agent"] for line in lines} - {agent}:
        raise UserError(
            f"{path} has episodes of this very evaluation under agent={min(others)}, so that agent={agent} would count "
            f"them twice; give agent={min(others)}, or another out=DIR"
        )


def check_hashes(lines: Iterable[Line]) -> str:
    """The hash of the rules that all lines were played by.

    Raises:
        UserError: there are several.
    """
    found = {line["protocol_hash"]: line["protocol"] for line in lines}
    if len(found) > 1:
        several = " and ".join(f"{name} ({digest})" for digest, name in found.items())
        raise UserError(
            f"scores by different rules cannot be put together: there are {several}; evaluate all under one protocol"
        )
    return next(iter(found))


def entrant(line: Line) -> str:
    """The agent and, as on the command line, what planner=... and env=... made of its play, if they were given.

    What the planner's own file of settings has is left out; lines of earlier versions tell neither.
    """
    planner, env = dict(line.get("planner") or {}), line.get("env") or {}
    given = [f"env.{name}={value}" for name, value in sorted(env.items())]
    if planner:
        chosen = planner.pop("_target_", "").rpartition(".")[2]
        file = conf_dir() / "planner" / f"{chosen}.yaml"
        usual = OmegaConf.load(file) if file.is_file() else {}
        changed = sorted((name, value) for name, value in planner.items() if usual.get(name) != value)
        given = [f"planner={chosen}", *(f"planner.{name}={value}" for name, value in changed), *given]
    return f"{line['agent']} ({', '.join(given)})" if given else line["agent"]


def tables(lines: Sequence[Line]) -> dict[str, dict[str, list[float]]]:
    """Entrant, then game, to the mean return of each run.

    Raises:
        UserError: there are no lines, lines by different rules, or an evaluation that is not finished.
    """
    if not lines:
        raise UserError("there are no episodes in these results; make some with `worldmodels evaluate ... out=DIR`")
    check_hashes(lines)
    returns: dict[tuple[str, str, str], list[float]] = {}
    by_evaluation: dict[str, dict[int, Line]] = {}
    for line in lines:
        by_evaluation.setdefault(line["evaluation"], {})[line["episode"]] = line
    # with other slots the same seed begins the same games: of several such evaluations the longest counts
    by_seed: dict[tuple[Any, ...], dict[int, Line]] = {}
    for episodes in sorted(by_evaluation.values(), key=len):
        last = list(episodes.values())[-1]  # the first may be of a version that told less
        seed = last.get("seed", last["evaluation"])
        by_seed[entrant(last), last["game"], last["run"], seed] = episodes
    for (agent, game, run, _), episodes in by_seed.items():
        asked = max(line["episodes"] for line in episodes.values())
        if len(episodes) < asked:
            raise UserError(
                f"an evaluation of {agent} in {game} has {len(episodes)} of {asked} "
                "episodes; go on with it by the same `worldmodels evaluate` command, for the short ones came first"
            )
        returns.setdefault((agent, game, run), []).extend(line["return"] for line in episodes.values())
    agents: dict[str, dict[str, list[float]]] = {}
    for (agent, game, _), values in sorted(returns.items()):
        agents.setdefault(agent, {}).setdefault(game, []).append(float(np.mean(values)))
    return agents


def summary(lines: Sequence[Line]) -> dict[str, Any]:
    """Aggregates of every entrant over its games and runs, and how probably each pair's one beats the other.

    Raises:
        UserError: as `tables`; a game has no human score, or games of an agent differ in their number of runs.
    """
    found = {agent: _scores(agent, games) for agent, games in tables(lines).items()}
    agents = {
        agent: {
            "games": len(scores),
            "runs": len(next(iter(scores.values()))),
            **aggregate(np.array([*scores.values()])),
        }
        for agent, scores in found.items()
    }
    improvement = {
        f"{a} over {b}": probability_of_improvement(np.array([*found[a].values()]), np.array([*found[b].values()]))
        for a, b in combinations(found, 2)
        if found[a].keys() == found[b].keys()
    }
    return {"protocol_hash": check_hashes(lines), "agents": agents, "improvement": improvement}


def _scores(agent: str, games: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    if len(runs := {len(values) for values in games.values()}) > 1:
        counts = ", ".join(f"{game} {len(values)}" for game, values in games.items())
        raise UserError(f"{agent} needs as many runs of each game, and has {min(runs)} to {max(runs)}: {counts}")
    scores = {game: [normalised(game, value) for value in values] for game, values in games.items()}
    if without := [game for game, values in scores.items() if None in values]:
        raise UserError(f"there is no human score of {without[0]} to normalise by; leave its results out")
    return scores  # pyrefly: ignore
