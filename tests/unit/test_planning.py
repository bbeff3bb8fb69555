"""Searches over small exact models: what they find, and that both backends grow the same trees."""

import functools
import inspect
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from tests.conformance import check_policy
from worldmodels.config import build, conf_dir, plain
from worldmodels.planning.gumbel import considered_visits, gumbel_noise, gumbel_search
from worldmodels.planning.one_step import one_step_search
from worldmodels.planning.policy import SearchPolicy
from worldmodels.planning.prior import prior_search
from worldmodels.planning.puct import dirichlet_noise, puct_search
from worldmodels.planning.sampled import sampled_logits, sampled_search
from worldmodels.planning.tree import Root
from worldmodels.types import RecurrentOutput, State, UserError

SEARCHES = {"gumbel": gumbel_search, "puct": puct_search}
BACKENDS = ("numba", "torch")
both_searches = pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
both_backends = pytest.mark.parametrize("backend", BACKENDS)


class Toy:
    """A random smooth model with 8 numbers as its state."""

    def __init__(self, actions: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        draw = functools.partial(torch.randn, generator=g, dtype=dtype)
        self.move, self.policy, self.value = draw(actions, 8, 8), draw(8, actions), draw(8)

    def root(self, batch: int, seed: int = 1) -> Root:
        g = torch.Generator().manual_seed(seed)
        h = torch.randn(batch, 8, generator=g, dtype=self.value.dtype)
        return Root(h @ self.policy, h @ self.value, {"h": h})

    def step(self, state: State, action: Tensor) -> tuple[RecurrentOutput, State]:
        h = torch.tanh(torch.einsum("bi,bij->bj", state["h"], self.move[action]))
        discount = 0.97 * (h[:, 1] > -0.8).to(h.dtype)
        return RecurrentOutput(2 * h[:, 0], discount, h @ self.policy, h @ self.value), {"h": h}


@both_searches
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_backends_grow_the_same_trees(search, dtype: torch.dtype) -> None:
    toy = Toy(6, dtype)
    root = toy.root(32)
    noise = torch.rand(32, 6, generator=torch.Generator().manual_seed(5), dtype=dtype)
    mask = torch.arange(6).expand(32, 6) == 2
    for settings in ({}, {"invalid": mask}, {"invalid": mask, "invalid_inside": mask}, {"max_depth": 2}):
        a, b = (search(toy.step, root, 24, noise=noise, backend=backend, **settings) for backend in BACKENDS)
        assert torch.equal(a.tree.children(6), b.tree.children(6))
        assert torch.equal(a.visits, b.visits)
        assert torch.equal(a.action, b.action)
        assert a.visits.sum(-1).eq(24).all()
        for name in ("action_weights", "value", "q"):
            assert getattr(a, name).dtype == dtype
            torch.testing.assert_close(getattr(a, name), getattr(b, name), atol=1e-5, rtol=1e-5)


def seen(observation: Tensor, state: State, toy: Toy) -> tuple[Root, State]:
    h = torch.tanh(state["h"] + observation.flatten(1)[:, :8] / 255)
    return Root(h @ toy.policy, h @ toy.value, {"h": h}), {"h": h}


@both_searches
@pytest.mark.parametrize("noise", [False, True])
def test_a_policy_of_callables_is_a_policy(search, noise: bool) -> None:
    toy = Toy(3, torch.float32)
    policy = SearchPolicy(
        begin=lambda n: {"h": torch.zeros(n, 8)},
        see=functools.partial(seen, toy=toy),
        recurrent=toy.step,
        search=functools.partial(search, num_simulations=8),
        actions=(0, 2, 5),
        noise=noise,
    )
    frames = torch.randint(0, 256, (12, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    check_policy(policy, frames)
    state = policy.start(12)
    acts = [policy.act(frames, state, torch.Generator().manual_seed(seed))[0] for seed in range(20)]
    assert set(torch.stack(acts).unique().tolist()) <= {0, 2, 5}
    alone = torch.cat([policy.act(frames[i : i + 1], policy.start(1))[0] for i in range(12)])
    assert torch.equal(alone, policy.act(frames, state)[0])
    root, _ = policy.see(frames, state)
    visits = policy.search(toy.step, root).visits.sort(-1).values
    tied = visits[:, -1] == visits[:, -2]  # drawn without noise, too
    assert tied.sum() < 8 and (torch.stack(acts) == acts[0])[:, ~tied].all() != noise


def flat(state: State, action: Tensor) -> tuple[RecurrentOutput, State]:
    """All actions are equally good."""
    zero = torch.zeros(len(action), dtype=torch.float64)
    return RecurrentOutput(zero, zero + 0.9, torch.zeros(len(action), 5, dtype=torch.float64), zero), state


@both_searches
@both_backends
def test_draws_decide_between_equal_actions(search, backend: str) -> None:
    root = Root(torch.zeros(40, 5, dtype=torch.float64), torch.zeros(40, dtype=torch.float64), {"h": torch.zeros(40)})
    ties = torch.rand(40, 5, generator=torch.Generator().manual_seed(2))
    drawn = search(flat, root, 3, ties=ties, backend=backend)
    assert torch.equal(drawn.tree.action[:, 1:], ties.argsort(-1, descending=True)[:, :3].to(drawn.tree.action))
    assert torch.equal(drawn.action, ties.argmax(-1))
    first = search(flat, root, 3, backend=backend)
    assert (first.tree.action[:, 1:] == torch.arange(3)).all() and not first.action.any()
    deep = search(flat, root, 9, ties=ties, backend=backend)
    below = deep.tree.action[deep.tree.parent > 0].double()
    assert below.std() > 0 and search(flat, root, 9, backend=backend).tree.action.double().std() > 0
    with pytest.raises(UserError, match="one draw an action"):
        search(flat, root, 3, ties=ties[:, :4], backend=backend)


def test_play_breaks_ties_by_its_generator() -> None:
    policy = SearchPolicy(
        begin=lambda n: {"h": torch.zeros(n)},
        see=lambda frames, state: (Root(torch.zeros(len(frames), 5), torch.zeros(len(frames)), state), state),
        recurrent=lambda state, action: (RecurrentOutput(*(x.float() for x in flat(state, action)[0])), state),
        search=functools.partial(gumbel_search, num_simulations=4),
        actions=range(5),
    )
    frames = torch.zeros(200, 1, 4, 4, dtype=torch.uint8)
    acts = [policy.act(frames, policy.start(200), torch.Generator().manual_seed(seed))[0] for seed in (0, 0, 1)]
    assert torch.equal(acts[0], acts[1]) and not torch.equal(acts[0], acts[2])
    assert acts[0].bincount(minlength=5).min() > 20
    assert not policy.act(frames, policy.start(200))[0].any()


@pytest.mark.parametrize(
    "search",
    [prior_search, functools.partial(puct_search, num_simulations=30, dirichlet_fraction=0.0)],
    ids=["prior", "puct"],
)
def test_a_policy_without_temperature_takes_the_best_action(search, monkeypatch) -> None:
    monkeypatch.setattr("worldmodels.planning.policy._draws", lambda *_: None)  # of what is equally good, the first
    toy, begin, frames = Toy(3, torch.float32), lambda n: {"h": torch.zeros(n, 8)}, torch.zeros(64, 1, 4, 4).byte()
    policy = SearchPolicy(begin, functools.partial(varied, toy=toy), toy.step, search, (0, 2, 5), noise=True)

    def acts(temperature: float | None, seed: int = 0) -> Tensor:
        policy.temperature = temperature
        return policy.act(frames, policy.start(64), torch.Generator().manual_seed(seed))[0]

    best = policy.act(frames, policy.start(64))[0]
    assert torch.equal(acts(0.0, 1), best) and torch.equal(acts(0.0, 2), best)
    assert torch.equal(acts(None), acts(1.0))  # as the search has it
    wrong = [float((acts(t) != best).float().mean()) for t in (0.05, 1.0, 20.0)]
    assert wrong[0] < wrong[1] < wrong[2]


def varied(observation: Tensor, state: State, toy: Toy) -> tuple[Root, State]:
    """Another root in each row, whatever is seen, that thinks something of every action."""
    root = toy.root(len(observation))
    return root._replace(prior_logits=root.prior_logits / 8), state


def optimal_q(reward: Tensor, discount: Tensor, following: Tensor) -> Tensor:
    """(S, A) by value iteration."""
    q = torch.zeros_like(reward)
    for _ in range(500):
        q = reward + discount * q.amax(1)[following]
    return q


@both_searches
@both_backends
def test_q_of_the_root_converges_to_the_optimal_one(search, backend: str) -> None:
    g = torch.Generator().manual_seed(4)
    states, actions = 5, 3
    reward = torch.rand(states, actions, generator=g, dtype=torch.float64)
    discount = torch.full_like(reward, 0.5)
    discount[1] = 0
    following = torch.randint(0, states, (states, actions), generator=g)
    q = optimal_q(reward, discount, following)

    # Values above all that can be reached, or Gumbel MuZero need never try what the model thinks little of.
    def step(state: State, action: Tensor) -> tuple[RecurrentOutput, State]:
        at, new = (state["s"], action), following[state["s"], action]
        return RecurrentOutput(reward[at], discount[at], torch.zeros(len(new), actions).double(), hopes[new]), {
            "s": new
        }

    hopes = torch.full((states,), 2.0, dtype=torch.float64)
    root = Root(torch.zeros(states, actions).double(), hopes, {"s": torch.arange(states)})
    errors = []
    for simulations in (8, 100):
        result = search(step, root, simulations, backend=backend)
        errors.append((result.q - q).abs().gather(1, result.action[:, None]).max())
    assert torch.equal(result.action, q.argmax(1))
    assert errors[1] < 0.05
    assert errors[1] < 0.5 * errors[0]


@both_searches
def test_given_draws_replay_a_search_and_the_generator_makes_them(search) -> None:
    toy = Toy(6)
    root = toy.root(8)

    def run(**settings):
        return search(toy.step, root, 20, **settings)

    first, again, other = (run(generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first.tree.parent, again.tree.parent)
    assert torch.equal(first.action, again.action)
    assert not torch.equal(first.visits, other.visits)
    legal = torch.full((8, 6), 0.3, dtype=torch.float64)
    g = torch.Generator().manual_seed(1)
    noise = gumbel_noise(legal, g) if search is gumbel_search else dirichlet_noise(legal, g)
    assert torch.equal(run(noise=noise).visits, first.visits)
    assert torch.equal(run().visits, run().visits)


@both_searches
@both_backends
def test_illegal_actions_are_never_taken_and_get_no_weight(search, backend: str) -> None:
    toy = Toy(6)
    root = toy.root(16)
    mask = torch.ones(16, 6, dtype=torch.bool)
    for row in range(16):
        mask[row, row % 6] = mask[row, (row // 2) % 6] = False
    result = search(toy.step, root, 16, invalid=mask, generator=torch.Generator().manual_seed(0), backend=backend)
    assert result.visits[mask].eq(0).all()
    assert result.action_weights[mask].eq(0).all()
    assert not mask.gather(1, result.action[:, None]).any()
    torch.testing.assert_close(result.action_weights.sum(1), torch.ones(16, dtype=torch.float64))
    by_logits = root._replace(prior_logits=root.prior_logits.masked_fill(mask, -torch.inf))
    told = search(toy.step, by_logits, 16, backend=backend)
    assert torch.equal(told.visits, search(toy.step, root, 16, invalid=mask, backend=backend).visits)


@both_searches
@both_backends
def test_terminal_transitions_are_worth_their_reward(search, backend: str) -> None:
    toy = Toy(3)

    def ending(state: State, action: Tensor) -> tuple[RecurrentOutput, State]:
        output, state = toy.step(state, action)
        return output._replace(discount=torch.zeros_like(output.discount), reward=action.double()), state

    root = toy.root(4)
    result = search(ending, root._replace(prior_logits=torch.zeros(4, 3).double()), 30, backend=backend)
    assert (result.visits > 0).all()
    assert torch.equal(result.q, torch.arange(3.0, dtype=torch.float64).expand(4, 3))
    assert (result.action == 2).all()


def test_considered_visits_are_those_of_sequential_halving() -> None:
    table = considered_visits(4, 8).tolist()
    assert table[0] == table[1] == list(range(8))
    assert table[2] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert table[4] == [0, 0, 0, 0, 1, 1, 2, 2]
    assert considered_visits(16, 1)[16].tolist() == [0]


@both_backends
def test_fewer_legal_actions_than_are_to_be_considered(backend: str) -> None:
    toy = Toy(4)
    mask = torch.tensor([[False, True, True, True], [False, False, True, True], [False] * 4])
    result = gumbel_search(toy.step, toy.root(3), 12, max_considered=16, invalid=mask, backend=backend)
    assert result.visits.tolist()[0] == [12, 0, 0, 0]
    assert result.visits[1].tolist() == [6, 6, 0, 0]
    assert (result.visits[2] > 0).all()


def spoilt(toy: Toy, name: str, value: float, row: int, at: int) -> Callable[..., tuple[RecurrentOutput, State]]:
    """The model, with one number of one output replaced in one call."""
    calls = itertools.count()

    def step(state: State, action: Tensor) -> tuple[RecurrentOutput, State]:
        output, state = toy.step(state, action)
        if next(calls) == at:
            output = RecurrentOutput(*(x.clone() for x in output))
            getattr(output, name)[row] = value
        return output, state

    return step


@both_searches
@both_backends
@pytest.mark.parametrize("name", RecurrentOutput._fields)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_no_number_is_told_with_row_simulation_and_tensor(
    search, backend: str, name: str, value: float
) -> None:
    toy = Toy(3)
    told = f"the model's {name} is no finite number in row 2 of the batch in simulation 5 of the search"
    with pytest.raises(UserError, match=told):
        search(spoilt(toy, name, value, row=2, at=5), toy.root(4), 9, backend=backend)
    for last in (0, 8):
        with pytest.raises(UserError, match=f"in simulation {last} "):
            search(spoilt(toy, name, value, row=2, at=last), toy.root(4), 9, backend=backend)
    root = toy.root(4)
    spoilt_root = root._replace(value=root.value.clone().index_fill(0, torch.tensor([3]), torch.nan))
    with pytest.raises(UserError, match="the model's value is no finite number in row 3 of the batch at the root"):
        search(toy.step, spoilt_root, 9, backend=backend)


@both_searches
@both_backends
def test_nodes_without_a_legal_action_are_told(search, backend: str) -> None:
    toy = Toy(3)
    mask = torch.zeros(4, 3, dtype=torch.bool)
    mask[1] = True
    with pytest.raises(UserError, match="no action is legal in row 1 of the batch at the root"):
        search(toy.step, toy.root(4), 9, invalid=mask, backend=backend)
    with pytest.raises(UserError, match="no action is legal in row 1 of the batch at the node of simulation 0"):
        search(toy.step, toy.root(4), 9, invalid_inside=mask, backend=backend)
    drawn = torch.Generator().manual_seed(0)
    with pytest.raises(UserError, match="no action is legal in row 1 of the batch at the node of simulation 0"):
        sampled_search(toy.step, toy.root(4), 9, invalid_inside=mask, backend=backend, generator=drawn)
    with pytest.raises(UserError, match="no action is legal in row 2 of the batch at the node of simulation 5"):
        search(spoilt(toy, "prior_logits", -torch.inf, row=2, at=5), toy.root(4), 9, backend=backend)


@pytest.mark.parametrize(
    ("search", "settings", "sentence"),
    [
        (gumbel_search, {"num_simulations": 0}, "num_simulations=0 must be a whole number of at least 1"),
        (puct_search, {"num_simulations": 2.5}, "num_simulations=2.5 must be a whole number"),
        (gumbel_search, {"max_depth": 0}, "max_depth=0 must be a whole number of at least 1"),
        (gumbel_search, {"max_considered": 0}, "max_considered=0 must be"),
        (gumbel_search, {"backend": "cuda"}, "backend=cuda is unknown; choose auto, numba or torch"),
        (gumbel_search, {"noise": torch.zeros(4, 2)}, "noise has shape"),
        (puct_search, {"noise": torch.zeros(4, 2)}, "noise has shape"),
        (puct_search, {"dirichlet_fraction": 1.5}, "dirichlet_fraction=1.5 must lie between 0 and 1"),
        (puct_search, {"dirichlet_alpha": 0}, "dirichlet_alpha=0 must be above 0"),
        (puct_search, {"pb_c_base": -1}, "pb_c_base=-1 must be above 0"),
        (puct_search, {"temperature": -1}, "temperature=-1 must be 0 or more"),
        (puct_search, {"invalid": torch.zeros(4, 3)}, "invalid is .* a mask of these roots is"),
        (puct_search, {"invalid_inside": torch.zeros(3, 3, dtype=torch.bool)}, "invalid_inside is"),
        (sampled_search, {"samples": 0}, "samples=0 must be"),
        (sampled_search, {"sample_temperature": 0}, "sample_temperature=0 must be above 0"),
        (sampled_search, {"draws": torch.zeros(4, 9, 20)}, "draws has shape"),
        (gumbel_search, {"value_scale": math.nan}, "value_scale=nan must be a finite number"),
        (gumbel_search, {"visit_offset": math.inf}, "visit_offset=inf must be a finite number"),
        (gumbel_search, {"noise": torch.full((4, 3), math.nan)}, "noise holds what is no finite number"),
        (puct_search, {"pb_c_init": math.nan}, "pb_c_init=nan must be a finite number"),
        (puct_search, {"pb_c_base": math.inf}, "pb_c_base=inf must be a finite number"),
        (puct_search, {"temperature": math.inf}, "temperature=inf must be a finite number"),
        (sampled_search, {"sample_temperature": math.inf}, "sample_temperature=inf must be above 0 and finite"),
    ],
)
def test_settings_out_of_range_are_refused_in_a_sentence(search, settings: dict, sentence: str) -> None:
    toy = Toy(3)
    with pytest.raises(UserError, match=sentence):
        search(toy.step, toy.root(4), **{"num_simulations": 9} | settings)


def test_one_step_and_the_prior_refuse_what_is_no_number() -> None:
    toy = Toy(3)
    for settings in ({"clip": math.nan}, {"temperature": math.nan}):
        with pytest.raises(UserError, match="=nan must be a finite number"):
            one_step_search(toy.step, toy.root(4), **settings)
    for search in (one_step_search, prior_search):
        with pytest.raises(UserError, match=r"noise has shape \(1, 3\); give one draw an action: \(4, 3\)"):
            search(toy.step, toy.root(4), noise=torch.zeros(1, 3))


@both_searches
@both_backends
def test_models_of_other_shapes_are_refused(search, backend: str) -> None:
    toy = Toy(3)

    def fewer(state: State, action: Tensor) -> tuple[RecurrentOutput, State]:
        output, new = toy.step(state, action)
        return output._replace(prior_logits=output.prior_logits[:, :2]), new

    def column(state: State, action: Tensor) -> tuple[RecurrentOutput, State]:
        output, new = toy.step(state, action)
        return output._replace(value=output.value[:, None]), new

    def stateless(state: State, action: Tensor) -> tuple[RecurrentOutput, State]:
        return toy.step(state, action)[0], {}

    given = ((fewer, r"prior_logits \(4, 2\); give \(4, 3\)"), (column, r"value \(4, 1\); give \(4,\)"))
    for model, sentence in (*given, (stateless, "a state of {'h': .* gives one of {}")):
        with pytest.raises(UserError, match=sentence):
            search(model, toy.root(4), 9, backend=backend)


def test_a_policy_of_negative_temperature_is_refused() -> None:
    toy = Toy(3)
    with pytest.raises(UserError, match="temperature=-0.5 must be 0 or more"):
        prior_search(toy.step, toy.root(4), temperature=-0.5)


def test_roots_whose_shapes_do_not_agree_are_refused() -> None:
    toy = Toy(3)
    root = toy.root(4)
    with pytest.raises(UserError, match=r"the root has prior_logits \(4, 3\) and value \(3,\)"):
        gumbel_search(toy.step, root._replace(value=root.value[:3]), 9)
    with pytest.raises(UserError, match="state 'h' of the root has 3 rows but its value has 4"):
        gumbel_search(toy.step, root._replace(state={"h": root.state["h"][:3]}), 9)


@both_searches
def test_networks_that_want_gradients_or_give_half_precision_are_searched(search) -> None:
    toy = Toy(4, torch.float32)
    root = toy.root(4)
    wanted = Root(*(x.clone().requires_grad_() for x in root[:2]), {"h": root.state["h"].clone().requires_grad_()})
    result = search(toy.step, wanted, 8)
    assert torch.equal(result.visits, search(toy.step, root, 8).visits)
    (torch.log_softmax(wanted.prior_logits, -1) * result.action_weights).sum().backward()
    assert wanted.prior_logits.grad is not None

    def half(state: State, action: Tensor) -> tuple[RecurrentOutput, State]:
        output, state = toy.step(state, action)
        return RecurrentOutput(*(x.bfloat16() for x in output)), state

    rough = Root(root.prior_logits.bfloat16(), root.value.bfloat16(), root.state)
    a, b = (search(half, rough, 8, backend=backend) for backend in BACKENDS)
    assert torch.equal(a.visits, b.visits)
    assert a.action_weights.dtype == torch.float32


def test_small_models_are_searched_on_one_thread_and_the_others_are_given_back() -> None:
    toy, seen = Toy(3), []

    def step(state: State, action: Tensor) -> tuple[RecurrentOutput, State]:
        seen.append(torch.get_num_threads())
        return toy.step(state, action)

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for batch in (4, 5000):
            gumbel_search(step, toy.root(batch), 1)
        with pytest.raises(UserError):
            gumbel_search(spoilt(toy, "value", torch.nan, row=0, at=0), toy.root(4), 1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 2]


def test_temperature_of_acting_by_visits() -> None:
    toy = Toy(4)
    root = Root(
        *(x[:1].expand(4000, *x.shape[1:]) for x in toy.root(1)[:2]), {"h": toy.root(1).state["h"].expand(4000, 8)}
    )
    frequency = {}
    for temperature in (1.0, 0.5, 0.0):
        g = torch.Generator().manual_seed(0)
        result = puct_search(
            toy.step, root, 10, noise=torch.full((4000, 4), 0.25), generator=g, temperature=temperature
        )
        frequency[temperature] = torch.bincount(result.action, minlength=4) / 4000
    share = result.action_weights[0].float()
    assert (frequency[1.0] - share).abs().max() < 0.03
    assert (frequency[0.5] - share**2 / (share**2).sum()).abs().max() < 0.03
    assert frequency[0.0].max() == 1


def test_sampled_actions_and_their_prior() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -torch.inf]], dtype=torch.float64)
    pi, k = torch.softmax(logits, -1), 2000
    uniform = torch.rand(1, k, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for tau in (1.0, 2.0):
        many = torch.softmax(sampled_logits(logits, k, tau, uniform), -1)
        # with many draws the share is beta, and what is left is the policy itself
        assert (many - pi).abs().max() < 0.05
        assert many[0, 3] == 0
    few = sampled_logits(logits, 3, 1.0, torch.tensor([[0.0, 0.99999, 0.99]], dtype=torch.float64))
    # drawn once and twice of three, with tau = 1: the prior is the share of the draws
    assert torch.allclose(torch.softmax(few, -1), torch.tensor([[1 / 3, 0, 2 / 3, 0]], dtype=torch.float64))
    best = torch.softmax(sampled_logits(logits, 2, 1.0, None), -1)
    assert torch.allclose(best, torch.softmax(torch.tensor([[-torch.inf, 1, 2, -torch.inf]], dtype=torch.float64), -1))


@both_backends
def test_sampled_search_visits_what_it_drew_and_replays(backend: str) -> None:
    toy = Toy(40)
    root = toy.root(8)
    mask = torch.arange(40).expand(8, 40) % 3 == 0
    draws = torch.rand(8, 31, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    run = functools.partial(sampled_search, toy.step, root, 30, invalid=mask, invalid_inside=mask, backend=backend)
    result = run(samples=5, draws=draws)
    assert torch.equal(result.visits, run(samples=5, draws=draws).visits)
    assert ((result.visits > 0).sum(1) <= 5).all()
    assert ((result.tree.action < 0) | (result.tree.action % 3 != 0)).all()
    assert torch.equal(result.action_weights > 0, result.visits > 0)
    a, b = (run(samples=5, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    assert not torch.equal(a.visits, b.visits)
    everything = sampled_search(toy.step, root, 30, samples=40, backend=backend)
    assert torch.equal(everything.visits, puct_search(toy.step, root, 30, backend=backend).visits)


@pytest.mark.parametrize("name", ["gumbel", "puct", "sampled"])
def test_planners_are_built_from_their_settings(name: str) -> None:
    settings = plain(OmegaConf.load(conf_dir() / "planner" / f"{name}.yaml"))
    planner = build(settings | {"num_simulations": 5})
    toy = Toy(3)
    assert planner(toy.step, toy.root(2)).visits.sum(1).tolist() == [5, 5]
    defaults = inspect.signature(planner.func).parameters
    for key, value in planner.keywords.items():  # a yaml is no second opinion about the defaults
        assert key == "num_simulations" or value == defaults[key].default
    with pytest.raises(UserError, match="has no setting 'simulations'; it has num_simulations"):
        build(settings | {"simulations": 5})
