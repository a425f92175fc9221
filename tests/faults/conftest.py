"""What tests that kill trainings share."""

import json
from pathlib import Path
from typing import Any

import pytest
from synthetic_corpus import write_random_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small corpus of random latents, as of the debug bundle."""
    folder = tmp_path_factory.mktemp("data") / "corpus"
    sizes: dict[str, Any] = {"tracks": 8, "clips_per_track": 3, "captions": 4, "validation": 2, "unit_clips": 6}
    run = write_random_corpus(str(folder), latent=(16, 40), text=(77, 64), **sizes)
    described = json.loads(run.read("run.json"))
    described["config"]["bundle"] = "debug"
    run.write("run.json", json.dumps(described).encode())
    return folder
