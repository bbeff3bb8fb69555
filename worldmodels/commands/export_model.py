"""Write a checkpoint as a folder for others: safetensors, one JSON that says all the rest, and a model card."""

from pathlib import Path

from omegaconf import DictConfig

from worldmodels.config import command, plain


@command("export-model")
def main(cfg: DictConfig) -> None:
    """Write the folder `cfg.out`, and print where it is."""
    from worldmodels.portable.export import export_model

    out = Path(cfg.out).absolute()
    settings = {name: value for name, value in plain(cfg).items() if name not in ("checkpoint", "out")}
    if not export_model(cfg.checkpoint, out, **settings):
        print("this very model lies there already")
    print(out)


if __name__ == "__main__":
    main()
