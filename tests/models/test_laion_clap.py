"""Parity with LAION's own package, wherever that package imports and a released checkpoint lies."""

import os
from pathlib import Path

import numpy as np
import pytest

from ttmray.errors import UserError
from ttmray.models.clap import load_laion_clap
from ttmray.models.laion_clap import LaionClap


def test_oracle_without_its_package_names_the_extra(tmp_path: Path) -> None:
    try:
        import laion_clap  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match="laion_clap cannot be imported") as refused:
            LaionClap(tmp_path / "any.pt")
        assert "ttmray[laion-clap]" in refused.value.hint
    else:
        pytest.skip("laion_clap is installed here")


@pytest.mark.slow
def test_our_embeddings_equal_those_of_the_original_package() -> None:
    pytest.importorskip("laion_clap", reason="laion_clap does not import in this environment")
    folder = os.environ.get("TTMRAY_LAION_CLAP")
    if not folder:
        pytest.skip("set TTMRAY_LAION_CLAP to a folder with the released .pt file, vocab.json and merges.txt")
    (checkpoint,) = Path(folder).glob("*.pt")
    ours, theirs = load_laion_clap(checkpoint, folder), LaionClap(checkpoint)
    rng = np.random.default_rng(0)
    waves = [0.3 * rng.standard_normal(n).astype(np.float32) for n in (480_000, 200_000, 700_000)]
    distance = 1 - (ours.embed_audio(waves) * theirs.embed_audio(waves)).sum(axis=1)
    assert np.abs(distance).max() < 1e-9
    texts = ["a calm piano", "", "fast drum and bass"]
    assert np.abs(ours.embed_text(texts) - theirs.embed_text(texts)).max() < 1e-5
