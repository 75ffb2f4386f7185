"""A server with any limits.

python -m tests.serving.limited_server MODEL LIMITS     LIMITS: JSON with fields of `Limits`
"""

import asyncio
import json
import sys

from jaxvid.serve import bind, describe_address
from jaxvid.serving.app import make_app
from jaxvid.serving.http_server import HttpServer
from jaxvid.serving.limits import Limits, Settings
from jaxvid.serving.model_loading import load_models


def main() -> None:
    """Print the URL, and serve until SIGTERM."""
    settings = Settings(limits=Limits(**json.loads(sys.argv[2])))
    server = HttpServer(make_app(load_models([sys.argv[1]], "float32"), settings), settings.limits)
    listener = bind("127.0.0.1", 0)
    url = describe_address("127.0.0.1", listener)
    asyncio.run(server.serve(listener, lambda: print(url, flush=True)))


if __name__ == "__main__":
    main()
