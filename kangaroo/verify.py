"""The one rule of verification: walk the draft from its root along the target's choices.

Shapes: B sequences, N draft nodes, K accepted nodes.
"""

import torch
from torch import Tensor

from kangaroo.types import Draft


def walk(draft: Draft, choices: Tensor) -> Tensor:
    """Follow the target's choices from the root of the draft tree.

    draft.tokens, draft.parents: [B, N] int64, -1 padded; choices: [B, N] int64, the target's pick after each node.
    Returns [B, K] int64 on the CPU: node indices of the accepted path, root first, -1 padded.
    Reads the device once. Raises ValueError if the shapes disagree.
    """
    if not draft.tokens.shape == draft.parents.shape == choices.shape:
        shapes = [tuple(tensor.shape) for tensor in (draft.tokens, draft.parents, choices)]
        raise ValueError(f"tokens, parents and choices must have one shape [B, N], got {shapes}")
    if choices.is_cpu:
        all_tokens, all_picks = draft.tokens.tolist(), choices.tolist()
    else:
        all_tokens, all_picks = torch.stack([draft.tokens, choices]).tolist()
    paths = []
    rows = zip(all_tokens, draft.parents.tolist(), all_picks, draft.num_nodes, strict=True)
    for tokens, parents, picks, num_nodes in rows:
        path = [0]
        # Parents precede their children, so one sweep meets every continuation in order.
        for node in range(1, num_nodes):
            if parents[node] == path[-1] and tokens[node] == picks[path[-1]]:
                path.append(node)
        paths.append(path)
    longest = max(len(path) for path in paths)
    return torch.tensor([path + [-1] * (longest - len(path)) for path in paths])
