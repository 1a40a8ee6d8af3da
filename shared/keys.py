"""Every Redis key, and the only place that spells one.

name (after the `{whisper}:` prefix)  type    lifetime           meaning
------------------------------------  ------  -----------------  ----------------------------------
job:<job id>                          hash    retention + grace  one caller's claim ticket
jobs:<name>                           zset    while there are    its jobs -> submitted at (us)
batch:<batch id>                      zset    while there are    its jobs -> their number in it
listed                                zset    for ever           job id/batch id/name -> when it
                                                                 leaves these two lists (ms)
idempotency:<name>/<key's SHA-256>    hash    retention          the jobs of one Idempotency-Key,
                                                                 and the digest of its request
transcription:<fingerprint>           hash    retention + grace  the unit of work behind jobs
transcription:<fingerprint>#<number>  hash    its parent's run   a part of a long recording
holders:<fingerprint>                 set     as transcription   ids of the jobs that hold it
transcript:<fingerprint>              string  retention          the result, rendered JSON
transcript:<fingerprint>#<number>     string  its parent's run   a part's segments, JSON
queue                                 zset    for ever           fingerprint -> its place: where it
                                                                 starts on the queue's clock (in
                                                                 weight), moved by its priority
waiting                               zset    for ever           the same -> queued at (us)
parts                                 zset    for ever           part -> its place, as above, on a
                                                                 clock of their own
lines:<queue>/<priority>/<name>       zset    a month unused     what waits of this caller's, and
                                                                 `taken` -> its end on the clock
backlogs                              zset    while it waits     name -> weight of what waits
leases                                zset    for ever           unit of work -> lease end (ms)
transcripts                           zset    for ever           fingerprint -> its end (ms)
transcript_sizes                      hash    for ever           fingerprint -> bytes
counters                              hash    for ever           what happened since the beginning;
                                                                 backlog: weight of what waits;
                                                                 clock, parts_clock: how far the two
                                                                 queues are; ..._ends: where what
                                                                 was taken ends; ..._low, _normal,
                                                                 _high: how far that priority is;
                                                                 ..._waiting: how many units it has
pace                                  hash    for ever           weight and slot time (ms) of what
                                                                 was completed lately
workers                               zset    for ever           worker id -> last heartbeat (ms)
worker:<worker id>                    string  some heartbeats    what it says of itself, JSON
api_key:<key id>                      hash    until revoked      an API key: its digest, its name,
                                                                 what it may
api_keys                              set     for ever           their ids
rate:<name>                           string  until it is past   when the next request of who has
                                                                 this name would be on time (us)
unfinished:<name>                     hash    while there are    job id -> audio held for it (ms)
held:<name>                           string  while there are    the sum of these
audio_used:<name>                     string  to midnight (UTC)  audio transcribed for it (ms)
changes:<fingerprint>                 channel                    moved | ended [job id]
delivery:<job id>                     hash    as its job         how its webhook was told its end:
                                                                 state, attempts
undelivered                           zset    for ever           job id -> its end (ms), until its
                                                                 webhook knows, or is given up
receivers                             zset    for ever           receiver (scheme and host of a
                                                                 webhook) -> when its next delivery
                                                                 is due (ms)
deliveries:<receiver>                 zset    while there are    job id -> when it is due (ms); of
                                                                 one under way, when its lease ends
renewed                               string  for ever           which writes Redis had refused for
                                                                 its disk when its file was last
                                                                 written anew (shorter: is now)

The prefix is a hash tag, so all keys share one slot. Records of unfinished work have no lifetime:
they end when the work does. The broker's own keys (the list `transcriptions` and kombu's) are
named in shared/broker.py.

Lua scripts reach the same names through LUA_PRELUDE, which the loader puts before each of them.
"""

from __future__ import annotations

PREFIX = "{whisper}:"

QUEUE = PREFIX + "queue"
WAITING = PREFIX + "waiting"
PARTS = PREFIX + "parts"
BACKLOGS = PREFIX + "backlogs"
LEASES = PREFIX + "leases"
TRANSCRIPTS = PREFIX + "transcripts"
TRANSCRIPT_SIZES = PREFIX + "transcript_sizes"
COUNTERS = PREFIX + "counters"
PACE = PREFIX + "pace"
WORKERS = PREFIX + "workers"
LISTED = PREFIX + "listed"
API_KEYS = PREFIX + "api_keys"
UNDELIVERED = PREFIX + "undelivered"
RECEIVERS = PREFIX + "receivers"
RENEWED = PREFIX + "renewed"


def job(job_id: str) -> str:
    return f"{PREFIX}job:{job_id}"


def jobs(name: str) -> str:
    """`name`: an API key's, who owns what is submitted with it; '' without keys; so below."""
    return f"{PREFIX}jobs:{name}"


def batch(batch_id: str) -> str:
    return f"{PREFIX}batch:{batch_id}"


def idempotency(name_and_key: str) -> str:
    return f"{PREFIX}idempotency:{name_and_key}"


def transcription(fingerprint: str) -> str:
    return f"{PREFIX}transcription:{fingerprint}"


def lines(queue_priority_and_name: str) -> str:
    return f"{PREFIX}lines:{queue_priority_and_name}"


def holders(fingerprint: str) -> str:
    return f"{PREFIX}holders:{fingerprint}"


def transcript(fingerprint: str) -> str:
    return f"{PREFIX}transcript:{fingerprint}"


def part(fingerprint: str, number: int) -> str:
    """The unit of work, in the place of a fingerprint; as part() of _common.lua."""
    return f"{fingerprint}#{number:04}"


def worker(worker_id: str) -> str:
    return f"{PREFIX}worker:{worker_id}"


def api_key(key_id: str) -> str:
    return f"{PREFIX}api_key:{key_id}"


def rate(name: str) -> str:
    return f"{PREFIX}rate:{name}"


def unfinished(name: str) -> str:
    return f"{PREFIX}unfinished:{name}"


def held(name: str) -> str:
    return f"{PREFIX}held:{name}"


def audio_used(name: str) -> str:
    return f"{PREFIX}audio_used:{name}"


def changes(fingerprint: str) -> str:
    return f"{PREFIX}changes:{fingerprint}"


def delivery(job_id: str) -> str:
    return f"{PREFIX}delivery:{job_id}"


def deliveries(receiver: str) -> str:
    """`receiver`: as receiver_of() of _common.lua has it."""
    return f"{PREFIX}deliveries:{receiver}"


LUA_PRELUDE = "\n".join(
    [
        f"local {name.upper()} = '{value}'"
        for name, value in [
            ("queue", QUEUE),
            ("waiting", WAITING),
            ("parts", PARTS),
            ("backlogs", BACKLOGS),
            ("leases", LEASES),
            ("transcripts", TRANSCRIPTS),
            ("transcript_sizes", TRANSCRIPT_SIZES),
            ("counters", COUNTERS),
            ("pace", PACE),
            ("listed", LISTED),
            ("undelivered", UNDELIVERED),
            ("receivers", RECEIVERS),
        ]
    ]
    + [
        f"local function {function.__name__}(id) return '{function('')}' .. id end"
        for function in (
            job,
            jobs,
            batch,
            idempotency,
            transcription,
            lines,
            holders,
            transcript,
            rate,
            unfinished,
            held,
            audio_used,
            changes,
            delivery,
            deliveries,
        )
    ]
)
