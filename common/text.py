"""Frozen text encoders from `transformers` that turn sentences into vectors once, before training."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import batched
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from common.console import say
from common.data import default_cache_dir
from common.data.source import hash_once
from common.data.store import EpisodeStore
from common.errors import UserError
from common.files import read_json, write_whole, writing_below
from common.vision import brief, model_source, silence

# Files that determine the output, beside the weights.
BESIDE_WEIGHTS = (
    *("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("spiece.model", "sentencepiece.bpe.model", "special_tokens_map.json"),
)
ANOTHER = "give the folder of a downloaded text encoder, or --task-encoder index"
LONGEST = 256  # most tokens per sentence, if the encoder allows it


def encode_once(store: EpisodeStore, name: str, tokens: Literal["pooled", "all"]) -> tuple[Tensor, tuple]:
    """The vectors (S, L, D) of a store's instructions, and the encoder's identity.

    They are kept next to the store, so they are computed only once.
    """
    from filelock import FileLock
    from safetensors.torch import load, save

    encoder = TextEncoder(name)
    content = json.dumps([encoder.identity, tokens, store.instructions])
    file = store.path / f"texts-{hashlib.sha256(content.encode()).hexdigest()[:16]}.safetensors"
    with writing_below(store.path), FileLock(store.path / ".texts.lock"):
        if not file.exists():
            table = encoder(store.instructions, 0 if tokens == "pooled" else None)
            if not table.isfinite().all():
                raise UserError(f"--task-encoder {name} returns numbers that are not finite: choose another.")
            if len(table.flatten(1).unique(dim=0)) < len(table):
                say(f"warning: {name} returns the same vectors for some instructions: a policy confuses them")
            write_whole(file, save({"table": table}))
        return load(file.read_bytes())["table"], encoder.identity


class TextEncoder:
    """A frozen text encoder from `transformers`, loaded when first needed.

    The vector of a whole sentence is the pooled output of CLIP and SigLIP, which were trained on it, and the
    mean over tokens for others.

    Args:
        way_out: what to do if it cannot be loaded or used, for the message.

    Attributes:
        identity: everything that determines its output.
    """

    def __init__(self, name: str, way_out: str = ANOTHER):
        from transformers import AutoConfig
        from transformers.utils import cached_file

        self.name, self._network, self._way_out = name, None, way_out
        self._source, self._where, self._far = model_source(name)
        with _explained(name, "loaded", way_out, self._far):
            if self._where["local_files_only"] and not self._far and not Path(self._source).exists():
                raise OSError("there is no such folder")
            self._config = AutoConfig.from_pretrained(self._source, **self._where)
            where = {"local_files_only": self._where["local_files_only"]}
            find = partial(cached_file, self._source, _raise_exceptions_for_missing_entries=False, **where)
            weights = ["model.safetensors"]
            if not find(weights[0]) and (index := find("model.safetensors.index.json")):
                weights = sorted(set(read_json(index)["weight_map"].values()))
            files = [find(file) for file in weights]
            # A model is the same on the hub and in any folder. Without such files, only its name is known.
            self.identity = (name,)
            if all(files):
                files += [found for file in BESIDE_WEIGHTS if (found := find(file))]
                root = Path(files[0]).parent
                self.identity = tuple(hash_once(root, list(map(Path, files)), default_cache_dir() / "hashes"))

    @torch.no_grad()
    def __call__(self, sentences: Sequence[str], tokens: int | None = 0) -> Tensor:
        """(S, `tokens` + 1, D) float32 on the CPU; None: as many tokens as the longest sentence has.

        Shorter sentences are padded with the vector of the whole.
        """
        if self._network is None:
            self._load()
        with _explained(self.name, "used", self._way_out):
            parts = [self._encode(list(part)) for part in batched(sentences, 32)]
        if tokens is None:
            tokens = max(int(seen.sum(1).max()) for _, seen, _ in parts)
        return torch.cat([_in_front(*part, tokens) for part in parts])

    def _encode(self, sentences: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Token vectors (B, L, D), their mask (B, L), True if real, and sentence vectors (B, 1, D)."""
        fixed = "siglip" in self._config.model_type  # trained on texts of fixed length, without a mask
        options = {
            "padding": "max_length" if fixed else True,
            "truncation": True,
            "max_length": self._longest,
        }
        given = self._tokenizer(sentences, return_tensors="pt", **options).to(self._network.device)
        ids = given["input_ids"]
        seen = given.get("attention_mask", torch.ones_like(ids)).bool()
        if fixed:
            seen = ids != self._tokenizer.pad_token_id
        out = self._network(ids) if fixed else self._network(ids, attention_mask=seen.long())
        vectors, pooled = out.last_hidden_state.float(), getattr(out, "pooler_output", None)
        whole = (vectors * seen.unsqueeze(-1)).sum(1) / seen.sum(1, keepdim=True).clamp(min=1)
        if pooled is not None and pooled.shape == whole.shape and "lip" in self._config.model_type:
            whole = pooled.float()
        return vectors.cpu(), seen.cpu(), whole.unsqueeze(1).cpu()

    def _load(self) -> None:
        import transformers
        from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES

        kind, composite = self._config.model_type, hasattr(self._config, "text_config")
        auto = transformers.AutoModel
        if kind == "siglip_text_model":
            auto = transformers.SiglipTextModel
        elif kind in MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES:  # T5: only its encoder
            auto = transformers.AutoModelForTextEncoding
        with _explained(self.name, "loaded", self._way_out, self._far), silence():
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(self._source, **self._where)
            network, report = auto.from_pretrained(
                self._source, use_safetensors=True, output_loading_info=True, **self._where
            )
            unset = sorted(key for key in report["missing_keys"] if "pooler" not in key)
            if unset:
                raise OSError(f"it holds no weights for {unset[0]}")
            network = network.text_model if composite else network
        self._tokenizer.padding_side = "right"  # on the left, a sentence's vectors may depend on the others
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        text = getattr(self._config, "text_config", self._config)
        self._longest = min(LONGEST, getattr(text, "max_position_embeddings", LONGEST))
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        self._network = network.float().eval().to(device)


@contextmanager
def _explained(name: str, what: str, way_out: str, far: bool = False) -> Iterator[None]:
    """In this block, any error of a text encoder becomes one sentence, which says what it cannot be."""
    try:
        yield
    except Exception as error:  # transformers and its tokenizers raise dozens of classes
        reason = "it is not in the hub's cache here, and there is no connection: " * far + brief(error)
        raise UserError(
            f"The text encoder {name} cannot be {what} ({type(error).__name__}: {reason}): {way_out}."
        ) from None


def _in_front(vectors: Tensor, seen: Tensor, whole: Tensor, tokens: int) -> Tensor:
    """Real vectors of (B, L, D) first, padded with the `whole` to `tokens`; then the `whole` once more."""
    order = (~seen).long().argsort(dim=1, stable=True)[:, :tokens]
    found = vectors.gather(1, order.unsqueeze(-1).expand(-1, -1, vectors.shape[2]))
    found = torch.where(seen.gather(1, order).unsqueeze(-1), found, whole)
    return torch.cat([found, whole.expand(-1, tokens - found.shape[1] + 1, -1)], dim=1)
