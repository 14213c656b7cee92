"""Forms of a prompt: what is learned in the place of the tokens, and how the tokens are computed of it.

A form is a parametrisation of torch (`torch.nn.utils.parametrize`) of `VisualPrompt.tokens`. Its `forward` computes the
tokens of what is learned, its `right_inverse` says where learning starts, so that the tokens are as near as they can be
to given ones. What reads `tokens` need not know: a task file holds them computed, and is that of a plain prompt.

Legend: P prompt tokens, D embed_dim, L prompted blocks, r rank.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Shared(nn.Module):
    """One set of tokens for all prompted blocks: tokens_i = T, with T (1, P, D).

    It starts between those of all blocks: in the direction of their mean, and as long as they are. Those of one block
    alone, patches of the first for example, are strange to the others.

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
        """Tokens (L, P, D) of what is learned, (1, P, D)."""
        return learned.expand(self.num_blocks, -1, -1)

    def right_inverse(self, tokens: Tensor) -> Tensor:
        """What is learned, (1, P, D), of the tokens (L, P, D)."""
        self.num_blocks = len(tokens)
        lengths: Tensor = tokens.norm(dim=2, keepdim=True).mean(0, keepdim=True)
        return lengths * nn.functional.normalize(tokens.mean(0, keepdim=True), dim=2)


class Bilinear(nn.Module):
    """Tokens of low rank: tokens_i = A_i B_i, with A_i (P, r) and B_i (r, D); r (P + D) numbers a block for P D.

    It starts at the best approximation of that rank, the truncated singular value decomposition, which is split evenly
    between the two.

    Whitened, tokens_i = A_i B_i W_i, with a fixed W_i (D, D) for each block, see `whitening.whiten_from_patches`; what
    it starts at is then nearest in the whitened space. Until that is called W_i changes nothing.

    Args:
        rank: r. Tokens have no rank above P or D, so a larger one is theirs.
        whiten: Whether there are the W_i.

    Raises:
        ValueError: The rank is below 1.

    References:
        Attention to the Burstiness in Visual Prompt Tuning! (Wang et al., ICCV 2025),
        https://arxiv.org/abs/2506.22908: the low-rank version, and with `whiten` its product with a fixed whitening
        matrix, which the paper multiplies with tokens that are learned directly.

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
            raise ValueError(f"prompt.rank must be at least 1, got {rank}")
        self.rank, self.whiten = rank, whiten
        self.register_buffer("whitening", None)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Tokens (L, P, D) of A, (L, P, r), and B, (L, r, D)."""
        device = "cpu" if left.is_meta else left.device.type
        with torch.autocast(device, enabled=False):  # the tokens that a task file will hold, to the bit
            tokens = left @ right
            return tokens if self.whitening is None else tokens @ self.whitening

    def right_inverse(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """A and B whose product is nearest to the tokens (L, P, D)."""
        if self.whiten and self.whitening is None:
            self.whitening = torch.eye(tokens.shape[2]).to(tokens).repeat(len(tokens), 1, 1)
        if self.whitening is not None:
            tokens = torch.linalg.solve(self.whitening, tokens, left=False)
        left, values, right = torch.linalg.svd(tokens, full_matrices=False)
        scale = values[:, None, : self.rank].sqrt()
        return left[..., : self.rank] * scale, right[:, : self.rank] * scale.mT

    def extra_repr(self) -> str:
        """The rank, and whether it is whitened."""
        return f"rank={self.rank}{', whiten=True' if self.whiten else ''}"


class Fourier(nn.Module):
    """The first Q tokens of a block are a spectrum: tokens_i = Re(F_Q X_i F_D); the other P - Q are learned as such.

    F_Q and F_D are the discrete Fourier transforms over tokens and channels. They are scaled by 1 / sqrt(Q D), which
    the paper does not do: tokens then are as large as what is learned, so that a learning rate means the same. A
    spectrum's real part is even, Y[-q, -d] = Y[q, d], and so are these tokens; of given ones they keep the even part.

    Args:
        fraction: Q / P, rounded; at least one token.

    Raises:
        ValueError: The fraction is not in (0, 1].

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
            raise ValueError(f"prompt.fraction must be in (0, 1], got {fraction}")
        self.fraction = fraction

    def forward(self, learned: Tensor) -> Tensor:
        """Tokens (L, P, D) of what is learned, of the same shape."""
        return self._transform(learned, torch.fft.fft2)

    def right_inverse(self, tokens: Tensor) -> Tensor:
        """What is learned, whose tokens are nearest to those given, (L, P, D)."""
        return self._transform(tokens, torch.fft.ifft2)

    def extra_repr(self) -> str:
        """The fraction."""
        return f"fraction={self.fraction}"

    def _transform(self, values: Tensor, transform: Callable[..., Tensor]) -> Tensor:
        num_transformed = max(1, round(self.fraction * values.shape[1]))
        chosen, rest = values.tensor_split([num_transformed], dim=1)
        return torch.cat([transform(chosen, norm="ortho").real, rest], dim=1)
