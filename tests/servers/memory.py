"""A client that takes all the memory it gets: `memory.py PORT`. It says `ready` once it is connected to the port, and takes
memory from the first line of its standard input on.
"""

import socket
import sys

connection = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
print("ready", flush=True)
sys.stdin.readline()
taken = []
while True:
    taken.append(bytearray(b"x" * (1 << 20)))
