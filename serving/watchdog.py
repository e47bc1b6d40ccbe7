"""Ends Cog's server once its worker has died, so that whoever runs the server starts it again.

Cog 0.23's server outlives its worker: it answers all requests with an error and is never ready
again. `Predictor.setup` starts this program, which needs nothing but the standard library:

    python serving/watchdog.py SERVER_PID

Standard input is a pipe that only the worker can write to. When the worker dies, however that
happens, the pipe closes. The server has a moment to tell its clients or, after SIGTERM, to exit by
itself; then it is killed. A byte in the pipe dismisses the watchdog.
"""

import os
import select
import signal
import sys
from contextlib import suppress

GRACE_SECONDS = 1.0


def main() -> None:
    """Wait for the worker's end, then for the server's."""
    server = os.pidfd_open(int(sys.argv[1]))  # unlike its id, never refers to another process
    if os.read(sys.stdin.fileno(), 1):
        return
    exited = select.poll()
    exited.register(server, select.POLLIN)
    if not exited.poll(GRACE_SECONDS * 1000):
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(server, signal.SIGKILL)


if __name__ == "__main__":
    main()
