"""Write conf/game/*.yaml from worldmodels/evaluation/atari_hns.csv: `python scripts/make_game_configs.py`."""

import csv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "worldmodels" / "evaluation" / "atari_hns.csv"
GAMES = ROOT / "conf" / "game"
SUITES = {"atari57": "atari57", "atari100k_26": "atari100k", "dqn_replay_60": "dqn_replay", "rlu_46": "rl_unplugged"}
SYMMETRY = dict.fromkeys(("amidar", "asterix", "breakout", "freeway", "ms_pacman"), "flip_lr")
"""That the play field has but for score bars, the side of the start and the like, by the names of
worldmodels/ops/groups.py: for augmentation or for symmetry of some of a model's parts. Nothing uses it unless asked."""


def configs() -> dict[str, str]:
    """The text of every game's yaml, by file name."""
    with TABLE.open(encoding="utf-8", newline="") as table:
        return {f"{row['game']}.yaml": config(row) for row in csv.DictReader(table)}


def config(row: dict[str, str]) -> str:
    """The text of one game's yaml."""
    actions = row["minimal_action_set_full18_indices"].split()
    suites = [name for column, name in SUITES.items() if row[column] == "1"]
    nearly = SYMMETRY.get(row["game"])
    symmetry = f"approximate_symmetry: {nearly}  # of play; nothing uses it unless asked\n" if nearly else ""
    return f"""\
# Written by scripts/make_game_configs.py from worldmodels/evaluation/atari_hns.csv: edit that, not this.
name: {row["game"]}
ale_id: {row["ale_v5_id"]}
actions: [{", ".join(actions)}]  # that have an effect, in ALE's 18-action set
lives: {row["lives_at_reset"]}
screen: {row["screen_hw"]}
score:
  random: {row["random"] or "null"}
  human: {row["human"] or "null"}
suites: [{", ".join(suites)}]
{symmetry}"""


if __name__ == "__main__":
    for name, text in configs().items():
        (GAMES / name).write_text(text, encoding="utf-8")
    print(f"wrote {len(configs())} files to {GAMES}")
