"""`python -m api.keys`: makes, lists and revokes API keys. It needs Redis, not the API."""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
from collections.abc import Sequence

from api.__main__ import EXIT_CONFIG
from api.key_store import NAME, ApiKey, KeyStore, Scope, make
from api.store import Limits, connect
from shared.errors import InvalidSettings, StoreUnavailable
from shared.settings import Settings, load_settings

PERIODS = {"second": 1_000, "minute": 60_000, "hour": 3_600_000, "day": 86_400_000}
HEADINGS = ("ID", "NAME", "SCOPES", "REQUESTS", "JOBS", "AUDIO MINUTES", "MADE")
_RATE = re.compile(rf"([1-9]\d{{0,8}})/({'|'.join(PERIODS)})")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    arguments = parser().parse_args(argv)
    try:
        return asyncio.run(run(arguments, load_settings()))
    except InvalidSettings as exc:
        print(exc.message, file=sys.stderr)
        return EXIT_CONFIG
    except StoreUnavailable as exc:
        print(f"{exc.message} Is REDIS_URL right ({exc.__cause__})?", file=sys.stderr)
        return 1


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m api.keys", description="API keys, for AUTH=keys")
    commands = made.add_subparsers(dest="command", required=True)
    create = commands.add_parser("create", help="make a key; prints it, once")
    create.add_argument("--name", required=True, type=name, help="whose it is; jobs belong to it")
    create.add_argument(
        "--scopes",
        type=scopes,
        default=frozenset({Scope.SUBMIT, Scope.READ}),
        help=f"comma-separated: {', '.join(Scope)} (default: submit,read)",
    )
    create.add_argument(
        "--rate", type=rate, default=(None, 60_000), help="requests, as 20/second or 600/minute"
    )
    create.add_argument("--concurrent", type=positive, help="most unfinished jobs")
    create.add_argument("--audio-minutes", type=positive, help="minutes of audio a day (UTC)")
    create.add_argument(
        "--another", action="store_true", help="although there is one of this name: to replace it"
    )
    commands.add_parser("list", help="show all keys: what they may, never the keys themselves")
    revoke = commands.add_parser("revoke", help="end a key; its jobs stay")
    revoke.add_argument("key_id", help="as `list` shows it")
    return made


async def run(arguments: argparse.Namespace, settings: Settings) -> int:
    store = KeyStore(connect(settings))
    try:
        if arguments.command == "create":
            return await create(store, arguments)
        if arguments.command == "revoke":
            return await revoke(store, arguments.key_id)
        print_table(await store.all())
        return 0
    finally:
        await store.close()


async def create(store: KeyStore, arguments: argparse.Namespace) -> int:
    """The key alone goes to stdout."""
    has_one = any(key.name == arguments.name for key in await store.all())
    if has_one and not arguments.another:
        print(
            f"There is a key named {arguments.name} already. Keys of one name see the same jobs "
            "and share limits. To replace it, add --another, and revoke the old one later.",
            file=sys.stderr,
        )
        return 1
    requests, period_ms = arguments.rate
    limits = Limits(requests, period_ms, arguments.concurrent, arguments.audio_minutes)
    key, text = make(arguments.name, arguments.scopes, limits)
    await store.add(key)
    print(f"Key {key.key_id} of {key.name}. Keep it: it is not shown again.", file=sys.stderr)
    print(text)
    return 0


async def revoke(store: KeyStore, key_id: str) -> int:
    key = await store.revoke(key_id)
    if key is None:
        print(f"There is no key {key_id}; `list` shows all.", file=sys.stderr)
        return 1
    print(f"Key {key_id} of {key.name} is revoked.", file=sys.stderr)
    return 0


def print_table(found: list[ApiKey]) -> None:
    rows = [HEADINGS, *map(row, found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for cells in rows:
        print("  ".join(map(str.ljust, cells, widths)).rstrip())


def row(key: ApiKey) -> tuple[str, ...]:
    limits = key.limits
    period = next(name for name, ms in PERIODS.items() if ms == limits.period_ms)
    return (
        key.key_id,
        key.name,
        ",".join(sorted(key.scopes)),
        f"{limits.requests}/{period}" if limits.requests else "-",
        str(limits.jobs or "-"),
        str(limits.audio_minutes or "-"),
        f"{key.created_at:%Y-%m-%d}",
    )


def name(text: str) -> str:
    if not NAME.fullmatch(text):
        raise argparse.ArgumentTypeError(
            f"{text!r}: up to 64 lower-case letters, digits, '.', '_' and '-'"
        )
    return text


def scopes(text: str) -> frozenset[Scope]:
    try:
        return frozenset(Scope(each.strip()) for each in text.split(","))
    except ValueError as exc:
        raise argparse.ArgumentTypeError(f"{text!r}: choose from {', '.join(Scope)}") from exc


def rate(text: str) -> tuple[int, int]:
    """`600/minute` -> (600, 60000)"""
    match = _RATE.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(
            f"{text!r}: write it as 600/minute; also {', '.join(PERIODS)}"
        )
    return int(match[1]), PERIODS[match[2]]


def positive(text: str) -> int:
    if not text.isdigit() or not 0 < int(text) < 10**9:
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number above 0")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
