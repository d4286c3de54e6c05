"""A vLLM server as a client sees it: asked again while it is away, and what it says against a request in one line."""

import contextlib
import json
import logging
import os
import time
from functools import partial

import httpx

log = logging.getLogger("rmsd")

KEY = "VLLM_API_KEY"  # the environment variable that `vllm serve` itself reads its key from
REQUESTS = 64  # under way at once; the server has a queue of its own
_UP_SOON = (502, 503, 504)  # a proxy's, or the server's own while it starts


class VLLMServer:
    """The endpoints of a `vllm serve`.

    Args:
        url: of its OpenAI-compatible endpoint, up to /v1.
        seconds: that it may take for an answer, or to come back after it was away.
    """

    def __init__(self, url: str, seconds: float):
        self.url, self._seconds = url.rstrip("/"), seconds
        key = os.environ.get(KEY)
        self._client = httpx.Client(
            timeout=httpx.Timeout(seconds, connect=min(10.0, seconds)),
            limits=httpx.Limits(max_connections=REQUESTS),
            headers={"Authorization": f"Bearer {key}"} if key else {},
        )

    def __str__(self) -> str:
        return f"the vLLM server at {self.url}"

    def __call__(self, path: str, body: dict | None = None) -> httpx.Response:
        """Its answer to a POST of `body`, or to a GET; errors that are of the request are answers too.

        Raises:
            ConnectionError: in one line, it stays away for `seconds`, or takes longer to answer.
        """
        url = self._at(path)
        ask = partial(self._client.get, url) if body is None else partial(self._client.post, url, json=body)
        started, wait, told = time.monotonic(), 0.5, False
        while True:
            try:
                answer = ask()
                if answer.status_code not in _UP_SOON and not _has_died(answer):
                    return answer
                why = reason(answer)
            except httpx.HTTPError as error:
                why = str(error) or type(error).__name__
            if time.monotonic() - started + wait > self._seconds:
                raise ConnectionError(
                    f"{self} has not answered for {self._seconds:g} seconds ({why}): start it again, and go on with "
                    "resume=true; engine_seconds is how long it is waited for"
                )
            if not told:
                log.warning("%s is away (%s): waiting %g seconds for it at most", self, why, self._seconds)
                told = True
            time.sleep(wait)
            wait = min(2 * wait, 10.0)

    def tell(self, path: str, body: dict) -> None:
        """Posts what may be lost: a server that is away is not waited for."""
        with contextlib.suppress(httpx.HTTPError):
            self._client.post(self._at(path), json=body, timeout=5.0)

    def _at(self, path: str) -> str:
        return self.url + path.removeprefix("/v1") if path.startswith("/v1") else self.url.removesuffix("/v1") + path

    def base_model(self, max_length: int) -> str:
        """The name of the model that it was started with. It is not waited for: a run has not begun yet.

        Raises:
            ConnectionError, ValueError: nothing or another server answers, or it takes shorter sequences only.
        """
        try:
            answer = self._client.get(self.url + "/models")
            found = [model for model in answer.raise_for_status().json()["data"] if not model.get("parent")]
            name, longest = found[0]["id"], found[0]["max_model_len"]
        except httpx.HTTPStatusError as error:
            status = error.response.status_code
            hint = f": set the environment variable {KEY}" if status == 401 else ": does engine_url end in /v1?"
            raise ConnectionError(f"{self} refuses to list its models ({status}){hint}") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ConnectionError(
                f"no vLLM server answers at {self.url}: start one as docs/trainer.md says, or set engine_url"
            ) from error
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ConnectionError(f"{self.url} is no vLLM server's: does engine_url end in /v1?") from error
        if longest < max_length:
            raise ValueError(
                f"{self} takes sequences of {longest} tokens, and {max_length} are needed: start it with "
                f"--max-model-len {max_length}"
            )
        return name


def reason(answer: httpx.Response) -> str:
    """What an answer says against the request, in one line."""
    try:
        error = answer.json()
        said = error.get("error", error.get("detail", error))
        said = said.get("message", said) if isinstance(said, dict) else said
    except (json.JSONDecodeError, AttributeError):
        said = answer.text
    return f"{answer.status_code}, {' '.join(str(said).split())[:300]}"


def _has_died(answer: httpx.Response) -> bool:
    """The server answers still, and its engine is gone."""
    return answer.status_code == 500 and "EngineCore" in answer.text
