"""Errors that a user can fix. Every message says what was expected, what was found and what to do."""


class DeepclustError(Exception):
    """A user's mistake or a failure outside of the program; shown as one line, without a traceback."""


class ConfigError(DeepclustError):
    """A parameter is unknown, of the wrong type, out of range, or at odds with another one or with the data."""


class DataError(DeepclustError):
    """Images, labels or files of a data set are missing, damaged or of the wrong shape."""


class CheckpointError(DeepclustError):
    """Saved weights or state are missing, damaged or belong to something else."""


class TrainingError(DeepclustError):
    """Training can not go on, for instance because the loss is no longer finite."""


class PeerError(DeepclustError):
    """Another process of the same run failed; its own message is the one that matters."""


class PreemptedError(DeepclustError):
    """A run was told to stop and has saved its state; started again, it goes on."""


class AdaptationError(DeepclustError):
    """An adapter can not work with this model, head or batch."""


class TrackingError(DeepclustError):
    """The tracking server can not be reached or refuses what is logged."""


class StageError(DeepclustError):
    """A stage of the pipeline failed, or can not be started."""
