"""What one call leaves behind for the next: modes, tracers, transforms, in any order; repeated imports."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from dataclasses import dataclass

import pytest
import torch
from cases import make
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import zipfls_cuda as zls
from zipfls_cuda import labels

CASE = make(4, 10, 9)


def loss(x, target=CASE.target, votes=CASE.votes, **options):
    return zls.zipf_cross_entropy(x, target, votes, zipf_weight=0.3, backend="reference", **options)


def train(loss=loss):
    x = CASE.leaf()
    loss(x).backward()
    return x.grad


def fake():
    with FakeTensorMode() as mode:
        x, y, v = map(mode.from_tensor, CASE)
        loss(x.requires_grad_(), y, v).backward()


def traced(tracing_mode, **options):
    graph = make_fx(lambda x, y, v: loss(x, y, v), tracing_mode=tracing_mode, **options)(*CASE)
    assert not list(graph.graph.find_nodes(op="get_attr")), (
        "the table is computed in the graph, not a constant"
    )
    torch.testing.assert_close(graph(*CASE), loss(*CASE))


def aot():
    from functorch.compile import aot_function, nop

    aot_function(lambda x, y, v: loss(x, y, v), nop)(CASE.leaf(), CASE.target, CASE.votes).backward()


def exported():
    class Loss(torch.nn.Module):
        def forward(self, x, y, v):
            return loss(x, y, v)

    assert not torch.export.export(Loss(), tuple(CASE), strict=False).constants


def refused_hessian():
    with pytest.raises(RuntimeError, match="forward-mode"):
        torch.func.hessian(loss)(CASE.logits)


def nested_grad():
    torch.func.grad(lambda a: torch.func.grad(lambda b: (b**3).sum() + loss(b.detach()))(a).sum())(
        CASE.logits
    )


def inference():
    with torch.inference_mode():
        loss(CASE.logits)


def functionalized():
    torch._enable_functionalization(reapply_views=True)
    try:
        loss(*map(torch._to_functional_tensor, CASE))
    finally:
        torch._disable_functionalization()


def meta_device():
    with torch.device("meta"):
        loss(CASE.logits)


def jit_traced():
    torch.jit.trace(loss, tuple(CASE), check_trace=False)


MODES = {
    "fake": fake,
    "make_fx real": lambda: traced("real"),
    "make_fx fake": lambda: traced("fake"),
    "make_fx symbolic": lambda: traced("symbolic"),
    "make_fx before dispatch": lambda: traced("real", pre_dispatch=True),
    "aot": aot,
    "export": exported,
    "hessian": refused_hessian,
    "nested grad": nested_grad,
    "func.grad": lambda: torch.func.grad(loss)(CASE.logits),
    "vmap": lambda: torch.func.vmap(torch.func.grad(loss))(torch.stack([CASE.logits] * 2)),
    "inference": inference,
    "functionalized": functionalized,
    "meta device": meta_device,
    "jit.trace": jit_traced,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", MODES)
def test_no_call_harms_the_next(mode):
    """Whichever came first, a mode or training: the kept table is an ordinary tensor; no tracer sees it."""
    labels.cached_table.cache_clear()
    MODES[mode]()
    table = labels.log_mass(zls.Zipf(), 4, 10, 9, torch.float32, torch.device("cpu"))
    assert type(table) is torch.Tensor
    assert not table.is_inference()
    assert not torch._C._functorch.is_functorch_wrapped_tensor(table)
    gradient = train()
    torch.testing.assert_close(torch.func.grad(loss)(CASE.logits), gradient)
    labels.cached_table.cache_clear()
    assert torch.equal(train(), gradient)
    MODES[mode]()  # with a table made before
    fake()
    assert torch.equal(train(), gradient)
    torch.testing.assert_close(torch.func.grad(loss)(CASE.logits), gradient)


def test_threads_that_call_first_at_once():
    labels.cached_table.cache_clear()
    barrier, gradients = threading.Barrier(4), []

    def work(mode):
        barrier.wait()
        mode()
        gradients.append(train())

    threads = [threading.Thread(target=work, args=(m,)) for m in (fake, train, inference, train)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(gradients) == 4
    assert all(torch.equal(g, gradients[0]) for g in gradients)


# Laws of the user's own ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Odd(zls.Distribution):
    """Zipf's law, returned in an odd way."""

    kind: str

    def log_mass(self, rank, num_classes):
        mass = -rank.log()
        if self.kind == "grad":
            return mass.requires_grad_()
        if self.kind == "float32":
            return mass.float()
        if self.kind == "strided":
            return torch.stack([mass, mass], 1)[:, 0]
        if self.kind == "expanded":
            return mass.new_zeros(()).expand(len(mass))
        return {"short": mass[1:], "meta": mass.to("meta"), "list": mass.tolist()}[self.kind]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["grad", "float32", "strided", "expanded"])
def test_odd_laws(backend, device, kind, dtype):
    case = make(4, 10, 9, dtype=dtype, device=device)
    same = zls.Constant() if kind == "expanded" else zls.Zipf()
    results = []
    for law in (Odd(kind), Odd(kind), same):
        x = case.leaf()
        value = zls.zipf_loss(x, case.target, case.votes, distribution=law, backend=backend)
        value.backward()
        results.append((value.detach(), x.grad))
    assert torch.equal(results[0][1], results[1][1])
    torch.testing.assert_close(results[0], results[2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["short", "meta", "list"])
def test_laws_that_return_something_else_are_named(kind):
    with pytest.raises(ValueError, match=r"Odd.log_mass must return a real tensor \(10,\) on cpu, got"):
        zls.zipf_loss(*CASE, distribution=Odd(kind))


def test_a_law_with_memory_of_its_own_and_one_without_fields():
    class Shifted(zls.Distribution):  # not a dataclass: all instances are equal
        def __init__(self, shift):
            self.shift = shift

        def log_mass(self, rank, num_classes):
            return -self.shift * rank

    losses = [zls.zipf_loss(*CASE, distribution=Shifted(s)) for s in (0.1, 2.0)]
    assert losses[0] != losses[1]
    masses = torch.zeros(20, dtype=torch.float64)

    @dataclass(frozen=True)
    class Table(zls.Distribution):
        def log_mass(self, rank, num_classes):
            return masses[: len(rank)]

    case = make(4, 10, 9, dtype=torch.float64)
    before = zls.zipf_loss(*case, distribution=Table())
    masses.copy_(-torch.arange(20))
    assert torch.equal(zls.zipf_loss(*case, distribution=Table()), before)


def test_default_dtype_and_device(backend, device):
    """Neither decides what is drawn or computed: one seed, one result."""
    case = make(4, 10, 9, device=device)
    soft = case.logits.softmax(1)
    features, weight = torch.randn(2, 8, 3, 3, device=device), torch.randn(10, 8, device=device)
    seen = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            with torch.device("cpu" if dtype == torch.float32 else "meta"):
                torch.manual_seed(5)
                results = [zls.dense_vote(features, weight, backend=backend)]
                for law in (zls.Zipf(), zls.RandomPareto()):
                    for target in (case.target, soft):
                        x = case.leaf()
                        options = {"label_smoothing": 0.1, "only_correct": True, "distribution": law}
                        parts = zls.zipf_cross_entropy(
                            x, target, case.votes, backend=backend, return_parts=True, **options
                        )
                        parts[0].backward()
                        results += [*parts, x.grad]
                    results.append(zls.zipf_label(case.target, case.votes, 10, distribution=law))
            seen.append(results)
        finally:
            torch.set_default_dtype(torch.float32)
    for other in seen[1:]:
        for a, b in zip(other, seen[0], strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
    assert zls.RandomUniform().draw(2, 3, device).dtype == torch.float32


# Imported anew ---------------------------------------------------------------------------------------------

ANEW = """
import importlib, sys
import torch, zipfls_cuda as old
criterion = old.ZipfLoss(0.3)
x, y, v = torch.randn(4, 10), torch.arange(4), torch.zeros(4, 3, dtype=torch.int32)
first = criterion(x, y, v)
names = [n for n in sys.modules if n.split(".")[0] == "zipfls_cuda"]
if HOW == "deleted":
    for name in names:
        del sys.modules[name]
    import zipfls_cuda as zls
    assert zls is not old
else:
    for name in names:
        if "_C" not in name:
            importlib.reload(sys.modules[name])
    zls = importlib.reload(sys.modules["zipfls_cuda"])
for backend in zls.backends():
    a = x.clone().requires_grad_()
    zls.zipf_cross_entropy(a, y, v, zipf_weight=0.3, distribution=zls.Zipf(), backend=backend).backward()
    torch.testing.assert_close(zls.ZipfLoss(0.3)(x, y, v), first)
    zls.dense_vote(torch.randn(2, 8, 3, 3), torch.randn(10, 8), backend=backend)
torch.testing.assert_close(criterion(x, y, v), first) if HOW == "deleted" else None
import zipfls_cuda.reference as reference
reference.rank_fwd = lambda votes, num_classes: votes.new_full((4, 10), 7)
assert (zls.rank_votes(v, 10, backend="reference") == 7).all(), "operators run the last import's modules"
try:
    zls.ZipfLoss(distribution=criterion.distribution)
except TypeError as error:
    assert "earlier import" in str(error), error
else:
    raise AssertionError("a law of another import was taken")
zls.ops.SCHEMAS["rank_fwd"] = "(Tensor votes) -> Tensor"
try:
    zls.ops._registered("rank_fwd", zls.ops.SCHEMAS["rank_fwd"])
except ImportError as error:
    assert "another version" in str(error) and "Restart" in str(error), error
else:
    raise AssertionError("another version's operators were taken")
"""


@pytest.mark.parametrize("how", ["deleted", "reloaded"])
def test_imported_twice_in_a_process(how):
    run = subprocess.run(
        [sys.executable, "-c", f"HOW = {how!r}\n{ANEW}"],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
