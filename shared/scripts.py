"""Loads the Lua scripts of shared/lua, one for each atomic verb of the job store."""

from __future__ import annotations

from importlib.resources import files

from shared.keys import LUA_PRELUDE

# Verbs that free memory or save work that is done: Redis must run them even above its maxmemory.
# The flag line exists since Redis 7.0; an older server gets the script without it.
_ALLOWED_OVER_MEMORY = frozenset(
    {
        "renew",
        "split",
        "finish_part",
        "finish",
        "release",
        "replan",
        "reap",
        "evict",
        "cancel",
        "erase",
        "meter",
        "claim_deliveries",
        "settle_delivery",
        "redeliver",
    }
)
# These answer also while a server refuses to write, as with a full disk.
_READING = frozenset({"read", "known", "before", "list", "delivery"})


def source(verb: str, *, has_flags: bool) -> str:
    """The text of shared/lua/<verb>.lua with the key names and common functions before it.

    `has_flags`: the server understands `#!lua flags=...` (Redis >= 7.0, any Valkey).
    """
    folder = files("shared") / "lua"
    body = "\n".join(
        [LUA_PRELUDE, (folder / "_common.lua").read_text(), (folder / f"{verb}.lua").read_text()]
    )
    if has_flags and verb in _ALLOWED_OVER_MEMORY:
        return "#!lua flags=allow-oom\n" + body
    if has_flags and verb in _READING:
        return "#!lua flags=no-writes\n" + body
    return body


def has_script_flags(redis_version: str) -> bool:
    """`redis_version`: as INFO reports it; Valkey reports the Redis version that it stands for."""
    return int(redis_version.split(".", maxsplit=1)[0]) >= 7
