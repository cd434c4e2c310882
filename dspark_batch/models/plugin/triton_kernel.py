"""The verification op as a Triton kernel of seven stages over one workspace.

`contract` says what its arrays are. A *cell* is a position of a row: the anchor, then its drafts.
The vocabulary is cut into slices of `SLICE` tokens, and a program of a heavy stage serves one slice
of one cell, so that a single row fills a GPU as well as many do. A stage begins when the one before
has ended, and reads what that left in the workspace:

    SURVEY   cell, slice   largest logit, first token that has it, logits that are not finite, sum
                           of the weights; of the draft's logits the largest and the sum
    COARSE   cell, slice   tokens, and weight, at or above each of `WAYS` thresholds
    FINE     cell, slice   the same between the two thresholds that enclose the last token kept
    GATHER   cell, slice   the weights between those two, into one list for the cell
    JUDGE    cell          the filters' threshold, from that list; accept or reject
    WEIGH    row, slice    mass of the residual where the row ends
    DRAW     row           the slice with the bonus, the bonus, the number accepted

A greedy row takes part in SURVEY, JUDGE and DRAW; a row without filters skips COARSE, FINE and
GATHER. Nothing is added up in an order that depends on the machine's timing, and no stage reads
what this call has not written, so a call is repeatable whatever the workspace held.

*Filters* sort nothing. Top-k and top-p keep all tokens at least as probable as the last one kept,
which is a threshold. The bits of positive floats are ordered as their values are. COARSE and FINE
narrow the threshold down to an interval of bits with at most `CAPACITY` tokens in it, and JUDGE
settles the remaining bits one by one on these alone. For a row with both filters the list begins at
the threshold of top-k and has no upper end, because top-p takes its share of what top-k left. Where
the list is too short (thousands of tokens all but equally probable; top-p with a top-k of
thousands), JUDGE searches the vocabulary, which is slower and as right.

Decisions are those of the specification (`specification.verify`) but for rounding:
probabilities are float32 as there, but `exp` and the division are the GPU's, and what the
specification sums in float64 is summed here in float32 within a slice. So a sampled decision may
differ where its uniform is within rounding of a boundary: of the acceptance test, of the CDF, of
the mass that top-p keeps. Greedy decisions are equal.

Needs `triton`. With TRITON_INTERPRET=1 at import the same source runs on the CPU. The interpreter
costs by the operation, not by the element, hence `ROWS`: a program may serve a tile of rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dspark_batch.models.plugin import contract, launch

INFINITY = tl.constexpr(float("inf"))
MIN_RESIDUAL_MASS = tl.constexpr(contract.MIN_RESIDUAL_MASS)
BEYOND = tl.constexpr(2**31 - 1)  # more than any token
SURVEY = tl.constexpr(launch.STAGES.index("survey"))
COARSE = tl.constexpr(launch.STAGES.index("coarse"))
FINE = tl.constexpr(launch.STAGES.index("fine"))
GATHER = tl.constexpr(launch.STAGES.index("gather"))
JUDGE = tl.constexpr(launch.STAGES.index("judge"))
WEIGH = tl.constexpr(launch.STAGES.index("weigh"))
DRAW = tl.constexpr(launch.STAGES.index("draw"))
WAYS = tl.constexpr(launch.WAYS)  # thresholds of COARSE and of FINE
VERDICTS = tl.constexpr(launch.VERDICTS)  # numbers that JUDGE says of a cell
PARTS = tl.constexpr(32)  # slices whose results are read at a time
ONE = tl.constexpr(0x3F800000)  # bits of 1.0, the largest weight; 30 bits hold it
BITS = tl.constexpr(30)
HIGHEST_BIT = tl.constexpr(1 << 29)
MAP_BLOCK = tl.constexpr(1024)  # tokens whose draft ids are looked for at a time
WEIGH_BLOCK = tl.constexpr(2048)  # tokens that WEIGH reads at a time
SEARCH_BLOCK = tl.constexpr(512)  # tokens that a search of the vocabulary reads at a time
SEARCH_WAYS = tl.constexpr(8)  # thresholds that a pass of it compares
SEARCH_BITS = tl.constexpr(3)  # bits that a pass of it settles


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
    workspace,
    STAGE: tl.constexpr,
    ROWS: tl.constexpr,
    SLICE: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """`launch.PARAMETERS` in order: inputs of the contract, sizes, outputs, workspace.

    Grid: [R / ROWS, cells, slices], as `launch.grid` says.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    part = tl.program_id(2)
    length = tl.minimum(tl.load(lengths + row).to(tl.int32), num_drafts)
    heat = tl.load(temperature + row)
    hot = heat > 0
    divisor = tl.where(hot, heat, 1.0)
    records = workspace + vocab_size
    size = _record_size(vocab_size, draft_vocab_size, SLICE, CAPACITY)
    records += row * (num_drafts + 1) * size
    verdicts = _verdicts(vocab_size, draft_vocab_size, SLICE)
    if STAGE >= WEIGH:
        cell, broken = _walked(records + verdicts, size, length, num_drafts, ROWS)
    else:
        cell = tl.program_id(1)
    needed = cell <= length
    planned = cell < length
    record = records + cell * size
    logit_row = tl.load(logit_rows + row * (num_drafts + 1) + cell, mask=needed, other=0)
    # A builder times the plugin on values of its own: none may lead out of the arrays.
    logit_row = tl.minimum(tl.maximum(logit_row, 0), num_logits - 1)
    target = logits + logit_row * vocab_size
    draft = draft_logits + (row * block_size + cell) * draft_vocab_size
    if STAGE == SURVEY:
        if part < tl.cdiv(vocab_size, SLICE):
            _survey(record, target, vocab_size, part, divisor, needed, hot, ROWS, SLICE)
            if (tl.program_id(0) == 0) & (cell == 0) & (draft_vocab_size < vocab_size):
                _map(workspace, draft_vocab, draft_vocab_size, vocab_size, part, SLICE)
        else:
            proposing = planned & hot & (tl.load(certain + row) <= 0)
            if _any(proposing):
                _survey_draft(
                    record + _draft_survey(vocab_size, SLICE),
                    draft,
                    draft_vocab_size,
                    part - tl.cdiv(vocab_size, SLICE),
                    divisor,
                    proposing,
                    ROWS,
                    SLICE,
                )
    elif STAGE < JUDGE:
        k, p = tl.load(top_k + row), tl.load(top_p + row)
        active = needed & hot & (_by_count(k, vocab_size) | (p < 1))
        if _any(active):
            largest, _, _, total = _surveyed(record, vocab_size, divisor, active, ROWS, SLICE)
            if STAGE == GATHER:
                _gather(
                    record,
                    target,
                    vocab_size,
                    draft_vocab_size,
                    part,
                    largest,
                    divisor,
                    k,
                    p,
                    total,
                    active,
                    ROWS,
                    SLICE,
                    CAPACITY,
                )
            else:
                _narrow(
                    record,
                    target,
                    vocab_size,
                    part,
                    largest,
                    divisor,
                    k,
                    p,
                    total,
                    active,
                    STAGE == FINE,
                    ROWS,
                    SLICE,
                    CAPACITY,
                )
    elif STAGE == JUDGE:
        if _any(needed):
            token = tl.load(draft_tokens + row * num_drafts + cell, mask=planned, other=-1)
            _judge(
                record,
                verdicts,
                target,
                draft,
                workspace,
                vocab_size,
                draft_vocab_size,
                divisor,
                hot,
                tl.load(top_k + row),
                tl.load(top_p + row),
                token,
                tl.load(certain + row) > 0,
                tl.load(uniforms + row * (block_size + 1) + cell),
                needed,
                planned,
                ROWS,
                SLICE,
                CAPACITY,
            )
    else:
        active = needed & hot & (broken == 0)
        token = tl.load(draft_tokens + row * num_drafts + cell, mask=planned, other=-1)
        sure = tl.load(certain + row) > 0
        largest, floor, total, draft_largest, draft_total = _said(record + verdicts, active)
        # Draft logits that are not finite make this false, and the draft is forgotten.
        proposing = active & planned & (sure == 0) & (draft_total == draft_total)
        certain_token = tl.where(planned & sure, token, -1)
        masses = records + _masses(vocab_size, SLICE)
        if STAGE == WEIGH:
            if _any(active):
                _weigh(
                    masses,
                    target,
                    draft,
                    workspace,
                    vocab_size,
                    draft_vocab_size,
                    part,
                    largest,
                    divisor,
                    floor,
                    total,
                    proposing,
                    draft_largest,
                    draft_total,
                    certain_token,
                    active,
                    ROWS,
                    SLICE,
                )
        else:
            choice = _first(record, vocab_size, needed, ROWS, SLICE)
            if _any(active):
                drawn = _drawn(
                    masses,
                    target,
                    draft,
                    workspace,
                    vocab_size,
                    draft_vocab_size,
                    largest,
                    divisor,
                    floor,
                    total,
                    proposing,
                    draft_largest,
                    draft_total,
                    certain_token,
                    tl.load(uniforms + row * (block_size + 1) + block_size),
                    active,
                    ROWS,
                    SLICE,
                )
                choice = tl.where(active, drawn, choice)
            tl.store(num_accepted + row, tl.where(needed & (broken == 0), cell, 0).to(tl.int64))
            tl.store(bonus + row, tl.where(broken == 0, choice, -1).to(tl.int64))


# The workspace. In elements of float32: the draft id of each target token, where the draft has not
# the whole vocabulary; then a record for each cell. A record has, for S slices and T of the draft,
#     [4, S]           SURVEY: largest, first, not finite, sum
#     [2, S]           WEIGH, in the record of a row's first cell: residual, whole
#     [2, 2, S, WAYS]  COARSE and FINE: tokens, weight
#     [2, T]           SURVEY of the draft: largest, sum
#     [VERDICTS]       JUDGE: keeps, not finite, largest, floor, total, draft's largest and total
#     [CAPACITY]       GATHER: weights
# Integers that must be exact are stored as bits.


@triton.jit
def _masses(vocab_size, SLICE: tl.constexpr):
    return 4 * tl.cdiv(vocab_size, SLICE)


@triton.jit
def _level(vocab_size, fine, SLICE: tl.constexpr):
    return (6 + fine * 2 * WAYS) * tl.cdiv(vocab_size, SLICE)


@triton.jit
def _draft_survey(vocab_size, SLICE: tl.constexpr):
    return (6 + 4 * WAYS) * tl.cdiv(vocab_size, SLICE)


@triton.jit
def _verdicts(vocab_size, draft_vocab_size, SLICE: tl.constexpr):
    return _draft_survey(vocab_size, SLICE) + 2 * tl.cdiv(draft_vocab_size, SLICE)


@triton.jit
def _list(vocab_size, draft_vocab_size, SLICE: tl.constexpr):
    return _verdicts(vocab_size, draft_vocab_size, SLICE) + VERDICTS


@triton.jit
def _record_size(vocab_size, draft_vocab_size, SLICE: tl.constexpr, CAPACITY: tl.constexpr):
    return _list(vocab_size, draft_vocab_size, SLICE) + CAPACITY


@triton.jit
def _bits(integer):
    return integer.to(tl.float32, bitcast=True)


@triton.jit
def _integer(bits):
    return bits.to(tl.int32, bitcast=True)


@triton.jit
def _any(condition):
    return tl.max(condition.to(tl.int32)) > 0


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


# SURVEY -------------------------------------------------------------------------------------------


@triton.jit
def _survey(
    record,
    target,
    vocab_size,
    part,
    divisor,
    needed,
    hot,
    ROWS: tl.constexpr,
    SLICE: tl.constexpr,
):
    """One slice of a cell. The sum is of weights relative to the slice's own largest logit."""
    if _any(needed):
        slices = tl.cdiv(vocab_size, SLICE)
        token = part * SLICE + tl.arange(0, SLICE)[None, :]
        inside = (token < vocab_size) & needed
        x = tl.load(target + token, mask=inside, other=-INFINITY)
        not_finite = inside & ((tl.abs(x) < INFINITY) == 0)
        value = tl.where(x > -INFINITY, x, -INFINITY)  # NaN is not greater
        largest = tl.max(value, 1, keep_dims=True)
        first = tl.min(tl.where(inside & (x == largest), token, BEYOND), 1, keep_dims=True)
        tl.store(record + part, largest, mask=needed)
        tl.store(record + slices + part, _bits(first), mask=needed)
        number = tl.sum(not_finite.to(tl.float32), 1, keep_dims=True)
        tl.store(record + 2 * slices + part, number, mask=needed)
        if _any(needed & hot):
            weight = tl.where(inside, _weight(x, largest, divisor), 0.0)
            sums = tl.sum(weight, 1, keep_dims=True)
            tl.store(record + 3 * slices + part, sums, mask=needed & hot)


@triton.jit
def _survey_draft(
    survey, draft, size, part, divisor, proposing, ROWS: tl.constexpr, SLICE: tl.constexpr
):
    """One slice of the draft's logits. A NaN leaves the largest alone and makes the sum NaN."""
    place = part * SLICE + tl.arange(0, SLICE)[None, :]
    inside = (place < size) & proposing
    x = tl.load(draft + place, mask=inside, other=-INFINITY)
    largest = tl.max(tl.where(x > -INFINITY, x, -INFINITY), 1, keep_dims=True)
    weight = tl.where(inside, _weight(x, largest, divisor), 0.0)
    tl.store(survey + part, largest, mask=proposing)
    there = survey + tl.cdiv(size, SLICE) + part
    tl.store(there, tl.sum(weight, 1, keep_dims=True), mask=proposing)


@triton.jit
def _map(places, draft_vocab, size, vocab_size, part, SLICE: tl.constexpr):
    """Draft ids of one slice's tokens, -1 for none, by bisection of the draft's vocabulary."""
    BLOCK: tl.constexpr = MAP_BLOCK if SLICE > MAP_BLOCK else SLICE
    widest = tl.full([], 1, tl.int32)
    while widest < size:
        widest = widest * 2
    for begin in range(part * SLICE, (part + 1) * SLICE, BLOCK):
        token = begin + tl.arange(0, BLOCK)
        place = tl.full([BLOCK], -1, tl.int32)
        step = widest
        while step > 0:
            probe = place + step
            entry = tl.load(draft_vocab + probe, mask=probe < size, other=BEYOND)
            place = tl.where((probe < size) & (entry <= token), probe, place)
            step = step // 2
        found = tl.load(draft_vocab + place, mask=place >= 0, other=-1) == token
        tl.store(places + token, _bits(tl.where(found, place, -1)), mask=token < vocab_size)


@triton.jit
def _surveyed(record, vocab_size, divisor, active, ROWS: tl.constexpr, SLICE: tl.constexpr):
    """A cell's largest logit, the first token that has it, how many are not finite, their sum."""
    slices = tl.cdiv(vocab_size, SLICE)
    parts = tl.arange(0, PARTS)[None, :]
    largest = tl.full([ROWS, 1], -INFINITY, tl.float32)
    for begin in range(0, slices, PARTS):
        part = begin + parts
        values = tl.load(record + part, mask=(part < slices) & active, other=-INFINITY)
        largest = tl.maximum(largest, tl.max(values, 1, keep_dims=True))
    first = tl.full([ROWS, 1], BEYOND, tl.int32)
    not_finite = tl.zeros([ROWS, 1], tl.float32)
    total = tl.zeros([ROWS, 1], tl.float32)
    for begin in range(0, slices, PARTS):
        part = begin + parts
        inside = (part < slices) & active
        values = tl.load(record + part, mask=inside, other=-INFINITY)
        places = _integer(tl.load(record + slices + part, mask=inside, other=0.0))
        places = tl.where(inside & (values == largest), places, BEYOND)
        first = tl.minimum(first, tl.min(places, 1, keep_dims=True))
        numbers = tl.load(record + 2 * slices + part, mask=inside, other=0.0)
        not_finite += tl.sum(numbers, 1, keep_dims=True)
        sums = tl.load(record + 3 * slices + part, mask=inside, other=0.0)
        sums *= _weight(values, largest, divisor)
        total += tl.sum(tl.where(inside, sums, 0.0), 1, keep_dims=True)
    return largest, first, not_finite, total


@triton.jit
def _first(record, vocab_size, needed, ROWS: tl.constexpr, SLICE: tl.constexpr):
    """The first token with a cell's largest logit; 0 for a cell that is not needed."""
    _, first, _, _ = _surveyed(record, vocab_size, 1.0, needed, ROWS, SLICE)
    return tl.where(needed, first, 0)


@triton.jit
def _surveyed_draft(survey, size, divisor, proposing, ROWS: tl.constexpr, SLICE: tl.constexpr):
    """The draft's largest logit and the sum of its weights.

    The sum is NaN where the specification's softmax is: with any NaN or +inf, or only -inf.
    """
    slices = tl.cdiv(size, SLICE)
    parts = tl.arange(0, PARTS)[None, :]
    largest = tl.full([ROWS, 1], -INFINITY, tl.float32)
    for begin in range(0, slices, PARTS):
        part = begin + parts
        values = tl.load(survey + part, mask=(part < slices) & proposing, other=-INFINITY)
        largest = tl.maximum(largest, tl.max(values, 1, keep_dims=True))
    total = tl.zeros([ROWS, 1], tl.float32)
    for begin in range(0, slices, PARTS):
        part = begin + parts
        inside = (part < slices) & proposing
        values = tl.load(survey + part, mask=inside, other=-INFINITY)
        sums = tl.load(survey + slices + part, mask=inside, other=0.0)
        sums *= _weight(values, largest, divisor)
        total += tl.sum(tl.where(inside, sums, 0.0), 1, keep_dims=True)
    return largest, total + (largest - largest)


# COARSE, FINE, GATHER -----------------------------------------------------------------------------


@triton.jit
def _by_count(k, vocab_size):
    return (k > 0) & (k < vocab_size)


@triton.jit
def _bound(way, low, high, fine):
    """Bits of the thresholds of COARSE, or of FINE between `low` and `high`; they ascend.

    Those of COARSE are 0, then 14 that are 2**(j (j + 7) / 8) below 1: narrow where tokens are
    dense, and 2**-32 at the least. The last is above all weights.
    """
    j = WAYS - 1 - way
    coarse = tl.where(way == 0, 0, tl.where(j == 0, ONE + 1, ONE - ((j * (j + 7)) << 20)))
    even = low + (high - low) // (WAYS - 1) * way
    return tl.where(fine, tl.where(j == 0, high, even), coarse)


@triton.jit
def _interval(
    record,
    vocab_size,
    low,
    high,
    fine,
    k,
    p,
    total,
    active,
    ROWS: tl.constexpr,
    SLICE: tl.constexpr,
):
    """What a level found: the way whose threshold and next enclose the last token kept, their bits,
    how many tokens are between them, and how many with what weight are above.

    For a row with both filters there is no upper end: it has the tokens from the lower one on.
    """
    slices = tl.cdiv(vocab_size, SLICE)
    ways = tl.arange(0, WAYS)[None, :]
    parts = tl.arange(0, PARTS)[None, :, None]
    level = (record + _level(vocab_size, fine, SLICE))[:, :, None]
    numbers = tl.zeros([ROWS, WAYS], tl.float32)
    weights = tl.zeros([ROWS, WAYS], tl.float32)
    for begin in range(0, slices, PARTS):
        part = begin + parts
        there = level + part * WAYS + tl.arange(0, WAYS)[None, None, :]
        inside = (part < slices) & active[:, :, None]
        numbers += tl.sum(tl.load(there, mask=inside, other=0.0), 1)
        weights += tl.sum(tl.load(there + slices * WAYS, mask=inside, other=0.0), 1)
    by_count = _by_count(k, vocab_size)
    enough = tl.where(by_count, numbers >= k.to(tl.float32), weights >= p * total)
    # Something is kept, whatever is wanted. The first threshold always keeps enough, and the last
    # none that are wanted.
    enough = enough & (numbers > 0) & (ways > 0) & (ways < WAYS - 1)
    way = tl.sum(enough.to(tl.int32), 1, keep_dims=True)
    number = tl.sum(tl.where(ways == way, numbers, 0.0), 1, keep_dims=True)
    number_above = tl.sum(tl.where(ways == way + 1, numbers, 0.0), 1, keep_dims=True)
    weight_above = tl.sum(tl.where(ways == way + 1, weights, 0.0), 1, keep_dims=True)
    both = by_count & (p < 1)
    number_above = tl.where(both, 0.0, number_above)
    weight_above = tl.where(both, 0.0, weight_above)
    begins, ends = _bound(way, low, high, fine), _bound(way + 1, low, high, fine)
    return way, begins, ends, number - number_above, number_above, weight_above


@triton.jit
def _narrow(
    record,
    target,
    vocab_size,
    part,
    largest,
    divisor,
    k,
    p,
    total,
    active,
    FINER: tl.constexpr,
    ROWS: tl.constexpr,
    SLICE: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """Number and weight of one slice's tokens at or above each threshold of a level."""
    low = tl.zeros([ROWS, 1], tl.int32)
    high = low
    if FINER:
        _, low, high, number, _, _ = _interval(
            record, vocab_size, low, high, False, k, p, total, active, ROWS, SLICE
        )
        active = active & (number > CAPACITY)
    if _any(active):
        slices = tl.cdiv(vocab_size, SLICE)
        token = part * SLICE + tl.arange(0, SLICE)[None, :]
        inside = (token < vocab_size) & active
        x = tl.load(target + token, mask=inside, other=-INFINITY)
        weight = tl.where(inside, _weight(x, largest, divisor), -1.0)
        # A row with both filters needs numbers only.
        weighs = _any(active & ((_by_count(k, vocab_size) & (p < 1)) == 0))
        there = record + _level(vocab_size, FINER, SLICE) + part * WAYS
        for way in range(0, WAYS):
            reaches = weight >= _bits(_bound(way, low, high, FINER))
            number = tl.sum(reaches.to(tl.float32), 1, keep_dims=True)
            tl.store(there + way, number, mask=active)
            if weighs:
                sums = tl.sum(tl.where(reaches, weight, 0.0), 1, keep_dims=True)
                tl.store(there + slices * WAYS + way, sums, mask=active)


@triton.jit
def _enclosed(
    record,
    vocab_size,
    k,
    p,
    total,
    active,
    ROWS: tl.constexpr,
    SLICE: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """What `_interval` says of the level that is the last one a cell needs, and which that is."""
    zero = tl.zeros([ROWS, 1], tl.int32)
    way, low, high, number, number_above, weight_above = _interval(
        record, vocab_size, zero, zero, False, k, p, total, active, ROWS, SLICE
    )
    fine = number > CAPACITY
    if _any(active & fine):
        finer, lower, upper, fewer, fewer_above, lighter_above = _interval(
            record, vocab_size, low, high, True, k, p, total, active & fine, ROWS, SLICE
        )
        way = tl.where(fine, finer, way)
        low = tl.where(fine, lower, low)
        high = tl.where(fine, upper, high)
        number = tl.where(fine, fewer, number)
        number_above = tl.where(fine, fewer_above, number_above)
        weight_above = tl.where(fine, lighter_above, weight_above)
    return fine, way, low, high, number, number_above, weight_above


@triton.jit
def _gather(
    record,
    target,
    vocab_size,
    draft_vocab_size,
    part,
    largest,
    divisor,
    k,
    p,
    total,
    active,
    ROWS: tl.constexpr,
    SLICE: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """One slice's share of its cell's list, behind those of the slices before."""
    fine, way, low, high, number, _, _ = _enclosed(
        record, vocab_size, k, p, total, active, ROWS, SLICE, CAPACITY
    )
    active = active & (number <= CAPACITY)
    slices = tl.cdiv(vocab_size, SLICE)
    both = _by_count(k, vocab_size) & (p < 1)
    level = record + tl.where(fine, _level(vocab_size, 1, SLICE), _level(vocab_size, 0, SLICE))
    before = tl.zeros([ROWS, 1], tl.float32)
    mine = tl.zeros([ROWS, 1], tl.float32)
    for begin in range(0, slices, PARTS):
        other = begin + tl.arange(0, PARTS)[None, :]
        inside = (other <= part) & active
        there = level + other * WAYS + way
        numbers = tl.load(there, mask=inside, other=0.0)
        numbers -= tl.load(there + 1, mask=inside & (both == 0), other=0.0)
        before += tl.sum(tl.where(other < part, numbers, 0.0), 1, keep_dims=True)
        mine += tl.sum(tl.where(other == part, numbers, 0.0), 1, keep_dims=True)
    active = active & (mine > 0)
    if _any(active):
        token = part * SLICE + tl.arange(0, SLICE)[None, :]
        inside = (token < vocab_size) & active
        x = tl.load(target + token, mask=inside, other=-INFINITY)
        weight = _weight(x, largest, divisor)
        listed = inside & (weight >= _bits(low)) & (both | (weight < _bits(high)))
        place = before.to(tl.int32) + tl.cumsum(listed.to(tl.int32), 1) - 1
        there = record + _list(vocab_size, draft_vocab_size, SLICE) + place
        tl.store(there, weight, mask=listed & (place < CAPACITY))


# JUDGE --------------------------------------------------------------------------------------------


@triton.jit
def _judge(
    record,
    verdicts,
    target,
    draft,
    places,
    vocab_size,
    draft_vocab_size,
    divisor,
    hot,
    k,
    p,
    token,
    sure,
    uniform,
    needed,
    planned,
    ROWS: tl.constexpr,
    SLICE: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """The verdicts on a cell."""
    largest, first, not_finite, total = _surveyed(record, vocab_size, divisor, needed, ROWS, SLICE)
    floor = tl.zeros([ROWS, 1], tl.float32)
    keeps = token == first
    draft_largest = tl.zeros([ROWS, 1], tl.float32)
    draft_total = tl.full([ROWS, 1], 1.0, tl.float32)
    if _any(needed & hot):
        filtering = needed & hot & (_by_count(k, vocab_size) | (p < 1))
        if _any(filtering):
            found, left = _filtered(
                record,
                target,
                vocab_size,
                draft_vocab_size,
                largest,
                divisor,
                k,
                p,
                total,
                filtering,
                ROWS,
                SLICE,
                CAPACITY,
            )
            floor = tl.where(filtering, found, floor)
            total = tl.where(filtering, left, total)
        known = planned & hot & (token >= 0) & (token < vocab_size)
        logit = tl.load(target + token, mask=known, other=-INFINITY)
        target_prob = _kept(logit, largest, divisor, floor) / total
        proposing = planned & hot & (sure == 0)
        survey = record + _draft_survey(vocab_size, SLICE)
        draft_largest, draft_total = _surveyed_draft(
            survey, draft_vocab_size, divisor, proposing, ROWS, SLICE
        )
        place, has = _place(places, token, draft_vocab_size, vocab_size, known & proposing)
        logit = tl.load(draft + place, mask=has, other=-INFINITY)
        # A draft without the token has no share in it, unless its logits are not finite.
        weight = tl.where(has, _weight(logit, draft_largest, divisor), 0.0)
        draft_prob = tl.where(sure, 1.0, weight / draft_total)
        keeps = tl.where(hot, uniform * draft_prob < target_prob, keeps)
    keeps = keeps & planned
    there = record + verdicts
    tl.store(there, keeps.to(tl.float32), mask=needed)
    tl.store(there + 1, not_finite, mask=needed)
    tl.store(there + 2, largest, mask=needed)
    tl.store(there + 3, floor, mask=needed)
    tl.store(there + 4, total, mask=needed)
    tl.store(there + 5, draft_largest, mask=needed)
    tl.store(there + 6, draft_total, mask=needed)


@triton.jit
def _place(places, token, size, vocab_size, active):
    """Draft ids of target tokens, and which of the tokens have one."""
    place = token.to(tl.int32)
    has = active & (token < size)
    if size < vocab_size:
        place = _integer(tl.load(places + token, mask=active, other=0.0))
        has = active & (place >= 0)
    return place, has


@triton.jit
def _filtered(
    record,
    target,
    vocab_size,
    draft_vocab_size,
    largest,
    divisor,
    k,
    p,
    total,
    active,
    ROWS: tl.constexpr,
    SLICE: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """Threshold of what top-k and then top-p keep, and the sum of the weights kept."""
    _, _, low, _, number, number_above, weight_above = _enclosed(
        record, vocab_size, k, p, total, active, ROWS, SLICE, CAPACITY
    )
    by_count = _by_count(k, vocab_size)
    by_mass = p < 1
    wanted = k.to(tl.float32)
    listed = active & (number <= CAPACITY)
    floor = tl.zeros([ROWS, 1], tl.float32)
    left = total
    if _any(listed):
        place = tl.arange(0, CAPACITY)[None, :]
        there = record + _list(vocab_size, draft_vocab_size, SLICE) + place
        weight = tl.load(there, mask=listed & (place < number), other=-1.0)
        floor = _bits(low)
        if _any(listed & by_count):
            found = _last(weight, low, wanted - number_above, False, ROWS)
            floor = tl.where(by_count, found, floor)
            sums = weight_above + _at_least(weight, floor)
            left = tl.where(by_count, sums, left)
        if _any(listed & by_mass):
            found = _last(weight, low, p * left - weight_above, True, ROWS)
            floor = tl.where(by_mass, tl.maximum(floor, found), floor)
            left = tl.where(by_mass, weight_above + _at_least(weight, floor), left)
    unlisted = active & (number > CAPACITY)
    if _any(unlisted):
        found, sums = _searched(
            target, vocab_size, largest, divisor, by_count, wanted, p, unlisted, ROWS, SLICE
        )
        floor = tl.where(unlisted, found, floor)
        left = tl.where(unlisted, sums, left)
    return floor, left


@triton.jit
def _at_least(weight, floor):
    return tl.sum(tl.where(weight >= floor, weight, 0.0), 1, keep_dims=True)


@triton.jit
def _last(weight, low, wanted, BY_MASS: tl.constexpr, ROWS: tl.constexpr):
    """The largest t, `low` at the least, such that the weights of at least t number `wanted`, or
    sum to it. None is kept above the largest weight, whatever is wanted."""
    step = tl.full([], HIGHEST_BIT, tl.int32)
    for _ in range(0, BITS):
        probe = low + step
        reaches = weight >= _bits(probe)
        number = tl.sum(reaches.to(tl.float32), 1, keep_dims=True)
        found = number
        if BY_MASS:
            found = tl.sum(tl.where(reaches, weight, 0.0), 1, keep_dims=True)
        low = tl.where((number > 0) & (found >= wanted), probe, low)
        step = step // 2
    return _bits(low)


@triton.jit
def _searched(
    logits,
    size,
    largest,
    divisor,
    by_count,
    wanted,
    p,
    active,
    ROWS: tl.constexpr,
    SLICE: tl.constexpr,
):
    """As `_filtered`, from the whole vocabulary."""
    BLOCK: tl.constexpr = SEARCH_BLOCK if SLICE > SEARCH_BLOCK else SLICE
    floor = tl.zeros([ROWS, 1], tl.float32)
    if _any(active & by_count):
        found = _threshold(logits, size, largest, divisor, wanted, active, False, ROWS, BLOCK)
        floor = tl.where(by_count, found, floor)
    total = _total(logits, size, largest, divisor, floor, active, ROWS, BLOCK)
    by_mass = p < 1
    if _any(active & by_mass):
        # Of the mass that top-k left. What is below its floor is more than that, so that the
        # search ends above it without being told.
        found = _threshold(logits, size, largest, divisor, p * total, active, True, ROWS, BLOCK)
        floor = tl.where(by_mass, tl.maximum(floor, found), floor)
        total = _total(logits, size, largest, divisor, floor, active, ROWS, BLOCK)
    return floor, total


@triton.jit
def _total(logits, size, largest, divisor, floor, active, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of the weights kept."""
    lanes = tl.arange(0, BLOCK)[None, :]
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    for begin in range(0, size, BLOCK):
        token = begin + lanes
        x = tl.load(logits + token, mask=(token < size) & active, other=-INFINITY)
        sums += _kept(x, largest, divisor, floor)
    return tl.sum(sums, 1, keep_dims=True)


@triton.jit
def _threshold(
    logits,
    size,
    largest,
    divisor,
    wanted,
    active,
    BY_MASS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The largest t such that the weights of at least t number `wanted`, or sum to it.

    0, which keeps everything, if rounding leaves none.
    """
    lanes = tl.arange(0, BLOCK)[None, :]
    ways = tl.arange(0, SEARCH_WAYS)[None, :]
    low = tl.zeros([ROWS, 1], tl.int32)
    for i in range(0, BITS // SEARCH_BITS):
        shift = BITS - (i + 1) * SEARCH_BITS
        bounds = _bits(low + (ways << shift))
        sums = tl.zeros([ROWS, SEARCH_WAYS, BLOCK], tl.float32)
        for begin in range(0, size, BLOCK):
            token = begin + lanes
            inside = (token < size) & active
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
    return _bits(low)


# WEIGH, DRAW --------------------------------------------------------------------------------------


@triton.jit
def _walked(verdicts, size, length, num_drafts, ROWS: tl.constexpr):
    """The cell in which each row ends, and how many of its logits are not finite."""
    accepted = tl.zeros([ROWS, 1], tl.int32)
    broken = tl.zeros([ROWS, 1], tl.float32)
    going = length >= 0
    for cell in range(0, tl.max(length) + 1):
        needed = cell <= length
        there = verdicts + cell * size
        keeps = tl.load(there, mask=needed, other=0.0) > 0
        broken += tl.load(there + 1, mask=needed, other=0.0)
        going = going & keeps
        accepted += going.to(tl.int32)
    return accepted, broken


@triton.jit
def _said(verdict, active):
    """What JUDGE found of the distributions of a cell."""
    largest = tl.load(verdict + 2, mask=active, other=0.0)
    floor = tl.load(verdict + 3, mask=active, other=0.0)
    total = tl.load(verdict + 4, mask=active, other=1.0)
    draft_largest = tl.load(verdict + 5, mask=active, other=0.0)
    draft_total = tl.load(verdict + 6, mask=active, other=1.0)
    return largest, floor, total, draft_largest, draft_total


@triton.jit
def _residual(
    target,
    draft,
    places,
    vocab_size,
    draft_vocab_size,
    token,
    largest,
    divisor,
    floor,
    total,
    proposing,
    draft_largest,
    draft_total,
    certain_token,
    active,
):
    """Probabilities of tokens, and what is left of them after the draft's are taken off.

    The draft's distribution is that of its logits where it is `proposing`, else all on
    `certain_token`, -1 for none.
    """
    inside = (token < vocab_size) & active
    x = tl.load(target + token, mask=inside, other=-INFINITY)
    probs = tl.where(inside, _kept(x, largest, divisor, floor) / total, 0.0)
    proposed = tl.where(token == certain_token, 1.0, 0.0)
    if _any(proposing):
        place, has = _place(places, token, draft_vocab_size, vocab_size, inside & proposing)
        x = tl.load(draft + place, mask=has, other=-INFINITY)
        share = _weight(x, draft_largest, divisor) / draft_total
        proposed = tl.where(has, share, proposed)
    return probs, tl.maximum(probs - proposed, 0.0)


@triton.jit
def _weigh(
    masses,
    target,
    draft,
    places,
    vocab_size,
    draft_vocab_size,
    part,
    largest,
    divisor,
    floor,
    total,
    proposing,
    draft_largest,
    draft_total,
    certain_token,
    active,
    ROWS: tl.constexpr,
    SLICE: tl.constexpr,
):
    """Mass of one slice of the residual, and of the target."""
    BLOCK: tl.constexpr = WEIGH_BLOCK if SLICE > WEIGH_BLOCK else SLICE
    mass = tl.zeros([ROWS, BLOCK], tl.float32)
    whole = tl.zeros([ROWS, BLOCK], tl.float32)
    for begin in range(part * SLICE, (part + 1) * SLICE, BLOCK):
        probs, residual = _residual(
            target,
            draft,
            places,
            vocab_size,
            draft_vocab_size,
            begin + tl.arange(0, BLOCK)[None, :],
            largest,
            divisor,
            floor,
            total,
            proposing,
            draft_largest,
            draft_total,
            certain_token,
            active,
        )
        mass += residual
        whole += probs
    there = masses + part
    tl.store(there, tl.sum(mass, 1, keep_dims=True), mask=active)
    there += tl.cdiv(vocab_size, SLICE)
    tl.store(there, tl.sum(whole, 1, keep_dims=True), mask=active)


@triton.jit
def _drawn(
    masses,
    target,
    draft,
    places,
    vocab_size,
    draft_vocab_size,
    largest,
    divisor,
    floor,
    total,
    proposing,
    draft_largest,
    draft_total,
    certain_token,
    uniform,
    active,
    ROWS: tl.constexpr,
    SLICE: tl.constexpr,
):
    """The bonus: by inverse CDF from the residual, or from the target where that has no mass."""
    slices = tl.cdiv(vocab_size, SLICE)
    parts = tl.arange(0, PARTS)[None, :]
    mass = tl.zeros([ROWS, 1], tl.float64)
    whole = tl.zeros([ROWS, 1], tl.float64)
    for begin in range(0, slices, PARTS):
        part = begin + parts
        inside = (part < slices) & active
        found = tl.load(masses + part, mask=inside, other=0.0).to(tl.float64)
        mass += tl.sum(found, 1, keep_dims=True)
        found = tl.load(masses + slices + part, mask=inside, other=0.0).to(tl.float64)
        whole += tl.sum(found, 1, keep_dims=True)
    has_mass = mass > MIN_RESIDUAL_MASS
    # The first slice with which the running sum exceeds the limit, and the sum before it.
    limit = uniform * tl.where(has_mass, mass, whole)
    source = masses + tl.where(has_mass, 0, slices)
    running = tl.zeros([ROWS, 1], tl.float64)
    below = tl.zeros([ROWS, 1], tl.float64)
    chosen = tl.full([ROWS, 1], BEYOND, tl.int32)
    for begin in range(0, slices, PARTS):
        part = begin + parts
        inside = (part < slices) & active
        found = tl.load(source + part, mask=inside, other=0.0).to(tl.float64)
        after = running + tl.cumsum(found, 1)
        exceeds = inside & (found > 0) & (after > limit)
        here = tl.min(tl.where(exceeds, part, BEYOND), 1, keep_dims=True)
        before = tl.sum(tl.where(part == here, after - found, 0.0), 1, keep_dims=True)
        below = tl.where((chosen == BEYOND) & (here < BEYOND), before, below)
        chosen = tl.minimum(chosen, here)
        running += tl.sum(found, 1, keep_dims=True)
    # None exceeds it only if what the weights sum to is not a number.
    begin = tl.where(chosen < BEYOND, chosen, 0) * SLICE
    token = begin + tl.arange(0, SLICE)[None, :]
    probs, residual = _residual(
        target,
        draft,
        places,
        vocab_size,
        draft_vocab_size,
        token,
        largest,
        divisor,
        floor,
        total,
        proposing,
        draft_largest,
        draft_total,
        certain_token,
        active,
    )
    left = tl.where(has_mass, residual, probs)
    # A token without mass is never drawn, whatever rounding does to the running sum.
    massive = left > 0
    reached = massive & (tl.cumsum(left, 1) > (limit - below).to(tl.float32))
    first = tl.min(tl.where(reached, token, BEYOND), 1, keep_dims=True)
    last = tl.max(tl.where(massive, token, 0), 1, keep_dims=True)
    return tl.where(first < BEYOND, first, last)
