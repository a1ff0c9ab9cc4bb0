"""Optimizers of bitsandbytes: AdamW's own path, exact resume, refusals, pages that come back, and what state costs."""

from __future__ import annotations

import io
import logging
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boring
import optim_run
import pytest
import torch
from lightning.fabric.utilities.optimizer import _optimizer_to_device
from lightning.pytorch.callbacks import ModelCheckpoint
from optim_run import Task, fit, lora
from torch import Tensor, nn

from lightning_peft import LoRA, cli, load_checkpoint, optim
from lightning_peft.checkpoint import CheckpointError
from lightning_peft.checks import ConfigError
from lightning_peft.config import build, compose, options
from lightning_peft.core import state
from lightning_peft.tasks.optimisation import parameter_groups

bnb = pytest.importorskip("bitsandbytes")

OURS = ("paged_adamw", "paged_adamw_8bit", "adamw_8bit")
RESUME = pytest.mark.filterwarnings("ignore:.*(ckpt_path|Checkpoint directory|You're resuming).*")
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def parameters(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in shapes]


def steps(optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    """Gradients that depend on the number of the step only."""
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for p in (p for group in optimizer.param_groups for p in group["params"] if p.requires_grad):
            p.grad = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
        optimizer.step()


def distance(a: list[nn.Parameter], b: list[nn.Parameter]) -> float:
    return max((x.double() - y.double()).abs().max().item() for x, y in zip(a, b, strict=True))


def through_a_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# ------------------------------------------------------------------ the arithmetic
@pytest.mark.parametrize(("name", "near", "far"), [("paged_adamw", 1e-6, 0), *[(n, 2e-2, 1e-5) for n in OURS[1:]]])
def test_twenty_steps_are_those_of_torch(name: str, near: float, far: float) -> None:
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}
    ends = []
    for make in (torch.optim.AdamW, getattr(optim, name)):
        own = parameters((96, 64), (33,), (5000,))
        steps(
            make([{"params": own[:1]}, {"params": own[1:], "weight_decay": 0.1}], weight_decay=0.3, **settings), 0, 20
        )
        ends.append(own)
    assert far <= distance(*ends) < near
    assert distance(ends[0], parameters((96, 64), (33,), (5000,))) > 5 * near  # so that a slower path would be seen


def test_eight_bits_are_for_large_tensors_and_only_where_asked() -> None:
    for name in OURS:
        own = parameters((4096,), (4095,))
        optimizer = getattr(optim, name)(own)
        steps(optimizer, 0, 1)
        kinds = [optimizer.state[p]["state1"].dtype for p in own]
        assert kinds == [torch.float32 if name == "paged_adamw" else torch.uint8, torch.float32]


def test_what_does_not_train_is_passed_over() -> None:
    own = parameters((8, 8), (8, 8))
    own[0].requires_grad_(False)
    optimizer = optim.paged_adamw(iter(own), lr=0.1)
    steps(optimizer, 0, 2)
    assert distance(own[:1], parameters((8, 8))) == 0
    assert list(optimizer.state) == own[1:]


@RESUME
def test_clipping_accumulation_and_schedule_as_with_torch(tmp_path: Path) -> None:
    class Torch(Task):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    ends = []
    for make, more in ((Torch, {}), (Task, {}), (Task, {"gradient_clip_val": None}), (Task, {"max_epochs": 1})):
        torch.manual_seed(3)
        module = make(optimizer="paged_adamw")
        trainer = fit(tmp_path, module, lora(), **more)
        ends.append(boring.tensors(module))
        assert trainer.optimizers[0].param_groups[0]["lr"] == 1e-2 * 0.5 ** (trainer.global_step // 3)
    assert trainer.global_step == 5
    assert boring.largest_difference(ends[0], ends[1]) < 1e-5
    assert min(boring.largest_difference(ends[0], end) for end in ends[2:]) > 1e-4


# ------------------------------------------------------------------ resume
@RESUME
@pytest.mark.parametrize("name", OURS)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(name: str, tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    straight = Task(optimizer=name)
    fit(tmp_path, straight, lora(), saver)
    saved = torch.load(tmp_path / "step=3.ckpt", weights_only=True)["optimizer_states"][0]["state"]
    assert set(saved) == set(state.trainable(straight))
    for step in (3, 5, 8):  # in the first epoch, at its end, in the second
        torch.manual_seed(99)
        resumed = Task(optimizer=name)
        trainer = fit(tmp_path, resumed, lora(), ckpt=str(tmp_path / f"step={step}.ckpt"))
        assert trainer.global_step == 10
        assert boring.largest_difference(boring.tensors(straight), boring.tensors(resumed)) == 0
        assert straight.losses[-len(resumed.losses) :] == resumed.losses
    kinds = {own["state1"].dtype for own in trainer.optimizers[0].state.values()}
    assert kinds == ({torch.float32} if name == "paged_adamw" else {torch.float32, torch.uint8})


@RESUME
def test_resume_without_a_method(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    straight, resumed = (Task(optimizer="paged_adamw_8bit", dropout=0.0) for _ in range(2))
    loaders = boring.data(shuffle=False), boring.data(6, shuffle=False)
    boring.trainer(tmp_path, [saver], max_epochs=2).fit(straight, *loaders)
    boring.trainer(tmp_path, max_epochs=2).fit(resumed, *loaders, ckpt_path=str(tmp_path / "epoch=0.ckpt"))
    assert boring.largest_difference(boring.tensors(straight), boring.tensors(resumed)) == 0


@pytest.mark.slow
def test_resume_on_two_processes(tmp_path: Path) -> None:
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, optim_run.__file__, str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert boring.largest_difference(*first) == boring.largest_difference(*second) == 0
    assert boring.largest_difference(first[0], second[0]) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OURS)
def test_a_state_dict_alone_is_enough(name: str, dtype: torch.dtype) -> None:
    shapes = ((64, 65), (7,), (5000,))
    straight, halted = parameters(*shapes, dtype=dtype), parameters(*shapes, dtype=dtype)
    steps(getattr(optim, name)(straight), 0, 6)
    optimizer = getattr(optim, name)(halted)
    steps(optimizer, 0, 3)
    saved = through_a_file(optimizer.state_dict())
    resumed = getattr(optim, name)(halted)
    resumed.load_state_dict(saved)
    steps(resumed, 3, 6)
    assert distance(straight, halted) == 0
    assert {own["state1"].dtype for own in resumed.state.values()} <= {torch.float32, torch.uint8}


# ------------------------------------------------------------------ what must not pass silently
@RESUME
def test_a_state_of_torch_and_one_of_bitsandbytes_are_not_mistaken_for_each_other(tmp_path: Path) -> None:
    fit(tmp_path, Task(optimizer="adamw_8bit"), lora(), max_epochs=1).save_checkpoint(tmp_path / "theirs.ckpt")
    module = boring.Boring()
    fit(tmp_path, module, lora(), max_epochs=1).save_checkpoint(tmp_path / "torch.ckpt")
    with pytest.raises(
        CheckpointError, match="bitsandbytes.*absmax1.*state1.*AdamW is one of torch's.*load_checkpoint"
    ):
        fit(tmp_path, boring.Boring(), lora(), ckpt=str(tmp_path / "theirs.ckpt"))
    with pytest.raises(CheckpointError, match="torch's optimizers: exp_avg, exp_avg_sq.*PagedAdamW is one of bits"):
        fit(tmp_path, Task(optimizer="paged_adamw"), lora(), ckpt=str(tmp_path / "torch.ckpt"))
    advised = load_checkpoint(Task(optimizer="paged_adamw"), tmp_path / "torch.ckpt")
    assert boring.largest_difference(boring.tensors(advised), boring.tensors(module)) == 0
    fit(tmp_path, advised, lora(), max_epochs=1)


@pytest.mark.parametrize(
    ("before", "after", "error"),
    [
        ("paged_adamw", "adamw_8bit", r"parameter 1 as \(64, 65\) in 32 bits; AdamW8bit keeps \(64, 65\) in 8 bits"),
        ("paged_adamw_8bit", "paged_adamw", "in 8 bits; PagedAdamW keeps .* in 32 bits.*or keep the trained weights"),
        ("AdamW", "paged_adamw_8bit", "torch's optimizers.*PagedAdamW8bit is one of bitsandbytes"),
    ],
)
def test_another_kind_of_state_is_refused_and_nothing_changes(before: str, after: str, error: str) -> None:
    own = parameters((7,), (64, 65))
    given = getattr(torch.optim if before == "AdamW" else optim, before)(own)
    steps(given, 0, 2)
    optimizer = getattr(optim, after)(own)
    steps(optimizer, 0, 1)
    kept = optimizer.state[own[1]]["state1"].clone()
    with pytest.raises(CheckpointError, match=error):
        optimizer.load_state_dict(given.state_dict())
    assert torch.equal(optimizer.state[own[1]]["state1"], kept)


def test_another_shape_and_another_number_of_parameters_are_refused() -> None:
    saved = {}
    for shape in ((7, 9), (9, 7)):
        optimizer = optim.paged_adamw(parameters(shape))
        steps(optimizer, 0, 1)
        saved[shape] = optimizer.state_dict()
    with pytest.raises(CheckpointError, match=r"as \(7, 9\) in 32 bits; PagedAdamW keeps \(9, 7\)"):
        optimizer.load_state_dict(saved[7, 9])
    with pytest.raises(ValueError, match="size of optimizer's group"):
        optim.paged_adamw(parameters((9, 7), (2,))).load_state_dict(saved[9, 7])


def test_paged_and_unpaged_go_on_from_each_other() -> None:
    own = parameters((64, 65))
    first = optim.paged_adamw_8bit(own)
    steps(first, 0, 2)
    second = optim.adamw_8bit(own)
    second.load_state_dict(first.state_dict())
    steps(second, 2, 3)
    assert second.state[own[0]]["step"] == 3


@pytest.fixture
def fresh() -> Iterator[None]:
    for cached in (optim.kind, optim.say_unpaged):
        cached.cache_clear()
    yield
    optim.kind.cache_clear()


@pytest.mark.usefixtures("fresh")
def test_without_bitsandbytes_and_with_an_old_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bnb, "__version__", "0.41.3")
    with pytest.raises(ImportError, match=r"PagedAdamW needs bitsandbytes 0\.\d+.*0\.41\.3.*lightning_peft\[quant\]"):
        optim.paged_adamw(parameters((2,)))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=r"AdamW8bit needs.*pip install 'lightning_peft\[quant\]'"):
        optim.adamw_8bit(parameters((2,)))


def test_importing_the_file_does_not_import_bitsandbytes() -> None:
    code = "import sys, lightning_peft.optim; print('bitsandbytes' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


WRONG = {
    "lr": (-1.0, "lr=-1.0: it must be a finite number"),
    "eps": (math.nan, "eps=nan: it must be"),
    "weight_decay": (math.inf, "weight_decay=inf: it must"),
    "betas": ((0.9, 1.0), r"betas=\(0.9, 1.0\): give two numbers"),
}


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("field", WRONG)
def test_wrong_settings(name: str, field: str) -> None:
    value, error = WRONG[field]
    with pytest.raises(ValueError, match=error):
        getattr(optim, name)(parameters((2,)), **{field: value})
    with pytest.raises(ValueError, match=r"betas=\[0.9\]: give two"):
        getattr(optim, name)(parameters((2,)), betas=[0.9])


@pytest.mark.usefixtures("fresh")
def test_that_nothing_is_paged_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "lightning_peft"):
        steps(optim.adamw_8bit(parameters((9, 9))), 0, 1)
        assert not caplog.records
        for name in ("paged_adamw", "paged_adamw", "paged_adamw_8bit"):
            optimizer = getattr(optim, name)(parameters((9, 9), (9, 9)))
            steps(optimizer, 0, 2)
    assert [r.getMessage() for r in caplog.records] == [
        "A paged optimizer pages on cuda, xpu only; on cpu its state stays in ordinary memory."
    ]
    optim.say_unpaged.cache_clear()  # as in the process that resumes
    resumed = optim.paged_adamw(parameters((9, 9), (9, 9)))
    optimizer = optim.paged_adamw(parameters((9, 9), (9, 9)))
    steps(optimizer, 0, 1)
    caplog.clear()
    optim.say_unpaged.cache_clear()
    resumed.load_state_dict(optimizer.state_dict())
    steps(resumed, 1, 2)
    assert len(caplog.records) == 1


# ------------------------------------------------------------------ pages
@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Pages of plain memory, on the CPU, with the marks that bitsandbytes gives them; -> the shapes that were made."""
    made: list[tuple[int, ...]] = []

    def get_paged(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        made.append(shape)
        out = torch.full(shape, 3).to(dtype)
        out.is_paged, out.page_deviceid = True, device.index  # type: ignore[attr-defined]
        return out

    def prefetch(tensor: Tensor, to_cpu: bool = False) -> None:
        if not tensor.is_paged:  # type: ignore[attr-defined]
            raise RuntimeError("not paged")

    monkeypatch.setattr(bnb.functional, "get_paged", get_paged)
    monkeypatch.setattr(bnb.functional, "fill", lambda tensor, value: tensor.fill_(value))
    monkeypatch.setattr(bnb.functional, "prefetch_tensor", prefetch)
    monkeypatch.setattr(bnb.functional.GlobalPageManager.get_instance(), "paged_tensors", [])
    monkeypatch.setattr(optim, "PAGED_DEVICES", ("cpu",))
    return made


def paged(optimizer: torch.optim.Optimizer) -> list[bool]:
    return [getattr(own[key], "is_paged", False) for own in optimizer.state.values() for key in ("state1", "state2")]


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("name", OURS[:2])
def test_pages_come_back_after_loading(name: str, moved: bool, pages: list[tuple[int, ...]]) -> None:
    shapes = ((400, 250), (400, 249))
    straight, halted = parameters(*shapes), parameters(*shapes)
    steps(getattr(optim, name)(straight), 0, 4)
    optimizer = getattr(optim, name)(halted)
    empty = optimizer.get_state_buffer(halted[0])
    assert empty.is_paged
    assert not empty.any()
    steps(optimizer, 0, 2)
    assert paged(optimizer) == [True, True, False, False]
    saved = through_a_file(optimizer.state_dict())
    assert not any(hasattr(t, "is_paged") for own in saved["state"].values() for t in own[optim.HIDDEN].values())
    resumed = getattr(optim, name)(halted)
    resumed.load_state_dict(saved)
    if moved:  # by whoever wants plain tensors on the device
        resumed.state[halted[0]] |= {key: resumed.state[halted[0]][key].tensor for key in optim.MOMENTS}
    _optimizer_to_device(resumed, torch.device("cpu"))
    assert paged(resumed) == [False] * 4
    again = through_a_file(resumed.state_dict())  # saved before the first step
    assert torch.equal(again["state"][0][optim.HIDDEN]["state1"], saved["state"][0][optim.HIDDEN]["state1"])
    pages.clear()
    steps(resumed, 2, 4)
    assert paged(resumed) == [True, True, False, False]
    assert pages == [(400, 250)] * 2
    assert len(resumed.page_mng.paged_tensors) == 7
    assert distance(straight, halted) == 0


def test_the_unpaged_one_never_pages(pages: list[tuple[int, ...]]) -> None:
    steps(optim.adamw_8bit(parameters((400, 250))), 0, 1)
    assert not pages


def test_marks_of_pages_that_were_saved_are_not_believed(
    pages: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint that bitsandbytes' own optimizer wrote on CUDA, on the CPU."""
    own = parameters((400, 250))
    optimizer = optim.paged_adamw(own)
    steps(optimizer, 0, 1)
    saved = through_a_file(super(optim.ResumableState, optimizer).state_dict())
    assert saved["state"][0][optim.HIDDEN]["state1"].is_paged
    monkeypatch.setattr(optim, "PAGED_DEVICES", ("cuda",))
    resumed = optim.paged_adamw(own)
    resumed.load_state_dict(saved)
    steps(resumed, 1, 2)
    assert paged(resumed) == [False, False]


@pytest.mark.parametrize("name", OURS[:2])
@pytest.mark.parametrize("where", [pytest.param("cuda:0", marks=on_gpu)])
def test_pages_come_back_on_the_device(name: str, where: str) -> None:
    shapes = ((400, 250), (8, 250))
    straight, halted = parameters(*shapes, device=where), parameters(*shapes, device=where)
    steps(getattr(optim, name)(straight), 0, 6)
    optimizer = getattr(optim, name)(halted)
    steps(optimizer, 0, 3)
    assert paged(optimizer) == [True, True, False, False]
    saved = through_a_file(optimizer.state_dict())
    resumed = getattr(optim, name)(halted)
    before = torch.cuda.memory_allocated()
    resumed.load_state_dict(saved)
    _optimizer_to_device(resumed, torch.device(where))
    assert torch.cuda.memory_allocated() - before < 2 * 400 * 250
    steps(resumed, 3, 6)
    assert paged(resumed) == [True, True, False, False]
    assert distance(straight, halted) == 0
    on_cpu = parameters(*shapes)
    unpaged = getattr(optim, name)(on_cpu)
    unpaged.load_state_dict(saved)
    steps(unpaged, 3, 4)


@RESUME
@pytest.mark.parametrize("name", [pytest.param(name, marks=on_gpu) for name in OURS])
def test_a_run_on_the_device_resumes(name: str, tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    straight, resumed = Task(optimizer=name, dropout=0.0), Task(optimizer=name, dropout=0.0)
    options = {"accelerator": "gpu", "devices": 1, "deterministic": "warn"}
    method = {"rank": 3200, "targets": "q"}  # 3200 x 32 numbers: paged
    fit(tmp_path, straight, LoRA(**method), saver, **options)
    trainer = fit(tmp_path, resumed, LoRA(**method), ckpt=str(tmp_path / "step=4.ckpt"), **options)
    assert any(paged(trainer.optimizers[0])) is (name != "adamw_8bit")
    assert boring.largest_difference(boring.tensors(straight), boring.tensors(resumed)) < 1e-5


# ------------------------------------------------------------------ what state costs
@pytest.mark.parametrize("name", options("optimizer"))
def test_bytes_of_state(name: str) -> None:
    make = build(compose(["run_dir=.", f"optimizer={name}"]).optimizer)
    for shape in [(), (7,), (4095,), (4096,), (30, 137), (2, 3, 40, 50)]:
        for dtype in (torch.float32, torch.bfloat16):
            own = parameters(shape, dtype=dtype)
            optimizer = make(own)
            steps(optimizer, 0, 1)
            held = {k: v for k, v in optimizer.state[own[0]].items() if isinstance(v, Tensor) and "qmap" not in k}
            assert sum(t.nbytes for t in held.values()) == optim.state_bytes(name, shape, own[0].itemsize)
        assert optim.state_bytes(name, math.prod(shape)) >= optim.state_bytes(name, shape)


def test_bytes_of_published_figures() -> None:
    assert optim.state_bytes("paged_adamw", 10**6) == 8 * 10**6
    assert optim.state_bytes("adamw_8bit", 256 * 10**6) == 256 * 10**6 * (2 + 2 * 4 / 256)
    assert optim.state_bytes("adamw", 1_316_000_000, itemsize=2) == pytest.approx(5.2e9, rel=0.02)  # OPT-1.3B, 16 bit
    with pytest.raises(ValueError, match="'adamax' is not known. Known: adafactor, adam"):
        optim.state_bytes("adamax", 3)


# ------------------------------------------------------------------ configs
@pytest.mark.parametrize("name", OURS)
def test_a_config_makes_the_optimizer(name: str) -> None:
    config = compose(["run_dir=.", f"optimizer={name}", "optimizer.lr=0.5"]).optimizer
    net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    optimizer = build(config)(parameter_groups(net))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [config.weight_decay, 0.0]
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}
    assert type(optimizer).__name__.lower() == name.replace("_", "")
    assert isinstance(optimizer, torch.optim.Optimizer)


@pytest.mark.parametrize(
    ("override", "error"),
    {
        "optimizer.lr=x": "optimizer.lr='x'.*float",
        "optimizer.weight_decay=[1]": "optimizer.weight_decay=.*float",
        "+optimizer.amsgrad=true": "optimizer.amsgrad.*no such argument. Known: params, lr, betas, eps, weight_decay",
    }.items(),
)
def test_a_wrong_override_shows_at_composition(override: str, error: str) -> None:
    with pytest.raises(ConfigError, match=error) as raised:
        compose(["run_dir=.", "optimizer=paged_adamw_8bit", override])
    assert "\n" not in str(raised.value)


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [f"{'lovely' if n % 2 else 'horrid'} thing {n},{n % 2}" for n in range(40)]
    (tmp_path / "reviews.csv").write_text("\n".join(["text,label", *rows]))
    quiet = ["trainer.enable_progress_bar=false", "trainer.accelerator=cpu", "trainer.log_every_n_steps=1"]
    command = ["train", "model=tiny_bert", "data=csv", "data.path=reviews.csv", *quiet, "optimizer=paged_adamw"]
    assert cli.main([*command, "trainer.max_epochs=1", "hydra.run.dir=run"]) == 0
    assert (tmp_path / "run" / "results.json").is_file()
    capsys.readouterr()
    assert cli.main([*command, "optimizer.betas=[0.9,2]", "hydra.run.dir=wrong"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("lightning-peft: betas=[0.9, 2]: give two numbers")
