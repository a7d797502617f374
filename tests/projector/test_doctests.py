"""The examples in the projector's docstrings."""

import doctest
import importlib
import pkgutil

import pytest

import projector

MODULES = [module.name for module in pkgutil.walk_packages(projector.__path__, "projector.")]


@pytest.mark.parametrize("module", MODULES)
def test_examples(module: str) -> None:
    assert doctest.testmod(importlib.import_module(module)).failed == 0


def test_there_are_examples() -> None:
    finder = doctest.DocTestFinder()
    examples = [test for name in MODULES for test in finder.find(importlib.import_module(name)) if test.examples]
    assert len(examples) >= 3
