"""A vLLM server as far as the client asks it, with answers that are made up; vllm_server_cases.py runs a real one."""

import contextlib
import random
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx


class FakeVLLM:
    """Answers requests. `away` are answers, or errors, that come before its own; `forgets` is how often it restarts
    empty before it answers a completion."""

    def __init__(self, max_model_len: int = 100):
        self.max_model_len, self.forgets = max_model_len, 0
        self.away, self.loaded, self.version = [], set(), "default"
        self.posted: list[tuple[str, dict]] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if self.away:
            answer = self.away.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer
        path = request.url.path
        body = httpx.Response(200, content=request.content).json() if request.content else {}
        self.posted.append((path, body))
        match path:
            case "/v1/models":
                models = [{"id": "base", "max_model_len": self.max_model_len, "parent": None}]
                return httpx.Response(200, json={"data": models})
            case "/server_info":
                return httpx.Response(200, json={"vllm_config": {"device_config": {"device": "cuda"}}})
            case "/weight_info":
                return httpx.Response(200, json={"weight_version": self.version})
            case "/update_weight_version":
                self.version = body["new_version"]
            case "/v1/load_lora_adapter" if body:
                self.loaded.add(body["lora_name"])
            case "/v1/unload_lora_adapter":
                self.loaded.discard(body["lora_name"])
            case "/v1/completions":
                return self.completed(body)
        return httpx.Response(200, json={})

    def completed(self, body: dict) -> httpx.Response:
        if self.forgets:
            self.forgets -= 1
            self.loaded, self.version = set(), "default"
        if body["model"] not in self.loaded | {"base"}:
            return httpx.Response(404, json={"error": {"message": "no such model"}})
        ids, logprobs = self.answer(body)
        top = [{f"token_id:{token}": logprob} for token, logprob in zip(ids, logprobs, strict=True)]
        choice = {"token_ids": ids, "prompt_token_ids": body["prompt"], "logprobs": {"top_logprobs": top}}
        return httpx.Response(200, json={"choices": [choice]})

    def answer(self, body: dict) -> tuple[list[int], list[float]]:
        """Token ids, and the log-probability of each."""
        return [7, 0], [-0.5, -9999.0]

    def paths(self) -> list[str]:
        return [path for path, _ in self.posted]


class Drawn(FakeVLLM):
    """Answers that follow from the seed alone, as likely as those of a model of random weights."""

    def answer(self, body):
        return random.Random(body["seed"]).choices(range(10, 290), k=4), [-5.7] * 4

    def asked(self) -> list[list[tuple]]:
        """(adapter, prompt, seed) of each completion, by the adapter that was loaded last."""
        steps = []
        for path, body in self.posted:
            if path == "/v1/load_lora_adapter" and body:
                steps.append([])
            elif path == "/v1/completions":
                steps[-1].append((body["model"], tuple(body["prompt"]), body["seed"]))
        return steps


@contextlib.contextmanager
def served(fake: FakeVLLM):
    """Yields the address, up to /v1, at which it answers other processes."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            answer = fake(httpx.Request(self.command, f"http://fake{self.path}", content=content))
            self.send_response(answer.status_code)
            self.send_header("Content-Length", str(len(answer.content)))
            self.end_headers()
            self.wfile.write(answer.content)

        do_GET = do_POST

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
