"""Write one picture of a dream: what really happened, and dreams of it with the logged actions and with random ones.

worldmodels imagine checkpoint=CKPT store=STORE out=DIR
python scripts/dream_picture.py DIR --rollout 0 --out docs/dream_50.png
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from worldmodels.evaluation.pictures import strip

STEPS = (1, 5, 10, 20, 30, 40, 50)


def picture(dreams: Path, rollout: int, path: Path) -> Path:
    """A strip of one rollout of the folder that `worldmodels imagine` wrote; steps past its horizon are left out."""
    with np.load(dreams / "logged.npz") as logged, np.load(dreams / "random.npz") as random:
        rows = {"real": logged["real_obs"], "dream": logged["obs"], "random": random["obs"]}
        frames = {name: torch.from_numpy(obs[rollout]) for name, obs in rows.items()}
    return strip(path, frames, STEPS)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dreams", type=Path, help="folder that `worldmodels imagine` wrote")
    parser.add_argument("--rollout", type=int, default=0, help="which of them")
    parser.add_argument("--out", type=Path, default=Path("docs/dream_50.png"))
    given = parser.parse_args()
    print(picture(given.dreams, given.rollout, given.out))
