"""The requirements of aiapiproxy as tables: an input, and the output that it has to give.

    python3 -m pytest -q
    python3 test_aiapiproxy.py --bench       measures the proxy here, in 40 s, without pytest

A row is (sentence, given, want); the sentence is the requirement and the name of the test.  Section
0 has the notation and the helpers of several sections.  The sections after it have the numbers and
the order of the program's own.  Nothing here leaves this machine: the upstream is a
`ScriptedServer`, a real server on a free port that plays a script and records the requests.
"""
from __future__ import annotations

import ast
import asyncio
import base64
import contextlib
import copy
import errno
import fcntl
import functools
import gc
import gzip
import http.client
import http.server
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import platform
import plistlib
import pty
import random
import re
import resource
import shutil
import signal
import socket
import ssl
import stat
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
import warnings
import zlib
from typing import NamedTuple
from unittest import mock
from urllib.parse import urlsplit

import aiapiproxy

if __name__ == "__main__":
    # The benchmark runs without pytest: no test is collected then, so the marks need no effect.
    pytest = mock.MagicMock()
else:
    import pytest

ROOT = pathlib.Path(__file__).resolve().parent

# ============================================================================
# 0. NOTATION
# ============================================================================
#
# Builders have short names, because the tables are long.  req makes a request; usr, asst and sysm
# make messages of either API; txt, use, res and tool make Anthropic's blocks and tools; msg, tmsg,
# part, call and fn make OpenAI's shapes; ctext, creason, frag, cend and cuse make chunks of a
# stream.


def table(rows, names="given, want"):
    """Each row (sentence, ...) as one test, named by its sentence."""
    values = [row[1:] if "," in names else row[1] for row in rows]
    return pytest.mark.parametrize(names, values, ids=[row[0] for row in rows])


# ---- Settings: one for each kind of upstream

KEY = "sk-abcdefghijkl1234"
MODELS = {"CLAUDE_SONNET_MODEL": "gpt-4o", "CLAUDE_OPUS_MODEL": "gpt-5.1",
          "CLAUDE_HAIKU_MODEL": "gpt-4o-mini"}
HOSTS = {
    "openai": {"OPENAI_BASE_URL": "https://api.openai.com/v1"},
    "azure": {"OPENAI_BASE_URL": "https://mine.openai.azure.com/openai/v1"},
    "openrouter": {"OPENAI_BASE_URL": "https://openrouter.ai/api/v1", "CLAUDE_SONNET_MODEL": "m1"},
    "deepseek": {"OPENAI_BASE_URL": "https://api.deepseek.com", "CLAUDE_SONNET_MODEL": "m1"},
    "mistral": {"OPENAI_BASE_URL": "https://api.mistral.ai/v1", "CLAUDE_SONNET_MODEL": "m1"},
    "gemini": {"OPENAI_BASE_URL": "https://generativelanguage.googleapis.com/v1beta/openai",
               "CLAUDE_SONNET_MODEL": "m1"},
    "local": {"OPENAI_BASE_URL": "http://127.0.0.1:8000/v1", "CLAUDE_SONNET_MODEL": "qwen3:8b",
              "CLAUDE_OPUS_MODEL": "openai/gpt-oss-20b"},
}


def settings_for(host, **environ):
    return aiapiproxy.load_settings({"OPENAI_API_KEY": KEY, **MODELS, **HOSTS[host], **environ})


SETTINGS = {host: settings_for(host) for host in HOSTS}


# ---- Requests

def req(messages=None, **members):
    """The plain request with members added or replaced."""
    messages = [usr("Hi")] if messages is None else messages
    return {"model": "claude-sonnet-5-5", "max_tokens": 100, "messages": messages, **members}


def without(request, *names):
    return {name: value for name, value in request.items() if name not in names}


def usr(content): return {"role": "user", "content": content}
def asst(content): return {"role": "assistant", "content": content}
def sysm(content, **members): return {"role": "system", "content": content, **members}
def txt(text): return {"type": "text", "text": text}
def think(text, signature): return {"type": "thinking", "thinking": text, "signature": signature}
def doc(source, **members): return {"type": "document", "source": source, **members}


def use(id, name="f", input=None):
    return {"type": "tool_use", "id": id, "name": name, "input": input or {}}


def res(id, *content, **members):
    """A tool_result; without content the member is absent."""
    return {"type": "tool_result", "tool_use_id": id,
            **({"content": content[0]} if content else {}), **members}


def tool(name, schema=None, **members):
    return {"name": name, "input_schema": schema or {"type": "object", "properties": {}}, **members}


def fn(name, schema=None, **members):
    schema = schema or {"type": "object", "properties": {}}
    return {"type": "function", "function": {"name": name, "parameters": schema, **members}}


def call(id, name="f", arguments="{}", **members):
    return {"id": id, "type": "function",
            "function": {"name": name, "arguments": arguments}, **members}


def msg(text, calls, **members):
    return {"role": "assistant", "content": text, "tool_calls": calls, **members}


def tmsg(id, text): return {"role": "tool", "tool_call_id": id, "content": text}
def part(text): return {"type": "text", "text": text}
def compact(value): return json.dumps(value, separators=(",", ":"))
def encoded(data): return base64.urlsafe_b64encode(data).decode().rstrip("=")
def decoded(text): return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


img = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
IMG = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
PDF = {"type": "base64", "media_type": "application/pdf", "data": "AAAA"}
ADAPTIVE, DISABLED = {"type": "adaptive"}, {"type": "disabled"}
OMITTED = {"type": "adaptive", "display": "omitted"}
WEB_SEARCH = {"type": "web_search_20250305", "name": "web_search", "max_uses": 8}
STRICT = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"],
          "additionalProperties": False}
LOOSE = without(STRICT, "required")  # OpenAI does not accept it as strict


def enabled(budget): return {"type": "enabled", "budget_tokens": budget}
def effort(value): return {"output_config": {"effort": value}}
def output(schema): return {"output_config": {"format": {"type": "json_schema", "schema": schema}}}


def response_format(schema, strict):
    return {"type": "json_schema",
            "json_schema": {"name": "response", "schema": schema, "strict": strict}}


def sent(asked, host="openai", session_id=""):
    """The body as the upstream reads it, checked for the rules that hold for every request."""
    before = copy.deepcopy(asked)
    translation = aiapiproxy.checked_translation(asked, SETTINGS[host], session_id)
    assert asked == before, "the client's own objects are never changed"
    body = json.loads(aiapiproxy.json_bytes(translation.body).decode("ascii"))
    check_conversation(body["messages"])
    whole = aiapiproxy.json_bytes(translation.body)
    for shortcuts in (aiapiproxy.PLAIN, aiapiproxy.SHORTCUTS, aiapiproxy.SHORTCUTS):
        parse = shortcuts.parse_body or aiapiproxy.client_json   # as the server parses it
        encode = shortcuts.encode_body or aiapiproxy.json_bytes
        again = aiapiproxy.checked_translation(parse(json.dumps(asked)), SETTINGS[host], session_id)
        assert encode(again.body) == whole
    return body


def check_conversation(messages):
    """Checks the order and the roles of messages, which hold for every request of a client."""
    owed = []  # ids of calls without their tool message so far
    for before, message in zip([{"role": None}] + messages, messages):
        role = message["role"]
        if role == "tool":
            assert message["tool_call_id"] in owed, "a tool message answers a call right before it"
            owed.remove(message["tool_call_id"])
            assert isinstance(message["content"], str) and message["content"]
            continue
        assert not owed, "every call has its tool message before anything else follows"
        assert role != before["role"], "neighbours of one role are one message"
        assert role != "system" or before["role"] is None, "only the first message is the system's"
        calls = message.get("tool_calls", [])
        assert message["content"] or calls, "no message is empty"
        assert calls or "tool_calls" not in message
        owed = [each["id"] for each in calls]
        assert len(set(owed)) == len(owed), "ids in one message are different"
    assert not owed


# ---- Answers

def completion(message=None, finish="stop", usage=None, **choice):
    """A Chat Completions answer with one choice."""
    answer = {"id": "chatcmpl-1", "object": "chat.completion", "model": "gpt-4o-2024-08-06",
              "choices": [{"index": 0, "message": {"role": "assistant", **(message or {})},
                           "finish_reason": finish, **choice}]}
    return answer if usage is None else {**answer, "usage": usage}


def calling(*calls, content=None, **members):
    return {"content": content, "tool_calls": list(calls), **members}


def used(prompt, generated, **more):
    return {"prompt_tokens": prompt, "completion_tokens": generated, **more}


def new_ids():
    """Ids in place of random ones: all different, and the same in each run."""
    count = itertools.count(1)
    return lambda length: str(next(count)).zfill(length)


def readable(made):
    """An id or a signature of the proxy, without its random part and with its payload decoded."""
    if re.fullmatch(r"toolu_\d{24}", made):
        return "toolu_new"
    carried = re.fullmatch(r"toolu_([rx])[A-Za-z0-9]{6}_(.+)|aap1\.([crdn])\.(.*)", made)
    if not carried:
        return made
    id_kind, id_payload, kind, payload = carried.groups()
    if id_kind == "r":
        return f"toolu_r({decoded(id_payload).decode()})"
    if id_kind == "x":
        return f"toolu_x({zlib.decompress(decoded(id_payload)).decode()})"
    return made if not payload else f"aap1.{kind}.({zlib.decompress(decoded(payload)).decode()})"


def whole_message(answer, translation):
    """The message for a client that wants no stream, of an upstream that answers in plain JSON."""
    writer = aiapiproxy.MessageWriter(translation, new_ids())
    translator = aiapiproxy.StreamTranslator(translation, new_ids(), writer)
    assert translator.whole(json.dumps(answer).encode()) == b""
    return writer.message


def translator_of(translation, new_id, shortcuts=aiapiproxy.PLAIN):
    """A translator for a client that wants events."""
    writer = aiapiproxy.EventWriter(translation, new_id)
    return aiapiproxy.StreamTranslator(translation, new_id, writer, shortcuts)


def answered(answer, asked, host="openai"):
    """The Anthropic message made of a completion, ids and signatures readable."""
    translation = aiapiproxy.checked_translation(asked, SETTINGS[host])
    message = whole_message(answer, translation)
    aiapiproxy.json_bytes(message).decode("ascii")
    message["content"] = [{name: readable(value) if name in ("id", "signature") else value
                           for name, value in block.items()} for block in message["content"]]
    return message


# ---- Streams: chunks in

def chunk(delta, finish=None, **choice):
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish, **choice}]}


def entry(index, id, name, arguments):
    """One entry of a delta's tool_calls; None is absent."""
    function = {"name": name, "arguments": arguments}
    found = {"index": index, "id": id, "function": {key: value for key, value in function.items()
                                                    if value is not None}}
    return {key: value for key, value in found.items() if value is not None}


def ctext(text): return chunk({"content": text})
def creason(text): return chunk({"reasoning_content": text})
def frag(*each): return chunk({"tool_calls": [entry(*each)]})
def frags(*entries): return chunk({"tool_calls": [entry(*each) for each in entries]})
def cend(reason): return chunk({}, reason)


def cuse(prompt, generated, **more):
    return {"choices": [], "usage": used(prompt, generated, **more)}


DONE = "[DONE]"
ROLE = chunk({"role": "assistant", "content": ""})


def sse(chunks):
    """The upstream's stream: chunks as JSON, strings as they are."""
    return b"".join(f"data: {each if isinstance(each, str) else compact(each)}\n\n".encode()
                    for each in chunks)


# ---- Streams: events out
#
#   MS message_start    0+text block start    0t".." text    0h".." thinking    0s".." signature
#   0j`..` input JSON   0- block stop   MD(reason) message_delta   ME message_stop   ERR(type) error
#
# The ping after message_start is always sent and is not written here; a later one would be PING.

DELTAS = {"text_delta": ("text", "text", "t"), "thinking_delta": ("thinking", "thinking", "h"),
          "signature_delta": ("thinking", "signature", "s"),
          "input_json_delta": ("tool_use", "partial_json", "j")}
LAST_DELTAS = {"text": ["text_delta"], "thinking": ["signature_delta"],
               "tool_use": [None, "input_json_delta"]}


def events(raw):
    """The data of each event, which has to be two lines of ASCII with LF, and an empty line."""
    *pieces, rest = raw.decode("ascii").split("\n\n")
    assert rest == "", "the last event is complete"
    found = []
    for piece in pieces:
        name, data = re.fullmatch(r"event: ([a-z_]+)\ndata: (\{.*\})", piece).groups()
        found.append(json.loads(data))
        assert found[-1]["type"] == name and "\r" not in piece
    check_order(found)
    return found


def check_order(found):
    """Checks the order of events: the SDKs lose text, or crash, where a stream breaks it."""
    kinds = [event["type"] for event in found]
    assert kinds[:2] == ["message_start", "ping"] and kinds.count("message_start") == 1
    message = found[0]["message"]
    assert (re.fullmatch(r"msg_[A-Za-z0-9]{24}", message["id"])
            and message["usage"]["input_tokens"] >= 1)
    assert without(message, "id", "model") == {
        "type": "message", "role": "assistant", "content": [],
        "stop_reason": None, "stop_sequence": None, "stop_details": None,
        "usage": {"input_tokens": message["usage"]["input_tokens"], "output_tokens": 0,
                  "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}}
    if kinds[-1] == "error":
        assert "message_delta" not in kinds and "message_stop" not in kinds
        assert kinds.count("error") == 1 and found[-1]["error"].keys() == {"type", "message"}
    else:
        assert kinds[-2:] == ["message_delta", "message_stop"] and kinds.count("message_delta") == 1
        assert kinds.count("message_stop") == 1
        assert {"input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens",
                "output_tokens"} <= found[-2]["usage"].keys()
        assert found[-2]["delta"].keys() == {"stop_reason", "stop_sequence", "stop_details"}
    block, index, last, ids = None, -1, None, []
    for event in found:
        if event["type"] == "content_block_start":
            assert block is None, "one block is open at a time"
            block, index, last = event["content_block"], index + 1, None
            assert event["index"] == index, "indexes have no gaps"
            if block["type"] == "tool_use":
                assert block["input"] == {} and block["name"] and block["id"] not in ids
                ids.append(block["id"])
            else:
                assert block in ({"type": "text", "text": ""},
                                 {"type": "thinking", "thinking": "", "signature": ""})
        elif event["type"] == "content_block_delta":
            kind, member, _ = DELTAS[event["delta"]["type"]]
            assert (event["index"] == index and block and kind == block["type"]
                    and last != "signature_delta")
            assert event["delta"].keys() == {"type", member} and event["delta"][member]
            last = event["delta"]["type"]
        elif event["type"] == "content_block_stop":
            assert event["index"] == index and block and last in LAST_DELTAS[block["type"]]
            block = None
        elif event["type"] in ("message_delta", "message_stop"):
            assert block is None


def notation(event):
    kind, index = event["type"], event.get("index")
    if kind == "content_block_start":
        block = event["content_block"]
        name = (f"tool({readable(block['id'])},{block['name']})" if "name" in block
                else block["type"])
        return f"{index}+{name}"
    if kind == "content_block_delta":
        _, member, letter = DELTAS[event["delta"]["type"]]
        text = event["delta"][member]
        return f"{index}{letter}" + (f"`{text}`" if letter == "j" else
                                     json.dumps(readable(text) if letter == "s" else text,
                                                ensure_ascii=False))
    if kind == "message_delta":
        found = event["delta"]["stop_sequence"]
        sequence = "" if found is None else f",{json.dumps(found)}"
        return f"MD({event['delta']['stop_reason']}{sequence})"
    return {"message_start": "MS", "content_block_stop": f"{index}-", "message_stop": "ME",
            "ping": "PING", "error": f"ERR({event.get('error', {}).get('type')})"}[kind]


def printed(raw):
    """The events in the notation above."""
    return " ".join(notation(event) for event in events(raw)).replace("MS PING", "MS", 1)


BOTH_WAYS = pytest.mark.parametrize("shortcuts", [aiapiproxy.PLAIN, aiapiproxy.SHORTCUTS],
                                    ids=["plain", "short"])


def streamed(pieces, translation, shortcuts=aiapiproxy.PLAIN):
    """The events of a stream that arrives in these pieces, or the HTTP status of an early error."""
    translator = translator_of(translation, new_ids(), shortcuts)
    out = []
    try:
        for piece in pieces:
            if not translator.done:
                out.append(translator.feed(piece))
        if not translator.done:
            out.append(translator.finish())
    except aiapiproxy.ProxyError as error:
        assert not translator.started and not b"".join(out), "after the start an error is an event"
        return f"HTTP {error.status} {error.kind}"
    assert translator.started and translator.done
    return b"".join(out)


ODD = [None, True, 0, -1, 1.5, "", "x", [], {}, [None], {"type": None}, {"type": "text"},
       {"x": [{}]}, "\ud83d", [{"type": "text", "text": 5}], 10 ** 30]


def spoiled(value, dice):
    """A copy in which one member, at any depth, is missing or has a value of the wrong kind."""
    value = copy.deepcopy(value)
    places = [(parent, key) for parent in containers(value) for key in (
        parent if isinstance(parent, dict) else range(len(parent)))]
    parent, key = dice.choice(places)
    if dice.random() < 0.2:
        del parent[key]
    else:
        parent[key] = dice.choice(ODD)
    return value


def containers(value):
    """The objects and lists that are not empty, at every depth."""
    if isinstance(value, (dict, list)) and value:
        yield value
        for each in value.values() if isinstance(value, dict) else value:
            yield from containers(each)


def every_split(raw):
    """The ways in which bytes may arrive: whole, one by one, and cut in two at every place."""
    yield [raw]
    yield [raw[at:at + 1] for at in range(len(raw))]
    for at in range(1, len(raw)):
        yield [raw[:at], raw[at:]]


def check_stream(raw, want, asked, host="openai", shortcuts=aiapiproxy.PLAIN):
    translation = aiapiproxy.checked_translation(asked, SETTINGS[host])
    seen = None
    for pieces in every_split(raw):
        out = streamed(pieces, translation, shortcuts)
        if out != seen:  # printed() is slow: once for equal bytes
            found = out if isinstance(out, str) else printed(out)
            assert found == want, f"in {len(pieces)}: {pieces[0]!r}"
        seen = out


# ---- Usage and chunks that several sections need

def usage(input, generated, read=0, written=0, tier=None, **details):
    return {"input_tokens": input, "cache_creation_input_tokens": written,
            "cache_read_input_tokens": read, "output_tokens": generated, "service_tier": tier,
            **details}


def cached(count, **more): return {"prompt_tokens_details": {"cached_tokens": count, **more}}


CLOSED = "0- MD(end_turn) ME"
HELLO = 'MS 0+text 0t"Hel" 0t"lo" ' + CLOSED
ONE_X = 'MS 0+text 0t"x" ' + CLOSED
BROKEN = 'MS 0+text 0t"x" ERR(api_error)'
TOOL = "MS 0+tool(call_1,f)"
ONE_TOOL = TOOL + ' 0j`{"a":1}` 0- MD(tool_use) ME'
WHOLE = frag(0, "call_1", "f", '{"a":1}')
ARGS_DONE = [cend("tool_calls"), DONE]
STOP = [cend("stop"), DONE]
BOM = b"\xef\xbb\xbf"
SIMPLE = sse([ROLE, ctext("Hel"), ctext("lo"), cend("stop"), cuse(5, 3), DONE])


def blocks_of(raw, parse=json.loads):
    """The content of the message that a client makes of the events."""
    blocks, texts = [], []
    for event in events(raw):
        if event["type"] == "content_block_start":
            blocks.append(dict(event["content_block"]))
        elif event["type"] == "content_block_delta":
            member = DELTAS[event["delta"]["type"]][1]
            if member == "partial_json":
                texts.append(event["delta"][member])
            else:
                blocks[-1][member] += event["delta"][member]
        elif event["type"] == "content_block_stop" and blocks[-1]["type"] == "tool_use":
            blocks[-1]["input"], texts = parse("".join(texts) or "{}"), []
    return blocks


def deferred(name): return tool(name, defer_loading=True)
def reference(name): return {"type": "tool_reference", "tool_name": name}
def note(names): return f"Not available in this session: {names}. Do not claim to have used them."


def choice(kind, name=None, **members):
    named = {} if name is None else {"name": name}
    return {"tool_choice": {"type": kind, **named, **members}}


def reminder(text): return f"<system-reminder>\n{text}\n</system-reminder>"
def billing(text): return txt(f"x-anthropic-billing-header: {text}")


ASKED, CALLED = [usr("a"), asst([use("call_1")])], [usr("a"), msg(None, [call("call_1")])]
EXTRA = {"google": {"thought_signature": "sig"}}


def conversation_with(id):
    return ([usr("a"), asst([use(id)]), usr([res(id, "ok")])],
            [usr("a"), msg(None, [call(id)]), tmsg(id, "ok")])


SEARCH_RESULT = {"type": "search_result", "title": "T", "source": "S",
                 "content": [txt("a"), txt("b")]}


def inside(schema): return {"type": "object", "properties": {"a": schema}}


# The first request of a Claude Code session: an attribution header, a system message after the
# user's, and deferred tools.
SESSION = {
    "model": "claude-opus-5-5", "max_tokens": 128000, "stream": True,
    "thinking": {"type": "adaptive", "display": "updates"},
    "system": [billing("cc_version=2.1.154.d3f; cc_entrypoint=cli; cch=0a1b2;"),
               {**txt("You are the client."), "cache_control": {"type": "ephemeral"}},
               {**txt("Work well."), "cache_control": {"type": "ephemeral", "ttl": "1h"}}],
    "messages": [usr([txt("<system-reminder>\nContext.\n</system-reminder>"),
                      {**txt("Read it."), "cache_control": {"type": "ephemeral"}}]),
                 sysm([txt("Be careful.")], output_config={"effort": "medium"})],
    "tools": [tool("Read", {"$schema": "https://json-schema.org/draft/2020-12/schema", **STRICT}),
              tool("ToolSearch"), deferred("DeferredToolPlaceholder"), deferred("WebFetch"),
              deferred("TaskCreate"), tool("Bash", eager_input_streaming=True)],
    "metadata": {"user_id": "{\"device\":\"d\"}"}, "output_config": {"effort": "high"},
    "safeguards": [{"type": "x"}],
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
}


class Exactly(dict):
    """All members of a body; a plain dict has some of them, and None stands for "not sent"."""


def check_body(body, want):
    assert (body if isinstance(want, Exactly) else {name: body.get(name) for name in want}) == want


PLAIN = {"model": "gpt-4o", "messages": [usr("Hi")], "max_tokens": 100}
STREAMED = {**PLAIN, "stream": True, "stream_options": {"include_usage": True}}
ENDING = {"stop_sequences": ["END"]}
CALL, TEXT = calling(call("call_1")), {"content": "x"}
DETAILS = [{"type": "reasoning.text", "text": "t", "index": 0}]
THINKING, HIDDEN = {"thinking": ADAPTIVE}, {"thinking": OMITTED}
only_x = txt("x")
ONE_CALL_AT_MOST = {"tools": [tool("f")], **choice("auto", disable_parallel_tool_use=True)}
NOT_FOUND = "404 not_found_error: "
MAXIMUM = "This model's maximum context length is"
TOO_LONG = "400 invalid_request_error: prompt is too long: "


def error_like(code, message="m"): return {"error": {"message": message, "code": code}}


JSON_ERROR = {"error": {"message": "bad", "type": "invalid_request_error"}}


# ---- Servers that play a script
#
# `ScriptedServer` is the base of all fakes.  It plays one answer for each request, and the last one
# for all further requests.  An answer is bytes, or a list of parts: bytes to send, gates
# (asyncio.Event) to wait for, pauses in seconds, and at last its end: complete, by a reset of the
# connection, too early, or never.  Tests don't sleep for a fixed time: they wait until something is
# true.

END, RESET, CUT, HANG = "END", "RESET", "CUT", "HANG"


def within(seconds, coroutine):
    """The result of a coroutine, or a failure when its time is over."""
    return asyncio.run(asyncio.wait_for(coroutine, seconds))


def run(coroutine):
    return within(5, coroutine)


def framed(data):
    """Data as one chunk."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def reply_head(status, length=None, **headers):
    """The head of an answer; without a length its body has to be chunked."""
    framing = "transfer-encoding: chunked" if length is None else f"content-length: {length}"
    lines = [f"HTTP/1.1 {status} Status", framing,
             *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def reply(status, body, content_type="application/json", **headers):
    """A whole body: JSON, text or bytes."""
    raw = (body if isinstance(body, bytes) else body.encode() if isinstance(body, str)
           else json.dumps(body).encode())
    return [reply_head(status, len(raw), content_type=content_type, **headers), raw, END]


def stream(*parts, **headers):
    """An SSE body: chunks, bytes, gates, an ending."""
    parts = [sse([part]) if isinstance(part, dict) or part == DONE else part for part in parts]
    *parts, ending = parts if parts[-1:] and isinstance(parts[-1], str) else [*parts, END]
    return [reply_head(200, content_type="text/event-stream", **headers),
            *(framed(part) if isinstance(part, bytes) else part for part in parts),
            *([b"0\r\n\r\n"] if ending == END else []), ending]


class Heard:
    """A request that a server got."""

    def __init__(self, head, body):
        self.head, self.raw = head.decode("latin-1"), body
        self.line, *fields = self.head.rstrip().split("\r\n")
        self.headers = {name.lower(): value.strip()
                        for name, _, value in (field.partition(":") for field in fields)}

    @property
    def body(self):
        return json.loads(self.raw)


class WatchedReader(asyncio.StreamReader):
    """A reader that cancels the task that serves its connection as soon as the client is gone."""

    task = None

    def feed_eof(self):
        super().feed_eof()
        if self.task is not None:
            self.task.cancel()

    def set_exception(self, exc):
        super().set_exception(exc)
        self.feed_eof()


class ScriptedServer:
    """A server on 127.0.0.1 that plays its script and records its requests.

    `connections` has the tasks of those that are open, `opened` counts all of them, `written` the
    bytes of answers.  A fault of the server itself fails the test when the server is closed.
    """

    def __init__(self, *script, tls=None):
        self.script, self.tls, self.connections, self.faults = list(script), tls, set(), []
        self.requests, self.opened, self.written = [], 0, 0
        self.asked, self.disconnected = asyncio.Event(), asyncio.Event()

    async def start(self):
        self.server = await asyncio.get_running_loop().create_server(
            lambda: asyncio.StreamReaderProtocol(WatchedReader(), self.serve), "127.0.0.1", 0,
            ssl=self.tls)
        self.port = self.server.sockets[0].getsockname()[1]
        self.url = f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}/v1"
        return self

    async def close(self):
        self.server.close()
        for connection in self.connections:
            connection.cancel()
        await asyncio.gather(*self.connections, return_exceptions=True)
        assert self.faults == []

    @property
    def heads(self):
        return [heard.head for heard in self.requests]

    async def __aenter__(self):
        return await self.start()

    async def __aexit__(self, *_):
        await self.close()

    async def serve(self, reader, writer):
        """Serves one connection, until an answer or the client ends it."""
        task = reader.task = asyncio.current_task()
        self.connections.add(task)
        self.opened += 1
        answers = self.answers()
        try:
            is_open = True
            while is_open:
                self.requests.append(await self.request(reader))
                self.asked.set()
                is_open = await self.play(next(answers), reader, writer)
        except (OSError, EOFError, asyncio.CancelledError):
            pass
        except Exception as fault:
            self.faults.append(fault)
        finally:
            self.disconnected.set()
            self.connections.discard(task)
            writer.close()

    def answers(self):
        """The answers for a connection, each one taken when its request has arrived."""
        while True:
            yield self.taken()

    def taken(self):
        """The next part of the script; its last one is used again and again."""
        return self.script.pop(0) if len(self.script) > 1 else self.script[0]

    async def request(self, reader):
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: *(\d+)", head)
        return Heard(head, await reader.readexactly(int(length[1]) if length else 0))

    async def play(self, answer, reader, writer):
        """Whether the connection can be used again."""
        parts = answer if isinstance(answer, list) else [answer]
        for part in parts:
            if isinstance(part, asyncio.Event):
                await part.wait()
            elif isinstance(part, float):
                await asyncio.sleep(part)
            elif isinstance(part, bytes):
                await self.write(part, writer)
            elif part == RESET:
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                                                           struct.pack("ii", 1, 0))
                writer.transport.abort()
            elif part == HANG:
                await reader.read(-1)
        return parts[-1] not in (RESET, CUT, HANG)

    async def write(self, data, writer):
        for at in range(0, len(data), 65536):
            writer.write(data[at:at + 65536])
            await writer.drain()
            self.written += len(data[at:at + 65536])


class RawUpstream(ScriptedServer):
    """A server whose script has a list of answers for each connection, or a single one.

    The last list is for all further connections.  A connection is closed after its last answer.
    """

    def answers(self):
        script = self.taken()
        answers = [answer if isinstance(answer, list) else [answer]
                   for answer in (script if isinstance(script, list) else [script])]
        answers[-1] = [*answers[-1], CUT]
        return iter(answers)


# ---- The proxy and its clients
#
# `proxied`, `bare` and `facing` start the proxy.  `Wire` is a client that sends any bytes and reads
# answers one by one; `Asking` sends one request.

@contextlib.asynccontextmanager
async def running(settings):
    """The proxy itself, on a free port."""
    server = aiapiproxy.Service(settings, recorder=aiapiproxy.Recording)
    await server.start()
    try:
        yield server
    finally:
        await server.drain(0)


@contextlib.asynccontextmanager
async def proxied(*replies, **environ):
    """An upstream that plays these replies, and the proxy in front of it."""
    async with ScriptedServer(*replies) as upstream:
        settings = aiapiproxy.load_settings({"OPENAI_API_KEY": KEY, **MODELS,
                                             "OPENAI_BASE_URL": upstream.url,
                                             **environ}, server_port=0)
        async with running(settings) as server:
            yield upstream, server


@contextlib.asynccontextmanager
async def bare(**environ):
    """The proxy in front of a port where nobody listens."""
    settings = aiapiproxy.load_settings({"OPENAI_API_KEY": KEY,
                                         "OPENAI_BASE_URL": "http://127.0.0.1:1/v1",
                                         **environ}, server_port=0)
    async with running(settings) as server:
        yield server


@contextlib.asynccontextmanager
async def facing(*scripts, **environ):
    """The proxy in front of a RawUpstream."""
    async with RawUpstream(*scripts) as upstream:
        async with bare(**{"OPENAI_BASE_URL": upstream.url, **environ}) as server:
            yield upstream, server


class Wire:
    """A connection to the proxy, byte by byte."""

    def __init__(self, port):
        self.port, self.data = port, b""

    async def __aenter__(self):
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port,
                                                                 limit=2 ** 20)
        return self

    async def __aexit__(self, *_):
        self.writer.transport.abort()

    async def send(self, data, piece=0):
        for at in range(0, len(data), piece or len(data) or 1):
            self.writer.write(data[at:at + (piece or len(data))])
            await self.writer.drain()
            await asyncio.sleep(0)

    async def more(self):
        piece = await self.reader.read(65536)
        self.data += piece
        return piece

    async def answer(self, has_body=True):
        """(status, headers, body) of the next answer; a missing end is a failure."""
        while b"\r\n\r\n" not in self.data:
            assert await self.more(), f"no answer: {self.data!r}"
        head, _, self.data = self.data.partition(b"\r\n\r\n")
        line, *fields = head.decode("latin-1").split("\r\n")
        assert re.fullmatch(r"HTTP/1\.1 [1-5]\d\d [A-Za-z -]+", line), line
        headers = {}
        for field in fields:
            name, _, value = field.partition(": ")
            assert re.fullmatch(r"[a-z0-9-]+", name) and name not in headers, field
            headers[name] = value
        status = int(line.split()[1])
        if status == 100:
            return status, headers, b""
        assert re.fullmatch(r"req_[A-Za-z0-9]{24}", headers["request-id"]) and "date" in headers
        assert "server" not in headers
        if not has_body or status == 204:
            return status, headers, b""
        if "transfer-encoding" in headers:
            assert headers["transfer-encoding"] == "chunked" and "content-length" not in headers
            while not self.data.endswith(b"0\r\n\r\n"):
                assert await self.more(), "the last chunk is missing"
            body, self.data = unchunked(self.data), b""
        elif "content-length" in headers:
            length = int(headers["content-length"])
            while len(self.data) < length:
                assert await self.more(), "the body ended early"
            body, self.data = self.data[:length], self.data[length:]
        else:
            assert headers["connection"] == "close"
            body, self.data = self.data + await self.reader.read(-1), b""
        return status, headers, body

    async def end(self):
        """The connection ends here, without another byte."""
        with contextlib.suppress(ConnectionError):
            while await self.more():
                pass
        assert self.data == b""


class Asking(Wire):
    """One request to the proxy over a connection of its own, its answer read piece by piece."""

    def __init__(self, port, method, path, body=None, **headers):
        super().__init__(port)
        raw = (b"" if body is None else body if isinstance(body, bytes)
               else json.dumps(body).encode())
        fields = {"host": f"127.0.0.1:{port}", "connection": "close", "content-length": len(raw),
                  **{name.replace("_", "-"): value for name, value in headers.items()}}
        lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        self.request = f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode() + raw
        self.has_body = method != "HEAD"

    async def __aenter__(self):
        await super().__aenter__()
        self.writer.write(self.request)
        return self

    async def until(self, text):
        while text not in self.data:
            assert await self.more(), f"the answer ended before {text!r}: {self.data!r}"

    async def answer(self):
        """Status, headers and body, once the proxy has closed the connection."""
        self.data += await self.reader.read(-1)
        found = await super().answer(self.has_body)
        assert self.data == b"", "nothing follows the answer"
        return found


def unchunked(raw):
    body = b""
    while True:
        size, _, raw = raw.partition(b"\r\n")
        length = int(size, 16)
        body, end, raw = body + raw[:length], raw[length:length + 2], raw[length + 2:]
        assert end == b"\r\n"
        if not length:
            assert not raw, "nothing follows the last chunk"
            return body


async def ask(port, method="POST", path="/v1/messages", body=None, **headers):
    async with Asking(port, method, path, body, **headers) as asking:
        return await asking.answer()


def said(answer):
    """An answer of the proxy as a message or a line; the envelope of an error is checked."""
    status, headers, body = answer
    if headers["content-type"].startswith("text/event-stream"):
        return printed(body)
    found = json.loads(body)
    if found["type"] != "error":
        return found
    assert found["request_id"] == headers["request-id"]
    assert re.fullmatch(r"req_[A-Za-z0-9]{24}", found["request_id"])
    assert headers["content-type"] == "application/json"
    assert found["error"].keys() <= {"type", "message", "details"}
    return f"{status} {found['error']['type']}: {found['error']['message']}"


async def asked_once(script, asked, **environ):
    """The answer to one request, and the requests that the upstream got for it."""
    async with proxied(script, **environ) as (upstream, server):
        return await ask(server.port, body=asked), upstream.requests


OK = reply(200, completion({"content": "Hello"}, usage=used(10, 2)))
X_ONLY = [ctext("x"), cend("stop"), cuse(5, 3), DONE]


def error_reply(message, param=None, code=None, status=400):
    return reply(status, {"error": {"message": message, "param": param, "code": code}})


# ---- Requests that are bytes
#
# Each hostile request is followed by SMUGGLED, which must never be answered.

def checked(answer):
    """An answer's status and kind of error; the envelope is Anthropic's."""
    status, headers, body = answer
    assert status != 500, body
    if status < 400:
        return str(status)
    found = json.loads(body)
    assert found.keys() == {"type", "error", "request_id"} and found["type"] == "error"
    assert found["request_id"] == headers["request-id"] and found["error"]["message"]
    assert headers["content-type"] == "application/json"
    return f"{status} {found['error']['type']}"


def GET(path="/health", *fields, version="HTTP/1.1", host="Host: 127.0.0.1"):
    return HTTP(f"GET {path} {version}", *fields, host=host)


def POST(*fields, body=b"", host="Host: 127.0.0.1", path="/v1/messages/count_tokens"):
    return HTTP(f"POST {path} HTTP/1.1", *fields, host=host) + body


def HTTP(line, *fields, host="Host: 127.0.0.1"):
    lines = [each if isinstance(each, bytes) else each.encode("latin-1")
             for each in (line, *([host] if host else []), *fields)]
    return b"\r\n".join(lines) + b"\r\n\r\n"


def chunks(*sizes_and_data, end=b"0\r\n\r\n"):
    return POST("Transfer-Encoding: chunked", body=b"".join(sizes_and_data) + end)


HI = json.dumps(req()).encode()
CHUNKED_HI = b"%x\r\n%b\r\n" % (len(HI), HI)
BAD, KIND = "400 invalid_request_error", "invalid_request_error"


def basic(password, user="me"):
    return "Authorization: Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def descriptors():
    return len(os.listdir("/dev/fd"))


# ---- Answers that are bytes, also such that break HTTP

def raw_answer(body, *fields, status=200, length=True):
    """The bytes of an answer."""
    lines = [f"HTTP/1.1 {status} X", *fields, *([f"Content-Length: {len(body)}"] if length else [])]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


FINE = json.dumps(completion({"content": "x"}, usage=used(5, 3))).encode()
FINE_SSE = sse([ctext("x"), cend("stop"), cuse(5, 3), DONE])
JSON_TYPE = "Content-Type: application/json"
KEPT = raw_answer(FINE)


def shown(answer):
    """The text of a message, streamed or not, or the status and message of an error."""
    status, headers, body = answer
    if headers["content-type"].startswith("text/event-stream"):
        return "".join(event["delta"].get("text", "") for event in events(body)
                       if event["type"] == "content_block_delta")
    found = json.loads(body)
    if status == 200:
        return "".join(block["text"] for block in found["content"])
    checked_kind = found["error"]["type"]
    assert checked_kind and found["request_id"] == headers["request-id"]
    return f"{status}: {found['error']['message']}"


@contextlib.contextmanager
def packet_hole():
    """The URL of a host that drops packets, because its backlog is full."""
    with contextlib.ExitStack() as stack:
        hole, *fillers = [stack.enter_context(socket.socket()) for _ in range(5)]
        hole.bind(("127.0.0.1", 0))
        hole.listen(0)
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(hole.getsockname())
        yield f"http://127.0.0.1:{hole.getsockname()[1]}/v1"


# ---- The program as a process
#
# `Program` starts it with a clean environment in an empty folder and reads its output line by line.
# A process that hangs is killed after 20 s, so no test waits forever.

PATCHED = "import sys, aiapiproxy; {}; sys.exit(aiapiproxy.main(sys.argv[1:]))"


class Program:
    """A process of the proxy; `patch` is code that first changes its constants."""

    def __init__(self, folder, *arguments, patch="", stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                 before=None, **environ):
        path = os.path.abspath(aiapiproxy.__file__)
        command = [sys.executable, "-c", PATCHED.format(patch)] if patch else [sys.executable, path]
        environ = {"PATH": os.environ["PATH"], "PYTHONPATH": os.path.dirname(path),
                   "PYTHONDONTWRITEBYTECODE": "1", "OPENAI_API_KEY": KEY,
                   "OPENAI_BASE_URL": "http://127.0.0.1:1/v1", **environ}
        self.process = subprocess.Popen([*command, *arguments], cwd=str(folder), env=environ,
                                        stdout=stdout, stderr=stderr, stdin=subprocess.DEVNULL,
                                        preexec_fn=before)
        self.timer = threading.Timer(20, self.process.kill)
        self.timer.start()
        self.lines, self.port = [], 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.timer.cancel()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for file in (self.process.stdout, self.process.stderr):
            if file is not None:
                file.close()

    def until(self, event, file=None):
        """The line of an event; each line before it is JSON too."""
        file = file or self.process.stdout
        while True:
            line = file.readline()
            assert line, f"ended before {event}: {self.lines}"
            self.lines.append(json.loads(line))
            if self.lines[-1]["event"] == event:
                return self.lines[-1]

    def started(self):
        self.port = int(self.until("started")["address"].rpartition(":")[2])
        return self

    def signal(self, number):
        self.process.send_signal(number)

    def serves(self):
        with contextlib.suppress(OSError):
            return self.get()[0] == 200
        return False

    def end(self):
        """(exit code, the rest of stdout, the rest of stderr)."""
        out, err = self.process.communicate()
        return self.process.returncode, (out or b"").decode(), (err or b"").decode()

    def get(self, path="/health", method="GET", body=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def streaming(self):
        """A stream that has begun: (connection, answer, its first bytes)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        connection.request("POST", "/v1/messages", json.dumps(req(stream=True)))
        answer = connection.getresponse()
        start = b""
        while b"text_delta" not in start:
            piece = answer.read1(65536)
            assert piece, (answer.status, start)
            start += piece
        return connection, answer, start


# A patch: the name server does not answer for one name.
STUCK_LOOKUP = ("import socket, time; real = socket.getaddrinfo; socket.getaddrinfo = lambda host, "
                "*a, **k: time.sleep(60) if host == 'stuck.example' else real(host, *a, **k)")


@contextlib.contextmanager
def narrow_pipe():
    """A pipe that takes 8 KiB where its size can be set; its two ends."""
    reader, writer = os.pipe()
    with contextlib.suppress(AttributeError):
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ if sys.version_info >= (3, 10) else 1031, 8192)
    try:
        yield reader, writer
    finally:
        for descriptor in (reader, writer):
            with contextlib.suppress(OSError):
                os.close(descriptor)


@contextlib.contextmanager
def hanging_upstream():
    """The URL of a server, in a thread, that begins each stream and never ends it."""
    async def started():
        return await ScriptedServer(stream(ctext("x"), HANG)).start()

    def result(coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(5)

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    server = result(started())
    try:
        yield server.url
    finally:
        result(server.close())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


OWNER, TEAM = "sk-owner-0123456789abcdef", "team-key-0123456789"


@contextlib.contextmanager
def answering_upstream():
    """A server in a thread that says x to each POST: its URL, and (headers, body) of each."""
    got = []

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            got.append((self.headers, json.loads(body)))
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(FINE)))
            self.end_headers()
            self.wfile.write(FINE)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", got
    finally:
        server.shutdown()
        server.server_close()


class Owned:
    """A program whose settings all stand in its .env, and the upstream that it spends money at."""

    LINES = {"OPENAI_API_KEY": OWNER, "ALLOWED_ORIGINS": "https://good.example"}

    def __init__(self, folder, **more):
        self.stack, self.file, self.more = contextlib.ExitStack(), folder / ".env", more

    def __enter__(self):
        url, self.got = self.stack.enter_context(answering_upstream())
        self.lines = {**self.LINES, "OPENAI_BASE_URL": url, "PROXY_API_KEY": TEAM}
        self.write(self.lines)
        self.program = self.stack.enter_context(Program(
            self.file.parent, "--port", "0", OPENAI_API_KEY="", OPENAI_BASE_URL="", **self.more))
        self.program.started()
        return self

    def __exit__(self, *_):
        self.stack.close()

    def write(self, lines):
        self.file.write_text("".join(f"{name}={text}\n" for name, text in lines.items()))
        self.file.chmod(0o600)

    def failure(self):
        """The message of a reload that changes nothing."""
        self.program.signal(signal.SIGHUP)
        line = self.program.until("reload_failed", self.program.process.stderr)
        assert line["level"] == "error"
        return line["message"]

    def post(self, key, **headers):
        return self.program.get("/v1/messages", "POST", json.dumps(req()),
                                **{"x-api-key": key, **headers})[0]

    def asserts_that_nothing_is_looser(self):
        assert [self.post("wrong"), self.post(TEAM), self.post(TEAM, Origin="https://evil.example"),
                self.program.get("/status")[0]] == [401, 200, 403, 401]
        assert [headers["authorization"] for headers, _ in self.got] == [f"Bearer {OWNER}"]
        self.got.clear()


def wait_for(fact):
    """Waits until something outside of this process is true, 10 s at most."""
    end = time.monotonic() + 10
    while not fact():
        assert time.monotonic() < end, "it is not true after 10 s"
        threading.Event().wait(0.01)


def free_port():
    """A free port, below those that the system gives to outgoing connections."""
    while True:
        address = ("127.0.0.1", random.randrange(20000, 30000))
        with contextlib.suppress(OSError), socket.create_server(address) as free:
            return free.getsockname()[1]


def children(pid):
    listing = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], stdout=subprocess.PIPE,
                             check=True).stdout.decode()
    return {int(child) for child, parent in (line.split() for line in listing.splitlines())
            if int(parent) == pid}


def is_alive(pid):
    try:
        os.kill(pid, 0)
        return True
    except ProcessLookupError:
        return False


# ============================================================================
# 2. JSON
# ============================================================================

MANY_TOOLS = compact([{"name": f"tool_{place}", "description": 'says "so"\n' * 20, "input_schema": {
    "type": "object", "properties": {"a": {"type": "string", "default": "x"}}}}
    for place in range(4)])


@table([
    ("as clients send them", '{"model":"m","messages":[],"tools":%s,"stream":true}'),
    ("as the only member", '{"tools":%s}'),
    ("inside a message, before the true ones", '{"messages":[{"input":{"tools":%s}}],"tools":[1]}'),
    ("inside a message, behind the true ones", '{"tools":[1],"messages":[{"input":{"tools":%s}}]}'),
    ("inside a message, the same as the true ones",
     '{"tools":%s,"messages":[{"input":{"tools":%s}}]}'),
    ("only inside a message", '{"messages":[{"input":{"tools":%s}}]}'),
    ("named twice: the last wins", '{"tools":%s,"tools":[1]}'),
    ("named twice, the last the known ones", '{"tools":[1],"tools":%s}'),
    ("named twice, once with a blank", '{"tools":%s,"tools": [1]}'),
    ("with blanks", ' { "tools" : %s } '),
    ("in an array", '[{"tools":%s}]'),
    ("with more behind them than before", '{"tools":%s,"x":"\\"tools\\":[","y":[[],{}]}'),
    ("under a name that ends like theirs", '{"x\\"tools":%s}'),
], "text")
def test_the_same_tools_are_read_the_same_each_time(text):
    text = text.replace("%s", MANY_TOOLS)
    for _ in range(3):
        assert aiapiproxy.client_json(text) == json.loads(text)


def test_tools_that_differ_in_the_type_of_a_number_are_other_tools():
    for value in ("1", "true", "1.0", '"1"', "1", "true"):
        text = '{"tools":' + MANY_TOOLS.replace('"x"', value) + "}"
        (*_, last) = aiapiproxy.client_json(text)["tools"]
        assert compact(last["input_schema"]["properties"]["a"]["default"]) == value


@table([
    ("behind the tools", '{"tools":%s,"x":}'), ("before the tools", '{"x":,"tools":%s}'),
    ("in them", '{"tools":[%s,}'), ("no end", '{"tools":%s'), ("an end too many", '{"tools":%s}}'),
], "text")
def test_broken_json_around_tools_is_told_with_its_place(text):
    text = text.replace("%s", MANY_TOOLS)
    aiapiproxy.client_json('{"tools":' + MANY_TOOLS + "}")
    with pytest.raises(json.JSONDecodeError) as wanted:
        json.loads(text)
    with pytest.raises(aiapiproxy.ProxyError) as found:
        aiapiproxy.client_json(text)
    assert f"(line {wanted.value.lineno}, column {wanted.value.colno})" in found.value.message


NO_JSON = "400 invalid_request_error: Request body is not valid JSON: "

BAD_BODIES = [("no JSON", b"{oops"), ("NaN", b'{"a":NaN}'), ("no UTF-8", b'{"a":"\xff"}'),
              ("too deep", b"[" * 200000), ("a number too long", b'{"a":' + b"1" * 5000 + b"}")]


@table(BAD_BODIES, "raw")
def test_a_body_that_is_no_json(raw):
    answer, requests = run(asked_once(OK, raw))
    assert said(answer).startswith(NO_JSON) and requests == []


def test_a_body_that_is_no_object():
    answer, _ = run(asked_once(OK, b"[]"))
    assert said(answer).startswith("400 invalid_request_error: ")


def test_a_body_with_a_byte_order_mark():
    answer, _ = run(asked_once(OK, BOM + json.dumps(req()).encode()))
    assert answer[0] == 200


def deep(levels, inside): return b'{"a":' * levels + inside + b"}" * levels
def in_request(member): return HI[:-1] + b"," + member + b"}"
def in_schema(value): return b'"tools":[{"name":"a","input_schema":' + value + b"}]"


HOSTILE_JSON = [  # body, what the answer says
    ("100,000 arrays", b"[" * 100000 + b"]" * 100000, BAD),
    ("100,000 objects", deep(100000, b"1"), BAD),
    ("100,000 levels in a request", in_request(b'"metadata":' + deep(100000, b"1")), BAD),
    ("100,000 levels in a tool's input", in_request(in_schema(deep(100000, b"1"))), BAD),
    ("900 levels in a tool's schema", in_request(in_schema(deep(900, b"1"))), "200 or 400"),
    ("NaN", in_request(b'"temperature":NaN'), BAD),
    ("Infinity", in_request(b'"temperature":Infinity'), BAD),
    ("-Infinity", in_request(b'"temperature":-Infinity'), BAD),
    ("1e999", in_request(b'"temperature":1e999'), BAD),
    ("-1e999", in_request(b'"metadata":{"a":-1e999}'), "200 or 400"),
    ("a number of 5,000 digits", in_request(b'"max_tokens":' + b"1" * 5000), BAD),
    ("a number of 4,000 digits", in_request(b'"top_k":' + b"1" * 4000), "200 or 400"),
    ("not UTF-8", in_request(b'"a":"\xff"'), BAD),
    ("UTF-8 of a surrogate", in_request(b'"a":"\xed\xa0\x80"'), BAD),
    ("UTF-8 that is too long", in_request(b'"a":"\xc0\xaf"'), BAD),
    ("UTF-16", HI.decode().encode("utf-16"), BAD),
    ("UTF-8 cut off", HI[:-2] + b"\xe2\x82", BAD),
    ("a BOM", b"\xef\xbb\xbf" + HI, "200"), ("two BOMs", b"\xef\xbb\xbf" * 2 + HI, BAD),
    ("a lone surrogate in a text", HI.replace(b'"Hi"', b'"Hi \\ud83d"'), "200"),
    ("a lone surrogate in a name", HI.replace(b'claude-sonnet-5-5', b'claude-\\udc00'),
     "200 or 400"),
    ("a lone surrogate as a key", in_request(b'"\\ud83d":1'), "200 or 400"),
    ("NUL in a text", HI.replace(b'"Hi"', b'"\\u0000"'), "200"),
    ("equal keys", HI[:-1] + b',"max_tokens":100}', "200"),
    ("nothing", b"", BAD), ("blanks", b" \n ", BAD), ("an array", b"[]", BAD),
    ("a string", b'"a"', BAD), ("a number", b"1", BAD), ("null", b"null", BAD),
    ("half an object", HI[:20], BAD),
    ("two objects", HI + HI, BAD), ("single quotes", b"{'a':1}", BAD),
    ("a comma too much", b'{"a":1,}', BAD), ("a comment", b"{/**/}", BAD),
    ("a raw line feed in a text", b'{"a":"\n"}', BAD),
]


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
@table(HOSTILE_JSON)
def test_hostile_json(given, want, path):
    async def scenario():
        async with proxied(OK) as (_, server), Wire(server.port) as wire:
            await wire.send(POST(f"Content-Length: {len(given)}", body=given, path=path))
            answer = await wire.answer()
            await wire.send(GET())
            assert (await wire.answer())[0] == 200
            return answer

    answer = run(scenario())
    assert checked(answer) in ({"200", BAD} if want == "200 or 400" else {want})
    if b"Infinity" in given or b"NaN" in given:
        assert any(word in answer[2] for word in (b"line", b"NaN", b"Infinity"))


@pytest.mark.parametrize("read", ["client_json", "upstream_json", "model_json"])
def test_a_number_of_very_many_digits_is_malformed_json_on_every_python(read):
    began = time.process_time()
    text = '{"n":%s}' % ("9" * 900_000)
    with pytest.raises((ValueError, aiapiproxy.ProxyError)):
        getattr(aiapiproxy, read)(text)
    assert getattr(aiapiproxy, read)('{"n":-%s}' % ("9" * 4000)) == {"n": -int("9" * 4000)}
    with pytest.raises(ValueError):
        aiapiproxy.bounded_int("9" * 4301)               # for a Python without a bound of its own
    assert time.process_time() - began < 1


# ============================================================================
# 3. MODELS AND HOSTS
# ============================================================================

EFFORTS = [  # model, request members, reasoning_effort
    ("a budget under 4096 is low", "gpt-5", {"thinking": enabled(2000)}, "low"),
    ("a budget under 16384 is medium", "gpt-5", {"thinking": enabled(8000)}, "medium"),
    ("a budget of 4096 is medium", "gpt-5", {"thinking": enabled(4096)}, "medium"),
    ("a budget of 16384 is high", "gpt-5", {"thinking": enabled(16384)}, "high"),
    ("a budget that is no integer is nothing", "gpt-5", {"thinking": enabled("many")}, None),
    ("effort wins over a budget", "gpt-5", {"thinking": enabled(8000), **effort("low")}, "low"),
    ("adaptive without effort is nothing", "gpt-5", {"thinking": ADAPTIVE}, None),
    ("adaptive with effort", "gpt-5", {"thinking": ADAPTIVE, **effort("high")}, "high"),
    ("an unknown kind of thinking is nothing", "gpt-5", {"thinking": {"type": "new"}}, None),
    ("disabled: the lowest that gpt-5 has", "gpt-5", {"thinking": DISABLED}, "minimal"),
    ("disabled: gpt-5.1 has none", "gpt-5.1", {"thinking": DISABLED}, "none"),
    ("disabled: the lowest that o3 has", "o3", {"thinking": DISABLED}, "low"),
    ("disabled: gpt-4o does not know effort", "gpt-4o", {"thinking": DISABLED}, None),
    ("disabled replaces an effort", "gpt-5.1", {"thinking": DISABLED, **effort("high")}, "none"),
    ("between_tools is disabled", "gpt-5.1", {"thinking": {"type": "between_tools"}}, "none"),
    *[(f"effort {asked} for {model}", model, effort(asked), want) for model, asked, want in (
        ("o3", "max", "high"), ("gpt-5.1", "max", "high"), ("gpt-5.2", "max", "xhigh"),
        ("gpt-5.6", "max", "max"), ("gpt-5.6", "xhigh", "xhigh"), ("gpt-6", "max", "max"),
        ("gpt-5-pro", "low", "high"), ("gpt-5-codex", "max", "high"), ("gpt-5.10", "max", "max"),
        ("gpt-4o", "max", None), ("o1-mini", "high", None), ("gpt-5-chat-latest", "high", None),
        ("gpt-5.1", "huge", None), ("grok-3-mini", "medium", "low"))],
    ("from gpt-5.4 on without tools", "gpt-5.4", effort("high"), "high"),
    ("from gpt-5.4 on tools forbid effort", "gpt-5.4",
     {**effort("high"), "tools": [tool("f")]}, "none"),
    ("also where none was asked", "gpt-5.6", {"tools": [tool("f")]}, "none"),
    ("before gpt-5.4 they do not", "gpt-5.2", {**effort("high"), "tools": [tool("f")]}, "high"),
    ("tools that are not sent forbid nothing", "gpt-5.4",
     {**effort("high"), "tools": [WEB_SEARCH]}, "high"),
    ("a later system message has the last word", "gpt-5.2", {**effort("low"), "messages": [
        usr("a"), sysm("b", **effort("high")), usr("c")]}, "high"),
    ("the newest of them", "gpt-5.2", {"messages": [
        usr("a"), sysm("b", **effort("high")), usr("c"), sysm("", **effort("low")), sysm("d")]},
     "low"),
]


@table(EFFORTS, "model, members, want")
def test_effort(model, members, want):
    check_body(sent(req(**{"model": model, **members})),
               {"reasoning_effort": want, "thinking": None, "reasoning": None})


OTHER_EFFORTS = [
    ("OpenRouter has its own field", "openrouter", effort("high"),
     {"reasoning": {"effort": "high"}, "reasoning_effort": None}),
    ("OpenRouter, disabled", "openrouter", {"thinking": DISABLED},
     {"reasoning": {"enabled": False}}),
    ("OpenRouter, neither", "openrouter", {}, {"reasoning": None, "reasoning_effort": None}),
    ("DeepSeek thinks only when told", "deepseek", {},
     {"thinking": {"type": "disabled"}, "reasoning_effort": None}),
    *[(f"DeepSeek, effort {asked}", "deepseek", {"thinking": ADAPTIVE, **effort(asked)},
       {"thinking": {"type": "enabled"}, "reasoning_effort": want})
      for asked, want in (("low", "low"), ("medium", "high"), ("high", "high"), ("xhigh", "max"),
                          ("max", "max"))],
    ("deepseek-reasoner has no switch", "deepseek",
     {"model": "deepseek-reasoner", "thinking": ADAPTIVE}, {"thinking": None}),
    ("gpt-oss", "local", {"model": "claude-opus-5", **effort("xhigh")},
     {"reasoning_effort": "high"}),
    ("a model without a list", "local", effort("high"), {"reasoning_effort": None}),
    ("gpt-5.4 with tools elsewhere", "local",
     {"model": "gpt-5.4", **effort("high"), "tools": [tool("f")]}, {"reasoning_effort": "high"}),
    ("Gemini", "gemini", {"model": "gemini-2.5-pro", **effort("max")},
     {"reasoning_effort": "high"}),
    ("a Gemini name at OpenAI", "openai", {"model": "gemini-2.5-pro", **effort("max")},
     {"reasoning_effort": None}),
]


@table(OTHER_EFFORTS, "host, members, want")
def test_effort_elsewhere(host, members, want):
    check_body(sent(req(**members), host), want)


@table([(host, host, want) for want, hosts in (
    (True, ["localhost", "127.0.0.1", "[::1]", "::1", "10.0.0.7", "192.168.1.5", "172.16.0.1",
            "169.254.1.1", "fe80::1%en0", "fd00::1", "0.0.0.0", "::ffff:127.0.0.1", "ollama",
            "Studio.LOCAL", "mac.local.", "nas.lan", "vllm.internal", "a.localhost", "127.1",
            "0x7f.1", "2130706433"]),
    (False, ["api.openai.com", "8.8.8.8", "2001:4860::1", "172.32.0.1", "::ffff:8.8.8.8",
             "local.example", "mylocal.example", "internal.io", "1.example"])) for host in hosts])
def test_a_local_host_is_this_machine_or_its_network(given, want):
    assert aiapiproxy.is_local_host(given) is want


# ============================================================================
# 4. CONVERSATION
# ============================================================================

# ---- What is rejected

def source(block, **members): return req([usr([{"type": block, "source": members}])])


BAD_MAX_TOKENS = "max_tokens: Input should be a valid integer"
NO_FILES = ("messages.0.content.0.source: file sources are not supported by this endpoint; "
            "send base64 or url")
NO_CONTENT = "messages.0: user messages must have non-empty content"
BAD_STOP = "stop_sequences: Input should be a valid list of strings"
BAD_SYSTEM = "system: Input should be a valid string or list of text blocks"
BAD_CHOICE = "tool_choice.type: Input should be 'auto', 'any', 'tool' or 'none'"
BAD_FORMAT = 'output_config.format: Input should be {"type": "json_schema", "schema": {...}}'
NO_SERVER_TOOL = "tool_choice: web_search is a server tool, which this endpoint does not provide"

REJECTED = [
    ("no model", without(req(), "model"), "model: Field required"),
    ("model null", req(model=None), "model: Input should be a valid string"),
    ("an empty model", req(model=""), "model: Input should be a valid string"),
    ("a model that is a number", req(model=4), "model: Input should be a valid string"),
    ("no messages", without(req(), "messages"), "messages: Field required"),
    ("messages that are no list", req(usr("a")), "messages: Input should be a valid list"),
    ("no message", req([]), "messages: at least one message is required"),
    ("only system messages", req([sysm("x")]), "messages: at least one user message is required"),
    ("a message that is no object", req([usr("a"), "b"]), "messages.1: Input should be an object"),
    ("a role of the other API", req([{"role": "tool", "content": "x"}]),
     "messages.0.role: Input should be 'user', 'assistant' or 'system'"),
    ("no content", req([{"role": "user"}]), "messages.0.content: Field required"),
    ("content null", req([usr(None)]), "messages.0.content: Field required"),
    ("content that is a number", req([usr(5)]),
     "messages.0.content: Input should be a valid string or list"),
    ("a block that is a string", req([usr(["x"])]),
     "messages.0.content.0: Input should be an object"),
    ("a block without type", req([usr([txt("a"), {}])]),
     "messages.0.content.1.type: Field required"),
    ("an empty user message", req([usr("")]), NO_CONTENT),
    ("a user message without blocks", req([usr([])]), NO_CONTENT),
    ("a user message of empty text", req([usr([txt("")])]), NO_CONTENT),
    ("a text block without text", req([usr([{"type": "text"}])]),
     "messages.0.content.0.text: Field required"),
    ("an image without source", req([usr([{"type": "image"}])]),
     "messages.0.content.0.source: Field required"),
    ("an uploaded image", source("image", type="file", file_id="f"), NO_FILES),
    ("an uploaded document", source("document", type="file", file_id="f"), NO_FILES),
    ("a tool_use without id", req([usr("a"), asst([without(use("i"), "id")])]),
     "messages.1.content.0.id: Field required"),
    ("a tool_use without name", req([usr("a"), asst([use("i", "")])]),
     "messages.1.content.0.name: Field required"),
    ("a tool_result without id", req([usr([without(res("i", "x"), "tool_use_id")])]),
     "messages.0.content.0.tool_use_id: Field required"),
    ("no max_tokens", without(req(), "max_tokens"), "max_tokens: Field required"),
    ("max_tokens as a string", req(max_tokens="100"), BAD_MAX_TOKENS),
    ("max_tokens true", req(max_tokens=True), BAD_MAX_TOKENS),
    ("max_tokens with a fraction", req(max_tokens=1.5), BAD_MAX_TOKENS),
    ("max_tokens as a float", req(max_tokens=3.0), BAD_MAX_TOKENS),
    ("max_tokens below 0", req(max_tokens=-1),
     "max_tokens: Input should be greater than or equal to 0"),
    ("temperature as a word", req(temperature="hot"),
     "temperature: Input should be a valid number"),
    ("top_p true", req(top_p=True), "top_p: Input should be a valid number"),
    ("stop_sequences as a string", req(stop_sequences="x"), BAD_STOP),
    ("stop_sequences of numbers", req(stop_sequences=[1]), BAD_STOP),
    ("stream as a word", req(stream="yes"), "stream: Input should be a valid boolean"),
    ("thinking as a word", req(thinking="on"), "thinking: Input should be an object"),
    ("metadata as a word", req(metadata="m"), "metadata: Input should be an object"),
    ("output_config as a list", req(output_config=[]), "output_config: Input should be an object"),
    ("system as a number", req(system=5), BAD_SYSTEM),
    ("system with an image", req(system=[img]), BAD_SYSTEM),
    ("tools that are no list", req(tools={}), "tools: Input should be a valid list"),
    ("a tool that is a string", req(tools=[tool("f"), "g"]), "tools.1: Input should be an object"),
    ("a tool without name", req(tools=[without(tool("f"), "name")]),
     "tools.0.name: Field required"),
    ("a tool without schema", req(tools=[{"name": "f"}]), "tools.0.input_schema: Field required"),
    ("a tool with a schema that is null", req(tools=[{"name": "f", "input_schema": None}]),
     "tools.0.input_schema: Field required"),
    ("two tools of one name", req(tools=[tool("f"), tool("f")]),
     "tools: Tool names must be unique."),
    ("the choice of an unknown tool", req(tools=[tool("f")], **choice("tool", "g")),
     "tool_choice.name: Tool 'g' not found in provided tools"),
    ("a choice without tools", req(**choice("any")),
     "tool_choice: may only be specified while providing tools"),
    ("a choice of one without tools", req(**choice("tool", "f")),
     "tool_choice: may only be specified while providing tools"),
    ("the choice of a server tool", req(tools=[WEB_SEARCH], **choice("tool", "web_search")),
     NO_SERVER_TOOL),
    ("the choice of any server tool", req(tools=[WEB_SEARCH], **choice("any")), NO_SERVER_TOOL),
    ("an unknown choice", req(tools=[tool("f")], **choice("some")), BAD_CHOICE),
    ("a choice that is a word", req(tools=[tool("f")], tool_choice="auto"), BAD_CHOICE),
    ("an unknown format", req(output_config={"format": {"type": "text"}}), BAD_FORMAT),
    ("a format without schema", req(output_format={"type": "json_schema"}), BAD_FORMAT),
    ("MCP servers", req(mcp_servers=[{"type": "url", "url": "u", "name": "n"}]),
     "mcp_servers: MCP servers are not supported by this endpoint"),
    ("compaction", req(compaction={}), "compaction: not supported by this endpoint"),
    ("a thread", req(thread={"type": "create"}),
     "thread: not supported by this endpoint; send the whole conversation"),
]


@table(REJECTED)
def test_rejected(given, want):
    with pytest.raises(aiapiproxy.ProxyError) as caught:
        aiapiproxy.checked_translation(given, SETTINGS["openai"])
    found = caught.value
    assert (found.status, found.kind, found.message) == (400, "invalid_request_error", want)


def test_a_rejected_thread_tells_the_client_how_to_continue():
    with pytest.raises(aiapiproxy.ProxyError) as caught:
        aiapiproxy.checked_translation(req(thread={"type": "create"}), SETTINGS["openai"])
    assert caught.value.details == {"error_code": "thread_unsupported_request",
                                    "unsupported": ["thread"]}


WRONG_VALUES = [None, True, -1, 0, 1.5, 10 ** 30, "", "x", "\ud83d", [], {}, [None], [[]], [{}],
                {"type": 1}, {"type": "x"}, {"type": []}, [{"type": "text"}],
                [{"type": "text", "text": None}], {"a": {"a": []}}]
EVERY_BLOCK = {
    "text": {"type": "text", "text": "a", "citations": [], "cache_control": {"type": "ephemeral"}},
    "image": img,
    "image by URL": {"type": "image", "source": {"type": "url", "url": "https://a/b.png"}},
    "image by file": {"type": "image", "source": {"type": "file", "file_id": "f"}},
    "document": {**doc(PDF), "title": "t", "context": "c", "citations": {"enabled": True}},
    "document of text": doc({"type": "text", "media_type": "text/plain", "data": "a"}),
    "document of content": doc({"type": "content", "content": [txt("a")]}),
    "document by URL": doc({"type": "url", "url": "https://a/b.pdf"}),
    "tool_use": use("call_1", "f", {"a": 1}),
    "tool_result": {**res("call_1", [txt("a"), img]), "is_error": True},
    "thinking": think("a", "b"), "redacted_thinking": {"type": "redacted_thinking", "data": "a"},
    "search_result": {"type": "search_result", "source": "s", "title": "t", "content": [txt("a")]},
    "server_tool_use": {"type": "server_tool_use", "id": "s", "name": "web_search",
                        "input": {"query": "q"}},
    "web_search_tool_result": {"type": "web_search_tool_result", "tool_use_id": "s", "content": [
        {"type": "web_search_result", "url": "u", "title": "t", "encrypted_content": "e",
         "page_age": None}]},
    "container_upload": {"type": "container_upload", "file_id": "f"},
}
EVERY_FIELD = {
    **req(), "system": [txt("s")], "stream": False, "temperature": 0.5, "top_p": 0.5, "top_k": 5,
    "stop_sequences": ["a"], "metadata": {"user_id": "u"}, "service_tier": "auto",
    "tools": [{**tool("f"), "description": "d", "strict": True,
               "cache_control": {"type": "ephemeral"}, "input_examples": [{}], "type": "custom",
               "defer_loading": False}, WEB_SEARCH],
    "tool_choice": {"type": "tool", "name": "f", "disable_parallel_tool_use": True},
    "thinking": {"type": "enabled", "budget_tokens": 1024, "display": "omitted"},
    "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": STRICT}},
    "output_format": {"type": "json_schema", "schema": STRICT}, "container": "c", "mcp_servers": [],
    "context_management": {"edits": []}, "betas": ["b"], "speed": "fast", "inference_geo": "us",
    "thread": None, "cache_control": {"type": "ephemeral"}, "fallbacks": [], "diagnostics": {},
    "user_profile_id": "u"}


def places(value):
    """Every (parent, key) at every depth."""
    for parent in containers(value):
        for key in (list(parent) if isinstance(parent, dict) else range(len(parent))):
            yield parent, key


def with_block(block):
    kind = block["type"]
    if kind in ("tool_use", "thinking", "redacted_thinking", "server_tool_use",
                "web_search_tool_result"):
        return req([usr("a"), asst([block]), usr("b")])
    return req([usr("a"), asst([use("call_1")]), usr([block])] if kind == "tool_result"
               else [usr([block])])


def check_is_served_or_refused(request):
    """Either the request is translated, or one sentence says what is wrong."""
    try:
        translation = aiapiproxy.checked_translation(request, SETTINGS["openai"])
        aiapiproxy.json_bytes(translation.body)
        translation.input_estimate()
    except aiapiproxy.ProxyError as error:
        assert 400 <= error.status < 500 and "\n" not in error.message, (request, error.message)


@table([("a request", EVERY_FIELD),
        *((f"a block {name}", with_block(each)) for name, each in EVERY_BLOCK.items()),
        ("a block's result in a tool's", with_block(res("call_1", list(EVERY_BLOCK.values()))))],
       "given")
def test_a_wrong_type_in_any_field(given):
    check_is_served_or_refused(given)
    for parent, key in list(places(given)):
        before = parent[key]
        for wrong in WRONG_VALUES:
            parent[key] = wrong
            check_is_served_or_refused(given)
        parent[key] = before
        if isinstance(parent, dict):
            del parent[key]
            check_is_served_or_refused(given)
            parent[key] = before


def test_a_wrong_type_in_any_member_over_the_wire():
    async def scenario():
        async with proxied(OK) as (_, server), Wire(server.port) as wire:
            for name in EVERY_FIELD:
                for wrong in WRONG_VALUES:
                    body = json.dumps({**EVERY_FIELD, name: wrong}).encode()
                    await wire.send(POST(f"Content-Length: {len(body)}", body=body,
                                         path="/v1/messages"))
                    status, _, body = await wire.answer()
                    assert status in (200, 400), (name, wrong, body)

    within(20, scenario())


def test_an_odd_request_is_translated_or_rejected():
    """There is no third way: no crash, and no body that breaks check_conversation()."""
    results = [res("call_1", [txt("a"), img, reference("f"), doc(PDF)]), SEARCH_RESULT, img,
               doc(PDF)]
    dice, whole = random.Random(1), {
        **SESSION, "messages": TURNS + [asst([use("call_1")]), usr(results)], **output(STRICT),
        **choice("auto"), "stop_sequences": ["x"], "temperature": 0.5, "mcp_servers": []}
    for _ in range(2000):
        asked = spoiled(whole, dice)
        try:
            sent(asked, dice.choice(list(HOSTS)))
        except aiapiproxy.ProxyError as error:
            assert (error.status, error.kind) == (400, "invalid_request_error"), asked
            assert error.message, asked


# ---- System and conversation

ASKED_TWO = [usr("a"), asst([use("call_1"), use("call_2", "g")])]
CALLED_TWO = [usr("a"), msg(None, [call("call_1"), call("call_2", "g")])]
LONG_ID = "toolu_" + "x" * 40


def with_extra(id, extra):
    """The id that a client gets for a call with a thought signature."""
    return "toolu_xAbC123_" + encoded(zlib.compress(json.dumps([id, extra]).encode()))


def ids_kept(sentence, id, host="openai"):
    given, want = conversation_with(id)
    return sentence, host, {"messages": given}, want


def ids_sent(sentence, id, want, host="openai"):
    return sentence, host, {"messages": conversation_with(id)[0]}, conversation_with(want)[1]


CONVERSATIONS = [  # request members, all messages sent
    ("system text is the first message", "openai", {"system": "S"}, [sysm("S"), usr("Hi")]),
    ("its blocks are paragraphs", "openai", {"system": [txt("a"), txt(""), txt("b")]},
     [sysm("a\n\nb"), usr("Hi")]),
    ("empty system text is none", "openai", {"system": ""}, [usr("Hi")]),
    ("only empty blocks are none", "openai", {"system": [txt("")]}, [usr("Hi")]),
    ("marks are dropped", "openai",
     {"system": [{**txt("a"), "cache_control": {"type": "ephemeral"}}]}, [sysm("a"), usr("Hi")]),
    ("the client's attribution is no instruction", "openai",
     {"system": [billing("cc_version=2; cc_entrypoint=cli;"), txt("b")]}, [sysm("b"), usr("Hi")]),
    ("and alone is nothing", "openai", {"system": [billing("cc_version=2;")]}, [usr("Hi")]),
    ("system messages in front join the system text", "openai",
     {"system": "a", "messages": [sysm("b"), usr("c")]}, [sysm("a\n\nb"), usr("c")]),
    *[(f"a later system message is a reminder, {host}", host,
       {"messages": [usr("a"), sysm("b"), usr("c")]},
       [usr(f"a\n\n{reminder('b')}\n\nc")]) for host in HOSTS],
    ("at the end too", "openai", {"messages": [usr("a"), sysm("b")]},
     [usr("a\n\n" + reminder("b"))]),
    ("after an assistant's message it goes to the user's next", "openai",
     {"messages": [usr("a"), asst("x"), sysm("b"), usr("c")]},
     [usr("a"), asst("x"), usr(f"{reminder('b')}\n\nc")]),
    ("between two assistant messages it is a user message", "openai",
     {"messages": [usr("a"), asst("x"), sysm("b"), asst("y"), usr("c")]},
     [usr("a"), asst("x"), usr(reminder("b")), asst("y"), usr("c")]),
    ("beside results alone it joins the last of them", "openai",
     {"messages": ASKED + [sysm("b"), usr([res("call_1", "ok")])]},
     CALLED + [tmsg("call_1", f"ok\n\n{reminder('b')}")]),
    ("after results too", "openai",
     {"messages": ASKED_TWO + [usr([res("call_1", "1"), res("call_2", "2")]), sysm("b")]},
     CALLED_TWO + [tmsg("call_1", "1"), tmsg("call_2", f"2\n\n{reminder('b')}")]),
    ("beside text it joins the text", "openai",
     {"messages": ASKED + [sysm("b"), usr([res("call_1", "ok"), txt("t")])]},
     CALLED + [tmsg("call_1", "ok"), usr(f"{reminder('b')}\n\nt")]),
    ("one for a single turn is gone in the next", "openai",
     {"messages": [usr("a"), sysm("b", clear_at="next_user_message"), asst("x"), usr("c")]},
     [usr("a"), asst("x"), usr("c")]),
    ("and there in its own", "openai",
     {"messages": [usr("a"), sysm("b", clear_at="next_user_message")]},
     [usr("a\n\n" + reminder("b"))]),
    ("one without content only sets the effort", "openai",
     {"messages": [usr("a"), {"role": "system", **effort("low")}, sysm(""), sysm([])]}, [usr("a")]),
    ("an unknown block of a system message is dropped", "openai",
     {"messages": [usr("a"), sysm([{"type": "new"}])]},
     [usr("a")]),
    ("two user messages are one", "openai", {"messages": [usr("a"), usr("b")]}, [usr("a\n\nb")]),
    ("two assistant messages are one", "openai",
     {"messages": [usr("a"), asst("x"), asst("y"), usr("b")]}, [usr("a"), asst("xy"), usr("b")]),
    ("also when what lay between them vanished", "openai",
     {"messages": [usr("a"), asst(""), usr("b")]}, [usr("a\n\nb")]),
    ("an assistant message of redacted thinking alone is none", "openai",
     {"messages": [usr("a"), asst([{"type": "redacted_thinking", "data": "d"}]), usr("b")]},
     [usr("a\n\nb")]),
    ("white space in text is kept", "openai",
     {"messages": [usr(" a\n"), asst(" x\n"), usr("\tb ")]},
     [usr(" a\n"), asst(" x\n"), usr("\tb ")]),
    ("half a surrogate pair is replaced", "openai", {"messages": [usr("a\ud83db")]},
     [usr("a\ufffdb")]),
    ("a whole one is a character", "openai", {"messages": [usr("\ud83d\ude00")]},
     [usr("\U0001f600")]),
    ("a call and its result", "openai",
     {"messages": [usr("a"), asst([txt("x"), use("call_1", "f", {"a": 1})]),
                   usr([res("call_1", "ok")])]},
     [usr("a"), msg("x", [call("call_1", "f", '{"a":1}')]), tmsg("call_1", "ok")]),
    ("arguments are ASCII", "openai",
     {"messages": [usr("a"), asst([use("call_1", "f", {"a": "\u00e9"})]),
                   usr([res("call_1", "ok")])]},
     [usr("a"), msg(None, [call("call_1", "f", '{"a":"\\u00e9"}')]), tmsg("call_1", "ok")]),
    ("tool messages in the order of the results, then the user", "openai",
     {"messages": ASKED_TWO + [usr([res("call_2", "two"), res("call_1", "one"), txt("go on")])]},
     CALLED_TWO + [tmsg("call_2", "two"), tmsg("call_1", "one"), usr("go on")]),
    ("text before a result comes after it", "openai",
     {"messages": ASKED + [usr([txt("first"), res("call_1", "ok")])]},
     CALLED + [tmsg("call_1", "ok"), usr("first")]),
    ("a result is missing", "openai", {"messages": ASKED_TWO + [usr([res("call_1", "ok")])]},
     CALLED_TWO + [tmsg("call_1", "ok"), tmsg("call_2", "Tool call was not executed.")]),
    ("every result is missing", "openai", {"messages": ASKED + [usr("never mind")]},
     CALLED + [tmsg("call_1", "Tool call was not executed."), usr("never mind")]),
    ("a call stands last", "openai", {"messages": ASKED},
     CALLED + [tmsg("call_1", "Tool call was not executed.")]),
    ("a result without its call is told", "openai",
     {"messages": [usr([txt("a"), res("zz", "ok"), txt("b")])]},
     [usr("a\n\n[Result of tool call zz]\nok\n\nb")]),
    ("the first of two results counts", "openai",
     {"messages": ASKED + [usr([res("call_1", "a"), res("call_1", "b")])]},
     CALLED + [tmsg("call_1", "a")]),
    ("results spread over user messages", "openai",
     {"messages": ASKED_TWO + [usr([res("call_1", "1")]), usr([res("call_2", "2"), txt("x")])]},
     CALLED_TWO + [tmsg("call_1", "1"), tmsg("call_2", "2"), usr("x")]),
    ("one id in two turns", "openai",
     {"messages": ASKED + [usr([res("call_1", "1")])]
      + [asst([use("call_1")]), usr([res("call_1", "2")])]},
     CALLED + [tmsg("call_1", "1"), msg(None, [call("call_1")]), tmsg("call_1", "2")]),
    ("two calls of one id in one turn", "local",
     {"messages": [usr("a"), asst([use("c"), use("c")]), usr([res("c", "1"), res("c", "2")])]},
     [usr("a"), msg(None, [call("c"), call("call_3c9b6429653c1bcece90ddeeb584ac98")]),
      tmsg("c", "1"), tmsg("call_3c9b6429653c1bcece90ddeeb584ac98", "2")]),
    ("an image in a result is moved to the user's message after it", "openai",
     {"messages": ASKED + [usr([res("call_1", [txt("see"), img])])]},
     CALLED + [tmsg("call_1", "see\n[image 1: see the next user message]"),
               usr([part("Image 1 from tool result call_1:"), IMG])]),
    ("before what the user says", "openai",
     {"messages": ASKED + [usr([res("call_1", [txt("see"), img]), txt("ok?")])]},
     CALLED + [tmsg("call_1", "see\n[image 1: see the next user message]"),
               usr([part("Image 1 from tool result call_1:"), IMG, part("ok?")])]),
    ("images are counted over all results", "openai",
     {"messages": ASKED_TWO + [usr([res("call_1", [img]), res("call_2", [img])])]},
     CALLED_TWO + [tmsg("call_1", "[image 1: see the next user message]"),
                   tmsg("call_2", "[image 2: see the next user message]"),
                   usr([part("Image 1 from tool result call_1:"), IMG,
                        part("Image 2 from tool result call_2:"), IMG])]),
    ("a PDF in a result likewise, where files are known", "openai",
     {"messages": ASKED + [usr([res("call_1", [txt("see"), doc(PDF, title="r")])])]},
     CALLED + [tmsg("call_1", "see\n[document 1: see the next user message]"),
               usr([part("Document 1 from tool result call_1:"), {"type": "file", "file": {
                   "filename": "r.pdf", "file_data": "data:application/pdf;base64,AAAA"}}])]),
    ("elsewhere in words", "local",
     {"messages": ASKED + [usr([res("call_1", [doc(PDF, title="r")])])]},
     CALLED + [tmsg("call_1", "[PDF document: r; this endpoint cannot read it]")]),
    # Ids
    ids_kept("a Claude id is kept", "toolu_01A09q90qw90lq917835lq9"),
    ids_sent("one too long for OpenAI is hashed", LONG_ID, "call_a550d5038323380edbc41fe2ac9a213c"),
    ids_sent("also one with other characters", "call:1", "call_0af6315558b41599b4a0fbfa5d31d443"),
    ids_sent("and on Azure", "call:1", "call_0af6315558b41599b4a0fbfa5d31d443", "azure"),
    ids_kept("others take long ids", LONG_ID, "local"),
    ids_kept("others take any character", "call:1", "local"),
    ids_sent("Mistral wants nine characters", "toolu_01A09q90qw90lq917835lq9",
             "L4lugQ9Qs", "mistral"),
    ids_kept("and keeps its own", "abcDEF123", "mistral"),
    ids_sent("an encoded id is decoded", "toolu_rAbC123_ZnVuY3Rpb25zLmdldDow",
             "functions.get:0", "local"),
    ids_kept("one that is none stays", "toolu_rAbC123_!", "local"),
    ids_kept("one that does not decode stays", "toolu_rAbC123__w", "local"),
    ids_kept("nor one with a thought signature", "toolu_xAbC123_AAAA", "local"),
    ("a thought signature comes back on its call", "gemini",
     {"messages": conversation_with(with_extra("c1", EXTRA))[0]},
     [usr("a"), msg(None, [call("c1", extra_content=EXTRA)]), tmsg("c1", "ok")]),
    # The end
    ("a prefill is sent without the white space at its end", "openai",
     {"messages": [usr("a"), asst("The answer is ")]},
     [usr("a"), asst("The answer is")]),
    ("Mistral marks it", "mistral", {"messages": [usr("a"), asst("The answer is ")]},
     [usr("a"), {**asst("The answer is"), "prefix": True}]),
    ("a prefill of white space alone is none", "openai", {"messages": [usr("a"), asst(" \n")]},
     [usr("a")]),
]


@table(CONVERSATIONS, "host, members, want")
def test_conversation(host, members, want):
    assert sent(req(**members), host)["messages"] == want


def test_a_result_without_its_call_keeps_its_image():
    (message,) = sent(req([usr([res("zz", [txt("see"), img])])]))["messages"]
    assert message["content"][0]["text"].startswith("[Result of tool call zz]\nsee")
    assert IMG in message["content"]


TURNS = [usr("a"), sysm("be careful"),
         asst([think("t", "aap1.c."), txt("x"), use("call_1"), use("call:2", "my.tool")]),
         usr([res("call:2", [txt("2"), img]), res("call_1", "1"), txt("go on")]), asst("y"),
         usr([txt("c"), img]), asst([use("call_1")]), usr([res("call_1", "", is_error=True)]),
         sysm("still careful"), asst("z"), usr("d")]


@pytest.mark.parametrize("host", HOSTS)
def test_a_conversation_only_grows_at_its_end(host):
    """The upstream caches prompts by their beginning, so the next request has to repeat it."""
    def request(messages):
        asked = req(messages, model="claude-opus-5-5", system=[billing(len(messages)), txt("S")],
                    tools=[tool("f"), tool("my.tool")], thinking=ADAPTIVE)
        return aiapiproxy.checked_translation(asked, SETTINGS[host]).body

    ends = [at + 1 for at, turn in enumerate(TURNS) if turn["role"] != "assistant"
            and TURNS[at + 1:at + 2] and TURNS[at + 1]["role"] == "assistant"]
    assert len(ends) == 4
    for end, later in zip(ends, ends[1:] + [len(TURNS)]):
        short, long = request(TURNS[:end]), request(TURNS[:later])
        head = aiapiproxy.json_bytes(short["messages"])[:-1]
        whole = aiapiproxy.json_bytes(short)
        kept = whole[:whole.index(head) + len(head)]
        assert aiapiproxy.json_bytes(long).startswith(kept)
        assert without(short, "messages") == without(long, "messages")


# ---- Tools

def removal(name): return {"type": "tool_removal", "tool": {"type": "tool_reference", "name": name}}
def addition(tool): return {"type": "tool_addition", "tool": tool}


SEARCH = [tool("ToolSearch"), deferred("f"), tool("g")]
FOUND = [usr("a"), asst([use("call_1", "ToolSearch")]), usr([res("call_1", [reference("f")])])]
NAMED_F = {"type": "function", "function": {"name": "f"}}
NO_TOOLS = {"tools": None, "tool_choice": None, "parallel_tool_calls": None}
DEFINED = {"type": "tool_definition", "definition": tool("h")}

TOOLS = [
    ("a tool is a function", {"tools": [tool("f")]}, {**NO_TOOLS, "tools": [fn("f")]}),
    ("with its description", {"tools": [tool("f", description="d")]},
     {"tools": [fn("f", description="d")]}),
    ("but not an empty one", {"tools": [tool("f", description="")]}, {"tools": [fn("f")]}),
    ("type custom", {"tools": [tool("f", type="custom")]}, {"tools": [fn("f")]}),
    ("no tools", {"tools": []}, NO_TOOLS),
    ("no tools, no choice", {"tools": [], **choice("auto", disable_parallel_tool_use=True)},
     NO_TOOLS),
    ("choice auto", {"tools": [tool("f")], **choice("auto")},
     {"tool_choice": "auto", "parallel_tool_calls": None}),
    ("choice any", {"tools": [tool("f")], **choice("any")}, {"tool_choice": "required"}),
    ("choice none still sends the tools", {"tools": [tool("f")], **choice("none")},
     {"tool_choice": "none", "tools": [fn("f")]}),
    ("choice of one tool", {"tools": [tool("f")], **choice("tool", "f")}, {"tool_choice": NAMED_F}),
    ("not in parallel", {"tools": [tool("f")], **choice("any", disable_parallel_tool_use=True)},
     {"tool_choice": "required", "parallel_tool_calls": False}),
    ("the o-series does not know that field", {"model": "o3", "tools": [tool("f")],
                                               **choice("any", disable_parallel_tool_use=True)},
     {"tool_choice": "required", "parallel_tool_calls": None}),
    ("in parallel is nothing",
     {"tools": [tool("f")], **choice("auto", disable_parallel_tool_use=False)},
     {"tool_choice": "auto", "parallel_tool_calls": None}),
    ("one name is legal everywhere", {"tools": [tool("my.tool")], **choice("tool", "my.tool"),
                                      "messages": [usr("a"), asst([use("call_1", "my.tool")]),
                                                   usr([res("call_1", "ok")])]},
     {"tools": [fn("my_tool_bca2c361")],
      "tool_choice": {"type": "function", "function": {"name": "my_tool_bca2c361"}},
      "messages": [usr("a"), msg(None, [call("call_1", "my_tool_bca2c361")]),
                   tmsg("call_1", "ok")]}),
    ("a server tool is not sent, and the model is told", {"tools": [WEB_SEARCH]},
     {**NO_TOOLS, "messages": [sysm(note("web_search")), usr("Hi")]}),
    ("the note is the last paragraph", {"system": "Be brief.", "tools": [
        tool("f"), WEB_SEARCH, {"type": "code_execution_20250825", "name": "code_execution"}]},
     {"tools": [fn("f")],
      "messages": [sysm("Be brief.\n\n" + note("web_search, code_execution")), usr("Hi")]}),
    *[(f"{kind} is a server tool", {"tools": [{"type": kind, "name": "x"}]},
       {"tools": None, "messages": [sysm(note("x")), usr("Hi")]})
      for kind in ("web_fetch_20260318", "advisor_20260301", "future_tool_20270101")],
    ("an auto choice goes with its last tool", {"tools": [WEB_SEARCH], **choice("auto")}, NO_TOOLS),
    ("a tool search of the server is silent, and everything is loaded",
     {"tools": [{"type": "tool_search_tool_bm25_20251119", "name": "tool_search_tool_bm25"},
                deferred("f")]},
     {"tools": [fn("f")], "messages": [usr("Hi")]}),
    ("a tool search of the client defers tools", {"tools": SEARCH},
     {"tools": [fn("ToolSearch"), fn("g")]}),
    ("a tool found is sent last", {"tools": SEARCH, "messages": FOUND},
     {"tools": [fn("ToolSearch"), fn("g"), fn("f")]}),
    ("so is a tool called before",
     {"tools": SEARCH, "messages": [usr("a"), asst([use("c", "f")]), usr([res("c", "1")])]},
     {"tools": [fn("ToolSearch"), fn("g"), fn("f")]}),
    ("so is the one chosen", {"tools": SEARCH, **choice("tool", "f")},
     {"tools": [fn("ToolSearch"), fn("g"), fn("f")], "tool_choice": NAMED_F}),
    ("so is one added", {"tools": SEARCH, "messages": [
        usr("a"), sysm([addition({"type": "tool_reference", "name": "f"})])]},
     {"tools": [fn("ToolSearch"), fn("g"), fn("f")]}),
    ("a removed tool is not sent",
     {"tools": [tool("f"), tool("g")], "messages": [usr("a"), sysm([removal("f")])]},
     {"tools": [fn("g")], "messages": [usr("a")]}),
    ("unless it comes back", {"tools": [tool("f"), tool("g")], "messages": [
        usr("a"), sysm([removal("f"), addition({"type": "tool_reference", "name": "f"})])]},
        {"tools": [fn("f"), fn("g")]}),
    ("a tool defined on the way",
     {"tools": [tool("f")], "messages": [usr("a"), sysm([addition(DEFINED)])]},
     {"tools": [fn("f"), fn("h")]}),
    ("an unknown type with a schema is a tool", {"tools": [tool("x", type="future_tool_20270101")]},
     {"tools": [fn("x")]}),
    ("what OpenAI does not know of a tool is dropped",
     {"tools": [tool("f", cache_control={"type": "ephemeral"}, input_examples=[{}],
                     eager_input_streaming=True, allowed_callers=["direct"], strict=None,
                     citations={})]}, {"tools": [fn("f")]}),
    ("strict, where the schema qualifies", {"tools": [tool("f", STRICT, strict=True)]},
     {"tools": [fn("f", STRICT, strict=True)]}),
    ("not strict, where it does not", {"tools": [tool("f", LOOSE, strict=True)]},
     {"tools": [fn("f", LOOSE)]}),
]


@table(TOOLS, "members, want")
def test_tools(members, want):
    check_body(sent(req(**members)), want)


def test_strict_is_sent_only_where_it_is_known():
    asked = req(tools=[tool("f", STRICT, strict=True)])
    assert sent(asked, "azure")["tools"] == [fn("f", STRICT, strict=True)]
    for host in ("openrouter", "deepseek", "mistral", "gemini", "local"):
        assert sent(asked, host)["tools"] == [fn("f", STRICT)]


EDITOR = {"command": "string", "path": "string", "file_text": "string", "old_str": "string",
          "new_str": "string", "insert_line": "integer", "view_range": "array"}
SCREEN = {"action": "string", "coordinate": "array", "start_coordinate": "array", "text": "string",
          "scroll_direction": "string", "scroll_amount": "integer", "duration": "number",
          "region": "array"}
OLD_ACTIONS = ["key", "type", "mouse_move", "left_click", "left_click_drag", "right_click",
               "middle_click", "double_click", "screenshot", "cursor_position"]
ACTIONS = OLD_ACTIONS + ["left_mouse_down", "left_mouse_up", "triple_click", "scroll",
                         "hold_key", "wait"]

CLIENT_TOOLS = [  # type, properties, required, the values of command or action
    ("the shell", "bash_20250124", {"command": "string", "restart": "boolean"}, [], None),
    ("a newer shell is taken as the newest known", "bash_20270101",
     {"command": "string", "restart": "boolean"}, [], None),
    ("the older editor", "text_editor_20250124", EDITOR, ["command", "path"],
     ["view", "create", "str_replace", "insert", "undo_edit"]),
    ("the newer editor", "text_editor_20250728", {**EDITOR, "insert_text": "string"},
     ["command", "path"], ["view", "create", "str_replace", "insert"]),
    ("the memory", "memory_20250818",
     {**EDITOR, "insert_text": "string", "old_path": "string", "new_path": "string"}, ["command"],
     ["view", "create", "str_replace", "insert", "delete", "rename"]),
    ("the first computer", "computer_20241022", SCREEN, ["action"], OLD_ACTIONS),
    ("the computer", "computer_20250124", SCREEN, ["action"], ACTIONS),
    ("the newest computer", "computer_20251124", SCREEN, ["action"], ACTIONS),
]


@table(CLIENT_TOOLS, "kind, properties, required, values")
def test_client_tool(kind, properties, required, values):
    tool = {"type": kind, "name": "its_name", "display_width_px": 1024, "display_height_px": 768}
    (function,) = [each["function"] for each in sent(req(tools=[tool]))["tools"]]
    parameters = function["parameters"]
    assert function["name"] == "its_name" and parameters["type"] == "object"
    assert {name: schema["type"] for name, schema in parameters["properties"].items()} == properties
    assert sorted(parameters.get("required", [])) == required
    for member in {"command", "action"} & properties.keys() if values else ():
        assert sorted(parameters["properties"][member]["enum"]) == sorted(values)
    if kind.startswith("computer"):
        assert "1024" in function["description"] and "768" in function["description"]
        assert (sorted(parameters["properties"]["scroll_direction"]["enum"])
                == ["down", "left", "right", "up"])


def test_an_editor_tells_its_limit():
    tool = {"type": "text_editor_20250728", "name": "e", "max_characters": 12345}
    (editor,) = sent(req(tools=[tool]))["tools"]
    assert "12345" in editor["function"]["description"]


def test_zoom_is_an_action_only_where_it_is_enabled():
    tool = {"type": "computer_20251124", "name": "computer", "display_width_px": 9,
            "display_height_px": 9}
    (zooming,) = sent(req(tools=[{**tool, "enable_zoom": True}]))["tools"]
    assert zooming["function"]["parameters"]["properties"]["action"]["enum"][-1] == "zoom"


@table([
    ("dots become underscores, with a hash", "my.tool", "my_tool_bca2c361"),
    ("a long MCP name",
     "mcp__claude_ai_Google_Calendar_and_Contacts__list_calendar_events_for_user",
     "mcp__claude_ai_Google_Calendar_and_Contacts__list_calen_52cbfaf7"),
    ("64 characters are allowed", "a" * 64, "a" * 64),
    ("65 are not", "a" * 65, "a" * 55 + "_635361c4"),
])
def test_tool_name(given, want):
    assert sent(req(tools=[tool(given)]))["tools"] == [fn(want)]


@table([("made first", ("my.tool", "my_tool_bca2c361")),
        ("made last", ("my_tool_bca2c361", "my.tool"))], "names")
def test_a_made_name_is_never_that_of_another_tool(names):
    asked = req(tools=[tool(name) for name in names])
    functions = [tool["function"]["name"] for tool in sent(asked)["tools"]]
    assert len(set(functions)) == 2 and "my_tool_bca2c361" in functions
    answer = completion(calling(*[call(f"call_{name}", name) for name in functions]))
    assert [block["name"] for block in answered(answer, asked)["content"]] == list(names)


@pytest.mark.parametrize("name", ["f", "my.tool", "my_tool", "a" * 64, "a" * 65, "a" * 128,
                                  "mcp__x__" + "y" * 70, "\u00e9", "a b"])
def test_a_name_comes_back_to_the_client_as_it_was(name):
    asked = req(tools=[tool(name), tool("other.tool")])
    (function, _) = [tool["function"]["name"] for tool in sent(asked)["tools"]]
    assert re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", function)
    answer = completion({"content": None, "tool_calls": [call("call_1", function)]})
    assert answered(answer, asked)["content"] == [use("call_1", name)]


OPEN_BRANCHES = {"anyOf": [{"type": "object", "properties": {"a": {}}, "required": ["a", "k"]},
                           {"type": "object", "properties": {"b": {}}, "required": ["k"]}]}

SCHEMAS = [
    ("type and properties are added", {}, {"type": "object", "properties": {}}),
    ("a type that is not object alone", {"type": ["object", "null"]},
     {"type": "object", "properties": {}}),
    ("properties null", {"type": "object", "properties": None},
     {"type": "object", "properties": {}}),
    ("an array without items is kept", inside({"type": "array"}), inside({"type": "array"})),
    ("branches at the root are kept", OPEN_BRANCHES,
     {**OPEN_BRANCHES, "type": "object", "properties": {}}),
    ("$schema goes", {"$schema": "s", **inside({})}, inside({})),
    ("the rest stays",
     inside({"additionalProperties": False, "pattern": "p", "format": "f", "propertyNames": {},
             "default": 1, "anyOf": [{"allOf": [{}]}], "$schema": "nested"}),
     inside({"additionalProperties": False, "pattern": "p", "format": "f", "propertyNames": {},
             "default": 1, "anyOf": [{"allOf": [{}]}], "$schema": "nested"})),
    ("an object inside gets properties", inside({"type": "object"}),
     inside({"type": "object", "properties": {}})),
    ("also deep inside", inside({"type": "array", "items": {"anyOf": [{"type": "object"}]}}),
     inside({"type": "array", "items": {"anyOf": [{"type": "object", "properties": {}}]}})),
    ("but not where additionalProperties say it",
     inside({"type": "object", "additionalProperties": {}}),
     inside({"type": "object", "additionalProperties": {}})),
    ("values are no schemas", inside({"default": {"type": "object"}, "enum": [{"type": "object"}],
                                      "const": {"type": "object"},
                                      "examples": [{"type": "object"}]}),
     inside({"default": {"type": "object"}, "enum": [{"type": "object"}],
             "const": {"type": "object"}, "examples": [{"type": "object"}]})),
    ("required null is kept until it is refused", {**inside({}), "required": None},
     {**inside({}), "required": None}),
]


@table(SCHEMAS)
def test_schema(given, want):
    assert sent(req(tools=[{"name": "f", "input_schema": given}]))["tools"] == [fn("f", want)]


@table([
    ("a model's name", req(model="m" * 257), "model: String should have at most 256 characters"),
    ("sequences", req(stop_sequences=["x"] * 65),
     "stop_sequences: List should have at most 64 items"),
    ("characters of one", req(stop_sequences=["x", "y" * 1001]),
     "stop_sequences.1: String should have at most 1000 characters"),
])
def test_too_many_are_refused(given, want):
    for is_counting in (False, True):
        with pytest.raises(aiapiproxy.ProxyError) as refused:
            aiapiproxy.checked_translation(given, SETTINGS["openai"], is_counting=is_counting)
        assert (refused.value.status, refused.value.message) == (400, want)


def test_as_many_as_allowed_are_served():
    asked = req(model="m" * 256, stop_sequences=["y" * 1000] * 64)
    assert aiapiproxy.checked_translation(asked, SETTINGS["local"]).body["model"] == "m" * 256


# ============================================================================
# 5. CONTENT AND IDS
# ============================================================================

USER_BLOCKS = [  # blocks of one user message, its content
    ("text blocks are paragraphs", "openai", [txt("a"), txt("b")], "a\n\nb"),
    ("empty ones vanish", "openai", [txt("a"), txt("")], "a"),
    ("with an image it is a list of parts", "openai", [txt("a"), img, txt("b"), txt("c")],
     [part("a"), IMG, part("b"), part("c")]),
    ("marks are dropped", "openai",
     [{**txt("a"), "cache_control": {"type": "ephemeral"}, "citations": []}], "a"),
    ("an image by address is not fetched", "openai",
     [{"type": "image", "source": {"type": "url", "url": "https://x/y.png"}}],
     [{"type": "image_url", "image_url": {"url": "https://x/y.png"}}]),
    ("image/jpg is image/jpeg, and base64 has no white space", "openai",
     [{"type": "image",
       "source": {"type": "base64", "media_type": "image/jpg", "data": "AA\nAA "}}],
     [{"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,AAAA"}}]),
    ("a PDF is a file", "openai", [doc(PDF, title="r")],
     [{"type": "file",
       "file": {"filename": "r.pdf", "file_data": "data:application/pdf;base64,AAAA"}}]),
    ("its name ends in .pdf once", "azure", [doc(PDF, title="r.pdf")],
     [{"type": "file",
       "file": {"filename": "r.pdf", "file_data": "data:application/pdf;base64,AAAA"}}]),
    ("without a title", "openai", [doc(PDF)],
     [{"type": "file",
       "file": {"filename": "document.pdf", "file_data": "data:application/pdf;base64,AAAA"}}]),
    ("where no files are known it is told", "local", [doc(PDF, title="r")],
     "[PDF document: r; this endpoint cannot read it]"),
    ("without a title too", "local", [doc(PDF)],
     "[PDF document: document.pdf; this endpoint cannot read it]"),
    ("a text document", "openai",
     [doc({"type": "text", "media_type": "text/plain", "data": "body"}, title="T",
          context="C", citations={"enabled": True})],
     "[Document: T]\n[Context: C]\nbody"),
    ("without title and context", "openai",
     [doc({"type": "text", "media_type": "text/plain", "data": "body"})],
     "[Document]\nbody"),
    ("as base64", "openai",
     [doc({"type": "base64", "media_type": "text/markdown", "data": "w6k="})],
     "[Document]\n\u00e9"),
    ("of blocks", "openai", [doc({"type": "content", "content": [txt("a"), img]}, title="T")],
     [part("[Document: T]\na"), IMG]),
    ("of a string", "openai", [doc({"type": "content", "content": "a"})], "[Document]\na"),
    ("by address", "openai", [doc({"type": "url", "url": "https://x/a.pdf"})],
     "[Document at https://x/a.pdf; this endpoint cannot fetch it]"),
    ("by address, with a title", "openai",
     [doc({"type": "url", "url": "https://x/a.pdf"}, title="T")],
     "[Document at https://x/a.pdf: T; this endpoint cannot fetch it]"),
    ("a search result", "openai", [SEARCH_RESULT], "[Search result: T]\nSource: S\na\nb"),
    ("an upload", "openai", [{"type": "container_upload", "file_id": "f"}],
     "[unsupported content block: container_upload]"),
    ("an unknown block", "openai", [{"type": "weird"}], "[unsupported content block: weird]"),
    ("an unknown block with a text", "openai", [{"type": "weird", "text": "z"}], "z"),
    ("a call of the user", "openai", [use("i")], "[unsupported content block: tool_use]"),
    ("thinking of the user is dropped", "openai", [txt("a"), think("t", "s")], "a"),
    ("a summary", "openai", [{"type": "compaction", "content": "s"}],
     "[Summary of the earlier conversation]\ns"),
    ("no summary", "openai", [txt("a"), {"type": "compaction", "content": None}], "a"),
]


@table(USER_BLOCKS, "host, blocks, want")
def test_user_blocks(host, blocks, want):
    assert sent(req([usr(blocks)]), host)["messages"] == [usr(want)]


def found_by(kind, name, content): return {"type": kind, "tool_use_id": "s", "content": content}


SEARCHED = {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {"query": "q"}}
HIT = {"type": "web_search_result", "title": "T", "url": "u", "encrypted_content": "e"}
FETCHED = {"type": "web_fetch_result", "url": "u",
           "content": doc({"type": "text", "media_type": "text/plain",
                          "data": "body"})}
RAN = {"type": "bash_code_execution_result", "stdout": "out", "stderr": "err", "return_code": 2}

ASSISTANT_BLOCKS = [  # blocks of one assistant message, its content
    ("text blocks are joined directly", [txt("x"), txt("y")], "xy"),
    ("foreign thinking is dropped", [think("t", "EqQB"), txt("x")], "x"),
    ("text around a dropped block is two paragraphs",
     [txt("x"), think("t", "EqQB"), txt("y")], "x\n\ny"),
    ("a search of the server is told",
     [SEARCHED, found_by("web_search_tool_result", "web_search", [HIT]), txt("x")],
     '[Called web_search with {"query":"q"}]\n\n[Result of web_search]\n- T: u\n\nx'),
    ("a search that failed", [found_by("web_search_tool_result", "web_search", {
        "type": "web_search_tool_result_error", "error_code": "unavailable"})],
        "[web_search failed: unavailable]"),
    ("a page", [txt("x"), found_by("web_fetch_tool_result", "web_fetch", FETCHED)],
     "x\n\n[Result of web_fetch]\nu\nbody"),
    ("a command", [found_by("bash_code_execution_tool_result", "bash_code_execution", RAN)],
     "[Result of bash_code_execution]\nout\nerr\nexit code 2"),
    ("a tool of an MCP server",
     [{"type": "mcp_tool_use", "id": "m", "name": "look", "server_name": "n", "input": {}},
      {"type": "mcp_tool_result", "tool_use_id": "m", "is_error": False,
       "content": [txt("a"), txt("b")]}],
     "[Called look with {}]\n\n[Result of mcp_tool]\na\nb"),
    ("what says nothing is dropped",
     [txt("x"), {"type": "fallback"}, {"type": "mcp_tool_listing"},
      {"type": "container_upload", "file_id": "f"},
      found_by("tool_search_tool_result", "tool_search", {})], "x"),
    ("an image", [img], "[image]"),
    ("an unknown block", [{"type": "weird"}], "[unsupported content block: weird]"),
    ("a summary", [{"type": "compaction", "content": "s"}, txt("x")],
     "[Summary of the earlier conversation]\ns\n\nx"),
]


@table(ASSISTANT_BLOCKS, "blocks, want")
def test_assistant_blocks(blocks, want):
    assert (sent(req([usr("a"), asst(blocks), usr("b")]))["messages"]
            == [usr("a"), asst(want), usr("b")])


def test_text_around_a_call_is_two_paragraphs():
    messages = sent(req([usr("a"), asst([txt("x"), use("call_1"), txt("y")]),
                         usr([res("call_1", "ok")])]))["messages"]
    assert messages == [usr("a"), msg("x\n\ny", [call("call_1")]), tmsg("call_1", "ok")]


@table([
    ("an object", {"a": [1, None]}, '{"a":[1,null]}'),
    ("null", None, "{}"),
    ("a string that is an object", '{"a":1}', '{"a":1}'),
    ("another string", "abc", '{"INVALID_JSON":"abc"}'),
    ("an empty string", "", "{}"),
])
def test_input_of_a_call_in_the_history(given, want):
    block = {"type": "tool_use", "id": "call_1", "name": "f", "input": given}
    messages = sent(req([usr("a"), asst([block]), usr([res("call_1", "ok")])]))["messages"]
    assert messages[1] == msg(None, [call("call_1", "f", want)])


def test_a_call_without_input_has_none():
    messages = sent(req([usr("a"), asst([without(use("call_1"), "input")]),
                         usr([res("call_1", "ok")])]))["messages"]
    assert messages[1] == msg(None, [call("call_1", "f", "{}")])


RESULTS = [  # a tool_result, the text of its tool message
    ("a string", res("call_1", "ok"), "ok"),
    ("text blocks are lines", res("call_1", [txt("a"), txt("b")]), "a\nb"),
    ("no content", res("call_1"), "(no output)"),
    ("null", res("call_1", None), "(no output)"),
    ("an empty string", res("call_1", ""), "(no output)"),
    ("an empty list", res("call_1", []), "(no output)"),
    ("only empty text", res("call_1", [txt("")]), "(no output)"),
    ("an error says so", res("call_1", "boom", is_error=True), "Error: boom"),
    ("but once", res("call_1", "Error: boom", is_error=True), "Error: boom"),
    ("in any case", res("call_1", "ERROR boom", is_error=True), "ERROR boom"),
    ("or in Claude Code's way", res("call_1", "<tool_use_error>x</tool_use_error>", is_error=True),
     "<tool_use_error>x</tool_use_error>"),
    ("an error without a word", res("call_1", "", is_error=True), "Error: tool execution failed"),
    ("a tool found", res("call_1", [reference("f")]), "Tool available: f"),
    ("two tools found", res("call_1", [reference("f"), reference("g")]),
     "Tool available: f\nTool available: g"),
    ("a search result", res("call_1", [SEARCH_RESULT]), "[Search result: T]\nSource: S\na\nb"),
    ("a text document",
     res("call_1", [doc({"type": "text", "media_type": "text/plain", "data": "d"}, title="T")]),
     "[Document: T]\nd"),
    ("an unknown block is its JSON",
     res("call_1", [{"type": "browser_state", "url": "u", "cache_control": {}}]),
     '{"url":"u"}'),
]


@table(RESULTS)
def test_result(given, want):
    assert sent(req(ASKED + [usr([given])]))["messages"] == CALLED + [tmsg("call_1", want)]


@pytest.mark.parametrize("id",
                         ["call_1", "functions.get:0", "x" * 65, "toolu_r123456_abc",
                          "toolu_xyz", "\u00e9", "a b", "chatcmpl-tool-" + "0" * 32,
                          "toolu_01A09q90qw90lq917835lq9"])
def test_an_id_comes_back_to_the_upstream_as_it_was(id):
    translation = aiapiproxy.checked_translation(req(), SETTINGS["local"])
    calls = [call(id), call("other", extra_content=EXTRA)]
    answer = completion({"content": None, "tool_calls": calls})
    blocks = whole_message(answer, translation)["content"]
    assert all(re.fullmatch(r"[a-zA-Z0-9_-]+", block["id"]) for block in blocks)
    history = [usr("Hi"), asst(blocks), usr([res(block["id"], "ok") for block in blocks])]
    assert sent(req(history), "local")["messages"][1:] == [
        msg(None, calls), tmsg(id, "ok"), tmsg("other", "ok")]


MANY = {  # messages and tools whose number a client chooses
    "calls": req([usr("Hi"), asst([use(f"a{i}") for i in range(40000)])]),
    "calls of one id": req([usr("Hi"), asst([use("a")] * 20000), usr([res("a", "ok")] * 20000)]),
    "results in reverse order": req([
        usr("Hi"), asst([use(f"a{i}") for i in range(12000)]),
        usr([res(f"a{i}", "ok") for i in reversed(range(12000))])]),
    "tools": req(tools=[tool("ToolSearch")] + [tool(f"tool {i}", defer_loading=i % 2 == 0)
                                               for i in range(25000)]),
}


@pytest.mark.parametrize("kind", MANY)
def test_many_calls_results_and_tools_take_linear_time(kind):
    began = time.process_time()
    aiapiproxy.checked_translation(MANY[kind], SETTINGS["openai"])
    assert time.process_time() - began < 5  # 0.1 to 0.5 s; quadratic work took minutes


def test_equal_calls_and_results_are_paired_in_order():
    body = sent(req([usr("Hi"), asst([use("a"), use("a"), use("a")]),
                     usr([res("a", "1"), res("a", "2")])]))
    ids = [each["id"] for each in body["messages"][1]["tool_calls"]]
    assert len(set(ids)) == 3
    assert body["messages"][2:] == [tmsg(ids[0], "1"), tmsg(ids[1], "2"),
                                    tmsg(ids[2], "Tool call was not executed.")]


# ---- Reasoning on its way back

def carrier(kind, text): return f"aap1.{kind}.{encoded(zlib.compress(text.encode()))}"


REASONING = [  # blocks before the call, members of the assistant message
    ("reasoning_content", "local", [think("t", "aap1.c.")], {"reasoning_content": "t"}),
    ("reasoning", "local", [think("t", "aap1.r.")], {"reasoning": "t"}),
    ("the details", "openrouter", [think("t", carrier("d", compact(DETAILS)))],
     {"reasoning_details": DETAILS}),
    ("OpenAI does not want it", "openai", [think("t", "aap1.c.")], {}),
    ("nor does Mistral", "mistral", [think("t", "aap1.c.")], {}),
    ("what was not shown", "local", [think("", carrier("c", "secret"))],
     {"reasoning_content": "secret"}),
    ("damaged", "local", [think("", "aap1.c.!"), think("", "aap1.c.AAAA")], {}),
    ("nothing to give back", "local", [think("t", "aap1.n.")], {}),
    ("two blocks", "local", [think("a", "aap1.c."), think("b", "aap1.c.")],
     {"reasoning_content": "ab"}),
    ("the first decides the kind", "local", [think("a", "aap1.r."), think("b", "aap1.c.")],
     {"reasoning": "a"}),
    ("DeepSeek without thinking", "deepseek", [], {}),
]


@table(REASONING, "host, blocks, want")
def test_reasoning_is_sent_back_with_a_call(host, blocks, want):
    messages = sent(req([usr("a"), asst(blocks + [use("call_1")]), usr([res("call_1", "ok")])],
                        max_tokens=50),
                    host)["messages"]
    assert without(messages[1], "role", "content", "tool_calls") == want


def test_reasoning_is_not_sent_back_without_a_call():
    assert sent(req([usr("a"), asst([think("t", "aap1.c."), txt("x")]), usr("b")]),
                "local")["messages"][1] == asst("x")


def test_deepseek_wants_reasoning_with_every_call_while_it_thinks():
    body = sent(req(ASKED + [usr([res("call_1", "ok")])], thinking=ADAPTIVE), "deepseek")
    assert body["messages"][1] == msg(None, [call("call_1")], reasoning_content="")


def test_a_carrier_that_unpacks_to_gigabytes_is_dropped():
    bomb = "aap1.c." + encoded(zlib.compress(b"x" * (16 << 20) + b"x"))
    messages = sent(req([usr("a"), asst([think("", bomb), use("call_1")]),
                         usr([res("call_1", "ok")])]),
                    "local")["messages"]
    assert messages[1] == msg(None, [call("call_1")])


@pytest.mark.parametrize("display", ["summarized", "omitted"])
@pytest.mark.parametrize("reasoning",
                         [{"reasoning_content": "think \u00e9"}, {"reasoning": "think \u00e9"}],
                         ids=["reasoning_content", "reasoning"])
def test_reasoning_comes_back_to_the_upstream_as_it_was(reasoning, display):
    asked = req(thinking={"type": "adaptive", "display": display})
    translation = aiapiproxy.checked_translation(asked, SETTINGS["local"])
    answer = completion({"content": "x", "tool_calls": [call("call_1")], **reasoning}, "tool_calls")
    chunks = [chunk(answer["choices"][0]["message"], "tool_calls"), DONE]
    for blocks in (whole_message(answer, translation)["content"],
                   blocks_of(streamed([sse(chunks)], translation))):
        assert blocks[0]["thinking"] == ("" if display == "omitted" else "think \u00e9")
        history = [usr("Hi"), asst(blocks), usr([res("call_1", "ok")])]
        assert sent(req(history), "local")["messages"][1] == msg("x", [call("call_1")], **reasoning)


def inflating(kind, size):
    """An id or a signature of a few kilobytes that unpacks to `size` bytes of JSON."""
    if kind == "id":
        text = '["call_1",[' + "0," * (size // 2) + "0]]"
        return "toolu_xAAAAAA_" + encoded(zlib.compress(text.encode()))
    return "aap1.c." + encoded(zlib.compress(b"x" * size))


@pytest.mark.parametrize("count, size", [(12, 15_000_000), (6, 8_000_000)])
@pytest.mark.parametrize("kind", ["id", "signature"])
def test_carriers_of_one_request_unpack_to_bounded_memory(kind, count, size):
    made = inflating(kind, size)
    blocks = [use(made) if kind == "id" else think("", made) for _ in range(count)]
    asked = req([usr("Hi"), asst([*blocks, use("toolu_b")]), usr([res("toolu_b", "ok")])])
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    aiapiproxy.checked_translation(asked, SETTINGS["local"])
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert time.process_time() - began < 3
    assert grown < 120_000 * (1 if sys.platform != "darwin" else 1024), "kB"


def test_reasoning_of_several_megabytes_is_carried_and_more_is_dropped():
    texts = ["a" * 3_500_000, "b" * 3_500_000, "c" * 3_500_000]
    blocks = [think("", carrier("c", text)) for text in texts]
    body = sent(req([usr("Hi"), asst([*blocks, use("x")]), usr([res("x", "ok")])]), "local")
    assert body["messages"][1]["reasoning_content"] == texts[0] + texts[1]


# ============================================================================
# 6. CHAT: THE REQUEST
# ============================================================================

ID_FIELDS = {"metadata": {"user_id": "user-1"}}
NO_IDS = {"safety_identifier": None, "prompt_cache_key": None, "user": None, "metadata": None}

FIELDS = [
    ("the plain request", "openai", req(), Exactly(PLAIN)),
    ("a stream asks for its usage", "openai", req(stream=True), Exactly(STREAMED)),
    ("Mistral does not know stream_options", "mistral", req(stream=True),
     {"stream": True, "stream_options": None}),
    *[(f"{host} knows stream_options", host, req(stream=True),
       {"stream_options": {"include_usage": True}})
      for host in ("azure", "openrouter", "deepseek", "gemini", "local")],
    ("stream false is not sent", "openai", req(stream=False), Exactly(PLAIN)),
    ("a null field is absent", "openai",
     req(stream=None, system=None, tools=None, thinking=None, metadata=None, stop_sequences=None,
         tool_choice=None, output_config=None, compaction=None, mcp_servers=None), Exactly(PLAIN)),
    ("an answer of up to 8192 tokens is not streamed", "openai", req(max_tokens=8192),
     {"stream": None}),
    ("a longer one is, to see that it lives", "openai", req(max_tokens=8193), {"stream": True}),
    ("what counts there is the limit sent", "openai", req(model="gpt-4-turbo", max_tokens=16000),
     {"stream": None}),
    ("an o-series model takes max_completion_tokens", "openai", req(model="o3"),
     {"max_completion_tokens": 100, "max_tokens": None}),
    *[(f"{name} takes max_completion_tokens", host, req(model=name),
       {"model": name, "max_completion_tokens": 100, "max_tokens": None})
      for host, name in (("openai", "gpt-5"), ("openai", "gpt-5-chat-latest"),
                         ("local", "openai/gpt-5-mini"), ("openai", "codex-mini-latest"),
                         ("openai", "gpt-5.1:floor"), ("openai", "ft:o4-mini:me"))],
    *[(f"{name} takes max_tokens", "openai", req(model=name),
       {"max_tokens": 100, "max_completion_tokens": None})
      for name in ("gpt-4.1", "gpt-4o-mini", "olmo-2", "my-gpt-5")],
    ("a Claude name is mapped by its family", "local", req(),
     {"model": "qwen3:8b", "max_tokens": 100}),
    ("opus", "openai", req(model="claude-opus-5-5"), {"model": "gpt-5.1"}),
    ("haiku, in any case", "openai", req(model="Claude-HAIKU-4-5"), {"model": "gpt-4o-mini"}),
    ("another Claude name is sonnet", "openai", req(model="claude-new"), {"model": "gpt-4o"}),
    ("[1m] is cut off", "openai", req(model="claude-sonnet-5-5[1m]"), {"model": "gpt-4o"}),
    ("max_tokens is capped at what the model can", "openai", req(max_tokens=32000),
     {"max_tokens": 16384}),
    *[(f"the cap of {name} is {cap}", "openai", req(model=name, max_tokens=200000),
       {"max_tokens": cap})
      for name, cap in (("gpt-4o-2024-05-13", 4096), ("chatgpt-4o-latest", 16384),
                        ("gpt-4.1", 32768), ("gpt-4-turbo", 4096), ("gpt-3.5-turbo", 4096),
                        ("gpt-4", 4096), ("gpt-4-0613", 4096), ("gpt-4-32k", 8192),
                        ("openai/gpt-4o", 16384), ("llama", 200000))],
    *[(f"the cap of {name} is {cap}", "openai", req(model=name, max_tokens=200000),
       {"max_completion_tokens": cap})
      for name, cap in (("gpt-5-chat-latest", 16384), ("gpt-5.2", 128000), ("o1-mini", 65536),
                        ("o3", 100000))],
    ("an unknown model has no cap", "local", req(max_tokens=32000), {"max_tokens": 32000}),
    ("sampling is passed but for top_k", "openai", req(temperature=0.2, top_p=0.9, top_k=40),
     Exactly({**PLAIN, "temperature": 0.2, "top_p": 0.9})),
    ("a temperature out of range is left to the upstream", "openai", req(temperature=1.5),
     {"temperature": 1.5}),
    ("reasoning models take neither sampling nor stop", "openai",
     req(model="o4-mini", temperature=0.2, top_p=0.9, stop_sequences=["x"]),
     {"temperature": None, "top_p": None, "stop": None}),
    ("the first four stop sequences that are not empty", "openai",
     req(stop_sequences=["a", "", "b", "c", "d", "e"]),
     {"stop": ["a", "b", "c", "d"]}),
    ("one stop sequence is a list too", "openai", req(stop_sequences=["END"]), {"stop": ["END"]}),
    ("no stop sequence", "openai", req(stop_sequences=[]), {"stop": None}),
    ("only empty stop sequences", "openai", req(stop_sequences=[""]), {"stop": None}),
    ("the user's id goes to OpenAI hashed", "openai", req(**ID_FIELDS),
     {**NO_IDS, "prompt_cache_key": "aap-c6c289e49e9c05b2145860387b73bcb1",
      "safety_identifier": "c6c289e49e9c05b2145860387b73bcb18df43fb09a1e4a4a9713c76c88bb541b"}),
    *[(f"and not to {host}", host, req(**ID_FIELDS), NO_IDS) for host in HOSTS if host != "openai"],
    ("metadata without an id", "openai", req(metadata={"foo": "x"}), Exactly(PLAIN)),
    ("standard_only is OpenAI's default tier", "openai", req(service_tier="standard_only"),
     {"service_tier": "default"}),
    ("service tier auto is nothing", "openai", req(service_tier="auto"), {"service_tier": None}),
    ("service tiers are OpenAI's alone", "local", req(service_tier="standard_only"),
     {"service_tier": None}),
    ("what the upstream cannot know is dropped", "openai",
     req(cache_control={"type": "ephemeral"}, container="c1", inference_geo="us", diagnostics={},
         context_management={"edits": [{"type": "clear_thinking_20251015"}]}, safeguards=[{}],
         speed="fast", betas=["x"], anthropic_version="y", foo=1, fallbacks=[], top_k=1,
         user_profile_id="u", workspace_id="w", output_config={"task_budget": {"tokens": 1}}),
     Exactly(PLAIN)),
    ("an OpenAI field of the client is not passed", "openai",
     req(n=2, user="u", seed=1, logprobs=True, store=True, verbosity="low", functions=[],
         reasoning_effort="high", response_format={"type": "json_object"}, max_completion_tokens=7,
         stop="x"), Exactly(PLAIN)),
    ("no MCP servers", "openai", req(mcp_servers=[]), Exactly(PLAIN)),
]


@table(FIELDS, "host, asked, want")
def test_field(host, asked, want):
    check_body(sent(asked, host), want)


def test_the_session_decides_the_prompt_cache_key():
    body = sent(req(**ID_FIELDS), session_id="sess-1")
    assert body["prompt_cache_key"] == "aap-abe633f3a47a2758174eabe9160daf36"
    assert sent(req(), session_id="sess-1")["prompt_cache_key"] == body["prompt_cache_key"]
    assert "safety_identifier" not in sent(req(), session_id="sess-1")
    assert "prompt_cache_key" not in sent(req(**ID_FIELDS), "local", "sess-1")


# ---- Structured output

ONE_JSON_VALUE = "Answer with one JSON value only, no other text, that matches this JSON schema: "

FORMATS = [
    ("a schema that qualifies is strict", "openai", output(STRICT),
     {"response_format": response_format(STRICT, True)}),
    ("one that does not is sent all the same", "openai", output(LOOSE),
     {"response_format": response_format(LOOSE, False)}),
    ("cleaned up", "openai", output({"$schema": "s", "title": "t"}),
     {"response_format": response_format({"title": "t", "type": "object", "properties": {}},
                                         False)}),
    ("the older name", "openai", {"output_format": output(STRICT)["output_config"]["format"]},
     {"response_format": response_format(STRICT, True), "output_format": None}),
    ("the newer name wins", "openai", {**output(STRICT), "output_format": {"type": "text"}},
     {"response_format": response_format(STRICT, True)}),
    ("DeepSeek is told in words", "deepseek", output(STRICT),
     {"response_format": {"type": "json_object"},
      "messages": [sysm(ONE_JSON_VALUE + compact(STRICT)), usr("Hi")]}),
    ("and after everything else", "deepseek",
     {**output(STRICT), "system": "s", "tools": [WEB_SEARCH]},
     {"messages": [sysm(f"s\n\n{note('web_search')}\n\n{ONE_JSON_VALUE}{compact(STRICT)}"),
                   usr("Hi")]}),
]


@table(FORMATS, "host, members, want")
def test_structured_output(host, members, want):
    check_body(sent(req(**members), host), want)


# ---- Requests as Claude Code sends them

FIRST = usr("<system-reminder>\nContext.\n</system-reminder>\n\nRead it.\n\n"
            + reminder("Be careful."))
SYSTEM = sysm("You are the client.\n\nWork well.")
SEARCHING = SESSION["messages"] + [
    asst([think("t", "EqQB"), use("toolu_01", "ToolSearch", {"query": "q"})]),
    usr([res("toolu_01", [reference("TaskCreate"), reference("WebFetch")]), txt("Tool loaded.")])]


def test_the_first_request_of_a_session():
    assert sent(SESSION, "local") == {
        "model": "openai/gpt-oss-20b", "messages": [SYSTEM, FIRST], "max_tokens": 128000,
        "stream": True, "stream_options": {"include_usage": True}, "reasoning_effort": "medium",
        "tools": [fn("Read", STRICT), fn("ToolSearch"), fn("Bash")]}


def test_the_turn_after_a_tool_search():
    body = sent({**SESSION, "messages": SEARCHING}, "local")
    assert body["messages"][2:] == [
        msg(None, [call("toolu_01", "ToolSearch", '{"query":"q"}')]),
        tmsg("toolu_01", "Tool available: TaskCreate\nTool available: WebFetch"),
        usr("Tool loaded.")]
    assert [tool["function"]["name"] for tool in body["tools"]] == [
        "Read", "ToolSearch", "Bash", "WebFetch", "TaskCreate"]


def test_the_inner_request_of_a_web_search():
    body = sent(req(tools=[WEB_SEARCH], system=[billing("x"), txt("You search.")],
                    **choice("auto")), "local")
    assert body["messages"][0] == sysm("You search.\n\n" + note("web_search"))
    assert "tools" not in body and "tool_choice" not in body


def test_the_request_for_a_title():
    body = sent(req(tools=[], stream=True, **output(STRICT)), "local")
    assert body["response_format"] == response_format(STRICT, True) and "tools" not in body


# ============================================================================
# 8. BLOCKS
# ============================================================================
#
# A row is (sentence, chunks, events).  Thinking is adaptive, so reasoning shows.  Each stream is
# read whole, byte by byte and cut in two at every place, and has to give the same events.

EMPTY_TOOL = TOOL + " 0- MD(tool_use) ME"
PARTS = '0j`{"a"` 0j`:1}`'
BEGIN, REST = frag(0, "call_1", "f", '{"a"'), frag(0, None, None, ":1}")

TEXTS = [
    ("text", [ROLE, ctext("Hel"), ctext("lo"), cend("stop"), cuse(5, 3), DONE], HELLO),
    ("an answer without content", [ROLE, cend("stop"), cuse(5, 0), DONE], "MS MD(end_turn) ME"),
    ("the role on each chunk", [chunk({"role": "assistant", "content": "Hel"}),
                                chunk({"role": "assistant", "content": "lo"})] + STOP, HELLO),
    ("the last text with the finish reason",
     [ctext("Hel"), chunk({"content": "lo"}, "stop"), DONE], HELLO),
    ("text after the finish reason", [chunk({"content": "Hel"}, "stop"), ctext("lo"), DONE], HELLO),
    ("what says nothing",
     [{"choices": [], "prompt_filter_results": []}, {"choices": None}, {"id": "x"}, chunk(None),
      chunk({}), chunk({"content": None, "tool_calls": None}), ctext(""), chunk({"tool_calls": []}),
      chunk({"content": "x"}, usage=None), chunk({}, ""),
      chunk({"annotations": [{}], "audio": {}, "new": 1})] + STOP, ONE_X),
    ("a list of parts",
     [chunk({"content": [txt("Hel"), {"type": "new"}]}), chunk({"content": [txt("lo")]})] + STOP,
     HELLO),
    ("a message in place of the delta", [{"choices": [{"index": 0, "message": {"content": "x"},
                                                       "finish_reason": "stop"}]}, DONE], ONE_X),
    ("only the first choice", [{"choices": [{"index": 0, "delta": {"content": "x"}},
                                            {"index": 1, "delta": {"content": "y"}}]},
                               {"choices": [{"index": 1, "delta": {"content": "z"}}]}]
     + STOP, ONE_X),
    ("white space in front of text", [ctext("\n"), ctext("hi")] + STOP,
     'MS 0+text 0t"\\nhi" ' + CLOSED),
    ("only white space", [ctext("\n\n")] + STOP, "MS MD(end_turn) ME"),
    ("a refusal", [chunk({"refusal": "I can"}), chunk({"refusal": "not."})] + STOP,
     'MS 0+text 0t"I can" 0t"not." 0- MD(refusal) ME'),
    ("a refusal that is as long as the texts before it",
     [ctext("abc")] * 9 + [chunk({"refusal": "No."})] * 2 + STOP,
     'MS 0+text ' + '0t"abc" ' * 9 + '0t"No." ' * 2 + '0- MD(refusal) ME'),
    ("the filter", [ctext("x"), cend("content_filter"), DONE], 'MS 0+text 0t"x" 0- MD(refusal) ME'),
    ("the length limit", [ctext("x"), cend("length"), DONE],
     'MS 0+text 0t"x" 0- MD(max_tokens) ME'),
    ("the last finish reason counts",
     [ctext("x"), cend("length"), cend("stop"), cend(""), DONE], ONE_X),
    ("an unknown finish reason", [ctext("x"), cend("weird"), DONE], ONE_X),
    ("tool_calls without a call", [ctext("x"), cend("tool_calls"), DONE], ONE_X),
    ("an emoji in halves", [ctext("a\ud83d"), ctext("\ude00b")] + STOP,
     'MS 0+text 0t"a" 0t"\U0001f600b" ' + CLOSED),
    ("half an emoji", [ctext("a\ud83d")] + STOP, 'MS 0+text 0t"a" 0t"\ufffd" ' + CLOSED),
    ("half an emoji, then text", [ctext("a\ud83d"), ctext("b")] + STOP,
     'MS 0+text 0t"a" 0t"\ufffdb" ' + CLOSED),
    ("the other half", [ctext("\ude00b")] + STOP, 'MS 0+text 0t"\ufffdb" ' + CLOSED),
]

THOUGHTS = [
    ("reasoning, then text", [creason("a"), creason("b"), ctext("x")] + STOP,
     'MS 0+thinking 0h"a" 0h"b" 0s"aap1.c." 0- 1+text 1t"x" 1- MD(end_turn) ME'),
    ("the other field", [chunk({"reasoning": "a"}), ctext("x")] + STOP,
     'MS 0+thinking 0h"a" 0s"aap1.r." 0- 1+text 1t"x" 1- MD(end_turn) ME'),
    ("the same text in both fields",
     [chunk({"reasoning_content": "a", "reasoning": "a"}), ctext("x")] + STOP,
     'MS 0+thinking 0h"a" 0s"aap1.c." 0- 1+text 1t"x" 1- MD(end_turn) ME'),
    ("all in one chunk",
     [chunk({"reasoning_content": "r", "content": "x",
             "tool_calls": [entry(0, "call_1", "f", '{"a":1}')]}, "tool_calls"), DONE],
     'MS 0+thinking 0h"r" 0s"aap1.c." 0- 1+text 1t"x" 1- 2+tool(call_1,f) 2j`{"a":1}` 2- '
     'MD(tool_use) ME'),
    ("in turns", [creason("a"), ctext("x"), creason("b"), ctext("y")] + STOP,
     'MS 0+thinking 0h"a" 0s"aap1.c." 0- 1+text 1t"x" 1- 2+thinking 2h"b" 2s"aap1.c." 2- 3+text '
     '3t"y" 3- MD(end_turn) ME'),
    ("after a call", [WHOLE, creason("a")] + ARGS_DONE,
     TOOL + ' 0j`{"a":1}` 0- 1+thinking 1h"a" 1s"aap1.c." 1- MD(tool_use) ME'),
    ("a thinking part",
     [chunk({"content": [{"type": "thinking", "thinking": [txt("a")]}, txt("x")]})] + STOP,
     'MS 0+thinking 0h"a" 0s"aap1.n." 0- 1+text 1t"x" 1- MD(end_turn) ME'),
    ("empty reasoning", [creason(""), chunk({"reasoning": None}), ctext("x")] + STOP, ONE_X),
    ("only reasoning", [creason("a")] + STOP, 'MS 0+thinking 0h"a" 0s"aap1.c." 0- MD(end_turn) ME'),
    ("an emoji in halves, thought", [creason("a\ud83d"), creason("\ude00")] + STOP,
     'MS 0+thinking 0h"a" 0h"\U0001f600" 0s"aap1.c." 0- MD(end_turn) ME'),
]

CALLS = [
    ("arguments in fragments, cut in an escape",
     [frag(0, "call_1", "f", ""), frag(0, None, None, '{"c": "Par'),
      frag(0, None, None, 'is \\u00'), frag(0, None, None, 'e9"}')]
     + ARGS_DONE, TOOL + ' 0j`{"c": "Par` 0j`is \\u00` 0j`e9"}` 0- MD(tool_use) ME'),
    ("a name in fragments",
     [frag(0, "call_1", "get_", None), frag(0, None, "weather", None), frag(0, None, None, "{}")]
     + ARGS_DONE, "MS 0+tool(call_1,get_weather) 0j`{}` 0- MD(tool_use) ME"),
    ("a name that is repeated", [BEGIN, frag(0, "call_1", "f", ":1}")] + ARGS_DONE,
     f"{TOOL} {PARTS} 0- MD(tool_use) ME"),
    ("an empty name after the name", [BEGIN, frag(0, "", "", ":1}")] + ARGS_DONE,
     f"{TOOL} {PARTS} 0- MD(tool_use) ME"),
    ("one after another", [WHOLE, frag(1, "call_2", "g", '{"b"'), frag(1, None, None, ":2}")]
     + ARGS_DONE, TOOL + ' 0j`{"a":1}` 0- 1+tool(call_2,g) 1j`{"b"` 1j`:2}` 1- MD(tool_use) ME'),
    ("two in turns: the second waits",
     [frags((0, "call_1", "f", ""), (1, "call_2", "g", "")), frag(0, None, None, '{"a"'),
      frag(1, None, None, '{"b"'), frag(0, None, None, ":1}"),
      frag(1, None, None, ":2}")] + ARGS_DONE,
     f'{TOOL} {PARTS} 0- 1+tool(call_2,g) 1j`{{"b"` 1j`:2}}` 1- MD(tool_use) ME'),
    ("what has waited is one delta",
     [frag(0, "call_1", "f", '{"a"'), frag(1, "call_2", "g", '{"b"'), frag(1, None, None, ":2}"),
      frag(0, None, None, ":1}")]
     + ARGS_DONE, f'{TOOL} {PARTS} 0- 1+tool(call_2,g) 1j`{{"b":2}}` 1- MD(tool_use) ME'),
    ("two at one index with two ids", [WHOLE, frag(0, "call_2", "f", '{"a":2}')] + STOP,
     TOOL + ' 0j`{"a":1}` 0- 1+tool(call_2,f) 1j`{"a":2}` 1- MD(tool_use) ME'),
    ("two without index", [frags((None, "call_1", "f", '{"a":1}'), (None, "call_2", "g", "{}"))]
     + ARGS_DONE, TOOL + ' 0j`{"a":1}` 0- 1+tool(call_2,g) 1j`{}` 1- MD(tool_use) ME'),
    ("fragments without index", [frag(None, "call_1", "f", '{"a"'), frag(None, None, None, ":1}")]
     + ARGS_DONE, f"{TOOL} {PARTS} 0- MD(tool_use) ME"),
    ("two at two indexes with one id", [WHOLE, frag(1, "call_1", "f", '{"a":2}')] + ARGS_DONE,
     TOOL + ' 0j`{"a":1}` 0- 1+tool(toolu_r(call_1),f) 1j`{"a":2}` 1- MD(tool_use) ME'),
    ("two in turns with one id",
     [frags((0, "call_1", "f", ""), (1, "call_1", "g", "")), frag(1, "call_1", None, "{}"),
      frag(0, "call_1", None, '{"a":1}')] + ARGS_DONE,
     TOOL + ' 0j`{"a":1}` 0- 1+tool(toolu_r(call_1),g) 1j`{}` 1- MD(tool_use) ME'),
    ("two without index with one id",
     [frag(None, "call_1", "f", '{"a":1}'), frag(None, "call_1", "f", '{"a":2}')] + ARGS_DONE,
     TOOL + ' 0j`{"a":1}` 0- 1+tool(toolu_r(call_1),f) 1j`{"a":2}` 1- MD(tool_use) ME'),
    ("one without index, sent twice",
     [frag(None, "call_1", "f", '{"a"'), frag(None, None, None, ":1}"),
      frag(None, "call_1", "f", '{"a":1}')] + ARGS_DONE, f"{TOOL} {PARTS} 0- MD(tool_use) ME"),
    ("a custom call",
     [chunk({"tool_calls": [{"index": 0, "id": "call_1", "type": "custom",
                             "custom": {"name": "f", "input": 'a"'}}]}),
      chunk({"tool_calls": [{"index": 0, "custom": {"input": "{b"}}]})] + ARGS_DONE,
     TOOL + ' 0j`{"input":"a\\"{b"}` 0- MD(tool_use) ME'),
    ("a call of another type",
     [chunk({"tool_calls": [{"index": 0, "id": "c1", "type": "new", "new": {}}]}), ctext("x")]
     + ARGS_DONE, ONE_X),
    ("two without ids", [frag(0, None, "f", '{"a":1}'), frag(0, None, "f", '{"a":2}')] + STOP,
     'MS 0+tool(toolu_new,f) 0j`{"a":1}` 0- 1+tool(toolu_new,f) 1j`{"a":2}` 1- MD(tool_use) ME'),
    ("neither index nor id",
     [frag(None, None, "f", '{"a":1}'), frag(None, None, "f", '{"a":2}')] + STOP,
     'MS 0+tool(toolu_new,f) 0j`{"a":1}` 0- 1+tool(toolu_new,f) 1j`{"a":2}` 1- MD(tool_use) ME'),
    ("neither index nor id, one call",
     [frag(None, None, "f", '{"a"'), frag(None, None, "f", ":1}")] + STOP,
     f"MS 0+tool(toolu_new,f) {PARTS} 0- MD(tool_use) ME"),
    ("an id made up for each fragment", [BEGIN, frag(0, "id2", None, ":1}")] + ARGS_DONE,
     f"{TOOL} {PARTS} 0- MD(tool_use) ME"),
    ("with the name again", [BEGIN, frag(0, "id2", "f", ":1}")] + ARGS_DONE,
     f"{TOOL} {PARTS} 0- MD(tool_use) ME"),
    ("an id on each fragment", [BEGIN, frag(0, "call_1", None, ":1}")] + ARGS_DONE,
     f"{TOOL} {PARTS} 0- MD(tool_use) ME"),
    ("an id that is late", [frag(0, None, "f", None), frag(0, "call_9", None, "{}")] + ARGS_DONE,
     "MS 0+tool(call_9,f) 0j`{}` 0- MD(tool_use) ME"),
    ("indexes that start at 1", [frag(1, "call_1", "f", '{"a":1}')] + ARGS_DONE, ONE_TOOL),
    ("no arguments", [frag(0, "call_1", "f", "")] + ARGS_DONE, EMPTY_TOOL),
    ("arguments null", [frag(0, "call_1", "f", None)] + ARGS_DONE, EMPTY_TOOL),
    ("arguments of white space", [frag(0, "call_1", "f", " \n")] + ARGS_DONE, EMPTY_TOOL),
    ("arguments null as text", [frag(0, "call_1", "f", "null")] + ARGS_DONE, EMPTY_TOOL),
    ("white space in front", [frag(0, "call_1", "f", '\n {"a":1}')] + ARGS_DONE, ONE_TOOL),
    ("arguments that are no string", [chunk({"tool_calls": [
        {"index": 0, "id": "call_1", "function": {"name": "f", "arguments": {"a": 1}}}]})]
     + ARGS_DONE, ONE_TOOL),
    ("one brace too many", [frag(0, "call_1", "f", '{"a":1}}')] + ARGS_DONE, ONE_TOOL),
    ("said twice", [WHOLE, frag(0, None, None, '{"a":1}')] + ARGS_DONE, ONE_TOOL),
    ("braces in strings", [frag(0, "call_1", "f", '{"a":"}\\"}"'), frag(0, None, None, "}")]
     + ARGS_DONE, TOOL + ' 0j`{"a":"}\\"}"` 0j`}` 0- MD(tool_use) ME'),
    ("an empty object in front of the real one",
     [frag(0, "call_1", "f", "{}"), frag(0, None, None, '{"a"'), REST]
     + ARGS_DONE, f"{TOOL} {PARTS} 0- MD(tool_use) ME"),
    ("raw control characters in a string",
     [frag(0, "call_1", "f", '{"a":"x\n\t\x01y"}')] + ARGS_DONE,
     TOOL + ' 0j`{"a":"x\\n\\t\\u0001y"}` 0- MD(tool_use) ME'),
    ("encoded twice", [frag(0, "call_1", "f", '"{\\"a\\":'), frag(0, None, None, '1}"')]
     + ARGS_DONE, ONE_TOOL),
    ("an array", [frag(0, "call_1", "f", "[1]")] + ARGS_DONE,
     TOOL + ' 0j`{"INVALID_JSON":"[1]"}` 0- MD(tool_use) ME'),
    ("malformed inside the braces is the client's", [frag(0, "call_1", "f", "{'a':1}")] + ARGS_DONE,
     TOOL + " 0j`{'a':1}` 0- MD(tool_use) ME"),
    ("an emoji in halves, as arguments",
     [frag(0, "call_1", "f", '{"a":"\ud83d'), frag(0, None, None, '\ude00"}')]
     + ARGS_DONE, TOOL + ' 0j`{"a":"` 0j`\U0001f600"}` 0- MD(tool_use) ME'),
    ("cut off at the length limit", [frag(0, "call_1", "f", '{"a": "ab'), cend("length"), DONE],
     TOOL + ' 0j`{"a": "ab` 0- MD(max_tokens) ME'),
    ("cut off by the filter", [frag(0, "call_1", "f", '{"a": "ab'), cend("content_filter"), DONE],
     TOOL + ' 0j`{"a": "ab` 0- MD(refusal) ME'),
    ("cut off without a reason is never finished",
     [frag(0, "call_1", "f", '{"a": "ab')] + ARGS_DONE, TOOL + ' 0j`{"a": "ab` ERR(api_error)'),
    ("complete at the length limit", [WHOLE, cend("length"), DONE],
     TOOL + ' 0j`{"a":1}` 0- MD(max_tokens) ME'),
    ("text, call, text", [ctext("A"), frag(0, "call_1", "f", "{}"), ctext("B")] + ARGS_DONE,
     'MS 0+text 0t"A" 0- 1+tool(call_1,f) 1j`{}` 1- 2+text 2t"B" 2- MD(tool_use) ME'),
    ("text inside a call waits for its end", [BEGIN, ctext("B"), REST] + ARGS_DONE,
     f'{TOOL} {PARTS} 0- 1+text 1t"B" 1- MD(tool_use) ME'),
    ("white space in front of a call", [ctext("\n\n"), WHOLE] + ARGS_DONE, ONE_TOOL),
    ("stop after a call", [WHOLE] + STOP, ONE_TOOL),
    ("the old function_call", [chunk({"function_call": {"name": "f", "arguments": ""}}),
                               chunk({"function_call": {"arguments": '{"a":1}'}}),
                               cend("function_call"), DONE],
     'MS 0+tool(toolu_new,f) 0j`{"a":1}` 0- MD(tool_use) ME'),
    ("an id with other characters", [frag(0, "functions.get:0", "get", "{}")] + ARGS_DONE,
     "MS 0+tool(toolu_r(functions.get:0),get) 0j`{}` 0- MD(tool_use) ME"),
    ("a thought signature travels in the id", [chunk({"tool_calls": [
        {**entry(0, "c1", "f", '{"a":1}'), "extra_content": {"b": 1}}]})] + ARGS_DONE,
     'MS 0+tool(toolu_x(["c1",{"b":1}]),f) 0j`{"a":1}` 0- MD(tool_use) ME'),
    ("a call without a name", [frag(0, "call_1", None, "{}")] + ARGS_DONE, "MS ERR(api_error)"),
    ("a call without a name, then text", [frag(0, "call_1", None, "{}"), ctext("x")] + ARGS_DONE,
     "MS ERR(api_error)"),
]

BAD_502 = {"error": {"message": "m", "code": 502}}
ENDS = [
    ("without [DONE], after a finish reason", [ctext("x"), cend("stop")], ONE_X),
    ("[DONE] without a finish reason", [ctext("x"), DONE], ONE_X),
    ("[DONE] after usage alone", [cuse(5, 0), DONE], "MS MD(end_turn) ME"),
    ("[DONE] after nothing", [ROLE, DONE], "MS ERR(api_error)"),
    ("white space around [DONE]", [ctext("x"), " [DONE] "], ONE_X),
    ("what follows [DONE] is not read", [ctext("x"), DONE, ctext("y"), BAD_502], ONE_X),
    ("the end without a finish reason", [ctext("x")], BROKEN),
    ("the end in the middle of a call", [BEGIN], TOOL + ' 0j`{"a"` ERR(api_error)'),
    ("[DONE] alone", [DONE], "HTTP 502 api_error"),
    ("nothing", [], "HTTP 502 api_error"),
    ("an error", [ctext("x"), BAD_502], BROKEN),
    ("an error with a useful code", [ctext("x"), {"error": {"message": "m", "code": 529}}],
     'MS 0+text 0t"x" ERR(overloaded_error)'),
    ("an error with a useful type",
     [ctext("x"), {"error": {"message": "m", "type": "rate_limit_error"}}],
     'MS 0+text 0t"x" ERR(rate_limit_error)'),
    ("an error that is a string", [ctext("x"), {"error": "m"}], BROKEN),
    ("an error by its object", [ctext("x"), {"object": "error", "message": "m", "code": 503}],
     'MS 0+text 0t"x" ERR(overloaded_error)'),
    ("an error by its type",
     [ctext("x"), {"type": "error", "error": {"type": "overloaded_error", "message": "m"}}],
     'MS 0+text 0t"x" ERR(overloaded_error)'),
    ("an error in other members", [ctext("x"), {"error_type": "timeout", "error_message": "m"}],
     'MS 0+text 0t"x" ERR(timeout_error)'),
    ("an error in a list", [ctext("x"), [BAD_502]], BROKEN),
    ("an unknown object at the end", [ctext("x"), {"detail": "m"}], BROKEN),
    ("an error that is null", [{**ctext("x"), "error": None}] + STOP, ONE_X),
    ("an error after the finish reason", [ctext("x"), cend("stop"), BAD_502], BROKEN),
    ("an error first is a status", [{"error": {"message": "slow", "code": 429}}],
     "HTTP 429 rate_limit_error"),
    ("an overflow first is a status",
     [{"error": {"message": "m", "code": "context_length_exceeded"}}],
     "HTTP 400 invalid_request_error"),
    ("no JSON", [ctext("x"), "{oops"], BROKEN),
    ("no object", [ctext("x"), "5"], BROKEN),
    ("no JSON first", ["oops"], "HTTP 502 api_error"),
    ("finish reason error", [ctext("x"), cend("error"), DONE], BROKEN),
    ("finish reason of a server out of resources",
     [ctext("x"), cend("insufficient_system_resource"), DONE],
     'MS 0+text 0t"x" ERR(overloaded_error)'),
]


@table([(name + ": " + sentence, chunks, want) for name, rows in
        (("text", TEXTS), ("thinking", THOUGHTS), ("a call", CALLS), ("the end", ENDS))
        for sentence, chunks, want in rows], "chunks, want")
@BOTH_WAYS
def test_stream(chunks, want, shortcuts):
    check_stream(sse(chunks), want, req(thinking=ADAPTIVE), shortcuts=shortcuts)


AT_ONCE = [  # each chunk, and its events before the next chunk arrives
    ("text", [(ROLE, "MS"), (ctext("Hel"), '0+text 0t"Hel"'), (ctext("lo"), '0t"lo"'),
              (cend("stop"), ""), (DONE, "0- MD(end_turn) ME")]),
    ("thinking",
     [(creason("a"), 'MS 0+thinking 0h"a"'), (creason("b"), '0h"b"'),
      (ctext("x"), '0s"aap1.c." 0- 1+text 1t"x"')]),
    ("arguments", [(frag(0, "call_1", "f", ""), "MS"),
                   (frag(0, None, None, '{"a"'), '0+tool(call_1,f) 0j`{"a"`'),
                   (frag(0, None, None, ":1"), "0j`:1`"), (frag(0, None, None, "}"), "0j`}`"),
                   (frag(1, "call_2", "g", '{"b"'), '0- 1+tool(call_2,g) 1j`{"b"`')]),
    ("Azure's first chunk", [({"choices": [], "prompt_filter_results": []}, "MS")]),
    ("what might begin a stop sequence",
     [(ctext("abcSTO"), 'MS 0+text 0t"abc"'), (ctext("x"), '0t"STOx"')]),
    ("a call that waits", [(BEGIN, 'MS 0+tool(call_1,f) 0j`{"a"`'),
                           (frag(1, "call_2", "g", '{"b"'), ""),
                           (REST, '0j`:1}` 0- 1+tool(call_2,g) 1j`{"b"`')]),
]


@BOTH_WAYS
@table(AT_ONCE, "steps")
def test_each_chunk_gives_its_events_at_once(steps, shortcuts):
    asked = req(thinking=ADAPTIVE, stop_sequences=["STOP"])
    translation = aiapiproxy.checked_translation(asked, SETTINGS["openai"])
    translator = translator_of(translation, new_ids(), shortcuts)
    for given, want in steps:
        out = translator.feed(sse([given])).decode()
        found = [notation(json.loads(data)) for data in re.findall(r"^data: (.*)$", out, re.M)]
        assert " ".join(each for each in found if each != "PING") == want


CHUNKS = [ROLE, ctext("x"), ctext("\n"), ctext("END"), ctext("\ud83d"), creason("r"), WHOLE,
          BEGIN, REST, frag(1, "call_2", "g", '{"b":'), frag(1, None, None, "2}"),
          frag(None, None, "h", "{}"), frag(None, None, None, " "), frag(0, None, "f", None),
          frags((2, "call_3", "f", "{"), (3, "call_4", "f", "[1]")), chunk({"refusal": "No."}),
          cuse(5, 3), cend("stop"), cend("length"), cend("tool_calls"),
          chunk({"reasoning_details": DETAILS}), chunk({"function_call": {"name": "f"}}),
          {"error": {"message": "m", "code": 529}}, DONE, chunk({"content": "<think>a</think>"}),
          ctext(" x")]


def test_an_odd_stream_keeps_to_the_order_of_events():
    """Chunks in any order, some with wrong values; printed() checks the order of the events."""
    dice = random.Random(1)
    kinds = [("openai", {"thinking": ADAPTIVE}), ("local", {"thinking": OMITTED}),
             ("local", ENDING), ("openai", ONE_CALL_AT_MOST)]
    translations = [aiapiproxy.checked_translation(req(**members), SETTINGS[host])
                    for host, members in kinds]
    for _ in range(3000):
        chunks = [dice.choice(CHUNKS) for _ in range(dice.randrange(1, 9))]
        chunks = [spoiled(each, dice) if isinstance(each, dict) and dice.random() < 0.2 else each
                  for each in chunks]
        raw, translation = sse(chunks), dice.choice(translations)
        cut = dice.randrange(len(raw))
        whole = streamed([raw], translation)
        for shortcuts in (aiapiproxy.PLAIN, aiapiproxy.SHORTCUTS):
            assert whole == streamed([raw[:cut], raw[cut:]], translation, shortcuts), chunks
        if isinstance(whole, bytes):
            printed(whole)


@pytest.mark.parametrize("chunks, asked", [
    ([ctext("x" * 600)] * 2, req(max_tokens=16000)),
    ([frag(0, "call_1", "f", '{"a":"' + "x" * 600), frag(1, "call_2", "g", '{"b":"' + "x" * 1200)],
     req(stream=True)),
    ([creason("x" * 600)] * 2,
     req(stream=True, thinking={"type": "adaptive", "display": "omitted"})),
    ([frag(0, "call_1", "f", "[" + "1," * 600)], req(stream=True)),
], ids=["a collected answer", "a call behind another", "hidden reasoning",
        "arguments to be repaired"])
def test_the_buffer_of_an_answer_has_a_bound(chunks, asked, monkeypatch):
    monkeypatch.setattr(aiapiproxy, "MAX_BUFFERED_ANSWER", 1000)
    answer, _ = run(asked_once(stream(*chunks, cend("stop"), DONE), asked))
    if asked.get("stream"):
        assert "ERR(api_error)" in said(answer)
    else:
        assert said(answer).startswith("502 api_error: ")


# ---- Complete arguments

INVALID = [  # arguments that are no JSON object
    ("single quotes", "{'a':1}"), ("an array", "[1]"), ("a number", "1"), ("NaN", '{"a": NaN}'),
    ("infinity", '{"a":1e999}'), ("a trailing comma", '{"a":1,}'), ("cut off", '{"a": "ab'),
]

ARGUMENTS = [
    ("an object", '{"a":1}', {"a": 1}),
    ("an object that is no string", {"a": 1}, {"a": 1}),
    ("none", "", {}), ("null", None, {}), ("white space", "  ", {}), ("null as text", "null", {}),
    ("an empty array", "[]", {}), ("an empty string", '""', {}),
    ("encoded twice", '"{\\"a\\":1}"', {"a": 1}),
    ("one brace too many", '{"a":1}}', {"a": 1}),
    ("said twice", '{"a":1}{"a":1}', {"a": 1}),
    ("a raw line end", '{"a":"x\ny"}', {"a": "x\ny"}),
    *[(sentence, text, {"INVALID_JSON": text}) for sentence, text in INVALID],
]


@table(ARGUMENTS)
def test_arguments(given, want):
    answer = completion(calling(call("call_1", "f", given)), "tool_calls")
    assert answered(answer, req())["content"] == [{**use("call_1"), "input": want}]


def test_a_call_without_arguments_has_empty_input():
    answer = completion(calling({"id": "call_1", "function": {"name": "f"}}))
    assert answered(answer, req())["content"] == [use("call_1")]


@table([(sentence, text) for sentence, text in INVALID], "text")
def test_half_a_call_is_dropped_at_the_length_limit(text):
    answer = completion(calling(call("call_1"), call("call_2", "f", text)), "length")
    message = answered(answer, req())
    assert (message["content"], message["stop_reason"]) == ([use("call_1")], "max_tokens")


def test_endless_white_space_in_arguments_is_an_error():
    translation = aiapiproxy.checked_translation(req(), SETTINGS["openai"])
    blank = frag(0, None, None, " " * 100)
    out = printed(streamed([sse([frag(0, "call_1", "f", '{"a":1,')] + [blank] * 6)], translation))
    assert out.startswith(TOOL + ' 0j`{"a":1,`') and out.endswith(" ERR(api_error)")


def test_white_space_in_a_string_may_be_long():
    translation = aiapiproxy.checked_translation(req(), SETTINGS["openai"])
    long = f'{{"a":"{" " * 600}"}}'
    out = printed(streamed([sse([frag(0, "call_1", "f", long)] + ARGS_DONE)], translation))
    assert out == f"{TOOL} 0j`{long}` 0- MD(tool_use) ME"


# ---- Why it stopped

FILTERED = "The upstream's content filter stopped the answer."

STOPS = [  # message, finish_reason, stop_reason
    ("stop", TEXT, "stop", "end_turn"), ("tool calls", CALL, "tool_calls", "tool_use"),
    ("stop with a call", CALL, "stop", "tool_use"),
    ("tool_calls without a call", TEXT, "tool_calls", "end_turn"),
    ("nothing with a call", CALL, None, "tool_use"),
    ("function_call", CALL, "function_call", "tool_use"),
    ("nothing", TEXT, None, "end_turn"), ("eos", TEXT, "eos", "end_turn"),
    ("an unknown reason", TEXT, "weird", "end_turn"),
    ("an empty reason", TEXT, "", "end_turn"),
    ("length", TEXT, "length", "max_tokens"),
    ("length after a whole call", CALL, "length", "max_tokens"),
    ("Gemini's length", TEXT, "MAX_TOKENS", "max_tokens"),
    ("Mistral's length", TEXT, "model_length", "max_tokens"),
    *[(f"the filter, as {each}", TEXT, each, "refusal") for each in
      ("content_filter", "SAFETY", "recitation", "blocklist", "prohibited_content", "spii",
       "sensitive")],
    ("the filter with a call", CALL, "content_filter", "refusal"),
    ("a refusal", {"refusal": "No."}, "stop", "refusal"),
    ("a refusal with a call", {**CALL, "refusal": "No."}, "tool_calls", "tool_use"),
]


@table(STOPS, "message, finish, want")
def test_stop_reason(message, finish, want):
    got = answered(completion(message, finish), req())
    details = {"type": "refusal", "category": None,
               "explanation": message.get("refusal") or FILTERED}
    assert (got["stop_reason"], got["stop_sequence"]) == (want, None)
    assert got["stop_details"] == (details if want == "refusal" else None)


@table([("its own words", [chunk({"refusal": "I can"}), chunk({"refusal": "not."})] + STOP,
         "I cannot."),
        ("the filter's", [ctext("x"), cend("content_filter"), DONE], FILTERED)])
def test_explanation_of_a_refusal(given, want):
    translation = aiapiproxy.checked_translation(req(), SETTINGS["openai"])
    found = events(streamed([sse(given)], translation))
    assert found[-2]["delta"] == {"stop_reason": "refusal", "stop_sequence": None,
                                  "stop_details": {"type": "refusal", "category": None,
                                                   "explanation": want}}


# ---- Usage

def thought(count): return {"output_tokens_details": {"thinking_tokens": count}}


USAGES = [
    ("plain", used(10, 2), usage(10, 2)),
    ("OpenAI's cache and reasoning",
     used(100, 20, **cached(60), completion_tokens_details={"reasoning_tokens": 8}),
     usage(40, 20, 60, **thought(8))),
    ("no reasoning is known too", used(9, 2, completion_tokens_details={"reasoning_tokens": 0}),
     usage(9, 2, **thought(0))),
    ("the cache written", used(100, 1, **cached(60, cache_write_tokens=30)), usage(10, 1, 60, 30)),
    ("DeepSeek's cache", used(100, 1, prompt_cache_hit_tokens=64), usage(36, 1, 64)),
    ("cached twice counts once", used(100, 1, prompt_cache_hit_tokens=64, **cached(64)),
     usage(36, 1, 64)),
    ("more cached than there was", used(5, 1, cache_read_input_tokens=50), usage(0, 1, 50)),
    ("xAI leaves reasoning out",
     used(10, 5, total_tokens=35, completion_tokens_details={"reasoning_tokens": 20}),
     usage(10, 25, **thought(20))),
    ("others do not",
     used(10, 25, total_tokens=35, completion_tokens_details={"reasoning_tokens": 20}),
     usage(10, 25, **thought(20))),
    ("floats", used(10.0, 2.0), usage(10, 2)),
    ("the prompt from the total", {"completion_tokens": 2, "total_tokens": 12}, usage(10, 2)),
    ("the prompt from the total, some of it cached",
     {"completion_tokens": 2, "total_tokens": 12, **cached(4)}, usage(6, 2, 4)),
    ("the answer from the total", {"prompt_tokens": 10, "total_tokens": 12}, usage(10, 2)),
    ("details null", used(10, 2, prompt_tokens_details=None, completion_tokens_details=None),
     usage(10, 2)),
    ("numbers that are none",
     used(10, 2, prompt_tokens_details={"cached_tokens": -1}, cached_tokens="4"), usage(10, 2)),
    ("none: both are estimated", None, usage(8, 2)),
]


@table(USAGES)
def test_usage(given, want):
    assert answered(completion({"content": "Hello"}, usage=given), req())["usage"] == want


@table([("priority", "priority", "priority"), ("fast", "fast", "priority"),
        ("flex", "flex", "standard"), ("default", "default", "standard"),
        ("unknown", "gold", None), ("null", None, None)])
def test_service_tier(given, want):
    answer = {**completion(TEXT, usage=used(1, 1)), "service_tier": given}
    assert answered(answer, req())["usage"] == usage(1, 1, tier=want)


def usage_on(chunk, prompt, generated): return {**chunk, "usage": used(prompt, generated)}


def stream_usage(input, generated, read=0, written=0, **details):
    return without(usage(input, generated, read, written, **details), "service_tier")


STREAM_USAGES = [
    ("at the end", [ctext("x"), cend("stop"), cuse(5, 3), DONE], stream_usage(5, 3)),
    ("on the last chunk", [ctext("x"), usage_on(cend("stop"), 5, 3), DONE], stream_usage(5, 3)),
    ("on each chunk the total so far",
     [usage_on(ctext("x"), 5, 1), usage_on(ctext("y"), 5, 2), usage_on(cend("stop"), 5, 3), DONE],
     stream_usage(5, 3)),
    ("null on the others", [usage_on(ctext("x"), 5, 3), {**cend("stop"), "usage": None}, DONE],
     stream_usage(5, 3)),
    ("before the text", [cuse(5, 3), ctext("x")] + STOP, stream_usage(5, 3)),
    ("Groq's place", [ctext("x"), {**cend("stop"), "x_groq": {"usage": used(5, 3)}}, DONE],
     stream_usage(5, 3)),
    ("with cache and reasoning",
     [ctext("x"), cend("stop"), cuse(100, 20, **cached(60), completion_tokens_details={
         "reasoning_tokens": 8}), DONE], stream_usage(40, 20, 60, **thought(8))),
    ("none: both are estimated", [ctext("Hello")] + STOP, stream_usage(8, 2)),
]


@table(STREAM_USAGES, "chunks, want")
def test_usage_of_a_stream(chunks, want):
    translation = aiapiproxy.checked_translation(req(), SETTINGS["openai"])
    found = events(streamed([sse(chunks)], translation))
    assert found[0]["message"]["usage"]["input_tokens"] == 8
    assert found[-2]["usage"] == want


@BOTH_WAYS
@pytest.mark.parametrize("count", [400, 5000])
def test_empty_arguments_many_times_are_one_call_without_input(shortcuts, count):
    translation = aiapiproxy.checked_translation(req(), SETTINGS["local"])
    for arguments in (["{}" * count], ["{}"] * count):
        chunks = [frag(0, "call_1", "f", ""), *(frag(0, None, None, each) for each in arguments),
                  cend("tool_calls"), DONE]
        assert printed(streamed([sse(chunks)], translation, shortcuts)) == \
            'MS 0+tool(call_1,f) 0j`{}` 0- MD(tool_use) ME'


@BOTH_WAYS
def test_white_space_that_never_ends_takes_linear_time(shortcuts):
    translation = aiapiproxy.checked_translation(req(), SETTINGS["openai"])
    chunks = [*(ctext("\n") for _ in range(20_000)), cend("stop"), DONE]
    began = time.process_time()
    assert printed(streamed([sse([each]) for each in chunks], translation, shortcuts)) == \
        "MS MD(end_turn) ME"
    assert time.process_time() - began < 4


# ============================================================================
# 9. TEXT FILTER
# ============================================================================

THOUGHT_ALOUD = [  # host, request members, text, content blocks
    ("thinking in the text", "local", THINKING, "<think>r</think>\n\nx",
     [think("r", "aap1.n."), only_x]),
    ("after white space", "local", THINKING, "\n <think>r</think>x",
     [think("r", "aap1.n."), only_x]),
    ("not asked for", "local", {}, "<think>r</think>\n\nx", [only_x]),
    ("without an end", "local", THINKING, "<think>r", [think("r", "aap1.n.")]),
    ("not in front", "local", THINKING, "a <think>r</think>", [txt("a <think>r</think>")]),
    ("not at OpenAI", "openai", THINKING, "<think>r</think>x", [txt("<think>r</think>x")]),
]


@table(THOUGHT_ALOUD, "host, members, text, want")
def test_thinking_in_the_text(host, members, text, want):
    assert answered(completion({"content": text}), req(**members), host)["content"] == want


@pytest.mark.parametrize("asked, want", [
    (req(thinking=ADAPTIVE), [("thinking", "r"), ("signature", "aap1.n."), ("text", "x")]),
    (req(), [("text", "x")]),
], ids=["thinking", "no thinking"])
def test_thinking_in_the_text_however_it_is_cut(asked, want):
    text = "<think>r</think>\n\nx"
    translation = aiapiproxy.checked_translation(asked, SETTINGS["local"])
    for at in range(len(text) + 1):
        raw = sse([ctext(text[:at]), ctext(text[at:])] + STOP)
        blocks = blocks_of(streamed([raw], translation))
        assert [(name, value) for block in blocks for name, value in block.items()
                if name != "type"] == want


def test_a_tag_inside_the_text_is_text():
    asked = req(thinking=ADAPTIVE)
    cases = [("local", ["a <think>"]), ("local", ["<th", "x"]), ("openai", ["<think>x"])]
    for host, texts in cases:
        raw = sse([ctext(each) for each in texts] + STOP)
        check_stream(raw, f'MS 0+text 0t"{"".join(texts)}" {CLOSED}', asked, host)


STOP_SEQUENCES = [  # members of the choice, stop_reason, stop_sequence
    ("vLLM names it", {"stop_reason": "END"}, "stop_sequence", "END"),
    ("SGLang names it", {"matched_stop": "END"}, "stop_sequence", "END"),
    ("a token is no sequence", {"matched_stop": 151645}, "end_turn", None),
    ("one that was not asked for", {"stop_reason": "OTHER"}, "end_turn", None),
    ("nobody names it", {}, "end_turn", None),
    ("it stands in the text", {"message": {"content": "aENDb"}}, "stop_sequence", "END"),
    ("a call ends at it", {"message": calling(call("call_1"), content="aENDb")},
     "stop_sequence", "END"),
    ("it is not searched in arguments",
     {"message": calling(call("call_1", "f", '{"a":"END"}'))}, "tool_use", None),
]


@table(STOP_SEQUENCES, "members, reason, sequence")
def test_stop_sequence(members, reason, sequence):
    answer = completion(**{"message": TEXT, **members})
    got = answered(answer, req(stop_sequences=["END"]))
    assert (got["stop_reason"], got["stop_sequence"]) == (reason, sequence)


PREFILLED = {"messages": [usr("a"), asst("The answer is ")]}
THOUGHT_X = [creason("a"), creason("b"), ctext("x")] + STOP

OTHER_STREAMS = [  # request members
    ("thinking absent: reasoning is not shown", {}, THOUGHT_X, ONE_X),
    ("thinking disabled", {"thinking": DISABLED}, THOUGHT_X, ONE_X),
    ("thinking omitted: it travels in the signature", {"thinking": OMITTED}, THOUGHT_X,
     'MS 0+thinking 0s"aap1.c.(ab)" 0- 1+text 1t"x" 1- MD(end_turn) ME'),
    ("thinking omitted, and there is none", {"thinking": OMITTED},
     [creason(""), ctext("x")] + STOP, ONE_X),
    ("hidden reasoning does not part text", {},
     [ctext("Hel"), creason("a"), ctext("lo")] + STOP, HELLO),
    ("only the first call when more are forbidden", ONE_CALL_AT_MOST,
     [WHOLE, frag(1, "call_2", "f", '{"b":2}')] + ARGS_DONE, ONE_TOOL),
    ("also side by side", ONE_CALL_AT_MOST,
     [frags((0, "call_1", "f", '{"a":1}'), (1, "call_2", "f", "{}"))] + ARGS_DONE, ONE_TOOL),
    ("a mapped name", {"tools": [tool("my.tool")]},
     [frag(0, "call_1", "my_tool_bca2c361", "{}")] + ARGS_DONE,
     "MS 0+tool(call_1,my.tool) 0j`{}` 0- MD(tool_use) ME"),
    ("a prefix in front of a known name", {"tools": [tool("f")]},
     [frag(0, "call_1", "functions.f", '{"a":1}')] + ARGS_DONE, ONE_TOOL),
    ("an id used before", {"messages": conversation_with("call_1")[0]}, [WHOLE] + ARGS_DONE,
     'MS 0+tool(toolu_r(call_1),f) 0j`{"a":1}` 0- MD(tool_use) ME'),
    *[(f"a stop sequence ends the text of {model}", {"model": model, **ENDING},
       [ctext("abcE"), ctext("NDxyz"), cend("stop"), DONE],
       'MS 0+text 0t"abc" 0- MD(stop_sequence,"END") ME') for model in ("gpt-4o", "o3")],
    ("what might begin one is held", ENDING, [ctext("abcE"), ctext("x")] + STOP,
     'MS 0+text 0t"abc" 0t"Ex" ' + CLOSED),
    ("and let go at the end", ENDING, [ctext("abcE")] + STOP, 'MS 0+text 0t"abc" 0t"E" ' + CLOSED),
    ("one at the very start", ENDING, [ctext("END")] + STOP, 'MS MD(stop_sequence,"END") ME'),
    ("the earliest counts", {"stop_sequences": ["c", "b"]}, [ctext("abc")] + STOP,
     'MS 0+text 0t"a" 0- MD(stop_sequence,"b") ME'),
    ("the longest at one place", {"stop_sequences": ["E", "END"]}, [ctext("aEND")] + STOP,
     'MS 0+text 0t"a" 0- MD(stop_sequence,"END") ME'),
    ("the fifth too", {"stop_sequences": list("vwxyz")}, [ctext("az")] + STOP,
     'MS 0+text 0t"a" 0- MD(stop_sequence,"z") ME'),
    ("not in arguments", ENDING, [frag(0, "call_1", "f", '{"a":"END"}')] + ARGS_DONE,
     TOOL + ' 0j`{"a":"END"}` 0- MD(tool_use) ME'),
    ("not in reasoning", {**ENDING, "thinking": ADAPTIVE}, [creason("END"), ctext("x")] + STOP,
     'MS 0+thinking 0h"END" 0s"aap1.c." 0- 1+text 1t"x" 1- MD(end_turn) ME'),
    ("an upstream that names it", ENDING, [ctext("x"), chunk({}, "stop", stop_reason="END"), DONE],
     'MS 0+text 0t"x" 0- MD(stop_sequence,"END") ME'),
    ("a repeated prefill is cut", PREFILLED, [ctext("The ans"), ctext("wer is 4")] + STOP,
     'MS 0+text 0t" 4" ' + CLOSED),
    ("one that is not repeated is not", PREFILLED, [ctext("The"), ctext("re")] + STOP,
     'MS 0+text 0t"There" ' + CLOSED),
]


@BOTH_WAYS
@table(OTHER_STREAMS, "members, chunks, want")
def test_stream_of_a_request(members, chunks, want, shortcuts):
    check_stream(sse(chunks), want, req(**members), shortcuts=shortcuts)


# ============================================================================
# 10. SERVER-SENT EVENTS
# ============================================================================

HEL, LO, FINISHED = (compact(each).encode() for each in (ctext("Hel"), ctext("lo"), cend("stop")))

WIRES = [  # the bytes of an answer that says Hello
    ("LF", SIMPLE),
    ("CRLF", SIMPLE.replace(b"\n", b"\r\n")),
    ("CR", SIMPLE.replace(b"\n", b"\r")),
    ("no space after data:", SIMPLE.replace(b"data: ", b"data:")),
    ("a byte order mark", BOM + SIMPLE),
    ("comments", b": OPENROUTER PROCESSING\n\n"
     + SIMPLE.replace(b"\n\n", b"\n: still here\n\n:\n\n")),
    ("other fields", SIMPLE.replace(b"data: ", b"event: message\nid: 1\nretry: 5\nfoo\ndata: ")),
    ("blank lines", b"\n\n\n" + SIMPLE.replace(b"\n\n", b"\n\n\n")),
    ("empty data", b"data:\n\ndata: \n\n" + SIMPLE),
    ("no empty line between",
     b"data: " + HEL + b"\ndata: " + LO + b"\ndata: " + FINISHED + b"\ndata: [DONE]\n\n"),
    ("one chunk on two lines", SIMPLE.replace(b'"delta":', b'"delta":\ndata: ')),
    ("lines without data:", HEL + b"\n" + LO + b"\n\n" + FINISHED + b"\n\ndata: [DONE]\n\n"),
    ("no last empty line", SIMPLE[:-1]),
    ("no last line end", SIMPLE[:-2]),
    ("no end of the last chunk", sse([ctext("Hel"), ctext("lo"), cend("stop")])[:-2]),
    ("CRLF after a mark and a comment", BOM + b":\r\n" + SIMPLE.replace(b"\n\n", b"\r\n\r\n")),
]


@BOTH_WAYS
@table(WIRES, "raw")
def test_bytes_of_a_stream(raw, shortcuts):
    check_stream(raw, HELLO, req(), shortcuts=shortcuts)


def test_a_character_cut_in_its_bytes():
    raw = b'data: {"choices":[{"delta":{"content":"\xc3\xa9\xf0\x9f\x98\x80"}}]}\n\n' + sse(STOP)
    check_stream(raw, f'MS 0+text 0t"\u00e9\U0001f600" {CLOSED}', req())


def test_bytes_that_are_no_utf8():
    raw = b'data: {"choices":[{"delta":{"content":"a\xffb"}}]}\n\n' + sse(STOP)
    check_stream(raw, f'MS 0+text 0t"a\ufffdb" {CLOSED}', req())


def test_an_event_named_error_is_one():
    raw = sse([ctext("x")]) + b'event: error\ndata: {"message":"m","code":529}\n\n' + sse(STOP)
    check_stream(raw, 'MS 0+text 0t"x" ERR(overloaded_error)', req())


def test_an_error_tells_what_the_upstream_said():
    raw = streamed([sse([ctext("x"), {"error": {"message": "out of luck", "code": 500}}])],
                   aiapiproxy.checked_translation(req(), SETTINGS["openai"]))
    assert events(raw)[-1]["error"] == {"type": "api_error", "message": "out of luck"}


def test_a_line_without_end_is_an_error():
    translation = aiapiproxy.checked_translation(req(), SETTINGS["openai"])
    pieces = [sse([ctext("x")]), b"data: " + b" " * (16 << 20) + b"  "]
    assert printed(streamed(pieces, translation)) == BROKEN


def test_a_line_of_5_MB_is_carried():
    text = "0123456789" * 500000
    answer, _ = run(asked_once(stream(ctext(text), cend("stop"), DONE), req(stream=True)))
    assert shown(answer) == text


def test_arguments_in_one_line_of_5_MB_are_carried():
    arguments = json.dumps({"a": "\u00e4\"\\" * 800000})
    script = stream(frag(0, "call_1", "f", arguments), cend("tool_calls"), DONE)
    # On a busy machine the 5 s of run() are not always enough for 5 MB.
    answer, _ = within(20, asked_once(script, req(stream=True, tools=[tool("f")])))
    got = "".join(event["delta"]["partial_json"] for event in events(answer[2])
                  if event["type"] == "content_block_delta")
    assert json.loads(got) == json.loads(arguments)


def test_a_CRLF_that_is_cut_by_chunks_and_reads_is_one_end_of_line():
    head = raw_answer(b"", "Transfer-Encoding: chunked", "Content-Type: text/event-stream",
                      length=False)
    first, second = (sse(chunks).replace(b"\n", b"\r\n")
                     for chunks in ([ctext("x")], [ctext("y"), cend("stop"), DONE]))
    second = second.replace(b'data: {', b'data: {\r\ndata: ', 1)
    place = second.index(b"\n")
    pieces = [framed(first), framed(second[:place]), b"%x\r\n" % len(second[place:]),
              second[place:] + b"\r\n", b"0\r\n\r\n"]

    async def scenario():
        gates = [asyncio.Event() for _ in pieces]
        script = [head, *itertools.chain(*zip(gates, pieces))]
        async with facing([script]) as (upstream, server):
            async with Asking(server.port, "POST", "/v1/messages", req(stream=True)) as client:
                for gate in gates:
                    gate.set()
                    await asyncio.sleep(0.02)
                return said(await client.answer())

    assert run(scenario()) == 'MS 0+text 0t"x" 0t"y" ' + CLOSED


def test_data_lines_without_an_end_are_bounded():
    decoder = aiapiproxy.SSEDecoder()
    line = b"data: " + b"x" * 1_000_000 + b"\n"
    with pytest.raises(aiapiproxy.UpstreamError):
        for _ in range(30):
            decoder.events(decoder.lines(line))


# ============================================================================
# 11. CHAT: THE ANSWER
# ============================================================================

def test_the_plain_answer_is_a_whole_message():
    message = answered(completion({"content": "Hello"}, usage=used(10, 2)),
                       req(model="claude-sonnet-5-5[1m]"))
    assert re.fullmatch(r"msg_[A-Za-z0-9]{24}", message.pop("id"))
    assert message == {"type": "message", "role": "assistant", "model": "claude-sonnet-5-5[1m]",
                       "content": [txt("Hello")], "stop_reason": "end_turn", "stop_sequence": None,
                       "stop_details": None, "usage": usage(10, 2)}


CONTENTS = [  # request members, upstream message, content blocks
    ("text", {}, {"content": "Hello"}, [txt("Hello")]),
    ("a call", {}, calling(call("call_1", "f", '{"a":1}')), [use("call_1", "f", {"a": 1})]),
    ("text and a call", {}, calling(call("call_1"), content="x"), [only_x, use("call_1")]),
    ("calls in order", {}, calling(call("call_2", "g"), call("call_1")),
     [use("call_2", "g"), use("call_1")]),
    ("reasoning", THINKING, {"content": "x", "reasoning_content": "r"},
     [think("r", "aap1.c."), only_x]),
    ("the other field for it", THINKING, {"content": "x", "reasoning": "r"},
     [think("r", "aap1.r."), only_x]),
    ("both fields are one block", THINKING,
     {"content": "x", "reasoning": "r", "reasoning_content": "r"}, [think("r", "aap1.c."), only_x]),
    ("reasoning that nobody asked for", {}, {"content": "x", "reasoning_content": "r"}, [only_x]),
    ("thinking disabled", {"thinking": DISABLED},
     {"content": "x", "reasoning_content": "r"}, [only_x]),
    ("thinking enabled", {"thinking": enabled(50)}, {"content": "x", "reasoning_content": "r"},
     [think("r", "aap1.c."), only_x]),
    ("reasoning that is not to be shown", HIDDEN, {"content": "x", "reasoning_content": "r"},
     [think("", "aap1.c.(r)"), only_x]),
    ("no reasoning to hide", HIDDEN, {"content": "x", "reasoning_content": ""}, [only_x]),
    ("a list of parts", {},
     {"content": [txt("a"), {"type": "output_text", "text": "b"}, {"type": "new"}]}, [txt("ab")]),
    ("a thinking part", THINKING,
     {"content": [{"type": "thinking", "thinking": [txt("r")]}, only_x]},
     [think("r", "aap1.n."), only_x]),
    ("white space beside a call", {}, calling(call("call_1"), content="\n\n"), [use("call_1")]),
    ("nothing beside a call", {}, calling(call("call_1"), content=""), [use("call_1")]),
    ("nothing at all", {}, {"content": ""}, []),
    ("no content", {}, {}, []),
    ("a refusal", {}, {"content": None, "refusal": "No."}, [txt("No.")]),
    ("a refusal after text", {}, {"content": "x", "refusal": "No."}, [txt("xNo.")]),
    ("null and empty fields", {}, {"content": "x", "refusal": None, "tool_calls": [],
                                   "function_call": None, "reasoning_content": None,
                                   "annotations": [{}], "audio": None}, [only_x]),
    ("the old function_call", {},
     {"content": None, "function_call": {"name": "f", "arguments": '{"a":1}'}},
     [use("toolu_new", "f", {"a": 1})]),
    ("a custom call", {},
     calling({"id": "call_1", "type": "custom", "custom": {"name": "f", "input": "t"}}),
     [use("call_1", "f", {"input": "t"})]),
    ("a call of another type", {}, calling({"id": "call_1", "type": "new", "new": {}}), []),
    ("one call when more are forbidden",
     {"tools": [tool("f")], **choice("auto", disable_parallel_tool_use=True)},
     calling(call("call_1"), call("call_2")), [use("call_1")]),
    # Ids and names
    ("no id", {}, calling({"function": {"name": "f", "arguments": "{}"}}), [use("toolu_new")]),
    ("an empty id", {}, calling(call("")), [use("toolu_new")]),
    ("an id of 64 characters", {}, calling(call("x" * 64)), [use("x" * 64)]),
    ("an id of 65 characters", {}, calling(call("x" * 65)), [use(f"toolu_r({'x' * 65})")]),
    ("an id with other characters", {}, calling(call("functions.get:0")),
     [use("toolu_r(functions.get:0)")]),
    ("an id that looks like one of ours", {}, calling(call("toolu_rabc")),
     [use("toolu_r(toolu_rabc)")]),
    ("an id used before", {"messages": conversation_with("call_1")[0]}, calling(call("call_1")),
     [use("toolu_r(call_1)")]),
    ("also under its encoded name", {"messages": conversation_with("toolu_rAbC123_Y2FsbF8x")[0]},
     calling(call("call_1")), [use("toolu_r(call_1)")]),
    ("an id used twice", {}, calling(call("call_1"), call("call_1")),
     [use("call_1"), use("toolu_r(call_1)")]),
    ("a thought signature travels in the id", {}, calling(call("c1", extra_content={"a": 1})),
     [use('toolu_x(["c1",{"a":1}])')]),
    ("a mapped name", {"tools": [tool("my.tool")]}, calling(call("call_1", "my_tool_bca2c361")),
     [use("call_1", "my.tool")]),
    ("a prefix in front of a known name", {"tools": [tool("f")]},
     calling(call("call_1", "functions.f")), [use("call_1", "f")]),
    ("an unknown name", {"tools": [tool("f")]}, calling(call("call_1", "other")),
     [use("call_1", "other")]),
    # Stop sequences
    ("text up to a stop sequence", {"stop_sequences": ["END"]},
     calling(call("call_1"), content="abENDcd"), [txt("ab")]),
    ("the longest at one place", {"stop_sequences": ["E", "END"]}, {"content": "abENDcd"},
     [txt("ab")]),
    # Prefill
    ("a repeated prefill is cut", {"messages": [usr("a"), asst("{")]}, {"content": '{"t":1}'},
     [txt('"t":1}')]),
    ("one that is not repeated is not", {"messages": [usr("a"), asst("{")]}, {"content": '"t":1}'},
     [txt('"t":1}')]),
    ("as it was sent", {"messages": [usr("a"), asst("The answer is ")]},
     {"content": "The answer is 4"}, [txt(" 4")]),
]


@table(CONTENTS, "members, message, want")
def test_content(members, message, want):
    assert answered(completion(message), req(**members))["content"] == want


def test_details_of_reasoning_travel_in_the_signature():
    (block, _) = answered(completion({"content": "x", "reasoning_details": DETAILS}),
                          req(**THINKING))["content"]
    kind, details = re.fullmatch(r"aap1\.(.)\.\((.*)\)", block["signature"]).groups()
    assert (block["thinking"], kind, json.loads(details)) == ("t", "d", DETAILS)


def test_details_of_reasoning_are_joined_in_the_signature():
    pieces = [{"type": "reasoning.text", "index": 0, "text": "a"},
              {"type": "reasoning.text", "index": 0, "text": "b", "signature": "s"}]
    raw = sse([chunk({"reasoning_details": [each]}) for each in pieces] + [WHOLE] + ARGS_DONE)
    translation = aiapiproxy.checked_translation(req(thinking=ADAPTIVE), SETTINGS["openrouter"])
    (block, _) = blocks_of(streamed([raw], translation))
    kind, details = re.fullmatch(r"aap1\.(.)\.\((.*)\)", readable(block["signature"])).groups()
    assert (block["thinking"], kind) == ("ab", "d")
    assert json.loads(details) == [{"type": "reasoning.text", "index": 0, "text": "ab",
                                    "signature": "s"}]


def several(*choices): return {"choices": list(choices)}


SHAPES = [
    ("the lowest index counts",
     several({"index": 1, "message": {"content": "b"}, "finish_reason": "length"},
             {"index": 0, "message": {"content": "x"}, "finish_reason": "stop"})),
    ("no index is the position", several({"message": {"content": "x"}, "finish_reason": "stop"},
                                         {"message": {"content": "b"}})),
    ("a delta in place of the message",
     several({"delta": {"content": "x"}, "finish_reason": "stop"})),
    ("an old completion", several({"text": "x", "finish_reason": "stop"})),
    ("an error that is null", {**completion(TEXT), "error": None}),
]


@table(SHAPES, "given")
def test_shape_of_an_answer(given):
    got = answered(given, req())
    assert (got["content"], got["stop_reason"]) == ([only_x], "end_turn")


NO_ANSWERS = [
    ("no choices", {"choices": []}, 502, "api_error", "The upstream's answer has no choices"),
    ("choices null", {"choices": None}, 502, "api_error", "The upstream's answer has no choices"),
    ("no member choices", {"id": "x"}, 502, "api_error", "The upstream's answer has no choices"),
    ("no message", several({"index": 0}), 502, "api_error", "The upstream's answer has no choices"),
    ("a call without a name", completion(calling(call("call_1", ""))), 502, "api_error",
     "The upstream's answer has a tool call without a name"),
    ("finish reason error", completion(TEXT, "error"), 502, "api_error",
     "The upstream ended with finish_reason error"),
    ("a network error", completion(TEXT, "network_error"), 502, "api_error",
     "The upstream ended with finish_reason network_error"),
    ("DeepSeek is out of resources", completion(TEXT, "insufficient_system_resource"), 529,
     "overloaded_error",
     "The upstream ended with finish_reason insufficient_system_resource"),
]


@table(NO_ANSWERS, "given, status, kind, message")
def test_an_answer_that_is_none(given, status, kind, message):
    with pytest.raises(aiapiproxy.ProxyError) as caught:
        answered(given, req())
    assert (caught.value.status, caught.value.kind, caught.value.message) == (status, kind, message)


def test_an_odd_answer_is_a_message_or_an_error():
    message = calling(call("call_1", "f", '{"a":1}', extra_content=EXTRA),
                      content=[txt("x"), think("t", "s")], refusal="No.", reasoning_details=DETAILS,
                      reasoning="r", annotations=[{}])
    whole = completion(message, usage=used(9, 9, total_tokens=18, **cached(2)), stop_reason="END",
                       matched_stop=7)
    dice, asked = random.Random(1), req(thinking=ADAPTIVE, stop_sequences=["END"])
    for _ in range(3000):
        try:
            got = answered(spoiled(whole, dice), asked)
        except aiapiproxy.ProxyError as error:
            assert error.status in (429, 500, 502, 529) and error.message
            continue
        assert got["stop_reason"] in {"end_turn", "tool_use", "max_tokens", "stop_sequence",
                                      "refusal"}
        assert got["usage"]["input_tokens"] >= 0 and got["usage"]["output_tokens"] >= 0
        for block in got["content"]:
            assert (block["type"] != "tool_use"
                    or (isinstance(block["input"], dict) and block["name"]))
            assert block["type"] != "text" or block["text"].strip()


# ---- Whole equals streamed
#
# An upstream sends an answer whole or as a stream, a client wants events or a message.

SAME_ANSWERS = (
    [(sentence, "openai", members, completion(message))
     for sentence, members, message, _ in CONTENTS]
    + [(sentence, host, members, completion({"content": text}))
       for sentence, host, members, text, _ in THOUGHT_ALOUD]
    + [(sentence, "openai", {}, completion(message, finish))
       for sentence, message, finish, _ in STOPS]
    + [(sentence, "openai", ENDING, completion(**{"message": TEXT, **members}))
       for sentence, members, _, _ in STOP_SEQUENCES]
    + [(sentence, "openai", {}, completion(calling(call("call_1", "f", given)), "tool_calls"))
       for sentence, given, _ in ARGUMENTS]
    + [(sentence, "openai", {}, completion({"content": "Hello"}, usage=given))
       for sentence, given, _ in USAGES])
ONLY_WHOLE = {text for _, text in INVALID}     # a stream passes such arguments on as they come


@table(SAME_ANSWERS, "host, members, answer")
def test_an_answer_is_the_same_whole_and_streamed(host, members, answer):
    translation = aiapiproxy.checked_translation(req(**members), SETTINGS[host])
    message = whole_message(answer, translation)
    end = ({name: message[name] for name in ("stop_reason", "stop_sequence", "stop_details")},
           without(message["usage"], "service_tier"))
    whole = translator_of(translation, new_ids()).whole(json.dumps(answer).encode())
    found = [whole]
    choice = copy.deepcopy(answer["choices"][0])
    calls = choice["message"].get("tool_calls") or []
    for index, each in enumerate(calls):
        each["index"] = index                  # a stream numbers its calls
    if not any(each.get("function", {}).get("arguments") in ONLY_WHOLE for each in calls
               if isinstance(each.get("function", {}).get("arguments"), str)):
        choice["delta"] = choice.pop("message")
        found.append(streamed([sse([{**answer, "choices": [choice]}, DONE])], translation))
    for raw in found:
        for block, wanted in itertools.zip_longest(blocks_of(raw), message["content"]):
            assert readable_block(block) == readable_block(wanted)
        assert (events(raw)[-2]["delta"], events(raw)[-2]["usage"]) == end


def readable_block(block):
    return {name: readable(value) if name in ("id", "signature") else value
            for name, value in block.items()}


@table([(name + ": " + sentence, chunks) for name, rows in (
    ("text", TEXTS), ("thinking", THOUGHTS), ("a call", CALLS), ("the end", ENDS))
        for sentence, chunks, _ in rows], "chunks")
@BOTH_WAYS
def test_a_stream_is_the_same_as_events_and_as_a_message(chunks, shortcuts):
    translation = aiapiproxy.checked_translation(req(thinking=ADAPTIVE), SETTINGS["openai"])
    out = streamed([sse(chunks)], translation, shortcuts)
    writer = aiapiproxy.MessageWriter(translation, new_ids())
    translator = aiapiproxy.StreamTranslator(translation, new_ids(), writer, shortcuts)
    try:
        assert translator.feed(sse(chunks)) == b""
        assert translator.done or translator.finish() == b""
    except aiapiproxy.ProxyError as error:
        assert error.kind == (out.split()[2] if isinstance(out, str)
                              else events(out)[-1]["error"]["type"])
        return
    end = events(out)[-2]["delta"]
    texts = [block.pop("input") for block in blocks_of(out, str) if block["type"] == "tool_use"]
    inputs = [aiapiproxy.tool_input(text, end["stop_reason"] == "max_tokens") for text in texts]
    blocks = [readable_block(without(block, "input")) for block in blocks_of(out, str)]
    wanted = [{**block, **({"input": inputs.pop(0)} if block["type"] == "tool_use" else {})}
              for block in blocks]
    assert [readable_block(block) for block in writer.message["content"]] == [
        block for block in wanted if block.get("input", {}) is not None]      # None: cut off
    assert {name: writer.message[name] for name in end} == end


def test_a_stream_names_the_asked_model():
    translation = aiapiproxy.checked_translation(req(model="claude-sonnet-5-5[1m]"),
                                                 SETTINGS["openai"])
    assert events(streamed([SIMPLE], translation))[0]["message"]["model"] == "claude-sonnet-5-5[1m]"


# ============================================================================
# 13. UPSTREAM ERRORS
# ============================================================================

NOON = 1795435200.0  # 2026-11-23T12:00:00Z
NO_RETRY = {"x-should-retry": "false"}


def failed(status, body, headers=None, asked=None, settings=SETTINGS["openai"]):
    """The error that the client gets for this answer of the upstream."""
    raw = body.encode() if isinstance(body, str) else json.dumps(body).encode()
    translation = aiapiproxy.checked_translation(asked or req(), settings)
    return aiapiproxy.upstream_error(status, headers or {}, raw, translation, NOON)


STATUSES = [  # upstream status, client status, error type
    (400, 400, "invalid_request_error"), (401, 401, "authentication_error"),
    (402, 402, "billing_error"), (403, 403, "permission_error"), (404, 404, "not_found_error"),
    (405, 400, "invalid_request_error"), (406, 400, "invalid_request_error"),
    (408, 504, "timeout_error"), (409, 409, "conflict_error"), (410, 400, "invalid_request_error"),
    (413, 413, "request_too_large"), (415, 400, "invalid_request_error"),
    (418, 400, "invalid_request_error"), (422, 400, "invalid_request_error"),
    (424, 400, "invalid_request_error"), (425, 500, "api_error"), (429, 429, "rate_limit_error"),
    (451, 400, "invalid_request_error"), (499, 500, "api_error"), (500, 500, "api_error"),
    (501, 500, "api_error"), (502, 502, "api_error"), (503, 529, "overloaded_error"),
    (504, 504, "timeout_error"), (507, 500, "api_error"), (520, 502, "api_error"),
    (521, 502, "api_error"), (524, 504, "timeout_error"), (529, 529, "overloaded_error"),
    (530, 502, "api_error"), (599, 500, "api_error"),
]


@pytest.mark.parametrize("upstream, status, kind", STATUSES)
def test_status_of_an_error(upstream, status, kind):
    error = failed(upstream, JSON_ERROR)
    assert (error.status, error.kind) == (status, kind)
    assert error.headers == (NO_RETRY if upstream in (401, 402) else {})


MESSAGES = [  # status, body, message
    ("OpenAI's own", 400, JSON_ERROR, "bad"),
    ("Google's list", 400, [{"error": {"code": 400, "message": "m", "status": "INVALID_ARGUMENT"}}],
     "m"),
    ("a string", 400, {"error": "m"}, "m"),
    ("a detail", 400, {"detail": "m"}, "m"),
    ("a message", 400, {"message": "m"}, "m"),
    ("an error message", 400, {"error_message": "m"}, "m"),
    ("a list of errors", 400, {"errors": [{"message": "m"}]}, "m"),
    ("a list of words", 400, {"errors": ["m", "n"]}, "m"),
    ("FastAPI's validation", 422, {"detail": [{"loc": ["body", "top_p"], "msg": "m"}]},
     "body.top_p: m"),
    ("a validation without a path", 422, {"detail": [{"loc": 5, "msg": "m"}]}, "m"),
    ("Mistral's validation inside a message", 422,
     {"object": "error", "message": {"detail": [{"loc": ["body", 0], "msg": "m"}]}}, "body.0: m"),
    ("an error without a message, as JSON", 400, {"error": {"code": 7}}, '{"code": 7}'),
    ("OpenRouter's provider", 400,
     {"error": {"message": "Provider returned error", "metadata": {"raw": "why"}}},
     "Provider returned error: why"),
    ("Azure's filter, unchanged", 400, error_like("content_filter", "The response was filtered."),
     "The response was filtered."),
    ("the key is shortened", 400, error_like(None, f"Incorrect key {KEY}."),
     "Incorrect key sk-\u20261234."),
    ("control characters", 400, error_like(None, "a\nb\x00c"), "a b c"),
    ("a long one", 400, error_like(None, "x" * 5000), "x" * 4096),
    ("a page", 502, "<html><title>Bad Gateway</title><body>...",
     "The upstream answered 502 Bad Gateway: Bad Gateway"),
    ("a text", 500, "it <b>broke</b>", "The upstream answered 500 Internal Server Error: it broke"),
    ("nothing", 500, "", "The upstream answered 500 Internal Server Error"),
    ("a refused key", 401, JSON_ERROR, "The upstream rejected OPENAI_API_KEY: bad"),
]


@table(MESSAGES, "status, body, want")
def test_message_of_an_error(status, body, want):
    assert failed(status, body).message == want


def test_an_unknown_model_tells_the_mapping():
    error = failed(404, error_like("model_not_found", "The model `gpt-9` does not exist"),
                   settings=settings_for("openai", CLAUDE_SONNET_MODEL="gpt-9"))
    assert (error.status, error.kind, error.message) == (
        404, "not_found_error",
        "The model `gpt-9` does not exist (model claude-sonnet-5-5 is mapped to gpt-9)")


TOO_FAST = ("Request too large for gpt-4o in organization org-x on tokens per min (TPM): "
            "Limit 30000, Requested 33684.")
DATE = "Mon, 23 Nov 2026 12:00:30 GMT"
RATE = ("rate_limit_error", 429)

LIMITS = [  # status, body, headers, (type, status), headers to the client
    ("quota is no rate limit", 429, error_like("insufficient_quota"), {"retry-after": "7"},
     ("billing_error", 402),
     NO_RETRY),
    ("nor is a billing limit", 429, error_like("billing_hard_limit_reached"), {},
     ("billing_error", 402), NO_RETRY),
    ("nor an empty account", 403, error_like("insufficient_credits"), {},
     ("billing_error", 402), NO_RETRY),
    ("nor OpenAI's words for it", 429,
     error_like(None, "You exceeded your current quota, please check"), {},
     ("billing_error", 402), NO_RETRY),
    ("retry-after is passed", 429, error_like("rate_limit_exceeded"), {"retry-after": "7"}, RATE,
     {"retry-after": "7"}),
    ("rounded up", 429, error_like(None), {"retry-after": "0.2"}, RATE, {"retry-after": "1"}),
    ("a date is counted from now", 429, error_like(None), {"retry-after": DATE}, RATE,
     {"retry-after": "30"}),
    ("seconds in the message", 429, error_like(None, "Limit. Please try again in 1.5s."), {}, RATE,
     {"retry-after": "2"}),
    ("minutes", 429, error_like(None, "Please try again in 6m0s."), {}, RATE,
     {"retry-after": "360"}),
    ("milliseconds", 429, error_like(None, "Please try again in 20ms."), {}, RATE,
     {"retry-after": "1"}),
    ("hours", 429, error_like(None, "Please try again in 1h2m."), {}, RATE,
     {"retry-after": "3720"}),
    ("Google's delay", 429, {"error": {"message": "m", "details": [{"retryDelay": "34s"}]}}, {},
     RATE, {"retry-after": "34"}),
    ("the reset of a limit that is used up", 429, error_like(None), {
        "x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "1.57s",
        "x-ratelimit-remaining-requests": "9", "x-ratelimit-reset-requests": "6m0s"}, RATE,
     {"retry-after": "2", "anthropic-ratelimit-tokens-remaining": "0",
      "anthropic-ratelimit-tokens-reset": "2026-11-23T12:00:02Z",
      "anthropic-ratelimit-requests-remaining": "9",
      "anthropic-ratelimit-requests-reset": "2026-11-23T12:06:00Z"}),
    ("milliseconds of the upstream", 429, error_like(None), {"retry-after-ms": "1500"}, RATE,
     {"retry-after-ms": "1500"}),
    ("what will never fit", 429, error_like("rate_limit_exceeded", TOO_FAST), {}, RATE, NO_RETRY),
    ("what will fit later", 429, error_like(None, TOO_FAST.replace("33684", "20000")),
     {}, RATE, {}),
    ("the upstream knows whether to retry", 500, error_like(None), {"x-should-retry": "false"},
     ("api_error", 500),
     NO_RETRY),
    ("in no other words", 500, error_like(None), {"x-should-retry": "maybe"},
     ("api_error", 500), {}),
    ("retry-after of an overload", 503, error_like(None), {"retry-after": "3"},
     ("overloaded_error", 529), {"retry-after": "3"}),
    ("not of a bad request", 400, error_like(None), {"retry-after": "3"},
     ("invalid_request_error", 400), {}),
    ("nothing else", 500, error_like(None),
     {"set-cookie": "c", "server": "s", "openai-organization": "o",
      "x-request-id": "i"}, ("api_error", 500), {}),
    ("the limits of requests", 429, error_like(None), {
        "x-ratelimit-limit-requests": "500", "x-ratelimit-remaining-requests": "499",
        "x-ratelimit-reset-requests": "6m0s"}, RATE, {
        "anthropic-ratelimit-requests-limit": "500",
        "anthropic-ratelimit-requests-remaining": "499",
        "anthropic-ratelimit-requests-reset": "2026-11-23T12:06:00Z"}),
    ("the limits of tokens", 429, error_like(None), {
        "x-ratelimit-limit-tokens": "9", "x-ratelimit-reset-tokens": "1.5s"}, RATE, {
        "anthropic-ratelimit-tokens-limit": "9",
        "anthropic-ratelimit-tokens-reset": "2026-11-23T12:00:02Z"}),
    ("a limit's end as a number", 429, error_like(None),
     {"x-ratelimit-reset-tokens": "1795435206000"}, RATE,
     {"anthropic-ratelimit-tokens-reset": "2026-11-23T12:00:06Z"}),
    ("a limit's end in words", 429, error_like(None),
     {"x-ratelimit-reset-tokens": "soon"}, RATE, {}),
]


@table(LIMITS, "status, body, headers, kind, want")
def test_limits(status, body, headers, kind, want):
    error = failed(status, body, headers)
    assert ((error.kind, error.status), error.headers) == (kind, want)


LLAMA = {"code": 400, "type": "exceed_context_size_error", "message": "no room",
         "n_prompt_tokens": 9000, "n_ctx": 8192}

OVERFLOWS = [  # upstream's message or error, its numbers for the client
    (f"{MAXIMUM} 128000 tokens. However, your messages resulted in 131072 tokens.", 131072, 128000),
    (f"{MAXIMUM} 128,000 tokens. However, your messages resulted in 131_072 tokens.",
     131072, 128000),
    (f"{MAXIMUM} 8192 tokens. However, you requested 9000 tokens (8500 in the messages, 500 in the "
     "completion).",
     8500, 8192),
    (f"{MAXIMUM} 8192 tokens. However, you requested 9500 tokens (8000 in the messages, 500 in the "
     "functions, 1000 in the completion).", 8500, 8192),
    (f"{MAXIMUM} 8192 tokens. However, you requested 9500 tokens (7500 in the messages, 2000 in "
     f"the "
     "completion).",
     9500, 8192),
    (f"{MAXIMUM} 4097 tokens, however you requested 5000 tokens.", 5000, 4097),
    (f"{MAXIMUM} 4096 tokens. However, you requested 512 output tokens and your prompt contains at "
     f"least "
     "5000 input tokens.", 5000, 4096),
    (f"'max_tokens' or 'max_completion_tokens' is too large: 4000. {MAXIMUM} 4096 tokens and your "
     "request has 4090 input tokens (4000 > 4096 - 4090).", 8090, 4096),
    ("You passed 4000 input tokens and requested 200 output tokens. However, the model's context "
     "length is only 4096 tokens", 4200, 4096),
    ("Input tokens exceed the configured limit of 272000 tokens. Your messages resulted in 300000 "
     "tokens.", 300000, 272000),
    (LLAMA, 9000, 8192),
    ("request (9000 tokens) exceeds the available context size (8192 tokens), try increasing it",
     9000, 8192),
    ("input (9000 tokens) is larger than the max context size (8192 tokens). skipping", 9000, 8192),
    ("Trying to keep the first 9000 tokens when context overflows. However, the model is loaded "
     "with context length of only 4096 tokens", 9000, 4096),
    ("The input token count (1200000) exceeds the maximum number of tokens allowed (1048576).",
     1200000, 1048576),
    ("This model's maximum prompt length is 131072 but the request contains 150000 tokens.",
     150000, 131072),
    ("Prompt contains 40000 tokens, too large for model with 32768 maximum context length",
     40000, 32768),
    ("inputs tokens + max_new_tokens must be <= 4096. Given: 5000 `inputs` tokens and 20 "
     "`max_new_tokens`", 5000, 4096),
    ("prompt is too long: 210000 tokens > 200000 maximum", 210000, 200000),
    ("input length and `max_tokens` exceed context limit: 199500 + 2000 > 200000, decrease it",
     201500, 200000),
    ("prompt token count of 70000 exceeds the limit of 64000", 70000, 64000),
    (f"{MAXIMUM} 8192 tokens. Please reduce the length of the messages.", 8193, 8192),
    *[(words, 8, 6) for words in (
        "Your input exceeds the context window of this model.", "This exceeds the context length.",
        "It exceeds the model's context.", "Input is too long for requested model.",
        "Prompt is too long", "Please reduce the length of the messages.",
        "Too many tokens in the prompt", "Context size has been exceeded.",
        "model_max_prompt_tokens_exceeded", "n_keep >= n_ctx",
        "the number of tokens to keep from the initial prompt is greater than the context length",
        "Range of input length is exceeded", "no user query found in messages")],
    (error_like("context_length_exceeded")["error"], 8, 6),
    ({"message": "m", "type": "ContextWindowExceededError"}, 8, 6),
]


@pytest.mark.parametrize("upstream, needed, maximum", OVERFLOWS,
                         ids=[str(row[0]) for row in OVERFLOWS])
def test_a_prompt_that_does_not_fit(upstream, needed, maximum):
    body = {"error": {"message": upstream} if isinstance(upstream, str) else upstream}
    for status in (400, 413, 500):
        error = failed(status, body)
        assert (error.status, error.kind) == (400, "invalid_request_error")
        assert error.message == f"prompt is too long: {needed} tokens > {maximum} maximum"


def test_tokens_per_minute_are_no_prompt_that_does_not_fit():
    assert failed(429, error_like("rate_limit_exceeded", TOO_FAST)).kind == "rate_limit_error"


CODES = [  # code or type of an error in an answer with status 200; the client's error
    ("context_length_exceeded", "400 invalid_request_error"),
    ("insufficient_quota", "402 billing_error"),
    ("rate_limit_exceeded", "429 rate_limit_error"), ("RESOURCE_EXHAUSTED", "429 rate_limit_error"),
    ("UNAVAILABLE", "529 overloaded_error"), ("DEADLINE_EXCEEDED", "504 timeout_error"),
    ("invalid_api_key", "401 authentication_error"), ("PERMISSION_DENIED", "403 permission_error"),
    ("model_not_found", "404 not_found_error"), ("INVALID_ARGUMENT", "400 invalid_request_error"),
    ("strange", "500 api_error"),
]


@pytest.mark.parametrize("code, want", CODES)
def test_an_error_with_status_200(code, want):
    for script in (reply(200, error_like(code)), stream(error_like(code)),
                   reply(200, {"error": {"message": "m", "status": code}}),
                   reply(200, {"error": {"message": "m", "type": code}})):
        answer, _ = run(asked_once(script, req()))
        assert said(answer).startswith(want + ": ")


@pytest.mark.parametrize("streaming", [False, True], ids=["plain", "stream"])
def test_a_prompt_that_does_not_fit_is_told_in_one_way(streaming):
    words = f"{MAXIMUM} 128000 tokens. However, your messages resulted in 131072 tokens."
    error = error_like(None, words)
    for script in (reply(400, error), reply(200, error), stream(error)):
        answer, _ = run(asked_once(script, req(stream=streaming)))
        assert said(answer) == f"{TOO_LONG}131072 tokens > 128000 maximum"


def test_a_wrong_address_is_told():
    answer, _ = run(asked_once(reply(404, "<html>", "text/html"), req()))
    words = "127.0.0.1 has no /v1/chat/completions: check OPENAI_BASE_URL"
    assert said(answer) == NOT_FOUND + words


def test_a_redirect_names_its_host():
    answer, _ = run(asked_once(reply(307, "", location="https://elsewhere.example/v1"), req()))
    assert "elsewhere.example" in said(answer)


def test_rate_limits_are_told_on_a_success_too():
    limits = {"x-ratelimit-limit-requests": 500, "x-ratelimit-remaining-requests": 499,
              "x-ratelimit-reset-requests": "6m0s", "x-request-id": "r", "set-cookie": "c=1"}
    for streaming, script in ((False, reply(200, completion(TEXT), **limits)),
                              (True, stream(*X_ONLY, **limits))):
        (_, headers, _), _ = run(asked_once(script, req(stream=streaming)))
        assert headers["anthropic-ratelimit-requests-limit"] == "500"
        assert headers["anthropic-ratelimit-requests-remaining"] == "499"
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ",
                            headers["anthropic-ratelimit-requests-reset"])
        assert "set-cookie" not in headers


@pytest.mark.parametrize("asked", [req(), req(stream=True)], ids=["plain", "stream"])
def test_an_error_of_strange_numbers_is_an_error(asked):
    answer, _ = run(asked_once(reply(400, b'{"error":{"message":1e999,"code":NaN}}'), asked))
    assert said(answer).startswith("400 invalid_request_error: ")


@table([
    ("minutes and seconds", "6m0s", 360.0), ("a fraction", "1.5s", 1.5),
    ("milliseconds", "20ms", 0.02), ("an epoch", "1795435206000", 1795435206000.0),
    ("hours", "1h2m", 3720.0), ("plain seconds", "59", 59.0), ("an unknown unit", "5x", None),
    ("nothing", "", None), ("a number that does not end", "1" * 25 + "x", None),
    ("more than any server sends", "1s" * 40, None), ("no text", 5, None),
])
def test_parse_duration(given, want):
    began = time.process_time()
    found = aiapiproxy.parse_duration(given)
    assert (found if found is None else round(found, 3)) == want
    assert time.process_time() - began < 0.5


LONG_ERRORS = [
    ("images and schemas", "image not supported json schema parse " * 5000),
    ("windows", "maximum context length is 8192 tokens " * 5000),
    ("numbers", "request (5 tokens) " * 9000), ("limits", "max_tokens must be at most " * 7000),
]


@table([(name, text) for name, text in LONG_ERRORS], "message")
def test_a_long_error_is_judged_in_linear_time(message):
    asked = req([usr([txt("x"), img])], tools=[tool("f")], temperature=0.5)
    for status in (400, 500):
        translation = aiapiproxy.checked_translation(asked, SETTINGS["local"])
        began = time.process_time()
        body = json.dumps({"error": {"message": message}}).encode()
        aiapiproxy.upstream_error(status, {}, body, translation, 0)
        aiapiproxy.adjustment_for(status, body, translation)
        assert time.process_time() - began < 1


@pytest.mark.parametrize("page", ["<title>" * 30_000, "<title" * 30_000, "<" * 200_000,
                                  "<script" * 30_000])
def test_a_hostile_page_is_summed_up_in_linear_time(page):
    began = time.process_time()
    translation = aiapiproxy.checked_translation(req(), SETTINGS["local"])
    aiapiproxy.upstream_error(502, {}, page.encode(), translation, 0)
    assert time.process_time() - began < 1


def test_words_in_the_middle_of_a_long_error_are_no_reason():
    """Servers quote whole conversations in their errors."""
    words = " maximum context length is 8192 tokens, resulted in 9000 tokens "
    quoted = "x" * 5000 + words + "x" * 5000
    translation = aiapiproxy.checked_translation(req(), SETTINGS["local"])
    body = json.dumps({"error": {"message": quoted}}).encode()
    assert "too long" not in aiapiproxy.upstream_error(400, {}, body, translation, 0).message


# ============================================================================
# 14. ADJUSTMENTS
# ============================================================================

LOCAL_MODELS = {"CLAUDE_SONNET_MODEL": "qwen3:8b"}
NEEDS_OTHER_NAME = error_reply("Unsupported parameter: 'max_tokens' is not supported with this "
                               "model. Use 'max_completion_tokens' instead.", "max_tokens",
                               "unsupported_parameter")
BAD_SCHEMA = error_reply("Invalid schema for function 'f': wrong.", "tools[0].function.parameters",
                         "invalid_function_parameters")
HISTORY = ASKED + [usr([res("call_1", "ok"), txt("b")])]


def unsupported(name):
    words = f"Unsupported parameter: '{name}' is not supported with this model."
    return error_reply(words, name, "unsupported_parameter")


ADJUSTED = [  # the upstream's error, request, members of the body in the retry and later
    ("the newer name of max_tokens", NEEDS_OTHER_NAME, req(),
     {"max_tokens": None, "max_completion_tokens": 100}),
    ("the older name", unsupported("max_completion_tokens"), req(model="o3"),
     {"max_tokens": 100, "max_completion_tokens": None}),
    ("a cap",
     error_reply("max_tokens is too large: 32000. This model supports at most 16384 completion "
                 "tokens, whereas you provided 32000.", "max_tokens"), req(max_tokens=32000),
     {"max_tokens": 16384}),
    ("a cap in other words",
     error_reply("max_tokens must be less than or equal to 50", "max_tokens"), req(),
     {"max_tokens": 50}),
    ("a minimum",
     error_reply("Invalid 'max_output_tokens': integer below minimum value. Expected a value "
                 ">= 16, but got 1 instead.", "max_tokens"), req(max_tokens=1), {"max_tokens": 16}),
    ("no temperature",
     error_reply("Unsupported value: 'temperature' does not support 0.1 with this model. Only the "
                 "default (1) value is supported.", "temperature", "unsupported_value"),
     req(temperature=0.1), {"temperature": None}),
    ("no top_p", unsupported("top_p"), req(top_p=0.1), {"top_p": None}),
    ("no stop", unsupported("stop"), req(stop_sequences=["x"]), {"stop": None}),
    ("no stream_options, in FastAPI's words",
     reply(422, {"detail": [{"loc": ["body", "stream_options"], "type": "extra_forbidden",
                             "msg": "Extra inputs are not permitted: stream_options"}]}),
     req(stream=True), {"stream": True, "stream_options": None}),
    ("no parallel_tool_calls",
     error_reply("Unrecognized request argument supplied: parallel_tool_calls"),
     req(tools=[tool("f")], **choice("auto", disable_parallel_tool_use=True)),
     {"tool_choice": "auto", "parallel_tool_calls": None}),
    ("no effort with tools",
     error_reply("Function tools are not supported here; set reasoning_effort to 'none'."),
     req(model="gpt-5.2", tools=[tool("f")], **effort("high")), {"reasoning_effort": "none"}),
    ("the efforts there are",
     error_reply("Unsupported value: 'reasoning_effort' does not support 'xhigh' with this model. "
                 "Supported values are: 'low', 'medium', and 'high'.", "reasoning_effort",
                 "unsupported_value"),
     req(model="gpt-5.2", **effort("xhigh")), {"reasoning_effort": "high"}),
    ("no effort at all", unsupported("reasoning_effort"), req(model="gpt-5.2", **effort("high")),
     {"reasoning_effort": None}),
    ("no streams", unsupported("stream"), req(stream=True),
     {"stream": None, "stream_options": None}),
    ("no other choice", unsupported("tool_choice"), req(tools=[tool("f")], **choice("any")),
     {"tool_choice": "auto", "tools": [fn("f")]}),
    ("no null content",
     error_reply("messages.1.content: expected string, got null", "messages.[1].content"),
     req(HISTORY),
     {"messages": [usr("a"), msg("", [call("call_1")]), tmsg("call_1", "ok"), usr("b")]}),
    ("no user after a tool", error_reply("Unexpected role 'user' after role 'tool'", code="3230"),
     req(HISTORY),
     {"messages": CALLED + [tmsg("call_1", "ok"), asst("(tool results received)"), usr("b")]}),
    ("Mistral's ids",
     error_reply("Tool call id was toolu_01A09q90qw90lq917835lq9 but must be a-z, A-Z, 0-9, with a "
                 "length of 9. The tool call id must have 9 characters"),
     req(conversation_with("toolu_01A09q90qw90lq917835lq9")[0]),
     {"messages": conversation_with("L4lugQ9Qs")[1]}),
    ("no schema for the answer", unsupported("response_format"), req(**output(STRICT)),
     {"response_format": {"type": "json_object"},
      "messages": [sysm(ONE_JSON_VALUE + compact(STRICT)), usr("Hi")]}),
    ("no reasoning in a message", error_reply("Unknown parameter: 'messages[1].reasoning_content'",
                                              "messages[1].reasoning_content", "unknown_parameter"),
     req([usr("a"), asst([think("t", "aap1.c."), use("call_1")]), usr([res("call_1", "ok")])]),
     {"messages": CALLED + [tmsg("call_1", "ok")]}),
    ("no long descriptions",
     error_reply("Invalid 'tools[0].function.description': string too long. Expected a string with "
                 "maximum length 3.", "tools[0].function.description"),
     req(tools=[tool("f", description="abcdef")]), {"tools": [fn("f", description="abc")]}),
    ("no images", error_reply("image_url is not supported by this model"),
     req([usr([txt("a"), img])]),
     {"messages": [usr([part("a"), part("[image omitted: the model does not accept images]")])]}),
    ("items of an array", BAD_SCHEMA, req(tools=[tool("f", inside({"type": "array"}))]),
     {"tools": [fn("f", inside({"type": "array", "items": {}}))]}),
    ("branches at the root", BAD_SCHEMA, req(tools=[tool("f", OPEN_BRANCHES)]),
     {"tools": [fn("f", {"type": "object", "properties": {"a": {}, "b": {}}})]}),
    ("branches that have all of the root's", BAD_SCHEMA,
     req(tools=[tool("f", {"allOf": [{"properties": {"a": {}}, "required": ["a"]}],
                           "properties": {"b": {}}, "not": {}, "enum": [], "$id": "i"})]),
     {"tools": [fn("f", {"type": "object", "properties": {"b": {}, "a": {}}, "required": ["a"]})]}),
    ("a reference at the root", BAD_SCHEMA,
     req(tools=[tool("f", {"$ref": "#/$defs/X", "$defs": {"X": inside({})}})]),
     {"tools": [fn("f", {**inside({}), "$defs": {"X": inside({})}})]}),
    ("schemas that are true or false", BAD_SCHEMA,
     req(tools=[tool("f", {"type": "object", "properties": {"a": True, "b": False},
                           "required": None})]),
     {"tools": [fn("f", {"type": "object", "properties": {"a": {}, "b": {"not": {}}}})]}),
    ("a tuple's items", BAD_SCHEMA,
     req(tools=[tool("f", inside({"type": "array", "items": [{"type": "null"}]}))]),
     {"tools": [fn("f", inside({"type": "array", "items": {"type": "null"}}))]}),
]


OTHER_WORDS = [  # status and error of another server, request, members of the body in the retry
    ("Groq's limit", 400, {"error": {
        "message": "`max_tokens` must be less than or equal to `8192`, the maximum value for "
                   "`max_tokens` is less than the `context_window` for this model"}},
     req(max_tokens=9000), {"max_tokens": 8192}),
    ("DeepSeek's limit", 400, {"error": {
        "message": "Invalid max_tokens value, the valid range of max_tokens is [1, 8192]"}},
     req(max_tokens=9000), {"max_tokens": 8192}),
    ("Bedrock's limit", 400, {
        "message": "The maximum tokens you requested exceeds the model limit of 4096. Try again "
                   "with a maximum tokens value that is lower than 4096."},
     req(max_tokens=9000), {"max_tokens": 4096}),
    ("Anthropic's limit", 400, {"error": {
        "message": "max_tokens: 9000 > 8192, which is the maximum allowed number of output tokens "
                   "for m"}},
     req(max_tokens=9000), {"max_tokens": 8192}),
    ("Mistral's validation inside a message", 422, {"object": "error", "message": {"detail": [
        {"type": "extra_forbidden", "loc": ["body", "top_p"],
         "msg": "Extra inputs are not permitted"}]}},
     req(top_p=0.5), {"top_p": None}),
    ("xAI's camel case", 400, {"error": "Model m does not support parameter topP."}, req(top_p=0.5),
     {"top_p": None}),
    ("vLLM's validation as text", 400,
     {"object": "error", "type": "BadRequestError", "message":
      "[{'type': 'extra_forbidden', 'loc': ('body', 'top_p'), "
      "'msg': 'Extra inputs are not permitted'}]"},
     req(top_p=0.5), {"top_p": None}),
    ("Kimi's tool_choice", 400,
     {"error": {"message": "tool_choice 'required' is incompatible with thinking enabled"}},
     req(tools=[tool("f")], tool_choice={"type": "any"}), {"tool_choice": "auto"}),
    ("Gemini's keyword", 400, [{"error": {
        "message": "Invalid JSON payload received. Unknown name \"const\" at 'tools[0].function_"
                   "declarations[0].parameters.properties[0].value': Cannot find field."}}],
     req(tools=[tool("f", inside({"type": "string", "const": "x"}))]),
     {"tools": [fn("f", inside({"type": "string"}))]}),
    ("SGLang's window", 400, {
        "message": "Requested token count exceeds the model's maximum context length of 32768 "
                   "tokens. You requested a total of 40000 tokens: 8000 tokens from the input "
                   "messages and 32000 tokens for the completion."},
     req(max_tokens=32000, stream=True), {"max_tokens": 24760}),
]


@table(OTHER_WORDS, "status, words, asked, want")
def test_errors_of_other_servers_ask_for_the_same_adjustments(status, words, asked, want):
    async def scenario():
        async with proxied(reply(status, words), OK, **LOCAL_MODELS) as (upstream, server):
            assert (await ask(server.port, body=asked))[0] == 200
            return upstream.requests

    _, second = run(scenario())
    check_body(second.body, want)


WINDOWS = [  # another server's error about a prompt that does not fit, its tokens, the window
    ("The number of tokens to keep from the initial prompt is greater than the context length "
     "(n_keep: 5000>= n_ctx: 4096)", 5000, 4096),
    ("The prompt is too long: 140000, model maximum context length: 131071", 140000, 131071),
    ("too many tokens: total number of tokens in the prompt cannot exceed 4081", 4082, 4081),
    ("Invalid request: Your request exceeded model token limit: 131072", 131073, 131072),
    ("Prompt exceeds max length", 8, 6),
    ("invalid params, context window exceeds limit (2013)", 8, 6),
]


@pytest.mark.parametrize("words, tokens, window", WINDOWS)
def test_other_servers_words_for_a_window_that_is_too_small(words, tokens, window):
    answer, _ = run(asked_once(reply(400, {"error": {"message": words}}), req()))
    assert said(answer) == f"{TOO_LONG}{tokens} tokens > {window} maximum"


@table(ADJUSTED, "refused, asked, want")
def test_an_adjustment_is_made_and_kept_for_the_model(refused, asked, want):
    async def scenario():
        async with proxied(refused, OK, **LOCAL_MODELS) as (upstream, server):
            for _ in range(2):
                status, _, body = await ask(server.port, body=asked)
                assert status == 200, body
            return upstream.requests

    first, second, later = run(scenario())
    assert first.body != second.body == later.body
    check_body(second.body, want)


def test_a_schema_is_simplified_step_by_step():
    patterns = inside({"type": "string", "pattern": "p", "format": "f", "minLength": 1,
                       "default": "d"})

    async def scenario():
        refused = error_reply("failed to parse grammar", status=400)
        async with proxied(refused, OK, **LOCAL_MODELS) as (upstream, server):
            status, _, _ = await ask(server.port, body=req(tools=[tool("f", patterns)]))
            return status, upstream.requests[-1].body["tools"], len(upstream.requests)

    # Step 1 would change nothing in this schema, and the same request is never repeated.
    assert run(scenario()) == (200, [fn("f", inside({"type": "string"}))], 2)


def test_two_adjustments_are_made_one_by_one():
    async def scenario():
        replies = [NEEDS_OTHER_NAME, unsupported("temperature"), OK]
        async with proxied(*replies, **LOCAL_MODELS) as (upstream, server):
            status, _, _ = await ask(server.port, body=req(temperature=0.1))
            return status, [without(heard.body, "model", "messages") for heard in upstream.requests]

    assert run(scenario()) == (200, [{"max_tokens": 100, "temperature": 0.1},
                                     {"max_completion_tokens": 100, "temperature": 0.1},
                                     {"max_completion_tokens": 100}])


@pytest.mark.parametrize("status, want", [
    (404, "404 not_found_error"), (429, "429 rate_limit_error"), (500, "500 api_error")])
def test_only_a_400_or_422_asks_for_an_adjustment(status, want):
    refused = error_reply("Unsupported parameter: 'temperature'", "temperature",
                          "unsupported_parameter", status)
    answer, requests = run(asked_once(refused, req(temperature=0.1)))
    assert said(answer).startswith(want + ": ") and len(requests) == 1


def test_the_same_error_again_is_passed_on():
    answer, requests = run(asked_once(unsupported("temperature"), req(temperature=0.1)))
    assert said(answer) == ("400 invalid_request_error: Unsupported parameter: 'temperature' is "
                            "not supported with this model.")
    assert len(requests) == 2


def test_at_most_four_adjustments_are_tried():
    async def scenario():
        names = ["temperature", "top_p", "stop", "tool_choice", "response_format"]
        async with proxied(*[unsupported(name) for name in names], OK) as (upstream, server):
            asked = req(temperature=0.1, top_p=0.1, stop_sequences=["x"], tools=[tool("f")],
                        **choice("any"), **output(STRICT))
            return said(await ask(server.port, body=asked)), len(upstream.requests)

    answer, count = run(scenario())
    assert answer.startswith("400 invalid_request_error: ") and "response_format" in answer
    assert count == 5


def test_an_adjustment_for_one_model_is_not_made_for_another():
    async def scenario():
        async with proxied(unsupported("temperature"), OK, **LOCAL_MODELS) as (upstream, server):
            await ask(server.port, body=req(temperature=0.1))
            await ask(server.port, body=req(temperature=0.1, model="claude-haiku-4-5"))
            return [heard.body.get("temperature") for heard in upstream.requests]

    assert run(scenario()) == [0.1, None, 0.1]


def test_a_streamed_request_to_an_upstream_that_cannot_stream():
    async def scenario():
        async with proxied(unsupported("stream"), OK) as (_, server):
            return said(await ask(server.port, body=req(stream=True)))

    assert run(scenario()) == 'MS 0+text 0t"Hello" ' + CLOSED


def too_long(prompt, answer, maximum):
    return error_reply(f"{MAXIMUM} {maximum} tokens. However, you requested {prompt + answer} "
                       f"tokens ({prompt} in the messages, {answer} in the completion).",
                       code="context_length_exceeded")


def test_an_answer_that_does_not_fit_is_asked_shorter():
    async def scenario():
        async with proxied(too_long(10000, 32000, 32768), OK, **LOCAL_MODELS) as (upstream, server):
            for _ in range(2):
                status, _, _ = await ask(server.port, body=req(max_tokens=32000))
                assert status == 200
            return [heard.body["max_tokens"] for heard in upstream.requests]

    # This adjustment is not kept, because the next prompt has another length.
    assert run(scenario()) == [32000, 22760, 32000]


def test_an_answer_that_does_not_fit_twice_is_told():
    refused = too_long(10000, 32000, 32768)
    answer, requests = run(asked_once(refused, req(max_tokens=32000), **LOCAL_MODELS))
    assert said(answer) == f"{TOO_LONG}42000 tokens > 32768 maximum"
    assert [heard.body["max_tokens"] for heard in requests] == [32000, 22760]


def test_an_answer_without_room_is_told_at_once():
    refused = too_long(7500, 2000, 8192)
    answer, requests = run(asked_once(refused, req(max_tokens=2000), **LOCAL_MODELS))
    assert said(answer) == f"{TOO_LONG}9500 tokens > 8192 maximum"
    assert len(requests) == 1


def test_an_adjustment_of_one_request_does_not_change_another():
    asked = compact(req(tools=[tool("f", {**STRICT, "description": "long " * 300}, strict=True)]))
    translations = [
        aiapiproxy.checked_translation(aiapiproxy.client_json(asked), SETTINGS["openai"])
        for _ in range(3)]
    before = aiapiproxy.json_bytes(translations[0].body)
    member = "tools[0].function.strict"
    error = {"error": {"message": f"Unknown parameter: {member}", "param": member}}
    refused = json.dumps(error).encode()
    assert aiapiproxy.adjustment_for(400, refused, translations[1])[0].name == "strict_dropped"
    assert "strict" not in translations[1].body["tools"][0]["function"]
    assert aiapiproxy.json_bytes(translations[2].body) == before
    aiapiproxy.apply_adjustments({"strict_dropped": True}, translations[2])
    assert b'"strict"' not in aiapiproxy.json_bytes(translations[2].body)
    again = aiapiproxy.checked_translation(aiapiproxy.client_json(asked), SETTINGS["openai"])
    assert aiapiproxy.json_bytes(again.body) == before


def test_too_many_tools_are_the_upstreams_to_refuse():
    words = ("Invalid 'tools': array too long. Expected an array with maximum length 128, but got "
             "an array with length 129 instead.")
    answer, (heard,) = run(asked_once(reply(400, error_like("array_above_max_length", words)),
                                      req(tools=[tool(f"f{number}") for number in range(129)])))
    assert said(answer).startswith(f"400 invalid_request_error: {words}")
    assert len(heard.body["tools"]) == 129


def test_an_adjusted_large_request_has_one_input_token_count_in_its_stream(monkeypatch):
    monkeypatch.setattr(aiapiproxy, "WRITE_PIECE", 100)
    told = {"error": {"message": "string too long. Expected a string with maximum length 1024",
                      "param": "tools[0].function.description"}}
    asked = req(stream=True, tools=[{"name": "T", "description": "word " * 2000,
                                     "input_schema": {"type": "object"}}])

    class Hasty(RawUpstream):
        """A server that answers the second request before its body has arrived."""

        async def request(self, reader):
            if not self.requests:
                return await super().request(reader)
            return Heard(await reader.readuntil(b"\r\n\r\n"), b"")

    async def scenario():
        early = raw_answer(sse([ctext("x"), cend("stop"), DONE]), "Connection: close",
                           "Content-Type: text/event-stream")
        script = raw_answer(json.dumps(told).encode(), status=400), [[early, HANG]]
        async with Hasty(*script) as upstream, bare(OPENAI_BASE_URL=upstream.url) as server:
            return await ask(server.port, body=asked), upstream.opened

    answer, opened = run(scenario())
    counts = re.findall(rb'"input_tokens":(\d+)', answer[2])
    assert opened == 2 and len(counts) == 2 and counts[0] == counts[1]


# ============================================================================
# 15. TOKEN ESTIMATE
# ============================================================================

SCHEMA = '{"type":"object","properties":{}}'


def test_estimate_of_a_request():
    def estimate(*messages, **members):
        asked = req(list(messages), **members)
        translation = aiapiproxy.checked_translation(asked, SETTINGS["openai"])
        return aiapiproxy.estimated_request_tokens(translation.body)

    tokens = aiapiproxy.estimated_tokens
    assert estimate(usr("Hi")) == 8
    assert estimate(usr("Hi"), asst("Hello there"), usr("Hi")) == (
        8 + 4 + tokens("Hello there") + 4 + tokens("Hi"))
    assert estimate(usr([txt("Hi"), img])) == 8 + 1600
    assert estimate(usr([txt("Hi"), doc(PDF)])) == 8 + 2000
    assert estimate(usr("Hi"), tools=[tool("f")]) == 8 + 8 + tokens("f") + tokens(SCHEMA)
    assert estimate(usr("Hi"), asst([use("call_1")]), usr([res("call_1", "Hello")])) == (
        8 + 4 + tokens("f") + tokens("{}") + 4 + tokens("Hello"))
    assert estimate(usr("Hi"), **output(STRICT)) == 8 + tokens(compact(STRICT))


@BOTH_WAYS
def test_the_estimate_is_the_same_when_a_text_was_counted_before(shortcuts):
    body = aiapiproxy.checked_translation(req([usr("some words " * 100)]), SETTINGS["openai"]).body
    want = aiapiproxy.estimated_request_tokens(body)
    found = [aiapiproxy.estimated_request_tokens(body, shortcuts.count_tokens) for _ in "ab"]
    assert found == [want] * 2


def test_estimate_of_a_text():
    assert aiapiproxy.estimated_tokens("") == 0
    assert aiapiproxy.estimated_tokens("Hi") == 1
    assert aiapiproxy.estimated_tokens("Hello world, " * 100) > 100


def test_counting_many_long_texts_takes_bounded_time_and_looks_at_all_of_them():
    dice = random.Random(3)
    def fresh(words):
        return " ".join("".join(dice.choices("abcdefghijklmnop", k=6)) for _ in range(words))
    prose = "The quick brown fox jumps over the lazy dog and looks for a place to rest. "
    kinds = [fresh(70_000), prose * 6500, "12345 67890 " * 40_000]
    asked = [usr([txt(kinds[place % 3]) for place in range(60)])]
    turned = [usr([txt(kinds[place % 3]) for place in reversed(range(60))])]
    began = time.process_time()
    found = [aiapiproxy.checked_translation(req(each), SETTINGS["local"]).input_estimate()
             for each in (asked, turned)]
    assert time.process_time() - began < 4
    whole = 20 * sum(aiapiproxy.estimated_tokens(text) for text in kinds)
    assert abs(found[0] - whole) < 0.08 * whole and abs(found[0] - found[1]) < 0.05 * found[0]


# ============================================================================
# 17. HTTP/1.1
# ============================================================================

# ---- Heads

@table([
    ("a plain head", b"GET /a?b=c HTTP/1.1\r\nHost: h:1\r\nX: 1\r\nx:  2 \t",
     ("GET", "/a", "b=c", {"host": "h:1", "x": "1, 2"}, True, "h:1")),
    ("HTTP/1.0 without a Host", b"GET / HTTP/1.0", ("GET", "/", "", {}, False, "")),
    ("the target's host wins", b"GET HTTP://b:2/x HTTP/1.1\r\nHost: a",
     ("GET", "/x", "", {"host": "a"}, True, "b:2")),
    ("a token of signs as method", b"M!#$%&'*+-.^_`|~ / HTTP/1.1\r\nHost: a",
     ("M!#$%&'*+-.^_`|~", "/", "", {"host": "a"}, True, "a")),
])
def test_parse_request_head(given, want):
    assert tuple(aiapiproxy.parse_request_head(given)) == want


@table([
    ("kept by default", "HTTP/1.1", None, True), ("closed when asked", "HTTP/1.1", "close", False),
    ("closed in a list", "HTTP/1.1", "x, Close", False),
    ("HTTP/1.0 closes", "HTTP/1.0", None, False),
    ("HTTP/1.0 is kept when asked", "HTTP/1.0", "Keep-Alive", True),
    ("HTTP/1.0 closes when in doubt", "HTTP/1.0", "x", False),
], "version, connection, want")
def test_whether_a_connection_is_kept(version, connection, want):
    fields = [] if connection is None else [f"Connection: {connection}"]
    head = GET("/", *fields, version=version)[:-4]
    assert aiapiproxy.parse_request_head(head).keeps_alive() is want


SMUGGLED = GET("/smuggled")

BAD_HEADS = [  # each is answered once, then the connection is closed
    ("no version", b"GET /health\r\n\r\n", BAD),
    ("no target", b"GET  HTTP/1.1\r\nHost: a\r\n\r\n", BAD),
    ("only a word", b"GET\r\n\r\n", BAD),
    ("two blanks", b"GET  /health HTTP/1.1\r\nHost: a\r\n\r\n", BAD),
    ("a tab for a blank", b"GET\t/health HTTP/1.1\r\nHost: a\r\n\r\n", BAD),
    ("a blank at the start", b" GET /health HTTP/1.1\r\nHost: a\r\n\r\n", BAD),
    ("a blank at the end", b"GET /health HTTP/1.1 \r\nHost: a\r\n\r\n", BAD),
    ("a blank in the target", b"GET /he alth HTTP/1.1\r\nHost: a\r\n\r\n", BAD),
    ("small letters in HTTP", b"GET /health http/1.1\r\nHost: a\r\n\r\n", BAD),
    ("two digits in the version", b"GET /health HTTP/1.10\r\nHost: a\r\n\r\n", BAD),
    ("no dot in the version", b"GET /health HTTP/11\r\nHost: a\r\n\r\n", BAD),
    ("a method that is no token", b"G@T /health HTTP/1.1\r\nHost: a\r\n\r\n", BAD),
    ("a NUL in the target", b"GET /hea\0lth HTTP/1.1\r\nHost: a\r\n\r\n", BAD),
    ("a byte over 127 in the target", b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n", BAD),
    ("DEL in the target", b"GET /\x7f HTTP/1.1\r\nHost: a\r\n\r\n", BAD),
    ("a target that is no path", GET("health"), BAD),
    ("an authority as target", GET("127.0.0.1:80"), BAD),
    ("an asterisk with GET", GET("*"), BAD),
    ("TLS on a plain port", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", BAD),
    ("HTTP/2's preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "505 api_error"),
    ("HTTP/2.0", GET(version="HTTP/2.0"), "505 api_error"),
    ("HTTP/0.9", GET(version="HTTP/0.9"), "505 api_error"),
    ("HTTP/3.0", GET(version="HTTP/3.0"), "505 api_error"),
    ("a header without a colon", GET("/health", "X"), BAD),
    ("a header without a name", GET("/health", ": x"), BAD),
    ("a blank before the colon", GET("/health", "X : x"), BAD),
    ("a tab before the colon", GET("/health", "X\t: x"), BAD),
    ("a folded header", GET("/health", "X: a", " b"), BAD),
    ("a folded header by a tab", GET("/health", "X: a", "\tb"), BAD),
    ("a blank before the first header", b"GET /health HTTP/1.1\r\n Host: a\r\n\r\n", BAD),
    ("a NUL in a value", GET("/health", "X: a\0b"), BAD),
    ("a NUL in a name", GET("/health", "X\0: a"), BAD),
    ("a bare CR in a value", GET("/health", "X: a\rb"), BAD),
    ("a bare CR for a line's end", b"GET /health HTTP/1.1\r\nHost: a\rX: b\r\n\r\n", BAD),
    ("a bare LF for a line's end", b"GET /health HTTP/1.1\nHost: a\n\n", BAD),
    ("a bare LF between headers", b"GET /health HTTP/1.1\r\nHost: a\nX: b\r\n\r\n", BAD),
    ("a bare LF at the head's end", b"GET /health HTTP/1.1\r\nHost: a\r\n\n", BAD),
    ("CR CR LF", b"GET /health HTTP/1.1\r\nHost: a\r\r\n\r\n", BAD),
    ("a control character in a value", GET("/health", "X: a\x01b"), BAD),
    ("DEL in a value", GET("/health", "X: a\x7fb"), BAD),
    ("a vertical tab in a name", GET("/health", "X\x0b: a"), BAD),
    ("a byte over 127 in a name", GET("/health", b"\xc3\xa4: a"), BAD),
    ("no Host", GET(host=""), BAD),
    ("Host twice, equal", GET("/health", "Host: 127.0.0.1"), BAD),
    ("Host twice, in other letters", GET("/health", "hOST: b"), BAD),
    ("two names in Host", GET(host="Host: a b"), BAD),
    ("a path in Host", GET(host="Host: a/b"), BAD),
    ("a user in Host", GET(host="Host: a@b"), BAD),
    ("a port that is none", GET(host="Host: a:b"), BAD),
    ("an open bracket in Host", GET(host="Host: [::1"), BAD),
    ("a Host outside ASCII", GET(host=b"Host: \xe4"), BAD),
    ("Content-Length twice, equal", POST("Content-Length: 2", "Content-Length: 2", body=b"{}"),
     BAD),
    ("Content-Length twice", POST("Content-Length: 2", "Content-Length: 0", body=b"{}"), BAD),
    ("Content-Length as a list", POST("Content-Length: 2, 2", body=b"{}"), BAD),
    ("Content-Length with a plus", POST("Content-Length: +2", body=b"{}"), BAD),
    ("Content-Length with a minus", POST("Content-Length: -2", body=b"{}"), BAD),
    ("Content-Length in hex", POST("Content-Length: 0x2", body=b"{}"), BAD),
    ("Content-Length with a fraction", POST("Content-Length: 2.0", body=b"{}"), BAD),
    ("Content-Length with an underscore", POST("Content-Length: 0_2", body=b"{}"), BAD),
    ("Content-Length with a blank inside", POST("Content-Length: 0 2", body=b"{}"), BAD),
    ("Content-Length in other digits", POST(b"Content-Length: \xb2", body=b"{}"), BAD),
    ("Content-Length in words", POST("Content-Length: two", body=b"{}"), BAD),
    ("Content-Length empty", POST("Content-Length:", body=b"{}"), BAD),
    ("Content-Length of 19 digits", POST("Content-Length: 0000000000000000002", body=b"{}"), BAD),
    ("both lengths", POST("Content-Length: 2", "Transfer-Encoding: chunked", body=b"0\r\n\r\n"),
     BAD),
    ("both, the other way",
     POST("Transfer-Encoding: chunked", "Content-Length: 5", body=b"0\r\n\r\n"), BAD),
    ("gzip, chunked", POST("Transfer-Encoding: gzip, chunked", body=b"0\r\n\r\n"), BAD),
    ("chunked twice", POST("Transfer-Encoding: chunked, chunked", body=b"0\r\n\r\n"), BAD),
    ("two lines of chunked", POST(*["Transfer-Encoding: chunked"] * 2, body=b"0\r\n\r\n"), BAD),
    ("identity", POST("Transfer-Encoding: identity", body=b"{}"), BAD),
    ("xchunked", POST("Transfer-Encoding: xchunked", body=b"0\r\n\r\n"), BAD),
    ("chunked with a parameter", POST("Transfer-Encoding: chunked;q=1", body=b"0\r\n\r\n"), BAD),
    ("chunked in quotes", POST('Transfer-Encoding: "chunked"', body=b"0\r\n\r\n"), BAD),
    ("chunked behind a vertical tab",
     POST("Transfer-Encoding: \x0bchunked", body=b"0\r\n\r\n"), BAD),
    ("chunked and a comma", POST("Transfer-Encoding: chunked,", body=b"0\r\n\r\n"), BAD),
    ("an empty coding", POST("Transfer-Encoding:", body=b"0\r\n\r\n"), BAD),
    ("chunked in HTTP/1.0", HTTP("POST /v1/messages HTTP/1.0", "Transfer-Encoding: chunked"), BAD),
    ("a line of 8193 bytes", GET("/" + "a" * (8193 - 14)), "414 invalid_request_error"),
    ("a long header", GET("/health", "X: " + "a" * 65536), "431 invalid_request_error"),
    ("many long headers", GET("/health", *["X: " + "a" * 1000] * 70), "431 invalid_request_error"),
    ("129 headers", GET("/health", *["X: a"] * 128), "431 invalid_request_error"),
    ("a declared body too large", POST("Content-Length: 33554433"), "413 request_too_large"),
    ("a declared body of 18 digits", POST("Content-Length: 999999999999999999"),
     "413 request_too_large"),
]

BAD_CHUNKS = [
    ("a size that is no number", chunks(b"g\r\n")), ("an empty size", chunks(b"\r\n")),
    ("a size with a minus", chunks(b"-1\r\n")), ("a size with a plus", chunks(b"+2\r\n{}\r\n")),
    ("a size with 0x", chunks(b"0x2\r\n{}\r\n")),
    ("a size behind a blank", chunks(b" 2\r\n{}\r\n")),
    ("two sizes", chunks(b"2 2\r\n{}\r\n")),
    ("a size of 17 digits", chunks(b"00000000000000002\r\n{}\r\n")),
    ("a size with an underscore", chunks(b"0_2\r\n{}\r\n")),
    ("a bare LF behind the size", chunks(b"2\n{}\r\n")),
    ("a bare CR behind the size", chunks(b"2\r{}\r\n")),
    ("a bare LF in an extension", chunks(b"2;a\n\r\n{}\r\n")),
    ("a NUL in an extension", chunks(b"2;\0\r\n{}\r\n")),
    ("data longer than said", chunks(b"1\r\n{}\r\n")),
    ("data shorter than said", chunks(b"3\r\n{}\r\n")),
    ("nothing behind the data", chunks(b"2\r\n{}")),
    ("a bare LF behind the data", chunks(b"2\r\n{}\n")),
    ("a trailer without a colon", chunks(CHUNKED_HI, end=b"0\r\nX\r\n\r\n")),
    ("a folded trailer", chunks(CHUNKED_HI, end=b"0\r\nX: a\r\n b\r\n\r\n")),
    ("an extension over 64 KiB", chunks(b"2;" + b"a" * 65537 + b"\r\n{}\r\n")),
    ("extensions over 64 KiB in all", chunks(b"1;aaaa\r\n \r\n" * 20000)),
    ("trailers over 64 KiB",
     chunks(CHUNKED_HI, end=b"0\r\n" + b"X: aaaaaaaa\r\n" * 7000 + b"\r\n")),
]


async def attacked(port, request, piece=0):
    """The one answer to a hostile request; the connection has closed, and the next one works."""
    async with Wire(port) as wire:
        sending = asyncio.ensure_future(wire.send(request + SMUGGLED, piece))
        answer = await wire.answer()
        await wire.end()
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
    async with Wire(port) as wire:
        await wire.send(GET())
        assert (await wire.answer())[0] == 200
    assert answer[1]["connection"] == "close"
    return checked(answer)


@pytest.mark.parametrize("piece", [0, 1], ids=["at once", "byte by byte"])
@table(BAD_HEADS)
def test_a_head_that_is_refused(given, want, piece):
    async def scenario():
        async with bare() as server:
            return await attacked(server.port, given, piece if len(given) < 500 else piece * 3000)

    assert run(scenario()) == want


@pytest.mark.parametrize("piece", [0, 1], ids=["at once", "byte by byte"])
@table(BAD_CHUNKS, "given")
def test_a_chunked_body_that_is_refused(given, piece):
    async def scenario():
        async with bare() as server:
            return await attacked(server.port, given, piece if len(given) < 500 else piece * 3000)

    assert run(scenario()) == BAD


def test_nothing_that_is_refused_is_logged_with_a_traceback(capfd, caplog):
    async def scenario():
        async with bare() as server:
            for _, request, *_ in [*BAD_HEADS, *BAD_CHUNKS]:
                await attacked(server.port, request)

    within(20, scenario())
    assert capfd.readouterr().err == ""
    assert not [record for record in caplog.records
                if record.levelname == "ERROR" or record.exc_info]


GOOD = [  # the next request on the same connection is answered too
    ("the plain request", GET(), "200"),
    ("empty lines before it", b"\r\n\r\n" + GET(), "200"),
    ("an address as target", GET("http://127.0.0.1:8082/health"), "200"),
    ("an address without a path", GET("http://127.0.0.1"), "200"),
    ("a query", GET("/health?a=b"), "200"),
    ("HTTP/1.2", GET(version="HTTP/1.2"), "200"),
    ("headers in any letters, blanks around", GET("/health", "cOnTeNt-LeNgTh:\t 0 \t"), "200"),
    ("an empty value", GET("/health", "X:"), "200"),
    ("bytes over 127 in a value", GET("/health", b"X: \xc3\xa4\xff"), "200"),
    ("128 headers", GET("/health", *["X: a"] * 127), "200"),
    ("a line of 8192 bytes", GET("/" + "a" * (8192 - 14)), "404 not_found_error"),
    ("headers of 60 KB", GET("/health", "X: " + "a" * 60000), "200"),
    ("an IPv6 Host", GET(host="Host: [::1]:8082"), "200"),
    ("OPTIONS *", HTTP("OPTIONS * HTTP/1.1"), "204"),
    ("a body with GET", GET("/health", "Content-Length: 5") + b"hello", "200"),
    ("a body with a wrong path", POST("Content-Length: 5", body=b"hello", path="/x"),
     "404 not_found_error"),
    ("a body with a wrong method",
     HTTP("PUT /v1/messages HTTP/1.1", "Content-Length: 5") + b"hello",
     "405 invalid_request_error"),
    ("a body of 60 KB with a wrong path",
     POST("Content-Length: 60000", body=b"a" * 60000, path="/x"), "404 not_found_error"),
    ("no length", POST(), "411 invalid_request_error"),
    ("a coded body", POST("Content-Encoding: gzip", "Content-Length: 5", body=b"hello"),
     "415 invalid_request_error"),
    ("Content-Encoding: identity",
     POST("Content-Encoding: identity", f"Content-Length: {len(HI)}", body=HI), "200"),
    ("another expectation", POST("Expect: 200-ok", "Content-Length: 0"),
     "417 invalid_request_error"),
    ("any Content-Type", POST("Content-Type: text/plain", f"Content-Length: {len(HI)}", body=HI),
     "200"),
    ("a length with zeros in front", POST(f"Content-Length: 000{len(HI)}", body=HI), "200"),
    ("no body", POST("Content-Length: 0"), BAD),
    ("a chunked body", chunks(CHUNKED_HI), "200"),
    ("a chunk for each byte", chunks(*[b"1\r\n%c\r\n" % byte for byte in HI]), "200"),
    ("sizes with zeros and big letters",
     chunks(b"000%X\r\n%b\r\n" % (len(HI), HI), end=b"000\r\n\r\n"), "200"),
    ("extensions of chunks", chunks(b'%x ;a="b";c\r\n%b\r\n' % (len(HI), HI), end=b"0;d\r\n\r\n"),
     "200"),
    ("trailers", chunks(CHUNKED_HI, end=b"0\r\nX: a\r\nContent-Length: 7\r\n\r\n"), "200"),
    ("a chunked body that is no JSON", chunks(b"2\r\n{a\r\n"), BAD),
]


@pytest.mark.parametrize("piece", [0, 1], ids=["at once", "byte by byte"])
@table(GOOD)
def test_a_request_that_is_served(given, want, piece):
    async def scenario():
        async with bare() as server, Wire(server.port) as wire:
            await wire.send(given + GET("/v1/models?limit=1"),
                            piece if len(given) < 2000 else piece * 3000)
            answer = await wire.answer()
            status, _, body = await wire.answer()
            assert status == 200 and json.loads(body)["data"] and wire.data == b""
            return checked(answer)

    assert run(scenario()) == want


# ---- Bodies

def test_a_body_of_a_length_at_every_cut():
    for pieces in every_split(b"hello rest"):
        body, data, rest = aiapiproxy.LengthBody(5), b"", b""
        for piece in pieces:
            if body.done:
                rest += piece
            else:
                data += body.feed(piece)
        assert (data, body.done, body.rest + rest) == (b"hello", True, b" rest")


FED = [  # the bytes of a chunked body, its data, what follows
    ("one chunk", b"5\r\nhello\r\n0\r\n\r\nrest", b"hello", b"rest"),
    ("none", b"0\r\n\r\n", b"", b""),
    ("several", b"1\r\na\r\n0a\r\n0123456789\r\nF;x\r\n0123456789\r\n\0\xff,\r\n0\r\n\r\n0\r\n\r\n",
     b"a01234567890123456789\r\n\0\xff,", b"0\r\n\r\n"),
    ("extensions and trailers", b'2 \t;a="\xe4"\r\n\r\n\r\n0;b\r\nX: y\r\nZ:\r\n\r\n',
     b"\r\n", b""),
    ("a large one", b"401\r\n" + b"a" * 1025 + b"\r\n0\r\n\r\nGET", b"a" * 1025, b"GET"),
]


@table(FED, "raw, want, rest")
def test_a_chunked_body_at_every_cut(raw, want, rest):
    for pieces in every_split(raw):
        body, data, after = aiapiproxy.ChunkedBody(), b"", b""
        for piece in pieces:
            if body.done:
                after += piece
            else:
                data += body.feed(piece)
        assert (data, body.done, body.rest + after) == (want, True, rest), pieces[0]
        body.eof()


@table(BAD_CHUNKS, "given")
def test_a_broken_chunked_body_at_every_cut(given):
    raw = given.partition(b"\r\n\r\n")[2]
    for pieces in every_split(raw) if len(raw) < 200 else ([raw], [raw[:70], raw[70:]]):
        body = aiapiproxy.ChunkedBody()
        with pytest.raises(aiapiproxy.ProxyError) as caught:
            for piece in pieces:
                body.feed(piece)
            body.eof()
        assert caught.value.status == 400


@table([("in the size", b"5"), ("in the data", b"5\r\nhel"), ("behind it", b"5\r\nhello"),
        ("before the last chunk", b"5\r\nhello\r\n"), ("before the last line", b"0\r\n"),
        ("in a trailer", b"0\r\nX: y\r\n")], "given")
def test_a_chunked_body_that_ends_early(given):
    body = aiapiproxy.ChunkedBody()
    body.feed(given)
    with pytest.raises(aiapiproxy.ProtocolError):
        body.eof()


# ============================================================================
# 18. BYTE STREAMS
# ============================================================================
#
# One stream over a transport that records each call.

class NotedTransport(asyncio.Transport):
    """Records the data and the end in order; `stuck` bytes stay in its write buffer."""

    def __init__(self, protocol, stuck=0):
        super().__init__()
        self.protocol, self.stuck, self.done, self.ended = protocol, stuck, [], False

    def get_protocol(self):
        return self.protocol

    def set_write_buffer_limits(self, high=None, low=None):
        pass

    def get_write_buffer_size(self):
        return self.stuck

    def is_closing(self):
        return self.ended

    def can_write_eof(self):
        return True

    def write(self, data):
        self.done.append(data.decode())

    def write_eof(self):
        self.done.append("EOF")

    def pause_reading(self):
        self.done.append("PAUSED")

    def resume_reading(self):
        self.done.append("RESUMED")

    def close(self):
        self.done.append("CLOSED")
        self.ended = True

    def abort(self):
        self.done.append("ABORTED")
        self.ended = True


def noted_stream(stuck=0):
    protocol = aiapiproxy.ConnectionProtocol()
    transport = NotedTransport(protocol, stuck)
    protocol.connection_made(transport)
    return aiapiproxy.ByteStream(protocol, transport), protocol, transport


@table([
    ("at once and in order", ["write"], "a b c"),
    ("before a half-close", ["end_writing"], "a b EOF"),
    ("before a close", ["close"], "a b CLOSED"),
    ("but not after a close", ["close", "write"], "a b CLOSED"),
    ("but not after an abort", ["abort", "write"], "a b ABORTED"),
    ("and no half-close after a close", ["close", "end_writing"], "a b CLOSED"),
], "steps, want")
def test_bytes_are_sent(steps, want):
    async def scenario():
        stream, _, transport = noted_stream()
        stream.write(b"a")
        stream.write(b"b")
        for step in steps:
            getattr(stream, step)(*[b"c"] * (step == "write"))
        return " ".join(transport.done)

    assert run(scenario()) == want


@table([("a reset", "connection_lost"), ("a close of ours", "close")], "way")
def test_a_drain_ends_with_its_connection(way):
    async def scenario():
        stream, protocol, _ = noted_stream()
        protocol.pause_writing()
        draining = asyncio.ensure_future(stream.drain())
        await asyncio.sleep(0)
        assert not draining.done()
        if way == "close":
            stream.close()
        protocol.connection_lost(None)
        await draining
        with pytest.raises(ConnectionResetError):
            await stream.drain()

    run(scenario())


@table([
    ("little, of which nothing is lost", b"x" * 65536, [], False),
    ("more than is read ahead, and is seen still", b"x" * 200_000, ["PAUSED", "RESUMED"], True),
], "ahead, want, is_over")
def test_a_watched_client_that_has_sent_ahead(ahead, want, is_over):
    async def scenario():
        stream, protocol, transport = noted_stream()
        told = []
        protocol.data_received(ahead)
        stream.watch(lambda: told.append("disconnected"))
        assert (transport.done, stream.exceeded_read_ahead) == (want, is_over)
        protocol.data_received(b"y")
        assert stream.exceeded_read_ahead and told == []
        protocol.eof_received()
        assert told == ["disconnected"]
        return await protocol.reader.read(-1)

    assert run(scenario()) == ahead


def pumped(events, buffered=b""):
    """The pieces that a pump gives to its callback, its end, and the next read; "z" is enough."""
    async def scenario():
        stream, protocol, _ = noted_stream()
        taken = []

        def take(data, now):
            taken.append(data[:9].decode())
            if data == b"ERROR":
                raise KeyError("take")
            return data == b"z"

        if buffered:
            protocol.data_received(buffered)
        pumping = asyncio.ensure_future(stream.pump(take, 0.05))
        await asyncio.sleep(0)
        for event in events:
            if event == "EOF":
                protocol.eof_received()
            elif event == "RESET":
                protocol.connection_lost(ConnectionResetError())
            else:
                protocol.data_received(event)
        (ended,) = await asyncio.gather(pumping, return_exceptions=True)
        try:
            rest = (await stream.read())[:9].decode()
        except (OSError, aiapiproxy.ReadTimeout) as error:
            rest = type(error).__name__
        return taken, repr(ended), rest

    return run(scenario())


@table([
    ("until it has enough", [b"a", b"z", b"c"], b"", (["a", "z"], "None", "c")),
    ("until the end", [b"a", "EOF"], b"", (["a"], "None", "")),
    ("until a reset", [b"a", "RESET"], b"", (["a"], "None", "ConnectionResetError")),
    ("until it fails", [b"ERROR", b"b"], b"", (["ERROR"], "KeyError('take')", "b")),
    ("until nothing arrives for too long", [b"a"], b"", (["a"], "None", "ReadTimeout")),
    ("unless bytes have arrived before", [], b"a", ([], "None", "a")),
    ("and a burst in pieces", [b"a", b"b" * 65536 + b"z", b"c"], b"",
     (["a", "b" * 9, "z"], "None", "c")),
], "events, buffered, want")
def test_a_pump_gives_arriving_bytes_to_its_callback(events, buffered, want):
    assert pumped(events, buffered) == want


@table([
    ("that waits", [b"a"], ["a"]),
    ("twice before it wakes up", [b"a", b"b"], ["ab"]),
    ("more than one read may give", [b"a" * 65536 + b"b"], ["a" * 65536, "b"]),
    ("and an end", [b"a", "EOF"], ["a", ""]),
    ("and a reset", [b"a", "RESET"], ["a", "the connection was reset"]),
    ("an end alone", ["EOF"], [""]),
    ("a reset alone", ["RESET"], ["the connection was reset"]),
], "events, want")
def test_a_read_gets_the_data_that_arrives_while_it_waits(events, want):
    async def scenario():
        stream, protocol, _ = noted_stream()
        reading = asyncio.ensure_future(stream.read())
        await asyncio.sleep(0)
        for event in events:
            if event == "EOF":
                protocol.eof_received()
            elif event == "RESET":
                protocol.connection_lost(ConnectionResetError())
            else:
                protocol.data_received(event)
        got = []
        for _ in want:
            try:
                got.append((await reading).decode())
            except OSError as error:
                got.append(str(error))
            reading = asyncio.ensure_future(stream.read())
        reading.cancel()
        return got

    assert run(scenario()) == want


@table([("before it arrives", False), ("in the same iteration", True)], "is_late")
def test_data_for_a_cancelled_read_is_given_to_the_next_read(is_late):
    async def scenario():
        stream, protocol, _ = noted_stream()
        reading = asyncio.ensure_future(stream.read())
        await asyncio.sleep(0)
        reading.cancel()
        if is_late:
            protocol.data_received(b"a")
        await asyncio.gather(reading, return_exceptions=True)
        if not is_late:
            protocol.data_received(b"a")
        return await stream.read()

    assert run(scenario()) == b"a"


# ============================================================================
# 19. UPSTREAM CLIENT
# ============================================================================

def deflated(data, wbits):
    engine = zlib.compressobj(wbits=wbits)
    return engine.compress(data) + engine.flush()


LOST = "The upstream closed the connection before the end of the answer"

RAW_ANSWERS = [  # the upstream's bytes, and the text or the error that the client gets
    ("nothing", b"",
     "502: Cannot connect to 127.0.0.1: the connection was closed before an answer"),
    ("a reset before an answer", [[RESET]],
     "502: Cannot connect to 127.0.0.1: the connection was closed before an answer"),
    ("half a status line", b"HTTP/1.1 20", f"502: {LOST}"),
    ("half a head", b"HTTP/1.1 200 OK\r\nContent-Le", f"502: {LOST}"),
    ("half a body", b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{",
     f"502: {LOST}"),
    ("half a body, then a reset", [[b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{", RESET]],
     f"502: {LOST}"),
    ("half a chunk", raw_answer(b"5\r\n{", "Transfer-Encoding: chunked", length=False),
     f"502: {LOST}"),
    ("no last chunk", raw_answer(b"2\r\n{}\r\n", "Transfer-Encoding: chunked", length=False),
     f"502: {LOST}"),
    ("a chunk without size", raw_answer(b"x\r\n{}\r\n", "Transfer-Encoding: chunked", length=False),
     "502: The upstream broke HTTP: "),
    ("a chunk too long",
     raw_answer(b"1\r\n{}\r\n0\r\n\r\n", "Transfer-Encoding: chunked", length=False),
     "502: The upstream broke HTTP: "),
    ("another coding", raw_answer(FINE, "Transfer-Encoding: x"), "502: The upstream broke HTTP: "),
    ("SSH", b"SSH-2.0-OpenSSH_9.0\r\n", "502: The upstream broke HTTP: "),
    ("HTTP/2", b"HTTP/2 200\r\n\r\n", "502: The upstream broke HTTP: "),
    ("TLS", b"\x15\x03\x01\x00\x02\x02\x28", "502: The upstream broke HTTP: "),
    ("a page without a head", b"<html>", "502: The upstream broke HTTP: "),
    ("a status of four digits", b"HTTP/1.1 2000 OK\r\n\r\n", "502: The upstream broke HTTP: "),
    ("status 000", b"HTTP/1.1 000 OK\r\n\r\n", "502: The upstream broke HTTP: "),
    ("two different lengths", raw_answer(FINE, "Content-Length: 1"),
     "502: The upstream broke HTTP: "),
    ("a negative length", raw_answer(FINE, "Content-Length: -1", length=False),
     "502: The upstream broke HTTP: "),
    ("a length of 30 digits", raw_answer(FINE, "Content-Length: " + "9" * 30, length=False),
     "502: The upstream broke HTTP: "),
    ("a NUL in the head", raw_answer(FINE, "X: a\0"), "502: The upstream broke HTTP: "),
    ("a head of 70 KB", raw_answer(FINE, "X: " + "a" * 70000), "502: The upstream broke HTTP: "),
    ("a head without end", b"HTTP/1.1 200 OK\r\n" + b"X: aaaaaaaa\r\n" * 90000,
     "502: The upstream broke HTTP: "),
    ("101", b"HTTP/1.1 101 Switching Protocols\r\n\r\n", "502: The upstream broke HTTP: "),
    ("204", b"HTTP/1.1 204 No Content\r\n\r\n", "502: The upstream's answer is empty"),
    ("304", b"HTTP/1.1 304 Not Modified\r\n\r\n", "502: "),
    *((f"{status}, never followed",
       raw_answer(b"", "Location: http://127.0.0.1:{port}/v2", status=status), "502: ")
      for status in (300, 301, 302, 303, 305, 307, 308)),
    ("a redirect that breaks its URL",
     raw_answer(b"", "Location: http://[x/", status=302), "502: "),
    ("an unknown status", raw_answer(b"{}", status=599), "500: "),
    ("1xx before the answer",
     b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n"
     + raw_answer(FINE, JSON_TYPE), "x"),
    ("equal lengths", raw_answer(FINE, f"Content-Length: {len(FINE)}"), "x"),
    ("a body that the connection ends", raw_answer(FINE, length=False), "x"),
    ("HTTP/1.0", raw_answer(FINE).replace(b"HTTP/1.1", b"HTTP/1.0"), "x"),
    ("no reason phrase", raw_answer(FINE).replace(b"200 X", b"200"), "x"),
    ("bare LF", raw_answer(FINE).replace(b"\r\n", b"\n"), "x"),
    ("a folded header", raw_answer(FINE, "X: a", "  b"), "x"),
    ("chunks with extensions and trailers",
     raw_answer(b"%x;a=b\r\n%b\r\n0\r\nX: y\r\n\r\n" % (len(FINE), FINE),
                "Transfer-Encoding: chunked", length=False), "x"),
    ("bytes behind the answer", raw_answer(FINE) + b"HTTP/1.1 200 OK\r\n", "x"),
    ("gzip", raw_answer(gzip.compress(FINE), "Content-Encoding: gzip"), "x"),
    ("x-gzip", raw_answer(gzip.compress(FINE), "Content-Encoding: x-gzip"), "x"),
    ("deflate", raw_answer(deflated(FINE, 15), "Content-Encoding: deflate"), "x"),
    ("deflate without its wrapper", raw_answer(deflated(FINE, -15), "Content-Encoding: deflate"),
     "x"),
    ("Content-Encoding: identity", raw_answer(FINE, "Content-Encoding: identity"), "x"),
    ("gzip that is none", raw_answer(FINE, "Content-Encoding: gzip"), "502: "),
    ("gzip cut off", raw_answer(gzip.compress(FINE)[:-30], "Content-Encoding: gzip"), "502: "),
    ("gzip that swells beyond 64 MiB",
     raw_answer(gzip.compress(b" " * 70000000), "Content-Encoding: gzip"),
     "502: The upstream's answer is "),
    ("a page", raw_answer(b"<html><title>Sorry</title>", "Content-Type: text/html"), "502: "),
    ("not JSON", raw_answer(b"sorry", JSON_TYPE), "502: "),
    ("JSON cut off", raw_answer(FINE[:-9]), "502: "),
    ("not UTF-8", raw_answer(FINE.replace(b'"x"', b'"x\xff"')), "x\ufffd"),
    ("a BOM", raw_answer(b"\xef\xbb\xbf" + FINE), "x"),
    ("100,000 levels", raw_answer(b"[" * 100000 + b"]" * 100000), "502: "),
    *((f"{value!r}", raw_answer(json.dumps(value).encode()), "502: ") for value in (
        None, 1, "x", [], {}, [[]], {"choices": None}, {"choices": {}}, {"choices": [None]},
        {"choices": [[]]}, {"choices": "x"})),
]


@pytest.mark.parametrize("streaming", [False, True], ids=["plain", "stream"])
@table(RAW_ANSWERS)
def test_an_upstream_that_answers_anything(given, want, streaming):
    async def scenario():
        async with facing(given) as (upstream, server):
            if isinstance(given, bytes):
                upstream.script = [given.replace(b"{port}", str(upstream.port).encode())]
            answer = await ask(server.port, body=req(stream=streaming))
            assert (await ask(server.port, "GET", "/health"))[0] == 200
            return answer, upstream

    answer, upstream = run(scenario())
    got = shown(answer).replace(f":{upstream.port}", "")
    assert got.startswith(want) if want[3:4] == ":" else got == want
    assert len(upstream.requests) == 1, "nothing is asked twice"
    assert answer[1]["content-type"] in ("application/json", "text/event-stream; charset=utf-8")


def test_a_redirect_leads_nobody_elsewhere_and_names_its_host():
    async def scenario():
        async with RawUpstream(raw_answer(FINE)) as other:
            moved = raw_answer(b"", f"Location: http://localhost:{other.port}/v1/chat/completions",
                               status=307)
            async with facing(moved) as (upstream, server):
                answer = await ask(server.port, body=req())
                return shown(answer), answer[1], other.opened

    message, headers, opened = run(scenario())
    assert "localhost" in message and opened == 0 and "location" not in headers


def test_nothing_of_the_upstreams_headers_reaches_the_client():
    async def scenario(streaming):
        fields = ["Set-Cookie: a=b", "Access-Control-Allow-Origin: *", "Location: /x", "Server: s",
                  "X-Powered-By: p", "Strict-Transport-Security: max-age=1",
                  "request-id: req_upstream", "Connection: close", "Via: v"]
        body = FINE_SSE if streaming else FINE
        async with facing(raw_answer(body, *fields)) as (_, server):
            return (await ask(server.port, body=req(stream=streaming)))[1]

    assert run(scenario(False)).keys() == {"date", "request-id", "content-type", "content-length",
                                           "connection"}
    assert run(scenario(True)).keys() == {"date", "request-id", "content-type", "cache-control",
                                          "x-accel-buffering", "transfer-encoding", "connection"}


def test_an_early_answer_to_a_large_request_is_passed_on():
    early = reply(413, {"error": {"message": "too large for us"}})
    answer, _ = run(asked_once(early, req([usr("x" * 3_000_000)])))
    assert said(answer) == "413 request_too_large: too large for us"


def test_nobody_listens():
    async def scenario():
        async with ScriptedServer() as upstream:
            port = upstream.port
        settings = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": f"http://127.0.0.1:{port}/v1"}
        async with running(aiapiproxy.load_settings(settings, server_port=0)) as server:
            return port, said(await ask(server.port, body=req()))

    port, answer = run(scenario())
    assert answer.startswith(f"502 api_error: Cannot connect to 127.0.0.1:{port}: ")


def test_a_name_that_does_not_exist():
    async def scenario():
        settings = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": "http://nowhere.invalid/v1"}
        async with running(aiapiproxy.load_settings(settings, server_port=0)) as server:
            return said(await ask(server.port, body=req()))

    assert run(scenario()).startswith("502 api_error: Cannot resolve nowhere.invalid")


# ---- The pool

NOT_TWICE = f"502: {LOST}"

POOLS = [  # answers of each connection, the clients' answers, connections, requests
    ("a connection is used again", [[KEPT] * 3], ["x", "x", "x"], 1, 3),
    ("one that dies unseen is replaced", [[KEPT, b""], [KEPT]], ["x", "x"], 2, 3),
    ("one that is reset unseen is replaced", [[KEPT, [RESET]], [KEPT]], ["x", "x"], 2, 3),
    ("but only once", [[KEPT, b""], [b""]],
     ["x", "502: Cannot connect to 127.0.0.1: the connection was closed before an answer"], 2, 3),
    ("not when an answer had begun", [[KEPT, b"HTTP/1.1 2"], [KEPT]], ["x", NOT_TWICE], 1, 2),
    ("not in the body", [[KEPT, b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"], [KEPT]],
     ["x", NOT_TWICE], 1, 2),
    ("Connection: close keeps it out", [[raw_answer(FINE, "Connection: close")] * 2],
     ["x", "x"], 2, 2),
    ("HTTP/1.0 keeps it out", [[KEPT.replace(b"HTTP/1.1", b"HTTP/1.0")] * 2], ["x", "x"], 2, 2),
    ("more bytes than the answer keep it out", [[KEPT + b"x"] * 2], ["x", "x"], 2, 2),
    ("a second answer that nobody asked for is not taken",
     [[KEPT + raw_answer(FINE.replace(b'"x"', b'"y"'))] * 2], ["x", "x"], 2, 2),
    ("an error's connection is used again", [[raw_answer(b"{}", status=400), KEPT]],
     ["400: ", "x"], 1, 2),
    ("204 is nothing to read", [[b"HTTP/1.1 204 X\r\n\r\n", KEPT]], ["502: ", "x"], 1, 2),
]


@table(POOLS, "scripts, want, opened, asked")
def test_the_pool(scripts, want, opened, asked):
    async def scenario():
        async with facing(*scripts) as (upstream, server):
            got = [shown(await ask(server.port, body=req())).replace(f":{upstream.port}", "")
                   for _ in want]
            return got, upstream.opened, len(upstream.requests)

    got, *counts = run(scenario())
    assert all(each.startswith(start) for each, start in zip(got, want))
    assert counts == [opened, asked]


def test_a_connection_is_used_again_although_the_last_chunk_of_a_collected_stream_was_late():
    answer = raw_answer(framed(FINE_SSE), "Transfer-Encoding: chunked",
                        "Content-Type: text/event-stream", length=False)

    async def scenario():
        gates = [asyncio.Event() for _ in range(3)]
        script = [*([answer, gate, b"0\r\n\r\n"] for gate in gates), HANG]
        async with facing(script) as (upstream, server):
            for gate in gates:
                assert shown(await ask(server.port, body=req(max_tokens=16000))) == "x"
                gate.set()
                while not server.app.upstream.idle_count:
                    await asyncio.sleep(0.001)
            return upstream.opened

    assert run(scenario()) == 1


@table([("closed", b""), ("sent bytes", b"HTTP/1.1 408 X\r\n\r\n")], "late")
def test_an_idle_connection_that_the_upstream_touches_is_not_used_again(late):
    async def scenario():
        gate = asyncio.Event()
        async with facing([[KEPT, gate, late]], [KEPT]) as (upstream, server):
            await ask(server.port, body=req())
            gate.set()
            await upstream.disconnected.wait()
            while server.app.upstream.idle_count:
                await asyncio.sleep(0.001)
            assert shown(await ask(server.port, body=req())) == "x"
            return len(upstream.requests)

    assert run(scenario()) == 2


def test_a_connection_that_was_idle_too_long_or_during_a_sleep_is_not_used(monkeypatch):
    async def scenario():
        now = time.time()
        async with facing([KEPT] * 9) as (upstream, server):
            for seconds in (0, 59, 61, -5):  # below 0: the clock was set back
                now += seconds
                monkeypatch.setattr(aiapiproxy.time, "time", lambda: now)
                assert shown(await ask(server.port, body=req())) == "x"
            return upstream.opened

    assert run(scenario()) == 3


def test_idle_connections_are_closed_in_time(monkeypatch):
    monkeypatch.setattr(aiapiproxy, "IDLE_TIME", 0.1)

    async def scenario():
        async with facing([[KEPT, HANG]]) as (upstream, server):
            await ask(server.port, body=req())
            await upstream.disconnected.wait()
            return server.app.upstream.idle_count

    assert run(scenario()) == 0


# ---- Timeouts

def test_no_answer_in_time():
    for asked, limit in ((req(), "REQUEST_TIMEOUT"), (req(stream=True), "STREAM_TIMEOUT")):
        answer, _ = run(asked_once([reply_head(200), HANG], asked, **{limit: "0.2"}))
        words = "504 timeout_error: The upstream did not answer within 0.2 s"
        assert said(answer).startswith(words)


@table([
    ("before the head", [HANG], req(), "REQUEST_TIMEOUT"),
    ("in the head", [b"HTTP/1.1 200 O", HANG], req(), "REQUEST_TIMEOUT"),
    ("in the body", [raw_answer(FINE)[:-5], HANG], req(), "REQUEST_TIMEOUT"),
    ("before a stream's head", [HANG], req(stream=True), "STREAM_TIMEOUT"),
    ("before a stream's first byte",
     [raw_answer(b"", "Content-Type: text/event-stream", length=False), HANG],
     req(stream=True), "STREAM_TIMEOUT"),
    ("before the head of a stream that the client did not ask for", [HANG], req(max_tokens=30000),
     "REQUEST_TIMEOUT"),
], "parts, asked, setting")
def test_an_upstream_that_stops_sending(parts, asked, setting):
    async def scenario():
        async with facing([parts], **{setting: "0.2"}) as (upstream, server):
            answer = await ask(server.port, body=asked)
            await upstream.disconnected.wait()
            return answer

    answer = run(scenario())
    assert shown(answer) == f"504: The upstream did not answer within 0.2 s ({setting})"
    assert json.loads(answer[2])["error"]["type"] == "timeout_error"


def test_REQUEST_TIMEOUT_limits_a_slow_answer_in_all_and_a_slow_stream_has_no_such_limit():
    def dripping(body):
        data = raw_answer(body, length=False)
        return [[each for at in range(0, len(data), 40) for each in (data[at:at + 40], 0.06)]]

    async def scenario():
        async with facing(dripping(FINE), dripping(FINE_SSE), REQUEST_TIMEOUT="0.2",
                          STREAM_TIMEOUT="0.2") as (_, server):
            return [shown(await ask(server.port, body=req(stream=streaming)))
                    for streaming in (False, True)]

    words = "504: The upstream did not answer within 0.2 s (REQUEST_TIMEOUT)"
    assert run(scenario()) == [words, "x"]


def test_a_host_that_drops_packets_is_given_up():
    async def scenario():
        with packet_hole() as url:
            async with bare(OPENAI_BASE_URL=url, REQUEST_TIMEOUT="0.2") as server:
                answers = [await ask(server.port, body=req(stream=streaming))
                           for streaming in (False, True, False)]
                ready = await ask(server.port, "GET", "/health/ready")
                assert (await ask(server.port, "GET", "/health"))[0] == 200
                return answers, ready

    answers, (status, _, body) = run(scenario())
    assert all(checked(answer) == "504 timeout_error" and "REQUEST_TIMEOUT" in shown(answer)
               for answer in answers)
    found = json.loads(body)
    assert status == 503 and found["status"] == "not_ready" and "127.0.0.1" in found["reason"]


def test_a_large_request_that_is_cancelled_while_its_connection_breaks_leaves_no_task():
    async def scenario():
        complaints = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: complaints.append(context))
        with socket.create_server(("127.0.0.1", 0)) as listener:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
            upstream = aiapiproxy.Upstream(urlsplit(url), aiapiproxy.TimeLimit(5, ""))
            connection = await upstream._open_in_time(loop.time() + 5)
            sending = asyncio.ensure_future(
                aiapiproxy.write_large(connection.stream, bytes(20_000_000)))
            await asyncio.sleep(0)
            connection.stream.abort()
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
            del sending
            gc.collect()
            left = [task for task in asyncio.all_tasks() if "write" in repr(task.get_coro())]
            return complaints, left

    assert run(scenario()) == ([], [])


def test_a_request_that_is_cancelled_just_when_its_connection_is_made_leaves_none(monkeypatch):
    async def scenario():
        opens = aiapiproxy.Upstream._open

        async def open_and_cancel(upstream):
            connection = await opens(upstream)
            opening.cancel()
            return connection

        monkeypatch.setattr(aiapiproxy.Upstream, "_open", open_and_cancel)
        async with ScriptedServer() as server:
            limit = aiapiproxy.TimeLimit(5, "")
            upstream = aiapiproxy.Upstream(urlsplit(server.url), limit)
            opening = asyncio.ensure_future(upstream.send("GET", "", b"", KEY, False, limit))
            with pytest.raises(asyncio.CancelledError):
                await opening
            await server.disconnected.wait()
            return list(upstream.attempts) + server.requests

    assert run(scenario()) == []


def test_lookups_that_are_stuck_leave_the_others_alone(monkeypatch):
    real, answered = socket.getaddrinfo, threading.Event()

    def lookup(host, *arguments, **options):
        if host == "stuck.example":
            answered.wait(10)
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        return real(host, *arguments, **options)

    async def scenario():
        async with bare(OPENAI_BASE_URL="http://stuck.example/v1", REQUEST_TIMEOUT="0.3") as server:
            answers = await asyncio.gather(*(ask(server.port, body=req()) for _ in range(18)))
        async with ScriptedServer(OK) as upstream:
            url = upstream.url.replace("127.0.0.1", "localhost")
            async with bare(OPENAI_BASE_URL=url) as server:
                return answers, await ask(server.port, body=req())

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    try:
        stuck, other = run(scenario())
    finally:
        answered.set()
    assert other[0] == 200 and [answer[0] for answer in stuck].count(504) == 16
    assert sum("502: Cannot resolve stuck.example" in shown(answer) for answer in stuck) == 2


def test_clients_that_leave_while_a_connection_is_made_say_nothing_about_the_upstream():
    async def scenario():
        async with RawUpstream([HANG]) as upstream:
            url = upstream.url.replace("http:", "https:")
            async with bare(OPENAI_BASE_URL=url) as server:
                for number in range(1, 5):
                    async with Wire(server.port) as wire:
                        await wire.send(POST(f"Content-Length: {len(HI)}", body=HI,
                                             path="/v1/messages"))
                        while upstream.opened < number:
                            await asyncio.sleep(0.01)
                    while server.app.in_flight:
                        await asyncio.sleep(0.01)
                return (await ask(server.port, "GET", "/health/ready"))[0]

    assert run(scenario()) == 200


@pytest.mark.parametrize("offset", [-0.005, 0.0, 0.005], ids=["before", "at", "after"])
@pytest.mark.parametrize("place", ["connect", "read"])
def test_a_cancellation_in_the_same_turn_as_the_timeout_wins(place, offset):
    async def scenario():
        loop = asyncio.get_running_loop()
        async with RawUpstream([HANG]) as upstream:
            url = upstream.url.replace("http:", "https:" if place == "connect" else "http:")
            tls = aiapiproxy.tls_context() if place == "connect" else None
            client = aiapiproxy.Upstream(urlsplit(url), aiapiproxy.TimeLimit(0.2, ""), tls=tls)
            sending = asyncio.ensure_future(client.send("POST", "", b"{}", "", False,
                                                        aiapiproxy.TimeLimit(0.2, "")))
            due = loop.time() + 0.2
            loop.call_at(due - 0.02, time.sleep, 0.06)   # both are due in the turn after this one
            loop.call_at(due + offset, sending.cancel)
            await asyncio.wait({sending})
            return sending.cancelled()

    assert run(scenario())


# ---- TLS and outgoing proxies
#
# The certificates are for these tests alone.  CERTIFICATE is for 127.0.0.1 and signed by itself.
# CERTIFICATES are good and bad ones for localhost and upstream.example, signed by TEST_CA, all with
# TEST_KEY.

CERTIFICATE = """\
-----BEGIN EC PRIVATE KEY-----
MHcCAQEEILzhwqlMF1VoqVxPf3YzAfdPNZYqaZv4oA79iAvM8pMfoAoGCCqGSM49
AwEHoUQDQgAEl/kpMs1O2GIHQu3RpMLq7uGrdJw7pvNBdzdfi1z4b+S+5DHr0v6u
qFd9XnZP5TNqBV4gMrETvMA7qPDXufRHmA==
-----END EC PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBUDCB+KADAgECAgEBMAoGCCqGSM49BAMCMA8xDTALBgNVBAMMBHRlc3QwIBcN
MjAwMTAxMDAwMDAwWhgPMjEyMDAxMDEwMDAwMDBaMA8xDTALBgNVBAMMBHRlc3Qw
WTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAASX+SkyzU7YYgdC7dGkwuru4at0nDum
80F3N1+LXPhv5L7kMevS/q6oV31edk/lM2oFXiAysRO8wDuo8Ne59EeYo0MwQTAP
BgNVHREECDAGhwR/AAABMA8GA1UdEwEB/wQFMAMBAf8wHQYDVR0OBBYEFBKLTXA6
fTS1nTTQiGok/ogkk8VgMAoGCCqGSM49BAMCA0cAMEQCIDOWK4RnC8UL550gd818
sCb30Qka2X+r5QeJI0tFqQUhAiA2wt+Qr/bFR7WJ9FtXXn3Ws7hVWm3vWIkB2sjg
e7H2sw==
-----END CERTIFICATE-----
"""


def test_a_certificate_must_be_trusted(tmp_path):
    pem = tmp_path / "certificate.pem"
    pem.write_text(CERTIFICATE)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(str(pem))

    async def scenario(**environ):
        async with ScriptedServer(OK, tls=context) as upstream:
            settings = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": upstream.url, **environ}
            async with running(aiapiproxy.load_settings(settings, server_port=0)) as server:
                return await ask(server.port, body=req())

    refused = run(scenario())
    assert said(refused).startswith("502 api_error: ") and refused[1]["x-should-retry"] == "false"
    assert run(scenario(SSL_CERT_FILE=str(pem)))[0] == 200


TEST_CA = """\
-----BEGIN CERTIFICATE-----
MIIBijCCATGgAwIBAgIUJP7iGM1v8hDA74mCe33gbsntLSMwCgYIKoZIzj0EAwIw
EjEQMA4GA1UEAwwHVGVzdCBDQTAgFw0yNjExMjUxNjM0MzdaGA8yMTI2MTEwMTE2
MzQzN1owEjEQMA4GA1UEAwwHVGVzdCBDQTBZMBMGByqGSM49AgEGCCqGSM49AwEH
A0IABAoYo2jU6QXssIP69qmyZvo/iaVmCr2KA9eDx+MuKBwx37gPYM4wgAcdJD2F
VWFSqpr3GarYE9z9GVFZIMV+F72jYzBhMB0GA1UdDgQWBBTY0q15CEErwPM46kuH
3te5b5bvvzAfBgNVHSMEGDAWgBTY0q15CEErwPM46kuH3te5b5bvvzAPBgNVHRMB
Af8EBTADAQH/MA4GA1UdDwEB/wQEAwICBDAKBggqhkjOPQQDAgNHADBEAiBDUmhH
bBgr2MkPxpURNYtAfs9U5Jpn6UzNwoMXPzfydQIgHWdArHi3xOx6FMZXEGXbAuO5
eYntzzAW0VbZ5ZB1uCQ=
-----END CERTIFICATE-----
"""
TEST_KEY = """\
-----BEGIN EC PRIVATE KEY-----
MHcCAQEEIARkPGFqRkDuxMrDyx/yEZTf7oXJIoX2Bcoy1VNADVJboAoGCCqGSM49
AwEHoUQDQgAEpz2B5ClXuBbiE0umwQliTc50It/pJNxuH2PxbnrWlYp685hZH7Pc
UgKptbd7WjEU/CEKWXcH1FG2s0GhS/9jhg==
-----END EC PRIVATE KEY-----
"""
CERTIFICATES = {
    "good": """\
-----BEGIN CERTIFICATE-----
MIIBgTCCASigAwIBAgIBATAKBggqhkjOPQQDAjASMRAwDgYDVQQDDAdUZXN0IENB
MCAXDTIwMDEwMTAwMDAwMFoYDzIxMjAwMTAxMDAwMDAwWjAPMQ0wCwYDVQQDDARn
b29kMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEpz2B5ClXuBbiE0umwQliTc50
It/pJNxuH2PxbnrWlYp685hZH7PcUgKptbd7WjEU/CEKWXcH1FG2s0GhS/9jhqNw
MG4wLAYDVR0RBCUwI4IJbG9jYWxob3N0ghB1cHN0cmVhbS5leGFtcGxlhwR/AAAB
MB0GA1UdDgQWBBRmANnvlq/cmmeH7AmHxDiF97Vf8TAfBgNVHSMEGDAWgBTY0q15
CEErwPM46kuH3te5b5bvvzAKBggqhkjOPQQDAgNHADBEAiAwvXuVGg6B2NkRLdXa
LhV40E2lcMq1p5UczRQZELYSngIgLrc43DmFChisj+NlU6TfUhkV60iZl1f5YWOn
1fI606A=
-----END CERTIFICATE-----
""",
    "other": """\
-----BEGIN CERTIFICATE-----
MIIBbzCCARWgAwIBAgIBAjAKBggqhkjOPQQDAjASMRAwDgYDVQQDDAdUZXN0IENB
MCAXDTIwMDEwMTAwMDAwMFoYDzIxMjAwMTAxMDAwMDAwWjAQMQ4wDAYDVQQDDAVv
dGhlcjBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABKc9geQpV7gW4hNLpsEJYk3O
dCLf6STcbh9j8W561pWKevOYWR+z3FICqbW3e1oxFPwhCll3B9RRtrNBoUv/Y4aj
XDBaMBgGA1UdEQQRMA+CDW90aGVyLmV4YW1wbGUwHQYDVR0OBBYEFGYA2e+Wr9ya
Z4fsCYfEOIX3tV/xMB8GA1UdIwQYMBaAFNjSrXkIQSvA8zjqS4fe17lvlu+/MAoG
CCqGSM49BAMCA0gAMEUCIC6fO8sUh1PdiRdIbgXr7QqfCFc+5RWs+sP0Lia7p5PJ
AiEA5tQmWuU3yeAJYrlC7My6AuyhbhMU8NjFA/KAB7iUiL8=
-----END CERTIFICATE-----
""",
    "old": """\
-----BEGIN CERTIFICATE-----
MIIBbjCCAROgAwIBAgIBAzAKBggqhkjOPQQDAjASMRAwDgYDVQQDDAdUZXN0IENB
MB4XDTIwMDEwMTAwMDAwMFoXDTIxMDEwMTAwMDAwMFowDjEMMAoGA1UEAwwDb2xk
MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEpz2B5ClXuBbiE0umwQliTc50It/p
JNxuH2PxbnrWlYp685hZH7PcUgKptbd7WjEU/CEKWXcH1FG2s0GhS/9jhqNeMFww
GgYDVR0RBBMwEYIJbG9jYWxob3N0hwR/AAABMB0GA1UdDgQWBBRmANnvlq/cmmeH
7AmHxDiF97Vf8TAfBgNVHSMEGDAWgBTY0q15CEErwPM46kuH3te5b5bvvzAKBggq
hkjOPQQDAgNJADBGAiEAju+dvrw6Gs5Qb/ZYAfXKXyyy6H6fP2EPmacneVNHiZoC
IQDCFKiqM+ImkJWT23W4hvas2H9AnVSnVhOGb2W5MSPcHA==
-----END CERTIFICATE-----
""",
    "self": """\
-----BEGIN CERTIFICATE-----
MIIBkDCCATegAwIBAgIUK83b3QXsTF3AUCl94t3Niaj5+PQwCgYIKoZIzj0EAwIw
DzENMAsGA1UEAwwEc2VsZjAgFw0yNjExMjUxNjM0MzdaGA8yMTI2MTEwMTE2MzQz
N1owDzENMAsGA1UEAwwEc2VsZjBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABKc9
geQpV7gW4hNLpsEJYk3OdCLf6STcbh9j8W561pWKevOYWR+z3FICqbW3e1oxFPwh
Cll3B9RRtrNBoUv/Y4ajbzBtMB0GA1UdDgQWBBRmANnvlq/cmmeH7AmHxDiF97Vf
8TAfBgNVHSMEGDAWgBRmANnvlq/cmmeH7AmHxDiF97Vf8TAPBgNVHRMBAf8EBTAD
AQH/MBoGA1UdEQQTMBGCCWxvY2FsaG9zdIcEfwAAATAKBggqhkjOPQQDAgNHADBE
AiBF9Bu1r04jyFevRfq9fvof3wwHiHTUotqhCVcbBiFqJwIgSd7/jBlOqJZksoEm
VWkeO9Q12j1fPycsQLN+dqzp0cQ=
-----END CERTIFICATE-----
""",
}


def tls_server(folder, name):
    for file, text in (("key.pem", TEST_KEY), ("ca.pem", TEST_CA),
                       ("cert.pem", CERTIFICATES[name])):
        (folder / file).write_text(text)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(str(folder / "cert.pem"), str(folder / "key.pem"))
    context.set_alpn_protocols(["h2", "http/1.1"])
    return context


@table([
    ("a good certificate", "good", "localhost", "x"), ("of an address", "good", "127.0.0.1", "x"),
    ("of another name", "other", "localhost",
     "502: The certificate of localhost is not accepted: Hostname mismatch"),
    ("of another address", "other", "127.0.0.1",
     "502: The certificate of 127.0.0.1 is not accepted: IP address mismatch"),
    ("out of date", "old", "localhost",
     "502: The certificate of localhost is not accepted: certificate has expired"),
    ("signed by itself", "self", "localhost",
     "502: The certificate of localhost is not accepted: self"),
    ("old TLS", "TLS 1.1", "localhost", "502: .*(TLS|closed)"),
    ("no TLS", "plain", "localhost", "502: TLS with localhost:"),
    ("the end in the handshake", "cut", "localhost", "502: .*(TLS|closed)"),
    ("no answer in the handshake", "silent", "localhost",
     "504: The upstream did not answer within 0.5 s"),
], "certificate, host, want")
def test_TLS(certificate, host, want, tmp_path):
    context = tls_server(tmp_path, certificate if certificate in CERTIFICATES else "good")
    if certificate == "TLS 1.1":
        context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            context.maximum_version = ssl.TLSVersion.TLSv1_1
    chosen = []
    context.set_servername_callback(lambda connection, name, _: chosen.append(name))

    class Plain(ScriptedServer):
        """A server without TLS, which takes any bytes for a request."""

        async def request(self, reader):
            return await reader.read(65536)

    async def scenario():
        odd = {"plain": [b"HTTP/1.1 400 You speak TLS\r\n\r\n", CUT], "cut": [CUT],
               "silent": [HANG]}.get(certificate)
        async with Plain(odd) if odd else RawUpstream([KEPT] * 2, tls=context) as upstream:
            async with bare(OPENAI_BASE_URL=f"https://{host}:{upstream.port}/v1",
                            SSL_CERT_FILE=str(tmp_path / "ca.pem"), REQUEST_TIMEOUT="0.5") as proxy:
                answers = [await ask(proxy.port, body=req()) for _ in range(2)]
            assert upstream.opened == 1 or want != "x"
        return answers

    for answer in run(scenario()):
        assert re.match(want, shown(answer)), shown(answer)
        assert answer[1].get("x-should-retry") == ("false" if "certificate" in want else None)
    if want == "x" and host == "localhost":
        assert chosen == ["localhost"]


class Tunnel(ScriptedServer):
    """An outgoing proxy that connects all to one port."""

    def __init__(self, target, answer=b"HTTP/1.1 200 Connected\r\n\r\n"):
        super().__init__([answer, CUT])
        self.target = target

    @property
    def address(self):
        return f"127.0.0.1:{self.port}"

    async def play(self, answer, reader, writer):
        await super().play(answer, reader, writer)
        if b" 200 " in answer[0]:
            there, here = await asyncio.open_connection("127.0.0.1", self.target)
            try:
                await asyncio.gather(self.pump(reader, here), self.pump(there, writer))
            finally:
                here.close()
        return False

    async def pump(self, reader, writer):
        while True:
            data = await reader.read(65536)
            if not data:
                break
            await self.write(data, writer)
        writer.close()


def test_https_is_sent_through_a_tunnel_with_only_the_proxys_credentials(tmp_path):
    async def scenario():
        async with RawUpstream([KEPT] * 2, tls=tls_server(tmp_path, "good")) as upstream:
            async with Tunnel(upstream.port) as tunnel:
                async with bare(OPENAI_BASE_URL="https://upstream.example/v1",
                                SSL_CERT_FILE=str(tmp_path / "ca.pem"),
                                HTTPS_PROXY=f"http://user:p%40ss@{tunnel.address}") as server:
                    got = [shown(await ask(server.port, body=req())) for _ in range(2)]
            return got, tunnel.heads, upstream.heads

    got, tunnelled, heads = run(scenario())
    assert got == ["x", "x"] and len(tunnelled) == 1 and len(heads) == 2
    target = "upstream.example:443"
    assert tunnelled[0].startswith(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n")
    assert basic("p@ss", "user") in tunnelled[0] and KEY not in tunnelled[0]
    assert "proxy-authorization" not in heads[0].lower() and KEY in heads[0]


@table([
    ("that refuses", b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n",
     "407"),
    ("that breaks HTTP", b"hello\r\n\r\n", "upstream.example"),
    ("that closes", b"", "upstream.example"),
    ("that says more than its head", b"HTTP/1.1 200 X\r\n\r\nHTTP/1.1 200 X\r\n\r\n{}",
     "upstream.example"),
], "answer, word")
def test_a_tunnel(answer, word, tmp_path):
    async def scenario():
        async with RawUpstream([KEPT], tls=tls_server(tmp_path, "good")) as upstream:
            async with Tunnel(upstream.port, answer) as tunnel:
                async with bare(OPENAI_BASE_URL="https://upstream.example/v1",
                                https_proxy=f"http://user:password1@{tunnel.address}") as server:
                    return shown(await ask(server.port, body=req())), upstream.heads

    message, heads = run(scenario())
    assert message.startswith("502: ") and word in message and "password1" not in message
    assert heads == []


def test_the_certificate_is_asked_for_in_a_tunnel_too(tmp_path):
    async def scenario():
        async with RawUpstream([KEPT], tls=tls_server(tmp_path, "other")) as upstream:
            async with Tunnel(upstream.port) as tunnel:
                settings = {"OPENAI_BASE_URL": "https://upstream.example/v1",
                            "HTTPS_PROXY": tunnel.address,
                            "SSL_CERT_FILE": str(tmp_path / "ca.pem")}
                async with bare(**settings) as server:
                    return shown(await ask(server.port, body=req()))

    words = "502: The certificate of upstream.example is not accepted: Hostname"
    assert run(scenario()).startswith(words)


@table([
    ("http takes the whole address", "http://upstream.example/v1", {},
     "POST http://upstream.example/v1/"),
    ("with its query", "http://upstream.example/v1?a=b", {},
     "POST http://upstream.example/v1/chat/completions?a=b "),
    ("with its port", "http://upstream.example:8000", {},
     "POST http://upstream.example:8000/chat/completions "),
    ("but not for what is exempt", "http://upstream.example/v1",
     {"NO_PROXY": "a.b, .example"}, None),
    ("nor for what is exempt by name", "http://upstream.example/v1",
     {"no_proxy": "upstream.example"}, None),
    ("nor when all is exempt", "http://upstream.example/v1", {"NO_PROXY": "*"}, None),
    ("another name does not exempt", "http://upstream.example/v1", {"NO_PROXY": "stream.example"},
     "POST http://u"),
], "url, more, want")
def test_an_outgoing_proxy_for_http(url, more, want):
    async def scenario():
        async with RawUpstream([KEPT]) as proxy:
            at = f"http://user:password1@127.0.0.1:{proxy.port}"
            async with bare(OPENAI_BASE_URL=url, http_proxy=at, REQUEST_TIMEOUT="1",
                            **more) as server:
                answer = await ask(server.port, body=req())
            return shown(answer), proxy.heads

    answer, heads = run(scenario())
    if want is None:
        assert heads == [] and answer.startswith("502: Cannot resolve upstream.example")
    else:
        assert answer == "x" and heads[0].startswith(want)
        assert f"Proxy-{basic('password1', 'user')}" in heads[0]


def test_this_machine_is_never_behind_an_outgoing_proxy():
    async def scenario():
        async with facing([KEPT], HTTP_PROXY="http://127.0.0.1:1",
                          HTTPS_PROXY="http://127.0.0.1:1") as (_, server):
            return shown(await ask(server.port, body=req()))

    assert run(scenario()) == "x"


# ============================================================================
# 20. SERVER
# ============================================================================

def test_pipelined_requests_are_answered_in_order():
    async def scenario():
        async with proxied(OK) as (_, server), Wire(server.port) as wire:
            message = POST(f"Content-Length: {len(HI)}", body=HI, path="/v1/messages")
            await wire.send(GET() + message + chunks(CHUNKED_HI) + GET("/x") + GET("/"))
            return [checked(await wire.answer()) for _ in range(5)]

    assert run(scenario()) == ["200", "200", "200", "404 not_found_error", "200"]


def test_a_keep_alive_connection_carries_messages_and_streams():
    async def scenario():
        async with proxied(OK, stream(SIMPLE), OK, stream(SIMPLE)) as (upstream, server):
            async with Wire(server.port) as wire:
                for streaming in (False, True, False, True):
                    body = json.dumps(req(stream=streaming)).encode()
                    await wire.send(POST(f"Content-Length: {len(body)}", body=body,
                                         path="/v1/messages"))
                    status, headers, _ = await wire.answer()
                    assert status == 200 and headers.get("connection") != "close"
            return upstream.opened

    assert run(scenario()) == 1


# ---- Limits, timeouts and clients that stop half way

def test_a_body_over_the_limit_is_refused_before_it_has_arrived():
    async def scenario():
        async with bare(MAX_REQUEST_SIZE="1000") as server:
            async with Wire(server.port) as wire:
                await wire.send(chunks(*[b"64\r\n" + b" " * 100 + b"\r\n"] * 11, end=b""))
                assert checked(await wire.answer()) == "413 request_too_large"
                await wire.end()
            async with Wire(server.port) as wire:
                await wire.send(POST("Content-Length: 1001"))
                assert checked(await wire.answer()) == "413 request_too_large"
                await wire.end()
            async with Wire(server.port) as wire:
                await wire.send(POST("Content-Length: 1000", body=HI + b" " * (1000 - len(HI))))
                assert checked(await wire.answer()) == "200"

    run(scenario())


def test_a_413_reaches_a_client_that_first_sends_all():
    async def scenario():
        async with bare(MAX_REQUEST_SIZE="1000") as server:
            async with Wire(server.port) as wire:
                await wire.send(POST("Content-Length: 5000000", body=b" " * 5000000))
                assert checked(await wire.answer()) == "413 request_too_large"

    run(scenario())


@table([("a wrong key", ["x-api-key: wrong"]), ("none", []),
        ("with Expect", ["Expect: 100-continue"])], "fields")
def test_the_key_is_asked_for_before_the_body(fields):
    async def scenario():
        async with bare(PROXY_API_KEY="proxy-key-1") as server, Wire(server.port) as wire:
            await wire.send(POST("Content-Length: 20000000", *fields))
            return checked(await wire.answer())

    assert run(scenario()) == "401 authentication_error"


@table([
    ("100 comes before the body", POST("Expect: 100-continue", f"Content-Length: {len(HI)}"),
     HI, "100 200"),
    ("in any letters", POST("Expect: 100-Continue", f"Content-Length: {len(HI)}"), HI, "100 200"),
    ("with a chunked body", POST("Expect: 100-continue", "Transfer-Encoding: chunked"),
     CHUNKED_HI + b"0\r\n\r\n", "100 200"),
    ("not when the body is there",
     POST("Expect: 100-continue", f"Content-Length: {len(HI)}", body=HI), b"", "200"),
    ("not for no body", POST("Expect: 100-continue", "Content-Length: 0"), b"", BAD),
    ("not for a body too large", POST("Expect: 100-continue", "Content-Length: 99999999"), b"",
     "413 request_too_large"),
    ("not for a wrong path", POST("Expect: 100-continue", "Content-Length: 5", path="/x"), b"",
     "404 not_found_error"),
    ("not in HTTP/1.0", HTTP("POST /v1/messages/count_tokens HTTP/1.0", "Expect: 100-continue",
                             f"Content-Length: {len(HI)}"), HI, "200"),
], "head, body, want")
def test_expect(head, body, want):
    async def scenario():
        async with bare() as server, Wire(server.port) as wire:
            await wire.send(head)
            if want[:3] == "100":
                assert await wire.answer() == (100, {}, b"")
            await wire.send(body)
            return want[:4] * (want[:3] == "100") + checked(await wire.answer())

    assert run(scenario()) == want


@pytest.mark.parametrize("path", [
    "/health", "/health/live", "/health/ready", "/metrics", "/v1/models", "/",
    "/v1/models/claude-opus-5-5", "/x", "/v1/messages", "/status"])
def test_HEAD_is_GET_without_a_body(path):
    async def scenario():
        async with bare() as server, Wire(server.port) as wire:
            await wire.send(GET(path))
            get = await wire.answer()
            await wire.send(HTTP(f"HEAD {path} HTTP/1.1"))
            head = await wire.answer(has_body=False)
            await wire.send(GET())
            assert (await wire.answer())[0] == 200
            return get, head

    get, head = run(scenario())
    assert get[0] == head[0] and get[1].keys() == head[1].keys()
    assert int(head[1]["content-length"]) > 0
    for name in ("content-type", "allow"):
        assert get[1].get(name) == head[1].get(name)


@table([
    ("a head that stops", b"GET /health HTTP/1.1\r\nHost:", "408 timeout_error"),
    ("a single byte", b"G", "408 timeout_error"),
    ("a body that never begins", POST("Content-Length: 5"), "408 timeout_error"),
    ("a body that stops", POST("Content-Length: 50", body=b"{"), "408 timeout_error"),
    ("a chunked body that stops", chunks(b"50\r\n{", end=b""), "408 timeout_error"),
    ("a chunk's size that stops", chunks(b"5", end=b""), "408 timeout_error"),
])
def test_a_client_that_stops(given, want, monkeypatch):
    monkeypatch.setattr(aiapiproxy, "HEAD_TIME", 0.1)
    monkeypatch.setattr(aiapiproxy, "BODY_READ_TIME", 0.1)

    async def scenario():
        async with bare() as server, Wire(server.port) as wire:
            await wire.send(given)
            answer = await wire.answer()
            await wire.end()
            assert answer[1]["connection"] == "close"
            return checked(answer)

    assert run(scenario()) == want


def test_a_slow_head_is_ended_and_a_slow_body_is_not(monkeypatch):
    monkeypatch.setattr(aiapiproxy, "HEAD_TIME", 0.2)
    monkeypatch.setattr(aiapiproxy, "BODY_READ_TIME", 0.2)

    async def drip(wire, data):
        for byte in data:
            await wire.send(bytes([byte]))
            await asyncio.sleep(0.03)

    async def scenario():
        async with bare() as server:
            async with Wire(server.port) as wire:
                dripping = asyncio.ensure_future(drip(wire, GET()))
                assert checked(await wire.answer()) == "408 timeout_error"
                dripping.cancel()
            async with Wire(server.port) as wire:
                await wire.send(POST(f"Content-Length: {len(HI)}"))
                await drip(wire, HI[:12])
                await wire.send(HI[12:])
                assert checked(await wire.answer()) == "200"

    run(scenario())


def test_an_idle_connection_is_closed_without_an_answer(monkeypatch):
    monkeypatch.setattr(aiapiproxy, "IDLE_KEEP_ALIVE", 0.1)

    async def scenario():
        async with bare() as server:
            for start in (b"", GET(), b"\r\n"):
                async with Wire(server.port) as wire:
                    await wire.send(start)
                    if len(start) > 2:
                        await wire.answer()
                    await wire.end()

    run(scenario())


@table([
    ("HTTP/1.0 closes", GET(version="HTTP/1.0"), "close"),
    ("HTTP/1.0 without a Host is served", GET(version="HTTP/1.0", host=""), "close"),
    ("HTTP/1.0 is kept when asked", GET("/health", "Connection: keep-alive", version="HTTP/1.0"),
     "keep-alive"),
    ("HTTP/1.1 closes when asked", GET("/health", "Connection: close"), "close"),
    ("HTTP/1.1 is kept", GET("/health"), None),
])
def test_whether_a_connection_is_kept_after_an_answer(given, want):
    async def scenario():
        async with bare() as server, Wire(server.port) as wire:
            await wire.send(given)
            status, headers, _ = await wire.answer()
            assert status == 200
            if want == "close":
                await wire.end()
            else:
                await wire.send(GET())
                assert (await wire.answer())[0] == 200
            return headers.get("connection")

    assert run(scenario()) == want


@pytest.mark.parametrize("asked_for", [[], ["Connection: keep-alive"]], ids=["plain", "keep-alive"])
def test_a_stream_for_HTTP_1_0_ends_with_its_connection(asked_for):
    async def scenario():
        async with proxied(stream(SIMPLE)) as (_, server), Wire(server.port) as wire:
            body = json.dumps(req(stream=True)).encode()
            await wire.send(HTTP("POST /v1/messages HTTP/1.0", f"Content-Length: {len(body)}",
                                 *asked_for) + body)
            status, headers, body = await wire.answer()
            assert headers["connection"] == "close" and "transfer-encoding" not in headers
            await wire.end()
            return status, printed(body)

    assert run(scenario()) == (200, HELLO)


@pytest.mark.parametrize("parts", [[HANG], [ctext("x"), HANG]],
                         ids=["before the answer", "in the stream"])
@pytest.mark.parametrize("way", ["half-closed", "closed", "reset"])
def test_a_disconnect_during_the_answer_ends_the_upstreams_work(way, parts):
    async def scenario():
        async with proxied(stream(*parts)) as (upstream, server), Wire(server.port) as wire:
            body = json.dumps(req(stream=True)).encode()
            await wire.send(POST(f"Content-Length: {len(body)}", body=body, path="/v1/messages"))
            await upstream.asked.wait()
            if len(parts) > 1:
                while b"text_delta" not in wire.data:
                    await wire.more()
            if way == "half-closed":
                wire.writer.write_eof()
            elif way == "closed":
                wire.writer.close()
            else:
                wire.writer.transport.abort()
            await asyncio.wait_for(upstream.disconnected.wait(), 1)
            async with Wire(server.port) as wire:
                await wire.send(GET())
                assert json.loads((await wire.answer())[2])["in_flight"] == 0

    run(scenario())


@table([("in a head", b"GET /hea"), ("in a body", POST("Content-Length: 10", body=b"{")),
        ("at once", b""), ("in a chunk", chunks(b"5\r\na", end=b""))], "given")
def test_a_client_that_disconnects_before_its_request_is_complete(given, capfd):
    async def scenario():
        async with bare() as server:
            for ending in ("close", "write_eof", "abort"):
                async with Wire(server.port) as wire:
                    await wire.send(given)
                    if ending == "abort":
                        wire.writer.transport.abort()
                        continue
                    getattr(wire.writer, ending)()
                    with contextlib.suppress(ConnectionError):
                        assert await wire.reader.read(-1) == b""
            assert (await ask(server.port, "GET", "/health"))[0] == 200

    run(scenario())
    assert capfd.readouterr().err == ""


# ---- Load

def test_a_hundred_streams_of_which_half_are_disconnected_leave_nothing_open():
    async def scenario():
        gate = asyncio.Event()
        async with proxied(stream(ctext("x"), gate, cend("stop"), DONE)) as (upstream, server):
            await ask(server.port, "GET", "/health")
            before, tasks = descriptors(), len(asyncio.all_tasks())
            async with contextlib.AsyncExitStack() as stack:
                clients = [Asking(server.port, "POST", "/v1/messages", req(stream=True))
                           for _ in range(100)]
                for client in clients:
                    await stack.enter_async_context(client)
                await asyncio.gather(*[client.until(b"text_delta") for client in clients])
                assert server.app.in_flight == 100
                for client in clients[::2]:
                    client.writer.transport.abort()
                while server.app.in_flight > 50:
                    await asyncio.sleep(0.005)
                gate.set()
                for client in clients[1::2]:
                    assert said(await client.answer()) == ONE_X
            while server.server.tasks or server.app.tasks:
                await asyncio.sleep(0.005)
            assert server.app.in_flight == 0
            assert not server.server.exchanges and not server.app.tasks
            server.app.upstream.close()
            while descriptors() > before or len(asyncio.all_tasks()) > tasks:
                await asyncio.sleep(0.005)

    within(10, scenario())


def test_one_request_more_than_MAX_CONCURRENT_REQUESTS_is_refused_at_once():
    async def scenario():
        gate = asyncio.Event()
        script = stream(ctext("x"), gate, cend("stop"), DONE)
        async with proxied(script, MAX_CONCURRENT_REQUESTS="2") as (_, server):
            async with contextlib.AsyncExitStack() as stack:
                for _ in range(5):  # incomplete heads don't count
                    wire = await stack.enter_async_context(Wire(server.port))
                    await wire.send(b"POST /v1/messages HT")
                clients = [Asking(server.port, "POST", "/v1/messages", req(stream=True))
                           for _ in range(2)]
                for client in clients:
                    await stack.enter_async_context(client)
                    await client.until(b"text_delta")
                refused = await ask(server.port, body=req())
                assert (await ask(server.port, "GET", "/health"))[0] == 200
                assert (await ask(server.port, "GET", "/metrics"))[0] == 200
                gate.set()
                for client in clients:
                    await client.answer()
                assert (await ask(server.port, body=req(stream=True)))[0] == 200
                return refused

    refused = run(scenario())
    assert checked(refused) == "529 overloaded_error" and refused[1]["retry-after"] == "1"


# ============================================================================
# 21. SETTINGS
# ============================================================================

DOTENV = [  # text, variables, lines that are skipped
    ("plain", "A=b", {"A": "b"}, []), ("CRLF", "A=b\r\nC=d\r\n", {"A": "b", "C": "d"}, []),
    ("a BOM", "\ufeffA=b", {"A": "b"}, []),
    ("comments and empty lines", "# a\n\n  #b\nA=b", {"A": "b"}, []),
    ("export", "export A=b\nexport\tC=d", {"A": "b", "C": "d"}, []),
    ("blanks around", "  A = b  ", {"A": "b"}, []), ("blanks inside", "A=b c", {"A": "b c"}, []),
    ("single quotes", "A='b # c'", {"A": "b # c"}, []),
    ("double quotes", 'A="b # c"', {"A": "b # c"}, []),
    ("blanks in quotes", "A=' b '", {"A": " b "}, []),
    ("the other quotes inside", "A='\"'", {"A": '"'}, []),
    ("a comment behind", "A=b # c", {"A": "b"}, []),
    ("no comment without a blank", "A=b#c", {"A": "b#c"}, []),
    ("a comment behind quotes", "A='b' # c", {"A": "b"}, []),
    ("an equals sign inside", "A=b=c", {"A": "b=c"}, []),
    ("empty", "A=", {"A": ""}, []), ("empty quotes", "A=''", {"A": ""}, []),
    ("only a comment", "A= # c", {"A": ""}, []),
    ("the last one counts", "A=b\nA=c", {"A": "c"}, []),
    ("nothing is expanded or run", "A=$HOME`ls`$(ls)\\n", {"A": "$HOME`ls`$(ls)\\n"}, []),
    ("an open quote", "A='b\nC=d", {"C": "d"}, [1]),
    ("no equals sign", "A\nC=d\nexport B", {"C": "d"}, [1, 3]),
    ("a name that is none", "1A=b\nA-B=c\n=d\nC=d", {"C": "d"}, [1, 2, 3]),
    ("words behind quotes", "A='b'c\nC=d", {"C": "d"}, [1]),
]


@table(DOTENV, "text, values, skipped")
def test_an_env_file(text, values, skipped):
    assert aiapiproxy.dotenv_values(text) == (values, skipped)


@table([("only its owner", 0o600, 0), ("its group", 0o640, 1), ("everybody", 0o644, 1),
        ("others alone", 0o604, 1)], "mode, count")
def test_an_env_file_that_others_can_read_is_warned_of(mode, count, tmp_path):
    path = tmp_path / ".env"
    path.write_text("OPENAI_API_KEY=sk-1\n")
    path.chmod(mode)
    found = aiapiproxy.read_variables(aiapiproxy.Options(env_file=str(path))).warnings
    assert [facts["message"].count("chmod 600") for _, facts in found] == [1] * count


BAD_VALUES = {
    "SERVER_HOST": "a/b", "SERVER_PORT": "0", "OPENAI_API_KEY": "a b", "OPENAI_BASE_URL": "ftp://a",
    "CLAUDE_HAIKU_MODEL": "a\x01", "CLAUDE_SONNET_MODEL": "a\x01", "CLAUDE_OPUS_MODEL": "a\x01",
    "REQUEST_TIMEOUT": "0", "STREAM_TIMEOUT": "x", "LOG_LEVEL": "loud", "RUST_LOG": "loud",
    "LOG_FORMAT": "xml", "API_KEY_HEADER": "a b", "PROXY_API_KEY": "a b", "MAX_REQUEST_SIZE": "-1",
    "MAX_CONCURRENT_REQUESTS": "0", "WORKERS": "0", "TOKIO_WORKER_THREADS": "1.5",
    "HTTPS_PROXY": "socks5://a", "HTTP_PROXY": "https://a", "https_proxy": "http://a:b",
    "http_proxy": "http://", "UPSTREAM_HEADERS": "a", "RUST_BACKTRACE": "2",
    "SSL_CERT_FILE": "a\x01", "SSL_CERT_DIR": "a\x01", "PID_FILE": "a\x01",
}


MORE_BAD_VALUES = {
    "SERVER_PORT": ["65536", "80a", "-1", "8e3", "\u0661"],
    "REQUEST_TIMEOUT": ["nan", "inf", "-1", "1e9", "1s"],
    "OPENAI_BASE_URL": ["a", "http://", "http://a:x", "http://a:99999", "http://a b",
                        "http://u:p@a", "http://[::1"],
    "UPSTREAM_HEADERS": ["a b: c", "Host: a", "a: \xe4", "Content-Length: 1", "a:b\rc: d"],
    "PROXY_API_KEY": [",", "your-openai-api-key-here", "\udce8"],
    "CLAUDE_OPUS_MODEL": ["mod\udce8le"],
}


@table([(f"{name}={text!r}", name, text) for name, text in [
    *BAD_VALUES.items(),
    *((name, text) for name, texts in MORE_BAD_VALUES.items() for text in texts)]], "name, text")
def test_a_value_that_cannot_be_used_is_named(name, text):
    with pytest.raises(aiapiproxy.ConfigError) as caught:
        aiapiproxy.load_settings({name: text})
    (problem,) = caught.value.problems
    assert problem.startswith(name + " ") and "\n" not in problem
    assert repr(text) not in problem or name not in (
        "OPENAI_API_KEY", "PROXY_API_KEY", "HTTPS_PROXY", "HTTP_PROXY", "OPENAI_BASE_URL")


def test_all_bad_values_are_told_at_once_and_an_empty_one_counts_as_not_set():
    with pytest.raises(aiapiproxy.ConfigError) as caught:
        aiapiproxy.load_settings({"SERVER_PORT": "x", "WORKERS": "x", "LOG_LEVEL": "",
                                  "STREAM_TIMEOUT": " "})
    assert len(caught.value.problems) == 2


def test_the_environment_wins_over_the_file_and_the_file_over_the_default():
    got = aiapiproxy.load_settings({"SERVER_PORT": "1", "WORKERS": ""},
                                   {"SERVER_PORT": "2", "WORKERS": "3"})
    assert (got.server_port, got.workers, got.request_timeout) == (1, 3, 30)


@table([
    ("a slash", "https://a.b/v1/", "https://a.b/v1"),
    ("the whole path", "https://a.b/v1/chat/completions", "https://a.b/v1"),
    ("both", "http://a/chat/completions/", "http://a"),
    ("a query", "https://a/x?api-version=1", "https://a/x?api-version=1"),
    ("a port", "http://[::1]:11434/v1", "http://[::1]:11434/v1"),
])
def test_base_urls(given, want):
    assert aiapiproxy.load_settings({"OPENAI_BASE_URL": given}).openai_base_url.geturl() == want


@table([("a level", "debug", 10), ("trace is debug", "TRACE", 10), ("warning", "warning", 30),
        ("the bare level of a list", "hyper=warn,error,tower=info", 40),
        ("a list without one", "hyper=warn", 20)])
def test_log_levels(given, want):
    assert aiapiproxy.load_settings({"RUST_LOG": given}).log_level == want


CREDENTIALS = [  # settings, (variable, text) of each credential
    ("a key", {"OPENAI_API_KEY": KEY}, [("OPENAI_API_KEY", KEY)]),
    ("none", {}, []),
    ("env.example's key is none", {"OPENAI_API_KEY": "your-openai-api-key-here"}, []),
    ("a header", {"UPSTREAM_HEADERS": "api-key: abc"}, [("UPSTREAM_HEADERS", "abc")]),
    ("headers that hold none", {"UPSTREAM_HEADERS": (
        "HTTP-Referer: a; Referer: a; X-Title: a; X-OpenRouter-Title: a; User-Agent: a; "
        "OpenAI-Organization: a; openai-project: a; OpenAI-Beta: a; anthropic-version: a; "
        "anthropic-beta: a")}, []),
    ("a header without a value", {"UPSTREAM_HEADERS": "api-key:"}, []),
    ("parameters of the query, but for the version",
     {"OPENAI_BASE_URL": "https://h/v1?api-version=1&key=abc&Sig=d%2Fe"},
     [("OPENAI_BASE_URL", "abc"), ("OPENAI_BASE_URL", "d%2Fe")]),
    ("a parameter without a name", {"OPENAI_BASE_URL": "https://h/v1?abc"},
     [("OPENAI_BASE_URL", "abc")]),
    ("an outgoing proxy's password is none", {"HTTPS_PROXY": "http://u:abc@h:1"}, []),
]


@table(CREDENTIALS)
def test_the_credentials_of_an_upstream(given, want):
    settings = aiapiproxy.load_settings(given)
    assert settings.credentials == want
    assert settings.lends is bool(want) and settings.passes_keys_on is not bool(want)


def test_each_form_of_a_credential_is_redacted_and_no_other_header():
    settings = aiapiproxy.load_settings({
        "OPENAI_BASE_URL": "https://h/v1?api-version=12345678&key=query%2Fkey+1",
        "UPSTREAM_HEADERS": "X-Title: my-own-title; Authorization: Basic dXNlcjpw",
        "HTTPS_PROXY": "http://u:pass%2Fword@h:1", "PROXY_API_KEY": "team-key-1, team-key-10"})
    assert set(settings.secrets()) == {
        "query%2Fkey+1", "query/key+1", "query/key 1", "Basic dXNlcjpw", "dXNlcjpw",
        "pass%2Fword", "pass/word", "team-key-1", "team-key-10"}
    assert settings.secrets() == sorted(settings.secrets(), key=len, reverse=True)


FULL = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": "https://h/v1", "PROXY_API_KEY": TEAM,
        "UPSTREAM_HEADERS": "api-key: abc", "ALLOWED_ORIGINS": "https://a.example"}
QUERY = {"OPENAI_BASE_URL": "https://h/v1?key=abc"}
RELOADS = [  # variables in force, variables found, the file, reason why the old settings stay
    *((f"without {name}", FULL, without(FULL, name), ".env",
       f"{name} is no longer set in .env; restart to serve without it") for name in FULL),
    ("without two", FULL, without(FULL, "PROXY_API_KEY", "OPENAI_BASE_URL"), ".env",
     "OPENAI_BASE_URL and PROXY_API_KEY are no longer set in .env; restart to serve without them"),
    ("env.example's key counts as none", FULL,
     {**FULL, "OPENAI_API_KEY": "your-openai-api-key-here"}, ".env",
     "OPENAI_API_KEY is no longer set in .env; restart to serve without it"),
    ("a query that holds no key any more", QUERY, {"OPENAI_BASE_URL": "https://h/v1"}, ".env",
     "The key in OPENAI_BASE_URL is no longer set in .env; restart to serve without it"),
    ("a header that holds no key any more", {"UPSTREAM_HEADERS": "api-key: abc"},
     {"UPSTREAM_HEADERS": "X-Title: abc"}, ".env",
     "The key in UPSTREAM_HEADERS is no longer set in .env; restart to serve without it"),
    ("a key in another place", QUERY, {**QUERY, "OPENAI_BASE_URL": "https://h", **{
        "OPENAI_API_KEY": KEY}}, ".env", ""),
    ("other values", FULL, {**FULL, "OPENAI_API_KEY": "other", "OPENAI_BASE_URL": "https://i",
                            "PROXY_API_KEY": "other-key", "ALLOWED_ORIGINS": "*"}, ".env", ""),
    ("without what loosens nothing", {**FULL, "CLAUDE_OPUS_MODEL": "a", "ALLOWED_HOSTS": "b"},
     FULL, ".env", ""),
    ("another file, because the first is gone", FULL, FULL, "/etc/.env", ".env is missing"),
    ("no file any more", FULL, FULL, "", ".env is missing"),
    ("the folder's own file is there now", FULL, FULL, "./.env", ""),
    ("an address that the key would be open to", {"OPENAI_API_KEY": "", "SERVER_HOST": "0.0.0.0"},
     {"OPENAI_API_KEY": KEY}, ".env",
     "SERVER_HOST 0.0.0.0 can be reached from other machines, and everybody there could spend "
     "OPENAI_API_KEY: set PROXY_API_KEY to a key that clients must present"),
]


@table(RELOADS, "before, after, path, want")
def test_a_reload_never_loosens(before, after, path, want):
    old, fresh = aiapiproxy.load_settings(before), aiapiproxy.load_settings(after)
    given = (old, aiapiproxy.Variables(before, ".env"), fresh, aiapiproxy.Variables(after, path),
             ["server_host"])
    if want:
        with pytest.raises(aiapiproxy.ConfigError) as caught:
            aiapiproxy.reloaded_settings(*given)
        assert caught.value.problems == [want]
    else:
        assert aiapiproxy.reloaded_settings(*given) == fresh


# ============================================================================
# 22. LOG
# ============================================================================

@pytest.mark.parametrize("workers", ["1", "2"])
def test_SIGHUP_reopens_the_logs(workers, tmp_path):
    out, err = tmp_path / "out.log", tmp_path / "err.log"
    with out.open("ab") as stdout, err.open("ab") as stderr:
        program = Program(tmp_path, "--port", "0", stdout=stdout, stderr=stderr, PID_FILE="p.pid",
                          WORKERS=workers, patch="aiapiproxy.ROTATION_CHECK = 999")
    with program:
        wait_for(lambda: out.exists() and b"started" in out.read_bytes())
        started = json.loads(out.read_text().splitlines()[0])
        program.port = int(started["address"].rpartition(":")[2])
        program.get("/x")
        out.rename(tmp_path / "out.log.0")
        program.signal(signal.SIGHUP)
        wait_for(lambda: out.exists() and out.read_bytes().count(b"reloaded") == int(workers))
        program.get("/y")
        wait_for(lambda: b'"/y"' in out.read_bytes())
        program.signal(signal.SIGTERM)
        assert program.end()[0] == 0
    old = (tmp_path / "out.log.0").read_text()
    assert '"/x"' in old and '"/y"' not in old and stat.S_IMODE(out.stat().st_mode) & 0o037 == 0
    for line in (old + out.read_text()).splitlines():
        assert json.loads(line)["event"]


def test_a_log_that_was_moved_away_is_noticed_without_a_signal(tmp_path):
    out = tmp_path / "out.log"
    with out.open("ab") as stdout:
        program = Program(tmp_path, "--port", "0", stdout=stdout,
                          patch="aiapiproxy.ROTATION_CHECK = 0")
    with program:
        wait_for(lambda: b"started" in out.read_bytes())
        program.port = int(json.loads(out.read_text())["address"].rpartition(":")[2])
        out.rename(tmp_path / "out.log.0")
        program.get("/y")
        wait_for(lambda: out.exists() and b'"/y"' in out.read_bytes())


def close_outputs():
    os.close(1)
    os.close(2)


@table([("closed", "closed"), ("a full disk", "/dev/full"), ("a pipe that nobody reads", "pipe"),
        ("a pipe that is full", "full pipe")], "way")
def test_a_log_that_cannot_be_written_stops_nothing(way, tmp_path):
    reader, writer = os.pipe()
    options = {"stdout": writer, "stderr": writer}
    if way == "closed":
        options = {"before": close_outputs}
    elif way == "/dev/full":
        if not os.path.exists("/dev/full"):
            pytest.skip("there is no /dev/full here")
        options = {"stdout": os.open("/dev/full", os.O_WRONLY)}
        options["stderr"] = options["stdout"]
    elif way == "pipe":
        os.close(reader)
    else:
        os.set_blocking(writer, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writer, b"\n" * 65536)
        os.set_blocking(writer, True)
    port = free_port()
    with Program(tmp_path, "--port", str(port), LOG_LEVEL="debug", **options) as program:
        program.port = port

        wait_for(program.serves)
        for _ in range(20):
            assert program.get("/x")[0] == 404
            body = json.dumps(req())
            assert program.get("/v1/messages", "POST", body)[0] == 502
        program.signal(signal.SIGTERM)
        assert program.end()[0] == 0
    for descriptor in {reader, writer,
                       *(each for each in options.values() if isinstance(each, int))}:
        with contextlib.suppress(OSError):
            os.close(descriptor)


@table([("stdout, a pipe", "pipe", 20), ("stderr, a pipe", "pipe", 30),
        ("a terminal that is stopped", "terminal", 20)], "kind, level")
def test_an_output_that_nobody_reads_holds_no_request(kind, level, tmp_path):
    emoji = json.dumps(req(model="\U0001f600" * 199))
    with narrow_pipe() as (_, pipe), contextlib.ExitStack() as stack:
        port, terminals = free_port(), pty.openpty()
        for descriptor in terminals:
            stack.callback(os.close, descriptor)
        termios.tcflow(terminals[1], termios.TCOOFF)
        output = terminals[1] if kind == "terminal" else pipe
        patch = f"aiapiproxy.logging.INFO = {level}"
        with Program(tmp_path, "--port", str(port), stdout=output, stderr=output,
                     patch=patch) as program:
            program.port = port
            wait_for(program.serves)
            for body in [json.dumps(req())] * 10 + [emoji] * 4:
                assert program.get("/v1/messages", "POST", body)[0] == 502
            assert program.serves()
            began = time.monotonic()
            program.signal(signal.SIGTERM)
            assert program.end()[0] == 0 and time.monotonic() - began < 2
        assert os.get_blocking(output)


def test_a_pipe_that_is_read_again_has_whole_lines_and_says_how_many_are_missing(tmp_path):
    with narrow_pipe() as (reader, writer):
        port = free_port()
        with Program(tmp_path, "--port", str(port), stdout=writer,
                     patch="aiapiproxy.LOG_BACKLOG = 20000") as program:
            os.close(writer)
            program.port = port
            wait_for(program.serves)
            for index in range(100):
                assert program.get(f"/{index:0300}")[0] == 404
            entries, lost = [], 0
            with open(reader, "rb", closefd=False) as file:
                for entry in map(json.loads, file):
                    if entry["event"] == "log_lines_lost":
                        lost += entry["count"]
                        assert program.get("/last")[0] == 404
                    if entry.get("path") == "/last":
                        break
                    entries.append(entry["event"])
    assert entries[0] == "started" and entries[-1] == "log_lines_lost"
    assert lost > 10 and entries.count("request") + lost == 100
    assert entries.count("log_lines_lost") == 1


@table([("a pipe", os.pipe), ("a socket", socket.socketpair)], "opened")
def test_programs_that_share_an_output_keep_its_flags(opened, tmp_path):
    ends = opened()
    numbers = [end if isinstance(end, int) else end.fileno() for end in ends]
    port = free_port()
    with Program(tmp_path, "--port", str(port), stdout=numbers[1], stderr=numbers[1]) as program:
        program.port = port
        wait_for(program.serves)
        program.signal(signal.SIGTERM)
        assert program.end()[0] == 0
    assert os.get_blocking(numbers[1]) and b'"stopped"' in os.read(numbers[0], 65536)
    for end in ends:
        os.close(end) if isinstance(end, int) else end.close()


@table([
    ("a callback", "asyncio.get_running_loop().call_soon(lambda: 1 // 0)", "ZeroDivisionError"),
    ("a task that nobody awaits", "asyncio.ensure_future(asyncio.sleep('x'))", "TypeError"),
    ("a future that nobody awaits",
     "asyncio.get_running_loop().create_future().set_exception(KeyError())", "KeyError"),
], "call, kind")
@pytest.mark.parametrize("backtrace", ["", "1"])
def test_an_exception_that_nobody_catches_is_one_error_line(call, kind, backtrace, tmp_path):
    patch = f"import asyncio; aiapiproxy.write_pid_file = lambda path: {call}"
    with Program(tmp_path, "--port", "0", patch=patch, RUST_BACKTRACE=backtrace) as program:
        program.started()
        entry = program.until("loop_fault", program.process.stderr)
        program.signal(signal.SIGTERM)
        code, _, err = program.end()
    assert (code, err, entry["level"], entry["error"]) == (0, "", "error", kind)
    assert ("traceback" in entry) == bool(backtrace) and entry["place"]


def test_a_log_path_that_has_become_a_symlink_is_not_opened(tmp_path):
    out, other = tmp_path / "out.log", tmp_path / "other"
    other.write_text("mine")
    with out.open("ab") as stdout:
        program = Program(tmp_path, "--port", "0", stdout=stdout,
                          patch="aiapiproxy.ROTATION_CHECK = 0")
    with program:
        wait_for(lambda: b"started" in out.read_bytes())
        program.port = int(json.loads(out.read_text())["address"].rpartition(":")[2])
        out.rename(tmp_path / "out.log.0")
        out.symlink_to(other)
        for _ in range(3):
            program.get("/x")
        line = program.until("log_file", program.process.stderr)
        assert line["level"] == "warn" and str(out) in line["message"]
        out.unlink()
        program.get("/y")
        wait_for(lambda: out.exists() and b'"/y"' in out.read_bytes())
        program.signal(signal.SIGTERM)
        assert program.end()[::2] == (0, "") and other.read_text() == "mine"


# ---- Secrets and forgeries

ECHOES = [  # answers of an upstream that repeat the key
    ("in an error",
     raw_answer(json.dumps({"error": {"message": f"Incorrect API key: {KEY}."}}).encode(),
                status=401)),
    ("in a 400", raw_answer(json.dumps({"error": {"message": f"Bearer {KEY}", "param": KEY,
                                                  "code": KEY}}).encode(), status=400)),
    ("in an error with 200",
     raw_answer(json.dumps({"error": {"message": KEY, "code": 500}}).encode())),
    ("in a page", raw_answer(f"<html><title>{KEY}</title></html>".encode(),
                             "Content-Type: text/html", status=502)),
    ("in a page with 200", raw_answer(f"<html><title>{KEY}</title></html>".encode(),
                                      "Content-Type: text/html")),
    ("in plain text", raw_answer(f"no {KEY}".encode(), status=500)),
    ("in a stream's error", raw_answer(sse([ctext("x"), error_like(500, KEY)]),
                                       "Content-Type: text/event-stream")),
    ("in an event named error", raw_answer(b"event: error\ndata: " + KEY.encode() + b"\n\n",
                                           "Content-Type: text/event-stream")),
    ("in a redirect", raw_answer(b"", f"Location: https://{KEY}.example/{KEY}", status=302)),
    ("in its headers",
     raw_answer(b"{}", f"x-request-id: {KEY}", f"Retry-After: {KEY}", status=429)),
    ("in a finish reason", raw_answer(json.dumps(completion({"content": "x"}, KEY)).encode())),
]


@pytest.mark.parametrize("passed_on", [False, True], ids=["own key", "client's key"])
@pytest.mark.parametrize("streaming", [False, True], ids=["plain", "stream"])
@table(ECHOES, "answer")
def test_a_key_that_the_upstream_echoes_is_not_seen(answer, streaming, passed_on, caplog):
    caplog.set_level(10, "aiapiproxy")

    async def scenario():
        more = {"OPENAI_API_KEY": ""} if passed_on else {}
        async with facing([answer], **more, RUST_BACKTRACE="1") as (_, server):
            got = await ask(server.port, body=req(stream=streaming), authorization=f"Bearer {KEY}")
            pages = [await ask(server.port, "GET", path, accept="text/html")
                     for path in ("/", "/status", "/metrics")]
            return got, pages

    got, pages = run(scenario())
    assert KEY not in str((got, pages)) and b"Internal error" not in got[2]
    assert KEY not in "".join(str(vars(record)) for record in caplog.records)


def test_a_key_that_is_echoed_is_shown_by_its_last_four():
    async def scenario():
        async with facing([ECHOES[0][1]]) as (_, server):
            return shown(await ask(server.port, body=req()))

    assert run(scenario()).endswith("Incorrect API key: sk-\u20261234.")


FORGED = 'claude-\u2028"x"\r\n{"level":"error","event":"forged"}\x1b[31m\\\ud83d'


def test_nothing_forges_a_line_of_the_log_a_metric_or_a_header(caplog):
    caplog.set_level(10, "aiapiproxy")

    async def scenario():
        async with facing([KEPT] * 9) as (_, server):
            for asked in (req(model=FORGED), req(model=FORGED, stream=True),
                          req(model=FORGED.upper())):
                answer = await ask(server.port, body=asked, x_request_id="a\tb{}\x80\"",
                                   user_agent="\xa0\x85", x_claude_code_session_id="\x85\"" * 200)
                assert "forged" not in str(answer[1]) and answer[0] != 500
            await ask(server.port, "GET", "/%0d%0aforged%1b[31m" + "x" * 500)
            return (await ask(server.port, "GET", "/metrics"))[2]

    metrics = run(scenario()).decode()
    label = r'\w+="([^"\\\n]|\\.)*"'
    for line in metrics.split("\n")[:-1]:
        assert (line[0] == "#"
                or re.fullmatch(rf"aiapiproxy_\w+(\{{{label}(,{label})*\}})? [0-9.e+-]+", line))
    json_lines, text = aiapiproxy.JsonFormatter(), aiapiproxy.TextFormatter(False)
    assert len(caplog.records) >= 4
    for record in caplog.records:
        line = json_lines.format(record)
        assert line.isascii() and line.isprintable()
        assert json.loads(line)["event"] == record.getMessage()
        assert not re.search("[\x00-\x1f\x7f-\x9f]", text.format(record))


def test_no_prompt_and_no_answer_is_logged(caplog):
    caplog.set_level(1, "aiapiproxy")

    async def scenario():
        said_there = completion({"content": "ANSWER-SECRET", "reasoning_content": "ANSWER-SECRET"})
        async with facing([raw_answer(json.dumps(said_there).encode()),
                           raw_answer(sse([ctext("ANSWER-SECRET"), "{"])),
                           raw_answer(b"{}", status=500)]) as (_, server):
            for streaming in (False, True, False):
                asked = req([usr("PROMPT-SECRET")], system="PROMPT-SECRET", stream=streaming,
                            tools=[tool("f", description="PROMPT-SECRET")])
                await ask(server.port, body=asked, x_api_key="CLIENT-SECRET")

    run(scenario())
    lines = "".join(str(vars(record)) for record in caplog.records)
    assert "request" in lines and not re.search("(ANSWER|PROMPT|CLIENT)-SECRET", lines)


# ============================================================================
# 23. METRICS AND HISTORY
# ============================================================================

async def served(script, *requests, path="/status", **environ):
    """The answer of a path after these requests."""
    async with proxied(script, **environ) as (_, server):
        for request in requests:
            await ask(server.port, body=request)
        return await ask(server.port, "GET", path)


def test_the_status_has_the_requests_without_their_texts():
    _, _, body = run(served(OK, req([usr("a secret")]), {"model": "x"}, req(stream=True)))
    found = json.loads(body)
    assert KEY.encode() not in body and b"secret" not in body and b"Hello" not in body
    recent = [(entry["status"], entry["outcome"], entry["output_tokens"])
              for entry in found["recent"]]
    assert recent == [(200, "ok", 2), (400, "rejected", None), (200, "ok", 2)]
    assert (found["requests"], found["errors"], found["health"]) == (3, 1, "ready")
    assert found["models"]["sonnet"] == "gpt-4o" and len(found["minutes"]) == 60
    assert sum(minute["requests"] for minute in found["minutes"]) == 3
    assert found["environment"][0].startswith("export ANTHROPIC_BASE_URL=http://127.0.0.1:")


METRIC_LINE = re.compile(r'[a-z_]+(\{[a-z_]+="([^"\\]|\\.)*"(,[a-z_]+="([^"\\]|\\.)*")*\})? '
                         r'[0-9.e+-]+')


def test_the_metrics_are_prometheus_text_with_bounded_labels():
    models = [req(model=f'm"{number}\\\n') for number in range(40)]
    _, headers, body = run(served(OK, *models, path="/metrics"))
    lines = body.decode().splitlines()
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    assert all(line.startswith("# ") or METRIC_LINE.fullmatch(line) for line in lines)
    assert 'aiapiproxy_requests_total{route="/v1/messages",status="200",outcome="ok"} 40' in lines
    assert 'aiapiproxy_request_duration_seconds_count 40' in lines
    assert len([line for line in lines if line.startswith("aiapiproxy_tokens_total")]) <= 3 * 21
    if shutil.which("promtool"):
        subprocess.run(["promtool", "check", "metrics"], input=body, check=True)


# ============================================================================
# 24. WHO MAY CALL
# ============================================================================

PROXY = {"PROXY_API_KEY": "proxy-key-1, proxy-key-2"}


async def one(port, request, has_body=True):
    async with Wire(port) as wire:
        await wire.send(request)
        return await wire.answer(has_body)


KEYS = [  # fields of the request, path, further settings, status
    ("as a bearer", ["Authorization: Bearer proxy-key-1"], "/v1/models", {}, 200),
    ("as a bearer in any letters", ["authorization: bearer   proxy-key-1"], "/v1/models", {}, 200),
    ("as x-api-key", ["X-Api-Key: proxy-key-1"], "/v1/models", {}, 200),
    ("the second key", ["X-Api-Key: proxy-key-2"], "/v1/models", {}, 200),
    ("bare in Authorization, API_KEY_HEADER's default", ["Authorization: proxy-key-1"],
     "/v1/models", {}, 200),
    ("in a header of one's own", ["X-Own: proxy-key-1"], "/v1/models",
     {"API_KEY_HEADER": "x-own"}, 200),
    ("in a header of one's own as a bearer", ["X-Own: Bearer proxy-key-1"], "/v1/models",
     {"API_KEY_HEADER": "X-Own"}, 200),
    ("as x-api-key beside a header of one's own", ["X-Api-Key: proxy-key-1"], "/v1/models",
     {"API_KEY_HEADER": "X-Own"}, 200),
    ("as a bearer beside a header of one's own", ["Authorization: Bearer proxy-key-1"],
     "/v1/models", {"API_KEY_HEADER": "X-Own"}, 200),
    ("one right, one wrong", ["Authorization: Bearer wrong", "X-Api-Key: proxy-key-1"],
     "/v1/models", {}, 200),
    ("by Basic on the page", [basic("proxy-key-1")], "/", {}, 200),
    ("by Basic on the metrics", [basic("proxy-key-2")], "/metrics", {}, 200),
    ("not by Basic elsewhere", [basic("proxy-key-1")], "/v1/models", {}, 401),
    ("not a wrong one by Basic", [basic("wrong")], "/metrics", {}, 401),
    ("not Basic that is none", ["Authorization: Basic %%%"], "/metrics", {}, 401),
    ("not Basic of other bytes", ["Authorization: Basic /////w=="], "/metrics", {}, 401),
    ("not none", [], "/v1/models", {}, 401),
    ("not an empty one", ["X-Api-Key:"], "/v1/models", {}, 401),
    ("not a wrong one", ["X-Api-Key: proxy-key-3"], "/v1/models", {}, 401),
    ("not the start of one", ["X-Api-Key: proxy-key-"], "/v1/models", {}, 401),
    ("not more than one", ["X-Api-Key: proxy-key-11"], "/v1/models", {}, 401),
    ("not both as one", ["X-Api-Key: proxy-key-1, proxy-key-2"], "/v1/models", {}, 401),
    ("not in other letters", ["X-Api-Key: PROXY-KEY-1"], "/v1/models", {}, 401),
    ("not with bytes over 127", [b"X-Api-Key: proxy-key-1\xff"], "/v1/models", {}, 401),
    ("not twice", ["X-Api-Key: proxy-key-1", "X-Api-Key: proxy-key-1"], "/v1/models", {}, 401),
    ("not the upstream's", [f"X-Api-Key: {KEY}"], "/v1/models", {}, 401),
    ("not in the query", [], "/v1/models?x-api-key=proxy-key-1", {}, 401),
    ("not for the page without", [], "/", {}, 401),
    ("not for the metrics without", [], "/metrics", {}, 401),
    ("not for what the page shows", [], "/status", {}, 401),
    ("not for what is not there", [], "/x", {}, 401),
    ("health is open", [], "/health", {}, 200), ("live is open", [], "/health/live", {}, 200),
    ("ready is open", [], "/health/ready", {}, 200),
    ("but not what looks like it", [], "/healthy", {}, 401),
    ("nor what is below it", [], "/health/x", {}, 401),
]


@table(KEYS, "fields, path, more, status")
def test_the_proxys_own_key(fields, path, more, status):
    async def scenario():
        async with bare(**PROXY, **more) as server:
            return await one(server.port, GET(path, *fields))

    answer = run(scenario())
    assert answer[0] == status
    if status == 401:
        assert checked(answer) == "401 authentication_error" and b"proxy-key-1" not in answer[2]
        assert ("www-authenticate" in answer[1]) == (path in ("/", "/metrics", "/status"))


def test_OPTIONS_and_HEAD_of_the_root_need_no_key_and_other_methods_do():
    async def scenario():
        async with bare(**PROXY) as server:
            answers = [await one(server.port, HTTP(f"{line} HTTP/1.1", "Content-Length: 0"), False)
                       for line in ("OPTIONS /v1/messages", "HEAD /", "HEAD /metrics", "POST /",
                                    "POST /v1/messages", "PUT /health")]
            return [status for status, _, _ in answers]

    assert run(scenario()) == [204, 200, 401, 401, 401, 405]


PASSED_ON = [  # fields, settings, the key that the upstream sees, or the start of the answer
    ("a bearer", ["Authorization: Bearer sk-client-1"], {}, "sk-client-1"),
    ("x-api-key", ["x-api-key: sk-client-1"], {}, "sk-client-1"),
    ("the placeholder is no key", ["x-api-key: sk-client-1"],
     {"OPENAI_API_KEY": "your-openai-api-key-here"}, "sk-client-1"),
    ("a header of one's own", ["X-Own: sk-client-1"], {"API_KEY_HEADER": "X-Own"}, "sk-client-1"),
    ("Anthropic's never", ["x-api-key: sk-ant-api03-1"], {}, "401: The key is one of Anthropic's"),
    ("Anthropic's never, as a bearer", ["Authorization: Bearer sk-ant-oat01-1"], {},
     "401: The key is one of Anthropic's"),
    ("Anthropic's beside another", ["x-api-key: sk-ant-1", "Authorization: Bearer sk-client-1"], {},
     "sk-client-1"),
    ("none", [], {}, "401: No key for the upstream"),
    ("an empty one", ["x-api-key:"], {}, "401: No key"),
    ("Basic is no key", [basic("sk-client-1")], {}, "401: No key"),
    ("a blank in it", ["x-api-key: a b"], {}, "401: No key"),
    ("bytes over 127", [b"x-api-key: a\xe4b"], {}, "401: No key"),
    ("the proxy's own and another", ["x-api-key: proxy-key-1", "Authorization: Bearer sk-client-1"],
     PROXY, "sk-client-1"),
    ("the proxy's own alone", ["x-api-key: proxy-key-1"], PROXY, "401: No key"),
    ("another without the proxy's own", ["x-api-key: sk-client-1"], PROXY,
     "401: The key is not one of PROXY_API_KEY"),
]


@table(PASSED_ON, "fields, more, want")
def test_the_clients_key_is_sent_upstream_when_there_is_no_other(fields, more, want):
    async def scenario():
        async with facing([KEPT], **{"OPENAI_API_KEY": "", **more}) as (upstream, server):
            extra = ["Cookie: a=b", "X-Forwarded-For: 1.2.3.4", "anthropic-beta: x",
                     "Origin: http://localhost"]
            post = POST(f"Content-Length: {len(HI)}", *fields, *extra, body=HI,
                        path="/v1/messages")
            return await one(server.port, post), upstream.heads

    answer, heads = run(scenario())
    if want[:3] == "401":
        assert shown(answer).startswith(want) and heads == []
        assert checked(answer) == "401 authentication_error"
    else:
        assert shown(answer) == "x" and f"Authorization: Bearer {want}\r\n" in heads[0]
        names = {line.partition(":")[0].lower() for line in heads[0].split("\r\n")[1:] if line}
        assert names == {"host", "authorization", "content-type", "accept", "accept-encoding",
                         "user-agent", "content-length"}


ORIGINS = [  # origin, settings, whether it is served
    ("this machine", "http://localhost", {}, True),
    ("with a port", "http://localhost:3000", {}, True),
    ("by TLS", "https://localhost:3000", {}, True),
    ("by its address", "http://127.0.0.1:1", {}, True),
    ("another of its addresses", "http://127.8.9.10", {}, True),
    ("by its IPv6 address", "http://[::1]:80", {}, True),
    ("a name below localhost", "http://app.localhost:80", {}, True),
    ("an app", "app://obsidian.md", {}, True),
    ("Tauri", "tauri://localhost", {}, True), ("VS Code", "vscode-webview://1a2b", {}, True),
    ("Capacitor", "capacitor://localhost", {}, True),
    ("a stranger", "https://evil.example", {}, False),
    ("null", "null", {}, False), ("an empty one", "", {}, False), ("a file", "file://", {}, False),
    ("an extension", "chrome-extension://a", {}, False),
    ("a scheme that starts alike", "apps://a", {}, False),
    ("localhost in front", "http://localhost.evil.example", {}, False),
    ("an address in front", "http://127.0.0.1.evil.example", {}, False),
    ("localhost behind", "http://evillocalhost", {}, False),
    ("localhost as a user", "http://localhost@evil.example", {}, False),
    ("a user before localhost", "http://evil.example:x@localhost", {}, False),
    ("localhost as a fragment", "http://evil.example#localhost", {}, False),
    ("localhost as a path", "http://evil.example/localhost", {}, False),
    ("a number that means 127.0.0.1", "http://2130706433", {}, False),
    ("a stranger's app scheme", "https://app://x", {}, False),
    ("the network next door", "http://192.168.1.2", {}, False),
    ("every address", "http://0.0.0.0", {}, False),
    ("a listed one", "https://a.example",
     {"ALLOWED_ORIGINS": "https://b.example, https://a.example"}, True),
    ("one that is not listed", "https://c.example",
     {"ALLOWED_ORIGINS": "https://a.example"}, False),
    ("the listed name by another scheme", "http://a.example",
     {"ALLOWED_ORIGINS": "https://a.example"}, False),
    ("the listed name with a port", "https://a.example:1",
     {"ALLOWED_ORIGINS": "https://a.example"}, False),
    ("this machine beside listed origins", "http://localhost:1",
     {"ALLOWED_ORIGINS": "https://a.example"}, True),
    ("a stranger where a key is asked for", "https://evil.example", PROXY, True),
    ("not when others are listed", "https://evil.example",
     {**PROXY, "ALLOWED_ORIGINS": "https://a.example"}, False),
    ("a stranger that brings its own key to a model on this machine", "https://evil.example",
     {"OPENAI_API_KEY": ""}, False),
    ("null there", "null", {"OPENAI_API_KEY": ""}, False),
    ("this machine there", "http://localhost:3000", {"OPENAI_API_KEY": ""}, True),
    ("an asterisk that is listed for all", "*", {}, False),
]


@table(ORIGINS, "origin, more, is_served")
def test_web_pages(origin, more, is_served):
    fields = [f"Origin: {origin}", "Authorization: Bearer proxy-key-1"]

    async def scenario():
        async with facing([KEPT], **more) as (upstream, server):
            posts = [POST(*fields, f"Content-Type: {kind}", f"Content-Length: {len(HI)}", body=HI,
                          path="/v1/messages") for kind in ("application/json", "text/plain")]
            answers = [await one(server.port, post) for post in posts]
            answers.append(await one(server.port, GET("/x", *fields)))
            preflight = await one(server.port, HTTP(
                "OPTIONS /v1/messages HTTP/1.1", *fields[:1], "Access-Control-Request-Method: POST",
                "Access-Control-Request-Headers: x-api-key, anthropic-version"))
            health = await one(server.port, GET("/health", *fields[:1]))
            return answers, preflight, health, upstream.heads

    answers, preflight, health, heads = run(scenario())
    assert health[0] == 200 and not any(name.startswith("access-control") for name in health[1])
    if is_served:
        assert [answer[0] for answer in answers][::2] == [200, 404] and preflight[0] == 204
        for _, headers, _ in (*answers, preflight):
            assert headers["access-control-allow-origin"] == origin and headers["vary"] == "Origin"
            assert headers["access-control-expose-headers"] == "request-id, retry-after"
        headers = preflight[1]
        methods = headers["access-control-allow-methods"].split(", ")
        assert {"GET", "POST", "OPTIONS"} <= set(methods)
        assert headers["access-control-allow-headers"] == "x-api-key, anthropic-version"
        assert headers["access-control-max-age"] == "600" and "content-length" not in headers
    else:
        assert heads == [] and preflight[0] == 403
        for answer in (*answers, preflight):
            assert checked(answer) == "403 permission_error"
            assert not [name for name in answer[1] if name.startswith("access-control")]


def test_a_preflight_echoes_only_names_of_headers():
    async def scenario():
        async with bare() as server:
            return await one(server.port, HTTP("OPTIONS / HTTP/1.1", "Origin: http://localhost",
                                               "Access-Control-Request-Headers: a<script>: b"))

    assert run(scenario())[1].get("access-control-allow-headers", "") == ""


def test_a_Host_that_only_a_program_may_send_is_not_stored():
    async def scenario():
        async with facing([KEPT, KEPT]) as (_, server):
            post = POST(f"Content-Length: {len(HI)}", body=HI, path="/v1/messages",
                        host="Host: x:9000")
            get = GET("/v1/models", host="Host: x:9000")
            return [(await one(server.port, request))[0] for request in (get, post, get, post, get)]

    assert run(scenario()) == [403, 200, 403, 200, 403]


HOSTS_ASKED = [  # Host, settings, whether GET is served, whether POST is
    *((host, host, {}, True, True) for host in (
        "localhost", "localhost:8082", "LOCALHOST", "a.localhost", "127.0.0.1",
        "127.1.2.3:99", "[::1]", "[::1]:80")),
    *((host, host, {}, False, False) for host in (
        "evil.example", "evil.example:8082", "localhost.evil.example", "127.0.0.1.evil.example",
        "10.0.0.1", "192.168.1.5:8082", "0.0.0.0", "[::2]", "[fe80::1]", "128.0.0.1", "2130706433",
        "mymac.local", "mymac", "x.", "a_b")),
    ("a single letter, for a program's POST alone", "x", {}, False, True),
    ("a listed one", "proxy.example:1", {"ALLOWED_HOSTS": "a.example, Proxy.Example"}, True, True),
    ("not one below a listed one", "x.proxy.example", {"ALLOWED_HOSTS": "proxy.example"},
     False, False),
    ("all", "evil.example", {"ALLOWED_HOSTS": "*"}, True, True),
    ("any where a key is asked for", "evil.example", PROXY, True, True),
    ("not any where clients bring their own to a model on this machine", "evil.example",
     {"OPENAI_API_KEY": ""}, False, False),
    ("this machine there", "localhost", {"OPENAI_API_KEY": ""}, True, True),
    ("an address where other machines may call", "192.168.1.5:8082",
     {"OPENAI_API_KEY": "", "SERVER_HOST": "0.0.0.0"}, True, True),
    ("an IPv6 address where other machines may call", "[fe80::1]:8082",
     {"OPENAI_API_KEY": "", "SERVER_HOST": "0.0.0.0"}, True, True),
    ("not a name where other machines may call", "evil.example",
     {"OPENAI_API_KEY": "", "SERVER_HOST": "0.0.0.0"}, False, False),
]


@table(HOSTS_ASKED, "host, more, get, post")
def test_the_Host_of_a_request(host, more, get, post):
    async def scenario():
        async with facing([KEPT], **more) as (_, server):
            key = "Authorization: Bearer proxy-key-1"
            posts = [POST(key, f"Content-Length: {len(HI)}", *origin, body=HI, path="/v1/messages",
                          host=f"Host: {host}") for origin in ([], ["Origin: http://localhost"])]
            gets = [GET("/v1/models", key, host=f"Host: {host}"),
                    GET(f"http://{host}/v1/models", key)]
            return [await one(server.port, request)
                    for request in (gets[0], posts[0], gets[1], posts[1])]

    answers = run(scenario())
    assert [answer[0] == 200 for answer in answers] == [get, post, get, get]
    for answer in answers:
        if answer[0] != 200:
            assert checked(answer) == "403 permission_error" and b"ALLOWED_HOSTS" in answer[2]


@table([(f"{host} {more}", (host, more), want) for host, more, want in [
    *((host, {}, True) for host in ("127.0.0.1", "::1", "[::1]", "localhost", "127.0.0.1,::1",
                                    "127.3.2.1")),
    *((host, {}, False) for host in ("0.0.0.0", "::", "[::]", "192.168.1.2", "mymac.local",
                                     "127.0.0.1,0.0.0.0", "::ffff:1.2.3.4")),
    ("0.0.0.0", PROXY, True), ("0.0.0.0", {"OPENAI_API_KEY": ""}, True),
    ("::", {"OPENAI_API_KEY": "", **PROXY}, True),
]])
def test_an_unprotected_key_is_not_offered_to_other_machines(given, want):
    host, more = given
    environ = {"OPENAI_API_KEY": KEY, "SERVER_HOST": host, **more}
    if want:
        assert aiapiproxy.load_settings(environ).server_host
    else:
        with pytest.raises(aiapiproxy.ConfigError, match="SERVER_HOST.*PROXY_API_KEY"):
            aiapiproxy.load_settings(environ)


SECRET = "Xq7Z-secret-0123456789"


@contextlib.asynccontextmanager
async def remote(*scripts, **environ):
    """The proxy in front of an upstream that is no local host, reached through a RawUpstream."""
    async with RawUpstream(*scripts) as upstream:
        async with bare(**{"OPENAI_API_KEY": "", "OPENAI_BASE_URL": "http://upstream.example/v1",
                           "HTTP_PROXY": f"http://127.0.0.1:{upstream.port}", **environ}) as server:
            yield upstream, server


def hi(*fields, path="/v1/messages", host="127.0.0.1"):
    return POST(f"Content-Length: {len(HI)}", *fields, body=HI, path=path, host=f"Host: {host}")


EVIL = "Origin: https://evil.example"
LENDERS = [  # settings without OPENAI_API_KEY that hold a credential; what the upstream sees of it
    ("a header", {"UPSTREAM_HEADERS": f"api-key: {SECRET}"}, f"\r\napi-key: {SECRET}\r\n"),
    ("a header beside a harmless one",
     {"UPSTREAM_HEADERS": f"X-Title: x; Authorization: Basic {SECRET}"},
     f"\r\nAuthorization: Basic {SECRET}\r\n"),
    ("the query", {"OPENAI_BASE_URL": f"http://upstream.example/v1?api-version=1&key={SECRET}"},
     f"/v1/chat/completions?api-version=1&key={SECRET} HTTP/1.1\r\n"),
]


@table(LENDERS, "more, seen")
def test_a_credential_in_a_header_or_in_the_query_is_lent_as_a_key_is(more, seen):
    async def scenario():
        async with remote([KEPT], **more) as (upstream, server):
            key = "x-api-key: sk-client-1"
            refused = [await one(server.port, request) for request in (
                hi(key, EVIL), hi(key, "Origin: null"), hi(key, host="evil.example"))]
            heads = list(upstream.heads)
            served = [await one(server.port, request) for request in (
                hi(key), hi(), hi("Origin: http://localhost:1"))]
            return refused, heads, served, upstream.heads

    refused, none, served, heads = run(scenario())
    assert [checked(answer) for answer in refused] == ["403 permission_error"] * 3 and none == []
    assert not [name for answer in refused for name in answer[1] if "access-control" in name]
    assert [shown(answer) for answer in served[:1]] == ["x"] and served[2][0] == 200
    assert all(seen in head and "sk-client-1" not in head for head in heads)
    assert all(("Bearer" in head) is False for head in heads)


def test_harmless_headers_and_a_version_lend_nothing():
    async def scenario():
        headers = "HTTP-Referer: https://a.example; X-Title: x; OpenAI-Organization: org-1"
        async with remote([KEPT], UPSTREAM_HEADERS=headers,
                          OPENAI_BASE_URL="http://upstream.example/v1?api-version=1") as (
                              upstream, server):
            return shown(await one(server.port, hi("x-api-key: sk-client-1"))), upstream.heads

    answer, (head,) = run(scenario())
    assert answer == "x" and "\r\nAuthorization: Bearer sk-client-1\r\n" in head


def test_a_key_in_the_query_that_the_upstream_echoes_is_not_seen(caplog):
    caplog.set_level(10, "aiapiproxy")
    path = f"/v1/chat/completions?key={SECRET}%2F1 and {SECRET}/1"
    error = raw_answer(json.dumps({"error": {"message": f"bad path {path}"}}).encode(), status=400)

    async def scenario():
        async with remote([error], OPENAI_BASE_URL=(
                f"http://upstream.example/v1?key={SECRET}%2F1")) as (_, server):
            return [await one(server.port, request) for request in (
                hi(), GET("/", "Accept: text/html"), GET("/status"), GET("/metrics"))]

    answers = run(scenario())
    assert answers[0][0] == 400 and b"bad path" in answers[0][2]
    assert SECRET not in str(answers) + "".join(str(vars(record)) for record in caplog.records)


COUNT = "/v1/messages/count_tokens"
STRANGERS = [  # request of a page of a stranger where clients bring their keys to a remote upstream
    *((path, GET(path, EVIL, "x-api-key: sk-client-1"), 403) for path in (
        "/", "/status", "/metrics", "/v1/models", "/v1/models/claude-opus-5-5", "/v1/messages")),
    ("a message with a key", hi(EVIL, "x-api-key: sk-client-1"), 200),
    ("a message with a key of a page without a name",
     hi("Origin: null", "x-api-key: sk-client-1"), 200),
    ("a count with a key", hi(EVIL, "x-api-key: sk-client-1", path=COUNT), 200),
    ("a message without a key", hi(EVIL), 401), ("a count without", hi(EVIL, path=COUNT), 401),
    ("a message with Anthropic's key", hi(EVIL, "x-api-key: sk-ant-1"), 401),
    *((f"a preflight of {method} {path}", HTTP(
        f"OPTIONS {path} HTTP/1.1", EVIL, f"Access-Control-Request-Method: {method}"), status)
      for method, path, status in (
          ("POST", "/v1/messages", 204), ("POST", COUNT, 204), ("GET", "/v1/messages", 403),
          ("GET", "/status", 403), ("POST", "/status", 403))),
    ("OPTIONS that announces nothing", HTTP("OPTIONS /v1/messages HTTP/1.1", EVIL), 403),
]


@table(STRANGERS, "request_bytes, status")
def test_a_strangers_page_may_spend_only_its_own_key_at_a_remote_upstream(request_bytes, status):
    async def scenario():
        async with remote([KEPT]) as (upstream, server):
            return await one(server.port, request_bytes), upstream.heads

    answer, heads = run(scenario())
    assert answer[0] == status and ("access-control-allow-origin" in answer[1]) == (status != 403)
    assert len(heads) == (status == 200 and b"count_tokens" not in request_bytes)


def test_at_a_remote_upstream_the_Host_is_checked_where_pages_tell_what_others_do():
    async def scenario():
        async with remote([KEPT]) as (_, server):
            host = "Host: rebind.evil.example"
            gets = [GET(path, host=host) for path in (
                "/", "/status", "/metrics", "/v1/models", "/health", "/health/live")]
            message = hi("x-api-key: sk-client-1", host="rebind.evil.example")
            return [(await one(server.port, request))[0] for request in (*gets, message)]

    assert run(scenario()) == [403, 403, 403, 200, 200, 200, 200]


def test_a_model_on_this_machine_is_for_no_strangers_page_and_no_strangers_name():
    async def scenario():
        async with facing([KEPT], OPENAI_API_KEY="") as (upstream, server):
            key, name = "x-api-key: any", "rebind.evil.example"
            preflight = HTTP("OPTIONS /v1/messages HTTP/1.1", EVIL,
                             "Access-Control-Request-Method: POST")
            refused = [await one(server.port, request) for request in (
                hi(key, EVIL), hi(key, "Origin: null"), preflight, hi(key, host=name),
                hi(key, "Origin: http://localhost:3000", host=name),
                hi(key, "Origin: http://" + name, host=name))]
            none = list(upstream.heads)
            served = [await one(server.port, request) for request in (
                hi(key, "Origin: http://localhost:3000"), hi(key))]
            return refused, none, [shown(answer) for answer in served]

    refused, none, served = run(scenario())
    assert [checked(answer) for answer in refused] == ["403 permission_error"] * 6 and none == []
    assert not [name for answer in refused for name in answer[1] if "access-control" in name]
    assert served == ["x", "x"]


# ============================================================================
# 25. ONE REQUEST
# ============================================================================

def test_a_message():
    (status, headers, body), (heard,) = run(asked_once(OK, req()))
    message = json.loads(body)
    assert (status, headers["content-type"]) == (200, "application/json")
    assert message["content"] == [txt("Hello")]
    assert re.fullmatch(r"req_[A-Za-z0-9]{24}", headers["request-id"])
    assert heard.line == "POST /v1/chat/completions HTTP/1.1" and heard.body == PLAIN
    sent_headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json",
                    "accept": "application/json", "accept-encoding": "identity"}
    assert sent_headers.items() <= heard.headers.items()
    assert heard.headers["user-agent"] == f"aiapiproxy/{aiapiproxy.__version__}"


def test_a_stream():
    # Anthropic's SDKs send "accept: application/json" even for streams.
    async def scenario():
        async with proxied(stream(SIMPLE)) as (upstream, server):
            answer = await ask(server.port, path="/v1/messages?beta=true", body=req(stream=True),
                               accept="application/json", anthropic_beta="new-2030-01-01")
            return answer, upstream.requests[0]

    (status, headers, body), heard = run(scenario())
    assert (status, printed(body)) == (200, HELLO)
    want = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache",
            "x-accel-buffering": "no", "transfer-encoding": "chunked"}
    assert want.items() <= headers.items()
    assert heard.body == STREAMED and heard.headers["accept"] == "text/event-stream"
    assert not any(name.startswith("anthropic") for name in heard.headers)


@table([
    ("a client's headers are not passed on",
     {"x_stainless_os": "Linux", "anthropic_version": "2023-06-01",
      "x_api_key": "sk-ant-1", "cookie": "c=1", "x_app": "cli"}),
    ("old and new clients are served alike",
     {"anthropic_version": "2026-10-21", "authorization": "Bearer x"}),
], "headers")
def test_headers_of_a_client(headers):
    async def scenario():
        async with proxied(OK) as (upstream, server):
            status, _, _ = await ask(server.port, body=req(), **headers)
            return status, upstream.requests[0].headers

    status, heard = run(scenario())
    assert status == 200 and heard["authorization"] == f"Bearer {KEY}"
    assert heard.keys() <= {"host", "content-length", "content-type", "accept", "accept-encoding",
                            "user-agent", "authorization", "connection"}


@pytest.mark.parametrize("streamed_too", [False, True])
def test_max_tokens_0_is_answered_here(streamed_too):
    answer, requests = run(asked_once(OK, req(max_tokens=0, stream=streamed_too)))
    assert answer[0] == 200 and requests == []
    if streamed_too:
        assert printed(answer[2]) == "MS MD(max_tokens) ME"
    else:
        message = json.loads(answer[2])
        assert (message["content"], message["stop_reason"]) == ([], "max_tokens")
        assert (message["usage"]["input_tokens"], message["usage"]["output_tokens"]) == (8, 0)


def test_a_rejected_thread_over_the_wire():
    (status, _, body), _ = run(asked_once(OK, req(thread={"type": "create"})))
    assert (status, json.loads(body)["error"]["details"]) == (
        400, {"error_code": "thread_unsupported_request", "unsupported": ["thread"]})


def test_the_limit_reached_before_the_first_word_is_an_answer():
    words = "Could not finish the message because max_tokens or model output limit was reached."
    script = reply(400, error_like(None, words))
    answer, _ = run(asked_once(script, req()))
    assert (said(answer)["content"], said(answer)["stop_reason"]) == ([], "max_tokens")
    answer, _ = run(asked_once(script, req(stream=True)))
    assert said(answer) == "MS MD(max_tokens) ME"


# ---- Answers that are not what was asked for

SOME_MESSAGE = [think("r", "aap1.c."), only_x, use("call_1", "f", {"a": 1})]


def test_sse_in_place_of_json():
    answer, _ = run(asked_once(stream(*X_ONLY), req()))
    assert (said(answer)["content"], said(answer)["stop_reason"]) == ([only_x], "end_turn")
    # With the content type of JSON only the first bytes show the stream.
    answer, _ = run(asked_once(reply(200, sse(X_ONLY)), req()))
    assert (said(answer)["content"], said(answer)["usage"]["output_tokens"]) == ([only_x], 3)


@pytest.mark.parametrize("streaming", [False, True], ids=["plain", "stream"])
@table([
    ("blank lines in front", reply(200, b"\n\n \n" + json.dumps(completion(TEXT)).encode())),
    ("many lines", reply(200, json.dumps(completion(TEXT), indent=2))),
    ("many lines that claim to be events",
     reply(200, json.dumps(completion(TEXT), indent=2), "text/event-stream")),
    ("no content type that says so", reply(200, completion(TEXT), "text/plain")),
], "script")
def test_json_in_any_form(script, streaming):
    answer, _ = run(asked_once(script, req(stream=streaming)))
    assert said(answer) == ONE_X if streaming else said(answer)["content"] == [only_x]


def test_a_long_answer_is_streamed_and_collected():
    script = stream(creason("r"), ctext("x"), WHOLE, cend("tool_calls"), cuse(5, 3), DONE)
    answer, (heard,) = run(asked_once(script, req(max_tokens=16000, thinking=ADAPTIVE)))
    message = said(answer)
    assert heard.body["stream"] is True and heard.headers["accept"] == "text/event-stream"
    assert (message["content"], message["stop_reason"], message["usage"]["output_tokens"]) == (
        SOME_MESSAGE, "tool_use", 3)


def test_a_long_answer_that_breaks_is_an_error():
    answer, _ = run(asked_once(stream(ctext("x"), CUT), req(max_tokens=16000)))
    assert said(answer).startswith("502 api_error: ")


def test_json_in_place_of_sse():
    message = {"content": "x", "reasoning_content": "r",
               "tool_calls": [call("call_1", "f", '{"a":1}')]}
    script = reply(200, completion(message, usage=used(5, 3)))
    answer, _ = run(asked_once(script, req(stream=True, thinking=ADAPTIVE)))
    assert said(answer) == ('MS 0+thinking 0h"r" 0s"aap1.c." 0- 1+text 1t"x" 1- '
                            '2+tool(call_1,f) 2j`{"a":1}` 2- MD(tool_use) ME')


WRONG = [  # reply, and the error for streams and for other answers
    ("an empty body", reply(200, ""), "502 api_error"),
    ("a page", reply(200, "<html>", "text/html"), "502 api_error"),
    ("no choices", reply(200, {"choices": []}), "502 api_error"),
    ("an array", reply(200, []), "502 api_error"),
    ("an error", reply(200, error_like(429)), "429 rate_limit_error"),
    ("an error with its status as text", reply(200, error_like("503")), "529 overloaded_error"),
    ("an overflow", reply(200, {"error": {"message": "too many tokens in the prompt"}}),
     "400 invalid_request_error"),
    ("an error in SSE", stream(error_like(429, "slow")), "429 rate_limit_error"),
    ("SSE that ends at once", stream(DONE), "502 api_error"),
    ("SSE without anything", stream(b": comment\n\n"), "502 api_error"),
    ("a redirect", reply(302, "", location="https://elsewhere.example/v1"), "502 api_error"),
    ("a status", reply(503, JSON_ERROR), "529 overloaded_error"),
    ("a body that ends early",
     [reply_head(200, 50, content_type="application/json"), b'{"choices"', CUT], "502 api_error"),
    ("a reset", [reply_head(200, 50, content_type="application/json"), RESET], "502 api_error"),
]


@pytest.mark.parametrize("streaming", [False, True], ids=["plain", "stream"])
@table(WRONG, "script, want")
def test_a_wrong_answer(script, want, streaming):
    answer, requests = run(asked_once(script, req(stream=streaming)))
    assert said(answer).startswith(want + ": ") and len(requests) == 1


# ---- Streams that pause or break

def test_a_stream_that_pauses_too_long_is_ended():
    answer, _ = run(asked_once(stream(ctext("x"), HANG), req(stream=True), STREAM_TIMEOUT="0.2"))
    assert said(answer) == 'MS 0+text 0t"x" ERR(timeout_error)'


PAUSES = [  # request members, parts of the stream, the bytes after a pause of 0.3 s
    ("a ping after text", {}, [ctext("x")], b'event: ping\ndata: {"type":"ping"}\n\n'),
    ("the start while the upstream still thinks", {}, [b": thinking\n\n"],
     b"event: message_start\n"),
    ("an empty delta while thinking is hidden", {"thinking": OMITTED}, [creason("a")],
     b'"delta":{"type":"thinking_delta","thinking":""}}\n\n'),
    ("a ping while thinking shows", {"thinking": ADAPTIVE}, [creason("a")],
     b'event: ping\ndata: {"type":"ping"}\n\n'),
]


@table(PAUSES, "members, parts, want")
def test_events_while_the_upstream_pauses(members, parts, want, monkeypatch):
    monkeypatch.setattr(aiapiproxy, "FIRST_CHUNK_WAIT", 0.01)
    monkeypatch.setattr(aiapiproxy, "PING_INTERVAL", 0.3)

    async def scenario():
        async with proxied(stream(*parts, HANG)) as (_, server):
            async with Asking(server.port, "POST", "/v1/messages",
                              req(stream=True, **members)) as asking:
                await asking.until(b"event: ping\n")
                started, asking.data = asking.data, b""
                if want not in started or b"ping" in want:
                    await asking.until(want)

    run(scenario())


def test_an_error_after_a_start_without_a_chunk_is_an_event(monkeypatch):
    monkeypatch.setattr(aiapiproxy, "FIRST_CHUNK_WAIT", 0.01)

    async def scenario():
        gate = asyncio.Event()
        async with proxied(stream(b": thinking\n\n", gate, error_like(429))) as (_, server):
            async with Asking(server.port, "POST", "/v1/messages", req(stream=True)) as asking:
                await asking.until(b"event: ping\n")
                gate.set()
                return said(await asking.answer())

    assert run(scenario()) == "MS ERR(rate_limit_error)"


def test_a_stream_that_stays_open_after_its_finish_reason_is_complete(monkeypatch):
    monkeypatch.setattr(aiapiproxy, "FIRST_CHUNK_WAIT", 0.01)
    monkeypatch.setattr(aiapiproxy, "LAST_CHUNK_WAIT", 0.3)
    answer, _ = run(asked_once(stream(ctext("x"), cend("stop"), HANG), req(stream=True)))
    assert said(answer) == ONE_X


def test_a_prompt_that_the_upstream_truncated_is_logged_once(caplog):
    async def scenario():
        async with proxied(reply(200, completion(TEXT, usage=used(2000, 2)))) as (_, server):
            for words in (100, 6000, 6000):
                await ask(server.port, body=req([usr("word " * words)]))

    run(scenario())
    warnings = [record.levelname for record in caplog.records
                if "OLLAMA_CONTEXT_LENGTH" in str(vars(record))]
    assert warnings == ["WARNING"]


@table([
    ("reset after the finish reason", [ctext("x"), cend("stop"), RESET], ONE_X),
    ("cut after the finish reason", [ctext("x"), cend("stop"), CUT], ONE_X),
    ("cut before it", [ctext("x"), CUT], BROKEN),
])
def test_a_stream_that_breaks(given, want):
    answer, _ = run(asked_once(stream(*given), req(stream=True)))
    assert said(answer) == want


def test_a_reset_in_a_stream():
    async def scenario():
        gate = asyncio.Event()
        async with proxied(stream(ctext("x"), gate, RESET)) as (_, server):
            async with Asking(server.port, "POST", "/v1/messages", req(stream=True)) as asking:
                await asking.until(b"text_delta")
                gate.set()
                return said(await asking.answer())

    assert run(scenario()) == BROKEN


def test_a_stream_that_is_cut_anywhere_ends_in_an_error_event():
    whole = sse([ROLE, ctext("x"), frag(0, "call_1", "f", '{"a":'), frag(0, None, None, "1}"),
                 cend("tool_calls"), cuse(5, 3), DONE])
    enough = whole.index(b"\n\n", whole.index(b"finish_reason\":\"tool")) + 1
    scripts = [stream(whole[:at], CUT) for at in range(1, len(whole))]

    async def scenario():
        async with ScriptedServer(*scripts) as upstream:
            async with bare(OPENAI_BASE_URL=upstream.url) as server:
                for at in range(1, len(whole)):
                    answer = await ask(server.port, body=req(stream=True, tools=[tool("f")]))
                    if answer[0] == 200:
                        end = "MD(tool_use) ME" if at >= enough else "ERR(api_error)"
                        assert printed(answer[2]).endswith(end), at
                    else:
                        assert checked(answer) == "502 api_error", at
                        assert at < whole.index(b"\n\n") + 2, at

    within(20, scenario())


@table([
    ("a line that is no JSON", [ctext("x"), sse(["{oops"]), ctext("y"), cend("stop"), DONE],
     BROKEN),
    ("JSON cut off", [ctext("x"), sse(['{"choices":[{"delta":{"content":"']), DONE], BROKEN),
    ("an error in the middle", [ctext("x"), error_like(500), DONE], BROKEN),
    ("the end without a finish reason", [ctext("x"), CUT], BROKEN),
    ("a line of 17 MiB", [ctext("x"), b"data: " + b" " * (17 << 20)], BROKEN),
])
def test_a_broken_stream_ends_in_an_error_event(given, want):
    answer, _ = run(asked_once(stream(*given), req(stream=True)))
    assert said(answer) == want


def test_a_stream_that_stalls_is_ended_and_its_connection_closed():
    async def scenario():
        async with proxied(stream(ctext("x"), HANG), STREAM_TIMEOUT="0.2") as (upstream, server):
            answer = await ask(server.port, body=req(stream=True))
            await asyncio.wait_for(upstream.disconnected.wait(), 1)
            return said(answer), server.app.upstream.idle_count

    assert run(scenario()) == ('MS 0+text 0t"x" ERR(timeout_error)', 0)


def test_comments_keep_a_stream_alive():
    async def scenario():
        script = stream(ctext("x"), *[0.06, b": keep-alive\n\n"] * 8, cend("stop"), DONE)
        async with proxied(script, STREAM_TIMEOUT="0.3") as (_, server):
            return said(await ask(server.port, body=req(stream=True)))

    assert run(scenario()) == ONE_X


def test_a_client_that_reads_nothing_slows_the_upstream_and_is_not_cut():
    async def scenario():
        piece = sse([ctext("0123456789" * 3000)] * 1000)
        script = [raw_answer(b"", "Content-Type: text/event-stream", length=False), piece,
                  sse([cend("stop"), DONE])]
        async with facing([script], STREAM_TIMEOUT="0.3") as (upstream, server):
            async with Wire(server.port) as wire:
                body = json.dumps(req(stream=True)).encode()
                await wire.send(POST(f"Content-Length: {len(body)}", "Connection: close", body=body,
                                     path="/v1/messages"))
                await wire.more()
                wire.writer.transport.pause_reading()
                seen = -1
                while seen != upstream.written:
                    seen = upstream.written
                    await asyncio.sleep(0.4)
                assert seen < len(piece) * 0.8
                (exchange,) = server.server.exchanges
                assert exchange._stream.unsent_bytes <= 262144
                wire.writer.transport.resume_reading()
                return seen + len(await wire.reader.read(-1)), await upstream.disconnected.wait()

    assert within(15, scenario())[0] > 30000000


def test_a_fault_of_the_proxy_in_a_stream_is_an_error_event(monkeypatch):
    monkeypatch.setattr(aiapiproxy.ToolCalls, "find", lambda table, entry: 1 / 0)

    async def scenario():
        gate = asyncio.Event()
        script = stream(ctext("x"), gate, frag(0, "call_1", "f", "{}"), DONE)
        async with proxied(script) as (_, server):
            async with Asking(server.port, "POST", "/v1/messages", req(stream=True)) as asking:
                await asking.until(b"text_delta")
                gate.set()
                return await asking.answer()

    assert said(run(scenario())) == 'MS 0+text 0t"x" ERR(api_error)'


# ---- Streams that end early

def test_a_stop_sequence_ends_the_upstreams_work():
    async def scenario():
        async with proxied(stream(ctext("abcE"), ctext("NDxyz"), HANG)) as (upstream, server):
            answer = await ask(server.port, body=req(stream=True, stop_sequences=["END"]))
            await upstream.disconnected.wait()
            return said(answer)

    assert run(scenario()) == 'MS 0+text 0t"abc" 0- MD(stop_sequence,"END") ME'


@pytest.mark.parametrize("streaming", [False, True], ids=["plain", "stream"])
def test_a_disconnect_ends_the_upstreams_work(streaming, capfd):
    async def scenario():
        script = stream(*([ctext("x")] if streaming else []), HANG)
        async with proxied(script) as (upstream, server):
            async with Asking(server.port, "POST", "/v1/messages", req(stream=streaming)) as asking:
                await (asking.until(b"text_delta") if streaming else upstream.asked.wait())
            await upstream.disconnected.wait()

    run(scenario())
    assert not re.search(r"(?i)error|traceback", capfd.readouterr().err)


def test_a_stream_that_outlasts_the_shutdown_ends_in_an_error_event():
    async def scenario():
        async with proxied(stream(ctext("x"), HANG)) as (_, server):
            async with Asking(server.port, "POST", "/v1/messages", req(stream=True)) as asking:
                await asking.until(b"text_delta")
                await server.drain(0)
                return said(await asking.answer())

    assert run(scenario()) == 'MS 0+text 0t"x" ERR(overloaded_error)'


def test_a_disconnect_while_the_upstream_is_called_is_logged(caplog):
    caplog.set_level(20, "aiapiproxy")

    async def scenario():
        with packet_hole() as url:
            async with bare(OPENAI_BASE_URL=url) as server:
                async with Wire(server.port) as wire:
                    await wire.send(POST(f"Content-Length: {len(HI)}", body=HI,
                                         path="/v1/messages"))
                    while not server.app.in_flight:
                        await asyncio.sleep(0.001)
                while server.server.tasks:
                    await asyncio.sleep(0.001)
                return server.app.in_flight

    assert run(scenario()) == 0
    (facts,) = [record.facts for record in caplog.records if record.getMessage() == "request"]
    assert (facts["status"], facts["outcome"]) == (499, "client_gone")


def test_an_end_that_arrives_during_the_shutdown_is_sent_whole(monkeypatch):
    connections, begin = [], aiapiproxy.UpstreamResponse.__init__

    def noted(response, upstream, connection, *more):
        connections.append(connection)
        begin(response, upstream, connection, *more)

    monkeypatch.setattr(aiapiproxy.UpstreamResponse, "__init__", noted)

    async def scenario():
        gate = asyncio.Event()
        start = raw_answer(sse([ctext("x")]), "Content-Type: text/event-stream", length=False)
        async with facing([[start, gate]]) as (_, server):
            async with Asking(server.port, "POST", "/v1/messages", req(stream=True)) as client:
                await client.until(b"text_delta")
                ((exchange, task),) = server.server.exchanges.items()
                exchange.is_shut_down = True
                task.cancel()
                protocol = connections[0].stream.transport.get_protocol()
                protocol.data_received(sse([ctext("y"), cend("stop"), DONE]))
                return said(await client.answer())

    assert run(scenario()) == 'MS 0+text 0t"x" 0t"y" ' + CLOSED


# ---- Fuzz
#
# AIAPIPROXY_FUZZ_SECONDS=600 runs longer, with another seed each time.

FUZZ_SECONDS = float(os.environ.get("AIAPIPROXY_FUZZ_SECONDS", "2"))
PIECES = [b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b",", b";", b"0", b"-1", b"5\r\n",
          b"0\r\n\r\n", b"\r\n\r\n", b"\xff", b"HTTP/1.1", b"Host: a", b"Content-Length: 5\r\n",
          b"Transfer-Encoding: chunked\r\n", b"Expect: 100-continue\r\n", b"Connection: close\r\n",
          b"\xef\xbb\xbf", b"{", b"}", b"[", b'"', b"\\", b"1e999", b"\\ud83d", b"null", b"data: ",
          b"event: error\n", b"[DONE]", b"18446744073709551616", b"a" * 300]


def mutated(raw, dice):
    """The bytes with a few random changes."""
    raw = bytearray(raw)
    for _ in range(dice.choice([0, 1, 1, 1, 2, 3, 8])):
        at = dice.randrange(len(raw) + 1)
        kind = dice.random()
        if kind < 0.25 and raw:
            raw[at % len(raw)] = dice.randrange(256)
        elif kind < 0.6:
            raw[at:at] = dice.choice(PIECES)
        elif kind < 0.8:
            del raw[at:at + dice.choice([1, 2, 10, 100])]
        else:
            raw[at:at] = raw[at:at + dice.choice([1, 20, 200])]
    return bytes(raw)


async def fuzzed(port, data, dice):
    """Sends bytes in pieces; the whole answer has to be HTTP and no internal error."""
    async with Wire(port) as wire:
        cut = dice.randrange(len(data) + 1)
        with contextlib.suppress(ConnectionError):
            await wire.send(data[:cut])
            await wire.send(data[cut:])
            if dice.random() < 0.2:
                return
            if dice.random() < 0.2:
                wire.writer.write_eof()
            while await asyncio.wait_for(wire.more(), 4):
                pass
        assert re.match(rb"HTTP/1\.1 [1-5]\d\d |$", wire.data), (data, wire.data)
        assert b"Internal error" not in wire.data, (data, wire.data)


def test_fuzz(monkeypatch, capfd, caplog):
    for name in ("HEAD_TIME", "BODY_READ_TIME", "IDLE_KEEP_ALIVE", "LINGER_TIME",
                 "LINGER_READ_TIME", "LAST_CHUNK_WAIT"):
        monkeypatch.setattr(aiapiproxy, name, 0.05)
    seed = 1 if FUZZ_SECONDS <= 5 else random.randrange(2 ** 32)
    dice = random.Random(seed)
    plain, streaming = (json.dumps(req(stream=flag)).encode() for flag in (False, True))
    asked = [request for _, request, *_ in (*GOOD, *BAD_HEADS) if len(request) < 3000]
    asked += [POST(f"Content-Length: {len(body)}", body=body, path="/v1/messages")
              for body in (plain, streaming)] * 10
    told = [raw_answer(FINE, JSON_TYPE), raw_answer(FINE_SSE, "Content-Type: text/event-stream"),
            raw_answer(b"%x\r\n%b\r\n0\r\n\r\n" % (len(FINE_SSE), FINE_SSE),
                       "Transfer-Encoding: chunked", length=False),
            raw_answer(gzip.compress(FINE), "Content-Encoding: gzip"), ECHOES[1][1], ECHOES[6][1],
            ECHOES[8][1]]

    async def scenario():
        end = time.monotonic() + FUZZ_SECONDS * 0.8
        count = 0
        async with facing([b""], REQUEST_TIMEOUT="0.2", STREAM_TIMEOUT="0.2") as (upstream, server):
            before, tasks = descriptors(), len(asyncio.all_tasks())
            while time.monotonic() < end:
                upstream.script = [[mutated(dice.choice(told), dice) for _ in range(2)]
                                    for _ in range(20)]
                await asyncio.gather(*[fuzzed(server.port, mutated(dice.choice(asked), dice), dice)
                                       for _ in range(20)])
                assert (await ask(server.port, "GET", "/health", connection="close"))[0] == 200
                count += 20
            while server.server.tasks or upstream.connections:
                server.app.upstream.close()
                await asyncio.sleep(0.01)
            assert server.app.in_flight == 0
            while descriptors() > before or len(asyncio.all_tasks()) > tasks:
                await asyncio.sleep(0.01)
        return count

    count = within(FUZZ_SECONDS + 10, scenario())
    assert count > 50, f"seed {seed}"
    assert "Traceback" not in capfd.readouterr().err
    assert not [record for record in caplog.records if record.msg == "internal_error"]


def test_a_chunk_whose_size_is_over_the_limit_is_refused_before_it_arrives():
    head = ("POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nx-api-key: k\r\n"
            "Transfer-Encoding: chunked\r\n\r\n").encode()

    async def scenario(start, **environ):
        async with proxied(OK, **environ) as (_, server), Wire(server.port) as wire:
            await wire.send(head + start)
            return await wire.answer()

    status, _, _ = run(scenario(b"40000000\r\n"))
    assert status == 413
    small = b"258\r\n" + b" " * 600 + b"\r\n258\r\n"
    assert run(scenario(small, MAX_REQUEST_SIZE="1000"))[0] == 413


# ============================================================================
# 27. OTHER ENDPOINTS
# ============================================================================

COUNTS = [
    ("the plain request", req(), 8),
    ("without max_tokens", without(req(), "max_tokens"), 8),
    ("with any max_tokens and stream", req(max_tokens="x", stream="y"), 8),
    ("an image", req([usr([txt("Hi"), img])]), 1608),
]


@table(COUNTS)
def test_count_tokens(given, want):
    async def scenario():
        async with proxied(OK) as (upstream, server):
            answer = await ask(server.port, path="/v1/messages/count_tokens", body=given)
            return answer, upstream.requests

    (status, _, body), requests = run(scenario())
    assert (status, json.loads(body), requests) == (200, {"input_tokens": want}, [])


def test_count_tokens_rejects_what_messages_reject():
    async def scenario():
        async with proxied(OK) as (_, server):
            return await ask(server.port, path="/v1/messages/count_tokens",
                             body=without(req(), "messages"))

    assert said(run(scenario())) == "400 invalid_request_error: messages: Field required"


NAMES = ["claude-opus-5-5", "claude-sonnet-5-5", "claude-haiku-5-5", "claude-opus-5",
         "claude-sonnet-5", "claude-opus-4-8", "claude-sonnet-4-6", "claude-haiku-4-5"]

PAGES = [  # query, ids, has_more
    ("all", "", NAMES, False),
    ("as many as asked", "?limit=1000", NAMES, False),
    ("two", "?limit=2", NAMES[:2], True),
    ("the next two", "?limit=2&after_id=claude-sonnet-5-5", NAMES[2:4], True),
    ("the last two", "?limit=2&after_id=claude-opus-4-8", NAMES[6:], False),
    ("the two before", "?limit=2&before_id=claude-opus-5", NAMES[1:3], True),
    ("nothing after the last", "?after_id=claude-haiku-4-5", [], False),
    ("none that is retired", "?lifecycle=retired", [], False),
]


@table(PAGES, "query, ids, more")
def test_list_of_models(query, ids, more):
    async def scenario():
        async with proxied(OK) as (_, server):
            return await ask(server.port, "GET", "/v1/models" + query)

    status, _, body = run(scenario())
    found = json.loads(body)
    assert status == 200 and [model["id"] for model in found.pop("data")] == ids
    assert found == {"has_more": more, "first_id": ids[0] if ids else None,
                     "last_id": ids[-1] if ids else None}


def model(id, name, line):
    return {"type": "model", "id": id, "display_name": name, "created_at": "1970-01-01T00:00:00Z",
            "lifecycle": "active", "line": line, "max_input_tokens": None, "max_tokens": None,
            "capabilities": None, "deprecated_at": None, "retires_at": None}


GETS = [  # path, answer
    ("a listed model", "/v1/models/claude-sonnet-5-5",
     model("claude-sonnet-5-5", "Claude Sonnet 5.5 (gpt-4o)", "sonnet")),
    ("a Claude name", "/v1/models/claude-anything",
     model("claude-anything", "claude-anything (gpt-4o)", None)),
    ("a configured model", "/v1/models/gpt-4o", model("gpt-4o", "gpt-4o (gpt-4o)", None)),
    ("an unknown model", "/v1/models/nothing", NOT_FOUND + "model: nothing"),
    ("an unknown path", "/v1/skills", NOT_FOUND + "GET /v1/skills is not available here"),
    ("no page", "/v1/models?limit=0",
     "400 invalid_request_error: limit: Input should be between 1 and 1000"),
    ("no number", "/v1/models?limit=x",
     "400 invalid_request_error: limit: Input should be between 1 and 1000"),
    ("after nothing known", "/v1/models?after_id=x",
     "400 invalid_request_error: after_id: unknown model id"),
]


@table(GETS, "path, want")
def test_get(path, want):
    async def scenario():
        async with proxied(OK) as (_, server):
            return await ask(server.port, "GET", path)

    assert said(run(scenario())) == want


def test_methods_and_paths():
    async def scenario():
        async with proxied(OK) as (_, server):
            status, headers, _ = answer = await ask(server.port, "GET", "/v1/messages")
            assert (status, headers["allow"]) == (405, "POST")
            assert said(answer).startswith("405 invalid_request_error: ")
            assert said(await ask(server.port, path="/v1/messages/batches", body={})) == (
                NOT_FOUND + "POST /v1/messages/batches is not available here")
            status, _, body = await ask(server.port, "HEAD", "/api/hello")
            assert (status, body) == (404, b"")
            status, _, body = await ask(server.port, "HEAD", "/v1/models")
            assert (status, body) == (200, b"")

    run(scenario())


# ============================================================================
# 28. RUN
# ============================================================================

@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_signal_ends_an_idle_proxy_at_once(number, workers, tmp_path):
    with Program(tmp_path, "--port", "0", PID_FILE="p.pid", WORKERS=workers) as program:
        started = program.started() and program.lines[-1]
        assert "ANTHROPIC_BASE_URL" in started["message"] and started["upstream"] == "127.0.0.1"
        assert (tmp_path / "p.pid").read_text() == f"{program.process.pid}\n"
        idle = http.client.HTTPConnection("127.0.0.1", program.port)
        idle.request("GET", "/health")
        answer = json.loads(idle.getresponse().read())
        assert answer["pid"] == program.process.pid
        began = time.monotonic()
        program.signal(number)
        code, out, err = program.end()
        assert (code, err) == (0, "") and time.monotonic() - began < 1
        assert [json.loads(line)["event"] for line in out.splitlines()] == ["stopping", "stopped"]
        assert not (tmp_path / "p.pid").exists()
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", program.port), 1)
        idle.close()


def test_a_running_stream_may_end_after_SIGTERM(tmp_path):
    with Program(tmp_path, "--port", "0", "--demo") as program:
        program.started()
        connection, answer, start = program.streaming()
        program.signal(signal.SIGTERM)
        program.until("stopping")
        assert printed(start + answer.read()).endswith("MD(end_turn) ME")
        connection.close()
        assert program.end()[0] == 0


def test_streams_that_outlast_SIGTERM_end_in_an_error_event(tmp_path):
    with hanging_upstream() as url:
        with Program(tmp_path, "--port", "0", patch="aiapiproxy.DRAIN_TIME = 0.2",
                     OPENAI_BASE_URL=url) as program:
            program.started()
            streams = [program.streaming() for _ in range(3)]
            program.signal(signal.SIGTERM)
            for connection, answer, start in streams:
                assert printed(start + answer.read()) == 'MS 0+text 0t"x" ERR(overloaded_error)'
                connection.close()
            code, out, _ = program.end()
            assert code == 0
            outcomes = [json.loads(line).get("outcome") for line in out.splitlines()
                        if '"request"' in line]
            assert outcomes == ["shutdown"] * 3


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_second_signal_ends_it_at_once(workers, tmp_path):
    with hanging_upstream() as url, Program(tmp_path, "--port", "0", OPENAI_BASE_URL=url,
                                            WORKERS=workers) as program:
        program.started()
        connection, answer, start = program.streaming()
        program.signal(signal.SIGTERM)
        program.until("stopping")
        threading.Event().wait(0.1)  # as a person would send it
        began = time.monotonic()
        program.signal(signal.SIGTERM)
        with contextlib.suppress(http.client.HTTPException, OSError):
            answer.read()
        assert program.end()[0] == 0 and time.monotonic() - began < 2
        connection.close()


@pytest.mark.parametrize("stuck", ["a lookup", "a connect", "a TLS handshake"])
def test_an_upstream_that_is_stuck_does_not_hold_the_end(stuck, tmp_path):
    with contextlib.ExitStack() as stack:
        url = "http://stuck.example/v1"
        if stuck == "a connect":
            url = stack.enter_context(packet_hole())
        elif stuck == "a TLS handshake":
            silent = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            url = f"https://127.0.0.1:{silent.getsockname()[1]}/v1"
        with Program(tmp_path, "--port", "0", patch=STUCK_LOOKUP, OPENAI_BASE_URL=url,
                     REQUEST_TIMEOUT="0.2") as program:
            program.started()
            assert program.get("/v1/messages", "POST", json.dumps(req()))[0] == 504
            began = time.monotonic()
            program.signal(signal.SIGTERM)
            code, _, err = program.end()
    assert (code, err) == (0, "") and time.monotonic() - began < 2


@pytest.mark.parametrize("body", ["whole", "half"])
def test_a_second_signal_ends_it_with_a_request_in_any_state(body, tmp_path):
    with Program(tmp_path, "--port", "0", patch=STUCK_LOOKUP,
                 OPENAI_BASE_URL="http://stuck.example/v1") as program:
        program.started()
        with socket.create_connection(("127.0.0.1", program.port)) as client:
            client.sendall(POST(f"Content-Length: {len(HI)}", path="/v1/messages",
                                body=HI if body == "whole" else HI[:9]))
            wait_for(lambda: json.loads(program.get()[1])["in_flight"] == 1)
            program.signal(signal.SIGTERM)
            program.until("stopping")
            began = time.monotonic()
            program.signal(signal.SIGTERM)
            _, _, err = program.end()
            assert err == "" and time.monotonic() - began < 1


def test_a_PID_FILE_that_is_a_symlink_is_replaced(tmp_path):
    (tmp_path / "other").write_text("mine")
    (tmp_path / "p.pid").symlink_to("other")
    with Program(tmp_path, "--port", "0", PID_FILE="p.pid") as program:
        program.started()
        assert not (tmp_path / "p.pid").is_symlink()
        assert (tmp_path / "p.pid").read_text() == f"{program.process.pid}\n"
        program.signal(signal.SIGTERM)
        assert program.end()[0] == 0
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("other", "mine")]


def test_a_PID_FILE_in_the_folder_of_another_user_is_written_and_emptied_in_place(
        tmp_path, monkeypatch):
    path, opens = tmp_path / "p.pid", os.open

    def open_existing(name, flags, *mode, **options):
        if flags & os.O_CREAT and not os.path.exists(name):
            raise PermissionError(13, "Permission denied")
        return opens(name, flags, *mode, **options)

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    path.write_text("123456\n")
    for name, function in (("open", open_existing), ("unlink", refuse), ("replace", refuse)):
        monkeypatch.setattr(aiapiproxy.os, name, function)
    aiapiproxy.write_pid_file(str(path))
    assert path.read_text() == f"{os.getpid()}\n"
    aiapiproxy.remove_pid_file(str(path), os.getpid() + 1)
    assert path.read_text() == f"{os.getpid()}\n"
    aiapiproxy.remove_pid_file(str(path), os.getpid())
    assert path.read_text() == ""


def test_while_it_stops_it_is_not_ready():
    async def scenario():
        async with proxied(stream(ctext("x"), HANG)) as (_, server):
            async with Asking(server.port, "POST", "/v1/messages", req(stream=True)) as asking, \
                    Wire(server.port) as wire:
                await asking.until(b"text_delta")
                server.app.is_draining = True
                await wire.send(GET("/health/ready"))
                answer = await wire.answer()
                return answer[0], json.loads(answer[2])["status"]

    assert run(scenario()) == (503, "not_ready")


def test_SIGHUP_reads_the_file_again_and_keeps_connections_open(tmp_path):
    file = tmp_path / ".env"
    file.write_text("CLAUDE_OPUS_MODEL=first\n")
    file.chmod(0o600)
    with hanging_upstream() as url, Program(tmp_path, "--port", "0",
                                            OPENAI_BASE_URL=url) as program:
        program.started()
        kept = http.client.HTTPConnection("127.0.0.1", program.port, timeout=10)

        def opus():
            kept.request("GET", "/v1/models/claude-opus-5-5")
            return json.loads(kept.getresponse().read())["display_name"]

        running_stream, _, _ = program.streaming()
        assert opus() == "Claude Opus 5.5 (first)"
        sock = kept.sock
        file.write_text("CLAUDE_OPUS_MODEL=second\nLOG_LEVEL=debug\n")
        program.signal(signal.SIGHUP)
        program.until("reloaded")
        assert opus() == "Claude Opus 5.5 (second)"
        file.write_text("CLAUDE_OPUS_MODEL=third\nREQUEST_TIMEOUT=soon\n")
        program.signal(signal.SIGHUP)
        line = program.until("reload_failed", program.process.stderr)
        assert line["level"] == "error" and "REQUEST_TIMEOUT" in line["message"]
        assert opus() == "Claude Opus 5.5 (second)" and kept.sock is sock
        assert json.loads(program.get()[1])["in_flight"] == 1
        running_stream.close()
        kept.close()


def become_folder(file):
    file.unlink()
    file.mkdir()


def become_loop(file):
    file.unlink()
    file.symlink_to(file)


def without_line(name):
    def spoil(file):
        lines = file.read_text().splitlines(True)
        file.write_text("".join(line for line in lines if not line.startswith(name)))
    return spoil


SPOILED = [  # a change of the file, reason
    ("it is a folder", become_folder, "./.env cannot be read: Is a directory"),
    ("it is a symlink to itself", become_loop,
     f"./.env cannot be read: {os.strerror(errno.ELOOP)}"),
    ("it is removed", pathlib.Path.unlink, "./.env is missing"),
    ("it has 0 bytes", lambda file: file.write_text(""), "./.env is empty"),
    ("it has comments only", lambda file: file.write_text("# A=b\n\n"), "./.env is empty"),
    ("it has NUL bytes only", lambda file: file.write_bytes(bytes(4096)), "./.env is empty"),
    ("it ends in the middle of a name",
     lambda file: file.write_text(file.read_text().partition("I_KEY=team")[0]),
     "PROXY_API_KEY is no longer set in ./.env; restart to serve without it"),
    *((f"{name} is left out", without_line(name),
       f"{name} is no longer set in ./.env; restart to serve without it")
      for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY", "ALLOWED_ORIGINS")),
]


@table(SPOILED, "spoil, reason")
def test_SIGHUP_changes_nothing_while_the_file_is_spoiled(spoil, reason, tmp_path):
    with Owned(tmp_path) as owned:
        spoil(owned.file)
        assert owned.failure() == f"the old settings stay: {reason}"
        owned.asserts_that_nothing_is_looser()


def test_SIGHUP_replaces_a_key_that_clients_must_present(tmp_path):
    with Owned(tmp_path) as owned:
        assert owned.post(TEAM) == 200
        owned.write({**owned.lines, "PROXY_API_KEY": "other-key-0123456789"})
        owned.program.signal(signal.SIGHUP)
        owned.program.until("reloaded")
        assert (owned.post(TEAM), owned.post("other-key-0123456789")) == (401, 200)


def test_SIGHUP_without_any_file_is_a_reload_of_nothing(tmp_path):
    with Program(tmp_path, "--port", "0") as program:
        program.started().signal(signal.SIGHUP)
        assert program.until("reloaded")["level"] == "info"


def test_every_address_that_is_listened_on_is_in_the_first_line(tmp_path):
    with Program(tmp_path, "--port", "0", SERVER_HOST="0.0.0.0", PROXY_API_KEY=TEAM) as program:
        line = program.started().lines[-1]
        assert line["listens"] == [f"0.0.0.0:{program.port} (every network)"]
        assert f"listens on 0.0.0.0:{program.port} (every network), " in line["message"]
        assert f"ANTHROPIC_BASE_URL=http://127.0.0.1:{program.port} " in line["message"]


@pytest.mark.skipif(sys.platform == "darwin", reason="a Mac has 127.0.0.1 alone")
def test_each_of_several_addresses_is_in_the_first_line(tmp_path):
    with Program(tmp_path, "--port", "0", SERVER_HOST="127.0.0.1,127.0.0.2") as program:
        line = program.started().lines[-1]
        both = [f"http://127.0.0.1:{program.port}", f"http://127.0.0.2:{program.port}"]
        assert line["listens"] == both and f"listens on {', '.join(both)}, " in line["message"]


def test_the_process_loads_nothing_from_its_working_folder_and_is_small_at_idle(tmp_path):
    (tmp_path / "argparse.py").write_text("print('foreign')")
    with Program(tmp_path, "--port", "0") as program:
        program.started()
        assert json.loads(program.get()[1])["pid"] == program.process.pid
        with contextlib.suppress(FileNotFoundError):  # only Linux has /proc
            status = pathlib.Path(f"/proc/{program.process.pid}/status").read_text()
            size = int(re.search(r"VmRSS:\s+(\d+)", status)[1])
            assert size < 55_000, "kB at idle"


# ============================================================================
# 29. RECORD AND REPLAY
# ============================================================================

def test_an_exchange_is_recorded_and_replayed(tmp_path):
    words = [creason("r"), ctext(f"my key is {KEY}"), frag(0, "call_1", "f", '{"a":1}'),
             cend("tool_calls"), cuse(5, 3), DONE]
    asked = req(stream=True, thinking=ADAPTIVE, tools=[tool("f")])
    records = str(tmp_path / "records")
    (_, headers, body), _ = run(asked_once(stream(*words), asked, RECORD_DIR=records))
    (path,) = (tmp_path / "records").iterdir()
    assert headers["request-id"] in path.name and path.stat().st_mode & 0o777 == 0o600
    assert KEY not in path.read_text()
    replayed = subprocess.run([sys.executable, aiapiproxy.__file__, "--replay", str(path)],
                              stdout=subprocess.PIPE, check=True, timeout=20).stdout
    assert printed(replayed) == printed(body).replace(KEY, f"sk-...{KEY[-4:]}")


@pytest.mark.parametrize("streaming", [True, False])
def test_a_key_that_is_cut_by_the_borders_of_reads_is_not_recorded(streaming, tmp_path):
    words = [ctext(f"your key is {KEY} ok"), cend("stop"), cuse(5, 3), DONE]
    whole = sse(words) if streaming else json.dumps(completion(words[0]["choices"][0]["delta"],
                                                               usage=used(5, 3))).encode()
    begin = whole.index(KEY.encode())
    cuts = [0, begin + 3, begin + 8, begin + 20, len(whole)]

    async def scenario():
        gates = [asyncio.Event() for _ in cuts[2:]]
        parts = [piece for start, end, gate in zip(cuts, cuts[1:], [*gates, None])
                 for piece in (whole[start:end], gate) if piece]
        kind = "text/event-stream" if streaming else "application/json"
        script = [reply_head(200, content_type=kind),
                  *(framed(part) if isinstance(part, bytes) else part for part in parts),
                  b"0\r\n\r\n", END]
        async with proxied(script, RECORD_DIR=str(tmp_path)) as (upstream, server):
            asking = asyncio.ensure_future(ask(server.port, body=req(stream=streaming)))
            await upstream.asked.wait()
            for gate in gates:
                await asyncio.sleep(0.03)        # the proxy reads the piece before
                gate.set()
            return await asking

    body = run(scenario())[2]
    (path,) = tmp_path.iterdir()
    record = json.loads(path.read_text())
    assert len(record["upstream"]) >= 4 and path.stat().st_mode & 0o777 == 0o600
    for name in ("upstream", "events"):
        assert KEY not in "".join(data for _, data in record[name])
    replayed = subprocess.run([sys.executable, aiapiproxy.__file__, "--replay", str(path)],
                              stdout=subprocess.PIPE, check=True, timeout=20).stdout
    mark = f"sk-...{KEY[-4:]}" if len(KEY) >= 16 else "[key]"
    if streaming:
        assert printed(replayed) == printed(body).replace(KEY, mark)
    else:
        assert f"your key is {mark} ok".encode() in replayed


def test_what_is_not_a_record_is_not_replayed(tmp_path, capfd):
    (tmp_path / "x.json").write_text("[]")
    for path in (tmp_path / "x.json", tmp_path / "nothing"):
        assert aiapiproxy.main(["--replay", str(path)]) == 1
    assert len(capfd.readouterr().err.splitlines()) == 2


def test_old_records_make_room_for_new_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(aiapiproxy, "RECORDED_FILES", 2)
    (tmp_path / "mine.json").write_text("kept")

    async def scenario():
        async with proxied(OK, RECORD_DIR=str(tmp_path)) as (_, server):
            for _ in range(4):
                await ask(server.port, body=req())

    run(scenario())
    assert len(list(tmp_path.iterdir())) == 3 and (tmp_path / "mine.json").exists()


# ============================================================================
# 30. CHECK
# ============================================================================

def models_answer(*names):
    models = {"object": "list", "data": [{"id": name} for name in names]}
    return raw_answer(json.dumps(models).encode(), "Connection: close")


CHECKS = [  # the upstream's answer to GET /models, exit code, words of the report
    ("all is well", models_answer("gpt-4o", "gpt-4o-mini", "gpt-5.1"), 0,
     ["CLAUDE_OPUS_MODEL gpt-5.1 is there"]),
    ("a model is missing", models_answer("gpt-4o", "gpt-4o-mini"), 1,
     ["fail  CLAUDE_OPUS_MODEL gpt-5.1"]),
    ("the key is not accepted", raw_answer(b"{}", status=401), 1,
     ["fail  the upstream answered 401", "OPENAI_API_KEY"]),
    ("no list", raw_answer(b"{}", status=404), 0, ["warn  the upstream answered 404"]),
    ("not a list", raw_answer(b"[1]"), 0, ["warn  the upstream's list"]),
    ("it fails", raw_answer(b"{}", status=500), 1, ["fail  the upstream answered 500"]),
    ("it closes", b"", 1, ["fail  Cannot connect"]),
]


@table(CHECKS, "answer, code, words")
def test_check(answer, code, words, tmp_path):
    async def scenario():
        async with RawUpstream([answer]) as upstream:
            process = await asyncio.create_subprocess_exec(
                sys.executable, aiapiproxy.__file__, "--check", "--port", "1", cwd=str(tmp_path),
                stdout=-1, stderr=-1,
                env={"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": upstream.url, **MODELS})
            return (*await process.communicate(), process.returncode, upstream.heads)

    out, err, got, heads = run(scenario())
    text = out.decode()
    assert (got, err) == (code, b"") and all(word in text for word in words), text
    assert KEY not in text
    assert all(re.match("(ok   |warn |fail ) ", line) for line in text.splitlines())
    assert heads[0].startswith("GET /v1/models HTTP/1.1")
    assert f"Authorization: Bearer {KEY}" in heads[0]


# ============================================================================
# 31. DEMO
# ============================================================================

def test_the_demo_streams_a_message_and_calls_a_tool(tmp_path):
    weather = tool("get_weather", {"type": "object", "properties": {"city": {"type": "string"}},
                                   "required": ["city"]})
    with Program(tmp_path, "--demo", "--port", "0") as program:
        program.started()
        _, body = program.get("/v1/messages", "POST", json.dumps(req([usr("Hello")], stream=True)))
        assert printed(body).endswith("0- MD(end_turn) ME") and b"demo" in body
        asked = req([usr("Use get_weather")], tools=[weather])
        _, body = program.get("/v1/messages", "POST", json.dumps(asked))
        call = json.loads(body)["content"][-1]
        assert (call["name"], call["input"]) == ("get_weather", {"city": "demo"})
        result = [usr("Use get_weather"), asst([call]), usr([res(call["id"], "sunny")])]
        _, body = program.get("/v1/messages", "POST", json.dumps(req(result, tools=[weather])))
        assert "sunny" in json.loads(body)["content"][0]["text"]


# ============================================================================
# 32. STATUS PAGE
# ============================================================================

def test_the_page_is_for_browsers_and_loads_nothing_from_elsewhere():
    async def scenario():
        settings = aiapiproxy.load_settings({"OPENAI_API_KEY": KEY}, server_port=0)
        server = aiapiproxy.Service(settings, aiapiproxy.STATUS_PAGE)
        await server.start()
        try:
            page = await ask(server.port, "GET", "/", accept="text/html")
            return page, await ask(server.port, "GET", "/", accept="application/json")
        finally:
            await server.drain(1)

    (status, headers, page), (_, _, plain) = run(scenario())
    assert status == 200 and headers["content-type"] == "text/html; charset=utf-8"
    assert headers["content-security-policy"].startswith("default-src 'none'")
    assert re.findall(rb"""(?:src|href)=["']?(?:https?:)?//""", page) == []
    assert b"innerHTML" not in page
    assert json.loads(plain)["name"] == "aiapiproxy"


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or ""


@pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed")
def test_a_browser_shows_the_requests_and_runs_nothing_of_them(tmp_path):
    hostile = "<img src=x onerror=document.title='broken'>"
    with Program(tmp_path, "--demo", "--port", "0") as program:
        program.started()
        program.get("/v1/messages", "POST", json.dumps({**req([usr("Hello")]), "model": hostile}))
        command = [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
            "--no-first-run", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=3000", "--dump-dom", f"http://127.0.0.1:{program.port}/"]
        page = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                              timeout=15, check=True).stdout.decode()
    assert "Ready" in page and "aiapiproxy-demo" in page and "<title>broken" not in page
    assert "&lt;img src=x" in page and "<img" not in page


# ============================================================================
# 33. WORKERS
# ============================================================================

def total_requests(program):
    _, body = program.get("/metrics")
    return sum(map(int, re.findall(r'requests_total\{route="other".* (\d+)\n', body.decode())))


def test_workers_share_a_socket_add_up_their_counters_and_are_replaced(tmp_path):
    with Program(tmp_path, "--port", "0", WORKERS="2") as program:
        program.started()
        wait_for(lambda: len(children(program.process.pid)) == 2)
        first = children(program.process.pid)
        for _ in range(40):
            assert program.get("/x")[0] == 404
        wait_for(lambda: total_requests(program) == 40)
        threading.Event().wait(0.3)  # a worker writes its counters regularly
        killed = min(first)
        os.kill(killed, signal.SIGKILL)
        died = program.until("worker_died", program.process.stderr)
        assert died["level"] == "error" and str(killed) in died["message"]
        assert program.get()[0] == 200  # while it is being replaced
        wait_for(lambda: len(children(program.process.pid)) == 2
                 and killed not in children(program.process.pid))
        for _ in range(20):
            assert program.get("/x")[0] == 404
        wait_for(lambda: total_requests(program) == 60)
        workers = children(program.process.pid)
        program.signal(signal.SIGTERM)
        assert program.end()[0] == 0 and not any(is_alive(pid) for pid in workers)


def test_a_new_worker_has_the_reloaded_settings(tmp_path):
    file = tmp_path / ".env"
    file.write_text("CLAUDE_OPUS_MODEL=first\n")
    file.chmod(0o600)
    patch = "aiapiproxy.WORKER_PAUSE = 0"
    with Program(tmp_path, "--port", "0", WORKERS="2", patch=patch) as program:
        program.started()
        wait_for(lambda: len(children(program.process.pid)) == 2 and program.get()[0] == 200)
        file.write_text("CLAUDE_OPUS_MODEL=second\n")

        def reloaded():
            program.signal(signal.SIGHUP)
            program.until("reloaded")
            return all(b"(second)" in program.get("/v1/models/claude-opus-5-5")[1]
                       for _ in range(20))

        wait_for(reloaded)
        for killed in children(program.process.pid):
            os.kill(killed, signal.SIGKILL)
            program.until("worker_died", program.process.stderr)
        for _ in range(20):
            assert b"(second)" in program.get("/v1/models/claude-opus-5-5")[1]


@table([("is a folder", become_folder, "./.env cannot be read: Is a directory"),
        ("has lost a line", without_line("PROXY_API_KEY"),
         "PROXY_API_KEY is no longer set in ./.env; restart to serve without it")], "spoil, reason")
def test_a_file_that_is_spoiled_changes_no_worker_and_is_told_once(spoil, reason, tmp_path):
    with Owned(tmp_path, WORKERS="2") as owned:
        spoil(owned.file)
        assert owned.failure() == f"the old settings stay: {reason}"
        for _ in range(16):
            owned.asserts_that_nothing_is_looser()
        owned.program.signal(signal.SIGTERM)
        assert owned.program.end()[2] == ""


def test_all_workers_take_the_settings_that_were_read_once(tmp_path):
    reading = "read = aiapiproxy.read_variables; aiapiproxy.read_variables = lambda options: (" \
        "open('reads', 'a').write('x'), read(options))[1]"
    with Owned(tmp_path, WORKERS="2", patch=reading) as owned:
        wait_for(lambda: len(children(owned.program.process.pid)) == 2)
        owned.write({**owned.lines, "PROXY_API_KEY": "other-key-0123456789"})
        owned.program.signal(signal.SIGHUP)
        for _ in range(2):
            owned.program.until("reloaded")
        assert [owned.post(TEAM) for _ in range(8)] == [401] * 8
        assert [owned.post("other-key-0123456789") for _ in range(8)] == [200] * 8
        assert (tmp_path / "reads").read_text() == "xx"              # the start, and SIGHUP


def test_a_worker_that_replaces_a_dead_one_has_the_settings_in_force(tmp_path):
    patch = "aiapiproxy.WORKER_PAUSE = 0"
    with Owned(tmp_path, WORKERS="2", patch=patch) as owned:
        wait_for(lambda: len(children(owned.program.process.pid)) == 2)
        first = children(owned.program.process.pid)
        owned.file.write_text("")
        for pid in first:
            os.kill(pid, signal.SIGKILL)
            owned.program.until("worker_died", owned.program.process.stderr)
        wait_for(lambda: len(children(owned.program.process.pid) - first) == 2)
        for _ in range(16):
            owned.asserts_that_nothing_is_looser()


def test_several_workers_stop_accepting_at_once(tmp_path):
    with hanging_upstream() as url, Program(tmp_path, "--port", "0", OPENAI_BASE_URL=url,
                                            WORKERS="2") as program:
        program.started()
        connection, _, _ = program.streaming()
        program.signal(signal.SIGTERM)
        program.until("stopping")

        def is_refused():
            with contextlib.suppress(ConnectionResetError):
                try:
                    socket.create_connection(("127.0.0.1", program.port), 1).close()
                except ConnectionRefusedError:
                    return True
            return False

        began = time.monotonic()
        wait_for(is_refused)
        assert time.monotonic() - began < 2
        connection.close()


def test_workers_end_with_their_parent(tmp_path):
    with Program(tmp_path, "--port", "0", WORKERS="2", stdout=subprocess.PIPE) as program:
        program.started()
        wait_for(lambda: len(children(program.process.pid)) == 2 and program.get()[0] == 200)
        workers = children(program.process.pid)
        program.process.kill()
        program.process.wait()
        wait_for(lambda: not any(is_alive(pid) for pid in workers))


@pytest.mark.parametrize("is_ours", [True, False], ids=["its own", "another"])
def test_workers_whose_supervisor_was_killed_end_soon_and_remove_its_PID_FILE(is_ours, tmp_path):
    pid_file = tmp_path / "p.pid"
    with hanging_upstream() as url, Program(tmp_path, "--port", "0", WORKERS="2", PID_FILE="p.pid",
                                            OPENAI_BASE_URL=url) as program:
        program.started()
        wait_for(lambda: len(children(program.process.pid)) == 2 and program.get()[0] == 200)
        connection, _, _ = program.streaming()
        workers = children(program.process.pid)
        if not is_ours:
            pid_file.write_text("123456\n")
        began = time.monotonic()
        program.process.kill()
        program.process.wait()
        wait_for(lambda: not any(is_alive(pid) for pid in workers))
        assert time.monotonic() - began < 3 and pid_file.exists() != is_ours
        connection.close()


def test_a_worker_that_is_stopped_holds_neither_the_others_nor_the_end(tmp_path):
    with Program(tmp_path, "--port", "0", WORKERS="2") as program:
        program.started()
        wait_for(lambda: len(children(program.process.pid)) == 2 and program.get()[0] == 200)
        os.kill(min(children(program.process.pid)), signal.SIGSTOP)
        for _ in range(10):
            assert program.get("/x")[0] == 404
        began = time.monotonic()
        program.signal(signal.SIGTERM)
        assert program.end()[0] == 0 and time.monotonic() - began < 3


def counted(total, *more):
    """Counts of a worker that has answered `total` requests."""
    return {"sums": {"requests_total": {'route="other",status="404",outcome="rejected"': total},
                     **dict(more)},
            "in_flight": 0, "idle": 0, "recent": [], "minutes": [], "adjustments": []}


@table([("text that is no JSON", b"{{{" * 90000), ("zeros", bytes(270000)),
        ("a head that claims more than a slot has", b"\xff" * 48), ("a few bytes of it", b"{{{"),
        ("one byte of the JSON", b"")], "torn")
def test_a_slot_that_makes_no_sense_counts_as_before(torn):
    counters = aiapiproxy.SharedCounters(2)

    async def scenario():
        settings = aiapiproxy.load_settings({"OPENAI_API_KEY": KEY}, server_port=0)
        server = aiapiproxy.Service(settings, counters=counters)
        await server.start()
        counters.write(1, counted(5))
        counters.write(1, counted(7))
        found = [await ask(server.port, "GET", "/metrics")]
        memory, half = counters._memory, aiapiproxy.HALF_SIZE
        for start in (2 * half, 3 * half):
            memory[start:start + len(torn[:half])] = torn[:half]
            memory[start + 60] ^= 0xff
        found += [await ask(server.port, "GET", "/metrics"),
                  await ask(server.port, "GET", "/health")]
        counters.write(1, counted(8))
        found.append(await ask(server.port, "GET", "/metrics"))
        await server.drain(0)
        return found

    first, second, health, third = run(scenario())
    line = b'aiapiproxy_requests_total{route="other",status="404",outcome="rejected"} '
    assert health[0] == 200 and line + b"7\n" in first[2]
    assert line + b"7\n" in second[2] and line + b"8\n" in third[2]


def test_a_worker_that_dies_while_it_writes_leaves_its_last_counts():
    counters = aiapiproxy.SharedCounters(1)
    counters.write(0, counted(5))
    head = aiapiproxy.SLOT_HEAD
    with mock.patch.object(aiapiproxy, "SLOT_HEAD", mock.Mock(wraps=head, size=head.size)) as dying:
        dying.pack_into.side_effect = SystemExit
        with pytest.raises(SystemExit):
            counters.write(0, counted(6))
    assert counters.read(0) == counted(5)


def test_figures_that_do_not_fit_leave_labels_out_rarest_first_and_no_amount():
    series = {f'kind="input",model="{index:03}{"m" * 97}"': 1000 - index for index in range(3000)}
    value = counted(7, ("tokens_total", series))
    value["recent"] = [{"error": "x" * 9000}] * 50
    counters = aiapiproxy.SharedCounters(1)
    counters.write(0, value)
    found = counters.read(0)
    tokens = found["sums"]["tokens_total"]
    assert sum(tokens.values()) == sum(series.values())
    assert sum(found["sums"]["requests_total"].values()) == 7
    kept = {labels for labels in tokens if "other" not in labels}
    left_out = found["sums"]["labels_left_out"][""]
    assert kept and left_out + len(kept) in (len(series), len(series) + 1)
    assert min(series[each] for each in kept) >= max(
        amount for labels, amount in series.items() if labels not in kept)


# ============================================================================
# 34. SPEED
# ============================================================================

CHUNK_TEXTS = ["the ", "quick", "\n", "\t", '"', "\\", "é", "中", "😀", "\ud83d", "", " ", "{",
               "}", "/", "\x7f", "\u2028", "a\\nb"]


@pytest.mark.parametrize("size", [70, 3000, 65536])
@pytest.mark.parametrize("kind", ["text", "reasoning", "arguments"])
def test_runs_of_chunks_give_the_same_bytes_as_single_chunks(kind, size):
    dice = random.Random(f"{kind} {size}")
    texts = [dice.choice(CHUNK_TEXTS if dice.random() < 0.2 else CHUNK_TEXTS[:2])
             for _ in range(600)]
    if kind == "arguments":
        whole = json.dumps({"a": "".join(texts)}, ensure_ascii=False)
        cuts = [0, *sorted(dice.randrange(len(whole)) for _ in range(400)), len(whole)]
        chunks = [frag(0, "call_1", "f", ""), *(frag(0, "-", "-", whole[start:end])
                                                for start, end in zip(cuts, cuts[1:]))]
    else:
        chunks = [ctext(text) if kind == "text" else creason(text) for text in texts]
    raw = sse([*chunks, cend("stop"), DONE])

    translation = aiapiproxy.checked_translation(
        req(stream=True, thinking=ADAPTIVE, tools=[tool("f")]), SETTINGS["local"])
    pieces = [raw[place:place + size] for place in range(0, len(raw), size)]
    plain, short = (streamed(pieces, translation, each)
                    for each in (aiapiproxy.PLAIN, aiapiproxy.SHORTCUTS))
    assert plain == short and printed(plain).endswith(" ME")


def parsed(text, parse):
    """(the value with the order of its keys, the error) of a client's JSON text."""
    try:
        return compact(parse(text)), None
    except aiapiproxy.ProxyError as error:
        return None, error.message


TOOLS_TEXT = compact([tool("f", LOOSE), tool("g")])


@table([
    ("in the middle", '{"a":1,"tools":[…],"b":{"c":[]}}'),
    ("at the end", '{"a":1,"tools":[…]}'),
    ("alone", '{"tools":[…]}'),
    ("with blanks", ' {"a" : 1 ,\n"tools" :\t[…]\r\n, "b" : 2 } '),
    ("no array", '{"tools":{"tools":1}}'),
    ("in an object", '{"a":{"tools":[…]},"b":1}'),
    ("in an object, and at the top", '{"tools":[…],"a":{"tools":[…]}}'),
    ("in an array", '[{"tools":[…]}]'),
    ("in a text", '{"a":"\\"tools\\":[…","tools":[…]}'),
    ("the end of another key", '{"tools":1,"my\\"tools":[…]}'),
    ("twice", '{"tools":1,"tools":[…]}'),
    ("twice the other way", '{"tools":[…],"tools":1}'),
    ("twice with an escape", '{"tools":[…],"tool\\u0073":1}'),
    ("another key twice", '{"a":1,"b":2,"tools":[…],"a":3}'),
    ("a comma too many", '{"a":1,"tools":[…],}'),
    ("a comma too few", '{"a":1,"tools":[…]"b":1}'),
    ("a comma before it too few", '{"a":1 "tools":[…]}'),
    ("no end", '{"a":1,"tools":[…]'),
    ("more after the end", '{"a":1,"tools":[…]}}'),
    ("a blank that is none in JSON", '{"a":1,"tools":[…]\x0b,"b":1}'),
    ("NaN before it", '{"a":NaN,"tools":[…]}'),
    ("NaN after it", '{"tools":[…],"a":\n[NaN}'),
    ("broken inside", '{"tools":[…,]}'),
    ("nested too deeply", '{"tools":[…],"a":' + "[" * 100000),
], "text")
def test_a_body_with_cached_tools_is_parsed_like_any_other(text):
    for inside in (TOOLS_TEXT[1:-1], "", '{"name":1}', '"tools":[', "\\"):
        given = text.replace("…", inside)
        want = parsed(given, aiapiproxy.client_json)
        for _ in range(2):
            assert parsed(given, aiapiproxy.parse_with_cached_tools) == want


def test_the_cache_of_tools_is_bounded():
    def memory():
        return sum(map(aiapiproxy.tools_memory, aiapiproxy.TOOLS_CACHE))

    for count in (*range(1, 30), *range(1000, 9000, 1000)):
        text = compact(req(tools=[tool(f"f{index}", LOOSE) for index in range(count)]))
        aiapiproxy.parse_with_cached_tools(text)
        assert len(aiapiproxy.TOOLS_CACHE) <= 8 and memory() <= 4194304
    small = [compact(req(tools=[tool(name)])) for name in "abcdefgh"]
    for text in [*small, small[0], compact(req(tools=[tool("i")]))]:
        aiapiproxy.parse_with_cached_tools(text)
    # The one that was not used for the longest time has left.
    assert [key[10] for key in aiapiproxy.TOOLS_CACHE] == list("cdefghai")


def test_no_request_gets_the_cached_tools_of_another():
    def body(asked, adjustments=None, host="openai"):
        params = aiapiproxy.parse_with_cached_tools(compact(asked))
        translation = aiapiproxy.checked_translation(params, SETTINGS[host])
        plain = aiapiproxy.checked_translation(
            aiapiproxy.client_json(compact(asked)), SETTINGS[host])
        for each in (translation, plain):
            aiapiproxy.apply_adjustments(adjustments or {}, each)
        written = aiapiproxy.encode_with_cached_tools(translation.body)
        assert written == aiapiproxy.json_bytes(plain.body)
        assert aiapiproxy.estimated_request_tokens(translation.body, aiapiproxy.cached_tokens) \
            == aiapiproxy.estimated_request_tokens(plain.body)
        return json.loads(written)

    first = [tool("f", STRICT, strict=True), tool("ToolSearch"),
             tool("g", LOOSE, defer_loading=True), WEB_SEARCH]
    second = [tool("f", LOOSE), *first[1:]]
    found = [res("call_1", [reference("g")])]
    loading = [usr("a"), asst([use("call_1", "ToolSearch")]), usr(found)]
    added = [{"role": "system", "content": [{"type": "tool_addition", "tool": tool("h")}]}]
    simplified = {"schemas_simplified": True, "strict_dropped": True}
    dropped = {"keywords_dropped": ["type"], "schemas_without_keywords": True}
    for _ in range(2):
        for tools in (first, second):
            for messages in ([usr("a")], loading, [usr("a"), *added], [usr("a")]):
                for adjustments in ({}, simplified, {"descriptions_cut": 1}, dropped, {}):
                    for host in ("openai", "local"):
                        body(req(messages, tools=tools), adjustments, host)
    names = [[item["function"]["name"] for item in body(req(messages, tools=first))["tools"]]
             for messages in ([usr("a")], loading)]
    assert names == [["f", "ToolSearch"], ["f", "ToolSearch", "g"]]


# ============================================================================
# 35. COMMAND LINE
# ============================================================================

def test_a_port_in_use_is_named(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for workers in ("1", "2"):
            with Program(tmp_path, "--port", str(port), WORKERS=workers) as program:
                code, out, err = program.end()
            assert code == 1 and out == "" and err.count("\n") == 1
            assert str(port) in err and f"lsof -i :{port}" in err


ALIASES = ("RUST_LOG", "TOKIO_WORKER_THREADS", "https_proxy", "http_proxy")
ALL_BAD = {name: value for name, value in BAD_VALUES.items() if name not in ALIASES}

ONE_LINE = [  # arguments, environment, exit code, words on stderr
    ("bad values are all named", [], ALL_BAD, 78, sorted(ALL_BAD)),
    ("an alias is named", [], {"TOKIO_WORKER_THREADS": "x"}, 78, ["TOKIO_WORKER_THREADS"]),
    ("in JSON, when asked", [], {"SERVER_PORT": "x", "LOG_FORMAT": "json"}, 78, ["SERVER_PORT"]),
    ("beyond loopback", [], {"SERVER_HOST": "0.0.0.0"}, 78, ["SERVER_HOST", "PROXY_API_KEY"]),
    ("beyond loopback by an option", ["--host", "0.0.0.0"], {}, 78, ["0.0.0.0", "PROXY_API_KEY"]),
    ("an address that is none", ["--host", "a/b"], {}, 78, ["--host"]),
    ("an address of another machine", ["--host", "192.0.2.1", "--port", "0"],
     {"OPENAI_API_KEY": ""}, 1, ["192.0.2.1"]),
    ("a name that does not exist", ["--host", "nowhere.invalid"], {"OPENAI_API_KEY": ""}, 1,
     ["nowhere.invalid"]),
    ("an --env-file that is not there", ["--env-file", "none"], {}, 78, ["--env-file none"]),
    ("an --env-file that is a folder", ["--env-file", "."], {}, 78, ["--env-file ."]),
    ("a certificate that is not there", ["--port", "0"],
     {"SSL_CERT_FILE": "none.pem", "OPENAI_BASE_URL": "https://127.0.0.1/"}, 78, ["SSL_CERT_FILE"]),
    ("an unknown option", ["--fast"], {}, 2, ["--fast"]),
    ("a port that is none", ["--port", "x"], {}, 2, ["--port"]),
    ("a port too large", ["--port", "65536"], {}, 2, ["--port"]),
    ("--port without one", ["--port"], {}, 2, ["--port"]), ("a word", ["serve"], {}, 2, ["serve"]),
]


@table(ONE_LINE, "arguments, environ, code, words")
def test_a_start_that_fails_says_why_in_a_line(arguments, environ, code, words, tmp_path):
    with Program(tmp_path, *arguments, **environ) as program:
        got, out, err = program.end()
    assert (got, out) == (code, "") and all(word in err for word in words), err
    assert "Traceback" not in err
    if code != 2:
        assert err.count("\n") == (1 if len(words) < 5 else len(words)), err
    if environ.get("LOG_FORMAT") == "json":
        assert json.loads(err)["level"] == "error"


EXPOSED = [  # settings that would show or lend SECRET, words of the line
    *((f"an address beyond loopback and {name}", {
        "SERVER_HOST": "0.0.0.0", "OPENAI_API_KEY": "", **more},
       ["SERVER_HOST", "PROXY_API_KEY", *more]) for name, more, _ in LENDERS),
    *((url.replace(SECRET, "X"), {"OPENAI_BASE_URL": url}, ["OPENAI_BASE_URL"]) for url in (
        f"https://{SECRET}@h/v1", f"https://u:{SECRET}@h/v1", f"u:{SECRET}@h/v1",
        f"h/v1?key={SECRET}", f"https://h:99999/v1?key={SECRET}", f"https://:{SECRET}@h/v1")),
]


@table(EXPOSED, "environ, words")
def test_a_start_that_would_expose_a_credential_fails_and_does_not_show_it(
        environ, words, tmp_path):
    with Program(tmp_path, "--port", "0", **environ) as program:
        code, out, err = program.end()
    assert (code, out, err.count("\n")) == (78, "", 1) and SECRET not in err
    assert all(word in err for word in words)


def test_an_env_file_that_cannot_be_read_ends_the_start(tmp_path):
    (tmp_path / ".env").mkdir()
    with Program(tmp_path, "--port", "0") as program:
        assert program.end() == (
            78, "", "aiapiproxy: ./.env cannot be read: Is a directory\n")


def test_an_env_file_that_is_empty_at_the_start_is_warned_of(tmp_path):
    (tmp_path / ".env").write_text("")
    (tmp_path / ".env").chmod(0o600)
    with Program(tmp_path, "--port", "0") as program:
        assert program.started().get()[0] == 200
        program.signal(signal.SIGTERM)
        (line,) = program.end()[2].splitlines()
    assert (json.loads(line)["level"], json.loads(line)["message"]) == (
        "warn", "./.env is empty: no setting is read from it")


@table([("without a file", "none.env", ""), ("with a second file", "second.env", "o1"),
        ("with a second file that cannot be read", ".", "")], "second, opus")
def test_a_first_file_that_is_not_there_is_not_missed(second, opus, tmp_path):
    (tmp_path / "second.env").write_text("CLAUDE_OPUS_MODEL=o1\n")
    (tmp_path / "second.env").chmod(0o600)
    patch = f"aiapiproxy.ENV_FILES = ('./.env', {second!r})"
    with Program(tmp_path, "--port", "0", patch=patch, CLAUDE_OPUS_MODEL="") as program:
        assert program.started().lines[-1]["models"]["opus"] == (opus or "gpt-4")
        program.signal(signal.SIGTERM)
        assert program.end()[2] == ""


def test_a_working_folder_that_may_not_be_searched_has_no_file(monkeypatch, tmp_path):
    def look(path):
        raise PermissionError(errno.EACCES, "Permission denied")

    (tmp_path / ".env").write_text("CLAUDE_OPUS_MODEL=o1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "lstat", look)
    assert aiapiproxy.read_env_file(None) == ("", b"", 0)


def test_the_format_of_the_log_that_the_file_names_counts_for_its_own_errors(tmp_path):
    (tmp_path / ".env").write_text("LOG_FORMAT=json\nREQUEST_TIMEOUT=soon\nWORKERS=x\n")
    with Program(tmp_path, "--port", "0") as program:
        code, out, err = program.end()
    lines = [json.loads(line) for line in err.splitlines()]
    assert (code, out) == (78, "") and [line["message"] for line in lines] == [
        "REQUEST_TIMEOUT 'soon' is not a number", "WORKERS 'x' is not a whole number"]


@pytest.mark.parametrize("place", ["environment", "file"])
def test_values_that_are_not_ASCII_work_under_the_POSIX_locale(place, tmp_path):
    model = "mod\xe8le-\u4e2d"
    setting = {"CLAUDE_SONNET_MODEL": model, "PID_FILE": "\xe8.pid"}
    if place == "file":
        text = "".join(f"{name}={value}\n" for name, value in setting.items())
        (tmp_path / ".env").write_bytes(text.encode())
        setting = {}
    with answering_upstream() as (url, got), Program(
            tmp_path, "--port", "0", OPENAI_BASE_URL=url, LC_ALL="POSIX", PYTHONUTF8="0",
            **setting) as program:
        program.started()
        assert program.get("/v1/messages", "POST", json.dumps(req()))[0] == 200
        assert got[0][1]["model"] == model and (tmp_path / "\xe8.pid").exists()


@pytest.mark.parametrize("place", ["environment", "file"])
def test_a_value_that_is_not_UTF_8_is_named(place, tmp_path):
    raw = b"mod\xe8le"
    if place == "file":
        (tmp_path / ".env").write_bytes(b"# \xe8 is fine here\nCLAUDE_SONNET_MODEL=" + raw)
    setting = {"CLAUDE_SONNET_MODEL": raw} if place == "environment" else {}
    with Program(tmp_path, "--port", "0", OTHER_PROGRAMS_OWN=raw, **setting) as program:
        assert program.end() == (
            78, "", "aiapiproxy: CLAUDE_SONNET_MODEL 'mod\\udce8le' is not UTF-8\n")


def test_a_key_of_the_proxy_that_can_be_guessed_is_warned_of(tmp_path):
    with Program(tmp_path, "--port", "0", PROXY_API_KEY=f"{TEAM},abc123") as program:
        assert program.started().get("/v1/models", **{"x-api-key": "abc123"})[0] == 200
        program.signal(signal.SIGTERM)
        (line,) = program.end()[2].splitlines()
    assert (json.loads(line)["level"], json.loads(line)["message"]) == (
        "warn", "PROXY_API_KEY has a key of under 8 characters: it can be guessed")


def test_of_several_addresses_the_one_that_cannot_be_had_is_named(tmp_path):
    with Program(tmp_path, "--port", "0", SERVER_HOST="127.0.0.1,192.0.2.1",
                 PROXY_API_KEY=TEAM) as program:
        code, out, err = program.end()
    assert (code, out) == (1, "") and "192.0.2.1 port" in err and "127.0.0.1" not in err


def test_help_lists_every_variable_and_option(tmp_path):
    with Program(tmp_path, "--help") as program:
        code, out, err = program.end()
    names = [each.name.upper() for each in aiapiproxy.fields(aiapiproxy.Settings)]
    assert (code, err) == (0, "") and all(re.search(rf"^  {name}  ", out, re.M) for name in names)
    assert all(option in out for option in ("--env-file", "--host", "--port", "--demo", "--check",
                                            "--version"))
    assert re.search("SERVER_PORT .*8082", out) and re.search("MAX_REQUEST_SIZE .*33554432", out)


def test_version(tmp_path):
    with Program(tmp_path, "--version") as program:
        assert program.end() == (0, f"aiapiproxy {aiapiproxy.__version__}\n", "")


@pytest.mark.parametrize("option", ["--check", "--help", "--version", "--env"])
@pytest.mark.parametrize("way", ["a pipe that is closed", "closed"])
def test_an_output_that_is_closed_is_no_reason_for_a_traceback(option, way, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    options = {"stdout": writer} if way != "closed" else {"before": lambda: os.close(1)}
    with Program(tmp_path, option, **options) as program:
        assert program.end()[2] == ""
    os.close(writer)


def test_the_warnings_about_a_file_of_settings(tmp_path):
    file = tmp_path / "my.env"
    file.write_text("export CLAUDE_OPUS_MODEL='o1' # mine\nwhat\nOPENAI_API_KY=x\nNOISE=1\n")
    file.chmod(0o644)
    with Program(tmp_path, "--env-file", "my.env", "--port", "0", OPENAI_API_KEY="") as program:
        assert program.started().lines[-1]["models"]["opus"] == "o1"
        program.signal(signal.SIGTERM)
        code, _, err = program.end()
    messages = [json.loads(line)["message"] for line in err.splitlines()]
    assert code == 0 and len(messages) == 3
    assert "line 2" in messages[0] and "chmod 600" in messages[1]
    assert "OPENAI_API_KY" in messages[2] and "OPENAI_API_KEY" in messages[2]


def test_it_starts_in_a_folder_that_was_removed(tmp_path):
    folder = tmp_path / "gone"
    folder.mkdir()
    with Program(folder, "--port", "0", before=lambda: os.rmdir(str(folder))) as program:
        assert program.started().get()[0] == 200


def test_env_prints_the_variables_for_a_client(tmp_path):
    with Program(tmp_path, "--env", "--port", "8099") as program:
        code, out, err = program.end()
    assert (code, err) == (0, "") and KEY not in out
    assert out.splitlines()[0] == "export ANTHROPIC_BASE_URL=http://127.0.0.1:8099"


# ============================================================================
# FILES
# ============================================================================
#
# The files beside the program, and the map in its docstring.

PROGRAM = (ROOT / "aiapiproxy.py").read_text(encoding="utf-8")
TREE = ast.parse(PROGRAM)
BANNER = re.compile(r"^# (\d+)\. (.+)$", re.M)
SUB_BANNER = re.compile(r"^# ---- (\d+)\.(\d+) .* -+$", re.M)
STARTS = sorted([(PROGRAM[:match.start()].count("\n") + 1, (int(match[1]), 0)) for match in
                 BANNER.finditer(PROGRAM)]
                + [(PROGRAM[:match.start()].count("\n") + 1, (int(match[1]), int(match[2])))
                   for match in SUB_BANNER.finditer(PROGRAM)])
SECOND_PART = PROGRAM[:PROGRAM.index("# PART II. ")].count("\n")


def room_of(line):
    """(section, sub-section) of a line of the program; (0, 0) before the first section."""
    return max((start, room) for start, room in [(0, (0, 0)), *STARTS] if start <= line)[1]


def defined_names(node):
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    return [name.id for target in targets if target is not None for name in ast.walk(target)
            if isinstance(name, ast.Name)]


ROOMS = {name: room_of(node.lineno) for node in TREE.body for name in defined_names(node)}


def used_names(node):
    """(name, line) of the names that a statement of the module uses, without its locals."""
    own = {name.id for name in ast.walk(node) if isinstance(name, ast.Name)
           and not isinstance(name.ctx, ast.Load)}
    own |= {argument.arg for argument in ast.walk(node) if isinstance(argument, ast.arg)}
    return [(name.id, name.lineno) for name in ast.walk(node)
            if isinstance(name, ast.Name) and name.id not in own]


USES = [(room_of(line), ROOMS[name], name, line) for node in TREE.body if defined_names(node)
        for name, line in used_names(node) if name in ROOMS]


def test_a_section_names_nothing_from_a_section_below_it():
    wrong = [f"line {line}: {name} is of section {there[0]}" for here, there, name, line in USES
             if there[0] > here[0] > 0]
    assert wrong == []


def test_the_sub_sections_of_a_section_form_no_circle():
    arrows = {(here, there) for here, there, _, _ in USES if here[0] == there[0] and here != there}
    rooms = {room for arrow in arrows for room in arrow}
    while rooms:
        ends = {room for room in rooms if not any(
            (room, other) in arrows for other in rooms if other != room)}
        assert ends, f"these name each other: {sorted(rooms)}"
        rooms -= ends


def test_every_sub_section_has_a_number_and_stands_in_its_section():
    assert re.findall(r"^# ---- (?!\d+\.\d+ ).*", PROGRAM, re.M) == []
    rooms = [room for _, room in STARTS]
    assert rooms == sorted(rooms) and len(rooms) == len(set(rooms))


def test_nothing_waits_in_the_first_part_and_it_knows_neither_a_socket_nor_a_clock():
    kinds = (ast.AsyncFunctionDef, ast.Await, ast.AsyncFor, ast.AsyncWith)
    outside = ("asyncio", "socket", "time", "Settings", "App")
    wrong = [node.lineno for node in ast.walk(TREE) if room_of(getattr(node, "lineno", 0)) > (0, 0)
             and node.lineno < SECOND_PART
             and (isinstance(node, kinds) or (isinstance(node, ast.Name) and node.id in outside))]
    assert wrong == []


def test_the_map_in_the_docstring_lists_the_sections():
    listed = re.findall(r"^ +(\d+)  ([A-Z].*?)(?:   .*)?$", ast.get_docstring(TREE), re.M)
    assert listed == [match.groups() for match in BANNER.finditer(PROGRAM)]


def test_only_the_standard_library_is_imported_and_none_of_its_http_clients():
    names = {alias.name for node in ast.walk(TREE) if isinstance(node, ast.Import)
             for alias in node.names}
    names |= {node.module for node in ast.walk(TREE) if isinstance(node, ast.ImportFrom)}
    assert not names & {"http.client", "http.server", "urllib.request", "requests"}
    # A name lookup blocks and cannot be cancelled: nothing else runs in a thread.
    assert PROGRAM.count("threading.") == 1 and "threading.Thread(target=call" in PROGRAM
    if hasattr(sys, "stdlib_module_names"):
        assert {name.split(".")[0] for name in names} <= set(sys.stdlib_module_names)


FIRST_VARIABLES = """
    SERVER_HOST SERVER_PORT OPENAI_API_KEY OPENAI_BASE_URL CLAUDE_HAIKU_MODEL CLAUDE_SONNET_MODEL
    CLAUDE_OPUS_MODEL REQUEST_TIMEOUT STREAM_TIMEOUT RUST_LOG LOG_FORMAT ALLOWED_ORIGINS
    API_KEY_HEADER""".split()


def setting_names():
    return {item.name.upper() for item in aiapiproxy.fields(aiapiproxy.Settings)}


def test_env_example_sets_the_usual_variables_in_their_order_and_to_their_defaults():
    values, malformed = aiapiproxy.dotenv_values((ROOT / "env.example").read_text())
    assert (list(values), malformed) == (FIRST_VARIABLES, [])
    loaded = aiapiproxy.load_settings(values)
    assert loaded == aiapiproxy.load_settings({"LOG_FORMAT": "json"})


def test_env_example_names_every_setting_with_its_default():
    text = (ROOT / "env.example").read_text()
    assert set(re.findall(r"^#?([A-Z_]+)=", text, re.M)) == setting_names() | {"RUST_LOG"}
    commented = dict(re.findall(r"^#([A-Z_]+)=(.*)$", text, re.M))
    assert aiapiproxy.load_settings(commented) == aiapiproxy.load_settings({})


def test_the_readme_lists_every_setting():
    assert set(re.findall(r"^\| `([A-Z_]+)`", README, re.M)) == setting_names()


# ---- README.md, the guide's part

README = (ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else ""
GUIDE = ["Prerequisites", "Build the Application", "Create Service User",
         "Install Application Files", "Configure Environment", "Install Launch Daemon",
         "Load and Start the Service", "Service Management Commands", "Monitoring and Logs",
         "Health Check", "Firewall Configuration", "Reverse Proxy Setup (Optional)",
         "Updating the Service", "Troubleshooting", "Security Considerations", "Performance Tuning",
         "Log Rotation", "Uninstallation", "Where this differs from the guide",
         "Comparison: macOS and Linux"]


def test_every_section_of_the_guide_is_in_the_readme_in_its_order():
    assert [title for title in re.findall(r"^#+ (.*)", README, re.M) if title in GUIDE] == GUIDE


def test_the_readmes_accounts_by_hand_are_those_of_install_sh(installed):
    by_hand = re.findall(r"^sudo (dscl \. -create .*)", README, re.M)
    assert {line.replace("$n", "499").replace("'", "").replace('"', "") for line in by_hand} == {
        line.replace("-merge", "-create") for line in installed.changes("dscl")}


def test_the_readmes_rotation_is_that_of_install_sh(installed):
    lines = installed.files()["etc/newsyslog.d/aiapiproxy.conf"][1].splitlines()[1:]
    assert re.findall(r"^/usr/local/var/log/aiapiproxy/\w+\.log .*", README, re.M) == lines


# ---- com.aiapiproxy.plist

@pytest.fixture(scope="module")
def plist():
    return plistlib.loads((ROOT / "com.aiapiproxy.plist").read_bytes())


PLIST = [
    ("the label is that of the file", "Label", "com.aiapiproxy"),
    ("the program is the installed one, which names its interpreter itself",
     "ProgramArguments", ["/usr/local/bin/aiapiproxy"]),
    ("it works where its configuration lies", "WorkingDirectory", "/usr/local/etc/aiapiproxy"),
    ("it runs as its own user", "UserName", "_aiapiproxy"),
    ("it runs in its own group", "GroupName", "_aiapiproxy"),
    ("it starts at boot", "RunAtLoad", True),
    ("it is started again after a failure only", "KeepAlive", {"SuccessfulExit": False}),
    ("a crash loop is slowed down", "ThrottleInterval", 10),
    ("info goes to its own log", "StandardOutPath", "/usr/local/var/log/aiapiproxy/stdout.log"),
    ("errors go to their own log", "StandardErrorPath", "/usr/local/var/log/aiapiproxy/stderr.log"),
    ("a log that launchd makes is not for everybody", "Umask", 0o027),
    ("it is not throttled like a background job", "ProcessType", None),
    ("nothing but the place of the pid file is set beside .env",
     "EnvironmentVariables", {"PID_FILE": "/usr/local/var/log/aiapiproxy/aiapiproxy.pid"}),
]


@pytest.mark.parametrize("key, want", [row[1:] for row in PLIST], ids=[row[0] for row in PLIST])
def test_the_plist(plist, key, want):
    assert plist.get(key) == want


def test_the_plist_leaves_more_time_to_end_than_the_program_takes(plist):
    assert plist["ExitTimeOut"] > 10


@pytest.mark.parametrize("limits", ["SoftResourceLimits", "HardResourceLimits"])
def test_the_plist_has_descriptors_for_a_thousand_streams_and_limits_nothing_else(plist, limits):
    assert list(plist[limits]) == ["NumberOfFiles"]
    assert 2 * 1000 + 100 < plist[limits]["NumberOfFiles"] <= 65536


def test_the_plist_holds_no_secret_and_nothing_of_another_language():
    text = (ROOT / "com.aiapiproxy.plist").read_text()
    assert re.findall(r"_KEY|sk-|RUST_|TOKIO_|ResidentSetSize|NumberOfProcesses", text) == []


# ---- The scripts as text

SCRIPTS = pytest.mark.parametrize("script", ["install.sh", "uninstall.sh"])
SHELLS = [shell for shell in (["sh"], ["dash"], ["bash", "--posix"]) if shutil.which(shell[0])]


def functions(script):
    return re.findall(r"^(\w+)\(\) \{", (ROOT / script).read_text(), re.M)


def steps_of_main(script):
    text = (ROOT / script).read_text()
    body = re.search(r"^main\(\) \{.*?\n(.*?)^\}", text, re.M | re.S).group(1)
    return re.findall(r"^    (\w+)", body, re.M)


@SCRIPTS
def test_a_script_has_its_run_bit(script):
    assert os.access(ROOT / script, os.X_OK)


@SCRIPTS
@pytest.mark.parametrize("shell", SHELLS, ids=" ".join)
def test_a_script_is_syntactically_right_for_every_shell(script, shell):
    assert subprocess.run([*shell, "-n", ROOT / script], stderr=subprocess.PIPE).stderr == b""


@SCRIPTS
@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck_finds_nothing(script):
    result = subprocess.run(["shellcheck", "-s", "sh", script], cwd=ROOT,
                            stdout=subprocess.PIPE, text=True)
    assert result.stdout == ""


@SCRIPTS
def test_a_download_that_was_cut_off_runs_nothing(script):
    assert (ROOT / script).read_text().endswith('\nmain "$@"\n')


@SCRIPTS
def test_main_is_a_list_of_the_steps_in_the_order_of_the_file(script):
    steps = steps_of_main(script)
    assert [name for name in functions(script) if name in steps] == steps


def test_the_guides_steps_are_functions_of_install_sh_in_the_guides_order():
    assert [step for step in steps_of_main("install.sh") if step != "read_options"] == [
        "check_prerequisites", "build_the_application", "create_service_user",
        "install_application_files", "configure_environment", "install_launch_daemon",
        "install_log_rotation", "load_and_start_service", "verify_health", "show_next_steps"]


def test_install_sh_prints_the_guides_headings(installed):
    assert re.findall("^==> (.*)", (installed.state / "stdout").read_text(), re.M) == [
        "Prerequisites", "Build the Application", "Create Service User",
        "Install Application Files", "Configure Environment", "Install Launch Daemon",
        "Log Rotation", "Load and Start the Service", "Health Check"]


@SCRIPTS
def test_no_command_is_given_an_option_that_only_gnu_knows(script):
    gnu = (r"sed -[ri]\b|readlink -f|realpath|stat -c|date -d|grep -P|cp --|\bmktemp\b|\becho |"
           r"\[\[ |^ *local |\bpkill\b")
    code = re.sub(r"^\s*#.*", "", (ROOT / script).read_text(), flags=re.M)
    assert re.findall(gnu, code, re.M) == []


def test_what_is_removed_with_all_its_content_is_named_literally():
    assert re.findall(r"rm -rf (.*)", (ROOT / "uninstall.sh").read_text()) == [
        "/usr/local/etc/aiapiproxy", "/usr/local/var/log/aiapiproxy"]


# ============================================================================
# THE MAC IN A FOLDER
# ============================================================================
#
# The scripts run unchanged, except that their absolute paths are moved into a temporary folder.
# Every tool that only a Mac has, or that would do harm, is one shell script under many names
# (STAND_IN): it keeps accounts, owners and the launchd job as small files, writes every call into a
# log, and can end the whole run by SIGKILL at the n-th call that changes something.

STAND_IN = r"""#!/bin/sh
name=${0##*/}
real() { PATH=$REAL_PATH exec "$name" "$@"; }
changes() {  # ends the run before its KILL_AT-th change
    printf '%s\n' "$name $*" >>"$MAC/changes"
    [ "$KILL_AT" = 0 ] || [ "$(grep -c '' "$MAC/changes")" -lt "$KILL_AT" ] || kill -9 0
}
value() { read -r value 2>/dev/null <"$1" && printf '%s\n' "$value"; }
printf '%s\n' "$name $*" >>"$MAC/calls"
case $name in
uname) value "$MAC/system" ;;
sw_vers) value "$MAC/version" ;;
sleep | dscacheutil | xattr) ;;
xcode-select) [ -f "$MAC/tools" ] || exit 2 ;;
id)
    case $* in
    -u) value "$MAC/uid" ;;
    "-u _aiapiproxy") value "$MAC/Users/_aiapiproxy/UniqueID" ;;
    *) exit 1 ;;
    esac ;;
sudo)  # as whom does not matter here; a script is started by its first line
    shift 2
    interpreter=$(sed -n '1s/^#!\//\//p' "$1")
    exec ${interpreter:+"$interpreter"} "$@" ;;
plutil) changes "$@"; grep -q '^</plist>' "$2" || { echo "$2: not a plist"; exit 1; } ;;
lsof) [ ! -f "$MAC/listener" ] || cat "$MAC/listener" ;;
chown)  # writes down whose owner would change; BSD's -R passes over symlinks without -h
    changes "$@"
    follow=-L some=-prune
    case "$1 $2" in
    *-R*-h* | *-h*-R*) follow=-P some= ;;
    -R*) follow=-P some="! -type l" ;;
    -h*) follow=-P ;;
    esac
    while case $1 in -*) ;; *) false ;; esac; do shift; done
    PATH=$REAL_PATH
    find $follow "$2" $some -exec ls -di ${follow#-P} {} + |
        awk -v owner="$1" '{ print $1, owner }' >>"$MAC/owners" ;;
find)  # -user and -group ask for those owners
    number=
    for word; do
        shift
        case $word in
        -user | -group) set -- "$@" -exec owned "$word"; number=next ;;
        *) set -- "$@" "$word" ${number:+"{}" ";"}; number= ;;
        esac
    done
    exec "$(PATH=$REAL_PATH command -v find)" "$@" ;;
owned)  # -user|-group NUMBER FILE; what no chown was told of is root's
    PATH=$REAL_PATH
    owner=$(sed -n "s/^$(ls -di "$3" | awk '{ print $1 }') //p" "$MAC/owners" | tail -n 1)
    case $1:${owner:-root:wheel} in
    -user:_aiapiproxy:*) [ "$2" = "$(cat "$MAC/Users/_aiapiproxy/UniqueID")" ] ;;
    -group:*:_aiapiproxy) [ "$2" = "$(cat "$MAC/Groups/_aiapiproxy/PrimaryGroupID")" ] ;;
    *) [ "$2" = 0 ] ;;
    esac ;;
chmod | mkdir | mv | rm) changes "$@"; [ "$1" = -N ] || real "$@" ;;
curl)
    [ -f "$MAC/job" ] && [ ! -f "$MAC/ill" ] || exit 7
    echo "{\"status\": \"ok\", \"service\": \"aiapiproxy\", \"pid\": $(cat "$MAC/job")}" ;;
dscl)
    record=$MAC$3
    case $2 in
    -read)
        [ -d "$record" ] || { echo "DS Error: -14136 (eDSRecordNotFound)" >&2; exit 56; }
        [ -n "${4:-}" ] || exit 0
        [ -f "$record/$4" ] || { echo "No such key: $4" >&2; exit 0; }
        read -r value <"$record/$4"
        case $value in
        *" "*) printf '%s:\n %s\n' "$4" "$value" ;;
        *) printf '%s: %s\n' "$4" "$value" ;;
        esac ;;
    -search)
        for found in "$record"/*/"$4"; do
            [ -f "$found" ] && [ "$(value "$found")" = "$5" ] || continue
            printf 'x\t\t%s = (\n    %s\n)\n' "$4" "$5"
        done ;;
    -create)
        changes "$@"
        if [ -f "$MAC/refuses" ]; then cat "$MAC/refuses" >&2; exit 40; fi
        [ -d "$record" ] || PATH=$REAL_PATH mkdir "$record"
        case ${4:-} in
        '') exit 0 ;;
        UniqueID) ids=$MAC/Users ;;
        PrimaryGroupID) ids=$MAC/Groups ;;
        *) ids=none ;;
        esac
        case $3 in "/Users/"*) [ "$4" != PrimaryGroupID ] || ids=none ;; esac
        for other in "$ids"/*/"$4" "$ids"/.[!.]*/"$4"; do
            if [ -f "$other" ] && [ "$(value "$other")" = "$5" ]; then
                echo "DS Error: -14135 (eDSRecordAlreadyExists)" >&2
                exit 55
            fi
        done
        printf '%s\n' "$5" >"$record/$4" ;;
    -merge) changes "$@"; printf '%s\n' "$5" >>"$record/$4" ;;
    -delete)
        changes "$@"
        case $3 in /Users/_aiapiproxy | /Groups/_aiapiproxy) ;; *) exit 99 ;; esac
        if [ -f "$MAC/refuses" ]; then cat "$MAC/refuses" >&2; exit 40; fi
        PATH=$REAL_PATH; rm -r "$record" ;;
    esac ;;
launchctl)
    case $1 in
    print | list)  # a job that was told to end is still there the first two times
        [ -f "$MAC/job" ] || exit 113
        if [ -f "$MAC/ending" ]; then
            printf x >>"$MAC/ending"
            if [ "$(wc -c <"$MAC/ending")" -ge 3 ]; then
                PATH=$REAL_PATH
                rm -f "$MAC/job" "$MAC/ending"
                exit 113
            fi
        fi
        case $1 in
        print)
            printf 'system/com.aiapiproxy = {\n\tstate = running\n\n\tpid = %s\n}\n' \
                "$(cat "$MAC/job")" ;;
        list) printf '{\n\t"PID" = %s;\n}\n' "$(cat "$MAC/job")" ;;
        esac ;;
    bootout | unload)
        changes "$@"
        [ ! -f "$MAC/job" ] || [ -f "$MAC/ending" ] || : >"$MAC/ending"
        exit 36 ;;
    bootstrap | load)
        changes "$@"
        failed() { echo "Bootstrap failed: 5: Input/output error" >&2; exit 5; }
        [ ! -f "$MAC/job" ] || failed
        if [ -s "$MAC/flaky" ]; then
            printf x >>"$MAC/flaky"
            [ "$(wc -c <"$MAC/flaky")" -ge 4 ] || failed
        fi
        printf x >>"$MAC/starts"
        echo "$((1000 + $(wc -c <"$MAC/starts")))" >"$MAC/job"
        cp "$MAC/job" "$DISK/usr/local/var/log/aiapiproxy/aiapiproxy.pid" ;;
    *) changes "$@" ;;
    esac ;;
esac
"""
STAND_INS = ("uname sw_vers sleep dscacheutil xattr xcode-select id sudo plutil lsof chown chmod "
             "find owned mkdir mv rm curl dscl launchctl").split()

# An interpreter whose fitness is 0, or 4 without CA certificates, or 3 if it is too old.
PYTHON = """#!/bin/sh
printf '%s\\n' "python {path}" >>"$MAC/calls"
case "$*" in
*version_info*) exit {fitness} ;;
*--version) echo "aiapiproxy 1.0.0" ;;
esac
"""

MOVED = re.compile(r"(?<![\w.%}])/"
                   r"(?=(?:usr/local|opt/homebrew|Library|etc)/|usr/bin/(?:python3|dscl)\b)")
INSTALLED = ("usr/local/bin/aiapiproxy", "usr/local/etc/aiapiproxy/.env",
             "etc/newsyslog.d/aiapiproxy.conf", "usr/local/var/log/aiapiproxy/stdout.log",
             "usr/local/var/log/aiapiproxy/stderr.log",
             "Library/LaunchDaemons/com.aiapiproxy.plist")


class Mac:
    """A Mac in a folder: `disk` is its /, `state` its accounts and job, `checkout` our files."""

    def __init__(self, folder, checkout="checkout"):
        self.disk, self.state, self.tools = folder / "disk", folder / "state", folder / "tools"
        self.checkout = folder / checkout
        for path in (self.disk / "usr/bin", self.state / "Users/me", self.state / "Groups/staff",
                     self.state / "Search", self.tools, self.checkout):
            path.mkdir(parents=True)
        for node in ("Users", "Groups"):
            (self.state / "Search" / node).symlink_to(self.state / node)
        self.set(uid=0, system="Darwin", version="14.5", tools="", owners="")
        self.account("/Users/me", UniqueID=501, PrimaryGroupID=20)
        self.account("/Groups/staff", PrimaryGroupID=20)
        stand_in = self.tools / "stand-in"
        stand_in.write_text(STAND_IN)
        stand_in.chmod(0o755)
        for name in STAND_INS:
            (self.tools / name).symlink_to(stand_in)
        self.python("usr/bin/python3")
        for name in ("install.sh", "uninstall.sh", "com.aiapiproxy.plist", "aiapiproxy.py",
                     "env.example"):
            text = (ROOT / name).read_text()
            (self.checkout / name).write_text(self.moved(text) if name != "aiapiproxy.py" else text)

    def moved(self, text):
        return MOVED.sub(lambda _: f"{self.disk}/", text)

    def set(self, **files):
        for name, text in files.items():
            (self.state / name).write_text(f"{text}\n")

    def account(self, record, **attributes):
        path = self.state / record[1:]
        path.mkdir(exist_ok=True)
        for key, text in attributes.items():
            (path / key).write_text(f"{text}\n")

    def attributes(self, record):
        path = self.state / record[1:]
        return ({key.name: key.read_text().strip() for key in path.iterdir()}
                if path.is_dir() else None)

    def owners(self):
        """The owner of every file and folder; what chown was never told of is root's."""
        lines = (self.state / "owners").read_text().split("\n")
        told = dict(line.split() for line in lines if line)
        return {str(path.relative_to(self.disk)): told.get(str(path.lstat().st_ino), "root:wheel")
                for path in self.disk.rglob("*")}

    def own(self, owners):
        """Gives the files to these owners, those of `owners()` to begin with."""
        with open(self.state / "owners", "a") as lines:
            for name, owner in owners.items():
                lines.write(f"{(self.disk / name).lstat().st_ino} {owner}\n")

    def python(self, place, fitness=0):
        path = self.disk / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(PYTHON.format(path=place, fitness=fitness))
        path.chmod(0o755)

    def run(self, script, *arguments, shell=("sh",), cwd="/", kill_at=0,
            stdin=subprocess.DEVNULL, **environ):
        """Runs a script; calls() and changes() are those of the last run."""
        for name in ("calls", "changes"):
            (self.state / name).write_text("")
        environment = {"PATH": f"{self.tools}:{os.environ['PATH']}", "MAC": str(self.state),
                       "REAL_PATH": os.environ["PATH"], "DISK": str(self.disk),
                       "KILL_AT": str(kill_at), **environ}
        path = script if "/" in script else f"{self.checkout}/{script}"
        return subprocess.run([*shell, path, *arguments], cwd=cwd, env=environment,
                              stdin=stdin, text=True, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, start_new_session=True, timeout=60)

    def calls(self, beginning=""):
        return self._lines("calls", beginning)

    def changes(self, beginning=""):
        return self._lines("changes", beginning)

    def _lines(self, name, beginning):
        lines = (self.state / name).read_text().replace(str(self.disk), "").splitlines()
        return [line for line in lines if line.startswith(beginning)]

    def files(self):
        """Mode and content of each file except the interpreters, with the paths of a real Mac."""
        return {str(path.relative_to(self.disk)): (oct(path.stat().st_mode & 0o777),
                                                   path.read_text().replace(str(self.disk), ""))
                for path in sorted(self.disk.rglob("*")) if path.is_file()
                and not path.name.startswith("python3")}

    def place(self, name, text, mode=0o644):
        path = self.disk / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)
        return path


@pytest.fixture
def folder():
    """A folder with a short path: the first line of the installed program has it, up to a limit."""
    with tempfile.TemporaryDirectory(prefix="mac") as path:
        yield pathlib.Path(path).resolve()


@pytest.fixture
def mac(folder):
    return Mac(folder)


@pytest.fixture(scope="module")
def template():
    """A Mac on which install.sh has run, its outcome, and a copy of the Mac's folder."""
    with tempfile.TemporaryDirectory(prefix="mac") as path:
        folder = pathlib.Path(path).resolve()
        mac = Mac(folder / "mac")
        # Some administrators have umask 077.
        result = mac.run("install.sh", shell=("sh", "-c", 'umask 077; exec sh "$0" "$@"'))
        assert result.returncode == 0, result.stdout + result.stderr
        (mac.state / "stdout").write_text(result.stdout)
        mac.first_owners = mac.owners()
        shutil.copytree(folder / "mac", folder / "copy", symlinks=True)
        yield mac, outcome(mac), folder / "copy"


@pytest.fixture
def installed(template):
    """The template's Mac, restored in its place, because its files contain its path."""
    mac, _, copy = template
    shutil.rmtree(copy.parent / "mac")
    shutil.copytree(copy, copy.parent / "mac", symlinks=True)
    mac.set(owners="")
    mac.own(mac.first_owners)
    return mac


def answered_script(mac, script, answers, *arguments):
    """The run of a script that gets these answers from its terminal."""
    ours, theirs = pty.openpty()
    os.write(ours, answers.encode())
    try:
        return mac.run(script, *arguments, stdin=theirs)
    finally:
        os.close(ours)
        os.close(theirs)


# ---- Installing

def test_a_fresh_mac_gets_exactly_these_files(installed):
    assert set(installed.files()) == {*INSTALLED, "usr/local/var/log/aiapiproxy/aiapiproxy.pid"}


def test_the_files_have_the_modes_of_the_guide(installed):
    files = installed.files()
    modes = ["0o755", "0o600", "0o644", "0o640", "0o640", "0o644"]
    assert [files[name][0] for name in INSTALLED] == modes


def test_the_folders_on_the_way_can_be_entered_even_with_an_administrators_umask(installed):
    folders = ("usr/local", "usr/local/bin", "usr/local/etc", "usr/local/var", "usr/local/var/log")
    modes = {name: oct((installed.disk / name).stat().st_mode & 0o777) for name in folders}
    assert modes == dict.fromkeys(folders, "0o755")


def test_the_owners_are_those_of_the_guide(installed):
    owned = {tuple(line.split()[1:]) for line in installed.changes("chown")}
    assert {(*call[:-1], call[-1].replace(".new", "")) for call in owned} == {
        ("_aiapiproxy:_aiapiproxy", "/usr/local/bin/aiapiproxy"),
        ("-h", "root:wheel", "/usr/local/etc/aiapiproxy"),
        ("-h", "root:wheel", "/usr/local/var/log/aiapiproxy"),
        ("-R", "-h", "_aiapiproxy:_aiapiproxy", "/usr/local/etc/aiapiproxy"),
        ("-R", "-h", "_aiapiproxy:_aiapiproxy", "/usr/local/var/log/aiapiproxy"),
        ("_aiapiproxy:_aiapiproxy", "/usr/local/var/log/aiapiproxy/stdout.log"),
        ("_aiapiproxy:_aiapiproxy", "/usr/local/var/log/aiapiproxy/stderr.log"),
        ("_aiapiproxy:_aiapiproxy", "/usr/local/etc/aiapiproxy/.env"),
        ("root:wheel", "/Library/LaunchDaemons/com.aiapiproxy.plist"),
        ("root:wheel", "/etc/newsyslog.d/aiapiproxy.conf")}


def test_the_installed_program_differs_from_ours_in_its_first_line_only(installed):
    first, rest = installed.files()["usr/local/bin/aiapiproxy"][1].split("\n", 1)
    ours = (ROOT / "aiapiproxy.py").read_text().split("\n", 1)
    assert (first, rest) == ("#!/usr/bin/python3", ours[1]) and ours[0] == "#!/usr/bin/env python3"


def test_the_configuration_is_env_example(installed):
    _, text = installed.files()["usr/local/etc/aiapiproxy/.env"]
    assert text == (ROOT / "env.example").read_text()


def test_the_rotation_signals_our_own_process_and_adds_no_line(installed):
    logs = "/usr/local/var/log/aiapiproxy"
    text = installed.files()["etc/newsyslog.d/aiapiproxy.conf"][1]
    assert [line.split() for line in text.splitlines() if not line.startswith("#")] == [
        [f"{logs}/{name}.log", "_aiapiproxy:_aiapiproxy", "640", "7", "1000", "*", "BJ",
         f"{logs}/aiapiproxy.pid", "1"]
        for name in ("stdout", "stderr")]


def test_quarantine_is_taken_off_what_launchd_reads_and_runs(installed):
    stripped = {line.split()[-1].replace(".new", "")
                for line in installed.calls("xattr -d com.apple.quarantine")}
    assert {"/usr/local/bin/aiapiproxy", "/Library/LaunchDaemons/com.aiapiproxy.plist"} <= stripped


def test_the_account_is_hidden_locked_and_its_own_group(installed):
    assert installed.attributes("/Users/_aiapiproxy") == {
        "UserShell": "/usr/bin/false", "RealName": "AI API Proxy Service",
        "NFSHomeDirectory": "/var/empty", "Password": "*", "IsHidden": "1", "PrimaryGroupID": "499",
        "UniqueID": "499"}


def test_the_group_has_the_user_as_its_member(installed):
    assert installed.attributes("/Groups/_aiapiproxy") == {
        "RealName": "AI API Proxy Service Group", "Password": "*", "PrimaryGroupID": "499",
        "GroupMembership": "_aiapiproxy"}


def test_the_user_gets_its_id_last_so_that_half_an_account_is_recognised(installed):
    users = installed.changes("dscl . -create /Users/_aiapiproxy")
    assert users[-1] == "dscl . -create /Users/_aiapiproxy UniqueID 499"


TAKEN_IDS = [
    ("an id that a user or a group has is passed over",
     {"/Users/_a": {"UniqueID": 499}, "/Groups/_b": {"PrimaryGroupID": 498}}, ("497", "497")),
    ("an id of an account that is not listed is found by trying", {"/Users/.a": {"UniqueID": 499}},
     ("498", "499")),
    ("a group that is there keeps its id", {"/Groups/_aiapiproxy": {"PrimaryGroupID": 333}},
     ("333", "333")),
    ("a user that is there keeps its ids",
     {"/Users/_aiapiproxy": {"UniqueID": 444, "PrimaryGroupID": 20}}, ("444", "444")),
    ("what the guide's commands leave behind is completed",
     {"/Users/_aiapiproxy": {"PrimaryGroupID": 20}, "/Groups/_aiapiproxy": {"PrimaryGroupID": 501}},
     ("499", "501")),
]


@table(TAKEN_IDS, "accounts, want")
def test_ids(mac, accounts, want):
    for record, attributes in accounts.items():
        mac.account(record, **attributes)
    mac.run("install.sh")
    assert (mac.attributes("/Users/_aiapiproxy")["UniqueID"],
            mac.attributes("/Groups/_aiapiproxy")["PrimaryGroupID"]) == want


def test_a_mac_that_does_not_let_accounts_be_changed_is_explained(mac):
    mac.set(refuses="DS Error: -14120 (eDSPermissionError)")
    result = mac.run("install.sh")
    assert result.returncode == 1 and "Full Disk Access" in result.stderr


def test_the_second_run_finds_everything_unchanged_and_leaves_accounts_and_service_alone(installed):
    before = installed.files()
    result = installed.run("install.sh")
    said = re.findall(r"^    (unchanged|kept|installed|created|started) ", result.stdout, re.M)
    assert (said, installed.files(), installed.changes("dscl"), installed.changes("launchctl")) == (
        ["unchanged"] * 6, before, [], ["launchctl enable system/com.aiapiproxy"])


def test_an_update_replaces_the_program_and_restarts_the_service(installed):
    with open(installed.checkout / "aiapiproxy.py", "a") as program:
        program.write("# newer\n")
    result = installed.run("install.sh")
    replaced = re.findall(r"installed  (.*)", result.stdout)
    assert replaced == [f"{installed.disk}/usr/local/bin/aiapiproxy"]
    assert (installed.state / "job").read_text() == "1002\n"


def test_an_edited_env_is_kept_to_the_byte_and_made_private(mac):
    edited = "OPENAI_API_KEY='sk-mine'\r\nSERVER_PORT=9000\n"
    path = mac.place("usr/local/etc/aiapiproxy/.env", edited)
    mac.run("install.sh")
    assert (path.read_bytes().decode(), oct(path.stat().st_mode & 0o777)) == (edited, "0o600")


def test_an_env_edited_since_the_start_is_a_reason_to_restart(installed):
    path = installed.place("usr/local/etc/aiapiproxy/.env", "SERVER_PORT=9000\n", 0o600)
    later = (installed.disk / "usr/local/var/log/aiapiproxy/aiapiproxy.pid").stat().st_mtime + 2
    os.utime(path, (later, later))
    installed.run("install.sh")
    command = "launchctl bootstrap system /Library/LaunchDaemons/com.aiapiproxy.plist"
    assert command in installed.changes("launchctl")


def test_an_empty_env_of_an_interrupted_copy_counts_as_missing(mac):
    path = mac.place("usr/local/etc/aiapiproxy/.env", "")
    mac.run("install.sh")
    assert path.read_text() == (mac.checkout / "env.example").read_text()


def test_a_log_that_is_a_link_does_not_lead_root_elsewhere(mac):
    prey = mac.place("etc/prey", "mine", 0o600)
    (mac.disk / "usr/local/var/log/aiapiproxy").mkdir(parents=True)
    (mac.disk / "usr/local/var/log/aiapiproxy/stdout.log").symlink_to(prey)
    mac.run("install.sh")
    assert (prey.read_text(), oct(prey.stat().st_mode & 0o777)) == ("mine", "0o600")


@pytest.mark.parametrize("setting, url", [
    ("", "http://127.0.0.1:8082/health"), ("SERVER_PORT=9000", "http://127.0.0.1:9000/health"),
    ("export SERVER_PORT = \"9000\" # mine\r", "http://127.0.0.1:9000/health"),
    ("SERVER_PORT=1\nSERVER_PORT='9000'", "http://127.0.0.1:9000/health"),
    ("#SERVER_PORT=9000", "http://127.0.0.1:8082/health"),
    ("SERVER_PORT=", "http://127.0.0.1:8082/health"),
    ("SERVER_HOST=0.0.0.0", "http://127.0.0.1:8082/health"),
    ("SERVER_HOST=::", "http://[::1]:8082/health"),
    ("SERVER_HOST=::1,127.0.0.1", "http://[::1]:8082/health")])
def test_health_is_asked_where_env_says_that_it_is(mac, setting, url):
    mac.place("usr/local/etc/aiapiproxy/.env", f"A=b\n{setting}\n")
    assert mac.run("install.sh", "--dry-run").stdout.replace("'", "").count(f"+ curl {url}\n") == 1


# ---- Launchd

def test_nothing_is_stopped_before_the_new_files_are_proven_and_in_place(installed):
    plist = installed.checkout / "com.aiapiproxy.plist"
    plist.write_text(plist.read_text().replace("<integer>10<", "<integer>11<"))
    installed.run("install.sh")
    order = [line for line in installed.changes()
             if line.split()[0] in ("plutil", "mv", "launchctl")]
    daemon = "/Library/LaunchDaemons/com.aiapiproxy.plist"
    assert order[1:] == [f"plutil -lint {daemon}.new", f"mv -f {daemon}.new {daemon}",
                         "launchctl enable system/com.aiapiproxy",
                         *["launchctl bootout system/com.aiapiproxy"] * 2,
                         f"launchctl bootstrap system {daemon}"]


@pytest.mark.parametrize("name", ["com.aiapiproxy.plist", "aiapiproxy.py"])
def test_a_damaged_file_stops_the_update_and_not_the_service(installed, name):
    (installed.checkout / name).write_text("def damaged(:\n")
    if name == "aiapiproxy.py":
        (installed.disk / "usr/bin/python3").unlink()
        (installed.disk / "usr/bin/python3").symlink_to(sys.executable)
    before = installed.files()
    result = installed.run("install.sh")
    assert (result.returncode, installed.files(), installed.changes("launchctl")) == (1, before, [])


def test_a_bootstrap_that_fails_at_first_is_tried_again(mac):
    mac.set(flaky="x")
    assert mac.run("install.sh").returncode == 0


def test_below_macos_11_the_service_is_loaded_and_started(mac):
    mac.set(version="10.15.7")
    mac.run("install.sh")
    assert mac.changes("launchctl") == [
        "launchctl enable system/com.aiapiproxy",
        "launchctl load -w /Library/LaunchDaemons/com.aiapiproxy.plist",
        "launchctl start com.aiapiproxy"]


def test_a_service_that_does_not_answer_is_a_failure_that_shows_its_log(mac):
    mac.set(ill="")
    mac.place("usr/local/var/log/aiapiproxy/stderr.log", "SERVER_PORT: not a number\n")
    result = mac.run("install.sh")
    assert result.returncode == 1 and "SERVER_PORT: not a number\n" in result.stderr


def test_an_answer_of_another_process_is_no_success(installed):
    for tool, answer in (("curl", '{"service": "aiapiproxy", "pid": 1}'),):
        (installed.tools / tool).unlink()
        (installed.tools / tool).write_text(f"#!/bin/sh\necho '{answer}'\n")
        (installed.tools / tool).chmod(0o755)
    assert installed.run("install.sh").returncode == 1


def test_a_port_that_somebody_else_holds_is_named_before_anything_is_stopped(mac):
    mac.set(listener="COMMAND PID USER\nnode 77 me 23u IPv4 TCP 127.0.0.1:8082 (LISTEN)")
    result = mac.run("install.sh")
    assert (result.returncode, mac.changes("launchctl")) == (1, [])
    assert "port 8082 is taken by process 77" in result.stderr


# ---- Interpreters

HOMEBREW, INTEL = "opt/homebrew/bin/python3", "usr/local/bin/python3"
PYTHON_ORG = "Library/Frameworks/Python.framework/Versions/Current/bin/python3"
PYTHONS = [
    ("Apple's comes first where it can run", True, {HOMEBREW: 0}, {}, "usr/bin/python3"),
    ("without Command Line Tools Homebrew's is taken", False, {HOMEBREW: 0, PYTHON_ORG: 0},
     {}, HOMEBREW),
    ("on Intel Homebrew lies elsewhere", False, {INTEL: 0}, {}, INTEL),
    ("python.org's is found", False, {PYTHON_ORG: 0}, {}, PYTHON_ORG),
    ("one that is too old is passed over", False, {HOMEBREW: 3, INTEL: 0}, {}, INTEL),
    ("one without CA certificates only if there is no other", False,
     {HOMEBREW: 4, INTEL: 0}, {}, INTEL),
    ("but then it is taken", False, {HOMEBREW: 4}, {}, HOMEBREW),
    ("the one asked for comes before all", True, {HOMEBREW: 0},
     {"AIAPIPROXY_PYTHON": HOMEBREW}, HOMEBREW),
    ("if it can be used", True, {HOMEBREW: 3}, {"AIAPIPROXY_PYTHON": HOMEBREW}, "usr/bin/python3"),
    ("a blank in its path is refused, as it would end the first line", True, {"opt/my python3": 0},
     {"AIAPIPROXY_PYTHON": "opt/my python3"}, "usr/bin/python3"),
]


@table(PYTHONS, "tools, pythons, environ, want")
def test_pythons(mac, tools, pythons, environ, want):
    if not tools:
        (mac.state / "tools").unlink()
    for place, fitness in pythons.items():
        mac.python(place, fitness)
    paths = {name: f"{mac.disk}/{place}" for name, place in environ.items()}
    result = mac.run("install.sh", "--dry-run", **paths)
    assert re.findall(r"sed '1s\|\.\*\|#!(.*?)\|'", result.stdout) == [f"{mac.disk}/{want}"]


@pytest.mark.parametrize("alias", [None, INTEL], ids=["by its name", "through a link"])
def test_apples_shim_is_never_executed_without_command_line_tools(mac, alias):
    (mac.state / "tools").unlink()
    if alias:
        (mac.disk / alias).parent.mkdir(parents=True)
        (mac.disk / alias).symlink_to(mac.disk / "usr/bin/python3")
    mac.run("install.sh", AIAPIPROXY_PYTHON=f"{mac.disk}/usr/bin/python3")
    assert mac.calls("python") == []


def test_without_any_python_nothing_is_created_and_three_ways_are_named(mac):
    (mac.state / "tools").unlink()
    result = mac.run("install.sh")
    assert (result.returncode, mac.changes(), mac.files()) == (1, [], {})
    assert all(way in result.stderr for way in ("xcode-select --install", "python.org",
                                                "brew install python"))


def test_the_installed_program_runs_by_its_own_first_line(mac):
    (mac.disk / "usr/bin/python3").unlink()
    (mac.disk / "usr/bin/python3").symlink_to(sys.executable)
    result = mac.run("install.sh")
    assert result.returncode == 0, result.stderr
    version = subprocess.run([mac.disk / "usr/local/bin/aiapiproxy", "--version"],
                             stdout=subprocess.PIPE, text=True)
    assert re.fullmatch(r"aiapiproxy \d+\.\d+\.\d+\n", version.stdout)


# ---- Refusals, dry runs, odd places

REFUSALS = [
    ("without root", {"uid": 501}, "sudo ./"),
    ("off macOS", {"system": "Linux"}, "macOS only"),
]


@SCRIPTS
@table(REFUSALS, "state, word")
def test_it_refuses_with_one_line_before_touching_anything(mac, script, state, word):
    mac.set(**state)
    result = mac.run(script)
    assert (result.returncode, result.stdout, mac.changes()) == (1, "", [])
    assert word in result.stderr and result.stderr.count("\n") == 1


@SCRIPTS
def test_help_needs_neither_root_nor_a_mac(mac, script):
    mac.set(uid=501, system="Linux")
    result = mac.run(script, "--help")
    assert result.returncode == 0 and result.stdout.startswith(f"usage: sudo ./{script}")


@SCRIPTS
def test_an_unknown_option_is_wrong_usage(mac, script):
    assert mac.run(script, "--frobnicate").returncode == 2


def test_a_dry_run_of_install_sh_prints_what_would_run_and_runs_nothing(mac):
    text = mac.run("install.sh", "--dry-run").stdout.replace(str(mac.disk), "")
    printed = re.findall(r"^    \+ (.*)", text, re.M)
    assert (mac.changes("dscl"), mac.changes("launchctl"), mac.files()) == ([], [], {})
    assert [line for line in printed if line.split()[0] in ("dscl", "launchctl", "curl")] == [
        "dscl . -create /Groups/_aiapiproxy",
        "dscl . -create /Groups/_aiapiproxy RealName 'AI API Proxy Service Group'",
        "dscl . -create /Groups/_aiapiproxy Password '*'",
        "dscl . -create /Groups/_aiapiproxy PrimaryGroupID 499",
        "dscl . -create /Users/_aiapiproxy",
        "dscl . -create /Users/_aiapiproxy UserShell /usr/bin/false",
        "dscl . -create /Users/_aiapiproxy RealName 'AI API Proxy Service'",
        "dscl . -create /Users/_aiapiproxy NFSHomeDirectory /var/empty",
        "dscl . -create /Users/_aiapiproxy Password '*'",
        "dscl . -create /Users/_aiapiproxy IsHidden 1",
        "dscl . -create /Users/_aiapiproxy PrimaryGroupID 499",
        "dscl . -create /Users/_aiapiproxy UniqueID 499",
        "dscl . -merge /Groups/_aiapiproxy GroupMembership _aiapiproxy",
        "launchctl enable system/com.aiapiproxy",
        "launchctl bootstrap system /Library/LaunchDaemons/com.aiapiproxy.plist",
        "curl http://127.0.0.1:8082/health"]


def test_a_dry_run_of_uninstall_sh_removes_nothing(installed):
    before = installed.files()
    result = installed.run("uninstall.sh", "--dry-run", "--purge")
    assert (installed.changes(), installed.files()) == ([], before)
    assert f"+ rm -rf {installed.disk}/usr/local/etc/aiapiproxy\n" in result.stdout


@pytest.mark.parametrize("name", ["My Mac's \"best\" stuff ", "-rf $(touch pwned);b&c*?[x]"])
def test_the_checkout_may_lie_in_a_folder_of_any_name(folder, name):
    mac = Mac(folder, checkout=name)
    result = mac.run(f"{name}/install.sh", shell=("sh", "--"), cwd=folder)
    assert result.returncode == 0 and set(INSTALLED) <= set(mac.files())
    assert not (folder / "pwned").exists()


@pytest.mark.parametrize("shell", SHELLS[1:], ids=" ".join)
def test_every_shell_installs_and_uninstalls(mac, shell):
    assert [mac.run("install.sh", shell=shell).returncode,
            mac.run("uninstall.sh", "--purge", shell=shell).returncode] == [0, 0]


def outcome(mac):
    return mac.files(), mac.attributes("/Users/_aiapiproxy"), mac.attributes("/Groups/_aiapiproxy")


def test_a_run_that_was_killed_is_made_good_by_the_next(folder, template):
    for kill_at in (2, 20, 34, 49):
        mac = Mac(folder / str(kill_at))
        assert mac.run("install.sh", kill_at=kill_at).returncode == -9
        assert (mac.run("install.sh").returncode, *outcome(mac)) == (0, *template[1]), kill_at


def test_an_installation_that_is_killed_again_and_again_is_finished_all_the_same(mac, template):
    codes = [-9]
    while codes[-1] == -9:
        codes.append(mac.run("install.sh", kill_at=len(codes)).returncode)
    assert (codes[-1], *outcome(mac)) == (0, *template[1])


def test_an_update_that_was_killed_before_the_restart_is_restarted_by_the_next_run(installed):
    with open(installed.checkout / "aiapiproxy.py", "a") as program:
        program.write("# newer\n")
    pid_file = installed.disk / "usr/local/var/log/aiapiproxy/aiapiproxy.pid"
    os.utime(pid_file, (pid_file.stat().st_mtime - 2,) * 2)
    changes = 6  # before the first change by launchctl
    assert installed.run("install.sh", kill_at=changes).returncode == -9
    while not installed.changes("launchctl"):
        changes += 1
        assert installed.run("install.sh", kill_at=changes).returncode == -9
    installed.run("install.sh")
    assert (installed.state / "job").read_text() == "1002\n"


# ---- Links in the folders of the service

ETC, LOG = "usr/local/etc/aiapiproxy", "usr/local/var/log/aiapiproxy"
SERVICE, ROOT_WHEEL = "_aiapiproxy:_aiapiproxy", "root:wheel"


def prey(mac):
    """A file of root's: its path, and a function that tells whether it is unchanged."""
    path = mac.place("etc/prey", "mine", 0o604)
    links = path.stat().st_nlink
    def is_untouched():
        return (path.read_text(), path.stat().st_mode & 0o777, mac.owners()["etc/prey"],
                path.stat().st_nlink) == ("mine", 0o604, ROOT_WHEEL, links)
    return path, is_untouched


def removed(mac, result):
    return dict(re.findall(r" removed    (.*?) \((.*)\)$",
                           result.stdout.replace(f"{mac.disk}/", ""), re.M))


def test_a_file_of_roots_that_is_linked_into_the_folders_stays_roots(installed):
    path, is_untouched = prey(installed)
    (installed.disk / LOG / "records").mkdir()
    planted = [f"{LOG}/old.log", f"{LOG}/stdout.log", f"{LOG}/records/x", f"{ETC}/backup"]
    for name in planted:
        (installed.disk / name).unlink(missing_ok=True)
        os.link(path, installed.disk / name)
    result = installed.run("install.sh")
    assert (result.returncode, is_untouched()) == (0, True), result.stderr
    assert removed(installed, result) == dict.fromkeys(planted, "a hard link")
    assert installed.owners()[f"{LOG}/stdout.log"] == SERVICE
    assert "healthy    http://127.0.0.1:8082/health" in result.stdout


def test_an_env_with_a_second_name_is_refused_and_the_service_runs_on(installed):
    path, is_untouched = prey(installed)
    (installed.disk / ETC / ".env").unlink()
    os.link(path, installed.disk / ETC / ".env")
    before = installed.owners()
    result = installed.run("install.sh")
    assert (result.returncode, result.stderr.replace(str(installed.disk), "")) == (
        1, f"install.sh: /{ETC}/.env has a second name (a hard link): "
           "copy it, remove the link, run again\n")
    assert (installed.changes("launchctl"), installed.owners()) == ([], before)
    path.unlink()  # the other name: an administrator has copied the file
    assert installed.run("install.sh").returncode == 0


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["FIFO", "folder"])
def test_an_env_that_is_no_file_is_refused_and_never_read(installed, make):
    (installed.disk / ETC / ".env").unlink()
    make(installed.disk / ETC / ".env")
    result = installed.run("install.sh")
    assert (result.returncode, installed.changes("launchctl")) == (1, [])
    assert f"/{ETC}/.env is " in result.stderr
    assert installed.owners()[ETC] == SERVICE


def test_nothing_behind_a_symlink_in_the_folders_changes(installed):
    path, is_untouched = prey(installed)
    planted = {f"{LOG}/stdout.log": path, f"{LOG}/x": installed.disk / "etc",
               f"{LOG}/stdout.log.new": path, f"{ETC}/.env.new": path}
    (installed.disk / ETC / ".env").unlink()
    (installed.disk / LOG / "stdout.log").unlink()
    for name, target in planted.items():
        (installed.disk / name).symlink_to(target)
    etc = {name: owner for name, owner in installed.owners().items() if name.startswith("etc")}
    result = installed.run("install.sh")
    for log in ("stdout.log", "stderr.log"):  # launchd opens them as root
        with open(installed.disk / LOG / log, "a") as opened:
            opened.write("started\n")
    assert (result.returncode, is_untouched()) == (0, True), result.stderr
    assert removed(installed, result) == dict.fromkeys(planted, "a symlink")
    assert {name: installed.owners()[name] for name in etc} == etc


def test_an_env_that_is_a_symlink_is_left_and_read_with_the_services_rights(installed):
    path = installed.place("etc/prey", "SERVER_PORT=9000\n", 0o604)
    (installed.disk / ETC / ".env").unlink()
    (installed.disk / ETC / ".env").symlink_to(path)
    result = installed.run("install.sh")
    assert (result.returncode, (installed.disk / ETC / ".env").is_symlink()) == (0, True)
    assert (installed.owners()["etc/prey"], path.stat().st_mode & 0o777) == (ROOT_WHEEL, 0o604)
    assert re.search(r"kept +\S+/.env \(a link: its target must be readable", result.stdout)
    assert "healthy    http://127.0.0.1:9000/health" in result.stdout
    assert [call for call in installed.calls("sudo") if call.endswith(f"cat /{ETC}/.env")]


def test_what_is_neither_file_nor_folder_is_removed_whatever_its_name(installed):
    os.mkfifo(installed.disk / LOG / "a pipe")
    os.mkfifo(installed.disk / ETC / "\x1b[2J\nstarted    all")
    (installed.disk / LOG / "records").mkdir()
    (installed.disk / LOG / "records/-rf *").symlink_to("/")
    kept = installed.place(f"{LOG}/records/1.json", "{}", 0o600)
    result = installed.run("install.sh")
    assert (result.returncode, removed(installed, result)) == (0, {
        f"{LOG}/records/-rf *": "a symlink", f"{LOG}/a pipe": "neither file nor folder",
        f"{ETC}/?[2J?started    all": "neither file nor folder"})
    assert (kept.read_text(), installed.owners()[f"{LOG}/records/1.json"]) == ("{}", SERVICE)


def test_a_folder_is_roots_before_it_is_looked_into_and_until_its_files_are_in_place(installed):
    (installed.disk / ETC / ".env").unlink()
    (installed.disk / LOG / "stdout.log").unlink()
    (installed.disk / LOG / "records").mkdir()
    (installed.disk / LOG / "x").symlink_to("/")
    installed.run("install.sh")
    changes = installed.changes()
    for folder, work in ((ETC, [f"mv -f /{ETC}/.env.new /{ETC}/.env"]),
                         (LOG, [f"chown -h root:wheel /{LOG}/records", f"rm -f /{LOG}/x",
                                f"rm -f /{LOG}/stdout.log.new",
                                f"mv -f /{LOG}/stdout.log.new /{LOG}/stdout.log"])):
        order = [f"chown -h root:wheel /{folder}", f"chmod go-w /{folder}", *work,
                 f"chown -R -h {SERVICE} /{folder}"]
        assert sorted(map(changes.index, order)) == [changes.index(line) for line in order]


def test_an_env_that_an_edit_left_to_root_is_the_services_again(installed):
    text = "PROXY_API_KEY=secret\n"
    path = installed.disk / ETC / ".env"
    path.unlink()
    installed.place(f"{ETC}/.env", text, 0o600)
    installed.own({f"{ETC}/.env": ROOT_WHEEL})
    (installed.state / "job").unlink()  # it has ended with 78, as it can't read this file
    result = installed.run("install.sh")
    assert (result.returncode, path.read_text(), path.stat().st_mode & 0o777,
            installed.owners()[f"{ETC}/.env"]) == (0, text, 0o600, SERVICE)
    assert "healthy" in result.stdout


def test_the_stricter_form_is_set_back_and_said_so(installed):
    assert "owner  " not in installed.run("install.sh").stdout
    installed.own({LOG: ROOT_WHEEL})
    result = installed.run("install.sh")
    assert re.findall("^    owner +(.*)", result.stdout.replace(str(installed.disk), ""), re.M) == [
        f"/{LOG} is {SERVICE} again, as the guide has it"]
    assert installed.owners()[LOG] == SERVICE


def test_a_run_that_fails_leaves_the_folders_to_the_service(installed):
    (installed.disk / LOG / "records").mkdir()
    before = {**installed.owners(), f"{LOG}/records": SERVICE}
    installed.own({f"{LOG}/records": SERVICE})
    (installed.disk / "usr/local/bin/aiapiproxy").unlink()
    (installed.disk / "usr/local/bin/aiapiproxy").mkdir()
    assert installed.run("install.sh").returncode == 1
    assert {**installed.owners(), "usr/local/bin/aiapiproxy": SERVICE} == before


def test_uninstalling_takes_no_file_of_others_for_root(installed):
    path, is_untouched = prey(installed)
    installed.own({"etc/prey": "me:staff"})
    os.link(path, installed.disk / LOG / "old.log")
    (installed.disk / ETC / "link").symlink_to(path)
    result = answered_script(installed, "uninstall.sh", "n\nn\ny\n")
    assert (result.returncode, installed.owners()["etc/prey"]) == (0, "me:staff")
    assert removed(installed, result) == {f"{LOG}/old.log": "a hard link",
                                          f"{ETC}/link": "a symlink"}


def test_uninstalling_keeps_the_account_while_env_has_a_second_name(installed):
    os.link(installed.disk / ETC / ".env", installed.disk / "etc/env")
    result = answered_script(installed, "uninstall.sh", "n\nn\ny\n")
    assert (result.returncode, installed.owners()["etc/env"]) == (1, SERVICE)
    assert "has a second name (a hard link): copy it, remove the link, run again" in result.stderr
    assert installed.attributes("/Users/_aiapiproxy") is not None


# ---- Uninstalling

ANSWERS = [
    ("yes to all", "y\ny\nyes\n", [], (False, False, False)),
    ("no to all", "n\n\nno\n", [], (True, True, True)),
    ("only the configuration", "y\nn\nn\n", [], (False, True, True)),
    ("only the logs", "n\ny\nn\n", [], (True, False, True)),
    ("only the account", "n\nn\ny\n", [], (True, True, False)),
    ("--yes asks nothing and keeps all", "", ["--yes"], (True, True, True)),
    ("--purge asks nothing and keeps nothing", "", ["--purge"], (False, False, False)),
]


@table(ANSWERS, "answers, options, kept")
def test_answers(installed, answers, options, kept):
    result = answered_script(installed, "uninstall.sh", answers, *options)
    assert (result.returncode, (installed.disk / ETC).exists(), (installed.disk / LOG).exists(),
            installed.attributes("/Users/_aiapiproxy") is not None) == (0, *kept)


def test_without_a_terminal_every_question_counts_as_no(installed):
    installed.run("uninstall.sh")
    assert {name.rsplit("/", 1)[0] for name in installed.files()} == {ETC, LOG}


def test_uninstalling_twice_is_no_error(installed):
    installed.run("uninstall.sh", "--purge")
    result = installed.run("uninstall.sh", "--purge")
    assert (result.returncode, installed.changes()) == (0, [])


def test_the_service_ends_before_its_files_and_rotation_before_the_account(installed):
    installed.run("uninstall.sh", "--purge")
    assert [line for line in installed.changes() if not line.startswith("launchctl bootout")] == [
        "rm -f /Library/LaunchDaemons/com.aiapiproxy.plist",
        "rm -f /etc/newsyslog.d/aiapiproxy.conf", "rm -f /usr/local/bin/aiapiproxy",
        f"rm -rf /{ETC}", f"rm -rf /{LOG}", "dscl . -delete /Users/_aiapiproxy",
        "dscl . -delete /Groups/_aiapiproxy"]


def test_purging_leaves_the_folders_of_others_and_their_files(installed):
    installed.place("usr/local/bin/other", "mine")
    installed.place("etc/newsyslog.d/other.conf", "mine")
    installed.run("uninstall.sh", "--purge")
    assert set(installed.files()) == {"usr/local/bin/other", "etc/newsyslog.d/other.conf"}
    assert all((installed.disk / name).is_dir()
               for name in ("usr/local/bin", "usr/local/etc", "usr/local/var/log"))


def test_files_that_outlive_the_account_are_given_to_root(installed):
    answered_script(installed, "uninstall.sh", "n\nn\ny\n")
    assert installed.changes("chown") == [
        f"chown {options} root:wheel /{folder}"
        for folder in (ETC, LOG) for options in ("-h", "-R -h")]
    assert set(installed.owners().values()) == {"root:wheel"}


def test_an_account_that_may_not_be_deleted_is_explained_and_the_rest_is_gone(installed):
    installed.set(refuses="DS Error: -14120 (eDSPermissionError)")
    result = installed.run("uninstall.sh", "--purge")
    assert (result.returncode, installed.files()) == (1, {})
    assert "sudo dscl . -delete /Users/_aiapiproxy" in result.stderr


def test_half_an_installation_is_taken_away(folder):
    for kill_at in (5, 25, 45):
        mac = Mac(folder / str(kill_at))
        mac.run("install.sh", kill_at=kill_at)
        result = mac.run("uninstall.sh", "--purge")
        assert (result.returncode, *outcome(mac)) == (0, {}, None, None), kill_at


def test_an_uninstallation_that_is_killed_again_and_again_is_finished_all_the_same(installed):
    codes = [-9]
    while codes[-1] == -9:
        codes.append(installed.run("uninstall.sh", "--purge", kill_at=len(codes)).returncode)
    assert (codes[-1], *outcome(installed)) == (0, {}, None, None)


# ============================================================================
# THE BENCHMARK: python3 test_aiapiproxy.py --bench
# ============================================================================
#
# Three processes take part.  This one is the client, the proxy is the program as its users start
# it, and a fork of this one is the upstream, whose answers are made beforehand.  The model's name
# selects the answer: bench-KIND-CHUNKS-INTERVAL-DELAY, with times in ms.  Every answer is checked,
# and no two requests and no two chunks of an answer are equal.  On fewer than three cores the
# processes take time from each other, so the proxy can do more than the figures say, but CPU is the
# proxy's alone.  The variable WORKERS is passed on to the proxy.

KB = 1024  # bytes
MB = 1024 * KB
BACKLOG = 1024  # connections not yet accepted: 1,000 are opened at once
OPEN_FILES = 4096  # descriptors; the proxy needs two for a stream
ANSWERS_LIMIT = 30.0  # seconds; a measurement that takes this much longer has failed
SAMPLE = 0.1  # seconds between two readings of the memory, each of which starts ps on a Mac
HEALTH_LIMIT = 3.0  # seconds for an answer of GET /health
# Linux gives CPU times in ns.  Elsewhere ps gives them in steps of 10 ms, so a time below 0.1 s is
# mostly a rounding error and not shown.
HAS_SCHEDSTAT = os.path.exists("/proc/self/schedstat")
CPU_LEAST = 0.0 if HAS_SCHEDSTAT else 0.1  # seconds


class Scale(NamedTuple):
    """The amount of each measurement.  Streams start evenly over `spread`, as real ones do."""
    seconds: float    # of a measurement without another end
    streams: tuple    # numbers of streams at once
    chunks: int       # of a stream
    interval: int     # ms between two chunks
    spread: float     # seconds
    sizes: tuple      # bytes of a request
    lengths: tuple    # chunks of an answer


FULL = Scale(2.5, (1, 10, 100, 1000), 20, 100, 0.5, (KB, 10 * KB, 100 * KB, MB),
             (100, 1000, 10000, 100000))
TINY = Scale(0.02, (1, 2), 3, 10, 0.01, (KB, 10 * KB), (10, 100))


def bench_main(arguments):
    """The exit code: 0, 1 after a failure, 2 for wrong usage, 130 after an interrupt."""
    if arguments != ["--bench"]:
        print(__doc__.split("\n\n")[1], file=sys.stderr)
        return 2
    for number in (signal.SIGTERM, signal.SIGHUP):
        # As after Ctrl-C, the other processes are ended before this one.
        signal.signal(number, signal.default_int_handler)
    # The garbage collector would look through the tables of the tests while times are measured.
    gc.freeze()
    limit = raised_open_files()
    scale = FULL._replace(streams=tuple(count for count in FULL.streams if 2 * count + 100 < limit))
    try:
        with benched() as bench:
            print(machine(), flush=True)
            asyncio.run(measure(bench, scale, print_row))
    except KeyboardInterrupt:
        return 130
    except (OSError, asyncio.TimeoutError) as error:
        print(f"The benchmark has failed: {error!r}", file=sys.stderr)
        return 1
    print(f"\nWrong answers: {len(bench.wrong)}", *bench.wrong[:1])
    return 1 if bench.wrong else 0


def machine():
    """One line: the model of the CPU, cores, system, Python."""
    try:
        cpu = re.search(r"model name\s*: (.+)", pathlib.Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):  # not Linux, or a CPU without a name
        cpu = output_of("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
    workers = os.environ.get("WORKERS") or 1
    return (f"{cpu}, {os.cpu_count()} cores, {platform.platform(terse=True)}, "
            f"Python {platform.python_version()}, WORKERS={workers}")


def output_of(*command):
    """The output of a command, or nothing if it does not exist or fails."""
    try:
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                              check=True).stdout.decode().strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def raised_open_files():
    """The limit of open files, raised to OPEN_FILES if allowed; all processes inherit it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return OPEN_FILES
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return max(soft, wanted)


def print_row(*cells):
    """A line of a table, its first cell on the left; one cell alone is a line of text."""
    first, *others = cells
    print("  ".join([f"{first:<44}", *(f"{cell:>16}" for cell in others)]).rstrip(), flush=True)


# ---- Requests of the benchmark

NUMBER = b"########"  # the place of a request's number, which makes it different from all others
NUMBERS = itertools.count()
WORD = b"word"  # in the text of every chunk; the first one is the first token
MESSAGE_STOP = b'event: message_stop\ndata: {"type":"message_stop"}\n\n\r\n0\r\n\r\n'
CODE = ('def total(prices, rate):\n    """With tax."""\n'
        '    return sum(prices) * (1 + rate)  # "0.19"\n\n')
TURN = 3125  # bytes
MARKS = {  # kind of answer -> a part of each chunk's event, end of the answer
    "plain": (b'"text":"Hello"', b"}"),
    "text": (b'"text_delta","text":"word', MESSAGE_STOP),
    "tool": (b'"input_json_delta","partial_json":"word', MESSAGE_STOP),
}


class Work(NamedTuple):
    """A request, and the marks of a right answer."""
    before: bytes    # the request up to its number
    after: bytes     # the rest of the request
    mark: bytes      # a part of the answer
    count: int       # of this part
    end: bytes       # of the answer

    def request(self):
        return b"%b%08d%b" % (self.before, next(NUMBERS), self.after)

    def is_right(self, raw):
        is_complete = raw.startswith(b"HTTP/1.1 200 ") and raw.endswith(self.end)
        return is_complete and raw.count(self.mark) == self.count


def work(asked, size, kind, chunks=1, interval=0, delay=0):
    """The request as `size` bytes of JSON, for an answer of this kind; times in ms."""
    model = f"bench-{kind}-{chunks}-{interval}-{delay}"
    body = filled({**asked, "model": model, "stream": kind != "plain"}, size)
    head = (b"POST /v1/messages HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            b"X-Api-Key: x\r\nAnthropic-Version: 2023-06-01\r\nContent-Length: %d\r\n\r\n")
    before, after = (head % len(body) + body).split(NUMBER)
    mark, end = MARKS[kind]
    return Work(before, after, mark, chunks, end)


def filled(asked, size):
    """A request as JSON of `size` bytes, with a filler in its first message."""
    opening, *others = asked["messages"]
    left = size - len(compact(asked))
    filler = ("Please look at this once more. " * (left // 31 + 1))[:left]
    return compact({**asked, "messages": [usr(filler + opening["content"]), *others]}).encode()


def conversation(turns):
    """A question, then pairs of a call and its result with TURN bytes each."""
    said = [usr(NUMBER.decode())]
    for turn in range(turns):
        id = f"toolu_{turn:024d}"
        edit = {"path": f"/src/total_{turn}.py", "text": CODE * 9}
        said += [asst([txt("I will change the file."), use(id, "Edit", edit)]),
                 usr([res(id, f"{turn}\n" + CODE * 18)])]
    return said


def claude_code():
    """A request like Claude Code's: 24 tools (54 KB), a system prompt (15 KB), 19 messages."""
    options = {f"option_{number}": {"type": "string", "description": CODE[:75]}
               for number in range(8)}
    schema = {"type": "object", "properties": options, "required": ["option_0"],
              "additionalProperties": False}
    tools = [tool(f"Tool{number}", schema, description=CODE * 11) for number in range(24)]
    system = {**txt(CODE * 145), "cache_control": {"type": "ephemeral"}}
    return req(conversation(9), system=[system], tools=tools)


def grown(size):
    """A request without tools whose conversation grows with its size."""
    return req(conversation(max(0, size - KB) // TURN))


# ---- The upstream of the benchmark

LENGTH = re.compile(rb"(?i)\r\ncontent-length: *(\d+)")
# Tokens of the prompt in its usage; of less than it has sent the proxy would warn.
PROMPT = 300_000
MODEL = re.compile(rb'"model": ?"bench-(\w+-\d+-\d+-\d+)"')
STREAM_HEAD = (b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
               b"Transfer-Encoding: chunked\r\n\r\n")


def is_whole(raw):
    """Whether an HTTP message has its last chunk or all bytes of its content length."""
    if raw.endswith(b"\r\n0\r\n\r\n"):
        return True
    end = raw.find(b"\r\n\r\n")
    length = LENGTH.search(raw, 0, end) if end > 0 else None
    return length is not None and len(raw) >= end + 4 + int(length[1])


def event_chunk(data):
    """One event of the upstream in a chunk of its own, with all members that OpenAI sends."""
    if isinstance(data, dict):
        data = {"id": "chatcmpl-CXyzabcdefghijklmnopqrstuv", "object": "chat.completion.chunk",
                "created": 1790000000, "model": "gpt-4o-2024-08-06", "service_tier": "default",
                **data}
    event = sse([data])
    return b"%x\r\n%b\r\n" % (len(event), event)


@functools.lru_cache(maxsize=None)
def upstream_answer(kind, chunks):
    """One piece for each chunk of the answer, the first with its head, the last with its end."""
    if kind == "plain":
        body = compact(completion({"content": "Hello"}, usage=used(PROMPT, 2))).encode()
        return [b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
                % (len(body), body)]
    is_text, text = kind == "text", "word%08d "
    pattern = event_chunk(ctext(text % 0) if is_text else frag(0, None, None, text % 0))
    before, after = pattern.split(b"00000000 ")
    pieces = [b"%b%08d %b" % (before, number, after) for number in range(chunks)]
    call_start = [frag(0, "call_1", "Edit", ""), frag(0, None, None, '{"text": "')]
    opening = [ROLE] if is_text else [ROLE, *call_start]
    closing = [cend("stop")] if is_text else [frag(0, None, None, '"}'), cend("tool_calls")]
    pieces[0] = STREAM_HEAD + b"".join(map(event_chunk, opening)) + pieces[0]
    pieces[-1] += b"".join(map(event_chunk, [*closing, cuse(PROMPT, chunks), DONE])) + b"0\r\n\r\n"
    return pieces


@functools.lru_cache(maxsize=None)
def upstream_answer_at_once(kind, chunks):
    return b"".join(upstream_answer(kind, chunks))


class BenchUpstream(asyncio.Protocol):
    """Answers each request by the name of its model."""

    def connection_made(self, transport):
        self.transport, self.heard, self.loop = transport, bytearray(), asyncio.get_running_loop()

    def data_received(self, data):
        self.heard += data
        if not is_whole(self.heard):
            return
        kind, *numbers = MODEL.search(self.heard)[1].decode().split("-")
        chunks, interval, delay = map(int, numbers)
        self.heard.clear()
        pieces = iter(upstream_answer(kind, chunks) if interval
                      else [upstream_answer_at_once(kind, chunks)])
        due = self.loop.time() + delay / 1000
        if delay:
            self.loop.call_at(due, self.send, pieces, interval / 1000, due)
        else:
            self.send(pieces, interval / 1000, due)

    def send(self, pieces, interval, due):
        """Writes a piece that is due now, and plans the next one `interval` seconds later."""
        piece = next(pieces, None)
        if piece is not None and not self.transport.is_closing():
            self.transport.write(piece)
            self.loop.call_at(due + interval, self.send, pieces, interval, due + interval)


@contextlib.contextmanager
def bench_upstream():
    """The port of the upstream, a process that is ended with the context."""
    with socket.create_server(("127.0.0.1", 0), backlog=BACKLOG) as listener:
        fork = multiprocessing.get_context("fork")
        process = fork.Process(target=serve_bench, args=(listener,), daemon=True)
        process.start()
        port = listener.getsockname()[1]
    try:
        yield port
    finally:
        process.kill()
        process.join()


def serve_bench(listener):
    """Serves in the upstream's process until the parent has ended."""
    async def serve():
        parent_ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(multiprocessing.parent_process().sentinel, parent_ended.set)
        await loop.create_server(BenchUpstream, sock=listener, backlog=BACKLOG)
        await parent_ended.wait()

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    asyncio.run(serve())


# ---- The proxy of the benchmark

class Bench:
    """The proxy under load: its answers, its memory and its CPU."""

    def __init__(self, port, upstream_port, pids, start):
        self.port, self.upstream_port, self.pids, self.start = port, upstream_port, pids, start
        self.idle_memory = self.most_memory = self.memory()
        self.wrong = []  # the first bytes of each wrong answer

    def memory(self, name="VmRSS"):
        """Resident MB of all processes, now or (VmHWM, Linux only) at the peak, or nan."""
        return sum(process_memory(pid, name) for pid in self.pids)

    def cpu(self):
        """Seconds of CPU that all processes have used; nan if not known."""
        return sum(process_cpu(pid) for pid in self.pids)

    async def ask(self, client, asked):
        """The Answer, checked."""
        answer = await client.ask(asked)
        if not asked.is_right(client.raw):
            self.wrong.append(bytes(client.raw[:300]))
        return answer

    async def watched(self, *asking):
        """The lists of Answers that the coroutines return, as one Measured."""
        seen = [self.memory()]

        async def look():
            while True:
                await asyncio.sleep(SAMPLE)
                seen.append(self.memory())

        looking, cpu, began = asyncio.ensure_future(look()), self.cpu(), time.perf_counter()
        try:
            answers = list(itertools.chain.from_iterable(await asyncio.gather(*asking)))
        finally:
            looking.cancel()
        seconds, cpu = time.perf_counter() - began, self.cpu() - cpu
        most = max(*seen, self.memory())
        self.most_memory = max(self.most_memory, most, self.memory("VmHWM"))
        return Measured(answers, seconds, cpu if cpu > CPU_LEAST else math.nan, most)

    async def load(self, asked, at_once, seconds):
        """Repeats the request on `at_once` connections; the first on each is not counted."""
        async def repeated(client):
            answers = []
            while not answers or time.perf_counter() < end:
                answers.append(await self.ask(client, asked))
            return answers

        async with connections(self.port, at_once) as clients:
            await asyncio.gather(*(self.ask(client, asked) for client in clients))
            end = time.perf_counter() + seconds
            asking = map(repeated, clients)
            return await asyncio.wait_for(self.watched(*asking), seconds + ANSWERS_LIMIT)

    async def paced(self, asked, at_once, spread):
        """Sends the request once on each of `at_once` connections, evenly over `spread` seconds."""
        async def later(number, client):
            await asyncio.sleep(number / at_once * spread)
            return [await self.ask(client, asked)]

        async with connections(self.port, at_once) as clients:
            asking = itertools.starmap(later, enumerate(clients))
            return await asyncio.wait_for(self.watched(*asking), ANSWERS_LIMIT)

    async def added(self, asked, seconds):
        """Median ms to the first token through the proxy, minus those of direct requests."""
        direct = asked._replace(mark=b'"content":"word', end=event_chunk(DONE) + b"0\r\n\r\n")
        times = []
        async with connections(self.port, 1) as (through,), \
                connections(self.upstream_port, 1) as (past,):
            end = time.perf_counter() + seconds
            while not times or time.perf_counter() < end:
                times.append([(await self.ask(client, which)).first
                              for client, which in ((through, asked), (past, direct))])
        proxied, bare = map(statistics.median, zip(*times))
        return (proxied - bare) * 1000


class Answer(NamedTuple):
    """Seconds from the request to the answer's end, and to its first token."""
    seconds: float
    first: float


class Measured(NamedTuple):
    """The result of one measurement."""
    answers: list
    seconds: float
    cpu: float       # seconds of the proxy
    memory: float    # MB of the proxy, the highest of all readings

    def median(self):
        """The median of the seconds from a request to the end of its answer."""
        return statistics.median(answer.seconds for answer in self.answers)


class Client(asyncio.Protocol):
    """A connection that is kept, with one request on its way at a time."""

    def connection_made(self, transport):
        self.transport, self.raw, self.ended = transport, bytearray(), None

    def data_received(self, data):
        self.raw += data
        if not self.first and WORD in self.raw:
            self.first = time.perf_counter()
        if not self.ended.done() and is_whole(self.raw):
            self.ended.set_result(time.perf_counter())

    def connection_lost(self, error):
        if self.ended and not self.ended.done():
            self.ended.set_exception(error or ConnectionResetError("hung up in an answer"))

    async def ask(self, asked):
        """The Answer; its bytes stay in `raw` until the next request."""
        self.raw.clear()
        self.first, self.ended = 0.0, asyncio.get_running_loop().create_future()
        request = asked.request()
        began = time.perf_counter()
        self.transport.write(request)
        return Answer(await self.ended - began, self.first - began)


@contextlib.asynccontextmanager
async def connections(port, count):
    """`count` connected Clients."""
    clients, loop = [], asyncio.get_running_loop()
    try:
        for _ in range(count):
            _, client = await loop.create_connection(Client, "127.0.0.1", port)
            clients.append(client)
        yield clients
    finally:
        for client in clients:
            client.transport.abort()


@contextlib.contextmanager
def benched():
    """A Bench whose processes are ended with the context."""
    workers, port = os.environ.get("WORKERS") or "1", free_port()
    with bench_upstream() as upstream_port:
        url, began = f"http://127.0.0.1:{upstream_port}/v1", time.perf_counter()
        with bench_proxy(SERVER_PORT=str(port), OPENAI_BASE_URL=url, WORKERS=workers) as process:
            wait_for(lambda: is_serving(process, port))
            start, pids = time.perf_counter() - began, [process.pid]
            if int(workers) > 1:
                wait_for(lambda: len(children(process.pid)) == int(workers))
                pids += children(process.pid)
            yield Bench(port, upstream_port, pids, start)


@contextlib.contextmanager
def bench_proxy(**environ):
    """The program as a process, in a folder without .env; Ctrl-C does not reach its session."""
    environ = {"PATH": os.environ["PATH"], "OPENAI_API_KEY": "x", "LOG_LEVEL": "warn",
               "MAX_CONCURRENT_REQUESTS": str(OPEN_FILES), **environ}
    command = [sys.executable, str(ROOT / "aiapiproxy.py")]
    with tempfile.TemporaryDirectory() as folder, subprocess.Popen(
            command, cwd=folder, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            start_new_session=True) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(OSError):  # it has ended already
                os.killpg(process.pid, signal.SIGKILL)  # its workers too


def is_serving(process, port):
    """Whether the proxy answers.  Raises ChildProcessError if it has ended."""
    if process.poll() is not None:
        raise ChildProcessError(f"the proxy has ended with code {process.returncode}")
    with contextlib.suppress(ConnectionError):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=HEALTH_LIMIT)
        with contextlib.closing(connection):
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
    return False


def process_memory(pid, name):
    """Resident MB of a process, from the line `name` of its status or from ps."""
    with contextlib.suppress(OSError, TypeError):  # a Mac, or a process that has ended
        status = pathlib.Path(f"/proc/{pid}/status").read_text()
        return int(re.search(rf"{name}:\s+(\d+)", status)[1]) / KB
    return float(output_of("ps", "-o", "rss=", "-p", str(pid)) or "nan") / KB


def process_cpu(pid):
    """Seconds of CPU of a process, from the files of the scheduler or from ps (H:MM:SS)."""
    if HAS_SCHEDSTAT:
        threads = pathlib.Path(f"/proc/{pid}/task").glob("*/schedstat")
        return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e9
    seconds = 0.0
    for part in (output_of("ps", "-o", "time=", "-p", str(pid)) or "nan").split(":"):
        seconds = seconds * 60 + float(part)
    return seconds


# ---- Measurements

async def measure(bench, scale, row):
    """Measures all and gives each line of both tables to row(cell, ...) at once."""
    await measure_speed(bench, scale, row)
    row("")
    row("As the work grows")
    await measure_growing(bench, scale, row, "Answer", "chunks", {
        chunks: work(req(conversation(0)), KB, "text", chunks) for chunks in scale.lengths})
    await measure_growing(bench, scale, row, "Conversation without tools", "KB", {
        size // KB: work(grown(size), size, "plain") for size in scale.sizes})
    await measure_streams(bench, scale, row)  # last, because it takes the most memory


async def measure_speed(bench, scale, row):
    """Measures Table 1, the speed of one proxy."""
    small, large = req(conversation(0)), claude_code()
    row("")
    row("What", "measured", "CPU of the proxy")
    row("Start, to the first answer", figure(bench.start, "{:.2f} s"))
    row("Memory when idle", figure(bench.idle_memory, "{:.1f} MB"))
    for name, asked, at_once in (
            ("Requests of 1 KB, 32 at once", work(small, KB, "plain"), 32),
            ("Requests of 100 KB, 8 at once", work(large, 100 * KB, "plain"), 8)):
        found = await bench.load(asked, at_once, scale.seconds)
        count = len(found.answers)
        row(name, figure(count / found.seconds, "{:,.0f} a second"),
            figure(found.cpu / count * 1e3, "{:.2f} ms each"))
    found = await bench.load(work(large, 100 * KB, "plain"), 1, scale.seconds)
    row("Requests of 100 KB, one at a time, p50", figure(found.median() * 1e3, "{:.2f} ms"))
    for name, kind in (("Chunks of text", "text"), ("Chunks of tool arguments", "tool")):
        found = await bench.load(work(small, KB, kind, 500), 8, scale.seconds)
        count = 500 * len(found.answers)
        row(f"{name}, 8 streams of 500", figure(count / found.seconds, "{:,.0f} a second"),
            figure(found.cpu / count * 1e6, "{:.1f} ms per 1,000"))
    for size, asked in ((1, small), (100, large)):
        added = await bench.added(work(asked, size * KB, "text", 20), scale.seconds)
        row(f"Added to the first token, request of {size} KB", figure(added, "{:.2f} ms"))
    row("Memory at the peak of all this", figure(bench.most_memory, "{:.1f} MB"))


async def measure_streams(bench, scale, row):
    """Measures a part of Table 2, streams as slow as those of a model."""
    ideal = scale.chunks * scale.interval / 1000  # seconds; an interval before the first chunk too
    row("")
    row(f"Streams at once ({scale.chunks} chunks, {scale.interval} ms apart)", "slowest, ideal",
        "CPU per 1,000", "memory")
    interval, costs = scale.interval, []
    asked = work(req(conversation(0)), KB, "text", scale.chunks, interval, interval)
    for count in scale.streams:
        found = await bench.paced(asked, count, scale.spread)
        costs.append(found.cpu)
        row(f"{count:,}", f"{max(answer.seconds for answer in found.answers):.2f}, {ideal:.2f} s",
            figure(found.cpu / count / scale.chunks * 1e6, "{:.0f} ms"),
            figure(found.memory, "{:.1f} MB"))
    row(growth("streams", scale.streams, "CPU", costs))


async def measure_growing(bench, scale, row, name, unit, asked):
    """Measures a part of Table 2, single requests of growing size; `asked`: size -> Work."""
    row("")
    row(f"{name}, {unit}", "ms", "us each", "memory")
    times = []
    for size, each in asked.items():
        found = await bench.load(each, 1, scale.seconds / 2)
        times.append(found.median())
        row(f"{size:,}", f"{times[-1] * 1e3:.2f}", f"{times[-1] * 1e6 / size:.2f}",
            figure(found.memory, "{:.1f} MB"))
    row(growth(unit, list(asked), "time", times))


def figure(value, form):
    """A figure as text, "-" for nan."""
    return "-" if math.isnan(value) else form.format(value)


def growth(name, work_done, cost_name, costs):
    """The cost of the last row compared to the first known one, as text; "" if none is known."""
    known = [(done, cost) for done, cost in zip(work_done, costs) if not math.isnan(cost)]
    if not known:
        return ""
    (least, first), (most, last) = known[0], known[-1]
    return f"{most / least:,.0f} times as many {name}: {last / first:,.1f} times the {cost_name}"


# ---- Tests of the benchmark

def test_the_requests_of_the_benchmark_have_the_size_that_they_claim():
    large = filled(claude_code(), 100 * KB)
    bodies = [(size, filled(grown(size), size)) for size in FULL.sizes]
    for size, body in [(100 * KB, large), *bodies]:
        filler = json.loads(body)["messages"][0]["content"]
        assert len(body) == size and len(filler) < TURN + KB
    asked = json.loads(large)
    assert (len(asked["tools"]), len(asked["messages"])) == (24, 19)
    assert [round(len(compact(asked[name])) / KB) for name in ("tools", "system")] == [54, 15]


def test_every_measurement_of_the_benchmark_works_against_the_program():
    rows = []
    with benched() as bench:
        asyncio.run(measure(bench, TINY, lambda *cells: rows.append(cells)))
    assert bench.wrong == []
    if not CPU_LEAST:
        assert rows[-1][0].startswith("2 times as many streams: ")
        assert not any("-" in cells for cells in rows)


@table([
    ("an answer as it should be", lambda answer: answer, True),
    ("a chunk is missing", lambda answer: answer.replace(b"word00000001", b""), False),
    ("another status", lambda answer: answer.replace(b"200", b"500", 1), False),
    ("no end", lambda answer: answer[:-7] + b"\n", False),
], "spoil, want")
def test_the_benchmark_tells_a_wrong_answer(spoil, want):
    end = event_chunk(DONE) + b"0\r\n\r\n"
    asked = work(req(conversation(0)), KB, "text", 3)._replace(mark=WORD, end=end)
    assert asked.is_right(spoil(upstream_answer_at_once("text", 3))) == want


def test_an_interrupted_benchmark_leaves_no_process_and_does_without_pytest():
    command = [sys.executable, "-S", os.path.abspath(__file__), "--bench"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as bench:
        try:
            assert b"cores" in bench.stdout.readline()  # all processes have started
            begun = children(bench.pid)
            bench.send_signal(signal.SIGINT)
            assert bench.wait(10) == 130 and len(begun) == 2 and not any(map(is_alive, begun))
        finally:
            bench.kill()


if __name__ == "__main__":
    sys.exit(bench_main(sys.argv[1:]))
