"""In-context learning: a prompt of examples in front of the text, and no training at all. Brown et al. 2020."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_peft.core.embedding import check_length
from lightning_peft.tasks.batches import IGNORE, pad
from lightning_peft.tasks.data import Example, TextData
from lightning_peft.tasks.task import Batch, Classification
from lightning_peft.tasks.tokens import Tokenizer

TEMPLATE = "{text}\nLabel: {label}"


class InContext(Classification):
    """class of a text = argmax_c log p(label_c | instruction, k examples, text): no trained parameter

    The score of a label is the sum of the log-probabilities of all its tokens, or their mean with `normalise`. With
    `calibrate` the mean probabilities of the labels for texts without content (`empty`) are divided out (Zhao et al.
    2021, arXiv 2102.09690). An encoder-decoder reads the prompt in its encoder.

    data: where the examples are chosen, from the training split, `shots` of them by `seed`, as many of each class as
    can be, in an order by `seed`; it gives the names of the classes too. template: of an example, ending in {label};
    what a text is followed by, and the space in front of a label, are tokenised the same way in the examples and in the
    question. words: what to write for each class, default its name. max_length: of prompt and label; where it is
    exceeded the first examples are left out whole, then the end of the text. Run it with
    `trainer.test(task, task.batches(data, "test"))`, or `lightning-peft train experiment=in_context`; metrics as in
    text classification.
    """

    learns = False

    def __init__(
        self,
        model: nn.Module,
        data: TextData,
        tokenizer: Tokenizer | None = None,
        shots: int = 8,
        seed: int = 0,
        template: str = TEMPLATE,
        separator: str = "\n\n",
        instruction: str = "",
        words: Sequence[str] | None = None,
        normalise: bool = False,
        calibrate: bool = False,
        empty: Sequence[str] = ("N/A", "[MASK]", ""),
        max_length: int = 512,
    ) -> None:
        super().__init__(model, data.num_classes, classes=data.classes)
        if not template.endswith("{label}") or template.count("{text}") != 1 or template.count("{label}") != 1:
            raise ValueError(f"template={template!r} must hold {{text}} once and end in {{label}}.")
        self.words = list(data.classes if words is None else words)
        if len(set(self.words)) != data.num_classes or shots < 0:
            raise ValueError(f"words={self.words}, shots={shots}: {data.num_classes} different words, 0 shots or more.")
        if not getattr(model, "can_generate", lambda: True)():  # a transformers model that does not write
            raise ValueError(no_language_model(model))
        self.tokenizer, self.max_length = tokenizer or data.tokenizer, max_length
        self.normalise, self.calibrate, self.empty = normalise, calibrate, list(empty)
        before, _, behind = template.removesuffix("{label}").partition("{text}")
        self.before, self.behind = self.ids(before), self.ids(behind.rstrip() or behind)
        space = behind[len(behind.rstrip()) :] if behind.strip() else ""
        self.labels = [self.ids(space + word) for word in self.words]
        self.separator, self.head = (
            self.ids(separator),
            self.begin() + (self.ids(instruction + separator) if instruction else []),
        )
        self.examples = choose(data.splits["train"], data.classes, shots, seed)
        self.shots = [self.example(example, data.classes) for example in self.examples]
        self.bias: Tensor | None = None
        plain = {"shots": shots, "seed": seed, "template": template, "instruction": instruction, "words": self.words}
        more = {"normalise": normalise, "calibrate": calibrate, "examples": [tuple(e) for e in self.examples]}
        self.save_hyperparameters({**plain, **more})

    # ------------------------------------------------------------------ the prompt
    def ids(self, text: str) -> list[int]:
        """Without begin and end."""
        return list(self.tokenizer([text], add_special_tokens=False)["input_ids"][0]) if text else []

    def begin(self) -> list[int]:
        """What the tokeniser puts in front of a text."""
        first = list(self.tokenizer([""])["input_ids"][0])[:1]
        return first if first and first[0] == self.tokenizer.bos_token_id else []

    def example(self, example: Example, classes: list[str]) -> list[int]:
        """An example with its label and the separator."""
        label = self.labels[classes.index(example.label)]
        return [*self.before, *self.ids(example.text), *self.behind, *label, *self.separator]

    def prompt(self, text: str) -> list[int]:
        """instruction, the examples that there is room for, and the question."""
        ids, shots = self.ids(text), list(self.shots)
        fixed = len(self.head) + len(self.before) + len(self.behind) + max(map(len, self.labels))
        if fixed >= self.max_length:
            raise ValueError(f"max_length={self.max_length} has no room for a text: {fixed} tokens stand around it.")
        while shots and fixed + sum(map(len, shots)) + len(ids) > self.max_length:
            shots.pop(0)
        room = self.max_length - fixed - sum(map(len, shots))
        return [*self.head, *(i for shot in shots for i in shot), *self.before, *ids[:room], *self.behind]

    # ------------------------------------------------------------------ the scores
    @torch.no_grad()
    def scores(self, texts: Sequence[str]) -> Tensor:
        """(texts, classes): log p(label | prompt), calibrated if asked."""
        raw = self.raw(texts)
        if not self.calibrate:
            return raw
        if self.bias is None:
            self.bias = self.raw(self.empty).softmax(-1).mean(0).log()
        return raw.log_softmax(-1) - self.bias.to(raw.device)

    def raw(self, texts: Sequence[str]) -> Tensor:
        prompts = [prompt for prompt in map(self.prompt, texts) for _ in self.labels]
        labels = self.labels * len(texts)
        score = (
            self.seq2seq if getattr(getattr(self.model, "config", None), "is_encoder_decoder", False) else self.causal
        )
        logp, target = score(prompts, labels)
        if logp.shape[:-1] != target.shape:
            raise ValueError(no_language_model(self.model))
        counted = target != IGNORE
        picked = logp.float().log_softmax(-1).gather(-1, target.clamp(min=0)[..., None])[..., 0] * counted
        total = picked.sum(1)
        return (total / counted.sum(1) if self.normalise else total).view(len(texts), -1)

    def causal(self, prompts: list[list[int]], labels: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Padded on the right: no position and no token is another than without padding."""
        rows = [p + label for p, label in zip(prompts, labels, strict=True)]
        target = [[IGNORE] * len(p) + label for p, label in zip(prompts, labels, strict=True)]
        logits = self(**self.padded(rows))
        return logits[:, :-1], pad(target, IGNORE).to(logits.device)[:, 1:]

    def seq2seq(self, prompts: list[list[int]], labels: list[list[int]]) -> tuple[Tensor, Tensor]:
        target = pad(labels, IGNORE).to(self.device)
        return self(**self.padded(prompts), labels=target), target

    def padded(self, rows: list[list[int]]) -> dict[str, Tensor]:
        check_length(self.model, max(map(len, rows)))
        ids, mask = pad(rows, self.tokenizer.pad_token_id or 0), pad([[1] * len(row) for row in rows], 0)
        return {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}

    # ------------------------------------------------------------------ as a task
    @override
    def logits(self, batch: Batch) -> Tensor:
        """{"text": strings} -> (batch, classes)"""
        return self.scores(cast(dict[str, Any], batch)["text"])

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        raise RuntimeError("InContext trains nothing: use trainer.validate, trainer.test or trainer.predict.")

    def batches(self, data: TextData, split: str = "test", batch_size: int | None = None) -> DataLoader[Any]:
        """The texts of a split with their labels."""
        number = {name: index for index, name in enumerate(data.classes)}
        rows = [(example.text, number[example.label]) for example in data.splits[split]]
        return DataLoader(rows, batch_size=batch_size or data.batch_size, collate_fn=collate)  # type: ignore[arg-type]


def no_language_model(model: nn.Module) -> str:
    return (
        f"InContext scores what a language model writes, and {type(model).__name__} is none. Use a causal language "
        "model or an encoder-decoder: model=hf model.name=gpt2, or model.task=seq2seq with a T5."
    )


def collate(rows: list[tuple[str, int]]) -> dict[str, Any]:
    """Rows -> {"text": strings, "labels": (batch,)}"""
    return {"text": [text for text, _ in rows], "labels": torch.tensor([label for _, label in rows])}


def choose(examples: Sequence[Example], classes: list[str], shots: int, seed: int) -> list[Example]:
    """As many examples of each class as can be, drawn and ordered by the seed alone."""
    if shots > len(examples):
        raise ValueError(f"shots={shots} of {len(examples)} training examples; take fewer.")
    generator = torch.Generator().manual_seed(seed)
    order = [examples[i] for i in torch.randperm(len(examples), generator=generator)]
    groups = [[example for example in order if example.label == name] for name in classes]
    longest = max(map(len, groups), default=0)
    turns = [group[i] for i in range(longest) for group in groups if i < len(group)][:shots]
    return [turns[i] for i in torch.randperm(len(turns), generator=generator)]
