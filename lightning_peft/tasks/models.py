"""Models for the tasks: the pretrained MiniLM, any model of the Hugging Face hub, and small random ones.

All come in training mode, so that dropout acts in `fit`; transformers hands pretrained models out in eval mode.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from lightning_peft.tasks.extras import optional
from lightning_peft.tasks.hub import MINILM, minilm_folder, quiet, reach
from lightning_peft.tasks.pooling import PooledClassifier, Pooling

AUTO = {
    "backbone": "AutoModel",
    "classification": "AutoModelForSequenceClassification",
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "image": "AutoModelForImageClassification",
}
"""task -> class of transformers that loads a model for it"""


def minilm(num_classes: int, pooling: Pooling = "mean", dropout: float = 0.1) -> nn.Module:
    """The pretrained MiniLM (6 layers, width 384, 22.6M parameters) with a new head, from its PyPI package or the hub.

    Mean pooling is what it was trained for; from its [CLS] it learns far slower. Sentence-BERT, Reimers and Gurevych
    2019.
    """
    source = minilm_folder() or MINILM
    optional("transformers", "The model minilm")
    with quiet():
        return hf(source, "classification", num_classes, pooling=pooling, dropout=dropout, add_pooling_layer=False)


def hf(
    name: str | Path,
    task: str = "classification",
    num_classes: int | None = None,
    pooling: Pooling | None = None,
    dropout: float = 0.1,
    **options: Any,
) -> nn.Module:
    """A pretrained model of the hub or a folder, for a task: classification, image, causal-lm, seq2seq or backbone.

    With `pooling`, classification and image take the backbone and the head of `PooledClassifier`; without, the head
    that transformers gives the architecture. `options` go to `from_pretrained`. Within `torch.device("meta")` the
    weights stay where they are: the config alone says what the model is.
    """
    check_task("classification" if pooling else task, num_classes)
    transformers = optional("transformers", f"The model {str(name)!r}")
    auto = getattr(transformers, AUTO["backbone" if pooling else task])
    if num_classes is not None and not pooling:
        options |= {"num_labels": num_classes, "ignore_mismatched_sizes": True}
    if Path(name).is_dir():
        options["local_files_only"] = True
    with reach(name):
        meta = torch.get_default_device().type == "meta"
        model: Any = by_config(auto, name, options) if meta else auto.from_pretrained(name, **options)
    if pooling and num_classes is not None:
        model = PooledClassifier(model, model.config.hidden_size, num_classes, pooling, dropout)
    elif task == "classification" and getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = (
            model.config.eos_token_id
        )  # decoders look for the last token in front of the padding
    return model.train()


def by_config(auto: Any, name: str | Path, options: dict[str, Any]) -> nn.Module:
    """The model that `auto.from_pretrained(name, **options)` loads, without its weights."""
    own = {key: value for key, value in options.items() if key in ("dtype", "attn_implementation", "add_pooling_layer")}
    rest = {key: value for key, value in options.items() if key not in own and key != "ignore_mismatched_sizes"}
    config = optional("transformers", f"The model {str(name)!r}").AutoConfig.from_pretrained(name, **rest)
    return auto.from_config(config, **own)


def check_task(task: str, num_classes: int | None) -> None:
    """ValueError for a task that is not there, or one that lacks the number of its classes."""
    if task not in AUTO:
        raise ValueError(f"Unknown task={task!r}. Known: {', '.join(AUTO)}.")
    if task in ("classification", "image") and num_classes is None:
        raise ValueError(f"task={task!r} needs num_classes=, the number of classes of the data.")


class Tiny(NamedTuple):
    """How to build a small model: the class of its config, the fields, the task it is for and how it is pooled."""

    config: str
    fields: dict[str, Any]
    task: str = "classification"
    pooling: Pooling = "mean"
    backbone: str | None = None


DECODER = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
VOCABULARY = {"vocab_size": 260}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4}
IMAGE = {"image_size": 8, "patch_size": 2, "num_channels": 1}

TINY = {
    "bert": Tiny("BertConfig", {**VOCABULARY, **SIZES, "max_position_embeddings": 512}),
    "gpt2": Tiny("GPT2Config", {**VOCABULARY, **GPT2, **DECODER}, "causal-lm", "last"),
    "llama": Tiny("LlamaConfig", {**VOCABULARY, **SIZES, **DECODER, "num_key_value_heads": 2}, "causal-lm", "last"),
    "t5": Tiny("T5Config", {**VOCABULARY, **T5}, backbone="T5EncoderModel"),
    "vit": Tiny("ViTConfig", {**SIZES, **IMAGE}, "image", "cls"),
}
"""kind -> random model of a few ten thousand parameters; the vocabularies are those of `ByteTokenizer`."""


def tiny(kind: str, num_classes: int = 2, task: str | None = None, **fields: Any) -> nn.Module:
    """A random model for tests and first runs: bert, gpt2, llama, t5 or vit, for its usual task or the one named.

    `fields` replace those of the config. Classifiers are a `PooledClassifier`.
    """
    if kind not in TINY:
        raise ValueError(f"Unknown kind={kind!r} of tiny model. Known: {', '.join(TINY)}.")
    spec = TINY[kind]
    task = task or spec.task
    check_task(task, num_classes)
    transformers = optional("transformers", f"tiny({kind!r})")
    config = getattr(transformers, spec.config)(**{**spec.fields, **fields})
    if task not in ("classification", "image"):
        return getattr(transformers, AUTO[task]).from_config(config).train()
    make = getattr(transformers, spec.backbone) if spec.backbone else transformers.AutoModel.from_config
    return PooledClassifier(make(config), config.hidden_size, num_classes, spec.pooling, dropout=0.0).train()


def tiny_bert(num_classes: int = 2, **fields: Any) -> nn.Module:
    """A random two-layer BERT that classifies."""
    return tiny("bert", num_classes, **fields)


def tiny_gpt2(**fields: Any) -> nn.Module:
    """A random two-layer GPT-2 that writes: packed attention projections, tied embeddings."""
    return tiny("gpt2", **fields)


def tiny_llama(**fields: Any) -> nn.Module:
    """A random two-layer Llama that writes: grouped-query attention, gated feed-forward layers."""
    return tiny("llama", **fields)


def tiny_t5(num_classes: int = 2, **fields: Any) -> nn.Module:
    """A random two-layer T5 encoder that classifies; the whole T5 with task="seq2seq"."""
    return tiny("t5", num_classes, **fields)


def tiny_vit(num_classes: int = 10, **fields: Any) -> nn.Module:
    """A random two-layer vision transformer for 8x8 images."""
    return tiny("vit", num_classes, **fields)


def small_vit(num_classes: int = 10, dropout: float = 0.0, **fields: Any) -> nn.Module:
    """A vision transformer of 0.1M parameters for 8x8 images, in patches of 2x2 (Dosovitskiy et al. 2021)."""
    size = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
    options = {**size, "hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout, **fields}
    return tiny("vit", num_classes, **options)
