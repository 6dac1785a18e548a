"""vLLM's executor of several workers on one machine, with one repair. Written for vLLM 0.32."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from vllm.v1.executor.multiproc_executor import MultiprocExecutor

log = logging.getLogger(__name__)


class WholeAnswerExecutor(MultiprocExecutor):
    """Reads what every worker answers to a call, also when one of them fails.

    vLLM's own stops reading at the first worker that failed. The answers of the workers behind it stay in their queues
    and are taken for those to the next call, so from then on these workers are heard one call late. After two such
    failures a worker that refuses an update is heard when the server has been resumed already: with mixed weights.

    For `--distributed-executor-backend`, which takes the name of a class.
    """

    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """Call `method` on all workers; their results, by rank.

        Raises:
            RuntimeError: names the workers that failed and what each said.
        """
        if options:  # one worker answers for all, or nobody waits: sampling, not administration
            return super().collective_rpc(method, timeout, args, kwargs, **options)
        answers = super().collective_rpc(partial(attempt, method), timeout, args, kwargs)
        failed: dict[str, list[str]] = {}
        for rank, (error, _) in enumerate(answers):
            if error is not None:
                failed.setdefault(error, []).append(str(rank))
        if failed:
            raise RuntimeError("; ".join(f"worker {','.join(ranks)}: {error}" for error, ranks in failed.items()))
        return [result for _, result in answers]


def attempt(method: str | Callable[..., Any], worker: Any, *args: Any, **kwargs: Any) -> tuple[str | None, Any]:
    """(what went wrong, None) or (None, the result); runs in a worker."""
    try:
        call = getattr(worker, method) if isinstance(method, str) else partial(method, worker)
        return None, call(*args, **kwargs)
    except Exception as error:
        log.exception("%s failed", method)
        return f"{type(error).__name__}: {error}", None
