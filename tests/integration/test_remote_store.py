"""The commands that read a store, given the URL of one."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import QUICK
from tests.serving import Files, serving

RUN = Callable[..., tuple[int, str, str]]


@pytest.fixture
def server(catch_store: Path, tmp_path: Path) -> Iterator[Files]:
    shutil.copytree(catch_store, tmp_path / "www" / "catch")
    with serving(tmp_path / "www") as it:
        yield it


def test_from_training_to_dreams(in_process: RUN, server: Files, catch_store: Path, tmp_path: Path) -> None:
    url, short = f"{server.url}/catch", ["trainer.max_steps=4", "trainer.val_check_interval=2"]
    runs = {"there": url, "here": str(catch_store)}
    for name, store in runs.items():
        args = ["train", "experiment=catch", f"store={store}", f"out={tmp_path / name}", *QUICK, *short]
        code, _, err = in_process(*args)
        assert code == 0, err
    a, b = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in runs)
    assert a["weights_sha256_by_rank"] == b["weights_sha256_by_rank"] and a["final"] == b["final"]

    given = [f"checkpoint={tmp_path / 'there' / 'best.ckpt'}", "device=cpu", "burn_in=1"]
    for name, store in runs.items():
        out = f"out={tmp_path / name / 'quality'}"
        code, _, err = in_process("quality", *given, f"store={store}", out, "horizons=[1,2]", "windows=6")
        assert code == 0, err
    texts = ((tmp_path / name / "quality" / "metrics.json").read_text() for name in runs)
    a, b = (json.loads(text.replace(store, "STORE")) for text, store in zip(texts, runs.values(), strict=True))
    assert a["settings"]["store"] == "STORE"
    differ = ("settings", "seconds")
    assert {k: v for k, v in a.items() if k not in differ} == {k: v for k, v in b.items() if k not in differ}

    more = [f"store={url}", f"out={tmp_path / 'dreams'}", "horizon=2", "rollouts=3", "shown=1"]
    code, _, err = in_process("imagine", *given, *more)
    assert code == 0 and (tmp_path / "dreams" / "store" / "store.json").is_file(), err

    more = [f"store={url}", f"out={tmp_path / 'moved'}", "horizons=[1,2]", "burn_in=1", "windows=4", "scratch=false"]
    more += ["data.length=5", "data.left_padding=4", "data.validation.length=4", "learner.horizons=[1,2]"]
    code, _, err = in_process("finetune", given[0], *more, *QUICK, *short)
    assert code == 0 and (tmp_path / "moved" / "curves.svg").is_file(), err

    code, out, err = in_process("inspect", f"store={url}", f"out={tmp_path / 'sheet'}", "json=true")
    assert code == 0 and json.loads(out)["frames"] == 240 and (tmp_path / "sheet" / "contact.png").is_file(), err
    code, _, err = in_process("export", f"store={url}", "format=npz", f"out={tmp_path / 'npz'}")
    assert code == 0 and len(list((tmp_path / "npz").glob("0*.npz"))) == 60, err


@pytest.mark.parametrize(
    "args, parts",
    [
        (["collect", "game=catch", "steps=10", "store=URL"], ["is a URL", "folder on the disk"]),
        (["import", "source=npz", "path=x", "game=catch", "store=URL"], ["is a URL", "folder on the disk"]),
        (["verify", "store=URL"], ["is a URL", "on a disk"]),
        (["train", "experiment=catch", "out=x", "store=URL/none"], ["there is no store at http://"]),
        (["train", "experiment=catch", "out=x", "store=URL", "data.workers=2"], ["data.workers=0"]),
        (["train", "experiment=catch", "out=x", "store=[URL,URL]"], ["none of them twice"]),
        (["inspect", "store=http://127.0.0.1:9/s"], ["http://127.0.0.1:9/s/store.json cannot be read"]),
        (["inspect", "store=ftp://127.0.0.1/s"], ["http://, https://, gs://, s3://, file://"]),
    ],
)
def test_mistakes(
    args: list[str], parts: list[str], in_process: RUN, server: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = in_process(*(a.replace("URL", f"{server.url}/catch") for a in args))
    assert code == 2 and err.count("\n") == 1, err
    for part in parts:
        assert part in err
    assert not list(tmp_path.glob("http*"))
