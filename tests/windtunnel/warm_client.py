"""Stands where the trainer's process would: `warm_client.py SOCKET SCRIPT ARGUMENTS...`; see warm.py."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys

connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1])
signal.signal(signal.SIGTERM, lambda *_: connection.send(b"T"))
request = json.dumps({"arguments": sys.argv[3:], "cwd": os.getcwd()}).encode()
socket.send_fds(connection, [request], [1, 2])
answer = connection.recv(16).decode()
status = int(answer) if answer else 1
if status < 0:
    os.kill(os.getpid(), -status)
sys.exit(status)
