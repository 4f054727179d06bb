"""Codes and levels of a weight that make its layer's output error small.

Law, with H = 2/n sum x xᵀ damped as in `gptq`, H = R Rᵀ, U = R⁻¹, E = W - Ŵ:

    minimise   tr(E H Eᵀ)

1. Feedback: group after group of columns, levels fitted to the already compensated columns in the
   metric R_gg R_ggᵀ (weight objective), then column after column the nearest level, whose error
   the columns still open absorb (output objective): ShiftAddLLM's multi-objective fit, with the
   GPTQ loop of `gptq`.
2. Descent, ROUNDS times, each step of which lowers the loss: per group, least squares for its
   parameters given all codes, dparams = (Bᵀ H_gg B)⁻¹ Bᵀ (E H)_g; per column, the level nearest to
   ŵ_j + (E H)_j / H_jj. E H is kept up to date, so that a sweep costs one product with H.

Rows may be normalised to rms 1 first (groups shared by rows need it); columns may be taken in the
order of falling diag H, which also puts outlier channels into groups of their own.
Sources: ShiftAddLLM (binary coding, multi-objective); GPTQ; QuantEase (coordinate descent).
"""

import torch
from torch import Tensor

from ridgeline.passes.quantization.codec import Codec, QuantizedWeight
from ridgeline.passes.quantization.fit import fit, least_squares
from ridgeline.passes.quantization.gptq import checked_hessian, factorize
from ridgeline.passes.quantization.grid import checked
from ridgeline.passes.quantization.levels import Levels, assemble, basis, scale_dtype, stored

DAMP = 0.01
ROUNDS = 2


Factors = tuple[Tensor, Tensor, Tensor]


def factors_of(hessian: Tensor, damp: float = DAMP) -> Factors:
    """(R, U, damped H) of the law, fp32 [K,K]: for K in the thousands most of the time of encoding
    a few rows, and alike for all codecs whose columns keep their order."""
    factor, inverse = factorize(hessian, damp)
    return factor, inverse, factor @ factor.T


def descend(
    weight: Tensor,
    codec: Codec,
    hessian: Tensor,
    *,
    damp: float = DAMP,
    rounds: int = ROUNDS,
    factors: Factors | None = None,
) -> QuantizedWeight:
    """`weight` [N,K] in `codec` against `hessian` [K,K] = 2/n sum x xᵀ.

    factors: `factors_of(hessian, damp)`, if known; not read where columns are taken in an order of
        their own.
    Raises QuantizationError as `gptq` does, and for a codec whose levels are not linear.
    """
    weight = checked(weight)
    hessian = checked_hessian(hessian, weight)
    order = row_scale = None
    if codec.act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
        weight, hessian, factors = weight[:, order], hessian[order][:, order], None
    if codec.row_scale:
        row_scale = weight.square().mean(1).sqrt()
        row_scale = torch.where(row_scale > 0, row_scale, 1.0).to(scale_dtype(weight))
        weight = weight / row_scale.float().unsqueeze(1)
    state = _State(weight, codec, factors or factors_of(hessian, damp), row_scale)
    state.feed_back()
    for _ in range(rounds):
        state.refit()
        state.recode()
    codes = state.codes.to(torch.uint8)
    if order is not None:  # two bytes a column, where they reach that far
        order = order.to(torch.int16 if len(order) < 2**15 else torch.int32)
    return assemble(codes, state.params, codec, state.dtype, row_scale, order)


class _State:
    """codes [N,K], values [N,K] = ŵ, params [R,G,P]; rows are padded to whole groups of rows."""

    def __init__(
        self,
        weight: Tensor,
        codec: Codec,
        factors: Factors,
        row_scale: Tensor | None,
    ) -> None:
        self.weight, self.codec = weight, codec
        self.dtype = scale_dtype(weight)
        self.factor, self.inverse, self.metric = factors
        self.table = basis(codec).to(weight.device)
        self.codes = torch.zeros(weight.shape, dtype=torch.int64, device=weight.device)
        self.values = torch.zeros_like(weight)
        rows, columns = weight.shape
        self.sharing = min(codec.group_rows, rows)
        self.row_groups = -(-rows // self.sharing)
        self.params = weight.new_zeros(self.row_groups, codec.groups(columns), self.table.shape[1])
        importance = weight.new_ones(rows) if row_scale is None else row_scale.float().square()
        self.row_weight = self._by_group(importance.unsqueeze(1)).squeeze(-1)

    def spans(self):
        """(group, first column, end) of every group."""
        size, columns = self.codec.group_size, self.weight.shape[1]
        for group in range(self.params.shape[1]):
            yield group, group * size, min(columns, group * size + size)

    def _by_group(self, x: Tensor) -> Tensor:
        """[N,m] -> [R, rows, m], short last row groups filled with zeros."""
        missing = self.row_groups * self.sharing - len(x)
        if missing:
            x = torch.cat([x, x.new_zeros(missing, x.shape[1])])
        return x.view(self.row_groups, self.sharing, -1)

    def _levels(self, group: int) -> Levels:
        """A row's own in each row."""
        levels = self.params[:, group] @ self.table.T
        if self.sharing > 1:
            levels = levels.repeat_interleave(self.sharing, 0)[: len(self.weight)]
        return Levels(levels)

    def feed_back(self) -> None:
        """Step 1 of the law."""
        work, inverse = self.weight.clone(), self.inverse
        for group, start, stop in self.spans():
            corner = self.factor[start:stop, start:stop]
            block = work[:, start:stop].clone()
            self.params[:, group] = fit(
                self._by_group(block), corner @ corner.T, self.codec, self.dtype, self.row_weight
            )
            levels, errors = self._levels(group), torch.zeros_like(block)
            for i in range(stop - start):
                at = start + i
                code, value = levels.nearest(block[:, i : i + 1])
                self.codes[:, at], self.values[:, at] = code[:, 0], value[:, 0]
                error = (block[:, i : i + 1] - value) / inverse[at, at]
                block[:, i + 1 :] -= error * inverse[at, at + 1 : stop]
                errors[:, i] = error[:, 0]
            work[:, stop:] -= errors @ inverse[start:stop, stop:]

    def refit(self) -> None:
        """Least squares for the parameters of one group after the other, all codes fixed; kept in
        the groups whose loss it lowers once it is rounded for storage."""
        pull = (self.weight - self.values) @ self.metric
        for group, start, stop in self.spans():
            metric = self.metric[start:stop, start:stop]
            signs = self.table[self.codes[:, start:stop]]
            grouped = self._by_group(signs.flatten(1)).unflatten(-1, signs.shape[1:])
            gradient = self._by_group(pull[:, start:stop])
            step = least_squares(grouped, metric, gradient, self.row_weight)
            new = stored(self.params[:, group] + step, self.codec, self.dtype)
            moved = torch.einsum("rngp,rp->rng", grouped, new - self.params[:, group])
            gain = (((2 * gradient - moved @ metric) * moved).sum(-1) * self.row_weight).sum(-1)
            wins = gain > 0
            self.params[:, group] = torch.where(wins[:, None], new, self.params[:, group])
            moved = (moved * wins[:, None, None]).flatten(0, 1)[: len(self.weight)]
            self.values[:, start:stop] += moved
            pull -= moved @ self.metric[start:stop]

    def recode(self) -> None:
        """Every column's codes, one column after the other, all parameters fixed."""
        pull, diagonal = (self.weight - self.values) @ self.metric, self.metric.diagonal()
        for group, start, stop in self.spans():
            levels, near = self._levels(group), pull[:, start:stop].clone()
            before = self.values[:, start:stop].clone()
            for i in range(stop - start):
                at = start + i
                target = before[:, i : i + 1] + near[:, i : i + 1] / diagonal[at]
                code, value = levels.nearest(target)
                self.codes[:, at], self.values[:, at] = code[:, 0], value[:, 0]
                step = value - before[:, i : i + 1]
                near[:, i + 1 :] -= step * self.metric[at, at + 1 : stop]
            pull -= (self.values[:, start:stop] - before) @ self.metric[start:stop]
