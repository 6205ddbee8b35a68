"""A host outside: answers HTTP on port 8080 and any DNS question on port 53 with 192.0.2.1."""

import http.server
import socket
import threading


def answer_names():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("0.0.0.0", 53))
        while True:
            query, asker = server.recvfrom(512)
            record = b"\xc0\x0c\x00\x01\x00\x01\x00\x00\x00\x05\x00\x04\xc0\x00\x02\x01"
            server.sendto(
                query[:2] + b"\x81\x80" + query[4:6] + b"\x00\x01\x00\x00\x00\x00" + query[12:] + record, asker
            )


threading.Thread(target=answer_names, daemon=True).start()
http.server.ThreadingHTTPServer(("", 8080), http.server.SimpleHTTPRequestHandler).serve_forever()
