"""Image classification with any network."""

from lightning_peft.tasks.task import Classification


class ImageClassification(Classification):
    """{pixel_values: (batch, channels, height, width), labels: (batch,)} or (images, labels) -> cross entropy

    A dict is for models of transformers; a pair, as torchvision's data sets give it, for those that take the images
    themselves.
    """
