"""Files in the inputs of a prediction: by URL or as data URLs, bounded.

Cog downloads a `Path` before it calls `predict`, however long it takes or is, and wherever it
leads. Text it leaves alone. So `predict` has the annotation `Path` in the source, from which `cog
build` makes the form, and the type of text at run time.
"""

import asyncio
from collections.abc import Mapping
from concurrent.futures import wait
from dataclasses import replace

from xgenmm import InputError
from xgenmm.preprocessing.data_url import decode_data_url
from xgenmm.preprocessing.fetch import FetchLimits, Kind, start_fetch

POLL_SECONDS = 0.3
"""How often a thread that waits can be interrupted: Cog raises CancelationException in it."""


def check_url(name: str, value: object) -> str:
    """Return the URL that an input holds.

    Raises InputError for anything else. Opening it would let a client read files of this machine.
    """
    url = str(value)
    if not url.startswith(("http://", "https://", "data:")):
        raise InputError(name, "must be an http:// or https:// address or a data URL")
    return url


async def read_urls(
    urls: Mapping[str, str], limits: FetchLimits, kind: Kind = "image"
) -> dict[str, bytes]:
    """Return the files that URLs refer to or contain, downloading all at the same time.

    Args:
        urls: by input name.
        limits: of all together.

    Raises InputError, naming the input, if a file cannot be had.
    """
    each = replace(limits, max_bytes=limits.max_bytes // max(1, len(urls)))
    downloads = {
        name: start_fetch(url, each, name, kind=kind)
        for name, url in urls.items()
        if not url.startswith("data:")
    }
    try:
        return {
            name: await asyncio.wrap_future(downloads[name])
            if name in downloads
            else await asyncio.to_thread(decode_data_url, url, name)
            for name, url in urls.items()
        }
    finally:
        for download in downloads.values():
            download.cancel()


def read_url(name: str, url: str, limits: FetchLimits, kind: Kind) -> bytes:
    """Return the file that a URL refers to or contains, in a thread that Cog may interrupt.

    Raises InputError, naming the input, if it cannot be had.
    """
    if url.startswith("data:"):
        return decode_data_url(url, name)
    download = start_fetch(url, limits, name, kind=kind)
    try:
        while not wait([download], POLL_SECONDS).done:
            pass
        return download.result()
    finally:
        download.cancel()
