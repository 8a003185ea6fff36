"""Exercise 3: decoding with a KV cache."""

import torch


def visible(now, length: int, window):
    """kv_cache.may_see as a list of lists: the positions that each query sees."""
    from kv_cache import may_see

    seen = may_see(now, length, window)
    assert seen.dtype == torch.bool, f"may_see returns {seen.dtype}, not torch.bool"
    assert seen.shape == (len(now), length), f"may_see returns the shape {tuple(seen.shape)}"
    return [row.nonzero().flatten().tolist() for row in seen]


def mask_of(position, windows, dtype):
    """Decode.mask for each of `windows`, asked of one step in this order."""
    from kv_cache import Decode

    step = Decode(None, position)
    return [step.mask(window, dtype) for window in windows]


def mask_is_kept(position, windows):
    """For each window whether Decode.mask gives the same memory when it is asked again."""
    from kv_cache import Decode

    step = Decode(None, position)
    first = [step.mask(window, torch.float32) for window in windows]
    again = [step.mask(window, torch.float32) for window in windows]
    return [one.data_ptr() == other.data_ptr() for one, other in zip(first, again)]


@torch.no_grad()
def attend_prefill(cached, slots, query, key, value, scaling, window):
    """Prefill.attend on one layer, whose cache `cached` = (keys, values) [S,H,L,E] has been used.

    Returns what comes out, and the keys and values in the cache behind it.
    """
    from kv_cache import KVCache, Prefill

    count, _, length, _ = cached[0].shape
    cache = KVCache(count, length)
    cache.layers[0] = tuple(tensor.clone() for tensor in cached)
    step = Prefill(cache, slots)
    out = step.attend(0, query.clone(), key.clone(), value.clone(), scaling, window)
    return out, *cache.layers[0]


@torch.no_grad()
def attend_decode(cached, position, query, key, value, scaling, window):
    """The same with Decode.attend: one new token for each of the slots [0, A)."""
    from kv_cache import Decode, KVCache

    count, _, total, _ = cached[0].shape
    cache = KVCache(count, total)
    cache.layers[0] = tuple(tensor.clone() for tensor in cached)
    step = Decode(cache, position.clone())
    out = step.attend(0, query.clone(), key.clone(), value.clone(), scaling, window)
    return out, *cache.layers[0]


def rollouts(family: str, prompts, slots: int, max_new_tokens: int, stops, greedy: bool):
    """(response ids, their log-probabilities) of each prompt, from the generator.

    `greedy`: the most probable token, or else any token, whatever the model says.
    """
    import tiny

    import kv_cache  # noqa: F401, which makes "kv_slots" known to transformers
    from channel import Rollout
    from generate import Generator
    from losses import Greedy, Proposal
    from support.config import builtin

    class Anything(Proposal):
        def propose(self, logits, uniforms):
            ids = (uniforms * logits.shape[1]).long()
            return ids, logits.log_softmax(-1).gather(1, ids)

    model = tiny.random_model(family)
    model.set_attn_implementation("kv_slots")
    longest = max(map(len, prompts))
    config = builtin(max_prompt_tokens=longest, max_new_tokens=max_new_tokens)
    proposal = Greedy() if greedy else Anything()
    vocab = model.config.vocab_size
    generator = Generator(model, proposal, config, set(stops), vocab, slots)
    started = [Rollout(list(ids), ticket) for ticket, ids in enumerate(prompts)]
    return [(one.response_ids, one.behavior_logp[:, 0]) for one in generator.generate(started)]
