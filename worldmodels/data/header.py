"""What makes a folder a store: its header and its dataset card, and how they are written and read."""

import uuid
from pathlib import Path
from typing import Any

from worldmodels.data.card import Card, validate_card
from worldmodels.data.disk import damaged, read_json, write_json
from worldmodels.types import UserError

FORMAT, VERSION, MIN_READER = "worldmodels-store", 2, 2
FILL = "fill it with `worldmodels collect game=GAME steps=N store=PATH` or `worldmodels import`"


def make_store(root: Path, card: Card) -> None:
    """Write header and card where there are none.

    Raises:
        UserError: the folder holds something else, or a store of a newer version.
    """
    if not (root / "store.json").exists():
        if foreign := _foreign(root):
            raise UserError(f"{root} is not a store and holds other things ({foreign[0]}); give an empty folder")
        header = {"format": FORMAT, "version": VERSION, "min_reader": MIN_READER, "uuid": uuid.uuid4().hex}
        # over HTTP no folder is listed
        write_json(root / "store.json", header | {"source": card["source"]}, checksum=True)
    read_header(root)
    (root / "sources").mkdir(exist_ok=True)
    if not any((root / "sources").glob("*.json")):
        write_json(root / "sources" / f"{card['source']}.json", card, checksum=True)


def read_header(root: Path) -> dict[str, Any]:
    """The content of store.json.

    Raises:
        UserError: there is no store, or it is of a newer version.
    """
    try:
        header = read_json(root / "store.json")
    except (FileNotFoundError, NotADirectoryError) as e:
        if (root / "store.json").exists():  # made just now
            return read_header(root)
        if root.is_file() or (root.is_dir() and _foreign(root)):
            raise UserError(f"{root} is not a store: it has no store.json; give the folder of a store") from e
        raise UserError(f"there is no store at {root}; {FILL.replace('fill', 'make')}") from e
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise UserError(f"{root} is not a store: its store.json is of another program; give the folder of a store")
    if not {"version", "min_reader", "uuid"} <= header.keys():
        raise damaged(root / "store.json", "a field is missing")
    if header["min_reader"] > VERSION:
        raise UserError(
            f"the store {root} was written by a newer version of worldmodels (its format is {header['version']}, this "
            f"version reads up to {VERSION}); update worldmodels to use it"
        )
    return header


def _foreign(root: Path) -> list[str]:
    """What a killed maker of a store would not have left in a folder without store.json; hidden folders are hydra's."""
    ours = (".", "store.json.tmp", "metrics.json")
    return [p.name for p in root.iterdir() if not p.name.startswith(ours) and p.suffix != ".log"]


def stored_card(root: Path) -> Card:
    """The dataset card of a store.

    Raises:
        UserError: there is none yet, or it is no card.
    """
    cards = sorted((root / "sources").glob("*.json"))
    if not cards:  # killed between making the store and its first episode
        raise UserError(f"the store {root} holds no episodes; {FILL}")
    return validate_card(read_json(cards[0]), f"the dataset card {cards[0]}")
