"""The last line of every benchmark: one JSON object with its name, its figures and the machine."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from worldmodels.hardware import summary


def publish(name: str, figures: Mapping[str, Any], out: Path | None, **more: Any) -> None:
    """Print the object, with `more` entries, and write it to `out`/`name`.json where a folder is given."""
    result = json.dumps({"benchmark": name, **more, "figures": figures, "environment": summary()})
    if out:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{name}.json").write_text(result + "\n", encoding="utf-8")
    print(result)
