"""A WSGI application that takes longer than its server allows."""

import threading


def app(_environ, _start_response):
    threading.Event().wait()
