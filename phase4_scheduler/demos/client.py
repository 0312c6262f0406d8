"""The server through OpenAI's Python package: `python -m phase4_scheduler.demos.client [http://127.0.0.1:8000]`.

Nothing here knows TitanInfer: it works with every server that speaks OpenAI's protocol. Four things that programs do:
wait for an answer, print it as it comes, ask many questions at once, and change one's mind.
"""

from __future__ import annotations

import asyncio
import os
import sys

from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletionMessageParam

PROMPTS = ("def add(a, b):", "class Stack:", "for i in range(", "import ")


def plain(client: OpenAI, model: str, prompt: str, max_tokens: int = 24) -> str:
    """The whole answer at once."""
    answer = client.completions.create(model=model, prompt=prompt, max_tokens=max_tokens, temperature=0)
    return answer.choices[0].text


def streamed(client: OpenAI, model: str, prompt: str, max_tokens: int = 24) -> list[str]:
    """The pieces of a chat's answer as they come."""
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": prompt}]
    pieces = []
    with client.chat.completions.create(
        model=model,
        messages=messages,
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
    ) as stream:
        for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                pieces.append(chunk.choices[0].delta.content)
                print(pieces[-1], end="", flush=True)
    print()
    return pieces


async def concurrent(client: AsyncOpenAI, model: str, prompts: tuple[str, ...], max_tokens: int = 24) -> list[str]:
    """Many answers at the same time: the server computes them in one batch."""

    async def one(prompt: str) -> str:
        answer = await client.completions.create(model=model, prompt=prompt, max_tokens=max_tokens, temperature=0)
        return answer.choices[0].text

    return await asyncio.gather(*map(one, prompts))


async def cancelled(client: AsyncOpenAI, model: str, prompt: str, pieces: int = 3) -> list[str]:
    """The first pieces of a long answer. Leaving the stream closes its connection, and the server stops computing."""
    taken: list[str] = []
    async with await client.completions.create(
        model=model, prompt=prompt, max_tokens=900, temperature=0, stream=True, extra_body={"ignore_eos": True}
    ) as stream:
        async for chunk in stream:
            taken.append(chunk.choices[0].text)
            if len(taken) == pieces:
                break
    return taken


async def main(url: str) -> None:
    """Do all four against the first model that the server has."""
    key = os.environ.get("TITAN_API_KEY", "none")  # the package wants one, also where the server does not
    with OpenAI(base_url=f"{url}/v1", api_key=key) as client:
        model = client.models.list().data[0].id
        print(f"{model}, one answer:\n{plain(client, model, PROMPTS[0])}\n\nstreamed:")
        streamed(client, model, PROMPTS[0])
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key=key) as client:
        answers = await concurrent(client, model, PROMPTS)
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            print(f"\n{prompt!r} goes on with {answer!r}")
        print(f"\ncancelled after {await cancelled(client, model, PROMPTS[0])}")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"))
