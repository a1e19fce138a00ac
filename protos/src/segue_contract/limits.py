"""Every bound of Segue, each with its reason. Nothing waits, queues or allocates beyond these.

Bounds that a program may be given otherwise, in a test or where a machine is unlike those that
they were chosen for, stand in frozen groups at the end of this page: a composition root makes
them, constructors take them. The others are plain constants.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB

# -- names and requests -----------------------------------------------------------------------
MAX_ID_CHARS: Final = 64  # fits a topic level, a Redis key and a file name with room to spare
MAX_PROMPT_BYTES: Final = 256 * KIB  # several times the text of an 8k-token context
MAX_STOP_STRINGS: Final = 8  # each is searched for after every token
MAX_STOP_CHARS: Final = 128
MAX_NEW_TOKENS: Final = 8192  # no turn outgrows the largest context we serve
MAX_TOP_K: Final = 1_000_000  # above any vocabulary: means "all"
MAX_TEMPERATURE: Final = 100.0  # far past the point where every token is equally likely
MAX_SESSIONS_LISTED: Final = 1000
LIST_LOOKED: Final = 16_384  # index entries for one page: 10 ms of the store's time
MAX_COUNT: Final = 2**53 - 1  # of numbers from outside: what Lua and JSON count exactly

# -- messages ---------------------------------------------------------------------------------
# Of an error, which travels in a header: gRPC takes 8 KiB of them, and binary ones grow by a third.
MAX_ERROR_TEXT_BYTES: Final = 1000  # its message, and its hint
MAX_ERROR_FIELD_BYTES: Final = 200
MAX_ERROR_FIELDS: Final = 8
MAX_GRPC_MESSAGE_BYTES: Final = 8 * MIB  # a snapshot of a full context with its text fits
KV_PART_BYTES: Final = 256 * KIB  # best loopback goodput lies between 64 KiB and 768 KiB
MAX_OP_BYTES: Final = 1 * MIB  # one log entry
MAX_APPEND_OPS: Final = 256  # one script call stays under a millisecond
MAX_APPEND_BYTES: Final = MAX_GRPC_MESSAGE_BYTES - 64 * KIB  # of their ops, and what is around
MAX_READ_ENTRIES: Final = 1024  # one page of Read
READ_PAGE_BYTES: Final = 4 * MIB  # a page of Read, but for its last op
SNAPSHOT_PART_BYTES: Final = 4 * MIB  # of a state that goes out in parts
MAX_MQTT_PAYLOAD_BYTES: Final = 1 * MIB  # above it only the head goes out, and devices Read

# -- KV frames --------------------------------------------------------------------------------
KV_BLOCK_TOKENS: Final = 64
KV_PAGE_TOKENS: Final = 16
MAX_KV_LAYERS: Final = 256
MAX_KV_HEADS: Final = 256
MAX_KV_HEAD_DIM: Final = 512
KV_FRAME_BYTES: Final = 1 * MIB  # a sender splits larger blocks by layers, so none waits long
MAX_KV_FRAME_BYTES: Final = 64 * MIB  # a 64-token block of a 70B-class model in fp16 is 20 MiB
MAX_KV_BLOCK_BYTES: Final = 256 * MIB  # in fp16; a 405B-class model's has 63 MiB
POOL_MIN_TOKENS: Final = 1024  # of a KV pool: below it a single ordinary chat does not fit
MAX_OPEN_BLOCKS: Final = 4  # blocks of one stream begun and not committed
STAGED_BLOCKS: Final = 8  # pinned buffers each way, card to host: 8 MiB each for an 8B model
MAX_GRAPH_BYTES: Final = 2048 * MIB  # of a card, for captured decode steps; then the rest run eager

# -- queues -----------------------------------------------------------------------------------
MAX_TURNS_WAITING_PER_SESSION: Final = 4  # more is a user pressing a dead button
MAX_TURNS_PER_CLOUD: Final = 256  # begun, not ended; those that wait for their session aside
MAX_TURNS_PER_EDGE: Final = 128  # prefill is one at a time: the last of these waits seconds
TURN_EVENT_QUEUE: Final = 4096  # replies of one Decode.Run not sent yet; then its relay waits
FOLLOWER_QUEUE_ENTRIES: Final = 4096  # then the follower is told to catch up with Read
FOLLOWER_DIGESTS: Final = 1024  # of the last entries: the log names one a second or so old
FOLLOWER_QUEUE_BYTES: Final = 4 * MIB  # the same, of large ops
HUB_QUEUE_BYTES: Final = 64 * MIB  # of all followers of one instance together
UPLINK_QUEUE_BLOCKS: Final = 8  # encoded blocks waiting for the link, per turn
MQTT_UNCONFIRMED_HEADS: Final = 65_536  # sessions to tell a broker of; beyond it the sweep's turn
MQTT_PUBLISH_QUEUE: Final = 8192  # then entries are dropped from MQTT; the head heals it
SESSION_CACHE: Final = 1024  # folded session states an instance keeps at hand
SESSION_CACHE_BYTES: Final = 256 * MIB  # of ops that are folded in them
EDGE_SESSION_CACHE: Final = 1024
ENDED_TURNS_KEPT: Final = 128  # ended turns an edge can replay to a device that comes back
OUTBOX_TURNS: Final = 256  # turns served offline that wait for the cloud: twice those that run
OUTBOX_REFUSED_KEPT: Final = 64  # of them that the log refused for good, so that devices are told
OUTBOX_REFUSED_BYTES: Final = 16 * MIB  # and so much of them: some of the longest there can be
OUTBOX_SESSIONS_AT_ONCE: Final = 8  # sessions whose offline turns are delivered side by side
MAX_OUTBOX_RECORD_BYTES: Final = 4 * MIB  # the longest message, its token ids and its reply
OUTBOX_REWRITE_BYTES: Final = 16 * MIB  # an outbox file that grew beyond this is written anew
PREFILL_QUEUE_JOBS: Final = 256  # prompts and warm-ups that wait for the edge's compute thread
EDGE_DECODE_SHARE: Final = 0.5  # of an edge's time, beside prompts: either at most doubles
WARM_QUEUE_TURNS: Final = 16  # idle warm-ups waiting; older ones are dropped

LOG_QUEUE_BYTES: Final = 1 * MIB  # lines for a stderr that nobody reads; then they are dropped

# -- times, seconds ---------------------------------------------------------------------------
CONNECT_TIMEOUT_S: Final = 5.0
CONNECT_ATTEMPT_S: Final = 2.0  # one attempt of a channel: two round trips and a busy machine
RPC_TIMEOUT_S: Final = 10.0  # unary calls
TURN_TIMEOUT_S: Final = 600.0  # the longest reply at the slowest decode rate we support
TURN_LOOKS: Final = 60  # TURN_TIMEOUT_S in so many parts: a pause of the process costs one
TURN_WAIT_TIMEOUT_S: Final = 120.0  # for the session's turn, where the caller chose to wait
STORE_TIMEOUT_S: Final = 5.0  # writes wait this long for the store, then StoreUnavailable
STORE_RETRY_S: Final = 0.05  # first pause between attempts; doubles up to half a second
STORE_WAIT_MS: Final = 100  # for replicas at a turn's lease and end; longer delays every turn then
STORE_WAIT_MAX_MS: Final = 1000  # with a round trip below SILENCE_S, after which a call is repeated
STORE_WAIT_MAX_REPLICAS: Final = 16  # more than any primary has; a typing error
STORE_LOOKUP_S: Final = 0.5  # to ask where the store's primary is; who is slower is not heard
TURN_LEASE_S: Final = 2.5  # renewed with every append, else as `TurnLimits.renew_s` says
LOST_OWNER_LOOKS: Final = 8  # at such a lease, each LOST_OWNER_PAUSE_S; then it runs out anyway
LOST_OWNER_PAUSE_S: Final = 0.2
RECOVERY_SWEEP_S: Final = 0.5  # with the lease: the longest that an orphaned turn lies still
RECOVERIES_PER_SWEEP: Final = 8  # of one instance: others have room, too
RUNNING_REFRESH_S: Final = 10.0  # an owner names its session among the running ones this often
ORPHAN_PATIENCE_S: Final = 10.0  # a dead owner's turn is left to those who could finish it; then
# the next turn of its session ends it
WAITING_LEASE_S: Final = 4.0  # a waiting turn that nobody names for this long loses its place
WAIT_POLL_S: Final = 0.25  # the first that waits looks this often: a turn may end elsewhere
WAIT_POLL_LATER_S: Final = 1.0  # those behind it; well below WAITING_LEASE_S
RELEASE_TIMEOUT_S: Final = 1.0  # to give a lease back; then it runs out
TURN_ENGINES: Final = 4  # epochs of a turn after which a dying engine ends it: it may be the cause
KV_DRAIN_S: Final = 30.0  # the longest that sent KV is believed to be in buffers on the way
ENGINE_RETRY_S: Final = 0.1  # an admitted turn asks again, where another's place is being cleared
DECODE_RETURN_S: Final = 0.005  # an edge reply between two tokens: one switch of Python's threads
READY_POLL_S: Final = 0.02  # a full batch is looked at again at this pace, then the edge hands over
LINK_BACKLOG_S: Final = 2.0  # KV of other turns still unsent: beyond it a turn ships nothing
BEGIN_TIMEOUT_S: Final = TURN_WAIT_TIMEOUT_S + 10.0  # Begin may wait for the session's turn
# A stream ends so much after its token, unless that is renewed: clocks differ, and a renewal may be
# on its way.
EXPIRY_GRACE_S: Final = 30.0
# What was said offline is taken for so long after its token ran out, where an edge's certificate
# vouches for it: a week without a link is a ship at sea, more is a forgotten file.
OUTBOX_TOKEN_AGE_S: Final = 7 * 86400.0
# A client renews its token so long before the end, or at half of what is left of a shorter one, and
# asks the app again at this pace where that has none yet.
RENEW_LEAD_S: Final = 60.0
RENEW_PAUSE_S: Final = 5.0
# How often a server looks for calls whose time is over; also what a reader gets that takes nothing.
GATE_LOOK_S: Final = 1.0
# Of the port for orchestrators' probes: one asks every few seconds, anybody may.
HEALTH_CALLS: Final = 16
HEALTH_MESSAGE_BYTES: Final = 4 * KIB
HEALTH_IDLE_MS: Final = 60_000
PROBE_INTERVAL_S: Final = 5.0  # an edge asks each cloud for its facts at this pace
PROBE_TIMEOUT_S: Final = 2.0  # no answer within it: the cloud counts as out of reach
RECONNECT_WAIT_S: Final = 0.5  # and 3 round trips, for a cloud that was gone: above its back-off
PROBE_FIRST_BYTES: Final = 128 * KIB  # of a goodput probe: a thin link is known after this much
PROBE_PAYLOAD_BYTES: Final = 2 * MIB  # its most: a fast link needs as much to show what it carries
UPLINK_RETRY_S: Final = 10.0  # an edge tries to re-open a broken turn stream for this long
HEARTBEAT_S: Final = 0.5  # a stream where nothing else was said says this much
SILENCE_S: Final = 1.5  # who hears nothing for so long takes the peer for lost: two beats may fail
TURN_HEARTBEAT_S: Final = 0.2  # the same of a turn's streams: few, and somebody waits at them
TURN_SILENCE_S: Final = 1.2  # a second more than a beat; the rest of 2 s is the next one's prefill
TAKEOVER_PREPARE_S: Final = 5.0  # a take-over's prefill, beforehand
PREPARE_ROUNDS: Final = 3  # of it, while the reply grows
PREPARES_AT_ONCE: Final = 4  # of an instance: those that run there come first
PREPARED_S: Final = 10.0  # after it the turn is asked for as any other
EDGE_SILENCE_LOOKS: Final = 7  # at the same pace, of an edge that owes a turn's tokens
SILENCE_LOOKS: Final = 6  # within it: a reader that was itself not scheduled has not listened
DOUBT_LOOKS: Final = 3  # of them without a word: somebody else may get ready
PING_INTERVAL_S: Final = 20.0  # of gRPC's own pings: below the idle times of usual NATs
STALL_LOOK_S: Final = 0.2  # whoever watches a compute thread looks at this pace
STALL_S: Final = 1.0  # one step for so long, and for STALL_FACTOR times what such steps take: it
# hangs. Where somebody else can go on that is noticed like silence.
STALL_FACTOR: Final = 10.0  # a machine with other work makes a step several times as long
PING_TIMEOUT_S: Final = 5.0  # of gRPC's own pings; 60 s where it is not set
SWEEP_INTERVAL_S: Final = 1.0  # dirty sessions are re-published at this pace
HEAD_IDLE_S: Final = 300.0  # a retained head is cleared after this long without an append
BROKER_RETRY_S: Final = 0.5  # first pause before connecting again; doubles, and varies by half
BROKER_RETRY_MAX_S: Final = 5.0  # 10,000 devices that come back must not all come at once
MQTT_PACKET_ROOM: Final = 512  # of a broker's largest packet: topic, properties, the op's frame
TAILS_INTERVAL_S: Final = 1.2  # a follower over MQTT asks how far the log goes; with a heal: < 2 s
MAX_TAILS: Final = 256  # sessions in one such question
TAILS_JOIN_S: Final = 0.05  # an edge's devices' questions are joined for so long
BROKER_LEASE_S: Final = 5.0  # which broker a store's clouds use is kept so long after the last one
BROKER_KEEPALIVE_S: Final = 15
# Of devices at a broker that is administered. Mosquitto writes all of them to its file with each
# one that comes or goes: 15 ms at so many, in which it brings nobody anything.
BROKER_LOGINS: Final = 1024
BROKER_CONNECTIONS: Final = 2 * BROKER_LOGINS  # and clouds, and who shows a login that is none
BROKER_QUEUED_BYTES: Final = 16 * MIB  # of one client that reads slowly; then it reads the log
BROKER_LOGINS_OF_DEVICE: Final = 32  # sessions that one device follows so; the rest over gRPC
BROKER_LOGINS_OF_SESSION: Final = 4  # of one device: an app that was started anew replaces its own
BROKER_LOGIN_AGAIN_S: Final = 5.0  # a device that made so many makes one more in this time
BROKER_LOGINS_PER_S: Final = (
    10.0  # that an instance makes: 20 to 40 % of the broker's thread at 1,000
)
BROKER_LOGINS_BURST: Final = 64  # and at once: a second of it
BROKER_ADMIN_TIMEOUT_S: Final = 2.0  # of a command; whoever opens a session waits for it
BROKER_ADMIN_RETRY_S: Final = 30.0  # a broker that cannot be administered is asked again
BROKER_LOGINS_LOOK_S: Final = 0.2  # at revocations; with GATE_LOOK_S and a command: below 2 s
BROKER_TIDY_S: Final = 60.0  # a login that the store does not have is removed after so long
LOGIN_PAUSE_S: Final = 60.0  # a follower that was given no login asks again
FOLLOW_HEAL_S: Final = 0.25  # a gap waits this long for the missing entry, then Read
SHUTDOWN_GRACE_S: Final = 5.0
LOG_FLUSH_S: Final = 1.0  # at the end of a program, for log lines that wait
START_NOTICE_S: Final = 2.0  # a program that takes longer to be ready says what it does
START_TIMEOUT_S: Final = 60.0  # a program that we start must be ready by then
RESTARTS: Final = 3  # of a part of a local stack that ends by itself, in RESTART_WINDOW_S
RESTART_WINDOW_S: Final = 60.0
PREPARE_TIMEOUT_S: Final = 300.0  # or by then from when it says that it compiles, on weak cores

# -- ranks of a tensor-parallel engine -------------------------------------------------------
MAX_RANKS: Final = 64  # of one engine, on one machine
MAX_RANK_MESSAGE_BYTES: Final = 2 * MAX_KV_BLOCK_BYTES + MIB  # a block in float32 and its frame
RANK_LOAD_TIMEOUT_S: Final = (
    600.0  # weights of a large model from a slow disk; a death shows at once
)
RANK_STEP_TIMEOUT_S: Final = 20.0  # what one rank waits for another's part of one layer

# -- log --------------------------------------------------------------------------------------
COMPACT_AFTER_ENTRIES: Final = 4096  # fold the log into a snapshot and trim beyond this
COMPACT_AFTER_BYTES: Final = 4 * MIB  # or beyond this: a late joiner reads it all
COMPACT_KEEP_ENTRIES: Final = 1024  # entries that stay readable one by one after a fold
COMPACT_KEEP_BYTES: Final = 4 * MIB  # of those entries
MEND_ATTEMPTS: Final = 8  # of a log with a hole, while entries come behind what was read
MAX_SESSION_BYTES: Final = 64 * MIB  # folded state and log since: each joiner is given all of it
STATE_SLICE_BYTES: Final = 128 * KIB  # of a state, decoded at a time: some 3 ms of one core
MAX_EXPORT_BYTES: Final = MAX_SESSION_BYTES + 16 * MIB  # and what is kept one by one, and frames
EXPORT_PART_BYTES: Final = 256 * KIB  # of an exported file, in one message
EXPORT_TIMEOUT_S: Final = 300.0  # MAX_EXPORT_BYTES over a link of 2 Mbit/s
MAX_TRANSFERS: Final = 2  # exports and imports of one instance at a time: each holds a session
IMPORT_STAGE_S: Final = 600.0  # what an import wrote and never committed is dropped after this
DELETED_MEMORY_S: Final = 7 * 86400.0  # a deleted session's generation: a clock set back by less
# than this still gives its name a later one
MAX_EXPIRED_AT_ONCE: Final = 100  # sessions that one sweep looks at: a store is not to be held up
EXPIRE_INTERVAL_S: Final = 60.0
TURN_ID_MEMORY: Final = 256  # turn ids whose repetition joins instead of running again

# -- client -----------------------------------------------------------------------------------
MAX_ADDRESSES: Final = 16  # nodes that one client knows, in order of preference
MAX_EDGES: Final = 256  # that a cloud tells of; more at one cloud need another way to be found
EDGE_UNHEARD_S: Final = 3 * PROBE_INTERVAL_S  # an edge that asked nothing for so long is not told
MAX_URL_CHARS: Final = 261  # a DNS name's 255 characters, a colon and a port
FIND_INTERVAL_S: Final = 10.0  # a client that looks for the nearest edge measures at this pace
FIND_ROUNDS: Final = 30  # and asks which edges there are after so many measurements
FIND_FIRST_S: Final = 1.0  # for so long a client waits for the nearest one before its first call
MAX_EDGES_MEASURED: Final = 32  # of those it was told of, drawn by chance
EDGES_KEPT: Final = 4  # the nearest ones, which go on being measured
NEAR_SAMPLES: Final = 2  # of a round trip: the better one counts
NEAR_SHARE: Final = 0.7  # a client moves to a node with less than this part of the round trip,
NEAR_GAIN_S: Final = 0.005  # and for so much at least: moving leaves its KV behind
MAX_CONTEXTS: Final = 256  # of `segue login`
MAX_CONFIG_BYTES: Final = 1 * MIB  # their file: each with a token of MAX_TOKEN_BYTES at the most
TOKEN_COMMAND_TIMEOUT_S: Final = 30.0  # a command that prints a token may ask a back end for it
ADDRESS_RETRY_S: Final = 5.0  # a node that failed is tried last for this long
RETRY_PAUSE_S: Final = 0.05  # first pause between attempts; doubles up to RETRY_PAUSE_MAX_S
RETRY_PAUSE_MAX_S: Final = 1.0
MAX_RETRIES: Final = 100  # that an app asks for: beyond it somebody should look
RETRY_AFTER_MAX_S: Final = 60.0  # a node that asks for more patience is not waited for
FOLLOW_TIMEOUT_S: Final = 120.0  # a follower gives up after this long without any node
SUBSCRIBE_TIMEOUT_S: Final = 1.0  # then the gRPC stream carries the live view meanwhile

# -- identity ---------------------------------------------------------------------------------
MAX_TOKEN_BYTES: Final = 4 * KIB  # travels in a header, of which gRPC takes 8 KiB in all
MAX_TOKEN_SESSIONS: Final = 32  # names or beginnings of names: of the longest ones, they fit
MAX_TOKEN_LIFETIME_S: Final = 3600.0  # so long a stolen token is good, where nobody revokes it
TOKEN_LIFETIME_S: Final = 600.0  # where the issuer says nothing: 5 to 15 minutes are usual
CLOCK_SKEW_S: Final = 30.0  # an issuer's clock may be ahead of ours by so much
# What was revoked so long ago concerns no token any more.
REVOKED_KEPT_S: Final = MAX_TOKEN_LIFETIME_S + 2 * CLOCK_SKEW_S
TOKEN_CACHE: Final = 8192  # tokens that were checked: one for each device of an instance
MAX_WATERMARKS: Final = 65_536  # revocations of the last hour that a node knows: 20 MiB
WATERMARKS_TOLD: Final = 1024  # with one probe: less than 400 KiB where names are longest
REVOKED_PAGE: Final = 512  # sessions that are marked with one round trip: 10 ms of the store's time
REVOKED_LOOK_S: Final = 0.5  # an edge asks for them at this pace: it knows within 2 s
# A check of a signature takes 0.2 ms: for bad tokens an address has BURST of them, then so many a
# second (2 % of a core), as many devices may stand behind it; all addresses have 20 % of a core.
BAD_TOKENS_BURST: Final = 200
BAD_TOKENS_PER_S: Final = 100.0
BAD_TOKENS_OF_ALL: Final = 10  # times that much
BAD_TOKEN_PEERS: Final = 4096  # addresses that are counted
BAD_TOKENS_KEPT: Final = 4096  # tokens that were refused, by hash
BAD_TOKEN_KEPT_S: Final = 5.0  # a key may be added meanwhile, or its time may come
MAX_TENANT_KEYS: Final = 10_000  # some 2 MiB of file, and read at once
MAX_KEY_FILE_BYTES: Final = 4 * MIB

# -- tenants ----------------------------------------------------------------------------------
QUOTA_BURST_S: Final = 10.0  # a rate of ops or bytes may be saved up for so long: an app that syncs
QUOTA_TOKENS_BURST_S: Final = 60.0  # and one of tokens: a minute's worth at once
QUOTA_DEVICE_S: Final = 600.0  # a device counts as in use for so long after it opened a session
QUOTA_RETRY_S: Final = 1.0  # to ask again where something has to end first
QUOTA_SESSIONS_S: Final = 5.0  # a tenant's sessions are counted again after so long
MIN_TENANT_WEIGHT: Final = 0.01  # beside the largest, a token in ten thousand: it still goes on
MAX_TENANT_WEIGHT: Final = 100.0
PLACE_RETRY_MAX_S: Final = 2.0  # who is refused a place is told to ask again by then, and keeps
PLACE_CLAIM_S: Final = PLACE_RETRY_MAX_S + 2.0  # its claim meanwhile; else it has given up

# -- trust in edges ---------------------------------------------------------------------------
KV_CHECK_SHARE: Final = 1 / 64  # of an edge's blocks is computed again, with what is before it
KV_CHECK_SHARE_TRUSTED: Final = 1 / 512  # and once it is trusted: some percent
KV_CHECKS_TRUSTED: Final = 16  # found right: some thousand blocks; then all edges' turns use them
KV_MAX_ERROR: Final = 0.3  # relative; eight-bit edges with four-bit V have 0.14, other text 1.3
KV_REFUSED_S: Final = 3600.0  # an edge whose block was wrong ships nothing for so long
KV_CHECK_QUEUE_BYTES: Final = 64 * MIB  # of blocks that wait: eight of an 8B model
KV_CHECK_LOOK_S: Final = 0.25  # for an engine with nothing else to do
KV_CHECK_PATIENCE_S: Final = 30.0  # then it is checked beside turns
MAX_EDGES_KNOWN: Final = 4096  # edges of one cloud; one that is forgotten begins again

# -- real servers as child processes ----------------------------------------------------------
PORT_ATTEMPTS: Final = 8  # a free port may be taken between the look and the bind
CHILD_LOG_LINES: Final = 200  # its last words, for an error message
CHILD_STOP_S: Final = 6.0  # after SIGTERM, then SIGKILL; above SHUTDOWN_GRACE_S
VALKEY_START_TIMEOUT_S: Final = 15.0
BROKER_START_TIMEOUT_S: Final = 15.0
BROKER_PROBE_PAUSE_S: Final = 0.02  # between attempts to reach a broker that starts
BROKER_QUEUED_MESSAGES: Final = 10_000  # per client; Mosquitto's 1,000 are 16 s of frames
BROKER_INFLIGHT: Final = 256  # unacknowledged QoS 1 messages of one client

# -- the store and the fan-out ----------------------------------------------------------------
STORE_CONNECTIONS: Final = 32  # one command at a time on each; more only queue in the server
STORE_RETRY_MAX_S: Final = 0.5
PRODUCER_RUNS: Final = 64  # runs of (seq, offset) kept per producer to answer duplicates
PRODUCER_MEMORY: Final = 256  # writers of one session whose sequence numbers are remembered; 16
# times as many of those that wrote in the last two minutes, see log.lua
ACTIVE_SHARDS: Final = 16  # keys that list active sessions; each lies in one Cluster slot
ACTIVE_REFRESH_S: Final = 10.0  # a writer names its session again after this long
HUB_POLL_S: Final = 0.05  # the next HUB_POLL_SESSIONS are looked up, where the store tells nothing
TAIL_BEAT_S: Final = 0.25  # a listener to the store's changes hears itself at this pace
TAIL_FRESH_S: Final = 0.5  # what is known of tails is told others while it is no older than this
TAIL_IDLE_S: Final = 10.0  # a tail that nobody asked for so long is not watched any more
MAX_WATCHED_TAILS: Final = 65_536  # of one instance; the store is asked for any others
TAIL_NEWS_DELAY_S: Final = 0.005  # what this process appends comes with the append itself
HEAD_DELAY_S: Final = 0.1  # a head goes out once its session was quiet for this long
HEAD_MAX_DELAY_S: Final = 1.0  # or after this long while it is not; below DIRTY_AFTER_S
PUBLISH_INFLIGHT: Final = 128  # unacknowledged MQTT messages of one publisher
DIRTY_AFTER_S: Final = 2.0  # appended and not confirmed for this long: another one publishes
MAX_SWEEP_SESSIONS: Final = 1000
MAX_SESSION_DEVICES: Final = 256  # devices of one session that are remembered, latest first
WAITING_TEXT_CHARS: Final = 2000  # of a message that waits: it comes whole when it begins
TITLE_CHARS: Final = 80  # of a session's first message, for lists
HUB_POLL_SESSIONS: Final = 256  # tails looked up in one round trip
HUB_EVENT_BYTES: Final = 1 * MIB  # entries of one event of Attach, beyond the first
PUBLISH_FLUSH_S: Final = 1.0  # at shutdown, for what still waits for the broker

# -- groups -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """Of the cloud's decode engine."""

    step_timeout_s: float = 300.0  # two weak cores take minutes for an 8B model's chunk
    # Share of a step's time that may go into coding blocks for the host tier while turns wait for
    # the next one, and the most that may be saved up: a prompt's worth.
    coding_share: float = 0.03
    coding_saved_up_s: float = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionQuotas:
    """What one session may hold in its folded state, for ever: each late joiner is given all of it.

    Beyond them an append is refused; what is there stays readable.
    """

    bytes: int = MAX_SESSION_BYTES
    values: int = 4096  # names; a value that is set anew takes nothing more
    docs: int = 1024  # names
    kept_ops: int = 262_144  # updates of docs, claims and results of tool calls: folding keeps each


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantQuotas:
    """What one tenant may have, and its part where several want more than there is.

    Wide: they stop what runs away, not what is used. inf: no bound. Each cloud counts by itself,
    but for sessions.
    """

    weight: float = 1.0  # of its turns in the engine and among the places, beside other tenants'
    sessions: float = 100_000  # in the store: with what each may hold, the bound of all its bytes
    devices: float = 10_000  # that opened a session within QUOTA_DEVICE_S
    attaches: float = 10_000  # streams that follow a session
    turns: float = MAX_TURNS_PER_CLOUD  # begun and not ended; fewer for one that must not fill it
    ops_per_s: float = 1000.0  # that devices append: some hundred people that draw at once
    bytes_per_s: float = 8.0 * MIB  # of them
    tokens_per_min: float = 2_000_000.0  # of prompts and replies: more than a large card makes


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreLimits:
    """Of an instance's use of the session store."""

    timeout_s: float = STORE_TIMEOUT_S
    connections: int = STORE_CONNECTIONS  # to each server
    lease_s: float = TURN_LEASE_S  # for which an append of a turn's owner renews its lease
    turn_ids: int = TURN_ID_MEMORY  # of a session, kept at hand in the store


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnLimits:
    """Of the turns that a cloud owns."""

    lease_s: float = TURN_LEASE_S
    open_timeout_s: float = 3.0  # Begin without Run: the cloud then runs the turn by itself
    stop_grace_s: float = 0.7 * SHUTDOWN_GRACE_S  # for turns that end soon, or get ready elsewhere
    store_calls: int = 110  # that fail one after another: some 10 minutes in all
    store_pause_s: float = STORE_RETRY_MAX_S  # after one of them
    lost_owner_quiet_s: float = 1.1  # so old a lease is none, of an owner that its reader lost
    stall_offer_s: float = 5.0  # a turn behind a hung engine is left to others for so long
    edge_look_s: float = TURN_SILENCE_S / SILENCE_LOOKS  # at an edge that owes a turn's tokens
    kv_first_byte_s: float = 60.0  # an edge with a full prefill queue may start this late
    # KV began and stopped: then the cloud recomputes. A part takes this long on a link of 26 kB/s,
    # and so may a chunk's prefill on a slow edge.
    kv_stall_s: float = 10.0

    @property
    def renew_s(self) -> float:
        """An owner that appends nothing renews its lease this often."""
        return self.lease_s / 4


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeTurnLimits:
    """Of a turn at an edge, while no cloud serves it."""

    retry_s: float = UPLINK_RETRY_S  # then it goes on offline
    timeout_s: float = TURN_TIMEOUT_S  # one that cannot be made here either is given up
    pause_s: float = RETRY_PAUSE_S  # between two rounds over the clouds, at first
    pause_max_s: float = RETRY_PAUSE_MAX_S


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientLimits:
    """Of a client of the SDK."""

    retry_pause_s: float = RETRY_PAUSE_MAX_S  # where a node does not know yet what it is asked for
    resume_timeout_s: float = 30.0  # a broken turn stream is resumed for this long without news
    follower_entries: int = FOLLOWER_QUEUE_ENTRIES
    follower_bytes: int = FOLLOWER_QUEUE_BYTES
    beside_min_s: float = 5.0  # a gRPC stream that was opened beside MQTT stays for so long
    # A followed session counts as in use for so long after its last entry: a reply's pauses and the
    # next question. Then, without a broker, its tail is enough until it has news.
    use_s: float = 30.0
