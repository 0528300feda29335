"""A search on disk: Optuna's study in SQLite, with the texts and costs that all its candidates are judged by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kangaroo.bench.texts import Text, decode_texts
from kangaroo.errors import OutputError, ResumeError, SettingsError
from kangaroo.model.checkpoint import LoadedModel
from kangaroo.search.cost import SkipCosts, measure_skip_costs
from kangaroo.search.forced import ForcedTexts
from kangaroo.search.objectives import ExpectedSpeedup, Objective, TokensPerSecond
from kangaroo.search.plan import SamplerName, SearchPlan
from kangaroo.search.report import RESULTS

if TYPE_CHECKING:
    import optuna

STUDY_FILE, STUDY_NAME = "search.sqlite", "layers"


def open_study(output: Path, plan: SearchPlan, *, resume: bool) -> optuna.Study:
    """The study in search.sqlite of this folder, made anew unless it is resumed.

    Raises ResumeError where there is none to resume, or another one; OutputError where results are there already or
    cannot be written; SettingsError without Optuna.
    """
    library = _import_optuna()
    path = output / STUDY_FILE
    if resume and not path.is_file():
        raise ResumeError(f"{output} holds no {STUDY_FILE} to resume from; leave out --resume to start there")
    taken = next((name for name in (STUDY_FILE, *RESULTS) if (output / name).exists()), None)
    if taken is not None and not resume:
        raise OutputError(f"{output} already holds {taken}; continue with --resume or give another folder")
    try:
        output.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        raise OutputError(f"cannot write to {output}: {error.strerror or error}; give another --output") from error
    study = _load(library, path)
    kept, wanted = study.user_attrs.get("plan", asdict(plan)), asdict(plan)
    changed = next((name for name in wanted if kept.get(name) != wanted[name]), None)
    if changed is not None:
        raise ResumeError(f"{path} searched with {changed} {kept.get(changed)}, got {wanted[changed]}; "
                          "give the same or start in another folder")  # fmt: skip
    study.set_user_attr("plan", wanted)
    # What is resumed must not draw again what it has drawn.
    study.sampler = _make_sampler(library, plan.sampler, seed=plan.seed + len(study.trials))
    return study


def prepare_texts(study: optuna.Study, model: LoadedModel, *, prompts: Sequence[Sequence[int]],
                  max_new_tokens: int) -> list[Text]:  # fmt: skip
    """The prompts with the target's continuations, decoded when the study began and kept in it.

    Raises SettingsError where every text ends before there is a token to guess.
    """
    kept = study.user_attrs.get("texts")
    if kept is not None:
        return [Text(tuple(token_ids), num_prompt) for token_ids, num_prompt in kept]
    texts = decode_texts(model.target, prompts, eos_ids=model.eos_ids, max_new_tokens=max_new_tokens)
    study.set_user_attr("texts", [[text.token_ids, text.num_prompt] for text in texts])
    return texts


def prepare_objective(study: optuna.Study, model: LoadedModel, *, texts: Sequence[Text], plan: SearchPlan) -> Objective:
    """What the plan's candidates are judged by; costs are measured when the study begins and kept in it."""
    if plan.objective == "tokens_per_second":
        return TokensPerSecond(model.target, texts, gamma=plan.gamma)
    if "costs" not in study.user_attrs:
        prompts = [text.token_ids[: text.num_prompt] for text in texts]
        costs = measure_skip_costs(model.target, prompts, gamma=plan.gamma)
        study.set_user_attr("costs", costs.to_dict())
    forced = ForcedTexts(model.target, texts, num_drafted=plan.gamma)
    return ExpectedSpeedup(forced, SkipCosts(**study.user_attrs["costs"]))


def _load(library: Any, path: Path) -> optuna.Study:
    from sqlalchemy.exc import SQLAlchemyError

    try:
        storage = library.storages.RDBStorage(f"sqlite:///{path.resolve()}")
        study: optuna.Study = library.create_study(
            storage=storage, study_name=STUDY_NAME, direction="maximize", load_if_exists=True
        )
    except (SQLAlchemyError, library.exceptions.StorageInternalError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ResumeError(f"{path} is no study that can be read ({reason}); start in another folder") from error
    return study


def _make_sampler(library: Any, name: SamplerName, *, seed: int) -> optuna.samplers.BaseSampler:
    # Greedy candidates are all given, so that its sampler has nothing to draw.
    makers = {"tpe": library.samplers.TPESampler, "gp": library.samplers.GPSampler}
    sampler: optuna.samplers.BaseSampler = makers.get(name, library.samplers.RandomSampler)(seed=seed)
    return sampler


def _import_optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise SettingsError("the search needs optuna, which is not installed; "
                            "pip install 'kangaroo-decoding[search]'") from error  # fmt: skip
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
