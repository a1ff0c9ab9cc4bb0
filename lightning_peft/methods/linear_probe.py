"""Linear probe: the lower end that every comparison needs; the backbone is a frozen feature extractor.
Understanding intermediate layers using linear classifier probes. Alain, Bengio, 2016. https://arxiv.org/abs/1610.01644
"""

from __future__ import annotations

from lightning_peft.callback import PEFT


class LinearProbe(PEFT, name="linear_probe", family="baseline", paper="1610.01644", mergeable=True, backprop=False):
    """train the head on frozen features, nothing else

    The head is found by `heads`: "auto" knows the usual names (classifier, score, head, ...); a model without one is
    an error.
    """

    unused = ("targets", "layers", "exclude", "roles")
