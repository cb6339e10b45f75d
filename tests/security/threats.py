"""Who attacks what, what stops them, and the test that shows it: the table of docs/security.md, as code.

Each row names one test that attacks, and the defence without which that test must fail: functions of ours, and what is
run in their place. `undefended` puts it there, `test_threats` runs the attack with and without.

A replacement runs with the names of the module whose function it replaces, so it imports what it needs itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Removed = tuple[str, Callable[..., Any]]
"""`module:function` or `module:Class.method`, and what runs in its place."""


@dataclass(frozen=True)
class Threat:
    """One row."""

    name: str
    who: str
    """May be hostile."""
    gain: str
    """What it would gain."""
    defence: str
    """What stops it."""
    attack: str
    """The test's id below `tests/`."""
    removed: tuple[Removed, ...]


def nothing(*_: Any, **__: Any) -> None:
    return None


def yes(*_: Any, **__: Any) -> bool:
    return True


def no(*_: Any, **__: Any) -> bool:
    return False


def no_words(*_: Any, **__: Any) -> str:
    return ""


def any_manifest(signed: Any, trusted_key: bytes, run: str) -> Any:
    from shoal.broadcast.chain import Published, manifest_hash
    from shoal.protocol.codec import decode
    from shoal.protocol.snapshot import Manifest

    return Published(signed, decode(signed.manifest, Manifest), manifest_hash(signed))


def any_offer(self: Any, data: bytes, version: int | None) -> Any:
    from shoal.broadcast.chain import open_manifest
    from shoal.protocol.codec import decode
    from shoal.protocol.snapshot import ChainPart

    return [open_manifest(one, self._store.trusted_key, self._store.run) for one in decode(data, ChainPart).manifests]


def unpacked_whatever_it_says(self: Any, size: int) -> Any:
    import numpy
    import zstandard

    from shoal.broadcast.delta import FRAME
    from shoal.errors import RecordError

    (length,) = FRAME.unpack(self.take(FRAME.size))
    unpacked = zstandard.ZstdDecompressor().decompress(self.take(length))
    if len(unpacked) != size:
        raise RecordError("a change's plane does not have the size that its block needs.")
    return numpy.frombuffer(unpacked, dtype=numpy.uint8)


def in_the_open(self: Any, plaintext: bytes, nonce: bytes, header: bytes) -> bytes:
    return bytes(plaintext)


def allow_every_call(machine: str = "") -> bytes:
    import struct

    return struct.pack("HBBI", 0x06, 0, 0, 0x7FFF0000)


def anybody(self: Any, number: int, among: list[str] | None = None) -> list[str]:
    present = sorted(self.present) if among is None else among
    found: list[str] = self._random.sample(present, min(number, len(present)))
    return found


def other_seeds(self: Any, number: int, count: int) -> tuple[int, ...]:
    import secrets

    return tuple(secrets.randbelow(2**31) for _ in range(count))


def one_workers_word(self: Any, number: int, node_id: str, problems: list[str]) -> None:
    from collections import Counter

    from shoal.coordinator.control import MAX_VOID_ATTEMPTS
    from shoal.errors import RunError

    attempts = self._void_attempts.setdefault(number, Counter())
    attempts[node_id] += 1
    if attempts.total() >= MAX_VOID_ATTEMPTS:
        self.failure = RunError(f"group {number} failed.")


def as_it_is_written(self: Any, conversation: Any, after: str = "", tools: Any = None) -> list[int]:
    text = str(self._inner.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True))
    return list(self._inner.encode(text.split(after, 1)[1] if after else text, add_special_tokens=False))


def unquoted(value: Any) -> str:
    import json

    return value if isinstance(value, str) else json.dumps(value)


THREATS = (
    Threat(
        "forged snapshot",
        "a relay, or who poses as the learner",
        "weights of its own in every worker and server",
        "manifests are signed by the learner's key, which the ticket's root vouches for",
        "broadcast/test_fetch.py::test_false_manifests_are_refused[signer-another key]",
        (("shoal.broadcast.chain:open_manifest", any_manifest),),
    ),
    Threat(
        "old snapshot",
        "a relay",
        "workers that sample with a version long past",
        "versions are numbered and chained; a node takes none older than one it knows",
        "broadcast/test_fetch.py::test_old_version_replayed_as_newest_is_refused",
        (("shoal.broadcast.fetch:Fetcher._check_offer", any_offer),),
    ),
    Threat(
        "delta bomb",
        "a learner's thief, or a damaged disk",
        "the memory of every node",
        "a frame is unpacked only if it says the size that its block needs",
        "broadcast/test_delta.py::test_bombs_take_no_memory",
        (("shoal.broadcast.delta:_Reader.frame", unpacked_whatever_it_says),),
    ),
    Threat(
        "stolen ticket",
        "who reads a ticket that was used",
        "a place in the run",
        "a ticket has a number of uses, noted on disk before the node hears that it is admitted",
        "swarm/test_attacks.py::test_a_ticket_stolen_after_its_one_use",
        (("shoal.swarm.invites:InviteBook.spend", nothing),),
    ),
    Threat(
        "forged record",
        "any node",
        "to speak for another node",
        "records are signed by the key that they speak for",
        "swarm/test_attacks.py::test_records_and_grants_that_are_forged",
        (("shoal.fabric.identity:verify", yes),),
    ),
    Threat(
        "replay",
        "a router",
        "to have done again what a node once asked for",
        "an envelope is acted on once, and while it is young",
        "fabric/test_sealed_traffic.py::test_tampered_replayed_and_misaddressed",
        (("shoal.fabric.envelope:ReplayGuard.admit", nothing),),
    ),
    Threat(
        "a role that was not granted",
        "a worker",
        "batches, and versions of its own",
        "grants are checked against the key that signed the request",
        "swarm/test_attacks.py::test_a_worker_that_plays_the_learner",
        (("shoal.swarm.grants:GrantBook.authorise", nothing),),
    ),
    Threat(
        "revoked node",
        "a node that was thrown out",
        "to go on",
        "a signed, numbered list of what is taken back spreads with the roster",
        "swarm/test_attacks.py::test_a_revoked_node_that_goes_on",
        (("shoal.swarm.grants:GrantBook.is_revoked", no),),
    ),
    Threat(
        "Sybil",
        "who makes thousands of keys",
        "the table of nodes, and everybody's processor",
        "what strangers may say is rationed for all of them together, and none displaces a node with a grant",
        "swarm/test_gossip.py::test_strangers_share_one_ration",
        (("shoal.swarm.rate:RateLimiter.take", yes),),
    ),
    Threat(
        "eclipse",
        "who makes nodes look present that are not",
        "a node that finds none of the real ones, and trusts whom they no longer trust",
        "every second exchange of notes is with the root or a node that it vouches for",
        "security/test_eclipse.py::test_a_crowd_of_nodes_that_are_not_there",
        (("shoal.swarm.gossip:Gossip._choose", anybody),),
    ),
    Threat(
        "malicious router",
        "a router",
        "prompts, rewards and weights",
        "what is said to one node is sealed to it",
        "fabric/test_sealed_traffic.py::test_a_router_reads_nothing_that_is_said_to_one_node",
        (("shoal.fabric.sealing:Pair.seal", in_the_open), ("shoal.fabric.sealing:Pair.open", in_the_open)),
    ),
    Threat(
        "tampering router",
        "a router",
        "to change what nodes say",
        "every envelope is signed over its header and body",
        "fabric/test_sealed_traffic.py::test_tampered_replayed_and_misaddressed",
        (("shoal.fabric.envelope:check_envelope", nothing),),
    ),
    Threat(
        "lying worker",
        "a worker that samples with another model",
        "pay, or a policy trained on somebody else's words",
        "tokens are recomputed with the claimed version and seed; a liar is excluded and nothing of it trains",
        "coordinator/test_trust.py::test_a_liar_is_excluded_and_nothing_of_it_trains",
        (("shoal.planning.standing:Standing.fail", no),),
    ),
    Threat(
        "wrong reward",
        "a worker",
        "a reward that the environment did not give",
        "episodes are played again where the environment can be, and rewards compared",
        "coordinator/test_trust.py::test_a_wrong_reward_costs_standing_too",
        (("shoal.planning.standing:Standing.fail", no),),
    ),
    Threat(
        "cherry-picker",
        "a worker that keeps back the episodes it dislikes",
        "to choose what is learnt",
        "a group trains whole or not at all",
        "security/test_cherry_picking.py::test_who_keeps_back_what_it_dislikes",
        (("shoal.coordinator.verification:is_whole", yes),),
    ),
    Threat(
        "second draw",
        "a worker that gives groups up until it likes what it draws",
        "to choose what is learnt",
        "a group's task and seeds follow from its number, whoever gets it and however often",
        "security/test_cherry_picking.py::test_who_wants_another_draw",
        (("shoal.coordinator.tasks:TaskSource.seeds", other_seeds),),
    ),
    Threat(
        "giving up",
        "a worker that gives the same group up again and again",
        "the end of the run",
        "no worker's word alone, if others are there, makes a group one that cannot be done",
        "security/test_cherry_picking.py::test_who_gives_everything_up_does_not_end_the_run",
        (("shoal.coordinator.control:Control._count_void", one_workers_word),),
    ),
    Threat(
        "tool injection",
        "a tool server",
        "tools that the run was not given",
        "calls are checked against the run's own list, whatever a result says",
        "agents/test_run_scheduling.py::test_what_a_tool_says_widens_nothing",
        (("shoal.agents.scheduler.performing:Performer.objection", nothing),),
    ),
    Threat(
        "page injection",
        "a page that writes the model's own control tokens",
        "to speak as the system, or as the user",
        "only a template's own control tokens are tokens; what others write is spelt out",
        "security/test_pages.py::test_a_page_that_speaks_as_others_do",
        (("shoal.engine.tokenizer:Tokenizer._render", as_it_is_written),),
    ),
    Threat(
        "forged results",
        "a page or a tool that ends its own quotation",
        "to speak as another tool",
        "what a tool says is one JSON string on one line, behind its call's name",
        "security/test_pages.py::test_a_page_that_forges_results",
        (("shoal.agents.scheduler.prompt:_json", unquoted),),
    ),
    Threat(
        "SSRF",
        "a page or a model that names an address",
        "services inside the user's network",
        "only public addresses are connected to, and the one that was looked at",
        "agents/test_web_tools.py::test_only_allowed_hosts_inside_are_asked_and_a_redirect_is_no_way_in",
        (("shoal.agents.builtin.fetch:is_public", yes),),
    ),
    Threat(
        "a page that reaches out",
        "a page under test",
        "other hosts, from the user's machine",
        "the browser's only way out is a gate that knows the sites under test",
        "envs/web/test_gate.py::test_other_hosts_are_refused_and_named",
        (("shoal.envs.web.gate:Allowed.names", yes),),
    ),
    Threat(
        "a page that reaches inside",
        "a page in the browser",
        "services on the user's machine, and files",
        "the browser has no way but the gate, to this machine neither, and opens no file for a page",
        "security/test_pages.py::test_a_page_that_reaches_inside",
        (("shoal.envs.web.gate:Allowed.names", yes), ("shoal.envs.web.gate:Allowed.names_port", yes)),
    ),
    Threat(
        "path traversal",
        "a model that names a file",
        "files outside the folder it was given",
        "a name is followed to its end, links included, and must lie below the folder",
        "agents/test_builtin_tools.py::test_nothing_outside_the_folder_is_read",
        (("shoal.agents.builtin.text:_is_below", yes),),
    ),
    Threat(
        "sandbox escape",
        "a program that a model wrote",
        "the machine",
        "namespaces, and a filter of system calls",
        "sandbox/test_escape.py::test_calls_into_the_kernel",
        (("shoal.sandbox.seccomp:build_filter", allow_every_call),),
    ),
    Threat(
        "answers that are programs",
        "a model's answer",
        "the worker, where a scorer evaluates answers",
        "such a scorer sees only literals and small algebra",
        "envs/test_answer_guard.py::test_attacks_do_not_reach_a_scorer",
        (("shoal.envs.answer_guard:may_score", yes),),
    ),
    Threat(
        "orders in a memory",
        "who writes an episode",
        "to command agents that recall it",
        "what reads as an order to its reader is not kept, and what is recalled is marked as data",
        "memory/test_screening_and_extract.py::test_orders_to_the_reader_are_found",
        (("shoal.memory.screening:find_order", no_words),),
    ),
    Threat(
        "answers in a memory",
        "an agent that saw a held-out answer",
        "a score that it did not earn",
        "sibling tasks' answers are looked for in every spelling, and refused",
        "memory/test_screening_and_extract.py::test_sibling_answers_are_refused_and_short_ones_let_through",
        (("shoal.memory.screening:AnswerFinder.holds", no),),
    ),
    Threat(
        "API without a key",
        "who reaches the port",
        "the model, at the user's cost",
        "keys are kept as hashes, and asked for on every path but health",
        "serving/test_server.py::test_only_who_has_a_key_is_let_in",
        (("shoal.serving.door:Door._check_key", nothing),),
    ),
    Threat(
        "CSRF",
        "a page of another site, in the browser of who uses the console",
        "what the console may do",
        "what changes anything carries a token that stands in the console's own pages alone",
        "serving/console/test_console_app.py::test_changes_need_the_pages_own_token",
        (("shoal.serving.console.door:Door.may_change", yes),),
    ),
    Threat(
        "CSRF on agents",
        "a page of another site, where agents' runs are served without keys",
        "tasks done with the user's tools",
        "without keys, what names another origin is refused",
        "security/test_other_sites.py::test_a_form_of_another_site_starts_no_run",
        (("shoal.serving.origin:check_page", nothing),),
    ),
    Threat(
        "CSRF on the API",
        "a page of another site, where a model is served without keys",
        "the model, at the user's cost",
        "without keys, what names another origin is refused before it is read",
        "serving/test_server.py::test_pages_of_other_sites_are_not_served",
        (("shoal.serving.origin:check_page", nothing),),
    ),
    Threat(
        "DNS rebinding",
        "a page whose owner points its name at this machine",
        "to read what servers without keys know",
        "without keys, only names of this machine are answered",
        "security/test_other_sites.py::test_a_name_that_was_pointed_here_reads_nothing",
        (("shoal.serving.origin:check_page", nothing),),
    ),
    Threat(
        "claims of one's own skill",
        "a member of a collective",
        "work, and weight in votes",
        "what is said of a node counts only from another one that was admitted, signed and chained",
        "swarm/test_ledger.py::test_what_does_not_enter",
        (("shoal.fabric.identity:verify", yes),),
    ),
)
"""All rows that are covered; what is not covered is in docs/security.md."""
