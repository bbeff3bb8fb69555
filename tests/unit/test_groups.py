"""Groups against pictures and against the table of the 18 actions that was checked with ale-py's own numbering."""

from itertools import pairwise, product

import pytest
import torch

from tests.conftest import ROOT
from worldmodels.evaluation.scores import game_facts
from worldmodels.ops.groups import (
    GROUPS,
    action_table,
    check_square,
    closure,
    group,
    is_closed,
    moved_action,
    nearest,
    transform,
    transform_fields,
)
from worldmodels.types import ACTIONS, UserError

ALL = list(GROUPS.values())
D4 = """
0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17
0 1 4 2 5 3 7 9 6 8 12 10 13 11 15 17 14 16
0 1 5 4 3 2 9 8 7 6 13 12 11 10 17 16 15 14
0 1 3 5 2 4 8 6 9 7 11 13 10 12 16 14 17 15
0 1 2 4 3 5 7 6 9 8 10 12 11 13 15 14 17 16
0 1 3 2 5 4 6 8 7 9 11 10 13 12 14 16 15 17
0 1 5 3 4 2 8 9 6 7 13 11 12 10 16 17 14 15
0 1 4 5 2 3 9 7 8 6 12 13 10 11 17 15 16 14
"""


@pytest.mark.parametrize("symmetry", ALL, ids=lambda g: g.name)
def test_tables_say_what_happens_to_pictures(symmetry):
    picture = torch.arange(25).view(1, 1, 5, 5)
    moved = [transform(picture, element) for element in symmetry.elements]
    assert len({tuple(m.flatten().tolist()) for m in moved}) == len(symmetry)
    for a, b in product(range(len(symmetry)), repeat=2):
        assert torch.equal(transform(moved[b], symmetry.elements[a]), moved[symmetry.product[a][b]])
    for a, inverse in enumerate(symmetry.inverse):
        assert torch.equal(transform(moved[a], symmetry.elements[inverse]), picture)


def test_elements_are_what_they_are_called():
    picture = torch.tensor([[1, 2], [3, 4]])
    assert transform(picture, group("flip_lr").elements[1]).tolist() == [[2, 1], [4, 3]]
    assert transform(picture, group("flip_ud").elements[1]).tolist() == [[3, 4], [1, 2]]
    assert transform(picture, group("c4").elements[1]).tolist() == [[2, 4], [1, 3]]
    assert [len(g) for g in ALL] == [1, 2, 2, 4, 8]
    assert [g.swaps for g in ALL] == [False, False, False, True, True]
    assert [g.reverses for g in ALL] == [(False, False), (False, True), (True, False), (True, True), (True, True)]


def test_the_table_of_the_18_actions():
    assert action_table(group("d4")).tolist() == [[int(a) for a in row.split()] for row in D4.split("\n")[1:-1]]


@pytest.mark.parametrize("symmetry", ALL, ids=lambda g: g.name)
def test_actions_are_moved_as_the_picture_of_their_direction(symmetry):
    def drawn(name: str) -> torch.Tensor:
        picture = torch.zeros(3, 3)
        down, right = ("DOWN" in name) - ("UP" in name), ("RIGHT" in name) - ("LEFT" in name)
        picture[1 + down, 1 + right] = 1
        return picture

    for action, element in product(range(18), symmetry.elements):
        to = ACTIONS[moved_action(action, element)]
        assert torch.equal(transform(drawn(ACTIONS[action]), element), drawn(to))
        assert ("FIRE" in ACTIONS[action]) == ("FIRE" in to)


@pytest.mark.parametrize("symmetry", ALL, ids=lambda g: g.name)
@pytest.mark.parametrize("actions", [range(18), [0, 2, 3, 4, 5], [5, 4, 0, 3, 2]], ids=str)
def test_tables_of_actions_are_homomorphisms(symmetry, actions):
    table = action_table(symmetry, list(actions))
    for a, b in product(range(len(symmetry)), repeat=2):
        assert torch.equal(table[a][table[b]], table[symmetry.product[a][b]])
    for place, action in enumerate(actions):
        assert list(actions)[table[-1, place]] == moved_action(action, symmetry.elements[-1])


@pytest.mark.parametrize("symmetry", ALL, ids=lambda g: g.name)
@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4, 4), (1, 2, 5, 5)], ids=str)
def test_fields_are_moved_by_a_homomorphism(symmetry, shape):
    fields = torch.rand(*shape[:2], len(symmetry), *shape[2:])
    for a, b in product(range(len(symmetry)), repeat=2):
        twice = transform_fields(transform_fields(fields, symmetry, b), symmetry, a)
        assert torch.equal(twice, transform_fields(fields, symmetry, symmetry.product[a][b]))


def test_closure_of_every_game():
    files = [path.stem for path in (ROOT / "conf" / "game").glob("*.yaml") if path.stem != "catch"]
    facts = {game: game_facts(game) for game in files}
    small = {game: f["actions"] for game, f in facts.items() if "atari100k" in f.get("suites", ())}
    closed = {g.name: {game for game, actions in small.items() if is_closed(g, actions)} for g in ALL}
    assert [len(closed[name]) for name in ("none", "flip_lr", "flip_ud", "c4", "d4")] == [26, 26, 23, 18, 18]
    assert set(small) - closed["flip_ud"] == {"assault", "gopher", "kung_fu_master"}
    square = "alien amidar asterix bank_heist battle_zone boxing chopper_command crazy_climber frostbite hero jamesbond"
    square += " kangaroo krull ms_pacman private_eye qbert road_runner seaquest"
    assert closed["c4"] == closed["d4"] == set(square.split())
    for game, f in facts.items():
        for g in ALL:
            whole = closure(g, f["actions"])
            assert is_closed(g, whole)
            assert set(f["actions"]) <= set(whole)
            assert (len(whole) == len(f["actions"])) == is_closed(g, f["actions"])
        assert is_closed(nearest(group("d4"), f["actions"]), f["actions"]), game


def test_games_carry_the_symmetry_that_play_approximately_has():
    files = [path.stem for path in (ROOT / "conf" / "game").glob("*.yaml")]
    symmetric = {
        game: facts["approximate_symmetry"] for game in files if "approximate_symmetry" in (facts := game_facts(game))
    }
    assert symmetric == dict.fromkeys(["amidar", "asterix", "breakout", "freeway", "ms_pacman"], "flip_lr")
    assert all(is_closed(group(name), game_facts(game)["actions"]) for game, name in symmetric.items())


def test_what_does_not_work_is_refused_with_what_does():
    with pytest.raises(UserError, match="symmetry=c8 is unknown; choose one of none, flip_lr, flip_ud, c4, d4"):
        group("c8")
    breakout, assault = [0, 1, 3, 4], [0, 1, 2, 3, 4, 11, 12]
    with pytest.raises(UserError, match=r"symmetry=c4 takes the action RIGHT to UP, .* use symmetry=flip_lr, or add"):
        action_table(group("c4"), breakout)
    assert nearest(group("d4"), assault).name == nearest(group("flip_ud"), assault).name == "flip_lr"
    with pytest.raises(UserError, match=r"flip_ud takes the action UP to DOWN.* use symmetry=flip_lr, or add \[5\]"):
        action_table(group("flip_ud"), assault)
    assert nearest(group("c4"), [0, 3]).name == "flip_ud"
    assert nearest(group("flip_lr"), [6]).name == "none"
    for name in ("c4", "d4"):
        with pytest.raises(UserError, match="15x19 .* pad it to 19x19, or use symmetry=flip_lr or flip_ud"):
            check_square(group(name), 15, 19)
    check_square(group("flip_ud"), 15, 19)


def test_pictures_keep_their_type_and_orbits_their_length():
    frames = torch.randint(256, (2, 3, 6, 6), dtype=torch.uint8)
    orbit = [transform(frames, element) for element in group("d4").elements]
    assert all(picture.dtype == torch.uint8 and picture.shape == frames.shape for picture in orbit)
    assert not any(torch.equal(a, b) for a, b in pairwise(orbit))
