"""Prompts: what they start from, packed texts, templates, prompts of many tasks, visual prompts, transfer, no training."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from harness import perturb
from torch import Tensor, nn

from lightning_peft import PromptTuning, load_adapter, save_adapter
from lightning_peft.core import state
from lightning_peft.core.fields import FieldError
from lightning_peft.core.files import AdapterFileError
from lightning_peft.core.sites import TargetError

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
    from lightning_peft import LoRA

    LoRA().apply(net)
    save_adapter(net, tmp_path / "lora")
    with pytest.raises(AdapterFileError, match="holds 0 prompts"):
        tokens("llama", length=3, init="prompt", source=str(tmp_path / "lora"))
