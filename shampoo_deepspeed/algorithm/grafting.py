"""Element-wise methods (SGD, AdaGrad, RMSProp, Adam, normalized): grafting updates and second moments.

Pure functions on lists of tensors. A block stack passes one tensor [B, *block], element-wise parameters pass one
view each. The update of a grafting method gives each block its step length (arXiv 2309.06497, section 2.4.2). "rms" is
a length without a method: blocks get it from their stack, and until their first refresh their first moment's direction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shampoo_deepspeed.algorithm.found_inf import FoundInf
from shampoo_deepspeed.linalg.precision import whole_registers
from shampoo_deepspeed.options.config import ShampooConfig

# Root mean square of a block's update with grafting "rms". Moonlight (arXiv 2502.16982, section 2.2) found 0.2 to 0.4
# for AdamW's updates in language models. With 0.4, AdamW's best rates were good ones (docs/convergence.md).
UPDATE_RMS = 0.4
# Normalized gradients have no absolute scale, so Adam's eps would mean nothing to them. Instead, updates are multiplied
# by rms / (rms + eps) with the root mean square of the gradient, as long as it is below this multiple of eps. So a
# gradient that is only rounding, such as that of a bias of attention keys, counts as none, as with AdamW.
SURE = 1e6
# The root mean square of a gradient of zeros seems to be this: zeros stay zeros, and no ``eps`` counts next to it.
UNSEEN = 1e30
NORMALIZED = "normalized_"  # prefix of the methods whose second moment is that of G / ||G||
# Devices on which torch has one kernel for an optimizer's whole step, which reads and writes everything once.
FUSED_DEVICES = ("cpu", "cuda")


def has_second_moment(method: str) -> bool:
    """Whether the method keeps a second moment at all."""
    return method not in ("none", "sgd")


def is_normalized(method: str) -> bool:
    """Whether the second moment is that of G / ||G||."""
    return method.startswith(NORMALIZED)


def strengths(means: Tensor, eps: float) -> Tensor:
    """Factors for updates of normalized gradients, below 1 where gradients are small compared with ``eps`` (``SURE``).

    Args:
        means: root mean squares of the gradients; zeros get the factor 1.
    """
    if means.device.type != "cpu":  # factors that are 1 up to 1 / SURE need no operators of their own there
        means = torch.threshold(means, 0.0, UNSEEN)
        return means / (means + eps)
    return torch.where((means > 0) & (means <= SURE * eps), means / (means + eps), 1.0)


def accumulate(
    method: str, second: Sequence[Tensor], gradients: Sequence[Tensor], beta2: float, found_inf: FoundInf | None
) -> None:
    """Update second moments in place: v + G*G (AdaGrad), or b2 * v + (1 - b2) G*G (RMSProp, Adam).

    The normalized methods take gradients that the caller has normalized.
    """
    if not has_second_moment(method):
        return
    weight = 1.0
    if not method.endswith("adagrad"):
        torch._foreach_mul_(list(second), beta2 if found_inf is None else found_inf.keep(beta2))
        weight = 1.0 - beta2
    torch._foreach_addcmul_(list(second), list(gradients), list(gradients), value=weight)


def update(
    method: str, moments: Sequence[Tensor], second: Sequence[Tensor], step: int, beta2: float, eps: float
) -> tuple[list[Tensor], float]:
    """The method's update M / (sqrt(v) + eps), with Adam's v corrected for its zero start; M for SGD.

    Args:
        moments: first moments M, shapes as ``second``.
        step: t >= 1.
        eps: added to the square root; if it ``vanishes``, elements that have had no gradient yet get 0.

    Returns:
        Tensors, and the factor to multiply them by. Callers combine it with their own factors, because each pass over
        a block costs time.
    """
    if not has_second_moment(method):
        return list(moments), 1.0
    corrected = math.sqrt(1.0 - beta2**step) if method.endswith("adam") else 1.0
    roots = torch._foreach_sqrt(list(second))
    if vanishes(eps * corrected, roots[0].dtype):
        return [torch.where(r > 0, m / r, 0.0) for m, r in zip(moments, roots, strict=True)], corrected
    torch._foreach_add_(roots, eps * corrected)
    return list(torch._foreach_div(list(moments), roots)), corrected


def vanishes(eps: float, dtype: torch.dtype) -> bool:
    """Whether ``eps`` is 0 or so small that squares of gradients of its size underflow.

    A second moment that has underflowed shows nothing of the gradient, and such an ``eps`` would not bound the update.
    """
    return eps < math.sqrt(torch.finfo(dtype).tiny)


def normalized(gradient: Tensor, norm: Tensor) -> Tensor:
    """G / norm, zero where the norm is zero; ``norm`` broadcasts against ``gradient``."""
    return torch.where(norm > 0, gradient / norm, 0.0)


def first_moment(
    moments: Sequence[Tensor],
    gradients: Sequence[Tensor],
    beta1: float,
    step: int,
    bias_correction: bool,
    found_inf: FoundInf | None,
    beta3: float | None = None,
) -> tuple[list[Tensor], float]:
    """Update m = b1 * m + (1 - b1) G in place and return M, which is m, corrected for its zero start if asked.

    With beta1 = 0 there is no moment, and M is G. With ``beta3``, M is b3 * m + (1 - b3) G of the old m instead, as in
    Lion and NAdam. b3 < b1 looks ahead, and b3 = 0 uses G alone.

    Returns:
        Tensors, and the factor to multiply them by for M. They may be the state or the gradients themselves.
    """
    if beta1 == 0.0:
        return list(gradients), 1.0
    beta3 = beta1 if beta3 is None else beta3
    if len(moments) == 1 and moments[0].device.type != "cpu" and moments[0].dtype == gradients[0].dtype:
        (kept,), (seen,) = moments, gradients  # a stack, for which each pass is a launch and a reading of all of it
        ahead = [kept if beta3 == beta1 else torch.lerp(kept, seen, 1.0 - beta3)]
        kept.lerp_(seen, 1.0 - beta1 if found_inf is None else found_inf.scale(1.0 - beta1))
    else:
        ahead = list(moments)
        if beta3 != beta1:
            ahead = list(torch._foreach_mul(ahead, beta3))
            torch._foreach_add_(ahead, list(gradients), alpha=1.0 - beta3)
        torch._foreach_mul_(list(moments), beta1 if found_inf is None else found_inf.keep(beta1))
        torch._foreach_add_(list(moments), list(gradients), alpha=1.0 - beta1)
    return ahead, 1.0 / (1.0 - beta3 * beta1 ** (step - 1)) if bias_correction else 1.0


def noise_in_first_moment(beta1: float, step: int) -> float:
    """||G||^2 divided by that of a first moment of pure noise, which is shorter by the root of (1 + b) / (1 - b)."""
    return (1.0 + beta1) / (1.0 - beta1) / (1.0 - beta1**step) ** 2


class ElementwiseStep(NamedTuple):
    """First moments and updates of an element-wise step, to be multiplied by ``lacking`` and ``factor``.

    Callers combine these with their own factors, because each pass over a block costs time. Tensors may be state.
    """

    moments: list[Tensor]
    lacking: float
    updates: list[Tensor]
    factor: float


def advance(
    method: str,
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    gradients: Sequence[Tensor],
    scaled: Sequence[Tensor],
    step: int,
    config: ShampooConfig,
    found_inf: FoundInf | None,
) -> ElementwiseStep:
    """Update first and second moments in place; return the moments and updates.

    Args:
        scaled: the gradients that second moments take, which are normalized for normalized methods.
    """
    if _fuses(method, first, second, gradients, config):
        return _adam(first, second, gradients, step, config, found_inf)
    beta1, beta2, corrected = config.betas[0], config.second_moment_beta, config.use_bias_correction
    accumulate(method, second, scaled, beta2, found_inf)
    moments, lacking = first_moment(first, gradients, beta1, step, corrected, found_inf, config.beta3)
    updates, factor = update(method, moments, second, step, beta2, config.eps)
    return ElementwiseStep(moments, lacking, updates, factor * lacking)


def _fuses(
    method: str,
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    gradients: Sequence[Tensor],
    config: ShampooConfig,
) -> bool:
    """Whether torch's fused kernel can be used: not without a first moment, nor with eps = 0 (it divides by 0)."""
    if method != "adam" or not first or config.beta3 not in (None, config.betas[0]):
        return False
    if vanishes(config.eps * math.sqrt(1.0 - config.second_moment_beta), gradients[0].dtype):
        return False
    if config.second_moment_beta >= 1.0 or gradients[0].device.type not in FUSED_DEVICES:
        return False
    return all(g.dtype == m.dtype == v.dtype for g, m, v in zip(gradients, first, second, strict=True))


def _adam(
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    gradients: Sequence[Tensor],
    step: int,
    config: ShampooConfig,
    found_inf: FoundInf | None,
) -> ElementwiseStep:
    """Adam in one pass: a step of torch's kernel with rate -1 from weights of zero is the update itself."""
    beta1, corrected = config.betas[0], config.use_bias_correction
    updates = [torch.zeros_like(g) for g in gradients]
    taken = torch.full((), step, dtype=torch.float32, device=gradients[0].device)  # the kernel reads it as float32
    (made, seen, averages, squares), ends = whole_registers(updates, gradients, first, second)
    torch._fused_adam_(
        made,
        seen,
        averages,
        squares,
        [],
        [taken] * len(made),
        lr=-1.0,
        beta1=beta1,
        beta2=config.second_moment_beta,
        weight_decay=0.0,
        eps=config.eps,
        amsgrad=False,
        maximize=False,
        found_inf=None if found_inf is None else found_inf.as_float,
    )
    for target, computed in ends:
        target.copy_(computed)
    lack = 1.0 - beta1**step
    return ElementwiseStep(list(first), 1.0 / lack if corrected else 1.0, updates, 1.0 if corrected else lack)
