-- Which sessions were written to lately: one sorted set per shard, by the store's clock.
--
-- KEYS[1] active     sorted set: "tenant:session" by the time a writer last named it, ms
-- ARGV    verb, then its arguments

local now = now_ms()

if ARGV[1] == 'touch' then
  redis.call('ZADD', KEYS[1], now, ARGV[2])
  return now
end

-- idle: up to ARGV[3] members nobody named for ARGV[2] ms; they stay
if ARGV[1] == 'idle' then
  return redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now - tonumber(ARGV[2]), 'LIMIT', 0,
    tonumber(ARGV[3]))
end

-- take: of ARGV[3..] those that are still idle, removed: whoever gets one owns its end
local taken = {}
for i = 3, #ARGV do
  local named = tonumber(redis.call('ZSCORE', KEYS[1], ARGV[i]) or 'inf')
  if named <= now - tonumber(ARGV[2]) then
    redis.call('ZREM', KEYS[1], ARGV[i])
    taken[#taken + 1] = ARGV[i]
  end
end
return taken
