"""The same on CUDA: run with `pytest -m gpu` where there is a device; skipped elsewhere."""

from __future__ import annotations

from pathlib import Path

import boring
import pytest
import torch
import zoo
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_peft.methods  # noqa: F401  fills the registry
from lightning_peft import LoRA, load_adapter, save_adapter
from lightning_peft.core import state
from lightning_peft.core.method import REGISTRY
from lightning_peft.core.sites import TargetError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]
METHODS = [name for name, cls in REGISTRY.items() if cls.__module__.startswith("lightning_peft.")]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("model", ["bert", "llama", "vit"])
def test_a_method_applied_on_the_device_equals_one_moved_there(name: str, model: str) -> None:
    inputs = {k: v.cuda() for k, v in zoo.inputs(model).items()}
    outputs = []
    for moved in (False, True):
        net = zoo.build(model).eval()
        net = net if moved else net.cuda()
        try:
            REGISTRY[name]().apply(net)
        except (TargetError, ValueError):
            pytest.skip(f"{name} has nothing to act on in {model}")
        outputs.append(net.cuda()(**inputs).logits)
    assert torch.equal(*outputs)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "16-mixed"])
def test_training_and_files(precision: str, tmp_path: Path) -> None:
    module = boring.Boring(dropout=0.0)
    boring.trainer(tmp_path, [LoRA(rank=2)], accelerator="gpu", devices=1, precision=precision).fit(
        module, boring.data(), boring.data(6, shuffle=False)
    )
    assert {p.dtype for n, p in state.trainable(module).items() if ".adapters." in n} == {torch.float32}
    save_adapter(module, tmp_path / "adapter")
    load_adapter(boring.Boring(), tmp_path / "adapter")


def test_merge_on_the_device_is_undone_to_the_bit() -> None:
    net = zoo.build("llama").cuda().bfloat16()
    before = boring.tensors(net)
    lora = LoRA(rank=2)
    lora.apply(net)
    for parameter in state.trainable(net).values():
        torch.nn.init.normal_(parameter, std=0.1)
    lora.merge(net)
    lora.remove(net)
    assert boring.largest_difference(before, boring.tensors(net)) == 0


def test_resume_brings_back_the_generators_of_the_device(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    straight, resumed = boring.Boring(), boring.Boring()
    options = {"accelerator": "gpu", "devices": 1, "deterministic": "warn"}
    boring.trainer(tmp_path, [LoRA(rank=2, dropout=0.2), saver], **options).fit(straight, boring.data())
    torch.cuda.manual_seed(99)
    boring.trainer(tmp_path, [LoRA(rank=2, dropout=0.2)], **options).fit(
        resumed, boring.data(), ckpt_path=str(tmp_path / "step=3.ckpt")
    )
    assert boring.largest_difference(boring.tensors(straight), boring.tensors(resumed)) < 1e-5
