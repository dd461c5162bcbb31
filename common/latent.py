"""Latents that select one of several ways to act: normal, or a vector of a codebook.

In training, a posterior network infers the latent from the recorded chunk; a prior network predicts it from
the observation. Both kinds of latent have the same methods, which interpret the networks' outputs.
"""

import copy
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Subset

from common import losses, vision
from common.data import ChunkDataset, evenly_spaced
from common.errors import UserError
from common.normalize import Normalizer
from common.optim import AveragedPolicy, move_average


class Inferred(NamedTuple):
    """Latents of B recorded chunks, M draws of each, and their losses."""

    z: Tensor
    """(B * M, latent_dim)."""
    divergence: Tensor
    """What a chunk's latent tells beyond the prior, for the posterior alone to learn from: the KL divergence
    KL(q || sg(p)), nats, (B, latent_dim). A code may tell as much as it can: (B, 0)."""
    prior_loss: Tensor
    """What the prior, and whatever feeds it, learns from, nats, a scalar: the mean of KL(sg(q) || p), summed
    over dimensions; for codes, of -log p(code | s)."""
    commitment: Tensor
    """Mean squared distance of the posterior's outputs from their codes, a scalar; 0 without codes."""
    counted: Tensor
    """The argument of `count`, before it is summed over processes: one dimension."""
    metrics: dict[str, Tensor]
    """Scalars to log."""


class Usage(nn.Module):
    """How often each of K choices is used: `shares` in the last window of training, `counts` since then."""

    def __init__(self, num: int):
        super().__init__()
        self.register_buffer("shares", torch.full((num,), 1 / num))
        self.register_buffer("counts", torch.zeros(num))

    @torch.no_grad()
    def end_window(self) -> tuple[Tensor, Tensor]:
        """Start the next window; returns `shares` (K,) and the number of samples in the last one."""
        total = self.counts.sum()  # 0 if every step of the window was skipped: shares are unknown then
        self.shares.copy_(torch.where(total > 0, self.counts / total.clamp(min=1), self.shares))
        self.counts.zero_()
        return self.shares, total


class NormalLatent(nn.Module):
    """A diagonal normal, whose mean and, unless `unit_variances`, log variances posterior and prior give."""

    def __init__(self, unit_variances: bool = False):
        super().__init__()
        self.unit_variances = unit_variances

    def parameters_of(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """Means and log variances, each (B, latent_dim), from a network's output."""
        if self.unit_variances:
            return output, torch.zeros_like(output)
        mean, log_var = output.chunk(2, dim=-1)
        return mean, 8 * torch.tanh(log_var / 8)  # beyond e^8 there is only overflow

    def infer(self, posterior, prior, seen, flow_samples, train) -> Inferred:
        mean, log_var = self.parameters_of(posterior)
        prior_mean, prior_log_var = self.parameters_of(prior)
        divergence = losses.gaussian_kl(mean, log_var, prior_mean.detach(), prior_log_var.detach())
        prior_loss = losses.gaussian_kl(mean.detach(), log_var.detach(), prior_mean, prior_log_var)
        z = mean.repeat_interleave(flow_samples, dim=0)
        if train:
            deviation = (0.5 * log_var).exp().repeat_interleave(flow_samples, dim=0)
            z = z + deviation * torch.randn_like(z)
        none = torch.zeros(1, device=z.device)
        metrics = {"latent/active_dims": (divergence.mean(dim=0) > 0.05).sum()}
        prior_loss = prior_loss.sum(dim=1).mean()
        return Inferred(z, divergence, prior_loss, commitment=none[0], counted=none, metrics=metrics)

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
    """One of K code vectors: the posterior outputs a point near it, the prior logits of all K.

    The prior learns the codes that a slowly moving average of the posterior assigns. `null` (latent_dim,), if
    made with one, is the token for unconditional draws.
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
        self.register_buffer("error", torch.zeros(()))  # of the latest samples, see `Inferred.commitment`

    def assign(self, posterior: Tensor) -> tuple[Tensor, Tensor]:
        """The posterior's output at a fixed scale, (B, latent_dim), and the index of its nearest code, (B,).

        Without it, the posterior could grow to escape NSVQ's noise, or shrink to escape the commitment loss.
        """
        point = F.layer_norm(posterior, posterior.shape[-1:])
        return point, losses.nearest_code(point, self.vectors)

    def infer(
        self, posterior: Tensor, prior: Tensor, seen: tuple[Tensor, ...], flow_samples: int, train: bool
    ) -> Inferred:
        """M = `flow_samples` latents of each chunk: drawn in training, otherwise the most probable.

        `posterior` and `prior` are outputs of the networks, (B, ...), and `seen` are the posterior's inputs.
        """
        point, code = self.assign(posterior)
        quantized = self.vectors[code]
        with torch.no_grad():
            _, target = self.assign(self.posterior_average(*seen))
        prior_loss = F.cross_entropy(prior, target)
        z = quantized.repeat_interleave(flow_samples, dim=0)
        if train and len(self.vectors) > 1:  # one code tells nothing, and its noise must not, either
            repeated = point.repeat_interleave(flow_samples, dim=0)
            z = losses.noise_substitution(repeated, z, torch.randn_like(z))
        commitment = (point - quantized.detach()).square().mean()
        samples = F.one_hot(code, len(self.vectors)).sum(dim=0)
        error = torch.stack([commitment.detach(), torch.ones_like(commitment)])  # and their number
        probabilities = prior.detach().softmax(dim=1)
        metrics = {
            "loss/commitment": commitment,
            "prior/accuracy": (probabilities.argmax(dim=1) == target).float().mean(),
            "prior/entropy": torch.special.entr(probabilities).sum(dim=1).mean(),
        }
        none = torch.zeros(len(prior), 0, device=prior.device)
        return Inferred(z, none, prior_loss, commitment, torch.cat([samples, error]), metrics)

    def most_probable(self, posterior: Tensor) -> Tensor:
        """Latents (B, latent_dim) that the posterior finds most probable."""
        return self.vectors[self.assign(posterior)[1]]

    def draw(self, prior: Tensor, noise: Tensor) -> Tensor:
        """Latents (B, latent_dim) from the prior; `noise` (B, latent_dim), standard normal, picks them."""
        return self.vectors[_pick(prior.softmax(dim=1), torch.special.ndtr(noise[:, :1]))]

    def count(self, counted: Tensor) -> None:
        """Record a batch's use of the codes: `Inferred.counted`, summed over processes."""
        self.usage.counts += counted[:-2]
        self.error.copy_(counted[-2] / counted[-1])

    def follow(self, posterior: nn.Module, updates: int, decay: float) -> None:
        """Move the averaged posterior after an optimizer step; `updates` counts earlier moves."""
        move_average(self.posterior_average.parameters(), posterior.parameters(), updates, decay)

    @torch.no_grad()
    def end_window(
        self, prior_out: nn.Linear, average: AveragedPolicy, seed: int, replace: bool
    ) -> dict[str, Tensor]:
        """Check the use of the codes and, if `replace`, replace unused ones. Returns metrics.

        A code used less than a tenth of its share becomes a copy of one in use, preferably of a popular one;
        so does its row in the prior's last layer, `prior_out`. The copy is moved by a tenth of the distance
        of a sample to its code: that cuts a cluster of any size in two, while a larger move in a random
        direction, of many, would leave it. Nothing waits for the device. All processes do the same: they
        share the `seed`, a new one each time.
        """
        (usage, total), num_codes = self.usage.end_window(), len(self.vectors)
        unused = (usage < 0.1 / num_codes) & (total > 0)
        generator = torch.Generator(usage.device).manual_seed(seed)
        popular = torch.where(unused, 0.0, usage.clamp(min=1e-9))
        source = _pick(
            popular / popular.sum(), torch.rand(num_codes, 1, generator=generator, device=usage.device)
        )
        spread = self.error.nan_to_num(0.0, 0.0).sqrt()  # a batch with bad numbers must not reach the codes
        noise = torch.randn(self.vectors.shape, generator=generator, device=spread.device)
        metrics = self.diagnostics()
        replaced = unused & (replace and self.vectors.requires_grad)
        average.replace_rows(self.vectors, replaced, self.vectors[source] + 0.1 * spread * noise)
        for parameter in (prior_out.weight, prior_out.bias):
            if parameter.requires_grad:
                average.replace_rows(parameter, replaced, parameter[source])
        return {**metrics, "codes/replaced": replaced.sum()}

    def diagnostics(self) -> dict[str, Tensor]:
        """Perplexity of the usage, number of codes in use, distances to nearest and farthest codes."""
        vectors, usage = self.vectors.detach(), self.usage.shares
        distances = torch.cdist(vectors, vectors)
        others = distances + torch.diag(torch.full_like(usage, torch.inf))
        return {
            "codes/perplexity": torch.special.entr(usage).sum().exp(),
            "codes/in_use": (usage >= 0.1 / len(usage)).sum(),
            "codes/nearest_distance": others.amin(dim=1).mean(),
            "codes/farthest_distance": distances.amax(dim=1).mean(),
        }


def _pick(probabilities: Tensor, places: Tensor) -> Tensor:
    """Where `places` (N, 1), uniform in [0, 1), fall among K `probabilities`, (K,) or (N, K); (N,).

    As `torch.multinomial`, and sums under a triangular mask, because both are not deterministic on CUDA.
    """
    num = probabilities.shape[-1]
    upto = torch.ones(num, num, device=probabilities.device).tril()
    sums = (probabilities.float().unsqueeze(-2) * upto).sum(dim=-1)  # a product in bf16 would lose rare codes
    return (sums <= places).sum(dim=-1).clamp(max=num - 1)


@torch.no_grad()
def first_latents(
    policy: nn.Module, dataset: ChunkDataset, normalizer: Normalizer, most: int, batch_size: int = 64
) -> tuple[Tensor, Tensor]:
    """Latents (N, latent_dim) of the episodes' first chunks, and the steps where these start, (N,).

    Uses at most `most` episodes, evenly spaced. The policy has `encode`, `posterior` and `latent`.
    """
    first = Subset(dataset, np.flatnonzero(np.isin(dataset.rows, dataset.store.episode_starts)).tolist())
    found = []
    for _, batch in evenly_spaced(first, min(most, len(first)), batch_size):
        batch = batch.to(normalizer.action_scale.device)
        proprio, chunks = normalizer.proprio(batch.proprio), normalizer.actions(batch.actions, batch.proprio)
        head_tokens, _ = policy.encode(vision.to_float(batch.images), proprio, batch.task)
        posterior = policy.posterior(proprio, head_tokens, chunks, batch.is_pad)
        found.append((policy.latent.most_probable(posterior), batch.index))
    latents, steps = zip(*found, strict=True)
    return torch.cat(latents), torch.cat(steps)
