"""Some schedules of `make faults`: seeded faults, relaunches, and the run of nobody disturbed at the end."""

import shutil
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fault_schedules import IN_PROCESS, KILLS, ON_RAY, World, carry_out, differences


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World.at(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("kind", IN_PROCESS)
def test_a_run_with_faults_ends_as_one_without(world, kind):
    outcome = carry_out(world, kind, seed=1)
    assert outcome.differs == {}
    assert outcome.faults > 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", [*KILLS, *ON_RAY])
def test_a_run_whose_processes_are_killed_ends_as_one_without_kills(world, kind, seed):
    outcome = carry_out(world, kind, seed)
    assert outcome.differs == {}
    assert outcome.faults > 0


def test_the_comparison_sees_what_is_lost_twice_and_left_over(world, tmp_path):
    run = Path(shutil.copytree(world.reference, tmp_path / "run"))
    rows = pq.read_table(run / "index.parquet")
    pq.write_table(pa.concat_tables([rows.slice(1), rows.slice(3, 1)]), run / "index.parquet")
    (run / "attempts").mkdir(exist_ok=True)
    (run / "attempts/u000001.all.0").touch()
    (run / "stats/latents.json").unlink()
    expected = {"lost": 1, "twice": 1, "orphans": 1, "missing": 1, "changed": 1}
    wrong = differences(run, world.reference)
    assert wrong.pop("verify") >= 1
    assert wrong == Counter(expected)
