"""Transformers: attention, an encoder, a decoder conditioned on flow time."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import flow
from common.errors import UserError
from common.instructions import InstructionEmbedder, Instructions

Linear = Callable[[int, int], nn.Module]
"""Makes a layer, given its numbers of inputs and outputs."""
KeysValues = tuple[Tensor, Tensor]
Shape = tuple[int, int]


class Size(NamedTuple):
    """Size of a transformer's blocks."""

    d_model: int
    num_heads: int


class StackedLinear(nn.Module):
    """E linear layers, applied in one batched product: (E, ..., in) -> (E, ..., out).

    A block made with these instead of `nn.Linear` is E blocks that run as one.
    """

    def __init__(self, num_experts: int, in_features: int, out_features: int):
        super().__init__()
        bound = 1 / math.sqrt(in_features)  # as nn.Linear draws them
        shapes = (num_experts, in_features, out_features), (num_experts, out_features)
        self.weight, self.bias = (nn.Parameter(torch.empty(s).uniform_(-bound, bound)) for s in shapes)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.baddbmm(self.bias.unsqueeze(1), x.flatten(1, -2), self.weight)
        return out.unflatten(1, x.shape[1:-1])


def take_expert(module: nn.Module, expert: int | Tensor) -> nn.Module:
    """The module with only one expert of each stacked layer, for inference.

    With a number, the expert shares the layers' memory. With an index (1,) on the device, its weights are
    copied there, which costs microseconds on a GPU, and nothing waits to read the index. For a compiled
    integration they are copied to the same place every time: a graph whose weights have moved is captured
    again. So only one thread may then sample, as `RobotPolicy.compile` sees to.
    """
    if isinstance(expert, int) or not flow.is_compiled():
        return _take(module, expert)
    taken = _taken.get(module)
    if taken is None or next(taken.parameters()).device != expert.device:
        taken = _taken[module] = _take(module, expert)
    for whole, one in zip(_stacked(module), _stacked(taken), strict=True):
        for name, parameter in one._parameters.items():
            torch.index_select(whole._parameters[name], 0, expert, out=parameter)
    return taken


_taken: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()


def _stacked(module: nn.Module) -> list[StackedLinear]:
    return [layer for layer in module.modules() if isinstance(layer, StackedLinear)]


def _take(module: nn.Module, expert: int | Tensor) -> nn.Module:
    taken = copy.copy(module)
    children = {name: _take(child, expert) for name, child in module.named_children()}
    parameters = dict(module._parameters)  # also those that are None
    if isinstance(module, StackedLinear):
        slices = isinstance(expert, int)
        parameters = {
            name: p[expert : expert + 1] if slices else p.index_select(0, expert)
            for name, p in parameters.items()
        }
    taken.__dict__.update(_modules=children, _parameters=parameters)
    if module._compiled_call_impl is not None:  # a copy loses this; all of them run the same code
        taken.compile(dynamic=False)
    return taken


class Attention(nn.Module):
    """Multi-head attention of x to itself, or to a context by its `keys_values`."""

    def __init__(self, d_model: int, num_heads: int, linear: Linear = nn.Linear):
        super().__init__()
        if d_model % num_heads:
            raise UserError(f"--d-model {d_model} must be a multiple of --num-heads {num_heads}.")
        self.num_heads = num_heads
        self.query = linear(d_model, d_model)
        self.key_value = linear(d_model, 2 * d_model)
        self.out = linear(d_model, d_model)

    def keys_values(self, context: Tensor) -> KeysValues:
        """(..., L, D) -> keys and values, each (..., heads, L, D / heads)."""
        return tuple(self._heads(part) for part in self.key_value(context).chunk(2, dim=-1))

    def forward(
        self, x: Tensor, context: KeysValues | None = None, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """(..., L, D) -> (..., L, D), of E experts (E, B, L, D); causal: position i sees positions <= i only.

        `mask` (B, L of the keys) is False where a key must not be seen, the same for all experts.
        """
        keys, values = self.keys_values(x) if context is None else context
        queries, stack = self._heads(self.query(x)), x.shape[:-3]
        if mask is not None:
            mask = mask[:, None, None, :].repeat(math.prod(stack), 1, 1, 1)  # expert by expert
        if stack:  # fused kernels take one batch dimension
            queries, keys, values = (part.flatten(0, -4) for part in (queries, keys, values))
        seen = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=causal)
        return self.out(seen.transpose(-3, -2).reshape(x.shape))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)


def zeroed(layer: nn.Module) -> nn.Module:
    """The layer, with weights and biases of zero."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def mlp(inputs: int, hidden: int, outputs: int, linear: Linear = nn.Linear) -> nn.Sequential:
    """Two layers; SiLU costs half of what GELU does on a CPU and learns as well."""
    return nn.Sequential(linear(inputs, hidden), nn.SiLU(), linear(hidden, outputs))


class EncoderBlock(nn.Module):
    """Self-attention and an MLP, each behind a norm."""

    def __init__(self, d_model: int, num_heads: int):
        super().__init__()
        self.norm_attention, self.norm_mlp = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.attention, self.mlp = Attention(d_model, num_heads), mlp(d_model, 4 * d_model, d_model)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, L, D) -> (B, L, D); mask (B, L) is False for tokens to ignore."""
        x = x + self.attention(self.norm_attention(x), mask=mask)
        return x + self.mlp(self.norm_mlp(x))


class Encoder(nn.Module):
    """Encoder blocks and a final norm; arguments as for a block."""

    def __init__(self, size: Size, num_layers: int):
        super().__init__()
        self.blocks = nn.ModuleList(EncoderBlock(*size) for _ in range(num_layers))
        self.norm = nn.LayerNorm(size.d_model)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)


class Observation(NamedTuple):
    """What a decoder is conditioned on."""

    memory: Tensor
    """Fused tokens to attend to, (B, L, D)."""
    summary: Tensor
    """One vector for all of it, (B, D), that did not pass through attention."""

    def detach(self) -> "Observation":
        """Without gradient, for a network that must not train what made the observation."""
        return Observation(self.memory.detach(), self.summary.detach())


class InfoEmbedder(nn.Module):
    """Fuses all views, whose tokens and summaries have the `widths`, with joint states (K, P).

    A view is a frame of a camera, or depth. Each has its own projection and embedding. So do earlier frames:
    otherwise the sum of the summaries would not depend on their order, and so not on motion.

    `droppable` adds tokens that stand for a lost camera. Without camera dropout they would never get a
    gradient, which DistributedDataParallel treats as an error.

    With `tasks`, the policy is told which one: by tokens of the memory, and by a part of the summary, a scale
    for each channel of the cameras' tokens and summaries, and a scale and a shift inside each backbone that
    has a film dimension (FiLM, Perez et al. 2018), which start without effect: in the summary, a vector of
    its size would drown what cameras see. A backbone that knows what to look for learns to find it from far
    fewer scenes (docs/methods.md).
    """

    def __init__(
        self,
        widths: Sequence[Shape],
        proprio: Shape,
        size: Size,
        num_layers: int,
        droppable: bool = False,
        tasks: Instructions | None = None,
        film_dims: Sequence[int] = (),
    ):
        """`film_dims`: that of each backbone."""
        super().__init__()
        (proprio_history, state_dim), d_model = proprio, size.d_model
        self.tokens_in = nn.ModuleList(nn.Linear(token_dim, d_model) for token_dim, _ in widths)
        self.summary_in = nn.ModuleList(nn.Linear(summary_dim, d_model) for _, summary_dim in widths)
        self.proprio_in = nn.Linear(state_dim, d_model)
        self.proprio_position = nn.Parameter(torch.zeros(proprio_history, d_model))
        self.camera_embedding = nn.Parameter(torch.randn(len(widths), d_model) * 0.02)
        if droppable:
            self.missing = nn.Parameter(torch.randn(len(widths), d_model) * 0.02)
        self.encoder = Encoder(size, num_layers)
        self.instruction = None if tasks is None else InstructionEmbedder(tasks, d_model)
        if tasks is not None:
            self.scale, self.instruction_in = (zeroed(nn.Linear(d_model, d_model)) for _ in range(2))
            # Not in the backbones: their weights fit policies of one task and of several.
            self.films = nn.ModuleList(zeroed(nn.Linear(d_model, 2 * dim)) for dim in film_dims if dim)

    def film(self, task: Tensor | None) -> list[Tensor]:
        """Scales and shifts by the instruction for `vision.look`, (B, 2 film_dim) of each backbone."""
        if self.instruction is None:
            return []
        if task is None:
            raise ValueError("the policy was made for several instructions: give `task`")
        told = self.instruction(task)[:, -1]
        return [film(told) for film in self.films]

    def forward(
        self,
        views: Sequence[tuple[Tensor, Tensor]],
        proprio: Tensor,
        dropped: Tensor | None = None,
        task: Tensor | None = None,
    ) -> Observation:
        """A memory of K + V (L + 1) tokens and the instruction's, and the sum of the states' tokens, the V
        views' summary tokens and that of the whole instruction.

        Args:
            views: the tokens (B, L, D_v) and summary (B, D_s) of each, camera by camera.
            proprio: (B, K, P), normalized.
            dropped: (B, N), True where a sample has lost a camera, with all of its frames.
            task: see `InstructionEmbedder`; needed if there is one.
        """
        memory = [self.proprio_in(proprio) + self.proprio_position]
        if dropped is not None:
            dropped = dropped.repeat_interleave(len(views) // dropped.shape[1], dim=1)  # (B, V)
        if self.instruction is not None:
            instruction = self.instruction(task)
            scale = 1 + self.scale(instruction[:, -1:])  # (B, 1, D)
        for n, (tokens, summary) in enumerate(views):
            tokens = torch.cat([self.tokens_in[n](tokens), self.summary_in[n](summary).unsqueeze(1)], dim=1)
            if self.instruction is not None:
                tokens = tokens * scale
            if dropped is not None:
                tokens = torch.where(dropped[:, n, None, None], self.missing[n], tokens)
            memory.append(tokens + self.camera_embedding[n])
        summary = memory[0].sum(dim=1) + sum(tokens[:, -1] for tokens in memory[1:])
        if self.instruction is not None:
            summary = summary + self.instruction_in(instruction[:, -1])
            memory.append(instruction)
        return Observation(self.encoder(torch.cat(memory, dim=1)), summary)


class ObservationHead(nn.Module):
    """A vector predicted from an observation, for example a latent's prior; read from its own token.

    Args:
        given: most actions that a chunk may begin with, and their numbers: what the vector is about, such as
            the way that a latent names, has to fit them. 0: none.
    """

    def __init__(self, size: Size, num_layers: int, out_dim: int, given: Shape = (0, 0)):
        super().__init__()
        d_model, (self.most_given, action_dim) = size.d_model, given
        self.readout = nn.Parameter(torch.randn(1, d_model) * 0.02)
        self.summary_in = nn.Linear(d_model, d_model)
        self.encoder = Encoder(size, num_layers)
        self.out = nn.Linear(d_model, out_dim)
        if self.most_given:
            self.prefix_in = mlp(self.most_given * (action_dim + 1), d_model, d_model)

    def forward(self, observation: Observation, prefix: flow.Prefix | None = None) -> Tensor:
        """(B, out_dim) float32."""
        readout = self.summary_in(observation.summary).unsqueeze(1) + self.readout
        if prefix is not None:
            given = prefix.given[:, : self.most_given, None]
            actions = torch.where(given, prefix.actions[:, : self.most_given], 0.0)
            told = self.prefix_in(torch.cat([actions, given], dim=2).flatten(1)).unsqueeze(1)
            readout = readout + given.any(dim=1, keepdim=True) * told
        return self.out(self.encoder(torch.cat([readout, observation.memory], dim=1))[:, 0]).float()


class ChunkEncoder(nn.Module):
    """A vector that describes a recorded chunk in its context, for example a latent's posterior.

    A transformer over states (K, P), tokens of the head camera and actions (T, A), read from its own token.
    """

    def __init__(
        self, proprio: Shape, token_dim: int, chunk: Shape, size: Size, num_layers: int, out_dim: int
    ):
        super().__init__()
        (proprio_history, state_dim), (horizon, action_dim), d_model = proprio, chunk, size.d_model
        self.readout = nn.Parameter(torch.randn(1, d_model) * 0.02)
        self.proprio_in = nn.Linear(state_dim, d_model)
        self.tokens_in = nn.Linear(token_dim, d_model)
        self.action_in = nn.Linear(action_dim, d_model)
        self.position = nn.Parameter(torch.randn(proprio_history + horizon, d_model) * 0.02)
        self.encoder = Encoder(size, num_layers)
        self.latent_out = nn.Linear(d_model, out_dim)

    def forward(self, proprio: Tensor, head_tokens: Tensor, actions: Tensor, is_pad: Tensor) -> Tensor:
        """(B, out_dim) float32.

        Args:
            proprio: (B, K, P), normalized.
            head_tokens: (B, L, D_v), of the first camera.
            actions: (B, T, A), normalized; those past the episode's end, `is_pad` (B, T), are masked.
        """
        steps = torch.cat([self.proprio_in(proprio), self.action_in(actions)], dim=1) + self.position
        x = torch.cat([self.readout.expand(len(actions), 1, -1), self.tokens_in(head_tokens), steps], dim=1)
        seen = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        seen[:, -is_pad.shape[1] :] = ~is_pad
        return self.latent_out(self.encoder(x, seen)[:, 0]).float()


class Context(NamedTuple):
    """An observation as a decoder uses it, computed once however often the decoder runs."""

    keys_values: list[KeysValues]
    """Of the memory, for each block."""
    summary: Tensor
    """(B, 1, D), to be added to the action tokens."""


class TimeEmbedding(nn.Module):
    """Flow time (B,) in [0, 1] -> (B, D): sinusoids of geometrically spaced frequencies, then an MLP."""

    def __init__(self, d_model: int, max_frequency: float = 1000.0):
        super().__init__()
        exponents = torch.linspace(0, 1, d_model // 2)
        self.register_buffer("frequencies", max_frequency**exponents, persistent=False)
        self.mlp = mlp(2 * (d_model // 2), d_model, d_model)

    def forward(self, t: Tensor) -> Tensor:
        angles = t.float().unsqueeze(-1) * self.frequencies
        return self.mlp(torch.cat([angles.sin(), angles.cos()], dim=-1))

    def condition(self, t: Tensor, latent: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """What modulates a `DecoderBlock`, and which actions are given, from flow times and a latent (B, D).

        From t (B,): a condition (B, D) and None; from t (B, T): (B, 2, D) and (B, T), see `flow.levels`.
        """
        times, given = flow.levels(t)
        condition = self(times)
        if latent is not None:
            condition = condition + (latent if given is None else latent.unsqueeze(1))
        return condition, given


class DecoderBlock(nn.Module):
    """Self-attention, cross-attention to the observation, MLP; time modulates each (Peebles & Xie 2023).

    Every part computes x + gate(t) * part(norm(x) * (1 + scale(t)) + shift(t)). Gates, scales and shifts
    start at zero (adaLN-Zero): an untrained block passes its input through. With a `linear` that makes
    stacked layers, this is a block of several experts.
    """

    def __init__(self, d_model: int, num_heads: int, linear: Linear = nn.Linear):
        super().__init__()
        self.norm = nn.LayerNorm(d_model, elementwise_affine=False)
        self.self_attention, self.cross_attention = (Attention(d_model, num_heads, linear) for _ in range(2))
        self.mlp = mlp(d_model, 4 * d_model, d_model, linear)
        self.modulation = zeroed(linear(d_model, 9 * d_model))

    def forward(
        self,
        x: Tensor,
        condition: Tensor,
        context: KeysValues,
        mask: Tensor | None,
        causal: bool,
        given: Tensor | None = None,
    ) -> Tensor:
        """Refine action tokens x (B * M, T, D), M draws for each of the observations of the context.

        The condition (B * M, D) embeds the flow time; `mask` (B * M, T) is False for padded actions. Where
        some actions are `given` (B * M, T), the condition is (B * M, 2, D): for the others, then for these.
        With E experts, all but `mask` and `given` have a leading dimension E.
        """
        modulation = self.modulation(F.silu(condition))
        if given is None:
            modulation = modulation.unsqueeze(-2)
        else:  # two flow times per sample, not T: this layer is wide
            choice = torch.stack([~given, given], dim=-1).to(modulation.dtype)
            modulation = choice @ modulation  # (..., T, 9 D)
        modulation = modulation.chunk(9, dim=-1)
        shift, scale, gate = modulation[:3]
        h = self.norm(x) * (1 + scale) + shift
        x = x + gate * self.self_attention(h, mask=mask, causal=causal)
        shift, scale, gate = modulation[3:6]
        # The M draws of one observation are M * T queries to the same keys: no copies of the keys are made.
        h = self.norm(x) * (1 + scale) + shift
        h = h.unflatten(-3, (context[0].shape[-4], -1)).flatten(-3, -2)  # (..., B, M * T, D)
        x = x + gate * self.cross_attention(h, context).reshape(x.shape)
        shift, scale, gate = modulation[6:]
        return x + gate * self.mlp(self.norm(x) * (1 + scale) + shift)


class ActionDecoder(nn.Module):
    """Velocity of a noisy chunk (T, A), given an observation, flow time and, with a `latent_dim`, a latent.

    The observation enters twice: by cross-attention to its memory, and its summary is added to every action
    token. Attention alone is slow to learn where to look: at first it averages over all tokens, which drowns
    the few that matter. Regressing noisy targets from images of the built-in task, a network like this one
    began to find them after about 100 steps with the summary, after more than 300 without it.
    """

    def __init__(
        self, chunk: Shape, size: Size, num_layers: int, causal: bool = True, latent_dim: int | None = None
    ):
        super().__init__()
        (horizon, action_dim), d_model = chunk, size.d_model
        self.causal = causal
        self.action_in = nn.Linear(action_dim, d_model)
        self.position = nn.Parameter(torch.randn(horizon, d_model) * 0.02)
        self.summary_in = nn.Linear(d_model, d_model)
        self.time = TimeEmbedding(d_model)
        if latent_dim is not None:
            self.latent_in = mlp(latent_dim, d_model, d_model)
        self.blocks = nn.ModuleList(DecoderBlock(*size) for _ in range(num_layers))
        self.norm = nn.LayerNorm(d_model)
        self.velocity_out = zeroed(nn.Linear(d_model, action_dim))

    def context(self, observation: Observation) -> Context:
        """What `forward` needs of the observations."""
        keys_values = [block.cross_attention.keys_values(observation.memory) for block in self.blocks]
        return Context(keys_values, self.summary_in(observation.summary).unsqueeze(1))

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        context: Context,
        is_pad: Tensor | None = None,
        latent: Tensor | None = None,
    ) -> Tensor:
        """Velocity (B * M, T, A) of M draws for each of the B observations of the context.

        Args:
            x_t: noisy actions, (B * M, T, A).
            t: flow time, (B * M,); or of each action, (B * M, T), where 1 means that it is given.
            is_pad: (B * M, T), True for actions past the episode's end.
            latent: (B * M, latent_dim); modulates the blocks as flow time does.
        """
        # With a causal mask, real actions, which come first, cannot see padded ones anyway.
        mask = None if is_pad is None or self.causal else ~is_pad
        flow_samples = len(x_t) // len(context.summary)
        x = self.action_in(x_t) + self.position + context.summary.repeat_interleave(flow_samples, dim=0)
        condition, given = self.time.condition(t, None if latent is None else self.latent_in(latent))
        for block, keys_values in zip(self.blocks, context.keys_values, strict=True):
            x = block(x, condition, keys_values, mask, self.causal, given)
        return self.velocity_out(self.norm(x))


def sincos_position_2d(height: int, width: int, d_model: int) -> Tensor:
    """Fixed position embedding of a grid, (height * width, d_model), row by row.

    A quarter of the features each for sin and cos of y and of x (Vaswani et al. 2017); the rest is zero.
    """
    quarter = d_model // 4
    frequencies = torch.exp(-math.log(100.0) * torch.arange(quarter) / max(quarter, 1))
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    angles = torch.stack([y, x]).flatten(1).unsqueeze(-1) * frequencies  # (2, L, quarter)
    features = torch.cat([angles[0].sin(), angles[0].cos(), angles[1].sin(), angles[1].cos()], dim=-1)
    return F.pad(features, (0, d_model - 4 * quarter))
