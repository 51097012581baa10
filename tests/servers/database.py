"""A database that never answers: `database.py PORT`.

It prints `ready` once it listens, and `asked` at each query.
"""

import socket
import sys

server = socket.create_server(("127.0.0.1", int(sys.argv[1])), backlog=128)
print("ready", flush=True)
connections = []
while True:
    connection, _ = server.accept()
    connection.recv(100)
    connections.append(connection)
    print("asked", flush=True)
