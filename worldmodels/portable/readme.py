"""The model card: what model.json says, for people, with the front matter that the Hugging Face hub reads.

Nothing is told that was not recorded: a model whose training left no figures has none here.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import OmegaConf

from worldmodels.config import dotted

_OWN = "SHA-256 of the weights whatever file they lie in, by which an adapter names its base: `{}`."


def readme(about: Mapping[str, Any]) -> str:
    """README.md of a model (`portable.folder.describe`) whose files have their hashes."""
    card, kind = about["card"], about["kind"]
    games = card.get("games", [card["game"]])
    name = about["model"]["_target_"].rpartition(".")[2]
    legal = _actions(about["actions"]["vocabulary"], about["actions"]["legal"])
    obs = card["obs"]
    play = f"worldmodels evaluate checkpoint=FOLDER game={games[0]} protocol=store out=runs/scored"
    use = {
        "world model": "worldmodels imagine checkpoint=FOLDER store=STORE out=runs/dreams",
        "policy": play,
        "MuZero": f"{play}\nworldmodels reanalyse checkpoint=FOLDER store=STORE out=runs/targets",
    }
    lines = [
        "---",
        OmegaConf.to_yaml(OmegaConf.create(_front(about, games))).rstrip(),
        "---",
        f"# {' and '.join(games)}: {kind}",
        "",
        f"`{name}` with {about['parameters']:,} parameters. It sees frames of {obs['height']}x{obs['width']} pixels "
        f"and {obs['channels']} channels ({obs['colour']}), and knows the actions {legal} of ALE's "
        f"{len(about['actions']['vocabulary'])}.",
        "",
        "```",
        use[kind],
        "```",
        "",
        "In Python, `worldmodels.load_model(FOLDER)` gives the network and what is told here. Reading it runs no code "
        "of the files, and refuses weights whose SHA-256 differs from the one below.",
        "",
        *_section("The play that it learned from", card, f"SHA-256 of this dataset card: `{about['card_sha256']}`."),
        *_section("What its training recorded", about["run"]),
        *_section("Where the weights come from", about["source"], _OWN.format(about["weights_sha256"])),
        "## Files",
        "",
        *(f"- `{file}`: SHA-256 `{digest}`" for file, digest in about["files"].items()),
        "",
    ]
    return "\n".join(lines)


def _actions(vocabulary: list[str], legal: Any) -> str:
    if isinstance(legal, Mapping):
        return "; ".join(f"{_actions(vocabulary, mine)} (in {game})" for game, mine in legal.items())
    return ", ".join(vocabulary[a] for a in legal)


def _front(about: Mapping[str, Any], games: list[str]) -> dict[str, Any]:
    front: dict[str, Any] = {"library_name": "worldmodels"}
    if about["licence"]:
        front["license"] = about["licence"]
    if about["kind"] != "world model":
        front["pipeline_tag"] = "reinforcement-learning"
    return front | {"tags": ["world-models", "reinforcement-learning", about["kind"].lower().replace(" ", "-"), *games]}


def _section(title: str, facts: Mapping[str, Any], end: str = "") -> Iterator[str]:
    yield from (f"## {title}", "")
    told = {k: v for k, v in dotted(facts).items() if not isinstance(v, Mapping) and v not in (None, "", [])}
    yield from (f"- {name}: {value}" for name, value in told.items())
    if not told:
        yield "Nothing was recorded."
    yield from ("", end, "") if end else ("",)
