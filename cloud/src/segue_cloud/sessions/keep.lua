-- Whole sessions: deleted, and made of an export. The keys are those of log.lua, in that order; for
-- an import the same of the place where it is staged follow, under the same hash tag.
--
-- A deleted session leaves "<generation> 0\n" as its snapshot for a while: whoever asks is told that
-- it was deleted, and the name's next session has a later generation.

local LOG, META, PRODUCERS, TURNS = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local DEVICES, SNAPSHOT = KEYS[5], KEYS[6]

-- {generation, offset} that a snapshot begins with
local function snapshot_place()
  local generation, offset = string.match(redis.call('GETRANGE', SNAPSHOT, 0, 40), '^(%d+) (%d+)')
  return tonumber(generation or '0'), tonumber(offset or '0')
end

local function last_generation()
  local last = redis.call('XREVRANGE', LOG, '+', '-', 'COUNT', 1)[1]
  return last and tonumber(string.match(last[1], '^(%d+)')) or 0
end

-- The latest generation that anybody can have been told of.
local function generation()
  return math.max(tonumber(redis.call('HGET', META, 'gen') or '0'), last_generation(),
    (snapshot_place()))
end

local verbs = {}

-- idle ms that it must have been ("": delete it in any case), how long to say that it was deleted
-- -> {status, when it was used last (ms), the turn that runs}
function verbs.delete(idle_ms, memory_ms)
  local known = redis.call('HMGET', META, 'gen', 'u', 'cur', 'lease')
  local _, offset = snapshot_place()
  if not known[1] and redis.call('EXISTS', LOG) == 0 and offset == 0 then
    -- Deleted before: the reply was lost.
    return {redis.call('EXISTS', SNAPSHOT) == 1 and 'ok' or 'missing', 0, ''}
  end
  local now = now_ms()
  local left = tonumber(known[4] or '0') - now
  if known[1] and known[3] ~= '' and left > 0 and left <= LEASE_MAX_MS then
    return {'busy', 0, known[3]}
  end
  local used = tonumber(known[2] or '0')
  local device = redis.call('ZREVRANGE', DEVICES, 0, 0, 'WITHSCORES')
  if device[2] then used = math.max(used, tonumber(device[2])) end
  if idle_ms ~= '' and now - used < tonumber(idle_ms) then return {'used', used, ''} end
  local latest = generation()
  redis.call('UNLINK', LOG, META, PRODUCERS, TURNS, DEVICES, SNAPSHOT)
  redis.call('SET', SNAPSHOT, int(latest) .. ' 0\n', 'PX', memory_ms)
  redis.pcall('PUBLISH', META, '0 0') -- whoever watches it looks: see changes.py
  return {'ok', used, ''}
end

-- -> {generation, deleted?}: no session of this name had a later one; whether it was deleted
function verbs.past()
  local at, offset = snapshot_place()
  local gone = at > 0 and offset == 0 and redis.call('EXISTS', META) == 0
  return {math.max(generation(), now_ms()), gone and 1 or 0}
end

-- generation, offset of the first op, how long it is kept, ops... : KEYS[7], a log that is staged
function verbs.stage(at, first, kept_ms, ...)
  local last = redis.call('XREVRANGE', KEYS[7], '+', '-', 'COUNT', 1)[1]
  local known = last and tonumber(string.match(last[1], '-(%d+)$')) or 0
  for i, op in ipairs({...}) do
    local offset = tonumber(first) + i - 1
    if offset > known then redis.call('XADD', KEYS[7], at .. '-' .. int(offset), 'o', op) end
  end
  redis.call('PEXPIRE', KEYS[7], kept_ms)
  return {'ok'}
end

-- generation, tail, folded up to, bytes of ops, of those up to `folded`, nonce
-- -> {status, the session's tail}: what was staged becomes the session, if it has no entries
function verbs.commit(at, tail, folded, written, written_folded, nonce)
  local known = redis.call('HMGET', META, 'tail', 'im')
  if known[2] == nonce then return {'ok', tonumber(tail)} end -- the reply was lost
  local _, offset = snapshot_place()
  if tonumber(known[1] or '0') > 0 or offset > 0 or redis.call('EXISTS', LOG) == 1 then
    return {'taken', tonumber(known[1] or '0')}
  end
  if tonumber(at) <= generation() then return {'stale', 0} end
  if redis.call('EXISTS', KEYS[8]) == 0 then return {'expired', 0} end
  redis.call('UNLINK', META, PRODUCERS, TURNS, SNAPSHOT)
  for i = 1, 6 do
    local staged = KEYS[6 + i]
    if redis.call('EXISTS', staged) == 1 then
      redis.call('RENAME', staged, KEYS[i])
      redis.call('PERSIST', KEYS[i])
    end
  end
  local now = now_ms()
  local life = store_life()
  redis.call('HSET', META, 'gen', at, 'tail', tail, 'gens', at .. ':1', 'life', life, 'pub', 0,
    'da', int(now), 'u', int(now), 'cur', '', 'lease', 0, 'stop', '', 'pe', at, 'so', folded,
    'sb', redis.call('STRLEN', SNAPSHOT), 'wb', written, 'wo', written_folded, 'im', nonce)
  redis.pcall('PUBLISH', META, at .. ' ' .. tail .. ' ' .. (redis.call('HGET', META, 'ck') or ''))
  return {'ok', tonumber(tail)}
end

return verbs[ARGV[1]](unpack(ARGV, 2))
