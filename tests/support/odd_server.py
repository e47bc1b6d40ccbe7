"""An HTTP server whose answers are raw bytes, well-formed or not, at any speed."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

Answer = Callable[["Connection"], None]


@dataclass
class Connection:
    """One connection to the server, and the request that came on it."""

    socket: socket.socket
    request: bytes
    stopped: threading.Event

    def send(self, content: bytes) -> None:
        """Send bytes. Raises OSError if the client has gone."""
        self.socket.sendall(content)

    def drip(self, content: bytes) -> None:
        """Send this again and again, slowly, until the client goes or the server stops."""
        while not self.stopped.wait(0.01):
            self.send(content)

    def wait_closed(self) -> None:
        """Wait until the client closes the connection."""
        while self.socket.recv(1024):
            pass


@dataclass
class OddServer:
    """A running server.

    answers: what to do with a connection, by the path of its request.
    requests: the request heads so far.
    closed: set when a client has closed a connection before its answer was complete.
    """

    address: str
    port: int
    answers: dict[str, Answer] = field(default_factory=dict)
    requests: list[bytes] = field(default_factory=list)
    closed: threading.Event = field(default_factory=threading.Event)

    def url(self, path: str, host: str | None = None) -> str:
        """The URL of a path, without its leading slash."""
        return f"http://{host or self.address}:{self.port}/{path}"

    def serve(self, connection: socket.socket, stopped: threading.Event) -> None:
        """Answer one connection."""
        with connection, suppress(OSError):
            request = connection.recv(65536)
            self.requests.append(request)
            path = request.decode("latin-1").partition(" HTTP/")[0].rpartition("/")[2]
            try:
                if path in self.answers:
                    self.answers[path](Connection(connection, request, stopped))
            except OSError:
                self.closed.set()


@contextmanager
def odd_server(address: str = "127.0.0.1") -> Iterator[OddServer]:
    """Run a server at a free port."""
    stopped = threading.Event()
    with socket.create_server((address, 0)) as listener:
        server = OddServer(address, listener.getsockname()[1])

        def accept() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    arguments = (connection, stopped)
                    threading.Thread(target=server.serve, args=arguments, daemon=True).start()

        thread = threading.Thread(target=accept)
        thread.start()
        yield server
        stopped.set()
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
