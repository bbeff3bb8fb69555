"""`worldmodels <command> [key=value ...]`: finds the command and runs its module.

Only the standard library is imported here, so that the list of commands appears at once.
"""

import ast
import difflib
import runpy
import sys
from pathlib import Path

from worldmodels import __version__


def commands() -> dict[str, str]:
    """Every command with the first line of its module's docstring, read without importing it."""
    found = {}
    for path in sorted((Path(__file__).parent / "commands").glob("[!_]*.py")):
        doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        found[path.stem.rstrip("_").replace("_", "-")] = doc.partition("\n")[0]
    return found


def main() -> None:
    """Entry point of the console script and of `python -m worldmodels`."""
    known = commands()
    name = sys.argv[1] if len(sys.argv) > 1 else "help"
    if name in ("help", "-h", "--help"):
        width = max(map(len, known))
        print("usage: worldmodels <command> [key=value ...]\n")
        print("\n".join(f"  {command:<{width}}  {doc}" for command, doc in known.items()))
        print("\n`worldmodels <command> --help` lists the settings of a command and their values.")
        return
    if name in ("version", "--version"):
        print(f"worldmodels {__version__}")
        return
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"there are: {', '.join(known)}"
        print(f"worldmodels: unknown command '{name}'; {hint}", file=sys.stderr)
        sys.exit(2)
    # A process that Lightning starts for another rank runs `-m worldmodels.commands.<name>` with these arguments.
    del sys.argv[1]
    module = name.replace("-", "_")
    suffix = "" if (Path(__file__).parent / "commands" / f"{module}.py").exists() else "_"
    runpy.run_module(f"worldmodels.commands.{module}{suffix}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
