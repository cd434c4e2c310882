"""Responses of a target in torch: many rows at a time, token by token over their caches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dspark_batch.decode import SamplingParams
from dspark_batch.training.decoder import Decoder, KeysValues, padded

_PREFILL_TOKENS = 1 << 13  # of a pass, padding counted
_LOOK_EVERY = 16  # steps between looks at which rows have ended, which wait for the device
_MOST_ROWS = 1024  # a vocabulary of logits for each is alive at a time


def rows_within(
    decoder: Decoder, prompts: Sequence[Sequence[int]], max_new_tokens: int, *, num_bytes: int
) -> int:
    """How many of the first prompts have caches that fit `num_bytes` together; at least one."""
    of_position = KeysValues.num_bytes(decoder.spec, decoder.dtype)
    longest = 0
    for count, prompt in enumerate(prompts[:_MOST_ROWS]):
        longest = max(longest, len(prompt) + max_new_tokens)
        if count and (count + 1) * longest * of_position > num_bytes:
            return count
    return min(len(prompts), _MOST_ROWS)


@torch.inference_mode()
def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    *,
    stop_token_ids: Sequence[int],
    check: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """A response to each prompt, its stop token included.

    What is sampled depends on the seed and on the rows beside each other. `check` is called on the
    way and may raise.
    """
    device, longest = decoder.device, max(map(len, prompts))
    random = torch.Generator(device).manual_seed(params.seed)
    cache = KeysValues.empty(
        decoder.spec,
        len(prompts),
        longest + params.max_new_tokens,
        device=device,
        dtype=decoder.dtype,
    )
    stops = torch.tensor(list(stop_token_ids), dtype=torch.long, device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    normed = _prefill(decoder, prompts, lengths, cache)
    rows, positions = torch.arange(len(prompts), device=device), lengths
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    written = torch.zeros(len(prompts), params.max_new_tokens, dtype=torch.long, device=device)
    for step in range(params.max_new_tokens):
        tokens = _choose(decoder.logits(normed), params, random)
        written[rows, step] = tokens
        done = done | torch.isin(tokens, stops)
        if step % _LOOK_EVERY == 0:
            check()
            alive = (~done).nonzero()[:, 0]
            if len(alive) == 0:
                break
            if len(alive) <= 0.75 * len(rows):
                cache.keep(alive)
                rows, positions, tokens, done = (
                    tensor[alive] for tensor in (rows, positions, tokens, done)
                )
        normed = decoder.forward(
            tokens[:, None], positions=positions[:, None], cache=cache, end=longest + step + 1
        ).normed[:, 0]
        positions = positions + 1
    wanted = set(stop_token_ids)
    return [_up_to_stop(response, wanted) for response in written.tolist()]


def _prefill(
    decoder: Decoder, prompts: Sequence[Sequence[int]], lengths: Tensor, cache: KeysValues
) -> Tensor:
    """Fill the cache; inputs of the head `[b, d]` at the last token of each prompt."""
    longest = max(map(len, prompts))
    step = max(1, _PREFILL_TOKENS // longest)
    found = []
    for begin in range(0, len(prompts), step):
        part = slice(begin, begin + step)
        tokens = padded(prompts[part], decoder.device)
        places = torch.arange(tokens.shape[1], device=decoder.device).expand_as(tokens)
        normed = decoder.forward(
            tokens, positions=places, cache=cache.rows(part), end=tokens.shape[1]
        ).normed
        rows = torch.arange(len(tokens), device=decoder.device)
        found.append(normed[rows, lengths[part] - 1])
    return torch.cat(found)


def _choose(logits: Tensor, params: SamplingParams, random: torch.Generator) -> Tensor:
    """A token for each row of `[b, V]`."""
    if params.temperature == 0:
        return logits.argmax(-1)
    probs = filtered_probs(logits, params)
    return torch.multinomial(probs, 1, generator=random)[:, 0]


def filtered_probs(logits: Tensor, params: SamplingParams) -> Tensor:
    """`decode.algorithm.filtered_probs` above temperature 0, up to a factor: `[b, V]`."""
    probs = (logits / params.temperature).softmax(-1)
    if 0 < params.top_k < probs.shape[-1]:
        least = probs.topk(params.top_k).values[:, -1:]
        probs = probs.where(probs >= least, 0.0)
    if params.top_p < 1:
        ranked = (probs / probs.sum(-1, keepdim=True)).sort(descending=True).values
        short = (ranked.cumsum(-1) < params.top_p).sum(-1, keepdim=True)
        least = ranked.gather(-1, short.clamp(max=probs.shape[-1] - 1))
        probs = probs.where(probs / probs.sum(-1, keepdim=True) >= least, 0.0)
    return probs


def _up_to_stop(response: list[int], stops: set[int]) -> list[int]:
    for place, token in enumerate(response):
        if token in stops:
            return response[: place + 1]
    return response
