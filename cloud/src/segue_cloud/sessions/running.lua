-- In which sessions a turn runs: one sorted set per shard and model, "tenant:session" by the time
-- when its lease is to be looked at, by the store's clock.
--
-- KEYS[1] running
-- ARGV    verb, then its arguments

local now = now_ms()

-- name: look at all of ARGV[3..] in ARGV[2] ms
if ARGV[1] == 'name' then
  for i = 3, #ARGV do redis.call('ZADD', KEYS[1], now + tonumber(ARGV[2]), ARGV[i]) end
  return now
end

-- due: up to ARGV[2] members whose time has come; nobody else is told of them for ARGV[3] ms
if ARGV[1] == 'due' then
  local due = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'LIMIT', 0, tonumber(ARGV[2]))
  local hidden = now + tonumber(ARGV[3])
  for _, member in ipairs(due) do redis.call('ZADD', KEYS[1], hidden, member) end
  return {now, hidden, due}
end

-- looked: ARGV[2] was found to run until ARGV[4], or (0) not to run; unless it was named since
if tonumber(redis.call('ZSCORE', KEYS[1], ARGV[2]) or '-1') ~= tonumber(ARGV[3]) then return 0 end
if ARGV[4] == '0' then return redis.call('ZREM', KEYS[1], ARGV[2]) end
return redis.call('ZADD', KEYS[1], tonumber(ARGV[4]), ARGV[2])
