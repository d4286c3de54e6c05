"""A Hub on loopback that keeps what is pushed: the few requests that huggingface_hub makes for `upload_folder`. As its
documentation says, it heeds a .gitignore that is pushed along."""

import base64
import fnmatch
import http.server
import json
import threading


class Hub:
    def __init__(self):
        self.files: dict[str, bytes] = {}  # path in the repository -> contents
        self.created: list[dict] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.answer({"name": "me", "type": "user", "orgs": [], "auth": {}})

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if "/preupload/" in self.path:
                    self.answer({"files": outer.preupload(json.loads(body))})
                elif "/commit/" in self.path:
                    for line in map(json.loads, body.splitlines()):
                        if line["key"] == "file":
                            outer.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                    url = f"{outer.url}/me/model"
                    self.answer({"success": True, "commitOid": "0" * 40, "commitUrl": f"{url}/commit/{'0' * 40}"})
                elif self.path == "/api/repos/create":
                    outer.created.append(json.loads(body))
                    self.answer({"url": f"{outer.url}/me/model", "name": "me/model", "id": "me/model"})
                else:
                    self.answer({})

            def answer(self, content: dict):
                data = json.dumps(content).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *arguments):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def preupload(self, asked: dict) -> list[dict]:
        ignored = [f"{line}*" if line.endswith("/") else line for line in asked.get("gitIgnore", "").split()]
        return [
            {
                "path": file["path"],
                "uploadMode": "regular",
                "shouldIgnore": any(fnmatch.fnmatch(file["path"], pattern) for pattern in ignored),
            }
            for file in asked["files"]
        ]
