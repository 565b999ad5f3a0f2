"""The exception tree. Imports nothing, is imported by everyone.

A message says what happened, the number, and what to do next. One place per surface turns an exception into its
outside form: `cli/main.py` into an exit code, `gateway/errors.py` into an HTTP status.
"""


class PingjiaError(Exception):
    """Root of everything this package raises on purpose."""


class UserError(PingjiaError):
    """The user can put it right: a file, a recipe, an argument. Exit code 2."""


class RecipeError(UserError):
    """A recipe that cannot be obeyed: an unknown key, a wrong type, a value out of range."""


class DataError(UserError):
    """User data that cannot be read or must not be trained on. Names file and line."""


class ModelError(UserError):
    """A model directory, checkpoint, tokenizer or adapter that cannot be used. Names what was found."""


class TrainingError(UserError):
    """A run that must not go on: it would train nothing, or its loss is no longer a number."""


class StorageError(UserError):
    """The disk refused: full, read-only, no permission. What was there before is still there."""


class RequestError(UserError):
    """A request that cannot be served as asked. HTTP 400.

    `param` names the offending field as the client sent it, `code` is the machine-readable reason.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class PromptTooLong(RequestError):
    """Prompt plus answer do not fit the context. HTTP 400 with both numbers in the message."""

    def __init__(self, message: str, *, param: str = "messages") -> None:
        super().__init__(message, param=param, code="context_length_exceeded")


class ModelNotFound(RequestError):
    """No model or adapter of that name is served. HTTP 404."""

    def __init__(self, message: str) -> None:
        super().__init__(message, param="model", code="model_not_found")


class Overloaded(PingjiaError):
    """Accepting the request would break a promise to others. HTTP 503; `retry_after_s` is measured, not guessed."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineError(PingjiaError):
    """The engine failed while a request was running. HTTP 500; the request ends with finish_reason "error"."""


class UpstreamFailed(EngineError):
    """A server that answers in the engine's place failed, or cannot be reached. HTTP 502."""


class UpstreamBusy(Overloaded):
    """A server that answers in the engine's place takes no more now. HTTP `status`, 429 or 503, as it said itself."""

    def __init__(self, message: str, *, retry_after_s: float, status: int = 503) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.status = status
