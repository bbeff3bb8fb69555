"""Play a policy in the real game by a named protocol: returns, human-normalised scores, films, with intervals."""

import signal
import time
from pathlib import Path

from omegaconf import DictConfig

from worldmodels.commands._entry import enter
from worldmodels.commands._results import finished, write_metrics
from worldmodels.config import command, plain


@command("evaluate")
def main(cfg: DictConfig) -> None:
    """Add a line an episode to `out`/results.jsonl; interrupted or not, the same command goes on with the rest."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

    from worldmodels.data.disk import make_folder
    from worldmodels.evaluation.pictures import montage, write_mp4
    from worldmodels.evaluation.play import open_games, play
    from worldmodels.evaluation.scoreboard import figures_of, game_table
    from worldmodels.evaluation.scores import append_line, check_agent, entrant, read_lines
    from worldmodels.hardware import accelerator

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what is finished stays
    began, out = time.monotonic(), Path(cfg.out).absolute()
    device = accelerator(cfg.device, "device")
    entry = enter(cfg, device)
    settings = {**plain(cfg), "evaluation": entry.identity}
    if finished(out, settings):
        return
    columns = "{task.description}", BarColumn(), MofNCompleteColumn(), "episodes", TimeElapsedColumn(), "ETA"
    games = open_games(entry.game, entry.rules, min(cfg.slots, cfg.episodes), **entry.frames)
    with games as env, Progress(*columns, TimeRemainingColumn()) as bar:
        make_folder(out)
        path, told = out / "results.jsonl", entry.line(cfg.episodes, cfg.seed)
        earlier = [line for line in read_lines(path) if line["evaluation"] == entry.identity]
        check_agent(path, earlier, entry.agent)
        lines = {line["episode"]: line for line in earlier if line["episode"] < cfg.episodes}
        task = bar.add_task(entry.game, total=cfg.episodes, completed=len(lines))
        for game in play(
            entry.policy, env, entry.rules, entry.allowed, cfg.episodes, cfg.seed, set(lines), device,
            cfg.films, cfg.film_steps, lambda steps: bar.update(task, description=f"{entry.game}, {steps:,} steps"),
        ):  # fmt: skip
            if game.film is not None:
                write_mp4(out / f"episode_{game.episode}.mp4", montage([game.film[None]], scale=4))
            lines[game.episode] = told | game.line()
            append_line(path, lines[game.episode])
            bar.update(task, completed=len(lines))
    figures = figures_of(entry.game, [lines[k] for k in sorted(lines)])
    print(game_table(entrant(told), entry.game, entry.rules, figures, cfg.compare))
    timing = {"seconds": round(time.monotonic() - began, 1)}
    write_metrics(out, {**told, **figures, **timing, "rules": entry.rules.told(), "settings": settings})


if __name__ == "__main__":
    main()
