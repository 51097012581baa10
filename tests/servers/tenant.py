"""The program of a container: `tenant.py`. It prints `ready`.

After the first line of its standard input, it resets a connection, leaks one, and has a child that allocates
all memory that it can get. It prints what the tool has to report: `reset PORT`, `leak PORT FD`,
`victim PID PORT`; then `done`, and waits for another line.
"""

import os
import socket
import struct
import sys

listener = socket.socket()
listener.bind(("127.0.0.1", 0))
listener.listen()


def connected():
    client = socket.create_connection(listener.getsockname())
    return client, listener.accept()[0]


def say(*words):
    print(*words, flush=True)


def wait():
    sys.stdin.readline()


def reset():
    client, server = connected()
    say("reset", client.getsockname()[1])
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    server.close()


def leak():
    client, server = connected()
    server.close()
    client.recv(1)
    say("leak", client.getsockname()[1], client.fileno())
    return client


def victim():
    go, told = os.pipe()
    child = os.fork()
    if child == 0:
        client = socket.create_connection(listener.getsockname())
        os.write(told, str(client.getsockname()[1]).encode())
        taken = []
        while True:
            taken.append(bytearray(b"x" * (1 << 20)))
    server = listener.accept()[0]
    say("victim", child, os.read(go, 16).decode())
    os.waitpid(child, 0)
    server.close()


say("ready")
wait()
reset()
leaked = leak()
victim()
say("done")
wait()
