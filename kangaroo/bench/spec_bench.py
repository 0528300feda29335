"""Spec-Bench's protocol: every question to every drafter, one at a time, and each answer kept with its time.

Xia et al. 2024 (arXiv 2401.07851), evaluation/eval.py of github.com/hemingkx/Spec-Bench. Unlike there, the drafters
take turns question by question, so that what else the machine does hits them all alike.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

import torch

from kangaroo.bench.answers import Answer, Choice
from kangaroo.bench.comparison import take_turns
from kangaroo.bench.drafting import describe_drafter
from kangaroo.bench.prompts import BUILT_IN, read_prompts
from kangaroo.bench.questions import Question, digest
from kangaroo.bench.record import shorten_path, stamp
from kangaroo.bench.run_folder import RunFolder
from kangaroo.bench.templates import choose_template, encode_prompt, stop_ids
from kangaroo.drafters.companion import fingerprint
from kangaroo.drafters.settings import Settings
from kangaroo.engine.pace import Pace
from kangaroo.errors import KangarooError
from kangaroo.llm import LLM, build_drafter
from kangaroo.model.checkpoint import LoadedModel
from kangaroo.sampling import derive_seed
from kangaroo.types import Completion, SamplingParams

WARM_UP_TOKENS = 64


@dataclass(frozen=True)
class Plan:
    """What is asked of whom, and how.

    bench: the benchmark's name. template: a conversation template's name, None for what the checkpoint has. params:
    their seed is given. storage: what the weights are kept in, by name.
    """

    bench: str
    questions: tuple[Question, ...]
    drafters: Mapping[str, Settings]
    params: SamplingParams
    num_runs: int
    storage: str
    template: str | None = None


@dataclass(frozen=True)
class Asked:
    """A question that a drafter was just asked; reason is why there is no answer, where there is none."""

    question: Question
    drafter: str
    run: int
    reason: str | None = None


class SpecBench:
    """One model with several drafters, which it loads once, and the questions for them."""

    def __init__(self, model: LoadedModel, plan: Plan, *, output: Path) -> None:
        """Build the drafters and open the output folder, where an earlier session may have left answers.

        Raises a KangarooError where a drafter cannot be built or the folder not be continued.
        """
        self.plan = plan
        self._model = model
        self._template = choose_template(model.tokenizer, plan.template)
        self._params = replace(plan.params, stop_token_ids=stop_ids(model.tokenizer, self._template))
        self._llms = {
            name: LLM(model, build_drafter(model, settings), pace=Pace()) for name, settings in plan.drafters.items()
        }
        self._folder = RunFolder(output, self._describe())
        self._done = {
            (name, run): self._folder.read_done(name, run=run)
            for name in plan.drafters
            for run in range(1, plan.num_runs + 1)
        }

    @property
    def num_wanted(self) -> int:
        """How many answers there are when all is done."""
        return len(self.plan.questions) * len(self._done)

    @property
    def num_done(self) -> int:
        """How many of them earlier sessions have left."""
        return sum(map(len, self._done.values()))

    def ask_all(self) -> Iterator[Asked]:
        """Ask what has no answer yet, after a warm-up; every drafter's answers end up in the order of the questions."""
        if self.num_done < self.num_wanted:
            self._warm_up()
        names, seed = list(self.plan.drafters), self.plan.params.seed
        assert seed is not None, "a plan's seed is given"
        for run in range(1, self.plan.num_runs + 1):
            for index, question in enumerate(self.plan.questions):
                for name in take_turns(names, run + index):
                    if question.id not in self._done[name, run]:
                        yield self._ask(Asked(question, name, run), seed=derive_seed(seed, index))
        self._folder.sort_answers([one.id for one in self.plan.questions])

    def _warm_up(self) -> None:
        """Have every drafter decode a text that is none of the questions."""
        prompt = self._model.tokenizer.encode(read_prompts(BUILT_IN, limit=1)[0].text)
        params = replace(self._params, max_new_tokens=min(WARM_UP_TOKENS, self._params.max_new_tokens))
        for llm in self._llms.values():
            llm.generate(prompt[: self._model.target.config.context_length // 2], params)

    def _ask(self, asked: Asked, *, seed: int) -> Asked:
        """Keep the answer of a drafter, or why there is none."""
        question, name = asked.question, asked.drafter
        try:
            choice = self._answer(self._llms[name], question, seed=seed)
        except Exception as error:  # whatever one question meets, the others are asked all the same
            kind = "" if isinstance(error, KangarooError) else f"{type(error).__name__}: "
            failed = replace(asked, reason=" ".join(f"{kind}{error}".split()))
            self._folder.add_failure({"question_id": question.id, "category": question.category, "drafter": name,
                                      "run": asked.run, "reason": failed.reason})  # fmt: skip
            return failed
        model_id = f"{shorten_path(self._model.name)}/{name}"
        answer = Answer(question_id=question.id, category=question.category, answer_id=uuid4().hex, model_id=model_id,
                        choices=[choice], tstamp=time.time())  # fmt: skip
        self._folder.add_answer(answer, drafter=name, run=asked.run)
        return asked

    def _answer(self, llm: LLM, question: Question, *, seed: int) -> Choice:
        """Answer the turns of a question, the later ones behind the answers to the former."""
        answers: list[str] = []
        completions: list[Completion] = []
        wall_times_s = []
        for turn in range(len(question.turns)):
            prompt_ids = encode_prompt(
                self._model.tokenizer, self._template, turns=question.turns[: turn + 1], answers=answers
            )
            params = replace(self._params, seed=derive_seed(seed, turn))
            started_s = self._now_s()
            completion = llm.generate(prompt_ids, params)
            wall_times_s.append(self._now_s() - started_s)
            completions.append(completion)
            answers.append(completion.text.strip())
        return _choice(completions, answers=answers, wall_times_s=wall_times_s)

    def _now_s(self) -> float:
        """The clock, once the device has caught up."""
        if self._model.target.device.type == "cuda":
            torch.cuda.synchronize(self._model.target.device)
        return time.perf_counter()

    def _describe(self) -> dict[str, object]:
        """The content of run.json."""
        plan = self.plan
        return {
            "bench": plan.bench,
            "model": shorten_path(self._model.name),
            "fingerprint": fingerprint(self._model.target),
            "tokenizer": self._model.tokenizer.fingerprint(),
            "dtype": plan.storage,
            "device": str(self._model.target.device),
            "drafters": {name: describe_drafter(self._model, settings) for name, settings in plan.drafters.items()},
            "template": self._template,
            "max_new_tokens": plan.params.max_new_tokens,
            "temperature": plan.params.temperature,
            "seed": plan.params.seed,
            "num_runs": plan.num_runs,
            "num_questions": len(plan.questions),
            "questions_digest": digest(plan.questions),
            "stamp": stamp(self._model.target.device.type),
        }


def _choice(completions: Sequence[Completion], *, answers: list[str], wall_times_s: list[float]) -> Choice:
    num_steps = [one.num_steps for one in completions]
    return Choice(
        turns=answers,
        idxs=num_steps,
        decoding_steps=num_steps,
        new_tokens=[one.num_new_tokens for one in completions],
        wall_time=wall_times_s,
        accept_lengths=[length for one in completions for length in one.accepted_lengths],
        token_ids=[list(one.token_ids) for one in completions],
        num_prompt_tokens=[one.num_prompt_tokens for one in completions],
        num_drafted=[one.num_drafted for one in completions],
        num_accepted=[one.num_accepted for one in completions],
        prefill_time_s=[one.prefill_time_s for one in completions],
        decode_time_s=[one.decode_time_s for one in completions],
        draft_time_s=[one.draft_time_s for one in completions],
        verify_time_s=[one.verify_time_s for one in completions],
        finish_reasons=[one.finish_reason for one in completions],
    )
