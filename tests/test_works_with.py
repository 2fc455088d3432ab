"""The rows of docs/WORKS_WITH.md that no other file tests."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.flop_counter import FlopCounterMode

import zipfls_cuda as zls

X, Y = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 3, 6, 1])
NAMES = {"feature": "body", "classifier": "fc"}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(16, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.pool(self.body(x)).flatten(1))


def attached(model=None):
    """A model, attached, and its criterion."""
    model = model or Net()
    return model, zls.ZipfLoss(votes=zls.attach(model, **NAMES, example=X))


def assert_trains(model, criterion):
    """A step has votes and a gradient that plain cross-entropy has not."""
    model.train()
    output = model(X)
    loss = criterion(output, Y)
    assert loss > nn.functional.cross_entropy(output, Y)
    grads = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    assert all(g.isfinite().all() for g in grads)


def exported(model):
    return torch.export.export(model, (X,)).module()


def onnx(**options):
    def export(model):
        for package in ("onnx", "onnxscript"):
            pytest.importorskip(package)
        torch.onnx.export(model, (X,), io.BytesIO(), **options)
        return model

    return export


EVAL = {
    "export": exported,
    "jit.trace": lambda model: torch.jit.trace(model, X),
    "fx": torch.fx.symbolic_trace,
    "onnx": onnx(dynamo=True),
    "onnx by TorchScript": onnx(dynamo=False),
}


@pytest.mark.parametrize("turned", EVAL.values(), ids=EVAL)
def test_an_attached_model_in_eval_mode_can_be_exported(turned):
    model, criterion = attached()
    expected = model.eval()(X)
    torch.testing.assert_close(turned(model)(X), expected)
    assert_trains(model, criterion)  # and goes on training afterwards


def test_the_functions_can_be_exported():
    class Loss(nn.Module):
        def forward(self, logits, target, votes):
            return zls.zipf_cross_entropy(logits, target, votes)

    args = torch.randn(4, 7), Y, torch.randint(7, (4, 5), dtype=torch.int32)
    torch.testing.assert_close(torch.export.export(Loss(), args).module()(*args), Loss()(*args))


def test_torchscript():
    model, _ = attached()
    with pytest.raises(AttributeError, match=r"zls\.detach\(model\) first"):
        torch.jit.script(model)
    assert zls.detach(model)
    torch.testing.assert_close(torch.jit.script(model.eval())(X), model(X))


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:.*quantiz")
def test_quantisation():
    if "x86" not in torch.backends.quantized.supported_engines:
        pytest.skip("torch is built without the x86 engine")
    model, criterion = attached()
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model).eval(), {nn.Linear})
    torch.testing.assert_close(quantised(X), model.eval()(X), rtol=0.1, atol=0.1)
    model.train().qconfig = torch.ao.quantization.get_default_qat_qconfig("x86")
    with pytest.raises(ValueError, match="a copy needs a handle of its own"):
        criterion(torch.ao.quantization.prepare_qat(model)(X), Y)
    model, criterion = attached()
    model.train().qconfig = torch.ao.quantization.get_default_qat_qconfig("x86")
    assert_trains(torch.ao.quantization.prepare_qat(model, inplace=True), criterion)


def test_tools_with_hooks_of_their_own():
    model, criterion = attached()
    shapes = []
    for module in model.modules():
        module.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
    with FlopCounterMode(display=False) as counter:
        assert_trains(model, criterion)
    assert counter.get_total_flops() > 0
    assert shapes[-1] == (4, 7)


def test_torchinfo():
    torchinfo = pytest.importorskip("torchinfo")
    model, criterion = attached()
    for mode in ("eval", "train"):
        summary = torchinfo.summary(model, input_data=X, verbose=0, mode=mode)
        assert summary.total_params == sum(p.numel() for p in model.parameters())
    assert_trains(model, criterion)


def test_tensors_saved_on_the_cpu():
    model, criterion = attached()
    with torch.autograd.graph.save_on_cpu():
        loss = criterion(model.train()(X), Y)
    loss.backward()
    assert model.fc.weight.grad.any()


def test_second_order_optimizers_are_refused():
    model, criterion = attached()
    parameters = list(model.train().parameters())
    grads = torch.autograd.grad(criterion(model(X), Y), parameters, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(grads, parameters, [torch.ones_like(p) for p in parameters])


def test_gradients_by_sample():
    model, criterion = attached()
    model.train().body[1].track_running_stats = False
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())

    def loss(parameters, x, y):
        output = torch.func.functional_call(model, (parameters, buffers), (x[None],))
        return criterion(output, y[None])

    detached = {name: p.detach() for name, p in parameters.items()}
    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(detached, X, Y)
    for i in range(4):
        one = torch.autograd.grad(loss(parameters, X[i], Y[i]), parameters["fc.weight"])[0]
        torch.testing.assert_close(grads["fc.weight"][i], one, rtol=1e-4, atol=1e-5)


def test_functionalize_has_no_rule():
    """torch's own limit: a note in the table to be taken out once this fails."""
    with pytest.raises(RuntimeError, match="Functionalize rule"):
        torch.func.functionalize(lambda z: zls.zipf_cross_entropy(z, Y))(torch.randn(4, 7))


REWEIGHTED = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "pruning": lambda linear: prune.l1_unstructured(linear, "weight", 0.5),
}


@pytest.mark.parametrize("before", [True, False], ids=["attached after", "attached before"])
@pytest.mark.parametrize("change", REWEIGHTED.values(), ids=REWEIGHTED)
def test_effective_weights_vote(change, before):
    model = Net()
    if before:
        change(model.fc)
    model, criterion = attached(model)
    if not before:
        change(model.fc)
    features = []
    model.body.register_forward_hook(lambda module, args, output: features.append(output.detach()))
    model.train()
    output = model(X)
    votes, _ = criterion.votes.votes_of(output)
    scores = model.fc.eval()(features[0].flatten(2).transpose(1, 2))
    assert (scores.gather(2, votes.long()[..., None])[..., 0] >= scores.amax(2) - 1e-5).all()
    criterion(output, Y).backward()


class Adapter(nn.Module):
    """A linear layer of another library's kind: the frozen one plus a product of two small ones."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def test_an_adapter_on_the_classifier_is_refused():
    model, _ = attached()
    model.fc = Adapter(model.fc)
    with pytest.raises(RuntimeError, match="'fc' has become a Adapter"):
        model.train()(X)
    zls.detach(model)
    with pytest.raises(RuntimeError, match=r"not the output of 'fc\.base'.*zls\.dense_vote"):
        zls.attach(model, feature="body", classifier="fc.base", example=X)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what torch refuses before it looks for a GPU")
def test_graphed_callables_refuse_hooks():
    model, _ = attached()
    with pytest.raises(AssertionError, match="hooks"):
        torch.cuda.make_graphed_callables(model, (X,))
