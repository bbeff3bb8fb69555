"""An agent of DIAMOND's public code, imported: its outputs, its actions by name, and files that are none.

The fixture, a tiny agent of Breakout and what the public code makes of some inputs, was written by
`python -m benchmarks.diamond_weights --reference CHECKOUT --fixture tests/fixtures`.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.diamond_weights import apart, imported, ours_of
from worldmodels.data.card import make_card
from worldmodels.data.sources.reading import game_of, minimal_actions
from worldmodels.data.store import Store
from worldmodels.evaluation.scores import game_facts
from worldmodels.learners.world_model import load_learner
from worldmodels.portable.diamond import convert, read_agent
from worldmodels.portable.folder import load_model
from worldmodels.types import ACTIONS, Episode, UserError

RUN = Callable[..., tuple[int, str, str]]
AGENT = Path(__file__).parents[1] / "fixtures" / "diamond_agent_tiny.pt"
OWN = [0, 1, 3, 4]  # NOOP, FIRE, RIGHT and LEFT, as DIAMOND numbers Breakout's
PUBLISHED = (
    "Alien Amidar Assault Asterix BankHeist BattleZone Boxing Breakout ChopperCommand CrazyClimber DemonAttack Freeway "
    "Frostbite Gopher Hero Jamesbond Kangaroo Krull KungFuMaster MsPacman Pong PrivateEye Qbert RoadRunner Seaquest "
    "UpNDown"
).split()


def outputs(part: str) -> dict[str, torch.Tensor]:
    tensors = load_file(AGENT.with_suffix(".safetensors"))
    return {name.removeprefix(f"{part}."): value for name, value in tensors.items() if name.startswith(f"{part}.")}


def test_every_output_is_that_of_the_public_code(tmp_path: Path) -> None:
    given, expected = outputs("given"), outputs("expected")
    noise = torch.randn(given["noise"].shape, generator=torch.Generator().manual_seed(1))
    assert torch.equal(noise, given["noise"]), "this torch draws other numbers, so that frames cannot be compared"
    differences = apart(ours_of(*imported(AGENT, "breakout", tmp_path), given), expected)
    assert len(differences) == 11
    assert differences.pop("frame_share_of_levels_that_differ") < 2e-3
    assert max(differences.values()) < 1e-5, differences
    # no output is so small that it would be right by being nothing
    assert all(expected[name].abs().max() > 0.02 for name in differences)


def test_actions_are_moved_by_their_names() -> None:
    theirs, models = read_agent(AGENT), convert(AGENT, "Breakout")
    (world, weights), (policy, actor) = models["world_model"], models["policy"]
    for ours, name in (
        ("denoiser.network.action_embedding.weight", "denoiser.inner_model.act_emb.0.weight"),
        ("reward_model.action_embedding.weight", "rew_end_model.act_emb.weight"),
    ):
        assert torch.equal(weights[ours][OWN], theirs[name])
        others = [a for a in range(len(ACTIONS)) if a not in OWN]
        assert (weights[ours][others] == theirs[name][0]).all(), "what the game has not does nothing"
    assert torch.equal(actor["actor.bias"][OWN], theirs["actor_critic.actor_linear.bias"])
    for about in (world, policy):
        assert about["actions"] == {"vocabulary": ACTIONS, "legal": OWN}
        assert about["card"]["action_set"] == OWN
    assert (world["kind"], policy["kind"]) == ("world model", "policy")


def test_the_policy_takes_the_games_own_actions_alone(tmp_path: Path) -> None:
    _, policy = imported(AGENT, "breakout", tmp_path)
    frames = torch.randint(0, 256, (500, 3, 16, 16), dtype=torch.uint8)
    action, _ = policy.act(frames, policy.start(500), torch.Generator().manual_seed(0))
    assert set(action.tolist()) == set(OWN)


def test_the_published_games_are_known_by_their_files_names() -> None:
    actions = {name: game_facts(game_of(name, "x"))["actions"] for name in PUBLISHED}
    assert all(own[0] == 0 for own in actions.values()), "what DIAMOND pads with is NOOP"
    assert {len(actions[name]) for name in ("Breakout", "Freeway", "Pong", "Alien")} == {3, 4, 6, 18}
    assert minimal_actions("breakout") == OWN == actions["Breakout"]


def _changed(change: Callable[[dict], dict]) -> Callable[[Path], None]:
    return lambda path: torch.save(change(dict(torch.load(AGENT, weights_only=True))), path)


def _without(weights: dict, *names: str) -> dict:
    return {name: value for name, value in weights.items() if name not in names}


class _Evil:
    def __reduce__(self) -> tuple:
        return (print, ("this must never run",))


CONV, EMBEDDING = "denoiser.inner_model.conv_in.weight", "denoiser.inner_model.act_emb.0.weight"
FAULTS = {
    "no checkpoint at": lambda path: None,
    "more than tensors": lambda path: torch.save({"denoiser": _Evil()}, path),
    "truncated or damaged": lambda path: path.write_bytes(AGENT.read_bytes()[:5000]),
    "is no state_dict": _changed(lambda w: {"agent": w}),
    "it lacks 'actor_critic.actor_linear.bias'": _changed(lambda w: _without(w, "actor_critic.actor_linear.bias")),
    "it lacks 'denoiser.inner_model.act_emb": _changed(lambda w: _without(w, EMBEDDING) | {"act": w[EMBEDDING]}),
    r"Missing key\(s\).*conv_in": _changed(lambda w: _without(w, CONV)),
    r"Unexpected key\(s\).*upsampler": _changed(lambda w: w | {"upsampler.weight": torch.zeros(2)}),
    "size mismatch": _changed(lambda w: w | {CONV: w[CONV][:, :-1]}),
    "other shapes": _changed(lambda w: w | {"rew_end_model.lstm.weight_ih_l0": torch.zeros(3)}),
    r"other shapes \(len": _changed(lambda w: w | {"actor_critic.actor_linear.bias": torch.tensor(1.0)}),
    r"other shapes \(.*zero": _changed(lambda w: w | {EMBEDDING: torch.zeros(4, 0)}),
}


@pytest.mark.parametrize("sentence", FAULTS)
def test_what_is_no_agent_is_refused(sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "Breakout.pt"
    FAULTS[sentence](path)
    with pytest.raises(UserError, match=sentence):
        convert(path)
    assert "never run" not in capsys.readouterr().out


def random_store(path: Path) -> Path:
    """Twelve episodes of noise on Breakout's card, 16x16."""
    rng = np.random.default_rng(0)
    card = make_card("recording", "breakout", {"height": 16, "width": 16, "channels": 3}, noop_max=30)
    with Store.create(path, card) as store:
        for _ in range(12):
            ended = np.arange(20) == 19
            frames = rng.integers(0, 256, (21, 16, 16, 3), np.uint8)
            action, reward = rng.choice(OWN, 20).astype(np.uint8), rng.integers(-1, 2, 20).astype(np.float32)
            store.append(Episode(frames[:-1], action, reward, ended, ended & False, ended & False, frames[-1]))
    return path


def test_an_agent_is_imported_dreamed_with_scored_and_moved_on(in_process: RUN, tmp_path: Path) -> None:
    store, agent, out = random_store(tmp_path / "store"), tmp_path / "Breakout.pt", tmp_path / "agent"
    shutil.copy(AGENT, agent)
    for printed in (f"{out / 'policy'}\n", "lies there already"):
        code, told, err = in_process("import-diamond", f"agent={agent}", f"out={out}")
        assert code == 0 and printed in told, err
    readme = (out / "world_model" / "README.md").read_text()
    assert "Alonso et al. 2024" in readme and "NOOP, FIRE, RIGHT, LEFT" in readme and "Nothing was recorded." in readme
    model = f"checkpoint={out / 'world_model'}"
    tiny = ["logger=csv", "trainer.accelerator=cpu", "trainer.max_steps=1", "data.validation.windows=2"]
    tiny += ["data.validation.length=8", "learner.horizons=[1,2]", "data.batch_size=2", "data.length=8"]
    for name, line in {
        "dreams": ["imagine", model, f"store={store}", "horizon=2", "burn_in=4", "rollouts=2", "shown=1"],
        "moved": ["finetune", model, f"store={store}", *tiny, "data.left_padding=0", "scratch=false", "windows=2",
                  "horizons=[1]", "burn_in=4", "compile=false", "data.event_share=0"],
        "scored": ["evaluate", f"checkpoint={out / 'policy'}", "episodes=1", "slots=1", "protocol.time_limit=30",
                   "films=0"],
    }.items():  # fmt: skip
        code, _, err = in_process(*line, f"out={tmp_path / name}")
        assert code == 0, err
    scored = json.loads((tmp_path / "scored" / "metrics.json").read_text())
    assert (scored["game"], scored["agent"]) == ("breakout", "policy")
    moved = load_learner(tmp_path / "moved" / "finetuned" / "best.ckpt").model.state_dict()
    begun = load_model(out / "world_model")[0].state_dict()
    assert 0 < max((moved[name] - begun[name]).abs().max() for name in begun) < 1e-2, "one step from where it was"


def test_mistakes_end_in_one_sentence(in_process: RUN, tmp_path: Path) -> None:
    agent, other = tmp_path / "Breakout.pt", tmp_path / "agent_epoch_01000.pt"
    for path in (agent, other):
        shutil.copy(AGENT, path)
    for name, part in (("full", "world_model"), ("half", "policy")):
        (tmp_path / name / part).mkdir(parents=True)
        (tmp_path / name / part / "mine.txt").write_text("kept")
    for line, part in (
        ([f"agent={agent}", "game=pong"], "is for 4 actions but pong has 6"),
        ([f"agent={other}"], "'agent_epoch_01000' is no game of ale-py; name it with game=..."),
        ([f"agent={agent}", "game=catch"], "'catch' is no game of ale-py"),
        ([f"agent={agent}", "game.name=adventure"], "'adventure' is unknown and cannot be played"),
        ([f"agent={agent}", f"out={tmp_path / 'full'}"], "holds something else"),
        ([f"agent={agent}", f"out={tmp_path / 'half'}"], "holds something else"),
    ):
        out = tmp_path / "out"
        code, _, err = in_process("import-diamond", f"out={out}", *line)
        assert (code, err.count("\n")) == (2, 1) and part in err, err
        assert not out.exists()
    assert [p.name for p in (tmp_path / "full").rglob("*")] == ["world_model", "mine.txt"]
    assert [p.name for p in (tmp_path / "half").rglob("*")] == ["policy", "mine.txt"]
    code, _, err = in_process("import-diamond", f"agent={other}", "game=breakout", f"out={tmp_path / 'named'}")
    assert code == 0, err
