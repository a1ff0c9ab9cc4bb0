"""One file a method. Importing this package fills the registry; the list below is the only other thing to touch."""

from lightning_peft.methods.bitfit import BitFit
from lightning_peft.methods.corda import CorDA
from lightning_peft.methods.eva import EVA
from lightning_peft.methods.full import FullFineTuning
from lightning_peft.methods.houlsby import Houlsby
from lightning_peft.methods.ia3 import IA3
from lightning_peft.methods.linear_probe import LinearProbe
from lightning_peft.methods.ln_tuning import LNTuning
from lightning_peft.methods.loftq import LoftQ
from lightning_peft.methods.lora import LoRA
from lightning_peft.methods.lora_ga import LoRAGA
from lightning_peft.methods.loreft import LoReFT
from lightning_peft.methods.mam import MAM
from lightning_peft.methods.olora import OLoRA
from lightning_peft.methods.parallel import ParallelAdapter
from lightning_peft.methods.pissa import PiSSA
from lightning_peft.methods.prefix_tuning import PrefixTuning
from lightning_peft.methods.prompt_tuning import PromptTuning

__all__ = [
    "IA3",
    "MAM",
    "BitFit",
    "FullFineTuning",
    "Houlsby",
    "LNTuning",
    "LinearProbe",
    "LoRA",
    "LoftQ",
    "CorDA",
    "EVA",
    "LoRAGA",
    "OLoRA",
    "PiSSA",
    "LoReFT",
    "ParallelAdapter",
    "PrefixTuning",
    "PromptTuning",
]
