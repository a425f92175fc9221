"""Work on Ray actors (`ttmray.cluster.each`): results of all items, and errors that people can use."""

import os
from pathlib import Path

import pytest
import torch

from ttmray.cluster import RETRIES, TRIED_AGAIN, ActorsConfig, each, leave, relay
from ttmray.errors import UserError

pytestmark = pytest.mark.slow  # Ray starts for every test
ON_RAY = ActorsConfig(runner="ray", workers=2)


@pytest.fixture(autouse=True)
def _own_ray():
    leave()
    yield
    leave()


def make():
    def work(item):
        if isinstance(item, Path) and not item.exists():
            item.touch()
            os._exit(9)
        if isinstance(item, Path):
            return item
        if item == "kill":
            os._exit(9)
        if item == "bad":
            raise UserError("this item is bad.", "Mend it.")
        return item * 2

    return work


def test_every_item_has_its_result():
    assert sorted(each(make, [1, 2, 3], ON_RAY)) == [2, 4, 6]


def test_an_error_of_the_work_keeps_its_type():
    with pytest.raises(UserError, match="this item is bad"):
        list(each(make, [1, "bad"], ON_RAY))


def test_a_worker_may_die_of_many_things_one_after_the_other(tmp_path, capfd):
    items = [tmp_path / str(i) for i in range(RETRIES + 2)]
    assert sorted(each(make, items, ON_RAY.model_copy(update={"workers": 1}))) == items
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("", "")
    assert all(words in relay.last_words() for words in TRIED_AGAIN)  # where somebody asks


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_gpu_that_torch_cannot_use_is_one_message():
    import ray

    ray.init(address="local", num_cpus=1, num_gpus=1, include_dashboard=False, log_to_driver=False)
    with pytest.raises(UserError, match="Ray gave 1 GPUs to a worker, but torch finds none it can use"):
        list(each(make, [1], ON_RAY.model_copy(update={"workers": 1, "gpus": 1.0})))


def test_work_that_kills_every_worker_is_one_message():
    with pytest.raises(UserError, match="died on the same work 4 times"):
        list(each(make, [1, "kill"], ON_RAY))
