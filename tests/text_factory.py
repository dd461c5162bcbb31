"""Small text encoders with random weights, saved as `transformers` saves them."""

from pathlib import Path

import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = ["fold", "open", "the", "towel", "box", "now", "please"]
KINDS = ("bert", "t5", "clip", "siglip")


def make_encoder(folder: Path, kind: str = "bert", seed: int = 0) -> Path:
    """Save a text encoder of 16 dimensions that knows a few words to a new folder."""
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS, "[EOS]"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    end, size = vocabulary["[EOS]"], len(vocabulary)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A [EOS]", special_tokens=[("[EOS]", end)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[EOS]"}
    if kind == "gpt":
        del special["pad_token"]
        special["padding_side"] = "left"
    tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    torch.manual_seed(seed)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    text = {"vocab_size": size, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": end, **small}
    vision = {"image_size": 32, "patch_size": 16, **small}
    if kind == "bert":
        network = tf.BertModel(tf.BertConfig(vocab_size=size, **small))
    elif kind == "gpt":
        shape = {"n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": None, "eos_token_id": end}
        network = tf.GPT2Model(tf.GPT2Config(vocab_size=size, **shape))
    elif kind == "t5":
        shape = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
        network = tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=size, **shape))
    elif kind == "clip":
        network = tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    else:
        text["projection_size"] = 16
        network = tf.SiglipModel(tf.SiglipConfig(text_config=text, vision_config=vision))
    network.save_pretrained(folder)
    return folder
