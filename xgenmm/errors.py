"""The one error a user of the library has to know: an input that cannot be used as it is."""


class InputError(ValueError):
    """An input is wrong; the message starts with the input's name, e.g. `question: ...`.

    The message says what was wrong and what would be right.
    """

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"{name}: {message}")
        self.name = name
