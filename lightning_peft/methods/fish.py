"""FISH Mask: Training Neural Networks with Fixed Sparse Masks. Sung, Nair, Raffel, NeurIPS 2021.
https://arxiv.org/abs/2111.09839
"""

from __future__ import annotations

from lightning_peft.methods.selective import Score, SelectiveTuning


class FishMask(SelectiveTuning, name="fish", family="selective", paper="2111.09839", mergeable=True):
    """theta = theta_0 + m * v, m the entries of largest F = mean_x (d log p(y|x) / d theta)^2

    `SelectiveTuning` with the empirical Fisher information of `samples` single examples (the square of each gradient,
    not of a batch's mean), in eval mode, and the share `budget` of all candidates together: 0.5 %. y is the label of
    the example; the loss of a language model is the mean over its tokens. expect: the Fisher information itself, mean_x
    sum_y p(y|x) (d log p(y|x) / d theta)^2, with a backward pass for each class of a classifier. heads_in_budget: as in
    the authors' code, whose budget holds the classifier that trains as a whole. Source: section 3.
    """

    score: Score = "fisher"
    heads_in_budget: bool = False
