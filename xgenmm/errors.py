"""The errors a user of the library has to know."""


class InputError(ValueError):
    """An input cannot be used; the message starts with its name, e.g. `question: ...`.

    The message says what was wrong and what would be right.
    """

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"{name}: {message}")
        self.name = name


class EngineError(RuntimeError):
    """The engine could not answer a request that was right: it failed, or it is shut down."""


class CheckpointError(ValueError):
    """A checkpoint is absent, broken, or does not fit the model; the message says what to do."""
