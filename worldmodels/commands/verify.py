"""Check every byte of a store against its checksums: what is damaged, missing or foreign is named."""

import json
import sys
from pathlib import Path

from omegaconf import DictConfig

from worldmodels.config import command


@command("verify")
def main(cfg: DictConfig) -> None:
    """Print one line of totals; exit code 2 and one sentence where there is a problem."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    from worldmodels.data.disk import make_folder, write_json
    from worldmodels.data.verify import verify
    from worldmodels.types import UserError

    columns = "verify", BarColumn(), DownloadColumn(), TransferSpeedColumn(), "ETA", TimeRemainingColumn()
    # on stderr, and not at all in a file: stdout may be read by a program, and a problem is one line
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=None)
        found = verify(cfg.store, lambda done, total: bar.update(task, completed=done, total=total))
    if cfg.json:
        print(json.dumps(found, indent=2))
    elif not found["problems"]:
        bare = f", {found['unchecked']} of them without a checksum (format 1)" if found["unchecked"] else ""
        print(
            f"whole: {found['files']:,} files{bare}, {found['bytes']:,} bytes, {found['episodes']:,} episodes, "
            f"{found['frames']:,} frames in {found['seconds']:.1f} s ({found['frames_per_s']:,} frames/s)"
        )
    where = "json=true or out=DIR lists them"
    if cfg.out:
        out = Path(cfg.out).absolute()
        make_folder(out)
        write_json(out / "metrics.json", found)
        where = f"{out / 'metrics.json'} lists them"
        if not cfg.json:
            print(out)
    if problems := found["problems"]:
        first, others = problems[0], len(problems) - 1
        more = f", and {others} other file{'s' * (others > 1)} with problems ({where})" if others else ""
        raise UserError(
            f"the store {cfg.store} is not as it was written: {first['file']}: {first['problem']}{more}; "
            "restore what is named from a copy, or make the store again"
        )


if __name__ == "__main__":
    main()
