"""Say what a store holds: its dataset card, what was counted in it, and a contact sheet of its frames."""

import json
import sys
from pathlib import Path

from omegaconf import DictConfig

from worldmodels.config import command


@command("inspect")
def main(cfg: DictConfig) -> None:
    """Print the card and the figures; write contact.png and metrics.json to `cfg.out`."""
    from rich.console import Console
    from rich.progress import Progress

    from worldmodels.data.disk import make_folder, write_json
    from worldmodels.data.inspection import inspect, page
    from worldmodels.data.store import Store
    from worldmodels.evaluation.contact import contact_sheet
    from worldmodels.types import UserError

    store = Store.open(cfg.store)
    root = Path(cfg.store).resolve()
    out = Path(cfg.out or Path("runs", "inspect", root.name)).resolve()
    if out.is_relative_to(root):
        raise UserError(f"out={out} is in the store, where only its own files may be; give another folder")
    make_folder(out)
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("segments", total=None)
        found = inspect(store, lambda done, total: bar.update(task, completed=done, total=total))
    found["contact_sheet"] = str(contact_sheet(out / "contact.png", store, cfg.pictures))
    write_json(out / "metrics.json", found)
    if cfg.json:
        print(json.dumps(found, indent=2))
        return
    print("\n".join(page(found)))
    print(out)


if __name__ == "__main__":
    main()
