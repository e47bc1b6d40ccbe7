"""`predict.py` with a model that costs nothing: what Cog's server runs for the part `host`."""

from contextlib import ExitStack

import predict
from scripts.benchmarks.free_model import free_model


class Predictor(predict.Predictor):
    """The usual predictor, whose model stays replaced until the process ends."""

    def setup(self) -> None:
        """Load the checkpoint."""
        self._replaced = ExitStack()
        self._replaced.enter_context(free_model())
        super().setup()
