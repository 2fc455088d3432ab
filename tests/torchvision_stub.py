"""Import torchvision beside a PyTorch whose build lacks torchvision's own operators.

torchvision registers fake kernels for two operators when it is imported and fails if they do not exist. Its
models do not call them, so defining their schemas is enough.
"""

import torch


def define_missing_operators() -> torch.library.Library | None:
    """Define the operators, unless torchvision's own library did. Keep the result: they vanish with it."""
    try:
        import torchvision  # noqa: F401

        return None
    except ImportError:
        raise
    except RuntimeError:
        pass
