-- Who may run a turn, and which turns wait: see log.lua.

local function turn_flags(turn) return flags(redis.call('HGET', META, 'x:' .. turn)) end

local function hold(turn, lease_ms, now)
  redis.call('HSET', META, 'cur', turn, 'lease', int(now + tonumber(lease_ms)))
end

-- Who repeats a call waits for replicas over another connection, behind its last write there: this.
local function written_before(generation)
  redis.call('HSET', META, 'gen', int(generation))
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

-- turn, lease ms, turns bound, title, nonce, digest, wait ms, abandon ms (how long after its lease
-- an owner's turn is left to others), session's bytes bound, the token that it is asked with, ops...
-- -> {status, epoch, generation, offset of the last opening op, known, ended, holder, appended,
--     what is left of the holder's lease, ms}
-- The nonce tells a repeated call, whose reply was lost, from another one's turn.
function verbs.begin(turn, lease_ms, bound, title, nonce, digest, wait_ms, abandon_ms, room, bearer)
  local OPS = 12
  local known = meta('cur', 'lease', 't:' .. turn, 'title', 'e:' .. turn,
    'pub', 'mx', 'ck', 'wb', 'wo', 'sb')
  if not known then return {'missing', 0, 0, 0, 0, 0, '', 0, 0} end
  local generation, tail, current = known[1], known[2], known[3]
  local log = log_facts(unpack(known, 8, 13))
  local now = now_ms()
  local said = judge(known, turn, digest, nonce, wait_ms, abandon_ms, now, #ARGV - OPS + 1, bearer)
  if said then return said end
  if log.size + size_of(OPS) > tonumber(room) then
    return {'no_room', 0, generation, tail, 0, 0, '', 0, 0}
  end
  if current ~= '' then fence(current) end
  local epoch = tonumber(known[7] or '0') + 1
  local set = {'t:' .. turn, int(epoch) .. '|0|', 'x:' .. turn, '0|' .. nonce, 'stop', '',
    'cur', turn, 'lease', now + tonumber(lease_ms)}
  if digest ~= '' then set[#set + 1], set[#set + 2] = 'd:' .. turn, digest end
  if known[6] == '' and title ~= '' then set[#set + 1], set[#set + 2] = 'title', title end
  tail = write(generation, tail, log, OPS, now, set)
  if known[7] then redis.call('HDEL', META, 'e:' .. turn) end
  local list = waiting(now, wait_ms)
  local place = place_of(list, turn)
  if place then
    table.remove(list, place)
    keep_waiting(list)
  end
  redis.call('HINCRBY', META, 'n', 1)
  redis.call('ZADD', TURNS, tail, turn)
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
-- lease for quiet ms, "fence": without claiming the session), nonce, quiet ms, the epoch that it is
-- taken from (0: any) -> as begin
function verbs.take(turn, lease_ms, mode, nonce, quiet_ms, from)
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
  if tonumber(from) > 0 and epoch ~= tonumber(from) then
    return {'busy', epoch, generation, tail, 1, 0, current, 0}
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

local reply = verbs[ARGV[1]](unpack(ARGV, 2, math.min(#ARGV, 15)))
-- Writes that may be waited for say last how many replicas there are.
if ({begin = 1, take = 1, renew = 1})[ARGV[1]] then reply[#reply + 1] = replicas end
return reply
