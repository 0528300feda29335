"""llama.cpp as a contender."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch

from kangaroo.bench.contenders.base import MAX_CONTEXT, Run, find_dtype, import_optional

# Numbered as in ggml.h: llama_cpp has no name for the last.
_GGML_TYPES = {"float32": 0, "float16": 1, "bfloat16": 30}


class LlamaCppContender:
    """llama.cpp through llama-cpp-python, on as many threads as torch, weights and KV cache in dtype."""

    def __init__(
        self, folder: Path, *, eos_ids: frozenset[int], dtype: str = "float32", name: str = "llama.cpp"
    ) -> None:
        """Converts the checkpoint to a temporary GGUF file, which needs the package gguf as well."""
        llama_cpp = import_optional("llama_cpp", package="llama-cpp-python gguf")
        from kangaroo.bench.gguf import write_gguf
        from kangaroo.model.config import ModelConfig

        find_dtype(dtype)
        num_threads = torch.get_num_threads()
        self.name = name
        self.version: str = llama_cpp.__version__
        self._eos_ids = eos_ids
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary) / "model.gguf"
            write_gguf(folder, path, dtype=dtype)
            self._llama = llama_cpp.Llama(
                str(path),
                n_ctx=min(MAX_CONTEXT, ModelConfig.from_folder(folder).context_length),
                n_threads=num_threads,
                n_threads_batch=num_threads,
                type_k=_GGML_TYPES[dtype],
                type_v=_GGML_TYPES[dtype],
                flash_attn=dtype != "float32",  # whichever is faster: measured, and not the same for every dtype
                use_mmap=False,  # the file is gone once it is read
                verbose=False,
            )

    def generate(self, prompt_ids: tuple[int, ...], *, max_new_tokens: int) -> Run:
        """Continue the prompt greedily, its prefill done anew."""
        token_ids: list[int] = []
        started_s = time.perf_counter()
        self._llama.reset()  # else the prefix shared with the text before would be kept
        for token_id in self._llama.generate(prompt_ids, temp=0.0):
            token_ids.append(token_id)
            if len(token_ids) == max_new_tokens or token_id in self._eos_ids:
                break
        return Run(tuple(token_ids), time.perf_counter() - started_s)
