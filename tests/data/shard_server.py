"""A real HTTP server on loopback that serves a folder, with faults that a test asks for."""

import socket
import struct
import threading
import time
from collections import Counter
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class ShardServer:
    """url; requests: Counter of paths. faults: name -> list of faults, one for each request, the last for all that follow.

    A fault is None, an HTTP status, ("cut", n): the body ends after n bytes; ("reset", n): with a reset; ("flip", n): a bit
    of byte n; ("stall", n): silence after n bytes, until `released` is set; ("drip", n): after n bytes one every 20 ms.
    """

    def __init__(self, folder):
        self.folder, self.requests, self.faults, self.delay = folder, Counter(), {}, 0.0
        self.released, self._lock = threading.Event(), threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                with suppress(BrokenPipeError, ConnectionResetError):
                    outer._answer(self)

            def log_message(self, *args):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def _fault(self, name):
        with self._lock:
            self.requests[name] += 1
            faults = self.faults.get(name.rpartition("/")[2], [None])
            return faults.pop(0) if len(faults) > 1 else faults[0]

    def _answer(self, handler):
        name = handler.path.lstrip("/")
        fault = self._fault(name)
        time.sleep(self.delay)
        path = self.folder / name
        if isinstance(fault, int) or not path.is_file():
            handler.send_error(fault or 404)
            return
        data = bytearray(path.read_bytes())
        kind, place = fault or ("whole", len(data))
        if kind == "flip":
            data[place] ^= 4
            place = len(data)
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data[:place])
        handler.wfile.flush()
        if kind == "reset":
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.connection.close()
        elif kind == "stall":
            self.released.wait(60)
        elif kind == "drip":
            for byte in data[place:]:
                if self.released.wait(0.02):
                    return
                handler.wfile.write(bytes([byte]))
                handler.wfile.flush()


@contextmanager
def serving(folder):
    server = ShardServer(folder)
    thread = threading.Thread(target=server.server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.server.shutdown()
        server.server.server_close()
        thread.join()
