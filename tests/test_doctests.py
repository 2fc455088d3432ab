"""Every public name has an example in its docstring, and the examples say what happens."""

from __future__ import annotations

import doctest

import pytest
import torch

import zipfls_cuda as zls

NAMES = [name for name in zls.__all__ if not name.startswith("__")]


@pytest.mark.parametrize("name", NAMES)
def test_example(name):
    item = getattr(zls, name)
    found = doctest.DocTestFinder(recurse=False).find(item, name, globs={"zls": zls, "torch": torch})
    examples = [test for test in found if test.examples]
    assert examples, f"zls.{name} has no example"
    assert "Example:" in item.__doc__
    torch.manual_seed(0)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    for test in examples:
        assert runner.run(test).failed == 0, f"the example of zls.{name} says something else"
