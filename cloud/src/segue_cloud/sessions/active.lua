-- Which sessions were written to lately: one sorted set per shard, by the store's clock.
--
-- KEYS[1] active     sorted set: "tenant:session" by the time a writer last named it, ms
-- ARGV    verb, then its arguments

local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)

if ARGV[1] == 'touch' then
  redis.call('ZADD', KEYS[1], now, ARGV[2])
  return now
end

-- take: up to ARGV[3] members nobody named for ARGV[2] ms, removed: whoever gets one owns its end
local idle = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now - tonumber(ARGV[2]), 'LIMIT', 0,
  tonumber(ARGV[3]))
if #idle > 0 then redis.call('ZREM', KEYS[1], unpack(idle)) end
return idle
