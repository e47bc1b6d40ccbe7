"""The errors that users of the library may catch."""


class InputError(ValueError):
    """An input is invalid.

    The message starts with the input's name (`question: ...`) and says what is wrong and what would
    be right.
    """

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"{name}: {message}")
        self.name = name


class EngineError(RuntimeError):
    """The engine failed or is shut down; the request itself was valid."""


class CheckpointError(ValueError):
    """A checkpoint is missing, corrupt, or does not fit the model; the message says what to do."""
