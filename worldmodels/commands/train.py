"""Train a world model, or a policy, on a store; the same command resumes a run that was cut short."""

from pathlib import Path

from omegaconf import DictConfig

from worldmodels.config import command, plain, sized


@command("train")
def main(cfg: DictConfig) -> None:
    """Train, and print where the results are."""
    settings = plain(cfg)
    settings["model"] = sized(settings["model"])
    out = Path(settings["out"]).absolute()
    from worldmodels.learners.fit import fit

    if fit(settings, out):  # nothing on the ranks that only help
        print(out)


if __name__ == "__main__":
    main()
