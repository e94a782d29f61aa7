"""One key/value head for a group of heads that loses least: the mathematics of `method="aligned"`.

Averaging heads assumes that component 3 of one head means what component 3 of another does, which
nothing in training asks for. An attention layer computes the same if the values of a head are
multiplied by an invertible matrix and the output projection's columns of its query heads by the
inverse. The same holds for keys and queries, as far as the matrix commutes with the rotary
embedding: a rotation and a scale in every plane that it rotates, any invertible matrix among the
components that it leaves alone. So heads can be turned towards each other before they are merged
(arXiv 2412.20677 does so with rotations). Here both steps are one: the head that the group shares
and the matrices that lead to it are those with the least squared error, a low-rank approximation
with a closed solution, of which rotating and averaging is a special case. A group of one head is
only written in another basis, which changes nothing.

Tensors are float64 on the CPU; biases are a last column of the weights, met by an input of 1.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

_NEGLIGIBLE = 1e-13  # share of the largest energy, of directions that hold rounding only


@dataclass(frozen=True)
class RotaryPlanes:
    """How the rotary embedding treats the components of a head.

    Attributes:
        first: Of every plane that is rotated, one component, int64 ``[planes]``.
        second: And the other one.
        rest: The components that are not rotated, int64.
    """

    first: Tensor
    second: Tensor
    rest: Tensor


@dataclass
class LayerHeads:
    """The weights of one attention layer, head by head.

    Attributes:
        query: ``[heads, key_dim, inputs + 1]``.
        key: ``[kv_heads, key_dim, inputs + 1]``.
        value: ``[kv_heads, value_dim, inputs + 1]``.
        output: The output projection's columns, ``[heads, outputs, value_dim]``.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor

    def reorder(self, order: list[int]) -> LayerHeads:
        """The same layer with its key/value heads, and the query heads of each, in this order."""
        kv_heads = len(self.key)
        return LayerHeads(
            self.query.unflatten(0, (kv_heads, -1))[order].flatten(0, 1),
            self.key[order],
            self.value[order],
            self.output.unflatten(0, (kv_heads, -1))[order].flatten(0, 1),
        )


def group_heads(
    layer: LayerHeads,
    new_heads: int,
    planes: RotaryPlanes | None,
    covariance: Tensor | None = None,
) -> list[int]:
    """Put heads that merge well next to each other.

    Args:
        layer: The weights.
        new_heads: Groups, all of the same size.
        planes: As `merge_heads` takes them.
        covariance: As `merge_heads` takes it.

    Returns:
        An order of the key/value heads; consecutive ones form a group. It is found by exchanging
        heads between groups, beginning with the present order, until no exchange lowers the sum of
        the pairwise losses; so it depends on nothing but the weights.
    """
    heads = len(layer.key)
    size = heads // new_heads
    order = list(range(heads))
    if new_heads in (1, heads):
        return order
    loss = _pair_losses(layer, planes, covariance)

    def change(a: int, b: int) -> float:
        """Of the sum of losses, when the heads at two places are exchanged."""
        of_a = [order[i] for i in range(a // size * size, (a // size + 1) * size) if i != a]
        of_b = [order[i] for i in range(b // size * size, (b // size + 1) * size) if i != b]
        one, other = order[a], order[b]
        return float(
            loss[one, of_b].sum() + loss[other, of_a].sum()
            - loss[one, of_a].sum() - loss[other, of_b].sum()
        )  # fmt: skip

    threshold = -1e-9 * float(loss.sum())
    while True:
        between = [
            (a, b) for a, b in itertools.combinations(range(heads), 2) if a // size != b // size
        ]
        best = min(between, key=lambda pair: change(*pair))
        if not change(*best) < threshold:  # losses that overflowed end it too
            # Groups and heads within them in the order of the heads, to move no more than needed.
            groups = sorted(sorted(order[i : i + size]) for i in range(0, heads, size))
            return [head for group in groups for head in group]
        a, b = best
        order[a], order[b] = order[b], order[a]


def merge_heads(
    layer: LayerHeads,
    new_heads: int,
    planes: RotaryPlanes | None,
    covariance: Tensor | None = None,
) -> LayerHeads:
    """Merge consecutive key/value heads into the head that stands for all of them best.

    For values it minimises, over all shared heads and all matrices `M_i`, the squared error
    of `O_i V_i` against `O_i M_i V` summed over the group; for keys, plane by plane, that of `K_i`
    against `z_i K` with complex `z_i`, weighted by the energy of the queries that meet it. The
    matrices are then taken up by queries and output projection.

    Args:
        layer: The weights.
        new_heads: Key/value heads afterwards, a divisor of those of `layer`.
        planes: What the rotary embedding rotates. None where something stands between projection
            and rotation (a norm over keys): keys are then averaged and queries stay.
        covariance: Second moment of the layer's inputs with a 1 appended,
            ``[inputs + 1, inputs + 1]``. None takes independent inputs of size 1.

    Returns:
        The new weights, `query` and `output` with as many heads as before.
    """
    groups = len(layer.key) // new_heads
    value_gram = _gram(layer.value, covariance)
    output_energy = _per_kv_head(layer.output.mT @ layer.output, len(layer.key))
    value, onto_value = _shared(layer.value, value_gram, output_energy, groups)
    output = layer.output @ _per_query_head(onto_value, len(layer.output))

    if planes is None:
        key = layer.key.unflatten(0, (new_heads, groups)).mean(1)
        return LayerHeads(layer.query.clone(), key, value, output)
    key = torch.empty_like(layer.key[::groups])
    query = layer.query.clone()
    key_gram = _gram(layer.key, covariance)
    query_energy = _per_kv_head(_own_gram(layer.query, covariance), len(layer.key))
    if len(planes.rest):
        rest = planes.rest
        part = key_gram[:, rest][..., rest]
        key[:, rest], onto_rest = _shared(
            layer.key[:, rest], part, query_energy[:, rest][..., rest], groups
        )
        # q · (M k) = (Mᵀ q) · k
        query[:, rest] = _per_query_head(onto_rest, len(query)).mT @ layer.query[:, rest]
    if len(planes.first):
        _merge_planes(layer, planes, key_gram, query_energy, groups, key, query)
    return LayerHeads(query, key, value, output)


def _shared(heads: Tensor, gram: Tensor, metric: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """The best shared head of each group, and the matrices that lead from it to the heads.

    Args:
        heads: ``[heads, dim, inputs]``.
        gram: Inner products of all rows under the inputs' covariance, ``[heads, dim, heads, dim]``
            as `_gram` makes them.
        metric: What an error in a head's components costs, ``[heads, dim, dim]``.
        group: Heads per group.

    Returns:
        Shared heads ``[groups, dim, inputs]`` and matrices ``[heads, dim, dim]`` so that
        ``heads ≈ matrices @ shared``.
    """
    roots = _root(metric)
    shared, matrices = [], []
    for start in range(0, len(heads), group):
        members = slice(start, start + group)
        dim = heads.shape[1]
        own = gram[members, :, members]  # [group, dim, group, dim]
        weighted = torch.einsum("iab,ibjc,jdc->iajd", roots[members], own, roots[members])
        energies, vectors = torch.linalg.eigh(weighted.reshape(group * dim, group * dim))
        energies, vectors = energies[-dim:], vectors[:, -dim:]
        kept = energies > _NEGLIGIBLE * energies[-1]
        inverse = torch.where(kept, energies, 1).rsqrt() * kept
        # Rows of equal energy, as large together as the heads were on average.
        size = (own.diagonal(dim1=0, dim2=2).diagonal(dim1=0, dim2=1).sum() / (group * dim)).sqrt()
        combine = (size * inverse)[:, None] * vectors.mT
        combine = combine.unflatten(1, (group, dim)).transpose(0, 1) @ roots[members]
        shared.append((combine @ heads[members]).sum(0))
        # heads C sharedᵀ (shared C sharedᵀ)⁻¹, where the latter is the identity times size².
        onto = torch.einsum("iajb,jcb->iac", own, combine)
        matrices.append(onto / size.square().clamp_min(torch.finfo(onto.dtype).tiny))
    return torch.stack(shared), torch.cat(matrices)


def _merge_planes(
    layer: LayerHeads,
    planes: RotaryPlanes,
    gram: Tensor,
    query_energy: Tensor,
    group: int,
    key: Tensor,
    query: Tensor,
) -> None:
    """The same in every plane of the rotary embedding; writes into the last two arguments.

    A plane's two rows a and b are one complex row a + ib, and its rotations complex factors.
    """
    first, second = planes.first, planes.second
    inner = _plane_products(gram, planes)  # [planes, heads, heads]
    energy = query_energy.diagonal(dim1=1, dim2=2)
    weight = (energy[:, first] + energy[:, second]).mT.sqrt()  # [planes, heads]
    rows = torch.complex(layer.key[:, first], layer.key[:, second])  # [heads, planes, inputs]
    factors = torch.empty(weight.shape, dtype=inner.dtype)
    for number, start in enumerate(range(0, len(rows), group)):
        members = slice(start, start + group)
        own, by = inner[:, members, members], weight[:, members]
        energies, vectors = torch.linalg.eigh(by[:, :, None] * own * by[:, None])
        largest, vector = energies[:, -1], vectors[:, :, -1]
        size = (own.diagonal(dim1=1, dim2=2).real.mean(1)).sqrt()
        kept = largest > _NEGLIGIBLE * largest.amax().clamp_min(torch.finfo(size.dtype).tiny)
        scale = torch.where(kept, largest, 1).rsqrt() * kept * size
        combine = scale[:, None] * vector.conj() * by  # [planes, group]
        shared = torch.einsum("pi,ipx->px", combine, rows[members])
        key[number, first], key[number, second] = shared.real, shared.imag
        onto = torch.einsum("pij,pj->pi", own, combine.conj())
        factors[:, members] = onto / size.square().clamp_min(torch.finfo(size.dtype).tiny)[:, None]
    # Re(conj(q) z k) = Re(conj(conj(z) q) k)
    asked = torch.complex(layer.query[:, first], layer.query[:, second])
    turned = _per_query_head(factors.mT.conj(), len(asked))[..., None] * asked
    query[:, first], query[:, second] = turned.real, turned.imag


def _plane_products(gram: Tensor, planes: RotaryPlanes) -> Tensor:
    """Complex inner products of the heads' rows in every plane, ``[planes, heads, heads]``."""
    first, second = planes.first, planes.second
    aa, bb = gram[:, first][..., first], gram[:, second][..., second]
    ba, ab = gram[:, second][..., first], gram[:, first][..., second]
    same = lambda x: x.diagonal(dim1=1, dim2=3).permute(2, 0, 1)  # noqa: E731
    return torch.complex(same(aa) + same(bb), same(ba) - same(ab))


def _pair_losses(
    layer: LayerHeads, planes: RotaryPlanes | None, covariance: Tensor | None
) -> Tensor:
    """What merging two heads would lose, for all pairs: ``[heads, heads]``, share of all energy."""
    heads = len(layer.key)
    key_gram = _gram(layer.key, covariance)
    loss = _subspace_losses(
        _gram(layer.value, covariance), _per_kv_head(layer.output.mT @ layer.output, heads)
    )
    if planes is None:
        norms = key_gram.diagonal(dim1=0, dim2=2).diagonal(dim1=0, dim2=1).sum(1)
        products = key_gram.diagonal(dim1=1, dim2=3).sum(-1)
        return loss + (norms[:, None] + norms - 2 * products) / (2 * norms.sum())
    query_energy = _per_kv_head(_own_gram(layer.query, covariance), heads)
    if len(planes.rest):
        rest = planes.rest
        loss += _subspace_losses(key_gram[:, rest][..., rest], query_energy[:, rest][..., rest])
    if len(planes.first):
        energy = query_energy.diagonal(dim1=1, dim2=2)
        weight = (energy[:, planes.first] + energy[:, planes.second]).mT.sqrt()
        inner = weight[:, :, None] * _plane_products(key_gram, planes) * weight[:, None]
        own = inner.diagonal(dim1=1, dim2=2).real
        total = own[:, :, None] + own[:, None]
        gap = own[:, :, None] - own[:, None]
        # The smaller eigenvalue of every 2 × 2 matrix of products.
        smaller = (total - (gap.square() + 4 * inner.abs().square()).sqrt()) / 2
        loss += smaller.sum(0) / own.sum()
    return loss


def _subspace_losses(gram: Tensor, metric: Tensor) -> Tensor:
    heads, dim = gram.shape[:2]
    roots = _root(metric)
    weighted = torch.einsum("iab,ibjc,jdc->iajd", roots, gram, roots)
    loss = torch.zeros(heads, heads, dtype=gram.dtype)
    for i, j in itertools.combinations(range(heads), 2):
        pair = torch.tensor([i, j])
        matrix = weighted[pair][:, :, pair].reshape(2 * dim, 2 * dim)
        loss[i, j] = loss[j, i] = torch.linalg.eigvalsh(matrix)[:dim].sum()
    total = weighted.diagonal(dim1=0, dim2=2).diagonal(dim1=0, dim2=1).sum()
    return loss / total.clamp_min(torch.finfo(loss.dtype).tiny)


def _gram(heads: Tensor, covariance: Tensor | None) -> Tensor:
    """Inner products of all heads' rows under the covariance, ``[heads, dim, heads, dim]``."""
    flat = heads.flatten(0, 1)
    products = flat @ flat.mT if covariance is None else flat @ covariance @ flat.mT
    return products.reshape(*heads.shape[:2], *heads.shape[:2])


def _own_gram(heads: Tensor, covariance: Tensor | None) -> Tensor:
    """Inner products of the rows of each head, ``[heads, dim, dim]``."""
    return heads @ heads.mT if covariance is None else heads @ covariance @ heads.mT


def _root(matrices: Tensor) -> Tensor:
    """Symmetric square roots of positive semidefinite matrices."""
    energies, vectors = torch.linalg.eigh(matrices)
    return (vectors * energies.clamp_min(0).sqrt()[:, None]) @ vectors.mT


def _per_kv_head(of_query_heads: Tensor, kv_heads: int) -> Tensor:
    return of_query_heads.unflatten(0, (kv_heads, -1)).sum(1)


def _per_query_head(of_kv_heads: Tensor, query_heads: int) -> Tensor:
    return of_kv_heads.repeat_interleave(query_heads // len(of_kv_heads), 0)
