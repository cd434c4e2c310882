"""The verification op as a model-local ONNX function of standard ops (`contract`).

Greedy rows cost one ArgMax: everything about probabilities is in a branch that runs only when some
row samples, and the filters in a branch of it. The largest logit is taken off before the division
by the temperature, as in the specification: a tiny temperature must not overflow.
"""

from __future__ import annotations

import onnx
import onnx.parser

from dspark_batch.models.plugin.contract import (
    ATTRIBUTES,
    DOMAIN,
    INPUT_NAMES,
    MIN_RESIDUAL_MASS,
    OP_TYPE,
    OUTPUT_NAMES,
)

# Candidates that are sorted first; only a row whose filter reaches further sorts the vocabulary.
_CANDIDATES = 256

_BODY = f"""
<domain: "{DOMAIN}", opset_import: ["" : 24]>
{OP_TYPE} <{", ".join(ATTRIBUTES)}> ({", ".join(INPUT_NAMES)}) => ({", ".join(OUTPUT_NAMES)})
{{
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    axis0 = Constant <value_ints = [0]> ()
    axis1 = Constant <value_ints = [1]> ()
    axis2 = Constant <value_ints = [2]> ()
    minus_one = Constant <value_int = -1> ()
    minus_ones = Constant <value_ints = [-1]> ()
    to_end = Constant <value_ints = [9223372036854775807]> ()
    fzero = Constant <value_float = 0.0> ()
    fone = Constant <value_float = 1.0> ()

    num_rows = Shape <start = 0, end = 1> (draft_tokens)
    num_drafts = Shape <start = 1, end = 2> (draft_tokens)
    rows_scalar = Squeeze (num_rows)
    drafts_scalar = Squeeze (num_drafts)
    slots = Range (zero, drafts_scalar, one)
    slots_row = Unsqueeze (slots, axis0)
    lengths_column = Unsqueeze (lengths, axis1)
    planned = Less (slots_row, lengths_column)

    row_sum = ReduceSum <keepdims = 0> (logits, axis1)
    sum_is_nan = IsNaN (row_sum)
    sum_is_inf = IsInf (row_sum)
    broken = Or (sum_is_nan, sum_is_inf)
    broken_cells = Gather (broken, logit_rows)
    anchor_cell = Slice (broken_cells, axis0, axis1, axis1)
    draft_cells = Slice (broken_cells, axis1, to_end, axis1)
    draft_broken = And (draft_cells, planned)
    all_broken = Concat <axis = 1> (anchor_cell, draft_broken)
    all_broken_int = Cast <to = 7> (all_broken)
    any_broken = ReduceMax <keepdims = 0> (all_broken_int, axis1)
    row_broken = Cast <to = 9> (any_broken)

    best = ArgMax <axis = 1, keepdims = 0> (logits)
    choices = Gather (best, logit_rows)
    draft_choices = Slice (choices, axis0, num_drafts, axis1)
    matches = Equal (draft_tokens, draft_choices)

    some_temperature = ReduceMax <keepdims = 0> (temperature)
    sampling = Greater (some_temperature, fzero)
    accepted, chosen = If (sampling) <
        then_branch = sampled () => (accepted_then, chosen_then) {{
            hot = Greater (temperature, fzero)
            divisor = Where (hot, temperature, fone)
            divisor1 = Unsqueeze (divisor, axis1)
            divisor2 = Unsqueeze (divisor1, axis2)
            cells = Gather (logits, logit_rows)
            largest = ReduceMax <keepdims = 1> (cells, minus_ones)
            shifted = Sub (cells, largest)
            cooled = Div (shifted, divisor2)
            soft = Softmax <axis = -1> (cooled)

            k_on = Greater (top_k, zero)
            p_on = Less (top_p, fone)
            either_on = Or (k_on, p_on)
            filtered_row = And (either_on, hot)
            filtered_int = Cast <to = 7> (filtered_row)
            filtered_any = ReduceMax <keepdims = 0> (filtered_int)
            filtering = Cast <to = 9> (filtered_any)
            target_probs = If (filtering) <
                then_branch = filtered () => (target_probs_then) {{
                    vocab = Shape <start = 2, end = 3> (soft)
                    many = Constant <value_ints = [{_CANDIDATES}]> ()
                    few = Min (many, vocab)
                    few_values, few_indices = TopK <axis = -1, sorted = 1> (soft, few)
                    few_mass = ReduceSum <keepdims = 0> (few_values, minus_ones)
                    top_p1 = Unsqueeze (top_p, axis1)
                    mass_fits0 = GreaterOrEqual (few_mass, top_p1)
                    p_off = Not (p_on)
                    p_off1 = Unsqueeze (p_off, axis1)
                    mass_fits = Or (mass_fits0, p_off1)
                    k_fits0 = LessOrEqual (top_k, few)
                    k_fits = Unsqueeze (k_fits0, axis1)
                    row_off = Not (filtered_row)
                    row_off1 = Unsqueeze (row_off, axis1)
                    fits0 = And (mass_fits, k_fits)
                    fits1 = Or (fits0, row_off1)
                    fits_int = Cast <to = 7> (fits1)
                    fits = ReduceMin <keepdims = 0> (fits_int)
                    fits_bool = Cast <to = 9> (fits)
                    width = Where (fits_bool, few, vocab)
                    values, indices = TopK <axis = -1, sorted = 1> (soft, width)

                    k_or_all = Where (k_on, top_k, vocab)
                    k_capped = Min (k_or_all, width)
                    k_last = Sub (k_capped, one)
                    k_last1 = Unsqueeze (k_last, axis1)
                    k_last2 = Unsqueeze (k_last1, axis2)
                    cell_shape = Shape <start = 0, end = 2> (soft)
                    index_shape = Concat <axis = 0> (cell_shape, axis1)
                    k_index = Expand (k_last2, index_shape)
                    k_value = GatherElements <axis = 2> (values, k_index)
                    k_on1 = Unsqueeze (k_on, axis1)
                    k_on2 = Unsqueeze (k_on1, axis2)
                    k_floor = Where (k_on2, k_value, fzero)

                    in_k = GreaterOrEqual (soft, k_floor)
                    in_k_probs = Where (in_k, soft, fzero)
                    k_mass = ReduceSum <keepdims = 1> (in_k_probs, minus_ones)
                    top_p2 = Unsqueeze (top_p1, axis2)
                    wanted = Mul (top_p2, k_mass)
                    running = CumSum (values, minus_one)
                    short = Less (running, wanted)
                    short_int = Cast <to = 7> (short)
                    num_short = ReduceSum <keepdims = 1> (short_int, minus_ones)
                    width_last = Sub (width, one)
                    p_index = Min (num_short, width_last)
                    p_value = GatherElements <axis = 2> (values, p_index)
                    p_on1 = Unsqueeze (p_on, axis1)
                    p_on2 = Unsqueeze (p_on1, axis2)
                    p_floor = Where (p_on2, p_value, fzero)
                    floor = Max (k_floor, p_floor)
                    kept = GreaterOrEqual (soft, floor)
                    kept_probs = Where (kept, soft, fzero)
                    kept_mass = ReduceSum <keepdims = 1> (kept_probs, minus_ones)
                    target_probs_then = Div (kept_probs, kept_mass)
                }},
                else_branch = unfiltered () => (target_probs_else) {{
                    target_probs_else = Identity (soft)
                }}
            >

            draft_rows = Slice (draft_logits, axis0, num_drafts, axis1)
            draft_largest = ReduceMax <keepdims = 1> (draft_rows, minus_ones)
            draft_shifted = Sub (draft_rows, draft_largest)
            draft_cooled = Div (draft_shifted, divisor2)
            draft_probs = Softmax <axis = -1> (draft_cooled)
            safe_tokens = Where (planned, draft_tokens, zero)
            token_column = Unsqueeze (safe_tokens, axis2)
            is_token = Equal (token_column, draft_vocab)
            token_draft_probs = Where (is_token, draft_probs, fzero)
            drawn_prob = ReduceSum <keepdims = 0> (token_draft_probs, axis2)
            sure = Greater (certain, zero)
            sure1 = Unsqueeze (sure, axis1)
            draft_prob = Where (sure1, fone, drawn_prob)
            draft_part = Slice (target_probs, axis0, num_drafts, axis1)
            target_prob0 = GatherElements <axis = 2> (draft_part, token_column)
            target_prob = Squeeze (target_prob0, axis2)
            accept_uniforms = Slice (uniforms, axis0, num_drafts, axis1)
            scaled = Mul (accept_uniforms, draft_prob)
            wins = Less (scaled, target_prob)
            hot1 = Unsqueeze (hot, axis1)
            cold1 = Not (hot1)
            hot_wins = And (wins, hot1)
            cold_wins = And (matches, cold1)
            either_wins = Or (hot_wins, cold_wins)
            keeps = And (either_wins, planned)
            fails = Not (keeps)
            fails_int = Cast <to = 7> (fails)
            end_shape = Concat <axis = 0> (num_rows, axis1)
            end = Expand (one, end_shape)
            fails_end = Concat <axis = 1> (fails_int, end)
            accepted_then = ArgMax <axis = 1, keepdims = 0> (fails_end)

            accepted_column = Unsqueeze (accepted_then, axis1)
            greedy_column = GatherElements <axis = 1> (choices, accepted_column)
            greedy_token = Squeeze (greedy_column, axis1)
            row_numbers = Range (zero, rows_scalar, one)
            num_cells = Add (drafts_scalar, one)
            row_cells = Mul (row_numbers, num_cells)
            target_cell = Add (row_cells, accepted_then)
            vocab_shape = Shape <start = 2, end = 3> (target_probs)
            flat_shape = Concat <axis = 0> (minus_ones, vocab_shape)
            flat_target = Reshape (target_probs, flat_shape)
            at_target = Gather (flat_target, target_cell)
            nothing = Constant <value_ints = [0, 0, 0, 0, 1, 0]> ()
            ended_probs = Pad (draft_probs, nothing)
            draft_vocab_shape = Shape <start = 2, end = 3> (draft_probs)
            flat_draft_shape = Concat <axis = 0> (minus_ones, draft_vocab_shape)
            flat_draft = Reshape (ended_probs, flat_draft_shape)
            at_draft0 = Gather (flat_draft, target_cell)
            rejected = Less (accepted_then, lengths)
            rejected1 = Unsqueeze (rejected, axis1)
            unsure1 = Not (sure1)
            from_logits = And (rejected1, unsure1)
            at_draft = Where (from_logits, at_draft0, fzero)
            empty = Mul (at_target, fzero)
            at_draft_shape = Shape (at_draft)
            spread_index = Expand (draft_vocab, at_draft_shape)
            spread = ScatterElements <axis = 1> (empty, spread_index, at_draft)
            end_column = Expand (zero, end_shape)
            ended_tokens = Concat <axis = 1> (safe_tokens, end_column)
            refused_column = GatherElements <axis = 1> (ended_tokens, accepted_column)
            spread_there = GatherElements <axis = 1> (spread, refused_column)
            refused_surely = And (rejected1, sure1)
            share_there = Where (refused_surely, fone, spread_there)
            proposed = ScatterElements <axis = 1> (spread, refused_column, share_there)
            difference = Sub (at_target, proposed)
            residual = Max (difference, fzero)
            mass = ReduceSum <keepdims = 1> (residual, axis1)
            tiny = Constant <value_float = {MIN_RESIDUAL_MASS}> ()
            has_mass = Greater (mass, tiny)
            bonus_probs = Where (has_mass, residual, at_target)
            cumulative = CumSum (bonus_probs, one)
            total = Slice (cumulative, minus_ones, to_end, axis1)
            last_uniform = Slice (uniforms, minus_ones, to_end, axis1)
            threshold = Mul (last_uniform, total)
            below = LessOrEqual (cumulative, threshold)
            below_int = Cast <to = 7> (below)
            drawn0 = ReduceSum <keepdims = 0> (below_int, axis1)
            vocab_last = Sub (vocab_shape, one)
            drawn = Min (drawn0, vocab_last)
            chosen_then = Where (hot, drawn, greedy_token)
        }},
        else_branch = greedy () => (accepted_else, chosen_else) {{
            keeps_g = And (matches, planned)
            fails_g = Not (keeps_g)
            fails_g_int = Cast <to = 7> (fails_g)
            end_g_shape = Concat <axis = 0> (num_rows, axis1)
            end_g = Expand (one, end_g_shape)
            fails_g_end = Concat <axis = 1> (fails_g_int, end_g)
            accepted_else = ArgMax <axis = 1, keepdims = 0> (fails_g_end)
            accepted_g_column = Unsqueeze (accepted_else, axis1)
            chosen_g_column = GatherElements <axis = 1> (choices, accepted_g_column)
            chosen_else = Squeeze (chosen_g_column, axis1)
        }}
    >
    num_accepted = Where (row_broken, zero, accepted)
    bonus = Where (row_broken, minus_one, chosen)
}}
"""


def verify_function() -> onnx.FunctionProto:
    """The function body, with the attributes by which a TensorRT plugin takes its place."""
    return onnx.parser.parse_function(_BODY)
