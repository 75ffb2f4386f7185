"""Reading of ranges of S3 objects through signed URLs.

For each request, botocore resolves the endpoint, signs the headers and parses the response, which
takes 0.7 ms of CPU time. A signed URL is made once per object, and fsspec's client for web servers
reads its ranges, in 0.1 ms per request.
"""

import functools
import time
import urllib.request
from collections.abc import Sequence

import fsspec

USE_SECONDS = 600  # a URL is used for this time; botocore renews credentials as early as this
VALID_SECONDS = 3600  # validity of a URL
MAX_URLS = 1024  # number of URLs that are remembered
PAUSE_SECONDS = 600  # URLs are not used for this time if none of the requests of a call succeeds
CONNECT_SECONDS, READ_SECONDS = 10, 20  # time limits of connecting, and of waiting for data

_paused_until = 0.0  # `time.monotonic`


def read_ranges(
    fs: fsspec.AbstractFileSystem, path: str, ranges: Sequence[tuple[int, int]], max_requests: int
) -> list[bytes | None]:
    """Read ranges `(start, stop)` of an object, with concurrent requests.

    Args:
        fs: The S3 client, which signs the URL.
        path: Path of the object in `fs`.
        ranges: The ranges.
        max_requests: Maximum number of concurrent requests.

    Returns:
        The data of each range; None if its request failed or was not sent.
    """
    global _paused_until
    if time.monotonic() < _paused_until or _has_proxy():
        return [None] * len(ranges)
    urls = [_sign(fs, path, int(time.monotonic() / USE_SECONDS))] * len(ranges)
    starts, stops = map(list, zip(*ranges, strict=True))
    answers = _client().cat_ranges(urls, starts, stops, on_error="return", batch_size=max_requests)
    parts = [
        answer if isinstance(answer, bytes) and len(answer) == stop - start else None
        for (start, stop), answer in zip(ranges, answers, strict=True)
    ]
    if not any(parts):  # e.g. the endpoint has a certificate that only the S3 client knows
        _paused_until = time.monotonic() + PAUSE_SECONDS
    return parts


@functools.lru_cache(MAX_URLS)
def _sign(fs: fsspec.AbstractFileSystem, path: str, _period: int) -> str:
    """Return the URL of an object, a new one in each period."""
    return fs.sign(path, expiration=VALID_SECONDS)


def _client() -> fsspec.AbstractFileSystem:
    """Return the client for web servers, which fsspec makes once per process."""
    import aiohttp  # a requirement of s3fs

    limits = aiohttp.ClientTimeout(sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS)
    # Without `encoded`, characters of the URL would be escaped in another way.
    return fsspec.filesystem("https", encoded=True, client_kwargs={"timeout": limits})


@functools.cache
def _has_proxy() -> bool:
    """Return whether the environment names a proxy, which only the S3 client uses.

    aiohttp would search the environment in another thread for every request.
    """
    return bool(urllib.request.getproxies())
