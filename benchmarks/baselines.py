"""What the package is measured against, in one place; tests/test_benchmarks.py shows that each is right.

Losses take (logits, target, votes) and return the mean; a peer that has no Zipf term ignores the votes. Votes
take (features, weight) and return (N, P) indices; ``matmul_alone`` stops at the scores. Peers from other
packages are used through their public functions, where they are installed.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import clock
import torch
import torch.nn.functional as F
from sources import installed
from torch import Tensor

import zipfls_cuda as zls
from zipfls_cuda import ops, reference

COPY = "copy of the logits"
CROSS_ENTROPY = "F.cross_entropy"
COMPILED_CROSS_ENTROPY = "torch.compile(F.cross_entropy)"
SMOOTHING = "F.cross_entropy, label smoothing"
REFERENCE = "plain PyTorch, whole loss"
COMPILED_REFERENCE = "torch.compile(plain PyTorch, whole loss)"
PUBLISHED = "published algorithm (SciPy ranks)"
LIGER = "Liger-Kernel"
LIGER_KL = "Liger-Kernel KL"
LIGER_JSD = "Liger-Kernel JSD"
PLAIN_LOSS = "zipf_cross_entropy"
QUACK = "QuACK, gradient in forward"
MATMUL = "torch.matmul alone"
MATMUL_BATCHED = "torch.matmul alone, no copy"
MATMUL_ARGMAX = "torch.matmul + torch.argmax"
ARGMAX = "torch.argmax alone"
LINEAR_CROSS_ENTROPY = "F.linear_cross_entropy"
LINEAR_THEN_CROSS_ENTROPY = "F.linear + F.cross_entropy"
LINEAR_THEN_LOSS = "F.linear + zipf_cross_entropy"
COMPILED_LINEAR = "torch.compile(F.linear + F.cross_entropy)"
PRODUCTS = "the three products alone"
LIGER_LINEAR = "Liger-Kernel, fused linear"
CUT = "cut-cross-entropy"

SMALL = ((256, 1000), (512, 1000), (1024, 1000), (128, 100))  # logits of the targets of small batches


def ours(backend: str) -> str:
    """The name of one of our backends among those compared."""
    return f"zipfls_cuda, {backend}"


def kernels(names: Iterable[str]) -> list[str]:
    """Our backends among those compared, plain PyTorch left out where there is another."""
    found = [name for name in names if name.startswith("zipfls_cuda")]
    return [name for name in found if name != ours("reference")] or found


def our_backends(device: str) -> list[str]:
    """Backends that serve a device type, best first; Triton's interpreter is not worth timing."""
    usable = (b for b in zls.backends() if not ops.refusal(b, "loss_fwd", device, torch.float32))
    return [b for b in usable if b != "triton" or not ops.triton_interpreted()]


@dataclass(frozen=True)
class Loss:
    """A way to compute a loss of the logits, the first argument.

    ``in_place``: it destroys the logits. ``backward`` false: the call already computes the gradient.
    ``sync``: it makes the host wait for the device.
    """

    call: Callable[..., Tensor]
    in_place: bool = False
    backward: bool = True
    sync: bool = False


def cross_entropy(logits: Tensor, target: Tensor, votes: Tensor) -> Tensor:
    return F.cross_entropy(logits, target)


def plain_zipf(logits: Tensor, target: Tensor, votes: Tensor) -> Tensor:
    """The whole loss as one would write it in PyTorch, differentiated by autograd."""
    z = logits.to(reference.accumulation_dtype(logits.dtype))
    with torch.no_grad():
        rank = reference.competition_rank(reference.count_votes(votes, logits.shape[1]))
        label, log_label = reference.label_from_mass(-rank.to(z.dtype).log(), target)
    return F.cross_entropy(z, target) + reference.zipf_term(z, target, label, log_label).mean()


def published_zipf(logits: Tensor, target: Tensor, votes: Tensor) -> Tensor:
    """The algorithm as the paper's authors run it: votes to the CPU, SciPy ranks, a dense label back.

    Written from Sec. 3.2 and 3.3: count the votes, rank all classes by count with ties sharing the smallest
    rank, 1 / rank over the non-target classes as label, KL divergence to the non-target softmax.
    """
    from scipy.stats import rankdata

    N, C = logits.shape
    counts = torch.stack([torch.bincount(v, minlength=C) for v in votes.cpu().long()])
    rank = torch.from_numpy(rankdata(-counts.numpy(), method="min", axis=1)).to(logits.device)
    mass = 1 / rank.float()
    others = torch.ones_like(mass, dtype=torch.bool).scatter_(1, target[:, None], False)
    label = mass[others].view(N, C - 1)
    label = label / label.sum(1, keepdim=True)
    log_p = logits.float()[others].view(N, C - 1).log_softmax(1)
    return F.cross_entropy(logits.float(), target) + F.kl_div(log_p, label, reduction="batchmean")


def compiled(function: Callable, tiny: bool = False) -> Callable:
    """torch.compile at fixed shapes, the fastest it gives; ``tiny`` stops after tracing."""
    return torch.compile(function, dynamic=False, backend="eager" if tiny else "inductor")


def losses(device: str, tiny: bool = False) -> dict[str, Loss]:
    """All losses that run on a device type here, ours first, by name."""
    whole = functools.partial(zls.zipf_cross_entropy, zipf_weight=1.0)
    found = {ours(b): Loss(functools.partial(whole, backend=b)) for b in our_backends(device)}
    found[CROSS_ENTROPY] = Loss(cross_entropy)
    found[COMPILED_CROSS_ENTROPY] = Loss(compiled(cross_entropy, tiny))
    found[REFERENCE] = Loss(plain_zipf)
    found[COMPILED_REFERENCE] = Loss(compiled(plain_zipf, tiny))
    if installed("scipy"):
        found[PUBLISHED] = Loss(published_zipf, sync=True)
    if device == "cpu":
        return found
    with using("liger_kernel"):
        from liger_kernel.transformers import LigerCrossEntropyLoss

        liger = LigerCrossEntropyLoss()
        found[LIGER] = Loss(lambda logits, target, votes: liger(logits, target), in_place=True, sync=True)
    with using("quack"):
        from quack.cross_entropy import cross_entropy_fwd

        quack = functools.partial(cross_entropy_fwd, return_dx=True)
        found[QUACK] = Loss(lambda logits, target, votes: quack(logits.detach(), target), backward=False)
    return found


@contextlib.contextmanager
def using(package: str) -> Iterator[None]:
    """Around the use of another package: a warning where it is installed and cannot be used."""
    try:
        yield
    except Exception as error:
        if installed(package):
            warnings.warn(f"not compared: {package}: {type(error).__name__}: {error}", stacklevel=1)


def matmul_alone(features: Tensor, weight: Tensor) -> Tensor:
    """The dense scores (N*P, C), the yardstick of dense_vote; maps that are not channels_last are copied."""
    if features.dim() == 4:
        features = features.permute(0, 2, 3, 1)
    return torch.matmul(features.reshape(-1, features.shape[-1]), weight.t())


def matmul_argmax(features: Tensor, weight: Tensor, upsample: int = 1) -> Tensor:
    """Dense scores, doubled bilinearly where asked, then torch.argmax: (N, P)."""
    scores = matmul_alone(features, weight)
    N = features.shape[0]
    if upsample == 2:
        scores = scores.view(N, *features.shape[2:], -1).permute(0, 3, 1, 2)
        scores = F.interpolate(scores, scale_factor=2, mode="bilinear", align_corners=False)
    return scores.argmax(1).view(N, -1)


def votes(device: str, upsample: int = 1, layout: str = "channels_last") -> dict[str, Callable]:
    """All ways to vote on a layout, ours first, by name; the products alone stop at the scores."""
    found: dict[str, Callable] = {
        ours(b): functools.partial(zls.dense_vote, upsample=upsample, backend=b) for b in our_backends(device)
    }
    found[MATMUL] = matmul_alone
    if layout == "NCHW":
        # The scores (N, C, P) of the map as it lies: a product per sample, no transposing copy.
        found[MATMUL_BATCHED] = lambda features, weight: torch.matmul(weight, features.flatten(2))
    found[MATMUL_ARGMAX] = functools.partial(matmul_argmax, upsample=upsample)
    return found


def head_of(loss: Callable) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A head of (features, weight, target) from a loss of (pooled features, weight, target)."""
    return lambda features, weight, target: loss(features.mean((2, 3)), weight, target)


def heads(device: str) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """All heads, (features (N, D, H, W), weight, target) -> mean loss; only ours have the Zipf term."""
    found: dict[str, Callable] = {
        ours(b): lambda features, weight, target, backend=b: zls.zipf_head_loss(
            features, weight, None, target, zipf_weight=1.0, backend=backend
        )
        for b in our_backends(device)
    }
    found[LINEAR_THEN_CROSS_ENTROPY] = head_of(lambda x, weight, y: F.cross_entropy(F.linear(x, weight), y))
    if hasattr(F, "linear_cross_entropy"):
        found[LINEAR_CROSS_ENTROPY] = head_of(F.linear_cross_entropy)
    if device == "cuda":
        with using("cut_cross_entropy"):
            from cut_cross_entropy import linear_cross_entropy

            found[CUT] = head_of(linear_cross_entropy)
    return found


def seeded(seed: int) -> dict:
    """Options of torch.randn and the like: drawn on the device that benchmarks run on."""
    device = clock.device()
    return {"generator": torch.Generator(device).manual_seed(seed), "device": device}


def loss_inputs(N: int, C: int, P: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (N, C) that want a gradient, target (N,) int64, votes (N, P) int32 that favour a few classes."""
    drawn = seeded(seed)
    logits = torch.randn(N, C, **drawn).mul_(2).to(dtype).requires_grad_()
    target = torch.randint(C, (N,), **drawn)
    spread = (torch.rand(N, P, **drawn).pow_(4) * C).long()
    return logits, target, ((target[:, None] + spread) % C).to(torch.int32)


def vote_inputs(
    N: int, H: int, W: int, D: int, C: int, dtype: torch.dtype, layout: str, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Features (N, D, H, W), channels_last or NCHW, or (N, H*W, D), tokens; weight (C, D)."""
    drawn = seeded(seed)
    features = torch.randn(N, H * W, D, **drawn).to(dtype)
    weight = (torch.randn(C, D, **drawn) / D**0.5).to(dtype)
    if layout != "tokens":
        features = features.view(N, H, W, D).permute(0, 3, 1, 2)
        features = features.contiguous() if layout == "NCHW" else features
    return features, weight
