"""The whole path on a log that was not made here: a DQN Replay log of real play, grey, clipped and sticky."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import QUICK
from tests.fixtures.make_dqn_replay import real_play, write_log
from worldmodels.data.sources.reading import minimal_actions
from worldmodels.data.store import Store

RUN = Callable[..., tuple[int, str, str]]


@pytest.mark.slow
def test_from_import_to_another_game(in_process: RUN, tmp_path: Path) -> None:
    def run(command: str, *settings: str) -> str:
        code, out, err = in_process(command, *settings)
        assert (code, [line for line in err.splitlines() if line.startswith("worldmodels:")]) == (0, []), err
        return out

    stores = {}
    for game, folder in (("pong", "Pong"), ("breakout", "Breakout")):
        log, episodes = tmp_path / folder / "1" / "replay_logs", []
        for seed in range(4):
            episodes += real_play(game, 1, seed)
        write_log(log, episodes, 1500, minimal_actions(game), level=1)
        stores[game] = tmp_path / game
        run("import", "source=dqn_replay", f"path={log}", f"store={stores[game]}")
        store = Store.open(stores[game])
        assert (store.card["game"], store.card["reward"]["clipped"], store.card["sticky_prob"]) == (game, True, 0.25)
        assert store.card["obs"] | {"height": 84, "width": 84, "channels": 1, "colour": "ale_gray"} == store.card["obs"]
        assert len(store.lengths) >= 3
        whole = store.episode(0)
        np.testing.assert_array_equal(whole.obs, episodes[0].obs[: len(whole)])

    quick = [*QUICK, "callbacks.progress.every=0", "data.batch_size=2", "data.validation.length=12"]
    quick += ["trainer.max_steps=4", "trainer.val_check_interval=2"]
    run("train", "experiment=grey84_tiny", f"store={stores['pong']}", f"out={tmp_path / 'run'}", *quick)
    checkpoint = f"checkpoint={tmp_path / 'run' / 'best.ckpt'}"
    run("imagine", checkpoint, f"store={stores['pong']}", f"out={tmp_path / 'dream'}", "rollouts=2", "horizon=5")
    assert Store.open(tmp_path / "dream" / "store").card["obs"]["channels"] == 1
    run("quality", checkpoint, f"store={stores['pong']}", f"out={tmp_path / 'quality'}", "windows=4", "reward_rows=8")
    figures = json.loads((tmp_path / "quality" / "metrics.json").read_text())
    assert np.isfinite(figures["psnr_changed_db"]).all()
    run("finetune", checkpoint, f"store={stores['breakout']}", f"out={tmp_path / 'moved'}", "windows=4", *quick)
    assert (tmp_path / "moved" / "finetuned" / "best.ckpt").exists()
