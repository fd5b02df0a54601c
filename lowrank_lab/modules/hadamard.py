"""Orthogonal transforms that spread a vector over all coordinates: Hadamard matrices, of any width.

A Hadamard matrix has entries ±1 and orthogonal rows. Of the orders built here are 2, q + 1 and 2 (q + 1) for prime
powers q (Paley 1933), and all their products, so nearly every width of a model: 576 = 36 · 16, 1536 = 12 · 128,
11008 = 344 · 32. What is left of a width without one, such as an odd rank, is transformed by the orthonormal
DCT-II, whose entries are at most √2 larger.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

RADIX = 64  # of the fast transform: a product with a matrix this large is quicker than six passes over memory
LARGEST = 1024  # of Paley's matrices, whose product is not a fast one


def transform(x: Tensor) -> Tensor:
    """``x`` (..., n) times the orthogonal ``matrix(n)``, in the dtype and on the device of ``x``."""
    width, shape = x.shape[-1], x.shape
    sizes = pieces(width)
    after = width
    for size in sizes:  # the Kronecker product works on one axis of a grid after the other
        after //= size
        x = x.reshape(-1, size, after)
        of_piece = _piece(size, x.dtype, x.device)
        x = x.squeeze(-1) @ of_piece if after == 1 else of_piece.T @ x
    return x.reshape(shape)


def matrix(width: int) -> Tensor:
    """The orthogonal matrix H (n, n), float64, that ``transform`` multiplies with from the right."""
    product = torch.ones(1, 1, dtype=torch.float64)
    for size in pieces(width):
        product = torch.kron(product, _orthogonal(size))
    return product


def randomized(width: int, seed: int) -> Tensor:
    """diag(s) H (n, n), float64, with random signs s: QuIP#'s and QuaRot's randomised Hadamard matrix."""
    signs = torch.randint(2, (width, 1), generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return signs * matrix(width)


@cache
def pieces(width: int) -> tuple[int, ...]:
    """The sizes of the matrices whose Kronecker product is ``matrix(width)``; at most the first is a DCT."""
    divisors = (width // rest for rest in range(1, width + 1) if width % rest == 0)
    whole = next(size for size in divisors if _orders(size) is not None)  # the largest
    dct = (width // whole,) if width > whole else ()
    orders = _orders(whole)
    assert orders is not None
    return dct + orders


@cache
def _orders(width: int) -> tuple[int, ...] | None:
    """Orders of Hadamard matrices with the product ``width``, Paley's first; None where none are known."""
    if width & (width - 1) == 0:
        fast = [RADIX] * int(math.log2(width) // math.log2(RADIX))
        return tuple(size for size in (width // math.prod(fast), *fast) if size > 1)
    for order in range(12, min(width, LARGEST) + 1, 4):
        if width % order == 0 and order & (order - 1) and _paley_field(order):
            rest = _orders(width // order)
            if rest is not None:
                return order, *rest
    return None


@cache
@torch.inference_mode(False)  # as it is cached, and other callers need gradients through it
def _piece(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return _orthogonal(size).to(device, dtype)


def _orthogonal(size: int) -> Tensor:
    """One orthogonal matrix (size, size), float64: a Hadamard matrix if one is known, else the DCT-II."""
    if size & (size - 1) == 0:
        return _sylvester(size) / math.sqrt(size)
    if _orders(size) is not None:
        return _paley(size) / math.sqrt(size)
    k, i = torch.arange(size, dtype=torch.float64), torch.arange(size, dtype=torch.float64).view(-1, 1)
    cosines = torch.cos(math.pi * (2 * i + 1) * k / (2 * size)) * math.sqrt(2 / size)
    cosines[:, 0] /= math.sqrt(2)
    return cosines


def _sylvester(order: int) -> Tensor:
    product, two = torch.ones(1, 1, dtype=torch.float64), torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double()
    while len(product) < order:
        product = torch.kron(product, two)
    return product


def _paley(order: int) -> Tensor:
    """Paley's Hadamard matrix (order, order) of ±1: I + S, or S ⊗ [1 1; 1 −1] + I ⊗ [1 −1; −1 −1].

    S is the conference matrix of the quadratic residues of the field with q = order − 1 or order / 2 − 1 elements.
    """
    field = _paley_field(order)
    assert field is not None
    prime, degree = field
    count = prime**degree
    residues = _residues(prime, degree)
    sign = -1.0 if count % 4 == 3 else 1.0
    conference = torch.zeros(count + 1, count + 1, dtype=torch.float64)
    conference[0, 1:], conference[1:, 0] = 1.0, sign
    conference[1:, 1:] = residues[_differences(prime, degree)]
    one = torch.eye(count + 1, dtype=torch.float64)
    if sign < 0:
        return one + conference
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double()
    return torch.kron(conference, two) + torch.kron(one, torch.tensor([[1.0, -1.0], [-1.0, -1.0]]).double())


@cache
def _paley_field(order: int) -> tuple[int, int] | None:
    """Prime p and degree e of the field of p^e elements that gives a matrix of ``order``; None without one."""
    for count, residue in ((order - 1, 3), (order // 2 - 1, 1)):
        prime = next((d for d in range(3, count + 1, 2) if count % d == 0), 0)  # the smallest divisor
        degree = round(math.log(count, prime)) if prime else 0
        if count % 4 == residue and prime and prime**degree == count and degree <= 3:
            return prime, degree
    return None


def _digits(prime: int, degree: int) -> Tensor:
    """The elements of the field as polynomials (p^e, e), int64: element i has the digits of i to base p."""
    return torch.arange(prime**degree).unsqueeze(1) // prime ** torch.arange(degree) % prime


def _differences(prime: int, degree: int) -> Tensor:
    """The number of the element a − b, for all pairs: (p^e, p^e)."""
    digits = _digits(prime, degree)
    return ((digits.unsqueeze(1) - digits) % prime * prime ** torch.arange(degree)).sum(-1)


def _residues(prime: int, degree: int) -> Tensor:
    """The quadratic character (p^e,), float64, of every element: 1 for a square, −1 for none, 0 for zero."""
    digits, powers = _digits(prime, degree), prime ** torch.arange(degree)
    square = torch.zeros(len(digits), 2 * degree - 1, dtype=torch.int64)
    for i in range(degree):
        for j in range(degree):
            square[:, i + j] += digits[:, i] * digits[:, j]
    if degree > 1:
        # x^e = modulus(x). A polynomial of degree 2 or 3 without a root is irreducible.
        values = torch.arange(prime)
        candidates = (
            c
            for c in digits
            if ((values**degree - (values.unsqueeze(1) ** torch.arange(degree)) @ c) % prime).all()
        )
        modulus = next(candidates)
        for top in range(2 * degree - 2, degree - 1, -1):
            square[:, top - degree : top] += square[:, top : top + 1] * modulus
    squares = (square[:, :degree] % prime * powers).sum(1)
    character = torch.full((len(digits),), -1.0, dtype=torch.float64)
    character[squares] = 1.0
    character[0] = 0.0
    return character
