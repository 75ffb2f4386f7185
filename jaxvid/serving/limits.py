"""Limits that protect the server, and its settings."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of a request, of a decoder process and of the server.

    Attributes:
        upload_bytes: Maximum size of a video.
        upload_seconds: Maximum duration of an upload.
        upload_rate: Minimum average rate of an upload in bytes per second, after `stall_seconds`.
        stall_seconds: Maximum time between two chunks of an upload.
        header_seconds: Maximum time from the connection, or from the previous response, to the end
            of the headers of a request.
        decode_seconds: Maximum wall time of decoding a video.
        video_seconds: Maximum duration of a video.
        pixels: Maximum number of pixels of a frame.
        memory_bytes: Address space of a decoder process.
        decoded_bytes: Maximum size of the decoded clips of all requests. Further requests wait.
        queue_length: Number of requests that may wait for a decoder process.
        requests: Number of videos that are received or processed at the same time.
        connections: Number of open connections.
        views: Maximum number of views of a prediction.
        windows: Maximum number of windows of a timeline.
        timeline_bytes: Maximum size of the frames that overlapping windows of a timeline keep in
            memory.
        timelines_bytes: The same, of all timelines. Further timelines wait.
        deadline_seconds: Maximum time from the end of the upload to the response.
        stream_seconds: The same, for event streams and reports.
        drain_seconds: Time for a stopping server to complete the requests in progress.
    """

    upload_bytes: int = 500_000_000
    upload_seconds: float = 300.0
    upload_rate: float = 16_000.0
    stall_seconds: float = 10.0
    header_seconds: float = 10.0
    decode_seconds: float = 30.0
    video_seconds: float = 3600.0
    pixels: int = 36_000_000
    memory_bytes: int = 4_000_000_000
    decoded_bytes: int = 4_000_000_000
    queue_length: int = 64
    requests: int = 128
    connections: int = 512
    views: int = 64
    windows: int = 4000
    timeline_bytes: int = 1_000_000_000
    timelines_bytes: int = 2_000_000_000
    deadline_seconds: float = 60.0
    stream_seconds: float = 600.0
    drain_seconds: float = 25.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a server.

    Attributes:
        token: Secret that requests must contain; empty: none.
        public_hosts: Names in addition to `localhost` and IP addresses under which browsers may
            reach the server, in lower case and without port.
        allow_urls: Whether a request may contain the URL of a video.
        num_decoders: Number of decoder processes.
        max_batch: Maximum number of views per batch, a power of 2.
        measure_batches: Whether to use smaller batches than `max_batch` if they are faster when the
            server starts.
        max_wait: Maximum time in seconds that a view waits for its batch to fill.
        limits: Limits of requests.
    """

    token: str = ""
    public_hosts: tuple[str, ...] = ()
    allow_urls: bool = False
    num_decoders: int = 2
    max_batch: int = 8
    measure_batches: bool = False
    max_wait: float = 0.005
    limits: Limits = dataclasses.field(default_factory=Limits)

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Sizes of the batches for which networks are compiled: 1, 2, 4, … `max_batch`."""
        return tuple(2**i for i in range(self.max_batch.bit_length()))
