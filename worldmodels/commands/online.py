"""Learn a game online: play it with the newest network's search, train, and play again; the same command goes on."""

import signal
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from worldmodels.config import build, command, plain, sized
from worldmodels.types import UserError


@command("online")
def main(cfg: DictConfig) -> None:
    """Play and train in rounds, and print where the results are."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what is finished stays
    card = None
    if not OmegaConf.is_missing(cfg.game, "name"):
        source = plain(cfg.source)
        settings = {k: v for k, v in source.items() if k not in ("_target_", "_card_", "processes")}
        card = build({**settings, "_target_": source["_card_"], "seed": cfg.seed})
    del cfg.game, cfg.source
    settings = plain(cfg)
    settings["model"] = sized(settings["model"])
    out = Path(settings["out"]).absolute()
    if card is None and cfg.store is None:
        raise UserError("the game is missing; give it as game=..., e.g. game=catch, or existing play as store=...")
    from worldmodels.learners.online import online

    figures = online(settings, card, out)
    for point in figures["curve"]:
        print(f"{point['play_steps']:>9} steps of play  mean return {point['mean_return']:.2f}")
    print(out)


if __name__ == "__main__":
    main()
