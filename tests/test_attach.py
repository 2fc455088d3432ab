"""attach: the votes are what the model says of each position, and nothing else about the model changes.

``PYTHONPATH=. python tests/test_attach.py`` prints the support table: what the probe decides.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import pickle
import random
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import one_process, spawn
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import fully_shard

import zipfls_cuda as zls
from zipfls_cuda.attach.positions import CLASS_TOKEN, GLOBAL_POOLING, PER_POSITION

CLASSES = 11


@pytest.fixture(autouse=True)
def _one_thread():
    """Threads cost more than they save on tensors this small, and far more on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Architectures, each against an oracle that asks the model's own head about one position at a time ---------


SHOWN_OPTIONS = ("global_pool", "reg_tokens")  # the others only make the model small


def fc(model, rows):
    return model.fc(rows)


def classifier(model, rows):
    return model.classifier(rows)


@dataclasses.dataclass
class Arch:
    library: str
    name: str
    kind: str
    options: dict = dataclasses.field(default_factory=dict)
    size: tuple[int, int] = (64, 64)
    # torchvision alone: the module that gives the map, and scores of positions (M, D) by the model's own head
    feature: str = ""
    head: Callable | None = None

    def __str__(self):
        options = [str(v) for k, v in self.options.items() if k in SHOWN_OPTIONS]
        return "-".join([self.library, self.name, *options])

    def make(self):
        if self.library == "timm":
            return timm().create_model(self.name, num_classes=CLASSES, **self.options)
        models = torchvision().models
        make = SMALL.get(self.name, lambda models, **options: getattr(models, self.name)(**options))
        return make(models, num_classes=CLASSES, **self.options)


def small_convnext(models, **options):
    Stage = models.convnext.CNBlockConfig
    stages = [Stage(24, 48, 1), Stage(48, 96, 1), Stage(96, 192, 1), Stage(192, None, 1)]
    return models.ConvNeXt(stages, **options)


# torchvision's larger models, of its own classes with fewer and narrower layers.
SMALL = {
    "resnext50_32x4d": lambda models, **options: models.ResNet(
        models.resnet.Bottleneck, [1, 1, 1, 1], groups=32, width_per_group=4, **options
    ),
    "densenet121": lambda models, **options: models.DenseNet(16, (2, 2, 2, 2), 32, **options),
    "convnext_tiny": small_convnext,
    "swin_t": lambda models, **options: models.SwinTransformer(
        [4, 4], 24, [1, 1, 1, 1], [1, 2, 4, 8], [2, 2], **options
    ),
    "vit_b_16": lambda models, **options: models.VisionTransformer(
        patch_size=16, num_layers=2, num_heads=2, hidden_dim=48, mlp_dim=96, **options
    ),
}


def torchvision():
    from torchvision_stub import import_torchvision

    try:
        return import_torchvision()
    except ImportError:
        pytest.skip("torchvision is not installed")


def timm():
    torchvision()
    return pytest.importorskip("timm")


VIT = {"img_size": 64, "depth": 2}
SWIN = {"img_size": 64, "window_size": 2, "embed_dim": 24, "depths": (1, 1, 1, 1)}
ARCHS = [
    Arch("timm", "resnet18", GLOBAL_POOLING, size=(64, 96)),
    Arch("timm", "resnet18", PER_POSITION, {"global_pool": "max"}),
    Arch("timm", "resnet18", PER_POSITION, {"global_pool": "catavgmax"}),
    Arch("timm", "resnext50_32x4d", GLOBAL_POOLING, {"layers": (1, 1, 1, 1)}),
    Arch("timm", "resnetv2_50", GLOBAL_POOLING, {"layers": (1, 1, 1, 1)}),
    Arch("timm", "densenet121", GLOBAL_POOLING),
    Arch("timm", "mobilenetv2_050", GLOBAL_POOLING),
    Arch("timm", "mobilenetv3_small_050", PER_POSITION, {"drop_rate": 0.5}),
    Arch("timm", "efficientnet_b0", GLOBAL_POOLING, {"drop_rate": 0.5}),
    Arch("timm", "efficientvit_b0", PER_POSITION),
    Arch("timm", "regnetx_002", GLOBAL_POOLING),
    Arch("timm", "convnext_atto", PER_POSITION, {"drop_rate": 0.5}, size=(64, 96)),
    Arch("timm", "poolformer_s12", PER_POSITION),
    Arch("timm", "maxvit_tiny_tf_224", PER_POSITION, {"img_size": 64, "depths": (1, 1, 1, 1)}),
    Arch("timm", "swin_tiny_patch4_window7_224", GLOBAL_POOLING, SWIN),
    Arch("timm", "vit_tiny_patch16_224", CLASS_TOKEN, VIT),
    Arch("timm", "vit_tiny_patch16_224", CLASS_TOKEN, {**VIT, "reg_tokens": 4}),
    Arch("timm", "vit_tiny_patch16_224", PER_POSITION, {**VIT, "global_pool": "avg", "drop_rate": 0.5}),
    Arch("timm", "vit_tiny_patch16_224", PER_POSITION, {**VIT, "global_pool": "map"}),
    Arch("timm", "beit_base_patch16_224", PER_POSITION, {"img_size": 64, "depth": 1, "embed_dim": 48}),
    Arch("timm", "mixer_s32_224", GLOBAL_POOLING, {"img_size": 64}),
    Arch("torchvision", "resnet18", GLOBAL_POOLING, {}, (64, 96), "layer4", fc),
    Arch("torchvision", "resnext50_32x4d", GLOBAL_POOLING, {}, (64, 64), "layer4", fc),
    Arch("torchvision", "densenet121", GLOBAL_POOLING, {}, (64, 64), "features",
         lambda m, v: m.classifier(v.relu())),
    Arch("torchvision", "googlenet", GLOBAL_POOLING, {"aux_logits": False, "init_weights": False}, (64, 96),
         "inception5b", fc),
    Arch("torchvision", "mobilenet_v2", GLOBAL_POOLING, {}, (64, 64), "features", classifier),
    Arch("torchvision", "mobilenet_v3_small", PER_POSITION, {}, (64, 64), "features", classifier),
    Arch("torchvision", "efficientnet_b0", GLOBAL_POOLING, {}, (64, 64), "features", classifier),
    Arch("torchvision", "convnext_tiny", PER_POSITION, {}, (64, 96), "features",
         lambda m, v: m.classifier(v[:, :, None, None])),
    Arch("torchvision", "swin_t", GLOBAL_POOLING, {}, (64, 96), "permute", lambda m, v: m.head(v)),
    Arch("torchvision", "vit_b_16", CLASS_TOKEN, {"image_size": 64}, (64, 64), "encoder",
         lambda m, v: m.heads(v)),
    Arch("torchvision", "regnet_x_400mf", GLOBAL_POOLING, {}, (64, 64), "trunk_output", fc),
    Arch("torchvision", "shufflenet_v2_x0_5", GLOBAL_POOLING, {}, (64, 64), "conv5", fc),
    Arch("torchvision", "mnasnet0_5", GLOBAL_POOLING, {}, (64, 64), "layers", classifier),
]  # fmt: skip


def shake(model):
    """Weights and statistics of a model that has been trained: no norm is the identity, no head is zero."""
    for module in model.modules():
        if "Norm" in type(module).__name__ and getattr(module, "weight", None) is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            if getattr(module, "bias", None) is not None:
                nn.init.normal_(module.bias, std=0.2)
            if getattr(module, "running_mean", None) is not None:
                module.running_mean.normal_(std=0.2)
                module.running_var.uniform_(0.5, 1.5)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.1)


def snapshot(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def assert_same_state(state, model):
    assert list(state) == list(model.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(state[name], value), name


def assert_best(votes, scores):
    """Each vote (N, P) has the largest of the scores (N, P, C), up to rounding."""
    got = scores.gather(2, votes.long().unsqueeze(2)).squeeze(2)
    best = scores.amax(2)
    assert (best - got).max() <= 1e-4 * scores.abs().max()
    assert votes.dtype == torch.int32
    assert not votes.requires_grad


def timm_scores(model, features):
    """Scores (N, P, C): forward_head on a map filled with position p, for every p."""
    prefix = getattr(model, "num_prefix_tokens", 0) if features.dim() == 3 else 0
    nhwc = getattr(model, "output_fmt", "NCHW") == "NHWC"
    model = copy.deepcopy(model).eval()
    spread = features.transpose(1, 2) if features.dim() == 3 else features  # to (N, D, ...)
    spread = spread.permute(0, 3, 1, 2) if nhwc else spread
    rows = spread.flatten(2)[:, :, prefix:]  # (N, D, P)
    scores = []
    for p in range(rows.shape[2]):
        filled = rows[:, :, p].reshape(*rows.shape[:2], *[1] * (spread.dim() - 2)).expand_as(spread)
        filled = (
            filled.permute(0, 2, 3, 1) if nhwc else filled.transpose(1, 2) if features.dim() == 3 else filled
        )
        scores.append(model.forward_head(filled.contiguous()))
    return torch.stack(scores, 1)


def torchvision_scores(model, features, arch):
    rows = features[:, 1:] if features.dim() == 3 else features.flatten(2).transpose(1, 2)
    scores = arch.head(copy.deepcopy(model).eval(), rows.flatten(0, 1))
    return scores.unflatten(0, rows.shape[:2])


@pytest.mark.parametrize("arch", ARCHS, ids=str)
@torch.no_grad()
def test_attach_votes_as_the_models_head(arch):
    model = arch.make()
    shake(model)
    clean = copy.deepcopy(model)
    x = torch.randn(3, 3, *arch.size)
    cls, names, state = type(model), dict(model.named_parameters()).keys(), snapshot(model)

    torch.manual_seed(5)
    handle = zls.attach(model, example=x, returns="tuple")
    assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(5)))
    assert_same_state(state, model)
    assert handle.plan.kind == arch.kind
    assert arch.kind in repr(handle)
    assert type(model) is cls
    assert dict(model.named_parameters()).keys() == names
    assert "forward" not in vars(model)
    assert "forward_features" not in vars(model)

    features = []
    if arch.library == "timm":
        original = cls.forward_features

        def forward_features(self, *args, **kwargs):
            features.append(original(self, *args, **kwargs))
            return features[-1]

        spy = mock.patch.object(cls, "forward_features", forward_features)
    else:
        spy = mock.MagicMock()
        model.get_submodule(arch.feature).register_forward_hook(lambda m, a, out: features.append(out))
    model.train()
    clean.train()
    with spy:
        torch.manual_seed(1)
        logits, votes = model(x)
    torch.manual_seed(1)
    assert torch.equal(logits, clean(x))  # with the same dropout: the votes draw nothing
    assert torch.equal(torch.rand(2), (torch.manual_seed(1), clean(x), torch.rand(2))[2])
    assert all(m.training for m in model.modules())

    score = (
        timm_scores(model, features[0])
        if arch.library == "timm"
        else torchvision_scores(model, features[0], arch)
    )
    assert votes.shape == score.shape[:2]
    assert votes.unique().numel() > 1
    assert_best(votes, score)

    model.eval()
    clean.load_state_dict(model.state_dict())
    assert torch.equal(model(x), clean.eval()(x))


@torch.no_grad()
def test_attach_torchvision_vgg():
    """Its head pools to a grid of 7 x 7, which is one position repeated for a map of one position."""
    vgg = torchvision().models.VGG(nn.Sequential(nn.Conv2d(3, 8, 3, 4), nn.ReLU(inplace=True)))
    vgg.classifier = nn.Sequential(nn.Linear(8 * 49, 32), nn.ReLU(True), nn.Dropout(), nn.Linear(32, CLASSES))
    handle = zls.attach(vgg, example=torch.randn(2, 3, 16, 16), returns="tuple")
    assert handle.plan.kind == PER_POSITION
    seen = maps_of(vgg, "features")
    votes = vgg(torch.randn(2, 3, 16, 16))[1]
    arch = SimpleNamespace(head=lambda m, v: m.classifier(v.repeat_interleave(49, 1)))
    assert_best(votes, torchvision_scores(vgg, seen["features"], arch))


# A model of one's own ----------------------------------------------------------------------------------


class Tiny(nn.Module):
    """A convolutional net with a head to choose and nothing of timm or torchvision."""

    def __init__(self, *head, width=16):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.stage1 = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU())
        self.stage2 = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        self.head = nn.Sequential(*(head or (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5))))
        self.fc = nn.Linear(width, CLASSES)

    def forward(self, x):
        return self.fc(self.head(self.stage2(self.stage1(self.stem(x)))))


FOUND = {"feature": "stage2", "classifier": "fc"}
NAMES = {**FOUND, "returns": "tuple"}
X = torch.linspace(-2, 2, 4 * 3 * 16 * 12).sin().reshape(4, 3, 16, 12) * 2  # stage2: (4, 16, 4, 3)


def tiny(*head, width=16, **options):
    model = Tiny(*head, width=width)
    shake(model)
    return model, zls.attach(model, **{**NAMES, "example": X, **options})


def maps_of(model, *names):
    """Hooks that keep the outputs of modules, as they are when the forward is over."""
    seen = {}
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda m, a, out, name=name: seen.update({name: out}))
    return seen


def dense_scores(features, linear):
    return F.linear(features.flatten(2).transpose(1, 2), linear.weight, linear.bias)


def test_attach_probe_disturbs_nothing():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            random.random()
            torch.rand(1)
            return x

    model = Tiny(nn.AdaptiveAvgPool2d(1), Counter(), nn.Flatten(), nn.Dropout())
    model.stage1.eval()  # frozen by the user
    flags = [m.training for m in model.modules()]
    state, x = snapshot(model), X.clone()
    model.stem.register_forward_pre_hook(
        lambda m, args: args[0].mul_(2).sum().item() * 0 or None
    )  # overwrites its input
    torch.manual_seed(3)
    random.seed(3)
    zls.attach(model, **NAMES, example=x)
    assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(3)))
    assert random.random() == random.Random(3).random()
    assert_same_state(state, model)
    assert [m.training for m in model.modules()] == flags
    assert torch.equal(x, X)
    assert all(p.grad is None for p in model.parameters())


def test_attach_probe_leaves_no_eval_cache():
    class Caching(nn.Linear):
        cache = None

        def train(self, mode=True):
            self.cache = None if mode else self.cache
            return super().train(mode)

        def forward(self, x):
            if not self.training and self.cache is None:
                self.cache = self.weight.clone()
            return F.linear(x, self.weight if self.training else self.cache, self.bias)

    model = Tiny()
    model.fc = Caching(16, CLASSES)
    zls.attach(model, **NAMES, example=X)
    nn.init.zeros_(model.fc.weight)
    assert torch.equal(model.eval()(X), model.fc.bias.expand(4, -1))


def test_attach_probes_the_first_training_batch():
    eager, handle = tiny()
    model = copy.deepcopy(eager)
    handle.remove()
    lazy = copy.deepcopy(eager)
    late = zls.attach(lazy, **NAMES)
    assert late.plan is None
    assert "first training batch" in repr(late)
    assert isinstance(lazy.eval()(X), torch.Tensor)
    assert late.plan is None
    lazy.train()
    torch.manual_seed(1)
    logits, votes = lazy(X)
    torch.manual_seed(1)
    expected = model(X)
    assert torch.equal(logits, expected[0])
    assert torch.equal(votes, expected[1])
    assert late.plan == handle.plan
    assert_same_state(model.state_dict(), lazy)  # batch norm saw the batch once


def test_attach_global_pooling():
    model, handle = tiny()
    seen = maps_of(model, "stage2")
    votes = model(X)[1]
    assert handle.plan.kind == GLOBAL_POOLING
    assert handle.plan.head == ()
    assert_best(votes, dense_scores(seen["stage2"], model.fc))
    assert votes.shape == (4, 12)
    assert votes.unique().numel() > 1


def test_attach_upsampled_votes():
    model, _ = tiny(upsample=2)
    seen = maps_of(model, "stage2")
    votes = model(X)[1]
    big = F.interpolate(seen["stage2"], scale_factor=2, mode="bilinear", align_corners=False)
    assert votes.shape == (4, 48)
    assert_best(votes, dense_scores(big, model.fc))


def test_attach_upsampled_votes_through_a_head():
    head = nn.Sequential(nn.Flatten(), nn.LayerNorm(16), nn.Linear(16, 12), nn.Tanh(), nn.Dropout(0.9))
    model, handle = tiny(nn.AdaptiveAvgPool2d(1), head, width=12, upsample=2)
    assert handle.plan.kind == PER_POSITION
    seen = maps_of(model, "stage2")
    votes = model(X)[1]
    big = F.interpolate(seen["stage2"], scale_factor=2, mode="bilinear", align_corners=False)
    rows = big.flatten(2).transpose(1, 2)
    scores = model.fc(copy.deepcopy(head).eval()(rows.reshape(-1, 16))).unflatten(0, (4, 48))
    assert_best(votes, scores)
    assert head[-1].training


def test_attach_dropout_does_not_touch_votes():
    torch.manual_seed(0)
    model, _ = tiny(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Sequential(nn.LayerNorm(16), nn.Dropout(0.9)))
    out = [model(X) for _ in range(3)]
    assert not torch.equal(out[0][0], out[1][0])
    assert torch.equal(out[0][1], out[1][1])
    assert torch.equal(out[0][1], out[2][1])


def test_attach_fresh_batch_norm_in_the_head_is_no_identity():
    """Before training, batch norm in eval mode changes nothing; the votes must follow it once it does."""
    model = Tiny(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(16, eps=1e-12))
    handle = zls.attach(model, **NAMES, example=X)
    assert handle.plan.kind == PER_POSITION
    norm = model.head[2]
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.1, 5)
    seen = maps_of(model, "stage2")
    votes = model(X)[1]  # updates the running statistics once, by the pooled features
    stats = norm.num_batches_tracked.item()
    rows = seen["stage2"].flatten(2).transpose(1, 2).reshape(-1, 16)
    assert_best(votes, model.fc(copy.deepcopy(norm).eval()(rows)).unflatten(0, (4, 12)))
    assert stats == 1


@pytest.mark.parametrize("inplace", [False, True])
def test_attach_clamp_in_the_head_is_no_identity(inplace):
    """The probe's values are within its range; trained ones need not be."""
    model, _ = tiny(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Sequential(nn.ReLU6(inplace=inplace)))
    with torch.no_grad():
        model.stage2[1].weight.mul_(20)
    seen = maps_of(model, "stage2")
    votes = model(X)[1]
    assert seen["stage2"].max() > 6
    assert_best(votes, dense_scores(seen["stage2"].clamp(max=6), model.fc))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU])
def test_attach_activation_after_the_map(act, inplace):
    """In place it overwrites the kept map, and must not run a second time on it."""
    model = Tiny(act(inplace=inplace), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model.stage2[2] = nn.Identity()
    shake(model)
    zls.attach(model, **{**NAMES, "feature": "stage2.1"}, example=X)
    seen = {}
    model.stage2.register_forward_hook(lambda m, a, out: seen.update(x=out.clone()))
    votes = model(X)[1]
    assert_best(votes, dense_scores(getattr(F, act.__name__.lower())(seen["x"]), model.fc))


def test_attach_vote_leaves_the_map_alone():
    """An in-place head on positions must not write into the map, which backward needs."""

    class MeanFirst(Tiny):
        def forward(self, x):
            return self.fc(self.head(self.stage2(self.stage1(self.stem(x))).mean((2, 3))))

    x = X.to(memory_format=torch.channels_last)  # positions are then a view of the map
    model = MeanFirst(nn.SiLU(inplace=True)).to(memory_format=torch.channels_last)
    shake(model)
    handle = zls.attach(model, **NAMES, example=x)
    assert handle.plan.head
    F.cross_entropy(model(x)[0], torch.arange(4)).backward()
    grads = [p.grad.clone() for p in model.parameters()]
    handle.remove()
    model.zero_grad()
    F.cross_entropy(model(x), torch.arange(4)).backward()
    assert all(torch.equal(g, p.grad) for g, p in zip(grads, model.parameters(), strict=True))


def test_attach_votes_carry_no_gradient():
    model, handle = tiny(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(16))
    logits, votes = model(X)
    assert not votes.requires_grad
    F.cross_entropy(logits, torch.arange(4)).backward()
    got = [p.grad for p in model.parameters()]
    handle.remove()
    model.zero_grad()
    F.cross_entropy(model(X), torch.arange(4)).backward()
    for g, p in zip(got, model.parameters(), strict=True):
        assert torch.equal(g, p.grad)


class Tokens(nn.Module):
    """Tokens (N, T, D) with a prefix, and no attribute that tells."""

    def __init__(self, pool, prefix):
        super().__init__()
        self.embed, self.norm, self.fc = nn.Linear(5, 16), nn.LayerNorm(16), nn.Linear(16, CLASSES)
        self.extra = nn.Parameter(torch.randn(prefix, 16))
        self.pool, self.prefix = pool, prefix

    def forward(self, x, *, scale=1.0):
        x = torch.cat([self.extra.expand(len(x), -1, -1), self.embed(x)], 1)
        x = self.norm(x + x.mean(1, keepdim=True)) * scale
        return self.fc(x[:, 0] if self.pool == "token" else x[:, self.prefix :].mean(1))


@pytest.mark.parametrize(
    "pool, prefix, kind",
    [
        ("token", 1, CLASS_TOKEN),
        ("mean", 0, GLOBAL_POOLING),
        ("mean", 1, GLOBAL_POOLING),
        ("mean", 3, GLOBAL_POOLING),
    ],
)
def test_attach_prefix_tokens_do_not_vote(pool, prefix, kind):
    model = Tokens(pool, prefix)
    x = torch.randn(4, 9, 5)
    handle = zls.attach(model, **{**NAMES, "feature": "norm"}, example=x)
    seen = maps_of(model, "norm")
    votes = model(x)[1]
    assert handle.plan.kind == kind
    assert votes.shape == (4, 9)
    assert_best(votes, model.fc(seen["norm"][:, prefix:]))


def test_attach_example_as_tuple_or_dict():
    x = torch.randn(4, 9, 5)
    for example in ((x,), {"x": x, "scale": 1.0}):
        model = Tokens("mean", 0)
        zls.attach(model, **{**NAMES, "feature": "norm"}, example=example)
        assert model(x, scale=1.0)[1].shape == (4, 9)


@pytest.mark.parametrize("upsample", [1, 2])
@pytest.mark.parametrize("out", [nn.Identity(), nn.LayerNorm(16)])
def test_attach_channels_last_layout(out, upsample):
    class Last(Tiny):
        def forward(self, x):
            x = self.tail(self.stage2(self.stage1(self.stem(x))).permute(0, 2, 3, 1))
            return self.fc(self.head(x.mean((1, 2))))

    model = Last(out)
    model.tail = nn.LayerNorm(16)
    shake(model)
    handle = zls.attach(model, **{**NAMES, "feature": "tail"}, example=X, upsample=upsample)
    seen = maps_of(model, "tail")
    votes = model(X)[1]
    assert handle.plan.layout == "NHWD"
    rows = seen["tail"].permute(0, 3, 1, 2)
    if upsample == 2:
        rows = F.interpolate(rows, scale_factor=2, mode="bilinear", align_corners=False)
    assert_best(votes, model.fc(out(rows.flatten(2).transpose(1, 2))))


def test_attach_sequential():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                          nn.Linear(8, CLASSES))  # fmt: skip
    handle = zls.attach(model, feature="0", classifier="4", example=X, returns="tuple")
    seen = maps_of(model, "1")
    assert handle.plan.kind == GLOBAL_POOLING
    assert_best(model(X)[1], dense_scores(seen["1"], model[4]))


def test_attach_timm_protocol_with_dropout_on_the_map():
    class Protocol(Tiny):
        def forward_features(self, x):
            return self.drop(self.stage2(self.stage1(self.stem(x))))

        def get_classifier(self):
            return self.fc

        def forward(self, x):
            return self.fc(self.head(self.forward_features(x)))

    model = Protocol()
    model.drop = nn.Dropout(0.9)
    handle = zls.attach(model, example=X, returns="tuple")
    assert handle.plan.feature == "stage2"
    seen = maps_of(model, "stage2")
    assert_best(model(X)[1], dense_scores(seen["stage2"], model.fc))


def test_attach_classifier_of_another_dtype():
    class Mixed(Tiny):
        def forward(self, x):
            return self.fc(self.head(self.stage2(self.stage1(self.stem(x)))).float())

    model = Mixed().bfloat16()
    model.fc.float()
    zls.attach(model, **NAMES, deep=("stage1",), example=X.bfloat16())
    seen = maps_of(model, "stage2")
    _, votes, deep_logits = model(X.bfloat16())
    assert_best(votes[:, :12], dense_scores(seen["stage2"].float(), model.fc))
    assert deep_logits[0].dtype == torch.float32


# Copies and undoing ---------------------------------------------------------------------------------------


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("probed", [True, False])
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved_and_loaded])
def test_attach_copies_vote_by_themselves(copied, probed):
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(16))
    model, handle = tiny(*head, example=X if probed else None)
    twin = copied(model)
    with torch.no_grad():  # the twin goes its own way
        twin.fc.weight.copy_(twin.fc.weight.roll(1, 0))
        twin.fc.bias.copy_(twin.fc.bias.roll(1, 0))
    votes, twins = model(X)[1], twin(X)[1]
    assert torch.equal((votes + 1) % CLASSES, twins)
    handle.remove()
    assert isinstance(model(X), torch.Tensor)
    assert torch.equal(twin(X)[1], twins)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(X)[1], votes)


def test_attach_ema():
    model, _ = tiny()
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    )
    for _ in range(2):
        zls.ZipfLoss()(model(X), torch.arange(4)).backward()
        torch.optim.SGD(model.parameters(), 0.1).step()
        average.update_parameters(model)
    assert len(average(X)) == 2
    average.eval()
    assert average(X).shape == (4, CLASSES)
    assert not torch.equal(average(X), model.eval()(X))


def test_attach_remove_undoes_everything():
    model = Tiny()
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    state = snapshot(model)
    mine = model.register_forward_hook(lambda m, a, out: None)
    handle = zls.attach(model, **NAMES, deep=("stage1",), example=X)
    assert "zipf_heads.0.weight" in model.state_dict()
    model(X)
    handle.remove()
    handle.remove()
    mine.remove()
    model.stem[1].load_state_dict({k[7:]: v for k, v in state.items() if k.startswith("stem.1.")})
    model.stage2[1].load_state_dict({k[9:]: v for k, v in state.items() if k.startswith("stage2.1.")})
    assert_same_state(state, model)
    assert {name: set(vars(m)) for name, m in model.named_modules()} == attributes
    for module in model.modules():
        for name, value in vars(module).items():
            assert "hooks" not in name or not value, name
    zls.attach(model, **NAMES, example=X)
    assert len(model(X)) == 2


def test_attach_keeps_nothing_after_an_error():
    class Stumbles(Tiny):
        fail = False

        def forward(self, x):
            logits = super().forward(x)
            if self.fail:
                raise MemoryError
            return logits

    model = Stumbles()
    zls.attach(model, **NAMES, deep=("stage1",), example=X)
    model.fail = True
    with pytest.raises(MemoryError):
        model(X)
    model.fail = False
    assert len(copy.deepcopy(model)(X)) == 3  # a kept tensor with a gradient could not be copied


# Deep votes -----------------------------------------------------------------------------------------------


def test_attach_deep_votes():
    model, handle = tiny(deep=("stem", "stage1"), upsample=2)
    assert [h.weight.shape for h in model.zipf_heads] == [(CLASSES, 8), (CLASSES, 8)]
    assert "deep stage1 (8 channels)" in repr(handle)
    seen = maps_of(model, "stem", "stage1", "stage2")
    logits, votes, deep_logits = model(X)
    maps = [
        (seen["stage2"], model.fc),
        (seen["stem"], model.zipf_heads[0]),
        (seen["stage1"], model.zipf_heads[1]),
    ]
    scores = [
        dense_scores(F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False), head)
        for x, head in maps
    ]
    assert votes.shape == (4, 4 * (12 + 48 + 48))
    assert_best(votes, torch.cat(scores, 1))
    for got, (features, head) in zip(deep_logits, maps[1:], strict=True):
        torch.testing.assert_close(got, head(features.mean((2, 3))))
    target = torch.arange(4)
    loss = zls.ZipfLoss(deep_weight=0.3)((logits, votes, deep_logits), target)
    expected = zls.zipf_cross_entropy(logits, target, votes) + 0.3 * sum(
        F.cross_entropy(d, target) for d in deep_logits
    )
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.zipf_heads.parameters())
    stem, weight = model.stem[0].weight, model.zipf_heads[1].weight
    assert all(g.any() for g in torch.autograd.grad(model(X)[2][1].square().sum(), (stem, weight)))
    model.eval()
    assert isinstance(model(X), torch.Tensor)


def test_attach_deep_in_timm():
    create_model = timm().create_model
    x = torch.randn(2, 3, 64, 32)
    model = create_model("resnet18", num_classes=CLASSES)
    zls.attach(model, deep=("layer2", "layer3"), returns="tuple")  # feature_info knows the channels
    _, votes, deep_logits = model(x)
    assert votes.shape == (2, 2 + 8 * 4 + 4 * 2)
    assert len(deep_logits) == 2
    swin = create_model("swin_tiny_patch4_window7_224", num_classes=CLASSES, **SWIN, strict_img_size=False)
    handle = zls.attach(swin, deep=("layers.2",), example=x, returns="tuple")  # (N, H, W, D)
    assert handle.plan.deep == (("layers.2", "NHWD", 96),)
    assert swin(x)[1].shape == (2, 2 * 1 + 4 * 2)
    vit = create_model("vit_tiny_patch16_224", num_classes=CLASSES, **VIT)
    zls.attach(vit, deep=("blocks.0",), example=torch.randn(2, 3, 64, 64), returns="tuple")
    _, votes, deep_logits = vit(torch.randn(2, 3, 64, 64))
    assert votes.shape == (2, 32)  # without the class tokens


# torch.compile, checkpointing, autocast, many processes -----------------------------------------------------


def compiled(model, fullgraph=True):
    torch._dynamo.reset()
    return torch.compile(model, backend="aot_eager", fullgraph=fullgraph)


POOL_HEAD = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
NORM_HEAD = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(16), nn.Dropout(0.0))


@pytest.mark.parametrize("head, options", [((), {}), (NORM_HEAD, {"deep": ("stage1",), "upsample": 2})])
def test_attach_traces_whole(head, options):
    model, _ = tiny(*head, **options)
    if not head:
        model.head[2].p = 0.0
    state = snapshot(model)
    expected = model(X)
    model.load_state_dict(state)
    fast = compiled(model)
    out = fast(X)
    for got, want in zip(out[:2], expected[:2], strict=True):
        torch.testing.assert_close(got, want)
    loss = zls.ZipfLoss()(out, torch.arange(4))
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(m.training for m in model.modules())
    assert isinstance(fast.eval()(X), torch.Tensor)
    assert len(fast.train()(X)) == len(expected)
    assert torch.equal(fast(X[:3])[1], model(X[:3])[1])


def test_attach_probe_runs_uncompiled():
    torch._dynamo.reset()
    model, plain = Tiny(), Tiny()
    model.compile(backend="aot_eager", fullgraph=True)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    handle = zls.attach(model, **NAMES, example=X)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert handle.plan == zls.attach(plain, **NAMES, example=X).plan
    model.train()
    seen = maps_of(model, "stage2")
    assert_best(model(X)[1], dense_scores(seen["stage2"], model.fc))


def test_attach_compiled_before_the_probe():
    model, _ = tiny(example=None)
    with pytest.raises(Exception, match="give attach an example"):
        compiled(model)(X)
    fast = compiled(model, fullgraph=False)
    for _ in range(2):
        votes = fast(X)[1]
    torch._dynamo.reset()
    assert torch.equal(votes, model(X)[1])


@pytest.mark.parametrize("when", ["before", "after"])
def test_attach_activation_checkpointing(when):
    model = timm().create_model("resnet18", num_classes=CLASSES)
    plain = copy.deepcopy(model)
    x, target = torch.randn(2, 3, 64, 32), torch.arange(2)
    if when == "before":
        model.set_grad_checkpointing()
    zls.attach(model, example=x, returns="tuple")
    zls.attach(plain, example=x, returns="tuple")
    model.set_grad_checkpointing()
    loss = zls.ZipfLoss()
    out, expected = model(x), plain(x)
    assert torch.equal(out[1], expected[1])
    loss(out, target).backward()
    loss(expected, target).backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("probed", [True, False])
def test_attach_autocast(probed):
    model, handle = tiny(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(16), deep=("stage1",))
    if not probed:
        handle.remove()
        handle = zls.attach(model, **NAMES)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(X)
        votes = out[1][:, :12]
        loss = zls.ZipfLoss()(out, torch.arange(4))
    loss.backward()
    assert handle.plan.kind == PER_POSITION
    assert out[0].dtype == torch.bfloat16
    model.load_state_dict(snapshot(model))
    full = model(X)[1][:, :12]
    assert (votes == full).float().mean() > 0.8  # near ties aside


POOL_HEAD = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
CONV_HEAD = (nn.Conv2d(16, 16, 1), nn.Hardswish(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.mark.parametrize("when", ["attach", "first batch", "compiled"])
@pytest.mark.parametrize(
    "head, options, dtype",
    [
        (POOL_HEAD, {}, torch.bfloat16),
        (NORM_HEAD, {}, torch.float16),
        (CONV_HEAD, {"upsample": 2}, torch.float16),
        (CONV_HEAD, {"deep": ("stage1",)}, torch.bfloat16),
    ],
)
def test_attach_autocast_inside_the_forward(when, head, options, dtype):
    """Autocast that ends before the hooks run, as accelerate sets it up, does what autocast around does."""
    model, _ = tiny(*copy.deepcopy(head), **options)
    plain = copy.deepcopy(model)
    expected_handle = zls.attach(plain, **FOUND, **options, example=X)  # its deep heads stay
    forward = torch.autocast("cpu", dtype)(model.forward)
    model.forward = lambda x: forward(x).float()
    example = None if when == "first batch" and not options.get("deep") else X
    handle = zls.attach(model, **FOUND, **options, example=example)
    logits = (compiled(model) if when == "compiled" else model)(X)
    with torch.autocast("cpu", dtype):
        expected = plain(X)
    assert expected.dtype == dtype
    assert torch.equal(logits, expected.float())
    assert handle.plan == expected_handle.plan
    votes, deep_logits = handle.votes_of(logits)
    expected_votes, expected_deep = expected_handle.votes_of(expected)
    assert torch.equal(votes, expected_votes)
    assert len(deep_logits) == len(options.get("deep", ()))
    assert all(map(torch.equal, deep_logits, expected_deep))
    zls.ZipfLoss(votes=handle)(logits, torch.arange(4)).backward()
    zls.ZipfLoss()((expected.float(), expected_votes, expected_deep), torch.arange(4)).backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def check_training(model, plain, deep=False):
    """Votes, loss and gradients of an attached model are those of ``plain``, attached in the ordinary way."""
    for net in (model, plain):
        net.zero_grad()
        out = net(X)
        zls.ZipfLoss()(out, torch.arange(4)).backward()
    assert len(out) == 2 + deep
    assert torch.equal(model(X)[1], plain(X)[1])
    assert all(p.requires_grad and not p.is_inference() for p in model.parameters())
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


INFERENCE_HEAD = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(16))


@pytest.mark.parametrize("when", ["attach", "first batch", "between", "compiled"])
@pytest.mark.parametrize("head, options", [((), {}), (INFERENCE_HEAD, {"deep": ("stage1",), "upsample": 2})])
def test_attach_in_inference_mode(when, head, options):
    """Whatever of it ran in inference mode, the training after it is the ordinary one."""

    class Caching(nn.Conv2d):  # keeps something of its first forward
        scale = None

        def forward(self, x):
            self.scale = torch.ones(()) * 2 if self.scale is None else self.scale
            return super().forward(x) * self.scale

    model = Tiny(*head)
    model.stage1[0] = Caching(8, 8, 3, 1, 1)
    if not head:
        model.head[2].p = 0.0
    if when in ("first batch", "compiled"):
        model.stage1[0](torch.zeros(1, 8, 3, 3))  # this batch is the user's own, in inference mode
    shake(model)
    plain = copy.deepcopy(model)
    torch.manual_seed(2)
    zls.attach(plain, **NAMES, example=X, **options)
    torch.manual_seed(2)
    options = {**NAMES, **options}
    if when == "attach":
        with torch.inference_mode():
            zls.attach(model, example=X.clone(), **options)
    elif when == "first batch" and not head:
        zls.attach(model, **options)
    else:
        zls.attach(model, example=X, **options)
    run = compiled(model) if when == "compiled" else model
    if when != "attach":
        plain(X)
        with torch.inference_mode():
            assert len(run(X.clone())) == (3 if head else 2)
    check_training(run, plain, deep=bool(head))


def test_attach_a_model_made_in_inference_mode():
    """It cannot be trained, but for new classifiers, and votes all the same."""

    class Counting(Tiny):
        def forward(self, x):
            self.stem[1].num_batches_tracked += 1  # which only inference mode lets be
            return super().forward(x)

    with torch.inference_mode():
        model = Counting(*INFERENCE_HEAD)
    seen = maps_of(model, "stage2")
    handle = zls.attach(model, **NAMES, example=X)
    with torch.inference_mode():
        votes = model(X)[1]
        assert handle.plan.kind == PER_POSITION
        assert_best(votes, model.fc(model.head[2](seen["stage2"].flatten(2).mT)))


NO_VALUES = r"^attach: .*meta device or under FakeTensorMode.*to_empty.*without example"


def without_values(place):
    """A model and a batch that have shapes and no values."""
    with place:
        return Tiny(), torch.randn(4, 3, 16, 12)


@pytest.mark.parametrize("place", [lambda: torch.device("meta"), FakeTensorMode], ids=["meta", "fake"])
def test_attach_refuses_to_probe_without_values(place):
    for first_batch in (False, True):
        model, x = without_values(mode := place())
        if first_batch:
            zls.attach(model, **NAMES)
        with pytest.raises(RuntimeError, match=NO_VALUES), mode:
            model(x) if first_batch else zls.attach(model, **NAMES, example=x)
    model, x = without_values(mode)
    for net, batch in ((Tiny(), x), (model, X)):
        with pytest.raises(RuntimeError, match=NO_VALUES):
            zls.attach(net, **NAMES, example=batch)
    with pytest.raises(RuntimeError, match=NO_VALUES), mode:
        zls.attach(Tiny(), **NAMES, example=X)


def test_attach_before_the_weights_are_there():
    with torch.device("meta"):
        model = Tiny()
    handle = zls.attach(model, **NAMES)
    model.to_empty(device="cpu")
    weights = Tiny().state_dict()
    model.load_state_dict(weights)
    seen = maps_of(model, "stage2")
    assert_best(model(X)[1], dense_scores(seen["stage2"], model.fc))
    assert handle.plan.kind == GLOBAL_POOLING
    shapes = [t.shape for t in model(X)]
    assert [t.shape for t in model.to("meta")(X.to("meta"))] == shapes  # once probed it runs anywhere


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_attach_dtypes(dtype):
    model = Tiny().to(dtype)
    zls.attach(model, **NAMES, deep=("stage1",), example=X.to(dtype))
    logits, votes, deep_logits = model(X.to(dtype))
    assert votes.dtype == torch.int32
    assert deep_logits[0].dtype == logits.dtype == dtype


def test_attach_trains_under_ddp():
    with one_process():
        check_training_under_ddp()


def check_training_under_ddp():
    model, _ = tiny(deep=("stage1",))
    parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=False)
    optimizer = torch.optim.SGD(parallel.parameters(), 0.1)
    loss, target, losses = zls.ZipfLoss(zipf_weight=0.1), torch.arange(4), []
    for _ in range(6):
        value = loss(parallel(X), target)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert all(p.grad is not None for p in model.parameters())
    assert losses[-1] < losses[0]
    with pytest.raises(TypeError, match="attach first"):
        zls.attach(parallel, **NAMES, example=X)


def fsdp2_process(rank, processes, file):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=processes)
    for when in ("before", "after", "unprobed"):
        torch.manual_seed(0)
        options = {"returns": "tuple" if when == "unprobed" else "logits"}
        model, handle = tiny(*NORM_HEAD, deep=("stage1",) if when == "before" else (), **options)
        twin, twins = copy.deepcopy((model, handle))
        if when != "before":
            handle.remove()
        fully_shard(model.fc)
        fully_shard(model)
        if when != "before":
            example = X if when == "after" else None
            handle = zls.attach(model, **{**NAMES, **options}, example=example)
        out, expected = model(X), twin(X)
        if when == "unprobed":
            assert torch.equal(out[1], expected[1])
            handle = twins = None
        else:
            assert torch.equal(handle.votes_of(out)[0], twins.votes_of(expected)[0]), when
        zls.ZipfLoss(votes=handle)(out, torch.arange(4)).backward()
        zls.ZipfLoss(votes=twins)(expected, torch.arange(4)).backward()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p.grad.full_tensor(), q.grad)
        assert isinstance(model.eval()(X), torch.Tensor)
    dist.destroy_process_group()


def test_attach_trains_under_fsdp2(tmp_path):
    """Head and classifier are shards (DTensor) outside of the model's forward, whichever came first."""
    spawn(fsdp2_process, (2, tmp_path / "store"), 2)


# Maps of one position -------------------------------------------------------------------------------------


ONE_POSITION = r"^attach: the map of '\w+' has one position.*larger pictures.*feature=.*deep="


def pools_early():
    model = Tiny()
    model.stage2.append(nn.AdaptiveAvgPool2d(1))
    return model


@pytest.mark.parametrize("upsample", [1, 2])
def test_attach_warns_of_one_position(upsample):
    small = X[:, :, :4, :4]  # stage2: (4, 16, 1, 1)
    for make, x in ((Tiny, small), (pools_early, X)):
        model = make()
        with pytest.warns(UserWarning, match=ONE_POSITION):
            zls.attach(model, **NAMES, example=x, upsample=upsample)
        with silence():
            model(x)
    model = Tiny()
    model.head[2].p = 0.0
    with silence():
        zls.attach(model, **NAMES, upsample=upsample)
    with pytest.warns(UserWarning, match=ONE_POSITION) as told:
        logits, votes = model(small)
    assert len(told) == 1
    assert (votes == logits.argmax(1, keepdim=True)).all()  # what the warning says
    with silence():
        model(small)


@contextlib.contextmanager
def silence():
    """Warnings are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("upsample", [1, 2])
def test_attach_warns_of_pictures_smaller_than_the_example(upsample):
    with silence():
        model, _ = tiny(upsample=upsample)
        model(X)
        model(X[:, :, :4, :8])
        deep, _ = tiny(deep=("stage1",), example=X[:, :, :4, :4])  # stage1 has four positions
        deep(X[:, :, :4, :4])
    with pytest.warns(UserWarning, match=ONE_POSITION):
        copy.deepcopy(model)(X[:, :, :4, :4])


def test_attach_warns_of_one_token():
    model = Tokens("token", 1)
    x = torch.randn(4, 1, 5)
    with pytest.warns(UserWarning, match=ONE_POSITION):
        zls.attach(model, feature="norm", classifier="fc", deep=("norm",), example=x)


# What is refused ------------------------------------------------------------------------------------------


class Scaled(Tiny):
    def forward(self, x):
        return super().forward(x).softmax(1)


class Twice(Tiny):
    def forward(self, x):
        return super().forward(x) + self.fc(self.head(self.stage2(self.stage1(self.stem(x)))))


class Functional(Tiny):
    def forward(self, x):
        x = self.head(self.stage2(self.stage1(self.stem(x))))
        return self.fc(x.tanh() * 3)


class Statistics(Tiny):
    def forward(self, x):
        x = self.stage2(self.stage1(self.stem(x)))
        return self.fc(torch.cat([x.mean((2, 3)), x.std((2, 3))], 1))


class Parts(Tiny):
    def forward(self, x):
        x = self.stage1(self.stem(x))
        for part in self.stage2:
            x = part(x)
        return self.fc(self.head(x))


class Pair(Tiny):
    def forward(self, x):
        return super().forward(x), x


class PairInTraining(Tiny):
    def forward(self, x):
        logits = super().forward(x)
        return (logits, x) if self.training else logits


class NotAffine(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def with_fc(fc):
    model = Tiny()
    model.fc = fc
    return model


REFUSED = {
    "logits changed": (Scaled, {}, "not the output of 'fc'"),
    "two calls": (Twice, {}, "'fc' runs 2 times"),
    "functional head": (Functional, {}, "does more than"),
    "no logits": (Pair, {}, "returns tuple"),
    "not affine": (lambda: with_fc(NotAffine(16, CLASSES)), {}, "more than weight @ features"),
    "convolution over positions": (Tiny, {"feature": "stage1"}, "stage2"),
    "wrong channels": (lambda: Statistics(width=32), {}, "16 channels and the classifier takes 32"),
    "no map": (Tiny, {"feature": "fc"}, "gives shape"),
    "does not run": (lambda: with_unused(Tiny()), {"feature": "unused"}, "does not run"),
    "parts run": (Parts, {}, "its parts stage2.0, stage2.1, stage2.2"),
    "deep does not run": (lambda: with_unused(Tiny()), {"deep": ("unused",)}, "does not run"),
    "deep is no map": (Tiny, {"deep": ("fc",)}, "deep='fc' gives shape"),
    "empty": (Tiny, {"example": X[:0]}, "is empty"),
    "tokens upsampled": (
        lambda: Tokens("mean", 0),
        {"feature": "norm", "upsample": 2, "example": X[:, 0, :, :5]},
        "upsample=2 needs a map",
    ),
}


def with_unused(model):
    model.unused = nn.Conv2d(3, 8, 1)
    return model


@pytest.mark.parametrize("make, options, reason", REFUSED.values(), ids=REFUSED)
def test_attach_refuses(make, options, reason):
    model = make()
    state = set(vars(model))
    with pytest.raises(RuntimeError, match=reason) as error:
        zls.attach(model, **{**NAMES, "example": X, **options})
    assert str(error.value).startswith("attach: the positions of this")
    assert set(vars(model)) == state  # nothing left behind
    assert not model._forward_hooks
    assert model.training


def test_attach_refuses_on_the_first_batch():
    model = Scaled()
    zls.attach(model, **NAMES)
    with pytest.raises(RuntimeError, match="not the output of 'fc'"):
        model(X)
    model = PairInTraining()
    zls.attach(model, **NAMES, example=X)
    with pytest.raises(RuntimeError, match="in training mode the model returns a tuple"):
        model(X)


def test_attach_tells_a_module_that_was_replaced():
    model, handle = tiny(deep=("stage1",))
    model.stage1 = nn.Conv2d(8, 8, 1)
    assert isinstance(model.eval()(X), torch.Tensor)
    with pytest.raises(RuntimeError, match=r"'stage1' has no map to vote.*attach again"):
        model.train()(X)
    handle.remove()
    zls.attach(model, **NAMES, deep=("stage1",), example=X)
    assert len(model(X)) == 3


ARGUMENTS = {
    "model": (ValueError, {"feature": None}, "feature must name"),
    "no classifier": (ValueError, {"classifier": None}, "classifier must name"),
    "unknown": (ValueError, {"feature": "layer9"}, "feature must name a module.*'layer9'.*stem, stage1"),
    "empty name": (ValueError, {"feature": ""}, "feature must name a module"),
    "not a name": (TypeError, {"feature": 3}, "feature must be the name"),
    "not linear": (TypeError, {"classifier": "head"}, "classifier must name an nn.Linear.*Sequential"),
    "dropout": (ValueError, {"feature": "head.2"}, "feature must not be a dropout"),
    "upsample": (ValueError, {"upsample": 3}, "upsample must be 1 or 2, got 3"),
    "deep string": (TypeError, {"deep": "stage1"}, r"\('layer3',\), got 'stage1'"),
    "deep unknown": (ValueError, {"deep": ("nope",)}, "deep must name a module"),
    "deep example": (ValueError, {"deep": ("stage1",), "example": None}, "deep needs example.*'stage1'"),
    "example": (TypeError, {"example": 7}, "example must be a tensor.*int"),
}


@pytest.mark.parametrize("error, options, message", ARGUMENTS.values(), ids=ARGUMENTS)
def test_attach_arguments(error, options, message):
    model = Tiny()
    with pytest.raises(error, match=message):
        zls.attach(model, **{**NAMES, "example": X, **options})
    assert not model._forward_hooks
    assert not hasattr(model, "zipf_heads")


def test_attach_other_arguments():
    with pytest.raises(TypeError, match="model must be an nn\\.Module, got function"):
        zls.attach(tiny)
    with pytest.raises(ValueError, match="at least 2 classes"):
        zls.attach(with_fc(nn.Linear(16, 1)), **NAMES)
    with pytest.raises(TypeError, match="then wrap it in OptimizedModule"):
        zls.attach(torch.compile(Tiny(), backend="eager"), **NAMES)
    with pytest.raises(ValueError, match="returns must be 'logits' or 'tuple', got 'votes'"):
        zls.attach(Tiny(), **FOUND, returns="votes")
    model = Tiny()
    model.zipf_heads = nn.Identity()
    with pytest.raises(RuntimeError, match="zipf_heads"):
        zls.attach(model, **NAMES)


def test_attach_refuses_several_classifiers():
    """Distilled models return the mean of two; the votes of one, by hand, train them."""
    model = timm().create_model("deit_tiny_distilled_patch16_224", num_classes=CLASSES, **VIT)
    with pytest.raises(
        RuntimeError, match=r"several classifiers.*zls\.dense_vote.*criterion\(logits, target, votes"
    ):
        zls.attach(model)
    features = model.forward_features(torch.randn(2, 3, 64, 64))
    votes = zls.dense_vote(features[:, 2:], model.head.weight, model.head.bias)
    assert_best(votes, model.head(features[:, 2:]))
    loss = zls.ZipfLoss()(model.forward_head(features), torch.zeros(2, dtype=torch.long), votes)
    loss.backward()
    assert model.head_dist.weight.grad.any()


def test_attach_refuses_pooled_scores():
    """SqueezeNet pools the scores of its classifier; the votes of its map, by hand, train it."""
    model = torchvision().models.squeezenet1_1(num_classes=CLASSES)
    x = torch.randn(2, 3, 64, 64)
    with pytest.raises(
        RuntimeError, match=r"pools its scores.*zls\.dense_vote.*criterion\(logits, target, votes"
    ):
        zls.attach(model, example=x)
    features, conv = model.features(x), model.classifier[1]
    votes = zls.dense_vote(features, conv.weight.flatten(1), conv.bias)
    assert_best(votes, conv(features).flatten(2).transpose(1, 2))
    loss = zls.ZipfLoss()(model.classifier(features).flatten(1), torch.zeros(2, dtype=torch.long), votes)
    loss.backward()
    assert conv.weight.grad.any()


@pytest.mark.parametrize("options", [{"kernel_size": 3, "padding": 1}, {"groups": 2}, {"stride": 2}], ids=str)
def test_attach_refuses_convolutions_of_other_kinds(options):
    conv = nn.Conv2d(16, CLASSES + CLASSES % 2, **{"kernel_size": 1, **options})
    with pytest.raises(TypeError, match=r"nn\.Conv2d of kernel 1, stride 1 and one group.*Conv2d"):
        zls.attach(with_fc(conv), **NAMES)


# The support table ----------------------------------------------------------------------------------------


def support_table() -> str:
    """Markdown: for each architecture, what the probe decides."""
    shapes = {"NDHW": "(N, D, H, W)", "NHWD": "(N, H, W, D)", "NTD": "(N, T, D)"}
    lines = ["| model | map | a position goes through | how it votes |", "| --- | --- | --- | --- |"]
    for arch in ARCHS:
        plan = zls.attach(arch.make(), example=torch.randn(2, 3, *arch.size)).plan
        through = ", ".join(f"`{name}`" for name in (*(name for name, _ in plan.head), plan.classifier))
        prefix = f", {plan.prefix} prefix token{'s' * (plan.prefix > 1)} left out" if plan.prefix else ""
        options = "".join(f", {k}={v!r}" for k, v in arch.options.items() if k in SHOWN_OPTIONS)
        model = f"{arch.library} {arch.name}{options}"
        lines.append(
            f"| {model} | `{plan.feature}` {shapes[plan.layout]} | {through} | {plan.kind}{prefix} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(support_table())
