"""The networks of policies: sizes as published, only allowed actions, memory that begins anew with an episode."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir

from tests.conformance import check_trained_policy, generator, random_segment
from tests.conftest import ROOT
from worldmodels.config import sized
from worldmodels.data.sources.catch_play import catch_card
from worldmodels.learners.policy import build_policy
from worldmodels.models.actor_critic import RecurrentPolicy
from worldmodels.types import UserError

CARD = catch_card(0)


def settings(*overrides: str) -> dict[str, Any]:
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        return sized(compose("train", [*overrides]).model)


@pytest.fixture(params=["actor_critic", "action_values"])
def build(request: pytest.FixtureRequest) -> Callable[[], RecurrentPolicy]:
    return partial(build_policy, settings(f"model={request.param}"), CARD, [0, 3, 4])


def test_conformance(build: Callable[[], RecurrentPolicy]) -> None:
    check_trained_policy(build, random_segment(3, 4, 3, 20))


def test_paper_has_the_published_number_of_parameters() -> None:
    card = CARD | {"obs": CARD["obs"] | {"height": 64, "width": 64}}
    policy = build_policy(settings("model=actor_critic", "model.size=paper", "head@model.head=mse"), card, range(18))
    assert sum(p.numel() for p in policy.parameters()) == 3_236_819


def test_padding_leaves_no_trace(build: Callable[[], RecurrentPolicy]) -> None:
    """A window that starts before its episode gives the features of the episode alone."""
    policy, segment = build(), random_segment(2, 6, 3, 20)
    policy.encoder.know(segment.obs[:, 0])
    assert policy.encoder.blank.any()
    mask, obs = segment.mask.clone(), segment.obs.clone()
    mask[:, :2], obs[:, :2] = False, 0
    padded = replace(segment, mask=mask, obs=obs)
    torch.testing.assert_close(policy.watch(padded)[:, 2:], policy.watch(segment.steps(2, 6)), atol=1e-5, rtol=1e-4)
    for name, value in policy.burn_in(padded).items():
        torch.testing.assert_close(value, policy.burn_in(segment.steps(2, 6))[name], atol=1e-5, rtol=1e-4)


def test_the_frame_after_a_cut_is_seen_where_the_log_has_it(build: Callable[[], RecurrentPolicy]) -> None:
    """In a window that goes on behind its episode; without the frame the mean frame stands for it."""
    policy, segment = build(), random_segment(2, 6, 3, 20)
    policy.encoder.know(segment.obs[:, 0])
    mask, obs = segment.mask.clone(), segment.obs.clone()
    mask[:, 4:], obs[:, 5:] = False, 0
    next_mask = mask.clone()
    next_mask[1, 3], obs[1, 4] = False, policy.encoder.blank
    alone = policy.watch(replace(segment.steps(0, 4), obs=obs[:, :5]))
    obs[1, 4] = 77  # whatever lies there
    longer = replace(segment, mask=mask, next_mask=next_mask, obs=obs)
    torch.testing.assert_close(policy.watch(longer)[:, :5], alone, atol=1e-5, rtol=1e-4)


def test_burn_in_is_the_memory_before_the_last_frame(build: Callable[[], RecurrentPolicy]) -> None:
    policy, segment = build(), random_segment(2, 5, 3, 20)
    features, _ = policy.encoder(segment.obs[:, -1], policy.burn_in(segment))
    torch.testing.assert_close(features, policy.watch(segment)[:, -1], atol=1e-5, rtol=1e-4)


def test_memory_can_be_set_where_a_row_begins_anew(build: Callable[[], RecurrentPolicy]) -> None:
    encoder, a, b = build().encoder, random_segment(1, 3, 3, 20, seed=1), random_segment(1, 3, 3, 20, seed=2)
    start = encoder.start(1)
    first, second = (encoder.features(encoder.stack(s.obs, start), start) for s in (a, b))
    stacks = torch.cat([encoder.stack(s.obs, start) for s in (a, b)], dim=1)
    fresh = torch.zeros(1, 8, dtype=torch.bool)
    fresh[0, 5] = True
    memory = torch.zeros(1, 8, 2 * encoder.lstm)
    memory[0, 5] = second[0, 0]
    # from the sixth frame on it goes on as the second play did after its first frame
    both = encoder.features(stacks, start, fresh, memory)
    torch.testing.assert_close(both[:, :4], first)
    torch.testing.assert_close(both[:, 5:], second[:, 1:])


def test_frames_that_are_seen_at_once_lie_a_gap_apart() -> None:
    model = settings("model=actor_critic", "model.sizes.tiny.encoder.frames=3", "model.sizes.tiny.encoder.gap=2")
    policy, obs = build_policy(model, CARD, [0, 3, 4]), random_segment(2, 7, 3, 20).obs
    stacks = policy.encoder.stack(obs, policy.start(2)).unflatten(2, (3, 3))
    assert torch.equal(stacks[:, 4:], torch.stack([obs[:, :-4], obs[:, 2:-2], obs[:, 4:]], dim=2))
    assert torch.equal(stacks[:, 0, 0], policy.encoder.blank.expand(2, -1, -1, -1))
    state = policy.start(2)
    for t in range(8):
        assert torch.equal(policy.encoder.stack(obs[:, t : t + 1], state)[:, 0], stacks[:, t].flatten(1, 2))
        _, state = policy.encoder(obs[:, t], state)


def test_without_a_memory_the_last_frames_decide() -> None:
    model = settings("model=actor_critic", "model.sizes.tiny.encoder.memory=false")
    policy, segment = build_policy(model, CARD, [0, 3, 4]), random_segment(2, 6, 3, 20)
    check_trained_policy(lambda: build_policy(model, CARD, [0, 3, 4]), random_segment(3, 4, 3, 20))
    other = replace(segment, obs=segment.obs.clone())
    other.obs[:, 2] += 1
    same = (policy.watch(segment) == policy.watch(other)).all(-1)
    assert same.tolist() == [[True, True, False, True, False, True, True]] * 2, "two frames are seen at once"
    later = policy.watch(segment, 3)
    assert torch.equal(later[:, 3:], policy.watch(segment)[:, 3:]) and not later[:, :3].any()
    with pytest.raises(UserError, match="model.encoder.memory=1 must be true or false"):
        build_policy(model | {"encoder": model["encoder"] | {"memory": 1}}, CARD, [0])


def test_a_pixel_is_what_it_differs_from_its_mean() -> None:
    encoder = build_policy(settings("model=actor_critic"), CARD, [0]).encoder
    frames = torch.full((100, 3, 20, 20), 200, dtype=torch.uint8)
    frames[::2, 0, 3, 4] = 0
    encoder.know(frames)
    seen: list[torch.Tensor] = []
    encoder.look[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    encoder.features(encoder.stack(frames[:1, None], encoder.start(1)), encoder.start(1))
    now = torch.nn.functional.pixel_shuffle(seen[0], 4)[0, 3:]  # the second of two frames
    other = now.clone()
    other[0, 3, 4] = 0
    assert now[0, 3, 4].item() == pytest.approx(-(100 / 255) / (100 / 255 + 0.1), rel=1e-2)
    assert other.abs().max() < 1e-5
    again = build_policy(settings("model=actor_critic"), CARD, [0]).encoder
    again.load_state_dict(encoder.state_dict())
    assert torch.equal(again.mean, encoder.mean)


def test_temperature() -> None:
    policy = build_policy(settings("model=actor_critic"), CARD, [0, 3, 4])
    torch.nn.init.normal_(policy.actor.weight)  # pyrefly: ignore
    features = torch.randn(1, policy.encoder.lstm).expand(4000, -1)
    chances = policy.preferences(features[:1]).softmax(-1)[0]
    drawn = torch.bincount(policy.draw(features, generator()), minlength=18) / 4000
    torch.testing.assert_close(drawn, chances, atol=0.03, rtol=0)
    policy.temperature = 0.0
    assert (policy.draw(features[:5]) == chances.argmax()).all()


def test_what_does_not_fit_is_told_in_a_sentence() -> None:
    model = settings("model=actor_critic")
    policy = build_policy(model, CARD, [0, 3, 4])
    with pytest.raises(UserError, match=r"frames \(3, 20, 20\) uint8.*got \(1, 20, 20\)"):
        policy.act(torch.zeros(1, 1, 20, 20, dtype=torch.uint8), policy.start(1))
    with pytest.raises(UserError, match="must be indices 0 to 17"):
        build_policy(model, CARD, [18])
    with pytest.raises(UserError, match="square"):
        build_policy(model, CARD | {"obs": CARD["obs"] | {"width": 40}}, [0])
    with pytest.raises(UserError, match="give model=actor_critic"):
        build_policy(settings("model=diffusion"), CARD, [0])
    with pytest.raises(UserError, match="patch=3 does not divide"):
        build_policy(model | {"encoder": model["encoder"] | {"patch": 3}}, CARD, [0])
    for name, wrong in (
        ("lstm", 0),
        ("channels", [0.5]),
        ("frames", 0),
        ("gap", 0),
        ("patch", 0),
        ("projection", -1),
    ):
        with pytest.raises(UserError, match=rf"model.encoder.{name}=.* must be whole"):
            build_policy(model | {"encoder": model["encoder"] | {name: wrong}}, CARD, [0])
    with pytest.raises(UserError, match="must be equally many"):
        build_policy(model | {"encoder": model["encoder"] | {"pools": [True, True]}}, CARD, [0])
