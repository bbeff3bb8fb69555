"""The denoiser of the diffusion world model: what its network (nn/denoiser_network.py) sees and learns, EDM's loss.

Source: Karras et al. 2022 (EDM) and Alonso et al. 2024, "Diffusion for World Modeling" (DIAMOND), section 3 and
appendices.

Legend: B batch, L frames of context, T transitions, C colour channels, H and W pixels.
"""

from typing import Any

import torch
from torch import Tensor, nn

from worldmodels.models.frames import blurred, images_of, to_float, to_uint8
from worldmodels.nn.denoiser_network import DenoiserNetwork
from worldmodels.nn.memory import MotionMemory
from worldmodels.nn.symmetrise import orbit, orbit_mean
from worldmodels.ops.edm import add_noise, check_noise, preconditioners, training_sigmas
from worldmodels.ops.groups import action_table, group
from worldmodels.ops.motion import move_on
from worldmodels.ops.shortcut import FewStep, jump_levels, jump_target
from worldmodels.types import Segment, UserError

FRAME_STD = 0.5  # standard deviation by which frames are divided where they enter a network (DIAMOND's sigma_data)
BLURS = 10  # levels of context noise that the network tells apart (GameNGen, section 3.2.1)


class Denoiser(nn.Module):
    """EDM denoiser of the next frame given L frames and L actions.

    Args:
        network: settings of `DenoiserNetwork`.
        sigma_data: standard deviation of what is denoised (the frame, or its difference from the last frame).
        sigma_offset: standard deviation of the offset noise.
        noise: settings of `ops.edm.training_sigmas`.
        centre: what is denoised: with "none" the frame itself (DIAMOND); with "last" its difference from the last
            context frame, so that an untrained network copies it and sprites stay sharp; with "moved" its difference
            from the last frame moved on by its own motion (`ops.motion.move_on`), so that what flies goes on flying.
        reach: for "moved", the largest displacement in a step, pixels down and across.
        still: a pixel that is predicted this close to the centre, in [-1, 1], is left as the centre has it, so that
            faint errors do not add up over a rollout (DIAMOND: 0).
        changed_weight: weight in the loss of pixels that differ from the last context frame, or from where "moved"
            expects things, by more than 8/255, where the others weigh 1. 1 is DIAMOND's plain mean.
        rollout: how many further targets are conditioned on the model's own output (DIAMOND: 1).
        rollout_share: share of the batches that have these further targets; the others cost half as much (DIAMOND: 1).
        rounding: whether frames are rounded to 8 bits; DIAMOND cuts the fraction off.
        padding: what stands for frames before an episode's start, "grey" (DIAMOND) or "black".
        noiseless: the network sees zeros for the noisy frame, so that with one noise level and one call it is a
            deterministic regressor of the same size, the baseline of a diffusion model.
        few_step: fields of `FewStep`, for a network that is told how far to jump; None for EDM alone (DIAMOND).
        context_noise: greatest standard deviation of Gaussian noise that the context is trained with, on frames in
            [-1, 1], so that a rollout's own errors are nothing new; each row has a level from 0 to it, which the
            network is told (Valevski et al. 2024, "GameNGen", section 3.2.1). DIAMOND: 0.
        memory: settings of `nn.memory.MotionMemory`, whose image joins the first convolution's output, so that what
            lies further back than the context counts as well; None for none (DIAMOND).
        games: rows of the vocabulary of games (`nn.games`), of which the network is told; 0 for none (DIAMOND).
        symmetry: "none" (DIAMOND), "flip_lr", "flip_ud", "c4" or "d4": the network's output is the mean over what the
            group makes of frames, noise and actions, so that frames, moved, with noise and actions that are moved
            along, give the next frame, moved, exactly. It has no parameters, and costs as many times the network as
            the group has elements.
    """

    def __init__(
        self,
        network: dict[str, Any],
        sigma_data: float = 0.5,
        sigma_offset: float = 0.3,
        noise: dict[str, Any] | None = None,
        centre: str = "none",
        changed_weight: float = 1.0,
        rollout: int = 1,
        rounding: bool = False,
        rollout_share: float = 1.0,
        still: float = 0.0,
        reach: tuple[int, int] = (5, 7),
        padding: str = "grey",
        noiseless: bool = False,
        few_step: dict[str, Any] | None = None,
        context_noise: float = 0.0,
        memory: dict[str, Any] | None = None,
        games: int = 0,
        symmetry: str = "none",
    ) -> None:
        super().__init__()
        if centre not in ("none", "last", "moved"):
            raise UserError(f"denoiser.centre is {centre!r}; allowed are 'none', 'last' and 'moved'.")
        if padding not in ("grey", "black"):
            raise UserError(f"denoiser.padding is {padding!r}; allowed are 'grey' and 'black'.")
        if centre == "moved" and network["context"] < 4:
            raise UserError(f"denoiser.centre=moved needs 4 frames of context, not {network['context']}.")
        if unknown := set(few_step or {}) - set(FewStep._fields):
            raise UserError(f"denoiser.few_step has no setting {min(unknown)!r}; it has doublings and share.")
        if type(rollout) is not int or rollout < 0:
            raise UserError(f"denoiser.rollout is {rollout}; it must be a whole number of at least 0.")
        if sigma_data <= 0:
            raise UserError(f"denoiser.sigma_data is {sigma_data}; it must be above 0.")
        if context_noise < 0:
            raise UserError(f"denoiser.context_noise is {context_noise}; it must be 0 (none) or more.")
        if memory is not None and network.get("backbone") == "unet2d":
            raise UserError(
                "denoiser.memory cannot join network.backbone=unet2d; choose unet or dilated, or denoiser.memory=null."
            )
        self.few_step = None if few_step is None else FewStep(**few_step).check()
        labels = {"jump": self.few_step.doublings + 1} if self.few_step else {}
        labels |= {"blur": BLURS} if context_noise else {}
        labels |= {"game": games} if games else {}
        self.network = DenoiserNetwork(**network, hints=int(centre == "moved"), labels=labels)
        self.context: int = network["context"]
        self.sigma_data, self.sigma_offset = sigma_data, sigma_offset
        self.noise = noise or {"loc": -0.4, "scale": 1.2, "sigma_min": 2e-3, "sigma_max": 20.0}
        check_noise(self.noise, "denoiser.noise")
        self.centre, self.changed_weight, self.rollout, self.rounding = centre, changed_weight, rollout, rounding
        self.rollout_share, self.still, self.reach, self.padding = rollout_share, still, tuple(reach), padding
        self.noiseless, self.context_noise = noiseless, context_noise
        self.memory = None if memory is None else MotionMemory(width=network["channels"][0], **memory)
        self.symmetry = group(symmetry)
        self.register_buffer("moves", action_table(self.symmetry, range(network["num_actions"])), persistent=False)

    @property
    def history(self) -> int:
        """Frames before the context that the memory makes use of."""
        return 0 if self.memory is None else max(0, self.memory.window - self.context + 1)

    def stages(self) -> list[list[nn.Module]]:
        """Its parts from input to output, the last of which are its head."""
        first, *others = self.network.stages()
        return [[*first, *([] if self.memory is None else [self.memory])], *others]

    @torch.no_grad()
    def centre_of(self, context: Tensor) -> Tensor:
        """What is subtracted from the frame before it is denoised, for context (B, L, C, H, W)."""
        if self.centre == "moved":
            with torch.autocast(context.device.type, enabled=False):  # which displacement is best hangs on small sums
                if len(self.symmetry) == 1:
                    return move_on(context, self.reach)
                return orbit_mean(move_on(orbit(context, self.symmetry), self.reach), self.symmetry)
        return context[:, -1] if self.centre == "last" else torch.zeros_like(context[:, -1])

    def _scaled(self, context: Tensor, centre: Tensor) -> Tensor:
        """Context (B, L, C, H, W) as the network's input (B, (L + hints)*C, H, W), of about unit variance.

        Centred on a frame, the earlier ones enter as differences from the last: motion stands out of the scene.
        """
        if self.centre == "none":
            return context.flatten(1, 2) / FRAME_STD
        last = context[:, -1:]
        frames = [(context[:, :-1] - last) / self.sigma_data, last / FRAME_STD]
        if self.centre == "moved":
            frames.append((centre[:, None] - last) / self.sigma_data)
        return torch.cat(frames, dim=1).flatten(1, 2)

    def jump_of(self, calls: int) -> int:
        """How far a sampler of so many network calls jumps, in doublings of the shortest; 0 is EDM's call."""
        if self.few_step is None or calls & (calls - 1):
            return 0
        return max(0, self.few_step.doublings + 1 - calls.bit_length())

    def predict(
        self,
        noisy: Tensor,
        sigma: Tensor,
        context: Tensor,
        action: Tensor,
        centre: Tensor,
        jump: Tensor | None = None,
        blur: Tensor | None = None,
        memory: Tensor | None = None,
        game: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The denoised frame before clamping, and the c_out that scales the network's output in it (EDM eq. 7).

        Args:
            noisy: (B, C, H, W) noisy frame less its centre.
            sigma: (B,) noise level.
            context: (B, L, C, H, W) frames in [-1, 1].
            action: (B, L) int64.
            centre: (B, C, H, W) of `centre_of`.
            jump: (B,) int64 of `jump_of`; none by default.
            blur: (B,) standard deviation of the noise in the context; 0 by default.
            memory: state of the memory after the context, where there is one.
            game: (B,) int64, rows of the vocabulary; 0 by default.
        """
        none = torch.zeros_like(sigma)
        labels = {"jump": none.long() if jump is None else jump, "game": none.long() if game is None else game}
        if self.context_noise:
            level = (none if blur is None else blur) * (BLURS / self.context_noise)
            labels["blur"] = level.long().clamp(max=BLURS - 1)
        if self.noiseless:
            noisy = torch.zeros_like(noisy)
        c = preconditioners(sigma, self.sigma_data, self.sigma_offset)
        output = self._output(noisy * c.c_in, c.c_noise, self._scaled(context, centre), action, labels, memory)
        return c.c_skip * noisy + c.c_out * output + centre, c.c_out

    def _output(
        self,
        noisy: Tensor,
        c_noise: Tensor,
        context: Tensor,
        action: Tensor,
        labels: dict[str, Tensor],
        memory: Tensor | None,
    ) -> Tensor:
        """What the network says, or its mean over the group; arguments as of the network, but the memory's state."""
        n = len(self.symmetry)
        if n > 1:
            noisy, context = orbit(noisy, self.symmetry), orbit(context, self.symmetry)
            action, c_noise = self.moves[:, action].flatten(0, 1), c_noise.repeat(n)
            labels = {name: label.repeat(n) for name, label in labels.items()}
        told = None
        if self.memory is not None and memory is not None:
            if n > 1:  # its inputs are the places of a coarse picture
                places = memory.mT.unflatten(2, (self.memory.cells, self.memory.cells))
                memory = orbit(places, self.symmetry).flatten(2).mT
            told = self.memory.read(memory)
        output = self.network(noisy, c_noise, context, action, labels, told)
        output = output.to(c_noise.dtype)  # of bfloat16
        return output if n == 1 else orbit_mean(output, self.symmetry)

    def quantize(self, image: Tensor, centre: Tensor) -> Tensor:
        """The frame as it is shown: what hardly differs from the centre is left still, and 8 bits can hold it."""
        if self.still:
            image = torch.where((image - centre).abs().amax(1, keepdim=True) > self.still, image, centre)
        return to_float(to_uint8(image, self.rounding))

    @torch.no_grad()
    def _jumps(
        self,
        few: FewStep,
        noisy: Tensor,
        sigma: Tensor,
        target: Tensor,
        context: Tensor,
        action: Tensor,
        centre: Tensor,
        blur: Tensor | None,
        memory: Tensor | None,
        game: Tensor | None,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Some rows of a batch, drawn at random, made into jumps: noisy frame, level, what is wanted, and the jump.

        A jump from the highest level begins where the sampler does, at noise that holds nothing of the target.
        """
        rows = torch.randperm(len(target), generator=generator, device=target.device)
        rows = rows[: max(1, round(few.share * len(target)))]
        draw = torch.rand(2, len(rows), generator=generator, device=target.device)
        jump = 1 + (draw[0] * few.doublings).long()
        span = 2**jump
        begin = (draw[1] * (2**few.doublings // span)).long() * span
        levels = jump_levels(2**few.doublings, few.sigma_min, few.sigma_max, few.rho).to(target.device)
        start, middle, after = levels[begin], levels[begin + span // 2], levels[begin + span]
        clean = torch.where((begin > 0)[:, None, None, None], (target - centre)[rows], 0.0)
        x = add_noise(clean, start, self.sigma_offset, generator)
        blur, memory, game = (None if given is None else given[rows] for given in (blur, memory, game))
        condition = (context[rows], action[rows], centre[rows], jump - 1, blur, memory, game)

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            return self.predict(x, sigma, *condition)[0].clamp(-1, 1) - centre[rows]

        wanted = jump_target(denoise, x, start, middle, after) + centre[rows]
        return (
            noisy.index_copy(0, rows, x),
            sigma.index_copy(0, rows, start),
            target.index_copy(0, rows, wanted),
            torch.zeros(len(target), dtype=torch.long, device=target.device).index_copy(0, rows, jump),
        )

    def loss(
        self, segment: Segment, generator: torch.Generator | None = None, game: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean denoising loss over the last 1 + rollout frames, and the frames as the model saw them.

        Args:
            segment: of at least L + rollout transitions; those before are for the memory.
            generator: of the noise; torch's own if None.
            game: (B,) int64, as in `predict`.

        Returns:
            The scalar loss, in which a window counts by its `importance` in `side`, if there is one; (B, T+1, C, H, W)
            float frames in which targets are replaced by the model's own output; and the loss (B,) of each window.
        """
        frames = list(images_of(segment, self.padding).unbind(1))
        losses, each, rollout = [], [], self.rollout
        importance = segment.side.get("importance", 1.0)
        if torch.rand((), generator=generator, device=segment.obs.device) >= self.rollout_share:
            rollout = 0
        begin, memory = segment.length - self.rollout, None
        for t in range(begin, begin + 1 + rollout):
            if self.memory is not None:
                first = 0 if memory is None else t - 2  # after the first target only what is new
                film = torch.stack(frames[first:t], dim=1)
                memory = self.memory(film, segment.mask[:, first : t - 1], memory)
            context, target = torch.stack(frames[t - self.context : t], dim=1), frames[t]
            action = segment.action[:, t - self.context : t]
            centre = self.centre_of(context)
            sigma = training_sigmas(len(target), **self.noise, generator=generator, device=target.device)
            noisy = add_noise(target - centre, sigma, self.sigma_offset, generator)
            seen, wanted, jump, blur = context, target, None, None
            if self.context_noise:
                blur = self.context_noise * torch.rand(len(target), generator=generator, device=target.device)
                seen = blurred(context, blur, generator)
            if self.few_step:
                noisy, sigma, wanted, jump = self._jumps(
                    self.few_step, noisy, sigma, target, seen, action, centre, blur, memory, game, generator
                )
            denoised, c_out = self.predict(noisy, sigma, seen, action, centre, jump, blur, memory, game)
            # EDM's loss on the network's output: the denoised frame's error divided by c_out
            error = ((denoised - wanted) / c_out).square()
            if self.changed_weight != 1:
                wrong = (target - context[:, -1]).abs()
                if self.centre == "moved":  # where something was expected and did not come
                    wrong = torch.maximum(wrong, (target - centre).abs())
                changed = wrong.amax(1, keepdim=True) > 2 * 8 / 255
                error = error * torch.where(changed, self.changed_weight, 1.0)
            real = segment.next_mask[:, t - 1].float()
            each.append(error.mean((1, 2, 3)) * real)
            losses.append((each[-1] * importance).sum() / real.sum().clamp(min=1))
            frames[t] = self.quantize(denoised.detach(), centre)
        return torch.stack(losses).mean(), torch.stack(frames, dim=1), torch.stack(each).mean(0).detach()
