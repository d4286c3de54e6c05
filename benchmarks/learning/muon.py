"""Muon in fp32, for processors without bf16 instructions."""

import torch

# Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024): five steps of this quintic bring
# every singular value near 1.
COEFFICIENTS, STEPS = (3.4445, -4.7750, 2.0315), 5


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon's update without weight decay. Torch orthogonalises in bf16, which a processor with AVX2 alone
    multiplies slowly: two thirds of the pre-training's time went there."""

    def __init__(self, params, lr: float, momentum: float = 0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                average = self.state[weight].setdefault("momentum_buffer", torch.zeros_like(weight))
                average.lerp_(weight.grad, 1.0 - group["momentum"])
                update = orthogonalised(weight.grad.lerp(average, group["momentum"]))
                taller = max(1.0, weight.shape[0] / weight.shape[1])
                weight.sub_(update, alpha=group["lr"] * taller**0.5)


def orthogonalised(matrix: torch.Tensor) -> torch.Tensor:
    """(m, n) -> (m, n): its singular vectors, with singular values of about 1."""
    a, b, c = COEFFICIENTS
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    wide = wide / wide.norm().clamp_min(1e-7)
    for _ in range(STEPS):
        gram = wide @ wide.T
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return wide.T if matrix.shape[0] > matrix.shape[1] else wide
