"""A crawler that forgets to close a response whose status is not 200: `crawler.py`.

It prints `ready`, then requests each URL of its input and prints the status.
"""

import http.client
import sys
from urllib.parse import urlsplit

forgotten = []
print("ready", flush=True)
for url in sys.stdin:
    parts = urlsplit(url.strip())
    connection = http.client.HTTPConnection(parts.netloc)
    connection.request("GET", parts.path)
    response = connection.getresponse()
    if response.status == 200:
        response.read()
        connection.close()
    else:
        # Something still refers to it, such as a list of errors.
        forgotten.append((connection, response))
    print(response.status, flush=True)
