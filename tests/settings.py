"""Small settings for every method, and where a method has nothing to do; a method without an entry fails the suite."""

from __future__ import annotations

from typing import Any

import zoo
from torch import nn

import lightning_peft.methods  # noqa: F401  fills the registry
from lightning_peft.callback import PEFT
from lightning_peft.core.adapter import NotMergeableError
from lightning_peft.core.method import REGISTRY, NothingToTrainError
from lightning_peft.core.sites import TargetError

MODELS = ("bert", "gpt2", "llama", "t5", "vit", "encoder", "mlp")
TEXT = ("bert", "gpt2", "llama", "t5")
HEADED = {"bert", "vit", "encoder"}  # models whose task head `heads="auto"` finds

# ids of which each row of the zoo's texts has three, and a decoder's none
PSEUDO = [13, 35, 20, 28, 8, 34, 44, 36, 78, 95, 12, 19, 26, 54, 71, 84, 53, 67, 33, 47, 74, 96]

SETTINGS: dict[str, dict[str, Any]] = {
    "adalora": {"rank": 3, "target": 2, "targets": "q,v,down"},
    "relora": {"rank": 3, "targets": "q,v,down", "dropout": 0.0},
    "longlora": {"rank": 3, "targets": "q,v,o", "trained": "norm"},
    "lora_dropout": {"rank": 3, "targets": "q,v,down", "ensemble": 0, "p": 0.0},
    "bitfit": {},
    "full": {},
    "houlsby": {"bottleneck": 6},
    "adapter_fusion": {
        "members": [
            {"method": "pfeiffer", "config": {"bottleneck": 4, "init": "bert"}},
            {"method": "pfeiffer", "config": {"bottleneck": 3, "init": "bert"}},
        ]
    },
    "adapterdrop": {"bottleneck": 6, "n": 1, "train": "fixed"},
    "invertible": {},
    "output_adapter": {"bottleneck": 6},
    "input_adapter": {"bottleneck": 6},
    "adaptformer": {"bottleneck": 6},
    "bapna": {"bottleneck": 6},
    "pfeiffer": {"bottleneck": 6},
    "adamix": {"bottleneck": 6, "experts": 3},
    "phm": {"bottleneck": 8},
    "sparse_adapter": {"settings": {"bottleneck": 6}, "score": "magnitude", "sparsity": 0.5},
    "compacter": {"bottleneck": 8},
    "compacter_pp": {"bottleneck": 8},
    "ia3": {},
    "linear_probe": {},
    "ln_tuning": {},
    "corda": {"rank": 3, "targets": "q,v"},
    "eva": {"rank": 3, "targets": "q,v"},
    "loftq": {"rank": 3, "targets": "q,v", "iterations": 2},
    "lora_ga": {"rank": 3, "targets": "q,v"},
    "lqlora": {"rank": 3, "targets": "q,v", "iterations": 3},
    "lora": {"rank": 3, "targets": "q,k,v,down"},
    "loreft": {"rank": 3, "first": 2, "last": 2},
    "noreft": {"rank": 3, "first": 2, "last": 2, "targets": "block,o"},
    "direft": {"rank": 3, "first": 2, "last": 2, "targets": "down"},
    "llama_adapter": {"length": 3},
    "llama_adapter_v2": {"length": 3, "prompts": "last:1"},
    "p_tuning_v2": {"length": 3, "projection": True, "bottleneck": 5},
    "mam": {"length": 3, "bottleneck": 6},
    "olora": {"rank": 3, "targets": "q,down"},
    "parallel": {"bottleneck": 6},
    "pissa": {"rank": 3, "targets": "q,v,down"},
    "krona": {"targets": "q,k,v,down", "scale": 2.0},
    "lokr": {"targets": "q,k,v,down", "rank": 2},
    "mora": {"targets": "q,k,v,down", "rank": 2},
    "remora": {"targets": "q,k,v,down", "rank": 2},
    "fourierft": {"targets": "q,k,v,down", "count": 12, "scale": 9.0},
    # a constant on all features that go to a norm, and D times a bias of zero, get no gradient
    "glora": {"targets": "q,v,down", "rank": 2, "d": "none", "e": "vector"},
    # the default of 25 makes gradients above 1, whose rounding is above the bounds of the contract
    "waveft": {"targets": "q,k,v,down", "count": 12, "wavelet": "db2", "scale": 5.0},
    "krona_b": {"scale": 2.0},
    "krona_b_res": {"scale": 2.0, "left": [4, 16]},
    "said": {"dimension": 400, "exclude": "*embed*?,*wte?,*wpe?,*shared?,*lm_head?"},
    "did": {"dimension": 100, "exclude": "*embed*?,*wte?,*wpe?,*shared?,*lm_head?"},
    "prefix_tuning": {"length": 3},
    "prompt_tuning": {"length": 3},
    "ipt": {"length": 3, "dimension": 4, "tasks": 2, "task": 1},
    "multitask_prompt": {"length": 3, "rank": 2, "tasks": 2, "task": 1},
    "vpt": {"length": 3},
    "p_tuning": {"template": [2, 1], "pseudo": PSEUDO},
    "oft": {"targets": "q,k,v,down", "block_size": 4},
    "hra": {"targets": "q,k,v,down", "rank": 4},
    "boft": {"targets": "q,k,v,down", "block_size": 4, "factors": 2},
    "delora": {"rank": 3, "targets": "q,k,v,down"},
    "miss": {"rank": 5, "targets": "q,k,v,down"},
    "gralora": {"rank": 4, "targets": "q,k,v,down"},
    "road": {"group_size": 4, "targets": "q,k,v,down"},
    "ssf": {},
    "c3a": {"block_size": 4, "targets": "q,k,v,down"},
    "shira": {"rank": 2, "targets": "q,k,v,down"},
    "dora": {"rank": 3, "targets": "q,k,v,down"},
    "lora_fa": {"rank": 3, "targets": "q,k,v,down"},
    "vera": {"rank": 5, "targets": "q,k,v,down"},
    "dvora": {"rank": 5, "targets": "q,k,v,down"},
    "loha": {"rank": 2, "targets": "q,k,v,down"},
    "multilora": {"rank": 2, "targets": "q,k,v,down"},
    "tied_lora": {"rank": 3, "targets": "q,k,v,down"},
    "nola": {"rank": 3, "coefficients": 6, "targets": "q,k,v,down"},
    "hira": {"rank": 3, "targets": "q,k,v,down"},
    "vb_lora": {"rank": 2, "vectors": 6, "length": 4, "targets": "q,k,v,down", "bank_bound": 0.3},
    "randlora": {"rank": 7, "alpha": 14.0, "targets": "q,k,v,down"},
    "qalora": {"rank": 3, "group": 4, "alpha": 2},
    "trainable_tokens": {"tokens": [13, 12, 4, 8]},
    "lst": {"reduction": 4},
    "selective": {"score": "random", "budget": 0.1},
    "fish": {"score": "random", "budget": 0.2, "exclude": "*embed*?"},
    "lt_sft": {},
    "diff_pruning": {"alpha": 1.0},
    "attention_fusion": {"key": 6, "embeddings": True},
    "lets": {"rank": 3, "targets": "q,v,down"},
    "cross_attention": {},
    "far": {},
    "surgical": {"shift": "feature"},
    "s4": {"budget": 0.1},
    "spafit": {"frozen": 0, "biased": 1, "rank": 3, "targets": "q,v"},
    "unipelt": {"length": 3, "rank": 3, "bottleneck": 6},
    "top_layers": {"k": 1},
}

# what a model needs beside them: no table knows the names of the plain module
MLP_TARGETS: dict[str, dict[str, Any]] = {
    "corda": {"targets": "mlp,lora"},
    "eva": {"targets": "mlp,lora"},
    "adalora": {"targets": "mlp,lora"},
    "relora": {"targets": "mlp,lora"},
    "lora_dropout": {"targets": "mlp,lora"},
    "loftq": {"targets": "mlp,lora"},
    "lora_ga": {"targets": "mlp,lora"},
    "did": {"targets": "mlp,lora", "exclude": None},
    "said": {"targets": "mlp,lora", "exclude": None},
    "waveft": {"targets": "mlp,lora"},
    "glora": {"targets": "mlp,lora"},
    "fourierft": {"targets": "mlp,lora"},
    "mora": {"targets": "mlp,lora"},
    "remora": {"targets": "mlp,lora"},
    "lokr": {"targets": "mlp,lora"},
    "krona": {"targets": "mlp,lora"},
    "lqlora": {"targets": "mlp,lora"},
    "lora": {"targets": "mlp,lora"},
    "olora": {"targets": "mlp,lora"},
    "pissa": {"targets": "mlp,lora"},
    "oft": {"targets": "mlp,lora"},
    "hra": {"targets": "mlp,lora"},
    "boft": {"targets": "mlp,lora"},
    "delora": {"targets": "mlp,lora"},
    "miss": {"targets": "mlp,lora"},
    "gralora": {"targets": "mlp,lora"},
    "road": {"targets": "mlp,lora"},
    "ssf": {"targets": "mlp,lora"},
    "c3a": {"targets": "mlp,lora"},
    "shira": {"targets": "mlp,lora"},
    "dora": {"targets": "mlp,lora"},
    "lora_fa": {"targets": "mlp,lora"},
    "vera": {"targets": "mlp,lora"},
    "dvora": {"targets": "mlp,lora"},
    "loha": {"targets": "mlp,lora"},
    "multilora": {"targets": "mlp,lora"},
    "tied_lora": {"targets": "mlp,lora"},
    "nola": {"targets": "mlp,lora"},
    "hira": {"targets": "mlp,lora"},
    "vb_lora": {"targets": "mlp,lora"},
    "randlora": {"targets": "mlp,lora"},
    "houlsby": {"targets": "mlp,lora"},
    "adapter_fusion": {
        "members": [
            {"method": "houlsby", "config": {"bottleneck": 4, "init": "bert", "targets": "mlp,lora"}},
            {"method": "houlsby", "config": {"bottleneck": 3, "init": "bert", "targets": "mlp,lora"}},
        ]
    },
    "output_adapter": {"targets": "mlp", "activation": "identity"},
    "adamix": {"targets": "mlp,lora"},
    "phm": {"targets": "mlp,lora"},
    "sparse_adapter": {"targets": "mlp,lora"},
    "compacter": {"targets": "mlp,lora"},
    "compacter_pp": {"targets": "mlp,lora"},
    "ia3": {"targets": "mlp,lora", "inputs": "lora"},
    "qalora": {"targets": "mlp,lora"},
    "lst": {"targets": "mlp,lora"},
    "attention_fusion": {"targets": "mlp,lora"},
    "lets": {"targets": "mlp,lora"},
}
MLP_HEADS = {"heads": "out"}

RAISES: dict[tuple[str, str], type[Exception]] = {
    **{("linear_probe", model): NothingToTrainError for model in ("gpt2", "llama", "t5")},
    ("ln_tuning", "mlp"): TargetError,  # it has no norm
    **{(name, "mlp"): TargetError for name in ("loreft", "noreft", "direft")},  # no blocks of a known width
    **{(name, "mlp"): TargetError for name in ("llama_adapter", "llama_adapter_v2", "p_tuning_v2")},  # no attention
    ("mam", "mlp"): TargetError,  # no attention
    ("longlora", "mlp"): TargetError,
    ("prefix_tuning", "mlp"): TargetError,
    ("prompt_tuning", "mlp"): TargetError,  # no embeddings
    **{(name, "mlp"): TargetError for name in ("ipt", "multitask_prompt")},
    **{("vpt", model): TargetError for model in (*TEXT, "mlp")},  # no images
    **{("p_tuning", model): TargetError for model in ("vit", "mlp")},  # no tokens
    ("krona_b", "mlp"): TargetError,  # no feed-forward layer
    ("krona_b_res", "mlp"): TargetError,
    **{("trainable_tokens", model): TargetError for model in ("vit", "mlp")},  # no tokens
    ("parallel", "mlp"): TargetError,  # no feed-forward layer
    ("adapterdrop", "mlp"): TargetError,  # no blocks
    ("invertible", "mlp"): TargetError,  # no blocks
    ("input_adapter", "mlp"): TargetError,  # no blocks
    ("adaptformer", "mlp"): TargetError,  # no blocks
    ("bapna", "mlp"): TargetError,  # no blocks
    ("pfeiffer", "mlp"): TargetError,  # no blocks
    ("top_layers", "mlp"): TargetError,  # no blocks
    ("far", "mlp"): TargetError,  # no feed-forward layer
    ("surgical", "mlp"): TargetError,  # no blocks
    ("s4", "mlp"): TargetError,  # no blocks
    ("spafit", "mlp"): TargetError,  # no blocks
    ("unipelt", "mlp"): TargetError,  # no attention
    **{("cross_attention", model): TargetError for model in MODELS if model != "t5"},  # nothing reads an encoder
}
# BitFit, SSF and GLoRA's C and E make biases where there are none, and such a projection has no place to fold one into
UNMERGEABLE: dict[tuple[str, str], type[Exception]] = {
    **{(n, m): NotMergeableError for n in ("bitfit", "ssf", "glora") for m in ("llama", "t5", "mlp")},
    **{("spafit", m): NotMergeableError for m in ("llama", "t5")},
    **{("output_adapter", m): NotMergeableError for m in MODELS if m != "mlp"},  # at norms and blocks, and not linear
}

# whose files hold something else than the parameters: an orthonormal matrix, a plain LoRA, an average, pruned tensors
COLLAPSED = {
    "adamix",
    "corda",
    "diff_pruning",
    "loftq",
    "lora_ga",
    "loreft",
    "lqlora",
    "olora",
    "p_tuning",
    "p_tuning_v2",
    "pissa",
    "sparse_adapter",
}
# which start from what the base's weights are, in floats or in codes
FROM_WEIGHTS = {"lst"}
# which put states of their own in place of the base's: of two the outermost counts, where the blocks are all they read
IN_PLACE_OF_STATES = {"lst"}
# which change weights of the base for good as they go
CHANGES_BASE = {"relora", "remora"}
# which train over a quantised base only
ON_CODES = {"loftq", "lqlora"}
# which change what is quantised when the base is quantised around them
COMPENSATING = {"corda", "loftq", "lora_ga", "lqlora", "olora", "pissa"}
# whose files have other names than what trains: a plain LoRA, prefixes without the MLP that they came out of
RENAMED = COMPENSATING | {"p_tuning_v2"}

# what the quick run covers: each method on the models that are hardest for it
QUICK = {
    "adalora": ("gpt2", "llama"),
    "relora": ("gpt2", "llama"),
    "longlora": ("gpt2", "llama"),
    "lora_dropout": ("gpt2", "llama"),
    "bitfit": ("gpt2", "t5", "encoder"),
    "full": ("bert", "mlp"),
    "houlsby": ("bert", "encoder"),
    "adapter_fusion": ("bert", "t5"),
    "adapterdrop": ("gpt2", "encoder"),
    "invertible": ("gpt2", "t5"),
    "output_adapter": ("bert", "gpt2", "mlp"),
    "input_adapter": ("t5", "encoder"),
    "adaptformer": ("vit", "gpt2"),
    "bapna": ("t5", "vit"),
    "pfeiffer": ("t5", "encoder"),
    "adamix": ("gpt2", "encoder"),
    "phm": ("gpt2", "encoder"),
    "sparse_adapter": ("llama", "encoder"),
    "compacter": ("t5", "encoder"),
    "compacter_pp": ("t5", "llama"),
    "ia3": ("gpt2", "llama", "mlp"),
    "linear_probe": ("vit", "mlp"),
    "ln_tuning": ("llama", "vit"),
    "corda": ("gpt2", "encoder"),
    "eva": ("gpt2", "llama"),
    "loftq": ("gpt2", "mlp"),
    "lora_ga": ("gpt2", "t5"),
    "lqlora": ("gpt2", "llama"),
    "lora": ("gpt2", "llama", "encoder"),
    "loreft": ("bert", "t5"),
    "noreft": ("gpt2", "encoder"),
    "direft": ("t5", "llama"),
    "llama_adapter": ("gpt2", "llama"),
    "llama_adapter_v2": ("t5", "encoder"),
    "p_tuning_v2": ("bert", "llama"),
    "mam": ("t5", "vit"),
    "olora": ("gpt2", "t5"),
    "parallel": ("llama", "bert"),
    "pissa": ("gpt2", "encoder"),
    "krona": ("gpt2", "llama"),
    "lokr": ("encoder", "t5"),
    "mora": ("gpt2", "t5"),
    "remora": ("gpt2", "t5"),
    "fourierft": ("llama", "encoder"),
    "glora": ("gpt2", "encoder"),
    "waveft": ("gpt2", "llama"),
    "krona_b": ("llama", "bert"),
    "krona_b_res": ("t5", "encoder"),
    "said": ("gpt2", "llama", "encoder"),
    "did": ("t5", "bert"),
    "prefix_tuning": ("gpt2", "encoder"),
    "prompt_tuning": ("bert", "vit", "encoder"),
    "p_tuning": ("t5", "llama"),
    "ipt": ("bert", "vit"),
    "multitask_prompt": ("llama", "t5"),
    "vpt": ("vit", "encoder"),
    "oft": ("gpt2", "llama"),
    "hra": ("gpt2", "t5"),
    "boft": ("gpt2", "encoder"),
    "delora": ("gpt2", "llama"),
    "miss": ("t5", "gpt2"),
    "gralora": ("llama", "encoder"),
    "road": ("llama", "encoder"),
    "ssf": ("gpt2", "bert"),
    "c3a": ("gpt2", "llama"),
    "shira": ("llama", "gpt2"),
    "dora": ("gpt2", "llama", "encoder"),
    "lora_fa": ("gpt2", "llama"),
    "vera": ("llama", "gpt2"),
    "dvora": ("llama", "encoder"),
    "loha": ("gpt2", "llama"),
    "multilora": ("gpt2", "t5"),
    "tied_lora": ("gpt2", "llama", "encoder"),
    "nola": ("llama", "encoder"),
    "hira": ("gpt2", "llama"),
    "vb_lora": ("llama", "gpt2"),
    "randlora": ("t5", "gpt2"),
    "qalora": ("gpt2", "llama", "t5", "encoder"),
    "trainable_tokens": ("gpt2", "t5", "encoder"),
    "lst": ("llama", "t5"),
    "attention_fusion": ("gpt2", "t5"),
    "lets": ("gpt2", "encoder"),
    "cross_attention": ("t5",),
    "far": ("gpt2", "llama"),
    "surgical": ("gpt2", "t5"),
    "s4": ("t5", "vit"),
    "spafit": ("gpt2", "encoder"),
    "unipelt": ("t5", "encoder"),
    "top_layers": ("t5", "vit"),
    "selective": ("gpt2", "encoder"),
    "fish": ("t5", "llama"),
    "lt_sft": ("bert", "gpt2"),
    "diff_pruning": ("llama", "gpt2"),
}


def make(name: str, model: str, **more: Any) -> PEFT:
    """The method `name` with the settings for `model`; names what is missing."""
    if name not in SETTINGS:
        raise KeyError(f"tests/settings.py has no entry for the method {name!r}; known: {', '.join(SETTINGS)}.")
    own = {**MLP_TARGETS.get(name, {}), **MLP_HEADS} if model == "mlp" else {}
    return REGISTRY[name](**{**SETTINGS[name], **own, **more})  # type: ignore[return-value]


def adapted(name: str, model: str, **more: Any) -> tuple[nn.Module, PEFT]:
    """A fresh tiny model with the method on it."""
    net, method = zoo.build(model), make(name, model, **more)
    method.apply(net)
    return net, method
