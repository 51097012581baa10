"""An HTTP server: `app.py PORT SECONDS [DATABASE]`.

It ends connections on which nothing has been asked for SECONDS, and says `ready` once it listens. `/` takes a moment,
`/slow` is never answered, `/query` asks what listens at port DATABASE, and has no answer either if that has none.
"""

import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = float(sys.argv[2])
    # One write for an answer.
    wbufsize = -1

    def do_GET(self):
        if self.path == "/slow":
            threading.Event().wait()
        elif self.path == "/query":
            with socket.create_connection(("127.0.0.1", int(sys.argv[3]))) as database:
                database.sendall(b"query\n")
                if not database.recv(100):
                    raise OSError("the database has closed")
        else:
            # Long enough that requests at the same time need a connection each.
            time.sleep(0.2)
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"42")

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    request_queue_size = 128

    def handle_error(self, *_):
        pass


server = Server(("127.0.0.1", int(sys.argv[1])), Handler)
print("ready", flush=True)
server.serve_forever()
