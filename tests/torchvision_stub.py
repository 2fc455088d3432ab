"""Import torchvision, and timm which needs it, where torchvision's compiled operators do not load.

On import torchvision adds fake kernels to two of its operators and fails where they do not exist. The models
never call them, so their schemas are enough.
"""

import sys

import torch

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def import_torchvision():
    """The module torchvision; raises ImportError if it is not installed."""
    try:
        import torchvision
    except RuntimeError:  # operator torchvision::nms does not exist
        for name in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in SCHEMAS:
            library.define(schema)
        import torchvision

        torchvision._schemas = library  # they vanish with the library object
    return torchvision
