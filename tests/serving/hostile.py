"""Hostile requests, and a load of normal and hostile requests."""

import asyncio
import collections
import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import h11
import numpy as np

from benchmarks.http_load import Answer, make_request, read_answers
from jaxvid.serving.limits import Limits
from tests.serving.hostile_bodies import make_files, make_form, make_jpeg, make_mutant

CLOSED = 0  # status if the connection is closed without an answer
UNREADABLE = {200, 422}  # a damaged video may still be readable
FORM = "multipart/form-data; boundary=XX"
START = b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\n"  # of a request
TIMELINE = "/v1/timeline?window=0.2&stride=0.05"
# An answer must arrive this many seconds after the deadline of the server, on a loaded machine.
SLACK_SECONDS = 15.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attack:
    """A hostile request.

    Attributes:
        data: Bytes to send.
        statuses: Statuses that are allowed; `CLOSED` if no answer is needed.
        pause: Seconds between two chunks.
        leave: Seconds after which the client disconnects; None: it waits for the answer.
        seconds: Time within which the server must answer or close the connection.
        reads: Whether the client reads.
    """

    data: Iterable[bytes]
    statuses: set[int]
    pause: float = 0.0
    leave: float | None = None
    seconds: float
    reads: bool = True


class Attacks:
    """Makes hostile requests.

    Args:
        clips: Valid videos.
        limits: Limits of the server.
        folder: Folder for temporary files.

    Attributes:
        names: Kinds of requests.
        seconds: Deadline of requests that are complete.
    """

    def __init__(self, clips: Sequence[bytes], limits: Limits, folder: Path):
        self._clips, self._limits = clips, limits
        self._files = make_files(clips[0], folder)
        self.seconds = limits.deadline_seconds
        self._kinds: dict[str, Callable[[np.random.Generator], Attack]] = {
            "mutant": lambda rng: self._post(make_mutant(clips, rng), UNREADABLE),
            "mutant in a form": lambda rng: self._post(
                make_form({"video": make_mutant(clips, rng)}), UNREADABLE, Content_Type=FORM
            ),
            **{
                f"mutant: {path}": lambda rng, path=path: self._post(
                    make_mutant(clips, rng), UNREADABLE | {400}, path=path
                )
                for path in (TIMELINE, "/v1/features", "/v1/explain", "/v1/report")
            },
            **{f"pictures: {name}": lambda _, a=a: a for name, a in self._pictures().items()},
            **{
                f"file: {name}": lambda _, body=body: self._post(body, UNREADABLE)
                for name, body in self._files.items()
            },
            **{f"form: {name}": lambda _, a=a: a for name, a in self._forms().items()},
            **{f"request: {name}": lambda _, a=a: a for name, a in self._requests().items()},
            **{f"HTTP: {name}": lambda _, a=a: a for name, a in self._malformed().items()},
            # Their data are iterators, which can be used once.
            **{f"slow: {name}": lambda _, name=name: self._slow()[name] for name in self._slow()},
            "leave": self._leave,
            "truncated": lambda rng: self._cut(rng, leave=0.05),
            "endless": lambda _: self._endless(),
        }
        self.names = tuple(self._kinds)

    def make(self, name: str, rng: np.random.Generator) -> Attack:
        """Return a request of a kind of `names`."""
        return self._kinds[name](rng)

    def _post(
        self,
        body: bytes,
        statuses: set[int],
        path: str = "/v1/predict",
        method: str = "POST",
        **headers: str,
    ) -> Attack:
        """Return a request that is complete."""
        data = [make_request(path, body, method, **headers)]
        return Attack(data=data, statuses=statuses, seconds=self.seconds)

    def _raw(self, *data: bytes, statuses: Iterable[int] = (400, CLOSED)) -> Attack:
        """Return a request that is malformed, or that stops before its end."""
        seconds = max(self._limits.header_seconds, self._limits.stall_seconds)
        return Attack(data=data, statuses={*statuses}, seconds=seconds)

    def _forms(self) -> dict[str, Attack]:
        """Return forms that are malformed or have no video."""
        clip, kind = self._clips[0], {"Content_Type": FORM}
        many = {f"field {i}": b"x" for i in range(2000)}
        return {
            "no end": self._post(make_form({"video": clip}, end=b""), {400}, **kind),
            "other field": self._post(make_form({"file": clip}), {400}, **kind),
            "empty field": self._post(make_form({"video": b""}), {400}, **kind),
            "no field": self._post(make_form({}), {400}, **kind),
            "many fields": self._post(make_form(many), {400}, **kind),
            "long header": self._post(
                make_form({"video": clip}, extra=f"X: {'x' * 50_000}\r\n"), {200, 400}, **kind
            ),
            "file name": self._post(
                make_form({'video; filename="../../x\0\n': clip}), {400}, **kind
            ),
            "no boundary": self._post(clip, {400}, Content_Type="multipart/form-data"),
            "other boundary": self._post(
                make_form({"video": clip}), {400}, Content_Type="multipart/form-data; boundary=Y"
            ),
            "long boundary": self._post(clip, {400}, Content_Type=f"{FORM}{'X' * 5000}"),
            "noise": self._post(self._files["noise"], {400}, **kind),
        }

    def _pictures(self) -> dict[str, Attack]:
        """Return forms with pictures of a webcam that cannot be decoded."""

        def post(*pictures: bytes) -> Attack:
            form = b"".join(make_form({"video": picture}, end=b"") for picture in pictures)
            return self._post(form + b"--XX--\r\n", {400, 422}, "/v1/frames", Content_Type=FORM)

        small = make_jpeg(16, 16)
        return {
            "video": post(self._clips[0]),
            "noise": post(small, self._files["noise"]),
            "large": post(make_jpeg(16, 65_500)),
            "sizes": post(small, make_jpeg(32, 32)),
            "truncated": post(small[: len(small) // 2]),
            "many": post(*[small] * 1000),
        }

    def _requests(self) -> dict[str, Attack]:
        """Return well-formed requests that the API must refuse."""
        clip, json_type = self._clips[0], {"Content_Type": "application/json"}
        queries = ("top_k=-1", "views=99999", "model=../..", "top_k=5&top_k=6", "x=1", "views=%00")
        return {
            **{q: self._post(clip, {400}, path=f"/v1/predict?{q}") for q in queries},
            "window": self._post(clip, {400}, path="/v1/timeline?window=nan&stride=1"),
            "many windows": self._post(clip, {200, 400}, path="/v1/timeline?window=1&stride=1e-9"),
            "empty": self._post(b"", {400}),
            "type": self._post(clip, {415}, Content_Type="text/html"),
            "picture": self._post(clip, {415}, Content_Type="image/png"),
            "deep JSON": self._post(b"[" * 5000, {400}, **json_type),
            "JSON": self._post(b"{}", {400}, **json_type),
            "URL": self._post(b'{"url": "http://127.0.0.1/"}', {400, 403}, **json_type),
            "large JSON": self._post(bytes(10**6), {413, CLOSED}, **json_type),
            "path": self._post(clip, {404}, path="/v1/../../etc/passwd"),
            "method": self._post(clip, {405}, method="DELETE"),
            "host": self._post(clip, {421}, Host="evil.example"),
            "other site": self._post(clip, {403}, Origin="https://evil.example"),
            "upgrade": self._post(clip, {200, 400}, Connection="upgrade", Upgrade="websocket"),
            "expect": self._post(clip, {200, 417}, Expect="nonsense"),
        }

    def _malformed(self) -> dict[str, Attack]:
        """Return requests that are not HTTP, or that declare a wrong size."""
        chunked = START + b"Transfer-Encoding: chunked\r\n\r\n"
        valid = make_request("/v1/predict", self._clips[0])
        return {
            "noise": self._raw(self._files["noise"]),
            "TLS": self._raw(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500)),
            "HTTP/0.9": self._raw(b"GET /\r\n\r\n"),
            "no host": self._raw(b"GET /healthz HTTP/1.1\r\n\r\n"),
            "two hosts": self._raw(b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: x\r\n\r\n"),
            "control character": self._raw(b"GET /\0 HTTP/1.1\r\nHost: localhost\r\n\r\n"),
            "long header": self._raw(START + b"X: " + b"x" * 10**6, statuses=(400, 431, CLOSED)),
            "many headers": self._raw(START + b"X: y\r\n" * 20_000, statuses=(400, 431, CLOSED)),
            "2 GB": self._raw(START + b"Content-Length: 2000000000\r\n\r\n", statuses=(413,)),
            "negative size": self._raw(START + b"Content-Length: -1\r\n\r\n"),
            "two sizes": self._raw(START + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n"),
            "size and chunks": self._raw(
                START + b"Content-Length: 9\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
            ),
            "chunk size": self._raw(chunked + b"xyz\r\n"),
            "long chunk size": self._raw(chunked + b"1" * 10_000, statuses=(400, 408, CLOSED)),
            "pipelined noise": self._raw(valid + self._files["noise"], statuses=(200, 429)),
            "pipelined requests": self._raw(valid * 20, statuses=(200, 429)),
        }

    def _slow(self) -> dict[str, Attack]:
        """Return requests that are sent in small pieces, or not to the end."""
        limits = self._limits
        body = START + b"Content-Length: 1000\r\n\r\n"

        def trickle(head: bytes) -> Iterable[bytes]:
            return itertools.chain([head], itertools.repeat(b"x"))

        common = {"pause": limits.stall_seconds / 5}
        return {
            "no data": self._raw(b"", statuses=(CLOSED,)),
            "headers": Attack(
                data=trickle(START + b"X: "),
                statuses={400, 408, CLOSED},
                seconds=limits.header_seconds,
                **common,
            ),
            "body": Attack(
                data=trickle(body), statuses={408, CLOSED}, seconds=limits.upload_seconds, **common
            ),
            "no body": self._raw(body + b"x", statuses=(408,)),
            "no reading": Attack(
                data=[make_request(TIMELINE, self._clips[0]) * 50],
                statuses={CLOSED},
                reads=False,
                leave=0.5,
                seconds=self.seconds,
            ),
        }

    def _leave(self, rng: np.random.Generator) -> Attack:
        """Return a request whose client disconnects while it is processed."""
        path = TIMELINE if rng.random() < 0.5 else "/v1/predict"
        data = [make_request(path, self._clips[rng.integers(len(self._clips))])]
        leave = float(rng.uniform(0, 0.1))
        return Attack(data=data, statuses={CLOSED, 200}, leave=leave, seconds=self.seconds)

    def _cut(self, rng: np.random.Generator, leave: float) -> Attack:
        """Return a request whose client disconnects before the end of the body."""
        [data] = self._post(self._clips[rng.integers(len(self._clips))], set()).data
        data = data[: rng.integers(1, len(data))]
        return Attack(data=[data], statuses={CLOSED}, leave=leave, seconds=self.seconds)

    def _endless(self) -> Attack:
        """Return a request whose body has no end."""
        chunk = b"10000\r\n" + bytes(2**16) + b"\r\n"
        data = itertools.chain(
            [START + b"Transfer-Encoding: chunked\r\n\r\n"], itertools.repeat(chunk)
        )
        return Attack(data=data, statuses={413, CLOSED}, seconds=self._limits.upload_seconds)


async def attack_server(port: int, attack: Attack) -> Answer:
    """Send a hostile request; return the first answer.

    Raises:
        TimeoutError: The server has neither answered nor closed the connection in time.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)

    async def send() -> None:
        for chunk in attack.data:
            writer.write(chunk)
            await writer.drain()
            await asyncio.sleep(attack.pause)

    sender = asyncio.create_task(send())
    try:
        async with asyncio.timeout(attack.leave or attack.seconds + SLACK_SECONDS):
            if not attack.reads:
                await asyncio.sleep(attack.leave)
            async for answer in read_answers(reader):
                return answer
    except TimeoutError:
        if attack.leave is None:
            raise
    except (OSError, h11.RemoteProtocolError):
        pass  # closed
    finally:
        sender.cancel()
        await asyncio.gather(sender, return_exceptions=True)
        writer.transport.abort()
    return Answer(CLOSED)


@dataclasses.dataclass
class Report:
    """Results of a load.

    Attributes:
        counts: Number of answers by kind of request and status.
        failures: Descriptions of answers that are wrong, missing or late.
        slowest: Kind and seconds of the slowest request.
    """

    counts: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    failures: list[str] = dataclasses.field(default_factory=list)
    slowest: tuple[float, str] = (0.0, "")


async def run_load(
    port: int,
    attacks: Attacks,
    clips: Sequence[bytes],
    *,
    num_requests: int,
    every: int,
    num_clients: int,
    seed: int = 0,
) -> Report:
    """Send predictions, and check that hostile requests do not affect them.

    Args:
        port: Port of the server on 127.0.0.1.
        attacks: Makes the hostile requests; all kinds in turn.
        clips: Valid videos.
        num_requests: Number of requests.
        every: Every `every`-th request is hostile.
        num_clients: Number of requests that are sent at the same time.
        seed: Seed of the damage.
    """
    report, rng, expected = Report(), np.random.default_rng(seed), {}
    kinds, numbers = itertools.cycle(attacks.names), iter(range(num_requests))

    async def classify(i: int) -> str:
        request = make_request("/v1/predict", clips[i % len(clips)])
        attack = Attack(data=[request], statuses={200}, seconds=attacks.seconds)
        answer = await attack_server(port, attack)
        report.counts["normal", answer.status] += 1
        if answer.status != 200:
            return f"status {answer.status}: {answer.body[:200]!r}"
        top = {e["label"]: e["probability"] for e in json.loads(answer.body)["top"]}
        first = expected.setdefault(i % len(clips), top)
        # The batch in which a clip is computed may change the last digits.
        is_same = [*top] == [*first] and np.allclose([*top.values()], [*first.values()], atol=1e-5)
        return "" if is_same else f"{top} instead of {first}"

    async def attack(kind: str) -> str:
        made = attacks.make(kind, rng)
        answer = await attack_server(port, made)
        report.counts[kind, answer.status] += 1
        return describe_problem(answer, made)

    async def run_client() -> None:
        for i in numbers:
            is_hostile, start = i % every == every - 1, time.monotonic()
            kind = next(kinds) if is_hostile else "normal"
            try:
                problem = await (attack(kind) if is_hostile else classify(i))
            except TimeoutError:
                problem = "no answer within the deadline"
            report.slowest = max(report.slowest, (time.monotonic() - start, kind))
            if problem:
                report.failures.append(f"request {i}, {kind}: {problem}")

    async with asyncio.TaskGroup() as group:
        for _ in range(num_clients):
            group.create_task(run_client())
    return report


def describe_problem(answer: Answer, attack: Attack) -> str:
    """Return what is wrong with the answer to a hostile request, or an empty string."""
    shown = f"status {answer.status}, {answer.body[:300]!r}"
    if answer.status not in attack.statuses:
        return f"{shown}; expected {attack.statuses}"
    if answer.status >= 400 and "json" in answer.headers.get("content-type", ""):
        error = json.loads(answer.body)["error"]
        message = error["message"]
        leaks = [word for word in ("/proc", "/tmp", "Traceback", "\n", "\0") if word in message]
        if error["status"] != answer.status or not message or leaks:
            return f"{shown} is not an error of the API"
    return ""
