"""LT-SFT: Composable Sparse Fine-Tuning for Cross-Lingual Transfer. Ansell, Ponti, Korhonen, Vulic, ACL 2022.
https://arxiv.org/abs/2110.07560
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lightning_peft.methods.selective import Score, SelectiveTuning


class LTSFT(SelectiveTuning, name="lt_sft", family="selective", paper="2110.07560", mergeable=True):
    """theta = theta_0 + m * v, m the entries of largest |theta_1 - theta_0|, theta_1 from a run that trains all

    `SelectiveTuning` in two phases of one `fit`: after the share `priming` of its optimizer steps the K entries that
    have moved most are chosen, everything goes back to theta_0, heads included, the optimizer begins anew, and the
    chosen entries train. The learning rate is that of the one schedule; the authors run theirs twice (`jagged_cosine`
    with a cycle of a phase). Changes of several files add up: theta_0 + v_language + v_task, each under a label of its
    own. Norms and the output embedding (transformers' `get_output_embeddings`, or an `lm_head`) are left out, and with
    it an input embedding that is tied to it; to train these too, take SelectiveTuning(score="change"). l1: weight of
    the mean of |theta - theta_0| in the first phase (the authors take 0.1 for language models). budget: K as a share,
    or with measure="parameters" as a number; the authors take 7,667,712 for a language and 14,155,776 for a task.
    Weight decay draws to theta_0. Source: section 3.
    """

    score: Score = "change"
    exclude: str | list[str] | None = "norm?,norm.qk?,*lm_head?"
    budget: float = 0.05

    def left_out(self, model: nn.Module) -> Iterator[nn.Module]:
        for module in model.modules():
            if isinstance(out := getattr(module, "get_output_embeddings", lambda: None)(), nn.Module):
                yield out
