"""The load generator's client, byte by byte: HTTP against h11, events against their specification, chunks as sent."""

from __future__ import annotations

import json
import time
from itertools import pairwise

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phase0_prototype.errors import UserError
from phase4_scheduler.bench.chunks import StreamReader, message_of
from phase4_scheduler.bench.http_client import Address
from phase4_scheduler.bench.http_parser import HttpError, ResponseParser
from phase4_scheduler.bench.sse import EventSplitter


def in_pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[a:b] for a, b in pairwise(edges)]


def parsed(pieces: list[bytes]) -> tuple[ResponseParser, bytes]:
    body: list[bytes] = []
    parser = ResponseParser(lambda status, piece: body.append(piece))
    for piece in pieces:
        parser.feed(piece)
    return parser, b"".join(body)


@settings(deadline=None, max_examples=150)
@given(
    bodies=st.lists(st.binary(min_size=1, max_size=40), max_size=6),
    cuts=st.lists(st.integers(0, 10_000), max_size=12),
    chunked=st.booleans(),
    status=st.sampled_from([200, 404, 429, 503]),
)
def test_a_response_that_h11_writes_is_read_however_it_is_cut(bodies, cuts, chunked, status):
    server = h11.Connection(h11.SERVER)
    server.receive_data(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    server.next_event(), server.next_event()
    length = str(sum(map(len, bodies))).encode()
    how = (b"Transfer-Encoding", b"chunked") if chunked else (b"Content-Length", length)
    sent = server.send(h11.Response(status_code=status, headers=[how, (b"Retry-After", b"7")]))
    for body in bodies:
        sent += server.send(h11.Data(data=body))
    sent += server.send(h11.EndOfMessage())
    parser, body = parsed(in_pieces(sent, cuts))
    assert (parser.status, body, parser.complete) == (status, b"".join(bodies), True)
    assert parser.headers["retry-after"] == "7" and parser.reusable


def test_a_body_without_length_ends_with_the_connection():
    parser, body = parsed([b"HTTP/1.1 200 OK\r\n\r\nhal", b"lo"])
    assert not parser.complete
    parser.close()
    assert parser.complete and body == b"hallo" and not parser.reusable


def test_interim_answers_and_trailers_are_passed_over():
    sent = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    sent += b"2;a=b\r\nhi\r\n0\r\nX: y\r\n\r\n"
    for size in range(1, len(sent) + 1):
        parser, body = parsed([sent[i : i + size] for i in range(0, len(sent), size)])
        assert parser.complete and body == b"hi" and parser.reusable


@pytest.mark.parametrize(
    "wrong",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nab\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 20_000,
    ],
)
def test_what_is_no_http_is_an_error(wrong):
    with pytest.raises(HttpError):
        parsed([wrong])


@pytest.mark.parametrize("cut", [b"", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhal"])
def test_an_answer_that_is_cut_off_is_an_error(cut):
    parser, _ = parsed([cut])
    with pytest.raises(HttpError, match="closed the connection"):
        parser.close()


# What a data field may hold: anything but the ends of lines and the sequences that end an event.
LINE = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=20)


@settings(deadline=None, max_examples=200)
@given(
    events=st.lists(st.lists(LINE, min_size=1, max_size=3), max_size=6),
    ending=st.sampled_from(["\n", "\r\n", "\r"]),
    space=st.sampled_from(["", " "]),
    noise=st.sampled_from(["", ": keep-alive", "event: message", "id: 3"]),
    cuts=st.lists(st.integers(0, 10_000), max_size=12),
)
def test_events_are_found_however_their_bytes_are_cut(events, ending, space, noise, cuts):
    lines = [[*([noise] if noise else []), *(f"data:{space}{line}" for line in event)] for event in events]
    sent = "".join(ending.join(event) + ending + ending for event in lines).encode()
    splitter = EventSplitter()
    found = [event for piece in in_pieces(sent + b"\n", cuts) for event in splitter.feed(piece)]
    # One space after the colon belongs to the framing, further ones to the data.
    wanted = ["\n".join(line if space else line.removeprefix(" ") for line in event).encode() for event in events]
    assert found == wanted


def event(**fields) -> bytes:
    return f"data: {json.dumps(fields)}\n\n".encode()


def test_chunks_that_carry_tokens_are_timed_and_others_are_not():
    times = iter(range(100))
    reader = StreamReader(lambda: float(next(times)))
    reader.feed(event(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}}]))  # 0: names the role
    reader.feed(event(choices=[{"index": 0, "delta": {"content": "a"}}]))  # 1
    reader.feed(b": keep-alive\n\n")  # 2
    reader.feed(event(choices=[{"index": 0, "delta": {"reasoning": "b"}}]))  # 3
    both = event(choices=[{"index": 0, "delta": {"content": "c"}}]) + event(
        choices=[{"index": 0, "delta": {}, "finish_reason": "length"}]
    )
    reader.feed(both)  # 4
    reader.feed(event(choices=[], usage={"prompt_tokens": 7, "completion_tokens": 3}))  # 5
    assert not reader.done
    reader.feed(b"data: [DONE]\n\n")
    assert reader.times == [1, 3, 4] and reader.last == 4
    assert (reader.prompt_tokens, reader.output_tokens, reader.finish_reason) == (7, 3, "length")
    assert reader.done and reader.error is None


def test_an_empty_chunk_of_a_completion_is_a_token_without_text():
    reader = StreamReader(lambda: 1.0)
    reader.feed(event(choices=[{"index": 0, "text": "", "finish_reason": None}]))
    reader.feed(event(choices=[{"index": 0, "text": "", "token_ids": [5, 6], "finish_reason": "stop"}]))
    reader.feed(event(choices=[{"index": 0, "text": "", "finish_reason": "stop"}]))
    assert len(reader.times) == 2 and reader.token_ids == 2


def test_an_error_amid_the_stream_and_a_broken_chunk_are_kept():
    reader = StreamReader()
    reader.feed(event(error={"message": "the engine died", "code": 500}))
    assert reader.error == "the engine died"
    reader = StreamReader()
    reader.feed(b'data: {"choices": [{"text": \n\n')
    assert reader.error is not None and "not one of a completion" in reader.error


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": {"message": "too long", "code": 400}}', "too long"),  # OpenAI, vLLM
        (b'{"object": "error", "message": "too long"}', "too long"),  # SGLang
        (b'{"error": "Unauthorized"}', "Unauthorized"),  # vLLM, 401
        (b'{"detail": "Not Found"}', "Not Found"),  # FastAPI
        (b"Internal Server Error", "Internal Server Error"),
    ],
)
def test_the_message_of_an_error_is_found_in_all_usual_shapes(body, message):
    assert message_of(body) == message


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("http://h:1", "/v1/completions"),
        ("h:1/", "/v1/completions"),
        ("http://h:1/v1", "/v1/completions"),
        ("http://h:1/proxy/v1/", "/proxy/v1/completions"),
    ],
)
def test_a_base_url_may_end_with_v1(url, path):
    address = Address.of(url)
    assert (address.host, address.port, address.path("/v1/completions")) == ("h", 1, path)
    assert "/v1" not in Address.of("http://h:1/v1").path("/version")


@pytest.mark.parametrize("url", ["ftp://x", "http://", "http://h:port", "http://h:99999", "http://h/?a=b"])
def test_an_address_that_is_none_is_one_line(url):
    with pytest.raises(UserError, match="--base-url"):
        Address.of(url)


def test_a_chunk_costs_less_than_25_microseconds():
    """Least of several rounds of CPU time: from bytes of the socket to a noted time, at one chunk a read."""
    choice = {"index": 0, "text": " token", "logprobs": None, "finish_reason": None}
    fields = {"id": "cmpl-0123456789abcdef", "object": "text_completion", "created": 1763000000, "model": "m" * 30}
    payload = f"data: {json.dumps(fields | {'choices': [choice], 'usage': None})}\n\n".encode()
    chunk = f"{len(payload):x}\r\n".encode() + payload + b"\r\n"
    rounds, chunks = [], 3000
    for _ in range(5):
        reader = StreamReader()
        parser = ResponseParser(lambda status, piece, reader=reader: reader.feed(piece))
        parser.feed(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        began = time.process_time()
        for _ in range(chunks):
            parser.feed(chunk)
        rounds.append((time.process_time() - began) / chunks)
        assert len(reader.times) == chunks
    print(f"{1e6 * min(rounds):.1f} us")
    assert min(rounds) < 25e-6
