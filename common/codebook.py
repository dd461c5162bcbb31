"""A codebook: vectors that a latent is quantized to, how much each is used, what replaces unused ones."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from common.schedules import AveragedPolicy


class Codebook(nn.Module):
    """K code vectors, and how much the codes are used.

    Attributes:
        vectors: (K, latent_dim), at the start of mean 0 and variance 1 each.
        null: (latent_dim,), token of unconditional draws, of a codebook made with one.
        usage: (K,), shares of the samples of the last whole window, over all processes.
        counts: (K,), samples assigned to each code since then.
        error: of the latest samples, mean squared distance to their codes, in each dimension.
    """

    def __init__(self, num_codes: int, latent_dim: int, null: bool = False):
        super().__init__()
        if latent_dim < 2:
            raise UserError("--latent-dim must be at least 2: a latent of fixed scale needs a direction.")
        self.vectors = nn.Parameter(F.layer_norm(torch.randn(num_codes, latent_dim), (latent_dim,)))
        if null:
            self.null = nn.Parameter(torch.randn(latent_dim) * 0.02)
        self.register_buffer("usage", torch.full((num_codes,), 1 / num_codes))
        self.register_buffer("counts", torch.zeros(num_codes))
        self.register_buffer("error", torch.zeros(()))

    def count(self, counts: Tensor, error: Tensor) -> None:
        """Take in a batch: how many samples each code got (K,), and their mean squared distance to it."""
        self.counts += counts
        self.error.copy_(error)

    def diagnostics(self) -> dict[str, Tensor]:
        """Perplexity of the usage, codes in use, distances to nearest and farthest codes."""
        vectors = self.vectors.detach()
        distances = torch.cdist(vectors, vectors)
        others = distances + torch.diag(torch.full_like(self.usage, torch.inf))
        return {
            "codes/perplexity": torch.special.entr(self.usage).sum().exp(),
            "codes/in_use": (self.usage >= 0.1 / len(self.usage)).sum(),
            "codes/nearest_distance": others.amin(dim=1).mean(),
            "codes/farthest_distance": distances.amax(dim=1).mean(),
        }

    def draw(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """Vectors (B, latent_dim) of codes drawn with the probabilities of the logits (B, K).

        Args:
            uniform: (B,), uniform in [0, 1), picks the code.
        """
        # Sums by a triangular matrix: `cumsum` of floats on CUDA is not the same every time.
        probabilities = logits.softmax(dim=1)
        upto = torch.ones(logits.shape[1], logits.shape[1], device=logits.device, dtype=probabilities.dtype)
        below = probabilities @ upto.triu() <= uniform[:, None]
        return self.vectors[below.sum(dim=1).clamp(max=logits.shape[1] - 1)]


@torch.no_grad()
def end_window(
    codebook: Codebook, prior_out: nn.Linear | None, averaged: AveragedPolicy, seed: int, replace: bool
) -> dict[str, Tensor]:
    """Look at how codes were used; early in training, replace those that were not.

    A code used less than a tenth of its share becomes a copy of one that is in use, popular ones more often,
    so that one that serves too many gets company; the prior takes them for the same at first. The copy is
    moved by a tenth of the distance of a sample to its code: whatever the size of a cluster, this cuts it in
    two, while a longer way, in a random one of many directions, would lead out of it. Nothing waits for the
    device, and all processes do the same.

    Args:
        prior_out: last layer of a prior over the codes, with a row for each.
        averaged: of the policy that they belong to.
        seed: of the choice and the moves; another one each time.
        replace: whether training is early enough.

    Returns:
        Metrics: those of `Codebook.diagnostics`, and the number of codes replaced.
    """
    total = codebook.counts.sum()  # 0 if every step of the window was skipped: nothing is known then
    codebook.usage.copy_(torch.where(total > 0, codebook.counts / total.clamp(min=1), codebook.usage))
    codebook.counts.zero_()
    num_codes = len(codebook.usage)
    unused = (codebook.usage < 0.1 / num_codes) & (total > 0)
    generator = torch.Generator(codebook.usage.device).manual_seed(seed)
    popular = torch.where(unused, 0.0, codebook.usage.clamp(min=1e-9))
    source = torch.multinomial(popular, num_codes, replacement=True, generator=generator)
    spread = codebook.error.nan_to_num(0.0, 0.0).sqrt()  # a batch with bad numbers must not reach the codes
    noise = torch.randn(codebook.vectors.shape, generator=generator, device=spread.device)
    metrics = codebook.diagnostics()
    replaced = torch.zeros_like(unused)
    if replace and codebook.vectors.requires_grad:
        replaced = unused
        averaged.replace_rows(codebook.vectors, replaced, codebook.vectors[source] + 0.1 * spread * noise)
        if prior_out is not None and prior_out.weight.requires_grad:
            averaged.replace_rows(prior_out.weight, replaced, prior_out.weight[source])
            averaged.replace_rows(prior_out.bias, replaced, prior_out.bias[source])
    return {**metrics, "codes/replaced": replaced.sum()}
