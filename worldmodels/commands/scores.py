"""Put evaluations of several games and runs together: mean, median, IQM, optimality gap, who improves on whom."""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from worldmodels.commands._results import write_metrics
from worldmodels.config import command, plain


@command("scores")
def main(cfg: DictConfig) -> None:
    """Print a table of agents and write metrics.json to `cfg.out`."""
    from worldmodels.evaluation.scoreboard import agents_table
    from worldmodels.evaluation.scores import read_lines, summary
    from worldmodels.types import UserError

    paths = [Path(p) for p in (cfg.results if OmegaConf.is_list(cfg.results) else [cfg.results])]
    files = [path / "results.jsonl" if path.is_dir() else path for path in paths]
    if absent := [path for path in files if not path.is_file()]:
        raise UserError(f"there are no results at {absent[0]}; make them with `worldmodels evaluate ... out=DIR`")
    figures = summary([line for path in files for line in read_lines(path)])
    print(agents_table(figures, cfg.compare))
    write_metrics(Path(cfg.out).absolute(), {**figures, "settings": plain(cfg)})


if __name__ == "__main__":
    main()
