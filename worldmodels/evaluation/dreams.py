"""Dreams as files: films and strips to look at, arrays to compute with, and a store to train on."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from worldmodels.data.card import Card, card_digest
from worldmodels.data.disk import atomic, disk_errors, remove
from worldmodels.data.mixing import Mixture
from worldmodels.data.store import Store
from worldmodels.evaluation.pictures import difference, montage, strip, write_gif, write_mp4
from worldmodels.evaluation.rollouts import track
from worldmodels.imagination import imagine
from worldmodels.types import PER_WINDOW, Episode, Policy, Segment, UserError, WorldModel

STRIP = (0, 1, 2, 4, 8, 16, 32, 50)
"""Steps that a strip shows."""


def dream(
    model: WorldModel,
    policy: Callable[[Segment], Policy],
    windows: Segment,
    burn_in: int,
    generator: torch.Generator,
    batch_size: int = 8,
    description: str = "dreams",
) -> dict[str, Tensor]:
    """Roll out from the first `burn_in` transitions of each of `windows`, for as long as these last.

    Args:
        model: on the generator's device.
        policy: makes the policy for a batch of windows.
        windows: N windows of burn_in + T transitions.
        burn_in: real transitions seen first.
        generator: of all noise.
        batch_size: rollouts at once.
        description: stands before the bar that shows the remaining time.

    Returns:
        obs (N, T+1, C, H, W) uint8, obs[:, 0] being the last real frame; action (N, T) int64; reward (N, T) float32
        and terminated (N, T) bool as drawn; reward_mean and terminated_mean (N, T) float32; mask (N, T) bool, false
        after an imagined termination; where the model tells lost lives apart, `life_loss` (N, T) bool and
        `life_loss_mean` (N, T) float32.
    """
    done = []
    for rows in track(np.array_split(np.arange(windows.batch_size), -(-windows.batch_size // batch_size)), description):
        batch = windows.rows(torch.from_numpy(rows)).to(generator.device)
        context = batch.steps(0, burn_in)
        s = imagine(model, policy(batch), context, windows.length - burn_in, generator).to("cpu")
        columns = {"obs": s.obs, "action": s.action, "reward": s.reward, "terminated": s.terminated, "mask": s.mask}
        done.append({**columns, **{k: v for k, v in s.side.items() if k not in PER_WINDOW}})
    return {name: torch.cat([part[name] for part in done]) for name in done[0]}


def write_files(
    folder: Path, name: str, dreamed: Mapping[str, Tensor], real: Segment | None, starts: np.ndarray, shown: int = 4
) -> None:
    """Write name.npz of all rollouts, and name.mp4, name.gif and strip_name.png of `shown` evenly spaced ones.

    Args:
        folder: exists.
        name: of the files.
        dreamed: as `dream` returns it.
        real: what really happened in the same steps, (N, T); None where the actions were others.
        starts: (N, 2) episode and first step of each window, kept in the npz.
        shown: rollouts side by side in the films; the first three of them make the strip.
    """
    arrays = {**dreamed, "start": torch.from_numpy(starts)}
    if real is not None:
        arrays |= {"real_obs": real.obs, "real_reward": real.reward, "real_terminated": real.terminated}
    np.savez_compressed(folder / f"{name}.npz", allow_pickle=False, **{k: v.numpy() for k, v in arrays.items()})
    write_pictures(folder, name, dreamed["obs"], None if real is None else real.obs, shown)


def write_pictures(folder: Path, name: str, imagined: Tensor, real: Tensor | None, shown: int = 4) -> None:
    """Write name.mp4, name.gif and strip_name.png of `shown` evenly spaced rollouts: with what really happened above.

    Args:
        folder: exists.
        name: of the files.
        imagined: (N, T+1, C, H, W) uint8, frame 0 being the last real one.
        real: what really happened, likewise; None where the actions were others.
        shown: rollouts side by side in the films; the first three of them make the strip.
    """
    chosen = torch.linspace(0, len(imagined) - 1, min(shown, len(imagined))).round().long()
    imagined = imagined[chosen]
    films = [imagined] if real is None else [real[chosen], imagined]
    write_mp4(folder / f"{name}.mp4", montage(films, scale=3))
    write_gif(folder / f"{name}.gif", montage(films, scale=2))
    rows: dict[str, Tensor] = {}
    for k in range(min(3, len(chosen))):
        if real is not None:
            rows |= {f"real {k + 1}": films[0][k], f"imagined {k + 1}": films[1][k]}
            rows[f"difference {k + 1}"] = difference(films[0][k], films[1][k])
        else:
            rows[f"imagined {k + 1}"] = imagined[k]
    strip(folder / f"strip_{name}.png", rows, STRIP)


def write_store(
    path: Path,
    dreams: Mapping[str, Mapping[str, Tensor]],
    real: Store | Mixture,
    starts: np.ndarray,
    checkpoint_sha256: str,
    signs: bool,
) -> None:
    """Write dreams as a store to train on, one episode a rollout up to its imagined end.

    Its card is that of the real store with source "imagined" and a policy that names checkpoint and data. Rewards,
    ends and lost lives are as drawn from the model.

    Args:
        path: a new folder, or one that an earlier call wrote (which is replaced).
        dreams: name of the policy to what `dream` returned.
        real: where the dreams started, play of one game.
        starts: (N, 2) episode and first step of each window.
        checkpoint_sha256: of the model.
        signs: whether the model gives the sign of a reward alone, so that it dreams of clipped ones.

    Raises:
        UserError: the folder holds anything but imagined play.
    """
    if path.exists() and not (path / "sources" / "imagined.json").is_file():
        raise UserError(f"{path} holds something other than imagined play; give another folder with out=...")
    with disk_errors(path), atomic(path) as tmp:
        with Store.create(tmp, _card(list(dreams), real, checkpoint_sha256, signs)) as store:
            for name, d in dreams.items():
                for k, start in enumerate(starts.tolist()):
                    store.append(_episode({key: v[k] for key, v in d.items()}, {"actions": name, "from": start}))
        remove(path)


def _card(policies: list[str], real: Store | Mixture, checkpoint_sha256: str, signs: bool) -> Card:
    policy = {
        "type": "imagined",
        "actions": policies,
        "checkpoint_sha256": checkpoint_sha256,
        "from_store": real.uuid,
        "from_card": card_digest(real.card),
    }
    # signs of rewards that were never larger are the rewards themselves
    clipped = real.card["reward"]["clipped"] or (signs and float(np.abs(real.column("reward")).max()) > 1)
    return {**real.card, "source": "imagined", "policy": policy, "reward": {"clipped": clipped}}


def _episode(row: Mapping[str, Tensor], info: dict[str, object]) -> Episode:
    length = int(row["mask"].sum())
    frames = row["obs"][: length + 1].permute(0, 2, 3, 1).numpy()
    frames = frames[..., 0] if frames.shape[-1] == 1 else frames
    terminated = row["terminated"][:length].numpy()
    truncated = np.zeros(length, bool)
    truncated[-1] = not terminated[-1]
    return Episode(
        obs=frames[:-1],
        action=row["action"][:length].numpy().astype(np.uint8),
        reward=row["reward"][:length].numpy(),
        terminated=terminated,
        truncated=truncated,
        life_loss=row["life_loss"][:length].numpy() if "life_loss" in row else np.zeros(length, bool),
        final_obs=frames[-1],
        info=info,
    )
