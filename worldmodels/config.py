"""Where settings come from, how an object is built from them, and how a mistake in them is told."""

import difflib
import functools
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from worldmodels.data.disk import refusal
from worldmodels.types import UserError

WHOLE = {
    **dict.fromkeys(("steps", "windows", "rollouts", "horizon", "horizons", "burn_in", "batch_size", "shown"), 1),
    **dict.fromkeys(("episodes", "slots", "size", "film_steps", "round_steps"), 1),
    **dict.fromkeys(("callbacks.games.episodes", "callbacks.games.slots", "callbacks.games.every"), 1),
    "callbacks.games.seed": 0,
    **dict.fromkeys(("seed", "reward_rows", "films", "starts", "learner.burn_in"), 0),
    **dict.fromkeys(("trainer.max_steps", "trainer.val_check_interval", "trainer.accumulate_grad_batches"), 1),
    **dict.fromkeys(("data.validation.windows", "data.validation.batch_size"), 1),
    **dict.fromkeys(("learner.horizons", "learner.left_out", "callbacks.last.every", "source.processes"), 1),
    **dict.fromkeys(("learner.horizon", "learner.reuse", "learner.steps_ahead", "learner.target_every"), 1),
    **dict.fromkeys(("budget", "budgets", "patience", "lora.rank", "points", "scratch_times"), 1),
    **dict.fromkeys(("processes", "limit", "pictures", "other_actions.steps"), 1),
    **dict.fromkeys(("other_actions.windows", "spread.windows", "spread.samples", "spread.after"), 0),
}
"""Settings, of whatever command has them, that are whole numbers (or lists of them), and the least they may be."""
TRUSTED = ("worldmodels.", "torch.optim.", "torch.nn.", "diffusers.", "lightning.pytorch.")
"""Prefixes of `_target_` that may be built: a yaml or a checkpoint from a stranger must not run code."""
HEADS = {"policy": (("head",), "actor_critic or action_values"), "MuZero": (("value", "reward"), "muzero")}
"""Of each kind of policy, the settings that are its heads (nn/heads.py), and the models that there are."""


def conf_dir() -> Path:
    """The folder of settings: inside the package when installed from a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    return next(path for path in (package / "conf", package.parent / "conf") if path.is_dir())


def plain(cfg: Any) -> Any:
    """Resolved plain dicts, lists and numbers, the only thing that learners take and checkpoints hold."""
    return OmegaConf.to_container(cfg, resolve=True) if OmegaConf.is_config(cfg) else cfg


def build(cfg: Mapping[str, Any], **extra: Any) -> Any:
    """Call `cfg["_target_"]` with the other keys and `extra` as arguments; nested dicts are passed as they are.

    Raises:
        UserError: the target is not trusted, does not exist, or does not take these arguments.
    """
    arguments = {**plain(cfg), **extra}
    target = arguments.pop("_target_", None)
    if not isinstance(target, str):
        raise UserError(f"these settings name no _target_ to build: {sorted(arguments)}")
    module, _, name = target.rpartition(".")
    factory = None
    if target.startswith(TRUSTED):
        try:
            factory = getattr(importlib.import_module(module), name)
        except ModuleNotFoundError as error:
            if not f"{module}.".startswith(f"{error.name}."):
                raise
            raise UserError(f"_target_ '{target}' does not exist: there is no module {error.name}") from error
        except AttributeError as error:
            raise UserError(f"_target_ '{target}' does not exist: {error}") from error
    # An imported name (worldmodels.hardware.os) must not open a door to its own module: ask where it was defined.
    if not callable(factory) or not f"{getattr(factory, '__module__', '')}.".startswith(TRUSTED):
        raise UserError(
            f"_target_ '{target}' is not trusted; allowed are classes and functions of {', '.join(TRUSTED)}"
        )
    try:
        return factory(**arguments)
    except TypeError as error:
        # of the target, or of a part of it that is built from a nested dict
        if re.search(rf"^(\w+\.__init__|{name})\(\) (got|missing|takes) ", str(error)):
            raise UserError(f"wrong settings for {target}: {error}") from error
        raise


def build_policy(
    model: Mapping[str, Any],
    card: Mapping[str, Any],
    actions: Sequence[int] | Mapping[str, Sequence[int]],
    kind: str = "policy",
) -> Any:
    """The policy that `model` describes, for frames as those of the dataset card.

    Args:
        model: settings for `build`, with those of its heads among them.
        card: of the log that it learns from.
        actions: indices into the 18-action set that it may take, or those of each game by its name.
        kind: of `HEADS`.

    Raises:
        UserError: the settings build nothing or another kind, or the frames are not square.
    """
    settings, obs = dict(model), card["obs"]
    if obs["height"] != obs["width"]:
        raise UserError(
            f"a {kind} sees square frames but the store's are {obs['height']}x{obs['width']}: give data.transform.size"
        )
    names, choices = HEADS[kind]
    if not set(names) <= set(settings):
        raise UserError(f"model {settings.get('_target_')} is no {kind}; give model={choices}")
    heads = {name: functools.partial(build, settings.pop(name)) for name in names}
    return build(settings, image_channels=obs["channels"], image_size=obs["height"], actions=actions, **heads)


def sized(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a model with `sizes[size]` merged in, and `size` and `sizes` gone.

    A part of a size that has a `_target_` is whole: nothing is left of what another would have been built from.
    """
    cfg = dict(plain(cfg))
    sizes, size = cfg.pop("sizes", {}), cfg.pop("size", None)
    if size is None:
        return cfg
    if size not in sizes:
        raise UserError(f"model.size={size} is unknown; choose one of {', '.join(sizes)}")
    whole = [name for name, part in sizes[size].items() if isinstance(part, Mapping) and "_target_" in part]
    return plain(OmegaConf.merge({k: v for k, v in cfg.items() if k not in whole}, sizes[size]))


def command(
    config_name: str, more: Callable[[Sequence[str]], Sequence[str]] = lambda given: ()
) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """Decorator of a command's `main(cfg)`: reads the command line by Hydra and ends with a sentence, not a traceback.

    Exit codes: 0 done, 2 the user's mistake, 130 interrupted, 1 a defect of ours (with the traceback).

    Args:
        config_name: of the yaml with its settings.
        more: overrides that follow from those that are given.
    """

    def decorate(main: Callable[[DictConfig], Any]) -> Callable[[], None]:
        @functools.wraps(main)
        def task(cfg: DictConfig) -> None:
            with sentences(config_name):  # in here already: Hydra prints a line of its own about what passes it
                check(cfg)
                main(cfg)

        run = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=config_name)(task)

        @functools.wraps(main)
        def guarded() -> None:
            os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands every exception on, and prints none
            with sentences(config_name):
                sys.argv += more(sys.argv[1:])
                run()

        return guarded

    return decorate


def check(cfg: DictConfig) -> None:
    """Refuse settings that no command can work with.

    Raises:
        UserError: a setting is empty, or a number of `WHOLE` is not whole or too small.
    """
    if empty := [name for name, value in OmegaConf.to_container(cfg).items() if value == ""]:  # pyrefly: ignore
        raise UserError(f"the setting '{empty[0]}' is empty; give it as {empty[0]}=...")
    for name, least in WHOLE.items():
        value = OmegaConf.select(cfg, name)
        numbers = list(value) if OmegaConf.is_list(value) else [value]
        if value is not None and (not numbers or any(type(n) is not int or n < least for n in numbers)):
            raise UserError(f"{name}={value} must be a whole number of at least {least}")


@contextmanager
def sentences(config_name: str) -> Iterator[None]:
    """Turn a user's mistake into one line on stderr and exit code 2, and Ctrl-C into 130."""
    try:
        yield
    except UserError as error:
        _fail(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        _fail(_explain(error, config_name))
    except BrokenPipeError:  # the reader of `worldmodels ... | head` has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        if (sentence := refusal(error)) is None:
            raise
        _fail(sentence)
    except KeyboardInterrupt:
        _interrupted()
    except Exception as error:
        if _covers_interrupt(error):
            _interrupted()
        if (sentence := _mistyped(config_name)) is None:
            raise
        _fail(sentence)


def _interrupted() -> None:
    print("worldmodels: interrupted; the same command goes on from what is saved", file=sys.stderr)
    sys.exit(130)


def _covers_interrupt(error: BaseException | None) -> bool:
    """Whether a library's cleaning up has raised it over a Ctrl-C, as zipfile's does where a member is still open."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def _fail(sentence: str) -> None:
    print("worldmodels: " + " ".join(sentence.split()), file=sys.stderr)
    sys.exit(2)


def _mistyped(config_name: str) -> str | None:
    """Names the setting whose value is of another kind than its default, which is then to blame for an exception."""
    for group, _, value in (argument.partition("=") for argument in _groups_chosen()):
        if value == "null":
            choices = sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))
            return f"{group}=null chooses no file of settings; leave it out, or choose one of {', '.join(choices)}"
    try:
        usual = dotted(_compose(config_name, _groups_chosen()))
        given = dotted(_compose(config_name, [a for a in sys.argv[1:] if "=" in a and not a.startswith("-")]))
    except HydraException:
        return None
    for name, value in given.items():
        if _kind(usual.get(name)) in (bool, float, list) and _kind(value) not in (_kind(usual[name]), dict):
            return f"{name}={value} does not work; by default it is {name}={usual[name]}"
    return None


def _kind(value: Any) -> type:
    return bool if isinstance(value, bool) else float if isinstance(value, int | float) else type(value)


def _explain(error: Exception, config_name: str) -> str:
    text = str(error)
    if isinstance(error, OverrideParseException):
        return f"cannot read '{error.override}'; settings are written key=value, e.g. out=runs/first"
    if found := re.search(r"Could not override '\+*([^']+)'|Could not delete from config\. '([^']+)'", text):
        key = found.group(1) or found.group(2)
        near = difflib.get_close_matches(key, valid_overrides(config_name), n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'?" if near else f"`worldmodels {config_name} --help` lists them"
        return f"unknown setting '{key}'; {hint}"
    if found := re.search(
        r"Could not find '([^']+)/([^'/]+)'.*Available options in '[^']*':\s*(.*?)(\n\S|$)", text, re.S
    ):
        group, wrong, choices = found.group(1), found.group(2), found.group(3).split()
        near = difflib.get_close_matches(wrong, choices, n=1)
        hint = f"did you mean '{near[0]}'? There are" if near else "there are"
        return f"unknown {group} '{wrong}'; {hint}: {', '.join(choices)}"
    if found := re.search(r"[Mm]issing mandatory value: (\S+)", text):
        return f"the setting '{found.group(1)}' is missing; give it as {found.group(1)}=..."
    return text


def valid_overrides(config_name: str) -> list[str]:
    """Every dotted setting and every group of a command, with the groups that were chosen on the command line."""
    try:
        cfg = _compose(config_name, _groups_chosen())
    except HydraException:
        cfg = _compose(config_name, [])
    return [*_groups(), *dotted(cfg)]


def _groups() -> list[str]:
    return sorted(path.name for path in conf_dir().iterdir() if path.is_dir())


def _groups_chosen() -> list[str]:
    return [argument for argument in sys.argv[1:] if argument.partition("=")[0] in _groups()]


def _compose(config_name: str, overrides: list[str]) -> DictConfig:
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        return hydra.compose(config_name, overrides)


def dotted(cfg: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings as `{"model.size": value}`, with the groups themselves as well; nothing is resolved."""
    nested: Any = OmegaConf.to_container(cfg) if OmegaConf.is_config(cfg) else cfg
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat[f"{prefix}{key}"] = value
        if isinstance(value, Mapping):
            flat |= dotted(value, f"{prefix}{key}.")
    return flat
