"""No test reaches another machine: whatever asks for one is refused, and remembered."""

import socket
import sys

OUTSIDE = []  # what the test that runs now wanted of other machines


def _refuse_outside(event, arguments):
    """Let nothing leave this machine; a name under .invalid belongs to nobody, so that asking for it does no harm."""
    if event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = arguments[0]
    elif event in ("socket.connect", "socket.sendto") and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    is_here = not isinstance(host, str) or host in ("", "localhost", "::1", "::", "0.0.0.0", socket.gethostname())
    if not is_here and not host.startswith("127.") and not host.endswith(".invalid"):
        OUTSIDE.append(host)
        raise ConnectionRefusedError(f"a test asked for {host}; tests stay on this machine")


sys.addaudithook(_refuse_outside)  # forked processes have it, too
