"""Nobody can keep another group's worker from starting, so a worker that died finds its place again."""

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ttmray.config import load_config
from ttmray.corpus.assembly import stage_classes
from ttmray.corpus.config import CorpusConfig
from ttmray.corpus.placement import GROWTH_GPUS, Group, Node, gpus_held, lacking, layout, least_cpus, needs, place

REPO = Path(__file__).resolve().parents[2]


def config(fuse: str = "auto", scope: str = "clip", **runtime: object) -> CorpusConfig:
    return CorpusConfig.model_validate(
        {"input": "a", "output": "b", "separation": {"scope": scope}, "runtime": {"fuse": fuse} | runtime}
    )


def node(cpus: float, gpus: float = 0.0) -> Node:
    return Node("id", "machine", cpus, gpus)


def placed(chosen: CorpusConfig, *nodes: Node, units: int = 1000) -> dict[str, Group]:
    return {group.name: group for group in place(chosen, nodes, units)}


fuses = st.sampled_from(["auto", "all", "models", "none"])
scopes = st.sampled_from(["clip", "track"])
clusters = st.lists(st.builds(node, st.integers(0, 64), st.integers(0, 8)), max_size=6)


@given(fuse=fuses, scope=scopes, gpus=st.integers(0, 16))
def test_every_layout_holds_every_stage_once_and_in_order(fuse: str, scope: str, gpus: int) -> None:
    stages = [stage for _, group in layout(config(fuse, scope), gpus) for stage in group]
    assert stages == [stage.name for stage in stage_classes(config(fuse, scope))]


@given(fuse=st.sampled_from(["auto", "all", "models"]), scope=scopes, cluster=clusters, units=st.integers(1, 5000))
def test_no_two_groups_reserve_the_same_kind_of_place(fuse: str, scope: str, cluster: list[Node], units: int) -> None:
    groups = place(config(fuse, scope), cluster, units)
    for kind in ("cpus", "gpus"):
        assert len([group for group in groups if getattr(group, kind)]) <= 1
    assert all(1 <= group.fewest <= group.begin <= group.most for group in groups)
    for group in groups:
        assert group.begin <= max(1, sum(group.fits(one) for one in cluster))


@given(scope=scopes, extra=st.integers(0, 300), gpus=st.integers(0, 16), units=st.integers(1, 5000))
def test_fixed_shares_fit_into_the_cluster_and_each_group_has_a_worker(
    scope: str, extra: int, gpus: int, units: int
) -> None:
    chosen = config("none", scope)
    cpus = least_cpus(chosen) + extra
    groups = place(chosen, [node(cpus, gpus)], units)
    assert all(1 <= group.fewest <= group.most <= max(units, 1) for group in groups)
    assert sum(group.cpus * group.most for group in groups) <= cpus + 1e-6
    assert sum(group.gpus * group.most for group in groups) <= gpus + 1e-6


def test_all_cpus_are_used_where_everything_shares_a_process() -> None:
    for fuse in ("auto", "all", "models"):
        groups = placed(config(fuse), node(8), node(4), node(0))
        assert [(group.name, group.fewest, group.begin) for group in groups.values()] == [("all", 1, 12)]


def test_writing_belongs_to_the_process_with_models() -> None:
    groups = placed(config(), node(16, 1))
    assert list(groups) == ["decode", "models"]
    assert groups["models"].stages[-1] == "write"


def test_places_are_counted_per_node() -> None:
    """Of 12 CPUs on nodes of 3, workers of 2 CPUs have four places, not six."""
    assert placed(config(models={"cpus": 2}), *[node(3)] * 4)["all"].begin == 4


def test_models_need_no_cpu_and_decoders_are_no_more_than_gpus_need() -> None:
    groups = placed(config(), node(2, 2), node(2, 2), node(8))
    assert (groups["models"].begin, groups["models"].cpus, groups["models"].gpus) == (4, 0.0, 1.0)
    cluster = [node(128, 8)] * 20
    assert placed(config(), *cluster, units=10**6)["decode"].most == 4 * 160
    assert placed(config(), node(16, 1), units=10**6)["decode"].most == 4 * GROWTH_GPUS


def test_pools_may_grow_beyond_the_cluster_as_it_is_at_the_start() -> None:
    assert placed(config(), node(16, 1))["models"].most == 1000
    assert placed(config(), node(16, 1), units=3)["models"].most == 3
    assert placed(config(), node(16))["all"].most == 1000


def test_a_config_that_asks_for_gpus_has_its_layout_before_the_first_one_joins() -> None:
    groups = place(config(models={"gpus": 1}), [], units=10)
    assert [group.name for group in groups] == ["decode", "models"]
    assert lacking(groups, []) == groups
    assert [group.name for group in lacking(groups, [node(4)])] == ["models"]
    assert lacking(groups, [node(4), node(0, 1)]) == []
    assert needs(groups) == "decode needs 1 CPUs and 0 GPUs and models needs 0 CPUs and 1 GPUs"


def test_what_the_paper_and_the_readme_start_waits_for_nodes_of_both_kinds() -> None:
    """An empty cluster that grows: no CPU node is idle, no number is that of the start."""
    sets = ["input=a", "output=b"]
    (line,) = re.findall(r"^ray job submit .*$", (REPO / "README.md").read_text("utf-8"), re.MULTILINE)
    words = shlex.split(line)
    readme = [word for flag, word in pairwise(words) if flag == "--set"]
    for chosen in (
        load_config(CorpusConfig, "configs/paper/corpus.yaml", sets),
        load_config(CorpusConfig, None, readme),
    ):
        groups = place(chosen, [], units=100)
        assert [group.name for group in groups] == ["decode", "models"]
        assert lacking(groups, []) == groups
        grown = {group.name: group for group in place(chosen, [node(8, 1), node(8)], units=100)}
        assert lacking(list(grown.values()), [node(8, 1), node(8)]) == []
        assert (grown["models"].fewest, grown["models"].cpus, grown["models"].gpus) == (1, 0, 1)
        assert grown["models"].most >= 4
        assert grown["decode"].most >= 16


def test_gpus_that_are_held_are_those_of_all_workers_and_no_more_than_there_are() -> None:
    cluster = [node(8, 1)] * 8
    assert gpus_held(place(config(), cluster, 1000), 8) == 8
    assert gpus_held(place(config(), cluster, 3), 8) == 3
    assert gpus_held(place(config("none"), [node(8, 1)], 1000), 1) == pytest.approx(0.99)
    assert gpus_held(place(config(), [node(8)], 1000), 0) == 0
    asked = config("models", models={"workers": [1, 6], "gpus": 0.5})
    assert gpus_held(place(asked, cluster, 1000), 8) == 3
    assert gpus_held(place(asked, [node(64, 2)], 1000), 2) == 2


def test_three_model_processes_share_one_gpu() -> None:
    groups = placed(config("none"), node(8, 1)).values()
    assert [group.gpus for group in groups if group.heavy] == [0.33, 0.33, 0.33]


def test_given_worker_counts_are_kept() -> None:
    chosen = config("models", decode={"workers": [2, 5]}, models={"workers": [3, 4]})
    groups = placed(chosen, node(8, 1))
    assert (groups["decode"].fewest, groups["decode"].most) == (2, 5)
    assert (groups["models"].fewest, groups["models"].begin, groups["models"].most) == (3, 3, 4)


@pytest.mark.parametrize("fuse", ["auto", "none"])
@pytest.mark.parametrize(("share", "per_card"), [(0.33, 3), (0.4, 2), (0.5, 2), (0.6, 1), (1, 1)])
def test_a_process_lies_on_one_card_and_rests_of_two_cards_are_no_place(fuse: str, share: float, per_card: int) -> None:
    cluster = [node(8, 2), node(8, 1)]
    heavy = [group for group in placed(config(fuse, models={"gpus": share}), *cluster).values() if group.heavy]
    assert [group.fits(cluster[0]) for group in heavy] == [2 * per_card] * len(heavy)
    assert sum(group.begin for group in heavy) <= 3 * per_card
    if fuse == "auto":
        assert [group.begin for group in heavy] == [3 * per_card]


def test_one_worker_of_each_group_must_find_a_place_beside_the_others() -> None:
    """Three processes of 0.6 cards never start on two cards, though these are 2 and the three together 1.8."""
    chosen = config("none", models={"gpus": 0.6})
    for cluster in ([node(8, 2)], [node(8, 1), node(8, 1)]):
        groups = place(chosen, cluster, 10)
        assert lacking(groups, cluster) == groups
    assert lacking(place(chosen, [node(8, 3)], 10), [node(8, 3)]) == []
    # the decoder's CPUs are not those of the node with the card
    mixed = config("models", decode={"cpus": 4}, models={"gpus": 1, "cpus": 0})
    assert lacking(place(mixed, [node(4, 1), node(4)], 10), [node(4, 1), node(4)]) == []
    three = [Group("a", (), True, 3, 1), Group("b", (), True, 3, 1), Group("c", (), False, 3, 0)]
    assert lacking(three, [node(4, 2), node(8)]) == three
    assert lacking(three, [node(6, 2), node(3)]) == []


def test_groups_without_a_place_are_told_before_anything_starts() -> None:
    chosen = config("none")
    assert lacking(place(chosen, [node(2)], 10), [node(2)]) == place(chosen, [node(2)], 10)
    assert lacking(place(chosen, [node(5)], 10), [node(5)]) == []
    chosen = config("models", models={"gpus": 2})
    assert [group.name for group in lacking(place(chosen, [node(8, 1)], 10), [node(8, 1)])] == ["models"]
