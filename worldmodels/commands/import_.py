"""Bring a log that somebody else recorded into a store."""

import signal
from functools import partial

from omegaconf import DictConfig

from worldmodels.config import build, command, conf_dir, plain
from worldmodels.data.disk import on_disk


@command("import")
def main(cfg: DictConfig) -> None:
    """Read the log until the store holds it, or `limit` steps; the same command goes on from what is stored."""
    from rich.progress import BarColumn, MofNCompleteColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    from worldmodels.data.importing import Progress, import_log
    from worldmodels.types import UserError

    source = plain(cfg.get("source")) or {}
    if "_parts_" not in source:
        logs = [p.stem for p in sorted((conf_dir() / "source").glob("*.yaml")) if "\n_parts_:" in p.read_text()]
        wrong = f"source={source['_target_'].rpartition('.')[2]} reads no log" if source else "the source is missing"
        raise UserError(f"{wrong}; give it as source=..., one of {', '.join(logs)}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what is committed stays
    card_of, parts_of, reader = (source.pop(key) for key in ("_card_", "_parts_", "_target_"))
    source["path"], store = cfg.path, on_disk(cfg.store).absolute()
    card, parts = (build({**source, "_target_": target}) for target in (card_of, parts_of))
    unit, total = ("steps", cfg.limit) if cfg.limit else ("parts", len(parts))

    columns = "{task.description}", BarColumn(), MofNCompleteColumn(), unit, TimeElapsedColumn(), "ETA"
    with Bar(*columns, TimeRemainingColumn()) as bar:
        task = bar.add_task(card["game"], total=total, visible=False)
        had: list[int] = []  # frames that were there at the start

        def progress(done: Progress) -> None:
            if not had:
                had.append(done.frames)
            speed = (done.frames - had[0]) / (bar.tasks[task].elapsed or 1)
            text = f"{card['game']}, {done.episodes} episodes, {speed:,.0f} frames/s"
            at = min(done.frames, total) if cfg.limit else done.parts
            bar.update(task, completed=at, description=text, visible=True)

        read = partial(build, {**source, "_target_": reader})
        figures = import_log(store, card, parts, read, cfg.limit, cfg.processes, progress)
    if not had:
        print(f"nothing to do: the store already holds {figures['steps']} steps")
    for name, figure in figures.items():
        print(f"{name:<12} {figure}")
    print(store)


if __name__ == "__main__":
    main()
