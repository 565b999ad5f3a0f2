"""Spans of a request on its way, sent to an OpenTelemetry collector; nothing at all unless that is asked for.

A parent is always named, never ambient: as W3C's `traceparent`, which goes in by HTTP, through the queue to a worker,
and out to another server. Spans have numbers, names and times: no prompts, answers, keys, nor messages of errors.
The library is imported only when traces are on. Not here: which spans there are; whoever does the work says.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from importlib.metadata import version
from typing import Any, cast

from pingjia.types import Chunk

log = logging.getLogger("pingjia.trace")

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_CLOSE_MS = 3_000
_KINDS = ("internal", "server", "client", "producer", "consumer")


class Span:
    """One step of a request; a context that ends it. Without a tracer it does nothing."""

    def __init__(self, tracer: Tracer, span: Any = None) -> None:
        self._tracer = tracer
        self._span = span
        self.is_over = span is None

    @property
    def carrier(self) -> str:
        """`traceparent`, and behind a space `tracestate` where there is one; "" when traces are off."""
        return "" if self._span is None else self._tracer.carrier_of(self._span)

    def child(self, name: str, **attributes: Any) -> Span:
        """A step within this one."""
        return self if self._span is None else self._tracer.span(name, self.carrier, **attributes)

    def set(self, **attributes: Any) -> None:
        """Numbers and names about it; underscores become dots where they are doubled."""
        if not self.is_over:
            self._span.set_attributes(_named(attributes))

    def rename(self, name: str) -> None:
        """Call it otherwise."""
        if not self.is_over:
            self._span.update_name(name)

    def fail(self, what: BaseException | str) -> None:
        """It went wrong. Of an exception only the kind is told."""
        if self.is_over:
            return
        from opentelemetry.trace import Status, StatusCode

        kind = what if isinstance(what, str) else type(what).__name__
        self._span.set_attribute("error.type", kind)
        self._span.set_status(Status(StatusCode.ERROR))

    def end(self) -> None:
        """It is over; more of it is not told."""
        if not self.is_over:
            self.is_over = True
            self._span.end()

    def __enter__(self) -> Span:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is not None:
            self.fail(error)
        self.end()


class Tracer:
    """Makes spans. `provider` is OpenTelemetry's; None: traces are off."""

    def __init__(self, provider: Any = None) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("pingjia") if provider is not None else None

    @property
    def is_on(self) -> bool:
        return self._tracer is not None

    def span(
        self, name: str, parent: str = "", *, kind: str = "internal", ago_s: float = 0.0, **attributes: Any
    ) -> Span:
        """A span that begins now, or began a while ago. parent: a carrier; "" begins a trace."""
        if self._tracer is None:
            return NO_SPAN
        from opentelemetry.trace import SpanKind

        began = time.time_ns() - int(ago_s * 1e9)
        made = self._tracer.start_span(
            name, _context(parent), SpanKind(_KINDS.index(kind)), _named(attributes), start_time=began
        )
        return Span(self, made)

    def carrier_of(self, span: Any) -> str:
        from opentelemetry.trace import set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        found: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(found, set_span_in_context(span))
        return " ".join(filter(None, (found.get("traceparent"), found.get("tracestate"))))

    def close(self) -> None:
        """Send what is left, for a few seconds at most. Blocks."""
        if self._provider is not None:
            self._provider.force_flush(_CLOSE_MS)
            self._provider.shutdown()


NO_TRACER = Tracer()
NO_SPAN = Span(NO_TRACER)


def open_tracer(service: str, url: str | None, environ: Mapping[str, str]) -> Tracer:
    """The tracer that a setting (`http://collector:4318`) or the OTEL_* variables ask for; off without either.

    Raises ModuleNotFoundError without the extra `otel` where the setting asks.
    """
    if environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or not (url or _is_asked_by(environ)):
        return NO_TRACER
    try:
        return Tracer(_provider(service, url, environ))
    except ModuleNotFoundError as e:
        if url:
            raise
        log.warning("OTEL_* asks for traces, and %s is not installed: pip install 'pingjia[otel]'", e.name)
        return NO_TRACER


def _is_asked_by(environ: Mapping[str, str]) -> bool:
    return any(environ.get(name) for name in _ENDPOINTS) and environ.get("OTEL_TRACES_EXPORTER", "otlp") == "otlp"


def _provider(service: str, url: str | None, environ: Mapping[str, str]) -> Any:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    name = environ.get("OTEL_SERVICE_NAME") or service
    resource = Resource.create({"service.name": name, "service.version": version("pingjia")})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    exporter = OTLPSpanExporter(endpoint=f"{url.rstrip('/')}/v1/traces") if url else OTLPSpanExporter()
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


async def traced(chunks: AsyncIterator[Chunk], tracer: Tracer, parent: str) -> AsyncIterator[Chunk]:
    """The chunks of one answer, told as two spans: up to the first of them, and from it to the end."""
    span, num_tokens = tracer.span("prefill", parent), 0
    has_begun = False
    try:
        async with aclosing(cast("AsyncGenerator[Chunk, None]", chunks)) as stream:
            async for chunk in stream:
                num_tokens += len(chunk.token_ids)
                if not has_begun and (chunk.text or chunk.token_ids):
                    has_begun = True
                    span.end()
                    span = tracer.span("decode", parent)
                if chunk.finish_reason is not None:
                    span.set(pingjia__tokens=num_tokens, pingjia__finish_reason=chunk.finish_reason)
                yield chunk
    except GeneratorExit:
        span.set(pingjia__tokens=num_tokens)
        raise
    except BaseException as e:
        span.fail(e)
        raise
    finally:
        span.end()


def _context(carrier: str) -> Any:
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    parent, _, state = carrier.partition(" ")
    fields = {"traceparent": parent, "tracestate": state} if state else {"traceparent": parent}
    return TraceContextTextMapPropagator().extract(fields, Context())


def _named(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {name.replace("__", "."): value for name, value in attributes.items() if value is not None}
