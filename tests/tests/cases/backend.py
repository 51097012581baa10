"""An HTTP server that closes connections without a request for SECONDS: `backend.py PORT SECONDS`.

It says `ready` once it listens. `/slow` is never answered, and it says `asked` when somebody asks for it.
"""

import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # The server class closes a connection after this idle time.
    timeout = float(sys.argv[2])
    # One write per response.
    wbufsize = -1

    def do_GET(self):
        if self.path == "/slow":
            print("asked", flush=True)
            threading.Event().wait()
        elif self.path == "/broken":
            # This class answers every error like this, and then closes.
            self.send_error(500)
        else:
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"42")

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_):
        pass


server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
print("ready", flush=True)
server.serve_forever()
