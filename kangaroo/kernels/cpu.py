"""The native row-invariant kernels behind tensors, checked here before their memory is touched.

The value of a row never depends on which rows run beside it, how many, in which slots, or on how many threads.
Shapes: K inputs, N outputs, D hidden size, R rows, V vocabulary, S positions, E head size.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kangaroo.errors import SettingsError
from kangaroo.kernels import _native
from kangaroo.kernels.reference import quantize

Weight = _native.Weight
Cache = _native.Cache
# (sequence, slot of the first node, number of rows, parents of all nodes or None for a chain, first node to run)
Segment = tuple[int, int, int, Sequence[int] | None, int]

# What a pass may leave out of a layer, to be added up.
SKIP_ATTENTION, SKIP_MLP = 1, 2
NORMS = ("input_norm", "query_norm", "key_norm", "post_attention_norm", "mlp_norm", "post_mlp_norm")


def instruction_sets() -> list[str]:
    """What this processor can run, the fastest last."""
    names: list[str] = _native.instruction_sets()
    return names


def selected() -> str:
    """The instruction set in use."""
    name: str = _native.selected()
    return name


def num_threads() -> int:
    """How many threads run a call, the caller's included."""
    count: int = _native.num_threads()
    return count


def select(instruction_set: str, *, num_threads: int | None = None) -> None:
    """Use these kernels on so many threads, PyTorch's number unless given; raises SettingsError for unknown ones."""
    try:
        _native.select(instruction_set)
    except ValueError as error:
        raise SettingsError(f"instruction set must be one of {', '.join(instruction_sets())}, "
                            f"got {instruction_set}") from error  # fmt: skip
    count = num_threads or torch.get_num_threads()
    if count != _native.num_threads():
        _native.set_num_threads(count)


def measure_bandwidth(num_bytes: int) -> float:
    """Bytes a second that all threads together read from memory, the best of three tries."""
    rate: float = _native.measure_bandwidth(num_bytes, 3)
    return rate


def measure_peak(num_steps: int) -> float:
    """Float32 operations a second of all threads together, multiply-adds on full vectors; the best of three."""
    rate: float = _native.measure_peak(num_steps, 3)
    return rate


def pack(weight: Tensor, *, storage: str, bias: Tensor | None = None, paired: bool = False) -> Weight:
    """Pack a weight [N, K] into panels, stored as float32, bfloat16, float16 or int8.

    A paired weight holds gate and up projection, N / 2 rows each, and is multiplied panel by panel in turn.
    """
    bias = None if bias is None else bias.detach().float().contiguous()
    if storage == "int8":
        codes, scales = quantize(weight.detach())
        return Weight(codes, paired=paired, scales=scales, bias=bias)
    rows = weight.detach().to(getattr(torch, storage)).contiguous()
    return Weight(rows, paired=paired, scales=None, bias=bias)


def gather(weight: Weight, rows: list[int]) -> Tensor:
    """Rows [R, K] float32 of a weight by their ids: an embedding."""
    out = torch.empty(len(rows), weight.num_inputs)
    weight.gather(rows, out.data_ptr())
    return out


def linear(hidden: Tensor, weight: Weight) -> Tensor:
    """Multiply hidden [R, K] by a packed weight; returns [R, N]."""
    out = torch.empty(len(hidden), weight.num_rows)
    _native.linear(weight, _address(hidden, (len(hidden), weight.num_inputs)), len(hidden), out.data_ptr())
    return out


# How guesses are drawn: seed, temperature (0 is greedy), top_k (0 is off), top_p and min_p.
Draw = tuple[int, float, int, float, float]
# A sequence to draft for: slot and committed tokens in the target's cache, the same in the adapter's, root token,
# pending states, most levels, and how to draw.
Start = tuple[int, int, int, int, int, int, int, Draw]
# A head, the address of its norm or 0, the norm's epsilon, a soft cap, and where the results go.
HeadPass = tuple[Weight, int, float, float, tuple[int, int, int]]
# Tokens, parents and confidences of the nodes of every sequence's draft, root first.
Nodes = tuple[list[list[int]], list[list[int]], list[list[float]]]


class Tables:
    """Cosine and sine of S positions, [2, S, 1, E] float32, as the native kernels take them."""

    def __init__(self, tensor: Tensor) -> None:
        num_positions, head_dim = tensor.shape[1], tensor.shape[-1]
        cosine = _address(tensor, (2, num_positions, 1, head_dim))
        self.described = cosine, cosine + 4 * num_positions * head_dim, num_positions, head_dim
        # The addresses are good for as long as it lives.
        self._tensor = tensor


# A cache, and the tables of all its positions.
Cached = tuple[Cache, Tables]


class Stack:
    """Packed decoder layers that run as one call over any span of them."""

    def __init__(self, sizes: tuple[int, int, int, int], *, norm_eps: float, attention_scale: float,
                 softcap: float | None, activation: str) -> None:  # fmt: skip
        """sizes: hidden size, heads, key-value heads, head size."""
        self.hidden_size, self.num_layers = sizes[0], 0
        self.native = _native.Stack(sizes, norm_eps, attention_scale, softcap or 0.0, activation == "gelu_tanh")

    def add_layer(self, weights: Sequence[Weight | None], norms: Mapping[str, Tensor], *, window: int | None) -> None:
        """weights: qkv, output, gate_up and down, two of them None where attention or MLP is absent.

        norms: those of NORMS that the layer has.
        """
        given = [norms[name].detach().float().contiguous() if name in norms else None for name in NORMS]
        self.native.add_layer(list(weights), given, window or 0)
        self.num_layers += 1

    def run(self, hidden: Tensor, span: tuple[int, int], *, cached: Cached, segments: Sequence[Segment],
            taps: Sequence[int] = (), skips: Sequence[int] = ()) -> tuple[Tensor, dict[int, Tensor]]:  # fmt: skip
        """Run layers [i, j) over the states [R, D] that enter layer i; returns those that leave layer j - 1.

        skips: for every layer of the stack, SKIP_ATTENTION and SKIP_MLP of what is left out. Returns also, for each tap
        in i..j, the states that enter it.
        """
        (start, stop), shape = span, (hidden.shape[0], self.hidden_size)
        out, inner = torch.empty(shape), {tap: torch.empty(shape) for tap in taps if start < tap < stop}
        addresses = _address(hidden, shape), out.data_ptr(), shape[0]
        self.native.run(cached[0], span, segments, addresses, _addresses(inner), cached[1].described, skips)
        states = {start: hidden, **inner, stop: out}
        return out, {tap: states[tap] for tap in taps if tap in states}

    def decide(
        self, entering: Tensor | list[int], span: tuple[int, int], *, cached: Cached,
        segments: Sequence[Segment], taps: Sequence[int], ends: "tuple[Weight, float, HeadPass]"
    ) -> tuple[list[int], dict[int, Tensor]]:  # fmt: skip
        """As run(), and in the same call a head's argmax [R], which is returned with the taps.

        entering: states [R, D], or R rows of the embedding, which cannot be tapped; ends: the embedding and its scale,
        and the head, without a place for results.
        """
        (start, stop), (embedding, scale, head) = span, ends
        if isinstance(entering, list):
            shape = len(entering), self.hidden_size
            states = 0, shape[0], embedding, scale, entering
        else:
            shape = entering.shape[0], self.hidden_size
            states = _address(entering, shape), shape[0], embedding, scale, []
        tapped = {tap: torch.empty(shape) for tap in taps if start < tap <= stop}
        ids = self.native.decide(cached[0], span, segments, states, _addresses(tapped), cached[1].described, head)
        if start in taps and isinstance(entering, Tensor):
            tapped[start] = entering
        return ids, tapped


class Head:
    """A packed head: norm, product, soft cap and argmax in one call."""

    def __init__(self, weight: Weight, *, norm_eps: float, softcap: float | None) -> None:
        self.weight = weight
        self._norm_eps, self._softcap = norm_eps, softcap or 0.0

    def logits(self, hidden: Tensor, norm: Tensor | None) -> Tensor:
        """Logits [R, V] of states [R, D] under a norm [D], None where they are normed already."""
        out = torch.empty(hidden.shape[0], self.weight.num_rows)
        self._run(hidden, norm, out=(out.data_ptr(), 0, 0))
        return out

    def argmax(self, hidden: Tensor, norm: Tensor | None) -> Tensor:
        """The largest logit's id [R] int64, the lowest where several are equal."""
        out = torch.empty(hidden.shape[0], dtype=torch.int64)
        self._run(hidden, norm, out=(0, out.data_ptr(), 0))
        return out

    def guess(self, hidden: Tensor, norm: Tensor | None) -> tuple[Tensor, Tensor]:
        """The largest logit's id [R] int64 and its softmax probability [R] float32."""
        num_rows = hidden.shape[0]
        ids, confidence = torch.empty(num_rows, dtype=torch.int64), torch.empty(num_rows)
        self._run(hidden, norm, out=(0, ids.data_ptr(), confidence.data_ptr()))
        return ids, confidence

    def describe(self, norm: Tensor | None, out: tuple[int, int, int]) -> HeadPass:
        """This head under a norm [D], as the native kernels take it; out: addresses of logits, argmax, confidence."""
        weights = 0 if norm is None else _address(norm, (self.weight.num_inputs,))
        return self.weight, weights, self._norm_eps, self._softcap, out

    def _run(self, hidden: Tensor, norm: Tensor | None, *, out: tuple[int, int, int]) -> None:
        num_rows = hidden.shape[0]
        states = _address(hidden, (num_rows, self.weight.num_inputs))
        _native.run_head(self.describe(norm, out), (states, num_rows))


class DraftPlan:
    """What stays the same from one draft to the next.

    Layers [0, e) of a target, an adapter's one layer and a head draft; layers [e, L) and the target's head may verify.
    """

    def __init__(
        self, target: Stack, adapter: Stack, *, bounds: tuple[int, int, int], embedding: tuple[Weight, float],
        heads: Sequence[tuple[Head, Tensor]]
    ) -> None:  # fmt: skip
        """bounds: exit layer e, siblings a node may have, most nodes of a draft; embedding: with its scale.

        heads: what guesses and the target's own, each with the norm [D] before it.
        """
        self._bounds, self._hidden_size = bounds, target.hidden_size
        self._ends = bounds[0], target.num_layers
        # Memory for states [R, D] that every draft writes anew, with views that are made once for every place.
        self._states = torch.empty(0, target.hidden_size)
        self._views: dict[tuple[int, int], Tensor] = {}
        self._num_rows = self._address = 0
        # The norms' addresses are good for as long as they live.
        self._heads = heads
        guesser, chooser = [head.describe(norm, (0, 0, 0)) for head, norm in heads]
        self._plan = _native.DraftPlan(target.native, adapter.native, bounds, embedding, guesser, chooser)

    def draft(
        self, target: Cached, adapter: Cached, *, starts: Sequence[Start], limits: tuple[float, float, float],
        pending: Tensor, taps: Sequence[int] | None
    ) -> tuple[Nodes, Tensor, tuple[list[int], float, dict[int, Tensor]] | None]:  # fmt: skip
        """Draft in one call; trees grow as drafters/tree.py says.

        limits: the confidence below which a node gets no children, and what a branch and a chain's token must promise.
        pending: the states [P, D] entering layer e that the adapter has not seen, sequence by sequence. Returns every
        sequence's nodes, and the states [R, D] of all of them that enter layer e, which the next draft writes over.
        Where taps are given, and none but e and L, the target's layers [e, L) and its head go on to say what follows
        every node: returns also that [R], the seconds it took, and the tapped states [R, D].
        """
        (exit_layer, num_layers), (_, num_siblings, max_nodes) = self._ends, self._bounds
        tapped = frozenset(taps or ())
        verifies = taps is not None and tapped.issubset(self._ends)
        num_rows = sum([max_nodes if num_siblings > 1 else min(max_nodes, start[6] + 1) for start in starts])
        num_pending = pending.shape[0]
        unseen = _address(pending, (num_pending, self._hidden_size)) if num_pending else 0
        leaving = torch.empty(num_rows, self._hidden_size) if verifies and num_layers in tapped else None
        address = 0 if leaving is None else leaving.data_ptr()
        states = unseen, num_pending, self._reserve(num_rows), address, num_rows
        at_target, at_adapter = (target[0], target[1].described), (adapter[0], adapter[1].described)
        nodes, following, time_s = self._plan.draft(at_target, at_adapter, starts, limits, states, verifies)
        entering = self.states(0, sum(map(len, nodes[0])))
        if not verifies:
            return nodes, entering, None
        states_of = {exit_layer: entering}
        if leaving is not None:
            states_of[num_layers] = leaving[: len(following)]
        return nodes, entering, (following, time_s, states_of)

    def states(self, first: int, stop: int) -> Tensor:
        """These rows of the states of the last draft's nodes."""
        view = self._views.get((first, stop))
        if view is None:
            view = self._views[first, stop] = self._states[first:stop]
        return view

    def _reserve(self, num_rows: int) -> int:
        """The address of so many rows; it is that of earlier ones until more are asked for than ever before."""
        if num_rows > self._num_rows:
            self._states, self._views = torch.empty(num_rows, self._hidden_size), {}
            self._num_rows, self._address = num_rows, self._states.data_ptr()
        return self._address


def _addresses(taps: Mapping[int, Tensor]) -> list[tuple[int, int]]:
    """Layers that are tapped, and where what enters them goes."""
    return [(tap, buffer.data_ptr()) for tap, buffer in taps.items()]


def _address(tensor: Tensor, shape: tuple[int, ...]) -> int:
    """Where a tensor's numbers lie; raises ValueError unless it is float32, contiguous, of this shape, on the CPU."""
    if tensor.dtype is not torch.float32 or tensor.shape != shape or not tensor.is_contiguous() or not tensor.is_cpu:
        raise ValueError(f"a native kernel takes contiguous float32 {list(shape)} on the CPU, got "
                         f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}")  # fmt: skip
    return tensor.data_ptr()
