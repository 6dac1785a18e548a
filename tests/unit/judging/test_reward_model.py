"""`RewardModel` as programs and notebooks use it: with a loop of their own or none, one item or many."""

from __future__ import annotations

import asyncio
import re
from xml.etree import ElementTree

import pytest
from scripted_server import ScriptedServer
from waiting import wait_until

from megatron_r1reward import RewardModel
from megatron_r1reward.judging.rank import Ranking

PAIR = ("good", "bad")


class KnowingServer(ScriptedServer):
    """Says that the good response is the better one, wherever it stands."""

    reasoning = "It is good."

    def _take(self, body: dict) -> str:
        super()._take(body)
        text = body["messages"][0]["content"][-1]["text"]
        answer = 1 if re.search(r"\[Response 1\]:\s+good", text) else 2
        return f"<think>{self.reasoning}</think><answer>{answer}</answer>"


@pytest.fixture
def server():
    started = KnowingServer([""])
    yield started
    started.stop()


def test_both_kinds_of_calls_work_where_a_loop_is_running(server) -> None:
    """A notebook's cell runs inside an event loop, in which nobody may wait for another one of the same thread."""

    async def cell(model: RewardModel) -> list:
        said = [model.compare("Which?", PAIR).verdict, (await model.acompare("Which?", PAIR[::-1])).verdict]
        ranked = await model.arank("Which?", ["bad", "good"])
        scored = await model.ascore("Which?", ["bad", "good"])
        return [*said, ranked.order, scored == model.score("Which?", ["bad", "good"]) == ranked.rewards]

    with RewardModel.connect(server.url) as model:
        assert asyncio.run(cell(model)) == [1, 2, (1, 0), True]


def test_a_notebook_shows_results_as_tables(server) -> None:
    server.reasoning = "<b>1</b> is good."
    with RewardModel.connect(server.url) as model:
        compared, ranking = model.compare("Which?", PAIR), model.rank("Which?", ["bad", "good"])
    for found, says in ((compared, "response 1 is better; probability"), (ranking, "2 judgements")):
        root = ElementTree.fromstring(found._repr_html_())
        assert root.tag == "table" and says in (root.findtext("caption") or "")
    assert "&lt;b&gt;1&lt;/b&gt; is good." in compared._repr_html_()
    assert [row[1].text for row in ElementTree.fromstring(ranking._repr_html_()).findall("tr")[1:]] == ["1", "0"]


def test_many_items_keep_their_order_and_one_that_fails_costs_no_other(server, capsys) -> None:
    fine, torn = ["bad", "good"], ["missing.png"]
    items = [("Which?", fine, []), ("Which?", fine, torn), ("Which?", fine[::-1], [])]
    with RewardModel.connect(server.url) as model:
        first, failed, last = model.rank_many(items, votes=1)
    assert isinstance(first, Ranking) and isinstance(last, Ranking)
    assert (first.order, last.order) == ((1, 0), (0, 1))
    assert isinstance(failed, ValueError) and "missing.png" in str(failed)
    assert "ranking" in capsys.readouterr().err, "progress is shown"


def test_a_cancelled_wait_ends_the_work(server) -> None:
    server.chat.close()

    async def impatient(model: RewardModel) -> None:
        work = asyncio.ensure_future(model.acompare("Which?", PAIR))
        await asyncio.to_thread(wait_until, lambda: server.chat.inside > 0)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work

    with RewardModel.connect(server.url) as model:
        asyncio.run(impatient(model))
        server.chat.open()
        asked = len(server.requests)
        assert model.compare("Which?", PAIR).verdict == 1
        assert len(server.requests) >= asked
