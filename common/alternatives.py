"""What a policy with a latent can do, and what it makes of recorded chunks, in pictures."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from common import plots, vision
from common.data import Batch, ChunkDataset, evenly_spaced
from common.normalize import Normalizer


def draw_chunks(
    path: Path,
    batch: Batch,
    chunks: Tensor,
    normalizer: Normalizer,
    names: Sequence[str],
    shares: dict[str, Tensor],
    what: str,
) -> None:
    """Picture of chunks (K, T, A), normalized, for the one observation of a batch; see `plots.draw_chunks`.

    `what` says, for the title, of what there are K.
    """
    chunks = normalizer.unnormalize_actions(chunks, batch.proprio.expand(len(chunks), -1, -1))
    plots.draw_chunks(
        path,
        chunks.cpu().numpy(),
        recorded=batch.actions[0][~batch.is_pad[0]].cpu().numpy(),
        names=names,
        scale=normalizer.action_scale.cpu().numpy(),
        shares={name: share.cpu().numpy() for name, share in shares.items()},
        title=f"the chunk of each of {len(chunks)} {what} at the start of a held-out episode",
    )


def draw_latents(path: Path, latents: Tensor, labels: dict[str, Tensor]) -> None:
    """Picture of the latents (N, latent_dim) of `first_latents`, once for each labelling, (N,) integers."""
    labels = {name: values.cpu().numpy() for name, values in labels.items()}
    plots.draw_latents(path, latents.cpu().numpy(), labels, "latents of the chunks with which episodes begin")


@torch.no_grad()
def first_latents(
    policy: nn.Module, dataset: ChunkDataset, normalizer: Normalizer, most: int, batch_size: int = 64
) -> tuple[Tensor, Tensor]:
    """Latents (N, latent_dim) of the chunks with which episodes begin, and the steps they begin at, (N,).

    At most `most` episodes are looked at, evenly spaced. The policy has the parts `encode`, `posterior` and
    `latent`.
    """
    first = Subset(dataset, np.flatnonzero(np.isin(dataset.rows, dataset.store.episode_starts)).tolist())
    found = []
    for _, batch in evenly_spaced(first, min(most, len(first)), batch_size):
        batch = batch.to(normalizer.action_scale.device)
        proprio, chunks = normalizer.proprio(batch.proprio), normalizer.actions(batch.actions, batch.proprio)
        head_tokens, _ = policy.encode(vision.to_float(batch.images), proprio)
        posterior = policy.posterior(proprio, head_tokens, chunks, batch.is_pad)
        found.append((policy.latent.most_probable(posterior), batch.index))
    latents, steps = zip(*found, strict=True)
    return torch.cat(latents), torch.cat(steps)
