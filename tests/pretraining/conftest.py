"""A few short clips, composed once for all tests here."""

import pytest

from ttmray.pretraining.clips import SHARD, ClipSet
from ttmray.storage import Folder


@pytest.fixture(scope="session")
def clips(tmp_path_factory) -> ClipSet:
    """One shard of clips of 1.5 s, with stems."""
    made = ClipSet(Folder.at(str(tmp_path_factory.mktemp("clips"))), 3, SHARD, 1.5, SHARD)
    made.compose()
    return made
