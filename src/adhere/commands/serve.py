"""`adhere serve`: the reward over HTTP."""

from __future__ import annotations

import argparse
import math
import os
import signal
import socket
from importlib.util import find_spec
from pathlib import Path

from adhere.commands.common import (
    Command,
    check_models,
    given_heads,
    heads_argument,
    load_policy,
    model_arguments,
    reward_argument,
    reward_config,
    reward_name,
)
from adhere.commands.parser import Parser
from adhere.config import flags_given, load_config
from adhere.console import Console
from adhere.errors import UserError
from adhere.progress import silent
from adhere.serve.config import ServeConfig

TOKEN = "ADHERE_TOKEN"
LOOPBACK = ("127.0.0.1", "::1", "localhost")
NAMES = ("127.0.0.1", "[::1]", "localhost")
"""What requests call a server of this machine alone."""


def _arguments(parser: Parser) -> None:
    model_arguments(parser)
    reward_argument(parser)
    heads_argument(parser)
    parser.common.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this machine)"
    )
    parser.common.add_argument(
        "--port", type=int, default=8000, metavar="N", help="0 = any that is free (default: 8000)"
    )
    parser.add_options(ServeConfig)


def _serve(options: argparse.Namespace, console: Console) -> int:
    if any(find_spec(name) is None for name in ("fastapi", "uvicorn", "prometheus_client")):
        raise UserError("the server's packages are not installed", fix="pip install 'adhere[serve]'")
    config = load_config(ServeConfig, None, flags_given(options, ServeConfig))
    spec = reward_config(options.reward)
    check_models(options.model)

    from adhere.reward.reward import Reward

    listener = _listener(options.host, options.port)
    policy = load_policy(options, console.track)
    reward = Reward(spec, policy, given_heads(options))
    policy.progress = silent  # what requests ask for is not shown
    token = os.environ.get(TOKEN) or None
    if options.host not in LOOPBACK and token is None:
        console.warn(f"anyone who reaches {options.host} can use this server; set {TOKEN} to ask for a bearer token")
    import uvicorn

    from adhere.serve.app import create_app
    from adhere.serve.connections import bounded

    # A client learns what the model is called, not where it lies.
    called = Path(options.model).resolve().name if Path(options.model).is_dir() else options.model
    hosts = NAMES if options.host in LOOPBACK else None
    app = create_app(reward, called, reward_name(options.reward), config, token, hosts)
    # uvicorn raises what stopped it once more when it is done, and a server that was asked to stop did nothing wrong.
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            http=bounded(config.read_timeout, config.max_connections),
            timeout_graceful_shutdown=math.ceil(config.timeout),
        )
    )
    listener.listen()  # whoever reads the address below is let in at once
    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    console.note(f"serving {options.reward} of {options.model} at {url} (its API: {url}/docs)")
    console.result({"url": url, "model": called, "reward": options.reward})
    server.run(sockets=[listener])
    return 0


def _listener(host: str, port: int) -> socket.socket:
    """A bound socket: an address that is taken is told before the model is loaded."""
    if not 0 <= port <= 65535:  # the resolver would take it modulo 65536
        raise UserError(f"cannot listen at {host}:{port}: a port is 0 to 65535", fix="choose another --port")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise UserError(f"cannot listen at {host}:{port} ({error})", fix="choose another --host or --port") from error
    return listener


SERVE = Command("the reward over HTTP", "--model MODEL ", _arguments, _serve)
