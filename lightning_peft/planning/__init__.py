"""The memory of a training step before it is taken, what fits on a card, and what a run then took."""

from lightning_peft.planning.memory_log import MemoryLog
from lightning_peft.planning.planner import image_batch, plan, text_batch
from lightning_peft.planning.report import Plan
from lightning_peft.planning.search import Choice, fit
from lightning_peft.planning.sizes import PlanError

__all__ = ["Choice", "MemoryLog", "Plan", "PlanError", "fit", "image_batch", "plan", "text_batch"]
