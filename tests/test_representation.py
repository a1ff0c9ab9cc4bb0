"""LoReFT, NoReFT, DiReFT: what the edit is, on what it acts, at which positions."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from harness import forward, loss, output, perturb, plain_after_prefill, train
from settings import make
from test_counts import fresh
from test_generation import fresh as generator
from test_generation import generate, ready, text
from test_oracles import Values, compare, gram_schmidt, inputs, pair
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_peft import DiReFT, LoReFT, NoReFT, load_adapter, save_adapter
from lightning_peft.core import state
from lightning_peft.core.fields import FieldError
from lightning_peft.core.files import read_tensors
from lightning_peft.core.representation import Edit
from lightning_peft.core.sites import TargetError
from lightning_peft.gradient_checkpointing import checkpoint_blocks
from lightning_peft.methods.loreft import ReFT

KINDS = {"loreft": LoReFT, "noreft": NoReFT, "direft": DiReFT}
PLACES = {  # (target, whether h is what the place reads) -> names
    "llama": {"o": "model.layers.{}.self_attn.o_proj", "down": "model.layers.{}.mlp.down_proj"},
    "gpt2": {"o": "transformer.h.{}.attn.c_proj", "down": "transformer.h.{}.mlp.c_proj"},
    "bert": {"o": "bert.encoder.layer.{}.attention.output.dense", "down": "bert.encoder.layer.{}.output.dense"},
    "encoder": {"o": "encoder.layers.{}.self_attn.o", "down": "encoder.layers.{}.linear2"},
}


def edit(kind: str, at: dict[str, Tensor], h: Tensor) -> Tensor:
    """h + e(h), from the sheet: R^T (W h + b - R h), orthonormal or not; W2^T (W1 h + b)."""
    if kind == "direft":
        return h + torch.einsum("btr,rd->btd", torch.einsum("rd,btd->btr", at["w1"], h) + at["b"], at["w2"])
    r = gram_schmidt(at["r"]) if kind == "loreft" else at["r"]
    return h + torch.einsum("btr,rd->btd", torch.einsum("rd,btd->btr", at["w"] - r, h) + at["b"], r)


def ends(first: int, last: int, batch: int = 2) -> Tensor:
    """(2, 7, 2): 1 at the first and at the last tokens of rows of 7 and 5 tokens, half of them at most."""
    where = torch.zeros(batch, 7, 2, dtype=torch.float64)
    for row, n in enumerate((7, 5)):
        where[row, : min(first, n // 2), 0] = 1
        where[row, n - min(last, n // 2) : n, 1] = 1
    return where


def edited(kind: str, values: Values, place: str, h: Tensor, where: Tensor) -> Tensor:
    """Both ends by their own tensors, or by one where they are tied."""
    named = {n.removeprefix(f"{place}.adapters.{kind}."): v for n, v in values.items() if n.startswith(f"{place}.a")}
    own = [
        {n.removeprefix(f"{e}."): v for n, v in named.items() if n.startswith(f"{e}.")} for e in ("edit", "edit_last")
    ]
    both = [own[0], own[1] or own[0]]
    return h + sum(where[..., i, None] * (edit(kind, both[i], h) - h) for i in (0, 1))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", list(KINDS))
def test_what_a_block_returns(kind: str, tied: bool) -> None:
    method = KINDS[kind](rank=3, first=2, last=3, tied=tied, dtype="float64", heads=None)
    net, base, values = pair("llama", method)
    where = ends(2, 3)
    for i in range(2):
        name = f"model.layers.{i}"
        base.model.layers[i].register_forward_hook(
            lambda _, __, h, name=name: edited(kind, values, name, h, where)  # noqa: B023
        )
    compare(net, forward(net, "llama"), values, forward(base, "llama"), tolerance=1e-10)


@pytest.mark.parametrize("target", ["o", "down"])
@pytest.mark.parametrize("model", list(PLACES))
@pytest.mark.parametrize("kind", ["loreft", "direft"])
def test_what_a_projection_inside_a_block_reads(kind: str, model: str, target: str) -> None:
    """Attention before its output projection, the activation of the feed-forward layer; Conv1D, torch's attention."""
    net, base, values = pair(model, KINDS[kind](rank=3, first=1, last=2, targets=target, dtype="float64", heads=None))
    where, names = ends(1, 2), [PLACES[model][target].format(i) for i in range(2)]
    assert {n.partition(".adapters")[0] for n in values} == set(names)
    for name in names:
        if name.endswith("self_attn.o"):
            attention = base.get_submodule(name.removesuffix(".o"))
            attention.forward = partial(attend, attention, partial(edited, kind, values, name, where=where))
        else:
            base.get_submodule(name).register_forward_pre_hook(
                lambda _, x, name=name: edited(kind, values, name, x[0], where)
            )
    for p in base.parameters():
        p.requires_grad_(model == "encoder")  # or torch's fused layer goes past what is put there
    compare(net, forward(net, model), values, forward(base, model), tolerance=1e-10)


def attend(m: Any, change: Any, x: Tensor, *_: Any, key_padding_mask: Tensor, **__: Any) -> tuple[Tensor, None]:
    """torch's attention by hand, with `change` before its output projection."""
    q, k, v = ((x @ w.T + b).unflatten(-1, (4, -1)) for w, b in zip(m.in_proj_weight.chunk(3), m.in_proj_bias.chunk(3),
                                                                     strict=True))  # fmt: skip
    scores = torch.einsum("bthd,bshd->bhts", q, k) / 8**0.5 + key_padding_mask[:, None, None]
    return m.out_proj(change(torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v).flatten(2))), None


def test_blocks_and_projections_at_once_share_what_they_know() -> None:
    net, base, values = pair("llama", DiReFT(rank=2, first=1, last=1, targets="block,o", dtype="float64", heads=None))
    where = ends(1, 1)
    for i in range(2):
        at, inner = f"model.layers.{i}", f"model.layers.{i}.self_attn.o_proj"
        base.get_submodule(inner).register_forward_pre_hook(
            lambda _, x, name=inner: edited("direft", values, name, x[0], where)
        )
        base.get_submodule(at).register_forward_hook(lambda _, __, h, name=at: edited("direft", values, name, h, where))
    compare(net, forward(net, "llama"), values, forward(base, "llama"), tolerance=1e-10)


@pytest.mark.parametrize(("model", "target"), [("llama", "model.layers.{}.mlp"), ("llama", "model.layers.{}.self_attn"),
                                               ("gpt2", "transformer.h.{}.attn")])  # fmt: skip
def test_what_a_module_inside_a_block_returns(model: str, target: str) -> None:
    names = [target.format(i) for i in range(2)]
    method = LoReFT(rank=3, first=1, last=2, targets=names, dtype="float64", heads=None)
    net, base, values = pair(model, method)
    where = ends(1, 2)
    for name in names:

        def hook(_: Any, __: Any, out: Any, name: str = name) -> Any:
            h = edited("loreft", values, name, out[0] if isinstance(out, tuple) else out, where)
            return (h, *out[1:]) if isinstance(out, tuple) else h

        base.get_submodule(name).register_forward_hook(hook)
    compare(net, forward(net, model), values, forward(base, model), tolerance=1e-10)


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_option_to_start_at_the_base(kind: str) -> None:
    net = zoo.build("llama")
    KINDS[kind](rank=3, identity=True).apply(net)
    torch.testing.assert_close(output(net, "llama"), output(zoo.build("llama"), "llama"), atol=1e-6, rtol=1e-6)
    train(net, "llama", steps=2)
    assert not torch.allclose(output(net, "llama"), output(zoo.build("llama"), "llama"), atol=1e-4)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize(("model", "rank", "count"), [("llama-7b", 8, 2_097_408), ("llama-13b", 8, 3_277_120),
                                                      ("roberta-base", 1, 18_444), ("roberta-large", 1, 49_176)])  # fmt: skip
def test_counts(kind: str, model: str, rank: int, count: int) -> None:
    """L (2 r d + r), as the paper's percentages; twice that when untied."""
    net = KINDS[kind](rank=rank, heads=None).apply(fresh(model))
    assert state.describe(net)["trainable"] == count
    KINDS[kind]().remove(net)
    net = KINDS[kind](rank=rank, tied=False, heads=None).apply(net)
    assert state.describe(net)["trainable"] == 2 * count


# ------------------------------------------------------------------ R
def test_r_stays_orthonormal_while_it_trains_and_in_files(tmp_path: Path) -> None:
    net = zoo.build("bert")
    LoReFT(rank=3, tied=False, heads=None).apply(net)
    train(net, "bert", steps=4, lr=0.3)
    save_adapter(net, tmp_path / "a")
    kept = {n: t for n, t in read_tensors(tmp_path / "a").items() if n.endswith(".r")}
    assert len(kept) == 4
    for x in state.get_applied(net).placements:
        for e in x.adapter.edits().values() if x.role == "block" else ():
            assert not torch.allclose(e.r @ e.r.T, torch.eye(3), atol=1e-2)  # the parameter itself is free
            torch.testing.assert_close(e.rotation() @ e.rotation().T, torch.eye(3), atol=1e-6, rtol=0)
    for r in kept.values():
        torch.testing.assert_close(r @ r.T, torch.eye(3), atol=1e-6, rtol=0)
    other = zoo.build("bert")
    load_adapter(other, tmp_path / "a")
    torch.testing.assert_close(output(other, "bert"), output(net, "bert"), atol=1e-6, rtol=1e-6)


def test_noreft_is_loreft_where_r_is_orthonormal_and_direft_where_the_difference_is_written_out() -> None:
    """With the same R: LoReFT = NoReFT = DiReFT(W1 = W - R, W2 = R)."""
    nets = {kind: zoo.build("gpt2") for kind in KINDS}
    for kind, net in nets.items():
        KINDS[kind](rank=3, heads=None).apply(net)
    edits = {k: [x.adapter.edit for x in state.get_applied(n).placements if x.role == "block"] for k, n in nets.items()}
    with torch.no_grad():
        for lo, no, di in zip(*edits.values(), strict=True):
            r = lo.rotation()
            for p, value in ((no.r, r), (no.w, lo.w), (no.b, lo.b), (di.w1, lo.w - r), (di.w2, r), (di.b, lo.b)):
                p.copy_(value)
    expected = output(nets["loreft"], "gpt2")
    for kind in ("noreft", "direft"):
        torch.testing.assert_close(output(nets[kind], "gpt2"), expected, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------ positions
@pytest.mark.parametrize("targets", ["block", "o", "block,down"])
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_generation_edits_the_prompt_only(model: str, targets: str) -> None:
    """By hand: an edited prefill fills the cache, the plain model goes on from there; a padded batch, beams."""
    net, method, ids = generator(model), make("direft", model, targets=targets), text(6, batch=2)
    method.apply(net)
    perturb(net, scale=0.5)
    tokens, logits = generate(net, ids)
    torch.testing.assert_close(logits, plain_after_prefill(net, method, ids, tokens), atol=1e-5, rtol=1e-5)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1)
    mask = (torch.arange(9) >= 3).long().expand(2, -1)
    torch.testing.assert_close(generate(net, padded, attention_mask=mask)[1], logits, atol=1e-4, rtol=1e-4)
    assert net.generate(ids, num_beams=3, max_new_tokens=3, do_sample=False).shape == (2, 9)


@pytest.mark.parametrize("targets", ["block", "o"])
def test_right_padding_counts_the_last_tokens_of_the_text(targets: str) -> None:
    net = ready("loreft", "llama", targets=targets)
    row = text(4, seed=2)
    padded = torch.cat([row, torch.zeros(1, 3, dtype=torch.long)], 1)
    mask = (torch.arange(7) < 4).long()[None]
    got = net(input_ids=padded, attention_mask=mask).logits[:, :4]
    torch.testing.assert_close(got, net(input_ids=row).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("how", ["transformers", "reentrant", "ours", "by hand"])
def test_under_checkpointing_the_places_inside_know_their_positions(how: str) -> None:
    """Two forwards before one backward, with other masks and labels each: every block is run again with its own."""
    gradients = []
    for on in (False, True):
        net = zoo.build("llama")
        DiReFT(rank=2, first=1, last=1, targets="block,o,down,*.mlp", heads=None).apply(net)
        perturb(net, scale=0.3)
        net.train()
        if on and how in ("transformers", "reentrant"):
            net.gradient_checkpointing_enable({"use_reentrant": how == "reentrant"})
            net.enable_input_require_grads()
        if on and how == "ours":
            checkpoint_blocks(net)
        if on and how == "by hand":
            for block in net.model.layers:
                inner = block.forward
                block.forward = lambda x, inner=inner, **kw: checkpoint(partial(inner, **kw), x, use_reentrant=False)
        call = inputs("llama")
        labels = call["input_ids"].clone()
        labels[0, :3], labels[1, :4] = -100, -100
        other = {k: v.flip(0) for k, v in call.items()}
        net.config.use_cache = False
        (net(**call, labels=labels).loss + net(**other, labels=labels).loss).backward()
        gradients.append({n: p.grad for n, p in state.trainable(net).items()})
    for n, expected in gradients[0].items():
        assert expected.abs().sum() > 0, n
        torch.testing.assert_close(gradients[1][n], expected, atol=1e-6, rtol=1e-5)


def test_positions_survive_inputs_that_move_while_backward_waits() -> None:
    """As with activations that are kept on the host: the second run gets copies of the first one's input."""
    gradients = []
    for on in (False, True):
        net = zoo.build("llama").train()
        LoReFT(rank=2, first=1, last=1, targets="block,o", heads=None).apply(net)
        perturb(net, scale=0.3)
        if on:
            checkpoint_blocks(net)
        call = inputs("llama")
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
            loss_of = net(**call, labels=call["input_ids"]).loss
        loss_of.backward()
        gradients.append({n: p.grad for n, p in state.trainable(net).items()})
    for n, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][n], expected, atol=1e-6, rtol=1e-5)


def test_torchs_encoder_with_time_in_front() -> None:
    """batch_first=False: blocks see (time, batch, d), and the padding mask is (batch, time) still."""

    class Front(zoo.Encoder):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(zoo.HIDDEN, zoo.HEADS, zoo.INNER, dropout=0.0)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

        def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
            x = self.encoder(self.embed(tokens).transpose(0, 1), src_key_padding_mask=mask == 0).transpose(0, 1)
            return self.classifier((x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))

    for targets in ("block", "o", "down"):
        net, other = zoo.build("encoder"), Front().eval()
        other.load_state_dict(net.state_dict())
        for m in (net, other):
            LoReFT(rank=2, first=1, last=2, targets=targets).apply(m)
            perturb(m, scale=0.5)
        torch.testing.assert_close(output(other, "encoder"), output(net, "encoder"), atol=1e-5, rtol=1e-5)


def test_dropout_acts_on_the_edit_and_only_in_training() -> None:
    net = zoo.build("llama")
    LoReFT(rank=2, dropout=0.999).apply(net)
    base = output(zoo.build("llama"), "llama")
    assert not torch.allclose(output(net, "llama"), base, atol=1e-3)
    net.train()
    torch.manual_seed(0)
    assert (output(net, "llama") - base).abs().mean() < 50 * (loss(net, "llama")).item()
    assert torch.isfinite(output(net, "llama")).all()


# ------------------------------------------------------------------ errors
@pytest.mark.parametrize("kind", list(KINDS))
def test_no_position_and_a_rank_above_the_width(kind: str) -> None:
    name = KINDS[kind].__name__
    with pytest.raises(FieldError, match=rf"{name}\(first=0, last=0\) edits no position"):
        KINDS[kind](first=0, last=0)
    with pytest.raises(TargetError, match=rf"{name}\(rank=33\) at 'bert.encoder.layer.0': the hidden width is 32"):
        KINDS[kind](rank=33).apply(zoo.build("bert"))


def test_places_outside_of_blocks_and_places_that_read_nothing_known() -> None:
    with pytest.raises(TargetError, match="'lm_head' .* is in none"):
        LoReFT(targets="lm_head").apply(zoo.build("llama"))
    with pytest.raises(TargetError, match="acts on projections"):
        LoReFT(targets="norm", layers=0).apply(zoo.build("llama"))


def test_what_a_subclass_has_to_say() -> None:
    with pytest.raises(NotImplementedError, match="ReFT defines no edit"):
        ReFT().edit(3)
    with pytest.raises(NotImplementedError, match="Edit has no reset"):
        Edit().reset(None, False)  # type: ignore[arg-type]


@pytest.mark.parametrize("tied", [True, False])
def test_a_feed_forward_layer_that_reads_all_tokens_as_rows(tied: bool) -> None:
    net = zoo.build("opt")
    DiReFT(rank=2, first=1, last=2, targets="down", tied=tied).apply(net)
    perturb(net, 0.5)
    call = zoo.inputs("opt")
    n = int(call["attention_mask"][1].sum())
    alone = net(input_ids=call["input_ids"][1:, :n]).logits
    torch.testing.assert_close(net(**call).logits[1:, :n], alone)


# ------------------------------------------------------------------ masks of pairs
@pytest.mark.parametrize("model", ["llama", "qwen2", "bloom"])
def test_a_cache_of_fixed_size_counts_padding_too(model: str) -> None:
    net = zoo.build(model)
    LoReFT(rank=2, first=2, last=2).apply(net)
    perturb(net, 1.0)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for rows in ([[0, 0, 0, 5, 6, 7, 8, 9], [3, 4, 5, 6, 7, 8, 9, 10]], [[5, 6, 7], [8, 9, 10]], [[7], [3]]):
        ids = torch.tensor(rows)
        call = {"input_ids": ids, "attention_mask": (ids != 0).long(), **options}
        assert torch.equal(net.generate(**call), net.generate(**call, cache_implementation="static"))


def test_masks_of_pairs_are_padding_or_refused() -> None:
    net = zoo.build("bert")
    LoReFT(rank=2, first=2, last=2).apply(net)
    perturb(net, 1.0)
    call = zoo.inputs("bert")
    real = call["attention_mask"].bool()
    wanted = net(**call).logits
    for mask in (real[:, None, None], real[:, None, None].expand(-1, -1, 7, -1)):
        torch.testing.assert_close(net(input_ids=call["input_ids"], attention_mask=mask).logits, wanted)
    llama = zoo.build("llama")
    LoReFT(rank=2, first=2, last=2).apply(llama)
    ids = zoo.inputs("llama", 1, 8)["input_ids"]
    causal = torch.ones(8, 8, dtype=torch.bool).tril()
    torch.testing.assert_close(llama(ids, attention_mask=causal[None, None]).logits, llama(ids).logits)
    blocks = causal & torch.block_diag(*2 * [torch.ones(4, 4)]).bool()
    for mask in (blocks[None, None], torch.zeros(1, 1, 8, 8).masked_fill(~blocks, torch.finfo(torch.float32).min)):
        with pytest.raises(ValueError, match=r"An attention mask \(1, 1, 8, 8\) that says more than what is padding"):
            llama(ids, attention_mask=mask)
