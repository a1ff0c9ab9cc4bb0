"""A tensor that is computed from others and kept until one of them changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Mark = tuple[Any, ...]


class Derived:
    """value(sources, make): what `make` gave when the sources last changed. Copies and pickles begin without it.

    A change is another tensor, dtype, device or version; writing through raw pointers is not seen. A source that has
    a gradient is not relied on, and a compiled graph computes anew.
    """

    def __init__(self) -> None:
        self.marks: list[Mark] = []
        self.value: Tensor | None = None

    def __call__(self, sources: Sequence[Tensor], make: Callable[[], Tensor], trained: bool = False) -> Tensor:
        """trained: keep it though the sources train; for as long as `clear` is called before they do."""
        if torch.compiler.is_compiling() or (not trained and any(source.requires_grad for source in sources)):
            return make()
        try:
            marks = [(id(s), s.data_ptr(), s._version, s.dtype, s.device) for s in sources]
        except RuntimeError:  # a tensor of torch.func, or of inference mode: nothing tells when it changes
            return make()
        if self.value is None or marks != self.marks:
            self.marks, self.value = marks, make()
        return self.value

    def clear(self) -> None:
        self.marks, self.value = [], None

    def __reduce__(self) -> Any:
        return Derived, ()
