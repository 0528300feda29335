"""Published Spec-Bench results, to stand beside ours: other hardware, other models, other code."""

from dataclasses import dataclass

from kangaroo.bench.scores import TASKS


@dataclass(frozen=True)
class Published:
    """A published row: speedups by task and overall, None where the source gives none.

    up_to: whether overall is the best of several results instead of one.
    """

    method: str
    model: str
    hardware: str
    source: str
    speedups: dict[str, float] | None
    mean_accepted_tokens: float | None
    overall: float
    up_to: bool = False


_LEADERBOARD = "Spec-Bench Leaderboard.md, github.com/hemingkx/Spec-Bench at 09244ff"
_RTX_3090, _A100 = "RTX 3090 24GB", "A100 80GB"
_PAPER = "not given in the abstract"
# Method, the six tasks' speedups in the order of TASKS, mean accepted tokens, overall speedup.
_ROWS = {
    _RTX_3090: (
        ("EAGLE2", 2.71, 1.82, 2.19, 2.11, 2.71, 1.91, 4.36, 2.25),
        ("EAGLE", 2.44, 1.81, 2.13, 2.11, 2.54, 1.82, 3.57, 2.16),
        ("SpS (draft model)", 1.98, 1.37, 2.00, 1.95, 1.89, 1.76, 2.29, 1.83),
        ("Hydra", 2.04, 1.67, 1.56, 1.81, 2.16, 1.48, 3.26, 1.80),
        ("PLD (prompt lookup)", 1.57, 1.07, 2.31, 1.25, 1.62, 1.56, 1.74, 1.55),
        ("Medusa", 1.60, 1.38, 1.28, 1.46, 1.64, 1.22, 2.32, 1.44),
        ("REST (retrieval)", 1.49, 1.18, 1.21, 1.46, 1.35, 1.27, 1.63, 1.32),
        ("Lookahead", 1.13, 0.97, 1.05, 1.07, 1.29, 0.98, 1.65, 1.08),
    ),
    _A100: (
        ("EAGLE", 2.67, 1.99, 2.23, 2.12, 2.67, 2.04, 3.61, 2.29),
        ("Hydra", 2.45, 1.94, 1.79, 2.03, 2.49, 1.77, 3.24, 2.09),
        ("Medusa", 2.05, 1.73, 1.57, 1.75, 2.05, 1.51, 2.32, 1.78),
        ("PLD (prompt lookup)", 1.64, 1.04, 2.43, 1.14, 1.61, 1.71, 1.73, 1.59),
        ("SpS (draft model)", 1.66, 1.13, 1.62, 1.49, 1.47, 1.55, 2.28, 1.49),
        ("REST (retrieval)", 1.63, 1.31, 1.36, 1.66, 1.21, 1.73, 1.82, 1.48),
        ("Lookahead", 1.40, 1.14, 1.19, 1.24, 1.55, 1.09, 1.66, 1.27),
    ),
}

PUBLISHED = (
    Published("Kangaroo", "Vicuna", _PAPER, "arXiv 2404.18911v1, abstract", None, None, 1.68, up_to=True),
    Published("Kangaroo", "Vicuna", _PAPER, "NeurIPS 2024 version, abstract", None, None, 2.04, up_to=True),
    *(
        Published(method, "Vicuna-7B-v1.3, float16, greedy", f"{hardware}, PyTorch 2.0.1", _LEADERBOARD,
                  dict(zip(TASKS, speedups, strict=True)), accepted, overall)
        for hardware, rows in _ROWS.items()
        for method, *speedups, accepted, overall in rows
    ),
)  # fmt: skip
