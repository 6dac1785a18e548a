"""The judge against servers that fail in every way they can: a verdict or "unknown", never an exception."""

import asyncio
import socket
from collections.abc import Iterator

import pytest
from scripted_server import BAD_JSON, HTML, WRONG_SHAPE

from megatron_r1reward.config.schema import JudgeSection
from megatron_r1reward.reward.consistency import ConsistencyJudge, JudgeDownError
from megatron_r1reward.reward.verdict_cache import VerdictCache

REASONING = "The image shows 7.\n\nResponse 1 says 7, right.\nResponse 2 says 3, wrong.\n\nResponse 1 is better.\n"


def judge(*servers, **settings) -> ConsistencyJudge:
    defaults = {"retries": 2, "request_timeout_s": 60.0, "backoff_s": 0.01, "backoff_max_s": 0.1}
    section = JudgeSection(**defaults | settings)
    return ConsistencyJudge(section, [server if isinstance(server, str) else server.url for server in servers])


@pytest.fixture
def dead_url() -> Iterator[str]:
    """A port that nobody listens on, nor can take."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("1", "consistent"),
        ("0", "inconsistent"),
        (" 1\n", "consistent"),
        ("1.", "consistent"),
        ("**1**", "consistent"),
        ("Output: 1", "consistent"),
        ("The reply is 0, because it contradicts itself.", "inconsistent"),
        ("<think>0 or 1? The lines agree.</think> 1", "consistent"),
    ],
)
def test_verdicts(serve, reply: str, verdict: str) -> None:
    assert asyncio.run(judge(serve(reply)).judge(REASONING, 1)) == verdict


def test_what_the_judge_is_shown(serve) -> None:
    server = serve("1")
    asyncio.run(judge(server, temperature=0.1, max_tokens=7).judge(REASONING, 2))
    (request,) = server.requests
    text = str(request["messages"])
    assert "Response 1 says 7, right." in text  # the last three lines that are not empty
    assert "The image shows 7." not in text
    assert "Response 2 is better." in text
    assert (request["model"], request["temperature"], request["max_tokens"]) == ("judge-model", 0.1, 7)


def test_a_named_model_is_not_looked_up(serve) -> None:
    server = serve("1")
    asyncio.run(judge(f"{server.url}/v1", model="my-judge").judge(REASONING, 1))
    assert server.requests[0]["model"] == "my-judge"


@pytest.mark.parametrize("failure", [500, 503, 429, 404, "10", "yes", "1 or 0", "0.5", "", HTML, BAD_JSON, WRONG_SHAPE])
class TestFailures:
    @pytest.mark.slow
    def test_one_failure_is_retried(self, serve, failure) -> None:
        server = serve(failure, "1")
        assert asyncio.run(judge(server).judge(REASONING, 1)) == "consistent"
        assert len(server.requests) == 2

    @pytest.mark.slow
    def test_lasting_failure_is_unknown(self, serve, failure, caplog) -> None:
        server = serve(failure)
        assert asyncio.run(judge(server, retries=1).judge(REASONING, 1)) == "unknown"
        assert len(server.requests) == 2
        assert "no verdict on 1 of 1 questions after 2 attempts" in caplog.text


def test_a_hanging_server_times_out(serve) -> None:
    assert asyncio.run(judge(serve(3600.0), retries=0, request_timeout_s=0.2).judge(REASONING, 1)) == "unknown"


def test_a_dead_server_is_unknown(dead_url: str) -> None:
    assert asyncio.run(judge(dead_url, retries=1).judge(REASONING, 1)) == "unknown"


def test_another_server_takes_over(serve, dead_url: str) -> None:
    server = serve("1")
    cases = [(f"{REASONING} {i}", 1) for i in range(6)]
    assert asyncio.run(judge(dead_url, server).judge_many(cases)) == ["consistent"] * 6
    assert len(server.requests) == 6


def test_one_bad_call_does_not_spoil_the_others(serve) -> None:
    server = serve("1", "nonsense", "0")
    verdicts = asyncio.run(judge(server, retries=0, max_concurrency=1).judge_many([(f"case {i}", 1) for i in range(3)]))
    assert verdicts == ["consistent", "unknown", "inconsistent"]


def test_equal_questions_are_asked_once(serve) -> None:
    server = serve("1")
    asked = judge(server)
    cases = [(REASONING, 1), ("Other first line.\n" + REASONING, 1), (REASONING, 1)]  # the same last three lines
    assert asyncio.run(asked.judge_many(cases)) == ["consistent"] * 3
    assert asyncio.run(asked.judge_many(cases)) == ["consistent"] * 3  # in a second event loop
    assert len(server.requests) == 1
    asyncio.run(asked.judge(REASONING, 2))
    assert len(server.requests) == 2


@pytest.mark.slow
def test_a_hanging_model_list_costs_one_timeout_in_all(serve) -> None:
    """Nobody waits for the time-out of another: all hang at the same time."""
    server = serve("1")
    server.models.close(until=8)
    verdicts = asyncio.run(judge(server, retries=0).judge_many([(f"case {i}", 1) for i in range(8)]))
    assert server.models.most == server.model_lookups == 8
    assert verdicts == ["consistent"] * 8
    server = serve("1")
    server.models.close()
    asked = judge(server, retries=0, request_timeout_s=0.2)
    assert asyncio.run(asked.judge(REASONING, 1)) == "unknown"


def test_unknown_is_not_remembered(serve) -> None:
    asked = judge(serve(500, "1"), retries=0)
    assert asyncio.run(asked.judge(REASONING, 1)) == "unknown"
    assert asyncio.run(asked.judge(REASONING, 1)) == "consistent"


@pytest.mark.parametrize("limit", [1, 4])
def test_calls_run_together_up_to_the_limit(serve, limit: int) -> None:
    server = serve("1")
    server.chat.close(until=limit)
    asyncio.run(judge(server, max_concurrency=limit).judge_many([(f"case {i}", 1) for i in range(8)]))
    assert server.chat.most == limit


def test_empty_reasoning_supports_nothing(serve) -> None:
    server = serve("1")
    assert asyncio.run(judge(server).judge(" \n", 1)) == "inconsistent"
    assert server.requests == []


def test_a_model_is_looked_up_once_in_a_life(serve) -> None:
    server = serve("1")
    asked = judge(server)
    for i in range(3):
        asyncio.run(asked.judge(f"case {i}", 1))
    assert server.model_lookups == 1


def test_verdicts_outlive_the_run(serve, tmp_path) -> None:
    server = serve("1", "0")
    section = JudgeSection(model="m")
    for step, expected in enumerate(["consistent", "consistent"]):
        cache = VerdictCache(tmp_path / "new" / "verdicts.sqlite")
        asked = ConsistencyJudge(section, [server.url], cache=cache)
        assert asyncio.run(asked.judge(REASONING, 1)) == expected
        assert asked.counts["cached"] == step
        cache.close()
    cache = VerdictCache(tmp_path / "new" / "verdicts.sqlite")
    warmer = ConsistencyJudge(section.model_copy(update={"temperature": 0.5}), [server.url], cache=cache)
    assert asyncio.run(warmer.judge(REASONING, 1)) == "inconsistent", "other settings, another question"
    assert len(server.requests) == 2


def test_a_foreign_cache_file_is_refused(tmp_path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("not a database, but longer than a header of one" * 30)
    with pytest.raises(ValueError, match="name another file"):
        VerdictCache(path)
    assert path.read_text().startswith("not a database")


def test_the_budget_of_a_step_is_kept(serve) -> None:
    server = serve("1")
    asked = judge(server, max_calls_per_step=3)
    cases = [(f"case {i}", 1) for i in range(5)]
    assert asyncio.run(asked.judge_many(cases)) == ["consistent"] * 3 + ["unknown"] * 2
    assert asked.counts["over_budget"] == 2
    assert asyncio.run(asked.judge_many(cases)) == ["consistent"] * 5, "the next step asks what is left"
    assert len(server.requests) == 5


def test_a_judge_that_is_down_costs_few_calls_and_is_tried_again(serve) -> None:
    server = serve(*[500] * 4, "1")
    asked = judge(server, retries=0, breaker_failures=3, max_concurrency=1)
    first = asyncio.run(asked.judge_many([(f"case {i}", 1) for i in range(50)]))
    assert first == ["unknown"] * 50
    assert len(server.requests) == 3
    assert asked.counts["not_tried"] == 47
    asyncio.run(asked.judge_many([(f"case {i}", 1) for i in range(50)]))
    assert len(server.requests) == 4, "one trial, which fails"
    assert asyncio.run(asked.judge_many([(f"case {i}", 1) for i in range(50)])) == ["consistent"] * 50
    assert asked.counts["steps_without"] == 0


def test_the_run_stops_after_too_many_steps_without_a_judge(dead_url: str) -> None:
    asked = judge(dead_url, retries=0, max_steps_without_judge=2)
    for step in range(2):
        assert asyncio.run(asked.judge(f"case {step}", 1)) == "unknown"
        assert asked.counts["steps_without"] == step + 1
    assert asyncio.run(asked.judge_many([])) == [], "a step without questions says nothing about the judge"
    with pytest.raises(JudgeDownError, match="nor in the 2 steps before"):
        asyncio.run(asked.judge("case 3", 1))


def test_no_server_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"set judge\.urls"):
        ConsistencyJudge(JudgeSection(), [])


def test_a_server_that_can_is_made_to_choose(serve) -> None:
    server = serve("1")
    asyncio.run(judge(server).judge(REASONING, 1))
    assert server.requests[0]["structured_outputs"] == {"choice": ["1", "0"]}
    assert "seed" not in server.requests[0]


def test_a_server_that_refuses_the_constraint_is_asked_without_it(serve) -> None:
    server = serve(400, "Output: 0", "1")
    asked = judge(server, retries=0)
    assert asyncio.run(asked.judge(REASONING, 1)) == "inconsistent"
    assert asyncio.run(asked.judge(REASONING, 2)) == "consistent"
    assert ["structured_outputs" in request for request in server.requests] == [True, False, False]


def test_a_reply_without_a_verdict_is_asked_for_with_another_seed(serve) -> None:
    """At temperature 0 the same question would get the same reply for ever."""
    server = serve("both", "neither", "1")
    assert asyncio.run(judge(server, temperature=0.0).judge(REASONING, 1)) == "consistent"
    assert [request.get("seed") for request in server.requests] == [None, 1, 2]
    assert [request["temperature"] for request in server.requests] == [0.0, 1.0, 1.0]


def test_a_judge_that_talks_does_not_stop_the_run(serve, caplog) -> None:
    """It is there: the run goes on without the bonus, and every step says so."""
    server = serve("I cannot tell.")
    asked = judge(server, retries=0, max_steps_without_judge=1, breaker_failures=2)
    for step in range(4):
        cases = [(f"case {step} {i}", 1) for i in range(4)]
        assert asyncio.run(asked.judge_many(cases)) == ["unknown"] * 4
    assert len(server.requests) == 16, "nor is it taken for broken"
    assert "4 replies and not one verdict" in caplog.text
