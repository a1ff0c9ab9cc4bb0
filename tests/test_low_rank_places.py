"""LoRA where a weight is no matrix: embeddings and convolutions, against the dense formula in fp64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
import zoo
from harness import perturb
from torch import Tensor, nn

from lightning_peft import LoRA, load_adapter, save_adapter
from lightning_peft.core import state
from lightning_peft.core.adapter import NotMergeableError
from lightning_peft.core.sites import TargetError

CONVOLUTIONS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "1d": (nn.Conv1d(6, 8, 3, padding="same", dilation=2), (2, 6, 9)),
    "1d, circular": (nn.Conv1d(6, 8, 4, padding=2, padding_mode="circular"), (2, 6, 9)),
    "2d, strided": (nn.Conv2d(6, 8, (3, 2), stride=(2, 1), padding=(1, 0)), (2, 6, 9, 7)),
    "2d, grouped": (nn.Conv2d(6, 8, 3, groups=2, bias=False), (2, 6, 5, 5)),
    "2d, depthwise": (nn.Conv2d(6, 6, 3, padding=1, groups=6), (2, 6, 5, 5)),
    "2d, one image": (nn.Conv2d(6, 8, 3), (6, 5, 5)),
    "2d, channels last": (nn.Conv2d(6, 8, 3).to(memory_format=torch.channels_last), (2, 6, 5, 5)),
    "3d": (nn.Conv3d(2, 4, 3, padding=1, padding_mode="replicate"), (2, 2, 4, 4, 4)),
}


def adapted(module: nn.Module, **fields: Any) -> tuple[nn.Module, LoRA]:
    net = nn.Sequential(copy.deepcopy(module)).double()
    lora = LoRA(targets="0", rank=3, alpha=5, heads=None, dtype="float64", **fields)
    lora.apply(net)
    return net, lora


def factors(net: nn.Module) -> tuple[Tensor, Tensor]:
    adapter = net.get_submodule("0.adapters.lora")
    return adapter.a, adapter.b  # type: ignore[return-value]


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_convolution_is_one_with_the_sum_of_kernels(kind: str) -> None:
    module, shape = CONVOLUTIONS[kind]
    net, lora = adapted(module)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    before = net[0].weight.clone()
    assert torch.equal(net(x), copy.deepcopy(module).double()(x))
    perturb(net, 0.5)
    a, b = factors(net)
    assert a.shape == (3, before[0].numel())
    assert b.shape == (len(before), 3)
    dense = copy.deepcopy(module).double()
    kernel = before + 5 / 3 * (b @ a).view(before.shape)
    out = torch.func.functional_call(dense, {"weight": kernel}, (x,))
    y = net(x)
    torch.testing.assert_close(y, out, atol=1e-10, rtol=1e-10)
    g = torch.randn_like(y)
    inputs = [x, a, b]
    for one, two in zip(torch.autograd.grad(y, inputs, g), torch.autograd.grad(out, inputs, g), strict=True):
        torch.testing.assert_close(one, two, atol=1e-10, rtol=1e-10)
    lora.merge(net)
    torch.testing.assert_close(net(x), out, atol=1e-10, rtol=1e-10)
    lora.unmerge(net)
    assert torch.equal(net[0].weight, before)


@pytest.mark.parametrize("scaled", [False, True])
def test_an_embedding_is_one_with_the_sum_of_tables(scaled: bool) -> None:
    class Scaled(nn.Embedding):
        embed_scale = 3.0

        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * self.embed_scale

    net, lora = adapted((Scaled if scaled else nn.Embedding)(11, 8, padding_idx=0))
    index = torch.tensor([[1, 2, 0, 2], [3, 10, 5, 0]])
    table = net[0].weight.detach().clone()
    start = net(index)
    a, b = factors(net)
    assert not a.any()
    assert b.any()
    perturb(net, 0.5)
    gain = 3.0 if scaled else 1.0
    out = gain * F.embedding(index, table + 5 / 3 * (b @ a).T, padding_idx=0)
    torch.testing.assert_close(net(index), out, atol=1e-10, rtol=1e-10)
    assert not torch.allclose(net(index), start)
    g = torch.randn_like(out)
    found, expected = (torch.autograd.grad(y, [a, b], g) for y in (net(index), out))
    torch.testing.assert_close(found[0], expected[0], atol=1e-10, rtol=1e-10)
    assert not found[0][:, 0].any()  # the padding's
    lora.merge(net)
    torch.testing.assert_close(net(index), out, atol=1e-10, rtol=1e-10)


def test_the_gradient_of_padding_is_that_of_torch() -> None:
    """peft gives B the padding's part too; torch's Embedding gives the padding's row of the table none at all."""
    net, _ = adapted(nn.Embedding(5, 4, padding_idx=0))
    perturb(net, 0.5)
    a, b = factors(net)
    (grad,) = torch.autograd.grad(net(torch.tensor([0])).sum(), [a])
    assert not grad.any()


def test_an_embedding_in_a_language_model_trains_and_comes_back(tmp_path: Any) -> None:
    net = zoo.build("llama")
    lora = LoRA(targets="embed,q", rank=2, heads=None)
    lora.apply(net)
    perturb(net, 0.3)
    expected = net(**zoo.inputs("llama")).logits
    save_adapter(net, tmp_path / "adapter")
    other = zoo.build("llama")
    load_adapter(other, tmp_path / "adapter")
    torch.testing.assert_close(other(**zoo.inputs("llama")).logits, expected)
    assert state.describe(net)["trainable"] == 2 * (net.config.vocab_size + 32) + 2 * 2 * 64


def test_patches_of_a_vision_transformer() -> None:
    torch.manual_seed(0)
    net = hf.ViTModel(hf.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
    net.eval()
    lora = LoRA(targets="*.projection", rank=2, heads=None)
    lora.apply(net)
    perturb(net, 0.3)
    x = torch.randn(1, 3, 224, 224)
    expected = net(x).last_hidden_state
    lora.merge(net)
    torch.testing.assert_close(net(x).last_hidden_state, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"sparse": True}])
def test_embeddings_that_cannot_be_followed(options: dict[str, Any]) -> None:
    with pytest.raises(TargetError, match="max_norm or sparse"):
        adapted(nn.Embedding(5, 4, **options))


def test_a_bias_beside_an_embedding_cannot_be_merged() -> None:
    net, lora = adapted(nn.Embedding(5, 4), lora_bias=True)
    perturb(net, 0.3)
    c = net.get_submodule("0.adapters.lora").c
    a, b = factors(net)
    expected = net[0].weight[[2]] + 5 / 3 * ((b @ a).T[[2]] + c)
    torch.testing.assert_close(net(torch.tensor([2])), expected)
    with pytest.raises(NotMergeableError, match="without a bias"):
        lora.merge(net)
