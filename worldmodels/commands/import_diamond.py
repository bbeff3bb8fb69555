"""Make models of this program of an agent that DIAMOND's code trained: its world model and its policy."""

from pathlib import Path

from omegaconf import DictConfig

from worldmodels.config import command
from worldmodels.types import UserError


@command("import-diamond")
def main(cfg: DictConfig) -> None:
    """Write `out`/world_model and `out`/policy, and print where they are."""
    from worldmodels.data.disk import remove
    from worldmodels.portable.diamond import convert
    from worldmodels.portable.folder import write_model

    out, models, new = Path(cfg.out).absolute(), convert(cfg.agent, cfg.game.name), []
    try:
        for name, (about, weights) in models.items():
            if write_model(out / name, about, weights):
                new.append(out / name)
            else:
                print(f"this very {about['kind']} lies there already")
            print(out / name)
    except UserError:  # both or neither
        for path in new:
            remove(path)
        raise


if __name__ == "__main__":
    main()
