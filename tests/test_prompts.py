"""Prompts: what they start from, packed texts, templates, prompts of many tasks, visual prompts, transfer, no training."""

from __future__ import annotations

import copy
import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from harness import perturb
from lightning.pytorch import Trainer
from test_counts import fresh
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_peft import IPT, VPT, LoRA, MultitaskPrompt, PromptTuning, PTuning, load_adapter, prompts, save_adapter
from lightning_peft.core import state
from lightning_peft.core.embedding import StackTokens
from lightning_peft.core.fields import FieldError
from lightning_peft.core.files import AdapterFileError
from lightning_peft.core.sites import TargetError
from lightning_peft.gradient_checkpointing import checkpoint_blocks
from lightning_peft.tasks import ByteTokenizer, CausalLM, InContext, TextData, constant
from lightning_peft.tasks.data import Example
from lightning_peft.tasks.models import tiny_bert

WORDS = ["[UNK]", "good", "bad", "film", "the", "was", "very", "fine", "sad", "is", "it", ":", "text", "label", "ok"]


def close(a: Tensor, b: Tensor, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def prompt_of(net: nn.Module) -> Any:
    """The prompt of the one method on a model."""
    (found,) = {id(p.adapter.prompt): p.adapter.prompt for p in state.get_applied(net).placements
                if "prompt" in p.adapter._modules}.values()  # fmt: skip
    return found


def tokens(model: str | nn.Module, **fields: Any) -> Tensor:
    """The initial rows of PromptTuning on a tiny model."""
    net = zoo.build(model) if isinstance(model, str) else model
    PromptTuning(heads=None, **fields).apply(net)
    return prompt_of(net).tokens.detach()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tokeniser of whole words in a folder: the id of a word is its place in WORDS, plus 3."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", *WORDS]
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    path = tmp_path_factory.mktemp("tokenizer")
    fast = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(path)
    return str(path)


# ------------------------------------------------------------------ what a prompt starts from
def test_random_starts_have_their_law() -> None:
    uniform, normal = (tokens("llama", length=50, init=init) for init in ("uniform", "normal"))
    assert 0.45 < uniform.abs().max() <= 0.5
    assert abs(uniform.std() - 12**-0.5) < 0.02
    assert abs(normal.std() - 1) < 0.05


def test_vocabulary_rows_differ_and_are_the_first() -> None:
    rows = tokens("gpt2", length=8, init="vocabulary", vocabulary=10)
    table = zoo.build("gpt2").transformer.wte.weight
    found = [(table == row).all(1).nonzero().item() for row in rows]
    assert len(set(found)) == 8
    assert max(found) < 10


@pytest.mark.parametrize(("length", "ids"), [(5, [7, 8, 7, 8, 7]), (1, [7])], ids=["repeated", "cut"])
def test_text_is_repeated_or_cut(length: int, ids: list[int]) -> None:
    table = zoo.build("t5").shared.weight
    assert torch.equal(tokens("t5", length=length, init="text", text=[7, 8]), table[ids])


def test_text_and_labels_through_a_tokenizer(folder: str) -> None:
    table = zoo.build("bert").bert.embeddings.word_embeddings.weight
    rows = tokens("bert", length=3, init="text", text="the film was bad", tokenizer=folder)
    assert torch.equal(rows, table[[7, 6, 8]])
    rows = tokens("bert", length=4, init="labels", labels=["very good", "bad"], tokenizer=folder, vocabulary=30)
    close(rows[:2], torch.stack([table[[9, 4]].mean(0), table[5]]))
    assert all((table[:30] == row).all(1).any() for row in rows[2:])


def test_a_prompt_from_text_is_the_text() -> None:
    """With the factor that the model puts on its embeddings: the prompt is what these words would have been."""
    for model in ("gemma", "bart", "llama"):
        base, text = zoo.build(model), [5, 9, 11]
        net = copy.deepcopy(base)
        PromptTuning(length=3, init="text", text=text, heads=None).apply(net)
        call = zoo.inputs(model)
        longer = {**call, "input_ids": torch.cat([torch.tensor(text).expand(2, -1), call["input_ids"]], 1)}
        longer["attention_mask"] = nn.functional.pad(call["attention_mask"], (3, 0), value=1)
        with torch.no_grad():
            expected = base(**longer).logits
            close(net(**call).logits, expected if model == "bart" else expected[:, 3:])


def test_a_file_needs_no_tokenizer_any_more(folder: str, tmp_path: Path) -> None:
    net = zoo.build("llama")
    PromptTuning(length=3, init="text", text="the film", tokenizer=folder).apply(net)
    save_adapter(net, tmp_path / "a")
    loaded = load_adapter(zoo.build("llama"), tmp_path / "a")
    assert loaded.config(defaults=False) == {"length": 3, "label": "prompt_tuning"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"init": "text"}, "init='text' and `text` go together"),
        ({"text": [1]}, "init='text' and `text` go together"),
        ({"init": "prompt"}, "init='prompt' and `source` go together"),
        ({"init": "text", "text": "a"}, "`tokenizer` belongs to"),
        ({"init": "labels", "labels": [[1]], "tokenizer": "x"}, "`tokenizer` belongs to"),
        ({"init": "labels", "labels": [[1], [2]], "length": 1}, "2 labels are more than length=1"),
        ({"init": "prompt", "source": ["a", "b"], "weights": [1.0]}, "one for each of 2 sources"),
    ],
)
def test_starts_that_make_no_sense(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(FieldError, match=message):
        PromptTuning(**fields)


def test_starts_that_the_model_cannot_take() -> None:
    for init, more in (("vocabulary", {}), ("text", {"text": [1]}), ("labels", {"labels": [[1]]})):
        with pytest.raises(TargetError, match="needs a token embedding"):
            tokens("vit", init=init, **more)
    with pytest.raises(TargetError, match="20 tokens cannot be drawn from 10 rows"):
        tokens("llama", init="vocabulary", vocabulary=10)
    with pytest.raises(TargetError, match="token id 100 is not among the 100 rows"):
        tokens("llama", init="text", text=[5, 100])
    with pytest.raises(FieldError, match="has no token"):
        tokens("llama", init="labels", labels=[[1], []])


# ------------------------------------------------------------------ packed texts
@pytest.mark.parametrize("model", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["bool", "float", "positions"])
def test_packed_texts_see_the_same_prompt_each(model: str, kind: str) -> None:
    net = zoo.build(model)
    PromptTuning(length=3, heads=None).apply(net)
    perturb(net, 0.5)
    ids, cut = torch.randint(3, zoo.VOCAB, (2, 7), generator=torch.Generator().manual_seed(0)), 3
    positions = torch.cat([torch.arange(cut), torch.arange(7 - cut)]).expand(2, -1)
    text = (torch.arange(7) >= cut).long()
    seen = (text[:, None] == text).tril().expand(2, 1, -1, -1)
    mask = {"bool": seen, "float": torch.zeros(seen.shape).masked_fill(~seen, -1e9), "positions": None}[kind]
    packed = net(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False).logits
    alone = torch.cat([net(input_ids=part).logits for part in (ids[:, :cut], ids[:, cut:])], 1)
    close(packed, alone, 1e-5)
    packed.sum().backward()
    assert prompt_of(net).tokens.grad.abs().sum() > 0


def test_positions_that_begin_anew_matter() -> None:
    """The base tells packed texts apart by them, and so does a model with a prompt; with a cache neither does."""
    net, base = zoo.build("llama"), zoo.build("llama")
    PromptTuning(length=3, heads=None).apply(net)
    ids, positions = torch.tensor([[5, 6, 7, 8, 9]]), torch.tensor([[0, 1, 0, 1, 2]])
    for model in (net, base):
        split, whole = (model(input_ids=ids, position_ids=positions, use_cache=c).logits for c in (False, True))
        assert not torch.allclose(split[:, 2:], whole[:, 2:], atol=1e-4)


def test_blocks_are_for_causal_models() -> None:
    net = zoo.build("bert")
    PromptTuning(length=3, heads=None).apply(net)
    with pytest.raises(ValueError, match=r"got \(2, 1, 7, 7\).*in a causal model"):
        net(input_ids=zoo.inputs("bert")["input_ids"], attention_mask=torch.ones(2, 1, 7, 7, dtype=torch.bool))
    net = zoo.build("llama")
    PromptTuning(length=3, heads=None).apply(net)
    with pytest.raises(ValueError, match=r"got \(2, 1, 7, 7\)"):  # 0 and 1: of which kind it is, nobody knows
        net(input_ids=zoo.inputs("llama")["input_ids"], attention_mask=torch.ones(2, 1, 7, 7, dtype=torch.long))


SIDES = [(model, "right") for model in ("gpt2", "llama", "roberta", "bert", "t5")] + [
    ("llama", "left"),
    ("gpt2", "left"),
]


@pytest.mark.parametrize(("model", "side"), SIDES)
def test_padding_changes_nothing(model: str, side: str) -> None:
    """On the left in causal models only, also where the base's own positions would count it."""
    net = zoo.build(model)
    PromptTuning(length=3, heads=None).apply(net)
    perturb(net, 0.5)
    ids = torch.randint(3, zoo.VOCAB, (1, 5), generator=torch.Generator().manual_seed(0))
    more = {"decoder_input_ids": torch.tensor([[4, 5, 6]])} if model in zoo.DECODERS else {}
    width, real = ((3, 0), slice(3, None)) if side == "left" else ((0, 3), slice(0, 5))
    padded = nn.functional.pad(ids, width, value=net.config.pad_token_id)
    mask = nn.functional.pad(torch.ones_like(ids), width)
    with torch.no_grad():
        out, alone = (net(input_ids=i, attention_mask=m, **more).logits for i, m in ((padded, mask), (ids, None)))
    close(out[:, real] if model in ("gpt2", "llama") else out, alone, 1e-5)


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_turns_on_one_cache_behind_padding(model: str) -> None:
    net = zoo.build(model)
    PromptTuning(length=3, heads=None).apply(net)
    perturb(net, 0.5)
    ids = torch.randint(3, zoo.VOCAB, (1, 6), generator=torch.Generator().manual_seed(0))
    padded, mask = nn.functional.pad(ids, (2, 0)), nn.functional.pad(torch.ones_like(ids), (2, 0))
    with torch.no_grad():
        first = net(input_ids=padded[:, :5], attention_mask=mask[:, :5], use_cache=True)
        second = net(input_ids=padded[:, 5:], attention_mask=mask, past_key_values=first.past_key_values)
        close(torch.cat([first.logits[:, 2:], second.logits], 1), net(input_ids=ids).logits, 1e-5)


# ------------------------------------------------------------------ SPoT: a prompt that starts from others
def trained(path: Path, seed: int, length: int = 3, model: str = "llama") -> Tensor:
    """An adapter directory of a prompt, and its rows."""
    net = zoo.build(model)
    PromptTuning(length=length, seed=seed, heads=None).apply(net)
    save_adapter(net, path)
    return prompt_of(net).tokens.detach().clone()


def test_a_prompt_starts_where_another_ended(tmp_path: Path) -> None:
    rows = [trained(tmp_path / name, seed) for seed, name in enumerate("abc")]
    assert torch.equal(tokens("llama", length=3, init="prompt", source=str(tmp_path / "b")), rows[1])
    both = [str(tmp_path / "a"), str(tmp_path / "c")]
    close(tokens("llama", length=3, init="prompt", source=both), (rows[0] + rows[2]) / 2)
    weighed = tokens("llama", length=3, init="prompt", source=both, weights=[3.0, 1.0])
    close(weighed, 0.75 * rows[0] + 0.25 * rows[2])


def test_a_source_that_does_not_fit(tmp_path: Path) -> None:
    trained(tmp_path / "a", 0)
    with pytest.raises(TargetError, match=r"holds a prompt of \(3, 32\); \(4, 32\) is needed"):
        tokens("llama", length=4, init="prompt", source=str(tmp_path / "a"))
    net = zoo.build("llama")
    LoRA().apply(net)
    save_adapter(net, tmp_path / "lora")
    with pytest.raises(AdapterFileError, match="holds 0 prompts"):
        tokens("llama", length=3, init="prompt", source=str(tmp_path / "lora"))


# ------------------------------------------------------------------ P-Tuning
PSEUDO = 99


def template_of(net: nn.Module) -> Any:
    return state.get_applied(net).placements[0].adapter


def rows_by_torch(adapter: Any, encoder: str) -> Tensor:
    """MLP(biLSTM(E)) by torch's own modules."""
    x, width = adapter.tokens.detach(), adapter.tokens.shape[1]
    if encoder == "lstm":
        lstm = nn.LSTM(width, width // 2, 2, bidirectional=True, batch_first=True).double()
        lstm.load_state_dict(adapter.lstm.state_dict())
        x = lstm(x[None])[0][0]
    if encoder != "none":
        one, two = adapter.mlp[0], adapter.mlp[2]
        x = torch.relu(x @ one.weight.T + one.bias) @ two.weight.T + two.bias
    return x.detach()


@pytest.mark.parametrize("encoder", ["lstm", "mlp", "none"])
@pytest.mark.parametrize("model", ["llama", "bert", "t5"])
def test_p_tuning(model: str, encoder: str) -> None:
    """Embeddings at pseudo tokens replaced in order, all else as it is; gradients reach the rows alike."""
    net, base = zoo.build(model).double(), zoo.build(model).double()
    method = PTuning(template=[2, 1], pseudo=PSEUDO, encoder=encoder, dtype="float64", heads=None)
    method.apply(net)
    call = zoo.inputs(model)
    texts = [method.filled([[5], [6, 7], [8]]), method.filled([[], [], [5, 6, 7, 8]])]
    call["input_ids"], call["attention_mask"] = torch.tensor(texts), torch.ones(2, 7, dtype=torch.long)
    assert texts == [[5, 99, 99, 6, 7, 99, 8], [99, 99, 99, 5, 6, 7, 8]]
    rows = rows_by_torch(template_of(net), encoder).requires_grad_()
    x = base.get_input_embeddings()(call["input_ids"]).detach().clone()
    for i, places in enumerate(([1, 2, 5], [0, 1, 2])):
        x[i, places] = rows if i else rows
    more = {k: v for k, v in call.items() if k not in ("input_ids",)}
    expected, out = base(inputs_embeds=x, **more).logits, net(**call).logits
    close(out, expected, 1e-10)
    goal = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours = torch.autograd.grad((out * goal).sum(), list(template_of(net).parameters()))
    theirs = torch.autograd.grad((expected * goal).sum(), rows)[0]
    again = torch.autograd.grad((template_of(net).rows() * theirs).sum(), list(template_of(net).parameters()))
    for a, b in zip(ours, again, strict=True):
        close(a, b, 1e-10)


@pytest.mark.parametrize(("encoder", "count"), [("lstm", 8_278_272), ("none", 6_912)])
def test_p_tuning_counts(encoder: str, count: int) -> None:
    net = PTuning(pseudo=1, encoder=encoder, heads=None).apply(fresh("bert-base"))
    assert state.describe(net)["trainable"] == count


def test_p_tuning_keeps_the_rows_alone(tmp_path: Path) -> None:
    net = zoo.build("bert")
    PTuning(template=[2, 1], pseudo=[PSEUDO], heads=None).apply(net)
    perturb(net, 0.1)
    save_adapter(net, tmp_path / "a")
    other = zoo.build("bert")
    assert load_adapter(other, tmp_path / "a").config(defaults=False)["encoder"] == "none"
    assert template_of(other).tokens.numel() == 3 * 32
    close(template_of(other).tokens, template_of(net).rows())


def test_a_template_is_never_cut() -> None:
    method = PTuning(template=[2, 1], pseudo=PSEUDO)
    assert method.filled([[1], [5, 6, 7, 8], [2]], max_length=7, cut=1) == [1, 99, 99, 5, 6, 99, 2]
    with pytest.raises(ValueError, match="2 tokens too many for max_length=7"):
        method.filled([[1], [5, 6, 7, 8], [2]], max_length=7)
    with pytest.raises(ValueError, match="2 tokens too many"):
        method.filled([[1], [5, 6, 7, 8], [2]], max_length=7, cut=0)
    with pytest.raises(ValueError, match="2 pieces for template"):
        method.filled([[1], [2]])
    net = zoo.build("llama")
    method.apply(net)
    with pytest.raises(ValueError, match=r"Rows with \[2, 3\] pseudo tokens; the template has 3"):
        net(input_ids=torch.tensor([[99, 99, 5, 99], [99, 99, 5, 6]]))


def test_templates_that_make_no_sense() -> None:
    for fields, message in (({"template": []}, "not all 0"), ({"template": [0]}, "not all 0"), ({"pseudo": -1}, "ids")):
        with pytest.raises(FieldError, match=message):
            PTuning(**fields)
    for model, fields, message in (
        ("llama", {}, "no pseudo token"),
        ("llama", {"pseudo": 100}, "100 is not among the 100 rows"),
        ("vit", {"pseudo": 1}, "embeddings of token ids"),
    ):
        with pytest.raises(TargetError, match=message):
            PTuning(**fields).apply(zoo.build(model))
    odd = nn.ModuleDict({"embed": nn.Embedding(9, 5), "out": nn.Linear(5, 2)})
    with pytest.raises(TargetError, match="odd width"):
        PTuning(pseudo=1).apply(odd)


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_p_tuning_generates_with_a_cache_as_without(model: str) -> None:
    net = zoo.build(model)
    net.generation_config.eos_token_id, net.generation_config.pad_token_id = None, 0
    PTuning(template=[2, 1], pseudo=PSEUDO, heads=None).apply(net)
    perturb(net, 0.3)
    ids = torch.tensor([[0, 0, 99, 99, 5, 99, 6], [99, 99, 5, 6, 7, 99, 8]])
    options = {
        "attention_mask": (ids != 0).long(),
        "max_new_tokens": 6,
        "do_sample": False,
        "bad_words_ids": [[PSEUDO]],
    }
    with_cache, without = (net.generate(ids, use_cache=cache, **options) for cache in (True, False))
    assert torch.equal(with_cache, without)
    options["attention_mask"] = None
    assert torch.equal(net.generate(ids[:1, 2:], **options)[:, -6:], with_cache[:1, -6:])


def test_p_tuning_of_peft_is_a_prompt_in_front() -> None:
    """It has no template, and an MLP of three layers: the same rows at the first places give the same model."""
    peft = pytest.importorskip("peft")
    ours, theirs = zoo.build("llama").double(), zoo.build("llama").double()
    PTuning(template=[3], pseudo=PSEUDO, encoder="none", dtype="float64", heads=None).apply(ours)
    config = peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=16)
    theirs = peft.get_peft_model(theirs, config).double().eval()
    with torch.no_grad():
        rows = theirs.prompt_encoder["default"](theirs.prompt_tokens["default"][None])[0]
        template_of(ours).tokens.copy_(rows)
    ids = zoo.inputs("llama")["input_ids"]
    close(ours(input_ids=F.pad(ids, (3, 0), value=PSEUDO)).logits, theirs(input_ids=ids).logits, 1e-10)
    assert sum("weight" in name for name, _ in theirs.prompt_encoder["default"].mlp_head.named_parameters()) == 3


# ------------------------------------------------------------------ visual prompts
def vit_blocks(base: Any) -> Any:
    return base.vit.layers if hasattr(base.vit, "layers") else base.vit.encoder.layer


@pytest.mark.parametrize("deep", [True, False])
def test_vpt(deep: bool) -> None:
    net, base = zoo.build("vit").double(), zoo.build("vit").double()
    VPT(length=3, deep=deep, dtype="float64", heads=None).apply(net)
    own = [p.adapter.tokens for p in state.get_applied(net).placements if hasattr(p.adapter, "prompt")]
    assert len(own) == (2 if deep else 1)
    x = base.vit.embeddings(zoo.inputs("vit")["pixel_values"].double())
    for i, block in enumerate(vit_blocks(base)):
        rest = x[:, 1:] if i == 0 else x[:, 4:]
        middle = own[i if deep else 0].expand(2, -1, -1) if deep or i == 0 else x[:, 1:4]
        x = block(torch.cat([x[:, :1], middle, rest], 1))
    expected = base.classifier(base.vit.layernorm(torch.cat([x[:, :1], x[:, 4:]], 1))[:, 0])
    out = net(zoo.inputs("vit")["pixel_values"].double()).logits
    close(out, expected, 1e-10)
    for a, b in zip(
        *(torch.autograd.grad(y.pow(2).sum(), own, retain_graph=True) for y in (out, expected)), strict=True
    ):
        assert a.abs().sum() > 0
        close(a, b, 1e-10)


@pytest.mark.parametrize("deep", [True, False])
def test_vpt_around_torchs_layers_sees_padding(deep: bool) -> None:
    net, base = zoo.build("encoder"), zoo.build("encoder")
    VPT(length=2, deep=deep, heads=None).apply(net)
    own = [p.adapter.tokens for p in state.get_applied(net).placements]
    call = zoo.inputs("encoder")
    x, hidden = base.embed(call["tokens"]), F.pad(call["mask"] == 0, (2, 0))
    for i, layer in enumerate(base.encoder.layers):
        first = own[i].expand(2, -1, -1) if deep or i == 0 else x[:, :2]
        x = layer(torch.cat([first, x if i == 0 else x[:, 2:]], 1), src_key_padding_mask=hidden)
    x, mask = x[:, 2:], call["mask"]
    close(net(**call), base.classifier((x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)), 1e-5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("method", [VPT(length=2), VPT(length=2, deep=False), PromptTuning(length=2)], ids=str)
def test_torchs_layers_need_no_mask(method: Any, training: bool) -> None:
    net = zoo.build("encoder").train(training)
    dataclasses.replace(method, heads=None).apply(net)
    tokens = zoo.inputs("encoder")["tokens"]
    none = torch.zeros(tokens.shape, dtype=torch.bool)
    x = net.embed(tokens)
    close(net.encoder(x), net.encoder(x, src_key_padding_mask=none), 1e-5)


@pytest.mark.parametrize(("deep", "count"), [(True, 12 * 50 * 768), (False, 50 * 768)])
def test_vpt_counts_and_initial_values(deep: bool, count: int) -> None:
    net = VPT(length=50, deep=deep, heads=None).apply(fresh("vit-b"))
    assert state.describe(net)["trainable"] == count
    tiny = zoo.build("vit")
    VPT(length=50, deep=deep, heads=None).apply(tiny)
    bound = (6 / (3 * 8 * 8 + 32)) ** 0.5
    assert 0.9 * bound < state.get_applied(tiny).placements[0].adapter.tokens.abs().max() <= bound


def test_vpt_takes_the_tower_that_sees_and_drops_out_in_training() -> None:
    net = zoo.build("clip")
    VPT(length=2, dropout=0.5, heads=None).apply(net)
    assert {p.site.split(".")[0] for p in state.get_applied(net).placements} == {"vision_model"}
    prompt = state.get_applied(net).placements[0].adapter.prompt
    assert torch.equal(prompt(2)[0], prompt.tokens)
    assert (prompt.train()(2) == 0).any()
    states = zoo.build("vit")
    VPT(length=2, heads=None).apply(states)
    seen = states(**zoo.inputs("vit"), output_hidden_states=True).hidden_states
    assert {h.shape[1] for h in seen} == {5}


# ------------------------------------------------------------------ prompts of several tasks
def test_each_example_gets_the_prompt_of_its_task() -> None:
    net = zoo.build("gpt2").double()
    method = MultitaskPrompt(length=3, tasks=3, rank=2, dtype="float64", heads=None)
    method.apply(net)
    perturb(net, 0.5)
    prompt, base = prompt_of(net), zoo.build("gpt2").double()
    call, ids = zoo.inputs("gpt2", batch=4), torch.tensor([2, 0, 2, 1])
    u, v = prompt.columns, prompt.rows
    rows = torch.stack([prompt.tokens * (u[t] @ v[t]) for t in ids])
    longer = torch.cat([rows, base.transformer.wte(call["input_ids"])], 1)
    expected = base(inputs_embeds=longer, attention_mask=F.pad(call["attention_mask"], (3, 0), value=1)).logits[:, 3:]
    out = net(**call, task_ids=ids).logits
    close(out, expected, 1e-10)
    own = [prompt.tokens, u, v]
    for a, b in zip(
        *(torch.autograd.grad(y.pow(2).sum(), own, retain_graph=True) for y in (out, expected)), strict=True
    ):
        close(a, b, 1e-10)
    with method.turn(net, ids):
        assert torch.equal(net(**call).logits, out)
    with method.turn(net, 2):
        close(net(**call).logits[[0, 2]], out[[0, 2]], 1e-10)
    with pytest.raises(ValueError, match="not whose turn it is"):
        net(**call)
    with pytest.raises(ValueError, match=r"task_ids is \(3,\) for a batch of 4"):
        net(**call, task_ids=ids[:3])


@pytest.mark.parametrize("model", ["t5", "bert", "vit", "encoder"])
@pytest.mark.parametrize("method", [MultitaskPrompt, IPT])
def test_tasks_on_other_models(model: str, method: Any) -> None:
    net = zoo.build(model)
    made = method(length=2, tasks=2, heads=None, **({"dimension": 3} if method is IPT else {}))
    made.apply(net)
    perturb(net, 0.5)
    call = zoo.inputs(model)
    outs = []
    for task in (0, 1):
        with made.turn(net, task), torch.no_grad():
            out = net(**call)
            outs.append(out if isinstance(out, Tensor) else out.logits)
    assert not torch.allclose(*outs, atol=1e-6)
    with torch.no_grad(), made.turn(net, [1, 0]):
        out = net(**call)
    out = out if isinstance(out, Tensor) else out.logits
    close(out, torch.stack([outs[1][0], outs[0][1]]), 1e-5)
    if model != "encoder":  # which takes nothing that it does not know
        close(net(**call, task_ids=torch.tensor([1, 0])).logits, out, 1e-5)


def test_generation_in_turn_with_beams() -> None:
    net = zoo.build("llama")
    net.generation_config.eos_token_id, net.generation_config.pad_token_id = None, 0
    method = MultitaskPrompt(length=3, tasks=2, heads=None)
    method.apply(net)
    perturb(net, 0.5)
    ids = torch.randint(3, zoo.VOCAB, (2, 5), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": 2, "attention_mask": torch.ones_like(ids)}
    with method.turn(net, [0, 1]):
        both = net.generate(ids, **options)
    options["attention_mask"] = options["attention_mask"][:1]
    for task in (0, 1):
        with method.turn(net, task):
            assert torch.equal(net.generate(ids[task : task + 1], **options), both[task : task + 1])


def test_multitask_prompts_of_peft(recwarn: pytest.WarningsRecorder) -> None:
    peft = pytest.importorskip("peft")
    ours, theirs = zoo.build("llama").double(), zoo.build("llama").double()
    MultitaskPrompt(length=3, tasks=2, rank=2, dtype="float64", heads=None).apply(ours)
    config = peft.MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, num_tasks=2, num_ranks=2, prompt_tuning_init="RANDOM"
    )
    theirs = peft.get_peft_model(theirs, config).double().eval()
    mine, peer = prompt_of(ours), theirs.prompt_encoder["default"]
    with torch.no_grad():
        mine.tokens.copy_(peer.embedding.weight)
        mine.columns.copy_(peer.prefix_task_cols * 20)
        mine.rows.copy_(peer.prefix_task_rows * 20)
        peer.prefix_task_cols.mul_(20)
        peer.prefix_task_rows.mul_(20)
    call, ids = zoo.inputs("llama"), torch.tensor([1, 0])
    a, b = ours(**call, task_ids=ids).logits, theirs(**call, task_ids=ids).logits[:, 3:]
    close(a, b, 1e-10)
    a.pow(2).sum().backward()
    b.pow(2).sum().backward()
    close(mine.columns.grad, peer.prefix_task_cols.grad, 1e-8)
    close(mine.rows.grad, peer.prefix_task_rows.grad, 1e-8)
    close(mine.tokens.grad, peer.embedding.weight.grad, 1e-8)


def test_from_source_tasks_to_a_target(tmp_path: Path) -> None:
    net = zoo.build("llama")
    MultitaskPrompt(length=3, tasks=3, heads=None).apply(net)
    perturb(net, 0.3)
    save_adapter(net, tmp_path / "source")
    source, found = prompt_of(net), {}
    cases = {"mean": {}, "task": {"source_task": 2}, "shared": {"shared_only": True}}
    for name, fields in cases.items():
        target = zoo.build("llama")
        MultitaskPrompt(length=3, init="prompt", source=str(tmp_path / "source"), heads=None, **fields).apply(target)
        found[name] = prompt_of(target)
        assert torch.equal(found[name].tokens, source.tokens)
    close(found["mean"].columns, source.columns.mean(0, keepdim=True))
    assert torch.equal(found["task"].rows[0], source.rows[2])
    close(found["shared"].rows, torch.ones(1, 1, 32), 0.15)
    save_adapter(target, tmp_path / "target")
    fields = load_adapter(zoo.build("llama"), tmp_path / "target").config(defaults=False)
    assert set(fields) == {"length", "label", "heads"}
    plain = zoo.build("llama")
    PromptTuning(length=3, heads=None).apply(plain)
    save_adapter(plain, tmp_path / "plain")
    for error, message, more in (
        (AdapterFileError, "holds no multitask_prompt", {"source": str(tmp_path / "plain")}),
        (TargetError, "holds factors", {"source": str(tmp_path / "source"), "rank": 2}),
        (TargetError, "of source_task=3", {"source": str(tmp_path / "source"), "source_task": 3}),
        (FieldError, "of one directory", {"source": [str(tmp_path / "source")]}),
    ):
        with pytest.raises(error, match=message):
            MultitaskPrompt(length=3, init="prompt", **more).apply(zoo.build("llama"))


@pytest.mark.parametrize(
    ("method", "fields", "message"),
    [
        (MultitaskPrompt, {"task": 1}, "expected one of 0 to 0"),
        (MultitaskPrompt, {"source_task": 0}, "are about init='prompt'"),
        (IPT, {"stage": 3}, "stage is 1, or 2"),
        (IPT, {"stage": 2}, "with source= the adapter directory"),
        (IPT, {"stage": 2, "source": "a", "tasks": 2}, "leave tasks, task, text"),
        (IPT, {"stage": 2, "source": "a", "text": [1]}, "leave tasks, task, text"),
    ],
)
def test_tasks_that_make_no_sense(method: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(FieldError, match=message):
        method(**fields)


@pytest.mark.parametrize("ids", [[-1, 0], [3, 0]])
def test_tasks_that_are_not_there(ids: list[int]) -> None:
    net = zoo.build("bert")
    MultitaskPrompt(tasks=3, length=2, heads=None).apply(net)
    with pytest.raises(ValueError, match=r"there are 3 tasks, 0 to 2"):
        net(**zoo.inputs("bert"), task_ids=torch.tensor(ids))


@pytest.mark.parametrize("how", ["in the batch", "in turn"])
@pytest.mark.parametrize("method", [MultitaskPrompt(length=2, tasks=3), IPT(length=2, tasks=3, dimension=3)], ids=str)
def test_blocks_that_run_twice_get_the_same_task_twice(method: Any, how: str) -> None:
    gradients = []
    for on in (False, True):
        net = zoo.build("vit").train()
        here = dataclasses.replace(method, heads=None)
        here.apply(net)
        if on:
            checkpoint_blocks(net)
        total = 0
        for ids in ([0, 1], [2, 2]):
            if how == "in turn":
                with here.turn(net, ids):
                    total = total + net(**zoo.inputs("vit")).logits.pow(2).sum()
            else:
                total = total + net(**zoo.inputs("vit"), task_ids=torch.tensor(ids)).logits.pow(2).sum()
        total.backward()
        gradients.append([p.grad for p in state.trainable(net).values()])
    for a, b in zip(*gradients, strict=True):
        close(a, b, 1e-5)


# ------------------------------------------------------------------ intrinsic prompt tuning
def test_the_autoencoder_of_ipt() -> None:
    net = zoo.build("llama").double()
    IPT(length=2, tasks=3, dimension=4, dtype="float64", heads=None).apply(net)
    perturb(net, 0.1)
    p = prompt_of(net)
    flat = p.tokens.flatten(1)
    z = flat @ p.encoder_weight.T + p.encoder_bias
    back = torch.tanh(z @ p.hidden_weight.T + p.hidden_bias) @ p.out_weight.T + p.out_bias
    ids = torch.tensor([2, 0])
    p.ids = ids
    close(p(2), back.view(3, 2, 32)[ids], 1e-10)
    p.ids = ids.repeat(2)
    close(p(4), back.view(3, 2, 32)[ids.repeat(2)], 1e-10)
    close(p.penalty(), 200 * (back - flat).pow(2).mean(), 1e-10)
    plain = zoo.build("llama")
    IPT(length=2, dimension=4, reconstruction=0, heads=None).apply(plain)
    assert prompt_of(plain).penalty() is None


def test_ipt_counts() -> None:
    net = IPT(length=100, tasks=2, heads=None).apply(fresh("t5-base"))
    assert state.describe(net)["trainable"] - 2 * 100 * 768 == 78_452_218


def test_ipt_trains_in_a_subspace(tmp_path: Path) -> None:
    """Stage 2: d_I parameters; the file holds the prompt, and needs stage 1 no more."""
    net = zoo.build("llama")
    IPT(length=2, tasks=3, dimension=4, heads=None).apply(net)
    perturb(net, 0.3)
    save_adapter(net, tmp_path / "one")
    decoder, second = prompt_of(net), zoo.build("llama")
    IPT(length=2, stage=2, dimension=4, source=str(tmp_path / "one"), heads=None).apply(second)
    assert state.describe(second)["trainable"] == 4
    p = prompt_of(second)
    assert p.z.abs().max() < 0.1
    perturb(second, 1.0)
    hidden = torch.tanh(p.z @ decoder.hidden_weight.T + decoder.hidden_bias)
    rows = (hidden @ decoder.out_weight.T + decoder.out_bias).view(2, 32)
    close(p(1)[0], rows, 1e-5)
    assert [n for n in second.state_dict() if ".prompt." in n] == ["model.adapters.ipt.prompt.z"]
    twin = copy.deepcopy(second)
    save_adapter(second, tmp_path / "two")
    (tmp_path / "one" / "adapter.safetensors").unlink()
    third = zoo.build("llama")
    assert type(load_adapter(third, tmp_path / "two")) is PromptTuning
    call = zoo.inputs("llama")
    for other in (twin, third):
        close(other(**call).logits, second(**call).logits, 1e-5)


def test_a_decoder_that_does_not_fit(tmp_path: Path) -> None:
    for name, method in (
        ("one", IPT(length=2, dimension=4, heads=None)),
        ("plain", PromptTuning(length=2, heads=None)),
    ):
        net = zoo.build("llama")
        method.apply(net)
        save_adapter(net, tmp_path / name)
    with pytest.raises(TargetError, match="has hidden_weight"):
        IPT(length=2, stage=2, dimension=5, source=str(tmp_path / "one")).apply(zoo.build("llama"))
    with pytest.raises(AdapterFileError, match="holds no decoder"):
        IPT(length=2, stage=2, dimension=4, source=str(tmp_path / "plain")).apply(zoo.build("llama"))


# ------------------------------------------------------------------ in a Trainer
def mixed(tasks: bool, count: int = 8) -> DataLoader[Any]:
    """One batch of both tasks, again and again."""
    ids = torch.randint(3, zoo.VOCAB, (count, 6), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row, "task_ids": torch.tensor(i % 2)} for i, row in enumerate(ids)]
    if not tasks:
        rows = [{name: row[name] for name in ("input_ids", "labels")} for row in rows]
    return DataLoader(rows, batch_size=count)  # type: ignore[arg-type]


def run(method: Any, steps: int, folder: Path, resume: str | None = None, tasks: bool = True) -> CausalLM:
    task = CausalLM(zoo.build("llama").train(), optimizer=partial(torch.optim.Adam, lr=0.05), scheduler=constant)
    trainer = Trainer(
        max_steps=steps, callbacks=[method], logger=False, enable_progress_bar=False, enable_model_summary=False,
        accelerator="cpu", enable_checkpointing=False, max_epochs=5, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(task, mixed(tasks), ckpt_path=resume)
    trainer.save_checkpoint(folder / f"{steps}.ckpt")
    return task


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tasks_train_together_and_a_new_one_in_their_subspace(tmp_path: Path) -> None:
    task = run(IPT(length=2, tasks=2, dimension=3, heads=None), 3, tmp_path)
    start = zoo.build("llama")
    IPT(length=2, tasks=2, dimension=3, heads=None).apply(start)
    for before, after in zip(prompt_of(start).tokens, prompt_of(task).tokens, strict=True):
        assert not torch.equal(before, after)
    save_adapter(task, tmp_path / "one")

    def second() -> IPT:
        return IPT(length=2, stage=2, dimension=3, source=str(tmp_path / "one"), heads=None)

    whole = prompt_of(run(second(), 4, tmp_path, tasks=False)).z
    run(second(), 2, tmp_path, tasks=False)
    saved = torch.load(tmp_path / "2.ckpt", weights_only=True)["state_dict"]
    assert [tuple(t.shape) for name, t in saved.items() if ".prompt." in name] == [(3,)]  # and no decoder
    assert torch.equal(prompt_of(run(second(), 4, tmp_path, str(tmp_path / "2.ckpt"), tasks=False)).z, whole)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_multitask_prompts_resume_where_they_were(tmp_path: Path) -> None:
    def method() -> MultitaskPrompt:
        return MultitaskPrompt(length=2, tasks=2, heads=None)

    whole = prompt_of(run(method(), 4, tmp_path)).state_dict()
    run(method(), 2, tmp_path)
    again = prompt_of(run(method(), 4, tmp_path, resume=str(tmp_path / "2.ckpt"))).state_dict()
    for name, tensor in whole.items():
        assert torch.equal(tensor, again[name]), name


@pytest.mark.parametrize("there", [True, False])
def test_a_template_that_no_text_holds_is_said(there: bool, recwarn: pytest.WarningsRecorder) -> None:
    ids = torch.tensor([PSEUDO if there else 4, 5, 6])
    rows = [{"input_ids": ids, "labels": ids}]
    task = CausalLM(zoo.build("llama").train(), scheduler=constant)
    trainer = Trainer(
        max_steps=2, callbacks=[PTuning(pseudo=PSEUDO, template=[1], heads=None)], logger=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(task, DataLoader(rows))  # type: ignore[arg-type]
    said = [w for w in recwarn if "the first batch has no pseudo token" in str(w.message)]
    assert len(said) == (0 if there else 1)


# ------------------------------------------------------------------ SPoT's retrieval, ensembles
def test_similar_prompts_are_found_and_blended(tmp_path: Path) -> None:
    a, b = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)), torch.ones(3, 32)
    cosines = [F.cosine_similarity(x, y, 0) for x in a for y in b]
    assert prompts.similarity(a, b, "pairs") == pytest.approx(torch.stack(cosines).mean().item(), abs=1e-6)
    assert prompts.similarity(a, b) == pytest.approx(F.cosine_similarity(a.mean(0), b[0], 0).item(), abs=1e-6)
    rows = {name: trained(tmp_path / name, seed) for seed, name in enumerate("abc")}
    target = rows["b"] + 0.2 * rows["c"]
    ranked = prompts.retrieve(target, [tmp_path / name for name in "abc"], k=2)
    assert ranked[0] == (str(tmp_path / "b"), pytest.approx(prompts.similarity(target, rows["b"])))
    assert len(ranked) == 2
    pair = [(str(tmp_path / "b"), 0.75), (str(tmp_path / "c"), 0.25)]
    close(tokens("llama", length=3, **prompts.blend(pair)), 0.75 * rows["b"] + 0.25 * rows["c"])
    with pytest.raises(ValueError, match="Similarities above 0"):
        prompts.blend([("a", -0.1)])
    with pytest.raises(ValueError, match="of different bases"):
        prompts.similarity(a, torch.ones(3, 16))


@pytest.mark.parametrize("model", ["bert", "t5", "vit", "encoder"])
def test_an_ensemble_is_each_prompt_alone(model: str) -> None:
    net = zoo.build(model)
    PromptTuning(length=3, heads=None).apply(net)
    many = [torch.randn(3, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    call, before = zoo.inputs(model), prompt_of(net).tokens.detach().clone()
    with torch.no_grad():
        logits = prompts.ensemble(net, many, **call)
        for i, rows in enumerate(many):
            prompt_of(net).tokens.copy_(rows)
            out = net(**call)
            close(logits[i], out if isinstance(out, Tensor) else out.logits, 1e-5)
        prompt_of(net).tokens.copy_(before)


def test_an_ensemble_generates_and_says_what_does_not_fit() -> None:
    net = zoo.build("llama")
    PromptTuning(length=3, heads=None).apply(net)
    many = [torch.randn(3, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    with prompts.instead(net, many):
        out = net.generate(ids.repeat(2, 1), max_new_tokens=3, do_sample=False, num_beams=2, attention_mask=None)
        with pytest.raises(ValueError, match="2 prompts do not go into a batch of 3"):
            net(input_ids=ids[[0, 1, 0]])
    assert out.shape == (4, 6)
    with pytest.raises(ValueError, match=r"Prompts of \(2, 32\) in place of those of \[\(3, 32\)\]"):
        prompts.ensemble(net, [torch.ones(2, 32)], input_ids=ids)


def test_votes() -> None:
    logits = torch.tensor([[[2.0, 1, 0]], [[2.0, 1, 0]], [[0.0, 9, 0]]])
    assert prompts.vote(logits).item() == 0
    assert logits.mean(0).argmax(-1).item() == 1
    assert prompts.vote(logits[1:]).item() == 1  # one each: the surer one


# ------------------------------------------------------------------ in-context examples, no training
class Reviews(TextData):
    """Texts of two classes, in memory."""

    def load(self) -> dict[str, list[Example]]:
        rows = [Example(f"{word} film {i}", name) for i in range(4) for word, name in (("good", "pos"), ("bad", "neg"))]
        return {"train": rows, "val": rows[:3], "test": rows[3:]}


def language_model(kind: str = "gpt2") -> nn.Module:
    import transformers as hf

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "t5":
            return hf.T5ForConditionalGeneration(hf.T5Config(**{**zoo.T5, **zoo.T5_REST, "vocab_size": 260})).eval()
        if kind == "llama":
            return hf.LlamaForCausalLM(
                hf.LlamaConfig(**{**zoo.TEXT, "vocab_size": 260, "max_position_embeddings": 512})
            )
        return hf.GPT2LMHeadModel(hf.GPT2Config(**{**zoo.GPT2, "vocab_size": 260, "n_positions": 512})).eval()


def in_context(kind: str = "gpt2", **fields: Any) -> InContext:
    return InContext(language_model(kind), Reviews("bytes", batch_size=2), **{"shots": 3, **fields}).eval()


def by_hand(task: InContext, text: str, label: str) -> Tensor:
    """sum log p(label | prompt), a text at a time."""
    shots = "".join(f"{e.text}\nLabel: {e.label}\n\n" for e in task.examples)
    tokenizer = ByteTokenizer()
    front = [1, *tokenizer.encode(f"{shots}{text}\nLabel:", False)]
    ids = torch.tensor([front + (tail := tokenizer.encode(f" {label}", False))])
    logp = task.model(ids).logits.log_softmax(-1)[0, len(front) - 1 : -1]
    return logp.gather(-1, torch.tensor(tail)[:, None]).sum()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_scores_are_those_of_whole_labels(kind: str) -> None:
    task, texts = in_context(kind), ["a good one", "bad"]
    scores = task.scores(texts)
    for i, text in enumerate(texts):
        for j, label in enumerate(["neg", "pos"]):
            close(scores[i, j], by_hand(task, text, label).detach(), 1e-4)
    mean = in_context(kind, normalise=True, words=["negative", "pos"]).scores(texts)
    total = in_context(kind, words=["negative", "pos"]).scores(texts)
    close(mean * torch.tensor([9.0, 4.0]), total, 1e-4)


def test_calibration_makes_empty_texts_even() -> None:
    plain, task = in_context(), in_context(calibrate=True, empty=["N/A"])
    close(task.scores(["N/A"]).softmax(-1), torch.tensor([[0.5, 0.5]]), 1e-5)
    raw, empty = (plain.scores([text]).softmax(-1) for text in ("good", "N/A"))
    close(task.scores(["good"]).softmax(-1), F.normalize(raw / empty, p=1, dim=1), 1e-5)


def test_an_encoder_decoder_reads_the_prompt_in_its_encoder() -> None:
    task = in_context("t5")
    prompt, label = torch.tensor([task.prompt("good")]), torch.tensor([task.labels[1]])
    loss = task.model(input_ids=prompt, labels=label).loss
    close(task.scores(["good", "a longer one"])[0, 1], -loss * label.numel(), 1e-4)


def test_examples_come_by_the_seed_from_every_class() -> None:
    one, two, other = (in_context(shots=4, seed=seed).examples for seed in (0, 0, 1))
    assert one == two != other
    assert sorted(e.label for e in one) == ["neg", "neg", "pos", "pos"]
    assert in_context(shots=4).hparams["examples"] == [tuple(e) for e in one]


def test_truncation_drops_whole_examples_then_the_end_of_the_text() -> None:
    full = in_context(instruction="Label the film.")
    shots = [len(shot) for shot in full.shots]
    whole = len(full.prompt("good")) + 4
    shorter = in_context(instruction="Label the film.", max_length=whole - 1)
    assert full.prompt("good")[: len(full.head)] == shorter.prompt("good")[: len(full.head)]
    assert len(shorter.prompt("good")) == whole - 4 - shots[0]
    assert ByteTokenizer().decode(shorter.prompt("good")).startswith("Label the film.\n\n" + full.examples[1].text)
    least = in_context(max_length=1 + 7 + 4 + 3)
    assert ByteTokenizer().decode(least.prompt("good")) == "goo\nLabel:"
    with pytest.raises(ValueError, match="has no room for a text: 12 tokens"):
        in_context(max_length=12).prompt("good")


def test_the_row_of_no_training() -> None:
    task, data = in_context(), Reviews("bytes", batch_size=2)
    trainer = Trainer(logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")
    (found,) = trainer.test(task, task.batches(data), verbose=False)
    labels = task.scores([e.text for e in data.splits["test"]]).argmax(-1)
    truth = torch.tensor([data.classes.index(e.label) for e in data.splits["test"]])
    assert found["test/accuracy"] == pytest.approx((labels == truth).float().mean().item())
    with pytest.raises(RuntimeError, match="trains nothing"):
        task.training_step({}, 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"template": "{text}"}, "must hold"),
        ({"words": ["a", "a"]}, "2 different words"),
        ({"shots": 9}, "shots=9 of 8 training examples"),
    ],
)
def test_in_context_settings_that_make_no_sense(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        in_context(**fields)


def test_models_that_write_nothing_score_nothing() -> None:
    data = Reviews("bytes", batch_size=2)
    for model in ("bert_mlm", "bert"):
        with pytest.raises(ValueError, match="scores what a language model writes, and BertFor"):
            InContext(zoo.build(model), data, shots=1)
    with pytest.raises(ValueError, match="scores what a language model writes, and PooledClassifier"):
        InContext(tiny_bert(), data, shots=1).scores(["good"])
    with pytest.raises(ValueError, match="positions .* in a GPT2"):
        InContext(zoo.build("gpt2"), data, shots=8).scores(["good"])


@pytest.mark.parametrize("name", ["prompt_tuning", "vpt"])
def test_images_of_two_towers_inside_of_a_wrapper_get_prompts_in_their_own_tower(name: str) -> None:
    from transformers import CLIPConfig, CLIPModel

    tower = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**tower, "vocab_size": 15, "max_position_embeddings": 8, "eos_token_id": 2}
    image = {**tower, "image_size": 8, "patch_size": 4, "num_channels": 3}
    net = nn.ModuleDict({"clip": CLIPModel(CLIPConfig(text_config=text, vision_config=image)).eval()})
    cls = {"prompt_tuning": PromptTuning, "vpt": VPT}[name]
    cls(length=2, exclude="text_model.*").apply(net)
    assert {p.site.split(".")[1] for p in state.get_applied(net).placements} == {"vision_model"}


class Twins(nn.Module):
    """Two vision transformers of their own: the sum of what they say."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.left, self.right = zoo.build(kind), zoo.build(kind)

    def forward(self, **call: Tensor) -> Tensor:
        return sum(getattr(out := tower(**call), "logits", out) for tower in self.children())


@pytest.mark.parametrize("kind", ["vit", "timm_vit", "encoder"])
@pytest.mark.parametrize("method", [VPT(length=3), VPT(length=3, deep=False), PromptTuning(length=3)], ids=str)
def test_each_of_two_towers_puts_in_and_takes_out_its_own(kind: str, method: Any) -> None:
    net = Twins(kind)
    dataclasses.replace(method, heads=None).apply(net)
    with torch.no_grad():
        sum_of_both = net(**zoo.inputs(kind))
        alone = []
        for name, tower in net.named_children():
            one = zoo.build(kind)
            dataclasses.replace(method, heads=None).apply(one)
            values = {n: p for n, p in tower.named_parameters() if n.endswith("prompt.tokens")}
            assert values, name
            one.load_state_dict(values, strict=False)
            out = one(**zoo.inputs(kind))
            alone.append(getattr(out, "logits", out))
            places = [m.index for m in tower.modules() if isinstance(m, StackTokens)]
            assert all(index == 1 for index in places)
    close(sum_of_both, sum(alone), 1e-5)


@pytest.mark.parametrize("method", [VPT(length=3, deep=False), PromptTuning(length=3)], ids=str)
def test_a_tower_of_one_block(method: Any) -> None:
    net, tokens = zoo.VisionTransformer(depth=1).eval(), []
    net.blocks[0].register_forward_pre_hook(lambda _, args: tokens.append(args[0].shape[1]))
    net.blocks[0].attn.register_forward_pre_hook(lambda _, args: tokens.append(args[0].shape[1]))
    net.norm.register_forward_pre_hook(lambda _, args: tokens.append(args[0].shape[1]))
    method.apply(net)
    net(**zoo.inputs("timm_vit"))
    assert tokens == [5, 8, 5]
