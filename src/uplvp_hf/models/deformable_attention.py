"""Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159, eq. 3) without a compiled extension.

transformers' version samples every point of every head into a stack of (batch * heads, C, queries, levels * points)
and keeps it for the backward pass. Here, on CPUs, a query's result is one weighted sum of rows of the value table, four
rows (the bilinear corners) a point: a sparse matrix times a dense one, forward and backward, with nothing of that size
kept. On accelerators, and while a model is traced, transformers' `grid_sample` version is used.
"""

import warnings

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerPixelDecoderEncoderLayer,
    Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention,
    multi_scale_deformable_attention,
)

Sizes = list[tuple[int, int]]


class DeformableAttention(Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention):
    """transformers' module with the same parameters and results (to rounding), faster and leaner on CPUs."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        position_embeddings: Tensor | None = None,
        reference_points: Tensor | None = None,
        spatial_shapes_list: Sizes | None = None,
        level_start_index: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """hidden_states (B, Q, D), encoder_hidden_states (B, S, D), attention_mask (B, S) True on padding,
        reference_points (B, Q, L, 2) in [0, 1] -> (B, Q, D) and the weights (B, Q, heads, L, points)."""
        batch, count, _ = hidden_states.shape
        heads, levels, points = self.n_heads, self.n_levels, self.n_points
        asking = self.with_pos_embed(hidden_states, position_embeddings)
        value = self.value_proj(encoder_hidden_states)
        if attention_mask is not None:
            value = value.masked_fill(attention_mask[..., None], 0.0)
        value = value.view(batch, -1, heads, self.d_model // heads)
        offsets = self.sampling_offsets(asking).view(batch, count, heads, levels, points, 2)
        weights = self.attention_weights(asking).view(batch, count, heads, levels * points)
        weights = F.softmax(weights, -1).view(batch, count, heads, levels, points)
        sampled = sample_levels(value, spatial_shapes_list, reference_points, offsets, weights)
        return self.output_proj(sampled), weights


class DeformableEncoderLayer(Mask2FormerPixelDecoderEncoderLayer):
    """transformers' layer without its test for infinities, which waits for the device in every layer."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *places,
        output_attentions: bool = False,
        **named_places,
    ) -> tuple[Tensor, ...]:
        """Tokens (B, S, D) of all levels -> (tokens,), with the attention weights (heads, B, ...) if asked for.

        places: position embeddings, reference points and sizes of the levels, as `DeformableAttention` takes them.
        """
        attended, weights = self.self_attn(
            hidden_states, attention_mask, hidden_states, attention_mask, *places, **named_places
        )
        hidden = hidden_states + F.dropout(attended, self.dropout, self.training)
        hidden = self.self_attn_layer_norm(hidden)
        inner = F.dropout(F.relu(self.fc1(hidden), inplace=True), self.activation_dropout, self.training)
        hidden = hidden + F.dropout(self.fc2(inner), self.dropout, self.training)
        hidden = self.final_layer_norm(hidden)
        if self.training and hidden.dtype == torch.float16:
            limit = torch.finfo(hidden.dtype).max - 1000
            hidden = hidden.clamp(min=-limit, max=limit)
        return (hidden, weights.transpose(1, 0)) if output_attentions else (hidden,)


def use_deformable_attention(encoder: torch.nn.Module) -> None:
    """Turns the layers of transformers' pixel decoder encoder into ours. Parameters stay the same objects."""
    for layer in encoder.layers:
        layer.__class__ = DeformableEncoderLayer
        layer.self_attn.__class__ = DeformableAttention


def sample_levels(value: Tensor, sizes: Sizes, reference: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of bilinear samples over all levels and points, zeros outside the maps.

    value (B, S, heads, C): the maps of `sizes` (h, w), flattened and joined; reference (B, Q, L, 2): x and y in [0, 1];
    offsets (B, Q, heads, L, P, 2): in cells of each level; weights (B, Q, heads, L, P) -> (B, Q, heads * C).
    """
    if value.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        scale = offsets.new_tensor([[width, height] for height, width in sizes])
        locations = reference[:, :, None, :, None] + offsets / scale[:, None]
        return multi_scale_deformable_attention(value, sizes, locations.to(value.dtype), weights)
    # Rows are summed in single precision: half-precision kernels of CPUs are slower and less exact.
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    with torch.autocast("cpu", enabled=False):
        sampled = _SampleRows.apply(
            value.to(dtype), offsets.to(dtype), weights.to(dtype), reference.to(dtype), tuple(sizes)
        )
    return sampled.to(value.dtype)


class _Corners:
    """The four cells around every point. M = B * Q * heads; cells in the order (y0, x0), (y0, x1), (y1, x0), (y1, x1).

    x, y (L, P, M): how far the point is from the lower cell, in [0, 1). rows (M, 4 * L * P): the cells' rows in the
    table of `_table`. Everything is computed with M last, where it is contiguous.
    """

    def __init__(self, offsets: Tensor, reference: Tensor, sizes: Sizes):
        batch, count, heads, levels, points, _ = offsets.shape
        self.shape = (levels, points, batch * count * heads)
        position = _columns(offsets).view(levels, points, 2, -1)
        cells = offsets.new_tensor([[[width], [height]] for height, width in sizes])[:, None]  # (L, 1, 2, 1)
        reference = reference.permute(2, 3, 0, 1).flatten(2).repeat_interleave(heads, 2)[:, None]
        # In the order of grid_sample: where a point falls on a cell exactly, as those of fresh weights do, rounding
        # decides which of two slopes its gradient is.
        position = position.div_(cells).add_(reference).mul_(2).sub_(1).add_(1).mul_(cells / 2).sub_(0.5)
        base = position.floor()
        self.x, self.y = position.sub_(base).unbind(2)
        base.nan_to_num_()  # rows of a diverged model are rows too; its weights stay NaN
        rims = [(height + 2) * (width + 2) for height, width in sizes]
        tokens = batch * sum(rims) * heads
        whole = torch.int32 if max(tokens, 4 * offsets.numel()) < 2**31 else torch.int64
        image = torch.arange(batch, dtype=whole)[:, None, None] * (sum(rims) * heads)
        first = (image + torch.arange(heads, dtype=whole)).expand(batch, count, heads).reshape(-1)
        rows = torch.empty((4, *self.shape), dtype=whole)
        for level, (height, width) in enumerate(sizes):
            left, right = (((base[level, :, 0] + step).clamp_(0, width + 1)).to(whole).mul_(heads) for step in (1, 2))
            start = first + sum(rims[:level]) * heads
            for side, step in enumerate((1, 2)):
                row = (base[level, :, 1] + step).clamp_(0, height + 1).to(whole).mul_((width + 2) * heads).add_(start)
                torch.add(row, left, out=rows[2 * side, level])
                torch.add(row, right, out=rows[2 * side + 1, level])
        self.rows = rows.view(-1, self.shape[-1]).T.contiguous()

    def combined(self, weights: Tensor) -> Tensor:
        """Attention weight times bilinear weight of every cell: weights (L, P, M) -> (M, 4 * L * P)."""
        products = torch.empty((4, *self.shape), dtype=weights.dtype)
        lower = weights * self.y
        upper = weights - lower
        for side, row in enumerate((upper, lower)):
            torch.mul(row, self.x, out=products[2 * side + 1])
            torch.sub(row, products[2 * side + 1], out=products[2 * side])
        return products.view(-1, self.shape[-1]).T.contiguous()


class _SampleRows(torch.autograd.Function):
    """(value, offsets, weights) -> (B, Q, heads * C); see `sample_levels`. Cells are found again in the backward pass:
    keeping them would cost many times the memory of the inputs."""

    @staticmethod
    def forward(ctx, value: Tensor, offsets: Tensor, weights: Tensor, reference: Tensor, sizes: Sizes) -> Tensor:
        ctx.save_for_backward(value, offsets, weights, reference)
        ctx.sizes = sizes
        corners = _Corners(offsets, reference, sizes)
        factors = corners.combined(_columns(weights).view(corners.shape))
        result = F.embedding_bag(corners.rows, _table(value, sizes), mode="sum", per_sample_weights=factors)
        return result.view(*offsets.shape[:2], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        value, offsets, weights, reference = ctx.saved_tensors
        corners = _Corners(offsets, reference, ctx.sizes)
        columns = _columns(weights).view(corners.shape)
        table = _table(value, ctx.sizes)
        gradient = gradient.reshape(-1, value.shape[-1])
        to_table = _scatter_rows(corners.rows, corners.combined(columns), gradient, len(table))
        dots = _row_products(corners.rows, gradient, table).T.contiguous().view(4, *corners.shape)
        to_offsets, to_weights = _slopes(corners, columns, dots)
        to_value = _from_table(to_table, value.shape, ctx.sizes)
        return to_value, to_offsets.T.reshape(offsets.shape), to_weights.T.reshape(weights.shape), None, None


def _slopes(corners: _Corners, weights: Tensor, dots: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of offsets (L * P * 2, M) and weights (L * P, M), from <gradient, cell> (4, L, P, M)."""
    upper, lower = (torch.lerp(dots[side], dots[side + 1], corners.x) for side in (0, 2))
    to_weights = torch.lerp(upper, lower, corners.y)
    to_offsets = torch.empty((*corners.shape[:2], 2, corners.shape[2]), dtype=weights.dtype)
    torch.mul(lower.sub_(upper), weights, out=to_offsets[:, :, 1])
    upper, lower = dots[1].sub_(dots[0]), dots[3].sub_(dots[2])
    torch.mul(torch.lerp(upper, lower, corners.y), weights, out=to_offsets[:, :, 0])
    return to_offsets.flatten(0, 2), to_weights.flatten(0, 1)


def _columns(x: Tensor) -> Tensor:
    """(B, Q, heads, ...) -> (everything else, B * Q * heads), contiguous."""
    return x.flatten(3).flatten(0, 2).T.contiguous()


def _table(value: Tensor, sizes: Sizes) -> Tensor:
    """Maps (B, S, heads, C) with a rim of zeros around each: one row a cell and head, (B * S' * heads, C)."""
    batch, _, heads, channels = value.shape
    table = value.new_zeros((batch, sum((height + 2) * (width + 2) for height, width in sizes), heads * channels))
    for inner, piece in zip(_inner(table, sizes), _pieces(value, sizes), strict=True):
        inner.copy_(piece)
    return table.view(-1, channels)


def _from_table(table: Tensor, shape: torch.Size, sizes: Sizes) -> Tensor:
    """The reverse of `_table`: rows without the rims, as (B, S, heads, C)."""
    value = table.new_empty(shape)
    for inner, piece in zip(_inner(table.view(shape[0], -1, shape[2] * shape[3]), sizes), _pieces(value, sizes)):
        piece.copy_(inner)
    return value


def _inner(table: Tensor, sizes: Sizes) -> list[Tensor]:
    """Views (B, h, w, heads * C) of the maps inside the rims of a table (B, S', heads * C)."""
    levels = table.split([(height + 2) * (width + 2) for height, width in sizes], 1)
    return [x.unflatten(1, (h + 2, w + 2))[:, 1:-1, 1:-1] for x, (h, w) in zip(levels, sizes, strict=True)]


def _pieces(value: Tensor, sizes: Sizes) -> list[Tensor]:
    """Views (B, h, w, heads * C) of maps (B, S, heads, C)."""
    levels = value.flatten(2).split([height * width for height, width in sizes], 1)
    return [x.unflatten(1, size) for x, size in zip(levels, sizes, strict=True)]


def _row_ends(rows: Tensor) -> Tensor:
    return torch.arange(0, rows.numel() + 1, rows.shape[1], dtype=rows.dtype)


def _row_products(rows: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """<left[i], right[rows[i, k]]> for all i and k: (M, C), (R, C), rows (M, K) -> (M, K)."""
    with warnings.catch_warnings():  # sparse tensors announce that they are new
        warnings.simplefilter("ignore")
        pattern = torch.sparse_csr_tensor(
            _row_ends(rows), rows.flatten(), left.new_zeros(rows.numel()), size=(len(rows), len(right))
        )
    return torch.sparse.sampled_addmm(pattern, left, right.T, beta=0.0).values().view(rows.shape)


def _scatter_rows(rows: Tensor, weights: Tensor, source: Tensor, count: int) -> Tensor:
    """Sum of weights[i, k] * source[i] into row rows[i, k]: (M, K), (M, K), (M, C) -> (count, C)."""
    from scipy.sparse import csr_array  # here: inference needs no scipy. torch has no product with a transpose

    matrix = csr_array(
        (weights.flatten().numpy(), rows.flatten().numpy(), _row_ends(rows).numpy()), shape=(len(rows), count)
    )
    return torch.from_numpy(matrix.T @ source.contiguous().numpy())
