"""The specification: what each op means, written to be read, in float64 and without speed.

Nothing here is imported by a fast backend, and nothing here imports one.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from kernels.alibi import page_evenness
from kernels.page import PAGE
from kernels.tiles import ALIKE, SAMPLES, TURN

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cache import LayerCache, Rows, Segment
    from kernels.policy import Dynamic
    from kernels.selection import Selection
    from kernels.tiles import TileSelection


def masked_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    scale: float,
    log_weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the keys where `mask` is True.

    Args:
        query: [rows, heads, head_dim].
        keys: [rows, heads, keys, head_dim].
        values: [rows, heads, keys, head_dim].
        mask: bool [rows, heads, keys].
        scale: factor on the scores.
        log_weight: [rows, heads, keys], log of the number of times that each key counts.
        bias: [rows, heads, keys], added to the scores.

    Returns:
        float64 output [rows, heads, head_dim] and log-sum-exp [rows, heads]; a row without keys
        gives 0 and -inf.
    """
    scores = torch.einsum("rhd,rhkd->rhk", query.double(), keys.double()) * scale
    for added in (log_weight, bias):
        if added is not None:
            scores = scores + added.double()
    scores = scores.masked_fill(~mask, -torch.inf)  # [rows, heads, keys]
    lse = scores.logsumexp(-1)  # [rows, heads]
    weights = torch.where(mask, (scores - lse[..., None]).exp(), 0.0)
    return torch.einsum("rhk,rhkd->rhd", weights, values.double()), lse


def selected_attention(
    query: Tensor, cache: LayerCache, rows: Rows, selection: Selection, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of each row over its selected keys; see `kernels.attention.selected_attention`."""
    group = query.shape[1] // cache.kv_heads
    count, kv_heads, capacity = selection.indices.shape
    mask = selection.indices >= 0  # [rows, kv_heads, capacity]
    slots = rows.slots(selection.indices.clamp_min(0))  # [rows, kv_heads, capacity]
    flat = cache.kv.view(kv_heads, -1, 2, cache.head_dim)
    heads = torch.arange(kv_heads, device=slots.device)[None, :, None]
    picked = flat[heads, slots]  # [rows, kv_heads, capacity, 2, head_dim]
    picked = picked.repeat_interleave(group, dim=1)  # [rows, heads, capacity, 2, head_dim]
    keys, values = picked[..., 0, :], picked[..., 1, :]
    mask = mask.repeat_interleave(group, dim=1)
    place = selection.indices.repeat_interleave(group, dim=1)
    bias = _bias(cache, place, rows.lengths - 1)
    output, lse = masked_attention(query, keys, values, mask, scale, bias=bias)
    assert output.shape[0] == count and capacity == mask.shape[-1]
    if selection.log_weight is None:
        return output, lse, lse
    weights = selection.log_weight.repeat_interleave(group, dim=1)
    return *masked_attention(query, keys, values, mask, scale, weights, bias), lse


def dense_decode(
    query: Tensor, cache: LayerCache, rows: Rows, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of each row over the keys that it sees; see `kernels.attention.dense_decode`."""
    table = rows.block_tables.repeat_interleave(rows.queries, dim=0)  # [rows, pages]
    flat = cache.kv[:, table].flatten(2, 3).transpose(0, 1)  # [rows, kv_heads, keys, 2, head_dim]
    flat = flat.repeat_interleave(query.shape[1] // cache.kv_heads, dim=1)
    key = torch.arange(flat.shape[2], device=query.device)
    mask = (key >= rows.starts[:, None]) & (key < rows.lengths[:, None])  # [rows, keys]
    mask = mask[:, None].expand(-1, query.shape[1], -1)
    flat = flat.masked_fill(~mask[..., None, None], 0.0)  # pages hold anything behind the last key
    bias = _bias(cache, key.expand(mask.shape), rows.lengths - 1)
    return masked_attention(query, flat[..., 0, :], flat[..., 1, :], mask, scale, bias=bias)


def dense_attention(
    query: Tensor, cache: LayerCache, segment: Segment, scale: float, window: int | None
) -> Tensor:
    """Causal attention of a segment; see `kernels.attention.dense_attention`."""
    tokens, heads, head_dim = query.shape
    total = segment.start + tokens
    flat = cache.kv[:, segment.block_table].reshape(cache.kv_heads, -1, 2, head_dim)
    flat = flat[:, :total].repeat_interleave(heads // cache.kv_heads, dim=0)
    keys, values = flat[:, :, 0], flat[:, :, 1]  # [heads, keys, head_dim]
    position = segment.start + torch.arange(tokens, device=query.device)[:, None]
    key = torch.arange(total, device=query.device)
    mask = key <= position  # [tokens, keys]
    if window is not None:
        mask = mask & (position - key < window)
    output, _ = masked_attention(
        query,
        keys.expand(tokens, -1, -1, -1),
        values.expand(tokens, -1, -1, -1),
        mask[:, None].expand(-1, heads, -1),
        scale,
        bias=_bias(cache, key.expand(tokens, heads, -1), position[:, 0]),
    )
    return output


def _bias(cache: LayerCache, position: Tensor, query: Tensor) -> Tensor | None:
    """What distance adds to the scores of the keys at `position` [rows, heads, keys]; see
    `kernels.alibi`.
    """
    if cache.slopes is None:
        return None
    distance = (position - query[:, None, None]).double()
    return cache.slopes.double()[:, None] * distance


def stand_ins(
    query: Tensor, cache: LayerCache, segment: Segment, scale: float
) -> tuple[Tensor, Tensor]:
    """Scores of whole pages: the log of the mass that a page's keys carry together, estimated.

    Were a page's scores normal with mean u and variance v, its mass would be 64 e^(u + v / 2), or
    where distance counts (`kernels.alibi`) e^(u + v / 2) times the sum of its keys' e^bias. u is
    the score of the page's mean key. v is taken for |q|^2 times what the keys of a page vary in a
    channel, mean over all pages before the query's, as if they varied alike in all directions.

    Args:
        query: [tokens, heads, head_dim].
        cache: the layer's paged cache, complete pages with their means.
        segment: where the tokens stand and where their keys lie.
        scale: factor on the scores.

    Returns:
        The scores, float64 [tokens, heads, pages] over the segment's pages, of meaning for those
        before a token's own; and v, float64 [tokens, heads].
    """
    group = query.shape[1] // cache.kv_heads
    pages = segment.block_table
    mean = cache.key_mean[:, pages].double().repeat_interleave(group, dim=0)
    spread = cache.spread[:, pages].double().repeat_interleave(group, dim=0)  # [heads, pages]
    before = (segment.start + torch.arange(query.shape[0], device=query.device)) // PAGE
    spread = torch.stack([spread[:, :n].mean(1).nan_to_num(nan=0.0) for n in before.tolist()])
    scaled = query.double() * scale
    centre = torch.einsum("thd,hpd->thp", scaled, mean)
    variance = scaled.square().sum(-1) * spread  # [tokens, heads]
    return centre + variance[..., None] / 2 + _page_mass(query, cache, segment), variance


def _page_mass(query: Tensor, cache: LayerCache, segment: Segment) -> Tensor:
    """Log of the mass of pages whose scores are 0: log 64, or what distance makes of it.

    Returns:
        [tokens, heads, pages].
    """
    tokens, heads, _ = query.shape
    key = torch.arange(len(segment.block_table) * PAGE, device=query.device)
    position = segment.start + torch.arange(tokens, device=query.device)
    bias = _bias(cache, key.expand(tokens, heads, -1), position)
    if bias is None:
        bias = torch.zeros(tokens, heads, len(key), dtype=torch.float64, device=query.device)
    return bias.view(tokens, heads, -1, PAGE).logsumexp(-1)


def read_pages(
    query: Tensor, cache: LayerCache, segment: Segment, least: float, scale: float, asked: int
) -> Tensor:
    """The pages that each tile reads; see `kernels.prefill.choose`.

    Of `asked` queries on end the last one is asked; where a tile has none of these, it reads all.

    Returns:
        bool [tiles, kv_heads, pages] over the segment's pages.
    """
    tokens, heads, _ = query.shape
    kv_heads, group = cache.kv_heads, heads // cache.kv_heads
    whole, variance = stand_ins(query, cache, segment, scale)  # [tokens, heads, pages]
    first, pages = segment.start // PAGE, whole.shape[2]
    slopes = torch.zeros(heads, device=query.device) if cache.slopes is None else cache.slopes
    even = page_evenness(slopes.double())
    read = torch.zeros(pages - first, kv_heads, pages, dtype=torch.bool, device=query.device)
    for token in range(tokens):
        position = segment.start + token
        tile = position // PAGE
        if (position + 1) % asked:
            continue
        own = cache.kv[:, segment.block_table[tile], : position % PAGE + 1, 0].double()
        own = own.repeat_interleave(group, dim=0)  # [heads, keys, head_dim]
        scores = torch.einsum("hd,hkd->hk", query[token].double() * scale, own)
        if cache.slopes is not None:
            scores += cache.slopes.double()[:, None] * (
                torch.arange(own.shape[1], device=query.device) - position % PAGE
            )
        mass = torch.cat((whole[token, :, :tile], scores), dim=1).softmax(1)[:, :tile]
        error = mass * ((variance[token].exp() / even - 1) / PAGE).sqrt()[:, None]
        read[tile - first, :, :tile] |= error.view(kv_heads, group, tile).amax(1) >= least
    stop = segment.start + tokens
    for row in range(pages - first):
        tile = first + row
        begin, end = max(segment.start, tile * PAGE), min(stop, (tile + 1) * PAGE)
        read[row, :, :tile] |= begin // asked == end // asked
        read[row, :, : min(tile, 1)] = True
        read[row, :, max(0, tile - 1) : tile] = True
    return read


def tile_attention(
    query: Tensor, cache: LayerCache, segment: Segment, selection: TileSelection, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of a segment's tokens over listed pages; see `kernels.prefill.tile_attention`."""
    tokens, heads, _ = query.shape
    kv_heads, group = cache.kv_heads, heads // cache.kv_heads
    first, pages = segment.start // PAGE, segment.block_table.shape[0]
    mask = torch.zeros(tokens, kv_heads, pages, PAGE, dtype=torch.bool, device=query.device)
    left = torch.zeros(tokens, kv_heads, pages, dtype=torch.bool, device=query.device)
    for token in range(tokens):
        tile, offset = divmod(segment.start + token, PAGE)
        for head in range(kv_heads):
            start, count, whole = (
                int(part[tile - first, head])
                for part in (selection.starts, selection.counts, selection.whole)
            )
            for number in range(count):
                page = int(selection.pages[start + number])
                row = torch.ones(PAGE, dtype=torch.bool)
                if number >= whole:
                    word = int(selection.bits[selection.masks[start + number], offset])
                    row = torch.tensor([word >> key & 1 for key in range(PAGE)]) == 1
                mask[token, head, page] = row
            if selection.left is not None:
                for page in range(tile):
                    word = int(selection.left[tile - first, head, page // PAGE])
                    left[token, head, page] = word >> page % PAGE & 1 == 1
    flat = cache.kv[:, segment.block_table].double().flatten(1, 2)  # [kv_heads, keys, 2, head_dim]
    flat = flat.repeat_interleave(group, dim=0)  # pages hold anything behind the last key:
    seen = mask.any(0).repeat_interleave(group, dim=0).flatten(1)  # [heads, keys]
    flat = flat.masked_fill(~seen[..., None, None], 0.0)
    mask = mask.flatten(2).repeat_interleave(group, dim=1)  # [tokens, heads, keys]
    scores = torch.einsum("thd,hkd->thk", query.double() * scale, flat[:, :, 0])
    position = segment.start + torch.arange(tokens, device=query.device)
    bias = _bias(
        cache, torch.arange(flat.shape[1], device=query.device).expand(scores.shape), position
    )
    scores = scores if bias is None else scores + bias
    scores = scores.masked_fill(~mask, -torch.inf)
    own = scores.logsumexp(-1)
    parts = [(scores, scores, flat[:, :, 1])]
    if selection.left is not None:
        parts += _left(query, cache, segment, left.repeat_interleave(group, dim=1), scale)
    lse = torch.cat([counted for counted, _, _ in parts], dim=-1).logsumexp(-1)
    output = torch.zeros_like(query, dtype=torch.float64)
    for _, weighs, values in parts:
        weights = torch.where(weighs.isneginf(), 0.0, (weighs - lse[..., None]).exp())
        output += torch.einsum("thk,hkd->thd", weights, values)
    return output, lse, own


def _left(
    query: Tensor, cache: LayerCache, segment: Segment, left: Tensor, scale: float
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """What stands for pages: scores by which it counts, by which it weighs, and its values.

    For most queries means do both. For a query whose scores vary little within a page some of its
    keys weigh for all, and count; means then weigh the difference of the mean value and those keys'
    own, which is 0 on average over the keys of a page.
    """
    group, pages = query.shape[1] // cache.kv_heads, segment.block_table
    whole, variance = stand_ins(query, cache, segment, scale)
    alike = (variance < ALIKE)[..., None]  # [tokens, heads, 1]
    number = torch.arange(len(pages), device=query.device)
    mean = cache.value_mean[:, pages].double().repeat_interleave(group, dim=0)
    there = left.any(0)[..., None]  # [heads, pages, 1]
    mean = mean.masked_fill(~there, 0.0)
    plain = whole - variance[..., None] / 2
    nothing = torch.full_like(whole, -torch.inf)
    rough = whole.masked_fill(~left | alike, -torch.inf)
    fine = plain.masked_fill(~(left & alike), -torch.inf)
    parts, own = [(rough, rough, mean)], torch.zeros_like(mean)
    for sample in range(SAMPLES):
        place = (number * TURN + sample * (PAGE // SAMPLES)) % PAGE
        keys, values = cache.kv[:, pages, place].double().unbind(2)  # [kv_heads, pages, head_dim]
        keys = keys.repeat_interleave(group, dim=0).masked_fill(~there, 0.0)
        values = values.repeat_interleave(group, dim=0).masked_fill(~there, 0.0)
        score = torch.einsum("thd,hpd->thp", query.double() * scale, keys)
        score = score + _page_mass(query, cache, segment) - math.log(SAMPLES)
        score = score.masked_fill(~(left & alike), -torch.inf)
        parts.append((score, score, values))
        own += values / SAMPLES
    return [*parts, (nothing, fine, mean - own)]


def marks(
    share: Tensor,
    held: float,
    always: int,
    visible: int,
    policy: Dynamic,
    fewest: int,
    each: int,
) -> int:
    """The budget of one row and KV head: marks on its line, see `marked`.

    With K marks a key of share w is read with probability min(1, K w), so the keys read carry
    the sum of w min(1, K w), on average.

    Args:
        share: [probed], estimated shares of the row's attention mass.
        held: share of the keys that are always read.
        always: how many these are.
        visible: keys that the row sees.
        policy: the bounds and targets.
        fewest: fewest marks, whatever the policy says.
        each: keys for which a probed one stands.

    Returns:
        K.
    """

    def expected(number: int) -> tuple[float, float]:
        keys, mass = 0.0, held
        for one in share.tolist():
            met = min(1.0, number * one)
            keys += each * met
            mass += each * met * one
        return keys, mass

    most = max(policy.max_keys - always, fewest)
    number = min(max(policy.min_keys - always, fewest, 1), most)
    while number < most:
        more = min(2 * number, most)
        keys, mass = expected(number)
        keys_of_more, mass_of_more = expected(more)
        average = (keys_of_more - keys) / visible  # what so many keys carry of level attention
        if mass >= policy.coverage or mass_of_more - mass < policy.worth * average:
            break
        number = more
    return number


def marked(length: Tensor, start: list[int], pages: int, distance: int) -> list[int]:
    """The sample of one row and KV head: systematic, with probability proportional to size.

    Madow 1949, "On the Theory of Systematic Sampling, II": keys lie side by side, there is a mark
    at every multiple of `distance`, and a key is in the sample where a mark falls on it. See
    `kernels.sample`.

    Args:
        length: int64 [keys], whole pages.
        start: where each segment's line begins, 0 to `distance` - 1.
        pages: of a segment.
        distance: between marks; no key is longer.

    Returns:
        The keys, ascending.
    """
    lengths, found = length.tolist(), []
    for segment, phase in enumerate(start):
        end = phase
        first, last = segment * pages, min((segment + 1) * pages, len(lengths) // PAGE)
        for page in range(first, last):
            for column in range(8):
                for key in range(page * PAGE + column, (page + 1) * PAGE, 8):
                    begin, end = end, end + lengths[key]
                    if end // distance > begin // distance:
                        found.append(key)
    return sorted(found)
