"""A server on loopback that answers an LLM judge what it is told to, and remembers what it was asked."""

import http.server
import json
import threading


def completion(text):
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    return (
        200,
        {},
        {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": "m",
            "choices": [choice],
            "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
        },
    )


def keep(*numbers):
    return completion(json.dumps({"verdicts": [{"candidate": n, "reason": "", "relevant": "yes"} for n in numbers]}))


class Server:
    """Answers the n-th request with the n-th of `script` (the last for all later ones); records what was asked."""

    def __init__(self):
        self.script, self.requests, self.lock = [keep()], [], threading.Lock()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.requests.append((body, {name.lower(): value for name, value in self.headers.items()}))
                    answer = outer.script[min(len(outer.requests), len(outer.script)) - 1]
                status, headers, content = answer(body) if callable(answer) else answer
                data = json.dumps(content).encode() if not isinstance(content, bytes) else content
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(headers.get("Length", len(data))))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *arguments):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
