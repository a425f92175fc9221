"""Weights of one score head in the forward of another: what is refused, and what is said about the rest.

One rule for training (`model.init`), generation, pools, ablations and `load_backbone`:

| trained as | run as | |
|---|---|---|
| v1, v4 | v4, v1 | allowed: the embedding modulates the latents' stream as it did |
| v1, v4 | v2 | allowed, as in the paper's chain (III-D), and said: the score steers nothing until it is trained again |
| v2 | v1, v4 | refused without `force`: the paper has FAD 0.69 and reward -0.50 (IV-B) |
| v3, v5, any other | another family | training starts a new head at zero; nothing else can use them |

The paper calls v1 -> v2 benign, by the reward at one score (IV-D). That says nothing about steering: an embedding that
was learned as a modulation is an offset without meaning where it is added to latents (`benchmarks/score_heads.py`).
"""

from dataclasses import dataclass

from ttmray.errors import UserError
from ttmray.models.score_heads import NAMES, Head

CROSS_LOAD = "cross_load.json"
"""In the folder of a run whose weights were trained with another head: what `generation/steering.py` measured."""
SHARED: tuple[Head, ...] = ("v1", "v2", "v4")
"""Heads with the same tensors: weights of one can run in the forward of another."""


@dataclass(frozen=True)
class CrossLoad:
    """Weights in the forward of another head.

    Attributes:
        weights: head that they were trained with.
        forward: head that uses them.
        forced: it would have been refused.
    """

    weights: Head
    forward: Head
    forced: bool = False

    @property
    def new_head(self) -> bool:
        """The heads have other tensors, so the one of the weights cannot be used at all."""
        return not {self.weights, self.forward} <= set(SHARED)

    @property
    def loses_score(self) -> bool:
        """The embedding is used in another way than it was trained for."""
        return "v2" in (self.weights, self.forward)

    def __str__(self) -> str:
        """Short, for manifests and cards: `v1 weights in the v2 forward`."""
        if self.new_head:
            return f"a new head {self.forward} on {self.weights} weights"
        return f"{self.weights} weights in the {self.forward} forward{', by force' if self.forced else ''}"

    def line(self, what: str) -> str:
        """What is said aloud, with the name of the weights."""
        if self.new_head:
            why = f"the tensors of {self.weights} are others and are left out; {self.forward} starts at zero"
        elif self.forced:
            why = "force_head is set. These weights collapse there (paper IV-B: FAD 0.69, reward -0.50)"
        elif self.loses_score:
            why = "FAD and reward stay near (paper IV-B), but the score steers nothing until it is trained there"
        else:
            why = "the score modulates the latents' stream as before"
        return f"{what}: {self}: {why}."


def cross_load(weights: Head, forward: Head, what: str, *, force: bool = False) -> CrossLoad | None:
    """The rule. None where there is nothing to say: the same head, or none on one side.

    Args:
        weights: head that they were trained with.
        forward: head that is to use them.
        what: the weights, for messages; with the config's field, if there is one.
        force: also what collapses.

    Raises:
        UserError: v2 weights in the forward of v1 or v4, and not `force`.
    """
    if weights == forward or "none" in (weights, forward):
        return None
    collapses = weights == "v2" and forward in SHARED
    if collapses and not force:
        raise UserError(
            f"{what} was trained as v2 and collapses as {forward}: an embedding that was added to the latents would "
            f"modulate every block ({NAMES[forward]}). The paper has FAD 0.69 and reward -0.50 (IV-B).",
            "Set head: v2 where the weights are used, or force_head: true to see the collapse.",
        )
    return CrossLoad(weights, forward, forced=collapses)
