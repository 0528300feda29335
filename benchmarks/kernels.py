"""What a pass over M rows costs on the native kernels, and how near it comes to what the machine can do.

    python benchmarks/kernels.py

A random 135M model, whose weights cannot hide in the cache, and the bundled one, in every storage. Row counts are
interleaved; bandwidth and peak are measured between the passes, by the same threads.
"""

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from kangaroo.bench.limits import BYTES, num_weights
from kangaroo.bench.record import markdown_table, stamp, stamp_text, write_result
from kangaroo.drafters.plain import PlainDrafter
from kangaroo.engine.engine import Engine
from kangaroo.kernels import _native, cpu, select_backend
from kangaroo.model.cache import CachedPass, Segment
from kangaroo.model.checkpoint import load_model
from kangaroo.model.config import ModelConfig
from kangaroo.model.packed import PackedTransformer
from kangaroo.model.transformer import Layer
from kangaroo.model.weights import STORAGES
from kangaroo.types import Request, SamplingParams

NUM_CACHED, ROW_COUNTS, LARGE_ROW_COUNTS = 256, range(1, 9), (64, 256)
BANDWIDTH_BYTES = 256 << 20
PEAK_STEPS = 400_000
SHAPE_135M = {"model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
              "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
              "max_position_embeddings": 2048, "tie_word_embeddings": True}  # fmt: skip


def random_model(storage: str) -> PackedTransformer:
    """A 135M Llama with random weights."""
    config = ModelConfig.from_dict(SHAPE_135M)
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.02

    def layers() -> Iterator[Layer]:
        size, inner = config.hidden_size, config.intermediate_size
        for _ in range(config.num_layers):
            yield Layer(
                input_norm=torch.ones(size),
                qkv=noise((config.num_heads + 2 * config.num_kv_heads) * config.head_dim, size),
                output=noise(size, config.num_heads * config.head_dim),
                mlp_norm=torch.ones(size),
                gate_up=noise(2 * inner, size),
                down=noise(size, inner),
            )

    embedding = noise(config.vocab_size, config.hidden_size)
    norm = torch.ones(config.hidden_size)
    return PackedTransformer(config, layers(), embedding=embedding, final_norm=norm, head=embedding, storage=storage)


def time_pass(target: PackedTransformer, cache: object, tokens: torch.Tensor, *, num_cached: int) -> float:
    """Seconds of one pass over tokens [M] behind num_cached slots, embedding to argmax."""
    started_s = time.perf_counter()
    attention = CachedPass(cache, [Segment(0, num_cached, len(tokens))])  # type: ignore[arg-type]
    target.decide(tokens.tolist(), (0, target.num_layers), attention=attention)
    return time.perf_counter() - started_s


@torch.inference_mode()
def measure_passes(target: PackedTransformer, storage: str, *, num_repeats: int) -> dict[str, object]:
    """Median times of passes over few rows and many, with bandwidth and peak measured in between."""
    most = max(*ROW_COUNTS, *LARGE_ROW_COUNTS)
    cache = target.new_cache(1, NUM_CACHED + most)
    tokens = torch.randint(3, target.config.vocab_size, (NUM_CACHED + most,))
    time_pass(target, cache, tokens[:NUM_CACHED], num_cached=0)
    times: dict[int, list[float]] = {count: [] for count in (*ROW_COUNTS, *LARGE_ROW_COUNTS)}
    bandwidths, peaks = [], []
    for repeat in range(num_repeats + 2):
        shift = repeat % len(ROW_COUNTS)
        counts = [*ROW_COUNTS[shift:], *ROW_COUNTS[:shift], *(LARGE_ROW_COUNTS if repeat % 5 == 0 else ())]
        # The probes and the large passes leave other data in the caches than a decoding step does.
        time_pass(target, cache, tokens[-1:], num_cached=NUM_CACHED)
        for count in counts:
            elapsed_s = time_pass(target, cache, tokens[-count:], num_cached=NUM_CACHED)
            if repeat >= 2 or count > max(ROW_COUNTS):
                times[count].append(elapsed_s)
        bandwidths.append(cpu.measure_bandwidth(BANDWIDTH_BYTES))
        peaks.append(cpu.measure_peak(PEAK_STEPS))
    medians = {count: statistics.median(all_s) for count, all_s in times.items()}
    bandwidth, peak = statistics.median(bandwidths), statistics.median(peaks)
    num_bytes = num_weights(target) * BYTES[storage]
    return {
        "times_s": medians,
        "ratios": {count: medians[count] / medians[1] for count in ROW_COUNTS},
        "num_bytes": num_bytes,
        "stream_bytes_per_s": bandwidth,
        "bandwidth_share": num_bytes / medians[1] / bandwidth,
        "peak_flops_per_s": peak,
        "peak_share": {count: 2 * num_weights(target) * count / medians[count] / peak for count in LARGE_ROW_COUNTS},
    }


def measure_outside(target: PackedTransformer, *, num_tokens: int) -> dict[str, float]:
    """A plain decoding step in the engine, and how much of it is spent outside the native kernels."""
    inside = [0.0]
    run, decide = _native.Stack.run, _native.Stack.decide

    def timed(function: object) -> object:
        def wrapper(*args: object, **others: object) -> object:
            started_s = time.perf_counter()
            result = function(*args, **others)  # type: ignore[operator]
            inside[0] += time.perf_counter() - started_s
            return result

        return wrapper

    _native.Stack.run, _native.Stack.decide = timed(run), timed(decide)  # type: ignore[method-assign,assignment]
    try:
        engine = Engine(target, PlainDrafter())
        decoding = engine.submit(Request(tuple(range(3, 131)), SamplingParams(num_tokens)))
        engine.step()
        shares, steps = [], []
        while decoding.finish_reason is None:
            inside[0], started_s = 0.0, time.perf_counter()
            engine.step()
            steps.append(time.perf_counter() - started_s)
            shares.append(1 - inside[0] / steps[-1])
    finally:
        _native.Stack.run, _native.Stack.decide = run, decide  # type: ignore[method-assign]
    return {"step_time_s": statistics.median(steps), "outside_share": statistics.median(shares)}


def report(results: dict[str, dict[str, dict[str, object]]], facts: dict[str, object]) -> str:
    """The Markdown page of the results."""
    sections = ["# Kernels", stamp_text(facts),
                f"Medians; M rows behind {NUM_CACHED} cached tokens, embedding to argmax. `bandwidth`: bytes of the "
                "weights over the time of one row, against the stream bandwidth of the same threads, measured in "
                "between. `peak`: multiply-adds of the weights against the measured float32 peak. `outside`: share of "
                "a plain step of the engine outside the native calls."]  # fmt: skip
    for name, by_storage in results.items():
        header = ["weights", "M = 1", *(f"M = {count}" for count in ROW_COUNTS if count > 1), "bandwidth",
                  *(f"peak, M = {count}" for count in LARGE_ROW_COUNTS), "outside"]  # fmt: skip
        rows = []
        for storage, one in by_storage.items():
            times, ratios, peaks = one["times_s"], one["ratios"], one["peak_share"]
            assert isinstance(times, dict)
            assert isinstance(ratios, dict)
            assert isinstance(peaks, dict)
            rows.append([
                storage, f"{1e3 * times[1]:.2f} ms", *(f"{ratios[count]:.2f}" for count in ROW_COUNTS if count > 1),
                f"{one['bandwidth_share']:.0%} of {float(str(one['stream_bytes_per_s'])) / 1e9:.0f} GB/s",
                *(f"{peaks[count]:.0%}" for count in LARGE_ROW_COUNTS), f"{one['outside_share']:.1%}",
            ])  # fmt: skip
        sections += [f"## {name}", markdown_table(header, rows)]
    return "\n\n".join(sections)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--num-repeats", type=int, default=40)
    parser.add_argument("--settle-s", type=float, default=60, help="how long to load the memory before measuring")
    parser.add_argument("--storage", action="append", choices=STORAGES, help="only these; repeatable")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/kernels"))
    args = parser.parse_args()
    select_backend("cpu")
    facts = stamp()
    storages: Sequence[str] = args.storage or STORAGES
    settled_at_s = time.monotonic() + args.settle_s
    # A shared host may grant more bandwidth for the first half minute of load than it sustains.
    while time.monotonic() < settled_at_s:
        cpu.measure_bandwidth(BANDWIDTH_BYTES)
    results: dict[str, dict[str, dict[str, object]]] = {"Random 135M model": {}, "Bundled model": {}}
    for storage in storages:
        kept_in = {"weights": storage} if storage == "int8" else {"dtype": storage}
        for name, repeats in (("Random 135M model", args.num_repeats), ("Bundled model", 4 * args.num_repeats)):
            target = load_model("demo", **kept_in).target if name == "Bundled model" else random_model(storage)
            assert isinstance(target, PackedTransformer), "this benchmark is of the native kernels"
            measured = measure_passes(target, storage, num_repeats=repeats)
            results[name][storage] = measured | measure_outside(target, num_tokens=40)
    write_result(args.output, {"stamp": facts, **results}, text=report(results, facts))
    print(report(results, facts))


if __name__ == "__main__":
    main()
