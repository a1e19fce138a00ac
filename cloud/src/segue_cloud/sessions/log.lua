-- The one script of the session log: every change of a session is one atomic, idempotent, fenced
-- call of it. ARGV[1] names the verb; its arguments follow. All keys share one hash tag.
--
-- KEYS  1 log        stream; entry id = <generation>-<offset>, field "o" = the op's bytes
--       2 meta       hash: gen, tail, gs (first offset of this generation), cur (running turn),
--                    lease (ms), stop (turn asked to stop), wait (turns that wait for the
--                    session, first come first: "turn:ms:flag,..."; flag w waits and named
--                    itself then, s was stopped then), d:<turn> = digest of what was asked, pub (published offset), da (dirty since,
--                    ms), u (updated, ms), n (turns), title,
--                    p:<producer> and t:<turn> = "epoch|seq|seq:offset,seq:offset,...",
--                    x:<turn> = "<ended>|<nonce of the claim that made its epoch>": who
--                    appends names it, so one epoch has one owner
--       3 producers  sorted set: producer by the offset of its last append
--       4 turns      sorted set: turn by the offset of its last opening op
--       5 devices    sorted set: device by the time it last opened or used the session
--       6 snapshot   string: the folded state
--
-- Where a producer's ops got consecutive offsets they are one "seq:offset" run, so the offset of
-- any remembered op is that of its run's first one plus the distance.

local LOG, META, PRODUCERS, TURNS = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local DEVICES, SNAPSHOT = KEYS[5], KEYS[6]

local function now_ms()
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end

local function meta(...)
  local values = redis.call('HMGET', META, 'gen', 'tail', ...)
  if not values[1] then return nil end
  values[1], values[2] = tonumber(values[1]), tonumber(values[2])
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
  if runs == '' then return seq .. ':' .. offset end
  local _, commas = string.gsub(runs, ',', ',')
  if commas + 2 > bound then runs = string.match(runs, '^[^,]*,(.*)$') or '' end
  return (runs == '' and '' or runs .. ',') .. seq .. ':' .. offset
end

-- Append ARGV[from..to] behind `tail`; returns the new tail. Marks the session dirty.
local function write(generation, tail, from, to, now)
  local clean = tonumber(redis.call('HGET', META, 'pub') or '0') >= tail
  for i = from, to do
    tail = tail + 1
    redis.call('XADD', LOG, generation .. '-' .. tail, 'o', ARGV[i])
  end
  redis.call('HSET', META, 'tail', tail, 'u', now)
  if clean then redis.call('HSET', META, 'da', now) end
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

local function turn_flags(turn)
  local ended, nonce = string.match(redis.call('HGET', META, 'x:' .. turn) or '0|', '^(%d)|(.*)$')
  return ended == '1', nonce
end

local function hold(turn, lease_ms, now)
  redis.call('HSET', META, 'cur', turn, 'lease', now + tonumber(lease_ms))
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

-- What there is to say of a turn before it begins, as begin; nil where it may begin now.
local function judge(known, turn, digest, nonce, wait_ms, abandon_ms, now, ops)
  local generation, tail, current = known[1], known[2], known[3]
  local before = redis.call('HGET', META, 'd:' .. turn)
  if before and digest ~= '' and before ~= digest then
    return {'conflict', 0, generation, tail, 1, 0, '', 0, 0}
  end
  if known[5] then
    local ended, owner = turn_flags(turn)
    local begun = tonumber(redis.call('ZSCORE', TURNS, turn) or '0')
    if nonce ~= '' and owner == nonce then
      return {'ok', parse(known[5]), generation, begun, 0, 0, '', ops, 0}
    end
    return {'ok', parse(known[5]), generation, begun, 1, ended and 1 or 0, '', 0, 0}
  end
  if before then return {'ok', 0, generation, 0, 1, 1, '', 0, 0} end  -- it ended long ago
  local list = waiting(now, wait_ms)
  local place, _, first = place_of(list, turn)
  if place and list[place][3] == 's' then
    return {'cancelled', 0, generation, tail, 0, 0, '', 0, 0}
  end
  local left = tonumber(known[4]) - now
  if current ~= '' and left + tonumber(abandon_ms) > 0 then
    return {'busy', 0, generation, tail, 0, 0, current, 0, left}
  end
  if first ~= '' and first ~= turn then
    return {'busy', 0, generation, tail, 0, 0, first, 0, tonumber(wait_ms)}
  end
  return nil
end

local verbs = {}

-- must_exist, device, devices bound -> {status, generation, tail, created}
function verbs.open(must_exist, device, bound)
  local known, created = meta(), 0
  local now = now_ms()
  if not known then
    if must_exist == '1' then return {'missing', 0, 0, 0} end
    redis.call('DEL', LOG, META, PRODUCERS, TURNS, DEVICES, SNAPSHOT)
    -- By the clock: a session made anew after the store lost everything is another life, and
    -- whoever followed the old one is told so.
    redis.call('HSET', META, 'gen', now, 'tail', 0, 'gs', 1, 'pub', 0, 'da', 0, 'u', now, 'n', 0,
      'cur', '', 'lease', 0, 'stop', '', 'title', '')
    known, created = {now, 0}, 1
  end
  if device ~= '' then
    redis.call('ZADD', DEVICES, now, device)
    forget(DEVICES, tonumber(bound))
  end
  return {'ok', known[1], known[2], created}
end

-- device -> {"ok", "unknown" or "missing"}; one that is in use counts as one opened just now
function verbs.use(device)
  if not meta() then return {'missing'} end
  if not redis.call('ZSCORE', DEVICES, device) then return {'unknown'} end
  -- A store that takes no writes for now (full, a replica) still answers.
  redis.pcall('ZADD', DEVICES, now_ms(), device)
  return {'ok'}
end

-- producer, epoch, first seq, turn, nonce, ends, lease ms, runs bound, producers bound, ops...
-- -> {status, generation, first offset, tail, current epoch, expected seq, stop?, appended}
function verbs.append(producer, epoch, first, turn, nonce, ends, lease_ms, runs_bound, bound)
  local OPS = 11
  epoch, first = tonumber(epoch), tonumber(first)
  local field = turn ~= '' and 't:' .. turn or 'p:' .. producer
  local known = meta('cur', 'stop', field)
  if not known then return {'missing', 0, 0, 0, 0, 0, 0, 0} end
  local generation, tail, current, stop = known[1], known[2], known[3], known[4]
  local stopping = (turn ~= '' and stop == turn) and 1 or 0
  local has, seq, runs = parse(known[5])
  local ended, owner = false, nonce
  if turn ~= '' then ended, owner = turn_flags(turn) end
  if turn ~= '' and (epoch ~= has or nonce ~= owner) or epoch < has then
    return {'stale', generation, 0, tail, math.max(has, 0), 0, stopping, 0}
  end
  if epoch > has then seq, runs = 0, '' end
  local last = first + #ARGV - OPS
  if last <= seq then
    return {'dup', generation, offset_of(runs, first), tail, epoch, seq + 1, stopping, 0}
  end
  if ended then return {'stale', generation, 0, tail, has, 0, stopping, 0} end
  if first > seq + 1 then return {'gap', generation, 0, tail, epoch, seq + 1, stopping, 0} end

  local now = now_ms()
  local news = seq + 1
  runs = add_run(runs, news, tail + 1, tonumber(runs_bound))
  tail = write(generation, tail, OPS + news - first, #ARGV, now)
  redis.call('HSET', META, field, epoch .. '|' .. last .. '|' .. runs)
  if turn == '' then
    redis.call('ZADD', PRODUCERS, tail, producer)
    forget(PRODUCERS, tonumber(bound), 'p:')
  elseif ends == '1' then
    redis.call('HSET', META, 'x:' .. turn, '1|' .. nonce)
    if current == turn then redis.call('HSET', META, 'cur', '', 'lease', 0, 'stop', '') end
  elseif current == turn then
    hold(turn, lease_ms, now)
  end
  return {'ok', generation, offset_of(runs, first), tail, epoch, last + 1, stopping, last - seq}
end

-- turn, lease ms, turns bound, title, nonce, digest, wait ms, abandon ms (how long after its lease
-- an owner's turn is left to others), ops...
-- -> {status, epoch, generation, offset of the last opening op, known, ended, holder, appended,
--     what is left of the holder's lease, ms}
-- The nonce tells a repeated call, whose reply was lost, from another one's turn.
function verbs.begin(turn, lease_ms, bound, title, nonce, digest, wait_ms, abandon_ms)
  local OPS = 10
  local known = meta('cur', 'lease', 't:' .. turn, 'title')
  if not known then return {'missing', 0, 0, 0, 0, 0, '', 0, 0} end
  local generation, tail, current = known[1], known[2], known[3]
  local now = now_ms()
  local said = judge(known, turn, digest, nonce, wait_ms, abandon_ms, now, #ARGV - OPS + 1)
  if said then return said end
  if current ~= '' then
    -- Its owner is gone: whatever that one may still send is refused from here on.
    redis.call('HSET', META, 't:' .. current, parse(redis.call('HGET', META, 't:' .. current)) + 1
      .. '|0|')
  end
  tail = write(generation, tail, OPS, #ARGV, now)
  redis.call('HSET', META, 't:' .. turn, '1|0|', 'x:' .. turn, '0|' .. nonce, 'stop', '')
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
  redis.call('ZADD', TURNS, tail, turn)
  forget(TURNS, tonumber(bound), 't:', 'x:')
  return {'ok', 1, generation, tail, 0, 0, current, #ARGV - OPS + 1, 0}
end

-- turn, digest, mode ("look", "join" the turns that wait, "leave" them), wait ms, bound of those
-- that wait, abandon ms -> as begin; "ok" and not known: it may begin now
function verbs.wait(turn, digest, mode, wait_ms, bound, abandon_ms)
  local known = meta('cur', 'lease', 't:' .. turn)
  if not known then return {'missing', 0, 0, 0, 0, 0, '', 0, 0} end
  local now = now_ms()
  local said = judge(known, turn, digest, '', wait_ms, abandon_ms, now, 0)
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
    list[place or #list + 1] = {turn, now, 'w'}
    keep_waiting(list)
  end
  return said
end

-- turn, lease ms, mode ("now", "expired": only where no lease holds, "fence": without claiming
-- the session), nonce -> as begin
function verbs.take(turn, lease_ms, mode, nonce)
  local known = meta('cur', 'lease', 't:' .. turn)
  if not known or not known[5] then return {'missing', 0, 0, 0, 0, 0, '', 0} end
  local generation, tail, current = known[1], known[2], known[3]
  local ended, before = turn_flags(turn)
  local epoch = parse(known[5])
  if ended then return {'missing', epoch, generation, tail, 1, 1, current, 0} end
  if before == nonce then return {'ok', epoch, generation, tail, 1, 0, '', 0} end
  local now = now_ms()
  -- A turn that lost its session to another one is not gone on with.
  if mode == 'expired' and current ~= turn then
    return {'busy', epoch, generation, tail, 1, 0, current, 0}
  end
  local held = current ~= '' and tonumber(known[4]) > now
  if held and mode ~= 'fence' and (current ~= turn or mode == 'expired') then
    return {'busy', epoch, generation, tail, 1, 0, current, 0}
  end
  epoch = epoch + 1
  redis.call('HSET', META, 't:' .. turn, epoch .. '|0|', 'x:' .. turn, '0|' .. nonce)
  if mode ~= 'fence' then hold(turn, lease_ms, now) end
  return {'ok', epoch, generation, tail, 1, 0, '', 0}
end

-- turn, epoch, nonce, lease ms -> as append
function verbs.renew(turn, epoch, nonce, lease_ms)
  local known = meta('cur', 'stop', 't:' .. turn)
  if not known then return {'missing', 0, 0, 0, 0, 0, 0, 0} end
  local has = parse(known[5])
  local _, owner = turn_flags(turn)
  if tonumber(epoch) ~= has or nonce ~= owner or known[3] ~= turn then
    return {'stale', known[1], 0, known[2], math.max(has, 0), 0, 0, 0}
  end
  hold(turn, lease_ms, now_ms())
  return {'ok', known[1], 0, known[2], has, 0, known[4] == turn and 1 or 0, 0}
end

-- turn, epoch, nonce -> {status}; whoever asks next may take the turn over
function verbs.release(turn, epoch, nonce)
  local known = meta('cur', 't:' .. turn)
  if not known then return {'missing'} end
  local has = parse(known[4])
  local _, owner = turn_flags(turn)
  if tonumber(epoch) ~= has or nonce ~= owner or known[3] ~= turn then return {'stale'} end
  redis.call('HSET', META, 'lease', now_ms())
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
    list[place] = {turn, now, 's'}
    keep_waiting(list)
    return {turn}
  end
  if known[3] == '' then return {''} end
  redis.call('HSET', META, 'stop', known[3])
  return {known[3]}
end

-- after, count -> {status, generation, tail, {entries}}
function verbs.read(after, count)
  local known = meta('gs')
  if not known then return {'missing', 0, 0, {}} end
  local generation, first = known[1], tonumber(after) + 1
  if known[2] < first then return {'ok', generation, known[2], {}} end
  if first >= tonumber(known[3]) then
    return {'ok', generation, known[2],
      redis.call('XRANGE', LOG, generation .. '-' .. first, '+', 'COUNT', count)}
  end
  -- Offsets go on across generations, ids sort by generation: look for the place (rare).
  local entries = {}
  for _, entry in ipairs(redis.call('XRANGE', LOG, '-', '+')) do
    local offset = tonumber(string.match(entry[1], '-(%d+)$'))
    if offset >= first and #entries < tonumber(count) then entries[#entries + 1] = entry end
  end
  return {'ok', generation, known[2], entries}
end

-- generation, offset, keep from, state -> {status}
function verbs.compact(generation, offset, keep_from, state)
  local known = meta('gs', 'so')
  if not known then return {'missing'} end
  -- Folded under an earlier generation, a state may hold entries that were lost since.
  if tonumber(generation) ~= known[1] then return {'stale'} end
  if tonumber(offset) > known[2] or tonumber(offset) <= tonumber(known[4] or '0') then
    return {'stale'}
  end
  redis.call('SET', SNAPSHOT, state)
  redis.call('HSET', META, 'so', offset)
  local from = math.max(tonumber(keep_from), tonumber(known[3]))
  if from <= tonumber(offset) + 1 then redis.call('XTRIM', LOG, 'MINID', known[1] .. '-' .. from) end
  return {'ok'}
end

-- generation, offset -> {status}
function verbs.published(generation, offset)
  local known = meta('pub')
  if not known or tonumber(generation) ~= known[1] then return {'stale'} end
  local published = math.max(tonumber(known[3]), tonumber(offset))
  redis.call('HSET', META, 'pub', published, 'da', published >= known[2] and 0 or now_ms())
  return {'ok'}
end

-- generation, offset of an entry somebody was told is in the log -> {status, generation, tail}
function verbs.lost(generation, offset)
  local known = meta()
  if not known then return {'missing', 0, 0} end
  if tonumber(generation) ~= known[1] or tonumber(offset) <= known[2] then
    return {'ok', known[1], known[2]}
  end
  redis.call('HSET', META, 'gen', known[1] + 1, 'gs', known[2] + 1)
  return {'ok', known[1] + 1, known[2]}
end

return verbs[ARGV[1]](unpack(ARGV, 2, math.min(#ARGV, 10)))
