-- The one script of the session log: every change of a session is one atomic, idempotent, fenced
-- call of it. ARGV[1] names the verb; its arguments follow. All keys share one hash tag.
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
--       life         the store's life under which gen began (see `alive`)
--       gens         "<generation>:<its first offset>,...", the last one is gen
--       cur, lease   the running turn, until when its owner holds it (ms); stop: asked to stop
--       pub, da      published offset; dirty since (ms), 0 where clean
--       bare         1: it was evicted, and does not say which turns the log has; see `restore`
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

local function alive()
  local life
  life, replicas = store_life()
  return life
end

local function generations(text)
  local known = {}
  for generation, start in string.gmatch(text, '(%d+):(%d+)') do
    known[#known + 1] = {tonumber(generation), tonumber(start)}
  end
  return known
end

-- Tell whoever watches the session (see changes.py) where its log ends now: "<generation> <offset>
-- <digest>". A store that lets nobody publish is looked at instead.
local function tell(generation, tail)
  local digest = redis.call('HGET', META, 'ck') or ''
  redis.pcall('PUBLISH', META, int(generation) .. ' ' .. int(tail) .. ' ' .. digest)
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

-- The generation after `generation` in this life of the store. A server that was promoted may never
-- have heard of what an earlier one gave, so that counting alone would give it again: the step is of
-- the life's own random id, and at most 2^20.
local function next_generation(generation, life)
  return generation + 1 + (tonumber(string.sub(life, 1, 5), 16) or 0)
end

-- {generation, tail, ...further fields}; nil where there is no session. The store's life is
-- compared first, so nothing is done in a new one under the old generation.
local function meta(...)
  local values = redis.call('HMGET', META, 'gen', 'tail', 'life', ...)
  if not values[1] then return nil end
  local generation, tail, before = tonumber(values[1]), tonumber(values[2]), values[3]
  table.remove(values, 3)
  local life = alive()
  if life ~= before then
    generation = next_generation(generation, life)
    new_generation(generation, tail + 1, life, now_ms())
    tell(generation, tail)
  end
  values[1], values[2] = generation, tail
  return values
end

local function parse(record)
  if not record then return -1, 0, '' end
  local epoch, seq, runs = string.match(record, '^(%d+)|(%d+)|(.*)$')
  return tonumber(epoch), tonumber(seq), runs
end

-- The offset that `seq` got then; 0 where that is forgotten.
local function offset_of(runs, seq)
  local found = 0
  for first, offset in string.gmatch(runs, '(%d+):(%d+)') do
    if tonumber(first) <= seq then found = tonumber(offset) + seq - tonumber(first) end
  end
  return found
end

local function add_run(runs, seq, offset, bound)
  local first, at = string.match(runs, '(%d+):(%d+)$')
  if first and tonumber(at) - tonumber(first) == offset - seq then return runs end
  if runs ~= '' then
    local _, commas = string.gsub(runs, ',', ',')
    if commas + 2 > bound then runs = string.match(runs, '^[^,]*,(.*)$') or '' end
  end
  return (runs == '' and '' or runs .. ',') .. int(seq) .. ':' .. int(offset)
end

-- The generation of the entry at `offset`; nil where the list no longer reaches back that far.
local function generation_of(known, offset)
  local found
  for _, one in ipairs(known) do
    if one[2] <= offset then found = one[1] end
  end
  return found
end

-- Whether ARGV[from..] are the ops from `offset` on: "ok", "taken" by others, or "unknown".
local function same_ops(offset, from)
  local known = generations(redis.call('HGET', META, 'gens'))
  for i = from, #ARGV do
    local at = offset + i - from
    local generation = offset > 0 and generation_of(known, at)
    local id = generation and int(generation) .. '-' .. int(at)
    local entry = id and redis.call('XRANGE', LOG, id, id)[1]
    if not entry then return 'unknown' end
    if entry[2][2] ~= ARGV[i] then return 'taken' end
  end
  return 'ok'
end

local function size_of(from, to)
  local size, largest = 0, 0
  for i = from, to do
    size, largest = size + #ARGV[i], math.max(largest, #ARGV[i])
  end
  return size, largest
end

-- Bytes that a reader of the whole session has to be given: the snapshot and what came since.
local function session_bytes()
  local known = redis.call('HMGET', META, 'wb', 'wo', 'sb')
  return tonumber(known[1] or '0') - tonumber(known[2] or '0') + tonumber(known[3] or '0')
end

-- Append ARGV[from..to] behind `tail`; returns the new tail. Marks the session dirty.
local function write(generation, tail, from, to, now)
  local known = redis.call('HMGET', META, 'pub', 'mx', 'ck')
  local clean = tonumber(known[1] or '0') >= tail
  local size, largest = size_of(from, to)
  local digest = known[3] or ''
  for i = from, to do
    tail = tail + 1
    digest = string.sub(redis.sha1hex(digest .. ARGV[i]), 1, DIGEST_CHARS)
    redis.call('XADD', LOG, int(generation) .. '-' .. int(tail), 'o', ARGV[i])
  end
  redis.call('HSET', META, 'tail', int(tail), 'u', int(now), 'ck', digest,
    'mx', int(math.max(largest, tonumber(known[2] or '0'))))
  redis.call('HINCRBY', META, 'wb', int(size))
  tell(generation, tail)
  if clean then redis.call('HSET', META, 'da', int(now)) end
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
  local lately = redis.call('ZCOUNT', PRODUCERS, '(' .. int(now - PRODUCER_KEPT_MS), '+inf')
  forget(PRODUCERS, math.max(bound, math.min(lately, PRODUCERS_MOST * bound)), 'p:')
end

local function turn_flags(turn)
  local ended, nonce = string.match(redis.call('HGET', META, 'x:' .. turn) or '0|', '^(%d)|(.*)$')
  return ended == '1', nonce
end

local function hold(turn, lease_ms, now)
  redis.call('HSET', META, 'cur', turn, 'lease', int(now + tonumber(lease_ms)))
end

local function held(current, lease, now)
  local left = tonumber(lease) - now
  return current ~= '' and left > 0 and left <= LEASE_MAX_MS
end

-- The owner of a turn is gone: whatever it may still send is refused from here on.
local function fence(turn)
  redis.call('HSET', META, 't:' .. turn,
    int(parse(redis.call('HGET', META, 't:' .. turn)) + 1) .. '|0|')
end

-- {generation, offset} of an entry or of the snapshot
local function place(text, separator)
  local generation, offset = string.match(text, '^(%d+)' .. separator .. '(%d+)')
  if not generation then return {0, 0} end
  return {tonumber(generation), tonumber(offset)}
end

local function last_entry()
  local last = redis.call('XREVRANGE', LOG, '+', '-', 'COUNT', 1)[1]
  return last and place(last[1], '-') or {0, 0}
end

-- The first offset that is neither in the snapshot nor in the log; nil where all is there.
local function hole(tail)
  local so = tonumber(redis.call('HGET', META, 'so') or '0')
  local folded = so > 0 and redis.call('EXISTS', SNAPSHOT) == 0
  if tail <= so and not folded then return nil end
  local entry = redis.call('XRANGE', LOG, '-', '+', 'COUNT', 1)[1]
  local first = entry and place(entry[1], '-')[2] or tail + 1
  local from = folded and 1 or so + 1
  if first > from then return from end
  local last = last_entry()[2]
  return last < tail and last + 1 or nil
end

-- Which generations the entries that are left belong to, where meta forgot it. O(log), once.
local function recover_generations()
  local from, before = '-', nil
  while true do
    local some = redis.call('XRANGE', LOG, from, '+', 'COUNT', 64)
    if #some == 0 then return end
    for _, entry in ipairs(some) do
      local id = place(entry[1], '-')
      if id[1] ~= before then new_generation(id[1], id[2], '', 0) end
      before = id[1]
      from = int(id[1]) .. '-' .. int(id[2] + 1)
    end
  end
end

-- The turns that wait, without those that nobody named for `wait_ms`.
local function waiting(now, wait_ms)
  local list = {}
  for turn, at, flag in string.gmatch(redis.call('HGET', META, 'wait') or '', '([^:,]+):(%d+):(%a)') do
    local kept_ms = flag == 's' and 60000 or tonumber(wait_ms)
    if tonumber(at) + kept_ms > now then list[#list + 1] = {turn, at, flag} end
  end
  return list
end

local function keep_waiting(list)
  local parts = {}
  for i, one in ipairs(list) do parts[i] = one[1] .. ':' .. one[2] .. ':' .. one[3] end
  redis.call('HSET', META, 'wait', table.concat(parts, ','))
end

-- The place of `turn` among those that wait, how many wait, and the first of them.
local function place_of(list, turn)
  local place, count, first = nil, 0, ''
  for i, one in ipairs(list) do
    if one[1] == turn then place = i end
    if one[3] == 'w' then
      count = count + 1
      if first == '' then first = one[1] end
    end
  end
  return place, count, first
end

-- Who repeats a call waits for replicas over another connection, behind its last write there: this.
local function written_before(generation)
  redis.call('HSET', META, 'gen', int(generation))
end

-- Whether a token, "<valid since, ms>|<its device>" ("": there is none), was revoked.
local function void(bearer)
  local issued, device = string.match(bearer, '^(%d+)|(.*)$')
  if not issued then return false end
  return tonumber(issued) < tonumber(redis.call('HGET', META, 'rv:' .. device) or '0')
end

-- What there is to say of a turn before it begins, as begin; nil where it may begin now.
local function judge(known, turn, digest, nonce, wait_ms, abandon_ms, now, ops, bearer)
  local generation, tail, current = known[1], known[2], known[3]
  local before = redis.call('HGET', META, 'd:' .. turn)
  if before and digest ~= '' and before ~= digest then
    return {'conflict', 0, generation, tail, 1, 0, '', 0, 0}
  end
  if known[5] then
    local ended, owner = turn_flags(turn)
    local begun = tonumber(redis.call('ZSCORE', TURNS, turn) or '0')
    if nonce ~= '' and owner == nonce then
      written_before(generation)
      return {'ok', parse(known[5]), generation, begun, 0, 0, '', ops, 0}
    end
    return {'ok', parse(known[5]), generation, begun, 1, ended and 1 or 0, '', 0, 0}
  end
  if before then return {'ok', 0, generation, 0, 1, 1, '', 0, 0} end  -- it ended long ago
  if void(bearer) then return {'revoked', 0, generation, tail, 0, 0, '', 0, 0} end
  if redis.call('HGET', META, 'bare') then -- nobody can say yet that it never began
    return {'busy', 0, generation, tail, 0, 0, '', 0, 0}
  end
  local list = waiting(now, wait_ms)
  local place, _, first = place_of(list, turn)
  if place and list[place][3] == 's' then
    return {'cancelled', 0, generation, tail, 0, 0, '', 0, 0}
  end
  local left = tonumber(known[4]) - now
  if left > LEASE_MAX_MS then left = -LEASE_MAX_MS end
  if current ~= '' and left + tonumber(abandon_ms) > 0 then
    return {'busy', 0, generation, tail, 0, 0, current, 0, left}
  end
  if first ~= '' and first ~= turn then
    return {'busy', 0, generation, tail, 0, 0, first, 0, tonumber(wait_ms)}
  end
  return nil
end

local verbs = {}

-- must_exist, device, devices bound, producer, producers bound, generation that the caller knows,
-- its token -> {status, generation, tail, created, the producer's epoch}
-- A session made anew after the store lost everything is another life: its generation is no
-- earlier one's, also where the clock went back.
function verbs.open(must_exist, device, devices_bound, producer, producers_bound, after, bearer)
  local known, created = meta(), 0
  if known and void(bearer) then return {'revoked', 0, 0, 0, 0} end
  local now = now_ms()
  if not known then
    local last = last_entry()
    local folded = place(redis.call('GETRANGE', SNAPSHOT, 0, 40), ' ')
    if must_exist == '1' and last[2] == 0 and folded[2] == 0 then
      return {'missing', 0, 0, 0, 0}
    end
    -- Where only meta is gone (evicted), the log goes on behind what is left of it.
    local tail = math.max(last[2], folded[2])
    local generation = math.max(now, tonumber(after) + 1, last[1] + 1, folded[1] + 1)
    if tail == 0 then redis.call('DEL', SNAPSHOT) end -- of a deleted session
    redis.call('HSET', META, 'tail', int(tail), 'pub', 0, 'da', 0, 'u', int(now), 'n', 0,
      'cur', '', 'lease', 0, 'stop', '', 'title', '', 'pe', int(generation),
      'so', int(folded[2]), 'wo', 0, 'sb', redis.call('STRLEN', SNAPSHOT), 'wb', 0, 'mx', 1048576)
    recover_generations()
    new_generation(generation, tail + 1, alive(), now)
    redis.call('HSET', META, unpack(tail == 0 and {'da', 0, 'mx', 0} or {'bare', 1}))
    tell(generation, tail)
    known, created = {generation, tail}, tail == 0 and 1 or 0
  end
  if device ~= '' then
    redis.call('ZADD', DEVICES, int(now), device)
    forget(DEVICES, tonumber(devices_bound))
  end
  local epoch = 0
  if producer ~= '' then
    epoch = redis.call('HINCRBY', META, 'pe', 1)
    redis.call('HSET', META, 'p:' .. producer, int(epoch) .. '|0|')
    redis.call('ZADD', PRODUCERS, int(now), producer)
    forget_producers(tonumber(producers_bound), now)
  end
  return {hole(known[2]) and 'hole' or 'ok', known[1], known[2], created, epoch}
end

-- device, its token -> {"ok", "unknown", "revoked" or "missing"}; one that is in use counts as one
-- opened just now
function verbs.use(device, bearer)
  if redis.call('EXISTS', META) == 0 then return {'missing'} end
  if void(bearer) then return {'revoked'} end
  if not redis.call('ZSCORE', DEVICES, device) then return {'unknown'} end
  -- A store that takes no writes for now (full, a replica) still answers.
  redis.pcall('ZADD', DEVICES, int(now_ms()), device)
  return {'ok'}
end

-- What the ops from the n-th on take of the quotas, by their slots: "v" or "d" and a name's hash, 17
-- characters each (see quota.py). -> the status where there is no room, or the fields to set
local function quota(slots, n, bounds)
  local fields, news = {}, {v = 0, d = 0, k = 0}
  for at = 17 * (n - 1) + 1, #slots, 17 do
    local slot = string.sub(slots, at, at + 16)
    local kind = string.sub(slot, 1, 1)
    if kind == 'v' or kind == 'd' then
      if not fields[slot] and not redis.call('HGET', META, 'q:' .. slot) then
        fields[slot] = true
        news[kind] = news[kind] + 1
      end
    end
    if kind == 'd' or kind == 'k' then news.k = news.k + 1 end
  end
  local values, docs, kept = string.match(bounds, '^(%d+):(%d+):(%d+)$')
  local said = {{'v', values, 'no_values'}, {'d', docs, 'no_docs'}, {'k', kept, 'no_kept_ops'}}
  local set = {}
  for _, one in ipairs(said) do
    if news[one[1]] > 0 then
      local count = tonumber(redis.call('HGET', META, 'q' .. one[1]) or '0') + news[one[1]]
      if count > tonumber(one[2]) then return one[3] end
      set[#set + 1] = 'q' .. one[1]
      set[#set + 1] = int(count)
    end
  end
  for slot in pairs(fields) do
    set[#set + 1] = 'q:' .. slot
    set[#set + 1] = '1'
  end
  return nil, set
end

-- producer, epoch, first seq, turn, nonce, generation, ends, lease ms, runs bound, producers
-- bound, session's bytes bound, quota slots, their bounds ("values:docs:kept ops"), the token that
-- it is appended with (see `void`), ops...
-- -> {status, generation, first offset, tail, current epoch, expected seq, stop?, appended,
--     entries since the snapshot, bytes since it, first offset that may be lost}
function verbs.append(producer, epoch, first, turn, nonce, believed, ends, lease_ms, runs_bound,
    bound, room, slots, bounds, bearer)
  local OPS = 16
  epoch, first = tonumber(epoch), tonumber(first)
  local field = turn ~= '' and 't:' .. turn or 'p:' .. producer
  local known = meta('cur', 'stop', field)
  if not known then return {'missing', 0, 0, 0, 0, 0, 0, 0, 0, 0, 0} end
  local generation, tail, current, stop = known[1], known[2], known[3], known[4]
  local stopping = (turn ~= '' and stop == turn) and 1 or 0
  local has, seq, runs = parse(known[5])
  local function answer(status, offset, expected, appended, lost)
    local log = redis.call('HMGET', META, 'so', 'wb', 'wo')
    return {status, generation, offset, tail, math.max(has, 0), expected, stopping, appended,
      tail - tonumber(log[1] or '0'), tonumber(log[2] or '0') - tonumber(log[3] or '0'), lost or 0}
  end
  local ended, owner = false, nonce
  if turn ~= '' then ended, owner = turn_flags(turn) end
  if void(bearer) then return answer('revoked', 0, 0, 0) end
  -- Epochs are given: by `open` to a producer, by `begin` and `take` to a turn.
  if has < 0 or epoch ~= has or nonce ~= owner then return answer('stale', 0, 0, 0) end
  believed = tonumber(believed)
  if believed > 0 and believed ~= generation then
    local lost = tail + 1
    for _, one in ipairs(generations(redis.call('HGET', META, 'gens'))) do
      if one[1] > believed then lost = math.min(lost, one[2]) end
    end
    return answer('moved', 0, seq + 1, 0, lost)
  end
  local last = first + #ARGV - OPS
  if last <= seq then
    local offset = offset_of(runs, first)
    local same = same_ops(offset, OPS)
    if ends == '1' and same == 'ok' then written_before(generation) end
    return answer(same == 'ok' and 'dup' or same, offset, seq + 1, 0)
  end
  if ended then return answer('stale', 0, 0, 0) end
  if first > seq + 1 then return answer('gap', 0, seq + 1, 0) end
  local news = seq + 1
  local from = OPS + news - first
  if turn == '' and session_bytes() + size_of(from, #ARGV) > tonumber(room) then
    return answer('no_room', 0, seq + 1, 0)
  end
  local full, taken = quota(slots, news - first + 1, bounds)
  if full then return answer(full, 0, seq + 1, 0) end
  if #taken > 0 then redis.call('HSET', META, unpack(taken)) end

  local now = now_ms()
  runs = add_run(runs, news, tail + 1, tonumber(runs_bound))
  tail = write(generation, tail, from, #ARGV, now)
  redis.call('HSET', META, field, int(epoch) .. '|' .. int(last) .. '|' .. runs)
  if turn == '' then
    redis.call('ZADD', PRODUCERS, int(now), producer)
    forget_producers(tonumber(bound), now)
  elseif ends == '1' then
    redis.call('HSET', META, 'x:' .. turn, '1|' .. nonce)
    if current == turn then redis.call('HSET', META, 'cur', '', 'lease', 0, 'stop', '') end
  elseif current == turn then
    hold(turn, lease_ms, now)
  end
  return answer('ok', offset_of(runs, first), last + 1, last - seq)
end

-- turn, lease ms, turns bound, title, nonce, digest, wait ms, abandon ms (how long after its lease
-- an owner's turn is left to others), session's bytes bound, the token that it is asked with, ops...
-- -> {status, epoch, generation, offset of the last opening op, known, ended, holder, appended,
--     what is left of the holder's lease, ms}
-- The nonce tells a repeated call, whose reply was lost, from another one's turn.
function verbs.begin(turn, lease_ms, bound, title, nonce, digest, wait_ms, abandon_ms, room, bearer)
  local OPS = 12
  local known = meta('cur', 'lease', 't:' .. turn, 'title', 'e:' .. turn)
  if not known then return {'missing', 0, 0, 0, 0, 0, '', 0, 0} end
  local generation, tail, current = known[1], known[2], known[3]
  local now = now_ms()
  local said = judge(known, turn, digest, nonce, wait_ms, abandon_ms, now, #ARGV - OPS + 1, bearer)
  if said then return said end
  if session_bytes() + size_of(OPS, #ARGV) > tonumber(room) then
    return {'no_room', 0, generation, tail, 0, 0, '', 0, 0}
  end
  if current ~= '' then fence(current) end
  tail = write(generation, tail, OPS, #ARGV, now)
  local epoch = tonumber(known[7] or '0') + 1
  redis.call('HSET', META, 't:' .. turn, int(epoch) .. '|0|', 'x:' .. turn, '0|' .. nonce,
    'stop', '')
  if known[7] then redis.call('HDEL', META, 'e:' .. turn) end
  if digest ~= '' then redis.call('HSET', META, 'd:' .. turn, digest) end
  local list = waiting(now, wait_ms)
  local place = place_of(list, turn)
  if place then
    table.remove(list, place)
    keep_waiting(list)
  end
  redis.call('HINCRBY', META, 'n', 1)
  if known[6] == '' and title ~= '' then redis.call('HSET', META, 'title', title) end
  hold(turn, lease_ms, now)
  redis.call('ZADD', TURNS, int(tail), turn)
  forget(TURNS, tonumber(bound), 't:', 'x:')
  return {'ok', epoch, generation, tail, 0, 0, current, #ARGV - OPS + 1, 0}
end

-- turn, digest, mode ("look", "join" the turns that wait, "leave" them), wait ms, bound of those
-- that wait, abandon ms, the token that it is asked with -> as begin; "ok" and not known: it may
-- begin now
function verbs.wait(turn, digest, mode, wait_ms, bound, abandon_ms, bearer)
  local known = meta('cur', 'lease', 't:' .. turn)
  if not known then return {'missing', 0, 0, 0, 0, 0, '', 0, 0} end
  local now = now_ms()
  local said = judge(known, turn, digest, '', wait_ms, abandon_ms, now, 0, bearer)
    or {'ok', 0, known[1], known[2], 0, 0, '', 0, 0}
  local list = waiting(now, wait_ms)
  local place, count = place_of(list, turn)
  if mode == 'leave' and place and list[place][3] == 'w' then
    table.remove(list, place)
    keep_waiting(list)
  elseif mode == 'join' and (said[1] == 'busy' or (said[1] == 'ok' and said[5] == 0)) then
    if not place and count >= tonumber(bound) then
      return {'full', 0, known[1], known[2], 0, 0, said[7], 0, said[9]}
    end
    list[place or #list + 1] = {turn, int(now), 'w'}
    keep_waiting(list)
  end
  return said
end

-- turn, lease ms, mode ("now", "quiet": only where the turn holds its session and nobody renewed its
-- lease for quiet ms, "fence": without claiming the session), nonce, quiet ms -> as begin
function verbs.take(turn, lease_ms, mode, nonce, quiet_ms)
  local known = meta('cur', 'lease', 't:' .. turn)
  if not known or not known[5] then return {'missing', 0, 0, 0, 0, 0, '', 0} end
  local generation, tail, current = known[1], known[2], known[3]
  local ended, before = turn_flags(turn)
  local epoch = parse(known[5])
  if ended then return {'missing', epoch, generation, tail, 1, 1, current, 0} end
  if before == nonce then
    written_before(generation)
    return {'ok', epoch, generation, tail, 1, 0, '', 0}
  end
  local now = now_ms()
  -- A turn that lost its session to another one is not gone on with.
  if mode == 'quiet' and current ~= turn then
    return {'busy', epoch, generation, tail, 1, 0, current, 0}
  end
  local busy = held(current, known[4], now)
  if mode == 'fence' and current == turn then -- nobody took its session from it
    return {'busy', epoch, generation, tail, 1, 0, current, 0}
  end
  if mode == 'quiet' then
    busy = busy and now < tonumber(known[4]) - tonumber(lease_ms) + tonumber(quiet_ms)
  end
  if busy and mode ~= 'fence' and (current ~= turn or mode == 'quiet') then
    return {'busy', epoch, generation, tail, 1, 0, current, 0}
  end
  if mode ~= 'fence' and current ~= '' and current ~= turn then fence(current) end
  epoch = epoch + 1
  redis.call('HSET', META, 't:' .. turn, int(epoch) .. '|0|', 'x:' .. turn, '0|' .. nonce)
  if mode ~= 'fence' then hold(turn, lease_ms, now) end
  return {'ok', epoch, generation, tail, 1, 0, '', 0}
end

-- turn, epoch, nonce, lease ms -> as append
function verbs.renew(turn, epoch, nonce, lease_ms)
  local known = meta('cur', 'stop', 't:' .. turn)
  if not known then return {'missing', 0, 0, 0, 0, 0, 0, 0, 0, 0, 0} end
  local has = parse(known[5])
  local _, owner = turn_flags(turn)
  if tonumber(epoch) ~= has or nonce ~= owner or known[3] ~= turn then
    return {'stale', known[1], 0, known[2], math.max(has, 0), 0, 0, 0, 0, 0, 0}
  end
  hold(turn, lease_ms, now_ms())
  return {'ok', known[1], 0, known[2], has, 0, known[4] == turn and 1 or 0, 0, 0, 0, 0}
end

-- turn, epoch, nonce -> {status}; whoever asks next may take the turn over
function verbs.release(turn, epoch, nonce)
  local known = meta('cur', 't:' .. turn)
  if not known then return {'missing'} end
  local has = parse(known[4])
  local _, owner = turn_flags(turn)
  if tonumber(epoch) ~= has or nonce ~= owner or known[3] ~= turn then return {'stale'} end
  redis.call('HSET', META, 'lease', int(now_ms()))
  return {'ok'}
end

-- turn or "" (whichever runs) -> {the turn that is asked to stop, or ""}; one that waits for the
-- session will not begin
function verbs.stop(turn)
  local known = meta('cur')
  if not known then return {''} end
  if turn ~= '' and turn ~= known[3] then
    local now = now_ms()
    local list = waiting(now, 60000)
    local place = place_of(list, turn)
    if not place then return {''} end
    list[place] = {turn, int(now), 's'}
    keep_waiting(list)
    return {turn}
  end
  if known[3] == '' then return {''} end
  redis.call('HSET', META, 'stop', known[3])
  return {known[3]}
end

-- What a cursor of another generation knows: "ok" a prefix of this log, "lost" entries from the
-- second value on that are not in it, "ahead" of the log.
local function judge_cursor(known, generation, tail, after_generation, after)
  if after == 0 then return 'ok', 0 end
  if after_generation == generation then
    if after > tail then return 'ahead', 0 end
    return 'ok', 0
  end
  local lost
  for at = #known, 1, -1 do
    if known[at][1] == after_generation then
      if after < lost then return 'ok', 0 end
      return 'lost', lost
    end
    lost = math.min(lost or known[at][2], known[at][2])
  end
  return 'lost', 1
end

-- generation and offset of a cursor, count, bytes, judged? ("0": it is this process's own)
-- -> {status, generation, tail, {entries}, snapshot's offset, bytes written, first lost offset,
--     digest at the tail, bare?}
function verbs.read(after_generation, after, count, bytes, judged)
  local known = meta('gens', 'so', 'wb', 'mx', 'ck', 'bare')
  if not known then return {'missing', 0, 0, {}, 0, 0, 0, '', 0} end
  local generation, tail, list = known[1], known[2], generations(known[3])
  if #list == 0 or list[#list][1] ~= generation then -- it began with this very call
    list = generations(redis.call('HGET', META, 'gens'))
  end
  after_generation, after = tonumber(after_generation), tonumber(after)
  count, bytes = tonumber(count), tonumber(bytes)
  local so, written = tonumber(known[4] or '0'), tonumber(known[5] or '0')
  local status, lost, digest, bare = 'ok', 0, known[7] or '', known[8] and 1 or 0
  if judged == '1' then
    status, lost = judge_cursor(list, generation, tail, after_generation, after)
  end
  if status ~= 'ok' or after >= tail then
    return {status, generation, tail, {}, so, written, lost, digest, bare}
  end
  local at = generation_of(list, after + 1)
  local from = at and int(at) .. '-' .. int(after + 1)
  if not at then from = after == 0 and '-' or int(after_generation) .. '-' .. int(after + 1) end
  -- No step can bring more than `bytes` and one op through here.
  local largest = math.max(tonumber(known[6] or '0'), 1)
  local entries, size = {}, 0
  while #entries < count and (size < bytes or #entries == 0) do
    local step = math.max(1, math.floor((bytes - size) / largest))
    local some = redis.call('XRANGE', LOG, from, '+', 'COUNT', math.min(step, count - #entries))
    if #some == 0 then break end
    for _, entry in ipairs(some) do
      if size + #entry[2][2] > bytes and #entries > 0 then
        return {status, generation, tail, entries, so, written, lost, digest, bare}
      end
      entries[#entries + 1], size = entry, size + #entry[2][2]
    end
    local id = place(entries[#entries][1], '-')
    from = int(id[1]) .. '-' .. int(id[2] + 1)
  end
  return {status, generation, tail, entries, so, written, lost, digest, bare}
end

-- generation, offset, keep from, bytes written up to there, state -> {status}
function verbs.compact(generation, offset, keep_from, written, state)
  local known = meta('so')
  if not known then return {'missing'} end
  offset = tonumber(offset)
  -- Folded under an earlier generation, a state may hold entries that were lost since.
  if tonumber(generation) ~= known[1] then return {'stale'} end
  if offset > known[2] or offset <= tonumber(known[3] or '0') then return {'stale'} end
  redis.call('SET', SNAPSHOT, int(known[1]) .. ' ' .. int(offset) .. '\n' .. state)
  redis.call('HSET', META, 'so', int(offset), 'wo', written, 'sb', #state)
  local from = math.min(tonumber(keep_from), offset + 1)
  local at = generation_of(generations(redis.call('HGET', META, 'gens')), from)
  if at then redis.call('XTRIM', LOG, 'MINID', int(at) .. '-' .. int(from)) end
  return {'ok'}
end

-- As if `turn` had never begun: the log has lost its beginning. Its epochs count on.
local function unknow(turn, current)
  local epoch = parse(redis.call('HGET', META, 't:' .. turn))
  if epoch > 0 then redis.call('HSET', META, 'e:' .. turn, int(epoch)) end
  redis.call('HDEL', META, 't:' .. turn, 'x:' .. turn, 'd:' .. turn)
  redis.call('ZREM', TURNS, turn)
  if current == turn then redis.call('HSET', META, 'cur', '', 'lease', 0, 'stop', '') end
end

-- generation and offset of the tail, state of what is left up to there, "turn,..." that are in it,
-- those of them without an end, the last turn of all if it is one of these, or "" -> {status}: the
-- log goes on behind a hole, under another generation. Only a hole that is found here again counts,
-- and only a state that no entry came behind: it would be in neither.
function verbs.mend(generation, offset, state, kept, endless, last)
  local known = meta('wb', 'cur')
  if not known then return {'missing'} end
  local missing = hole(known[2])
  if tonumber(generation) ~= known[1] or tonumber(offset) ~= known[2] or not missing then
    return {'stale'}
  end
  local has = {}
  for turn in string.gmatch(kept, '[^,]+') do has[turn] = true end
  for _, turn in ipairs(redis.call('ZRANGE', TURNS, 0, -1)) do
    if not has[turn] then unknow(turn, known[4]) end
  end
  for turn in string.gmatch(endless, '[^,]+') do
    local ended, nonce = turn_flags(turn)
    if ended then redis.call('HSET', META, 'x:' .. turn, '0|' .. nonce) end
  end
  -- Whoever has room finishes it, once nobody holds the session.
  if last ~= '' and redis.call('HGET', META, 'cur') == '' then hold(last, 0, now_ms()) end
  new_generation(known[1] + 1, missing, alive(), now_ms())
  tell(known[1] + 1, known[2])
  redis.call('SET', SNAPSHOT, int(known[1] + 1) .. ' ' .. int(known[2]) .. '\n' .. state)
  redis.call('HSET', META, 'so', int(known[2]), 'wo', known[3] or '0', 'sb', #state)
  redis.call('XTRIM', LOG, 'MAXLEN', 0)
  return {'ok'}
end

-- generation, title, the running turn or "", count, so many names and values of `meta`, scores and
-- members of `turns` -> {status}: what the log says of its turns is known again
function verbs.restore(generation, title, running, count)
  local known = meta('bare')
  if not known then return {'missing'} end
  if tonumber(generation) ~= known[1] or not known[3] then return {'stale'} end
  local FIELDS = 6
  local scores = FIELDS + tonumber(count)
  for i = FIELDS, scores - 1, 2 do redis.call('HSET', META, ARGV[i], ARGV[i + 1]) end
  for i = scores, #ARGV, 2 do redis.call('ZADD', TURNS, ARGV[i], ARGV[i + 1]) end
  redis.call('HSET', META, 'title', title)
  redis.call('HDEL', META, 'bare')
  if running ~= '' then hold(running, 0, now_ms()) end -- whoever has room finishes it
  return {'ok'}
end

-- generation, offset -> {status}
function verbs.published(generation, offset)
  local known = meta('pub')
  if not known or tonumber(generation) ~= known[1] then return {'stale'} end
  local published = math.min(math.max(tonumber(known[3]), tonumber(offset)), known[2])
  redis.call('HSET', META, 'pub', int(published), 'da',
    published >= known[2] and 0 or int(now_ms()))
  return {'ok'}
end

-- device, how long from now on its tokens are void as well (their issuer's clock may be ahead) or, in
-- place of now, the time before which they are, ms -> {"ok" or "missing", that time}
function verbs.revoke(device, ahead_ms, before_ms)
  if not meta() then return {'missing', 0} end
  local field = 'rv:' .. device
  local before = before_ms ~= '' and tonumber(before_ms) or now_ms() + tonumber(ahead_ms)
  before = math.max(before, tonumber(redis.call('HGET', META, field) or '0'))
  redis.call('HSET', META, field, int(before))
  return {'ok', before}
end

local reply = verbs[ARGV[1]](unpack(ARGV, 2, math.min(#ARGV, 15)))
-- Writes that may be waited for say last how many replicas there are.
if ({append = 1, begin = 1, take = 1, renew = 1})[ARGV[1]] then reply[#reply + 1] = replicas end
return reply
