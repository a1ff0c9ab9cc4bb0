"""Parameter-efficient fine-tuning as Lightning callbacks."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# name -> defining module; loaded when it is first asked for, so that the import itself stays cheap
_PUBLIC = {
    "LoRA": "lightning_peft.methods.lora",
    "PiSSA": "lightning_peft.methods.pissa",
    "OLoRA": "lightning_peft.methods.olora",
    "LoftQ": "lightning_peft.methods.loftq",
    "EVA": "lightning_peft.methods.eva",
    "CorDA": "lightning_peft.methods.corda",
    "LoRAGA": "lightning_peft.methods.lora_ga",
    "QALoRA": "lightning_peft.methods.qalora",
    "AdaLoRA": "lightning_peft.methods.adalora",
    "ReLoRA": "lightning_peft.methods.relora",
    "LongLoRA": "lightning_peft.methods.longlora",
    "LoRADropout": "lightning_peft.methods.lora_dropout",
    "LQLoRA": "lightning_peft.methods.lqlora",
    "BitFit": "lightning_peft.methods.bitfit",
    "LNTuning": "lightning_peft.methods.ln_tuning",
    "Houlsby": "lightning_peft.methods.houlsby",
    "AdapterFusion": "lightning_peft.methods.adapter_fusion",
    "AdapterDrop": "lightning_peft.methods.adapterdrop",
    "Invertible": "lightning_peft.methods.invertible",
    "OutputAdapter": "lightning_peft.methods.ends",
    "InputAdapter": "lightning_peft.methods.ends",
    "AdaptFormer": "lightning_peft.methods.adaptformer",
    "Bapna": "lightning_peft.methods.bapna",
    "Pfeiffer": "lightning_peft.methods.pfeiffer",
    "ParallelAdapter": "lightning_peft.methods.parallel",
    "IA3": "lightning_peft.methods.ia3",
    "LoReFT": "lightning_peft.methods.loreft",
    "NoReFT": "lightning_peft.methods.noreft",
    "DiReFT": "lightning_peft.methods.direft",
    "LlamaAdapter": "lightning_peft.methods.llama_adapter",
    "LlamaAdapterV2": "lightning_peft.methods.llama_adapter_v2",
    "PromptTuning": "lightning_peft.methods.prompt_tuning",
    "PrefixTuning": "lightning_peft.methods.prefix_tuning",
    "PTuningV2": "lightning_peft.methods.p_tuning_v2",
    "Compacter": "lightning_peft.methods.compacter",
    "CompacterPP": "lightning_peft.methods.compacter",
    "PHMAdapter": "lightning_peft.methods.compacter",
    "MAM": "lightning_peft.methods.mam",
    "OFT": "lightning_peft.methods.oft",
    "HRA": "lightning_peft.methods.hra",
    "BOFT": "lightning_peft.methods.boft",
    "DeLoRA": "lightning_peft.methods.delora",
    "MiSS": "lightning_peft.methods.miss",
    "GraLoRA": "lightning_peft.methods.gralora",
    "RoAd": "lightning_peft.methods.road",
    "SSF": "lightning_peft.methods.ssf",
    "C3A": "lightning_peft.methods.c3a",
    "SHiRA": "lightning_peft.methods.shira",
    "KronA": "lightning_peft.methods.krona",
    "LoKr": "lightning_peft.methods.lokr",
    "MoRA": "lightning_peft.methods.mora",
    "ReMoRA": "lightning_peft.methods.remora",
    "FourierFT": "lightning_peft.methods.fourierft",
    "GLoRA": "lightning_peft.methods.glora",
    "WaveFT": "lightning_peft.methods.waveft",
    "KronAB": "lightning_peft.methods.krona_b",
    "KronABRes": "lightning_peft.methods.krona_b",
    "SAID": "lightning_peft.methods.said",
    "DID": "lightning_peft.methods.said",
    "TrainableTokens": "lightning_peft.methods.trainable_tokens",
    "FullFineTuning": "lightning_peft.methods.full",
    "LinearProbe": "lightning_peft.methods.linear_probe",
    "DoRA": "lightning_peft.methods.dora",
    "LoRAFA": "lightning_peft.methods.lora_fa",
    "VeRA": "lightning_peft.methods.vera",
    "DVoRA": "lightning_peft.methods.dvora",
    "LoHa": "lightning_peft.methods.loha",
    "MultiLoRA": "lightning_peft.methods.multilora",
    "TiedLoRA": "lightning_peft.methods.tied_lora",
    "NOLA": "lightning_peft.methods.nola",
    "HiRA": "lightning_peft.methods.hira",
    "VBLoRA": "lightning_peft.methods.vb_lora",
    "RandLoRA": "lightning_peft.methods.randlora",
    "PEFT": "lightning_peft.callback",
    "Adapter": "lightning_peft.core.adapter",
    "Method": "lightning_peft.core.method",
    "REGISTRY": "lightning_peft.core.method",
    "Site": "lightning_peft.core.sites",
    "sites": "lightning_peft.core.sites",
    "save_adapter": "lightning_peft.core.files",
    "load_adapter": "lightning_peft.core.files",
    "load_checkpoint": "lightning_peft.checkpoint",
    "materialize": "lightning_peft.core.method",
    "NF4Precision": "lightning_peft.precision",
    "NF4FSDPPrecision": "lightning_peft.precision",
    "quantise": "lightning_peft.precision",
    "quantise_within": "lightning_peft.budget",
    "gptq": "lightning_peft.calibration",
    "dequantise": "lightning_peft.precision",
    "empty_weights": "lightning_peft.quantised_files",
    "load_quantised": "lightning_peft.quantised_files",
    "save_quantised": "lightning_peft.quantised_files",
    "GradientCheckpointing": "lightning_peft.gradient_checkpointing",
    "plan": "lightning_peft.planning",
    "MemoryLog": "lightning_peft.planning",
    "lora_plus_groups": "lightning_peft.groups",
    "paged_adamw": "lightning_peft.optim",
    "paged_adamw_8bit": "lightning_peft.optim",
    "adamw_8bit": "lightning_peft.optim",
    "PEFTStrategyMixin": "lightning_peft.strategies",
    "PEFTSingleDeviceStrategy": "lightning_peft.strategies",
    "PEFTDDPStrategy": "lightning_peft.strategies",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'lightning_peft' has no attribute {name!r}. Known: {', '.join(_PUBLIC)}.")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from lightning_peft.budget import quantise_within
    from lightning_peft.calibration import gptq
    from lightning_peft.callback import PEFT
    from lightning_peft.checkpoint import load_checkpoint
    from lightning_peft.core.adapter import Adapter
    from lightning_peft.core.files import load_adapter, save_adapter
    from lightning_peft.core.method import REGISTRY, Method, materialize
    from lightning_peft.core.sites import Site, sites
    from lightning_peft.gradient_checkpointing import GradientCheckpointing
    from lightning_peft.groups import lora_plus_groups
    from lightning_peft.methods import (
        BOFT,
        C3A,
        DID,
        EVA,
        HRA,
        IA3,
        MAM,
        NOLA,
        OFT,
        SAID,
        SSF,
        AdaLoRA,
        AdapterDrop,
        AdapterFusion,
        AdaptFormer,
        Bapna,
        BitFit,
        Compacter,
        CompacterPP,
        CorDA,
        DeLoRA,
        DiReFT,
        DoRA,
        DVoRA,
        FourierFT,
        FullFineTuning,
        GLoRA,
        GraLoRA,
        HiRA,
        Houlsby,
        InputAdapter,
        Invertible,
        KronA,
        KronAB,
        KronABRes,
        LinearProbe,
        LlamaAdapter,
        LlamaAdapterV2,
        LNTuning,
        LoftQ,
        LoHa,
        LoKr,
        LongLoRA,
        LoRA,
        LoRADropout,
        LoRAFA,
        LoRAGA,
        LoReFT,
        LQLoRA,
        MiSS,
        MoRA,
        MultiLoRA,
        NoReFT,
        OLoRA,
        OutputAdapter,
        ParallelAdapter,
        Pfeiffer,
        PHMAdapter,
        PiSSA,
        PrefixTuning,
        PromptTuning,
        PTuningV2,
        QALoRA,
        RandLoRA,
        ReLoRA,
        ReMoRA,
        RoAd,
        SHiRA,
        TiedLoRA,
        TrainableTokens,
        VBLoRA,
        VeRA,
        WaveFT,
    )
    from lightning_peft.optim import adamw_8bit, paged_adamw, paged_adamw_8bit
    from lightning_peft.planning import MemoryLog, plan
    from lightning_peft.precision import NF4FSDPPrecision, NF4Precision, dequantise, quantise
    from lightning_peft.quantised_files import empty_weights, load_quantised, save_quantised
    from lightning_peft.strategies import PEFTDDPStrategy, PEFTSingleDeviceStrategy, PEFTStrategyMixin
