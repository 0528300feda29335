"""The same promises on a CUDA device; skipped where there is none."""

from collections.abc import Iterator

import pytest
import torch

from kangaroo.bench.divergence import find_divergence
from kangaroo.drafters.adapter import Adapter
from kangaroo.drafters.base import Batch, Drafter
from kangaroo.drafters.kangaroo import KangarooDrafter
from kangaroo.drafters.plain import PlainDrafter
from kangaroo.drafters.stopping import FixedLength
from kangaroo.engine.engine import Engine
from kangaroo.model.transformer import FullSequencePass, Transformer
from kangaroo.model.weights import assemble, disassemble
from kangaroo.types import Draft, Request, SamplingParams
from tests.tiny import tiny_config, tiny_transformer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2"]
PROMPT = (4, 99, 3, 17, 200)


def on_cuda(model: Transformer, dtype: torch.dtype) -> Transformer:
    storage = str(dtype).removeprefix("torch.")
    return assemble(disassemble(model), model.config, storage=storage, device=torch.device("cuda"))


def decode(target: Transformer, drafter: Drafter, *, params: SamplingParams) -> tuple[int, ...]:
    engine = Engine(target, drafter)
    decoding = engine.submit(Request(PROMPT, params))
    engine.run(decoding)
    return tuple(decoding.new_tokens)


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_agree_with_the_cpu(family: str) -> None:
    model = tiny_transformer(tiny_config(family))
    tokens = torch.randint(0, 256, (1, 40), generator=torch.Generator().manual_seed(0))
    logits = []
    for copy in (model, on_cuda(model, torch.float32)):
        attention = FullSequencePass(copy.config, 40, device=copy.device)
        hidden, _ = copy.forward(copy.embed(tokens.to(copy.device)), (0, copy.num_layers), attention=attention)
        logits.append(copy.logits(hidden).cpu())
    assert torch.allclose(*logits, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("family", FAMILIES)
def test_kangaroo_decodes_as_plain_decoding_up_to_near_ties(
    family: str, temperature: float, dtype: torch.dtype
) -> None:
    target = on_cuda(tiny_transformer(tiny_config(family)), dtype)
    params = SamplingParams(max_new_tokens=32, temperature=temperature, seed=7)
    drafter = KangarooDrafter(target, Adapter.initialize(target, 1), stopping=FixedLength(4))
    texts = decode(target, PlainDrafter(), params=params), decode(target, drafter, params=params)
    if dtype == torch.float32 and temperature == 0 and texts[0] != texts[1]:
        found = find_divergence(target, PROMPT, first=texts[0], second=texts[1])
        assert found is not None
        assert found.near_tie
    assert len(texts[0]) == len(texts[1]) == 32


def test_drafting_does_not_wait_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    target = on_cuda(tiny_transformer(tiny_config()), torch.float32)
    drafter = KangarooDrafter(target, Adapter.initialize(target, 1), stopping=FixedLength(4))
    draft = drafter.draft

    def draft_without_waiting(batch: Batch) -> Draft:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return draft(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(drafter, "draft", draft_without_waiting)
    decode(target, drafter, params=SamplingParams(max_new_tokens=16))
