import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ttmray.training.schedule import learning_rate


def test_golden_learning_rates(golden_dir):
    cases = json.loads((golden_dir / "rules.json").read_text())["lr_schedule"]["cases"]
    assert cases
    for case in cases:
        expected = case["lr_at"] if "lr_at" in case else dict(enumerate(case["lr_all"]))
        for step, lr in expected.items():
            got = learning_rate(
                int(step),
                case["base_lr"],
                warmup=case["warmup"],
                total=case["num_iterations"],
                schedule=case["schedule"],
            )
            assert got == pytest.approx(lr, rel=1e-9)


def test_the_paper_run_drops_at_161000_and_181000():
    def lr(step: int) -> float:
        return learning_rate(step, 1e-4, warmup=1000, total=200_000, schedule="step")

    assert lr(160_999) == 1e-4
    assert lr(161_000) == pytest.approx(1e-5)
    assert lr(180_999) == pytest.approx(1e-5)
    assert lr(181_000) == pytest.approx(1e-6)


@given(
    base=st.floats(1e-8, 1),
    warmup=st.integers(0, 50),
    total=st.integers(0, 300),
    schedule=st.sampled_from(["constant", "step"]),
)
def test_rates_rise_in_the_warm_up_and_never_after(base, warmup, total, schedule):
    rates = [learning_rate(i, base, warmup=warmup, total=total, schedule=schedule) for i in range(warmup + total + 5)]
    assert all(0 < rate <= base for rate in rates)
    rising, after = rates[:warmup], rates[warmup:]
    assert all(a < b for a, b in pairwise(rising))
    assert not rising or rising[-1] < base
    assert all(a >= b for a, b in pairwise(after))
    assert schedule == "step" or set(after) == {base}
