"""Runs a command for as long as standard input stays open, so that it cannot outlive its parent.

It needs nothing but the standard library:

    python serving/tether.py COMMAND ARGUMENT...

Standard input is a pipe that only the parent can write to. When the parent closes it or dies,
however that happens, the command is killed. The exit status is the command's.
"""

import os
import select
import subprocess
import sys


def main() -> int:
    """Run the command until it ends or standard input closes; return its exit status."""
    with subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL) as command:
        ended = os.pidfd_open(command.pid)
        either = select.poll()
        either.register(ended, select.POLLIN)
        either.register(sys.stdin.fileno(), select.POLLIN)
        either.poll()
        command.kill()  # does nothing to a command that has ended
        status = command.wait()
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main())
