"""Text from a model, token by token: what `SupernetModel.generate` does."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampler:
    """Draws tokens by their logits; the fields are those of `SupernetModel.generate`.

    In transformers' order: temperature, then top_k, then top_p of what is left. Its draw too
    (exponential races, as in torch.multinomial): one seed, its tokens.
    """

    temperature: float
    top_k: int | None
    top_p: float
    generator: torch.Generator | None

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature takes a positive number, got {self.temperature}")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"top_k takes a number of tokens, or None for all, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p takes a probability above 0, got {self.top_p}")

    def __call__(self, logits: Tensor) -> Tensor:
        """(batch, vocab_size) to (batch,)."""
        probabilities = self.probabilities(logits)
        race = torch.empty_like(probabilities).exponential_(generator=self.generator)
        return (probabilities / race).argmax(-1)

    def probabilities(self, logits: Tensor) -> Tensor:
        """What the tokens are drawn by: (batch, vocab_size) float32, zero where none is drawn."""
        logits = logits.float() / self.temperature
        vocabulary = logits.shape[-1]
        if self.top_k and self.top_k < vocabulary:
            least = logits.topk(self.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p < 1:
            ascending, tokens = logits.sort(-1)
            tail = ascending.softmax(-1).cumsum(-1) <= 1 - self.top_p
            tail[:, -1] = False  # the likeliest token stays
            logits = logits.masked_fill(tail.scatter(1, tokens, tail), -torch.inf)
        return logits.softmax(-1)


def greedy(logits: Tensor) -> Tensor:
    return logits.argmax(-1)


def generate(
    step: Callable[[Tensor], Tensor],
    choose: Callable[[Tensor], Tensor],
    prompt: Tensor,
    max_new_tokens: int,
    stops: Sequence[int],
    pad: int,
    look_every: int,
) -> Tensor:
    """The prompt (batch, seqlen) and what follows: up to max_new_tokens, or all rows' stops.

    step: the logits (batch, vocab_size) after the tokens it gets and all it got before. choose:
    a token of each row by them. Rows are filled with `pad` after a token of `stops`. look_every:
    after how many tokens the host asks the device whether every row has come to its stop.
    """
    batch, seqlen = prompt.shape
    ids = torch.cat((prompt, prompt.new_full((batch, max_new_tokens), pad)), 1)
    ends = torch.tensor(stops, dtype=prompt.dtype, device=prompt.device)
    running = torch.ones(batch, dtype=torch.bool, device=prompt.device)
    lengths = running.new_zeros(batch, dtype=torch.int64)
    tokens = prompt
    for made in range(1, max_new_tokens + 1):
        chosen = choose(step(tokens)).masked_fill(~running, pad)
        ids[:, seqlen + made - 1] = chosen
        lengths += running
        running &= (chosen[:, None] != ends).all(1)
        if stops and made % look_every == 0 and not running.any():
            break
        tokens = chosen[:, None]
    return ids[:, : seqlen + int(lengths.max())]
