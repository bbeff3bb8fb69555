"""Bring an exported model from the Hugging Face hub, its hashes checked."""

from pathlib import Path

from omegaconf import DictConfig

from worldmodels.config import command


@command("pull")
def main(cfg: DictConfig) -> None:
    """Pull into the new folder `cfg.out`, and print where it is."""
    from worldmodels.portable.hub import pull

    out = Path(cfg.out).absolute()
    if not pull(cfg.repo, out, str(cfg.revision), cfg.endpoint):
        print("this very model lies there already")
    print(out)


if __name__ == "__main__":
    main()
