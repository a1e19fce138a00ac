-- What the scripts of the session log begin with: append.lua, turns.lua, session.lua. Every change of a
-- session is one atomic, idempotent, fenced call of one of them. ARGV[1] names the verb; its arguments
-- follow. All keys share one hash tag.
--
-- KEYS  1 log        stream; entry id = <generation>-<offset>, field "o" = the op's bytes
--       2 meta       hash, see below
--       3 producers  sorted set: producer by the time of its last append, ms
--       4 turns      sorted set: turn by the offset of its last opening op
--       5 devices    sorted set: device by the time it last opened or used the session
--       6 snapshot   string: "<generation> <offset>\n" and the folded state; alone, and with offset
--                    0: the session was deleted (see keep.lua)
--
-- meta  gen, tail    the current generation, the last offset
--       life         the store's life under which gen began (see the function `meta`)
--       gens         "<generation>:<its first offset>,...", the last one is gen
--       cur, lease   the running turn, until when its owner holds it (ms); stop: asked to stop
--       pub, da      published offset; dirty since (ms), 0 where clean
--       bare         1: it was evicted, and does not say which turns the log has; see `restore` in
--                    session.lua
--       wait         turns that wait for the session, first come first: "turn:ms:flag,..."; flag w
--                    waits and named itself then, s was stopped then
--       d:<turn>     digest of what was asked
--       u, n, title  updated (ms), turns, title
--       pe           the producer epoch given last
--       so, wo, sb   the snapshot: its offset, wb there, its bytes
--       ck           digest of all ops up to the tail, as segue_contract.sync.chain has it
--       rv:<device>  tokens of the device that are valid since before then are void, ms
--       wb, mx       bytes of all ops ever written; the largest op's
--       q:<slot>     a name that counts for a quota; qv, qd, qk: how many values, docs, kept ops
--       p:<producer>, t:<turn>  "<epoch>|<seq>|<seq>:<offset>,<seq>:<offset>,..."
--       e:<turn>     epoch that a turn had as the log lost its beginning
--       x:<turn>     "<ended>|<nonce of the claim that made its epoch>": who appends names it, so
--                    one epoch has one owner
--
-- Where a producer's ops got consecutive offsets they are one "seq:offset" run, so the offset of
-- any remembered op is that of its run's first one plus the distance.
--
-- Commands used: TIME INFO EXISTS GETRANGE SET STRLEN DEL, HGET HMGET HSET HDEL HINCRBY, ZADD ZSCORE
-- ZCARD ZCOUNT ZRANGE ZREM, XADD XRANGE XREVRANGE XTRIM, PUBLISH.

local LOG, META, PRODUCERS, TURNS = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local DEVICES, SNAPSHOT = KEYS[5], KEYS[6]

local DIGEST_CHARS = 16
local GENERATIONS = 32 -- starts that are kept, so that a reader's cursor can be judged exactly
local PRODUCER_KEPT_MS = 120000 -- longer than any call, with all its repetitions, may take
local PRODUCERS_MOST = 16 -- times the bound, of those that appended so lately

local replicas = 0 -- that the store has

local function generations(text)
  local known = {}
  for generation, start in string.gmatch(text, '(%d+):(%d+)') do
    known[#known + 1] = {tonumber(generation), tonumber(start)}
  end
  return known
end

-- Tell whoever watches the session (see changes.py) where its log ends now: "<generation> <offset>
-- <digest>". A store that lets nobody publish is looked at instead.
local function tell(generation, tail, digest)
  redis.pcall('PUBLISH', META, generation .. ' ' .. tail .. ' ' .. digest)
end

-- Go on under another generation, whose first offset is `start`: what was acknowledged from there
-- on may be lost. Nothing of it counts as published.
local function new_generation(generation, start, life, now)
  local known = redis.call('HMGET', META, 'gens', 'pub')
  local list = (known[1] and known[1] .. ',' or '') .. int(generation) .. ':' .. int(start)
  local _, commas = string.gsub(list, ',', ',')
  if commas >= GENERATIONS then list = string.match(list, '^[^,]*,(.*)$') end
  redis.call('HSET', META, 'gen', int(generation), 'gens', list, 'life', life, 'da', int(now),
    'pub', int(math.min(tonumber(known[2] or '0'), start - 1)))
end

-- {generation, tail, ...further fields}; nil where there is no session. The store's life is
-- compared first, so nothing is done in a new one under the old generation.
local function meta(...)
  local values = redis.call('HMGET', META, 'gen', 'tail', 'life', ...)
  if not values[1] then return nil end
  local generation, tail, before = tonumber(values[1]), tonumber(values[2]), values[3]
  table.remove(values, 3)
  local life
  life, replicas = store_life()
  if life ~= before then
    -- A server that was promoted may never have heard of what an earlier one gave, so that counting
    -- alone would give it again: the step is of the life's own random id, and at most 2^20.
    generation = generation + 1 + (tonumber(string.sub(life, 1, 5), 16) or 0)
    new_generation(generation, tail + 1, life, now_ms())
    tell(int(generation), int(tail), redis.call('HGET', META, 'ck') or '')
  end
  values[1], values[2] = generation, tail
  return values
end

local function parse(record)
  if not record then return -1, 0, '' end
  local epoch, seq, runs = string.match(record, '^(%d+)|(%d+)|(.*)$')
  return tonumber(epoch), tonumber(seq), runs
end

-- The generation of the entry at `offset`; nil where the list no longer reaches back that far.
local function generation_of(known, offset)
  local found
  for _, one in ipairs(known) do
    if one[2] <= offset then found = one[1] end
  end
  return found
end

local function size_of(from)
  local size, largest = 0, 0
  for i = from, #ARGV do
    size, largest = size + #ARGV[i], math.max(largest, #ARGV[i])
  end
  return size, largest
end

-- What `write` has to know of the log, of these fields of `meta`. `size`: the bytes that a reader of
-- the whole session has to be given, of the snapshot and of what came since.
local function log_facts(published, largest, digest, written, folded, snapshot)
  written = tonumber(written or '0')
  local since = written - tonumber(folded or '0')
  return {published = tonumber(published or '0'), largest = tonumber(largest or '0'),
    digest = digest or '', written = written, since = since,
    size = since + tonumber(snapshot or '0')}
end

-- Append ARGV[from..] behind `tail`, and set further fields of `meta`, given as names and values;
-- returns the new tail. Marks the session dirty. One command sets all fields: each costs the store
-- more than what it does.
local function write(generation, tail, log, from, now, set)
  local size, largest = size_of(from)
  local clean = log.published >= tail
  local digest, life, at = log.digest, int(generation), nil
  for i = from, #ARGV do
    tail = tail + 1
    at = int(tail)
    digest = string.sub(redis.sha1hex(digest .. ARGV[i]), 1, DIGEST_CHARS)
    redis.call('XADD', LOG, life .. '-' .. at, 'o', ARGV[i])
  end
  if clean then set[#set + 1], set[#set + 2] = 'da', now end
  log.written, log.since = log.written + size, log.since + size
  redis.call('HSET', META, 'tail', tail, 'u', now, 'ck', digest, 'wb', log.written,
    'mx', math.max(largest, log.largest), unpack(set))
  tell(life, at or int(tail), digest)
  return tail
end

-- Forget the oldest members of a set beyond its bound, with their fields in the hash.
local function forget(set, bound, ...)
  local surplus = redis.call('ZCARD', set) - bound
  if surplus <= 0 then return end
  for _, member in ipairs(redis.call('ZRANGE', set, 0, surplus - 1)) do
    for _, prefix in ipairs({...}) do redis.call('HDEL', META, prefix .. member) end
    redis.call('ZREM', set, member)
  end
end

-- Whoever repeats an append, because the reply was lost, does so while its record is still there.
local function forget_producers(bound, now)
  if redis.call('ZCARD', PRODUCERS) <= bound then return end
  local lately = redis.call('ZCOUNT', PRODUCERS, '(' .. int(now - PRODUCER_KEPT_MS), '+inf')
  forget(PRODUCERS, math.max(bound, math.min(lately, PRODUCERS_MOST * bound)), 'p:')
end

-- Of the field x:<turn>.
local function flags(text)
  local ended, nonce = string.match(text or '0|', '^(%d)|(.*)$')
  return ended == '1', nonce
end

-- Whether a token, "<valid since, ms>|<its device>" ("": there is none), was revoked.
local function void(bearer)
  if bearer == '' then return false end
  local issued, device = string.match(bearer, '^(%d+)|(.*)$')
  if not issued then return false end
  return tonumber(issued) < tonumber(redis.call('HGET', META, 'rv:' .. device) or '0')
end

local verbs = {}
