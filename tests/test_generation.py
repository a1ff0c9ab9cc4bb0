"""Generation with adapters: with a cache as without, in a left-padded batch as alone, with beams."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
import zoo
from harness import perturb, plain_after_prefill
from settings import make
from torch import Tensor, nn

METHODS = (
    "prompt_tuning",
    "multitask_prompt",
    "ipt",
    "prefix_tuning",
    "lora",
    "ia3",
    "mam",
    "unipelt",
    "parallel",
    "lst",
    "attention_fusion",
)
MODELS = ("llama", "gpt2", "t5")
NEW = 8


def fresh(model: str) -> nn.Module:
    """A model that never stops early; T5 with as many decoder layers as encoder layers, which its cache is made for."""
    if model != "t5":
        net = zoo.build(model)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = hf.T5Config(**{**zoo.T5, **zoo.T5_REST, "num_decoder_layers": 2})
            net = hf.T5ForConditionalGeneration(config).eval()
    net.generation_config.eos_token_id = None
    net.generation_config.pad_token_id = 0
    return net


def ready(name: str, model: str, **more: Any) -> nn.Module:
    """An adapted model whose adapters say something."""
    net = fresh(model)
    make(name, model, **more).apply(net)
    perturb(net, scale=0.5)
    return net


def generate(net: nn.Module, ids: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """New tokens (batch, NEW) and the scores they were chosen by (batch, NEW, vocabulary)."""
    options = {"max_new_tokens": NEW, "do_sample": False, "attention_mask": torch.ones_like(ids), **options}
    out = net.generate(ids, return_dict_in_generate=True, output_logits=True, **options)
    return out.sequences[:, -NEW:], torch.stack(out.logits, 1)


def text(length: int = 6, batch: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(3, zoo.VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", METHODS)
def test_with_a_cache_as_without(name: str, model: str) -> None:
    net, ids = ready(name, model), text(batch=2)
    tokens, logits = generate(net, ids, use_cache=True)
    expected, expected_logits = generate(net, ids, use_cache=False)
    torch.testing.assert_close(logits, expected_logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(tokens, expected)
    assert not torch.allclose(generate(fresh(model), ids)[1], logits, atol=1e-3), "the adapters say nothing"


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", METHODS)
def test_a_padded_batch_gives_what_each_row_gives_alone(name: str, model: str) -> None:
    net = ready(name, model)
    rows = [text(6, seed=1), text(3, seed=2), text(5, seed=3)]
    ids, mask = torch.zeros(3, 6, dtype=torch.long), torch.zeros(3, 6, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(0, row.shape[1]) if model == "t5" else slice(6 - row.shape[1], 6)
        ids[i, where], mask[i, where] = row[0], 1
    tokens, logits = generate(net, ids, attention_mask=mask)
    for i, row in enumerate(rows):
        alone, alone_logits = generate(net, row)
        torch.testing.assert_close(logits[i : i + 1], alone_logits, atol=1e-4, rtol=1e-4)
        assert torch.equal(tokens[i : i + 1], alone)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", METHODS)
def test_beams_and_sampling_run(name: str, model: str) -> None:
    net, ids = ready(name, model), text(batch=2)
    common = {"max_new_tokens": 4, "attention_mask": torch.ones_like(ids)}
    best = net.generate(ids, num_beams=3, num_return_sequences=2, do_sample=False, **common)
    assert best.shape == (4, 5 if model == "t5" else 10)
    uncached = net.generate(ids, num_beams=3, num_return_sequences=2, do_sample=False, use_cache=False, **common)
    assert torch.equal(best, uncached)
    assert len(net.generate(ids, do_sample=True, **common)) == 2


@pytest.mark.parametrize("model", ["llama", "gpt2"])
@pytest.mark.parametrize("name", ["prefix_tuning", "prompt_tuning", "lora", "mam", "loreft"])
def test_generation_continues_what_the_forward_says(name: str, model: str) -> None:
    """The first logits of `generate` are the last of a forward pass over the prompt."""
    net, ids = ready(name, model), text()
    with torch.no_grad():
        expected = net(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -1]
    torch.testing.assert_close(generate(net, ids)[1][:, 0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model", ["llama", "gpt2"])
@pytest.mark.parametrize("name", ["lora", "prefix_tuning"])
def test_a_static_cache_gives_what_a_dynamic_one_gives(name: str, model: str) -> None:
    net, ids = ready(name, model), text()
    tokens, logits = generate(net, ids)
    static, static_logits = generate(net, ids, cache_implementation="static", disable_compile=True)
    torch.testing.assert_close(static_logits, logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(static, tokens)


def test_a_prompt_refuses_a_static_cache_and_names_the_way_out() -> None:
    net, ids = ready("prompt_tuning", "llama"), text()
    with pytest.raises(ValueError, match="default dynamic cache"):
        generate(net, ids, cache_implementation="static", disable_compile=True)


@pytest.mark.parametrize("model", ["llama", "gpt2"])
@pytest.mark.parametrize("name", ["prompt_tuning", "prefix_tuning", "loreft"])
def test_generation_from_ready_made_embeddings(name: str, model: str) -> None:
    net, ids = ready(name, model), text()
    _, expected = generate(net, ids)
    out = net.generate(
        inputs_embeds=net.get_input_embeddings()(ids), attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    torch.testing.assert_close(torch.stack(out.logits, 1), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_loreft_edits_the_prompt_and_nothing_that_is_generated(model: str) -> None:
    """By hand: an edited prefill fills the cache, the plain model goes on from there."""
    net, method, ids = fresh(model), make("loreft", model), text()
    method.apply(net)
    perturb(net, scale=0.5)
    tokens, logits = generate(net, ids)
    torch.testing.assert_close(logits, plain_after_prefill(net, method, ids, tokens), atol=1e-5, rtol=1e-5)


def test_loreft_in_a_padded_batch() -> None:
    net = ready("loreft", "llama")
    row = text(4, seed=2)
    ids = torch.cat([torch.zeros(1, 2, dtype=torch.long), row], 1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    torch.testing.assert_close(generate(net, ids, attention_mask=mask)[1], generate(net, row)[1], atol=1e-4, rtol=1e-4)


def test_loreft_in_an_encoder_decoder() -> None:
    net, ids = ready("loreft", "t5"), text(batch=2)
    torch.testing.assert_close(generate(net, ids)[1], generate(net, ids, use_cache=False)[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_switched_off_generation_is_the_bases(name: str) -> None:
    net, method, ids = fresh("llama"), make(name, "llama"), text()
    method.apply(net)
    perturb(net, scale=0.5)
    base = fresh("llama")
    with method.enabled(net, False):
        assert torch.equal(generate(net, ids)[1], generate(base, ids)[1])


def test_two_turns_on_one_cache() -> None:
    """A second piece of text behind a cache meets the prompt once."""
    for name in ("prompt_tuning", "prefix_tuning"):
        net, ids = ready(name, "llama"), text(7)
        with torch.no_grad():
            whole = net(input_ids=ids).logits
            first = net(input_ids=ids[:, :4], use_cache=True)
            second = net(input_ids=ids[:, 4:], past_key_values=first.past_key_values)
        torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole, atol=1e-5, rtol=1e-5)
