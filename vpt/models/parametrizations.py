"""Parametrizations of prompt tokens: shared, low-rank and Fourier prompts.

Each class is a parametrization (`torch.nn.utils.parametrize`) of `VisualPrompt.tokens`: `forward` computes the tokens
from the learned parameters, `right_inverse` the initial parameters from given tokens, exactly or as close as possible.
Readers of `tokens` need not know: a task file stores the computed tokens as a plain prompt.

Legend: P prompt tokens, D embed_dim, L prompted blocks, r rank.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Shared(nn.Module):
    """One set of tokens for all prompted blocks: tokens_i = T, with T of shape (1, P, D).

    T is initialised to the mean direction and the mean length of the tokens of all blocks. Tokens of a single block,
    for example patch tokens of the first, would be out of distribution in the others.

    References:
        Visual Prompt Tuning (Jia et al., 2022), https://arxiv.org/abs/2203.12119, the ablation on sharing prompts.

    Example:
        >>> form = Shared()
        >>> learned = form.right_inverse(torch.ones(12, 10, 192))
        >>> learned.shape, form(learned).shape
        (torch.Size([1, 10, 192]), torch.Size([12, 10, 192]))
    """

    num_blocks = 1

    def forward(self, learned: Tensor) -> Tensor:
        """(1, P, D) -> tokens (L, P, D)."""
        return learned.expand(self.num_blocks, -1, -1)

    def right_inverse(self, tokens: Tensor) -> Tensor:
        """Tokens (L, P, D) -> (1, P, D)."""
        self.num_blocks = len(tokens)
        lengths: Tensor = tokens.norm(dim=2, keepdim=True).mean(0, keepdim=True)
        return lengths * nn.functional.normalize(tokens.mean(0, keepdim=True), dim=2)


class Bilinear(nn.Module):
    """Low-rank tokens: tokens_i = A_i B_i with A_i (P, r) and B_i (r, D), where r is min(`rank`, P, D).

    These are r (P + D) parameters per block, not P D. A and B are initialised with the truncated singular value
    decomposition of the tokens, the best approximation of rank r, with the singular values split evenly between both.

    With `whiten`, tokens_i = A_i B_i W_i with a fixed W_i (D, D) per block; the approximation is then best in the
    whitened space. W_i is the identity until `whitening.whiten_from_patches` sets it.

    Raises:
        ValueError: `rank` is below 1.

    References:
        Attention to the Burstiness in Visual Prompt Tuning! (Wang et al., ICCV 2025),
        https://arxiv.org/abs/2506.22908; there the fixed whitening multiplies tokens that are learned directly.

    Example:
        >>> form = Bilinear(rank=4)
        >>> left, right = form.right_inverse(torch.randn(12, 10, 192))
        >>> left.shape, right.shape, form(left, right).shape
        (torch.Size([12, 10, 4]), torch.Size([12, 4, 192]), torch.Size([12, 10, 192]))
    """

    whitening: Tensor | None

    def __init__(self, rank: int = 8, *, whiten: bool = False) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank={rank}: must be at least 1")
        self.rank, self.whiten = rank, whiten
        self.register_buffer("whitening", None)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """A (L, P, r) and B (L, r, D) -> tokens (L, P, D)."""
        with torch.autocast("cpu" if left.is_meta else left.device.type, enabled=False):  # bit-identical to a task file
            tokens = left @ right
            return tokens if self.whitening is None else tokens @ self.whitening

    def right_inverse(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (L, P, D) -> A (L, P, r) and B (L, r, D), whose product is closest to them."""
        if self.whiten and self.whitening is None:
            self.whitening = torch.eye(tokens.shape[2]).to(tokens).repeat(len(tokens), 1, 1)
        if self.whitening is not None:
            tokens = torch.linalg.solve(self.whitening, tokens, left=False)
        left, values, right = torch.linalg.svd(tokens, full_matrices=False)
        scale = values[:, None, : self.rank].sqrt()
        return left[..., : self.rank] * scale, right[:, : self.rank] * scale.mT

    def extra_repr(self) -> str:
        """Rank and whitening."""
        return f"rank={self.rank}{', whiten=True' if self.whiten else ''}"


class Fourier(nn.Module):
    """Fourier transform of the first Q tokens of each block: tokens_i = Re(F_Q X_i F_D); the other P - Q are plain.

    Q is `fraction` times P, rounded and at least 1. F_Q and F_D are the discrete Fourier transforms over tokens and
    channels, scaled by 1 / sqrt(Q D), unlike the paper: tokens then have the scale of the learned parameters, and
    learning rates stay comparable. The real part of the spectrum is even, Y[-q, -d] = Y[q, d], so only the even part of
    given tokens can be represented.

    Raises:
        ValueError: `fraction` is not in (0, 1].

    References:
        Visual Fourier Prompt Tuning (Zeng et al., NeurIPS 2024), https://arxiv.org/abs/2411.01327, section 3.

    Example:
        >>> form = Fourier(fraction=0.5)
        >>> learned = torch.zeros(1, 4, 8)
        >>> learned[0, 0, 0], learned[0, 3, 0] = 4, 1
        >>> form(learned)[0, :, 0], form(learned)[0, :, 1]
        (tensor([1., 1., 0., 1.]), tensor([1., 1., 0., 0.]))
    """

    def __init__(self, fraction: float = 0.3) -> None:
        super().__init__()
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction={fraction}: must be in (0, 1]")
        self.fraction = fraction

    def forward(self, learned: Tensor) -> Tensor:
        """(L, P, D) -> tokens (L, P, D)."""
        return self._transform(learned, torch.fft.fft2)

    def right_inverse(self, tokens: Tensor) -> Tensor:
        """Tokens (L, P, D) -> (L, P, D), whose transform is closest to them."""
        return self._transform(tokens, torch.fft.ifft2)

    def extra_repr(self) -> str:
        """Fraction of transformed tokens."""
        return f"fraction={self.fraction}"

    def _transform(self, values: Tensor, transform: Callable[..., Tensor]) -> Tensor:
        chosen, rest = values.tensor_split([max(1, round(self.fraction * values.shape[1]))], dim=1)
        return torch.cat([transform(chosen, norm="ortho").real, rest], dim=1)
