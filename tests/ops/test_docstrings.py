# SPDX-License-Identifier: Apache-2.0
"""Every public op has an example in its docstring, and it prints what it says."""

import doctest
import inspect
import sys

import pytest
import torch

import tenp.ops

PUBLIC_FUNCTIONS = [
    pytest.param(value, id=name)
    for name, value in ((name, getattr(tenp.ops, name)) for name in tenp.ops.__all__)
    if inspect.isfunction(value)
]


@pytest.mark.parametrize("function", PUBLIC_FUNCTIONS)
def test_the_example_prints_what_it_says(function: object) -> None:
    module = sys.modules[function.__module__]
    names = {**vars(module), "torch": torch}
    examples = doctest.DocTestFinder().find(function, globs=names)  # type: ignore[arg-type]
    assert any(example.examples for example in examples), "no example"
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for example in examples:
        runner.run(example)
    assert runner.summarize(verbose=False).failed == 0
