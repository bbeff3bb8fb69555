"""Reward, termination and loss of a life of a transition, from its two frames and action, with a recurrent memory.

Source: Alonso et al. 2024 (DIAMOND), section 3.1 and appendix; `DiffusionWorldModel` joins it to the denoiser.

Legend: B batch, T transitions, C colour channels, H and W pixels, K reward bins, E kinds of end.
"""

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from worldmodels.nn.recurrent import init_lstm
from worldmodels.nn.unet import Encoder, conv3x3
from worldmodels.ops.categorical import symlog_bins, two_hot
from worldmodels.types import Metrics, Segment, UserError

Memory = tuple[Tensor, Tensor]
DOUBLINGS = 14  # of the bins of rewards: up to 16383


class RewardModel(nn.Module):
    """Distribution of the reward, probability of termination and of a lost life, of each transition in turn.

    Args:
        num_actions: size A of the action vocabulary.
        image_channels: C.
        image_size: H = W.
        cond_channels: width of the action embedding.
        channels: channels of each level.
        depths: residual blocks of each level.
        attention: whether each level attends (the middle always does).
        lstm: width of the LSTM.
        middle: number of attending blocks at the lowest level; without any, and with a single level, the LSTM sees
            the place of every patch, which a small budget needs to tell a ball behind the paddle from one before it.
        projection: width of a layer between encoder and LSTM, whose output the action embedding joins (DIAMOND: none).
            A layer norm follows it: without one, which the first weights decided, some trainings saturated the LSTM
            early on and never foresaw a reward.
        patch: as in `DenoiserNetwork`.
        normed_skip: as in `nn.unet.SelfAttention` (DIAMOND: true).
        difference_std: where given, the second frame enters as its difference from the first, divided by this, so
            that a score that changes or a ball that vanishes stands out of the scene (DIAMOND: the frame itself).
        frame_scale: with `difference_std`, what the first frame is multiplied by. A scene that never changes acts as
            thousands of equal inputs to the projection, and at high learning rates it saturates the LSTM within a few
            steps; a small scale keeps the scene readable without that.
        rewards: "sign" for three classes, -1, 0 and +1 (DIAMOND); "two_hot" for magnitudes, by 29 bins that are equally
            spaced in symlog, 0, +-1, +-3, +-7 ... +-16383 (`ops.categorical`), or more by `doublings`.
        life_loss: "end" counts the loss of a life as termination (DIAMOND); "apart" gives it an output of its own;
            "ignored" does neither.
        event_weight: how often a transition with a reward, a termination or a lost life counts in the loss of that
            output, where the others count once (DIAMOND: 1). Events are rare, one transition in dozens or in hundreds,
            and a weight teaches them sooner; `predict` takes it out again, so that probabilities stay as calibrated as
            they would be without. What it does not take out is how windows are drawn: with `data.event_share`, or
            `data.priority` without its full beta, probabilities are those among the rows drawn. Where the frames do not
            settle whether an event comes, its odds are then too high, by as many times as rows with it are drawn more
            often than others.
        unknown_next: "grey" trains also where the log does not hold the frame after the last action, with the grey
            padding in its place (DIAMOND's code); "masked" leaves these transitions out, and so learns of no end in a
            log that keeps no last frames; "foreseen" leaves them out as well, but judges termination, everywhere,
            before the frame after the action is seen: from the memory of what came before it and the action. Shown a
            sign of its own where a last frame is unknown, a model would wait for that sign, and no dream gives it.
        doublings: of "two_hot", whose bins reach 2^doublings - 1 on either side. Training refuses a log with rewards
            beyond them, and fine-tuning adds bins (`learners.adapting.fit_rewards`).
        terminal_frame: "stale" shows the frame before a termination again in place of the one after it, as DIAMOND's
            play mostly did; "logged" shows what the log holds.
        games: rows of the vocabulary of games (`nn.games`), of which it is told beside the action; 0 for none.

    Raises:
        UserError: an unknown choice, or a weight that is not above 0.
    """

    def __init__(
        self,
        num_actions: int,
        image_channels: int,
        image_size: int,
        cond_channels: int,
        channels: list[int],
        depths: list[int],
        attention: list[bool],
        lstm: int,
        middle: int = 2,
        projection: int = 0,
        patch: int = 1,
        normed_skip: bool = False,
        difference_std: float | None = None,
        frame_scale: float = 1.0,
        rewards: str = "sign",
        life_loss: str = "end",
        event_weight: float = 1.0,
        unknown_next: str = "grey",
        terminal_frame: str = "stale",
        games: int = 0,
        doublings: int = DOUBLINGS,
    ) -> None:
        super().__init__()
        for name, value, allowed in (
            ("rewards", rewards, ("sign", "two_hot")),
            ("life_loss", life_loss, ("end", "apart", "ignored")),
            ("unknown_next", unknown_next, ("grey", "masked", "foreseen")),
            ("terminal_frame", terminal_frame, ("stale", "logged")),
        ):
            if value not in allowed:
                raise UserError(f"reward_model.{name} is {value!r}; allowed are {', '.join(map(repr, allowed))}.")
        if event_weight <= 0:
            raise UserError(f"reward_model.event_weight is {event_weight}; it must be more than 0 (1 is even).")
        self.patch, self.difference_std, self.frame_scale = patch, difference_std, frame_scale
        self.rewards, self.life_loss, self.event_weight = rewards, life_loss, event_weight
        self.unknown_next, self.terminal_frame = unknown_next, terminal_frame
        self.register_buffer("bins", symlog_bins(1 if rewards == "sign" else doublings), persistent=False)
        self.ends = 2 if life_loss == "apart" else 1
        self.action_embedding = nn.Embedding(num_actions, cond_channels)
        self.game = nn.Embedding(games, cond_channels) if games else None
        self.conv_in = conv3x3(2 * image_channels * patch**2, channels[0])
        self.encoder = Encoder(channels, depths, cond_channels, attention, middle, normed_skip)
        side = image_size // patch
        for _ in channels[1:]:
            side = math.ceil(side / 2)
        width = channels[-1] * side**2
        self.projection: nn.Module = nn.Identity()
        if projection:
            self.projection = nn.Sequential(nn.Linear(width, projection), nn.LayerNorm(projection), nn.SiLU())
        self.lstm = nn.LSTM(projection + cond_channels if projection else width, lstm, batch_first=True)
        self.foreseen = None
        if unknown_next == "foreseen":
            self.foreseen = nn.Sequential(
                nn.Linear(lstm + cond_channels, lstm), nn.SiLU(), nn.Linear(lstm, 2, bias=False)
            )
        outputs = len(self.bins) + 2 * (self.ends - (self.foreseen is not None))
        self.head = nn.Sequential(nn.Linear(lstm, lstm), nn.SiLU(), nn.Linear(lstm, outputs, bias=False))
        init_lstm(self.lstm)

    def stages(self) -> list[list[nn.Module]]:
        """Its parts from input to output, the last of which are its heads."""
        heads: list[nn.Module] = [self.head] if self.foreseen is None else [self.head, self.foreseen]
        first: list[nn.Module] = [self.action_embedding, self.conv_in]
        first += [] if self.game is None else [self.game]
        return [first, *self.encoder.stages(), [self.projection, self.lstm], heads]

    def forward(
        self,
        frames: Tensor,
        next_frames: Tensor,
        action: Tensor,
        memory: Memory | None = None,
        game: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Memory]:
        """Logits of T transitions, as they are trained (with `event_weight` in them).

        Args:
            frames: (B, T, C, H, W) in [-1, 1], before the action.
            next_frames: (B, T, C, H, W), after it.
            action: (B, T) int64.
            memory: hidden and cell state, (1, B, lstm) each; without it a foreseen termination of the first transition
                knows its action alone.
            game: (B,) int64, rows of the vocabulary; 0 by default.

        Returns:
            Reward logits (B, T, K) by bin; logits (B, T, E, 2) of not ending and ending, by termination and, where it
            is apart, by loss of a life; the new memory.
        """
        if self.difference_std:
            next_frames, frames = (next_frames - frames) / self.difference_std, frames * self.frame_scale
        pairs = rearrange(torch.cat([frames, next_frames], dim=2), "b t c h w -> (b t) c h w")
        if self.patch > 1:  # patches of one pixel would be copied
            pairs = F.pixel_unshuffle(pairs, self.patch)
        x = self.conv_in(pairs.to(self.conv_in.weight.dtype))
        told = self.action_embedding(action)
        if self.game is not None:
            told = told + self.game(torch.zeros_like(action[:, 0]) if game is None else game)[:, None]
        x, _ = self.encoder(x, told.flatten(0, 1))
        x = self.projection(x.reshape(*action.shape, -1).to(told.dtype))
        if isinstance(self.projection, nn.Sequential):
            x = torch.cat([x, told], dim=-1)
        remembered = memory
        x, memory = self._remember(x, memory)
        reward, end = self.head(x).float().tensor_split([len(self.bins)], dim=-1)
        if self.foreseen is not None:  # an LSTM's output is its hidden state
            first = torch.zeros_like(x[:, :1]) if remembered is None else remembered[0].transpose(0, 1).to(x.dtype)
            before = torch.cat([first, x[:, :-1]], dim=1)
            termination = self.foreseen(torch.cat([before, told.to(x.dtype)], dim=-1)).float()
            end = torch.cat([termination, end], dim=-1)
        return reward, end.unflatten(-1, (self.ends, 2)), memory

    def _remember(self, x: Tensor, memory: Memory | None) -> tuple[Tensor, Memory]:
        """The LSTM over (B, T, D); one step of it by the cell, since oneDNN rearranges all weights at every call."""
        if memory is None or x.shape[1] > 1:
            return self.lstm(x, memory)
        hidden, cell = torch.lstm_cell(x[:, 0], (memory[0][0], memory[1][0]), *self.lstm.all_weights[0])
        return hidden[:, None], (hidden[None], cell[None])

    def predict(
        self,
        frames: Tensor,
        next_frames: Tensor,
        action: Tensor,
        memory: Memory | None = None,
        game: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Memory]:
        """Probabilities of T transitions; arguments as in `forward`.

        A loss in which events count w times makes their odds w times too high, so their logits are lowered by ln w.

        Returns:
            Reward probabilities (B, T, K) by bin; probabilities (B, T, E) of ending; the new memory.
        """
        reward, end, memory = self(frames, next_frames, action, memory, game)
        weight = math.log(self.event_weight)
        reward = torch.where(self.bins == 0, reward, reward - weight)
        return reward.softmax(-1), (end[..., 1] - end[..., 0] - weight).sigmoid(), memory

    def loss(
        self, segment: Segment, frames: Tensor, next_frames: Tensor, game: Tensor | None = None
    ) -> tuple[Tensor, Metrics]:
        """Sum of the cross-entropies of reward, termination and lost life over the transitions that count.

        Args:
            segment: of T transitions; a window counts by its `importance` in `side`, if there is one.
            frames: (B, T, C, H, W) in [-1, 1], before the actions.
            next_frames: (B, T, C, H, W), after them; what is no frame of the log counts only where `unknown_next`
                is "grey".
            game: (B,) int64, as in `forward`.
        """
        if self.terminal_frame == "stale":
            next_frames = torch.where(segment.terminated[..., None, None, None], frames, next_frames)
        reward_logits, end_logits, _ = self(frames, next_frames, segment.action, None, game)
        importance = segment.side.get("importance", torch.ones(len(frames), device=frames.device))[:, None]
        real = segment.mask if self.unknown_next == "grey" else segment.mask & segment.next_mask
        # nothing was seen before the first transition, from which its end could be foreseen
        judged = real if self.foreseen is None else F.pad(segment.mask[:, 1:], (1, 0))

        def mean(logits: Tensor, target: Tensor, event: Tensor, real: Tensor) -> Tensor:
            """Of soft targets (B, T, classes), over the real transitions."""
            weight = real * torch.where(event, self.event_weight, 1.0)
            error = F.cross_entropy(logits.movedim(-1, 1), target.movedim(-1, 1), reduction="none")
            return (error * weight * importance).sum() / weight.sum().clamp(min=1e-9)

        reward = segment.reward.sign() if self.rewards == "sign" else segment.reward
        lost = segment.side.get("life_loss", torch.zeros_like(segment.terminated))
        terminated = segment.terminated | lost if self.life_loss == "end" else segment.terminated
        losses = {"loss_reward": mean(reward_logits, two_hot(reward, self.bins), reward != 0, real)}
        kinds = (("loss_termination", terminated, judged), ("loss_life_loss", lost, real))
        for k, (name, event, where) in enumerate(kinds[: self.ends]):
            losses[name] = mean(end_logits[:, :, k], torch.stack([~event, event], -1).float(), event, where)
        return torch.stack(list(losses.values())).sum(), {name: value.detach() for name, value in losses.items()}


def grown(head: Tensor, old: int, new: int) -> Tensor:
    """Weights of the last layer of `RewardModel.head` with `new` doublings in place of `old`, which are fewer.

    Old bins keep their weights, by value, and new ones begin with those of the outermost old bin on their side, which
    no reward was ever near to.
    """
    bins, others = head.tensor_split([2 * old + 1])
    low, high = (bins[k].expand(new - old, -1) for k in (0, -1))
    return torch.cat([low, bins, high, others])


def doublings_for(greatest: float) -> int:
    """Fewest doublings whose bins reach a reward of this magnitude."""
    return math.ceil(math.log2(greatest + 1))
