"""Put what a run made on one page: index.html with pictures and figures, report.json with the figures."""

from pathlib import Path

from omegaconf import DictConfig

from worldmodels.config import command, plain
from worldmodels.types import UserError


@command("report")
def main(cfg: DictConfig) -> None:
    """Write index.html and report.json to `cfg.out`, which is the run's own folder by default."""
    from worldmodels.data.disk import make_folder
    from worldmodels.evaluation.report import write_report

    run, out = Path(cfg.run), Path(cfg.out or cfg.run).absolute()
    if not run.is_dir():
        raise UserError(f"there is no run at {run.absolute()}; make one with `make quickstart`")
    make_folder(out)
    for path in write_report(run, plain(cfg.stores), out):
        print(path)


if __name__ == "__main__":
    main()
