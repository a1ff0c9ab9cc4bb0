"""What methods say about themselves against what they do, and the choice that is made of it."""

import dataclasses
import json
import shlex
from typing import Any

import pytest
import torch
import transformers
import zoo
from harness import forward, loss
from hydra.core.override_parser.overrides_parser import OverridesParser
from settings import SETTINGS, UNMERGEABLE, make
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import lightning_peft
from lightning_peft import catalogue, cli
from lightning_peft.choosing import ChooseError, choose, risks
from lightning_peft.choosing.base import Base, command, key_of, kind_of, words_of
from lightning_peft.choosing.candidates import Needs
from lightning_peft.choosing.memory import lean
from lightning_peft.choosing.starts import KINDS, STARTS, Start
from lightning_peft.config import build, compose
from lightning_peft.core import state
from lightning_peft.core.files import save_adapter
from lightning_peft.core.method import REGISTRY
from lightning_peft.core.sites import roles
from lightning_peft.methods.full import FullFineTuning
from lightning_peft.methods.lora import LoRA
from lightning_peft.methods.pissa import PiSSA
from lightning_peft.planning import plan, text_batch

METHODS = sorted(REGISTRY)
BESIDE = [n for n in METHODS if REGISTRY[n].info.batched and REGISTRY[n].info.family != "soft prompt"]
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


def fitting(name: str) -> tuple[str, nn.Module]:
    """The first model of the zoo that the method is meant for."""
    model = {"vpt": "vit", "cross_attention": "t5"}.get(name, "bert")
    return model, zoo.build(model)


def adapted(name: str) -> tuple[str, nn.Module]:
    model, net = fitting(name)
    method = make(name, model)
    if name == "adapterdrop":
        method.n = 0  # with adapters in the last of two blocks alone, there is no base above them
    return model, method.apply(net)


def operations(net: nn.Module, model: str) -> int:
    """Multiplications and additions of a forward pass, those inside attention among them."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        forward(net, model)
    return counter.get_total_flops()


# ------------------------------------------------------------------ declared properties
@pytest.mark.parametrize("name", METHODS)
def test_no_overhead_means_that_it_merges_where_it_is_meant_to(name: str) -> None:
    """What is left of a merged method is nothing: tests/test_contract.py."""
    model, _ = fitting(name)
    merges = REGISTRY[name].info.mergeable and (name, model) not in UNMERGEABLE
    assert (REGISTRY[name].info.overhead == "none") == merges


@pytest.mark.parametrize("name", [*(n for n in METHODS if REGISTRY[n].info.overhead != "none"), "lora", "bitfit"])
def test_overhead_is_what_is_left_after_merging(name: str) -> None:
    model, net = fitting(name)
    before = operations(net, model)
    method = make(name, model)
    method.apply(net)
    if method.info.overhead == "none":
        method.unload(net)
        assert operations(net, model) == before
    else:
        assert operations(net, model) > before


@pytest.mark.parametrize("name", METHODS)
def test_backprop_says_whether_the_backbone_is_in_the_graph(name: str) -> None:
    model, net = adapted(name)
    seen = []
    modules = {id(s.module): s.module for role, found in roles(net).items() if role in PROJECTIONS for s in found}
    for module in modules.values():
        module.register_forward_hook(lambda module, given, out: seen.append(out.requires_grad))
    loss(net, model).backward()
    assert seen
    assert any(seen) == REGISTRY[name].info.backprop


class Only(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.only = nn.Linear(12, 20, bias=False).double()

    def forward(self, x: Any) -> Any:
        return self.only(x)


@pytest.mark.parametrize("name", BESIDE)
def test_changes_that_batch_are_linear_in_each_row(name: str) -> None:
    net, x = Only(), torch.randn(5, 3, 12, dtype=torch.float64)
    before = net(x)
    method = REGISTRY[name](**{**SETTINGS[name], "targets": "only", "heads": None, "dtype": "float64"})
    method.apply(net)
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
        change = net(x) - before
        assert change.abs().max() > 1e-3
        torch.testing.assert_close(net(x[:2] + 2 * x[2:4]) - before[:2] - 2 * before[2:4], change[:2] + 2 * change[2:4])
        torch.testing.assert_close(net(x[3:4]), before[3:4] + change[3:4])


@pytest.mark.parametrize(("name", "least", "most"), [("full", 0.98, 2), ("relora", 0.1, 0.9), ("bitfit", 0, 0.2),
                                                    ("lora", 0, 0.2), ("linear_probe", 0, 0.2)])  # fmt: skip
def test_storage_is_what_a_file_holds(name: str, least: float, most: float, tmp_path: Any) -> None:
    model, net = fitting(name)
    whole = sum(p.numel() * p.element_size() for p in net.parameters())
    make(name, model).apply(net)
    save_adapter(net, tmp_path)
    share = (tmp_path / "adapter.safetensors").stat().st_size / whole
    assert least <= share <= most
    assert (REGISTRY[name].info.storage == "adapter") == (name in ("lora", "linear_probe"))


# ------------------------------------------------------------------ where to begin
WORDS = {
    "classification": ["model=tiny_bert"],
    "causal-lm": ["model=tiny_llama", "data=instructions", "data.path=pairs.jsonl"],
    "image": ["model=tiny_vit", "data=digits"],
}
RUNS = {frozenset(key_of(word) for word in start.run): start for start in STARTS}  # one of each kind of words


@pytest.mark.parametrize("start", STARTS, ids=[f"{s.method}-{i}" for i, s in enumerate(STARTS)])
def test_a_start_says_what_its_words_say(start: Start) -> None:
    parsed = OverridesParser.create().parse_overrides([*words_of(start)])
    given = {o.key_or_group.removeprefix("peft."): o.value() for o in parsed if o.key_or_group.startswith("peft.")}
    joined = {k: ",".join(v) if isinstance(v, list) else v for k, v in given.items()}
    method = REGISTRY[start.method](**start.settings)
    assert REGISTRY[start.method](**joined).config() == method.config()
    rate = next((float(word.partition("=")[2]) for word in start.run if word.startswith("optimizer.lr=")), 1e-3)
    assert risks(method, rate) == []


@pytest.mark.parametrize("start", RUNS.values(), ids=lambda start: start.method)
def test_the_words_of_a_start_compose(start: Start) -> None:
    config = compose([*WORDS[start.kinds[0]], *words_of(start), "run_dir=."])
    assert build(config.peft).info.name == start.method


def test_the_table_of_starts() -> None:
    assert {start.method for start in STARTS} <= set(REGISTRY)
    for kind in KINDS:
        for size in (10**6, 10**10):
            for codes in (False, True):
                fits = [s for s in STARTS if kind in s.kinds and s.size[0] <= size < s.size[1]]
                names = [s.method for s in fits if s.quantised in (None, codes)]
                assert "lora" in names
                assert len(names) == len(set(names))
    for start in STARTS:  # a figure needs a source
        assert start.source or not (start.settings or start.run)


# ------------------------------------------------------------------ the order
def bert(**fields: Any) -> nn.Module:
    with torch.device("meta"):
        return transformers.BertForSequenceClassification(transformers.BertConfig(num_hidden_layers=3, **fields))


def names(**needs: Any) -> list[str]:
    return [c.info.name for c in choose(bert(), top=99, **needs).candidates]


def test_without_needs_comparisons_decide() -> None:
    order = names()
    assert order[0] == "lora"
    expected = ["lora", "houlsby", "mam", "full", "pfeiffer", "bitfit", "ln_tuning", "prompt_tuning"]
    assert sorted(expected, key=order.index) == expected


def test_inference_puts_what_merges_first() -> None:
    order = names(inference=True)
    merged = [REGISTRY[name].info.overhead == "none" for name in order if name not in ("linear_probe", "ln_tuning")]
    assert merged == sorted(merged, reverse=True)


def test_storage_puts_the_smallest_of_equals_first_and_whole_models_last() -> None:
    order = [name for name in names(storage=True) if REGISTRY[name].info.family != "selective"]
    assert order[-1] == "full"
    assert order.index("vera") < order.index("pfeiffer")


def test_a_file_holds_no_more_than_is_said(tmp_path: Any) -> None:
    for candidate in choose(zoo.build("bert"), top=99, methods=["pissa", "lora_fa", "nola", "selective"]).candidates:
        net, name = zoo.build("bert"), candidate.info.name
        REGISTRY[name](**candidate.start.settings).apply(net)
        save_adapter(net, tmp_path / name)
        file = (tmp_path / name / "adapter.safetensors").read_bytes()
        body = len(file) - 8 - int.from_bytes(file[:8], "little")
        assert body <= candidate.bytes or name in ("diff_pruning", "lt_sft")  # which choose in a run
    entries = 0.005 * sum(p.numel() for p in zoo.build("bert").bert.parameters())
    pruned = next(c for c in choose(zoo.build("bert"), top=99).candidates if c.info.name == "diff_pruning")
    assert pruned.bytes == pytest.approx(8 * entries, abs=8 + 4 * 99)  # and the head


def test_what_is_asked_for_is_shown_or_left_out_with_the_reason() -> None:
    chosen = choose(bert(), top=2, methods=["far", "lora", "cross_attention"])
    assert [c.info.name for c in chosen.candidates] == ["lora", "parallel", "far"]
    assert [c.asked for c in chosen.candidates] == [True, False, True]
    assert "no cross-attention" in chosen.left_out["cross_attention"]
    assert "no published settings are known here" in str(chosen)
    assert f"{chosen.ranked - 4} more with --top" in str(chosen)
    tight = choose(bert(), top=1, methods=["ia3"], memory="80GiB", batch=text_batch(8, 128, "classes"), device="cpu")
    assert [c.info.name for c in tight.candidates] == ["lora", "ia3"]
    with pytest.raises(ChooseError, match="'lroa' is no method. Known: .*lora"):
        choose(bert(), methods=["lroa"])


def test_a_rank_that_no_weight_has_is_left_out_before_there_are_weights() -> None:
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=1, hidden_size=64))
    assert "is more than a weight of (64, 64) has" in choose(model, top=99).left_out["pissa"]


def test_many_tasks_put_what_batches_first() -> None:
    assert names(tasks=50)[:2] == ["lora", "ia3"]
    assert names(tasks=50)[-1] == "full"


def test_the_number_of_examples() -> None:
    few, many = names(examples=100), names(examples=10**6)
    assert few.index("bitfit") < few.index("full")
    assert many[0] == "full"


def test_reasons_add_up_and_have_sources() -> None:
    chosen = choose(bert(), inference=True, examples=300, top=99)
    for candidate in chosen.candidates:
        assert candidate.points == sum(r.points for r in candidate.reasons)
        assert candidate.trained == pytest.approx(candidate.share * chosen.parameters)
    first = chosen.candidates[0]
    facts = state.describe(LoRA(**first.start.settings).apply(bert()))
    assert first.trained == facts["trainable"]
    assert f"from: {first.start.source}" in str(chosen)


def test_what_does_not_fit_the_model_is_left_out_with_the_reason() -> None:
    chosen = choose(nn.Sequential(nn.Linear(4, 4)), top=99)
    assert "lora" in chosen.left_out
    assert "No module matches" in chosen.left_out["lora"]
    assert "left out:" in str(chosen)


def test_a_quantised_base() -> None:
    model = zoo.build("llama")
    chosen = choose(model, quantised=True, top=99, inference=True)
    found = {c.info.name: c for c in chosen.candidates}
    assert chosen.needs.quantised
    assert chosen.parameters == sum(p.numel() for p in model.parameters())
    assert {"full", "pissa", "lst"}.isdisjoint(found)
    assert "quantised" in chosen.left_out["full"]
    assert any("merges into floats only" in r.words for r in found["lora"].reasons)
    assert any("merges into its codes" in r.words for r in found["qalora"].reasons)
    assert choose(model, precision="nf4").needs.quantised


def test_kinds() -> None:
    assert [kind_of(zoo.build(name)) for name in ("bert", "llama", "t5", "vit", "mlp")] == [
        "classification", "causal-lm", "causal-lm", "image", "classification",
    ]  # fmt: skip


# ------------------------------------------------------------------ memory
def test_memory_is_the_plans_and_tight_memory_is_said() -> None:
    model, batch = bert(), text_batch(8, 128, "classes")
    free = choose(model, memory="80GiB", batch=batch, device="cpu", top=2)
    assert [c.reasons[-1].words for c in free.candidates] == ["fits"] * 2
    first = free.candidates[0]
    alone = plan(model, first.method, batch=batch, device="cpu").total
    assert first.plan is not None
    assert first.plan.total == alone
    tight = choose(model, memory=alone - 1, batch=batch, device="cpu", top=3)
    best = next(c for c in tight.candidates if c.info.name == first.info.name)
    assert best.plan is not None
    assert best.plan.total < alone
    assert "gradient_checkpointing=true" in best.command
    assert best.points == first.points - 1


def test_what_fits_nowhere_is_left_out_with_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    few = ("lora", "dora", "houlsby", "full", "linear_probe")
    monkeypatch.setattr("lightning_peft.choosing.base.STARTS", [s for s in STARTS if s.method in few])
    chosen = choose(zoo.build("bert"), memory=1000, batch=text_batch(8, 16, "classes"), device="cpu", top=1)
    assert chosen.candidates == ()
    assert chosen.left_out["lora"].startswith("needs ")
    assert chosen.left_out["linear_probe"].startswith("needs ")
    assert chosen.left_out["full"].startswith("needs ")
    assert "not planned" in chosen.left_out["dora"]


def test_side_networks_gain_where_memory_is_tight() -> None:
    candidate = next(Base(bert(), "classification", Needs()).candidates())
    side = dataclasses.replace(candidate, info=REGISTRY["lst"].info)
    assert lean(candidate) == candidate
    assert lean(lean(side)).points == side.points + 3


# ------------------------------------------------------------------ risks
@pytest.mark.parametrize(
    ("method", "lr", "examples", "words"),
    [
        (LoRA(rank=256, alpha=512), 1e-3, None, "diverge"),
        (LoRA(rank=256, alpha=16), 1e-3, None, "2312.03732"),
        (FullFineTuning(), 1e-3, None, "forgotten"),
        (PiSSA(dropout=0.1), 2e-5, None, "principal"),
        (LoRA(dropout=0.5), 1e-4, None, "little is left"),
        (LoRA(rank=64, alpha=64), 1e-4, 200, "200 examples"),
        (FullFineTuning(), 1e-5, 200, "by heart"),
    ],
)
def test_risky(method: Any, lr: float, examples: int | None, words: str) -> None:
    (line,) = risks(method, lr, examples)
    assert words in line


def test_not_risky() -> None:
    assert risks(LoRA(rank=256, alpha=512), 1e-5) == []
    assert risks(LoRA(rank=256, alpha=512)) == []
    assert risks(LoRA(rank=256, alpha=16, rslora=True), 1e-3) == []
    assert risks(LoRA(), 1e-3, 10) == []


# ------------------------------------------------------------------ the command
@pytest.fixture
def here(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command_prints_a_command_that_composes(here: Any, capsys: Any) -> None:
    argv = ["choose", "model=tiny_bert", "peft=lora", "peft.rank=256", "peft.alpha=1024", "optimizer.lr=0.01"]
    assert cli.main([*argv, "--examples", "300", "--inference", "--top", "2", "--json", "found.json"]) == 0
    text = capsys.readouterr().out
    found = json.loads((here / "found.json").read_text())
    assert "risky: rank=256" in text
    assert [found["candidates"][0]["method"]] == [text.split("1. ")[1].split()[0]]
    for candidate in found["candidates"]:
        words = shlex.split(candidate["command"])
        assert words[:3] == ["lightning-peft", "train", "model=tiny_bert"]
        assert words.count("optimizer.lr=0.01") == 1
        config = compose([*words[2:], "run_dir=."])
        assert config.optimizer.lr == 0.01  # the user's own word stands
        assert build(config.peft).info.name == candidate["method"]


def test_a_start_leaves_the_optimizer_and_the_scheduler_to_the_user() -> None:
    lora = next(start for start in STARTS if start.method == "lora" and "classification" in start.kinds)
    ia3 = next(start for start in STARTS if start.method == "ia3")
    said = {
        "optimizer=adam": ["optimizer.lr=", "scheduler"],
        "optimizer=sgd": ["scheduler"],
        "scheduler=constant": ["optimizer.lr=", "optimizer.weight_decay="],
    }
    for mine, kept in said.items():
        words = shlex.split(command(words_of(lora), ["model=tiny_bert", mine]))[2:]
        rest = [each for each in words if each.startswith(("optimizer.", "scheduler.", "scheduler=linear"))]
        assert {each.partition("=")[0] for each in rest} <= {k.rstrip("=") for k in kept} | {"scheduler.warmup"}
        assert all(any(each.startswith(k) for each in rest) for k in kept)
        compose([*words, "run_dir=."])
    assert "optimizer.lr" not in command(words_of(ia3), ["optimizer=adamw"])  # a rate for Adafactor


def test_a_method_that_needs_other_codes_says_so() -> None:
    qalora = next(start for start in STARTS if start.method == "qalora")
    words = shlex.split(command(words_of(qalora), ["model=tiny_llama", "precision=nf4"]))
    assert [word for word in words if word.startswith("precision=")] == ["precision=int4"]
    given: dict[str, Any] = {"quantised": True, "batch": text_batch(2, 8), "device": "cpu", "precision": "nf4"}
    widths = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 1}
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**widths, vocab_size=64))
    chosen = choose(model, memory="1GiB", methods=["qalora"], top=1, **given)
    assert [c.plan and c.plan.precision for c in chosen.candidates] == ["nf4", "int4"]


def test_a_list_of_methods_is_looked_at_one_by_one(here: Any, capsys: Any) -> None:
    rank = ["peft.dora.rank=256", "peft.dora.alpha=512"]
    assert cli.main(["choose", "model=tiny_bert", "peft=[bitfit,dora]", *rank, "optimizer.lr=0.01", "--top", "1"]) == 0
    assert capsys.readouterr().out.count("risky: rank=256") == 1


def test_the_command_as_json_alone_with_memory_and_codes(here: Any, capsys: Any) -> None:
    argv = ["choose", "model=tiny_llama", "data=instructions", "--quantised", "--memory", "2GB", "--device", "cpu"]
    assert cli.main([*argv, "--top", "1", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["needs"]["quantised"]
    assert found["candidates"][0]["plan"]["total"] < 2 * 10**9
    assert "precision=nf4" in found["candidates"][0]["command"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--multirun"], "one model"),
        (["--memory", "lots"], "no size"),
        (["--examples", "0"], "number of examples"),
        (["--tasks", "0"], "number of tasks"),
        (["--top", "0"], "number of candidates"),
        (["--memory=-3GiB"], "no size"),
        (["--json", "nowhere/x.json"], "no folder"),
    ],
)
def test_errors_of_the_command(argv: list[str], words: str, here: Any, capsys: Any) -> None:
    assert cli.main(["choose", "model=tiny_bert", *argv]) == 1
    assert words in capsys.readouterr().err


def test_errors() -> None:
    with pytest.raises(ChooseError, match="needs batch"):
        choose(bert(), memory="8GB")
    with pytest.raises(ChooseError, match="kind='speech'. Known: classification"):
        choose(bert(), kind="speech")  # type: ignore[arg-type]
    with pytest.raises(ChooseError, match="no parameters yet"):
        choose(nn.Sequential())
    with pytest.raises(ChooseError, match="cannot be quantised"):
        choose(nn.Sequential(nn.Conv2d(3, 3, 3)), quantised=True)
    assert lightning_peft.choose is choose


def test_the_registry_shows_what_methods_cost(capsys: Any) -> None:
    assert cli.main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[4:8] == ["overhead", "backprop", "storage", "batched"]
    shown = {line.split()[0]: line.split()[-5:] for line in lines if line.startswith(("lst ", "full "))}
    assert shown["lst"] == ["products", "no", "adapter", "no", "2206.06522"]
    assert shown["full"][-4:] == ["none", "yes", "model", "no"]
    assert list(catalogue.properties(REGISTRY["lora"]).values()) == ["lora", "yes", "none", "yes", "adapter", "yes"]
