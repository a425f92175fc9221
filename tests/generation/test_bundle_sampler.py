"""Settings of sampling that a bundle needs, where nobody chooses others."""

import pytest

from ttmray.config import load_config
from ttmray.errors import UserError
from ttmray.generation.config import GenerateConfig
from ttmray.generation.pool_worker import CandidatesConfig
from ttmray.generation.sampler import NEGATIVE_PROMPT, PREFIX
from ttmray.models.bundle import MICRO


@pytest.mark.parametrize(("kind", "first"), [(GenerateConfig, "texts=[x]"), (CandidatesConfig, "prompts=p.csv")])
def test_what_nobody_sets_is_as_the_bundle_needs_it(kind, first):
    sampler = load_config(kind, None, [first, "bundle=micro"]).sampler
    assert (sampler.prefix, sampler.negative_prompt) == ("", "")
    for name, value in MICRO.description.sampler.items():
        assert getattr(sampler, name) == value


def test_what_somebody_sets_counts():
    sets = ["texts=[x]", "bundle=micro", 'sampler.prefix="loud "', "sampler.score=-1"]
    sampler = load_config(GenerateConfig, None, sets).sampler
    assert (sampler.prefix, sampler.negative_prompt, sampler.score) == ("loud ", "", -1.0)
    assert load_config(GenerateConfig, None, [*sets, "sampler.negative_prompt=hum"]).sampler.negative_prompt == "hum"


def test_bundles_without_needs_have_the_settings_of_the_paper():
    sampler = load_config(GenerateConfig, None, ["texts=[x]", "bundle=debug"]).sampler
    assert (sampler.prefix, sampler.negative_prompt, sampler.score) == (PREFIX, NEGATIVE_PROMPT, 5.0)


def test_a_config_comes_back_from_json_as_it_was():
    config = load_config(GenerateConfig, None, ["texts=[x]", "bundle=micro", "sampler.prefix=a "])
    assert GenerateConfig.model_validate_json(config.model_dump_json()) == config


def test_a_bundle_that_is_not_there_is_one_message(tmp_path):
    with pytest.raises(UserError, match="there is no bundle 'mikro'"):
        load_config(GenerateConfig, None, ["texts=[x]", "bundle=mikro"])
    with pytest.raises(UserError, match="is missing"):
        load_config(GenerateConfig, None, ["texts=[x]", f"bundle={tmp_path}/absent"])
