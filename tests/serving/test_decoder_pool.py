"""A video that crashes or exhausts its decoder process costs one request and nothing else."""

import asyncio
import json
import os
import signal
import sys
import tempfile
import time

import numpy as np
import pytest

from jaxvid.data.clips.clip import ClipSpec, load_eval_views
from jaxvid.data.formats.video_reader import DecodeError, VideoFile
from jaxvid.errors import InputError
from jaxvid.inference.sliding_windows import plan_windows, read_frames
from jaxvid.serving import decoder_tasks
from jaxvid.serving.decoder_pool import DecoderPool
from jaxvid.serving.decoder_process import HEADER
from jaxvid.serving.errors import DecodeTimeoutError, OverloadedError, RequestError
from jaxvid.serving.limits import Limits
from tests.data.test_pipeline import is_running
from tests.data.test_video_reader import write_video
from tests.serving import tasks
from tests.serving.processes import MARK, decoder_processes

SPEC = ClipSpec(num_frames=4, crop=24, short_side=32, num_clips=2, num_crops=3)
LIMITS = Limits(decode_seconds=20.0, memory_bytes=2_000_000_000, queue_length=1)


@pytest.fixture(autouse=True)
def _mark(monkeypatch):
    """Mark the decoder processes of this process in their environment."""
    monkeypatch.setenv(MARK, f"<{os.getpid()}>")


def run(test, *, limits=LIMITS, num_processes=1):
    """Run an async function on a pool, and check that it leaves no process and no descriptor."""
    descriptors = len(os.listdir("/proc/self/fd"))

    async def with_pool():
        pool = DecoderPool(num_processes, limits)
        try:
            await pool.start()
            return await test(pool)
        finally:
            await pool.close()

    result = asyncio.run(with_pool())
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert not running_decoders()
    return result


def running_decoders() -> set[int]:
    """Return the ids of the decoder processes of this process that have not ended."""
    return decoder_processes(os.environ[MARK])


async def collect(pool, task, *arguments, video=b"contents", **options):
    """Return all messages of a task."""
    with tempfile.TemporaryFile() as file:
        file.write(video)
        file.flush()
        return [message async for message in pool.run(task, file.fileno(), *arguments, **options)]


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """Return the path of a video of two seconds."""
    path = tmp_path_factory.mktemp("video") / "video.mp4"
    return write_video(path, options={"bf": "3", "g": "12"})


def test_results_are_those_of_the_functions_in_this_process(video):
    async def test(pool):
        data = video.read_bytes()
        [views] = await collect(pool, decoder_tasks.views, SPEC, video=data)
        options = {"align": True, "chunk": 7}
        windows = await collect(pool, decoder_tasks.windows, SPEC, 0.5, 0.2, **options, video=data)
        return views, windows

    views, [plan, *chunks] = run(test)
    check_equal(views, load_eval_views(video, SPEC))
    with VideoFile(video) as reader:
        expected_plan = plan_windows(reader, SPEC, 0.5, 0.2, align=True, name="video")
        check_equal(plan, vars(expected_plan))
        frames = list(read_frames(reader, np.unique(expected_plan.indices), SPEC, 7))
    assert len(chunks) == len(frames) > 1
    for chunk, (numbers, crops) in zip(chunks, frames, strict=True):
        check_equal(chunk, {"numbers": numbers, "crops": crops})


def check_equal(message, expected):
    """Check that a message has the same values, shapes and dtypes."""
    assert {*message} == {*expected}
    for name, value in expected.items():
        np.testing.assert_array_equal(message[name], value, strict=True)


def test_a_process_has_limits_and_does_not_import_jax():
    async def test(pool):
        [before] = await collect(pool, tasks.report)
        [after] = await collect(pool, tasks.report, seconds=100)
        return before, after

    before, after = run(test)
    assert not {"jax", "torch", "tensorflow", "starlette"} & {*before["modules"]}
    assert before["threads"] == 1
    assert before["limits"]["AS"] == [LIMITS.memory_bytes] * 2
    assert before["limits"]["FSIZE"] == before["limits"]["CORE"] == [0, 0]
    assert before["limits"]["NOFILE"][0] < 100
    assert 20 < before["limits"]["CPU"][0] < 40
    assert 100 < after["limits"]["CPU"][0] < 120
    assert after["pid"] == before["pid"]
    assert after["open_files"] == before["open_files"]


def test_a_process_does_not_inherit_secrets(monkeypatch):
    for name in ("JAXVID_TOKEN", "AWS_SECRET_ACCESS_KEY", "HTTPS_PROXY", "HOME"):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("TZ", "UTC")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")

    async def test(pool):
        [report] = await collect(pool, tasks.report)
        return report["environment"]

    environment = run(test)
    assert "secret" not in environment.values()
    assert environment["TZ"] == "UTC"
    assert environment["OMP_NUM_THREADS"] == "1"


def test_bad_videos_and_arguments_raise_the_errors_of_the_task(video):
    async def test(pool):
        with pytest.raises(DecodeError, match="^video: cannot be decoded"):
            await collect(pool, decoder_tasks.views, SPEC)
        data = video.read_bytes()
        options = {"align": False, "chunk": 4}
        with pytest.raises(RequestError, match="window=0: must be") as error:
            await collect(pool, decoder_tasks.windows, SPEC, 0, 1, **options, video=data)
        assert error.value.status == 400
        with pytest.raises(RequestError, match="stride=-1: must be"):
            await collect(pool, decoder_tasks.windows, SPEC, 1, -1, **options, video=data)
        with pytest.raises(RuntimeError, match="KeyError: 'a defect'"):
            await collect(pool, tasks.fail)
        assert await collect(pool, tasks.read) == [{"text": "contents"}]
        assert pool.num_lost == 0

    run(test)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"video_seconds": 1.0}, r"lasts 2 s, more than the limit of 1 s"),
        ({"pixels": 64 * 48 - 1}, r"the frame size 64×48 is too large"),
        ({"decode_seconds": 1e-6}, r"decoding takes longer than 1e-06 s"),
        ({"windows": 3}, r"stride=0.1: gives more than 3 windows"),
        ({"timeline_bytes": 4000}, r"window=0.5: the frames that windows share need more than"),
    ],
)
def test_limits_of_a_video(video, changed, message):
    limits = Limits(**changed)

    async def test(pool):
        options = {"align": False, "chunk": 4, "video": video.read_bytes()}
        with pytest.raises((DecodeError, RequestError), match=message):
            await collect(pool, decoder_tasks.windows, SPEC, 0.5, 0.1, **options)

    run(test, limits=limits)


def test_messages_carry_arrays_and_json_values():
    values = [
        {"nested": [1, 2.5, None, "ü\n", True]},
        np.arange(6, dtype=np.int16).reshape(2, 3)[:, ::2],
        np.zeros((0, 3), np.float32),
        np.float64(0.1),
        np.random.default_rng(0).bytes(3_000_000).hex(),
        np.random.default_rng(0).integers(0, 255, (3, 1000, 1000), np.uint8),
    ]

    async def test(pool):
        return await collect(pool, tasks.echo, *values, name="option")

    *messages, options = run(test)
    assert options == {"name": "option"}
    for message, value in zip(messages, values, strict=True):
        np.testing.assert_array_equal(message["value"], value, strict=isinstance(value, np.ndarray))


@pytest.mark.parametrize(
    ("task", "arguments", "error", "message"),
    [
        (tasks.abort, (), DecodeError, "the decoder process ended unexpectedly"),
        (tasks.abort, (3,), DecodeError, "the decoder process ended unexpectedly"),
        (tasks.allocate, (3_000_000_000,), DecodeError, "needs more than 2 GB of memory"),
        (tasks.hang, (), DecodeTimeoutError, "decoding takes longer than 0.1 s"),
        (tasks.spin, (), DecodeTimeoutError, "decoding takes longer than 0.1 s"),
        (tasks.yield_forever, (), DecodeTimeoutError, "decoding takes longer than 0.1 s"),
        (tasks.forge, (bytes(16),), DecodeError, "ended unexpectedly"),
        (tasks.forge, (b"\xff" * 16,), DecodeError, "ended unexpectedly"),
    ],
)
def test_a_lost_process_costs_one_task(monkeypatch, task, arguments, error, message):
    monkeypatch.setattr("jaxvid.serving.decoder_pool.GRACE_SECONDS", 0.1)

    async def test(pool):
        [before] = await collect(pool, tasks.report)
        with pytest.raises(error, match=message):
            await collect(pool, task, *arguments, seconds=0.1)
        [after] = await collect(pool, tasks.report)
        assert after["pid"] != before["pid"]
        assert pool.num_lost == 1

    run(test)


def forged(document, data=b""):
    """Return the bytes of a message with any document."""
    text = json.dumps(document).encode()
    return HEADER.pack(len(text), len(data)) + text + data


@pytest.mark.parametrize(
    "document",
    [
        [],
        {"kind": "message", "values": {}},
        {"kind": "message", "values": [1], "arrays": []},
        {"kind": "message", "values": {}, "arrays": [["x", "|O", [1]]]},
        {"kind": "message", "values": {}, "arrays": [["x", "<f8", [-1]]]},
        {"kind": "message", "values": {}, "arrays": [["x", "<f8", [10**12]]]},
        {"kind": "message", "values": {}, "arrays": [["x", "<f8", ["y"]]]},
        {"kind": "message", "values": {}, "arrays": [["x", "no dtype", [1]]]},
        {"kind": "decode_error", "values": {}, "arrays": []},
        {"kind": "other", "values": {}, "arrays": []},
    ],
)
def test_a_process_cannot_deceive_the_server(document):
    async def test(pool):
        with pytest.raises(DecodeError, match="ended unexpectedly"):
            await collect(pool, tasks.forge, forged(document))
        assert await collect(pool, tasks.read) == [{"text": "contents"}]

    run(test)


def test_a_process_cannot_write_files(tmp_path):
    async def test(pool):
        with pytest.raises(RuntimeError, match="File too large"):
            await collect(pool, tasks.write, str(tmp_path / "file"))

    run(test)
    assert (tmp_path / "file").stat().st_size == 0


def test_a_process_that_dies_while_idle_is_replaced():
    async def test(pool):
        [before] = await collect(pool, tasks.report)
        os.kill(before["pid"], signal.SIGKILL)
        while is_running(before["pid"]):
            await asyncio.sleep(0.01)
        [after] = await collect(pool, tasks.report)
        assert after["pid"] != before["pid"]
        [template] = running_decoders() - {after["pid"]}
        os.kill(template, signal.SIGKILL)  # the next worker needs another template
        os.kill(after["pid"], signal.SIGKILL)
        while is_running(template) or is_running(after["pid"]):
            await asyncio.sleep(0.01)
        assert await collect(pool, tasks.read) == [{"text": "contents"}]

    run(test)


def test_processes_that_cannot_start_are_reported(monkeypatch):
    monkeypatch.setattr("jaxvid.serving.decoder_worker.PROCESS", "jaxvid.serving.missing")

    async def test(pool):
        raise AssertionError("the pool has started")

    with pytest.raises(InputError, match="decoder processes cannot be started"):
        run(test)


@pytest.mark.parametrize("how", ["cancel", "close"])
def test_a_client_that_leaves_frees_its_process(how):
    async def test(pool):
        messages = pool.run(tasks.hang, 0)
        message = await anext(messages)
        if how == "cancel":
            waiting = asyncio.create_task(anext(messages))
            await asyncio.sleep(0.01)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
        else:
            await messages.aclose()
        assert await collect(pool, tasks.read) == [{"text": "contents"}]
        while message["pid"] in running_decoders():
            await asyncio.sleep(0.01)

    run(test)


def test_a_full_queue_is_refused():
    async def test(pool):
        messages = pool.run(tasks.hang, 0)
        await anext(messages)
        waiting = asyncio.create_task(collect(pool, tasks.read))
        while not pool.num_waiting:
            await asyncio.sleep(0)
        with pytest.raises(OverloadedError) as error:
            await collect(pool, tasks.read)
        assert int(error.value.headers["Retry-After"]) >= 1
        waiting.cancel()  # its place in the queue is free again
        with pytest.raises(asyncio.CancelledError):
            await waiting
        waiting = asyncio.create_task(collect(pool, tasks.read))
        await asyncio.sleep(0)
        await messages.aclose()
        assert await waiting == [{"text": "contents"}]

    run(test)


def test_long_tasks_leave_a_process_to_others():
    async def test(pool):
        messages = pool.run(tasks.hang, 0, seconds=100)
        await anext(messages)
        waiting = asyncio.create_task(collect(pool, tasks.read, seconds=100))
        while not pool.num_waiting:
            await asyncio.sleep(0)
        assert await collect(pool, tasks.read) == [{"text": "contents"}]
        assert not waiting.done()
        with pytest.raises(OverloadedError):
            await collect(pool, tasks.read, seconds=100)
        await messages.aclose()
        assert await waiting == [{"text": "contents"}]

    run(test, num_processes=2)


def test_tasks_run_in_parallel_on_their_own_videos():
    async def test(pool):
        contents = [f"video {i}".encode() for i in range(20)]
        results = await asyncio.gather(*(collect(pool, tasks.read, video=c) for c in contents))
        assert [result[0]["text"].encode() for result in results] == contents
        assert len(running_decoders()) == 3 + 1  # with the template

    run(test, limits=Limits(), num_processes=3)


def test_close_ends_a_running_task():
    async def test(pool):
        messages = pool.run(tasks.hang, 0)
        await anext(messages)
        waiting = asyncio.create_task(anext(messages))
        await asyncio.sleep(0.01)
        await pool.close()
        with pytest.raises(RuntimeError, match="pool is closed"):
            await waiting
        with pytest.raises(RuntimeError, match="pool is closed"):
            await collect(pool, tasks.read)

    run(test)


def test_processes_end_when_the_server_is_killed(tmp_path):
    script = (
        "import asyncio, time\n"
        "from jaxvid.serving.decoder_pool import DecoderPool\n"
        "from jaxvid.serving.limits import Limits\n"
        "async def main():\n"
        "    pool = DecoderPool(2, Limits())\n"
        "    await pool.start()\n"
        "    print('started', flush=True)\n"
        "    time.sleep(60)\n"
        "asyncio.run(main())\n"
    )

    async def test(pool):
        del pool
        before = running_decoders()
        pipe = asyncio.subprocess.PIPE
        server = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=pipe)
        await server.stdout.readline()
        started = running_decoders() - before
        assert len(started) == 3
        server.kill()
        await server.wait()
        deadline = time.monotonic() + 20
        while running_decoders() & started:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)

    run(test)
