"""Text classification with any encoder or decoder."""

from lightning_peft.tasks.task import Classification


class TextClassification(Classification):
    """{input_ids, attention_mask: (batch, time), labels: (batch,)} -> cross entropy of the classes

    model: takes input_ids and attention_mask and returns logits (batch, num_classes) or an object that has them: one of
    transformers' *ForSequenceClassification, or a backbone in `PooledClassifier`.
    """
