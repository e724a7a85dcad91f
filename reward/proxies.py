"""A way through an HTTP proxy: a tunnel (CONNECT), for plain HTTP as for TLS, so that nothing else is different behind it."""

import os

import h11

from reward.addresses import Address, InvalidAddress, address
from reward.faults import ConnectError, ProtocolError
from reward.wire import Wire

HEADS = 64 * 2**10  # bytes of the proxy's answer


def proxy_address(url: str) -> Address:
    """Raises InvalidAddress for what is no `http://` address."""
    found = address(url)
    if found.scheme != "http":
        raise InvalidAddress("a proxy has an address like http://proxy:3128")
    return found


def proxy_of(variable: str | None) -> str | None:
    """The address in that environment variable, where a configuration names one. Raises InvalidAddress."""
    if variable is None:
        return None
    if not (url := os.environ.get(variable)):
        raise InvalidAddress(f"the address of the proxy is to be in ${variable}, which is not set")
    proxy_address(url)
    return url


def tunnel(wire: Wire, proxy: Address, to: Address, end: float) -> None:
    """Have the proxy on the other side of `wire` connect it with `to`. Raises ConnectError and LateAnswer."""
    place = f"[{to.host}]:{to.port}" if ":" in to.host else f"{to.host}:{to.port}"
    login = [("proxy-authorization", proxy.login)] if proxy.login else []
    spoken = h11.Connection(h11.CLIENT, HEADS)
    try:
        said = spoken.send(h11.Request(method="CONNECT", target=place, headers=[("host", place), *login]))
        wire.send((said or b"") + (spoken.send(h11.EndOfMessage()) or b""), end)
        while not isinstance(event := spoken.next_event(), h11.Response):
            if event is h11.NEED_DATA:
                if not (data := wire.receive(end)):
                    raise ConnectError("the proxy hung up")
                spoken.receive_data(data)
            elif not isinstance(event, h11.InformationalResponse):
                raise ConnectError("the proxy's answer ends before it begins")
    except (h11.ProtocolError, ProtocolError) as error:
        raise ConnectError(f"the proxy does not speak HTTP: {error}") from error
    if not 200 <= event.status_code < 300:
        raise ConnectError(f"the proxy answers HTTP {event.status_code}")
    if spoken.trailing_data[0]:
        raise ConnectError("the proxy says more than that it has connected")
