"""Settings for the tests with lmms-eval, for `make test-eval` and its own environment."""

import importlib.util

# Without lmms-eval, as in `make test`, no test is collected here.
collect_ignore_glob = [] if importlib.util.find_spec("lmms_eval") else ["*"]
