"""Who may import whom (the walls of the house), and what importing costs."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "worldmodels"
FILES = sorted(PACKAGE.rglob("*.py"))
OWN = {"config", "hardware", "callbacks", "types", "ops", "nn", "models", "planning", "imagination", "data", "envs"}
OWN |= {"evaluation", "learners", "commands", "portable", "web", "__main__", "__init__"}

MAY_IMPORT = {  # room: the rooms of this package that it may import
    "types": set(),
    "ops": {"types", "ops"},
    "nn": {"types", "ops", "nn"},
    "models": {"types", "ops", "nn", "models"},
    "planning": {"types", "ops", "planning"},
    "imagination": {"types", "ops"},
}
NEVER = {"data": {"nn", "models"}, "envs": {"nn", "models"}, "portable": {"learners", "callbacks", "commands"}}
NOT_WALLED = {"data/datamodule.py", "data/reanalyse.py"}
LIGHTNING_ROOMS = ("learners/", "callbacks.py", "commands/", "data/datamodule.py", "data/reanalyse.py")
HYDRA_ROOMS = ("config.py", "commands/")
WHERE_USED = {"wandb", "ale_py", "diffusers", "av", "matplotlib", "cv2"}


def imports(path: Path, everywhere: bool = True) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of each import; with everywhere=False only of those that run when the module is imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if id(node) in inside and not everywhere:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write the whole name"
            yield node.lineno, node.module or ""
            yield from ((node.lineno, f"{node.module}.{name.name}") for name in node.names)


def room(name: str) -> str | None:
    """The room that an import reaches: worldmodels.nn.unet is in nn."""
    parts = name.split(".")
    return parts[1] if parts[0] == "worldmodels" and len(parts) > 1 and parts[1] in OWN else None


def offences(path: Path) -> Iterator[str]:
    here = path.relative_to(PACKAGE).as_posix()
    own = here.partition("/")[0].removesuffix(".py")
    for line, name in imports(path):
        top, target = name.partition(".")[0], room(name)
        if own in MAY_IMPORT and target is not None and target not in MAY_IMPORT[own]:
            yield f"{here}:{line}: {own} must not import {name}"
        if target in NEVER.get(own, set()) and here not in NOT_WALLED:
            yield f"{here}:{line}: {own} must not import {name}"
        if top in ("lightning", "pytorch_lightning") and not here.startswith(LIGHTNING_ROOMS):
            yield f"{here}:{line}: lightning stays in {', '.join(LIGHTNING_ROOMS)}"
        if top == "hydra" and not here.startswith(HYDRA_ROOMS):
            yield f"{here}:{line}: hydra stays in {', '.join(HYDRA_ROOMS)}"
    for line, name in imports(path, everywhere=False):
        if name.partition(".")[0] in WHERE_USED:
            yield f"{here}:{line}: {name} is imported where it is used, inside the function"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_walls_stand(path: Path) -> None:
    assert not (found := sorted(set(offences(path)))), "\n".join(found)


def test_the_walk_sees_a_breach(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    (tmp_path / "ops").mkdir()
    bad = tmp_path / "ops" / "bad.py"
    bad.write_text("import wandb\nfrom worldmodels import models\ndef f():\n    import lightning\n    import ale_py\n")
    found = "\n".join(offences(bad))
    assert "bad.py:1: wandb" in found
    assert "bad.py:2: ops must not import worldmodels.models" in found
    assert "bad.py:4: lightning" in found
    assert "ale_py" not in found


def test_importing_the_package_brings_nothing_heavy() -> None:
    code = (
        "import sys, worldmodels; print(sorted({'torch', 'numpy', 'hydra', 'lightning', 'wandb'} & set(sys.modules)))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == "[]"


def test_every_public_name_can_be_had() -> None:
    import worldmodels

    for name in worldmodels.__all__:
        assert getattr(worldmodels, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'; it has"):
        _ = worldmodels.nothing
