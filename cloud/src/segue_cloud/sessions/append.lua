-- Ops of a device or of a turn's owner, appended: see log.lua. It is called for every token, so it is
-- a script of its own: the store makes the functions of a script anew for each call of it.

-- The offset that `seq` got then; 0 where that is forgotten.
local function offset_of(runs, seq)
  local found = 0
  for first, offset in string.gmatch(runs, '(%d+):(%d+)') do
    if tonumber(first) <= seq then found = tonumber(offset) + seq - tonumber(first) end
  end
  return found
end

local function add_run(runs, seq, offset, bound)
  local first, at = string.match(',' .. runs, '.*,(%d+):(%d+)$') -- from the end: it may be long
  if first and tonumber(at) - tonumber(first) == offset - seq then return runs end
  if runs ~= '' then
    local _, commas = string.gsub(runs, ',', ',')
    if commas + 2 > bound then runs = string.match(runs, '^[^,]*,(.*)$') or '' end
  end
  return (runs == '' and '' or runs .. ',') .. int(seq) .. ':' .. int(offset)
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

-- What the ops from the n-th on take of the quotas, by their slots: "v" or "d" and a name's hash, 17
-- characters each (see quota.py). -> the status where there is no room, or the fields to set
local function quota(slots, n, bounds)
  if slots == '' then return nil, {} end
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
  if news.v + news.d + news.k == 0 then return nil, {} end
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
  -- All that an append has to know, in one command.
  local known = meta('cur', 'stop', field, 'x:' .. turn, 'so', 'pub', 'mx', 'ck', 'wb',
    'wo', 'sb')
  if not known then return {'missing', 0, 0, 0, 0, 0, 0, 0, 0, 0, 0} end
  local generation, tail, current, stop = known[1], known[2], known[3], known[4]
  local stopping = (turn ~= '' and stop == turn) and 1 or 0
  local has, seq, runs = parse(known[5])
  local log = log_facts(unpack(known, 8, 13))
  local function answer(status, offset, expected, appended, lost)
    return {status, generation, offset, tail, math.max(has, 0), expected, stopping, appended,
      tail - tonumber(known[7] or '0'), log.since, lost or 0}
  end
  local ended, owner = false, nonce
  if turn ~= '' then ended, owner = flags(known[6]) end
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
    -- It waits for replicas behind the last write of its own connection.
    if ends == '1' and same == 'ok' then redis.call('HSET', META, 'gen', generation) end
    return answer(same == 'ok' and 'dup' or same, offset, seq + 1, 0)
  end
  if ended then return answer('stale', 0, 0, 0) end
  if first > seq + 1 then return answer('gap', 0, seq + 1, 0) end
  local news = seq + 1
  local from = OPS + news - first
  if turn == '' and log.size + size_of(from) > tonumber(room) then
    return answer('no_room', 0, seq + 1, 0)
  end
  local full, set = quota(slots, news - first + 1, bounds)
  if full then return answer(full, 0, seq + 1, 0) end

  local now = now_ms()
  runs = add_run(runs, news, tail + 1, tonumber(runs_bound))
  local n = #set
  set[n + 1], set[n + 2] = field, int(epoch) .. '|' .. int(last) .. '|' .. runs
  if turn ~= '' and ends == '1' then
    set[n + 3], set[n + 4] = 'x:' .. turn, '1|' .. nonce
    if current == turn then
      set[n + 5], set[n + 6], set[n + 7] = 'cur', '', 'lease'
      set[n + 8], set[n + 9], set[n + 10] = 0, 'stop', ''
    end
  elseif turn ~= '' and current == turn then
    set[n + 3], set[n + 4] = 'lease', now + tonumber(lease_ms)
  end
  local offset = first == news and tail + 1 or offset_of(runs, first)
  tail = write(generation, tail, log, from, now, set)
  if turn == '' then
    -- `open` makes the others, and forgets as it does.
    local new = redis.call('ZADD', PRODUCERS, now, producer) == 1
    if new then forget_producers(tonumber(bound), now) end
  end
  return answer('ok', offset, last + 1, last - seq)
end

local reply = verbs[ARGV[1]](unpack(ARGV, 2, math.min(#ARGV, 15)))
reply[#reply + 1] = replicas -- it may be waited for them
return reply
