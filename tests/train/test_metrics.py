"""The metrics against plain Python that spells out their definitions."""

import pytest
import torch

from kangaroo.train.metrics import Positions


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(3, 20, 5, generator=generator)
    return target + 0.5 * torch.randn(3, 20, 5, generator=generator), target


@pytest.fixture
def mask():
    mask = torch.ones(3, 20, dtype=torch.bool)
    mask[0, 8:11] = mask[2, :15] = False
    return mask


def test_summary_equals_the_definitions(logits, mask):
    draft, target = logits
    summary = Positions.compare(draft, target, mask=mask).summary()
    places = [(row, t) for row in range(3) for t in range(20) if mask[row, t]]
    p, q = draft.softmax(-1), target.softmax(-1)
    agrees = {place: int(draft[place].argmax()) == int(target[place].argmax()) for place in places}
    best = {place: sorted(range(5), key=lambda v, x=draft[place]: -float(x[v]))[:3] for place in places}

    def mean(values):
        values = [float(value) for value in values]
        return pytest.approx(sum(values) / len(values), rel=1e-5)

    assert summary["loss"] == mean(-(q[x] * p[x].log()).sum() for x in places)
    assert summary["top1"] == mean(agrees.values())
    assert summary["top3"] == mean(int(target[x].argmax()) in best[x] for x in places)
    assert summary["expected_acceptance"] == mean(torch.minimum(p[x], q[x]).sum() for x in places)
    total = 1.0
    for width in range(1, 7):
        windows = [[(row, t + i) for i in range(width)] for row, t in places]
        windows = [window for window in windows if all(x in agrees for x in window)]
        assert summary[f"ctar_{width}"] == mean(all(agrees[x] for x in window) for window in windows)
        total += summary[f"ctar_{width}"]
    assert summary["expected_tokens_per_step"] == pytest.approx(total)


def test_a_perfect_draft_scores_one(logits):
    _, target = logits
    summary = Positions.compare(target, target, mask=torch.ones(3, 20, dtype=torch.bool)).summary()
    assert all(summary[name] == pytest.approx(1) for name in summary if name.startswith(("top", "ctar", "expected_a")))
    assert summary["expected_tokens_per_step"] == pytest.approx(7)


def test_recommendation_equals_simulated_drafting(logits, mask):
    facts = Positions.compare(*logits, mask=mask)

    def rate(gamma, eta):
        num_tokens = num_drafted = num_starts = 0
        for row in range(3):
            for start in range(15):
                if not mask[row, start : start + 6].all():
                    continue
                num_starts, num_tokens, alive = num_starts + 1, num_tokens + 1, True
                for t in range(start, start + gamma):
                    num_drafted += 1
                    alive = alive and bool(facts.agrees[row, t])
                    num_tokens += alive
                    if facts.confidence[row, t] < eta:
                        break
        return num_tokens / (num_starts + 0.2 * num_drafted)

    best = max(rate(gamma, step / 20) for gamma in range(1, 7) for step in range(20))
    assert rate(*facts.recommend(0.2)) == pytest.approx(best)


def test_a_perfect_draft_is_drafted_in_full_and_a_useless_one_hardly(logits):
    _, target = logits
    everything = torch.ones(3, 20, dtype=torch.bool)
    assert Positions.compare(target, target, mask=everything).recommend(0.1) == (6, 0.0)
    assert Positions.compare(-target, target, mask=everything).recommend(0.1)[0] == 1


def test_nothing_counted_gives_zeros_not_an_error(logits):
    facts = Positions.compare(*logits, mask=torch.zeros(3, 20, dtype=torch.bool))
    assert facts.summary()["ctar_6"] == 0.0
    assert facts.recommend(0.1) == (6, 0.0)
