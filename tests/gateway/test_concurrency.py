"""Many at once: each client gets its own answer, whole, and nothing is left behind."""

from __future__ import annotations

import asyncio

import openai
from gateway_fakes import Script

NUM = 50


def test_fifty_at_once_half_of_them_streamed(gateway):
    gateway.backend.script = Script(
        text=lambda r: "echo " + gateway.tokenizer.decode(r.prompt_ids)[6:18], token_s=0.005
    )

    async def ask(client, i):
        messages = [{"role": "user", "content": f"question {i:03}"}]
        if i % 2:
            stream = await client.chat.completions.create(model="base", messages=messages, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        answer = await client.chat.completions.create(model="base", messages=messages)
        return answer.choices[0].message.content

    async def ask_all():
        async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="x", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, i) for i in range(NUM)))

    assert asyncio.run(ask_all()) == [f"echo question {i:03}" for i in range(NUM)]
    assert gateway.backend.max_running > 10
    assert gateway.backend.cancelled == []
    assert gateway.app.state.service.admission.in_work == 0


def test_random_departures_leave_nothing_behind(gateway, eventually):
    """Clients that go after random waits, streamed or not: every slot and every backend stream comes back."""
    import random

    gateway.backend.script = Script(text="x" * 100, token_s=0.003)
    rng = random.Random(7)

    async def come_and_go(client, i):
        messages = [{"role": "user", "content": "hi"}]
        create = client.chat.completions.create(model="base", messages=messages, stream=bool(i % 2), n=1 + i % 3)
        try:
            async with asyncio.timeout(rng.uniform(0.0, 0.5)):
                answer = await create
                if i % 2:
                    async with answer:
                        _ = [chunk async for chunk in answer]
        except TimeoutError:
            return False
        return True

    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="x", max_retries=0) as client:
            return await asyncio.gather(*(come_and_go(client, i) for i in range(25)))

    finished = asyncio.run(all_of_them())
    service = gateway.app.state.service
    eventually(lambda: service.admission.in_work == 0 and gateway.backend.running == 0, "everything is given back")
    assert not all(finished)
    gateway.backend.script = Script()
    assert gateway.chat().status_code == 200
