"""
A hub on localhost: serves folders by the protocol of the Hugging Face hub, for tests and for
machines without a network.

    python experiments/hub.py ROOT [PORT]       ROOT/me/model/*, ROOT/datasets/me/name/*
    HF_ENDPOINT=http://127.0.0.1:8000 python train.py ... --init_from=me/model

It knows what huggingface_hub and datasets ask for: a repository's files, their list, and ranges of
bytes. There is one branch and one commit, and no rights.
"""
import http.server
import json
import os
import re
import sys
from functools import partial
from pathlib import Path

COMMIT = '0' * 40

class Hub(http.server.BaseHTTPRequestHandler):
    def __init__(self, root, downloads, *args):
        self.root, self.downloads = Path(root), downloads
        super().__init__(*args)

    def look_up(self, path):
        """The body of the answer, or None."""
        name, what, place = re.fullmatch(
            '/(?:api/)?(?:models/)?((?:datasets/)?[^/]+/[^/]+)'
            '(?:/(revision|tree|resolve)/[^/]+/?(.*))?', path).groups()
        folder = self.root / name
        below = {str(p.relative_to(folder)): p for p in sorted(folder.rglob('*'))}
        if what == 'resolve':
            self.downloads.append(path)
            return below[place].read_bytes() if place in below else None
        files = {name: p for name, p in below.items() if p.is_file()}
        if what == 'tree':
            page = [{'type': 'file' if name in files else 'directory', 'path': name, 'oid': name,
                     'size': p.stat().st_size} for name, p in below.items()]
        else:
            page = {'id': name, 'sha': COMMIT, 'siblings': [{'rfilename': f} for f in files]}
        return json.dumps(page).encode() if files else None

    def do_GET(self):
        body = self.look_up(self.path.partition('?')[0])
        status, body = (404, b'') if body is None else (200, body)
        headers = {'ETag': f'"{hash(body)}"', 'X-Repo-Commit': COMMIT,
                   'X-Error-Code': 'EntryNotFound'}         # is read with a 404 only
        part = re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range', ''))
        if part and body:
            first, last = int(part[1]), min(int(part[2] or len(body)), len(body) - 1)
            headers['Content-Range'] = f'bytes {first}-{last}/{len(body)}'
            status, body = 206, body[first:last + 1]
        self.send_response(status)
        for name, value in (headers | {'Content-Length': str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == 'GET':
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *args):
        pass

def serve(root, port=0):
    """-> (a server, on a free port if 0; the list of the paths of files that it was asked for)."""
    downloads = []
    address = ('127.0.0.1', port)
    return http.server.ThreadingHTTPServer(address, partial(Hub, root, downloads)), downloads

if __name__ == '__main__':
    server, _ = serve(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 8000)
    print(f"serving {os.path.abspath(sys.argv[1])}: HF_ENDPOINT=http://127.0.0.1:{server.server_port}")
    server.serve_forever()
