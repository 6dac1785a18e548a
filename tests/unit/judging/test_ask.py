from __future__ import annotations

import asyncio
import base64
import io
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from scripted_server import BAD_JSON, HTML, WRONG_SHAPE, ScriptedServer

from megatron_r1reward.judging.ask import (
    AskOptions,
    Item,
    Judgement,
    ModelClient,
    ModelRefusedError,
    ModelUnavailableError,
    image_url,
)

RIGHT = "<think>The second.</think><answer>2</answer>"
QUICK = AskOptions(retries=2, backoff_s=0.001)


def ask(*servers: ScriptedServer, n: int = 1, order="12", temperature: float = 0.0) -> list[Judgement]:
    async def work() -> list[Judgement]:
        client = ModelClient([server.url for server in servers], options=QUICK)
        try:
            item = Item(question="Which?")
            return await client.judge(item, ("one", "two"), order=order, n=n, temperature=temperature, seed=3)
        finally:
            await client.aclose()

    return asyncio.run(work())


def test_what_is_asked_and_what_is_understood(scripted) -> None:
    server = scripted(RIGHT)
    (judgement,) = ask(server)
    assert (judgement.choice, judgement.reasoning, judgement.order) == (2, "The second.", "12")
    (exchanged,) = ask(server, order="21")
    assert exchanged.choice == 1
    first, second = (request["messages"][0]["content"][0]["text"] for request in server.requests)
    assert "[Response 1]:\none" in first
    assert "[Response 2]:\ntwo" in first
    assert "[Response 1]:\ntwo" in second
    assert "[Response 2]:\none" in second
    assert server.requests[0]["model"] == "judge-model"


@pytest.mark.parametrize("trouble", [503, 429, 408, HTML, BAD_JSON, WRONG_SHAPE])
def test_trouble_is_tried_again(scripted, trouble) -> None:
    assert ask(scripted(trouble, RIGHT))[0].choice == 2


def test_a_dead_server_is_not_the_end(scripted) -> None:
    dead, well = scripted(RIGHT), scripted(RIGHT)
    dead.stop()
    assert ask(dead, well)[0].choice == ask(well, dead)[0].choice == 2


def test_refusals_and_silence_have_names(scripted) -> None:
    with pytest.raises(ModelRefusedError, match=r"answered 400.*scripted failure"):
        ask(scripted(400))
    with pytest.raises(ModelUnavailableError, match="answered 503"):
        ask(scripted(503))
    with pytest.raises(ValueError, match="greedy decoding has one"):
        ask(scripted(RIGHT), n=2)
    with pytest.raises(ModelUnavailableError, match="asked for 3 samples, got 1"):
        ask(scripted(RIGHT), n=3, temperature=1.0)


def test_the_answer_tokens_probability(scripted, monkeypatch) -> None:
    """The digit's own token counts, not a digit of the reasoning; its alternatives share what is not theirs."""

    def token(text: str, log_prob: float = -0.1, **others: float) -> dict:
        top = [{"token": other, "logprob": value, "bytes": None} for other, value in others.items()]
        return {"token": text, "logprob": log_prob, "bytes": None, "top_logprobs": top}

    content = [token(part) for part in ("<think>", "1", " 2", "</think>", "<answer>")]
    content += [token("2", math.log(0.6), **{"2": math.log(0.6), "1": math.log(0.2), "the": -9.0}), token("</answer>")]
    message = {"role": "assistant", "content": "<think>1 2</think><answer>2</answer>"}
    choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": {"content": content}}
    reply = {"id": "c", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
    monkeypatch.setattr("scripted_server.completion", lambda text: json.dumps(reply))
    assert ask(scripted("whatever"))[0].p_first == pytest.approx(0.25)
    (exchanged,) = ask(scripted("whatever"), order="21")
    assert (exchanged.choice, exchanged.p_first) == (1, pytest.approx(0.75))
    assert exchanged.tokens == 7


class TestImages:
    def png(self, size=(4, 4)) -> bytes:
        buffer = io.BytesIO()
        Image.new("RGB", size, "red").save(buffer, format="PNG")
        return buffer.getvalue()

    def test_every_form_is_the_same_picture(self, tmp_path) -> None:
        data = self.png()
        (tmp_path / "a.png").write_bytes(data)
        url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
        forms = [data, tmp_path / "a.png", str(tmp_path / "a.png"), url]
        assert {image_url(form) for form in forms} == {url}
        assert image_url(Image.open(io.BytesIO(data))).startswith("data:image/png;base64,")
        assert Item.of("q", [data]).key != Item.of("q").key

    @pytest.mark.parametrize(
        ("given", "says"),
        [
            ("https://example.com/a.png", "is a network address"),
            ("file:///etc/passwd", "is a network address"),
            ("nowhere.png", "cannot be read: No such file"),
            ("data:image/png;base64,!!!", "is not base64"),
            ("data:image/png,abc", "is not 'data:<type>;base64,<data>'"),
            (b"not a picture", "is not a picture"),
        ],
    )
    def test_what_is_no_picture(self, given, says) -> None:
        with pytest.raises(ValueError, match=says):
            image_url(given)

    def test_a_small_file_with_a_huge_picture(self) -> None:
        with pytest.raises(ValueError, match="200 x 200 pixels, more than 10000"):
            image_url(self.png((200, 200)), max_pixels=10_000)


@pytest.mark.slow
def test_importing_the_package_imports_nothing_heavy() -> None:
    """What makes `import megatron_r1reward` slow is never imported by it, nor by the name of the reward model."""
    code = "import sys, megatron_r1reward; assert not {'torch', 'numpy', 'openai', 'httpx'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    code = "from megatron_r1reward import RewardModel; import sys; assert not {'torch', 'vllm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_names_that_do_not_exist(tmp_path: Path) -> None:
    import megatron_r1reward

    with pytest.raises(AttributeError, match="no attribute 'Rewardmodel'"):
        _ = megatron_r1reward.Rewardmodel
