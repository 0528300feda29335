"""Which sampler finds the best sublayers to skip, and does skipping them pay?

    python benchmarks/layer_search.py --prompts HumanEval.jsonl.gz --studies DIR

All samplers are judged by expected speedup on the same texts and costs, measured once. The best of each are then run on
prompts the search has not seen, interleaved with plain decoding, with Kangaroo beside them.
"""

import argparse
import sys
from itertools import accumulate
from pathlib import Path

from kangaroo.bench.prompts import read_prompts
from kangaroo.bench.record import markdown_table, stamp, stamp_text, write_result
from kangaroo.bench.texts import Text, decode_texts, race
from kangaroo.drafters.adapter import fingerprint
from kangaroo.llm import build_drafter
from kangaroo.model.checkpoint import LoadedModel, load_model
from kangaroo.model.skips import write_skip_layers
from kangaroo.search.layers import Trial, digest, find_pareto_front, finished_trials, pick_best, run_search
from kangaroo.search.objectives import validate
from kangaroo.search.plan import SearchPlan
from kangaroo.search.report import make_report, plot
from kangaroo.search.study import STUDY_FILE, open_study, prepare_objective, prepare_texts

SAMPLERS = ("tpe", "random", "greedy", "gp")
MILESTONES = (10, 25, 50, 100, 200)
KEPT = ("texts", "costs")


def search(model: LoadedModel, sampler: str, *, args: argparse.Namespace, shared: dict[str, object]) -> list[Trial]:
    """A sampler's trials; shared: texts and costs, filled by the first search."""
    prompts = [model.tokenizer.encode(one.text) for one in read_prompts(args.prompts, limit=args.num_prompts)]
    plan = SearchPlan(
        model=args.model,
        fingerprint=fingerprint(model.target),
        num_layers=model.target.num_layers,
        storage="float32",
        prompts=digest(prompts),
        max_new_tokens=args.max_new_tokens,
        objective="expected_speedup",
        sampler=sampler,
        gamma=args.gamma,
        seed=0,
    )
    folder = args.studies / sampler
    study = open_study(folder, plan, resume=(folder / STUDY_FILE).exists())
    for name, value in shared.items():
        study.set_user_attr(name, value)
    texts = prepare_texts(study, model, prompts=prompts, max_new_tokens=args.max_new_tokens)
    objective = prepare_objective(study, model, texts=texts, plan=plan)
    shared |= {name: study.user_attrs[name] for name in KEPT}
    num_trials = args.num_gp_trials or args.num_trials if sampler == "gp" else args.num_trials
    for trial in run_search(study, objective, plan=plan, num_trials=num_trials):
        print(sampler, trial.number, f"{trial.score.value:.3f}", file=sys.stderr, flush=True)
    trials = finished_trials(study)
    report = make_report(plan, trials, validated=[], costs=study.user_attrs["costs"])
    plot(folder / "search.png", trials, plan=report["plan"])
    return trials


def describe(trial: Trial) -> list[object]:
    """A candidate as the cells of a table."""
    score, skips = trial.score, trial.skips.to_dict()
    return [trial.skips.num_skipped, f"{score.acceptance:.1%}", f"{score.value:.3f}", f"{score.tokens_per_step:.2f}",
            score.gamma, score.eta, skips["attention"], skips["mlp"]]  # fmt: skip


def run_kangaroo(model: LoadedModel, texts: list[Text], *, num_rounds: int) -> dict[str, float]:
    """The bundled adapter on the same texts, in turn with plain decoding."""
    drafters = [build_drafter(model, "kangaroo")]
    _, (run, speedup) = race(model.target, drafters, texts=texts, num_rounds=num_rounds)
    return {"speedup": speedup, "tokens_per_step": run.tokens_per_step, "acceptance_rate": run.acceptance_rate}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--prompts", type=Path, required=True, help="HumanEval.jsonl.gz")
    parser.add_argument("--studies", type=Path, required=True, help="folder of the studies, resumed where they stand")
    parser.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=SAMPLERS)
    parser.add_argument("--num-trials", type=int, default=200)
    parser.add_argument("--num-gp-trials", type=int, help="fewer for gp, whose own work grows with their cube")
    parser.add_argument("--num-prompts", type=int, default=8, help="prompts of the search")
    parser.add_argument("--num-held-out", type=int, default=16, help="prompts behind those to run the best on")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--gamma", type=int, default=8)
    parser.add_argument("--num-rounds", type=int, default=3)
    parser.add_argument("--skip-layers", type=Path, help="write the winner here")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/layer_search"))
    args = parser.parse_args()
    model, shared = load_model(args.model), dict[str, object]()
    found = {sampler: search(model, sampler, args=args, shared=shared) for sampler in args.samplers}
    unseen = read_prompts(args.prompts, limit=args.num_prompts + args.num_held_out)[args.num_prompts :]
    texts = decode_texts(model.target, [model.tokenizer.encode(one.text) for one in unseen], eos_ids=model.eos_ids,
                         max_new_tokens=args.max_new_tokens)  # fmt: skip
    best = {one.skips: (one.skips, one.score) for trials in found.values() for one in pick_best(trials, 2)}
    origin = {one.skips: name for name, trials in found.items() for one in pick_best(trials, 2)}
    ran = validate(model.target, list(best.values()), texts=texts, num_rounds=args.num_rounds)
    kangaroo = run_kangaroo(model, texts, num_rounds=args.num_rounds)
    front = find_pareto_front([one for trials in found.values() for one in trials])
    if args.skip_layers:
        write_skip_layers(args.skip_layers, {Path(args.model).name: ran[0].skips})
    values = {name: list(accumulate((one.score.value for one in trials), max)) for name, trials in found.items()}
    shown = [count for count in MILESTONES if count <= args.num_trials]
    rows = [[name, len(found[name]), *(f"{best[count - 1]:.3f}" if count <= len(best) else "" for count in shown)]
            for name, best in values.items()]  # fmt: skip
    runs = [[origin[one.skips], one.skips.num_skipped, one.score.gamma, one.score.eta, f"{one.score.value:.3f}",
             f"{one.speedup:.3f}", f"{one.score.tokens_per_step:.2f}", f"{one.tokens_per_step:.2f}",
             f"{one.acceptance_rate:.1%}"] for one in ran]  # fmt: skip
    runs.append(["kangaroo, its adapter", "", "", "", "", f"{kangaroo['speedup']:.3f}", "",
                 f"{kangaroo['tokens_per_step']:.2f}", f"{kangaroo['acceptance_rate']:.1%}"])  # fmt: skip
    facts, winner = stamp(), max(values, key=lambda name: values[name][-1])
    pays = "is faster than" if ran[0].speedup > 1 else "gains nothing over"
    header = ["skipped", "acceptance", "expected speedup", "tokens per step", "gamma", "eta", "attention", "mlp"]
    text = "\n\n".join([
        "# Searching the sublayers to skip", stamp_text(facts),
        f"The sampler that won: {winner}, with an expected speedup of {values[winner][-1]:.3f}. The best candidate "
        f"{pays} plain decoding: it ran {ran[0].speedup:.3f} times as fast on prompts the search had not seen.",
        "## Best expected speedup after so many trials", markdown_table(["sampler", "trials", *map(str, shown)], rows),
        "## The best two of each sampler, run on unseen prompts",
        markdown_table(["found by", "skipped", "gamma", "eta", "expected speedup", "speedup",
                        "expected tokens per step", "tokens per step", "acceptance rate"], runs),
        "## Pareto front of skipped sublayers against acceptance, all samplers",
        "Acceptance: the share of guesses that were right, each behind a draft right so far.",
        markdown_table(header, [describe(one) for one in front]),
    ])  # fmt: skip
    result = {"stamp": facts, "costs": shared["costs"], "best_so_far": values, "kangaroo": kangaroo,
              "validated": [{"sampler": origin[one.skips], "skips": one.skips.to_dict(), "score": one.score.to_dict(),
                             "speedup": one.speedup, "tokens_per_step": one.tokens_per_step,
                             "acceptance_rate": one.acceptance_rate} for one in ran],
              "pareto_front": [{"skips": one.skips.to_dict(), **one.score.to_dict()} for one in front]}  # fmt: skip
    write_result(args.output, result, text=text)
    print(text)


if __name__ == "__main__":
    main()
