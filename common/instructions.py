"""Instructions: how a policy of several tasks is told which one to do.

A sentence becomes one vector or a few: learned for each known instruction, or the output of a frozen text
encoder (`common/text.py`). `InfoEmbedder` adds all of them to the memory, and the last one to the summary.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import AfterValidator
from torch import Tensor, nn

from common.config import Share, options
from common.console import say
from common.data.store import EpisodeStore
from common.data.tasks import listed
from common.errors import UserError

MOST_LEARNED = 1000  # instructions; more are descriptions of a few episodes each: for a text encoder


def _in_full(name: str | None) -> str | None:
    """A local model by its absolute path: a run may be resumed from another working directory."""
    if name in (None, "none", "index"):
        return name
    path = Path(name).expanduser()
    return str(path.absolute()) if path.exists() else name


@options
class TaskConfig:
    """How a policy of several tasks is told which one to do."""

    task_encoder: Annotated[str | None, AfterValidator(_in_full)] = None
    """`index`, a learned embedding of each instruction; `none`, the policy is not told; or a frozen text
    encoder by name or folder, such as CLIP, SigLIP, T5 or a sentence encoder, which also takes new sentences.
    Default: index if there are several instructions."""
    task_tokens: Literal["pooled", "all"] = "pooled"
    """Text encoders: a sentence as one vector, or also word by word."""
    task_dropout: Share = 0.1
    """Share of the training samples that lose their instruction, so that the policy can act without one."""


@dataclass(frozen=True)
class Instructions:
    """The instructions that a policy was trained on.

    Attributes:
        sentences: each once, in alphabetical order.
        encoder: `index`, or the name of a text encoder.
        droppable: whether the policy has learned to act without an instruction.
        identity: identifies a text encoder, see `TextEncoder`.
        shape: (L, D): a text encoder gives L vectors per sentence, the last for all of it.
        table: those vectors, (S, L, D) float32; None once the network has them, as its weights do.
    """

    sentences: tuple[str, ...]
    encoder: str = "index"
    droppable: bool = False
    identity: tuple[Any, ...] = ()
    shape: tuple[int, ...] = ()
    table: Any = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, store: EpisodeStore, config: TaskConfig) -> Instructions | None:
        """The instructions of a dataset; None if the policy is not to be told.

        By default it is told if there are several. If asked for, one is enough: a policy of several tasks
        can then be trained further (`--init-from`) on one.

        Raises:
            UserError: if only some episodes have an instruction, a text is not UTF-8, there are too many to
                learn, or the text encoder cannot be loaded.
        """
        sentences = store.instructions
        if config.task_encoder not in (None, "none") and not sentences:
            raise UserError(
                f"--task-encoder {config.task_encoder}: {store.source} states no instruction: say where with "
                f"--task-key, or leave --task-encoder out."
            )
        if config.task_encoder == "none" or not sentences:
            return None
        silent = np.flatnonzero(store.episode_task_numbers < 0)
        if len(silent):
            stated = "none" if store.episode_tasks[silent[0]] is None else "an empty one"
            raise UserError(
                f"{store.source} has {len(silent)} episodes without an instruction, but others have one (the "
                f"first is {store.episode_indices[silent[0]]}, which has {stated}): choose "
                f"with --task, or give --task-encoder none."
            )
        broken = [sentence for sentence in sentences if "\ufffd" in sentence]
        if broken:
            raise UserError(
                f'{store.source}: the instruction "{broken[0]}" is not UTF-8 text: write it again, or give '
                f"--task-encoder none."
            )
        if len(sentences) < 2 and config.task_encoder is None:
            return None
        encoder = config.task_encoder or "index"
        if encoder == "index" and len(sentences) > MOST_LEARNED:
            raise UserError(
                f"{store.source} has {len(sentences)} different instructions, too many to learn each: give a "
                f"text encoder as --task-encoder, choose with --task, or give --task-encoder none."
            )
        table, identity, shape = None, (), ()
        if encoder != "index":
            from common.text import encode_once  # it imports this module

            table, identity = encode_once(store, encoder, config.task_tokens)
            shape = tuple(table.shape[1:])
        how = "a learned embedding of each" if table is None else f"encoded by {encoder}"
        say(f"{len(sentences)} instructions, {how}: {listed(sentences, 3)}")
        return cls(sentences, encoder, config.task_dropout > 0, identity, shape, table)


def drop_some(task: Tensor | None, config: TaskConfig) -> Tensor | None:
    """Instructions (B,) of training samples, with a share of them lost: -1."""
    if task is None or not config.task_dropout:
        return task
    lost = torch.rand(len(task), device=task.device) < config.task_dropout
    return torch.where(lost, -1, task)


class InstructionEmbedder(nn.Module):
    """Vectors of instructions, and one for none, which is always learned.

    Of another policy's weights (`--init-from`) it takes the vectors of sentences that both know, and leaves
    its others. What a text encoder gives stays in the coordinates that the projection was trained with.
    """

    constant = True  # training changes no buffer

    def __init__(self, known: Instructions, d_model: int):
        super().__init__()
        names = [json.dumps(known.identity), *known.sentences]
        self.register_buffer("names", torch.tensor([_number(name) for name in names]))
        self.register_load_state_dict_pre_hook(_match)
        if known.encoder == "index":
            self.table = nn.Parameter(torch.randn(len(known.sentences), 1, d_model))
            self.none, self.project = nn.Parameter(torch.randn(1, d_model)), nn.Identity()
            return
        if not known.shape:
            raise UserError(
                "The policy was trained by an earlier version, which kept its sentences' vectors elsewhere: "
                "train it again."
            )
        table = torch.zeros(len(known.sentences), *known.shape) if known.table is None else known.table
        self.register_buffer("table", table)
        # Most of a text encoder's output is the same for all sentences, and tells nothing apart.
        whole = table[:, -1].mean(dim=0)
        token = table[:, :-1].mean(dim=(0, 1)) if table.shape[1] > 1 else whole
        self.register_buffer("centre", torch.stack([token, whole]))  # (2, D_text): of a token, of a sentence
        spread, size = (x.square().mean().sqrt() for x in (table - self._rows(self.centre, table), table))
        self.register_buffer("scale", torch.where(spread > 1e-5 * size, spread, size).clamp(min=1e-6))
        self.none = nn.Parameter(torch.randn(2, known.shape[1]))
        self.project = nn.Linear(known.shape[1], d_model)

    @staticmethod
    def _rows(two: Tensor, vectors: Tensor) -> Tensor:
        """What there is for a token and for a sentence, (2, D), for L vectors (..., L, D): (L, D)."""
        return torch.cat([two[:1].expand(vectors.shape[-2] - 1, -1), two[1:]])

    def forward(self, task: Tensor) -> Tensor:
        """(B, L, D), the last for the whole sentence.

        Args:
            task: (B,), indices of known sentences, -1 for none; or the text encoder's output for any
                sentences, (B, L, D_text), NaN for none.
        """
        if task.is_floating_point():
            vectors, lost = task, task.isnan()
        else:
            vectors, lost = self.table[task.clamp(min=0)], (task < 0)[:, None, None]
        if isinstance(self.project, nn.Identity):
            return torch.where(lost, self.none, vectors)
        vectors = (vectors - self._rows(self.centre, vectors)) / self.scale
        return self.project(torch.where(lost, self._rows(self.none, vectors), vectors))


def _number(name: str) -> int:
    """A name as 64 bits."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little", signed=True)


def _match(embedder: InstructionEmbedder, state: dict, prefix: str, *others: Any) -> None:
    """Before weights are loaded: arrange their table by the embedder's own sentences."""
    own, table = embedder.names, f"{prefix}table"
    theirs = state.get(f"{prefix}names", own)
    state[f"{prefix}names"] = own
    if torch.equal(theirs.to(own.device), own) or table not in state:
        return
    if theirs[0] != own[0]:
        others[-1].append("its instructions were read by another text encoder")
        return
    made = embedder.table.detach().clone()
    if isinstance(embedder.project, nn.Identity):  # else all are given
        places = {name: place for place, name in enumerate(theirs[1:].tolist())}
        for row, name in enumerate(own[1:].tolist()):
            if name in places:
                made[row] = state[table][places[name]]
    state[table] = made
