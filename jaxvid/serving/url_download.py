"""Download of a video that a request names, from public addresses only."""

import asyncio
import contextlib
import ipaddress
import socket
import ssl
from collections.abc import AsyncIterator
from typing import BinaryIO
from urllib.parse import SplitResult, quote, urljoin, urlsplit

import h11

from jaxvid.errors import one_line, short_repr
from jaxvid.serving.errors import RequestError
from jaxvid.serving.limits import Limits

MAX_REDIRECTS = 5
REDIRECTS = (301, 302, 303, 307, 308)
CHUNK_BYTES = 65536
# NAT64: IPv6 addresses that contain an IPv4 address, which a gateway may reach.
NAT64 = tuple(map(ipaddress.ip_network, ("64:ff9b::/96", "64:ff9b:1::/48")))


async def download(url: str, file: BinaryIO, limits: Limits) -> int:
    """Download a file over HTTP or HTTPS; return its size in bytes.

    The IP addresses of each host, also of redirects, are checked. The connection is made to a
    checked address, so that DNS rebinding has no effect. Proxies in environment variables are not
    used.

    Args:
        url: The URL.
        file: File that is written.
        limits: Maximum size and times.

    Raises:
        RequestError: The URL is not allowed, or the file cannot be downloaded.
    """
    try:
        async with asyncio.timeout(limits.upload_seconds):
            for _ in range(MAX_REDIRECTS + 1):
                async with _Response.open(url, limits) as response:
                    if response.status not in REDIRECTS:
                        return await response.save(file)
                    url = response.redirect()
        raise _failure(url, f"more than {MAX_REDIRECTS} redirects")
    except TimeoutError:
        raise _failure(url, f"it takes longer than {limits.upload_seconds:g} s") from None
    except (OSError, h11.RemoteProtocolError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise _failure(url, reason or one_line(error)) from None


def parse(url: str) -> SplitResult:
    """Return the parts of a URL.

    Raises:
        RequestError: It is not an http or https URL, or contains a password.
    """
    try:
        parts = urlsplit(quote(url, safe="%/:=&?~#+!$,;'@()*[]"))
        is_valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        is_valid = False
    if not is_valid:
        raise RequestError(400, f"url={short_repr(url)}: must be an http or https URL")
    if parts.username is not None:
        raise RequestError(400, "url: must not contain a user name or password")
    return parts


async def find_addresses(parts: SplitResult) -> list[str]:
    """Return the IP addresses of a URL's host.

    Raises:
        RequestError: The host name is unknown, or one of its addresses is not public.
    """
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            parts.hostname, port_of(parts), type=socket.SOCK_STREAM
        )
    except (OSError, UnicodeError):
        raise _failure(parts.geturl(), "the name of the host is unknown") from None
    addresses = list(dict.fromkeys(address[0] for *_, address in found))
    if not all(map(is_public, addresses)):
        raise RequestError(400, f"url={short_repr(parts.geturl())}: has no public IP address")
    return addresses


def is_public(text: str) -> bool:
    """Return whether an IP address belongs to the public internet.

    Private, loopback, link-local, multicast and reserved addresses do not, nor do IPv6 addresses
    that contain an IPv4 address.
    """
    address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped or address.sixtofour or address.teredo:
            return False
        if any(address in network for network in NAT64):
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved


def port_of(parts: SplitResult) -> int:
    """Return the port of a URL."""
    return parts.port or (443 if parts.scheme == "https" else 80)


def _failure(url: str, reason: str) -> RequestError:
    return RequestError(
        422, f"url={short_repr(url)}: cannot be downloaded ({reason}); send the file itself"
    )


class _Response:
    """An HTTP response whose headers have arrived.

    Attributes:
        status: Its status.
    """

    def __init__(self, url: str, limits: Limits, reader: asyncio.StreamReader):
        self._url, self._limits, self._reader = url, limits, reader
        self._connection = h11.Connection(h11.CLIENT)
        self.status, self._headers = 0, {}

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, url: str, limits: Limits) -> AsyncIterator["_Response"]:
        """Send a request and receive the headers.

        Raises:
            RequestError: The URL is not allowed.
            OSError: The connection fails.
            h11.RemoteProtocolError: The response is not HTTP.
        """
        parts = parse(url)
        [address, *_] = await find_addresses(parts)
        context = ssl.create_default_context() if parts.scheme == "https" else None
        name = parts.hostname if context else None
        async with asyncio.timeout(limits.stall_seconds):
            reader, writer = await asyncio.open_connection(
                address, port_of(parts), ssl=context, server_hostname=name
            )
        try:
            response = cls(url, limits, reader)
            await response._request(parts, writer)
            yield response
        finally:
            writer.close()
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(1):
                    await writer.wait_closed()

    async def _request(self, parts: SplitResult, writer: asyncio.StreamWriter) -> None:
        """Send the request and receive the headers of the response."""
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        headers = [("Host", parts.netloc), ("User-Agent", "jaxvid"), ("Connection", "close")]
        request = h11.Request(method="GET", target=target, headers=headers)
        writer.write(self._connection.send(request) + self._connection.send(h11.EndOfMessage()))
        await writer.drain()
        event = await self._next_event()
        while isinstance(event, h11.InformationalResponse):
            event = await self._next_event()
        if not isinstance(event, h11.Response):
            raise h11.RemoteProtocolError("no response")
        self.status = event.status_code
        self._headers = {name.decode(): value.decode("latin-1") for name, value in event.headers}

    async def _next_event(self) -> object:
        """Return the next part of the response."""
        while (event := self._connection.next_event()) is h11.NEED_DATA:
            async with asyncio.timeout(self._limits.stall_seconds):
                self._connection.receive_data(await self._reader.read(CHUNK_BYTES))
        return event

    def redirect(self) -> str:
        """Return the URL to which a redirect leads."""
        return urljoin(self._url, self._headers.get("location", ""))

    async def save(self, file: BinaryIO) -> int:
        """Write the body to a file; return its size.

        Raises:
            RequestError: It is not a video, or is too large.
        """
        if self.status != 200:
            raise _failure(self._url, f"HTTP {self.status}")
        if self._headers.get("content-type", "").startswith("text/html"):
            raise _failure(self._url, "it is a web page")
        size, limit = 0, self._limits.upload_bytes
        while isinstance(event := await self._next_event(), h11.Data):
            size += len(event.data)
            if size > limit:
                raise _failure(self._url, f"it is larger than {limit / 1e6:g} MB")
            file.write(event.data)
        if not size:
            raise _failure(self._url, "it is empty")
        return size
