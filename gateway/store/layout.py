"""The names of all keys in the store. No other module makes one.

All begin with `sh:`. The braces are hash tags: keys that one script uses are in one cluster slot.

    sh:schema                        version of this layout
    sh:keys                          set of API key ids
    sh:keys:version                  counter, raised after every change to a key
    sh:keys:used                     set of API key ids that have usage, including keys from the environment
    sh:{k:<key id>}:key              the API key's record as JSON, its secret as SHA-256
    sh:{k:<key id>}:w:<model>        hash: sliding window, see lua/window.lua; for a minute
    sh:{k:<key id>}:run:<model>      sorted set: running requests by lease expiry in ms
    sh:{k:<key id>}:run              the same over all models
    sh:{k:<key id>}:day:<date>       tokens reserved or spent on that day, where the key has a daily budget; two days
    sh:{k:<key id>}:open             hash: reservations that are not settled, see lua/reservation.lua; two days
    sh:{k:<key id>}:open:until       sorted set: the same by lease expiry in ms
    sh:{k:<key id>}:applied          hash: gateway process -> number of its last ledger entry, for 30 days
    sh:{k:<key id>}:applied:at       sorted set: the same processes by the Unix second of that entry
    sh:{k:<key id>}:u:<date>:<model> hash: usage of that day (UTC), for 400 days
    sh:{k:<key id>}:days             set of "<date>:<model>" that have usage, for 400 days
    sh:{k:<key id>}:derived          hash: sessions of requests that named none, by id, as JSON; `:at` by expiry,
                                     `:prompts` and `:seen` digests of their prompts, see derived_sessions.py
    sh:{k:<key id>}:kept             sorted set: sessions and responses that the key pays for, by expiry in ms; `:b`
                                     hash: their bytes. `:logs`, `:jobs`: the same of event logs and waiting jobs
    sh:cache-salt                    secret with which the gateways of this store salt cached prompts
    sh:drain:interrupted             how many exchanges shutdowns have cut short
    sh:{s:<session id>}              hash: owner, creation time, incarnation, turns begun, bytes, API key that pays
    sh:{s:<session id>}:t            sorted set: turns as JSON, by turn number, see lua/session_turns.lua
    sh:{s:<session id>}:x            there for a minute after a derived session was deleted
    sh:{r:<response id>}             a response as JSON: its owner, object, input items, and the ids before it
    sh:{r:<response id>}:h           hash: its owner and state, for scripts
    sh:{r:<response id>}:t           its messages as JSON; large values are in `:0` and `:1`, see pieces.py
    sh:{r:<response id>}:l           there while a gateway is making it
    sh:{r:<response id>}:x           there for an hour after one was deleted whose gateway had lost its lease
    sh:{l:<log id>}                  hash: an event log's owner, writer, newest reader, and how far it is; the id is a
                                     completion's, or <key id>:<client id>
    sh:{l:<log id>}:e                stream: its frames in batches, under the number of the last of each
    sh:{l:<log id>}:q                list: a client's jobs as JSON, the one that runs first
    sh:{p:<gateway process>}:pokes   set of log ids that this process has to look at, for a minute
    sh:{p:<gateway process>}:cancelled  set of response ids that this process has to cancel, for a minute
"""

from __future__ import annotations

SCHEMA = "sh:schema"
API_KEYS = "sh:keys"
API_KEYS_VERSION = "sh:keys:version"
API_KEYS_WITH_USAGE = "sh:keys:used"
CACHE_SALT = "sh:cache-salt"
DRAIN_INTERRUPTED = "sh:drain:interrupted"


def api_key(key_id: str, name: str = "key") -> str:
    """A key of one API key: its record, or what it has under `name`."""
    return f"sh:{{k:{key_id}}}:{name}"


def limits(key_id: str, model_id: str, days: list[str]) -> list[str]:
    """The window, the running requests of the model and of the key, the open reservations, their leases, and the
    budgets of `days`, which are ISO dates."""
    names = [f"w:{model_id}", f"run:{model_id}", "run", "open", "open:until", *(f"day:{day}" for day in days)]
    head = api_key(key_id, "")
    return [head + name for name in names]


def usage(key_id: str, day_and_model: str) -> str:
    """The usage of a "<date>:<model>"."""
    return api_key(key_id, f"u:{day_and_model}")


def ledger(key_id: str, day_and_model: str) -> list[str]:
    """The last entry of each process, its time, the usage of a "<date>:<model>", and the set of all that have usage."""
    return [api_key(key_id, "applied"), api_key(key_id, "applied:at"), usage(key_id, day_and_model), usage_days(key_id)]


def usage_days(key_id: str) -> str:
    """The set of all "<date>:<model>" that have usage."""
    return api_key(key_id, "days")


def derived_sessions(key_id: str) -> list[str]:
    """The sessions, their expiry, the digests of their prompts, and the digests that were seen."""
    return [api_key(key_id, f"derived{name}") for name in ("", ":at", ":prompts", ":seen")]


def stored_bytes(key_id: str, kind: str) -> list[str]:
    """The members of an account by expiry, and their bytes."""
    return [api_key(key_id, kind), api_key(key_id, f"{kind}:b")]


def session(session_id: str) -> list[str]:
    """A session, and its turns."""
    head = f"sh:{{s:{session_id}}}"
    return [head, f"{head}:t"]


def deleted_session(session_id: str) -> str:
    """The mark of a derived session that was deleted."""
    return f"sh:{{s:{session_id}}}:x"


def response(response_id: str) -> list[str]:
    """A response, its state, turn and lease, the mark of its deletion, and the pieces of the response and the turn."""
    head = f"sh:{{r:{response_id}}}"
    turn = f"{head}:t"
    return [head, f"{head}:h", turn, f"{head}:l", f"{head}:x", *places(head), places(turn)[0]]


def places(key: str) -> list[str]:
    """The keys beside a value's own that may hold its pieces, see `gateway.store.pieces`."""
    return [f"{key}:0", f"{key}:1"]


def log(log_id: str) -> list[str]:
    """An event log, its entries, and its queue of jobs."""
    head = f"sh:{{l:{log_id}}}"
    return [head, f"{head}:e", f"{head}:q"]


def process(process: str, name: str) -> str:
    """A key of one gateway process: `pokes` or `cancelled`."""
    return f"sh:{{p:{process}}}:{name}"
