"""A linear probe: how well a trained network's features tell apart classes that it was not trained on."""

from collections.abc import Callable

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from .data import Split

Predict = Callable[[torch.Tensor], torch.Tensor]


def linear_probe(net: nn.Module, predict: Predict, learnt: Split, judged: Split) -> float:
    """Accuracy of a logistic regression on the classifier's input, standardised; the network stays as it is.

    Args:
        net: a ResNet of experiments/model.py, or a model of timm.
        predict: lets the network see images.
        learnt: images of the other classes, on which the regression is fitted.
        judged: other images of these classes.
    """
    regression = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    regression.fit(features(net, predict, learnt.images), learnt.labels.numpy())
    return float(regression.score(features(net, predict, judged.images), judged.labels.numpy()))


def features(net: nn.Module, predict: Predict, images: torch.Tensor):
    """What the classifier is given of images (N, channels, H, W) uint8: an array (N, D) float32."""
    found = []
    classifier = net.get_classifier() if hasattr(net, "get_classifier") else net.fc
    if isinstance(classifier, tuple):  # a distilled model's two
        classifier = classifier[0]
    hook = classifier.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].flatten(1).float()))
    try:
        predict(images)
    finally:
        hook.remove()
    return torch.cat(found).cpu().numpy()
