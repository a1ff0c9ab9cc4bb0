"""Tiny random models of every family (hidden 32, 4 heads), and full-size ones on the meta device.

`build("bert")` is deterministic (its own seed, the global generator is left as it was); `inputs("bert")` are
keyword arguments for its forward, text with one padded row. `meta("bert-base")` costs no memory.
"""

import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

HIDDEN, HEADS, INNER, VOCAB, LENGTH = 32, 4, 64, 100, 64
CLASSES = 3
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDTHS = {"hidden_size": HIDDEN, "num_attention_heads": HEADS, "num_hidden_layers": 2, "intermediate_size": INNER}
TEXT = {**WIDTHS, **TOKENS, "vocab_size": VOCAB, "max_position_embeddings": LENGTH}
CLASSIFY = {"num_labels": CLASSES}
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
IMAGE = {**WIDTHS, **QUIET, "image_size": 16, "patch_size": 8, "num_channels": 3}
PATCHES = 4
NEOX = {"rotary_pct": 0.5, "attention_dropout": 0.0, "hidden_dropout": 0.0}
GPT2 = {"n_embd": HIDDEN, "n_head": HEADS, "n_layer": 2, "n_positions": LENGTH, "vocab_size": VOCAB}
GPT2_QUIET = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
ENCODER_DECODER = {
    "d_model": HIDDEN, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": HEADS,
    "decoder_attention_heads": 2, "encoder_ffn_dim": INNER, "decoder_ffn_dim": INNER, "vocab_size": VOCAB,
    "dropout": 0.0, **TOKENS, "decoder_start_token_id": 2,
}  # fmt: skip
T5 = {"d_model": HIDDEN, "d_kv": 12, "d_ff": INNER, "num_layers": 2, "num_decoder_layers": 3, "num_heads": HEADS}
T5_REST = {"vocab_size": VOCAB, "dropout_rate": 0.0, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}


class Attention(nn.Module):
    """timm's attention: one packed `qkv`, `proj`, and norms on queries and keys that are Identity by default."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:  # (batch, time, width) -> (batch, time, width)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj(y.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """timm's feed-forward layer."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """timm's pre-norm block."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width), Mlp(width, inner)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """timm's patch embedding: an image in non-overlapping squares."""

    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)

    def forward(self, x: Tensor) -> Tensor:  # (batch, 3, height, width) -> (batch, patches, width)
        return self.proj(x).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """timm's names and shapes, in plain torch."""

    def __init__(self, width: int = HIDDEN, heads: int = HEADS, depth: int = 2) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(width, 8)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, PATCHES + 1, width) * 0.02)
        self.blocks = nn.Sequential(*[Block(width, heads, 2 * width) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:  # (batch, 3, 16, 16) -> (batch, classes)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), self.patch_embed(x)], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


class Encoder(nn.Module):
    """A text classifier on `nn.TransformerEncoder`, averaged over the tokens that are not padding."""

    def __init__(self, width: int = HIDDEN, heads: int = HEADS, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, width)
        layer = nn.TransformerEncoderLayer(width, heads, INNER, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.classifier = nn.Linear(width, CLASSES)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:  # (batch, time), (batch, time) -> (batch, classes)
        x = self.encoder(self.embed(tokens), src_key_padding_mask=mask == 0)
        return self.classifier((x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


class Translator(nn.Module):
    """`nn.Transformer` (encoder and decoder) with one embedding and a generator."""

    def __init__(self, width: int = HIDDEN, heads: int = HEADS) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, width)
        self.transformer = nn.Transformer(width, heads, 2, 3, INNER, dropout=0.0, batch_first=True)
        self.generator = nn.Linear(width, VOCAB)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:  # (batch, time) twice -> (batch, time, vocabulary)
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        return self.generator(self.transformer(self.embed(source), self.embed(target), tgt_mask=mask))


class MLP(nn.Module):
    """A plain module whose child names are those that adapters trip over."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh())
        self.mlp = nn.Linear(16, 16)
        self.lora = nn.Linear(16, 16, bias=False)
        self.out = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:  # (batch, 8) -> (batch, classes)
        return self.out(torch.tanh(self.lora(torch.tanh(self.mlp(self.body(x))))))


class Mixer(nn.Module):
    """A transformer whose names no table knows, for the structural fallback."""

    class Layer(nn.Module):
        """One block: mixing (three projections and their output), then a gated feed-forward."""

        def __init__(self, width: int, heads: int) -> None:
            super().__init__()
            self.pre, self.mid = nn.LayerNorm(width), nn.LayerNorm(width)
            self.mix = Mixer.Mix(width, heads)
            self.wide, self.act, self.narrow = nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.mix(self.pre(x))
            return x + self.narrow(self.act(self.wide(self.mid(x))))

    class Mix(nn.Module):
        """Attention under other names."""

        def __init__(self, width: int, heads: int) -> None:
            super().__init__()
            self.num_heads = heads
            self.ask, self.find, self.tell = (nn.Linear(width, width) for _ in range(3))
            self.say = nn.Linear(width, width)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (
                p(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for p in (self.ask, self.find, self.tell)
            )
            return self.say(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def __init__(self, width: int = HIDDEN, heads: int = HEADS, depth: int = 2) -> None:
        super().__init__()
        self.steps = nn.ModuleList(Mixer.Layer(width, heads) for _ in range(depth))
        self.last = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:  # (batch, time, width) -> (batch, classes)
        for step in self.steps:
            x = step(x)
        return self.last(x.mean(1))


def _hf(model: str, config: str, **fields: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(hf, model)(getattr(hf, config)(**fields))


def _decoder(family: str, task: str = "ForCausalLM", **fields: Any) -> Callable[[], nn.Module]:
    return _hf(family + task, family + "Config", **{**TEXT, "num_key_value_heads": 2, **fields})


def _clip() -> nn.Module:
    text = {**TEXT, "projection_dim": HIDDEN}
    vision = {**{k: v for k, v in IMAGE.items() if not k.endswith("prob")}, "num_hidden_layers": 3}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=HIDDEN))


ZOO: dict[str, Callable[[], nn.Module]] = {
    "bert": _hf("BertForSequenceClassification", "BertConfig", **TEXT, **QUIET, **CLASSIFY),
    "bert_mlm": _hf("BertForMaskedLM", "BertConfig", **TEXT, **QUIET),
    "roberta": _hf("RobertaForSequenceClassification", "RobertaConfig", **TEXT, **QUIET, **CLASSIFY),
    "electra": _hf("ElectraForSequenceClassification", "ElectraConfig", **TEXT, **QUIET, **CLASSIFY, embedding_size=16),
    "distilbert": _hf(
        "DistilBertForSequenceClassification", "DistilBertConfig", vocab_size=VOCAB, max_position_embeddings=LENGTH,
        dim=HIDDEN, n_heads=HEADS, n_layers=2, hidden_dim=INNER, dropout=0.0, attention_dropout=0.0, **CLASSIFY,
    ),
    "albert": _hf(
        "AlbertForSequenceClassification", "AlbertConfig", **{**TEXT, "num_hidden_layers": 4}, **QUIET, **CLASSIFY,
        embedding_size=16, num_hidden_groups=2, inner_group_num=1, classifier_dropout_prob=0.0,
    ),
    "deberta": _hf(
        "DebertaV2ForSequenceClassification", "DebertaV2Config", **TEXT, **QUIET, **CLASSIFY, relative_attention=True,
        pos_att_type=["p2c", "c2p"], position_buckets=8, pooler_hidden_size=HIDDEN, position_biased_input=False,
    ),
    "modernbert": _hf(
        "ModernBertForSequenceClassification", "ModernBertConfig", **TEXT, **CLASSIFY, cls_token_id=1, sep_token_id=2,
    ),
    "gpt2": _hf("GPT2LMHeadModel", "GPT2Config", **GPT2, **GPT2_QUIET, **TOKENS),
    "gpt2_cross": _hf("GPT2LMHeadModel", "GPT2Config", **GPT2, **GPT2_QUIET, **TOKENS, add_cross_attention=True),
    "gpt_neo": _hf(
        "GPTNeoForCausalLM", "GPTNeoConfig", hidden_size=HIDDEN, num_layers=2, num_heads=HEADS, intermediate_size=INNER,
        attention_types=[[["global", "local"], 1]], vocab_size=VOCAB, max_position_embeddings=LENGTH, **TOKENS,
    ),
    "gptj": _hf("GPTJForCausalLM", "GPTJConfig", **GPT2, **GPT2_QUIET, **TOKENS, rotary_dim=4),
    "gpt_neox": _hf("GPTNeoXForCausalLM", "GPTNeoXConfig", **TEXT, **NEOX),
    "bloom": _hf(
        "BloomForCausalLM", "BloomConfig", hidden_size=HIDDEN, n_head=HEADS, n_layer=2, vocab_size=VOCAB, **TOKENS,
    ),
    "llama": _decoder("Llama"),
    "llama_cls": _decoder("Llama", "ForSequenceClassification", **CLASSIFY),
    "mistral": _decoder("Mistral"),
    "qwen2": _decoder("Qwen2"),
    "qwen3": _decoder("Qwen3", head_dim=16),
    "gemma": _decoder("Gemma", head_dim=8),
    "gemma2": _decoder("Gemma2", head_dim=8),
    "phi3": _decoder("Phi3"),
    "opt": _hf(
        "OPTForCausalLM", "OPTConfig", hidden_size=HIDDEN, ffn_dim=INNER, num_hidden_layers=2,
        num_attention_heads=HEADS, vocab_size=VOCAB, max_position_embeddings=LENGTH, word_embed_proj_dim=HIDDEN,
        dropout=0.0, **TOKENS,
    ),
    "bart": _hf("BartForConditionalGeneration", "BartConfig", **ENCODER_DECODER, max_position_embeddings=LENGTH),
    "bart_cls": _hf("BartForSequenceClassification", "BartConfig", **ENCODER_DECODER, max_position_embeddings=LENGTH),
    "whisper": _hf(
        "WhisperForConditionalGeneration", "WhisperConfig", **ENCODER_DECODER, num_mel_bins=8, max_source_positions=16,
        max_target_positions=LENGTH,
    ),
    "t5": _hf("T5ForConditionalGeneration", "T5Config", **T5, **T5_REST),
    "t5_gated": _hf("T5ForConditionalGeneration", "T5Config", **T5, **T5_REST, feed_forward_proj="gated-gelu"),
    "vit": _hf("ViTForImageClassification", "ViTConfig", **IMAGE, **CLASSIFY),
    "clip": _clip,
    "timm_vit": VisionTransformer,
    "encoder": Encoder,
    "transformer": Translator,
    "mlp": MLP,
    "mixer": Mixer,
}  # fmt: skip

DECODERS = {"bart", "bart_cls", "whisper", "t5", "t5_gated"}


def build(name: str) -> nn.Module:
    """The tiny model `name` in eval mode, with the same weights each time; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(name.encode()))
        return ZOO[name]().eval()


def _text(generator: torch.Generator, batch: int, length: int) -> dict[str, Tensor]:
    tokens = torch.randint(3, VOCAB, (batch, length), generator=generator)
    mask = torch.ones(batch, length, dtype=torch.long)
    if batch > 1 and length > 2:
        tokens[-1, -2:], mask[-1, -2:] = 0, 0
    return {"input_ids": tokens, "attention_mask": mask}


def inputs(name: str, batch: int = 2, length: int = 7) -> dict[str, Tensor]:
    """Keyword arguments for the forward of `build(name)`; the last row of a text batch ends in two pad tokens."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + 1)
    text = _text(generator, batch, length)
    draw = partial(torch.randn, generator=generator)
    special: dict[str, Callable[[], dict[str, Tensor]]] = {
        "vit": lambda: {"pixel_values": draw(batch, 3, 16, 16)},
        "timm_vit": lambda: {"x": draw(batch, 3, 16, 16)},
        "clip": lambda: {**text, "pixel_values": draw(batch, 3, 16, 16)},
        "whisper": lambda: {"input_features": draw(batch, 8, 32)},
        "encoder": lambda: {"tokens": text["input_ids"], "mask": text["attention_mask"]},
        "transformer": lambda: {"source": text["input_ids"], "target": text["input_ids"]},
        "mlp": lambda: {"x": draw(batch, 8)},
        "mixer": lambda: {"x": draw(batch, length, HIDDEN)},
    }
    out = special.get(name, lambda: text)()
    if name in DECODERS and name != "bart_cls":
        out["decoder_input_ids"] = torch.randint(3, VOCAB, (batch, 5), generator=generator)
    if name == "bart_cls":
        out["input_ids"][torch.arange(batch), out["attention_mask"].sum(1) - 1] = TOKENS["eos_token_id"]
    if name == "gpt2_cross":
        out["encoder_hidden_states"] = draw(batch, 4, HIDDEN)
    return out


LARGE = {"hidden_size": 1024, "num_attention_heads": 16, "num_hidden_layers": 24, "intermediate_size": 4096}
ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "pad_token_id": 1}
META: dict[str, Callable[[], nn.Module]] = {
    "bert-base": _hf("BertModel", "BertConfig"),
    "bert-large": _hf("BertModel", "BertConfig", **LARGE),
    "roberta-base": _hf("RobertaModel", "RobertaConfig", **ROBERTA),
    "roberta-large": _hf("RobertaModel", "RobertaConfig", **ROBERTA, **LARGE),
    "gpt2": _hf("GPT2LMHeadModel", "GPT2Config"),
    "gpt2-medium": _hf("GPT2LMHeadModel", "GPT2Config", n_embd=1024, n_head=16, n_layer=24),
    "t5-base": _hf(
        "T5ForConditionalGeneration", "T5Config", d_model=768, d_ff=3072, num_layers=12, num_heads=12, d_kv=64,
        vocab_size=32128,
    ),
    "llama-7b": _hf("LlamaForCausalLM", "LlamaConfig"),
    "vit-b": _hf("ViTModel", "ViTConfig"),
}  # fmt: skip


def meta(name: str) -> nn.Module:
    """The full-size model `name` on the meta device: real shapes, no memory."""
    with torch.device("meta"):
        return META[name]()
