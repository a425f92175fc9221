"""Commands that are a little more than one call."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ttmray.generation.config import GenerateConfig


def generate(
    config: "GenerateConfig",
    *,
    score_from: str | None = None,
    retry_failed: bool = False,
    zip_to: str | None = None,
    play_page: bool = False,
) -> int:
    """`ttmray generate`, at the score that was chosen for the checkpoint where `score_from` names that run.

    Raises:
        UserError: as `generation.generate.generate`, or nothing was chosen there for this checkpoint.
    """
    from ttmray.generation.generate import generate

    if score_from is not None:
        from ttmray.generation.choose_score import chosen_score

        sampler = config.sampler.model_copy(update={"score": chosen_score(score_from, config.checkpoint)})
        config = config.model_copy(update={"sampler": sampler})
    return generate(config, retry_failed=retry_failed, zip_to=zip_to, play_page=play_page)


def pull(
    names: Sequence[str] = (), *, bundle: str | None = None, everything: bool = False, offline: bool = False
) -> int:
    """`ttmray weights pull`, which fetches nothing where it is `offline`.

    Raises:
        UserError: unknown names, or weights that are not there or damaged.
    """
    from ttmray.models import weights_cli
    from ttmray.models.weights import open_store

    return weights_cli.pull(names, bundle=bundle, everything=everything, store=open_store(offline=offline))
