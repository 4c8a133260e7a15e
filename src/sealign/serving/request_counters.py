"""RequestCounters: counters of edited requests for Prometheus, which vLLM shows at /metrics."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


class RequestCounters:
    """Counters of the edited requests of a server and of their tokens, each with the label ``edit``.

    They are ``sealign_requests_total``, ``sealign_prompt_tokens_total`` and ``sealign_generated_tokens_total``. A
    request counts when its first answer comes, and its tokens as they come, also if it is cut off later.
    """

    def __init__(self) -> None:
        from prometheus_client import Counter

        self._requests = Counter("sealign_requests", "Requests with an edit.", ["edit"])
        self._prompt = Counter("sealign_prompt_tokens", "Tokens of the prompts of requests with an edit.", ["edit"])
        self._generated = Counter("sealign_generated_tokens", "Tokens generated with an edit.", ["edit"])

    def request(self, name: str, params: Any) -> Callable[[Any], None]:
        """Return the function that counts the answers of one request.

        Args:
            name: Name of its edit.
            params: vLLM's ``SamplingParams`` of the request.
        """
        cumulative = getattr(params.output_kind, "name", "") == "CUMULATIVE"
        begun = False

        def count(answer: Any) -> None:
            nonlocal begun
            if not begun:
                begun = True
                self._requests.labels(name).inc()
                self._prompt.labels(name).inc(len(answer.prompt_token_ids or ()))
            if answer.finished or not cumulative:  # otherwise the next answer has these tokens again
                self._generated.labels(name).inc(sum(len(output.token_ids) for output in answer.outputs))

        return count


@functools.cache
def request_counters() -> RequestCounters:
    """Return the counters of this process; Prometheus takes a name once."""
    return RequestCounters()
