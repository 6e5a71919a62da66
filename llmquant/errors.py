"""The exceptions a user can meet. Each carries one line: what, where, and what to do about it.

The command line prints the line and exits with the class's `exit_code`; a traceback is a bug.
"""


class LlmquantError(Exception):
    """Base of every error that llmquant raises on purpose."""

    exit_code = 1


class CheckpointError(LlmquantError):
    """A checkpoint directory or file on disk is not what it claims to be."""


class ArchitectureError(LlmquantError):
    """The structure of a model could not be derived."""


class CalibrationError(LlmquantError):
    """Calibration input is empty, malformed or does not fit the model."""


class RecipeError(LlmquantError):
    """The recipe asks for something that does not exist or does not fit together."""


class NumericsError(LlmquantError):
    """NaN or Inf where only finite numbers make sense, or a Hessian that no rung of the ladder can use."""


class OutputError(LlmquantError):
    """The output directory cannot be used: foreign, locked, full, read-only, or from another run."""


class VerifyError(LlmquantError):
    """A finished directory is not whole, not finite, or not what its recipe promised."""


class HubError(LlmquantError):
    """The Hub refuses a push, or cannot be reached."""


class ServerError(LlmquantError):
    """The server cannot start."""


class GateError(LlmquantError):
    """A quality gate did not hold."""

    exit_code = 3
