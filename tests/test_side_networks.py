"""Side networks: what they compute, what they are cut from, what they keep for backward, and where they cannot be."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
import zoo
from harness import forward, loss, moved, output, perturb, tensors
from settings import MODELS, adapted
from torch import Tensor, nn

from lightning_peft import LST, AttentionFusion, LeTS, LoRA, ParallelAdapter
from lightning_peft.callback import LifeCycleError
from lightning_peft.core import state
from lightning_peft.core.adapter import Adapters
from lightning_peft.core.calibration import CalibrationError
from lightning_peft.core.fields import FieldError
from lightning_peft.core.sites import TargetError
from lightning_peft.gradient_checkpointing import checkpoint_blocks
from lightning_peft.methods.lets import Aggregator, Choice, ChosenSparse
from lightning_peft.methods.lst import Ladder
from lightning_peft.precision import quantise


def ladder(net: nn.Module, stack: str = "") -> Ladder:
    found = [m for n, m in net.named_modules() if isinstance(m, Ladder) and n.startswith(stack)]
    return found[0]


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


# ------------------------------------------------------------------ nothing of the backbone is kept
class InBlocks:
    """Counts what autograd saves while a block of the base runs, and all it saves."""

    def __init__(self, net: nn.Module) -> None:
        blocks = [x.place for x in state.get_applied(net).placements if x.role != "stack"]
        self.depth, self.inside, self.total = 0, 0, 0
        for block in blocks:
            for part in list(block.children()) or [block]:
                if "adapters" not in part._modules and not isinstance(part, Adapters):
                    part.register_forward_pre_hook(lambda *_: self.enter(1))
                    part.register_forward_hook(lambda *_: self.enter(-1), always_call=True)

    def enter(self, by: int) -> None:
        self.depth += by

    def pack(self, tensor: Tensor) -> Tensor:
        self.inside += tensor.nbytes * (self.depth > 0)
        self.total += tensor.nbytes
        return tensor


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", ["lst", "attention_fusion"])
def test_no_byte_of_the_backbone_is_saved(name: str, model: str) -> None:
    net, _ = adapted(name, model)
    net.train()
    count = InBlocks(net)
    with torch.autograd.graph.saved_tensors_hooks(count.pack, lambda t: t):
        value = loss(net, model)
    assert count.total > 0
    assert count.inside == 0
    value.backward()
    assert all(p.grad is not None for p in state.trainable(net).values())
    plain = zoo.build(model)
    LoRA(targets="mlp,lora" if model == "mlp" else "down", heads=None).apply(plain)
    other = InBlocks(net)
    for x in state.get_applied(plain).placements:
        x.place.register_forward_pre_hook(lambda *_: other.enter(1))
        x.place.register_forward_hook(lambda *_: other.enter(-1))
    with torch.autograd.graph.saved_tensors_hooks(other.pack, lambda t: t):
        loss(plain.train(), model)
    assert other.inside > 0, "the counter sees nothing"


# ------------------------------------------------------------------ LST: what it computes
def test_lst_of_a_plain_module_is_the_equation() -> None:
    """Dense, in fp64, gradients too: two layers of width 16, a side network of width 4 with MLP blocks."""
    net = zoo.build("mlp").double()
    LST(targets="mlp,lora", reduction=4, dtype="float64", heads="out").apply(net)
    perturb(net, scale=0.3)
    x = zoo.inputs("mlp")["x"].double()
    w = {
        n.partition(".lst.")[2]: p.detach().clone().requires_grad_()
        for n, p in state.trainable(net).items()
        if ".lst." in n
    }
    out = {n: p.detach().clone().requires_grad_() for n, p in net.out.named_parameters()}
    with torch.no_grad():
        h0 = net.body(x)
        h1 = net.mlp.adapters["lst"].place.weight.new_tensor(F.linear(h0, net.mlp.weight, net.mlp.bias).tolist())
        h2 = F.linear(torch.tanh(h1), net.lora.weight)
    s = F.linear(h0, w["first.weight"], w["first.bias"])
    for i, h in enumerate((h1, h2)):
        mu = 1 / (1 + torch.exp(-w["alpha"][i] / 0.1))
        s = mu * s + (1 - mu) * F.linear(h, w[f"downs.{i}.weight"], w[f"downs.{i}.bias"])
        b = f"side.blocks.{i}."
        z = F.layer_norm(s, (4,), w[b + "norm2.weight"], w[b + "norm2.bias"])
        z = F.gelu(F.linear(z, w[b + "up.weight"], w[b + "up.bias"]))
        s = s + F.linear(z, w[b + "down.weight"], w[b + "down.bias"])
    s = F.layer_norm(s, (4,), w["side.norm.weight"], w["side.norm.bias"])
    y = F.linear(torch.tanh(F.linear(s, w["up.weight"], w["up.bias"])), out["weight"], out["bias"])
    close(net(x), y)
    net(x).square().sum().backward()
    y.square().sum().backward()
    found = {n.partition(".lst.")[2]: p.grad for n, p in state.trainable(net).items() if ".lst." in n}
    for name, p in w.items():
        close(found[name], p.grad)


def states_of(blocks: nn.ModuleList, call: Callable[[], Any]) -> list[Tensor]:
    """The input of the first block and the outputs of all."""
    seen: list[Tensor] = []
    hooks = [blocks[0].register_forward_pre_hook(lambda _m, a, k: seen.append(a[0]), with_kwargs=True)]
    hooks += [
        b.register_forward_hook(lambda _m, _a, o: seen.append(o[0] if isinstance(o, tuple) else o)) for b in blocks
    ]
    with torch.no_grad():
        call()
    for hook in hooks:
        hook.remove()
    return seen


def climbed(stack: nn.Module, adapter: Ladder, h: list[Tensor], kept: list[int], **call: Any) -> Tensor:
    """The side stack of another T5Stack with the same weights, mixed by hooks that are written here."""
    small = hf.T5Config(**{**zoo.T5, **zoo.T5_REST, "d_model": 8, "d_kv": 3, "d_ff": 16, "vocab_size": 1})
    small.is_decoder, small.num_layers, small.use_cache = stack.config.is_decoder, len(kept), False
    side = type(stack)(small).double().eval()
    missing = side.load_state_dict(adapter.side.state_dict(), strict=False)
    assert missing.missing_keys == ["embed_tokens.weight"]
    assert not missing.unexpected_keys
    for block, down, i in zip(side.block, adapter.downs, kept, strict=True):
        mu = torch.sigmoid(adapter.alpha[i] / 0.1)

        def mix(_m: Any, args: Any, kwargs: Any, mu: Tensor = mu, down: Any = down, i: int = i) -> Any:
            return (mu * args[0] + (1 - mu) * down(h[i + 1]), *args[1:]), kwargs

        block.register_forward_pre_hook(mix, with_kwargs=True)
    return side(inputs_embeds=adapter.first(h[0]), **call).last_hidden_state


def test_lst_of_an_encoder_decoder_is_the_equation() -> None:
    """One layer of each stack dropped; the side decoder attends to the side encoder; the tied head's d^-0.5 remains."""
    base, net = zoo.build("t5").double(), zoo.build("t5").double()
    LST(reduction=4, drop=[0], dtype="float64", temperature=0.1).apply(net)
    perturb(net, scale=0.2)
    call = zoo.inputs("t5")
    mask, target = call["attention_mask"], call["decoder_input_ids"]
    h = states_of(base.encoder.block, lambda: base(**call))
    g = states_of(base.decoder.block, lambda: base(**call))
    memory = climbed(base.encoder, ladder(net, "encoder"), h, [1], attention_mask=mask)
    more = {"encoder_hidden_states": memory, "encoder_attention_mask": mask}
    s = climbed(base.decoder, ladder(net, "decoder"), g, [1, 2], attention_mask=torch.ones_like(target), **more)
    up = ladder(net, "decoder").up
    z = F.linear(s, up.weight, up.bias)
    assert base.config.tie_word_embeddings
    close(net(**call).logits, F.linear(z * zoo.HIDDEN**-0.5, base.shared.weight))


@pytest.mark.parametrize("model", ["bert", "encoder", "timm_vit"])
def test_lst_beside_blocks_is_the_equation(model: str) -> None:
    net = zoo.build(model).double()
    base = copy.deepcopy(net)
    LST(reduction=4, dtype="float64", heads=None).apply(net)
    perturb(net, scale=0.2)
    paths = {"bert": "bert.encoder.layer", "encoder": "encoder.layers", "timm_vit": "blocks"}
    blocks, adapter = base.get_submodule(paths[model]), ladder(net)
    if model == "encoder":
        blocks[0].activation_relu_or_gelu = blocks[1].activation_relu_or_gelu = 0
    extra: dict[str, Any] = {}
    blocks[0].register_forward_pre_hook(lambda _m, a, k: extra.update(args=a[1:], kwargs=k), with_kwargs=True)
    h = states_of(blocks, lambda: forward(base, model))
    s = adapter.first(h[0])
    for i, block in enumerate(copy.deepcopy(adapter.side.blocks)):
        del vars(block)["forward"]  # the class's own
        mu = torch.sigmoid(adapter.alpha[i] / 0.1)
        s = block(mu * s + (1 - mu) * adapter.downs[i](h[i + 1]), *extra["args"], **extra["kwargs"])
    z = adapter.up(adapter.side.norm(s))
    blocks[-1].register_forward_hook(lambda *_: z)
    close(output(net, model), forward(base, model).detach())


def test_lst_gates_start_in_the_middle_and_follow_their_temperature() -> None:
    net, _ = adapted("lst", "bert")
    assert torch.equal(torch.sigmoid(ladder(net).alpha / 0.1), torch.full((2,), 0.5))
    with torch.no_grad():
        ladder(net).alpha.fill_(100.0)  # mu = 1: no state of a block is read
    before = output(net, "bert")
    with torch.no_grad():
        ladder(net).downs[1].weight.add_(1.0)
    assert torch.equal(output(net, "bert"), before)


def test_lst_counts_of_the_paper() -> None:
    """T5-base, r = 8, layers 0, 4, 8 dropped: 1.74 % of 222,903,552 (sheet, section 4.10)."""
    net = zoo.meta("t5-base")
    LST(reduction=8, drop=[0, 4, 8], heads=None).apply(net)
    own = {n: p.numel() for n, p in state.trainable(net).items()}
    assert sum(own.values()) == 3_878_712
    of = lambda *keys: sum(v for n, v in own.items() if all(k in n for k in keys))  # noqa: E731
    assert of("encoder", ".side.block.") == 9 * 110_784 + 384
    assert of("decoder", ".side.block.") == 9 * 147_744 + 384
    assert (of(".first."), of(".downs."), of(".alpha"), of("final_layer_norm")) == (147_648, 1_328_832, 24, 192)
    assert of(".up.") - of(".side.", ".up.") == 74_496


# ------------------------------------------------------------------ LST: models, caches, precision
OTHERS = [
    "roberta",
    "distilbert",
    "modernbert",
    "gpt_neox",
    "bloom",
    "qwen3",
    "gemma2",
    "phi3",
    "opt",
    "bart",
    "clip",
    "mixer",
]


@pytest.mark.parametrize("model", OTHERS)
def test_lst_trains_on_other_families(model: str) -> None:
    net = zoo.build(model)
    LST(reduction=4, heads=None).apply(net)
    net.train()
    out = net(**zoo.inputs(model))
    out = (
        out
        if isinstance(out, Tensor)
        else getattr(out, "logits", None)
        if hasattr(out, "logits")
        else out.logits_per_text
    )
    out.float().square().mean().backward()
    silent = [n for n, p in state.trainable(net).items() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent


@pytest.mark.parametrize("model", ["qwen3", "gemma2", "bloom", "opt", "bart", "gpt_neo"])
def test_lst_generates_with_a_cache_as_without_in_other_families(model: str) -> None:
    net = zoo.build(model)
    LST(reduction=4).apply(net)
    perturb(net, scale=0.3)
    net.generation_config.eos_token_id = None
    call = {"input_ids": zoo.inputs(model)["input_ids"][:1], "max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    assert torch.equal(net.generate(**call, use_cache=True), net.generate(**call, use_cache=False))


def test_lst_two_turns_on_one_cache_and_a_cache_that_was_filled_without_it() -> None:
    net, method = adapted("lst", "llama")
    ids = zoo.inputs("llama")["input_ids"][:1]
    with torch.no_grad():
        whole = net(input_ids=ids).logits
        first = net(input_ids=ids[:, :4], use_cache=True)
        second = net(input_ids=ids[:, 4:], past_key_values=first.past_key_values)
        close(torch.cat([first.logits, second.logits], 1), whole, 1e-5)
        with method.enabled(net, False):
            plain = net(input_ids=ids[:, :4], use_cache=True).past_key_values
        with pytest.raises(ValueError, match="4 positions of the base and 0 of the side network"):
            net(input_ids=ids[:, 4:], past_key_values=plain)


def test_lst_refuses_a_static_cache_and_states_that_are_not_there() -> None:
    net, _ = adapted("lst", "llama")
    with pytest.raises(ValueError, match="default dynamic cache"):
        net.generate(
            zoo.inputs("llama")["input_ids"], max_new_tokens=2, cache_implementation="static", disable_compile=True
        )
    t5, method = adapted("lst", "t5")
    call = zoo.inputs("t5")
    with method.enabled(t5, False), torch.no_grad():
        states = t5.encoder(input_ids=call["input_ids"])
    with pytest.raises(ValueError, match=r"come with the encoder's.*\(2, 7, 32\)"):
        t5(encoder_outputs=states, decoder_input_ids=call["decoder_input_ids"])


def test_lst_leaves_the_states_that_a_model_returns() -> None:
    """Those of the blocks, and nothing of the side blocks, which are of the same class."""
    for model in ("bert", "llama"):
        net, _ = adapted("lst", model)
        call = zoo.inputs(model)
        for _ in range(2):
            found = net(**call, output_hidden_states=True).hidden_states
            assert [h.shape[-1] for h in found] == [zoo.HIDDEN] * 3
        expected = zoo.build(model)(**call, output_hidden_states=True).hidden_states
        close(found[1], expected[1], 1e-6)


def test_lst_keeps_masters_in_fp32_beside_a_base_in_16_bits() -> None:
    expected = output(adapted("lst", "t5")[0], "t5")
    net, _ = adapted("lst", "t5")
    net.bfloat16()
    found = output(net, "t5")
    assert found.dtype == torch.bfloat16
    assert {p.dtype for p in ladder(net).parameters()} == {torch.float32}
    assert float((found.float() - expected).norm() / expected.norm()) < 0.03


def test_lst_blocks_are_not_run_again() -> None:
    """Neither by our checkpointing nor by that of transformers: they keep nothing."""
    for own in (True, False):
        net, _ = adapted("lst", "vit")
        if own:
            checkpoint_blocks(net)
        else:
            net.gradient_checkpointing_enable({"use_reentrant": True})
        net.train()
        runs: list[int] = []
        net.vit.layers[1].attention.register_forward_pre_hook(lambda *_: runs.append(1))  # noqa: B023
        loss(net, "vit").backward()
        assert len(runs) == 1
        assert not own or not any(getattr(m, "gradient_checkpointing", False) for m in net.modules())


# ------------------------------------------------------------------ LST: where it starts
def top(score: Tensor, count: int) -> Tensor:
    return score.argsort(descending=True)[:count].sort().values


def stream_of(reads: list[Tensor], writes: list[Tensor], count: int) -> Tensor:
    """Weights (d_out, d_in): those that read the stream by columns, those that write it by rows."""
    return top(sum(w.abs().sum(0) for w in reads) + sum(w.abs().sum(1) for w in writes), count)


def test_lst_is_cut_from_grouped_rotated_heads() -> None:
    """Llama: 4 queries to 2 keys; of a key's 8 features the pairs (i, i + 4) that it and its queries need most."""
    base, (net, _) = zoo.build("llama"), adapted("lst", "llama")
    layers = base.model.layers
    reads = [
        w
        for m in layers
        for w in (
            m.self_attn.q_proj.weight,
            m.self_attn.k_proj.weight,
            m.self_attn.v_proj.weight,
            m.mlp.up_proj.weight,
            m.mlp.gate_proj.weight,
        )
    ]
    s = stream_of(reads, [w for m in layers for w in (m.self_attn.o_proj.weight, m.mlp.down_proj.weight)], 8)
    for i, m in enumerate(layers):
        side = ladder(net).side.layers[i]
        q, k, v, o = (getattr(m.self_attn, f"{n}_proj").weight for n in "qkvo")
        for head in range(4):
            key = head // 2
            pair = [2 * key, 2 * key + 1]
            need = k.abs().sum(1)[8 * key : 8 * key + 8] + sum(q.abs().sum(1)[8 * n : 8 * n + 8] for n in pair)
            first = int((need[:4] + need[4:]).argmax())
            rows = torch.tensor([first, first + 4])
            assert torch.equal(side.self_attn.q_proj.weight[2 * head : 2 * head + 2], q[8 * head + rows][:, s])
            assert torch.equal(side.self_attn.k_proj.weight[2 * key : 2 * key + 2], k[8 * key + rows][:, s])
            need = v.abs().sum(1)[8 * key : 8 * key + 8] + sum(o.abs().sum(0)[8 * n : 8 * n + 8] for n in pair)
            rows = top(need, 2)
            assert torch.equal(side.self_attn.v_proj.weight[2 * key : 2 * key + 2], v[8 * key + rows][:, s])
            assert torch.equal(side.self_attn.o_proj.weight[:, 2 * head : 2 * head + 2], o[s][:, 8 * head + rows])
        up, gate, down = m.mlp.up_proj.weight, m.mlp.gate_proj.weight, m.mlp.down_proj.weight
        f = top(up.abs().sum(1) + gate.abs().sum(1) + down.abs().sum(0), 16)
        assert torch.equal(side.mlp.up_proj.weight, up[f][:, s])
        assert torch.equal(side.mlp.down_proj.weight, down[s][:, f])
        assert torch.equal(side.input_layernorm.weight, m.input_layernorm.weight[s])


def test_lst_is_cut_from_packed_transposed_projections() -> None:
    """GPT-2: q, k and v are columns of one Conv1D (d, 3 d)."""
    base, (net, _) = zoo.build("gpt2"), adapted("lst", "gpt2")
    reads = [w.T for m in base.transformer.h for w in (m.attn.c_attn.weight, m.mlp.c_fc.weight)]
    s = stream_of(reads, [w.T for m in base.transformer.h for w in (m.attn.c_proj.weight, m.mlp.c_proj.weight)], 8)
    m, side = base.transformer.h[1], ladder(net).side.h[1]
    packed, o = m.attn.c_attn.weight, m.attn.c_proj.weight
    q, k, v = packed.abs().sum(0).chunk(3)
    keys = torch.cat([8 * n + top((q + k)[8 * n : 8 * n + 8], 2) for n in range(4)])
    values = torch.cat([8 * n + top((v + o.abs().sum(1))[8 * n : 8 * n + 8], 2) for n in range(4)])
    columns = torch.cat([keys, 32 + keys, 64 + values])
    assert torch.equal(side.attn.c_attn.weight, packed[s][:, columns])
    assert torch.equal(side.attn.c_attn.bias, m.attn.c_attn.bias[columns])
    assert torch.equal(side.attn.c_proj.weight, o[values][:, s])
    assert torch.equal(ladder(net).side.ln_f.weight, base.transformer.ln_f.weight[s])


def test_lst_pruning_finds_the_features_that_are_used() -> None:
    """In both of a T5's stacks half of the stream is never read or written: the side network has the other half."""
    net = zoo.build("t5")
    used = {"encoder": torch.arange(0, 32, 4), "decoder": torch.arange(1, 32, 4)}
    with torch.no_grad():
        for name, keep in used.items():
            dead = torch.ones(32, dtype=torch.bool)
            dead[keep] = False
            for block in net.get_submodule(name).block:
                for n, p in block.named_parameters():
                    cross = "EncDecAttention.k" in n or "EncDecAttention.v" in n
                    if p.dim() == 2 and p.shape[1] == 32 and not cross:
                        p[:, dead] *= 1e-3
                    if p.dim() == 2 and p.shape[0] == 32 and ".o." in n or n.endswith("wo.weight"):
                        p[dead] *= 1e-3
    LST(reduction=4).apply(net)
    cross, side = (
        net.decoder.block[1].layer[1].EncDecAttention,
        ladder(net, "decoder").side.block[1].layer[1].EncDecAttention,
    )
    assert side.k.weight.shape == (12, 8)
    columns = cross.k.weight[:, used["encoder"]]
    assert all(any(torch.equal(row, full) for full in columns) for row in side.k.weight)
    inner = ladder(net, "decoder").side.block[0].layer[2].DenseReluDense.wi.weight
    columns = net.decoder.block[0].layer[2].DenseReluDense.wi.weight[:, used["decoder"]]
    assert all(any(torch.equal(row, full) for full in columns) for row in inner)
    bias = ladder(net, "encoder").side.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    assert torch.equal(bias, net.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight)


def labelled(count: int = 2) -> list[dict[str, Tensor]]:
    return [{**zoo.inputs("bert"), "labels": torch.tensor([i % 3, (i + 1) % 3])} for i in range(count)]


def test_lst_by_fisher_information() -> None:
    """The sum of squared gradients of the plain model, which is left as it was."""
    net, method = adapted("lst", "bert")
    before = {n: p.requires_grad for n, p in net.named_parameters()}
    magnitude = tensors(net)
    assert method.calibrate(net, labelled()) == 2
    assert {n: p.requires_grad for n, p in net.named_parameters()} == before
    assert all(p.grad is None for p in net.parameters())
    found = moved(magnitude, tensors(net))
    assert found
    assert all(".lst.side." in n for n in found)
    base, squares = zoo.build("bert"), {}
    for batch in labelled():
        base.zero_grad()
        base(**batch).loss.backward()
        for n, p in base.named_parameters():
            squares[n] = squares.get(n, 0) + p.grad**2
    f = "bert.encoder.layer.1."
    inner = top(squares[f + "intermediate.dense.weight"].sum(1) + squares[f + "output.dense.weight"].sum(0), 16)
    up = base.bert.encoder.layer[1].intermediate.dense
    assert torch.equal(ladder(net).side.blocks[1].intermediate.dense.bias, up.bias[inner])


class Classifier(pl.LightningModule):
    """BERT on one batch."""

    which = 0

    def __init__(self) -> None:
        super().__init__()
        self.net = zoo.build("bert").train()

    def training_step(self, batch: Any, index: int) -> Tensor:
        return self.net(**labelled()[self.which]).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.0)


def fit(
    method: LST, module: pl.LightningModule, tmp_path: Any, loaders: Any = None, ckpt_path: Any = None, steps: int = 2
) -> pl.Trainer:
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer = pl.Trainer(max_steps=steps, callbacks=[method], default_root_dir=tmp_path, accelerator="cpu", **quiet)
    trainer.fit(module, loaders or torch.utils.data.DataLoader(range(4), batch_size=2), ckpt_path=ckpt_path)
    return trainer


def test_lst_by_fisher_information_in_a_trainer(tmp_path: Any) -> None:
    by_hand, by_fit, resumed, other = (Classifier() for _ in range(4))
    other.which = 1
    method = LST(reduction=4, batches=2)
    method.apply(by_hand)
    method.calibrate(by_hand, [0, 0])
    trainer = fit(LST(reduction=4, init="fisher", batches=2), by_fit, tmp_path)
    assert moved(tensors(by_fit), tensors(by_hand)) == set()
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    resumed.which = 1  # other batches, which would give another start
    fit(LST(reduction=4, init="fisher", batches=2), resumed, tmp_path, ckpt_path=tmp_path / "a.ckpt", steps=4)
    assert moved(tensors(resumed), tensors(by_hand)) == set()
    fit(LST(reduction=4, init="fisher", batches=2), other, tmp_path)
    assert moved(tensors(other), tensors(by_hand))
    two = {"a": torch.utils.data.DataLoader(range(2)), "b": torch.utils.data.DataLoader(range(2))}
    with pytest.raises(LifeCycleError, match="init='fisher'"):
        fit(LST(reduction=4, init="fisher"), Classifier(), tmp_path, two)


def test_fisher_information_of_batches_that_say_nothing() -> None:
    net, method = adapted("lst", "bert")
    with pytest.raises(CalibrationError, match="no loss with a gradient"):
        method.calibrate(net, [zoo.inputs("bert")])
    with pytest.raises(CalibrationError, match="0 batches"):
        method.calibrate(net, [])
    assert state.active(net) == ["lst"]


@pytest.mark.parametrize("method", [LST(reduction=4), LeTS(rank=1, form="sparse")])
@pytest.mark.parametrize("model", ["bert", "llama"])
def test_weights_in_codes_have_no_fisher_information(method: Any, model: str) -> None:
    """What else is in a block has some, biases and norms: that must not pass for the whole."""
    net = zoo.build(model)
    quantise(net)
    method.apply(net)
    before = tensors(net)
    with pytest.raises(CalibrationError, match="weights in codes.*magnitudes"):
        method.calibrate(net, [{**zoo.inputs(model), "labels": torch.tensor([0, 2])}])
    assert not moved(before, tensors(net))


def test_lst_random_start_is_another() -> None:
    cut, drawn = adapted("lst", "bert")[0], adapted("lst", "bert", init="random")[0]
    changed = moved(tensors(cut), tensors(drawn))
    assert changed
    assert all(".side." in n for n in changed)


# ------------------------------------------------------------------ LST: where it cannot be
class Masked(nn.Linear):
    """A block of one's own that is given a mask."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x) if mask is None else super().forward(x) * mask


class Own(nn.Module):
    """Two of them, the first of which may be skipped."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([Masked(8, 8), Masked(8, 8)])

    def forward(self, x: Tensor, mask: Tensor | None = None, skip: bool = False) -> Tensor:
        return self.parts[1](x if skip else self.parts[0](x, mask), mask)


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("bert", {"reduction": 64}, "the width is 32"),
    ("bert", {"reduction": 16}, "cannot have the 4 heads"),
    ("llama", {"reduction": 8}, "an even width"),
    ("bert", {"drop": [2]}, "has 2 blocks"),
    ("bert", {"drop": [0, 1]}, "leaves no side block"),
    ("t5", {"targets": "re:decoder.block.\\d+"}, "whose side network is not there"),
    ("whisper", {}, "cannot be made again"),
    ("albert", {}, "shared by several layers"),
    ("mlp", {"targets": "mlp,out", "heads": None}, "states of one width"),
]


@pytest.mark.parametrize(("model", "fields", "message"), WRONG)
def test_lst_where_it_cannot_be(model: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(TargetError, match=message):
        LST(**{"reduction": 4, **fields}).apply(zoo.build(model))


def test_lst_values_and_calls_that_make_no_sense() -> None:
    with pytest.raises(FieldError, match="counted from 0"):
        LST(drop=[-1])
    net = Own()
    LST(targets="parts.*", reduction=2, heads=None).apply(net)
    x = torch.randn(2, 8)
    assert net(x).shape == (2, 8)
    with pytest.raises(RuntimeError, match="did not run in this forward"):
        net(x, skip=True)
    with pytest.raises(ValueError, match="Masked is given a Tensor.*beside its hidden states"):
        net(x, torch.ones(2, 1))
    bert = zoo.build("bert_mlm")
    LST(reduction=4).apply(bert)
    cache = hf.DynamicCache()
    with pytest.raises(ValueError, match="beside its hidden states"):
        bert.bert.encoder(torch.randn(1, 3, 32), past_key_values=cache)


# ------------------------------------------------------------------ attention fusion
@pytest.mark.parametrize("key", [None, 6])
@pytest.mark.parametrize("model", ["bert", "gpt2", "mlp"])
def test_attention_fusion_is_the_equation(model: str, key: int | None) -> None:
    base, net = zoo.build(model).double(), zoo.build(model).double()
    where = {"targets": "mlp,lora", "heads": None} if model == "mlp" else {"heads": None}
    AttentionFusion(key=key, embeddings=True, init="last", dtype="float64", **where).apply(net)
    perturb(net, scale=0.5)
    w = {n.rpartition(".")[2]: p for n, p in state.trainable(net).items()}
    if model == "mlp":
        x = zoo.inputs(model)["x"].double()
        h = [base.body(x), base.mlp(base.body(x)), base.lora(torch.tanh(base.mlp(base.body(x))))]
        last = base.lora
    else:
        blocks = base.get_submodule({"bert": "bert.encoder.layer", "gpt2": "transformer.h"}[model])
        h, last = states_of(blocks, lambda: forward(base, model)), blocks[-1]
    keys = [state_ if key is None else state_ @ w["k"].T for state_ in h]
    scores = [k @ w["q"] / math.sqrt(len(w["q"])) + w["b"][i] for i, k in enumerate(keys)]
    exps = [s.exp() for s in scores]
    z = sum((e / sum(exps))[..., None] * s for e, s in zip(exps, h, strict=True)).detach()
    last.register_forward_hook(lambda *_: z)
    close(output(net, model), forward(base, model).detach())


def test_attention_fusion_starts_and_counts() -> None:
    net = zoo.build("bert")
    AttentionFusion(heads=None).apply(net)
    assert sum(p.numel() for p in state.trainable(net).values()) == zoo.HIDDEN
    base = zoo.build("bert")
    h = states_of(base.bert.encoder.layer, lambda: forward(base, "bert"))
    base.bert.encoder.layer[-1].register_forward_hook(lambda *_: (h[1] + h[2]) / 2)
    close(output(net, "bert"), output(base, "bert"), 1e-6)
    apart = []
    for bias in (2.0, 30.0):
        net = zoo.build("bert")
        AttentionFusion(heads=None, init="last", bias=bias).apply(net)
        apart.append(float((output(net, "bert") - output(zoo.build("bert"), "bert")).abs().max()))
    assert apart[1] < 1e-6 < apart[0]
    large = zoo.meta("bert-base")
    AttentionFusion(heads=None).apply(large)
    assert sum(p.numel() for p in state.trainable(large).values()) == 768


def test_attention_fusion_of_some_layers_reads_those_and_the_embeddings() -> None:
    net = zoo.build("vit")
    AttentionFusion(heads=None, layers=[0], embeddings=True).apply(net)
    base = zoo.build("vit")
    h = states_of(base.vit.layers, lambda: forward(base, "vit"))
    base.vit.layers[-1].register_forward_hook(lambda *_: (h[0] + h[1]) / 2)
    close(output(net, "vit"), output(base, "vit"), 1e-6)
    with pytest.raises(FieldError, match="number of features"):
        AttentionFusion(key=0)
    unknown = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2)])
    with pytest.raises(TargetError, match="width is unknown"):
        AttentionFusion(heads=None).apply(unknown)


# ------------------------------------------------------------------ LeTS
@pytest.mark.parametrize("form", ["low_rank", "sparse"])
@pytest.mark.parametrize("layer", ["linear", "conv1d"])
def test_lets_is_the_equation(form: str, layer: str) -> None:
    """y = W x + p D x, its gradients, and its merge, densely in fp64 with d_in != d_out."""
    proj = nn.Linear(6, 10) if layer == "linear" else hf.pytorch_utils.Conv1D(10, 6)
    net = nn.ModuleDict({"proj": proj}).double()
    method = LeTS(targets="proj", rank=2, form=form, dtype="float64", temperature=2.0, start=0.4)
    method.apply(net)
    perturb(net, scale=0.5)
    a: Any = net["proj"].adapters["lets"]
    w = proj.weight if layer == "linear" else proj.weight.T
    t = a.choice.logits.detach().clone().requires_grad_()
    p = torch.exp(t[1] / 2) / torch.exp(t / 2).sum()
    if form == "low_rank":
        own = [a.a.detach().clone().requires_grad_(), a.b.detach().clone().requires_grad_()]
        d = own[1] @ own[0]
    else:
        own = [a.v.detach().clone().requires_grad_()]
        flat = w.abs().flatten().argsort(descending=True)[:32].sort().values
        d = torch.zeros(60, dtype=torch.float64).index_put((flat,), own[0]).view(10, 6)
    x = torch.randn(3, 6, dtype=torch.float64)
    y = x @ (w.detach() + p * d).T + proj.bias.detach()
    close(net["proj"](x), y)
    net["proj"](x).square().sum().backward()
    y.square().sum().backward()
    close(a.choice.logits.grad, t.grad)
    for mine, theirs in zip([a.a, a.b] if form == "low_rank" else [a.v], own, strict=True):
        close(mine.grad, theirs.grad)
    expected = net["proj"](x)
    method.merge(net)
    close(net["proj"](x), expected)


def test_lets_chooses() -> None:
    soft, hard, drawn = (Choice(g, 0.5, h) for g, h in ((False, False), (False, True), (True, True)))
    for choice in (soft, hard, drawn):
        with torch.no_grad():
            choice.logits.copy_(torch.tensor([0.0, -1.0]))
    assert float(soft().detach()) == pytest.approx(1 / (1 + math.exp(2)))
    assert float(hard().detach()) == 0.0
    hard().backward()
    assert hard.logits.grad.abs().sum() > 0  # straight through
    torch.manual_seed(0)
    drawn.train()
    share = sum(float(drawn().detach()) for _ in range(2000)) / 2000
    assert share == pytest.approx(1 / (1 + math.e), abs=0.03)  # of the sampled maxima, whatever the temperature
    assert float(drawn.eval()().detach()) == 0.0


def test_lets_one_choice_a_block_and_what_it_costs() -> None:
    net = zoo.build("bert")
    LeTS(rank=2, penalty=0.5, heads=None).apply(net)
    placed = state.get_applied(net).placements
    assert len({id(x.adapter.choice) for x in placed}) == 2
    assert len(placed) == 8
    p = 1 / (1 + math.exp(-1))
    assert float(sum(x.adapter.penalty() for x in placed).detach()) == pytest.approx(0.5 * p)
    free = LeTS(heads=None).apply(zoo.build("bert"))
    assert {x.adapter.penalty() for x in state.get_applied(free).placements} == {None}


def test_lets_aggregates_the_layers_before_the_head(tmp_path: Any) -> None:
    net = zoo.build("bert").double()
    method = LeTS(targets="q,v", rank=2, aggregator=5, dtype="float64")
    method.apply(net)
    close(output(net, "bert"), output(zoo.build("bert").double(), "bert"))
    perturb(net, scale=0.3)
    agg = next(m for m in net.modules() if isinstance(m, Aggregator))
    assert sum(p.numel() for p in agg.parameters()) == 2 * 4 * 5 * (32 + 5 + 2) + 32 * 10
    states: list[Tensor] = []
    for block in net.bert.encoder.layer:
        block.register_forward_hook(lambda _m, _a, o: states.append(o.mean(1)))
    read: list[Tensor] = []
    net.bert.pooler.register_forward_hook(lambda _m, _a, o: read.append(o))
    found = output(net, "bert")
    w = dict(agg.lstm.named_parameters())

    def run(xs: list[Tensor], end: str) -> Tensor:
        h = c = torch.zeros(2, 5, dtype=torch.float64)
        for x in xs:
            z = (
                x @ w[f"weight_ih_l0{end}"].T
                + w[f"bias_ih_l0{end}"]
                + h @ w[f"weight_hh_l0{end}"].T
                + w[f"bias_hh_l0{end}"]
            )
            i, f, g, o = z.chunk(4, -1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        return h

    change = torch.cat([run(states, ""), run(states[::-1], "_reverse")], -1) @ agg.out.T
    close(found, F.linear(read[0] + change, net.classifier.weight, net.classifier.bias).detach())
    with pytest.raises(TypeError):
        method.merge(net)
    with pytest.raises(TargetError, match="before a task head"):
        LeTS(aggregator=4).apply(zoo.build("gpt2"))
    with pytest.raises(RuntimeError, match="0 ran before the head"):
        net.classifier(torch.zeros(2, 32, dtype=torch.float64))


@pytest.mark.parametrize("method", [LeTS(rank=2, aggregator=4), ParallelAdapter(bottleneck=4), LST(reduction=4)])
def test_what_a_forward_noted_that_stopped_half_way_is_not_copied(method: Any) -> None:
    """Of the body without its head, or of a forward that raised."""
    net = zoo.build("vit").train()
    method.apply(net)
    perturb(net)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = net.vit.layers[-1].mlp.fc2.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        forward(net, "vit")
    hook.remove()
    assert any(getattr(x.adapter, "seen", None) is not None for x in state.get_applied(net).placements)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert all(getattr(x.adapter, "seen", None) is None for x in state.get_applied(twin).placements)
        assert torch.equal(output(twin.eval(), "vit"), output(net.eval(), "vit"))


def test_lets_aggregator_under_checkpointing() -> None:
    gradients = []
    for on in (False, True):
        net = zoo.build("vit")
        LeTS(rank=2, aggregator=4).apply(net)
        perturb(net)
        if on:
            checkpoint_blocks(net)
        net.train()
        loss(net, "vit").backward()
        gradients.append({n: p.grad for n, p in state.trainable(net).items()})
    for n, g in gradients[0].items():
        close(gradients[1][n], g, 1e-6)


def test_lets_places_values_by_connection_sensitivity() -> None:
    net = zoo.build("bert")
    method = LeTS(targets="q,down", rank=1, form="sparse")
    method.apply(net)
    assert method.calibrate(net, labelled(1)) == 1
    base = zoo.build("bert")
    base(**labelled(1)[0]).loss.backward()
    for name in ("bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.1.output.dense"):
        w, adapter = base.get_submodule(name).weight, net.get_submodule(name).adapters["lets"]
        assert isinstance(adapter, ChosenSparse)
        with torch.no_grad():
            adapter.v.fill_(1.0)
        mask = adapter.delta(torch.zeros_like(w)) != 0
        expected = (w * w.grad).abs().flatten().argsort(descending=True)[: len(adapter.v)]
        assert set(mask.flatten().nonzero().flatten().tolist()) == set(expected.tolist())
    low = zoo.build("bert")
    other = LeTS(targets="q")
    other.apply(low)
    with pytest.raises(FieldError, match="form='sparse'"):
        other.calibrate(low, labelled(1))
    with pytest.raises(FieldError, match="shares everything"):
        LeTS(hard=True, start=0.0)


# ------------------------------------------------------------------ the benchmark
def test_the_benchmark_of_saved_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small, of 12 layers: LST keeps 2.5 times less than LoRA; the same figures each time."""
    pytest.importorskip("peft", reason="what the benchmarks share needs it")
    from benchmarks import side_networks

    monkeypatch.setattr(side_networks, "METHODS", {n: side_networks.METHODS[n] for n in ("full", "lora", "lst")})
    monkeypatch.setattr(side_networks, "BATCH", 2)
    monkeypatch.setattr(side_networks, "TIME", 32)
    rows = [r for dropout in (0.1, 0.0) for r in side_networks.table(64, dropout)]
    assert min(r["lora over this"] for r in rows if r["what"] == "lst") >= side_networks.GOAL
    assert "is met" in side_networks.verdict(rows)
    assert all(side_networks.line(row) for row in rows)
