"""Stands where a command would: `stand_in.py SOCKET JOURNAL CALL SCRIPT ARGUMENTS...`, see client.py.

The function CALL runs with SCRIPT's arguments in a fork of the server at SOCKET; this process passes SIGTERM on, and
ends as the fork ends. It imports nothing that takes time to import.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys

place, journal, call, _, *arguments = sys.argv[1:]
request = {"call": call, "arguments": {"arguments": arguments}, "journal": journal, "cwd": os.getcwd()}
body = json.dumps(request | {"environment": dict(os.environ)}).encode()
connection = socket.socket(socket.AF_UNIX)
connection.connect(place)
signal.signal(signal.SIGTERM, lambda *_: connection.send(bytes([signal.SIGTERM])))
socket.send_fds(connection, [len(body).to_bytes(8, "big")], [0, 1, 2])
connection.sendall(body)
with connection.makefile("rb") as answers:
    answers.readline()  # its process id
    answer = answers.readline()
status = json.loads(answer)["status"] if answer else 1
if status < 0:
    os.kill(os.getpid(), -status)
sys.exit(status)
