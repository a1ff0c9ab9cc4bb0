"""One file a method. Importing this package fills the registry; the list below is the only other thing to touch."""

from lightning_peft.methods.adalora import AdaLoRA
from lightning_peft.methods.adamix import AdaMix
from lightning_peft.methods.adapter_fusion import AdapterFusion
from lightning_peft.methods.adapterdrop import AdapterDrop
from lightning_peft.methods.adaptformer import AdaptFormer
from lightning_peft.methods.attention_fusion import AttentionFusion
from lightning_peft.methods.bapna import Bapna
from lightning_peft.methods.bitfit import BitFit
from lightning_peft.methods.boft import BOFT
from lightning_peft.methods.c3a import C3A
from lightning_peft.methods.compacter import Compacter, CompacterPP, PHMAdapter
from lightning_peft.methods.corda import CorDA
from lightning_peft.methods.cross_attention import CrossAttention
from lightning_peft.methods.delora import DeLoRA
from lightning_peft.methods.diff_pruning import DiffPruning
from lightning_peft.methods.direft import DiReFT
from lightning_peft.methods.dora import DoRA
from lightning_peft.methods.dvora import DVoRA
from lightning_peft.methods.ends import InputAdapter, OutputAdapter
from lightning_peft.methods.eva import EVA
from lightning_peft.methods.far import FAR
from lightning_peft.methods.fish import FishMask
from lightning_peft.methods.fourierft import FourierFT
from lightning_peft.methods.full import FullFineTuning
from lightning_peft.methods.glora import GLoRA
from lightning_peft.methods.gralora import GraLoRA
from lightning_peft.methods.hira import HiRA
from lightning_peft.methods.houlsby import Houlsby
from lightning_peft.methods.hra import HRA
from lightning_peft.methods.ia3 import IA3
from lightning_peft.methods.invertible import Invertible
from lightning_peft.methods.ipt import IPT
from lightning_peft.methods.krona import KronA
from lightning_peft.methods.krona_b import KronAB, KronABRes
from lightning_peft.methods.lets import LeTS
from lightning_peft.methods.linear_probe import LinearProbe
from lightning_peft.methods.llama_adapter import LlamaAdapter
from lightning_peft.methods.llama_adapter_v2 import LlamaAdapterV2
from lightning_peft.methods.ln_tuning import LNTuning
from lightning_peft.methods.loftq import LoftQ
from lightning_peft.methods.loha import LoHa
from lightning_peft.methods.lokr import LoKr
from lightning_peft.methods.longlora import LongLoRA
from lightning_peft.methods.lora import LoRA
from lightning_peft.methods.lora_dropout import LoRADropout
from lightning_peft.methods.lora_fa import LoRAFA
from lightning_peft.methods.lora_ga import LoRAGA
from lightning_peft.methods.loreft import LoReFT
from lightning_peft.methods.lqlora import LQLoRA
from lightning_peft.methods.lst import LST
from lightning_peft.methods.lt_sft import LTSFT
from lightning_peft.methods.mam import MAM
from lightning_peft.methods.miss import MiSS
from lightning_peft.methods.mora import MoRA
from lightning_peft.methods.multilora import MultiLoRA
from lightning_peft.methods.multitask_prompt import MultitaskPrompt
from lightning_peft.methods.nola import NOLA
from lightning_peft.methods.noreft import NoReFT
from lightning_peft.methods.oft import OFT
from lightning_peft.methods.olora import OLoRA
from lightning_peft.methods.p_tuning import PTuning
from lightning_peft.methods.p_tuning_v2 import PTuningV2
from lightning_peft.methods.parallel import ParallelAdapter
from lightning_peft.methods.pfeiffer import Pfeiffer
from lightning_peft.methods.pissa import PiSSA
from lightning_peft.methods.prefix_tuning import PrefixTuning
from lightning_peft.methods.prompt_tuning import PromptTuning
from lightning_peft.methods.qalora import QALoRA
from lightning_peft.methods.randlora import RandLoRA
from lightning_peft.methods.relora import ReLoRA
from lightning_peft.methods.remora import ReMoRA
from lightning_peft.methods.road import RoAd
from lightning_peft.methods.s4 import S4
from lightning_peft.methods.said import DID, SAID
from lightning_peft.methods.selective import SelectiveTuning
from lightning_peft.methods.shira import SHiRA
from lightning_peft.methods.spafit import SPAFIT
from lightning_peft.methods.sparse_adapter import SparseAdapter
from lightning_peft.methods.ssf import SSF
from lightning_peft.methods.surgical import Surgical
from lightning_peft.methods.tied_lora import TiedLoRA
from lightning_peft.methods.top_layers import TopLayers
from lightning_peft.methods.trainable_tokens import TrainableTokens
from lightning_peft.methods.unipelt import UniPELT
from lightning_peft.methods.vb_lora import VBLoRA
from lightning_peft.methods.vera import VeRA
from lightning_peft.methods.vpt import VPT
from lightning_peft.methods.waveft import WaveFT

__all__ = [
    "AdaLoRA",
    "AdaMix",
    "AdaptFormer",
    "AdapterDrop",
    "AdapterFusion",
    "AttentionFusion",
    "BOFT",
    "Bapna",
    "BitFit",
    "C3A",
    "Compacter",
    "CompacterPP",
    "CorDA",
    "CrossAttention",
    "DID",
    "DVoRA",
    "DeLoRA",
    "DiReFT",
    "DiffPruning",
    "DoRA",
    "EVA",
    "FAR",
    "FishMask",
    "FourierFT",
    "FullFineTuning",
    "GLoRA",
    "GraLoRA",
    "HRA",
    "HiRA",
    "Houlsby",
    "IA3",
    "IPT",
    "InputAdapter",
    "Invertible",
    "KronA",
    "KronAB",
    "KronABRes",
    "LNTuning",
    "LQLoRA",
    "LST",
    "LTSFT",
    "LeTS",
    "LinearProbe",
    "LlamaAdapter",
    "LlamaAdapterV2",
    "LoHa",
    "LoKr",
    "LoRA",
    "LoRADropout",
    "LoRAFA",
    "LoRAGA",
    "LoReFT",
    "LoftQ",
    "LongLoRA",
    "MAM",
    "MiSS",
    "MoRA",
    "MultiLoRA",
    "MultitaskPrompt",
    "NOLA",
    "NoReFT",
    "OFT",
    "OLoRA",
    "OutputAdapter",
    "PHMAdapter",
    "PTuning",
    "PTuningV2",
    "ParallelAdapter",
    "Pfeiffer",
    "PiSSA",
    "PrefixTuning",
    "PromptTuning",
    "QALoRA",
    "RandLoRA",
    "ReLoRA",
    "ReMoRA",
    "RoAd",
    "S4",
    "SAID",
    "SHiRA",
    "SPAFIT",
    "SSF",
    "SelectiveTuning",
    "SparseAdapter",
    "Surgical",
    "TiedLoRA",
    "TopLayers",
    "TrainableTokens",
    "UniPELT",
    "VBLoRA",
    "VPT",
    "VeRA",
    "WaveFT",
]
