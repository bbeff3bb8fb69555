"""The Python of the README runs as it stands, and its commands name settings that exist."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from worldmodels import Store
from worldmodels.__main__ import commands

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_recordings_become_a_store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", README, re.S).group(1)
    rng = np.random.default_rng(0)
    episode = (rng.integers(0, 256, (7, 64, 64, 3), np.uint8), np.zeros(7, np.uint8), np.ones(7, np.float32))
    exec(code, {"my_recordings": [episode]})
    store = Store.open(tmp_path / "data" / "mine")
    assert store.lengths.tolist() == [7]
    assert np.array_equal(store.episode(0).obs, episode[0])


@pytest.mark.parametrize("line", re.findall(r"^worldmodels ([a-z].*?)(?:  #.*)?$", README, re.M))
def test_commands_are_there(line):
    name, *settings = shlex.split(line)
    assert name in commands()
    assert all("=" in setting for setting in settings)
