"""From the server's options to a server that runs: what goes together, and what is told to whoever started it."""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import signal
import time
from contextlib import suppress
from functools import partial
from urllib.parse import urlsplit

from streaming.audio import FRAME_RATE
from streaming.command import INTERRUPTED, call_at_end_of_input, complain, end_on_signals, raise_on_interrupt, say
from streaming.engine.engine import Engine
from streaming.errors import StreamingError
from streaming.protocol import opus_calls
from streaming.server import event_loop
from streaming.server.door.bind import check_address, check_bind
from streaming.server.door.gatekeeper import Gatekeeper
from streaming.server.door.limits import Limits
from streaming.server.door.origins import parse_origins
from streaming.server.door.proxies import parse_proxies
from streaming.server.door.session_key import SessionKeyError, load_session_key
from streaming.server.door.tls import load_tls
from streaming.server.door.tokens import load_tokens
from streaming.server.server import ServerOptions, Shutdown, run_server
from streaming.server.session_store import SessionStore
from streaming.server.watch import log

_LOG = logging.getLogger("streaming.server")


def page_of(url: str) -> str:
    """Return where a browser on this machine finds the page of the server that listens at `url`."""
    parts = urlsplit(url)
    everywhere = parts.hostname in ("0.0.0.0", "::")  # noqa: S104  # which is no address to go to
    host = f"localhost:{parts.port}" if everywhere else parts.netloc
    return f"{'https' if parts.scheme == 'wss' else 'http'}://{host}/"


def introduce(engine: Engine) -> None:
    """Tell the person at the terminal what was loaded; the log has it in `server.started`."""
    shape = f"{engine.num_codebooks} codebooks, {engine.context_frames / FRAME_RATE:.1f} s of context"
    complain(f"{engine.model}: {shape}, {engine.stats().slots} slots")
    complain(f"it runs on {engine.device} in {engine.dtype}, with {engine.operations} operations")
    if engine.notice:
        complain(f"note: {engine.notice}")


async def serve(engine: Engine, keeper: Gatekeeper, options: ServerOptions, *, until_eof: bool, text: bool) -> None:
    """Serve until told to stop. text: whether a person is told of the page, beside the line for programs."""
    shutdown = Shutdown()
    loop = asyncio.get_running_loop()
    with suppress(NotImplementedError):  # Windows: Ctrl-C arrives as KeyboardInterrupt
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, shutdown.request)
    if until_eof:
        call_at_end_of_input(partial(loop.call_soon_threadsafe, shutdown.request_at_once))

    def listening(url: str) -> None:
        say(f"listening on {url}")
        if text and not until_eof:
            complain(f"Open {page_of(url)}")

    await run_server(engine, keeper, options, shutdown, listening)


def run(options: argparse.Namespace, program: str) -> int:
    """Run the server as its options say; return the exit status. program: what its complaints begin with."""
    log.configure(options.log_format, options.log_level)
    try:
        tokens = load_tokens(os.environ, options.tokens, time.monotonic())
        tls = load_tls(options.tls_cert, options.tls_key)
        bind = check_bind(options.host, tokens, tls=tls is not None, insecure_plaintext=options.insecure_plaintext)
        limits = Limits(options.sessions_per_token, options.sessions_per_address)
        origins, proxies = parse_origins(options.allow_origin), parse_proxies(options.trusted_proxy)
        keeper = Gatekeeper(bind, tokens, origins, limits, proxies)
        key = load_session_key(os.environ, options.session_key)
        if options.allow_save and key is None:
            raise SessionKeyError("--allow-save takes a session key: --session-key FILE or STREAMING_SESSION_KEY")
        served = ServerOptions(
            port=options.port,
            tls=tls,
            queue=options.queue,
            idle_s=options.idle_seconds,
            takes=options.takes,
            allow_save=options.allow_save,
            session_key=key,
            store=None if options.session_store is None else SessionStore(options.session_store, key),
            resume_s=options.resume_seconds,
            drain_s=options.drain_seconds,
        )
        check_address(bind, options.port)
        _LOG.info("loading PyTorch")
        from streaming.loading import load_engine, use_threads  # brings torch, which takes seconds

        use_threads(options.threads)
        opus_calls.prepare()
        with load_engine(
            options.model,
            options.codec,
            device=options.device,
            dtype=options.dtype,
            quantize=options.quantize,
            max_sessions=options.max_sessions,
            context_tokens=options.context_tokens,
            codec_dtype=options.codec_dtype,
            codec_window=options.codec_window,
            memory_share=options.memory_share,
        ) as engine:
            if options.log_format == "text":
                introduce(engine)
            gc.collect()
            gc.freeze()  # hundreds of thousands of objects that stay: going through them took 0.3 s of everybody's time
            raise_on_interrupt()  # where the loop cannot handle signals
            text = options.log_format == "text"
            event_loop.run(serve(engine, keeper, served, until_eof=options.until_eof, text=text))
            status = 1 if engine.failure is not None else 0
            end_on_signals(status)  # the server is over, and only closes what is open
            if engine.hung:  # Python would wait for the device at its end, for ever
                os._exit(status)
            return status
    except StreamingError as error:
        if options.log_format == "text":
            complain(f"{program}: {error}")
        else:
            log.event(_LOG, logging.ERROR, "server.failed", code=error.code, message=str(error))
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
