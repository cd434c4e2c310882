"""The verification op as one Triton kernel, without a workspace.

`contract` says what its arrays are.

On a GPU a program serves one row and reads its logits in blocks of `BLOCK` tokens, so a vocabulary
may have any size:

- a greedy row reads each cell that it needs once;
- a sampling row reads a cell and the draft's logits of that position twice, and twice more where
  it ends, to draw its bonus;
- a filter sorts nothing. It keeps all tokens at least as probable as the last one kept, which is a
  threshold, and that is searched for: the bits of positive floats are ordered as their values are,
  and each of ten passes settles three of them.

Decisions are those of the specification (`specification.verify`) but for rounding:
probabilities are float32 as there, but `exp` and the division are the GPU's, and what the
specification sums in float64 is summed here in float32 within a block. So a sampled decision may
differ where its uniform is within rounding of a boundary: of the acceptance test, of the CDF, of
the mass that top-p keeps. Greedy decisions are equal.

Needs `triton`. With TRITON_INTERPRET=1 at import the same source runs on the CPU. The interpreter
costs by the operation, not by the element, hence `ROWS`: a program may serve a tile of rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dspark_batch.models.plugin import contract

INFINITY = tl.constexpr(float("inf"))
MIN_RESIDUAL_MASS = tl.constexpr(contract.MIN_RESIDUAL_MASS)
BEYOND = tl.constexpr(2**31 - 1)  # more than any token
WAYS = tl.constexpr(8)  # thresholds that a pass of the search compares
BITS_PER_PASS = tl.constexpr(3)
PASSES = tl.constexpr(10)  # 30 bits: the largest weight, 1.0, is 0x3F800000 < 2**30


@triton.jit
def dspark_verify(
    logits,
    logit_rows,
    draft_tokens,
    lengths,
    certain,
    draft_logits,
    draft_vocab,
    temperature,
    top_k,
    top_p,
    uniforms,
    num_logits,
    vocab_size,
    draft_vocab_size,
    num_drafts,
    block_size,
    num_accepted,
    bonus,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`launch.PARAMETERS` in order: inputs of the contract, sizes, outputs. Grid: [R / ROWS]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    length = tl.minimum(tl.load(lengths + row).to(tl.int32), num_drafts)
    sure = tl.load(certain + row) > 0
    heat = tl.load(temperature + row)
    hot = heat > 0
    divisor = tl.where(hot, heat, 1.0)
    accepted = tl.zeros([ROWS, 1], tl.int32)
    choice = tl.zeros([ROWS, 1], tl.int32)
    broken = tl.zeros([ROWS, 1], tl.int32)
    going = length >= 0
    for cell in range(0, tl.max(length) + 1):
        needed = cell <= length
        logit_row = tl.load(logit_rows + row * (num_drafts + 1) + cell, mask=needed, other=0)
        # A builder times the plugin on values of its own: none may lead out of the arrays.
        logit_row = tl.minimum(tl.maximum(logit_row, 0), num_logits - 1)
        target = logits + logit_row * vocab_size
        largest, best, not_finite = _largest(target, vocab_size, needed, ROWS, BLOCK)
        broken += not_finite
        # What follows a rejection is only looked through for logits that are not finite.
        deciding = needed & going & (broken == 0)
        planned = cell < length
        token = tl.load(draft_tokens + row * num_drafts + cell, mask=planned, other=-1)
        keeps = token == best
        ends_with = best
        sampling = deciding & hot
        if _any(sampling):
            floor, total = _filtered(
                target,
                vocab_size,
                largest,
                divisor,
                tl.load(top_k + row),
                tl.load(top_p + row),
                ROWS,
                BLOCK,
            )
            known = (token >= 0) & (token < vocab_size)
            logit = tl.load(target + token, mask=known, other=-INFINITY)
            target_prob = _kept(logit, largest, divisor, floor) / total
            draft = draft_logits + (row * block_size + cell) * draft_vocab_size
            drawn_from = planned & (sure == 0)
            draft_largest, draft_total, draft_weight = _draft_weights(
                draft, draft_vocab, draft_vocab_size, drawn_from, divisor, token, ROWS, BLOCK
            )
            # Draft logits that are not finite make this false, and the draft is forgotten.
            uniform = tl.load(uniforms + row * (block_size + 1) + cell)
            draft_prob = tl.where(sure, 1.0, draft_weight / draft_total)
            wins = planned & (uniform * draft_prob < target_prob)
            keeps = tl.where(hot, wins, keeps)
            if _any(sampling & (keeps == 0)):
                drawn = _drawn(
                    target,
                    vocab_size,
                    largest,
                    divisor,
                    floor,
                    total,
                    draft,
                    draft_vocab,
                    draft_vocab_size,
                    drawn_from & (draft_total == draft_total),
                    draft_largest,
                    draft_total,
                    tl.where(planned & sure, token, -1),
                    tl.load(uniforms + row * (block_size + 1) + block_size),
                    ROWS,
                    BLOCK,
                )
                ends_with = tl.where(hot, drawn, ends_with)
        choice = tl.where(deciding, ends_with, choice)
        accepted += (deciding & keeps).to(tl.int32)
        going = going & keeps
    tl.store(num_accepted + row, tl.where(broken == 0, accepted, 0).to(tl.int64))
    tl.store(bonus + row, tl.where(broken == 0, choice, -1).to(tl.int64))


@triton.jit
def _any(condition):
    return tl.max(condition.to(tl.int32)) > 0


@triton.jit
def _largest(logits, size, active, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest of `size` logits, the first token that has it, and how many are not finite.

    A row that is not `active` is not read.
    """
    lanes = tl.arange(0, BLOCK)[None, :]
    values = tl.full([ROWS, BLOCK], -INFINITY, tl.float32)
    places = tl.zeros([ROWS, BLOCK], tl.int32)
    not_finite = tl.zeros([ROWS, BLOCK], tl.int32)
    for begin in range(0, size, BLOCK):
        token = begin + lanes
        inside = token < size
        x = tl.load(logits + token, mask=inside & active, other=0.0)
        not_finite += tl.where(tl.abs(x) < INFINITY, 0, 1)
        larger = inside & (x > values)
        values = tl.where(larger, x, values)
        places = tl.where(larger, token, places)
    largest = tl.max(values, 1, keep_dims=True)
    first = tl.min(tl.where(values == largest, places, BEYOND), 1, keep_dims=True)
    return largest, first, tl.sum(not_finite, 1, keep_dims=True)


@triton.jit
def _weight(logit, largest, divisor):
    """Softmax weight, not normalised: 1 for the largest logit, less for all others.

    The largest is taken off before the division: a tiny temperature must not overflow, nor may
    0 / denormal be NaN where denormals are flushed.
    """
    return tl.exp(tl.where(logit == largest, 0.0, (logit - largest) / divisor))


@triton.jit
def _kept(logit, largest, divisor, floor):
    """Weight of what the filters keep, 0 for the rest."""
    weight = _weight(logit, largest, divisor)
    return tl.where(weight >= floor, weight, 0.0)


@triton.jit
def _total(logits, size, largest, divisor, floor, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of the weights kept."""
    lanes = tl.arange(0, BLOCK)[None, :]
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    for begin in range(0, size, BLOCK):
        token = begin + lanes
        x = tl.load(logits + token, mask=token < size, other=-INFINITY)
        sums += _kept(x, largest, divisor, floor)
    return tl.sum(sums, 1, keep_dims=True)


@triton.jit
def _filtered(
    logits, size, largest, divisor, top_k, top_p, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Threshold of what top-k and then top-p keep, and the sum of the weights kept."""
    floor = tl.zeros([ROWS, 1], tl.float32)
    by_count = (top_k > 0) & (top_k < size)
    if _any(by_count):
        wanted = top_k.to(tl.float32)
        found = _threshold(logits, size, largest, divisor, wanted, False, ROWS, BLOCK)
        floor = tl.where(by_count, found, floor)
    total = _total(logits, size, largest, divisor, floor, ROWS, BLOCK)
    by_mass = top_p < 1
    if _any(by_mass):
        # Of the mass that top-k left. What is below its floor is more than that, so that the
        # search ends above it without being told.
        wanted = top_p * total
        found = _threshold(logits, size, largest, divisor, wanted, True, ROWS, BLOCK)
        floor = tl.where(by_mass, tl.maximum(floor, found), floor)
        total = _total(logits, size, largest, divisor, floor, ROWS, BLOCK)
    return floor, total


@triton.jit
def _threshold(
    logits,
    size,
    largest,
    divisor,
    wanted,
    BY_MASS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The largest t such that the weights of at least t number `wanted`, or sum to it.

    0, which keeps everything, if rounding leaves none.
    """
    lanes = tl.arange(0, BLOCK)[None, :]
    ways = tl.arange(0, WAYS)[None, :]
    low = tl.zeros([ROWS, 1], tl.int32)
    for i in range(0, PASSES):
        shift = (PASSES - 1 - i) * BITS_PER_PASS
        bounds = (low + (ways << shift)).to(tl.float32, bitcast=True)
        sums = tl.zeros([ROWS, WAYS, BLOCK], tl.float32)
        for begin in range(0, size, BLOCK):
            token = begin + lanes
            inside = token < size
            x = tl.load(logits + token, mask=inside, other=-INFINITY)
            weight = _weight(x, largest, divisor)
            value = weight
            if not BY_MASS:
                value = tl.where(inside, 1.0, 0.0)
            sums += tl.where(weight[:, None, :] >= bounds[:, :, None], value[:, None, :], 0.0)
        found = tl.sum(sums, 2)
        # The first way is the one that the last pass found. Nothing is kept above the largest
        # weight, whatever is wanted.
        holds = (ways > 0) & (found >= wanted) & (found > 0)
        low += tl.sum(holds.to(tl.int32), 1, keep_dims=True) << shift
    return low.to(tl.float32, bitcast=True)


@triton.jit
def _draft_weights(
    draft, draft_vocab, size, planned, divisor, token, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """The draft's largest logit, the sum of its weights, and the weight of target token `token`.

    The sum is NaN where the specification's softmax is: with any NaN or +inf, or only -inf.
    """
    lanes = tl.arange(0, BLOCK)[None, :]
    largest, _, _ = _largest(draft, size, planned, ROWS, BLOCK)
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    hits = tl.zeros([ROWS, BLOCK], tl.float32)
    for begin in range(0, size, BLOCK):
        place = begin + lanes
        inside = place < size
        x = tl.load(draft + place, mask=inside & planned, other=-INFINITY)
        weight = tl.where(inside, _weight(x, largest, divisor), 0.0)
        sums += weight
        hits += tl.where(tl.load(draft_vocab + place, mask=inside, other=-2) == token, weight, 0.0)
    total = tl.sum(sums, 1, keep_dims=True) + (largest - largest)
    return largest, total, tl.sum(hits, 1, keep_dims=True)


@triton.jit
def _drawn(
    target,
    vocab_size,
    largest,
    divisor,
    floor,
    total,
    draft,
    draft_vocab,
    draft_vocab_size,
    proposing,
    draft_largest,
    draft_total,
    certain_token,
    uniform,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The bonus: by inverse CDF from the residual, or from the target where that has no mass.

    The draft's distribution is that of its logits where it is `proposing`, else all on
    `certain_token`, -1 for none.
    """
    lanes = tl.arange(0, BLOCK)[None, :]
    # A logit that is masked then weighs 0 and not NaN, whatever the draft is.
    draft_largest = tl.where(proposing, draft_largest, 0.0)
    draft_total = tl.where(proposing, draft_total, 1.0)
    mass = tl.zeros([ROWS, 1], tl.float64)
    whole = tl.zeros([ROWS, 1], tl.float64)
    first = 0
    for begin in range(0, vocab_size, BLOCK):
        token = begin + lanes
        place, has, first = _places(draft_vocab, draft_vocab_size, vocab_size, token, first, BLOCK)
        x = tl.load(target + token, mask=token < vocab_size, other=-INFINITY)
        probs = _kept(x, largest, divisor, floor) / total
        x = tl.load(draft + place, mask=has & proposing, other=-INFINITY)
        proposed = _weight(x, draft_largest, divisor) / draft_total
        proposed = tl.where(token == certain_token, 1.0, proposed)
        mass += tl.sum(tl.maximum(probs - proposed, 0.0), 1, keep_dims=True)
        whole += tl.sum(probs, 1, keep_dims=True)
    has_mass = mass > MIN_RESIDUAL_MASS
    proposing = proposing & has_mass
    certain_token = tl.where(has_mass, certain_token, -1)
    limit = uniform * tl.where(has_mass, mass, whole)
    below = tl.zeros([ROWS, 1], tl.float64)
    chosen = tl.full([ROWS, 1], BEYOND, tl.int32)
    last = tl.zeros([ROWS, 1], tl.int32)
    first = 0
    for begin in range(0, vocab_size, BLOCK):
        token = begin + lanes
        place, has, first = _places(draft_vocab, draft_vocab_size, vocab_size, token, first, BLOCK)
        x = tl.load(target + token, mask=token < vocab_size, other=-INFINITY)
        probs = _kept(x, largest, divisor, floor) / total
        x = tl.load(draft + place, mask=has & proposing, other=-INFINITY)
        proposed = _weight(x, draft_largest, divisor) / draft_total
        proposed = tl.where(token == certain_token, 1.0, proposed)
        residual = tl.maximum(probs - proposed, 0.0)
        # A token without mass is never drawn, whatever rounding does to the running sum.
        massive = residual > 0
        reached = massive & (tl.cumsum(residual, 1) > (limit - below).to(tl.float32))
        chosen = tl.minimum(chosen, tl.min(tl.where(reached, token, BEYOND), 1, keep_dims=True))
        last = tl.maximum(last, tl.max(tl.where(massive, token, 0), 1, keep_dims=True))
        below += tl.sum(residual, 1, keep_dims=True)
    return tl.where(chosen == BEYOND, last, chosen)


@triton.jit
def _places(draft_vocab, size, vocab_size, token, first, BLOCK: tl.constexpr):
    """Draft ids of a block of tokens, which of them have one, and the `first` of the next block.

    The block's entries begin at `first`, are at most BLOCK and ascend: each token is looked for by
    bisection in the BLOCK entries from there. A draft of the whole vocabulary needs no search.
    """
    place = token
    if size < vocab_size:
        place = tl.zeros([1, BLOCK], tl.int32) + (first - 1)
        step = tl.full([], BLOCK, tl.int32)
        while step > 0:
            probe = place + step
            entry = tl.load(draft_vocab + probe, mask=probe < size, other=BEYOND)
            place = tl.where(entry <= token, probe, place)
            step = step // 2
    inside = (place >= 0) & (place < size)
    member = inside & (tl.load(draft_vocab + place, mask=inside, other=-1) == token)
    return place, member, first + tl.sum(member.to(tl.int32))
