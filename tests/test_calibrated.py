"""EVA, CorDA and LoRA-GA: what they take from data, against dense formulas, and their life in a Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from boring import Boring, data, trainer
from harness import adapter_parameters, output, perturb
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

from lightning_peft import EVA, CorDA, LoRA, LoRAGA, load_adapter, save_adapter
from lightning_peft.callback import LifeCycleError
from lightning_peft.core import state
from lightning_peft.core.calibration import CalibrationError, Components, counted
from lightning_peft.core.fields import FieldError
from lightning_peft.core.sites import TargetError
from lightning_peft.methods.calibrated import CalibratedLoRA

METHODS = [EVA, CorDA, LoRAGA]
pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]


class Net(nn.Module):
    """Two projections and a loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj, self.out = nn.Linear(12, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor, goal: Tensor) -> Tensor:
        return (self.out(torch.tanh(self.proj(x))) - goal).square().mean()


def batches(count: int = 4, rows: int = 30) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    mix = torch.randn(12, 12, generator=g)
    return [(torch.randn(rows, 12, generator=g) @ mix + 1, torch.randn(rows, 3, generator=g)) for _ in range(count)]


def started(method: type[CalibratedLoRA], **fields: Any) -> tuple[Net, Any]:
    net = Net()
    lora = method(**{"targets": "proj", "rank": 3, "alpha": 6, "heads": None, **fields})
    lora.apply(net)
    seen = lora.calibrate(net, batches())
    assert seen == 4
    return net, net.get_submodule(f"proj.adapters.{lora.info.name}")


def rows() -> Tensor:
    return torch.cat([x for x, _ in batches()]).double()


def same_span(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> None:
    """Rows of a and b, each orthonormal, span the same."""
    torch.testing.assert_close(a.double().T @ a.double(), b.T @ b, atol=tolerance, rtol=tolerance)


# ------------------------------------------------------------------ against dense formulas
@pytest.mark.parametrize("center", [True, False])
def test_eva_finds_the_principal_directions(center: bool) -> None:
    net, adapter = started(EVA, center=center, rank=9)
    x = rows()
    vt = torch.linalg.svd(x - x.mean(0) if center else x, full_matrices=False)[2]
    torch.testing.assert_close(adapter.a @ adapter.a.T, torch.eye(9), atol=1e-5, rtol=0)
    same_span(adapter.a[:2], vt[:2], 0.05)  # batch by batch is near, not equal: the rest was cut off
    assert not adapter.b.any()
    x, goal = batches()[0]
    torch.testing.assert_close(net(x, goal), Net()(x, goal), atol=0, rtol=0)


@pytest.mark.parametrize("center", [True, False])
def test_components_that_keep_everything_are_those_of_all_rows(center: bool) -> None:
    watch = Components(12, center)
    for x, _ in batches():
        watch.take(x.double())
    x = rows()
    _, s, vt = torch.linalg.svd(x - x.mean(0) if center else x, full_matrices=False)
    found, directions = watch.result()
    torch.testing.assert_close(found, s, atol=1e-8, rtol=1e-8)
    same_span(directions[:4], vt[:4], 1e-8)
    assert watch.n == len(x)


def test_whitening_divides_by_the_root_of_the_singular_values() -> None:
    plain, white = started(EVA)[1], started(EVA, whiten=True)[1]
    ratio = white.a / plain.a
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), atol=1e-4, rtol=1e-3)
    norms = white.a.norm(dim=1)
    assert norms[0] < norms[1] < norms[2] < 1


@pytest.mark.parametrize("mode", ["knowledge", "instruction"])
def test_corda_decomposes_the_weight_by_the_covariance(mode: str) -> None:
    net, adapter = started(CorDA, mode=mode)
    w = Net().proj.weight.detach().double()
    x = rows()
    c = x.T @ x / len(x)
    c = c / c.diagonal().mean() + 0.01 * torch.eye(12)
    u, s, vt = torch.linalg.svd(w @ c, full_matrices=False)
    part = slice(0, 3) if mode == "instruction" else slice(7, 10)
    expected = (u[:, part] * s[part]) @ vt[part] @ torch.linalg.inv(c)
    found = adapter.scale * adapter.b0 @ adapter.a0
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-3)
    x, goal = batches()[0]
    torch.testing.assert_close(net(x, goal), Net()(x, goal), atol=0, rtol=0)


def test_corda_keeps_what_matters_on_the_data() -> None:
    """What is left of W by "knowledge" errs least on these inputs: |s B0 A0 x|, against PiSSA's cut of the same rank."""
    _, adapter = started(CorDA, rank=4)
    x, w = rows().float(), Net().proj.weight.detach()
    u, s, vt = torch.linalg.svd(w)
    smallest = (u[:, 6:10] * s[6:10]) @ vt[6:10]
    assert (x @ (adapter.scale * adapter.b0 @ adapter.a0).T).norm() < (x @ smallest.T).norm()


def gradient() -> Tensor:
    net = Net()
    total = 0
    for x, goal in batches():
        net.zero_grad()
        net(x, goal).backward()
        total = total + net.proj.weight.grad.double() / 4
    return total  # type: ignore[return-value]


@pytest.mark.parametrize("size", ["stable", "unit", "weight"])
def test_lora_ga_starts_at_the_singular_vectors_of_the_gradient(size: str) -> None:
    net, adapter = started(LoRAGA, size=size)
    u, _, vt = torch.linalg.svd(gradient(), full_matrices=False)
    w = torch.linalg.svdvals(Net().proj.weight.detach())[:3]
    factor = {"stable": 10**0.25 / 4, "unit": 1.0, "weight": float((w / adapter.scale).sqrt().mean())}[size]
    same_span(adapter.a0 / factor, vt[:3])
    same_span(adapter.b0.T / factor, u[:, 3:6].T)
    x, goal = batches()[0]
    torch.testing.assert_close(net(x, goal), Net()(x, goal), atol=0, rtol=0)
    assert all(p.grad is None for p in net.parameters())


def test_the_first_step_of_lora_ga_is_nearer_to_that_of_full_fine_tuning() -> None:
    """The change of W by one gradient step, s^2 (B B^T G + G A^T A), against G: its cosine is larger than LoRA's."""
    g, cosines = gradient().float(), []
    for method in (LoRAGA, LoRA):
        net = Net()
        lora = method(targets="proj", rank=3, heads=None)
        lora.apply(net)
        if isinstance(lora, LoRAGA):
            lora.calibrate(net, batches())
        adapter: Any = net.get_submodule(f"proj.adapters.{lora.info.name}")
        a, b = adapter.a.detach(), adapter.b.detach()
        step = b @ b.T @ g + g @ a.T @ a
        cosines.append(float((step * g).sum() / (step.norm() * g.norm())))
    assert cosines[0] > cosines[1] + 0.1


# ------------------------------------------------------------------ which rows, and running
def test_tokens_without_a_label_do_not_count() -> None:
    ids = torch.arange(8).view(2, 4)
    mask, labels = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]), torch.tensor([[-100, 1, 2, -100], [-100, 3, -100, -100]])
    assert counted({"input_ids": ids}) is None
    assert torch.equal(counted({"input_ids": ids, "attention_mask": mask}), mask)
    assert torch.equal(counted({"attention_mask": mask, "labels": labels}), labels != -100)
    assert torch.equal(counted({"attention_mask": mask, "labels": torch.tensor([0, 1])}), mask)
    watch = Components(2, False)
    watch.mask = labels != -100
    assert watch.rows(torch.randn(2, 4, 5)).shape == (3, 5)
    assert watch.rows(torch.randn(2, 3, 5)).shape == (6, 5)


@pytest.mark.parametrize("model", ["gpt2", "llama", "encoder"])
@pytest.mark.parametrize("method", METHODS)
def test_a_model_is_the_base_after_calibration_and_comes_back_from_a_file(
    method: type[CalibratedLoRA], model: str, tmp_path: Path
) -> None:
    net, base = zoo.build(model), zoo.build(model)
    lora = method(targets="q,v", rank=3, heads=None)
    lora.apply(net)
    before = [p.detach().clone() for p in adapter_parameters(net)]
    goal = torch.randn(output(net, model).shape, generator=torch.Generator().manual_seed(5))

    def run(batch: Any, index: int) -> Tensor:
        out = net(**batch)
        return ((out if isinstance(out, Tensor) else out.logits) - goal).square().mean()

    lora.calibrate(net, [zoo.inputs(model)], run)
    torch.testing.assert_close(output(net, model), output(base, model), atol=1e-6, rtol=1e-6)
    assert any(not torch.equal(p, q) for p, q in zip(adapter_parameters(net), before, strict=True))
    perturb(net, 0.1)
    save_adapter(net, tmp_path / "adapter")
    fresh = zoo.build(model)
    loaded = load_adapter(fresh, tmp_path / "adapter")
    assert type(loaded) is LoRA
    assert loaded.rank == (3 if method is EVA else 6)
    torch.testing.assert_close(output(fresh, model), output(net, model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_fit_calibrates_once_and_resumes_to_the_bit(method: type[CalibratedLoRA], tmp_path: Path) -> None:
    def run(ckpt: Path | None = None) -> Boring:
        module = Boring()
        keep = ModelCheckpoint(tmp_path / str(ckpt is None), "{step}", every_n_train_steps=2, save_top_k=-1)
        lora = method(targets="q,v", rank=2, batches=2)
        fit = trainer(tmp_path, [lora, keep], max_steps=4)
        fit.fit(module, data(), data(6), ckpt_path=ckpt, weights_only=None if ckpt is None else True)
        assert "log" not in vars(module)
        return module

    seed_everything(3)
    through = run()
    assert len(through.losses) == 2 + 4
    resumed = run(tmp_path / "True" / "step=2.ckpt")
    assert len(resumed.losses) == 2
    one, two = state.saved(through), state.saved(resumed)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_calibrating_before_fit_is_kept(tmp_path: Path) -> None:
    module = Boring()
    lora = EVA(targets="q,v", rank=2)
    lora.apply(module)
    lora.calibrate(module, [batch for batch, _ in zip(data(shuffle=False), range(2), strict=False)])
    a = next(iter(adapter_parameters(module))).detach().clone()
    count = len(module.losses)
    trainer(tmp_path, [lora], max_steps=1, gradient_clip_val=1e-12).fit(module, data(), data(6))
    assert len(module.losses) == count + 1
    torch.testing.assert_close(next(iter(adapter_parameters(module))), a, atol=0.02, rtol=0)


def test_calibration_moves_no_other_random_number_and_no_gradient() -> None:
    net = Net()
    lora = LoRAGA(targets="proj", rank=3, heads=None)
    lora.apply(net)
    net.train()
    random = torch.get_rng_state()
    lora.calibrate(net, batches())
    assert torch.equal(torch.get_rng_state(), random)
    assert net.training
    assert net.proj.training


@pytest.mark.parametrize("how", ["workers that stay", "a generator of its own"])
def test_the_run_goes_through_the_batches_that_it_would_have(how: str, tmp_path: Path) -> None:
    class Noting(Boring):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.net.training:  # not while the start is taken
                self.seen = [*getattr(self, "seen", []), batch[0].sum().item()]
            return super().training_step(batch, batch_idx)

    def seen(callbacks: list[Any]) -> list[int]:
        workers = {"num_workers": 1, "persistent_workers": True}
        own = {"generator": torch.Generator().manual_seed(2), "shuffle": True}
        loader = DataLoader(data().dataset, 3, **(workers if how == "workers that stay" else own))  # type: ignore[arg-type]
        module = Noting()
        trainer(tmp_path, callbacks, max_epochs=2).fit(module, loader)
        return module.seen

    assert seen([EVA(targets="q,v", rank=2, batches=3)]) == seen([LoRA(targets="q,v", rank=2)])


# ------------------------------------------------------------------ errors
def test_batches_that_say_nothing() -> None:
    net = Net()
    lora = CorDA(targets="proj", rank=3, heads=None)
    lora.apply(net)
    with pytest.raises(CalibrationError, match="0 batches told nothing about 1 of 1 sites"):
        lora.calibrate(net, [])
    few = EVA(targets="proj", rank=3, heads=None, label="few")
    few.apply(net)
    with pytest.raises(CalibrationError, match="rank=3 asks for more"):
        few.calibrate(net, batches(1, 2))
    wide = LoRAGA(targets="proj", rank=6, heads=None, label="wide")
    wide.apply(net)
    with pytest.raises(CalibrationError, match="at most 5"):
        wide.calibrate(net, batches())
    with pytest.raises(CalibrationError, match="no loss with a gradient"):
        wide.calibrate(net, batches(), lambda batch, index: net(*batch).detach())


def test_several_dataloaders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LifeCycleError, match="one training dataloader"):
        trainer(tmp_path, [EVA(targets="q", rank=2)], max_steps=1).fit(Boring(), [data(), data()], data(6))


def test_places_and_values_that_make_no_sense() -> None:
    with pytest.raises(TargetError, match="is an embedding"):
        EVA(targets="embed", rank=2, heads=None).apply(zoo.build("llama"))
    for call in (lambda: EVA(batches=0), lambda: LoRAGA(gamma=0)):
        with pytest.raises(FieldError):
            call()


# ------------------------------------------------------------------ what a user's module does
class Floats(LightningModule):
    """Regression with batches of floats."""

    def __init__(self, how: str = "") -> None:
        super().__init__()
        self.how, self.net, self.error = how, Net(), MeanMetric()
        self.automatic_optimization = how != "manual"

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return dict(zip(("x", "goal"), batch, strict=True))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if self.how == "checkpointed":
            loss = checkpoint(self.net, batch["x"], batch["goal"], use_reentrant=False)
        else:
            loss = self.net(**batch)
        self.error(loss.detach().float())
        self.log("error", self.error, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.0)


def run_fit(method: Any, module: Floats, directory: Path, **options: Any) -> Any:
    """The adapter after one epoch of 4 batches."""
    loader = DataLoader(TensorDataset(*map(torch.cat, zip(*batches(), strict=True))), batch_size=30)
    run = trainer(directory, [method], **options)
    run.fit(module, loader)
    vars(module)["seen"] = run.callback_metrics
    return module.get_submodule(f"net.proj.adapters.{method.info.name}")


@pytest.mark.parametrize("method", METHODS)
def test_batches_come_as_in_training_and_leave_no_metric(method: type[CalibratedLoRA], tmp_path: Path) -> None:
    fields: dict[str, Any] = {"targets": "net.proj", "rank": 3, "alpha": 6, "heads": None}
    module, base = Floats(), Net()
    adapter = run_fit(lora := method(**fields), module, tmp_path)
    torch.testing.assert_close(adapter.a, started(method)[1].a, atol=1e-5, rtol=1e-4)  # the hooks were called
    expected = torch.stack([base(*batch) for batch in batches()]).mean()
    torch.testing.assert_close(module.seen["error"], expected.detach(), atol=1e-5, rtol=1e-5)
    assert module.error.update_count in (0, 4)  # not 8
    half = run_fit(method(**fields), Floats(), tmp_path, precision="bf16-true")
    assert half.settled
    assert half.a.dtype == torch.float32
    # another module under the same callback has a start of its own
    again = run_fit(lora, Floats(), tmp_path)
    assert again is not adapter
    assert again.settled
    assert torch.equal(again.a, adapter.a)


def test_lora_ga_through_a_checkpointed_block(tmp_path: Path) -> None:
    """Its backward computes the block again, which is no further call."""
    fields: dict[str, Any] = {"targets": "net.proj", "rank": 3, "heads": None}
    plain, again = (run_fit(LoRAGA(**fields), Floats(how), tmp_path) for how in ("", "checkpointed"))
    assert torch.equal(plain.a0, again.a0)
    assert torch.equal(plain.b0, again.b0)


def test_a_step_that_optimises_by_itself_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LifeCycleError, match="automatic_optimization=False.*calibrate"):
        run_fit(EVA(targets="net.proj", rank=3, heads=None), Floats("manual"), tmp_path)
