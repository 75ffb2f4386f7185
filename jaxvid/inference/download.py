"""Download of a video into a file, with limits of size and time."""

import http.client
import string
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import BinaryIO

from jaxvid.data.formats.video_reader import DecodeError
from jaxvid.errors import one_line

STALL_SECONDS = 30.0  # longest wait for the connection, and for the next bytes
MAX_SECONDS = 1800.0  # of a whole download
CHUNK_BYTES = 2**20


def download(url: str, file: BinaryIO, max_bytes: int) -> None:
    """Download a file over HTTP or HTTPS. Proxies are those of the environment variables.

    Args:
        url: The address.
        file: File that is written.
        max_bytes: Maximum size.

    Raises:
        DecodeError: The file cannot be downloaded completely, is too large or is a web page.
    """
    # Characters outside ASCII, and spaces, are not valid in a request.
    address = urllib.parse.quote(url, safe=string.punctuation)
    try:
        request = urllib.request.Request(address, headers={"User-Agent": "jaxvid"})
        with urllib.request.urlopen(request, timeout=STALL_SECONDS) as response:
            if response.headers.get_content_type() == "text/html":
                raise _error(url, "it is a web page", "use the address of the video file itself")
            _copy(url, response, file, max_bytes)
    except urllib.error.HTTPError as error:
        with error:
            reason = f"HTTP {error.code} {error.reason}".strip()
        raise _error(url, reason, "check the address in a browser") from None
    except http.client.IncompleteRead:
        raise _error(url, "the connection was closed early", "try again") from None
    # Some of `http.client`'s errors are neither an OSError nor a ValueError.
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, DecodeError):
            raise
        cause = getattr(error, "reason", error)  # of a URLError
        reason = getattr(cause, "strerror", None) or one_line(cause)
        if isinstance(cause, TimeoutError):
            reason = f"no data for {STALL_SECONDS:g} s"
        raise _error(url, reason, "check the address and the network") from None


def _copy(url: str, response: http.client.HTTPResponse, file: BinaryIO, max_bytes: int) -> None:
    """Copy a response to a file.

    Raises:
        DecodeError: A limit is exceeded, or the response is incomplete.
    """
    deadline, size = time.monotonic() + MAX_SECONDS, 0
    size_error = f"it is larger than {max_bytes / 1e9:.1f} GB"
    remedy = "download it with another program and pass the file"
    if (response.length or 0) > max_bytes:
        raise _error(url, size_error, remedy)
    while chunk := response.read1(CHUNK_BYTES):
        size += len(chunk)
        if size > max_bytes:
            raise _error(url, size_error, remedy)
        if time.monotonic() > deadline:
            raise _error(url, f"it takes longer than {MAX_SECONDS:g} s", remedy)
        file.write(chunk)
    if response.length:  # number of bytes that are missing
        total = size + response.length
        raise _error(url, f"the connection was closed after {size} of {total} bytes", "try again")


def _error(url: str, reason: str, remedy: str) -> DecodeError:
    return DecodeError(f"{url}: cannot be downloaded ({reason}); {remedy}")
