"""LightningModules, DataModules and models that are ready to use; PEFT comes in as a callback from outside."""

from importlib import import_module
from typing import Any

HOMES = {
    "ByteTokenizer": "tokens",
    "CausalLM": "causal_lm",
    "CollateChoices": "multiple_choice",
    "Digits": "digits",
    "HFText": "text_file",
    "ImageClassification": "image_classification",
    "InContext": "in_context",
    "Instructions": "instructions",
    "MultipleChoice": "multiple_choice",
    "PooledClassifier": "pooling",
    "StdlibDocs": "stdlib_docs",
    "TextClassification": "text_classification",
    "TextData": "data",
    "TextFile": "text_file",
    "constant": "optimisation",
    "cosine_warmup": "optimisation",
    "hf": "models",
    "jagged_cosine": "optimisation",
    "linear_warmup": "optimisation",
    "minilm": "models",
    "parameter_groups": "optimisation",
    "small_vit": "models",
    "tiny": "models",
    "tiny_bert": "models",
    "tiny_gpt2": "models",
    "tiny_llama": "models",
    "tiny_t5": "models",
    "tiny_vit": "models",
    "tokenizer": "tokens",
}
"""public name -> the file it is in, imported when the name is first asked for"""

__all__ = sorted(HOMES)


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}. Known: {', '.join(HOMES)}.")
    return getattr(import_module(f"{__name__}.{HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
