"""A server that receives logs and never answers: `log_server.py PORT SECONDS`.

It prints `ready` once it listens, and each line that it receives. It closes a connection on which it has
received nothing for SECONDS.
"""

import socketserver
import sys


class Handler(socketserver.StreamRequestHandler):
    timeout = float(sys.argv[2])

    def handle(self):
        try:
            for line in self.rfile:
                print(line.decode().strip(), flush=True)
        except TimeoutError:
            pass


class Server(socketserver.ThreadingTCPServer):
    request_queue_size = 128
    daemon_threads = True


server = Server(("127.0.0.1", int(sys.argv[1])), Handler)
print("ready", flush=True)
server.serve_forever()
