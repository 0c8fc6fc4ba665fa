"""Questions → replies: several at once, no faster and no dearer than allowed, each until its reply is clear."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from distill.errors import BadInput, Problem
from distill.evaluation.judge.client import Client, Refused
from distill.evaluation.judge.limits import Budget, Pace, Spent, Stopped
from distill.evaluation.judge.replies import Reply, ReplyFile
from distill.evaluation.judge.settings import Judge, Manners
from distill.evaluation.judge.tasks import Task, longest_prompt, request


@dataclass
class Outcome:
    """Of one command."""

    replies: int = 0
    retries: int = 0
    cost: float = 0.0
    spent: bool = False
    """Ended by the limit of costs."""
    refused: dict[str, str] = field(default_factory=dict)
    """By a question's key, what the server said against it."""


class Asking:
    """Puts questions to a judge, and keeps its replies."""

    def __init__(self, judge: Judge, manners: Manners, file: ReplyFile):
        self.judge, self.manners, self.file = judge, manners, file
        self.outcome = Outcome()
        self._requests, self._tokens = Pace(manners.requests_per_minute), Pace(manners.tokens_per_minute)
        self._budget = Budget(manners.max_cost)
        self._client = Client(judge, self._requests)
        self._lock = threading.Lock()

    def run(self, tasks: Sequence[Task], done: Callable[[], object]) -> Outcome:
        """Ask until each question has a verdict or was asked often enough; `done` is called after each.

        Raises:
            BadInput: there is no such judge, or the limit of costs is below that of one request.
            Unreachable: it does not answer any more.
        """
        try:
            # Alone: what is wrong with all requests is told once.
            for task in tasks[:1]:
                self._settle(task)
                if said := self.outcome.refused.get(task.key):
                    wrong = f"does not take our requests ({said})"
                    mend = "change their fields with --option, such as --option temperature=null"
                    raise BadInput(Problem("--judge-url", self.judge.public_url, wrong, mend))
                done()
            self._together(tasks[1:], done)
        except Spent as error:
            if not self.outcome.replies:  # nor would it be otherwise another time
                wrong = f"one request may cost {error.most:.4g}"
                mend = "raise it, or lower --judge-max-tokens"
                raise BadInput(Problem("--max-cost", self.manners.max_cost, wrong, mend)) from None
            self.outcome.spent = True
        finally:
            self._client.close()
            self.outcome.cost = self._budget.spent
        return self.outcome

    def _together(self, tasks: Sequence[Task], done: Callable[[], object]) -> None:
        def one(task: Task) -> None:
            self._settle(task)
            with self._lock:
                done()

        with ThreadPoolExecutor(self.manners.concurrency) as pool:
            futures: list[Future[None]] = [pool.submit(one, task) for task in tasks]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                # Requests that run are paid for: their replies are waited for and kept.
                for limit in (self._requests, self._tokens, self._budget):
                    limit.stop()
                pool.shutdown(cancel_futures=True)
        errors = [error for future in futures if not future.cancelled() and (error := future.exception())]
        for error in sorted(errors, key=lambda error: isinstance(error, Spent)):
            if not isinstance(error, Stopped):
                raise error

    def _settle(self, task: Task) -> None:
        """Ask one question as often as it takes, and may."""
        while len(self.file.of(task)) < self.manners.asks and self.file.verdict(task) is None:
            try:
                reply = self._ask(task, len(self.file.of(task)))
            except Refused as error:
                with self._lock:
                    self.outcome.refused[task.key] = str(error)
                return
            self.file.add(task, reply)
            with self._lock:
                self.outcome.replies += 1
                self.outcome.retries += reply.retries

    def _ask(self, task: Task, ask: int) -> Reply:
        body = request(self.judge, task.text, ask)
        prompt, completion = longest_prompt(body), self.judge.longest_reply or 0
        prices = self.manners.prices
        most = prices.of(prompt, completion) if prices else 0.0
        self._budget.reserve(most)
        cost = used = 0.0
        try:
            self._tokens.take(prompt + completion)
            reply = self._client.ask(body)
            # Of a server that does not count tokens the worst is thought.
            counts = _or(reply.prompt_tokens, prompt), _or(reply.completion_tokens, completion)
            used, cost = sum(counts), prices.of(*counts) if prices else 0.0
        finally:
            self._tokens.give_back(prompt + completion - used)
            self._budget.settle(most, cost)
        return reply


def _or(count: int | None, otherwise: int) -> int:
    return otherwise if count is None else count
