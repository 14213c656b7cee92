"""Loss functions."""

from torch import Tensor, nn
from torch.nn import functional as F


class CrossEntropy(nn.Module):
    """Cross-entropy of logits (B, K) and targets (B,): the sum of the weighted losses over B, a scalar.

    `nn.CrossEntropyLoss` divides by the sum of the weights in a batch, so that accumulated small batches differ from
    one large batch; here they do not. The weight is (K,), None weighs all equally; `label_smoothing`, in [0, 1), is the
    part of the target that is spread over all classes.
    """

    weight: Tensor | None

    def __init__(self, weight: Tensor | None = None, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.label_smoothing = label_smoothing

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The mean over the batch."""
        total = F.cross_entropy(logits, targets, self.weight, reduction="sum", label_smoothing=self.label_smoothing)
        return total / len(targets)
