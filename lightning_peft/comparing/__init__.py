"""Several methods, or groupings of layers, on one task."""

from lightning_peft.comparing.comparison import compare
from lightning_peft.comparing.table import Comparison, Row

__all__ = ["Comparison", "Row", "compare"]
