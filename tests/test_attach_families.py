"""attach on a small model of every family of timm that fits a test, and on torchvision's families.

Each votes as its own head says of single positions, or is refused with the reason. ``python
tests/test_attach_families.py`` (with PYTHONPATH=.) prints the table of docs/ATTACH.md.
"""

from __future__ import annotations

import copy
import warnings
from unittest import mock

import pytest
import torch
from test_attach import CLASSES, assert_best, shake, timm, torchvision

import zipfls_cuda as zls
from zipfls_cuda.attach.positions import CLASS_TOKEN, GLOBAL_POOLING, PER_POSITION

SEVERAL = "its logits come from several classifiers"
CHANGED = "the logits are not the output of"
POOLED = "the model pools its scores"
LISTED = "forward_features returns a list"
REFUSED = (SEVERAL, CHANGED, POOLED, LISTED)

# timm: model -> how it votes, or why it is refused; height and width of its pictures.
TIMM = {
    "beit_base_patch16_224": (PER_POSITION, 224),
    "halonet_h1": (GLOBAL_POOLING, 256),
    "mobileone_s1": (GLOBAL_POOLING, 224),
    "cait_xxs24_224": (CLASS_TOKEN, 224),
    "coat_tiny": (LISTED, 224),
    "convit_tiny": (CLASS_TOKEN, 224),
    "convmixer_768_32": (GLOBAL_POOLING, 224),
    "convnext_atto_rms": (PER_POSITION, 224),
    "cpubone_nano": (PER_POSITION, 224),
    "crossvit_tiny_240": (CHANGED, 240),
    "csatv2": (PER_POSITION, 512),
    "cs3darknet_focus_s": (GLOBAL_POOLING, 256),
    "cspnext_tiny": (GLOBAL_POOLING, 224),
    "davit_tiny": (PER_POSITION, 224),
    "deit_tiny_patch16_224": (CLASS_TOKEN, 224),
    "densenet121": (GLOBAL_POOLING, 224),
    "dla46x_c": (GLOBAL_POOLING, 224),
    "dpn48b": (GLOBAL_POOLING, 224),
    "edgenext_xx_small": (PER_POSITION, 256),
    "efficientformer_l1": (SEVERAL, 224),
    "efficientformerv2_s0": (SEVERAL, 224),
    "efficientnet_b0": (GLOBAL_POOLING, 224),
    "efficientvim_m1": (CHANGED, 224),
    "efficientvit_b0": (PER_POSITION, 224),
    "efficientvit_m0": (PER_POSITION, 224),
    "eva02_tiny_patch14_224": (PER_POSITION, 224),
    "fasternet_t0": (PER_POSITION, 224),
    "fastvit_t8": (GLOBAL_POOLING, 256),
    "focalnet_tiny_srf": (GLOBAL_POOLING, 224),
    "gcvit_xxtiny": (GLOBAL_POOLING, 224),
    "ghostnet_050": (PER_POSITION, 224),
    "hardcorenas_b": (PER_POSITION, 224),
    "hgnetv2_b0": (PER_POSITION, 224),
    "hiera_tiny_224": (PER_POSITION, 224),
    "hrnet_w18_small": (GLOBAL_POOLING, 224),
    "iformer_t": (PER_POSITION, 224),
    "inception_next_atto": (PER_POSITION, 224),
    "adv_inception_v3": (GLOBAL_POOLING, 299),
    "lcnetv2_small": (PER_POSITION, 224),
    "levit_128s": (SEVERAL, 224),
    "lowformer_b0": (PER_POSITION, 224),
    "test_mambaout": (PER_POSITION, 160),
    "maxvit_pico_rw_256": (GLOBAL_POOLING, 256),
    "poolformerv2_s12": (PER_POSITION, 224),
    "gmlp_ti16_224": (GLOBAL_POOLING, 224),
    "lcnet_035": (PER_POSITION, 224),
    "mobilevit_xxs": (GLOBAL_POOLING, 256),
    "mvitv2_tiny": (GLOBAL_POOLING, 224),
    "jx_nest_tiny": (GLOBAL_POOLING, 224),
    "nextvit_small": (GLOBAL_POOLING, 224),
    "nf_regnet_b0": (GLOBAL_POOLING, 192),
    "pit_ti_224": (GLOBAL_POOLING, 224),
    "pvt_v2_b0": (GLOBAL_POOLING, 224),
    "rdnet_tiny": (PER_POSITION, 224),
    "regnetx_002": (GLOBAL_POOLING, 224),
    "repghostnet_050": (PER_POSITION, 224),
    "repvit_m1": (CHANGED, 224),
    "res2next50": (GLOBAL_POOLING, 224),
    "resnest14d": (GLOBAL_POOLING, 224),
    "gluon_resnet18_v1b": (GLOBAL_POOLING, 224),
    "resnetv2_18": (GLOBAL_POOLING, 224),
    "rexnet_100": (GLOBAL_POOLING, 224),
    "selecsls42": (GLOBAL_POOLING, 224),
    "legacy_seresnet18": (GLOBAL_POOLING, 224),
    "sequencer2d_s": (GLOBAL_POOLING, 224),
    "shvit_s1": (PER_POSITION, 224),
    "skresnet18": (GLOBAL_POOLING, 224),
    "starnet_s050": (GLOBAL_POOLING, 224),
    "swiftformer_xs": (SEVERAL, 224),
    "swin_tiny_patch4_window7_224": (GLOBAL_POOLING, 224),
    "swinv2_tiny_window16_256": (GLOBAL_POOLING, 256),
    "swinv2_cr_tiny_224": (GLOBAL_POOLING, 224),
    "tiny_vit_5m_224": (PER_POSITION, 224),
    "tnt_s_legacy_patch16_224": (CLASS_TOKEN, 224),
    "tresnet_m": (GLOBAL_POOLING, 224),
    "twins_svt_small": (GLOBAL_POOLING, 224),
    "visformer_tiny": (GLOBAL_POOLING, 224),
    "vit_tiny_patch16_224": (CLASS_TOKEN, 224),
    "vit_tiny_r_s16_p8_224": (CLASS_TOKEN, 224),
    "test_vit_relpos": (PER_POSITION, 160),
    "vitamin_small_224": (PER_POSITION, 224),
    "volo_d1_224": (CHANGED, 224),
    "ese_vovnet19b_slim_dw": (GLOBAL_POOLING, 224),
    "legacy_xception": (GLOBAL_POOLING, 299),
    "xception41p": (GLOBAL_POOLING, 299),
    "xcit_nano_12_p8_224": (CLASS_TOKEN, 224),
}

# torchvision: model -> the same, and options that leave out what takes long to initialise.
TORCHVISION = {
    "alexnet": (PER_POSITION, 224, {}),
    "densenet121": (GLOBAL_POOLING, 224, {}),
    "efficientnet_b0": (GLOBAL_POOLING, 224, {}),
    "googlenet": (GLOBAL_POOLING, 224, {"init_weights": False}),
    "inception_v3": (GLOBAL_POOLING, 299, {"init_weights": False}),
    "maxvit_t": (PER_POSITION, 224, {}),
    "mnasnet0_5": (GLOBAL_POOLING, 224, {}),
    "mobilenet_v2": (GLOBAL_POOLING, 224, {}),
    "mobilenet_v3_small": (PER_POSITION, 224, {}),
    "regnet_x_400mf": (GLOBAL_POOLING, 224, {}),
    "resnet18": (GLOBAL_POOLING, 224, {}),
    "shufflenet_v2_x0_5": (GLOBAL_POOLING, 224, {}),
    "squeezenet1_1": (POOLED, 224, {}),
    "swin_t": (GLOBAL_POOLING, 224, {}),
    "swin_v2_t": (GLOBAL_POOLING, 224, {}),
    "vgg11": (PER_POSITION, 224, {"init_weights": False}),
    "vit_b_16": (CLASS_TOKEN, 224, {}),
}

TINY_VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 64,
}
TINY_CNN = {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1]}
TINY_SWIN = {"image_size": 64, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}


def normed(model, rows):
    base = getattr(model, model.base_model_prefix)
    return model.classifier(base.layernorm(rows))


# transformers: kind of model -> how it votes, options that make it small, scores of positions (M, D).
TRANSFORMERS = {
    "ConvNext": (PER_POSITION, TINY_CNN, normed),
    "ConvNextV2": (PER_POSITION, {**TINY_CNN, "image_size": 64}, normed),
    "DeiT": (CLASS_TOKEN, TINY_VIT, None),
    "MobileNetV2": (GLOBAL_POOLING, {"depth_multiplier": 0.35, "image_size": 64}, None),
    "RegNet": (GLOBAL_POOLING, {**TINY_CNN, "embedding_size": 8, "groups_width": 8}, None),
    "ResNet": (GLOBAL_POOLING, {**TINY_CNN, "embedding_size": 8, "layer_type": "basic"}, None),
    "Swin": (GLOBAL_POOLING, TINY_SWIN, None),
    "Swinv2": (GLOBAL_POOLING, TINY_SWIN, None),
    "ViT": (CLASS_TOKEN, TINY_VIT, None),
}

FAMILIES = [("timm", name) for name in TIMM] + [("torchvision", name) for name in TORCHVISION]


def make(library, name):
    """The model, an example for it, and what is expected."""
    torch.manual_seed(0)
    if library == "timm":
        model = timm().create_model(name, num_classes=CLASSES)
        expected, size = TIMM[name]
    else:
        expected, size, options = TORCHVISION[name]
        model = getattr(torchvision().models, name)(num_classes=CLASSES, **options)
    return model, torch.randn(2, 3, size, size), expected


def some_scores(model, features, chosen):
    """Scores (N, len(chosen), C): timm's forward_head on a map filled with each of the chosen positions."""
    prefix = getattr(model, "num_prefix_tokens", 0) if features.dim() == 3 else 0
    last = features.dim() == 3 or getattr(model, "output_fmt", "NCHW") == "NHWC"
    spread = features.movedim(-1, 1) if last else features  # (N, D, ...)
    rows = spread.flatten(2)[:, :, prefix:]
    scores = []
    for p in chosen:
        filled = rows[:, :, p].reshape(*rows.shape[:2], *[1] * (spread.dim() - 2)).expand_as(spread)
        scores.append(model.forward_head((filled.movedim(1, -1) if last else filled).contiguous()))
    return torch.stack(scores, 1)


@pytest.mark.slow
@pytest.mark.parametrize("library, name", FAMILIES)
@torch.no_grad()
def test_family(library, name):
    model, x, expected = make(library, name)
    shake(model)
    if expected in REFUSED:
        with pytest.raises(RuntimeError, match=rf"{expected}.*(zls\.dense_vote|feature=)"):
            zls.attach(model, example=x)
        return
    clean = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "attach: the map of .* has one position")
        handle = zls.attach(model, example=x)
    assert handle.plan.kind == expected
    features = []
    if library == "timm":
        original = type(model).forward_features

        def forward_features(self, *args, **kwargs):
            features.append(original(self, *args, **kwargs))
            return features[-1]

        spy = mock.patch.object(type(model), "forward_features", forward_features)
    else:
        spy = mock.MagicMock()
    for m in (model.train(), clean.train()):
        m.requires_grad_(False)
    torch.manual_seed(1)
    with spy, torch.enable_grad():
        output = model(x)
    torch.manual_seed(1)
    logits = output if isinstance(output, torch.Tensor) else output.logits
    wanted = clean(x)
    wanted = wanted if isinstance(wanted, torch.Tensor) else wanted.logits
    # Close, not equal: torch's LSTM takes another path where a gradient may follow.
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
    votes, _ = handle.votes_of(logits)
    assert votes.shape[0] == 2
    assert int(votes.min()) >= 0
    assert int(votes.max()) < CLASSES
    if library == "timm":
        chosen = sorted({0, votes.shape[1] // 2, votes.shape[1] - 1})
        assert_best(votes[:, chosen], some_scores(clean.eval(), features[0], chosen))


def make_transformers(name):
    torchvision()
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(num_labels=CLASSES, **TRANSFORMERS[name][1])
    return getattr(transformers, f"{name}ForImageClassification")(config)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name):
    """Outputs are objects; the votes are those of the model's own head on the map without prefix tokens."""
    expected, _, head = TRANSFORMERS[name]
    model, x = make_transformers(name), torch.randn(2, 3, 64, 64)
    shake(model)
    handle = zls.attach(model, example=x)
    assert handle.plan.kind == expected
    maps = []
    model.get_submodule(handle.plan.feature).register_forward_hook(lambda m, args, out: maps.append(out))
    output = model.train()(x)
    votes, _ = handle.votes_of(output.logits)
    features = maps[0].detach()
    rows = features.flatten(2).transpose(1, 2) if features.dim() == 4 else features[:, handle.plan.prefix :]
    assert handle.plan.prefix == {"ViT": 1, "DeiT": 2}.get(name, 0)
    with torch.no_grad():
        scores = (head or (lambda model, rows: model.classifier.eval()(rows)))(model, rows.flatten(0, 1))
    assert_best(votes, scores.unflatten(0, rows.shape[:2]))
    zls.ZipfLoss(votes=handle)(output, torch.zeros(2, dtype=torch.long)).backward()


def family_table() -> str:
    """Markdown: what each family got."""
    lines = ["| model | map | a position goes through | how it votes |", "| --- | --- | --- | --- |"]
    hugging_face = [("transformers", name) for name in TRANSFORMERS]
    for library, name in FAMILIES + hugging_face:
        if library == "transformers":
            model, x, expected = make_transformers(name), torch.randn(2, 3, 64, 64), TRANSFORMERS[name][0]
        else:
            model, x, expected = make(library, name)
        if expected in REFUSED:
            lines.append(
                f"| {library} {name} | | | refused: {expected}{' one classifier' * (expected == CHANGED)} |"
            )
            continue
        plan = zls.attach(model, example=x).plan
        through = ", ".join(f"`{n}`" for n in (*(n for n, _ in plan.head), plan.classifier))
        prefix = f", {plan.prefix} prefix token{'s' * (plan.prefix > 1)} left out" if plan.prefix else ""
        lines.append(
            f"| {library} {name} | `{plan.feature}` {plan.shape} | {through} | {plan.kind}{prefix} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(family_table())
