"""The cases of `scripts.hostile.downloads`: hostile hubs, and damaged folders."""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from scripts.hostile.hub_answers import (
    CHUNK,
    Answer,
    chunked,
    continue_for_ever,
    drip,
    dripping_headers,
    endless,
    endless_headers,
    gzip_bomb,
    not_http,
    send,
)
from tests.support.hub_repository import BIG, NAME, REPO, SMALL, TAKEN, repository
from tests.support.hub_server import HubServer

LISTING = rf"^/api/models/{REPO}"
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
        "endless JSON": partial(endless, start=b'{"siblings": [', chunk=b'"a",' * 2**14),
        "endless with a length": partial(endless, start=b"{", chunk=CHUNK, length=10**12),
        "endless gzip": gzip_bomb,
        "dripping body": partial(drip, data=b'{"siblings": [' + b" " * 10**6),
        "dripping headers": dripping_headers,
        "endless headers": endless_headers,
        "100 Continue for ever": continue_for_ever,
        "never answers": lambda _: time.sleep(1000),
        "closes at once": lambda _: None,
        "not HTTP": not_http,
        "empty": partial(send, body=b""),
        "HTML": partial(send, body=b"<html>Sign in to this network</html>"),
        "list": partial(send, body=b"[]"),
        "null": partial(send, body=b"null"),
        "no keys": partial(send, body=b"{}"),
        "deep": partial(send, body=b"[" * 200_000 + b"]" * 200_000),
        "invalid UTF-8": partial(send, body=b'{"id": "\xff"}'),
        "broken gzip": partial(send, body=b"nonsense", headers={"Content-Encoding": "gzip"}),
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
        send(handler, body=json.dumps(content).encode())

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
        send(handler, body=json.dumps(content).encode())

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
        send(handler, status=302, headers={"Location": place})

    def to(handler: BaseHTTPRequestHandler, place: str) -> None:
        send(handler, status=302, headers={"Location": place})

    for what, pattern, word in (("listing", LISTING, "hub"), ("file", rf"/{BIG}$", BIG)):
        yield _hub_case(group, f"{what}: redirect loop", pattern, loop, (word,))
        for place in ("http://[", "file:///etc/passwd", "gopher://a/", "", "http://127.0.0.1:1/a"):
            yield _hub_case(group, f"{what}: redirect to {place!r}", pattern,
                            partial(to, place=place), (word,))  # fmt: skip
        for status in (400, 403, 404, 410, 416, 418, 451, 500, 501, 503, 599, 204, 304):
            yield _hub_case(group, f"{what}: status {status}", pattern,
                            partial(send, status=status), (word,))  # fmt: skip
        yield _hub_case(group, f"{what}: 1 GB of error text", pattern,
                        partial(endless, start=b"", chunk=CHUNK, length=10**9, status=500),
                        (word,))  # fmt: skip
        yield _hub_case(group, f"{what}: 100 kB of error text", pattern,
                        partial(send, status=403, body=b"no " * 33_000), (word,))  # fmt: skip
        message = {"X-Error-Message": "a" * 60_000, "X-Error-Code": "Odd"}
        yield _hub_case(group, f"{what}: long error header", pattern,
                        partial(send, status=403, headers=message), (word,))  # fmt: skip
        for status, wait in ((429, "1000000000"), (503, "1000000000"), (429, "9" * 400),
                             (429, "-5"), (429, "soon"), (429, "Fri, 31 Dec 9999 23:59:59 GMT"),
                             (429, "nan"), (429, "1e9"), (429, "inf")):  # fmt: skip
            yield _hub_case(group, f"{what}: {status}, Retry-After {wait[:30]}", pattern,
                            partial(send, status=status, headers={"Retry-After": wait}),
                            (word,))  # fmt: skip
        limit = {"ratelimit": '"api";r=0;t=1000000000'}
        yield _hub_case(group, f"{what}: 429, rate limit for 30 years", pattern,
                        partial(send, status=429, headers=limit), (word,))  # fmt: skip


def _files() -> Iterator[Case]:
    """Answers to the request for a file."""
    for file in ("config.json", BIG):
        place = rf"/{file}$" if file == "config.json" else rf"^/store/.*/{file}$"
        length = len(repository()[file])
        answers: dict[str, Answer] = {
            "1 GB": partial(endless, start=b"", chunk=CHUNK, length=10**9),
            "endless": partial(endless, start=b"", chunk=CHUNK),
            "gzip bomb": gzip_bomb,
            "1 GB, length right": partial(endless, start=b"", chunk=CHUNK, length=length),
            "empty": partial(send, body=b""),
            "empty gzip": partial(send, body=b"", headers={"Content-Encoding": "gzip"}),
            "short, chunked": partial(chunked, chunks=[b"ab"]),
            "wrong bytes": partial(send, body=bytes(length)),
            "HTML": partial(send, body=b"<html>Sign in</html>"),
            "dripping": partial(drip, data=bytes(length)),
            "dripping headers": dripping_headers,
            "endless headers": endless_headers,
            "100 Continue for ever": continue_for_ever,
            "never answers": lambda _: time.sleep(1000),
            "closes at once": lambda _: None,
            "not HTTP": not_http,
            "broken gzip": partial(send, body=bytes(length), headers={"Content-Encoding": "gzip"}),
            "206 of another range": partial(
                send, status=206, body=bytes(5), headers={"Content-Range": "bytes 7-11/12"}
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
