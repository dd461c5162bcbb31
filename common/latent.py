"""Latents that say in which of several ways a chunk goes: normal, or a vector of a codebook.

A posterior network reads the latent off the recorded chunk while training, a prior network predicts it from
the observation. Here is what their outputs mean, how a latent is drawn from them, and what it costs that the
prior did not expect it. Both kinds have the same methods, so that a script is the same with either.
"""

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import losses
from common.errors import UserError
from common.optim import AveragedPolicy, move_average


class Inferred(NamedTuple):
    """Latents of B recorded chunks, M draws of each, and what they cost."""

    z: Tensor
    """(B * M, latent_dim)."""
    divergence: Tensor
    """KL divergence of posterior from prior, nats: (B, latent_dim); of a code, -log p(code | s), (B, 1)."""
    commitment: Tensor
    """Mean squared distance of the posterior's outputs from their codes, a scalar; 0 without codes."""
    counted: Tensor
    """What `count` takes in, once it is summed over processes: one dimension."""
    metrics: dict[str, Tensor]
    """Scalars to log."""


class Usage(nn.Module):
    """How often each of K choices is taken, over all processes, in windows of training.

    `shares` are those of the last whole window, `counts` the samples since then, (K,) both.
    """

    def __init__(self, num: int):
        super().__init__()
        self.register_buffer("shares", torch.full((num,), 1 / num))
        self.register_buffer("counts", torch.zeros(num))

    @torch.no_grad()
    def end_window(self) -> tuple[Tensor, Tensor]:
        """Begin the next window; returns `shares`, and how many samples were in the last."""
        total = self.counts.sum()  # 0 if every step of the window was skipped: nothing is known then
        self.shares.copy_(torch.where(total > 0, self.counts / total.clamp(min=1), self.shares))
        self.counts.zero_()
        return self.shares, total


class NormalLatent(nn.Module):
    """A diagonal normal, whose mean and, unless `unit_variances`, log variances posterior and prior give.

    Its methods are those of `CodebookLatent`; it has nothing to count, to follow or to replace.
    """

    def __init__(self, unit_variances: bool = False):
        super().__init__()
        self.unit_variances = unit_variances

    def parameters_of(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance, each (B, latent_dim), from a network's output."""
        if self.unit_variances:
            return output, torch.zeros_like(output)
        mean, log_var = output.chunk(2, dim=-1)
        return mean, 8 * torch.tanh(log_var / 8)  # beyond e^8 is nothing but overflow

    def infer(self, posterior, prior, seen, flow_samples, train) -> Inferred:
        mean, log_var = self.parameters_of(posterior)
        divergence = losses.gaussian_kl(mean, log_var, *self.parameters_of(prior))
        z = mean.repeat_interleave(flow_samples, dim=0)
        if train:
            deviation = (0.5 * log_var).exp().repeat_interleave(flow_samples, dim=0)
            z = z + deviation * torch.randn_like(z)
        none = torch.zeros(1, device=z.device)
        metrics = {"latent/active_dims": (divergence.mean(dim=0) > 0.05).sum()}
        return Inferred(z, divergence, commitment=none[0], counted=none, metrics=metrics)

    def most_probable(self, posterior: Tensor) -> Tensor:
        return self.parameters_of(posterior)[0]

    def draw(self, prior: Tensor, noise: Tensor) -> Tensor:
        mean, log_var = self.parameters_of(prior)
        return mean + (0.5 * log_var).exp() * noise

    def count(self, counted) -> None:
        pass

    def follow(self, posterior, updates, decay) -> None:
        pass

    def end_window(self, prior_out, average, seed, replace) -> dict[str, Tensor]:
        return {}


class CodebookLatent(nn.Module):
    """One of K code vectors: the posterior gives a point near it, the prior logits of all K.

    The prior learns the codes that a slowly moving average of the posterior assigns.

    Attributes:
        vectors: (K, latent_dim), at the start of mean 0 and variance 1 each.
        null: (latent_dim,), token of unconditional draws, of a codebook made with one.
        error: of the latest samples, mean squared distance to their codes, in each dimension.
    """

    def __init__(self, num_codes: int, latent_dim: int, posterior: nn.Module, null: bool = False):
        super().__init__()
        if latent_dim < 2:
            raise UserError(f"A code needs 2 dimensions or more, not {latent_dim}: make the latent wider.")
        self.vectors = nn.Parameter(F.layer_norm(torch.randn(num_codes, latent_dim), (latent_dim,)))
        if null:
            self.null = nn.Parameter(torch.randn(latent_dim) * 0.02)
        self.posterior_average = copy.deepcopy(posterior).requires_grad_(False)
        self.usage = Usage(num_codes)
        self.register_buffer("error", torch.zeros(()))

    def assign(self, posterior: Tensor) -> tuple[Tensor, Tensor]:
        """The posterior's output at a fixed scale, (B, latent_dim), and the index of its nearest code, (B,).

        With a fixed scale, neither the noise of NSVQ nor the commitment loss can be escaped by growing or
        shrinking.
        """
        point = F.layer_norm(posterior, posterior.shape[-1:])
        return point, losses.nearest_code(point, self.vectors)

    def infer(
        self, posterior: Tensor, prior: Tensor, seen: tuple[Tensor, ...], flow_samples: int, train: bool
    ) -> Inferred:
        """M = `flow_samples` latents of each recorded chunk.

        Args:
            posterior, prior: outputs of the two networks, (B, ...).
            seen: what the posterior was given.
            train: draw them, instead of taking the most probable.
        """
        point, code = self.assign(posterior)
        quantized = self.vectors[code]
        with torch.no_grad():
            _, target = self.assign(self.posterior_average(*seen))
        divergence = F.cross_entropy(prior, target, reduction="none").unsqueeze(1)
        z = quantized.repeat_interleave(flow_samples, dim=0)
        if train:
            repeated = point.repeat_interleave(flow_samples, dim=0)
            z = losses.noise_substitution(repeated, z, torch.randn_like(z))
        commitment = (point - quantized.detach()).square().mean()
        samples = F.one_hot(code, len(self.vectors)).sum(dim=0)
        error = torch.stack([commitment.detach(), torch.ones_like(commitment)])  # and how many such errors
        probabilities = prior.detach().softmax(dim=1)
        metrics = {
            "loss/commitment": commitment,
            "prior/accuracy": (probabilities.argmax(dim=1) == target).float().mean(),
            "prior/entropy": torch.special.entr(probabilities).sum(dim=1).mean(),
        }
        return Inferred(z, divergence, commitment, torch.cat([samples, error]), metrics)

    def most_probable(self, posterior: Tensor) -> Tensor:
        """Latents (B, latent_dim) that the posterior finds most probable."""
        return self.vectors[self.assign(posterior)[1]]

    def draw(self, prior: Tensor, noise: Tensor) -> Tensor:
        """Latents (B, latent_dim) from the prior; `noise` (B, latent_dim), standard normal, picks them."""
        # Sums by a triangular matrix: `cumsum` of floats on CUDA is not the same every time.
        probabilities = prior.softmax(dim=1)
        upto = torch.ones(prior.shape[1], prior.shape[1], device=prior.device, dtype=probabilities.dtype)
        below = probabilities @ upto.triu() <= torch.special.ndtr(noise[:, :1])
        return self.vectors[below.sum(dim=1).clamp(max=prior.shape[1] - 1)]

    def count(self, counted: Tensor) -> None:
        """Take in how a batch used the codes: `Inferred.counted`, summed over processes."""
        self.usage.counts += counted[:-2]
        self.error.copy_(counted[-2] / counted[-1])

    def follow(self, posterior: nn.Module, updates: int, decay: float) -> None:
        """Move the averaged posterior after an optimizer step; `updates` is how often it moved before."""
        move_average(self.posterior_average.parameters(), posterior.parameters(), updates, decay)

    @torch.no_grad()
    def end_window(
        self, prior_out: nn.Linear, average: AveragedPolicy, seed: int, replace: bool
    ) -> dict[str, Tensor]:
        """Look at how codes were used and, if `replace`, replace those that were not. Returns metrics.

        A code used less than a tenth of its share becomes a copy of one that is in use, popular ones more
        often, so that one that serves too many gets company; the prior takes them for the same at first. The
        copy is moved by a tenth of the distance of a sample to its code: whatever the size of a cluster, this
        cuts it in two, while a longer way, in a random one of many directions, would lead out of it. Nothing
        waits for the device, and all processes do the same.

        Args:
            prior_out: last layer of the prior, with a row for each code.
            average: of the policy that they belong to.
            seed: another one each time.
        """
        (usage, total), num_codes = self.usage.end_window(), len(self.vectors)
        unused = (usage < 0.1 / num_codes) & (total > 0)
        generator = torch.Generator(usage.device).manual_seed(seed)
        popular = torch.where(unused, 0.0, usage.clamp(min=1e-9))
        source = torch.multinomial(popular, num_codes, replacement=True, generator=generator)
        spread = self.error.nan_to_num(0.0, 0.0).sqrt()  # a batch with bad numbers must not reach the codes
        noise = torch.randn(self.vectors.shape, generator=generator, device=spread.device)
        metrics = self.diagnostics()
        replaced = unused & (replace and self.vectors.requires_grad)
        average.replace_rows(self.vectors, replaced, self.vectors[source] + 0.1 * spread * noise)
        if prior_out.weight.requires_grad:
            average.replace_rows(prior_out.weight, replaced, prior_out.weight[source])
            average.replace_rows(prior_out.bias, replaced, prior_out.bias[source])
        return {**metrics, "codes/replaced": replaced.sum()}

    def diagnostics(self) -> dict[str, Tensor]:
        """Perplexity of the usage, codes in use, distances to nearest and farthest codes."""
        vectors, usage = self.vectors.detach(), self.usage.shares
        distances = torch.cdist(vectors, vectors)
        others = distances + torch.diag(torch.full_like(usage, torch.inf))
        return {
            "codes/perplexity": torch.special.entr(usage).sum().exp(),
            "codes/in_use": (usage >= 0.1 / len(usage)).sum(),
            "codes/nearest_distance": others.amin(dim=1).mean(),
            "codes/farthest_distance": distances.amax(dim=1).mean(),
        }
