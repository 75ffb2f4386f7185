"""A minimal server without protection: a lower bound of the cost of `jaxvid serve`.

    python benchmarks/minimal_server.py runs/motion/model

It has no limits, checks and metrics. A `ProcessPoolExecutor` decodes the videos. The functions that
decode and classify are those of `jaxvid serve`. `benchmarks/serve.py` compares the two servers.
"""

import argparse
import asyncio
import contextlib
import math
import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from jaxvid.data.clips.clip import ClipSpec
from jaxvid.serving import decoder_tasks
from jaxvid.serving.batcher import NetworkThread
from jaxvid.serving.limits import Limits, Settings
from jaxvid.serving.model_loading import load_models


def decode(body: bytes, spec: ClipSpec) -> np.ndarray:
    """Return the evaluation views of a video `(v, t, h, w, c)`."""
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        file.write(body)
        file.flush()
        video = decoder_tasks.UploadedVideo(file.name, Limits(), 30.0)
        return decoder_tasks.views(video, spec)["video"]


def make_app(model: str, settings: Settings) -> Starlette:
    """Return the application.

    Args:
        model: Model folder.
        settings: Sizes of batches.
    """
    [served] = load_models([model], "auto")
    thread = NetworkThread()
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(os.cpu_count(), mp_context=spawn)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette):
        await served.start(settings, thread, lambda *_: None, lambda: math.inf)
        yield
        pool.shutdown()

    async def predict(request: Request) -> JSONResponse:
        body, loop = await request.body(), asyncio.get_running_loop()
        views = await loop.run_in_executor(pool, decode, body, served.spec)
        return JSONResponse({"top": served.top(await served.probabilities(views), 5)})

    async def is_ready(_: Request) -> JSONResponse:
        return JSONResponse({"status": "ready"})

    routes = [Route("/v1/predict", predict, methods=["POST"]), Route("/readyz", is_ready)]
    return Starlette(routes=routes, lifespan=lifespan)


def main() -> None:
    """Serve on any free port, and print the address."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="model folder")
    parser.add_argument("--max_batch", type=int, help="views per batch; None: measured, up to 8")
    args = parser.parse_args()
    settings = Settings(max_batch=args.max_batch or 8, measure_batches=args.max_batch is None)
    app = make_app(args.model, settings)
    config = uvicorn.Config(app, port=0, log_level="warning", access_log=False)
    listener = config.bind_socket()
    print(f"http://127.0.0.1:{listener.getsockname()[1]}/", flush=True)
    uvicorn.Server(config).run([listener])


if __name__ == "__main__":
    main()
