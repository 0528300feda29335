"""How often a target that skips sublayers guesses right, from one teacher-forced pass over the target's own texts.

Shapes: M guessed positions of a text, R rows of a pass.
"""

from collections.abc import Sequence

import torch

from kangaroo.bench.agreement import HEAD_ROWS, Judged
from kangaroo.bench.texts import Text
from kangaroo.model.cache import CachedPass, Segment
from kangaroo.model.skips import SkippedSublayers
from kangaroo.model.transformer import Transformer

# Rows of one pass.
PASS_ROWS = 512


class ForcedTexts:
    """Texts whose keys and values the target has cached, ready for one pass of every candidate.

    Every text is cut into chains of num_drafted tokens, as if a draft began at each. Behind the text's own slots each
    chain stands as a branch of a tree: it sees the target's keys up to where it begins, and the candidate's own of its
    earlier tokens, as a draft does that was right so far. Real drafts begin elsewhere, so that for a guess the number
    of skipped keys it sees is right on average only: an approximation.
    """

    def __init__(self, target: Transformer, texts: Sequence[Text], *, num_drafted: int) -> None:
        self._target = target
        self._texts = texts
        num_slots = max(len(text.token_ids) + text.num_guessed + num_drafted for text in texts)
        self._cache = target.new_cache(len(texts), num_slots)
        for row, text in enumerate(texts):
            attention = CachedPass(self._cache, [Segment(row, 0, len(text.token_ids))])
            target.forward(self._embed(text.token_ids), (0, target.num_layers), attention=attention)
        self._passes = []
        for rows in _group([text.num_guessed for text in texts]):
            segments = [one for row in rows for one in _chains(texts[row], row, num_drafted=num_drafted)]
            tokens = [token for row in rows for token in texts[row].token_ids[texts[row].num_prompt : -1]]
            self._passes.append((CachedPass(self._cache, segments), tokens))

    def judge(self, skips: SkippedSublayers) -> list[Judged]:
        """What the target without these sublayers guesses at every position of every text."""
        target, guessed, confidences = self._target, list[int](), list[float]()
        for attention, tokens in self._passes:
            span = (0, target.num_layers)
            hidden, _ = target.forward(self._embed(tokens), span, attention=attention, skips=skips)
            for rows in hidden.split(HEAD_ROWS):
                ids, confidence = target.guess(rows, target.final_norm)
                guessed += ids.tolist()
                confidences += confidence.tolist()
        judged, first = [], 0
        for text in self._texts:
            rows = slice(first, first + text.num_guessed)
            true = text.token_ids[text.num_prompt + 1 :]
            agrees = [guess == token for guess, token in zip(guessed[rows], true, strict=True)]
            judged.append(Judged(agrees, confidences[rows]))
            first = rows.stop
        return judged

    def _embed(self, token_ids: Sequence[int]) -> torch.Tensor:
        return self._target.embed(torch.tensor(token_ids, device=self._target.device))


def _chains(text: Text, row: int, *, num_drafted: int) -> list[Segment]:
    """The chains of a text as segments of its cached row: each behind its beginning, in slots behind the whole text."""
    num_new, segments = len(text.token_ids) - text.num_prompt, []
    for start in range(text.num_prompt, len(text.token_ids) - 1, num_drafted):
        length = min(num_drafted, len(text.token_ids) - 1 - start)
        # The nodes below num_new are slots of the text itself or of other chains: no ancestors of these.
        parents = (-1,) * (num_new + 1) + tuple(range(num_new, num_new + length - 1))
        segments.append(Segment(row, start, length, parents, num_new))
    return segments


def _group(sizes: Sequence[int]) -> list[list[int]]:
    """Indices in runs of at most PASS_ROWS rows, or of one where that has more."""
    groups: list[list[int]] = []
    room = 0
    for index, size in enumerate(sizes):
        if not groups or size > room:
            groups.append([])
            room = PASS_ROWS
        groups[-1].append(index)
        room -= size
    return groups
