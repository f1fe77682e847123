"""Random numbers as a function of a seed and of their place, without a generator.

A number does not depend on how many others are drawn, on the device or on the state of any generator, so a text meets
the same ones in training and evaluation, in any batch and with any padding.
"""

import torch

MASK = 2**32 - 1


def seeded_uniform(seed: int, *places: torch.Tensor) -> torch.Tensor:
    """Uniform in [0, 1), float32. places: integer tensors that broadcast; the result has their common shape."""
    state = torch.as_tensor(seed, device=places[0].device)
    for place in places:
        state = _scramble(_scramble(state) + place)
    return (state >> 8) / 2**24


def seeded_normal(seed: int, *places: torch.Tensor) -> torch.Tensor:
    """Standard normal, float32, by Box and Muller."""
    radius, angle = (seeded_uniform(2 * seed + part, *places) for part in (0, 1))
    return (-2 * (1 - radius).log()).sqrt() * (2 * torch.pi * angle).cos()


def _scramble(numbers: torch.Tensor) -> torch.Tensor:
    """A bijection of 32-bit integers (held in 64 bits) that leaves no visible order."""
    numbers = (numbers + 0x9E3779B9) & MASK
    for _ in range(2):
        numbers = ((numbers ^ (numbers >> 16)) * 0x45D9F3B) & MASK
    return numbers ^ (numbers >> 16)
