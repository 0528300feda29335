"""What a user may say about each drafter: plain records, by name, without loading anything heavy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from kangaroo.drafters.stopping import AdaptiveSettings
from kangaroo.errors import SettingsError


class Settings(Protocol):
    """Settings of the drafter that lives in the module of this name."""

    name: ClassVar[str]


@dataclass(frozen=True)
class PlainSettings:
    """Plain decoding has nothing to set."""

    name: ClassVar[str] = "plain"


@dataclass(frozen=True)
class KangarooSettings:
    """How Kangaroo drafts.

    Where gamma, eta, num_siblings and max_nodes are all None, they are what was tuned for the adapter on this machine
    (kangaroo.tuning); else None takes what the adapter recommends, or gamma 6 and eta 0.6 as in the paper, 1 and 64.
    adapter: a folder, None for "adapter" beside the model. exit_layer: only a check against the adapter's.
    gamma: the most tokens to draft in depth; eta: the confidence below which nothing is guessed behind a token, 0 for
    never, or how it adapts.
    num_siblings: guesses for the token behind one node, 1 for chains; max_nodes: nodes of a draft, its root included.
    """

    name: ClassVar[str] = "kangaroo"
    adapter: str | None = None
    exit_layer: int | None = None
    gamma: int | None = None
    eta: float | AdaptiveSettings | None = None
    num_siblings: int | None = None
    max_nodes: int | None = None


@dataclass(frozen=True)
class MedusaSettings:
    """How Medusa heads draft.

    heads: a folder, None for "medusa" beside the model. num_heads: how many of them guess, None for all. eta: the
    confidence below which nothing is guessed behind a token, 0 for never, or how it adapts. num_siblings: guesses for
    the token behind one node, 1 for chains; max_nodes: nodes of a draft, its root included.
    """

    name: ClassVar[str] = "medusa"
    heads: str | None = None
    num_heads: int | None = None
    eta: float | AdaptiveSettings = 0.2
    num_siblings: int = 3
    max_nodes: int = 24


@dataclass(frozen=True)
class PromptLookupSettings:
    """How prompt lookup drafts.

    max_ngram: the most last tokens of the text to look for.
    min_ngram: the fewest last tokens whose match is believed.
    num_tokens: the most tokens to draft.
    references: text files to look in besides the text itself (LLMA).
    num_siblings: different continuations to draft, 1 for the newest alone.
    eta: the confidence below which a match gets a single token drafted, 0 for never, or how it adapts; a match of n
    tokens, of 32 at most, has the confidence 1 - 0.5**n.
    """

    name: ClassVar[str] = "prompt_lookup"
    max_ngram: int = 3
    min_ngram: int = 1
    num_tokens: int = 10
    references: tuple[str, ...] = ()
    num_siblings: int = 1
    eta: float | AdaptiveSettings = 0.0


@dataclass(frozen=True)
class DraftModelSettings:
    """How a draft model drafts.

    model: the draft model, a folder or hub id of the target's vocabulary; None for "draft_model" beside the target.
    gamma: the most tokens to draft in depth.
    eta: stop drafting behind a token of less confidence, 0 for never; or how that adapts.
    num_siblings: guesses for the token behind one node, 1 for chains.
    max_nodes: nodes of a draft, its root included.
    dtype: float32, bfloat16, float16 or int8, what its weights are kept in; None for what the target's are.
    """

    name: ClassVar[str] = "draft_model"
    model: str | None = None
    gamma: int = 6
    eta: float | AdaptiveSettings = 0.4
    num_siblings: int = 1
    max_nodes: int = 64
    dtype: str | None = None


@dataclass(frozen=True)
class RetrievalSettings:
    """How REST drafts (He et al. 2023, arXiv 2311.08252).

    datastore: a folder, None for "datastore" beside the model. min_ngram, max_ngram: how many of the last tokens are
    looked up, the longest run that is found counting. max_matches: how many places of it are read, num_tokens: how far
    each. max_nodes: nodes of a draft, its root included. eta: the confidence below which nothing is guessed behind a
    token, 0 for never, or how it adapts; it is the share of the places that agree on the token, discounted.
    """

    name: ClassVar[str] = "retrieval"
    datastore: str | None = None
    min_ngram: int = 2
    max_ngram: int = 16
    num_tokens: int = 10
    max_matches: int = 64
    max_nodes: int = 32
    eta: float | AdaptiveSettings = 0.0


@dataclass(frozen=True)
class AutoSettings:
    """Which drafters share the work, each with its own defaults, but that prompt lookup looks for 5 tokens and may
    draft all that a draft holds.

    sources: names, lookups being asked before those that run a model; none for prompt lookup and all that lies beside
    the model: a datastore, an adapter, heads, a skip list, a draft model. datastore, references: retrieval's and prompt
    lookup's, as in their own settings. Raises SettingsError where they are given to a source that is not among those
    named.
    """

    name: ClassVar[str] = "auto"
    sources: tuple[str, ...] = ()
    datastore: str | None = None
    references: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, source in (("datastore", RetrievalSettings.name), ("references", PromptLookupSettings.name)):
            if getattr(self, name) and self.sources and source not in self.sources:
                raise SettingsError(f"{name} must come with {source} among the sources, got "
                                    f"{', '.join(self.sources)}; add that or leave out {name}")  # fmt: skip

    def settings_of(self, source: str) -> Settings:
        """The settings of a source; raises SettingsError for an unknown name."""
        if source == RetrievalSettings.name:
            return RetrievalSettings(datastore=self.datastore)
        if source == PromptLookupSettings.name:
            # Drafts are cut where they stop paying: after a long match, late.
            return PromptLookupSettings(max_ngram=5, num_tokens=63, references=self.references)
        return find_settings(source)()


@dataclass(frozen=True)
class GateSettings:
    """A drafter that is only asked where the target was sure of its last choice.

    drafter: the settings of the one behind the gate. threshold: the target's least confidence, in [0, 1].
    """

    name: ClassVar[str] = "gate"
    drafter: Settings
    threshold: float


@dataclass(frozen=True)
class LayerSkipSettings:
    """How Draft & Verify drafts.

    skip_layers: a skip list, None for "skip_layers.json" beside the model. gamma: the most tokens to draft in depth.
    eta: how the confidence to go on with adapts, or a fixed one, 0 for drafts of gamma tokens. num_siblings: guesses
    for the token behind one node, 1 for chains; max_nodes: nodes of a draft, its root included.
    """

    name: ClassVar[str] = "layer_skip"
    skip_layers: str | None = None
    gamma: int = 8
    eta: float | AdaptiveSettings = field(default_factory=AdaptiveSettings)
    num_siblings: int = 1
    max_nodes: int = 64


SETTINGS: dict[str, type[Settings]] = {
    one.name: one
    for one in (
        PlainSettings,
        KangarooSettings,
        LayerSkipSettings,
        MedusaSettings,
        PromptLookupSettings,
        DraftModelSettings,
        RetrievalSettings,
        AutoSettings,
    )
}


def find_settings(name: str) -> type[Settings]:
    """The settings class of a drafter; raises SettingsError for an unknown name."""
    if name not in SETTINGS:
        raise SettingsError(f"drafter must be one of {', '.join(SETTINGS)}, got {name!r}")
    return SETTINGS[name]
