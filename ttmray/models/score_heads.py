"""How the score `s`, a preference reward, enters the backbone: one embedding, five ways in.

The embedding is that of the paper (III-B): Fourier features of the scalar, an MLP, and a last projection that starts
at zero, so that a new head leaves every output of the backbone as it is, to the bit. The paper's own code is not
public. Number and range of the frequencies, hidden width, key names, and the injections v3, v4 and v5 are our
reconstruction; v1 and v2 follow the paper.

| head | name | where the embedding e goes |
|---|---|---|
| v1 | GlobalAdaLN | added to the condition that modulates every block and the final layer, both streams |
| v2 | InputAdd | added to every latent token after the input projection |
| v3 | audio token | a token before the latents, read by attention in every block |
| v4 | audio-stream AdaLN | as v1, but only where the audio stream is modulated |
| v5 | text token | a token before the text, read by attention in the joint blocks |

v1, v2 and v4 have the same five tensors (six where the null is learned), so their checkpoints load into each other
whole.

A plain extra token would change every attention average, even as a zero vector, and its neighbour through the
convolutions. The tokens of v3 and v5 are therefore only read, and through a gate per block and attention head that
starts at zero (as in LLaMA-Adapter, Zhang et al. 2023): a query adds gate * sigmoid(q k) * v of the token. The token
of a dropped score is read, too: "no score" is what training makes of it, not the absence of a token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator
from torch import Tensor, nn

from ttmray.plugins import named

HEADS: tuple[str, ...] = ("none", "v1", "v2", "v3", "v4", "v5")
NAMES = {
    "none": "no score",
    "v1": "GlobalAdaLN",
    "v2": "InputAdd",
    "v3": "audio token",
    "v4": "audio-stream AdaLN",
    "v5": "text token",
}


OWN: "dict[str, Callable[[Tensor], Injection]]" = {}
"""Heads from outside that a config of this process names. A weights file alone makes nobody import anything."""


def check_head(head: str) -> str:
    """A head of `HEADS`, or `module:function`: one from outside, which is given the embedding (B, 1, D) and returns
    where it goes. It has the tensors of v1.

    Raises:
        ValueError: there is no such head.
    """
    if head in HEADS or head in OWN:
        return head
    try:
        function = named(head)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"no head but {', '.join(HEADS)}, or module:function of one's own ({error})") from error
    if not callable(function):
        raise ValueError("no function of an embedding")
    OWN[head] = function
    return head


Head = Annotated[str, AfterValidator(check_head)]
Null = Literal["zero_embedding", "scalar_zero", "learned"]
"""What a dropped score is. The paper writes null = 0, which can be read as either of the first two: the embedding is
zero, or the scalar is 0. The scalar 0 is a legal score close to the mean, so the embedding is the default. `learned` is
an embedding of its own, as classifier-free guidance often has for its null class: it starts at zero and is trained
where the score is dropped. What becomes of the three is measured in benchmarks/null_score.py."""

FREQUENCIES = 64
LOWEST, HIGHEST = 0.1, 10.0
"""Angular frequencies in radians per unit of score. Rewards have a standard deviation near 0.6 (paper III-D): the
slowest wave is still monotone over [-15, 15], the fastest tells differences of 0.05 apart."""


@dataclass(frozen=True)
class Injection:
    """What a head gives to the backbone; None where it gives nothing. All are (B, 1, D)."""

    audio_condition: Tensor | None = None
    text_condition: Tensor | None = None
    latents: Tensor | None = None
    audio_token: Tensor | None = None
    text_token: Tensor | None = None


class ScoreEmbedding(nn.Module):
    """e_s = MLP(Fourier(s)).

    Args:
        width: D of the backbone.
        head: which injection.
        null: what a dropped score is.
        blocks: number of blocks whose attention may read a token, for v3 and v5.
        heads: attention heads.
    """

    freqs: Tensor

    def __init__(self, width: int, head: Head, null: Null = "zero_embedding", blocks: int = 0, heads: int = 0) -> None:
        super().__init__()
        self.head, self.null = head, null
        self.own = OWN.get(head)
        steps = torch.linspace(0, 1, FREQUENCIES, dtype=torch.float64)
        self.register_buffer("freqs", (LOWEST * (HIGHEST / LOWEST) ** steps).float())
        self.mlp = nn.Sequential(nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.gate = nn.Parameter(torch.zeros(blocks, heads)) if head in ("v3", "v5") else None
        self.null_embedding = nn.Parameter(torch.zeros(width)) if null == "learned" else None
        self.reset()

    def reset(self) -> None:
        """Xavier weights, zero biases, and zero in the last projection, the gates and the learned null."""
        first, last = self.mlp[0], self.mlp[2]
        assert isinstance(first, nn.Linear)
        nn.init.xavier_uniform_(first.weight)
        own = [parameter for parameter in (self.gate, self.null_embedding) if parameter is not None]
        for parameter in [first.bias, *last.parameters(), *own]:
            nn.init.zeros_(parameter)

    def forward(self, score: Tensor, null: Tensor) -> Tensor:
        """Embedding of a score.

        Args:
            score: (B,) float; what stands where `null` is true does not matter.
            null: (B,) bool, true where there is no score.

        Returns:
            (B, 1, D).
        """
        known = torch.where(null, torch.zeros_like(score), score)  # also keeps NaN out of products with zero
        angles = known.float()[:, None] * self.freqs
        e = self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1).to(score.dtype))
        if self.null == "zero_embedding":
            e = e.masked_fill(null[:, None], 0.0)
        elif self.null_embedding is not None:
            e = torch.where(null[:, None], self.null_embedding.to(e.dtype), e)
        return e[:, None]

    def inject(self, score: Tensor, null: Tensor) -> Injection:
        """The embedding (B, 1, D) of scores (B,) where the head puts it; `null` (B,) as in `forward`."""
        e = self(score, null)
        if self.own is not None:
            return self.own(e)
        if self.head == "v1":
            return Injection(audio_condition=e, text_condition=e)
        if self.head == "v2":
            return Injection(latents=e)
        if self.head == "v3":
            return Injection(audio_token=e)
        if self.head == "v4":
            return Injection(audio_condition=e)
        return Injection(text_token=e)
