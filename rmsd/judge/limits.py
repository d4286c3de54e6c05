"""How fast a judge may be asked, and how much it may cost."""

import threading
import time
from collections import deque
from collections.abc import Callable


class Limits:
    """Requests and tokens in any minute, and tokens in all; None for no limit. Used by many threads at once, of one
    process: each of several has limits of its own, and one that is started again has its budget anew.

    `before()` waits until a request may be made; `after(tokens)` tells what it took.

    Raises:
        ConnectionError: from `before`, once `budget_tokens` are spent.
    """

    def __init__(
        self,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        budget_tokens: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self._most = (requests_per_minute, tokens_per_minute)
        self._budget, self.spent = budget_tokens, 0
        self._taken: tuple[deque, deque] = (deque(), deque())  # (when, how many)
        self._lock, self._clock, self._sleep = threading.Lock(), clock, sleep

    def before(self) -> None:
        while True:
            with self._lock:
                if self._budget is not None and self.spent >= self._budget:
                    raise ConnectionError(
                        f"the judge has used {self.spent:,} tokens of judge.budget_tokens={self._budget:,} since this "
                        "process started: resume=true goes on from the last checkpoint with a new budget of as many"
                    )
                wait = self._wait()
                if wait <= 0:
                    self._taken[0].append((self._clock(), 1))
                    return
            self._sleep(wait)

    def after(self, tokens: int) -> None:
        with self._lock:
            self.spent += tokens
            self._taken[1].append((self._clock(), tokens))

    def _wait(self) -> float:
        now, wait = self._clock(), 0.0
        for taken, most in zip(self._taken, self._most, strict=True):
            while taken and taken[0][0] <= now - 60.0:
                taken.popleft()
            if most is not None and sum(count for _, count in taken) >= most:
                wait = max(wait, taken[0][0] + 60.0 - now)
        return wait
