"""Write the episodes of a store for other programs."""

import time
from pathlib import Path

from omegaconf import DictConfig

from worldmodels.commands._results import finished, write_metrics
from worldmodels.config import command, plain


@command("export")
def main(cfg: DictConfig) -> None:
    """Write every episode to `cfg.out`; the same command, given again, does what is left to do."""
    import signal

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

    from worldmodels.data.exporting import export
    from worldmodels.data.store import Store

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what is whole stays
    began, out, store = time.monotonic(), Path(cfg.out).absolute(), Store.open(cfg.store)
    steps = int(store.lengths.sum())
    settings = {**plain(cfg), "store_uuid": store.uuid, "rows": steps}
    if finished(out, settings):
        return
    columns = "{task.description}", BarColumn(), MofNCompleteColumn(), "steps", TimeElapsedColumn(), "ETA"
    with Progress(*columns, TimeRemainingColumn()) as bar:
        task = bar.add_task(f"{store.card['game']} to {cfg.format}", total=steps)
        figures = export(store, out, cfg.format, lambda done: bar.update(task, completed=done))
    for name, figure in figures.items():
        print(f"{name:<20} {figure}")
    if figures.get("transitions_left_out"):
        print("Minari asks for a frame after every action: where the last is not logged, the last step is left out.")
    if name := figures.get("dataset_id"):
        print(f"MINARI_DATASETS_PATH={out / 'minari'} python -c 'import minari; minari.load_dataset(\"{name}\")'")
    write_metrics(out, {**figures, "seconds": round(time.monotonic() - began, 1), "settings": settings})


if __name__ == "__main__":
    main()
