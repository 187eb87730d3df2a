"""Serve a folder on localhost: on the asked port or, if that is taken, on a free one. Prints the address."""

import argparse
import functools
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Quiet(SimpleHTTPRequestHandler):
    """A static file handler that keeps silent about every request."""

    extensions_map = {
        **SimpleHTTPRequestHandler.extensions_map,
        ".js": "text/javascript",
        ".wasm": "application/wasm",
    }

    def log_message(self, format: str, *args: object) -> None:
        pass


class LocalServer(ThreadingHTTPServer):
    allow_reuse_address = False
    daemon_threads = True


def make_server(folder: Path, port: int = 0) -> LocalServer:
    """A server of `folder` bound to localhost; its address is `server.server_address`."""
    handler = functools.partial(Quiet, directory=str(folder))
    try:
        return LocalServer(("127.0.0.1", port), handler)
    except OSError:
        return LocalServer(("127.0.0.1", 0), handler)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    with make_server(options.folder, options.port) as server:
        host, port = server.server_address[:2]
        print(f"\nThe book is at http://{host}:{port}/  (Ctrl-C stops serving)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


if __name__ == "__main__":
    main()
