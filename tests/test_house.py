"""The house stays in order: who imports whom, what the docs promise, versions that agree."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

import mutants
import pytest
import torch

import zipfls_cuda as zls
from zipfls_cuda import ops

ROOT = Path(__file__).parent.parent
ARROWS = {
    "__init__": {"attach", "checks", "functional", "labels", "linear", "methods", "modules", "ops"},
    "__main__": {"", "check", "extension", "ops"},
    "check": {"", "check_rows", "expected", "ops"},
    "check_rows": {"", "expected", "functional", "ops"},
    "expected": set(),
    "attach": {"checks", "compiling", "functional"},
    "methods": {"checks", "functional", "reference"},
    "modules": {"attach", "checks", "functional", "labels"},
    "linear": {"checks", "chunked", "functional", "labels", "ops", "reference"},
    "chunked": {"autograd", "ops", "reference"},
    "functional": {"autograd", "checks", "labels", "ops", "reference", "scalars", "sharded"},
    "autograd": {"checks", "ops"},
    "sharded": {"checks", "compiling", "labels", "ops", "reference"},
    "ops": {"compiling", "extension", "reference", "triton_kernels"},
    "extension": {"_C"},
    "compiling": set(),
    "checks": {"labels", "reference", "scalars"},
    "reference": set(),
    "labels": {"scalars"},
    "scalars": set(),
    "triton_kernels": {"distill", "vote", "label", "loss", "reference"},
}


def relative_imports(path: Path) -> set[str]:
    """Names of the modules beside it that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level > 0:
            found |= {node.module.split(".")[0]} if node.module else {a.name for a in node.names}
    return found


def imports(path: Path) -> set[str]:
    """Names of the package's own modules that a file of it imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
        assert not any(n.startswith("zipfls_cuda") for n in names), f"{path}: import relatively"
    return relative_imports(path) - {"__version__"}


def test_imports_follow_the_arrows():
    package = ROOT / "zipfls_cuda"
    for path in package.glob("*.py"):
        extra = imports(path) - ARROWS[path.stem]
        assert not extra, f"{path.name} must not import {extra}"
    for folder in ("attach", "methods", "triton_kernels"):
        for path in (package / folder).glob("*.py"):
            extra = imports(path) - ARROWS[folder] - {"", *(p.stem for p in path.parent.glob("*.py"))}
            assert not extra, f"{folder}/{path.name} must not import {extra}"


def test_nothing_imports_what_stands_above_it():
    """The package imports no experiments, benchmarks or tests; experiments and benchmarks import no tests."""
    tests = {p.stem for p in (ROOT / "tests").glob("*.py")} - {"conftest"}
    above = {"experiments", "examples", "benchmarks", "tests"}
    for folder, names in ("zipfls_cuda", above | tests), ("experiments", tests), ("benchmarks", tests):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and not node.level:
                    found = {node.module}
                elif isinstance(node, ast.Import):
                    found = {alias.name for alias in node.names}
                else:
                    continue
                assert not {name.split(".")[0] for name in found} & names, path


EXPERIMENTS = {
    "__init__": set(),
    "common": set(),
    "cache": {"common"},
    "fractals": {"cache"},
    "fonts": {"cache", "common"},
    "data": {"common", "fonts", "fractals"},
    "model": {"common"},
    "methods": {"common", "data", "model"},
    "probe": {"data"},
    "trainer": {"common", "data", "methods", "model", "probe"},
    "plots": {"common", "methods", "model", "study", "trainer"},
    "run": {"common", "data", "methods", "model", "plots", "trainer"},
    "study": set(),
    "efficacy": {"data", "plots", "run", "study"},
}


def test_experiments_import_one_way():
    for path in (ROOT / "experiments").glob("*.py"):
        extra = relative_imports(path) - EXPERIMENTS[path.stem]
        assert not extra, f"experiments/{path.name} must not import {extra}"


def test_versions_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == zls.__version__
    assert f"## {zls.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_readme_names_what_exists():
    readme = (ROOT / "README.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`?make ([a-z-]+)", readme)):
        assert re.search(rf"^{target}:", makefile, re.M), f"README speaks of make {target}"
    for name in set(re.findall(r"zls\.([A-Za-z_]+)", readme)):
        assert hasattr(zls, name), f"README speaks of zls.{name}"


def test_pages_link_to_what_exists():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        text = page.read_text()
        for link, anchor in set(re.findall(r"\]\(([^)#:]*)(#[^)]*)?\)", text)):
            there = page.parent / link if link else page
            assert there.exists(), f"{page.name} links to {link}"
            titles = re.findall(r"^#+ (.*)", there.read_text(), re.M) if anchor else ()
            anchors = {"#" + re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert not anchor or anchor in anchors, f"{page.name} links to {link}{anchor}"


def test_ci_runs_the_readme_command():
    ci = (ROOT / ".ci" / "run").read_text().splitlines()
    assert ci.index("make test") < ci.index("make test-rest")
    assert "make test" in (ROOT / "README.md").read_text()
    assert "make demo" in (ROOT / "README.md").read_text()


def test_every_planted_fault_has_its_place():
    for mutant in mutants.MUTANTS:
        assert (ROOT / mutant.path).read_text().count(mutant.old) == 1, mutant.name
        for test in mutant.tests:
            file, _, name = test.partition("::")
            assert name.partition("[")[0] in (ROOT / file).read_text(), mutant.name


def hops(call, ends) -> int:
    """Calls from one function of the package to the next, from ``call`` down to what ``ends`` accepts.

    ``ends`` takes a code object of the package's Python, or a function written in C.
    """
    package, found = str(ROOT / "zipfls_cuda"), []

    def profile(frame, event, arg):
        inside = event == "call" and frame.f_code.co_filename.startswith(package)
        if (inside and ends(frame.f_code)) or (event == "c_call" and ends(arg)):
            chain = event == "c_call"
            while frame is not None:
                chain += frame.f_code.co_filename.startswith(package)
                frame = frame.f_back
            found.append(chain - 1)

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    assert found, "the end was not reached"
    return max(found)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("soft", [True, False])
def test_the_way_of_a_call_is_short(backend, device, grad, soft):
    """From the public function: 4 hops to the reference, 6 to a launch of Triton's, 2 to C++."""
    logits = torch.randn(4, 7, device=device, requires_grad=grad)
    target = torch.rand(4, 7, device=device) if soft else torch.zeros(4, dtype=torch.long, device=device)
    votes = torch.zeros(4, 3, dtype=torch.int32, device=device)
    ends, most = {
        "reference": (lambda f: getattr(f, "co_qualname", "") == "loss_fwd", 4),
        "triton": (lambda f: getattr(f, "co_qualname", "") == "Launch.__call__", 6),
    }.get(backend, (lambda f: f in ops.NATIVE.values(), 2))
    zls.zipf_cross_entropy(logits, target, votes, backend=backend)  # tables and plans are there
    assert hops(lambda: zls.zipf_cross_entropy(logits, target, votes, backend=backend), ends) <= most
    if backend != "triton" and not soft:
        if backend == "reference":
            ends = lambda f: getattr(f, "co_qualname", "") == "distill_fwd"  # noqa: E731
        assert hops(lambda: zls.distillation_loss(logits, logits, target, backend=backend), ends) <= most
