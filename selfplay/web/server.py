"""The HTTP server of API and page: uvicorn in a thread of its own, on a socket that is bound before it starts."""

from __future__ import annotations

import gc
import ipaddress
import socket
import threading
import time

import uvicorn
from fastapi import FastAPI

from reward.serving import descriptors
from reward.serving.connections import Bounds, Connections
from reward.serving.protocol import configure
from selfplay.config import ServiceConfig
from selfplay.errors import ConfigError, SelfplayError

LINGER = 3  # seconds that open requests get when the server stops
LARGEST_MESSAGE = 1 << 20  # bytes of a WebSocket message
BODIES = 16 << 20  # bytes of all bodies of requests that are on their way


class Server(uvicorn.Server):
    """A server that `serve_in_thread` started."""

    thread: threading.Thread

    def stop(self) -> None:
        """Take no more requests, end the open ones, and wait until the thread has ended. May be called twice."""
        self.config.app.state.stopping.set()  # type: ignore[union-attr]
        self.should_exit = True
        self.thread.join(LINGER + 5)


def serve_in_thread(app: FastAPI, service: ServiceConfig) -> tuple[Server, int]:
    """Serve `app` (of `api.create_app`) in the background; returns once it answers, with the port (0 takes a free one).

    Raises ConfigError where the address cannot be had.
    """
    host, port = service.host, service.port
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listening = socket.create_server(address[:2], family=family)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"service.host and service.port: {host}:{port} cannot be listened on: {error}",
            "end what uses the port, or take another one (service.port)",
        ) from None
    places, backlog = descriptors.share(service.connections, descriptors.raise_limit())
    proxies = [ipaddress.ip_network(proxy) for proxy in service.proxies]
    server = Server(
        configure(
            app,
            Connections(Bounds(connections=places, body_bytes=BODIES, proxies=proxies)),
            backlog,
            server_header=False,
            lifespan="on",
            timeout_graceful_shutdown=LINGER,
            ws_max_size=LARGEST_MESSAGE,
            proxy_headers=bool(proxies),
            forwarded_allow_ips=service.proxies,
        )
    )
    server.thread = threading.Thread(target=server.run, args=([listening],), name="http", daemon=True)
    server.thread.start()
    while not server.started:
        if not server.thread.is_alive():
            raise SelfplayError("the HTTP server did not start", "its log says why")
        time.sleep(0.01)
    gc.collect()
    gc.freeze()  # the imports made half a million objects: to look through them took 100 ms out of an answer
    return server, int(listening.getsockname()[1])
