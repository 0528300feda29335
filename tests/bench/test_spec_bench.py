"""The runner: what is asked in which order, what is kept of the answers, and how a run goes on."""

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest

from kangaroo.bench import spec_bench
from kangaroo.bench.answers import Answer, answer_file, read_answers
from kangaroo.bench.questions import Question
from kangaroo.bench.spec_bench import Asked, Plan, SpecBench
from kangaroo.drafters.adapter import Adapter
from kangaroo.drafters.settings import AutoSettings, KangarooSettings, PlainSettings, PromptLookupSettings
from kangaroo.engine.pace import Pace
from kangaroo.errors import OutputError
from kangaroo.llm import LLM
from kangaroo.model.checkpoint import LoadedModel, load_model
from kangaroo.tuning import Tuned, tuning_key, write_tuned
from kangaroo.types import Completion, SamplingParams
from tests.cli.conftest import build_model
from tests.runs import read_runs
from tests.tiny import tiny_config, tiny_transformer

DRAFTERS = {"plain": PlainSettings(), "kangaroo": KangarooSettings(), "prompt_lookup": PromptLookupSettings()}
QUESTIONS = (
    Question(81, "writing", ("Tell me a tale. Tell me a tale.", "Tell it again.")),
    Question("b", "qa", ("Who?",)),
    Question(90, "qa", ("def f(x):\n    return x",)),
)
PLAN = Plan("spec-bench", QUESTIONS, DRAFTERS, SamplingParams(12, seed=0, ignore_eos=True), 2, "float32")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(str(build_model(tmp_path_factory.mktemp("model"), adapter_seed=0)))


def ask(model: LoadedModel, output: Path, plan: Plan = PLAN, *, limit: int | None = None) -> list[Asked]:
    """A session that ends after so many answers."""
    return list(islice(SpecBench(model, plan, output=output).ask_all(), limit))


def texts_of(answers: list[Answer]) -> list[tuple[object, list[list[int]]]]:
    return [(one.question_id, one.choices[0].token_ids) for one in answers]


def test_every_drafter_answers_every_question_in_every_run_as_plain_decoding_does(
    model: LoadedModel, tmp_path: Path
) -> None:
    asked = ask(model, tmp_path)
    runs = read_runs(tmp_path)
    assert {name: len(mine) for name, mine in runs.items()} == dict.fromkeys(DRAFTERS, 2)
    assert len(asked) == SpecBench(model, PLAN, output=tmp_path).num_done == 3 * 3 * 2
    assert {one.reason for one in asked} == {None}
    first = texts_of(runs["plain"][0])
    assert [question_id for question_id, _ in first] == [81, "b", 90]
    assert all(texts_of(run) == first for mine in runs.values() for run in mine)
    assert (tmp_path / "failures.jsonl").read_text() == ""


def test_an_answer_holds_what_decoding_turn_by_turn_gives(model: LoadedModel, tmp_path: Path) -> None:
    ask(model, tmp_path)
    answer = read_answers(answer_file(tmp_path, "kangaroo", run=1))[0]
    llm = LLM(model, SpecBench(model, PLAN, output=tmp_path)._llms["kangaroo"].drafter)
    one = llm.generate(QUESTIONS[0].turns[0], PLAN.params)
    two = llm.generate("\n\n".join([QUESTIONS[0].turns[0], one.text.strip(), QUESTIONS[0].turns[1]]), PLAN.params)
    choice = answer.choices[0]
    assert (answer.category, answer.model_id) == ("writing", f"{model.folder.name}/kangaroo")
    assert choice.token_ids == [list(one.token_ids), list(two.token_ids)]
    assert choice.turns == [one.text.strip(), two.text.strip()]
    assert choice.num_prompt_tokens == [one.num_prompt_tokens, two.num_prompt_tokens]
    assert choice.new_tokens == [12, 12]
    assert choice.idxs == choice.decoding_steps
    # The first token of a turn is the prefill's, all others are some step's.
    assert sum(choice.accept_lengths) == 22
    assert len(choice.accept_lengths) == sum(choice.decoding_steps)
    assert choice.finish_reasons == ["length", "length"]
    spans = zip(choice.wall_time, choice.prefill_time_s, choice.decode_time_s, strict=True)
    assert all(wall >= prefill + decode > 0 for wall, prefill, decode in spans)
    assert all(a + b <= c for a, b, c in
               zip(choice.draft_time_s, choice.verify_time_s, choice.decode_time_s, strict=True))  # fmt: skip


def test_drafters_take_turns_at_going_first(model: LoadedModel, tmp_path: Path) -> None:
    order = [(one.run, one.question.id, one.drafter) for one in ask(model, tmp_path)]
    assert [one[:2] for one in order[::3]] == [(run, question.id) for run in (1, 2) for question in QUESTIONS]
    assert [name for *_, name in order[::3]] == [
        "kangaroo",
        "prompt_lookup",
        "plain",
        "prompt_lookup",
        "plain",
        "kangaroo",
    ]
    assert all({name for *_, name in order[start : start + 3]} == set(DRAFTERS) for start in range(0, 18, 3))


def test_only_generation_is_timed_with_one_model_for_all(
    model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[object] = []

    def note(name: str, called: Any) -> Any:
        return lambda *args, **settings: (events.append(name), called(*args, **settings))[1]

    session = SpecBench(model, replace(PLAN, questions=QUESTIONS[1:2], num_runs=1), output=tmp_path)
    assert {id(llm.model.target) for llm in session._llms.values()} == {id(model.target)}
    assert all(isinstance(llm.engine.pace, Pace) == (name != "plain") for name, llm in session._llms.items())
    monkeypatch.setattr(spec_bench, "encode_prompt", note("encode", spec_bench.encode_prompt))
    monkeypatch.setattr(LLM, "generate", note("generate", LLM.generate))
    monkeypatch.setattr(session._folder, "add_answer", note("keep", session._folder.add_answer))
    monkeypatch.setattr(SpecBench, "_now_s", note("clock", SpecBench._now_s))
    list(session.ask_all())
    # A warm-up of each drafter, then the answers.
    assert events == ["generate"] * 3 + ["encode", "clock", "generate", "clock", "keep"] * 3


@pytest.mark.parametrize("num_first", [1, 4, 10, 17])
def test_a_run_goes_on_where_it_ended(model: LoadedModel, tmp_path: Path, num_first: int) -> None:
    first = ask(model, tmp_path, limit=num_first)
    session = SpecBench(model, PLAN, output=tmp_path)
    assert (session.num_done, session.num_wanted) == (num_first, 18)
    rest = list(session.ask_all())
    asked = [(one.run, one.question.id, one.drafter) for one in (*first, *rest)]
    assert len(asked) == len(set(asked)) == 18
    assert {tuple(one.question_id for one in run) for mine in read_runs(tmp_path).values() for run in mine} == {
        (81, "b", 90)
    }
    assert ask(model, tmp_path) == []


def test_an_answer_cut_short_is_asked_again(model: LoadedModel, tmp_path: Path) -> None:
    ask(model, tmp_path)
    path = answer_file(tmp_path, "kangaroo", run=2)
    before = texts_of(read_answers(path))
    path.write_bytes(path.read_bytes()[:-30])
    again = ask(model, tmp_path)
    assert [(one.run, one.question.id, one.drafter) for one in again] == [(2, 90, "kangaroo")]
    assert texts_of(read_answers(path)) == before


def test_other_settings_are_refused_before_anything_is_asked(model: LoadedModel, tmp_path: Path) -> None:
    ask(model, tmp_path, limit=1)
    changes: list[tuple[dict[str, Any], str]] = [
        ({"params": replace(PLAN.params, max_new_tokens=13)}, "max_new_tokens"),
        ({"params": replace(PLAN.params, temperature=0.5)}, "temperature"),
        ({"template": "vicuna"}, "template"),
        ({"num_runs": 3}, "num_runs"),
        ({"questions": (QUESTIONS[1], QUESTIONS[0], QUESTIONS[2])}, "questions_digest"),
        ({"drafters": DRAFTERS | {"kangaroo": KangarooSettings(gamma=2)}}, "drafters"),
    ]
    for change, name in changes:
        with pytest.raises(OutputError, match=f"another {name}: "):
            SpecBench(model, replace(PLAN, **change), output=tmp_path)


def test_a_companion_is_told_by_its_name_and_what_it_holds(model: LoadedModel, tmp_path: Path) -> None:
    copy = tmp_path / "copy" / "adapter"
    copytree(model.folder / "adapter", copy)
    session = replace(PLAN, drafters=DRAFTERS | {"kangaroo": KangarooSettings(adapter=str(copy))})
    SpecBench(model, PLAN, output=tmp_path / "out")
    SpecBench(model, session, output=tmp_path / "out")
    written = (tmp_path / "out" / "run.json").read_text()
    assert str(tmp_path) not in written
    assert str(model.folder) not in written
    assert json.loads(written)["drafters"]["kangaroo"]["adapter"].startswith("adapter (")
    Adapter.initialize(tiny_transformer(tiny_config()), 1, seed=5).save(copy)
    with pytest.raises(OutputError, match="another drafters"):
        SpecBench(model, session, output=tmp_path / "out")


def test_the_run_file_says_how_all_drafted_and_another_tuning_is_refused(model: LoadedModel, tmp_path: Path) -> None:
    plan = replace(PLAN, drafters=DRAFTERS | {"auto": AutoSettings()})
    names = ("gamma", "eta", "num_siblings", "max_nodes")
    for output, values in ((tmp_path / "untuned", (6, 0.6, 1, 64)), (tmp_path / "tuned", (3, 0.25, 2, 9))):
        if output.name == "tuned":
            tuned = Tuned(batch_size=1, **dict(zip(names, values, strict=True)), predicted=1.0, measured=1.0)
            write_tuned(tuning_key(model.target, model.adapter_folder), [tuned], stamp={})
        SpecBench(model, plan, output=output)
        drafters = json.loads((output / "run.json").read_text())["drafters"]
        assert tuple(drafters["kangaroo"][name] for name in names) == values
        sources = drafters["auto"]["sources"]
        assert list(sources) == ["prompt_lookup", "kangaroo"]
        assert sources["kangaroo"] == drafters["kangaroo"]
    SpecBench(model, plan, output=tmp_path / "tuned")
    with pytest.raises(OutputError, match="another drafters"):
        SpecBench(model, plan, output=tmp_path / "untuned")


def test_a_question_that_fails_is_told_and_asked_again_by_the_next_session(
    model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = LLM.generate

    def fail(self: LLM, prompts: Any, params: SamplingParams | None = None) -> Completion | list[Completion]:
        if self.drafter.name == "kangaroo" and self.model.tokenizer.decode(prompts) == "Who?":
            raise RuntimeError("no\nmemory")
        return generate(self, prompts, params)

    with monkeypatch.context() as patch:
        patch.setattr(LLM, "generate", fail)
        asked = ask(model, tmp_path)
    reason = "RuntimeError: no memory"
    assert [(one.run, one.drafter) for one in asked if one.reason == reason] == [(1, "kangaroo"), (2, "kangaroo")]
    failures = [json.loads(line) for line in (tmp_path / "failures.jsonl").read_text().splitlines()]
    assert failures == [
        {"question_id": "b", "category": "qa", "drafter": "kangaroo", "run": run, "reason": reason} for run in (1, 2)
    ]
    assert [len(run) for run in read_runs(tmp_path)["kangaroo"]] == [2, 2]
    assert len(ask(model, tmp_path)) == 2
    assert (tmp_path / "failures.jsonl").read_text() == ""
    runs = read_runs(tmp_path)
    assert texts_of(runs["kangaroo"][0]) == texts_of(runs["plain"][0])


def test_a_prompt_beyond_the_context_fails_alone(model: LoadedModel, tmp_path: Path) -> None:
    plan = replace(PLAN, questions=(QUESTIONS[1], Question(7, "qa", ("x" * 300,)), QUESTIONS[2]), num_runs=1)
    failed = [one for one in ask(model, tmp_path, plan) if one.reason is not None]
    assert [one.question.id for one in failed] == [7, 7, 7]
    assert all((one.reason or "").startswith("the prompt must be under 256 tokens") for one in failed)
    assert {tuple(one.question_id for one in run) for mine in read_runs(tmp_path).values() for run in mine} == {
        ("b", 90)
    }


def test_sampling_draws_the_same_texts_for_all_drafters_and_others_by_another_seed(
    model: LoadedModel, tmp_path: Path
) -> None:
    questions = (QUESTIONS[0], replace(QUESTIONS[0], id=82))
    drawn = []
    for seed in (1, 2):
        params = replace(PLAN.params, temperature=1.0, seed=seed)
        ask(model, tmp_path / str(seed), replace(PLAN, questions=questions, params=params))
        runs = read_runs(tmp_path / str(seed))
        first = texts_of(runs["plain"][0])
        assert all(texts_of(run) == first for mine in runs.values() for run in mine)
        drawn += [str(token_ids) for _, token_ids in first]
    # Two questions of one text are not answered alike.
    assert len(set(drawn)) == 4


def test_the_run_file_says_what_was_asked(model: LoadedModel, tmp_path: Path) -> None:
    SpecBench(model, PLAN, output=tmp_path)
    written = json.loads((tmp_path / "run.json").read_text())
    names = ("bench", "model", "fingerprint", "tokenizer", "dtype", "device", "drafters", "template", "max_new_tokens",
             "temperature", "seed", "num_runs", "num_questions", "questions_digest", "stamp")  # fmt: skip
    assert tuple(written) == names
    assert written["model"] == model.folder.name
    assert (written["dtype"], written["template"], written["num_questions"]) == ("float32", "none", 3)
    assert written["drafters"]["prompt_lookup"]["num_tokens"] == 10
    assert "Tell me" not in json.dumps(written)
