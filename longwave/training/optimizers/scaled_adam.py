"""ScaledAdam: Adam whose steps are proportional to the size of each tensor (Zipformer, arXiv 2310.11230).

Shape letter: `W` trainable parameters (called weights here), in the order of the module tree.
"""

# torch's multi-tensor functions (`torch._foreach_*`) have no public names.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from pydantic import ConfigDict
from torch import Tensor, nn

from longwave.errors import require
from longwave.training.optimizers.weights import (
    StepReport,
    check_adam,
    copied_masters,
    forget_gradients,
    load,
    trainable_weights,
    write_copies,
    zeros_like,
)


@dataclass(frozen=True)
class ScaledAdamConfig:
    """ScaledAdam (Zipformer, arXiv 2310.11230, with the defaults of its authors' recipes).

    rms_limits: bounds of the learned size (rms) of each tensor. scalar_max: bound of the magnitude of one-element
    parameters. scalar_lr_scale: factor of the learning rate for one-element parameters and for sizes.
    size_update_period: updates between two changes of the sizes. clipping_scale: gradients are clipped to this factor
    (inf: never) times their median norm over the last `clipping_window` updates. clipping: whose norm that is, "model"
    for that of the whole gradient, or "icefall" for the rule of the authors' code, where parameters of one learning
    rate are a group that is clipped by its own norm, and the median is the norm of rank 2 (n // 4).
    """

    kind: Literal["scaled_adam"] = "scaled_adam"
    lr: float = 0.03
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    scalar_lr_scale: float = 0.1
    rms_limits: tuple[float, float] = (1e-5, 3.0)
    scalar_max: float = 10.0
    size_update_period: int = 4
    clipping_scale: float = 2.0
    clipping_window: int = 100
    clipping: Literal["model", "icefall"] = "model"

    __pydantic_config__ = ConfigDict(extra="forbid")

    def __post_init__(self) -> None:
        check_adam(self.lr, self.betas, self.eps)
        require(self.scalar_lr_scale > 0, f"scalar_lr_scale = {self.scalar_lr_scale}: a number above 0")
        low, high = self.rms_limits
        require(0 < low < high, f"rms_limits = {self.rms_limits}: two rising numbers above 0")
        require(self.scalar_max > 0, f"scalar_max = {self.scalar_max}: a number above 0")
        require(self.size_update_period >= 1, f"size_update_period = {self.size_update_period}: at least 1 step")
        scale = self.clipping_scale
        require(scale > 0, f"clipping_scale = {scale}: a number above 0, or inf not to clip")
        require(self.clipping_window >= 1, f"clipping_window = {self.clipping_window}: at least 1 step")

    def build(self, model: nn.Module) -> ScaledAdam:
        """Make the optimizer of all trainable parameters of `model`."""
        return ScaledAdam(self, model)


class ScaledAdam:
    """Adam whose steps are proportional to each tensor's rms, and which learns that rms too (see `ScaledAdamConfig`).

    For each tensor p with gradient g, at update t = 0, 1, ...:

        v     <- b2 v + (1 - b2) g^2, divided by 1 - b2^(t+1) while that is below 0.99
        delta  = -lr rms(p) g / (sqrt(v) + eps) + k p
        D     <- b1 D + (1 - b1) delta;   p <- p + D

    The growth k is 0 except on every 4th update (`_size_step`). One-element parameters use 0.1 in place of their rms,
    and have no k.
    batch_elements: about how many elements one multi-tensor call covers; it changes speed, not results.
    """

    def __init__(self, config: ScaledAdamConfig, model: nn.Module, batch_elements: int | None = None) -> None:
        self.config = config
        self.weights = trainable_weights(model)
        self.masters = [weight.master for weight in self.weights]
        self.batches = _batches(self.masters, batch_elements)
        self.is_scalar = torch.tensor([weight.is_scalar for weight in self.weights])
        self.lr_scales = torch.tensor([weight.lr_scale for weight in self.weights], dtype=torch.float64)
        self.second_moments = [zeros_like(master) for master in self.masters]
        self.deltas = [zeros_like(master) for master in self.masters]
        # State of one number per tensor lives on the host in fp64: a transfer per update is cheaper than many launches.
        self.rms = torch.zeros(len(self.weights), dtype=torch.float64)  # as of the last size update
        self.size_squares = torch.zeros_like(self.rms)
        self.size_gradients = self.rms.new_zeros(config.size_update_period, len(self.weights))
        self.steps = torch.zeros((), dtype=torch.int64)
        self.clippers = self._clippers()

    @torch.no_grad()
    def step(self, lr_scale: float) -> StepReport:
        """Update the parameters from their gradients; a missing gradient counts as zero."""
        step, grads = int(self.steps), self._gradients()
        # The first size update comes later, so at step 0 the sizes are measured here.
        rms = self._measured_rms() if step == 0 else self.rms
        norms, products = self._reductions(grads)
        # A step is proportional to a tensor's rms, so a tensor's share in the norm is as well.
        norms = norms * self._sizes(rms)
        norm = torch.linalg.vector_norm(norms).item()
        if not math.isfinite(norm):
            return StepReport(norm, 0.0, True)
        clips = torch.ones_like(norms)
        for members, clipper in self.clippers:
            clips[members] = clipper.clip(step, torch.linalg.vector_norm(norms[members]).item())
        if (clip := clips.min().item()) < 1:
            torch._foreach_mul_(grads, clips.tolist())
        self._update(step, grads, clips * products, rms, self.config.lr * lr_scale * self.lr_scales)
        self.steps += 1
        return StepReport(norm, clip, False)

    def _clippers(self) -> list[tuple[Tensor, MedianClipper]]:
        """The clipper of each group, with a mask of its members (W,): the whole model, or the tensors of one rate."""
        config = self.config
        new = partial(MedianClipper, config.clipping_scale, config.clipping_window)
        if config.clipping == "model":
            return [(torch.ones_like(self.is_scalar), new(_middle))]
        return [(self.lr_scales == scale, new(_icefall_middle)) for scale in self.lr_scales.unique()]

    def zero_grad(self) -> None:
        """Forget all gradients."""
        forget_gradients(self.weights)

    def tensors(self) -> dict[str, Tensor]:
        """Give the complete state by name; the large tensors are not copied."""
        return self._large_tensors() | {name: tensor.clone() for name, tensor in self._small_tensors().items()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy a state in. Raises UserError, and changes nothing, if a name, shape or dtype is not the one expected."""
        load(self._large_tensors() | self._small_tensors(), tensors, expected=self.tensors())

    def _large_tensors(self) -> dict[str, Tensor]:
        state = copied_masters(self.weights)
        for weight, square, delta in zip(self.weights, self.second_moments, self.deltas, strict=True):
            state |= {f"second_moment.{weight.name}": square, f"delta.{weight.name}": delta}
        return state

    def _small_tensors(self) -> dict[str, Tensor]:
        state = {"steps": self.steps}
        for group, (_, clipper) in enumerate(self.clippers):
            name = "clipping" if len(self.clippers) == 1 else f"clipping.{group}"
            state |= {f"{name}.norms": clipper.norms, f"{name}.threshold": clipper.threshold}
        for i, weight in enumerate(self.weights):
            if not weight.is_scalar:
                state[f"rms.{weight.name}"] = self.rms[i]
                state[f"size_square.{weight.name}"] = self.size_squares[i]
                state[f"size_gradients.{weight.name}"] = self.size_gradients[:, i]
        return state

    def _gradients(self) -> list[Tensor]:
        grads = ((weight, weight.gradient()) for weight in self.weights)
        return [zeros_like(weight.master) if grad is None else grad for weight, grad in grads]

    def _reductions(self, grads: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Give each tensor's ||g|| (W,) and sum(p * g) (W,), on the host."""
        norms = torch._foreach_norm(grads)
        products = [torch.dot(p.flatten(), g.flatten()) for p, g in zip(self.masters, grads, strict=True)]
        on_host = _host([*norms, *products])
        return on_host[: len(norms)], on_host[len(norms) :]

    def _measured_rms(self) -> Tensor:
        counts = torch.tensor([master.numel() for master in self.masters], dtype=torch.float64)
        return _host(list(torch._foreach_norm(self.masters))) / counts.sqrt()

    def _sizes(self, rms: Tensor) -> Tensor:
        """Give the sizes (W,) by which steps and norms are scaled: a tensor's rms, or a constant for scalars."""
        return rms.masked_fill(self.is_scalar, self.config.scalar_lr_scale)

    def _update(self, step: int, grads: list[Tensor], products: Tensor, rms: Tensor, lr: Tensor) -> None:
        """Apply finite, clipped gradients; `products` (sum(p * g)), `rms` and `lr` are (W,)."""
        period = self.config.size_update_period
        resize = step % period == period - 1
        # Between two size updates the rms hardly moves, and measuring it would read every weight once more.
        self.rms.copy_(self._measured_rms() if resize else rms)
        # sum(p * g) is the gradient by the log of a tensor's size.
        self.size_gradients[step % period] = products.masked_fill(self.is_scalar, 0.0)
        growth = self._size_step((step + 1) // period, lr).tolist() if resize else None
        correction = self._bias_correction(step)
        sizes = self._sizes(self.rms.clamp(min=self.config.rms_limits[0]))
        # The bias correction of sqrt(v) is folded into rates and eps, which saves a pass over the large tensors.
        rates = (-(1 - self.config.betas[0]) * lr * sizes * correction).tolist()
        eps = (self.config.eps * correction).tolist()
        for batch in self.batches:
            self._update_batch(batch, grads[batch], rates[batch], eps[batch], growth and growth[batch])
        self._bound_scalars()
        write_copies(self.weights)

    def _bias_correction(self, step: int) -> Tensor:
        """Give the correction (W,) of sqrt(v) for its start at zero: sqrt(1 - b2^(t+1)).

        As in the authors' code, it becomes 1 for tensors once it hardly differs from 1, but never for scalars.
        """
        correction = 1 - self.config.betas[1] ** (step + 1)
        of_tensors = math.sqrt(correction) if correction < 0.99 else 1.0
        return torch.full_like(self.rms, of_tensors).masked_fill(self.is_scalar, math.sqrt(correction))

    def _size_step(self, count: int, lr: Tensor) -> Tensor:
        """Give the relative growth k (W,) of each tensor at size update number `count`: Adam on the log of its rms."""
        config, (low, high) = self.config, self.config.rms_limits
        decay = config.betas[1] ** config.size_update_period
        self.size_squares.mul_(decay).add_(self.size_gradients.square().mean(0), alpha=1 - decay)
        # The gradients of the updates since the last size update, added up, make one step of Adam.
        direction = self.size_gradients.sum(0) / (self.size_squares.sqrt() + config.eps)
        growth = -lr * config.scalar_lr_scale * math.sqrt(1 - decay**count) * direction
        # At most a tenth up or down at once, and not beyond the upper limit; below the lower one a size stays as it is.
        growth = growth.clamp(-0.1, 0.1).masked_fill(self.rms < low, 0.0)
        return growth.minimum((high - self.rms) / self.rms).masked_fill(self.is_scalar, 0.0)

    def _update_batch(
        self, batch: slice, grads: list[Tensor], rates: list[float], eps: list[float], growth: list[float] | None
    ) -> None:
        """Advance v, D and p of the weights of one batch.

        rates: -lr rms(p) times 1 - b1 and the bias correction. eps: times the bias correction. growth: k, on a size
        update.
        """
        beta1, beta2 = self.config.betas
        masters, squares, deltas = self.masters[batch], self.second_moments[batch], self.deltas[batch]
        # v <- b2 v + (1 - b2) g^2
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
        # D <- b1 D + (1 - b1) delta, with delta from v before its bias correction, which rates and eps bring in
        denominators = torch._foreach_sqrt(squares)
        torch._foreach_add_(denominators, eps)
        torch._foreach_mul_(deltas, beta1)
        torch._foreach_addcdiv_(deltas, grads, denominators, rates)
        if growth is not None:
            for delta, master, k in zip(deltas, masters, growth, strict=True):
                delta.add_(master, alpha=(1 - beta1) * k)
        torch._foreach_add_(masters, deltas)

    def _bound_scalars(self) -> None:
        for weight in self.weights:
            if weight.is_scalar:
                weight.master.clamp_(-self.config.scalar_max, self.config.scalar_max)


class MedianClipper:
    """Clips a norm to `scale` times its median over the last `window` updates.

    The bound is set at updates 10, 20 and 40 (doubled, since norms still change fast), and then every `window` updates.
    The first norm of all never counts. There is no bound before update 10, nor while the median is zero.
    middle: the median of some norms.
    """

    def __init__(self, scale: float, window: int, middle: Callable[[Tensor], float]) -> None:
        self.scale, self.middle = scale, middle
        self.norms = torch.zeros(window, dtype=torch.float64)
        self.threshold = torch.tensor(math.inf, dtype=torch.float64)

    def clip(self, step: int, norm: float) -> float:
        """Record the finite `norm` of update `step`, and give the factor in (0, 1] that keeps it within the bound."""
        window = len(self.norms)
        self.norms[step % window] = norm
        if step in (10, 20, 40) and step < window:
            self._set_threshold(2 * self.scale, self.norms[1 : step + 1])
        elif step > 0 and step % window == 0:
            self._set_threshold(self.scale, self.norms)
        return min(1.0, self.threshold.item() / norm) if norm > 0 else 1.0

    def _set_threshold(self, scale: float, norms: Tensor) -> None:
        median = self.middle(norms)
        self.threshold.fill_(scale * median if median > 0 else math.inf)


def _middle(norms: Tensor) -> float:
    """The median: of an even number of norms, the mean of the two in the middle."""
    return norms.quantile(0.5).item()


def _icefall_middle(norms: Tensor) -> float:
    """The norm that icefall takes for the median: of rank 2 (n // 4), counted from 0."""
    return norms.sort().values[min(len(norms) - 1, 2 * (len(norms) // 4))].item()


def _batches(tensors: list[Tensor], limit: int | None) -> list[slice]:
    """Cut a list of tensors into batches of at most `limit` elements each; a larger tensor is a batch by itself."""
    if limit is None:
        # On a CPU a batch should stay in the cache over all its passes (measured); on a GPU launches should be few, and
        # the temporary memory bounded.
        limit = 2**16 if tensors[0].device.type == "cpu" else 2**26
    starts, elements = [0], 0
    for i, tensor in enumerate(tensors):
        elements += tensor.numel()
        if elements > limit and i > starts[-1]:
            starts.append(i)
            elements = tensor.numel()
    return [slice(*ends) for ends in zip(starts, [*starts[1:], len(tensors)], strict=True)]


def _host(scalars: list[Tensor]) -> Tensor:
    """Bring 0-d tensors to the host in one transfer, as fp64 (n,)."""
    return torch.stack(scalars).cpu().double()
