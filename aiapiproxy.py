#!/usr/bin/env python3
"""aiapiproxy: the Anthropic Messages API in front of any OpenAI-compatible model.

    python3 aiapiproxy.py --demo         serves on 127.0.0.1:8082 without a key, to look at
    python3 aiapiproxy.py                serves with OPENAI_API_KEY and OPENAI_BASE_URL from ./.env
    python3 aiapiproxy.py --check        tells what is missing

Claude Code and every program on the Anthropic SDKs sends POST /v1/messages; this program translates
it to POST {OPENAI_BASE_URL}/chat/completions, and the answer back, chunk by chunk.  One file, the
standard library, Python 3.9 and newer.

A section names nothing from a section below it.  Inside a section the function that is the section
stands first, its helpers behind it, the tables that they read last.

    Part I     Translation: it cannot block, because it cannot wait
     1  WORDS AND ERRORS        ProxyError and its kinds: every failure that a client can see
     2  JSON                    reading hostile JSON, writing clean JSON
     3  MODELS AND HOSTS        tables of hosts, models, limits and efforts
     4  CONVERSATION            the client's params, checked and read once
     5  CONTENT AND IDS         blocks as text; ids and reasoning that travel through the client
     6  CHAT: THE REQUEST       the conversation as a Chat Completions body
     8  BLOCKS                  BlockMachine between a reader and EventWriter or MessageWriter
     9  TEXT FILTER             <think>, a repeated prefill, stop sequences; Reader
    10  SERVER-SENT EVENTS      SSEDecoder
    11  CHAT: THE ANSWER        ChatReader: completions and chunks
    13  UPSTREAM ERRORS         error_facts -> one error that makes a client do the right thing
    14  ADJUSTMENTS             ADJUSTMENTS: changes of the body that upstream errors ask for
    15  TOKEN ESTIMATE          the size of a prompt without a vocabulary
    16  APIS                    translation_of and StreamTranslator, the doors of Part I
    Part II    The wire: bytes and connections
    17  HTTP/1.1                heads as pure functions, bodies with feed()
    18  BYTE STREAMS            ByteStream: one connection, on both sides
    19  UPSTREAM CLIENT         Upstream.send -> UpstreamResponse; pool, TLS, outgoing proxy
    20  SERVER                  Server and Exchange: a client's request and our response
    Part III   The service
    21  SETTINGS                Settings: one field for each environment variable
    22  LOG                     one line for each request
    23  METRICS AND HISTORY     sums for Prometheus, the last hour for the status page
    24  WHO MAY CALL            origins, hosts, keys
    25  ONE REQUEST             create_message, Relay
    27  OTHER ENDPOINTS         respond, ROUTES and the handlers
    28  RUN                     serve: signals, reload, the end
    Part IV    Beside it: nothing above names it
    29  RECORD AND REPLAY       RECORD_DIR, --replay
    30  CHECK                   --check
    31  DEMO                    the upstream of --demo
    32  STATUS PAGE             the page at /
    33  WORKERS                 several processes on one socket
    34  SPEED                   shortcuts: the same bytes sooner
    35  COMMAND LINE            main, options, configuration files

Ten words, and nothing else is called by them:

    client        the program that calls us; it speaks the Messages API
    upstream      a server that we call; it speaks Chat Completions
    params        the client's request body, parsed (the SDKs' word)
    body          the JSON that we send to an upstream
    conversation  the params, read once: turns, tools, wishes, in no API's words
    translation   one request on its way: conversation, model, body, and the facts needed to read
                  the answer
    block         an element of a message's content: text, thinking, tool_use
    chunk         a piece of an upstream's answer, parsed
    event         a server-sent event for the client
    adjustment    a change of the body that an upstream's error asked for

One request as data:

    bytes -> Request -> params -> Conversation -> body -> bytes => UPSTREAM
    UPSTREAM => bytes -> chunk -> reader -> BlockMachine -> writer -> events or one message -> bytes

What always holds:
  - An answer that looks complete is complete: a broken one ends with an error, not with
    message_stop.
  - When a client disconnects, its upstream call ends at once.
  - The only key that is sent to an upstream is that upstream's; no key is in a log, a page or an
    answer.
  - All memory is bounded: a slow reader slows its upstream.
  - Nothing outlives a request except connections, adjustments and caches; deleting the caches would
    change no answer.  So any number of copies can share the work.

To add: a content block, a row of USER_PARTS or ASSISTANT_PARAGRAPHS (5); a quirk that an upstream
tells by an error, a row of ADJUSTMENTS (14); an endpoint, a function and a row of ROUTES (27); a
setting, a field of Settings (21) and its line in env.example; a metric, a row of METRICS (23).

Left out on purpose: batches, files, server tools, HTTP/2, TLS towards clients (nginx has it),
answers from a cache, anything that would have to store a conversation.

References: [Anthropic: ...] and [OpenAI: ...] are their API references, [RFC 9110] HTTP, [RFC 9112]
HTTP/1.1, [WHATWG] server-sent events, [Fetch] CORS, [Prometheus] its text format.
"""

from __future__ import annotations

import asyncio
import base64
import enum
import errno
import gc
import hashlib
import hmac
import ipaddress
import itertools
import json
import logging
import math
import mmap
import os
import re
import signal
import socket
import ssl
import stat
import struct
import sys
import threading
import time
import zlib
from bisect import bisect_left
from collections import defaultdict, deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from datetime import datetime, timezone
from functools import cached_property, lru_cache, partial
from http import HTTPStatus
from json.decoder import scanstring
from typing import (Any, Awaitable, Callable, Coroutine, Deque, Dict, Iterable, Iterator, List,
                    Mapping, Match, NamedTuple, Optional, Pattern, Protocol, Sequence, Set, Tuple,
                    Type, Union)
from urllib.parse import SplitResult, parse_qsl, unquote, unquote_plus, urlsplit

__version__ = "1.0.0"


# ############################################################################
# PART I. TRANSLATION: no waiting, no socket, no clock
# ############################################################################

# ============================================================================
# 1. WORDS AND ERRORS
# ============================================================================
#
# The words that all sections share, and the errors.  Every failure that a client can see is a
# ProxyError: a status, from which the Anthropic API's kind of error follows, and a sentence for a
# person.  Code that raises one knows nothing about HTTP responses: `respond` (27) makes them, and
# once a stream has begun, the translator (16) turns the same object into an `error` event.
# [Anthropic: errors]

# ---- 1.1 words -------------------------------------------------------------

Json = Dict[str, Any]
NewId = Callable[[int], str]             # n -> n random letters and digits
REASON_PHRASES = {int(status): status.phrase for status in HTTPStatus}


# Parsed JSON is of unknown types until one of these functions has looked at it.  A bool is an int
# for Python, but `true` is no number of JSON.

def is_object(value: Any) -> bool:
    return isinstance(value, dict)


def is_list(value: Any) -> bool:
    return isinstance(value, list)


def objects_in(value: Any) -> List[Json]:
    """The objects of a list; none for any other value."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def is_name(value: Any) -> bool:
    """Whether a value is a string with something in it."""
    return isinstance(value, str) and value != ""


def is_boolean(value: Any) -> bool:
    return isinstance(value, bool)


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def text_part(text: str) -> Json:
    """A text block of the Messages API, which is a text part of Chat Completions too."""
    return {"type": "text", "text": text}


def object_member(value: Json, name: str) -> Json:
    """A member if it is an object, else an empty object."""
    member = value.get(name)
    return member if is_object(member) else {}


def sha256_hex(text: str) -> str:
    """64 hex digits that are always the same for the same text."""
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


# ---- 1.2 redaction ---------------------------------------------------------

def redacted(text: str, secrets: Iterable[str]) -> str:
    """A text of somebody else's that people may read: no key, no control character, not too long.

    The last four characters of a key stay, so that people can tell which of their keys it is.
    """
    if not text:
        return ""
    for secret in secrets:
        if secret in text:
            text = text.replace(secret, f"sk-…{secret[-4:]}")
    text = KEY_LIKE.sub(r"sk-…\1", text) if "sk-" in text else text
    return (text if text.isprintable() else CONTROL.sub(" ", text))[:ERROR_TEXT]


ERROR_TEXT = 4096                        # characters of an upstream's message
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
KEY_LIKE = re.compile(r"\bsk-[A-Za-z0-9_-]{8,}([A-Za-z0-9_-]{4})")


# ---- 1.3 errors ------------------------------------------------------------

class ProxyError(Exception):
    """A failure that is told to the client.  `kind`: the `error.type` that belongs to its status.

    `message` is the sentence for the client, `log_message` the text for the log: an upstream's
    message may quote the prompt, so it is not logged.  `headers`, names in lower case, are added to
    the response, `details` to the error object; `outcome` is the label in the metrics.
    """

    outcome = "rejected"

    def __init__(self, status: int, message: str, *, headers: Optional[Dict[str, str]] = None,
                 details: Optional[Json] = None) -> None:
        super().__init__(message)
        self.status = status
        default_kind = "invalid_request_error" if status < 500 else "api_error"
        self.kind = ERROR_KINDS.get(status, default_kind)
        self.message = self.log_message = message
        self.headers = headers or {}
        self.details = details


class ProtocolError(ProxyError):
    """A client broke HTTP/1.1: it gets an answer, then its connection is closed."""


class UpstreamError(ProxyError):
    """The upstream failed.  `upstream_status` is its own status, 0 where it gave none."""

    outcome = "upstream_error"

    def __init__(self, status: int, message: str, *, headers: Optional[Dict[str, str]] = None,
                 upstream_status: int = 0, is_context_overflow: bool = False,
                 log_message: str = "") -> None:
        super().__init__(status, message, headers=headers)
        self.upstream_status = upstream_status
        self.is_context_overflow = is_context_overflow
        self.log_message = log_message or message


class ConnectionLost(UpstreamError):
    """The upstream's connection failed; before any byte of an answer, a request can be resent."""

    has_response = False                 # whether a byte of the answer has arrived


class ClientDisconnected(Exception):
    """The client closed its connection, so nobody reads an answer."""


class ConfigError(Exception):
    """Settings that cannot be used; `problems` has one sentence for each."""

    def __init__(self, problems: List[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


def error_fields(error: ProxyError, request_id: str) -> Json:
    """The Messages API's error object, for a response's body or the data of an `error` event."""
    members: Json = {"type": error.kind, "message": error.message}
    if error.details is not None:
        members["details"] = error.details
    return {"type": "error", "error": members, "request_id": request_id}


ERROR_KINDS = {
    401: "authentication_error", 402: "billing_error", 403: "permission_error",
    404: "not_found_error", 408: "timeout_error", 409: "conflict_error", 413: "request_too_large",
    429: "rate_limit_error", 504: "timeout_error", 529: "overloaded_error"}


# ---- 1.4 shortcuts ---------------------------------------------------------

class Shortcuts(NamedTuple):
    """The doors for faster ways to the same bytes, which stand in 34; None is the plain way."""
    chunk_pattern: Optional[Callable[..., Any]] = None       # makes a ChunkPattern for one stream
    count_tokens: Optional[Callable[[Any], int]] = None      # item_tokens with a cache
    parse_body: Optional[Callable[[str], Any]] = None        # client_json with a cache
    encode_body: Optional[Callable[[Json], bytes]] = None    # json_bytes with a cache


PLAIN = Shortcuts()


# ============================================================================
# 2. JSON
# ============================================================================
#
# Incoming JSON is hostile: numbers that no float can hold, nesting that no stack can hold, lone
# surrogates.  There is one reader for each sender: client_json is strict and bounded, upstream_json
# takes every dialect, model_json reads JSON that a model wrote.  Outgoing JSON is compact ASCII
# without lone surrogates, because a client in Python crashes when it encodes one.  [RFC 8259]

# ---- 2.1 writing -----------------------------------------------------------

def json_text(value: Any) -> str:
    """Compact ASCII JSON.  Raises ValueError for NaN, infinity and values nested too deeply."""
    try:
        text = _encoder.encode(value)
        # `\ud` marks a surrogate, paired or lone; rfind is three times as fast as find.
        if text.rfind("\\ud") >= 0:
            clean = without_lone_surrogates(value)
            text = text if clean == value else _encoder.encode(clean)
        return text
    except RecursionError:
        raise ValueError(TOO_DEEP) from None


def without_lone_surrogates(value: Any) -> Any:
    """A JSON value whose surrogates are paired or replaced by U+FFFD.

    Two neighbouring surrogates become one character: upstreams split an emoji between two chunks.
    """
    if isinstance(value, str):
        return well_formed_text(value)
    if isinstance(value, list):
        return [without_lone_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {well_formed_text(key): without_lone_surrogates(item) for key, item in value.items()}
    return value


def well_formed_text(text: str) -> str:
    """Text with its surrogates paired or replaced; itself if it has none."""
    if text.isascii():
        return text
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def json_bytes(value: Any) -> bytes:
    """json_text as bytes.  Raises ValueError like it."""
    return json_text(value).encode("ascii")


def utf8_json_bytes(value: Any) -> bytes:
    """Compact JSON in UTF-8.  Raises ValueError like json_text.

    For megabytes of non-ASCII text it takes a fifth of the time of json_bytes, and half the size.
    """
    try:
        return readable_json(value).encode("utf-8")
    except UnicodeEncodeError:
        return json_bytes(value)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None


def readable_json(value: Any) -> str:
    """Compact JSON without escapes, the form in which a model reads it."""
    return _readable_encoder.encode(value)


_encoder = json.JSONEncoder(separators=(",", ":"), allow_nan=False, check_circular=False)
_readable_encoder = json.JSONEncoder(separators=(",", ":"), allow_nan=False, check_circular=False,
                                     ensure_ascii=False)
TOO_DEEP = "nested too deeply"


# ---- 2.2 reading -----------------------------------------------------------

def client_text(body: Union[bytes, bytearray]) -> str:
    """The text of a client's body, without a byte order mark.  Raises ProxyError(400)."""
    try:
        return body.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ProxyError(400, f"{NOT_JSON}: not UTF-8 at byte {error.start}") from None


def client_json(text: str) -> Any:
    """The value of a client's JSON text.  Raises ProxyError(400).

    Parsing blocks the event loop, so the number of values is bounded, and the garbage collector,
    which would traverse all new objects again and again, pauses: 32 MB take under 0.4 s.
    """
    is_large = len(text) > 1048576
    if is_large and text.count(",") > MAX_VALUES:
        raise ProxyError(400, f"{NOT_JSON}: more than {MAX_VALUES} values")
    was_collecting = is_large and gc.isenabled()
    if was_collecting:
        gc.disable()
    try:
        return _client_decoder.decode(text)
    except json.JSONDecodeError as error:
        problem = f"{error.msg} (line {error.lineno}, column {error.colno})"
    except ValueError as error:
        problem = str(error)[:200]
    except RecursionError:
        problem = TOO_DEEP
    finally:
        if was_collecting:
            gc.enable()
    raise ProxyError(400, f"{NOT_JSON}: {problem}")


def finite_float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text[:20]} is too large")
    return value


def bounded_int(text: str) -> int:
    """An integer of JSON.  Reading takes quadratic time, and not every Python bounds it."""
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number has more than {MAX_DIGITS} digits")
    return int(text)


MAX_DIGITS = 4300                        # Python's own bound, from 3.9.14 and 3.10.7 on
# Without the detour through Python code json reads integers several times as fast.
HAS_OWN_BOUND = 0 < getattr(sys, "get_int_max_str_digits", int)() <= MAX_DIGITS
PARSE_INT: Callable[[str], int] = int if HAS_OWN_BOUND else bounded_int


def reject_constant(name: str) -> None:
    raise ValueError(f"{name} is not allowed")


def bounded_reader(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """A function that reads JSON text and raises ValueError for every fault, deep nesting too."""
    def bounded(text: str) -> Any:
        try:
            return read(text)
        except RecursionError:
            raise ValueError(TOO_DEEP) from None
    return bounded


NOT_JSON = "Request body is not valid JSON"
# JSON values of a body, counted by commas, those inside of texts included.  A context window of a
# million tokens cannot hold more.
MAX_VALUES = 500000

_client_decoder = json.JSONDecoder(parse_float=finite_float, parse_int=PARSE_INT,
                                   parse_constant=reject_constant)
_model_decoder = json.JSONDecoder(parse_float=finite_float, parse_int=PARSE_INT,
                                  parse_constant=reject_constant, strict=False)

# The value of JSON text from an upstream.  Servers send raw control characters, NaN and infinity.
upstream_json = bounded_reader(json.JSONDecoder(parse_int=PARSE_INT, strict=False).decode)
# The value of JSON text that a model wrote, or that travelled through a client.  Raw control
# characters inside strings are accepted, because models don't escape line breaks.
model_json = bounded_reader(_model_decoder.decode)
# (the value at the start of a text that a model wrote, its end)
leading_model_json = bounded_reader(_model_decoder.raw_decode)


# ============================================================================
# 3. MODELS AND HOSTS
# ============================================================================
#
# Nobody configures the abilities of an upstream: they are read off the host of its URL and the name
# of the model, with the tables of this section.  An upstream's error can tell the rest (14).

# ---- 3.1 hosts -------------------------------------------------------------

@lru_cache(maxsize=256)
def is_loopback(host: str) -> bool:
    """Whether a host name or address can only mean this machine."""
    name = host.lower().rstrip(".")
    try:
        return ipaddress.ip_address(name.strip("[]").partition("%")[0]).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")


@lru_cache(maxsize=256)
def is_local_host(hostname: str) -> bool:
    """Whether a host is this machine or one of its own network, whose models take any made-up key.

    A last label that is a number makes an address in an old notation, 127.1, which counts too.
    """
    name = hostname.lower().strip("[]").rstrip(".")
    try:
        address = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return "." not in name or name.endswith(LOCAL_ENDINGS) \
            or re.fullmatch(r"\d+|0x[\da-f]*", name.rpartition(".")[2]) is not None
    return (getattr(address, "ipv4_mapped", None) or address).is_private


LOCAL_ENDINGS = (".local", ".lan", ".internal", ".localhost")


def class_of_host(hostname: str) -> str:
    """The kind of upstream behind a host name: a key of HOST_CLASSES, or `other`."""
    name = hostname.lower().rstrip(".")
    return next((kind for kind, endings in HOST_CLASSES.items() for ending in endings
                 if (name.endswith(ending) if ending[0] == "." else name == ending)), "other")


HOST_CLASSES = {                         # a leading dot: any name that ends so
    "openai": ("api.openai.com", ".api.openai.com"),
    "azure": (".openai.azure.com", ".services.ai.azure.com", ".cognitiveservices.azure.com"),
    "openrouter": ("openrouter.ai", ".openrouter.ai"),
    "deepseek": ("api.deepseek.com",),
    "mistral": ("api.mistral.ai", ".api.mistral.ai"),
    "gemini": ("generativelanguage.googleapis.com",)}


# ---- 3.2 efforts -----------------------------------------------------------

def nearest_effort(wanted: str, allowed: Sequence[str]) -> str:
    """`wanted` if it is allowed, else the nearest lower one, else the lowest."""
    ranked = [name for name in EFFORTS if name in allowed]
    lower = [name for name in ranked if EFFORTS.index(name) <= EFFORTS.index(wanted)]
    return (lower or ranked[:1] or [wanted])[-1]


def allowed_efforts(base_name: str, host_class: str) -> Tuple[str, ...]:
    """The values of reasoning_effort that a model takes; none for a model without the field."""
    return next((tuple(allowed.split()) for pattern, hosts, allowed in EFFORT_LISTS
                 if re.search(pattern, base_name) and (not hosts or host_class in hosts)), ())


EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")     # in rising order
CLIENT_EFFORTS = ("low", "medium", "high", "xhigh", "max")
EFFORT_LISTS: Tuple[Tuple[str, Tuple[str, ...], str], ...] = (   # model, hosts (none: all), efforts
    (r"^o1-(mini|preview)|^gpt-5.*-chat", (), ""),
    (r"^gpt-5-pro", (), "high"),
    (r"^o\d|^gpt-5-codex|^codex|gpt-oss", (), "low medium high"),
    (r"^gpt-5(?!\.)(?!\d)", (), "minimal low medium high"),
    (r"^gpt-5\.1(?!\d)", (), "none low medium high"),
    (r"^gpt-5\.[2-5](?!\d)", (), "none low medium high xhigh"),
    (r"^gpt-([5-9]|\d\d)", (), "none low medium high xhigh max"),
    (r"^gemini-2\.5|^gemini-[3-9]", ("gemini", "other"), "low medium high"),
    (r"^grok-3-mini", (), "low high"))


# ---- 3.3 reasoning that the client sees ------------------------------------

class ThinkingDisplay(enum.Enum):
    """How much of the model's reasoning the client wants to see."""
    HIDDEN = 0
    OMITTED = 1          # thinking blocks with a signature, without their text
    SHOWN = 2


def thinking_display(thinking: Optional[Json]) -> ThinkingDisplay:
    """The display that the field `thinking` asks for.  [Anthropic: extended thinking]"""
    if not thinking or thinking.get("type") not in ("enabled", "adaptive"):
        return ThinkingDisplay.HIDDEN
    is_omitted = thinking.get("display") == "omitted"
    return ThinkingDisplay.OMITTED if is_omitted else ThinkingDisplay.SHOWN


# ---- 3.4 targets and profiles ----------------------------------------------

class Target(NamedTuple):
    """An upstream and a model there: where a request is sent."""
    model: str                           # as the upstream knows it
    hostname: str
    host_class: str                      # a key of HOST_CLASSES, or "other"
    path: str                            # of the request's URL
    uses_own_key: bool                   # OPENAI_API_KEY, not the client's key
    api: str = "chat"                    # a key of APIS


class ModelProfile(NamedTuple):
    """All that the tables know of the upstream and the model of a request."""
    host_class: str                      # a key of HOST_CLASSES, or "other"
    model: str                           # as the upstream knows it
    base_name: str                       # lower case, without vendor prefix
    is_reasoning: bool                   # refuses max_tokens, sampling and stop
    limit_field: str                     # the name of max_tokens here
    token_cap: Optional[int]             # tokens of the longest answer, if known
    efforts: Tuple[str, ...]             # values of reasoning_effort; empty: none


def gpt_version(base_name: str) -> Tuple[int, int]:
    """(5, 1) for gpt-5.1-mini; (0, 0) for a name of another kind."""
    match = re.match(r"gpt-(\d{1,4})(?:\.(\d{1,4}))?", base_name)
    return (int(match[1]), int(match[2] or 0)) if match else (0, 0)


# Clients choose the names of models, so the cache is bounded; an upstream serves a few dozen.
@lru_cache(maxsize=256)
def model_profile(model: str, host_class: str) -> ModelProfile:
    """The profile of a model by its name, without vendor (openai/) and fine-tuning (ft:) prefix."""
    base_name = re.sub(r"^ft:", "", model.lower()).rpartition("/")[2]
    is_reasoning = bool(re.match(r"o\d|codex", base_name)) or gpt_version(base_name) >= (5, 0)
    cap = next((cap for pattern, cap in TOKEN_CAPS if re.match(pattern, base_name)), None)
    return ModelProfile(host_class, model, base_name, is_reasoning,
                        "max_completion_tokens" if is_reasoning else "max_tokens", cap,
                        allowed_efforts(base_name, host_class))


def capped_limit(requested: int, profile: ModelProfile) -> int:
    """max_tokens, but no more than the model can give: upstreams refuse a larger number.

    Clients ask for as much as Claude can give; Claude Code's number is 32000 or 128000.
    """
    return requested if profile.token_cap is None else min(requested, profile.token_cap)


TOKEN_CAPS = (
    (r"gpt-4o-2024-05-13$|gpt-4-(turbo|1106|0|vision)|gpt-3\.5", 4096),
    (r"gpt-4$", 4096),                   # half of its window of 8192
    (r"gpt-4-32k", 8192),
    (r"gpt-4o|chatgpt-4o|gpt-5.*-chat", 16384),
    (r"gpt-4\.1", 32768),
    (r"gpt-([5-9]|\d\d)", 128000),
    (r"o1-mini", 65536),
    (r"o\d", 100000))


# ============================================================================
# 4. CONVERSATION
# ============================================================================
#
# The client's params, checked and read once, in no API's words.  A field that no upstream
# can honour is dropped, unless dropping it would make the answer wrong in a way that
# the client cannot see: then the request is rejected with a sentence that names the
# field.  Nothing here changes the client's objects.  [Anthropic: Messages]

# ---- 4.1 the conversation --------------------------------------------------

@dataclass(eq=False, repr=False)
class Conversation:
    """The params, read once: all that a writer of a body needs, with no upstream in mind."""
    turns: List[Turn]                    # strictly alternating
    system: List[str]                    # texts that stand before all turns
    tools: List[Tool]                    # in the order in which they are sent
    tool_names: Dict[str, str]           # the client's -> the upstream's
    choice: Optional[ToolChoice]         # None: the client has none
    effort: Optional[str]                # one of EFFORTS
    display: ThinkingDisplay
    answer_schema: Optional[Json]        # the answer must be JSON that matches it
    max_tokens: Optional[int]            # None: nothing is generated, only counted
    sampling: Json                       # temperature, top_p
    stop_sequences: Tuple[str, ...]
    is_streamed: bool                    # the client wants events
    user_id: str
    session_id: str
    wants_standard_tier: bool
    call_ids: Set[str]                   # of the history, as written
    dropped_fields: List[str]            # for a line in the log

    def upstream_name(self, tool_name: str) -> str:
        """The name under which the upstream knows a tool, also one that only the history has."""
        return self.tool_names.get(tool_name) or upstream_tool_name(tool_name)


def conversation_of(params: Json, session_id: str, is_counting: bool) -> Conversation:
    """The Conversation of params that have passed check_fields.  Raises ProxyError(400)."""
    transcript = transcript_of(params["messages"])
    tools = tools_of(params, transcript)
    system = system_texts(params.get("system")) + transcript.system
    if tools.server_names:
        system.append(f"Not available in this session: {', '.join(tools.server_names)}. "
                      "Do not claim to have used them.")
    user_id = object_member(params, "metadata").get("user_id")
    # Somebody may miss the effect of these, and of server tools.
    dropped = [name for name in ("inference_geo", "container") if params.get(name) is not None]
    return Conversation(
        turns=transcript.turns, system=system, tools=tools.loaded, tool_names=tools.names,
        answer_schema=answer_schema(params), choice=tool_choice(params, tools),
        effort=requested_effort(params, transcript.effort),
        display=thinking_display(params.get("thinking")),
        max_tokens=None if is_counting else params["max_tokens"],
        sampling={name: params[name] for name in ("temperature", "top_p")
                  if params.get(name) is not None},
        stop_sequences=tuple(filter(None, params.get("stop_sequences") or ())),
        is_streamed=params.get("stream") is True,
        user_id=user_id if isinstance(user_id, str) else "", session_id=session_id,
        wants_standard_tier=params.get("service_tier") == "standard_only",
        call_ids=transcript.call_ids, dropped_fields=dropped + tools.server_names)


# ---- 4.2 fields ------------------------------------------------------------
#
# Each known field has a check of its type and the Anthropic API's sentence for a wrong one.
# Unknown fields pass and are dropped, so that newer clients still work.  Ranges are the
# upstream's business.

def check_fields(params: Json, is_counting: bool) -> None:
    """Raises ProxyError(400) for the first top-level field that cannot be used."""
    for name in REQUIRED_FIELDS[:2 if is_counting else 3]:
        if name not in params:
            raise ProxyError(400, f"{name}: Field required")
    for name, value in params.items():
        check = FIELD_CHECKS.get(name)
        if check is None or (value is None and name not in REQUIRED_FIELDS) or check[0](value):
            continue
        if not (is_counting and name in ("max_tokens", "stream")):
            raise ProxyError(400, f"{name}: {check[1]}")
    if not params["messages"]:
        raise ProxyError(400, "messages: at least one message is required")
    check_sizes(params)
    if not is_counting and params["max_tokens"] < 0:
        raise ProxyError(400, "max_tokens: Input should be greater than or equal to 0")
    if params.get("thread") is not None:
        # The SDKs' thread helper reads the details, and sends the whole conversation instead.
        raise ProxyError(400, "thread: not supported by this endpoint; send the whole conversation",
                         details={"error_code": "thread_unsupported_request",
                                  "unsupported": ["thread"]})


def is_system(value: Any) -> bool:
    """A string, or a list of text blocks: system texts hold no pictures."""
    return isinstance(value, str) or is_list(value) and all(
        is_object(block) and block.get("type") == "text" and isinstance(block.get("text"), str)
        for block in value)


def check_sizes(params: Json) -> None:
    """Raises ProxyError(400) for a long name of a model, which caches and logs hold, and for many
    or long stop sequences, which are searched for in each delta.
    """
    if len(params["model"]) > MAX_MODEL_NAME:
        raise ProxyError(400, f"model: String should have at most {MAX_MODEL_NAME} characters")
    sequences = params.get("stop_sequences") or ()
    if len(sequences) > MAX_STOPS:
        raise ProxyError(400, f"stop_sequences: List should have at most {MAX_STOPS} items")
    for index, sequence in enumerate(sequences):
        if len(sequence) > MAX_STOP_SIZE:
            raise ProxyError(400, f"stop_sequences.{index}: String should have at most "
                             f"{MAX_STOP_SIZE} characters")


MAX_MODEL_NAME, MAX_STOP_SIZE = 256, 1000            # characters
MAX_STOPS = 64                                       # OpenAI takes four


REQUIRED_FIELDS = ("model", "messages", "max_tokens")
FIELD_CHECKS: Dict[str, Tuple[Callable[[Any], bool], str]] = {
    # Claude Code's mark for a long context window, alone, is no model.
    "model": (lambda value: is_name(value) and value != "[1m]", "Input should be a valid string"),
    "messages": (is_list, "Input should be a valid list"),
    "max_tokens": (is_integer, "Input should be a valid integer"),
    "stream": (is_boolean, "Input should be a valid boolean"),
    "system": (is_system, "Input should be a valid string or list of text blocks"),
    **dict.fromkeys(("temperature", "top_p"), (is_number, "Input should be a valid number")),
    "stop_sequences": (
        lambda value: is_list(value) and all(isinstance(item, str) for item in value),
        "Input should be a valid list of strings"),
    **dict.fromkeys(("thinking", "metadata", "output_config"),
                    (is_object, "Input should be an object")),
    "tools": (is_list, "Input should be a valid list"),
    "mcp_servers": (lambda value: value == [], "MCP servers are not supported by this endpoint"),
    "compaction": (lambda value: False, "not supported by this endpoint"),
}


def requested_effort(params: Json, later_effort: Optional[str]) -> Optional[str]:
    """The effort that the client wants; `later_effort` is that of a system message."""
    thinking = object_member(params, "thinking")
    if thinking.get("type") in ("disabled", "between_tools"):
        return "none"
    effort = later_effort or object_member(params, "output_config").get("effort")
    if effort in CLIENT_EFFORTS:
        return effort
    # A budget has no counterpart in OpenAI's APIs, so its size picks an effort.
    budget = thinking.get("budget_tokens")
    if thinking.get("type") != "enabled" or not is_integer(budget):
        return None
    return "low" if budget < 4096 else "medium" if budget < 16384 else "high"


def system_texts(system: Any) -> List[str]:
    """The texts of `system` without Claude Code's attribution line, which spoils prompt caches."""
    texts = [system] if isinstance(system, str) else [block["text"] for block in system or ()]
    return [text for text in texts if text and not text.startswith("x-anthropic-billing-header:")]


def answer_schema(params: Json) -> Optional[Json]:
    """The JSON schema that the answer must match; `output_format` is the field's older name."""
    wanted = object_member(params, "output_config").get("format")
    if wanted is None:
        wanted = params.get("output_format")
    if wanted is None:
        return None
    schema = wanted.get("schema") if is_object(wanted) else None
    if is_object(schema) and wanted.get("type") == "json_schema":
        return schema
    raise ProxyError(
        400, 'output_config.format: Input should be {"type": "json_schema", "schema": {...}}')


# ---- 4.3 turns -------------------------------------------------------------
#
# A message is system text, or belongs to a turn: consecutive messages of one role are one
# turn.  A system message before all others is joined to the `system` field.  A later one
# becomes a Reminder in the user turn beside it, because the chat templates of many
# models refuse a second system message.

class Reminder(str):
    """The text of a later system message; it stands among the blocks of a user turn."""


Block = Union[Json, Reminder]


class Turn(NamedTuple):
    """Consecutive messages of one role."""
    role: str
    blocks: List[Block]


@dataclass(eq=False, repr=False)
class Transcript:
    """The messages of a request, checked, as turns and as the facts that stand in them."""
    turns: List[Turn] = field(default_factory=list)
    system: List[str] = field(default_factory=list)          # texts before all turns
    effort: Optional[str] = None                             # of the newest system message with one
    call_ids: Set[str] = field(default_factory=set)
    named_tools: Set[str] = field(default_factory=set)       # tools that the history names
    added_tools: List[Json] = field(default_factory=list)    # definitions inside messages
    removed_tools: Set[str] = field(default_factory=set)


def transcript_of(messages: List[Any]) -> Transcript:
    """Checks all messages and lays them out in turns.  Raises ProxyError(400)."""
    if len(messages) > MAX_MESSAGES:
        raise ProxyError(400, f"messages: at most {MAX_MESSAGES} are allowed")
    checked = [checked_message(message, index) for index, message in enumerate(messages)]
    if all(turn.role == "system" for turn in checked):
        raise ProxyError(400, NO_USER_MESSAGE)
    transcript, sent, has_begun = Transcript(), [], False
    last_user = max((at for at, turn in enumerate(checked) if turn.role == "user"), default=-1)
    for index, turn in enumerate(checked):
        if turn.role != "system":
            has_begun = True
            note_history(transcript, turn.blocks)
            if not is_empty_turn(turn):
                sent.append(turn)
            continue
        text = read_system_message(transcript, messages[index], turn.blocks)
        if messages[index].get("clear_at") == "next_user_message" and index < last_user:
            text = ""
        if text and has_begun:
            sent.append(Turn("user", [Reminder(f"<system-reminder>\n{text}\n</system-reminder>")]))
        elif text:
            transcript.system.append(text)
    transcript.turns = merged_turns(sent)
    return transcript


def merged_turns(turns: List[Turn]) -> List[Turn]:
    """Strictly alternating turns."""
    return [Turn(role, [block for turn in group for block in turn.blocks])
            for role, group in itertools.groupby(turns, lambda turn: turn.role)]


def checked_message(message: Any, index: int) -> Turn:
    """A message as role and blocks; a string is one text block, empty texts vanish."""
    if not is_object(message):
        raise ProxyError(400, f"messages.{index}: Input should be an object")
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant", "system"):
        raise ProxyError(
            400, f"messages.{index}.role: Input should be 'user', 'assistant' or 'system'")
    if content is None and role == "system" and message.get("output_config") is not None:
        content = []                     # a message that only changes the effort
    problem = content_problem(content) if content is not None else ".content: Field required"
    if problem:
        raise ProxyError(400, f"messages.{index}{problem}")
    if isinstance(content, str):
        content = [text_part(content)]
    blocks = [block for block in content if block["type"] != "text" or block["text"]]
    if role == "user" and not blocks:
        raise ProxyError(400, f"messages.{index}: user messages must have non-empty content")
    return Turn(role, blocks)


def note_history(transcript: Transcript, blocks: List[Block]) -> None:
    """Notes the ids of tool calls, and the tools that calls and tool search results name."""
    for block in blocks:
        if block["type"] == "tool_use":
            transcript.call_ids.add(block["id"])
            transcript.named_tools.add(block["name"])
        elif block["type"] == "tool_result" and isinstance(block.get("content"), list):
            transcript.named_tools.update(
                item["tool_name"] for item in block["content"]
                if item["type"] == "tool_reference" and is_name(item.get("tool_name")))


def read_system_message(transcript: Transcript, message: Json, blocks: List[Block]) -> str:
    """Returns the text of a system message; notes its effort and the tools it adds and removes."""
    effort = object_member(message, "output_config").get("effort")
    if effort in CLIENT_EFFORTS:
        transcript.effort = effort
    for block in blocks:
        tool = object_member(block, "tool")
        name = tool.get("name") or tool.get("tool_name")
        if block["type"] == "tool_removal" and is_name(name):
            transcript.removed_tools.add(name)
        elif block["type"] == "tool_addition":
            definition = tool.get("definition")
            if tool.get("type") == "tool_definition" and is_object(definition):
                transcript.added_tools.append(definition)
                name = definition.get("name")
            if is_name(name):
                transcript.removed_tools.discard(name)
                transcript.named_tools.add(name)
    return "\n\n".join(block["text"] for block in blocks if block["type"] == "text")


def is_empty_turn(turn: Turn) -> bool:
    """Whether no block of a message reaches the upstream, so that its neighbours are one turn."""
    return all(block["type"] in UNSENT_BLOCKS[turn.role] or (
        block["type"] == "compaction" and not isinstance(block.get("content"), str))
        for block in turn.blocks)


NO_USER_MESSAGE = "messages: at least one user message is required"
UNSENT_BLOCKS = {
    "user": ("thinking", "redacted_thinking"),
    "assistant": ("thinking", "redacted_thinking", "tool_search_tool_result", "mcp_tool_listing",
                  "fallback", "container_upload"),
}


# ---- 4.4 problems of a message ---------------------------------------------
#
# Each function returns the problem of one part of the request, a path inside that part and a
# sentence, or "".  The callers put their own path in front, so a path is built only for a problem.

def content_problem(content: Any) -> str:
    """The first problem of text or blocks, at any depth: results and documents hold blocks."""
    if isinstance(content, str):
        return ""
    if not isinstance(content, list):
        return ".content: Input should be a valid string or list"
    if len(content) > MAX_MESSAGES:
        return f".content: at most {MAX_MESSAGES} blocks are allowed"
    for index, block in enumerate(content):
        problem = block_problem(block)
        if problem:
            return f".content.{index}{problem}"
    return ""


def block_problem(block: Any) -> str:
    """Blocks of unknown types pass: clients are newer than this program."""
    if not isinstance(block, dict):
        return ": Input should be an object"
    kind = block.get("type")
    if kind == "text":
        return "" if isinstance(block.get("text"), str) else ".text: Field required"
    if not isinstance(kind, str):
        return ".type: Field required"
    for name in REQUIRED_NAMES.get(kind, ()):
        if not is_name(block.get(name)):
            return f".{name}: Field required"
    if kind in SOURCES:
        return source_problem(block)
    content = block.get("content") if kind == "tool_result" else None
    return "" if content is None else content_problem(content)


def source_problem(block: Json) -> str:
    """An image or a document needs a source that can be sent on; stored files are not here."""
    source = object_member(block, "source")
    kind = source.get("type")
    if kind == "file":
        return ".source: file sources are not supported by this endpoint; send base64 or url"
    member = SOURCES[block["type"]].get(kind) if isinstance(kind, str) else None
    types = (str, list) if member == "content" else str
    if member is None or not isinstance(source.get(member), types):
        return ".source: Field required"
    problem = content_problem(source[member])
    return problem and f".source{problem}"


REQUIRED_NAMES = {"tool_use": ("id", "name"), "tool_result": ("tool_use_id",)}
# Kind of block -> type of source -> the source's member that must be there.
SOURCES = {
    "image": {"base64": "data", "url": "url"},
    "document": {"base64": "data", "url": "url", "text": "data", "content": "content"},
}
MAX_MESSAGES = 100000                    # the Anthropic API's limit


# ---- 4.5 tools -------------------------------------------------------------
#
# Three kinds of tools: custom ones, with a schema of the client's; client tools, whose schema
# Anthropic defines (4.6); server tools, which only Anthropic's servers could run.  The last
# are dropped, and the system text names them, so that a model does not invent their results.

class Tool(NamedTuple):
    """A tool that the model can be given."""
    name: str                            # the client's
    description: str
    schema: Json
    is_strict: bool                      # the client wants strict, and the schema qualifies
    is_deferred: bool


class ReadTools(List[Any]):
    """The field `tools` of a request whose definitions were read before, by defined_tools."""
    tools: Dict[str, Tool]
    server_names: List[str]


class Tools(NamedTuple):
    """The tools of a request."""
    loaded: List[Tool]                   # those that are sent
    names: Dict[str, str]                # of all of them: the client's -> the upstream's
    server_names: List[str]


class ToolChoice(NamedTuple):
    """Which tools the model may or must call."""
    kind: str                            # auto, any, tool, none
    name: str                            # of the tool for `tool`
    is_single: bool                      # one call at most


def tools_of(params: Json, transcript: Transcript) -> Tools:
    """All tools of a request.  Raises ProxyError(400)."""
    tools, server_names = defined_tools(params.get("tools") or ())
    deferred = {tool.name for tool in tools.values() if tool.is_deferred}
    for definition in transcript.added_tools:           # a later definition replaces an earlier one
        tool = read_tool(definition, "tools")
        if tool is not None:
            tools[tool.name] = tool
    chosen = object_member(params, "tool_choice").get("name")
    wanted = transcript.named_tools | ({chosen} if is_name(chosen) else set())
    # A deferred tool is sent only when wanted, and after the others, if the client has a tool that
    # searches the deferred ones (Claude Code's ToolSearch); without one all tools are sent.
    is_searched = any(re.search(r"tool_?search", name, re.I) for name in tools
                      if name not in deferred)
    loaded = [tool for name, tool in tools.items() if name not in transcript.removed_tools
              and not (is_searched and name in deferred and name not in wanted)]
    if is_searched:
        loaded.sort(key=lambda tool: tool.name in deferred)
    return Tools(loaded, upstream_tool_names(list(tools)), server_names)


def defined_tools(definitions: Iterable[Any]) -> Tuple[Dict[str, Tool], List[str]]:
    """(the tools of the field `tools` by name, the names of server tools)."""
    if isinstance(definitions, ReadTools):
        return definitions.tools.copy(), definitions.server_names.copy()
    tools: Dict[str, Tool] = {}
    server_names: List[str] = []
    for index, definition in enumerate(definitions):
        tool = read_tool(definition, f"tools.{index}")
        if tool is None:
            kind, name = definition["type"], definition.get("name")
            if not kind.startswith("tool_search_tool_"):     # without it all tools are sent
                server_names.append(
                    name if is_name(name) else str(definition.get("mcp_server_name") or kind))
        elif tool.name in tools:
            raise ProxyError(400, "tools: Tool names must be unique.")
        else:
            tools[tool.name] = tool
    return tools, server_names


def read_tool(definition: Any, where: str) -> Optional[Tool]:
    """The Tool of a definition; None for a server tool.  Raises ProxyError(400)."""
    if not is_object(definition):
        raise ProxyError(400, f"{where}: Input should be an object")
    kind, name, schema = (definition.get(key) for key in ("type", "name", "input_schema"))
    is_deferred = definition.get("defer_loading") is True
    if isinstance(kind, str) and kind != "custom" \
            and (SERVER_TOOLS.match(kind) or not is_object(schema)):
        tool = client_tool(definition)
        return tool and Tool(name if is_name(name) else tool.name, tool.description,
                             {"type": "object", "properties": tool.properties,
                              "required": list(tool.required)}, False, is_deferred)
    if not is_name(name):
        raise ProxyError(400, f"{where}.name: Field required")
    if not is_object(schema):
        raise ProxyError(400, f"{where}.input_schema: Field required")
    description = definition.get("description")
    is_strict = definition.get("strict") is True and qualifies_as_strict(schema)
    return Tool(name, description if is_name(description) else "", clean_schema(schema), is_strict,
                is_deferred)


SERVER_TOOLS = re.compile(r"(web_search|web_fetch|code_execution|advisor)_\d{8}$|mcp_toolset$|"
                          r"(computer|browser)_toolset_|tool_search_tool_")


def tool_choice(params: Json, tools: Tools) -> Optional[ToolChoice]:
    """The client's choice, or None.  Raises ProxyError(400)."""
    choice = params.get("tool_choice")
    if choice is None:
        return None
    kind = object_member(params, "tool_choice").get("type")
    if kind not in ("auto", "any", "tool", "none"):
        raise ProxyError(400, "tool_choice.type: Input should be 'auto', 'any', 'tool' or 'none'")
    if kind in ("any", "tool"):
        check_choice(kind, choice.get("name"), bool(params.get("tools")), tools)
    is_single = kind != "none" and choice.get("disable_parallel_tool_use") is True
    return ToolChoice(kind, choice["name"] if kind == "tool" else "", is_single)


def check_choice(kind: str, name: Any, has_definitions: bool, tools: Tools) -> None:
    """Raises ProxyError(400) if the tool that must be called is not there."""
    names = [tool.name for tool in tools.loaded] if has_definitions else []
    if name in names if kind == "tool" else names:
        return
    server = name if kind == "tool" else (tools.server_names or [None])[0]
    if server in tools.server_names:
        raise ProxyError(400, f"tool_choice: {server} is a server tool, "
                         "which this endpoint does not provide")
    if kind == "any" or not has_definitions:
        raise ProxyError(400, "tool_choice: may only be specified while providing tools")
    raise ProxyError(400, f"tool_choice.name: Tool '{name}' not found in provided tools")


# ---- 4.6 tools that Anthropic defines --------------------------------------
#
# The client knows these tools by their type alone, and the model by training.  Another model
# needs the description and the schema that are written here.  A type of an unknown date
# counts as the newest of its kind.  [Anthropic: client tools]

class ClientTool(NamedTuple):
    """The definition of a tool that Anthropic knows by its type."""
    name: str                            # if the client gives none
    description: str
    properties: Json
    required: Tuple[str, ...] = ()


def client_tool(definition: Json) -> Optional[ClientTool]:
    """The ClientTool of a definition's type, or None."""
    kind = definition["type"]
    if kind.startswith("bash_"):
        return ClientTool(
            "bash", "Runs a command in a persistent bash session and returns what it prints. "
            "Set restart to true to start the session anew.",
            {"command": STRING, "restart": {"type": "boolean"}})
    if kind.startswith("memory_"):
        return ClientTool(
            "memory", "Reads and writes files that persist between conversations. "
            "All paths lie under /memories.",
            {"command": word_of("view create str_replace insert delete rename"), "path": STRING,
             "file_text": STRING, "old_str": STRING, "new_str": STRING, "insert_text": STRING,
             "old_path": STRING, "new_path": STRING, "insert_line": INTEGER,
             "view_range": INTEGERS}, ("command",))
    if kind.startswith("text_editor_"):
        return edit_tool(kind, definition.get("max_characters"))
    return computer_tool(kind, definition) if kind.startswith("computer_2") else None


def edit_tool(kind: str, limit: Any) -> ClientTool:
    """The text editor: the older kind can undo, the newer has a name of its own for new text."""
    is_old = "text_editor_20" <= kind < "text_editor_20250429"
    inserted = "new_str" if is_old else "insert_text"
    properties: Json = {
        "command": word_of("view create str_replace insert" + (" undo_edit" if is_old else "")),
        "path": STRING, "file_text": STRING, "old_str": STRING, "new_str": STRING,
        "insert_line": INTEGER, "view_range": INTEGERS, inserted: STRING}
    view = f" A view shows at most {limit} characters." if is_integer(limit) else ""
    return ClientTool(
        "str_replace_editor" if is_old else "str_replace_based_edit_tool",
        f"Views, creates and edits text files. The insert command puts {inserted} after "
        f"insert_line.{view}", properties, ("command", "path"))


def computer_tool(kind: str, definition: Json) -> ClientTool:
    """Mouse, keyboard and screen; each date of the type has more actions than the one before."""
    actions = COMPUTER_ACTIONS
    if kind != "computer_20241022":
        actions += " left_mouse_down left_mouse_up triple_click scroll hold_key wait"
    if kind >= "computer_20251124" and definition.get("enable_zoom"):
        actions += " zoom"
    size = f"{definition.get('display_width_px')} x {definition.get('display_height_px')}"
    return ClientTool(
        "computer", f"Controls a screen of {size} pixels with mouse and keyboard, "
        "and takes screenshots of it.",
        {"action": word_of(actions), "coordinate": INTEGERS, "start_coordinate": INTEGERS,
         "text": STRING, "scroll_direction": word_of("up down left right"),
         "scroll_amount": INTEGER, "duration": {"type": "number"}, "region": INTEGERS}, ("action",))


def word_of(words: str) -> Json:
    """The schema of a string that is one of some words."""
    return {"type": "string", "enum": words.split()}


STRING: Json = {"type": "string"}
INTEGER: Json = {"type": "integer"}
INTEGERS: Json = {"type": "array", "items": INTEGER}
COMPUTER_ACTIONS = "key type mouse_move left_click left_click_drag right_click middle_click " \
    "double_click screenshot cursor_position"


# ---- 4.7 names of tools ----------------------------------------------------

def upstream_tool_name(name: str) -> str:
    """A name that OpenAI takes, always the same for a tool: prompts have to stay cacheable."""
    if TOOL_NAME.fullmatch(name):
        return name
    return re.sub(r"[^a-zA-Z0-9_-]", "_", name)[:55] + "_" + sha256_hex(name)[:8]


def upstream_tool_names(names: Sequence[str]) -> Dict[str, str]:
    """The upstream's name for each tool; one whose made name is taken gets another."""
    taken = {name for name in names if TOOL_NAME.fullmatch(name)}
    upstream_names = {}
    for name in names:
        made, numbers = upstream_tool_name(name), itertools.count(2)
        while made in taken and made != name:
            made = made[:-8] + sha256_hex(f"{name}#{next(numbers)}")[:8]
        taken.add(made)
        upstream_names[name] = made
    return upstream_names


def client_tool_name(name: str, names: Dict[str, str]) -> str:
    """The client's name for a tool that the model calls; some models put `functions.` before it."""
    if name not in names and name.startswith("functions.") and name[10:] in names:
        name = name[10:]
    return names.get(name, name)


TOOL_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


# ---- 4.8 schemas -----------------------------------------------------------
#
# JSON Schema has many dialects, and each upstream reads another part of it.  A schema is changed
# as little as possible here; an upstream that refuses it gets a simpler one (14.4).  The walk
# enters keywords that hold schemas, never `enum`, `const`, `default` or `examples`, whose
# objects are data.

def clean_schema(schema: Json) -> Json:
    """A schema for `parameters` that every upstream can read: an object with properties."""
    root = {key: value for key, value in schema.items() if key != "$schema"}
    root["type"] = "object"
    if not is_object(root.get("properties")):
        root["properties"] = {}
    return root if is_complete_schema(root) else mapped_subschemas(root, complete_object)


def is_complete_schema(root: Json) -> bool:
    """Whether nothing inside a schema needs a change, which nearly always holds."""
    waiting: List[Any] = [root]
    seen = 0
    while waiting:
        schema = waiting.pop()
        if not isinstance(schema, dict):
            continue
        seen += 1
        if seen > MAX_SUBSCHEMAS:
            raise ProxyError(400, f"tools: an input_schema with more than {MAX_SUBSCHEMAS} parts "
                             "is not supported")
        if lacks_properties(schema):
            return False
        for key, value in schema.items():
            if key in SUBSCHEMA_MAPS:
                waiting += value.values() if isinstance(value, dict) else ()
            elif key in SUBSCHEMA_KEYS:
                waiting += value if isinstance(value, list) else [value]
    return True


def lacks_properties(schema: Json) -> bool:
    """Whether an object's schema has neither properties nor a word on additional ones."""
    return schema.get("type") == "object" and "additionalProperties" not in schema \
        and not isinstance(schema.get("properties"), dict)


def complete_object(schema: Any) -> Any:
    """A nested schema; one of an object gets the `properties` that some upstreams insist on."""
    if not is_object(schema):
        return schema
    schema = mapped_subschemas(schema, complete_object)
    return {**schema, "properties": {}} if lacks_properties(schema) else schema


def mapped_subschemas(schema: Json, change: Callable[[Any], Any]) -> Json:
    """A copy of `schema` with `change` applied to each schema directly inside it."""
    mapped = schema.copy()
    for key in schema.keys() & SUBSCHEMA_KEYS:
        value = schema[key]
        if key not in SUBSCHEMA_MAPS:
            mapped[key] = list(map(change, value)) if isinstance(value, list) else change(value)
        elif is_object(value):
            mapped[key] = {name: change(item) for name, item in value.items()}
    return mapped


def qualifies_as_strict(schema: Any, is_root: bool = True) -> bool:
    """Whether OpenAI takes a schema with `strict: true`.  [OpenAI: structured outputs]"""
    if not is_object(schema) or schema.keys() & NOT_STRICT:
        return False
    if is_root and (schema.get("type") != "object" or "anyOf" in schema):
        return False
    if schema.get("type") == "object" or "properties" in schema:
        if not requires_all_properties(schema):
            return False
    nested: List[Any] = []
    for key in schema.keys() & {"properties", "$defs", "definitions"}:
        nested += schema[key].values() if is_object(schema[key]) else [None]
    for key in schema.keys() & {"items", "anyOf"}:
        nested += schema[key] if isinstance(schema[key], list) else [schema[key]]
    return all(qualifies_as_strict(item, False) for item in nested)


def requires_all_properties(schema: Json) -> bool:
    """Whether an object must have all of its properties, and no other one."""
    properties, required = schema.get("properties"), schema.get("required")
    return schema.get("additionalProperties") is False and is_object(properties) \
        and isinstance(required, list) and not {*map(str, required)} < {*properties}


# Subschemas of one tool: a walk over them blocks the event loop.
MAX_SUBSCHEMAS = 50000
SUBSCHEMA_MAPS = frozenset(("properties", "patternProperties", "$defs", "definitions"))
SUBSCHEMA_KEYS = SUBSCHEMA_MAPS | frozenset((
    "items", "prefixItems", "additionalProperties", "anyOf", "oneOf", "allOf", "not", "if", "then",
    "else"))
NOT_STRICT = frozenset(("patternProperties", "allOf", "not", "if", "oneOf", "prefixItems",
                        "dependentSchemas", "unevaluatedProperties"))


# ---- 4.9 translation -------------------------------------------------------

@dataclass(eq=False, repr=False)
class Translation:
    """One request as the upstream gets it, and the facts that reading its answer needs."""
    requested_model: str                 # the answer's `model`
    target: Target
    profile: ModelProfile
    body: Json
    is_streamed: bool                    # the client wants events
    thinking: ThinkingDisplay = ThinkingDisplay.HIDDEN
    tool_names: Dict[str, str] = field(default_factory=dict)     # the upstream's -> the client's
    history_call_ids: Set[str] = field(default_factory=set)      # as written and decoded
    stop_sequences: Tuple[str, ...] = ()
    prefill: str = ""                    # the assistant text that the answer continues
    is_single_call: bool = False         # only the first tool call counts
    is_empty: bool = False               # max_tokens 0: nothing is generated
    secrets: Tuple[str, ...] = ()        # redacted in errors
    sent_bytes: int = 0                  # size of the upstream's request
    is_mostly_non_ascii: bool = False    # large, and sent as UTF-8
    dropped_fields: List[str] = field(default_factory=list)      # worth a line in the log
    token_estimate: int = 0              # see input_estimate
    estimate_tokens: Callable[..., int] = len        # of the body; `count` counts a text

    def input_estimate(self) -> int:
        """Estimated tokens of the prompt, counted once, when first asked for."""
        if not self.token_estimate:
            self.token_estimate = self.estimate_tokens(self.body)
        return self.token_estimate


# ============================================================================
# 5. CONTENT AND IDS
# ============================================================================
#
# The texts that blocks become, and the data that travels through the client and
# returns: ids of tool calls, and reasoning inside the signatures of thinking blocks.
# Every writer of a body uses these functions and adds nothing but its API's shape.

# ---- 5.1 texts, pictures and documents -------------------------------------

def unknown_text(block: Json) -> str:
    """The text for a block of a type that is newer than this program."""
    text = block.get("text")
    return text if isinstance(text, str) else f"[unsupported content block: {block['type']}]"


def document_text(block: Json, text: str) -> str:
    """The text of a document below its title and its context; citations have no counterpart."""
    lines = [f"[Document: {block['title']}]" if is_name(block.get("title")) else "[Document]"]
    if is_name(block.get("context")):
        lines.append(f"[Context: {block['context']}]")
    return "\n".join([*lines, text])


def nested_texts(block: Json) -> str:
    """The texts of a block's own content, which is a string or a list of blocks."""
    content = block.get("content")
    if isinstance(content, str):
        return content
    return "\n".join(item["text"] for item in objects_in(content)
                     if isinstance(item.get("text"), str))


def compaction_text(block: Json) -> str:
    """The summary that stands for earlier turns; empty if the client has none."""
    content = block.get("content")
    return f"[Summary of the earlier conversation]\n{content}" if isinstance(content, str) else ""


class Media(NamedTuple):
    """A picture or a PDF file in a user turn."""
    url: str                             # the client's URL, or a data: URL
    filename: str = ""                   # empty: a picture


Part = Union[str, Media]


def image_parts(block: Json, profile: ModelProfile) -> List[Part]:
    """A picture as Media.  The proxy never fetches one; image/jpg is no media type."""
    source = block["source"]
    if source["type"] == "url":
        return [Media(source["url"])]
    kind = source.get("media_type")
    kind = {"image/jpg": "image/jpeg"}.get(kind, kind) if is_name(kind) else "image/png"
    return [Media(data_url(kind, source["data"]))]


def data_url(media_type: str, data: str) -> str:
    """Base64 data as a URL, without the line breaks that upstreams refuse there."""
    return f"data:{media_type};base64,{''.join(data.split())}"


def document_parts(block: Json, profile: ModelProfile) -> List[Part]:
    """A document as text where it is one, as a file where the upstream reads PDF, else its name."""
    source, title = block["source"], block.get("title") if is_name(block.get("title")) else ""
    if source["type"] == "url":
        name = f"{source['url']}: {title}" if title else source["url"]
        return [f"[Document at {name}; this endpoint cannot fetch it]"]
    if source["type"] == "text":
        return [document_text(block, source["data"])]
    if source["type"] == "content":
        return nested_document_parts(block, profile)
    kind = source.get("media_type")
    if is_name(kind) and kind.startswith("text/"):
        try:
            return [document_text(block, base64.b64decode(source["data"]).decode("utf-8"))]
        except ValueError:
            return [f"[{kind} document: {title or 'document'}; this endpoint cannot read it]"]
    name = title or "document.pdf"
    if profile.host_class not in ("openai", "azure"):
        return [f"[PDF document: {name}; this endpoint cannot read it]"]
    return [Media(data_url("application/pdf", source["data"]),
                  name if name.lower().endswith(".pdf") else name + ".pdf")]


def nested_document_parts(block: Json, profile: ModelProfile) -> List[Part]:
    """A document that consists of blocks: its text, then its pictures."""
    content = block["source"]["content"]
    blocks = [text_part(content)] if isinstance(content, str) else content
    text = "\n".join(item["text"] for item in blocks if item["type"] == "text")
    return [document_text(block, text), *(part for item in blocks if item["type"] == "image"
                                          for part in image_parts(item, profile))]


# ---- 5.2 blocks of a turn --------------------------------------------------
#
# Upstreams know text and tool calls.  The other blocks of an assistant turn become text, as far
# as the model needs them to understand its own earlier answer.  A block of a user turn becomes
# texts, pictures and files: a writer gives them the shape of its API.

def assistant_text(blocks: List[Block]) -> str:
    """The paragraphs of an assistant turn; text behind text is joined: the client cut it."""
    pieces: List[str] = []
    follows_text = False
    for block in blocks:
        kind, text = block["type"], ""
        if kind == "text":
            text = block["text"]
        elif kind not in UNSENT_BLOCKS["assistant"] and kind != "tool_use":
            text = ASSISTANT_PARAGRAPHS.get(kind, unknown_text)(block)
        if text:
            pieces += ["\n\n" if pieces and not (kind == "text" and follows_text) else "", text]
        follows_text = kind == "text"
    return "".join(pieces)


def prefill_text(turns: List[Turn]) -> str:
    """The text that the answer continues: of a last assistant turn without calls."""
    if not turns or turns[-1].role != "assistant" \
            or any(block["type"] == "tool_use" for block in turns[-1].blocks):
        return ""
    return assistant_text(turns[-1].blocks).rstrip()         # upstreams refuse white space there


def called_text(block: Json) -> str:
    """The text for a call that Anthropic's servers ran: no upstream knows the tool."""
    return f"[Called {block.get('name')} with {json_text(block.get('input') or {})}]"


def server_result_text(block: Json) -> str:
    """The text for the result of a server tool; an error object is told as a failure."""
    name, build = SERVER_RESULTS[block["type"]]
    content = block.get("content")
    if is_object(content) and "error_code" in content:
        return f"[{name} failed: {content['error_code']}]"
    return f"[Result of {name}]\n{build(block)}".rstrip("\n")


def search_hits(block: Json) -> str:
    """A line for each hit of a web search; the encrypted page contents mean nothing here."""
    return "\n".join(f"- {hit.get('title')}: {hit.get('url')}"
                     for hit in objects_in(block.get("content")))


def fetched_page(block: Json) -> str:
    """The address of a fetched page, and its text if it is one."""
    content = object_member(block, "content")
    source = object_member(object_member(content, "content"), "source")
    text = source.get("data") if source.get("type") == "text" else None
    return "\n".join(str(item) for item in (content.get("url"), text) if item)


def execution_output(block: Json) -> str:
    """The output of code that Anthropic's servers ran, and the exit code if it failed."""
    content = object_member(block, "content")
    lines = [content[key] for key in ("stdout", "stderr", "content") if is_name(content.get(key))]
    if content.get("return_code"):
        lines.append(f"exit code {content['return_code']}")
    return "\n".join(line.rstrip("\n") for line in lines)


SERVER_RESULTS: Dict[str, Tuple[str, Callable[[Json], str]]] = {
    "web_search_tool_result": ("web_search", search_hits),
    "web_fetch_tool_result": ("web_fetch", fetched_page),
    "code_execution_tool_result": ("code_execution", execution_output),
    "bash_code_execution_tool_result": ("bash_code_execution", execution_output),
    "text_editor_code_execution_tool_result": ("text_editor_code_execution", execution_output),
    "mcp_tool_result": ("mcp_tool", nested_texts),
    "advisor_tool_result": ("advisor", nested_texts),
}
ASSISTANT_PARAGRAPHS: Dict[str, Callable[[Json], str]] = {
    "server_tool_use": called_text, "mcp_tool_use": called_text, "compaction": compaction_text,
    "image": lambda block: "[image]",
    # An assistant turn can hold no file and no picture.
    "document": lambda block: "\n".join(part for part in document_parts(
        block, model_profile("", "other")) if isinstance(part, str)),
    **dict.fromkeys(SERVER_RESULTS, server_result_text)}


def user_parts(block: Json, profile: ModelProfile) -> List[Part]:
    """The parts of a user message for a block; an unknown block is named, never lost."""
    kind = block["type"]
    if kind in USER_PARTS:
        return USER_PARTS[kind](block, profile)
    text = ASSISTANT_PARAGRAPHS.get(kind, unknown_text)(block)
    return [text] if text else []


USER_PARTS: Dict[str, Callable[[Json, ModelProfile], List[Part]]] = {
    "text": lambda block, profile: [block["text"]],
    "image": image_parts, "document": document_parts,
    "search_result": lambda block, profile: [
        f"[Search result: {block.get('title')}]\nSource: {block.get('source')}\n"
        + nested_texts(block)],
    **dict.fromkeys(UNSENT_BLOCKS["user"], lambda block, profile: []),
}


# ---- 5.3 calls and results -------------------------------------------------

def call_arguments(value: Any) -> str:
    """The JSON text of a tool's input: broken JSON in the history would break later turns."""
    if isinstance(value, str):
        try:
            if is_object(model_json(value)):
                return value
        except ValueError:
            pass
        value = {"INVALID_JSON": value} if value else {}
    return json_text({} if value is None else value)


def result_parts(block: Json, profile: ModelProfile) -> Iterator[Tuple[str, List[Part]]]:
    """Pairs of the type of an item of a tool_result's content, and the item's parts."""
    content = block.get("content")
    for item in [text_part(content)] if isinstance(content, str) else content or ():
        kind = item["type"]
        if kind in ("text", "image", "document", "search_result"):
            yield kind, user_parts(item, profile)
        elif kind == "tool_reference":
            yield kind, [f"Tool available: {item.get('tool_name')}"]
        else:
            yield kind, [json_text({key: value for key, value in item.items()
                                    if key not in ("type", "cache_control")})]


def result_content(text: str, is_error: bool) -> str:
    """The text of a whole result: never empty, and a failure says that it is one."""
    if is_error and not text:
        return "Error: tool execution failed"
    if is_error and not re.match(r"error|<tool_use_error>", text, re.I):
        return "Error: " + text
    return text or "(no output)"         # models may stop after an empty result


class OpenCalls:
    """The calls of one assistant turn that the next user turn has to answer.

    Upstreams demand exactly one result for each call, under an id that no other call of the turn
    has.  Clients don't: of several calls with one id the n-th result belongs to the n-th call.
    """

    def __init__(self, host_class: str, room: CarrierRoom) -> None:
        self.unanswered: Dict[str, None] = {}        # upstream's ids, in the order of the calls
        self.room = room                             # for the data that the ids carry
        self._host_class = host_class
        self._uses: Dict[str, int] = {}              # decoded id -> number of its last use
        self._waiting: Dict[str, Deque[str]] = {}    # client's id -> upstream's ids

    def add(self, client: str) -> Tuple[str, Any]:
        """Adds a call; returns (its id for the upstream, its `extra_content` or None)."""
        plain, extra = decoded_id(client, self.room)
        number, call_id = self._uses.get(plain, 0), ""
        while not call_id or call_id in self.unanswered:
            number += 1
            numbered = plain if number == 1 else "call_" + sha256_hex(f"{plain}#{number}")[:32]
            call_id = upstream_call_id(numbered, self._host_class)
        self._uses[plain] = number
        self.unanswered[call_id] = None
        self._waiting.setdefault(client, deque()).append(call_id)
        return call_id, extra

    def answer(self, client: str) -> Optional[str]:
        """Returns the id of the call that a result answers; "" for a second result, else None."""
        waiting = self._waiting.get(client)
        if not waiting:
            return None if waiting is None else ""
        call_id = waiting.popleft()
        del self.unanswered[call_id]
        return call_id


# ---- 5.4 ids ---------------------------------------------------------------
#
#     toolu_rRRRRRR_BASE64      the upstream's id: characters or a length that clients reject
#     toolu_xRRRRRR_BASE64      packed JSON: the upstream's id and its extra_content
#
# RRRRRR is random, because an id must be new even if the upstream's is not.

def client_id(call_id: Any, extra: Any, known: Set[str], new_id: NewId) -> str:
    """The id of a tool_use block for an upstream's call.

    Upstreams want their ids back exactly, and the proxy keeps no state.  So an id that a client
    would reject, or that the conversation has already, is encoded; `decoded_id` restores it.
    Gemini's `extra_content`, a signature of its thoughts, travels in the id too.
    """
    call_id = call_id if isinstance(call_id, str) else ""
    if extra is not None:
        return f"toolu_x{new_id(6)}_{packed(json_text([call_id, extra]))}"
    if not call_id:
        return "toolu_" + new_id(24)
    if re.fullmatch(r"(?!toolu_[rx])[a-zA-Z0-9_-]{1,64}", call_id) and call_id not in known:
        return call_id
    return f"toolu_r{new_id(6)}_{base64url(call_id.encode('utf-8', 'replace'))}"


def decoded_id(client: str, room: CarrierRoom) -> Tuple[str, Any]:
    """(the upstream's id, its `extra_content` or None); an id that is not encoded is itself."""
    match = re.fullmatch(r"toolu_([rx])[A-Za-z0-9]{6}_([A-Za-z0-9_-]+)", client)
    if match is None:
        return client, None
    try:
        if match[1] == "r":
            return base64url_bytes(match[2]).decode("utf-8"), None
        call_id, extra = model_json(room.unpacked(match[2], is_json=True))
        return (call_id, extra) if isinstance(call_id, str) else (client, None)
    except (ValueError, TypeError):
        return client, None


def upstream_call_id(call_id: str, host_class: str) -> str:
    """An id that the host takes: Mistral exactly nine letters and digits, OpenAI 40 characters."""
    if host_class == "mistral" and not re.fullmatch(r"[0-9A-Za-z]{9}", call_id):
        value = int(sha256_hex(call_id), 16)
        return "".join(BASE62[value // 62 ** place % 62] for place in range(9))
    if host_class in ("openai", "azure") and not re.fullmatch(r"[a-zA-Z0-9_-]{1,40}", call_id):
        return "call_" + sha256_hex(call_id)[:32]
    return call_id


BASE62 = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


# ---- 5.5 carried reasoning -------------------------------------------------
#
# Some upstreams want their reasoning back beside the tool calls that followed it: DeepSeek
# refuses the request without it, others answer worse.  Clients return thinking blocks
# unchanged, so the signature carries it:
#
#     aap1.KIND.PAYLOAD      PAYLOAD is empty if the block's own text is the reasoning
#
# KIND is the field that it came in: c reasoning_content, r reasoning, d reasoning_details
# (a list), n nothing to send back.

def carrier_signature(kind: str, payload: str = "") -> str:
    """The signature of a thinking block; `payload` is the reasoning if the block hides it."""
    return f"aap1.{kind}." + (packed(payload) if payload else "")


def carried_block(block: Json, room: CarrierRoom) -> Optional[Tuple[str, Any]]:
    """(kind, text or list of details) of a thinking block with such a signature; else None."""
    signature = block.get("signature")
    match = re.fullmatch(r"aap1\.([a-z])\.([A-Za-z0-9_-]*)",
                         signature if isinstance(signature, str) else "")
    if match is None:
        return None
    kind, payload = match.groups()
    if not payload:
        text = block.get("thinking")
        return (kind, text) if isinstance(text, str) and kind != "d" else None
    try:
        value: Any = room.unpacked(payload, is_json=kind == "d")
        value = model_json(value) if kind == "d" else value
    except ValueError:
        return None
    return None if kind == "d" and not isinstance(value, list) else (kind, value)


def packed(text: str) -> str:
    """A text, compressed, in letters, digits, `_` and `-`: the form that travels in ids."""
    return base64url(zlib.compress(text.encode("utf-8", "replace")))


class CarrierRoom:
    """The room for all unpacked texts of one request, filled in the order of their appearance.

    zlib data of a hostile client can be a thousandth of what it unpacks to.  A text that does not
    fit counts as damaged, and unpacking stops at the bound.
    """

    def __init__(self) -> None:
        self._bytes, self._values, self._work = MAX_UNPACKED, MAX_UNPACKED_VALUES, 4 * MAX_UNPACKED

    def unpacked(self, text: str, is_json: bool = False) -> str:
        """The text that was packed.  Raises ValueError for a damaged one, or without room."""
        engine, limit = zlib.decompressobj(), min(self._bytes, self._work)
        try:
            data = engine.decompress(base64url_bytes(text), limit) if limit else b""
        except zlib.error as error:
            raise ValueError(str(error)) from None
        self._work -= len(data)
        values = data.count(b",") + 1 if is_json else 0
        if not engine.eof or values > self._values:
            raise ValueError("cut off or too large")
        self._bytes -= len(data)
        self._values -= values
        return data.decode("utf-8")


MAX_UNPACKED = 8 * 1024 * 1024           # bytes that one request may carry
MAX_UNPACKED_VALUES = 100000             # JSON values, counted by commas


def base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def base64url_bytes(text: str) -> bytes:
    """The bytes of base64url text without padding.  Raises ValueError."""
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


# ============================================================================
# 6. CHAT: THE REQUEST
# ============================================================================
#
# The conversation as the body of a Chat Completions request.  The body is put together
# from groups of fields, each of one function; a group that does not apply is empty.
# [OpenAI: Chat Completions]

# ---- 6.1 the body ----------------------------------------------------------

def chat_body(conversation: Conversation, target: Target) -> Json:
    """The body for a target.  Raises ProxyError(400) if no message is left to send."""
    profile = model_profile(target.model, target.host_class)
    body: Json = {"model": profile.model}
    for fields_of in (message_fields, limit_fields, sampling_fields, reasoning_fields,
                      format_fields, tool_fields, identity_fields, stream_fields):
        body.update(fields_of(conversation, profile))
    return body


# ---- 6.2 messages ----------------------------------------------------------
#
# OpenAI demands that an assistant message with calls is directly followed by one tool message
# for each call.  Clients interrupt, repeat and reorder; here the list is repaired: results first,
# in the order of their blocks, then a sentence for each call without one, then everything else.

def message_fields(conversation: Conversation, profile: ModelProfile) -> Json:
    """`messages`: the system message, then the turns, each call directly followed by its result."""
    messages: List[Json] = []
    room = CarrierRoom()
    calls = OpenCalls(profile.host_class, room)
    for turn in conversation.turns:
        if turn.role == "assistant":
            messages.append(assistant_message(turn.blocks, calls, conversation, profile))
        else:
            messages += user_messages(turn.blocks, calls, profile)
            calls = OpenCalls(profile.host_class, room)
    messages += missing_results(calls)
    if messages and messages[-1]["role"] == conversation.turns[-1].role == "assistant":
        # The last message is the prefill: not sent if it is empty, and Mistral wants it marked.
        last = {**messages.pop(), "content": prefill_text(conversation.turns)}
        mark = {"prefix": True} if profile.host_class == "mistral" else {}
        messages += [{**last, **mark}] if last["content"] else []
    if not messages:
        raise ProxyError(400, NO_USER_MESSAGE)
    system = list(conversation.system)
    if conversation.answer_schema is not None and profile.host_class == "deepseek":
        system.append(format_instruction(conversation.answer_schema))
    if system:
        messages.insert(0, {"role": "system", "content": "\n\n".join(system)})
    return {"messages": messages}


def assistant_message(blocks: List[Block], calls: OpenCalls, conversation: Conversation,
                      profile: ModelProfile) -> Json:
    """The message for an assistant turn, whose calls are added to `calls`."""
    text = assistant_text(blocks)
    tool_calls = []
    for block in blocks:
        if block["type"] == "tool_use":
            call_id, extra = calls.add(block["id"])
            call: Json = {"id": call_id, "type": "function", "function": {
                "name": conversation.upstream_name(block["name"]),
                "arguments": call_arguments(block.get("input"))}}
            if extra is not None:
                call["extra_content"] = extra
            tool_calls.append(call)
    if not tool_calls:
        return {"role": "assistant", "content": text}
    return {"role": "assistant", "content": text or None,
            **reasoning_history(blocks, conversation, profile, calls.room),
            "tool_calls": tool_calls}


def reasoning_history(blocks: List[Block], conversation: Conversation, profile: ModelProfile,
                      room: CarrierRoom) -> Json:
    """The reasoning that an upstream wants back beside tool calls, in the field it came in.

    The kind of the first carrier decides.  DeepSeek's API refuses calls without the field while
    it thinks; OpenAI, Mistral and Gemini have no such field.
    """
    if profile.host_class in ("openai", "azure", "mistral", "gemini"):
        return {}
    found = filter(None, [carried_block(block, room) for block in blocks
                          if block["type"] == "thinking"])
    carried = [pair for pair in found if pair[0] in REASONING_FIELDS]
    if carried:
        kind = carried[0][0]
        values = [value for its_kind, value in carried if its_kind == kind]
        return {REASONING_FIELDS[kind]: "".join(values) if kind != "d" else [
            entry for entries in values for entry in entries]}
    is_thinking = conversation.display is not ThinkingDisplay.HIDDEN
    return {"reasoning_content": ""} if is_thinking and profile.host_class == "deepseek" else {}


def tool_message(call_id: str, content: str) -> Json:
    """The result of a call.  Its content must be a string, because few upstreams take parts."""
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def missing_results(calls: OpenCalls) -> List[Json]:
    """Tool messages for the calls without a result; an interrupted client sends none."""
    return [tool_message(call_id, "Tool call was not executed.") for call_id in calls.unanswered]


def user_messages(blocks: List[Block], calls: OpenCalls, profile: ModelProfile) -> List[Json]:
    """Tool messages for the calls before a user turn, then one user message with all the rest.

    Chat Completions takes no pictures in tool messages, so the pictures and files of results stand
    in front of the user message, and the results point at them by number.
    """
    results: List[Json] = []
    parts: List[Part] = []
    media: List[Part] = []               # of results
    numbers = itertools.count(1)
    for block in blocks:
        if isinstance(block, Reminder):
            parts.append(block)
        elif block["type"] != "tool_result":
            parts += user_parts(block, profile)
        else:
            client = block["tool_use_id"]
            call_id = calls.answer(client)
            if call_id == "":            # a second result is dropped
                continue
            content, pictures = chat_result(block, call_id or client, profile, numbers)
            if call_id:
                results.append(tool_message(call_id, content))
                media += pictures
            else:
                parts += [f"[Result of tool call {client}]\n{content}", *pictures]
    has_result = bool(results)
    results += missing_results(calls)
    if has_result and all(isinstance(part, Reminder) for part in parts):
        # A user message made for a reminder alone would end the tool loop.
        results[-1]["content"] = "\n\n".join([results[-1]["content"], *map(str, parts)])
        parts = []
    content = chat_content(media + parts)
    return [*results, {"role": "user", "content": content}] if content else results


def chat_result(block: Json, call_id: str, profile: ModelProfile,
                numbers: Iterator[int]) -> Tuple[str, List[Part]]:
    """(the text of a result, its pictures and files with their labels)."""
    texts: List[str] = []
    media: List[Part] = []
    for kind, parts in result_parts(block, profile):
        if any(isinstance(part, Media) for part in parts):
            number = next(numbers)
            texts.append(f"[{kind} {number}: see the next user message]")
            media += [f"{kind.capitalize()} {number} from tool result {call_id}:", *parts]
        else:
            texts += map(str, parts)
    return result_content("\n".join(filter(None, texts)), block.get("is_error") is True), media


def chat_content(parts: List[Part]) -> Union[str, List[Json]]:
    """The content of a user message: one string if all of it is text, else a list of parts."""
    texts = [part for part in parts if isinstance(part, str)]
    return "\n\n".join(texts) if len(texts) == len(parts) else [chat_part(part) for part in parts]


def chat_part(part: Part) -> Json:
    """A part of a user message.  [OpenAI: content parts]"""
    if isinstance(part, str):
        return text_part(str(part))
    if part.filename:
        return {"type": "file", "file": {"filename": part.filename, "file_data": part.url}}
    return {"type": "image_url", "image_url": {"url": part.url}}


# ---- 6.3 other fields ------------------------------------------------------

def limit_fields(conversation: Conversation, profile: ModelProfile) -> Json:
    """The limit of the answer's tokens, under the name that the model takes."""
    if conversation.max_tokens is None:
        return {}
    return {profile.limit_field: capped_limit(conversation.max_tokens, profile)}


def sampling_fields(conversation: Conversation, profile: ModelProfile) -> Json:
    """temperature, top_p and stop; reasoning models refuse them.  OpenAI takes four sequences."""
    if profile.is_reasoning:
        return {}
    stop = list(conversation.stop_sequences[:4])
    return {**conversation.sampling, **({"stop": stop} if stop else {})}


def reasoning_fields(conversation: Conversation, profile: ModelProfile) -> Json:
    """The fields that set how much the model reasons, in the words of the upstream's host."""
    wanted, host_class = conversation.effort, profile.host_class
    if host_class == "openrouter":               # one field for all models [OpenRouter: reasoning]
        if wanted is None:
            return {}
        return {"reasoning": {"enabled": False} if wanted == "none" else {"effort": wanted}}
    if host_class == "deepseek" and "reasoner" not in profile.base_name:
        if conversation.display is ThinkingDisplay.HIDDEN:
            return {"thinking": {"type": "disabled"}}
        effort = DEEPSEEK_EFFORTS.get(wanted or "")
        return {"thinking": {"type": "enabled"}, **({"reasoning_effort": effort} if effort else {})}
    if conversation.tools and profile.efforts and host_class in ("openai", "azure") \
            and gpt_version(profile.base_name) >= (5, 4):
        # OpenAI and Azure refuse function tools beside any other effort from gpt-5.4 on.
        return {"reasoning_effort": "none"}
    if not wanted or not profile.efforts:
        return {}
    return {"reasoning_effort": nearest_effort(wanted, profile.efforts)}


def format_fields(conversation: Conversation, profile: ModelProfile) -> Json:
    """`response_format`.  DeepSeek has JSON mode without schemas: the system text has them."""
    schema = conversation.answer_schema
    if schema is None:
        return {}
    if profile.host_class == "deepseek":
        return {"response_format": {"type": "json_object"}}
    is_strict = qualifies_as_strict(schema)
    return {"response_format": {"type": "json_schema", "json_schema": {
        "name": "response", "schema": schema if is_strict else clean_schema(schema),
        "strict": is_strict}}}


def format_instruction(schema: Json) -> str:
    """The line of the system text that asks for JSON where `response_format` takes no schema."""
    return ("Answer with one JSON value only, no other text, that matches this JSON schema: "
            + json_text(schema))


def tool_fields(conversation: Conversation, profile: ModelProfile) -> Json:
    """`tools`, `tool_choice` and `parallel_tool_calls`; nothing if no tool is left."""
    if not conversation.tools:
        return {}
    found: Json = {"tools": [chat_tool(tool, conversation, profile) for tool in conversation.tools]}
    choice = conversation.choice
    if choice is not None:
        found["tool_choice"] = CHAT_CHOICES.get(choice.kind) or {
            "type": "function", "function": {"name": conversation.upstream_name(choice.name)}}
        # OpenAI's o-series refuses the field.
        if choice.is_single and not re.match(r"o\d", profile.base_name):
            found["parallel_tool_calls"] = False
    return found


def chat_tool(tool: Tool, conversation: Conversation, profile: ModelProfile) -> Json:
    """A tool as a function; `strict` is a field of OpenAI's and Azure's alone."""
    description = {"description": tool.description} if tool.description else {}
    function: Json = {"name": conversation.upstream_name(tool.name), **description,
                      "parameters": tool.schema}
    if tool.is_strict and profile.host_class in ("openai", "azure"):
        function["strict"] = True
    return {"type": "function", "function": function}


def identity_fields(conversation: Conversation, profile: ModelProfile) -> Json:
    """safety_identifier, prompt_cache_key and service_tier, which only OpenAI itself knows."""
    if profile.host_class != "openai":
        return {}
    user, session = conversation.user_id, conversation.session_id
    # Ids are hashed: they may hold personal data.
    found = {"safety_identifier": sha256_hex(user)} if user else {}
    if session or user:
        found["prompt_cache_key"] = "aap-" + sha256_hex(session or user)[:32]
    if conversation.wants_standard_tier:
        found["service_tier"] = "default"
    return found


def stream_fields(conversation: Conversation, profile: ModelProfile) -> Json:
    """`stream`; also for an un-streamed request that may take minutes: only a stream shows life."""
    limit = conversation.max_tokens
    if limit is None or (not conversation.is_streamed
                         and capped_limit(limit, profile) <= UNSTREAMED_TOKENS):
        return {}
    if profile.host_class == "mistral":          # sends usage unasked, refuses unknown fields
        return {"stream": True}
    return {"stream": True, "stream_options": {"include_usage": True}}


REASONING_FIELDS = {"c": "reasoning_content", "r": "reasoning", "d": "reasoning_details"}
DEEPSEEK_EFFORTS = {"low": "low", "medium": "high", "high": "high", "xhigh": "max", "max": "max"}
CHAT_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
# Tokens that a quick model can write while a client waits without a sign of life.
UNSTREAMED_TOKENS = 8192


# ============================================================================
# 8. BLOCKS
# ============================================================================
#
# An upstream sends loose deltas, of several calls at once if it likes; Anthropic
# wants numbered blocks, one open at a time, each started and stopped.  Deltas are
# collected in pending blocks, which stand in a queue in the order of their first
# content.  Only the head of the queue is sent while it grows:
#
#     head grows                       -> block_start once, then a delta
#     head complete, another behind it -> block_stop; the next one is the head
#     the upstream's end               -> all stopped in order; end
#     an error                         -> error, and nothing after it
#
# BlockMachine is this queue.  A reader (11) calls it, and it calls a writer: EventWriter
# makes events of the blocks, MessageWriter one message.  An answer in plain JSON takes the
# same way, as a stream of one chunk.  No I/O, no clock, no API's words.
# [Anthropic: streaming]

# ---- 8.1 machine -----------------------------------------------------------

class BlockMachine:
    """The queue of pending blocks of one answer; see the picture above.  A reader says which
    content the answer has, in the order of its arrival, and in the end why it stopped.  Raises
    UpstreamError for an answer that no client should take for a complete one."""

    def __init__(self, translation: Translation, new_id: NewId, writer: Writer) -> None:
        self.is_whole = False            # not a stream: see `_grow`
        self.has_begun = self.has_ended = False
        self.has_content = False         # a block was started
        self.has_calls = False           # a tool_use block was started
        self.stop: Json = {}             # stop_reason and its companions, once ended
        self.usage: Json = {}
        self._translation, self._new_id, self._writer = translation, new_id, writer
        self._queue: Deque[PendingBlock] = deque()
        self._has_call = False           # a call has stood in the queue
        self._call_ids = set(translation.history_call_ids)
        self._buffered = 0               # characters that wait in memory

    @property
    def is_empty(self) -> bool:
        """Whether the answer has had no content so far."""
        return not self._queue and not self.has_content

    @property
    def open_block(self) -> Optional[PendingBlock]:
        """The open block, if nothing waits for its turn; else None."""
        head = self._queue[0] if len(self._queue) == 1 else None
        is_open = head and head.is_started and not (head.pending_text or head.high_surrogate)
        return head if is_open else None

    def begin(self) -> None:
        """Starts the message, unless that has been done."""
        if not self.has_begun:
            self.has_begun = True
            self._writer.message_start()

    def text(self, text: str) -> None:
        """Adds visible text: to the last block if that is text, else to a new one."""
        self._grow(self._last(PendingText), text)

    def thinking(self, text: str, kind: str, details: Any = None) -> None:
        """Adds reasoning; `kind` and `details` are those of `PendingThinking.note`."""
        display = self._translation.thinking
        if display is ThinkingDisplay.HIDDEN:
            return
        block = self._last(PendingThinking)
        self.count_buffered(block.note(text, kind, details, display, not self.is_whole))
        self._grow(block, text)

    def open_call(self, call: PendingToolUse) -> None:
        """Puts a new call into the queue.  Where the client allows one, later ones are not sent."""
        if not self._has_call or not self._translation.is_single_call:
            self._has_call = True
            self._queue.append(call)
            self._advance()

    def arguments(self, call: PendingToolUse, fragment: str) -> None:
        """Adds a fragment of a call's arguments."""
        text = call.accept(fragment)
        if call.is_raw:
            self.count_buffered(len(fragment))
        if text and call in self._queue:
            self._grow(call, text)
        if call.state is ArgumentsState.CLOSED:
            self._advance()

    def end(self, ending: Ending, usage: Json) -> None:
        """Stops all blocks in order and ends the message.  Raises UpstreamError for a call that was
        cut off without a reason, or that has no name."""
        self.begin()
        while self._queue:
            self._send_pending(self._queue[0])
            self._stop_head(ending.reason)
        self.has_ended, self.usage = True, usage
        self.stop = stop_fields(ending, self.has_calls)
        self._writer.end(self.stop, usage)

    def count_buffered(self, size: int) -> None:
        """Bounds the characters of an answer that wait in memory.  Raises UpstreamError."""
        self._buffered += size
        check_buffered(self._buffered)

    def _last(self, kind: Type[PendingBlock]) -> Any:
        """The last block if it is of that kind, else a new one behind it."""
        if not self._queue or not isinstance(self._queue[-1], kind):
            self._queue.append(kind())
            self._advance()
        return self._queue[-1]

    def _grow(self, block: PendingBlock, text: str) -> None:
        """Sends text of the head at once; of other blocks, and of a whole answer, it waits.  A
        whole answer is sent at its end, each block as one delta: until then an error can still be
        an HTTP status."""
        is_head = block is self._queue[0] and not self.is_whole
        if is_head and block.is_started and not block.pending_text:
            self._send(block, text)
            return
        block.buffer(text)
        self.count_buffered(len(text))
        if is_head:
            self._send_pending(block)

    def _advance(self) -> None:
        """Stops each head that is complete and has another behind it; sends the new head's text."""
        while self._queue and not self.is_whole:
            head = self._queue[0]
            self._send_pending(head)
            if len(self._queue) == 1 or not head.is_complete():
                return
            self._stop_head()

    def _send_pending(self, head: PendingBlock) -> None:
        if head.pending_text and head.may_start():
            if not head.is_started:
                self._start(head)
            text, head.pending_text = "".join(head.pending_text), []
            self.count_buffered(-len(text))
            self._send(head, text)

    def _start(self, block: PendingBlock) -> None:
        block.is_started = self.has_content = True
        if isinstance(block, PendingToolUse):
            self.has_calls = True
            block.client_id = client_id(block.id, block.extra, self._call_ids, self._new_id)
            self._call_ids.update(filter(None, (block.id, block.client_id)))
        self._writer.block_start(block.block(self._translation))

    def _send(self, block: PendingBlock, text: str) -> None:
        display = self._translation.thinking
        if display is ThinkingDisplay.OMITTED and isinstance(block, PendingThinking):
            return
        if not self.is_whole and (block.high_surrogate or not text.isascii()):
            text, block.high_surrogate = block.high_surrogate + text, ""
            if "\ud800" <= text[-1] <= "\udbff":         # the next fragment may have its partner
                block.high_surrogate, text = text[-1], text[:-1]
        if text:
            self._writer.delta(text)

    def _stop_head(self, reason: str = "") -> None:
        """Ends the head, after the rest of it; `reason` is that of the Ending if this is one."""
        block = self._queue.popleft()
        if isinstance(block, PendingToolUse):
            rest = block.rest(reason)
            if rest is None:
                return                                   # half a call must not run
            if not block.is_started:
                self._start(block)
            self._send(block, rest)
        if block.high_surrogate:
            self._writer.delta("\ufffd")
        if block.is_started:                             # white space alone makes no block
            self._writer.block_stop(block.signature())


# ---- 8.2 pending blocks ----------------------------------------------------

class PendingBlock:
    """A block in the making."""

    def __init__(self) -> None:
        self.is_started = False
        self.pending_text: List[str] = []        # cannot be sent yet
        self.high_surrogate = ""                 # one that waits for its partner

    def buffer(self, text: str) -> None:
        self.pending_text.append(text)

    def is_complete(self) -> bool:
        """Whether it ends as soon as another block stands behind it."""
        return True

    def may_start(self) -> bool:
        return True

    def block(self, translation: Translation) -> Json:
        """The content_block of its start event."""
        raise NotImplementedError

    def signature(self) -> str:
        """The signature that is sent before its end; "" for none."""
        return ""


class PendingText(PendingBlock):
    """Visible text.  White space alone makes no block."""

    is_visible = False                           # white space is not

    def buffer(self, text: str) -> None:
        super().buffer(text)
        self.is_visible = self.is_visible or not text.isspace()

    def may_start(self) -> bool:
        return self.is_started or self.is_visible

    def block(self, translation: Translation) -> Json:
        return {"type": "text", "text": ""}


class PendingThinking(PendingBlock):
    """Reasoning.  Its signature carries back to the upstream the part that is hidden."""

    def __init__(self) -> None:
        super().__init__()
        self._kind = "n"
        self._hidden: List[str] = []
        self._details: List[Json] = []

    def block(self, translation: Translation) -> Json:
        return {"type": "thinking", "thinking": "", "signature": ""}

    def note(self, text: str, kind: str, details: Any, display: ThinkingDisplay,
             is_fragment: bool) -> int:
        """Collects the signature; returns how many characters have to wait for it.  `kind` is as in
        `carrier_signature`; kind d has `details`.  Fragments of details are joined; those of a
        whole answer stay as they are."""
        self._kind = kind
        if kind == "d":
            if is_fragment:
                for entry in objects_in(details):
                    join_detail(self._details, entry)
            elif is_list(details):
                self._details += details
        elif display is ThinkingDisplay.OMITTED and kind in ("c", "r"):
            self._hidden.append(text)
        else:
            return 0
        return len(text)

    def signature(self) -> str:
        if self._kind == "d":
            return carrier_signature("d", json_text(self._details))
        return carrier_signature(self._kind, well_formed_text("".join(self._hidden)))


def join_detail(details: List[Json], entry: Json) -> None:
    """Adds a fragment of reasoning_details, to the last entry if type and index are the same."""
    last = details[-1] if details else {}
    if not last or any(last.get(key) != entry.get(key) for key in ("type", "index")):
        details.append(dict(entry))
        return
    for key, value in entry.items():
        is_text = isinstance(value, str) and isinstance(last.get(key), str)
        last[key] = last[key] + value if is_text and key in ("text", "summary", "data") else value


# ---- 8.3 tool calls --------------------------------------------------------

class ArgumentsState(enum.Enum):
    """How far the arguments of a call have come."""
    NONE = 0             # no character of them yet
    OPEN = 1
    CLOSED = 2           # the JSON object is complete


class PendingToolUse(PendingBlock):
    """A tool call.  Its arguments are followed only to know where their JSON object ends.
    Arguments that are no JSON object are `raw`: they are collected and repaired at the end.  So are
    those of a custom call, which are plain text, and all arguments of a whole answer."""

    def __init__(self, upstream_id: str, is_custom: bool) -> None:
        """`id` and `name` are the upstream's, `extra` as in `client_id`."""
        super().__init__()
        self.id, self.name, self.client_id = upstream_id, "", ""
        self.extra: Any = None
        self.state = ArgumentsState.NONE
        self.is_raw = self.is_custom = is_custom
        self._raw: List[str] = []
        self._value: Any = None          # the arguments of a whole answer
        self._unsent = ""                # the brace, and white space after it
        self._is_filled = False          # something stands inside the braces
        self._depth = 0
        self._in_string = False
        self._is_escaped = False         # the last character was a backslash
        self._blanks = 0                 # white space in a row, outside strings

    def is_complete(self) -> bool:
        return self.state is ArgumentsState.CLOSED and self.name != ""

    def is_in_string(self) -> bool:
        """Whether plain characters pass without changing anything."""
        return self._in_string and not self._is_escaped and not self.pending_text

    def may_start(self) -> bool:
        return self.name != ""

    def block(self, translation: Translation) -> Json:
        return {"type": "tool_use", "id": self.client_id,
                "name": client_tool_name(self.name, translation.tool_names), "input": {}}

    def set_arguments(self, value: Any) -> None:
        """Takes the arguments of a whole answer, which are complete: text, or a JSON value."""
        self.is_raw, self._value = True, value

    def accept(self, text: str) -> str:
        """The part of a fragment of arguments that can be sent now.  Raises UpstreamError for
        endless white space."""
        if self._in_string and not self._is_escaped and not IN_STRING.search(text):
            return text                                          # most fragments
        if self.state is ArgumentsState.CLOSED:
            if self._is_filled or not text.lstrip(BLANKS).startswith("{"):
                return ""                                        # a brace too many, or all again
            self.state, self._unsent = ArgumentsState.NONE, ""
        if self.state is ArgumentsState.NONE and not self.is_custom:
            blanks = len(text) - len(text.lstrip(BLANKS))
            self._count_blanks(text[:blanks])
            text = text[blanks:]
            if not text:
                return ""
            # Some gateways put empty objects in front of the real one.
            text = EMPTY_OBJECTS.sub("", text, 1)
            self.state = ArgumentsState.OPEN
            self.is_raw = text[0] != "{"
        if self.is_raw:
            self._raw.append(text)
            return ""
        return self._filled(*self._scan(text))

    def rest(self, reason: str) -> Optional[str]:
        """The text left to send at the block's end; None for a call that must not be sent.
        `reason` is that of the Ending.  Raises UpstreamError if the call cannot end here."""
        if not self.name:
            raise UpstreamError(502, NAMELESS_CALL)
        if not self.is_raw:
            if self.state is ArgumentsState.OPEN and reason not in ("max_tokens", "refusal"):
                raise UpstreamError(502, "The upstream ended inside a tool call")
            return "" if self._is_filled else self._unsent
        arguments = "".join(self._raw) if self._value is None else self._value
        if self.is_custom:
            return json_text({"input": arguments})
        value = tool_input(arguments, reason == "max_tokens")
        return None if value is None else json_text(value) if value else ""

    def _filled(self, text: str, rest: str) -> str:
        """Holds an object back until something stands inside it."""
        if self._is_filled:
            return text
        self._unsent += text
        inside = self._unsent[1:].strip(BLANKS)
        if not inside or (inside == "}" and self.state is ArgumentsState.CLOSED):
            return self.accept(rest) if rest.strip(BLANKS) else ""
        self._is_filled = True
        return self._unsent

    def _scan(self, text: str) -> Tuple[str, str]:
        """(the text up to the object's end, the text behind it): follows strings and braces.  Raw
        control characters inside strings are escaped; both SDKs fail on a raw line end."""
        done: List[str] = []                                     # text before an escaped character
        place = 1 if self._is_escaped and text else 0
        self._is_escaped = False
        start = 0
        while True:
            match = (IN_STRING if self._in_string else OUT_OF_STRING).search(text, place)
            if not self._in_string:
                self._count_blanks(text[place:match.start() if match else len(text)])
            if match is None:
                return "".join(done) + text[start:], ""
            place = match.end()
            sign = match[0]
            if sign == '"':
                self._in_string = not self._in_string
            elif sign == "\\":
                self._is_escaped = place == len(text)
                place += 1
            elif self._in_string:
                done += text[start:match.start()], json_text(sign)[1:-1]
                start = place
            else:
                self._depth += 1 if sign in "{[" else -1
                if self._depth == 0:
                    self.state = ArgumentsState.CLOSED
                    return "".join(done) + text[start:place], text[place:]

    def _count_blanks(self, text: str) -> None:
        """Raises UpstreamError for endless white space: some models never leave that loop."""
        padded = " " * self._blanks + text
        if max(map(len, BLANK_RUN.findall(padded)), default=0) >= MAX_BLANKS:
            raise UpstreamError(
                502, f"The upstream sent {MAX_BLANKS} blanks in a row inside a tool call")
        self._blanks = len(padded) - len(padded.rstrip(BLANKS)) if text else 0


def tool_input(arguments: Any, is_cut: bool) -> Optional[Json]:
    """The `input` object for a call's arguments; None for a call that was cut off and must not run.
    Arguments that are no JSON object become INVALID_JSON, Anthropic's own convention: the tool's
    check fails, and the model can correct itself."""
    try:
        text = arguments if isinstance(arguments, str) else json_text(arguments)
    except ValueError:
        return {"INVALID_JSON": str(arguments)}
    value = leading_value(text.strip() or "{}")
    if isinstance(value, str) and value.strip():
        value = leading_value(value.strip())             # encoded twice
    if value in (None, [], ""):
        return {}
    if is_object(value):
        return value
    return None if is_cut else {"INVALID_JSON": text}


def leading_value(text: str) -> Any:
    """The JSON object that a text begins with, or the JSON value that it is; False for neither."""
    try:
        value, end = leading_model_json(text)
    except ValueError:
        return False
    return value if is_object(value) or end == len(text) else False


NAMELESS_CALL = "The upstream's answer has a tool call without a name"
BLANKS = " \t\r\n"
MAX_BLANKS = 512                         # characters; no JSON indents this deep
BLANK_RUN = re.compile(r"[ \t\r\n]+")
EMPTY_OBJECTS = re.compile(r"\A(?:\{[ \t\r\n]{0,99}\}[ \t\r\n]{0,99})+(?=\{)")
IN_STRING = re.compile(r'["\\\x00-\x1f]')
OUT_OF_STRING = re.compile(r'["{}\[\]]')


# ---- 8.4 stop and usage ----------------------------------------------------

class Ending(NamedTuple):
    """Why an answer ended, in no API's words."""
    reason: str = ""                     # max_tokens, refusal, or "" for a normal end
    refusal: str = ""                    # the model's words for it
    matched_stop: Optional[str] = None   # the stop sequence that TextFilter found
    reported_stop: Optional[str] = None  # the one that the upstream named


def stop_fields(ending: Ending, has_calls: bool) -> Json:
    """stop_reason, stop_sequence and stop_details of an answer that ended well."""
    if ending.matched_stop is not None:
        return stop_object("stop_sequence", ending.matched_stop)
    if ending.reason == "max_tokens":
        return stop_object("max_tokens")
    if ending.reason == "refusal" or (ending.refusal and not has_calls):
        return stop_object("refusal", None, ending.refusal or FILTER_EXPLANATION)
    if has_calls:
        return stop_object("tool_use")
    if ending.reported_stop is not None:
        return stop_object("stop_sequence", ending.reported_stop)
    return stop_object("end_turn")


def stop_object(reason: Optional[str], sequence: Optional[str] = None,
                explanation: Optional[str] = None) -> Json:
    details = explanation and {"type": "refusal", "category": None, "explanation": explanation}
    return {"stop_reason": reason, "stop_sequence": sequence, "stop_details": details}


class Meter(Protocol):
    """Estimates the size of an answer whose upstream sends no usage; it is OutputMeter (15)."""

    def add(self, text: str) -> None:
        """Counts a piece of the answer."""

    def tokens(self) -> int:
        """Estimated tokens of all pieces."""


def anthropic_usage(usage: Any, tier: Any, translation: Translation, meter: Meter) -> Json:
    """The usage object.  Its three input numbers add up to OpenAI's prompt_tokens.  Missing numbers
    are estimated."""
    usage = usage if is_object(usage) else {}
    prompt, output = prompt_and_output(usage, translation, meter)
    read = first_token_count(usage, CACHE_READ) or 0
    written = first_token_count(usage, CACHE_WRITTEN) or 0
    thought = first_token_count(usage, REASONING)
    if thought and token_count(usage, "total_tokens") == prompt + output + thought:
        output += thought                                # xAI: not in its completion_tokens
    counts: Json = {"input_tokens": max(prompt - read - written, 0),
                    "cache_creation_input_tokens": written, "cache_read_input_tokens": read,
                    "output_tokens": output}
    if thought is not None:
        counts["output_tokens_details"] = {"thinking_tokens": thought}
    counts["service_tier"] = SERVICE_TIERS.get(tier) if isinstance(tier, str) else None
    return counts


def prompt_and_output(usage: Json, translation: Translation, meter: Meter) -> Tuple[int, int]:
    """The tokens of prompt and answer: as told, else the rest of the total, else estimated."""
    prompt, output, total = (token_count(usage, name) for name in (
        "prompt_tokens", "completion_tokens", "total_tokens"))
    if total is not None:
        if prompt is None and output is not None and total >= output:
            prompt = total - output
        elif output is None and prompt is not None and total >= prompt:
            output = total - prompt
    return (translation.input_estimate() if prompt is None else prompt,
            meter.tokens() if output is None else output)


def token_count(usage: Json, name: str) -> Optional[int]:
    """A number of tokens; None for any value that is no such number."""
    value = usage.get(name)
    return int(value) if is_number(value) and 0 <= value < 2 ** 53 else None


def first_token_count(usage: Json, paths: Sequence[Tuple[str, str]]) -> Optional[int]:
    """The first of the numbers at (outer object or "", name) that is there."""
    holders = ((usage.get(outer) if outer else usage, name) for outer, name in paths)
    counts = (token_count(holder, name) for holder, name in holders if is_object(holder))
    return next((count for count in counts if count is not None), None)


FILTER_EXPLANATION = "The upstream's content filter stopped the answer."
CACHE_READ = (("prompt_tokens_details", "cached_tokens"), ("", "prompt_cache_hit_tokens"),
              ("", "cached_tokens"), ("", "cache_read_input_tokens"))
CACHE_WRITTEN = (("prompt_tokens_details", "cache_write_tokens"),
                 ("prompt_tokens_details", "cache_creation_tokens"),
                 ("", "cache_creation_input_tokens"))
REASONING = (("completion_tokens_details", "reasoning_tokens"),)
SERVICE_TIERS = {"priority": "priority", "fast": "priority", "default": "standard",
                 "auto": "standard", "flex": "standard", "scale": "standard"}


# ---- 8.5 writers -----------------------------------------------------------

class EventWriter:
    """Writes an answer as server-sent events, for a client that asked for a stream."""

    def __init__(self, translation: Translation, new_id: NewId, request_id: str = "") -> None:
        self._translation, self._new_id, self._request_id = translation, new_id, request_id
        self._events: List[str] = []     # written, and not taken yet
        self._index = -1                 # of the last block
        self._prefix = ""                # its delta event up to the text

    def taken(self) -> bytes:
        """The events since the last call."""
        data = "".join(self._events).encode("ascii")
        self._events.clear()
        return data

    def message_start(self) -> None:
        usage = {"input_tokens": self._translation.input_estimate(),
                 "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0, "output_tokens": 0}
        message = message_object(self._translation, self._new_id, [], stop_object(None), usage)
        self._events.append(sse_event("message_start", message=message) + PING)

    def block_start(self, block: Json) -> None:
        self._index += 1
        self._prefix = delta_prefix(self._index, *DELTAS[block["type"]])
        event = sse_event("content_block_start", index=self._index, content_block=block)
        self._events.append(event)

    def delta(self, text: str) -> None:
        self._events.append(self._prefix + quote(well_formed_text(text)) + "}}\n\n")

    def deltas(self, texts: str, separator: str) -> None:
        """Writes a delta for each of several texts, which are the insides of JSON strings."""
        joint = '"}}\n\n' + self._prefix + '"'
        self._events.append(self._prefix + '"' + texts.replace(separator, joint) + '"}}\n\n')

    def block_stop(self, signature: str) -> None:
        if signature:
            prefix = delta_prefix(self._index, "signature_delta", "signature")
            self._events.append(prefix + quote(signature) + "}}\n\n")
        self._events.append(sse_event("content_block_stop", index=self._index))

    def end(self, stop: Json, usage: Json) -> None:
        counts = {name: value for name, value in usage.items() if name != "service_tier"}
        self._events.append(sse_event("message_delta", delta=stop, usage=counts) + MESSAGE_STOP)

    def error(self, error: ProxyError) -> None:
        self._events.append(sse_event(**error_fields(error, self._request_id)))

    def ping(self, is_hidden_block: bool) -> None:
        """Writes a ping; in an open block that shows no text, a delta without text.  Claude Code
        ignores pings after five minutes in such a block."""
        self._events.append(self._prefix + '""}}\n\n' if is_hidden_block else PING)


class MessageWriter:
    """Collects an answer into one message, for a client that asked for no stream."""

    def __init__(self, translation: Translation, new_id: NewId) -> None:
        self.message: Json = {}          # once the answer has ended
        self._translation, self._new_id = translation, new_id
        self._blocks: List[Tuple[Json, List[str]]] = []
        self._size = 0

    def taken(self) -> bytes:
        """No bytes: nothing is sent before the message is complete."""
        return b""

    def message_start(self) -> None:
        """Nothing to do: see `end`."""

    def block_start(self, block: Json) -> None:
        self._blocks.append((block, []))

    def delta(self, text: str) -> None:
        self._size += len(text)
        check_buffered(self._size)
        self._blocks[-1][1].append(text)

    def deltas(self, texts: str, separator: str) -> None:
        self.delta(json.loads('"' + texts.replace(separator, "") + '"'))

    def block_stop(self, signature: str) -> None:
        if signature:
            self._blocks[-1][0]["signature"] = signature

    def end(self, stop: Json, usage: Json) -> None:
        content = []
        for block, texts in self._blocks:
            text = well_formed_text("".join(texts))
            is_call = block["type"] == "tool_use"
            value = tool_input(text, stop["stop_reason"] == "max_tokens") if is_call else text
            if value is not None:                        # half a call must not run
                content.append({**block, "input" if is_call else block["type"]: value})
        self.message = message_object(self._translation, self._new_id, content, stop, usage)


def check_buffered(size: int) -> None:
    """Raises UpstreamError if more of an answer waits in memory than may."""
    if size > MAX_BUFFERED_ANSWER:
        limit = f"{MAX_BUFFERED_ANSWER >> 20} MiB"
        raise UpstreamError(502, f"The upstream's answer is larger than {limit}")


def message_object(translation: Translation, new_id: NewId, content: List[Json], stop: Json,
                   usage: Json) -> Json:
    return {"id": "msg_" + new_id(24), "type": "message", "role": "assistant",
            "model": translation.requested_model, "content": content, **stop, "usage": usage}


def sse_event(type: str, **members: Any) -> str:
    return f"event: {type}\ndata: {json_text({'type': type, **members})}\n\n"


def delta_prefix(index: int, kind: str, member: str) -> str:
    """A delta event up to its text: the whole event is this, the quoted text and `}}`."""
    return (f'event: content_block_delta\ndata: {{"type":"content_block_delta","index":{index},'
            f'"delta":{{"type":"{kind}","{member}":')


Writer = Union[EventWriter, MessageWriter]
MAX_BUFFERED_ANSWER = 67108864           # characters; ANSWER_BODY (25) bounds plain JSON alike
DELTAS = {"text": ("text_delta", "text"), "thinking": ("thinking_delta", "thinking"),
          "tool_use": ("input_json_delta", "partial_json")}
quote = json.encoder.encode_basestring_ascii
PING = 'event: ping\ndata: {"type":"ping"}\n\n'
MESSAGE_STOP = 'event: message_stop\ndata: {"type":"message_stop"}\n\n'


# ============================================================================
# 9. TEXT FILTER
# ============================================================================
#
# The visible text on its way from a reader to the machine.  Reasoning in `<think>` tags, a
# repeated prefill and stop sequences are taken out of it.

# ---- 9.1 filter ------------------------------------------------------------

class TextFilter:
    """Takes `<think>` text, a repeated prefill and stop sequences out of the visible text.

    Text that could still turn into one of the three is held back.  `matched_stop` is the stop
    sequence that ended the text.

        LEAD --<think>--> THINK --</think>--> LEAD_TEXT --> PREFILL --> TEXT --stop--> ENDED
    """

    def __init__(self, translation: Translation) -> None:
        self.matched_stop: Optional[str] = None
        self._stops = translation.stop_sequences
        self._prefill = translation.prefill
        may_think = translation.profile.host_class not in ("openai", "azure")
        # Plain functions, not bound methods: no reference cycle keeps a finished request in memory.
        self._step = TextFilter._lead if may_think else TextFilter._at_prefill
        self._held = ""
        self.is_idle = False             # all further text passes unchanged

    def note_reasoning(self) -> None:
        """The upstream has a field for reasoning: its text is no place for `<think>`."""
        if self._step is TextFilter._lead:
            self._step = TextFilter._at_prefill

    def feed(self, text: str, is_last: bool = False) -> List[Span]:
        """The spans that may be seen now; `is_last`: no text follows directly."""
        spans: List[Span] = []
        text = self._held + text
        while text and self.matched_stop is None:
            before = self._step
            text = before(self, text, is_last, spans)
            if self._step is before:
                break
        self._held = "" if is_last or self.matched_stop is not None else text
        return spans

    # Each step takes the text at hand, appends the spans that may be seen and returns the text that
    # is left: for the next step when it has changed self._step, else to be held until more arrives.

    def _lead(self, text: str, is_last: bool, spans: List[Span]) -> str:
        start = text.lstrip()
        if start.startswith("<think>"):
            self._step = TextFilter._think
            return start[len("<think>"):]
        if is_last or not "<think>".startswith(start):
            self._step = TextFilter._at_prefill
        return text

    def _think(self, text: str, is_last: bool, spans: List[Span]) -> str:
        thought, tag, rest = text.partition("</think>")
        held = 0 if tag or is_last else tail_overlap(text, "</think>")
        if len(thought) > held:
            spans.append((True, thought[:len(thought) - held]))
        if tag:
            self._step = TextFilter._after_think
        return rest if tag else text[len(text) - held:]

    def _after_think(self, text: str, is_last: bool, spans: List[Span]) -> str:
        text = text.lstrip()
        if text:
            self._step = TextFilter._at_prefill
        return text

    def _at_prefill(self, text: str, is_last: bool, spans: List[Span]) -> str:
        """Most models repeat the prefill; the client puts its own in front of the answer."""
        if self._prefill.startswith(text) and text != self._prefill and not is_last:
            return text
        self._step = TextFilter._search
        self.is_idle = not self._stops
        return text[len(self._prefill):] if text.startswith(self._prefill) else text

    def _search(self, text: str, is_last: bool, spans: List[Span]) -> str:
        """Looks for the earliest stop sequence; at one place, for the longest."""
        overlaps = [tail_overlap(text, stop) for stop in self._stops if not is_last]
        found = [(text.find(stop), -len(stop), stop) for stop in self._stops if stop in text]
        end = len(text) - max(overlaps, default=0)
        if found and min(found)[0] < end:                # else a longer or earlier one may follow
            end, _, self.matched_stop = min(found)
        if end:
            spans.append((False, text[:end]))
        return text[end:]


def tail_overlap(text: str, wanted: str) -> int:
    """How many characters at the end of `text` could be the start of `wanted`."""
    sizes = range(min(len(text), len(wanted) - 1), 0, -1)
    return next((size for size in sizes if wanted.startswith(text[-size:])), 0)


Span = Tuple[bool, str]                  # (is it reasoning, the text)


# ---- 9.2 reader ------------------------------------------------------------

class Reader:
    """Reads the chunks of one answer and tells the machine which content they have.  The base of
    each API's reader: visible text and reasoning take the same way to the machine in all.  Each has
    its own read() and end()."""

    def __init__(self, translation: Translation, machine: BlockMachine, meter: Meter) -> None:
        self.has_finished = False        # only usage and the end can follow
        self.usage: Any = None           # the last that the upstream sent
        self._translation, self._machine, self._meter = translation, machine, meter
        self._filter = TextFilter(translation)

    def read(self, chunk: Json) -> None:
        """Takes the next chunk.  Raises UpstreamError."""
        raise NotImplementedError

    def end(self) -> None:
        """Ends the message after the last chunk.  Raises UpstreamError if it is not complete."""
        raise NotImplementedError

    def plain_target(self, chunk: Json) -> Optional[PlainTarget]:
        """Where a chunk that was read has its text, if it has nothing else; for 34.1."""
        return None

    @property
    def is_empty(self) -> bool:
        """Whether the upstream has told nothing: neither content nor usage nor a reason to stop."""
        return not self.has_finished and self.usage is None and self._machine.is_empty

    @property
    def was_cut(self) -> bool:
        """Whether a stop sequence ended the answer: the upstream still writes, at a cost."""
        return self._filter.matched_stop is not None

    def _text(self, text: str) -> None:
        """Takes visible text."""
        self._meter.add(text)
        if self._filter.is_idle:
            self._machine.text(text)
        else:
            self._show(self._filter.feed(text))

    def _thinking(self, text: str, kind: str, details: Any = None) -> None:
        """Takes reasoning from a field of its own; `kind` as in `carrier_signature`."""
        self._filter.note_reasoning()
        self._end_text()
        if not self._machine.has_ended:
            self._meter.add(text)
            self._machine.thinking(text, kind, details)

    def _end_text(self) -> None:
        """No text follows directly: text that the filter held back can be shown."""
        if not self._filter.is_idle:
            self._show(self._filter.feed("", is_last=True))

    def _show(self, spans: List[Span]) -> None:
        """Passes spans on.  After a stop sequence nothing counts any more: the answer ends."""
        for is_thought, text in spans:
            if is_thought:
                self._machine.thinking(text, "n")
            else:
                self._machine.text(text)
        if self.was_cut:
            self.end()


class PlainTarget(NamedTuple):
    """The place of a chunk's only text, and the way of further text there.  `holder` is the object
    in the chunk whose member `key` is the text.  `take` reads more text as if a chunk had brought
    it.  `is_plain` tells whether plain characters are a delta of a block."""
    holder: Json
    key: str
    take: Callable[[str], None]
    is_plain: Callable[[PendingBlock], bool]


# ============================================================================
# 10. SERVER-SENT EVENTS
# ============================================================================
#
# The bytes of an upstream's stream, cut anywhere, become the data of each event.
# [WHATWG: server-sent events]

# ---- 10.1 decoder ----------------------------------------------------------

class SSEDecoder:
    """Makes the data of each event of bytes that were cut anywhere.  [WHATWG: 9.2.6]  It tolerates
    careless servers: a line that is a whole JSON object is an event, with or without the empty line
    after it, and even without `data:` in front."""

    def __init__(self) -> None:
        self._tail = bytearray()                 # the start of a line
        self._is_first = True
        self._skips_lf = False                   # the last read ended in CR
        self._data: List[str] = []
        self._data_size = 0
        self._is_error = False

    @property
    def is_between_events(self) -> bool:
        """Whether no event has begun that the next line would continue."""
        return not self._data and not self._is_error and not self._is_first

    def lines(self, data: bytes) -> str:
        """The whole lines that these bytes complete.  Raises UpstreamError for an endless line."""
        if b"\r" in data or self._skips_lf:                      # CR LF and CR become LF
            data = data[1:] if self._skips_lf and data[:1] == b"\n" else data
            self._skips_lf = data[-1:] == b"\r"
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        end = data.rfind(b"\n") + 1
        if end == len(data) and not self._tail:
            return data.decode("utf-8", "replace")
        text = ""
        if end:
            text = (self._tail + data[:end]).decode("utf-8", "replace")
            self._tail.clear()
        self._tail += data[end:]
        if len(self._tail) > MAX_LINE:
            raise UpstreamError(502, f"The upstream sent a line over {MAX_LINE >> 20} MiB")
        return text

    def finish(self) -> List[str]:
        """The data that the end of the stream completes: whole values only."""
        found = self.events(self._tail.decode("utf-8", "replace") + "\n")
        return found + [data for data in self._joined() if is_whole(data)]

    def events(self, text: str) -> List[str]:
        """The data of the events that these lines complete."""
        if self._is_first and text:
            self._is_first = False
            text = text[1:] if text[:1] == "\ufeff" else text
        lines = text.split("\n")
        lines[-1] = ":"                          # the next line is not known yet
        found: List[str] = []
        for line, following in zip(lines, lines[1:]):
            if line[:5] == "data:":
                data = line[5:].removeprefix(" ")
            elif line[:1] in ("{", "["):
                data = line
            else:
                if not line:
                    found += self._joined()
                    self._is_error = False
                elif line[:6] == "event:":
                    self._is_error = line[6:].strip() == "error"
                continue
            if not self._data and (not following or is_whole(data)):
                found.append(ErrorData(data) if self._is_error else data)
            else:
                self._data.append(data)
                self._data_size += len(data)
                if self._data_size > MAX_LINE:
                    size = f"{MAX_LINE >> 20} MiB"
                    raise UpstreamError(502, f"The upstream sent an event over {size}")
        return found

    def _joined(self) -> List[str]:
        """The data lines of an event: together one value, or each line a value."""
        lines, self._data, self._data_size = self._data, [], 0
        if len(lines) > 1 and all(map(is_whole, lines)):
            return lines
        joined = "\n".join(lines)
        return [ErrorData(joined) if self._is_error else joined] if joined else []


class ErrorData(str):
    """The data of an event that calls itself an error."""


def is_whole(data: str) -> bool:
    """Whether data is one complete value: a JSON object by its look, or [DONE]."""
    data = data.strip()
    ends = data[:1] + data[-1:]
    return ends in ("{}", "[]") and data.count(ends[0]) == data.count(ends[1])


def is_event_stream(claims: bool, start: bytes) -> bool:
    """Whether an answer is server-sent events.  Decided by the first bytes, because servers
    mislabel Content-Type, whose word `claims` is."""
    start = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    if start[:1] in (b"{", b"["):                        # a line of JSON, or a body
        return claims and is_whole(start.partition(b"\n")[0].decode("utf-8", "replace"))
    return claims or re.match(rb"(data|event|id|retry)?:", start) is not None


MAX_LINE = 16 * 1024 * 1024              # bytes; real chunks are far smaller


# ============================================================================
# 11. CHAT: THE ANSWER
# ============================================================================
#
# Completions and chunks, as real servers send them.  A completion in plain JSON is read as
# a stream's only chunk.  [OpenAI: chat completion object, chunk object]

# ---- 11.1 reader -----------------------------------------------------------

class ChatReader(Reader):
    """Reads the chunks of a Chat Completions stream, or one whole completion."""

    def __init__(self, translation: Translation, machine: BlockMachine, meter: Meter) -> None:
        super().__init__(translation, machine, meter)
        self._calls = ToolCalls()
        self._choice_index: Any = None   # of the first choice that was seen
        self._reported_stop: Optional[str] = None
        self._finish_reason = self._reasoning_kind = self._refusal = ""
        self._tier: Any = None

    def read(self, chunk: Json) -> None:
        """Takes the next chunk, or the whole completion.  Raises UpstreamError.  A finish reason
        that tells of a failure counts after the chunk's content, unless that has ended the answer
        at a stop sequence."""
        choice = whole_choice(chunk) if self._machine.is_whole else self._own_choice(chunk)
        self._note_usage(chunk)
        if choice is None:
            return
        if is_name(choice.get("finish_reason")):
            self.has_finished = True
            self._finish_reason = choice["finish_reason"]
            self._reported_stop = reported_stop(choice, self._translation)
        delta = choice.get("delta", choice.get("message"))
        if delta is None and is_name(choice.get("text")):
            delta = {"content": choice["text"]}          # old completions
        if is_object(delta):
            self._read_delta(delta)
        if not self._machine.has_ended:
            raise_if_failed(self._finish_reason)

    def end(self) -> None:
        if not self.was_cut:
            raise_if_failed(self._finish_reason)
            self._end_text()
        if not self._machine.has_ended:
            ending = Ending(stop_class(self._finish_reason), self._refusal,
                            self._filter.matched_stop, self._reported_stop)
            self._machine.end(ending, anthropic_usage(
                self.usage, self._tier, self._translation, self._meter))

    def plain_target(self, chunk: Json) -> Optional[PlainTarget]:
        """Text, reasoning or arguments, if a chunk has nothing else; for 34.1."""
        choice = self._own_choice(chunk)
        if choice is None or choice.get("finish_reason") or len(chunk["choices"]) != 1:
            return None
        delta = choice.get("delta", choice.get("message"))
        carriers = [key for key in TEXT_CARRIERS if delta.get(key)] if is_object(delta) else []
        if len(carriers) != 1:
            return None
        key, value = carriers[0], delta[carriers[0]]
        if key == "content" and isinstance(value, str):
            return PlainTarget(delta, key, self._text, lambda block: (
                type(block) is PendingText and self._filter.is_idle))
        if key in ("reasoning_content", "reasoning") and isinstance(value, str):
            return PlainTarget(delta, key, lambda text: self._thinking(text, self._reasoning_kind),
                               lambda block: False)
        if key == "tool_calls" and isinstance(value, list) and len(value) == 1:
            return self._arguments_target(value[0])
        return None

    def _arguments_target(self, entry: Any) -> Optional[PlainTarget]:
        """The target of an entry of tool_calls that has arguments alone."""
        function = entry.get("function") if is_object(entry) else None
        if not is_object(function) or not isinstance(function.get("arguments"), str):
            return None
        fragment = call_fragment(entry)
        call = None if fragment.name else self._calls.matching(fragment)
        if call is None or call in self._calls.texts:
            return None
        return PlainTarget(function, "arguments", partial(self._arguments, call), lambda block: (
            block is call and call.is_in_string()))

    def _own_choice(self, chunk: Json) -> Optional[Json]:
        """The first choice of a chunk that has the index of the first choice ever seen."""
        for choice in objects_in(chunk.get("choices")):
            index = choice.get("index") or 0
            if self._choice_index is None:
                self._choice_index = index
            if index == self._choice_index:
                return choice
        return None

    def _note_usage(self, chunk: Json) -> None:
        """Each usage is the total so far; Groq puts it into a member of its own."""
        for holder in (chunk, chunk.get("x_groq")):
            if is_object(holder) and is_object(holder.get("usage")):
                self.usage = holder["usage"]
        self._tier = chunk.get("service_tier") or self._tier

    def _read_delta(self, delta: Json) -> None:
        """Reads a delta, or the message of a whole answer: reasoning first, then text, then calls.
        Its reasoning travels in one kind of carrier, that of the first field that held some."""
        kind, thought = reasoning_text(delta)
        if thought:
            self._reasoning_kind = self._reasoning_kind or kind
            self._thinking(thought, self._reasoning_kind, delta.get("reasoning_details"))
        text, refusal = content_texts(delta)
        if text:
            self._text(text)
        if refusal and not self._machine.has_ended:
            self._refusal += refusal
            self._text(refusal)
        read_call = self._read_whole_call if self._machine.is_whole else self._read_call
        for entry in call_entries(delta):
            self._end_text()
            if not self._machine.has_ended:
                read_call(call_fragment(entry))

    def _read_call(self, fragment: CallFragment) -> None:
        call, is_new = self._calls.find(fragment)
        if call is None:
            return
        if is_new and fragment.kind:
            self._machine.open_call(call)
        if fragment.arguments:
            self._arguments(call, fragment.arguments)

    def _read_whole_call(self, fragment: CallFragment) -> None:
        """A call of a whole answer: each entry is one.  Its arguments are complete, so they become
        INVALID_JSON if they are no object, and are left out at the token limit; a stream could do
        that only by holding them back."""
        if not fragment.kind:
            return
        if not fragment.name:
            raise UpstreamError(502, NAMELESS_CALL)
        call = self._calls.add(fragment)
        call.set_arguments(fragment.arguments if call.is_custom else fragment.whole_arguments)
        self._meter.add(fragment.arguments)
        self._machine.open_call(call)

    def _arguments(self, call: PendingToolUse, text: str) -> None:
        self._meter.add(text)
        if call in self._calls.texts:                    # tell a repeated call from a new one
            self._calls.texts[call].append(text)
            self._machine.count_buffered(len(text))
        self._machine.arguments(call, text)


TEXT_CARRIERS = ("content", "reasoning_content", "reasoning", "reasoning_details", "refusal",
                 "tool_calls", "function_call")


# ---- 11.2 choice and content -----------------------------------------------

def whole_choice(completion: Json) -> Json:
    """The choice with the lowest index, its message as `delta`.  Raises UpstreamError(502).  A
    stream's choice is that of the first index seen, as a lower one may never follow."""
    choices = objects_in(completion.get("choices"))
    indexes = [choice["index"] if is_number(choice.get("index")) else place
               for place, choice in enumerate(choices)]
    choice = choices[indexes.index(min(indexes))] if choices else {}
    for message in (choice.get("message"), choice.get("delta")):
        if is_object(message):
            return {**choice, "delta": message}
    if isinstance(choice.get("text"), str):
        return {**choice, "delta": {"content": choice["text"]}}
    raise UpstreamError(502, "The upstream's answer has no choices")


def reasoning_text(message: Json) -> Tuple[str, str]:
    """(kind of carrier, text) of the first field of a message or delta that holds reasoning."""
    for key, kind in (("reasoning_content", "c"), ("reasoning", "r")):
        if is_name(message.get(key)):
            return kind, message[key]
    details, content = message.get("reasoning_details"), message.get("content")
    if details:
        text = "".join(part_text(entry, "text", "summary") for entry in objects_in(details))
        if text:
            return "d", text
    return "n", "".join(map(thinking_text, content)) if isinstance(content, list) else ""


def thinking_text(part: Any) -> str:
    """The text of a content part of type thinking, a list or a string (Magistral)."""
    if not is_object(part) or part.get("type") != "thinking":
        return ""
    if is_list(part.get("thinking")):
        return "".join(part_text(item, "text") for item in objects_in(part["thinking"]))
    return part_text(part, "thinking", "text")


def content_texts(message: Json) -> Tuple[str, str]:
    """(visible text, refusal text) of a message or a delta."""
    content, refusal = message.get("content"), message.get("refusal")
    text = content if isinstance(content, str) else ""
    refusal = refusal if isinstance(refusal, str) else ""
    for part in objects_in(content):
        if part.get("type") in ("text", "output_text"):
            text += part_text(part, "text")
        elif part.get("type") == "refusal":
            refusal += part_text(part, "refusal")
    return text, refusal


def part_text(part: Json, *keys: str) -> str:
    """The first string that an object has under one of the keys; "" without one."""
    for key in keys:
        if isinstance(part.get(key), str):
            return part[key]
    return ""


# ---- 11.3 calls ------------------------------------------------------------

class CallFragment(NamedTuple):
    """An entry of tool_calls: a whole call, or a piece of one.  Absent members are empty."""
    kind: str                            # function or custom; "" is dropped
    index: Any                           # None if absent
    id: str
    name: str
    arguments: str
    whole_arguments: Any                 # the same as they came
    extra: Any


def call_entries(delta: Json) -> List[Json]:
    """The tool_calls of a message or a delta, else its old function_call as one."""
    entries = objects_in(delta.get("tool_calls"))
    function = None if entries else delta.get("function_call")
    return [{"function": function}] if function and is_object(function) else entries


def call_fragment(entry: Json) -> CallFragment:
    """An entry of tool_calls, read.  A custom call has text in place of arguments."""
    function, custom, kind = entry.get("function"), entry.get("custom"), entry.get("type")
    is_custom = is_object(custom) and (kind == "custom" or not is_object(function))
    content = custom if is_custom else function if is_object(function) else {}
    arguments = content.get("input" if is_custom else "arguments")
    return CallFragment(
        "custom" if is_custom else "function" if kind in (None, "", "function") else "",
        entry.get("index") if is_number(entry.get("index")) else None,
        entry["id"] if is_name(entry.get("id")) else "",
        content["name"] if is_name(content.get("name")) else "",
        argument_text(arguments), arguments, entry.get("extra_content"))


def argument_text(arguments: Any) -> str:
    """The text of a call's arguments; an object is written as JSON."""
    if not is_object(arguments):
        return arguments if isinstance(arguments, str) else ""
    try:
        return json_text(arguments)
    except ValueError:
        return json_text(str(arguments))


class ToolCalls:
    """The calls of a streamed answer, and which of them a fragment belongs to.  Servers number
    calls by index, by id, by both or by neither, and each in its own way."""

    def __init__(self) -> None:
        self._all: List[PendingToolUse] = []
        self._by_id: Dict[str, PendingToolUse] = {}
        self._by_index: Dict[Any, PendingToolUse] = {}
        self.texts: Dict[PendingToolUse, List[str]] = {}         # arguments of calls without index

    def find(self, fragment: CallFragment) -> Tuple[Optional[PendingToolUse], bool]:
        """(the call that a fragment means or None, whether it is new)."""
        call = self.matching(fragment)
        if call is None:
            is_call = fragment.index is not None or fragment.name or fragment.arguments
            return (self.add(fragment), True) if is_call else (None, False)
        if fragment.id and not call.id and not call.is_started:
            call.id = fragment.id
        self._note(call, fragment)
        return call, False

    def add(self, fragment: CallFragment) -> PendingToolUse:
        """A new call that begins with this fragment.  Raises UpstreamError for too many."""
        if len(self._all) >= MAX_CALLS:
            raise UpstreamError(502, f"The upstream's answer has more than {MAX_CALLS} tool calls")
        call = PendingToolUse(fragment.id, is_custom=fragment.kind == "custom")
        self._all.append(call)
        if fragment.index is not None:
            self._by_index[fragment.index] = call
        elif fragment.id:
            self.texts[call] = []
        self._note(call, fragment)
        return call

    def _note(self, call: PendingToolUse, fragment: CallFragment) -> None:
        if fragment.index is not None:
            self._by_index.setdefault(fragment.index, call)
        if fragment.id and call.id == fragment.id:
            self._by_id[fragment.id] = call
        name = fragment.name
        if name and name != call.name and (call.state is ArgumentsState.NONE or not call.name):
            call.name += name            # in fragments, or late
        if fragment.extra is not None and not call.is_started:
            call.extra = fragment.extra

    def matching(self, fragment: CallFragment) -> Optional[PendingToolUse]:
        """The call that a fragment continues; None for a new one."""
        # 1. The id is known.
        if fragment.id in self._by_id:
            call = self._by_index.get(fragment.index)
            if call is None or call.id != fragment.id:
                call = self._by_id[fragment.id]
            return None if self._repeats_id(call, fragment) else call
        # 2. Without an index it is the last call, unless it names another one (Gemini, Ollama).
        if fragment.index is None:
            last = self._all[-1] if self._all else None
            return last if last is None or continues_last(last, fragment) else None
        # 3. A new index is a new call.
        call = self._by_index.get(fragment.index)
        # 4. Without a name it is the call of this index.  Another id was made up for the fragment.
        if call is None or not fragment.name:
            return call
        # 5. A name and another id are a new call, unless this one is still open and has the name.
        if fragment.id and call.id:
            return call if is_same_call(call, fragment) else None
        # 6. A name behind the end of a call begins the next one, as in servers without ids.
        return None if call.state is ArgumentsState.CLOSED else call

    def _repeats_id(self, call: PendingToolUse, fragment: CallFragment) -> bool:
        """Whether a server has given the id of one call to another one, too.  A call that is sent
        again as it was is no other one."""
        if not fragment.name:
            return False
        is_closed, is_renamed = call.state is ArgumentsState.CLOSED, fragment.name != call.name
        if fragment.index is not None:
            return fragment.index not in self._by_index and (is_closed or is_renamed)
        texts = self.texts.get(call)
        is_changed = texts is not None and "".join(texts) != fragment.arguments
        return is_closed and (is_renamed or is_changed)


def continues_last(last: PendingToolUse, fragment: CallFragment) -> bool:
    """Whether a fragment without index, whose id is not known, belongs to the last call."""
    return not fragment.name or (is_same_call(last, fragment) and not (last.id and fragment.id))


def is_same_call(call: PendingToolUse, fragment: CallFragment) -> bool:
    """Whether a fragment with a name can belong to a call: that is open and has the same name."""
    return call.state is ArgumentsState.OPEN and call.name == fragment.name


MAX_CALLS = 1024                         # calls of one answer


# ---- 11.4 why it stopped ---------------------------------------------------

def stop_class(finish: str) -> str:
    """The meaning of a finish_reason: that of Ending, or `failed` or `overloaded`."""
    return STOP_REASONS.get(finish.lower(), "")


def raise_if_failed(finish: str) -> None:
    """Raises UpstreamError for a finish_reason by which the answer is none."""
    status = {"failed": 502, "overloaded": 529}.get(stop_class(finish))
    if status:
        raise UpstreamError(status, f"The upstream ended with finish_reason {finish}")


def reported_stop(choice: Json, translation: Translation) -> Optional[str]:
    """The stop sequence that vLLM and SGLang name beside the finish reason."""
    named = (choice.get("stop_reason"), choice.get("matched_stop"))
    return next((text for text in named if text in translation.stop_sequences), None)


STOP_REASONS = {
    "error": "failed", "network_error": "failed", "abort": "failed",
    "insufficient_system_resource": "overloaded",                          # DeepSeek
    "content_filter": "refusal", "safety": "refusal", "recitation": "refusal", "spii": "refusal",
    "blocklist": "refusal", "prohibited_content": "refusal", "sensitive": "refusal",
    "length": "max_tokens", "max_tokens": "max_tokens", "model_length": "max_tokens"}


# ============================================================================
# 13. UPSTREAM ERRORS
# ============================================================================
#
# Every server words its errors in its own way; clients act on the status, the type and a few exact
# wordings.  The facts are read from wherever a server put them; then one error is built from them
# that makes a client do the right thing.  [Anthropic: errors] [OpenAI: error codes]

# ---- 13.1 one error from the facts -----------------------------------------

def upstream_error(status: int, headers: Mapping[str, str], body: bytes, translation: Translation,
                   now: float) -> UpstreamError:
    """The error for an upstream's answer that is not 2xx.  `now`: seconds since 1970."""
    value = error_value(body)
    facts = replace(error_facts(status, value), headers=headers)
    if not facts.message:
        summary = response_summary(status, body if value is None else b"")
        facts = replace(facts, message=summary, has_own_words=False)
    return error_from_facts(facts, translation, now)


def error_from_object(value: Any, translation: Translation) -> UpstreamError:
    """The error for an error object that an upstream sent with status 200, or inside a stream."""
    facts = error_facts(0, value)
    message = facts.message or "The upstream sent an error without a message"
    facts = replace(facts, status=status_of_object(value, facts), message=message)
    return error_from_facts(facts, translation, 0)


def error_from_facts(facts: ErrorFacts, translation: Translation, now: float) -> UpstreamError:
    """The error that the client sees: a context overflow first, then quota, then by status.

    The log gets codes and types only, each a plain word: a sentence may quote the prompt.
    """
    overflow = context_overflow(facts)
    if overflow is not None:
        status, message = 400, overflow_message(overflow, translation.input_estimate())
    else:
        default = 502 if facts.status < 400 else 400 if facts.status < 500 else 500
        is_quota = is_out_of_quota(facts, translation.profile)
        status = 402 if is_quota else CLIENT_STATUS.get(facts.status, default)
        message = client_message(status, facts, translation)
    codes = re.findall(r"(?<!\S)[a-z0-9_.-]{1,40}(?!\S)", facts.codes)
    logged = redacted(" ".join(codes), translation.secrets)[:100]
    return UpstreamError(status, message, headers=client_headers(status, facts, now),
                         upstream_status=facts.status, is_context_overflow=overflow is not None,
                         log_message=f"the upstream answered {facts.status} {logged}".rstrip())


# Stands in a 400 of OpenAI's reasoning models: max_tokens was used up before the first visible
# token, so the answer is empty.
OUTPUT_LIMIT = b"Could not finish the message because max_tokens or model output limit"


# ---- 13.2 facts ------------------------------------------------------------

@dataclass(frozen=True, eq=False, repr=False)
class ErrorFacts:
    """The facts of an upstream's error, wherever the upstream put them."""
    status: int                              # HTTP status, or the object's code
    message: str = ""
    param: str = ""                          # the field that the error is about
    codes: str = ""                          # code, type, status: lower case
    fields: Json = field(default_factory=dict)               # of the innermost error object
    headers: Optional[Mapping[str, str]] = None              # None: an object in a 200
    has_own_words: bool = True               # False: we made the message

    @property
    def words(self) -> str:
        """The message as far as rules look at it: of a long one the start and the end.

        Servers quote whole conversations in their errors; words in there are no reason.
        """
        if len(self.message) <= SEARCHED_START + SEARCHED_END:
            return self.message
        return f"{self.message[:SEARCHED_START]}\n{self.message[-SEARCHED_END:]}"

    def search(self, pattern: str) -> Optional[Match[str]]:
        """The first match of a pattern in the message, in capitals or small letters."""
        return re.search(pattern, self.words, re.I | re.S)

    def matches(self, pattern: str) -> bool:
        return self.search(pattern) is not None

    def says_unknown(self) -> bool:
        """Whether the error says that the model does not know or support something."""
        return self.matches(UNKNOWN_FIELD) or re.search(UNKNOWN_FIELD, self.codes) is not None

    def names_field(self, name: str) -> bool:
        """Whether the error is about the body's field of this name.

        It is named by `param`, in quotes, or as a plain word of a sentence about unknown fields.
        xAI writes the name in camel case: reasoningEffort.
        """
        if self.param == name or self.param.startswith((name + ".", name + "[")):
            return True
        spelling = rf"(?:{name}|" + re.sub(r"_(\w)", lambda match: match[1].upper(), name) + ")"
        if re.search(rf"[\"'`]{spelling}[\"'`]", self.words):
            return True
        is_word = re.search(rf"(?<![\w-]){spelling}(?![\w-])", self.words) is not None
        return is_word and self.says_unknown()


UNKNOWN_FIELD = (
    r"unsupported|unrecognized|unknown|not permitted|not supported|extra_forbidden|incompatible|"
    r"does not support|not allowed|not accepted|does not accept|not available")


def error_value(body: bytes) -> Any:
    """The JSON value of an error's body; None where the body is not JSON."""
    try:
        return upstream_json(body.decode("utf-8", "replace"))
    except ValueError:
        return None


SEARCHED_START, SEARCHED_END = 3072, 1024            # characters of a message


def error_facts(status: int, value: Any) -> ErrorFacts:
    """The facts in a JSON body or chunk.  Gemini puts its error object into a list."""
    if isinstance(value, list):
        value = value[0] if value else {}
    if not is_object(value):
        return ErrorFacts(status)
    inner = value["error"] if is_object(value.get("error")) else value
    codes = [str(holder[key]).lower() for holder in (inner, value)
             for key in ("code", "type", "status", "error_type")
             if isinstance(holder.get(key), (str, int))]
    return ErrorFacts(status, error_message(value), str(inner.get("param") or ""), " ".join(codes),
                      inner)


def is_error_object(value: Json) -> bool:
    """Whether an object in a 200 body or a stream is an error and not an answer."""
    return (value.get("error") is not None               # OpenAI, OpenRouter, llama.cpp, Ollama
            or "error" in (value.get("object"), value.get("type"))     # Mistral, vLLM; gateways
            or "error_type" in value or "error_message" in value       # text-generation-inference
            or ("detail" in value and "choices" not in value))         # FastAPI


def error_message(value: Json) -> str:
    """An upstream's own words, from the first place that has some; "" where none has."""
    text = stated_message(value)
    while not text and is_object(value.get("message")):      # Mistral: FastAPI's body inside
        value = value["message"]
        text = stated_message(value)
    detail, errors, error = map(value.get, ("detail", "errors", "error"))
    if not text and isinstance(detail, list) and detail and is_object(detail[0]):
        text = validation_message(detail[0])
    if not text and isinstance(errors, list) and errors:     # Cloudflare
        text = str(errors[0].get("message") or "" if is_object(errors[0]) else errors[0])
    return text or (json.dumps(error) if is_object(error) and error else "")


def validation_message(detail: Json) -> str:
    """The place and the message of an error that FastAPI's validation found."""
    place = detail["loc"] if isinstance(detail.get("loc"), list) else []
    return ": ".join(filter(None, (".".join(map(str, place)), str(detail.get("msg") or ""))))


def stated_message(value: Json) -> str:
    """The message where servers put it on purpose.

    OpenAI and most others: `error.message`.  Ollama and text-generation-inference: `error` is the
    text.  Mistral: `message`.  FastAPI, on which vLLM and SGLang are built: `detail`.
    """
    error = value.get("error")
    if is_object(error) and is_name(error.get("message")):
        # OpenRouter: its own message is general, and the metadata holds the vendor's words.
        metadata = error.get("metadata")
        raw = metadata.get("raw") if is_object(metadata) else None
        return error["message"] + (f": {raw}" if is_name(raw) else "")
    texts = (error, *map(value.get, ("error_message", "message", "detail")))
    return next(filter(is_name, texts), "")


def response_summary(status: int, body: bytes) -> str:
    """Our message for an answer without one: its status, and the title or the text of its page."""
    body = body[:65536]
    # Each find() searches on from the last, so that a page of nothing but tags takes linear time.
    lower = body.lower()
    start = lower.find(b">", lower.find(b"<title")) + 1 if b"<title" in lower else 0
    end = lower.find(b"</title", start) if start else -1
    text = (body[start:end] if end >= 0 else body).decode("utf-8", "replace")
    if end < 0:
        text = re.sub(r"(?is)<(script|style).*?(</\1>|$)|<[^>]*(>|$)", " ", text)
    shown = " ".join(text.split())[:200]
    summary = f"The upstream answered {status} {REASON_PHRASES.get(status, '')}".rstrip()
    return summary + (f": {shown}" if shown else "")


# ---- 13.3 status and message for the client --------------------------------

def client_message(status: int, facts: ErrorFacts, translation: Translation) -> str:
    """The upstream's words, and beside them the fact that a user needs to mend the cause."""
    message, target = redacted(facts.message, translation.secrets), translation.target
    if 300 <= facts.status < 400:
        host = location_host((facts.headers or {}).get("location", ""))
        return (f"The upstream answered {facts.status} and points to {host}: check OPENAI_BASE_URL "
                "(redirects are not followed, the key would go with them)")
    if status == 402:
        # On Anthropic's own wording clients show Anthropic's billing page.
        return re.sub("credit balance is too low", "upstream credit exhausted", message, flags=re.I)
    if "array_above_max_length" in facts.codes and facts.names_field("tools"):
        sent = len(translation.body.get("tools", ()))
        message += "" if str(sent) in message else f" ({sent} tools were sent)"
    if status == 401 and target.uses_own_key:
        return "The upstream rejected OPENAI_API_KEY: " + message
    if status != 404 or facts.headers is None:
        return message
    if not facts.has_own_words:
        return f"{target.hostname} has no {target.path}: check OPENAI_BASE_URL"
    return f"{message} (model {translation.requested_model} is mapped to {target.model})"


def location_host(location: str) -> str:
    """The host that a redirect points to."""
    try:
        return redacted(urlsplit(location).hostname or "", ())[:200] or "another address"
    except ValueError:
        return "another address"


def status_of_object(value: Any, facts: ErrorFacts) -> int:
    """The HTTP status that an error object stands for: by a number in it, else by a word."""
    outer = value if is_object(value) else {}
    for number in (*map(facts.fields.get, ("code", "status_code", "http_status", "status")),
                   *map(outer.get, ("status_code", "code"))):
        if isinstance(number, (int, str)) and re.fullmatch(r"[45]\d\d", str(number)):
            return int(number)
    return next((status for pattern, status in CODE_STATUS if re.search(pattern, facts.codes)), 500)


def is_out_of_quota(facts: ErrorFacts, profile: ModelProfile) -> bool:
    """Whether the error means that money has run out: waiting does not help."""
    return facts.status == 402 or facts.status in (403, 429) and (
        re.search(QUOTA_CODES, facts.codes) is not None or profile.host_class in ("openai", "azure")
        and facts.matches("exceeded your current quota"))


# Words of an error's code, type or status, and the HTTP status that they stand for.
CODE_STATUS = (
    (r"insufficient_quota|billing|credit|spend_limit", 402),
    (r"rate_limit|slow_down|resource_exhausted|too_many_requests", 429),
    (r"overloaded|unavailable", 503),
    (r"timeout|deadline", 504),
    (r"authentication|invalid_api_key|unauthenticated|unauthorized", 401),
    (r"permission|forbidden", 403),
    (r"not_found", 404),
    (r"invalid_request|bad_request|badrequest|invalid_argument|validation", 400))
# The status that makes an Anthropic client do what the upstream's status asks for.  520 to 530 are
# Cloudflare's: it cannot reach the upstream, or does not trust its certificate.
CLIENT_STATUS = {
    401: 401, 402: 402, 403: 403, 404: 404, 408: 504, 409: 409, 413: 413, 425: 500, 429: 429,
    499: 500, 502: 502, 503: 529, 504: 504, 524: 504, 529: 529,
    **dict.fromkeys((520, 521, 522, 523, 525, 526, 527, 530), 502)}
QUOTA_CODES = (r"insufficient_quota|credit_balance_exhausted|billing_hard_limit_reached|"
               r"(organization|project)_spend_limit_exceeded|organization_usage_limit_exceeded|"
               r"insufficient_credits")


# ---- 13.4 context overflow -------------------------------------------------

class ContextOverflow(NamedTuple):
    """Numbers of tokens in a context error; 0 for each that the error does not give."""
    prompt: int = 0
    output: int = 0
    total: int = 0
    maximum: int = 0


def context_overflow(facts: ErrorFacts) -> Optional[ContextOverflow]:
    """The numbers of an error about a prompt that does not fit; None for any other error.

    A limit of tokens per minute is a rate limit, although its wording is close.
    """
    if facts.matches(r"tokens per (min|day|hour)|\bTPM\b"):
        return None
    prompt, maximum = facts.fields.get("n_prompt_tokens"), facts.fields.get("n_ctx")
    if is_integer(prompt) and is_integer(maximum):           # llama.cpp has them as fields
        return ContextOverflow(prompt=prompt, maximum=maximum)
    for wording in OVERFLOW_WORDINGS:
        match = facts.search(re.sub("([A-Z])#", r"(?P<\1>\\d[\\d,_]*)", wording))
        if match:
            given = {name: plain_number(text) for name, text in match.groupdict().items() if text}
            prompt = sum(given.get(name, 0) for name in "NAF")
            return ContextOverflow(prompt, *(given.get(name, 0) for name in "OTM"))
    return ContextOverflow() if re.search(OVERFLOW_CODES, facts.codes) else None


def plain_number(text: str) -> int:
    """A number of a sentence: 128000, 128,000 or 128_000."""
    return int(re.sub(r"[,_]", "", text))


OVERFLOW_CODES = (
    r"context_length_exceeded|context_window_exceeded|contextwindowexceeded|exceed_context_size|"
    r"model_max_prompt_tokens_exceeded|context_length(?!\w)")
# M# is a number of tokens.  M: maximum, N: prompt, A and F: its messages and functions, O: output,
# T: prompt and output.
OVERFLOW_WORDINGS = (
    # OpenAI and Azure; the third one is also vLLM's and OpenRouter's
    r"maximum context length is M# tokens.*resulted in N# tokens",
    r"maximum context length is M# tokens.*requested [\d,_]+ tokens \(A# in the messages,"
    r"(?: F# in the functions,)?(?: and)? O# in the completion",
    r"maximum context length is M# tokens.*requested T# tokens",
    # vLLM, three versions of it
    r"maximum context length is M# tokens.*requested O# output tokens.*"
    r"contains (?:at least )?N# input tokens",
    r"is too large: O#.*maximum context length is M# tokens and your request has N# input tokens",
    r"passed N# input tokens and requested O# output tokens.*context length is only M# tokens",
    # OpenAI, gpt-5
    r"exceed the configured limit of M# tokens.*resulted in N# tokens",
    # llama.cpp
    r"request \(N# tokens\) exceeds the available context size \(M# tokens\)",
    r"input \(N# tokens\) is larger than the max context size \(M# tokens\)",
    # LM Studio
    r"keep the first N# tokens.*context length of only M# tokens",
    r"n_keep: ?N# ?>= ?n_ctx: ?M#",
    # SGLang
    r"maximum context length of M# tokens.*total of [\d,_]+ tokens: N# tokens from the input "
    r"messages and O# tokens for the completion",
    r"prompt is too long: N#, model maximum context length: M#",
    # Cohere; Moonshot; Gemini; xAI; Mistral; text-generation-inference: one row each
    r"too many tokens.*cannot exceed M#",
    r"exceed(?:s|ed)? (?:the )?model(?:'s)? token limit:? M#",
    r"input token count \(?N#\)? exceeds the maximum number of tokens allowed \(?M#\)?",
    r"maximum prompt length is M# but the request contains N# tokens",
    r"prompt contains N# tokens.*model with M# maximum context length",
    r"must be <= M#\. Given: N# `inputs` tokens and O# `max_new_tokens`",
    # Anthropic, behind a gateway
    r"prompt is too long: N# tokens > M# maximum",
    r"input length and `?max_tokens`? exceed context limit: N# \+ O# > M#",
    # GitHub Copilot
    r"prompt token count of N#.*exceeds the limit of M#",
    r"exceeds the limit of M#.*prompt token count of N#",
    # any server: the maximum alone, then wordings without a number
    r"(?:maximum context length|context length|context window|context size)"
    r"(?: of the model| for this model)? (?:is|of)(?: only)? M#",
    r"exceeds? (?:the )?(?:available )?"
    r"(?:context window|context length|context size|model's (?:maximum )?context)|"
    r"exceeds the maximum (?:allowed )?(?:input|prompt|context)|input is too long|"
    r"prompt is too long|prompt too long|reduce the length of the (?:messages|prompt|input)|"
    r"too many tokens in the prompt|context size has been exceeded|n_keep >= n_ctx|"
    r"model_max_prompt_tokens_exceeded|tokens to keep from the initial prompt|"
    r"range of input length|no user query found|longer than the (?:model's )?context|"
    r"context[_ ](?:length|window)[_ ]exceed|context window exceeds|prompt exceeds (?:the )?max|"
    r"(?<!requested )exceed(?:s|ed)? (?:the )?model(?:'s)? (?:token )?limit|token length exceed")


def overflow_message(overflow: ContextOverflow, estimate: int) -> str:
    """The one wording that makes clients compact the conversation.

    The first number has to be the larger one: clients shed as many tokens as the two differ.
    """
    prompt, output, total, maximum = overflow
    if maximum:
        sizes = (prompt, prompt + output if prompt and output else 0, total)
        size = next((size for size in sizes if size > maximum), max(estimate, maximum + 1))
    else:
        size = prompt or estimate
        maximum = size * 4 // 5
    return f"prompt is too long: {size} tokens > {maximum} maximum"


# ---- 13.5 headers ----------------------------------------------------------

def client_headers(status: int, facts: ErrorFacts, now: float) -> Dict[str, str]:
    """x-should-retry, retry-after in whole seconds, retry-after-ms, and the rate limits.

    Clients retry a 401 and a 429 on their own: where that is useless, x-should-retry forbids it.
    """
    headers, made = facts.headers or {}, {}
    if headers.get("x-should-retry") in ("true", "false"):
        made["x-should-retry"] = headers["x-should-retry"]
    if status in (401, 402) or can_never_fit(facts):
        made["x-should-retry"] = "false"
    if status in (429, 500, 502, 504, 529):
        seconds, milliseconds = retry_after(facts, now), headers.get("retry-after-ms", "")
        if seconds is not None and made.get("x-should-retry") != "false":
            made["retry-after"] = str(max(1, math.ceil(seconds)))
        if re.fullmatch(SECONDS, milliseconds) and float(milliseconds) > 0:
            made["retry-after-ms"] = milliseconds
    return {**made, **ratelimit_headers(headers, now)}


SECONDS = r"\d{1,9}(\.\d+)?"


def can_never_fit(facts: ErrorFacts) -> bool:
    """Whether a request is larger than a minute's limit (OpenAI), so that no retry can pass."""
    match = facts.status == 429 and facts.search(
        r"request too large.*tokens per min.*limit:? ([\d,]+), requested:? ([\d,]+)")
    return bool(match) and plain_number(match[2]) > plain_number(match[1])


def retry_after(facts: ErrorFacts, now: float) -> Optional[float]:
    """Seconds to wait, from the first source that tells them; None where none does."""
    headers, details = facts.headers or {}, facts.fields.get("details")
    sources = [seconds_until(headers.get("retry-after", ""), now)]
    # Gemini: a RetryInfo among the details.
    sources += [parse_duration(entry.get("retryDelay")) for entry in objects_in(details)]
    if facts.status == 429:
        # OpenAI: the message, else the reset of the limits that are used up.
        match = facts.search(r"try again in ((?:\d+(?:\.\d+)?(?:ms|[hms]))+)")
        resets = [parse_duration(headers.get(f"x-ratelimit-reset-{unit}", ""))
                  for unit in ("requests", "tokens")
                  if headers.get(f"x-ratelimit-remaining-{unit}") == "0"]
        reset = max(filter(None, resets), default=None)
        sources.append(parse_duration(match[1]) if match else reset)
    return next((seconds for seconds in sources if seconds is not None), None)


def seconds_until(text: str, now: float) -> Optional[float]:
    """The seconds of a retry-after header, which may be a date.  [RFC 9110 10.2.3]"""
    if re.fullmatch(SECONDS, text):
        return float(text)
    if not text or len(text) > MAX_NUMBER_TEXT:
        return None
    # Imported here, because few servers send a date and the module takes 1 MB of memory.
    from email.utils import parsedate_to_datetime
    try:
        return parsedate_to_datetime(text).timestamp() - now
    except (TypeError, ValueError, IndexError, OverflowError):
        return None


def parse_duration(text: Any) -> Optional[float]:
    """Seconds of `6m0s`, `1.5s`, `20ms`, `1h2m` or a plain number; None for anything else."""
    # Every part but the last needs its unit: digits that could be parted in several ways would
    # take exponential time.
    if not isinstance(text, str) or not 0 < len(text) <= MAX_NUMBER_TEXT \
            or not re.fullmatch(rf"({AMOUNT}(ms|[dhms]))*({AMOUNT})?", text):
        return None
    units = {"ms": 0.001, "s": 1, "": 1, "m": 60, "h": 3600, "d": 86400}
    parts = re.findall(r"(\d+(\.\d+)?)(ms|[dhms]|)", text)
    return sum(float(amount) * units[unit] for amount, _, unit in parts)


AMOUNT = r"\d{1,15}(?:\.\d{1,12})?"
MAX_NUMBER_TEXT = 64                     # characters of a header's number or time


def ratelimit_headers(headers: Mapping[str, str], now: float) -> Dict[str, str]:
    """Anthropic's rate limit headers from OpenAI's."""
    made: Dict[str, str] = {}
    for unit in ("requests", "tokens"):
        for part in ("limit", "remaining", "reset"):
            value = headers.get(f"x-ratelimit-{part}-{unit}", "")
            if part == "reset" and value:
                value = reset_time(value, now)
            if value and (part == "reset" or value.isdecimal() and len(value) <= MAX_NUMBER_TEXT):
                made[f"anthropic-ratelimit-{unit}-{part}"] = value
    return made


def reset_time(text: str, now: float) -> str:
    """The time, RFC 3339, for a duration or for an epoch in seconds or ms; "" for anything else."""
    seconds = parse_duration(text)
    if seconds is None or seconds > 10 ** 14:
        return ""
    seconds = seconds / 1000 if seconds > 10 ** 12 else seconds
    moment = seconds if seconds > 10 ** 9 else now + seconds
    return datetime.fromtimestamp(math.ceil(moment), timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


# ============================================================================
# 14. ADJUSTMENTS
# ============================================================================
#
# Some errors are statements about the model rather than about the request, such as "Unsupported
# parameter: 'max_tokens'".  A row of ADJUSTMENTS recognises one error and changes the body, which
# is then sent again.  Messages, model and tools are never dropped.

# ---- 14.1 the loop's pure part ---------------------------------------------

def adjustment_for(status: int, body: bytes,
                   translation: Translation) -> Optional[Tuple[Adjustment, Any]]:
    """(adjustment, argument) of the first change that an error asks for; None where none does.

    The change has been made to the translation's body.
    """
    value = error_value(body)
    text = body[:ERROR_TEXT].decode("utf-8", "replace")
    facts = ErrorFacts(status, text) if value is None else error_facts(status, value)
    for adjustment in ADJUSTMENTS:
        argument = status in adjustment.statuses and adjustment.finds(facts, translation.body)
        if argument and adjustment.change(translation.body, argument):
            translation.token_estimate = 0           # it is counted anew from the changed body
            return adjustment, argument
    return None


def apply_adjustments(arguments: Mapping[str, Any], translation: Translation) -> None:
    """Makes the changes that earlier errors of this model asked for: name -> argument."""
    for adjustment in ADJUSTMENTS:
        if adjustment.name in arguments:
            adjustment.change(translation.body, arguments[adjustment.name])


MAX_ADJUSTED_RETRIES = 4                 # for one client request


# ---- 14.2 a row ------------------------------------------------------------

class Adjustment(NamedTuple):
    """A row of ADJUSTMENTS: an error, and the one change of the body that answers it.

    `finds` gives the argument of the change, or True where the change needs none; anything false
    means that the error is another one.  `change` makes the change and tells whether it changed
    anything: a body that would stay the same is not sent again.
    """
    name: str                                # in the log and in /metrics
    finds: Callable[[ErrorFacts, Json], Any]
    change: Callable[[Json, Any], bool]
    is_remembered: bool = True               # applied to later requests too
    statuses: Sequence[int] = (400, 422)     # of the errors that it reads


def set_member(holder: Json, name: str, value: Any) -> bool:
    """Sets a member of an object; True if it had another value."""
    is_new = holder.get(name) != value
    holder[name] = value
    return is_new


def change_members(holders: Iterable[Json], name: str, changed: Callable[[Any], Any]) -> bool:
    """Replaces a member, where it is, by `changed(member)`; True if one is another now."""
    return any([set_member(holder, name, changed(holder[name]))
                for holder in holders if name in holder])


def drop_members(holders: Iterable[Json], names: Sequence[str]) -> bool:
    """Removes members from objects; True if there was one with a value."""
    return any([holder.pop(name, None) is not None for holder in holders for name in names])


def error_about(*names: str, says: str = r"(?!)") -> Callable[[ErrorFacts, Json], bool]:
    """The `finds` of a row for errors about one of these fields, or with a wording."""
    return lambda facts, body: any(map(facts.names_field, names)) or facts.matches(says)


def functions_in(body: Json) -> List[Json]:
    """The function of each tool in a body."""
    return [tool["function"] for tool in body.get("tools", ())]


# ---- 14.3 limits and options -----------------------------------------------

def token_limit(facts: ErrorFacts, wordings: str) -> Optional[int]:
    """The number behind one of the wordings, in an error about the answer's token limit."""
    is_about_limit = "max_tokens" in facts.param or "max_completion_tokens" in facts.param or \
        facts.matches(r"max_(completion_|output_|new_)?tokens|maximum tokens|maxTokens")
    match = facts.search(wordings + r" ?[`'\"]?(\d[\d,_]*)") if is_about_limit else None
    return plain_number(match[1]) if match and context_overflow(facts) is None else None


def room_left(facts: ErrorFacts, body: Json) -> Optional[int]:
    """Tokens that are left for the answer, if the prompt alone does fit and enough are left."""
    overflow = context_overflow(facts)
    if overflow is None or not (overflow.output and overflow.maximum and overflow.prompt):
        return None
    room = overflow.maximum - overflow.prompt - 8
    return room if room >= MIN_ROOM else None


def lower_limit(body: Json, limit: int) -> bool:
    name = token_field(body)
    return 0 < limit < body.get(name, 0) and set_member(body, name, limit)


def raise_limit(body: Json, limit: int) -> bool:
    name = token_field(body)
    return body.get(name, MAX_MINIMUM) < limit <= MAX_MINIMUM and set_member(body, name, limit)


def token_field(body: Json) -> str:
    return "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"


def rename_field(body: Json, old: str, new: str) -> bool:
    return old in body and set_member(body, new, body.pop(old))


def named_options(facts: ErrorFacts, body: Json) -> List[str]:
    """The optional fields of the body that an error names: the one in `param`, else all."""
    named = [name for name in OPTIONAL_FIELDS if name in body and facts.names_field(name)]
    return [name for name in named if name == facts.param] or named


def supported_efforts(facts: ErrorFacts, body: Json) -> List[str]:
    """The efforts that an error lists (OpenAI): Supported values are: 'low' and 'high'."""
    match = facts.search(r"supported values are:?(.*)")
    is_listed = match and facts.names_field("reasoning_effort")
    return re.findall(r"['\"`](\w+)['\"`]", match[1]) if is_listed else []


def take_nearest_effort(body: Json, allowed: Sequence[str]) -> bool:
    name, effort = "reasoning_effort", body.get("reasoning_effort")
    return effort in EFFORTS and set_member(body, name, nearest_effort(effort, allowed))


MIN_ROOM = 1024                          # tokens; a shorter answer is of no use
MAX_MINIMUM = 4096                       # tokens; a higher minimum is a misread number
# Wordings of many servers; those in brackets are DeepSeek's range, [1, 8192], and Anthropic's
# "9000 > 8192, which is the maximum".
AT_MOST = (
    r"(?:at most|<=|less than or equal to|maximum(?: allowed)?(?: value)? (?:is|of)|cannot exceed|"
    r"up to|\[\d+, ?|between \d+ and|lower than|limit(?: is| of|:)|"
    r">(?= ?[\d,_]+,? which is the maximum))")
AT_LEAST = r"(?:at least|>=|greater than or equal to|minimum value (?:is|of)|\[)"
OPTIONAL_FIELDS = (
    "temperature", "top_p", "stop", "parallel_tool_calls", "reasoning_effort", "reasoning",
    "thinking", "stream_options", "service_tier", "safety_identifier", "prompt_cache_key")


# ---- 14.4 tools ------------------------------------------------------------

def is_schema_error(facts: ErrorFacts, body: Json) -> bool:
    """Whether an upstream rejects the schema of a tool, or cannot make a grammar of it."""
    return "tools" in body and (
        "invalid_function_parameters" in facts.codes
        or re.match(r"tools\[\d+\]\.function\.parameters", facts.param) is not None
        or facts.matches(SCHEMA_WORDINGS))


def unknown_keywords(facts: ErrorFacts, body: Json) -> List[str]:
    """Keywords of schemas that an error calls unknown (Gemini).  No schema can do without four."""
    pattern = r"unknown name ['\"](\w+)['\"] at ['\"]tools\S*parameters"
    names = dict.fromkeys(re.findall(pattern, facts.words, re.I))
    return [name for name in names if name not in ("type", "properties", "items", "required")]


def drop_keywords(body: Json, keywords: Sequence[str]) -> bool:
    """Removes keywords from the schemas of all tools, on every level."""
    def without(schema: Any) -> Any:
        if not is_object(schema):
            return schema
        kept = {key: value for key, value in schema.items() if key not in keywords}
        return mapped_subschemas(kept, without)
    return change_members(functions_in(body), "parameters", without)


def description_limit(facts: ErrorFacts, body: Json) -> Optional[int]:
    """The length that a tool's description may have, from an error that names one (OpenAI)."""
    match = facts.search(r"maximum length:? (\d+)")
    place = r"tools[\[.]\d+\]?\.function\.description"
    return int(match[1]) if match and re.search(place, f"{facts.param} {facts.words}") else None


SCHEMA_WORDINGS = (
    r"invalid schema for function|tools[\[.]\d+\]?\.function\.parameters|"
    r"(grammar|json[ _]schema).*(pars|conver|unsupported|unrecognized|invalid)|"
    r"(pars|conver|unsupported|unrecognized|invalid).*(grammar|json[ _]schema)|"
    r"function_declarations\[\d+\]\.parameters")
# llama.cpp makes a grammar of each schema and cannot take some of these.
GRAMMAR_KEYWORDS = (
    "pattern", "format", "propertyNames", "patternProperties", "minLength", "maxLength", "minItems",
    "maxItems", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf",
    "default")


# ---- 14.5 rejected schemas -------------------------------------------------

def simple_schema(schema: Json) -> Json:
    """A schema for servers that reject alternatives at the root or arrays without `items`."""
    # 1. A root that only refers to a definition is replaced by it.
    root = resolved_root(schema)
    definitions = {key: root[key] for key in DEFINITIONS if key in root}
    # 2. Root keywords that say nothing of properties are dropped; arrays get items on every level.
    root = complete_array({key: value for key, value in root.items() if key not in NOT_AT_ROOT})
    # 3. The alternatives lend the root their properties, and the names that they require.
    properties, required = merged_branches(root)
    root = {key: value for key, value in root.items() if key not in (*BRANCHES, "required")}
    root.update(type="object", properties=properties, **definitions)
    # 4. Names without a property are not required.
    known = [name for name in dict.fromkeys(required) if name in properties]
    return {**root, "required": known} if known else root


DEFINITIONS = ("$defs", "definitions")
BRANCHES = ("anyOf", "oneOf", "allOf")
NOT_AT_ROOT = ("enum", "not", "const", "$id")


def merged_branches(root: Json) -> Tuple[Json, List[str]]:
    """(properties, required) of a root and its alternatives; the first property of a name wins.

    Of anyOf and oneOf a name is required that every branch requires, of allOf any branch's name.
    """
    properties, required = dict(properties_of(root)), required_by(root)
    for key in BRANCHES:
        branches = objects_in(root.get(key))
        for branch in branches:
            for name, item in properties_of(branch).items():
                properties.setdefault(name, item)
        names = [required_by(branch) for branch in branches]
        takes_all = key == "allOf" or not names
        shared = set().union(*names) if takes_all else set(names[0]).intersection(*names)
        required += [name for some in names for name in some if name in shared]
    return properties, required


def properties_of(schema: Json) -> Json:
    properties = schema.get("properties")
    return properties if is_object(properties) else {}


def required_by(schema: Json) -> List[str]:
    required = schema.get("required")
    return [name for name in required if isinstance(name, str)] if is_list(required) else []


def resolved_root(schema: Json) -> Json:
    """A root that only refers to one of its own definitions, replaced by that definition."""
    match = re.fullmatch(r"#/(\$defs|definitions)/([^/]+)", str(schema.get("$ref", "")))
    target = (schema.get(match[1]) or {}).get(match[2]) if match else None
    if not is_object(target):
        return schema
    return {**{key: schema[key] for key in DEFINITIONS if key in schema}, **target}


def complete_array(schema: Any) -> Any:
    """A schema in which arrays have `items`, `required` is a filled list, and nothing is a boolean.

    `additionalProperties` alone stays a boolean, which every server takes.
    """
    if isinstance(schema, bool):
        return {} if schema else {"not": {}}
    if not is_object(schema):
        return schema
    complete = mapped_subschemas(schema, complete_array)
    if is_boolean(schema.get("additionalProperties")):
        complete["additionalProperties"] = schema["additionalProperties"]
    if not (is_list(complete.get("required")) and complete["required"]):
        complete.pop("required", None)
    tuple_items = complete.get("prefixItems") or complete.get("items")
    if is_list(tuple_items) and tuple_items:
        complete["items"] = tuple_items[0] if len(tuple_items) == 1 else {"anyOf": tuple_items}
    elif complete.get("type") == "array" and not is_object(complete.get("items")):
        complete["items"] = {}
    return complete


# ---- 14.6 messages and format ----------------------------------------------

def is_null_content_error(facts: ErrorFacts, body: Json) -> bool:
    """Whether an upstream rejects the null content that stands beside tool calls."""
    return bool(re.search(r"\bcontent\b", f"{facts.words} {facts.param}")) and facts.matches(
        r"\bnull\b|\bNone\b|expected (a )?string|field required|valid string|missing field")


def separate_tool_results(body: Json, argument: Any) -> bool:
    """Puts an assistant message between tool results and the user message after them."""
    messages: List[Json] = []
    for message in body["messages"]:
        if message["role"] == "user" and messages and messages[-1]["role"] == "tool":
            messages.append({"role": "assistant", "content": "(tool results received)"})
        messages.append(message)
    return set_member(body, "messages", messages)


def shorten_ids(body: Json, argument: Any) -> bool:
    """Makes ids of nine letters and digits, the same for a call and its result."""
    nine_letters = partial(upstream_call_id, host_class="mistral")
    calls = [call for message in body["messages"] for call in message.get("tool_calls", ())]
    return any([change_members(body["messages"], "tool_call_id", nine_letters),
                change_members(calls, "id", nine_letters)])


def ask_for_json(body: Json, argument: Any) -> bool:
    """JSON mode and a line in the system text, for servers that take no schemas."""
    answer_format = body.get("response_format", {})
    if answer_format.get("type") != "json_schema":
        return False
    line = format_instruction(answer_format["json_schema"]["schema"])
    first = body["messages"][0]
    if first["role"] == "system":
        first["content"] += "\n\n" + line
    else:
        body["messages"].insert(0, {"role": "system", "content": line})
    return set_member(body, "response_format", {"type": "json_object"})


def drop_format(body: Json, argument: Any) -> bool:
    """Leaves the format out.  The line in the system text stays, or is added."""
    ask_for_json(body, argument)
    return drop_members([body], ["response_format"])


def drop_images(body: Json, argument: Any) -> bool:
    """Puts a note in the place of each image, so that the model knows of it."""
    note = text_part("[image omitted: the model does not accept images]")
    return any([set_member(message, "content", [note if part["type"] == "image_url" else part
                                                for part in message["content"]])
                for message in body["messages"] if isinstance(message.get("content"), list)])


# ---- 14.7 the table --------------------------------------------------------

# Servers of local models answer a grammar that they cannot build with a 500, routers answer with a
# 404 where no endpoint has the capability.
LOCAL_STATUSES = (400, 404, 422, 500, 501)
NO_IMAGES = (
    r"(does not have|without|no) vision|image_url.*invalid|invalid.*image_url|"
    r"(image|vision|multi-?modal).*"
    r"(not support|unsupported|unknown variant|not available|text[- ]only)|"
    r"(not support|unsupported|unknown variant|unknown (content )?type|no endpoints found).*"
    r"(image|vision|multi-?modal)")
CARRIED_REASONING = ("reasoning_content", "reasoning", "reasoning_details")

ADJUSTMENTS = (
    # Reasoning models reject max_tokens and name the field that they want.  [OpenAI: o-series]
    Adjustment("limit_is_max_completion_tokens",
               finds=lambda facts, body: facts.names_field("max_tokens")
               and facts.matches("max_completion_tokens"),
               change=lambda body, _: rename_field(body, "max_tokens", "max_completion_tokens")),
    # Servers that know only the older name.
    Adjustment("limit_is_max_tokens",
               finds=lambda facts, body: facts.names_field("max_completion_tokens")
               and facts.says_unknown(),
               change=lambda body, _: rename_field(body, "max_completion_tokens", "max_tokens")),
    # Clients ask for as many tokens as Claude can give.
    Adjustment("limit_at_most", lambda facts, body: token_limit(facts, AT_MOST), lower_limit),
    # OpenAI's least is 16; Claude Code asks for 1 when it probes a quota.
    Adjustment("limit_at_least", lambda facts, body: token_limit(facts, AT_LEAST), raise_limit),
    # Prompt and answer together do not fit.  The next prompt has another size.
    Adjustment("room_left", room_left, lower_limit, is_remembered=False, statuses=range(400, 600)),
    # OpenAI, gpt-5.1 and later with function tools.
    Adjustment("effort_none",
               error_about(says=r"set [`'\"]?reasoning_effort[`'\"]? to [`'\"]?none"),
               lambda body, _: set_member(body, "reasoning_effort", "none")),
    Adjustment("effort_nearest", supported_efforts, take_nearest_effort),
    Adjustment("options_dropped", named_options, lambda body, names: drop_members([body], names)),
    # The client then gets its events from the whole answer.
    Adjustment("not_streamed", error_about(
        "stream", says="stream(ing)? (mode )?is not supported|does not support stream"),
        lambda body, _: drop_members([body], ("stream", "stream_options"))),
    Adjustment("strict_dropped",
               finds=lambda facts, body: facts.names_field("strict")
               or facts.matches(r"function\.strict") or facts.param.endswith("function.strict"),
               change=lambda body, _: drop_members(functions_in(body), ["strict"])),
    Adjustment("keywords_dropped", unknown_keywords, drop_keywords),
    # Two steps: the second is taken when the first has nothing left to change.
    Adjustment("schemas_simplified", is_schema_error, lambda body, _: change_members(
        functions_in(body), "parameters", simple_schema), statuses=LOCAL_STATUSES),
    Adjustment("schemas_without_keywords", is_schema_error, statuses=LOCAL_STATUSES,
               change=lambda body, _: drop_keywords(body, GRAMMAR_KEYWORDS)),
    # Kimi and DeepSeek take no forced choice while they think.
    Adjustment("tool_choice_auto", error_about("tool_choice"), lambda body, _: (
        "tool_choice" in body and set_member(body, "tool_choice", "auto"))),
    Adjustment("content_never_null", is_null_content_error, lambda body, _: change_members(
        body["messages"], "content", lambda content: "" if content is None else content)),
    # Mistral, both rows.
    Adjustment("assistant_after_tools", change=separate_tool_results,
               finds=lambda facts, body: "3230" in facts.codes
               or facts.matches(r"role ['\"]?user['\"]? after role ['\"]?tool")),
    Adjustment("ids_of_nine", error_about(says=r"tool[_ ]call[_ ]id.*(length of 9|9 characters)"),
               shorten_ids),
    # DeepSeek takes JSON mode; other servers take no format at all.
    Adjustment("json_mode", change=ask_for_json, finds=error_about(
        "response_format", says=r"response_format.*(json_schema|unavailable|not support|must be)")),
    Adjustment("format_dropped", change=drop_format, finds=error_about(
        "response_format", says=r"response_format.*(json_object|unavailable|not support|must be)")),
    # Servers that know no reasoning in the history.
    Adjustment("reasoning_not_returned", error_about(
        *CARRIED_REASONING, says=r"messages?\W.*\breasoning(_content|_details)?\b"),
        lambda body, _: drop_members(body["messages"], CARRIED_REASONING)),
    Adjustment("descriptions_cut", description_limit, lambda body, limit: change_members(
        functions_in(body), "description", lambda text: text[:limit])),
    Adjustment("images_left_out", error_about(says=NO_IMAGES), drop_images,
               statuses=LOCAL_STATUSES),
)


# ============================================================================
# 15. TOKEN ESTIMATE
# ============================================================================
#
# The size of a prompt, without the vocabulary's tables, which are megabytes.  A text is cut into
# pieces as o200k_base itself cuts it: words with their leading blank, up to three digits, runs of
# punctuation, white space.  No token spans two pieces, so the costs of the pieces add up; a piece's
# cost follows from its kind, length and script.
#
# The constants are weights in tokens, from one least-squares fit of the relative error over 4,281
# texts (20 million characters: prose, code, JSON, logs, shell, 40 languages), each class of text
# counting the same, against the real tokenizer.  On other texts the mean error over classes is
# 4 %, and 10 % in the worst class.

# ---- 15.1 a prompt ---------------------------------------------------------

def estimated_request_tokens(body: Json, count: Optional[Callable[[Any], int]] = None) -> int:
    """Estimated tokens of a Chat Completions request; `count` in place of item_tokens."""
    return estimated_prompt_tokens(chat_prompt_texts(body), count or item_tokens)


def estimated_prompt_tokens(items: Iterable[PromptItem], count: Callable[[Any], int]) -> int:
    """Tokens of a prompt, at least 1: `count` gives those of an item that is no number of them.

    A long prompt is counted as one text, of which estimated_tokens takes samples: item by item it
    would block the event loop for seconds.
    """
    found = list(items)
    tokens = 3 + sum(item for item in found if isinstance(item, int))
    texts = [item for item in found if not isinstance(item, int)]
    if sum(is_object(text) for text in texts) <= MANY_SCHEMAS \
            and sum(len(text) for text in texts if isinstance(text, str)) <= LONG_PROMPT:
        return tokens + sum(map(count, texts))
    return tokens + estimated_tokens("\n".join(
        text if isinstance(text, str) else readable_json(text) for text in texts))


def item_tokens(item: Union[str, Json]) -> int:
    """The estimated tokens of a text, or of a schema as the model reads it."""
    return estimated_tokens(item if isinstance(item, str) else readable_json(item))


PromptItem = Union[str, Json, int]


def chat_prompt_texts(body: Json) -> Iterator[PromptItem]:
    """The texts and schemas of a Chat Completions body, and numbers of tokens for all the rest."""
    for message in body["messages"]:
        yield MESSAGE_TOKENS
        content = message.get("content")
        if isinstance(content, str):
            yield content
        for part in content if is_list(content) else ():
            if part["type"] == "text":
                yield part["text"]
            elif part["type"] == "image_url":
                yield IMAGE_TOKENS
            elif part["type"] == "file":
                size = len(part["file"]["file_data"].rpartition(",")[2]) * 3 // 4
                yield PDF_TOKENS * (1 + (size - 1) // PDF_PIECE)
        for call in message.get("tool_calls", ()):
            yield from (call["function"]["name"], call["function"]["arguments"])
    for tool in body.get("tools", ()):
        function = tool["function"]
        yield from (TOOL_TOKENS, function["name"], function.get("description", ""),
                    function["parameters"])
    schema = body.get("response_format", {}).get("json_schema", {}).get("schema")
    if schema is not None:
        yield schema


LONG_PROMPT, MANY_SCHEMAS = 1 << 20, 256             # characters, which take 0.1 s; schemas
MESSAGE_TOKENS = 4                       # around a message
IMAGE_TOKENS = 1600                      # of an image of common size
TOOL_TOKENS = 8                          # around a tool's name, description, schema
# A page of a PDF has some 2,000 tokens and some 64 KiB: each piece that has begun counts as a page.
PDF_TOKENS, PDF_PIECE = 2000, 65536


# ---- 15.2 a text -----------------------------------------------------------

def estimated_tokens(text: str) -> int:
    """The estimated number of o200k_base tokens in a text; 0 only for an empty one.

    Counts 11 MB a second of code (measured 2026-11-28, Python 3.11).  Of a long text, which would
    block the event loop for too long, evenly spread samples are counted.
    """
    size, pieces = len(text), piece_pattern().findall
    step, length = SLICE, SLICE
    if size > MAX_COUNTED:
        step, length = size // (MAX_COUNTED // SAMPLE), SAMPLE
    total, counted = 0.0, 0
    for start in range(0, size, step):
        part = text[start:start + length]
        counted += len(part)
        total += sum(map(piece_cost, pieces(part)))
    return math.ceil(total if counted == size else total * size / counted)


class OutputMeter:
    """The size of a generated text, for upstreams that report no usage.

    The beginning is kept and counted like a prompt; the rest is assumed to be alike.
    """

    def __init__(self) -> None:
        self._sample: List[str] = []
        self._sampled = 0
        self._total = 0

    def add(self, text: str) -> None:
        self._total += len(text)
        if self._sampled < MAX_SAMPLE:
            self._sampled += len(text)
            self._sample.append(text)

    def tokens(self) -> int:
        """Estimated tokens, at least 1 if anything was written."""
        estimate = estimated_tokens("".join(self._sample))
        return max(1, estimate * self._total // self._sampled) if self._total else 0


MAX_COUNTED = 1 << 19                    # characters; they take under 0.1 s
SLICE, SAMPLE = 1 << 13, 1 << 11         # characters; bounds the list of pieces
MAX_SAMPLE = 65536                       # characters; bounds the memory of a stream


# ---- 15.3 a piece ----------------------------------------------------------

@lru_cache(maxsize=1)
def piece_pattern() -> Pattern[str]:
    """The pattern of one piece.  Compiled when first needed, because it delays the start by 9 ms.

    Every repeat is bounded, so that any text takes linear time and gives short pieces.
    """
    return re.compile(
        rf"[^\r\na-zA-Z0-9{LETTERS}]?(?:[A-Z{LETTERS}]{{0,24}}[a-z{LETTERS}]{{1,24}}"
        rf"|[A-Z{LETTERS}]{{1,24}})(?:'(?:[stmdSTMD]|re|ve|ll))?"
        rf"|[0-9]{{1,3}}| ?[^\sa-zA-Z0-9{LETTERS}]{{1,16}}[\r\n/]{{0,8}}"
        r"|\s{0,64}[\r\n]{1,32}|\s{1,64}(?!\S)|\s{1,64}")


# Letters and marks outside ASCII by Unicode block, since `re` has no \p{L}.  They stand among the
# capitals and among the small letters alike: only ASCII words are cut at camelCase.
LETTERS = (
    r"\u00aa\u00b5\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u1fff\u2c00-\u2dff\u3005-\u3007"
    r"\u3031-\u318f\u31a0-\u31ff\u3400-\ud7ff\uf900-\ufdff\ufe70-\ufefc\uff21-\uff3a"
    r"\uff41-\uff5a\uff66-\uffdc\U00020000-\U0003ffff")


# Texts repeat their words: 65,536 pieces cover most of them and take some ten megabytes.
@lru_cache(maxsize=1 << 16)
def piece_cost(piece: str) -> float:
    """Tokens that one piece costs on average, at least a half."""
    lead, letters = ("", piece) if piece[0].isalpha() else (piece[0], piece[1:])
    if not letters[:1].isalpha():
        return 1.0 if piece.isspace() or "0" <= piece[0] <= "9" else punctuation_cost(piece)
    top = "z" if letters.isascii() else max(letters)
    if top < "\u0250" or "\u1e00" <= top < "\u1f00":
        cost = latin_cost(letters, top)
        if lead and lead != " ":
            cost += JOINER_COST if lead in "_.-/(\t" else LEAD_COST
    else:
        is_cjk = "\u3005" <= top < "\ud7b0"
        cost = cjk_cost(lead, letters) if is_cjk else alphabet_cost(lead, letters, top)
        cost += FOREIGN_LEAD_COST if lead and lead != " " else 0.0
    return max(0.5, cost)


# A sign that the pattern glues to the front of a word: joiners often merge, others seldom.
JOINER_COST, LEAD_COST, FOREIGN_LEAD_COST = 0.17, 0.89, 0.33


# ---- 15.4 Latin letters ----------------------------------------------------

def latin_cost(letters: str, top: str) -> float:
    """The cost of a word in Latin letters; `top` is its highest letter, "z" for plain ASCII.

    A word is one token, plus the costs of its length, capitals, accents and pairs of neighbours.
    """
    size = len(letters)
    if size < 3 and top == "z":
        return 1.0
    small = letters.lower()
    if letters.isupper():
        cost = 1.0 + CAPITALS_COST + CAPITAL_COST * (size - 2)
        return cost + ACCENT_COSTS[1] * sum(letter > "\x7f" for letter in letters)
    cost = 1.0 + LETTER_COST * (size - 2)
    cost += sum(PAIR_COSTS.get(pair, 0.0) for pair in zip(small, small[1:]))
    if small[1:] != letters[1:]:
        cost += CAMEL_COST
    for letter in small if top != "z" else "":
        if letter > "\x7f":
            cost += ACCENT_COSTS[(letter >= "\u0100") + (letter >= "\u1ea0")]
    return cost


LETTER_COST, CAMEL_COST = 0.31, 0.75     # each after the second; inner capitals
CAPITALS_COST, CAPITAL_COST = 0.13, 0.13     # all capitals: word, each after the second
ACCENT_COSTS = (0.05, 0.49, -0.28)       # Latin-1, Latin Extended, Vietnamese
# Pairs of neighbours that are common in English and code merge into a token, others break one.  A
# row for the first letter, a to z; a column for the second; a digit counts steps of 0.15 from 4.
PAIR_ROWS = (
    "40108301531211930210632302 49952996303267266131269949 38342042462164296260488953 "
    "46743986669646397665473430 43223134675332430322431035 29644359397323269264289607 "
    "69732984690836495155479768 41692998392412305171699577 42102100904121023111910610 "
    "62622759490990476734582596 86673702595697844945699886 49923251445365426544268539 "
    "43952249595635314939596934 45124410613324556422656976 55312116262341209213252218 "
    "49424276698129227134398657 99998657676698766896387777 46223217573630480233505918 "
    "69392424595976421833484449 49533892490559437247590003 31210023537022817011617152 "
    "46692715566429478299196894 37752966357690285029963632 47166675546829836942964645 "
    "39485859783328317823059585 69072745942332666598692509")
PAIR_COSTS = {
    (chr(97 + row), chr(97 + column)): (int(digit) - 4) * 0.15
    for row, digits in enumerate(PAIR_ROWS.split()) for column, digit in enumerate(digits)}


# ---- 15.5 other scripts and signs ------------------------------------------

def alphabet_cost(lead: str, letters: str, top: str) -> float:
    """The cost of a word in another alphabet, which its highest letter tells."""
    last, unspaced, spaced, each = next(row for row in ALPHABETS if top <= row[0])
    cost = (spaced if lead == " " else unspaced) + each * len(letters)
    if last == CYRILLIC:
        if len(letters) < 3:
            return 1.0
        cost += CYRILLIC_CAPITAL_COST if letters[0].isupper() else 0.0
        cost += NOT_RUSSIAN_COST * sum(letter in NOT_RUSSIAN for letter in letters)
        cost += RUSSIAN_COST * sum(letter in RUSSIAN for letter in letters)
    return cost


CYRILLIC = "\u052f"
# Last code point; cost of a word, of a word behind a blank, of a letter.
ALPHABETS = (
    ("\u03ff", 1.96, 0.97, 0.22),        # Greek
    (CYRILLIC, 1.15, 0.41, 0.26),
    ("\u05ff", 0.80, 0.40, 0.34),        # Hebrew
    ("\u08ff", 0.45, 0.26, 0.30),        # Arabic
    ("\u097f", 1.42, -0.02, 0.36),       # Devanagari
    ("\u0dff", 0.95, -0.12, 0.40),       # other Indian scripts
    ("\u0e7f", -0.33, -0.04, 0.42),      # Thai
    ("\U0010ffff", 0.20, 0.05, 0.87))    # anything else
# Russian words are longer tokens than those of its neighbours.  A capital at the start; each
# letter that Russian has not; each letter that is commoner there than in its neighbours.
CYRILLIC_CAPITAL_COST, NOT_RUSSIAN_COST, RUSSIAN_COST = 1.06, 1.09, -0.55
NOT_RUSSIAN, RUSSIAN = frozenset("іїєґІЇЄјљњћђџЈЉЊЋЂЏў"), frozenset("йцчшщъыьэюяфхж")


def cjk_cost(lead: str, letters: str) -> float:
    """The cost of a run of Chinese, Japanese or Korean."""
    kana = han = 0
    cost = CJK_COST
    for sign in letters:
        if "\u3400" <= sign < "\ua000":
            han += 1
            cost += HAN_SIGN_COSTS.get(sign, 0.0)
        elif sign < "\u3100":
            kana += sign >= "\u3040"
    cost += KANA_COST * kana + (KANJI_COST if kana else HAN_COST) * han
    cost += HANGUL_COST * (len(letters) - kana - han)
    if letters[0] >= "\uac00":
        cost += HANGUL_SPACED_COST if lead == " " else HANGUL_RUN_COST
    return cost


# The cost of a run, and of each sign.  A Han sign costs more beside kana.
CJK_COST, KANA_COST, HAN_COST, KANJI_COST = 0.36, 0.58, 0.95, 1.16
HANGUL_COST, HANGUL_RUN_COST, HANGUL_SPACED_COST = 0.52, -0.12, 0.29
# The vocabulary has many words of simplified Chinese and few of traditional.  The commonest signs
# that differ tell the two apart: each stands for its neighbours, hence the large costs.  The third
# row has signs that are common in words of two signs, which are one token.
HAN_SIGNS = (
    (-0.62, "个这国为会对来们时后于与么发动没说学数选过还开现关当进将图内点经体间里业实机从应区长"),
    (0.77, "個這國爲會對來們時後於與麼發動沒說學數選過還開現關當進將圖內點經體間裏業實機從應區長"),
    (-0.67, "一不国个以可有用人文如是中能自这果么作们我定使方生件要公其表成现工为关动政他合提所字"))
HAN_SIGN_COSTS = {sign: sum(cost for cost, signs in HAN_SIGNS if sign in signs)
                  for sign in "".join(signs for _, signs in HAN_SIGNS)}


def punctuation_cost(piece: str) -> float:
    """The cost of a run of signs; up to two ASCII signs are one token."""
    signs = piece.rstrip("\r\n/") or piece[:1]
    size, kinds = len(signs), len(set(signs))
    if signs.isascii():
        run, each, kind = ASCII_SIGNS_COST
        return 1.0 if size < 3 else max(1.0, run + each * size + kind * kinds)
    run, each, kind = SYMBOLS_COST
    wide = sum(sign > "\x7f" for sign in signs)
    cost = run + each * wide + kind * kinds + SYMBOL_ASCII_COST * (size - wide)
    return max(1.0, cost + EMOJI_COST * sum(sign > "\uffff" for sign in signs))


# The cost of a run, of each sign, of each different sign.  In a run with other signs an ASCII sign
# has its own cost; a sign beyond the first plane adds one.
ASCII_SIGNS_COST, SYMBOLS_COST = (-0.14, 0.05, 0.48), (-0.37, 0.28, 0.88)
SYMBOL_ASCII_COST, EMOJI_COST = -0.11, 0.80


# ============================================================================
# 16. APIS
# ============================================================================
#
# The two doors of Part I: `translation_of` for the way there, StreamTranslator for
# the way back.

# ---- 16.1 the table and the door -------------------------------------------

class Api(NamedTuple):
    """One way to call an upstream: all that differs between two APIs is a member of its row."""
    name: str
    path: str                            # below the base URL
    write: Callable[[Conversation, Target], Json]                      # the body
    reader: Type[Reader]                 # the upstream's chunks -> calls on BlockMachine
    prompt_texts: Callable[[Json], Iterator[PromptItem]]               # for the token estimate


APIS = {"chat": Api("chat", "/chat/completions", chat_body, ChatReader, chat_prompt_texts)}


def translation_of(params: Json, target: Target, session_id: str,
                   is_counting: bool) -> Translation:
    """The Translation of params that have passed check_fields.  Raises ProxyError(400)."""
    conversation = conversation_of(params, session_id, is_counting)
    api, room = APIS[target.api], CarrierRoom()
    return Translation(
        requested_model=params["model"], target=target,
        profile=model_profile(target.model, target.host_class),
        body=api.write(conversation, target), is_streamed=conversation.is_streamed,
        thinking=conversation.display,
        tool_names={conversation.upstream_name(tool.name): tool.name
                    for tool in conversation.tools},
        history_call_ids=conversation.call_ids.union(
            decoded_id(call_id, room)[0] for call_id in conversation.call_ids),
        stop_sequences=conversation.stop_sequences, prefill=prefill_text(conversation.turns),
        is_single_call=conversation.choice is not None and conversation.choice.is_single,
        is_empty=conversation.max_tokens == 0, dropped_fields=conversation.dropped_fields,
        estimate_tokens=lambda body, count=item_tokens: estimated_prompt_tokens(
            api.prompt_texts(body), count))


# ---- 16.2 the way back -----------------------------------------------------

class StreamTranslator:
    """Turns the bytes of an upstream's answer into the bytes of events, or into one message.

    It puts decoder, reader, machine and writer together.  feed() takes the bytes of one read, cut
    anywhere, and finish() the end of the body; whole() takes an answer in plain JSON.  Each returns
    the bytes for the client; a MessageWriter gives none and has the message in the end.

    An error is raised as ProxyError while it can be an HTTP status: before the first event, when
    `started` is False, and always for a message.  Later it is an `error` event, the last one.
    `machine` and `reader` tell how far the answer is.
    """

    def __init__(self, translation: Translation, new_id: NewId, writer: Writer,
                 shortcuts: Shortcuts = PLAIN) -> None:
        self.error: Optional[ProxyError] = None
        self._translation, self._writer = translation, writer
        self._decoder, self._meter = SSEDecoder(), OutputMeter()
        self.machine = BlockMachine(translation, new_id, writer)
        self.reader = APIS[translation.target.api].reader(translation, self.machine, self._meter)
        self._pattern = shortcuts.chunk_pattern and shortcuts.chunk_pattern(
            self._decoder, self.reader, self.machine, self._meter, writer)

    @property
    def started(self) -> bool:
        """Whether the message has begun."""
        return self.machine.has_begun

    @property
    def done(self) -> bool:
        """Whether nothing follows, after the end or after an error."""
        return self.machine.has_ended or self.error is not None

    def feed(self, data: bytes) -> bytes:
        """Translates the next bytes of an event stream."""
        try:
            lines = self._decoder.lines(data)
            if self._pattern is not None:
                self._pattern.feed(lines, self._read_lines)
            else:
                self._read_lines(lines)
        except ProxyError as error:
            self._fail(error)
        return self._writer.taken()

    def finish(self) -> bytes:
        """Takes the end of the event stream, whether that is the end of the answer or not."""
        try:
            for data in self._decoder.finish():
                self._read_event(data)
            if not self.reader.has_finished and not self.done:
                raise UpstreamError(502, CUT_ANSWER if self.started else EMPTY_ANSWER)
            if not self.done:
                self.reader.end()
        except ProxyError as error:
            self._fail(error)
        return self._writer.taken()

    def whole(self, body: bytes) -> bytes:
        """Translates an answer in plain JSON: it is read as a stream of one chunk."""
        self.machine.is_whole = True
        try:
            value = whole_value(body, self._translation)
            self.reader.read(
                self._answer_object(value, "The upstream's answer is not a JSON object"))
            self.reader.end()
        except ProxyError as error:
            self._fail(error)
        return self._writer.taken()

    def empty(self) -> bytes:
        """The answer without content: max_tokens is 0, or too small for a first token."""
        usage = anthropic_usage({"completion_tokens": 0}, None, self._translation, self._meter)
        self.machine.end(Ending("max_tokens"), usage)
        return self._writer.taken()

    def fail(self, error: ProxyError) -> bytes:
        """Takes an error from outside: a lost connection, a timeout, the shutdown.  A connection
        that breaks after the finish reason has lost nothing: the answer is complete."""
        if isinstance(error, ConnectionLost) and self.reader.has_finished:
            return self.finish()
        self._fail(error)
        return self._writer.taken()

    def begin(self) -> bytes:
        """message_start, unless it was sent: for an upstream that still thinks."""
        self.machine.begin()
        return self._writer.taken()

    def ping(self) -> bytes:
        """An event that keeps the client waiting, while the upstream sends none."""
        if self.started and not self.done and isinstance(self._writer, EventWriter):
            is_omitted = self._translation.thinking is ThinkingDisplay.OMITTED
            block = self.machine.open_block
            self._writer.ping(is_hidden_block=is_omitted and isinstance(block, PendingThinking))
        return self._writer.taken()

    def _read_lines(self, lines: str) -> None:
        for data in self._decoder.events(lines):
            self._read_event(data)

    def _read_event(self, data: str) -> None:
        """Reads the data of one event: a chunk, an error, or [DONE]."""
        if self.machine.has_ended or not data:
            return
        if data.strip() == "[DONE]":
            if self.reader.is_empty:
                raise UpstreamError(502, EMPTY_ANSWER)
            self.reader.end()
            return
        try:
            value = upstream_json(data)
        except (ValueError, RecursionError):
            value = None
        if isinstance(data, ErrorData):
            raise error_from_object(value, self._translation) if is_object(value) else \
                UpstreamError(500, redacted(data, self._translation.secrets))
        chunk = self._answer_object(value, "The upstream sent a chunk that is not JSON")
        self.machine.begin()
        self.reader.read(chunk)

    def _answer_object(self, value: Any, problem: str) -> Json:
        """A chunk or a whole answer.  Raises the error that it is, or `problem` for no object."""
        if isinstance(value, list) and value and is_object(value[0]) and is_error_object(value[0]):
            value = value[0]
        if not is_object(value):
            raise UpstreamError(502, problem)
        if is_error_object(value):
            raise error_from_object(value, self._translation)
        return value

    def _fail(self, error: ProxyError) -> None:
        """Raises an error, or writes it as the last event.  After the end it has no effect."""
        if self.done:
            return
        self.error = error
        if not self.started or not isinstance(self._writer, EventWriter):
            raise error
        self._writer.error(error)


def whole_value(body: bytes, translation: Translation) -> Any:
    """The value of an answer in plain JSON.  Raises UpstreamError that names a page of HTML."""
    try:
        return upstream_json(body.decode("utf-8", "replace").lstrip("\ufeff").strip())
    except (ValueError, RecursionError):
        page = ""
        if body.lstrip()[:1] == b"<":
            page = ": " + redacted(response_summary(200, body), translation.secrets)
        raise UpstreamError(502, "The upstream's answer is not JSON" + page) from None


EMPTY_ANSWER = "The upstream's answer is empty"
CUT_ANSWER = "The upstream closed the connection before the end of the answer"


# ############################################################################
# PART II. THE WIRE: bytes and connections; waiting starts in section 18
# ############################################################################

# ============================================================================
# 17. HTTP/1.1
# ============================================================================
#
# Heads are pure functions of bytes, bodies are small objects with feed(); no socket is touched.
# Parsing is strict wherever two parsers could disagree about the end of a message, because requests
# are smuggled through such gaps.  An upstream is trusted more than a client, so its head may have
# the faults that real servers make.  [RFC 9110] [RFC 9112]

# ---- 17.1 heads ------------------------------------------------------------

Headers = Dict[str, str]                 # lower-case names; repeated ones joined by ", "


class Request(NamedTuple):
    """The head of a client's request."""
    method: str
    path: str                            # without the query, still percent-encoded
    query: str
    headers: Headers
    is_http11: bool
    authority: str                       # host and port that the client means

    def keeps_alive(self) -> bool:
        """Whether the client expects the connection to stay open.  [RFC 9112 9.3]"""
        options = connection_options(self.headers)
        return "close" not in options if self.is_http11 else "keep-alive" in options


class Response(NamedTuple):
    """A whole response to a client, its body included."""
    status: int
    body: bytes
    content_type: str = "application/json"
    headers: Headers = {}


class ResponseHead(NamedTuple):
    """The head of an upstream's response."""
    status: int
    headers: Headers
    is_http11: bool


def parse_request_head(head: bytes) -> Request:
    """The Request in a head without its empty line.  Raises ProtocolError.  [RFC 9112 3]"""
    line, _, block = head.partition(b"\r\n")
    match = REQUEST_LINE.fullmatch(line)
    if match is None:
        raise ProtocolError(400, "The request line is malformed")
    method, target, major, minor = match.groups()
    if major != b"1":
        raise ProtocolError(505, "Only HTTP/1.1 and HTTP/1.0 are spoken here")
    headers = parse_headers(block, ("host", "content-length"))
    is_http11 = minor != b"0"
    check_framing(headers, is_http11)
    path, authority = target.decode("ascii"), headers.get("host", "")
    if HOST.fullmatch(authority) is None and (is_http11 or authority):
        raise ProtocolError(400, "The Host header is missing or malformed")
    absolute = re.match(r"https?://([^/?#]*)", path, re.I)
    if absolute:
        path, authority = path[absolute.end():] or "/", absolute[1]
    if not path.startswith("/") and not (path == "*" and method == b"OPTIONS"):
        raise ProtocolError(400, "The request target must be a path")
    path, _, query = path.partition("?")
    return Request(method.decode("ascii"), path, query, headers, is_http11, authority)


def parse_headers(block: bytes, single: Sequence[str] = ()) -> Headers:
    """The header fields of a head; one in `single` may stand there once.  Raises ProtocolError."""
    if HEADER_BLOCK.fullmatch(block) is None:
        raise ProtocolError(400, "A header line is malformed")
    headers: Headers = {}
    lines = block.decode("latin-1").split("\r\n") if block else []
    if len(lines) > MAX_HEADERS:
        raise ProtocolError(431, f"There are more than {MAX_HEADERS} header lines")
    for line in lines:
        name, _, value = line.partition(":")
        name, value = name.lower(), value.strip(" \t")
        if name in headers and name in single:
            raise ProtocolError(400, f"The {name} header is repeated")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers


def check_framing(headers: Headers, is_http11: bool) -> None:
    """Raises ProtocolError if parsers could disagree about the end of the body.  [RFC 9112 6.3]"""
    length, coding = headers.get("content-length"), headers.get("transfer-encoding")
    if coding is not None and length is not None:
        raise ProtocolError(400, "Content-Length and Transfer-Encoding exclude each other")
    if coding is not None and (coding.lower() != "chunked" or not is_http11):
        raise ProtocolError(400, "Transfer-Encoding must be exactly 'chunked', "
                            "and HTTP/1.1 be spoken")
    if length is not None and re.fullmatch(r"[0-9]{1,18}", length) is None:
        raise ProtocolError(400, "Content-Length must be a decimal number")


def parse_response_head(head: bytes) -> ResponseHead:
    """The head of an upstream's response.  Raises ProtocolError.  [RFC 9112 4]

    Some servers end lines with a bare LF or fold them; both are mended.  A Content-Length may be
    repeated, as long as all are equal.  [RFC 9112 2.2, 5.2, 6.3]
    """
    line, _, block = head.partition(b"\n")
    match = STATUS_LINE.fullmatch(line)
    if match is None:
        raise ProtocolError(502, "not HTTP/1.1")
    has_folds = b"\n " in block or b"\n\t" in block
    if has_folds or block[:1] in (b"\r", b"\n") or block.count(b"\n") != block.count(b"\r\n"):
        block = re.sub(rb"\r?\n[ \t]+", b" ", block.replace(b"\r\n", b"\n"))
        block = block.strip(b"\n").replace(b"\n", b"\r\n")
    headers = parse_headers(block)
    lengths = set(headers.get("content-length", "0").split(", "))
    if len(lengths) > 1 or re.fullmatch(r"[0-9]{1,18}", min(lengths)) is None:
        raise ProtocolError(502, "a malformed Content-Length")
    return ResponseHead(int(match[2]), headers, match[1] != b"0")


def connection_options(headers: Headers) -> List[str]:
    """The options of the Connection header.  [RFC 9110 7.6.1]"""
    return [option.strip() for option in headers.get("connection", "").lower().split(",")]


HTTP_TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")      # [RFC 9110 5.6.2]
STATUS_LINE = re.compile(rb"HTTP/1\.([0-9]) ([1-9][0-9][0-9])(?: [^\r\n]*)?\r?")
REQUEST_LINE = re.compile(rb"(%b) ([\x21-\x7e]+) HTTP/([0-9])\.([0-9])" % HTTP_TOKEN.pattern)
HEADER_LINE = rb"%b:[\t\x20-\x7e\x80-\xff]*" % HTTP_TOKEN.pattern
HEADER_BLOCK = re.compile(rb"(?:%b(?:\r\n%b)*)?" % (HEADER_LINE, HEADER_LINE))
HOST = re.compile(r"(?:[A-Za-z0-9._~%!$&'()*+,;=-]+|\[[0-9A-Fa-f:.]+(?:%[A-Za-z0-9._~-]+)?\])"
                  r"(?::[0-9]{0,5})?")
MAX_HEADERS = 128                        # lines; real clients send about 25
MAX_HEAD = 65536                         # bytes of a head
MAX_REQUEST_LINE = 8192                  # bytes, as nginx


def request_head_end(data: bytes, searched: int) -> int:
    """Where a request's head ends, empty line included; -1 if incomplete.  Raises ProtocolError.

    Empty lines before the request line must have been cut.  [RFC 9112 2.2]
    """
    end = data.find(b"\r\n\r\n", searched)
    if data and HTTP_TOKEN.match(data) is None:
        raise ProtocolError(400, "The request line is malformed: "
                            "is this TLS? http:// is spoken here")
    head = data if end < 0 else data[:end + 4]
    line_end = head.find(b"\r\n")
    if (line_end if line_end >= 0 else len(head)) > MAX_REQUEST_LINE:
        raise ProtocolError(414, f"The request line is longer than {MAX_REQUEST_LINE} bytes")
    if len(head) > MAX_HEAD:
        raise ProtocolError(431, f"The request head is longer than {MAX_HEAD} bytes")
    if head.count(b"\n") != head.count(b"\r\n"):
        raise ProtocolError(400, "A line of the head ends in a bare LF")
    if line_end >= 0 and searched == 0 and REQUEST_LINE.fullmatch(head[:line_end]) is None:
        raise ProtocolError(400, "The request line is malformed")
    return end + 4 if end >= 0 else -1


def response_head_end(data: bytes, searched: int) -> int:
    """The same for the head of an upstream's response, whose lines may end in a bare LF."""
    end = data.find(b"\r\n\r\n", searched)
    end = end + 4 if end >= 0 else data.find(b"\n\n", searched) + 2
    if (len(data) if end < 2 else end) > MAX_HEAD:
        raise ProtocolError(502, "a response head over 64 KiB")
    if not b"HTTP/1.".startswith(data[:7]):
        raise ProtocolError(502, "an answer that is not HTTP/1.1")
    return end if end >= 2 else -1


# ---- 17.2 bodies -----------------------------------------------------------
#
# Each body has feed(data), which gives the content in these bytes; `done`; `rest`, the bytes behind
# its end; and eof(), which raises ProtocolError if the connection ended before the body.

class LengthBody:
    """A body whose number of bytes is known."""

    def __init__(self, length: int) -> None:
        self.left, self.done, self.rest = length, not length, b""

    def feed(self, data: bytes) -> bytes:
        if len(data) > self.left:
            data, self.rest = data[:self.left], data[self.left:]
        self.left -= len(data)
        self.done = not self.left
        return data

    def eof(self) -> None:
        if self.left:
            raise ProtocolError(400, "The body ended early")


class ChunkedBody:
    """A body in chunks, fed at any cut.  [RFC 9112 7.1]

        SIZE --n--> DATA --CRLF--> SIZE ... SIZE --0--> TRAILER --empty line--> done
    """

    def __init__(self) -> None:
        self.done = False
        self.rest = b""
        self._partial = b""              # an incomplete line, or half of a CRLF
        self.left = 0                    # bytes of the current chunk still to come
        self._needs_crlf = False         # the current chunk's own CRLF is missing
        self._in_trailer = False
        self._overhead = 0               # bytes of extensions and trailers so far

    def feed(self, data: bytes) -> bytes:
        """The content in these bytes.  Raises ProtocolError."""
        if self._partial:
            data, self._partial = self._partial + data, b""
        out: List[bytes] = []
        place, size = 0, len(data)
        while place < size and not self.done:
            if self.left:
                piece = data[place:place + self.left]
                out.append(piece)
                place += len(piece)
                self.left -= len(piece)
                if not self.left:
                    self._needs_crlf = data[place:place + 2] != b"\r\n"
                    place += 0 if self._needs_crlf else 2
                continue
            end = data.find(b"\r\n", place)
            if end < 0:
                self._partial = data[place:]
                self._check_partial(self._partial)
                break
            self._take_line(data[place:end])
            place = end + 2
        if self.done:
            self.rest = data[place:]
        return out[0] if len(out) == 1 else b"".join(out)

    def eof(self) -> None:
        if not self.done:
            raise ProtocolError(400, "The chunked body ended early")

    def _take_line(self, line: bytes) -> None:
        """Reads a line that is not content.  Raises ProtocolError."""
        if self._needs_crlf:
            if line:
                raise ProtocolError(400, "A chunk is longer than its size says")
            self._needs_crlf = False
        elif self._in_trailer:
            if line and re.fullmatch(HEADER_LINE, line) is None:
                raise ProtocolError(400, "A trailer line is malformed")
            self.done = not line
            self._count_overhead(line)
        else:
            match = CHUNK_SIZE.fullmatch(line)
            if match is None:
                raise ProtocolError(400, "A chunk has a malformed size")
            self._count_overhead(match[2] or b"")
            self.left = int(match[1], 16)
            self._in_trailer = not self.left

    def _count_overhead(self, line: bytes) -> None:
        self._overhead += len(line)
        if self._overhead > MAX_HEAD:
            raise ProtocolError(400, "Too many bytes of chunk extensions and trailers")

    def _check_partial(self, start: bytes) -> None:
        """Raises ProtocolError for the start of a line that no further bytes can make valid."""
        if self._needs_crlf:
            if start != b"\r":
                raise ProtocolError(400, "A chunk is longer than its size says")
        elif b"\n" in start or len(start) > MAX_HEAD \
                or not self._in_trailer and CHUNK_SIZE_START.match(start) is None:
            raise ProtocolError(400, "A chunk has a malformed size")


CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(;[\t\x20-\x7e\x80-\xff]*)?")
CHUNK_SIZE_START = re.compile(rb"[0-9A-Fa-f]{1,15}[ \t]*(;|\r?$)|[0-9A-Fa-f]{0,15}$")


class UntilCloseBody:
    """A body that ends with its connection.  [RFC 9112 6.3 rule 8]"""

    done, left, rest = False, 0, b""

    def feed(self, data: bytes) -> bytes:
        return data

    def eof(self) -> None:
        self.done = True


Body = Union[LengthBody, ChunkedBody, UntilCloseBody]


def request_body(headers: Headers) -> Body:
    """How a client's request is framed.  check_framing() has accepted the headers."""
    if "transfer-encoding" in headers:
        return ChunkedBody()
    return LengthBody(int(headers.get("content-length", 0)))


def response_body(status: int, headers: Headers) -> Body:
    """How an upstream's response is framed.  Raises ProtocolError.  [RFC 9112 6.3]"""
    if status in (204, 304):
        return LengthBody(0)
    coding = headers.get("transfer-encoding", "").lower()
    if coding and coding != "identity":
        if coding.split(",")[-1].strip() != "chunked" or coding.count("chunked") > 1:
            raise ProtocolError(502, "a Transfer-Encoding that is not chunked")
        return ChunkedBody()
    if "content-length" in headers:
        return LengthBody(int(headers["content-length"].split(",")[0]))
    return UntilCloseBody()


# ---- 17.3 content codings --------------------------------------------------

class Inflater:
    """Unpacks gzip or deflate in bounded pieces, so that a small read cannot fill the memory."""

    def __init__(self, coding: str) -> None:
        self._engine = zlib.decompressobj(47 if "gzip" in coding else 15)
        self._may_be_raw = "gzip" not in coding

    def feed(self, data: bytes) -> bytes:
        """At most INFLATED_PIECE bytes; feed b"" again while `has_more`.  Raises zlib.error."""
        data = self._engine.unconsumed_tail + data
        try:
            piece = self._engine.decompress(data, INFLATED_PIECE)
        except zlib.error:
            if not self._may_be_raw:
                raise
            # Many servers send deflate without its zlib wrapper.  [RFC 9110 8.4.1.2]
            self._engine = zlib.decompressobj(-15)
            piece = self._engine.decompress(data, INFLATED_PIECE)
        self._may_be_raw = self._may_be_raw and not piece
        return piece

    @property
    def has_more(self) -> bool:
        return bool(self._engine.unconsumed_tail)


INFLATED_PIECE = 262144                  # bytes: the most that one read can become


# ---- 17.4 writing ----------------------------------------------------------

def encoded_head(start_line: str, headers: Iterable[Tuple[str, str]]) -> bytes:
    """A head with its empty line; a character outside latin-1 becomes a question mark."""
    lines = [f"{name}: {value}\r\n" for name, value in headers]
    return f"{start_line}\r\n{''.join(lines)}\r\n".encode("latin-1", "replace")


def encoded_chunk(data: bytes) -> bytes:
    """Data as one chunk; it must not be empty, since an empty chunk ends the body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


LAST_CHUNK = b"0\r\n\r\n"


def reason_phrase(status: int) -> str:
    """The words behind a status; 529 is Anthropic's own."""
    return REASON_PHRASES.get(status, "Overloaded" if status == 529 else "Unknown")


# ============================================================================
# 18. BYTE STREAMS
# ============================================================================
#
# asyncio.StreamReader and StreamWriter carry the bytes of both sides, through their public methods
# alone.  ConnectionProtocol adds the facts that they do not give: that the peer has disconnected or
# sent something while nobody reads, and how many bytes the reader holds.
#
#     socket -> ConnectionProtocol -> StreamReader -> read()     a task waits for the bytes
#                     |-----------------------------> pump()     a callback gets them at once
#
# A peer can vanish at every await: then read() returns b"" or raises OSError, and drain() raises
# OSError.

# ---- 18.1 streams ----------------------------------------------------------

class ByteStream:
    """One connection: reads with a deadline and push-back, writes with a bounded buffer.

    Only one task may read, and only one may drain.
    """

    def __init__(self, protocol: ConnectionProtocol, transport: Any) -> None:
        self._loop = asyncio.get_running_loop()
        self._protocol = protocol
        self.transport = transport
        transport.set_write_buffer_limits(high=WRITE_BUFFER)
        # Without the reader: drain() would raise the reader's ReadTimeout.
        self._writer = asyncio.StreamWriter(transport, protocol, None, self._loop)
        self._unread = b""
        self._deadline: Optional[float] = None
        self._timer: Optional[asyncio.TimerHandle] = None

    # One timer serves all reads of a connection, and a later deadline does not touch it: it looks
    # at the deadline when it fires.  asyncio.wait_for around each read takes 4 µs on Python 3.13
    # and 12 to 18 µs before, more than the translation of a chunk.

    def set_deadline(self, deadline: float) -> None:
        """From now on a read that waits until this time of the loop's clock raises ReadTimeout."""
        self._deadline = deadline
        if self._timer is None or self._timer.when() > deadline + 0.001:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_at(deadline, self._check_deadline)

    def clear_deadline(self) -> None:
        """A read may wait forever."""
        self._deadline = None

    def _check_deadline(self) -> None:
        self._timer = None
        if self._deadline is None:
            return
        if self._loop.time() >= self._deadline - 0.001:
            self._protocol.reader.set_exception(ReadTimeout())
            self._protocol.end_pump()
        else:
            self._timer = self._loop.call_at(self._deadline, self._check_deadline)

    def now(self) -> float:
        """The loop's clock, in seconds."""
        return self._loop.time()

    # ---- reading

    async def read(self) -> bytes:
        """The bytes that have arrived, or the next ones; b"" at the end.

        Raises ReadTimeout, OSError.  A cancelled read takes no bytes.
        """
        if self._unread:
            return self.take_unread()
        protocol = self._protocol
        data = await protocol.reader.read(READ_SIZE)
        protocol.buffered -= len(data)
        if not data and protocol.connection_error is not None:
            raise ConnectionResetError("the connection was reset")
        return data

    def unread(self, data: bytes) -> None:
        """Gives bytes back: they are read next."""
        self._unread = data + self._unread

    def take_unread(self) -> bytes:
        """The bytes that were given back, without waiting."""
        data, self._unread = self._unread, b""
        return data

    @property
    def has_unread(self) -> bool:
        return bool(self._unread)

    @property
    def has_buffered(self) -> bool:
        """Whether bytes have arrived that nobody has read."""
        return bool(self._unread) or self._protocol.buffered > 0

    async def head(self, end: Callable[[bytes, int], int],
                   start: bytes = b"") -> Tuple[bytes, bytes]:
        """(a head, the bytes behind it); `end` gives the end of the head, or -1, or raises.

        Raises EOFError if the connection ends before.
        """
        data, searched = start, 0
        while True:
            place = end(data, searched)
            if place >= 0:
                return data[:place], data[place:]
            searched = max(0, len(data) - 3)
            more = await self.read()
            if not more:
                raise EOFError
            data += more

    async def pump(self, take: Callable[[bytes, float], bool], seconds: float) -> None:
        """Calls `take` with bytes and the loop's time, as they arrive, until it returns True.

        Each piece has `seconds` to arrive.  Returns as well if a read() has something to tell:
        buffered bytes, the end of the connection, a timeout.  No task has to wake up for each
        piece: 500 slow streams take 18 % less CPU time (bench S5, November 2026).
        """
        def take_in_time(data: bytes) -> bool:
            now = self._loop.time()
            self._deadline = now + seconds
            return take(data, now)

        if self.has_buffered or self.has_ended():
            return
        self.set_deadline(self._loop.time() + seconds)
        try:
            await self._protocol.pump(take_in_time)
        finally:
            self.clear_deadline()

    # ---- writing

    def write(self, data: bytes) -> None:
        """Sends at once what the socket takes, and buffers the rest; nothing if it is closed."""
        if not self.is_closed():
            self._writer.write(data)

    async def drain(self) -> None:
        """Waits while more than WRITE_BUFFER bytes are unsent.  Raises OSError if it is closed."""
        if self.is_closed():
            raise ConnectionResetError("the connection is closed")
        await self._writer.drain()

    @property
    def unsent_bytes(self) -> int:
        """Bytes that the socket has not taken yet."""
        return self.transport.get_write_buffer_size()

    # ---- the ends of a connection

    def watch(self, on_disconnect: Callable[[], Any]) -> None:
        """Calls back when the peer disconnects.

        A paused transport would not see that.  So bytes that the peer sends meanwhile are bounded:
        over MAX_READ_AHEAD they are dropped; `exceeded_read_ahead` tells that the stream has a gap.
        """
        self._protocol.on_disconnect = on_disconnect
        if self._protocol.buffered > MAX_READ_AHEAD:
            self._protocol.exceeded_read_ahead = True
            self.transport.resume_reading()

    def watch_idle(self, on_activity: Callable[[], Any]) -> None:
        """Calls back when the peer sends anything or disconnects; nothing is expected of it."""
        self._protocol.on_activity = on_activity

    def unwatch(self) -> None:
        self._protocol.on_disconnect = self._protocol.on_activity = None

    @property
    def exceeded_read_ahead(self) -> bool:
        return self._protocol.exceeded_read_ahead

    def is_closed(self) -> bool:
        """Whether the connection is lost or this side has closed it."""
        # A TLS transport of Python 3.9 does not count a lost connection as closing.
        return self._protocol.is_lost or self.transport.is_closing()

    def has_ended(self) -> bool:
        """Whether no more bytes will be read."""
        return self.is_closed() or self._protocol.reader.at_eof()

    def end_writing(self) -> None:
        """Half-closes: the peer sees the end and can still be read from.  Not possible with TLS."""
        if self.transport.can_write_eof() and not self.is_closed():
            self.transport.write_eof()

    def abort(self) -> None:
        """Closes now; unsent bytes are lost."""
        self._stop_watching()
        self.transport.abort()

    def close(self) -> None:
        """Closes when the peer has taken the unsent bytes."""
        self._stop_watching()
        self.transport.close()

    def _stop_watching(self) -> None:
        self.unwatch()
        self._deadline = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


WRITE_BUFFER = 65536                     # unsent bytes; above it drain() waits


# ---- 18.2 connections ------------------------------------------------------

class ReadTimeout(Exception):
    """A read waited until its deadline."""


class ConnectionProtocol(asyncio.StreamReaderProtocol):
    """Fills the reader of one connection, and tells its ByteStream at once what happens on it.

    `on_connection` is called with this protocol and the transport when the connection is made.
    """

    def __init__(self, on_connection: Optional[Callable[[ConnectionProtocol, Any], None]] = None
                 ) -> None:
        loop = asyncio.get_running_loop()
        self.reader = asyncio.StreamReader(READ_SIZE, loop)
        super().__init__(self.reader, loop=loop)
        self.buffered = 0                # bytes that the reader holds
        self.on_disconnect: Optional[Callable[[], Any]] = None
        self.on_activity: Optional[Callable[[], Any]] = None
        self.exceeded_read_ahead = False
        self.connection_error: Optional[Exception] = None
        self.is_lost = False
        self._on_connection = on_connection
        self._take: Optional[Callable[[bytes], bool]] = None
        self._pump_end: Optional[asyncio.Future] = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if self._on_connection is not None:
            self._on_connection(self, transport)

    def data_received(self, data: bytes) -> None:
        while self._take is not None and data:           # in the pieces that a read() would give
            self._deliver(self._take, data[:READ_SIZE])
            data = data[READ_SIZE:]
        if not data:
            return
        if self.on_activity is not None:
            self.on_activity()
        elif self.on_disconnect is not None and self.buffered + len(data) > MAX_READ_AHEAD:
            self.exceeded_read_ahead = True
        else:
            self.buffered += len(data)
            super().data_received(data)

    def eof_received(self) -> Optional[bool]:
        keeps_open = super().eof_received()
        self._tell_of_end()
        return keeps_open

    def connection_lost(self, exc: Optional[Exception]) -> None:
        # The reader gets an end, not the exception, which would hide the bytes that it still holds.
        self.connection_error = exc
        self.is_lost = True
        super().connection_lost(None)
        self._tell_of_end()

    def _tell_of_end(self) -> None:
        self.end_pump()
        for callback in (self.on_disconnect, self.on_activity):
            if callback is not None:
                callback()

    async def pump(self, take: Callable[[bytes], bool]) -> None:
        """Gives arriving bytes to `take` until it returns True or end_pump() is called.

        Raises what `take` raises: asyncio would log it and abort the connection.
        """
        self._take = take
        self._pump_end = asyncio.get_running_loop().create_future()
        try:
            await self._pump_end
        finally:
            self._take = self._pump_end = None

    def _deliver(self, take: Callable[[bytes], bool], data: bytes) -> None:
        try:
            if take(data):
                self.end_pump()
        except Exception as error:
            self.end_pump(error)

    def end_pump(self, error: Optional[Exception] = None) -> None:
        """From now on arriving bytes go to the reader."""
        self._take = None
        if self._pump_end is not None and not self._pump_end.done():
            if error is None:
                self._pump_end.set_result(None)
            else:
                self._pump_end.set_exception(error)


READ_SIZE = 65536                        # bytes of one read
MAX_READ_AHEAD = 65536                   # bytes that a watched peer may send


# ============================================================================
# 19. UPSTREAM CLIENT
# ============================================================================
#
# Requests to one upstream over pooled connections.
#
#     NEW --request--> ACTIVE --whole response read--> IDLE --request--> ACTIVE
#      any fault, 60 s without a request, bytes or an end while IDLE --> CLOSED
#
# An upstream may close an idle connection just when a request is sent on it.  So a request that
# fails on a reused connection before the first byte of a response is sent once more on a new one;
# nothing else is repeated here.  [RFC 9112 9.3.1] [RFC 9110 9.2.2]

# ---- 19.1 client and response ----------------------------------------------

class Upstream:
    """The client of one upstream: its pool of connections, its TLS, its outgoing proxy."""

    def __init__(self, url: SplitResult, connect_limit: TimeLimit, *,
                 headers: Sequence[Tuple[str, str]] = (), tls: Optional[ssl.SSLContext] = None,
                 proxy: Optional[SplitResult] = None,
                 on_connection: Callable[[bool], Any] = bool) -> None:
        """`url` has the scheme, host, path and query that all requests share.

        `connect_limit` bounds each attempt to connect, beside CONNECT_TIME.  `headers` are sent
        with each request, in place of ours of the same name.  `tls` is for https alone.
        `on_connection` is called for each connection that is used: with True for a reused one.
        """
        if (url.scheme == "https") != (tls is not None):
            raise ValueError("tls belongs to https, and to nothing else")
        self.host = url.hostname or ""
        self.port = url.port or (443 if tls else 80)
        self.proxy = proxy
        # The newest attempts to connect: the loop's time, and whether they succeeded.
        self.attempts: Deque[Tuple[float, bool]] = deque(maxlen=3)
        self._url = url
        self._connect_limit = connect_limit
        self._headers = headers
        self._tls = tls
        self._on_connection = on_connection
        self._idle: List[Connection] = []            # the newest last
        self._reaper: Optional[asyncio.TimerHandle] = None
        self._loop = asyncio.get_running_loop()
        self._loop.set_default_executor(LOOKUPS)

    def __repr__(self) -> str:
        return f"<Upstream {self.host}:{self.port}, {len(self._idle)} idle>"

    @property
    def idle_count(self) -> int:
        return len(self._idle)

    async def send(self, method: str, path: str, body: bytes, key: str, is_streamed: bool,
                   timeout: TimeLimit) -> UpstreamResponse:
        """Sends one request and waits for the head of its response, which has `timeout` to arrive.

        Raises UpstreamError.
        """
        deadline = self._loop.time() + timeout.seconds
        request = self._request_head(method, path, key, is_streamed)
        request += b"\r\n" if method == "GET" else b"Content-Length: %d\r\n\r\n" % len(body)
        connection = self._take_idle() or await self._open_in_time(deadline)
        try:
            return await self._send_and_read_head(connection, request, body, deadline, timeout)
        except ConnectionLost as error:
            if not connection.is_reused or error.has_response:
                raise
        connection = await self._open_in_time(deadline)
        return await self._send_and_read_head(connection, request, body, deadline, timeout)

    def _request_head(self, method: str, path: str, key: str, is_streamed: bool) -> bytes:
        """The head of a request, without its length.  Nothing of the client's stands in it."""
        url = self._url
        target = f"{url.path}{path}" + (f"?{url.query}" if url.query else "")
        headers = {"Host": url.netloc, **({"Authorization": f"Bearer {key}"} if key else {}),
                   "Content-Type": "application/json",
                   "Accept": "text/event-stream" if is_streamed else "application/json",
                   "Accept-Encoding": "identity", "User-Agent": f"aiapiproxy/{__version__}"}
        if self.proxy is not None and self._tls is None:
            target = f"http://{url.netloc}{target}"              # [RFC 9112 3.2.2]
            if self.proxy.username:
                headers["Proxy-Authorization"] = basic_credentials(self.proxy)
        for name, value in self._headers:
            for other in [other for other in headers if other.lower() == name.lower()]:
                del headers[other]
            headers[name] = value
        return encoded_head(f"{method} {target} HTTP/1.1", headers.items())[:-2]

    # Requests and the heads of their responses

    async def _send_and_read_head(self, connection: Connection, request: bytes, body: bytes,
                                  deadline: float, timeout: TimeLimit) -> UpstreamResponse:
        """Sends a request on a connection, which is closed if that fails.  Raises UpstreamError."""
        stream = connection.stream
        has_response = False
        try:
            stream.set_deadline(deadline)
            if len(body) <= WRITE_PIECE:
                stream.write(request + body)
                start, is_sent = await stream.read(), True
            else:
                stream.write(request)
                start, is_sent = await write_large(stream, body)
            has_response = bool(start)
            head, start = await final_head(stream, start)
            stream.clear_deadline()
            if not is_sent:
                head = head._replace(is_http11=False)            # the connection can't be reused
            return UpstreamResponse(self, connection, head, start, timeout, deadline)
        except BaseException as error:
            stream.abort()
            raise wire_error(error, self.host, self.port, has_response, timeout) from None

    # The pool

    def _take_idle(self) -> Optional[Connection]:
        """The idle connection that was used last, which is the least likely to have been closed."""
        while self._idle:
            connection = self._idle.pop()
            connection.stream.unwatch()
            if connection.is_fresh() and not connection.stream.has_ended():
                connection.is_reused = True
                self._on_connection(True)
                return connection
            connection.stream.abort()
        return None

    def release(self, connection: Connection) -> None:
        """Takes back a connection whose response has been read to its end."""
        stream = connection.stream
        if stream.has_ended() or stream.has_buffered:
            stream.abort()
            return
        stream.clear_deadline()
        stream.watch_idle(lambda: self._discard_idle(connection))
        connection.idle_since = time.time()
        self._idle.append(connection)
        if self._reaper is None:
            self._reaper = self._loop.call_later(IDLE_TIME / 4, self._reap)

    def _discard_idle(self, connection: Connection) -> None:
        """Closes an idle connection on which something has happened."""
        if connection in self._idle:
            self._idle.remove(connection)
        connection.stream.abort()

    def _reap(self) -> None:
        """Closes the connections that have been idle for too long; the oldest stand first."""
        while self._idle and not self._idle[0].is_fresh():
            self._idle.pop(0).stream.abort()
        self._reaper = self._loop.call_later(IDLE_TIME / 4, self._reap) if self._idle else None

    def close(self) -> None:
        """Closes all idle connections; those in use end with their responses."""
        while self._idle:
            self._idle.pop().stream.abort()
        if self._reaper is not None:
            self._reaper.cancel()
            self._reaper = None

    # New connections

    async def _open_in_time(self, deadline: float) -> Connection:
        """A new connection, TLS and the outgoing proxy's tunnel included.  Raises UpstreamError."""
        limit = self._connect_limit
        seconds = min(deadline - self._loop.time(), CONNECT_TIME, limit.seconds)
        opening = asyncio.ensure_future(self._open())
        connection: Optional[Connection] = None
        failure = UpstreamError(504, f"The upstream did not answer within {seconds:.3g} s: "
                                f"no connection to {self.host}:{self.port} ({limit.setting})")
        try:
            # Not asyncio.wait_for: up to Python 3.11 it can swallow a cancellation.
            await asyncio.wait({opening}, timeout=max(seconds, 0.001))
            connection = opening.result() if opening.done() else None
        except (OSError, EOFError, ProtocolError) as error:
            failure = connect_error(error, self.host, self.port)
        finally:
            if connection is None:
                opening.cancel()
                opening.add_done_callback(abort_unused)
        self.attempts.append((self._loop.time(), connection is not None))
        if connection is None:
            raise failure
        self._on_connection(False)
        return connection

    async def _open(self) -> Connection:
        """A new connection, however long it takes.  Raises OSError, EOFError, ProtocolError."""
        if self.proxy is None:
            return await self._open_socket(self.host, self.port, self._tls)
        connection = await self._open_socket(self.proxy.hostname or "", self.proxy.port or 80, None)
        if self._tls is None:
            return connection
        try:
            return await self._open_tunnel(connection.stream)
        except BaseException:
            connection.stream.abort()
            raise

    async def _open_socket(self, host: str, port: int, tls: Optional[ssl.SSLContext]) -> Connection:
        options: Json = {"ssl": tls, "server_hostname": self.host} if tls else {}
        try:
            ipaddress.ip_address(host)
        except ValueError:
            options["happy_eyeballs_delay"] = 0.25       # seconds  [RFC 8305 5]
        transport, protocol = await self._loop.create_connection(
            ConnectionProtocol, host, port, **options)
        return Connection(ByteStream(protocol, transport))

    async def _open_tunnel(self, tunnel: ByteStream) -> Connection:
        """TLS through the outgoing proxy's CONNECT.  [RFC 9110 9.3.6]"""
        name = f"[{self.host}]" if ":" in self.host else self.host
        target = f"{name}:{self.port}"
        headers = [("Host", target)]
        if self.proxy is not None and self.proxy.username:
            headers.append(("Proxy-Authorization", basic_credentials(self.proxy)))
        tunnel.write(encoded_head(f"CONNECT {target} HTTP/1.1", headers))
        head, rest = await tunnel.head(response_head_end)
        status = parse_response_head(head[:-4]).status
        if not 200 <= status < 300 or rest:
            raise OSError(f"the outgoing proxy answered {status} to CONNECT")
        protocol = ConnectionProtocol()
        transport = await self._loop.start_tls(tunnel.transport, protocol, self._tls,
                                               server_hostname=self.host)
        protocol.connection_made(transport)
        return Connection(ByteStream(protocol, transport), tunnel)


@dataclass(eq=False, repr=False)
class Connection:
    """One connection to the upstream."""
    stream: ByteStream
    tunnel: Optional[ByteStream] = None      # under TLS: garbage collection would close it
    is_reused: bool = False
    idle_since: float = 0.0

    def is_fresh(self) -> bool:
        """Whether it has not been idle for too long.

        time.time() includes the time in which a laptop sleeps, unlike the loop's clock; it can also
        be set back.
        """
        return 0 <= time.time() - self.idle_since < IDLE_TIME


IDLE_TIME = 60.0                         # seconds; most servers and NATs keep longer
CONNECT_TIME = 30.0                      # seconds for TCP, tunnel and TLS
WRITE_PIECE = 262144                     # bytes of a large body at a time


def abort_unused(opening: asyncio.Future) -> None:
    """Closes a connection that was opened when nobody waited for it any more."""
    if not opening.cancelled() and opening.exception() is None:
        opening.result().stream.abort()


async def write_large(stream: ByteStream, body: bytes) -> Tuple[bytes, bool]:
    """Sends a large body in pieces, as fast as the upstream takes them.

    Returns (the first bytes of the response, whether the whole body was sent): an upstream may
    refuse a body before it has read it.
    """
    async def write_pieces() -> None:
        for place in range(0, len(body), WRITE_PIECE):
            stream.write(body[place:place + WRITE_PIECE])
            await stream.drain()

    reading, writing = asyncio.ensure_future(stream.read()), asyncio.ensure_future(write_pieces())
    try:
        await asyncio.wait({reading, writing}, return_when=asyncio.FIRST_COMPLETED)
        is_sent = writing.done() and writing.exception() is None
        return await reading, is_sent
    finally:
        reading.cancel()
        writing.cancel()
        await asyncio.gather(reading, writing, return_exceptions=True)


async def final_head(stream: ByteStream, start: bytes) -> Tuple[ResponseHead, bytes]:
    """(the head of a response, the bytes behind it); interim ones are skipped.  [RFC 9110 15.2]"""
    while True:
        data, start = await stream.head(response_head_end, start)
        head = parse_response_head(data.rstrip(b"\r\n"))
        if head.status >= 200:
            return head, start
        if head.status == 101:
            raise ProtocolError(502, "an upgrade that nobody asked for")


class UpstreamResponse:
    """The upstream's response: its head is here, its body is read by read()."""

    def __init__(self, upstream: Upstream, connection: Connection, head: ResponseHead, start: bytes,
                 timeout: TimeLimit, deadline: float) -> None:
        """`start` is the part of the body that arrived with the head.

        The body must be complete at `deadline`, a time of the loop's clock; with `is_live` each
        read may take `timeout` anew.
        """
        self.status, self.headers, is_http11 = head
        self.timeout = timeout
        self.is_live = False
        self.record: Optional[Callable[[bytes], None]] = None    # gets the body's bytes
        self._deadline = deadline
        self._upstream = upstream
        self._connection: Optional[Connection] = connection      # None once it was given back
        self._stream = connection.stream
        self._body = response_body(head.status, head.headers)
        self._start = start
        self._is_reusable = is_http11 and "close" not in connection_options(head.headers) \
            and not isinstance(self._body, UntilCloseBody)
        coding = head.headers.get("content-encoding", "").lower()
        self._inflater = Inflater(coding) if coding in ("gzip", "x-gzip", "deflate") else None
        self.claims_events = "event-stream" in head.headers.get("content-type", "").lower()

    @property
    def is_complete(self) -> bool:
        """Whether the body has been read to its end."""
        return self._body.done and not (self._inflater and self._inflater.has_more)

    async def read(self) -> bytes:
        """The next bytes of the body; b"" at its end.  Raises UpstreamError, 504 for a timeout."""
        try:
            data = b""
            while not data and not self.is_complete:
                data = await self._read_piece()
        except BaseException as error:
            raise self._failure(error) from None
        if data and self.record is not None:
            self.record(data)
        return data

    async def _read_piece(self) -> bytes:
        """The content of one read; b"" if it brought only framing, or the end of the connection."""
        if self._inflater is not None and self._inflater.has_more:
            return self._inflater.feed(b"")
        data, self._start = self._start, b""
        if not data:
            # The deadline counts only while a read waits, not while a slow client delays it.
            stream, deadline = self._stream, self._deadline
            stream.set_deadline(stream.now() + self.timeout.seconds if self.is_live else deadline)
            data = await stream.read()
            stream.clear_deadline()
            if not data:
                self._end_body()
                return b""
        data = self._body.feed(data)
        return self._inflater.feed(data) if self._inflater is not None and data else data

    def _end_body(self) -> None:
        """Ends the body with its connection.  Raises EOFError if bytes of it are missing."""
        try:
            self._body.eof()
        except ProtocolError:
            raise EOFError from None

    async def pump(self, take: Callable[[bytes, float], bool]) -> None:
        """Calls `take` with the body's bytes and the loop's time, until it returns True.

        Returns as well, perhaps without a call, if a read() has to see to the next bytes.  Raises
        UpstreamError, and the exceptions of `take`.
        """
        body = self._body
        needs_read = self._start or self._inflater is not None or self.record is not None
        if not self.is_live or needs_read or body.done:
            return

        def take_content(data: bytes, now: float) -> bool:
            data = body.feed(data)
            return bool(data) and take(data, now) or body.done

        try:
            await self._stream.pump(take_content, self.timeout.seconds)
        except BaseException as error:
            raise self._failure(error) from None

    def _failure(self, error: BaseException) -> BaseException:
        """Closes the connection, and returns the exception to raise for an error on it."""
        self.abort()
        return wire_error(error, self._upstream.host, self._upstream.port, True, self.timeout)

    async def read_all(self, limit: int, is_cut: bool = False) -> bytes:
        """The whole body.  One over `limit` bytes is cut there, or raises UpstreamError(502)."""
        parts, size = [], 0
        while size <= limit:
            data = await self.read()
            if not data:
                return b"".join(parts)
            parts.append(data)
            size += len(data)
        self.abort()
        if not is_cut:
            raise UpstreamError(502, f"The upstream's answer is larger than {limit >> 20} MiB")
        return b"".join(parts)[:limit]

    async def finish(self) -> None:
        """Reads the few bytes behind the last event, so that the connection can be reused."""
        self.timeout = TimeLimit(LAST_BYTES_WAIT, "")
        self.is_live = True
        try:
            for _ in range(4):
                if self.is_complete or not await self.read():
                    break
        except UpstreamError:
            pass
        self.close()

    def close(self) -> None:
        """Gives the connection back if the response was read to its end, else closes it."""
        if self._connection is not None and self._is_reusable and self.is_complete \
                and not self._body.rest and not self._start:
            connection, self._connection = self._connection, None
            self._upstream.release(connection)
        else:
            self.abort()

    def abort(self) -> None:
        """Closes the connection: no more tokens are wanted."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.stream.abort()

    def abandon(self) -> None:
        """Ends the response here: a read that waits gets the end of the connection."""
        self._stream.abort()


LAST_BYTES_WAIT = 1.0                    # seconds for the bytes behind [DONE]


# ---- 19.2 name lookups -----------------------------------------------------

class NameLookups(ThreadPoolExecutor):
    """The event loop's executor, which asyncio uses for getaddrinfo: a daemon thread for each call.

    A lookup cannot be cancelled.  asyncio.run and the interpreter wait for the threads of other
    executors, so that a name server that does not answer would hold the end of the process.
    """

    def __init__(self) -> None:
        super().__init__(1)
        self.waiting: Dict[Any, Set[Future]] = defaultdict(set)      # by host

    def submit(self, fn: Callable[..., Any], /, *arguments: Any, **options: Any) -> Future:
        """Calls getaddrinfo.  Raises gaierror if MAX_LOOKUPS of this host have not ended yet."""
        waiting, future = self.waiting[arguments[:1]], Future()
        if len(waiting) >= MAX_LOOKUPS:
            raise socket.gaierror(socket.EAI_AGAIN, "too many lookups wait")

        def call() -> None:
            try:
                future.set_result(fn(*arguments, **options))
            except BaseException as error:
                future.set_exception(error)
            finally:
                waiting.discard(future)

        future.set_running_or_notify_cancel()        # so nobody cancels it
        waiting.add(future)
        threading.Thread(target=call, daemon=True).start()
        return future

    def shutdown(self, *arguments: Any, **options: Any) -> None:
        """Waits for no lookup; the threads end with the process."""


MAX_LOOKUPS = 16                         # of one host
LOOKUPS = NameLookups()


# ---- 19.3 errors of a connection -------------------------------------------

class TimeLimit(NamedTuple):
    """How long something may take, and the setting that says so."""
    seconds: float
    setting: str


def wire_error(error: BaseException, host: str, port: int, has_response: bool,
               timeout: TimeLimit) -> BaseException:
    """The UpstreamError for an error on a connection; any other exception unchanged.

    `has_response` tells whether a byte of the response had arrived.
    """
    if isinstance(error, ReadTimeout):
        return UpstreamError(504, f"The upstream did not answer within {timeout.seconds:g} s "
                             f"({timeout.setting})")
    if isinstance(error, zlib.error):
        return UpstreamError(502, "The upstream's compressed answer is damaged")
    if isinstance(error, ProtocolError):
        text = "The upstream broke HTTP: " + error.message[:1].lower() + error.message[1:]
        has_response = True                  # the request has arrived there
    elif not isinstance(error, (OSError, EOFError)):
        return error
    elif has_response:
        text = "The upstream closed the connection before the end of the answer"
    else:
        text = f"Cannot connect to {host}:{port}: the connection was closed before an answer"
    lost = ConnectionLost(502, text)
    lost.has_response = has_response
    return lost


def connect_error(error: Exception, host: str, port: int) -> UpstreamError:
    """The UpstreamError for a connection that could not be made; it says which step failed."""
    if isinstance(error, ssl.SSLCertVerificationError):
        text = f"The certificate of {host} is not accepted: {error.verify_message}"
        return UpstreamError(502, text, headers={"x-should-retry": "false"})
    if isinstance(error, ssl.SSLError):
        return UpstreamError(502, f"TLS with {host}:{port} failed: {error.reason or 'handshake'}")
    if isinstance(error, socket.gaierror):
        return UpstreamError(502, f"Cannot resolve {host} (is OPENAI_BASE_URL right?)")
    if isinstance(error, (EOFError, ConnectionResetError)):
        detail = "it closed the connection before it was made (does the port speak TLS?)"
    elif isinstance(error, ConnectionRefusedError) or "refused" in str(error).lower():
        detail = "connection refused (is it running?)"
    else:
        detail = getattr(error, "strerror", None) or str(error) or "unreachable"
    return UpstreamError(502, f"Cannot connect to {host}:{port}: {detail}")


# ---- 19.4 TLS and outgoing proxies -----------------------------------------

def tls_context(cert_file: str = "", cert_dir: str = "") -> ssl.SSLContext:
    """TLS 1.2 or newer; certificates and names are always verified.  Raises OSError, ssl.SSLError.

    `cert_file` and `cert_dir` hold CA certificates; without them Python's own store is used, or
    SYSTEM_ROOTS where that is empty.
    """
    context = ssl.create_default_context(cafile=cert_file or None, capath=cert_dir or None)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    has_roots = cert_file or cert_dir or context.cert_store_stats()["x509_ca"] \
        or os.path.isdir(ssl.get_default_verify_paths().capath or "")
    if not has_roots and os.path.exists(SYSTEM_ROOTS):
        context.load_verify_locations(SYSTEM_ROOTS)
    return context


SYSTEM_ROOTS = "/etc/ssl/cert.pem"       # macOS; python.org's builds have no roots


def outgoing_proxy(host: str, proxy: Optional[SplitResult],
                   no_proxy: Sequence[str]) -> Optional[SplitResult]:
    """The proxy that leads to a host, or None.  This machine is never behind one."""
    if proxy is None or is_loopback(host) or any(bypasses_proxy(host, entry) for entry in no_proxy):
        return None
    return proxy


def bypasses_proxy(host: str, entry: str) -> bool:
    """Whether a NO_PROXY entry (name, .suffix, address, network or *) covers a host."""
    entry = entry.lower().lstrip("*.") if entry != "*" else entry
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(entry, strict=False)
    except ValueError:
        host = host.lower()
        return entry == "*" or host == entry.partition(":")[0] or host.endswith("." + entry)


def basic_credentials(url: SplitResult) -> str:
    """The value of an Authorization header for the user of a URL.  [RFC 7617]"""
    pair = f"{unquote(url.username or '')}:{unquote(url.password or '')}"
    return "Basic " + base64.b64encode(pair.encode("utf-8")).decode()


# ============================================================================
# 20. SERVER
# ============================================================================
#
# One task for each client connection: read a head, have it handled, read the next one.  The server
# knows no routes and no messages; functions are given to it.  A client that disconnects while its
# response is under way ends its task at once, and with it the call to the upstream: tokens cost
# money.  [RFC 9112 9]

# ---- 20.1 connections ------------------------------------------------------

class Server:
    """Serves the connections of listening sockets, and ends them in an orderly way.

    `handle` answers an exchange: it returns a Response, or None if it has sent a stream.  `reject`
    gives the Response to a head that is not HTTP.  `finish` is called once for each exchange,
    however it ended.  `new_id` gives random letters and digits for the ids of exchanges,
    `new_record` an object for the facts that the owner of the server wants to keep of an exchange.
    """

    def __init__(self, handle: Callable[[Exchange], Awaitable[Optional[Response]]],
                 reject: Callable[[Exchange, ProtocolError], Response],
                 finish: Callable[[Exchange], Any], new_id: NewId,
                 new_record: Callable[[], Any] = dict) -> None:
        self._handle = handle
        self._reject = reject
        self._finish = finish
        self._new_id = new_id
        self._new_record = new_record
        self._listeners: List[asyncio.AbstractServer] = []
        self.tasks: Set[asyncio.Task] = set()                # one for each connection
        self.exchanges: Dict[Exchange, asyncio.Task] = {}    # those that are being answered
        self.is_draining = False
        self.port = 0

    async def start(self, sockets: Sequence[socket.socket]) -> None:
        """Accepts connections from now on."""
        loop = asyncio.get_running_loop()
        self.port = sockets[0].getsockname()[1]
        for item in sockets:
            # asyncio accepts up to `backlog` connections in one iteration of the event loop: with 1
            # no worker takes all that wait.  Afterwards listen() sets the true backlog.
            self._listeners.append(await loop.create_server(
                lambda: ConnectionProtocol(self._accept), sock=item, backlog=1))
            item.listen(BACKLOG)

    def _accept(self, protocol: ConnectionProtocol, transport: Any) -> None:
        """Starts the task of a connection.  The event loop itself keeps no reference to it."""
        stream = ByteStream(protocol, transport)
        task = asyncio.ensure_future(self._serve(stream))

        def end(_: Any) -> None:
            self.tasks.discard(task)
            stream.close()

        self.tasks.add(task)
        task.add_done_callback(end)

    async def drain(self, seconds: float) -> None:
        """Stops listening, lets running exchanges end for `seconds`, then cancels them."""
        self.is_draining = True
        for listener in self._listeners:
            listener.close()
        for task in self.tasks.difference(self.exchanges.values()):
            task.cancel()                                    # idle, or with an incomplete head
        if self.exchanges:
            await asyncio.wait(set(self.exchanges.values()), timeout=seconds)
        for exchange, task in list(self.exchanges.items()):
            exchange.is_shut_down = True
            task.cancel()
        if self.tasks:
            await asyncio.wait(set(self.tasks), timeout=1.0)
        for task in self.tasks:
            task.cancel()
        if self.tasks:
            await asyncio.wait(set(self.tasks), timeout=1.0)

    async def _serve(self, stream: ByteStream) -> None:
        """Answers the requests of one connection, one by one."""
        try:
            while await self._serve_request(stream):
                pass
        except (OSError, ClientDisconnected, ProtocolError):
            pass                                             # nobody is left to answer

    async def _serve_request(self, stream: ByteStream) -> bool:
        """Answers one request.  Returns whether the connection can take another."""
        try:
            request = None if self.is_draining else await next_request(stream)
        except ProtocolError as error:
            exchange = self._new_exchange(stream, NO_REQUEST)
            exchange.send_response(self._reject(exchange, error), False)
            self._finish(exchange)
            await lingering_close(stream)
            return False
        if request is None:
            return False
        exchange = self._new_exchange(stream, request)
        task = asyncio.current_task()
        assert task is not None
        self.exchanges[exchange] = task
        try:
            is_kept = self._send_response(exchange, await self._handle(exchange))
            stream.unwatch()
            await stream.drain()
        except (asyncio.CancelledError, ClientDisconnected, OSError):
            exchange.was_interrupted = True
            raise
        finally:
            del self.exchanges[exchange]
            self._finish(exchange)
        if is_kept:
            await exchange.skip_body()
        elif not exchange.body.done and not self.is_draining:
            await lingering_close(stream)
        return is_kept and not self.is_draining and not stream.exceeded_read_ahead

    def _new_exchange(self, stream: ByteStream, request: Request) -> Exchange:
        return Exchange(stream, request, "req_" + self._new_id(24), self._new_record())

    def _send_response(self, exchange: Exchange, response: Optional[Response]) -> bool:
        """Sends a response unless the handler has.  Returns whether the connection is kept."""
        if response is None:
            return exchange.keeps_alive() and exchange.request.is_http11
        is_kept = exchange.keeps_alive() and exchange.may_skip_body() and not self.is_draining \
            and response.status not in CLOSING_STATUSES
        exchange.send_response(response, is_kept)
        return is_kept


async def next_request(stream: ByteStream) -> Optional[Request]:
    """The head of a connection's next request; None if there is none.  Raises ProtocolError."""
    stream.set_deadline(stream.now() + IDLE_KEEP_ALIVE)
    try:
        data = b""
        while data in (b"", b"\r"):
            more = await stream.read()
            if not more:
                return None
            data += more
            while data.startswith(b"\r\n"):                  # [RFC 9112 2.2]
                data = data[2:]
    except ReadTimeout:
        return None
    stream.set_deadline(stream.now() + HEAD_TIME)
    try:
        head, rest = await stream.head(request_head_end, data)
    except ReadTimeout:
        raise ProtocolError(408, f"The request head did not come within {HEAD_TIME:g} s") from None
    except EOFError:
        return None
    stream.clear_deadline()
    stream.unread(rest)
    return parse_request_head(head[:-4])


async def lingering_close(stream: ByteStream) -> None:
    """Half-closes and reads on for a while, so that the response arrives.  [RFC 9112 9.6]

    A socket that is closed with unread bytes would reset the connection.
    """
    stream.end_writing()
    end = stream.now() + LINGER_TIME
    try:
        while stream.now() < end:
            stream.set_deadline(min(end, stream.now() + LINGER_READ_TIME))
            if not await stream.read():
                break
    except (ReadTimeout, OSError):
        pass


def listening_sockets(hosts: Sequence[str], port: int) -> List[socket.socket]:
    """One socket for each address of each host, all on one port.

    Raises OSError; its `filename` is the host that cannot be had.
    """
    found: Dict[Any, socket.socket] = {}                 # by address
    host = ""
    try:
        for host in hosts:
            for family, kind, protocol, _, (name, _, *scope) in socket.getaddrinfo(
                    host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE):
                if (name, *scope) in found:
                    continue
                item = found[(name, *scope)] = socket.socket(family, kind, protocol)
                item.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    item.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                item.bind((name, port, *scope))
                port = port or item.getsockname()[1]
                item.listen(BACKLOG)
                item.setblocking(False)
    except OSError as error:
        for item in found.values():
            item.close()
        error.filename = host
        raise
    return list(found.values())


BACKLOG = 2048                           # connections that wait to be accepted
IDLE_KEEP_ALIVE = 75.0                   # seconds between two requests, as nginx
HEAD_TIME = 30.0                         # seconds from a head's first byte on
LINGER_TIME = 30.0                       # seconds for the rest of a request
LINGER_READ_TIME = 5.0                   # seconds without a byte from it
CLOSING_STATUSES = (408, 413, 414, 431)  # the rest of the request is not read
NO_REQUEST = Request("-", "-", "", {}, True, "")


# ---- 20.2 exchange ---------------------------------------------------------

class Exchange:
    """A client's request and our response, for a handler: the body in, the events out."""

    def __init__(self, stream: ByteStream, request: Request, request_id: str, record: Any) -> None:
        """`request` has been read from `stream`, up to its body; `record` is the service's own."""
        self._stream = stream
        self.request = request
        self.id = request_id
        address = stream.transport.get_extra_info("peername")
        self.client = address[0] if isinstance(address, tuple) else ""
        self.body = request_body(request.headers)
        self.body_size = 0                       # bytes
        self.is_mostly_non_ascii = False         # much of the body is beyond ASCII
        self._waits_for_100 = "expect" in request.headers and request.is_http11
        self.began = self.last_write = stream.now()
        self.status = 0                          # of the response, once its head is sent
        self.bytes_out = 0
        self.extra_headers: Headers = {}         # for every response to this request: CORS
        self.is_shut_down = False                # the server ends before the response does
        self.was_interrupted = False             # by the shutdown, or the client disconnected
        self.record = record                     # the service's own facts of this exchange

    def has_begun(self) -> bool:
        """Whether the response's head is sent: an error can then only be told inside the stream."""
        return self.status != 0

    def keeps_alive(self) -> bool:
        return self.request.keeps_alive() and not self.is_shut_down

    def watch_client(self) -> None:
        """From now on the current task is cancelled when the client disconnects.

        Raises ClientDisconnected if it has already.
        """
        task = asyncio.current_task()
        if task is None or self._stream.has_ended():
            raise ClientDisconnected
        self._stream.watch(task.cancel)

    # The request's body

    async def json(self, limit: int, parse: Optional[Callable[[str], Any]] = None) -> Json:
        """The body as a JSON object of at most `limit` bytes; `parse` in place of client_json.

        Raises ProxyError.
        """
        data = await self._read_body(limit)
        text = client_text(data)
        self.is_mostly_non_ascii = len(data) > len(text) * 1.2
        del data                                 # frees a large body before it is parsed
        value = (parse or client_json)(text)
        if not is_object(value):
            raise ProxyError(400, f"{NOT_JSON}: it must be an object")
        return value

    async def _read_body(self, limit: int) -> Union[bytes, bytearray]:
        """The whole body.  Raises ProxyError, ClientDisconnected."""
        stream, body = self._stream, self.body
        if self._waits_for_100 and not stream.has_unread and not body.done:
            stream.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._waits_for_100 = False
        data: Union[bytes, bytearray] = b"" if body.done else body.feed(stream.take_unread())
        while not body.done:
            if len(data) + body.left > limit:        # a chunk that is announced counts as well
                raise too_large(limit)
            data = bytearray(data) if isinstance(data, bytes) else data
            data += await self._body_piece()
        if len(data) > limit:
            raise too_large(limit)
        self._unread_rest()
        self.body_size = len(data)
        return data

    async def _body_piece(self) -> bytes:
        if not self._stream.has_unread:
            self._stream.set_deadline(self._stream.now() + BODY_READ_TIME)
        try:
            data = await self._stream.read()
        except ReadTimeout:
            message = f"The request's body was silent for {BODY_READ_TIME:g} s"
            raise ProtocolError(408, message) from None
        except OSError:
            raise ClientDisconnected from None
        self._stream.clear_deadline()
        if not data:
            raise ClientDisconnected
        return self.body.feed(data)

    def may_skip_body(self) -> bool:
        """Whether the unread rest of the body is small enough to be read away."""
        return self.body.done or (isinstance(self.body, LengthBody) and not self._waits_for_100
                                  and self.body.left <= SKIPPED_BODY)

    async def skip_body(self) -> None:
        """Reads the rest of the body, which nobody needs."""
        while not self.body.done:
            await self._body_piece()
        self._unread_rest()

    def _unread_rest(self) -> None:
        """Gives back the start of the next request, which a client may send ahead."""
        self._stream.unread(self.body.rest)
        self.body.rest = b""

    # A whole response

    def send_response(self, response: Response, is_kept: bool) -> None:
        """Sends a whole response in one write.  `is_kept`: the connection stays open."""
        headers = {**self.extra_headers, **response.headers}
        if response.status != 204:
            headers["content-type"] = response.content_type
            headers["content-length"] = str(len(response.body))
        if not is_kept:
            headers["connection"] = "close"
        elif not self.request.is_http11:
            headers["connection"] = "keep-alive"
        start_line = f"HTTP/1.1 {response.status} {reason_phrase(response.status)}"
        own = {"date": http_date(), "request-id": self.id}
        data = encoded_head(start_line, [*own.items(), *headers.items()])
        if self.request.method != "HEAD":
            data += response.body
        self.status = response.status
        self.bytes_out = len(data)
        self._stream.write(data)

    # A stream of events

    async def send(self, events: bytes, is_last: bool = False) -> None:
        """Sends events, with the head before the first; waits for a client that reads slowly."""
        self.send_now(events, is_last)
        await self.drain()

    def send_now(self, events: bytes, is_last: bool = False, now: float = 0.0) -> None:
        """The same without waiting, in one write.  `now` is the loop's time if it is known."""
        is_chunked = self.request.is_http11
        data = encoded_chunk(events) if events and is_chunked else events
        if not self.status:
            self.status = 200
            data = self._stream_head(is_chunked) + data
        if is_last and is_chunked:
            data += LAST_CHUNK
        self.bytes_out += len(data)
        self.last_write = now or self._stream.now()
        self._stream.write(data)

    def _stream_head(self, is_chunked: bool) -> bytes:
        """The head before the first event.  Without chunks the connection's end ends the stream."""
        headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache",
                   "x-accel-buffering": "no", "request-id": self.id, "date": http_date(),
                   **self.extra_headers}
        if is_chunked:
            headers["transfer-encoding"] = "chunked"
        if not (self.keeps_alive() and is_chunked):
            headers["connection"] = "close"
        return encoded_head("HTTP/1.1 200 OK", headers.items())

    async def drain(self) -> None:
        """Waits for a client that reads slowly.  Raises ClientDisconnected."""
        try:
            await self._stream.drain()
        except OSError:
            raise ClientDisconnected from None

    def has_unsent(self) -> bool:
        """Whether the client has not taken all yet that send_now() sent."""
        return self._stream.unsent_bytes > 0

    def is_over_write_limit(self) -> bool:
        """Whether the client takes so little that nothing should be added."""
        return self._stream.unsent_bytes > WRITE_BUFFER


def too_large(limit: int) -> ProxyError:
    return ProxyError(413, f"Request exceeds the maximum size of {limit} bytes (MAX_REQUEST_SIZE)")


BODY_READ_TIME = 60.0                    # seconds without a byte of a request's body
SKIPPED_BODY = 65536                     # bytes; a larger rest closes the connection


# ---- 20.3 dates ------------------------------------------------------------

def http_date() -> str:
    """The Date header's value.  [RFC 9110 5.6.7]"""
    return _http_date(int(time.time()))


@lru_cache(maxsize=2)                    # the second that runs, and the one before
def _http_date(second: int) -> str:
    moment = time.gmtime(second)
    return time.strftime(f"{DAYS[moment.tm_wday]}, %d {MONTHS[moment.tm_mon - 1]} %Y %H:%M:%S GMT",
                         moment)


# strftime's own names follow the locale.
DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun",
          "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


# ############################################################################
# PART III. THE SERVICE
# ############################################################################

# ============================================================================
# 21. SETTINGS
# ============================================================================
#
# One field for each environment variable, declared once: parsing, --help, env.example
# and the README's table follow from the declaration.  The process environment wins
# over the .env file, the file over the default; an empty value counts as not set.
# One start reports all bad values.

# ---- 21.1 parsers of values ------------------------------------------------
#
# A parser gives the value of a text, or raises ValueError with the end of a sentence
# that begins with the variable and its text.

def number_between(low: float, high: float) -> Callable[[str], float]:
    """A parser of numbers from `low` to `high`."""
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise ValueError("is not a number") from None
        if not low <= value <= high:
            raise ValueError(f"must be between {low:g} and {high:g}")
        return value
    return parse


def integer_between(low: int, high: int) -> Callable[[str], int]:
    """A parser of whole numbers from `low` to `high`."""
    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,18}", text):
            raise ValueError("is not a whole number")
        value = int(text)
        if not low <= value <= high:
            raise ValueError(f"must be between {low} and {high}")
        return value
    return parse


def one_of(**choices: Any) -> Callable[[str], Any]:
    """A parser of words, in any case, that stand for values."""
    def parse(text: str) -> Any:
        if text.lower() not in choices:
            raise ValueError("must be one of " + ", ".join(choices))
        return choices[text.lower()]
    return parse


def parse_text(text: str) -> str:
    """The text as it is; control characters would spoil log lines and headers."""
    if not text.isprintable():
        raise ValueError("has a control character in it")
    return text


def parse_key(text: str) -> str:
    """A key that may stand in a header.  env.example's placeholder counts as no key."""
    if text == KEY_PLACEHOLDER:
        return ""
    if not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError("has a blank, a control character or a letter outside ASCII in it")
    return text


def parse_path(text: str) -> str:
    """A path, in the form that the file system's functions take under every locale."""
    return os.fsdecode(parse_text(text).encode("utf-8"))


def parse_keys(text: str) -> Tuple[str, ...]:
    keys = tuple(filter(None, map(parse_key, parse_list(text))))
    if not keys:
        raise ValueError("holds no key")
    return keys


def parse_list(text: str) -> Tuple[str, ...]:
    return tuple(item.strip() for item in text.split(",") if item.strip())


def parse_hosts(text: str) -> Tuple[str, ...]:
    """Addresses and host names, without the brackets of IPv6."""
    hosts = tuple(item[1:-1] if item[:1] == "[" and item[-1:] == "]" else item
                  for item in parse_list(text))
    if not hosts:
        raise ValueError("names no address")
    for host in hosts:
        if not re.fullmatch(r"[A-Za-z0-9._:%-]+", host):
            raise ValueError(f"{host!r} is not an address or a host name")
    return hosts


def parse_header_name(text: str) -> str:
    if not HTTP_TOKEN.fullmatch(text.encode("utf-8", "replace")):
        raise ValueError("is not the name of a header")
    return text


def parse_header_pairs(text: str) -> Tuple[Tuple[str, str], ...]:
    """The `Name: value` pairs of UPSTREAM_HEADERS, separated by `;`."""
    pairs = []
    for item in filter(None, (part.strip() for part in text.split(";"))):
        name, colon, value = item.partition(":")
        name, value = name.strip(), value.strip()
        if not colon or not HTTP_TOKEN.fullmatch(name.encode("utf-8", "replace")):
            raise ValueError("needs 'Name: value' pairs separated by ';'")
        if not value.isprintable() or not value.isascii():
            raise ValueError(f"the value of {name} must be printable ASCII")
        if name.lower() in ("host", "content-length", "transfer-encoding", "connection"):
            raise ValueError(f"{name} is set by the proxy itself")
        pairs.append((name, value))
    return tuple(pairs)


def parse_base_url(text: str) -> SplitResult:
    """An http(s) URL, without a slash or `/chat/completions` at its end; keeps its query."""
    url = split_url(text)
    if url.scheme not in ("http", "https"):
        raise ValueError("must start with http:// or https://")
    if "@" in url.netloc:
        raise ValueError("must not hold a user or password: put the key into OPENAI_API_KEY")
    path = url.path.rstrip("/")
    if path.endswith("/chat/completions"):
        path = path[:-len("/chat/completions")].rstrip("/")
    return url._replace(path=path, fragment="")


def parse_proxy_url(text: str) -> SplitResult:
    """The URL of an outgoing proxy; `host:port` alone is common, so the scheme may be missing."""
    url = split_url(text if "://" in text else "http://" + text)
    if url.scheme != "http":
        raise ValueError("only http:// proxies are supported")
    return url


def split_url(text: str) -> SplitResult:
    """The parts of a URL that has a host, and a port that can be dialled."""
    try:
        url = urlsplit(text)
        port = url.port
    except ValueError:
        raise ValueError("is not a URL") from None
    if not url.hostname or port == 0 or re.search(r"[^\x21-\x7e]", text):
        raise ValueError("is not a URL with a host")
    return url


def parse_log_level(text: str) -> int:
    """A level's number.

    RUST_LOG may be a list of directives, `info,hyper=warn`: the level without a module counts.
    """
    for directive in text.lower().split(","):
        if directive.strip() in LOG_LEVELS:
            return LOG_LEVELS[directive.strip()]
    if re.fullmatch(r"\s*[\w:.-]+=\w+\s*(,\s*[\w:.-]+=\w+\s*)*", text):
        return LOG_LEVELS["info"]
    raise ValueError("must be one of " + ", ".join(LOG_LEVELS))


LOG_LEVELS = {"trace": 10, "debug": 10, "info": 20, "warn": 30, "warning": 30, "error": 40}
KEY_PLACEHOLDER = "your-openai-api-key-here"


# ---- 21.2 fields -----------------------------------------------------------

def env(default: Any, parse: Callable[[str], Any], help_text: str, *aliases: str,
        secret: bool = False) -> Any:
    """A Settings field, read from the variable of its name in capitals or from an alias.

    The value of a secret is shown in no error message.
    """
    return field(default=default, metadata={
        "parse": parse, "help": help_text, "aliases": aliases, "secret": secret})


@dataclass(frozen=True)
class Settings:
    """One field for each environment variable: its name in small letters.  Times are in seconds."""

    server_host: Tuple[str, ...] = env(
        ("127.0.0.1",), parse_hosts, "addresses to listen on, separated by commas")
    server_port: int = env(8082, integer_between(1, 65535), "TCP port to listen on")
    openai_api_key: str = env(
        "", parse_key, "key for the upstream; not set: the client's own key is passed on",
        secret=True)
    openai_base_url: SplitResult = env(
        urlsplit("https://api.openai.com/v1"), parse_base_url,
        "URL of the upstream, up to and without /chat/completions", secret=True)
    claude_haiku_model: str = env("gpt-4o-mini", parse_text, "model for names with 'haiku'")
    claude_sonnet_model: str = env(
        "gpt-4o", parse_text, "model for names with 'sonnet' and other claude names")
    claude_opus_model: str = env("gpt-4", parse_text, "model for names with 'opus'")
    request_timeout: float = env(
        30.0, number_between(0.1, 86400), "seconds for a whole exchange that is not streamed")
    stream_timeout: float = env(
        300.0, number_between(0.1, 86400), "seconds of silence before a stream is given up")
    log_level: int = env(
        LOG_LEVELS["info"], parse_log_level, "trace, debug, info, warn or error", "RUST_LOG")
    log_format: str = env("", one_of(json="json", text="text"),
                          "json or text; not set: text on a terminal, else json")
    allowed_origins: Tuple[str, ...] = env(("*",), parse_list, "web origins that may call, or *")
    api_key_header: str = env(
        "Authorization", parse_header_name,
        "header in which clients present their key, beside x-api-key")
    allowed_hosts: Tuple[str, ...] = env(
        (), parse_list, "further Host names that are accepted, or *")
    proxy_api_key: Tuple[str, ...] = env(
        (), parse_keys, "keys that clients must present, separated by commas", secret=True)
    max_request_size: int = env(
        33554432, integer_between(1, 2 ** 31), "bytes of a request body")
    max_concurrent_requests: int = env(
        1000, integer_between(1, 100000), "API requests in work at once; one more gets 529")
    workers: int = env(1, integer_between(1, 64), "processes that share the listening socket",
                       "TOKIO_WORKER_THREADS")
    https_proxy: Optional[SplitResult] = env(
        None, parse_proxy_url, "outgoing proxy for https upstreams", "https_proxy", secret=True)
    http_proxy: Optional[SplitResult] = env(
        None, parse_proxy_url, "outgoing proxy for http upstreams", "http_proxy", secret=True)
    no_proxy: Tuple[str, ...] = env(
        (), parse_list, "hosts that are reached without the outgoing proxy", "no_proxy")
    ssl_cert_file: str = env(
        "", parse_path, "file of CA certificates that upstreams are checked against")
    ssl_cert_dir: str = env("", parse_path, "folder of CA certificates, as OpenSSL has it")
    pid_file: str = env("", parse_path, "file that holds the process id while the proxy runs")
    upstream_headers: Tuple[Tuple[str, str], ...] = env(
        (), parse_header_pairs, "extra headers for the upstream: 'Name: value; Name: value'",
        secret=True)
    record_dir: str = env(
        "", parse_path, "folder that gets one file for each exchange, for reports of a fault")
    rust_backtrace: bool = env(False, one_of(**{"0": False, "1": True, "full": True}),
                               "1: unexpected errors are logged with their traceback")

    @cached_property
    def credentials(self) -> List[Tuple[str, str]]:
        """(variable, text) for each credential of the upstream."""
        return [(CREDENTIAL_VARIABLES[place], text) for place, text in credentials_of(
            self.openai_base_url, self.upstream_headers, self.openai_api_key)]

    @property
    def lends(self) -> bool:
        """Whether callers spend something of the owner's."""
        return bool(self.credentials)

    @property
    def passes_keys_on(self) -> bool:
        """True when the key that a client presents is the one that goes upstream."""
        return not self.credentials

    @cached_property
    def host_class(self) -> str:
        """The class of the upstream's host: a key of HOST_CLASSES, or `other`."""
        return class_of_host(self.hostname)

    @cached_property
    def completions_path(self) -> str:
        return self.openai_base_url.path + "/chat/completions"

    @cached_property
    def hostname(self) -> str:
        return self.openai_base_url.hostname or ""

    def secrets(self) -> List[str]:
        """The texts that must never be seen in a log, an answer or a page, longest first.

        A header may hold a scheme before its credential; a URL holds it percent-encoded.
        """
        found = {*self.proxy_api_key, *(url.password for url in (self.https_proxy, self.http_proxy)
                                        if url and url.password)}
        for _, text in self.credentials:
            found |= {text, text.partition(" ")[2].strip()}
        found |= {unquote(text) for text in found} | {unquote_plus(text) for text in found}
        return sorted((item for item in found if len(item) >= 8), key=len, reverse=True)


def credentials_of(url: SplitResult, headers: Sequence[Tuple[str, str]],
                   key: str) -> List[Tuple[str, str]]:
    """(place, text) for each credential that is sent to an upstream; a place is key, headers, url.

    Any header and any parameter of the query counts, except those that are known to hold none.
    """
    parameters = (part.partition("=") for part in url.query.split("&"))
    found = [("key", key),
             *(("headers", text) for name, text in headers if name.lower() not in OPEN_HEADERS),
             *(("url", text if sign else name) for name, sign, text in parameters
               if name.lower() != "api-version")]
    return [(place, text) for place, text in found if text]


OPEN_HEADERS = ("http-referer", "referer", "x-title", "x-openrouter-title", "user-agent",
                "openai-organization", "openai-project", "openai-beta", "anthropic-version",
                "anthropic-beta")
CREDENTIAL_VARIABLES = {
    "key": "OPENAI_API_KEY", "headers": "UPSTREAM_HEADERS", "url": "OPENAI_BASE_URL"}


def credential_names(settings: Settings) -> str:
    """The variables that hold the upstream's credentials, for a sentence."""
    return " and ".join(dict.fromkeys(variable for variable, _ in settings.credentials))


def model_map(settings: Settings) -> Dict[str, str]:
    """The upstream's model for each family of Claude models."""
    return {"haiku": settings.claude_haiku_model, "sonnet": settings.claude_sonnet_model,
            "opus": settings.claude_opus_model}


def upstream_model(requested: str, settings: Settings) -> str:
    """The upstream's model for the name that a client asks for.

    Claude Code appends `[1m]` to a name to ask for a context of a million tokens.
    """
    name = requested[:-4] if requested.endswith("[1m]") else requested
    lower = name.lower()
    for family, model in model_map(settings).items():
        if family in lower:
            return model
    return settings.claude_sonnet_model if lower.startswith("claude") else name


def target_of(requested_model: str, settings: Settings) -> Target:
    """The Target for the model that a client asks for."""
    return Target(upstream_model(requested_model, settings), settings.hostname, settings.host_class,
                  settings.completions_path, bool(settings.openai_api_key))


# ---- 21.3 loading ----------------------------------------------------------

def load_settings(environ: Mapping[str, str], dotenv: Optional[Mapping[str, str]] = None,
                  **overrides: Any) -> Settings:
    """The settings of the environment and the .env file; `overrides` are fields that win over both.

    Raises ConfigError with a sentence for each value that cannot be used.
    """
    values, problems = {}, []
    for item in fields(Settings):
        name, text = variable_text(item, environ, dotenv or {})
        if item.name in overrides or text is None:
            continue
        try:
            if LONE_SURROGATE.search(text):
                raise ValueError("is not UTF-8")
            values[item.name] = item.metadata["parse"](text)
        except ValueError as error:
            shown = "" if item.metadata["secret"] else f" {text[:80]!r}"
            problems.append(f"{name}{shown} {error}")
    if problems:
        raise ConfigError(problems)
    settings = Settings(**{**values, **overrides})
    check_exposure(settings)
    return settings


def check_exposure(settings: Settings) -> None:
    """Raises ConfigError where other machines could spend the upstream's key."""
    exposed = exposed_hosts(settings)
    if exposed and settings.lends and not settings.proxy_api_key:
        raise ConfigError([f"SERVER_HOST {exposed[0]} can be reached from other machines, and "
                           f"everybody there could spend {credential_names(settings)}: set "
                           "PROXY_API_KEY to a key that clients must present"])


def exposed_hosts(settings: Settings) -> List[str]:
    """The addresses of SERVER_HOST that other machines can reach."""
    return [host for host in settings.server_host if not is_loopback(host)]


def variable_text(item: Any, environ: Mapping[str, str],
                  dotenv: Mapping[str, str]) -> Tuple[str, Optional[str]]:
    """The name and text of the variable that sets a field; (name, None) where none does."""
    names = (item.name.upper(), *item.metadata["aliases"])
    for source in (environ, dotenv):
        for name in names:
            if source.get(name, "").strip():
                return name, source[name].strip()
    return names[0], None


class Variables(NamedTuple):
    """The variables that set the settings, read at one moment, and the file that some are from."""
    texts: Dict[str, str]                # by name
    path: str = ""                       # of the file; "" where there is none
    is_empty: bool = False               # the file held no variable
    warnings: Sequence[Tuple[str, Json]] = ()            # events of the log, and their facts


def set_variables(environ: Mapping[str, str], dotenv: Mapping[str, str]) -> Dict[str, str]:
    """The name and text of each variable that sets a field."""
    found = (variable_text(item, environ, dotenv) for item in fields(Settings))
    return {name: text for name, text in found if text is not None}


def reloaded_settings(old: Settings, in_force: Variables, fresh: Settings, found: Variables,
                      fixed: Sequence[str]) -> Settings:
    """The settings after a reload: the fresh ones, with the old values of the fields `fixed`.

    `in_force` and `found` are the variables of the old settings and of the fresh ones.  A reload
    never makes the proxy serve more people, or spend at another upstream, because half a file was
    read.  Raises ConfigError with the reason why the old settings stay.
    """
    if found.is_empty:
        raise ConfigError([f"{found.path} is empty"])
    if in_force.path and found.path not in (in_force.path, ENV_FILES[0]):
        raise ConfigError([f"{in_force.path} is missing"])
    lost = [name for name in KEPT_VARIABLES if in_force.texts.get(name, KEY_PLACEHOLDER)
            != KEY_PLACEHOLDER == found.texts.get(name, KEY_PLACEHOLDER)]
    if not lost and old.lends and not fresh.lends:
        lost = [f"The key in {credential_names(old)}"]
    if lost:
        verb, pronoun = ("is", "it") if len(lost) == 1 else ("are", "them")
        raise ConfigError([f"{' and '.join(lost)} {verb} no longer set in {found.path}; "
                           f"restart to serve without {pronoun}"])
    settings = replace(fresh, **{name: getattr(old, name) for name in fixed})
    check_exposure(settings)
    return settings


ENV_FILES = ("./.env", "/usr/local/etc/aiapiproxy/.env")
# Variables that a reload may change but not take away.
KEPT_VARIABLES = ("OPENAI_API_KEY", "OPENAI_BASE_URL", "PROXY_API_KEY", "UPSTREAM_HEADERS",
                  "ALLOWED_ORIGINS")


def dotenv_values(text: str) -> Tuple[Dict[str, str], List[int]]:
    """The variables of a .env file, and the numbers of its malformed lines.

    Nothing is executed or expanded.
    """
    values: Dict[str, str] = {}
    malformed = []
    for index, line in enumerate(re.split(r"\r?\n|\r", text.lstrip("\ufeff")), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        match = DOTENV_LINE.fullmatch(line)
        if match is None:
            malformed.append(index)
            continue
        name, single, double, plain = match.groups()
        quoted_value = single if single is not None else double
        values[name] = quoted_value if quoted_value is not None else plain.strip()
    return values, malformed


def misspelled_names(names: Iterable[str]) -> List[Tuple[str, str]]:
    """(name, the known name that it is near) for each unknown name that is near a known one."""
    import difflib                                       # rarely needed
    known = [name for item in fields(Settings)
             for name in (item.name.upper(), *item.metadata["aliases"])]
    found = []
    for name in names:
        near = [] if name in known else difflib.get_close_matches(name.upper(), known, 1, 0.85)
        if near:
            found.append((name, near[0]))
    return found


LONE_SURROGATE = re.compile("[\ud800-\udfff]")           # a byte that is not UTF-8, escaped

# A name, and its value in single quotes, in double quotes, or plain up to a comment.
DOTENV_LINE = re.compile(r"""
    (?:export\s+)? ([A-Za-z_][A-Za-z0-9_]*) \s*=
    (?: \s*'([^']*)' \s*(?:\#.*)? | \s*"([^"]*)" \s*(?:\#.*)?
      | (?!\s*['"]) ((?:(?!\s\#).)*) (?:\s+\#.*)? )""", re.VERBOSE)


# ---- 21.4 lines for a shell ------------------------------------------------

def shell_lines(settings: Settings, authority: str) -> List[str]:
    """The lines for a shell that make Claude Code call this proxy."""
    return [f"export ANTHROPIC_BASE_URL=http://{authority}",
            f"export ANTHROPIC_AUTH_TOKEN={token_hint(settings)}"]


def token_hint(settings: Settings) -> str:
    """The key that a client must present, as a word for a person: keys are not shown."""
    if settings.proxy_api_key:
        return "ONE_OF_PROXY_API_KEY"
    return "YOUR_UPSTREAM_KEY" if settings.passes_keys_on else "any"


def url_authority(settings: Settings, port: int) -> str:
    """The host and port under which a client on this machine reaches the proxy."""
    host = settings.server_host[0]
    return authority_of({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port)


def authority_of(host: str, port: int) -> str:
    """Host and port as a URL has them, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


# ============================================================================
# 22. LOG
# ============================================================================
#
# One line for an event, one `request` line for a request when it has ended.  A line
# holds no prompt, no answer and no key.  The service works on when the log cannot be
# written: a closed pipe, a full disk or a slow reader never stops or delays it.

# ---- 22.1 events -----------------------------------------------------------

LOG = logging.getLogger("aiapiproxy")


def log(level: int, event: str, **facts: Any) -> None:
    """Writes one line of the log: an event's name and its facts."""
    if LOG.isEnabledFor(level):
        LOG.log(level, event, extra={"facts": facts})


def print_error(problem: str, log_format: str = "") -> None:
    """Writes one line to stderr, in the log's format, when a start fails before there is a log."""
    line = f"aiapiproxy: {problem}"
    if (log_format or os.environ.get("LOG_FORMAT", "")).lower() == "json":
        line = json.dumps({"ts": rfc3339(time.time()), "level": "error", "event": "not_started",
                           "message": problem})
    try:
        os.write(2, line.encode("utf-8", "replace") + b"\n")
    except OSError:
        pass


def rfc3339(moment: float) -> str:
    """A time as RFC 3339 UTC with milliseconds."""
    second, millisecond = divmod(int(moment * 1000), 1000)
    return f"{_second_text(second)}.{millisecond:03d}Z"


@lru_cache(maxsize=4)
def _second_text(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))


# ---- 22.2 formats ----------------------------------------------------------

class JsonFormatter(logging.Formatter):
    """Formats an event as one line of JSON: newlines in values are escaped."""

    def format(self, record: logging.LogRecord) -> str:
        facts = getattr(record, "facts", {})
        entry = {"ts": rfc3339(record.created), "level": LEVEL_NAMES.get(record.levelno, "info"),
                  "event": record.getMessage(), **facts}
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, separators=(",", ":"), default=str)


class TextFormatter(logging.Formatter):
    """Formats an event for a person: time, level, message; in colour on a terminal."""

    def __init__(self, is_coloured: bool) -> None:
        super().__init__()
        self._is_coloured = is_coloured

    def format(self, record: logging.LogRecord) -> str:
        """The line, and a traceback where there is one; failed requests are red."""
        facts = getattr(record, "facts", {})
        level = LEVEL_NAMES.get(record.levelno, "info")
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        if record.getMessage() == "request":
            text = request_line(facts)
        elif facts.get("message"):
            text = str(facts["message"])
        else:
            words = [f"{name}={value}" for name, value in facts.items()
                     if value not in (None, "")]
            text = "  ".join([record.getMessage(), *words])
        colour = LEVEL_COLOURS.get(level, "") if self._is_coloured else ""
        if facts.get("status", 0) >= 400 and self._is_coloured and not colour:
            colour = "\x1b[31m"
        line = CONTROL.sub(" ", f"{clock} {level:5} {text}")
        line = f"{colour}{line}\x1b[0m" if colour else line
        return line + ("\n" + self.formatException(record.exc_info) if record.exc_info else "")


def request_line(facts: Json) -> str:
    """A request in one aligned line: model, tokens, cache, first token, total, speed, outcome."""
    failure = f": {facts['error']}" if facts.get("error") else ""
    if not facts.get("model"):
        return (f"{facts['status']} {facts['method']} {facts['path']}  "
                f"{facts['duration_ms']:.0f} ms  {facts['outcome']}{failure}")
    seconds = facts["duration_ms"] / 1000
    written, cached = facts.get("output_tokens") or 0, facts.get("cache_read_input_tokens") or 0
    read = (facts.get("input_tokens") or 0) + cached
    first = None if facts["ttft_ms"] is None else facts["ttft_ms"] / 1000
    writing = seconds - (first or 0)
    models = f"{facts['model']} → {facts.get('upstream_model') or '?'}"
    return (f"{facts['status']} {models:44} {read:>7} in {cached:>7} cached {written:>6} out  "
            f"first {'-' if first is None else f'{first:.2f}':>5} s  total {seconds:>6.2f} s  "
            f"{written / writing if writing > 0 else 0:>5.0f} tok/s  "
            f"{facts.get('stop_reason') or facts['outcome']}{failure}")


LEVEL_NAMES = {10: "debug", 20: "info", 30: "warn", 40: "error", 50: "error"}
LEVEL_COLOURS = {"warn": "\x1b[33m", "error": "\x1b[31m", "debug": "\x1b[2m"}


# ---- 22.3 files ------------------------------------------------------------

class LogFile(logging.Handler):
    """Writes whole lines to a file descriptor; never blocks and never raises.

    Lines that a pipe or a terminal does not take wait, at most LOG_BACKLOG bytes of them; beyond
    that lines are lost, and the first line after the gap says how many.  Where the descriptor is a
    regular file, as under launchd, log rotation may move that away: then the file is opened again
    by its path.  That needs no signal.
    """

    def __init__(self, descriptor: int, levels: Callable[[int], bool]) -> None:
        """`levels` tells which levels belong here.  Writes to other than files stop blocking."""
        super().__init__()
        self._shared = descriptor
        self._levels = levels
        self._path = descriptor_path(descriptor)
        self._descriptor = own_descriptor(descriptor)
        self._was_blocking = False
        self._checked = 0.0
        self._is_problem_logged = False
        self._backlog: Deque[bytes] = deque()
        self._size = 0                               # bytes of the backlog
        self._lost = 0                               # lines since the gap began
        self._timer: Optional[asyncio.TimerHandle] = None
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                self._was_blocking = os.get_blocking(self._descriptor)
                os.set_blocking(self._descriptor, False)
        except OSError:
            pass

    def filter(self, record: logging.LogRecord) -> bool:
        return self._levels(record.levelno)

    def emit(self, record: logging.LogRecord) -> None:
        """Adds a line to the backlog, and writes as much of the backlog as is taken now."""
        try:
            line = self.format(record).encode("utf-8", "replace") + b"\n"
        except ValueError:
            return
        if self._path and not 0 <= record.created - self._checked < ROTATION_CHECK:
            self._checked = record.created
            self.reopen_if_moved()
        if self._lost or self._size + len(line) > LOG_BACKLOG:
            self._lost += 1
        else:
            self._backlog.append(line)
            self._size += len(line)
        self._write_backlog()

    def _write_backlog(self) -> None:
        """Writes the lines that wait; for those that are not taken it looks again later.

        A signal handler may log in between, so a line leaves the backlog before it is written.
        """
        while self._backlog:
            line, sent = self._backlog.popleft(), 0
            try:
                sent = os.write(self._descriptor, line)
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.ENOSPC, errno.EDQUOT):
                    self.forget_backlog()            # closed: nobody will read it
                    return
            self._size -= sent
            if sent < len(line):
                self._backlog.appendleft(line[sent:])
                self._try_later()
                break
        if self._lost and self._size <= LOG_BACKLOG // 2:
            gap = LOG.makeRecord(LOG.name, logging.WARNING, "", 0, "log_lines_lost", (), None,
                                 extra={"facts": {"count": self._lost}})
            self._lost = 0
            self.emit(gap)

    def _try_later(self) -> None:
        """Sets a timer.  The parent of workers has no event loop: its next line tries again."""
        def try_again() -> None:
            self._timer = None
            self._write_backlog()

        if self._timer is None:
            try:
                self._timer = asyncio.get_running_loop().call_later(LOG_RETRY, try_again)
            except RuntimeError:
                pass

    def forget_backlog(self) -> None:
        """Drops the lines that wait: a worker's parent writes its own ones itself."""
        self._backlog.clear()
        self._size = self._lost = 0

    def finish(self, end: float) -> None:
        """Gives the lines that are left until `end`, a time of time.monotonic()."""
        self._write_backlog()
        while self._backlog and time.monotonic() < end:
            time.sleep(0.01)
            self._write_backlog()

    def restore_flags(self) -> None:
        """Lets writes block again, for the programs that share the pipe or the terminal."""
        try:
            if self._was_blocking and self._descriptor == self._shared:
                os.set_blocking(self._descriptor, True)
        except OSError:
            pass

    def reopen_if_moved(self) -> None:
        """Opens the file again if its path no longer leads to it; keeps the descriptor's number.

        Never through a symlink, and no FIFO or device: who may write to the folder could have put
        it there.
        """
        try:
            now, then = os.lstat(self._path), os.fstat(self._descriptor)
            if (now.st_ino, now.st_dev) == (then.st_ino, then.st_dev):
                return
            if not stat.S_ISREG(now.st_mode):
                self._log_problem("is no regular file now, and is not opened again")
                return
        except OSError:
            pass
        try:
            fresh = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
                            | os.O_NOFOLLOW | os.O_NONBLOCK, 0o640)
            os.dup2(fresh, self._descriptor)
            os.close(fresh)
            self._is_problem_logged = False
        except OSError as error:
            self._log_problem(f"cannot be opened again: {error.strerror}")

    def _log_problem(self, problem: str) -> None:
        """Says once that the log is written to a file that has been moved away."""
        if not self._is_problem_logged and self._path:
            self._is_problem_logged = True
            log(logging.WARNING, "log_file", message=f"{self._path} {problem}")


LOG_BACKLOG = 1048576                    # bytes of lines that wait for one descriptor
LOG_RETRY = 0.1                          # seconds between two tries to write them
LOG_END_TIME = 0.2                       # seconds for the lines that are left
ROTATION_CHECK = 1.0                     # seconds between two looks at the path


def descriptor_path(descriptor: int) -> str:
    """The path of a descriptor of a regular file; "" for a terminal, a pipe or a closed one."""
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return ""
        if sys.platform == "darwin":
            import fcntl
            return fcntl.fcntl(descriptor, F_GETPATH, bytes(1024)).split(b"\0")[0].decode()
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        return "" if path.endswith(" (deleted)") else path
    except (OSError, ValueError):
        return ""


# From macOS's fcntl.h; not every build of Python has the name.
F_GETPATH = 50


def own_descriptor(descriptor: int) -> int:
    """A second descriptor of a pipe or a terminal, whose O_NONBLOCK no other program shares.

    The same descriptor where there is no such thing: a regular file, a socket, a pipe on macOS.
    """
    try:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        path = os.ttyname(descriptor) if os.isatty(descriptor) else f"/proc/self/fd/{descriptor}"
        return os.open(path, os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return descriptor


def start_logging(settings: Settings) -> List[LogFile]:
    """Sends info and below to stdout, warnings and errors to stderr.  Returns both files."""
    is_terminal = os.isatty(2)
    is_json = (settings.log_format or ("text" if is_terminal else "json")) == "json"
    is_coloured = is_terminal and "NO_COLOR" not in os.environ
    formatter = JsonFormatter() if is_json else TextFormatter(is_coloured)
    files = [LogFile(1, lambda level: level < logging.WARNING),
             LogFile(2, lambda level: level >= logging.WARNING)]
    for file in files:
        file.setFormatter(formatter)
    for name in ("aiapiproxy", "asyncio"):
        logger = logging.getLogger(name)
        logger.handlers[:] = files
        logger.propagate = False
        logger.setLevel(settings.log_level if name == "aiapiproxy" else logging.ERROR)
    logging.raiseExceptions = False
    sys.unraisablehook = lambda fault: log(logging.DEBUG, "unraisable", error=repr(fault.exc_value))
    return files


def finish_logging(files: List[LogFile], is_last: bool = True) -> None:
    """Writes the lines that are left, for at most LOG_END_TIME.

    `is_last`: no other process of ours writes to the same descriptors, whose flags are restored.
    """
    end = time.monotonic() + LOG_END_TIME
    for file in files:
        file.finish(end)
    for file in reversed(files) if is_last else ():
        file.restore_flags()


# ============================================================================
# 23. METRICS AND HISTORY
# ============================================================================
#
# A request's facts are the fields of its RequestRecord.  Handlers set them; when the request has
# ended, the record is given to the log, the metrics and the history, and each picks the fields that
# it shows.  Metrics are sums with bounded labels, so that those of several workers can be added.

# ---- 23.1 the record of a request ------------------------------------------

@dataclass
class RequestRecord:
    """The facts of one request.  A fact that a request does not have is None or "".

    The fields up to `outcome` are those of the log's `request` line, in its order; those behind it
    are for the metrics, the history and redaction.
    """
    request_id: str = ""
    method: str = ""
    path: str = ""                                   # redacted where it is no endpoint's
    status: int = 0                                  # of our response; 499: the client had left
    model: Optional[str] = None                      # the name that the client asks for
    upstream_model: Optional[str] = None
    stream: Optional[bool] = None                    # whether the client wants events
    session: str = ""                                # the id that Claude Code gives
    upstream_status: Optional[int] = None            # 0: the upstream did not respond
    upstream_request_id: str = ""                    # its x-request-id
    error: str = ""                                  # a ProxyError's log_message
    stop_reason: Optional[str] = None
    input_tokens: Optional[int] = None
    output_tokens: Optional[int] = None
    cache_read_input_tokens: Optional[int] = None
    client_request_id: str = ""                      # the client's x-request-id
    ttft_ms: Optional[float] = None                  # from the request's head to the first token
    duration_ms: float = 0.0
    bytes_out: int = 0                               # the response's head included
    client: str = ""                                 # its address
    outcome: str = "ok"
    time: float = 0.0                                # when it ended, seconds since 1970
    route: str = ""                                  # a key of ROUTES, or `other`
    first_token: Optional[float] = None              # a time of the event loop
    secrets: Tuple[str, ...] = ()                    # keys that no log line may show

    def set_error(self, error: ProxyError, outcome: str) -> None:
        """Sets the facts of a failure."""
        self.outcome, self.error = outcome, error.log_message[:300]

    def set_answer(self, stop_reason: Optional[str], usage: Json) -> None:
        """Sets the facts of an answer: why it stopped, and the tokens of its `usage`."""
        self.stop_reason = stop_reason
        for name in TOKEN_KINDS.values():
            setattr(self, name, usage.get(name))

    def log_fields(self) -> Json:
        """The fields of the log line, in their order.  A fact that is missing is left out."""
        values = {name: getattr(self, name) for name in LOG_FIELDS}
        return {name: value for name, value in values.items()
                if value not in (None, "") or name == "ttft_ms"}


TOKEN_KINDS = {"input": "input_tokens", "output": "output_tokens",
               "cache_read": "cache_read_input_tokens"}
LOG_FIELDS = [item.name for item in fields(RequestRecord)]
LOG_FIELDS = LOG_FIELDS[:LOG_FIELDS.index("outcome") + 1]


# ---- 23.2 metrics ----------------------------------------------------------

Sums = Mapping[str, Mapping[str, float]]     # a metric's name -> its labels -> the sum


class Metrics:
    """Sums by name and labels, histograms among them.  `sums` can be added up over workers."""

    def __init__(self) -> None:
        self.sums: Dict[str, Dict[str, float]] = defaultdict(lambda: defaultdict(int))
        self._models: Dict[str, str] = {}        # name -> label
        # Counters without labels are shown from the start: rates need a first value.
        for name in ("connections_opened", "connections_reused", "resends"):
            self.add(f"upstream_{name}_total", amount=0)

    def add(self, name: str, labels: str = "", amount: float = 1) -> None:
        """Adds to a sum.  `labels` are written as Prometheus does: `a="x",b="y"`."""
        self.sums[name][labels] += amount

    def add_sums(self, sums: Sums) -> None:
        """Adds the sums of another worker."""
        for name, series in sums.items():
            for labels, amount in series.items():
                self.add(name, labels, amount)

    def observe(self, name: str, seconds: float) -> None:
        """Adds to a histogram.  Each bucket counts only its own values; rendering adds them up."""
        self.add(name + "_bucket", str(bisect_left(BUCKETS, seconds)))
        self.add(name + "_sum", "", seconds)

    def model_label(self, model: str) -> str:
        """A model's name as a label, escaped and cut; after MAX_MODELS of them, `other`."""
        if model not in self._models and len(self._models) >= MAX_MODELS:
            return "other"
        label = model[:100].replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ")
        return self._models.setdefault(model, label)

    def add_request(self, record: RequestRecord) -> None:
        """Counts a request that has ended: its outcome, and the times and tokens of a message."""
        self.add("requests_total", f'route="{record.route}",status="{record.status}",'
                                   f'outcome="{record.outcome}"')
        if record.route != "/v1/messages":
            return
        self.observe("request_duration_seconds", record.duration_ms / 1000)
        if record.ttft_ms is not None:
            self.observe("time_to_first_token_seconds", record.ttft_ms / 1000)
        if record.output_tokens is not None:
            model = self.model_label(record.upstream_model or "")
            for kind, name in TOKEN_KINDS.items():
                labels = f'kind="{kind}",model="{model}"'
                self.add("tokens_total", labels, getattr(record, name) or 0)


BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)    # seconds
# Names of models: clients choose them, and the number of labels must be bounded.
MAX_MODELS = 20


def rendered_metrics(sums: Sums) -> bytes:
    """The metrics in Prometheus' text format 0.0.4."""
    lines: List[str] = []
    for name, (kind, help_text) in METRICS.items():
        full = "aiapiproxy_" + name
        lines += (f"# HELP {full} {help_text}", f"# TYPE {full} {kind}")
        if kind == "histogram":
            total = sums.get(name + "_sum", {}).get("", 0)
            lines += rendered_histogram(full, sums.get(name + "_bucket", {}), total)
        for labels, value in sorted(sums.get(name, {}).items()):
            lines.append(f"{full}{{{labels}}} {value:.15g}" if labels else f"{full} {value:.15g}")
    return ("\n".join(lines) + "\n").encode("utf-8", "replace")


def rendered_histogram(name: str, buckets: Mapping[str, float], total: float) -> Iterator[str]:
    """The lines of a histogram, whose buckets count all values up to their edge."""
    reached = 0.0
    for place, edge in enumerate((*BUCKETS, "+Inf")):
        reached += buckets.get(str(place), 0)
        yield f'{name}_bucket{{le="{edge}"}} {reached:.15g}'
    yield f"{name}_sum {total:.9g}"
    yield f"{name}_count {reached:.15g}"


METRICS = {
    "build_info": ("gauge", "Version of the proxy and of Python."),
    "uptime_seconds": ("gauge", "Seconds since the start."),
    "requests_total": ("counter", "Requests by route, status and outcome."),
    "in_flight": ("gauge", "API requests in work."),
    "tokens_total": ("counter", "Tokens by kind and upstream model."),
    "time_to_first_token_seconds":
        ("histogram", "From the request's head to the first token sent."),
    "request_duration_seconds": ("histogram", "From the request's head to the answer's last byte."),
    "upstream_seconds": ("histogram", "From sending the upstream's request to its response head."),
    "upstream_connections_opened_total": ("counter", "Connections opened to the upstream."),
    "upstream_connections_reused_total": ("counter", "Requests sent on a pooled connection."),
    "upstream_connections_idle": ("gauge", "Pooled connections that wait."),
    "upstream_resends_total": ("counter", "Requests sent again with a learned change."),
    "labels_left_out": ("gauge", "Labels counted as `other`, which other workers cannot see."),
    "learned_adjustments": ("gauge", "Changes that refusals have taught, by model."),
}


# ---- 23.3 history ----------------------------------------------------------

class History:
    """The last requests, and the last hour by minutes: the status page shows them."""

    def __init__(self) -> None:
        self.recent: Deque[Json] = deque(maxlen=RECENT_REQUESTS)  # the newest is the last
        self.minutes: Deque[Json] = deque(maxlen=60)  # sums of NO_REQUESTS' members

    def add(self, record: RequestRecord) -> None:
        """Adds a request that has ended.  The times of a minute are sums: workers add them up."""
        self.recent.append({name: getattr(record, name) for name in HISTORY_FIELDS})
        minute = int(record.time) // 60 * 60
        if not self.minutes or self.minutes[-1]["minute"] != minute:
            self.minutes.append({"minute": minute, **NO_REQUESTS})
        sums = self.minutes[-1]
        sums["requests"] += 1
        sums["errors"] += record.outcome not in ("ok", "client_gone")
        sums["first_tokens"] += record.ttft_ms is not None
        for name in (*TOKEN_KINDS.values(), "ttft_ms", "duration_ms"):
            sums[name] += getattr(record, name) or 0


RECENT_REQUESTS = 50
HISTORY_FIELDS = ("time", "status", "outcome", "ttft_ms", "duration_ms", "session", "error",
                  "model", "upstream_model", *TOKEN_KINDS.values(), "stop_reason")
NO_REQUESTS = dict.fromkeys(("requests", "errors", *TOKEN_KINDS.values(), "first_tokens", "ttft_ms",
                             "duration_ms"), 0)


def last_hour(minutes: Iterable[Json], now: float) -> List[Json]:
    """Sixty minutes, oldest first, with means of the times; minutes of several workers added up."""
    newest = int(now) // 60 * 60
    hour = {minute: {"minute": minute, **NO_REQUESTS}
            for minute in range(newest - 59 * 60, newest + 1, 60)}
    for entry in minutes:
        for name in NO_REQUESTS if entry["minute"] in hour else ():
            hour[entry["minute"]][name] += entry[name]
    for entry in hour.values():
        for name, count in (("ttft_ms", entry.pop("first_tokens")),
                            ("duration_ms", entry["requests"])):
            entry[name] = round(entry[name] / count, 1) if count else None
    return list(hour.values())


# ============================================================================
# 24. WHO MAY CALL
# ============================================================================
#
# The upstream's key is money: nobody may spend it who should not.  Web pages are judged
# by their Origin, requests in general by their Host and by the key that they present.

# ---- 24.1 origins and hosts ------------------------------------------------

def check_origin(exchange: Exchange, settings: Settings) -> None:
    """Sets a page's CORS headers, or raises ProxyError(403) where its origin may not call.

    A preflight is judged as the request that it announces.  Raises ProxyError(401) where a
    stranger's page has to present a key of its own and does not.
    """
    request = exchange.request
    origin, method = request.headers.get("origin"), request.method
    if origin is None or request.path.startswith("/health"):
        return
    if method == "OPTIONS":
        method = request.headers.get("access-control-request-method", "")
    is_own = is_own_origin(origin) or (origin in settings.allowed_origins and origin != "*")
    pages = access_of(settings).pages
    may_strangers = "*" in settings.allowed_origins and (
        pages is None or (method == "POST" and request.path in pages))
    if not (is_own or may_strangers):
        raise ProxyError(403, f"The origin {origin[:200]} may not call: list it in ALLOWED_ORIGINS")
    exchange.extra_headers = {
        "access-control-allow-origin": origin, "vary": "Origin",
        "access-control-expose-headers": "request-id, retry-after"}
    if not is_own and pages and request.method != "OPTIONS":
        upstream_key(request, settings)


class Access(NamedTuple):
    """Paths, of which None means all of them; /health* is open to everybody."""
    pages: Optional[Tuple[str, ...]]     # a stranger's page may call
    hosts: Optional[Tuple[str, ...]]     # the Host is checked


def access_of(settings: Settings) -> Access:
    """The row of ACCESS for these settings."""
    if settings.proxy_api_key:
        return ACCESS["guarded"]
    if settings.lends:
        return ACCESS["lending"]
    return ACCESS["local" if is_local_host(settings.hostname) else "remote"]


# A page of the owner's own machine, of an app or of ALLOWED_ORIGINS may call in all four cases.
# A model on this machine takes any made-up key, so there a stranger's key proves nothing.
ACCESS = {
    "guarded": Access(pages=None, hosts=()),             # PROXY_API_KEY is set
    "lending": Access(pages=(), hosts=None),             # the upstream has a credential
    "remote": Access(pages=("/v1/messages", "/v1/messages/count_tokens"),
                     hosts=("/", "/status", "/metrics")),            # with the clients' keys
    "local": Access(pages=(), hosts=None),
}


def is_own_origin(origin: str) -> bool:
    """Whether a page is of this machine or of an application.  `null` is neither."""
    scheme, separator, rest = origin.partition("://")
    if separator and scheme in ("app", "tauri", "vscode-webview", "capacitor"):
        return True
    match = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9.-]+)(:[0-9]{1,5})?", rest)
    return scheme in ("http", "https") and match is not None and is_loopback(match[1])


def preflight(exchange: Exchange) -> Response:
    """The response to OPTIONS: the headers and methods that a page may use.  [Fetch: CORS]"""
    requested = exchange.request.headers.get("access-control-request-headers", "")
    headers = {"allow": "GET, HEAD, POST, OPTIONS"}
    if exchange.extra_headers:
        headers["access-control-allow-methods"] = "GET, HEAD, POST, OPTIONS"
        headers["access-control-max-age"] = "600"
        if requested and re.fullmatch(r"[A-Za-z0-9_, -]*", requested):
            headers["access-control-allow-headers"] = requested
    return Response(204, b"", "", headers)


def check_host(request: Request, settings: Settings) -> None:
    """Raises ProxyError(403) for a Host that is not ours, where ACCESS has it checked.

    In DNS rebinding an attacker's name is made to point to this machine, so that a browser lets his
    page read our responses.  The Host header still has his name.  No name can be made to point to
    an address in the Host header, so that passes where other machines may call.
    """
    hosts, path = access_of(settings).hosts, request.path
    if path.startswith("/health") or "*" in settings.allowed_hosts \
            or (hosts is not None and path not in hosts):
        return
    host = re.sub(r":[0-9]*$", "", request.authority).strip("[]").lower()
    allowed = {name.lower() for name in (*settings.server_host, *settings.allowed_hosts)}
    if not (is_loopback(host) or host in allowed or request.authority.lower() in allowed
            or is_placeholder(host, request) or (exposed_hosts(settings) and is_address(host))):
        raise ProxyError(403, f"The host {request.authority[:200]} is not served: "
                         "list it in ALLOWED_HOSTS")


def is_address(host: str) -> bool:
    try:
        return bool(ipaddress.ip_address(host))
    except ValueError:
        return False


def is_placeholder(host: str, request: Request) -> bool:
    """Whether a Host is a single letter, sent by tools that write their heads by hand.

    A page cannot send that: its POST has an Origin.  [Fetch 3.2]
    """
    return (len(host) == 1 and host.isalpha() and request.method == "POST"
            and "origin" not in request.headers)


# ---- 24.2 keys -------------------------------------------------------------

def check_key(request: Request, settings: Settings) -> None:
    """Raises ProxyError(401) unless the client presents one of PROXY_API_KEY, where that is set."""
    path = request.path
    if not settings.proxy_api_key or path in ("/health", "/health/live", "/health/ready") \
            or (request.method == "HEAD" and path == "/"):
        return
    keys = presented_keys(request, settings)
    is_for_browsers = path in ("/", "/metrics", "/status")
    if is_for_browsers:
        keys += basic_passwords(request)
    # A list, not a generator: any() must not end with the first match.
    if not any([is_proxy_key(key, settings) for key in keys]):
        headers = {"www-authenticate": 'Basic realm="aiapiproxy"'} if is_for_browsers else {}
        raise ProxyError(401, "The key is not one of PROXY_API_KEY" if keys else
                         "A key is required: send one of PROXY_API_KEY as x-api-key or "
                         "Authorization: Bearer", headers=headers)


def is_proxy_key(key: str, settings: Settings) -> bool:
    """Whether a key is one of PROXY_API_KEY; compares in constant time, and with all of them."""
    given = key.encode("utf-8", "replace")
    return any([hmac.compare_digest(given, known.encode()) for known in settings.proxy_api_key])


def presented_keys(request: Request, settings: Settings) -> List[str]:
    """The keys that a request presents, in all ways that clients do it, without repetitions."""
    keys = []
    for name in dict.fromkeys((settings.api_key_header.lower(), "authorization", "x-api-key")):
        value = request.headers.get(name, "").strip()
        scheme, _, rest = value.partition(" ")
        if scheme.lower() == "bearer":
            value = rest.strip()
        elif name == "authorization" and (rest or settings.api_key_header.lower() != name):
            value = ""
        if value and value not in keys:
            keys.append(value)
    return keys


def basic_passwords(request: Request) -> List[str]:
    """The password of HTTP Basic, if there is one: browsers send a key in this way."""
    value = request.headers.get("authorization", "")
    match = re.fullmatch(r"(?i)basic +([A-Za-z0-9+/=]+)", value)
    try:
        return [base64.b64decode(match[1]).decode("utf-8").partition(":")[2]] if match else []
    except ValueError:
        return []


def upstream_key(request: Request, settings: Settings) -> str:
    """The key for the upstream: ours, or else the client's own.  Raises ProxyError(401).

    It is empty where a header or the URL holds the upstream's credential.
    """
    if not settings.passes_keys_on:
        return settings.openai_api_key
    keys = [key for key in presented_keys(request, settings) if not is_proxy_key(key, settings)]
    usable = [key for key in keys
              if not key.startswith("sk-ant-") and re.fullmatch(r"[\x21-\x7e]+", key)]
    if usable:
        return usable[0]
    if any(key.startswith("sk-ant-") for key in keys):
        raise ProxyError(401, "The key is one of Anthropic's (sk-ant-…) and is not passed on to "
                         "another company: set OPENAI_API_KEY, or present a key of the upstream")
    raise ProxyError(401, "No key for the upstream: set OPENAI_API_KEY, or present a key of the "
                     "upstream (ANTHROPIC_AUTH_TOKEN)")


# ============================================================================
# 25. ONE REQUEST
# ============================================================================
#
# POST /v1/messages, from the request's body to the last event:
#
#     create_message     reads the params and translates them
#     call_upstream      sends the body; adjusts it and retries where an error asks for that
#     Relay              carries the answer to the client while it arrives
#
# An error before the first byte of the response is an HTTP status; after that the translator
# writes it into the stream.

# ---- 25.1 the request ------------------------------------------------------

async def create_message(app: App, exchange: Exchange) -> Optional[Response]:
    """POST /v1/messages: translate, call the upstream, translate back.  [Anthropic: Messages]"""
    key = upstream_key(exchange.request, app.settings)
    params = await exchange.json(app.settings.max_request_size, app.shortcuts.parse_body)
    await let_others_run(exchange)
    translation = checked_translation(params, app.settings, client_session(exchange))
    await let_others_run(exchange)
    prepare_exchange(app, exchange, translation, key)
    recording = None
    if app.recorder is not None and app.settings.record_dir:
        recording = app.recorder(exchange, translation, params, app.settings)
    del params                           # only one copy stays in memory
    try:
        return await call_and_relay(app, exchange, translation, key, recording)
    finally:
        if recording is not None:
            recording.save()


async def let_others_run(exchange: Exchange) -> None:
    """Lets other streams run: a step on a body over 1 MB blocks the event loop for up to 0.2 s."""
    if exchange.body_size > LARGE_BODY:
        await asyncio.sleep(0)


LARGE_BODY = 1048576                     # bytes


async def call_and_relay(app: App, exchange: Exchange, translation: Translation, key: str,
                         recording: Any) -> Optional[Response]:
    """Calls the upstream and sends its answer as events, or returns it as a Response."""
    message = None if translation.is_streamed else MessageWriter(translation, app.new_id)
    writer = message or EventWriter(translation, app.new_id, exchange.id)
    translator = StreamTranslator(translation, app.new_id, writer, app.shortcuts)
    response = await call_upstream(app, exchange, translation, key)
    if response is None:
        events = translator.empty()
        record_answer(app, exchange.record, translation, translator)
        if events:
            await exchange.send(events, is_last=True)
    else:
        exchange.extra_headers.update(ratelimit_headers(response.headers, time.time()))
        if recording is not None:
            recording.answered(response)
        relay = Relay(app, exchange, translation, response, recording, translator)
        try:
            await relay.run()
        finally:
            relay.close()
    return json_response(message.message) if message is not None else None


def checked_translation(params: Json, settings: Settings, session: str = "",
                        is_counting: bool = False) -> Translation:
    """The translation of params that are as a client sent them.

    Raises ProxyError, also for numbers and nesting that Python or JSON cannot represent.
    """
    try:
        check_fields(params, is_counting)
        return translation_of(params, target_of(params["model"], settings), session, is_counting)
    except (ValueError, RecursionError) as error:
        problem = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ProxyError(400, f"{NOT_JSON}: {problem}") from None


def client_session(exchange: Exchange) -> str:
    """The id that Claude Code gives to all requests of one session."""
    return exchange.request.headers.get("x-claude-code-session-id", "")


def model_for_log(name: str) -> str:
    """A model's name for the log.  Clients choose it and could put a key or anything else there."""
    return redacted(name, ())[:200]


def prepare_exchange(app: App, exchange: Exchange, translation: Translation, key: str) -> None:
    """Sets a request's facts for log and redaction; applies the adjustments of its model."""
    record, model = exchange.record, translation.profile.model
    is_new = len(key) >= SECRET_LENGTH and key not in app.secrets
    translation.secrets = record.secrets = (*app.secrets, key) if is_new else app.secrets
    translation.is_mostly_non_ascii = (
        exchange.is_mostly_non_ascii and exchange.body_size > LARGE_BODY)
    record.model = model_for_log(translation.requested_model)
    record.upstream_model = model_for_log(model)
    record.stream = translation.is_streamed
    record.session = redacted(client_session(exchange), record.secrets)[:100]
    if translation.dropped_fields:
        names = ", ".join(translation.dropped_fields)[:300]
        log(logging.INFO, "dropped", request_id=exchange.id, names=names)
    apply_adjustments(app.adjustments.get(model, {}), translation)
    if app.shortcuts.count_tokens is not None:
        translation.estimate_tokens = partial(
            translation.estimate_tokens, count=app.shortcuts.count_tokens)


# Characters: a shorter key is taken for a placeholder, which may occur in any text.
SECRET_LENGTH = 8


async def call_upstream(app: App, exchange: Exchange, translation: Translation,
                        key: str) -> Optional[UpstreamResponse]:
    """The upstream's response, once it is one of success; None for an answer without content:
    max_tokens is 0, or was used up before the first visible token.

    An error that asks for an adjustment changes the body, which is sent again.  Raises
    UpstreamError.
    """
    if translation.is_empty:
        return None
    exchange.watch_client()
    for tries_left in range(MAX_ADJUSTED_RETRIES, -1, -1):
        response = await send_body(app, exchange, translation, key)
        if 200 <= response.status < 300:
            return response
        body = await response.read_all(ERROR_BODY, is_cut=True)
        response.close()
        if response.status == 400 and OUTPUT_LIMIT in body:
            return None
        found = adjustment_for(response.status, body, translation) if tries_left else None
        if found is None:
            break
        app.metrics.add("upstream_resends_total")
        adjustment, argument = found
        if adjustment.is_remembered:
            remember_adjustment(app, exchange, translation, adjustment.name, argument)
    error = upstream_error(response.status, response.headers, body, translation, time.time())
    if error.is_context_overflow:
        log(logging.INFO, "context_overflow", request_id=exchange.id,
            upstream_status=response.status, told=error.message)
    raise error


async def send_body(app: App, exchange: Exchange, translation: Translation,
                    key: str) -> UpstreamResponse:
    """Sends the body and reads the response's head.  Raises UpstreamError.

    An answer that the client wants whole has REQUEST_TIMEOUT up to its head, also where it is
    streamed upstream; each part of a stream has STREAM_TIMEOUT.
    """
    is_streamed = translation.body.get("stream") is True
    stream_limit, began = app.stream_limit, app.loop.time()      # SIGHUP may change it meanwhile
    response = await app.upstream.send(
        "POST", APIS[translation.target.api].path,
        encoded_body(translation, app.shortcuts.encode_body or json_bytes), key, is_streamed,
        stream_limit if is_streamed and translation.is_streamed else app.request_limit)
    app.metrics.observe("upstream_seconds", app.loop.time() - began)
    record, upstream_id = exchange.record, response.headers.get("x-request-id", "")
    record.upstream_status = response.status
    record.upstream_request_id = redacted(upstream_id, record.secrets)[:100]
    if is_streamed and 200 <= response.status < 300:
        response.timeout, response.is_live = stream_limit, True
    return response


def encoded_body(translation: Translation,
                 as_ascii: Callable[[Json], bytes] = json_bytes) -> bytes:
    """The bytes of the body; sets their number.  Raises ProxyError(400).

    A large body that is mostly non-ASCII is sent as UTF-8, since escapes would double its size.
    """
    encode = utf8_json_bytes if translation.is_mostly_non_ascii else as_ascii
    try:
        data = encode(translation.body)
    except ValueError as error:
        raise ProxyError(400, f"{NOT_JSON}: {error}") from None
    translation.sent_bytes = len(data)
    return data


def remember_adjustment(app: App, exchange: Exchange, translation: Translation, name: str,
                        argument: Any) -> None:
    """Applies an adjustment to all later requests of its model; lists are joined."""
    model = translation.profile.model
    if model not in app.adjustments and len(app.adjustments) >= ADJUSTED_MODELS:
        del app.adjustments[next(iter(app.adjustments))]         # the oldest
    adjustments = app.adjustments.setdefault(model, {})
    known = adjustments.get(name)
    if isinstance(argument, list) and isinstance(known, list):
        argument = known + [item for item in argument if item not in known]
    adjustments[name] = argument
    log(logging.INFO, "learned", request_id=exchange.id, upstream_model=model, adjustment=name,
        value=argument if argument is not True else None,
        message=f"{model}: {name.replace('_', ' ')}, from now on")


ADJUSTED_MODELS = 100                    # clients choose the names of models


# ---- 25.2 the answer -------------------------------------------------------

class Relay:
    """Carries one answer from the upstream to the client, and keeps the client awake meanwhile."""

    def __init__(self, app: App, exchange: Exchange, translation: Translation,
                 reply: UpstreamResponse, recording: Any, translator: StreamTranslator) -> None:
        self._app, self._exchange, self._translation = app, exchange, translation
        self._reply, self._recording, self._translator = reply, recording, translator
        self._loop = app.loop
        self._last_events = b""              # of the end, still to be sent
        self._last_read = self._loop.time()
        self._timer: Optional[asyncio.TimerHandle] = None
        if translation.is_streamed:
            self._timer = self._loop.call_later(FIRST_CHUNK_WAIT, self._tick)

    async def run(self) -> None:
        """Carries the answer to its end.  Raises ProxyError while that can be an HTTP status."""
        try:
            await self._run()
        except Exception as error:
            if isinstance(error, ClientDisconnected) or not self._exchange.has_begun():
                raise
            if not isinstance(error, UpstreamError):
                log_internal_error(self._app, self._exchange, error)
                error = ProxyError(500, "Internal error")
            await self._send(self._translator.fail(error))
        except asyncio.CancelledError:
            if not self._exchange.is_shut_down or not self._exchange.has_begun():
                raise
            error_of_end = ProxyError(529, "The proxy is shutting down")
            self._exchange.record.set_error(error_of_end, "shutdown")
            # If the end was translated just before the cancellation, the answer is complete.
            events = self._last_events or self._translator.fail(error_of_end)
            self._exchange.send_now(events, is_last=True)

    async def _run(self) -> None:
        """Asks once whether the upstream sends events or JSON, and translates it."""
        translator, reply = self._translator, self._reply
        start = await read_start(reply)
        if is_event_stream(reply.claims_events, start):
            events = await self._read_stream(start)
        else:
            body = start if reply.is_complete else start + await reply.read_all(ANSWER_BODY)
            events = translator.whole(body)
        record_answer(self._app, self._exchange.record, self._translation, translator)
        if events:                           # none for a client that wants one message
            await self._send(events)

    async def _read_stream(self, start: bytes) -> bytes:
        """Translates and sends a stream of events; returns the last of them."""
        translator, reply = self._translator, self._reply
        self._last_read = self._loop.time()
        events = translator.feed(start)
        while not translator.done:
            if events:
                await self._send(events)
            if not translator.reader.has_finished:   # comments may not keep it open after that
                self._last_read = self._loop.time()
            try:
                await reply.pump(self._pass_on)
                events, self._last_events = self._last_events, b""
                if translator.done:
                    continue
                if self._exchange.has_unsent():
                    await self._exchange.drain()
                data = await reply.read()
            except UpstreamError as error:
                events = translator.fail(error)
                continue
            events = translator.feed(data) if data else translator.finish()
        return events

    def _pass_on(self, data: bytes, now: float) -> bool:
        """Translates and sends the bytes of one read; True where more has to be done than that."""
        translator, exchange = self._translator, self._exchange
        events = translator.feed(data)
        if translator.done:
            self._last_events = events
            return True
        if not translator.reader.has_finished:
            self._last_read = now
        if events:
            self._note_first_token()
            exchange.send_now(events, False, now)
        return exchange.has_unsent()

    def _note_first_token(self) -> None:
        record = self._exchange.record
        if record.first_token is None and self._translator.machine.has_content:
            record.first_token = self._loop.time()

    async def _send(self, events: bytes) -> None:
        self._note_first_token()
        if self._recording is not None:
            self._recording.add("events", events)
        self._exchange.send_now(events, is_last=self._translator.done)
        if self._exchange.has_unsent():
            await self._exchange.drain()

    def _tick(self) -> None:
        """Timer: sends message_start or a ping when no event was sent for a while.  Closes the
        upstream's connection when [DONE] never arrives."""
        translator, exchange, now = self._translator, self._exchange, self._loop.time()
        if translator.reader.has_finished and now - self._last_read >= LAST_CHUNK_WAIT:
            self._reply.abandon()
            return
        if not exchange.has_begun():
            exchange.send_now(translator.begin())
        elif now - exchange.last_write >= PING_INTERVAL - 0.01:
            if not exchange.is_over_write_limit():
                exchange.send_now(translator.ping())
        due = min(exchange.last_write + PING_INTERVAL, self._last_read + LAST_CHUNK_WAIT)
        self._timer = self._loop.call_at(due if due > now + 0.1 else now + 1, self._tick)

    def close(self) -> None:
        """Gives the connection back, or closes it if the answer has not been read to its end."""
        if self._timer is not None:
            self._timer.cancel()
        translator, reply = self._translator, self._reply
        has_ended = translator.done and translator.error is None and not translator.reader.was_cut
        if reply.is_complete or not has_ended:
            reply.close()
        else:
            self._app.spawn(reply.finish())


def record_answer(app: App, record: RequestRecord, translation: Translation,
                  translator: StreamTranslator) -> None:
    """Sets the facts of an answer that has ended: its stop reason and tokens, or its error."""
    error, machine = translator.error, translator.machine
    if error is not None:
        is_upstream = isinstance(error, UpstreamError)
        record.set_error(error, "upstream_error" if is_upstream else "shutdown")
        return
    record.set_answer(machine.stop["stop_reason"], machine.usage)
    warn_of_truncation(app, translation, machine.usage)


async def read_start(reply: UpstreamResponse) -> bytes:
    """The start of an answer that tells events from JSON: a first byte, or a whole line of JSON.
    White space does not count.  Raises UpstreamError for an empty body."""
    start = data = await reply.read()
    while data and len(start) <= ERROR_BODY and (
            not start.strip() or start.lstrip()[:1] in (b"{", b"[") and b"\n" not in start.strip()):
        data = await reply.read()
        start += data
    if not start.strip():
        raise UpstreamError(502, EMPTY_ANSWER)
    return start


def warn_of_truncation(app: App, translation: Translation, usage: Json) -> None:
    """Warns once for each model of a server that has cut the prompt: the token count shows it.
    Ollama and others do so without a word."""
    if translation.profile.host_class != "other":
        return
    prompt = sum(usage[name] for name in (
        "input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens"))
    model = translation.profile.model
    if prompt * MANY_BYTES > translation.sent_bytes or model in app.truncation_warned:
        return
    estimate = translation.input_estimate()
    if estimate >= TRUNCATION_PROMPT and 0 < prompt * 2 < estimate:
        app.truncation_warned.add(model)
        log(logging.WARNING, "prompt_truncated", upstream_model=model, prompt_tokens=prompt,
            estimate=estimate,
            message=f"{model} saw {prompt} tokens of a prompt of about {estimate}: "
            "the server has cut it. Raise its context window (Ollama: OLLAMA_CONTEXT_LENGTH=65536)")


FIRST_CHUNK_WAIT = 5.0                   # seconds until a stream starts without a chunk
PING_INTERVAL = 10.0                     # seconds; clients give up after 300
LAST_CHUNK_WAIT = 10.0                   # seconds from the finish reason to the end
ERROR_BODY = 1048576                     # bytes of an error's body that are read
ANSWER_BODY = 67108864                   # bytes of a whole answer: 64 MiB
MANY_BYTES = 5                           # bytes for each token: nothing was cut
TRUNCATION_PROMPT = 3000                 # estimated tokens; a shorter prompt proves nothing


# ---- 25.3 the application, and helpers of handlers --------------------------

class App:
    """The state that all requests share: settings, upstream, adjustments, counts."""

    def __init__(self, settings: Settings, page: str = "", counters: Any = None, slot: int = 0,
                 recorder: Optional[Recorder] = None, shortcuts: Shortcuts = PLAIN) -> None:
        """Runs in an event loop.  Raises OSError, ssl.SSLError for unusable CA certificates.

        Part IV gives `page`, `counters` and `recorder`; nothing here names it.  Counters are an
        object with `slots`, `write(slot, value)` and `read(slot)`.
        """
        self.page, self.recorder, self.shortcuts = page, recorder, shortcuts
        self.counters = counters                 # shared by several workers; None: there is one
        self.slot = slot                         # this worker's place in them
        self.metrics, self.history = Metrics(), History()
        self.began, self.in_flight, self.is_draining = time.time(), 0, False
        self.adjustments: Dict[str, Dict[str, Any]] = {}     # upstream model -> name -> argument
        self.tasks: Set[asyncio.Task] = set()    # see spawn()
        self.truncation_warned: Set[str] = set()  # upstream models
        self.pid = os.getpid() if counters is None else os.getppid()  # of the supervisor, if any
        self.loop = asyncio.get_running_loop()
        self.new_id = random_id
        self._is_published = True
        self.upstream: Upstream = None           # type: ignore[assignment]
        self.apply_settings(settings)

    def apply_settings(self, settings: Settings) -> None:
        """Uses these settings from now on: at the start, and on SIGHUP.

        Requests in work keep the old ones.
        """
        upstream = upstream_client(settings, self.metrics)
        if self.upstream is not None:
            self.upstream.close()
        self.settings, self.upstream = settings, upstream
        self.adjustments.clear()
        self.stream_limit = TimeLimit(settings.stream_timeout, "STREAM_TIMEOUT")
        self.request_limit = TimeLimit(settings.request_timeout, "REQUEST_TIMEOUT")
        self.secrets = tuple(settings.secrets())

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs work that nobody waits for.  The event loop keeps only a weak reference to it."""
        task = asyncio.ensure_future(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def uptime(self) -> float:
        """Seconds since the start."""
        return round(time.time() - self.began, 3)

    # The counts of several workers

    def record_request(self, record: RequestRecord) -> None:
        """Counts a request that has ended, and publishes the counts to the other workers soon."""
        self.metrics.add_request(record)
        if record.route == "/v1/messages":
            self.history.add(record)
        if self.counters is not None and self._is_published:
            self._is_published = False
            self.loop.call_later(PUBLISH_TIME, self.publish)

    def publish(self) -> None:
        """Shows the counts of this worker to the others."""
        self._is_published = True
        if self.counters is not None:
            self.counters.write(self.slot, self.snapshot())

    def snapshot(self) -> Json:
        """The counts of this worker, and its state."""
        return {"sums": self.metrics.sums, "in_flight": self.in_flight,
                "idle": self.upstream.idle_count, "recent": list(self.history.recent),
                "minutes": list(self.history.minutes), "adjustments": [
                    (model, name, argument) for model, adjustments in self.adjustments.items()
                    for name, argument in adjustments.items()]}

    def merged_snapshots(self) -> Json:
        """The snapshots of all workers as one: sums and numbers are added up, lists joined."""
        slots = range(self.counters.slots) if self.counters is not None else ()
        others = [self.counters.read(slot) for slot in slots if slot != self.slot]
        workers, total = [self.snapshot(), *filter(None, others)], Metrics()
        for counts in workers:
            total.add_sums(counts["sums"])
        return {"sums": total.sums,
                **{name: sum(counts[name] for counts in workers) for name in ("in_flight", "idle")},
                **{name: [item for counts in workers for item in counts[name]]
                   for name in ("recent", "minutes", "adjustments")}}

    def restore_counters(self) -> None:
        """Continues the counts of a worker that had this slot before and has died."""
        found = self.counters.read(self.slot) if self.counters is not None else {}
        self.metrics.add_sums(found.get("sums", {}))
        self.history.recent.extend(found.get("recent", ()))
        self.history.minutes.extend(found.get("minutes", ()))


def upstream_client(settings: Settings, metrics: Metrics) -> Upstream:
    """The client of the upstream that the settings name.  Raises OSError, ssl.SSLError."""
    url = settings.openai_base_url
    is_https = url.scheme == "https"
    proxy = settings.https_proxy if is_https else settings.http_proxy
    return Upstream(
        url, TimeLimit(settings.request_timeout, "REQUEST_TIMEOUT"),
        headers=settings.upstream_headers,
        tls=tls_context(settings.ssl_cert_file, settings.ssl_cert_dir) if is_https else None,
        proxy=outgoing_proxy(url.hostname or "", proxy, settings.no_proxy),
        on_connection=lambda is_reused: metrics.add(
            f"upstream_connections_{'reused' if is_reused else 'opened'}_total"))


# Builds the recording of an exchange: exchange, translation, params, settings (29).
Recorder = Callable[[Exchange, Translation, Json, Settings], Any]
PUBLISH_TIME = 0.05                      # seconds; several requests are then published at once


def random_id(size: int) -> str:
    """A random string of `size` letters and digits."""
    return base64.b64encode(os.urandom(size), b"Zz")[:size].decode()


def log_internal_error(app: App, exchange: Exchange, error: Exception) -> None:
    """Logs a fault of the proxy itself, with its traceback where RUST_BACKTRACE asks for it."""
    text = redacted(f"{type(error).__name__}: {error}", (*app.secrets, *exchange.record.secrets))
    log(logging.ERROR, "internal_error", request_id=exchange.id, path=exchange.request.path,
        error=text[:500])
    if app.settings.rust_backtrace:
        LOG.error("traceback", exc_info=error)


def json_response(value: Any, status: int = 200, headers: Headers = {}) -> Response:
    return Response(status, json_bytes(value), headers=headers)


# ============================================================================
# 27. OTHER ENDPOINTS
# ============================================================================
#
# `respond` answers a request: it checks who calls, and finds the endpoint's function in ROUTES.  It
# is the only place that turns an exception into a response, so an endpoint simply raises.
# `finish_exchange` counts and logs a request when it has ended.

# ---- 27.1 tokens and models ------------------------------------------------

async def count_tokens(app: App, exchange: Exchange) -> Response:
    """POST /v1/messages/count_tokens: estimated here, without the upstream.  [Anthropic]"""
    params = await exchange.json(app.settings.max_request_size, app.shortcuts.parse_body)
    translation = checked_translation(params, app.settings, is_counting=True)
    record = exchange.record
    record.model = model_for_log(translation.requested_model)
    record.upstream_model = model_for_log(translation.profile.model)
    encoded_body(translation)            # raises where /v1/messages would
    record.input_tokens = translation.input_estimate()
    return json_response({"input_tokens": record.input_tokens})


async def list_models(app: App, exchange: Exchange) -> Response:
    """GET /v1/models: the Claude names, so that clients' pickers work.  [Anthropic: list models]

    With `after_id` or without a cursor a page starts at the front, with `before_id` it is the end
    of the names before that.  `has_more` is about the page's direction.
    """
    query = dict(parse_qsl(exchange.request.query, keep_blank_values=True))
    limit, after, before = query.get("limit", "20"), query.get("after_id"), query.get("before_id")
    if not re.fullmatch(r"[0-9]{1,5}", limit) or not 1 <= int(limit) <= 1000:
        raise ProxyError(400, "limit: Input should be between 1 and 1000")
    for cursor, name in (("after_id", after), ("before_id", before)):
        if name and name not in CLAUDE_MODELS:
            raise ProxyError(400, f"{cursor}: unknown model id")
    if after and before:
        raise ProxyError(400, "after_id: may not be given together with before_id")
    is_active = "active" in query.get("lifecycle", "active").split(",")      # no name is retired
    start = CLAUDE_MODELS.index(after) + 1 if after else 0
    end = CLAUDE_MODELS.index(before) if before else None
    names = CLAUDE_MODELS[start:end] if is_active else ()
    page = names[-int(limit):] if before else names[:int(limit)]
    return json_response({
        "data": [model_object(name, app.settings) for name in page],
        "has_more": len(page) < len(names),
        "first_id": page[0] if page else None, "last_id": page[-1] if page else None})


async def get_model(app: App, exchange: Exchange) -> Response:
    """GET /v1/models/{id}: a Claude name, or one of the configured models."""
    name = unquote(exchange.request.path[len("/v1/models/"):])
    is_claude = re.search("claude|haiku|sonnet|opus", name, re.I)
    if not name or not (is_claude or name in model_map(app.settings).values()):
        raise ProxyError(404, f"model: {redacted(name, ())[:200]}")
    return json_response(model_object(name, app.settings))


def model_object(name: str, settings: Settings) -> Json:
    """A model as the Anthropic API describes it; its display name tells the upstream's model."""
    _, line, *version = name.split("-") if name in CLAUDE_MODELS else ("", "")
    shown = f"Claude {line.capitalize()} {'.'.join(version)}" if line else name
    return {"type": "model", "id": name,
            "display_name": f"{shown} ({upstream_model(name, settings)})",
            "created_at": "1970-01-01T00:00:00Z", "lifecycle": "active", "line": line or None,
            "max_input_tokens": None, "max_tokens": None, "capabilities": None,  # unknown here
            "deprecated_at": None, "retires_at": None}


CLAUDE_MODELS = ("claude-opus-5-5", "claude-sonnet-5-5", "claude-haiku-5-5", "claude-opus-5",
                 "claude-sonnet-5", "claude-opus-4-8", "claude-sonnet-4-6", "claude-haiku-4-5")


# ---- 27.2 health, metrics and status ---------------------------------------

async def get_health(app: App, exchange: Exchange) -> Response:
    """GET /health and /health/live: 200 as long as the proxy serves.  GET /health/ready: whether a
    load balancer should send requests here.  None of them waits for the upstream.
    """
    path = exchange.request.path
    reason = unready_reason(app) if path == "/health/ready" else ""
    answer = {
        "status": "not_ready" if reason else HEALTH_WORDS[path], "service": "aiapiproxy",
        "version": __version__, "timestamp": rfc3339(time.time()), "uptime_seconds": app.uptime(),
        "in_flight": app.merged_snapshots()["in_flight"], "pid": app.pid}
    return json_response({**answer, "reason": reason}, 503) if reason else json_response(answer)


HEALTH_WORDS = {"/health": "ok", "/health/live": "alive", "/health/ready": "ready"}


def unready_reason(app: App) -> str:
    """The reason why requests should go elsewhere; "" if they need not.

    An upstream counts as unreachable when its last connection attempts all failed, three or more of
    them, the newest less than RECENT_ATTEMPT ago: an idle proxy must not stay unready for ever.
    """
    if app.is_draining:
        return "shutting down"
    attempts = app.upstream.attempts
    if (len(attempts) >= 3 and not any(is_good for _, is_good in attempts)
            and app.loop.time() - attempts[-1][0] < RECENT_ATTEMPT):
        return f"the last {len(attempts)} connections to {app.upstream.host} failed"
    return ""


RECENT_ATTEMPT = 60.0                    # seconds


async def get_metrics(app: App, exchange: Exchange) -> Response:
    """GET /metrics: the sums of all workers, and their gauges.  [Prometheus: text format 0.0.4]"""
    counts, python = app.merged_snapshots(), ".".join(map(str, sys.version_info[:3]))
    text = rendered_metrics({
        **counts["sums"], "build_info": {f'version="{__version__}",python="{python}"': 1},
        "uptime_seconds": {"": app.uptime()}, "in_flight": {"": counts["in_flight"]},
        "upstream_connections_idle": {"": counts["idle"]},
        "learned_adjustments": {f'model="{app.metrics.model_label(model)}",adjustment="{name}"': 1
                                for model, name, _ in counts["adjustments"]}})
    return Response(200, text, "text/plain; version=0.0.4; charset=utf-8")


async def get_status(app: App, exchange: Exchange) -> Response:
    """GET /status: the data of the status page.  It holds no prompt and no key."""
    settings, counts, reason = app.settings, app.merged_snapshots(), unready_reason(app)
    recent = sorted(counts["recent"], key=lambda request: request["time"], reverse=True)
    messages = {labels: amount for labels, amount in counts["sums"]["requests_total"].items()
                if 'route="/v1/messages"' in labels}
    errors = sum(amount for labels, amount in messages.items()
                 if not labels.endswith(('outcome="ok"', 'outcome="client_gone"')))
    return json_response({
        "version": __version__, "uptime_seconds": app.uptime(),
        "health": "not_ready" if reason else "ready", "reason": reason,
        "upstream": {"host": app.upstream.host,
                     "url": settings.openai_base_url._replace(query="").geturl()},
        "models": model_map(settings), "workers": settings.workers,
        "in_flight": counts["in_flight"], "requests": sum(messages.values()), "errors": errors,
        "recent": [{**request, "time": rfc3339(request["time"])}
                   for request in recent[:RECENT_REQUESTS]],
        "minutes": last_hour(counts["minutes"], time.time()),
        "adjustments": [{"model": model, "adjustment": name.replace("_", " "),
                         "value": "" if value is True else str(value)}
                        for model, name, value in counts["adjustments"]],
        "environment": shell_lines(settings, exchange.request.authority)})


# ---- 27.3 routes -----------------------------------------------------------

async def respond(app: App, exchange: Exchange) -> Optional[Response]:
    """The response to a request; None where it was sent as events.

    Every exception ends here, except the two that mean that nobody waits for a response.
    """
    try:
        return await dispatch(app, exchange)
    except ProxyError as error:
        return error_response(exchange, error)
    except ClientDisconnected:
        raise
    except asyncio.CancelledError:
        if not exchange.is_shut_down:
            raise
        return error_response(exchange, ProxyError(529, "The proxy is shutting down"))
    except Exception as error:
        log_internal_error(app, exchange, error)
        if exchange.has_begun():
            # The client would read a second head as part of the stream.
            raise ClientDisconnected from None
        return error_response(exchange, ProxyError(500, "Internal error"))


def error_response(exchange: Exchange, error: ProxyError) -> Response:
    """An error as a response.  Sets the outcome and the error of the request's record."""
    record = exchange.record
    record.set_error(error, "shutdown" if exchange.is_shut_down else error.outcome)
    if isinstance(error, UpstreamError):
        record.upstream_status = error.upstream_status
    return json_response(error_fields(error, exchange.id), error.status, error.headers)


async def dispatch(app: App, exchange: Exchange) -> Optional[Response]:
    """Checks who calls and what is asked for, and calls the route's handler.  Raises ProxyError."""
    request, settings = exchange.request, app.settings
    check_host(request, settings)
    check_origin(exchange, settings)
    if request.method == "OPTIONS":
        return preflight(exchange)
    check_key(request, settings)
    route = ROUTES.get(route_path(request.path))
    if route is None:
        raise ProxyError(404, f"{request.method} {request.path[:200]} is not available here")
    methods = ("GET", "HEAD") if route.method == "GET" else (route.method,)
    if request.method not in methods:
        allowed = ", ".join(methods)
        raise ProxyError(405, f"{request.path} takes {allowed}", headers={"allow": allowed})
    if request.headers.get("expect", "100-continue").lower() != "100-continue":
        raise ProxyError(417, "The only expectation that is met here is 100-continue")
    if not route.is_api:
        return await route.handle(app, exchange)
    if request.method == "POST":
        check_body_headers(request.headers, settings.max_request_size)
    if app.is_draining or app.in_flight >= settings.max_concurrent_requests:
        raise ProxyError(529, "The proxy is shutting down" if app.is_draining else
                         f"{app.in_flight} requests are in work already (MAX_CONCURRENT_REQUESTS)",
                         headers={"retry-after": "1"})
    app.in_flight += 1
    try:
        return await route.handle(app, exchange)
    finally:
        app.in_flight -= 1


def route_path(path: str) -> str:
    """The key of ROUTES for a path; `other` where there is none."""
    return path if path in ROUTES else "/v1/models/" if path.startswith("/v1/models/") else "other"


def check_body_headers(headers: Headers, limit: int) -> None:
    """Raises ProxyError for a body that must not or cannot be read."""
    if "content-length" not in headers and "transfer-encoding" not in headers:
        raise ProxyError(411, "Content-Length or chunked coding is required")
    if headers.get("content-encoding", "identity").lower() not in ("identity", ""):
        raise ProxyError(415, "Content-Encoding must be identity")
    if int(headers.get("content-length", 0)) > limit:
        raise too_large(limit)


async def get_front_page(app: App, exchange: Exchange) -> Response:
    """GET /: the status page for a browser, a few words of JSON for anything else."""
    if app.page and "text/html" in exchange.request.headers.get("accept", ""):
        return Response(200, app.page.encode(), "text/html; charset=utf-8", PAGE_HEADERS)
    return json_response({
        "name": "aiapiproxy", "version": __version__, "endpoints": sorted(ROUTES)})


# The page loads nothing from elsewhere, and no other page may frame it.
PAGE_HEADERS = {
    "content-security-policy":
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'",
    "cache-control": "no-store", "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer", "x-frame-options": "DENY"}


def finish_exchange(app: App, exchange: Exchange) -> None:
    """Completes the record of a request that has ended; counts and logs it."""
    request, record = exchange.request, exchange.record
    record.route = route = route_path(request.path)
    record.request_id, record.client = exchange.id, exchange.client
    record.method, record.path = request.method[:20], request.path
    if route == "other":
        record.path = redacted(request.path, record.secrets)[:200]
    client_request_id = request.headers.get("x-request-id", "")
    record.client_request_id = redacted(client_request_id, record.secrets)[:200]
    if exchange.was_interrupted:
        record.outcome = "shutdown" if exchange.is_shut_down else "client_gone"
    record.status = exchange.status or CLIENT_CLOSED_REQUEST
    record.bytes_out = exchange.bytes_out
    record.time = time.time()
    record.duration_ms = round((app.loop.time() - exchange.began) * 1000, 1)
    if record.first_token is not None:
        record.ttft_ms = round((record.first_token - exchange.began) * 1000, 1)
    app.record_request(record)
    level = logging.DEBUG if route in QUIET_ROUTES else logging.INFO
    if LOG.isEnabledFor(level):
        log(level, "request", **record.log_fields())


CLIENT_CLOSED_REQUEST = 499              # nginx's status: nobody waits for an answer
QUIET_ROUTES = (*HEALTH_WORDS, "/metrics", "/status")        # monitors call them all the time


class Route(NamedTuple):
    """An endpoint: the method that it takes, HEAD beside GET, and its handler."""
    method: str
    handle: Callable[[App, Exchange], Awaitable[Optional[Response]]]
    is_api: bool = False                 # counts for MAX_CONCURRENT_REQUESTS


ROUTES = {
    "/v1/messages": Route("POST", create_message, True),
    "/v1/messages/count_tokens": Route("POST", count_tokens, True),
    "/v1/models": Route("GET", list_models, True),
    "/v1/models/": Route("GET", get_model, True),
    **dict.fromkeys(HEALTH_WORDS, Route("GET", get_health)),
    "/metrics": Route("GET", get_metrics),
    "/status": Route("GET", get_status),
    "/": Route("GET", get_front_page),
}


# ============================================================================
# 28. RUN
# ============================================================================
#
# Serves connections until a signal asks for the end.

# ---- 28.1 server -----------------------------------------------------------

class Service:
    """The proxy in one process: an App, and the Server that hands it the requests."""

    def __init__(self, settings: Settings, page: str = "", counters: Any = None, slot: int = 0,
                 recorder: Optional[Recorder] = None, shortcuts: Shortcuts = PLAIN) -> None:
        self.app = app = App(settings, page, counters, slot, recorder, shortcuts)
        self.server = Server(lambda exchange: respond(app, exchange), error_response,
                             lambda exchange: finish_exchange(app, exchange), app.new_id,
                             RequestRecord)
        self.port = 0

    async def start(self, sockets: Optional[List[socket.socket]] = None) -> None:
        """Accepts connections from now on.  Raises OSError if an address cannot be bound."""
        settings = self.app.settings
        self.app.restore_counters()
        await self.server.start(
            sockets or listening_sockets(settings.server_host, settings.server_port))
        self.port = self.server.port

    async def drain(self, seconds: float) -> None:
        """Stops listening; running requests get `seconds` to end, then end with an error."""
        self.app.is_draining = True
        await self.server.drain(seconds)
        for task in self.app.tasks:
            task.cancel()
        self.app.upstream.close()


# ---- 28.2 serving ----------------------------------------------------------

async def serve(options: ServeOptions) -> None:
    """Serves until a signal asks for the end; a worker also ends when its supervisor has died.

    The first SIGTERM or SIGINT lets running requests end for DRAIN_TIME, a second one cuts them.
    """
    loop = asyncio.get_running_loop()
    settings, is_alone = options.settings, options.lifeline < 0
    if options.start_demo is not None:
        demo_url = urlsplit(f"http://127.0.0.1:{await options.start_demo()}/v1")
        settings = replace(settings, openai_base_url=demo_url)
    service = options.new_service(settings)
    loop.set_exception_handler(lambda _, context: log_loop_fault(
        context, service.app.settings.rust_backtrace))
    await service.start(options.sockets)
    stop, insist, drain_time = asyncio.Event(), asyncio.Event(), DRAIN_TIME

    def ask_to_stop() -> None:
        if stop.is_set():
            insist.set()
            # The kernel's own timer, with its default action, ends even a process that hangs.
            signal.setitimer(signal.ITIMER_REAL, INSIST_TIME)
        stop.set()

    def end_as_orphan() -> None:
        nonlocal drain_time
        drain_time = ORPHAN_DRAIN_TIME
        loop.remove_reader(options.lifeline)
        remove_pid_file(settings.pid_file, service.app.pid)
        stop.set()

    loop.add_signal_handler(signal.SIGTERM, ask_to_stop)
    # Ctrl-C reaches every process of a terminal; a worker waits for its supervisor's SIGTERM.
    loop.add_signal_handler(signal.SIGINT, ask_to_stop if is_alone else int)
    loop.add_signal_handler(signal.SIGHUP, lambda: reload(options, service.app))
    if is_alone:
        write_pid_file(settings.pid_file)
        log(logging.INFO, "started", **start_facts(options, service.port))
    else:
        loop.add_reader(options.lifeline, end_as_orphan)     # readable when the supervisor has died
    options.ready()
    try:
        await stop.wait()
        if is_alone:
            log(logging.INFO, "stopping", in_flight=service.app.in_flight)
        ways = [asyncio.ensure_future(way) for way in (service.drain(drain_time), insist.wait())]
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way in ways:
            way.cancel()
        service.app.publish()
        if is_alone:
            log(logging.INFO, "stopped")
    finally:
        if is_alone:
            remove_pid_file(settings.pid_file, os.getpid())


DRAIN_TIME = 10.0                        # seconds for running requests after the first signal
ORPHAN_DRAIN_TIME = 0.5                  # seconds, when the supervisor has died
INSIST_TIME = 0.8                        # seconds after the second signal


def log_loop_fault(context: Json, has_traceback: bool) -> None:
    """Logs an exception that nobody catches: of a callback, or of a task that nobody awaits.

    Its text may quote a request, so only the traceback shows it.  An OSError of a connection is no
    fault of ours: a hostile peer has closed its socket at an odd moment.
    """
    error = context.get("exception")
    if isinstance(error, OSError) and ("transport" in context or "protocol" in context):
        log(logging.DEBUG, "connection_fault", error=f"{type(error).__name__}: {error}")
        return
    place = error.__traceback__ if error else None
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    code = place.tb_frame.f_code if place else None
    where = f"{os.path.basename(code.co_filename)}:{place.tb_lineno} in {code.co_name}" \
        if place and code else str(context.get("message"))
    kind = type(error).__name__ if error else "fault"
    LOG.error("loop_fault", exc_info=error if has_traceback else None, extra={"facts": {
        "message": f"{kind} at {where}", "error": kind, "place": where}})


# ---- 28.3 reload -----------------------------------------------------------

def reload(options: ServeOptions, app: App) -> None:
    """SIGHUP: opens moved log files again and uses the settings that are read now, if they may be.

    A worker takes the settings that its supervisor has read and judged.
    """
    for file in options.files:
        file.reopen_if_moved()
    if not (read_settings_again(options) if options.handed is None else adopt_settings(options)):
        return
    settings = options.settings
    if options.start_demo is not None:                   # its port was chosen at the start
        settings = replace(settings, openai_base_url=app.settings.openai_base_url)
    app.apply_settings(settings)
    LOG.setLevel(settings.log_level)
    log(logging.INFO, "reloaded", message="settings read again")


def read_settings_again(options: ServeOptions) -> bool:
    """Reads the settings into `options`.  Returns False where the old ones stay, and logs why."""
    try:
        found = options.read()
        wanted = options.load(found)
        fresh = reloaded_settings(options.settings, options.variables, wanted, found,
                                  FIXED_SETTINGS)
    except ConfigError as error:
        log_reload_failure(error)
        return False
    log_warnings(found.warnings)
    for name in FIXED_SETTINGS:
        if getattr(wanted, name) != getattr(fresh, name):
            log(logging.WARNING, "reloaded",
                message=f"{name.upper()} takes effect at the next start")
    options.settings, options.variables = fresh, found
    options.reloads += 1
    return True


def adopt_settings(options: ServeOptions) -> bool:
    """Takes the handed settings into a worker's `options`.  Returns False if they are not new."""
    reloads, texts = options.handed.read(0) or (0, {})
    if reloads <= options.reloads:
        return False
    fixed = {name: getattr(options.settings, name) for name in FIXED_SETTINGS}
    try:
        settings = replace(options.load(Variables(texts)), **fixed)
    except ConfigError as error:                         # CA certificates are missing now
        log_reload_failure(error)
        return False
    options.settings, options.reloads = settings, reloads
    return True


def log_reload_failure(error: ConfigError) -> None:
    problems = "; ".join(error.problems)
    log(logging.ERROR, "reload_failed", message=f"the old settings stay: {problems}")


FIXED_SETTINGS = ("server_host", "server_port", "workers")


# ---- 28.4 options and facts of a process -----------------------------------

@dataclass(eq=False, repr=False)
class ServeOptions:
    """Everything that a serving process is given, by main or by the supervisor of several."""

    settings: Settings                                            # in force
    variables: Variables                                          # that they were read from
    sockets: List[socket.socket]
    files: List[LogFile]
    read: Callable[[], Variables]                                 # reads the environment, the file
    load: Callable[[Variables], Settings]
    new_service: Callable[..., Service]                           # for given settings
    start_demo: Optional[Callable[[], Awaitable[int]]] = None     # starts it, returns its port
    lifeline: int = -1                   # a worker's pipe that ends with its supervisor
    ready: Callable[[], Any] = int       # called once signals are handled
    reloads: int = 0                     # that have changed `settings`
    handed: Any = None                   # slot 0: the supervisor's reloads and variables


def log_warnings(warnings: Iterable[Tuple[str, Json]]) -> None:
    for event, facts in warnings:
        log(logging.WARNING, event, **facts)


def start_facts(options: ServeOptions, port: int) -> Json:
    """The facts of the first line of the log: address, upstream, models, the line for a client."""
    settings = options.settings
    address, models = "http://" + url_authority(settings, port), model_map(settings)
    listens = [listening_address(host, port) for host in settings.server_host]
    upstream = settings.hostname if options.start_demo is None else "the built-in demo"
    shown = ", ".join(f"{family} → {name}" for family, name in models.items())
    variables = f"ANTHROPIC_BASE_URL={address} ANTHROPIC_AUTH_TOKEN={token_hint(settings)}"
    return {"message": f"aiapiproxy {__version__} listens on {', '.join(listens)}, upstream "
            f"{upstream} ({shown}). Claude Code: {variables} claude",
            "address": address, "listens": listens, "upstream": upstream, "models": models,
            "version": __version__}


def listening_address(host: str, port: int) -> str:
    """An address that is listened on, for a person; the two that mean all make no URL."""
    if host in ("0.0.0.0", "::"):
        return f"{authority_of(host, port)} (every network)"
    return f"http://{authority_of(host, port)}"


def write_pid_file(path: str) -> None:
    """Writes this process' number beside the file and moves it into place, never through a symlink.

    It is written in place where the folder is not ours.
    """
    if not path:
        return
    beside = f"{path}.{os.getpid()}.new"
    try:
        try:
            if os.path.lexists(beside):
                os.unlink(beside)
            write_number(beside, os.O_EXCL)
            os.replace(beside, path)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            write_number(path, os.O_TRUNC)
    except OSError as error:
        problem = f"PID_FILE {path} cannot be written: {error.strerror}"
        log(logging.WARNING, "pid_file", message=problem)


def write_number(path: str, flag: int) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | flag
    with open(os.open(path, flags, 0o644), "w", encoding="ascii") as file:
        file.write(f"{os.getpid()}\n")


def remove_pid_file(path: str, pid: int) -> None:
    """Removes the file if this number still stands in it; empties it where the folder is not ours.

    Log rotation would signal a later process that gets the number.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor, "r+", encoding="ascii", errors="replace") as file:
            if file.read(32).strip() == str(pid):
                try:
                    os.unlink(path)
                except OSError:
                    file.truncate(0)
    except OSError:
        pass                                         # "", or a file that is not ours


# ############################################################################
# PART IV. BESIDE IT: nothing above names it
# ############################################################################

# ============================================================================
# 29. RECORD AND REPLAY
# ============================================================================
#
# RECORD_DIR gets a file for each exchange; --replay translates such a file again.

# ---- 29.1 recorder ---------------------------------------------------------

class Recording:
    """One exchange as it was sent over the wire, for a report of a fault.

    RECORD_DIR gets one file for each.
    """

    def __init__(self, exchange: Exchange, translation: Translation, params: Json,
                 settings: Settings) -> None:
        """Begins with the facts that are known before the upstream is called."""
        # A piece of bytes shows a key's other characters than ASCII as those of latin-1.
        self._secrets = dict.fromkeys(form for secret in translation.secrets
                                      for form in (secret, secret.encode().decode("latin-1")))
        self._held = {"upstream": "", "events": ""}  # perhaps starts of a key
        self._began = time.time()
        self._size = 0
        self._folder = settings.record_dir
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(self._began))
        self._name = f"{stamp}-{exchange.id}.json"
        models = {f"CLAUDE_{family.upper()}_MODEL": name
                  for family, name in model_map(settings).items()}
        url = settings.openai_base_url._replace(query="").geturl()
        self.fields: Json = {
            "version": __version__, "request_id": exchange.id, "time": rfc3339(self._began),
            "settings": {"OPENAI_BASE_URL": url, **models},
            "session_id": client_session(exchange),
            "client_request": params, "upstream_request": translation.body,
            "upstream_status": 0, "upstream_headers": {}, "upstream": [], "events": []}

    def answered(self, reply: UpstreamResponse) -> None:
        """Records an upstream's response from now on."""
        reply.record = lambda data: self.add("upstream", data)
        self.fields["upstream_status"] = reply.status
        self.fields["upstream_headers"] = {
            name: reply.headers[name] for name in RECORDED_HEADERS if name in reply.headers}

    def add(self, stream: str, data: bytes) -> None:
        """Adds bytes to `upstream` or `events`, with the milliseconds since the start.

        They are kept as latin-1, in which every byte is a character.
        """
        self._size += len(data)
        if self._size <= RECORDED_BYTES:
            moment = round((time.time() - self._began) * 1000, 1)
            text, self._held[stream] = self._redacted(self._held[stream] + data.decode("latin-1"))
            self.fields[stream].append([moment, text])
        else:
            self.fields["is_cut"] = True

    def _redacted(self, text: str) -> Tuple[str, str]:
        """(a piece without keys, its end that could be the start of a key)."""
        for secret in self._secrets:
            text = text.replace(secret, key_mark(secret))
        place = min((place for secret in self._secrets
                     for place in range(max(0, len(text) - len(secret) + 1), len(text))
                     if secret.startswith(text[place:])), default=len(text))
        return text[:place], text[place:]

    def save(self) -> None:
        """Writes the file, mode 600, and removes the oldest ones over RECORDED_FILES."""
        for stream, held in self._held.items():
            if held and "is_cut" not in self.fields:
                self.fields[stream][-1][1] += held
        text = json.dumps(self.fields, indent=1)
        for secret in self._secrets:
            text = text.replace(json.dumps(secret)[1:-1], key_mark(secret))
        try:
            os.makedirs(self._folder, mode=0o700, exist_ok=True)
            path = os.path.join(self._folder, self._name)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            with open(os.open(path, flags, 0o600), "w", encoding="utf-8", errors="replace") as file:
                file.write(text)
            names = sorted(filter(RECORDED_NAME.fullmatch, os.listdir(self._folder)))
            for name in names[:-RECORDED_FILES]:
                os.unlink(os.path.join(self._folder, name))
        except OSError as error:
            log(logging.WARNING, "record", message=f"RECORD_DIR {self._folder} cannot be written: "
                f"{error.strerror}")


def key_mark(secret: str) -> str:
    """The text in place of a key.  Half of a short key would be too much of it."""
    return f"sk-...{secret[-4:]}" if len(secret) >= 16 else "[key]"


RECORDED_HEADERS = ("content-type", "content-encoding", "transfer-encoding", "retry-after",
                    "x-request-id")
RECORDED_BYTES = 16777216                # bytes of one exchange that are kept
RECORDED_FILES = 200                     # files that are kept
RECORDED_NAME = re.compile(r"\d{8}T\d{6}-req_\w{24}\.json")


# ---- 29.2 replay -----------------------------------------------------------

def replay(path: str) -> int:
    """--replay: prints the events that a recorded exchange is translated to now."""
    try:
        with open(path, encoding="utf-8") as file:
            recorded = json.load(file)
        settings = load_settings(recorded["settings"])
        translation = checked_translation(
            recorded["client_request"], settings, recorded["session_id"])
        pieces = [data.encode("latin-1") for _, data in recorded["upstream"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
        print_error(f"--replay {path}: not a recorded exchange ({type(error).__name__}: {error})")
        return 1
    except ProxyError as error:
        print_error(f"--replay {path}: {error.message}")
        return 1
    translation.is_streamed = True
    writer = EventWriter(translation, random_id, recorded["request_id"])
    translator = StreamTranslator(translation, random_id, writer)
    try:
        content_type = recorded["upstream_headers"].get("content-type", "")
        claims_events = "event-stream" in content_type.lower()
        if is_event_stream(claims_events, b"".join(pieces[:1])):
            for piece in filter(None, pieces):
                sys.stdout.write(translator.feed(piece).decode())
            sys.stdout.write(translator.finish().decode())
        else:
            sys.stdout.write(translator.whole(b"".join(pieces)).decode())
    except (ProxyError, ValueError, RecursionError) as error:
        print_error(f"--replay {path}: {error}")
        return 1
    return 0


# ============================================================================
# 30. CHECK
# ============================================================================
#
# --check tries everything that serving will need, and says what to do where it fails: the settings,
# the way to the upstream, its key and models, the proxy that runs already.

# ---- 30.1 check ------------------------------------------------------------

async def run_check(settings: Settings, warnings: Iterable[Tuple[str, Json]]) -> int:
    """--check: prints a line for each finding.  Returns 1 where something has failed."""
    report = CheckReport()
    check_settings(settings, warnings, report)
    try:
        app = App(settings)
    except (OSError, ssl.SSLError) as error:
        report.add("fail", f"CA certificates cannot be read: {error} (SSL_CERT_FILE, SSL_CERT_DIR)")
        return 1
    await check_upstream(app, report)
    await check_running(app, report)
    app.upstream.close()
    lines = shell_lines(settings, url_authority(settings, settings.server_port))
    report.add("ok", "Claude Code: " + "; ".join(lines))
    return 1 if report.has_failed else 0


# ---- 30.2 findings and their report ----------------------------------------

def check_settings(settings: Settings, warnings: Iterable[Tuple[str, Json]],
                   report: CheckReport) -> None:
    """The address, the key, and whether the models' windows can hold Claude Code's requests."""
    where = f"{', '.join(settings.server_host)} port {settings.server_port}"
    url = settings.openai_base_url._replace(query="").geturl()
    report.add("ok", f"configuration: listens on {where}, upstream {url}")
    for _, facts in warnings:
        report.add("warn", facts["message"])
    if settings.passes_keys_on:
        report.add("warn", "OPENAI_API_KEY is not set, or still the text of env.example: "
                   "the key of each client is passed on")
    elif settings.openai_api_key:
        report.add("ok", f"OPENAI_API_KEY is set (…{settings.openai_api_key[-4:]})")
    else:
        report.add("ok", f"{credential_names(settings)} holds what the upstream asks for")
    for variable, name in model_variables(settings):
        for pattern, window in SMALL_WINDOWS:
            if re.match(pattern, model_profile(name, settings.host_class).base_name):
                report.add("warn", f"{variable} {name} has a window of {window} tokens: too small "
                           "for Claude Code, whose first request alone takes about 20,000")


def model_variables(settings: Settings) -> List[Tuple[str, str]]:
    """(variable, model) for each family."""
    return [(f"CLAUDE_{family.upper()}_MODEL", name)
            for family, name in model_map(settings).items()]


# Models, and their windows in tokens, that Claude Code's first request fills up.
SMALL_WINDOWS = ((r"gpt-4$|gpt-4-0[36]", 8192), (r"gpt-4-32k", 32768), (r"gpt-3\.5", 16385))


async def check_upstream(app: App, report: CheckReport) -> None:
    """DNS, TCP, TLS, the key, and the three models, by one GET {base}/models."""
    upstream, settings = app.upstream, app.settings
    if not await check_lookup(app, report):
        return
    key = "none" if settings.passes_keys_on else settings.openai_api_key
    try:
        reply = await upstream.send("GET", "/models", b"", key, False, app.request_limit)
        body = await reply.read_all(ANSWER_BODY)
    except UpstreamError as error:
        report.add("fail", redacted(error.message, app.secrets))
        return
    layers = "TCP and TLS" if settings.openai_base_url.scheme == "https" else "TCP"
    report.add("ok", f"{layers}: {upstream.host}:{upstream.port} answers")
    answered = f"the upstream answered {reply.status} to GET "
    if reply.status == 200:
        check_models(settings, body, report)
    elif reply.status not in (401, 403):
        # Some gateways have no list of models, and work.
        report.add("warn" if reply.status in (404, 405, 501) else "fail",
                   f"{answered}{settings.openai_base_url.path}/models: "
                   "it has no list of models, or OPENAI_BASE_URL is wrong")
    elif settings.passes_keys_on:
        report.add("warn", answered + "/models: it wants a key, which clients must present")
    else:
        report.add("fail", f"{answered}/models: it does not accept {credential_names(settings)}")


async def check_lookup(app: App, report: CheckReport) -> bool:
    """Whether the upstream's host, or that of the outgoing proxy before it, can be resolved."""
    host, port, proxy = app.upstream.host, app.upstream.port, app.upstream.proxy
    variables, note = "OPENAI_BASE_URL", ""
    if proxy:
        host, port = proxy.hostname or "", proxy.port or 80
        variables, note = "OPENAI_BASE_URL and HTTPS_PROXY", " (the outgoing proxy)"
    try:
        addresses = await app.loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        report.add("fail", f"DNS: {host} cannot be resolved: check {variables}")
        return False
    report.add("ok", f"DNS: {host} is {addresses[0][4][0]}{note}")
    return True


def check_models(settings: Settings, body: bytes, report: CheckReport) -> None:
    """Whether the upstream's list has each mapped model; Ollama and Gemini list longer names."""
    try:
        models = upstream_json(body.decode("utf-8", "replace"))["data"]
        ids = {model["id"] for model in models}
    except (ValueError, KeyError, TypeError, RecursionError):
        report.add("warn", "the upstream's list of models is not understood")
        return
    for variable, name in model_variables(settings):
        if ids & {name, name + ":latest", "models/" + name}:
            report.add("ok", f"{variable} {name} is there")
        else:
            report.add("fail", f"{variable} {name} is not among the upstream's {len(ids)} models")


async def check_running(app: App, report: CheckReport) -> None:
    """The facts that a proxy gives in /status, if one runs with this configuration."""
    settings, port, limit = app.settings, app.settings.server_port, TimeLimit(2, "")
    here = urlsplit(f"http://{url_authority(settings, port)}")
    local = Upstream(here, limit)
    key = "".join(settings.proxy_api_key[:1]) or "none"
    try:
        reply = await local.send("GET", "/status", b"", key, False, limit)
        found = upstream_json((await reply.read_all(ANSWER_BODY)).decode("utf-8", "replace"))
        report.add("ok", f"aiapiproxy {found['version']} runs on {here.hostname} port {port}, "
                   f"{found['requests']:g} requests so far")
        for entry in found["adjustments"]:
            report.add("ok", f"it has learned of {entry['model']}: "
                       f"{entry['adjustment']} {entry['value']}".rstrip())
    except UpstreamError:
        report.add("warn", f"nothing answers on port {port} yet: start the proxy")
    except (ValueError, KeyError, TypeError, RecursionError):
        report.add("warn", f"port {port} is answered by another program: set SERVER_PORT")
    local.close()


class CheckReport:
    """The lines of --check: ok, warn or fail, and what to do."""

    def __init__(self) -> None:
        self.has_failed = False
        self._is_coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ

    def add(self, level: str, text: str) -> None:
        """Prints a finding.  Control characters become spaces: the text may be an upstream's."""
        self.has_failed = self.has_failed or level == "fail"
        word, text = f"{level:5}", CONTROL.sub(" ", text)
        if self._is_coloured:
            word = f"\x1b[{CHECK_COLOURS[level]}m{word}\x1b[0m"
        print(f"{word} {text}", flush=True)


CHECK_COLOURS = {"ok": 32, "warn": 33, "fail": 31}       # green, yellow, red


# ============================================================================
# 31. DEMO
# ============================================================================
#
# The upstream of --demo: a loopback listener in this process that speaks real Chat Completions, so
# that a newcomer sees the whole path work without a key.  It runs on the program's own Server (20),
# and answers a conversation with a few words about itself, or with a tool call where one is wanted.

# ---- 31.1 server -----------------------------------------------------------

async def start_demo() -> int:
    """Starts the upstream of --demo on a free port of 127.0.0.1.  Returns the port."""
    server = Server(demo_response, lambda exchange, error: json_response(
        {"error": {"message": error.message}}, error.status), bool, random_id)
    await server.start(listening_sockets(["127.0.0.1"], 0))
    return server.port


async def demo_response(exchange: Exchange) -> Optional[Response]:
    """The list of models, or a completion; None after one that was streamed word by word."""
    if exchange.request.path.endswith("/models"):
        return json_response({"object": "list", "data": [{"id": DEMO_MODEL, "object": "model"}]})
    params = await exchange.json(limit=1 << 30)          # the proxy has checked MAX_REQUEST_SIZE
    message = {"role": "assistant", **demo_message(params)}
    finish = "tool_calls" if "tool_calls" in message else "stop"
    usage = {"prompt_tokens": estimated_request_tokens(params),
             "completion_tokens": estimated_tokens(str(message))}
    if not params.get("stream"):
        choice = {"index": 0, "message": message, "finish_reason": finish}
        return json_response({
            "object": "chat.completion", "model": DEMO_MODEL, "choices": [choice], "usage": usage})
    exchange.watch_client()
    for delta in demo_deltas(message):
        await exchange.send(demo_chunk([{"index": 0, "delta": delta, "finish_reason": None}]))
        await asyncio.sleep(DEMO_PAUSE)
    end = demo_chunk([{"index": 0, "delta": {}, "finish_reason": finish}])
    await exchange.send(end + demo_chunk([], usage) + b"data: [DONE]\n\n", is_last=True)
    return None


def demo_chunk(choices: List[Json], usage: Optional[Json] = None) -> bytes:
    """A chunk of a completion as a server-sent event.  [OpenAI: chunk object]"""
    return b"data: %b\n\n" % json_bytes({
        "id": "chatcmpl-demo", "object": "chat.completion.chunk", "model": DEMO_MODEL,
        "choices": choices, "usage": usage})


DEMO_PAUSE = 0.02                        # seconds between two words


# ---- 31.2 answers ----------------------------------------------------------

def demo_message(params: Json) -> Json:
    """The content and tool call that answer a conversation."""
    last = params["messages"][-1]
    if last["role"] == "tool":
        return {"content": "This is the demo of aiapiproxy: the tool has answered "
                           f"“{str(last['content'])[:200]}”. {DEMO_END}"}
    content = last.get("content")
    text = content if isinstance(content, str) else " ".join(
        part.get("text", "") for part in content or () if is_object(part))
    # Claude Code adds texts of its own to a person's, which speak of tools in nearly every request.
    tool = demo_tool(params, re.sub(r"(?s)<system-reminder>.*?</system-reminder>", "", text))
    if tool is not None:
        function = {"name": tool["name"], "arguments": json_text(demo_value(tool["parameters"]))}
        call = {"id": "call_demo_" + random_id(8), "type": "function", "function": function}
        return {"content": "This is the demo of aiapiproxy; it calls a tool. ",
                "tool_calls": [call]}
    return {"content": "Hello from the demo of aiapiproxy. No model has read this: your request of "
            f"{len(params['messages'])} message(s) was translated to Chat Completions, answered by "
            f"a built-in upstream word by word, and translated back. {DEMO_END}"}


def demo_tool(params: Json, text: str) -> Optional[Json]:
    """The function to call: the one that is named, else the first if a tool is asked for."""
    choice = params.get("tool_choice")
    if choice == "none":
        return None
    tools = [tool["function"] for tool in params.get("tools", ())]
    forced = choice["function"]["name"] if is_object(choice) else ""
    for tool in tools:
        if tool["name"] == forced or re.search(rf"\b{re.escape(tool['name'])}\b", text):
            return tool
    is_asked_for = choice == "required" or re.search(r"\b(tool|function)s?\b", text, re.I)
    return tools[0] if tools and is_asked_for else None


def demo_value(schema: Any, depth: int = 0) -> Any:
    """A value that fits a simple JSON schema, down to a depth of 5."""
    schema = schema if is_object(schema) and depth < 5 else {}
    if isinstance(schema.get("enum"), list) and schema["enum"]:
        return schema["enum"][0]
    kind = schema.get("type")
    kind = kind[0] if isinstance(kind, list) and kind else kind
    if kind == "object" or (kind is None and "properties" in schema):
        properties = schema.get("properties") or {}
        names = schema.get("required") or list(properties)[:1]
        return {name: demo_value(properties.get(name), depth + 1) for name in names}
    simple = {"integer": 1, "number": 1.5, "boolean": True, "array": [], "null": None}
    return simple.get(str(kind), "demo")


def demo_deltas(message: Json) -> Iterator[Json]:
    """A message as deltas: word by word, a call's arguments in pieces.  [OpenAI: chunk object]"""
    yield {"role": "assistant", "content": ""}
    for word in re.findall(r"\S+\s*", message["content"]):
        yield {"content": word}
    for call in message.get("tool_calls", ()):               # there is one at most
        function = call["function"]
        yield {"tool_calls": [{**call, "index": 0, "function": {**function, "arguments": ""}}]}
        for piece in re.findall("(?s).{1,12}", function["arguments"]):
            yield {"tool_calls": [{"index": 0, "function": {"arguments": piece}}]}


DEMO_MODEL = "aiapiproxy-demo"
DEMO_END = "Set OPENAI_API_KEY and OPENAI_BASE_URL to talk to a real model."


# ============================================================================
# 32. STATUS PAGE
# ============================================================================
#
# The page at /.  It loads nothing from outside, asks /status every 2 seconds and draws
# the answer; the policy that get_front_page (27) sends with it forbids everything else.

# ---- 32.1 page -------------------------------------------------------------

STATUS_PAGE = """\
<!doctype html>
<html lang=en>
<meta charset=utf-8>
<meta name=viewport content="width=device-width">
<link rel=icon href=data:,>
<title id=title>aiapiproxy</title>
<style>
:root{color-scheme:dark light;--back:#dce3e7;--face:#f8fafb;--line:#ccd5da;--ink:#172126;
--dim:#526069;--cached:#5c9a92;--new:#1f5f9e;--out:#9a6200;--whole:#7f8b93;--ok:#1a7544;
--bad:#b2332a}
@media(prefers-color-scheme:dark){:root{--back:#0a0e11;--face:#13181c;--line:#283239;--ink:#dfe6e9;
--dim:#94a3ad;--cached:#3f7d78;--new:#8fc0ee;--out:#e3b261;--whole:#62717b;--ok:#67c38d;
--bad:#f28b7d}}
*{box-sizing:border-box;margin:0;padding:0;overflow-wrap:anywhere}
body{background:var(--back);color:var(--ink);font:14px/1.5 system-ui,sans-serif;max-width:1440px;
margin:auto;padding:16px}
pre,td,dl,b,code,.read p{font:13px/1.5 ui-monospace,Menlo,Consolas,monospace}
h1,#state{font:600 18px system-ui,sans-serif}
h2{font-size:14px} small,th,figure p,output{color:var(--dim);font-size:13px;font-weight:400}
header{display:flex;flex-wrap:wrap;gap:2px 24px;align-items:baseline;padding:0 4px 14px}
#health{flex:1} #fresh{margin-left:auto}
p.lamp::before,td.lamp::before{content:"";display:inline-block;width:5px;height:5px;
margin:0 9px 0 2px;border:2px solid;border-radius:9px}
.ok .lamp::before{background:currentColor;color:var(--ok)}
.bad .lamp::before{background:currentColor;border-radius:0;transform:rotate(45deg)}
.bad .lamp::before,.off .lamp::before,.bad #state,.off #state,.errors b{color:var(--bad)}
main{display:grid;grid-template-columns:repeat(12,1fr);gap:1px;background:var(--line);
border:1px solid var(--line);border-radius:8px;overflow:hidden}
.off+main{filter:saturate(.2)}
main>*{background:var(--face);padding:16px 20px;min-width:0;grid-column:span 6}
.read{grid-column:span 3} .read p{font-size:30px;letter-spacing:-.04em}
figure,.errors+*{grid-column:span 4}
.errors{grid-column:span 8} .all{grid-column:1/-1}
dl{display:grid;grid-template-columns:auto 1fr;gap:6px 0;margin:10px 0}
dd{padding-left:90px;background:linear-gradient(var(--new),var(--new)) 18px 9px/54px 1px no-repeat,
radial-gradient(circle at 18px 9.5px,var(--new) 3px,#0000 4px),
radial-gradient(circle at 72px 9.5px,var(--new) 3px,#0000 4px)}
pre{border:1px solid var(--line);padding:10px;margin:10px 0;white-space:pre-wrap}
button{font:inherit;padding:3px 14px;margin-right:12px;color:inherit;background:none;
border:1px solid;border-radius:4px}
svg{display:block;width:100%;height:168px;margin-top:6px}
text{fill:var(--dim);font-size:11px} path{color:var(--line);stroke:currentColor}
i{display:inline-block;width:9px;height:9px;margin-right:6px;background:currentColor}
figure b{color:var(--ink)} b+i{margin-left:12px}
.cached{color:var(--cached)} .new{color:var(--new)}
.out{color:var(--out)} .whole{color:var(--whole)}
ul:empty::after,tbody:empty::after{content:"None";color:var(--dim)}
tbody::after{position:absolute;margin:6px 20px} li{list-style:none;margin-top:10px}
.scroll{overflow-x:auto;min-height:64px;margin:8px -20px 0}
table{border-collapse:collapse;width:100%}
th,td{text-align:left;white-space:nowrap;padding:5px 20px 5px 0;border-bottom:1px solid var(--line);
max-width:25ch;overflow:hidden;text-overflow:ellipsis}
td:last-child{max-width:14ch} .n{text-align:right}
tr>:first-child{position:sticky;left:0;background:var(--face);padding-left:20px}
@media(max-width:1000px){:root main>*{grid-column:1/-1} :root .read{grid-column:span 6}}
@media(max-width:600px){body{padding:8px} .read p{font-size:22px} #health{flex-basis:100%;order:1}}
</style>
<header id=head>
<h1>aiapiproxy</h1>
<p id=health class=lamp role=status><b id=state>Connecting</b> <span id=reason></span></p>
<small id=fresh></small>
</header>
<main>
<section class=read><h2>In flight</h2><p id=flying>–</p><small id=workers></small></section>
<section class=read><h2>Requests</h2><p id=requests>–</p><small id=failed></small></section>
<section class=read><h2>Prompt cache hits</h2><p id=hits>–</p>
<small>of prompt tokens, last hour</small></section>
<section class=read><h2>Uptime</h2><p id=uptime>–</p><small id=version></small></section>
<section><h2>Upstream</h2><code id=url></code><dl id=models></dl>
<small>Other claude names go where sonnet goes; all others pass unchanged.</small></section>
<section><h2>Point Claude Code here</h2><pre id=lines></pre>
<button id=copy>Copy</button><output id=copied></output></section>
<figure><h2>Prompt</h2><p id=prompt></p><svg role=img></svg></figure>
<figure><h2>Output</h2><p id=output></p><svg role=img></svg></figure>
<figure><h2>Latency</h2><p id=latency></p><svg role=img></svg></figure>
<section class=errors><h2>Latest errors</h2><ul id=errors></ul></section>
<section><h2>Learned adjustments</h2><ul id=learned></ul></section>
<section class=all><h2>Last requests</h2>
<div class=scroll tabindex=0 role=region aria-label="Last requests">
<table><thead><tr id=columns></thead><tbody id=recent></table></div></section>
</main>
<script>
// All of /status is hostile text: it becomes text and attributes, never HTML.
const $ = id => document.getElementById(id)
const drawn = {}
let data, timer, seen = Date.now()

function put(texts) {
  for (const id in texts) if ($(id).textContent !== texts[id]) $(id).textContent = texts[id]
}

function add(parent, name, text, look = '', attributes) {
  const made = document.createElementNS(parent.namespaceURI, name)
  made.textContent = text
  made.setAttribute('class', look)
  for (const key in attributes) made.setAttribute(key, attributes[key])
  parent.append(made)
  return made
}

// Draws only what has changed: a selection in the rest survives.
function renew(id, list, draw) {
  const text = JSON.stringify(list)
  if (drawn[id] === text) return
  drawn[id] = text
  $(id).textContent = ''
  for (const entry of list) draw($(id), entry)
}

const count = n => n == null ? '–' : n.toLocaleString('en')
const brief = n => n.toLocaleString('en', {notation: 'compact', maximumSignificantDigits: 3})
const clock = when => new Date(when).toLocaleTimeString('en-GB')
const words = name => name && name.replace(/_/g, ' ')
const get = name => entry => entry[name] || 0
const sum = (list, value) => list.reduce((total, entry) => total + value(entry), 0)
const cached = get('cache_read_input_tokens')
const prompt = m => cached(m) + get('input_tokens')(m)
const hasFailed = r => r.outcome !== 'ok' && r.outcome !== 'client_gone'
const took = ms => ms == null ? '–' : ms < 999.5 ? Math.round(ms) + ' ms' :
  ms < 99950 ? (ms / 1000).toPrecision(3) + ' s' : span(ms / 1000)

function span(s) {
  if (s < 60) return Math.floor(s) + ' s'
  const [size, big, part, small] = s < 3600 ? [60, ' min ', 1, ' s'] :
    s < 86400 ? [3600, ' h ', 60, ' min'] : [86400, ' d ', 3600, ' h']
  return Math.floor(s / size) + big + Math.floor(s % size / part) + small
}

function speed(r) {
  const writing = r.ttft_ms && r.output_tokens ? r.duration_ms - r.ttft_ms : 0
  return writing > 0 && count(Math.round(r.output_tokens / writing * 1000))
}

const COLUMNS = [
  ['Time', r => clock(r.time)],
  ['Outcome', r => words(r.outcome) + ' ' + r.status, 'lamp'],
  ['Model', r => r.model],
  ['Mapped to', r => r.upstream_model],
  ['In, new', r => count(r.input_tokens), 'n'],
  ['In, cached', r => count(r.cache_read_input_tokens), 'n'],
  ['Out', r => count(r.output_tokens), 'n'],
  ['First token', r => took(r.ttft_ms), 'n'],
  ['Duration', r => took(r.duration_ms), 'n'],
  ['Tokens/s', speed, 'n'],
  ['Stop reason', r => words(r.stop_reason)],
  ['Session', r => r.session]]

function addRequest(body, r) {
  const row = add(body, 'tr', '', hasFailed(r) ? 'bad' : r.outcome)
  for (const [, value, look] of COLUMNS)
    add(row, 'td', value(r) || '–', look, {title: value(r) || ''})
}

// What to do: the first that fits "status outcome error".
const ADVICE = [
  [/origin.*ALLOWED/, 'Name the origin in ALLOWED_ORIGINS.'],
  [/host.*ALLOWED/, 'Use localhost, or name the host in ALLOWED_HOSTS.'],
  [/PROXY_API_KEY/, 'Set ANTHROPIC_AUTH_TOKEN at the client to one of PROXY_API_KEY.'],
  [/^401/, 'Set OPENAI_API_KEY to a key that this upstream accepts.'],
  [/^402/, 'Add credit upstream, or change OPENAI_API_KEY: waiting does not help.'],
  [/^403/, 'Allow the model for OPENAI_API_KEY upstream, or change CLAUDE_*_MODEL.'],
  [/^404/, 'Check the path of OPENAI_BASE_URL (often /v1) and the name in CLAUDE_*_MODEL.'],
  [/too long/, 'Compact the conversation, or choose a CLAUDE_*_MODEL with more context.'],
  [/^413/, 'Send less, or raise MAX_REQUEST_SIZE.'],
  [/CONCURRENT/, 'Send fewer at once, or raise MAX_CONCURRENT_REQUESTS.'],
  [/shut/, 'The proxy was stopping: send it again.'],
  [/^.29/, 'Wait; if it stays, raise the upstream’s quota or change CLAUDE_*_MODEL.'],
  [/^504|_TIMEOUT/, 'Raise STREAM_TIMEOUT (streams) or REQUEST_TIMEOUT (the rest).'],
  [/certificate|TLS/, 'Name the upstream’s root certificates in SSL_CERT_FILE.'],
  [/^502|onnect/, 'Is the upstream running? Check OPENAI_BASE_URL and HTTPS_PROXY.'],
  [/^/, 'The message says what was wrong; LOG_LEVEL=debug shows more.']]
const advice = text => ADVICE.find(([fits]) => fits.test(text))[1]

const alike = r => data.recent.filter(other => other.error === r.error)

function addError(list, r) {
  const item = add(list, 'li', ''), times = alike(r).length
  add(item, 'b', r.status + ' ' + words(r.outcome))
  add(item, 'small', ' at ' + clock(r.time) + (times > 1 ? ', ' + times + ' times' : ''))
  add(item, 'p', r.error)
  add(item, 'p', '→ ' + advice(r.status + ' ' + r.outcome + ' ' + r.error))
}

// Layers are [class, name, value(minute)], each drawn over the one before.
function plot(id, unit, format, summary, ...layers) {
  const {minutes} = data, caption = $(id), svg = caption.nextSibling
  const width = svg.clientWidth, slot = (width - 46) / 60
  const peak = Math.max(...minutes.map(layers[0][2]))
  const scale = 10 ** Math.floor(Math.log10(peak / 4 || 1))
  const step = [1, 2, 5, 10].map(k => k * scale).find(step => step * 4 >= peak)
  const top = Math.ceil(peak / step) * step
  const x = i => 46 + (i + .5) * slot
  const y = value => 146 - 120 * value / (top || 1)
  const line = (look, thick, d) => add(svg, 'path', '', look, {d, 'stroke-width': thick})
  const note = (x, y, anchor, text) => add(svg, 'text', text, '', {x, y, 'text-anchor': anchor})
  caption.textContent = svg.textContent = ''
  for (const [look, name, value] of layers) {
    add(caption, 'i', '', look)
    add(caption, 'b', summary(minutes, value))
    caption.append(' ' + name + ' ')
  }
  svg.setAttribute('aria-label', id + ' in the last hour: ' + caption.textContent)
  for (let value = 0; value <= top; value += step) {
    line('', 1, 'M46 ' + y(value) + 'H' + width)
    note(38, y(value) + 4, 'end', format(value))
  }
  note(0, 12, 'start', unit)
  for (const i of [0, 15, 30, 45]) note(x(i), 164, 'middle', i - 60)
  note(width, 164, 'end', 'minutes')
  if (!peak) note(x(30), 90, 'middle', 'no data')
  for (const [look, , value] of layers) line(look, slot - 1, minutes.map((m, i) =>
    value(m) ? 'M' + x(i) + ' 146V' + Math.min(145, y(value(m))) : '').join(''))
}

const total = (list, value) => brief(sum(list, value))

function mean(list, value) {
  const busy = list.filter(value)
  const weighted = sum(busy, m => value(m) * m.requests)
  return took(busy.length ? weighted / sum(busy, get('requests')) : null)
}

function plots() {
  if (!data) return
  const perMinute = 'tokens per minute, last hour'
  plot('prompt', perMinute, brief, total,
    ['new', 'tokens', prompt], ['cached', 'of them cached', cached])
  plot('output', perMinute, brief, total, ['out', 'tokens', get('output_tokens')])
  plot('latency', 'mean per minute, last hour', ms => ms / 1000 + ' s', mean,
    ['whole', 'duration', get('duration_ms')], ['new', 'to first token', get('ttft_ms')])
}

function say(look, state, reason, fresh) {
  $('head').className = look
  put({state, reason: reason && '– ' + reason, fresh, title: state + ' · aiapiproxy'})
}

function show() {
  const {minutes, models, reason, recent} = data
  const isReady = data.health === 'ready', all = sum(minutes, prompt)
  say(isReady ? 'ok' : 'bad', isReady ? 'Ready' : 'Not ready',
    reason && reason + '. ' + advice(reason), clock(seen))
  put({
    version: 'version ' + data.version,
    flying: count(data.in_flight),
    workers: 'workers: ' + data.workers,
    requests: count(data.requests),
    failed: count(data.errors) + ' failed; ' + count(sum(minutes, get('requests'))) +
      ' in the last hour',
    hits: all ? (100 * sum(minutes, cached) / all).toFixed(1) + ' %' : '–',
    uptime: span(data.uptime_seconds),
    url: data.upstream.url})
  renew('models', Object.entries(models), (list, [name, model]) => {
    add(list, 'dt', name)
    add(list, 'dd', model)
  })
  renew('lines', data.environment, (pre, line) => add(pre, 'div', line))
  renew('recent', recent, addRequest)
  renew('errors', recent.filter(r => hasFailed(r) && alike(r)[0] === r).slice(0, 5), addError)
  renew('learned', data.adjustments, (list, a) =>
    add(list, 'li', a.model + ': ' + a.adjustment + ' ' + a.value))
  plots()
}

async function poll() {
  try {
    const answer = await fetch('status', {cache: 'no-store', signal: AbortSignal.timeout(8000)})
    const found = await answer.json()
    if (!answer.ok) throw Error(found.error.message)
    data = found
    seen = Date.now()
    show()
  } catch (error) {
    say('off', 'Not reachable', error.message,
      'since ' + clock(seen) + ', ' + span((Date.now() - seen) / 1000))
  }
  clearTimeout(timer)
  timer = setTimeout(poll, document.hidden ? 1e4 : 2e3)
}

$('copy').onclick = async () => {
  try {
    await navigator.clipboard.writeText($('lines').innerText)
    put({copied: 'Copied'})
  } catch (error) {
    getSelection().selectAllChildren($('lines'))
    put({copied: 'Selected: press Ctrl+C or ⌘C'})
  }
}
for (const [name, , look] of COLUMNS) add($('columns'), 'th', name, look, {scope: 'col'})
onresize = plots
document.onvisibilitychange = poll
poll()
</script>
"""


# ============================================================================
# 33. WORKERS
# ============================================================================
#
# With WORKERS above 1 that number of processes accept from one listening socket.  Their
# parent serves nothing itself, it watches them.  A worker that dies is replaced, at most once a
# second; the parent keeps the sockets open meanwhile, so that no client is refused.

# ---- 33.1 supervisor -------------------------------------------------------

class Supervisor:
    """The parent of the workers: starts and replaces them, and passes signals on to them.

    Each worker holds the reading end of a pipe whose writing end only the parent has: when the
    parent dies, the pipe ends, and so does the worker.
    """

    def __init__(self, options: ServeOptions) -> None:
        self._settings = options.settings
        self._counters = SharedCounters(self._settings.workers)
        lifeline, self._held_end = os.pipe()
        # The settings in force, for workers that start from now on.
        self._options = replace(options, lifeline=lifeline, handed=SharedCounters(
            1, HANDED_SIZE, lambda variables, _: json_bytes(variables)))
        self._workers: Dict[int, int] = {}                   # process id -> slot
        self._is_stopping = False

    def run(self) -> int:
        """Returns the exit code, once all workers have ended after a signal."""
        for number in (*SIGNALS, signal.SIGALRM):
            signal.signal(number, self._pass_on)
        write_pid_file(self._settings.pid_file)
        try:
            port = self._options.sockets[0].getsockname()[1]
            facts = start_facts(self._options, port)
            log(logging.INFO, "started", **facts, workers=self._settings.workers)
            for slot in range(self._settings.workers):
                self._start(slot)
            while self._workers:
                self._await_end()
            log(logging.INFO, "stopped")
        finally:
            remove_pid_file(self._settings.pid_file, os.getpid())
        return 0

    def _start(self, slot: int) -> None:
        """Forks a worker.  Signals are blocked meanwhile: none may arrive at neither process."""
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        pid = 0 if self._is_stopping else os.fork()
        if pid:
            self._workers[pid] = slot
        elif not self._is_stopping:
            self._work(slot)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def _work(self, slot: int) -> None:
        """Serves as a worker, and never returns."""
        code, parent = 1, os.getppid()
        try:
            os.close(self._held_end)
            for number in (*SIGNALS, signal.SIGALRM):
                signal.signal(number, signal.SIG_DFL)
            for file in self._options.files:
                file.forget_backlog()
            asyncio.run(serve(replace(
                self._options, new_service=partial(
                    self._options.new_service, counters=self._counters, slot=slot),
                ready=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS))))
            code = 0
        finally:
            finish_logging(self._options.files, is_last=os.getppid() != parent)
            os._exit(code)

    def _await_end(self) -> None:
        """Waits until a worker ends, and replaces it unless all are to end."""
        began = time.monotonic()
        pid, code = os.wait()
        slot = self._workers.pop(pid, None)
        if slot is None or self._is_stopping:
            return
        message = f"worker {slot} (pid {pid}) ended and is replaced"
        log(logging.ERROR, "worker_died", message=message, wait_status=code)
        time.sleep(max(0.0, WORKER_PAUSE - (time.monotonic() - began)))
        self._start(slot)

    def _pass_on(self, number: int, frame: Any) -> None:
        """Handles a signal: SIGHUP reloads; the first other one drains, a second one cuts.

        So does the alarm: a worker may hang.
        """
        if number == signal.SIGHUP:
            self._reload()
        elif self._is_stopping:
            number = signal.SIGKILL
        else:
            self._is_stopping = True
            number = signal.SIGTERM
            log(logging.INFO, "stopping")
            signal.setitimer(signal.ITIMER_REAL, DRAIN_TIME + WORKER_END_TIME)
            for item in self._options.sockets:               # open, its backlog would still accept
                item.close()
        for pid in list(self._workers):
            try:
                os.kill(pid, number)
                os.kill(pid, signal.SIGCONT)                 # one that is stopped ends, too
            except ProcessLookupError:
                pass

    def _reload(self) -> None:
        """Reads and judges the settings once, so that all workers get the same ones."""
        options = self._options
        for file in options.files:
            file.reopen_if_moved()
        if read_settings_again(options):
            options.handed.write(0, [options.reloads, options.variables.texts])
            LOG.setLevel(options.settings.log_level)


SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
WORKER_PAUSE = 1.0                       # seconds; so a crash is no busy loop
WORKER_END_TIME = 1.5                    # seconds beyond DRAIN_TIME until workers are killed


# ---- 33.2 counters ---------------------------------------------------------

class SharedCounters:
    """Memory that workers share: each writes its counts into its own slot, and reads all slots.

    A slot has two halves, written in turns: a sequence number, a length, a checksum, and JSON.  So
    a worker that dies while it writes leaves the other half.
    """

    def __init__(self, slots: int, half: int = 0,
                 encode: Optional[Callable[[Json, int], bytes]] = None) -> None:
        """`half`: bytes of half a slot, HALF_SIZE if 0; `encode`: else fitting_counts."""
        self.slots, self._half = slots, half or HALF_SIZE
        self._encode = encode or fitting_counts
        self._memory = mmap.mmap(-1, slots * 2 * self._half)
        # slot -> sequence number and counts, the newest ones that made sense
        self._newest: Dict[int, Tuple[int, Json]] = {}

    def write(self, slot: int, value: Json) -> None:
        """Writes the counts of a worker; labels that do not fit are left out."""
        data = self._encode(value, self._half - SLOT_HEAD.size)
        sequence = 1 + max(half[0] for half in [*self._halves(slot), self._last(slot)])
        start = (2 * slot + sequence % 2) * self._half
        place = start + SLOT_HEAD.size
        self._memory[place:place + len(data)] = data
        SLOT_HEAD.pack_into(self._memory, start, sequence, len(data), zlib.crc32(data, sequence))
        self._newest[slot] = sequence, self._last(slot)[1]

    def read(self, slot: int) -> Json:
        """The counts that a worker wrote last; {} if there are none."""
        halves = self._halves(slot)
        # Two halves that make sense are newer than any before, also those of a replaced worker.
        if halves and (len(halves) == 2 or max(halves)[0] >= self._last(slot)[0]):
            sequence, data = max(halves)
            self._newest[slot] = sequence, json.loads(data)
        return self._last(slot)[1]

    def _last(self, slot: int) -> Tuple[int, Json]:
        return self._newest.get(slot, (0, {}))

    def _halves(self, slot: int) -> List[Tuple[int, bytes]]:
        """(sequence number, JSON) of each half that is neither torn nor empty."""
        halves = []
        for start in (2 * slot * self._half, (2 * slot + 1) * self._half):
            sequence, size, checksum = SLOT_HEAD.unpack_from(self._memory, start)
            place = start + SLOT_HEAD.size
            data = self._memory[place:min(place + size, start + self._half)]
            if data and zlib.crc32(data, sequence) == checksum:
                halves.append((sequence, data))
        return halves


# Bytes: fifty requests, sixty minutes and all sums take about 40,000.
HALF_SIZE = 262144
# Bytes: variables of 128 KB each at most, JSON of them; untouched pages take no memory.
HANDED_SIZE = 16777216
SLOT_HEAD = struct.Struct("QII")


def fitting_counts(counts: Json, size: int) -> bytes:
    """Counts as JSON of at most `size` bytes.

    Lists for the status page are cut first.  Then the labels with the smallest amounts are counted
    as `other`; no amount is lost.
    """
    data = json_bytes(counts)
    if len(data) > size:
        counts = {**counts, "recent": counts["recent"][-5:], "adjustments": []}
        data = json_bytes(counts)
    if len(data) > size:
        counts["recent"] = []
        data = json_bytes(counts)
    all_series, left_out = counts["sums"], 0
    labels = sorted((amount, name, text) for name, series in all_series.items()
                    for text, amount in series.items() if LABEL_VALUE.search(text))
    while len(data) > size and left_out < len(labels):
        left_out = min(len(labels), 2 * left_out + 10)
        sums = {name: dict(series) for name, series in all_series.items()}
        for amount, name, text in labels[:left_out]:
            other = LABEL_VALUE.sub(r'\1="other"', text)
            del sums[name][text]
            sums[name][other] = sums[name].get(other, 0) + amount
        data = json_bytes({**counts, "sums": {**sums, "labels_left_out": {"": left_out}}})
    return data


LABEL_VALUE = re.compile(r'\b(model|route|status|outcome)="(?:[^"\\]|\\.)*"')


# ============================================================================
# 34. SPEED
# ============================================================================
#
# Shortcuts: each gives the same bytes sooner.  The program is complete without them; they
# are handed to it through `Shortcuts` (1), and `main` without SHORTCUTS is the plain program.

# ---- 34.1 chunk pattern ----------------------------------------------------

class ChunkPattern:
    """Passes the text of successive chunks on without parsing each chunk.

    Saves 6.4 of 8.8 µs for a text chunk that is read alone, and 7.0 of 7.8 µs for each of 200 in
    one read (2026-11-28, Python 3.11, time.process_time around StreamTranslator.feed with PLAIN and
    with SHORTCUTS).

    The chunks of one stream mostly differ in nothing but their text.  `_learn` splits a chunk
    around its text and proves, by parsing it again with another text in it, that nothing else in
    the chunk depends on that.  Later bytes that are the same before and after one JSON string are
    then the same chunk with another text.  All others are read in the plain way.
    """

    def __init__(self, decoder: SSEDecoder, reader: Reader, machine: BlockMachine,
                 meter: OutputMeter, writer: Writer) -> None:
        self._decoder = decoder
        self._reader = reader
        self._machine = machine
        self._meter = meter
        self._writer = writer
        self._event = ""                 # the last one read plainly
        self._head = ""                  # the pattern up to the text
        self._tail = ""                  # and after its closing quote
        self._target: Optional[PlainTarget] = None
        self._tries = LEARN_TRIES

    def feed(self, lines: str, plain: Callable[[str], None]) -> None:
        """Reads whole lines of a stream; `plain` reads the events that are not like the pattern.

        An event is learned when the next one is there, so that learning never delays an event.
        """
        place, size, runs = 0, len(lines), RUN_TRIES
        while place < size and not self._machine.has_ended:
            if self._event:
                self._learn()
            end = 0
            is_like = self._head and lines.startswith(self._head, place)
            if is_like and self._decoder.is_between_events:
                if runs and size - place > SHORT_READ:
                    runs -= 1
                    end = self._read_run(lines, place)
                end = end or self._read_one(lines, place)
            if not end:
                end = lines.find("\n\n", place) + 2
                end = end if end > 1 else size
                self._event = lines[place:end]
                plain(self._event)
            place = end

    def _read_one(self, lines: str, place: int) -> int:
        """Reads the event at a place, if it is like the pattern.  Returns its end, else 0."""
        try:
            text, end = scanstring(lines, place + len(self._head))
        except ValueError:
            return 0
        target = self._target
        if target is None or not lines.startswith(self._tail, end):
            return 0
        self._tries = LEARN_TRIES
        block = self._machine.open_block
        if type(block) is PendingText and text.isascii() and text and target.is_plain(block):
            self._meter.add(text)
            self._writer.delta(text)
        elif text:
            target.take(text)
        return end + len(self._tail)

    def _read_run(self, lines: str, place: int) -> int:
        """Reads the events at a place that are like the pattern and have plain texts, all at once.

        Their texts are found by cutting at the part that stands between two of them, and written as
        they are.  Returns the end of the last one, 0 if there is none.
        """
        block, close = self._machine.open_block, '"' + self._tail
        if self._target is None or block is None or not self._target.is_plain(block):
            return 0
        if SEPARATOR in lines:
            return 0
        texts = SEPARATOR.join(lines[place:].split(close + self._head))[len(self._head):]
        # A quote that is escaped in JSON inside JSON can end a string of the arguments.
        pattern = NO_ESCAPES if isinstance(block, PendingToolUse) else PLAIN_ESCAPES
        end = pattern.match(texts).end()         # type: ignore[union-attr]   # it matches anything
        if not texts.startswith(close, end):
            end = texts.rfind(SEPARATOR, 0, end)
        texts = texts[:max(end, 0)]
        if not texts or texts[0] == SEPARATOR or texts[-1] == SEPARATOR or SEPARATOR * 2 in texts:
            return 0                             # a text is empty: it is no delta
        count = texts.count(SEPARATOR) + 1
        self._meter.add(scanstring(texts.replace(SEPARATOR, "") + '"', 0)[0])
        self._writer.deltas(texts if texts.isascii() else NOT_ASCII.sub(escaped, texts), SEPARATOR)
        return place + len(texts) + count * (len(self._head) + len(close)) - (count - 1)

    def _learn(self) -> None:
        """Takes the last event as the pattern, if its chunk has one text and nothing else."""
        event, self._event, self._head = self._event, "", ""
        match = CHUNK_EVENT.fullmatch(event)
        if match is None or self._tries <= 0:
            return
        self._tries -= 1
        try:
            chunk = upstream_json(match[1])
        except (ValueError, RecursionError):
            return
        target = self._reader.plain_target(chunk)
        if target is not None:
            self._split(event, match.start(1), chunk, target)

    def _split(self, event: str, start: int, chunk: Json, target: PlainTarget) -> None:
        """Splits an event around the text of its chunk, and proves the split."""
        original = target.holder[target.key]
        for match in re.compile(f'"{target.key}"\\s*:\\s*"').finditer(event, start):
            try:
                text, end = scanstring(event, match.end())
                other = upstream_json(event[start:match.end()] + '?"' + event[end:-2])
            except ValueError:
                continue
            target.holder[target.key] = "?"
            is_proven = text == original and other == chunk
            target.holder[target.key] = original
            if is_proven:
                self._head, self._tail, self._target = event[:match.end()], event[end:], target
                return


def escaped(match: Match[str]) -> str:
    return quote(match[0])[1:-1]


LEARN_TRIES = 8                          # events without success, then none
RUN_TRIES = 5                            # looks at one read; each copies the read
SHORT_READ = 600                         # characters; two events gain nothing by it
SEPARATOR = "\x01"                       # stands in no JSON text
NO_ESCAPES = re.compile(r'[^"\\\x00\x02-\x1f\x7f]*')
# These escapes are written in the same way again.
PLAIN_ESCAPES = re.compile(r'(?:[^"\\\x00\x02-\x1f\x7f]+|\\["\\bfnrt])*')
NOT_ASCII = re.compile(r"[^\x00-\x7f]+")
CHUNK_EVENT = re.compile(r"data: ?(\{.*\})\n\n")


# ---- 34.2 token counts -----------------------------------------------------

def cached_tokens(item: Union[str, Json]) -> int:
    """item_tokens with a cache, because a conversation repeats its turns in each request.

    The estimate of a captured request of Claude Code, 50 to 90 KB, takes 0.2 to 0.5 ms instead of
    2.6 to 6 ms, each time that a stream begins.  Measured on 2026-11-28 with Python 3.11 by calling
    estimated_request_tokens twice.  The key is a hash, so that no prompt text is kept.  A schema of
    34.3 knows its own tokens, which saves 0.3 of these ms for 24 tools.
    """
    if isinstance(item, CachedSchema):
        item.tokens = item.tokens or item_tokens(item)
        return item.tokens
    text = item if isinstance(item, str) else readable_json(item)
    if len(text) < MIN_CACHED_TEXT:
        return estimated_tokens(text)
    key = hash(text), len(text)
    tokens = TOKEN_CACHE.get(key)
    if tokens is None:
        if len(TOKEN_CACHE) >= MAX_CACHED_TEXTS:
            TOKEN_CACHE.clear()
        tokens = TOKEN_CACHE[key] = estimated_tokens(text)
    return tokens


MIN_CACHED_TEXT = 200                    # characters; shorter ones are counted as fast
MAX_CACHED_TEXTS = 10000                 # a few numbers each: some 2 MB
TOKEN_CACHE: Dict[Tuple[int, int], int] = {}


# ---- 34.3 tools ------------------------------------------------------------
#
# A coding agent sends the same 30 to 60 KB of tools with each request.  They are parsed and read
# once, and written once as JSON.

class CachedSchema(Dict[str, Any]):
    """A tool's schema that knows its tokens, and the JSON text of its tool, mostly the same."""
    tokens = 0
    members: Sequence[Any] = ()          # of the tool, without the schema
    text = ""


def parse_with_cached_tools(text: str) -> Any:
    """client_json with a cache for the field `tools`.

    Parsing and translating a request of 117 KB with 24 tools takes 0.35 ms instead of 0.69, and a
    whole request 1.7 ms of CPU time instead of 2.3 (2026-11-28, Python 3.11: /proc/PID/stat under
    eight clients, with and without this door).  A deferred tool makes no difference.

    The text before the array and the text after it are completed to two objects, so nothing is
    put into the client's text.  Anything unusual is parsed in the plain way, errors above all.
    """
    place = tools_place(text) if len(text) <= LARGE_BODY else 0
    if not place:
        return client_json(text)
    known = next((item for item in TOOLS_CACHE if text.startswith(item, place)), "")
    try:
        if known:
            tools, end = TOOLS_CACHE[known], place + len(known)
        else:
            definitions, end = _client_decoder.raw_decode(text, place)
            tools = read_tools(definitions)
        before = client_json(text[:place] + "0}")
        rest = text[end:].lstrip(" \t\r\n")
        has_more = rest.startswith(",")
        after = client_json("{" + rest[has_more:])
    except (ProxyError, ValueError, RecursionError):
        return client_json(text)
    # The key before the array must be a whole one of the top level, not `\"tools"`.  A comma needs
    # a member after it, and a member a comma.
    if next(reversed(before)) != "tools" or "tools" in after or bool(after) != has_more:
        return client_json(text)
    store_tools(known or text[place:end], tools)
    return {**before, "tools": tools, **after}


def tools_place(text: str) -> int:
    """Where the array of the last key `tools` begins; 0 if there is none."""
    place = len(text)
    for _ in range(TOOLS_TRIES):
        place = text.rfind('"tools"', 0, place)
        match = TOOLS_KEY.match(text, place) if place > 0 else None
        if match:
            return match.end() - 1
    return 0


def read_tools(definitions: List[Any]) -> ReadTools:
    """The field `tools`, read.  Raises ProxyError."""
    read = ReadTools(definitions)
    tools, read.server_names = defined_tools(definitions)
    read.tools = {name: tool._replace(schema=CachedSchema(tool.schema))
                  for name, tool in tools.items()}
    return read


def store_tools(text: str, tools: ReadTools) -> None:
    """Makes a text the newest entry of the cache; the oldest ones leave, so that it fits."""
    if text in TOOLS_CACHE:
        TOOLS_CACHE[text] = TOOLS_CACHE.pop(text)
    elif tools_memory(text) <= MAX_TOOLS_MEMORY:
        TOOLS_CACHE[text] = tools
        while len(TOOLS_CACHE) > MAX_CACHED_TOOLS \
                or sum(map(tools_memory, TOOLS_CACHE)) > MAX_TOOLS_MEMORY:
            del TOOLS_CACHE[next(iter(TOOLS_CACHE))]


def tools_memory(text: str) -> int:
    """Bytes that an entry takes, about: its text, its JSON text, its objects, its other values."""
    return 4 * sys.getsizeof(text) + 250 * text.count("{") + 120 * text.count(",")


def encode_with_cached_tools(body: Json) -> bytes:
    """json_bytes with the tools' JSON texts of an earlier request.

    Writing the body takes 0.22 ms instead of 0.45, and the whole request 1.3 ms of CPU time instead
    of 1.7, measured like parse_with_cached_tools.
    """
    if not body.get("tools"):
        return json_bytes(body)
    names = list(body)
    place = names.index("tools")
    before = json_text({name: body[name] for name in names[:place]})[1:-1]
    after = json_text({name: body[name] for name in names[place + 1:]})[1:-1]
    tools = f'"tools":[{",".join(map(tool_text, body["tools"]))}]'
    return f"{{{','.join(filter(None, (before, tools, after)))}}}".encode("ascii")


def tool_text(tool: Json) -> str:
    """The JSON text of a tool; the one of the last request, if nothing in it is another now."""
    function = tool.get("function", tool)
    schema = function["parameters"]
    if not isinstance(schema, CachedSchema):
        return json_text(tool)
    members = [(key, value) for key, value in (*tool.items(), *function.items())
               if value is not schema and value is not function]
    if schema.members != members:
        schema.members, schema.text = members, json_text(tool)
    return schema.text


TOOLS_TRIES = 4                          # keys or texts "tools" that begin no array
TOOLS_KEY = re.compile(r'"tools"\s*:\s*\[')
MAX_CACHED_TOOLS = 8                     # an agent, its helpers and a few others
MAX_TOOLS_MEMORY = 4194304               # bytes
TOOLS_CACHE: Dict[str, ReadTools] = {}   # the newest last


# ---- 34.4 all shortcuts ----------------------------------------------------

SHORTCUTS = Shortcuts(
    chunk_pattern=ChunkPattern, count_tokens=cached_tokens, parse_body=parse_with_cached_tools,
    encode_body=encode_with_cached_tools)


# ============================================================================
# 35. COMMAND LINE
# ============================================================================
#
# Reads the command line and the configuration, and starts the program that they ask for.
# Only this section knows all of the file: it hands the demo, the page and the workers to
# sections above them, which do not name them.

# ---- 35.1 main -------------------------------------------------------------

def main(arguments: Optional[List[str]] = None, shortcuts: Shortcuts = SHORTCUTS) -> int:
    """The program.  Returns its exit code: 0, 1 could not serve, 2 usage, 78 bad configuration.

    A standard stream that is closed, or a pipe that nobody reads any more, changes nothing else.
    """
    open_standard_streams()
    try:
        return run_command(Options(**vars(command_line().parse_args(arguments))), shortcuts)
    except BrokenPipeError:
        return 1
    finally:
        for number, stream in ((1, sys.stdout), (2, sys.stderr)):
            try:
                stream.flush()
            except OSError:                          # the interpreter would complain at its end
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)


def open_standard_streams() -> None:
    """Opens /dev/null in place of closed streams: a socket would get their numbers."""
    descriptor = -1
    while descriptor < 3:
        descriptor = os.open(os.devnull, os.O_RDWR)
    os.close(descriptor)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)
    sys.stderr = sys.stderr or open(2, "w", closefd=False)


def run_command(options: Options, shortcuts: Shortcuts) -> int:
    """Does as the options say.  Returns the exit code."""
    if options.replay:
        return replay(options.replay)
    log_format = ""
    try:
        variables = read_variables(options)
        log_format = variables.texts.get("LOG_FORMAT", "")
        settings = loaded_settings(options, variables)
    except ConfigError as error:
        for problem in error.problems:
            print_error(problem, log_format)
        return EX_CONFIG
    if options.env:
        print("\n".join(shell_lines(settings, url_authority(settings, settings.server_port))))
        return 0
    if options.check:
        return asyncio.run(run_check(settings, variables.warnings))
    try:
        sockets = listening_sockets(settings.server_host, settings.server_port)
    except OSError as error:
        print_error(listen_problem(error, settings), settings.log_format)
        return 1
    files = start_logging(settings)
    log_warnings(variables.warnings)
    serve_options = ServeOptions(
        settings, variables, sockets, files, lambda: read_variables(options),
        partial(loaded_settings, options),
        partial(Service, page=STATUS_PAGE, recorder=Recording, shortcuts=shortcuts),
        start_demo if options.demo else None)
    try:
        if settings.workers > 1:
            return Supervisor(serve_options).run()
        asyncio.run(serve(serve_options))
    except KeyboardInterrupt:            # Ctrl-C before the signal handlers stand
        pass
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)     # Ctrl-C ends it now without a traceback
        finish_logging(files)
    return 0


def listen_problem(error: OSError, settings: Settings) -> str:
    """A sentence on why an address cannot be listened on, with the cure."""
    port = settings.server_port
    host = error.filename or ", ".join(settings.server_host)
    where = f"{host} port {port}"
    if error.errno == errno.EADDRINUSE:
        return (f"port {port} is in use at {host}: see who has it with `lsof -i :{port}`, "
                "or set SERVER_PORT")
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"no permission to listen on {where}: set SERVER_PORT to 1024 or more"
    return f"cannot listen on {where}: {error.strerror or error} (SERVER_HOST, SERVER_PORT)"


EX_CONFIG = 78                           # sysexits.h: unusable configuration


# ---- 35.2 options ----------------------------------------------------------

class Options(NamedTuple):
    """The options of the command line, which command_line() describes."""

    env_file: Optional[str] = None
    host: Optional[str] = None
    port: Optional[int] = None
    demo: bool = False
    check: bool = False
    env: bool = False
    replay: Optional[str] = None


def command_line() -> Any:
    """The ArgumentParser; its destinations are the fields of Options."""
    import argparse
    width = max(len(item.name) for item in fields(Settings))
    lines = [f"  {item.name.upper():{width}}  {item.metadata['help']}{default_text(item)}"
             for item in fields(Settings)]
    parser = argparse.ArgumentParser(
        prog="aiapiproxy", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Lets clients of the Anthropic Messages API use any OpenAI-compatible model.",
        epilog="Settings, from the environment or a .env file:\n" + "\n".join(lines))
    add = parser.add_argument
    add("--env-file", metavar="PATH", help="read settings from this file instead of ./.env")
    add("--host", help="address to listen on; wins over SERVER_HOST")
    add("--port", type=port_argument,
        help="port to listen on; wins over SERVER_PORT; 0: a free one")
    add("--demo", action="store_true", help="serve with a built-in offline upstream; no key needed")
    add("--check", action="store_true", help="check the configuration and the upstream, and exit")
    add("--env", action="store_true",
        help='print what points Claude Code here: eval "$(aiapiproxy --env)"')
    add("--replay", metavar="FILE",
        help="translate a recorded exchange (RECORD_DIR) again, and exit")
    add("--version", action="version", version=f"aiapiproxy {__version__}")
    return parser


def default_text(item: Any) -> str:
    """The default of a field of Settings, in brackets; "" where there is none."""
    default = item.default
    if isinstance(default, SplitResult):
        default = default.geturl()
    elif item.name == "log_level":
        default = "info"
    elif isinstance(default, tuple):
        default = ",".join(map(str, default))
    elif isinstance(default, bool):
        default = int(default)
    if default in ("", None):
        return ""
    return f" [{default:g}]" if isinstance(default, float) else f" [{default}]"


def port_argument(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", text) or int(text) > 65535:
        from argparse import ArgumentTypeError
        raise ArgumentTypeError("must be a number between 0 and 65535")
    return int(text)


# ---- 35.3 configuration ----------------------------------------------------

def read_variables(options: Options) -> Variables:
    """The variables of the environment and of the file, and warnings about them.

    Bytes that are not UTF-8 become lone surrogates, under every locale.  Raises ConfigError.
    """
    environ = {utf8_text(name): utf8_text(text) for name, text in os.environb.items()}
    path, data, mode = read_env_file(options.env_file)
    dotenv, malformed = dotenv_values(utf8_text(data))
    texts = set_variables(environ, dotenv)
    warnings = [f"{path} line {index} is not NAME=value and is skipped" for index in malformed[:20]]
    is_empty = bool(path) and not dotenv
    if is_empty:
        warnings.append(f"{path} is empty: no setting is read from it")
    if mode & 0o077 and stat.S_ISREG(mode):
        warnings.append(f"{path} can be read by others and holds a key: chmod 600 {path}")
    if any(len(key) < SHORT_KEY for key in parse_list(texts.get("PROXY_API_KEY", ""))):
        warnings.append(f"PROXY_API_KEY has a key of under {SHORT_KEY} characters: "
                        "it can be guessed")
    own_names = [name for name in environ if name.startswith(OWN_PREFIXES)]
    return Variables(texts, path, is_empty, [
        *(("env_file", {"message": text}) for text in warnings),
        *(("unknown_setting", {"message": f"{name} is not a setting: is {near} meant?"})
          for name, near in misspelled_names([*dotenv, *own_names]))])


def loaded_settings(options: Options, variables: Variables) -> Settings:
    """The settings of these variables and of the options, which win.  Raises ConfigError."""
    overrides: Json = {}
    if options.host:
        overrides["server_host"] = host_option(options.host)
    if options.port is not None:
        overrides["server_port"] = options.port
    if options.demo:
        overrides.update(openai_api_key="demo", upstream_headers=(), claude_haiku_model=DEMO_MODEL,
                         claude_sonnet_model=DEMO_MODEL, claude_opus_model=DEMO_MODEL)
    settings = load_settings(variables.texts, **overrides)
    check_certificates(settings)
    return settings


def check_certificates(settings: Settings) -> None:
    """Raises ConfigError for CA certificates that cannot be loaded."""
    name = "SSL_CERT_FILE" if settings.ssl_cert_file else "SSL_CERT_DIR"
    path = settings.ssl_cert_file or settings.ssl_cert_dir
    if settings.openai_base_url.scheme == "https" and path:
        try:
            tls_context(settings.ssl_cert_file, settings.ssl_cert_dir)
        except (OSError, ssl.SSLError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError([f"{name} {path} cannot be read: {reason}"]) from None


def host_option(text: str) -> Tuple[str, ...]:
    try:
        return parse_hosts(text)
    except ValueError as error:
        raise ConfigError([f"--host {error}"]) from None


def utf8_text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def read_env_file(named: Optional[str]) -> Tuple[str, bytes, int]:
    """The path, the bytes and the mode of the file of settings; ("", b"", 0) without one.

    `named` is the option --env-file.  The second of ENV_FILES is the service's, and a person may
    run a copy of his own: it counts as missing where it can't be read.  Raises ConfigError for any
    other file that is there and can't be read.
    """
    for path in (named,) if named else ENV_FILES:
        try:
            if not named:
                os.lstat(path)
        except OSError:
            continue
        try:
            with open(path, "rb") as file:
                return path, file.read(ENV_FILE_SIZE), os.fstat(file.fileno()).st_mode
        except OSError as error:
            if named or path == ENV_FILES[0]:
                shown = f"--env-file {path}" if named else path
                raise ConfigError([f"{shown} cannot be read: {error.strerror}"]) from None
    return "", b"", 0


ENV_FILE_SIZE = 1048576                  # bytes
SHORT_KEY = 8                            # characters; fewer can be guessed
# Variables of the environment that begin so are looked at for misspelled names.
OWN_PREFIXES = ("SERVER_", "OPENAI_", "CLAUDE_", "REQUEST_", "STREAM_", "LOG_", "ALLOWED_",
                "API_KEY_", "PROXY_", "MAX_", "WORKERS", "UPSTREAM_", "PID_")


if __name__ == "__main__":
    sys.exit(main())
