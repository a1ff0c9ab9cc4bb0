"""Plans of deep models from steps of two shallow ones, against the plan of the whole step."""

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from lightning_peft import LoRA
from lightning_peft.core.method import REGISTRY
from lightning_peft.planning import PlanError, plan, repeated, text_batch
from lightning_peft.planning.repeated import UnlikeError, alike, matched, quick

DEPTH = 13
BATCH = text_batch(2, 12)


def llama(**fields: Any) -> nn.Module:
    config = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    with torch.device("meta"):
        return hf.LlamaForCausalLM(hf.LlamaConfig(**{**config, "vocab_size": 90, "num_hidden_layers": DEPTH, **fields}))


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Depths that were continued to."""
    seen: list[int] = []
    real = repeated.continued

    def spy(steps: Any, plans: Any, count: int) -> Any:
        found = real(steps, plans, count)
        seen.append(count)
        return found

    monkeypatch.setattr(repeated, "continued", spy)
    return seen


HOW: dict[str, dict[str, Any]] = {
    "lora": {},
    "full": {"optimizer": "sgd"},
    "vera": {"precision": "bf16-mixed", "device": "cpu"},
    "nola": {"checkpointing": True, "accumulate": 2},
    "loreft": {"checkpointing": True, "precision": "nf4", "optimizer": "paged_adamw_8bit"},
    "mam": {"device": "cpu"},
    "bitfit": {"precision": "16-mixed", "device": "cpu"},
}


@pytest.mark.parametrize("name", HOW)
def test_the_plan_is_that_of_the_whole_step(name: str, used: list[int]) -> None:
    model = llama(attention_dropout=0.1).train()
    fields: dict[str, Any] = {"targets": "all-linear", "rank": 3} if name in ("lora", "vera", "nola") else {}
    assert quick(model, REGISTRY[name](**fields), batch=BATCH, **HOW[name]) == plan(
        model, REGISTRY[name](**fields), batch=BATCH, **HOW[name]
    )
    assert used == [DEPTH]


@pytest.mark.parametrize(
    ("model", "method", "how"),
    [
        (llama, {"layers": "last:3"}, {}),  # blocks that differ
        (lambda: llama(num_hidden_layers=3), {}, {}),  # few
        (llama, {}, {"offload": "weights"}),
        (llama, {"targets": "q", "alphas": {"*.12.*": 3.0}}, {}),  # a number that differs
    ],
)
def test_what_is_not_repeated_is_planned_as_a_whole(model: Any, method: Any, how: Any, used: list[int]) -> None:
    net = model()
    assert quick(net, LoRA(**method), batch=BATCH, **how) == plan(net, LoRA(**method), batch=BATCH, **how)
    assert used == []


class Uneven(nn.Module):
    """Blocks that are alike, of which each third is run twice."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, device="meta") for _ in range(DEPTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            x = block(block(x)) if index % 3 else block(x)
        return x


def test_steps_that_do_not_match_are_found_out(used: list[int]) -> None:
    model, batch = Uneven(), torch.empty(2, 5, 8, device="meta")
    given: dict[str, Any] = {"batch": batch, "loss": lambda out, _: out.sum()}
    assert quick(model, LoRA(targets="ffn"), **given) == plan(model, LoRA(targets="ffn"), **given)
    assert used == []


def test_nothing_is_changed_and_errors_are_those_of_the_plan() -> None:
    model = llama()
    before = {name: id(module) for name, module in model.named_modules()}
    quick(model, LoRA(), batch=BATCH)
    assert before == {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(PlanError, match="gives no loss"):
        quick(model, LoRA(), batch=text_batch(2, 12, None))


def test_facts_that_are_alike() -> None:
    assert alike("model.layers.0.q", "model.layers.12.q", 12)
    assert alike(0, 3, 3)
    assert not alike("fc1", "fc2x", 1)
    assert not alike("full", "sliding", 1)
    assert not alike(True, False, 1)
    assert not alike(4, 8, 3)


def test_passes_of_which_one_is_not_the_other_with_a_block_more() -> None:
    course = torch.zeros(9, 1, dtype=torch.int64)
    with pytest.raises(UnlikeError, match="3 operators, 4 with a block more"):
        matched([[1, 2, 3], [1, 9, 8, 3]], [course[:4], course[:5]], 20)
