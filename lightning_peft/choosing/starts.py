"""Where to begin with a method: settings that were published or released with it, and where they are from.

A table of data. `standing` is where comparisons put the method's results, when nothing else is asked for: 3 as full
fine-tuning, 2 close to it, 1 below, 0 a baseline. Of GLUE-like tasks: full ~ Houlsby ~ MAM ~ LoRA >= Pfeiffer >= BitFit
> LN-Tuning ~ prefix > prompt; None where no comparison is known here. It orders what `choose` prints, and is no
measurement of ours. Figures come from the text of a paper or of its authors' code; where `source` is empty there are
none, and the defaults of this library stand. A method without a row is looked at when it is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["classification", "causal-lm", "image"]
TEXT: tuple[Kind, ...] = ("classification", "causal-lm")
KINDS: tuple[Kind, ...] = (*TEXT, "image")
LINEAR = ("scheduler=linear_warmup",)
SIX_PERCENT = (*LINEAR, "scheduler.warmup=0.06")


@dataclass(frozen=True)
class Start:
    """method: its name. settings: fields of it. run: overrides of the rest. kinds: of data that it is for.

    size: (from, below) parameters of a base that it is for. few: a source for its use with few examples. quantised:
    True for codes alone, False for floats alone, None for both.
    """

    method: str
    standing: int | None
    source: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    run: tuple[str, ...] = ()
    kinds: tuple[Kind, ...] = KINDS
    size: tuple[float, float] = (0, float("inf"))
    few: str = ""
    quantised: bool | None = None


BILLION = 10**9
OUR_RATE = "(the rate is this library's)"
QLORA = "QLoRA, 2305.14314, and the defaults of its code: adapters on every projection matter more than their rank"
STARTS = (
    Start("lora", 3, QLORA, {"targets": "all-linear", "rank": 64, "alpha": 16.0},
          ("optimizer.lr=0.0002", "optimizer.weight_decay=0.0", "scheduler=constant", "trainer.gradient_clip_val=0.3"),
          ("causal-lm",), (BILLION, float("inf"))),
    Start("lora", 3, "LoRA, 2106.09685, and its code: GPT-2",
          {"targets": "q,v", "rank": 4, "alpha": 32.0, "dropout": 0.1},
          ("optimizer.lr=0.0002", "optimizer.weight_decay=0.01", *LINEAR), ("causal-lm",), (0, BILLION)),
    Start("lora", 3, "LoRA, 2106.09685, and its code: DeBERTa-XXL, MNLI (warm-up there: 1,000 steps)",
          {"targets": "q,v", "rank": 16, "alpha": 32.0}, ("optimizer.lr=0.0001", "optimizer.weight_decay=0.0",
          *SIX_PERCENT), ("classification",), (BILLION, float("inf"))),
    Start("lora", 3, "LoRA, 2106.09685, and its code: RoBERTa, MNLI", {"targets": "q,v", "rank": 8, "alpha": 16.0},
          ("optimizer.lr=0.0005", "optimizer.weight_decay=0.1", *SIX_PERCENT), ("classification",), (0, BILLION)),
    Start("lora", 3, kinds=("image",)),
    Start("qalora", 3, "QA-LoRA, 2309.14717: LLaMA 7B and 13B, Alpaca (its code's default rate is 0.0002)",
          {"targets": "all-linear", "rank": 64, "alpha": 16.0, "group": 32},
          ("optimizer.lr=0.00002", "scheduler=constant", "trainer.gradient_clip_val=0.3", "precision=int4"),
          ("causal-lm",), quantised=True),
    Start("dora", 3, "DoRA, 2402.09353: commonsense reasoning with LLaMA",
          {"targets": "q,k,v,up,down", "rank": 16, "alpha": 32.0, "dropout": 0.05},
          ("optimizer.lr=0.0002", *LINEAR), ("causal-lm",)),
    Start("dora", 2, kinds=("classification", "image")),
    Start("pissa", 3, "PiSSA, 2404.02948, README of its code",
          {"targets": "all-linear", "rank": 128, "alpha": 128.0},
          ("optimizer.lr=0.00002", "scheduler=cosine", "scheduler.warmup=0.03"), ("causal-lm",), quantised=False),
    Start("parallel", 3, "He et al., 2110.04366, code: GLUE with RoBERTa", {"bottleneck": 16, "scale": 2.0},
          ("optimizer.lr=0.0001", "optimizer.weight_decay=0.1", *SIX_PERCENT), ("classification",)),
    Start("parallel", 3, "He et al., 2110.04366, code: XSum with BART", {"bottleneck": 512, "scale": 4.0},
          ("optimizer.lr=0.00005",), ("causal-lm",)),
    Start("houlsby", 3, "Houlsby et al., 1902.00751, README of its code: BERT", {"bottleneck": 64},
          ("optimizer.lr=0.0003", *LINEAR), TEXT),
    Start("mam", 3, "He et al., 2110.04366, code: GLUE with RoBERTa", {"length": 16, "bottleneck": 16, "scale": 2.0},
          ("optimizer.lr=0.0001", "optimizer.weight_decay=0.1", *SIX_PERCENT), ("classification",)),
    Start("mam", 3, "He et al., 2110.04366, code: XSum with BART", {"length": 30, "bottleneck": 512, "scale": 4.0},
          ("optimizer.lr=0.00005",), ("causal-lm",)),
    Start("full", 3, "BERT, 1810.04805, appendix A.3: 5e-5, 3e-5 or 2e-5", {}, ("optimizer.lr=0.00003", *LINEAR),
          ("classification",)),
    Start("full", 3, "none for this data: a rate of the order of BERT's, 1810.04805, appendix A.3", {},
          ("optimizer.lr=0.00003", *LINEAR), ("causal-lm", "image")),
    Start("loreft", 3, "ReFT, 2404.03592, appendix: commonsense reasoning with LLaMA",
          {"rank": 8, "first": 7, "last": 7},
          ("optimizer.lr=0.0009", "optimizer.weight_decay=0.0", *LINEAR, "scheduler.warmup=0.1"), ("causal-lm",)),
    Start("loreft", 2, "ReFT, 2404.03592, appendix: GLUE with RoBERTa (the rate is this library's)",
          {"rank": 1, "first": 1, "last": 0}, (), ("classification",)),
    Start("pfeiffer", 2, "AdapterFusion, 2005.00247: bottleneck of a sixteenth of 768", {"bottleneck": 48},
          ("optimizer.lr=0.0001", *LINEAR), TEXT),
    Start("ia3", 2, "T-Few, 2205.05638", {}, ("optimizer=adafactor", "optimizer.lr=0.003", *SIX_PERCENT), TEXT,
          few="T-Few, 2205.05638: made for few examples"),
    Start("bitfit", 2, "BitFit, 2106.10199, code: GLUE with BERT", {}, ("optimizer.lr=0.001",), ("classification",),
          few="BitFit, 2106.10199: as good as full fine-tuning or better with small and medium data"),
    Start("bitfit", 2, kinds=("causal-lm", "image")),
    Start("vera", 2, "VeRA, 2310.11454: rank 1024 on RoBERTa-base, a rate about ten times LoRA's",
          {"targets": "q,v", "rank": 1024}, ("optimizer.lr=0.005", *SIX_PERCENT), ("classification",)),
    Start("vera", 2, "VeRA, 2310.11454: LLaMA; a rate about ten times LoRA's", {"targets": "all-linear", "rank": 1024},
          ("optimizer.lr=0.002", *LINEAR), ("causal-lm",)),
    Start("nola", 2, "NOLA, 2310.02556: GPT-2", {"targets": "q,v", "rank": 8, "alpha": 8.0, "coefficients": 1000},
          ("optimizer.lr=0.005",), ("causal-lm",), (0, BILLION)),
    Start("nola", 2, "NOLA, 2310.02556: LLaMA-2 7B",
          {"targets": "all-linear", "rank": 16, "alpha": 4.0, "coefficients": 128}, ("optimizer.lr=0.001",),
          ("causal-lm",), (BILLION, float("inf"))),
    Start("mora", 2, "MoRA, 2405.12130: LLaMA-2 7B", {"targets": "all-linear", "rank": 8, "type": 6},
          ("optimizer.lr=0.0003", *LINEAR), ("causal-lm",)),
    Start("compacter_pp", 2, "Compacter, 2106.04647, code: T5-base (warm-up there: 500 steps)",
          {"bottleneck": 24, "n": 4, "norms": True}, ("optimizer.lr=0.003", *SIX_PERCENT), TEXT),
    Start("adamix", 2, "AdaMix, 2205.12410, code: RoBERTa-large", {"bottleneck": 16, "experts": 4},
          ("optimizer.lr=0.0003", *LINEAR), ("classification",)),
    Start("fish", 2, f"FISH Mask, 2111.09839, and its code: GLUE with BERT-large {OUR_RATE}",
          {"budget": 0.005, "samples": 1024}, (), ("classification",)),
    Start("unipelt", 2, f"UniPELT, 2110.07577: GLUE with BERT-base {OUR_RATE}",
          {"length": 10, "rank": 8, "bottleneck": 48}, (), ("classification",),
          few="UniPELT, 2110.07577, abstract: ahead of each of its parts with 100 to 1,000 examples"),
    Start("s4", 2, "S4, 2301.01821: 0.5 % in four groups of blocks (their sizes and the rate are this library's)",
          {"budget": 0.005}, (), TEXT),
    Start("lt_sft", 2, f"LT-SFT, 2110.07560, and its code: a task with XLM-R {OUR_RATE}",
          {"budget": 14_155_776, "measure": "parameters"}, (), TEXT, (10**8, BILLION)),
    Start("surgical", 2, f"Surgical fine-tuning, 2210.11466, code: shifted images {OUR_RATE}", {},
          ("optimizer=adam",), ("image",)),
    Start("spafit", 2, kinds=("classification",)),
    Start("cross_attention", 2, kinds=("causal-lm",)),
    Start("adaptformer", 2, kinds=("image",)),
    Start("ssf", 2, kinds=("image",)),
    Start("vpt", 1, kinds=("image",)),
    Start("ln_tuning", 1, kinds=KINDS),
    Start("prefix_tuning", 1, "Prefix-Tuning, 2101.00190, code: GPT-2, WebNLG", {"length": 5, "bottleneck": 512},
          ("optimizer.lr=0.00005", *LINEAR), ("causal-lm",),
          few="Prefix-Tuning, 2101.00190, abstract: ahead of fine-tuning with little data"),
    Start("p_tuning_v2", 1, "P-Tuning v2, 2110.07602, code: RTE with RoBERTa-large", {"length": 128},
          ("optimizer.lr=0.005",), ("classification",)),
    Start("llama_adapter", 1, "LLaMA-Adapter, 2303.16199, code: LLaMA-7B (the rate is this library's)", {"length": 10},
          ("optimizer.weight_decay=0.02",), ("causal-lm",)),
    Start("lst", 1, "LST, 2206.06522, code: T5-base", {"reduction": 8}, ("optimizer.lr=0.003",), TEXT, quantised=False),
    Start("prompt_tuning", 0, "experiment=prompt_tuning of this library", {},
          ("optimizer.lr=0.05", "optimizer.weight_decay=0.0", "scheduler=constant"), TEXT),
    Start("diff_pruning", None, "DiffPruning, 2012.07463, and its code: GLUE with BERT-large",
          {"budget": 0.005, "penalty": 1.25e-7}, ("optimizer.lr=0.00001", "trainer.gradient_clip_val=1.0"),
          ("classification",)),
    Start("adalora", None, f"AdaLoRA, 2303.10512: ranks from 12 to 8 {OUR_RATE}",
          {"targets": "all-linear", "rank": 12, "target": 8}, (), TEXT),
    Start("fourierft", None, f"FourierFT, 2405.03003: GLUE with RoBERTa {OUR_RATE}", {"targets": "q,v", "count": 1000},
          (), ("classification",)),
    Start("linear_probe", 0, kinds=("classification", "image")),
)  # fmt: skip
