"""Which method to use, with what settings, and what is risky about them."""

from lightning_peft.choosing.candidates import Candidate, ChooseError, Chosen
from lightning_peft.choosing.choice import choose
from lightning_peft.choosing.risks import risks

__all__ = ["Candidate", "ChooseError", "Chosen", "choose", "risks"]
