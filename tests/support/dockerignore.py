"""Which files Docker's builder takes, by the rules of .dockerignore.

A pattern that matches a file or one of its folders decides about the file, the last one that does
if there are several (https://docs.docker.com/build/concepts/context/#dockerignore-files).
"""

import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


class DockerIgnore:
    """The rules in the text of a .dockerignore file."""

    def __init__(self, text: str) -> None:
        self._rules: list[tuple[re.Pattern[str], bool]] = []
        for line in text.splitlines():
            pattern = line.strip()
            if not pattern or line.startswith("#"):
                continue
            exception = pattern.startswith("!")
            pattern = posixpath.normpath(pattern.removeprefix("!").strip()).lstrip("/")
            self._rules.append((re.compile(_expression(pattern)), exception))

    def excludes(self, path: str) -> bool:
        """Whether the file at this path, relative to the root, is left out."""
        file = PurePosixPath(path)
        names = [str(file), *map(str, file.parents[:-1])]
        excluded = False
        for rule, exception in self._rules:
            if any(rule.fullmatch(name) for name in names):
                excluded = not exception
        return excluded


def image_files(root: Path) -> Iterator[str]:
    """The paths below `root` of the files that its .dockerignore lets into an image."""
    ignore = DockerIgnore((root / ".dockerignore").read_text())
    for folder, _, names in os.walk(root):
        for name in names:
            path = (Path(folder) / name).relative_to(root).as_posix()
            if not ignore.excludes(path):
                yield path


def _expression(pattern: str) -> str:
    """The regular expression of a pattern, without the brackets of sets of characters."""
    parts = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    tokens = re.findall(r"\*\*/|\*\*|\*|\?|[^*?]+", pattern)
    return "".join(parts.get(token) or re.escape(token) for token in tokens)
