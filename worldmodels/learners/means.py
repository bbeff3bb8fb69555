"""What validation measures of each game by itself: no game is drowned by one of which there is more to see."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from worldmodels.types import Metrics, Segment, game_key


class GameMeans(nn.Module):
    """Means of figures over a validation, which are the same however windows are cut into batches and ranks.

    Args:
        games: names of the games, if there are several; otherwise all that is seen is of one, whose name is "".
    """

    def __init__(self, games: Sequence[str] = ()) -> None:
        super().__init__()
        self.games = sorted(games) if len(games) > 1 else [""]
        self.metrics: dict[str, list[MeanMetric]] = {}

    def parts(self, segment: Segment) -> Iterator[tuple[str, Segment]]:
        """The windows of each game in a batch, with its name."""
        if self.games == [""]:
            yield "", segment
            return
        for game in self.games:
            mine = segment.side["game"] == game_key(game)
            if mine.any():
                yield game, segment.rows(mine)

    def add(self, game: str, name: str, values: Tensor, weights: Tensor | float = 1.0) -> None:
        """Add to the mean of a figure of a game."""
        if name not in self.metrics:  # of all games at once: ranks must agree on what there is, whatever they see
            self.metrics[name] = [MeanMetric().to(values.device) for _ in self.games]
        self.metrics[name][self.games.index(game)].update(values.float(), weights)

    def finish(self) -> dict[str, Metrics]:
        """The figures of each game by name, and begin anew."""
        found: dict[str, Metrics] = {game: {} for game in self.games}
        for name, metrics in self.metrics.items():
            for game, metric in zip(self.games, metrics, strict=True):
                found[game][name] = metric.compute()
                metric.reset()
        return found


def over_games(found: Mapping[str, Metrics]) -> Metrics:
    """The figures of one game under their names; of several each by game/name, and by name their mean over games.

    Games count alike; one that validation has seen nothing of, such as a game that is replayed, is left out.
    """
    if len(found) == 1:
        return next(iter(found.values()))
    told = {f"{game}/{name}": value for game, mine in found.items() for name, value in mine.items()}
    told = {name: value for name, value in told.items() if not value.isnan()}
    names = next(iter(found.values()))
    return told | {name: torch.stack([mine[name] for mine in found.values()]).nanmean() for name in names}
