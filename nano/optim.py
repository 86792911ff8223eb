"""Muon for the matrices, AdamW for the table and the norms.

Source: Muon, Keller Jordan et al. 2024 (momentum, then an orthogonalised update by five
Newton-Schulz iterations with their published coefficients).
"""

from __future__ import annotations

import torch
import torch.nn as nn


@torch.no_grad()
def orthogonalise(g: torch.Tensor) -> torch.Tensor:
    """The nearest semi-orthogonal matrices of g [n, rows, columns], roughly."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = g.shape[1] > g.shape[2]
    # Not in bfloat16: where the processor has no such products, float32 is five times faster
    x = g.mT.contiguous() if tall else g
    x = x / (x.flatten(1).norm(dim=1).view(-1, 1, 1) + 1e-7)
    for _ in range(5):
        square = torch.bmm(x, x.mT)
        x = a * x + torch.bmm(b * square + c * torch.bmm(square, square), x)
    return x.mT if tall else x


class Optimiser:
    """`step(scale)` applies and clears the gradients; scale multiplies both learning rates."""

    def __init__(self, model: nn.Module, matrix_rate: float, other_rate: float):
        self.matrix_rate, self.other_rate = matrix_rate, other_rate
        self.params = [p for p in model.parameters() if p.requires_grad]
        # Matrices of one shape go through one batched update.
        self.matrices: dict[tuple, list[nn.Parameter]] = {}
        others = []
        for name, p in model.named_parameters():
            if not p.requires_grad:
                continue
            if p.dim() == 2 and "embed_tokens" not in name:
                self.matrices.setdefault(tuple(p.shape), []).append(p)
            else:
                others.append(p)
        self.momentum = {s: torch.zeros(len(ps), *s) for s, ps in self.matrices.items()}
        self.adam = torch.optim.AdamW(
            others, lr=other_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )

    def step(self, scale: float) -> None:
        torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        for group in self.adam.param_groups:
            group["lr"] = self.other_rate * scale
        self.adam.step()
        self._step_matrices(self.matrix_rate * scale)
        for p in self.params:
            p.grad = None

    @torch.no_grad()
    def _step_matrices(self, rate: float) -> None:
        for shape, params in self.matrices.items():
            g = torch.stack([p.grad for p in params])
            m = self.momentum[shape].lerp_(g, 0.05)
            update = orthogonalise(g.lerp(m, 0.95))  # Nesterov
            step = rate * max(1.0, shape[0] / shape[1]) ** 0.5
            for p, u in zip(params, update, strict=True):
                p.add_(u, alpha=-step)

    def state_dict(self) -> dict:
        return {"adam": self.adam.state_dict(), "momentum": self.momentum}

    def load_state_dict(self, state: dict) -> None:
        self.adam.load_state_dict(state["adam"])
        self.momentum = state["momentum"]
