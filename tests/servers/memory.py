"""A client that allocates all memory that it can get: `memory.py PORT`.

It prints `ready` once it is connected to the port, and allocates memory after the first line of its standard
input.
"""

import socket
import sys

connection = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
print("ready", flush=True)
sys.stdin.readline()
taken = []
while True:
    taken.append(bytearray(b"x" * (1 << 20)))
