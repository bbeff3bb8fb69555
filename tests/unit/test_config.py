"""Building from settings, trust, sizes, checkpoints, and the sentences that mistakes end in."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from worldmodels import config
from worldmodels.config import build, conf_dir, dotted, sized
from worldmodels.portable.checkpoints import read_checkpoint
from worldmodels.types import UserError


def test_build_passes_nested_settings_on_untouched() -> None:
    inner = {"_target_": "os.system", "command": "false"}
    module = build({"_target_": "torch.nn.Linear", "in_features": 2}, out_features=3, device=None)
    assert (module.in_features, module.out_features) == (2, 3)
    seen = build({"_target_": "worldmodels.config.dotted", "cfg": {"a": inner}})
    assert seen["a.command"] == "false"


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("os.system", "not trusted"),
        ("builtins.eval", "not trusted"),
        ("worldmodels.config.os", "not trusted"),  # an imported module
        ("worldmodels.config.Path", "not trusted"),  # an imported class
        ("worldmodels.config.os.system", "no module worldmodels.config.os"),
        ("worldmodelsevil.thing", "not trusted"),
        ("worldmodels.models.diffusion.Missing", "has no attribute 'Missing'"),
        ("worldmodels.models.missing.Thing", "no module worldmodels.models.missing"),
        ("torch.hub.load", "not trusted"),
    ],
)
def test_build_refuses(target: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        build({"_target_": target})


def test_build_names_wrong_settings() -> None:
    with pytest.raises(UserError, match="wrong settings for torch.nn.Linear.*'width'"):
        build({"_target_": "torch.nn.Linear", "width": 3})
    with pytest.raises(UserError, match="no _target_"):
        build({"width": 3})
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        cfg = compose("train", ["+model.sizes.tiny.reward_model.depht=1"])  # in a part that is built inside
    with pytest.raises(UserError, match=r"wrong settings for worldmodels.*RewardModel.__init__\(\) got .* 'depht'"):
        build(sized(cfg.model))


def test_sized_merges_the_choice_and_drops_the_rest() -> None:
    cfg = OmegaConf.create(
        {"size": "b", "x": {"p": 1, "q": 1}, "sizes": {"a": {"x": {"p": 2}}, "b": {"x": {"p": 3}, "y": 4}}}
    )
    assert sized(cfg) == {"x": {"p": 3, "q": 1}, "y": 4}
    whole = {"size": "a", "x": {"_target_": "m.F", "p": 1}, "sizes": {"a": {"x": {"_target_": "m.G", "q": 2}}}}
    assert sized(whole) == {"x": {"_target_": "m.G", "q": 2}}
    with pytest.raises(UserError, match="model.size=c is unknown; choose one of a, b"):
        sized({**OmegaConf.to_container(cfg), "size": "c"})


def test_rosmo_keeps_to_logged_actions_and_muzero_does_not() -> None:
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        weights = [
            compose("train", ["experiment=pong_muzero", f"learner={name}"]).model.weights.behaviour
            for name in ("rosmo", "muzero")
        ]
    assert weights == [0.2, 0.0]


@pytest.mark.parametrize(("size", "denoiser", "reward"), [("paper", 4_406_851, 5_902_656), ("small", 749_475, None)])
def test_parameter_counts_of_the_published_sizes(size: str, denoiser: int, reward: int | None) -> None:
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        cfg = compose("train", [f"model.size={size}"])
    parts = {k: sum(p.numel() for p in m.parameters()) for k, m in build(sized(cfg.model)).components().items()}
    assert parts["denoiser"] == denoiser
    assert reward in (None, parts["reward_model"])


def test_dotted() -> None:
    assert dotted({"a": {"b": 1}, "c": 2}) == {"a": {"b": 1}, "a.b": 1, "c": 2}


class _Evil:
    def __reduce__(self) -> tuple:
        return (print, ("this must never run",))


def test_checkpoints_that_are_not_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="no checkpoint at .*make one with `worldmodels train"):
        read_checkpoint(tmp_path / "none.ckpt")
    torch.save({"evil": _Evil()}, tmp_path / "evil.ckpt")
    with pytest.raises(UserError, match="holds more than tensors"):
        read_checkpoint(tmp_path / "evil.ckpt")
    assert "never run" not in capsys.readouterr().out
    torch.save({"weights": torch.zeros(1000)}, tmp_path / "foreign.ckpt")
    with pytest.raises(UserError, match="no checkpoint of this program"):
        read_checkpoint(tmp_path / "foreign.ckpt")
    whole = (tmp_path / "foreign.ckpt").read_bytes()
    for n, cut in enumerate((whole[:0], whole[:100], whole[: len(whole) // 2], whole[:-30])):
        (tmp_path / f"{n}.ckpt").write_bytes(cut)
        with pytest.raises(UserError, match="truncated or damaged|holds more than tensors"):
            read_checkpoint(tmp_path / f"{n}.ckpt")


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (UserError("one\n sentence"), 2, "worldmodels: one sentence\n"),
        (PermissionError(13, "Permission denied", "/x"), 2, "no permission to use /x"),
        (OSError(28, "No space left on device", "/x"), 2, "the disk of /x is full"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_exit_codes(error: BaseException, code: int, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop, config.sentences("train"):
        raise error
    captured = capsys.readouterr().err
    assert stop.value.code == code
    assert sentence in captured
    assert captured.count("\n") == 1


@pytest.mark.parametrize(
    ("over", "code", "sentence"),
    [
        (ValueError("Can't close the ZIP file while there is an open writing handle on it."), 130, "interrupted"),
        (OSError(28, "No space left on device", "/x"), 2, "the disk of /x is full"),
        (UserError("nothing was saved"), 2, "nothing was saved"),
    ],
)
def test_an_interrupt_is_one_though_a_library_raises_over_it(
    over: Exception, code: int, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """But for what says that saving failed, which the user must know."""
    with pytest.raises(SystemExit) as stop, config.sentences("export"):
        try:
            raise KeyboardInterrupt
        finally:
            raise over
    assert stop.value.code == code
    assert sentence in capsys.readouterr().err


def test_a_defect_of_ours_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError), config.sentences("train"):
        _ = 1 / 0
