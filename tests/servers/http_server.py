"""An HTTP server: `http_server.py PORT SECONDS [DATABASE [ADDRESS]]`.

It prints `ready` once it listens at ADDRESS, and closes connections that have had no request for SECONDS. The
path of a request decides how it is answered:

- `/` at once; a POST without a body.
- `/busy` after a fifth of a second, so that requests at the same time need a connection each.
- `/slow` never; the server prints `asked`.
- `/memory` never; the server takes all the memory it gets.
- `/broken` with status 500, `/missing` with 404, a POST to `/full` with 507 before its body is read;
  then the connection is closed.
- `/chat` by changing to the protocol WebSocket, in which nothing is said.
- `/query` when the server at the port DATABASE has answered; if that closes instead, so does this one.
"""

import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # The server class closes a connection after this idle time.
    timeout = float(sys.argv[2])
    # One write per response.
    wbufsize = -1

    def do_GET(self):
        if self.path == "/chat":
            self.send_response(101)
            self.send_header("Upgrade", "websocket")
            self.send_header("Connection", "Upgrade")
            self.end_headers()
            self.wfile.flush()
            self.connection.settimeout(None)
            self.connection.recv(1)
            self.close_connection = True
            return
        if self.path == "/slow":
            print("asked", flush=True)
            threading.Event().wait()
        elif self.path == "/memory":
            taken = []
            while True:
                taken.append(bytearray(b"x" * (1 << 20)))
        elif self.path == "/broken":
            # This class closes the connection after it has sent an error.
            self.send_error(500)
            return
        elif self.path == "/missing":
            self.send_error(404)
            return
        elif self.path == "/query":
            with socket.create_connection(("127.0.0.1", int(sys.argv[3]))) as database:
                database.sendall(b"query\n")
                if not database.recv(100):
                    raise OSError("the database has closed the connection")
        elif self.path == "/busy":
            time.sleep(0.2)
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"42")

    def do_POST(self):
        if self.path == "/full":
            # The body arrives meanwhile.
            time.sleep(0.2)
            self.send_error(507)
            return
        self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/":
            self.send_response(204)
            self.end_headers()
        else:
            self.do_GET()

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    request_queue_size = 128

    def handle_error(self, *_):
        pass


address = sys.argv[4] if len(sys.argv) > 4 else "127.0.0.1"
server = Server((address, int(sys.argv[1])), Handler)
print("ready", flush=True)
server.serve_forever()
