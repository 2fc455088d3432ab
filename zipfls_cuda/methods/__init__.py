"""Related methods as modules over the losses of this package, and what they need beside a loss.

Every loss is an ``nn.Module`` whose call ends in the target, includes the method's cross-entropy, and takes
``ignore_index``, ``reduction`` and ``backend`` as ``distillation_loss`` does. Defaults are the authors'.
Under DDP each rank's loss is that of its own samples, as F.cross_entropy's is.

Example:
    >>> criterion = zls.methods.KDLoss(temperature=4.0)
    >>> criterion(torch.zeros(8, 10), torch.zeros(8, 10), torch.arange(8))  # logits, a teacher's, target
    tensor(0.2303)
"""

from .distillation import CSKDLoss, DKDLoss, KDLoss, MrKDLoss, NKDLoss, TfKDSelfLoss, WSLDLoss
from .dynamic_mlp import DynamicMLP, encode_metadata
from .labels import BAKELoss, LsrKDLoss, MaxSupLoss, TfKDRegLoss, USKDLoss
from .memory import InstanceMemory
from .mixing import RecursiveMix
from .outputs import BYOTLoss, DDGSDLoss
from .pairs import PairSampler
from .snapshots import SnapshotTeacher
from .stores import OLSLoss, PSKDLoss

__all__ = [
    "BAKELoss",
    "BYOTLoss",
    "CSKDLoss",
    "DDGSDLoss",
    "DKDLoss",
    "DynamicMLP",
    "InstanceMemory",
    "KDLoss",
    "LsrKDLoss",
    "MaxSupLoss",
    "MrKDLoss",
    "NKDLoss",
    "OLSLoss",
    "PSKDLoss",
    "PairSampler",
    "RecursiveMix",
    "SnapshotTeacher",
    "TfKDRegLoss",
    "TfKDSelfLoss",
    "USKDLoss",
    "WSLDLoss",
    "encode_metadata",
]
