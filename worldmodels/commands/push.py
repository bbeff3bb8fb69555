"""Put an exported model on the Hugging Face hub, in one commit."""

from omegaconf import DictConfig

from worldmodels.config import command


@command("push")
def main(cfg: DictConfig) -> None:
    """Push the folder `cfg.checkpoint`, and print the address of the commit."""
    from worldmodels.portable.hub import push

    commit = push(cfg.checkpoint, cfg.repo, str(cfg.revision), cfg.private, cfg.replace, cfg.endpoint)
    print(commit or "this very model is there already")


if __name__ == "__main__":
    main()
