"""evaluation/play.py and envs/child.py: every episode counted once, whole, unclipped; frames skipped once; crashes."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch

from tests.unit.test_muzero import muzero, spread
from worldmodels.envs.atari import AtariEnv, Protocol, vector_settings
from worldmodels.envs.catch import CatchGames
from worldmodels.envs.child import ChildEnv, GameCrash
from worldmodels.evaluation.play import drawn_seed, frames_of, open_games, play
from worldmodels.evaluation.protocols import Rules
from worldmodels.imagination import RandomPolicy
from worldmodels.learners.acting import PRIOR, as_policy
from worldmodels.types import UserError

RULES = Rules("short", 4, 0.0, True, 30, 40, "minimal")
PONG = [0, 1, 3, 4, 11, 12]


class Console:
    """A fake console that counts: an env step advances `frame_skip` raw frames and rewards 3; lengths are given."""

    def __init__(self, num_envs, lengths, frame_skip=4):
        self.num_envs, self.lengths, self.frame_skip = num_envs, lengths, frame_skip
        self.raw = self.env_steps = 0
        self.seeds = []

    def _frames(self):
        return np.zeros((self.num_envs, 1, 8, 8, 3), np.uint8)

    def reset(self, seed):
        self.seeds += seed.tolist()
        self.played = np.zeros(self.num_envs, int)
        self.limit = np.array([self.lengths[s] for s in seed.tolist()])
        return self._frames(), {}

    def step(self, actions):
        assert actions.shape == (self.num_envs,) and actions.dtype == np.int64
        self.env_steps += 1
        self.raw += self.frame_skip
        self.played += 1
        ends = self.played == self.limit  # and then it goes on, as AtariVectorEnv does with the next game
        return self._frames(), np.full(self.num_envs, 3), ends, np.zeros(self.num_envs, bool), {}


class Counting(RandomPolicy):
    calls = 0

    def act(self, observation, state, generator=None):
        assert observation.dtype == torch.uint8 and observation.shape[1:] == (3, 8, 8)
        self.calls += 1
        return super().act(observation, state, generator)


def console(slots, lengths):
    return Console(slots, {drawn_seed(5, 0, k): n for k, n in enumerate(lengths)})


def test_frames_are_skipped_once():
    env, policy = console(2, [7, 7, 9, 9]), Counting([0, 1])
    games = list(play(policy, env, RULES, [0, 1], 4, 5))
    assert policy.calls == env.env_steps == 16  # 7 steps of the first round and 9 of the second: an action is a step
    assert env.raw == 16 * 4
    assert [g.length for g in games] == [7, 7, 9, 9]


def test_the_emulator_itself_counts_four_frames_an_action():
    rules = Rules("short", 4, 0.0, True, 0, 40, "minimal")
    with open_games("pong", rules, 2, 64, "rgb") as env:
        games = list(play(RandomPolicy(PONG), env, rules, PONG, 2, 0))
    assert [(g.length, g.frames, g.truncated) for g in games] == [(40, 160, True)] * 2


def test_long_games_count_as_much_as_short_ones():
    lengths = [3, 50, 4, 60, 5, 2, 40, 1, 30, 6]
    env = console(4, lengths + [1, 1])
    games = list(play(RandomPolicy([0]), env, RULES, [0], 10, 5))
    assert {g.episode: g.length for g in games} == dict(enumerate(lengths))
    assert {g.episode: g.score for g in games} == {k: 3 * n for k, n in enumerate(lengths)}  # rewards of 3, unclipped
    assert len(set(env.seeds)) == 12  # every episode a seed of its own


def test_what_was_cut_short_goes_on_with_the_same_games():
    def run(done=(), stop=None):
        found = {}
        with open_games("breakout", RULES, 3, 64, "rgb") as env:
            for game in play(RandomPolicy([0, 1, 3, 4]), env, RULES, [0, 1, 3, 4], 5, 1, done):
                found[game.episode] = game.line()
                if len(found) == stop:
                    break
        return found

    straight, first = run(), run(stop=2)
    assert run() == straight and len(straight) == 5
    rest = run(done=set(first))
    assert not set(first) & set(rest)
    assert first | rest == straight


def test_scores_are_of_whole_games_with_the_rewards_of_the_game():
    """Against the same game played step by step through the other interface."""
    rules = Rules("long", 4, 0.0, True, 0, 27_000, "minimal")

    class Script(RandomPolicy):
        def act(self, observation, state, generator=None):
            action, state = super().act(observation, state, generator)
            self.taken.append(action[0].item())
            return action, state

    policy = Script([0, 1, 3, 4])
    policy.taken = []
    with open_games("space_invaders", rules, 1, 64, "rgb") as env:
        (game,) = play(policy, env, rules, [0, 1, 3, 4], 1, 2)
    single = AtariEnv(Protocol("space_invaders", noop_max=0))
    single.reset(drawn_seed(2, 0, 0))
    total, lost, biggest = 0.0, 0, 0.0
    for action in policy.taken:
        outcome = single.step(action)
        total, lost, biggest = total + outcome.reward, lost + outcome.life_loss, max(biggest, outcome.reward)
    assert outcome.terminated and lost == 3 and biggest > 1
    assert (game.score, game.length, game.truncated) == (total, len(policy.taken), False)


def test_temperature_and_epsilon_are_the_protocols():
    class Warm:
        temperature, actions = 0.5, [0]
        seen = set()

        def start(self, n):
            return {}

        def act(self, observation, state, generator=None):
            self.seen.add(self.temperature)
            return torch.zeros(len(observation), dtype=torch.long), state

    warm, greedy = Warm(), Rules("greedy", 4, 0.0, True, 0, 40, "minimal", temperature=0.0, epsilon=0.25)
    steps = []

    class Noting(Console):
        def step(self, actions):
            steps.extend(actions.tolist())
            return super().step(actions)

    list(play(warm, Noting(1, {drawn_seed(5, 0, 0): 2000}), greedy, [0, 1, 2, 3], 1, 5))
    assert warm.seen == {0.0} and warm.temperature == 0.5
    assert np.mean(np.array(steps) != 0) == pytest.approx(0.25 * 0.75, abs=0.03)
    list(play(warm, console(1, [3]), RULES, [0], 1, 5))
    assert warm.seen == {0.0, 0.5}


def test_the_policy_of_a_muzero_is_greedy_where_the_protocol_is():
    """Without a search, that draws otherwise; a search by Gumbel MuZero takes the best action by all rules."""
    model = spread(muzero(actions=PONG, size=8)).eval()
    greedy = Rules("greedy", 4, 0.0, True, 0, 40, "minimal", temperature=0.0)

    def taken(rules, noise):
        steps = []

        class Noting(Console):
            def step(self, actions):
                steps.append(actions.tolist())
                return super().step(actions)

        games = Noting(4, {drawn_seed(5, 0, k): 10 for k in range(4)})
        list(play(as_policy(model, PRIOR, noise), games, rules, PONG, 4, 5))
        return steps

    best = taken(RULES, noise=False)
    assert taken(greedy, noise=True) == best != taken(RULES, noise=True)
    assert as_policy(model, PRIOR | {"temperature": 0.5}).temperature == 0.5
    for name in ("gumbel", "one_step"):  # whose temperature is of the advantage
        assert as_policy(model, {"_target_": PRIOR["_target_"].replace("prior", name)}).temperature is None


def test_an_action_that_is_not_allowed_is_refused():
    with pytest.raises(UserError, match="the policy took UP, which is not among the allowed actions NOOP, FIRE"):
        list(play(RandomPolicy([2]), console(1, [3]), RULES, [0, 1], 1, 5))
    with pytest.raises(UserError, match="episodes=0 must be at least 1"):
        list(play(RandomPolicy([0]), console(1, [3]), RULES, [0], 0, 5))


def test_catch_is_played_as_the_single_game_is():
    best = 0
    with CatchGames(3) as env:
        games = list(play(RandomPolicy([0, 3, 4]), env, RULES, [0, 3, 4], 30, 0, films=1))
        best = sum(g.score == 1 for g in games)
    assert [g.length for g in games] == [4] * 30 and {g.score for g in games} == {1.0, -1.0}
    assert 2 <= best <= 13  # one in five is caught by chance
    assert games[0].film.shape == (4, 3, 20, 20) and games[1].film is None


def children():
    return [p.pid for p in psutil.Process().children(recursive=True)]


def test_no_process_and_no_thread_is_left():
    before, threads = children(), psutil.Process().num_threads()
    for _ in range(2):
        with ChildEnv(vector_settings(Protocol("pong")), 2) as env:
            env.reset(seed=np.array([1, 2]))
            assert len(children()) == len(before) + 1
    assert children() == before and psutil.Process().num_threads() == threads
    with pytest.raises(GameCrash, match="TypeError: .*'wrong'"):
        ChildEnv({"wrong": True}, 2)
    assert children() == before


def test_a_child_whose_parent_was_killed_ends_by_itself():
    code = (
        "import os\nfrom worldmodels.envs.child import ChildEnv\n"
        "env = ChildEnv({'game': 'pong'}, 1)\nprint(env._process.pid, flush=True)\nos.kill(os.getpid(), 9)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    child = int(out.stdout)
    for _ in range(100):
        if not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.1)
    raise AssertionError("it goes on")


@pytest.mark.parametrize("how", ["killed", "hanging", "failing"])
def test_a_crash_is_one_sentence_and_keeps_the_games_before(how):
    rules, before = Rules("short", 4, 0.0, True, 0, 5, "minimal"), children()

    class Breaking(RandomPolicy):
        calls = 0

        def act(self, observation, state, generator=None):
            self.calls += 1
            if self.calls == 8 and how == "killed":
                os.kill(env._process.pid, signal.SIGSEGV)
            action, state = super().act(observation, state, generator)
            return (action + 82 if self.calls == 8 and how == "hanging" else action), state

    allowed = [*PONG, *(a + 82 for a in PONG)]  # a worker that is given an action beyond the set never answers
    words = {"killed": "SIGSEGV|SIGKILL", "hanging": "has not answered for 3 s", "failing": "Error"}[how]
    settings = vector_settings(Protocol("pong", noop_max=0, time_limit=5))
    with ChildEnv(settings, 2) as env:
        env.patience = 3 if how == "hanging" else 60
        if how == "failing":
            real = env.step
            env.step = lambda actions: real(actions if policy.calls != 8 else actions.astype(float))
        policy, kept = Breaking(PONG), []
        with pytest.raises(UserError, match=f"crashed in step 3 of episodes 2 to 3 .*({words}).*the same command"):
            for game in play(policy, env, rules, allowed, 4, 0):
                kept.append(game.episode)
    assert kept == [0, 1] and children() == before


def test_frames_that_the_real_game_does_not_have_are_refused():
    obs = {"height": 84, "width": 84, "channels": 1, "colour": "ale_gray", "resize": "area"}
    card = {"game": "pong", "obs": obs}
    assert frames_of(card, "it") == {"size": 84, "colour": "ale_gray"}
    for change in ({"colour": "cv2_gray"}, {"resize": "none"}, {"width": 60}):
        with pytest.raises(UserError, match="the store S has .* which the real game is not played with"):
            frames_of(card | {"obs": obs | change}, "the store S")
