"""A server that never closes its connections: `worker.py PORT leaks|blocks`.

It prints `ready` once it listens, and the descriptor of each connection as soon as it does nothing more with
it. With `leaks`, it reads a connection to the end and forgets to close it. With `blocks`, it waits for
something else, and does not read.
"""

import socket
import sys

port, habit = int(sys.argv[1]), sys.argv[2]
server = socket.create_server(("127.0.0.1", port))
print("ready", flush=True)
connections = []
while True:
    connection, _ = server.accept()
    connections.append(connection)
    if habit == "leaks":
        while connection.recv(1024):
            pass
    print(connection.fileno(), flush=True)
    if habit == "blocks":
        # Stands for anything that a worker may wait for: a lock, a slow disk, a query.
        sys.stdin.readline()
