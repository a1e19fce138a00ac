-- Through which broker the clouds of this store publish: one hash, under a lease.
--
-- KEYS[1] broker  url; owner: the instance whose broker it is, '' where it is nobody's child; until:
--                 when the lease ends, ms
-- ARGV    verb, then its arguments -> {url, owner, what is left of the lease, ms}; '' where none

local now = now_ms()
local known = redis.call('HMGET', KEYS[1], 'url', 'owner', 'until')
local url, owner = known[1] or '', known[2] or ''
local left = tonumber(known[3] or '0') - now
if left <= 0 or left > LEASE_MAX_MS then url, owner, left = '', '', 0 end

if ARGV[1] == 'look' then return {url, owner, left} end

-- release: url, owner
if ARGV[1] == 'release' then
  if url == ARGV[2] and owner == ARGV[3] then redis.call('DEL', KEYS[1]) end
  return {'', '', 0}
end

-- claim: url, owner, lease ms, url of a dead broker that it replaces or ''
if url ~= '' and url ~= ARGV[2] and url ~= ARGV[5] then return {url, owner, left} end
redis.call('HSET', KEYS[1], 'url', ARGV[2], 'owner', ARGV[3], 'until',
  int(now + tonumber(ARGV[4])))
return {ARGV[2], ARGV[3], tonumber(ARGV[4])}
