-- A session opened, read, folded, mended: see log.lua.

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
    new_generation(generation, tail + 1, (store_life()), now)
    redis.call('HSET', META, unpack(tail == 0 and {'da', 0, 'mx', 0} or {'bare', 1}))
    tell(int(generation), int(tail), redis.call('HGET', META, 'ck') or '')
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
    local ended, nonce = flags(redis.call('HGET', META, 'x:' .. turn))
    if ended then redis.call('HSET', META, 'x:' .. turn, '0|' .. nonce) end
  end
  -- Whoever has room finishes it, once nobody holds the session.
  if last ~= '' and redis.call('HGET', META, 'cur') == '' then
    redis.call('HSET', META, 'cur', last, 'lease', now_ms())
  end
  new_generation(known[1] + 1, missing, (store_life()), now_ms())
  tell(int(known[1] + 1), int(known[2]), redis.call('HGET', META, 'ck') or '')
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
  if running ~= '' then -- whoever has room finishes it
    redis.call('HSET', META, 'cur', running, 'lease', now_ms())
  end
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

return verbs[ARGV[1]](unpack(ARGV, 2, math.min(#ARGV, 15)))
