"""Models pushed to a hub and pulled from it: whole or not at all, and nothing overwritten by the way."""

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.hub import Hub, serving_hub, sha
from worldmodels.data.sources.catch_play import catch_card
from worldmodels.portable.folder import describe, write_model

RUN = Callable[..., tuple[int, str, str]]
REPO = "somebody/catch"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("HF_TOKEN", "hf_of_this_test")
    # Git LFS, which every hub takes: the library's newer way speaks to servers of its own
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    with serving_hub() as served:
        yield served


def write(folder: Path, licence: str | None = None, starts: bool = False) -> Path:
    """A model as small as can be; whether its settings build anything is no matter of the hub's."""
    from tests.conformance import random_segment

    settings = {"_target_": "worldmodels.models.diffusion.DiffusionWorldModel"}
    segment = random_segment(1, 2, 3, 20) if starts else None
    weights = nn.Linear(2, 2).state_dict() if licence is None else {"weight": torch.ones(2)}
    write_model(folder, describe(settings, catch_card(0), licence=licence), weights, segment)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_pushed_is_what_is_pulled(hub: Hub, in_process: RUN, tmp_path: Path) -> None:
    model = write(tmp_path / "model", starts=True)
    push = ["push", f"checkpoint={model}", f"repo={REPO}", f"endpoint={hub.url}"]
    for printed in ("/commit/c000", "is there already"):
        code, out, err = in_process(*push)
        assert code == 0 and printed in out, err
    assert len(hub.repos[REPO]) == 2, "one commit, and none for what is there already"
    hub.repos[REPO][-1]["modeling.py"] = b"raise SystemExit"
    pull = ["pull", f"repo={REPO}", f"out={tmp_path / 'pulled'}", f"endpoint={hub.url}"]
    for printed in (str(tmp_path / "pulled"), "lies there already"):
        code, out, err = in_process(*pull)
        assert code == 0 and printed in out, err
    assert files(tmp_path / "pulled") == files(model), "the known files and no others"
    assert set(files(model)) == {"model.json", "model.safetensors", "starts.safetensors", "README.md"}


def test_another_model_is_replaced_only_where_that_is_asked_for(hub: Hub, in_process: RUN, tmp_path: Path) -> None:
    first, second = write(tmp_path / "first", starts=True), write(tmp_path / "second", "mit")
    push = ["push", f"repo={REPO}", f"endpoint={hub.url}"]
    assert in_process(*push, f"checkpoint={first}")[0] == 0
    code, _, err = in_process(*push, f"checkpoint={second}")
    assert (code, len(hub.repos[REPO])) == (2, 2) and "replace=true" in err.splitlines()[-1]
    assert in_process(*push, f"checkpoint={second}", "replace=true")[0] == 0
    assert set(hub.repos[REPO][-1]) == {".gitattributes", *files(second)}, "start frames of the first are gone"
    before = files(write(tmp_path / "out"))
    pull = ["pull", f"repo={REPO}", f"endpoint={hub.url}"]
    code, _, err = in_process(*pull, f"out={tmp_path / 'out'}")
    assert code == 2 and "holds something else" in err.splitlines()[-1]
    assert files(tmp_path / "out") == before
    assert in_process(*pull, f"out={tmp_path / 'old'}", f"revision={sha(2)}")[0] == 0
    assert files(tmp_path / "old") == files(first)


def test_what_is_damaged_on_its_way_gets_no_name(hub: Hub, in_process: RUN, tmp_path: Path) -> None:
    model = write(tmp_path / "model")
    push, pull = ["push", f"checkpoint={model}", f"repo={REPO}", f"endpoint={hub.url}"], ["pull", f"repo={REPO}"]
    assert in_process(*push)[0] == 0
    weights = hub.repos[REPO][-1]["model.safetensors"]
    hub.repos[REPO][-1]["model.safetensors"] = weights[:-1] + bytes([weights[-1] ^ 1])
    code, _, err = in_process(*pull, f"out={tmp_path / 'out'}", f"endpoint={hub.url}")
    assert code == 2 and "its SHA-256 is" in err.splitlines()[-1]
    assert {path.name for path in tmp_path.iterdir()} == {"model"}
    (model / "model.safetensors").write_bytes(weights[:-1])
    code, _, err = in_process(*push, "replace=true")
    assert code == 2 and "its SHA-256 is" in err.splitlines()[-1]
    assert len(hub.repos[REPO]) == 2


def test_mistakes_and_refusals_end_in_one_sentence(
    hub: Hub, in_process: RUN, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, here = write(tmp_path / "model"), f"endpoint={hub.url}"
    hub.repos["somebody/else"] = [{"model.safetensors": b"of another program"}]
    shutil.copytree(model, tmp_path / "empty", ignore=lambda *_: ["model.json"])
    out, adapter = f"out={tmp_path / 'out'}", tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter.json").write_text("{}")
    for line, part in (
        (["push", f"checkpoint={adapter}", f"repo={REPO}", here], f"`worldmodels export-model checkpoint={adapter}"),
        (["push", f"checkpoint={tmp_path / 'empty'}", f"repo={REPO}", here], "has no model.json"),
        (["push", f"checkpoint={model}", "repo=a/b/c", here], "give it as USER/NAME"),
        (["push", f"checkpoint={model}", "repo=somebody/else", here], "holds another model.safetensors already"),
        (["push", f"checkpoint={model}", "repo=no/body", "revision=old", here], "there is no no/body on the hub"),
        (["pull", "repo=no/body", out, here], "there is no no/body on the hub"),
        (["pull", "repo=somebody/else", out, here], "no model of this program"),
        (["pull", "repo=somebody/else", out, here, "revision=old"], "has no revision=old"),
        (["pull", "repo=no/body", out, "endpoint=http://127.0.0.1:1"], "the hub cannot be reached"),
    ):
        code, _, err = in_process(*line)
        assert code == 2 and part in err.splitlines()[-1] and "Traceback" not in err, err
        assert not (tmp_path / "out").exists()
    push = ["push", f"checkpoint={model}", f"repo={REPO}", here]
    hub.refuse = 403
    code, _, err = in_process(*push)
    assert code == 2 and "code 403; its owner must let you" in err.splitlines()[-1]
    hub.refuse, hub.meanwhile = None, {"model.json": b"somebody else's"}
    code, _, err = in_process(*push)
    assert code == 2 and "changed in the meantime" in err.splitlines()[-1]
    assert hub.repos[REPO][-1] == hub.meanwhile
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for line in (push, ["pull", f"repo={REPO}", out, here]):
        code, _, err = in_process(*line)
        assert (code, err.count("\n")) == (2, 1) and 'pip install "worldmodels[hub]"' in err
