"""What every world model and every policy must pass. Call these from a test with a model of your own."""

from collections.abc import Callable

import torch
from torch import nn

from worldmodels.types import Policy, Segment, WorldModel


def random_segment(batch: int, length: int, channels: int, size: int, seed: int = 0, num_actions: int = 18) -> Segment:
    """A segment of noise, all rows real."""
    g = torch.Generator().manual_seed(seed)
    real = torch.ones(batch, length, dtype=torch.bool)
    return Segment(
        obs=torch.randint(0, 256, (batch, length + 1, channels, size, size), generator=g, dtype=torch.uint8),
        action=torch.randint(0, num_actions, (batch, length), generator=g),
        reward=torch.randint(-1, 2, (batch, length), generator=g).float(),
        terminated=torch.rand(batch, length, generator=g) < 0.1,
        truncated=torch.zeros(batch, length, dtype=torch.bool),
        mask=real,
        next_mask=real,
    )


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def check_world_model(build: Callable[[], nn.Module], segment: Segment) -> None:
    """All the checks; `build` makes the model, `segment` is one that it can be trained on."""
    torch.manual_seed(0)
    model = build()
    assert isinstance(model, WorldModel)
    check_loss(model, segment)
    check_generator_decides(model, segment)
    check_states_can_be_indexed(model, segment)
    check_row_alone(model, segment)
    check_save_and_load(build, model, segment)


def check_loss(model: nn.Module, segment: Segment) -> None:
    """Finite, differentiable, and it reaches every parameter."""
    loss, metrics = model.loss(segment, generator())
    assert loss.ndim == 0
    assert torch.isfinite(loss)
    assert all(torch.isfinite(v).all() and not v.requires_grad for v in metrics.values())
    model.zero_grad()
    loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert not without, f"no gradient reaches {without}"
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def check_generator_decides(model: nn.Module, segment: Segment) -> None:
    """The same generator gives the same loss and step whatever torch's global state is; another gives others."""
    losses, steps = [], []
    for seed, global_seed in ((1, 1), (1, 2), (2, 1)):
        torch.manual_seed(global_seed)
        losses.append(model.loss(segment, generator(seed))[0].item())
        steps.append(model.step(model.start(segment), segment.action[:, -1], generator(seed))[1])
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]
    assert torch.equal(steps[0].reward, steps[1].reward)
    if steps[0].frame is not None:
        assert steps[0].frame.dtype == torch.uint8
        assert torch.equal(steps[0].frame, steps[1].frame)


def check_states_can_be_indexed(model: nn.Module, segment: Segment) -> None:
    """Gathering rows of a state, then stepping, equals starting from those rows."""
    state = model.start(segment)
    assert all(v.shape[0] == segment.batch_size for v in state.values())
    rows = torch.tensor([1, 0])
    gathered, direct = {k: v[rows] for k, v in state.items()}, model.start(segment.rows(rows))
    assert gathered.keys() == direct.keys()
    action = segment.action[rows, -1]
    (_, a), (_, b) = (model.step(s, action, generator()) for s in (gathered, direct))
    torch.testing.assert_close(a.reward_mean, b.reward_mean, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(a.terminated_mean, b.terminated_mean, atol=1e-5, rtol=1e-4)


def check_row_alone(model: nn.Module, segment: Segment) -> None:
    """The first row of a batch equals that row alone, for the draws that a generator makes first."""
    alone = segment.rows(slice(0, 1))
    (_, a), (_, b) = (model.step(model.start(s), s.action[:, -1], generator()) for s in (segment, alone))
    torch.testing.assert_close(a.reward_mean[:1], b.reward_mean, atol=1e-4, rtol=1e-3)
    if a.frame is not None:
        # float sums in another order may move a pixel across the border between two of the 256 levels
        assert (a.frame[:1].int() - b.frame.int()).abs().max() <= 1


def check_save_and_load(build: Callable[[], nn.Module], model: nn.Module, segment: Segment) -> None:
    """A rebuilt model with the saved weights gives the same loss."""
    torch.manual_seed(1)
    other = build()
    other.load_state_dict(model.state_dict())
    assert other.loss(segment, generator())[0].item() == model.loss(segment, generator())[0].item()


def check_policy(policy: Policy, observation: torch.Tensor) -> None:
    """Actions in the 18-action set; states that can be indexed; a row as it is alone; the generator decides all."""
    assert isinstance(policy, Policy)
    n = len(observation)
    torch.manual_seed(1)
    first, state = policy.act(observation, policy.start(n), generator(3))
    second, _ = policy.act(observation, state, generator(4))
    torch.manual_seed(2)
    again, state = policy.act(observation, policy.start(n), generator(3))
    for action in (first, second):
        assert action.shape == (n,)
        assert action.dtype == torch.int64
        assert ((action >= 0) & (action < 18)).all()
    assert torch.equal(first, again)
    assert torch.equal(second, policy.act(observation, state, generator(4))[0])
    assert all(v.shape[0] == n for v in state.values())
    rows = torch.arange(n).flip(0)
    swapped = {k: v[rows] for k, v in state.items()}
    for k, v in policy.act(observation[rows], swapped, generator(4))[1].items():
        _, other = policy.act(observation, state, generator(4))
        if v.is_floating_point():
            torch.testing.assert_close(v, other[k][rows], atol=1e-5, rtol=1e-4)
    _, alone = policy.act(observation[:1], {k: v[:1] for k, v in policy.start(n).items()}, generator(3))
    for k, v in alone.items():
        torch.testing.assert_close(v, state[k][:1], atol=1e-5, rtol=1e-4)


def check_trained_policy(build: Callable[[], nn.Module], segment: Segment) -> None:
    """`check_policy`, and for a network: only allowed actions, what saving keeps, the same act by act and at once."""
    torch.manual_seed(0)
    policy = build().eval()
    for parameter in policy.parameters():  # what begins at zero would make all frames alike
        nn.init.normal_(parameter, std=0.1)
    frames = segment.obs[:, 0]
    check_policy(policy, frames)
    for k in range(20):
        assert policy.legal[policy.act(frames, policy.start(len(frames)), generator(k))[0]].all()
    torch.manual_seed(1)
    other = build().eval()
    other.load_state_dict(policy.state_dict())
    features, state = policy.watch(segment), policy.start(segment.batch_size)
    torch.testing.assert_close(other.watch(segment), features)
    torch.testing.assert_close(other.preferences(features), policy.preferences(features))
    for t in range(segment.length + 1):
        seen, state = policy.encoder(segment.obs[:, t], state)
        torch.testing.assert_close(seen, features[:, t], atol=1e-5, rtol=1e-4)
