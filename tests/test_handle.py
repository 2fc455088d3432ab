"""attach and ZipfLoss(votes=handle): the votes that belong to an output, or an error that names the cause."""

from __future__ import annotations

import copy
import dataclasses
import gc
import pickle
import threading
import weakref
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from processes import one_process
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import zipfls_cuda as zls

C = 7
NAMES = {"feature": "stage2", "classifier": "fc"}
Y = torch.arange(4)


@pytest.fixture(autouse=True)
def _one_thread():
    """Threads cost more than they save on tensors this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Net(nn.Module):
    def __init__(self, norm=nn.Identity):
        super().__init__()
        self.stage1 = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU())
        self.stage2 = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), norm(16), nn.ReLU())
        self.fc = nn.Linear(16, C)

    def forward(self, x):
        return self.fc(self.stage2(self.stage1(x)).mean((2, 3)))


def batch(k=0, n=4):
    return torch.randn(n, 3, 12, 12, generator=torch.Generator().manual_seed(k)) * 2


def attached(net=None, **options):
    """A network, its handle and a criterion that asks it."""
    net = net or Net()
    handle = zls.attach(net, **{**NAMES, "example": batch(), **options})
    return net, handle, zls.ZipfLoss(votes=handle)


def votes_for(net, x):
    """The votes of a batch, without attach."""
    with torch.no_grad():
        return zls.dense_vote(net.stage2(net.stage1(x)), net.fc.weight, net.fc.bias)


def loss_for(net, x, y=Y, logits=None, **options):
    logits = Net.forward(net, x) if logits is None else logits
    return zls.zipf_cross_entropy(logits, y, votes_for(net, x), **options)


def gradients(loss, net):
    return torch.autograd.grad(loss, [p for n, p in net.named_parameters() if "zipf_heads" not in n])


def assert_alike(got, expected):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


# What the model returns -----------------------------------------------------------------------------------


@pytest.mark.parametrize("deep", [(), ("stage1",)])
@pytest.mark.parametrize("example", [True, False])
def test_the_model_returns_what_it_returned(example, deep):
    net = Net()
    options = {} if example else {"example": None}
    if deep and not example:
        pytest.skip("deep needs an example")
    x = batch(1)
    expected = net(x)
    net, handle, criterion = attached(net, deep=deep, **options)
    out = net(x)
    assert torch.equal(out, expected)
    assert torch.equal(handle.votes_of(out)[0][:, :9], votes_for(net, x))
    criterion.deep_weight = 0.0
    loss = criterion(out, Y)
    if not deep:
        torch.testing.assert_close(loss, loss_for(net, x))
        assert_alike(gradients(loss, net), gradients(loss_for(net, x), net))
    with torch.no_grad():
        assert torch.equal(net(x), expected)
    assert torch.equal(net.eval()(x), expected)


@dataclasses.dataclass
class Output:
    loss: float
    logits: torch.Tensor


class Named(NamedTuple):
    logits: torch.Tensor
    auxiliary: torch.Tensor
    other: torch.Tensor


@pytest.mark.parametrize("deep", [(), ("stage1",)])
@pytest.mark.parametrize("wrap", [lambda x: Output(0.5, x), lambda x: Named(x, x + 1, x + 2)])
def test_outputs_with_logits(wrap, deep):
    class Wrapped(Net):
        def forward(self, x):
            return wrap(super().forward(x))

    net, _, criterion = attached(Wrapped(), deep=deep)
    criterion.deep_weight = 0.0
    x = batch(1)
    out = net(x)
    assert type(out) is type(wrap(x))
    if not deep:
        torch.testing.assert_close(criterion(out, Y), loss_for(net, x))
        torch.testing.assert_close(criterion(out, Y, votes_for(net, x)), loss_for(net, x))
    criterion(out.logits, Y).backward()
    torch.testing.assert_close(criterion.eval()(out, Y), F.cross_entropy(out.logits, Y))
    zls.attach(net, **NAMES, returns="tuple")
    with pytest.raises(RuntimeError, match=r"in training mode the model returns a (Output|Named)"):
        net(x)


def test_outputs_without_logits():
    class Pair(Net):
        def forward(self, x):
            logits = super().forward(x)
            return (logits, x) if self.training else logits

    net, *_ = attached(Pair())
    with pytest.raises(
        RuntimeError, match=r"returns a tuple, not logits \(N, C\) or an object with \.logits"
    ):
        net(batch())


# Whose votes ----------------------------------------------------------------------------------------------


def test_many_losses_of_one_output():
    """CutMix's two calls, a logged value, a graph that is kept."""
    net, _, criterion = attached()
    x, other = batch(1), Y.flip(0)
    out = net(x)
    loss = 0.3 * criterion(out, Y) + 0.7 * criterion(out, other)
    expected = 0.3 * loss_for(net, x) + 0.7 * loss_for(net, x, other)
    torch.testing.assert_close(loss, expected)
    loss.backward(retain_graph=True)
    first = [p.grad.clone() for p in net.parameters()]
    loss.backward(retain_graph=True)
    assert_alike([p.grad for p in net.parameters()], [2 * g for g in first])
    torch.testing.assert_close(criterion(out, Y), loss_for(net, x))
    with torch.no_grad():
        torch.testing.assert_close(criterion(out, Y), F.cross_entropy(out, Y))  # a value to log
    torch.testing.assert_close(criterion(out, Y), loss_for(net, x))


def test_accumulation_lbfgs_and_sam():
    net, _, criterion = attached()
    twin = copy.deepcopy(net)
    zls.detach(twin)
    for k in range(3):  # accumulation
        (criterion(net(batch(k)), Y) / 3).backward()
        (loss_for(twin, batch(k)) / 3).backward()
    assert_alike([p.grad for p in net.parameters()], [p.grad for p in twin.parameters()])
    losses = ((net, lambda: criterion(net(batch()), Y)), (twin, lambda: loss_for(twin, batch())))
    for model, loss_of in losses:
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)

        def closure(optimizer=optimizer, loss_of=loss_of):
            optimizer.zero_grad()
            loss = loss_of()
            loss.backward()
            return loss

        optimizer.step(closure)
    for model, loss_of in losses:  # SAM: up along the gradient, and the gradient there
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        optimizer.zero_grad()
        loss_of().backward()
        steps = [0.05 * p.grad for p in model.parameters()]
        with torch.no_grad():
            torch._foreach_add_(list(model.parameters()), steps)
        optimizer.zero_grad()
        loss_of().backward()
        with torch.no_grad():
            torch._foreach_sub_(list(model.parameters()), steps)
        optimizer.step()
    assert_alike(net.parameters(), twin.parameters())


def test_two_forwards_before_one_loss():
    net, _, criterion = attached()
    first, second = net(batch(1)), net(batch(2))
    for logits in (first, first.double(), second.double()):
        with pytest.raises(ValueError, match=r"^attach: two training forwards or more.*torch\.no_grad\(\)"):
            criterion(logits, Y)
    torch.testing.assert_close(criterion(second, Y), loss_for(net, batch(2)))
    with pytest.raises(ValueError, match=r"^attach: .*no other has run since.*an earlier forward"):
        criterion(first, Y)


def test_an_earlier_output_never_gets_later_votes():
    net, _, criterion = attached()
    first = net(batch(1))
    criterion(first, Y)
    net(batch(2))
    for logits in (first, first.double(), first[:2]):
        with pytest.raises(ValueError, match=r"^attach: .*an earlier forward"):
            criterion(logits, Y[: len(logits)])


@pytest.mark.parametrize(
    "between",
    [
        lambda net: torch.no_grad()(net)(batch(2)),
        lambda net: torch.inference_mode()(net)(batch(2, n=3)),
        lambda net: torch.optim.swa_utils.update_bn([batch(2)], net),
        lambda net: net.eval()(batch(2)) is net.train(),  # with gradient
        lambda net: copy.deepcopy(net)(batch(2)),
        lambda net: checkpoint(net, batch(2).requires_grad_(), use_reentrant=True),
        lambda net: torch.compile(torch.no_grad()(net), backend="eager")(batch(2)),
    ],
    ids=["no_grad", "inference", "update_bn", "eval", "copy", "reentrant checkpoint", "compiled"],
)
def test_other_forwards_do_not_disturb(between):
    net, _, criterion = attached(Net(nn.BatchNorm2d))
    out = net(batch(1))
    expected = zls.zipf_cross_entropy(out, Y, votes_for(net, batch(1)))
    between(net)
    torch.testing.assert_close(criterion(out.double(), Y), expected.double(), check_dtype=False)
    torch.testing.assert_close(criterion(out, Y), expected)


def test_another_tensor_for_the_output():
    net, _, criterion = attached()
    x = batch(1)
    wide = net(x).double()
    loss = criterion(wide, Y) + criterion(wide, Y.flip(0))
    torch.testing.assert_close(loss.float(), loss_for(net, x) + loss_for(net, x, Y.flip(0)))
    assert_alike(gradients(loss, net), gradients(loss_for(net, x) + loss_for(net, x, Y.flip(0)), net))
    part = net(x)[:, :5] / 2
    masked = votes_for(net, x)
    net.fc.weight.data[5:], net.fc.bias.data[5:] = 0, -1e4  # no votes for the classes cut off
    part = net(x)
    part = part[:, :5] / 2
    with pytest.raises(ValueError, match=r"^attach: two training forwards"):
        criterion(part, Y)
    criterion(net(x), Y)
    part = net(x)[:, :5] / 2
    masked = votes_for(net, x)
    torch.testing.assert_close(criterion(part, Y), zls.zipf_cross_entropy(part, Y, masked))
    out = net(x)
    out /= 2  # the same tensor
    torch.testing.assert_close(criterion(out, Y), zls.zipf_cross_entropy(out, Y, votes_for(net, x)))
    with pytest.raises(ValueError, match=r"^attach: logits have 2 rows.*had 4"):
        criterion(net(x)[:2], Y[:2])


@pytest.mark.parametrize(
    "wrong",
    [
        lambda net: net.eval()(batch(1)),
        lambda net: net.forward(batch(1)),
        lambda net: copy.deepcopy(net)(batch(1)),
        lambda net: torch.randn(4, C, requires_grad=True),
        lambda net: checkpoint(net, batch(1).requires_grad_(), use_reentrant=True),
    ],
    ids=["eval mode", "model.forward", "another model", "a leaf", "reentrant checkpoint"],
)
@pytest.mark.parametrize("before", ["nothing", "a loss", "no loss"])
def test_no_votes_is_an_error_that_names_the_cause(wrong, before):
    net, _, criterion = attached()
    if before != "nothing":
        out = net(batch())
    if before == "a loss":
        criterion(out, Y)
    causes = r"eval mode.*model\.train\(\).*model\.forward\(x\).*another model.*use_reentrant=True"
    with pytest.raises(ValueError, match=f"^attach: .*{causes}"):
        criterion(wrong(net), Y)


def test_no_handle_is_an_error_that_says_what_to_do():
    logits, votes = torch.randn(4, C, requires_grad=True), torch.zeros(4, 3, dtype=torch.int32)
    for output in (logits, Output(0.0, logits)):
        with pytest.raises(ValueError, match=r"no votes.*votes=zls\.attach\(model\).*ranking='logits'"):
            zls.ZipfLoss()(output, Y)
    by_logits = zls.ZipfLoss(ranking="logits")
    torch.testing.assert_close(by_logits(logits, Y), zls.zipf_cross_entropy(logits, Y))
    torch.testing.assert_close(by_logits(logits, Y, votes), zls.zipf_cross_entropy(logits, Y, votes))
    torch.testing.assert_close(zls.ZipfLoss(0.0)(logits, Y), F.cross_entropy(logits, Y))
    net, handle, criterion = attached()
    out = net(batch())
    torch.testing.assert_close(criterion((out, votes), Y), zls.zipf_cross_entropy(out, Y, votes))  # votes win
    assert "ranking='logits'" in repr(by_logits)
    assert "votes=Attached(Net, global pooling" in repr(criterion)
    with pytest.raises(ValueError, match="ranking must be one of votes, logits, got 'rank'"):
        zls.ZipfLoss(ranking="rank")
    with pytest.raises(ValueError, match="ranking='logits' asks for no votes"):
        zls.ZipfLoss(votes=handle, ranking="logits")
    with pytest.raises(TypeError, match=r"votes must be the handle.*got Tensor.*criterion\(logits"):
        zls.ZipfLoss(votes=votes)
    with pytest.raises(TypeError, match=r"output must be logits, an object with \.logits.*got dict"):
        criterion({"logits": out}, Y)


def test_validation_is_plain_cross_entropy():
    weight = torch.rand(C) + 0.5
    net, handle, _ = attached(deep=("stage1",))
    options = {"weight": weight, "label_smoothing": 0.2, "ignore_index": 1}
    criterion = zls.ZipfLoss(0.7, votes=handle, **options)
    soft = torch.rand(4, C).softmax(1)
    plain = {"weight": weight, "ignore_index": 1}
    x = batch(1)

    def check(logits):
        torch.testing.assert_close(criterion(logits, Y), F.cross_entropy(logits, Y, **plain))
        by_number = criterion(logits, Y, num_items_in_batch=torch.tensor(10))
        torch.testing.assert_close(by_number, F.cross_entropy(logits, Y, **plain, reduction="sum") / 10)
        everything = zls.ZipfLoss(votes=handle, weight=weight, label_smoothing=0.2, reduction="none")
        everything.train(criterion.training)
        torch.testing.assert_close(
            everything(logits, soft), F.cross_entropy(logits, soft, weight, reduction="none")
        )

    with torch.no_grad():
        check(net(x))
        check(net.eval()(x))
    with torch.inference_mode():
        check(net(x))
        check(net.train()(x))
    out = net(x)
    check(out.detach())
    assert not torch.allclose(criterion(out, Y), F.cross_entropy(out, Y, **plain))
    criterion.eval()
    check(net(x))
    check(net.eval()(x))
    votes = torch.zeros(4, 3, dtype=torch.int32)
    torch.testing.assert_close(criterion((out, votes, (out,)), Y), F.cross_entropy(out, Y, **plain))
    with torch.no_grad():  # votes that are passed are not asked for
        given = criterion.train()((out, votes), Y)
    torch.testing.assert_close(
        given, zls.zipf_cross_entropy(out, Y, votes, zipf_weight=0.7, **options).detach()
    )


def test_num_items_in_batch():
    """Micro-batches against one batch, as Hugging Face's Trainer asks for it."""
    net, _, criterion = attached(deep=("stage1",))
    whole = gradients(criterion(net(batch(0, n=8)), torch.arange(8) % C), net)
    loss = 0
    for rows in (slice(0, 3), slice(3, 8)):
        out = Output(0.0, net(batch(0, n=8)[rows]))
        loss = loss + criterion(out, (torch.arange(8) % C)[rows], num_items_in_batch=torch.tensor(8))
    assert_alike(gradients(loss, net), whole)


def test_threads():
    """The votes of one's own batch, or an error; a validation beside a training disturbs nothing."""

    class Gated(Net):
        gate = None

        def forward(self, x):
            x = self.stage2(self.stage1(x))
            if self.gate is not None and len(x) != 3:
                self.gate.wait(10)
            return self.fc(x.mean((2, 3)))

    for returns in ("logits", "tuple"):
        net, _, criterion = attached(Gated(), returns=returns)
        results = {}

        def run(k, net=net, criterion=criterion, results=results):
            try:
                results[k] = criterion(net(batch(k)), Y)
            except Exception as error:
                results[k] = error
                net.gate.wait(10)  # in the other's stead

        net.gate = threading.Barrier(2)
        threads = [threading.Thread(target=run, args=(k,)) for k in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for k, result in results.items():
            if isinstance(result, Exception):
                assert "the model runs in another thread" in str(result)
            else:
                torch.testing.assert_close(result, loss_for(net, batch(k)))
        assert any(isinstance(r, torch.Tensor) for r in results.values())

    def validate():
        net.gate.wait(10)
        with torch.no_grad():
            net(batch(5, n=3))  # of three images: is not held up
        net.gate.wait(10)

    net, _, criterion = attached(Gated())
    net.gate = threading.Barrier(2)
    net.stage2.register_forward_hook(lambda m, a, out: net.gate.wait(10) and None if len(out) == 4 else None)
    thread = threading.Thread(target=validate)
    thread.start()
    out = net(batch(1))
    thread.join()
    net.gate = None
    net.stage2._forward_hooks.popitem()
    torch.testing.assert_close(criterion(out, Y), loss_for(net, batch(1)))


def test_an_interrupted_forward_is_forgotten():
    class Interrupted(Net):
        fail = False

        def forward(self, x):
            x = self.stage2(self.stage1(x))
            if self.fail:
                raise KeyboardInterrupt
            return self.fc(x.mean((2, 3)))

    net, _, criterion = attached(Interrupted())
    out = net(batch(1))
    net.fail = True
    with pytest.raises(KeyboardInterrupt):
        net(batch(2))
    net.fail = False
    with torch.no_grad():
        net(batch(3))
    torch.testing.assert_close(criterion(out, Y), loss_for(net, batch(1)))
    torch.testing.assert_close(criterion(net(batch(4)), Y), loss_for(net, batch(4)))


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("deep", [(), ("stage1",)])
def test_checkpointing_of_the_whole_model(deep, early_stop):
    """The second forward, in backward, leaves no votes. Reentrant checkpointing is refused, above."""
    net, _, criterion = attached(Net(nn.BatchNorm2d), deep=deep)
    twin, twins = copy.deepcopy((net, criterion))
    x = batch(1)
    with set_checkpoint_early_stop(early_stop):
        out = checkpoint(net, x, use_reentrant=False)
    loss = criterion(out, Y)
    loss.backward(retain_graph=True)
    twins(twin(x), Y).backward()
    for (name, p), q in zip(net.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)
    torch.testing.assert_close(criterion(out, Y), loss)
    out = net(x)
    criterion(out.double(), Y)  # one forward since


# Lives ----------------------------------------------------------------------------------------------------


def pickled(x):
    return pickle.loads(pickle.dumps(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)])
def test_model_and_criterion_copied_together_stay_connected(copied, order):
    pair = attached(deep=("stage1",))
    pair[2](pair[0](batch()), Y)  # a forward is over, and its votes are not copied
    net, handle, criterion = copied(pair[order])[order]
    with pytest.raises(ValueError, match=r"^attach: no training forward"):
        criterion(torch.randn(4, C, requires_grad=True), Y)
    with torch.no_grad():
        net.fc.weight.copy_(net.fc.weight.roll(1, 0))
    out, old = net(batch(1)), pair[0](batch(1))
    assert torch.equal(handle.votes_of(out)[0][:, :9], votes_for(net, batch(1)))
    assert torch.equal(pair[1].votes_of(old)[0][:, :9], votes_for(pair[0], batch(1)))
    criterion(out, Y).backward()
    with pytest.raises(ValueError, match="another model"):
        pair[2](out, Y)
    assert "a model" in repr(handle)
    with pytest.raises(RuntimeError, match=r"zls\.detach\(model\)"):
        handle.remove()
    assert zls.detach(net)
    with pytest.raises(RuntimeError, match="detached"):
        criterion(out, Y)


def test_neither_criterion_nor_handle_owns_the_model():
    net, handle, criterion = attached()
    criterion(net(batch()), Y)
    size = len(pickle.dumps(criterion))
    assert size < 4000
    lonely = copy.deepcopy(criterion)
    with pytest.raises(ValueError, match="another model"):
        lonely(net(batch()), Y)
    assert not list(criterion.parameters())
    assert not criterion.state_dict()
    reference = weakref.ref(net)
    del net
    gc.collect()
    assert reference() is None
    handle.remove()  # there is nothing to do
    assert "a model" in repr(handle)


@pytest.mark.parametrize("deep", [(), ("stage1",)])
def test_attaching_again_replaces(deep):
    net, old, criterion = attached(deep=deep)
    parameters = list(net.parameters())
    out = net(batch())
    handle = zls.attach(net, **NAMES, example=batch(), deep=deep)
    assert all(p is q for p, q in zip(parameters, net.parameters(), strict=True))  # deep heads stay
    with pytest.raises(RuntimeError, match=r"this handle.*replaced by a later attach\(model\)"):
        criterion(out, Y)
    assert "replaced" in repr(old)
    assert len(net._forward_hooks) == len(net._forward_pre_hooks) == len(net.fc._forward_pre_hooks) + 1
    old.remove()
    out = net(batch())
    assert torch.equal(handle.votes_of(out)[0][:, :9], votes_for(net, batch()))
    wider = zls.attach(net, **NAMES, example=batch(), deep=("stage1", "stage2"), upsample=2)
    assert len(net.zipf_heads) == 2
    assert handle.plan != wider.plan
    with pytest.raises(RuntimeError, match="cannot vote"):  # a refusal leaves the handle that there is
        zls.attach(net, **{**NAMES, "feature": "fc"}, example=batch())
    zls.ZipfLoss(votes=wider)(net(batch()), Y).backward()
    zls.attach(net, **NAMES, example=batch())
    assert not hasattr(net, "zipf_heads")


def test_a_loaded_model_is_attached_again():
    net, *_ = attached(deep=("stage1",))
    loaded = pickled(net)
    weight = loaded.zipf_heads[0].weight
    criterion = zls.ZipfLoss(votes=zls.attach(loaded, **NAMES, example=batch(), deep=("stage1",)))
    assert loaded.zipf_heads[0].weight is weight
    criterion(loaded(batch()), Y).backward()
    assert weight.grad.any()


def test_detach():
    clean = Net()
    names = {k: set(vars(m)) for k, m in clean.named_modules()}
    assert zls.detach(clean) is False
    net, handle, criterion = attached(deep=("stage1",), returns="tuple")
    for model in (net, copy.deepcopy(net), pickled(net)):
        assert len(model(batch())) == 3
        assert zls.detach(model) is True
        assert zls.detach(model) is False
        assert isinstance(model(batch()), torch.Tensor)
        assert {k: set(vars(m)) for k, m in model.named_modules()} == names
        assert not any(v for m in model.modules() for k, v in vars(m).items() if "hooks" in k)
    with pytest.raises(RuntimeError, match=r"detached; attach\(model\) again"):
        criterion(clean(batch()), Y)
    handle.remove()
    with pytest.raises(TypeError, match=r"model must be an nn.Module, got str"):
        zls.detach("net")
    with pytest.raises(TypeError, match="OptimizedModule"):
        zls.detach(torch.compile(net, backend="eager"))


def test_jit_script_says_what_to_do():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, C))
    for example in (None, batch()):
        zls.attach(net, feature="0", classifier="3", example=example)
        with pytest.raises(Exception, match=r"zls\.detach\(model\) first"):
            torch.jit.script(net)
    zls.detach(net)
    torch.jit.script(net)


# Wrappers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deep", [(), ("stage1",)])
@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}, {"static_graph": True}], ids=str)
def test_ddp(options, deep):
    with one_process():
        check_ddp(options, deep)


def check_ddp(options, deep):
    net, _, criterion = attached(deep=deep)
    if "find_unused_parameters" in options:
        net.unused = nn.Linear(8, 8)
    twin, twins = copy.deepcopy((net, criterion))
    parallel = DistributedDataParallel(net, **options)
    for step in range(3):
        x = batch(step)
        for model, loss, module in ((parallel, criterion, net), (twin, twins, twin)):
            out = model(x)
            module.zero_grad()
            (0.5 * loss(out, Y) + 0.5 * loss(out, Y.flip(0))).backward()
            with torch.no_grad():
                loss(model(x), Y)  # a logged value
            torch.optim.SGD(module.parameters(), 0.1).step()
        for (name, p), q in zip(net.named_parameters(), twin.named_parameters(), strict=True):
            torch.testing.assert_close(p, q[1], msg=name)
            assert name.startswith("unused") or p.grad.any()


def test_data_parallel_is_refused_by_name():
    net, _, criterion = attached()
    replica = net._replicate_for_data_parallel()  # what runs on each of several devices
    with pytest.raises(RuntimeError, match=r"^attach: DataParallel.*DistributedDataParallel"):
        replica(batch())
    with torch.no_grad():
        assert replica(batch()).shape == (4, C)
    if torch.cuda.device_count() < 2:  # without devices it calls the model itself
        criterion(DataParallel(net, device_ids=[])(batch()), Y).backward()


def compiled(f):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(f, backend=counter, fullgraph=True), counter


@pytest.mark.parametrize(
    "what, deep", [("model", ("stage1",)), ("step", ("stage1",)), ("step", ()), ("loss", ())], ids=str
)
def test_twelve_compiled_steps(what, deep):
    """No recompilation, and what eager steps compute."""
    net, _, criterion = attached(deep=deep)
    twin, twins = copy.deepcopy((net, criterion))

    def step(x, y):
        return criterion(net(x).float(), y)

    run, counter = compiled({"model": net, "step": step, "loss": criterion}[what])
    losses = []
    for k in range(12):
        x, y = batch(k), Y.roll(k)
        loss = run(x, y) if what == "step" else criterion(run(x), y) if what == "model" else run(net(x), y)
        expected = twins(twin(x), y)
        torch.testing.assert_close(loss, expected)
        for model, value in ((net, loss), (twin, expected)):
            model.zero_grad()
            value.backward()
            torch.optim.SGD(model.parameters(), 0.05).step()
        losses.append(loss.item())
        if k == 6 and what == "model":
            torch.testing.assert_close(criterion(run(x).double()[:, :C], y).float(), twins(twin(x), y))
        if k == 0:
            graphs = counter.frame_count
            assert graphs == 1 or what == "model"  # whose hooks are a graph of their own
    assert counter.frame_count == graphs
    assert_alike(net.parameters(), twin.parameters())
    if what == "model":
        first, second = run(batch(1)), run(batch(2))
        with pytest.raises(ValueError, match=r"^attach: two training forwards"):
            criterion(first, Y)
        torch.testing.assert_close(criterion(second, Y), twins(twin(batch(2)), Y))
        with pytest.raises(ValueError, match=r"^attach: .*an earlier forward"):
            criterion(first, Y)


def test_parts_of_the_model_compiled():
    net, _, criterion = attached(deep=("stage1",))
    twin, twins = copy.deepcopy((net, criterion))
    torch._dynamo.reset()
    net.stage1.compile(backend="eager")
    net.stage2.compile(backend="eager")
    for k in range(2):
        torch.testing.assert_close(criterion(net(batch(k)), Y), twins(twin(batch(k)), Y))
