"""Workers never add up to more than there is, so a worker that died finds its place again."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ttmray.corpus.assembly import stage_classes
from ttmray.corpus.config import CorpusConfig
from ttmray.corpus.placement import gpus_held, layout, least_cpus, place
from ttmray.errors import UserError


def config(fuse: str = "auto", scope: str = "clip", **runtime: object) -> CorpusConfig:
    return CorpusConfig.model_validate(
        {"input": "a", "output": "b", "separation": {"scope": scope}, "runtime": {"fuse": fuse} | runtime}
    )


fuses = st.sampled_from(["auto", "all", "models", "none"])
scopes = st.sampled_from(["clip", "track"])


@given(fuse=fuses, scope=scopes, gpus=st.integers(0, 16))
def test_every_layout_holds_every_stage_once_and_in_order(fuse: str, scope: str, gpus: int) -> None:
    stages = [stage for _, group in layout(config(fuse, scope), gpus) for stage in group]
    assert stages == [stage.name for stage in stage_classes(config(fuse, scope))]


@given(fuse=fuses, scope=scopes, extra=st.integers(0, 300), gpus=st.integers(0, 16), units=st.integers(1, 5000))
def test_shares_fit_into_the_cluster_and_each_group_has_a_worker(
    fuse: str, scope: str, extra: int, gpus: int, units: int
) -> None:
    chosen = config(fuse, scope)
    cpus = least_cpus(chosen) + extra
    groups = place(chosen, cpus, gpus, units)
    assert all(1 <= group.fewest <= group.most <= max(units, 1) for group in groups)
    assert sum(group.cpus * group.most for group in groups) <= cpus + 1e-6
    assert sum(group.gpus * group.most for group in groups) <= gpus + 1e-6


def test_all_cpus_are_used_where_everything_shares_a_process() -> None:
    (group,) = place(config(), cpus=8, gpus=0, units=1000)
    assert (group.name, group.most) == ("all", 8)


def test_each_gpu_gets_one_process_that_holds_all_models() -> None:
    groups = {group.name: group for group in place(config(), cpus=64, gpus=8, units=1000)}
    assert (groups["models"].most, groups["models"].gpus) == (8, 1.0)
    assert groups["decode"].most > 40


def test_gpus_that_are_held_are_those_of_all_workers_and_no_more_than_there_are() -> None:
    assert gpus_held(place(config(), cpus=64, gpus=8, units=1000), 8) == 8
    assert gpus_held(place(config(), cpus=64, gpus=8, units=3), 8) == 3
    assert gpus_held(place(config("none"), cpus=8, gpus=1, units=1000), 1) == pytest.approx(0.99)
    assert gpus_held(place(config(), cpus=8, gpus=0, units=1000), 0) == 0
    asked = config("models", models={"workers": [1, 6], "gpus": 0.5})
    assert gpus_held(place(asked, cpus=64, gpus=8, units=1000), 8) == 3
    assert gpus_held(place(asked, cpus=64, gpus=2, units=1000), 2) == 2


def test_three_model_processes_share_one_gpu() -> None:
    groups = place(config("none"), cpus=8, gpus=1, units=1000)
    assert [group.gpus for group in groups if group.heavy] == [0.33, 0.33, 0.33]


def test_given_worker_counts_are_kept() -> None:
    chosen = config("models", decode={"workers": [2, 5]})
    groups = {group.name: group for group in place(chosen, cpus=8, gpus=0, units=1000)}
    assert (groups["decode"].fewest, groups["decode"].most) == (2, 5)


def test_what_cannot_fit_is_refused_before_anything_starts() -> None:
    with pytest.raises(UserError, match=r"need 2\.5 CPUs"):
        place(config("models"), cpus=2, gpus=0, units=10)
    with pytest.raises(UserError, match="2 GPUs"):
        place(config("models", models={"gpus": 2}), cpus=8, gpus=1, units=10)
