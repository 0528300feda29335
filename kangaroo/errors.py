"""Every error a user can cause: what was given, what is allowed, what to do."""


class KangarooError(Exception):
    """Base of all errors a user of Kangaroo can cause; the message is one line."""


class CheckpointError(KangarooError):
    """A model folder, hub id, weight file or tokenizer cannot be used."""


class AdapterError(KangarooError):
    """An adapter is missing, damaged, or belongs to another model or exit layer."""


class DatastoreError(KangarooError):
    """A datastore is missing, damaged, empty, or belongs to another vocabulary."""


class HeadsError(KangarooError):
    """Medusa heads are missing, damaged, or belong to another model."""


class SkipLayersError(KangarooError):
    """A list of sublayers to skip is missing, damaged, or names what the model has not."""


class SettingsError(KangarooError, ValueError):
    """A parameter is outside its allowed range."""


class PromptError(KangarooError, ValueError):
    """A prompt is empty, too long for the context, or holds unknown token ids."""


class QueueFullError(KangarooError):
    """More requests wait than the engine was told to hold."""


class EngineError(KangarooError):
    """The engine takes no more requests: it is not running, or has failed."""


class KernelError(KangarooError):
    """The kernels in use cannot do what was asked of them."""


class DataError(KangarooError):
    """Training data cannot be read or holds nothing to learn from."""


class ResumeError(KangarooError):
    """A training checkpoint cannot be continued from."""


class OutputError(KangarooError):
    """An output folder or file cannot be written."""
