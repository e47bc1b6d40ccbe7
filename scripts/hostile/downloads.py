"""Download from hostile hubs and over damaged state, and count how many are refused clearly.

    python -m scripts.hostile.downloads            # a line for each class of case
    python -m scripts.hostile.downloads -v         # and one for each case that is not handled
    python -m scripts.hostile.downloads "listing"  # only classes whose name contains this

Each case runs `xgenmm download` (or another command) against a local hub, in a process of its own.
It is refused if the command ends within three minutes, without much memory or disk, with exit
status 1. It is handled if it also prints an error of at most a screen that names the cause, and if
the download succeeds once the hub is honest (or, for damaged state, once what the error names is
deleted).
"""

import argparse
import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from scripts.hostile.isolation import LONGEST_MESSAGE, Outcome, run
from tests.support.hub_repository import BIG, NAME, REPO, SMALL, TAKEN, repository
from tests.support.hub_server import HubServer
from xgenmm.__main__ import main as xgenmm_command

SECONDS = 180.0
MORE_DISK = 64 << 20
CHUNK = b"0" * 2**16
LISTING = rf"^/api/models/{REPO}"

Answer = Callable[[BaseHTTPRequestHandler], None]
Prepare = Callable[[HubServer, Path], object]


@dataclass(frozen=True)
class Case:
    """One hostile hub, or one damaged folder.

    prepare: makes the hub hostile or writes files into the weights folder.
    words: what the error must contain; empty if the command must succeed.
    repair: makes all well, after which `xgenmm download` must succeed.
    arguments: of `xgenmm`.
    """

    group: str
    name: str
    prepare: Prepare
    words: tuple[str, ...]
    repair: Prepare
    arguments: tuple[str, ...] = ("download", NAME)


def all_cases() -> Iterator[Case]:
    """Yield every case."""
    yield from _listings()
    yield from _listed_values()
    yield from _redirects_and_refusals()
    yield from _files()
    yield from _state()


def _listings() -> Iterator[Case]:
    """Answers to the request for the repository's description."""
    answers: dict[str, Answer] = {
        "endless JSON": partial(_endless, start=b'{"siblings": [', chunk=b'"a",' * 2**14),
        "endless with a length": partial(_endless, start=b"{", chunk=CHUNK, length=10**12),
        "endless gzip": _gzip_bomb,
        "dripping body": partial(_drip, data=b'{"siblings": [' + b" " * 10**6),
        "dripping headers": _dripping_headers,
        "endless headers": _endless_headers,
        "100 Continue for ever": _continue_for_ever,
        "never answers": lambda _: time.sleep(1000),
        "closes at once": lambda _: None,
        "not HTTP": _not_http,
        "empty": partial(_send, body=b""),
        "HTML": partial(_send, body=b"<html>Sign in to this network</html>"),
        "list": partial(_send, body=b"[]"),
        "null": partial(_send, body=b"null"),
        "no keys": partial(_send, body=b"{}"),
        "deep": partial(_send, body=b"[" * 200_000 + b"]" * 200_000),
        "invalid UTF-8": partial(_send, body=b'{"id": "\xff"}'),
        "broken gzip": partial(_send, body=b"nonsense", headers={"Content-Encoding": "gzip"}),
    }
    for name, answer in answers.items():
        yield _hub_case("listing", name, LISTING, answer, ("hub",))


def _listed_values() -> Iterator[Case]:
    """Descriptions with one wrong value."""

    def change(handler: BaseHTTPRequestHandler, path: tuple[Any, ...], value: Any) -> None:
        content = _listing()
        place: Any = content
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        _send(handler, body=json.dumps(content).encode())

    size_words = ("hub", "size")
    value: Any
    path: tuple[Any, ...]
    for value in ("24", 2.5, True, None, [], -1, 10**30):
        yield _hub_case("listed values", f"size = {value!r}", LISTING,
                        partial(change, path=("siblings", 0, "size"), value=value),
                        size_words)  # fmt: skip
    for path, value in (
        (("siblings",), None), (("siblings",), {}), (("siblings",), [7]), (("siblings",), [{}]),
        (("siblings", 0, "rfilename"), 7), (("siblings", 0, "rfilename"), None),
        (("siblings", 0, "blobId"), 7),
        (("siblings", 0, "blobId"), "../../etc"),
        (("siblings", 0, "lfs"), "text"), (("siblings", 0, "lfs"), {"size": 3}),
        (("siblings", 0, "lfs"), {"sha256": "../../a", "size": 3, "pointerSize": 1}),
        (("sha",), None), (("sha",), 7), (("sha",), "../../a"), (("sha",), ""),
        (("id",), None), (("id",), 7), (("id",), "../../a/b/c"), (("id",), "\x1b[2J"),
    ):  # fmt: skip
        name = f"{'.'.join(map(str, path))} = {value!r}"
        answer = partial(change, path=path, value=value)
        yield _hub_case("listed values", name, LISTING, answer, ("hub",))

    def more(handler: BaseHTTPRequestHandler, names: list[str]) -> None:
        content = _listing()
        content["siblings"] += [{"rfilename": n, "size": 3, "blobId": "0" * 40} for n in names]
        _send(handler, body=json.dumps(content).encode())

    outside = ["../a.json", "/tmp/a.json", "a/../../b.json", "x\\..\\a.json", "..", "a\0.json"]
    yield _hub_case("listed values", "names outside the folder", LISTING,
                    partial(more, names=outside), ())  # fmt: skip
    strange = ["\x1b[2J.json", "a\nb.json", "a b.json", "a" * 300 + ".json", ".json", "\u202e.json"]
    yield _hub_case("listed values", "strange names", LISTING, partial(more, names=strange), ())
    yield _hub_case("listed values", "100,000 files", LISTING,
                    partial(more, names=[f"{i}.json" for i in range(100_000)]),
                    ("files",))  # fmt: skip


def _redirects_and_refusals() -> Iterator[Case]:
    group = "redirects and refusals"

    def loop(handler: BaseHTTPRequestHandler) -> None:
        handler.server.__dict__["loops"] = handler.server.__dict__.get("loops", 0) + 1
        place = f"{handler.path.split('?')[0]}?{handler.server.__dict__['loops']}"
        _send(handler, status=302, headers={"Location": place})

    def to(handler: BaseHTTPRequestHandler, place: str) -> None:
        _send(handler, status=302, headers={"Location": place})

    for what, pattern, word in (("listing", LISTING, "hub"), ("file", rf"/{BIG}$", BIG)):
        yield _hub_case(group, f"{what}: redirect loop", pattern, loop, (word,))
        for place in ("http://[", "file:///etc/passwd", "gopher://a/", "", "http://127.0.0.1:1/a"):
            yield _hub_case(group, f"{what}: redirect to {place!r}", pattern,
                            partial(to, place=place), (word,))  # fmt: skip
        for status in (400, 403, 404, 410, 416, 418, 451, 500, 501, 503, 599, 204, 304):
            yield _hub_case(group, f"{what}: status {status}", pattern,
                            partial(_send, status=status), (word,))  # fmt: skip
        yield _hub_case(group, f"{what}: 1 GB of error text", pattern,
                        partial(_endless, start=b"", chunk=CHUNK, length=10**9, status=500),
                        (word,))  # fmt: skip
        yield _hub_case(group, f"{what}: 100 kB of error text", pattern,
                        partial(_send, status=403, body=b"no " * 33_000), (word,))  # fmt: skip
        message = {"X-Error-Message": "a" * 60_000, "X-Error-Code": "Odd"}
        yield _hub_case(group, f"{what}: long error header", pattern,
                        partial(_send, status=403, headers=message), (word,))  # fmt: skip
        for status, wait in ((429, "1000000000"), (503, "1000000000"), (429, "9" * 400),
                             (429, "-5"), (429, "soon"), (429, "Fri, 31 Dec 9999 23:59:59 GMT"),
                             (429, "nan"), (429, "1e9"), (429, "inf")):  # fmt: skip
            yield _hub_case(group, f"{what}: {status}, Retry-After {wait[:30]}", pattern,
                            partial(_send, status=status, headers={"Retry-After": wait}),
                            (word,))  # fmt: skip
        limit = {"ratelimit": '"api";r=0;t=1000000000'}
        yield _hub_case(group, f"{what}: 429, rate limit for 30 years", pattern,
                        partial(_send, status=429, headers=limit), (word,))  # fmt: skip


def _files() -> Iterator[Case]:
    """Answers to the request for a file."""
    for file in ("config.json", BIG):
        place = rf"/{file}$" if file == "config.json" else rf"^/store/.*/{file}$"
        length = len(repository()[file])
        answers: dict[str, Answer] = {
            "1 GB": partial(_endless, start=b"", chunk=CHUNK, length=10**9),
            "endless": partial(_endless, start=b"", chunk=CHUNK),
            "gzip bomb": _gzip_bomb,
            "1 GB, length right": partial(_endless, start=b"", chunk=CHUNK, length=length),
            "empty": partial(_send, body=b""),
            "empty gzip": partial(_send, body=b"", headers={"Content-Encoding": "gzip"}),
            "short, chunked": partial(_chunked, chunks=[b"ab"]),
            "wrong bytes": partial(_send, body=bytes(length)),
            "HTML": partial(_send, body=b"<html>Sign in</html>"),
            "dripping": partial(_drip, data=bytes(length)),
            "dripping headers": _dripping_headers,
            "endless headers": _endless_headers,
            "100 Continue for ever": _continue_for_ever,
            "never answers": lambda _: time.sleep(1000),
            "closes at once": lambda _: None,
            "not HTTP": _not_http,
            "broken gzip": partial(_send, body=bytes(length), headers={"Content-Encoding": "gzip"}),
            "206 of another range": partial(
                _send, status=206, body=bytes(5), headers={"Content-Range": "bytes 7-11/12"}
            ),
        }
        for name, answer in answers.items():
            yield _hub_case(f"file: {file.split('-')[0]}", name, place, answer, (file,))


def _state() -> Iterator[Case]:
    """Damaged files in the weights folder."""
    right = "0" * 64
    records: dict[str, bytes] = {
        "not JSON": b"hello",
        "empty": b"",
        "list": b"[]",
        "null": b"null",
        "deep": b"[" * 200_000 + b"]" * 200_000,
        "invalid UTF-8": b'{"a": "\xff"}',
        "100 MB of lists": b"[" + b"[]," * (33 << 20) + b"[]]",
    }
    locks: dict[str, Any] = {
        "list for a pin": [],
        "text for a pin": "main",
        "pin without keys": {"a": 1},
        "number for a repository": {"repo": 7, "revision": "0" * 40, "files": {}},
        "no revision": {"repo": REPO, "files": {}},
        "list of files": {"repo": REPO, "revision": "0" * 40, "files": []},
        "size as text": _pin({"config.json": {"size": "24", "sha256": right}}),
        "negative size": _pin({"config.json": {"size": -1, "sha256": right}}),
        "no sha256": _pin({"config.json": {"size": 24}}),
        "sha256 of another length": _pin({"config.json": {"size": 24, "sha256": "ab"}}),
        "record is a number": _pin({"config.json": 7}),
    }
    lock = "releases.lock.json"
    for name, content in records.items():
        yield _state_case(lock, name, partial(_put, file=lock, content=content))
    for name, value in locks.items():
        content = json.dumps({NAME: value}).encode()
        yield _state_case(lock, name, partial(_put, file=lock, content=content))
    for name, make in _special_makers().items():
        yield _state_case(lock, name, partial(_make, file=lock, make=make))
    manifest = f"{NAME}/manifest.json"
    verify = ("verify", NAME)
    for name, content in records.items():
        yield _state_case(manifest, name, partial(_downloaded, content=content), verify)
    for name, value in locks.items():
        if name != "no revision":
            content = json.dumps(value).encode()
            yield _state_case(manifest, name, partial(_downloaded, content=content), verify)
    for name in ("../../etc/passwd", "/etc/passwd", "a\0b.json", "a" * 300 + ".json", "\x1b[2J"):
        content = json.dumps(_pin({name: {"size": 24, "sha256": right}})).encode()
        yield _state_case(
            manifest, f"record of {name[:20]!r}", partial(_downloaded, content=content), verify
        )
    for name, make in _special_makers().items():
        yield _state_case(manifest, name, partial(_downloaded, make=make), verify)
    for name, value in {"text": "x", "list": [], "no files": {"plan": 1},
                        "files is a list": {"plan": 1, "files": []}}.items():  # fmt: skip
        yield Case("state: .progress", name, partial(_downloaded, progress=json.dumps(value)),
                   (".progress",), _nothing, ("convert", NAME))  # fmt: skip
    for file in ("config.json", SMALL, "x.json"):
        for name, make in _special_makers().items():
            if file == "x.json" and name in ("folder", "link to nothing"):
                continue
            yield Case(f"convert, {name}", file, partial(_downloaded, file=file, make=make),
                       (file,), _nothing, ("convert", NAME))  # fmt: skip


def _special_makers() -> dict[str, Callable[[Path], object]]:
    return {
        "FIFO": lambda path: os.mkfifo(path),
        "folder": Path.mkdir,
        "link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
        "link to /etc/passwd": lambda path: path.symlink_to("/etc/passwd"),
        "link to itself": lambda path: path.symlink_to(path.name),
    }


def _pin(files: dict[str, Any]) -> dict[str, Any]:
    return {"repo": REPO, "revision": "0" * 40, "files": files}


def _listing() -> dict[str, Any]:
    """The description that an honest hub sends."""
    import httpx

    with HubServer({REPO: repository()}) as hub:
        content: dict[str, Any] = httpx.get(f"{hub.url}/api/models/{REPO}").json()
    return content


def _hub_case(group: str, name: str, pattern: str, answer: Answer, words: tuple[str, ...]) -> Case:
    def prepare(hub: HubServer, _: Path) -> None:
        hub.answers[pattern] = answer

    return Case(group, name, prepare, words, lambda hub, _: hub.answers.clear())


def _state_case(
    file: str, name: str, prepare: Prepare, arguments: tuple[str, ...] = ("download", NAME)
) -> Case:
    def repair(_: HubServer, root: Path) -> None:
        path = root / file
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        path.unlink(missing_ok=True)

    short = file.split("/")[-1]
    return Case(f"state: {short}", name, prepare, (short,), repair, arguments)


def _nothing(_: HubServer, root: Path) -> None:
    shutil.rmtree(root)


def _put(_: HubServer, root: Path, file: str, content: bytes) -> None:
    root.mkdir(exist_ok=True)
    (root / file).write_bytes(content)


def _make(_: HubServer, root: Path, file: str, make: Callable[[Path], object]) -> None:
    root.mkdir(exist_ok=True)
    make(root / file)


def _downloaded(
    _: HubServer,
    root: Path,
    content: bytes | None = None,
    make: Callable[[Path], object] | None = None,
    file: str = "manifest.json",
    progress: str | None = None,
) -> None:
    """Write a downloaded folder, and replace one of its files."""
    folder = root / NAME
    folder.mkdir(parents=True)
    for name, right in repository().items():
        if name in TAKEN:
            (folder / name).write_bytes(right)
    (folder / file).unlink(missing_ok=True)
    if content is not None:
        (folder / file).write_bytes(content)
    if make is not None:
        make(folder / file)
    if progress is not None:
        staging = root / f"{NAME}-bf16.partial"
        staging.mkdir()
        (staging / ".progress").write_text(progress)


def _send(
    handler: BaseHTTPRequestHandler,
    body: bytes = b"",
    status: int = 200,
    headers: dict[str, str] | None = None,
) -> None:
    handler.send_response(status)
    for key, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
        handler.send_header(key, value)
    handler.end_headers()
    _write(handler, body)


def _write(handler: BaseHTTPRequestHandler, data: bytes) -> None:
    with contextlib.suppress(OSError):
        handler.wfile.write(data)


def _endless(
    handler: BaseHTTPRequestHandler,
    start: bytes,
    chunk: bytes,
    length: int | None = None,
    status: int = 200,
) -> None:
    """Send `chunk` until the client goes away, whatever `length` says."""
    handler.send_response(status)
    if length is not None:
        handler.send_header("Content-Length", str(length))
    handler.send_header("Connection", "close")
    handler.end_headers()
    with contextlib.suppress(OSError):
        handler.wfile.write(start)
        for _ in range(2 * 10**9 // len(chunk)):
            handler.wfile.write(chunk)


def _gzip_bomb(handler: BaseHTTPRequestHandler) -> None:
    """Send 4 GB of zeros as 4 MB of gzip."""
    import zlib

    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    handler.send_response(200)
    handler.send_header("Content-Encoding", "gzip")
    handler.send_header("Connection", "close")
    handler.end_headers()
    with contextlib.suppress(OSError):
        for _ in range(64):
            handler.wfile.write(packer.compress(bytes(2**26)))


def _chunked(handler: BaseHTTPRequestHandler, chunks: list[bytes]) -> None:
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    for chunk in [*chunks, b""]:
        _write(handler, b"%x\r\n%s\r\n" % (len(chunk), chunk))


def _drip(handler: BaseHTTPRequestHandler, data: bytes) -> None:
    """Send one byte every two seconds."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    with contextlib.suppress(OSError):
        for place in range(len(data)):
            handler.wfile.write(data[place : place + 1])
            time.sleep(2)


def _not_http(handler: BaseHTTPRequestHandler) -> None:
    _write(handler, b"SSH-2.0-OpenSSH_9\r\n")


def _dripping_headers(handler: BaseHTTPRequestHandler) -> None:
    with contextlib.suppress(OSError):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        for _ in range(10_000):
            handler.wfile.write(b"a")
            time.sleep(2)


def _endless_headers(handler: BaseHTTPRequestHandler) -> None:
    with contextlib.suppress(OSError):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
        for number in range(10**8):
            handler.wfile.write(b"X-%d: %s\r\n" % (number, b"a" * 1000))


def _continue_for_ever(handler: BaseHTTPRequestHandler) -> None:
    with contextlib.suppress(OSError):
        for _ in range(10_000):
            handler.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            time.sleep(0.5)


def _disk_used(root: Path) -> int:
    paths = [path for path in root.rglob("*") if path.is_file() and not path.is_symlink()]
    return sum(path.stat().st_blocks * 512 for path in paths)


@contextlib.contextmanager
def _watched_disk(root: Path) -> Iterator[list[int]]:
    """Collect how much disk is taken in addition, as long as the block runs."""
    before, used, done = _disk_used(root), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            with contextlib.suppress(OSError):  # a file has gone
                used.append(_disk_used(root) - before)

    thread = threading.Thread(target=watch)
    thread.start()
    yield used
    done.set()
    thread.join()


def attempt(case: Case, root: Path) -> str:
    """Run the command of a case, and then the download from an honest hub."""
    os.environ |= {"XGENMM_HOME": str(root), "NO_PROXY": "127.0.0.1,localhost"}
    with HubServer({REPO: repository()}) as hub:
        os.environ["HF_ENDPOINT"] = hub.url  # read when the hub's client is imported, below
        case.prepare(hub, root)
        with _watched_disk(root) as peak:
            status, shown = _command(case.arguments)
        case.repair(hub, root)
        repaired = ""
        for _ in range(2):  # the first may say that wrong bytes of the other hub are now deleted
            if not (root / NAME).is_dir():
                repaired = _command(("download", NAME))[1]
        complete = (root / NAME).is_dir()
    result = {"status": status, "shown": shown, "disk": max(peak), "repaired": complete or repaired}
    return json.dumps(result)


def _command(arguments: tuple[str, ...]) -> tuple[int, str]:
    """Run `xgenmm`; return its exit status and what it wrote to both streams."""
    stream = io.StringIO()
    with contextlib.redirect_stderr(stream), contextlib.redirect_stdout(stream):
        try:
            status = xgenmm_command(arguments)
        except BaseException as error:
            return 255, f"Traceback {type(error).__name__}: {error}"
    return status, stream.getvalue()


def run_case(case: Case) -> tuple[bool, bool, Outcome]:
    """Run one case; return whether it was refused (or succeeded, if it must) and handled."""
    with tempfile.TemporaryDirectory() as folder:
        outcome = run(partial(attempt, case, Path(folder) / "weights"), SECONDS)
    if outcome.ended != "returned":
        return False, False, outcome
    result = json.loads(outcome.text)
    shown = result["shown"]
    clear = all(word in shown for word in case.words) and "\x1b" not in shown
    right_status = result["status"] == (1 if case.words else 0)
    bounded = len(shown) <= LONGEST_MESSAGE
    refused = right_status and result["disk"] < MORE_DISK
    return refused, refused and clear and bounded and result["repaired"] is True, outcome


def main() -> int:
    """Run all cases and print the table; return 1 if one was not handled."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("only", nargs="?", default="")
    parser.add_argument("-v", "--verbose", action="store_true")
    options = parser.parse_args()
    cases = [case for case in all_cases() if options.only in case.group]
    counts: dict[str, list[int]] = {}
    with ThreadPoolExecutor(8) as pool:  # most of them wait
        results = pool.map(run_case, cases)
        for case, (refused, handled, outcome) in zip(cases, results, strict=True):
            count = counts.setdefault(case.group, [0, 0, 0])
            counts[case.group] = [count[0] + 1, count[1] + refused, count[2] + handled]
            if options.verbose and not handled:
                print(f"  {case.group}: {case.name}: {outcome}", flush=True)
    counts["all"] = [sum(column) for column in zip(*counts.values(), strict=True)]
    print(f"{'class':<40}{'cases':>7}{'refused':>9}{'handled':>9}")
    for group, (number, refused_number, handled_number) in counts.items():
        print(f"{group:<40}{number:>7}{refused_number:>9}{handled_number:>9}")
    return int(counts["all"][0] != counts["all"][2])


if __name__ == "__main__":
    sys.exit(main())
