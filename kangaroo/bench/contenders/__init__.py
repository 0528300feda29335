"""The systems a benchmark compares, behind one call each: continue these tokens, say how long it took.

Those that are not this package are optional: building one raises KangarooError where its package is missing.
"""

from kangaroo.bench.contenders.base import DTYPES, MAX_CONTEXT, Contender, KangarooContender, Run
from kangaroo.bench.contenders.llama_cpp import LlamaCppContender
from kangaroo.bench.contenders.transformers import GenerationSettings, TokenClock, TransformersContender
from kangaroo.bench.contenders.vllm import VllmContender

__all__ = [
    "DTYPES",
    "MAX_CONTEXT",
    "Contender",
    "GenerationSettings",
    "KangarooContender",
    "LlamaCppContender",
    "Run",
    "TokenClock",
    "TransformersContender",
    "VllmContender",
]
