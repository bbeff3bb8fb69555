"""Play a real game and keep the episodes in a store."""

import signal

from omegaconf import DictConfig, OmegaConf

from worldmodels.config import build, command, plain
from worldmodels.data.disk import on_disk


@command("collect")
def main(cfg: DictConfig) -> None:
    """Play until the store holds `steps` steps; interrupted or not, the same command goes on with the next episode."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

    from worldmodels.data.collecting import collect
    from worldmodels.types import UserError

    if OmegaConf.is_missing(cfg.game, "name"):
        raise UserError("the game is missing; give it as game=..., e.g. game=pong (conf/game has them all)")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what is finished stays
    source = plain(cfg.source)
    card_of, path = source.pop("_card_"), on_disk(cfg.store).absolute()
    settings = {k: v for k, v in source.items() if k not in ("_target_", "processes")}
    card = build({**settings, "_target_": card_of, "seed": cfg.seed})

    columns = "{task.description}", BarColumn(), MofNCompleteColumn(), "steps", TimeElapsedColumn(), "ETA"
    # Refreshed by hand, since no thread may run while workers are forked.
    with Progress(*columns, TimeRemainingColumn(), auto_refresh=False) as bar:
        task = bar.add_task(cfg.game.name, total=cfg.steps, visible=False)

        def progress(steps: int, episodes: int) -> None:
            text = f"{cfg.game.name}, {episodes} episodes"
            bar.update(task, completed=min(steps, cfg.steps), description=text, visible=True)
            bar.refresh()

        figures = collect(
            path,
            card,
            lambda steps, start: build({**source, "seed": cfg.seed}, steps=steps, start_episode=start),
            cfg.steps,
            progress,
        )
    if not bar.tasks[task].completed:
        print(f"nothing to do: the store already holds {figures['steps']} steps")
    for name, figure in figures.items():
        print(f"{name:<12} {figure}")
    print(path)


if __name__ == "__main__":
    main()
