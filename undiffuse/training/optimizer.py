"""What turns gradients into steps: Adam, as in DDPM, or Muon."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

NARROW = 16  # a matrix with fewer rows or columns is that of the image's channels
MOMENTUM, ROUNDS = 0.95, 5
QUINTIC = (3.4445, -4.7750, 2.0315)  # steep at 0, and about 1 between the singular values 0.7 and 1.2


class Adam(torch.optim.Adam):
    """Kingma & Ba 2015. The rate is set for each step; `state[weight]` holds tensors alone.

    `rows` are weights of which each row is a thing of its own, as in a table of classes, and not a map.
    """

    def __init__(self, weights: Iterable[nn.Parameter], betas: tuple[float, float], rows: Iterable[Tensor] = ()):
        super().__init__(weights, lr=1.0, betas=betas, eps=1e-8, fused=True)

    def moments(self, weight: Tensor) -> tuple[str, ...]:
        """What is kept of a weight, in its shape."""
        return ("exp_avg", "exp_avg_sq")

    def begin(self, weight: Tensor) -> None:
        """The state before the first step, where there is none."""
        state = self.state[weight]
        state.setdefault("step", torch.zeros((), dtype=torch.float32, device=weight.device))
        for moment in self.moments(weight):
            state.setdefault(moment, torch.zeros_like(weight))


class Muon(Adam):
    """Steps along the nearest orthogonal matrix to the momentum, for matrices; Adam for the rest (Jordan et al. 2024).

    The rest are vectors, narrow matrices, and `rows`, of which a batch has seen only some: an orthogonal step would
    move the others as far. A convolution is a matrix with a row for each output. Its step is scaled so that its values
    have the root mean square of the rate, which is about that of an early step of Adam: one rate does for both (as Liu
    et al. 2025, who take a fifth of it).
    """

    def __init__(self, weights: Iterable[nn.Parameter], betas: tuple[float, float], rows: Iterable[Tensor] = ()):
        super().__init__(weights, betas, rows)
        self.rows = set(map(id, rows))

    def moments(self, weight: Tensor) -> tuple[str, ...]:
        return ("momentum",) if self.takes(weight) else super().moments(weight)

    def takes(self, weight: Tensor) -> bool:
        return is_matrix(weight) and id(weight) not in self.rows

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        (group,) = self.param_groups
        alike: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
        for weight in filter(self.takes, group["params"]):
            if weight.grad is not None:
                alike[len(weight), weight[0].numel()].append(weight)
        for shape, weights in alike.items():  # those of one shape at once, which on a card is a tenth of the launches
            directions = orthogonal(torch.stack([self._direction(weight) for weight in weights]))
            for weight, direction in zip(weights, directions, strict=True):
                weight.sub_(direction.view(weight.shape), alpha=group["lr"] * max(shape) ** 0.5)
        super().step()

    def _direction(self, weight: Tensor) -> Float[Tensor, "n m"]:
        """The momentum, as Nesterov looks ahead. Takes the gradient away, so that Adam passes the weight by."""
        gradient, weight.grad = weight.grad, None
        assert gradient is not None
        self.begin(weight)
        self.state[weight]["step"] += 1
        momentum = self.state[weight]["momentum"].lerp_(gradient, 1 - MOMENTUM)
        return gradient.lerp(momentum, MOMENTUM).flatten(1)


def is_matrix(weight: Tensor) -> bool:
    return weight.ndim > 1 and min(len(weight), weight[0].numel()) >= NARROW


def orthogonal(matrices: Float[Tensor, "b n m"]) -> Float[Tensor, "b n m"]:
    """About U Vᵀ of each decomposition U S Vᵀ by singular values: a polynomial that is odd in S (Newton and Schulz)."""
    a, b, c = QUINTIC
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-20)
    for _ in range(ROUNDS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def optimizer_of(name: str, network: nn.Module, betas: tuple[float, float]) -> Adam:
    """Of all weights of a network, which says what its tables are."""
    rows = [each.weight for each in network.modules() if isinstance(each, nn.Embedding)]
    return {"adam": Adam, "muon": Muon}[name](network.parameters(), betas, rows)
