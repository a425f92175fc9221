"""What shipped configs stand for never changes: a run that was begun with one of them goes on with a newer ttmray."""

from importlib import import_module
from pathlib import Path

import pytest

from ttmray.config import Config, fingerprint, identity, load_config
from ttmray.recipes.ablations import AblateConfig, AblationPlan
from ttmray.recipes.reproduce import ReproduceConfig, build_steps
from ttmray.recipes.reproduce import _fingerprints as chain_fingerprints

REPO = Path(__file__).resolve().parents[1]
KINDS = {
    "ablate": "ttmray.recipes.ablations:AblateConfig",
    "corpus": "ttmray.corpus.config:CorpusConfig",
    "evaluate": "ttmray.evaluation.config:EvaluateConfig",
    "generate": "ttmray.generation.config:GenerateConfig",
    "grpo": "ttmray.training.grpo:GrpoConfig",
    "methods": "ttmray.recipes.compare_methods:CompareMethodsConfig",
    "pool": "ttmray.generation.pool_worker:CandidatesConfig",
    "ranker": "ttmray.ranker.job:RankerConfig",
    "reproduce": "ttmray.recipes.reproduce:ReproduceConfig",
    "stage1": "ttmray.training.config:TrainConfig",
    "stage2": "ttmray.training.expert_iteration:ExpertIterationConfig",
    "stage3": "ttmray.training.crpo:CrpoConfig",
    "train": "ttmray.recipes.micro:MicroConfig",
    "attm/evaluate": "ttmray.recipes.attm_metrics:AttmConfig",
}
INCOMPLETE = {"paper/generate": ["checkpoint=weights.safetensors"]}
"""What a config leaves to the command line."""
FINGERPRINTS = {
    "attm/corpus": "442726a871a23187ed7877fcaf1e7e96caf2bc77ba975cfa5d46d3b5529689a1",
    "attm/evaluate": "1b8b18a732a52195a8ab8dbcf7f58511b888c6221e7df860940a566833f4d50e",
    "attm/generate": "a387b89a1ac54818e86d6ef029949014ed4308b98947aa050e5cdb7e324a38f6",
    "attm/stage1-16gb": "9f0ee8709fa49a632438355a64ac94a192608ace288d0f17033e81223e90e5a6",
    "attm/stage1-24gb": "9f0ee8709fa49a632438355a64ac94a192608ace288d0f17033e81223e90e5a6",
    "attm/stage1-48gb": "9f0ee8709fa49a632438355a64ac94a192608ace288d0f17033e81223e90e5a6",
    "debug/ablate": "01a9603735931d8f9add87988de983b0c70850ba6547a19aca5751527567714d",
    "debug/corpus": "1fb8b43541dba2869665860c4fbcceca1c3ff7afb78f06dde6985069ede5b6aa",
    "debug/evaluate": "ebfab4b3786e4057990d2dfdfe18e6e17a8f19bd2ef1ea7a043a15b89b62de3a",
    "debug/generate": "c699324ec303d5918f558017a3895c6524ef44b1f58e8ead7e5564701c1fe634",
    "debug/grpo": "daa973ab28ff8671911fdef50e2d2e85d03fa96020d0478ee76f07a458d8bd67",
    "debug/methods": "c5363dd54e6bfdb2be1f07e422266c7dcce26bd42c97d89bb5fe4e77c7a8b738",
    "debug/pool": "6d6f3e78b4e84a594b64d55759ae6edbed9ca0d7d2c231de74d0dfd65021f995",
    "debug/ranker": "fea9f494105009c3ead2ce951b1b731eb911b870d8bd41627beed6fb892c0a8d",
    "debug/reproduce": "dcd5137e00e41b2f1d1e81c13f1f222b727be30b0ad6f55092ceee8139ccad12",
    "debug/stage1": "0b2aac81d3f367b582c78214b6b4d0bc55a9b2dd647d6f6b6cea1497bd69f279",
    "debug/stage2": "a6ab63a15f44cdd49fdf42f30cd80b21fc6bc634d229792b97a6fc611b6526e7",
    "debug/stage3": "52e82e8ae581c20ad2481bacb3de12b3c9d76dc44cd4528ff930d9ebc7b9ab7d",
    "micro/corpus": "e75efd85a9b2b577d84c9b3b5033ccf96264248e17337eb4163f53733cb17354",
    "micro/methods": "ad5c1eb2b9608f9336829515fb3530d1e0af0504339af60450db6f857bca2c06",
    "micro/reproduce": "e229d1bcd73c877dedb1f8f75e63a9cb34f4fae69446a9fdc058e08dc1e6005f",
    "micro/stage1": "5272dbf073fb5c774beb8c6a067038ea93854d5a36262d2969636cc968d1d62a",
    "micro/train": "650e3b68addd8fe99633b60b2053311b89481ecd0d72ec28dbcaf6802e64a116",
    "paper/ablate": "01eebf2da9be395f1605f14594e975093a376245cf168526704d9ae3f627515b",
    "paper/corpus": "c4b858542f0760662c95550ceab8736bf25da440651a3e4c7ebcc4458eb747e8",
    "paper/evaluate": "d9f12ba664a89e6b4b0d2e45f29c0d7b04413fb86f175dc1750816c8d0a37b7a",
    "paper/generate": "385a5a66e5c40be0c115b80f2bb9b58c526d1a6fb2152900661cf892b3510465",
    "paper/grpo": "ecfbb22f93d86a51d1a4c9bc96daa6b1fc25981a998516ce1e1114aaa9cf989b",
    "paper/pool": "724580d66515639972ba2324835877a840c814e6089287f774c2120acd2c78a0",
    "paper/ranker": "a48eaf305b9f47c40fce997d8a4cec7e99c016c6da6a7e95f077f86cea765b40",
    "paper/reproduce": "1f444347d7d78d8a748425a4e73a21f67b095111da4cecdbfd149f6c92844379",
    "paper/stage1-a5000": "a3b00502475412029597ea6d4d4468408b6c68f302ac5ade07b395ce99ac6c40",
    "paper/stage1-h200": "a3b00502475412029597ea6d4d4468408b6c68f302ac5ade07b395ce99ac6c40",
    "paper/stage1": "a3b00502475412029597ea6d4d4468408b6c68f302ac5ade07b395ce99ac6c40",
    "paper/stage2": "17b3f3a1b031fbaa56bed32df1ec89256bc3c7f067bfb0634ad26cad5a54042a",
    "paper/stage3-v1": "89681ba504f3fbd982a1150e613162c1dbd49bec4e8c0a61a0e8c9d357d0f260",
    "paper/stage3": "1366f791082b856f0e376207123465a0914399e858848bd75fef6b86d05f60e4",
}
STEPS = {
    "debug/reproduce": "4c0305aa16addccdc216f1586e4a2a4c45a6b52ee1df03b8d884c083bd4c79c0",
    "debug/ablate": "87c5754340ade7253cf43f53c1ad2a982036276d7a45d2fe11f38bbe813e0560",
    "paper/reproduce": "a09f0f9dd4f76bf606ae06e7f7548e81b41b50343f4eb114c79769e3b27a9ff9",
    "paper/ablate": "35254ef83541766c687a2b213255991ba22ff77f69ef7d9799ae9e6c57515e31",
}


def _load(name: str) -> Config:
    module, kind = KINDS.get(name, KINDS[name.partition("/")[2].partition("-")[0]]).split(":")
    return load_config(getattr(import_module(module), kind), f"configs/{name}.yaml", INCOMPLETE.get(name, ()))


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(REPO)


def test_every_shipped_config_has_a_pinned_fingerprint():
    files = {path.relative_to("configs").with_suffix("").as_posix() for path in Path("configs").rglob("*.yaml")}
    assert files == FINGERPRINTS.keys()


@pytest.mark.parametrize("name", FINGERPRINTS)
def test_the_identity_of_a_shipped_config_stays(name):
    assert fingerprint(identity(_load(name))) == FINGERPRINTS[name]


@pytest.mark.parametrize("name", STEPS)
def test_the_steps_of_a_shipped_chain_stay(name):
    config = _load(name)
    if isinstance(config, ReproduceConfig):
        assert fingerprint(chain_fingerprints(config, build_steps(config))) == STEPS[name]
    else:
        assert isinstance(config, AblateConfig)
        plan = AblationPlan(config)
        placed = ("evaluate", "reference", "tables")  # hold the addresses of the reference set and of the prompts
        prints = {name: one for name, one in plan.fingerprints(plan.steps()).items() if not name.startswith(placed)}
        assert fingerprint(prints) == STEPS[name]
