"""A small S3 server for benchmarks: it serves the files of a folder, read-only.

python -m benchmarks.object_server FOLDER [SECONDS]

It implements the requests that s3fs needs to list and read: ListObjectsV2, HEAD and GET with one
range. It responds after at least SECONDS, does not check credentials, and uses little CPU
time, because the kernel copies the files to the sockets. It prints its address and ends when its
standard input is closed.
"""

import asyncio
import email.utils
import re
import sys
import urllib.parse
from pathlib import Path
from xml.sax.saxutils import escape

BUCKET = "bucket"
RANGE = re.compile(r"bytes=(\d+)-(\d*)")


def list_objects(folder: Path, query: dict[str, str]) -> bytes:
    """Return the response to ListObjectsV2, with all objects in one page."""
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    contents, prefixes = [], set()
    for path in sorted(folder.rglob("*")):
        key = str(path.relative_to(folder))
        if not path.is_file() or not key.startswith(prefix):
            continue
        first, separator, _ = key[len(prefix) :].partition(delimiter or "\0")
        if separator:
            prefixes.add(f"{prefix}{first}{delimiter}")
            continue
        status = path.stat()
        contents.append(
            f"<Contents><Key>{escape(key)}</Key><Size>{status.st_size}</Size>"
            f"<ETag>&quot;{status.st_mtime_ns:x}&quot;</ETag>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            "<StorageClass>STANDARD</StorageClass></Contents>"
        )
    folders = (f"<CommonPrefixes><Prefix>{escape(p)}</Prefix></CommonPrefixes>" for p in prefixes)
    text = (
        '<?xml version="1.0" encoding="UTF-8"?>'
        '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"<Name>{BUCKET}</Name><Prefix>{escape(prefix)}</Prefix><IsTruncated>false</IsTruncated>"
        f"<KeyCount>{len(contents) + len(prefixes)}</KeyCount><MaxKeys>1000</MaxKeys>"
        f"{''.join(contents)}{''.join(sorted(folders))}</ListBucketResult>"
    )
    return text.encode()


async def answer(request: str, writer: asyncio.StreamWriter, folder: Path, latency: float) -> None:
    """Answer one request, given as its lines without the empty one at the end."""
    first, *lines = request.split("\r\n")
    method, target, _ = first.split(" ")
    headers = {name.lower(): value.strip() for name, _, value in (s.partition(":") for s in lines)}
    url = urllib.parse.urlsplit(target)
    key = urllib.parse.unquote(url.path).removeprefix(f"/{BUCKET}").strip("/")
    await asyncio.sleep(latency)
    path, start, body = folder / key, 0, b""
    fields = {"Content-Type": "binary/octet-stream", "Accept-Ranges": "bytes"}
    if not key:
        body = list_objects(folder, dict(urllib.parse.parse_qsl(url.query)))
        status, length = "200 OK", len(body)
    elif not path.is_file():
        status, length = "404 Not Found", 0
    else:
        size, modified = path.stat().st_size, path.stat().st_mtime_ns
        status, stop = "200 OK", size
        if match := RANGE.fullmatch(headers.get("range", "")):
            start, stop = int(match[1]), min(int(match[2] or size - 1) + 1, size)
            status = "206 Partial Content"
            fields["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        length = stop - start
        fields["ETag"] = f'"{modified:x}"'
        fields["Last-Modified"] = email.utils.formatdate(modified / 1e9, usegmt=True)
    fields["Content-Length"] = str(length)
    text = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    writer.write(f"HTTP/1.1 {status}\r\n{text}\r\n".encode() + body)
    await writer.drain()
    if method == "GET" and key and length:
        with path.open("rb") as file:
            loop = asyncio.get_running_loop()
            await loop.sendfile(writer.transport, file, start, length)


async def serve(folder: Path, latency: float) -> None:
    """Print the address, and serve a folder until standard input is closed."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                data = await reader.readuntil(b"\r\n\r\n")
                request = data.decode("latin-1").removesuffix("\r\n\r\n")
                await answer(request, writer, folder, latency)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 0.0))
