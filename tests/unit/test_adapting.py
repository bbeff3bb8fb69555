"""Each way of adapting trains what it says; adapters merge exactly; budgets are kept; classes are kept."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from tests.conftest import ROOT, write_catch
from tests.unit.test_muzero import muzero
from worldmodels.commands._moving import _greatest_reward
from worldmodels.config import build, plain, sized
from worldmodels.data.datamodule import StoreDataModule
from worldmodels.data.few_shot import few_shot
from worldmodels.data.mixing import Mixture
from worldmodels.data.store import Store
from worldmodels.data.transforms import Transform
from worldmodels.evaluation.adaptation import compare, forgotten
from worldmodels.learners.adapting import METHODS, checked, fit_rewards, layers, restrict
from worldmodels.learners.run_folder import clear
from worldmodels.learners.world_model import WorldModelLearner
from worldmodels.models.frames import to_float
from worldmodels.models.growing import regrown
from worldmodels.models.reward import RewardModel
from worldmodels.nn.unet import AdaGroupNorm, SelfAttention
from worldmodels.portable.adapter import merged, weights_digest
from worldmodels.types import Segment, UserError

MODEL = plain(OmegaConf.load(ROOT / "conf" / "model" / "diffusion.yaml"))
SMALL = {"cond_channels": 32, "channels": [32], "dilations": [1, 2], "patch": 4}
LEVELS = {"channels": [32, 32], "depths": [1, 1], "attention": [False, True]}


def settings(backbone: str = "dilated") -> dict[str, Any]:
    """The tiny model, made smaller still, for Catch of 20x20."""
    model = sized(MODEL | {"image_size": 20})
    network = model["denoiser"]["network"] | SMALL | {"backbone": backbone}
    model["denoiser"] |= {"network": network, "memory": model["denoiser"]["memory"] | {"hidden": 16}}
    if backbone != "dilated":
        model["denoiser"]["network"] = {k: v for k, v in network.items() if k != "dilations"} | LEVELS
    if backbone == "unet2d":
        model["denoiser"] |= {"memory": None}
    model["reward_model"] |= {"lstm": 32, "projection": 16}
    return model


@pytest.fixture(scope="module")
def batch(catch_store: Path) -> Segment:
    return Store.open(catch_store).read(np.array([[k, -3] for k in range(8)]), 7)


@pytest.mark.parametrize("kind", ["dilated", "unet", "unet2d", "small", "paper"])
@pytest.mark.parametrize("games", [None, {"unknown": 0.1, "actions": {"catch": [0, 3, 4]}}])
def test_stages_hold_every_weight_once(kind: str, games: dict[str, Any] | None) -> None:
    given = sized(MODEL | {"size": kind}) if kind in ("small", "paper") else settings(kind)
    model = build(given | {"games": games})
    found = [id(p) for parts in model.stages().values() for stage in parts for part in stage for p in part.parameters()]
    assert sorted(found) == sorted(map(id, model.parameters()))
    assert list(model.stages()) == list(model.components())


@pytest.mark.parametrize("method", METHODS)
def test_a_step_changes_what_the_method_trains(method: str, batch: Segment) -> None:
    if method == "lora":
        pytest.importorskip("peft")
    torch.manual_seed(0)
    learner = WorldModelLearner(settings(), adapt={"method": method, "rank": 2}, lr=0.1)
    for parameter in learner.model.parameters():  # what begins at zero would let nothing through
        torch.nn.init.normal_(parameter, std=0.05)
    before = {name: p.detach().clone() for name, p in learner.model.named_parameters()}
    optimizer = torch.optim.SGD([p for group in learner.configure_optimizers()["optimizer"].param_groups
                                 for p in group["params"]], lr=0.1)  # fmt: skip
    learner.model.loss(batch, torch.Generator().manual_seed(0))[0].backward()
    optimizer.step()
    changed = {name for name, p in learner.model.named_parameters() if not torch.equal(p, before[name])}
    heads = {"denoiser.network.conv_out.", "denoiser.network.norm_out.", "reward_model.head.", "reward_model.foreseen."}
    allowed = {
        "full": lambda name: True,
        "heads": lambda name: name.startswith(tuple(heads)),
        "bias": lambda name: ".bias" in name or "norm_out" in name or "projection.1" in name,
        "lora": lambda name: ".lora_" in name or ".bias" in name or "norm_out" in name or "projection.1" in name
        or "embedding" in name,
    }[method]  # fmt: skip
    for name in before:
        assert (name in changed) == bool(allowed(name)), name
    assert {n for n, p in learner.model.named_parameters() if p.requires_grad} == changed


@pytest.mark.parametrize("backbone", ["dilated", "unet"])
def test_merging_gives_what_the_adapter_gives(batch: Segment, backbone: str) -> None:
    pytest.importorskip("peft")
    torch.manual_seed(1)
    model, plain_model = build(settings(backbone)), build(settings(backbone))
    restrict(model, given := checked({"method": "lora", "rank": 3, "alpha": 5.0}))
    for name, parameter in model.named_parameters():
        if ".lora_B" in name or "conv_out" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    plain_model.load_state_dict(merged(model.state_dict(), given["alpha"] / given["rank"]))
    wrapped = [module for module in model.modules() if hasattr(module, "lora_A")]
    kinds = {type(module.base_layer) for module in wrapped}
    assert kinds == {torch.nn.Conv2d, torch.nn.Linear}
    if backbone == "dilated":
        assert any(module.base_layer.dilation == (2, 2) for module in wrapped if hasattr(module.base_layer, "dilation"))
        assert isinstance(model.denoiser.network.unet.blocks[0].norm1, AdaGroupNorm)
    else:
        attending = [module for module in model.denoiser.modules() if isinstance(module, SelfAttention)]
        assert attending and all(hasattr(m.qkv, "lora_A") and hasattr(m.out, "lora_A") for m in attending)

    def outputs(model: Any) -> list[torch.Tensor]:
        images, draw = to_float(batch.obs), torch.Generator().manual_seed(0)
        context, noisy = images[:, :4], torch.randn(8, 3, 20, 20, generator=draw)
        with torch.no_grad():
            memory = model.denoiser.memory(images, batch.mask)
            given = (noisy, torch.full((8,), 0.5), context, batch.action[:, :4], context[:, -1])
            frame, _ = model.denoiser.predict(*given, memory=memory)
            reward, end, _ = model.reward_model.predict(images[:, :-1], images[:, 1:], batch.action)
        return [frame, reward, end]

    found = outputs(model)
    for ours, theirs in zip(outputs(plain_model), found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    for module in wrapped:
        module.merge()  # peft's own
    own = {name.replace(".base_layer.", "."): value for name, value in model.state_dict().items()}
    for name, value in plain_model.state_dict().items():
        torch.testing.assert_close(value, own[name], atol=1e-6, rtol=0)


def test_low_rank_changes_leave_no_layer_of_a_symmetry_out() -> None:
    """Those of group convolutions are refused; a denoiser that is averaged over a group has plain ones."""
    given = checked({"method": "lora", "rank": 2})
    for method in METHODS:
        model = muzero("model.symmetry=flip_lr", actions=[0, 3, 4])
        if method == "lora":
            with pytest.raises(UserError, match="method=lora changes .*; give method=full, heads or bias"):
                restrict(model, given)
            assert all(parameter.requires_grad for parameter in model.parameters())
        else:
            restrict(model, checked({"method": method}))
    pytest.importorskip("peft")
    wrapped = []
    for symmetry in ("none", "flip_lr"):
        restrict(model := build(settings() | {"symmetry": symmetry}), given)
        wrapped.append([name for name, module in model.named_modules() if hasattr(module, "lora_A")])
    assert wrapped[0] == wrapped[1] and wrapped[0]


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r'pip install "worldmodels\[lora\]" brings it'):
        restrict(build(settings()), checked({"method": "lora"}))


def test_stages_learn_slower_the_further_they_are_from_the_output() -> None:
    learner = WorldModelLearner(settings(), lr={"denoiser": 1.0, "reward_model": 0.1}, adapt={"layer_decay": 0.5})
    rates = {}
    for group in learner.configure_optimizers()["optimizer"].param_groups:
        rates |= {id(p): group["initial_lr"] for p in group["params"]}
    network = learner.model.denoiser.network
    assert len(rates) == len(list(learner.model.parameters()))
    assert rates[id(network.conv_out.weight)] == 1.0
    assert rates[id(network.unet.blocks[1].conv1.weight)] == 0.5
    assert rates[id(network.unet.blocks[0].conv1.weight)] == 0.25
    assert rates[id(network.conv_in.weight)] == rates[id(network.action_embedding.weight)] == 0.125
    assert rates[id(learner.model.denoiser.memory.output[0].weight)] == 0.125
    assert rates[id(learner.model.reward_model.lstm.weight_ih_l0)] == 0.05
    assert len(list(layers(learner.model, 1.0))) == 2


def test_weights_are_drawn_to_where_they_began(batch: Segment) -> None:
    learner = WorldModelLearner(settings(), adapt={"l2_start": 2.0})
    weights = {name: value.clone() for name, value in learner.model.state_dict().items()}
    learner.begin(weights)
    assert learner._start is not None and learner._start.distance(learner.model) == 0
    with torch.no_grad():
        learner.model.denoiser.network.conv_in.bias += 0.5
    distance = learner._start.distance(learner.model)
    assert distance.item() == pytest.approx(0.5 * 0.25 * 32)
    distance.backward()
    torch.testing.assert_close(learner.model.denoiser.network.conv_in.bias.grad, torch.full((32,), 0.5))
    assert not any("start" in name for name in learner.state_dict())


def test_new_classes_of_reward_leave_the_old_ones_as_they_were() -> None:
    model = settings()
    old = build(model)
    torch.nn.init.normal_(old.reward_model.head[2].weight)
    assert fit_rewards(model, 16383.0) == model
    new = build(more := fit_rewards(model, 40_000.0))
    new.load_state_dict(regrown(old.state_dict(), {"model": model}, {"model": more}))
    a, b = old.reward_model, new.reward_model
    assert b.bins.max() == 65535 and len(b.bins) == len(a.bins) + 4
    place = {float(v): k for k, v in enumerate(b.bins)}
    now = [place[float(v)] for v in a.bins]
    x = torch.randn(5, 32)
    torch.testing.assert_close(b.head(x)[:, now], a.head(x)[:, : len(a.bins)])
    torch.testing.assert_close(b.head(x)[:, len(b.bins) :], a.head(x)[:, len(a.bins) :])
    signs = model | {"reward_model": model["reward_model"] | {"rewards": "sign"}}
    assert fit_rewards(signs, 1e6) == signs
    assert isinstance(a, RewardModel)


def test_a_budget_is_of_whole_episodes_of_the_train_split(catch_store: Path) -> None:
    store = Store.open(catch_store)
    split = few_shot(store, 43, 0.3, 0)
    used = np.concatenate([split["train"], split["validation"]])
    assert len(set(used)) == len(used) == 10 and len(split["validation"]) == 3
    assert store.lengths[used].sum() == 40 and np.isin(used, store.splits["train"]).all()
    np.testing.assert_array_equal(split["test"], store.splits["test"])
    assert (
        list(few_shot(store, 43, 0.3, 0)["train"]) == list(split["train"]) != list(few_shot(store, 43, 0.3, 1)["train"])
    )
    assert {len(v) for k, v in few_shot(store, 8, 0.9, 0).items() if k in ("train", "validation")} == {1}
    np.testing.assert_array_equal(split["lengths"], store.lengths)
    with pytest.raises(UserError, match="budget=7 holds no two whole episodes .* have 8 transitions"):
        few_shot(store, 7, 0.2, 0, least=4)
    data = StoreDataModule(str(catch_store), 4, 4, budget=43, validation_share=0.3)
    windows = data.train_dataloader().draws()
    drawn = {int(episode) for _ in range(50) for episode in next(windows).starts[:, 0]}
    assert data.splits is not None and drawn == set(data.splits["train"].tolist())


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Episodes of 59 transitions, with a reward in the last one alone."""
    return write_catch(tmp_path_factory.mktemp("long") / "s", steps=600, cells=60, size=60)


def test_a_budget_below_two_episodes_is_the_first_rows_of_two(long: Path) -> None:
    store = Store.open(long)
    assert (store.lengths == 59).all()
    split = few_shot(store, 50, 0.2, 0)
    (train,), (held,) = split["train"], split["validation"]
    assert train != held and {train, held} <= set(store.splits["train"])
    assert (split["lengths"][train], split["lengths"][held]) == (40, 10)
    others = np.delete(np.arange(len(store.lengths)), [train, held])
    assert (split["lengths"][others] == 59).all(), "the test split is as it was"
    for budget, share, least, want in ((50, 0.2, 16, (34, 16)), (100, 0.2, 1, (59, 41)), (100, 0.9, 1, (41, 59)),
                                       (2, 0.5, 1, (1, 1))):  # fmt: skip
        split = few_shot(store, budget, share, 0, least)
        assert tuple(int(split["lengths"][split[name][0]]) for name in ("train", "validation")) == want
    with pytest.raises(UserError, match="no 26 transitions of each of two"):
        few_shot(store, 50, 0.2, 0, least=26)
    assert len(few_shot(store, 118, 0.2, 0)["train"]) == 1 and (few_shot(store, 118, 0.2, 0)["lengths"] == 59).all()


def test_nothing_behind_a_budget_is_read(long: Path, catch_store: Path, tmp_path: Path) -> None:
    """Windows may run over the last row that is used, and are padded there as at an episode's end."""
    old = write_catch(tmp_path / "old", steps=100, cells=10, size=60)
    place: dict[str, Any] = {"left_padding": 3, "right_padding": 7, "event_share": 0.5, "validation": {"length": 8}}
    data = StoreDataModule(str(long), 8, 8, budget=50, replay={"store": str(old)}, **place)
    assert data.splits is not None
    (train,), (held,), store = data.splits["train"], data.splits["validation"], Store.open(long)
    drawn = list(zip(range(30), data.train_dataloader().draws(), strict=False))
    starts = np.concatenate([draw.starts[:6] for _, draw in drawn])
    assert set(starts[:, 0]) == {train} and (starts[:, 1].min(), starts[:, 1].max()) == (-3, 39)
    assert (starts[:, 1] == 39).mean() < 0.2, "no event lies behind the last row"
    batches = [batch.steps(0, 8) for batch, _ in zip(iter(data.train_dataloader()), range(30), strict=False)]
    for (_, draw), batch in zip(drawn, batches, strict=True):
        steps, new = torch.from_numpy(draw.starts[:6, 1:] + np.arange(9)), batch.rows(slice(6))
        whole = store.read(draw.starts[:6], 8)
        assert torch.equal(new.mask, (steps[:, :-1] >= 0) & (steps[:, :-1] < 40))
        assert torch.equal(new.next_mask, new.mask), "the frame after the last row is there"
        seen = (steps >= 0) & (steps <= 40)
        assert torch.equal(new.obs, whole.obs * seen[..., None, None, None])
        assert torch.equal(new.action, whole.action * new.mask) and not new.reward.any()
        assert batch.mask[6:].any(), "what is replayed is whole"
    assert any(batch.reward[6:].any() for batch in batches)
    windows = list(data.val_dataloader())
    assert sum(batch.batch_size for batch in windows) == 3 and all(batch.mask.all() for batch in windows)
    want = store.read(np.array([[held, 0], [held, 1], [held, 2]]), 8)
    assert torch.equal(windows[0].obs, want.obs)
    for name, value in (("ahead", 3), ("relabel", "future"), ("best_share", 0.5), ("weights", {"return": 1.0})):
        with pytest.raises(UserError, match=f"budget=50 holds no two whole episodes, which data.{name}"):
            StoreDataModule(str(long), 8, 8, budget=50, **{name: value}, **place)


def test_new_rewards_are_those_of_the_budget(long: Path, tmp_path: Path) -> None:
    with Store.create(tmp_path / "s", Store.open(long).card) as store:
        for i in range(len(Store.open(long).lengths)):
            episode = Store.open(long).episode(i)
            episode.reward[:] = 10.0 * (np.arange(59) + 1) + 1000 * i
            store.append(episode)
    store = Store.open(tmp_path / "s")
    cfg = OmegaConf.create({"data": {"validation_share": 0.2, "seed": 0, "validation": {"length": 8}}})
    for budget in (50, 130):
        split = few_shot(store, budget, 0.2, 0, 8)
        used = np.concatenate([split["train"], split["validation"]])
        want = max(10 * int(split["lengths"][i]) + 1000 * int(i) for i in used)
        assert _greatest_reward(cfg, store, budget) == want
    assert _greatest_reward(cfg, store, 50) < _greatest_reward(cfg, store, None)
    assert _greatest_reward(cfg, Store.open(long), None, [store]) == _greatest_reward(cfg, store, None)
    assert _greatest_reward(cfg, store, None) == 590 + 1000 * store.splits["train"].max()


def test_rewards_beyond_the_bins_are_refused(long: Path, tmp_path: Path) -> None:
    with Store.create(tmp_path / "s", Store.open(long).card) as store:
        for i in range(len(Store.open(long).lengths)):
            episode = Store.open(long).episode(i)
            episode.reward[-1] = -20_000
            store.append(episode)
    place: dict[str, Any] = {"length": 8, "batch_size": 4}
    learner = WorldModelLearner(settings(), horizons=(1,))
    learner.prepare(StoreDataModule(str(long), **place), resumed=False)
    for data in (StoreDataModule(str(tmp_path / "s"), **place),
                 StoreDataModule(str(long), replay={"store": str(tmp_path / "s")}, **place)):  # fmt: skip
        with pytest.raises(UserError, match=r"up to 20000, .* up to 16383: give \+model.reward_model.doublings=15$"):
            learner.prepare(data, resumed=False)
        wide = sized(MODEL | {"image_size": 60, "reward_model": {"doublings": 15}})
        WorldModelLearner(wide, horizons=(1,)).prepare(data, resumed=False)
    signs = settings()
    signs["reward_model"]["rewards"] = "sign"
    WorldModelLearner(signs, horizons=(1,)).prepare(StoreDataModule(str(tmp_path / "s"), **place), resumed=False)
    # what a budget leaves out is not learned
    few = StoreDataModule(str(tmp_path / "s"), budget=50, validation={"length": 8}, **place)
    learner.prepare(few, resumed=False)


def test_a_budget_is_of_each_game(catch_store: Path, tmp_path: Path) -> None:
    with Store.create(tmp_path / "other", Store.open(catch_store).card | {"game": "freeway"}) as other:
        for i in range(30):
            other.append(Store.open(catch_store).episode(i))
    both = Mixture([catch_store, tmp_path / "other"], Transform())
    split = few_shot(both, 20, 0.2, 0)
    games = both.games[np.concatenate([split["train"], split["validation"]])]
    assert (games == 0).sum() == (games == 1).sum() == 5
    assert len(split["validation"]) == 2


def test_a_share_of_every_batch_is_replayed(catch_store: Path, tmp_path: Path) -> None:
    other = write_catch(tmp_path / "other", steps=120, cells=10, size=20)
    options: dict[str, Any] = {"event_share": 0.5}
    data = StoreDataModule(str(other), 8, 4, replay={"store": str(catch_store), "share": 0.25}, **options)
    batches = [batch for batch, _ in zip(iter(data.train_dataloader()), range(3), strict=False)]
    for batch in batches:
        assert batch.batch_size == 8 and batch.side["store"].tolist() == [0] * 6 + [1] * 2
    alone = StoreDataModule(str(other), 6, 4, **options)
    torch.testing.assert_close(next(iter(alone.train_dataloader())).obs, batches[0].obs[:6])
    data._drawn = 2  # resumed
    assert torch.equal(next(iter(data.train_dataloader())).obs, batches[2].obs)
    assert next(iter(data.val_dataloader())).side.get("store") is None
    with pytest.raises(UserError, match="cannot go with data.priority.alpha"):
        StoreDataModule(str(other), 8, 4, replay={"store": str(catch_store)}, priority={"alpha": 0.6}, **options)


def test_the_digest_is_of_the_weights() -> None:
    weights = {"a": torch.ones(2), "b": torch.zeros(1)}
    assert weights_digest(weights) == weights_digest(dict(reversed(weights.items())))
    assert weights_digest(weights) != weights_digest(weights | {"a": torch.ones(2, 1)})
    assert weights_digest(weights) != weights_digest(weights | {"b": torch.full((1,), 1e-30)})


def test_beginning_again_leaves_no_points_of_before(tmp_path: Path) -> None:
    for folder in ("steps", "adapter"):
        (tmp_path / folder).mkdir()
    for name in ("config.yaml", "curve.json", "steps/000002.ckpt", "adapter/adapter.json"):
        (tmp_path / name).touch()
    clear(tmp_path)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["config.yaml"]
    assert not (tmp_path / "adapter").exists(), "it is of the method of before"


def test_what_a_start_is_worth() -> None:
    def point(db: float, validation: float) -> dict[str, Any]:
        return {"psnr_db": [db], "psnr_changed_db": [db], "psnr_gain_changed_db": [db - 5], "validation": validation}

    begun = {"new": {"psnr_changed_db": [7.0]}, "old": {"psnr_gain_changed_db": [4.0]}}
    tuned = {"points": {"10": point(12, 1), "20": point(11, 0.5)}, "seconds_a_step": 2.0, "trained": 1}
    scratch = {"points": {str(10 * k): point(8 + k, k) for k in range(1, 7)}, "seconds_a_step": 1.0, "trained": 4}
    found = compare({"finetuned": tuned, "scratch": scratch}, begun, point(8.8, 0), 20)
    assert found["finetuned"]["step"] == 10, "as its validation says"
    assert found["scratch_equal_steps"]["psnr_changed_db"] == [10]
    assert found["scratch_equal_seconds"]["step"] == 40
    assert (
        compare({"finetuned": tuned | {"seconds_a_step": 1.3}, "scratch": scratch}, begun, {}, 20)[
            "scratch_equal_seconds"
        ]["step"]
        == 30
    ), "the nearest that was judged"
    assert found["curves"]["finetuned"] == {"0": [7.0], "10": [12], "20": [11]}
    assert found["scratch_steps_to_reach"] == [40] and found["steps_ratio"] == [2.0]
    assert found["forgotten"] == [pytest.approx(0.05)] and found["trained_share"] == 0.25
    del scratch["points"]["40"], scratch["points"]["50"], scratch["points"]["60"]
    assert compare({"finetuned": tuned, "scratch": scratch}, begun, {}, 20)["steps_ratio"] == [None]
    assert forgotten([None, 0.0, 2.0], [1.0, 1.0, None]) == [None, None, None]
