"""What a drafter brings on text it did not choose, and how far a text repeats itself."""

from collections.abc import Sequence

from kangaroo.bench.divergence import run_full_pass
from kangaroo.drafters.adapter import Adapter
from kangaroo.model.cache import CachedPass, Segment
from kangaroo.model.transformer import Transformer


def repeated_share(token_ids: Sequence[int], *, length: int = 8) -> float:
    """Share of a text's n-grams of this length that occurred in it before; 0 for shorter texts."""
    grams = [tuple(token_ids[start : start + length]) for start in range(len(token_ids) - length + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def count_forced_steps(
    target: Transformer, adapter: Adapter, *, token_ids: Sequence[int], num_prompt: int, gamma: int
) -> tuple[int, int]:
    """Tokens and steps of a chain draft, teacher-forced over the text behind its first num_prompt tokens.

    The draft is right at a position where its top-1, given the true prefix, is the target's top-1; a step accepts
    right positions up to gamma or the first miss, and adds the bonus token. The first token is the prefill's, as in
    decoding, so that on the target's own greedy text this is the count that decoding with eta 0 reaches.
    """
    end = len(token_ids) - num_prompt - 1
    if end <= 0:
        return 0, 0
    states, tapped = run_full_pass(target, token_ids, taps=(adapter.config.exit_layer,))
    cache = adapter.new_cache(target, num_sequences=1, num_slots=len(token_ids))
    attention = CachedPass(cache, [Segment(0, 0, len(token_ids))])
    drafted = adapter.run(tapped[adapter.config.exit_layer], attention=attention)[num_prompt:]
    guesses, _ = adapter.head(target).guess(drafted, adapter.final_norm)
    agrees = (guesses == target.argmax(states[num_prompt:])).tolist()
    # The state of token i predicts token i + 1; the root of the first step is the first token behind the prompt.
    position = num_steps = 0
    while position < end:
        window = agrees[position : min(position + gamma, end - 1)]
        position += 1 + (window.index(False) if False in window else len(window))
        num_steps += 1
    return end, num_steps
