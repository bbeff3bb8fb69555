"""The page says what was measured, what is missing, and needs no other file."""

import json
import re

import pytest
import torch

from worldmodels.evaluation.pictures import plot, strip, write_mp4
from worldmodels.evaluation.report import training_curves, write_report

HORIZONS = [1, 2, 4, 8, 16]
QUALITY = {
    "horizons": HORIZONS,
    "windows": 128,
    "episodes": 3,
    "psnr_gain_db": [3.0, 2.0, 1.0, 0.5, -0.2],
    "psnr_gain_interval_db": [[2.5, 3.5]] * 5,
    "psnr_gain_changed_db": [4.0, 3.0, 2.0, 1.0, -0.1],
    "psnr_gain_changed_interval_db": [[-1.0, 5.0]] * 5,
    "paddle_hit_rate_8": 0.91,
    "ball_hit_rate_8": 0.49,
    "reward_macro_f1": None,
    "reward_f1_events": 61,
    "seconds": 61.5,
}
for kind in ("psnr", "psnr_changed"):
    QUALITY[f"{kind}_db"] = [30.0, 29.0, 28.0, 27.0, None]
    QUALITY[f"{kind}_static_db"] = {"0.0": [21.0] * 5, "0.5": [25.25] * 5, "1.0": [20.0, 19.0, 18.0, 17.0, None]}
KEYS = {
    "pong": {
        "psnr_gain_db",
        "psnr_gain_changed_db",
        "paddle_hit_rate_8",
        "ball_hit_rate_8",
        "reward_macro_f1",
        "reward_f1_events",
    },
    "breakout": {"finetune_psnr_changed_db", "scratch_psnr_changed_db"},
}


def put(folder, metrics):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


@pytest.fixture
def run(tmp_path):
    run, film = tmp_path / "run", torch.zeros((6, 3, 32, 32), dtype=torch.uint8)
    train = put(run / "pong", {"seconds": 400})
    rows = ["step,train/loss,val/rollout_psnr_changed", "0,2.0,", "10,1.0,12.5", "20,0.5,13.5"]
    (train / "metrics.csv").write_text("\n".join(rows) + "\n")
    put(run / "quality", QUALITY)
    imagine = put(run / "imagine", {"seconds": 20})
    write_mp4(imagine / "logged.mp4", film)
    strip(imagine / "strip_logged.png", {"real": film}, (0, 1))
    finetune = {"finetune_psnr_changed_db": [15.0, 14.0], "scratch_psnr_changed_db": [13.0, 12.0], "seconds": 100}
    finetune |= {
        "horizons": [1, 8],
        "psnr_changed_static_db": {"0.0": [9.0, 8.0], "0.5": [9.5, 7.0], "1.0": [6.0, 5.0]},
    }
    plot(put(run / "breakout", finetune) / "curves.svg", {"": {"a": ((0, 1), (0.0, 1.0))}}, "step", "dB")
    store = put(tmp_path / "store", {"seconds": 9})
    (store / "sources").mkdir()
    (store / "sources" / "atari_play.json").write_text(json.dumps({"licence": "<script>alert(1)</script>"}))
    return run


def row_of(html: str, key: str) -> str:
    return re.search(rf"<tr><td>[^\n]*<br><code[^>]*>{re.escape(key)}.*?</tr>", html, re.S)[0]


def test_report_json_has_exactly_the_keys(run):
    _, path = write_report(run, {"pong": run.parent / "store"})
    report = json.loads(path.read_text())
    assert {k: set(v) for k, v in report.items() if k != "seconds"} == KEYS
    assert report["pong"]["psnr_gain_db"] == QUALITY["psnr_gain_db"] and report["pong"]["reward_macro_f1"] is None
    assert report["breakout"] == {"finetune_psnr_changed_db": [15.0, 14.0], "scratch_psnr_changed_db": [13.0, 12.0]}
    assert report["seconds"] == {"collect pong": 9, "train": 400, "quality": 61.5, "imagine": 20, "finetune": 100}


def test_bars_are_judged(run):
    html = write_report(run, {})[0].read_text()
    assert "✗ missed" in row_of(html, "pong.psnr_gain_changed_db")  # at 16
    assert "✓ met" in row_of(html, "pong.psnr_gain_db")  # 16 is only a goal there
    assert "t+1: 3.00 [2.50, 3.50]" in row_of(html, "pong.psnr_gain_db")
    assert "✓ met" in row_of(html, "pong.paddle_hit_rate_8") and "✗ missed" in row_of(html, "pong.ball_hit_rate_8")
    assert "not measured" in row_of(html, "pong.reward_macro_f1")
    assert "met" not in row_of(html, "pong.reward_f1_events").split("</code>")[1]
    assert "2 of 4 bars are met" in html
    assert re.search(r"changed: best blend of both.*25\.25", html, re.S)


def test_the_move_is_shown_beside_static_frames(run):
    html = write_report(run, {})[0].read_text().partition("Moved to another game")[2]
    rows = {
        "fine-tuned": ("15.00", "14.00"),
        "from scratch": ("13.00", "12.00"),
        "copy the last frame": ("6.00", "5.00"),
        "best blend of both": ("9.50", "8.00"),
    }
    for label, (near, far) in rows.items():
        assert re.search(rf"changed: {label}</td>[^/]*{near}</td>[^/]*{far}</td>", html), label


def test_the_page_stands_alone(run):
    html = write_report(run, {"pong": run.parent / "store"})[0].read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert len(sources) == 6  # film, PSNR, strip, losses, rollouts, fine-tuning
    assert all(s.startswith("data:") for s in sources)
    assert {s.partition(";")[0] for s in sources} == {"data:video/mp4", "data:image/png", "data:image/svg+xml"}
    assert "<script" not in html and "&lt;script&gt;alert(1)" in html


def test_missing_stages_are_named(tmp_path):
    (tmp_path / "run").mkdir()
    html, path = write_report(tmp_path / "run", {"pong": tmp_path / "none"})
    report = json.loads(path.read_text())
    assert {k: set(v) for k, v in report.items() if k != "seconds"} == KEYS and report["seconds"] == {}
    assert all(v is None for game in KEYS for v in report[game].values())
    text = html.read_text()
    assert text.count("is not there yet. Make it with") == 6
    assert text.count("not measured yet") == 8 and "met</span>" not in text


def test_training_curves_skip_empty_cells(run):
    curves = training_curves(run / "pong" / "metrics.csv")
    assert curves["train/loss"] == ([0.0, 10.0, 20.0], [2.0, 1.0, 0.5])
    assert curves["val/rollout_psnr_changed"] == ([10.0, 20.0], [12.5, 13.5])
