"""mypy on a script of a user: right code passes, and every wrong line is an error that names the mistake."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import zipfls_cuda as zls

ROOT = Path(__file__).parent.parent
SCRIPT = """
import torch
from torch import Tensor, nn

import zipfls_cuda as zls

model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
handle: zls.Handle = zls.attach(model, feature="0", classifier="3")
criterion = zls.ZipfLoss(zipf_weight=0.1, votes=handle)
x, y = torch.randn(2, 3, 8, 8), torch.tensor([1, 2])
z, w = torch.randn(2, 10), torch.randn(10, 8)
loss: Tensor = criterion(model(x), y)
a: Tensor = zls.zipf_cross_entropy(z, y, zipf_weight=0.1, distribution=zls.Zipf(2.0))
b, ce, zipf = zls.zipf_cross_entropy(z, y, return_parts=True, label_smoothing=0.1)
c: Tensor = zls.zipf_head_loss(torch.randn(2, 8, 4, 4), w, None, y, alpha=1.0)
d: tuple[Tensor, Tensor, Tensor] = zls.zipf_head_loss(torch.randn(2, 8, 4, 4), w, None, y, return_parts=True)
e: Tensor = zls.distillation_loss(z, z, y, kd_weight=0.5, temperature=4.0)
f, _, _ = zls.distillation_loss(z, z, None, return_parts=True, ce_weight=0.0)
kd: Tensor = zls.methods.KDLoss(temperature=4.0)(z, z, y)
teacher = zls.methods.SnapshotTeacher(model, every=10)
pairs = zls.methods.PairSampler(y, 128)
plan: zls.Plan | None = handle.plan
votes: Tensor = zls.dense_vote(torch.randn(2, 8, 4, 4), w)
alpha, intercept = zls.fit_zipf(torch.rand(3, 5))
detached: bool = zls.detach(model)
names: tuple[str, ...] = zls.backends()
"""
WRONG = {
    "zls.zipf_cross_entropy(z, y, zipf_wieght=0.1)": "zipf_wieght",
    "zls.zipf_head_loss(x, w, None, y, label_smothing=0.1)": "label_smothing",
    'zls.zipf_loss(z, y, reducton="sum")': "reducton",
    "zls.ZipfLoss(zipf_wieght=0.1)": "zipf_wieght",
    'zls.attach(model, fetaure="0")': "fetaure",
    "zls.dense_vote(x, w, up_sample=2)": "up_sample",
    "h: tuple[Tensor, Tensor, Tensor] = zls.zipf_cross_entropy(z, y)": "Incompatible types",
    "i: Tensor = zls.zipf_cross_entropy(z, y, return_parts=True)": "Incompatible types",
    "zls.distillation_loss(z, z, y, kd_wieght=0.1)": "kd_wieght",
    "zls.methods.DKDLoss(warmup=3)": "warmup",
    "g: tuple[Tensor, Tensor, Tensor] = zls.distillation_loss(z, z, y)": "Incompatible types",
    "zls.ZipfLoss(votes=model)": "incompatible type",
    'zls.zipf_cross_entropy(z, y, alpha="1")': "zipf_cross_entropy",
}


@pytest.mark.slow  # mypy reads torch
def test_mypy_on_a_users_script(tmp_path):
    pytest.importorskip("mypy")
    script = tmp_path / "train.py"
    script.write_text(SCRIPT + "\n".join(WRONG) + "\n")
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), str(script)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    first, found = SCRIPT.count("\n") + 1, {}
    for line, message in re.findall(r"train\.py:(\d+): error: (.*)", done.stdout):
        found.setdefault(int(line), []).append(message)
    assert not {line for line in found if line < first}, done.stdout + done.stderr
    for line, (code, message) in enumerate(WRONG.items(), first):
        assert any(message in text for text in found.get(line, [])), f"{code}\n{done.stdout}"


@pytest.mark.parametrize("name", [name for name in zls.__all__ if not name.startswith("__")])
def test_signatures_say_what_is_taken(name):
    """No *args or **options in what help() shows."""
    kinds = {p.kind for p in inspect.signature(getattr(zls, name)).parameters.values()}
    assert not kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}
