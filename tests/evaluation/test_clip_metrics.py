"""Numbers of single clips by functions that a config names."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from ttmray.errors import UserError
from ttmray.evaluation.clip_metrics import clip_functions, columns_of, numbers_of, versions


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    module = SimpleNamespace(peak=lambda wave: {"peak": float(np.abs(wave).max())}, VERSION="3")
    module.endless = lambda wave: {"peak": float("inf")}
    for function in (module.peak, module.endless):
        function.__module__ = "own_metrics"
    monkeypatch.setitem(sys.modules, "own_metrics", module)
    return module


def test_numbers_are_named_by_their_function_and_say_its_version(own):
    names = ("own_metrics:peak", "tuning")
    numbers = numbers_of(np.full((1, 9000), 0.5, np.float32), clip_functions(names), "a.wav")
    assert numbers["own_metrics:peak/peak"] == 0.5
    assert versions(names)[0] == "own_metrics:peak@3"
    columns = columns_of([numbers, {}], names, {"reward"})
    assert columns == {"peak": "own_metrics:peak@3", "tuning_deviation": versions(names)[1]}


def test_names_that_are_taken_and_numbers_that_are_none_are_refused(own):
    wave = np.ones((1, 10), np.float32)
    with pytest.raises(UserError, match=r"gave inf as peak of a\.wav"):
        numbers_of(wave, clip_functions(["own_metrics:endless"]), "a.wav")
    with pytest.raises(UserError, match="calls a number peak"):
        columns_of([{"own_metrics:peak/peak": 1.0}], ["own_metrics:peak"], {"peak"})
    two = [{"own_metrics:peak/peak": 1.0, "own_metrics:endless/peak": 1.0}]
    with pytest.raises(UserError, match="calls a number peak"):
        columns_of(two, ["own_metrics:peak", "own_metrics:endless"], set())
