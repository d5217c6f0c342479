"""Serve a model behind OpenAI's chat API, on this machine alone unless a key is given.

Any client of OpenAI's API can then ask it, with base_url http://127.0.0.1:8000/v1. Media come as data: URLs. Ctrl-C or
SIGTERM ends what is under way, then the server. What is promised is in docs/security.md. Examples:
  polymodal serve
  polymodal serve --model default --model runs/mine/final --name default --name mine
  polymodal serve --renderer drawer --voice piper
  polymodal serve --model runs/mine/final --host 0.0.0.0 --api-key-env MY_KEY
"""

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from polymodal.backends import load_renderer
from polymodal.backends.base import ModelBackend
from polymodal.cli import common
from polymodal.errors import ConfigError
from polymodal.utils.extras import extra
from polymodal.utils.files import home_path, regular_size

SHORTEST_KEY = 16
LONGEST_KEY = 4096
PACKAGES = ("starlette", "uvicorn", "python_multipart", "prometheus_client")
ANY_TEXT = 4_000_000
"""Characters of a request's texts, where the model's tokens are not known."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    add = parser.add_argument
    add(
        "--model",
        action="append",
        metavar="NAME",
        help='"default", a model folder, or a hub id (default: the one that comes with polymodal); again for another',
    )
    common.add_loading_arguments(parser, "auto")
    add("--name", action="append", help="what requests call the model (the last part of its name); once a --model")
    add("--renderer", metavar="NAME", help="what draws, as for `polymodal draw`, such as drawer (nothing)")
    add("--voice", metavar="NAME", help="what speaks, as for `polymodal speak` (piper where it is installed; none)")
    add("--asr", metavar="NAME", help="what writes speech down, as for `polymodal transcribe` (an installed one)")
    add("--allowed-media-domains", metavar="LIST", help="hosts to fetch media from, such as a.com,*.b.org (none)")
    add("--allowed-local-media-path", metavar="DIR", help="a folder whose files requests may name (none)")
    add("--host", default="127.0.0.1", help="the address (%(default)s); any but this machine's own needs a key")
    add("--port", type=int, default=8000, help="the port (%(default)s)")
    keys = parser.add_mutually_exclusive_group()  # no flag with the key itself, since command lines are seen by others
    keys.add_argument("--api-key-env", metavar="VAR", help="the variable of the environment with the key")
    keys.add_argument("--api-key-file", metavar="FILE", help="the file with the key")
    add("--max-tokens", type=int, default=4096, metavar="N", help="the most that an answer may have (%(default)s)")
    add(
        "--queue", type=int, default=16, metavar="N", help="requests that may wait; others get status 429 (%(default)s)"
    )
    add("--streams", type=int, default=4, metavar="N", help="answers that a model makes at once (%(default)s)")
    add("--prefix-cache", type=int, default=512, metavar="MB", help="kept of earlier conversations (512); 0 for none")
    add("--media-cache", type=int, default=256, metavar="MB", help="kept of images, videos and sounds (256)")
    add("--timeout", type=float, default=600.0, metavar="S", help="seconds of a request, waiting included (600)")
    add("--runs", metavar="DIR", help="the folder of training runs that the web page shows (runs, where there is one)")
    add("--drain", type=float, default=30.0, metavar="S", help="seconds to end what is under way at SIGTERM (30)")


def run(args: argparse.Namespace) -> int:
    """Take the address, open the model, serve until a signal."""
    for name in PACKAGES:
        extra(name, "serve needs", "polymodal[serve]")
    from polymodal.serving.app import build_app
    from polymodal.serving.models import Served
    from polymodal.serving.scheduler import Scheduler
    from polymodal.serving.server import bind, is_loopback, log_to_stderr, make_server

    for flag, least, most in (
        ("port", 0, 65535),
        *((flag, 1, 10**6) for flag in ("max_tokens", "queue", "timeout", "drain")),
        *((flag, 0, 10**6) for flag in ("prefix_cache", "media_cache")),
        ("streams", 1, 64),
    ):
        if not least <= getattr(args, flag) <= most:
            raise ConfigError(f"--{flag.replace('_', '-')} must be from {least:,} to {most:,}")
    key, loopback = _key(args), is_loopback(args.host)
    if key is None and not loopback:
        raise ConfigError(
            f"--host {args.host}: others can reach this address, so a key is needed: --api-key-env or --api-key-file"
        )
    runs = home_path(args.runs or "runs")
    if args.runs and not runs.is_dir():
        raise ConfigError(f"--runs {args.runs}: there is no such folder")
    names = _names(args.model or ["default"], args.name or [])
    address = bind(args.host, args.port)
    models, makers = {}, _makers(args)
    for name, folder in names.items():
        model = common.open_model(argparse.Namespace(**{**vars(args), "model": folder}))
        most, chars = args.max_tokens, ANY_TEXT
        if isinstance(model, ModelBackend):
            model.trims = False  # what a client sent is answered as it is, or refused
            most = min(most, model.context_length)
            chars = min(chars, model.context_length * max(map(len, model.tokenizer.get_vocab())))
        scheduler = Scheduler(model, args.queue, args.timeout, args.streams, args.prefix_cache, args.media_cache)
        models[name] = Served(model, scheduler, name, most, 512, chars, int(time.time()), makers)
    log_to_stderr(bool(getattr(args, "debug", False)))
    host, port = address.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    every = f"{' and '.join(map(common.one_line, models))} {'is' if len(models) == 1 else 'are'}"
    common.note(f"{every} served at {url}/v1, and on a page at {url}; Ctrl-C ends")
    if not loopback:
        common.note("the key and all that is said travel unencrypted; put a proxy with TLS before this address")
    app = build_app(models, key, loopback, runs_folder=runs if runs.is_dir() else None)
    make_server(app, args.drain).run(sockets=[address])
    return 0


def _names(folders: Sequence[str], given: Sequence[str]) -> dict[str, str]:
    """What requests call each model, and what it is opened as."""
    if given and len(given) != len(folders):
        raise ConfigError(f"--name is given {len(given)} times and --model {len(folders)} times; give a name to each")
    names = given or [Path(folder.removeprefix("openai:")).name or "model" for folder in folders]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"two models are called {twice[0]!r}; give each its own with --name, as often as --model")
    return dict(zip(names, folders, strict=True))


def _makers(args: argparse.Namespace) -> Any:
    """What draws, speaks and listens, and where media come from: what is only found is opened when it is needed."""
    from polymodal.media.decoders import Decoders
    from polymodal.serving.fetching import Sources
    from polymodal.serving.makers import Makers
    from polymodal.speech import load_asr, load_tts
    from polymodal.speech.asr import installed_asr
    from polymodal.speech.tts import installed_voice

    domains = tuple(each.strip().lower() for each in (args.allowed_media_domains or "").split(",") if each.strip())
    folder = args.allowed_local_media_path
    sources = Sources(domains, None if folder is None else home_path(folder).absolute())
    renderer = None if args.renderer in (None, "none") else load_renderer(args.renderer)
    voice = installed_voice() if args.voice is None else None if args.voice == "none" else load_tts(args.voice)
    asr = installed_asr() if args.asr is None else None if args.asr == "none" else load_asr(args.asr)
    return Makers(renderer, voice, asr, sources=replace(sources, decoders=Decoders()))


def _key(args: argparse.Namespace) -> str | None:
    """The key that clients have to give."""
    if args.api_key_env is not None:
        where, key = f"--api-key-env {args.api_key_env}", os.environ.get(args.api_key_env, "")
    elif args.api_key_file is not None:
        where, path = f"--api-key-file {args.api_key_file}", home_path(args.api_key_file)
        if regular_size(path, where, ConfigError) > LONGEST_KEY:
            raise ConfigError(f"{where}: is no file with a key in it")
        try:
            key = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{where}: cannot be read ({getattr(error, 'strerror', None) or 'no text'})") from None
    else:
        return None
    key = key.strip()
    if len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key:
        rule = f"a key has {SHORTEST_KEY} or more letters, digits and signs of ASCII, without spaces"
        raise ConfigError(f"{where}: {rule}; `openssl rand -hex 32` makes one")
    return key
