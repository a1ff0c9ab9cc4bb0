"""ReMoRA: restarts that go through the types of MoRA."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import zoo
from boring import Boring, data, trainer
from harness import output, perturb
from test_schedules import adapters, same_through_a_checkpoint

from lightning_peft import ReMoRA, load_adapter, load_checkpoint, save_adapter
from lightning_peft.core import state
from lightning_peft.core.fields import FieldError

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_a_restart_keeps_the_function_and_takes_the_next_type(model: str, tmp_path: Path) -> None:
    net = zoo.build(model)
    method = ReMoRA(rank=2, types=[1, 2, 3])
    method.apply(net)
    for turn, kind in enumerate((2, 3, 1, 2)):
        perturb(net, 0.1, adapters_only=True, seed=turn)
        expected = output(net, model)
        method.restart(net)
        torch.testing.assert_close(output(net, model), expected, atol=1e-6, rtol=1e-6)
        assert {(a.kind, bool(a.m.any())) for a in adapters(net)} == {(kind, False)}
    perturb(net, 0.1, adapters_only=True)
    save_adapter(net, tmp_path / "a")
    fresh = zoo.build(model)
    load_adapter(fresh, tmp_path / "a")
    assert {a.kind for a in adapters(fresh)} == {2}
    assert torch.equal(output(fresh, model), output(net, model))


@pytest.mark.parametrize("at", [5, 6])
def test_remora_resumes_exactly(at: int, tmp_path: Path) -> None:
    through, resumed = same_through_a_checkpoint(lambda: ReMoRA(rank=2, every=3), tmp_path, at, 8)
    assert through.losses[at:] == resumed.losses
    assert {a.kind for a in adapters(resumed)} == {1}
    alone = type(through)()
    load_checkpoint(alone, tmp_path / "True" / f"step={at}.ckpt")
    assert {a.kind for a in adapters(alone)} == {state.get_applied(alone).method.kind} == {1 + at // 3 % 2}  # type: ignore[attr-defined]


def test_the_type_comes_with_its_m_and_restarts_go_on(tmp_path: Path) -> None:
    """A fresh method, a checkpoint without callbacks, a second Trainer: M is read by the type that it was trained in."""
    module, method = Boring(dropout=0.0), ReMoRA(rank=2, every=3)
    fit = trainer(tmp_path, [method], max_steps=4, max_epochs=-1)
    fit.fit(module, data())
    fit.save_checkpoint(tmp_path / "all.ckpt")
    fit.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    x = next(iter(data(shuffle=False)))[0]
    expected = module.net.eval()(input_ids=x).logits
    assert method.restarts == 1
    for name in ("all", "weights"):
        fresh, given = Boring(dropout=0.0), ReMoRA(rank=2, every=3)
        load_checkpoint(fresh, tmp_path / f"{name}.ckpt", methods=[given])
        assert torch.equal(fresh.net.eval()(input_ids=x).logits, expected)
        assert given.restarts == (1 if name == "all" else 0)
    again = ReMoRA(rank=2, every=3)
    trainer(tmp_path, [again]).validate(module, data(), verbose=False)
    assert again.restarts == 1
    assert torch.equal(module.net(input_ids=x).logits, expected)


def test_types_that_do_not_share_their_m() -> None:
    for types in ([], [1, 6], [0]):
        with pytest.raises(FieldError, match="share their M"):
            ReMoRA(types=types)
