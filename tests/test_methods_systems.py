"""RecursiveMix, InstanceMemory, DynamicMLP: the authors' outputs, corners, state, errors."""

from __future__ import annotations

import copy
import io
import math

import golden_methods
import pytest
import torch
import torch.nn.functional as F
import torchvision_stub
from golden_methods import ARRAYS, META

from zipfls_cuda import methods, ops

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


def saved(module):
    """Its state_dict through a file."""
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# RecursiveMix ---------------------------------------------------------------------------------------------


def smooth(target, C, smoothing, like):
    """One-hot, with the smoothing spread over the other classes."""
    label = like.new_full((len(target), C), smoothing / (C - 1))
    return label.scatter_(1, target[:, None], 1 - smoothing)


def mixer(box, **options):
    """A RecursiveMix that always draws this box."""
    mix = methods.RecursiveMix(**options)
    mix.draw = lambda H, W: box
    return mix


@DTYPES
def test_recursive_mix_golden(backend, device, dtype):
    """The second batch of a training; the authors' box is given, as no other generator draws theirs."""
    if reason := ops.refusal(backend, "distill_fwd", device.type, dtype):
        pytest.skip(f"{backend}: {reason}")
    for golden in golden_methods.cases("rm_step"):
        a, p = golden.inputs(dtype, device), golden.meta["params"]
        lam, box = (ARRAYS[f"{golden.meta['id']}/{name}"] for name in ("lam", "box"))
        N, C = a["logits"].shape
        mix = mixer(tuple(map(int, box)), alpha=p["aug_alpha"], omega=p["aug_omega"], backend=backend)
        images = torch.zeros(2, N, 3, p["size"], p["size"], device=device, dtype=dtype)
        past, own = (smooth(y, C, p["smoothing"], a["logits"]) for y in (a["past_target"], a["target"]))
        mix(images[0], past)
        assert mix.consistency(a["roi_logits"], a["past_logits"]) == 0
        _, soft, _ = mix(images[1], own)
        torch.testing.assert_close(1 - mix.share, float(lam), rtol=0, atol=1e-12)
        x, roi = a["logits"].requires_grad_(), a["roi_logits"].requires_grad_()
        loss = F.cross_entropy(x, soft) + mix.consistency(roi, x)
        loss.backward()
        golden.check("loss", loss)
        golden.check("grad", x.grad)
        golden.check("grad_roi_logits", roi.grad)


def test_the_box_shows_the_batch_before():
    """Shrunk whole by nearest neighbours, its labels mixed along, and the batch before that inside of it."""
    mix = mixer((2, 1, 6, 5), num_classes=3)
    batches = [torch.full((2, 1, 8, 8), float(k)) for k in range(3)]
    targets = [torch.tensor([k, 2 - k]) for k in range(3)]
    images, labels, box = mix(batches[0], targets[0])
    assert torch.equal(images, batches[0])
    assert box == (0, 0, 8, 8)
    expected, past = F.one_hot(targets[0], 3).float(), images
    for k in (1, 2):
        images, labels, box = mix(batches[k], targets[k])
        assert box == (2, 1, 6, 5)
        assert torch.equal(images[:, :, 1:5, 2:6], past[:, :, ::2, ::2])
        outside = torch.ones(8, 8, dtype=torch.bool)
        outside[1:5, 2:6] = False
        assert (images[:, :, outside] == k).all()
        expected = 0.75 * F.one_hot(targets[k], 3) + 0.25 * expected
        torch.testing.assert_close(labels, expected)
        past = images.clone()
    assert set(images.unique().tolist()) == {0.0, 1.0, 2.0}
    assert (batches[2] == 2).all(), "the loader's batch is left alone"


@pytest.mark.parametrize("box", [(3, 3, 3, 7), (2, 5, 6, 5), (4, 4, 4, 4)])
def test_an_empty_side_mixes_nothing(box):
    mix, x = mixer(box, num_classes=3), torch.randn(2, 3, 8, 8)
    mix(torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]))
    logits, roi = (torch.randn(2, 3, requires_grad=True) for _ in range(2))
    mix.consistency(roi, logits)
    images, labels, got = mix(x, torch.tensor([1, 2]))
    assert got == box
    assert torch.equal(images, x)
    assert torch.equal(labels, F.one_hot(torch.tensor([1, 2]), 3).float())
    maps = torch.randn(2, 5, 4, 4, requires_grad=True)
    assert mix.pool(maps, box).isfinite().all()
    term = mix.consistency(roi, logits)
    assert term == 0
    term.backward()
    assert (roi.grad == 0).all(), "in the graph, with a gradient of zero"


def test_shorter_and_longer_batches():
    """Rows go with the rows of the batch before, which come again from the first where it is shorter."""
    mix = mixer((0, 0, 4, 4), num_classes=9)
    sizes, past = (4, 3, 7), None
    for N in sizes:
        x, y = torch.randn(N, 1, 4, 4), torch.arange(N)
        images, labels, _ = mix(x, y)
        logits, roi = torch.randn(N, 9), torch.randn(N, 9)
        term = mix.consistency(roi, logits)
        if past is not None:
            rows = torch.arange(N) % len(past[0])
            assert torch.equal(images, past[0][rows]), "the box is the whole image"
            assert torch.equal(labels, past[1][rows])
            soft = -(past[2].softmax(1)[rows] * roi.log_softmax(1)).sum(1).mean()
            torch.testing.assert_close(term, 0.5 * soft)
        past = images, labels, logits


def test_gradients_to_the_images():
    mix = mixer((0, 0, 4, 2), num_classes=3)
    mix(torch.randn(2, 1, 4, 4), torch.tensor([0, 1]))
    x = torch.randn(2, 1, 4, 4, requires_grad=True)
    images, *_ = mix(x, torch.tensor([0, 1]))
    images.sum().backward()
    assert (x.grad[:, :, 2:] == 1).all()
    assert (x.grad[:, :, :2] == 0).all()
    assert not mix.images.requires_grad


def test_boxes_follow_the_law_and_the_generator():
    mix = methods.RecursiveMix(0.4)
    torch.manual_seed(0)
    boxes = [mix.draw(40, 60) for _ in range(3000)]
    torch.manual_seed(0)
    assert boxes[:5] == [mix.draw(40, 60) for _ in range(5)]
    for x0, y0, x1, y1 in boxes:
        assert 0 <= x0 <= x1 <= 60
        assert 0 <= y0 <= y1 <= 40
        assert (x1 - x0) * (y1 - y0) <= 0.4 * 40 * 60
    inside = [b for b in boxes if b[0] > 0 and b[2] < 60 and b[1] > 0 and b[3] < 40]
    assert max((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in inside) > 0.15 * 40 * 60
    centres = torch.tensor([[(b[0] + b[2]) / 120, (b[1] + b[3]) / 80] for b in boxes]).mean(0)
    torch.testing.assert_close(centres, torch.tensor([0.5, 0.5]), rtol=0, atol=0.02)


BOXES = (  # image, map, box
    ((32, 32), (4, 4), (3, 5, 20, 31)),
    ((32, 48), (8, 6), (0, 0, 48, 32)),
    ((64, 64), (2, 2), (60, 1, 64, 3)),
    ((16, 16), (16, 16), (2, 3, 9, 4)),
)


def pooled(maps, size, box):
    mix = methods.RecursiveMix()
    mix(torch.zeros(len(maps), 3, *size), torch.zeros(len(maps), 5))
    return mix.pool(maps, box)


@pytest.mark.parametrize("size, shape, box", BOXES)
def test_pool_is_the_mean_of_samples(size, shape, box):
    """Bilinear samples in the middle of equal parts of the box, each at most one position of the map long."""
    maps = torch.randn(2, 3, *shape)
    sides = []
    for low, high, pixels, positions in (
        (box[1], box[3], size[0], shape[0]),
        (box[0], box[2], size[1], shape[1]),
    ):
        low, high = low / pixels, high / pixels
        count = math.ceil((high - low) * positions)
        sides.append(2 * (low + (high - low) * (torch.arange(count) + 0.5) / count) - 1)
    y, x = torch.meshgrid(*sides, indexing="ij")
    grid = torch.stack([x, y], -1).expand(2, -1, -1, -1)
    expected = F.grid_sample(maps, grid, padding_mode="border", align_corners=False).mean((2, 3))
    torch.testing.assert_close(pooled(maps, size, box), expected)


@pytest.mark.slow  # torchvision is slow to import
def test_pool_is_roi_align():
    torchvision_stub.import_torchvision()
    from torchvision.ops import roi_align

    for size, (h, w), box in BOXES:
        maps = torch.randn(2, 3, h, w)
        x0, y0, x1, y1 = box
        scaled = torch.tensor([[x0 * w / size[1], y0 * h / size[0], x1 * w / size[1], y1 * h / size[0]]])
        expected = roi_align(maps, [scaled] * 2, (1, 1), 1.0, -1, aligned=True).flatten(1)
        torch.testing.assert_close(pooled(maps, size, box), expected)


def test_recursive_mix_resumes_exactly():
    torch.manual_seed(0)
    mix, again = methods.RecursiveMix(num_classes=3), methods.RecursiveMix(num_classes=3)
    again.load_state_dict(saved(mix))
    for step in range(6):
        x, y = torch.randn(2, 3, 8, 8), torch.randint(3, (2,))
        logits, roi = torch.randn(2, 3), torch.randn(2, 3)
        outcomes = []
        if step == 3:
            again = methods.RecursiveMix(num_classes=3)
            again.load_state_dict(saved(mix))
        state = torch.get_rng_state()
        for one in (mix, again):
            torch.set_rng_state(state)
            outcomes.append((*one(x, y), one.consistency(roi, logits)))
        for a, b in zip(*outcomes, strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_recursive_mix_in_eval_mode_and_soft_targets():
    mix, x = methods.RecursiveMix().eval(), torch.randn(2, 3, 8, 8)
    soft = torch.tensor([[0.2, 0.8], [1.0, 0.0]])
    for _ in range(2):
        images, labels, box = mix(x, soft)
        assert images is x
        assert torch.equal(labels, soft)
        assert box == (0, 0, 8, 8)
    assert mix.images is None
    copy.deepcopy(mix.train())(x, soft)


def test_bad_mixing_is_named():
    mix, x, y, z = (
        methods.RecursiveMix(num_classes=3),
        torch.randn(2, 3, 8, 8),
        torch.tensor([0, 1]),
        torch.zeros(2, 3),
    )
    with pytest.raises(RuntimeError, match=r"consistency is of a batch that was mixed: call mix\(images"):
        mix.consistency(z, z)
    with pytest.raises(RuntimeError, match="pool needs the size of the images"):
        mix.pool(x, (0, 0, 8, 8))
    for given, error, message in (
        ((x[0], y), ValueError, r"images must have shape \(N, channels, H, W\), not empty, got \(3, 8, 8\)"),
        ((x[:0], y[:0]), ValueError, "images must have shape"),
        ((x.long(), y), TypeError, "images must be float32"),
        ((x, y[:1]), ValueError, "target must have shape"),
        ((x, z[:1]), ValueError, "target must have shape"),
        ((x, y.float()), TypeError, "target must be int64"),
    ):
        with pytest.raises(error, match=message):
            mix(*given)
    with pytest.raises(ValueError, match="num_classes must be given to RecursiveMix"):
        methods.RecursiveMix()(x, y)
    mix(x, y)
    with pytest.raises(ValueError, match="images must have 3 channels as the batch before, got 1"):
        mix(x[:, :1], y)
    with pytest.raises(ValueError, match="target must have 3 classes as the batch before, got 5"):
        mix(x, torch.zeros(2, 5))
    with pytest.raises(ValueError, match="logits must have a row for each of the 2 images, got 1"):
        mix.consistency(z[:1], z[:1])
    with pytest.raises(ValueError, match="roi_logits must have the shape of logits"):
        mix.consistency(z[:1], z)
    mix.draw = lambda H, W: (0, 0, 4, 4)
    mix(x, y)
    with pytest.raises(RuntimeError, match="the logits of the batch before are not known"):
        mix.consistency(z, z)
    for name, value in (("alpha", 1.5), ("alpha", -0.1), ("omega", math.nan), ("num_classes", 1)):
        with pytest.raises(ValueError, match=f"{name} must be"):
            methods.RecursiveMix(**{name: value})


# InstanceMemory -------------------------------------------------------------------------------------------


def store(a, p, prefix, dtype):
    """The module with the authors' settings and stores."""
    M, dim = a["memory1"].shape
    memory = methods.InstanceMemory(M, dim, temperature=p[f"{prefix}_t"], momentum=p[f"{prefix}_m"]).to(dtype)
    memory.memory.copy_(a["memory1"])
    memory.frozen_memory.copy_(a["memory2"])
    return memory


def leaf(x):
    return x.clone().requires_grad_()


@DTYPES
def test_instance_loss_golden(dtype):
    for golden in golden_methods.cases("ctc_ias"):
        a, p = golden.inputs(dtype, torch.device("cpu")), golden.meta["params"]
        memory, f, w = store(a, p, "instance", dtype), leaf(a["features"]), leaf(a["embed_weight"])
        e = F.normalize(F.linear(f, w, a["embed_bias"]))
        loss = memory.instance_loss(e, a["index"])
        loss.backward()
        golden.check("loss", loss)
        golden.check("grad_features", f.grad)
        if dtype == torch.float64:  # of float32 the authors' error is not on record
            golden.check("grad_embed_weight", w.grad)
            golden.check("new_memory", memory.memory)
            golden.check("scores", e @ a["memory1"].T / p["instance_t"])
        assert torch.equal(memory.frozen_memory, a["memory2"])


@DTYPES
def test_contrast_loss_golden(dtype):
    for golden in golden_methods.cases("ctc_ips"):
        a, p = golden.inputs(dtype, torch.device("cpu")), golden.meta["params"]
        memory = store(a, p, "nce", dtype)
        f, w, w2 = leaf(a["features"]), leaf(a["embed_weight"]), leaf(a["embed_weight2"])
        e = F.normalize(F.linear(f, w, a["embed_bias"]))
        e_frozen = F.normalize(F.linear(a["features2"], w2, a["embed_bias2"]))
        loss = memory.contrast_loss(e, e_frozen, a["index"], sampled=a["sampled"])
        loss.backward()
        golden.check("loss", loss)
        golden.check("grad_features", f.grad)
        if dtype == torch.float64:
            golden.check("grad_embed_weight", w.grad)
            golden.check("grad_embed_weight2", w2.grad)
            golden.check("Z", memory.normalizer)
            golden.check("new_memory1", memory.memory)
            golden.check("new_memory2", memory.frozen_memory)


def embeddings(N=4, dim=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(N, dim, generator=g))


def small(M=12, dim=6, **options):
    torch.manual_seed(1)
    return methods.InstanceMemory(M, dim, **{"temperature": 0.1, "momentum": 0.9, "negatives": 5, **options})


def test_losses_have_the_gradient_of_plain_autograd():
    """Of the store as it was before the batch, also when backward comes after two forwards."""
    memory, index = small(), torch.tensor([3, 1, 7, 11])
    xs, expected, losses = [], [], []
    for seed in (0, 1):
        before = memory.memory.clone()
        x = leaf(embeddings(seed=seed))
        losses.append(memory.instance_loss(x, index))
        plain = leaf(x.detach())
        F.cross_entropy(plain @ before.T / 0.1, index).backward()
        xs.append(x)
        expected.append(plain.grad)
    (2 * losses[0] + losses[1]).backward()
    torch.testing.assert_close(xs[0].grad, 2 * expected[0])
    torch.testing.assert_close(xs[1].grad, expected[1])


def test_normalizer_is_of_the_first_batch_and_stays():
    memory, index = small(), torch.arange(4)
    memory.eval().contrast_loss(embeddings(seed=7), embeddings(seed=8), index)
    assert (memory.normalizer == -1).all(), "validation before the first batch"
    memory.train()
    first = (embeddings() @ memory.frozen_memory.T / 0.1).exp()
    sampled = memory.draw(index)
    memory.contrast_loss(embeddings(), embeddings(seed=1), index, sampled=sampled)
    Z = memory.normalizer.clone()
    torch.testing.assert_close(Z[0], 12 * first.gather(1, sampled).mean())
    memory.contrast_loss(embeddings(seed=2), embeddings(seed=3), index)
    assert torch.equal(memory.normalizer, Z)


def test_negatives_are_of_other_classes():
    targets = torch.tensor([2, 0, 2, 1, 0, 2, 1, 2, 2, 0, 1, 2])
    memory = small(targets=targets, negatives=4000)
    index = torch.tensor([0, 1, 3, 11])
    sampled = memory.draw(index)
    assert torch.equal(sampled[:, 0], index)
    for i, row in zip(index, sampled[:, 1:], strict=True):
        others = set((targets != targets[i]).nonzero()[:, 0].tolist())
        assert set(row.tolist()) == others
        counts = row.bincount(minlength=12)[sorted(others)] / len(row) * len(others)
        assert (counts - 1).abs().max() < 0.2, "each as likely"
    plain = small(negatives=500).draw(torch.tensor([5]))[0, 1:]
    assert set(plain.tolist()) == set(range(12)) - {5}, "without classes: any other sample"


def test_the_store_moves_in_training_alone():
    memory, e, index = small(), embeddings(), torch.tensor([3, 1, 7, 11])
    before = memory.memory.clone()
    memory.eval().instance_loss(e, index)
    assert torch.equal(memory.memory, before)
    memory.train().instance_loss(e, index)
    expected = before.clone()
    expected[index] = F.normalize(0.9 * before[index] + 0.1 * e)
    torch.testing.assert_close(memory.memory, expected)


def test_of_an_index_twice_the_last_counts():
    memory, e = small(), embeddings()
    before = memory.memory.clone()
    memory.instance_loss(e, torch.tensor([3, 1, 3, 3]))
    torch.testing.assert_close(memory.memory[3], F.normalize(0.9 * before[3] + 0.1 * e[3], dim=0))


def test_instance_memory_resumes_exactly():
    memory = small(targets=torch.arange(12) % 3)
    for k in range(3):
        memory.contrast_loss(embeddings(seed=k), embeddings(seed=k + 9), torch.arange(4) + k)
    torch.manual_seed(5)
    again = methods.InstanceMemory(
        12, 6, temperature=0.1, momentum=0.9, negatives=5, targets=torch.arange(12) % 3
    )
    again.load_state_dict(saved(memory))
    for k in range(3):
        outcomes = []
        for one in (memory, again):
            torch.manual_seed(k)
            e, f = embeddings(seed=k), embeddings(seed=k + 5)
            outcomes += [one.contrast_loss(e, f, torch.arange(4)), one.instance_loss(e, torch.arange(4) + k)]
        assert torch.equal(outcomes[0], outcomes[2])
        assert torch.equal(outcomes[1], outcomes[3])
    fresh = small()
    fresh.load_state_dict(small().state_dict())
    assert not fresh.has_normalizer


def test_an_index_outside_on_another_device_gives_nan(monkeypatch):
    """As on a GPU, where nobody looks at the values: shown here with the look on the CPU taken away."""
    monkeypatch.setattr(methods.memory.checks, "sample_index", lambda index, M: None)
    memory, x, index = small(), leaf(embeddings()), torch.tensor([3, 99, -1, 7])
    before = memory.memory.clone()
    loss = memory.instance_loss(x, index)
    loss.backward()
    assert loss.isnan()
    assert x.grad[[0, 3]].isfinite().all()
    assert x.grad[[1, 2]].isnan().all()
    assert torch.equal(memory.memory[[0, 11]], before[[0, 11]]), "where they were clamped to"
    assert not torch.equal(memory.memory[3], before[3])
    assert memory.memory.isfinite().all()


def test_autocast_leaves_the_scores_in_float32():
    e, index = embeddings(), torch.arange(4)
    expected = small().instance_loss(e, index)
    with torch.autocast("cpu", torch.bfloat16):
        assert small().instance_loss(e, index) == expected
        low = small().instance_loss(e.bfloat16(), index)
    assert low.dtype == torch.float32


def test_a_second_derivative_is_refused():
    memory, x = small(), leaf(embeddings())
    with pytest.raises(RuntimeError, match="InstanceMemory cannot be differentiated a second time"):
        torch.autograd.grad(memory.instance_loss(x, torch.arange(4)), x, create_graph=True)


def test_bad_memory_is_named():
    memory, e, index = small(), embeddings(), torch.arange(4)
    for given, error, message in (
        ((e, torch.tensor([0, 12, 1, 2])), IndexError, r"index\[1\] = 12 is outside \[0, 12\)"),
        ((e, torch.tensor([0, 1, -1, 2])), IndexError, r"index\[2\] = -1 is outside"),
        ((e, index.int()), TypeError, "index must be int64, got torch.int32"),
        ((e, index[:, None]), ValueError, r"index must have shape \(N,\)"),
        ((e, [0, 1]), TypeError, "index must be a torch.Tensor, got list"),
        ((e[:3], index), ValueError, r"e must have shape \(N, D\) with N = 4 as index, got \(3, 6\)"),
        ((e[:, :5], index), ValueError, r"e must have shape \(N, 6\), got \(4, 5\)"),
        ((e.long(), index), TypeError, "e must be float32"),
        ((e.to("meta"), index), ValueError, "e must be on the device of index, cpu, got meta"),
        (
            (e.to("meta"), index.to("meta")),
            ValueError,
            r"e must be on the device of the store, cpu, got meta; memory.to\(device\)",
        ),
    ):
        with pytest.raises(error, match=message):
            memory.instance_loss(*given)
    with pytest.raises(ValueError, match="e_frozen must have the shape of e"):
        memory.contrast_loss(e, e[:3], index)
    for sampled, error, message in (
        (
            torch.zeros(3, 5).long(),
            ValueError,
            r"sampled must have shape \(4, K \+ 1\) and be on cpu, got \(3, 5\)",
        ),
        (torch.zeros(4, 1).long(), ValueError, r"sampled must have shape \(4, K \+ 1\)"),
        (torch.zeros(4).long(), ValueError, r"sampled must have shape \(N, K \+ 1\), got \(4,\)"),
        (torch.zeros(4, 5), TypeError, "sampled must be int64"),
        (torch.full((4, 5), 12), IndexError, r"sampled\[0, 0\] = 12 is outside \[0, 12\)"),
    ):
        with pytest.raises(error, match=message):
            memory.contrast_loss(e, e, index, sampled=sampled)
    for error, message, options in (
        (ValueError, "num_samples must be at least 2", {"M": 1}),
        (ValueError, "dim must be at least 1", {"dim": 0}),
        (ValueError, "temperature must be > 0", {"temperature": 0}),
        (ValueError, r"momentum must be in \[0, 1\]", {"momentum": 1.1}),
        (ValueError, "negatives must be at least 1", {"negatives": 0}),
        (
            ValueError,
            r"targets must have shape \(12,\) and >= 2 classes, got 2 of 2",
            {"targets": [0, 1]},
        ),
        (
            ValueError,
            r"targets must have shape \(12,\) and >= 2 classes, got 12 of 1",
            {"targets": [0] * 12},
        ),
        (TypeError, "targets must be integers", {"targets": [0.5] * 12}),
    ):
        with pytest.raises(error, match=message):
            small(**options)


# DynamicMLP -----------------------------------------------------------------------------------------------


@DTYPES
def test_dynamic_mlp_golden(dtype):
    """The authors' weights go in by the order of parameters."""
    for golden in golden_methods.cases("dynamic_mlp"):
        a, p = golden.inputs(dtype, torch.device("cpu")), golden.meta["params"]
        head = methods.DynamicMLP(
            a["features"].shape[1], a["metadata"].shape[1], d=p["d"], hidden=p["h"], blocks=p["n"],
            kind=p["type"], width=p["filters"],
        ).to(dtype).eval()  # fmt: skip
        theirs = [k for k in golden.meta["arrays"] if k.startswith("param/")]
        with torch.no_grad():
            for mine, name in zip(head.parameters(), theirs, strict=True):
                mine.copy_(torch.from_numpy(ARRAYS[f"{golden.meta['id']}/{name}"]))
        f, m = leaf(a["features"]), leaf(a["metadata"])
        output = head(f, m)
        loss = (output * a["upstream"]).sum()
        loss.backward()
        golden.check("loss", loss)
        golden.check("grad_features", f.grad)
        golden.check("grad_metadata", m.grad)
        if dtype == torch.float64:
            golden.check("output", output)


def test_sizes_of_the_authors():
    def millions(module):
        return sum(x.numel() for x in module.parameters()) / 1e6

    for kind, size in (("a", 9.5), ("b", 6.6), ("c", 6.8)):
        head = methods.DynamicMLP(2048, 6, kind=kind)
        assert abs(millions(head.location) - 0.6) < 0.05
        assert abs(millions(head) - millions(head.location) - size) < 0.05
    assert methods.DynamicMLP(8, 2, d=4, blocks=1, width=8)(torch.randn(3, 8), torch.randn(3, 2)).shape == (
        3,
        8,
    )


def test_encode_metadata_golden():
    lat, lng, ratio, encoded = (
        torch.from_numpy(ARRAYS[f"metadata/{k}"]) for k in ("latitude", "longitude", "date_ratio", "encoded")
    )
    dates = META["metadata_dates"]
    for date in (dates, [f"{d} 12:00:00" for d in dates], ratio):
        got = methods.encode_metadata(lat, lng, date)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), encoded, rtol=0, atol=6e-8)
    torch.testing.assert_close(
        methods.encode_metadata(lat.tolist(), lng.tolist(), None).double(),
        encoded[:, [0, 1, 3, 4]],
        rtol=0,
        atol=6e-8,
    )
    torch.testing.assert_close(
        methods.encode_metadata(None, None, dates).double(), encoded[:, [2, 5]], rtol=0, atol=6e-8
    )


def test_what_is_missing_is_zero():
    nan = math.nan
    got = methods.encode_metadata([1, None, 3, 4], torch.tensor([1, 2, nan, 4]), ["2020-01-01"] * 3 + [None])
    assert (got[1:] == 0).all()
    assert (got[0] != 0).all()


def test_bad_metadata_is_named():
    for given, error, message in (
        (([1.0], None, None), ValueError, "lat and lng must be given together"),
        ((None, None, None), ValueError, "lat, lng and date must not all be None"),
        (([1.0], [1.0, 2.0], None), ValueError, "lat, lng must have one length, got 1, 2"),
        (([1.0], [1.0], ["2020-13-01"]), ValueError, "date must be YYYY-MM-DD, got '2020-13-01'"),
        (([1.0], [1.0], [20200101]), TypeError, "date must hold dates or text YYYY-MM-DD, got int"),
        ((torch.ones(1, 1), [1.0], None), ValueError, r"lat must have shape \(N,\)"),
    ):
        with pytest.raises(error, match=message):
            methods.encode_metadata(*given)
    head = methods.DynamicMLP(8, 6, d=4, hidden=2, width=8)
    for given, message in (
        ((torch.zeros(2, 7), torch.zeros(2, 6)), r"features must have shape \(N, 8\), got \(2, 7\)"),
        ((torch.zeros(2, 8), torch.zeros(2, 4)), r"metadata must have shape \(N, 6\), got \(2, 4\)"),
        (
            (torch.zeros(2, 8), torch.zeros(3, 6)),
            "metadata must have a row for each of the 2 features, got 3",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            head(*given)
    for name, value in (("d", 0), ("hidden", 0), ("blocks", 0), ("kind", "d"), ("width", 0)):
        with pytest.raises(ValueError, match=f"{name} must be"):
            methods.DynamicMLP(8, 6, **{name: value})
